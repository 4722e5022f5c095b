"""The workflow that travels with a run, and ends in the metadata of what it saves."""

from __future__ import annotations

import json
import logging
from typing import Any

from comfy.cli_args import args

logger = logging.getLogger(__name__)


def set_widget(extra_pnginfo: Any, node_id: str | None, index: int, name: str, value: str) -> bool:
    """Put a value into a widget of a node in the workflow of this run, in place: nodes that save later see it.

    ``node_id`` is the one of the running node, "1:2:3" inside of subgraphs. Returns whether there was such a widget;
    a run that comes without a workflow, as those of programs do, has none.
    """
    try:
        node = _node(extra_pnginfo["workflow"], str(node_id).split(":"))
        node["widgets_values"][index] = value
        if name in (node.get("widgets_values_named") or {}):
            node["widgets_values_named"][name] = value
    except (KeyError, IndexError, TypeError, StopIteration):
        logger.debug("the workflow of this run has no widget %s of node %s", name, node_id)
        return False
    return True


def _node(workflow: Any, path: list[str]) -> Any:
    """The node of a path of ids; each but the last is that of a subgraph."""
    subgraphs = {subgraph["id"]: subgraph for subgraph in (workflow.get("definitions") or {}).get("subgraphs") or ()}
    level = workflow
    for step in path[:-1]:
        level = subgraphs[next(node["type"] for node in level["nodes"] if str(node["id"]) == step)]
    return next(node for node in level["nodes"] if str(node["id"]) == path[-1])


def metadata(prompt: Any, extra_pnginfo: Any, room: int) -> dict[str, str]:
    """``workflow`` and ``prompt`` as the front end finds them in a .safetensors file that is dropped on it.

    What would take more than ``room`` bytes of the file's header is left out, the prompt first. Nothing where the host
    was told to write no metadata.
    """
    if args.disable_metadata:
        return {}
    given = {"workflow": (extra_pnginfo or {}).get("workflow"), "prompt": prompt}
    kept: dict[str, str] = {}
    for name, value in given.items():
        text = None if value is None else json.dumps(value)
        if text is None:
            continue
        # The header is JSON once more, where quotes and backslashes are escaped.
        size = len(json.dumps(text)) + len(name) + 8
        if size > room:
            logger.warning("the %s is too large for the file's header (%d bytes) and was left out of it", name, size)
            continue
        room -= size
        kept[name] = text
    return kept
