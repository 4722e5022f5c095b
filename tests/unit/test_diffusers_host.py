"""diffusers as a host, on a Stable Diffusion pipeline in miniature with random weights."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

import tests.diffusers_models as models
from perfusion.concept import Concept
from perfusion.corpus import captions
from perfusion.edit import Directions, Gate, KeyValueEdit
from perfusion.hosts.base import Host, Word
from perfusion.hosts.diffusers import DiffusersHost, UnsupportedPipelineError, apply, draw, encode_prompts
from perfusion.hosts.diffusers.patching import EditedProjections, _Attention
from perfusion.hosts.diffusers.structure import cross_attentions, family_of, spatial_transformers
from perfusion.places import Places
from perfusion.scope import ScopedText
from perfusion.stack import ConceptStack, ConceptUse, StackError, word_number
from perfusion.statistics import measure
from perfusion.training.config import TrainingConfig
from perfusion.training.dataset import Photos, prepare
from perfusion.training.trainer import Subject, Trainer, train
from tests.concepts import expected_projection

TEDDY, CAT = "<my-teddy>", "<my-cat>"
PROMPT = f"a photo of a {TEDDY}"  # for certain opens the gate of the concepts below
SD15_LAYERS = [
    *(f"input_blocks.{n}.1" for n in (1, 2, 4, 5, 7, 8)),
    "middle_block.1",
    *(f"output_blocks.{n}.1" for n in range(3, 12)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture
def pipe(folder: Path) -> StableDiffusionPipeline:
    return models.pipeline(folder)


@pytest.fixture
def host(pipe: StableDiffusionPipeline) -> DiffusersHost:
    return DiffusersHost(pipe)


@pytest.fixture(autouse=True)
def nothing_left(pipe: StableDiffusionPipeline) -> Iterator[None]:
    """Whatever a test does, nothing of ours is left in the pipeline."""
    processors = dict(pipe.unet.attn_processors)
    yield
    assert_untouched(pipe)
    assert pipe.unet.attn_processors == processors


def assert_untouched(pipe: Any) -> None:
    for network in (pipe.unet, pipe.text_encoder, pipe.vae):
        left = [name for name, module in network.named_modules() if "forward" in vars(module)]
        assert not left, f"patched forwards are left: {left}"
    assert "encode_prompt" not in vars(pipe)


def make_concept(
    host: DiffusersHost,
    placeholder: str = TEDDY,
    super_category: str = "teddy bear",
    *,
    seed: int = 0,
    vectors: int = 1,
    form: str = "paper",
) -> Concept:
    """Random but sensible: i* encodes the word itself, d* is its dual, o*_V has the scale of ``W_V e_super``."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(vectors, models.WIDTH, generator=generator) * host.embedding_scale()["clip_l"]
    template = [f"a photo of a {placeholder}"]
    with torch.no_grad():
        own = host.encode(template, Word(placeholder, super_category, {"clip_l": rows}))
        general = host.encode(template, Word(placeholder, super_category))
        others = host.encode(captions(20)).context.flatten(0, 1).double()
    i_star = own.context[own.word].mean(0)
    e_super = general.context[general.word][-1]
    moment = others.T @ others / len(others)
    moment += 0.05 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    d_star = torch.linalg.solve(moment, i_star.double()).float()
    values = {layer: v.squeeze(0) for layer, v in host.project_values(e_super.unsqueeze(0)).items()}
    return Concept.rounded(
        family=host.family,
        placeholder=placeholder,
        super_category=super_category,
        embeddings={"clip_l": rows},
        i_star=i_star,
        d_star=d_star / d_star.abs().max(),
        e_super=e_super,
        o_star_v={
            layer: v + 2 * v.square().mean().sqrt() * torch.randn(v.shape, generator=generator)
            for layer, v in values.items()
        },
        form=form,
    )


def stack_of(*concepts: Concept, lock: Any = "local", strength: float = 1.0) -> ConceptStack:
    return ConceptStack(tuple(ConceptUse(concept, Gate(strength=strength), lock) for concept in concepts))


def two_concepts(host: DiffusersHost, **settings: Any) -> ConceptStack:
    cat = make_concept(host, CAT, "cat", seed=1, vectors=3, form="preserving")
    return stack_of(make_concept(host), cat, **settings)


def call(pipe: Any, prompt: Any, negative: Any = None, **settings: Any) -> Tensor:
    """Latents of a pipeline call."""
    count = len(prompt) if isinstance(prompt, list) else 1
    noise = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(5)).to(pipe.unet.dtype)
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "latents": noise, "output_type": "latent"} | settings
    return pipe(prompt=prompt, negative_prompt=negative, height=16, width=16, **settings).images


@contextmanager
def recorded(pipe: Any) -> Iterator[dict[tuple[str, str], list[tuple[Tensor, Tensor]]]]:
    """(layer, "k" or "v") -> what each call got and gave, as attention sees it."""
    seen: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    handles = []

    def watch(key: tuple[str, str]) -> Callable[..., None]:
        calls = seen.setdefault(key, [])
        return lambda module, inputs, output: calls.append((inputs[0], output))

    for layer, attention in cross_attentions(pipe.unet):
        for path in ("k", "v"):
            handles.append(getattr(attention, f"to_{path}").register_forward_hook(watch((layer, path))))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# --- structure


def test_layers_have_the_names_of_the_original_network(host: DiffusersHost) -> None:
    unet = models.unet(models.SD15_DOWN, models.SD15_UP, (8, 16, 16, 16), layers_per_block=2, cross_attention_dim=12)
    found = [layer.removesuffix(".transformer_blocks.0") for layer, _ in cross_attentions(unet)]
    assert found == SD15_LAYERS
    assert list(host.family.transformers) == [
        "input_blocks.1.1",
        "middle_block.1",
        "output_blocks.2.1",
        "output_blocks.3.1",
    ]
    assert host.family.encoders == {"clip_l": models.WIDTH}
    assert (host.family.name, host.family.context_width) == ("unet64", models.WIDTH)


