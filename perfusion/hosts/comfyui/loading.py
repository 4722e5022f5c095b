"""A ComfyUI without its server: its loaders for trainings that no graph starts."""

from __future__ import annotations

import sys
from pathlib import Path

from ..base import Host


def load_host(comfyui: Path, checkpoint: Path, *, cpu: bool, precision: str) -> Host:
    """A host of a checkpoint, as the ComfyUI in the folder ``comfyui`` loads it.

    ComfyUI reads device and ``precision`` (``float32``, ``bfloat16``, else its own choice) once, at its import: they
    are those of the first call in a process.

    Raises ImportError when there is no ComfyUI or this Python lacks what it needs, and whatever ComfyUI raises for
    files that are damaged.
    """
    if str(comfyui) not in sys.path:
        sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    args.cpu = cpu
    args.force_fp32 = precision == "float32"
    args.bf16_unet = precision == "bfloat16"
    import comfy.sd

    from .training import ComfyHost

    model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=True, output_clip=True)[:3]
    return ComfyHost(model, clip, vae)
