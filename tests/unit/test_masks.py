"""Masks by attention and by CLIPSeg, for photos that have none."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perfusion.hosts.base import Word
from perfusion.hosts.clipseg import ClipSegError, clipseg_masks
from perfusion.training import attention, masks
from perfusion.training.attention import WordAttention
from perfusion.training.dataset import MaskError
from perfusion.training.masks import FLOOR, attention_masks, dimmed, given, soft_masks
from perfusion.training.trainer import TrainingError
from tests.unit.fake_host import FakeHost
from tests.unit.test_dataset import box, photo


class Looking(FakeHost):
    """Its attention is where a picture is red. ``seen``: sizes of the latents it looked at, and the texts."""

    def __init__(self, contrast: float = 1.0) -> None:
        super().__init__()
        self.contrast = contrast
        self.seen: list[tuple[int, ...]] = []
        self.texts: list[tuple[str, str]] = []

    def encode_images(self, images: Tensor) -> Tensor:
        latents = super().encode_images(images).clone()
        latents[:, 0] = torch.nn.functional.avg_pool2d(images[..., 0].unsqueeze(1), 8)[:, 0]
        return latents

    def attention_maps(self, latents: Tensor, prompts: Sequence[str], word: Word, levels: Sequence[float]) -> Tensor:
        assert len(prompts) == len(latents) and len(levels) >= 2
        self.seen.append(tuple(latents.shape))
        self.texts += [(prompt, word.text) for prompt in prompts]
        return 0.1 * (1 + self.contrast * latents[:, 0])


def red(mask: Tensor) -> Tensor:
    """A photo that is red where its mask is."""
    image = 0.3 * torch.rand(*mask.shape, 3, generator=torch.Generator().manual_seed(0))
    image[..., 0] = mask
    return image


def overlap(found: Tensor, truth: Tensor) -> float:
    cut, true = found > 0.5, truth > 0.5
    return float((cut & true).sum() / (cut | true).sum())


# --- attention to a word


def qk(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows).float().unsqueeze(0)


def test_the_share_of_attention_that_a_word_gets() -> None:
    """Two heads of one number each, three tokens of which two are the word: against the softmax written out."""
    q = torch.randn(1, 6, 2, generator=torch.Generator().manual_seed(0))
    k = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(1))
    collected = WordAttention(torch.tensor([[False, True, True]]), (2, 3))
    collected.add_cross(q, k, heads=2)
    heads = [torch.softmax(q[..., [n]] @ k[..., [n]].mT, dim=-1)[..., 1:].sum(-1) for n in (0, 1)]
    assert torch.allclose(collected.maps(), (torch.stack(heads).mean(0)).view(1, 2, 3))
    biased, bias = WordAttention(torch.tensor([[False, True, True]]), (2, 3)), torch.tensor([[[0.0, 2.0, -1.0]]])
    biased.add_cross(q, k, 2, bias)
    heads = [torch.softmax(q[..., [n]] @ k[..., [n]].mT + bias, dim=-1)[..., 1:].sum(-1) for n in (0, 1)]
    assert torch.allclose(biased.maps(), (torch.stack(heads).mean(0)).view(1, 2, 3))


def test_self_attention_carries_the_word_along() -> None:
    """The word is looked at from one place; two places look at that one, and nowhere else."""
    collected = WordAttention(torch.tensor([[True, False]]), (1, 4))
    collected.add_cross(qk([[9.0], [-9.0], [-9.0], [-9.0]]), qk([[9.0], [-9.0]]), heads=1)
    q, k = torch.zeros(1, 4, 4), 30 * torch.eye(4).unsqueeze(0)
    q[0, 0, 0] = q[0, 1, 0] = q[0, 2, 2] = q[0, 3, 3] = 30
    collected.add_own(q, k, heads=1)
    assert torch.allclose(collected.maps(), torch.tensor([[[1.0, 1.0, 0.0, 0.0]]]), atol=1e-4)


def test_layers_of_all_sizes_are_put_together_but_the_finest() -> None:
    collected = WordAttention(torch.tensor([[True, False]]), (5, 6))
    word, other = qk([[20.0], [0.0]]), qk([[0.0], [20.0]])
    collected.add_cross(torch.ones(1, 30, 1), word, heads=1)
    for _ in range(3):
        collected.add_cross(torch.ones(1, 3 * 3, 1), word, heads=1)
    collected.add_cross(torch.ones(1, 2 * 2, 1), other, heads=1)
    collected.add_cross(torch.ones(1, 7, 1), word, heads=1)  # of no size that a halved latent has
    assert torch.allclose(collected.maps(), torch.full((1, 5, 6), 0.75), atol=1e-4)


def test_self_attention_among_too_many_places_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_PLACES", 15)
    collected = WordAttention(torch.tensor([[True]]), (4, 4))
    collected.add_cross(torch.zeros(1, 4, 1), torch.zeros(1, 1, 1), heads=1)
    collected.add_own(torch.full((1, 16, 1), torch.nan), torch.zeros(1, 16, 1), heads=1)
    assert torch.equal(collected.maps(), torch.ones(1, 4, 4))


def test_a_network_without_attention_says_nothing() -> None:
    maps = WordAttention(torch.tensor([[True]]), (3, 4)).maps()
    assert torch.equal(maps, torch.zeros(1, 3, 4))


def test_maps_are_the_same_whatever_pictures_are_beside() -> None:
    host, word = FakeHost(), Word("<thing>", "teddy bear")
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["a photo of a <thing>", "my <thing>"] * 3
    maps = host.attention_maps(latents, prompts, word, (0.5, 1.0))
    assert maps.shape == (6, 8, 8)
    assert not maps.requires_grad
    assert 0 < float(maps.min()) < float(maps.max()) < 1
    alone = host.attention_maps(latents[5:], prompts[5:], word, (0.5, 1.0))
    assert torch.allclose(alone, maps[5:], atol=1e-6)
    assert torch.equal(host.attention_maps(latents, prompts, word, (0.5, 1.0)), maps)


# --- soft masks


def test_soft_masks_leave_no_place_without_weight() -> None:
    maps = torch.full((2, 10, 10), 0.2)
    maps[0, 2:5, 2:6] = 0.6
    found, contrast = soft_masks(maps)
    assert float(found.min()) == pytest.approx(FLOOR)
    assert torch.allclose(found[0, 2:5, 2:6], torch.ones(3, 4))
    assert float(found[0].sum()) == pytest.approx(12 + 88 * FLOOR)
    assert contrast.tolist() == pytest.approx([0.5, 0.0], abs=1e-6)


def test_a_few_places_that_are_looked_at_very_much_do_not_hide_the_thing() -> None:
    maps = torch.full((1, 20, 20), 0.1)
    maps[0, 5:15, 5:15] = 0.3
    maps[0, 0, 0] = 50.0
    found, _ = soft_masks(maps)
    assert torch.allclose(found[0, 5:15, 5:15], torch.ones(10, 10))


@pytest.mark.parametrize("value", [0.3, torch.nan, torch.inf])
def test_maps_that_say_nothing_have_no_contrast(value: float) -> None:
    maps = torch.full((1, 4, 4), 0.3)
    maps[0, 1, 1] = value
    found, contrast = soft_masks(maps)
    assert float(contrast) == pytest.approx(0, abs=1e-6)
    assert found.isfinite().all()


def test_masks_lie_on_the_thing_in_photos_of_all_shapes() -> None:
    host = Looking()
    truths = [box(64, 64, 8, 40, 16, 48), box(200, 100, 0, 80, 0, 60), box(60, 600, 10, 50, 300, 420)]
    images = [red(truth) for truth in truths]
    done: list[tuple[int, int]] = []
    found = attention_masks(host, images, "teddy bear", 128, progress=lambda *progress: done.append(progress))
    for mask, truth in zip(found.masks, truths, strict=True):
        assert mask is not None
        assert mask.shape == truth.shape
        assert overlap(mask, truth) > 0.7
    assert min(found.confidence) > 0.1
    assert found.notes == ("masks of photos 1, 2, 3 were made from the model's own attention to 'teddy bear'",)
    assert sorted(host.seen) == [(1, 4, 8, 24), (1, 4, 16, 16), (1, 4, 24, 8)]
    assert set(host.texts) == {("a photo of a <thing>", "teddy bear")}
    assert done[-1] == (6, 6) and done == sorted(done)


def test_masks_and_transparency_that_are_there_stay_as_they_are() -> None:
    host, truth = Looking(), box(64, 64, 8, 40, 16, 48)
    transparent = torch.cat([photo(64, 64), truth.unsqueeze(-1)], dim=-1)
    images = [red(truth), photo(64, 64), transparent, red(truth)]
    own = torch.rand(30, 30)
    found = attention_masks(host, images, "cat", 64, [torch.zeros(9, 9), own, torch.zeros(64, 64), None])
    assert found.masks[1] is own
    assert found.masks[2] is not None and torch.equal(found.masks[2], truth)
    assert found.confidence[1:3] == (1.0, 1.0)
    assert found.notes == ("masks of photos 1, 4 were made from the model's own attention to 'cat'",)
    assert host.seen == [(2, 4, 8, 8)]


def test_where_attention_says_nothing_there_is_no_mask_and_the_user_is_told() -> None:
    truth = box(64, 64, 8, 40, 16, 48)
    found = attention_masks(Looking(contrast=0.001), [red(truth)] * 2, "cat", 64)
    assert found.masks == (None, None)
    assert found.confidence == (0.0, 0.0)
    assert found.notes[0].startswith("the model does not see where the cat is in photos 1, 2: the background")


def test_refusals_name_what_is_at_fault() -> None:
    with pytest.raises(TrainingError, match="super-category '!!' is no word"):
        attention_masks(Looking(), [photo()], "!!", 64)
    with pytest.raises(MaskError, match="1 photos but 2 masks"):
        attention_masks(Looking(), [photo()], "cat", 64, [None, None])
    with pytest.raises(ValueError, match="photo 2 has shape"):
        attention_masks(Looking(), [photo(), photo(channels=2)], "cat", 64)


def test_empty_masks_count_as_none() -> None:
    own = torch.rand(4, 4)
    assert given([torch.zeros(2, 2), own, None], 3) == [None, own, None]
    assert given([], 2) == given(None, 2) == [None, None]


def test_previews_are_dark_outside() -> None:
    image, mask = torch.ones(4, 4, 3), box(4, 4, 0, 2, 0, 4)
    assert torch.equal(dimmed(image, mask)[:2], image[:2])
    assert float(dimmed(image, mask)[2:].max()) == pytest.approx(0.2)
    assert torch.equal(dimmed(image, None), image)
    grey = dimmed(torch.ones(8, 8, 1), mask)  # of another size than its mask, which is therefore soft at its edge
    assert grey.shape == (8, 8, 3)
    assert torch.equal(grey[:3], torch.ones(3, 8, 3))
    assert float(grey[5:].max()) == pytest.approx(0.2)


# --- a real network


@pytest.fixture(scope="module")
def miniature() -> Any:
    from miniature.host import load_host
    from miniature.weights import FOLDER
    from tests.miniature_weights import available

    if available(FOLDER) != FOLDER:
        pytest.skip("the miniature's weights are not here")
    return load_host()


def test_the_miniature_finds_things_in_their_photos(miniature: Any) -> None:
    """Far better than the middle of the picture, where things mostly are; figures: benchmarks.masks."""
    from benchmarks.masks import overlap, photos_of

    photos = photos_of("portrait", 6)
    side = torch.linspace(-1, 1, 64)
    middle = ((side[:, None] ** 2 + side**2) < 0.65**2).float().expand(6, -1, -1)
    truth = torch.stack([photo.mask for photo in photos])
    found = [attention_masks(miniature, [photo.image], photo.category, 64).masks[0] for photo in photos]
    assert all(mask is not None for mask in found)
    ours = overlap(torch.stack([mask for mask in found if mask is not None]), truth)
    assert ours["iou"] > 0.6
    assert ours["iou"] > overlap(middle, truth)["iou"] + 0.1


def test_looking_leaves_a_network_as_it_was_and_works_while_training(miniature: Any) -> None:
    image = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    word, levels = Word("<it>", "cat"), masks.LEVELS

    def look() -> Tensor:
        return miniature.attention_maps(miniature.encode_images(image), ["a photo of a <it>"], word, levels)

    outside = look()
    with miniature.training():
        assert torch.allclose(look(), outside, atol=1e-5)
    modules = list(miniature.unet.named_modules())
    assert [name for name, module in modules if "forward" in vars(module)] == []

    def fail(*_: object) -> Tensor:
        raise RuntimeError("lost")

    miniature.unet.conv_out.register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="lost"):
            look()
    finally:
        miniature.unet.conv_out._forward_hooks.clear()
    assert [name for name, module in modules if "forward" in vars(module)] == []


# --- CLIPSeg


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A CLIPSeg of random weights, as small as it goes, with the miniature's tokenizer."""
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    from miniature.weights import FOLDER

    tokenizer = FOLDER / "tokenizer"
    vocabulary = json.loads((tokenizer / "vocab.json").read_text(encoding="utf-8"))
    end = vocabulary["<|endoftext|>"]
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(vocabulary), "eos_token_id": end, "pad_token_id": end, "bos_token_id": end - 1}
    vision = {**small, "image_size": 64, "patch_size": 32}
    settings: dict[str, Any] = {
        "text_config": text,
        "vision_config": vision,
        "projection_dim": 16,
        "reduce_dim": 16,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
        "conditional_layer": 0,
        "extract_layers": [0, 1, 2],
    }
    folder = tmp_path_factory.mktemp("models") / "clipseg"
    torch.manual_seed(0)
    network: Any = CLIPSegForImageSegmentation(CLIPSegConfig(**settings))
    network.decoder.transposed_convolution.bias.data.fill_(1.0)
    network.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    yield folder


