"""The miniature inside ComfyUI: the same network as in diffusers, and a checkpoint like any other to stock nodes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tests.miniature_weights as miniature_weights
from tests.concepts import CAT, LAYERS, TEDDY, Lab
from tests.graphs import node, text_to_image
from tests.hosts import ComfyHost, Prompt, PromptError
from tests.models import Parts

pytest.importorskip("diffusers")
pytestmark = pytest.mark.comfyui

PROMPTS = [
    "",
    f"a photo of a {TEDDY} on the beach",
    f"<MY-Teddy>'s hat, (big) {TEDDY}.",
    "a house, " * 40 + TEDDY,
    f"a zebra é 漢字 {TEDDY} :-)",
    "on the moon, a sketch of a red cat with blue stripes and a spotted fish",
]
IMAGE, SAMPLED = ("decode", 0), ("sampler", 0)


class Worlds:
    """The miniature in the classes of either program."""

    def __init__(self, pack: ComfyHost, folder: Path):
        self.pack, self.folder = pack, folder
        self.module = pack.module("miniature.comfyui")
        with torch.inference_mode():
            self.lab = Lab(pack, Parts(*self.module.load(folder)))
        self.pipeline = miniature_weights.pipeline(folder)
        package = pack.module("perfusion.hosts.diffusers")
        captions = pack.module("miniature.captions").corpus(200)
        self.diffusers = package.DiffusersHost(self.pipeline, captions)
        training = pack.module("perfusion.hosts.comfyui.training")
        self.comfy = training.ComfyHost(self.lab.model, self.lab.clip, self.lab.parts.vae)
        self.word = pack.module("perfusion.hosts.base").Word

    def __iter__(self) -> Iterator[Any]:
        return iter((self.comfy, self.diffusers))

    def stack(self, lock: str = "local") -> Any:
        return self.lab.stack(
            self.lab.concept(), self.lab.concept(CAT, "cat", seed=1, vectors=3, form="preserving"), lock=lock
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return miniature_weights.available(tmp_path_factory.mktemp("miniature"))


@pytest.fixture(scope="module")
def worlds(comfy_host: ComfyHost, folder: Path) -> Worlds:
    return Worlds(comfy_host, folder)


@pytest.fixture
def weights(comfy_host: ComfyHost, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The nodes load these."""
    monkeypatch.setattr(comfy_host.module("nodes.miniature"), "FOLDER", folder)
    comfy_host.new_executor()
    return folder


def drawn(category: str, count: int = 3, size: int = 64) -> tuple[list[Tensor], list[Tensor]]:
    """Photos (h, w, 3) of a personal thing, and its masks."""
    from miniature import world

    scenes = [world.portrait(category, world.instance(category, 0), Random(k)) for k in range(count)]

    def tensor(picture: Any) -> Tensor:
        return torch.from_numpy(np.array(picture.resize((size, size)))).float() / 255

    return [tensor(world.render(scene)) for scene in scenes], [tensor(world.masks(scene)[0]) for scene in scenes]


# --- the same network


@torch.no_grad()
@pytest.mark.parametrize("vectors", [None, 0, 1, 3])
def test_text(worlds: Worlds, vectors: int | None) -> None:
    """No word, the two tokens of "teddy bear", or vectors."""
    rows = {"clip_l": 0.02 * torch.randn(vectors, 128)} if vectors else None
    word = None if vectors is None else worlds.word(TEDDY, "teddy bear", rows)
    one, other = (host.encode(PROMPTS, word) for host in worlds)
    assert torch.allclose(one.context, other.context, atol=1e-4)
    assert torch.equal(one.word, other.word)
    assert torch.equal(one.padding, other.padding)
    if word is not None:
        assert one.word.sum(dim=1).tolist() == [(vectors or 2) * count for count in (0, 1, 2, 0, 1, 0)]


