"""Training runs of the miniature: stopped and gone on as if nothing had been, and nothing lost by Ctrl-C."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from miniature.judge import Judge
from miniature.training.export import averaged, export
from miniature.training.run import Run
from miniature.training.text import said_by_padding
from miniature.weights import WeightsError, keep, load_judge, load_unet


class _Fit:
    """A small regression with noise of its own at each step."""

    def __init__(self, folder: Path, steps: int):
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.run = Run(folder, {"fit": self.network}, steps=steps, rate=0.1, warmup=3, save_every=5)

    def loss(self, generator: torch.Generator) -> Tensor:
        x = torch.randn(16, 4, generator=generator)
        return ((self.network(x).squeeze(-1) - x.sum(-1)) ** 2).mean()


def _state(fit: _Fit) -> list[Tensor]:
    states = [fit.run.optimizer.state(parameter) for parameter in fit.network.parameters()]
    moments = [state[name] for state in states for name in sorted(state)]
    return [*fit.network.state_dict().values(), *fit.run.average.values(), *moments]


@pytest.fixture(autouse=True)
def silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", logger="miniature.training.run")


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = _Fit(tmp_path / "whole", 20)
    whole.run.train(whole.loss)
    first = _Fit(tmp_path / "parts", 20)

    def stop(generator: torch.Generator) -> Tensor:
        if first.run.step == 12:
            raise KeyboardInterrupt
        return first.loss(generator)

    with pytest.raises(KeyboardInterrupt):
        first.run.train(stop)
    second = _Fit(tmp_path / "parts", 20)
    assert second.run.step == 12 and second.run.losses[-1] == pytest.approx(first.run.losses[-1], abs=1e-6)
    second.run.train(second.loss)
    assert all(torch.equal(a, b) for a, b in zip(_state(whole), _state(second), strict=True))
    assert len(second.run.losses) == 20 and second.run.losses[-1] < second.run.losses[0]


def test_a_gradient_that_is_not_finite_stops_before_it_spoils_anything(tmp_path: Path) -> None:
    fit = _Fit(tmp_path, 20)

    def broken(generator: torch.Generator) -> Tensor:
        return fit.loss(generator) * (float("nan") if fit.run.step == 7 else 1.0)

    with pytest.raises(FloatingPointError, match="lower --rate"):
        fit.run.train(broken)
    again = _Fit(tmp_path, 20)
    assert again.run.step == 7 and all(value.isfinite().all() for value in again.network.state_dict().values())


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = _Fit(tmp_path, 12)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def loss(generator: torch.Generator) -> Tensor:
        if fit.run.step == 7:
            monkeypatch.setattr("miniature.training.run.write_atomically", full)
        return fit.loss(generator)

    with pytest.raises(OSError, match="No space left"):
        fit.run.train(loss)
    monkeypatch.undo()
    assert _Fit(tmp_path, 12).run.step == 5


def test_export_writes_half_precision_and_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train that part first"):
        export(tmp_path, "judges", tmp_path / "weights")
    judge = Judge()
    Run(tmp_path / "judges", {"judge": judge}, steps=1, rate=0.1).save()
    export(tmp_path, "judges", tmp_path / "weights")
    loaded = load_judge(tmp_path / "weights").state_dict()
    for name, value in averaged(tmp_path, "judges", "judge").items():
        assert torch.allclose(loaded[name], value, atol=1e-3)


def test_weights_that_are_missing_or_damaged_say_how_to_get_them(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"missing.*git checkout"):
        load_unet(tmp_path)
    keep("unet", {"a": torch.zeros(3)}, None, tmp_path)
    with pytest.raises(WeightsError, match="does not fit"):
        load_unet(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(WeightsError, match="damaged"):
        load_unet(tmp_path)


def test_what_padding_says_is_how_much_it_differs_between_captions() -> None:
    encodings = torch.randn(4, 6, 8)
    padding = torch.zeros(4, 6, dtype=torch.bool)
    assert said_by_padding(encodings, padding) == 0
    padding[:3, 4:] = True
    encodings[:3, 4:] = torch.randn(2, 8)
    assert said_by_padding(encodings, padding).item() == pytest.approx(0, abs=1e-10)
    encodings[0, 4] += 3
    # one of three differs by 3 from the others: a variance of 2 at that token, 0 at the next
    assert said_by_padding(encodings, padding).item() == pytest.approx(1)
