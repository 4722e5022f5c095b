"""A training's exact state in one file, from which it goes on as if it had never stopped.

A .safetensors file: the tensors of ``Trainer.state`` (what is learned in float32, Adam's moments, the random generator,
losses and gates of all steps), whatever else the caller keeps there, and as metadata (all text) a version, a digest and
the settings that decide how training goes on. Training goes on with those settings only.

Settings are compared by value where they have one, and texts by digest. Tensors that networks computed (encodings of
photos and texts, values, noise levels) are compared by a sketch, since another card or version of torch computes
slightly other ones from the same.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from ..files import write_atomically
from .config import BEFORE
from .dataset import Photos
from .trainer import Trainer

FORMAT = 1
MAX_HEADER = 1 << 20
MAX_FILE = 64 << 20

_TRAINER, _EXTRA = "trainer.", "extra."
# Steps may be added. Recomputed activations are the same, as a test has it.
_FREE = ("steps", "gradient_checkpointing")
_SKETCH = 16
_SAME = 0.01  # of a sketch's length: above what another card computes, below what another photo makes of it
_CHANGED = {
    "captions": "the captions to train with are others",
    "context_captions": "the captions in which the word is looked at are others",
    "photos": "the photos, or their order, are others",
    "masks": "the masks are others",
    "text_encoder": "the text encoder is another, or has other LoRAs or another last layer",
    "model": "the model is another, or has other LoRAs",
    "noise_levels": "the model's noise levels are others",
    "statistics": "the text encoder was measured on another corpus",
}


class ResumeError(ValueError):
    """A state from which this training cannot go on; the message says why and what to do."""


def settings(trainer: Trainer) -> dict[str, Any]:
    """All that decides how a training goes on: plain values, digests of texts, sketches of tensors, by name."""
    config = {name: value for name, value in asdict(trainer.config).items() if name not in _FREE}
    values = trainer.host.project_values(trainer.e_super.unsqueeze(0))
    return {
        **config,
        "family": trainer.host.family.name,
        "prediction": trainer.host.prediction,
        "placeholder": trainer.subject.placeholder,
        "super_category": trainer.subject.super_category,
        "captions": _digest([*trainer.captions.prompts, json.dumps(trainer.captions.of_photo)]),
        "context_captions": _digest(trainer.context_captions()),
        "number_of_photos": trainer.photos.photographed,
        "photos": _sketch(bucket.latents for bucket in trainer.photos.own),
        "masks": _sketch(bucket.weights for bucket in trainer.photos.own),
        "text_encoder": _sketch([trainer.e_super]),
        "model": _sketch(values.values()),
        "noise_levels": _sketch([trainer.host.noise_levels().log()]),
        "statistics": _sketch([trainer.statistics.c]),
    }


def photos_digest(photos: Photos) -> str:
    """sha256 of photos and masks as training sees them, to the last bit: on another card it may be another one. What
    was put together of them says nothing more, and not even one card need draw it the same way twice.
    """
    content = sha256()
    for bucket in photos.own:
        for tensor in (bucket.latents, bucket.weights):
            content.update(f"{tuple(tensor.shape)}".encode())
            content.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()


def save(
    path: Path,
    trainer: Trainer,
    extra: Mapping[str, Any] | None = None,
    *,
    known: Mapping[str, Any] | None = None,
    out_of_memory: bool = False,
) -> None:
    """Write the state of a training atomically, over an older one.

    ``extra`` is kept beside it: tensors, and values that JSON can hold. ``known``: the trainer's ``settings``, where
    they were asked for before; asking runs the model, which may be out of reach by now. With ``out_of_memory`` the
    training may go on with a smaller micro_batch, whose results differ in their last digits.

    Raises OSError when the file cannot be written.
    """
    extra = extra or {}
    tensors = {_TRAINER + name: tensor for name, tensor in trainer.state().items()}
    tensors |= {_EXTRA + name: value for name, value in extra.items() if isinstance(value, Tensor)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {
        "perfusion.state": str(FORMAT),
        "perfusion.settings": json.dumps(dict(known) if known else settings(trainer)),
        "perfusion.extra": json.dumps({name: v for name, v in extra.items() if not isinstance(v, Tensor)}),
        "perfusion.out_of_memory": json.dumps(out_of_memory),
    }
    metadata["perfusion.digest"] = _content_digest(tensors, metadata)
    write_atomically(path, tensors, metadata, overwrite=True)


def goes_on(path: Path, trainer: Trainer) -> bool:
    """Whether ``restore`` would take this file for this trainer. Changes nothing, raises nothing."""
    try:
        _fitting(path, trainer)
    except (ResumeError, OSError):
        return False
    return True


def own_file(folder: Path, name: str, trainer: Trainer, *, resume: bool = True) -> Path:
    """Where in ``folder`` this training is kept: the file of the very same one before, else one that is not there yet.

    Files are compared with a tolerance, for other cards compute slightly other numbers; going on by itself is for the
    very same photos only, whose digest is in the file's name. Without ``resume`` none is gone on with.
    """
    stem = f"{name}-{photos_digest(trainer.photos)[:8]}"
    paths = (folder / f"{stem if number == 1 else f'{stem}_{number}'}.safetensors" for number in itertools.count(1))
    return next(path for path in paths if not path.exists() or (resume and goes_on(path, trainer)))


def restore(path: Path, trainer: Trainer) -> dict[str, Any]:
    """Put a new trainer where the saved one was, and return what was saved beside it.

    Everything is checked before anything is used. Raises ResumeError, changing nothing, for a file that is damaged, of
    another kind or of a newer version, for a training with other settings, naming each, and for one of fewer steps than
    were done already; OSError when the file cannot be read.
    """
    state, extra = _fitting(path, trainer)
    try:
        trainer.load_state(state)
    except ValueError as error:
        raise _unusable(path, f"is damaged ({error})") from None
    return extra


def _fitting(path: Path, trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The trainer's part of a file, and what was saved beside it. Raises as ``restore``."""
    metadata, tensors = _read(path)
    try:
        then, extra = json.loads(metadata["perfusion.settings"]), json.loads(metadata["perfusion.extra"])
        lowered = json.loads(metadata["perfusion.out_of_memory"])
        if not isinstance(then, dict) or not isinstance(extra, dict):
            raise ValueError("its metadata are no tables")
    except (KeyError, ValueError, RecursionError) as error:
        raise _unusable(path, f"is damaged ({error})") from None
    now = settings(trainer)
    for name, value in BEFORE.items():
        then.setdefault(name, value)
    if lowered is True and _at_once(now) < _at_once(then):
        then["micro_batch"] = now["micro_batch"]
    changed = [told for name in {**then, **now} for told in _difference(name, then.get(name), now.get(name))]
    if changed:
        raise ResumeError(
            f"{path.name} holds a training with other settings: {'; '.join(changed)}. Set them back to go on with it, "
            "or move the file away to begin anew."
        )
    state = {name.removeprefix(_TRAINER): t for name, t in tensors.items() if name.startswith(_TRAINER)}
    done = state["losses"].numel() if "losses" in state else 0
    if done > trainer.config.steps:
        raise ResumeError(
            f"{path.name} holds a training of {done} steps already, and steps is {trainer.config.steps}: set steps to "
            f"{done} or more to go on with it, or move the file away to begin anew."
        )
    return state, extra | {name.removeprefix(_EXTRA): t for name, t in tensors.items() if name.startswith(_EXTRA)}


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a state file of this version, whole and undamaged."""
    with open(path, "rb") as file:
        data = file.read(MAX_FILE + 1)
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not data:
        raise _unusable(path, "is empty")
    if len(data) > MAX_FILE:
        raise _unusable(path, f"is larger than {MAX_FILE >> 20} MiB, which no training's state is")
    if not 2 <= length <= MAX_HEADER:
        raise _unusable(path, "is no .safetensors file")
    if len(data) < 8 + length:
        raise _unusable(path, "is cut off")
    try:
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        version = metadata["perfusion.state"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _unusable(path, "is not the state of a training") from None
    if version != str(FORMAT):
        raise ResumeError(
            f"{path.name} has format version {str(version)[:20]}, this version reads {FORMAT}: update "
            "ComfyUI-Perfusion, or move the file away to begin the training anew."
        )
    try:
        tensors = load_tensors(data)
    except (SafetensorError, KeyError) as error:
        raise _unusable(path, f"is damaged or cut off ({error})") from None
    if _content_digest(tensors, metadata) != metadata.get("perfusion.digest"):
        raise _unusable(path, "is damaged: its content is not what its digest says")
    return metadata, tensors


def _unusable(path: Path, what: str) -> ResumeError:
    return ResumeError(f"{path.name} {what}. Move it away to begin the training anew.")


def _difference(name: str, then: Any, now: Any) -> list[str]:
    """What a user is told of a setting that was changed, if it was."""
    if isinstance(then, list) and isinstance(now, list) and _alike(then, now):
        return []
    if then == now:
        return []
    return [_CHANGED[name] if name in _CHANGED else f"learned with {str(name)[:40]} {_said(then)}, now {_said(now)}"]


def _said(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return "".join(c for c in text[:60] if c.isprintable())


def _at_once(values: Mapping[str, Any]) -> int:
    """Photos in one pass."""
    micro, batch = values.get("micro_batch"), values.get("batch_size")
    return (micro or batch) if isinstance(micro, int) and isinstance(batch, int) else 0


def _digest(texts: Iterable[str]) -> str:
    return sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


def _content_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """sha256 of all that a state file holds."""
    content = sha256()
    for key, value in sorted(metadata.items()):
        if key != "perfusion.digest":
            content.update(json.dumps([key, value]).encode())
    for name, tensor in sorted(tensors.items()):
        content.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        content.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return content.hexdigest()


def _sketch(tensors: Iterable[Tensor]) -> list[float]:
    """Sums under random signs, whose distance is about that of the tensors (Charikar, Chen, Farach-Colton 2002)."""
    flat = torch.cat([tensor.detach().to("cpu", torch.float64).flatten() for tensor in tensors])
    signs = torch.randint(0, 2, flat.shape, generator=torch.Generator().manual_seed(len(flat)), dtype=torch.int8)
    sums = torch.nn.functional.pad(flat * (2 * signs - 1), (0, -len(flat) % _SKETCH)).view(-1, _SKETCH).sum(0)
    return [float(f"{number:.6g}") for number in sums]


def _alike(then: list[Any], now: list[Any]) -> bool:
    try:
        a, b = torch.tensor(then, dtype=torch.float64), torch.tensor(now, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return False
    return a.shape == b.shape and bool((a - b).norm() <= _SAME * max(a.norm(), b.norm()))
