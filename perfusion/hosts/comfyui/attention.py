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
        self._crossed = False

    def announce(self, n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, ...]:
        """The host's patch before a block's cross-attention, which changes nothing."""
        self._crossed = True
        return n, context, value

    def attend(
        self, chosen: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """In place of the host's attention, which does the work."""
        add = self._attention.add_cross if self._crossed else self._attention.add_own
        self._crossed = False
        add(q, k, heads)
        return chosen(q, k, v, heads, *args, **kwargs)
