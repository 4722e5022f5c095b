"""What is added before the softmax of cross-attention, together with masks of others."""

from __future__ import annotations

import torch
from torch import Tensor


def with_mask(bias: Tensor, mask: Tensor | None) -> Tensor:
    """A bias (b, t or 1, m) together with somebody else's mask: numbers to add, or bool where attention is allowed.

    A mask of four dimensions (b, heads, t, m) stays one.
    """
    if mask is None:
        return bias
    if mask.ndim == 4:
        bias = bias.unsqueeze(1)
    return torch.where(mask, bias, float("-inf")) if mask.dtype == torch.bool else bias + mask
