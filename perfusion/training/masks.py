"""Masks of a thing where none are given: from where the network itself looks for what kind of thing it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..hosts.base import Host, Word
from .attention import Size
from .dataset import EMPTY, STEP, MaskError, as_rgb, latent_scale
from .trainer import Subject, require_words

# Chosen by benchmarks.masks, on pictures whose masks are known; levels from 0.2 to 0.6 are as good there.
LEVELS = (0.4, 0.6, 0.8)  # sigmas: noise enough that a picture is looked at as a whole, little enough to show edges
LOW, HIGH = 0.5, 0.95  # shares of all places: those that are looked at less are background, those above are the thing
# Maps are coarse and miss parts of a thing: no place is left without weight, so that all of it is learned.
FLOOR = 0.05
FLAT = 0.01  # contrast below which a map says nothing; networks of random weights stay below 0.001

PLACEHOLDER = "<thing>"
_CAPTION = f"a photo of a {PLACEHOLDER}"
_LONGEST = 3.0  # how many times as long as wide a photo is looked at; beyond, it is squeezed


@dataclass(frozen=True)
class Masks:
    """A mask (height, width) for each photo, of its size, 0 to 1; None for a photo whose whole counts.

    ``confidence``, 0 to 1: how much more the thing is looked at than the rest, (in - out) / (in + out); 1 for masks
    that were given, 0 where there is none. ``notes`` tells a user what was made, and what could not be.
    """

    masks: tuple[Tensor | None, ...]
    confidence: tuple[float, ...]
    notes: tuple[str, ...]


def attention_masks(
    host: Host,
    images: Sequence[Tensor],
    super_category: str,
    resolution: int,
    masks: Sequence[Tensor | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Masks:
    """Soft masks by the network's attention to the super-category, for photos that have no mask of their own.

    ``images``: each (height, width, channels) in 0..1, as for ``dataset.prepare``; each is looked at as a whole, at
    about ``resolution`` squared pixels. ``masks``: those there are; an empty one counts as none, as what Load Image
    gives for a picture without one, and transparency as one. To be used inside ``host.training()`` or outside.

    Raises ValueError for an image that is not one, TrainingError for a super-category that is no word.
    """
    require_words(host, Subject(PLACEHOLDER, super_category))
    report = progress or (lambda done, total: None)
    word, step, total = Word(PLACEHOLDER, super_category), STEP * latent_scale(host), 2 * len(images)
    found: list[Tensor | None] = []
    confidence: list[float] = []
    groups: dict[Size, list[tuple[int, Size, Tensor]]] = {}
    for number, (image, mask) in enumerate(zip(images, given(masks, len(images)), strict=True)):
        rgb, transparency = as_rgb(image, number)
        found.append(transparency if mask is None else mask)
        confidence.append(0.0 if found[-1] is None else 1.0)
        if found[-1] is None:
            shape = (rgb.shape[-2], rgb.shape[-1])
            size = _looked_at(shape, resolution, step)
            small = interpolate(rgb, size, mode="bicubic", antialias=True).clamp(0, 1)
            groups.setdefault(size, []).append((number, shape, host.encode_images(small.permute(0, 2, 3, 1))))
        report(number + 1, total)
    looked_at = sorted(number for group in groups.values() for number, _, _ in group)
    for group in groups.values():
        latents = torch.cat([latent for _, _, latent in group])
        soft, contrast = soft_masks(host.attention_maps(latents, [_CAPTION] * len(group), word, LEVELS))
        for (number, shape, _), mask, sure in zip(group, soft, contrast.tolist(), strict=True):
            if sure >= FLAT:
                found[number] = interpolate(mask[None, None], shape, mode="bilinear", antialias=True)[0, 0]
                confidence[number] = sure
    report(total, total)
    notes = notes_on(
        found,
        looked_at,
        f"masks of {{}} were made from the model's own attention to {super_category!r}",
        f"the model does not see where the {super_category} is in {{}}: the background is learned there too. Give "
        "masks, or say in other words what kind of thing it is",
    )
    return Masks(tuple(found), tuple(confidence), notes)


def soft_masks(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (n, h, w), ``FLOOR`` to 1, of attention maps (n, h, w), and the contrast (n,) of each, 0 to 1.

    A map that is not finite, or the same everywhere, has contrast 0.
    """
    maps = torch.where(maps.isfinite().all(-1).all(-1)[:, None, None], maps, torch.zeros_like(maps)).float()
    flat = maps.flatten(1)
    low, high = (flat.quantile(share, dim=1)[:, None, None] for share in (LOW, HIGH))
    masks = ((maps - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    inside, outside = (_mean(maps, weights) for weights in (masks, 1 - masks))
    contrast = ((inside - outside) / (inside + outside).clamp_min(1e-12)).clamp(0, 1)
    return FLOOR + (1 - FLOOR) * masks, contrast


def given(masks: Sequence[Tensor | None] | None, count: int) -> list[Tensor | None]:
    """The masks of ``count`` photos, None for those that are empty or missing.

    Raises MaskError when there are some, but not one for each photo.
    """
    if masks is None or not len(masks):
        return [None] * count
    if len(masks) != count:
        raise MaskError(
            f"{count} photos but {len(masks)} masks: give one mask for each photo, in the same order, or none"
        )
    for number, mask in enumerate(masks):
        if mask is not None and (mask.ndim != 2 or 0 in mask.shape):
            raise MaskError(f"mask {number + 1} has shape {tuple(mask.shape)}; it must be (height, width)")
    return [None if mask is None or float(mask.max()) < EMPTY else mask for mask in masks]


def dimmed(image: Tensor, mask: Tensor | None) -> Tensor:
    """A photo (height, width, 1, 3 or 4), dark outside its mask of any size, to be shown: (height, width, 3)."""
    image = image[..., :3].expand(-1, -1, 3)
    if mask is None:
        return image
    if mask.shape != image.shape[:2]:
        mask = interpolate(mask[None, None].float(), image.shape[:2], mode="bilinear", antialias=True)[0, 0]
    return image * (0.2 + 0.8 * mask.clamp(0, 1).unsqueeze(-1).to(image))


def notes_on(found: Sequence[Tensor | None], looked_at: Sequence[int], seen: str, unseen: str) -> tuple[str, ...]:
    """What to tell a user of the photos ``looked_at``: those with a mask now, and those without; ``{}`` is which."""
    with_mask = [number for number in looked_at if found[number] is not None]
    without = [number for number in looked_at if found[number] is None]
    return tuple(text.replace("{}", _listed(some)) for some, text in ((with_mask, seen), (without, unseen)) if some)


def _listed(numbers: Sequence[int]) -> str:
    """Photos by their numbers, from 0 on, as a user counts them, from 1 on."""
    some = ", ".join(str(number + 1) for number in numbers[:10]) + (", ..." if len(numbers) > 10 else "")
    return f"photo{'s' if len(numbers) > 1 else ''} {some}"


def _looked_at(shape: Size, resolution: int, step: int) -> Size:
    """Height and width, multiples of ``step``, for a photo of a shape: about ``resolution`` squared pixels."""
    ratio = min(_LONGEST, max(1 / _LONGEST, shape[0] / shape[1])) ** 0.5
    rows, columns = (max(1, round(side / step)) for side in (resolution * ratio, resolution / ratio))
    return rows * step, columns * step


def _mean(maps: Tensor, weights: Tensor) -> Tensor:
    return (maps * weights).sum((1, 2)) / weights.sum((1, 2)).clamp_min(1e-12)
