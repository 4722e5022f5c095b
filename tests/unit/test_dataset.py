"""Photos and masks made ready for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from perfusion.training.dataset import Photos, prepare
from tests.unit.fake_host import FakeHost


class Seeing(FakeHost):
    """Keeps the pictures it encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def encode_images(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        return super().encode_images(images)


def photo(height: int = 80, width: int = 96, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(height, width, channels, generator=torch.Generator().manual_seed(seed))


def box(height: int, width: int, top: int, bottom: int, left: int, right: int) -> Tensor:
    mask = torch.zeros(height, width)
    mask[top:bottom, left:right] = 1
    return mask


def prepared(images: Sequence[Tensor], masks: Sequence[Tensor] | None = None, size: int = 64) -> tuple[Photos, Seeing]:
    host = Seeing()
    return prepare(host, images, masks, size), host


def test_photos_of_all_kinds_become_latents() -> None:
    done: list[tuple[int, int]] = []
    images = [photo(), photo(64, 64), photo(40, 300), photo(7, 5), photo(90, 80, 1)]
    photos = prepare(FakeHost(), images, None, 64, lambda *progress: done.append(progress))
    assert len(photos) == 5
    assert photos.latents.shape == photos.mirrored.shape == (5, 4, 8, 8)
    assert photos.weights.shape == photos.mirrored_weights.shape == (5, 1, 8, 8)
    assert torch.allclose(photos.weights, torch.ones(5, 1, 8, 8))
    assert done == [(n, 5) for n in range(1, 6)]


def test_mirrored_is_the_flip() -> None:
    images, masks = [photo(64, 64), photo(64, 64, seed=1)], [torch.rand(64, 64), box(64, 64, 0, 64, 0, 20)]
    photos, _ = prepared(images, masks)
    flipped, _ = prepared([image.flip(1) for image in images], [mask.flip(1) for mask in masks])
    assert torch.allclose(photos.mirrored, photos.latents.flip(-1), atol=1e-6)
    assert torch.allclose(photos.mirrored, flipped.latents, atol=1e-6)
    assert torch.allclose(photos.mirrored_weights, flipped.weights, atol=1e-5)
    assert not torch.allclose(photos.mirrored, photos.latents, atol=0.01)
    latents, weights = photos.pick(torch.tensor([1, 0, 1]), torch.tensor([False, True, True]))
    assert torch.equal(latents, torch.stack([photos.latents[1], photos.mirrored[0], photos.mirrored[1]]))
    assert torch.equal(weights[1:], photos.mirrored_weights[[0, 1]])


def test_pictures_stay_between_black_and_white() -> None:
    """Bicubic resizing overshoots at edges."""
    _, host = prepared([(photo(200, 200) > 0.5).float(), torch.full((8, 8, 3), 1.02)])
    for seen in host.seen:
        assert seen.shape == (1, 64, 64, 3)
        assert 0 <= seen.min() <= seen.max() <= 1


def test_grey_is_the_same_in_three_channels() -> None:
    grey = photo(channels=1)
    photos, _ = prepared([grey])
    assert torch.equal(photos.latents, prepared([grey.expand(-1, -1, 3)])[0].latents)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_precision_of_photos_does_not_matter(dtype: torch.dtype) -> None:
    sixteen_bit = (photo() * 65_535).round() / 65_535
    photos, _ = prepared([sixteen_bit.to(dtype)])
    assert photos.latents.dtype == torch.float32
    assert torch.allclose(photos.latents, prepared([sixteen_bit])[0].latents, atol=1e-3)


@pytest.mark.parametrize("scale", [255, 65_535, -1])
def test_photos_beyond_black_and_white_are_refused(scale: float) -> None:
    """Cut off at 1 they would be white, and training would learn that."""
    with pytest.raises(ValueError, match="photo 2 has values from .* must be 0 to 1"):
        prepared([photo(), photo() * scale])


def test_a_huge_photo() -> None:
    photos, host = prepared([photo(1500, 3000)])
    assert host.seen[0].shape == (1, 64, 64, 3)
    assert photos.latents.isfinite().all()


# --- transparency


def test_transparency_becomes_the_mask_and_grey() -> None:
    image = torch.cat([photo(64, 64), box(64, 64, 0, 64, 0, 32).unsqueeze(-1)], dim=-1)
    photos, host = prepared([image])
    assert torch.equal(photos.weights[0, 0, :, :4], torch.full((8, 4), 2.0))
    assert not photos.weights[0, 0, :, 4:].any()
    assert torch.allclose(host.seen[0][0, :, 34:], torch.tensor(0.5), atol=1e-6)
    assert torch.allclose(host.seen[0][0, :, :30], image[:, :30, :3], atol=1e-6)


def test_a_mask_counts_more_than_transparency() -> None:
    image = torch.cat([photo(64, 64), box(64, 64, 0, 64, 0, 32).unsqueeze(-1)], dim=-1)
    mask = box(64, 64, 0, 32, 0, 64)
    assert torch.equal(prepared([image], [mask])[0].weights, prepared([image[..., :3]], [mask])[0].weights)


def test_an_opaque_fourth_channel_changes_nothing() -> None:
    image = photo()
    photos, _ = prepared([torch.cat([image, torch.ones(80, 96, 1)], dim=-1)])
    plain, _ = prepared([image])
    assert torch.equal(photos.latents, plain.latents)
    assert torch.equal(photos.weights, plain.weights)


# --- masks


@given(
    st.lists(st.tuples(*[st.floats(0, 0.9)] * 2, *[st.floats(0.1, 1)] * 2), min_size=1, max_size=3),
    st.sampled_from([(64, 64), (64, 200), (300, 70)]),
    st.floats(0.1, 1),
)
def test_loss_weights_have_mean_1(boxes: list[tuple[float, ...]], shape: tuple[int, int], strength: float) -> None:
    mask = torch.zeros(shape)
    for top, left, height, width in boxes:
        y, x = int(top * shape[0]), int(left * shape[1])
        mask[y : y + max(2, int(height * shape[0])), x : x + max(2, int(width * shape[1]))] = strength
    photos, _ = prepared([photo(*shape)], [mask])
    for weights in (photos.weights, photos.mirrored_weights):
        assert float(weights.mean()) == pytest.approx(1, abs=1e-3)
        assert float(weights.min()) >= 0


@given(st.integers(0, 139), st.integers(8, 60), st.integers(1, 20), st.booleans())
def test_the_crop_holds_the_whole_thing_where_it_fits(start: int, length: int, heavy: int, tall: bool) -> None:
    """Also one that is heavy at one end: the middle of its mass is not its middle."""
    mask = torch.zeros(64, 200)
    image = torch.zeros(64, 200, 3)
    mask[30:34, start : start + length] = 1
    mask[10:54, start : start + min(heavy, length)] = 1
    image[mask > 0] = 1
    if tall:
        mask, image = mask.T, image.transpose(0, 1)
    _, host = prepared([image], [mask])
    assert float(host.seen[0][0, ..., 0].sum()) == pytest.approx(float(mask.sum()), rel=1e-4)


@pytest.mark.parametrize(("left", "expected"), [(0, 0), (90, 64), (199, 136)])
def test_the_crop_is_centered_on_the_mask(left: int, expected: int) -> None:
    image = torch.arange(200.0).div(199).view(1, 200, 1).expand(64, 200, 3)
    _, host = prepared([image], [box(64, 200, 10, 50, left, min(200, left + 12))])
    first = round(float(host.seen[0][0, 0, 0, 0]) * 199)
    assert first == expected


def test_without_a_mask_the_crop_is_central() -> None:
    image = torch.arange(200.0).div(199).view(1, 200, 1).expand(64, 200, 3)
    _, host = prepared([image])
    assert round(float(host.seen[0][0, 0, 0, 0]) * 199) == 68


def test_two_things_too_far_apart_leave_one_in_the_crop() -> None:
    mask = box(64, 640, 20, 40, 0, 20) + box(64, 640, 20, 40, 610, 640)
    photos, host = prepared([mask.unsqueeze(-1).expand(-1, -1, 3)], [mask])
    assert float(host.seen[0][..., 0].sum()) == pytest.approx(20 * 30, rel=1e-3)
    assert float(photos.weights.mean()) == pytest.approx(1)


def test_masks_of_other_sizes_and_strengths_are_scaled() -> None:
    image = photo(64, 64)
    expected = prepared([image], [box(64, 64, 0, 32, 0, 64)])[0].weights
    faint = box(128, 128, 0, 64, 0, 128) * 0.25
    assert torch.allclose(prepared([image], [faint])[0].weights, expected, atol=0.2)
    assert torch.equal(expected, torch.cat([torch.full((1, 1, 4, 8), 2.0), torch.zeros(1, 1, 4, 8)], dim=2))


# --- refusals


class Broken(FakeHost):
    """Its VAE gives NaN, as half-precision ones of SDXL do."""

    def encode_images(self, images: Tensor) -> Tensor:
        return super().encode_images(images) * torch.nan


@pytest.mark.parametrize(
    ("images", "masks", "message"),
    [
        ([], None, "no photos"),
        ([], [], "no photos"),
        ([photo()] * 2, [torch.ones(80, 96)], "2 photos but 1 masks"),
        ([photo()], [], "1 photos but 0 masks"),
        ([photo(), photo(channels=2)], None, r"photo 2 has shape \(80, 96, 2\)"),
        ([photo()[..., 0]], None, "photo 1 has shape"),
        ([photo().unsqueeze(0)], None, "photo 1 has shape"),
        ([torch.zeros(0, 5, 3)], None, "photo 1 has shape"),
        ([photo() / 0], None, "photo 1 holds numbers that are not finite"),
        ([photo(), photo() * torch.nan], None, "photo 2 holds numbers that are not finite"),
        ([photo()], [torch.zeros(80, 96)], "mask 1 is empty"),
        ([photo()] * 2, [torch.ones(80, 96), torch.zeros(80, 96)], "mask 2 is empty: paint the thing in photo 2"),
        ([photo()], [torch.ones(1, 80, 96)], "mask 1 has shape"),
        ([photo()], [torch.ones(0, 96)], "mask 1 has shape"),
        ([photo()], [torch.full((80, 96), torch.nan)], "finite numbers"),
        ([torch.zeros(80, 96, 4)], None, "is empty"),
    ],
)
def test_bad_photos_and_masks_are_refused(images: Any, masks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(FakeHost(), images, masks, 64)


def test_a_broken_vae_is_named() -> None:
    with pytest.raises(ValueError, match="VAE"):
        prepare(Broken(), [photo()], None, 64)
