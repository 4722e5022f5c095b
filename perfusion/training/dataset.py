"""Photos and masks of a concept, made ready for training: checked, cropped, encoded once.

Photos are cropped to squares, or each to the shape of a bucket that is nearest to its own, to be drawn in batches of
one shape.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..hosts.base import Host

logger = logging.getLogger(__name__)

STEP = 8  # sides of buckets are multiples of this many latent pixels, which every network can halve three times
LONGEST = 2.0  # how many times as long as wide a bucket is at most
EMPTY = 0.01  # maximum of a mask in which nothing is marked
_PLAIN = 3 / 255  # photos whose colors differ by less are of one color, whatever JPEG made of it


class MaskError(ValueError):
    """A mask that cannot be used with its photo; ``input_name`` is where a user gave it."""

    input_name = "masks"


@dataclass(frozen=True)
class Bucket:
    """Photos of one shape, plain and mirrored. ``photos`` (k,): their numbers among all, ascending.

    ``latents`` and ``mirrored`` (k, c, h, w); ``weights`` and ``mirrored_weights`` (k, 1, h, w): the loss weight of
    each latent pixel, with mean 1 for each photo. ``sizes`` (k, 2): height and width in pixels of what was cropped,
    before it was resized.
    """

    photos: Tensor
    latents: Tensor
    mirrored: Tensor
    weights: Tensor
    mirrored_weights: Tensor
    sizes: Tensor

    def __len__(self) -> int:
        return len(self.photos)


@dataclass(frozen=True)
class Photos:
    """A concept's photos ready for training, numbered from 0 on.

    ``buckets`` holds them by shape; where all are of one, ``latents``, ``mirrored``, ``weights`` and
    ``mirrored_weights`` are those of the only bucket. ``kept`` says which of the photos that were given these are, and
    ``notes`` tells a user why others are not among them. The last ``made`` were put together.
    """

    buckets: tuple[Bucket, ...]
    kept: tuple[int, ...]
    notes: tuple[str, ...] = ()
    made: int = 0

    def __len__(self) -> int:
        return sum(len(bucket) for bucket in self.buckets)

    @property
    def photographed(self) -> int:
        """How many were not put together."""
        return len(self) - self.made

    @property
    def own(self) -> list[Bucket]:
        """The buckets without what was put together."""
        found = []
        for bucket in self.buckets:
            chosen = bucket.photos < self.photographed
            parts = {name: part[chosen.to(part.device)] for name, part in vars(bucket).items()}
            found.append(Bucket(**parts))
        return [bucket for bucket in found if len(bucket)]

    @property
    def latents(self) -> Tensor:
        """(n, c, h, w). Raises ValueError where photos are of several shapes."""
        return self._only.latents

    @property
    def mirrored(self) -> Tensor:
        """(n, c, h, w). Raises ValueError where photos are of several shapes."""
        return self._only.mirrored

    @property
    def weights(self) -> Tensor:
        """(n, 1, h, w). Raises ValueError where photos are of several shapes."""
        return self._only.weights

    @property
    def mirrored_weights(self) -> Tensor:
        """(n, 1, h, w). Raises ValueError where photos are of several shapes."""
        return self._only.mirrored_weights

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Numbers (count,) of photos of one bucket, with repeats; each photo is as likely as any other."""
        bucket = self.buckets[0]
        if len(self.buckets) > 1:
            bucket = self._bucket_of(int(torch.randint(len(self), (1,), generator=generator)))
        return bucket.photos[torch.randint(len(bucket), (count,), generator=generator)]

    def shape(self, index: Tensor) -> tuple[int, ...]:
        """(c, h, w) of the latents of photos ``index`` (b,), which lie in one bucket."""
        return tuple(self._place(index)[0].latents.shape[1:])

    def pick(self, index: Tensor, flipped: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (b, c, h, w) and loss weights (b, 1, h, w) of photos ``index`` (b,); those ``flipped`` mirrored.

        Raises ValueError for photos of different buckets.
        """
        bucket, index = self._place(index)
        choose = flipped.view(-1, 1, 1, 1).to(bucket.latents.device)
        latents = torch.where(choose, bucket.mirrored[index], bucket.latents[index])
        return latents, torch.where(choose, bucket.mirrored_weights[index], bucket.weights[index])

    def sizes(self, index: Tensor) -> Tensor:
        """Height and width (b, 2) in pixels of photos ``index`` (b,) as they were cropped, before they were resized.

        Raises ValueError for photos of different buckets.
        """
        bucket, places = self._place(index)
        return bucket.sizes[places.cpu()]

    @property
    def _only(self) -> Bucket:
        if len(self.buckets) != 1:
            raise ValueError("the photos are of several shapes: take them bucket by bucket")
        return self.buckets[0]

    def _bucket_of(self, photo: int) -> Bucket:
        """The bucket in which a photo lies; for a number that none has, any."""
        return next((bucket for bucket in self.buckets if photo in bucket.photos), self.buckets[0])

    def _place(self, index: Tensor) -> tuple[Bucket, Tensor]:
        """The bucket of photos, and their places in it, where its tensors lie."""
        bucket = self._bucket_of(int(index[0]))
        places = torch.searchsorted(bucket.photos, index.cpu())
        if not torch.equal(bucket.photos[places.clamp_max(len(bucket) - 1)], index.cpu()):
            raise ValueError("a batch must be of photos of one bucket")
        return bucket, places.to(bucket.latents.device)


def prepare(
    host: Host,
    images: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None,
    resolution: int,
    progress: Callable[[int, int], None] | None = None,
    *,
    buckets: bool = False,
    made: int = 0,
) -> Photos:
    """Crop, resize and encode photos.

    ``images``: each (height, width, channels) in 0..1 with 1, 3 or 4 channels: grey is repeated, transparency is laid
    over grey and, where no mask is given, used as the mask. ``masks``: each (height, width) in 0..1, of any size, or
    None for a photo without one; the crop is centered on them. With ``buckets`` a photo keeps its shape as nearly as
    ``bucket_sizes`` allow; without, all become squares of ``resolution`` pixels.

    A photo of one color teaches nothing: it is left out, with a note. Raises ValueError when none is left, for no
    photos, unequal counts, an empty mask, or an image that is not one.
    """
    if not len(images):
        raise ValueError("no photos to learn from: connect 1 to 10 photos of the thing")
    if masks is not None and len(masks) != len(images):
        raise MaskError(
            f"{len(images)} photos but {len(masks)} masks: give one mask for each photo, in the same order, or none"
        )
    sizes = bucket_sizes(resolution, STEP * latent_scale(host)) if buckets else [(resolution, resolution)]
    groups: dict[tuple[int, int], list[tuple[int, list[Tensor]]]] = {}
    kept: list[int] = []
    notes: list[str] = []
    photos = len(images) - made
    for number, image in enumerate(images):
        rgb, mask = photo_and_mask(image, None if masks is None else masks[number], number)
        if is_plain(rgb):
            notes.append(f"photo {number + 1} is of one color, from which nothing can be learned: it is left out")
        else:
            size = nearest_size(rgb.shape[-2], rgb.shape[-1], sizes)
            rgb, mask, before = cropped(rgb, mask, size)
            parts = [*_encoded(host, rgb, mask, mirrored=number < photos), torch.tensor([before])]
            groups.setdefault(size, []).append((len(kept), parts))
            kept.append(number)
        if progress is not None:
            progress(number + 1, len(images))
    if not kept:
        raise ValueError("the photos are of one color each, from which nothing can be learned: choose other photos")
    for note in notes:
        logger.warning(note)
    own = sum(number < photos for number in kept)
    return Photos(tuple(_bucket(group) for group in groups.values()), tuple(kept), tuple(notes), len(kept) - own)


def bucket_sizes(resolution: int, step: int) -> list[tuple[int, int]]:
    """Heights and widths of buckets: multiples of ``step``, at most twice as long as wide, and three quarters of the
    pixels of a square of ``resolution`` or more, never more than all. The square comes first."""
    most = resolution**2
    longest = int(resolution * LONGEST**0.5) // step
    sides = [step * k for k in range(1, longest + 1)]
    shapes = [(h, w) for h in sides for w in sides if 0.75 * most <= h * w <= most and max(h, w) <= LONGEST * min(h, w)]
    return [(resolution, resolution), *(size for size in shapes if size[0] != size[1])]


def nearest_size(height: int, width: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket in which a photo loses least, where cropping counts twice as much as fewer pixels."""
    most = max(h * w for h, w in sizes)

    def loss(size: tuple[int, int]) -> float:
        cropped = abs(math.log(size[1] / size[0] * height / width))
        return cropped + 0.5 * math.log(most / (size[0] * size[1]))

    return min(sizes, key=loss)


def latent_scale(host: Host) -> int:
    """Pixels per latent pixel, along each side: 8 for Stable Diffusion."""
    side = 64
    return side // host.encode_images(torch.full((1, side, side, 3), 0.5)).shape[-1]


def _encoded(host: Host, rgb: Tensor, mask: Tensor, *, mirrored: bool) -> list[Tensor]:
    """Latent, mirrored latent, weight and mirrored weight of a photo, the plain ones again where it is not to be
    ``mirrored``. Raises ValueError for what a bad VAE makes.
    """
    sides = (rgb, rgb.flip(-1)) if mirrored else (rgb,)
    latents = [host.encode_images(picture.permute(0, 2, 3, 1)) for picture in sides]
    if not all(bool(latent.isfinite().all()) for latent in latents):
        raise ValueError("the VAE turned a photo into numbers that are not finite: use a VAE in 32 bit, or another one")
    weights = [_loss_weight(side, latents[0]) for side in (mask, mask.flip(-1))[: len(sides)]]
    return [latents[0], latents[-1], weights[0], weights[-1]]


def _bucket(group: Sequence[tuple[int, list[Tensor]]]) -> Bucket:
    """Photos of one shape, each with its number, what ``_encoded`` made of it, and the size it had."""
    numbers = torch.tensor([number for number, _ in group])
    return Bucket(numbers, *(torch.cat(parts) for parts in zip(*(parts for _, parts in group), strict=True)))


def as_rgb(image: Tensor, number: int) -> tuple[Tensor, Tensor | None]:
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


def photo_and_mask(image: Tensor, mask: Tensor | None, number: int) -> tuple[Tensor, Tensor]:
    """A photo (1, 3, h, w) in 0..1, and its mask (1, 1, h, w): the one given, else its transparency, else all of it.

    Raises ValueError for what is no image, MaskError for an unusable mask.
    """
    rgb, transparency = as_rgb(image, number)
    return rgb, _soft(transparency if mask is None else mask, rgb, number)


def is_plain(rgb: Tensor) -> bool:
    """Whether a photo (1, 3, h, w) is of one color."""
    return float((rgb.amax((2, 3)) - rgb.amin((2, 3))).max()) < _PLAIN


def _soft(mask: Tensor | None, image: Tensor, number: int) -> Tensor:
    """A mask (1, 1, h, w) of the image's size, its maximum at 1; all ones where there is none."""
    height, width = image.shape[-2:]
    if mask is None:
        return torch.ones(1, 1, height, width)
    mask = mask.detach().float().cpu()
    if mask.ndim != 2 or 0 in mask.shape or not mask.isfinite().all():
        raise MaskError(f"mask {number + 1} has shape {tuple(mask.shape)}; it must be (height, width), finite numbers")
    mask = interpolate(mask.view(1, 1, *mask.shape).clamp(0, 1), (height, width), mode="bilinear", antialias=True)
    if mask.max() < EMPTY:
        raise MaskError(
            f"mask {number + 1} is empty: paint the thing in photo {number + 1}, or give no masks at all (Load Image "
            "delivers an empty mask for a picture without transparency; Load Image (as Mask) reads a picture as a mask)"
        )
    return mask / mask.max()


def cropped(image: Tensor, mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """The largest part of the shape of ``size`` (h, w) that holds most of the mask, centered on it, resized:
    (1, 3, h, w) and (1, 1, h, w); and its height and width before."""
    height, width = image.shape[-2:]
    scale = min(height / size[0], width / size[1])
    rows = max(1, min(height, round(scale * size[0])))
    columns = max(1, min(width, round(scale * size[1])))
    top, left = best_window(mask.sum((0, 1, 3)), rows), best_window(mask.sum((0, 1, 2)), columns)
    window = (..., slice(top, top + rows), slice(left, left + columns))
    image = interpolate(image[window], size, mode="bicubic", antialias=True).clamp(0, 1)
    return image, interpolate(mask[window], size, mode="bilinear", antialias=True), (rows, columns)


def best_window(mass: Tensor, side: int) -> int:
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
