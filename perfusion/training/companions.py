"""Pictures of a thing beside other things, so that it is also learned as one of two.

Photos mostly show a thing alone, and what is learned of them shows less where the thing is named second
(``benchmarks.multi_concept``). So photos are put side by side with pictures that the model itself draws of other
things, as Han et al. (2023, SVDiff) do with photos of two concepts, each in half of a square; what is named first
stands on the left, as in most captions. The mask is that of the thing: nothing is learned of what stands beside it, or
of where the halves meet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..hosts.base import Host
from ..sampling import latent_shape, pictures_of
from .config import TrainingConfig
from .dataset import Photos, best_window, cropped, is_plain, photo_and_mask, prepare
from .masks import given
from .trainer import Subject

# What most models draw well, and what begins with a consonant.
NOUNS = (
    "cat", "dog", "car", "house", "bird", "fish", "robot", "boat", "mushroom", "cup", "chair", "tree", "teapot",
    "bicycle", "lamp", "backpack", "guitar", "flower", "clock", "horse", "rabbit", "shoe", "bottle", "cake",
)  # fmt: skip
_DRAWN = "a photo of a {}"
_CAPTIONS = (
    "a photo of {} and {}",
    "a photo of {} next to {}",
    "{} and {}",
    "a picture of {} beside {}",
    "{} with {}",
    "a good photo of {} and {}",
)
_STEPS, _GUIDANCE, _AT_ONCE = 16, 5.0, 4
_SMALLEST, _LARGEST = 0.6, 0.75  # sides of what stands in half of a picture, in sides of the picture


@dataclass(frozen=True)
class Lesson:
    """What a concept is learned from: photos, their masks, and a subject with captions of each; of these, the last
    ``made`` are put together."""

    images: tuple[Tensor, ...]
    masks: tuple[Tensor | None, ...] | None
    subject: Subject
    made: int


def learned_from(
    host: Host,
    images: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None,
    subject: Subject,
    config: TrainingConfig,
    progress: Callable[[int, int], None] | None = None,
    *,
    buckets: bool = False,
) -> tuple[Photos, Subject]:
    """Photos ready for training (``dataset.prepare``) with their companions, and the subject with captions of all.

    ``progress`` is called of both in turn, and may raise to stop. To be used outside ``host.training()``. Raises
    ValueError as both do.
    """
    count, at_once = config.companions, config.drawn_at_once
    lesson = with_companions(
        host, images, masks, subject, count, config.resolution, config.seed, progress, at_once=at_once
    )
    photos = prepare(host, lesson.images, lesson.masks, config.resolution, progress, buckets=buckets, made=lesson.made)
    return photos, lesson.subject


def with_companions(
    host: Host,
    images: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None,
    subject: Subject,
    count: int,
    resolution: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    *,
    at_once: int = _AT_ONCE,
) -> Lesson:
    """Photos and masks, as for ``dataset.prepare``, with ``count`` pictures behind them that show the thing beside
    others; none where the encoders know no other things. The same seed gives the same pictures.

    ``progress`` is called before each step of drawing, and may raise to stop; ``at_once``, at most 4, are drawn
    together. To be used outside ``host.training()``. Raises ValueError for an image that is not one, or captions that
    are not one for each photo, and MaskError for an unusable mask, all before anything is drawn.
    """
    of_photo = list(subject.of_photo or [""] * len(images))
    if len(of_photo) != len(images):
        raise ValueError(f"{len(images)} photos but {len(of_photo)} captions: give one caption for each photo, or none")
    given(masks, len(images))  # raises where they are not one for each
    if not count:
        return Lesson(tuple(images), None if masks is None else tuple(masks), subject, 0)
    own_masks = [None] * len(images) if masks is None else list(masks)
    usable = [k for k, image in enumerate(images) if not is_plain(photo_and_mask(image, own_masks[k], k)[0])]
    rng, nouns = Random(f"companions {seed}"), things_beside(host, subject)
    rng.shuffle(nouns)
    if not (usable and nouns):
        return Lesson(tuple(images), None if masks is None else tuple(masks), subject, 0)
    wanted, at_once = [nouns[k % len(nouns)] for k in range(count)], min(at_once, _AT_ONCE)
    with host.training():
        drawn = _drawn(host, wanted, resolution, rng, at_once, progress)
    pictures, marks, captions = [], [], []
    for number, companion in enumerate(drawn):
        photo, first = usable[number % len(usable)], number % 2 == 0
        own, mask = _half(*_square(images[photo], own_masks[photo], photo, resolution), rng)
        other, _ = _half(companion, torch.ones(resolution, resolution), rng)
        nothing = torch.zeros_like(mask)
        pictures.append(torch.cat([own, other] if first else [other, own], 1))
        marks.append(torch.cat([mask, nothing] if first else [nothing, mask], 1))
        names = ["a {}", f"a {wanted[number]}"]
        captions.append("\n".join(text.format(*(names if first else names[::-1])) for text in _CAPTIONS))
    return Lesson(
        (*images, *pictures),
        (*own_masks, *marks),
        replace(subject, of_photo=[*of_photo, *captions]),
        len(pictures),
    )


def things_beside(host: Host, subject: Subject) -> list[str]:
    """Other things that the encoders know."""
    known = None if host.captions is None else set(re.findall(r"\w+", " ".join(host.captions).lower()))
    own = set(re.findall(r"\w+", subject.super_category.lower()))
    return [noun for noun in NOUNS if noun not in own and (known is None or noun in known)]


def _drawn(
    host: Host,
    nouns: Sequence[str],
    size: int,
    rng: Random,
    at_once: int,
    progress: Callable[[int, int], None] | None,
) -> list[Tensor]:
    """A picture (size, size, 3) of each thing, on the CPU."""
    seeds, pictures, done = [rng.getrandbits(32) for _ in nouns], [], 0

    def between() -> None:
        nonlocal done
        if progress is not None:
            progress(done, _STEPS * -(-len(nouns) // at_once))
        done += 1

    with torch.no_grad():
        shape = latent_shape(host, size)
        for start in range(0, len(nouns), at_once):
            part = slice(start, start + at_once)
            prompts = [_DRAWN.format(noun) for noun in nouns[part]]
            text = host.encode([*prompts, *[""] * len(prompts)]).to(host.device)
            pictures += pictures_of(host, text, seeds[part], shape, None, _STEPS, _GUIDANCE, between).unbind()
    return pictures


def _square(image: Tensor, mask: Tensor | None, number: int, side: int) -> tuple[Tensor, Tensor]:
    """A photo (side, side, 3), cropped to its thing, and where that is: (side, side), 0 to 1."""
    rgb, soft, _ = cropped(*photo_and_mask(image, mask, number), (side, side))
    return rgb[0].permute(1, 2, 0), soft[0, 0]


def _half(picture: Tensor, mask: Tensor, rng: Random) -> tuple[Tensor, Tensor]:
    """A square picture (side, side, 3), smaller, on the ground of half a picture (side, side / 2, 3), and its mask.

    What is above is continued from its uppermost row.
    """
    side = len(picture)
    width = side // 2
    across = float((mask.amax(0) > 0.5).float().mean())
    size = round(side * max(0.5, min(rng.uniform(_SMALLEST, _LARGEST), 0.48 / max(across, 0.1))))
    small = interpolate(picture.permute(2, 0, 1)[None], (size, size), mode="bilinear", antialias=True)[0]
    marked = interpolate(mask[None, None], (size, size), mode="bilinear", antialias=True)[0, 0]
    left = best_window(marked.sum(0), width)
    small, marked = small[..., left : left + width].permute(1, 2, 0), marked[:, left : left + width]
    above = side - size
    return (
        torch.cat([small[:1].expand(above, width, 3), small]),
        torch.cat([torch.zeros(above, width), marked]),
    )
