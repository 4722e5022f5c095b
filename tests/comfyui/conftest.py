"""Fixtures of tests within a ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.concepts import Lab
from tests.hosts import ComfyHost
from tests.models import miniature_parts


@pytest.fixture(scope="module")
def lab(comfy_host: ComfyHost) -> Lab:
    """A small network of random weights in memory. Modules that need another have a fixture of this name."""
    return Lab(comfy_host, miniature_parts())


@pytest.fixture
def nothing_left(lab: Lab) -> Iterator[None]:
    """Behind every test, the networks are as they came."""
    yield
    lab.forget()
    lab.assert_untouched()
