"""ComfyUI's entry to the pack."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import PerfusionExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> PerfusionExtension:
    """Called by ComfyUI when it loads the pack."""
    from .nodes import PerfusionExtension

    return PerfusionExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
