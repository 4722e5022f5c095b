"""How good the miniature is, and concepts learned on it, by measures that are themselves measured first.

    python -m benchmarks.quality [--json] [--captions 500] [--concepts 8] [--prompts 16] [--steps 250] [--sheet FILE]

"judge": accuracy of the judge on held-out renders, and how often a personal thing is found among 49 look-alikes.
"base": share of pictures drawn from held-out captions that show what was asked. "concept": personal things learned
from five photos each, drawn from prompts in which the word stands first, second, and after adjectives, beside the
same prompts with the plain super-category; with the gates on the word itself and on all others.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from miniature import world
from miniature.captions import Caption, caption, random_caption
from miniature.host import load_host
from miniature.metrics import Metrics, rendered
from miniature.weights import FOLDER, WeightsError
from perfusion.concept import Concept
from perfusion.edit import Gate, presence
from perfusion.hosts.base import Word
from perfusion.hosts.diffusers import DiffusersHost, draw
from perfusion.scope import ScopedText
from perfusion.stack import ConceptStack, ConceptUse
from perfusion.statistics import TextStatistics, measure
from perfusion.training.companions import learned_from
from perfusion.training.config import TrainingConfig
from perfusion.training.trainer import Subject, train

from .settings import HEARING, add_settings, config_of

SAMPLER: dict[str, Any] = {"steps": 20, "guidance": 3.0, "size": world.SIZE, "batch": 50}
PLACEHOLDER = "<my-thing>"
PHOTOS = 5
_SETTINGS = ("form", "estimator", *HEARING, "value_rate")


@dataclass(frozen=True)
class Prompt:
    """A prompt with ``{}`` where the thing goes, what it asks for with its super-category there, and its kind."""

    text: str
    asked: Caption
    kind: str

    def naming(self, word: str) -> str:
        """The prompt with a word in place."""
        return self.text.replace("{}", word)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one line of JSON alone")
    parser.add_argument("--captions", type=int, default=500, help="captions for the base model; 0 leaves it out")
    parser.add_argument("--concepts", type=int, default=8, help="personal things to learn; 0 leaves them out")
    parser.add_argument("--prompts", type=int, default=16, help="prompts for each of them")
    add_settings(parser, *_SETTINGS)
    parser.add_argument("--bias", type=float, default=Gate.bias)
    parser.add_argument("--guidance", type=float, default=SAMPLER["guidance"])
    parser.add_argument("--weights", type=Path, default=FOLDER)
    parser.add_argument("--sheet", type=Path, help="where a sheet of what was drawn goes, as .png")
    options = parser.parse_args()
    SAMPLER["guidance"] = options.guidance
    try:
        host, metrics = load_host(options.weights), Metrics(options.weights)
    except WeightsError as error:
        raise SystemExit(str(error)) from None
    started, sheet = time.perf_counter(), []
    figures: dict[str, Any] = {"judge": judge(metrics)}
    if options.captions:
        figures["base"] = base(host, metrics, options.captions, sheet)
    if options.concepts:
        config = config_of(options, *_SETTINGS)
        figures["concept"] = concepts(host, metrics, config, options, sheet)
    figures["seconds"] = round(time.perf_counter() - started)
    if options.sheet and sheet:
        contact_sheet(sheet).save(options.sheet)
    print(json.dumps(figures) if options.json else json.dumps(figures, indent=2))


def judge(metrics: Metrics) -> dict[str, float]:
    """How far the judge is to be believed: renders of seeds that nothing was trained on."""
    rng = Random("held-out judge")
    accuracy = metrics.accuracy([world.scene(rng) for _ in range(1000)])
    looks, scenes = [], []
    for number in range(60):
        category = world.CATEGORY_NAMES[number % len(world.CATEGORY_NAMES)]
        look = world.instance(category, 1_000_000 + number)
        seen = world.scene(rng, avoid=category)
        first = replace(seen.things[0], category=category, look=look)
        looks.append((category, look))
        scenes.append(replace(seen, things=(first, *seen.things[1:]), style="photo"))
    return _rounded({**accuracy, "retrieval": metrics.retrieval(looks, scenes)})


def base(host: DiffusersHost, metrics: Metrics, count: int, sheet: list[Tensor]) -> dict[str, float]:
    """The base model's obedience to held-out captions."""
    rng = Random("held-out captions")
    captions = [random_caption(rng) for _ in range(count)]
    pictures = draw(host, ConceptStack(), [each.text for each in captions], range(count), **SAMPLER)
    sheet.append(pictures[:48])
    found = metrics.attributes(pictures, captions)
    shares = {name: sum(hits) / len(hits) for name, hits in found.items() if hits}
    return _rounded({**shares, "text": metrics.text_similarity(pictures, [each.text for each in captions])})


