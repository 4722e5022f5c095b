"""Concepts without training, and shortcuts to put them on models of a ComfyUI that runs in this process.

They are random but sensible: i* is the encoding of the placeholder's own random embedding by the model's own CLIP, d*
its dual in the second moment of a few captions, e_super encodes the super-category, and o*_V has the scale of
``W_V e_super``.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tests.miniature_weights as miniature_weights
from tests.hosts import ComfyHost
from tests.models import CROSS_ATTENTION_BLOCKS, Parts, Weights

TEDDY, CAT = "<my-teddy>", "<my-cat>"
LAYERS = [f"{block}.transformer_blocks.0" for block in CROSS_ATTENTION_BLOCKS]
CAPTIONS = [
    "a photo of a house by the sea",
    "two people walk through the snow at night, oil painting",
    "an old blurry picture of a red car",
    "the quick brown fox jumps over a sofa beside the moon",
    "",
]
# The same layers as the host names them to attention patches: (block name, number).
BLOCKS = {
    "input_blocks.1.1": ("input", 1),
    "input_blocks.3.1": ("input", 3),
    "middle_block.1": ("middle", 0),
    "output_blocks.0.1": ("output", 0),
    "output_blocks.1.1": ("output", 1),
    "output_blocks.2.1": ("output", 2),
    "output_blocks.3.1": ("output", 3),
}


def make_concept(
    host: ComfyHost,
    model: Any,
    clip: Any,
    placeholder: str = TEDDY,
    super_category: str = "teddy bear",
    *,
    seed: int = 0,
    vectors: int = 1,
    form: str = "paper",
) -> Any:
    """A Concept (the host's class) that fits MODEL and CLIP."""
    text, structure = host.module("perfusion.hosts.comfyui.text"), host.module("perfusion.hosts.comfyui.structure")
    word_class, concept_class = host.module("perfusion.hosts.base").Word, host.module("perfusion.concept").Concept
    draw = torch.Generator().manual_seed(seed)
    family = structure.family_of(model, clip)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    with torch.no_grad():
        embeddings = {}
        for encoder, width in family.encoders.items():
            table = getattr(clip.cond_stage_model, encoder).transformer.get_input_embeddings().weight
            embeddings[encoder] = noise(vectors, width) * float(table.float().std())
        template = f"a photo of a {placeholder}"
        own = text.encode(clip, [template], word_class(placeholder, super_category, embeddings))
        general = text.encode(clip, [template], word_class(placeholder, super_category))
        i_star = own.context[own.word].float().mean(0).cpu()
        e_super = general.context[general.word][-1].float().cpu()
        others = text.encode(clip, CAPTIONS).context.flatten(0, 1).double().cpu()
        moment = others.T @ others / len(others)
        moment += 0.05 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
        d_star = torch.linalg.solve(moment, i_star.double()).float()
        d_star *= i_star.norm() / d_star.norm()
        values = {}
        for layer, _, to_v in structure.projections(model.model.diffusion_model):
            plain = to_v.weight.float().cpu() @ e_super
            values[layer] = plain + plain.square().mean().sqrt() * noise(*plain.shape)
    return concept_class.rounded(
        family=family,
        placeholder=placeholder,
        super_category=super_category,
        embeddings=embeddings,
        i_star=i_star,
        d_star=d_star,
        e_super=e_super,
        o_star_v=values,
        form=form,
    )


@dataclass
class Lab:
    """A host, a model, and what tests do with them again and again; all outside of autograd, as nodes run."""

    host: ComfyHost
    parts: Parts

    @property
    def model(self) -> Any:
        return self.parts.model

    @property
    def clip(self) -> Any:
        return self.parts.clip

    def concept(self, placeholder: str = TEDDY, super_category: str = "teddy bear", **settings: Any) -> Any:
        return make_concept(self.host, self.model, self.clip, placeholder, super_category, **settings)

    def stack(self, *concepts: Any, lock: str = "local", strength: float = 1.0, **gate: float) -> Any:
        stack_module, gate_class = self.host.module("perfusion.stack"), self.host.module("perfusion.edit").Gate
        uses = [
            stack_module.ConceptUse(concept, gate_class(strength=strength, **gate), lock=lock) for concept in concepts
        ]
        return stack_module.ConceptStack(tuple(uses))

    def apply(self, model: Any, clip: Any, *concepts: Any, **settings: Any) -> tuple[Any, Any]:
        """MODEL and CLIP with concepts on them; settings as for ``stack``."""
        combined = self.host.module("perfusion.hosts.comfyui.combined")
        return combined.apply_concepts(model, clip, self.stack(*concepts, **settings))

    def applied(self, *concepts: Any, **settings: Any) -> tuple[Any, Any]:
        return self.apply(self.model, self.clip, *concepts, **settings)

    @torch.inference_mode()
    def encode(self, clip: Any, text: str) -> Any:
        """A CONDITIONING."""
        return self.host.nodes["CLIPTextEncode"]().encode(clip, text)[0]

    @torch.inference_mode()
    def sample(
        self,
        model: Any,
        positive: Any,
        negative: Any,
        *,
        steps: int = 2,
        seed: int = 0,
        cfg: float = 4.0,
        scheduler: str = "normal",
        count: int = 1,
    ) -> Tensor:
        """Latents of the stock KSampler."""
        empty = {"samples": torch.zeros(count, 4, 8, 8)}
        sample = self.host.nodes["KSampler"]().sample
        latent = sample(model, seed, steps, cfg, "euler", scheduler, positive, negative, empty)[0]["samples"]
        assert torch.isfinite(latent).all()
        return latent.clone()

    def draw(self, model: Any, clip: Any, text: str = f"a photo of a {TEDDY}", negative: str = "blurry") -> Tensor:
        """Latents of a prompt."""
        return self.sample(model, self.encode(clip, text), self.encode(clip, negative))

    def load(self, *patchers: Any) -> None:
        import comfy.model_management

        comfy.model_management.load_models_gpu(list(patchers))

    def forget(self) -> None:
        """Unload everything that is loaded."""
        import comfy.model_management

        gc.collect()
        comfy.model_management.unload_all_models()

    def assert_untouched(self) -> None:
        """Nothing of ours is left in the networks."""
        network = self.model.model.diffusion_model
        left = [name for name, module in network.named_modules() if "forward" in vars(module)]
        assert not left, f"patched forwards are left: {left}"
        assert "encode_token_weights" not in vars(self.clip.cond_stage_model)

    def lora(self, *, seed: int = 5, strength: float = 0.5, text_encoder: bool = True) -> dict[str, Tensor]:
        """A LoRA of rank 4 on every attn2.to_k and attn2.to_v, and on the text encoder."""
        weights, rank = Weights(seed, torch.float32), 4

        def pair(key: str, module: Any) -> None:
            outputs, inputs = module.weight.shape
            weights.draw(f"{key}.lora_down.weight", rank, inputs, std=inputs**-0.5)
            weights.draw(f"{key}.lora_up.weight", outputs, rank, std=strength / rank**0.5)
            weights.tensors[f"{key}.alpha"] = torch.tensor(float(rank))

        modules = dict(self.model.model.diffusion_model.named_modules())
        for layer in LAYERS:
            for path in ("to_k", "to_v"):
                pair(f"lora_unet_{layer.replace('.', '_')}_attn2_{path}", modules[f"{layer}.attn2.{path}"])
        if text_encoder:
            layers = self.clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers
            pair("lora_te_text_model_encoder_layers_0_self_attn_v_proj", layers[0].self_attn.v_proj)
        return weights.tensors

    @torch.inference_mode()
    def with_lora(self, model: Any, clip: Any, lora: dict[str, Tensor]) -> tuple[Any, Any]:
        import comfy.sd

        return comfy.sd.load_lora_for_models(model, clip, dict(lora), 1.0, 1.0)

    @torch.inference_mode()
    def with_bypass_lora(self, model: Any, clip: Any, lora: dict[str, Tensor]) -> tuple[Any, Any]:
        import comfy.sd

        return comfy.sd.load_bypass_lora_for_models(model, clip, dict(lora), 1.0, 1.0)


@dataclass
class Seen:
    """What one cross-attention layer got in one call of the network."""

    context: Tensor
    k: Tensor
    v: Tensor
    cond_or_uncond: list[int]


@contextmanager
def recorded(model: Any) -> Iterator[tuple[Any, dict[str, list[Seen]]]]:
    """A clone of MODEL whose cross-attention writes down the keys and values it receives: layer -> calls.

    By ``attn2_replace``, the mechanism that IPAdapter and others use.
    """
    from comfy.ldm.modules.attention import optimized_attention

    seen: dict[str, list[Seen]] = {layer: [] for layer in LAYERS}
    contexts: list[Tensor] = []

    def watch_context(n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> tuple[Tensor, ...]:
        contexts[:] = [context.clone()]
        return n, context, value

    def watcher(layer: str) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any]) -> Tensor:
            seen[layer].append(Seen(contexts[0], k.clone(), v.clone(), list(extra["cond_or_uncond"])))
            return optimized_attention(q, k, v, extra["n_heads"])

        return attend

    clone = model.clone()
    clone.set_model_attn2_patch(watch_context)
    for block, (name, number) in BLOCKS.items():
        clone.set_model_attn2_replace(watcher(f"{block}.transformer_blocks.0"), name, number)
    yield clone, seen


