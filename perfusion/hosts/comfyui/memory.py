"""How much memory a training will take, before anything is loaded: by a step of its network on no data at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.ldm.modules.attention as comfy_attention
import comfy.model_management
import comfy.ops
import torch
from torch import Tensor

from ...training.config import TrainingConfig
from ..frozen import frozen_layers
from .structure import encoder_widths, projections
from .training import ComfyHost, blocks_of, checkpointed, is_faster_plain

_GIB = 1 << 30
_TOKENS = 77
_TEXT_KEPT = 26  # numbers that a layer of CLIP keeps for each number of its width, token by token


def training_bytes(host: ComfyHost, config: TrainingConfig) -> int:
    """What a step of this training holds at least, in bytes, on the device where the network computes.

    The network's and the encoders' weights are in it where they have yet to be brought to that device, and copies of
    the edited projections' where they are stored in another precision than they compute in: other layers keep none.
    What single operations need for a moment is not, nor prompts beyond the first: a batch may have one alone.
    """
    model = host.model.model
    compute, stored = host.compute_dtype, model.get_dtype()
    micro = min(config.micro_batch or config.batch_size, config.batch_size)
    kept = _kept_by_network(host, micro, config, compute)
    encoder = host.clip.cond_stage_model
    a_prompt = sum(_kept_by_encoder(encoder, name, width) for name, width in encoder_widths(host.clip).items())
    # With checkpointing encoders run again when the network is done, else they wait for it.
    kept = max(kept, micro * a_prompt) if config.gradient_checkpointing else kept + a_prompt
    if stored != compute:
        edited = [layer.weight.numel() for _, *both in projections(model.diffusion_model) for layer in both]
        kept += sum(edited) * compute.itemsize
    if comfy.model_management.is_device_cpu(host.device):
        kept += sum(layer.weight.numel() * layer.weight.itemsize for layer in host.narrow_layers)  # twice as wide
    else:
        kept += host.model.model_size() + host.clip.patcher.model_size()
    return kept


def available_bytes(host: ComfyHost) -> int:
    """What a training could have on the device where the network computes, with all other models gone from it."""
    management, device = comfy.model_management, host.device
    free = management.get_free_memory(device)
    if management.is_device_cpu(device):
        return int(free)
    loaded = [entry for entry in management.current_loaded_models if entry.device == device]
    return int(free + sum(entry.model_loaded_memory() for entry in loaded))


def require_memory(host: ComfyHost, config: TrainingConfig) -> None:
    """Raise ValueError, saying what would fit, for a training that cannot have the memory it takes."""
    available, needed = available_bytes(host), training_bytes(host, config)
    if needed <= available:
        return
    smaller = (
        ("micro_batch to 1", replace(config, micro_batch=1)),
        ("micro_batch to 1 and gradient_checkpointing on", replace(config, micro_batch=1, gradient_checkpointing=True)),
    )
    fits = [(how, need) for how, other in smaller if (need := training_bytes(host, other)) <= available]
    advice = f"set {fits[0][0]}, which takes {_told(fits[0][1])}" if fits else "lower resolution"
    raise ValueError(
        f"this training takes at least {_told(needed)} of memory, and {_told(available)} can be had on {host.device}: "
        f"{advice}."
    )


def _told(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"


def _kept_by_network(host: ComfyHost, batch: int, config: TrainingConfig, dtype: torch.dtype) -> int:
    """Bytes that the network keeps for its backward pass, found by running a twin of it without data or weights."""
    with torch.inference_mode(False), torch.enable_grad():
        model = host.model.model
        settings = {**model.model_config.unet_config, "dtype": dtype}
        twin = type(model.diffusion_model)(**settings, device="meta", operations=comfy.ops.disable_weight_init)
        twin.requires_grad_(False).eval()
        kept = _Kept(twin)
        with frozen_layers(twin), kept.watching():
            _run(host, twin, batch, config.resolution // host.latent_scale, dtype)
        if not config.gradient_checkpointing:
            return kept.bytes
        rest = _Kept(twin)
        with frozen_layers(twin), checkpointed(twin), rest.watching():
            _run(host, twin, batch, config.resolution // host.latent_scale, dtype)
        return rest.bytes + kept.most_by_a_block  # which is made again, one block after the other


def _run(host: ComfyHost, network: Any, batch: int, side: int, dtype: torch.dtype) -> None:
    """A forward pass on the meta device, with attention as it will be where the network computes."""
    model = host.model.model
    empty = partial(torch.empty, dtype=dtype, device="meta")
    further = {"y": empty(batch, model.adm_channels)} if host.wants_pooled else {}
    on_cpu = comfy.model_management.is_device_cpu(host.device)

    def attention(chosen: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = on_cpu and is_faster_plain(q, k)
        return (comfy_attention.attention_basic if plain else _fused)(q, k, *args, **kwargs)

    network(
        empty(batch, model.latent_format.latent_channels, side, side),
        torch.empty(batch, device="meta"),
        context=empty(batch, _TOKENS, host.family.context_width, requires_grad=True),
        transformer_options={"optimized_attention_override": attention},
        **further,
    )


class _Kept:
    """What autograd keeps of a pass through a network, and the most that it keeps of one of its larger blocks."""

    def __init__(self, network: torch.nn.Module):
        self._blocks = blocks_of(network)
        self._weights = {tensor.untyped_storage()._cdata for tensor in network.parameters()}
        self._found: dict[int, Tensor] = {}
        self.bytes = self.most_by_a_block = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Counts what is kept of passes in the block."""
        with ExitStack() as stack:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor))
            for block in self._blocks:
                entered: list[int] = []
                before = block.register_forward_pre_hook(lambda *_, entered=entered: entered.append(self.bytes))
                after = block.register_forward_hook(lambda *_, entered=entered: self._left(entered.pop()))
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield
        self._found.clear()

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights and storage._cdata not in self._found:
            self._found[storage._cdata] = tensor  # holding it keeps its number from being given again
            self.bytes += storage.nbytes()
        return tensor

    def _left(self, entered: int) -> None:
        self.most_by_a_block = max(self.most_by_a_block, self.bytes - entered)


def _kept_by_encoder(encoder: Any, name: str, width: int) -> int:
    """Bytes that a text encoder keeps for one prompt."""
    transformer = getattr(encoder, name).transformer
    return _TOKENS * width * _TEXT_KEPT * transformer.num_layers * torch.float32.itemsize


class _Fused(torch.autograd.Function):
    """A fused kernel, as far as memory goes: it keeps what it was given and its result, and no map of attention."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("nothing is differentiated without data")


def _fused(q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any) -> Tensor:
    return _Fused.apply(q, k, v)
