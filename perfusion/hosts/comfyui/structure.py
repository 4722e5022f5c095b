"""What a ComfyUI model is made of: its family, and the projections of its cross-attention layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ...family import Family, name_of

_ATTN2 = re.compile(r"^(?P<transformer>.+)\.transformer_blocks\.(?P<block>\d+)\.attn2$")


class UnsupportedModelError(ValueError):
    """A model without the cross-attention that concepts edit; the message says which models have it."""


def projections(diffusion_model: Any) -> Iterator[tuple[str, Any, Any]]:
    """Each cross-attention layer in the network's order: its name, ``to_k`` and ``to_v``."""
    for name, module in diffusion_model.named_modules():
        # A compiled network, or block, keeps the original below this name.
        name = name.replace("_orig_mod.", "")
        if _ATTN2.match(name) and hasattr(module, "to_k") and hasattr(module, "to_v"):
            yield name.removesuffix(".attn2"), module.to_k, module.to_v


def encoder_widths(clip: Any) -> dict[str, int]:
    """Text encoder ("clip_l") -> width of its token embeddings, in the order of their encodings in the context."""
    widths = {}
    for name, encoder in clip.cond_stage_model.named_children():
        if hasattr(clip.tokenizer, name) and hasattr(getattr(encoder, "transformer", None), "get_input_embeddings"):
            widths[name] = encoder.transformer.get_input_embeddings().weight.shape[-1]
    if not widths or not all(name.startswith("clip_") for name in widths):
        raise UnsupportedModelError(
            "the CLIP on input 'clip' has no CLIP text encoder. Perfusion works with the CLIP of Stable Diffusion 1.x, "
            "2.x and SDXL checkpoints."
        )
    return widths


def family_of(model: Any, clip: Any) -> Family:
    """The family of a MODEL and its CLIP. Raises UnsupportedModelError when concepts cannot work there."""
    transformers: dict[str, tuple[int, int]] = {}
    context_width = 0
    for layer, to_k, to_v in projections(model.model.diffusion_model):
        transformer = layer.rpartition(".transformer_blocks.")[0]
        transformers[transformer] = (transformers.get(transformer, (0, 0))[0] + 1, int(to_v.out_features))
        context_width = int(to_k.in_features)
    if not transformers:
        raise UnsupportedModelError(
            "the model on input 'model' has no cross-attention to text. Perfusion works with Stable Diffusion 1.x, 2.x "
            "and SDXL checkpoints."
        )
    return Family(name_of(context_width), context_width, encoder_widths(clip), transformers)
