"""At how much noise a concept is learned, and how much an error counts there.

The paper draws timesteps uniformly and takes the error in the noise. Most steps then go where the picture is all but
clean, and an error in the picture counts by the inverse of sigma squared: hardly at all where colors and shapes are
decided. As rectified flow does (Esser et al. 2024), "lognormal" draws the logarithm of the signal-to-noise ratio from a
normal distribution and takes the error in the velocity, noise minus picture: ``(1 + sigma)`` times that in the noise.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Timesteps = Literal["lognormal", "uniform"]
TIMESTEPS: tuple[Timesteps, ...] = get_args(Timesteps)

MEAN, DEVIATION = 0.0, 2.0  # of the logarithm of the signal-to-noise ratio


class NoiseLevels:
    """Draws from the noise levels sigma (n,) of a host, of which timestep 0 comes first."""

    def __init__(self, sigmas: Tensor, timesteps: Timesteps):
        self.sigmas = sigmas.cpu()
        self._chances = _lognormal(self.sigmas) if timesteps == "lognormal" else None

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Which levels: (count,), int64."""
        if self._chances is None:
            return torch.randint(len(self.sigmas), (count,), generator=generator)
        return torch.multinomial(self._chances, count, replacement=True, generator=generator)

    def factor(self, sigma: Tensor, prediction: Literal["eps", "v"]) -> Tensor:
        """What an error in the noise is multiplied by at sigma, any shape: the same shape.

        Where timesteps are uniform, a v-prediction's error counts in its own terms.
        """
        if self._chances is not None:
            return 1 + sigma
        return (1 + sigma**2).sqrt() if prediction == "v" else torch.ones_like(sigma)


def _lognormal(sigmas: Tensor) -> Tensor:
    log_snr = -2 * sigmas.double().log()
    density = torch.exp(-0.5 * ((log_snr - MEAN) / DEVIATION) ** 2)
    chances = density * torch.gradient(log_snr)[0].abs()  # each stands for what lies around it
    return (chances / chances.sum()).float()
