"""One training run: optimizer, moving average, learning-rate schedule, progress bar, and checkpoints to go on from."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as distributed
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from perfusion.files import write_atomically

from ..weights import read
from .optimizer import MuonAndAdam

logger = logging.getLogger(__name__)


class Run:
    """Trains named networks with Muon (AdamW for what is no matrix) and keeps a moving average of their weights.

    Every random choice of a step comes from ``generator(step)``, so a run that was interrupted goes on as if it had
    not been. The learning rate rises for ``warmup`` steps, stays, and falls to zero over the last ``decay`` share.
    Where torch.distributed is initialized, each process computes its own share of every batch.
    """

    def __init__(
        self,
        folder: Path,
        networks: Mapping[str, nn.Module],
        *,
        steps: int,
        rate: float,
        seed: int = 0,
        warmup: int = 200,
        decay: float = 0.3,
        ema: float = 0.999,
        weight_decay: float = 0.01,
        save_every: int = 250,
    ):
        self.path = folder / "checkpoint.safetensors"
        self.networks = dict(networks)
        self.steps, self.rate, self.seed = steps, rate, seed
        self.warmup, self.decay, self.ema, self.save_every = warmup, decay, ema, save_every
        self.step = 0
        self.losses: list[float] = []
        self._named = {f"{name}.{k}": p for name, net in self.networks.items() for k, p in net.named_parameters()}
        self.average = {name: p.detach().clone() for name, p in self._named.items()}
        self.optimizer = MuonAndAdam(self._named, rate, weight_decay)
        if self.path.exists():
            self._load()

    def generator(self, step: int) -> torch.Generator:
        """The randomness of one step."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) * processes() + rank())

    def train(self, loss_of: Callable[[torch.Generator], Tensor]) -> None:
        """Run to the last step; ``loss_of`` computes one step's loss from its randomness.

        Ctrl-C keeps what was learned; the same command goes on from there.
        """
        done = False
        bar = tqdm(total=self.steps, initial=self.step, desc=self.path.parent.name, unit="step", disable=rank() > 0)
        try:
            while self.step < self.steps:
                rate = self.rate * self._schedule(self.step)
                self.optimizer.set_rate(rate)
                for parameter in self._named.values():
                    parameter.grad = None
                loss = loss_of(self.generator(self.step))
                loss.backward()
                self._share_gradients()
                norm = nn.utils.clip_grad_norm_(self._named.values(), 1.0)
                if not torch.isfinite(norm):
                    raise FloatingPointError(f"step {self.step}: the gradient is not finite; lower --rate")
                self.optimizer.step()
                self.step += 1
                self._follow()
                self.losses.append(float(loss.detach()))
                bar.update()
                if self.step % 20 == 0:
                    bar.set_postfix(loss=f"{sum(self.losses[-20:]) / 20:.4f}", lr=f"{rate:.1e}")
                if self.step % self.save_every == 0:
                    self.save()
            done = True
        finally:
            bar.close()
            if not done:
                self.save()
                logger.warning("stopped at step %d; %s has it: the same command goes on", self.step, self.path)
        self.save()

    def save(self) -> None:
        """Write everything that the next step depends on, atomically."""
        if rank() > 0:
            return
        tensors = {f"weight.{k}": p.detach().contiguous() for k, p in self._named.items()}
        tensors |= {f"average.{k}": p.contiguous() for k, p in self.average.items()}
        for key, parameter in self._named.items():
            for name, value in self.optimizer.state(parameter).items():
                tensors[f"optimizer.{name}.{key}"] = torch.as_tensor(value).detach().clone().contiguous()
        summary = {"step": str(self.step), "losses": json.dumps([round(loss, 6) for loss in self.losses])}
        write_atomically(self.path, tensors, summary, overwrite=True)

    def _load(self) -> None:
        with safe_open(self.path, "pt") as file:
            summary = file.metadata()
            for key, parameter in self._named.items():
                parameter.data.copy_(file.get_tensor(f"weight.{key}"))
                self.average[key].copy_(file.get_tensor(f"average.{key}"))
            kept: dict[str, dict[str, Tensor]] = {key: {} for key in self._named}
            for name in file.keys():  # noqa: SIM118, no mapping
                part, kind, *rest = name.split(".", 2)
                if part == "optimizer":
                    kept[rest[0]][kind] = file.get_tensor(name)
            for key, parameter in self._named.items():
                state = {
                    kind: value if kind == "step" else value.to(parameter.device) for kind, value in kept[key].items()
                }
                self.optimizer.set_state(parameter, state)
        self.step, self.losses = int(summary["step"]), json.loads(summary["losses"])
        logger.warning("going on at step %d of %s", self.step, self.path)

    def _share_gradients(self) -> None:
        if processes() == 1:
            return
        gradients = [p.grad for p in self._named.values() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= processes()
        for gradient, shared in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(shared.view_as(gradient))

    def _schedule(self, step: int) -> float:
        rise = min(1.0, (step + 1) / self.warmup)
        return rise * min(1.0, (self.steps - step) / max(1, round(self.steps * self.decay)))

    @torch.no_grad()
    def _follow(self) -> None:
        weight = 1 - min(self.ema, (self.step + 1) / (self.step + 10))
        averages, parameters = list(self.average.values()), [p.detach() for p in self._named.values()]
        torch._foreach_lerp_(averages, parameters, weight)  # pyright: ignore[reportPrivateImportUsage]


def begin_with_weights(network: nn.Module, *parts: str, strict: bool = True) -> None:
    """Fill a network with the weights that ship for these parts; all of it, where ``strict``."""
    state = {name: value.float() for part in parts for name, value in read(part).items()}
    network.load_state_dict(state, strict=strict)


def device() -> torch.device:
    """Where to train: on a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    """bfloat16 where it is faster: on GPUs, and on CPUs with instructions for it. Without, it is 10 times slower."""
    cpu = torch.cpu  # the public torch.backends.cpu tells AVX-512 from AVX2, but not whether it multiplies bfloat16
    fast = torch.cuda.is_available() or cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()
    return torch.autocast(device().type, torch.bfloat16, enabled=fast)


def processes() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return distributed.get_rank() if distributed.is_initialized() else 0
