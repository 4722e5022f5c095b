"""What each part of the miniature's pipeline takes: time, and the most memory its process held.

    python -m benchmarks.pipeline [--json] [--steps 8] [--only unet ...]

Each part runs in a process of its own: drawing pictures of the world, a training step of each network at the batch that
it was trained with, encoding pictures for the denoiser, a step of learning a concept as Train Concept and the demo do
it, and a picture of 20 steps with guidance. Seconds are medians over ``--steps`` repetitions after a first one, which
sets things up; memory (MiB) is that of the whole process, with Python, torch and the pictures it works on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.multiprocessing import get_context

from .host import peak_bytes, say

PICTURES = 1000  # of the world, to train on
Clock = Callable[[], None]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one line of JSON alone")
    parser.add_argument("--steps", type=int, default=8, help="repetitions of each part")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    figures: dict[str, Any] = {"threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as cache:
        for name in options.only:
            # Of its own: memory has no other reset, and some parts start processes themselves.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                figures[name] = pool.submit(measured, name, Path(cache), options.steps).result()
            say(f"{name}: {figures[name]}")
    print(json.dumps(figures) if options.json else json.dumps(figures, indent=2))


def measured(name: str, cache: Path, steps: int) -> dict[str, float]:
    """One part, in this process: median seconds of a repetition, of one of its ``items``, and peak memory."""
    stamps: list[float] = []
    items = PARTS[name](cache, steps + 1, lambda: stamps.append(time.perf_counter()))
    times = [after - before for before, after in zip(stamps, stamps[1:], strict=False)]
    seconds = statistics.median(times[1:])
    return {
        "items": items,
        "seconds": round(seconds, 3),
        "seconds_each": round(seconds / items, 5),
        "peak_mib": round(peak_bytes() / 2**20),
    }


def _network(part: str, batch: int) -> Callable[[Path, int, Clock], int]:
    """A training step of one network. Training beside this one, whose steps are fewer, would have another schedule."""

    def run(cache: Path, steps: int, tick: Clock) -> int:
        from argparse import Namespace

        from miniature.training.run import Run
        from miniature.training.start import start

        train = Run.train

        def ticking(self: Run, loss_of: Callable[[torch.Generator], torch.Tensor]) -> None:
            def timed(generator: torch.Generator) -> torch.Tensor:
                tick()
                return loss_of(generator)

            train(self, timed)

        Run.train = ticking
        start(
            Namespace(
                part=part,
                export=False,
                cache=cache,
                steps=steps + 1,
                rate=None,
                batch=batch,
                pictures=PICTURES,
                compile=False,
                from_weights=True,
                seed=0,
                processes=1,
            )
        )
        return batch

    return run


def _pictures(cache: Path, steps: int, tick: Clock) -> int:
    from miniature.world import render, scene

    count, rng = 50, Random("pipeline")
    for _ in _repeated(steps, tick):
        for _ in range(count):
            render(scene(rng))
    return count


def _latents(cache: Path, steps: int, tick: Clock) -> int:
    from miniature.data import pool, to_network
    from miniature.training.run import autocast
    from miniature.weights import load_vae

    some, vae = pool(cache, "train", PICTURES)[:100], load_vae().to(memory_format=torch.channels_last)
    for _ in _repeated(steps, tick):
        with torch.no_grad(), autocast():
            vae.encode(to_network(some).to(memory_format=torch.channels_last))
    return len(some)


def _concept(cache: Path, steps: int, tick: Clock) -> int:
    from miniature import world
    from miniature.host import load_host
    from miniature.metrics import rendered
    from perfusion.statistics import measure
    from perfusion.training.config import TrainingConfig
    from perfusion.training.dataset import prepare
    from perfusion.training.trainer import Subject, Trainer

    from .quality import PHOTOS, PLACEHOLDER, thing_masks

    host, config = load_host(), TrainingConfig(micro_batch=0, resolution=world.SIZE)
    photos = world.portraits("cat", 6_000_000, PHOTOS)
    ready = prepare(host, list(rendered(photos)), thing_masks(photos), config.resolution)
    with host.training():
        trainer = Trainer(host, ready, Subject(PLACEHOLDER, "cat"), measure(host, host.captions or ()), config)
        for _ in _repeated(steps, tick):
            trainer.step()
    return config.batch_size


def _drawing(cache: Path, steps: int, tick: Clock) -> int:
    from miniature.host import load_host
    from perfusion.hosts.diffusers import draw
    from perfusion.stack import ConceptStack

    from .quality import SAMPLER

    host, prompts = load_host(), ["a photo of a cat on the beach"] * 8
    for _ in _repeated(steps, tick):
        draw(host, ConceptStack(), prompts, range(len(prompts)), **SAMPLER)
    return len(prompts)


def _repeated(steps: int, tick: Clock) -> Iterator[None]:
    """Ticks before each of so many repetitions, and at their end."""
    for _ in range(steps):
        tick()
        yield
    tick()


# What each part is called -> how it is run; returns how many items one repetition is of.
PARTS: dict[str, Callable[[Path, int, Clock], int]] = {
    "pictures": _pictures,
    "vae": _network("vae", 32),
    "text": _network("text", 128),
    "latents": _latents,
    "unet": _network("unet", 64),
    "judges": _network("judges", 192),
    "concept": _concept,
    "drawing": _drawing,
}

if __name__ == "__main__":
    main()
