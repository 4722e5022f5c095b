"""Concepts as text, to travel inside a workflow: one line for each, made of its file and how it is applied.

    perfusion-concept 1 <my-teddy> bias=0.6,temperature=0.15,strength=1.0,lock=local sha256:6d... 6Aw...
    perfusion-concept 2 <my-cat> bias=0.6,temperature=0.15,strength=1.0,lock=global,start=0.2,... sha256:ba... Jq...

The parts are a fixed word, the version of this form, the concept's word, its settings, the sha256 of all that stands
before it and of the file, and the file in base64. Version 2 is that of concepts with a key lock of their own or in a
part of sampling only, version 3 that of those with another focus share than 1. Equal concepts with equal settings give
equal text; a thumbnail stays out.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import replace
from hashlib import sha256
from typing import cast

from .concept import Concept, from_bytes
from .edit import Gate
from .locking import LOCKS, Lock
from .stack import MAX_CONCEPTS, ConceptStack, ConceptUse

PREFIX = "perfusion-concept"
VERSIONS = ("1", "2", "3")
MAX_CHARACTERS = 4_000_000
_NUMBERS = ("bias", "temperature", "strength")
_SCHEDULE = ("start", "end")


class EmbeddedConceptError(ValueError):
    """Text that holds no usable concepts, or concepts that no text can hold; the message says what to do."""


def to_text(stack: ConceptStack) -> str:
    """The concepts of a stack as text, in order.

    Raises EmbeddedConceptError above ``MAX_CHARACTERS``, and for a concept with a region.
    """
    text = "\n".join(map(_line, stack.uses))
    if len(text) > MAX_CHARACTERS:
        raise EmbeddedConceptError(
            f"these concepts make a text of {len(text):,} characters, and a workflow should not carry more than "
            f"{MAX_CHARACTERS:,}. Embed fewer of them, and share the others as files."
        )
    return text


def from_text(text: str) -> ConceptStack:
    """The concepts of a text. Everything is checked before anything is used.

    Raises EmbeddedConceptError, naming the line, for what is damaged, too large or of another version; ConceptFileError
    for a concept that no version of the file would hold; StackError where two share a word.
    """
    if len(text) > MAX_CHARACTERS:
        raise EmbeddedConceptError(
            f"the text has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read. Embed fewer concepts."
        )
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    if len(lines) > MAX_CONCEPTS:
        raise EmbeddedConceptError(
            f"the text holds {len(lines)} concepts; at most {MAX_CONCEPTS} can be used at once. Embed fewer of them."
        )
    return ConceptStack(tuple(_use(line, number) for number, line in enumerate(lines, 1)))


def _line(use: ConceptUse) -> str:
    if use.region is not None:
        raise EmbeddedConceptError(
            f"the region of {use.concept.placeholder} is a picture, which no text holds: connect Concept Settings with "
            "the region behind Embed Concept, not before it."
        )
    settings = {name: repr(float(getattr(use.gate, name))) for name in _NUMBERS} | {"lock": use.lock}
    version = VERSIONS[0]
    if use.lock_fixed or not use.always or use.gate.focus_share != 1:
        version = VERSIONS[1]
        settings |= {name: repr(float(getattr(use, name))) for name in _SCHEDULE}
        settings["lock_fixed"] = str(int(use.lock_fixed))
    if use.gate.focus_share != 1:
        version = VERSIONS[2]
        settings["focus_share"] = repr(float(use.gate.focus_share))
    told = ",".join(f"{name}={value}" for name, value in settings.items())
    file = replace(use.concept, thumbnail="").to_bytes()
    head = f"{PREFIX} {version} {use.concept.placeholder} {told}"
    return f"{head} sha256:{_digest(head, file)} {base64.b64encode(file).decode()}"


def _digest(head: str, file: bytes) -> str:
    return sha256(f"{head}\n".encode() + file).hexdigest()


def _use(line: str, number: int) -> ConceptUse:
    parts = line.split()
    if parts[0] != PREFIX:
        raise EmbeddedConceptError(
            f"line {number} is no embedded concept: it does not begin with {PREFIX!r}. Put the whole text there again, "
            "or clear it and run with the concepts connected."
        )
    version = parts[1] if len(parts) > 1 else ""
    if version not in VERSIONS:
        raise EmbeddedConceptError(
            f"line {number} has format version {version[:20]!r}, and this ComfyUI-Perfusion reads "
            f"{VERSIONS[0]} to {VERSIONS[-1]}. Update it."
        )
    damaged = EmbeddedConceptError(
        f"line {number} is damaged: its content is not what its digest says. Open the original workflow again, or "
        "clear the text and run with the concepts connected."
    )
    if len(parts) != 6:
        raise damaged
    head, digest, payload = " ".join(parts[:4]), parts[4], parts[5]
    try:
        file = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise damaged from None
    if digest != f"sha256:{_digest(head, file)}":
        raise damaged
    concept: Concept = from_bytes(file, f"the concept in line {number}")
    if concept.placeholder != parts[2]:
        raise damaged
    return _with_settings(concept, version, parts[3], number)


def _with_settings(concept: Concept, version: str, text: str, number: int) -> ConceptUse:
    pairs = [part.partition("=") for part in text.split(",")]
    given = {name: value for name, _, value in pairs}
    further = {*_SCHEDULE, "lock_fixed"} if version != VERSIONS[0] else set()
    further |= {"focus_share"} if version == VERSIONS[2] else set()
    if (
        set(given) != {*_NUMBERS, "lock", *further}
        or given["lock"] not in LOCKS
        or given.get("lock_fixed", "0") not in ("0", "1")
    ):
        raise EmbeddedConceptError(
            f"line {number} has settings that this version does not know ({text[:80]}). Update ComfyUI-Perfusion."
        )
    try:
        return ConceptUse(
            concept,
            Gate(**{name: float(given[name]) for name in (*_NUMBERS, "focus_share") if name in given}),
            cast(Lock, given["lock"]),
            start=float(given.get("start", 0)),
            end=float(given.get("end", 1)),
            lock_fixed=given.get("lock_fixed") == "1",
        )
    except ValueError as error:
        raise EmbeddedConceptError(f"line {number}: {error}") from None
