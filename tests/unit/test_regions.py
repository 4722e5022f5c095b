"""Where words may be looked for."""

from __future__ import annotations

import pytest
import torch

from perfusion.regions import attention_bias, sizes_of

LEFT = torch.cat([torch.ones(8, 4), torch.zeros(8, 4)], dim=1)


def shares(belonging: torch.Tensor, regions: list[torch.Tensor | None], size: tuple[int, int] = (4, 4)) -> torch.Tensor:
    """Attention (t, m) from scores that are all alike."""
    bias = attention_bias(belonging, regions, size)
    assert bias is not None
    return torch.softmax(bias[0], dim=-1)


def test_a_word_is_looked_for_in_its_region_only() -> None:
    gates = torch.tensor([[[0.0], [0.93], [0.2]]])
    found = shares(gates, [LEFT]).view(4, 4, 3)
    assert torch.allclose(found[:, :2], torch.full((4, 2, 3), 1 / 3))
    assert float(found[:, 2:, 1].max()) < 1e-5
    assert torch.allclose(found[:, 2:, [0, 2]], torch.full((4, 2, 2), 0.5), atol=1e-5)


def test_two_words_share_the_picture_and_where_regions_overlap() -> None:
    gates = torch.tensor([[[0.95, 0.1], [0.1, 0.95], [0.0, 0.0]]])
    right = torch.ones(8, 8)
    right[:, :2] = 0
    found = shares(gates, [LEFT, right]).view(4, 4, 3)[0]
    assert (found[:, 0] > 0.3).tolist() == [True, True, False, False]
    assert (found[:, 1] > 0.3).tolist() == [False, True, True, True]


def test_soft_edges_take_a_part() -> None:
    found = shares(torch.tensor([[[1.0], [0.0]]]), [torch.full((4, 4), 0.5)])
    assert torch.allclose(found[:, 0], torch.tensor(1 / 3))


def test_words_that_hardly_belong_and_concepts_without_region_are_left_alone() -> None:
    assert attention_bias(torch.rand(2, 5, 2), [None, None], (4, 4)) is None
    bias = attention_bias(torch.full((2, 5, 2), 0.5), [LEFT, None], (4, 4))
    assert bias is not None and bias.shape == (2, 16, 5)
    assert torch.equal(bias, torch.zeros(2, 16, 5))


@pytest.mark.parametrize("size", [(16, 16), (9, 13), (1, 1), (64, 96)])
def test_layers_see_latents_halved_and_rounded_up(size: tuple[int, int]) -> None:
    sizes = sizes_of(*size)
    assert sizes[size[0] * size[1]] == size
    assert sizes[-(-size[0] // 2) * -(-size[1] // 2)] == (-(-size[0] // 2), -(-size[1] // 2))
