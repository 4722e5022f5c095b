"""The picture of an inspected prompt: a row for each concept, a column for each token, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image, ImageDraw
from torch import Tensor

from ...inspection import PART, ConceptReport, Inspection, Token, listed
from .lettering import INK, MUTED, PAPER, as_tensor, cut, font, printable, wrapped

_MARGIN, _GAP = 28, 22
_HEAD, _LINE, _LEGEND = 44, 21, 22
_CELL, _WIDEST_CELL = 50, 150
_LABEL, _WIDEST_LABEL = 110, 240
_MANY_CONCEPTS, _MANY_TOKENS = 6, 40

_GRID, _BAND = "#e4e7ee", "#f6f7fa"
_SHUT, _OPEN = (250, 251, 253), (24, 100, 190)
_OWN, _AFFECTED = "#e8710a", "#d1242f"
_STATES = {"appears": "#2a9d5c", "shut": _AFFECTED, "missing": _AFFECTED, "off": "#a3a9b5"}


def picture(inspection: Inspection, prompt: str) -> Tensor:
    """An inspection as an IMAGE (1, height, width, 3) in 0..1."""
    return as_tensor(draw(inspection, prompt))


def draw(inspection: Inspection, prompt: str) -> Image.Image:
    """An inspection as a picture: what follows, then the table, in as many stretches as the prompt needs.

    It is 1,120 pixels wide, 1,600 for long prompts, and as high as it takes; with many concepts rows are low and tell
    the gate alone.
    """
    reports = inspection.concepts
    width = 1120 if len(inspection.tokens) <= _MANY_TOKENS else 1600
    row = 42 if len(reports) <= _MANY_CONCEPTS else 24
    left = _MARGIN + _label_width(reports)
    bands = list(_bands(inspection.tokens, width - _MARGIN - left))
    title = wrapped(printable(prompt) or "(no text)", 15, width - 2 * _MARGIN, lines=3)
    findings = list(_findings(inspection, width - 2 * _MARGIN - 20))
    band_height = _HEAD + max(1, len(reports)) * row + _GAP
    height = 2 * _MARGIN + (len(title) + len(findings)) * _LINE + 2 * _GAP + len(bands) * band_height
    height += _LEGEND if reports else -_GAP
    image = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(image)
    top = _MARGIN
    for line in title:
        pen.text((_MARGIN, top), line, fill=INK, font=font(15))
        top += _LINE
    top += _GAP // 2
    for color, indent, text, fill in findings:
        if color:
            pen.ellipse((_MARGIN, top + 5, _MARGIN + 9, top + 14), fill=color)
        pen.text((_MARGIN + indent, top), text, fill=fill, font=font(14))
        top += _LINE
    top += _GAP
    for band in bands:
        _draw_band(pen, inspection, band, left, top, row)
        top += band_height
    if reports:
        _draw_legend(pen, inspection.threshold, top)
    return image


def _draw_band(
    pen: ImageDraw.ImageDraw, inspection: Inspection, band: list[tuple[int, int]], left: int, top: int, row: int
) -> None:
    """One stretch of the prompt: columns are (token, width), rows ``row`` pixels high."""
    reports = inspection.concepts
    words = {report.use.concept.placeholder for report in reports}
    right = left + sum(width for _, width in band)
    pen.rectangle((_MARGIN, top, right, top + _HEAD), fill=_BAND)
    for j, report in enumerate(reports):
        y = top + _HEAD + j * row
        concept = report.use.concept
        room = left - _MARGIN - 12
        pen.text((_MARGIN, y + 4), cut(concept.placeholder, 14, room), fill=INK, font=font(14))
        if row > 24:
            pen.text((_MARGIN, y + 23), cut(printable(concept.super_category), 11, room), fill=MUTED, font=font(11))
    if not reports:
        pen.text((_MARGIN, top + _HEAD + 12), "no concept", fill=MUTED, font=font(14))
    x = left
    for m, width in band:
        token = inspection.tokens[m]
        own = token.placeholder in words
        color = _OWN if own else INK if token.role == "text" else MUTED
        name = cut(_name(token), 13, width - 10)
        pen.text((x + width / 2, top + 16), name, fill=color, font=font(13), anchor="mm")
        if token.role == "text" and token.weight != 1:
            pen.text((x + width / 2, top + 33), f"x {token.weight:.4g}", fill=MUTED, font=font(11), anchor="mm")
        for j, report in enumerate(reports):
            y = top + _HEAD + j * row
            _draw_cell(pen, inspection, m, j, report, (x, y, x + width, y + row))
        x += width
    for edge in range(max(1, len(reports)) + 1):
        y = top + _HEAD + edge * row
        pen.line((_MARGIN, y, right, y), fill=_GRID)
    # Frames last: they lie over the grid.
    x = left
    for m, width in band:
        for j, report in enumerate(reports):
            if inspection.tokens[m].placeholder == report.use.concept.placeholder:
                y = top + _HEAD + j * row
                pen.rectangle((x + 1, y + 1, x + width - 1, y + row - 1), outline=_OWN, width=2)
        x += width


def _draw_cell(
    pen: ImageDraw.ImageDraw,
    inspection: Inspection,
    m: int,
    j: int,
    report: ConceptReport,
    box: tuple[int, int, int, int],
) -> None:
    """The gate as a color and a number, r below it; a corner marks affected words."""
    gate, r = float(inspection.gates[m, j]), float(inspection.r[m, j])
    left, top, right, bottom = box
    off = report.state == "off"
    strength = gate * (0.25 if off else 1.0)
    fill = tuple(round(a + (b - a) * strength) for a, b in zip(_SHUT, _OPEN, strict=True))
    pen.rectangle((left + 1, top + 1, right - 1, bottom - 1), fill=fill)
    bright, center = strength > 0.5, (left + right) / 2
    tall = bottom - top > 24
    middle = top + (15 if tall else 12)
    pen.text((center, middle), f"{gate:.2f}", fill="white" if bright else INK, font=font(13), anchor="mm")
    if tall:
        pen.text((center, top + 31), f"r {r:.2f}", fill="#cfe0f5" if bright else MUTED, font=font(11), anchor="mm")
    if gate > inspection.threshold and not off and inspection.tokens[m].placeholder != report.use.concept.placeholder:
        pen.polygon([(right - 11, top + 1), (right - 1, top + 1), (right - 1, top + 11)], fill=_AFFECTED)


def _draw_legend(pen: ImageDraw.ImageDraw, threshold: float, top: int) -> None:
    x, y = _MARGIN, top + 4
    pen.text((x, y + 7), "gate 0", fill=MUTED, font=font(12), anchor="lm")
    x += 44
    for k in range(120):
        fill = tuple(round(a + (b - a) * k / 119) for a, b in zip(_SHUT, _OPEN, strict=True))
        pen.line((x + k, y, x + k, y + 14), fill=fill)
    pen.rectangle((x - 1, y - 1, x + 120, y + 15), outline=_GRID)
    x += 128
    pen.text((x, y + 7), "1", fill=MUTED, font=font(12), anchor="lm")
    x += 40
    pen.rectangle((x, y, x + 22, y + 14), outline=_OWN, width=2)
    pen.text((x + 30, y + 7), "the concept's own word", fill=MUTED, font=font(12), anchor="lm")
    x += 200
    pen.polygon([(x, y + 2), (x + 10, y + 2), (x + 10, y + 12)], fill=_AFFECTED)
    told = f"another word that it affects: gate above {threshold:.2f}"
    pen.text((x + 18, y + 7), told, fill=MUTED, font=font(12), anchor="lm")


def _findings(inspection: Inspection, width: int) -> Iterator[tuple[str, int, str, str]]:
    """Lines about the concepts, of at most ``width`` pixels: color of the dot, indent, text and its color."""
    if not inspection.concepts:
        yield "", 0, "There is no concept: the prompt is the model's own.", MUTED
    for note in inspection.notes:
        for k, line in enumerate(wrapped(printable(note), 14, width)):
            yield _AFFECTED if k == 0 else "", 20, line, INK
    for report in inspection.concepts:
        told = printable(report.summary)
        if report.affected:
            told += f" It also affects {listed(report.affected)}."
        if report.answers:
            told += f" It answers to {listed(report.answers)}."
        color = _STATES[report.state]
        if report.state == "appears" and (report.affected or report.answers):
            color = _OWN
        for k, line in enumerate(wrapped(told, 14, width)):
            yield color if k == 0 else "", 20, line, INK
        for advice in report.advice:
            for line in wrapped(printable(advice), 14, width):
                yield "", 20, line, MUTED


def _bands(tokens: tuple[Token, ...], room: int) -> Iterator[list[tuple[int, int]]]:
    """Columns as (token, width), as many to a band as fit."""
    band: list[tuple[int, int]] = []
    for m, token in enumerate(tokens):
        width = min(_WIDEST_CELL, max(_CELL, round(font(13).getlength(_name(token))) + 18))
        if band and sum(w for _, w in band) + width > room:
            yield band
            band = []
        band.append((m, width))
    yield band


def _name(token: Token) -> str:
    if token.role == "text":
        return printable(token.text) or PART
    return token.role if token.chunk == 0 else f"{token.role} {token.chunk + 1}"


def _label_width(reports: tuple[ConceptReport, ...]) -> int:
    widest = max((font(14).getlength(report.use.concept.placeholder) for report in reports), default=0)
    return min(_WIDEST_LABEL, max(_LABEL, round(widest) + 16))
