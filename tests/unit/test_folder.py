"""Folders of photos as people have them: turned, huge, damaged, transparent, with texts and masks beside them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from perfusion.training import folder as module
from perfusion.training.folder import FolderError, involved_files, photo_files, read_folder


def picture(width: int = 24, height: int = 16, seed: int = 0, channels: int = 3) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values)


def half(width: int = 24, height: int = 16) -> Image.Image:
    """White on the left."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def save(folder: Path, **pictures: Image.Image) -> None:
    for name, image in pictures.items():
        image.save(folder / f"{name}.png")


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).float() / 255


def test_photos_come_in_the_order_people_count(tmp_path: Path) -> None:
    names = ["10.png", "2.png", "1.png", "b10.webp", "B2.bmp", "photo.JPEG", "photo.jpg"]
    for k, name in enumerate(names):
        picture(seed=k).save(tmp_path / name)
    for name in (".hidden.png", "notes.md", "movie.gif", "1.txt"):
        (tmp_path / name).write_bytes(b"?")
    (tmp_path / "folder.png").mkdir()
    photos = read_folder(tmp_path)
    assert photos.names == ("1.png", "2.png", "10.png", "B2.bmp", "b10.webp", "photo.JPEG", "photo.jpg")
    assert torch.equal(photos.images[0], pixels(picture(seed=2)))
    assert photos.masks == (None,) * 7
    assert len(photos) == 7


def test_photos_are_upright(tmp_path: Path) -> None:
    """Each orientation that a camera writes, against Pillow's own reading of the tag."""
    image = picture(30, 20).resize((300, 200), Image.Resampling.NEAREST)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / f"{orientation}.png", exif=exif)
        image.save(tmp_path / f"{orientation}0.jpg", exif=exif, quality=95)
    turns: list[Any] = [
        None,
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_270,
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_90,
    ]
    photos = read_folder(tmp_path)
    for orientation, turn in enumerate(turns, 1):
        expected = pixels(image if turn is None else image.transpose(turn))
        read = dict(zip(photos.names, photos.images, strict=True))
        assert torch.equal(read[f"{orientation}.png"], expected)
        assert read[f"{orientation}0.jpg"].shape == expected.shape
        assert float((read[f"{orientation}0.jpg"] - expected).abs().mean()) < 0.1


@pytest.mark.parametrize("limit", ["side", "pixels"])
def test_large_photos_are_reduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(module, "LONGEST_SIDE" if limit == "side" else "MOST_PIXELS", 100 if limit == "side" else 9_800)
    large = picture(40, 20).resize((400, 200), Image.Resampling.BICUBIC)
    large.save(tmp_path / "1.jpg", quality=95)
    large.save(tmp_path / "2.png")
    photos = read_folder(tmp_path)
    height, width = (50, 100) if limit == "side" else (49, 98)
    for image in photos.images:
        assert image.shape[:2] == (height, width)
        expected = pixels(large.resize((width, height), Image.Resampling.LANCZOS))
        assert float((image - expected).abs().mean()) < 0.02


def test_transparency_is_the_mask_and_lies_over_grey(tmp_path: Path) -> None:
    cut_out = picture()
    cut_out.putalpha(half())
    opaque = picture()
    opaque.putalpha(255)
    save(tmp_path, cut_out=cut_out, opaque=opaque)
    photos = read_folder(tmp_path)
    mask = photos.masks[0]
    assert mask is not None
    assert torch.equal(mask, pixels(half()))
    assert torch.equal(photos.images[0][:, :12], pixels(picture())[:, :12])
    assert torch.equal(photos.images[0][:, 12:], torch.full((16, 12, 3), 0.5))
    assert photos.masks[1] is None
    assert torch.equal(photos.images[1], pixels(picture()))


def test_grey_palette_and_16_bit_pictures(tmp_path: Path) -> None:
    deep = np.arange(16 * 24, dtype=np.uint16).reshape(16, 24) * 170
    Image.fromarray(deep).save(tmp_path / "deep.png")
    save(tmp_path, grey=half(), palette=picture().quantize(8), bits=half().convert("1"))
    picture(channels=4).convert("CMYK").save(tmp_path / "cmyk.jpg")
    photos = read_folder(tmp_path)
    read = dict(zip(photos.names, photos.images, strict=True))
    expected = torch.from_numpy(deep.astype(np.float32) / 65_535).unsqueeze(-1).expand(-1, -1, 3)
    assert torch.allclose(read["deep.png"], expected, atol=1e-6)
    assert torch.equal(read["grey.png"], pixels(half().convert("RGB")))
    assert torch.equal(read["bits.png"], read["grey.png"])
    assert torch.equal(read["palette.png"], pixels(picture().quantize(8).convert("RGB")))
    assert read["cmyk.jpg"].shape == (16, 24, 3)


