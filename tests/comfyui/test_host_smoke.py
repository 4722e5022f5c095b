"""The test models load and run in a real ComfyUI: without this, no other test in this folder means anything."""

from __future__ import annotations

import pytest
import torch

from tests.graphs import node, text_to_image
from tests.hosts import ComfyHost, PromptError
from tests.models import CROSS_ATTENTION_BLOCKS, EMBEDDING_VECTORS, miniature_parts

pytestmark = pytest.mark.comfyui

LATENT = ("sampler", 0)


def latent(host: ComfyHost, prompt: dict) -> torch.Tensor:
    samples = host.execute(prompt, keep=[LATENT])[LATENT]["samples"]
    assert torch.isfinite(samples).all()
    return samples


@pytest.fixture(scope="module")
def plain(comfy_host: ComfyHost) -> torch.Tensor:
    return latent(comfy_host, text_to_image(comfy_host.model("checkpoint")))


def test_reduced_checkpoint(comfy_host: ComfyHost, plain: torch.Tensor) -> None:
    assert plain.shape == (1, 4, 8, 8)
    prompt = text_to_image(comfy_host.model("checkpoint"))
    model, image = ("checkpoint", 0), ("decode", 0)
    run = comfy_host.execute(prompt, keep=[model, image])
    assert run.executed == {"decode"}, "everything before it is cached from the first run"
    assert run[image].shape == (1, 64, 64, 3)
    assert run[image].std() > 0.05, "a flat image would hide every difference"
    keys = run[model].model.diffusion_model.state_dict()
    assert len(CROSS_ATTENTION_BLOCKS) == sum(key.endswith("attn2.to_k.weight") for key in keys)


def test_text_reaches_the_image(comfy_host: ComfyHost, plain: torch.Tensor) -> None:
    other = latent(comfy_host, text_to_image(comfy_host.model("checkpoint"), "a painting of a lake"))
    assert (other - plain).abs().mean() > 0.01 * plain.abs().mean()


class FailingNode:
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "fail", "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    def fail(self) -> tuple:
        raise ZeroDivisionError("on purpose")


def test_invalid_prompt_and_failing_node_raise(comfy_host: ComfyHost, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = text_to_image(comfy_host.model("checkpoint"))
    prompt["sampler"]["inputs"]["steps"] = 0
    with pytest.raises(PromptError) as refused:
        comfy_host.validate(prompt, keep=[LATENT])
    assert "sampler" in refused.value.node_errors

    monkeypatch.setitem(comfy_host.nodes, "FailingNode", FailingNode)
    with pytest.raises(PromptError, match="on purpose") as failed:
        comfy_host.execute({"fails": node("FailingNode")}, keep=[("fails", 0)])
    assert failed.value.execution_error["exception_type"] == "ZeroDivisionError"


def test_lora(comfy_host: ComfyHost, plain: torch.Tensor) -> None:
    prompt = text_to_image(comfy_host.model("checkpoint"))
    prompt["lora"] = node(
        "LoraLoader",
        model=["checkpoint", 0],
        clip=["checkpoint", 1],
        lora_name=comfy_host.model("lora"),
        strength_model=1.0,
        strength_clip=1.0,
    )
    prompt["sampler"]["inputs"]["model"] = ["lora", 0]
    run = comfy_host.execute(prompt, keep=[("lora", 0), ("lora", 1), LATENT])
    pairs = len(CROSS_ATTENTION_BLOCKS) * 3
    assert len(run["lora", 0].patches) == pairs, "every key of the file finds its layer"
    assert len(run["lora", 1].patcher.patches) == 1
    assert (run[LATENT]["samples"] - plain).abs().max() > 1e-3


def test_textual_inversion(comfy_host: ComfyHost) -> None:
    name = comfy_host.model("embedding").removesuffix(".safetensors")
    prompt = text_to_image(comfy_host.model("checkpoint"), f"a photo of embedding:{name} on a table")
    run = comfy_host.execute(prompt, keep=[("checkpoint", 1), LATENT])
    tokens = run["checkpoint", 1].tokenize(prompt["positive"]["inputs"]["text"])["l"][0]
    assert sum(isinstance(token[0], torch.Tensor) for token in tokens) == EMBEDDING_VECTORS


def test_controlnet(comfy_host: ComfyHost, plain: torch.Tensor) -> None:
    prompt = text_to_image(comfy_host.model("checkpoint"))
    prompt["controlnet"] = node("ControlNetLoader", control_net_name=comfy_host.model("controlnet"))
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
    assert (latent(comfy_host, prompt) - plain).abs().max() > 1e-3


def test_ipadapter(comfy_host: ComfyHost, plain: torch.Tensor) -> None:
    comfy_host.require_pack("ComfyUI_IPAdapter_plus", "IPAdapterAdvanced")
    prompt = text_to_image(comfy_host.model("checkpoint"))
    prompt["adapter"] = node("IPAdapterModelLoader", ipadapter_file=comfy_host.model("ipadapter"))
    prompt["vision"] = node("CLIPVisionLoader", clip_name=comfy_host.model("clip_vision"))
    prompt["image"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0xFF8000)
    prompt["applied"] = node(
        "IPAdapterAdvanced",
        model=["checkpoint", 0],
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
    prompt["sampler"]["inputs"]["model"] = ["applied", 0]
    assert (latent(comfy_host, prompt) - plain).abs().max() > 1e-3


def test_miniature(comfy_host: ComfyHost) -> None:
    parts = miniature_parts()
    with torch.inference_mode():
        encode = comfy_host.nodes["CLIPTextEncode"]().encode
        positive, negative = encode(parts.clip, "a teddy bear")[0], encode(parts.clip, "")[0]
        empty = {"samples": torch.zeros(1, 4, 8, 8)}
        sample = comfy_host.nodes["KSampler"]().sample
        samples = sample(parts.model, 0, 2, 4.0, "euler", "normal", positive, negative, empty)[0]
        image = comfy_host.nodes["VAEDecode"]().decode(parts.vae, samples)[0]
    assert torch.isfinite(samples["samples"]).all()
    assert image.shape == (1, 64, 64, 3)
    again, other = miniature_parts(), miniature_parts(seed=2)
    assert torch.equal(parts.model.model.diffusion_model.out[2].weight, again.model.model.diffusion_model.out[2].weight)
    assert not torch.equal(
        parts.model.model.diffusion_model.out[2].weight, other.model.model.diffusion_model.out[2].weight
    )
