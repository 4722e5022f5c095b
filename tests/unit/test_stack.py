"""Concepts in use together, and the families they fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perfusion.concept import Concept
from perfusion.edit import Gate, ParallelConceptsError
from perfusion.family import Family, name_of
from perfusion.stack import MAX_CONCEPTS, ConceptStack, ConceptUse, StackError, word_number

FAMILY = Family("small", 24, {"clip_l": 24}, {"input_blocks.1.1": (2, 3), "middle_block.1": (1, 5)})


def a_concept(placeholder: str, seed: int = 0, **changes: Any) -> Concept:
    draw = torch.Generator().manual_seed(seed)
    i_star = torch.randn(24, generator=draw)
    fields = {
        "family": FAMILY,
        "placeholder": placeholder,
        "super_category": "bear",
        "embeddings": {"clip_l": torch.randn(1, 24, generator=draw)},
        "i_star": i_star,
        "d_star": i_star / i_star.abs().max(),
        "e_super": torch.randn(24, generator=draw),
        "o_star_v": {layer: torch.randn(width, generator=draw) for layer, width in FAMILY.layers.items()},
    }
    return Concept.rounded(**{**fields, **changes})


def stack_of(count: int, **use: Any) -> ConceptStack:
    return ConceptStack(tuple(ConceptUse(a_concept(f"<it-{k}>", k), **use) for k in range(count)))


def test_stacks_add_up_in_order() -> None:
    stack = stack_of(2) + ConceptStack((ConceptUse(a_concept("<other>", 9)),))
    assert len(stack) == 3
    assert stack.placeholders == ["<it-0>", "<it-1>", "<other>"]
    assert [concept.placeholder for concept in stack.concepts] == stack.placeholders
    assert len(ConceptStack()) == 0


def test_which_words_are_heard_as_their_super_category() -> None:
    alone, loud, locked = (
        ConceptUse(a_concept("<alone>", 0, scope="word")),
        ConceptUse(a_concept("<loud>", 1)),
        ConceptUse(a_concept("<locked>", 2), lock="global"),
    )
    stack = ConceptStack((alone, loud, locked))
    assert stack.replaced("") == stack.replaced("<loud>") == {"<alone>"}
    assert stack.replaced("<alone>") == frozenset()
    assert stack.replaced("", keys=True) == {"<alone>", "<locked>"}
    assert stack.replaced("<alone>", keys=True) == {"<locked>"}
    assert stack.rescopes and stack.locks_globally and stack.tells_words
    assert ConceptStack((alone,)).tells_words and not ConceptStack((loud,)).tells_words
    assert not ConceptStack((loud,)).rescopes and not ConceptStack((alone, loud)).locks_globally


def test_one_word_for_two_concepts_is_refused() -> None:
    for word in ("<it-1>", "<IT-1>"):
        with pytest.raises(StackError, match="share the word <it-1>"):
            _ = stack_of(2) + ConceptStack((ConceptUse(a_concept(word, 9)),))


def test_too_many_concepts_are_refused() -> None:
    assert len(stack_of(MAX_CONCEPTS)) == 16
    with pytest.raises(StackError, match="17 concepts at once; at most 16"):
        stack_of(MAX_CONCEPTS + 1)


def test_an_unknown_key_lock_is_refused() -> None:
    with pytest.raises(ValueError, match="local, global, not 'sideways'"):
        stack_of(1, lock="sideways")
    with pytest.raises(ValueError, match="key lock"):
        stack_of(1).locked("")  # type: ignore[arg-type]


def test_locks_are_changed_in_a_copy() -> None:
    stack = stack_of(2)
    assert [use.lock for use in stack.locked("global").uses] == ["global", "global"]
    assert [use.lock for use in stack.uses] == ["local", "local"]
    assert stack.locked("global").edit().key_lock.locks == ("global", "global")


@pytest.mark.parametrize("path", ["k", "v"])
def test_strength_0_is_as_good_as_absent(path: Any) -> None:
    uses = list(stack_of(3).uses)
    uses[1] = replace(uses[1], gate=Gate(strength=0))
    stack = ConceptStack(tuple(uses))
    assert stack.active.placeholders == ["<it-0>", "<it-2>"]
    context = torch.cat([torch.randn(1, 70, 24), uses[1].concept.i_star.expand(1, 7, 24)], dim=1)
    layer, weight = "middle_block.1.transformer_blocks.0", torch.randn(5, 24)

    def project(used: ConceptStack) -> torch.Tensor:
        return used.edit().project(layer, path, context, lambda x: x @ weight.T)

    assert torch.equal(project(stack.active), project(ConceptStack((uses[0], uses[2]))))
    assert not torch.allclose(project(stack), project(stack.active)), "in the paper's form it still subtracts"


def test_an_edit_carries_each_concepts_own_settings() -> None:
    gates = [Gate(0.5, 0.2, 0.9), Gate(0.7, 0.1, 1.2)]
    concepts = [a_concept("<a>", 1, form="preserving"), a_concept("<b>", 2)]
    stack = ConceptStack((ConceptUse(concepts[0], gates[0], "global"), ConceptUse(concepts[1], gates[1], "local")))
    edit = stack.edit()
    assert edit.key_lock.locks == ("global", "local")
    assert edit.directions.preserving.tolist() == [True, False]
    for name in ("bias", "temperature", "strength"):
        assert getattr(edit.directions, name).tolist() == pytest.approx([getattr(g, name) for g in gates])
    for layer, values in edit.o_star_v.items():
        assert torch.equal(values, torch.stack([c.o_star_v[layer] for c in concepts]))


def test_each_concept_has_the_key_that_it_learned_or_its_super_categorys() -> None:
    locked, own = a_concept("<a>", 1), a_concept("<b>", 2)
    own = replace(own, e_key=own.e_super + 1)
    layer = next(iter(own.o_star_v))
    weight = torch.randn(own.o_star_v[layer].shape[0], 24)
    context = torch.stack([locked.i_star, own.i_star]).unsqueeze(0)

    def keys(*concepts: Concept) -> torch.Tensor:
        stack = ConceptStack(tuple(map(ConceptUse, concepts)))
        return stack.edit().project(layer, "k", context, lambda x: x @ weight.T)

    found, expected = keys(locked, own), keys(locked, replace(own, e_super=own.e_super + 1, e_key=None))
    assert torch.equal(found, expected)
    assert not torch.allclose(found, keys(locked, replace(own, e_key=None)))


def test_concepts_of_one_super_category_are_of_one_kind() -> None:
    """However it is written: they are given their places together."""
    kinds = ("teddy bear", "cat", " Teddy  Bear")
    concepts = [a_concept(f"<it-{k}>", k, super_category=kind, focus=20.0) for k, kind in enumerate(kinds)]
    focus = ConceptStack(tuple(map(ConceptUse, concepts))).edit().focus(torch.randn(1, 5, 24))
    assert focus is not None and list(focus.kinds) == [0, 1, 0]


def test_twins_under_two_words_are_refused_by_name() -> None:
    stack = ConceptStack((ConceptUse(a_concept("<a>")), ConceptUse(a_concept("<b>"))))
    with pytest.raises(ParallelConceptsError, match="<a> and <b> are too alike"):
        stack.edit()


# --- families

SD1 = Family("sd1", 768, {"clip_l": 768}, {"middle_block.1": (1, 1280)})
SDXL = Family("sdxl", 2048, {"clip_l": 768, "clip_g": 1280}, {"middle_block.1": (10, 1280)})


@pytest.mark.parametrize(
    ("concept", "model", "told"),
    [
        (SDXL, SD1, ["Stable Diffusion XL", "Stable Diffusion 1.x", "2048", "768"]),
        (SD1, SDXL, ["Stable Diffusion XL", "Stable Diffusion 1.x", "2048", "768"]),
        (SD1, replace(SD1, name="unet64", context_width=64), ["Stable Diffusion 1.x", "unet64"]),
        (SD1, replace(SD1, encoders={"t5": 768}), ["clip_l (768)", "t5 (768)"]),
        (SD1, replace(SD1, transformers={"middle_block.1": (2, 1280)}), ["(1)", "(2)", "architectures"]),
    ],
)
def test_difference_names_both_sides(concept: Family, model: Family, told: list[str]) -> None:
    message = concept.difference(model)
    assert message is not None
    assert all(text in message for text in told)


def test_names_alone_make_no_difference() -> None:
    assert SD1.difference(replace(SD1, name="finetune")) is None
    assert SD1.difference(SD1) is None


@pytest.mark.parametrize("family", [SD1, SDXL, FAMILY])
def test_families_survive_json_in_order(family: Family) -> None:
    found = Family.from_json(family.to_json())
    assert found == family
    assert list(found.layers.items()) == list(family.layers.items())
    assert list(found.encoders) == list(family.encoders)


def test_families_are_named_by_width() -> None:
    assert [name_of(width) for width in (768, 1024, 2048, 64)] == ["sd1", "sd2", "sdxl", "unet64"]
    assert SDXL.layers["middle_block.1.transformer_blocks.9"] == 1280
    assert (FAMILY.title, FAMILY.architecture) == ("small", "small")


# --- one by one: schedules, regions, locks of their own


def test_a_lock_of_its_own_stays() -> None:
    stack = stack_of(1, lock="global", lock_fixed=True) + ConceptStack((ConceptUse(a_concept("<other>", 9)),))
    assert [use.lock for use in stack.locked("local").uses] == ["global", "local"]


@pytest.mark.parametrize(
    ("start", "end"), [(-0.1, 1), (0, 1.1), (0.6, 0.5), (0.5, 0.5), (float("nan"), 1), (0, float("nan"))]
)
def test_a_schedule_that_makes_no_sense_is_refused(start: float, end: float) -> None:
    with pytest.raises(ValueError, match="<it-0> would be from .* start comes first"):
        stack_of(1, start=start, end=end)


def test_what_is_in_all_of_sampling() -> None:
    assert [use.always for use in stack_of(1, end=0.9).uses + stack_of(1).uses] == [False, True]


@pytest.mark.parametrize("region", [torch.zeros(4, 4), torch.ones(1, 4, 4)])
def test_an_empty_region_is_refused(region: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="region of <it-0> is empty: paint white"):
        stack_of(1, region=region)


def test_settings_change_one_concept_or_all() -> None:
    def weaker(use: ConceptUse) -> ConceptUse:
        return replace(use, gate=Gate(strength=0.5))

    assert [use.gate.strength for use in stack_of(3).changed(" <IT-1> ", weaker).uses] == [1, 0.5, 1]
    assert [use.gate.strength for use in stack_of(3).changed("", weaker).uses] == [0.5, 0.5, 0.5]
    with pytest.raises(StackError, match="no concept <cat> among those that arrive: <it-0>, <it-1>"):
        stack_of(2).changed("<cat>", weaker)


def test_gates_of_their_own_for_each_row() -> None:
    """A batch of two settings, with a negative prompt's rows behind, is what each setting gives alone."""
    stack = stack_of(2)
    layer = next(iter(stack.concepts[0].o_star_v))
    weight = torch.randn(stack.concepts[0].o_star_v[layer].shape[0], 24)
    rows = [[Gate(0.2, 0.1, 1.0), Gate(0.9, 0.3, 0.5)], [Gate(0.7, 0.2, 0.0), Gate(0.1, 0.05, 2.0)]]
    context = torch.randn(4, 7, 24)
    for path in ("k", "v"):
        together = stack.edit(rows).project(layer, path, context, lambda x: x @ weight.T)  # type: ignore[arg-type]
        for k in range(4):
            uses = [replace(use, gate=gate) for use, gate in zip(stack.uses, rows[k % 2], strict=True)]
            alone = ConceptStack(tuple(uses)).edit()
            expected = alone.project(layer, path, context[k : k + 1], lambda x: x @ weight.T)  # type: ignore[arg-type]
            assert torch.allclose(together[k : k + 1], expected, atol=1e-4)


