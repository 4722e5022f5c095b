"""Progress bars on nodes, and cancelling, as ComfyUI has them."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management
import comfy.utils


def progress_on(node_id: str | None) -> Callable[[int, int], None]:
    """``report(done, total)`` shows progress on a node, and raises the host's own exception when the user cancels."""
    bar: comfy.utils.ProgressBar | None = None

    def report(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = comfy.utils.ProgressBar(total, node_id=node_id)
        bar.update_absolute(done, total)
        comfy.model_management.throw_exception_if_processing_interrupted()

    return report
