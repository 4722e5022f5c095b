"""Photos in a folder, each with a caption and a mask beside it.

    teddy/1.jpg  teddy/1.txt  teddy/1-mask.png
    teddy/2.jpg               teddy/masks/2.png

Nothing in a folder is trusted: sizes, counts and texts are bounded, and what cannot be read is left out, by name.
"""

from __future__ import annotations

import codecs
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import interpolate

from .captions import MAX_CHARACTERS, lines_of
from .dataset import EMPTY

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MOST_PHOTOS = 100
LONGEST_SIDE = 2048
# Of all photos together, as RGB in 32 bit 1.2 GB; 100 photos are left with 1000 x 1000 pixels each.
MOST_PIXELS = 100_000_000
_MASK_ENDINGS = ("-mask", "_mask")
MASK_FOLDER = "masks"
_TEXT = ".txt"
_OTHER_SHAPE = 0.05  # of a mask that belongs to another photo, or to the same one turned: logarithm of the ratio
_MOST_ENTRIES = 20_000
_LONGEST_NAME = 80  # characters of a file's name in a note


class FolderError(ValueError):
    """A folder from which no photo can be read; the message says what to do."""


@dataclass(frozen=True)
class PhotoSet:
    """The photos of a folder, in the order of their names.

    ``images``: each (height, width, 3) in 0..1, transparency laid over grey. ``masks``: each (height, width) in 0..1
    of its photo's size, or None; from a file, or else from transparency. ``captions``: each a tuple, empty where there
    is no text. ``notes`` tells a user what was left out, and why.
    """

    names: tuple[str, ...]
    images: tuple[Tensor, ...]
    masks: tuple[Tensor | None, ...]
    captions: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


def photo_files(folder: Path, within: Path | None = None) -> list[Path]:
    """The photos of a folder, sorted as people count: 2.jpg before 10.jpg. Masks are not among them."""
    return [path for path in _pictures(folder, within) if not _photo_of_mask(path)]


def involved_files(folder: Path, within: Path | None = None) -> list[Path]:
    """All that ``read_folder`` may look at: photos, masks and texts."""
    texts = [path for path in _files(folder, within) if path.suffix.lower() == _TEXT]
    return [*_pictures(folder, within), *_pictures(folder / MASK_FOLDER, within), *texts]


