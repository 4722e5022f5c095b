"""Photos and masks made ready for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from perfusion.training.dataset import Photos, bucket_sizes, nearest_size, prepare
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


def prepared(
    images: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None, size: int = 64
) -> tuple[Photos, Seeing]:
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
    _, host = prepared([(photo(200, 200) > 0.5).float(), 1.0 + 0.02 * photo(8, 8)])
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


def test_a_photo_without_a_mask_among_others_with() -> None:
    transparent = torch.cat([photo(64, 64), box(64, 64, 0, 64, 0, 32).unsqueeze(-1)], dim=-1)
    photos, _ = prepared([photo(64, 64), transparent, photo(64, 64)], [box(64, 64, 0, 32, 0, 64), None, None])
    assert [float(weights.max()) for weights in photos.weights] == [2.0, 2.0, 1.0]
    assert not photos.weights[1, 0, :, 4:].any()


# --- buckets


@given(st.sampled_from([256, 512, 768, 1024]), st.floats(0.4, 2.5), st.integers(200, 3000))
def test_buckets_have_the_shape_of_the_photo_and_about_its_pixels(resolution: int, aspect: float, height: int) -> None:
    sizes = bucket_sizes(resolution, 64)
    size = nearest_size(height, max(1, round(height * aspect)), sizes)
    assert all(side % 64 == 0 for side in size)
    assert 0.75 * resolution**2 <= size[0] * size[1] <= resolution**2
    assert max(size) <= 2 * min(size)
    if resolution >= 512 and 0.5 <= aspect <= 2:
        kept = min(size[1] / size[0] / aspect, aspect * size[0] / size[1])
        assert kept > 0.88, "of the photo, in the direction in which it is cropped"


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (500, 500, (512, 512)),
        (400, 600, (384, 576)),
        (600, 400, (576, 384)),
        (300, 400, (448, 576)),
        (100, 900, (320, 640)),
        (520, 500, (512, 512)),
    ],
)
def test_common_shapes(height: int, width: int, expected: tuple[int, int]) -> None:
    assert nearest_size(height, width, bucket_sizes(512, 64)) == expected


def test_small_latents_have_finer_buckets() -> None:
    """A latent of a quarter of the picture's size, as the miniature's, has other multiples."""
    assert bucket_sizes(64, 32) == [(64, 64)]
    assert bucket_sizes(96, 32) == [(96, 96), (64, 128), (128, 64)]


SHAPES = [(80, 80), (64, 128), (160, 80), (90, 90), (130, 260), (100, 100)]  # 3 square, 2 wide, 1 tall


def bucketed(masks: Sequence[Tensor] | None = None) -> tuple[Photos, Seeing]:
    host = Seeing()
    images = [photo(*shape, seed=k) for k, shape in enumerate(SHAPES)]
    return prepare(host, images, masks, 256, buckets=True), host


def test_photos_of_one_shape_lie_in_one_bucket() -> None:
    photos, _ = bucketed()
    assert [bucket.photos.tolist() for bucket in photos.buckets] == [[0, 3, 5], [1, 4], [2]]
    assert [tuple(bucket.latents.shape) for bucket in photos.buckets] == [
        (3, 4, 32, 32),
        (2, 4, 24, 40),
        (1, 4, 40, 24),
    ]
    for bucket in photos.buckets:
        assert torch.allclose(bucket.mirrored, bucket.latents.flip(-1), atol=1e-5)
        assert torch.allclose(bucket.weights, torch.ones_like(bucket.weights))
    assert len(photos) == 6
    with pytest.raises(ValueError, match="bucket by bucket"):
        _ = photos.latents


def test_a_batch_is_of_one_bucket_and_each_photo_as_likely() -> None:
    photos, _ = bucketed()
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(6)
    for _ in range(1500):
        batch = photos.draw(4, generator)
        assert sum(bool(torch.isin(batch, bucket.photos).all()) for bucket in photos.buckets) == 1
        counts += torch.bincount(batch, minlength=6)
    assert torch.allclose(counts / counts.sum(), torch.full((6,), 1 / 6), atol=0.02)


def test_picking_from_a_bucket() -> None:
    photos, _ = bucketed()
    index, flipped = torch.tensor([4, 1, 4]), torch.tensor([False, True, True])
    latents, weights = photos.pick(index, flipped)
    wide = photos.buckets[1]
    assert photos.shape(index) == (4, 24, 40)
    assert torch.equal(latents, torch.stack([wide.latents[1], wide.mirrored[0], wide.mirrored[1]]))
    assert weights.shape == (3, 1, 24, 40)
    for mixed in ([0, 1], [1, 0], [0, 2], [0, 6]):
        with pytest.raises(ValueError, match="one bucket"):
            photos.pick(torch.tensor(mixed), torch.tensor([False, False]))


def test_in_buckets_too_the_crop_is_centered_on_the_mask() -> None:
    mask = box(90, 400, 30, 60, 300, 330)
    host = Seeing()
    prepare(host, [mask.unsqueeze(-1).expand(-1, -1, 3)], [mask], 256, buckets=True)
    seen = host.seen[1][0, ..., 0]  # the first is a probe of the scale
    assert seen.shape == (192, 320)
    columns = seen.sum(0)
    assert float((columns * torch.arange(320)).sum() / columns.sum()) == pytest.approx(159.5, abs=1.5)


def test_one_bucket_draws_what_was_always_drawn() -> None:
    photos, _ = prepared([photo(seed=k) for k in range(5)])
    drawn = photos.draw(7, torch.Generator().manual_seed(3))
    assert torch.equal(drawn, torch.randint(5, (7,), generator=torch.Generator().manual_seed(3)))
    assert photos.shape(drawn) == (4, 8, 8)


# --- photos of one color


def test_a_photo_of_one_color_is_left_out_by_name(caplog: pytest.LogCaptureFixture) -> None:
    done: list[tuple[int, int]] = []
    plain = torch.tensor([0.2, 0.5, 0.9]).expand(60, 60, 3)
    noisy = plain + 2 / 255 * torch.rand(60, 60, 1, generator=torch.Generator().manual_seed(0))
    images = [photo(), plain, photo(seed=1), noisy]
    photos = prepare(FakeHost(), images, None, 64, lambda *progress: done.append(progress))
    assert photos.kept == (0, 2)
    assert len(photos) == len(photos.latents) == 2
    assert [note.split(",")[0] for note in photos.notes] == [f"photo {n} is of one color" for n in (2, 4)]
    assert [record.getMessage() for record in caplog.records] == list(photos.notes)
    assert torch.equal(photos.latents, prepared([photo(), photo(seed=1)])[0].latents)
    assert done[-1] == (4, 4)


def test_photos_of_one_color_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="of one color each"):
        prepare(FakeHost(), [torch.full((60, 60, 3), 0.5)], None, 64)


def test_one_photo_is_enough() -> None:
    photos, _ = prepared([photo()])
    assert len(photos) == 1 and photos.kept == (0,) and photos.notes == ()


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
