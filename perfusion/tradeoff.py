"""The trade-off between likeness to the photos and obedience to the prompt, set after training (Tewel et al. 2023).

A concept's gate has a bias and a temperature; with them, its strength, key lock and guidance, one trained file gives a
whole curve of pictures, from those most like the photos to those most true to the text. Here are the settings of a
grid, what came of each, the Pareto front, and rules by which the best is picked.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from torch import Tensor

from .edit import Gate
from .locking import LOCKS, Lock
from .stack import ConceptStack, ConceptUse
from .training.scoring import harmonic_mean

MOST_CELLS = 100
MOST_PICTURES = 400
_MOST_NUMBERS = 100_000
_RANGE = re.compile(r"([^:]+):([^:]+):\s*(\d{1,6})\s*")

Rule = Literal["harmonic mean", "most faithful", "knee"]
RULES: tuple[Rule, ...] = get_args(Rule)


class TradeOffError(ValueError):
    """A grid that cannot be drawn, or a choice that cannot be made; the message says what to change."""


@dataclass(frozen=True)
class Setting:
    """One cell of a grid. What is None is each concept's own, or, for the guidance, the sampler's."""

    bias: float | None = None
    temperature: float | None = None
    strength: float | None = None
    lock: Lock | None = None
    guidance: float | None = None
    focus_share: float | None = None

    def gate(self, own: Gate) -> Gate:
        """A concept's gate with this setting."""
        given = {f.name: getattr(self, f.name) for f in fields(Gate)}
        return replace(own, **{name: value for name, value in given.items() if value is not None})

    def applied(self, stack: ConceptStack, word: str = "") -> ConceptStack:
        """Concepts with this setting: that of one word, or of all where it is empty."""

        def change(use: ConceptUse) -> ConceptUse:
            lock = {} if self.lock is None else {"lock": self.lock, "lock_fixed": True}
            return replace(use, gate=self.gate(use.gate), **lock)

        return stack.changed(word, change)

    @property
    def told(self) -> dict[str, str]:
        """What is set, by name, as people write it."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: v if isinstance(v, str) else f"{v:g}" for name, v in values.items() if v is not None}


@dataclass(frozen=True, eq=False)
class Trial:
    """What came of a setting: pictures (n, height, width, 3) in 0..1, and their likeness to the photos and to the text,
    as mean cosines; None where nothing was compared."""

    setting: Setting
    pictures: Tensor
    image: float | None = None
    text: float | None = None

    @property
    def point(self) -> tuple[float, float]:
        """(image, text) of a trial that was scored."""
        return self.image or 0.0, self.text or 0.0

    @property
    def harmonic(self) -> float | None:
        """Harmonic mean of both."""
        return None if self.image is None or self.text is None else harmonic_mean(self.image, self.text)


@dataclass(frozen=True, eq=False)
class TradeOff:
    """All cells of a grid, and the concepts they were drawn with; ``word`` is the one that was set, "" all of them."""

    stack: ConceptStack
    word: str
    prompt: str
    trials: tuple[Trial, ...]


def numbers(text: str, least: float, most: float) -> list[float]:
    """Numbers of a text such as "0.4, 0.55, 0.7", or "0.3:0.9:7" for seven from 0.3 to 0.9; none for an empty one.

    Raises TradeOffError for anything else, and for numbers beyond ``least`` and ``most``.
    """
    found: list[float] = []
    try:
        for part in filter(None, map(str.strip, text.replace(";", ",").split(","))):
            if as_range := _RANGE.fullmatch(part):
                first, last, count = float(as_range[1]), float(as_range[2]), int(as_range[3])
                if not 2 <= count <= _MOST_NUMBERS:
                    raise ValueError
                found += [round(first + (last - first) * k / (count - 1), 6) for k in range(count)]
            else:
                found.append(float(part))
    except ValueError:
        raise TradeOffError(
            f"{text[:60]!r} is no list of numbers. Write them with commas between, such as 0.4, 0.55, 0.7, or as "
            "first, last and how many: 0.3:0.9:7."
        ) from None
    if not all(math.isfinite(number) and least <= number <= most for number in found):
        raise TradeOffError(f"{text[:60]!r}: numbers must lie between {least:g} and {most:g}")
    return list(dict.fromkeys(found))


def grid(
    bias: Sequence[float] = (),
    temperature: Sequence[float] = (),
    strength: Sequence[float] = (),
    locks: Sequence[Lock] = (),
    guidance: Sequence[float] = (),
    pictures: int = 1,
    focus_share: Sequence[float] = (),
) -> list[Setting]:
    """Every combination, the bias running fastest, then the temperature, strength and focus share; what is left empty
    is not varied.

    Raises TradeOffError for more cells than ``MOST_CELLS``, or, at so many pictures a cell, than ``MOST_PICTURES``.
    """
    if any(lock not in LOCKS for lock in locks):
        raise TradeOffError(f"a key lock is one of {', '.join(LOCKS)}")
    axes: list[Sequence[Any]] = [
        axis or (None,) for axis in (guidance, locks, focus_share, strength, temperature, bias)
    ]
    cells = math.prod(len(axis) for axis in axes)
    if cells > MOST_CELLS or cells * pictures > MOST_PICTURES:
        told = " x ".join(str(len(axis)) for axis in reversed(axes) if len(axis) > 1)
        raise TradeOffError(
            f"this grid has {cells:,} cells ({told}) and would take {cells * pictures:,} pictures; at most "
            f"{MOST_CELLS} cells and {MOST_PICTURES} pictures are drawn. Give fewer values, or fewer pictures a cell."
        )
    return [Setting(b, t, s, lock, g, f) for g, lock, f, s, t, b in itertools.product(*axes)]


def varied(settings: Sequence[Setting]) -> list[str]:
    """The names of what is not the same in all settings, the bias first."""
    return [f.name for f in fields(Setting) if len({getattr(setting, f.name) for setting in settings}) > 1]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which (image, text) points no other beats in both, by rising first coordinate."""
    front = [
        k for k, (x, y) in enumerate(points) if not any((a >= x and b > y) or (a > x and b >= y) for a, b in points)
    ]
    return sorted(front, key=lambda k: points[k])


