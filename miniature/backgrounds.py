"""The places of the world."""

from __future__ import annotations

from random import Random

from PIL import Image, ImageDraw

from .shapes import Color

BACKGROUNDS = ("beach", "snow", "forest", "night", "room", "moon", "studio")


def draw_background(canvas: Image.Image, name: str, rng: Random) -> None:
    """Fill a square canvas with a place; clouds, trees and stars are the random generator's."""
    _PLACES[name](canvas, ImageDraw.Draw(canvas), canvas.width, rng)


def _gradient(canvas: Image.Image, top: Color, bottom: Color, start: float = 0.0, end: float = 1.0) -> None:
    side = canvas.width
    box = (0, round(start * side), side, round(end * side))
    ramp = Image.linear_gradient("L").resize((side, box[3] - box[1]))
    strip = Image.composite(Image.new("RGB", ramp.size, bottom), Image.new("RGB", ramp.size, top), ramp)
    canvas.paste(strip, box)


def _shade(color: Color, rng: Random, by: int = 14) -> Color:
    shift = rng.randint(-by, by)
    r, g, b = (max(0, min(255, c + shift)) for c in color)
    return r, g, b


def _beach(canvas: Image.Image, pen: ImageDraw.ImageDraw, n: int, rng: Random) -> None:
    horizon, shore = rng.uniform(0.36, 0.44), rng.uniform(0.54, 0.6)
    _gradient(canvas, (110, 190, 245), (200, 232, 250), 0, horizon)
    _gradient(canvas, (30, 120, 190), (70, 180, 210), horizon, shore)
    _gradient(canvas, (246, 222, 160), (232, 196, 124), shore, 1)
    x, r = rng.uniform(0.1, 0.9) * n, 0.075 * n
    pen.ellipse([x - r, 0.14 * n - r, x + r, 0.14 * n + r], fill=(255, 236, 120))
    for _ in range(3):
        x, y = rng.uniform(0, 1) * n, rng.uniform(horizon + 0.03, shore - 0.04) * n
        pen.line([x - 0.06 * n, y, x + 0.06 * n, y], fill=(190, 230, 240), width=3)
    pen.line([0, shore * n, n, shore * n], fill=(250, 250, 250), width=6)


def _snow(canvas: Image.Image, pen: ImageDraw.ImageDraw, n: int, rng: Random) -> None:
    _gradient(canvas, (150, 176, 206), (212, 224, 236), 0, 0.62)
    for _ in range(3):
        x, h = rng.uniform(0, 1) * n, rng.uniform(0.2, 0.3) * n
        base = 0.6 * n
        for level in range(3):
            top, wide = base - h + level * h * 0.25, (0.35 + level * 0.18) * h * 0.6
            pen.polygon([(x, top), (x - wide, top + h * 0.4), (x + wide, top + h * 0.4)], fill=(52, 96, 92))
            pen.polygon(
                [(x, top), (x - wide * 0.5, top + h * 0.2), (x + wide * 0.5, top + h * 0.2)], fill=(244, 248, 252)
            )
    for shift in (0.0, 0.5):
        x = (rng.uniform(0, 0.4) + shift) * n
        pen.ellipse([x - 0.6 * n, 0.54 * n, x + 0.6 * n, 1.1 * n], fill=(232, 240, 248))
    _gradient(canvas, (236, 242, 250), (250, 252, 255), 0.64, 1)
    for _ in range(36):
        x, y, r = rng.uniform(0, n), rng.uniform(0, 0.95 * n), rng.uniform(0.008, 0.014) * n
        pen.ellipse([x - r, y - r, x + r, y + r], fill=(255, 255, 255))


def _forest(canvas: Image.Image, pen: ImageDraw.ImageDraw, n: int, rng: Random) -> None:
    _gradient(canvas, (116, 178, 104), (64, 122, 66), 0, 0.6)
    for k in range(6):
        x = (k + rng.uniform(0.1, 0.9)) / 6 * n
        w = rng.uniform(0.022, 0.04) * n
        pen.rectangle([x - w, 0, x + w, 0.62 * n], fill=_shade((94, 64, 40), rng))
    for _ in range(8):
        x, y, r = rng.uniform(0, n), rng.uniform(-0.02, 0.16) * n, rng.uniform(0.1, 0.16) * n
        pen.ellipse([x - r, y - r, x + r, y + r], fill=_shade((42, 110, 50), rng))
    _gradient(canvas, (74, 132, 58), (50, 98, 42), 0.58, 1)
    for _ in range(10):
        x, y = rng.uniform(0, n), rng.uniform(0.64, 0.97) * n
        pen.line([(x - 5, y - 9), (x, y), (x + 5, y - 9)], fill=(110, 170, 76), width=3)


