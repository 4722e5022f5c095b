"""Concepts on a pipeline that is then called as ever: its prompts know their words, its keys and values are edited."""

from __future__ import annotations

import inspect
import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...stack import ConceptStack, shut_words
from .patching import EditedProjections, replaced
from .structure import UnsupportedPipelineError, family_of, require_fit
from .text import ClipText, contains_word

logger = logging.getLogger(__name__)

_REMEMBERED_ENCODINGS = 16
_PROMPTS = (("prompt", "prompt_embeds"), ("negative_prompt", "negative_prompt_embeds"))


@contextmanager
def apply(pipeline: Any, stack: ConceptStack) -> Iterator[None]:
    """Within the block, prompts of the pipeline may contain the words of these concepts; afterwards it is as before.

    It works for every pipeline of Stable Diffusion 1.x and 2.x with ``encode_prompt``: text to image, image to image,
    inpainting, ControlNet. Load adapters (LoRA, IP-Adapter) before, not within the block.

    Raises UnsupportedPipelineError for other pipelines, StackError for a concept of another family,
    ParallelConceptsError for concepts that cannot be told apart, RuntimeError inside another such block,
    NotImplementedError for a concept with a region or in a part of sampling only.
    """
    stack = stack.active
    if not len(stack):
        yield
        return
    for use in stack.uses:
        if use.region is not None or not use.always:
            raise NotImplementedError(
                f"{use.concept.placeholder} has a region or a schedule, which pipelines of diffusers do not tell their "
                "layers: apply it without"
            )
    require_fit(family_of(pipeline), stack)
    projections = EditedProjections(pipeline.unet)
    with projections.installed():
        applied = _Applied(pipeline, stack)
        projections.edit = applied.edit
        if applied.shifts_keys:
            projections.shift_of = applied.shift_of
        with replaced(pipeline, "encode_prompt", applied.encode_prompt):
            yield


class _Applied:
    """What is applied to one pipeline, and the encodings it has made since."""

    def __init__(self, pipeline: Any, stack: ConceptStack):
        self.stack = stack
        self.edit = stack.edit()
        self.shifts_keys = "global" in self.edit.key_lock.locks
        self._pipeline = pipeline
        self._text = ClipText(pipeline.text_encoder, pipeline.tokenizer)
        self._original: Callable[..., Any] = pipeline.encode_prompt
        self._signature = inspect.signature(self._original)
        if not {name for pair in _PROMPTS for name in pair} <= set(self._signature.parameters):
            raise UnsupportedPipelineError(
                f"a {type(pipeline).__name__} encodes prompts in a way of its own. Perfusion works with pipelines of "
                "Stable Diffusion 1.x and 2.x."
            )
        # (encodings (b, m, d), their shift or None where it is zero)
        self._known: deque[tuple[Tensor, Tensor | None]] = deque(maxlen=_REMEMBERED_ENCODINGS)
        self._last: tuple[weakref.ref[Tensor], Tensor | None] | None = None
        self._told_of_fallback = False

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the pipeline's: prompts with words are encoded here, all others where they always were."""
        call = self._signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        guided = given.get("do_classifier_free_guidance", True)
        shifts: list[tuple[bool, Tensor | None]] = []
        for prompt_name, embeds_name in _PROMPTS:
            prompts, shift = _listed(given[prompt_name]), None
            ours = given[embeds_name] is None
            wanted = guided or prompt_name == "prompt"
            if ours and wanted and contains_word(prompts, self.stack):
                # The pipeline skips layers for what is wanted alone, not for the negative prompt.
                clip_skip = given.get("clip_skip") if prompt_name == "prompt" else None
                given[embeds_name], shift = self._encode(prompts, given.get("lora_scale"), clip_skip)
                if shift is not None:
                    shift = shift.repeat_interleave(given.get("num_images_per_prompt", 1), dim=0)
            shifts.append((ours, shift))
        encodings = self._original(*call.args, **call.kwargs)
        made = [encoding for encoding in encodings[:2] if isinstance(encoding, Tensor)]
        if self.shifts_keys:
            for encoding, (ours, shift) in zip(encodings[:2], shifts, strict=True):
                if ours and isinstance(encoding, Tensor):
                    self._known.appendleft((encoding, shift))
        self._warn_of_shut_gates(made)
        return encodings

    def _encode(self, prompts: list[str], lora_scale: float | None, clip_skip: int | None) -> tuple[Tensor, Any]:
        if hasattr(self._pipeline, "maybe_convert_prompt"):  # textual inversions of several vectors
            prompts = self._pipeline.maybe_convert_prompt(prompts, self._pipeline.tokenizer)
        with torch.no_grad(), self._text.lora_scaled(lora_scale):
            return self._text.encode_stack(prompts, self.stack, clip_skip)

    def shift_of(self, context: Tensor) -> Tensor | None:
        """The shift (b, m, d) of a context put together from known encodings; None, and so local locks, for others."""
        if self._last is not None and self._last[0]() is context:
            return self._last[1]
        shifts = [self._shift_of_one(encoding) for encoding in context]
        shift = torch.stack([s for s in shifts if s is not None]) if all(s is not None for s in shifts) else None
        if shift is None and not self._told_of_fallback:
            self._told_of_fallback = True
            logger.info(
                "Key lock 'global' needs prompts that the pipeline encodes in the block; for others 'local' is used."
            )
        self._last = weakref.ref(context), shift
        return shift

    def _shift_of_one(self, encoding: Tensor) -> Tensor | None:
        for known, shift in self._known:
            if known.shape[1:] != encoding.shape:
                continue
            same = (known.to(encoding) == encoding).flatten(1).all(dim=1).nonzero()
            if len(same):
                return torch.zeros_like(encoding) if shift is None else shift[int(same[0])].to(encoding)
        return None

    def _warn_of_shut_gates(self, encodings: Sequence[Tensor]) -> None:
        """Name the concepts whose gate no token of any prompt opens by half."""
        shut = shut_words(self.stack, self.edit, encodings)
        if shut:
            logger.warning(
                "%s will not appear: no prompt contains the word within its first 75 tokens, or its gate stays shut. "
                "Write the word into the prompt, or lower its bias.",
                ", ".join(shut),
            )


def _listed(prompts: str | Sequence[str] | None) -> list[str]:
    if prompts is None:
        return []
    return [prompts] if isinstance(prompts, str) else list(prompts)
