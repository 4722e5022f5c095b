"""Target values in 8 bits: how far they move, that they move once only, and that nothing slips through unnoticed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from perfusion.quantization import LEVELS, dequantize, quantize, rounded

HALF_MAX = 65_504.0


def some_layers(largest: float) -> st.SearchStrategy[list[Tensor]]:
    """One to four layers of up to 20 values each."""
    values = st.lists(st.floats(-largest, largest, width=32), min_size=1, max_size=20)
    return st.lists(values.map(torch.tensor), min_size=1, max_size=4)


def error(values: Tensor, found: Tensor) -> float:
    """Relative, in the root mean square."""
    return float((found - values).norm() / values.norm())


@given(some_layers(HALF_MAX) | some_layers(2.0**-13))
def test_rounding_twice_is_rounding_once(values: list[Tensor]) -> None:
    """What a file holds, and so its digest, does not depend on how often it was read and written."""
    codes, scales = quantize(values)
    widths = [len(layer) for layer in values]
    again = quantize(dequantize(codes, scales, widths))
    assert torch.equal(codes, again[0])
    assert torch.equal(scales, again[1])


@given(some_layers(HALF_MAX))
def test_every_value_comes_back_near_to_where_it_was(values: list[Tensor]) -> None:
    """Half a step at most: 2 sqrt(s |o|) / 127 / 2, and what squaring adds; and the rounding of s itself."""
    for layer, found in zip(values, rounded(values), strict=True):
        scale = float(layer.abs().max().clamp_min(2.0**-14))
        step = (scale * layer.abs()).sqrt() / LEVELS + scale / (2 * LEVELS) ** 2
        assert ((found - layer).abs() <= step * 1.001 + layer.abs() * 2.0**-10).all()
        assert (found.sign() * layer.sign() >= 0).all()


def test_a_known_layer() -> None:
    """s = 2; q = 127 sqrt(|o| / s) is 127, -63.5 -> -64 (to even) and 0."""
    codes, scales = quantize([torch.tensor([2.0, -0.5, 0.0])])
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.float16
    assert codes.tolist() == [127, -64, 0]
    assert scales.tolist() == [2.0]
    (found,) = dequantize(codes, scales, [3])
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([2.0, -2 * 64 * 64 / 127**2, 0.0], rel=1e-7)


def test_layers_have_scales_of_their_own() -> None:
    large, small = 100 * torch.randn(50), 0.01 * torch.randn(30)
    codes, scales = quantize([large, small])
    assert codes.shape == (80,)
    assert scales.shape == (2,)
    found = dequantize(codes, scales, [50, 30])
    assert error(large, found[0]) < 0.02
    assert error(small, found[1]) < 0.02


def test_a_few_large_values_do_not_cost_the_small_ones() -> None:
    """Even steps of s / 127 would move the small ones four times as far."""
    values = torch.randn(1280, generator=torch.Generator().manual_seed(0))
    plain = error(values, rounded([values])[0])
    assert plain < 0.01
    values[:3] *= 60
    found = rounded([values])[0]
    scale = values.abs().max() / 127
    even = (values / scale).round() * scale
    assert error(values[3:], found[3:]) < 0.25 * error(values[3:], even[3:])


def test_a_layer_of_zeros() -> None:
    codes, scales = quantize([torch.zeros(4)])
    assert not codes.any()
    assert (scales > 0).all()
    assert not dequantize(codes, scales, [4])[0].any()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan, 1e6])
def test_what_cannot_be_stored_shows(bad: float) -> None:
    fine, wrong = torch.tensor([1.0, 2.0]), torch.tensor([1.0, bad])
    found = rounded([fine, wrong])
    assert found[0].isfinite().all()
    assert not found[1].isfinite().all()


def test_parameters_in_training_can_be_rounded() -> None:
    values = torch.randn(5, requires_grad=True)
    assert not rounded([values])[0].requires_grad
