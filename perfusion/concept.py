"""A learned concept, and its .safetensors file.

The file holds, in half precision, per text encoder the word's embeddings; the target input i*, its dual vector d*, the
super-category's encoding e_super and, where it was learned, the encoding e_key that keys are locked to in its place,
each (d,); and the target values of all layers one after the other, in half precision or, for families with many of
them, in 8 bits (``quantization``). Keys are never stored: they are those of e_key or e_super and follow the model in
use. Values follow it too: what is stored is their difference to W_V e_super of the model they were learned on, or, in
files of some format versions, o*_V itself. Metadata (all text) says for which family, word and super-category, and how
it was trained; the ModelSpec 1.0.1 keys tell other programs.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from . import foreign
from .edit import FORMS, MAX_FOCUS, Form
from .family import Family
from .files import write_atomically
from .quantization import dequantize, quantize
from .quantization import rounded as rounded_to_8_bits
from .scope import SCOPES, Scope
from .statistics import ESTIMATORS, Estimator

Storage = Literal["half", "8bit"]
STORAGES: tuple[Storage, ...] = get_args(Storage)
# How target values are stored, whether they are differences, and how far the word is heard -> the format version that
# says so. Programs that know the first alone refuse the others by it.
FORMATS: dict[tuple[Storage, bool, Scope], str] = {
    ("half", False, "prompt"): "1",
    ("8bit", False, "prompt"): "2",
    ("half", True, "prompt"): "3",
    ("8bit", True, "prompt"): "4",
    ("half", True, "word"): "5",
    ("8bit", True, "word"): "6",
    ("half", False, "word"): "7",
    ("8bit", False, "word"): "8",
}
FOCUSED = "9"  # as the version that it names, and the word is looked at more than by itself
KEYED = "10"  # as the version that it names, with an e_key; the word may be looked at more
MAX_HEADER = 1 << 20
MAX_FILE = 16 << 20
MAX_VECTORS = 32
MAX_THUMBNAIL = 100_000

_PLACEHOLDER = re.compile(r"<[a-z0-9](?:[a-z0-9_-]{0,46}[a-z0-9])?>")
_FILE_NAME = re.compile(r"[^\w.-]+")
_THUMBNAIL = re.compile(r"data:image/(?:jpeg|png|webp);base64,[A-Za-z0-9+/]+={0,2}")
_WINDOWS_DEVICES = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)
_DTYPES = {"F16", "BF16", "F32"}
_PICKLE_SUFFIXES = {".pt", ".pth", ".ckpt", ".bin"}
_EMBEDDING = "embedding."
_VECTORS = ("i_star", "d_star", "e_super", "e_key")
_VALUES = {False: "o_star_v", True: "delta_v"}  # by whether the concept is anchored
_SCALES = ".scale"
_TENSORS_IN_HEADER = 4096  # more than names, types and places of all tensors take
_LARGE_FAMILIES = {"sdxl"}  # in half precision their target values alone would take more than 100 KB


class ConceptFileError(ValueError):
    """A file that is not a usable concept; the message says what is wrong with it and what to do."""


class PlaceholderError(ValueError):
    """A word that cannot stand for a concept; the message says what one looks like."""


def check_placeholder(placeholder: str) -> str:
    """The placeholder as prompts are compared with it (lower case). Raises PlaceholderError when it cannot be one."""
    word = placeholder.strip().lower()
    if not _PLACEHOLDER.fullmatch(word):
        raise PlaceholderError(
            f"{placeholder!r} cannot stand for a concept: it must be one made-up word in angle brackets, such as "
            "<my-teddy>, of letters a-z, digits, - and _, without spaces, so that it is never mistaken for an "
            "ordinary word of the prompt."
        )
    return word


@dataclass(frozen=True, eq=False)
class Concept:
    """What was learned. Tensors are float32 in memory with values that the file holds exactly, so that a concept fresh
    from training and the same one read back from its file are equal.

    ``embeddings``: encoder -> (n, width); ``i_star``, ``d_star``, ``e_super``: (d,); ``e_key``: (d,), what keys are
    locked to, or None for e_super; ``o_star_v``: layer -> (i,), what is added to W_V e_super where the concept is
    ``anchored``, else the values themselves. ``storage`` is how the file keeps ``o_star_v``; all else is kept in half
    precision. ``scope`` is how far the word is heard in a prompt, ``focus`` how many times more the model looks at it.
    Raises ConceptFileError when shapes do not fit the family or a number is not finite.
    """

    family: Family
    placeholder: str
    super_category: str
    embeddings: Mapping[str, Tensor]
    i_star: Tensor
    d_star: Tensor
    e_super: Tensor
    o_star_v: Mapping[str, Tensor]
    form: Form = "paper"
    estimator: Estimator = "robust"
    training: Mapping[str, Any] = field(default_factory=dict)
    created: str = ""
    thumbnail: str = ""
    storage: Storage = "half"
    anchored: bool = False
    scope: Scope = "prompt"
    focus: float = 1.0
    e_key: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "placeholder", check_placeholder(self.placeholder))
        object.__setattr__(self, "super_category", _text(self.super_category))
        if self.form not in FORMS or self.estimator not in ESTIMATORS:
            raise ConceptFileError(f"it uses a form of the method ({self.form}, {self.estimator}) this version lacks")
        if self.scope not in SCOPES:
            raise ValueError(f"a scope is one of {', '.join(SCOPES)}, not {self.scope!r}")
        if not 1 <= self.focus <= MAX_FOCUS:
            raise ValueError(f"a focus is a number from 1 to {MAX_FOCUS}, not {self.focus}")
        if self.storage not in STORAGES:
            raise ValueError(f"target values are stored in one of {', '.join(STORAGES)}, not {self.storage!r}")
        d = self.family.context_width
        for name, vector in self._vectors.items():
            _require_shape(name, vector, (d,))
        if set(self.embeddings) != set(self.family.encoders):
            raise ConceptFileError("it does not have embeddings for each text encoder of its family")
        for name, width in self.family.encoders.items():
            rows = self.embeddings[name]
            _require_shape(_EMBEDDING + name, rows, (len(rows) if rows.ndim else 0, width))
            if not 0 < len(rows) <= MAX_VECTORS:
                raise ConceptFileError(f"its word has {len(rows)} vectors; 1 to {MAX_VECTORS} are possible")
        if len({len(rows) for rows in self.embeddings.values()}) > 1:
            raise ConceptFileError("its word has different numbers of vectors for its text encoders")
        if list(self.o_star_v) != list(self.family.layers):
            raise ConceptFileError("its layers are not those of its family")
        for name, width in self.family.layers.items():
            _require_shape(f"o_star_v of {name}", self.o_star_v[name], (width,))
        if float(self.i_star.double() @ self.d_star.double()) <= 0:
            raise ConceptFileError("its i* and d* contradict each other (i* . d* must be positive)")

    @classmethod
    def rounded(cls, **fields: Any) -> Concept:
        """A concept whose tensors are rounded to what its file will hold.

        Without ``storage`` it is the family's: 8 bits for SDXL, half precision for all others.
        """

        def half(tensor: Tensor) -> Tensor:
            return tensor.detach().to("cpu", torch.float16).float()

        for name in _VECTORS:
            if fields.get(name) is not None:
                fields[name] = half(fields[name])
        fields["embeddings"] = {key: half(rows) for key, rows in fields["embeddings"].items()}
        layers: Mapping[str, Tensor] = fields["o_star_v"]
        storage = fields.setdefault("storage", "8bit" if fields["family"].name in _LARGE_FAMILIES else "half")
        values = rounded_to_8_bits(list(layers.values())) if storage == "8bit" else map(half, layers.values())
        fields["o_star_v"] = dict(zip(layers, values, strict=True))
        fields.setdefault("created", datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"))
        return cls(**fields)

    @property
    def _vectors(self) -> dict[str, Tensor]:
        """Those of ``_VECTORS`` that it has: (d,) each."""
        every = {name: getattr(self, name) for name in _VECTORS}
        return {name: vector for name, vector in every.items() if vector is not None}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the file: float16, and with 8-bit storage int8 codes of ``o_star_v`` and their scales."""
        stored = {_EMBEDDING + name: rows for name, rows in self.embeddings.items()}
        stored |= self._vectors
        layers = list(self.o_star_v.values())
        values = _VALUES[self.anchored]
        if self.storage == "half":
            stored[values] = torch.cat(layers)
        tensors = {name: tensor.to(torch.float16).contiguous() for name, tensor in stored.items()}
        if self.storage == "8bit":
            tensors[values], tensors[values + _SCALES] = quantize(layers)
        return tensors

    @property
    def digest(self) -> str:
        """sha256 of everything that changes pictures: tensors, word, super-category, form, family, scope, focus."""
        # Spelled out, and not what a library or ``to_json`` happens to write: files must keep their digests for ever.
        family = self.family
        text = [
            ["placeholder", self.placeholder],
            ["super_category", self.super_category],
            ["form", self.form],
            ["family", family.name],
            ["context_width", family.context_width],
            ["encoders", [[name, width] for name, width in family.encoders.items()]],
            ["layers", [[name, width] for name, width in family.layers.items()]],
            *([["scope", self.scope]] if self.scope != "prompt" else []),
            *([["focus", float(self.focus)]] if self.focus != 1 else []),
        ]
        content = sha256(json.dumps(text, separators=(",", ":")).encode())
        for name, tensor in sorted(self.tensors.items()):
            content.update(f"{name}{list(tensor.shape)}".encode())
            array = tensor.numpy()
            content.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return content.hexdigest()

    @property
    def metadata(self) -> dict[str, str]:
        """The text part of the file."""
        resolution = self.training.get("resolution")
        modelspec = {
            "sai_model_spec": "1.0.1",
            "architecture": f"{self.family.architecture}/perfusion",
            "implementation": "ComfyUI-Perfusion",
            "title": self.placeholder.strip("<>"),
            "description": f"Perfusion concept: one particular {self.super_category}",
            "date": self.created,
            "trigger_phrase": self.placeholder,
            "usage_hint": f"Write {self.placeholder} where you would write {self.super_category}.",
            "hash_sha256": "0x" + sha256(_body(save_tensors(self.tensors))).hexdigest(),
            **({"resolution": f"{resolution}x{resolution}"} if resolution else {}),
            **({"thumbnail": self.thumbnail} if self.thumbnail else {}),
        }
        like = FORMATS[self.storage, self.anchored, self.scope]
        version = KEYED if self.e_key is not None else FOCUSED if self.focus != 1 else like
        own = {
            "format": version,
            **({"like": like} if version != like else {}),
            **({"focus": repr(float(self.focus))} if self.focus != 1 else {}),
            "family": self.family.to_json(),
            "placeholder": self.placeholder,
            "super_category": self.super_category,
            "form": self.form,
            "estimator": self.estimator,
            "training": json.dumps(dict(self.training), separators=(",", ":"), sort_keys=True),
            "digest": self.digest,
        }
        return {f"modelspec.{key}": value for key, value in modelspec.items()} | {
            f"perfusion.{key}": value for key, value in own.items()
        }

    @property
    def header_room(self) -> int:
        """How many bytes of extra metadata, keys and punctuation included, the file's header has room for."""
        return MAX_HEADER - len(json.dumps(self.metadata)) - _TENSORS_IN_HEADER

    def to_bytes(self) -> bytes:
        """The content of the file, the same for equal concepts: other than in a saved file, the header is sorted."""
        data = save_tensors(self.tensors, self.metadata)
        header = json.loads(data[8 : len(data) - len(_body(data))])
        text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + _body(data)

    def save(self, path: Path, *, overwrite: bool = False, extra: Mapping[str, str] | None = None) -> Path:
        """Write the file atomically, with ``extra`` metadata for other programs.

        Raises FileExistsError unless ``overwrite``, OSError when it cannot be written.
        """
        write_atomically(path, self.tensors, {**(extra or {}), **self.metadata}, overwrite=overwrite)
        return path

    def save_numbered(
        self, folder: Path, name: str, shadowing: Sequence[Path] = (), extra: Mapping[str, str] | None = None
    ) -> Path:
        """Write ``name.safetensors``, or ``name_2`` and so on where that name is taken: nothing is overwritten.

        A file of that name which already holds this very concept is left as it is and returned. Names that another
        file has in one of the folders ``shadowing``, where it would be found first, count as taken too.
        """
        stem = file_stem(name)
        number = 1
        while True:
            path = folder / f"{stem if number == 1 else f'{stem}_{number}'}.safetensors"
            shadows = [other / path.name for other in shadowing if (other / path.name).exists()]
            if all(_holds(shadow, self.digest) for shadow in shadows):
                try:
                    return self.save(path, extra=extra)
                except FileExistsError:
                    if _holds(path, self.digest):
                        return path
            number += 1

    def with_thumbnail(self, data_uri: str) -> Concept:
        """The same with a thumbnail, a data URI of an image. Raises ValueError for anything else, or above 100 KB."""
        if not _is_thumbnail(data_uri):
            raise ValueError(
                f"a thumbnail is a data URI of a JPEG, PNG or WebP image, of {MAX_THUMBNAIL} characters at most"
            )
        return replace(self, thumbnail=data_uri)


