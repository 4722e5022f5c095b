"""The autoencoder: pictures to latents of a quarter of their size, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, l1_loss, mse_loss

from ..data import pool, to_network
from ..networks import autoencoder
from .compiling import compilable
from .run import Run, autocast, begin_with_weights, device

KL_WEIGHT = 3e-5


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
    """Train on ``pictures`` scenes; the checkpoint goes to ``cache/vae``.

    ``start_from_weights``: a new run begins with the weights that ship, not at random.
    """
    torch.manual_seed(seed)
    data = pool(cache, "train", pictures)
    vae: Any = autoencoder()
    if start_from_weights:
        begin_with_weights(vae, "vae")
    else:
        _begin(vae, to_network(data[:64]))
    vae.to(device(), memory_format=torch.channels_last)
    run = Run(cache / "vae", {"vae": vae}, steps=steps, rate=rate, seed=seed, ema=0.998)

    def objective(x: Tensor, noise: Tensor) -> Tensor:
        posterior = vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * noise
        y = vae.decode(z, return_dict=False)[0].float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        edges = l1_loss(_edges(y, 2), _edges(x, 2)) + l1_loss(_edges(y, 3), _edges(x, 3))
        # Without a term of its own, the color of a cell is learned long after its light and dark.
        colors = l1_loss(avg_pool2d(y, 4), avg_pool2d(x, 4))
        return l1_loss(y, x) + 2 * mse_loss(y, x) + colors + 0.25 * edges + KL_WEIGHT * kl

    if compiled:
        compilable(vae)
    objective_of = torch.compile(objective) if compiled else objective

    def loss_of(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(data), (batch,), generator=generator)
        x = to_network(data[index]).to(device(), memory_format=torch.channels_last)
        noise = torch.randn(batch, 4, 16, 16, generator=generator).to(device())
        with autocast():
            return objective_of(x, noise)

    run.train(loss_of)


def _begin(vae: Any, pictures: Tensor) -> None:
    """Latents of unit scale and little noise: else the noise drowns them, and the decoder learns to ignore them."""
    with torch.no_grad():
        first = vae.encode(pictures).latent_dist.mean
        vae.quant_conv.weight[:4] /= first.std()
        vae.quant_conv.bias.zero_()
        vae.quant_conv.bias[4:] = -6.0


def _edges(x: Tensor, axis: int) -> Tensor:
    return x.diff(dim=axis)
