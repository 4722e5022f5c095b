"""Learning one concept of a job: photos in, a concept file out, the same call again goes on where it stopped."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..concept import file_stem
from ..concept import load as load_concept
from ..corpus import load_captions, paper_templates
from ..files import write_bytes_atomically
from ..hosts.base import Host
from ..statistics import cached, captions_for
from ..training.checkpoint import own_file
from ..training.companions import learned_from
from ..training.config import BEFORE
from ..training.dataset import Photos
from ..training.folder import PhotoSet, involved_files, read_folder
from ..training.masks import attention_masks
from ..training.run import Outcome, Run
from ..training.scoring import LossGateScorer, validation_prompts
from ..training.trainer import Subject, Trainer, TrainingError, require_words
from . import models
from .console import following, progress, say
from .options import Job

_RECORD_FORMAT = 1
_LARGEST_RECORD = 1 << 16
_MOST_FILES = 1000  # of a model's folder


@dataclass(frozen=True)
class Result:
    """What came of a job. ``score`` is weak: made without looking at pictures. ``error`` is empty where all went well.

    ``seconds`` are those of this call, with loading. ``was_done``: an earlier call had finished it.
    """

    name: str
    placeholder: str
    file: str = ""
    best_step: int | None = None
    steps: int = 0
    score: float | None = None
    seconds: float = 0.0
    resumed_from: int = 0
    stopped_early: bool = False
    was_done: bool = False
    error: str = ""

    def line(self) -> str:
        """One line of JSON."""
        return json.dumps({**asdict(self), "seconds": round(self.seconds, 2)})


def finished(job: Job) -> Result | None:
    """What an earlier call made of the very same job: same settings, photos and model, and its file is there."""
    try:
        digest = _digest(job)
        with _record_of(job, digest).open("rb") as file:
            record = json.loads(file.read(_LARGEST_RECORD))
        if record["job"] != digest:
            return None
        path = job.out / f"{file_stem(record['file'])}.safetensors"
        if load_concept(path).digest != record["concept"]:
            return None
        return Result(
            name=job.name,
            placeholder=job.placeholder,
            file=str(path),
            best_step=int(record["best_step"]),
            steps=int(record["steps"]),
            score=None if record["score"] is None else float(record["score"]),
            stopped_early=record["stopped_early"] is True,
            was_done=True,
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # it is done again, which changes nothing


def train(job: Job) -> Result:
    """Learn a concept, or go on with it, and save it; what is finished stays as it is.

    Raises ValueError or OSError, saying what to do, for photos, captions or a model at fault and for a training that
    fails; KeyboardInterrupt, with a note on where it is kept, when it is stopped.
    """
    started = time.monotonic()
    digest = _digest(job)  # photos may change meanwhile
    known = finished(job)
    if known is not None:
        say(f"{job.name}: finished already, in {known.file}")
        return replace(known, seconds=time.monotonic() - started)
    with progress("photos") as report:
        folder = read_folder(job.images, report)
    for note in folder.notes:
        say(f"{job.name}: {note}")
    host = models.load(job)
    subject = _subject(job, folder)
    require_words(host, subject)
    photos, subject = _photos(job, host, folder, subject)
    corpus = captions_for(host, job.corpus, job.corpus_size)
    with progress("measuring the text encoder") as report:
        statistics = cached(host, corpus, job.out / "statistics", report)
    config = job.config
    with host.training(gradient_checkpointing=config.gradient_checkpointing):
        trainer = Trainer(host, photos, subject, statistics, config)
        with following(job.name, config.steps, lambda: trainer.steps_done) as listener:
            run = Run(
                trainer,
                scorer=LossGateScorer(validation_prompts(host, subject)),
                state=own_file(_kept_in(job), job.name, trainer),
                every=job.every,
                patience=job.patience,
                listeners=[listener],
            )
            outcome = _outcome(job, run)
        best = next(each for each in outcome.checkpoints if each.step == outcome.best_step)
        path = outcome.concept.save_numbered(job.out, job.name)
    result = Result(
        name=job.name,
        placeholder=job.placeholder,
        file=str(path),
        best_step=outcome.best_step,
        steps=len(outcome.losses),
        score=None if best.score is None else best.score.value,
        seconds=time.monotonic() - started,
        resumed_from=outcome.resumed_from,
        stopped_early=outcome.stopped_early,
    )
    _keep_record(job, digest, result, outcome.concept.digest)
    say(f"{job.name}: {_told(result)}")
    return result


def _told(result: Result) -> str:
    early = ", stopped early since the score had clearly passed its best" if result.stopped_early else ""
    since = f", gone on from step {result.resumed_from}" if result.resumed_from else ""
    return (
        f"the concept of step {result.best_step}, the best of {result.steps} by loss and gate{since}{early}, is in "
        f"{result.file}"
    )


def _outcome(job: Job, run: Run) -> Outcome:
    """Run a run. What a failing training had learned by then is saved beside where its concept would be."""
    try:
        return run.run()
    except TrainingError as error:
        if error.outcome is None:
            raise
        try:
            path = error.outcome.concept.save_numbered(job.out, f"{job.name}-step-{error.outcome.best_step}")
        except OSError as problem:
            raise TrainingError(f"{error} It could not be saved: {problem}") from error
        raise TrainingError(f"{error} It is saved as {path}.") from error


def _subject(job: Job, folder: PhotoSet) -> Subject:
    texts = ["\n".join(captions) for captions in folder.captions]
    captions = paper_templates() if job.captions is None else load_captions(job.captions)
    return Subject(job.placeholder, job.super_category, captions, texts if any(texts) else None)


def _photos(job: Job, host: Host, folder: PhotoSet, subject: Subject) -> tuple[Photos, Subject]:
    """What is learned from, and the subject with captions of all of it."""
    masks = None
    if job.masks:
        with progress("masks") as report:
            made = attention_masks(host, folder.images, job.super_category, job.config.resolution, folder.masks, report)
        for note in made.notes:
            say(f"{job.name}: {note}")
        masks = made.masks
    with progress("photos and other things") as report:
        return learned_from(host, folder.images, masks, subject, job.config, report, buckets=job.aspect_buckets)


# --- what was finished before


def _kept_in(job: Job) -> Path:
    return job.out / "training"


def _record_of(job: Job, digest: str) -> Path:
    return _kept_in(job) / f"{job.name}-{digest[:8]}.json"


def _digest(job: Job) -> str:
    """sha256 of all that decides what comes of a job. Files count by size and time, so that none is read."""
    told: dict[str, Any] = {name: value for name, value in vars(job).items() if name not in ("out", "device", "config")}
    files = [*involved_files(job.images), *_files_of(job.model), *_files_of(job.captions), *_files_of(job.corpus)]
    stamps = []
    for path in files:
        facts = path.stat()
        stamps.append([str(path), facts.st_size, facts.st_mtime_ns])
    settings = asdict(job.config)
    for name in BEFORE.keys() - {"scope"}:  # which all records tell
        if settings[name] == BEFORE[name]:
            del settings[name]  # as records say that are older than the choice
    content = [_RECORD_FORMAT, {name: str(value) for name, value in told.items()}, settings, stamps]
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _files_of(path: Path | None) -> list[Path]:
    if path is None:
        return []
    if path.is_file():
        return [path]
    return sorted(itertools.islice((each for each in path.rglob("*") if each.is_file()), _MOST_FILES))


def _keep_record(job: Job, digest: str, result: Result, concept: str) -> None:
    """Remember that a job is finished; where that is impossible, it is only found out later and slower."""
    record = {
        "job": digest,
        "file": Path(result.file).stem,
        "concept": concept,
        "best_step": result.best_step,
        "steps": result.steps,
        "score": result.score,
        "stopped_early": result.stopped_early,
    }
    try:
        write_bytes_atomically(_record_of(job, digest), json.dumps(record).encode(), overwrite=True)
    except OSError as error:
        say(f"{job.name}: finished, which could not be noted ({error.strerror or error}): the next call looks again")
