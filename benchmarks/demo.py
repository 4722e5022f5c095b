"""The whole job without ComfyUI: learn two personal things from photos, save them, load them, draw with one and both.

    python -m benchmarks.demo [--steps N] [--seeds N] [--output FOLDER]

The model is the miniature, a small Stable Diffusion that comes with the pack, in the classes of diffusers. Writes both
concept files and a contact sheet, and prints how alike the pictures are to the photos and to their prompts.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from miniature.shapes import Look
from miniature.weights import FOLDER, WeightsError, load_image_encoder
from miniature.world import SIZE, instance, masks, portrait, render
from perfusion.concept import Concept, load
from perfusion.edit import Gate
from perfusion.stack import ConceptStack, ConceptUse
from perfusion.statistics import TextStatistics, measure
from perfusion.training.companions import learned_from
from perfusion.training.config import TrainingConfig
from perfusion.training.trainer import StepReport, Subject, Trainer, train

if TYPE_CHECKING:
    from perfusion.hosts.diffusers import DiffusersHost


@dataclass(frozen=True)
class Thing:
    """What is learned: its word, what kind of thing it is, and which of the world's personal looks it has."""

    placeholder: str
    category: str
    number: int

    @property
    def look(self) -> Look:
        """Colors, pattern and mark, which no caption can name."""
        return instance(self.category, self.number)


THINGS = (Thing("<my-teddy>", "teddy bear", 10_001), Thing("<my-cat>", "cat", 10_027))
# Where the photos are taken. No scene below is one of these.
PHOTOGRAPHED = ("room", "studio", "forest", "studio", "room")
SCENES = (
    "a photo of a {} on the beach",
    "a photo of a {} on the moon",
    "a photo of a {} in the snow",
    "a photo of a {} at night",
    "a photo of a {} wearing a crown",
    "a pencil sketch of a {}",
)
SEED_OF_TWO = 1
SCENES_OF_TWO = (
    "a photo of a {} and a {}",
    "a photo of a {} next to a {} on the beach",
    "a photo of a {} and a {} on the moon",
    "a photo of a {} and a {} in the snow",
    "a photo of a {} and a {} at night",
    "a watercolor of a {} and a {}",
)
TRADE_OFF = "a photo of a {} wearing a crown on the moon"
BIASES = (0.6, 0.8, 1.0, 1.2, 1.4)

STEPS, SEEDS = 250, 4
TRAINING = TrainingConfig(batch_size=16, micro_batch=0, resolution=SIZE)
AT_ONCE = 8
DRAWING: dict[str, Any] = {"steps": 25, "guidance": 3.0, "size": SIZE, "batch": AT_ONCE}


class OutputError(OSError):
    """The output folder cannot be written to."""


class Score(NamedTuple):
    """Mean cosines: of pictures to the photos of a thing, and to their prompts with its kind in place of its word."""

    image: float
    text: float

    def __str__(self) -> str:
        return f"photos {self.image:.2f}, prompt {self.text:.2f}"


@dataclass
class Learned:
    """A thing, its photos (n, 64, 64, 3), the file it became, and the concept as read from it."""

    thing: Thing
    photos: Tensor
    file: Path
    concept: Concept


