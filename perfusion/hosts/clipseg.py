"""Masks by CLIPSeg (Lueddecke and Ecker 2022), where ``transformers`` and the model's files are there.

Nothing is ever downloaded: the model is read from a folder in the layout of ``transformers``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..training.dataset import as_rgb
from ..training.masks import Masks, given, notes_on

MODEL_FILE = "model.safetensors"
_CONFIG_FILE = "config.json"
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_SIDE = 352  # pixels, of the pictures that CLIPSeg was trained on
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of those pictures' colors
_UNSEEN = 0.3  # probability that nothing in a photo reaches where CLIPSeg does not see the thing


class ClipSegError(ValueError):
    """CLIPSeg cannot be used; the message says what is missing and where it goes."""

    input_name = "method"


def clipseg_masks(
    images: Sequence[Tensor],
    super_category: str,
    folder: Path,
    masks: Sequence[Tensor | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Masks:
    """Masks by the CLIPSeg model in a folder, for photos that have none of their own: see ``attention_masks``.

    ``confidence`` is the probability of the place that is most surely the thing. Raises ClipSegError where
    ``transformers`` or a file is missing, ValueError for an image that is not one.
    """
    network, tokenizer = _load(folder)
    tokens = tokenizer([f"a photo of a {super_category}"], return_tensors="pt", truncation=True, max_length=77)
    found: list[Tensor | None] = []
    confidence: list[float] = []
    looked_at = []
    for number, (image, mask) in enumerate(zip(images, given(masks, len(images)), strict=True)):
        rgb, transparency = as_rgb(image, number)
        mask = transparency if mask is None else mask
        sure = 1.0
        if mask is None:
            looked_at.append(number)
            likely = _probability(network, tokens, rgb)
            sure = float(likely.max())
            mask = likely / sure if sure >= _UNSEEN else None
        found.append(mask)
        confidence.append(sure if mask is not None else 0.0)
        if progress is not None:
            progress(number + 1, len(images))
    notes = notes_on(
        found,
        looked_at,
        f"masks of {{}} were made by CLIPSeg, for {super_category!r}",
        f"CLIPSeg sees no {super_category} in {{}}: the background is learned there too. Give masks, or say in other "
        "words what kind of thing it is",
    )
    return Masks(tuple(found), tuple(confidence), notes)


def _probability(network: Any, tokens: Any, rgb: Tensor) -> Tensor:
    """How likely each pixel of a photo (1, 3, h, w) is of the thing: (h, w)."""
    pixels = interpolate(rgb, (_SIDE, _SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (_MEAN, _STD))
    with torch.inference_mode(False), torch.no_grad():
        logits = network(
            pixel_values=((pixels - mean) / std).clone(),
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
        ).logits
    logits = logits.float().reshape(1, 1, *logits.shape[-2:])
    return interpolate(logits, rgb.shape[-2:], mode="bilinear", antialias=True)[0, 0].sigmoid()


def _load(folder: Path) -> tuple[Any, Any]:
    """The network and its tokenizer. Raises ClipSegError where they cannot be had."""
    missing = [name for name in (_CONFIG_FILE, MODEL_FILE) if not (folder / name).is_file()]
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
        missing.append("vocab.json and merges.txt")
    if missing:
        raise ClipSegError(
            f"CLIPSeg is not there: {', '.join(missing)} missing in {folder.parent.name}/{folder.name}. Put the files "
            "of a CLIPSeg model for transformers there, such as CIDAS/clipseg-rd64-refined, or make masks by attention"
        )
    try:
        from transformers import AutoTokenizer, CLIPSegForImageSegmentation
    except ImportError as error:
        raise ClipSegError(
            "CLIPSeg needs the Python package transformers, of a version that has it: install it where this program "
            "runs, or make masks by attention"
        ) from error
    try:
        network: Any = CLIPSegForImageSegmentation.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # Whatever a foreign file makes the library stumble over.
    except Exception as error:
        raise ClipSegError(
            f"the CLIPSeg model in {folder.parent.name}/{folder.name} cannot be read: {error}"
        ) from error
    return network.float().eval(), tokenizer
