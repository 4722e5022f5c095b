"""Models to learn on, by the host that a call asks for."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import torch

from ..hosts.base import Host
from .options import AUTOMATIC, Job

_kept: dict[tuple[object, ...], Host] = {}


class ModelError(ValueError):
    """A model that cannot be learned on; the message says why and what to do."""


def load(job: Job) -> Host:
    """The host of a job's model; the one that was loaded last is kept for the next job.

    Raises ModelError when it cannot be loaded or is of a kind that cannot be learned on.
    """
    key = (job.runtime, job.model, job.model_config, job.device, job.precision)
    if key not in _kept:
        _kept.clear()  # before the next one takes its memory
        _kept[key] = _made_by(job.runtime.host) if job.model is None else _loaded(job, job.model)
    return _kept[key]


def _loaded(job: Job, model: Path) -> Host:
    if job.runtime.comfyui is None:
        return _by_diffusers(job, model)
    return _by_comfyui(job, model, job.runtime.comfyui)


def _by_comfyui(job: Job, model: Path, comfyui: Path) -> Host:
    """A checkpoint as ComfyUI loads it, which reads device and precision once, at its import."""
    if job.device not in (AUTOMATIC, "cpu", "cuda"):
        raise ModelError(f"--device {job.device}: ComfyUI computes on cpu or cuda. Hide cards by CUDA_VISIBLE_DEVICES")
    where = _device(job.device)
    try:
        from ..hosts.comfyui.loading import load_host

        return load_host(comfyui, model, cpu=where.type == "cpu", precision=job.precision)
    except ImportError as error:
        raise ModelError(
            f"--comfyui {comfyui}: {error}. Give the folder in which ComfyUI's main.py lies, and run this with its "
            "Python"
        ) from error
    # Loaders of damaged files raise anything.
    except Exception as error:
        raise _unusable(model, error) from error


def _unusable(model: Path, error: Exception) -> ModelError:
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return ModelError(
        f"the model {model.name} cannot be loaded ({reason[:300]}). Give a Stable Diffusion model: a folder as "
        "diffusers keeps them, with weights as .safetensors, or a checkpoint with such a folder for its configuration, "
        "or with --comfyui"
    )


def _by_diffusers(job: Job, model: Path) -> Host:
    where = _device(job.device)
    try:
        from ..hosts.diffusers import UnsupportedPipelineError
        from ..hosts.diffusers.loading import load_host
    except ImportError as error:
        raise ModelError(str(error)) from error
    try:
        return load_host(model, job.model_config, where, _dtype(job.precision, where))
    except UnsupportedPipelineError as error:
        raise ModelError(f"{model.name}: {error}") from error
    # Loaders of damaged folders raise anything.
    except Exception as error:
        raise _unusable(model, error) from error


def _made_by(function: str) -> Host:
    """What a function gives, named as ``module:function``."""
    module, _, name = function.partition(":")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        host = getattr(import_module(module), name)()
    except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        raise ModelError(f"--host {function}: {error}. Give it as module:function, without arguments") from error
    return host


def _device(name: str) -> torch.device:
    if name == AUTOMATIC:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"the device {name} cannot be used here: leave --device out, or set it to cpu") from error
    return device


def _dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision == AUTOMATIC:
        good = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if good else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32
