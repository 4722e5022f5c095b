"""Pipelines from the files a person keeps, as ``DiffusersHost``. Nothing is downloaded, no code of a model is run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from .host import DiffusersHost


def load_host(model: Path, config: Path | None, device: torch.device, dtype: torch.dtype) -> DiffusersHost:
    """A host of a model in a folder as diffusers keeps them, or in a checkpoint file.

    ``config`` is, for a checkpoint, such a folder whose networks are of its kind. ``dtype`` is what the network
    computes in; text encoder and VAE stay in 32 bit, since what they make is measured and compared.

    Raises UnsupportedPipelineError for a kind of model that cannot be learned on, and whatever the libraries raise for
    files that are damaged.
    """
    plain: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False, "local_files_only": True}
    with _quiet():
        if model.is_file():
            pipeline = StableDiffusionPipeline.from_single_file(str(model), config=str(config), **plain)
        else:
            pipeline = StableDiffusionPipeline.from_pretrained(str(model), use_safetensors=True, **plain)
        pipeline.to(torch.float32)
        pipeline.unet.to(dtype)
        pipeline.to(device)
    return DiffusersHost(pipeline)


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading without the bars and hints of the libraries, which are for their developers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        yield
    finally:
        for library, level, bar in zip(libraries, levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()
