"""A picture as the thumbnail of a concept file."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image
from torch import Tensor

from ...concept import MAX_THUMBNAIL

_SIDES = (384, 256, 128)
_QUALITIES = (90, 80, 65, 50)


def thumbnail(images: Tensor) -> str:
    """The middle square of the first of some pictures (n, h, w, 3 or more) in 0..1, as the data URI of a JPEG.

    It is as large and as fine as the bound of ``Concept.with_thumbnail`` lets it be. Raises ValueError where there is
    no picture, or one without pixels.
    """
    if images.ndim != 4 or not images.numel() or images.shape[-1] < 3:
        raise ValueError("there is no picture to make a thumbnail of")
    pixels = (images[0, ..., :3].float().clamp(0, 1).nan_to_num() * 255).round().byte().cpu().numpy()
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    for width in _SIDES:
        small = square.copy()
        small.thumbnail((width, width), Image.Resampling.LANCZOS)
        for quality in _QUALITIES:
            encoded = io.BytesIO()
            small.save(encoded, "JPEG", quality=quality, optimize=True)
            uri = "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()
            if len(uri) <= MAX_THUMBNAIL:
                return uri
    raise ValueError("this picture does not become small enough for a thumbnail")
