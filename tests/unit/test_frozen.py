"""Layers whose weights nobody trains: the same numbers, and nothing kept for gradients that nobody asks for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from perfusion.hosts import frozen
from perfusion.hosts.frozen import frozen_layers

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 6),
    "linear without bias": lambda: nn.Linear(6, 3, bias=False),
    "wide linear": lambda: nn.Linear(6, 300),
    "convolution": lambda: nn.Conv2d(6, 4, 3, padding=1),
    "strided": lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1),
    "grouped and dilated": lambda: nn.Conv2d(6, 4, 3, dilation=2, groups=2, bias=False),
    "reflecting": lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"),
    "same": lambda: nn.Conv2d(6, 4, 3, padding="same"),
}


def _input(name: str) -> Tensor:
    shape = (2, 5, 6) if "linear" in name else (2, 6, 9, 9)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()


def _run(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    made = layer(x)
    (gradient,) = torch.autograd.grad(made.square().sum(), x)
    return made.detach(), gradient


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("onednn", [True, False])
def test_outputs_and_gradients_are_those_of_the_layer(name: str, onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not onednn:
        monkeypatch.setattr(frozen, "_by_onednn", lambda x: False)
    torch.manual_seed(0)
    layer, x = LAYERS[name]().requires_grad_(False), _input(name)
    expected = _run(layer, x)
    with frozen_layers(layer):
        found = _run(layer, x)
        with torch.no_grad():
            without_gradient = layer(x)
    for a, b in zip((*expected, expected[0]), (*found, without_gradient), strict=True):
        torch.testing.assert_close(a, b)
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("name", ["linear", "convolution"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_as_they_are_stored_are_all_that_is_kept(name: str, stored: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x, kept = LAYERS[name]().to(stored).requires_grad_(False), _input(name), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with frozen_layers(layer), saved_tensors_hooks(keep, lambda tensor: tensor):
        made = layer(x)
    assert made.dtype == torch.float32
    assert [tensor.data_ptr() for tensor in kept] == [layer.weight.data_ptr()]  # type: ignore[union-attr]
    wide = LAYERS[name]().requires_grad_(False)
    wide.load_state_dict(layer.state_dict())
    torch.testing.assert_close(torch.autograd.grad(made.square().sum(), x)[0], _run(wide, x)[1])


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 0, 6), (4, 6), (2, 3, 5, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_of_any_shape_and_precision(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 3).to(dtype).requires_grad_(False), torch.randn(shape, dtype=dtype).requires_grad_()
    expected = _run(layer, x)
    with frozen_layers(layer):
        found = _run(layer, x)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


def test_layers_that_are_trained_wrapped_or_patched_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "_by_onednn", lambda x: False)
    calls: list[str] = []

    class Wrapped(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            calls.append("own")
            return super().forward(input)

    trained, x = Wrapped(6, 3), _input("linear")
    with frozen_layers(trained):
        trained(x).sum().backward()
    assert trained.weight.grad is not None

    patched = Wrapped(6, 3).requires_grad_(False)
    with frozen_layers(patched, patched=lambda layer: layer is patched):
        patched(x)
    wrapped = nn.Linear(6, 3).requires_grad_(False)
    wrapped.forward = lambda input: input * 2  # type: ignore[method-assign]
    with frozen_layers(wrapped):
        assert torch.equal(wrapped(x), x * 2)
    plain = Wrapped(6, 3).requires_grad_(False)
    with frozen_layers(plain):
        plain(x.detach())
        with torch.no_grad():
            plain(x)
    assert calls == ["own"] * 4
