"""Is the step that a training chooses by itself as good as the best? On the miniature, against exhaustive scoring.

    python -m benchmarks.choice [--json] [--concepts 8] [--steps 200] [--every 25] [--prompts 96] [--folder DIR]

Personal things are learned from five photos each as Train Concept does it with the miniature's own CLIP Vision: steps
are judged by eight prompts, and the training stops when its score has clearly passed its best. Then it goes on up to
``--steps``, and all judged steps are scored exhaustively: in the same way, over ``--prompts`` other prompts of varied
wording, each with noise of its own, none of them trained on, looked at for the word, or known to the training's judge.

"ratio": the exhaustive score of the chosen step over that of the best. Chance adds most to the best of many: the true
ratio is rather higher. "last_ratio": the same for the last step. "ratio_error": the standard error of such ratios, the
largest of all steps. All steps have the same prompts and noise, so that they are compared more exactly than any is
known: "score_error" is the standard error of the best score, as a share of it. Both are jackknife estimates that leave
out eight prompts at a time. "others_within": how often eight of those prompts, in place of the training's own, would
have chosen a step within 2 % of the best, of all up to the last.

What is found is kept in ``--folder`` for each thing, and not measured again with the same settings and weights. Several
calls with the same folder can share the work by ``--first``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from miniature import world
from miniature.host import load_host
from miniature.metrics import Metrics, rendered
from miniature.weights import FOLDER, WeightsError, read
from perfusion.files import write_bytes_atomically
from perfusion.hosts.diffusers import DiffusersHost
from perfusion.statistics import TextStatistics, measure
from perfusion.training import choice
from perfusion.training.companions import learned_from
from perfusion.training.config import TrainingConfig
from perfusion.training.run import KEPT, Outcome, Run, Update
from perfusion.training.scoring import PictureScorer, Score, validation_prompts
from perfusion.training.trainer import Subject, Trainer

from .quality import PHOTOS, PLACEHOLDER, prompts_for, thing_masks
from .settings import config_of

WITHIN = 0.98
FIRST_THING = 4_000_000
BLOCK = 8  # prompts, as many as the training's own judge has
FIRST_SEED = 1000  # of noise; that of the training's own judge begins at 0
PARTS = ("unet", "vae", "text_encoder", "image_encoder")


@dataclass(frozen=True)
class Found:
    """What came of one thing: of all ``steps``, what each picture of the training's ``own`` judge and of exhaustive
    scoring (steps, pictures) came to, as ``Score.pictures`` has it."""

    category: str
    steps: list[int]
    own: list[list[tuple[float, float]]]
    pictures: list[list[tuple[float, float]]]
    seconds: float

    @property
    def blocks(self) -> int:
        """Of how many blocks of prompts there are pictures."""
        return len(self.pictures[0]) // BLOCK

    def scores(self, kept: Tensor) -> list[Score]:
        """The exhaustive score of each step by those blocks that ``kept`` (blocks,) has."""
        places = kept.repeat_interleave(BLOCK).nonzero().flatten().tolist()
        return self._scores([[pictures[place] for place in places] for pictures in self.pictures])

    @property
    def judged(self) -> list[Score]:
        """The training's own scores, up to where it stops by itself."""
        scores = self._scores(self.own)
        return next((scores[:end] for end in range(1, len(scores)) if choice.has_passed(scores[:end])), scores)

    def _scores(self, rows: Sequence[Sequence[tuple[float, float]]]) -> list[Score]:
        return [
            Score.of_pictures(step, tuple((image, text) for image, text in row))
            for step, row in zip(self.steps, rows, strict=True)
        ]


