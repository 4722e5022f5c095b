"""How much more cross-attention looks at the words of concepts: what is added before its softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Focus:
    """What is added for the words of J concepts in one context: ``parts`` (b, m, j), float32, 0 for other tokens.

    ``weighing`` (b, m) is what is added for prompt weights, at all places alike. ``everywhere`` (b, 1, m) is all of it,
    the same at all places; ``most`` (b, j) the most that is added for a word of each. Concepts of the same number in
    ``kinds`` (j,) are of one kind; without, each is of its own.
    """

    def __init__(self, parts: Tensor, kinds: Sequence[int] | None = None, weighing: Tensor | None = None):
        self.parts = parts
        self.kinds = range(parts.shape[-1]) if kinds is None else kinds
        self.weighing = weighing
        self.everywhere = self.weighed(parts.sum(-1).unsqueeze(1))
        self.most = parts.amax(1)

    def weighed(self, bias: Tensor) -> Tensor:
        """A bias (b, places or 1, m) with what is added for prompt weights."""
        return bias if self.weighing is None else bias + self.weighing.unsqueeze(1)


def with_mask(bias: Tensor, mask: Tensor | None) -> Tensor:
    """A bias (b, t or 1, m) together with somebody else's mask: numbers to add, or bool where attention is allowed.

    A mask of four dimensions (b, heads, t, m) stays one.
    """
    if mask is None:
        return bias
    if mask.ndim == 4:
        bias = bias.unsqueeze(1)
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else bias + mask
