"""The pack's nodes through prompts, on the reduced checkpoint at 64 pixels."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.concepts import CAT, TEDDY, Lab, save_concept
from tests.graphs import node, text_to_image
from tests.hosts import ComfyHost, PromptError
from tests.models import Parts, miniature_parts

pytestmark = [pytest.mark.comfyui, pytest.mark.usefixtures("nothing_left")]

NODES = [
    "PerfusionLoadPhotos",
    "PerfusionMasks",
    "PerfusionTrainConcept",
    "PerfusionPickStep",
    "PerfusionSaveConcept",
    "PerfusionLoadConcepts",
    "PerfusionApplyConcepts",
    "PerfusionEmbedConcept",
    "PerfusionInspectPrompt",
    "PerfusionMiniature",
    "PerfusionMiniatureLatent",
    "PerfusionMiniaturePhotos",
    "PerfusionLoadConcept",
    "PerfusionConceptSettings",
    "PerfusionTradeOff",
    "PerfusionPickTradeOff",
    "PerfusionScore",
]
STACK, LATENT, TRAINED = ("load", 0), ("sampler", 0), ("train", 0)


@pytest.fixture(scope="module")
def lab(comfy_host: ComfyHost) -> Lab:
    keep = [("checkpoint", 0), ("checkpoint", 1), ("checkpoint", 2)]
    run = comfy_host.execute(text_to_image(comfy_host.model("checkpoint")), keep=keep)
    return Lab(comfy_host, Parts(*(run[link] for link in keep)))


@pytest.fixture(scope="module")
def files(lab: Lab) -> list[str]:
    """Eight concepts of eight words."""
    names = [TEDDY, CAT, *(f"<thing-{k}>" for k in range(6))]
    return [save_concept(lab.concept(name, "cat", seed=k), lab.host.base, f"nodes-{k}") for k, name in enumerate(names)]


def loading(*files: str, **settings: Any) -> dict:
    rows = {f"file_{number}": name for number, name in enumerate(files, start=1)}
    return {"load": node("PerfusionLoadConcepts", **{"count": len(files), **rows, **settings})}


# --- schemas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NODES)
def test_schema(comfy_host: ComfyHost, name: str) -> None:
    schema = comfy_host.nodes[name].GET_SCHEMA()
    schema.validate()
    assert schema.node_id == name
    assert schema.category.startswith("Perfusion/")
    assert schema.display_name
    assert schema.description
    for entry in [*schema.inputs, *schema.outputs]:
        assert entry.tooltip, entry.id


def test_no_node_without_its_tests(comfy_host: ComfyHost) -> None:
    assert {name for name in comfy_host.nodes if name.startswith("Perfusion")} - {"PerfusionTestKeep"} == set(NODES)


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 8])
def test_load(comfy_host: ComfyHost, files: list[str], count: int) -> None:
    stack = comfy_host.execute(loading(*files[:count]), keep=[STACK])[STACK]
    assert len(stack) == count
    assert stack.placeholders[:2] == [TEDDY, CAT][:count]


def test_load_settings(comfy_host: ComfyHost, files: list[str]) -> None:
    prompt = loading(*files[:3], on_2=False, strength_1=0.4, bias_3=0.3, temperature_3=0.2)
    first, last = comfy_host.execute(prompt, keep=[STACK])[STACK].uses
    assert (first.gate.strength, last.gate.bias, last.gate.temperature) == (0.4, 0.3, 0.2)
    assert last.concept.placeholder == "<thing-0>"
    prompt = {**loading(*files[:1]), "more": loading(files[1])["load"]}
    prompt["more"]["inputs"]["concepts"] = ["load", 0]
    assert comfy_host.execute(prompt, keep=[("more", 0)])["more", 0].placeholders == [TEDDY, CAT]


@pytest.mark.parametrize("name", ["gone.safetensors", "../nodes-0.safetensors", "/etc/passwd", "a\\..\\b.safetensors"])
def test_missing_or_outside_files_are_refused_when_queueing(comfy_host: ComfyHost, files: list[str], name: str) -> None:
    with pytest.raises(PromptError) as refused:
        comfy_host.validate(loading(files[0], name), keep=[STACK])
    (errors,) = (entry["errors"] for entry in refused.value.node_errors.values())
    # The host repeats what the node says for each of its inputs; the text names the right one.
    assert "input 'file_2'" in str(errors)
    assert "input 'file_1'" not in str(errors)


def test_outside_files_are_refused_by_the_library_too(comfy_host: ComfyHost) -> None:
    library = comfy_host.module("perfusion.hosts.comfyui.library")
    for name in ("../x.safetensors", "/x.safetensors", "a/../../x.safetensors", "x.pt", "x.ckpt", "gone.safetensors"):
        with pytest.raises(ValueError, match="concept file|safetensors file"):
            library.find(name)


def damaged(path: Path, how: str) -> bytes:
    data = path.read_bytes()
    if how == "empty":
        return b""
    if how == "text":
        return b"hello, this is no concept at all"
    if how == "truncated":
        return data[:-100]
    if how == "flipped":
        return data[:-10] + bytes([data[-10] ^ 0x55]) + data[-9:]
    if how == "huge header":
        return (200 << 20).to_bytes(8, "little") + data[8:]
    return b"PK\x03\x04" + data


@pytest.mark.parametrize("how", ["empty", "text", "truncated", "flipped", "huge header", "pickle"])
def test_damaged_files(comfy_host: ComfyHost, lab: Lab, files: list[str], how: str) -> None:
    folder = comfy_host.base / "models" / "perfusion"
    (folder / "broken.safetensors").write_bytes(damaged(folder / files[1], how))
    with pytest.raises(PromptError) as failed:
        comfy_host.execute(loading(files[0], "broken.safetensors"), keep=[STACK])
    message = failed.value.execution_error["exception_message"]
    assert "Load Concepts, input 'file_2'" in message
    assert "broken" in message


def test_concept_of_another_family(comfy_host: ComfyHost, lab: Lab) -> None:
    small = miniature_parts()
    foreign = Lab(comfy_host, small).concept("<small>")
    name = save_concept(foreign, comfy_host.base, "foreign")
    prompt = {**text_to_image(comfy_host.model("checkpoint")), **loading(name)}
    prompt["apply"] = applying()
    with pytest.raises(PromptError, match="Apply Concepts, input 'concepts': <small> does not fit this model"):
        comfy_host.execute(prompt, keep=[("apply", 0)])


def test_one_word_twice(comfy_host: ComfyHost, files: list[str]) -> None:
    with pytest.raises(PromptError, match=f"Load Concepts: two concepts share the word {TEDDY}"):
        comfy_host.execute(loading(files[0], files[0]), keep=[STACK])


def applying(concepts: list | None = None, **settings: Any) -> dict:
    links = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "concepts": concepts or ["load", 0]}
    return node("PerfusionApplyConcepts", **links, **{"key_lock": "local", **settings})


def test_replaced_file_is_read_again(comfy_host: ComfyHost, lab: Lab) -> None:
    name = save_concept(lab.concept("<first>", "cat", seed=20), comfy_host.base, "replaced")
    prompt = loading(name)
    assert comfy_host.execute(prompt, keep=[STACK]).executed == {"load"}
    assert comfy_host.execute(prompt, keep=[STACK]).executed == set()
    path = comfy_host.base / "models" / "perfusion" / name
    before = path.stat()
    save_concept(lab.concept("<other>", "cat", seed=21), comfy_host.base, "replaced")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
    run = comfy_host.execute(prompt, keep=[STACK])
    assert run.executed == {"load"}
    assert run[STACK].placeholders == ["<other>"]


# --- saving ----------------------------------------------------------------------------------------------------------


def test_save_numbers_and_never_overwrites(comfy_host: ComfyHost, lab: Lab, files: list[str]) -> None:
    def saved(*names: str, **settings: Any) -> list[str]:
        prompt = loading(*names)
        prompt["save"] = node("PerfusionSaveConcept", concept=["load", 0], **{"name": "kept", **settings})
        return comfy_host.execute(prompt, keep=[("save", 1)])["save", 1].split("\n")

    folder = comfy_host.base / "output" / "perfusion"
    assert saved(files[0]) == ["kept.safetensors"]
    content = (folder / "kept.safetensors").read_bytes()
    assert saved(files[1]) == ["kept_2.safetensors"]
    assert saved(files[0]) == ["kept.safetensors"], "the same concept is not doubled"
    both = [f"kept-{name.removesuffix('.safetensors')}.safetensors" for name in saved(files[0], files[2], name="")]
    assert saved(files[0], files[2]) == both, "several concepts keep their words in their names"
    assert (folder / "kept.safetensors").read_bytes() == content
    assert saved(files[3], name="") == ["thing-1.safetensors"]
    assert not [path.name for path in folder.iterdir() if path.suffix != ".safetensors"]
    stack = comfy_host.execute(loading("kept_2.safetensors"), keep=[STACK])[STACK]
    assert stack.placeholders == [CAT]


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/b", "a\\b", "...", "<>"])
def test_save_refuses_folders(comfy_host: ComfyHost, files: list[str], name: str) -> None:
    prompt = loading(files[0])
    prompt["save"] = node("PerfusionSaveConcept", concept=["load", 0], name=name)
    with pytest.raises(PromptError, match="Save Concept, input 'name'"):
        comfy_host.execute(prompt)


def test_full_disk_while_saving(comfy_host: ComfyHost, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    prompt = loading(files[5])
    prompt["save"] = node("PerfusionSaveConcept", concept=["load", 0], name="too-much")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(PromptError, match="No space left on device.*not lost.*queue again"):
            comfy_host.execute(prompt)
    folder = comfy_host.base / "output" / "perfusion"
    assert not [path for path in folder.glob("*too-much*")]
    assert comfy_host.execute(prompt, keep=[("save", 1)]).executed == {"save"}, "what was made is not made again"


# --- training --------------------------------------------------------------------------------------------------------

FAST = {
    "steps": 2,
    "batch_size": 1,
    "resolution": 64,
    "seed": 3,
    "contexts": 8,
    "companions": 1,
    "corpus_size": 32,
    "captions": "a photo of a {}\na {} outside",  # few, since each is encoded by a full-size text encoder
    "previews": False,
    "super_category": "teddy bear",
    "placeholder": TEDDY,
}


class PhotoNode:
    """Photos of a test, as a node whose output changes when the numbers do."""

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"count": ("INT",), "pixel": ("FLOAT",), "masks": ("INT",), "mask_pixel": ("FLOAT",)}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE", "MASK"), "make", "tests"

    def make(self, count: int, pixel: float, masks: int, mask_pixel: float) -> tuple[torch.Tensor, torch.Tensor]:
        draw = torch.Generator().manual_seed(1)
        photos, shapes = torch.rand(count, 64, 64, 3, generator=draw), torch.zeros(masks, 64, 64)
        photos[:, :1, :1] = pixel
        shapes[:, 16:48, 16:48] = 1.0
        shapes[:, 16:32, 16:48] = mask_pixel
        return photos, shapes


@pytest.fixture
def photo_node(comfy_host: ComfyHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(comfy_host.nodes, "TestPhotos", PhotoNode)


def training(
    host: ComfyHost, *, count: int = 2, pixel: float = 0.5, masks: int = 2, mask_pixel: float = 1.0, **settings: Any
) -> dict:
    prompt = {"checkpoint": node("CheckpointLoaderSimple", ckpt_name=host.model("checkpoint"))}
    prompt["photos"] = node("TestPhotos", count=count, pixel=pixel, masks=masks, mask_pixel=mask_pixel)
    links: dict[str, Any] = {"model": ["checkpoint", 0], "clip": ["checkpoint", 1], "vae": ["checkpoint", 2]}
    links["images"] = ["photos", 0]
    if masks:
        links["masks"] = ["photos", 1]
    defaults = {
        entry.id: entry.default
        for entry in host.nodes["PerfusionTrainConcept"].GET_SCHEMA().inputs
        if getattr(entry, "default", None) is not None
    }
    prompt["train"] = node("PerfusionTrainConcept", **{**defaults, **FAST, **links, **settings})
    return prompt


@pytest.mark.any_host  # the end-to-end tests do it in servers of both
def test_train_save_load_apply_sample(comfy_host: ComfyHost, lab: Lab, photo_node: None) -> None:
    prompt = training(comfy_host)
    prompt["save"] = node("PerfusionSaveConcept", concept=["train", 0], name="trained")
    run = comfy_host.execute(prompt, keep=[TRAINED, ("train", 1), ("save", 1)])
    assert {"train", "save"} <= run.executed
    concept = run[TRAINED].concepts[0]
    assert len(run["train", 1]["loss"]) == FAST["steps"]
    path = comfy_host.base / "output" / "perfusion" / run["save", 1]
    assert path.stat().st_size <= 36 * 1024
    assert not comfy_host.execute(prompt, keep=[TRAINED]).executed, "an unchanged training is served from the cache"

    again = {**text_to_image(comfy_host.model("checkpoint"), f"a photo of a {TEDDY}"), **loading(path.name)}
    again["apply"] = applying()
    for name, link in (("sampler", "model"), ("positive", "clip"), ("negative", "clip")):
        again[name]["inputs"][link] = ["apply", 0 if link == "model" else 1]
    run = comfy_host.execute(again, keep=[LATENT, STACK, ("apply", 2)])
    assert run[STACK].concepts[0].digest == concept.digest
    assert run["apply", 2] == TEDDY
    straight = {**again, **training(comfy_host), "apply": applying(["train", 0])}
    del straight["load"]
    fresh = comfy_host.execute(straight, keep=[LATENT])
    assert torch.equal(fresh[LATENT]["samples"], run[LATENT]["samples"]), "a saved concept draws like a fresh one"


@pytest.mark.any_host
def test_graphs_older_than_an_input_do_what_they_did(comfy_host: ComfyHost, photo_node: None) -> None:
    prompt = training(comfy_host)
    new = comfy_host.execute(prompt, keep=[TRAINED])[TRAINED].concepts[0]
    names = ("companions", "timesteps", "key_rate", "preservation")
    assert (new.scope, new.focus, *(new.training[name] for name in names)) == ("word", 20, 1, "lognormal", 0.02, 2.0)
    assert new.e_key is not None
    for name in ("scope", "focus", *names):
        del prompt["train"]["inputs"][name]
    old = comfy_host.execute(prompt, keep=[TRAINED])[TRAINED].concepts[0]
    assert (old.scope, old.focus, *(old.training[name] for name in names)) == ("prompt", 1, 0, "uniform", 0, 0)
    assert old.e_key is None
    assert "focus" not in "".join(old.metadata)


@pytest.mark.any_host
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"placeholder": "teddy"}, "Train Concept, input 'placeholder': 'teddy' cannot stand"),
        ({"placeholder": "my teddy"}, "Train Concept, input 'placeholder': 'my teddy' cannot stand"),
        ({"placeholder": "<my teddy>"}, "Train Concept, input 'placeholder'"),
        ({"super_category": ""}, "Train Concept.*super-category"),
        ({"super_category": "  "}, "Train Concept.*super-category"),
        ({"masks": 1}, "Train Concept, input 'masks'.*mask"),
        ({"count": 0, "masks": 0}, "Train Concept, input 'images'"),
        ({"captions": "very " * 80 + "large {}"}, "Train Concept.*too long"),
    ],
)
def test_bad_input_of_training(comfy_host: ComfyHost, photo_node: None, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message) as failed:
        comfy_host.execute(training(comfy_host, **settings), keep=[TRAINED])
    assert failed.value.execution_error["exception_type"] in ("ValueError", "PlaceholderError")
