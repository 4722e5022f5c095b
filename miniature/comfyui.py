"""The miniature inside ComfyUI, in ComfyUI's own classes: a UNet, CLIP and VAE of Stable Diffusion 1.x, only smaller.

Everything computes in 32 bit, on every device: networks of this size gain nothing from less, and so a seed makes the
same picture here and in diffusers. Models are built anew at each call; two calls share nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import comfy.clip_model
import comfy.clip_vision
import comfy.diffusers_convert
import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import numpy as np
import torch
from torch import Tensor, nn

from ..perfusion.hosts.comfyui.text import bring_captions
from . import weights, world
from .captions import corpus
from .weights import FOLDER

_VAE_LEVELS = 4  # ComfyUI counts the decoder's levels from this down
# Bytes for each pixel and byte of a number, as ComfyUI reckons for Stable Diffusion's VAE of 128 channels.
_ENCODING, _DECODING = 1767, 2178
_PARTS = ("unet", "vae", "text_encoder", "image_encoder")
# What a model is made from; validated before anything runs, and watched for changes.
_FILES = tuple(
    Path(*names)
    for names in (
        *((part, weights.FILES[part]) for part in _PARTS),
        *((part, "config.json") for part in _PARTS),
        *(("tokenizer", name) for name in ("vocab.json", "merges.txt", "tokenizer_config.json")),
    )
)


def load(folder: Path = FOLDER, embeddings: Sequence[str] | None = None) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE, as a checkpoint loader returns them. ``embeddings``: folders of textual inversions.

    Raises WeightsError where the weights are missing or damaged.
    """
    return load_model(folder), load_clip(folder, embeddings), load_vae(folder)


def require_files(folder: Path = FOLDER) -> None:
    """Raise WeightsError for a file that is not there."""
    for name in _FILES:
        if not (folder / name).is_file():
            raise weights.missing(folder / name, name.parts[0])


def stamp(folder: Path = FOLDER) -> str:
    """Changes when the weights do; for the host's cache."""
    found = [folder / name for name in _FILES if (folder / name).is_file()]
    return "|".join(f"{path.parent.name}/{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in found)


def load_model(folder: Path = FOLDER, disable_dynamic: bool = False) -> Any:
    """MODEL. ``disable_dynamic``: with weights that lie still, where the host would stream them."""
    config: Any = _ModelConfig(_unet_config(weights.config("unet", folder)))
    config.latent_format = _LatentFormat(weights.config("vae", folder))
    config.set_inference_dtype(torch.float32, None)
    offload_device = comfy.model_management.unet_offload_device()
    model = config.get_model({}, "").to(offload_device)
    patcher = _patcher_class(disable_dynamic)(
        model, load_device=comfy.model_management.get_torch_device(), offload_device=offload_device
    )
    _regroup(model.diffusion_model, weights.config("unet", folder))
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    state = {names.get(name, name): value for name, value in weights.read("unet", folder).items()}
    _fill(model.diffusion_model, state, "unet", patcher)
    patcher.cached_patcher_init = (load_model, (folder,))
    return patcher


def load_clip(folder: Path = FOLDER, embeddings: Sequence[str] | None = None, disable_dynamic: bool = False) -> Any:
    """CLIP, which brings captions in its own words for Train Concept."""
    settings, special = weights.config("text_encoder", folder), weights.special_tokens(folder)
    tokenizer = partial(
        comfy.sd1_clip.SDTokenizer,
        tokenizer_path=str(folder / "tokenizer"),
        max_length=settings["max_position_embeddings"],
        embedding_size=settings["hidden_size"],
    )
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
        embedding_directory=embeddings,
        tokenizer_data={"clip_l_tokenizer_class": tokenizer},
        model_options={
            "clip_l_class": partial(_TextEncoder, settings=settings, special=special),
            "dtype": torch.float32,
        },
        **({"disable_dynamic": True} if disable_dynamic else {}),  # which older hosts don't know
    )
    _fill(clip.cond_stage_model.clip_l.transformer, weights.read("text_encoder", folder), "text_encoder", clip.patcher)
    clip.patcher.cached_patcher_init = (_clip_patcher, (folder, embeddings))
    bring_captions(clip, corpus())
    return clip


