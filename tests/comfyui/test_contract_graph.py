"""The contract of Apply Concepts in whole graphs, on the reduced checkpoint: LoRA files, ControlNet, other packs."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tests.concepts import BLOCKS, CAT, TEDDY, Lab, expected_projection, projection_weights, save_concept
from tests.graphs import node, text_to_image
from tests.hosts import ComfyHost
from tests.models import Parts

pytestmark = [pytest.mark.comfyui, pytest.mark.usefixtures("nothing_left")]

LATENT = ("sampler", 0)
BOTH = f"a {CAT} beside a {TEDDY} on a sofa"


@pytest.fixture(scope="module")
def lab(comfy_host: ComfyHost) -> Lab:
    keep = [("checkpoint", 0), ("checkpoint", 1), ("checkpoint", 2)]
    run = comfy_host.execute(text_to_image(comfy_host.model("checkpoint")), keep=keep)
    return Lab(comfy_host, Parts(*(run[link] for link in keep)))


@pytest.fixture(scope="module")
def concepts(lab: Lab) -> list[Any]:
    return [lab.concept(), lab.concept(CAT, "cat", seed=1, form="preserving")]


@pytest.fixture(scope="module")
def files(lab: Lab, concepts: list[Any]) -> list[str]:
    names = ["graph-teddy", "graph-cat"]
    return [save_concept(c, lab.host.base, name) for c, name in zip(concepts, names, strict=True)]


def with_concepts(prompt: dict, files: list[str], before: str = "checkpoint", **settings: Any) -> dict:
    """Load Concepts and Apply Concepts between the node `before` and the texts and the sampler."""
    model, clip = [before, 0], [before, 1]
    rows = {f"file_{number}": name for number, name in enumerate(files, start=1)}
    prompt["load"] = node("PerfusionLoadConcepts", count=len(files), **rows)
    prompt["apply"] = node(
        "PerfusionApplyConcepts", model=model, clip=clip, concepts=["load", 0], **{"key_lock": "local", **settings}
    )
    return lead(prompt, ["apply", 0], ["apply", 1])


def lead(prompt: dict, model: list, clip: list) -> dict:
    prompt["sampler"]["inputs"]["model"] = model
    for text in ("positive", "negative"):
        prompt[text]["inputs"]["clip"] = clip
    return prompt


def graph(lab: Lab, text: str = BOTH) -> dict:
    return text_to_image(lab.host.model("checkpoint"), text)


def latent(lab: Lab, prompt: dict) -> torch.Tensor:
    samples = lab.host.execute(prompt, keep=[LATENT])[LATENT]["samples"]
    assert torch.isfinite(samples).all()
    return samples


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("lock", ["local", "global"])
def test_strength_zero_is_the_stock_graph_bit_for_bit(lab: Lab, files: list[str], lock: str) -> None:
    plain = latent(lab, graph(lab, "a cat beside a teddy bear"))
    prompt = with_concepts(graph(lab, "a cat beside a teddy bear"), files, key_lock=lock)
    assert apart(latent(lab, prompt), plain) > 0, "with strength, the paper's form touches every prompt"
    off = {"strength_1": 0.0, "on_2": False}
    prompt["load"]["inputs"].update(off)
    assert torch.equal(latent(lab, prompt), plain)
    assert torch.equal(latent(lab, graph(lab, "a cat beside a teddy bear")), plain)


@pytest.mark.parametrize("lock", ["local", "global"])
def test_lora_loader_before_or_after_apply(lab: Lab, files: list[str], lock: str) -> None:
    lora = {"lora_name": lab.host.model("lora"), "strength_model": 1.0, "strength_clip": 1.0}
    before = graph(lab)
    before["lora"] = node("LoraLoader", model=["checkpoint", 0], clip=["checkpoint", 1], **lora)
    before = with_concepts(before, files, "lora", key_lock=lock)
    after = with_concepts(graph(lab), files, key_lock=lock)
    concepts_alone = latent(lab, after)
    after["lora"] = node("LoraLoader", model=["apply", 0], clip=["apply", 1], **lora)
    pictures = [latent(lab, before), latent(lab, lead(after, ["lora", 0], ["lora", 1]))]
    assert torch.equal(pictures[0], pictures[1])
    assert apart(pictures[0], concepts_alone) > 1e-2


def test_controlnet(lab: Lab, files: list[str]) -> None:
    prompt = with_concepts(graph(lab), files)
    without = latent(lab, prompt)
    prompt["controlnet"] = node("ControlNetLoader", control_net_name=lab.host.model("controlnet"))
    prompt["hint"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0xFF8000)
    prompt["control"] = node(
        "ControlNetApplyAdvanced",
        positive=["positive", 0],
        negative=["negative", 0],
        control_net=["controlnet", 0],
        image=["hint", 0],
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    prompt["sampler"]["inputs"].update(positive=["control", 0], negative=["control", 1])
    with_control = latent(lab, prompt)
    assert apart(with_control, without) > 1e-2
    prompt["apply"]["inputs"]["key_lock"] = "global"
    assert apart(latent(lab, prompt), with_control) > 1e-4


def test_ipadapter_and_attention_couple_receive_edited_keys_and_values(
    lab: Lab, concepts: list[Any], files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.ldm.modules.attention

    lab.host.require_pack("ComfyUI_IPAdapter_plus", "IPAdapterAdvanced")
    lab.host.require_pack("ComfyUI-ppm", "AttentionCouplePPM")
    prompt = with_concepts(graph(lab, f"a {TEDDY} at home"), files)
    prompt["region"] = node("CLIPTextEncode", clip=["apply", 1], text=f"a {CAT} in the garden")
    prompt["adapter"] = node("IPAdapterModelLoader", ipadapter_file=lab.host.model("ipadapter"))
    prompt["vision"] = node("CLIPVisionLoader", clip_name=lab.host.model("clip_vision"))
    prompt["image"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0xFF8000)
    prompt["adapted"] = node(
        "IPAdapterAdvanced",
        model=["apply", 0],
        ipadapter=["adapter", 0],
        image=["image", 0],
        clip_vision=["vision", 0],
        weight=1.0,
        weight_type="linear",
        combine_embeds="concat",
        start_at=0.0,
        end_at=1.0,
        embeds_scaling="V only",
    )
    prompt["left"] = node("SolidMask", value=0.7, width=64, height=64)
    prompt["right"] = node("SolidMask", value=0.3, width=64, height=64)
    prompt["couple"] = node(
        "AttentionCouplePPM",
        model=["adapted", 0],
        base_cond=["positive", 0],
        base_mask=["left", 0],
        cond_1=["region", 0],
        mask_1=["right", 0],
    )
    # Without guidance: IPAdapter and attention couple disagree on the batch where negative and positive share a call.
    prompt["sampler"]["inputs"]["cfg"] = 1.0
    plain = latent(lab, prompt)
    prompt["sampler"]["inputs"]["model"] = ["couple", 0]
    links = [LATENT, ("couple", 0), ("positive", 0), ("negative", 0)]
    run = lab.host.execute(prompt, keep=links)
    assert apart(run[LATENT]["samples"], plain) > 1e-3

    packs = [m for m in list(sys.modules.values()) if "IPAdapter" in getattr(m, "__name__", "")]
    (pack,) = [m for m in packs if hasattr(m, "Attn2Replace") and m.__name__.endswith("CrossAttentionPatch")]
    attend = comfy.ldm.modules.attention.optimized_attention
    current: list[Any] = []
    seen: dict[tuple[str, int], list[Any]] = {}

    def watch_context(q: Any, k: torch.Tensor, v: torch.Tensor, extra: dict) -> tuple:
        current[:] = [tuple(extra["block"]), k.clone(), v.clone()]
        return q, k, v

    def watching(who: str) -> Any:
        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if current and k.shape[1] == current[1].shape[1] and k.shape[1] % 77 == 0:
                seen.setdefault(current[0], []).append((who, *current[1:], k.clone(), v.clone()))
                current.clear()
            return attend(q, k, v, *args, **kwargs)

        return attention

    monkeypatch.setattr(pack, "optimized_attention", watching("IPAdapter"))
    monkeypatch.setattr(comfy.ldm.modules.attention, "optimized_attention", watching("stock"))
    watched = run["couple", 0].clone()
    watched.set_model_attn2_patch(watch_context)
    lab.sample(watched, run["positive", 0], run["negative", 0], steps=1, cfg=1.0)
    lab.forget()
    uses = lab.stack(*concepts).uses
    assert set(seen) == set(BLOCKS.values())
    assert {who for calls in seen.values() for who, *_ in calls} == {"IPAdapter", "stock"}
    for block, place in BLOCKS.items():
        layer = f"{block}.transformer_blocks.0"
        to_k, to_v = projection_weights(lab.model, layer)
        for _, for_k, for_v, k, v in seen[place]:
            assert len(k) == 2, "the whole picture, and the region"
            keys = expected_projection(for_k, to_k, uses, [to_k @ c.e_super.double() for c in concepts])
            values = expected_projection(for_v, to_v, uses, [c.o_star_v[layer].double() for c in concepts])
            assert apart(k, keys) <= 1e-4
            assert apart(v, values) <= 1e-4
            assert apart(v, for_v.double() @ to_v.T) > 1e-2
