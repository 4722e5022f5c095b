"""A Stable Diffusion 1.5 pipeline in miniature, of random weights, for tests of diffusers as a host.

Nothing is downloaded: the tokenizer is a CLIP tokenizer over the words of our own caption corpus, its files written to
a folder that the caller gives.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from perfusion.corpus import captions

WIDTH = 64
START, END = "<|startoftext|>", "<|endoftext|>"
SD15_DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
SD15_UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")


@functools.cache
def tokenizer(folder: Path) -> CLIPTokenizer:
    """One token for most words of the corpus, several for others, as in the true one."""
    words = sorted({word for caption in captions(300) for word in re.findall(r"[a-z]+", caption.lower())})
    words = ["teddy", "bear", "cat", "photo", "blurry", *words]
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        for k in range(1, len(parts)):
            merges["".join(parts[:k]), parts[k]] = None
    vocabulary += dict.fromkeys("".join(pair) for pair in merges)
    vocabulary = [*dict.fromkeys(vocabulary), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    return CLIPTokenizer.from_pretrained(str(folder), model_max_length=77)


def text_encoder(vocabulary: CLIPTokenizer, width: int = WIDTH) -> CLIPTextModel:
    settings: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "bos_token_id": vocabulary.bos_token_id,
        "eos_token_id": vocabulary.eos_token_id,
        "pad_token_id": vocabulary.pad_token_id,
        "initializer_factor": 5.0,  # so that a word's neighbors show in its encoding
    }
    return CLIPTextModel(CLIPTextConfig(**settings)).eval()


def unet(
    down: tuple[str, ...] = ("CrossAttnDownBlock2D", "DownBlock2D"),
    up: tuple[str, ...] = ("UpBlock2D", "CrossAttnUpBlock2D"),
    channels: tuple[int, ...] = (32, 64),
    **changes: Any,
) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 8,
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    settings |= changes
    return UNet2DConditionModel(
        block_out_channels=channels, down_block_types=down, up_block_types=up, **settings
    ).eval()


def vae() -> AutoencoderKL:
    """Two levels: 2 pixels to a latent pixel."""
    settings: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": 16,
        "scaling_factor": 0.5,
    }
    return AutoencoderKL(**settings).eval()


def scheduler(**changes: Any) -> DDIMScheduler:
    settings: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return DDIMScheduler(**(settings | changes))


def pipeline(folder: Path, seed: int = 0, **parts: Any) -> StableDiffusionPipeline:
    """A whole pipeline; ``parts`` replace its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        words = tokenizer(folder)
        made: dict[str, Any] = {
            "vae": vae(),
            "text_encoder": text_encoder(words),
            "tokenizer": words,
            "unet": unet(),
            "scheduler": scheduler(),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
        made |= parts
        pipe = StableDiffusionPipeline(**made)
    pipe.set_progress_bar_config(disable=True)
    return pipe
