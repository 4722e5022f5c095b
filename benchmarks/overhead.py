"""How much longer sampling takes with concepts than on the unpatched model.

    python -m benchmarks.overhead [--full] [--rounds N] [--json]

All variants take turns in one run, in a new order each round; a variant's figure is the median, over the rounds, of
its time divided by the mean of the unpatched runs right before and after it. ``--full`` uses the UNet of SD1.5 at full
size and 512 px instead of a reduced one at 256 px.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .host import comfyui, now, random_concepts, random_unet, say

COUNTS = (0, 1, 2, 8, 16)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--full", action="store_true", help="full-size SD1.5 at 512 px")
    parser.add_argument("--rounds", type=int, default=0, help="turns of all variants (15, with --full 7)")
    parser.add_argument("--steps", type=int, default=0, help="sampler steps of each run (4, with --full 1)")
    parser.add_argument("--json", action="store_true", help="one JSON line")
    options = parser.parse_args()
    rounds = options.rounds or (7 if options.full else 15)
    steps = options.steps or (1 if options.full else 4)
    with comfyui() as pack, torch.inference_mode():
        figures = measure(pack, options.full, rounds, steps)
    if options.json:
        print(json.dumps(figures))
    else:
        for name, ratio in figures["ratio"].items():
            print(
                f"{name:>3} concepts: {ratio:.4f} of the unpatched time, {figures['cpu_ratio'][name]:.4f} in CPU time"
            )


def measure(pack: Any, full: bool, rounds: int, steps: int) -> dict[str, Any]:
    """Ratios of wall and CPU time by number of concepts, and what they were measured on."""
    say(f"building a {'full-size' if full else 'reduced'} SD1.5 UNet of random weights")
    model = random_unet(full)
    apply = pack.module("perfusion.hosts.comfyui.apply")
    stack, concepts = pack.module("perfusion.stack").ConceptStack, random_concepts(pack, model, max(COUNTS)).uses
    variants = {"base": model} | {str(count): apply.apply_to_model(model, stack(concepts[:count])) for count in COUNTS}
    size = 64 if full else 32
    context, empty = torch.randn(1, 77, 768), torch.randn(1, 77, 768)
    sampler = pack.nodes["KSampler"]()

    def sample(patcher: Any) -> None:
        latent = {"samples": torch.zeros(1, 4, size, size)}
        sampler.sample(patcher, 1, steps, 4.0, "euler", "normal", [[context, {}]], [[empty, {}]], latent, 1.0)

    order, shuffled = [str(count) for count in COUNTS], random.Random(0)
    say("warming up")
    for patcher in variants.values():
        sample(patcher)
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in order}
    base_seconds = []
    for number in range(rounds):
        shuffled.shuffle(order)
        before = timed(lambda: sample(variants["base"]))
        for name in order:
            now = timed(lambda name=name: sample(variants[name]))
            after = timed(lambda: sample(variants["base"]))
            wall, cpu = (2 * n / (b + a) for n, b, a in zip(now, before, after, strict=True))
            ratios[name].append((wall, cpu))
            base_seconds.append(after[0])
            before = after
        say(f"round {number + 1} of {rounds}: {base_seconds[-1]:.2f} s a run")
    return {
        "ratio": {str(c): round(statistics.median(w for w, _ in ratios[str(c)]), 4) for c in COUNTS},
        "cpu_ratio": {str(c): round(statistics.median(p for _, p in ratios[str(c)]), 4) for c in COUNTS},
        "spread": {str(c): [round(f(w for w, _ in ratios[str(c)]), 4) for f in (min, max)] for c in COUNTS},
        "model": "SD1.5 UNet, random weights" if full else "reduced SD1.5 UNet, random weights",
        "pixels": size * 8,
        "steps": steps,
        "rounds": rounds,
        "base_seconds": round(statistics.median(base_seconds), 3),
        "threads": torch.get_num_threads(),
        "device": str(model.load_device),
    }


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = now(), time.process_time()
    work()
    return now() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
