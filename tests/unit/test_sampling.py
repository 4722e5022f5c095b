"""The sampler that all hosts share, on the host in miniature."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from perfusion.hosts.base import Encodings
from perfusion.sampling import sample, unit_noise
from tests.unit.fake_host import FakeHost

SHAPE = (4, 8, 8)


def loaded(**settings: Any) -> FakeHost:
    host = FakeHost(**settings)
    host.in_training = True
    return host


def noise(count: int = 2) -> Tensor:
    return torch.stack([unit_noise(seed, SHAPE) for seed in range(count)])


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_it_is_ddim(prediction: Any) -> None:
    """x' = sqrt(a') x0 + sqrt(1 - a') eps in the variance-preserving terms of Song et al. 2021, equation 12."""
    host, steps = loaded(prediction=prediction), 7
    text = host.encode(["a bear", "a red chair"])
    levels = host.noise_levels()
    chosen = [round(k * (len(levels) - 1) / (steps - 1)) for k in range(steps)][::-1]
    signals = [1 / (1 + float(levels[k]) ** 2) for k in chosen] + [1.0]
    x = noise()
    for signal, following in zip(signals, signals[1:], strict=False):
        sigma = torch.full((2,), ((1 - signal) / signal) ** 0.5)
        x0 = host.denoise(x / signal**0.5, sigma, text, None)
        eps = (x - signal**0.5 * x0) / (1 - signal) ** 0.5
        x = following**0.5 * x0 + (1 - following) ** 0.5 * eps
    assert torch.allclose(sample(host, noise(), text, None, steps, 5.0), x, atol=1e-4)


def test_guidance_goes_from_the_unwanted_prompt_to_the_wanted_one_and_beyond() -> None:
    host = loaded()
    wanted, unwanted, both = (host.encode(prompts) for prompts in (["a bear"], [""], ["a bear", ""]))
    one = noise(1)

    def drawn(text: Encodings, guidance: float) -> Tensor:
        return sample(host, one, text, None, 1, guidance)

    towards = drawn(wanted, 1.0) - drawn(unwanted, 1.0)
    assert towards.abs().max() > 1e-2
    for guidance in (0.0, 1.0, 4.0):
        assert torch.allclose(drawn(both, guidance), drawn(unwanted, 1.0) + guidance * towards, atol=1e-4)
    assert torch.equal(drawn(wanted, 4.0), drawn(wanted, 1.0)), "nothing to be guided away from"


def test_a_picture_does_not_depend_on_those_beside_it() -> None:
    host = loaded()
    together = sample(host, noise(3), host.encode(["a bear", "a hat", "a cat", "", "", ""]), None, 4, 3.0)
    alone = sample(host, noise(3)[1:2], host.encode(["a hat", ""]), None, 4, 3.0)
    assert torch.allclose(together[1:2], alone, atol=1e-5)


def test_it_may_be_stopped_between_steps() -> None:
    class Stop(Exception):
        pass

    calls = 0

    def between() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise Stop

    host = loaded()
    with pytest.raises(Stop):
        sample(host, noise(), host.encode(["a bear", "a hat"]), None, 5, 1.0, between)
    assert host.calls == 2


def test_noise_is_that_of_its_seed_whatever_the_random_state() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(unit_noise(5, SHAPE), unit_noise(5, SHAPE))
    assert not torch.equal(unit_noise(5, SHAPE), unit_noise(6, SHAPE))
    assert torch.equal(torch.get_rng_state(), state)