@dataclass
class Run:
    """One run of the demo: what it has kept so far, and what each part took, in seconds."""

    output: Path
    weights: Path
    steps: int
    seeds: int
    kept: list[Path] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Note how long the block takes."""
        started = time.perf_counter()
        yield
        self.times[part] = time.perf_counter() - started

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Raise OutputError where a file cannot be written."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot write to {self.output} ({error.strerror or error}): choose another folder with --output"
            ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and say where its results are. The exit code: 1 where something is missing, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    at_least_1 = partial(_whole, 1)
    parser.add_argument("--steps", type=at_least_1, default=STEPS, help="training steps for each thing (%(default)s)")
    parser.add_argument("--seeds", type=at_least_1, default=SEEDS, help="pictures of each prompt (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="where files go (%(default)s)")
    parser.add_argument("--weights", type=Path, default=FOLDER, help="the miniature's weights (those of the pack)")
    options = parser.parse_args(arguments)
    run = Run(options.output, options.weights, options.steps, options.seeds)
    try:
        _demo(run)
    except (WeightsError, OutputError, ImportError) as error:
        print(f"\nThe demo cannot go on: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = "\n".join(f"  {path}" for path in run.kept)
        print(f"\nStopped. These are complete:\n{kept}" if kept else "\nStopped. Nothing was written yet.")
        return 130
    return 0


def _demo(run: Run) -> None:
    with run.timed("loading"):
        # First of all: it says what to install where diffusers is missing.
        import perfusion.hosts.diffusers  # noqa: F401
        from miniature.host import load_host

        host, image_encoder = load_host(run.weights), load_image_encoder(run.weights)
    with run.writing():
        _require_writable(run.output)
    print(f"The miniature draws {SIZE} x {SIZE} pixels. It learns two things from {len(PHOTOGRAPHED)} photos each.")

    captions = host.captions or ()
    with run.timed("text statistics"), tqdm(total=len(captions), desc="text statistics", unit="caption") as bar:
        statistics = measure(host, captions, lambda done, total: _move_to(bar, done))
    learned = []
    for thing in THINGS:
        with run.timed(f"learning {thing.placeholder}"):
            learned.append(_learn(run, host, thing, statistics))
    with run.timed("drawing"):
        rows, scores = _drawn(run, host, image_encoder, learned)
    with run.timed("contact sheet"):
        facts = f"{SIZE} by {SIZE} pixels, enlarged · {run.steps} training steps a thing · {_files(learned)}"
        sheet = contact_sheet("Two personal things, learned from five photos each", facts, rows)
        path = run.output / "contact_sheet.png"
        with run.writing():
            _save(sheet, path)
        run.kept.append(path)
    _report(run, learned, scores, path)


def _learn(run: Run, host: DiffusersHost, thing: Thing, statistics: TextStatistics) -> Learned:
    """Train on photos of a thing, keep the concept, and read it back."""
    rng = Random(f"photos of {thing.placeholder}")
    shots = [replace(portrait(thing.category, thing.look, rng), background=place) for place in PHOTOGRAPHED]
    photos = torch.stack([_to_tensor(render(shot)) for shot in shots])
    shown = [_to_tensor(masks(shot)[0]) for shot in shots]
    config = replace(TRAINING, steps=run.steps)
    subject = Subject(thing.placeholder, thing.category)
    prepared, subject = learned_from(host, list(photos), shown, subject, config)
    with tqdm(total=config.steps, desc=f"learning {thing.placeholder}", unit="step") as bar:

        def show(trainer: Trainer, report: StepReport) -> None:
            bar.set_postfix(loss=f"{report.loss:.3f}", gate=f"{report.gate:.2f}", refresh=False)
            bar.update()

        concept, _ = train(host, prepared, subject, statistics, config, [show])
    with run.writing():
        file = concept.save_numbered(run.output, thing.placeholder)
    run.kept.append(file)
    return Learned(thing, photos, file, load(file))


def _drawn(
    run: Run, host: DiffusersHost, image_encoder: Any, learned: Sequence[Learned]
) -> tuple[list[Row], list[tuple[str, Score]]]:
    """The rows of the contact sheet, and scores by name."""
    seeds, nothing = range(run.seeds), ConceptStack()
    kinds = [each.thing.category for each in learned]
    words = [each.thing.placeholder for each in learned]
    total = run.seeds * (2 * len(SCENES) * len(learned) + len(BIASES) + 1) + 2 * len(SCENES_OF_TWO)
    bar = tqdm(total=total, desc="drawing", unit="picture")

    def pictures(stack: ConceptStack, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """(seeds * prompts, 64, 64, 3): all prompts of the first seed, then of the next."""
        from perfusion.hosts.diffusers import draw

        asked = [(prompt, seed) for seed in seeds for prompt in prompts]
        parts = []
        for start in range(0, len(asked), AT_ONCE):
            some, their_seeds = zip(*asked[start : start + AT_ONCE], strict=True)
            parts.append(draw(host, stack, some, their_seeds, **DRAWING))
            bar.update(len(some))
        return torch.cat(parts)

    def measured(drawn: Tensor, each: Learned, prompts: Sequence[str]) -> Score:
        asked = [prompt.format(each.thing.category) for prompt in prompts] * len(seeds)
        return score(host, image_encoder, drawn, each.photos, asked)

    rows, scores = [], []
    with bar:
        for each, word, kind in zip(learned, words, kinds, strict=True):
            own = pictures(ConceptStack((ConceptUse(each.concept),)), [s.format(word) for s in SCENES], seeds)
            plain = pictures(nothing, [s.format(kind) for s in SCENES], seeds)
            of_own, of_plain = measured(own, each, SCENES), measured(plain, each, SCENES)
            scores += [(word, of_own), (f"{kind}, without the concept", of_plain)]
            note = [
                each.file.name,
                f"{each.file.stat().st_size:,} bytes",
                f"learned in {run.times[f'learning {word}']:.0f} s",
                "",
                "likeness, of 1",
                f"to the photos  {of_own.image:.2f}",
                f"    {kind}  {of_plain.image:.2f}",
                f"to the prompts  {of_own.text:.2f}",
                f"    {kind}  {of_plain.text:.2f}",
            ]
            rows += [
                Row("photos", "all that it learns from", list(each.photos), note=note, title=f"{word}, a {kind}"),
                Row(word, "in scenes that no photo shows", list(own[: len(SCENES)]), _blanks(SCENES), learned=True),
                Row(kind, "the model without the concept, same seeds", list(plain[: len(SCENES)])),
            ]
        both = ConceptStack(tuple(ConceptUse(each.concept) for each in learned))
        together = list(pictures(both, [s.format(*words) for s in SCENES_OF_TWO], [SEED_OF_TWO]))
        label = "two files at once, in one pass"
        rows.append(Row("\n".join(words), label, together, _blanks(SCENES_OF_TWO), title="Both", learned=True))
        apart = list(pictures(nothing, [s.format(*kinds) for s in SCENES_OF_TWO], [SEED_OF_TWO]))
        rows.append(Row("\n".join(kinds), "the model without the concepts, same seeds", apart))

        first, strip, labels = learned[0], [], []
        for bias in BIASES:
            use = ConceptUse(first.concept, Gate(bias=bias))
            drawn = pictures(ConceptStack((use,)), [TRADE_OFF.format(words[0])], seeds)
            strip.append(drawn[0])
            scores.append((f"{words[0]} at bias {bias:g}", measured(drawn, first, [TRADE_OFF])))
            labels.append(f"bias {bias:g}\n{scores[-1][1]}")
        drawn = pictures(nothing, [TRADE_OFF.format(kinds[0])], seeds)
        labels.append(f"{kinds[0]}\n{measured(drawn, first, [TRADE_OFF])}")
        title = "Bias: low stays close to the photos, high follows the prompt"
        label = f"{TRADE_OFF.format(words[0])}\n\none file, one seed, no new training"
        rows.append(Row(words[0], label, [*strip, drawn[0]], labels, title=title, learned=True))
    return rows, scores


def score(host: DiffusersHost, image_encoder: Any, pictures: Tensor, photos: Tensor, prompts: Sequence[str]) -> Score:
    """How alike pictures (b, 64, 64, 3) are to photos (n, 64, 64, 3), and to b prompts that name the kind of thing.

    By the miniature's contrastive encoders, as CLIP-I and CLIP-T do it.
    """

    def embedded(images: Tensor) -> Tensor:
        return normalize(image_encoder(images.permute(0, 3, 1, 2) * 2 - 1).image_embeds, dim=-1)

    with torch.no_grad():
        own = embedded(pictures)
        ids = host.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
        texts = normalize(host.text_encoder(ids).text_embeds, dim=-1)
        return Score(float((own @ embedded(photos).T).mean()), float((own * texts).sum(-1).mean()))


def _report(run: Run, learned: Sequence[Learned], scores: Sequence[tuple[str, Score]], sheet: Path) -> None:
    width = max(len(name) for name, _ in scores) + 2
    print(f"\n{'Likeness (cosine)':<{width}}  to photos  to prompts")
    for name, each in scores:
        print(f"{name:<{width}}  {each.image:9.3f}  {each.text:10.3f}")
    print()
    for part, seconds in run.times.items():
        print(f"{part:<{width}}  {seconds:7.1f} s")
    print(f"{'in all':<{width}}  {sum(run.times.values()):7.1f} s\n")
    for each in learned:
        before, after = each.concept.training["fixed_loss"]
        print(
            f"Concept file   {each.file}  {each.file.stat().st_size:,} bytes "
            f"(loss on fixed noise {before:.4f} before, {after:.4f} after training)"
        )
    print(f"Contact sheet  {sheet}  {sheet.stat().st_size:,} bytes")


# --- the contact sheet

CELL, GAP, MARGIN, SIDE = 3 * SIZE, 12, 40, 190
PAPER, INK, GREY, ACCENT = (250, 248, 243), (36, 34, 42), (126, 120, 114), (176, 74, 44)
_TEXT, _HEAD, _LEADING = 15, 18, 21


@dataclass
class Row:
    """Pictures (64, 64, 3) beside a label, each with a caption above it.

    ``title`` begins a section, ``note`` fills the place behind the last picture; what is ``learned`` is in color.
    """

    head: str
    text: str
    pictures: list[Tensor]
    captions: list[str] = field(default_factory=list)
    note: list[str] = field(default_factory=list)
    title: str = ""
    learned: bool = False


def contact_sheet(title: str, facts: str, rows: Sequence[Row]) -> Image.Image:
    """Labeled rows of pictures on one sheet."""
    columns = max(len(row.pictures) + bool(row.note) for row in rows)
    width = 2 * MARGIN + SIDE + columns * (CELL + GAP) - GAP
    sheet = Image.new("RGB", (width, 100 * MARGIN + len(rows) * 3 * CELL), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN), title, fill=INK, font=_font(34))
    pen.text((MARGIN, MARGIN + 48), facts, fill=GREY, font=_font(17))
    top = MARGIN + 84
    for row in rows:
        if row.title:
            pen.line([MARGIN, top + 10, width - MARGIN - 1, top + 10], fill=(222, 216, 206), width=2)
            pen.text((MARGIN, top + 24), row.title, fill=INK, font=_font(24))
            top += 68
        above = [_wrapped(caption, CELL) for caption in row.captions]
        height = max((len(lines) for lines in above), default=0) * _LEADING
        for column, lines in enumerate(above):
            _write(pen, _left(column), top + height - len(lines) * _LEADING, lines, GREY)
        top += height + (6 if height else 0)
        heads = row.head.split("\n")
        _write(pen, MARGIN, top, heads, ACCENT if row.learned else INK, _HEAD)
        _write(pen, MARGIN, top + len(heads) * _LEADING + 8, _wrapped(row.text, SIDE - 2 * GAP), GREY)
        for column, picture in enumerate(row.pictures):
            _paste(sheet, picture, _left(column), top)
        _write(pen, _left(len(row.pictures)) + 4, top + 2, row.note, INK)
        top += CELL + GAP
    return sheet.crop((0, 0, width, top - GAP + MARGIN))


def _left(column: int) -> int:
    return MARGIN + SIDE + column * (CELL + GAP)


def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of a text that are at most so wide, in pixels."""
    font, lines = _font(_TEXT), []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}".strip()
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return lines