def test_rows_that_do_not_fit_the_batch_are_refused() -> None:
    stack = stack_of(1)
    edit = stack.edit([[Gate(0.1)], [Gate(0.2)]])
    layer = next(iter(stack.concepts[0].o_star_v))
    with pytest.raises(ValueError, match="set for the 2 rows of a batch, and 3 arrived"):
        edit.project(layer, "v", torch.randn(3, 5, 24), lambda x: x[..., :2])
    for wrong in ([], [[Gate(), Gate()]]):
        with pytest.raises(ValueError, match="a gate for each of 1 concepts"):
            stack.edit(wrong)


# --- competition


def alike(count: int = 2) -> ConceptStack:
    """Concepts whose detectors answer each other's words, as those of learned words do."""
    draw = torch.Generator().manual_seed(5)
    common = torch.randn(24, generator=draw)
    uses = []
    for k in range(count):
        own = torch.randn(24, generator=draw)
        i_star = common + 0.6 * own
        uses.append(ConceptUse(a_concept(f"<it-{k}>", k, i_star=i_star, d_star=i_star / 40)))
    return ConceptStack(tuple(uses))


def test_concepts_compete_for_words() -> None:
    stack = alike(3)
    words = torch.stack([concept.i_star for concept in stack.concepts])[None]
    alone = stack.edit(competing=False).directions.gates(words)[1][0]
    assert (alone > 0.5).all(), "by itself, each answers all"
    together = stack.edit().directions.gates(words)[1][0]
    assert (together > 0.5).tolist() == torch.eye(3).bool().tolist()
    assert torch.allclose(together.diagonal(), alone.diagonal(), atol=1e-3)


