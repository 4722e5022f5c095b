"""Target values in 8 bits: for each layer one magnitude s, for each value a sign and the square root of its size.

    o_n = s q_n |q_n| / 127^2        q_n a whole number from -127 to 127, s the largest |o_n| of the layer

Steps between neighboring values grow with their size (companding, as speech coders do it with a logarithm): a layer
with a few large values keeps its small ones, which even steps of s / 127 would round to nothing, and a layer without
any loses nothing by it. ``python -m benchmarks.sizes`` measures both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LEVELS = 127
# The smallest normal number of half precision: below it s would have too few digits to be found again from its values.
_SMALLEST_SCALE = 2.0**-14


def quantize(layers: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Values (i,) of each of l layers -> codes (sum of i,), int8, and scales (l,), float16.

    What ``dequantize`` makes of the result gives the same result again. Values that are not finite, or whose size half
    precision cannot hold, give a scale that is not finite.
    """
    codes, scales = [], []
    for values in layers:
        values = values.detach().to("cpu", torch.float64)
        scale = values.abs().amax().to(torch.float16).clamp_min(_SMALLEST_SCALE)
        roots = (values.abs() / scale.double()).clamp(0, 1).sqrt()
        codes.append((values.sign() * roots * LEVELS).round().nan_to_num(0).to(torch.int8))
        scales.append(scale)
    return torch.cat(codes), torch.stack(scales)


def dequantize(codes: Tensor, scales: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Codes (sum of i,) and scales (l,) -> the values (i,) of each layer, float32."""
    return [
        (scale.double() * part.double() * part.double().abs() / LEVELS**2).float()
        for part, scale in zip(codes.split(list(widths)), scales, strict=True)
    ]


def rounded(layers: Sequence[Tensor]) -> list[Tensor]:
    """Values (i,) of each layer as they come back from their codes, float32."""
    return dequantize(*quantize(layers), [len(values) for values in layers])
