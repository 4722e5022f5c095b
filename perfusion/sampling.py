"""Pictures from noise by a plain sampler that every host shares: the same seed the same picture, whatever the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .edit import KeyValueEdit
from .hosts.base import Encodings, Host
from .places import Places


def unit_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Noise of unit variance, drawn on the CPU from a seed of its own: the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latent_shape(host: Host, size: int) -> tuple[int, ...]:
    """(c, h, w) of the latent of a square picture of ``size`` pixels. To be called without gradient."""
    return tuple(host.encode_images(torch.full((1, size, size, 3), 0.5)).shape[1:])


def pictures_of(
    host: Host,
    text: Encodings,
    seeds: Sequence[int],
    shape: tuple[int, ...],
    edit: KeyValueEdit | None,
    steps: int,
    guidance: float,
    between: Callable[[], None] | None = None,
) -> Tensor:
    """Pictures (b, height, width, 3) in 0..1, on the CPU: ``sample`` from the noise of b seeds, decoded.

    ``shape`` (c, h, w) is that of a latent; ``text`` lies where the network computes.
    """
    noise = torch.stack([unit_noise(seed, shape) for seed in seeds]).to(host.device)
    return host.decode_latents(sample(host, noise, text, edit, steps, guidance, between))


def sample(
    host: Host,
    noise: Tensor,
    text: Encodings,
    edit: KeyValueEdit | None,
    steps: int,
    guidance: float,
    between: Callable[[], None] | None = None,
) -> Tensor:
    """Latents (b, c, h, w), scaled as the network sees them, from unit noise (b, c, h, w) where the network computes.

    Euler's method over the host's noise levels, which is DDIM with eta = 0 (Song et al. 2021), with classifier-free
    guidance (Ho and Salimans 2022). ``text`` holds the b wanted prompts and, where guided, the b unwanted ones behind
    them; without those ``guidance`` does nothing. ``between`` is called before each step and may raise to stop. To be
    called inside ``host.training()`` or whatever else makes ``host.denoise`` ready, without gradient.
    """
    levels = host.noise_levels()
    timesteps = torch.linspace(len(levels) - 1, 0, steps).round().long()
    sigmas = torch.cat([levels[timesteps], levels.new_zeros(1)]).to(noise.device)
    copies = len(text.context) // len(noise)
    x = noise * (1 + sigmas[0] ** 2).sqrt()
    said: Tensor | None = None
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        if between is not None:
            between()
        noisy, level = x.repeat(copies, 1, 1, 1), sigma.repeat(copies * len(x))
        if edit is not None and edit.focuses:
            places = Places(said)
            estimate = host.denoise(noisy, level, text, edit, places=places)
            said = places.said
        else:
            estimate = host.denoise(noisy, level, text, edit)
        if copies == 2:
            wanted, unwanted = estimate.chunk(2)
            estimate = unwanted + guidance * (wanted - unwanted)
        x = estimate + (x - estimate) * (following / sigma)
    return x