def test_text_encoders_are_alike_in_all_else(worlds: Worlds) -> None:
    one, other = (host.token_embeddings("teddy bear")["clip_l"] for host in worlds)
    assert torch.equal(one, other)
    assert one.shape == (2, 128)
    assert worlds.comfy.embedding_scale() == pytest.approx(worlds.diffusers.embedding_scale())
    assert worlds.comfy.family == worlds.diffusers.family
    assert list(worlds.comfy.family.layers) == LAYERS
    assert torch.allclose(worlds.comfy.noise_levels(), worlds.diffusers.noise_levels(), rtol=1e-4)


@torch.no_grad()
def test_special_tokens_are_its_own(worlds: Worlds) -> None:
    """Start, end and padding; the pooled encoding; and the empty prompt that prompt weights are relative to."""
    lab, text_encoder, tokenizer = worlds.lab, worlds.pipeline.text_encoder, worlds.pipeline.tokenizer
    prompt = "a photo of a teddy bear on the beach"
    tokens = lab.clip.tokenize(prompt)["l"]
    ids = tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
    assert [[token for token, _ in chunk] for chunk in tokens] == ids.tolist()
    assert max(token for token, _ in tokens[0]) < len(tokenizer)
    _, pooled = lab.clip.encode_from_tokens({"l": tokens}, return_pooled=True)
    encoded = text_encoder.text_model(ids)
    assert torch.allclose(pooled, encoded.pooler_output, atol=1e-4)
    weighted = lab.encode(lab.clip, "a photo of a (teddy bear:1.5) on the beach")[0][0]
    empty = tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids
    plain, nothing = encoded.last_hidden_state[0], text_encoder.text_model(empty).last_hidden_state[0]
    place = slice(5, 7)
    assert torch.allclose(weighted[0, place], nothing[place] + 1.5 * (plain - nothing)[place], atol=1e-4)
    assert torch.allclose(weighted[0, :5], plain[:5], atol=1e-4)


