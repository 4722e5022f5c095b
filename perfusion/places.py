"""Which words the model looks at more where, so that each thing of a picture keeps its own looks.

Words that are looked at more (``KeyValueEdit.focus``) are so everywhere: the looks of one concept get into the thing of
another, and take the room of plain things. But the network knows early where each thing is to be. Where its decoder
begins, a place p that will show the thing of concept j has the larger product with that concept's key,

    s_j(p) = q_p . k_j        less its mean over the picture; k_j the mean key of the concept's words

already in the first step of sampling. So concepts compete for places, with each other and with nobody, whose s is 0:

    w_j(p) = exp(z_j) / (1 + sum_i exp(z_i))        with z_j = 3 s_j(p) / sigma + log a_j

where sigma is the standard deviation of s over the picture, and a_j how much more the word of concept j is looked at,
of that which is looked at most: one that is hardly looked at takes none. What is added before the softmax for a
word of concept j is multiplied by ``2 w_j(p) - 1``: all of it where the thing of its concept is, and the same taken
away where others are. What is added for prompt weights is the same everywhere. All layers look by what those said in
the last step.
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
    return focus.weighed(einsum(focus.parts, 2 * shares - 1, "b m j, b t j -> b t m"))


class Places:
    """One call of the network: where the words of concepts are looked at, by the layers that know.

    ``before`` is what they said in the call before, (b, j, height, width), of the same prompts: see ``said``. Of a call
    that is for a ``part`` of the picture, nobody knows what stands on its left: concepts of one kind then compete as
    all others do.
    """

    def __init__(self, before: Tensor | None = None, *, part: bool = False):
        self._before, self._part = before, part
        self._maps: list[Tensor] = []
        self._decoder: Size | None = None
        self._of: tuple[int, Tensor] | None = None  # how many layers had spoken, and what follows from it
        self._shares: dict[Size, Tensor] = {}

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
        if self._of is None or self._of[0] != len(known):
            self._of, self._shares = (len(known), _shares(known, focus, part=self._part)), {}
        if size not in self._shares:
            self._shares[size] = rearrange(_resized(self._of[1], size), "b j h w -> b (h w) j")
        return self._shares[size]

    @property
    def said(self) -> Tensor | None:
        """The mean of what was said in this call, for the next: (b, j, height, width)."""
        return torch.stack(self._maps).mean(0) if self._maps else None


def _shares(said: Sequence[Tensor], focus: Focus, *, part: bool) -> Tensor:
    """w of each concept at the places of the layers that said this: (b, j, h, w)."""
    most = focus.most
    mean, present = torch.stack(list(said)).mean(0), most > 0
    spread = mean.flatten(2).std(-1, correction=0)
    sigma = (spread * present).sum(-1) / present.sum(-1).clamp_min(1)
    weight = (most / most.amax(1, keepdim=True).clamp_min(_LEAST)).log()  # of one that is not present, minus infinity
    z = _SHARPNESS * mean / rearrange(sigma.clamp_min(_LEAST), "b -> b 1 1 1") + rearrange(weight, "b j -> b j 1 1")
    shares = torch.softmax(pad(z, (0, 0, 0, 0, 0, 1)), 1)[:, :-1]  # the last is nobody
    if not part:
        shares = _side_by_side(shares, focus)
    # Of a concept that was not in yet nothing was said.
    asked = (~present | (spread > 0)).all(1)
    return torch.where(rearrange(asked, "b -> b 1 1 1"), shares, torch.ones_like(shares))


def _side_by_side(shares: Tensor, focus: Focus) -> Tensor:
    """Shares (b, j, h, w) of which concepts of one kind have theirs from left to right."""
    for kind in dict.fromkeys(focus.kinds):
        members = [j for j, other in enumerate(focus.kinds) if other == kind]
        if len(members) > 1:
            index = torch.tensor(members, device=shares.device)
            theirs = _in_order(shares.index_select(1, index), focus.parts.index_select(2, index))
            shares = shares.index_copy(1, index, theirs)
    return shares


def _in_order(shares: Tensor, parts: Tensor) -> Tensor:
    """Shares (b, n, h, w) of the places of all n concepts from left to right, in the order of their words.

    ``parts`` (b, m, n) are those of ``Focus``: a concept whose word is looked at less than half as much as another's
    has less of the places, and one that is not looked at none.
    """
    most = parts.amax(1)
    room = (_WHOLE_FROM * most / most.amax(1, keepdim=True).clamp_min(_LEAST)).clamp(max=1)
    words = parts >= rearrange(most, "b n -> b 1 n") / 2
    # Where two begin at one token, either is first.
    count = most.shape[1]
    begin = words.int().argmax(1) * count + torch.arange(count, device=most.device)
    earlier = rearrange(begin, "b k -> b 1 k") < rearrange(begin, "b n -> b n 1")
    starts = einsum(earlier.to(room), room, "b n k, b k -> b n")
    ends = rearrange(starts + room, "b n -> b n 1")
    starts = rearrange(starts, "b n -> b n 1")
    together = shares.sum(1)
    # Background is theirs by a little everywhere, and there is much of it: what would be less than half one's of them
    # does not count.
    several = room.sum(1, keepdim=True).clamp_min(_LEAST)
    of_one = together / (together + rearrange(several, "b 1 -> b 1 1") * (1 - together)).clamp_min(_LEAST)
    mass = (2 * of_one - 1).clamp_min(0).sum(1) + _LEAST  # of each column
    column = several * mass / mass.sum(-1, keepdim=True)
    until = rearrange(column.cumsum(-1), "b w -> b 1 w")
    overlap = torch.minimum(until, ends) - torch.maximum(until - rearrange(column, "b w -> b 1 w"), starts)
    overlap = overlap.clamp_min(0)
    overlap = overlap / overlap.sum(1, keepdim=True).clamp_min(_LEAST**2)
    apart = einsum(together, overlap, "b h w, b n w -> b n h w")
    return torch.where(rearrange((most > 0).sum(1) > 1, "b -> b 1 1 1"), apart, shares)


def _resized(maps: Tensor, size: Size) -> Tensor:
    if tuple(maps.shape[-2:]) == size:
        return maps
    smaller = size[0] < maps.shape[-2]
    return interpolate(maps, size=size, mode="area") if smaller else interpolate(maps, size=size, mode="bilinear")