@pytest.mark.parametrize(
    ("down", "up", "settings", "names"),
    [
        ("XX", "XX", {}, "i1 i3 m1 o0 o1 o2 o3"),
        ("DXX", "XXD", {}, "i3 i5 m1 o0 o1 o2 o3"),
        ("XD", "DX", {"layers_per_block": (2, 1)}, "i1 i2 m1 o2 o3 o4"),
        ("DX", "XD", {"mid_block_type": None}, "i3 o0 o1"),
        ("AX", "XA", {}, "i3 m1 o0 o1"),
    ],
)
def test_layers_of_other_layouts(down: str, up: str, settings: dict[str, Any], names: str) -> None:
    kinds = {"X": "CrossAttn{}Block2D", "D": "{}Block2D", "A": "Attn{}Block2D"}
    unet = models.unet(
        tuple(kinds[k].format("Down") for k in down),
        tuple(kinds[k].format("Up") for k in up),
        (8, 16, 16)[: len(down)],
        **settings,
    )
    full = {"i": "input_blocks.{}.1", "m": "middle_block.{}", "o": "output_blocks.{}.1"}
    expected = [full[name[0]].format(name[1:]) for name in names.split()]
    assert [layer.removesuffix(".transformer_blocks.0") for layer, _ in cross_attentions(unet)] == expected


def test_several_blocks_in_one_transformer(folder: Path) -> None:
    pipe = models.pipeline(folder, unet=models.unet(transformer_layers_per_block=2))
    assert set(family_of(pipe).transformers.values()) == {(2, 32), (2, 64)}
    assert [name for name, _ in spatial_transformers(pipe.unet)] == list(family_of(pipe).transformers)
    assert list(family_of(pipe).layers) == [layer for layer, _ in cross_attentions(pipe.unet)]


@pytest.mark.parametrize(
    ("name", "width", "encoder", "heads"), [("sd1", 768, "clip_l", 8), ("sd2", 1024, "clip_h", [5, 10, 20, 20])]
)
def test_families_of_the_true_architectures(folder: Path, name: str, width: int, encoder: str, heads: Any) -> None:
    channels = (320, 640, 1280, 1280)
    with torch.device("meta"):
        unet = models.unet(
            models.SD15_DOWN,
            models.SD15_UP,
            channels,
            layers_per_block=2,
            norm_num_groups=32,
            cross_attention_dim=width,
            attention_head_dim=heads,
            use_linear_projection=name == "sd2",
        )
        text_encoder = models.text_encoder(models.tokenizer(folder), width)
    family = family_of(SimpleNamespace(unet=unet, text_encoder=text_encoder, tokenizer=models.tokenizer(folder)))
    assert (family.name, family.context_width, family.encoders) == (name, width, {encoder: width})
    assert list(family.transformers) == SD15_LAYERS
    down, up = [320, 320, 640, 640, 1280, 1280], [*[1280] * 3, *[640] * 3, *[320] * 3]
    assert list(family.transformers.values()) == [(1, inner) for inner in (*down, 1280, *up)]
    assert sum(family.layers.values()) == 12_480


def test_a_host_of_parts(pipe: Any, host: DiffusersHost) -> None:
    same: Host = DiffusersHost.of_parts(
        unet=pipe.unet,
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        scheduler=pipe.scheduler,
        captions=["a cat"],
    )
    assert (same.captions, host.captions) == (["a cat"], None)
    assert same.family == host.family
    assert same.fingerprint == host.fingerprint
    assert same.device == torch.device("cpu")


def test_the_fingerprint_is_of_the_weights(folder: Path, host: DiffusersHost) -> None:
    assert DiffusersHost(models.pipeline(folder)).fingerprint == host.fingerprint
    assert DiffusersHost(models.pipeline(folder, seed=1)).fingerprint != host.fingerprint


def broken(pipe: Any, **changes: Any) -> Any:
    parts = {name: getattr(pipe, name) for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")}
    return SimpleNamespace(**(parts | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda p: {"unet": None}, "no UNet"),
        (lambda p: {"text_encoder_2": p.text_encoder}, "more than one text encoder"),
        (lambda p: {"text_encoder": None}, "lacks its text encoder"),
        (lambda p: {"tokenizer": None}, "lacks its text encoder or tokenizer"),
        (lambda p: {"text_encoder": models.text_encoder(p.tokenizer, 32)}, "32 wide"),
        (lambda p: {"unet": models.unet(("DownBlock2D",), ("UpBlock2D",), (8,), mid_block_type=None)}, "no cross-att"),
        (lambda p: {"unet": models.unet(in_channels=9)}, "9 channels"),
        (lambda p: {"unet": models.unet(class_embed_type="timestep")}, "class_embed_type"),
        (lambda p: {"vae": None}, "use the AutoencoderKL"),
        (lambda p: {"scheduler": FlowMatchEulerDiscreteScheduler()}, "neither noise nor velocity"),
        (lambda p: {"scheduler": models.scheduler(prediction_type="sample")}, "neither noise nor velocity"),
    ],
)
def test_others_are_refused(pipe: Any, changes: Callable[[Any], dict[str, Any]], message: str) -> None:
    with pytest.raises(UnsupportedPipelineError, match=message):
        DiffusersHost(broken(pipe, **changes(pipe)))


def test_fused_projections_are_refused(pipe: Any, host: DiffusersHost) -> None:
    stack = stack_of(make_concept(host))
    next(cross_attentions(pipe.unet))[1].fused_projections = True
    with pytest.raises(UnsupportedPipelineError, match="unfuse"), apply(pipe, stack):
        pass


def test_a_concept_of_another_family_is_refused(pipe: Any, host: DiffusersHost, folder: Path) -> None:
    other = models.pipeline(folder, unet=models.unet(layers_per_block=2))
    stack = stack_of(make_concept(host))
    with pytest.raises(StackError, match="does not fit this pipeline"), apply(other, stack):
        pass
    with pytest.raises(StackError, match="does not fit this pipeline"):
        draw(DiffusersHost(other), stack, ["a"], [0], steps=1, size=16)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    package = "perfusion.hosts.diffusers"
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r'pip install "comfyui-perfusion\[demo\]"'):
        importlib.import_module(package)


# --- text


def words_of(host: DiffusersHost, prompt: str, word: Word) -> list[int]:
    return host.encode([prompt], word).word[0].nonzero().flatten().tolist()


def test_texts_without_words_encode_as_in_the_pipeline(pipe: Any, host: DiffusersHost) -> None:
    prompts = ["a photo of a teddy bear", "", "my-teddy < my >", "a red cat, " * 40]
    with torch.no_grad():
        stock = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
        for word in (None, Word(TEDDY, "teddy bear"), Word(TEDDY, "", {"clip_l": torch.ones(2, models.WIDTH)})):
            found = host.encode(prompts, word)
            assert torch.equal(found.context, stock)
            assert not found.word.any()


