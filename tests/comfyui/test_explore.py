"""Concepts one by one, with schedules and regions; the trade-off and scores: on a miniature of random weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from tests.concepts import CAT, TEDDY, Lab, random_miniature, save_concept
from tests.graphs import node, text_to_image
from tests.hosts import ComfyHost, Prompt, PromptError

pytest.importorskip("diffusers")
pytestmark = [pytest.mark.comfyui, pytest.mark.usefixtures("nothing_left")]

IMAGE, STACK = ("decode", 0), ("one", 0)
SETTINGS = {
    "on": True,
    "strength": 1.0,
    "bias": 0.6,
    "temperature": 0.15,
    "key_lock": "as Apply Concepts",
    "start": 0.0,
    "end": 1.0,
}
BOTH = f"a {TEDDY} beside a {CAT}"


@pytest.fixture(scope="module")
def lab(comfy_host: ComfyHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with random_miniature(comfy_host, tmp_path_factory.mktemp("miniature")) as (lab, _):
        yield lab


@pytest.fixture(scope="module")
def files(lab: Lab) -> list[str]:
    """A teddy and a cat."""
    concepts = [replace(lab.concept(), focus=20.0), lab.concept(CAT, "cat", seed=1)]
    return [save_concept(concept, lab.host.base, f"explore-{k}") for k, concept in enumerate(concepts)]


def one(file: str, **changes: Any) -> dict[str, Any]:
    return node("PerfusionLoadConcept", file=file, **{**SETTINGS, **changes})


def changed(**changes: Any) -> dict[str, Any]:
    return node("PerfusionConceptSettings", **{"word": "", **SETTINGS, **changes})


def drawing(text: str, concepts: list, nodes: Prompt, key_lock: str = "local") -> Prompt:
    """A picture with concepts that come out of one of the nodes."""
    prompt = text_to_image("", text) | {
        "checkpoint": node("PerfusionMiniature"),
        "latent": node("PerfusionMiniatureLatent", width=64, height=64, batch_size=1),
    }
    links = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "concepts": concepts}
    prompt |= {**nodes, "apply": node("PerfusionApplyConcepts", key_lock=key_lock, **links)}
    prompt["sampler"]["inputs"]["model"] = ["apply", 0]
    for name in ("positive", "negative"):
        prompt[name]["inputs"]["clip"] = ["apply", 1]
    return prompt


# --- one by one


@pytest.mark.parametrize("lock", ["local", "global"])
def test_a_chain_draws_what_the_rows_draw(comfy_host: ComfyHost, files: list[str], lock: str) -> None:
    rows = node("PerfusionLoadConcepts", count=2, file_1=files[0], file_2=files[1], bias_1=0.4, strength_2=0.7)
    chain = {
        "one": one(files[0], bias=0.4),
        "two": one(files[1], strength=0.7, key_lock=lock, concepts=["one", 0]),
    }
    expected = comfy_host.execute(drawing(BOTH, ["rows", 0], {"rows": rows}, lock), keep=[IMAGE])[IMAGE]
    assert torch.equal(
        comfy_host.execute(drawing(BOTH, ["two", 0], chain, lock), keep=[IMAGE])[IMAGE],
        expected,
    )
    settings = {"rows": node("PerfusionLoadConcepts", count=2, file_1=files[0], file_2=files[1])}
    settings["one"] = changed(word=TEDDY, bias=0.4, concepts=["rows", 0])
    settings["two"] = changed(word=CAT.upper(), strength=0.7, concepts=["one", 0])
    assert torch.equal(
        comfy_host.execute(drawing(BOTH, ["two", 0], settings, lock), keep=[IMAGE])[IMAGE],
        expected,
    )


def test_a_lock_of_its_own_is_not_overruled(comfy_host: ComfyHost, files: list[str]) -> None:
    def image(own: str, applied: str) -> torch.Tensor:
        prompt = drawing(BOTH, ["one", 0], {"one": one(files[0], key_lock=own)}, applied)
        return comfy_host.execute(prompt, keep=[IMAGE])[IMAGE]

    assert torch.equal(image("global", "local"), image("as Apply Concepts", "global"))
    assert not torch.equal(image("global", "local"), image("local", "local"))


def test_off_is_as_if_it_were_not_there(comfy_host: ComfyHost, files: list[str]) -> None:
    stack = comfy_host.execute({"one": one("gone.safetensors", on=False)}, keep=[STACK])[STACK]
    assert len(stack) == 0
    chain = {"two": one(files[1]), "one": changed(word=CAT, on=False, concepts=["two", 0])}
    assert len(comfy_host.execute(chain, keep=[STACK])[STACK].active) == 0


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ({"one": one("gone.safetensors")}, "Load Concept, input 'file': there is no concept file 'gone.safetensors'"),
        ({"one": one("../a.safetensors")}, "Load Concept, input 'file': there is no concept file"),
        (
            {"one": one("explore-0.safetensors", start=0.8, end=0.2)},
            "Load Concept: <my-teddy> would be from 0.8 to 0.2",
        ),
        (
            {"two": one("explore-0.safetensors"), "one": one("explore-0.safetensors", concepts=["two", 0])},
            "Load Concept: two concepts share the word <my-teddy>",
        ),
        (
            {"two": one("explore-0.safetensors"), "one": changed(word="<dog>", concepts=["two", 0])},
            "Concept Settings, input 'word': there is no concept <dog> among those that arrive: <my-teddy>",
        ),
        (
            {
                "mask": node("SolidMask", value=0.0, width=8, height=8),
                "one": one("explore-0.safetensors", region=["mask", 0]),
            },
            "Load Concept.*region of <my-teddy> is empty",
        ),
    ],
)
def test_bad_settings(comfy_host: ComfyHost, files: list[str], nodes: Prompt, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        comfy_host.execute(nodes, keep=[STACK])


# --- schedules


def at(lab: Lab, stack: Any, model: Any = None) -> tuple[Any, Any]:
    combined = lab.host.module("perfusion.hosts.comfyui.combined")
    return combined.apply_concepts(model or lab.model, lab.clip, stack)


def scheduled(lab: Lab, **settings: Any) -> Any:
    stack = lab.host.module("perfusion.stack")
    return stack.ConceptStack((stack.ConceptUse(lab.concept(), **settings),))


def in_two_parts(lab: Lab, first: Any, second: Any, clip: Any, switch: int) -> torch.Tensor:
    """Latents of a sampling that goes on with another model after some steps."""
    advanced = lab.host.nodes["KSamplerAdvanced"]().sample
    texts = lab.encode(clip, f"a photo of a {TEDDY}"), lab.encode(clip, "blurry")
    latent: Any = {"samples": torch.zeros(1, 4, 8, 8)}
    with torch.inference_mode():
        for model, noise, start, end in ((first, "enable", 0, switch), (second, "disable", switch, 1000)):
            more = "enable" if end == switch else "disable"
            (latent,) = advanced(model, noise, 0, 4, 4.0, "euler", "normal", *texts, latent, start, end, more)
    return latent["samples"]


@pytest.mark.parametrize("lock", ["local", "global"])
@pytest.mark.parametrize("late", [False, True])
def test_a_schedule_is_sampling_in_two_parts(lab: Lab, lock: Any, late: bool) -> None:
    """0.5 of sampling lies between the steps of the second and third noise level."""
    always, clip = at(lab, scheduled(lab, lock=lock))
    part, _ = at(lab, scheduled(lab, lock=lock, **({"start": 0.5} if late else {"end": 0.5})))
    sampling = lab.model.get_model_object("model_sampling")
    import comfy.samplers

    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 4)
    switch = sum(float(sigma) > sampling.percent_to_sigma(0.5) for sigma in sigmas[:-1])
    assert 0 < switch < 4
    models = (lab.model, always) if late else (always, lab.model)
    text, negative = lab.encode(clip, f"a photo of a {TEDDY}"), lab.encode(clip, "blurry")
    found = lab.sample(part, text, negative, steps=4)
    assert torch.allclose(found, in_two_parts(lab, *models, clip, switch), atol=1e-5)
    assert not torch.allclose(found, lab.sample(always, text, negative, steps=4), atol=1e-3)
    assert torch.equal(found, lab.sample(part, text, negative, steps=4)), "queued again"


def drawn(lab: Lab, model: Any, text: Any, negative: Any) -> torch.Tensor:
    """Latents of two steps, at the beginning of sampling and in its middle."""
    return lab.sample(model, text, negative, scheduler="simple")


def test_outside_its_schedule_the_network_is_the_host_s_own_bit_for_bit(lab: Lab) -> None:
    part, clip = at(lab, scheduled(lab, start=0.9))
    text, negative = lab.encode(clip, f"a photo of a {TEDDY}"), lab.encode(clip, "blurry")
    assert torch.equal(drawn(lab, part, text, negative), drawn(lab, lab.model, text, negative))


def test_of_two_concepts_one_may_leave(lab: Lab) -> None:
    stack = lab.host.module("perfusion.stack")
    teddy, cat = lab.concept(), lab.concept(CAT, "cat", seed=1)
    both = stack.ConceptStack((stack.ConceptUse(teddy), stack.ConceptUse(cat, start=0.9)))
    model, clip = at(lab, both)
    text, negative = lab.encode(clip, BOTH), lab.encode(clip, "blurry")
    # Its word stays its own: the other does not take it.
    apply, shut = lab.host.module("perfusion.hosts.comfyui.apply"), lab.model.clone()
    apply.attach(shut, apply.Applied(stack.ConceptStack((stack.ConceptUse(teddy), stack.ConceptUse(cat).shut()))))
    assert torch.equal(drawn(lab, model, text, negative), drawn(lab, shut, text, negative))


# --- focus


def focused(lab: Lab, **use: Any) -> Any:
    stack = lab.host.module("perfusion.stack")
    return stack.ConceptStack((stack.ConceptUse(replace(lab.concept(), focus=20.0), **use),))


def test_a_focus_looks_more_at_the_word_and_leaves_other_extensions_in_work(lab: Lab) -> None:
    model, clip = at(lab, focused(lab))
    watched, masks = model.clone(), Masks()
    watched.model_options["transformer_options"] = {"optimized_attention_override": masks}
    text, negative = lab.encode(clip, f"a photo of a {TEDDY}"), lab.encode(clip, "blurry")
    found = lab.sample(watched, text, negative)
    given = [(places, mask) for places, mask in masks.seen if mask is not None]
    # It is asked once whether it takes masks.
    assert {places for places, _ in given} == {64, 16} and len(given) * 2 == len(masks.seen) - 1
    by_place = [mask.shape[1] == places for places, mask in given]
    assert not by_place[0] and by_place == sorted(by_place) and all(by_place[len(given) // 2 :]), "once they are known"
    for _, mask in given:
        words = sorted(mask.abs().amax(1).count_nonzero(dim=1).tolist())
        assert words == [0, 1], "the word of the prompt, none of the negative prompt"
        assert 2 < float(mask.abs().max()) <= math.log(20)
    assert torch.equal(found, lab.sample(model, text, negative))
    assert not torch.allclose(found, lab.sample(at(lab, scheduled(lab))[0], text, negative), atol=1e-2)


def test_attention_that_leaves_masks_out_does_not_lose_a_focus(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    """As fast kernels do that other extensions put in place."""
    caplog.set_level("INFO")
    model, clip = at(lab, focused(lab))
    text, negative = lab.encode(clip, f"a photo of a {TEDDY}"), lab.encode(clip, "blurry")
    calls = []

    def fast(func: Any, q: Any, k: Any, v: Any, heads: int, mask: Any = None, **kwargs: Any) -> Any:
        calls.append(mask)
        return func(q, k, v, heads, mask=None, **kwargs)

    def careful(func: Any, *args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs)

    expected = lab.sample(model, text, negative)
    for attention, told in ((careful, False), (fast, True)):
        patched = model.clone()
        patched.model_options["transformer_options"] = {"optimized_attention_override": attention}
        caplog.clear()
        assert torch.equal(lab.sample(patched, text, negative), expected)
        assert caplog.text.count("leaves masks out") == told
    assert sum(mask is not None for mask in calls) == 1, "once it is known, it is not asked again"
    assert len(calls) > 2, "attention without masks stays its own"


def test_a_focus_has_its_share_and_its_schedule(lab: Lab) -> None:
    gate = lab.host.module("perfusion.edit").Gate
    clip = at(lab, focused(lab))[1]
    text, negative = lab.encode(clip, f"a photo of a {TEDDY}"), lab.encode(clip, "blurry")
    whole, half, none, plain = (
        lab.sample(at(lab, stack)[0], text, negative)
        for stack in (
            focused(lab),
            focused(lab, gate=gate(focus_share=0.5)),
            focused(lab, gate=gate(focus_share=0.0)),
            scheduled(lab),
        )
    )
    assert torch.equal(none, plain)
    assert not torch.allclose(whole, half, atol=1e-3) and not torch.allclose(half, none, atol=1e-3)
    part = at(lab, focused(lab, start=0.9))[0]
    assert torch.equal(drawn(lab, part, text, negative), drawn(lab, lab.model, text, negative))


def focused_pair(lab: Lab) -> Any:
    stack, opened = lab.host.module("perfusion.stack"), lab.host.module("perfusion.edit").Gate(bias=-3.0)
    concepts = lab.concept(), lab.concept(CAT, "cat", seed=1)
    return stack.ConceptStack(tuple(stack.ConceptUse(replace(each, focus=20.0), opened) for each in concepts))


def test_words_of_several_concepts_are_looked_at_by_place(lab: Lab) -> None:
    model, clip = at(lab, focused_pair(lab))
    watched, masks = model.clone(), Masks()
    watched.model_options["transformer_options"] = {"optimized_attention_override": masks}
    text, negative = lab.encode(clip, BOTH), lab.encode(clip, "blurry")
    found = lab.sample(watched, text, negative)
    given = [(places, mask) for places, mask in masks.seen if mask is not None]
    by_place = [mask.shape[1] == places for places, mask in given]
    layers = by_place.count(False)
    assert by_place[:1] == [False] and all(by_place[layers:]), "nothing is known only where the first step begins"
    last = given[-1][1]
    assert float(last.max()) > 1 and float(last.min()) < -1, "what is looked at more here is so less there"
    named = last.amax(1) > 0.1
    assert sorted(named.sum(1).tolist()) == [0, 2], "both words of the prompt, none of the negative prompt"
    assert torch.equal(found, lab.sample(model, text, negative)), "and a sampling knows nothing of the one before"
    # Each of several prompts at a time has its own places.
    one = lab.encode(clip, f"a {CAT} and a {TEDDY} in the snow")
    several = lab.sample(model, text + one, negative)
    assert torch.equal(several, lab.sample(model, text + one, negative))
    lab.sample(model, text, negative)
    assert torch.equal(found, lab.sample(model, text, negative))


@pytest.mark.parametrize("count", [1, 2])
def test_a_weight_says_how_much_a_word_is_looked_at(lab: Lab, count: int) -> None:
    """At all places alike, whatever else is there of regions; where nothing is told of weights, nothing changes."""
    stack = lab.host.module("perfusion.stack")
    uses = focused_pair(lab).uses[:count]
    of_masks, found = [], []
    half = torch.zeros(8, 8)
    half[:, :4] = 1
    for region in (None, half):
        model, clip = at(lab, stack.ConceptStack((replace(uses[0], region=region), *uses[1:])))
        for word, is_told in ((TEDDY, True), (TEDDY, False), (f"({TEDDY}:1.4)", True)):
            watched, masks = model.clone(), Masks()
            watched.model_options["transformer_options"] = {"optimized_attention_override": masks}
            text, negative = lab.encode(clip, BOTH.replace(TEDDY, word)), lab.encode(clip, "blurry")
            for conditioning in () if is_told else (text, negative):
                del conditioning[0][1]["model_conds"]["perfusion_weighed"]
            found.append(lab.sample(watched, text, negative))
            of_masks.append(next(mask for _, mask in masks.seen if mask is not None))
    for plain, untold, loud in (found[:3], found[3:]):
        assert torch.equal(plain, untold) and not torch.allclose(plain, loud, atol=1e-4)
    for plain, untold, loud in (of_masks[:3], of_masks[3:]):
        assert torch.equal(plain, untold)
        changed = (loud - plain).nan_to_num()
        assert changed.max() == pytest.approx(math.log(1.4), abs=1e-3) and changed.min() == 0
        assert len(changed.flatten(0, 1).amax(0).nonzero()) == 1, "of one token"


def test_what_is_drawn_in_windows_has_no_places_of_others(lab: Lab) -> None:
    """Context windows hand over some pictures of a batch at a time, under the same names."""
    model, clip = at(lab, focused_pair(lab))
    text, negative = lab.encode(clip, BOTH), lab.encode(clip, "blurry")

    def in_windows(apply: Any, given: Any) -> torch.Tensor:
        parts, rows = [], len(given["input"]) // 2
        for window in (slice(0, 2), slice(2, 3)):
            index = [k * rows + n for k in range(2) for n in range(rows)[window]]
            c = {k: v[index] if isinstance(v, torch.Tensor) else v for k, v in given["c"].items()}
            parts.append(apply(given["input"][index], given["timestep"][index], **c).chunk(2))
        return torch.cat([torch.cat([part[k] for part in parts]) for k in range(2)])

    windowed = model.clone()
    windowed.set_model_unet_function_wrapper(in_windows)
    assert lab.sample(windowed, text, negative, count=3).isfinite().all()


def test_clones_that_the_host_makes_in_a_sampling_share_it(lab: Lab) -> None:
    """As it does for several GPUs."""
    model, clip = at(lab, focused_pair(lab))
    key, shared = lab.host.module("perfusion.hosts.comfyui.text").KEY, []
    watched = model.clone()

    def cloned(apply: Any, given: Any) -> torch.Tensor:
        sampling = watched.get_attachment(key).sampling
        shared.append(sampling is not None and watched.clone().get_attachment(key).sampling is sampling)
        return apply(given["input"], given["timestep"], **given["c"])

    watched.set_model_unet_function_wrapper(cloned)
    lab.sample(watched, lab.encode(clip, BOTH), lab.encode(clip, "blurry"))
    assert shared and all(shared)
    assert watched.get_attachment(key).sampling is watched.clone().get_attachment(key).sampling is None


def test_a_concept_with_a_region_does_not_compete_for_places(lab: Lab) -> None:
    stack = lab.host.module("perfusion.stack")
    half = torch.zeros(8, 8)
    half[:, :4] = 1
    teddy, cat = focused_pair(lab).uses
    model, clip = at(lab, stack.ConceptStack((replace(teddy, region=half), cat)))
    watched, masks = model.clone(), Masks()
    watched.model_options["transformer_options"] = {"optimized_attention_override": masks}
    lab.sample(watched, lab.encode(clip, BOTH), lab.encode(clip, "blurry"))
    last = next(mask for places, mask in reversed(masks.seen) if mask is not None and places == 64)
    row = last[last.amax((1, 2)) > 1][0].view(8, 8, -1)
    words = [token for token in range(row.shape[-1]) if float(row[..., token].max()) > 1]
    assert len(words) == 2
    regional, free = sorted(words, key=lambda token: float(row[..., token].min()))
    assert float(row[:, :4, regional].min()) > 1 and float(row[:, 4:, regional].max()) < -1
    assert float(row[..., free].min()) < 0, "the other has the places that it asks for"


def test_blocks_that_others_do_in_their_own_way_are_told_of(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    model, clip = at(lab, focused(lab))
    text, negative = lab.encode(clip, f"a photo of a {TEDDY}"), lab.encode(clip, "blurry")
    plain = at(lab, scheduled(lab))[0]
    others = []
    for patcher in (model.clone(), plain.clone()):
        for place in product(("input", "middle", "output"), range(12)):
            patcher.set_model_attn2_replace(lambda q, k, v, extra: v.mean(1, keepdim=True).expand_as(q), *place)
        with caplog.at_level("INFO"):
            others.append(lab.sample(patcher, text, negative))
    assert caplog.text.count("focus and regions are left out there") == 1
    assert torch.allclose(*others, atol=1e-5), "nothing of it gets into the attention of other layers"


@pytest.mark.parametrize("kernel", ["attention_sage", "attention3_sage", "attention_flash"])
def test_kernels_that_drop_masks_are_not_given_any(lab: Lab, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.ldm.modules.attention as attention

    model, clip = at(lab, focused(lab))
    texts = lab.encode(clip, f"a photo of a {TEDDY}"), lab.encode(clip, "blurry")
    expected = lab.sample(model, *texts)
    plain, calls = attention.attention_pytorch, []

    def dropping(q: Any, k: Any, v: Any, heads: int, mask: Any = None, **kwargs: Any) -> Any:
        calls.append(mask)
        return plain(q, k, v, heads, **kwargs)

    dropping.__name__ = kernel
    monkeypatch.setattr(attention, "optimized_attention", attention.wrap_attn(dropping))
    assert torch.allclose(lab.sample(model, *texts), expected, atol=1e-4)
    assert calls and not [mask for mask in calls if mask is not None]


# --- regions


def left(size: int = 8) -> torch.Tensor:
    mask = torch.zeros(size, size)
    mask[:, : size // 2] = 1
    return mask


class Masks:
    """Another extension's attention, which writes down the masks it is given."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Any]] = []

    def __call__(self, chosen: Any, q: Any, k: Any, v: Any, heads: int, *args: Any, **kwargs: Any) -> Any:
        mask = args[0] if args else kwargs.get("mask")
        self.seen.append((q.shape[1], mask))
        return chosen(q, k, v, heads, *args, **kwargs)


