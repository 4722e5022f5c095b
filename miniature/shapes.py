"""How the things of the world are drawn: each category from a few shapes, covered by a look, with details on top.

Coordinates are in radii of the thing, x to the right and y down, (0, 0) being its middle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw

Color = tuple[int, int, int]
Box = tuple[float, float, float, float]
Points = Sequence[tuple[float, float]]

_INK = (36, 30, 34)
_ROOM = 1.25  # half the side of a tile, in radii


@dataclass(frozen=True)
class Look:
    """A surface: a color, a pattern in a second one, and a mark in a third."""

    color: Color
    pattern: str = "plain"
    second: Color | None = None
    mark: str | None = None
    mark_color: Color | None = None


@dataclass(frozen=True)
class Anchor:
    """Where an accessory sits, how wide it is, and where a mark goes and how large it is, all in radii."""

    top: tuple[float, float]
    width: float
    mark: tuple[float, float]
    mark_size: float


class Tile:
    """A square picture in which one thing is drawn. ``skin_*`` shapes get the look, ``draw_*`` shapes a color."""

    def __init__(self, radius: float, mirrored: bool):
        self.radius = radius
        self.mirrored = mirrored
        self.middle = math.ceil(_ROOM * radius)
        self.size = 2 * self.middle
        self.image = Image.new("RGB", (self.size, self.size), _INK)
        self.alpha = Image.new("L", (self.size, self.size))
        self.skin = Image.new("L", (self.size, self.size))
        self._outline = max(2.0, 0.05 * radius)
        self._pen, self._alpha, self._skin = map(ImageDraw.Draw, (self.image, self.alpha, self.skin))

    def point(self, x: float, y: float) -> tuple[float, float]:
        """Radii -> pixels."""
        return self.middle + (-x if self.mirrored else x) * self.radius, self.middle + y * self.radius

    def box(self, box: Box) -> list[float]:
        """Radii -> pixels, the corners in order."""
        (x0, y0), (x1, y1) = self.point(box[0], box[1]), self.point(box[2], box[3])
        return [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]

    def skin_ellipse(self, *box: float) -> None:
        """An ellipse that the look covers."""
        x0, y0, x1, y1 = self.box(box)  # type: ignore[arg-type]
        o = self._outline
        self._alpha.ellipse([x0 - o, y0 - o, x1 + o, y1 + o], fill=255)
        self._skin.ellipse([x0, y0, x1, y1], fill=255)

    def skin_rounded(self, corner: float, *box: float) -> None:
        """A rectangle with round corners that the look covers."""
        x0, y0, x1, y1 = self.box(box)  # type: ignore[arg-type]
        o, r = self._outline, corner * self.radius
        self._alpha.rounded_rectangle([x0 - o, y0 - o, x1 + o, y1 + o], r + o, fill=255)
        self._skin.rounded_rectangle([x0, y0, x1, y1], r, fill=255)

    def skin_polygon(self, *points: tuple[float, float]) -> None:
        """A polygon that the look covers."""
        pixels = [self.point(*p) for p in points]
        self._alpha.polygon(pixels, fill=255)
        self._alpha.line([*pixels, pixels[0], pixels[1]], fill=255, width=round(2 * self._outline), joint="curve")
        self._skin.polygon(pixels, fill=255)

    def skin_line(self, width: float, *points: tuple[float, float]) -> None:
        """A thick line that the look covers."""
        pixels = [self.point(*p) for p in points]
        thick = width * self.radius
        self._alpha.line(pixels, fill=255, width=round(thick + 2 * self._outline), joint="curve")
        self._skin.line(pixels, fill=255, width=round(thick), joint="curve")

    def paint(self, look: Look) -> None:
        """Cover the skin with a look, lit from above."""
        cover = _pattern(look, self.size, self.radius)
        light = Image.linear_gradient("L").resize((self.size, self.size))
        cover = ImageChops.multiply(
            cover, Image.merge("RGB", [light.point([255 - value * 70 // 255 for value in range(256)])] * 3)
        )
        self.image.paste(cover, (0, 0), self.skin)

    def draw_ellipse(self, color: Color, *box: float) -> None:
        """An ellipse of one color."""
        self._pen.ellipse(self.box(box), fill=color)  # type: ignore[arg-type]
        self._alpha.ellipse(self.box(box), fill=255)  # type: ignore[arg-type]

    def draw_box(self, color: Color, *box: float) -> None:
        """A rectangle of one color."""
        self._pen.rectangle(self.box(box), fill=color)  # type: ignore[arg-type]
        self._alpha.rectangle(self.box(box), fill=255)  # type: ignore[arg-type]

    def draw_polygon(self, color: Color, *points: tuple[float, float]) -> None:
        """A polygon of one color."""
        self._pen.polygon([self.point(*p) for p in points], fill=color)
        self._alpha.polygon([self.point(*p) for p in points], fill=255)

    def draw_line(self, color: Color, width: float, *points: tuple[float, float]) -> None:
        """A thick line of one color."""
        for pen, fill in ((self._pen, color), (self._alpha, 255)):
            pen.line([self.point(*p) for p in points], fill=fill, width=max(2, round(width * self.radius)))

    def draw_mark(self, mark: str, color: Color, x: float, y: float, size: float) -> None:
        """A mark that is a thing's own, on its skin."""
        outline = 0.055
        for grow, fill in ((outline, _INK), (0.0, color)):
            if mark in ("ring", "diamond"):
                s = size + grow
                if mark == "ring":
                    self.draw_ellipse(fill, x - s, y - s, x + s, y + s)
                else:
                    self.draw_polygon(fill, (x, y - s * 1.25), (x + s, y), (x, y + s * 1.25), (x - s, y))
                continue
            self.draw_polygon(fill, *_mark(mark, x, y, size + grow * 1.4))
        if mark == "ring":
            self.draw_ellipse(_INK, *(x - size * 0.5, y - size * 0.5, x + size * 0.5, y + size * 0.5))


