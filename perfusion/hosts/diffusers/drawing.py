"""Pictures without a pipeline call: a plain sampler, the same seed the same picture whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...edit import KeyValueEdit
from ...sampling import pictures_of
from ...stack import ConceptStack
from ..base import Encodings
from .host import DiffusersHost
from .structure import require_fit


def draw(
    host: DiffusersHost,
    stack: ConceptStack,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 25,
    guidance: float = 7.5,
    size: int | tuple[int, int] = 512,
    negative: str = "",
    batch: int = 4,
) -> Tensor:
    """One picture for each prompt and its seed: (b, height, width, 3) in 0..1, on the CPU.

    In prompts, ``(text:1.2)`` says how much a part counts, as in ComfyUI. DDIM without noise of its own, which is
    Euler's method here, with classifier-free guidance. Each picture's noise is drawn on the CPU from its own seed.
    ``size`` is in pixels, one side or (height, width); ``batch`` pictures are computed at once.

    Raises ValueError for unequal numbers of prompts and seeds or a size that is no multiple of the latent scale,
    StackError for a concept of another family, ParallelConceptsError for concepts that cannot be told apart.
    """
    if len(prompts) != len(seeds) or not len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: give one seed for each prompt")
    if steps < 1 or batch < 1:
        raise ValueError(f"steps is {steps} and batch is {batch}; both must be at least 1")
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if any(side < 1 or side % host.latent_scale for side in sides):
        raise ValueError(f"size is {size}; it must be a multiple of {host.latent_scale}")
    stack = stack.active
    require_fit(host.family, stack)
    edit = stack.edit() if len(stack) else None
    shape = (host.unet.config.in_channels, *(side // host.latent_scale for side in sides))
    pictures = []
    with torch.no_grad(), host.edits():
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            unwanted = [negative] * len(prompts[part]) if guidance != 1 else []
            text = _encode(host, stack, [*prompts[part], *unwanted], edit)
            pictures.append(pictures_of(host, text, seeds[part], shape, edit, steps, guidance))
    return torch.cat(pictures)


def _encode(host: DiffusersHost, stack: ConceptStack, prompts: list[str], edit: KeyValueEdit | None) -> Encodings:
    """The prompts' encodings, where the network computes; the edit is told their shift, whose word each token is, and
    what prompt weights do to words."""
    encoded, shift = host.text.encode_stack(prompts, stack, weighted=True)
    # The very tensor that every step hands over: what follows from it is computed once.
    context = encoded.to(host.device, host.unet.dtype)
    if edit is not None:
        edit.key_lock.shift = None if shift is None else shift.to(context)
        edit.words = host.text.words(prompts, stack, weighted=True)
        edit.weighed = host.text.weighed(prompts, stack, encoded)
    nothing = torch.zeros(context.shape[:2], dtype=torch.bool)
    return Encodings(context, nothing, nothing)
