"""Where in a picture a network looks for a word: cross-attention, carried on by self-attention.

A word's cross-attention is coarse and lies on parts of a thing; self-attention says which places belong together.
Carrying the one along the other, once, fills the thing up to its edges (Wang et al. 2023, DiffSegmenter; Nguyen et al.
2023, Dataset Diffusion). Hosts hand in the queries and keys of their layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from ..hosts.base import Encodings, TextHost, Word
from ..regions import sizes_of

_AT_ONCE = 4  # pictures in the network together
MOST_PLACES = 1600  # beyond, self-attention is left out: its matrix grows with their square, to 10 MB a picture here

Size = tuple[int, int]


class WordAttention:
    """Collects the attention to a word while a network runs, any number of times, on the same pictures.

    ``word`` (b, m) bool: the word's tokens. ``size``: height and width of the latents, which the layers see halved and
    halved again.
    """

    def __init__(self, word: Tensor, size: Size):
        self._word = word
        self._size = size
        self._sizes = sizes_of(*size)
        self._cross: dict[Size, tuple[Tensor, int]] = {}
        self._own: dict[Size, tuple[Tensor, int]] = {}

    def add_cross(self, q: Tensor, k: Tensor, heads: int, bias: Tensor | None = None) -> None:
        """Queries (b, t, i) and keys (b, m, i) of a cross-attention layer, i split among the heads, and what is added
        before its softmax, (b, t or 1, m).
        """
        if (q.shape[0], k.shape[1]) != tuple(self._word.shape):
            return  # a patch has changed the batch or the context: whose word is where is not known
        attention = _attention(q, k, heads, bias)
        self._add(self._cross, torch.einsum("btm,bm->bt", attention, self._word.to(attention)))

    def add_own(self, q: Tensor, k: Tensor, heads: int) -> None:
        """Queries and keys (b, t, i) of a self-attention layer."""
        if q.shape[1] <= MOST_PLACES:
            self._add(self._own, _attention(q, k, heads))

    def maps(self) -> Tensor:
        """The share of attention that the word gets at each place: (b, h, w) float32 of the latents' size, on the CPU.

        The finest layers are left out where there are coarser ones: they follow light and edges, not things.
        """
        sizes = sorted(self._cross, key=_places)
        sizes = sizes[:-1] or sizes
        if not sizes:
            return torch.zeros(len(self._word), *self._size)
        here = max(self._own, key=_places) if self._own else self._size
        layers = sum(self._cross[size][1] for size in sizes)
        seen = torch.stack([_resized(self._cross[size][0], size, here) for size in sizes]).sum(0) / layers
        if self._own:
            total, count = self._own[here]
            seen = torch.einsum("bts,bs->bt", total / count, seen)
        return rearrange(_resized(seen, here, self._size), "b (h w) -> b h w", h=self._size[0]).cpu()

    def _add(self, where: dict[Size, tuple[Tensor, int]], value: Tensor) -> None:
        size = self._sizes.get(value.shape[1])
        if size is not None:
            total, count = where.get(size, (torch.zeros_like(value), 0))
            where[size] = total + value, count + 1


def collect(
    host: TextHost,
    latents: Tensor,
    prompts: Sequence[str],
    word: Word,
    levels: Sequence[float],
    run: Callable[[Tensor, Tensor, Encodings, WordAttention], object],
) -> Tensor:
    """What ``Host.attention_maps`` returns. ``run(noisy, sigma, text, attention)`` runs the network on pictures with
    noise while ``attention`` collects.

    The noise is that of each level, the same for all pictures: a picture's map does not depend on the others.
    """
    maps = []
    with torch.no_grad():
        # All texts first: hosts that hold one model at a time load each once.
        unique = list(dict.fromkeys(prompts))
        encoded = host.encode(unique, word)
        for start in range(0, len(latents), _AT_ONCE):
            x0 = latents[start : start + _AT_ONCE]
            which = torch.tensor([unique.index(prompt) for prompt in prompts[start : start + _AT_ONCE]])
            text = encoded.select(which.to(encoded.context.device))
            attention = WordAttention(text.word, (x0.shape[-2], x0.shape[-1]))
            for number, level in enumerate(levels):
                noise = torch.randn(x0.shape[1:], generator=torch.Generator().manual_seed(number)).to(x0)
                run(x0 + level * noise, torch.full((len(x0),), level).to(x0), text, attention)
            maps.append(attention.maps())
    return torch.cat(maps)


def _attention(q: Tensor, k: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Softmaxed attention (b, t, m), mean over the heads, in float32."""
    q, k = (rearrange(x.float(), "b t (n i) -> b n t i", n=heads) for x in (q, k))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if bias is not None and bias.ndim == 3 and bias.is_floating_point():
        scores = scores + bias.float().unsqueeze(1)
    return torch.softmax(scores, dim=-1).mean(1)


def _places(size: Size) -> int:
    return size[0] * size[1]


def _resized(maps: Tensor, size: Size, new: Size) -> Tensor:
    """Maps (b, places of ``size``) at another size: (b, places of ``new``)."""
    if size == new:
        return maps
    maps = rearrange(maps, "b (h w) -> b 1 h w", h=size[0])
    return rearrange(interpolate(maps, new, mode="bilinear", antialias=True), "b 1 h w -> b (h w)")
