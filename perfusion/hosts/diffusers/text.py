"""Prompts with words in them: tokens, encodings, and the shift that global key locking needs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from diffusers.utils.constants import USE_PEFT_BACKEND
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor

from ...edit import Weighed
from ...locking import twin
from ...scope import heard, until_last
from ...stack import ConceptStack, word_number
from ..base import Encodings, Word
from ..replacing import replaced
from .structure import encoder_name, family_of, require_fit


class Token(NamedTuple):
    """A token id; or, with ``row`` from 0 on, the place of an embedding row. ``word`` and ``place`` say which
    placeholder it stands for, and where in it; ``weight`` how much it counts in its prompt."""

    id: int
    word: str = ""
    place: int = 0
    row: int = -1
    weight: float = 1.0


class ClipText:
    """A CLIP text encoder and its tokenizer."""

    def __init__(self, text_encoder: Any, tokenizer: Any):
        self._encoder = text_encoder
        self._tokenizer = tokenizer
        self.name = encoder_name(self._table.weight.shape[-1])
        self.length = int(text_encoder.config.max_position_embeddings)
        self._start, self._end = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
        padding = tokenizer.pad_token_id
        self._padding = self._end if padding is None else int(padding)

    @property
    def table(self) -> Tensor:
        """The embedding table (vocabulary, width)."""
        return self._table.weight

    @property
    def _table(self) -> Any:
        return self._encoder.get_input_embeddings()

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, without start and end: as many as the encoder could see."""
        settings = {"add_special_tokens": False, "truncation": True, "max_length": self.length}
        return list(self._tokenizer(text, **settings)["input_ids"])

    def tokens(self, prompt: str, words: Mapping[str, Sequence[Token]], *, weighted: bool = False) -> list[Token]:
        """The tokens of a prompt as the encoder takes them: start, the first that fit, end and padding: ``length``.

        ``words`` maps placeholders, in lower case, to what stands in their place. ``weighted``: ``(text:1.2)`` says how
        much a part of the prompt counts, as in ComfyUI.
        """
        tokens: list[Token] = []
        for part, weight in weighted_parts(prompt) if weighted else [(prompt, 1.0)]:
            for piece in _split(part, words):
                if piece.lower() in words:
                    tokens += [token._replace(weight=weight) for token in words[piece.lower()]]
                elif piece.strip():
                    tokens += [Token(id_, weight=weight) for id_ in self.ids(piece)]
        tokens = [Token(self._start), *tokens[: self.length - 2], Token(self._end)]
        return tokens + [Token(self._padding)] * (self.length - len(tokens))

    def padding(self, tokens: Sequence[Token]) -> list[bool]:
        """Which tokens stand behind the first end token."""
        ends = [m for m, token in enumerate(tokens) if m > 0 and token.row < 0 and token.id == self._end]
        first = ends[0] if ends else len(tokens)
        return [m > first for m in range(len(tokens))]

    def encode(
        self, prompts: Sequence[Sequence[Token]], rows: Tensor | None = None, clip_skip: int | None = None
    ) -> Tensor:
        """Encodings (b, m, d) of prompts as ``tokens`` makes them, differentiable with respect to ``rows`` (n, d).

        ``clip_skip`` is how many of the last layers are left out, as diffusers counts them.
        """
        device = self.table.device if self.table.device.type != "meta" else torch.device("cpu")
        ids = torch.tensor([[token.id for token in tokens] for tokens in prompts], device=device)
        index = torch.tensor([[token.row for token in tokens] for tokens in prompts])
        embed = self._table.forward

        def embed_with_rows(input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            embedded = embed(input_ids, *args, **kwargs)
            if rows is None:
                return embedded
            where = index.to(embedded.device)
            own = rows.to(embedded)[where.clamp_min(0)]
            return torch.where((where >= 0).unsqueeze(-1), own, embedded)

        # The encoder itself takes ids alone; the mask, positions and norm stay its own.
        with replaced(self._table, "forward", embed_with_rows):
            if clip_skip is None:
                return self._encoder(ids).last_hidden_state
            states = self._encoder(ids, output_hidden_states=True).hidden_states
        return getattr(self._encoder, "text_model", self._encoder).final_layer_norm(states[-(clip_skip + 1)])

    def encode_word(self, prompts: Sequence[str], word: Word | None = None, *, until_word: bool = False) -> Encodings:
        """See ``TextHost.encode``."""
        words: dict[str, list[Token]] = {}
        rows = None
        if word is not None and word.embeddings is not None:
            rows = word.embeddings[self.name]
            words[word.placeholder] = self._row_tokens(word.placeholder, len(rows), 0)
        elif word is not None:
            words[word.placeholder] = [Token(id_, word.placeholder, k) for k, id_ in enumerate(self.ids(word.text))]
        tokens = [self.tokens(prompt, words) for prompt in prompts]
        padding = [self.padding(prompt) for prompt in tokens]
        own = torch.tensor([[bool(token.word) for token in prompt] for prompt in tokens])
        length = until_last(own) if until_word else self.length
        return Encodings(
            self.encode([prompt[:length] for prompt in tokens], rows).float(),
            own[:, :length],
            torch.tensor(padding)[:, :length],
        )

    def encode_stack(
        self, prompts: Sequence[str], stack: ConceptStack, clip_skip: int | None = None, *, weighted: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Prompts with the words of these concepts, each heard as its scope says: ``context`` (b, m, d), and the shift
        of global key locking.

        The shift (b, m, d) is the encoding with super-categories in place minus the encoding: zero for prompts without
        such words, None where no concept's keys are locked globally. ``weighted``: see ``tokens``; what a token's
        encoding differs by from that of an empty prompt is multiplied by its weight, as ComfyUI does.
        """
        return self._heard(self._stack_tokens(prompts, stack, weighted=weighted), stack, clip_skip)

    def _heard(
        self, tokens: Sequence[Sequence[Token]], stack: ConceptStack, clip_skip: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        rows = [concept.embeddings[self.name] for concept in stack.concepts]
        stacked = torch.cat(rows) if rows else None
        super_categories = {c.placeholder: [Token(id_) for id_ in self.ids(c.super_category)] for c in stack.concepts}
        owners = [[token.word for token in prompt] for prompt in tokens]

        @cache
        def encoded(replaced_words: frozenset[str]) -> tuple[Tensor, Tensor]:
            replacements = {word: super_categories[word] for word in replaced_words}
            twins, index = zip(*(_twin(prompt, replacements, self.length) for prompt in tokens), strict=True)
            return self._weighed(twins, stacked, clip_skip), torch.tensor(index)

        plain = self._weighed(tokens, stacked, clip_skip)
        context = heard(plain, owners, stack.replaced, encoded)
        if not stack.locks_globally:
            return context, None
        return context, heard(plain, owners, partial(stack.replaced, keys=True), encoded) - context

    def _weighed(self, prompts: Sequence[Sequence[Token]], rows: Tensor | None, clip_skip: int | None) -> Tensor:
        """Encodings (b, m, d) in which each token counts as much as its weight says."""
        context = self.encode(prompts, rows, clip_skip)
        if all(token.weight == 1 for tokens in prompts for token in tokens):
            return context
        weights = torch.tensor([[token.weight for token in tokens] for tokens in prompts]).unsqueeze(-1).to(context)
        empty = self.encode([self.tokens("", {})], None, clip_skip)
        return torch.where(weights == 1, context, empty + weights * (context - empty))

    def words(self, prompts: Sequence[str], stack: ConceptStack, *, weighted: bool = False) -> Tensor:
        """Whose word each token of prompts is, by its number, 0 for nobody's: (b, m); see ``KeyValueEdit``."""
        numbers = {placeholder: word_number(placeholder) for placeholder in stack.placeholders}
        tokens = self._stack_tokens(prompts, stack, weighted=weighted)
        return torch.tensor([[numbers.get(token.word, 0) for token in prompt] for prompt in tokens])

    def weighed(self, prompts: Sequence[str], stack: ConceptStack, context: Tensor) -> Weighed | None:
        """What prompt weights do to words that are looked at more: see ``KeyValueEdit``. None where they have none.

        ``context`` (b, m, d) is what ``encode_stack`` gives for these prompts with their weights.
        """
        tokens = self._stack_tokens(prompts, stack, weighted=True)
        looked_at = stack.looked_at
        told = torch.tensor([[token.word in looked_at and token.weight > 0 for token in prompt] for prompt in tokens])
        weights = torch.tensor([[token.weight for token in prompt] for prompt in tokens]).where(told, torch.tensor(1.0))
        changed = weights != 1
        if not changed.any():
            return None
        plain = [
            [token._replace(weight=1.0) if own else token for token, own in zip(prompt, row, strict=True)]
            for prompt, row in zip(tokens, changed.tolist(), strict=True)
        ]
        differing = self._heard(plain, stack)[0] - context
        return Weighed(weights, differing * changed.unsqueeze(-1).to(context))

    def _stack_tokens(
        self, prompts: Sequence[str], stack: ConceptStack, *, weighted: bool = False
    ) -> list[list[Token]]:
        """The tokens of prompts, with rows of embeddings where words of the concepts stand."""
        words: dict[str, list[Token]] = {}
        first = 0
        for concept in stack.concepts:
            count = len(concept.embeddings[self.name])
            words[concept.placeholder] = self._row_tokens(concept.placeholder, count, first)
            first += count
        return [self.tokens(prompt, words, weighted=weighted) for prompt in prompts]

    def _row_tokens(self, placeholder: str, count: int, first: int) -> list[Token]:
        # The id beneath a row is looked up too: any that the table has.
        return [Token(self._padding, placeholder, k, first + k) for k in range(count)]

    @contextmanager
    def lora_scaled(self, scale: float | None) -> Iterator[None]:
        """The encoder's low-rank adapters at another strength for the time of the block."""
        if scale is None or not USE_PEFT_BACKEND:
            yield
            return
        scale_lora_layers(self._encoder, scale)
        try:
            yield
        finally:
            unscale_lora_layers(self._encoder, scale)


def encode_prompts(
    pipeline: Any, prompts: Sequence[str], stack: ConceptStack, clip_skip: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Encode prompts with the words of these concepts by a pipeline, or a host: see ``ClipText.encode_stack``.

    Raises UnsupportedPipelineError for other pipelines, StackError for a concept of another family.
    """
    require_fit(family_of(pipeline), stack)
    return ClipText(pipeline.text_encoder, pipeline.tokenizer).encode_stack(prompts, stack, clip_skip)


def contains_word(prompts: Sequence[str], stack: ConceptStack) -> bool:
    """Whether the word of any concept stands in any of the prompts."""
    return any(word in prompt.lower() for prompt in prompts for word in stack.placeholders)


def weighted_parts(prompt: str) -> list[tuple[str, float]]:
    """A prompt in parts with their weights: ``(text:1.2)`` has the weight that it says, all else has 1."""
    parts = re.split(r"\(([^()]*):\s*(\d*\.?\d+)\s*\)", prompt)
    weights = [1.0, *map(float, parts[2::3])]
    plain, named = parts[0::3], ["", *parts[1::3]]
    pairs = zip(named, weights, plain, strict=True)
    return [part for text, weight, behind in pairs for part in ((text, weight), (behind, 1.0)) if part[0]]


def _split(prompt: str, words: Mapping[str, Any]) -> list[str]:
    """A prompt in pieces, each a placeholder or what stands between."""
    if not words:
        return [prompt]
    longest_first = sorted(words, key=len, reverse=True)
    return re.split(f"({'|'.join(map(re.escape, longest_first))})", prompt, flags=re.IGNORECASE)


def _twin(
    prompt: Sequence[Token], replacements: Mapping[str, list[Token]], limit: int
) -> tuple[list[Token], list[int]]:
    """A prompt with other tokens for some words, and where its own stand there: see ``twin``."""

    def replacement(token: Token) -> list[Token] | None:
        if token.word not in replacements:
            return None
        return [] if token.place else [each._replace(weight=token.weight) for each in replacements[token.word]]

    return twin(prompt, [replacement(token) for token in prompt], limit)
