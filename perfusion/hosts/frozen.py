"""Layers whose weights nobody trains: what comes in gets its gradient, and nothing is kept for it but the weights.

torch keeps the input of every convolution, of which only gradients of weights would need it; and of weights that are
stored in other precision than is computed in, it keeps the converted copies of all layers until the backward pass.

On CPUs the products of linear layers are oneDNN's: torch leaves those in 32 bit to MKL, which on CPUs of other makers
than its own takes twice as long (``benchmarks.training``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from torch.nn.grad import conv2d_input

from .replacing import replaced_forwards

_STORED = (torch.float32, torch.float16, torch.bfloat16)


def frozen_layers(
    *networks: nn.Module, patched: Callable[[nn.Module], bool] = lambda _: False
) -> AbstractContextManager[None]:
    """For the time of the block, linear layers and convolutions keep nothing for gradients of their weights, and those
    linear ones are fast that are on a CPU.

    Layers whose forward somebody has replaced stay as they are, and so do, call by call, those that are ``patched``:
    their weights are not what they compute with.
    """

    def forward(module: Any, own: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight = module.weight
        if args or kwargs or weight.requires_grad or weight.device != x.device or patched(module):
            return own(x, *args, **kwargs)
        if torch.is_grad_enabled() and x.requires_grad:
            return frozen(module, x)
        trained_bias = module.bias is not None and module.bias.requires_grad
        if isinstance(module, nn.Linear) and _by_onednn(x) and not trained_bias:
            return _onednn_linear(x, *_in_precision_of(x, weight, module.bias))
        return own(x)

    layers = [module for network in networks for module in network.modules() if _is_known(module)]
    return replaced_forwards({layer: partial(forward, layer, layer.forward) for layer in layers})


@contextmanager
def widened(tensors: Iterable[Tensor], *, keep: bool) -> Iterator[None]:
    """Tensors that are stored in half precision in 32 bit for the time of the block.

    What was stored is kept beside them and put back, or else made anew of what they then are, with the same numbers.
    """
    narrow = list(tensors)
    stored = [(tensor.dtype, tensor.data if keep else None) for tensor in narrow]
    try:
        for tensor in narrow:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, (dtype, data) in zip(narrow, stored, strict=True):
            tensor.data = tensor.data.to(dtype) if data is None else data


def frozen(module: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """What a layer makes of x, computed in the precision of x; gradients reach x alone."""
    if isinstance(module, nn.Linear):
        return _Linear.apply(x, module.weight, module.bias)
    settings = module.stride, module.padding, module.dilation, module.groups
    return _Convolution.apply(x, module.weight, module.bias, settings)


def _is_known(module: nn.Module) -> bool:
    if "forward" in vars(module) or not isinstance(module, (nn.Linear, nn.Conv2d)):
        return False
    plain = isinstance(module, nn.Linear) or (module.padding_mode == "zeros" and not isinstance(module.padding, str))
    return plain and type(module.weight) is nn.Parameter and module.weight.dtype in _STORED


def _in_precision_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


def _by_onednn(x: Tensor) -> bool:
    """Whether oneDNN can be asked for products with x, by the operator that torch.compile asks it by.

    That one knows of no autocast.
    """
    onednn = torch.backends.mkldnn
    known = onednn.is_available() and onednn.enabled and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and x.ndim > 1 and x.numel() > 0
    return known and fits and not torch.is_autocast_enabled("cpu")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) times a weight (out, in), and a bias (out,)."""
    return (_onednn_linear if _by_onednn(x) else linear)(x, weight, bias)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, *_in_precision_of(x, weight, bias))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(gradients[0], weight.to(gradients[0].dtype).mT, None), None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]) -> Tensor:
        return conv2d(x, *_in_precision_of(x, weight, bias), *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.shape, ctx.settings = inputs[0].shape, inputs[3]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        return conv2d_input(ctx.shape, weight.to(gradients[0].dtype), gradients[0], *ctx.settings), None, None, None
