"""Fixtures of all tiers. The pure tier (tests/unit) uses none of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts import (
    MODEL_STORE,
    Base,
    ComfyHost,
    ComfyServer,
    ServerOptions,
    browser,
    main_host,
    other_packs,
    running_server,
)

# What takes longest begins first, so that no worker is left alone with it at the end.
LONGEST = ("test_oldest_host", "test_end_to_end", "test_workflows", "test_live_training", "test_odd_photos")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def model_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where test models are written once: PERFUSION_TEST_MODELS, else a folder of this session."""
    folder = os.environ.get(MODEL_STORE)
    return Path(folder).expanduser().absolute() if folder else tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def comfy_host(tmp_path_factory: pytest.TempPathFactory, model_store: Path) -> Iterator[ComfyHost]:
    """A ComfyUI in this process, with the pack and other people's packs loaded as custom nodes."""
    comfyui = main_host()
    base = Base.make(tmp_path_factory.mktemp("host"), model_store, other_packs())
    host = ComfyHost(comfyui, base)
    yield host
    host.close()


@pytest.fixture(scope="session")
def comfy_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_store: Path
) -> Iterator[ComfyServer]:
    """A ComfyUI server with the pack. Other command lines: indirect parametrization with `ServerOptions`."""
    comfyui = main_host()
    options = getattr(request, "param", ServerOptions())
    packs = other_packs() if options.packs else {}
    base = Base.make(tmp_path_factory.mktemp("server"), model_store, packs)
    with running_server(comfyui, base, options) as server:
        yield server


@pytest.fixture(scope="session")
def browser_path() -> str:
    """The path of a Chromium."""
    return browser()
