"""Prompts as a CLIP sees them, token by token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...inspection import EncodedPrompt, Token
from ...stack import ConceptStack, StackError
from .structure import encoder_widths
from .text import KEY, apply_to_clip, mark_of, told_with

_END_OF_WORD = "</w>"
_INCOMPLETE = "\ufffd"  # what decoders put where a letter is not complete


def in_force(clip: Any, stack: ConceptStack) -> tuple[ConceptStack, Any]:
    """All concepts of a CLIP and a stack, and a CLIP that knows their words.

    Those are the concepts that the CLIP was taught by Apply Concepts, and those of the stack that it does not know yet.
    The CLIP itself is left as it is. Raises StackError for a concept of another family, and where the stack and the
    CLIP have different concepts under one word; UnsupportedModelError for a CLIP without CLIP text encoders.
    """
    taught = clip.patcher.get_attachment(KEY)
    known = {use.concept.placeholder: use for use in (taught.stack.uses if taught is not None else ())}
    encoders = encoder_widths(clip)
    new = []
    for use in stack.uses:
        concept = use.concept
        if dict(concept.family.encoders) != encoders:
            raise StackError(
                f"{concept.placeholder} was trained for {concept.family.title}, and this CLIP is of another family. "
                "Connect the CLIP of a checkpoint of the concept's family."
            )
        if concept.placeholder not in known:
            new.append(use)
        elif known[concept.placeholder].concept.digest != concept.digest:
            raise StackError(
                f"the CLIP was taught another concept under the word {concept.placeholder}. Connect the CLIP as it was "
                "before Apply Concepts, or leave the input 'concepts' empty."
            )
    return ConceptStack((*known.values(), *new)), apply_to_clip(clip, ConceptStack(tuple(new)))


def read(clip: Any, text: str) -> EncodedPrompt:
    """The tokens and encodings of a prompt, all chunks of it, with its weights."""
    chunks = clip.tokenize(text)
    encoder = next(iter(chunks))
    tokenizer = getattr(clip.tokenizer, f"clip_{encoder}")
    tokens = [token for number, chunk in enumerate(chunks[encoder]) for token in _tokens(tokenizer, chunk, number)]
    encoded = clip.encode_from_tokens(chunks, return_dict=True)
    return EncodedPrompt(tuple(tokens), encoded["cond"], told_with(encoded)[1])


def _tokens(tokenizer: Any, chunk: list[Any], number: int) -> list[Token]:
    """The tokens of one chunk, whose entries are ids or embedding rows with their weights."""
    ids = [entry[0] for entry in chunk]
    ends = [m for m, token in enumerate(ids) if isinstance(token, int) and token == tokenizer.end_token and m > 0]
    end = ends[0] if ends else len(ids)
    texts = _Pieces(tokenizer)
    found = []
    for m, (token, weight, *_) in enumerate(chunk):
        placeholder, _ = mark_of(token)
        if m == 0 or m >= end:
            found.append(Token("", "start" if m == 0 else "end", chunk=number))
        elif placeholder:
            found.append(Token(placeholder, placeholder=placeholder, weight=weight, chunk=number))
        elif isinstance(token, Tensor):
            found.append(Token("embedding", weight=weight, chunk=number))
        else:
            text, ends_word = texts.next(token)
            found.append(Token(text, ends_word=ends_word, weight=weight, chunk=number))
    return found


class _Pieces:
    """The texts of tokens, one after the other: a token may hold but a part of a letter, which the next completes."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._told = ""

    def next(self, token: int) -> tuple[str, bool]:
        """The text that this token adds to its word, and whether the word ends with it."""
        self._ids.append(token)
        whole = self._tokenizer.tokenizer.decode(self._ids).strip().rstrip(_INCOMPLETE)
        text = "".join(c for c in whole[len(self._told) :] if c.isprintable())
        self._told = whole
        ends_word = str(self._tokenizer.inv_vocab.get(token, "")).endswith(_END_OF_WORD)
        if ends_word:
            self._ids, self._told = [], ""
        return text, ends_word
