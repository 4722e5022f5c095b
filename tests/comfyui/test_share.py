"""Concepts inside workflows, what saved files tell, and inspected prompts, on a miniature of random weights."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from PIL import Image

from tests.concepts import CAT, TEDDY, Lab, random_miniature, save_concept
from tests.graphs import node, text_to_image
from tests.hosts import ComfyHost, Prompt, PromptError, Run
from tests.models import miniature_parts

pytest.importorskip("diffusers")
pytestmark = [pytest.mark.comfyui, pytest.mark.usefixtures("nothing_left")]

IMAGE, STACK = ("decode", 0), ("embed", 0)
CONNECTED = "connected, else embedded"
CHECKPOINT = node("PerfusionMiniature")


@pytest.fixture(scope="module")
def lab(comfy_host: ComfyHost, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with random_miniature(comfy_host, tmp_path_factory.mktemp("miniature")) as (lab, _):
        yield lab


@pytest.fixture(scope="module")
def files(lab: Lab) -> list[str]:
    """A teddy and a cat."""
    concepts = [lab.concept(), lab.concept(CAT, "cat", seed=1, vectors=2, form="preserving")]
    return [save_concept(concept, lab.host.base, f"share-{k}") for k, concept in enumerate(concepts)]


def embedding(data: str = "", use: str = CONNECTED, concepts: list | None = None) -> dict[str, Any]:
    links = {} if concepts is None else {"concepts": concepts}
    return node("PerfusionEmbedConcept", use=use, data=data, **links)


def loading(*files: str, **settings: Any) -> dict[str, Any]:
    rows = {f"file_{number}": name for number, name in enumerate(files, start=1)}
    return node("PerfusionLoadConcepts", count=len(files), **rows, **settings)


def plain_drawing(text: str) -> Prompt:
    return text_to_image("", text) | {
        "checkpoint": CHECKPOINT,
        "latent": node("PerfusionMiniatureLatent", width=64, height=64, batch_size=1),
    }


def drawing(embed: dict[str, Any]) -> Prompt:
    """A picture of both concepts, which come out of Embed Concept."""
    prompt = plain_drawing(f"a {TEDDY} beside a ({CAT}:1.2)")
    links = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "concepts": ["embed", 0]}
    prompt |= {"embed": embed, "apply": node("PerfusionApplyConcepts", key_lock="local", **links)}
    prompt["sampler"]["inputs"]["model"] = ["apply", 0]
    for name in ("positive", "negative"):
        prompt[name]["inputs"]["clip"] = ["apply", 1]
    return prompt


def sent(run: Run) -> list[str]:
    """The texts that front ends were given."""
    outputs = [data["output"] for name, data in run.events if name == "executed" and data["node"] == "embed"]
    return [text for output in outputs if output for text in output.get("perfusion_embedded", ())]


@pytest.fixture(scope="module")
def text(comfy_host: ComfyHost, files: list[str]) -> str:
    prompt = {"load": loading(*files), "embed": embedding(concepts=["load", 0])}
    (found,) = sent(comfy_host.execute(prompt))
    return found


# --- embedding


def test_embedded_concepts_draw_the_same_picture_without_their_files(comfy_host: ComfyHost, lab: Lab) -> None:
    concepts = [lab.concept(seed=7), lab.concept(CAT, "cat", seed=8, vectors=2)]
    names = [save_concept(concept, comfy_host.base, f"gone-{k}") for k, concept in enumerate(concepts)]
    prompt = drawing(embedding(concepts=["load", 0]))
    prompt["load"] = loading(*names, bias_1=0.4, strength_2=0.7, temperature_2=0.31)
    run = comfy_host.execute(prompt, keep=[IMAGE])
    (carried,) = sent(run)
    for name in names:
        (comfy_host.base / "models" / "perfusion" / name).unlink()
    comfy_host.new_executor()
    plain = comfy_host.execute(plain_drawing("a teddy bear beside a cat"), keep=[IMAGE])
    for use in (CONNECTED, "embedded"):
        again = comfy_host.execute(drawing(embedding(carried, use)), keep=[IMAGE])
        assert torch.equal(again[IMAGE], run[IMAGE])
        assert not torch.equal(again[IMAGE], plain[IMAGE])


def test_front_ends_get_the_text_from_the_cache_too(comfy_host: ComfyHost, files: list[str], text: str) -> None:
    prompt = {"load": loading(*files), "embed": embedding(concepts=["load", 0])}
    comfy_host.execute(prompt)
    run = comfy_host.execute(prompt)
    assert run.executed == set()
    assert sent(run) == [text]


def test_what_is_connected_wins_unless_told_otherwise(comfy_host: ComfyHost, files: list[str], text: str) -> None:
    prompt = {"load": loading(files[1]), "embed": embedding(text, concepts=["load", 0])}
    assert comfy_host.execute(prompt, keep=[STACK])[STACK].placeholders == [CAT]
    prompt["embed"]["inputs"]["use"] = "embedded"
    run = comfy_host.execute(prompt, keep=[STACK])
    assert run[STACK].placeholders == [TEDDY, CAT]
    assert sent(run) == []


def test_with_all_concepts_off_nothing_is_embedded_anew(comfy_host: ComfyHost, files: list[str], text: str) -> None:
    prompt = {"load": loading(files[0], on_1=False), "embed": embedding(text, concepts=["load", 0])}
    run = comfy_host.execute(prompt, keep=[STACK])
    assert len(run[STACK]) == 0 and sent(run) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-9], "line 2 is damaged"),
        (lambda text: text.replace("concept 1", "concept 7"), "line 1 has format version '7'"),
        (lambda text: "hello", "line 1 is no embedded concept"),
        (lambda text: "x" * 4_000_001, "the text has 4,000,001 characters; at most 4,000,000"),
        (lambda text: "", "nothing is embedded yet"),
    ],
)
def test_bad_text(comfy_host: ComfyHost, text: str, change: Any, message: str) -> None:
    """Found when queueing where it will be used for certain, else when it is."""
    bad = change(text)
    with pytest.raises(PromptError) as refused:
        comfy_host.validate({"embed": embedding(bad, "embedded")})
    (error, *_) = refused.value.node_errors["embed"]["errors"]
    assert f"Embed Concept, input 'data': {message}" in error["details"]
    with pytest.raises(PromptError, match=f"Embed Concept, input 'data': {message}"):
        comfy_host.execute({"embed": embedding(bad)})


def test_an_unknown_use_is_refused(comfy_host: ComfyHost, text: str) -> None:
    with pytest.raises(PromptError, match="input 'use'"):
        comfy_host.validate({"embed": embedding(text, "never")})


# --- the workflow of a run


def executed_with(host: ComfyHost, prompt: Prompt, workflow: dict[str, Any]) -> None:
    """Run a prompt as a front end sends it, with the workflow that it shows."""
    outputs = host._validate(prompt)
    host._executor.execute(prompt, "id", {"client_id": "tests", "extra_pnginfo": {"workflow": workflow}}, outputs)
    assert host._executor.success


@pytest.mark.parametrize("inside", [False, True], ids=["", "in a subgraph"])
def test_the_png_of_the_very_run_carries_the_concepts(
    comfy_host: ComfyHost, files: list[str], text: str, inside: bool
) -> None:
    widgets = {"widgets_values": [CONNECTED, ""], "widgets_values_named": {"use": CONNECTED, "data": ""}}
    shown = {"id": 7, "type": "PerfusionEmbedConcept", **widgets}
    workflow = {"nodes": [{"id": 1, "type": "CheckpointLoaderSimple"}, shown]}
    name = "7"
    if inside:
        workflow = {
            "nodes": [{"id": 3, "type": "a-b-c"}],
            "definitions": {"subgraphs": [{"id": "a-b-c", "nodes": [shown]}, {"id": "other", "nodes": []}]},
        }
        name = "3:7"
    prompt = {"load": loading(*files), name: embedding(concepts=["load", 0])}
    prompt["image"] = node("EmptyImage", width=8, height=8, batch_size=1, color=0)
    prompt["inspect"] = node("PerfusionInspectPrompt", clip=["checkpoint", 1], prompt="", threshold=0.25)
    prompt["inspect"]["inputs"]["concepts"] = [name, 0]
    prompt["checkpoint"] = CHECKPOINT
    prompt["save"] = node("SaveImage", images=["inspect", 0], filename_prefix=f"shared{int(inside)}")
    comfy_host.new_executor()
    executed_with(comfy_host, prompt, workflow)
    (path,) = (comfy_host.base / "output").glob(f"shared{int(inside)}_*.png")
    with Image.open(path) as picture:
        carried = json.loads(picture.text["workflow"])  # type: ignore[attr-defined]
    level = carried["definitions"]["subgraphs"][0] if inside else carried
    assert level["nodes"][-1]["widgets_values"] == [CONNECTED, text]
    assert level["nodes"][-1]["widgets_values_named"]["data"] == text


# --- what a saved file tells


def saved(host: ComfyHost, file: str, name: str, shown: Any = None, **inputs: Any) -> dict[str, str]:
    """The metadata of a file of Save Concept, run from a page that shows a workflow."""
    prompt = {"load": loading(file), "save": node("PerfusionSaveConcept", concept=["load", 0], name=name, **inputs)}
    prompt["image"] = node("EmptyImage", width=1024, height=600, batch_size=1, color=0x336699)
    host.new_executor()
    executed_with(host, prompt, shown or {"nodes": [], "version": 0.4})
    header = host.module("perfusion.concept").read_header(host.base / "output" / "perfusion" / f"{name}.safetensors")
    return header["__metadata__"]


def test_a_saved_file_opens_its_workflow_and_shows_a_picture(comfy_host: ComfyHost, files: list[str]) -> None:
    workflow = {"nodes": [{"id": 1, "type": "Note", "widgets_values": ['"é" \\ <b>']}], "version": 0.4}
    found = saved(comfy_host, files[0], "told", workflow, thumbnail=["image", 0])
    assert json.loads(found["workflow"]) == workflow
    assert json.loads(found["prompt"])["save"]["class_type"] == "PerfusionSaveConcept"
    assert found["modelspec.trigger_phrase"] == TEDDY
    assert found["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    again = comfy_host.execute({"load": loading("told.safetensors")}, keep=[("load", 0)])["load", 0].concepts[0]
    assert again.thumbnail == found["modelspec.thumbnail"]
    before = comfy_host.execute({"load": loading(files[0])}, keep=[("load", 0)])["load", 0].concepts[0]
    assert again.digest == before.digest


def test_the_workflow_stays_out_when_it_shall(comfy_host: ComfyHost, files: list[str]) -> None:
    found = saved(comfy_host, files[0], "private", workflow=False)
    assert not {"workflow", "prompt"} & found.keys()


def test_a_workflow_too_large_for_the_header_stays_out(
    comfy_host: ComfyHost, files: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = saved(comfy_host, files[0], "large", {"nodes": [], "extra": {"notes": "x" * (1 << 20)}})
    assert "workflow" not in found and "prompt" in found
    assert "the workflow is too large for the file's header" in caplog.text
    comfy_host.execute({"load": loading("large.safetensors")}, keep=[("load", 0)])


def test_a_workflow_that_just_fits(comfy_host: ComfyHost, files: list[str]) -> None:
    """With quotes, which take twice their room in the header."""
    notes = '"' * (((1 << 20) - 16_000) // 4)
    found = saved(comfy_host, files[0], "fits", {"nodes": [], "extra": {"notes": notes}})
    assert json.loads(found["workflow"])["extra"]["notes"] == notes
    comfy_host.execute({"load": loading("fits.safetensors")}, keep=[("load", 0)])


def test_thumbnails_are_the_middle_and_small(comfy_host: ComfyHost) -> None:
    thumbnails = comfy_host.module("perfusion.hosts.comfyui.thumbnails")
    noise = torch.rand(2, 700, 900, 3)
    assert len(thumbnails.thumbnail(noise)) <= 100_000
    small = thumbnails.thumbnail(torch.rand(1, 40, 64, 4))
    assert len(small) < 6000
    for nothing in (torch.rand(0, 8, 8, 3), torch.rand(1, 0, 8, 3), torch.rand(8, 8)):
        with pytest.raises(ValueError, match="no picture"):
            thumbnails.thumbnail(nothing)


# --- inspecting


def inspecting(prompt: str, concepts: bool = True, applied: bool = False, **inputs: Any) -> Prompt:
    graph = {"checkpoint": CHECKPOINT}
    clip = ["apply", 1] if applied else ["checkpoint", 1]
    graph["inspect"] = node("PerfusionInspectPrompt", clip=clip, prompt=prompt, **{"threshold": 0.25, **inputs})
    if concepts or applied:
        graph["load"] = loading("share-0.safetensors", "share-1.safetensors", bias_1=0.3)
    if concepts:
        graph["inspect"]["inputs"]["concepts"] = ["load", 0]
    if applied:
        links = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "concepts": ["load", 0]}
        graph["apply"] = node("PerfusionApplyConcepts", key_lock="global", **links)
    return graph


PICTURE, REPORT = ("inspect", 0), ("inspect", 1)


def test_a_prompt_is_inspected_alike_before_and_after_apply(comfy_host: ComfyHost, files: list[str]) -> None:
    text = f"a photo of a {TEDDY} beside a ({CAT}:1.3), " + "an old house by the sea, " * 11
    ways = [{}, {"applied": True}, {"applied": True, "concepts": False}]
    runs = [comfy_host.execute(inspecting(text, **way), keep=[PICTURE, REPORT]) for way in ways]
    report = runs[0][REPORT]
    for run in runs[1:]:
        assert run[REPORT] == report
        assert torch.equal(run[PICTURE], runs[0][PICTURE])
    assert f"{TEDDY} (teddy bear) appears" in report
    assert f"{CAT} x1.3" in report and "[start 2]" in report
    assert runs[0][PICTURE].shape[-1] == 3
    (shown,) = runs[0].ui["inspect"]["images"]
    assert (comfy_host.base / "temp" / shown["filename"]).is_file()


def test_its_gates_are_those_of_the_edit(comfy_host: ComfyHost, lab: Lab, files: list[str]) -> None:
    module = comfy_host.module("perfusion.hosts.comfyui.inspection")
    stack = comfy_host.execute({"load": loading(*files)}, keep=[("load", 0)])["load", 0]
    text = f"a photo of a ({TEDDY}:1.4) and embedding:none a café, {CAT}!"
    with torch.inference_mode():
        both, taught = module.in_force(lab.clip, stack)
        found = comfy_host.module("perfusion.inspection").inspect(both, text, partial(module.read, taught))
        _, clip = lab.applied(*stack.concepts)
        ((context, told), *_) = lab.encode(clip, text)
    edit = stack.edit()
    edit.words = told["model_conds"]["perfusion_words"].cond.squeeze(-1)
    r, gates = edit.directions.gates(context)[0], edit.gates(context)
    end = len(found.tokens) - 1
    assert torch.equal(found.gates[:end], gates[0, :end]) and torch.equal(found.r[:end], r[0, :end])
    assert torch.equal(found.gates[end], gates[0, end:].amax(dim=0))
    words = [token.text for token in found.tokens]
    assert words[1:5] == ["a", "photo", "of", "a"] and words[-4:-1] == [CAT, CAT, "!"]
    plain = "".join(token.text for token in found.tokens if not token.placeholder)
    assert plain.endswith("acafé,!"), "letters of several tokens too"


@pytest.mark.parametrize("focus", [20.0, 1.0])
def test_prompt_weights_leave_gates_of_words_that_are_looked_at_more(
    comfy_host: ComfyHost, lab: Lab, focus: float
) -> None:
    module = comfy_host.module("perfusion.hosts.comfyui.inspection")
    stack = lab.stack(dataclasses.replace(lab.concept(), focus=focus))
    with torch.inference_mode():
        both, taught = module.in_force(lab.clip, stack)
        plain, low = (
            comfy_host.module("perfusion.inspection").inspect(both, text, partial(module.read, taught))
            for text in (f"a photo of a {TEDDY}", f"a photo of a ({TEDDY}:0.2)")
        )
    assert plain.concepts[0].state == "appears"
    if focus == 1:
        assert low.concepts[0].state == "shut"
    else:
        assert torch.allclose(low.gates, plain.gates, atol=1e-5) and torch.allclose(low.r, plain.r, atol=1e-5)
        assert f"{TEDDY} x0.2" in low.text()


def looking(prompt: str, **inputs: Any) -> Prompt:
    """Attention over a picture of noise."""
    graph = inspecting(prompt, concepts=False, applied=True)
    graph["image"] = node("TestNoise", height=48, width=64)
    links = {"model": ["apply", 0], "vae": ["checkpoint", 2], "image": ["image", 0]}
    graph["inspect"]["inputs"] |= {**links, "at": "0.5", **inputs}
    return graph


class NoiseNode:
    """A picture of noise."""

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"height": ("INT",), "width": ("INT",)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "make", "tests"

    def make(self, height: int, width: int) -> tuple[torch.Tensor]:
        return (torch.rand(1, height, width, 3, generator=torch.Generator().manual_seed(0)),)


ATTENTION = ("inspect", 2)


def test_attention_is_that_of_the_edited_model(
    comfy_host: ComfyHost, lab: Lab, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(comfy_host.nodes, "TestNoise", NoiseNode)
    text = f"a photo of a {TEDDY} beside a {CAT}"
    run = comfy_host.execute(looking(text), keep=[ATTENTION, ("apply", 0), ("apply", 1)])
    again = comfy_host.execute(looking(text, model=["checkpoint", 0]), keep=[ATTENTION])
    assert run[ATTENTION].shape == again[ATTENTION].shape
    assert not torch.equal(run[ATTENTION], again[ATTENTION])
    module = comfy_host.module("perfusion.hosts.comfyui.looking")
    model, clip = run["apply", 0], run["apply", 1]
    tokens = comfy_host.module("perfusion.hosts.comfyui.inspection").read(clip, text).tokens
    words = torch.stack([torch.tensor([token.placeholder == word for token in tokens]) for word in (TEDDY, CAT)])
    latent = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        conditioning = lab.encode(clip, text)
        both = module.attention_maps(model, conditioning, latent, words, [0.3, 0.5])
        plain = module.attention_maps(lab.model, conditioning, latent, words, [0.5])
        everything = module.attention_maps(model, conditioning, latent, torch.ones_like(words[:1]), [0.5])
        # The same, by the host that masks photos; it knows no edit, and takes all words of concepts together.
        word = comfy_host.module("perfusion.hosts.base").Word
        concept = comfy_host.execute({"load": loading(files[0])}, keep=[("load", 0)])["load", 0].concepts[0]
        trainer = comfy_host.module("perfusion.hosts.comfyui.training").ComfyHost(lab.model, clip, lab.parts.vae)
        sigma = float(lab.model.get_model_object("model_sampling").percent_to_sigma(0.5))
        x0 = lab.model.model.process_latent_in(latent)
        oracle = trainer.attention_maps(x0, [text], word(TEDDY, "teddy bear", concept.embeddings), [sigma])
    assert both.shape == (2, 2, 6, 8)
    assert not torch.allclose(both[1], plain[0], rtol=1e-4, atol=0)
    assert torch.allclose(plain[0].sum(0), oracle[0], rtol=1e-4, atol=0)
    assert float(oracle.std()) > 0
    assert torch.allclose(everything, torch.ones_like(everything), atol=1e-2)


def test_bad_input_of_attention(comfy_host: ComfyHost, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(comfy_host.nodes, "TestNoise", NoiseNode)
    graph = looking("a house")
    assert comfy_host.execute(graph, keep=[ATTENTION])[ATTENTION].shape[-1] == 3
    for at in ("", "2", "0.1, x", "nan", ", ".join(["0.5"] * 9)):
        graph["inspect"]["inputs"]["at"] = at
        with pytest.raises(PromptError, match="Inspect Prompt, input 'at': .*numbers from 0 to 1"):
            comfy_host.execute(graph)
    del graph["inspect"]["inputs"]["vae"]
    with pytest.raises(PromptError, match="attention needs model, vae and image"):
        comfy_host.execute(graph)


def test_a_prompt_without_concepts(comfy_host: ComfyHost) -> None:
    run = comfy_host.execute(inspecting("", concepts=False), keep=[PICTURE, REPORT])
    assert run[REPORT].startswith("There is no concept")


def test_other_concepts_are_refused(comfy_host: ComfyHost, lab: Lab, files: list[str]) -> None:
    small = Lab(comfy_host, miniature_parts())
    graph = inspecting("a house")
    graph["load"] = loading(save_concept(small.concept("<small>"), comfy_host.base, "small"))
    with pytest.raises(PromptError, match="Inspect Prompt, input 'concepts': <small> was trained for"):
        comfy_host.execute(graph)
    graph = inspecting("a house", applied=True)
    graph["other"] = loading(save_concept(lab.concept(seed=30), comfy_host.base, "another"))
    graph["inspect"]["inputs"]["concepts"] = ["other", 0]
    with pytest.raises(PromptError, match=f"taught another concept under the word {TEDDY}"):
        comfy_host.execute(graph)
