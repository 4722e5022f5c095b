"""The pack's nodes. Each module lists its own in ``NODES``."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..perfusion.hosts.comfyui import library
from . import concepts, explore, inspect, miniature, photos, score, settings, share, train


class PerfusionExtension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes, and, once, the folders where concepts lie."""
        library.register()
        modules = (photos, train, concepts, settings, share, inspect, explore, score, miniature)
        return [node for module in modules for node in module.NODES]
