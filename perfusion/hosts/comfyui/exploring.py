"""Drawing the cells of a trade-off by the host's own samplers, as many at once as memory allows."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

import comfy.model_management
import comfy.sample
from torch import Tensor

from ...edit import Gate
from ...stack import ConceptStack
from ...tradeoff import Setting, Trial
from .apply import with_rows
from .combined import apply_concepts

logger = logging.getLogger(__name__)

_RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")  # of empty latents, in newer hosts
_MOST_ROWS = 16  # pictures at once
_MOST_ROWS_ON_CPU = 4  # more take no less time there, and canceling waits for a step of all


@dataclass(frozen=True)
class Sampling:
    """How the cells are drawn: ``latent`` is a LATENT, whose batch is what each cell shows."""

    prompt: str
    negative: str
    latent: dict[str, Any]
    seed: int
    steps: int
    guidance: float
    sampler: str
    scheduler: str


class TradeOffDrawing:
    """Draws cells: the weights are loaded once, and only gates differ among the rows of a batch. All concepts of the
    stack are on.

    Every cell starts from the same noise, that which KSampler makes of this seed and latent.
    ``report(rows)`` is called after each step with how many rows took it, and may raise to stop.
    """

    def __init__(
        self,
        model: Any,
        clip: Any,
        vae: Any,
        stack: ConceptStack,
        word: str,
        sampling: Sampling,
        report: Callable[[int], None],
    ):
        self._model, self._clip, self._vae = model, clip, vae
        self._stack, self._word, self._sampling, self._report = stack, word, sampling, report
        # The host knows latents and noise that are no tensors, of several parts; pictures have none of these.
        fixed, given = comfy.sample.fix_empty_latent_channels, sampling.latent
        known = inspect.signature(fixed).parameters
        ratios: Any = {name: given[name] for name in _RATIOS if name in given and name in known}
        latent: Any = fixed(model, given["samples"], **ratios)
        if "noise_mask" in sampling.latent:
            raise ValueError("the latent has a mask for inpainting, which is not drawn here: connect an empty latent")
        if latent.ndim != 4:
            raise ValueError("the latent is not that of pictures: connect an Empty Latent Image")
        self._latent: Any = latent
        self._noise: Any = comfy.sample.prepare_noise(latent, sampling.seed, sampling.latent.get("batch_index"))

    def __call__(self, settings: Sequence[Setting]) -> Iterator[Trial]:
        """A trial of each setting, in order, as soon as it is drawn.

        Raises what ``apply_concepts`` does.
        """
        for (_, guidance, _), group in groupby(settings, key=_drawn_together):
            cells = list(group)
            own = dict.fromkeys((field.name for field in fields(Gate) if field.name != "focus_share"), None)
            stack = replace(cells[0], **own).applied(self._stack, self._word)
            model, clip = apply_concepts(self._model, self._clip, stack)
            positive, negative = (
                clip.encode_from_tokens_scheduled(clip.tokenize(text))
                for text in (self._sampling.prompt, self._sampling.negative)
            )
            scale = self._sampling.guidance if guidance is None else guidance
            rows = [self._gates(cell) for cell in cells]
            at_once = self._rows_at_once() // len(self._latent)
            start = 0
            while start < len(cells):
                count = max(1, min(at_once, len(cells) - start))
                try:
                    latents = self._sampled(model, rows[start : start + count], positive, negative, scale)
                except comfy.model_management.OOM_EXCEPTION:
                    if count == 1:
                        raise
                    comfy.model_management.soft_empty_cache()
                    at_once = count // 2
                    logger.warning("Trade-Off: %d cells at once do not fit into memory; going on with fewer.", count)
                    continue
                for cell, latent in zip(cells[start:], latents.split(len(self._latent)), strict=False):
                    yield Trial(cell, self._vae.decode(latent).float().cpu().clamp(0, 1))
                start += count

    def _gates(self, setting: Setting) -> list[Gate]:
        """The gates of all concepts in a cell."""
        return [use.gate for use in setting.applied(self._stack, self._word).uses]

    def _rows_at_once(self) -> int:
        device = self._model.load_device
        if comfy.model_management.is_device_cpu(device):
            return _MOST_ROWS_ON_CPU
        one = self._model.memory_required([2, *self._latent.shape[1:]])  # with the negative prompt's
        weights = self._model.model_size()  # that are not loaded yet, at worst
        free = comfy.model_management.get_free_memory(device) - weights
        return int(max(1, min(_MOST_ROWS, free // max(1, one))))

    def _sampled(
        self, model: Any, rows: Sequence[Sequence[Gate]], positive: Any, negative: Any, scale: float
    ) -> Tensor:
        """Latents of some cells, one after the other."""
        pictures, sampling = len(self._latent), self._sampling
        each = [gates for gates in rows for _ in range(pictures)]
        latent, noise = (x.repeat(len(rows), 1, 1, 1) for x in (self._latent, self._noise))

        def callback(step: int, *_: Any) -> None:
            self._report(len(each))

        return comfy.sample.sample(
            with_rows(model, each),
            noise,
            sampling.steps,
            scale,
            sampling.sampler,
            sampling.scheduler,
            positive,
            negative,
            latent,
            callback=callback,
            disable_pbar=True,
            seed=sampling.seed,
        )


def _drawn_together(setting: Setting) -> tuple[Any, ...]:
    """What cells must have in common: model and CLIP are prepared otherwise where no word is to be looked at more."""
    return setting.lock, setting.guidance, setting.focus_share == 0