def test_clipseg_gives_masks_of_photos_that_have_none(clipseg: Path) -> None:
    own = torch.rand(8, 8)
    images = [photo(40, 60), photo(64, 64), photo(70, 50, channels=1)]
    done: list[tuple[int, int]] = []
    found = clipseg_masks(images, "cat", clipseg, [None, own, None], lambda *progress: done.append(progress))
    assert found.masks[1] is own
    for mask, image in zip(found.masks[::2], images[::2], strict=True):
        assert mask is not None
        assert mask.shape == image.shape[:2]
        assert float(mask.min()) >= 0 and float(mask.max()) == pytest.approx(1)
        assert mask.std() > 0
    assert 0.5 < found.confidence[0] < 1
    assert found.notes == ("masks of photos 1, 3 were made by CLIPSeg, for 'cat'",)
    assert done == [(1, 3), (2, 3), (3, 3)]


def test_clipseg_says_where_it_sees_nothing(clipseg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perfusion.hosts.clipseg._UNSEEN", 1.1)
    found = clipseg_masks([photo()], "cat", clipseg)
    assert found.masks == (None,) and found.confidence == (0.0,)
    assert found.notes[0].startswith("CLIPSeg sees no cat in photo 1")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.json"])
def test_missing_files_are_named_with_their_place(clipseg: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(clipseg, tmp_path / "models" / "clipseg")
    (folder / name).unlink()
    with pytest.raises(ClipSegError, match=rf"{name}.* missing in models/clipseg\. Put the files"):
        clipseg_masks([photo()], "cat", folder)


def test_a_damaged_model_and_a_missing_package_are_told(
    clipseg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(clipseg, tmp_path / "clipseg")
    (folder / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(ClipSegError, match="cannot be read"):
        clipseg_masks([photo()], "cat", folder)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ClipSegError, match="needs the Python package transformers"):
        clipseg_masks([photo()], "cat", clipseg)
