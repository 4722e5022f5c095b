"""A training of seconds on the host in miniature."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from perfusion.corpus import captions
from perfusion.statistics import TextStatistics, measure
from perfusion.training.config import TrainingConfig
from perfusion.training.dataset import Photos, prepare
from perfusion.training.trainer import Subject, Trainer
from tests.unit.fake_host import FakeHost

BEAR = Subject("<bear>", "bear")
TWO_ENCODERS = {"clip_l": 12, "clip_g": 6}


def settings(**changes: Any) -> TrainingConfig:
    small = {"steps": 20, "batch_size": 4, "micro_batch": 0, "resolution": 64, "contexts": 16}
    return TrainingConfig(**{**small, **changes})


@cache
def photos() -> Photos:
    draw = torch.Generator().manual_seed(3)
    images = [0.2 + 0.6 * torch.rand(64, 64, 3, generator=draw).round() for _ in range(3)]
    masks = [torch.zeros(64, 64) for _ in images]
    for k, mask in enumerate(masks):
        mask[8 * k : 8 * k + 40, 4:50] = 1
    return prepare(FakeHost(), images, masks, 64)


def other_photos(**tensors: Tensor) -> Photos:
    """The same photos, with other latents or weights."""
    (bucket,) = photos().buckets
    return replace(photos(), buckets=(replace(bucket, **tensors),))


@cache
def statistics(two_encoders: bool = False) -> TextStatistics:
    return measure(FakeHost(encoders=TWO_ENCODERS) if two_encoders else FakeHost(), captions(100))


def a_trainer(
    subject: Subject = BEAR, host: FakeHost | None = None, pictures: Photos | None = None, **changes: Any
) -> Trainer:
    """A trainer whose host is loaded, as inside ``host.training()``."""
    loaded = FakeHost() if host is None else host
    loaded.in_training = True
    used = statistics(len(loaded.encoders) == 2)
    return Trainer(loaded, pictures or photos(), subject, used, settings(**changes))
