"""Concepts in use together: each with its own gate and key lock, and the edit of keys and values they make."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256

import torch
from torch import Tensor

from .concept import Concept
from .edit import Directions, Gate, KeyValueEdit, Weighed
from .locking import LOCKS, Lock

MAX_CONCEPTS = 16


class StackError(ValueError):
    """Concepts that cannot be used together; the message names them and says what to do."""


@dataclass(frozen=True, eq=False)
class ConceptUse:
    """A concept and how it is applied.

    A lock that is ``lock_fixed`` stays as it is when all are locked one way. ``start`` and ``end`` are the part of
    sampling in which it is, as shares of it. ``region`` (height, width), 0 to 1, is where in a picture the model may
    look for its word; None is everywhere.

    Raises ValueError for settings that make no sense.
    """

    concept: Concept
    gate: Gate = field(default_factory=Gate)
    lock: Lock = "local"
    start: float = 0.0
    end: float = 1.0
    region: Tensor | None = None
    lock_fixed: bool = False

    def __post_init__(self) -> None:
        if self.lock not in LOCKS:
            raise ValueError(f"a key lock is one of {', '.join(LOCKS)}, not {self.lock!r}")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"{self.concept.placeholder} would be from {self.start:g} to {self.end:g} of sampling: start and end "
                "lie between 0 and 1, and start comes first"
            )
        if self.region is not None and not (self.region.ndim == 2 and float(self.region.max()) > 0.01):
            raise ValueError(
                f"the region of {self.concept.placeholder} is empty: paint white where it may appear, or connect none"
            )

    @property
    def active(self) -> bool:
        """Whether it changes anything."""
        return self.gate.strength != 0

    @property
    def always(self) -> bool:
        """Whether it is in all of sampling."""
        return self.start == 0 and self.end == 1

    def shut(self) -> ConceptUse:
        """The same, changing nothing."""
        return replace(self, gate=replace(self.gate, strength=0.0))

    def locked(self, lock: Lock) -> ConceptUse:
        """The same with another key lock, unless it has one of its own."""
        return self if self.lock_fixed else replace(self, lock=lock)


@dataclass(frozen=True, eq=False)
class ConceptStack:
    """Any number of concepts, none twice under one word: what travels between nodes.

    Raises StackError when two of them share a placeholder or there are too many.
    """

    uses: tuple[ConceptUse, ...] = ()

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for use in self.uses:
            word = use.concept.placeholder
            if word in seen:
                raise StackError(
                    f"two concepts share the word {word}: a prompt could not tell them apart. Switch one off, or train "
                    "it again under another placeholder."
                )
            seen.add(word)
        if len(self.uses) > MAX_CONCEPTS:
            raise StackError(f"{len(self.uses)} concepts at once; at most {MAX_CONCEPTS} are possible")

    def __add__(self, other: ConceptStack) -> ConceptStack:
        return ConceptStack(self.uses + other.uses)

    def __len__(self) -> int:
        return len(self.uses)

    @property
    def active(self) -> ConceptStack:
        """Those that change anything."""
        return ConceptStack(tuple(use for use in self.uses if use.active))

    @property
    def concepts(self) -> list[Concept]:
        """The concepts, in order."""
        return [use.concept for use in self.uses]

    @property
    def placeholders(self) -> list[str]:
        """Their words, in order."""
        return [use.concept.placeholder for use in self.uses]

    @property
    def locks_globally(self) -> bool:
        """Whether the keys of any are locked globally."""
        return any(use.lock == "global" for use in self.uses)

    def replaced(self, owner: str, *, keys: bool = False) -> frozenset[str]:
        """The words in whose place a token of the concept ``owner``, "" for nobody's, hears the super-category: all
        that are to be heard by their own tokens alone and, for its ``keys``, all whose keys are locked globally.
        """
        return frozenset(
            use.concept.placeholder
            for use in self.uses
            if (use.concept.scope == "word" and use.concept.placeholder != owner) or (keys and use.lock == "global")
        )

    @property
    def tells_words(self) -> bool:
        """Whether the network has to be told whose word each token is."""
        return len(self) > 1 or self.rescopes or self.focuses or any(use.region is not None for use in self.uses)

    @property
    def focuses(self) -> bool:
        """Whether any word is to be looked at more than by itself."""
        return bool(self.looked_at)

    @property
    def looked_at(self) -> frozenset[str]:
        """The words that are to be looked at more than by themselves. A prompt weight says how much, too."""
        looked_at = [use for use in self.uses if use.concept.focus != 1 and use.gate.focus_share > 0]
        return frozenset(use.concept.placeholder for use in looked_at)

    @property
    def rescopes(self) -> bool:
        """Whether any word is not heard by all tokens behind it."""
        return any(use.concept.scope == "word" for use in self.uses)

    def changed(self, word: str, change: Callable[[ConceptUse], ConceptUse]) -> ConceptStack:
        """The same with another use of the concept of one word, or, where ``word`` is empty, of all of them.

        Raises StackError when there is no such word.
        """
        word = word.strip().lower()
        if word and word not in [placeholder.lower() for placeholder in self.placeholders]:
            known = ", ".join(self.placeholders) or "none"
            raise StackError(f"there is no concept {word} among those that arrive: {known}")
        uses = [change(use) if word in ("", use.concept.placeholder.lower()) else use for use in self.uses]
        return ConceptStack(tuple(uses))

    def locked(self, lock: Lock) -> ConceptStack:
        """The same with all keys locked one way, but for those that have a lock of their own."""
        return ConceptStack(tuple(use.locked(lock) for use in self.uses))

    def edit(self, rows: Sequence[Sequence[Gate]] | None = None, *, competing: bool = True) -> KeyValueEdit:
        """The edit of keys and values that these concepts make together; with other gates for each row of a batch,
        where ``rows`` gives them (``Directions.varied``). ``competing`` off is the paper's: each gate by itself.

        Raises ParallelConceptsError when two of them cannot be told apart.
        """
        concepts = self.concepts
        kinds = [" ".join(concept.super_category.lower().split()) for concept in concepts]
        directions = Directions.of(
            torch.stack([c.i_star for c in concepts]),
            torch.stack([c.d_star for c in concepts]),
            [use.gate for use in self.uses],
            [c.form for c in concepts],
            [c.placeholder for c in concepts],
            competing=competing,
            confined=[concept.scope == "word" for concept in concepts],
        )
        return KeyValueEdit(
            directions if rows is None else directions.varied(rows),
            torch.stack([c.e_super for c in concepts]),
            {layer: torch.stack([c.o_star_v[layer] for c in concepts]) for layer in concepts[0].family.layers},
            [use.lock for use in self.uses],
            [word_number(concept.placeholder) for concept in concepts],
            [concept.anchored for concept in concepts],
            [concept.focus for concept in concepts],
            torch.stack([c.e_super if c.e_key is None else c.e_key for c in concepts]),
            [kinds.index(kind) for kind in kinds],
        )


def word_number(placeholder: str) -> int:
    """A number above 0 that stands for a concept's word, the same everywhere."""
    return 1 + int.from_bytes(sha256(placeholder.lower().encode()).digest()[:4], "big")


def shut_words(
    stack: ConceptStack, edit: KeyValueEdit, told: Sequence[tuple[Tensor, Tensor | None, Weighed | None]]
) -> list[str]:
    """The words of a stack whose gate no token of any encoding opens by half; none without encodings.

    ``told`` are encodings (b, m, d), each with its words (b, m) and what its weights do: see ``KeyValueEdit``.
    """
    gates = []
    for encoding, words, weighed in told:
        with edit.told(words, weighed):
            gates.append(edit.gates(encoding).amax(dim=(0, 1)).cpu())
    if not gates:
        return []
    widest = torch.stack(gates).amax(dim=0)
    return [word for word, gate in zip(stack.placeholders, widest, strict=True) if gate < 0.5]
