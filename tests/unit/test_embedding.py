"""Concepts as text inside a workflow."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from perfusion import embedding
from perfusion.concept import Concept, ConceptFileError
from perfusion.edit import Gate
from perfusion.embedding import MAX_CHARACTERS, EmbeddedConceptError, from_text, to_text
from perfusion.stack import ConceptStack, ConceptUse, StackError
from tests.unit.test_concept import SD1, a_concept

PIXEL = "data:image/png;base64,iVBORw0KGgo="


def stack(*words: str, **use: Any) -> ConceptStack:
    words = words or ("<my-teddy>", "<my-cat>")
    return ConceptStack(tuple(ConceptUse(a_concept(placeholder=word, seed=k), **use) for k, word in enumerate(words)))


@given(
    st.floats(-1, 2),
    st.floats(0.01, 1),
    st.floats(0, 2),
    st.sampled_from(["local", "global"]),
    st.integers(1, 3),
    st.sampled_from(["half", "8bit"]),
)
def test_what_comes_back_edits_alike_to_the_last_bit(
    bias: float, temperature: float, strength: float, lock: Any, vectors: int, storage: str
) -> None:
    gate = Gate(bias, temperature, strength)
    concepts = [a_concept(vectors=vectors, placeholder=f"<it-{k}>", seed=k, storage=storage) for k in range(2)]
    before = ConceptStack(tuple(ConceptUse(concept, gate, lock) for concept in concepts))
    after = from_text(to_text(before))
    assert [(use.gate, use.lock) for use in after.uses] == [(gate, lock)] * 2
    assert [concept.digest for concept in after.concepts] == [concept.digest for concept in before.concepts]
    context = torch.randn(1, 9, 6)
    layer, linear = "middle_block.1.transformer_blocks.0", torch.nn.Linear(6, 5, bias=False)
    for path in ("k", "v"):
        one, other = (each.edit().project(layer, path, context, linear) for each in (before, after))  # type: ignore[arg-type]
        assert torch.equal(one, other)


def test_the_text_is_known_at_sight_and_small() -> None:
    concept = a_concept(SD1, thumbnail=PIXEL)
    (line,) = to_text(ConceptStack((ConceptUse(concept),))).splitlines()
    assert line.startswith("perfusion-concept 1 <my-teddy> bias=0.6,temperature=0.15,strength=1.0,lock=local sha256:")
    assert len(line) < 47_000
    assert PIXEL.encode() not in base64.b64decode(line.split()[-1])


def test_equal_concepts_give_equal_text() -> None:
    """The library that writes files puts their metadata in another order each time."""
    assert len({save(a_concept().tensors, a_concept().metadata) for _ in range(9)}) > 1
    assert len({to_text(stack()) for _ in range(9)}) == 1
    shown = ConceptStack(tuple(replace(use, concept=use.concept.with_thumbnail(PIXEL)) for use in stack().uses))
    assert to_text(shown) == to_text(stack())


def test_empty_lines_and_blanks_do_not_matter() -> None:
    text = to_text(stack())
    assert from_text("\n\n  " + text.replace("\n", "  \r\n\n") + "\n").placeholders == ["<my-teddy>", "<my-cat>"]
    assert len(from_text(" \n")) == 0


def changed(part: int, new: str) -> str:
    """The text with one part of its second line replaced."""
    first, second = to_text(stack()).splitlines()
    parts = second.split(" ")
    parts[part] = new
    return f"{first}\n{' '.join(parts)}"


def flipped(text: str, place: int) -> str:
    return text[:place] + ("A" if text[place] != "A" else "B") + text[place + 1 :]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (changed(0, "hello"), "line 2 is no embedded concept.*clear it and run"),
        (changed(1, "4"), "line 2 has format version '4'.*reads 1 to 3. Update"),
        (changed(1, ""), "line 2 has format version"),
        (changed(2, "<my-dog>"), "line 2 is damaged.*Open the original workflow"),
        (changed(3, "bias=0.1,temperature=0.15,strength=1.0,lock=local"), "line 2 is damaged"),
        (changed(4, "sha256:" + "0" * 64), "line 2 is damaged: its content is not what its digest says"),
        (changed(5, "AAAA"), "line 2 is damaged"),
        (changed(5, "no base64!"), "line 2 is damaged"),
        (to_text(stack())[:-40], "line 2 is damaged"),
        (flipped(to_text(stack()), -200), "line 2 is damaged"),
        (to_text(stack()).replace(" sha256", "\nsha256"), "line 1 is damaged"),
        ("{}", "line 1 is no embedded concept"),
        ("x" * (MAX_CHARACTERS + 1), "4,000,001 characters; at most 4,000,000 are read"),
        ("\n".join([to_text(stack("<it>"))] * 17), "17 concepts; at most 16"),
    ],
)
def test_bad_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(EmbeddedConceptError, match=message):
        from_text(text)


def forged(file: bytes, settings: str = "bias=0.6,temperature=0.15,strength=1.0,lock=local", version: int = 1) -> str:
    """A line whose digest is right."""
    head = f"perfusion-concept {version} <my-teddy> {settings}"
    return f"{head} sha256:{embedding._digest(head, file)} {base64.b64encode(file).decode()}"


@pytest.mark.parametrize(
    "settings",
    [
        "bias=nan,temperature=0.15,strength=1.0,lock=local",
        "bias=0.6,temperature=0,strength=1.0,lock=local",
        "bias=0.6,temperature=x,strength=1.0,lock=local",
        "bias=0.6,temperature=0.15,strength=1.0,lock=sideways",
        "bias=0.6,temperature=0.15,strength=1.0,lock=local,start=0.5",
        "bias=0.6",
        "-",
    ],
)
def test_settings_are_checked_too(settings: str) -> None:
    with pytest.raises(EmbeddedConceptError, match="line 1"):
        from_text(forged(a_concept().to_bytes(), settings))


def test_a_right_digest_does_not_make_a_concept() -> None:
    assert from_text(forged(a_concept().to_bytes())).placeholders == ["<my-teddy>"]
    for file, message in (
        (b"PK\x03\x04" + b"\xff" * 100, "pickle"),
        (a_concept().to_bytes()[:-1], "damaged or cut off"),
        (b"\xff" * 64, "not a concept file"),
    ):
        with pytest.raises(ConceptFileError, match=f"the concept in line 1.*{message}"):
            from_text(forged(file))
    other: Concept = a_concept(placeholder="<my-cat>")
    with pytest.raises(EmbeddedConceptError, match="line 1 is damaged"):
        from_text(forged(other.to_bytes()))


def test_one_word_twice_is_refused() -> None:
    text = to_text(stack("<it>"))
    with pytest.raises(StackError, match="share the word <it>"):
        from_text(f"{text}\n{text}")


def test_what_is_too_large_to_embed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "MAX_CHARACTERS", 1000)
    with pytest.raises(EmbeddedConceptError, match="should not carry more than 1,000. Embed fewer"):
        to_text(stack())


def test_a_schedule_and_an_own_lock_go_along_as_version_2() -> None:
    before = stack(start=0.2, end=0.75, lock="global", lock_fixed=True)
    text = to_text(before)
    assert [line.split()[1] for line in text.splitlines()] == ["2", "2"]
    assert [(u.start, u.end, u.lock, u.lock_fixed) for u in from_text(text).uses] == [(0.2, 0.75, "global", True)] * 2
    assert [u.lock for u in from_text(text).locked("local").uses] == ["global", "global"]


def test_a_focus_share_goes_along_as_version_3() -> None:
    text = to_text(stack(gate=Gate(focus_share=0.25), start=0.5))
    assert [line.split()[1] for line in text.splitlines()] == ["3", "3"]
    assert [(u.gate.focus_share, u.start) for u in from_text(text).uses] == [(0.25, 0.5)] * 2
    assert to_text(from_text(text)) == text


@pytest.mark.parametrize("wrong", ["", ",focus_share=nan", ",focus_share=-1", ",focus_share=2.5"])
def test_a_focus_share_of_version_3_is_checked_too(wrong: str) -> None:
    settings = f"bias=0.6,temperature=0.15,strength=1.0,lock=local,start=0.0,end=1.0,lock_fixed=0{wrong}"
    with pytest.raises(EmbeddedConceptError, match="line 1"):
        from_text(forged(a_concept().to_bytes(), settings, version=3))


@pytest.mark.parametrize(
    "wrong", ["start=0.9,end=0.1,lock_fixed=0", "start=nan,end=1,lock_fixed=0", "start=0,end=1", ""]
)
def test_settings_of_version_2_are_checked_too(wrong: str) -> None:
    text = forged(a_concept().to_bytes(), f"bias=0.6,temperature=0.15,strength=1.0,lock=local,{wrong}", version=2)
    with pytest.raises(EmbeddedConceptError, match="line 1"):
        from_text(text)


def test_a_region_cannot_travel_as_text() -> None:
    with pytest.raises(EmbeddedConceptError, match="region of <my-teddy>.*behind Embed Concept"):
        to_text(stack(region=torch.ones(4, 4)))
