"""The contract of Apply Concepts with everything else in a graph, on the miniature model."""

from __future__ import annotations

import gc
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.concepts import CAT, LAYERS, TEDDY, Lab, expected_projection, projection_weights, recorded, word_owners

pytestmark = [pytest.mark.comfyui, pytest.mark.usefixtures("nothing_left")]

BOTH = f"a {CAT} beside a {TEDDY} on a sofa"
LONG = "an old photo of a room with a window and a table, " * 9
LOCKS = ("local", "global")


@pytest.fixture(scope="module")
def teddy(lab: Lab) -> Any:
    return lab.concept()


@pytest.fixture(scope="module")
def cat(lab: Lab) -> Any:
    return lab.concept(CAT, "cat", seed=1, form="preserving")


@pytest.fixture(scope="module")
def plain(lab: Lab) -> torch.Tensor:
    return lab.draw(lab.model, lab.clip, "a photo of a teddy bear")


def different(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Visibly so, not by rounding."""
    return float((a - b).abs().max()) > 1e-2 * float(b.abs().max())


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return apart(a, b) <= tolerance


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-6))


# --- off is off ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("how", ["strength 0", "empty stack"])
def test_nothing_active_is_the_stock_model_bit_for_bit(
    lab: Lab, teddy: Any, cat: Any, plain: torch.Tensor, lock: str, how: str
) -> None:
    concepts = (teddy, cat) if how == "strength 0" else ()
    model, clip = lab.applied(*concepts, lock=lock, strength=0.0)
    assert torch.equal(lab.draw(model, clip, "a photo of a teddy bear"), plain)
    assert not model.injections
    assert not clip.patcher.injections


@pytest.mark.parametrize("lock", LOCKS)
def test_base_is_bit_identical_after_concepts_were_used(lab: Lab, teddy: Any, plain: torch.Tensor, lock: str) -> None:
    model, clip = lab.applied(teddy, lock=lock)
    assert different(lab.draw(model, clip), plain)
    assert torch.equal(lab.draw(lab.model, lab.clip, "a photo of a teddy bear"), plain)
    lab.assert_untouched()
    lab.draw(model, clip)
    lab.forget()
    lab.assert_untouched()
    assert torch.equal(lab.draw(lab.model, lab.clip, "a photo of a teddy bear"), plain)


@pytest.mark.parametrize("lock", LOCKS)
def test_strength_scales_the_edit(lab: Lab, teddy: Any, lock: str) -> None:
    pictures = [lab.draw(*lab.applied(teddy, lock=lock, strength=strength)) for strength in (0.01, 0.5, 1.0)]
    base = lab.draw(lab.model, lab.applied(teddy)[1])
    distances = [float((picture - base).abs().mean()) for picture in pictures]
    assert lock == "global" or 0 < distances[0] < 0.1 * distances[1]
    assert distances[1] < distances[2]


# --- what attention sees ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forms", [("paper", "paper"), ("preserving", "preserving"), ("paper", "preserving")])
@pytest.mark.parametrize("with_lora", [False, True])
def test_attention_receives_the_edited_keys_and_values(lab: Lab, forms: tuple[str, str], with_lora: bool) -> None:
    concepts = [lab.concept(form=forms[0]), lab.concept(CAT, "cat", seed=1, form=forms[1])]
    lora = lab.lora() if with_lora else None
    model, clip = lab.model, lab.clip
    if lora is not None:
        model, clip = lab.with_lora(model, clip, lora)
    stack = lab.stack(*concepts)
    stack.uses[1].gate.__dict__.update(bias=0.5, temperature=0.2, strength=0.7)
    model, clip = lab.host.module("perfusion.hosts.comfyui.combined").apply_concepts(model, clip, stack)
    texts = [lab.encode(clip, BOTH), lab.encode(clip, "blurry")]
    with recorded(model) as (watched, seen):
        lab.sample(watched, *texts, steps=1)
    lab.forget()  # else the weights that are read below already have the LoRA in them
    for layer in LAYERS:
        (call,) = seen[layer]
        owners = word_owners([texts[which] for which in call.cond_or_uncond], stack.uses)
        assert sorted(owners.unique().tolist()) == [-1, 0, 1]
        to_k, to_v = projection_weights(lab.model, layer, lora)
        k = expected_projection(call.context, to_k, stack.uses, [to_k @ c.e_super.double() for c in concepts], owners)
        v = expected_projection(call.context, to_v, stack.uses, [c.o_star_v[layer].double() for c in concepts], owners)
        assert apart(call.k, k) <= 2e-6, layer
        assert apart(call.v, v) <= 2e-6, layer
        unedited = call.context.double() @ to_v.T
        assert different(call.v, unedited), "an edit that changes nothing would prove nothing"


def test_gates_open_on_the_word_and_nowhere_else(lab: Lab, teddy: Any, cat: Any) -> None:
    """Else the tests of this file would test a picture that the concept hardly touches."""
    _, clip = lab.applied(teddy, cat)
    (context, _), *_ = lab.encode(clip, BOTH)
    r, _ = lab.stack(teddy, cat).edit().directions.gates(context)
    tokens = [token for token, _ in clip.tokenize(BOTH)["l"][0]]
    words = [getattr(token, "perfusion_word", (None,))[0] for token in tokens]
    assert r[0, words.index(TEDDY), 0] > 0.8
    assert r[0, words.index(CAT), 1] > 0.8
    others = [m for m, word in enumerate(words) if word is None]
    assert r[0, others].max() < 0.6


# --- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", LOCKS)
def test_lora_before_or_after_apply(lab: Lab, teddy: Any, lock: str) -> None:
    lora = lab.lora()
    before = lab.draw(*lab.apply(*lab.with_lora(lab.model, lab.clip, lora), teddy, lock=lock))
    after = lab.draw(*lab.with_lora(*lab.applied(teddy, lock=lock), lora))
    assert torch.equal(before, after)
    concept_alone = lab.draw(*lab.applied(teddy, lock=lock))
    _, taught = lab.applied(teddy)
    lora_alone = lab.draw(*lab.with_lora(lab.model, taught, lora))
    base = lab.draw(lab.model, taught)
    for a, b in itertools.combinations([before, concept_alone, lora_alone, base], 2):
        assert different(a, b)


@pytest.mark.parametrize("lock", LOCKS)
def test_bypass_lora_before_or_after_apply(lab: Lab, teddy: Any, lock: str) -> None:
    import comfy.sd

    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI has no bypass LoRA")
    lora = lab.lora(text_encoder=False)
    merged = lab.draw(*lab.apply(*lab.with_lora(lab.model, lab.clip, lora), teddy, lock=lock))
    before = lab.apply(*lab.with_bypass_lora(lab.model, lab.clip, lora), teddy, lock=lock)
    after = lab.with_bypass_lora(*lab.applied(teddy, lock=lock), lora)
    for number in range(3):  # the host ejects and injects at every load: the second one must be as good as the first
        assert apart(lab.draw(*before), merged) <= 1e-4, f"before Apply, run {number}"
        assert apart(lab.draw(*after), merged) <= 1e-4, f"after Apply, run {number}"
    base = lab.draw(lab.model, lab.clip, "a photo of a teddy bear")
    del before, after
    lab.forget()
    assert torch.equal(lab.draw(lab.model, lab.clip, "a photo of a teddy bear"), base)
    # What core's bypass leaves behind is a plain bound forward; nothing of ours may be below it.
    for module in lab.model.model.diffusion_model.modules():
        left = vars(module).pop("forward", None)
        assert left is None or getattr(left, "__func__", None) is type(module).forward, left


@pytest.mark.parametrize("lock", LOCKS)
def test_lora_hooks(lab: Lab, teddy: Any, lock: str) -> None:
    """A LoRA that the host swaps in and out per conditioning, between two calls of the network."""
    import comfy.hooks

    lora = lab.lora(text_encoder=False)
    model, clip = lab.applied(teddy, lock=lock)
    hooks = comfy.hooks.create_hook_lora(dict(lora), 1.0, 0.0)
    word, empty = lab.encode(clip, f"a photo of a {TEDDY}"), lab.encode(clip, "")
    merged = lab.sample(lab.with_lora(model, None, lora)[0], word, empty, cfg=1.0)
    plain = lab.sample(model, word, empty, cfg=1.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(word, hooks)
    assert apart(lab.sample(model, hooked, empty, cfg=1.0), merged) <= 1e-5
    assert different(plain, merged)
    assert torch.equal(lab.sample(model, word, empty, cfg=1.0), plain)


# --- clones ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(lab: Lab, teddy: Any, cat: Any) -> dict[str, tuple[Any, Any, torch.Tensor]]:
    """Name -> model, conditioning, the picture it makes when nobody else is there."""
    positive = lab.encode(lab.applied(teddy, cat)[1], BOTH)
    models = {"base": lab.model, "teddy": lab.applied(teddy)[0]}
    models["both"] = lab.apply(models["teddy"], lab.clip, cat)[0]
    negative = lab.encode(lab.clip, "blurry")
    alone = {}
    for name, model in models.items():
        lab.forget()
        alone[name] = (model, (positive, negative), lab.sample(model, positive, negative))
    return alone


@pytest.mark.parametrize("order", list(itertools.permutations(["base", "teddy", "both"])))
def test_clones_are_isolated_in_any_order(lab: Lab, three: dict, order: tuple[str, ...]) -> None:
    for name in (*order, *reversed(order)):
        model, texts, alone = three[name]
        assert torch.equal(lab.sample(model, *texts), alone), name
    pictures = [three[name][2] for name in order]
    assert all(different(a, b) for a, b in itertools.combinations(pictures, 2))


def test_clone_of_a_loaded_model_is_isolated(lab: Lab, three: dict, cat: Any) -> None:
    """The host copies its flag "is injected" with a clone, loaded or not."""
    model, texts, alone = three["teddy"]
    lab.sample(model, *texts)
    clone = model.clone()
    both = lab.apply(model, lab.clip, cat)[0]
    assert torch.equal(lab.sample(clone, *texts), alone)
    assert torch.equal(lab.sample(both, *texts), three["both"][2])
    assert torch.equal(lab.sample(lab.model, *texts), three["base"][2])
    del clone, both
    gc.collect()
    assert torch.equal(lab.sample(model, *texts), alone)


@pytest.mark.parametrize("order", list(itertools.permutations(["loaded", "other", "clone"])))
def test_deleting_clones_in_any_order(lab: Lab, three: dict, teddy: Any, cat: Any, order: tuple[str, ...]) -> None:
    base, texts, alone = three["base"]
    models = {"other": lab.applied(teddy, cat)[0], "loaded": lab.applied(teddy)[0]}
    lab.sample(models["other"], *texts)
    lab.sample(models["loaded"], *texts)
    models["clone"] = models["loaded"].clone()
    for name in order:
        del models[name]
        gc.collect()
        for rest, model in models.items():
            expected = three["both" if rest == "other" else "teddy"][2]
            assert torch.equal(lab.sample(model, *texts), expected), f"{rest} after {name} was deleted"
    assert torch.equal(lab.sample(base, *texts), alone)
    lab.assert_untouched()


@pytest.mark.parametrize("running", ["base", "teddy", "both"])
def test_deleting_a_clone_while_another_samples(lab: Lab, three: dict, teddy: Any, cat: Any, running: str) -> None:
    model, texts, alone = three[running]
    doomed = [lab.applied(teddy, cat)[0], lab.applied(cat)[0]]
    for victim in doomed:
        lab.sample(victim, *texts, steps=1)
    doomed.append(doomed[0].clone())
    watched = model.clone()

    def delete_one(arguments: dict[str, Any]) -> torch.Tensor:
        if doomed:
            doomed.pop()
            gc.collect()
        return arguments["denoised"]

    watched.set_model_sampler_post_cfg_function(delete_one)
    assert torch.equal(lab.sample(watched, *texts), alone)
    assert len(doomed) == 1, "the callback was not called"
    assert torch.equal(lab.sample(model, *texts), alone)


@pytest.mark.parametrize("lock", LOCKS)
def test_apply_twice_is_apply_of_both(lab: Lab, teddy: Any, cat: Any, lock: str) -> None:
    at_once = lab.draw(*lab.applied(teddy, cat, lock=lock), BOTH)
    one_by_one = lab.draw(*lab.apply(*lab.applied(teddy, lock=lock), cat, lock=lock), BOTH)
    assert torch.equal(at_once, one_by_one)
    other_order = lab.draw(*lab.apply(*lab.applied(cat, lock=lock), teddy, lock=lock), BOTH)
    assert apart(other_order, at_once) <= 1e-5


def test_same_word_twice_is_refused(lab: Lab, teddy: Any) -> None:
    model, clip = lab.applied(teddy)
    error = lab.host.module("perfusion.stack").StackError
    with pytest.raises(error, match=TEDDY):
        lab.apply(model, clip, lab.concept(seed=7))
    with pytest.raises(error, match=TEDDY):
        lab.apply(lab.model, clip, lab.concept(seed=7))


def test_near_parallel_concepts_are_refused(lab: Lab, teddy: Any) -> None:
    import dataclasses

    model, clip = lab.applied(teddy)
    twin = dataclasses.replace(teddy, placeholder="<twin>")
    with pytest.raises(lab.host.module("perfusion.edit").ParallelConceptsError, match=f"{TEDDY} and <twin>"):
        lab.apply(model, clip, twin)


def test_concept_of_another_family_is_refused(lab: Lab, teddy: Any) -> None:
    import dataclasses

    family = dataclasses.replace(teddy.family, name="sdxl", context_width=2048)
    wide = {name: torch.ones(2048) for name in ("i_star", "d_star", "e_super")}
    foreign = dataclasses.replace(teddy, family=family, **wide)
    with pytest.raises(lab.host.module("perfusion.stack").StackError, match=f"{TEDDY} does not fit.*Diffusion XL"):
        lab.applied(foreign)


# --- something goes wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("where", ["callback", "attention patch", "interrupt"])
def test_failure_while_sampling_leaves_the_next_run_clean(
    lab: Lab, teddy: Any, plain: torch.Tensor, lock: str, where: str
) -> None:
    import comfy.model_management

    model, clip = lab.applied(replace(teddy, focus=20.0), lock=lock)
    undisturbed = lab.draw(model, clip)
    failing = model.clone()
    at_work, calls, told = failing.get_attachment("perfusion").edit, itertools.count(), []

    def fail(*arguments: Any) -> Any:
        if next(calls) == 1:
            told.extend([at_work.words, at_work.weighed, at_work.key_lock.shift])
            if where == "interrupt":
                comfy.model_management.interrupt_current_processing()
            else:
                raise ZeroDivisionError("on purpose")
        return arguments[0]["denoised"] if len(arguments) == 1 else arguments[:3]

    if where == "attention patch":
        failing.set_model_attn2_patch(fail)
    else:
        failing.set_model_sampler_post_cfg_function(fail)
    error = comfy.model_management.InterruptProcessingException if where == "interrupt" else ZeroDivisionError
    with pytest.raises(error):
        lab.sample(failing, lab.encode(clip, f"a photo of a ({TEDDY}:1.3)"), lab.encode(clip, "blurry"), steps=4)
        comfy.model_management.throw_exception_if_processing_interrupted()
    if where == "attention patch":  # the others come behind a call of the network
        assert [part is not None for part in told] == [True, True, lock == "global"]
    for edit in (model.get_attachment("perfusion").edit, at_work):
        assert edit.key_lock.shift is edit.words is edit.weighed is None
    assert torch.equal(lab.draw(lab.model, lab.clip, "a photo of a teddy bear"), plain)
    assert torch.equal(lab.draw(model, clip), undisturbed)
    del failing
    gc.collect()
    assert torch.equal(lab.draw(model, clip), undisturbed)


@pytest.mark.parametrize("lock", LOCKS)
def test_failure_while_encoding_leaves_the_clip_clean(
    lab: Lab, teddy: Any, monkeypatch: pytest.MonkeyPatch, lock: str
) -> None:
    _, clip = lab.applied(teddy, lock=lock)
    undisturbed = lab.encode(clip, f"a photo of a {TEDDY}")
    stock = lab.encode(lab.clip, "a photo of a teddy bear")

    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(lab.clip.cond_stage_model.clip_l, "encode_token_weights", fail)
        with pytest.raises(ZeroDivisionError):
            lab.encode(clip, f"a photo of a {TEDDY}")
    assert torch.equal(lab.encode(lab.clip, "a photo of a teddy bear")[0][0], stock[0][0])
    assert torch.equal(lab.encode(clip, f"a photo of a {TEDDY}")[0][0], undisturbed[0][0])


def test_a_load_that_fails_does_not_leave_the_model_patched(
    lab: Lab, teddy: Any, plain: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory, for one: the host gives the model up, then injects all the same."""
    model, clip = lab.applied(teddy)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("on purpose")

    lab.forget()
    with monkeypatch.context() as patch:
        patch.setattr(model, "load", fail)
        with pytest.raises(MemoryError):
            lab.draw(model, clip)
    assert torch.equal(lab.draw(lab.model, lab.clip, "a photo of a teddy bear"), plain)
    assert different(lab.draw(model, clip), plain)


# --- batches of conditionings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize(
    ("positive", "negative"),
    [(f"a photo of a {TEDDY}", LONG), (f"a {TEDDY}. {LONG}", "blurry"), (f"{LONG} a {TEDDY}", LONG + LONG)],
    ids=["77 and 154", "154 and 77", "154 and 308"],
)
def test_batched_guidance_equals_one_by_one(
    lab: Lab, teddy: Any, monkeypatch: pytest.MonkeyPatch, lock: str, positive: str, negative: str
) -> None:
    model, clip = lab.applied(teddy, lock=lock)
    texts = lab.encode(clip, positive), lab.encode(clip, negative)
    assert texts[0][0][0].shape[1] != texts[1][0][0].shape[1]
    with recorded(model) as (watched, seen):
        batched = lab.sample(watched, *texts)
    assert {len(call.cond_or_uncond) for call in seen[LAYERS[0]]} == {2}, "they were meant to be batched"
    with monkeypatch.context() as patch:
        patch.setattr(
            lab.model.model,
            "memory_required",
            lambda shape, cond_shapes=None: 0.0 if shape[0] == 1 else 1e30,
            raising=False,
        )
        with recorded(model) as (watched, seen):
            one_by_one = lab.sample(watched, *texts)
    assert {len(call.cond_or_uncond) for call in seen[LAYERS[0]]} == {1}, "they were meant to be separate"
    assert apart(batched, one_by_one) <= 1e-5


