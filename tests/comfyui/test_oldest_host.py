"""This folder's tests again, on the oldest supported ComfyUI, in a process of its own: two hosts cannot share one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts import MODEL_STORE, OLDEST_RUN, ROOT, oldest_host


@pytest.mark.comfyui
@pytest.mark.slow
def test_oldest_host(model_store: Path) -> None:
    """In process; the server's part is a parameter of the end-to-end tests."""
    if os.environ.get(OLDEST_RUN):
        pytest.skip("this is the run on the oldest host")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        "COMFYUI_PATH": str(oldest_host()),
        MODEL_STORE: str(model_store),
        OLDEST_RUN: "1",
    }
    tier = "comfyui and not server and not slow and not any_host"
    # What torch compiles and what diffusers computes is the same on any host, too; SDXL's training is the longest, and
    # one SD2.x and concepts that are looked at more stand for the other: all takes long.
    left_out = "not compil and not both_hosts and not sdxl and not sd2-eps and not unfocused"
    command = [sys.executable, "-m", "pytest", "tests/comfyui", "-m", tier, "-k", left_out, "-q"]
    command += ["-p", "no:cacheprovider"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        pytest.fail(f"on the oldest host:\n{result.stdout[-6000:]}\n{result.stderr[-2000:]}", pytrace=False)
