"""A concept on another checkpoint than it was learned on: its values as they were learned, or following the model.

    python -m benchmarks.relock --other FOLDER [--json] [--concepts 8] [--prompts 8] [--steps 150]

FOLDER holds the weights of a second miniature, trained differently: copy ``miniature/weights``, train on with
``python -m miniature.training unet --from-weights --seed 1`` and export. Concepts are learned on each of the two and
drawn on the other: "as_learned" with o*_V itself, "following" with o*_V - W_V e_super added to the other model's own
W_V e_super, beside concepts "learned_there" and the plain "super_category". Keys follow the model either way.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import mean

from torch import Tensor
from tqdm import tqdm

from miniature import world
from miniature.host import load_host
from miniature.metrics import Metrics, rendered
from miniature.weights import FOLDER, WeightsError
from perfusion.concept import Concept
from perfusion.hosts.diffusers import DiffusersHost, draw
from perfusion.stack import ConceptStack, ConceptUse
from perfusion.statistics import TextStatistics, measure
from perfusion.training.config import TrainingConfig

from .quality import PHOTOS, PLACEHOLDER, SAMPLER, learn, prompts_for
from .settings import config_of


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.relock", description=__doc__)
    parser.add_argument("--other", type=Path, required=True, help="weights of a second miniature")
    parser.add_argument("--json", action="store_true", help="one line of JSON alone")
    parser.add_argument("--concepts", type=int, default=8, help="personal things to learn on each")
    parser.add_argument("--prompts", type=int, default=8, help="prompts for each of them")
    parser.add_argument("--steps", type=int, default=150, help="training steps for each of them")
    options = parser.parse_args()
    try:
        hosts, metrics = (load_host(FOLDER), load_host(options.other)), Metrics(FOLDER)
    except WeightsError as error:
        raise SystemExit(str(error)) from None
    config = config_of(options)
    statistics = [measure(host, host.captions or ()) for host in hosts]
    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in tqdm(range(options.concepts), desc="concepts"):
        compare(hosts, statistics, metrics, number, options.prompts, config, figures)
    result = {way: {name: round(mean(each), 4) for name, each in rows.items()} for way, rows in figures.items()}
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


def compare(
    hosts: tuple[DiffusersHost, DiffusersHost],
    statistics: Sequence[TextStatistics],
    metrics: Metrics,
    number: int,
    count: int,
    config: TrainingConfig,
    figures: Mapping[str, Mapping[str, list[float]]],
) -> None:
    """One personal thing, learned on either model and drawn on the other; adds to ``figures``."""
    category = world.CATEGORY_NAMES[number % len(world.CATEGORY_NAMES)]
    look, photos = world.instance(category, 3_000_000 + number), world.portraits(category, 3_000_000 + number, PHOTOS)
    shown = rendered(photos)
    learned = [learn(host, category, photos, each, config) for host, each in zip(hosts, statistics, strict=True)]
    prompts = prompts_for(category, count, Random(f"relock {number}"))
    seeds = [1000 * number + k for k in range(count)]

    def judged(way: str, host: DiffusersHost, concept: Concept | None) -> None:
        stack = ConceptStack(() if concept is None else (ConceptUse(concept),))
        texts = [each.naming(PLACEHOLDER if concept else category) for each in prompts]
        pictures = draw(host, stack, texts, seeds, **SAMPLER)
        asked = [each.naming(category) for each in prompts]
        for name, value in metrics.of_concept(pictures, shown, category, look, asked).items():
            figures[way][name].append(value)

    for home, away in ((0, 1), (1, 0)):
        there = hosts[away]
        judged("as_learned", there, as_learned(learned[home], hosts[home]))
        judged("following", there, learned[home])
        judged("learned_there", there, learned[away])
        judged("super_category", there, None)


def as_learned(concept: Concept, host: DiffusersHost) -> Concept:
    """The concept, learned on this model, with o*_V itself in place of what is added to W_V e_super."""
    own: dict[str, Tensor] = host.project_values(concept.e_super.unsqueeze(0))
    values = {layer: values + own[layer].squeeze(0) for layer, values in concept.o_star_v.items()}
    return replace(concept, o_star_v=values, anchored=False)


if __name__ == "__main__":
    main()