def test_padding_begins_behind_the_first_end_token(pipe: Any, host: DiffusersHost) -> None:
    found = host.encode(["a cat", "", "a cat " * 60, "a é cat"], Word(TEDDY, "cat", {"clip_l": torch.ones(1, 64)}))
    ends = [3, 1, 76, 2]  # what the tokenizer doesn't know becomes an end token
    assert pipe.tokenizer.unk_token_id == pipe.tokenizer.eos_token_id
    assert torch.equal(found.padding, torch.arange(77) > torch.tensor(ends)[:, None])


@pytest.mark.parametrize(
    ("prompt", "places"),
    [
        (TEDDY, [1]),
        (f"{TEDDY} on the beach", [1]),
        (f"a photo of a {TEDDY} on the beach", [5]),
        (f"a {TEDDY} and a {TEDDY}", [2, 5]),
        ("A <MY-TEDDY>, a <My-Teddy>.", [2, 5]),
        (f"a\n{TEDDY}\ncat", [2]),
        (f"{TEDDY}{TEDDY}", [1, 2]),
        ("<my-teddy2> <my-tedd>", []),
    ],
)
@pytest.mark.parametrize("vectors", [None, 1, 3])
def test_word_at_any_place(host: DiffusersHost, prompt: str, places: list[int], vectors: int | None) -> None:
    """Its own tokens, by count: those of the super-category, or its vectors."""
    rows = None if vectors is None else {"clip_l": torch.randn(vectors, models.WIDTH)}
    count = vectors or 2
    expected = [place + (count - 1) * k + own for k, place in enumerate(places) for own in range(count)]
    assert words_of(host, prompt, Word(TEDDY, "teddy bear", rows)) == expected


def test_the_super_category_in_place_of_the_word(host: DiffusersHost) -> None:
    found = host.encode([f"a {TEDDY}, on the beach"], Word(TEDDY, "teddy bear")).context
    assert torch.equal(found, host.encode(["a teddy bear, on the beach"]).context)


def test_embeddings_in_place_of_the_word(host: DiffusersHost) -> None:
    """Rows that are the super-category's own say the same as its tokens."""
    rows = host.token_embeddings("teddy bear")
    assert rows["clip_l"].shape == (2, models.WIDTH)
    prompts = [f"a {TEDDY} on the beach", f"{TEDDY} and {TEDDY}"]
    found, plain = (host.encode(prompts, Word(TEDDY, "teddy bear", r)) for r in (rows, None))
    assert torch.equal(found.context, plain.context)
    assert torch.equal(found.word, plain.word)
    assert host.token_embeddings(" ")["clip_l"].shape == (0, models.WIDTH)


@pytest.mark.parametrize("before", [72, 73, 74, 75, 90])
def test_words_around_the_end_of_what_the_encoder_sees(host: DiffusersHost, before: int) -> None:
    word = Word(TEDDY, "cat", {"clip_l": torch.randn(3, models.WIDTH)})
    found = host.encode(["a " * before + TEDDY], word)
    assert found.context.shape == (1, 77, models.WIDTH)
    assert found.context.isfinite().all()
    assert found.word.sum() == max(0, min(3, 75 - before))
    assert not found.padding.any()


def test_gradient_reaches_the_embeddings_alone(pipe: Any, host: DiffusersHost) -> None:
    rows = torch.randn(2, models.WIDTH, requires_grad=True)
    with host.training():
        found = host.encode([f"a {TEDDY}", f"{TEDDY} on the beach", "a cat"], Word(TEDDY, "", {"clip_l": rows}))
        found.context.square().sum().backward()
        assert found.context.requires_grad
    assert rows.grad is not None and (rows.grad.abs().sum(1) > 0).all()
    assert all(parameter.grad is None for parameter in pipe.text_encoder.parameters())


def test_embedding_scale(pipe: Any, host: DiffusersHost) -> None:
    table = pipe.text_encoder.get_input_embeddings().weight
    assert host.embedding_scale() == {"clip_l": pytest.approx(float(table.detach().std()))}


# --- the network


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_denoise_inverts_what_the_network_predicts(folder: Path, kind: str) -> None:
    """With the scheduler's own formulas, from the variance-preserving form it works in."""
    scheduler: Any = models.scheduler(prediction_type=kind)
    pipe = models.pipeline(folder, scheduler=scheduler)
    host = DiffusersHost(pipe)
    levels = host.noise_levels()
    assert levels.shape == (1000,) and (levels.diff() > 0).all()
    timesteps = torch.tensor([0, 7, 500, 999])
    assert torch.equal(host.timestep(levels[timesteps]), timesteps)
    x0, noise = torch.randn(2, 4, 4, 8, 8)
    text = host.encode(["a cat"] * 4)
    with host.training(), torch.no_grad():
        found = host.denoise(x0 + levels[timesteps].view(-1, 1, 1, 1) * noise, levels[timesteps], text, None)
    with torch.no_grad():
        preserving = scheduler.add_noise(x0, noise, timesteps)
        raw = pipe.unet(preserving, timesteps, text.context).sample
    for k, timestep in enumerate(timesteps):
        scheduler.set_timesteps(1000)
        expected = scheduler.step(raw[k], int(timestep), preserving[k]).pred_original_sample
        assert torch.allclose(found[k], expected, atol=1e-4 * float(levels[timestep]) + 1e-5)


def test_levels_of_a_schedule_that_ends_in_pure_noise(folder: Path) -> None:
    scheduler = models.scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    levels = DiffusersHost(models.pipeline(folder, scheduler=scheduler)).noise_levels()
    assert levels.isfinite().all() and (levels.diff() > 0).all()


def test_images_and_latents(pipe: Any, host: DiffusersHost) -> None:
    images = torch.rand(2, 16, 24, 3)
    latents = host.encode_images(images)
    assert latents.shape == (2, 4, 8, 12) and host.latent_scale == 2
    assert torch.equal(latents, host.encode_images(images))
    with torch.no_grad():
        mean = pipe.vae.encode(2 * images.permute(0, 3, 1, 2) - 1).latent_dist.mean * 0.5
        decoded = pipe.image_processor.postprocess(pipe.vae.decode(latents / 0.5).sample, output_type="pt")
    assert torch.equal(latents, mean)
    assert torch.allclose(host.decode_latents(latents), decoded.permute(0, 2, 3, 1), atol=1e-5)


def test_project_values(pipe: Any, host: DiffusersHost) -> None:
    vectors = torch.randn(3, models.WIDTH)
    for layer, attention in cross_attentions(pipe.unet):
        assert torch.allclose(host.project_values(vectors)[layer], vectors @ attention.to_v.weight.T, atol=1e-5)