def file_stem(name: str) -> str:
    """A safe file name, without ending: "<my teddy>" -> "my-teddy". Raises ValueError for folders and empty names."""
    if os.path.isabs(name) or re.search(r"[\\/]|\.\.", name):
        raise ValueError(f"{name!r} is not a plain file name: leave out folders, they are chosen for you")
    stem = _FILE_NAME.sub("-", name.removesuffix(".safetensors")).strip("-._")
    if not stem:
        raise ValueError("give the concept's file a name of letters and digits")
    if _WINDOWS_DEVICES.fullmatch(stem):
        stem = f"concept-{stem}"
    return stem[:100].encode()[:200].decode(errors="ignore")  # file systems count bytes


def read_header(path: Path) -> dict[str, Any]:
    """The header of a .safetensors file: tensor name -> {dtype, shape, data_offsets}, and "__metadata__".

    Reads no tensor. Raises ConceptFileError for anything that is not such a file, OSError when it cannot be read.
    """
    with open(path, "rb") as file:
        return _header(file, os.path.getsize(path), path.name)


def _header(file: BinaryIO, size: int, name: str) -> dict[str, Any]:
    """See ``read_header``."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    plausible = 2 <= length <= MAX_HEADER and size <= MAX_FILE
    raw = file.read(length) if plausible else start + file.read(foreign.LOOKED_AT)
    if size == 0:
        raise ConceptFileError(f"{name} is empty. Copy or train the concept again.")
    # A header's length may begin with any byte, so magic numbers count only where there is no such length.
    pickled = not plausible and (start[:2] == b"PK" or start[:1] == b"\x80")
    if pickled or Path(name).suffix.lower() in _PICKLE_SUFFIXES:
        reason = foreign.refusal(raw)
        raise ConceptFileError(
            f"{name} {reason}"
            if reason
            else f"{name} is a pickle file, which can run code when it is opened. Concepts are .safetensors files."
        )
    if not plausible:
        raise ConceptFileError(
            f"{name} is not a concept file: its header would be {length} bytes long (at most {MAX_HEADER} are "
            f"possible) and the file is {size} bytes (at most {MAX_FILE}). Choose a file saved by Save Concept."
        )
    if len(raw) < length:
        raise ConceptFileError(f"{name} is cut off. Copy or download it again.")
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ConceptFileError(f"{name} is not a .safetensors file. Choose a file saved by Save Concept.")
    return header


def load(path: Path) -> Concept:
    """Read a concept file. Everything is checked before anything is used.

    Raises ConceptFileError, naming the file, when it is damaged, of another kind or of a newer version; OSError when
    it cannot be read.
    """
    return _checked(read_header(path), path.read_bytes, path.name)


def from_bytes(data: bytes, name: str) -> Concept:
    """Read the content of a file, as ``load`` does. Raises ConceptFileError, which calls it ``name``."""
    return _checked(_header(BytesIO(data), len(data), name), lambda: data, name)


def _checked(header: dict[str, Any], read: Callable[[], bytes], name: str) -> Concept:
    try:
        return _parse(header, read)
    except (ConceptFileError, PlaceholderError) as error:
        message = str(error)
        raise ConceptFileError(message if name in message else f"{name}: {message}") from None


def _parse(header: dict[str, Any], read: Callable[[], bytes]) -> Concept:
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or "perfusion.format" not in metadata:
        raise ConceptFileError(
            "it is a .safetensors file, but no Perfusion concept. LoRA and embedding files have loaders of their own."
        )
    version = metadata["perfusion.format"]
    known = {number: kind for kind, number in FORMATS.items()}
    if not isinstance(version, str) or version not in {*known, FOCUSED, KEYED}:
        raise ConceptFileError(
            f"it has format version {str(version)[:20]}, this version reads 1 to {KEYED}. Update ComfyUI-Perfusion."
        )
    try:
        like, focus = version, 1.0
        if version in (FOCUSED, KEYED):
            like = metadata["perfusion.like"]
            if version == FOCUSED or "perfusion.focus" in metadata:
                focus = float(str(metadata["perfusion.focus"])[:20])
                if not 1 < focus <= MAX_FOCUS:
                    raise ValueError(f"a focus of {focus}")
        storage, anchored, scope = known[like]
        family = Family.from_json(metadata["perfusion.family"])
        placeholder, super_category = metadata["perfusion.placeholder"], _text(metadata["perfusion.super_category"])
        training = json.loads(metadata.get("perfusion.training", "{}"))
        if not isinstance(training, dict):
            raise ValueError("training settings are not a table")
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ConceptFileError(f"its metadata is damaged ({error}). Copy or train it again.") from None
    values = _VALUES[anchored]
    expected = {*_VECTORS, values, *(_EMBEDDING + name for name in family.encoders)}
    expected -= {"e_key"} if version != KEYED else set()
    expected |= {values + _SCALES} if storage == "8bit" else set()
    if set(header) != expected:
        odd = sorted(str(name)[:60] for name in set(header) ^ expected)
        raise ConceptFileError(f"it does not hold the tensors of a concept (missing or unknown: {', '.join(odd[:4])})")
    for name, entry in header.items():
        possible = {"I8"} if name == values and storage == "8bit" else _DTYPES
        if not isinstance(entry, dict) or entry.get("dtype") not in possible:
            raise ConceptFileError(f"its tensors are of unknown types; {name} must be {', '.join(sorted(possible))}")
    try:
        tensors = load_tensors(read())
    except SafetensorError as error:
        raise ConceptFileError(f"it is damaged or cut off ({error}). Copy or download it again.") from None
    stored = tensors.pop(values), tensors.pop(values + _SCALES, None)
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    concept = Concept(
        family=family,
        placeholder=placeholder,
        super_category=super_category,
        embeddings={name: tensors[_EMBEDDING + name] for name in family.encoders},
        **{name: tensors[name] for name in _VECTORS if name in tensors},
        o_star_v=dict(zip(family.layers, _layers(values, *stored, family), strict=True)),
        form=metadata.get("perfusion.form", ""),
        estimator=metadata.get("perfusion.estimator", ""),
        training=training,
        created=_text(metadata.get("modelspec.date", "")),
        thumbnail=metadata["modelspec.thumbnail"] if _is_thumbnail(metadata.get("modelspec.thumbnail")) else "",
        storage=storage,
        anchored=anchored,
        scope=scope,
        focus=focus,
    )
    if concept.digest != metadata.get("perfusion.digest"):
        raise ConceptFileError("its content is not what its digest says: it was damaged. Copy or download it again.")
    return concept


def _layers(name: str, values: Tensor, scales: Tensor | None, family: Family) -> Sequence[Tensor]:
    """The target values of each layer, float32, from the tensors of a file; ``scales`` where they are in 8 bits."""
    widths = list(family.layers.values())
    _require_shape(name, values, (sum(widths),))
    if scales is None:
        return values.float().split(widths)
    _require_shape(name + _SCALES, scales, (len(widths),))
    if not (scales > 0).all():
        raise ConceptFileError(f"{name}{_SCALES} holds a number that is not above 0: the file is damaged")
    return dequantize(values, scales, widths)


def _holds(path: Path, digest: str) -> bool:
    try:
        return load(path).digest == digest
    except (OSError, ConceptFileError):
        return False


def _is_thumbnail(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_THUMBNAIL and _THUMBNAIL.fullmatch(value) is not None


def _require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ConceptFileError(f"{name} has shape {tuple(tensor.shape)}, its family asks for {shape}")
    if not tensor.isfinite().all():
        raise ConceptFileError(f"{name} holds numbers that are not finite: training diverged or the file is damaged")


def _text(value: Any) -> str:
    """Text from a file, bounded and without control characters."""
    return "".join(c for c in str(value)[:200] if c.isprintable())


def _body(file: bytes) -> bytes:
    """The tensor part of a .safetensors file."""
    return file[8 + struct.unpack("<Q", file[:8])[0] :]