def _write(pen: Any, left: int, top: int, lines: Sequence[str], color: Any, size: int = _TEXT) -> None:
    for number, line in enumerate(lines):
        pen.text((left, top + number * _LEADING), line, fill=color, font=_font(size))


def _paste(sheet: Image.Image, picture: Tensor, left: int, top: int) -> None:
    """An enlarged picture with round corners."""
    enlarged = to_image(picture).resize((CELL, CELL), Image.Resampling.LANCZOS)
    corners = Image.new("L", (4 * CELL, 4 * CELL))
    ImageDraw.Draw(corners).rounded_rectangle([0, 0, 4 * CELL - 1, 4 * CELL - 1], 40, fill=255)
    sheet.paste(enlarged, (left, top), corners.reduce(4))


def to_image(picture: Tensor) -> Image.Image:
    """(h, w, 3) in 0..1 as an image."""
    return Image.fromarray((picture * 255).round().to(torch.uint8).numpy())


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).float() / 255


def _blanks(prompts: Sequence[str]) -> list[str]:
    return [prompt.replace("{}", "…") for prompt in prompts]


def _files(learned: Sequence[Learned]) -> str:
    return ", ".join(f"{each.file.name} {each.file.stat().st_size:,} bytes" for each in learned)


# --- files and arguments


def _require_writable(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".{os.getpid()}.part"
    probe.touch()
    probe.unlink()


def _save(sheet: Image.Image, path: Path) -> None:
    """Write a PNG in one step, in place of the one of an earlier run."""
    data = io.BytesIO()
    sheet.save(data, "PNG", optimize=True)
    temporary = path.with_name(f".{os.getpid()}.part")
    try:
        temporary.write_bytes(data.getvalue())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _move_to(bar: Any, done: int) -> None:
    bar.update(done - bar.n)


def _whole(least: int, text: str) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} is below {least}")
    return number


if __name__ == "__main__":
    sys.exit(main())
