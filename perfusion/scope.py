"""How far a concept's word is heard in a prompt.

A text encoder lets every token read those before it, so that a learned word also changes the encodings of all words
behind it: their keys and values, and through them the rest of the picture, another thing, another concept. That is the
scope "prompt", the paper's. In the scope "word" the learned embedding is heard by the word's own tokens alone; all
others are encoded as if the super-category stood in its place, which is to values what global locking is to keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from .hosts.base import Encodings, TextHost, Word

Scope = Literal["word", "prompt"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


class ScopedText:
    """Encodes prompts in which one word is heard as its scope says.

    What does not change with the word's embeddings is ``kept`` between calls, for as many prompts: to be used for as
    long as the encoders stay as they are. Such prompts are encoded one by one, for what a prompt becomes may depend, in
    its last digits, on those that are encoded with it, and so on what was known before.
    """

    def __init__(self, host: TextHost, scope: Scope, *, kept: int = 0):
        if scope not in SCOPES:
            raise ValueError(f"a scope is one of {', '.join(SCOPES)}, not {scope!r}")
        self._host, self._scope, self._most = host, scope, kept
        self._plain: dict[tuple[str, str, str], Encodings] = {}

    def __call__(self, prompts: Sequence[str], word: Word | None = None) -> Encodings:
        """See ``TextHost.encode``."""
        if self._scope == "prompt" or word is None or word.embeddings is None:
            return self._host.encode(prompts, word)
        plain = self.plain(prompts, word)
        return among(self._host.encode(prompts, word, until_word=True), plain)

    def prepare(self, prompts: Sequence[str], word: Word, *, plain: bool = False) -> None:
        """Encode now what can be kept of these prompts, so that no later call has to; ``plain`` ones are wanted too."""
        if (plain or self._scope == "word") and self._most:
            self.plain(prompts[: self._most], word)

    def plain(self, prompts: Sequence[str], word: Word) -> Encodings:
        """The prompts with the super-category in the word's place, whatever its embeddings. No gradient."""
        word = Word(word.placeholder, word.text)
        names = [(prompt, word.placeholder, word.text) for prompt in prompts]
        found = {name: self._plain[name] for name in names if name in self._plain}
        missing = list(dict.fromkeys(name for name in names if name not in found))
        at_once = 1 if self._most else max(1, len(missing))
        for start in range(0, len(missing), at_once):
            some = missing[start : start + at_once]
            with torch.no_grad():
                encoded = self._host.encode([prompt for prompt, *_ in some], word)
            found |= {name: encoded.select(torch.tensor([k])) for k, name in enumerate(some)}
        room = max(0, self._most - len(self._plain))
        self._plain |= {name: found[name] for name in missing[:room]}
        return Encodings.joined([found[name] for name in names])


def among(own: Encodings, plain: Encodings) -> Encodings:
    """The word's own tokens of ``own`` among all other tokens of ``plain``, in which something else stands for it.

    ``own`` may end anywhere behind the word, and ``plain`` is as long as the result. Other tokens follow one another
    as they do in ``plain``, whose word may have more tokens or fewer: those pushed out at the end are dropped, and a
    prompt that became shorter repeats its last one, which is padding or the end.
    """
    length = plain.word.shape[1]
    word = pad(own.word, (0, length - own.word.shape[1]))
    index = torch.stack([_others(w, p) for w, p in zip(word, plain.word, strict=True)])
    device = plain.context.device
    others = plain.context.gather(1, _over(index.to(device), plain.context))
    ours = pad(own.context.to(others), (0, 0, 0, length - own.context.shape[1]))
    context = torch.where(word.unsqueeze(-1).to(device), ours, others)
    return Encodings(context, word, plain.padding.gather(1, index) & ~word, plain.pooled)


def _others(word: Tensor, plain: Tensor) -> Tensor:
    """For each token (m,) that is not of the word, which token of the plain prompt it is; anything for those that are.

    ``word`` and ``plain`` (m,) bool: where the word's tokens are, and those of what stands for it.
    """
    places = (~plain).nonzero().squeeze(-1)
    order = (~word).cumsum(0) - 1
    return places[order.clamp(0, len(places) - 1)]


def _over(index: Tensor, like: Tensor) -> Tensor:
    """An index (b, m) for each number of encodings (b, n, d): (b, m, d)."""
    return index.unsqueeze(-1).expand(*index.shape, like.shape[-1])


def until_last(word: Tensor) -> int:
    """How many tokens it takes to have all of a word's (b, m) bool; at least one."""
    places = word.any(dim=0).nonzero()
    return int(places[-1]) + 1 if len(places) else 1


def heard(
    learned: Tensor,
    owners: Sequence[Sequence[str]],
    replaced_for: Callable[[str], frozenset[str]],
    encoded: Callable[[frozenset[str]], tuple[Tensor, Tensor]],
) -> Tensor:
    """Prompts with the words of several concepts, each heard by those tokens alone that it is meant for.

    ``learned`` (b, m, d) are their encodings with all words as they were learned, ``owners`` (b, m) whose word each
    token is, "" where nobody's. ``replaced_for`` says for tokens of an owner in place of which words they hear the
    super-category, and ``encoded`` gives the prompts with these in place: encodings (b, n, d), and which of them (b, m)
    each token reads, -1 where it has no counterpart. Such tokens, and all that hear every word, stay as they are.
    """
    words = {word for prompt in owners for word in prompt} - {""}
    known: dict[frozenset[str], Tensor] = {}
    context = learned
    for owner in ("", *sorted(words)):
        replaced = replaced_for(owner) & words
        if not replaced:
            continue
        if replaced not in known:
            other, index = encoded(replaced)
            gathered = other.to(learned).gather(1, _over(index.clamp_min(0).to(learned.device), learned))
            known[replaced] = torch.where((index >= 0).unsqueeze(-1).to(learned.device), gathered, learned)
        theirs = torch.tensor([[word == owner for word in prompt] for prompt in owners])
        context = torch.where(theirs.unsqueeze(-1).to(learned.device), known[replaced], context)
    return context
