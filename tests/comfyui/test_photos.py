"""Photos and their masks, from files to a training's inputs, in a real ComfyUI."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.comfyui.test_training_host import left_alone, predict
from tests.graphs import node
from tests.hosts import ComfyHost, PromptError
from tests.models import miniature_parts

pytestmark = pytest.mark.comfyui

IMAGES, MASKS, CAPTIONS, NOTES = (("photos", k) for k in range(4))
MASK, PREVIEW, MADE = (("mask", k) for k in range(3))


@pytest.fixture
def folder(comfy_host: ComfyHost) -> Iterator[Path]:
    """A wide photo with a mask and a caption, a tall one without, and one that is damaged."""
    place = comfy_host.base / "input" / "set" / "teddy"
    place.mkdir(parents=True)
    noise = np.random.default_rng(0)
    Image.fromarray(noise.integers(0, 256, (40, 80, 3), dtype=np.uint8)).save(place / "1.png")
    Image.fromarray(noise.integers(0, 256, (90, 50, 3), dtype=np.uint8)).save(place / "2.jpg")
    Image.new("L", (80, 40), 255).save(place / "1-mask.png")
    (place / "1.txt").write_text("on a beach\nat noon", encoding="utf-8")
    (place / "3.png").write_bytes(b"damaged")
    yield place
    shutil.rmtree(comfy_host.base / "input" / "set")


def loading(name: str = "set/teddy") -> dict[str, Any]:
    return {"photos": node("PerfusionLoadPhotos", folder=name)}


def test_a_folder_becomes_lists_and_is_read_again_when_it_changes(comfy_host: ComfyHost, folder: Path) -> None:
    links = [IMAGES, MASKS, CAPTIONS, NOTES]
    comfy_host.new_executor()
    run = comfy_host.execute(loading(), keep=links)
    # What is kept of a list is its last entry: the node that keeps runs once for each.
    assert run[IMAGES].shape == (1, 90, 50, 3)
    assert run[MASKS].shape == (1, 90, 50) and not run[MASKS].any()
    assert run[CAPTIONS] == ""
    assert run[NOTES] == "3.png is left out: it is no picture of a known kind"
    assert len(run.ui["photos"]["images"]) == 2 and list(run.ui["photos"]["text"]) == [run[NOTES]]
    assert "photos" in run.executed
    assert "photos" not in comfy_host.execute(loading(), keep=links).executed
    (folder / "2.txt").write_text("my teddy", encoding="utf-8")
    again = comfy_host.execute(loading(), keep=links)
    assert "photos" in again.executed
    assert again[CAPTIONS] == "my teddy"


def test_folders_are_listed_and_found_by_name_below_the_input_folder(comfy_host: ComfyHost, folder: Path) -> None:
    library = comfy_host.module("perfusion.hosts.comfyui.library")
    (folder / "masks").mkdir()
    shutil.copy(folder / "1-mask.png", folder / "masks" / "1.png")
    deep = folder / "a" / "b" / "c"
    deep.mkdir(parents=True)
    shutil.copy(folder / "1.png", deep / "1.png")
    outside = comfy_host.base / "output" / "elsewhere"
    outside.mkdir(exist_ok=True)
    shutil.copy(folder / "1.png", outside / "1.png")
    with contextlib.suppress(OSError):  # no right to make links
        (folder.parent / "link").symlink_to(outside, target_is_directory=True)
    listed = [name for name in library.photo_folders() if name.startswith("set")]
    assert listed == ["set/teddy"], "deeper ones than four levels, masks and links are left out"
    assert library.find_photo_folder("set/teddy") == folder
    for name in ("", "set/missing", "set/link", "../output/elsewhere", str(outside), "set/../../output", "C:\\x"):
        with pytest.raises(ValueError, match="no folder .* in ComfyUI's input folder"):
            library.find_photo_folder(name)
    with pytest.raises(PromptError, match=r"Load Photos, input 'folder': there is no folder 'set/link'"):
        comfy_host.validate(loading("set/link"), keep=[IMAGES])


def masking(**inputs: Any) -> dict[str, Any]:
    given = {"images": list(IMAGES), "super_category": "cat", "method": "attention", "resolution": 64, **inputs}
    return {**loading(), "mask": node("PerfusionMasks", **given)}


def test_masks_by_attention_of_photos_of_any_size(comfy_host: ComfyHost, folder: Path) -> None:
    checkpoint = {name: ["mini", k] for k, name in enumerate(("model", "clip", "vae"))}
    graph = {**masking(**checkpoint, masks=list(MASKS)), "mini": node("PerfusionMiniature")}
    run = comfy_host.execute(graph, keep=[MASK, PREVIEW, MADE])
    assert run[MASK].shape == (1, 90, 50) and run[PREVIEW].shape == (1, 90, 50, 3)
    assert 0 < float(run[MASK].min()) < float(run[MASK].max()) <= 1
    assert run[MADE].startswith("masks of photo 2 were made from the model's own attention to 'cat'")
    assert "confidence: 100%, " in run[MADE]
    assert len(run.ui["mask"]["images"]) == 2


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"Make Masks, input 'model': nothing arrived"),
        ({"method": "clipseg"}, r"Make Masks, input 'method': CLIPSeg is not there: .*models/clipseg"),
    ],
)
def test_what_is_missing_is_named(comfy_host: ComfyHost, folder: Path, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        comfy_host.execute(masking(**inputs), keep=[MASK])


def test_looking_for_a_word_leaves_the_model_as_it_was(comfy_host: ComfyHost) -> None:
    """In training and outside of it, with the same result; afterwards the model draws what it drew."""
    parts = miniature_parts()
    hosts, word_of = (
        comfy_host.module("perfusion.hosts.comfyui.training"),
        comfy_host.module("perfusion.hosts.base").Word,
    )
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 8, 12, generator=generator)
    with torch.inference_mode():
        before = predict(parts)
        host = hosts.ComfyHost(parts.model, parts.clip, parts.vae)

        def look() -> torch.Tensor:
            return host.attention_maps(latents, ["a photo of a <it>"] * 3, word_of("<it>", "cat"), (0.5, 1.0))

        outside = look()
        assert left_alone(parts)
        with host.training():
            inside = look()
            values = host.project_values(torch.ones(1, host.family.context_width))
        assert torch.equal(predict(parts), before)
    assert outside.shape == (3, 8, 12) and 0 < float(outside.min()) < float(outside.max()) < 1
    torch.testing.assert_close(inside, outside)
    assert set(values) == set(host.family.layers)
    assert left_alone(parts)


def test_both_hosts_look_at_the_same_places(comfy_host: ComfyHost) -> None:
    """The miniature in ComfyUI and in diffusers."""
    pytest.importorskip("diffusers")
    links = [("mini", k) for k in range(3)]
    run = comfy_host.execute({"mini": node("PerfusionMiniature")}, keep=links)
    training = comfy_host.module("perfusion.hosts.comfyui.training")
    word = comfy_host.module("perfusion.hosts.base").Word("<it>", "teddy bear")
    latents = torch.randn(2, 4, 16, 12, generator=torch.Generator().manual_seed(0))
    maps = [
        host.attention_maps(latents, ["a photo of a <it>", "a <it> in the snow"], word, (0.4, 0.8))
        for host in (
            training.ComfyHost(*(run[link] for link in links)),
            comfy_host.module("miniature.host").load_host(),
        )
    ]
    assert float(maps[0].std()) > 1e-3
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-3, atol=1e-5)
