"""ComfyUI and diffusers as hosts of one and the same model: what one learns, the other draws."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.concepts import CAT, TEDDY, Lab
from tests.hosts import ComfyHost, main_host
from tests.models import MINIATURE_CONTEXT_DIM, Weights, miniature_parts, text_encoder, unet

pytest.importorskip("diffusers")
pytestmark = pytest.mark.comfyui

PROMPTS = [
    "",
    f"a photo of a {TEDDY} on the beach",
    f"<MY-Teddy>'s hat, (big) {TEDDY}.",
    "a house, " * 40 + TEDDY,
    f"naïve é 漢字 {TEDDY} :-)",
    f"my{TEDDY}2 [cat]",
    "x " * 73 + TEDDY,
]


class TwoHosts:
    """The miniature, in the classes of either program; the VAE is another one in diffusers, and plays no part here."""

    def __init__(self, pack: ComfyHost):
        self.lab = Lab(pack, miniature_parts())
        self.package = pack.module("perfusion.hosts.diffusers")
        self.word = pack.module("perfusion.hosts.base").Word
        training = pack.module("perfusion.hosts.comfyui.training")
        self.comfy = training.ComfyHost(self.lab.model, self.lab.clip, self.lab.parts.vae)
        self.diffusers = self.package.DiffusersHost(diffusers_parts())

    def __iter__(self) -> Any:
        return iter((self.comfy, self.diffusers))

    def stack(self, lock: str, **changes: Any) -> Any:
        one = replace(self.lab.concept(), **changes)
        return self.lab.stack(one, self.lab.concept(CAT, "cat", seed=1, vectors=3, form="preserving"), lock=lock)

    def stack_of_kin(self, kind: str = "teddy bear") -> Any:
        """Two concepts whose words are looked at more, the second of a kind that may be the first's."""
        one = replace(self.lab.concept(), focus=30.0)
        other = replace(self.lab.concept(CAT, "cat", seed=1), focus=30.0, super_category=kind)
        return self.lab.stack(one, other, lock="local")

    def draw(self, stack: Any, prompt: str, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
        """The latent of a small picture, by diffusers."""
        monkeypatch.setattr(self.diffusers, "decode_latents", lambda latents: latents)
        size = 8 * self.diffusers.latent_scale
        return self.package.draw(
            self.diffusers, stack, [prompt], [11], steps=4, guidance=4.0, size=size, negative="blurry"
        )


def diffusers_parts() -> SimpleNamespace:
    """The weights of ``miniature_parts`` in the classes of diffusers and transformers."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    import tests.diffusers_models as small
    from tests.models import MINIATURE_CHANNELS, MINIATURE_HEADS, MINIATURE_LAYERS

    width = MINIATURE_CONTEXT_DIM
    model, clip = Weights(1, torch.float32), Weights(2, torch.float32)
    unet(model, "model.diffusion_model.", MINIATURE_CHANNELS, width)
    text_encoder(clip, "text_model.", width, MINIATURE_LAYERS, width * 4)
    network = small.unet(
        ("CrossAttnDownBlock2D",) * 2,
        ("CrossAttnUpBlock2D",) * 2,
        (MINIATURE_CHANNELS,) * 2,
        attention_head_dim=MINIATURE_HEADS,
        norm_num_groups=32,
    )
    network.load_state_dict(convert_ldm_unet_checkpoint(model.tensors, dict(network.config)))
    settings: dict[str, Any] = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=width * 4,
            num_hidden_layers=MINIATURE_LAYERS,
            num_attention_heads=MINIATURE_HEADS,
            **settings,
        )
    ).eval()
    weights = {key.removeprefix("text_model."): value for key, value in clip.tensors.items()}
    getattr(encoder, "text_model", encoder).load_state_dict(weights, strict=False)
    tokenizer = CLIPTokenizer.from_pretrained(str(main_host() / "comfy" / "sd1_tokenizer"))
    return SimpleNamespace(
        unet=network, text_encoder=encoder, tokenizer=tokenizer, vae=small.vae(), scheduler=small.scheduler()
    )


@pytest.fixture(scope="module")
def hosts(comfy_host: ComfyHost) -> TwoHosts:
    return TwoHosts(comfy_host)


def test_structure(hosts: TwoHosts) -> None:
    assert hosts.comfy.family == hosts.diffusers.family
    assert list(hosts.comfy.family.layers) == list(hosts.diffusers.family.layers)
    assert torch.allclose(hosts.comfy.noise_levels(), hosts.diffusers.noise_levels(), rtol=1e-4)
    assert hosts.comfy.prediction == hosts.diffusers.prediction


@torch.no_grad()
@pytest.mark.parametrize("vectors", [None, 0, 1, 3])
def test_text(hosts: TwoHosts, vectors: int | None) -> None:
    """No word, the super-category's tokens, or vectors."""
    rows = {"clip_l": 0.02 * torch.randn(vectors, MINIATURE_CONTEXT_DIM)} if vectors else None
    word = None if vectors is None else hosts.word(TEDDY, "teddy bear", rows)
    one, other = (host.encode(PROMPTS, word) for host in hosts)
    assert torch.allclose(one.context, other.context, atol=1e-5)
    assert torch.equal(one.word, other.word)
    assert torch.equal(one.padding, other.padding)
    one, other = (host.token_embeddings("teddy bear")["clip_l"] for host in hosts)
    assert torch.equal(one, other)
    assert hosts.comfy.embedding_scale() == pytest.approx(hosts.diffusers.embedding_scale())


@pytest.mark.parametrize(("edited", "focus"), [(False, 1.0), (True, 1.0), (True, 30.0)])
def test_network(hosts: TwoHosts, edited: bool, focus: float) -> None:
    stack = hosts.stack("local", focus=focus)
    word = hosts.word(TEDDY, "teddy bear", stack.concepts[0].embeddings)
    x, sigma, vectors = 3 * torch.randn(2, 4, 8, 8), torch.tensor([0.5, 7.3]), torch.randn(2, MINIATURE_CONTEXT_DIM)
    estimates, values = [], []
    for host in hosts:
        with host.training(), torch.no_grad():
            text = host.encode(PROMPTS[1:3], word)
            edit = stack.edit() if edited else None
            if edit is not None:
                edit.tell_own(text.word)
            estimates.append(host.denoise(x, sigma, text, edit))
            if focus > 1:
                unfocused = hosts.stack("local").edit()
                unfocused.tell_own(text.word)
                assert not torch.allclose(estimates[-1], host.denoise(x, sigma, text, unfocused), atol=1e-2)
            values.append(host.project_values(vectors))
    assert torch.allclose(*estimates, atol=1e-4)
    for layer, expected in values[0].items():
        assert torch.allclose(expected, values[1][layer], atol=1e-5)


@pytest.mark.parametrize("focus", [1.0, 30.0])
@pytest.mark.parametrize("lock", ["local", "global"])
def test_latents(hosts: TwoHosts, lock: str, focus: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock KSampler with Apply Concepts, and ``draw``: two concepts, guided, from the same seed."""
    lab, stack = hosts.lab, hosts.stack(lock, focus=focus)
    prompt = f"a ({CAT}:1.3) and a {TEDDY} on the (sandy beach:.8)"
    model, clip = lab.apply(lab.model, lab.clip, *stack.concepts, lock=lock)
    positive, negative = lab.encode(clip, prompt), lab.encode(clip, "blurry")
    with torch.no_grad():
        context, shift = hosts.diffusers.text.encode_stack([prompt], stack, weighted=True)
    assert torch.allclose(positive[0][0], context, atol=1e-5)
    if lock == "global":
        assert shift.any()
        assert torch.allclose(positive[0][1]["model_conds"]["perfusion_key_shift"].cond, shift, atol=1e-5)
    expected = lab.sample(model, positive, negative, steps=4, seed=11) * 0.18215
    assert torch.allclose(hosts.draw(stack, prompt, monkeypatch), expected, atol=1e-3)
    lab.forget()
    lab.assert_untouched()


def test_two_of_one_kind(hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stand side by side in both hosts alike; the order of their words says how, and nothing else does."""
    lab, stack, seen = hosts.lab, hosts.stack_of_kin(), []
    for prompt in (f"a {CAT} and a {TEDDY}", f"a {TEDDY} and a {CAT}"):
        model, clip = lab.apply(lab.model, lab.clip, *stack.concepts)
        sampled = lab.sample(model, lab.encode(clip, prompt), lab.encode(clip, "blurry"), steps=4, seed=11)
        seen.append(hosts.draw(stack, prompt, monkeypatch))
        assert torch.allclose(seen[-1], sampled * 0.18215, atol=1e-3)
        assert not torch.allclose(seen[-1], hosts.draw(hosts.stack_of_kin("cat"), prompt, monkeypatch), atol=1e-2)
    turned = lab.stack(*reversed(stack.concepts), lock="local")
    assert torch.allclose(hosts.draw(turned, prompt, monkeypatch), seen[-1], atol=1e-4)
    lab.forget()
    lab.assert_untouched()


def test_two_of_one_kind_in_a_part_of_the_picture(hosts: TwoHosts) -> None:
    """The host does not tell which part it is: there they are kept apart as any two concepts are."""
    lab, seen = hosts.lab, []
    for kind in ("teddy bear", "cat"):
        model, clip = lab.apply(lab.model, lab.clip, *hosts.stack_of_kin(kind).concepts)
        whole = lab.encode(clip, f"a {CAT} and a {TEDDY}")
        negative = lab.encode(clip, "blurry")
        part = lab.host.nodes["ConditioningSetArea"]().append(whole, 32, 32, 16, 0, 1.0)[0] + negative
        seen.append([lab.sample(model, each, negative, steps=4, seed=11) for each in (whole, part)])
    (whole, part), (other_whole, other_part) = seen
    assert not torch.allclose(whole, other_whole, atol=1e-2)
    assert torch.equal(part, other_part)
    lab.forget()
    lab.assert_untouched()
