"""Which step of a training is the best, and when it has been passed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from perfusion.training import choice
from perfusion.training.scoring import Score

Pictures = tuple[tuple[float, float], ...]


def plain(*values: float, weak: bool = False) -> list[Score]:
    return [Score(step, value, None, None, weak) for step, value in enumerate(values)]


def drawn(*cosines: Sequence[float]) -> list[Score]:
    """Scores of pictures that are as like their photos as their prompts."""
    return [Score.of_pictures(step, tuple((c, c) for c in some)) for step, some in enumerate(cosines)]


def test_without_pictures_the_first_of_the_highest_is_the_best() -> None:
    assert choice.best(plain(0.4, 0.7, 0.7, 0.69)) == choice.highest(plain(0.4, 0.7, 0.7, 0.69)) == 1


def test_of_steps_that_pictures_cannot_tell_apart_the_latest_is_the_best() -> None:
    # The last is lower by .01 in the mean, and its pictures are now better, now worse by .03.
    scores = drawn([0.3, 0.3, 0.3, 0.3], [0.6, 0.5, 0.4, 0.5], [0.57, 0.51, 0.41, 0.47])
    assert choice.highest(scores) == 1
    assert choice.best(scores) == 2


def test_what_all_pictures_say_is_no_matter_of_chance() -> None:
    # Lower by the same .01, in every picture.
    scores = drawn([0.3, 0.3, 0.3, 0.3], [0.6, 0.5, 0.4, 0.5], [0.59, 0.49, 0.39, 0.49])
    assert choice.best(scores) == 1


def test_an_earlier_step_is_never_preferred_to_a_better_later_one() -> None:
    assert choice.best(drawn([0.5, 0.4], [0.4, 0.52])) == 1


@pytest.mark.parametrize(
    ("scores", "passed"),
    [
        (plain(9, 8.9, 8.9), False),
        (plain(9, 8.8, 8.8), True),
        (plain(8.8, 9, 8.8), False),
        (plain(8.8, 8.8), False),
        (plain(9, 4.6, 4.6, weak=True), False),
        (plain(9, 4.4, 4.4, weak=True), True),
        # Below by 3 %: in every picture, and by chance.
        (drawn([0.6, 0.5], [0.582, 0.485], [0.582, 0.485]), True),
        (drawn([0.6, 0.5], [0.667, 0.4], [0.667, 0.4]), False),
    ],
)
def test_it_is_passed_when_the_last_are_all_clearly_below(scores: list[Score], passed: bool) -> None:
    assert choice.has_passed(scores, 2) is passed
    assert not choice.has_passed(scores, 0)


def test_the_error_is_that_of_the_difference() -> None:
    """Of cosines that are equal in both ways the value is their mean, and the jackknife the usual standard error."""
    (a, b) = drawn([0.6, 0.5, 0.4, 0.5], [0.57, 0.51, 0.41, 0.47])
    differences = [0.03, -0.01, -0.01, 0.03]
    mean = sum(differences) / 4
    expected = (sum((one - mean) ** 2 for one in differences) / 3 / 4) ** 0.5
    assert a.error_beside(b) == b.error_beside(a) == pytest.approx(expected)
    assert a.error_beside(a) == 0


@pytest.mark.parametrize("others", [None, ((0.5, 0.5),)])
def test_scores_without_the_same_pictures_have_no_error(others: Pictures | None) -> None:
    (a,) = drawn([0.6, 0.5])
    other = Score(1, 0.5, 0.5, 0.5, weak=False, pictures=others)
    assert a.error_beside(other) == other.error_beside(a) == 0


def test_one_picture_tells_no_error() -> None:
    a, b = drawn([0.6], [0.5])
    assert a.error_beside(b) == 0
    assert choice.best([a, b]) == 0
