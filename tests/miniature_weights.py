"""The miniature's weights for tests: the pack's own where they are there, else random ones of the same networks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from miniature import weights

PARTS = ("unet", "vae", "text_encoder", "image_encoder")


def available(folder: Path) -> Path:
    """The folder of the pack's weights, or ``folder`` with random ones in it."""
    there = all((weights.FOLDER / part / weights.FILES[part]).is_file() for part in PARTS)
    return weights.FOLDER if there else random(folder)


def random(folder: Path, seed: int = 0) -> Path:
    """Weights of the very networks, random, in ``folder``. Texts differ more in them than in untrained encoders."""
    from miniature import networks

    shutil.copytree(weights.FOLDER / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae, unet, images = networks.autoencoder(), networks.unet(), networks.image_encoder()
        text = networks.text_encoder(*weights.special_tokens(folder))
    vae.register_to_config(scaling_factor=0.7)
    for tower in (text, images):
        for name, parameter in tower.named_parameters():
            if name.endswith(".weight") and "norm" not in name:
                parameter.data *= 5
    for part, network in (("vae", vae), ("unet", unet)):
        weights.keep(part, network.state_dict(), json.loads(network.to_json_string()), folder)
    for part, network in (("text_encoder", text), ("image_encoder", images)):
        weights.keep(part, network.state_dict(), network.config.to_dict(), folder)
    return folder


def pipeline(folder: Path) -> Any:
    """The miniature in the classes of diffusers and transformers, float32."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    from miniature import networks, tokenizer

    scheduler = DDIMScheduler(
        num_train_timesteps=networks.TRAINING_TIMESTEPS,
        beta_start=networks.BETA_START,
        beta_end=networks.BETA_END,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return SimpleNamespace(
        unet=weights.load_unet(folder),
        vae=weights.load_vae(folder),
        text_encoder=weights.load_text_encoder(folder),
        tokenizer=tokenizer.load(folder / "tokenizer"),
        scheduler=scheduler,
    )