def projection_weights(model: Any, layer: str, lora: dict[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """W_K and W_V of a layer in float64, with a LoRA added by hand."""
    modules = dict(model.model.diffusion_model.named_modules())
    weights = []
    for path in ("to_k", "to_v"):
        weight = modules[f"{layer}.attn2.{path}"].weight.detach().cpu().double()
        if lora is not None:
            key = f"lora_unet_{layer.replace('.', '_')}_attn2_{path}"
            up, down = lora[f"{key}.lora_up.weight"].double(), lora[f"{key}.lora_down.weight"].double()
            weight = weight + up @ down * (float(lora[f"{key}.alpha"]) / len(down))
        weights.append(weight)
    return weights[0], weights[1]


def word_owners(conditionings: list[Any], uses: list[Any]) -> Tensor:
    """``owners`` for ``expected_projection``, as conditionings of one length tell them: (b, m)."""
    told = torch.cat([conditioning[0][1]["model_conds"]["perfusion_words"].cond for conditioning in conditionings])
    owners = torch.full(told.shape[:2], -1)
    for j, use in enumerate(uses):
        digest = hashlib.sha256(use.concept.placeholder.encode()).digest()
        owners[told.squeeze(-1) == 1 + int.from_bytes(digest[:4], "big")] = j
    return owners


def expected_projection(
    context: Tensor,
    weight: Tensor,
    uses: list[Any],
    targets: list[Tensor],
    owners: Tensor | None = None,
) -> Tensor:
    """The edit, written down once more, naively and in float64: sum over concepts and tokens of method.md's equations.

    context (b, m, d), weight (i, d), targets: o* (i,) of each concept, owners (b, m): the place in ``uses`` of the
    concept whose word a token is, -1 for nobody's.
    """
    e = context.cpu().double()
    out = e @ weight.T
    i_stars = [use.concept.i_star.double() for use in uses]
    d_stars = [use.concept.d_star.double() for use in uses]
    paper = [j for j, use in enumerate(uses) if use.concept.form == "paper"]
    parts = e.new_empty(0)
    if paper:
        gram = torch.stack([torch.stack([i_stars[a] @ d_stars[b] for b in paper]) for a in paper])
        scores = torch.stack([e @ d_stars[j] for j in paper], dim=-1)
        parts = scores @ torch.linalg.inv(gram)
    everyone = torch.stack([torch.stack([i @ d for d in d_stars]) for i in i_stars])
    claims = torch.exp(torch.stack([e @ d for d in d_stars], dim=-1) @ torch.linalg.inv(everyone) / 0.1)
    if owners is not None:
        for m in (owners >= 0).nonzero().tolist():
            claims[tuple(m)] = torch.eye(len(uses), dtype=torch.float64)[owners[tuple(m)]]
    for j, use in enumerate(uses):
        r = (e @ d_stars[j]) / (i_stars[j] @ d_stars[j])
        beta, tau = use.gate.bias, use.gate.temperature
        g = torch.sigmoid((r - beta) / tau)
        image = weight @ i_stars[j]
        if use.concept.form == "paper":
            part = parts[..., paper.index(j)].unsqueeze(-1)
            g = g * claims[..., j] / claims.sum(-1)
            out = out + use.gate.strength * (g.unsqueeze(-1) * targets[j] - part * image)
        else:
            floor = torch.sigmoid(torch.tensor(-beta / (2 * tau), dtype=torch.float64))
            g = torch.clamp(g - floor, min=0) / (1 - floor) * claims[..., j] / claims.sum(-1)
            out = out + use.gate.strength * g.unsqueeze(-1) * (targets[j] - image)
    return out


def save_concept(concept: Any, folder: Path, name: str) -> str:
    """Put a concept below a host's models folder; returns its name for Load Concepts."""
    return concept.save(folder / "models" / "perfusion" / f"{name}.safetensors", overwrite=True).name


@contextmanager
def random_miniature(host: ComfyHost, folder: Path) -> Iterator[tuple[Lab, Any]]:
    """A miniature of random weights in ``folder``, which the nodes load in the block, and its CLIP Vision.

    Random weights say what is computed, whatever the pack's own have learned.
    """
    miniature_weights.random(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host.module("nodes.miniature"), "FOLDER", folder)
        host.new_executor()
        checkpoint = {"checkpoint": {"class_type": "PerfusionMiniature", "inputs": {}}}
        run = host.execute(checkpoint, keep=[("checkpoint", output) for output in range(4)])
        yield Lab(host, Parts(*(run["checkpoint", output] for output in range(3)))), run["checkpoint", 3]
    host.new_executor()
