"""A training that a person can watch, stop, go on with, and leave alone: it keeps its best step.

Every so many steps a checkpoint is taken: the concept as it is then, its score, and the state of the training in a file
from which it goes on exactly. ``Run`` knows no user interface: it tells its listeners, which may raise to stop it.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor

from ..concept import Concept, ConceptFileError, from_bytes
from . import checkpoint as state_file
from . import choice
from .checkpoint import ResumeError
from .config import TrainingConfig
from .scoring import Score, Scorer
from .trainer import Trainer, TrainingError, with_summary

logger = logging.getLogger(__name__)

# A training has exploded when the mean loss of a window is this many times the smallest one so far, and above the
# first. Losses vary with noise level and photo; where they spread by as much as their mean, the mean of 160 samples
# spreads by 1 / sqrt(160) = 8 % of it.
EXPLODED = 4.0
WINDOW_STEPS, WINDOW_SAMPLES = 20, 160
# Or when a checkpoint's loss on fixed noise is this many times that before training. The noise is the same, so that
# nothing is left to chance: no training that works doubles the loss on its own photos.
WORSE = 2.0
MOST_PATIENCE = 50
KEPT = 64  # checkpoints; of more, those nearest to their neighbors make way
_TIMED = 20


@dataclass(frozen=True)
class Checkpoint:
    """A concept as it was after ``step`` steps, its score, and its loss on fixed noise."""

    step: int
    concept: Concept
    score: Score | None
    loss: float


@dataclass(frozen=True)
class Update:
    """What listeners are told after each step. ``gate`` is how open the gate is on the concept's word, 0 to 1.

    ``seconds_left`` counts scoring too. ``score`` and ``pictures`` (n, height, width, 3) in 0..1 are there where they
    were just made; ``best_step`` is the best so far. ``warning`` is for the user, once for what it is about.
    """

    step: int
    steps: int
    loss: float
    gate: float
    seconds_left: float
    score: Score | None
    best_step: int | None
    pictures: Tensor | None
    warning: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What a training came to: the ``concept`` of its ``best_step``, and all ``checkpoints``, by step.

    ``losses`` and ``gates`` are those of every step, also before an interruption. ``resumed_from`` is the step at which
    it went on, 0 for one that began anew.
    """

    concept: Concept
    best_step: int
    checkpoints: Sequence[Checkpoint]
    losses: Sequence[float]
    gates: Sequence[float]
    stopped_early: bool
    resumed_from: int


class Listener(Protocol):
    """Called after each step; may raise to stop the training, which is then saved at that step."""

    def __call__(self, update: Update, /) -> None: ...