def _night(canvas: Image.Image, pen: ImageDraw.ImageDraw, n: int, rng: Random) -> None:
    _gradient(canvas, (12, 16, 58), (48, 42, 110), 0, 0.65)
    for _ in range(16):
        x, y, r = rng.uniform(0, n), rng.uniform(0, 0.5) * n, rng.uniform(0.007, 0.013) * n
        pen.ellipse([x - r, y - r, x + r, y + r], fill=(250, 246, 200))
    x, r = rng.choice([rng.uniform(0.12, 0.3), rng.uniform(0.7, 0.88)]) * n, 0.085 * n
    pen.ellipse([x - r, 0.14 * n - r, x + r, 0.14 * n + r], fill=(252, 240, 170))
    pen.ellipse([x - r * 0.4, 0.11 * n - r, x + r * 1.6, 0.11 * n + r], fill=(22, 22, 70))
    for shift in (0.0, 0.6):
        x = (rng.uniform(0, 0.4) + shift) * n
        pen.ellipse([x - 0.5 * n, 0.5 * n, x + 0.5 * n, 1.2 * n], fill=(22, 26, 66))
    _gradient(canvas, (26, 34, 70), (16, 22, 46), 0.64, 1)


def _room(canvas: Image.Image, pen: ImageDraw.ImageDraw, n: int, rng: Random) -> None:
    wall = _shade((226, 206, 176), rng)
    canvas.paste(wall, (0, 0, n, n))
    x = rng.uniform(0.06, 0.62) * n
    pen.rectangle([x, 0.08 * n, x + 0.3 * n, 0.4 * n], fill=(250, 250, 246))
    pen.rectangle([x + 8, 0.08 * n + 8, x + 0.3 * n - 8, 0.4 * n - 8], fill=(160, 208, 240))
    pen.line([x + 0.15 * n, 0.08 * n, x + 0.15 * n, 0.4 * n], fill=(250, 250, 246), width=6)
    pen.line([x, 0.24 * n, x + 0.3 * n, 0.24 * n], fill=(250, 250, 246), width=6)
    _gradient(canvas, (168, 112, 66), (140, 88, 48), 0.6, 1)
    pen.rectangle([0, 0.575 * n, n, 0.605 * n], fill=(246, 240, 228))
    for k in range(1, 4):
        y = (0.6 + 0.1 * k) * n
        pen.line([0, y, n, y], fill=(112, 68, 36), width=3)


def _moon(canvas: Image.Image, pen: ImageDraw.ImageDraw, n: int, rng: Random) -> None:
    canvas.paste((8, 8, 14), (0, 0, n, n))
    for _ in range(14):
        x, y, r = rng.uniform(0, n), rng.uniform(0, 0.5) * n, rng.uniform(0.005, 0.010) * n
        pen.ellipse([x - r, y - r, x + r, y + r], fill=(235, 235, 240))
    x, y, r = rng.choice([rng.uniform(0.14, 0.3), rng.uniform(0.7, 0.86)]) * n, 0.17 * n, 0.11 * n
    pen.ellipse([x - r, y - r, x + r, y + r], fill=(60, 130, 220))
    pen.ellipse([x - r * 0.6, y - r * 0.7, x + r * 0.3, y + r * 0.1], fill=(80, 170, 90))
    pen.ellipse([x - r * 0.1, y + r * 0.2, x + r * 0.6, y + r * 0.7], fill=(80, 170, 90))
    pen.ellipse([-0.5 * n, 0.53 * n, 1.5 * n, 1.6 * n], fill=(150, 150, 154))
    for _ in range(7):
        x, y, r = rng.uniform(0, n), rng.uniform(0.64, 0.96) * n, rng.uniform(0.03, 0.07) * n
        pen.ellipse([x - r, y - r * 0.45, x + r, y + r * 0.45], fill=(116, 116, 122))
        pen.ellipse([x - r * 0.8, y - r * 0.25, x + r * 0.8, y + r * 0.4], fill=(134, 134, 140))


def _studio(canvas: Image.Image, pen: ImageDraw.ImageDraw, n: int, rng: Random) -> None:
    r, g, b = (rng.randint(150, 235) for _ in range(3))
    _gradient(canvas, (r, g, b), (max(0, r - 50), max(0, g - 50), max(0, b - 50)))


_PLACES = {
    "beach": _beach,
    "snow": _snow,
    "forest": _forest,
    "night": _night,
    "room": _room,
    "moon": _moon,
    "studio": _studio,
}
