"""Concepts on a MODEL and its CLIP together, as a LoRA loader takes both."""

from __future__ import annotations

from typing import Any

from ...stack import ConceptStack, StackError
from .apply import apply_to_model
from .structure import family_of
from .text import apply_to_clip


def apply_concepts(model: Any, clip: Any, stack: ConceptStack) -> tuple[Any, Any]:
    """Clones of MODEL and CLIP with these concepts added to those they carry.

    Raises StackError for a concept of another family or a word used twice, UnsupportedModelError for a model without
    cross-attention to text, ParallelConceptsError for concepts that cannot be told apart.
    """
    family = family_of(model, clip)
    for concept in stack.concepts:
        difference = concept.family.difference(family)
        if difference is not None:
            raise StackError(
                f"{concept.placeholder} does not fit this model: {difference}. "
                "Load a checkpoint of the concept's family, or train the concept on this one."
            )
    return apply_to_model(model, stack), apply_to_clip(clip, stack)
