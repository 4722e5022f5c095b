"""The picture of where a model looks for the words of concepts: a row for each, a column for each place in sampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

from .lettering import INK, MUTED, PAPER, as_tensor, cut, font, wrapped

_MARGIN, _GAP, _LABEL, _SIDE, _CAPTION = 28, 14, 150, 224, 22
_HEAT = (232, 76, 10)


def sheet(image: Tensor, maps: Tensor, words: Sequence[str], at: Sequence[float]) -> Tensor:
    """Maps (len(at), j, h, w) over a picture (h, w, 3) in 0..1, as an IMAGE (1, height, width, 3).

    Each is colored by how far it rises above its least, relative to its peak; the share at the peak stands below.
    """
    height, width = image.shape[:2]
    scale = _SIDE / max(height, width)
    tile = (max(1, round(width * scale)), max(1, round(height * scale)))
    whole = Image.new(
        "RGB",
        (
            2 * _MARGIN + _LABEL + len(at) * (tile[0] + _GAP),
            2 * _MARGIN + _CAPTION + len(words) * (tile[1] + _CAPTION + _GAP),
        ),
        PAPER,
    )
    pen = ImageDraw.Draw(whole)
    for column, place in enumerate(at):
        left = _MARGIN + _LABEL + column * (tile[0] + _GAP)
        pen.text((left, _MARGIN), f"at {place:.0%} of sampling", fill=INK, font=font(13))
    for row, word in enumerate(words):
        top = _MARGIN + _CAPTION + row * (tile[1] + _CAPTION + _GAP)
        pen.text((_MARGIN, top), cut(word, 14, _LABEL - 12), fill=INK, font=font(14))
        for column in range(len(at)):
            left = _MARGIN + _LABEL + column * (tile[0] + _GAP)
            seen = maps[column, row].float()
            whole.paste(_heated(image, seen, tile), (left, top))
            told = f"peak {float(seen.max()):.2f}, mean {float(seen.mean()):.2f}"
            pen.text((left, top + tile[1] + 4), told, fill=MUTED, font=font(11))
    return as_tensor(whole)


def notice(text: str) -> Tensor:
    """A text in place of a sheet, as an IMAGE (1, height, width, 3)."""
    lines = wrapped(text, 14, 480)
    whole = Image.new("RGB", (480 + 2 * _MARGIN, 2 * _MARGIN + 21 * len(lines)), PAPER)
    pen = ImageDraw.Draw(whole)
    for number, line in enumerate(lines):
        pen.text((_MARGIN, _MARGIN + 21 * number), line, fill=MUTED, font=font(14))
    return as_tensor(whole)


def _heated(image: Tensor, seen: Tensor, size: tuple[int, int]) -> Image.Image:
    """A picture, nearly gray, with color where a map (h, w) is high."""
    width, height = size
    picture = interpolate(image[..., :3].float().permute(2, 0, 1)[None], (height, width), mode="area")[0].clamp(0, 1)
    gray = 0.8 * picture.mean(0, keepdim=True) + 0.2 * picture
    heat = interpolate(seen[None, None], (height, width), mode="bilinear", align_corners=False)[0]
    # Over the peak, and not over the span: a map that is the same everywhere says nothing, and shows nothing.
    heat = 0.8 * ((heat - seen.min()) / seen.max().clamp_min(1e-9)).clamp(0, 1)
    mixed = gray * (1 - heat) + torch.tensor(_HEAT)[:, None, None] / 255 * heat
    return Image.fromarray((mixed.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8))
