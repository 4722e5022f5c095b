"""The denoiser: predicts the noise in latents of scenes from captions written anew at each step."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from perfusion.files import write_atomically
from perfusion.training.noise import NoiseLevels

from .. import networks
from .. import tokenizer as tokens
from ..captions import caption
from ..data import pool, pool_scene, to_network
from ..weights import FOLDER, load_text_encoder, load_vae
from .compiling import compilable
from .run import Run, autocast, begin_with_weights, device

DROPPED = 0.1  # share of captions left empty, for classifier-free guidance


def train(
    cache: Path,
    steps: int,
    rate: float,
    batch: int,
    pictures: int,
    compiled: bool,
    start_from_weights: bool = False,
    seed: int = 0,
) -> None:
    """Train on ``pictures`` scenes with the finished VAE and text encoder; the checkpoint goes to ``cache/unet``.

    ``start_from_weights``: a new run begins with the weights that ship, not at random.
    """
    torch.manual_seed(seed)
    here = device()
    mean, std = latents(cache, pictures)
    scenes = [pool_scene("train", k) for k in range(pictures)]
    tokenizer, text_encoder = tokens.load(FOLDER / "tokenizer"), load_text_encoder().to(here)
    unet: Any = networks.unet()
    unet.to(here, memory_format=torch.channels_last)
    if here.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # the fused kernel's backward pass is slow on CPUs
    if start_from_weights:
        begin_with_weights(unet, "unet")
    run = Run(cache / "unet", {"unet": unet}, steps=steps, rate=rate, seed=seed, ema=0.9995, save_every=200)
    signal = alphas_cumprod()
    # At 16 x 16 the shape of a thing is decided at middling noise; uniform timesteps spend most of the work where there
    # is so much that nothing is left to see.
    levels = NoiseLevels(((1 - signal) / signal).sqrt(), "lognormal")
    weights = levels.factor(levels.sigmas, "eps") ** 2

    def objective(noisy: Tensor, timestep: Tensor, context: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
        predicted = unet(noisy, timestep, context, return_dict=False)[0].float()
        return (((predicted - noise) ** 2).mean(dim=(1, 2, 3)) * weight).mean()

    if compiled:
        compilable(unet)
    objective_of = torch.compile(objective) if compiled else objective

    def loss_of(generator: torch.Generator) -> Tensor:
        index = torch.randint(pictures, (batch,), generator=generator)
        rng = Random(int(torch.randint(2**62, (1,), generator=generator)))
        texts = ["" if rng.random() < DROPPED else caption(rng, scenes[k]).text for k in index.tolist()]
        encoded = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad(), autocast():
            context = text_encoder(encoded.input_ids.to(here)).last_hidden_state
        noise, drawn = (torch.randn(batch, 4, 16, 16, generator=generator) for _ in range(2))
        x0 = mean[index].float() + std[index].float() * drawn
        timestep = levels.draw(batch, generator)
        a = signal[timestep].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * x0 + (1 - a).sqrt() * noise).to(here, memory_format=torch.channels_last)
        with autocast():
            return objective_of(noisy, timestep.to(here), context.float(), noise.to(here), weights[timestep].to(here))

    run.train(loss_of)


def alphas_cumprod() -> Tensor:
    """How much signal is left at each timestep, (1000,)."""
    beta = torch.linspace(networks.BETA_START**0.5, networks.BETA_END**0.5, networks.TRAINING_TIMESTEPS) ** 2
    return (1 - beta).cumprod(0)


def latents(cache: Path, pictures: int) -> tuple[Tensor, Tensor]:
    """Means and standard deviations (n, 4, 16, 16), float16, of the scaled latents of the training scenes."""
    path = cache / f"latents-{pictures}.safetensors"
    if path.exists():
        stored = load_file(path)
        return stored["mean"], stored["std"]
    data, means, stds = pool(cache, "train", pictures), [], []
    vae = load_vae().to(device(), memory_format=torch.channels_last)
    for part in tqdm(data.split(100), desc="encoding", unit="x100"):
        with torch.no_grad(), autocast():
            x = to_network(part).to(device(), memory_format=torch.channels_last)
            posterior = vae.encode(x).latent_dist
        means.append((posterior.mean.float() * vae.config.scaling_factor).half().cpu())
        stds.append((posterior.std.float() * vae.config.scaling_factor).half().cpu())
    mean, std = torch.cat(means).contiguous(), torch.cat(stds).contiguous()
    write_atomically(path, {"mean": mean, "std": std}, {}, overwrite=True)
    return mean, std
