"""Words on a CLIP: teaching its tokenizer a placeholder, encoding prompts, and the twin that global locking needs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from comfy.clip_model import CLIPEncoder
from comfy.conds import CONDCrossAttn
from comfy.patcher_extension import PatcherInjection
from torch import Tensor
from torch.nn.functional import pad

from ...edit import Weighed
from ...hosts.base import Encodings, Word
from ...locking import twin
from ...scope import heard, until_last
from ...stack import ConceptStack, word_number
from ..replacing import replaced_forwards
from .structure import encoder_widths

KEY = "perfusion"
KEY_SHIFT = "perfusion_key_shift"
KEY_WORDS = "perfusion_words"
KEY_WEIGHED = "perfusion_weighed"
KEY_CAPTIONS = "perfusion_captions"


class Companion(CONDCrossAttn):
    """What is told of each token, (1, m, n), on its way with a conditioning, and the encoding it is of."""

    def __init__(self, cond: Tensor, encoding: Tensor | None = None):
        super().__init__(cond)
        self._encoding = encoding

    def belongs_to(self, encoding: Tensor | None) -> bool:
        """Whether this is still the encoding it was made for."""
        own = self._encoding
        if own is None or encoding is own:
            return encoding is not None
        return encoding is not None and encoding.shape == own.shape and torch.equal(encoding.to(own), own)


def unpacked(words: Tensor | None, weighed: Tensor | None) -> tuple[Tensor | None, Weighed | None]:
    """What companions told, (b, m, 1) and (b, m, d + 1), as ``KeyValueEdit.told`` takes it."""
    return (
        None if words is None else words.squeeze(-1),
        None if weighed is None else Weighed(weighed[..., -1], weighed[..., :-1]),
    )


def told_with(conditioning: Mapping[str, Any]) -> tuple[Tensor | None, Weighed | None]:
    """What travels with a conditioning: whose word each token is (1, m), and what prompt weights do to words."""
    conds = conditioning.get("model_conds", {})
    words, weighed = (conds.get(key) for key in (KEY_WORDS, KEY_WEIGHED))
    return unpacked(*(each.cond if isinstance(each, Companion) else None for each in (words, weighed)))


class _WordId(int):
    """A token id that stands where a word was asked for."""


class TaughtTokenizer:
    """A CLIP tokenizer that knows further words; everything else is the original's.

    ``words`` maps a placeholder to what its tokens become: ids, or embedding rows, which the host's encoders take in
    place of ids.
    """

    def __init__(self, original: Any, words: Mapping[str, Sequence[Any]]):
        self._original = original
        self._words = {word.lower(): list(tokens) for word, tokens in words.items()}
        longest_first = sorted(self._words, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})", re.IGNORECASE)
        self._start, self._end = _ends(original)

    def __call__(self, text: str, *args: Any, **kwargs: Any) -> dict[str, list[Any]]:
        pieces = self._pattern.split(text)
        if len(pieces) == 1:
            return self._original(text, *args, **kwargs)
        ids = list(self._start)
        for piece in pieces:
            word = piece.lower()
            if word in self._words:
                ids += self._words[word]
            elif piece.strip():
                ids += _without_ends(self._original, piece)
        return {"input_ids": ids + list(self._end)}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_original":
            raise AttributeError(name)  # a copy is made before there is an original to ask
        return getattr(self._original, name)


def bring_captions(clip: Any, captions: Sequence[str]) -> None:
    """Give a CLIP captions of its own, in place, for ``TextHost.captions``; its clones have them too."""
    clip.patcher.set_attachments(KEY_CAPTIONS, tuple(captions))


def captions_of(clip: Any) -> Sequence[str] | None:
    """The captions that a CLIP was given, None for every other."""
    return clip.patcher.get_attachment(KEY_CAPTIONS)


def ids_of(clip: Any, encoder: str, text: str) -> list[Any]:
    """Token ids of a text, without start and end, by the tokenizer of one encoder."""
    return _without_ends(getattr(clip.tokenizer, encoder).tokenizer, text)


def _ends(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The start and end tokens that a tokenizer puts around every text."""
    empty = tokenizer("")["input_ids"]
    return empty[:1], empty[1:]


def _without_ends(tokenizer: Any, text: str) -> list[Any]:
    start, end = _ends(tokenizer)
    ids = tokenizer(text)["input_ids"]
    return ids[len(start) : len(ids) - len(end)]


def taught(clip: Any, words: Mapping[str, Mapping[str, Sequence[Any]]]) -> Any:
    """A tokenizer that knows ``words``: placeholder -> encoder -> tokens. The CLIP's own is left as it is."""
    tokenizer = copy.copy(clip.tokenizer)
    for encoder in encoder_widths(clip):
        own = copy.copy(getattr(tokenizer, encoder))
        stand_ins = {word: tokens[encoder] for word, tokens in words.items()}
        own.tokenizer = TaughtTokenizer(own.tokenizer, stand_ins)
        setattr(tokenizer, encoder, own)
    return tokenizer