def load_vae(folder: Path = FOLDER) -> Any:
    """VAE."""
    settings = weights.config("vae", folder)
    state = _of_original_names(weights.read("vae", folder), len(settings["block_out_channels"]))
    channels, latent_channels = settings["block_out_channels"], settings["latent_channels"]
    params = {
        "ddconfig": {
            "double_z": True,
            "z_channels": latent_channels,
            "resolution": settings["sample_size"],
            "in_channels": settings["in_channels"],
            "out_ch": settings["out_channels"],
            "ch": channels[0],
            "ch_mult": [width // channels[0] for width in channels],
            "num_res_blocks": settings["layers_per_block"],
            "attn_resolutions": [],
            "dropout": 0.0,
        },
        "embed_dim": latent_channels,
    }
    try:
        vae: Any = comfy.sd.VAE(sd=_full_precision(state), config={"params": params}, dtype=torch.float32)
    except RuntimeError as error:
        raise weights.misfit("vae", error) from error
    _require_keys(vae.first_stage_model, state, "vae")
    _regroup(vae.first_stage_model, settings)
    scale = latent_scale(settings)
    vae.downscale_ratio = vae.upscale_ratio = scale
    vae.latent_channels = latent_channels
    # As a network of so many channels would need if it were Stable Diffusion's: more than this one does.
    vae.memory_used_encode = lambda shape, dtype: _ENCODING * shape[2] * shape[3] * _size(dtype)
    vae.memory_used_decode = lambda shape, dtype: _DECODING * shape[2] * shape[3] * scale**2 * _size(dtype)
    vae.patcher.cached_patcher_init = (_vae_patcher, (folder,))
    return vae


def load_clip_vision(folder: Path = FOLDER) -> Any:
    """CLIP_VISION: the image tower that was trained together with the text encoder."""
    settings = weights.config("image_encoder", folder) | {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    with TemporaryDirectory() as temporary:
        path = Path(temporary, "config.json")  # older hosts read settings from a file only
        path.write_text(json.dumps(settings), encoding="utf-8")
        vision = comfy.clip_vision.ClipVisionModel(str(path))
    _fill(vision.model, weights.read("image_encoder", folder), "image_encoder", vision.patcher)
    return vision


def empty_latent(width: int, height: int, batch_size: int = 1, folder: Path = FOLDER) -> dict[str, Any]:
    """LATENT to be drawn on: pictures of width x height pixels."""
    settings = weights.config("vae", folder)
    scale = latent_scale(settings)
    samples = torch.zeros(
        (batch_size, settings["latent_channels"], height // scale, width // scale),
        device=comfy.model_management.intermediate_device(),
    )
    # Hosts that know of other scales bring empty latents to that of the model.
    return {"samples": samples, "downscale_ratio_spacial": scale}


def photos(category: str, number: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """IMAGE (n, 64, 64, 3) of personal thing ``number`` of a category, and MASK (n, 64, 64), 1 on the thing."""
    scenes = world.portraits(category, number, count, seed)
    pictures, places = [world.render(scene) for scene in scenes], [world.masks(scene)[0] for scene in scenes]
    images, masks = (torch.from_numpy(np.stack(list(map(np.asarray, drawn)))) for drawn in (pictures, places))
    return images.float() / 255, masks.float() / 255


def latent_scale(vae: dict[str, Any]) -> int:
    """Pixels per latent pixel, along each side, by the VAE's settings."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


class _ModelConfig(comfy.supported_models.SD15):
    """Stable Diffusion 1.x, of any width."""

    unet_extra_config: dict[str, Any] = {}


class _LatentFormat(comfy.latent_formats.SD15):
    """Latents of another VAE: its own scale, and none of the shortcuts by which Stable Diffusion's are previewed."""

    def __init__(self, vae: dict[str, Any]):
        super().__init__(vae["scaling_factor"])
        self.latent_channels = vae["latent_channels"]
        self.spacial_downscale_ratio = latent_scale(vae)
        self.latent_rgb_factors = None
        self.taesd_decoder_name = None


class _TextModel(comfy.clip_model.CLIPTextModel):
    """ComfyUI's, with a table of fewer tokens."""

    def __init__(self, config_dict: dict[str, Any], dtype: Any, device: Any, operations: Any):
        super().__init__(config_dict, dtype, device, operations)
        self.text_model.embeddings = comfy.clip_model.CLIPEmbeddings(
            config_dict["hidden_size"],
            config_dict["vocab_size"],
            config_dict["max_position_embeddings"],
            dtype,
            device,
            operations,
        )


class _TextEncoder(comfy.sd1_clip.SDClipModel):
    """ComfyUI's, with the special tokens of the miniature's tokenizer."""

    def __init__(
        self,
        device: Any = "cpu",
        dtype: Any = None,
        model_options: dict[str, Any] | None = None,
        *,
        settings: dict[str, Any],
        special: weights.SpecialTokens,
    ):
        super().__init__(
            device=device,
            dtype=dtype,
            max_length=settings["max_position_embeddings"],
            textmodel_json_config={**settings, "vocab_size": special.vocabulary, "eos_token_id": special.end},
            model_class=_TextModel,
            special_tokens={"start": special.start, "end": special.end, "pad": special.end},
            return_projected_pooled=False,
            model_options=model_options or {},
        )


def _unet_config(settings: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's settings of a UNet, from those of diffusers."""
    channels, per_level = settings["block_out_channels"], settings["layers_per_block"]
    depths = [int(kind.startswith("CrossAttn")) for kind in settings["down_block_types"]]
    return {
        "image_size": settings["sample_size"],
        "in_channels": settings["in_channels"],
        "out_channels": settings["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [width // channels[0] for width in channels],
        "num_res_blocks": [per_level] * len(channels),
        "transformer_depth": [depth for depth in depths for _ in range(per_level)],
        "transformer_depth_output": [depth for depth in depths for _ in range(per_level + 1)],
        "transformer_depth_middle": 1,
        "context_dim": settings["cross_attention_dim"],
        "num_heads": settings["attention_head_dim"],  # diffusers' name for their number
        "num_head_channels": -1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": settings["use_linear_projection"],
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        "adm_in_channels": None,
        "legacy": False,
        "use_checkpoint": False,
    }


def _of_original_names(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """A VAE's tensors under the names of the original, from those of diffusers."""

    def lowered(match: re.Match[str]) -> str:
        return f"decoder.up.{int(match[1]) - (_VAE_LEVELS - levels)}."

    converted = comfy.diffusers_convert.convert_vae_state_dict(state)
    return {re.sub(r"^decoder\.up\.(\d+)\.", lowered, name): value for name, value in converted.items()}


def _regroup(network: nn.Module, settings: dict[str, Any]) -> None:
    """Norms over as many groups of channels as the network was trained with; ComfyUI's classes always make 32."""
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = settings["norm_num_groups"]


def _fill(network: nn.Module, state: dict[str, Tensor], part: str, patcher: Any) -> None:
    """Load weights, all of them. A network whose weights are streamed takes the tensors themselves."""
    _require_keys(network, state, part)
    assign = getattr(patcher, "is_dynamic", lambda: False)()
    try:
        network.load_state_dict(_full_precision(state), **({"assign": True} if assign else {}))
    except RuntimeError as error:
        raise weights.misfit(part, error) from error


def _require_keys(network: nn.Module, state: dict[str, Tensor], part: str) -> None:
    expected = set(network.state_dict())
    wrong = sorted(expected ^ set(state))
    if wrong:
        raise weights.misfit(part, f"{wrong[0]} is {'missing' if wrong[0] in expected else 'unknown'}")


def _full_precision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _patcher_class(disable_dynamic: bool) -> type:
    """The one that the host's own loaders take."""
    plain = comfy.model_patcher.ModelPatcher
    return plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)


def _clip_patcher(folder: Path, embeddings: Sequence[str] | None, disable_dynamic: bool = False) -> Any:
    """By which the host reads a CLIP once more."""
    return load_clip(folder, embeddings, disable_dynamic).patcher


def _vae_patcher(folder: Path, disable_dynamic: bool = False) -> Any:
    """By which the host reads a VAE once more; the host's own way to do so cannot disable streaming either."""
    return load_vae(folder).patcher


def _size(dtype: torch.dtype) -> int:
    return comfy.model_management.dtype_size(dtype)
