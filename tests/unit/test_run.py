"""A whole training as a user has it: watched, stopped, gone on with, and left to choose its best step."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor

from perfusion.concept import Concept, load
from perfusion.training import run as run_module
from perfusion.training import trainer as trainer_module
from perfusion.training.checkpoint import ResumeError
from perfusion.training.run import Checkpoint, Outcome, Run, Update
from perfusion.training.scoring import LossGateScorer, Score
from perfusion.training.trainer import Trainer, TrainingError
from tests.unit.fake_host import FakeHost
from tests.unit.small_training import a_trainer

PROMPTS = ["a <bear> on a hill", "a <bear> and a hat"]


class Stop(Exception):
    pass


class Listed:
    """A scorer that has its values from a list, by step; draws grey pictures."""

    relief = "leave out the encoders"

    def __init__(self, values: dict[int, float] | Callable[[int], float], identity: str = "listed", weak: bool = False):
        self.of: Callable[[int], float] = values.__getitem__ if isinstance(values, dict) else values
        self.identity = identity
        self.weak = weak
        self.judged: list[int] = []

    def __call__(self, trainer: Trainer, concept: Concept, step: int) -> tuple[Score, Tensor | None]:
        assert concept.training["steps_done"] == step
        value = self.of(step)
        self.judged.append(step)
        return Score(step, value, value, value, self.weak), torch.full((2, 8, 8, 3), 0.5)


def rising(step: int) -> float:
    return float(step)


def stop_at(step: int, error: type[BaseException] = Stop) -> Callable[[Update], None]:
    def listen(update: Update) -> None:
        if update.step == step:
            raise error

    return listen


def notes(error: BaseException) -> list[str]:
    return vars(error).get("__notes__", [])


def same(a: Outcome, b: Outcome) -> bool:
    def told(checkpoint: Checkpoint) -> tuple[Any, ...]:
        return checkpoint.step, checkpoint.concept.digest, checkpoint.score, checkpoint.loss

    return (
        a.concept.digest == b.concept.digest
        and a.best_step == b.best_step
        and [told(c) for c in a.checkpoints] == [told(c) for c in b.checkpoints]
        and (a.losses, a.gates, a.stopped_early) == (b.losses, b.gates, b.stopped_early)
    )


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "teddy.state.safetensors"


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Makes every write fail, or work again."""
    flush, full = os.fsync, False

    def write(descriptor: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    def switch(on: bool) -> None:
        nonlocal full
        full = on

    monkeypatch.setattr(os, "fsync", write)
    return switch


# --- a run


def test_stopped_it_is_saved_though_the_model_is_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a second cancel, which a host raises in whatever the model computes next."""
    host, state = FakeHost(), tmp_path / "state.safetensors"

    def listen(update: Update) -> None:
        if update.step == 3:
            monkeypatch.setattr(host, "project_values", stop)
            monkeypatch.setattr(host, "encode", stop)
            raise Stop

    def stop(*_: object) -> None:
        raise Stop

    with pytest.raises(Stop):
        Run(a_trainer(host=host, steps=6), state=state, every=5, listeners=[listen]).run()
    assert Run(a_trainer(steps=6), state=state, every=5).run().resumed_from == 3


def test_a_checkpoint_every_so_many_steps_and_at_the_last(state: Path) -> None:
    trainer = a_trainer(steps=11)
    outcome = Run(trainer, state=state, every=4).run()
    assert [each.step for each in outcome.checkpoints] == [4, 8, 11]
    assert all(each.score is None for each in outcome.checkpoints)
    assert outcome.best_step == 11
    assert (len(outcome.losses), len(outcome.gates)) == (11, 11)
    assert (outcome.stopped_early, outcome.resumed_from) == (False, 0)
    plain = a_trainer(steps=11)
    concept = plain.run()
    assert outcome.concept.digest == concept.digest
    assert tuple(plain.losses) == outcome.losses
    assert outcome.concept.training == {**concept.training, "best_step": 11}
    for number, steps in enumerate((4, 8)):
        assert outcome.checkpoints[number].concept.digest == a_trainer(steps=steps).run().digest


def test_the_best_step_is_the_one_that_comes_back(tmp_path: Path) -> None:
    outcome = Run(a_trainer(steps=20), scorer=Listed({5: 0.4, 10: 0.7, 15: 0.7, 20: 0.6}), every=5).run()
    assert outcome.best_step == 10, "of equal ones the earliest"
    concept = outcome.concept
    assert concept.digest == a_trainer(steps=10).run().digest == outcome.checkpoints[1].concept.digest
    assert (concept.training["steps_done"], concept.training["best_step"]) == (10, 10)
    assert concept.training["score"] == {"value": 0.7, "image": 0.7, "text": 0.7, "weak": False}
    assert concept.training["fixed_loss"] == a_trainer(steps=10).run().training["fixed_loss"]
    path = concept.save(tmp_path / "teddy.safetensors")
    assert load(path).training == concept.training
    assert len(str(concept.training)) < 800


def test_of_steps_that_pictures_cannot_tell_apart_the_latest_comes_back(state: Path) -> None:
    cosines = {2: (0.6, 0.5), 4: (0.64, 0.43), 6: (0.3, 0.3)}

    class Pictured(Listed):
        def __call__(self, trainer: Trainer, concept: Concept, step: int) -> tuple[Score, Tensor | None]:
            return Score.of_pictures(step, tuple((c, c) for c in cosines[step])), None

    first = Run(a_trainer(steps=4), scorer=Pictured({}), state=state, every=2).run()
    assert first.best_step == 4
    more = Run(a_trainer(steps=6), scorer=Pictured({}), state=state, every=2).run()
    assert (more.resumed_from, more.best_step) == (4, 4), "what pictures came to is kept with the state"
    assert same(more, Run(a_trainer(steps=6), scorer=Pictured({}), every=2).run())


@pytest.mark.parametrize(
    ("values", "weak", "patience", "steps"),
    [
        ([5, 9, 8, 8, 8, 9], False, 3, 5),
        ([5, 9, 8, 8, 8, 9], False, 4, 6),
        ([5, 9, 8, 8, 8, 9], False, 0, 6),
        ([9, 8.9, 8.9, 8.9, 8.9, 8.9], False, 2, 6),
        ([9, 8.8, 8.8, 8.8, 8.8, 8.8], False, 2, 3),
        ([9, 4.6, 4.6, 4.6, 4.6, 4.6], True, 2, 6),
        ([9, 4.4, 4.4, 4.4, 4.4, 4.4], True, 2, 3),
        ([9, 8, 9.1, 8, 8.95, 8], False, 2, 6),
        ([0, 0, 0, 0, 0, 0], False, 1, 6),
    ],
)
def test_it_stops_when_the_score_is_clearly_past_its_peak(
    values: Sequence[float], weak: bool, patience: int, steps: int
) -> None:
    """Clearly: by more than 2 %, or half of a weak score, ``patience`` times in a row."""
    scorer = Listed(lambda step: float(values[step - 1]), weak=weak)
    outcome = Run(a_trainer(steps=6), scorer=scorer, every=1, patience=patience).run()
    assert len(outcome.losses) == steps
    assert outcome.stopped_early is (steps < 6)
    assert outcome.best_step == 1 + max(range(steps), key=lambda k: (values[k], -k))


def test_listeners_are_told_everything() -> None:
    updates: list[Update] = []
    trainer = a_trainer(steps=7)
    Run(trainer, scorer=Listed({3: 0.5, 6: 0.4, 7: 0.3}), every=3, listeners=[updates.append]).run()
    assert [update.step for update in updates] == list(range(1, 8))
    assert all(update.steps == 7 and update.warning is None for update in updates)
    assert [update.loss for update in updates] == trainer.losses
    assert [update.gate for update in updates] == trainer.gates
    assert [update.best_step for update in updates] == [None, None, 3, 3, 3, 3, 3]
    scores = {update.step: update.score.value for update in updates if update.score}
    assert scores == {3: 0.5, 6: 0.4, 7: 0.3}
    assert [update.step for update in updates if update.pictures is not None] == [3, 6, 7]


def test_time_left_counts_steps_and_judging() -> None:
    now = 0.0

    def clock() -> float:
        return now

    def pass_by(seconds: float) -> None:
        nonlocal now
        now += seconds

    def judge(step: int) -> float:
        pass_by(10)
        return 1.0

    trainer = a_trainer(steps=10)
    done = trainer.step
    trainer.step = lambda: (pass_by(2), done())[1]
    left: list[float] = []
    listeners = [lambda update: left.append(update.seconds_left), lambda update: pass_by(0)]
    Run(trainer, scorer=Listed(judge), every=4, listeners=listeners, clock=clock).run()
    # Of checkpoints at 4, 8 and 10, how long they take is known once there was one.
    assert left == [18, 16, 14, 12 + 20, 10 + 20, 8 + 20, 6 + 20, 4 + 10, 2 + 10, 0]


def test_judging_changes_nothing_that_is_learned() -> None:
    plain = Run(a_trainer(steps=9), every=2).run()
    judged = Run(a_trainer(steps=9), scorer=LossGateScorer(PROMPTS, samples=4), every=3, patience=0).run()
    assert plain.losses == judged.losses
    assert plain.checkpoints[-1].concept.digest == judged.checkpoints[-1].concept.digest


@pytest.mark.parametrize("wrong", [{"every": 0}, {"patience": -1}, {"patience": 51}])
def test_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="every is .* patience is"):
        Run(a_trainer(), **wrong)


# --- stopped, and gone on with


@pytest.mark.parametrize("estimator", ["robust", "paper"])
@examples(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.sets(st.integers(1, 12), min_size=1, max_size=3))
def test_a_training_that_was_stopped_ends_as_if_it_never_was(estimator: str, stops: set[int], tmp_path: Path) -> None:
    values = {4: 0.3, 8: 0.6, 12: 0.5}
    path = tmp_path / f"{estimator}.safetensors"
    path.unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "REFRESH", 3)

        def run(*listeners: Callable[[Update], None]) -> Run:
            trainer = a_trainer(steps=12, estimator=estimator, vectors=2)
            return Run(trainer, scorer=Listed(values), state=path, every=4, listeners=listeners)

        for step in sorted(stops):
            with pytest.raises(Stop) as stopped:
                run(stop_at(step)).run()
            (note,) = notes(stopped.value)
            assert f"saved at step {step} in {path}" in note
        outcome = run().run()
        assert outcome.resumed_from == max(stops)
        whole = Run(a_trainer(steps=12, estimator=estimator, vectors=2), scorer=Listed(values), every=4).run()
    assert same(outcome, whole)


def test_without_a_state_it_stops_and_says_nothing() -> None:
    run = Run(a_trainer(), every=2, listeners=[stop_at(3)])
    with pytest.raises(Stop) as stopped:
        run.run()
    assert not notes(stopped.value)
    assert run.best is not None and run.best.step == 2, "what there is can be had"


def test_an_interrupt_in_the_middle_of_a_step_loses_that_step_alone(state: Path) -> None:
    host = FakeHost()
    trainer = a_trainer(host=host, steps=8)
    denoise = host.denoise

    def interrupted(*args: Any) -> Tensor:
        if trainer.steps_done == 5:
            raise KeyboardInterrupt
        return denoise(*args)

    vars(host)["denoise"] = interrupted
    with pytest.raises(KeyboardInterrupt) as stopped:
        Run(trainer, state=state, every=4).run()
    assert "saved at step 5" in notes(stopped.value)[0]
    outcome = Run(a_trainer(steps=8), state=state, every=4).run()
    assert outcome.resumed_from == 5
    assert same(outcome, Run(a_trainer(steps=8), every=4).run())


def test_a_process_that_was_killed_goes_on_from_the_last_checkpoint(state: Path) -> None:
    """What lies in the file after a checkpoint is enough; nobody had time to save."""
    kept = b""

    def keep(update: Update) -> None:
        nonlocal kept
        if update.step == 6:
            kept = state.read_bytes()

    whole = Run(a_trainer(steps=8), state=state, every=4, listeners=[keep]).run()
    state.write_bytes(kept)
    outcome = Run(a_trainer(steps=8), state=state, every=4).run()
    assert outcome.resumed_from == 4
    assert same(outcome, whole)


def test_stopped_while_it_is_judged_a_checkpoint_is_made_up_for(state: Path) -> None:
    def stop(step: int) -> float:
        raise Stop

    with pytest.raises(Stop) as stopped:
        Run(a_trainer(steps=6), scorer=Listed(stop), state=state, every=3).run()
    assert "saved at step 3" in notes(stopped.value)[0]
    outcome = Run(a_trainer(steps=6), scorer=Listed(rising), state=state, every=3).run()
    assert [each.step for each in outcome.checkpoints] == [3, 6]
    assert same(outcome, Run(a_trainer(steps=6), scorer=Listed(rising), every=3).run())


def test_a_finished_training_is_not_done_again(state: Path) -> None:
    host = FakeHost()
    values = {3: 0.7, 6: 0.5}
    first = Run(a_trainer(steps=6), scorer=Listed(values), state=state, every=3).run()
    trainer, scorer = a_trainer(host=host, steps=6), Listed(values)
    calls = host.calls
    again = Run(trainer, scorer=scorer, state=state, every=3).run()
    assert (host.calls, scorer.judged) == (calls, [])
    assert again.resumed_from == 6
    assert same(again, first)
    assert again.concept.training == first.concept.training


def test_more_steps_go_on_where_it_ended(state: Path) -> None:
    Run(a_trainer(steps=6), scorer=Listed(rising), state=state, every=3).run()
    more = Run(a_trainer(steps=9), scorer=Listed(rising), state=state, every=3).run()
    assert same(more, Run(a_trainer(steps=9), scorer=Listed(rising), every=3).run())
    assert [each.concept.training["steps"] for each in more.checkpoints] == [6, 6, 9]
    with pytest.raises(ResumeError, match="9 steps already, and steps is 8"):
        Run(a_trainer(steps=8), state=state, every=3).run()


def test_a_training_that_stopped_early_stays_so(state: Path) -> None:
    values = {1: 0.9, 2: 0.1, 3: 0.1}
    first = Run(a_trainer(steps=9), scorer=Listed(values), state=state, every=1, patience=2).run()
    again = Run(a_trainer(steps=9), scorer=Listed(values), state=state, every=1, patience=2).run()
    assert first.stopped_early and same(again, first)
    on = Run(a_trainer(steps=9), scorer=Listed(lambda step: 0.2), state=state, every=1, patience=0).run()
    assert not on.stopped_early and on.best_step == 1


def test_scores_of_another_scorer_are_made_anew(state: Path) -> None:
    with pytest.raises(Stop):
        Run(a_trainer(steps=6), scorer=Listed(rising), state=state, every=2, listeners=[stop_at(5)]).run()
    other = Listed(lambda step: -float(step), "another")
    outcome = Run(a_trainer(steps=6), scorer=other, state=state, every=2).run()
    assert other.judged == [2, 4, 6]
    assert outcome.best_step == 2
    unjudged = Run(a_trainer(steps=8), state=state, every=2).run()
    assert all(each.score is None for each in unjudged.checkpoints)
    assert unjudged.best_step == 8


def test_another_training_is_refused_and_its_file_stays(state: Path) -> None:
    Run(a_trainer(steps=2), state=state).run()
    before = state.read_bytes()
    with pytest.raises(ResumeError, match="learned with value_rate 0.1, now 0.2"):
        Run(a_trainer(steps=4, value_rate=0.2), state=state).run()
    assert state.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoints": [{"step": 2}]},
        {"checkpoints": [{"step": 3, "loss": 1.0, "score": None}]},
        {"checkpoints": [{"step": 2, "loss": "much", "score": None}]},
        {"checkpoints": [{"step": 2, "loss": 1.0, "score": {"value": 1.0}}]},
        {"checkpoints": 5},
        {"before": "little"},
        {"concept.2": torch.zeros(40, dtype=torch.uint8)},
        {"concept.2": "none"},
    ],
)
def test_checkpoints_that_cannot_be_read_are_refused(state: Path, change: dict[str, Any]) -> None:
    from perfusion.training.checkpoint import restore, save

    Run(a_trainer(steps=2), state=state).run()
    trainer = a_trainer(steps=2)
    extra = restore(state, trainer)
    save(state, trainer, extra | change)
    with pytest.raises(ResumeError, match=r"checkpoints in teddy\.state\.safetensors cannot be read"):
        Run(a_trainer(steps=4), state=state).run()


def test_of_very_many_checkpoints_some_make_way(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "KEPT", 6)
    scorer = Listed(lambda step: 1.0 if step == 7 else 0.99)
    outcome = Run(a_trainer(steps=20), scorer=scorer, state=state, every=1, patience=3).run()
    steps = [each.step for each in outcome.checkpoints]
    assert len(steps) == 6
    assert steps[0] == 1 and 7 in steps and steps[-3:] == [18, 19, 20]
    assert outcome.best_step == 7
    again = Run(a_trainer(steps=20), scorer=scorer, state=state, every=1, patience=3).run()
    assert same(again, outcome)


# --- what goes wrong


def test_a_full_disk_stops_nothing(
    state: Path, full_disk: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    updates: list[Update] = []

    def listen(update: Update) -> None:
        updates.append(update)
        full_disk(update.step < 6)

    full_disk(True)
    with caplog.at_level(logging.WARNING):
        outcome = Run(a_trainer(steps=8), state=state, every=2, listeners=[listen]).run()
    assert outcome.best_step == 8
    warnings = {update.step: update.warning for update in updates if update.warning}
    assert list(warnings) == [2, 4, 6]
    assert "step 2 could not be saved (No space left on device)" in str(warnings[2])
    assert [record.levelname for record in caplog.records] == ["WARNING"], "said once"
    assert list(state.parent.iterdir()) == [state]
    assert Run(a_trainer(steps=8), state=state, every=2).run().resumed_from == 8


def test_a_full_disk_does_not_hide_that_the_user_stopped_it(state: Path, full_disk: Callable[[bool], None]) -> None:
    full_disk(True)
    with pytest.raises(Stop) as stopped:
        Run(a_trainer(steps=8), state=state, listeners=[stop_at(3)]).run()
    (note,) = notes(stopped.value)
    assert "step 3 could not be saved" in note and "No space left" in note


def test_a_loss_that_is_no_number_keeps_the_best_step(state: Path) -> None:
    host = FakeHost()

    def poison(update: Update) -> None:
        host.poison = update.step == 5

    run = Run(a_trainer(host=host, steps=9), scorer=Listed({2: 0.9, 4: 0.5}), state=state, every=2, listeners=[poison])
    with pytest.raises(
        TrainingError, match=r"loss of step 6 .* Lower value_rate \(now 0\.1\), .* step 2 is kept"
    ) as failed:
        run.run()
    outcome = failed.value.outcome
    assert outcome is not None
    assert (outcome.best_step, len(outcome.checkpoints), len(outcome.losses)) == (2, 2, 5)
    assert outcome.concept.digest == a_trainer(steps=2).run().digest
    assert Run(a_trainer(steps=9), scorer=Listed(rising), state=state, every=2).run().resumed_from == 4


def test_nothing_to_keep_is_said_too() -> None:
    host = FakeHost()
    trainer = a_trainer(host=host)
    run = Run(trainer, every=5, listeners=[lambda update: setattr(host, "poison", True)])
    with pytest.raises(TrainingError, match="Nothing is kept") as failed:
        run.run()
    assert failed.value.outcome is None


@pytest.mark.parametrize(("losses", "stops"), [([1.0] * 21 + [8.0] * 20, 30), ([1.0] * 21 + [3.9] * 60, None)])
def test_a_mean_loss_that_explodes_stops_it(losses: list[float], stops: int | None) -> None:
    """At four times the smallest mean of 20 steps: (20 - n) * 1 + n * 8 > 4 * 20 from the ninth on."""
    trainer = a_trainer(steps=len(losses), batch_size=16, value_rate=0.0, embedding_rate=0.0, key_rate=0.0)
    done = trainer._step

    def step() -> Any:
        report = done()
        trainer.losses[-1] = losses[trainer.steps_done - 1]
        return report

    trainer._step = step
    run = Run(trainer, every=10)
    if stops is None:
        assert len(run.run().losses) == len(losses)
        return
    with pytest.raises(TrainingError, match=r"explodes: .* Lower value_rate \(now 0\) .* step 20 is kept") as failed:
        run.run()
    assert len(trainer.losses) == stops
    assert failed.value.outcome is not None and failed.value.outcome.best_step == 20


def test_small_batches_vary_more_and_are_given_more_steps() -> None:
    assert [Run(a_trainer(batch_size=size))._window for size in (1, 2, 8, 16, 256)] == [160, 80, 20, 20, 20]


def test_a_rate_far_too_high_explodes_and_keeps_the_last_good_step() -> None:
    trainer = a_trainer(steps=200, value_rate=10.0, embedding_rate=10.0, scope="prompt")
    lower = r"Lower value_rate \(now 10\), embedding_rate \(now 10\) and key_rate \(now 0\.02\)\."
    with pytest.raises(TrainingError, match=lower) as failed:
        Run(trainer, every=5).run()
    outcome = failed.value.outcome
    assert outcome is not None
    before, then = outcome.concept.training["fixed_loss"]
    assert then <= 2 * before


def test_a_concept_that_no_file_can_hold_explodes_too() -> None:
    trainer = a_trainer(steps=4)

    def overflow(update: Update) -> None:
        with torch.no_grad():
            next(iter(trainer.o_star_v.values())).fill_(1e6 if update.step == 3 else 0.1)

    with pytest.raises(TrainingError, match=r"explodes: after step 4 .* step 2 is kept"):
        Run(trainer, every=2, listeners=[overflow]).run()


def test_a_rate_of_nothing_learns_nothing_and_ends_well() -> None:
    trainer = a_trainer(steps=8, value_rate=0.0, embedding_rate=0.0, key_rate=0.0)
    outcome = Run(trainer, scorer=LossGateScorer(PROMPTS, samples=4), every=2, patience=1).run()
    assert not outcome.stopped_early
    assert outcome.best_step == 2
    assert len({each.loss for each in outcome.checkpoints}) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("MPS backend out of memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_nothing_is_lost_and_it_is_said_what_to_lower(state: Path, error: BaseException) -> None:
    host = FakeHost()
    trainer = a_trainer(host=host, steps=8, micro_batch=2)
    denoise = host.denoise

    def hungry(noisy: Tensor, *rest: Any) -> Tensor:
        if trainer.steps_done == 5 and torch.is_grad_enabled():
            raise error
        return denoise(noisy, *rest)

    vars(host)["denoise"] = hungry
    with pytest.raises(TrainingError) as failed:
        Run(trainer, state=state, every=2).run()
    told = str(failed.value)
    for part in (
        "memory ran out in the step after step 5.",
        "Switch on gradient_checkpointing, or lower micro_batch (now 2 at once), or lower resolution (now 64)",
        f"saved at step 5 in {state}",
    ):
        assert part in told
    assert failed.value.outcome is not None and failed.value.outcome.best_step == 4
    outcome = Run(a_trainer(steps=8, micro_batch=1), state=state, every=2).run()
    assert outcome.resumed_from == 5
    expected = Run(a_trainer(steps=8, micro_batch=2), every=2).run()
    assert outcome.losses == pytest.approx(expected.losses, rel=1e-3)


def test_out_of_memory_while_it_is_judged() -> None:
    def hungry(step: int) -> float:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    told = r"while the concept was judged after step 2\. Leave out the encoders, or lower resolution \(now 64\)"
    with pytest.raises(TrainingError, match=told):
        Run(a_trainer(), scorer=Listed(hungry), every=2).run()


def test_other_errors_are_what_they_were(state: Path) -> None:
    def broken(step: int) -> float:
        raise RuntimeError("the encoder is broken")

    with pytest.raises(RuntimeError, match="the encoder is broken") as failed:
        Run(a_trainer(), scorer=Listed(broken), state=state, every=2).run()
    assert "saved at step 2" in notes(failed.value)[0]
