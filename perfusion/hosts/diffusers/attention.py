"""A UNet's attention to a word, looked at from beside its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...training.attention import WordAttention, collect
from ..base import Encodings, Word
from ..replacing import replaced
from .structure import spatial_transformers

if TYPE_CHECKING:
    from .host import DiffusersHost


def attention_maps(
    host: DiffusersHost, latents: Tensor, prompts: Sequence[str], word: Word, levels: Sequence[float]
) -> Tensor:
    """See ``Host.attention_maps``."""

    def run(noisy: Tensor, sigma: Tensor, text: Encodings, attention: WordAttention) -> None:
        with _watched(host.unet, attention):
            host.denoise(noisy, sigma, text, None)

    return collect(host, latents, prompts, word, levels, run)


@contextmanager
def _watched(unet: Any, attention: WordAttention) -> Iterator[None]:
    """Hands queries and keys of all attention layers on, for the time of the block.

    Their forwards are replaced, not their processors: whatever processor is in place, an adapter's too, stays.
    """
    with ExitStack() as stack:
        for _, transformer in spatial_transformers(unet):
            for block in getattr(transformer, "transformer_blocks", ()):
                for layer in (block.attn1, block.attn2):
                    if layer is not None:
                        stack.enter_context(replaced(layer, "forward", _watching(layer, attention)))
        yield


def _watching(layer: Any, attention: WordAttention) -> Callable[..., Tensor]:
    forward = layer.forward

    def watch(hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        crossed = layer.is_cross_attention and encoder_hidden_states is not None
        add = attention.add_cross if crossed else attention.add_own
        add(layer.to_q(hidden_states), layer.to_k(encoder_hidden_states if crossed else hidden_states), layer.heads)
        return forward(hidden_states, encoder_hidden_states, *args, **kwargs)

    return watch