def read_folder(
    folder: Path, progress: Callable[[int, int], None] | None = None, within: Path | None = None
) -> PhotoSet:
    """Read photos, captions and masks. Links that lead out of ``within``, where it is given, are not followed.

    Of more than 100 photos 100 are taken, spread over all of them, with a note: a concept is learned from a few, so
    that more are a wrong folder or a whole shoot, and neighbors in one show the same. Large photos are reduced.

    Raises FolderError when there is no photo, or none that can be read.
    """
    files = photo_files(folder, within)
    if not files:
        raise FolderError(
            f"there are no photos in {_shown(folder)}: put {', '.join(EXTENSIONS)} files into it, not into a folder "
            "below it"
        )
    masks = _masks(folder, within)
    texts = {path.stem.lower(): path for path in _files(folder, within) if path.suffix.lower() == _TEXT}
    notes = _notes_on_masks(masks, files)
    if len(files) > MOST_PHOTOS:
        notes.append(
            f"{MOST_PHOTOS} of {len(files)} photos are used, spread over all of them. A concept is learned from 1 to "
            "10 photos, best chosen by hand"
        )
        files = [files[k * len(files) // MOST_PHOTOS] for k in range(MOST_PHOTOS)]
    most_pixels = MOST_PIXELS // len(files)
    read: list[tuple[str, Tensor, Tensor | None, tuple[str, ...]]] = []
    for number, path in enumerate(files):
        name = path.stem.lower()
        try:
            image, transparency = _photo(path, most_pixels)
        # Decoders of damaged files raise anything, from SyntaxError to struct.error.
        except Exception as error:
            notes.append(f"{_shown(path)} is left out: {_why(error)}")
        else:
            mask = _mask(masks[name], image, most_pixels, notes) if name in masks else None
            captions = _captions(texts[name], notes) if name in texts else ()
            read.append((_shown(path), image, transparency if mask is None else mask, captions))
        if progress is not None:
            progress(number + 1, len(files))
    if not read:
        raise FolderError(f"no photo in {_shown(folder)} can be read. {'. '.join(notes[-3:])}")
    names, images, found, captions = zip(*read, strict=True)
    return PhotoSet(names, images, found, captions, tuple(notes))


def _photo(path: Path, most_pixels: int) -> tuple[Tensor, Tensor | None]:
    """A photo (h, w, 3) and its transparency (h, w), where there is any."""
    pixels = _pixels(path, most_pixels)
    colors, transparency = pixels[..., :3], pixels[..., 3:]
    if not _is_transparent(pixels):
        return colors.contiguous(), None
    return colors * transparency + 0.5 * (1 - transparency), transparency.squeeze(-1).contiguous()


def _mask(path: Path, image: Tensor, most_pixels: int, notes: list[str]) -> Tensor | None:
    """A mask (h, w) of the size of its photo: bright places of a picture, or those of a cut-out that are opaque."""
    try:
        pixels = _pixels(path, most_pixels)
    except Exception as error:  # as for photos
        notes.append(f"mask {_shown(path)} is left out: {_why(error)}")
        return None
    mask = pixels[..., 3] if _is_transparent(pixels) else pixels[..., :3].mean(-1)
    (height, width), size = mask.shape, (image.shape[0], image.shape[1])
    if abs(math.log(height / width * size[1] / size[0])) > _OTHER_SHAPE:
        notes.append(f"mask {_shown(path)} is left out: it has another shape than its photo")
        return None
    if float(mask.max()) < EMPTY:
        notes.append(f"mask {_shown(path)} is left out: it is black, and nothing is marked")
        return None
    return interpolate(mask[None, None], size, mode="bilinear", antialias=True)[0, 0]


def _captions(path: Path, notes: list[str]) -> tuple[str, ...]:
    """The captions in a text file, one a line."""
    most = 4 * MAX_CHARACTERS  # bytes: UTF-8 has at most four for a character
    try:
        with path.open("rb") as file:
            start = file.read(most)
        # What was cut off may end in the middle of a character.
        return lines_of(codecs.getincrementaldecoder("utf-8-sig")().decode(start, final=len(start) < most))
    except UnicodeDecodeError:
        notes.append(f"caption {_shown(path)} is left out: save it as UTF-8")
    except OSError as error:
        notes.append(f"caption {_shown(path)} is left out: {_why(error)}")
    return ()


def _pixels(path: Path, most_pixels: int) -> Tensor:
    """A picture (h, w, 3 or 4) in 0..1, upright, with so many pixels at most."""
    with Image.open(path) as opened:
        size = _reduced(opened.size, most_pixels)
        opened.draft("RGB", size)  # a JPEG is decoded no larger than needed
        deep = opened.mode.startswith("I")  # 16 bit
        if deep:
            picture = opened.convert("I").convert("F")
        else:
            transparent = "A" in opened.getbands() or "transparency" in opened.info
            picture = opened.convert("RGBA" if transparent else "RGB")
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        picture = ImageOps.exif_transpose(picture)
    shape = picture.height, picture.width, len(picture.getbands())
    data = bytearray(picture.tobytes())
    if deep:
        return (torch.frombuffer(data, dtype=torch.float32).view(shape) / 65_535).clamp(0, 1).repeat(1, 1, 3)
    return torch.frombuffer(data, dtype=torch.uint8).view(shape).float() / 255


def _is_transparent(pixels: Tensor) -> bool:
    return pixels.shape[-1] == 4 and not bool((pixels[..., 3] > 0.999).all())


def _reduced(size: tuple[int, int], most_pixels: int) -> tuple[int, int]:
    """Width and height of a picture at most ``LONGEST_SIDE`` long and of so many pixels."""
    width, height = size
    scale = min(1.0, LONGEST_SIDE / max(size), (most_pixels / (width * height)) ** 0.5)
    return max(1, int(width * scale)), max(1, int(height * scale))


def _files(folder: Path, within: Path | None) -> list[Path]:
    """The visible files of a folder, sorted as people count; none where there is no folder."""
    try:
        entries = [path for path in islice(folder.iterdir(), _MOST_ENTRIES) if not path.name.startswith(".")]
    except OSError:
        return []
    files = [path for path in entries if path.is_file() and (within is None or is_below(path, within))]
    return sorted(files, key=lambda path: (_counting(path.name), path.name))


def is_below(path: Path, folder: Path) -> bool:
    """Whether a path, with all links followed, is a folder itself or lies below it."""
    real, top = os.path.realpath(path), os.path.realpath(folder)
    try:
        return os.path.commonpath([real, top]) == top
    except ValueError:  # on another drive
        return False


def _pictures(folder: Path, within: Path | None) -> list[Path]:
    return [path for path in _files(folder, within) if path.suffix.lower() in EXTENSIONS]


def _counting(name: str) -> list[str | int]:
    """Sorts numbers in names by their value. Texts and numbers alternate, so that like is compared with like."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"(\d+)", name.lower()))]


def _photo_of_mask(path: Path) -> str:
    """The name of the photo that a file beside photos is the mask of, in lower case; empty for a photo."""
    stem = path.stem.lower()
    return stem[:-5] if stem.endswith(_MASK_ENDINGS) else ""


def _masks(folder: Path, within: Path | None) -> dict[str, Path]:
    """Name of a photo, in lower case -> its mask; one beside it comes before one in the folder of masks."""
    below = {_photo_of_mask(path) or path.stem.lower(): path for path in _pictures(folder / MASK_FOLDER, within)}
    beside = {name: path for path in _pictures(folder, within) if (name := _photo_of_mask(path))}
    return {**below, **beside}


def _notes_on_masks(masks: Mapping[str, Path], photos: Sequence[Path]) -> list[str]:
    """What to tell of masks that no photo has: a photo whose name looks like a mask's is one of them."""
    names = {path.stem.lower() for path in photos}
    alone = [_shown(path) for name, path in masks.items() if name not in names]
    if not alone:
        return []
    listed = ", ".join(alone[:5]) + (", ..." if len(alone) > 5 else "")
    return [f"taken for masks, but without a photo: {listed}. Rename what is a photo"]


def _shown(path: Path) -> str:
    """A file's name as it may be shown: bounded, and of letters, digits and simple signs."""
    return re.sub(r"[^\w .,()+-]", "?", path.name)[:_LONGEST_NAME]


def _why(error: Exception) -> str:
    """Why a file could not be read, without its path."""
    if isinstance(error, Image.DecompressionBombError):
        return "it has far too many pixels"
    if isinstance(error, UnidentifiedImageError):
        return "it is no picture of a known kind"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "it is damaged"
