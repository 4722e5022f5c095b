"""The reduced checkpoint through a real server's /prompt."""

from __future__ import annotations

import time

import pytest

from tests.graphs import node, text_to_image
from tests.hosts import ComfyServer, PromptInterrupted, ServerPromptError

pytestmark = pytest.mark.server


def test_image_through_the_server(comfy_server: ComfyServer) -> None:
    prompt = text_to_image(comfy_server.model("checkpoint"))
    prompt["save"] = node("SaveImage", images=["decode", 0], filename_prefix="smoke")
    entry = comfy_server.queue(prompt)
    (image,) = entry["outputs"]["save"]["images"]
    assert (comfy_server.base / "output" / image["filename"]).is_file()


def test_refused_prompt_carries_node_errors(comfy_server: ComfyServer) -> None:
    prompt = text_to_image("no such checkpoint.safetensors")
    prompt["save"] = node("SaveImage", images=["decode", 0], filename_prefix="smoke")
    with pytest.raises(ServerPromptError) as refused:
        comfy_server.queue(prompt)
    assert "checkpoint" in refused.value.node_errors


def test_interrupted_run_raises_and_leaves_the_server_usable(comfy_server: ComfyServer) -> None:
    prompt = text_to_image(comfy_server.model("checkpoint"), steps=5000)
    prompt["save"] = node("SaveImage", images=["decode", 0], filename_prefix="smoke")
    running = comfy_server.submit(prompt)
    while running not in comfy_server.get(f"/history/{running}"):
        comfy_server.interrupt()  # again and again: the host forgets one that comes before the first node
        time.sleep(0.1)
    with pytest.raises(PromptInterrupted):
        comfy_server.wait(running)
    prompt["sampler"]["inputs"]["steps"] = 1
    assert comfy_server.queue(prompt)["outputs"]["save"]
