"""The shipped workflows as files: each with its API twin and its picture, and no node over another."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
TITLE, FRAME = 30, 20  # the bar above a node's box; the room that Nodes 2.0 need below one that is larger there


def box(node: dict[str, Any]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom."""
    (left, top), (width, height) = node["pos"], node["size"]
    return left, top - TITLE, left + width, top + height


def test_each_has_a_twin_and_a_picture() -> None:
    names = {path.stem for path in WORKFLOWS}
    assert names == {path.stem for path in (ROOT / "tests" / "api").glob("*.json")}
    for path in WORKFLOWS:
        with Image.open(path.with_suffix(".jpg")) as picture:
            assert picture.size == (960, 540)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nodes_lie_side_by_side(path: Path) -> None:
    nodes = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    for one, other in combinations(nodes, 2):
        a, b = box(one), box(other)
        apart = a[2] + FRAME <= b[0] or b[2] + FRAME <= a[0] or a[3] + FRAME <= b[1] or b[3] + FRAME <= a[1]
        assert apart, f"{one['type']} and {other['type']}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_node_is_in_one_frame(path: Path) -> None:
    workflow = json.loads(path.read_text(encoding="utf-8"))
    for node in workflow["nodes"]:
        left, top, right, bottom = box(node)
        around = [
            group["title"]
            for group in workflow["groups"]
            for x, y, width, height in [group["bounding"]]
            if x <= left and y <= top and right <= x + width and bottom <= y + height
        ]
        assert len(around) == 1, node["type"]