def _mark(mark: str, x: float, y: float, size: float) -> list[tuple[float, float]]:
    if mark == "star":
        turns = [(-90 + 36 * k, size * (1.25 if k % 2 == 0 else 0.5)) for k in range(10)]
        return [(x + r * math.cos(math.radians(a)), y + r * math.sin(math.radians(a))) for a, r in turns]
    if mark == "heart":
        angles = [math.tau * k / 24 for k in range(24)]
        return [
            (
                x + size * 1.1 * math.sin(t) ** 3,
                y - size * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 14,
            )
            for t in angles
        ]
    outlines = {
        "cross": [
            (-0.35, -1),
            (0.35, -1),
            (0.35, -0.35),
            (1, -0.35),
            (1, 0.35),
            (0.35, 0.35),
            (0.35, 1),
            (-0.35, 1),
            (-0.35, 0.35),
            (-1, 0.35),
            (-1, -0.35),
            (-0.35, -0.35),
        ],
        "bolt": [(0.3, -1.3), (-0.7, 0.2), (-0.05, 0.2), (-0.3, 1.3), (0.8, -0.3), (0.1, -0.3)],
    }
    return [(x + size * a, y + size * b) for a, b in outlines[mark]]


def _pattern(look: Look, size: int, radius: float) -> Image.Image:
    """A square covered by a look; stripes and dots have a fixed size on the thing."""
    cover = Image.new("RGB", (size, size), look.color)
    if look.second is None or look.pattern == "plain":
        return cover
    pen, middle, second = ImageDraw.Draw(cover), size / 2, look.second
    step = 0.42 * radius
    count = math.ceil(size / step) + 1
    if look.pattern == "striped":
        for k in range(-count, count):
            pen.rectangle([0, middle + k * step, size, middle + k * step + step * 0.46], fill=second)
    elif look.pattern == "dotted":
        r = 0.13 * radius
        for row in range(-count, count):
            for column in range(-count, count):
                x, y = middle + (column + row % 2 / 2) * step, middle + row * step * 0.9
                pen.ellipse([x - r, y - r, x + r, y + r], fill=second)
    elif look.pattern == "checked":
        for row in range(-count, count):
            for column in range(-count, count):
                if (row + column) % 2:
                    x, y = middle + column * step, middle + row * step
                    pen.rectangle([x, y, x + step, y + step], fill=second)
    elif look.pattern == "halves":
        pen.rectangle([middle, 0, size, size], fill=second)
    elif look.pattern == "diagonal":
        for k in range(-2 * count, 2 * count, 2):
            x = middle + k * step * 0.8
            pen.line([(x - size, -size / 2), (x + size, size * 1.5)], fill=second, width=round(step * 0.7))
    elif look.pattern == "belt":
        pen.rectangle([0, middle + 0.05 * radius, size, middle + 0.5 * radius], fill=second)
    elif look.pattern == "rings":
        for k in range(count, 0, -1):
            r = k * step * 0.75
            box = [middle - r, middle + 0.2 * radius - r, middle + r, middle + 0.2 * radius + r]
            pen.ellipse(box, fill=second if k % 2 else look.color)
    else:
        raise ValueError(f"unknown pattern {look.pattern!r}")
    return cover


