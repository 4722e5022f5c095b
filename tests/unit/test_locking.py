"""Key locking: the twin of a prompt, in which super-categories stand in the concepts' place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfusion.locking import twin

LIMIT = 16
END = "end"


def chunk(pieces: list[str | tuple[int, int]]) -> tuple[list[str], list[list[str] | None]]:
    """A padded chunk of tokens: plain words, and concepts (own tokens, super-category's tokens)."""
    tokens: list[str] = ["start"]
    word: list[list[str] | None] = [None]
    for number, piece in enumerate(pieces):
        if isinstance(piece, str):
            tokens.append(f"{piece}{number}")
            word.append(None)
        else:
            own, replacing = piece
            tokens += [f"concept{number}.{k}" for k in range(own)]
            word += [[f"super{number}.{k}" for k in range(replacing)], *([[]] * (own - 1))]
    tokens, word = tokens[: LIMIT - 1], word[: LIMIT - 1]
    padding = LIMIT - len(tokens)
    return tokens + [END] * padding, word + [None] * padding


concepts = st.tuples(st.integers(1, 4), st.integers(1, 4))


@given(st.lists(st.one_of(st.sampled_from(["red", "on"]), concepts), max_size=12))
def test_twins_hold_each_word_in_its_place(pieces: list[str | tuple[int, int]]) -> None:
    tokens, word = chunk(pieces)
    new, index = twin(tokens, word, LIMIT)
    assert len(new) == len(index) == LIMIT
    assert not any("concept" in token for token in new)

    unbounded = [token for m, token in enumerate(tokens) for token in ([token] if word[m] is None else word[m] or [])]
    assert new == [*(unbounded + [END] * LIMIT)[: LIMIT - 1], END]

    for m, n in enumerate(index):
        assert -1 <= n < LIMIT
        if word[m] is None:
            assert n == -1 or new[n] == tokens[m]
        else:  # a concept's token reads one of its own super-category's
            number = tokens[m].removeprefix("concept").split(".")[0]
            assert n == -1 or new[n].startswith(f"super{number}.")
    kept = [n for n in index if n != -1]
    assert kept == sorted(kept)
    if -1 in index:
        assert set(index[index.index(-1) :]) == {-1, LIMIT - 1}, "only what stands before the last can be pushed out"
    if len(unbounded) <= LIMIT:
        assert -1 not in index


@pytest.mark.parametrize("own", [1, 2, 3, 4])
@pytest.mark.parametrize("replacing", [1, 2, 3, 4])
def test_words_are_aligned_at_their_ends(own: int, replacing: int) -> None:
    tokens, word = chunk(["a", (own, replacing), "b"])
    new, index = twin(tokens, word, LIMIT)
    last = new.index(f"super1.{replacing - 1}")
    for back in range(own):
        assert index[1 + own - back] == max(last - back, 2), f"{back} tokens before the last"
    assert new[index[2 + own]] == "b2"


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        pytest.param([(1, 2)], ["start", "super0.0", "super0.1"], id="first"),
        pytest.param([(2, 1), (1, 2)], ["start", "super0.0", "super1.0", "super1.1"], id="neighbours"),
        pytest.param(["a", (3, 1), "b"], ["start", "a0", "super1.0", "b2"], id="shorter"),
        pytest.param([], ["start"], id="none"),
    ],
)
def test_twin_by_example(pieces: list[str | tuple[int, int]], expected: list[str]) -> None:
    new, _ = twin(*chunk(pieces), LIMIT)
    assert new == expected + [END] * (LIMIT - len(expected))


def test_a_full_chunk_pushes_its_end_out() -> None:
    tokens, word = chunk([*["a"] * 13, (1, 3)])
    new, index = twin(tokens, word, LIMIT)
    assert new == [*tokens[:14], "super13.0", END]
    assert index == [*range(14), -1, 15], (
        "the concept, which reads the third token, has no place, and the end keeps its"
    )


def test_a_shrunken_full_chunk_is_filled_with_its_end() -> None:
    tokens, word = chunk([(3, 1), *["a"] * 11])
    new, index = twin(tokens, word, LIMIT)
    assert new == ["start", "super0.0", *tokens[4:15], END, END, END]
    assert index == [0, 1, 1, 1, *range(2, 14)]