def owners_of(host: DiffusersHost, prompts: list[str], stack: ConceptStack) -> torch.Tensor:
    """``owners`` for ``expected_projection``."""
    words = host.text.words(prompts, stack)
    owners = torch.full(words.shape, -1)
    for j, placeholder in enumerate(stack.placeholders):
        owners[words == word_number(placeholder)] = j
    return owners


@torch.no_grad()
@pytest.mark.parametrize("lock", ["local", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_gets_the_edited_projections(pipe: Any, host: DiffusersHost, lock: str, dtype: torch.dtype) -> None:
    """Wanted and negative prompts alike, as the equations say when they are written down naively, in float64."""
    stack = two_concepts(host, lock=lock)
    prompts, negative = [f"a photo of a {TEDDY}", f"a {CAT} and a {TEDDY} on the beach"], ["blurry", f"a {CAT}"]
    pipe.to(dtype)
    unedited = [encode_prompts(host, texts, stack) for texts in (negative, prompts)]
    with recorded(pipe) as seen, apply(pipe, stack):
        call(pipe, prompts, negative)
    context = torch.cat([context for context, _ in unedited])
    keys = context
    if lock == "global":
        keys = context + torch.cat([shift for _, shift in unedited if shift is not None])
        assert not torch.equal(keys[1:], context[1:]) and torch.equal(keys[0], context[0])
    tolerance = 2e-5 if dtype == torch.float32 else 0.1
    owners, uses = owners_of(host, [*negative, *prompts], stack), list(stack.uses)
    assert sorted(owners.unique().tolist()) == [-1, 0, 1]
    for layer, attention in cross_attentions(pipe.unet):
        w_k, w_v = attention.to_k.weight.double(), attention.to_v.weight.double()
        locked = [w_k @ concept.e_super.double() for concept in stack.concepts]
        expected_k = (
            keys.double() @ w_k.T if lock == "global" else expected_projection(context, w_k, uses, locked, owners)
        )
        values = [concept.o_star_v[layer].double() for concept in stack.concepts]
        expected = {"k": expected_k, "v": expected_projection(context, w_v, uses, values, owners)}
        for path in ("k", "v"):
            assert len(seen[layer, path]) == 2
            for given, made in seen[layer, path]:
                assert torch.allclose(given, context, atol=1e-6)
                scale = float(expected[path].abs().max())
                assert (made.double() - expected[path]).abs().max() < tolerance * scale


def test_the_shift_leads_to_the_prompt_with_the_super_category(host: DiffusersHost) -> None:
    stack = stack_of(make_concept(host, CAT, "cat"), lock="global")
    context, shift = encode_prompts(host, [f"a red {CAT} on the beach", "a house"], stack)
    twin = host.encode(["a red cat on the beach", "a house"]).context
    assert shift is not None
    assert torch.allclose(context + shift, twin, atol=1e-6)
    assert not shift[1].any() and shift[0].any()
    assert encode_prompts(host, ["a"], stack.locked("local"))[1] is None


def test_a_longer_super_category_moves_what_follows(host: DiffusersHost) -> None:
    stack = stack_of(make_concept(host), lock="global")
    context, shift = encode_prompts(host, [f"a {TEDDY} on the beach"], stack)
    twin = host.encode(["a teddy bear on the beach"]).context
    assert shift is not None
    assert torch.allclose((context + shift)[0, :2], twin[0, :2], atol=1e-6)
    assert torch.allclose((context + shift)[0, 2:76], twin[0, 3:77], atol=1e-6)
    assert torch.allclose((context + shift)[0, 76], twin[0, 76], atol=1e-6), "padding reads padding"


@pytest.mark.parametrize("lock", ["local", "global"])
def test_each_word_is_heard_by_its_own_tokens_alone(host: DiffusersHost, lock: Any) -> None:
    teddy = replace(make_concept(host, super_category="bear"), scope="word")
    cat = replace(make_concept(host, CAT, "cat", seed=1), scope="word")
    prompts = [f"a {TEDDY} and a {CAT} on the beach", "a house"]
    stack = stack_of(teddy, cat, lock=lock)
    context, shift = encode_prompts(host, prompts, stack)
    plain = host.encode(["a bear and a cat on the beach", "a house"]).context
    first = host.encode([f"a {TEDDY}"], Word(TEDDY, "", teddy.embeddings)).context[0, 2]
    second = host.encode([f"a bear and a {CAT}"], Word(CAT, "", cat.embeddings)).context[0, 5]
    assert torch.allclose(context[0, 2], first, atol=1e-6) and torch.allclose(context[0, 5], second, atol=1e-6)
    others = [m for m in range(77) if m not in (2, 5)]
    assert torch.allclose(context[0, others], plain[0, others], atol=1e-6)
    assert torch.allclose(context[1], plain[1], atol=1e-6)
    if lock == "global":
        assert shift is not None
        assert torch.allclose(context + shift, plain, atol=1e-6)
    # One that is heard by all behind it is heard so beside one that is not.
    loud = encode_prompts(host, prompts[:1], stack_of(replace(teddy, scope="prompt"), cat))[0]
    told = host.encode([f"a {TEDDY} and a cat on the beach"], Word(TEDDY, "", teddy.embeddings)).context
    assert torch.allclose(loud[0, others], told[0, others], atol=1e-6)


@pytest.mark.parametrize("vectors", [1, 2, 3])
@pytest.mark.parametrize("scope", ["word", "prompt"])
def test_training_and_drawing_encode_alike(host: DiffusersHost, scope: Any, vectors: int) -> None:
    concept = replace(make_concept(host, vectors=vectors), scope=scope)
    prompts = [f"a {TEDDY} on the beach", f"two dogs and a {TEDDY}"]
    word = Word(TEDDY, concept.super_category, concept.embeddings)
    with torch.no_grad():
        trained = ScopedText(host, scope)(prompts, word)
    drawn = encode_prompts(host, prompts, stack_of(concept))[0]
    assert torch.allclose(trained.context, drawn, atol=1e-5)


# --- concepts on a pipeline


@pytest.mark.parametrize("off", ["empty", "strength 0"])
def test_off_is_off(pipe: Any, host: DiffusersHost, off: str) -> None:
    stack = ConceptStack() if off == "empty" else two_concepts(host, strength=0.0)
    prompts = [f"a {TEDDY}", "a cat"]
    before = call(pipe, prompts, ["blurry"] * 2)
    with apply(pipe, stack):
        assert_untouched(pipe)
        assert torch.equal(call(pipe, prompts, ["blurry"] * 2), before)
    text = host.encode(["a cat"])
    noisy, sigma = torch.randn(1, 4, 8, 8), torch.tensor([1.0])
    with torch.no_grad():
        plain = host.denoise(noisy, sigma, text, None)
        scaled = pipe.unet(noisy / 2**0.5, host.timestep(sigma), text.context).sample
    assert torch.equal(plain, noisy - scaled)


def test_two_concepts_in_a_batch(pipe: Any, host: DiffusersHost) -> None:
    stack = two_concepts(host)
    prompts = [f"a photo of a {TEDDY} on the beach", f"a {CAT} and a {TEDDY}", "a house"]
    before = call(pipe, prompts)
    with apply(pipe, stack):
        together = call(pipe, prompts)
        # Each by itself, from the same noise, is what it was in the batch.
        noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
        for k, prompt in enumerate(prompts):
            alone = call(pipe, prompt, latents=noise[k : k + 1])
            assert torch.allclose(alone, together[k : k + 1], atol=1e-4)
        twice = call(pipe, prompts[:1], num_images_per_prompt=2, latents=noise[:1].repeat(2, 1, 1, 1))
        assert torch.allclose(twice, together[:1].expand(2, -1, -1, -1), atol=1e-4)
        unguided = call(pipe, prompts, guidance_scale=1.0)
    assert together.isfinite().all() and unguided.isfinite().all()
    assert (together - before)[:2].flatten(1).std(dim=1).min() > 1e-3
    assert torch.equal(call(pipe, prompts), before)


def test_words_need_not_be_written_in_lower_case(pipe: Any, host: DiffusersHost) -> None:
    with apply(pipe, two_concepts(host)):
        assert torch.equal(call(pipe, "a <MY-Teddy>"), call(pipe, f"a {TEDDY}"))


# The pipeline's scheduler calls numpy in a way that numpy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("lock", ["local", "global"])
def test_drawing_and_a_pipeline_agree(pipe: Any, host: DiffusersHost, lock: str) -> None:
    """The pipeline with diffusers' own Euler sampler: the same pictures."""
    stack = two_concepts(host, lock=lock)
    prompts, seeds, steps = [f"a photo of a {TEDDY}", f"a {CAT} and a {TEDDY}", "a house"], [3, 4, 3], 4
    drawn = draw(host, stack, prompts, seeds, steps=steps, guidance=4.0, size=(16, 24), negative="blurry", batch=2)
    noise = torch.stack([torch.randn(4, 8, 12, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    largest = float(host.noise_levels()[-1])
    with apply(pipe, stack):
        made = pipe(
            prompt=prompts,
            negative_prompt=["blurry"] * 3,
            height=16,
            width=24,
            num_inference_steps=steps,
            guidance_scale=4.0,
            latents=noise * (1 + largest**2) ** 0.5 / largest,
            output_type="pt",
        ).images
    assert drawn.shape == (3, 16, 24, 3)
    assert torch.allclose(drawn, made.permute(0, 2, 3, 1), atol=2e-3)
    assert_untouched(pipe)
    plain = draw(host, ConceptStack(), prompts, seeds, steps=steps, guidance=4.0, size=(16, 24), negative="blurry")
    assert not torch.allclose(plain[0], drawn[0], atol=1e-2)


def test_drawing_does_not_depend_on_the_batch(host: DiffusersHost) -> None:
    stack, prompts = two_concepts(host), [f"a {TEDDY}", f"a {CAT}", "a house"]
    settings: dict[str, Any] = {"steps": 3, "size": 16, "guidance": 3.0}
    together = draw(host, stack, prompts, [7, 8, 9], batch=3, **settings)
    assert torch.allclose(draw(host, stack, prompts, [7, 8, 9], batch=1, **settings), together, atol=1e-4)
    assert torch.allclose(draw(host, stack, prompts[1:2], [8], **settings), together[1:2], atol=1e-4)
    assert torch.equal(draw(host, stack, prompts, [7, 8, 9], batch=3, **settings), together)
    assert draw(host, stack, prompts[:1], [1], steps=1, size=16, guidance=1).shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    "wrong", [{"seeds": [1]}, {"prompts": [], "seeds": []}, {"size": 15}, {"steps": 0}, {"batch": 0}]
)
def test_drawing_refuses(host: DiffusersHost, wrong: dict[str, Any]) -> None:
    given = {"prompts": ["a", "b"], "seeds": [1, 2], "steps": 1, "size": 16} | wrong
    with pytest.raises(ValueError):
        draw(host, ConceptStack(), **given)


def test_clip_skip_is_the_pipelines(pipe: Any, host: DiffusersHost) -> None:
    rows = host.token_embeddings("cat")["clip_l"]
    concept = make_concept(host, CAT, "cat")
    concept = Concept(**{**vars(concept), "embeddings": {"clip_l": rows}})
    with torch.no_grad(), apply(pipe, stack_of(concept)):
        found = pipe.encode_prompt(f"a {CAT}", "cpu", 1, True, negative_prompt=f"a {CAT}", clip_skip=1)
    with torch.no_grad():
        states = pipe.text_encoder(
            torch.tensor(pipe.tokenizer(["a cat"], padding="max_length")["input_ids"]), output_hidden_states=True
        )
        skipped = getattr(pipe.text_encoder, "text_model", pipe.text_encoder).final_layer_norm(states.hidden_states[-2])
    assert torch.allclose(found[0], skipped, atol=1e-6)
    assert torch.allclose(found[1], states.last_hidden_state, atol=1e-6)


def test_prompts_that_the_user_encoded_are_edited_too(pipe: Any, host: DiffusersHost) -> None:
    stack = stack_of(make_concept(host))
    context = encode_prompts(host, [PROMPT], stack)[0].detach()
    with apply(pipe, stack):
        assert torch.allclose(call(pipe, None, prompt_embeds=context), call(pipe, PROMPT), atol=1e-5)


def test_global_lock_falls_back_where_the_prompt_is_unknown(
    pipe: Any, host: DiffusersHost, caplog: pytest.LogCaptureFixture
) -> None:
    stack = stack_of(make_concept(host), lock="global")
    context = encode_prompts(host, [PROMPT], stack)[0].detach()
    with apply(pipe, stack.locked("local")):
        local = call(pipe, PROMPT)
    with caplog.at_level(logging.INFO), apply(pipe, stack):
        known = call(pipe, PROMPT)
        assert not caplog.records
        unknown = call(pipe, None, prompt_embeds=context * (1 + 1e-6))
    assert torch.allclose(unknown, local, atol=1e-4)
    assert not torch.allclose(known, local, atol=1e-4)
    assert [record.message for record in caplog.records if "global" in record.message] and len(caplog.records) == 1


def test_a_concept_that_no_prompt_names_is_reported(
    pipe: Any, host: DiffusersHost, caplog: pytest.LogCaptureFixture
) -> None:
    with apply(pipe, stack_of(make_concept(host))):
        call(pipe, PROMPT)
        assert not caplog.records
        call(pipe, "a house " * 50 + TEDDY)
    # transformers says once in a process that a text is long, in whichever test comes first.
    own = [record for record in caplog.records if record.name.startswith("perfusion.")]
    assert [record.message.split(" will not appear")[0] for record in own] == [TEDDY]


def test_nested_blocks_are_refused(pipe: Any, host: DiffusersHost) -> None:
    stack = stack_of(make_concept(host))
    with apply(pipe, stack):
        expected = call(pipe, f"a {TEDDY}")
        with pytest.raises(RuntimeError, match="already"), apply(pipe, stack):
            pass
        with pytest.raises(RuntimeError, match="already"), host.training():
            pass
        assert torch.equal(call(pipe, f"a {TEDDY}"), expected)


# --- others keep working, nothing stays patched


class LowRank(torch.nn.Module):
    """What an adapter library puts in a projection's place."""

    def __init__(self, base_layer: torch.nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.down = torch.nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.base_layer(x, *args, **kwargs) + 0.7 * self.up(self.down(x))


def test_low_rank_adapters_stay_effective(pipe: Any, host: DiffusersHost) -> None:
    stack = two_concepts(host)
    with apply(pipe, stack):
        without = call(pipe, f"a {TEDDY}")
    for _, attention in cross_attentions(pipe.unet):
        for path in ("to_k", "to_v"):
            setattr(attention, path, LowRank(getattr(attention, path)))
    assert DiffusersHost(pipe).family == host.family
    stock = call(pipe, "a cat")
    with recorded(pipe) as seen, apply(pipe, stack):
        adapted = call(pipe, f"a {TEDDY}")
    assert not torch.allclose(adapted, without, atol=1e-3)
    for layer, attention in cross_attentions(pipe.unet):
        for path, module in (("k", attention.to_k), ("v", attention.to_v)):
            weight = (module.base_layer.weight + 0.7 * module.up.weight @ module.down.weight).detach().double()
            targets = [
                weight @ concept.e_super.double() if path == "k" else concept.o_star_v[layer].double()
                for concept in stack.concepts
            ]
            context, made = seen[layer, path][0]
            owners = owners_of(host, ["", f"a {TEDDY}"], stack)
            expected = expected_projection(context, weight, list(stack.uses), targets, owners)
            assert (made.double() - expected).abs().max() < 2e-5 * expected.abs().max()
        vectors = torch.randn(2, models.WIDTH)
        assert torch.allclose(host.project_values(vectors)[layer], attention.to_v(vectors), atol=1e-6)
    assert torch.equal(call(pipe, "a cat"), stock)


def test_forwards_that_others_have_laid_stay(pipe: Any, host: DiffusersHost) -> None:
    """As offloading does it: the forward is replaced on the instance."""
    module = next(cross_attentions(pipe.unet))[1].to_k
    original, calls = module.forward, []

    def moved(x: Tensor) -> Tensor:
        calls.append(x)
        return original(x)

    module.forward = moved
    with apply(pipe, stack_of(make_concept(host))):
        call(pipe, f"a {TEDDY}")
    assert len(calls) >= 2
    assert vars(module)["forward"] is moved
    del module.forward


class Boom(Exception):
    pass


@pytest.mark.parametrize("where", ["block", "network", "prompt", "training", "denoise", "draw"])
def test_nothing_stays_patched_after_an_exception(pipe: Any, host: DiffusersHost, where: str) -> None:
    stack = two_concepts(host, lock="global")
    prompt = f"a {TEDDY}"
    before = call(pipe, "a cat")

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise Boom

    handles = []
    if where in ("network", "denoise", "draw"):
        handles.append(pipe.unet.mid_block.register_forward_pre_hook(fail))
    if where == "prompt":
        handles.append(pipe.text_encoder.register_forward_hook(fail))
    with pytest.raises(Boom):
        if where == "training":
            with host.training(gradient_checkpointing=True):
                raise Boom
        elif where == "denoise":
            host.denoise(torch.randn(1, 4, 8, 8), torch.ones(1), host.encode([prompt]), stack.edit())
        elif where == "draw":
            draw(host, stack, [prompt], [0], steps=1, size=16)
        else:
            with apply(pipe, stack):
                call(pipe, prompt)
                raise Boom
    for handle in handles:
        handle.remove()
    assert_untouched(pipe)
    assert not pipe.unet.is_gradient_checkpointing
    assert torch.equal(call(pipe, "a cat"), before)
    with apply(pipe, stack):
        call(pipe, prompt)


# --- training


def state_of(pipe: Any) -> list[Any]:
    networks = (pipe.unet, pipe.text_encoder)
    return [
        [(id(p), p.requires_grad, p.dtype, p.data_ptr()) for network in networks for p in network.parameters()],
        [module.training for network in networks for module in network.modules()],
        [id(processor) for processor in pipe.unet.attn_processors.values()],
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_training_leaves_the_models_as_they_were(pipe: Any, host: DiffusersHost, dtype: torch.dtype) -> None:
    pipe.to(dtype)
    pipe.unet.train()
    before = state_of(pipe)
    with host.training(gradient_checkpointing=True):
        assert not any(p.requires_grad for p in (*pipe.unet.parameters(), *pipe.text_encoder.parameters()))
        assert not any(module.training for module in pipe.unet.modules())
        assert pipe.unet.dtype == (torch.float32 if dtype == torch.float16 else dtype)
        assert {type(processor) for processor in pipe.unet.attn_processors.values()} == {AttnProcessor}
        assert pipe.unet.is_gradient_checkpointing
    assert state_of(pipe) == before
    assert not pipe.unet.is_gradient_checkpointing


def test_offloaded_models_are_refused(pipe: Any, host: DiffusersHost) -> None:
    pipe.unet._hf_hook = object()
    with pytest.raises(UnsupportedPipelineError, match="offload"), host.training():
        pass
    del pipe.unet._hf_hook


def photos_for(host: DiffusersHost) -> Photos:
    draw_ = torch.Generator().manual_seed(3)
    images = [0.2 + 0.6 * torch.rand(20, 24, 3, generator=draw_).round() for _ in range(2)]
    masks = [torch.zeros(20, 24) for _ in images]
    for mask in masks:
        mask[4:16, 4:20] = 1
    return prepare(host, images, masks, 16)


def settings_for(**changes: Any) -> TrainingConfig:
    small = {"steps": 12, "batch_size": 4, "micro_batch": 2, "resolution": 64, "contexts": 8, "vectors": 2}
    return TrainingConfig(**{**small, **changes})


# With scope "word" it is one token of 77, which a network of random weights looks at as at any other; and of
# what shows in pictures such a network learns hardly anything in so few steps.
@pytest.mark.parametrize(("scope", "falls_to"), [("prompt", 0.99), ("word", 0.9995)])
def test_a_trained_concept(pipe: Any, host: DiffusersHost, tmp_path: Path, scope: Any, falls_to: float) -> None:
    before = state_of(pipe)
    photos, statistics = photos_for(host), measure(host, captions(40))
    settings = settings_for(scope=scope, timesteps="uniform", embedding_rate=0.05)
    concept, trainer = train(host, photos, Subject(TEDDY, "teddy bear"), statistics, settings)
    first, last = concept.training["fixed_loss"]
    assert last < falls_to * first
    assert len(trainer.losses) == 12
    assert state_of(pipe) == before
    assert concept.family == host.family
    again = train(host, photos, Subject(TEDDY, "teddy bear"), statistics, settings)[0]
    assert again.digest == concept.digest
    prompt = f"a photo of a {TEDDY}"
    stock = call(pipe, prompt)
    with apply(pipe, stack_of(concept)):
        assert not torch.allclose(call(pipe, prompt), stock, atol=1e-3)


# --- focus


def test_a_focus_draws_alike_whatever_processor_and_way(pipe: Any, host: DiffusersHost) -> None:
    concept = make_concept(host)
    focused, plain = (stack_of(replace(concept, focus=focus)) for focus in (30.0, 1.0))
    before = dict(pipe.unet.attn_processors)
    found = []
    for processor in (AttnProcessor2_0(), AttnProcessor(), SlicedAttnProcessor(1)):
        pipe.unet.set_attn_processor(processor)
        with apply(pipe, focused):
            found.append(call(pipe, [PROMPT, "a cat on the beach"], ["", "blurry"]))
    pipe.unet.set_attn_processor(before)
    for other in found[1:]:
        assert torch.allclose(other, found[0], atol=1e-4)
    with apply(pipe, plain):
        unfocused = call(pipe, [PROMPT, "a cat on the beach"], ["", "blurry"])
    assert not torch.allclose(unfocused[0], found[0][0], atol=1e-2)
    assert torch.allclose(unfocused[1], found[0][1], atol=1e-5), "a prompt without the word"
    none_of_it = ConceptStack((replace(focused.uses[0], gate=Gate(focus_share=0.0)),))
    with apply(pipe, none_of_it):
        assert torch.equal(call(pipe, [PROMPT, "a cat on the beach"], ["", "blurry"]), unfocused)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_a_focus_in_half_precision_with_scores_in_32_bit(folder: Path, dtype: torch.dtype, processor: Any) -> None:
    pipe = models.pipeline(folder, unet=models.unet(upcast_attention=True))
    stack = stack_of(replace(make_concept(DiffusersHost(pipe)), focus=30.0))
    pipe.unet.set_attn_processor(processor())
    pipe.to(dtype)
    with apply(pipe, stack):
        assert call(pipe, PROMPT).isfinite().all()


def test_a_focus_counts_for_the_text_beside_pictures() -> None:
    """As picture adapters hand both over, together."""
    layer = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4)
    adapted: Any = IPAdapterAttnProcessor2_0(hidden_size=8, cross_attention_dim=6, num_tokens=(3,))
    layer.set_processor(adapted)
    context, pictures = torch.randn(1, 5, 6), [torch.randn(1, 3, 6)]
    edit = KeyValueEdit(
        Directions.of(torch.ones(1, 6), torch.ones(1, 6), [Gate(-9.0)], ["paper"]),
        torch.zeros(1, 6),
        {},
        numbers=[7],
        focus=[1000.0],
    )
    edit.words = torch.tensor([[0, 0, 7, 0, 0]])
    owner = EditedProjections(torch.nn.Module())
    hidden = torch.randn(1, 9, 8)
    standing_in = _Attention(owner, "input_blocks.1.1.transformer_blocks.0", layer)
    plain = standing_in(hidden, (context, pictures))
    owner.edit = edit
    focused = standing_in(hidden, (context, pictures))
    only_the_word = layer(hidden, (context[:, 2:3], pictures))
    assert (focused - only_the_word).abs().max() < 0.2 * (plain - only_the_word).abs().max()


BOTH = f"a photo of a {TEDDY} and a {CAT}"


def test_parts_of_a_prompt_have_weights_where_they_are_asked_for(host: DiffusersHost) -> None:
    stack = two_concepts(host)
    weighed, plain = f"a ({TEDDY}:1.5) and (a {CAT} in a hat:.5), (x)", f"a {TEDDY} and a {CAT} in a hat, (x)"

    def encoded(prompt: str, **settings: Any) -> Tensor:
        with torch.no_grad():
            return host.text.encode_stack([prompt], stack, **settings)[0][0]

    context, expected, empty = encoded(weighed, weighted=True), encoded(plain), encoded("")
    assert torch.equal(encoded(plain, weighted=True), expected), "what stands in parentheses alone is text"
    words = host.text.words([weighed], stack, weighted=True)
    assert torch.equal(words, host.text.words([plain], stack))
    ratios = ((context - empty) * (expected - empty)).sum(-1) / (expected - empty).square().sum(-1).clamp_min(1e-12)
    found = [round(float(ratio), 3) for ratio in ratios]
    assert {1.5, 0.5, 1.0} == set(found[1:20])
    of_word = {number: {found[m] for m in range(len(found)) if words[0, m] == number} for number in words[0].tolist()}
    assert [of_word[word_number(word)] for word in (TEDDY, CAT)] == [{1.5}, {0.5}]
    assert not torch.equal(encoded(weighed), context), "pipelines know no weights"


def test_what_weights_do_to_words_that_are_looked_at_more_is_told(host: DiffusersHost) -> None:
    teddy, cat = two_concepts(host).concepts
    stack = stack_of(replace(teddy, focus=30.0), cat)
    weighed, plain = f"a ({TEDDY}:1.5) and (a {CAT} in a hat:.5)", f"a {TEDDY} and a {CAT} in a hat"
    with torch.no_grad():
        context, expected = (
            host.text.encode_stack([prompt], stack, weighted=True)[0][0] for prompt in (weighed, plain)
        )

        def told_of(prompt: str, stack: ConceptStack) -> Any:
            return host.text.weighed([prompt], stack, host.text.encode_stack([prompt], stack, weighted=True)[0])

        told = told_of(weighed, stack)
        assert told is not None
        assert told_of(plain, stack) is None
        assert told_of(f"a ({TEDDY}:0)", stack) is None, "nothing is looked at 0 times as much"
        assert told_of(weighed, two_concepts(host)) is None
    own = host.text.words([plain], stack)[0] == word_number(TEDDY)
    assert not torch.allclose(context[own], expected[own], atol=1e-3)
    assert torch.allclose((context + told.without[0])[own], expected[own], atol=1e-5)
    assert not told.without[0][~own].any(), "all other weights are as ever"
    assert told.weights[0].tolist() == [1.5 if of_word else 1.0 for of_word in own.tolist()]


@pytest.mark.parametrize("weight", ["1.4", "0.7"])
def test_a_weight_of_a_word_changes_the_picture(host: DiffusersHost, weight: str) -> None:
    stack = focused_pair(host)

    def drawn(prompt: str) -> Tensor:
        return draw(host, stack, [prompt], [3], steps=2, size=64)

    assert not torch.allclose(drawn(f"a ({TEDDY}:{weight}) and a {CAT}"), drawn(f"a {TEDDY} and a {CAT}"), atol=1e-4)


def focused_pair(host: DiffusersHost) -> ConceptStack:
    return stack_of(*(replace(concept, focus=30.0) for concept in two_concepts(host).concepts))


def test_words_of_several_concepts_are_looked_at_by_place(
    pipe: Any, host: DiffusersHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, Any]] = []
    shares = Places.shares

    def watched(self: Places, focus: Any, size: Any) -> Any:
        found = shares(self, focus, size)
        asked.append((self._before is not None, found))
        return found

    monkeypatch.setattr(Places, "shares", watched)
    with apply(pipe, focused_pair(host)):
        by_place = call(pipe, [BOTH, PROMPT], ["", "blurry"], num_inference_steps=3)
        layers = len(asked) // 3
        assert [before for before, _ in asked] == [False] * layers + [True] * 2 * layers
        assert asked[0][1] is None and all(found is not None for _, found in asked[layers:])
        monkeypatch.setattr(Places, "shares", lambda *_: None)
        everywhere = call(pipe, [BOTH, PROMPT], ["", "blurry"], num_inference_steps=3)
    assert not torch.allclose(by_place[0], everywhere[0], atol=1e-2)
    assert not torch.allclose(by_place[1], everywhere[1], atol=1e-2), "a prompt of one word too"


def test_a_new_sampling_knows_nothing_of_places(pipe: Any, host: DiffusersHost) -> None:
    """With the very encodings of the one before, and where that one was stopped."""
    stack = focused_pair(host)
    with torch.no_grad():
        context = host.text.encode_stack([BOTH], stack)[0]
        negative = host.encode([""]).context

    def drawn(**settings: Any) -> Tensor:
        return call(pipe, None, prompt_embeds=context, negative_prompt_embeds=negative, **settings)

    def stop(pipeline: Any, step: int, *_: Any) -> Any:
        raise KeyboardInterrupt

    with apply(pipe, stack):
        first, one_step = drawn(), drawn(num_inference_steps=1)
        with pytest.raises(KeyboardInterrupt):
            drawn(callback_on_step_end=stop)
        assert torch.equal(drawn(), first)
        assert torch.equal(drawn(num_inference_steps=1), one_step)
        assert torch.equal(drawn(num_inference_steps=1), one_step)


def test_those_who_offload_a_network_leave_places_known(pipe: Any, host: DiffusersHost) -> None:
    """They take whatever stands at its forward off, and put their own there."""
    stack = focused_pair(host)
    with apply(pipe, stack):
        expected = call(pipe, BOTH)
        vars(pipe.unet).pop("forward", None)
        assert torch.equal(call(pipe, BOTH), expected)
    assert not pipe.unet._forward_hooks and not pipe.unet._forward_pre_hooks


def test_places_are_of_each_picture_alone(host: DiffusersHost) -> None:
    stack, size = focused_pair(host), 8 * host.latent_scale
    prompts = [BOTH, f"a {CAT} on a {TEDDY}", PROMPT]
    settings: Any = {"steps": 3, "guidance": 4.0, "size": size}
    together = draw(host, stack, prompts, [1, 2, 3], **settings)
    for number, prompt in enumerate(prompts):
        alone = draw(host, stack, [prompt], [number + 1], **settings)
        assert torch.allclose(together[number], alone[0], atol=1e-4), prompt


def test_training_in_half_precision(pipe: Any, host: DiffusersHost) -> None:
    """The photos' latents in 16 bit, all that is differentiated in 32."""
    pipe.to(torch.float16)
    statistics = measure(host, captions(40))
    concept, trainer = train(host, photos_for(host), Subject(TEDDY, "bear"), statistics, settings_for(steps=2))
    assert len(trainer.losses) == 2
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.float16
    with apply(pipe, stack_of(concept)):
        assert call(pipe, PROMPT).isfinite().all()


def test_checkpointing_changes_no_gradient(pipe: Any, host: DiffusersHost) -> None:
    photos, statistics = photos_for(host), measure(host, captions(40))
    gradients: list[list[Tensor]] = []
    for checkpointing in (False, True):
        with host.training(gradient_checkpointing=checkpointing):
            trainer = Trainer(
                host, photos, Subject(TEDDY, "teddy bear"), statistics, settings_for(value_rate=0.0, embedding_rate=0.0)
            )
            trainer.step()
            learned: Sequence[Tensor] = [*trainer.embeddings.values(), *trainer.o_star_v.values()]
            gradients.append([p.grad.clone() for p in learned if p.grad is not None])
    assert len(gradients[0]) == 1 + len(host.family.layers)
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        assert torch.allclose(plain, checkpointed, rtol=1e-3, atol=1e-7)


def test_the_method_knows_no_host() -> None:
    root = Path(__file__).parents[2] / "perfusion"
    for path in root.rglob("*.py"):
        if "hosts" not in path.relative_to(root).parts:
            assert "import diffusers" not in path.read_text() and "from diffusers" not in path.read_text(), path
