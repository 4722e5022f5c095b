"""The settings of a trade-off, and picking among them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perfusion.edit import Gate
from perfusion.stack import StackError
from perfusion.tradeoff import (
    MOST_CELLS,
    RULES,
    Setting,
    TradeOff,
    TradeOffError,
    Trial,
    best,
    grid,
    knee,
    numbers,
    pareto_front,
    table,
)
from tests.unit.test_stack import stack_of

POINTS = st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=12)


def trials(*scores: tuple[float, float]) -> list[Trial]:
    picture = torch.zeros(1, 2, 2, 3)
    return [Trial(Setting(bias=k / 10), picture, image, text) for k, (image, text) in enumerate(scores)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.4, 0.55,0.7", [0.4, 0.55, 0.7]),
        ("0.3:0.9:7", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        ("1:-1:3; 0.5", [1, 0, -1, 0.5]),
        (" .5 ,, 0.5 ", [0.5]),
        ("", []),
        (" , ", []),
    ],
)
def test_numbers(text: str, expected: list[float]) -> None:
    assert numbers(text, -1, 2) == pytest.approx(expected)


@pytest.mark.parametrize(
    "text", ["x", "0.3:0.9", "0.3:0.9:1", "0.3:0.9:x", "0.3:0.9:7:2", "nan", "inf", "3", "0.1:9:5"]
)
def test_what_are_no_numbers_is_refused(text: str) -> None:
    with pytest.raises(TradeOffError, match="no list of numbers|must lie between -1 and 2"):
        numbers(text, -1, 2)


def test_every_combination_the_bias_fastest() -> None:
    cells = grid([0.1, 0.2], [0.3, 0.4], locks=["local", "global"])
    assert len(set(cells)) == len(cells) == 8
    assert [cell.bias for cell in cells] == [0.1, 0.2] * 4
    assert [cell.lock for cell in cells] == ["local"] * 4 + ["global"] * 4
    shares = grid([0.1, 0.2], strength=[0.5, 1.0], focus_share=[0.0, 1.0])
    assert [(cell.strength, cell.focus_share) for cell in shares[::2]] == [
        (0.5, 0.0),
        (1.0, 0.0),
        (0.5, 1.0),
        (1.0, 1.0),
    ]
    assert grid() == [Setting()]


def test_a_grid_too_large_says_what_it_would_take() -> None:
    with pytest.raises(TradeOffError, match=r"1,000 cells \(1000\) and would take 2,000 pictures; at most 100 cells"):
        grid(numbers("0:1:1000", 0, 1), pictures=2)
    with pytest.raises(TradeOffError, match=r"110 cells \(11 x 10\)"):
        grid(numbers("0:1:11", 0, 1), numbers("0.1:1:10", 0, 1))
    with pytest.raises(TradeOffError, match="would take 500 pictures"):
        grid(numbers("0:1:50", 0, 1), pictures=10)
    assert len(grid(numbers(f"0:1:{MOST_CELLS}", 0, 1))) == MOST_CELLS


def test_a_setting_changes_what_it_says() -> None:
    stack = stack_of(2, gate=Gate(0.5, 0.2, 0.9))
    one = Setting(bias=0.3, lock="global").applied(stack, "<it-1>")
    assert [use.gate for use in one.uses] == [Gate(0.5, 0.2, 0.9), Gate(0.3, 0.2, 0.9)]
    assert [use.lock for use in one.locked("local").uses] == ["local", "global"]
    assert [use.gate.bias for use in Setting(bias=0.3).applied(stack).uses] == [0.3, 0.3]
    with pytest.raises(StackError, match="no concept <cat>"):
        Setting(bias=0.3).applied(stack, "<cat>")


@given(POINTS)
def test_no_point_beats_one_of_the_front(points: list[tuple[float, float]]) -> None:
    front = pareto_front(points)
    assert front
    for k in front:
        x, y = points[k]
        assert not any((a > x and b >= y) or (a >= x and b > y) for a, b in points)
    for first, second in pairwise(front):
        assert points[first][0] <= points[second][0] and points[first][1] >= points[second][1]
    assert knee(points) in front


def test_the_knee_is_where_the_curve_bends() -> None:
    points = [(0.1, 1.0), (0.5, 0.95), (0.8, 0.9), (0.9, 0.5), (1.0, 0.0), (0.3, 0.3)]
    assert knee(points) == 2
    assert knee([(1.0, 0.2), (1.0, 0.4)]) == 1


def test_rules_pick_different_settings() -> None:
    found = trials((0.9, 0.2), (0.7, 0.6), (0.65, 0.68), (0.3, 0.8))
    assert best(found, "harmonic mean") is found[2]
    assert best(found, "most faithful", 0.2) is found[0]
    assert best(found, "most faithful", 0.61) is found[2]
    assert best(found, "knee") in found[1:3]
    assert {*RULES} == {"harmonic mean", "most faithful", "knee"}


@pytest.mark.parametrize(
    ("found", "rule", "message"),
    [
        (trials((0.9, 0.2)), "most faithful", "no setting has a text similarity of 0.5 or more; the highest is 0.200"),
        (trials((0.9, 0.2)), "cheapest", "a rule is one of harmonic mean"),
        ([Trial(Setting(), torch.zeros(1, 2, 2, 3))], "knee", "no scores to pick by: connect clip_vision and photos"),
    ],
)
def test_what_cannot_be_picked(found: list[Trial], rule: Any, message: str) -> None:
    with pytest.raises(TradeOffError, match=message):
        best(found, rule, 0.5)


def test_the_table_shows_what_differs() -> None:
    lines = table(TradeOff(stack_of(1), "", "a <it-0>", tuple(trials((0.9, 0.2), (0.5, 0.1))))).splitlines()
    assert lines[0].split() == ["bias", "image", "text", "harmonic", "front"]
    assert lines[1].split() == ["0", "0.9000", "0.2000", "0.3273", "*"]
    assert lines[2].split() == ["0.1", "0.5000", "0.1000", "0.1667"]
    bare = TradeOff(stack_of(1), "", "", (Trial(Setting(), torch.zeros(1, 2, 2, 3)),))
    assert table(bare).split() == ["bias", "own"]
