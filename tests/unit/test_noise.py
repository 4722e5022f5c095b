"""At how much noise a concept is learned: the chances of levels, and what an error counts there."""

from __future__ import annotations

from typing import Literal

import torch

from perfusion.training.noise import DEVIATION, MEAN, NoiseLevels


def sigmas() -> torch.Tensor:
    """Those of Stable Diffusion's schedule."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = (1 - beta).cumprod(0)
    return ((1 - alpha) / alpha).sqrt().float()


def test_levels_are_normal_in_the_logarithm_of_signal_to_noise() -> None:
    levels = NoiseLevels(sigmas(), "lognormal")
    drawn = levels.draw(50_000, torch.Generator().manual_seed(0))
    log_snr = -2 * levels.sigmas[drawn].log()
    # The schedule ends at -5.4, which cuts off little.
    assert abs(float(log_snr.median()) - MEAN) < 0.1
    assert abs(float(log_snr.std()) - DEVIATION) < 0.15


def test_uniform_levels_are_all_alike() -> None:
    levels = NoiseLevels(sigmas(), "uniform")
    counts = levels.draw(100_000, torch.Generator().manual_seed(0)).bincount(minlength=1000)
    assert counts.min() > 50 and counts.max() < 160


def test_the_error_is_that_of_the_velocity() -> None:
    """Whatever the network predicts: between picture and noise, straight."""
    generator = torch.Generator().manual_seed(0)
    x0, noise, estimate = (torch.randn(6, 4, 8, 8, generator=generator) for _ in range(3))
    sigma = torch.tensor([0.03, 0.3, 1.0, 3.0, 9.0, 14.6]).view(-1, 1, 1, 1)
    noisy = x0 + sigma * noise
    in_noise = (noisy - estimate) / sigma - noise
    straight, t = noisy / (1 + sigma), sigma / (1 + sigma)  # (1 - t) x0 + t noise
    velocity = (straight - estimate) / t
    predictions: tuple[Literal["eps", "v"], ...] = ("eps", "v")
    for prediction in predictions:
        factor = NoiseLevels(sigmas(), "lognormal").factor(sigma, prediction)
        assert torch.allclose((in_noise * factor).abs(), (velocity - (noise - x0)).abs(), atol=1e-4, rtol=1e-4)


def test_where_they_are_uniform_errors_count_as_in_the_prediction() -> None:
    levels, sigma = NoiseLevels(sigmas(), "uniform"), torch.tensor([0.1, 2.0])
    assert torch.equal(levels.factor(sigma, "eps"), torch.ones(2))
    assert torch.allclose(levels.factor(sigma, "v"), (1 + sigma**2).sqrt())
