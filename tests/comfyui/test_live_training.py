"""A training in a real server that is watched, canceled, killed, and goes on: on the miniature, in a few steps."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from perfusion.concept import load
from tests.graphs import node
from tests.hosts import Base, ComfyServer, Prompt, ServerOptions, ServerPromptError, main_host, running_server

pytestmark = [pytest.mark.comfyui, pytest.mark.server]

STEPS, EVERY = 6, 2
# What tells of itself by its steps alone: nothing is drawn to judge them.
UNSEEN: dict[str, Any] = {"clip_vision": None, "previews": False, "steps": 12}


def training(placeholder: str, **settings: Any) -> Prompt:
    """Photos of a teddy, what is learned from them, and its report."""
    inputs: dict[str, Any] = {
        **{name: ["miniature", index] for index, name in enumerate(("model", "clip", "vae", "clip_vision"))},
        "images": ["photos", 0],
        "masks": ["photos", 1],
        "super_category": ["photos", 2],
        "placeholder": placeholder,
        "steps": STEPS,
        "checkpoint_every": EVERY,
        "batch_size": 2,
        "micro_batch": 0,
        "resolution": 64,
        "seed": 0,
        "flip": True,
        "gradient_checkpointing": False,
        "rates": "relative",
        "value_rate": 0.1,
        "embedding_rate": 0.05,
        "estimator": "robust",
        "form": "paper",
        "vectors": 1,
        "contexts": 8,
        "corpus": "built-in",
        "corpus_size": 32,
        "captions": "",
        "companions": 1,
        "patience": 0,
    }
    inputs = {name: value for name, value in {**inputs, **settings}.items() if value is not None}
    return {
        "miniature": node("PerfusionMiniature"),
        "photos": node("PerfusionMiniaturePhotos", category="teddy bear", thing=28, count=3, seed=0),
        "train": node("PerfusionTrainConcept", **inputs),
        "save": node("PerfusionSaveConcept", concept=["train", 0], name=placeholder.strip("<>")),
        "report": node("PreviewAny", source=["train", 3]),
    }


@contextlib.contextmanager
def listening(server: ComfyServer) -> Iterator[list[dict]]:
    """What the server tells a front end while the block runs: a list that grows."""
    import aiohttp  # comes with ComfyUI

    heard: list[dict] = []
    ready = threading.Event()
    stop: list[Callable[[], object]] = []

    async def read(socket: aiohttp.ClientWebSocketResponse[bool]) -> None:
        async for message in socket:
            if message.type == aiohttp.WSMsgType.TEXT:
                heard.append(json.loads(message.data))

    async def listen() -> None:
        url = f"{server.url.replace('http', 'ws')}/ws?clientId={server.client_id}"
        loop, stopped = asyncio.get_running_loop(), asyncio.Event()
        async with aiohttp.ClientSession() as client, client.ws_connect(url, max_msg_size=0) as socket:
            reading = asyncio.create_task(read(socket))
            stop.append(lambda: loop.call_soon_threadsafe(stopped.set))
            ready.set()
            await stopped.wait()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(listen()), daemon=True)
    thread.start()
    assert ready.wait(30)
    try:
        yield heard
    finally:
        stop[0]()
        thread.join(30)


def told(heard: list[dict]) -> list[dict]:
    """The trainings' own events."""
    return [message["data"] for message in list(heard) if message.get("type") == "perfusion.training"]


def until(true: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def reached(heard: list[dict], step: int) -> bool:
    return any(event.get("step", 0) >= step for event in told(heard))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, model_store: Path) -> Base:
    return Base.make(tmp_path_factory.mktemp("live"), model_store, {})


@pytest.fixture(scope="module")
def whole(base: Base) -> Iterator[tuple[ComfyServer, str, list[dict]]]:
    """A server, the digest of a concept that was trained in one go, and what was told of it."""
    with running_server(main_host(), base, ServerOptions()) as server:
        with listening(server) as heard:
            server.queue(training("<my-teddy>"))
            until(lambda: any("preview" in event for event in told(heard)))
        yield server, load(server.base / "output" / "perfusion" / "my-teddy.safetensors").digest, told(heard)


def test_a_training_tells_what_it_does(whole: tuple[ComfyServer, str, list[dict]]) -> None:
    _, _, events = whole
    steps = [event for event in events if "loss" in event]
    assert {event["node"] for event in steps} == {"train"} and all(event["prompt_id"] for event in steps)
    assert [event["step"] for event in steps] == sorted(event["step"] for event in steps)
    assert steps[-1]["step"] == STEPS == steps[-1]["steps"]
    assert all(0 <= event["gate"] <= 1 and event["seconds_left"] >= 0 and event["loss"] > 0 for event in steps)
    scored = [event for event in steps if event["score"]]
    assert [event["step"] for event in scored] == list(range(EVERY, STEPS + 1, EVERY))
    assert all(not event["score"]["weak"] and event["score"]["image"] is not None for event in scored)
    assert scored[-1]["best_step"] == max(scored, key=lambda event: event["score"]["value"])["step"]
    uri = next(event["preview"] for event in events if "preview" in event)
    picture = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))
    assert picture.format == "JPEG" and max(picture.size) <= 768 and min(picture.size) > 64


def test_canceled_it_is_kept_and_goes_on_as_if_it_had_not_been(whole: tuple[ComfyServer, str, list[dict]]) -> None:
    server, digest, _ = whole
    prompt = training("<my-teddy>", resume="never", seed=0)
    with listening(server) as heard:
        running = server.submit(prompt)
        until(lambda: reached(heard, EVERY + 1))
        server.interrupt()
        with pytest.raises(ServerPromptError):
            server.wait(running)
        until(lambda: any("saved" in event for event in told(heard)))
    stopped = max(event["step"] for event in told(heard))
    assert EVERY < stopped < STEPS
    saved = next(event["saved"] for event in told(heard) if "saved" in event)
    assert load(server.base / "output" / "perfusion" / saved).training["steps_done"] in range(EVERY, stopped + 1, EVERY)
    kept = sorted((server.base / "user" / "perfusion" / "trainings").glob("my-teddy-*.safetensors"))
    assert len(kept) == 2, "that of the first training was not touched"
    name = kept[1].stem

    prompt["train"]["inputs"]["resume"] = name
    run = server.queue(prompt)
    assert f"Went on from step {stopped}" in str(run["outputs"]["report"])
    assert load(server.base / "output" / "perfusion" / run["outputs"]["save"]["text"][0]).digest == digest

    prompt["train"]["inputs"]["value_rate"] = 0.2
    with pytest.raises(ServerPromptError, match=r"value_rate 0\.1, now 0\.2"):
        server.queue(prompt)


def test_a_killed_server_loses_only_the_steps_since_the_last_checkpoint(
    base: Base, whole: tuple[ComfyServer, str, list[dict]]
) -> None:
    prompt = training("<my-cat>", **UNSEEN)
    with running_server(main_host(), base, ServerOptions()) as server, listening(server) as heard:
        server.submit(prompt)
        until(lambda: reached(heard, EVERY + 1))
        os.kill(server.pid, signal.SIGKILL)
    with running_server(main_host(), base, ServerOptions()) as server:
        run = server.queue(prompt)
        report = str(run["outputs"]["report"])
        assert any(f"Went on from step {step}" in report for step in range(EVERY, UNSEEN["steps"], EVERY))
        anew = server.queue(training("<my-cat>", resume="never", **UNSEEN))
        folder = server.base / "output" / "perfusion"
        digests = {load(folder / each["outputs"]["save"]["text"][0]).digest for each in (run, anew)}
        assert len(digests) == 1
