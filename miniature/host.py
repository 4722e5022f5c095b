"""The miniature as a host of the method, by diffusers and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perfusion.hosts.diffusers import DiffusersHost

from .captions import corpus
from .networks import BETA_END, BETA_START, TRAINING_TIMESTEPS
from .tokenizer import load as load_tokenizer
from .weights import FOLDER, load_text_encoder, load_unet, load_vae


def scheduler() -> Any:
    """The noise schedule, Stable Diffusion 1.x's own."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=TRAINING_TIMESTEPS,
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def load_host(folder: Path = FOLDER) -> DiffusersHost:
    """The miniature, ready to train on and to draw with (``perfusion.hosts.diffusers.draw``).

    Raises WeightsError where its weights are missing or damaged.
    """
    return DiffusersHost.of_parts(
        unet=load_unet(folder),
        vae=load_vae(folder),
        text_encoder=load_text_encoder(folder),
        tokenizer=load_tokenizer(folder / "tokenizer"),
        scheduler=scheduler(),
        captions=corpus(),
    )
