"""How well the network's own attention finds a thing in its photos, where its mask is known: on the miniature.

    python -m benchmarks.masks [--json] [--photos 20] [--sheet FILE]

Three kinds of photos: of a personal thing as its owner would take them ("portrait"), of a thing of any size alone
("single"), and beside another thing ("beside"). For each: "iou" of mask and true mask, both cut at one half; "soft"
overlap, the sum of minima over the sum of maxima; "on_thing", the share of the loss weight that lies on the thing;
"covered", the mean weight of the thing's own places. Of masks by attention ("attention"), by cross-attention that is
not carried on by self-attention ("cross"), of an ellipse in the middle and of no mask at all. "contrast" is how much
attention tells the thing from the rest, beside that for a word of something that is not there; "without_mask" the share
of photos where it was too little. "choices": mean iou of all kinds with other noise levels and other percentiles.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from miniature import world
from miniature.host import load_host
from miniature.metrics import rendered
from miniature.weights import FOLDER, WeightsError
from perfusion.hosts.base import Word
from perfusion.hosts.diffusers import DiffusersHost
from perfusion.training import attention, masks

KINDS = ("portrait", "single", "beside")
LEVELS = ((0.2,), (0.4,), (0.8,), (1.6,), (0.2, 0.4, 0.6), (0.4, 0.8, 1.6), masks.LEVELS)
PERCENTILES = ((0.05, 0.95), (0.3, 0.9), (0.6, 0.98), (masks.LOW, masks.HIGH))
ELLIPSE = 0.65  # of the picture's sides


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masks", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one line of JSON alone")
    parser.add_argument("--photos", type=int, default=20, help="photos of each kind")
    parser.add_argument("--weights", type=Path, default=FOLDER)
    parser.add_argument("--sheet", type=Path, help="where photos, true masks and masks go, as .png")
    options = parser.parse_args()
    try:
        host = load_host(options.weights)
    except WeightsError as error:
        raise SystemExit(str(error)) from None
    started, photos = time.perf_counter(), {kind: photos_of(kind, options.photos) for kind in KINDS}
    figures: dict[str, Any] = {kind: measure(host, photos[kind]) for kind in KINDS}
    figures["choices"] = choices(host, photos)
    figures["seconds"] = round(time.perf_counter() - started)
    if options.sheet:
        _sheet(host, [photo for kind in KINDS for photo in photos[kind]]).save(options.sheet)
    print(json.dumps(figures) if options.json else json.dumps(figures, indent=2))


class Photo:
    """A photo, what is meant in it, and where that is: (64, 64), 0 to 1."""

    def __init__(self, scene: world.Scene, which: int):
        self.category = scene.things[which].category
        self.others = {thing.category for thing in scene.things}
        self.image = rendered([scene])[0]
        mask = world.masks(scene)[which]
        self.mask = torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(world.SIZE, -1).float() / 255


def photos_of(kind: str, count: int) -> list[Photo]:
    """``count`` photos of a kind; none was trained on as it is here."""
    rng, found = Random(f"masks {kind}"), []
    while len(found) < count:
        if kind == "portrait":
            category = world.CATEGORY_NAMES[len(found) % len(world.CATEGORY_NAMES)]
            look = world.instance(category, 3_000_000 + len(found))
            found.append(Photo(world.portrait(category, look, rng), 0))
            continue
        seen = world.scene(rng, things=1 if kind == "single" else 2)
        if seen.style == "photo":
            found.append(Photo(seen, len(found) % len(seen.things)))
    return found


def measure(host: DiffusersHost, photos: Sequence[Photo]) -> dict[str, Any]:
    """All masks of one kind of photos, beside each other."""
    truth = torch.stack([photo.mask for photo in photos])
    own = [found(host, photo, photo.category) for photo in photos]
    with patch.object(attention, "MOST_PLACES", 0):
        cross = [found(host, photo, photo.category) for photo in photos]
    absent = [found(host, photo, absent_from(photo)) for photo in photos]
    side = torch.linspace(-1, 1, world.SIZE)
    ellipse = ((side[:, None] ** 2 + side[None] ** 2) < ELLIPSE**2).float().expand_as(truth)
    return {
        "attention": overlap(torch.stack([mask for mask, _ in own]), truth),
        "cross": overlap(torch.stack([mask for mask, _ in cross]), truth),
        "ellipse": overlap(ellipse, truth),
        "none": overlap(torch.ones_like(truth), truth),
        "contrast": round(mean(contrast for _, contrast in own), 4),
        "contrast_absent": round(mean(contrast for _, contrast in absent), 4),
        "without_mask": sum(contrast < masks.FLAT for _, contrast in own) / len(own),
        "size": round(float(truth.mean()), 4),
    }


def choices(host: DiffusersHost, photos: dict[str, list[Photo]]) -> dict[str, float]:
    """Mean iou over all kinds with other settings."""
    table = {}
    for levels in LEVELS:
        with patch.object(masks, "LEVELS", levels):
            table[f"levels {' '.join(map(str, levels))}"] = _mean_iou(host, photos)
    for low, high in PERCENTILES:
        with patch.object(masks, "LOW", low), patch.object(masks, "HIGH", high):
            table[f"percentiles {low} {high}"] = _mean_iou(host, photos)
    return table


def found(host: DiffusersHost, photo: Photo, category: str) -> tuple[Tensor, float]:
    """The mask (64, 64) of a photo by attention to a word, however little that tells, and its contrast."""
    latents = host.encode_images(photo.image[None])
    word, caption = Word("<it>", category), "a photo of a <it>"
    soft, contrast = masks.soft_masks(host.attention_maps(latents, [caption], word, masks.LEVELS))
    resized = interpolate(soft[:, None], photo.image.shape[:2], mode="bilinear", antialias=True)
    return resized[0, 0], float(contrast)


def absent_from(photo: Photo) -> str:
    """What is not in a photo."""
    return next(category for category in world.CATEGORY_NAMES if category not in photo.others)


def overlap(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Means over photos of masks and true masks (n, h, w)."""
    cut, true = found >= 0.5, truth >= 0.5
    values = {
        "iou": (cut & true).sum((1, 2)) / (cut | true).sum((1, 2)),
        "soft": torch.minimum(found, truth).sum((1, 2)) / torch.maximum(found, truth).sum((1, 2)),
        "on_thing": (found * truth).sum((1, 2)) / found.sum((1, 2)),
        "covered": (found * truth).sum((1, 2)) / truth.sum((1, 2)),
    }
    return {name: round(float(value.mean()), 4) for name, value in values.items()}


def _mean_iou(host: DiffusersHost, photos: dict[str, list[Photo]]) -> float:
    kinds = []
    for some in photos.values():
        soft = torch.stack([found(host, photo, photo.category)[0] for photo in some])
        kinds.append(overlap(soft, torch.stack([photo.mask for photo in some]))["iou"])
    return round(mean(kinds), 4)


def _sheet(host: DiffusersHost, photos: Sequence[Photo], columns: int = 10, enlarged: int = 2) -> Image.Image:
    """Rows of photos, of what is left of them inside their true masks, and inside those by attention."""
    lines = [photos[start : start + columns] for start in range(0, len(photos), columns)]
    side = world.SIZE * enlarged
    sheet = Image.new("RGB", (columns * side, 3 * len(lines) * side), "white")
    for y, line in enumerate(lines):
        for x, photo in enumerate(line):
            own = found(host, photo, photo.category)[0]
            for z, mask in enumerate((None, photo.mask, own)):
                pixels = (masks.dimmed(photo.image, mask) * 255).round().to(torch.uint8).numpy()
                picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(picture, (x * side, (3 * y + z) * side))
    return sheet


if __name__ == "__main__":
    main()
