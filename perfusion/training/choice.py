"""Which step of a training is the best, and whether it has passed it, by the scores of its steps.

A few pictures tell steps apart only so far: what lies within one standard error of the highest score is as good, and of
those the latest is chosen (the one-standard-error rule of Breiman et al., Classification and Regression Trees, 1984).
Of steps that obey prompts equally the later one knows its thing better.
"""

from __future__ import annotations

from collections.abc import Sequence

from .scoring import Score

# A score is clearly below the highest when it is so by more than this share. Weak scores are small differences of
# losses, which jump from step to step.
MARGIN, WEAK_MARGIN = 0.02, 0.5
PATIENCE = 4


def highest(scores: Sequence[Score]) -> int:
    """The place of the highest score, of equal ones the first. Raises ValueError when there are none."""
    return max(range(len(scores)), key=lambda place: scores[place].value)


def best(scores: Sequence[Score]) -> int:
    """The place of the latest score that is as good as the highest. Raises ValueError when there are none.

    Of scores without pictures nothing is known of their error, and the highest is the best.
    """
    peak = highest(scores)
    latest_first = reversed(range(len(scores)))
    return next(place for place in latest_first if place == peak or _is_as_good(scores[place], scores[peak]))


def has_passed(scores: Sequence[Score], patience: int = PATIENCE) -> bool:
    """Whether the last ``patience`` scores are all clearly below the highest; with a patience of 0 never."""
    if not 0 < patience < len(scores):
        return False
    peak = scores[highest(scores)]
    margin = WEAK_MARGIN if peak.weak else MARGIN
    return all(score.value < (1 - margin) * peak.value and not _is_as_good(score, peak) for score in scores[-patience:])


def _is_as_good(score: Score, peak: Score) -> bool:
    return score.pictures is not None and peak.value - score.value <= peak.error_beside(score)
