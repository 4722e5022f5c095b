"""The judge: told what scenes show, and which pictures show the same personal thing among ones that look alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate

from ..backgrounds import BACKGROUNDS
from ..data import ALIKE, VIEWS, pool, pool_scene, to_network
from ..judge import CATEGORY_NAMES, COLOR_NAMES, WORN, Judge, Verdict
from ..styles import STYLES
from ..world import PATTERNS, Scene
from .run import Run, autocast, begin_with_weights, device

NOT_ASKED = -100
TEMPERATURE = 0.1


def train(
    cache: Path,
    steps: int,
    rate: float,
    batch: int,
    pictures: int,
    start_from_weights: bool = False,
    seed: int = 0,
) -> None:
    """Train on ``pictures`` scenes and as many of personal things; the checkpoint goes to ``cache/judges``.

    Half as many of the former as of the latter are in a batch of ``batch``: what has a name is learned soon.
    ``start_from_weights``: a new run begins with the weights that ship, not at random.
    """
    torch.manual_seed(seed)
    judge: Any = Judge()
    judge.to(device(), memory_format=torch.channels_last)
    if start_from_weights:
        begin_with_weights(judge, "judge")
    run = Run(cache / "judges", {"judge": judge}, steps=steps, rate=rate, seed=seed, ema=0.998, weight_decay=0.05)
    data, told = pool(cache, "train", pictures), labels([pool_scene("train", k) for k in range(pictures)])
    personal = pool(cache, "personal", pictures)
    kinds = len(CATEGORY_NAMES)
    rows = len(personal) // (ALIKE * VIEWS)
    named_count = batch // 3

    def loss_of(generator: torch.Generator) -> Tensor:
        index = torch.randint(pictures, (named_count,), generator=generator)
        # All of one category: it is from these that a thing has to be told apart.
        kind = int(torch.randint(kinds, (1,), generator=generator))
        drawn = torch.randperm(rows // kinds, generator=generator)[: (batch - named_count) // (ALIKE * 2)]
        some = drawn * kinds + kind
        views = torch.stack([torch.randperm(VIEWS, generator=generator)[:2] for _ in range(ALIKE * len(some))])
        things = (some[:, None] * ALIKE + torch.arange(ALIKE)).flatten()
        shown = (things[:, None] * VIEWS + views).flatten()
        x = torch.cat([to_network(data[index]), to_network(personal[shown])])
        x = _worsened(x, generator).to(device(), memory_format=torch.channels_last)
        with autocast():
            verdict = judge(x)
        own = verdict.identity[named_count:, kind].float()
        named = Verdict(**{name: value[:named_count].float() for name, value in vars(verdict).items()})
        return named_loss(named, {k: v[index].to(device()) for k, v in told.items()}) + _contrast(own)

    run.train(loss_of)


def labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """What each scene shows: indices into the judge's lists, ``NOT_ASKED`` where there is nothing to say."""
    n, k = len(scenes), len(CATEGORY_NAMES)
    present, worn, color, pattern = (torch.full((n, k), fill) for fill in (0, NOT_ASKED, NOT_ASKED, NOT_ASKED))
    for row, seen in enumerate(scenes):
        for thing in seen.things:
            c = CATEGORY_NAMES.index(thing.category)
            present[row, c] = 1
            worn[row, c] = WORN.index(thing.accessory or "nothing")
            if thing.color is not None:
                color[row, c] = COLOR_NAMES.index(thing.color)
            if thing.pattern is not None:
                pattern[row, c] = PATTERNS.index(thing.pattern)
    return {
        "background": torch.tensor([BACKGROUNDS.index(seen.background) for seen in scenes]),
        "style": torch.tensor([STYLES.index(seen.style) for seen in scenes]),
        "present": present,
        "worn": worn,
        "color": color,
        "pattern": pattern,
    }


def named_loss(verdict: Verdict, told: dict[str, Tensor]) -> Tensor:
    """How wrong a verdict is about what has a name."""
    loss = binary_cross_entropy_with_logits(verdict.present, told["present"].float())
    for name in ("background", "style", "worn", "color", "pattern"):
        logits = getattr(verdict, name)
        loss = loss + cross_entropy(logits.flatten(0, -2), told[name].flatten(), ignore_index=NOT_ASKED)
    return loss


def _contrast(own: Tensor) -> Tensor:
    """Two views of a thing, pairs in (2n, e), lie together, away from all others."""
    logits = own @ own.T / TEMPERATURE
    itself = torch.eye(len(own), dtype=torch.bool, device=own.device)
    logits = logits.masked_fill(itself, float("-inf"))
    return cross_entropy(logits, torch.arange(len(own), device=own.device) ^ 1)


def _worsened(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures a little blurred, noisy and off in color, as generated ones are."""
    b = len(x)
    small = interpolate(interpolate(x, scale_factor=0.5, mode="area"), scale_factor=2.0, mode="bilinear")
    blur = torch.rand(b, 1, 1, 1, generator=generator) * 0.9
    light = 1 + 0.1 * torch.randn(b, 3, 1, 1, generator=generator)
    x = (x * (1 - blur) + small * blur) * light + 0.05 * torch.randn(b, 3, 1, 1, generator=generator)
    grain = torch.rand(b, 1, 1, 1, generator=generator) * 0.08
    return (x + grain * torch.randn(x.shape, generator=generator)).clamp(-1, 1)