def _eyes(tile: Tile, y: float, apart: float, size: float, x: float = 0.0) -> None:
    for side in (-1, 1):
        cx = x + side * apart
        tile.draw_ellipse((250, 250, 250), cx - size, y - size, cx + size, y + size)
        tile.draw_ellipse(_INK, cx - size * 0.6, y - size * 0.6, cx + size * 0.6, y + size * 0.6)


def _teddy(t: Tile, look: Look) -> Anchor:
    for side in (-1, 1):
        t.skin_ellipse(side * 0.42 - 0.2, -0.98, side * 0.42 + 0.2, -0.58)
        t.skin_ellipse(side * 0.6 - 0.22, -0.02, side * 0.6 + 0.22, 0.5)
        t.skin_ellipse(side * 0.4 - 0.26, 0.52, side * 0.4 + 0.26, 1.0)
    t.skin_ellipse(-0.52, -0.1, 0.52, 0.92)
    t.skin_ellipse(-0.5, -0.88, 0.5, 0.02)
    t.paint(look)
    t.draw_ellipse((246, 226, 196), -0.24, -0.44, 0.24, -0.08)
    t.draw_ellipse(_INK, -0.1, -0.42, 0.1, -0.28)
    _eyes(t, -0.55, 0.22, 0.09)
    return Anchor((0, -0.82), 0.42, (0, 0.4), 0.22)


def _cat(t: Tile, look: Look) -> Anchor:
    t.skin_line(0.17, (0.4, 0.85), (0.78, 0.75), (0.86, 0.4), (0.72, 0.1))
    t.skin_polygon((-0.5, -0.5), (-0.46, -1.0), (-0.1, -0.72))
    t.skin_polygon((0.5, -0.5), (0.46, -1.0), (0.1, -0.72))
    t.skin_ellipse(-0.46, -0.2, 0.46, 1.0)
    t.skin_ellipse(-0.54, -0.82, 0.54, 0.06)
    t.paint(look)
    for side in (-1, 1):
        t.draw_ellipse((120, 200, 90), side * 0.24 - 0.12, -0.56, side * 0.24 + 0.12, -0.32)
        t.draw_ellipse(_INK, side * 0.24 - 0.05, -0.56, side * 0.24 + 0.05, -0.32)
        t.draw_line(_INK, 0.04, (side * 0.14, -0.14), (side * 0.62, -0.2))
        t.draw_line(_INK, 0.04, (side * 0.14, -0.1), (side * 0.6, -0.02))
    t.draw_polygon((240, 130, 150), (-0.1, -0.26), (0.1, -0.26), (0, -0.14))
    return Anchor((0, -0.76), 0.4, (0, 0.45), 0.22)


def _cup(t: Tile, look: Look) -> Anchor:
    t.skin_line(0.17, (0.4, -0.2), (0.72, -0.3), (0.88, 0.05), (0.72, 0.42), (0.36, 0.4))
    t.skin_polygon((-0.78, -0.55), (0.52, -0.55), (0.4, 0.8), (-0.66, 0.8))
    t.skin_ellipse(-0.66, 0.62, 0.4, 0.95)
    t.skin_ellipse(-0.78, -0.78, 0.52, -0.32)
    t.paint(look)
    t.draw_ellipse((92, 56, 34), -0.66, -0.7, 0.4, -0.4)
    return Anchor((-0.13, -0.66), 0.45, (-0.13, 0.25), 0.26)