def test_a_region_keeps_the_word_inside_and_other_extensions_in_work(lab: Lab) -> None:
    model, clip = at(lab, scheduled(lab, region=left()))
    watched, masks, patched = model.clone(), Masks(), []
    options = watched.model_options["transformer_options"] = dict(watched.model_options.get("transformer_options", {}))
    options["optimized_attention_override"] = masks
    watched.set_model_attn2_patch(lambda n, context, value, extra: (patched.append(1), (n, context, value))[1])
    text, negative = lab.encode(clip, f"a photo of a {TEDDY}"), lab.encode(clip, "blurry")
    lab.sample(watched, text, negative)
    assert patched
    given = [(places, mask) for places, mask in masks.seen if mask is not None]
    # It is asked once whether it takes masks.
    assert {places for places, _ in given} == {64, 16} and len(given) * 2 == len(masks.seen) - 1
    for places, mask in given:
        side = int(places**0.5)
        mask = mask.view(2, side, side, -1)
        outside = mask[:, :, side // 2 :].amin(dim=(1, 2))
        assert torch.equal(mask[:, :, : side // 2], torch.zeros_like(mask[:, :, : side // 2]))
        words = (outside < -9).sum(dim=1)
        assert sorted(words.tolist()) == [0, 1], "the word of the prompt, none of the negative prompt"


@pytest.mark.parametrize("bias", [0.9, 1.5, -0.5])
def test_a_region_holds_whatever_the_bias(lab: Lab, bias: float) -> None:
    gate = lab.host.module("perfusion.edit").Gate(bias=bias)
    model, clip = at(lab, scheduled(lab, region=left(), gate=gate))
    watched, masks = model.clone(), Masks()
    watched.model_options["transformer_options"] = {"optimized_attention_override": masks}
    lab.sample(watched, lab.encode(clip, f"a photo of a {TEDDY}"), lab.encode(clip, "blurry"), steps=1)
    outside = [
        mask.view(2, 8, 8, -1)[:, :, 4:].amin(dim=(1, 2))
        for places, mask in masks.seen
        if places == 64 and mask is not None
    ]
    assert outside and all(sorted((words < -9).sum(dim=1).tolist()) == [0, 1] for words in outside)


def test_areas_know_no_region_and_say_so(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    model, clip = at(lab, scheduled(lab, region=left()))
    free, _ = at(lab, scheduled(lab))
    area = lab.host.nodes["ConditioningSetArea"]().append
    text, negative = area(lab.encode(clip, f"a {TEDDY}"), 32, 64, 0, 0, 1.0)[0], lab.encode(clip, "blurry")
    found = lab.sample(model, text + negative, negative)
    assert "Regions are left out where a conditioning has an area" in caplog.text
    assert torch.allclose(found, lab.sample(free, text + negative, negative), atol=1e-4)


def test_a_region_of_the_whole_picture_changes_nothing_and_a_part_does(lab: Lab) -> None:
    clip = at(lab, scheduled(lab))[1]
    text, negative = lab.encode(clip, f"a photo of a {TEDDY}"), lab.encode(clip, "blurry")
    free, whole, part = (
        lab.sample(at(lab, scheduled(lab, region=region))[0], text, negative)
        for region in (None, torch.ones(3, 3), left())
    )
    assert torch.allclose(free, whole, atol=1e-4)
    assert not torch.allclose(free, part, atol=1e-2)


def test_failing_inside_a_schedule_and_a_region_leaves_nothing(lab: Lab) -> None:
    model, clip = at(lab, scheduled(lab, end=0.9, region=left()))
    text, negative = lab.encode(clip, f"a photo of a {TEDDY}"), lab.encode(clip, "blurry")
    undisturbed = lab.sample(model, text, negative)
    failing = model.clone()

    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("on purpose")

    failing.set_model_attn2_patch(fail)
    with pytest.raises(ZeroDivisionError):
        lab.sample(failing, text, negative)
    for each in (model, failing):
        owner = each.get_attachment("perfusion")
        assert owner.edit is owner.edit_of((True,))
    assert torch.equal(lab.sample(model, text, negative), undisturbed)


# --- the trade-off


def exploring(**changes: Any) -> Prompt:
    inputs = {
        **{name: ["checkpoint", k] for k, name in enumerate(("model", "clip", "vae"))},
        "concepts": ["one", 0],
        "latent": ["latent", 0],
        "prompt": f"a photo of a {TEDDY} on the beach",
        "negative": "blurry",
        "bias": "0.3, 0.9",
        "temperature": "0.1, 0.3",
        "strength": "",
        "key_lock": "local",
        "guidance": "",
        "word": "",
        "seed": 3,
        "steps": 2,
        "cfg": 4.0,
        "sampler_name": "euler",
        "scheduler": "normal",
    }
    return {
        "checkpoint": node("PerfusionMiniature"),
        "one": one("explore-0.safetensors"),
        "latent": node("PerfusionMiniatureLatent", width=64, height=64, batch_size=2),
        "photos": node("PerfusionMiniaturePhotos", category="teddy bear", thing=28, count=2, seed=0),
        "explore": node("PerfusionTradeOff", **{**inputs, **changes}),
    }


SCORED = {"clip_vision": ["checkpoint", 3], "photos": ["photos", 0]}
SHEET, PLOT, IMAGES, FOUND, REPORT = (("explore", k) for k in range(5))


def by_hand(host: ComfyHost, bias: float, temperature: float, lock: str, cfg: float = 4.0) -> torch.Tensor:
    prompt = drawing(
        f"a photo of a {TEDDY} on the beach",
        ["one", 0],
        {"one": one("explore-0.safetensors", bias=bias, temperature=temperature)},
        lock,
    )
    prompt["latent"]["inputs"]["batch_size"] = 2
    prompt["sampler"]["inputs"] |= {"seed": 3, "cfg": cfg}
    return host.execute(prompt, keep=[IMAGE])[IMAGE]


@pytest.mark.any_host
def test_cells_are_what_apply_and_ksampler_draw(comfy_host: ComfyHost, files: list[str]) -> None:
    run = comfy_host.execute(exploring(key_lock="both", guidance="2, 4"), keep=[IMAGES, FOUND, SHEET, PLOT, REPORT])
    settings = [trial.setting for trial in run[FOUND].trials]
    assert len(settings) == 16 and run[IMAGES].shape == (32, 64, 64, 3)
    for number in (0, 1, 2, 7, 8, 15):
        cell = settings[number]
        expected = by_hand(comfy_host, cell.bias, cell.temperature, cell.lock, cell.guidance)
        assert torch.allclose(run[IMAGES][2 * number : 2 * number + 2], expected, atol=2e-3), cell
    assert not torch.allclose(run[IMAGES][0], run[IMAGES][2], atol=1e-2), "settings make a difference"
    assert run[SHEET].ndim == run[PLOT].ndim == 4
    assert run[REPORT].splitlines()[0].split() == ["bias", "temperature", "lock", "guidance"]
    assert len(run.ui["explore"]["images"]) == 2


@pytest.mark.any_host
def test_cells_have_their_shares_of_the_focus(comfy_host: ComfyHost, files: list[str]) -> None:
    prompt = exploring(bias="0.4, 0.6", temperature="0.15", focus_share="0, 1", **SCORED)
    prompt["one"]["inputs"]["focus_share"] = 0.0  # what is not tried makes no difference to what is
    prompt["pick"] = node("PerfusionPickTradeOff", trade_off=["explore", 3], rule="harmonic mean", least_text=0.25)
    picked, share = ("pick", 0), ("pick", 7)
    run = comfy_host.execute(prompt, keep=[IMAGES, FOUND, REPORT, picked, share])
    settings = [trial.setting for trial in run[FOUND].trials]
    assert [(setting.bias, setting.focus_share) for setting in settings] == [(0.4, 0), (0.6, 0), (0.4, 1), (0.6, 1)]
    assert run[REPORT].splitlines()[0].split()[:2] == ["bias", "focus_share"]
    for number, setting in enumerate(settings):
        use = one("explore-0.safetensors", bias=setting.bias, focus_share=setting.focus_share)
        drawn = drawing(f"a photo of a {TEDDY} on the beach", ["one", 0], {"one": use})
        drawn["latent"]["inputs"]["batch_size"] = 2
        drawn["sampler"]["inputs"] |= {"seed": 3, "cfg": 4.0}
        expected = comfy_host.execute(drawn, keep=[IMAGE])[IMAGE]
        assert torch.allclose(run[IMAGES][2 * number : 2 * number + 2], expected, atol=2e-3), setting
    assert not torch.allclose(run[IMAGES][0], run[IMAGES][4], atol=1e-2), "the focus makes a difference"
    chosen = max(run[FOUND].trials, key=lambda trial: trial.harmonic).setting
    assert run[share] == chosen.focus_share == run[picked].uses[0].gate.focus_share


@pytest.mark.any_host
def test_scores_and_what_is_picked(comfy_host: ComfyHost, files: list[str]) -> None:
    prompt = exploring(**SCORED)
    prompt["pick"] = node("PerfusionPickTradeOff", trade_off=["explore", 3], rule="harmonic mean", least_text=0.25)
    outputs = [("pick", k) for k in range(7)]
    run = comfy_host.execute(prompt, keep=[FOUND, IMAGES, *outputs])
    trials = run[FOUND].trials
    assert all(-1 <= trial.image <= 1 and -1 <= trial.text <= 1 for trial in trials)
    stack, cfg, bias, temperature, strength, images, report = (run[output] for output in outputs)
    chosen = max(trials, key=lambda trial: trial.harmonic)
    assert (bias, temperature, strength, cfg) == (chosen.setting.bias, chosen.setting.temperature, 1.0, 4.0)
    assert torch.equal(images, chosen.pictures)
    assert [(use.gate.bias, use.gate.temperature) for use in stack.uses] == [(bias, temperature)]
    assert f"bias {bias:g}" in report
    drawn = by_hand(comfy_host, bias, temperature, "local")
    assert torch.allclose(drawn, images, atol=2e-3)
    score = {"images": ["pick", 5], "clip_vision": ["checkpoint", 3], "score_clip": ["checkpoint", 1]}
    prompt["score"] = node(
        "PerfusionScore", **score, photos=["photos", 0], prompt="a photo of a teddy bear on the beach"
    )
    told = comfy_host.execute(prompt, keep=[("score", 0), ("score", 1), ("score", 2)])
    assert told["score", 0] == pytest.approx(chosen.image, abs=1e-4)
    assert told["score", 1] == pytest.approx(chosen.text, abs=1e-4)
    assert told["score", 2] == pytest.approx(chosen.harmonic, abs=1e-4)


@pytest.mark.any_host
def test_too_much_for_memory_is_drawn_in_parts(
    comfy_host: ComfyHost, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management
    import comfy.sample

    expected = comfy_host.execute(exploring(), keep=[IMAGES])[IMAGES]
    comfy_host.new_executor()
    sample, sizes = comfy.sample.sample, []

    def small(model: Any, noise: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(noise))
        if len(noise) > 2:
            raise comfy.model_management.OOM_EXCEPTION("on purpose")
        return sample(model, noise, *args, **kwargs)

    monkeypatch.setattr(comfy.sample, "sample", small)
    found = comfy_host.execute(exploring(), keep=[IMAGES])[IMAGES]
    assert sizes == [4, 2, 2, 2, 2]
    assert torch.allclose(found, expected, atol=2e-3)


def test_canceled_it_stops_at_the_next_step(
    comfy_host: ComfyHost, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management

    exploring_module = comfy_host.module("perfusion.hosts.comfyui.exploring")
    calls = []

    def cancel(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            comfy.model_management.interrupt_current_processing()
        return own(self, *args)

    own = exploring_module.TradeOffDrawing._sampled
    monkeypatch.setattr(exploring_module.TradeOffDrawing, "_sampled", cancel)
    comfy_host.new_executor()
    with pytest.raises(PromptError):
        comfy_host.execute(exploring(bias="0.1:0.9:9"), keep=[IMAGES])
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "0:1:1000"}, "Trade-Off: this grid has 2,000 cells .* would take 4,000 pictures; at most 100 cells"),
        ({"bias": "much"}, "Trade-Off, input 'bias': 'much' is no list of numbers"),
        ({"temperature": "0"}, "Trade-Off, input 'temperature': '0': numbers must lie between 0.01 and 1"),
        ({"word": "<dog>"}, "Trade-Off, input 'word': there is no concept <dog>"),
        ({"clip_vision": ["checkpoint", 3]}, "Trade-Off, input 'photos': connect the photos"),
        ({"concepts": ["off", 0]}, "Trade-Off, input 'concepts': no concept arrives that is on"),
    ],
)
def test_bad_trade_offs(comfy_host: ComfyHost, files: list[str], changes: dict[str, Any], message: str) -> None:
    prompt = exploring(**changes)
    prompt["off"] = one("explore-0.safetensors", on=False)
    with pytest.raises(PromptError, match=message):
        comfy_host.execute(prompt, keep=[IMAGES])


@pytest.mark.any_host
def test_nothing_scored_is_nothing_to_pick(comfy_host: ComfyHost, files: list[str]) -> None:
    prompt = exploring()
    prompt["pick"] = node("PerfusionPickTradeOff", trade_off=["explore", 3], rule="knee", least_text=0.25)
    with pytest.raises(PromptError, match="Pick Trade-Off, input 'trade_off': this trade-off has no scores"):
        comfy_host.execute(prompt, keep=[("pick", 0)])


# --- scores


def scoring(**inputs: Any) -> Prompt:
    return {
        "checkpoint": node("PerfusionMiniature"),
        "photos": node("PerfusionMiniaturePhotos", category="teddy bear", thing=28, count=3, seed=0),
        "score": node("PerfusionScore", images=["photos", 0], clip_vision=["checkpoint", 3], **inputs),
    }


@pytest.mark.any_host
def test_pictures_are_most_like_themselves(comfy_host: ComfyHost, lab: Lab) -> None:
    prompt = scoring(photos=["photos", 0], score_clip=["checkpoint", 1], prompt="a\nb\nc")
    run = comfy_host.execute(prompt, keep=[("score", k) for k in range(4)])
    assert 0 < run["score", 0] <= 1 and -1 <= run["score", 1] <= 1
    rows = run["score", 3].splitlines()
    assert rows[0].split() == ["picture", "image", "text"] and [row.split()[0] for row in rows[1:]] == ["1", "2", "3"]
    only = comfy_host.execute(scoring(photos=["photos", 0]), keep=[("score", k) for k in range(3)])
    assert only["score", 0] == pytest.approx(run["score", 0]) and only["score", 1] == only["score", 2] == 0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "Score: connect photos, or score_clip and a prompt"),
        ({"prompt": "a cat"}, "Score, input 'score_clip': connect the text encoder"),
        (
            {"prompt": "a\nb", "score_clip": ["checkpoint", 1]},
            "Score, input 'prompt': there are 2 texts for 3 pictures",
        ),
    ],
)
def test_bad_scores(comfy_host: ComfyHost, lab: Lab, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        comfy_host.execute(scoring(**inputs), keep=[("score", 0)])
