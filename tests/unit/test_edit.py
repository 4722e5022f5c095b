"""The edit of keys and values, against code and formulas that nobody here wrote."""

from __future__ import annotations

import gc
import importlib
import math
import os
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from einops import einsum
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from perfusion.edit import (
    FORMS,
    PARALLEL,
    Directions,
    Form,
    Gate,
    KeyValueEdit,
    ParallelConceptsError,
    Weighed,
    gate,
    presence,
    preserving_gate,
)
from perfusion.locking import Lock

WIDTH, INNER, LAYER = 32, 24, "input_blocks.1.1.transformer_blocks.0"


class World:
    """J concepts in a metric, and one layer's projection."""

    def __init__(
        self,
        concepts: int = 1,
        *,
        form: Form = "paper",
        gates: list[Gate] | None = None,
        locks: list[Lock] | None = None,
        width: int = WIDTH,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=torch.float64)

        mixing = normal(width, width) / width**0.5 + torch.eye(width, dtype=torch.float64)
        self.c = mixing @ mixing.T
        self.i_star = normal(concepts, width)
        self.d_star = torch.linalg.solve(self.c, self.i_star.T).T
        self.e_super = normal(concepts, width)
        self.o_star = normal(concepts, INNER)
        self.weight = normal(INNER, width).to(dtype) / width**0.5
        self.gates = gates or [Gate(0.3 + 0.5 * j / concepts, 0.1 + 0.1 * j / concepts) for j in range(concepts)]
        self.forms: list[Form] = [form] * concepts
        self.locks: Sequence[Lock] | None = locks
        self.dtype = dtype
        self._normal = normal

    def context(self, batch: int = 2, tokens: int = 77) -> Tensor:
        """Random tokens, with each concept standing somewhere among them."""
        context = self._normal(batch, tokens, self.i_star.shape[1])
        for j, i_star in enumerate(self.i_star):
            context[j % batch, (5 * j + 2) % tokens] = i_star + 0.1 * context[0, 0]
        return context.to(self.dtype)

    def directions(self, order: list[int] | None = None, **settings: Any) -> Directions:
        order = list(range(len(self.i_star))) if order is None else order
        return Directions.of(
            self.i_star[order],
            self.d_star[order],
            [self.gates[j] for j in order],
            [self.forms[j] for j in order],
            **settings,
        )

    def edit(self, order: list[int] | None = None) -> KeyValueEdit:
        order = list(range(len(self.i_star))) if order is None else order
        locks: list[Lock] | None = None if self.locks is None else [self.locks[j] for j in order]
        return KeyValueEdit(self.directions(order), self.e_super[order], {LAYER: self.o_star[order]}, locks)

    def linear(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def project(self, context: Tensor, path: Any = "v", order: list[int] | None = None) -> Tensor:
        return self.edit(order).project(LAYER, path, context, self.linear)


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest error, as a share of the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


# --- values that follow the weights in use


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("anchored", [[True, True], [False, True], [True, False]])
def test_anchored_values_are_added_to_the_super_category_as_the_weights_in_use_see_it(
    form: Form, anchored: list[bool]
) -> None:
    world = World(2, form=form, dtype=torch.float64)
    context, other = world.context(), torch.randn_like(world.weight)
    at_home, away = (einsum(w, world.e_super, "i d, j d -> j i") for w in (world.weight, other))
    mask = torch.tensor(anchored).unsqueeze(-1)
    stored = torch.where(mask, world.o_star - at_home, world.o_star)
    edit = KeyValueEdit(world.directions(), world.e_super, {LAYER: stored}, anchored=anchored)
    same = edit.project(LAYER, "v", context, world.linear)
    assert relative(same, world.project(context)) < 1e-6

    world.o_star = torch.where(mask, world.o_star - at_home + away, world.o_star)
    world.weight = other
    assert relative(edit.project(LAYER, "v", context, world.linear), world.project(context)) < 1e-6


# --- keys of their own


@pytest.mark.parametrize("form", FORMS)
def test_locked_keys_are_those_of_another_encoding_where_there_is_one(form: Form) -> None:
    """And values are still anchored at the super-category."""
    world = World(2, form=form, dtype=torch.float64)
    context, e_key = world.context(), torch.randn_like(world.e_super)
    settings: dict[str, Any] = {"anchored": [True, False], "e_key": e_key}
    edit = KeyValueEdit(world.directions(), world.e_super, {LAYER: world.o_star}, **settings)
    without = KeyValueEdit(world.directions(), world.e_super, {LAYER: world.o_star}, anchored=[True, False])
    found = [each.project(LAYER, "v", context, world.linear) for each in (edit, without)]
    assert torch.equal(*found)
    world.e_super = e_key
    assert torch.equal(edit.project(LAYER, "k", context, world.linear), world.project(context, "k"))


def test_a_key_is_learned_while_it_is_in_use() -> None:
    world = World(1)
    e_key = world.e_super.float().clone().requires_grad_()
    edit = KeyValueEdit(world.directions(), world.e_super, {LAYER: world.o_star}, e_key=e_key)
    context = world.context().float()
    before = edit.project(LAYER, "k", context, world.linear)
    before.square().sum().backward()
    assert e_key.grad is not None and bool(e_key.grad.any())
    with torch.no_grad():
        e_key += 1
    assert not torch.equal(edit.project(LAYER, "k", context, world.linear), before)


# --- words that are heard by themselves alone


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", ["k", "v"])
@pytest.mark.parametrize("confined", [[True, True], [False, True]])
def test_confined_concepts_are_at_their_own_words_alone(form: Form, path: Any, confined: list[bool]) -> None:
    world = World(2, form=form, gates=[Gate(-5.0, 0.2), Gate(-5.0, 0.2)])  # open everywhere
    context = world.context(batch=1)
    words = torch.zeros(1, 77, dtype=torch.long)
    words[0, 2], words[0, 7] = 11, 22
    directions = world.directions(confined=confined)
    edit = KeyValueEdit(directions, world.e_super, {LAYER: world.o_star}, numbers=[11, 22])
    plain = world.linear(context)
    assert torch.equal(edit.project(LAYER, path, context, world.linear), world.project(context, path)), "nothing told"
    edit.words = words
    found = edit.project(LAYER, path, context, world.linear)
    gates = edit.gates(context)[0]
    others = [m for m in range(77) if m not in (2, 7)]
    assert gates[others, 1].max() == 0 < gates[7, 1]
    if all(confined):
        assert torch.equal(found[:, others], plain[:, others])
        assert gates[others].max() == 0
    else:
        assert gates[others, 0].min() > 0.5
        alone = KeyValueEdit(
            Directions.of(world.i_star[:1], world.d_star[:1], world.gates[:1], [form]),
            world.e_super[:1],
            {LAYER: world.o_star[:1]},
        )
        expected = alone.project(LAYER, path, context, world.linear)
        assert relative(found[:, others], expected[:, others]) < 1e-5
    assert not torch.allclose(found[:, [2, 7]], plain[:, [2, 7]], atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [0.3, 1.05, 9.0])
def test_a_told_word_fades_as_its_gate_shuts(form: Form, bias: float) -> None:
    """Values come back to the word's own, and keys stay as they were in training."""
    world = World(2, form=form, gates=[Gate(bias, 0.1), Gate(0.5, 0.1)])
    context = world.context(batch=2)
    e_key = 2 * world.e_super
    directions = world.directions(confined=[True, False])
    edit = KeyValueEdit(directions, world.e_super, {LAYER: world.o_star}, numbers=[11, 22], e_key=e_key)
    edit.words = torch.zeros(2, 77, dtype=torch.long)
    edit.words[0, 2], edit.words[1, 7] = 11, 22
    found = {path: edit.project(LAYER, path, context, world.linear) for path in ("k", "v")}

    function = preserving_gate if form == "preserving" else gate
    for j, m in ((0, 2), (1, 7)):
        e, i_star, o_star = context[j, m].double(), world.i_star[j], world.o_star[j]
        r = presence(e[None], world.i_star[j : j + 1], world.d_star[j : j + 1])[0].double()
        opened = attended = function(r, world.gates[j].bias, 0.1)
        if j == 0:  # the other is everywhere, and is what it is in the paper
            attended = torch.maximum(opened, function(r, 0.75, 0.1))
        subtracted = opened if form == "preserving" else r - (attended - opened)
        value = world.linear((e - subtracted * i_star).float()) + (opened * o_star).float()
        assert relative(found["v"][j, m], value) < 1e-5
        subtracted = attended if form == "preserving" else r
        key = world.linear((e - subtracted * i_star + attended * e_key[j]).float())
        assert relative(found["k"][j, m], key) < 1e-5


def test_where_the_word_of_the_only_concept_is() -> None:
    world = World(1)
    context, word = world.context(batch=2), torch.zeros(2, 77, dtype=torch.bool)
    word[0, 2] = True
    edit = KeyValueEdit(world.directions(confined=[True]), world.e_super, {LAYER: world.o_star}, numbers=[2**32])
    edit.tell_own(word)
    found = edit.project(LAYER, "v", context, world.linear)
    plain = world.linear(context)
    assert torch.equal(found[~word], plain[~word])
    assert not torch.allclose(found[word], plain[word], atol=1e-2)
    unnumbered = world.edit()
    unnumbered.tell_own(word)
    assert unnumbered.words is None


# --- focus


def test_a_focus_multiplies_the_share_of_its_own_word_alone() -> None:
    world = World(2, gates=[Gate(-9.0), Gate(-9.0)])  # open everywhere
    context, words = world.context(batch=2), torch.zeros(2, 77, dtype=torch.long)
    words[0, 2], words[0, 7], words[0, 8] = 11, 22, 22
    edit = KeyValueEdit(world.directions(), world.e_super, {LAYER: world.o_star}, numbers=[11, 22], focus=[1.0, 30.0])
    edit.words = words
    focus = edit.focus(context)
    assert edit.focuses and focus is not None
    bias = focus.everywhere
    assert bias.shape == (2, 1, 77) and (focus.most > 0).tolist() == [[False, True], [False, False]]
    scores = torch.randn(2, 5, 77)
    before, after = torch.softmax(scores, -1), torch.softmax(scores + bias, -1)
    odds = (after / after[..., :1]) / (before / before[..., :1])
    assert torch.allclose(odds[0, :, [7, 8]], torch.tensor(30.0), rtol=1e-3)
    others = [m for m in range(77) if m not in (7, 8)]
    assert torch.allclose(odds[0][:, others], torch.tensor(1.0), rtol=1e-4)
    assert torch.equal(bias[1], torch.zeros(1, 77)), "a prompt without the words"
    assert edit.focus(context) is focus, "made once for all layers"
    edit.words = words.flip(0)
    of_others = edit.focus(context)
    assert of_others is not None, "and anew for other words"
    assert of_others.everywhere[1, 0, 2] == 0 < of_others.everywhere[1, 0, 7]


def focus_at_own_word(gate_: Gate, r: float = 1.0, form: Form = "paper", confined: bool = False) -> float:
    """What is added for the only concept's word, as a share of all that its focus can add."""
    world = World(1, gates=[gate_], form=form)
    context, words = world.context(batch=1), torch.zeros(1, 77, dtype=torch.long)
    context[0, 4] = r * world.i_star[0]
    words[0, 4] = 11
    directions = world.directions(confined=[confined])
    edit = KeyValueEdit(directions, world.e_super, {LAYER: world.o_star}, numbers=[11], focus=[10.0])
    edit.words = words
    focus = edit.focus(context)
    assert focus is not None
    return float(focus.everywhere[0, 0, 4]) / math.log(10)


@pytest.mark.parametrize("confined", [True, False])
def test_a_focus_goes_with_strength(confined: bool) -> None:
    def of(strength: float) -> float:
        return focus_at_own_word(Gate(0.5, 0.05, strength), confined=confined)

    assert of(1.0) == pytest.approx(1, rel=1e-3)
    assert of(0.5) == pytest.approx(0.5, rel=1e-3)
    assert of(3.0) == pytest.approx(1, rel=1e-3), "a strength beyond 1 adds values, not attention"
    assert of(-1.0) == 0


def test_a_focus_goes_with_the_gate() -> None:
    assert focus_at_own_word(Gate(1.0, 0.05)) == pytest.approx(0.5, rel=1e-3), "half open"
    assert focus_at_own_word(Gate(1.5, 0.05)) == pytest.approx(0, abs=1e-3), "shut"


@pytest.mark.parametrize("form", FORMS)
def test_the_focus_of_a_word_that_fades_stays_what_it_was_in_training(form: Form) -> None:
    def of(gate_: Gate, r: float = 1.0) -> float:
        return focus_at_own_word(gate_, r, form, confined=True)

    function = preserving_gate if form == "preserving" else gate
    trained = pytest.approx(float(function(torch.tensor(1.0), 0.75, 0.1)))
    assert of(Gate(0.75, 0.1)) == trained
    assert of(Gate(1.0, 0.05)) == of(Gate(1.5, 0.05)) == trained, "half open, and shut"
    assert of(Gate()) == pytest.approx(float(function(torch.tensor(1.0), 0.6, 0.15))), "and goes with wider gates"
    assert of(Gate(), r=0.3) < 0.2 < 0.9 < of(Gate(0.1, 0.05), r=0.3)


def test_without_focus_there_is_nothing_to_add() -> None:
    world = World(2)
    edit = KeyValueEdit(world.directions(), world.e_super, {LAYER: world.o_star}, focus=[1.0, 1.0])
    assert not edit.focuses and edit.focus(world.context()) is None


def test_a_word_that_nobody_told_of_is_known_by_its_encoding() -> None:
    world = World(1)
    context = 0.01 * torch.randn(1, 77, WIDTH)
    context[0, 4] = world.i_star[0]
    edit = KeyValueEdit(world.directions(), world.e_super, {LAYER: world.o_star}, numbers=[11], focus=[10.0])
    focus = edit.focus(context)
    assert focus is not None
    bias = focus.everywhere[0, 0]
    assert bias.nonzero().flatten().tolist() == [4] and float(bias[4]) > 1.5


# --- oracle 1: perfusion-pytorch, one concept


@pytest.fixture(scope="module")
def rank1_edit_module() -> Iterator[Any]:
    """perfusion-pytorch's layer. Its package wants open_clip, which the layer itself never uses."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stub, tokenizer = types.ModuleType("open_clip"), types.ModuleType("open_clip.tokenizer")
        vars(tokenizer).update(tokenize=lambda texts: None)
        vars(stub).update(tokenizer=tokenizer)
        patch.setitem(sys.modules, "open_clip", stub)
        patch.setitem(sys.modules, "open_clip.tokenizer", tokenizer)
        try:
            module = importlib.import_module("perfusion_pytorch")
        except ModuleNotFoundError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"the oracle for equation 1, perfusion-pytorch, is not installed ({error})")
        yield module.Rank1EditModule
        for name in [name for name in sys.modules if name.split(".")[0] == "perfusion_pytorch"]:
            patch.delitem(sys.modules, name)


@pytest.mark.parametrize("path", ["k", "v"])
def test_inference_equals_perfusion_pytorch(rank1_edit_module: Any, path: str) -> None:
    world = World(gates=[Gate(0.7, 0.15)], dtype=torch.float64)
    projection = torch.nn.Linear(WIDTH, INNER, bias=False)
    projection.weight.data = world.weight
    theirs = rank1_edit_module(projection, C=world.c, is_key_proj=path == "k").double().eval()
    theirs.ema_concept_text_encs.copy_(world.i_star)
    theirs.concept_outputs.data.copy_(world.e_super @ world.weight.T if path == "k" else world.o_star)
    theirs.initted.fill_(True)
    context = world.context()
    assert relative(world.project(context, path), theirs(context)) < 1e-5


@pytest.mark.parametrize("path", ["k", "v"])
def test_first_training_forward_equals_perfusion_pytorch(rank1_edit_module: Any, path: str) -> None:
    """Before any step: i* is the concept's mean encoding and o* is W e_super, for keys and values alike."""
    world = World(gates=[Gate(0.75, 0.1)], dtype=torch.float64)
    projection = torch.nn.Linear(WIDTH, INNER, bias=False)
    projection.weight.data = world.weight
    theirs = rank1_edit_module(projection, C=world.c, is_key_proj=path == "k").double().train()
    context, with_super, where = world.context(), world.context(), torch.tensor([3, 41])
    found = theirs(context, concept_indices=where, text_enc_with_superclass=with_super)
    rows = torch.arange(2)
    world.i_star = context[rows, where].double().mean(0, keepdim=True)
    world.d_star = torch.linalg.solve(world.c, world.i_star.T).T
    world.e_super = with_super[rows, where].double().mean(0, keepdim=True)
    world.o_star = world.e_super @ world.weight.double().T
    assert relative(world.project(context, path), found) < 1e-5


# --- oracle 2: the paper's appendix, several concepts


def appendix(world: World, context: Tensor) -> Tensor:
    """Tewel et al. 2023, appendix B: C^-1 = L L^T, an orthonormal basis of {L^T i*_j} by QR, all in float64."""
    e, weight = context.double(), world.weight.double()
    inverse = torch.linalg.inv(world.c)
    metric = torch.linalg.cholesky(inverse).T
    basis, _ = torch.linalg.qr(metric @ world.i_star.T)
    in_metric = e @ metric.T
    perpendicular = in_metric - in_metric @ basis @ basis.T
    h = torch.linalg.solve(metric, perpendicular.mT).mT @ weight.T
    for i_star, o_star, g in zip(world.i_star, world.o_star, world.gates, strict=True):
        r = (e @ inverse @ i_star) / (i_star @ inverse @ i_star)
        h = h + torch.sigmoid((r - g.bias) / g.temperature).unsqueeze(-1) * o_star
    return h


@pytest.mark.parametrize("concepts", [1, 2, 5, 16])
def test_several_concepts_equal_cholesky_and_qr(concepts: int) -> None:
    world = World(concepts, width=96, dtype=torch.float64)
    context = world.context(batch=3)
    expected = appendix(world, context)
    assert relative(world.project(context), expected) < 1e-6
    assert relative(context @ world.weight.T, expected) > 0.1, "the edit must matter for the comparison to mean much"


def test_metrics_of_their_own_leave_nothing_of_any_concept() -> None:
    """Concepts of different trainings have a C each: what is left of a token must still be invisible to every d*."""
    world = World(3, dtype=torch.float64)
    world.d_star = torch.stack([torch.linalg.solve(World(seed=j).c, i) for j, i in enumerate(world.i_star, 1)])
    context = world.context()
    subtracted, _ = world.directions().coefficients(context)[0]
    left = context + subtracted.double() @ world.i_star
    assert float((left @ world.d_star.T).abs().max()) < 1e-5 * float((context @ world.d_star.T).abs().max())


# --- the formulas themselves


@pytest.mark.parametrize("tokens", [1, 77, 231])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("path", ["k", "v"])
def test_one_concept_is_equation_1(batch: int, tokens: int, path: str) -> None:
    world = World(gates=[Gate(0.5, 0.2, 0.8)])
    context = world.context(batch, tokens)
    e, weight, i_star, d_star = context.double(), world.weight.double(), world.i_star[0], world.d_star[0]
    r = (e @ d_star / (i_star @ d_star)).unsqueeze(-1)
    o_star = weight @ world.e_super[0] if path == "k" else world.o_star[0]
    expected = e @ weight.T + 0.8 * (torch.sigmoid((r - 0.5) / 0.2) * o_star - r * (weight @ i_star))
    found = world.project(context, path)
    assert found.shape == (batch, tokens, INNER)
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("path", ["k", "v"])
def test_preserving_form_is_its_formula(path: str) -> None:
    world = World(2, form="preserving")
    context = world.context()
    e, weight = context.double(), world.weight.double()
    expected = e @ weight.T
    for j, g in enumerate(world.gates):
        r = e @ world.d_star[j] / (world.i_star[j] @ world.d_star[j])
        shut, full = torch.sigmoid(torch.tensor([-g.bias / 2, torch.inf]).double() / g.temperature)
        opened = ((torch.sigmoid((r - g.bias) / g.temperature) - shut) / (full - shut)).clamp_min(0)
        target = weight @ world.e_super[j] if path == "k" else world.o_star[j]
        expected = expected + opened.unsqueeze(-1) * (target - weight @ world.i_star[j])
    assert relative(world.project(context, path), expected) < 1e-5


@given(st.floats(0.05, 2), st.floats(0.02, 1), st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_preserving_gate_is_shut_below_half_its_bias(bias: float, temperature: float, shares: list[float]) -> None:
    beta, tau = torch.tensor([bias]), torch.tensor([temperature])
    r = torch.tensor([[1.0 - 2 * share] for share in shares]) * beta / 2
    assert not preserving_gate(r, beta, tau).any()
    assert not preserving_gate(beta / 2, beta, tau).any()
    above = preserving_gate(torch.stack([beta / 2 + 0.1 * tau, beta / 2 + 0.5 * tau, beta + 50 * tau]), beta, tau)
    assert (above.diff(dim=0) > 0).all()
    assert above[0] > 0
    assert above[-1] == pytest.approx(1)


def test_preserving_form_leaves_tokens_without_the_concept_bitwise_alone() -> None:
    world = World(2, form="preserving", gates=[Gate(0.6, 0.1), Gate(0.4, 0.2)])
    context = world.context(tokens=231)
    r = presence(context, world.i_star, world.d_star)
    far = (r <= torch.tensor([0.3, 0.2])).all(-1)
    assert 0.3 < far.float().mean() < 1
    subtracted, opened = world.directions().coefficients(context)[0]
    assert not subtracted[far].any()
    assert not opened[far].any()
    # A projection that treats each row alike, however many there are: matrix products do not promise that.
    rowwise = lambda x: x[..., :INNER] * 3 + x[..., -INNER:]  # noqa: E731
    found = world.edit().project(LAYER, "v", context, rowwise)
    assert torch.equal(found[far], rowwise(context)[far])
    assert not torch.equal(found[~far], rowwise(context)[~far])


def test_mixed_forms_share_no_gram_matrix() -> None:
    """A concept of the preserving form neither changes nor is changed by what the paper's form subtracts."""
    world = World(3)
    world.forms = ["paper", "preserving", "paper"]
    context = world.context()
    subtracted, opened = world.directions().coefficients(context)[0]
    assert torch.allclose(subtracted[..., [0, 2]], world.directions([0, 2]).coefficients(context)[0][0], atol=1e-6)
    assert torch.allclose(subtracted[..., 1], world.directions([1]).coefficients(context)[0][0][..., 0], atol=1e-6)
    assert torch.equal(subtracted[..., 1], -opened[..., 1])


# --- invariances


@pytest.mark.parametrize("form", FORMS)
@given(st.floats(1e-3, 1e3), st.integers(0, 1))
def test_scale_of_the_dual_vector_cancels(form: Form, scale: float, which: int) -> None:
    world = World(2, form=form)
    context = world.context(1, 9)
    before = world.project(context)
    world.d_star[which] *= scale
    assert relative(world.project(context), before) < 1e-5


@pytest.mark.parametrize("path", ["k", "v"])
@pytest.mark.parametrize("form", FORMS)
def test_order_of_concepts_does_not_matter(form: Form, path: str) -> None:
    world = World(4, form=form, locks=["local", "global", "local", "global"])
    context = world.context()
    assert relative(world.project(context, path, [2, 0, 3, 1]), world.project(context, path)) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_strength_scales_the_correction(form: Form) -> None:
    world = World(form=form, gates=[Gate(0.5, 0.2, 1.0)])
    context = world.context()
    plain = world.linear(context)
    whole = world.project(context) - plain
    for strength in (0.0, 0.25, 1.5):
        world.gates = [Gate(0.5, 0.2, strength)]
        assert torch.allclose(world.project(context) - plain, strength * whole, atol=1e-5)


def test_strength_0_in_the_preserving_form_is_as_good_as_absent() -> None:
    world = World(2, form="preserving", gates=[Gate(0.5, 0.2), Gate(0.6, 0.1, 0.0)])
    context = world.context()
    assert torch.allclose(world.project(context), world.project(context, order=[0]), atol=1e-6)


# --- precision


def test_gates_and_coefficients_ignore_autocast() -> None:
    world = World(2)
    context = world.context()
    directions = world.directions()
    plain = (
        presence(context, world.i_star, world.d_star),
        *directions.gates(context),
        *directions.coefficients(context)[0],
    )
    with torch.autocast("cpu", torch.bfloat16):
        cast = (presence(context, world.i_star, world.d_star), *directions.gates(context))
        cast += directions.coefficients(context)[0]
    for found, expected in zip(cast, plain, strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_contexts_give_float32_gates_and_half_results(dtype: torch.dtype) -> None:
    world = World(2)
    context = world.context().to(dtype)
    expected = world.directions().gates(context.float())
    for found, want in zip(world.directions().gates(context), expected, strict=True):
        assert torch.equal(found, want)
    reference = world.project(context.float())
    world.weight = world.weight.to(dtype)
    found = world.project(context)
    assert found.dtype == dtype
    assert relative(found.float(), reference) < 0.03


def test_gates_report_what_the_edit_uses() -> None:
    world = World(3, gates=[Gate(0.5, 0.2, 0.7)] * 3)
    world.forms = ["paper", "preserving", "preserving"]
    context = world.context()
    r, opened = world.directions().gates(context)
    assert torch.allclose(r, presence(context, world.i_star, world.d_star), atol=1e-5)
    assert torch.allclose(0.7 * opened, world.directions().coefficients(context)[0][1], atol=1e-6)


def test_gate_is_the_papers_at_its_landmarks() -> None:
    found = gate(torch.tensor([0.0, 0.75, 1.0]), 0.75, 0.1)
    assert found.tolist() == pytest.approx([0.00055, 0.5, 0.924], abs=1e-3)


# --- refusals


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("form", FORMS)
def test_near_parallel_concepts_are_refused_by_name(sign: int, form: Form) -> None:
    world = World(3, form=form)
    world.i_star[2] = sign * 2 * world.i_star[0] + 0.02 * world.i_star[1]
    world.d_star = torch.linalg.solve(world.c, world.i_star.T).T
    with pytest.raises(ParallelConceptsError, match="<one> and <three> are too alike"):
        Directions.of(world.i_star, world.d_star, world.gates, world.forms, ["<one>", "<two>", "<three>"])
    with pytest.raises(ParallelConceptsError, match="concept 1 and concept 3"):
        world.directions()


def test_alike_but_distinct_concepts_are_taken() -> None:
    world = World(2, dtype=torch.float64)
    first, other = world.i_star
    unit = first @ world.d_star[0]
    other = other - first * (other @ world.d_star[0]) / unit
    other = other * (unit / (other @ torch.linalg.solve(world.c, other))).sqrt()
    cosine = PARALLEL - 0.001
    world.i_star[1] = cosine * first + (1 - cosine**2) ** 0.5 * other
    world.d_star = torch.linalg.solve(world.c, world.i_star.T).T
    context = world.context()
    assert relative(world.project(context), appendix(world, context)) < 1e-4
    world.i_star[1] = (cosine + 0.002) * first + (1 - (cosine + 0.002) ** 2) ** 0.5 * other
    world.d_star = torch.linalg.solve(world.c, world.i_star.T).T
    with pytest.raises(ParallelConceptsError):
        world.edit()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cosine", [0.0, 0.7, 0.9999, 1.0])
def test_however_alike_confined_concepts_are_each_is_at_its_word_what_it_is_alone(form: Form, cosine: float) -> None:
    world = World(2, form=form)
    world.i_star[1] = cosine * world.i_star[0] + (1 - cosine) * world.i_star[1]
    world.d_star = torch.linalg.solve(world.c, world.i_star.T).T
    both = world.directions(competing=True, confined=[True, True])  # would be refused for others
    context = world.context(batch=1)
    words = torch.zeros(1, 77, dtype=torch.long)
    words[0, 2], words[0, 7] = 11, 22
    edit = KeyValueEdit(both, world.e_super, {LAYER: world.o_star}, numbers=[11, 22])
    untold = edit.project(LAYER, "v", context, world.linear)
    assert untold.isfinite().all()
    edit.words = words
    found = edit.project(LAYER, "v", context, world.linear)
    for j, (place, number) in enumerate(((2, 11), (7, 22))):
        one = slice(j, j + 1)
        alone = KeyValueEdit(
            world.directions([j], confined=[True]),
            world.e_super[one],
            {LAYER: world.o_star[one]},
            numbers=[number],
        )
        alone.words = words
        assert torch.allclose(found[:, place], alone.project(LAYER, "v", context, world.linear)[:, place], atol=1e-4)
    assert float((untold - world.linear(context)).abs().max()) < 3 * float((found - world.linear(context)).abs().max())


@pytest.mark.parametrize("forms", [["paper"] * 4, ["preserving"] * 4, ["paper", "preserving", "preserving", "paper"]])
@pytest.mark.parametrize(
    ("degrees", "beyond"), [((0, 90, 60), 0.5), ((0, 14, 40), 0.5), ((0, 0, 30), 0), ((0, 5.7, 5.75), 0)]
)
def test_where_words_are_told_confined_concepts_and_those_that_are_everywhere_leave_each_other_alone(
    forms: list[Form], degrees: tuple[float, ...], beyond: float
) -> None:
    """The last at these angles to the first is everywhere; twins of the first may be as near to it as they like."""
    world = World(4)
    world.forms = forms
    metric = torch.linalg.inv(world.c)
    first, other = world.i_star[0], world.i_star[1]
    other = other - (other @ metric @ first) / (first @ metric @ first) * first
    other = other * ((first @ metric @ first) / (other @ metric @ other)).sqrt()
    out_of_plane = beyond * world.i_star[3]
    for j, angle in zip((0, 1, 3), map(math.radians, degrees), strict=True):
        world.i_star[j] = math.cos(angle) * first + math.sin(angle) * other
    world.i_star[3] += out_of_plane
    world.d_star = torch.linalg.solve(world.c, world.i_star.T).T
    context = world.context(batch=1)
    words = torch.zeros(1, 77, dtype=torch.long)
    places = [2, 7, 12, 17]
    for j, place in enumerate(places):
        words[0, place] = 11 + j

    def projected(*those: int) -> Tensor:
        """With these concepts loaded, the last of which is everywhere."""
        kept = list(those)
        edit = KeyValueEdit(
            world.directions(kept, competing=True, confined=[j < 3 for j in kept]),
            world.e_super[kept],
            {LAYER: world.o_star[kept]},
            numbers=[11 + j for j in kept],
        )
        edit.words = words
        return edit.project(LAYER, "v", context, world.linear)

    found = projected(0, 1, 2, 3)
    for j in range(3):
        assert torch.allclose(found[:, places[j]], projected(j)[:, places[j]], atol=1e-4)
    elsewhere = [m for m in range(77) if m not in places[:3]]
    assert torch.allclose(found[:, elsewhere], projected(3)[:, elsewhere], atol=1e-4)


def test_a_prompt_weight_says_how_much_a_word_is_looked_at() -> None:
    world = World(2)
    edit = KeyValueEdit(world.directions(competing=True), world.e_super, {LAYER: world.o_star}, focus=[20.0, 20.0])
    context = world.context(batch=1)
    before = edit.focus(context)
    assert before is not None and before.weighing is None
    weights, empty = torch.ones(1, 77), world.context(batch=1)[:, :1]
    weights[0, 2], weights[0, 7] = 1.4, 0.5
    differs = (weights != 1).unsqueeze(-1)
    given = torch.where(differs, empty + weights.unsqueeze(-1) * (context - empty), context)  # as hosts weigh them
    unknowing = edit.focus(given)
    edit.weighed = Weighed(weights, context - given)
    weighed = edit.focus(given)
    assert weighed is not None and unknowing is not None
    assert torch.allclose(weighed.parts, before.parts, atol=1e-4)
    assert not torch.allclose(unknowing.parts, before.parts, atol=1e-2)
    added = (weighed.everywhere - before.everywhere)[0, 0].exp()
    assert torch.allclose(added, weights[0], atol=1e-4), "so many times as much, before all is brought to 1"
    for path in ("k", "v"):
        looks = edit.project(LAYER, path, given, world.linear)
        edit.weighed, told = None, edit.weighed
        expected = edit.project(LAYER, path, context, world.linear)
        distorted = edit.project(LAYER, path, given, world.linear)
        edit.weighed = told
        assert torch.allclose(looks, expected, atol=1e-4), "its looks stay as they were learned"
        assert not torch.allclose(distorted, expected, atol=1e-2)
    of_others = edit.focus(context[:, :12])
    assert of_others is not None and of_others.weighing is None, "what is told of another context says nothing of this"


def test_prompt_weights_are_the_host_s_where_no_word_is_looked_at_more() -> None:
    world = World(2)
    edit = KeyValueEdit(world.directions(competing=True), world.e_super, {LAYER: world.o_star})
    context = world.context(batch=1)
    value = edit.project(LAYER, "v", context, world.linear)
    edit.weighed = Weighed(torch.full((1, 77), 2.0), torch.ones_like(context))
    assert torch.equal(edit.project(LAYER, "v", context, world.linear), value)


def test_twins_leave_others_what_they_are() -> None:
    """Concepts that are confined and all but parallel count as one where others are told from them."""
    world = World(4)
    world.i_star[1] = world.i_star[0] + 1e-5 * world.i_star[1]
    world.d_star = torch.linalg.solve(world.c, world.i_star.T).T
    kept = [0, 2, 3]
    found = Directions.of(world.i_star, world.d_star, world.gates, world.forms, confined=[True, True, False, False])
    without = Directions.of(
        world.i_star[kept], world.d_star[kept], [world.gates[k] for k in kept], [world.forms[k] for k in kept]
    )
    context = world.context()
    for both, one in zip(found.coefficients(context)[0], without.coefficients(context)[0], strict=True):
        assert torch.allclose(both[..., 2:], one[..., 1:], atol=1e-3)
    subtracted, alone = found.coefficients(context)[0][0], without.coefficients(context)[0][0]
    assert torch.allclose(subtracted[..., :2].sum(-1), alone[..., 0], atol=1e-3)


@pytest.mark.parametrize("count", [2, 8])
def test_many_alike_but_distinct_concepts_are_told_apart_beside_a_confined_one(count: int) -> None:
    world = World(count + 1, width=40)
    for j in range(1, count):
        world.i_star[j] = 0.9 * world.i_star[0] + 0.4 * world.i_star[j]
    world.d_star = torch.linalg.solve(world.c, world.i_star.T).T
    confined = [False] * count + [True]
    settings = world.i_star, world.d_star, world.gates, world.forms
    found = Directions.of(*settings, competing=True, confined=confined)
    assert torch.equal(found.detector, Directions.of(*settings, competing=True).detector)


def test_a_concept_that_is_the_sum_of_confined_ones_is_refused() -> None:
    world = World(3)
    world.i_star[2] = world.i_star[0] + world.i_star[1] + 1e-4 * world.i_star[2]
    world.d_star = torch.linalg.solve(world.c, world.i_star.T).T
    with pytest.raises(ParallelConceptsError, match="together are too alike"):
        Directions.of(world.i_star, world.d_star, world.gates, world.forms, confined=[True, True, False])


def test_concepts_that_only_together_are_dependent_are_refused() -> None:
    world = World(3)
    world.i_star[2] = world.i_star[0] + world.i_star[1] + 1e-4 * world.i_star[2]
    world.d_star = torch.linalg.solve(world.c, world.i_star.T).T
    with pytest.raises(ParallelConceptsError, match="concept 1, concept 2, concept 3 together"):
        world.edit()


def test_impossible_settings_are_refused() -> None:
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            Gate(temperature=temperature)
    world = World(2)
    with pytest.raises(ValueError, match="same number of concepts"):
        Directions.of(world.i_star, world.d_star[:1], world.gates, world.forms)
    with pytest.raises(ValueError, match="key lock"):
        KeyValueEdit(world.directions(), world.e_super, {}, ["local", "sideways"])  # type: ignore[list-item]


# --- what is remembered of a context


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each time that coefficients are computed."""
    calls: list[int] = []
    original = Directions.coefficients

    def counted(self: Directions, *given: Any) -> Any:
        calls.append(1)
        return original(self, *given)

    monkeypatch.setattr(Directions, "coefficients", counted)
    return calls


def test_all_layers_share_one_computation_per_context(computed: list[int]) -> None:
    world = World(2)
    edit = world.edit()
    contexts = [world.context(), world.context()]
    for _layer in range(5):
        for context in contexts:
            for path in ("k", "v"):
                edit.project(LAYER, path, context, world.linear)
    assert len(computed) == 2


@pytest.mark.parametrize("inference", [False, True])
def test_contexts_are_not_confused(inference: bool) -> None:
    world = World(2)
    edit = world.edit()
    with torch.inference_mode(inference):
        contexts = [world.context() for _ in range(7)]
        for context in contexts + contexts[::-1]:
            assert torch.equal(edit.project(LAYER, "v", context, world.linear), world.project(context))


def test_an_in_place_change_of_a_context_is_noticed(computed: list[int]) -> None:
    world = World()
    edit = world.edit()
    context = world.context()
    before = edit.project(LAYER, "v", context, world.linear)
    context[:, 4:9] = world.i_star.float()
    after = edit.project(LAYER, "v", context, world.linear)
    assert len(computed) == 2
    assert torch.equal(after, world.project(context))
    assert not torch.equal(after, before)


def test_a_dead_context_is_not_confused_with_its_successor() -> None:
    world = World()
    edit = world.edit()
    seen = set()
    for _ in range(40):
        context = world.context()
        seen.add(id(context))
        assert torch.equal(edit.project(LAYER, "v", context, world.linear), world.project(context))
        del context
    assert len(seen) < 40, "no id was reused: this test shows nothing"


def test_contexts_are_not_kept_alive() -> None:
    world = World(locks=["global"])
    edit = world.edit()
    context = world.context()
    edit.key_lock.shift = torch.ones_like(context)
    edit.project(LAYER, "k", context, world.linear)
    gc.collect()
    before = sys.getrefcount(context)
    del edit
    assert sys.getrefcount(context) == before


# --- gradients


def test_gradients_reach_target_values_and_context_only() -> None:
    world = World(2, dtype=torch.float64)
    values = {LAYER: world.o_star.clone().requires_grad_()}
    context = world.context().requires_grad_()
    edit = KeyValueEdit(world.directions(), world.e_super, values)
    edit.project(LAYER, "v", context, world.linear).square().sum().backward()
    opened = world.directions().coefficients(context.detach())[0][1].double()
    projected = world.project(context.detach())
    gradient = values[LAYER].grad
    assert gradient is not None
    assert relative(gradient, 2 * einsum(opened, projected, "b m j, b m i -> j i")) < 1e-5

    def by_definition(e: Tensor) -> Tensor:
        return appendix(world, e).square().sum()

    (expected,) = torch.autograd.grad(by_definition(context), context)
    assert context.grad is not None
    assert relative(context.grad, expected) < 1e-5


def test_a_look_without_gradients_does_not_cut_them_off() -> None:
    world = World()
    edit = world.edit()
    context = world.context().requires_grad_()
    with torch.no_grad():
        edit.project(LAYER, "v", context, world.linear)
    found = edit.project(LAYER, "v", context, world.linear)
    (gradient,) = torch.autograd.grad(found.square().sum(), context)
    (expected,) = torch.autograd.grad(world.project(context).square().sum(), context)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_have_the_same_gradients(reentrant: bool) -> None:
    world = World()
    edit = world.edit()

    def two_layers(context: Tensor) -> Tensor:
        first = edit.project(LAYER, "k", context, world.linear)
        return first * edit.project(LAYER, "v", context, world.linear)

    gradients = []
    plain = world.context()
    for checkpointed in (False, True):
        context = plain.clone().requires_grad_()
        total = torch.zeros(())
        for _layer in range(2):
            found = checkpoint(two_layers, context, use_reentrant=reentrant) if checkpointed else two_layers(context)
            total = total + found.square().sum()
        total.backward()
        gradients.append(context.grad)
    assert relative(gradients[1], gradients[0]) < 1e-5


# --- key locks


def shifted_world(*locks: Lock) -> tuple[World, KeyValueEdit, Tensor, Tensor]:
    world = World(len(locks), locks=list(locks))
    edit, context = world.edit(), world.context()
    shift = torch.zeros_like(context)
    shift[:, 10:20] = 1.5
    edit.key_lock.shift = shift
    return world, edit, context, context + shift


def test_globally_locked_keys_read_the_shifted_context_and_values_do_not() -> None:
    world, edit, context, shifted = shifted_world("global", "global")
    assert torch.equal(edit.project(LAYER, "k", context, world.linear), world.linear(shifted))
    world.locks = None
    assert torch.equal(edit.project(LAYER, "v", context, world.linear), world.project(context, "v"))


def test_locally_locked_keys_ignore_the_shift() -> None:
    world, edit, context, _ = shifted_world("local", "local")
    assert torch.equal(edit.project(LAYER, "k", context, world.linear), world.project(context, "k"))


def test_mixed_locks_shift_all_keys_and_edit_those_of_local_concepts() -> None:
    world, edit, context, shifted = shifted_world("local", "global", "local")
    subtracted, opened = world.directions().coefficients(context)[0]
    weight = world.weight.double()
    expected = shifted.double() @ weight.T
    for j in (0, 2):
        expected += subtracted[..., j, None].double() * (weight @ world.i_star[j])
        expected += opened[..., j, None].double() * (weight @ world.e_super[j])
    assert relative(edit.project(LAYER, "k", context, world.linear), expected) < 1e-5


@pytest.mark.parametrize("shape", [(1, 77, WIDTH), (2, 154, WIDTH), (2, 77, WIDTH // 2), (77, WIDTH)])
def test_a_shift_of_another_shape_falls_back_to_local_locking(shape: tuple[int, ...]) -> None:
    world, edit, context, _ = shifted_world("global", "local")
    edit.key_lock.shift = torch.ones(shape)
    found = edit.project(LAYER, "k", context, world.linear)
    world.locks = ["local", "local"]
    assert torch.equal(found, world.project(context, "k"))


def test_another_shift_for_the_same_context_is_noticed() -> None:
    world, edit, context, _ = shifted_world("global")
    for shift in (torch.ones_like(context), None, 2 * torch.ones_like(context), torch.zeros_like(context)):
        edit.key_lock.shift = shift
        found = edit.project(LAYER, "k", context, world.linear)
        expected = world.project(context, "k") if shift is None else world.linear(context + shift)
        assert torch.equal(found, expected)
    assert edit.key_lock.shift is not None
    edit.key_lock.shift += 3
    assert torch.equal(edit.project(LAYER, "k", context, world.linear), world.linear(context + 3))


def test_the_shift_follows_the_contexts_precision() -> None:
    world, edit, context, shifted = shifted_world("global")
    world.weight = world.weight.half()
    found = edit.project(LAYER, "k", context.half(), world.linear)
    assert found.dtype == torch.float16
    assert relative(found.float(), world.linear(shifted.half()).float()) < 0.01
