"""Progress bars on nodes, cancelling, and the live view of a training, as ComfyUI has them."""

from __future__ import annotations

import base64
import io
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context
from PIL import Image
from server import PromptServer
from torch import Tensor

if TYPE_CHECKING:
    from ...training.run import Update

logger = logging.getLogger(__name__)

EVENT = "perfusion.training"
_SECONDS = 0.2  # between events that carry nothing but numbers
_WAITING = 2  # pictures that may wait to be sent; further ones are dropped, as a newer one follows
_SIDE = 768  # pixels of the longer side of a preview


def progress_on(node_id: str | None) -> Callable[[int, int], None]:
    """``report(done, total)`` shows progress on a node, and raises the host's own exception when the user cancels."""
    bar: Any = None

    def report(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = comfy.utils.ProgressBar(total, node_id=node_id)
        bar.update_absolute(done, total)
        comfy.model_management.throw_exception_if_processing_interrupted()

    return report


class TrainingView:
    """Shows a training on its node, and tells front ends of it by ``perfusion.training`` events.

    A listener of ``perfusion.training.run.Run``: it raises the host's own exception when the user cancels.
    Events hold ``node``, ``prompt_id``, ``step``, ``steps``, ``loss``, ``gate`` (0 to 1), ``seconds_left``,
    ``best_step``, ``score`` (of a step that was just scored: ``value``, ``image``, ``text``, ``weak``) and ``warning``;
    an event of the same name with ``step`` and ``preview`` (a JPEG as data URI) follows where pictures were drawn, one
    with ``step`` 0 and ``masks`` (the same) where masks were made, and one with ``step`` and ``saved`` (the name of a
    concept file) where a training was stopped.
    To be used as a context manager, which ends the thread that encodes them.
    """

    def __init__(self, node_id: str | None):
        self._node = node_id
        context = get_executing_context()
        self._prompt = context.prompt_id if context else None
        self._bar: Any = None
        self._sent = -math.inf
        self._pictures: queue.Queue[tuple[int, str, Image.Image] | None] = queue.Queue(_WAITING)
        self._encoder = threading.Thread(target=self._encode, name="perfusion previews", daemon=True)

    def __enter__(self) -> TrainingView:
        self._encoder.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._pictures.put(None)
        self._encoder.join()

    def __call__(self, update: Update) -> None:
        """Show an update."""
        picture = None if update.pictures is None else sheet(list(update.pictures))
        if picture is not None:
            self._hand_over(update.step, "preview", picture)
        if update.score is not None or update.warning or self._due() or update.step == update.steps:
            self._send(facts(update))
        self._advance(update.step, update.steps, picture)

    def show_masks(self, photos: Sequence[Tensor], steps: int) -> None:
        """Show photos (height, width, 3) in 0..1, of any sizes, with what will be learned standing out."""
        picture = sheet(photos)
        self._hand_over(0, "masks", picture)
        self._advance(0, steps, picture)

    def _advance(self, step: int, steps: int, picture: Image.Image | None) -> None:
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(steps, node_id=self._node)
        self._bar.update_absolute(step, steps, None if picture is None else ("JPEG", picture, _SIDE))
        comfy.model_management.throw_exception_if_processing_interrupted()

    def _hand_over(self, step: int, kind: str, picture: Image.Image) -> None:
        try:
            self._pictures.put_nowait((step, kind, picture))
        except queue.Full:
            logger.debug("a preview was dropped: the ones before it are still being encoded")

    def tell(self, **content: Any) -> None:
        """Send an event of its own, beside those that updates make."""
        self._send(content)

    def _due(self) -> bool:
        return time.monotonic() - self._sent >= _SECONDS

    def _encode(self) -> None:
        while (waiting := self._pictures.get()) is not None:
            step, kind, picture = waiting
            try:
                encoded = io.BytesIO()
                picture.save(encoded, "JPEG", quality=85)
                uri = "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode()
                self._send({"step": step, kind: uri})
            except Exception:  # a thread that ends would leave the training waiting for it
                logger.exception("a preview could not be sent")

    def _send(self, content: dict[str, Any]) -> None:
        self._sent = time.monotonic()
        server = PromptServer.instance
        server.send_sync(EVENT, {"node": self._node, "prompt_id": self._prompt, **content}, server.client_id)


def facts(update: Update) -> dict[str, Any]:
    """An update as JSON can carry it: numbers that are none become null."""

    def number(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    score = update.score
    told = score and {
        "value": number(score.value),
        "image": number(score.image),
        "text": number(score.text),
        "weak": score.weak,
    }
    return {
        "step": update.step,
        "steps": update.steps,
        "loss": number(update.loss),
        "gate": number(update.gate),
        "seconds_left": number(update.seconds_left),
        "best_step": update.best_step,
        "score": told,
        "warning": update.warning,
    }


def sheet(pictures: Sequence[Tensor]) -> Image.Image:
    """Pictures (height, width, 3) in 0..1 side by side, as nearly square as they go, in one of 768 pixels at most.

    Small ones are enlarged without blurring.
    """
    drawn = [Image.fromarray((p.clamp(0, 1) * 255).round().byte().cpu().contiguous().numpy()) for p in pictures]
    columns = math.ceil(math.sqrt(len(drawn)))
    rows = math.ceil(len(drawn) / columns)
    side = _SIDE // max(columns, rows)
    for number, picture in enumerate(drawn):
        if max(picture.size) > side:
            picture.thumbnail((side, side))
        else:
            factor = side // max(picture.size)
            size = (picture.width * factor, picture.height * factor)
            drawn[number] = picture.resize(size, Image.Resampling.NEAREST)
    width, height = max(p.width for p in drawn), max(p.height for p in drawn)
    whole = Image.new("RGB", (columns * width, rows * height))
    for number, picture in enumerate(drawn):
        left, top = (width - picture.width) // 2, (height - picture.height) // 2
        whole.paste(picture, (number % columns * width + left, number // columns * height + top))
    return whole
