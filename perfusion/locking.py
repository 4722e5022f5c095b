"""Key locking (Tewel et al. 2023): a concept attends as its super-category does.

Locally, the keys of the concept's own token are those of the super-category: o*_K = W_K e_super in the gated edit. A
concept may have learned another encoding e_key in place of e_super, close to it. Globally, every key is computed from
the prompt's encoding with the super-category standing in the concept's place, whatever e_key is; values keep the
concept's encoding. Global locking gives richer scenes and more variation, local locking more fidelity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar, get_args

from torch import Tensor

Lock = Literal["local", "global"]
LOCKS: tuple[Lock, ...] = get_args(Lock)
Token = TypeVar("Token")


class KeyLock:
    """How the keys of J concepts are locked, and, for global locks, the shift that turns a context into its twin.

    The host sets ``shift`` (b, m, d) around each call of the network: the encoding with the super-category in the
    concept's place, minus the encoding itself; zero where nothing differs. Contexts that come without one, or that
    another extension has reshaped since, fall back to local locking, which needs the context alone.
    """

    def __init__(self, locks: Sequence[Lock]):
        if any(lock not in LOCKS for lock in locks):
            raise ValueError(f"a key lock is one of {', '.join(LOCKS)}")
        self.locks = tuple(locks)
        self.shift: Tensor | None = None

    def shifted(self, context: Tensor) -> Tensor | None:
        """The context (b, m, d) that globally locked keys read, or None where every key is locked locally."""
        if "global" not in self.locks or self.shift is None or self.shift.shape != context.shape:
            return None
        return context + self.shift.to(context)

    def locally(self, shifted: bool) -> list[bool]:
        """Which of the J concepts' keys the gated edit locks: all of them where the keys read no shifted context."""
        return [lock == "local" or not shifted for lock in self.locks]


def twin(
    tokens: Sequence[Token],
    word: Sequence[Sequence[Token] | None],
    limit: int,
) -> tuple[list[Token], list[int]]:
    """A prompt's tokens with the super-category in the concept's place, and where each old token stands in the new.

    ``word[m]`` is the super-category's tokens at the first token of a concept's word, an empty sequence at its further
    tokens, None elsewhere. Both lists keep the length ``limit`` of one chunk and its last token, which is padding or
    the end: tokens pushed out before it are dropped, and a chunk that became shorter repeats it.

    Returns (new tokens, index): the encoding of new token ``index[m]`` is what token m reads; -1 where m has no
    counterpart any more, having been pushed out. Padding always has: it reads the last. A word's only token reads the
    last token of the super-category, which in a causal encoder has seen the whole phrase; several tokens are aligned at
    their ends.
    """
    new: list[Token] = []
    index: list[int] = []
    position = 0
    while position < len(tokens):
        replacement = word[position]
        if replacement is None:
            index.append(len(new))
            new.append(tokens[position])
            position += 1
            continue
        end = position + 1
        while end < len(tokens) and word[end] is not None and len(word[end] or ()) == 0:
            end += 1
        count, start = end - position, len(new)
        new.extend(replacement)
        index.extend(start + max(0, len(replacement) - count + k) for k in range(count))
        position = end
    if len(new) <= limit:
        return new + [tokens[-1]] * (limit - len(new)), index
    first_of_last = len(tokens) - 1
    while first_of_last > 0 and word[first_of_last - 1] is None and _same(tokens[first_of_last - 1], tokens[-1]):
        first_of_last -= 1
    index = [
        place if place < limit - 1 else limit - 1 if position >= first_of_last else -1
        for position, place in enumerate(index)
    ]
    return [*new[: limit - 1], tokens[-1]], index


def _same(one: object, other: object) -> bool:
    """Whether two tokens are equal; those with embeddings of their own have no truth of being so."""
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):
        return False