def _car(t: Tile, look: Look) -> Anchor:
    t.skin_polygon((-0.62, -0.05), (-0.38, -0.55), (0.32, -0.55), (0.62, -0.05))
    t.skin_rounded(0.16, -1.0, -0.1, 1.0, 0.55)
    t.paint(look)
    t.draw_polygon((190, 226, 244), (-0.48, -0.1), (-0.3, -0.45), (-0.06, -0.45), (-0.06, -0.1))
    t.draw_polygon((190, 226, 244), (0.06, -0.1), (0.06, -0.45), (0.26, -0.45), (0.46, -0.1))
    for x in (-0.52, 0.52):
        t.draw_ellipse((30, 30, 34), x - 0.27, 0.26, x + 0.27, 0.8)
        t.draw_ellipse((180, 180, 184), x - 0.12, 0.41, x + 0.12, 0.65)
    t.draw_ellipse((255, 240, 150), -1.0, 0.05, -0.84, 0.23)
    return Anchor((-0.03, -0.52), 0.42, (0, 0.2), 0.2)


def _house(t: Tile, look: Look) -> Anchor:
    t.skin_rounded(0.02, -0.74, -0.2, 0.74, 0.92)
    t.paint(look)
    roof = (120, 60, 52)
    t.draw_polygon(_INK, (-1.0, -0.14), (0, -0.98), (1.0, -0.14))
    t.draw_polygon(roof, (-0.9, -0.19), (0, -0.92), (0.9, -0.19))
    t.draw_box(_INK, 0.1, 0.32, 0.52, 0.92)
    t.draw_box((150, 98, 56), 0.15, 0.37, 0.47, 0.92)
    for x in (-0.36,):
        t.draw_box(_INK, x - 0.24, -0.06, x + 0.24, 0.36)
        t.draw_box((252, 236, 160), x - 0.19, -0.01, x + 0.19, 0.31)
        t.draw_line(_INK, 0.05, (x, 0), (x, 0.31))
    return Anchor((0, -0.84), 0.4, (-0.36, 0.65), 0.18)


