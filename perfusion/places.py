"""Which words the model looks at more where, so that each thing of a picture keeps its own looks.

Words that are looked at more (``KeyValueEdit.focus``) are so everywhere: the looks of one concept get into the thing of
another, and take the room of plain things. But the network knows early where each thing is to be. Where its decoder
begins, a place p that will show the thing of concept j has the larger product with that concept's key,

    s_j(p) = q_p . k_j        less its mean over the picture; k_j the mean key of the concept's words

already in the first step of sampling. So concepts compete for places, with each other and with nobody, whose s is 0:

    w_j(p) = exp(z_j) / (1 + sum_i exp(z_i))        with z_j = 3 s_j(p) / sigma + log a_j

where sigma is the standard deviation of s over the picture, and a_j how much more the word of concept j is looked at,
of that which is looked at most: one whose gate is all but shut takes no place. What is added before the softmax for a
word of concept j is multiplied by ``2 w_j(p) - 1``: all of it where the thing of its concept is, and the same taken
away where others are. All layers look by what those said in the last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.nn.functional import interpolate, pad

from .focus import Focus

Stage = Literal["input", "middle", "output"]  # of a UNet: its encoder, its middle, its decoder
Size = tuple[int, int]  # height and width, in places

_SHARPNESS = 3.0
_LEAST = 1e-6
_WHOLE_FROM = 2.0  # of concepts of one kind, one looked at half as much as another still has as many places


def placed(focus: Focus, shares: Tensor) -> Tensor:
    """What is added before the softmax at each place, by the shares (b, t, j) of concepts: (b, t, m)."""
    return einsum(focus.parts, 2 * shares - 1, "b m j, b t j -> b t m")


class Places:
    """One call of the network: where the words of concepts are looked at, by the layers that know.

    ``before`` is what they said in the call before, (b, j, height, width), of the same prompts: see ``said``.
    """

    def __init__(self, before: Tensor | None = None):
        self._before = before
        self._maps: list[Tensor] = []
        self._decoder: Size | None = None
        self._shares: dict[Size, tuple[int, Tensor]] = {}

    def asks(self, stage: Stage, size: Size) -> bool:
        """Whether a layer with so many places is one that knows: of the decoder's first that look at the text."""
        if stage == "output" and self._decoder is None:
            self._decoder = size
        return stage == "output" and size == self._decoder

    def add(self, queries: Tensor, keys: Tensor, focus: Focus, size: Size) -> None:
        """What such a layer says, by its queries (b, t, i) and keys (b, m, i), of all heads side by side."""
        with torch.no_grad():
            words = focus.parts / focus.parts.sum(1, keepdim=True).clamp_min(_LEAST)
            key = einsum(words, keys.float(), "b m j, b m i -> b j i")
            said = einsum(queries.float(), key, "b t i, b j i -> b j t") / queries.shape[-1] ** 0.5
            said = said - said.mean(-1, keepdim=True)
            self._maps.append(rearrange(said, "b j (h w) -> b j h w", h=size[0]))

    def shares(self, focus: Focus, size: Size) -> Tensor | None:
        """w of each concept at the places of a layer: (b, t, j), None where no layer has said anything yet."""
        before = self._before
        known = [before] if before is not None and before.shape[:2] == focus.most.shape else self._maps
        if not known:
            return None
        if size not in self._shares or self._shares[size][0] != len(known):
            self._shares[size] = len(known), _shares(known, focus, size)
        return self._shares[size][1]

    @property
    def said(self) -> Tensor | None:
        """The mean of what was said in this call, for the next: (b, j, height, width)."""
        return torch.stack(self._maps).mean(0) if self._maps else None


def _shares(said: Sequence[Tensor], focus: Focus, size: Size) -> Tensor:
    most = focus.most
    mean, present = torch.stack(list(said)).mean(0), most > 0
    spread = mean.flatten(2).std(-1, correction=0)
    sigma = (spread * present).sum(-1) / present.sum(-1).clamp_min(1)
    weight = (most / most.amax(1, keepdim=True).clamp_min(_LEAST)).log()  # of one that is not present, minus infinity
    z = _SHARPNESS * mean / rearrange(sigma.clamp_min(_LEAST), "b -> b 1 1 1") + rearrange(weight, "b j -> b j 1 1")
    shares = torch.softmax(pad(z, (0, 0, 0, 0, 0, 1)), 1)[:, :-1]  # the last is nobody
    for kind in sorted(set(focus.kinds)):
        members = [j for j, other in enumerate(focus.kinds) if other == kind]
        if len(members) > 1:
            words = focus.parts[..., members] > 0
            shares[:, members] = _side_by_side(shares[:, members], most[:, members], words)
    # Of a concept that was not in yet nothing was said.
    asked = (~present | (spread > 0)).all(1)
    shares = torch.where(rearrange(asked, "b -> b 1 1 1"), shares, torch.ones_like(shares))
    return rearrange(_resized(shares, size), "b j h w -> b (h w) j")


def _side_by_side(shares: Tensor, most: Tensor, words: Tensor) -> Tensor:
    """Shares (b, n, h, w) of concepts of one kind, from left to right in the order of their words (b, m, n) bool.

    ``most`` (b, n) is what is added for a word of each: one with less than half of what the greatest has gets less of
    the places, and one with nothing none.
    """
    room = (_WHOLE_FROM * most / most.amax(1, keepdim=True).clamp_min(_LEAST)).clamp(max=1)
    first = words.int().argmax(1)
    earlier = rearrange(first, "b k -> b 1 k") < rearrange(first, "b n -> b n 1")
    begins = torch.einsum("bnk,bk->bn", earlier.to(room), room)
    ends = rearrange(begins + room, "b n -> b n 1")
    begins = rearrange(begins, "b n -> b n 1")
    together = shares.sum(1)
    mass = together.sum(1) + _LEAST  # of each column
    part = room.sum(1, keepdim=True).clamp_min(_LEAST) * mass / mass.sum(-1, keepdim=True)
    until = rearrange(part.cumsum(-1), "b w -> b 1 w")
    part = rearrange(part, "b w -> b 1 w")
    overlap = (torch.minimum(until, ends) - torch.maximum(until - part, begins)).clamp_min(0) / part
    apart = torch.einsum("bhw,bnw->bnhw", together, overlap)
    several = (most > 0).sum(1) > 1
    return torch.where(rearrange(several, "b -> b 1 1 1"), apart, shares)


def _resized(maps: Tensor, size: Size) -> Tensor:
    if tuple(maps.shape[-2:]) == size:
        return maps
    smaller = size[0] < maps.shape[-2]
    return interpolate(maps, size=size, mode="area") if smaller else interpolate(maps, size=size, mode="bilinear")
