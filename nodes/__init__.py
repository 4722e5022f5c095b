"""The pack's nodes. Each module lists its own in ``NODES``."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from ..perfusion.hosts.comfyui import library
from . import concepts, inspect, miniature, photos, share, train


class PerfusionExtension(ComfyExtension):
    """What ComfyUI asks for the pack's nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes, and, once, the folders where concepts lie."""
        library.register()
        return [*photos.NODES, *train.NODES, *concepts.NODES, *share.NODES, *inspect.NODES, *miniature.NODES]
