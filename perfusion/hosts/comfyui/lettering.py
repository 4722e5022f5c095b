"""Text in pictures, in the font that Pillow brings, and pictures as the host passes them on."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from PIL import Image, ImageFont
from torch import Tensor

PAPER, INK, MUTED = "#ffffff", "#1f2430", "#747c8c"


def wrapped(text: str, size: int, width: int, lines: int = 8) -> list[str]:
    """The text in lines of at most ``width`` pixels; the last of ``lines`` ends in an ellipsis where there is more."""
    found: list[str] = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and font(size).getlength(longer) > width:
            found.append(line)
            line = word
        else:
            line = longer
    found.append(line)
    if len(found) > lines:
        found = [*found[: lines - 1], f"{found[lines - 1]} ..."]
    return [cut(line, size, width) for line in found]


def cut(text: str, size: int, width: int) -> str:
    """The text, shortened to ``width`` pixels."""
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def printable(text: str) -> str:
    """The text with blanks in place of control characters."""
    return "".join(c if c.isprintable() else " " for c in text)


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that Pillow brings."""
    return ImageFont.load_default(size)


def as_tensor(image: Image.Image) -> Tensor:
    """An IMAGE (1, height, width, 3)."""
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).unsqueeze(0)
