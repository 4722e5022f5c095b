"""Where cross-attention looks for concepts' words, and how much, through transformer options of one call."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import comfy.ldm.modules.attention as comfy_attention
import torch
from torch import Tensor

from ...edit import KeyValueEdit
from ...focus import Focus, with_mask
from ...places import Places, placed
from ...regions import attention_bias, sizes_of

logger = logging.getLogger(__name__)

_WITHOUT_MASKS = {"attention_sage", "attention3_sage", "attention_flash"}
# Attention of other extensions, and whether it takes masks.
_asked: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def steered(
    options: dict[str, Any],
    *,
    edit: KeyValueEdit,
    regions: Sequence[Tensor | None] = (),
    places: Places | None = None,
) -> dict[str, Any]:
    """Transformer options with which cross-attention looks for the words of an edit's concepts in their regions, and
    as much as their focus says, where ``places`` has them; without those everywhere alike.

    ``regions`` are (height, width) of the whole picture, None for a concept that may be anywhere. What other extensions
    have put into the options stays: their patches come first, and their attention does the work.
    """
    following, replaced = options.get("optimized_attention_override"), replaced_in(options)
    layers = _Layers(edit, regions, places, following, replaced=replaced)
    patches = dict(options.get("patches", {}))
    patches["attn2_patch"] = [*patches.get("attn2_patch", []), layers.announce]
    return {**options, "patches": patches, "optimized_attention_override": layers.attend}


def replaced_in(options: dict[str, Any]) -> bool:
    """Whether another extension does the cross-attention of some blocks in its own way."""
    return bool(options.get("patches_replace", {}).get("attn2"))


class _Layers:
    """The calls of a network's attention, in order; each cross-attention is announced by the patch before it."""

    def __init__(
        self,
        edit: KeyValueEdit,
        regions: Sequence[Tensor | None],
        places: Places | None,
        following: Callable[..., Tensor] | None,
        *,
        replaced: bool,
    ):
        self._edit, self._regions, self._places = edit, regions, places
        self._following, self._replaced = following, replaced
        self._context: Tensor | None = None
        self._announced = 0  # places that look, in the layer whose attention comes next
        self._stage: Any = ""
        self._size: tuple[int, int] | None = None
        self._biases: dict[tuple[int, int], Tensor | None] = {}
        self._belonging: Tensor | None = None
        self._everywhere: Tensor | None = None
        self._by_place: Focus | None = None

    def announce(self, n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, ...]:
        """The host's patch before a block's cross-attention, which changes nothing."""
        # All layers look at one context, unless another patch hands over its own.
        if context is not self._context:
            self._context, self._biases = context, {}
            self._belonging = self._edit.belonging(context) if self._regions else None
            self._everywhere, self._by_place = self._focus_in(context)
        self._announced = n.shape[1]
        self._stage = extra.get("block", ("",))[0]
        by_place = self._regions or self._by_place is not None
        self._size = sizes_of(*extra["original_shape"][-2:]).get(n.shape[1]) if by_place else None
        return n, context, value

    def attend(
        self, chosen: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """In place of the host's attention, which does the work."""
        announced, self._announced = self._announced, 0
        # Where somebody else does a block's cross-attention, the announced call may never come, and this be the next.
        if self._replaced and k.shape[1] == q.shape[1]:
            announced = 0
        if announced == q.shape[1] and self._context is not None and k.shape[:2] == self._context.shape[:2]:
            bias = self._bias(q, k)
            mask = args[0] if args else kwargs.pop("mask", None)
            if bias is not None:
                return self._masked(chosen, q, k, v, heads, bias.to(q), mask, *args[1:], **kwargs)
            args = (mask, *args[1:])
        if self._following is not None:
            return self._following(chosen, q, k, v, heads, *args, **kwargs)
        return chosen(q, k, v, heads, *args, **kwargs)

    def _masked(
        self,
        chosen: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        bias: Tensor,
        mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """The attention with what is added before its softmax, by whoever does it and takes masks."""
        chosen, whole = _taking_masks(chosen), with_mask(bias, mask)
        following = self._following
        if following is None or not _asked.get(following, True):
            return chosen(q, k, v, heads, whole, *args, **kwargs)
        made = following(chosen, q, k, v, heads, whole, *args, **kwargs)
        if following in _asked or torch.compiler.is_compiling() or not bool(bias.any()):
            return made
        # Fast kernels leave masks out without a word.
        takes = not torch.equal(made, following(chosen, q, k, v, heads, mask, *args, **kwargs))
        _asked[following] = takes
        if takes:
            return made
        logger.info(
            "Another extension's attention leaves masks out (fast kernels do): where words of concepts are looked at "
            "more, or in regions, ComfyUI's own does the work."
        )
        return chosen(q, k, v, heads, whole, *args, **kwargs)

    def _focus_in(self, context: Tensor) -> tuple[Tensor | None, Focus | None]:
        """What is added at all places alike, (b, 1, m), and what is added by place.

        A concept with a region has its place.
        """
        focus = self._edit.focus(context)
        if focus is None:
            return None, None
        if self._places is None:
            return focus.everywhere, None
        if not any(region is not None for region in self._regions):
            return None, focus
        placeless = torch.tensor([region is None for region in self._regions], device=focus.parts.device)
        everywhere = Focus(focus.parts * ~placeless, weighing=focus.weighing).everywhere
        return everywhere, Focus(focus.parts * placeless, focus.kinds)

    def _bias(self, q: Tensor, k: Tensor) -> Tensor | None:
        """What is added before the softmax of queries (b, places, i) and keys (b, m, i): (b, places or 1, m)."""
        parts = [self._region_bias(self._size), self._everywhere, self._placed_bias(self._size, q, k)]
        present = [part for part in parts if part is not None]
        return sum(present[1:], present[0]) if present else None

    def _placed_bias(self, size: tuple[int, int] | None, q: Tensor, k: Tensor) -> Tensor | None:
        focus, places = self._by_place, self._places
        if focus is None or places is None:
            return None
        if size is None:
            return focus.everywhere
        if places.asks(self._stage, size):
            places.add(q, k, focus, size)
        shares = places.shares(focus, size)
        return focus.everywhere if shares is None else placed(focus, shares)

    def _region_bias(self, size: tuple[int, int] | None) -> Tensor | None:
        if size is None or not self._regions:
            return None
        if size not in self._biases:
            assert self._belonging is not None
            self._biases[size] = attention_bias(self._belonging, self._regions, size)
        return self._biases[size]


def _taking_masks(chosen: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The host's attention, or in place of kernels that drop masks, in some versions of the host, one that does not."""
    return comfy_attention.attention_pytorch if getattr(chosen, "__name__", "") in _WITHOUT_MASKS else chosen
