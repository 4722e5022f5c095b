"""What a picture shows, as judged by a small network: place, style, and for each category of things its look.

The judge looks for each category with a learned query, so that what it says of the cat is not said of the car beside
it. Its identity embedding tells personal things of one category apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn.functional import normalize

from .backgrounds import BACKGROUNDS
from .styles import STYLES
from .world import ACCESSORIES, CATEGORY_NAMES, COLORS, PATTERNS

COLOR_NAMES = tuple(COLORS)
WORN = ("nothing", *ACCESSORIES)
_WIDTH, _IDENTITY = 128, 64


@dataclass(frozen=True)
class Verdict:
    """Logits for b pictures: ``background`` (b, 7), ``style`` (b, 3), ``present`` (b, k) for each of k categories, and
    of that category's thing ``worn`` (b, k, 3), ``color`` (b, k, 10), ``pattern`` (b, k, 3), and its ``identity``
    (b, k, 64), of length 1."""

    background: Tensor
    style: Tensor
    present: Tensor
    worn: Tensor
    color: Tensor
    pattern: Tensor
    identity: Tensor


class Judge(nn.Module):
    """Pictures (b, 3, 64, 64) in -1..1 to a ``Verdict``."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2),
            _Residual(32, 64),
            nn.AvgPool2d(2),
            _Residual(64, _WIDTH),
            nn.AvgPool2d(2),
            _Residual(_WIDTH, _WIDTH),
            _Residual(_WIDTH, _WIDTH),
        )
        self.whole = nn.Linear(_WIDTH, len(BACKGROUNDS) + len(STYLES))
        self.queries = nn.Parameter(torch.randn(len(CATEGORY_NAMES), _WIDTH) * _WIDTH**-0.5)
        self.key, self.value = nn.Conv2d(_WIDTH, _WIDTH, 1), nn.Conv2d(_WIDTH, _WIDTH, 1)
        self.thing = nn.Sequential(nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, 2 * _WIDTH), nn.GELU())
        self.named = nn.Linear(2 * _WIDTH, 1 + len(WORN) + len(COLOR_NAMES) + len(PATTERNS))
        self.own = nn.Linear(2 * _WIDTH, _IDENTITY)

    def forward(self, pictures: Tensor) -> Verdict:
        """Judge."""
        features = self.trunk(pictures)
        whole = self.whole(features.mean((2, 3)))
        attention = einsum(self.queries, self.key(features), "k c, b c h w -> b k h w")
        weight = rearrange(attention, "b k h w -> b k (h w)").softmax(-1)
        pooled = einsum(weight, rearrange(self.value(features), "b c h w -> b c (h w)"), "b k p, b c p -> b k c")
        thing = self.thing(pooled + self.queries)
        present, worn, color, pattern = self.named(thing).split([1, len(WORN), len(COLOR_NAMES), len(PATTERNS)], -1)
        return Verdict(
            background=whole[:, : len(BACKGROUNDS)],
            style=whole[:, len(BACKGROUNDS) :],
            present=present.squeeze(-1),
            worn=worn,
            color=color,
            pattern=pattern,
            identity=normalize(self.own(thing), dim=-1),
        )


class _Residual(nn.Module):
    def __init__(self, inward: int, outward: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inward, outward, 3, padding=1, bias=False),
            nn.GroupNorm(8, outward),
            nn.SiLU(),
            nn.Conv2d(outward, outward, 3, padding=1, bias=False),
            nn.GroupNorm(8, outward),
        )
        self.skip = nn.Identity() if inward == outward else nn.Conv2d(inward, outward, 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.skip(x) + self.body(x))
