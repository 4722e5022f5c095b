"""SD2.x of either prediction, and SDXL: a concept's whole way on reduced checkpoints, read by the host's own loader."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.concepts import CAT, TEDDY, Lab, expected_projection
from tests.graphs import node, text_to_image
from tests.hosts import ComfyHost
from tests.models import MODEL_FILES, Parts, load_reduced, miniature_parts

pytestmark = [pytest.mark.comfyui, pytest.mark.usefixtures("nothing_left")]

PROMPTS = [f"a photo of a {TEDDY}", f"two chairs and a {TEDDY} on the beach"]


@dataclass(frozen=True)
class Kind:
    """A family as it is to be found out; ``reduced`` says how many cross-attention layers the test's checkpoint has."""

    file: str
    predicts_noise: bool
    name: str
    prediction: str
    encoders: dict[str, int]
    reduced: int
    storage: str


KINDS = {
    "sd2-eps": Kind("sd2", True, "sd2", "eps", {"clip_h": 1024}, 5, "half"),
    "sd2-v": Kind("sd2", False, "sd2", "v", {"clip_h": 1024}, 5, "half"),
    "sdxl": Kind("sdxl", False, "sdxl", "eps", {"clip_l": 768, "clip_g": 1280}, 27, "8bit"),
}


class FamilyLab(Lab):
    """A reduced checkpoint of one family, and the host of the trainer on it."""

    def __init__(self, pack: ComfyHost, kind: Kind):
        path = pack.base / "models" / MODEL_FILES[kind.file].folder / pack.model(kind.file)
        with torch.inference_mode():  # as nodes load
            super().__init__(pack, load_reduced(path, predicts_noise=kind.predicts_noise))
        self.kind = kind
        self.trained_on = pack.module("perfusion.hosts.comfyui.training").ComfyHost(
            self.model, self.clip, self.parts.vae
        )


@pytest.fixture(scope="module", params=KINDS.values(), ids=list(KINDS))
def lab(comfy_host: ComfyHost, request: pytest.FixtureRequest) -> FamilyLab:
    return FamilyLab(comfy_host, request.param)


@pytest.fixture(scope="module")
def concept(lab: FamilyLab) -> Any:
    return lab.concept()


def test_what_a_checkpoint_is(lab: FamilyLab, concept: Any) -> None:
    family = lab.trained_on.family
    assert (family.name, family.encoders) == (lab.kind.name, lab.kind.encoders)
    assert family.context_width == sum(lab.kind.encoders.values())
    assert len(family.layers) == lab.kind.reduced
    assert lab.trained_on.prediction == lab.kind.prediction
    assert concept.storage == lab.kind.storage


class CheckpointNode:
    """The checkpoint under test, in place of a loader that knows no reduced text encoders."""

    parts: Parts

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP", "VAE"), "give", "tests"

    def give(self) -> tuple[Any, Any, Any]:
        return self.parts.model, self.parts.clip, self.parts.vae


class PhotosNode:
    """Two photos of noise."""

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "make", "tests"

    def make(self) -> tuple[Tensor]:
        return (torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(1)),)