class Encoders:
    """The miniature's contrastive encoders (``perfusion.training.scoring.Similarity``)."""

    def __init__(self, folder: Path):
        self._metrics = Metrics(folder)

    def images(self, pictures: Tensor) -> Tensor:
        """Unit vectors (n, e) of pictures (n, 64, 64, 3)."""
        return self._metrics.image_embeddings(pictures)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (n, e) of texts."""
        return self._metrics.text_embeddings(prompts)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choice", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one line of JSON alone")
    parser.add_argument("--concepts", type=int, default=8, help="personal things to learn")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument("--steps", type=int, default=TrainingConfig().steps, help="training steps for each of them")
    parser.add_argument("--every", type=int, default=25, help="after how many steps each one is judged")
    parser.add_argument("--prompts", type=int, default=96, help=f"for exhaustive scoring, a multiple of {BLOCK}")
    parser.add_argument("--folder", type=Path, help="where what was found is kept, and looked for")
    parser.add_argument("--weights", type=Path, default=FOLDER)
    options = parser.parse_args()
    if options.prompts < 2 * BLOCK or options.prompts % BLOCK:
        parser.error(f"--prompts must be a multiple of {BLOCK}, {2 * BLOCK} or more")
    if options.steps > KEPT * options.every:
        parser.error(f"no more than {KEPT} steps are judged: lower --steps or raise --every")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            found = learned(options, options.folder or Path(temporary))
    except WeightsError as error:
        raise SystemExit(str(error)) from None
    figures = overall(found)
    print(json.dumps(figures) if options.json else table(figures))


def learned(options: argparse.Namespace, folder: Path) -> list[Found]:
    """What came of each thing, found in ``folder`` or measured now."""
    bench, digest = None, _digest(options)
    found = []
    for number in range(options.first, options.first + options.concepts):
        path = folder / f"{number}-{digest}.json"
        if not path.exists():
            bench = bench or Bench(options)
            measured = json.dumps(asdict(bench.measured(number)))
            write_bytes_atomically(path, measured.encode(), overwrite=True)
        found.append(Found(**json.loads(path.read_text(encoding="utf-8"))))
    return found


class Bench:
    """All that every thing is learned and judged with."""

    def __init__(self, options: argparse.Namespace):
        self.host: DiffusersHost = load_host(options.weights)
        self.encoders = Encoders(options.weights)
        self.statistics: TextStatistics = measure(self.host, self.host.captions or ())
        self.config = config_of(options)
        self.every: int = options.every
        self.blocks: int = options.prompts // BLOCK

    def measured(self, number: int) -> Found:
        """Learn thing ``number`` and score all its judged steps."""
        started = time.perf_counter()
        category = world.CATEGORY_NAMES[number % len(world.CATEGORY_NAMES)]
        scenes = world.portraits(category, FIRST_THING + number, PHOTOS)
        shown, where = list(rendered(scenes)), thing_masks(scenes)
        photos, subject = learned_from(self.host, shown, where, Subject(PLACEHOLDER, category), self.config)
        with self.host.training():
            trainer = Trainer(self.host, photos, subject, self.statistics, self.config)
            judged_by = validation_prompts(self.host, trainer.subject)
            known = {*judged_by, *trainer.subject.prompts(), *trainer.context_captions()}
            prompts = held_out_prompts(category, self.blocks * BLOCK, known, Random(f"choice {number}"))
            whole = self._trained(trainer, self._scorer(judged_by, 0))
            scorers = [self._scorer(prompts[k : k + BLOCK], FIRST_SEED + k) for k in range(0, len(prompts), BLOCK)]
            scores = [
                [scorer(trainer, each.concept, each.step)[0] for scorer in scorers]
                for each in tqdm(whole.checkpoints, desc=f"{category}: scoring", unit="step")
            ]
        return Found(
            category=category,
            steps=[each.step for each in whole.checkpoints],
            own=[_pictures(each.score) for each in whole.checkpoints],
            pictures=[list(chain.from_iterable(map(_pictures, row))) for row in scores],
            seconds=time.perf_counter() - started,
        )

    def _scorer(self, prompts: Sequence[str], seed: int) -> PictureScorer:
        """Set up as Train Concept does."""
        batch = self.config.batch_size // 2
        return PictureScorer(
            self.host, self.encoders, None, prompts, size=self.config.resolution, seed=seed, batch=batch
        )

    def _trained(self, trainer: Trainer, scorer: PictureScorer) -> Outcome:
        """What a training comes to that goes on to its last step."""
        category = trainer.subject.super_category
        with tqdm(total=self.config.steps, desc=f"{category}: training", unit="step") as bar:

            def advance(update: Update) -> None:
                bar.update(update.step - bar.n)

            return Run(trainer, scorer=scorer, every=self.every, patience=0, listeners=[advance]).run()


def _pictures(score: Score | None) -> list[tuple[float, float]]:
    """The pictures of a score that has some."""
    assert score is not None and score.pictures is not None
    return list(score.pictures)


def held_out_prompts(category: str, count: int, known: set[str], rng: Random) -> list[str]:
    """``count`` different prompts with the word in place, of the four kinds of ``prompts_for``, none of them known."""
    known, found = {text.lower() for text in known}, {}
    while len(found) < count:
        texts = [prompt.naming(PLACEHOLDER) for prompt in prompts_for(category, 4, rng)]
        found |= {text: None for text in texts if text.lower() not in known}
    return list(found)[:count]


def overall(found: Sequence[Found]) -> dict[str, Any]:
    """The figures of all things: see the module."""
    rows = [figures(each) for each in found]
    ratios, last_ratios = [row["ratio"] for row in rows], [row["last_ratio"] for row in rows]
    return {
        "mean_ratio": round(mean(ratios), 4),
        "worst_ratio": min(ratios),
        "within": sum(ratio >= WITHIN for ratio in ratios),
        "mean_last_ratio": round(mean(last_ratios), 4),
        "worst_last_ratio": min(last_ratios),
        "last_within": sum(ratio >= WITHIN for ratio in last_ratios),
        "others_within": round(mean(row["others_within"] for row in rows), 4),
        "worst_ratio_error": max(row["ratio_error"] for row in rows),
        "worst_score_error": max(row["score_error"] for row in rows),
        "seconds": round(sum(each.seconds for each in found)),
        "concepts": rows,
    }


def figures(found: Found) -> dict[str, Any]:
    """The figures of one thing."""
    values = _values(found, torch.ones(found.blocks, dtype=torch.bool))
    best, chosen, stopped = values.index(max(values)), choice.best(found.judged), found.steps[len(found.judged) - 1]
    alone = [found.scores(block) for block in torch.eye(found.blocks, dtype=torch.bool)]
    others = [values[choice.best(scores)] / values[best] for scores in alone]

    def error_of_ratio(step: int) -> float:
        def ratio(kept: Tensor) -> float:
            values = _values(found, kept)
            return values[step] / values[best]

        return jackknife(ratio, found.blocks)

    return {
        "category": found.category,
        "chosen": found.steps[chosen],
        "best": found.steps[best],
        "stopped": stopped,
        "score": round(values[chosen], 4),
        "best_score": round(values[best], 4),
        "last_score": round(values[-1], 4),
        "ratio": round(values[chosen] / values[best], 4),
        "last_ratio": round(values[-1] / values[best], 4),
        "ratio_error": round(max(map(error_of_ratio, range(len(values)))), 4),
        "score_error": round(jackknife(lambda kept: _values(found, kept)[best], found.blocks) / values[best], 4),
        "others_within": round(mean(ratio >= WITHIN for ratio in others), 4),
    }


def _values(found: Found, kept: Tensor) -> list[float]:
    return [score.value for score in found.scores(kept)]


def jackknife(statistic: Callable[[Tensor], float], count: int) -> float:
    """The standard error of a statistic of ``count`` blocks, of which it is told which are kept."""
    without = torch.tensor([statistic(kept) for kept in ~torch.eye(count, dtype=torch.bool)])
    return float(((count - 1) * without.var(correction=0)).sqrt())


def table(figures: dict[str, Any]) -> str:
    """The same, to be read."""
    columns = ("chosen", "best", "stopped", "score", "best_score", "ratio", "last_ratio", "ratio_error", "score_error")
    lines = ["  ".join(["thing      ", *columns, "others_within"])]
    for row in figures["concepts"]:
        cells = [f"{row[name]:>{len(name)}{'.4f' if isinstance(row[name], float) else ''}}" for name in columns]
        lines.append("  ".join([f"{row['category']:11}", *cells, f"{row['others_within']:13.0%}"]))
    for name, prefix in (("chosen step", ""), ("last step", "last_")):
        lines.append(
            f"{name}: mean ratio {figures[f'mean_{prefix}ratio']:.4f}, worst {figures[f'worst_{prefix}ratio']:.4f}, "
            f"{figures[f'{prefix}within']} of {len(figures['concepts'])} within 2 % of the best"
        )
    lines += [
        f"chosen by eight other prompts: {figures['others_within']:.0%} within 2 %",
        f"standard error: up to {figures['worst_ratio_error']:.2%} of ratios, "
        f"up to {figures['worst_score_error']:.2%} of scores; {figures['seconds']} s",
    ]
    return "\n".join(lines)


def _digest(options: argparse.Namespace) -> str:
    """Of all that decides what comes of a thing, besides the code."""
    settings = asdict(TrainingConfig(steps=options.steps))
    content = sha256(json.dumps([options.every, options.prompts, settings]).encode())
    for part in PARTS:
        for _, tensor in sorted(read(part, options.weights).items()):
            content.update(tensor.numpy().tobytes())
    return content.hexdigest()[:12]


if __name__ == "__main__":
    main()
