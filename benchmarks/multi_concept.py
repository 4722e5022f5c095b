"""Do several concepts answer their own words, and not each other's, and are all in the picture, each as itself?

    python -m benchmarks.multi_concept [--json] [--steps 250] [--scope word] [--focus F] [--companions N]
                                       [--timesteps lognormal] [--prompts 60] [--pictures 48] [--folder DIR]

Personal things are learned on the miniature, one by one, and named together in prompts of varied wording and order,
with adjectives, weights and second things around them. "own": share of words that open their own concept's gate by
half, "cross": share of (word, other concept) pairs in which the word opens the other's, "right": share of words whose
own gate is the widest of all, "others": share of ordinary words that open any. "paper" reads each gate by itself,
"competing" lets concepts compete by what is in the encodings, and "told" is what ComfyUI's text encoder tells besides:
whose word each token is, and its weight. "pictures" is what comes of it, by the judge: see
``benchmarks.multi_pictures``. Concepts are kept in ``--folder``, and not learned again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from miniature import world
from miniature.captions import caption
from miniature.host import load_host
from miniature.metrics import Metrics
from miniature.weights import FOLDER, WeightsError
from perfusion.concept import Concept, load
from perfusion.hosts.diffusers import DiffusersHost
from perfusion.hosts.diffusers.text import weighted_parts
from perfusion.stack import ConceptStack, ConceptUse, word_number
from perfusion.statistics import measure
from perfusion.training.config import TrainingConfig

from .host import say
from .multi_judging import Thing, photos_of
from .multi_pictures import Pictures, weighted
from .quality import contact_sheet, kept_at, learn
from .settings import HEARING, add_settings, config_of

OPEN = 0.5
# Super-categories that stand in one prompt.
ARRANGEMENTS = {
    "two_different": [("teddy bear", "cat"), ("cup", "robot"), ("cat", "car")],
    "two_same": [(kind, kind) for kind in ("teddy bear", "cat", "cup", "robot", "car")],
    "three": [("teddy bear", "cat", "cup"), ("robot", "car", "cat")],
    "five": [("teddy bear", "cat", "cup", "robot", "car")],
}
# For more things than a caption of the little world names.
LISTS = ("a photo of {}", "a sketch of {} on the beach", "{} in the snow", "there are {} at night", "a photo: {}")
ADJECTIVES = ("a", "a", "a small", "a big red", "the", "a striped", "a {} with a hat and a")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.multi_concept", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one line of JSON alone")
    add_settings(parser, *HEARING)
    parser.add_argument("--prompts", type=int, default=60, help="prompts for each set of concepts")
    parser.add_argument("--pictures", type=int, default=48, help="pictures for each set of concepts; 0 leaves them out")
    parser.add_argument("--arrangement", choices=ARRANGEMENTS, help="this one alone")
    parser.add_argument("--sheet", type=Path, help="where a sheet of photos and what was drawn goes, as .png")
    parser.add_argument("--folder", type=Path, help="where learned concepts are kept, and looked for")
    parser.add_argument("--weights", type=Path, default=FOLDER)
    options = parser.parse_args()
    try:
        host = load_host(options.weights)
    except WeightsError as error:
        raise SystemExit(str(error)) from None
    pictures = ready_to_draw(host, options) if options.pictures else None
    with tempfile.TemporaryDirectory() as temporary:
        figures = measured(host, pictures, options, options.folder or Path(temporary))
    if options.sheet and pictures:
        contact_sheet(pictures.sheet).save(options.sheet)
    print(json.dumps(figures) if options.json else json.dumps(figures, indent=2))


def ready_to_draw(host: DiffusersHost, options: argparse.Namespace) -> Pictures | None:
    """What draws and judges, or None where the judge has no weights."""
    try:
        return Pictures(host, Metrics(options.weights), options.pictures)
    except WeightsError as error:
        say(f"Pictures are left out: {error}")
        say("Make the judge: python -m miniature.training judges && python -m miniature.training judges --export")
        return None


def measured(
    host: DiffusersHost, pictures: Pictures | None, options: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """The figures of each arrangement."""
    wanted = {name: ARRANGEMENTS[name] for name in ([options.arrangement] if options.arrangement else ARRANGEMENTS)}
    needed = {thing for sets in wanted.values() for kinds in sets for thing in _things(kinds)}
    concepts = learned(host, sorted(needed), folder, config_of(options, *HEARING))
    figures: dict[str, Any] = {}
    for name, sets in wanted.items():
        stacks = [
            (things, ConceptStack(tuple(ConceptUse(concepts[thing]) for thing in things)))
            for things in map(_things, sets)
        ]
        found: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in ("paper", "competing", "told")}
        for kinds, (_, stack) in zip(sets, stacks, strict=True):
            texts = prompts(stack.placeholders, options.prompts, Random(f"{name} {kinds}"))
            texts = weighted(texts, stack.placeholders)
            read_gates(host, stack, texts, found)
        figures[name] = {
            way: {key: round(sum(values) / len(values), 4) for key, values in of_way.items()}
            for way, of_way in found.items()
        }
        if pictures:
            figures[name]["pictures"] = pictures.measured(name, stacks)
    return figures


def read_gates(
    host: DiffusersHost, stack: ConceptStack, texts: Sequence[str], found: dict[str, dict[str, list[float]]]
) -> None:
    """Add the readings of prompts to those of each way."""
    with torch.no_grad():
        context = host.text.encode_stack(texts, stack, weighted=True)[0]
        weighed = host.text.weighed(texts, stack, context)
    where = word_places(host, texts, stack)
    words = host.text.words(texts, stack, weighted=True)
    for way, of_way in found.items():
        edit = stack.edit(competing=way != "paper")
        with edit.told(words, weighed) if way == "told" else nullcontext():
            gates = edit.gates(context)
        for key, values in readings(gates, where).items():
            of_way[key] += values


def _things(kinds: Sequence[str]) -> list[Thing]:
    """Each super-category with a number, that of its further ones being higher."""
    return [(kind, kinds[:k].count(kind)) for k, kind in enumerate(kinds)]


def learned(host: DiffusersHost, things: Sequence[Thing], folder: Path, config: TrainingConfig) -> dict[Thing, Concept]:
    """A concept of each (super-category, number), from renders of scenes that show the thing alone."""
    statistics, concepts = None, {}
    for kind, number in tqdm(things, desc="concepts"):
        name = f"{kind.replace(' ', '-')}-{number}"
        path = kept_at(folder, name, config)
        if not path.exists():
            statistics = statistics or measure(host, host.captions or ())
            concept = learn(host, kind, photos_of((kind, number)), statistics, config, f"<my-{name}>")
            folder.mkdir(parents=True, exist_ok=True)
            concept.save(path)
            say(f"{name}: learned")
        concepts[kind, number] = load(path)
    return concepts


def prompts(words: Sequence[str], count: int, rng: Random) -> list[str]:
    """Texts with each word once, in any order: captions of the little world for two, lists with adjectives for more."""
    found = []
    while len(found) < count:
        shuffled = rng.sample(list(words), len(words))
        if len(words) == 2:
            seen = world.scene(rng, things=2)
            text = caption(rng, seen, nouns=["{0}", "{1}"]).text
            if "{0}" in text and "{1}" in text:
                found.append(text.format(*shuffled))
            continue
        named = [f"{rng.choice(ADJECTIVES).format(rng.choice(world.CATEGORY_NAMES))} {word}" for word in shuffled]
        found.append(rng.choice(LISTS).format(f"{', '.join(named[:-1])} and {named[-1]}"))
    return found


def word_places(host: DiffusersHost, texts: Sequence[str], stack: ConceptStack) -> Tensor:
    """Whose word each token is: (b, m), -1 for nobody's, -2 for start, end and padding."""
    words = host.text.words(texts, stack, weighted=True)
    where = torch.full(words.shape, -1)
    for j, placeholder in enumerate(stack.placeholders):
        where[words == word_number(placeholder)] = j
    # Any word of one token leaves the ends where they are.
    texts = ["".join(part for part, _ in weighted_parts(text)) for text in texts]
    for placeholder in stack.placeholders:
        texts = [text.replace(placeholder, "cat") for text in texts]
    padding = host.encode(texts).padding
    where[padding] = where[:, 0] = -2
    where[torch.arange(len(where)), (~padding).sum(1) - 1] = -2
    return where


def readings(gates: Tensor, where: Tensor) -> dict[str, list[float]]:
    """One number for each word, or pair, or ordinary word: see the module."""
    found: dict[str, list[float]] = defaultdict(list)
    for j in range(gates.shape[-1]):
        at_word = gates[where == j]
        found["own"] += (at_word[:, j] > OPEN).float().tolist()
        found["right"] += (at_word.argmax(-1) == j).float().tolist()
        others = torch.arange(gates.shape[-1]) != j
        found["cross"] += (at_word[:, others] > OPEN).float().flatten().tolist()
    found["others"] += (gates[where == -1].amax(-1) > OPEN).float().tolist()
    return found


if __name__ == "__main__":
    main()
