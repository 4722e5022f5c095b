"""Pictures of a trade-off: the contact sheet of its cells, and the plot of likeness against obedience."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image, ImageDraw
from torch import Tensor

from ...tradeoff import Setting, TradeOff, Trial, best, knee, pareto_front, varied
from .lettering import INK, MUTED, PAPER, cut, font, printable, wrapped

_MARGIN, _GAP, _LABEL, _HEADER, _CAPTION = 28, 12, 132, 26, 40
_SIDE, _WIDEST = 208, 4096  # pixels of a cell, and of the whole sheet
_BEST, _FRONT, _GRID = "#c2410c", "#2563eb", "#eceff4"
_COLORS = ("#2563eb", "#0f766e", "#9333ea", "#b45309", "#be123c", "#4d7c0f")
_NAMES = {"lock": "key lock", "focus_share": "focus share"}


def contact_sheet(trade_off: TradeOff, cells: Sequence[Setting]) -> Image.Image:
    """The cells of a grid, those that are drawn already, a column for each bias, with their scores below.

    The one with the best harmonic mean is framed.
    """
    trials = {trial.setting: trial for trial in trade_off.trials}
    across, *down = varied(cells) or ["bias"]
    columns = list(dict.fromkeys(getattr(cell, across) for cell in cells))
    rows = list(dict.fromkeys(replace(cell, **{across: None}) for cell in cells))
    label = _LABEL if down else 0
    side = max(64, min(_SIDE, (_WIDEST - 2 * _MARGIN - label) // len(columns) - _GAP))
    title = wrapped(printable(trade_off.prompt), 15, max(240, len(columns) * (side + _GAP) + label), lines=3)
    top = _MARGIN + 22 * len(title) + 10
    caption = _CAPTION if any(trial.harmonic is not None for trial in trade_off.trials) else _GAP
    shape = next((trial.pictures.shape for trial in trade_off.trials), (1, 1, 1, 3))
    height = max(1, round(side * shape[1] / shape[2]))
    whole = Image.new(
        "RGB",
        (
            2 * _MARGIN + label + max(240, len(columns) * (side + _GAP)),
            top + _HEADER + len(rows) * (height + caption) + _MARGIN,
        ),
        PAPER,
    )
    pen = ImageDraw.Draw(whole)
    for number, line in enumerate(title):
        pen.text((_MARGIN, _MARGIN + 22 * number), line, fill=INK, font=font(15))
    chosen = _best(trade_off.trials)
    for column, value in enumerate(columns):
        left = _MARGIN + label + column * (side + _GAP)
        pen.text((left, top), cut(_told(across, value), 13, side), fill=INK, font=font(13))
    for row, rest in enumerate(rows):
        y = top + _HEADER + row * (height + caption)
        for number, axis in enumerate(down):
            told = _told(axis, getattr(rest, axis))
            pen.text((_MARGIN, y + 18 * number), cut(told, 12, _LABEL - 8), fill=MUTED, font=font(12))
        for column, value in enumerate(columns):
            x = _MARGIN + label + column * (side + _GAP)
            trial = trials.get(replace(rest, **{across: value}))
            if trial is None:
                pen.rectangle([x, y, x + side - 1, y + height - 1], fill=_GRID)
                continue
            whole.paste(_mosaic(trial.pictures, (side, height)), (x, y))
            if trial is chosen:
                pen.rectangle([x - 3, y - 3, x + side + 2, y + height + 2], outline=_BEST, width=3)
            if trial.harmonic is not None:
                told = f"image {trial.image:.3f}  text {trial.text:.3f}"
                color = _BEST if trial is chosen else MUTED
                pen.text((x, y + height + 6), cut(told, 12, side), fill=color, font=font(12))
    return whole


def plot(trade_off: TradeOff) -> Image.Image:
    """Text similarity over image similarity of all cells, with the Pareto front, and what the rules pick."""
    width, height, scale = 720, 560, 2  # drawn twice as large, for smooth lines
    whole = Image.new("RGB", (width * scale, height * scale), PAPER)
    pen = ImageDraw.Draw(whole)
    trials = [trial for trial in trade_off.trials if trial.harmonic is not None]
    if not trials:
        text = "Nothing was scored: connect clip_vision and photos, and score_clip where the CLIP cannot compare."
        for number, line in enumerate(wrapped(text, 15 * scale, 560 * scale)):
            pen.text((60 * scale, (240 + 24 * number) * scale), line, fill=MUTED, font=font(15 * scale))
        return whole.resize((width, height), Image.Resampling.LANCZOS)
    points = [trial.point for trial in trials]
    area = (84, 64, width - 36, height - 64)
    (x0, x1), (y0, y1) = (_span([point[axis] for point in points]) for axis in (0, 1))

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = area[0] + (point[0] - x0) / (x1 - x0) * (area[2] - area[0])
        y = area[3] - (point[1] - y0) / (y1 - y0) * (area[3] - area[1])
        return x * scale, y * scale

    for number in range(5):
        share = number / 4
        x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
        across, up = place((x, y0)), place((x0, y))
        pen.line([across, place((x, y1))], fill=_GRID, width=scale)
        pen.line([up, place((x1, y))], fill=_GRID, width=scale)
        pen.text((across[0], across[1] + 8 * scale), f"{x:.3f}", fill=MUTED, font=font(12 * scale), anchor="ma")
        pen.text((up[0] - 8 * scale, up[1]), f"{y:.3f}", fill=MUTED, font=font(12 * scale), anchor="rm")
    pen.text(
        ((area[0] + area[2]) / 2 * scale, (height - 32) * scale),
        "image similarity: likeness to the photos",
        fill=INK,
        font=font(13 * scale),
        anchor="ma",
    )
    pen.text((16 * scale, 30 * scale), "text similarity: obedience to the prompt", fill=INK, font=font(13 * scale))
    front = pareto_front(points)
    pen.line([place(points[k]) for k in front], fill=_FRONT, width=2 * scale)
    colored = next((axis for axis in varied([trial.setting for trial in trials]) if axis != "bias"), None)
    values = list(dict.fromkeys(getattr(t.setting, colored) for t in trials)) if colored else [None]
    picks = [("harmonic mean", _best(trials)), ("knee", trials[knee(points)])]
    for k, trial in enumerate(trials):
        x, y = place(points[k])
        color = _COLORS[values.index(getattr(trial.setting, colored)) % len(_COLORS)] if colored else _COLORS[0]
        radius = (6 if k in front else 4) * scale
        pen.ellipse(
            [x - radius, y - radius, x + radius, y + radius],
            fill=color if k in front else PAPER,
            outline=color,
            width=2 * scale,
        )
        told = "" if trial.setting.bias is None else f"{trial.setting.bias:g}"
        pen.text((x + 9 * scale, y - 15 * scale), told, fill=MUTED, font=font(11 * scale))
        picked = ", ".join(rule for rule, choice in picks if choice is trial)
        if picked:
            radius += 4 * scale
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], outline=_BEST, width=scale)
            pen.text((x + 9 * scale, y + 5 * scale), picked, fill=_BEST, font=font(11 * scale))
    if colored:
        for number, value in enumerate(values[:6]):
            left, top = (area[2] - 150) * scale, (area[1] + 6 + 18 * number) * scale
            pen.ellipse([left, top + 3 * scale, left + 8 * scale, top + 11 * scale], fill=_COLORS[number])
            pen.text((left + 14 * scale, top), _told(colored, value), fill=MUTED, font=font(12 * scale))
    return whole.resize((width, height), Image.Resampling.LANCZOS)


def _best(trials: Sequence[Trial]) -> Trial | None:
    return best(trials, "harmonic mean") if any(trial.harmonic is not None for trial in trials) else None


def _span(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis: a little beyond the values, and never one point."""
    room = max(0.08 * (max(values) - min(values)), 0.002)
    return min(values) - room, max(values) + room


def _told(axis: str, value: object) -> str:
    shown = "own" if value is None else value if isinstance(value, str) else f"{value:g}"
    return f"{_NAMES.get(axis, axis)} {shown}"


def _mosaic(pictures: Tensor, size: tuple[int, int]) -> Image.Image:
    """Pictures (n, h, w, 3) side by side in one of this width and height; small ones are enlarged without blurring."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    whole = Image.new("RGB", size, PAPER)
    width, height = size[0] // columns, size[1] // rows
    for number, picture in enumerate(pictures):
        drawn = Image.fromarray((picture[..., :3] * 255).round().byte().contiguous().numpy())
        way = Image.Resampling.NEAREST if drawn.width < width else Image.Resampling.LANCZOS
        scale = min(width / drawn.width, height / drawn.height)
        drawn = drawn.resize((max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale))), way)
        left, top = number % columns * width, number // columns * height
        whole.paste(drawn, (left + (width - drawn.width) // 2, top + (height - drawn.height) // 2))
    return whole
