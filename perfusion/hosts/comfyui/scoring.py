"""How alike pictures, and how true to a text, by a CLIP_VISION and the CLIP that was trained together with it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from ...stack import ConceptStack
from ...tradeoff import Trial
from ...training.scoring import renamed
from .structure import encoder_widths

# Encoders whose pooled output a CLIP of several hands out come first.
_POOLED = ("clip_g", "clip_h", "clip_l")


class ScoringError(ValueError):
    """Encoders that cannot compare pictures with texts; ``input_name`` is where a user connected them."""

    def __init__(self, message: str, input_name: str):
        super().__init__(message)
        self.input_name = input_name


class ClipSimilarity:
    """Embeddings of pictures and texts in one space (``perfusion.training.scoring.Similarity``).

    ``after`` is called when an encoder has been used, which may have pushed other models out of memory. Without a
    ``clip`` only pictures can be embedded.

    Raises ScoringError where the two have no such space: a CLIP without its text projection, as in the checkpoints of
    Stable Diffusion 1.x, or one of another width.
    """

    def __init__(self, clip_vision: Any, clip: Any, after: Callable[[], None] = lambda: None):
        self._vision, self._clip, self._after = clip_vision, clip, after
        self._projection = None if clip is None else _text_projection(clip)
        if clip is None:
            return
        if self._projection is None:
            raise ScoringError(
                "this CLIP has no text projection, without which a text cannot be compared with pictures: checkpoints "
                "leave it out. Load the complete CLIP-L with Load CLIP (clip_l.safetensors) and connect that.",
                "score_clip",
            )
        width = self._vision_width()
        if self._projection.shape[0] != width:
            raise ScoringError(
                f"this CLIP's text embeddings have {self._projection.shape[0]} numbers, the CLIP Vision's {width}: "
                "connect the two halves of one model, such as CLIP-L with a ViT-L, or CLIP-H with a ViT-H.",
                "clip_vision",
            )

    def images(self, pictures: Tensor) -> Tensor:
        """Unit vectors (n, e) of pictures (n, h, w, 3) in 0..1, whole, not cropped."""
        try:
            with torch.no_grad():
                embeds = [self._vision.encode_image(one, crop=False)["image_embeds"] for one in pictures.split(8)]
        finally:
            self._after()
        return normalize(torch.cat(embeds).float().cpu(), dim=-1)

    def images_of(self, pictures: Sequence[Tensor]) -> Tensor:
        """Unit vectors (n, e) of pictures (height, width, 3) of any sizes."""
        return torch.cat([self.images(picture[None, ..., :3]) for picture in pictures])

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (n, e) of texts."""
        if self._projection is None:
            raise ScoringError("there is no CLIP to compare texts by: connect one.", "score_clip")
        try:
            with torch.no_grad():
                pooled = torch.cat([self._pooled(prompt) for prompt in prompts]).float().cpu()
        finally:
            self._after()
        return normalize(linear(pooled, self._projection.detach().float().cpu()), dim=-1)

    def _pooled(self, prompt: str) -> Tensor:
        return self._clip.encode_from_tokens(self._clip.tokenize(prompt), return_pooled="unprojected")[1]

    def _vision_width(self) -> int:
        # Models without one hand on what they have, by an identity.
        projection = getattr(getattr(self._vision.model, "visual_projection", None), "weight", None)
        if projection is None:
            raise ScoringError(
                "this CLIP Vision has no projection, so its embeddings cannot be compared with texts: use one that was "
                "trained together with a text encoder, such as a CLIP ViT-L or ViT-H.",
                "clip_vision",
            )
        return projection.shape[0]


def per_picture(
    similarity: ClipSimilarity, pictures: Sequence[Tensor], photos: Sequence[Tensor], texts: Sequence[str]
) -> tuple[Tensor | None, Tensor | None]:
    """Cosines (n,) of each picture to the photos, on average, and to its text; None where there is nothing to compare.

    Pictures and photos are (height, width, 3) in 0..1, of any sizes; ``texts`` are one for all, or one for each.
    """
    embedded = similarity.images_of(pictures)
    image = (embedded @ similarity.images_of(photos).T).mean(1) if photos else None
    text = (embedded * similarity.texts(texts)).sum(1) if texts else None
    return image, text


class Comparison:
    """Scores trials of a trade-off: likeness to photos, and to the prompt with super-categories for the words."""

    def __init__(self, similarity: ClipSimilarity, photos: Sequence[Tensor], prompt: str, stack: ConceptStack):
        for concept in stack.concepts:
            prompt = renamed(prompt, concept.placeholder, concept.super_category)
        self._similarity, self._photos = similarity, similarity.images_of(photos)
        self._text = similarity.texts([prompt])

    def scored(self, trial: Trial) -> Trial:
        """The trial with mean cosines over its pictures; without, where one of them holds no numbers."""
        embedded = self._similarity.images(trial.pictures)
        image, text = (float((embedded @ other.T).mean()) for other in (self._photos, self._text))
        return replace(trial, image=image, text=text) if math.isfinite(image) and math.isfinite(text) else trial


def _text_projection(clip: Any) -> Tensor | None:
    """(e, d) of the encoder whose pooled output the CLIP hands out; None where its file brought none.

    The host makes that matrix from unused memory and tells nobody that the file had none for it: such a one is empty,
    the identity, or holds what no training leaves.
    """
    widths = encoder_widths(clip)
    name = next((name for name in _POOLED if name in widths), None)
    encoder = getattr(clip.cond_stage_model, name) if name else None
    weight = getattr(getattr(getattr(encoder, "transformer", None), "text_projection", None), "weight", None)
    if weight is None:
        return None
    values = weight.detach().float().cpu()
    if not values.isfinite().all() or not 1e-4 < float(values.std()) < 10:
        return None
    if values.shape[0] == values.shape[1] and torch.equal(values, torch.eye(len(values))):
        return None
    used = float((values.abs() > 1e-8).float().mean())
    return weight if used > 0.9 else None