def test_masks_beside_photos_and_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    cut_out = picture()
    cut_out.putalpha(half())
    save(tmp_path, a=cut_out, B=picture(), c=picture(), d=picture())
    half().transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "a-mask.png")
    half(48, 32).save(tmp_path / "b_mask.webp", lossless=True)
    cut_out.save(tmp_path / "masks" / "c.png")
    half().save(tmp_path / "masks" / "other.png")
    photos = read_folder(tmp_path)
    assert photos.names == ("a.png", "B.png", "c.png", "d.png")
    a, b, c, d = photos.masks
    assert a is not None and b is not None and c is not None and d is None
    assert torch.equal(a, pixels(half()).flip(1)), "a file counts more than transparency"
    assert torch.allclose(b, pixels(half()), atol=0.3)
    assert torch.equal(c, pixels(half())), "a cut-out is a mask by its transparency"
    assert photos.notes == ("taken for masks, but without a photo: other.png. Rename what is a photo",)


def test_masks_that_cannot_be_right_are_left_out_by_name(tmp_path: Path) -> None:
    save(tmp_path, a=picture(), b=picture(), c=picture())
    half(16, 24).save(tmp_path / "a-mask.png")
    Image.new("L", (24, 16)).save(tmp_path / "b-mask.png")
    (tmp_path / "c-mask.png").write_bytes(b"no picture")
    photos = read_folder(tmp_path)
    assert photos.masks == (None, None, None)
    assert [note.split(":")[0] for note in photos.notes] == [f"mask {k}-mask.png is left out" for k in "abc"]
    assert "another shape" in photos.notes[0] and "black" in photos.notes[1] and "no picture" in photos.notes[2]


def test_texts_beside_photos(tmp_path: Path) -> None:
    save(tmp_path, a=picture(), b=picture(), c=picture(), d=picture())
    (tmp_path / "a.txt").write_bytes("\ufeffa {} by the sea\r\n\r\nmy\x07 \u00e9l\u00e8ve\n".encode())
    (tmp_path / "b.txt").write_bytes(("\u00e9" * 100_000).encode())
    (tmp_path / "c.TXT").write_bytes(b"caf\xe9")
    photos = read_folder(tmp_path)
    assert photos.captions[0] == ("a {} by the sea", "my \u00e9l\u00e8ve")
    assert photos.captions[1] == ("\u00e9" * 2000,)
    assert photos.captions[2:] == ((), ())
    assert photos.notes == ("caption c.TXT is left out: save it as UTF-8",)


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 40,000 x 40,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_what_cannot_be_read_is_left_out_by_name(tmp_path: Path) -> None:
    encoded = io.BytesIO()
    picture(200, 200).save(encoded, "JPEG")
    damaged = {
        "a.png": b"text",
        "b.jpg": encoded.getvalue()[:3000],
        "c.png": bomb(),
        "d;&.png": b"",
        "e.webp": b"RIFF",
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(FolderError, match=r"no photo in .* can be read.*e\.webp is left out"):
        read_folder(tmp_path)
    save(tmp_path, good=picture())
    photos = read_folder(tmp_path)
    assert photos.names == ("good.png",)
    assert sorted(note.split(" is left out")[0] for note in photos.notes) == [
        "a.png",
        "b.jpg",
        "c.png",
        "d??.png",
        "e.webp",
    ]
    assert "too many pixels" in next(note for note in photos.notes if note.startswith("c.png"))
    assert not any(str(tmp_path) in note for note in photos.notes)


def test_of_very_many_photos_some_are_taken_spread_over_all(tmp_path: Path) -> None:
    one = io.BytesIO()
    picture(8, 8).save(one, "PNG")
    for k in range(500):
        (tmp_path / f"{k}.png").write_bytes(one.getvalue())
    done: list[tuple[int, int]] = []
    photos = read_folder(tmp_path, lambda *progress: done.append(progress))
    assert photos.names == tuple(f"{k}.png" for k in range(0, 500, 5))
    assert photos.notes[0].startswith("100 of 500 photos are used")
    assert done[-1] == (100, 100)


def test_a_folder_without_photos_is_refused(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    save(tmp_path / "below", a=picture())
    with pytest.raises(FolderError, match=r"no photos in .*\.png, \.jpg"):
        read_folder(tmp_path)
    with pytest.raises(FolderError, match="no photos"):
        read_folder(tmp_path / "missing")


def test_links_out_of_the_given_folder_are_not_followed(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for place in (inside, outside / "masks"):
        place.mkdir(parents=True)
    save(inside, a=picture(), b=picture())
    save(outside, secret=picture())
    half().save(outside / "masks" / "a.png")
    (outside / "a.txt").write_text("secret")
    try:
        (inside / "a.txt").symlink_to(outside / "a.txt")
        (inside / "secret.png").symlink_to(outside / "secret.png")
        (inside / "masks").symlink_to(outside / "masks", target_is_directory=True)
        (inside / "c.png").symlink_to(inside / "b.png")
    except OSError:
        pytest.skip("no right to make links")
    photos = read_folder(inside, within=inside)
    assert photos.names == ("a.png", "b.png", "c.png")
    assert photos.masks[0] is None and photos.captions[0] == ()
    assert {path.name for path in involved_files(inside, inside)} == {"a.png", "b.png", "c.png"}
    assert len(photo_files(inside)) == 4, "whoever runs a command may link what they like"
