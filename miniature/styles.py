"""The styles of the world, put over a finished 64 x 64 picture."""

from __future__ import annotations

from random import Random

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

STYLES = ("photo", "sketch", "watercolor")


def apply_style(picture: Image.Image, style: str, rng: Random) -> Image.Image:
    """The picture in a style; a photo stays as it is."""
    if style == "photo":
        return picture
    if style == "sketch":
        return _sketch(picture)
    if style == "watercolor":
        return _watercolor(picture, rng)
    raise ValueError(f"unknown style {style!r}")


def _sketch(picture: Image.Image) -> Image.Image:
    """Pencil on paper: what is darker than its surroundings stays as a line, a breath of color remains."""
    grey = ImageOps.grayscale(picture)
    blurred = grey.filter(ImageFilter.GaussianBlur(3))
    lines = ImageChops.subtract(blurred, grey).point([max(0, 255 - 4 * value) for value in range(256)])
    paper = ImageChops.multiply(Image.new("RGB", picture.size, (250, 246, 236)), Image.merge("RGB", [lines] * 3))
    tint = Image.blend(picture, Image.new("RGB", picture.size, (250, 246, 236)), 0.45)
    return Image.blend(paper, ImageChops.multiply(paper, tint), 0.45)


def _watercolor(picture: Image.Image, rng: Random) -> Image.Image:
    """Soft, pale, and running out into white paper at the edges."""
    side = picture.width
    soft = Image.blend(picture.filter(ImageFilter.GaussianBlur(0.5)), Image.new("RGB", picture.size, "white"), 0.2)
    wash = Image.new("L", (side, side))
    pen = ImageDraw.Draw(wash)
    margin = side // 10
    pen.rounded_rectangle([margin, margin, side - margin, side - margin], side // 8, fill=255)
    for _ in range(12):
        x, y = rng.uniform(0, side), rng.uniform(0, side)
        along = rng.choice([(x, rng.choice([margin, side - margin])), (rng.choice([margin, side - margin]), y)])
        r = rng.uniform(2, 5)
        pen.ellipse([along[0] - r, along[1] - r, along[0] + r, along[1] + r], fill=rng.choice([0, 255]))
    wash = wash.filter(ImageFilter.GaussianBlur(1.5))
    return Image.composite(soft, Image.new("RGB", picture.size, (253, 253, 250)), wash)
