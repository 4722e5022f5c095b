"""From checkpoints to the weights that ship: averaged, in half precision, in the folder layout of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .. import networks
from .. import tokenizer as tokens
from ..data import pool, to_network
from ..weights import FOLDER, keep


def export(cache: Path, part: str, folder: Path = FOLDER) -> None:
    """Write the weights of one part: "vae", "text" (with the image tower), "unet" or "judges".

    Raises FileNotFoundError where that part has no checkpoint.
    """
    if part == "vae":
        state = averaged(cache, "vae", "vae")
        vae = networks.autoencoder()
        vae.load_state_dict(state)
        vae.register_to_config(scaling_factor=_scaling_factor(vae.eval(), cache))
        keep("vae", state, _config(vae), folder)
    elif part == "text":
        state = averaged(cache, "text", "clip")
        tokenizer = tokens.load(folder / "tokenizer")
        special = (len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
        for name, network in (
            ("text_encoder", networks.text_encoder(*special)),
            ("image_encoder", networks.image_encoder()),
        ):
            own = {key: state[key] for key in network.state_dict() if key in state}
            network.load_state_dict(own, strict=not any("position_ids" in key for key in network.state_dict()))
            keep(name, own, _plain(network.config.to_dict()), folder)
    elif part == "unet":
        state = averaged(cache, "unet", "unet")
        unet = networks.unet()
        unet.load_state_dict(state)
        keep("unet", state, _config(unet), folder)
        _write_pipeline(folder)
    else:
        keep("judge", averaged(cache, "judges", "judge"), None, folder)


def averaged(cache: Path, run: str, network: str) -> dict[str, Tensor]:
    """The moving average of a network's weights, from the run's checkpoint."""
    path, prefix = cache / run / "checkpoint.safetensors", f"average.{network}."
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: train that part first (python -m miniature.training)")
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        return {key.removeprefix(prefix): file.get_tensor(key) for key in names if key.startswith(prefix)}


def _scaling_factor(vae: Any, cache: Path) -> float:
    """What brings latents to unit variance, as the noise schedule expects them."""
    pictures = to_network(pool(cache, "train", 1000))
    with torch.no_grad():
        means = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(100)])
    return round(1 / float(means.std()), 5)


def _config(network: Any) -> dict[str, Any]:
    return _plain(json.loads(network.to_json_string()))


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "transformers_version")}


def _write_pipeline(folder: Path) -> None:
    """The two small files by which diffusers finds the parts and the noise schedule."""
    scheduler = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": networks.TRAINING_TIMESTEPS,
        "beta_start": networks.BETA_START,
        "beta_end": networks.BETA_END,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
    }
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for path, content in (("scheduler/scheduler_config.json", scheduler), ("model_index.json", index)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content, indent=2) + "\n")
