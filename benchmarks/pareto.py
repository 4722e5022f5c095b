"""One trained file, the whole trade-off: likeness and obedience over the bias, without training again.

    python -m benchmarks.pareto [--json] [--concepts 8] [--prompts 16] [--steps 250] [--temperature .15] [--lock local]
                                [--folder DIR]

Personal things are learned on the miniature as in ``benchmarks.quality`` and drawn from the same prompts and noise at
each bias. "image" is the mean cosine to the photos, "text" that to the prompt with the super-category in the word's
place, "similarity" and "identity" the judge's; each with the standard error, over the things, of its change from the
bias before. A curve is monotonic within noise where no change goes the wrong way by more than two of these. Concepts
are kept in ``--folder``, and not learned again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import torch
from tqdm import tqdm

from miniature import world
from miniature.host import load_host
from miniature.metrics import Metrics, rendered
from miniature.weights import FOLDER, WeightsError
from perfusion.concept import load
from perfusion.edit import Gate
from perfusion.hosts.diffusers import DiffusersHost, draw
from perfusion.locking import LOCKS
from perfusion.stack import ConceptStack, ConceptUse
from perfusion.statistics import measure

from .quality import PHOTOS, PLACEHOLDER, SAMPLER, kept_at, learn, prompts_for
from .settings import add_settings, config_of

BIASES = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4)
FALLS = {"image": True, "similarity": True, "identity": True, "text": False}  # with a rising bias


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pareto", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one line of JSON alone")
    parser.add_argument("--concepts", type=int, default=8, help="personal things to learn")
    parser.add_argument("--prompts", type=int, default=16, help="prompts for each of them")
    add_settings(parser)
    parser.add_argument("--temperature", type=float, default=Gate.temperature)
    parser.add_argument("--lock", choices=LOCKS, default="local")
    parser.add_argument("--folder", type=Path, help="where learned concepts are kept, and looked for")
    parser.add_argument("--weights", type=Path, default=FOLDER)
    options = parser.parse_args()
    try:
        host, metrics = load_host(options.weights), Metrics(options.weights)
    except WeightsError as error:
        raise SystemExit(str(error)) from None
    with tempfile.TemporaryDirectory() as temporary:
        curves = measured(host, metrics, options, options.folder or Path(temporary))
    figures = summary(torch.tensor(curves))
    print(json.dumps(figures) if options.json else json.dumps(figures, indent=2))


def measured(
    host: DiffusersHost, metrics: Metrics, options: argparse.Namespace, folder: Path
) -> list[list[list[float]]]:
    """For each thing and bias, the measures of ``FALLS``."""
    config = config_of(options)
    statistics, curves = None, []
    for number in tqdm(range(options.concepts), desc="concepts"):
        category = world.CATEGORY_NAMES[number % len(world.CATEGORY_NAMES)]
        thing = 5_000_000 + number
        look, photos = world.instance(category, thing), world.portraits(category, thing, PHOTOS)
        path = kept_at(folder, f"{category.replace(' ', '-')}-{thing}", config)
        if not path.exists():
            statistics = statistics or measure(host, host.captions or ())
            concept = learn(host, category, photos, statistics, config)
            folder.mkdir(parents=True, exist_ok=True)
            concept.save(path)
        concept = load(path)
        shown, prompts = rendered(photos), prompts_for(category, options.prompts, Random(f"pareto {number}"))
        seeds, asked = range(1000 * number, 1000 * number + len(prompts)), [p.naming(category) for p in prompts]
        curve = []
        for bias in BIASES:
            use = ConceptUse(concept, Gate(bias=bias, temperature=options.temperature), options.lock)
            pictures = draw(host, ConceptStack((use,)), [p.naming(PLACEHOLDER) for p in prompts], seeds, **SAMPLER)
            found = metrics.of_concept(pictures, shown, category, look, asked)
            curve.append([found[name] for name in FALLS])
        curves.append(curve)
    return curves


def summary(curves: torch.Tensor) -> dict[str, Any]:
    """Figures of curves (things, biases, measures as in ``FALLS``): means, changes, and whether any goes wrong."""
    change = curves.diff(dim=1)
    error = change.std(0) / len(curves) ** 0.5
    figures: dict[str, Any] = {"bias": list(BIASES)}
    for k, (name, falls) in enumerate(FALLS.items()):
        wrong = change.mean(0)[:, k] * (1 if falls else -1)
        figures[name] = {
            "mean": [round(value, 4) for value in curves.mean(0)[:, k].tolist()],
            "error_of_change": [round(value, 4) for value in error[:, k].tolist()],
            "monotonic": bool((wrong <= 0).all()),
            "monotonic_within_noise": bool((wrong <= 2 * error[:, k]).all()),
        }
    return figures


if __name__ == "__main__":
    main()