def sampled_keys(lab: Lab, model: Any, positive: Any, negative: Any) -> dict[str, list[tuple[Any, Any]]]:
    """Layer -> (keys, values) of the positive conditionings, each on its own."""
    with recorded(model) as (watched, seen):
        lab.sample(watched, positive, negative, steps=1)
    found = {}
    for layer, calls in seen.items():
        found[layer] = [
            (k, v)
            for call in calls
            for k, v, which in zip(call.k, call.v, call.cond_or_uncond, strict=True)
            if which == 0
        ]
    return found


def test_global_lock_reads_keys_from_the_super_category(lab: Lab) -> None:
    """One vector for a super-category of one token: the twin prompt is the one a user would type."""
    cat = lab.concept(CAT, "cat", seed=1)
    model, clip = lab.applied(cat, lock="global")
    text = "a painting of a {} on the moon"
    negative = lab.encode(clip, "blurry")
    concept = sampled_keys(lab, model, lab.encode(clip, text.format(CAT)), negative)
    typed = sampled_keys(lab, lab.model, lab.encode(lab.clip, text.format("cat")), lab.encode(lab.clip, "blurry"))
    own = lab.encode(clip, text.format(CAT))[0][0]
    for layer in LAYERS:
        (k, v), (typed_k, typed_v) = concept[layer][0], typed[layer][0]
        assert apart(k, typed_k) <= 1e-6
        assert different(v, typed_v)
        _, to_v = projection_weights(lab.model, layer)
        uses = lab.stack(cat).uses
        assert close(v, expected_projection(own, to_v, uses, [cat.o_star_v[layer].double()])[0], 2e-6)


