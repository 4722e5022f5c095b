"""The pure tier is deterministic: the same examples on every machine, and no clock that fails a busy one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "pure",
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("pure")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
