"""Photos as people have them, and people who change their mind: through a real server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.comfyui.test_end_to_end import executed, graph, put_photos
from tests.graphs import node
from tests.hosts import Base, ComfyServer, Prompt, PromptInterrupted, ServerOptions, main_host, running_server

pytestmark = [pytest.mark.comfyui, pytest.mark.server]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_store: Path) -> Iterator[ComfyServer]:
    base = Base.make(tmp_path_factory.mktemp("odd_photos"), model_store, {})
    options = ServerOptions(args=("--use-pytorch-cross-attention",))
    with running_server(main_host(), base, options) as running:
        put_photos(running.base / "input")
        yield running


def training(server: ComfyServer) -> Prompt:
    """The workflow of a training, with the miniature in place of a checkpoint: photos are what is tested."""
    prompt = graph(server, "train_concept")
    prompt["checkpoint"] = node("PerfusionMiniature")
    return prompt


def test_grey_16_bit_transparent_and_huge_photos_train(server: ComfyServer) -> None:
    folder, noise = server.base / "input", np.random.default_rng(0)
    Image.fromarray(noise.integers(0, 2**16, (90, 120), dtype=np.uint16)).save(folder / "grey_16_bit.png")
    transparent = noise.integers(0, 256, (200, 100, 4), dtype=np.uint8)
    Image.fromarray(transparent).save(folder / "transparent.png")
    Image.fromarray(transparent[..., 0]).convert("P").save(folder / "palette.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (7000, 5000), (120, 90, 60)).save(folder / "huge.jpg", exif=exif)
    prompt = training(server)
    prompt["train"]["inputs"] |= {"steps": 2}
    for number, name in enumerate(["grey_16_bit.png", "transparent.png", "palette.png", "huge.jpg"], start=1):
        prompt[f"photo_{number}"]["inputs"]["image"] = name
    assert "train" in executed(server.queue(prompt, timeout=300))


def test_a_change_trains_again(server: ComfyServer) -> None:
    prompt = training(server)
    del prompt["loss"]
    prompt["train"]["inputs"] |= {"steps": 1, "batch_size": 1}
    server.queue(prompt)
    assert "train" not in executed(server.queue(prompt))
    for name in ("teddy_2.jpg", "teddy_mask_2.jpg"):
        path = server.base / "input" / name
        before = path.read_bytes()
        try:
            Image.open(path).rotate(180).save(path)
            assert "train" in executed(server.queue(prompt)), name
        finally:
            path.write_bytes(before)
    prompt["train"]["inputs"]["seed"] = 7
    assert "train" in executed(server.queue(prompt)), "seed"


def test_a_cancelled_training_leaves_the_next_one_as_it_would_have_been(server: ComfyServer) -> None:
    prompt = training(server)
    prompt["train"]["inputs"] |= {"steps": 100_000, "corpus_size": 48}
    known = statistics_of(server)
    running = server.submit(prompt)
    wait_for_steps(server, known)
    server.interrupt()
    with pytest.raises(PromptInterrupted):
        server.wait(running)
    saved = server.base / "output" / "perfusion"
    before = sorted(saved.glob("*"))
    prompt["train"]["inputs"]["steps"] = 3
    server.queue(prompt)
    once = set(saved.glob("*")) - set(before)
    assert len(once) == 1
    assert not list(saved.glob(".*")), "no part of a file is left"


def statistics_of(server: ComfyServer) -> set[Path]:
    return set((server.base / "user" / "perfusion" / "statistics").glob("*.safetensors"))


def wait_for_steps(server: ComfyServer, before: set[Path]) -> None:
    """Until the optimizer is at work: a second moment of its own, kept before the first step, has been written."""
    deadline = time.monotonic() + 120
    while statistics_of(server) <= before:
        assert time.monotonic() < deadline, server.log[-2000:]
        time.sleep(0.2)
    time.sleep(3)