def test_local_and_global_locks_together(lab: Lab, teddy: Any, cat: Any) -> None:
    """Two Apply nodes, one lock each: all keys read the twin, and the locally locked word is edited on top of it."""
    model, clip = lab.apply(*lab.applied(teddy, lock="local"), cat, lock="global")
    positive, negative = lab.encode(clip, BOTH), lab.encode(clip, "blurry")
    both = sampled_keys(lab, model, positive, negative)
    locally = sampled_keys(lab, lab.applied(teddy, cat)[0], positive, negative)
    own, twin = positive[0][0].double(), lab.encode(clip, BOTH.replace(CAT, "cat"))[0][0].double()
    uses = [*lab.stack(teddy).uses, *lab.stack(cat, strength=0.0).uses]  # it competes for words, and edits no key
    for layer in LAYERS:
        to_k, _ = projection_weights(lab.model, layer)
        targets = [to_k @ concept.e_super.double() for concept in (teddy, cat)]
        edit = expected_projection(own, to_k, uses, targets, word_owners([positive], uses)) - own @ to_k.T
        k, v = both[layer][0]
        assert apart(k, (twin @ to_k.T + edit)[0]) <= 2e-6
        assert apart(v, locally[layer][0][1]) <= 1e-6


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("how", ["concat", "average", "area", "combine", "zero out"])
@pytest.mark.parametrize("negative", ["blurry", LONG], ids=["short negative", "long negative"])
def test_conditioning_nodes(lab: Lab, teddy: Any, lock: str, how: str, negative: str) -> None:
    """Behind nodes that mix conditionings, a text that came along keeps its keys, and the word keeps its values."""
    model, clip = lab.applied(teddy, lock=lock)
    word, other = lab.encode(clip, f"a {TEDDY} at home"), lab.encode(clip, "a quiet lake at night")
    nodes, below = lab.host.nodes, lab.encode(clip, negative)
    with torch.inference_mode():
        if how == "concat":
            positive = nodes["ConditioningConcat"]().concat(word, other)[0]
        elif how == "average":
            positive = nodes["ConditioningAverage"]().addWeighted(other, word, 1.0)[0]
        elif how == "area":
            positive = word + nodes["ConditioningSetArea"]().append(other, 32, 32, 0, 0, 1.0)[0]
        elif how == "zero out":
            positive = nodes["ConditioningZeroOut"]().zero_out(word)[0]
        else:
            positive = nodes["ConditioningCombine"]().combine(word, other)[0]
    mixed = sampled_keys(lab, model, positive, below)
    other_alone = sampled_keys(lab, model, other, below)
    locally = sampled_keys(lab, lab.applied(teddy, lock="local")[0], positive, below)
    word_alone = sampled_keys(lab, model, word, below)
    for layer in LAYERS:
        (other_k, other_v), (word_k, word_v) = other_alone[layer][0], word_alone[layer][0]
        if how == "concat":
            k, v = mixed[layer][0]
            # Of a concatenation no encoding with the super-category was made: it is locked locally.
            assert apart(k[:154], locally[layer][0][0][:154]) <= 1e-5
            assert apart(v[:77], word_v[:77]) <= 1e-5
            assert apart(v[77:154], other_v[:77]) <= 1e-5
            if lock == "local":
                assert apart(k[77:154], other_k[:77]) <= 1e-5
        elif how == "average":
            assert apart(mixed[layer][0][1], other_v) <= 1e-5
            assert apart(mixed[layer][0][0], other_k) <= 1e-5
        elif how == "zero out":
            k, v = mixed[layer][0]
            assert apart(k, locally[layer][0][0]) <= 1e-5
            assert apart(v, locally[layer][0][1]) <= 1e-5
        else:
            pairs = {0: (word_k, word_v), 1: (other_k, other_v)}
            found = mixed[layer]
            assert len(found) == 2
            for k, v in pairs.values():
                assert any(close(fk, k, 1e-5) and close(fv, v, 1e-5) for fk, fv in found if fk.shape == k.shape)


@pytest.mark.parametrize("lock", LOCKS)
def test_negative_prompt_of_the_stock_clip(lab: Lab, teddy: Any, lock: str) -> None:
    """It has no twin with it, so under global lock the host computes the two one by one."""
    model, clip = lab.applied(teddy, lock=lock)
    positive = lab.encode(clip, f"a photo of a {TEDDY}")
    ours = lab.sample(model, positive, lab.encode(clip, "blurry"))
    stock = lab.sample(model, positive, lab.encode(lab.clip, "blurry"))
    # Without a twin the negative's keys are locked locally, which for a text without the word is almost nothing.
    assert apart(stock, ours) <= (1e-6 if lock == "local" else 0.05)


def test_conditioning_of_a_global_clip_on_the_stock_model(lab: Lab, teddy: Any) -> None:
    _, clip = lab.applied(teddy, lock="global")
    text = "a photo of a teddy bear"
    ours = lab.sample(lab.model, lab.encode(clip, text), lab.encode(clip, "blurry"))
    assert torch.equal(ours, lab.draw(lab.model, lab.clip, text))
