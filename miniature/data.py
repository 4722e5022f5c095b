"""Rendered scenes for training, drawn once and kept in a cache file: scene ``k`` of a seed is always the same."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .shapes import CATEGORIES
from .world import SIZE, Scene, instance, look_alike, render, scene

_CHUNK = 500


VIEWS = 4  # pictures of each personal thing in the pool of them
ALIKE = 4  # personal things that look alike, one after the other


def pool_scene(seed: str, index: int) -> Scene:
    """Scene ``index`` of a pool: "personal" shows personal things, ``VIEWS`` times each, the others show anything."""
    if seed == "personal":
        return personal_scene(index // VIEWS, Random(f"{seed} {index}"))
    return scene(Random(f"{seed} {index}"))


def personal_category(number: int) -> str:
    """The category of personal thing ``number``: the ``ALIKE`` things of a row share it."""
    return list(CATEGORIES)[number // ALIKE % len(CATEGORIES)]


def personal_scene(number: int, rng: Random) -> Scene:
    """Personal thing ``number`` somewhere, in half of the pictures beside another thing."""
    category, row = personal_category(number), number // ALIKE
    look = instance(category, row)
    if number % ALIKE:
        look = look_alike(look, Random(f"look-alike {number}"))
    seen = scene(rng, avoid=category)
    place = rng.randrange(len(seen.things))
    things = list(seen.things)
    things[place] = replace(
        things[place], category=category, look=look, color=None, pattern=None, second=None, name=None
    )
    return replace(seen, things=tuple(things))


def pool(folder: Path, seed: str, count: int, workers: int | None = None) -> Tensor:
    """Pictures (count, 64, 64, 3), uint8, from ``folder``; what is not there yet is drawn now.

    Interrupted, it goes on where it stopped: a pool is kept in files of 500 pictures.
    """
    folder = folder / seed
    folder.mkdir(parents=True, exist_ok=True)
    missing = [k for k in range(-(-count // _CHUNK)) if not (folder / f"{k}.npy").exists()]
    if missing:
        with ProcessPoolExecutor(workers or os.cpu_count()) as processes:
            jobs = processes.map(_draw, [folder] * len(missing), [seed] * len(missing), missing)
            for _ in tqdm(jobs, total=len(missing), desc=f"drawing {seed}", unit=f"x{_CHUNK}"):
                pass
    pictures = np.empty((count, SIZE, SIZE, 3), np.uint8)
    for start in range(0, count, _CHUNK):
        pictures[start : start + _CHUNK] = np.load(folder / f"{start // _CHUNK}.npy")[: count - start]
    return torch.from_numpy(pictures)


def _draw(folder: Path, seed: str, chunk: int) -> None:
    pictures = [np.asarray(render(pool_scene(seed, chunk * _CHUNK + k))) for k in range(_CHUNK)]
    temporary = folder / f"{chunk}.partial.npy"
    np.save(temporary, np.stack(pictures))
    temporary.replace(folder / f"{chunk}.npy")


def to_network(pictures: Tensor) -> Tensor:
    """uint8 (b, h, w, 3) -> float (b, 3, h, w) in -1..1."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
