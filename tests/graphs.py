"""Prompts in API format, as plain data."""

from __future__ import annotations

from typing import Any

from tests.hosts import Prompt


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    """A node; links are lists such as ["checkpoint", 0]."""
    return {"class_type": class_type, "inputs": inputs}


def text_to_image(
    checkpoint: str, text: str = "a photo of a teddy bear", *, size: int = 64, steps: int = 2, seed: int = 0
) -> Prompt:
    """The stock graph up to the decoded image, with telling node ids; without an output node.

    Change what is between by reassigning links: `prompt["sampler"]["inputs"]["model"] = ["lora", 0]`.
    """
    return {
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "positive": node("CLIPTextEncode", clip=["checkpoint", 1], text=text),
        "negative": node("CLIPTextEncode", clip=["checkpoint", 1], text="blurry"),
        "latent": node("EmptyLatentImage", width=size, height=size, batch_size=1),
        "sampler": node(
            "KSampler",
            model=["checkpoint", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=seed,
            steps=steps,
            cfg=4.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sampler", 0], vae=["checkpoint", 2]),
    }