def knee(points: Sequence[tuple[float, float]]) -> int:
    """The point of the front that lies farthest beyond the line between its ends, both axes scaled to the front."""
    front = pareto_front(points)
    (x0, y0), (x1, y1) = points[front[0]], points[front[-1]]
    if x1 == x0 or y1 == y0:
        return front[-1]
    # On that line, scaled, both coordinates add up to one.
    return max(front, key=lambda k: (points[k][0] - x0) / (x1 - x0) + (points[k][1] - y1) / (y0 - y1))


def best(trials: Sequence[Trial], rule: Rule, least_text: float = 0.0) -> Trial:
    """The trial that a rule picks.

    "harmonic mean": the highest of both similarities. "most faithful": the highest image similarity of those whose text
    similarity is at least ``least_text``. "knee": where more of the one begins to cost much of the other.
    Raises TradeOffError without scores, or where no trial reaches ``least_text``, naming the nearest.
    """
    scored = [trial for trial in trials if trial.harmonic is not None]
    if not scored:
        raise TradeOffError(
            "this trade-off has no scores to pick by: connect clip_vision and photos to Trade-Off, and score_clip "
            "where its CLIP has no text projection"
        )
    points = [trial.point for trial in scored]
    if rule == "harmonic mean":
        return max(scored, key=lambda trial: trial.harmonic or 0.0)
    if rule == "knee":
        return scored[knee(points)]
    if rule != "most faithful":
        raise TradeOffError(f"a rule is one of {', '.join(RULES)}, not {rule!r}")
    enough = [k for k, (_, text) in enumerate(points) if text >= least_text]
    if not enough:
        nearest = max(text for _, text in points)
        raise TradeOffError(
            f"no setting has a text similarity of {least_text:g} or more; the highest is {nearest:.3f}. Lower it, or "
            "add higher biases to the grid."
        )
    return scored[max(enough, key=lambda k: points[k])]


def table(trade_off: TradeOff) -> str:
    """The cells and their scores as text, and which of them are on the front."""
    trials = trade_off.trials
    names = varied([trial.setting for trial in trials]) or ["bias"]
    scored = [k for k, trial in enumerate(trials) if trial.harmonic is not None]
    front = {scored[k] for k in pareto_front([trials[k].point for k in scored])}
    rows = [[*names, *(["image", "text", "harmonic", "front"] if scored else [])]]
    for k, trial in enumerate(trials):
        row = [trial.setting.told.get(name, "own") for name in names]
        if scored:
            values = (trial.image, trial.text, trial.harmonic)
            row += ["-" if value is None else f"{value:.4f}" for value in values] + ["*" if k in front else ""]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
