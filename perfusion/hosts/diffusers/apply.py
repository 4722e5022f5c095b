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
from ..replacing import replaced
from .patching import EditedProjections, Told
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
    projections = EditedProjections(pipeline.unet, follows=True)
    with projections.installed():
        applied = _Applied(pipeline, stack)
        projections.edit = applied.edit
        if applied.tells:
            projections.told_of = applied.told_of
        with replaced(pipeline, "encode_prompt", applied.encode_prompt):
            yield


class _Applied:
    """What is applied to one pipeline, and the encodings it has made since."""

    def __init__(self, pipeline: Any, stack: ConceptStack):
        self.stack = stack
        self.edit = stack.edit()
        self.shifts_keys = stack.locks_globally
        self.tells = self.shifts_keys or stack.tells_words
        self._pipeline = pipeline
        self._text = ClipText(pipeline.text_encoder, pipeline.tokenizer)
        self._original: Callable[..., Any] = pipeline.encode_prompt
        self._signature = inspect.signature(self._original)
        if not {name for pair in _PROMPTS for name in pair} <= set(self._signature.parameters):
            raise UnsupportedPipelineError(
                f"a {type(pipeline).__name__} encodes prompts in a way of its own. Perfusion works with pipelines of "
                "Stable Diffusion 1.x and 2.x."
            )
        # (encodings (b, m, d), their shift or None where it is zero, their words or None where there are none)
        self._known: deque[tuple[Tensor, Tensor | None, Tensor | None]] = deque(maxlen=_REMEMBERED_ENCODINGS)
        self._last: tuple[weakref.ref[Tensor], Told] | None = None
        self._told_of_fallback = False

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the pipeline's: prompts with words are encoded here, all others where they always were."""
        call = self._signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        guided = given.get("do_classifier_free_guidance", True)
        told: list[tuple[bool, Tensor | None, Tensor | None]] = []
        for prompt_name, embeds_name in _PROMPTS:
            prompts, shift, words = _listed(given[prompt_name]), None, None
            ours = given[embeds_name] is None
            wanted = guided or prompt_name == "prompt"
            if ours and wanted and contains_word(prompts, self.stack):
                # The pipeline skips layers for what is wanted alone, not for the negative prompt.
                clip_skip = given.get("clip_skip") if prompt_name == "prompt" else None
                given[embeds_name], shift, words = self._encode(prompts, given.get("lora_scale"), clip_skip)
                copies = given.get("num_images_per_prompt", 1)
                words = words.repeat_interleave(copies, dim=0)
                if shift is not None:
                    shift = shift.repeat_interleave(copies, dim=0)
            told.append((ours, shift, words))
        encodings = self._original(*call.args, **call.kwargs)
        if self.tells:
            for encoding, (ours, shift, words) in zip(encodings[:2], told, strict=True):
                if ours and isinstance(encoding, Tensor):
                    self._known.appendleft((encoding, shift, words))
        self._warn_of_shut_gates(
            [
                (encoding, torch.zeros(encoding.shape[:2]) if ours and words is None else words)
                for encoding, (ours, _, words) in zip(encodings[:2], told, strict=True)
                if isinstance(encoding, Tensor)
            ]
        )
        return encodings

    def _encode(
        self, prompts: list[str], lora_scale: float | None, clip_skip: int | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Encodings, their shift and their words, of the text as it stands behind the pipeline's own conversion."""
        if hasattr(self._pipeline, "maybe_convert_prompt"):  # textual inversions of several vectors
            prompts = self._pipeline.maybe_convert_prompt(prompts, self._pipeline.tokenizer)
        with torch.no_grad(), self._text.lora_scaled(lora_scale):
            encodings, shift = self._text.encode_stack(prompts, self.stack, clip_skip)
        return encodings, shift, self._text.words(prompts, self.stack)

    def told_of(self, context: Tensor) -> Told:
        """The shift (b, m, d) and the words (b, m) of a context put together from known encodings; None of both, and so
        local locks and words as the encodings tell them, for others.
        """
        if self._last is not None and self._last[0]() is context:
            return self._last[1]
        found = [self._told_of_one(encoding) for encoding in context]
        known = [one for one in found if one is not None]
        told: Told = None, None
        if len(known) == len(found):
            shifts, words = (torch.stack(part) for part in zip(*known, strict=True))
            told = (shifts if self.shifts_keys else None), words
        elif self.shifts_keys and not self._told_of_fallback:
            self._told_of_fallback = True
            logger.info(
                "Key lock 'global' needs prompts that the pipeline encodes in the block; for others 'local' is used."
            )
        self._last = weakref.ref(context), told
        return told

    def _told_of_one(self, encoding: Tensor) -> tuple[Tensor, Tensor] | None:
        for known, shift, words in self._known:
            if known.shape[1:] != encoding.shape:
                continue
            same = (known.to(encoding) == encoding).flatten(1).all(dim=1).nonzero()
            if len(same):
                row = int(same[0])
                nobodys = torch.zeros(len(encoding), dtype=torch.long)
                return (
                    torch.zeros_like(encoding) if shift is None else shift[row].to(encoding),
                    nobodys if words is None else words[row],
                )
        return None

    def _warn_of_shut_gates(self, made: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Name the concepts whose gate no token of any prompt opens by half, from encodings and their words."""
        shut = shut_words(self.stack, self.edit, [(encoding, words, None) for encoding, words in made])
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
