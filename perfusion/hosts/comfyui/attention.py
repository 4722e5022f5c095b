"""A model's attention to a word, looked at through transformer options: nothing is patched or owned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...training.attention import WordAttention


def watching(attention: WordAttention) -> dict[str, Any]:
    """Transformer options for one run of a network, which hand queries and keys of all attention layers on."""
    layers = _Layers(attention)
    return {"optimized_attention_override": layers.attend, "patches": {"attn2_patch": [layers.announce]}}


class _Layers:
    """The calls of a network's attention, in order: cross-attention is announced, what is not is self-attention."""

    def __init__(self, attention: WordAttention):
        self._attention = attention
        self._announced = 0  # tokens of the context that a cross-attention is about to look at

    def announce(self, n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, ...]:
        """The host's patch before a block's cross-attention, which changes nothing."""
        self._announced = context.shape[1]
        return n, context, value

    def attend(
        self, chosen: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """In place of the host's attention, which does the work."""
        # A patch of somebody else may do a block's cross-attention in its own way, and this is the next layer's call.
        crossed = self._announced == k.shape[1] != q.shape[1]
        if crossed:
            self._attention.add_cross(q, k, heads, args[0] if args else kwargs.get("mask"))
        elif q.shape[1] == k.shape[1]:
            self._attention.add_own(q, k, heads)
        self._announced = 0
        return chosen(q, k, v, heads, *args, **kwargs)
