"""What is told of a prompt's gates, on encodings whose r is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perfusion.concept import Concept
from perfusion.edit import Gate, presence
from perfusion.inspection import (
    EncodedPrompt,
    Inspection,
    Token,
    bias_that_opens,
    bias_that_shuts,
    inspect,
)
from perfusion.stack import ConceptStack, ConceptUse
from tests.unit.test_stack import a_concept

BEAR, CAT = "<my-bear>", "<my-cat>"
START, END = Token("", "start"), Token("", "end")


def concept(word: str, axis: int, **changes: Any) -> Concept:
    """One whose r in an encoding is the number at ``axis``."""
    unit = torch.nn.functional.one_hot(torch.tensor(axis), 24).float()
    return a_concept(word, axis, **{"i_star": unit, "d_star": unit, **changes})


def use(word: str = BEAR, axis: int = 0, gate: Gate | None = None, **changes: Any) -> ConceptUse:
    return ConceptUse(concept(word, axis, **changes), gate or Gate())


def own(word: str = BEAR) -> Token:
    return Token(word, placeholder=word)


def encoded(*tokens: tuple[Token, dict[int, float]]) -> EncodedPrompt:
    """Tokens and their r, by axis; 0 for the others."""
    context = torch.zeros(1, len(tokens), 24)
    for m, (_, values) in enumerate(tokens):
        for axis, r in values.items():
            context[0, m, axis] = r
    return EncodedPrompt(tuple(token for token, _ in tokens), context)


def inspected(*tokens: tuple[Token, dict[int, float]], uses: Any = None, prompt: str = "a <my-bear>") -> Inspection:
    """An inspection of a stack, one bear by default; any other prompt is read as the same."""
    prepared = encoded((START, {}), *tokens, (END, {}), (END, {}))
    return inspect(ConceptStack(tuple(uses or [use()])), prompt, lambda _: prepared)


def advice(found: Inspection, j: int = 0) -> str:
    return " ".join(found.concepts[j].advice)


def test_r_and_gates_are_those_of_the_edit() -> None:
    stack = ConceptStack(
        (
            ConceptUse(a_concept("<one>", 1, form="paper"), Gate(0.6, 0.15)),
            ConceptUse(a_concept("<two>", 2, form="preserving"), Gate(0.3, 0.1)),
        )
    )
    context = 3 * torch.randn(1, 12, 24)
    tokens = tuple(Token(f"w{m}") for m in range(12))
    found = inspect(stack, "", lambda _: EncodedPrompt(tokens, context))
    r, gates = stack.edit().directions.gates(context)
    assert torch.equal(found.r, r[0]) and torch.equal(found.gates, gates[0])
    i_star, d_star = (torch.stack([getattr(c, name) for c in stack.concepts]) for name in ("i_star", "d_star"))
    assert torch.allclose(found.r, presence(context, i_star, d_star)[0], atol=1e-5)
    assert gates.min() == 0 and gates.max() > 0.9


def test_a_concept_that_appears_and_touches_nothing_else() -> None:
    found = inspected((Token("a"), {}), (own(), {0: 1.0}))
    (report,) = found.concepts
    assert (report.state, report.affected, report.answers, report.advice) == ("appears", (), (), ())
    assert report.r == 1.0 and report.gate == pytest.approx(1 / (1 + math.exp(-0.4 / 0.15)))
    assert "<my-bear> (bear) appears: its gate opens to 0.94 on its word (r 1.00)" in found.text()


def test_a_shut_gate_and_the_bias_that_opens_it() -> None:
    found = inspected((own(), {0: 0.45}), (Token("moon"), {0: 0.1}))
    (report,) = found.concepts
    assert report.state == "shut" and report.gate < 0.5
    assert advice(found) == "Lower the bias of <my-bear> to 0.28: its gate opens to 0.76."
    mended = inspected((own(), {0: 0.45}), (Token("moon"), {0: 0.1}), uses=[use(gate=Gate(bias=0.28))])
    assert mended.concepts[0].state == "appears"
    assert mended.concepts[0].gate == pytest.approx(0.7564, abs=1e-3)


def test_the_price_of_a_lower_bias_is_told() -> None:
    assert "and to 0.65 on other words" in advice(inspected((own(), {0: 0.45}), (Token("toy"), {0: 0.37})))


def test_a_word_that_is_heard_by_itself_costs_others_nothing() -> None:
    scoped = [use(scope="word")]
    told = inspected((own(), {0: 0.45}), (Token("toy"), {0: 0.6}), uses=scoped)
    assert "Lower the bias of <my-bear>" in advice(told) and "other words" not in advice(told)
    assert not told.concepts[0].affected
    assert inspected((own(), {0: 0.45}), (Token("toy"), {0: 0.6})).concepts[0].affected


def test_a_place_where_the_gate_opens_is_recommended() -> None:
    here = encoded((START, {}), (Token("toy"), {0: 0.5}), (own(), {0: 0.2}), (END, {}))
    there = encoded((START, {}), (own(), {0: 1.0}), (END, {}))
    found = inspect(ConceptStack((use(),)), "here", lambda text: here if text == "here" else there)
    assert "Move <my-bear> to the front of the prompt" in advice(found)
    assert "'a photo of a <my-bear>' its gate opens to 0.94" in advice(found)


@pytest.mark.parametrize(
    ("estimator", "r", "message"),
    [
        ("paper", 0.1, "with the estimator 'robust'"),
        ("robust", 0.1, "other words hold more of it than its own"),
        ("robust", -2.0, "No bias opens the gate of <my-bear>: train it again"),
    ],
)
def test_a_gate_that_stays_shut_everywhere(estimator: str, r: float, message: str) -> None:
    found = inspected((Token("toy"), {0: 0.5}), (own(), {0: r}), uses=[use(estimator=estimator)])
    assert found.concepts[0].state == "shut"
    assert message in advice(found)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a photo of my-bear", "The prompt says 'my-bear' without its angle brackets: write <my-bear>."),
        ("a bear on the moon", "Write <my-bear> in place of 'bear'."),
        ("the moon", "Write <my-bear> where it would say 'bear'."),
    ],
)
def test_a_missing_word(prompt: str, message: str) -> None:
    found = inspected((Token("moon"), {}), prompt=prompt)
    assert found.concepts[0].state == "missing" and math.isnan(found.concepts[0].gate)
    assert advice(found) == message


def test_a_concept_that_is_off() -> None:
    found = inspected((own(), {0: 1.0}), (Token("toy"), {0: 0.9}), uses=[use(gate=Gate(strength=0))])
    (report,) = found.concepts
    assert (report.state, report.affected) == ("off", ())
    assert "is off: its strength is 0" in found.text()
    assert float(found.gates[1, 0]) > 0.9, "what it would do is shown"


def test_affected_words_are_put_together_from_their_pieces_and_sorted() -> None:
    pieces = [(Token("ted", ends_word=False), {0: 0.5}), (Token("dy"), {0: 0.7}), (Token("toy"), {0: 0.9})]
    found = inspected((own(), {0: 1.2}), *pieces, (Token("toy"), {0: 0.6}), (Token("moon"), {0: 0.3}))
    (report,) = found.concepts
    assert [entry.text for entry in report.affected] == ["toy", "teddy"]
    assert report.affected[1].gate == pytest.approx(float(found.gates[3, 0]))
    assert "Raise the bias of <my-bear> to 1.07: other words then stay below 0.25, and 0.70 remains" in advice(found)


def test_the_start_and_the_padding_count() -> None:
    found = inspect(
        ConceptStack((use(),)),
        "",
        lambda _: encoded((START, {0: 0.8}), (own(), {0: 1.0}), (END, {}), (END, {0: 0.7}), (END, {0: 0.1})),
    )
    assert [entry.text for entry in found.concepts[0].affected] == ["the start of the prompt", "the end of the prompt"]
    assert found.tokens == (START, own(), END)
    assert found.r[:, 0].tolist() == pytest.approx([0.8, 1.0, 0.7])


def test_of_two_concepts_the_one_whose_word_it_is_answers() -> None:
    """By itself the cat's gate would open on the bear's word."""
    uses = [use(), use(CAT, 1)]
    found = inspected((own(), {0: 1.0, 1: 1.2}), (own(CAT), {0: 0.6, 1: 1.0}), uses=uses)
    assert [(report.state, report.answers) for report in found.concepts] == [("appears", ())] * 2
    alone = inspected((own(), {0: 1.0, 1: 0.7}), uses=[use(CAT, 1)])
    assert [entry.text for entry in alone.concepts[0].answers] == [BEAR]


def test_concepts_too_alike_to_be_combined_are_measured_one_by_one() -> None:
    uses = [use(), use(CAT, 0)]
    found = inspected((own(), {0: 1.0}), (own(CAT), {0: 0.9}), uses=uses)
    assert "Apply Concepts will refuse these concepts: <my-bear> and <my-cat> are too alike" in found.notes[0]
    assert torch.equal(found.gates[:, 0], found.gates[:, 1])


@given(st.floats(-0.5, 1.5), st.floats(-1, 2), st.floats(0.05, 0.5), st.sampled_from(["paper", "preserving"]))
def test_the_biases_that_are_named_do_what_is_said(r: float, bias: float, temperature: float, form: str) -> None:
    one = use(gate=Gate(bias, temperature), form=form)

    def gate_with(other: float) -> float:
        found = inspected((own(), {0: r}), uses=[use(gate=Gate(other, temperature), form=form)])
        return float(found.gates[1, 0])

    opens, shuts = bias_that_opens(one, r), bias_that_shuts(one, r, 0.25)
    if opens is not None:
        assert opens <= bias and gate_with(opens) >= 0.75 - 1e-4
        assert opens + 0.01 > bias or gate_with(opens + 0.01) < 0.75 + 1e-4
    if shuts is not None:
        assert shuts >= bias and gate_with(shuts) < 0.25 + 1e-4
        assert shuts - 0.01 < bias or gate_with(shuts - 0.01) >= 0.25 - 1e-4


def test_prompts_without_concepts_or_words() -> None:
    found = inspect(ConceptStack(), "", lambda _: encoded((START, {}), (END, {})))
    assert found.text().startswith("There is no concept")
    assert found.gates.shape == (2, 0)


def test_the_table_names_weights_and_chunks() -> None:
    tokens = (START, Token("moon", weight=1.2), own(), END, Token("", "start", chunk=1), Token("", "end", chunk=1))
    text = inspect(
        ConceptStack((use(),)), "", lambda _: encoded(*((t, {0: 1.0 if t.placeholder else 0.0}) for t in tokens))
    ).text()
    rows = {line.split("  ")[0]: line for line in text.splitlines()}
    assert rows[BEAR].endswith("1.00   0.94*")
    assert {"[start]", "moon x1.2", "[end]", "[start 2]", "[end 2]"} <= set(rows)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="threshold; it is 0"):
        inspect(ConceptStack(), "", lambda _: encoded((START, {})), threshold=0)
    with pytest.raises(ValueError, match="does not follow its tokens"):
        EncodedPrompt((START,), torch.zeros(1, 2, 24))
