"""How far a concept's word is heard: by its own tokens alone, or by all behind it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from perfusion.hosts.base import Encodings, Word
from perfusion.scope import ScopedText, among, heard, until_last
from tests.unit.fake_host import FakeHost

PROMPTS = ["a photo of a <it> on the beach", "<it> and a dog", "a dog"]


def learned(host: FakeHost, vectors: int = 1) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    rows = host.token_embeddings("bear")
    return {name: torch.randn(vectors, r.shape[-1], generator=draw).requires_grad_() for name, r in rows.items()}


@pytest.mark.parametrize("vectors", [1, 2, 3])
@pytest.mark.parametrize("kind", ["bear", "teddy bear", "small red elephant"])
def test_other_words_are_those_of_the_plain_prompt(kind: str, vectors: int) -> None:
    host = FakeHost()
    word, plain = Word("<it>", kind, learned(host, vectors)), Word("<it>", kind)
    found = ScopedText(host, "word")(PROMPTS, word)
    full, without = host.encode(PROMPTS, word), host.encode(PROMPTS, plain)
    assert torch.equal(found.word, full.word)
    assert torch.equal(found.padding[:, :40], full.padding[:, :40])
    assert torch.allclose(found.context[found.word], full.context[full.word], atol=1e-6)
    for k in range(len(PROMPTS)):
        others, expected = found.context[k][~found.word[k]], without.context[k][~without.word[k]]
        count = min(len(others), len(expected))
        assert torch.equal(others[:count], expected[:count])
        assert torch.equal(others[count:], expected[-1:].expand(len(others) - count, -1)), "the last one again"
    heard_by_all = (full.context - found.context).abs().amax(-1)
    assert heard_by_all[0, 6 + vectors :].min() > 1e-4, "in the scope of the paper, all behind it change"


def test_gradients_reach_the_embeddings_through_the_words_own_tokens() -> None:
    host = FakeHost()
    rows = learned(host)
    found = ScopedText(host, "word")(PROMPTS[:1], Word("<it>", "bear", rows))
    weights = torch.randn(found.context.shape, generator=torch.Generator().manual_seed(0))
    (found.context * weights).sum().backward()
    ours = {name: row.grad.clone() for name, row in rows.items() if row.grad is not None}
    for row in rows.values():
        row.grad = None
    full = host.encode(PROMPTS[:1], Word("<it>", "bear", rows))
    (full.context * weights)[full.word].sum().backward()
    assert set(ours) == set(rows)
    for name, row in rows.items():
        assert row.grad is not None and torch.allclose(ours[name], row.grad, atol=1e-5)


class Counting(FakeHost):
    """Notes what it encodes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool]] = []

    def encode(self, prompts: Sequence[str], word: Word | None = None, *, until_word: bool = False) -> Encodings:
        self.seen += [(prompt, until_word) for prompt in prompts]
        return super().encode(prompts, word, until_word=until_word)


def test_what_stays_the_same_is_encoded_once() -> None:
    host = Counting()
    text, word = ScopedText(host, "word", kept=2), Word("<it>", "bear", learned(host))
    first = text(PROMPTS, word)
    host.seen.clear()
    again = text(PROMPTS, word)
    assert [prompt for prompt, until in host.seen if not until] == PROMPTS[2:], "there is room for two"
    assert torch.equal(first.context, again.context)
    host.seen.clear()
    prepared = ScopedText(host, "word", kept=2)
    prepared.prepare(PROMPTS, word)
    assert [prompt for prompt, _ in host.seen] == PROMPTS[:2]
    prepared(PROMPTS[:2], word)
    assert all(until for _, until in host.seen[2:])
    host.seen.clear()
    ScopedText(host, "prompt", kept=2).prepare(PROMPTS, word)
    ScopedText(host, "word").prepare(PROMPTS, word)
    assert not host.seen, "nothing to keep"
    assert torch.equal(
        text(PROMPTS[:1], Word("<it>", "bear")).context, host.encode(PROMPTS[:1], Word("<it>", "bear")).context
    )


def test_the_papers_scope_is_the_hosts_own_encoding() -> None:
    host = FakeHost()
    word = Word("<it>", "bear", learned(host))
    assert torch.equal(ScopedText(host, "prompt")(PROMPTS, word).context, host.encode(PROMPTS, word).context)
    with pytest.raises(ValueError, match="word, prompt"):
        ScopedText(host, "sentence")  # type: ignore[arg-type]


def test_a_word_that_was_cut_off_leaves_the_plain_prompt() -> None:
    host = FakeHost()
    prompt = "a " * 60 + "<it>"
    found = ScopedText(host, "word")([prompt], Word("<it>", "bear", learned(host)))
    assert not found.word.any()
    assert torch.equal(found.context, host.encode([prompt], Word("<it>", "bear")).context)


def test_pooled_is_the_plain_prompts() -> None:
    own = Encodings(torch.ones(1, 2, 3), torch.tensor([[False, True]]), torch.zeros(1, 2, dtype=torch.bool))
    zeros = torch.zeros(1, 4, dtype=torch.bool)
    plain = Encodings(torch.zeros(1, 4, 3), torch.tensor([[False, True, True, False]]), zeros, torch.full((1, 2), 7.0))
    found = among(own, plain)
    assert found.context[0, :, 0].tolist() == [0, 1, 0, 0]
    assert found.pooled is plain.pooled


def test_until_last() -> None:
    mask = torch.zeros(2, 9, dtype=torch.bool)
    assert until_last(mask) == 1
    mask[0, 3] = mask[1, 5] = True
    assert until_last(mask) == 6


def test_each_of_several_words_is_heard_as_it_is_meant() -> None:
    """Encodings that say which words their prompt was made of."""
    owners = [["", "<a>", "", "<b>", ""], ["", "", "", "", ""]]
    full = torch.zeros(2, 5, 1)
    made: list[frozenset[str]] = []

    def encoded(replaced: frozenset[str]) -> tuple[Tensor, Tensor]:
        made.append(replaced)
        value = {"<a>": 1.0, "<b>": 10.0}
        index = torch.arange(5).repeat(2, 1)
        index[0, 4] = -1  # pushed out
        return torch.full((2, 5, 1), sum(value[word] for word in replaced)), index

    both, nobody = frozenset({"<a>", "<b>"}), frozenset[str]()
    found = heard(full, owners, lambda owner: both - {owner}, encoded)
    assert found[0, :, 0].tolist() == [11, 10, 11, 1, 0]
    assert len(made) == len(set(made)) == 3
    assert heard(full, owners, lambda owner: nobody, encoded) is full
    assert heard(full, [["", "<a>", "", "", ""]] * 2, lambda owner: frozenset({"<b>"}), encoded) is full
    assert heard(full, [[""] * 5] * 2, lambda owner: both, encoded) is full