def test_a_concept_alone_competes_with_nobody() -> None:
    stack, context = stack_of(1), torch.randn(2, 7, 24)
    found = stack.edit().directions.coefficients(context)[0]
    expected = stack.edit(competing=False).directions.coefficients(context)[0]
    assert all(map(torch.equal, found, expected))


def test_forms_compete_with_each_other() -> None:
    uses = [
        replace(use, concept=replace(use.concept, form=form))
        for use, form in zip(alike().uses, ("paper", "preserving"), strict=True)
    ]
    stack = ConceptStack(tuple(uses))
    words = torch.stack([concept.i_star for concept in stack.concepts])[None]
    opened = stack.edit().directions.gates(words)[1][0]
    assert (opened > 0.5).tolist() == [[True, False], [False, True]]
    subtracted, added = stack.edit().directions.coefficients(words)[0]
    assert torch.allclose(subtracted[..., 1], -added[..., 1]), "the preserving form adds and takes away alike"


def test_words_that_are_known_are_their_concepts_altogether() -> None:
    """Whatever is in the encodings; and ordinary words are read as before."""
    stack = alike(3)
    edit, context = stack.edit(), torch.stack([concept.i_star for concept in stack.concepts])[None]
    context = torch.cat([context, torch.randn(1, 4, 24)], dim=1)
    guessed = edit.gates(context)
    edit.words = torch.tensor([[word_number("<it-2>"), word_number("<IT-0>"), word_number("<it-1>"), 0, 0, 0, 0]])
    known = edit.gates(context)
    assert torch.equal(known[0, :3] > 0, torch.eye(3).bool()[[2, 0, 1]])
    assert torch.equal(known[0, 3:], guessed[0, 3:])
    layer = next(iter(edit.o_star_v))
    weight = torch.randn(stack.concepts[0].o_star_v[layer].shape[0], 24)
    told = edit.project(layer, "v", context, lambda x: x @ weight.T)
    edit.words = None
    assert not torch.allclose(told, edit.project(layer, "v", context, lambda x: x @ weight.T)), "not from the cache"
    edit.words = torch.zeros(1, 3, dtype=torch.long)
    assert torch.equal(edit.gates(context), guessed), "words of another context say nothing"


@given(st.floats(-1, 2), st.floats(0.01, 1))
def test_what_belongs_to_a_concept_does_not_depend_on_its_gate(bias: float, temperature: float) -> None:
    """A region holds whatever the bias, and with words known exactly."""
    stack = ConceptStack(tuple(replace(use, gate=Gate(bias, temperature)) for use in alike().uses))
    edit = stack.edit()
    words = torch.stack([concept.i_star for concept in stack.concepts])[None]
    assert (edit.belonging(words)[0] > 0.8).tolist() == [[True, False], [False, True]]
    edit.words = torch.tensor([[word_number("<it-1>"), 0]])
    assert edit.belonging(words)[0].tolist() == [[0, 1], [0, 0]]


def test_a_batch_that_is_split_up_is_refused_by_name() -> None:
    edit = stack_of(1).edit([[Gate(0.1)], [Gate(0.2)]])
    assert edit.gates(torch.randn(1, 5, 24)).shape == (2, 5, 1), "one context may be looked at with all settings"
    layer = next(iter(edit.o_star_v))
    with pytest.raises(ValueError, match="set for the 2 rows of a batch, and 1 arrived"):
        edit.project(layer, "v", torch.randn(1, 5, 24), lambda x: x[..., :2])
