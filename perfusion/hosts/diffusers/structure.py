"""What a diffusers pipeline is made of: its family, and its cross-attention by the names of the original UNet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...family import Family, name_of
from ...stack import ConceptStack, StackError

_WORKS_WITH = "Perfusion works with pipelines of Stable Diffusion 1.x and 2.x"


class UnsupportedPipelineError(ValueError):
    """A pipeline, or a part of one, that concepts cannot work with; the message says which can be used."""


def spatial_transformers(unet: Any) -> Iterator[tuple[str, Any]]:
    """Each spatial transformer in the network's order, by the name that the original latent-diffusion UNet gives it.

    There every residual block, with the transformer behind it, has a number of its own in its half of the network, and
    so has a downsampler; an upsampler shares that of the block before it. Number 0 of the first half is ``conv_in``.
    """
    number = 0
    for block in unet.down_blocks:
        for module in _beside_residuals(block):
            number += 1
            if module is not None:
                yield f"input_blocks.{number}.1", module
        number += bool(getattr(block, "downsamplers", None))
    for k, module in enumerate(getattr(unet.mid_block, "attentions", None) or ()):
        if module is not None:
            yield f"middle_block.{2 * k + 1}", module
    number = -1
    for block in unet.up_blocks:
        for module in _beside_residuals(block):
            number += 1
            if module is not None:
                yield f"output_blocks.{number}.1", module


def _beside_residuals(block: Any) -> list[Any]:
    """What stands behind each residual block: an attention module, or None."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return list(attentions)


def cross_attentions(unet: Any) -> Iterator[tuple[str, Any]]:
    """Each cross-attention layer in the network's order: its name, and the module with ``to_k`` and ``to_v``.

    Raises UnsupportedPipelineError where these are not what computes keys and values.
    """
    for name, module in spatial_transformers(unet):
        for k, block in enumerate(getattr(module, "transformer_blocks", ())):
            attention = getattr(block, "attn2", None)
            if attention is None or not attention.is_cross_attention:
                continue
            if getattr(attention, "fused_projections", False):
                raise UnsupportedPipelineError(
                    "the UNet's projections are fused, so that keys and values cannot be edited: "
                    "call pipeline.unfuse_qkv_projections() first"
                )
            yield f"{name}.transformer_blocks.{k}", attention


def encoder_name(width: int) -> str:
    """What the text encoder of this width is called, here as in other programs."""
    return "clip_h" if name_of(width) == "sd2" else "clip_l"


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline. Raises UnsupportedPipelineError when concepts cannot work there."""
    unet: Any = getattr(pipeline, "unet", None)
    text_encoder: Any = getattr(pipeline, "text_encoder", None)
    if unet is None or not hasattr(unet, "down_blocks"):
        raise UnsupportedPipelineError(f"a {type(pipeline).__name__} has no UNet. {_WORKS_WITH}.")
    if getattr(pipeline, "text_encoder_2", None) is not None:
        raise UnsupportedPipelineError(
            f"a {type(pipeline).__name__} has more than one text encoder, as SDXL has. {_WORKS_WITH}; "
            "for SDXL use ComfyUI."
        )
    if not hasattr(text_encoder, "get_input_embeddings") or getattr(pipeline, "tokenizer", None) is None:
        raise UnsupportedPipelineError(
            f"this {type(pipeline).__name__} lacks its text encoder or tokenizer, which concepts need. {_WORKS_WITH}: "
            "load it with both."
        )
    if text_encoder.config.model_type != "clip_text_model" or getattr(text_encoder.config, "use_attention_mask", False):
        raise UnsupportedPipelineError(
            f"the text encoder is a {type(text_encoder).__name__}, not the CLIP of Stable Diffusion. {_WORKS_WITH}."
        )
    transformers: dict[str, tuple[int, int]] = {}
    context_width = 0
    for layer, attention in cross_attentions(unet):
        transformer = layer.rpartition(".transformer_blocks.")[0]
        transformers[transformer] = (transformers.get(transformer, (0, 0))[0] + 1, int(attention.inner_kv_dim))
        context_width = int(attention.cross_attention_dim)
    if not transformers:
        raise UnsupportedPipelineError(f"the UNet has no cross-attention to text. {_WORKS_WITH}.")
    width = text_encoder.get_input_embeddings().weight.shape[-1]
    if width != context_width:
        raise UnsupportedPipelineError(
            f"the text encoder is {width} wide, the UNet's cross-attention {context_width}: they do not belong together"
        )
    return Family(name_of(context_width), context_width, {encoder_name(width): width}, transformers)


def require_fit(family: Family, stack: ConceptStack) -> None:
    """Raise StackError for a concept that was trained for another family."""
    for concept in stack.concepts:
        difference = concept.family.difference(family)
        if difference is not None:
            raise StackError(
                f"{concept.placeholder} does not fit this pipeline: {difference}. "
                "Load a model of the concept's family, or train the concept on this one."
            )
