"""Where the miniature's weights lie, and how its parts are loaded and kept: the folder layout of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from perfusion.files import write_atomically

from . import networks, tokenizer

FOLDER = Path(__file__).parent / "weights"
PARTS = ("unet", "vae", "text_encoder", "image_encoder", "judge")


class WeightsError(OSError):
    """The miniature's weights are not there or damaged; the message says how to get them."""


def load_vae(folder: Path = FOLDER) -> Any:
    """The autoencoder (diffusers), float32."""
    vae = networks.autoencoder()
    vae.register_to_config(scaling_factor=json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"])
    return _filled(vae, "vae", folder)


def load_text_encoder(folder: Path = FOLDER) -> Any:
    """The text encoder with its projection (transformers), float32."""
    return _filled(networks.text_encoder(*_special(folder)), "text_encoder", folder)


def load_image_encoder(folder: Path = FOLDER) -> Any:
    """The image tower with its projection (transformers), float32."""
    return _filled(networks.image_encoder(), "image_encoder", folder)


def load_unet(folder: Path = FOLDER) -> Any:
    """The denoiser (diffusers), float32."""
    return _filled(networks.unet(), "unet", folder)


def keep(part: str, state: dict[str, Tensor], config: dict[str, Any] | None, folder: Path = FOLDER) -> None:
    """Write a part in half precision."""
    halves = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    write_atomically(folder / part / FILES[part], halves, {"format": "pt"}, overwrite=True)
    if config is not None:
        (folder / part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "image_encoder": "model.safetensors",
    "judge": "model.safetensors",
}


def read(part: str, folder: Path = FOLDER) -> dict[str, Tensor]:
    """A part's tensors as they are kept. Raises WeightsError where they are missing or damaged."""
    path = folder / part / FILES[part]
    again = (
        "Get it again with 'git checkout -- miniature/weights' in the folder of the pack, or train it anew: "
        "see miniature/README.md"
    )
    try:
        return load_file(path)
    except FileNotFoundError:
        raise WeightsError(f"the miniature's {part} is missing: {path} does not exist. {again}") from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"the miniature's {part} in {path} is damaged ({error}). {again}") from error


def _filled(network: nn.Module, part: str, folder: Path) -> nn.Module:
    state = {name: value.float() if value.is_floating_point() else value for name, value in read(part, folder).items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(f"the miniature's {part} does not fit its network: {error}") from error
    return network.eval().requires_grad_(False)


def _special(folder: Path) -> tuple[int, int, int]:
    tokens = json.loads((folder / "tokenizer" / "vocab.json").read_text())
    return len(tokens), tokens[tokenizer.START], tokens[tokenizer.END]
