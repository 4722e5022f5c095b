"""Photos and masks of a concept, made ready for training: checked, cropped to squares, encoded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..hosts.base import Host


class MaskError(ValueError):
    """A mask that cannot be used with its photo; ``input_name`` is where a user gave it."""

    input_name = "masks"


@dataclass(frozen=True)
class Photos:
    """A concept's photos ready for training, plain and mirrored.

    ``latents`` and ``mirrored`` (n, c, h, w); ``weights`` and ``mirrored_weights`` (n, 1, h, w): the loss weight of
    each latent pixel, with mean 1 for each photo.
    """

    latents: Tensor
    mirrored: Tensor
    weights: Tensor
    mirrored_weights: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    def pick(self, index: Tensor, flipped: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (b, c, h, w) and loss weights (b, 1, h, w) of photos ``index`` (b,); those ``flipped`` mirrored."""
        choose = flipped.view(-1, 1, 1, 1).to(self.latents.device)
        index = index.to(self.latents.device)
        latents = torch.where(choose, self.mirrored[index], self.latents[index])
        return latents, torch.where(choose, self.mirrored_weights[index], self.weights[index])


def prepare(
    host: Host,
    images: Sequence[Tensor],
    masks: Sequence[Tensor] | None,
    resolution: int,
    progress: Callable[[int, int], None] | None = None,
) -> Photos:
    """Crop, resize and encode photos.

    ``images``: each (height, width, channels) in 0..1 with 1, 3 or 4 channels: grey is repeated, transparency is laid
    over grey and, where no mask is given, used as the mask. ``masks``: each (height, width) in 0..1, of any size; the
    crop is centered on them.

    Raises ValueError for no photos, unequal counts, an empty mask, or an image that is not one.
    """
    if not len(images):
        raise ValueError("no photos to learn from: connect 1 to 10 photos of the thing")
    if masks is not None and len(masks) != len(images):
        raise MaskError(
            f"{len(images)} photos but {len(masks)} masks: give one mask for each photo, in the same order, or none"
        )
    latents, weights = [], []
    for number, image in enumerate(images):
        rgb, transparency = _rgb(image, number)
        mask = masks[number] if masks is not None else transparency
        rgb, mask = _square(rgb, _soft(mask, rgb, number), resolution)
        for flip in (False, True):
            picture, weight = (rgb.flip(-1), mask.flip(-1)) if flip else (rgb, mask)
            latents.append(host.encode_images(picture.permute(0, 2, 3, 1)))
            weights.append(_loss_weight(weight, latents[-1]))
        if progress is not None:
            progress(number + 1, len(images))
    plain, mirrored = torch.cat(latents[0::2]), torch.cat(latents[1::2])
    if not plain.isfinite().all():
        raise ValueError("the VAE turned a photo into numbers that are not finite: use a VAE in 32 bit, or another one")
    return Photos(plain, mirrored, torch.cat(weights[0::2]), torch.cat(weights[1::2]))


def _rgb(image: Tensor, number: int) -> tuple[Tensor, Tensor | None]:
    """(1, 3, h, w) in 0..1 and the transparency (h, w) where there is any."""
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
        raise ValueError(f"photo {number + 1} has shape {tuple(image.shape)}; it must be (height, width, 1, 3 or 4)")
    image = image.detach().float().cpu()
    if not image.isfinite().all():
        raise ValueError(f"photo {number + 1} holds numbers that are not finite")
    low, high = float(image.min()), float(image.max())
    if low < -0.5 or high > 1.5:  # beyond what resizing overshoots; cut off it would be a black or white picture
        raise ValueError(f"photo {number + 1} has values from {low:g} to {high:g}; they must be 0 to 1")
    transparency = None
    if image.shape[-1] == 4:
        transparency = image[..., 3].clamp(0, 1)
        image = image[..., :3] * transparency[..., None] + 0.5 * (1 - transparency[..., None])
        if bool((transparency > 0.999).all()):
            transparency = None
    if image.shape[-1] == 1:
        image = image.expand(-1, -1, 3)
    return image.clamp(0, 1).permute(2, 0, 1).unsqueeze(0), transparency


def _soft(mask: Tensor | None, image: Tensor, number: int) -> Tensor:
    """A mask (1, 1, h, w) of the image's size, its maximum at 1; all ones where there is none."""
    height, width = image.shape[-2:]
    if mask is None:
        return torch.ones(1, 1, height, width)
    mask = mask.detach().float().cpu()
    if mask.ndim != 2 or 0 in mask.shape or not mask.isfinite().all():
        raise MaskError(f"mask {number + 1} has shape {tuple(mask.shape)}; it must be (height, width), finite numbers")
    mask = interpolate(mask.view(1, 1, *mask.shape).clamp(0, 1), (height, width), mode="bilinear", antialias=True)
    if mask.max() < 0.01:
        raise MaskError(
            f"mask {number + 1} is empty: paint the thing in photo {number + 1}, or give no masks at all (Load Image "
            "delivers an empty mask for a picture without transparency; Load Image (as Mask) reads a picture as a mask)"
        )
    return mask / mask.max()


def _square(image: Tensor, mask: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """The largest square that holds most of the mask, centered on it, resized: (1, 3, r, r) and (1, 1, r, r)."""
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = _window(mask.sum((0, 1, 3)), side), _window(mask.sum((0, 1, 2)), side)
    window = (..., slice(top, top + side), slice(left, left + side))
    image = interpolate(image[window], (resolution, resolution), mode="bicubic", antialias=True).clamp(0, 1)
    return image, interpolate(mask[window], (resolution, resolution), mode="bilinear", antialias=True)


def _window(mass: Tensor, side: int) -> int:
    """Where a window of ``side`` starts along a mask's mass (n,): holding most of it, then nearest to its middle."""
    mass = mass.double()
    before = torch.nn.functional.pad(mass.cumsum(0), (1, 0))
    held = before[side:] - before[:-side]
    best = (held >= held.max() * (1 - 1e-6)).nonzero().squeeze(1)
    middle = float((mass * torch.arange(len(mass))).sum() / mass.sum()) + 0.5
    return int(best[(best - (middle - side / 2)).abs().argmin()])


def _loss_weight(mask: Tensor, latent: Tensor) -> Tensor:
    """The mask at the size of the latent, with mean 1: a small thing counts as much as one that fills its photo."""
    mask = interpolate(mask, latent.shape[-2:], mode="area")
    return (mask / mask.mean().clamp_min(1e-4)).to(latent)