def marked(row: Tensor, placeholder: str, place: int) -> Tensor:
    """An embedding row that remembers which word it belongs to, and its place there."""
    row.perfusion_word = (placeholder, place)  # type: ignore[attr-defined]
    return row


def mark_of(token: Any) -> tuple[str, int]:
    """The placeholder that a token, an id or a row, stands for, "" for none, and its place there."""
    return getattr(token, "perfusion_word", ("", 0))


def first_chunk(tokenizer: Any, prompt: str) -> dict[str, list[Any]]:
    """Encoder key ("l") -> tokens of the first chunk of a prompt, weights left out."""
    tokens = tokenizer.tokenize_with_weights(_escaped(prompt))
    return {key: [entry[0] for entry in chunks[0]] for key, chunks in tokens.items()}


def encode(
    clip: Any, prompts: Sequence[str], word: Word | None = None, *, pooled: bool = False, until_word: bool = False
) -> Encodings:
    """Encode the first chunk of each prompt, in one call of the encoders; see ``TextHost.encode``."""
    widths = encoder_widths(clip)
    tokenizer = clip.tokenizer
    if word is not None:
        stand_ins: dict[str, list[Any]] = {}
        for encoder in widths:
            if word.embeddings is None:
                stand_ins[encoder] = [_WordId(token) for token in ids_of(clip, encoder, word.text)]
            else:
                rows = word.embeddings[encoder].unbind(0)
                stand_ins[encoder] = [marked(row, word.placeholder, k) for k, row in enumerate(rows)]
        tokenizer = taught(clip, {word.placeholder: stand_ins})
    chunks = [first_chunk(tokenizer, prompt) for prompt in prompts]
    keys = list(chunks[0])
    one = keys[0]
    stands = torch.tensor([[_stands_in(token) for token in chunk[one]] for chunk in chunks])
    end = getattr(tokenizer, f"clip_{one}").end_token
    padding = torch.tensor([_behind_end(chunk[one], end) for chunk in chunks])
    weighted = {key: [[(token, 1.0) for token in chunk[key]] for chunk in chunks] for key in keys}
    # The encoders take the chunks of one long prompt as a batch, and lay the encodings one after the other.
    length = until_last(stands) if until_word else stands.shape[1]
    with _shortened(clip, length, stands.shape[1]), _pools_kept(clip) if pooled else nullcontext([]) as pools:
        context = clip.encode_from_tokens(weighted)
    context = context.view(len(chunks), -1, context.shape[-1])[:, :length]
    pool = torch.cat(pools).to(context.device) if pooled else None
    return Encodings(context, stands[:, :length], padding[:, :length], pool)


