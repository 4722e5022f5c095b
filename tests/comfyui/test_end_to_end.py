"""The product's main job as its user does it: through a real server's /prompt, train two concepts, save, load, draw."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.hosts import (
    Base,
    ComfyServer,
    Prompt,
    ServerOptions,
    ServerPromptError,
    main_host,
    oldest_host,
    running_server,
)

pytestmark = [pytest.mark.comfyui, pytest.mark.server]

API = Path(__file__).parents[1] / "api"
# Quick by default. PERFUSION_E2E_SIZE=256 and PERFUSION_E2E_PHOTOS=<folder with teddy/, cat/, each with mask/> run the
# same with real photos.
SIZE = int(os.environ.get("PERFUSION_E2E_SIZE", "64"))
PHOTOS = os.environ.get("PERFUSION_E2E_PHOTOS")
STEPS = 20 if PHOTOS else 4
QUICK = {
    "steps": STEPS,
    "batch_size": int(os.environ.get("PERFUSION_E2E_BATCH", "2")),
    "resolution": SIZE,
    "contexts": 8,
    "companions": 1,
    "corpus_size": 32,
    **({} if PHOTOS else {"captions": "a photo of a {}\na {} outside"}),  # each is encoded by a full-size encoder
    "previews": False,
}
MINIATURE = ("miniature_train", "miniature_two_concepts")  # workflows that need no checkpoint


@pytest.fixture(scope="module", params=[main_host, oldest_host], ids=["main", "oldest"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_store: Path
) -> Iterator[ComfyServer]:
    comfyui: Callable[[], Path] = request.param
    base = Base.make(tmp_path_factory.mktemp("end_to_end"), model_store, {})
    with running_server(comfyui(), base, ServerOptions()) as running:
        put_photos(running.base / "input")
        yield running
        if kept := os.environ.get("PERFUSION_E2E_OUTPUT"):
            shutil.copytree(running.base / "output", Path(kept) / comfyui().name, dirs_exist_ok=True)


def put_photos(folder: Path) -> None:
    """The photos and masks that the workflows name: drawn ones, or real ones from PERFUSION_E2E_PHOTOS."""
    for thing, color in (("teddy", (170, 110, 50)), ("cat", (90, 90, 100))):
        for number in range(1, 5):
            photo, mask = folder / f"{thing}_{number}.jpg", folder / f"{thing}_mask_{number}.jpg"
            if PHOTOS:
                shutil.copy(Path(PHOTOS) / thing / f"{number - 1}.jpg", photo)
                shutil.copy(Path(PHOTOS) / thing / "mask" / f"{number - 1}.jpg", mask)
                continue
            scene, shape = (
                Image.new("RGB", (160, 140), (60 + 40 * number, 150, 200 - 30 * number)),
                Image.new("L", (160, 140)),
            )
            spot = [20 + 10 * number, 30, 90 + 10 * number, 120]
            ImageDraw.Draw(scene).ellipse(spot, fill=color, outline=(20, 20, 20), width=4)
            ImageDraw.Draw(shape).ellipse(spot, fill=255)
            scene.save(photo)
            shape.save(mask)


def miniature_graph(name: str) -> Prompt:
    """The API twin of a workflow of the miniature, in fewer steps."""
    prompt = json.loads((API / f"{name}.json").read_text())
    for node in prompt.values():
        if node["class_type"] == "PerfusionTrainConcept":
            node["inputs"] |= QUICK | {"steps": 8, "resolution": 64}
        elif node["class_type"] == "KSampler":
            node["inputs"] |= {"steps": 4}
    return prompt


def graph(server: ComfyServer, name: str) -> Prompt:
    """The API twin of a shipped workflow, on the reduced checkpoint and at a size for CPUs."""
    prompt = json.loads((API / f"{name}.json").read_text())
    prompt["checkpoint"]["inputs"]["ckpt_name"] = server.model("checkpoint")
    prompt["latent"]["inputs"] |= {"width": SIZE, "height": SIZE}
    prompt["sampler"]["inputs"] |= {"steps": 4}
    if "train" in prompt:
        prompt["train"]["inputs"] |= QUICK
    return prompt


def cat_of(prompt: Prompt) -> Prompt:
    """The same training for the cat."""
    return json.loads(json.dumps(prompt).replace("teddy bear", "cat").replace("teddy", "cat"))


def executed(entry: dict) -> set[str]:
    """Nodes that ran, and did not come from the cache."""
    cached = {
        node for name, data in entry["status"]["messages"] if name == "execution_cached" for node in data["nodes"]
    }
    return set(entry["prompt"][2]) - cached


def images(server: ComfyServer, entry: dict) -> list[bytes]:
    """What the save nodes of a run wrote."""
    saved = [image for node, output in entry["outputs"].items() if node == "save_image" for image in output["images"]]
    return [(server.base / "output" / image["subfolder"] / image["filename"]).read_bytes() for image in saved]


def test_train_save_load_and_draw(server: ComfyServer) -> None:
    teddy = graph(server, "train_concept")
    first = server.queue(teddy, timeout=3600)
    assert first["outputs"]["save"]["text"] == ["my-teddy.safetensors"]
    assert first["outputs"]["loss"]["images"]
    assert len(images(server, first)) == 1

    again = server.queue(teddy)
    assert "train" not in executed(again)

    drawn_again = copy.deepcopy(teddy)
    drawn_again["sampler"]["inputs"]["seed"] = 2
    assert executed(server.queue(drawn_again)) >= {"sampler"}
    assert "train" not in executed(server.queue(drawn_again))

    cat = server.queue(cat_of(teddy), timeout=3600)
    assert cat["outputs"]["save"]["text"] == ["my-cat.safetensors"]

    folder = server.base / "output" / "perfusion"
    assert sorted(path.name for path in folder.iterdir()) == ["my-cat.safetensors", "my-teddy.safetensors"]
    assert all(path.stat().st_size < 36 * 1024 for path in folder.iterdir())

    both = graph(server, "two_concepts")
    pictures = [images(server, server.queue({**both, "sampler": _seeded(both, seed)}))[0] for seed in (1, 2)]
    assert pictures[0] != pictures[1]
    off = copy.deepcopy(both)
    off["load"]["inputs"] |= {"on_1": False, "strength_2": 0.0}
    stock = copy.deepcopy(off)
    del stock["load"], stock["apply"]
    for text in ("positive", "negative"):
        stock[text]["inputs"]["clip"] = ["checkpoint", 1]
    stock["sampler"]["inputs"]["model"] = ["checkpoint", 0]
    assert _pixels(images(server, server.queue(off))[0]) == _pixels(images(server, server.queue(stock))[0])
    assert _pixels(images(server, server.queue(both))[0]) == _pixels(pictures[0])
    assert _pixels(images(server, server.queue(stock))[0]) != _pixels(pictures[0])


@pytest.mark.parametrize("name", MINIATURE)
def test_the_miniature_learns_and_draws_with_nothing_else(server: ComfyServer, name: str) -> None:
    prompt = miniature_graph(name)
    run = server.queue(prompt)
    saved = [node for node in prompt if node.startswith("save_image")]
    assert len(saved) == (1 if name == "miniature_train" else 3)
    pictures = [Image.open(server.base / "output" / i["filename"]) for n in saved for i in run["outputs"][n]["images"]]
    assert [picture.size for picture in pictures] == [(256, 256)] * 4 * len(saved)
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    shown = [run["outputs"][node]["images"] for node in prompt if node.startswith("photos")]
    assert all(len(photos) == 5 for photos in shown)
    if "save" in prompt:
        assert run["outputs"]["save"]["text"] == ["miniature-teddy.safetensors"]
        assert run["outputs"]["loss"]["images"]
    again = server.queue(prompt)
    assert not any(node.startswith("train") for node in executed(again))
    assert [again["outputs"][node]["images"] for node in prompt if node.startswith("photos")] == shown


def _seeded(prompt: Prompt, seed: int) -> dict:
    sampler = copy.deepcopy(prompt["sampler"])
    sampler["inputs"]["seed"] = seed
    return sampler


def _pixels(png: bytes) -> bytes:
    import io

    return Image.open(io.BytesIO(png)).tobytes()


def test_a_missing_file_is_refused_when_queueing(server: ComfyServer) -> None:
    prompt = graph(server, "two_concepts")
    prompt["load"]["inputs"]["file_2"] = "no-such-thing.safetensors"
    with pytest.raises(ServerPromptError) as refused:
        server.submit(prompt)
    assert "no-such-thing" in json.dumps(refused.value.node_errors["load"])