def concepts(
    host: DiffusersHost, metrics: Metrics, config: TrainingConfig, options: argparse.Namespace, sheet: list[Tensor]
) -> dict[str, Any]:
    """Personal things learned and drawn, beside their plain super-categories."""
    statistics = measure(host, host.captions or ())
    learned, plain, gates, seconds = defaultdict(list), defaultdict(list), defaultdict(list), []
    for number in tqdm(range(options.concepts), desc="concepts"):
        category = world.CATEGORY_NAMES[number % len(world.CATEGORY_NAMES)]
        look = world.instance(category, 2_000_000 + number)
        photos = [world.portrait(category, look, Random(f"photo {number} {k}")) for k in range(PHOTOS)]
        started = time.perf_counter()
        concept = learn(host, category, photos, statistics, config)
        seconds.append(time.perf_counter() - started)
        prompts = prompts_for(category, options.prompts, Random(f"prompts {number}"))
        asked, seeds = [each.asked for each in prompts], [1000 * number + k for k in range(len(prompts))]
        stack = ConceptStack((ConceptUse(concept, Gate(bias=options.bias)),))
        own = draw(host, stack, [each.naming(PLACEHOLDER) for each in prompts], seeds, **SAMPLER)
        without = draw(host, ConceptStack(), [each.naming(category) for each in prompts], seeds, **SAMPLER)
        shown = rendered(photos)
        sheet += [shown, own, without]
        for into, pictures in ((learned, own), (plain, without)):
            named = [each.naming(category) for each in prompts]
            for name, value in metrics.of_concept(pictures, shown, category, look, named).items():
                into[name].append(value)
            for name, hits in metrics.attributes(pictures, asked).items():
                into[name] += hits
            into["second_object"] += metrics.attributes(
                pictures,
                [replace(each, things=tuple(t for t in each.things if t.category != category)) for each in asked],
            )["category"]
        for name, values in gate_readings(host, concept, prompts, options.bias).items():
            gates[name] += values
    return {
        **_rounded({name: mean(values) for name, values in learned.items() if values}),
        "super_category": _rounded({name: mean(values) for name, values in plain.items() if values}),
        "gates": _rounded({name: mean(values) for name, values in gates.items()}),
        "seconds": round(mean(seconds), 1),
    }


def learn(
    host: DiffusersHost,
    category: str,
    photos: Sequence[world.Scene],
    statistics: TextStatistics,
    config: TrainingConfig,
    placeholder: str = PLACEHOLDER,
) -> Concept:
    """A concept from renders of scenes that show the thing alone."""
    shown, where = list(rendered(photos)), thing_masks(photos)
    ready, subject = learned_from(host, shown, where, Subject(placeholder, category), config)
    return train(host, ready, subject, statistics, config)[0]


def kept_at(folder: Path, name: str, config: TrainingConfig) -> Path:
    """Where the concept of this name is kept that was learned with these settings."""
    settings = [f"{getattr(config, setting)}".removesuffix(".0") for setting in ("steps", *HEARING)]
    return folder / f"{'-'.join([name, *settings])}.safetensors"


def prompts_for(category: str, count: int, rng: Random) -> list[Prompt]:
    """Prompts in turn of four kinds: the thing alone, first of two, second of two, and after adjectives."""
    prompts: list[Prompt] = []
    while len(prompts) < count:
        kind = ("alone", "first", "second", "adjectives")[len(prompts) % 4]
        seen = world.scene(rng, things=2 if kind in ("first", "second") else 1, avoid=category)
        things, own = list(seen.things), int(kind == "second")
        things[own] = replace(things[own], category=category, pattern=None, name=None)
        nouns = [thing.category for thing in things]
        nouns[own] = "{}"
        asked = caption(rng, replace(seen, things=tuple(things)), nouns=nouns)
        place = [thing.category for thing in asked.things].index(category)
        adjectives = asked.text.split("{}")[0].split()[-1] not in ("a", "the", "my", "one")
        fits = {"alone": not adjectives, "adjectives": adjectives, "first": place == 0, "second": place == 1}
        if fits[kind]:
            prompts.append(Prompt(asked.text, asked, kind))
    return prompts


def gate_readings(
    host: DiffusersHost, concept: Concept, prompts: Sequence[Prompt], bias: float
) -> dict[str, list[float]]:
    """r on the concept's word, whether its gate opens there by half, and the share of other words on which it does."""
    texts = [each.naming(concept.placeholder) for each in prompts]
    with torch.no_grad():
        word = Word(concept.placeholder, concept.super_category, concept.embeddings)
        encoded = ScopedText(host, concept.scope)(texts, word)
    r = presence(encoded.context, concept.i_star.unsqueeze(0), concept.d_star.unsqueeze(0)).squeeze(-1)
    edit = ConceptStack((ConceptUse(concept, Gate(bias=bias)),)).edit()
    edit.tell_own(encoded.word)
    gates = edit.gates(encoded.context).squeeze(-1)
    others = ~encoded.word & ~encoded.padding
    others[:, 0] = False  # the start token
    return {
        "r": [float(r[k][encoded.word[k]].max()) for k in range(len(texts))],
        "opens": [float(gates[k][encoded.word[k]].max() > 0.5) for k in range(len(texts))],
        "false_opens": [float((gates[k][others[k]] > 0.5).float().mean()) for k in range(len(texts))],
        "largest_other_r": [float(r[k][others[k]].max()) for k in range(len(texts))],
    }


def thing_masks(photos: Sequence[world.Scene]) -> list[Tensor]:
    """Where the first thing of each scene is: (64, 64), 0 to 1."""
    return [_mask(world.masks(seen)[0]) for seen in photos]


def _mask(mask: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(mask.height, mask.width).float() / 255


def contact_sheet(rows: Sequence[Tensor], columns: int = 16, enlarged: int = 2) -> Image.Image:
    """Rows of pictures (b, 64, 64, 3) in 0..1 on white, broken after ``columns``."""
    lines = [line for row in rows for line in row.split(columns)]
    side = world.SIZE * enlarged
    sheet = Image.new("RGB", (columns * (side + 2), len(lines) * (side + 2)), "white")
    for y, line in enumerate(lines):
        for x, picture in enumerate(line):
            pixels = Image.fromarray((picture * 255).round().to(torch.uint8).numpy())
            sheet.paste(pixels.resize((side, side), Image.Resampling.LANCZOS), (x * (side + 2), y * (side + 2)))
    return sheet


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}


if __name__ == "__main__":
    main()