def _shortened(clip: Any, length: int, whole: int) -> Any:
    """Within the block the encoders compute the first ``length`` of the ``whole`` tokens alone, which do not depend on
    those behind them, and give zeros for all others: the host's embeddings are of one length.
    """

    def first(forward: Callable[..., Any], x: Tensor, mask: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        behind = (0, 0, 0, max(0, x.shape[1] - length))
        mask = None if mask is None else mask[..., :length, :length]
        states = forward(x[:, :length], mask, *args, **kwargs)
        return tuple(None if state is None else pad(state, behind) for state in states)

    if length >= whole:
        return nullcontext()
    encoders = [m for m in clip.cond_stage_model.modules() if isinstance(m, CLIPEncoder)]
    return replaced_forwards({encoder: partial(first, encoder.forward) for encoder in encoders})


@contextmanager
def _pools_kept(clip: Any) -> Iterator[list[Tensor]]:
    """Collects the pooled output of every chunk that is encoded in the block: the host passes on the first one's alone.

    Pooled is what stands last in the context: CLIP-G for SDXL.
    """
    encoder = getattr(clip.cond_stage_model, list(encoder_widths(clip))[-1])
    own, encode, pools = vars(encoder).get("encode"), encoder.encode, []

    def encode_and_keep(tokens: Any) -> Any:
        out = encode(tokens)
        pools.append(out[1])
        return out

    encoder.encode = encode_and_keep
    try:
        yield pools
    finally:
        if own is None:
            del encoder.encode
        else:
            encoder.encode = own


def _stands_in(token: Any) -> bool:
    return isinstance(token, _WordId) or hasattr(token, "perfusion_word")


def _behind_end(tokens: list[Any], end: Any) -> list[bool]:
    ends = [k for k, token in enumerate(tokens) if isinstance(token, int) and token == end and k > 0]
    first = ends[0] if ends else len(tokens)
    return [k > first for k in range(len(tokens))]


def _escaped(prompt: str) -> str:
    """A caption's parentheses are text, not prompt weights."""
    return prompt.replace("(", "\\(").replace(")", "\\)")


class Words:
    """The concepts a CLIP has been taught, as the attachment of its patcher."""

    def __init__(self, stack: ConceptStack):
        self.stack = stack
        self.previous: Callable[..., Any] | None = None
        self.was_own = False

    def on_model_patcher_clone(self) -> Words:
        """Called by the host when it clones a patcher."""
        return Words(self.stack)


def apply_to_clip(clip: Any, stack: ConceptStack) -> Any:
    """A clone of the CLIP that knows the words of these concepts, added to those it was taught before."""
    clone = clip.clone()
    stack = stack.active
    if not len(stack):
        return clone
    before = clip.patcher.get_attachment(KEY)
    together = stack if before is None else before.stack + stack
    clone.tokenizer = taught(
        clip,
        {
            use.concept.placeholder: {
                encoder: [marked(row.clone(), use.concept.placeholder, k) for k, row in enumerate(rows)]
                for encoder, rows in use.concept.embeddings.items()
            }
            for use in stack.uses
        },
    )
    clone.patcher.set_attachments(KEY, Words(together))
    if together.locks_globally or together.tells_words:
        clone.patcher.set_injections(KEY, [_hearing_injection(_super_category_tokens(clip, together))])
    return clone


def _super_category_tokens(clip: Any, stack: ConceptStack) -> dict[str, dict[str, list[int]]]:
    """Encoder key -> placeholder -> token ids of the super-category."""
    return {
        encoder.removeprefix("clip_"): {
            concept.placeholder: ids_of(clip, encoder, concept.super_category) for concept in stack.concepts
        }
        for encoder in encoder_widths(clip)
    }


def _hearing_injection(super_categories: Mapping[str, Mapping[str, list[int]]]) -> PatcherInjection:
    """Makes the text encoder deliver prompts in which each word is heard as far as its scope says and, with each
    conditioning, the shift that globally locked keys read, whose word each token is, and what prompt weights do, where
    these are asked for.
    """

    def inject(patcher: Any) -> None:
        model, words = patcher.model, patcher.get_attachment(KEY)
        if words is None or words.previous is not None:
            return
        words.was_own = "encode_token_weights" in vars(model)
        previous = words.previous = model.encode_token_weights

        def encode_token_weights(tokens: dict[str, Any]) -> Any:
            if words.previous is None:  # ejected, while another extension's wrapper still calls this one
                return previous(tokens)
            out, told = _heard(tokens, words.stack, super_categories, previous)
            companions = {key: Companion(value, out[0]) for key, value in told.items()}
            if not companions:
                return out
            extra = dict(out[2]) if len(out) > 2 else {}
            extra["model_conds"] = {**extra.get("model_conds", {}), **companions}
            return (out[0], out[1], extra)

        encode_token_weights.perfusion_owner = words  # type: ignore[attr-defined]
        model.encode_token_weights = encode_token_weights

    def eject(patcher: Any) -> None:
        words = patcher.get_attachment(KEY)
        if words is None or words.previous is None:
            return
        previous, words.previous = words.previous, None
        current = vars(patcher.model).get("encode_token_weights")
        if getattr(current, "perfusion_owner", None) is not words:
            return
        if words.was_own:
            patcher.model.encode_token_weights = previous
        else:
            del patcher.model.encode_token_weights

    return PatcherInjection(inject=inject, eject=eject)


def _heard(
    tokens: dict[str, list[list[Any]]],
    stack: ConceptStack,
    super_categories: Mapping[str, Mapping[str, list[int]]],
    encode_: Callable[[dict[str, Any]], Any],
) -> tuple[Any, dict[str, Tensor]]:
    """What the text encoder gives for a prompt in which each word is heard as far as its scope says, and what is told
    of its tokens: the shift (1, chunks * m, d) that globally locked keys read, whose word each is (1, chunks * m, 1),
    and ``Weighed`` of words that are looked at more (1, chunks * m, d + 1), the weights behind the rest.

    Where tokens and encodings do not correspond one to one, nothing is told, and words are heard by all behind them.
    """
    hearing = _Hearing(tokens, super_categories, encode_)
    learned = hearing.learned
    of_encoders = [[mark_of(entry[0])[0] for chunk in chunks for entry in chunk] for chunks in tokens.values()]
    owners = of_encoders[0]
    # Encoders may have been given texts of their own, with words at other places.
    if len(owners) != learned[0].shape[1] or any(others != owners for others in of_encoders):
        return learned, {}

    context = hearing.context_for(owners, stack.replaced)
    told: dict[str, Tensor] = {}
    if stack.locks_globally:
        told[KEY_SHIFT] = hearing.context_for(owners, partial(stack.replaced, keys=True)) - context
    if stack.tells_words:
        numbers = [word_number(owner) if owner else 0 for owner in owners]
        told[KEY_WORDS] = torch.tensor(numbers).view(1, -1, 1)
    if stack.focuses:
        weights = _weights(tokens, stack.looked_at)
        without = torch.zeros_like(context)
        if (weights != 1).any():
            plain = _Hearing(_unweighed(tokens, stack.looked_at), super_categories, encode_)
            differing = plain.context_for(owners, stack.replaced) - context
            without = differing * (weights != 1).to(context)
        told[KEY_WEIGHED] = torch.cat([without, weights.to(context)], dim=-1)
    if context is learned[0]:
        return learned, told
    # What belongs to no token, as the pooled output does, is that of other words.
    return (context, *hearing.encoded(stack.replaced("") & set(owners))[0][1:]), told


class _Hearing:
    """One prompt as an encoder gives it, with all words as they were ``learned`` or super-categories in place of some:
    each of them encoded once."""

    def __init__(
        self,
        tokens: dict[str, list[list[Any]]],
        super_categories: Mapping[str, Mapping[str, list[int]]],
        encode_: Callable[[dict[str, Any]], Any],
    ):
        self._tokens, self._super_categories, self._encode = tokens, super_categories, encode_
        self._known: dict[frozenset[str], tuple[Any, Tensor]] = {}
        self.learned = encode_(tokens)

    def encoded(self, replaced: frozenset[str]) -> tuple[Any, Tensor]:
        """All that the encoder gives with super-categories in place of these words, and ``index`` as of ``twin``."""
        if replaced not in self._known:
            twins, index = _twins(self._tokens, self._super_categories, replaced)
            self._known[replaced] = self._encode(twins), torch.tensor([index])
        return self._known[replaced]

    def context_for(self, owners: Sequence[str], replaced_for: Callable[[str], frozenset[str]]) -> Tensor:
        """The encodings (1, m, d) in which each token hears what is said: see ``heard``."""
        return heard(self.learned[0], [owners], replaced_for, self._encodings)

    def _encodings(self, replaced: frozenset[str]) -> tuple[Tensor, Tensor]:
        out, index = self.encoded(replaced)
        return out[0], index


def _is_weighed(entry: Sequence[Any], looked_at: frozenset[str]) -> bool:
    """Whether a token's weight says how much its word is looked at: nothing is 0 times as much, or less."""
    return entry[1] != 1 and entry[1] > 0 and mark_of(entry[0])[0] in looked_at


def _weights(tokens: dict[str, list[list[Any]]], looked_at: frozenset[str]) -> Tensor:
    """The weights of such tokens, 1 for all others and where encoders were given weights of their own: (1, m, 1)."""
    of_encoders = [
        [float(entry[1]) if _is_weighed(entry, looked_at) else 1.0 for chunk in chunks for entry in chunk]
        for chunks in tokens.values()
    ]
    weights = torch.tensor(of_encoders[0]).view(1, -1, 1)
    return weights if all(each == of_encoders[0] for each in of_encoders) else torch.ones_like(weights)


def _unweighed(tokens: dict[str, list[list[Any]]], looked_at: frozenset[str]) -> dict[str, list[list[Any]]]:
    """The tokens without such weights."""

    def changed(entry: tuple[Any, ...]) -> tuple[Any, ...]:
        return (entry[0], 1.0, *entry[2:]) if _is_weighed(entry, looked_at) else entry

    return {key: [[changed(entry) for entry in chunk] for chunk in chunks] for key, chunks in tokens.items()}


def _twins(
    tokens: dict[str, list[list[Any]]],
    super_categories: Mapping[str, Mapping[str, list[int]]],
    replaced: frozenset[str],
) -> tuple[dict[str, list[list[Any]]], list[int]]:
    """A prompt with super-categories in place of some words, and where its own tokens stand there: see ``twin``."""
    twins: dict[str, list[list[Any]]] = {}
    index: list[int] = []
    for key, chunks in tokens.items():
        replacements = {word: ids for word, ids in super_categories.get(key, {}).items() if word in replaced}
        twins[key], index = [], []
        for number, chunk in enumerate(chunks):
            new, places = twin(chunk, [_replacement(entry, replacements) for entry in chunk], len(chunk))
            twins[key].append(new)
            index += [-1 if place < 0 else number * len(chunk) + place for place in places]
    return twins, index


def _replacement(entry: tuple[Any, ...], replacements: Mapping[str, list[int]]) -> list[tuple[Any, ...]] | None:
    """What stands in the twin for a token (id or row, weight, ...): None for itself."""
    placeholder, place = mark_of(entry[0])
    if placeholder not in replacements:
        return None
    return [] if place else [(token, *entry[1:]) for token in replacements[placeholder]]
