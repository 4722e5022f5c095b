"""How much more cross-attention looks at the words of concepts: what is added before its softmax."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Focus:
    """What is added for the words of J concepts in one context: ``parts`` (b, m, j), float32, 0 for other tokens."""

    def __init__(self, parts: Tensor):
        self.parts = parts

    @cached_property
    def everywhere(self) -> Tensor:
        """The same at all places: (b, 1, m)."""
        return self.parts.sum(-1).unsqueeze(1)

    @cached_property
    def present(self) -> Tensor:
        """Which concepts have a word that is looked at more: (b, j)."""
        return (self.parts > 0).any(1)

    @cached_property
    def competes(self) -> bool:
        """Whether any row has words of several concepts, which are looked at more by place: see ``places``."""
        return self.parts.shape[-1] > 1 and bool((self.present.sum(-1) > 1).any())


def with_mask(bias: Tensor, mask: Tensor | None) -> Tensor:
    """A bias (b, t or 1, m) together with somebody else's mask: numbers to add, or bool where attention is allowed.

    A mask of four dimensions (b, heads, t, m) stays one.
    """
    if mask is None:
        return bias
    if mask.ndim == 4:
        bias = bias.unsqueeze(1)
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else bias + mask