class Run:
    """Runs a trainer up to its number of steps, inside ``host.training()``.

    A checkpoint is taken ``every`` so many steps and at the last; the best is returned. With a ``scorer`` it is the one
    of the highest score, or the latest that is as good (``choice``), and training stops when ``patience`` checkpoints
    in a row are clearly below the highest score (0: never). Without one it is the last.

    ``state`` is a file from which the training goes on if it is there, and in which it is kept: at each checkpoint, and
    when it is stopped.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        scorer: Scorer | None = None,
        state: Path | None = None,
        every: int = 25,
        patience: int = choice.PATIENCE,
        listeners: Sequence[Listener] = (),
        clock: Callable[[], float] = time.monotonic,
    ):
        if every < 1 or not 0 <= patience <= MOST_PATIENCE:
            raise ValueError(f"every is {every}, at least 1; patience is {patience}, from 0 to {MOST_PATIENCE}")
        self.trainer = trainer
        self.checkpoints: list[Checkpoint] = []
        self._scorer, self._state, self._every, self._patience = scorer, state, every, patience
        self._listeners = tuple(listeners)
        self._before: float | None = None
        self._resumed_from = 0
        self._saved_at: int | None = None
        self._settings: dict[str, Any] | None = None
        self._warning: str | None = None
        self._warned = False
        self._judging = False
        self._pace = _Pace(clock)
        self._window = max(WINDOW_STEPS, math.ceil(WINDOW_SAMPLES / trainer.config.batch_size))
        self._calmest = math.inf

    def run(self) -> Outcome:
        """Train, or go on, to the end.

        Raises ResumeError when the state belongs to another training or is damaged; TrainingError when the loss
        explodes or memory runs out, with an ``outcome`` where there is a good checkpoint; and whatever a listener
        raises, once the training is saved.
        """
        known = self._resume()
        if self._state is not None:
            self._settings = state_file.settings(self.trainer)
        with self._keeping_what_was_learned():
            self._begin(known)
            while self.trainer.steps_done < self.trainer.config.steps and not self._has_passed:
                self._advance()
        outcome = self._outcome()
        first, last = outcome.concept.training["fixed_loss"]
        logger.info(
            "%s: best at step %d of %d, loss on fixed noise %.5f before, %.5f then",
            outcome.concept.placeholder, outcome.best_step, self.trainer.steps_done, first, last,
        )  # fmt: skip
        return outcome

    @property
    def best(self) -> Checkpoint | None:
        """The best checkpoint so far (``choice.best``), the last where they have no scores."""
        scores = self._scores
        if scores:
            return self.checkpoints[choice.best(scores)]
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def _has_passed(self) -> bool:
        """Whether it has clearly passed its best, as far as it is judged."""
        return self._scorer is not None and choice.has_passed(self._scores, self._patience)

    @property
    def _scores(self) -> list[Score]:
        """The scores of all checkpoints; none where one of them has none."""
        scores = [each.score for each in self.checkpoints if each.score is not None]
        return scores if len(scores) == len(self.checkpoints) else []

    # --- steps

    def _begin(self, known: str | None) -> None:
        """Whatever a resumed training has still to make up for. ``known`` is the scorer of the scores it brought."""
        if self._before is None:
            self._before = self.trainer.fixed_loss()
        if self.checkpoints and known != self._scorer_identity:
            self._score_anew()
        step = self.trainer.steps_done
        if step and self._due(step) and (not self.checkpoints or self.checkpoints[-1].step < step):
            self._take()

    def _advance(self) -> None:
        trainer, config = self.trainer, self.trainer.config
        with self._pace.of_step():
            report = trainer.step()
        self._require_calm()
        score, pictures = self._take() if self._due(report.step) else (None, None)
        left = self._pace.seconds(config.steps - report.step, self._checkpoints_left(report.step))
        warning, self._warning = self._warning, None
        best = self.best
        best_step = best.step if best else None
        update = Update(report.step, report.steps, report.loss, report.gate, left, score, best_step, pictures, warning)
        for listener in self._listeners:
            listener(update)

    def _due(self, step: int) -> bool:
        return step % self._every == 0 or step == self.trainer.config.steps

    def _checkpoints_left(self, step: int) -> int:
        steps = self.trainer.config.steps
        return steps // self._every - step // self._every + (steps % self._every > 0 and step < steps)

    def _require_calm(self) -> None:
        """Raise TrainingError when the mean loss has exploded."""
        losses = self.trainer.losses
        if len(losses) < self._window:
            return
        mean = fmean(losses[-self._window :])
        self._calmest = min(self._calmest, mean)
        if mean > EXPLODED * self._calmest and mean > fmean(losses[: self._window]):
            raise TrainingError(
                f"the training explodes: the loss of the last {self._window} steps is {mean:.3g}, it was "
                f"{self._calmest:.3g} before. Lower {self.trainer.config.rates_now}."
            )

    # --- checkpoints

    def _take(self) -> tuple[Score | None, Tensor | None]:
        """A checkpoint of this step, scored and saved."""
        step = self.trainer.steps_done
        with self._pace.of_checkpoint():
            concept, loss = self._concept()
            score, pictures = self._judged(concept, step)
            self.checkpoints.append(Checkpoint(step, concept, score, loss))
            self._thin_out()
            try:
                self._save()
            except OSError as error:
                self._warning = (
                    f"the training of step {step} could not be saved ({error.strerror or error}). It goes on; make "
                    "room on the disk before you stop it."
                )
                if not self._warned:
                    logger.warning("%s", self._warning)
                self._warned = True
        return score, pictures

    def _concept(self) -> tuple[Concept, float]:
        """The concept of this step and its loss on fixed noise. Raises TrainingError for one not worth having."""
        before = self._before or 0.0
        try:
            concept, loss = self.trainer.take()
        except ConceptFileError:
            concept, loss = None, math.nan
        if concept is None or not loss <= WORSE * before:
            raise TrainingError(
                f"the training explodes: after step {self.trainer.steps_done} the loss on fixed noise is {loss:.3g}, "
                f"it was {before:.3g} before training. Lower {self.trainer.config.rates_now}."
            )
        return concept, loss

    def _thin_out(self) -> None:
        """Drop checkpoints beyond those that are kept: never the first, the best, that of the highest score, or those
        that patience looks at.
        """
        kept = self.checkpoints
        while len(kept) > KEPT:
            scores = self._scores
            wanted = {choice.best(scores), choice.highest(scores)} if scores else set()
            inner = [k for k in range(1, len(kept) - max(1, self._patience)) if k not in wanted]
            del kept[min(inner, key=lambda k: kept[k + 1].step - kept[k - 1].step)]

    def _score_anew(self) -> None:
        """Scores of another scorer say nothing beside those to come."""
        self.checkpoints = [replace(each, score=self._judged(each.concept, each.step)[0]) for each in self.checkpoints]

    def _judged(self, concept: Concept, step: int) -> tuple[Score | None, Tensor | None]:
        if self._scorer is None:
            return None, None
        self._judging = True
        judged = self._scorer(self.trainer, concept, step)
        self._judging = False
        return judged

    @property
    def _scorer_identity(self) -> str | None:
        return self._scorer.identity if self._scorer else None

    def _outcome(self) -> Outcome:
        best = self.best
        if best is None:
            raise TrainingError("nothing was learned yet")
        summary: dict[str, Any] = {
            "fixed_loss": [round(self._before or 0.0, 6), round(best.loss, 6)],
            "best_step": best.step,
        }
        if best.score is not None:
            numbers = {name: getattr(best.score, name) for name in ("value", "image", "text")}
            known = {name: round(number, 5) for name, number in numbers.items() if number is not None}
            summary["score"] = known | {"weak": best.score.weak}
        trainer = self.trainer
        return Outcome(
            concept=with_summary(best.concept, summary),
            best_step=best.step,
            checkpoints=tuple(self.checkpoints),
            losses=tuple(trainer.losses),
            gates=tuple(trainer.gates),
            stopped_early=trainer.steps_done < trainer.config.steps,
            resumed_from=self._resumed_from,
        )

    # --- what can go wrong

    @contextmanager
    def _keeping_what_was_learned(self) -> Iterator[None]:
        """Nothing is lost, whatever is raised: the state is saved, or the good checkpoints go along."""
        try:
            yield
        except TrainingError as error:
            # The state is as good as it ever was, and would only explode again: the last saved one stays.
            raise self._with_outcome(f"{error} {self._what_is_kept}") from error
        except BaseException as error:
            out_of_memory = _is_out_of_memory(error)
            where = self._saved_for_later(out_of_memory)
            if out_of_memory:
                relief = self._scorer.relief if self._scorer and self._judging else None
                advice = _less_memory(self.trainer.config, self._judging, relief)
                doing = "while the concept was judged after" if self._judging else "in the step after"
                message = f"memory ran out {doing} step {self.trainer.steps_done}. {advice} {where}"
                raise self._with_outcome(message.rstrip()) from error
            if where:
                logger.info("%s", where)
                vars(error).setdefault("__notes__", []).append(where)  # as add_note does since Python 3.11
            raise

    def _with_outcome(self, message: str) -> TrainingError:
        error = TrainingError(message)
        error.outcome = self._outcome() if self.checkpoints else None
        return error

    @property
    def _what_is_kept(self) -> str:
        best = self.best
        if best is None:
            return "Nothing is kept: it went wrong before the first checkpoint."
        return f"The concept of step {best.step} is kept."

    # --- the state

    def _saved_for_later(self, out_of_memory: bool) -> str:
        """Save the state where that was not done at this step, and say where it is; nothing without a state."""
        step = self.trainer.steps_done
        if self._state is None or not step:
            return ""
        if self._saved_at != step or out_of_memory:
            try:
                self._save(out_of_memory)
            except Exception as error:
                # What stopped the training is what its user has to hear of.
                return f"The training of step {step} could not be saved in {self._state}: {error}"
        return f"The training is saved at step {step} in {self._state}: start it again to go on."

    def _save(self, out_of_memory: bool = False) -> None:
        if self._state is None:
            return
        extra: dict[str, Any] = {"before": self._before, "scorer": self._scorer_identity, "checkpoints": []}
        for each in self.checkpoints:
            score = None if each.score is None else asdict(each.score)
            extra["checkpoints"].append({"step": each.step, "loss": each.loss, "score": score})
            extra[f"concept.{each.step}"] = torch.frombuffer(bytearray(each.concept.to_bytes()), dtype=torch.uint8)
        state_file.save(self._state, self.trainer, extra, known=self._settings, out_of_memory=out_of_memory)
        self._saved_at = self.trainer.steps_done

    def _resume(self) -> str | None:
        """Go to where the state file is, if there is one. Returns which scorer made the scores it brings."""
        if self._state is None or not self._state.exists():
            return None
        trainer = self.trainer
        extra = state_file.restore(self._state, trainer)
        try:
            self._before = None if extra["before"] is None else float(extra["before"])
            self.checkpoints = [_restored(entry, extra) for entry in extra["checkpoints"]]
            known = extra["scorer"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ResumeError(
                f"the checkpoints in {self._state.name} cannot be read ({error}). Move it away to begin the training "
                "anew."
            ) from None
        self._resumed_from = self._saved_at = trainer.steps_done
        losses, length = trainer.losses, self._window
        means = [fmean(losses[start : start + length]) for start in range(len(losses) - length + 1)]
        self._calmest = min(means, default=math.inf)
        logger.info("%s: goes on from step %d", trainer.subject.placeholder, trainer.steps_done)
        return known


class _Pace:
    """How long steps and checkpoints take, by the last of each."""

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._steps: deque[float] = deque(maxlen=_TIMED)
        self._checkpoints: deque[float] = deque(maxlen=_TIMED)

    @contextmanager
    def _timed(self, times: deque[float]) -> Iterator[None]:
        started = self._clock()
        yield
        times.append(self._clock() - started)

    def of_step(self) -> AbstractContextManager[None]:
        return self._timed(self._steps)

    def of_checkpoint(self) -> AbstractContextManager[None]:
        return self._timed(self._checkpoints)

    def seconds(self, steps: int, checkpoints: int) -> float:
        """What is left of so many of each."""
        left = steps * fmean(self._steps)
        return left + checkpoints * fmean(self._checkpoints) if self._checkpoints else left


def _restored(entry: dict[str, Any], extra: dict[str, Any]) -> Checkpoint:
    """A checkpoint of a state file. Raises KeyError, TypeError or ValueError for what is none."""
    step, score = int(entry["step"]), entry["score"]
    concept = from_bytes(extra[f"concept.{step}"].numpy().tobytes(), f"the concept of step {step}")
    if score is not None:
        image, text = (None if score[name] is None else float(score[name]) for name in ("image", "text"))
        pictures = score.get("pictures")
        if pictures is not None:
            pictures = tuple((float(image), float(text)) for image, text in pictures)
        score = Score(step, float(score["value"]), image, text, bool(score["weak"]), pictures)
    return Checkpoint(step, concept, score, float(entry["loss"]))


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    # CPUs and Apple's GPUs have no exception of their own for it.
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("out of memory", "DefaultCPUAllocator", "not enough memory")
    )


def _less_memory(config: TrainingConfig, judging: bool, relief: str | None) -> str:
    """What to change when memory runs out: first what lets the training go on from where it is."""
    at_once = config.micro_batch or config.batch_size
    ways = [relief] if relief else []
    if not judging and not config.gradient_checkpointing:
        ways.append("switch on gradient_checkpointing")
    if not judging and at_once > 1:
        ways.append(f"lower micro_batch (now {at_once} at once)")
    ways.append(f"lower resolution (now {config.resolution}), which begins the training anew")
    advice = ", or ".join(ways)
    return f"{advice[0].upper()}{advice[1:]}."
