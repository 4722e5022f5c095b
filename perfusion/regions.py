"""Where in a picture the model may look for the words of concepts.

Cross-attention at place p looks at token m by softmax_m(q_p . k_m / sqrt(width)). A concept j that is to be in a region
only, R_j(p) from 0 to 1, takes part of its words' share away elsewhere: to what stands before the softmax is added

    log(1 - w_mj (1 - R_j(p)))        with w_mj from 0, for a word that is not the concept's, to 1, for one that is

which is 0 inside the region and for words that are not the concept's, and multiplies the share of its own words by
nothing outside. It does not depend on how the concept's gate is set. Like the edit itself it is a function of the text
context, not of places in the prompt: it holds whatever context another extension hands over.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from .edit import of_own_word

_LEAST = 1e-6


def sizes_of(height: int, width: int) -> dict[int, tuple[int, int]]:
    """Number of places -> height and width, of latents and what layers halve them to, rounded up as strided ones do."""
    sizes = {}
    size = height, width
    while size not in sizes.values():
        sizes[size[0] * size[1]] = size
        size = -(-size[0] // 2), -(-size[1] // 2)
    return sizes


def attention_bias(belonging: Tensor, regions: Sequence[Tensor | None], size: tuple[int, int]) -> Tensor | None:
    """What is added before the softmax of a layer with ``size`` (height, width) places: (b, t, m), float32.

    ``belonging`` (b, m, j), 0 to 1, says how far each token is each concept's word, ``regions`` (height, width) where
    each concept may be. None where no concept has a region.
    """
    bias: Tensor | None = None
    for j, region in enumerate(regions):
        if region is None:
            continue
        shaped = interpolate(region[None, None].to(belonging).clamp(0, 1), size, mode="area")
        outside = 1 - rearrange(shaped, "1 1 h w -> (h w)")
        own = of_own_word(belonging[..., j])
        added = torch.log((1 - torch.einsum("bm,t->btm", own, outside)).clamp_min(_LEAST))
        bias = added if bias is None else bias + added
    return bias
