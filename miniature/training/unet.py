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

from .. import networks
from .. import tokenizer as tokens
from ..captions import caption
from ..data import pool, pool_scene, to_network
from ..weights import FOLDER, load_text_encoder, load_vae
from .compiling import compilable
from .run import Run, autocast, begin_with_weights, device

DROPPED = 0.1  # share of captions left empty, for classifier-free guidance
# Rectified flow's choice of noise levels (Esser et al. 2024): the log of the signal-to-noise ratio is normal, of this
# mean and deviation. At 16 x 16 the shape of a thing is decided there; uniform timesteps spend most of the work on
# noise so strong that nothing is left to see.
LOG_SNR = (0.0, 2.0)


def train(
    cache: Path,
    steps: int,
    rate: float,
    batch: int,
    pictures: int,
    compiled: bool,
    start_from_weights: bool = False,
    seed: int = 0,
    pairs: int = 0,
) -> None:
    """Train on ``pictures`` scenes, and ``pairs`` of two things, with the finished VAE and text encoder; the checkpoint
    goes to ``cache/unet``.

    ``start_from_weights``: a new run begins with the weights that ship, not at random.
    """
    torch.manual_seed(seed)
    here = device()
    counts = {"train": pictures, "pairs": pairs}
    parts = [latents(cache, count, name) for name, count in counts.items() if count]
    mean, std = (torch.cat(which) for which in zip(*parts, strict=True))
    scenes = [pool_scene(name, k) for name, count in counts.items() for k in range(count)]
    tokenizer, text_encoder = tokens.load(FOLDER / "tokenizer"), load_text_encoder().to(here)
    unet: Any = networks.unet()
    unet.to(here, memory_format=torch.channels_last)
    if here.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # the fused kernel's backward pass is slow on CPUs
    if start_from_weights:
        begin_with_weights(unet, "unet")
    run = Run(cache / "unet", {"unet": unet}, steps=steps, rate=rate, seed=seed, ema=0.9995, save_every=200)
    signal = alphas_cumprod()
    chances, weights = noise_levels(signal)

    def objective(noisy: Tensor, timestep: Tensor, context: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
        predicted = unet(noisy, timestep, context, return_dict=False)[0].float()
        return (((predicted - noise) ** 2).mean(dim=(1, 2, 3)) * weight).mean()

    if compiled:
        compilable(unet)
    objective_of = torch.compile(objective) if compiled else objective

    def loss_of(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(scenes), (batch,), generator=generator)
        rng = Random(int(torch.randint(2**62, (1,), generator=generator)))
        texts = ["" if rng.random() < DROPPED else caption(rng, scenes[k]).text for k in index.tolist()]
        encoded = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad(), autocast():
            context = text_encoder(encoded.input_ids.to(here)).last_hidden_state
        noise, drawn = (torch.randn(batch, 4, 16, 16, generator=generator) for _ in range(2))
        x0 = mean[index].float() + std[index].float() * drawn
        timestep = torch.multinomial(chances, batch, replacement=True, generator=generator)
        a = signal[timestep].view(-1, 1, 1, 1)
        noisy = (a.sqrt() * x0 + (1 - a).sqrt() * noise).to(here, memory_format=torch.channels_last)
        with autocast():
            return objective_of(noisy, timestep.to(here), context.float(), noise.to(here), weights[timestep].to(here))

    run.train(loss_of)


def alphas_cumprod() -> Tensor:
    """How much signal is left at each timestep, (1000,)."""
    beta = torch.linspace(networks.BETA_START**0.5, networks.BETA_END**0.5, networks.TRAINING_TIMESTEPS) ** 2
    return (1 - beta).cumprod(0)


def noise_levels(signal: Tensor) -> tuple[Tensor, Tensor]:
    """The chance of each timestep, (1000,), and the weight of its error in the noise, (1000,).

    The weighted error is that of rectified flow's velocity, which is the noise minus the clean latents: the same share
    of the error at each level, where an error in the noise alone would hardly count the clean latents under much noise.
    """
    snr = signal / (1 - signal)
    mean, deviation = LOG_SNR
    chance = torch.exp(-0.5 * ((snr.log() - mean) / deviation) ** 2) * -torch.gradient(snr.log())[0]
    return chance / chance.sum(), (1 + snr.rsqrt()) ** 2


def latents(cache: Path, pictures: int, name: str = "train") -> tuple[Tensor, Tensor]:
    """Means and standard deviations (n, 4, 16, 16), float16, of the scaled latents of a pool's scenes."""
    path = cache / f"latents-{name}-{pictures}.safetensors"
    if path.exists():
        stored = load_file(path)
        return stored["mean"], stored["std"]
    data, means, stds = pool(cache, name, pictures), [], []
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