@pytest.mark.slow
def test_train_save_load_apply_sample(comfy_host: ComfyHost, lab: FamilyLab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CheckpointNode, "parts", lab.parts, raising=False)
    monkeypatch.setitem(comfy_host.nodes, "TestCheckpoint", CheckpointNode)
    monkeypatch.setitem(comfy_host.nodes, "TestPhotos", PhotosNode)
    comfy_host.new_executor()
    schema = comfy_host.nodes["PerfusionTrainConcept"].GET_SCHEMA()
    settings = {entry.id: entry.default for entry in schema.inputs if getattr(entry, "default", None) is not None}
    settings |= {"steps": 2, "batch_size": 4, "micro_batch": 0, "resolution": 64, "contexts": 8, "corpus_size": 32}
    settings |= {"companions": 1}
    settings |= {"super_category": "teddy bear", "placeholder": TEDDY, "captions": "a {}", "previews": False}
    loaded = {name: ["checkpoint", index] for index, name in enumerate(("model", "clip", "vae"))}
    prompt = {**text_to_image("", PROMPTS[1]), "checkpoint": node("TestCheckpoint"), "photos": node("TestPhotos")}
    prompt["train"] = node("PerfusionTrainConcept", images=["photos", 0], **settings, **loaded)
    prompt["save"] = node("PerfusionSaveConcept", concept=["train", 0], name=f"{lab.kind.name}-{lab.kind.prediction}")
    links = {"model": loaded["model"], "clip": loaded["clip"], "concepts": ["train", 0]}
    prompt["apply"] = node("PerfusionApplyConcepts", **links, key_lock="global")
    for name, link in (("sampler", "model"), ("positive", "clip"), ("negative", "clip")):
        prompt[name]["inputs"][link] = ["apply", 0 if link == "model" else 1]
    run = comfy_host.execute(prompt, keep=[("train", 0), ("save", 1), ("sampler", 0)])
    (concept,), latent = run["train", 0].concepts, run["sampler", 0]["samples"]
    assert concept.storage == lab.kind.storage
    start = lab.trained_on.project_values(concept.e_super.unsqueeze(0))
    for layer, values in concept.o_star_v.items():
        moved = values.norm() / start[layer].norm()
        assert moved > 0.05, f"{layer} has not learned: steps of a tenth are far more than rounding"

    again = {name: entry for name, entry in prompt.items() if name not in ("train", "save", "photos")}
    again["load"] = node("PerfusionLoadConcepts", count=1, file_1=run["save", 1])
    again["apply"]["inputs"]["concepts"] = ["load", 0]
    found = comfy_host.execute(again, keep=[("load", 0), ("sampler", 0)])
    assert found["load", 0].concepts[0].digest == concept.digest
    assert latent.isfinite().all()
    assert torch.equal(found["sampler", 0]["samples"], latent), "a saved concept draws like a fresh one"


def word(lab: FamilyLab, embeddings: dict[str, Tensor] | None = None) -> Any:
    return lab.host.module("perfusion.hosts.base").Word(TEDDY, "teddy bear", embeddings)


def test_gradients_reach_every_encoder_and_every_layer(lab: FamilyLab, concept: Any) -> None:
    edit = lab.host.module("perfusion.edit")
    host = lab.trained_on
    with torch.inference_mode(), host.training():
        embeddings = {name: rows.clone().requires_grad_() for name, rows in concept.embeddings.items()}
        values = {layer: v.clone().unsqueeze(0).requires_grad_() for layer, v in concept.o_star_v.items()}
        directions = edit.Directions.of(
            concept.i_star.clone().unsqueeze(0), concept.d_star.clone().unsqueeze(0), [edit.Gate()], ["paper"]
        )
        learned = edit.KeyValueEdit(directions, concept.e_super.clone().unsqueeze(0), values)
        text = host.encode(PROMPTS, word(lab, embeddings))
        x0 = host.denoise(torch.randn(2, 4, 8, 8), torch.tensor([0.5, 7.0]), text, learned)
        x0.square().mean().backward()
    for name, leaf in {**embeddings, **values}.items():
        assert leaf.grad is not None, name
        assert leaf.grad.isfinite().all(), name
        assert leaf.grad.any(), name


def sinusoids(number: float) -> Tensor:
    """The embedding (256,) of one number of the size conditioning, cosines first."""
    angles = number * torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 128)
    return torch.cat([angles.cos(), angles.sin()])