def _bird(t: Tile, look: Look) -> Anchor:
    t.draw_line(_INK, 0.07, (-0.08, 0.6), (-0.12, 0.98))
    t.draw_line(_INK, 0.07, (0.16, 0.6), (0.16, 0.98))
    t.skin_polygon((0.5, 0.1), (1.05, -0.12), (1.0, 0.28), (0.5, 0.45))
    t.skin_ellipse(-0.55, -0.25, 0.72, 0.72)
    t.skin_ellipse(-0.78, -0.82, 0.06, 0.02)
    t.paint(look)
    t.draw_polygon((250, 170, 40), (-0.74, -0.5), (-1.12, -0.32), (-0.72, -0.22))
    darker = tuple(c * 6 // 10 for c in look.color)
    t.draw_ellipse(darker, 0.12, -0.1, 0.7, 0.32)  # type: ignore[arg-type]
    _eyes(t, -0.5, 0.0, 0.11, -0.46)
    return Anchor((-0.36, -0.78), 0.38, (-0.12, 0.34), 0.2)


def _fish(t: Tile, look: Look) -> Anchor:
    t.skin_polygon((0.45, 0.08), (1.02, -0.42), (0.9, 0.08), (1.02, 0.58))
    t.skin_polygon((-0.3, -0.35), (0.15, -0.78), (0.4, -0.3))
    t.skin_polygon((-0.1, 0.5), (0.15, 0.88), (0.35, 0.45))
    t.skin_ellipse(-0.95, -0.46, 0.66, 0.62)
    t.paint(look)
    t.draw_ellipse((250, 250, 250), -0.72, -0.22, -0.44, 0.06)
    t.draw_ellipse(_INK, -0.67, -0.16, -0.51, 0.0)
    t.draw_line(_INK, 0.06, (-0.92, 0.2), (-0.66, 0.26))
    return Anchor((-0.35, -0.42), 0.4, (-0.02, 0.08), 0.23)


def _robot(t: Tile, look: Look) -> Anchor:
    for side in (-1, 1):
        t.skin_rounded(0.08, side * 0.26 - 0.14, 0.6, side * 0.26 + 0.14, 1.0)
        t.skin_rounded(0.1, side * 0.74 - 0.12, -0.05, side * 0.74 + 0.12, 0.5)
    t.skin_rounded(0.08, -0.56, -0.12, 0.56, 0.68)
    t.skin_rounded(0.1, -0.46, -0.82, 0.46, -0.2)
    t.paint(look)
    t.draw_box((34, 40, 48), -0.36, -0.68, 0.36, -0.36)
    for side in (-1, 1):
        t.draw_ellipse((110, 240, 250), side * 0.18 - 0.1, -0.62, side * 0.18 + 0.1, -0.42)
    return Anchor((0, -0.8), 0.4, (0, 0.28), 0.25)


def _boat(t: Tile, look: Look) -> Anchor:
    t.draw_box((110, 74, 44), -0.06, -0.9, 0.06, 0.4)
    t.skin_polygon((0.12, -0.82), (0.78, 0.22), (0.12, 0.22))
    t.skin_polygon((-0.12, -0.6), (-0.12, 0.22), (-0.62, 0.22))
    t.skin_polygon((-0.98, 0.34), (0.98, 0.34), (0.66, 0.9), (-0.66, 0.9))
    t.paint(look)
    return Anchor((0, -0.84), 0.36, (0, 0.6), 0.19)


def _mushroom(t: Tile, look: Look) -> Anchor:
    t.draw_polygon(_INK, (-0.33, 0.0), (0.33, 0.0), (0.42, 0.98), (-0.42, 0.98))
    t.draw_polygon((244, 230, 204), (-0.27, 0.0), (0.27, 0.0), (0.35, 0.93), (-0.35, 0.93))
    angles = [math.pi * k / 20 for k in range(21)]
    t.skin_polygon(*[(0.96 * math.cos(a), 0.15 - 0.95 * math.sin(a)) for a in angles])
    t.skin_ellipse(-0.96, -0.02, 0.96, 0.32)
    t.paint(look)
    return Anchor((0, -0.76), 0.4, (0, -0.28), 0.25)


CATEGORIES: dict[str, Callable[[Tile, Look], Anchor]] = {
    "teddy bear": _teddy,
    "cat": _cat,
    "cup": _cup,
    "car": _car,
    "house": _house,
    "bird": _bird,
    "fish": _fish,
    "robot": _robot,
    "boat": _boat,
    "mushroom": _mushroom,
}


def draw_thing(tile: Tile, category: str, look: Look) -> Anchor:
    """Draw a thing into its tile and say where an accessory would sit."""
    anchor = CATEGORIES[category](tile, look)
    if look.mark is not None and look.mark_color is not None:
        tile.draw_mark(look.mark, look.mark_color, *anchor.mark, anchor.mark_size)
    return anchor


def draw_accessory(canvas: Image.Image, accessory: str, corner: tuple[int, int], tile: Tile, anchor: Anchor) -> None:
    """Put a hat or a crown on a thing."""
    pen = ImageDraw.Draw(canvas)
    (x, y), unit = tile.point(*anchor.top), tile.radius
    x, y = x + corner[0], y + corner[1]
    w = anchor.width * unit

    def at(dx: float, dy: float) -> tuple[float, float]:
        return x + dx * w, y + dy * w

    edge = max(2, round(0.05 * unit))
    if accessory == "hat":
        pen.rounded_rectangle([*at(-0.62, -1.25), *at(0.62, 0.1)], edge, fill=(58, 46, 92), outline=_INK, width=edge)
        pen.rectangle([*at(-0.56, -0.42), *at(0.56, -0.1)], fill=(226, 60, 70))
        pen.rounded_rectangle([*at(-1.1, -0.1), *at(1.1, 0.22)], edge, fill=(58, 46, 92), outline=_INK, width=edge)
    elif accessory == "crown":
        spikes = [(-0.85, 0.15), (-0.95, -0.95), (-0.45, -0.4), (0, -1.1), (0.45, -0.4), (0.95, -0.95), (0.85, 0.15)]
        points = [at(*p) for p in spikes]
        pen.polygon(points, fill=(255, 205, 40))
        pen.line([*points, points[0], points[1]], fill=(140, 90, 0), width=edge)
        for dx in (-0.45, 0, 0.45):
            pen.ellipse([*at(dx - 0.13, -0.26), *at(dx + 0.13, 0.0)], fill=(220, 40, 60))
    else:
        raise ValueError(f"unknown accessory {accessory!r}")