@torch.no_grad()
def test_a_long_prompt_is_encoded_in_chunks(worlds: Worlds) -> None:
    assert worlds.lab.encode(worlds.lab.clip, "a red cat on the beach, " * 20)[0][0].shape == (1, 154, 128)


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (24, 18)])
def test_network(worlds: Worlds, edited: bool, size: tuple[int, int]) -> None:
    stack = worlds.stack()
    word = worlds.word(TEDDY, "teddy bear", stack.concepts[0].embeddings)
    levels = worlds.comfy.noise_levels()
    x, sigma, vectors = 3 * torch.randn(2, 4, *size), levels[torch.tensor([200, 900])], torch.randn(2, 128)
    noise, values = [], []
    for host in worlds:
        with host.training(), torch.no_grad():
            text = host.encode(PROMPTS[1:3], word)
            estimate = host.denoise(x, sigma, text, stack.edit() if edited else None)
            noise.append((x - estimate) / sigma.view(-1, 1, 1, 1))
            values.append(host.project_values(vectors))
    assert torch.allclose(*noise, atol=1e-4)
    for layer, expected in values[0].items():
        assert torch.allclose(expected, values[1][layer], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("lock", ["local", "global"])
def test_edited_keys_and_values(worlds: Worlds, lock: str) -> None:
    structure = worlds.pack.module("perfusion.hosts.comfyui.structure")
    other = worlds.pack.module("perfusion.hosts.diffusers.structure")
    stack, prompt = worlds.stack(lock), f"a {CAT} and a {TEDDY} on the beach"
    attentions = dict(other.cross_attentions(worlds.pipeline.unet))
    _, clip = worlds.lab.applied(*stack.concepts, lock=lock)
    conditioning = worlds.lab.encode(clip, prompt)[0]
    context, shift = worlds.diffusers.text.encode_stack([prompt], stack)
    assert torch.allclose(conditioning[0], context, atol=1e-4)
    if shift is not None:
        assert torch.allclose(conditioning[1]["model_conds"]["perfusion_key_shift"].cond, shift, atol=1e-4)
    edits = stack.edit(), stack.edit()
    for edit in edits:
        edit.key_lock.shift = shift
    for layer, to_k, to_v in structure.projections(worlds.lab.model.model.diffusion_model):
        for path, module, same in (("k", to_k, attentions[layer].to_k), ("v", to_v, attentions[layer].to_v)):
            found, plain = edits[0].project(layer, path, conditioning[0], module), module(conditioning[0])
            assert torch.allclose(found, edits[1].project(layer, path, context, same), atol=1e-4)
            assert not torch.allclose(found, plain, atol=1e-2)


@torch.inference_mode()
def test_autoencoder(worlds: Worlds) -> None:
    vae, other = worlds.lab.parts.vae, worlds.pipeline.vae
    pictures = torch.stack(drawn("cat")[0])
    latents = vae.encode(pictures)
    assert latents.shape == (3, 4, 16, 16)
    expected = other.encode(pictures.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mode()
    assert torch.allclose(latents, expected, atol=1e-4)
    decoded = (other.decode(expected).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert torch.allclose(vae.decode(latents), decoded, atol=1e-4)
    scaled = worlds.comfy.encode_images(pictures)
    assert torch.allclose(scaled, worlds.diffusers.encode_images(pictures), atol=1e-4)
    assert torch.allclose(scaled, latents * other.config.scaling_factor, atol=1e-4)


@torch.inference_mode()
def test_autoencoder_in_tiles_and_of_odd_sizes(worlds: Worlds) -> None:
    vae = worlds.lab.parts.vae
    picture = torch.stack(drawn("house", 1, size=192)[0])
    whole = vae.encode(picture)
    tiled = vae.encode_tiled(picture, tile_x=128, tile_y=128, overlap=32)
    assert tiled.shape == whole.shape == (1, 4, 48, 48)
    decoded, from_tiles = vae.decode(whole), vae.decode_tiled(whole, tile_x=32, tile_y=32, overlap=8)
    assert from_tiles.shape == decoded.shape == (1, 192, 192, 3)
    assert float((from_tiles - decoded).abs().mean()) < 0.1
    assert vae.encode(picture[:, :99, :66]).shape == (1, 4, 24, 16)
    assert (vae.spacial_compression_encode(), vae.spacial_compression_decode()) == (4, 4)
    for estimate, shape in (
        (vae.memory_used_encode, picture.movedim(-1, 1).shape),
        (vae.memory_used_decode, whole.shape),
    ):
        assert 192 * 192 * 4 < estimate(shape, vae.vae_dtype) < 2**30


@torch.inference_mode()
def test_image_tower(worlds: Worlds) -> None:
    from miniature.weights import load_image_encoder

    pictures = torch.stack(drawn("boat")[0])
    found = worlds.module.load_clip_vision(worlds.folder).encode_image(pictures)["image_embeds"]
    expected = load_image_encoder(worlds.folder)(pictures.permute(0, 3, 1, 2) * 2 - 1).image_embeds
    assert torch.allclose(found, expected, atol=1e-3)


# --- a checkpoint like any other


def graph(text: str = "a photo of a teddy bear on the beach", **settings: Any) -> Prompt:
    """Text to image, with the nodes of the miniature."""
    prompt = text_to_image("", text, **settings)
    prompt["checkpoint"] = node("PerfusionMiniature")
    prompt["latent"] = node("PerfusionMiniatureLatent", width=64, height=64, batch_size=2)
    return prompt


def test_the_stock_graph(comfy_host: ComfyHost, weights: Path) -> None:
    run = comfy_host.execute(graph(), keep=[IMAGE, SAMPLED, ("latent", 0)])
    assert run[IMAGE].shape == (2, 64, 64, 3)
    assert run["latent", 0]["samples"].shape == run[SAMPLED]["samples"].shape == (2, 4, 16, 16)
    again = comfy_host.execute(graph(), keep=[IMAGE])
    assert "checkpoint" not in again.executed
    assert torch.equal(run[IMAGE], again[IMAGE])
    comfy_host.new_executor()
    assert torch.equal(run[IMAGE], comfy_host.execute(graph(), keep=[IMAGE])[IMAGE])


def test_more_pictures_do_not_load_it_anew(comfy_host: ComfyHost, weights: Path) -> None:
    """And so do not train a concept anew that is learned on it."""
    comfy_host.execute(graph(), keep=[IMAGE])
    prompt = graph()
    prompt["latent"]["inputs"] |= {"width": 96, "batch_size": 3}
    run = comfy_host.execute(prompt, keep=[IMAGE])
    assert run[IMAGE].shape == (3, 64, 96, 3)
    assert not {"checkpoint", "positive"} & run.executed


def test_the_stock_empty_latent(comfy_host: ComfyHost, weights: Path) -> None:
    """Newer hosts bring it to the model's scale; older ones don't know of scales, so the picture is half as large."""
    import comfy.latent_formats

    prompt = graph()
    prompt["latent"] = node("EmptyLatentImage", width=64, height=64, batch_size=1)
    side = 64 if hasattr(comfy.latent_formats.LatentFormat, "spacial_downscale_ratio") else 32
    assert comfy_host.execute(prompt, keep=[IMAGE])[IMAGE].shape == (1, side, side, 3)


def test_image_to_image_and_larger_latents(comfy_host: ComfyHost, weights: Path) -> None:
    prompt = graph()
    prompt["picture"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0x4080C0)
    prompt["latent"] = node("VAEEncode", pixels=["picture", 0], vae=["checkpoint", 2])
    prompt["sampler"]["inputs"]["denoise"] = 0.5
    prompt["larger"] = node("LatentUpscaleBy", samples=["sampler", 0], upscale_method="bilinear", scale_by=1.5)
    prompt["again"] = {**prompt["sampler"], "inputs": {**prompt["sampler"]["inputs"], "latent_image": ["larger", 0]}}
    prompt["decode"] = node(
        "VAEDecodeTiled", samples=["again", 0], vae=["checkpoint", 2], tile_size=64, overlap=32,
        temporal_size=64, temporal_overlap=8,
    )  # fmt: skip
    assert comfy_host.execute(prompt, keep=[IMAGE])[IMAGE].shape == (1, 96, 96, 3)


def test_stock_samplers_and_clip_skip(comfy_host: ComfyHost, weights: Path) -> None:
    prompt = graph()
    prompt["skip"] = node("CLIPSetLastLayer", clip=["checkpoint", 1], stop_at_clip_layer=-2)
    prompt["positive"]["inputs"]["clip"] = ["skip", 0]
    prompt["sampler"]["inputs"] |= {"sampler_name": "dpmpp_2m", "scheduler": "karras"}
    skipped = comfy_host.execute(prompt, keep=[IMAGE])[IMAGE]
    assert bool(skipped.isfinite().all())
    prompt["positive"]["inputs"]["clip"] = ["checkpoint", 1]
    assert not torch.equal(comfy_host.execute(prompt, keep=[IMAGE])[IMAGE], skipped)


def test_loras_and_merges(worlds: Worlds) -> None:
    lab = worlds.lab
    before = lab.draw(lab.model, lab.clip)
    model, clip = lab.with_lora(lab.model, lab.clip, lab.lora())
    assert len(model.patches) == 2 * len(LAYERS)
    assert len(clip.patcher.patches) == 1
    assert not torch.equal(lab.draw(model, clip), before)
    merge = lab.host.nodes["ModelMergeSimple"]()
    (merged,) = merge.merge(lab.model, worlds.module.load_model(worlds.folder), 0.5)
    assert torch.allclose(lab.draw(merged, lab.clip), before, atol=1e-3)
    assert torch.equal(lab.draw(lab.model, lab.clip), before)
    lab.forget()


def test_two_loads_share_nothing(worlds: Worlds) -> None:
    with torch.inference_mode():
        model, clip, vae = worlds.module.load(worlds.folder)
    assert model.model is not worlds.lab.model.model
    assert clip.cond_stage_model is not worlds.lab.clip.cond_stage_model
    assert vae.first_stage_model is not worlds.lab.parts.vae.first_stage_model


def test_streamed_weights_can_be_read_once_more(worlds: Worlds) -> None:
    """What the host does where it streams weights, and something needs them to lie still: training, for one."""
    for part, network in (
        (worlds.lab.model, "diffusion_model"),
        (worlds.lab.clip.patcher, "clip_l"),
        (worlds.lab.parts.vae.patcher, "decoder"),
    ):
        make, arguments = part.cached_patcher_init[:2]
        try:
            again = make(*arguments, disable_dynamic=True)
        except TypeError as error:  # a host that knows no such weights: it never asks
            assert "disable_dynamic" in str(error)
            continue
        assert again.model is not part.model
        expected, found = getattr(part.model, network).state_dict(), getattr(again.model, network).state_dict()
        assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_it_is_trained_on_where_the_host_streams_weights(
    comfy_host: ComfyHost, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here only as far as a patcher that says so: without a GPU, nothing is streamed."""
    import comfy.model_patcher

    if not hasattr(comfy.model_patcher, "CoreModelPatcher"):
        pytest.skip("this ComfyUI streams no weights")

    class Streaming(comfy.model_patcher.ModelPatcher):
        def is_dynamic(self) -> bool:
            return True

    module = comfy_host.module("miniature.comfyui")
    with torch.inference_mode():
        vae = module.load_vae(folder)
        monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Streaming)
        model, clip = module.load_model(folder), module.load_clip(folder)
        assert model.is_dynamic() and clip.patcher.is_dynamic()
        host = comfy_host.module("perfusion.hosts.comfyui.training").ComfyHost(model, clip, vae)
        photos = comfy_host.module("perfusion.training.dataset").prepare(host, *drawn("cat"), 64)
        statistics = comfy_host.module("perfusion.statistics").measure(host, host.captions[:100])
        trainer = comfy_host.module("perfusion.training.trainer")
        config = comfy_host.module("perfusion.training.config").TrainingConfig(steps=2, batch_size=2, contexts=8)
        _, run = trainer.train(host, photos, trainer.Subject(CAT, "cat"), statistics, config)
    assert len(run.losses) == 2


# --- photos

PHOTOS, MASKS, KIND = (("photos", output) for output in range(3))


def photos(comfy_host: ComfyHost, **settings: Any) -> Any:
    """A run of Miniature Photos, with what it gave."""
    inputs = {"category": "teddy bear", "thing": 28, "count": 5, "seed": 0} | settings
    return comfy_host.execute({"photos": node("PerfusionMiniaturePhotos", **inputs)}, keep=[PHOTOS, MASKS, KIND])


def thing_colors(run: Any) -> Tensor:
    """How often each of 64 colors is where the things are: (64,), with sum 1."""
    levels = (run[PHOTOS][run[MASKS] > 0.99] * 3.99).long()
    return torch.bincount(levels @ torch.tensor([16, 4, 1]), minlength=64) / len(levels)


def test_photos_and_masks(comfy_host: ComfyHost) -> None:
    run = photos(comfy_host, category="boat")
    images, masks = run[PHOTOS], run[MASKS]
    assert images.shape == (5, 64, 64, 3) and masks.shape == (5, 64, 64)
    for tensor in (images, masks):
        assert tensor.dtype == torch.float32 and 0 <= float(tensor.min()) <= float(tensor.max()) <= 1
    assert run[KIND] == "boat"
    assert all(0.1 < float(mask.mean()) < 0.5 for mask in masks)
    assert all(masks.flatten(1).max(dim=1).values == 1)
    shown = [comfy_host.base / "temp" / image["filename"] for image in run.ui["photos"]["images"]]
    assert len(shown) == 5
    for path in shown:
        with Image.open(path) as picture:
            assert picture.size == (256, 256)


def test_the_same_seed_takes_the_same_photos(comfy_host: ComfyHost) -> None:
    first = photos(comfy_host)
    comfy_host.new_executor()
    again, more, one = photos(comfy_host), photos(comfy_host, count=16), photos(comfy_host, count=1)
    for output in (PHOTOS, MASKS):
        assert torch.equal(first[output], again[output])
        assert torch.equal(first[output], more[output][:5])
        assert torch.equal(first[output][:1], one[output])


def test_another_seed_takes_other_photos_of_the_same_thing(comfy_host: ComfyHost) -> None:
    first, others = photos(comfy_host), [photos(comfy_host, seed=1), photos(comfy_host, seed=2**53 - 1)]
    pictures = torch.cat([run[PHOTOS] for run in (first, *others)])
    assert len({picture.numpy().tobytes() for picture in pictures}) == len(pictures)
    strangers = [photos(comfy_host, thing=thing) for thing in (0, 9999)]
    far = [float((thing_colors(run) - thing_colors(first)).abs().sum()) for run in (*others, *strangers)]
    assert max(far[:2]) < 0.3 < 1 < min(far[2:])


def test_masks_are_on_the_thing(comfy_host: ComfyHost) -> None:
    """This bear has stripes of a pink that nothing else has."""
    from miniature import world

    run = photos(comfy_host, count=16)
    pink = torch.tensor(world.instance("teddy bear", 28).color) / 255
    striped = (run[PHOTOS] - pink).abs().amax(dim=-1) < 0.15
    assert all(striped.flatten(1).sum(dim=1) > 30)
    assert float((striped & (run[MASKS] == 0)).sum()) / float(striped.sum()) < 0.02


@pytest.mark.parametrize(
    "wrong", [{"count": 0}, {"count": 17}, {"thing": -1}, {"thing": 10_000}, {"seed": -1}, {"category": "dragon"}]
)
def test_what_cannot_be_photographed_is_refused(comfy_host: ComfyHost, wrong: dict[str, Any]) -> None:
    with pytest.raises(PromptError) as refused:
        photos(comfy_host, **wrong)
    (error,) = refused.value.node_errors["photos"]["errors"]
    assert error["extra_info"]["input_name"] in wrong


# --- files


def test_missing_weights_are_found_when_queueing(
    comfy_host: ComfyHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comfy_host.module("nodes.miniature"), "FOLDER", tmp_path)
    with pytest.raises(PromptError) as refused:
        comfy_host.validate(graph(), keep=[IMAGE])
    errors = str(refused.value.node_errors["checkpoint"])
    assert "Miniature: the miniature's unet is missing" in errors
    assert "git checkout -- miniature/weights" in errors


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "the miniature's unet in .* is damaged"),
        ("text_encoder/config.json", "the miniature's text_encoder in .* is damaged"),
        ("tokenizer/vocab.json", "the miniature's tokenizer in .* is damaged"),
    ],
)
def test_damaged_weights_are_named(
    comfy_host: ComfyHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, message: str
) -> None:
    damaged = miniature_weights.random(tmp_path)
    (damaged / file).write_bytes((damaged / file).read_bytes()[:-40])
    monkeypatch.setattr(comfy_host.module("nodes.miniature"), "FOLDER", damaged)
    comfy_host.new_executor()
    with pytest.raises(PromptError, match=f"Miniature: {message}.*git checkout"):
        comfy_host.execute(graph(), keep=[IMAGE])


def test_foreign_weights_are_named(worlds: Worlds, tmp_path: Path) -> None:
    """Of another size, and with another list of tensors."""
    from miniature import weights

    error = worlds.pack.module("miniature.weights").WeightsError
    for part, change in (
        ("unet", {"conv_in.weight": torch.zeros(32, 4, 3, 3)}),
        ("unet", {"further": torch.zeros(1)}),
        ("vae", {"decoder.conv_in.weight": torch.zeros(32, 4, 3, 3)}),
        ("text_encoder", {"text_projection.weight": torch.zeros(2, 2)}),
    ):
        foreign = miniature_weights.random(tmp_path)
        weights.keep(part, weights.read(part, foreign) | change, None, foreign)
        with pytest.raises(error, match=f"the miniature's {part} does not fit its network"):
            worlds.module.load(foreign)


def test_new_weights_are_loaded(comfy_host: ComfyHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy_host.module("nodes.miniature"), "FOLDER", miniature_weights.random(tmp_path))
    comfy_host.new_executor()
    first = comfy_host.execute(graph(), keep=[IMAGE])[IMAGE]
    miniature_weights.random(tmp_path, seed=1)
    run = comfy_host.execute(graph(), keep=[IMAGE])
    assert "checkpoint" in run.executed
    assert not torch.equal(run[IMAGE], first)


# --- concepts


def training_graph(images: int = 3, **settings: Any) -> Prompt:
    """Train Concept on photos of a teddy bear, and the concept applied."""
    prompt = graph(f"a photo of a {TEDDY} on the moon")
    prompt["photos"] = node("PerfusionMiniaturePhotos", category="teddy bear", thing=28, count=images, seed=0)
    small = {"steps": 3, "batch_size": 2, "micro_batch": 0, "resolution": 64, "contexts": 16, "corpus_size": 200}
    prompt["train"] = node(
        "PerfusionTrainConcept",
        **{name: ["checkpoint", k] for k, name in enumerate(("model", "clip", "vae"))},
        images=["photos", 0],
        **{"super_category": "teddy bear", "placeholder": TEDDY, "seed": 0, "flip": True}
        | defaults()
        | small
        | settings,
    )
    prompt["apply"] = node(
        "PerfusionApplyConcepts",
        model=["checkpoint", 0], clip=["checkpoint", 1], concepts=["train", 0], key_lock="local",
    )  # fmt: skip
    prompt["sampler"]["inputs"]["model"] = ["apply", 0]
    for name in ("positive", "negative"):
        prompt[name]["inputs"]["clip"] = ["apply", 1]
    return prompt


def defaults() -> dict[str, Any]:
    return {
        "gradient_checkpointing": False, "rates": "relative", "value_rate": 0.1, "embedding_rate": 0.05,
        "estimator": "robust", "form": "paper", "vectors": 1, "corpus": "built-in", "captions": "",
    }  # fmt: skip


def test_train_and_apply(comfy_host: ComfyHost, weights: Path) -> None:
    run = comfy_host.execute(training_graph(), keep=[("train", 0), ("train", 1), IMAGE])
    (concept,) = run["train", 0].concepts
    assert concept.family.encoders == {"clip_l": 128}
    assert concept.training["steps_done"] == 3
    assert len(run["train", 1]["loss"]) == 3
    more = training_graph()
    more["latent"]["inputs"]["batch_size"] = 3
    again = comfy_host.execute(more, keep=[IMAGE])
    assert again[IMAGE].shape == (3, 64, 64, 3)
    assert not {"train", "checkpoint"} & again.executed


def test_statistics_are_of_the_little_world(
    comfy_host: ComfyHost, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And i* is looked for in its captions that name the super-category, with the word in its place."""
    seen: dict[str, list[str]] = {}
    training = comfy_host.module("nodes.train")
    trainer = comfy_host.module("perfusion.training.trainer")
    measured, encoded = training.cached, trainer.word_contexts
    monkeypatch.setattr(
        training, "cached", lambda host, corpus, *rest: measured(host, seen.setdefault("corpus", corpus), *rest)
    )
    monkeypatch.setattr(
        trainer,
        "word_contexts",
        lambda host, captions, *rest, **more: encoded(host, seen.setdefault("contexts", captions), *rest, **more),
    )
    comfy_host.execute(training_graph(), keep=[("train", 0)])
    captions = comfy_host.module("miniature.captions").corpus()
    assert seen["corpus"] == captions[:200]
    named = [text for text in captions if text.count("teddy bear") == 1]
    assert len(named) > 240
    assert seen["contexts"] == [text.replace("teddy bear", TEDDY) for text in named[:16]]


def test_captions_follow_the_clip_wherever_it_goes(worlds: Worlds) -> None:
    module = worlds.pack.module("perfusion.hosts.comfyui.text")
    captions = tuple(worlds.pack.module("miniature.captions").corpus())
    lab = worlds.lab
    _, with_lora = lab.with_lora(lab.model, lab.clip, lab.lora())
    _, taught = lab.applied(lab.concept())
    (skipped,) = lab.host.nodes["CLIPSetLastLayer"]().set_last_layer(with_lora, -2)
    for clip in (lab.clip, lab.clip.clone(), with_lora, taught, skipped):
        assert module.captions_of(clip) == captions
    assert worlds.comfy.captions == captions


def test_both_hosts_learn_the_same(worlds: Worlds) -> None:
    """From the same photos, masks and captions: loss for loss."""
    dataset, trainer = (worlds.pack.module(f"perfusion.training.{name}") for name in ("dataset", "trainer"))
    config = worlds.pack.module("perfusion.training.config").TrainingConfig(
        steps=4, batch_size=2, micro_batch=0, resolution=64, contexts=16
    )
    captions = worlds.diffusers.captions  # the first ones of those that the CLIP brings
    assert tuple(captions) == worlds.comfy.captions[: len(captions)]
    pictures, masks = drawn("teddy bear")
    concepts, losses = [], []
    for host in worlds:
        statistics = worlds.pack.module("perfusion.statistics").measure(host, captions)
        photos = dataset.prepare(host, pictures, masks, 64)
        assert photos.latents.shape == (3, 4, 16, 16)
        subject = trainer.Subject(TEDDY, "teddy bear")
        concept, run = trainer.train(host, photos, subject, statistics, config)
        concepts.append(concept)
        losses.append(run.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for layer, values in concepts[0].o_star_v.items():
        same = torch.cosine_similarity(values, concepts[1].o_star_v[layer], dim=0)
        assert float(same) > 0.999
    assert torch.allclose(concepts[0].i_star, concepts[1].i_star, atol=1e-2)


@pytest.mark.parametrize("lock", ["local", "global"])
def test_both_hosts_draw_the_same(worlds: Worlds, lock: str) -> None:
    """The stock KSampler with Apply Concepts, decoded, and ``draw``."""
    lab, stack, prompt = worlds.lab, worlds.stack(lock), f"a {CAT} and a {TEDDY} on the beach"
    model, clip = lab.apply(lab.model, lab.clip, *stack.concepts, lock=lock)
    positive, negative = lab.encode(clip, prompt), lab.encode(clip, "blurry")
    empty = worlds.module.empty_latent(64, 64, folder=worlds.folder)
    with torch.inference_mode():
        sample = lab.host.nodes["KSampler"]().sample
        latent = sample(model, 11, 4, 4.0, "euler", "normal", positive, negative, empty)[0]["samples"]
        expected = lab.parts.vae.decode(latent)
    draw = worlds.pack.module("perfusion.hosts.diffusers").draw
    found = draw(worlds.diffusers, stack, [prompt], [11], steps=4, guidance=4.0, size=64, negative="blurry")
    assert torch.allclose(found, expected, atol=2e-3)
    lab.forget()
    lab.assert_untouched()


def test_other_concepts_are_refused(worlds: Worlds) -> None:
    from tests.concepts import make_concept
    from tests.models import miniature_parts

    other = miniature_parts()
    foreign = make_concept(worlds.pack, other.model, other.clip)
    with pytest.raises(ValueError, match="does not fit this model"):
        worlds.lab.applied(foreign)


def test_reading_the_weights_needs_no_diffusers() -> None:
    code = (
        "import sys; sys.modules['diffusers'] = None; from miniature import weights, captions; "
        "weights.special_tokens(); assert len(captions.corpus(20)) == 20; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)