@contextmanager
def edited_by_hand(lab: FamilyLab, use: Any) -> Iterator[None]:
    """Hooks behind ``to_k`` and ``to_v`` that compute the edit by the naive formula, in 64 bits."""
    structure = lab.host.module("perfusion.hosts.comfyui.structure")

    def hook(target: Tensor, weight: Tensor) -> Any:
        return lambda module, inputs, output: expected_projection(inputs[0], weight, [use], [target]).to(output)

    with ExitStack() as stack:
        for layer, to_k, to_v in structure.projections(lab.model.model.diffusion_model):
            k, v = to_k.weight.detach().double(), to_v.weight.detach().double()
            e_super, values = use.concept.e_super.double(), use.concept.o_star_v[layer].double()
            targets = k @ e_super, values + v @ e_super if use.concept.anchored else values
            for module, weight, target in zip((to_k, to_v), (k, v), targets, strict=True):
                stack.callback(module.register_forward_hook(hook(target, weight)).remove)
        yield


@torch.no_grad()
def test_the_edited_prediction_is_that_of_an_independent_formula(lab: FamilyLab, concept: Any) -> None:
    """x_t = a x0 + s n as in DDPM; the network says n, or v = a n - s x0. SDXL hears of sizes besides."""
    host, stack = lab.trained_on, lab.stack(concept)
    steps, sizes = [40, 800], torch.tensor([[300, 300], [2000, 1000]])
    sigma = host.noise_levels()[steps]
    draw = torch.Generator().manual_seed(2)
    noisy = sigma.view(2, 1, 1, 1) * torch.randn(2, 4, 8, 16, generator=draw)
    with host.training(), torch.no_grad():
        text = host.encode(PROMPTS, word(lab, concept.embeddings))
        found, plain = host.denoise(noisy, sigma, text, stack.edit(), sizes), host.denoise(noisy, sigma, text, None)

    a, s = (1 / (1 + sigma**2).sqrt()).view(2, 1, 1, 1), (sigma / (1 + sigma**2).sqrt()).view(2, 1, 1, 1)
    vectors = None
    if lab.kind.name == "sdxl":
        clip = lab.applied(concept)[1]
        stock = [clip.encode_from_tokens(clip.tokenize(prompt), return_pooled=True)[1] for prompt in PROMPTS]
        told = [[*size, 0, 0, 64, 128] for size in sizes.tolist()]
        numbers = [torch.cat([sinusoids(number) for number in each]) for each in told]
        vectors = torch.cat([torch.cat(stock).double(), torch.stack(numbers)], dim=1).float()
    lab.load(lab.model)
    with edited_by_hand(lab, stack.uses[0]):
        said = lab.model.model.diffusion_model(
            a * noisy, torch.tensor(steps).float(), context=text.context, y=vectors, transformer_options={}
        )
    expected = a * (a * noisy) - s * said if lab.kind.prediction == "v" else (a * noisy - s * said) / a
    assert torch.allclose(found, expected, atol=2e-4 * float(expected.abs().max()))
    assert (found - plain).norm() > 0.005 * plain.norm(), "the edit is no small matter"


@torch.no_grad()
def test_without_sizes_a_picture_has_always_been_of_its_own(lab: FamilyLab) -> None:
    host, sigma, noisy = lab.trained_on, torch.tensor([1.0, 2.0]), torch.randn(2, 4, 8, 16)
    with host.training(), torch.no_grad():
        text = host.encode(PROMPTS, word(lab))
        implied = host.denoise(noisy, sigma, text, None)
        own, small = (
            host.denoise(noisy, sigma, text, None, torch.tensor([size] * 2)) for size in ([64, 128], [32, 64])
        )
    assert torch.equal(implied, own)
    assert torch.equal(implied, small) == (lab.kind.name != "sdxl")


def test_other_families_are_refused_by_name(lab: FamilyLab, concept: Any) -> None:
    small = Lab(lab.host, miniature_parts())
    foreign = small.concept(CAT)
    title = {"sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}[lab.kind.name]
    width = sum(lab.kind.encoders.values())
    with pytest.raises(ValueError, match=f"{TEDDY} does not fit this model: it was trained for {title}.*{width} wide"):
        small.applied(concept)
    with pytest.raises(ValueError, match=f"{CAT} does not fit this model.*the model is {title} .{width} wide"):
        lab.applied(foreign)
