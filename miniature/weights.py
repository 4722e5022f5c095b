"""Where the miniature's weights lie, and how its parts are loaded and kept: the folder layout of diffusers.

Reading needs safetensors alone: only the functions that build networks import diffusers and transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .tokenizer import END, START

FOLDER = Path(__file__).parent / "weights"
PARTS = ("unet", "vae", "text_encoder", "image_encoder", "judge")
FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "image_encoder": "model.safetensors",
    "judge": "model.safetensors",
}
_AGAIN = (
    "Get it again: 'git checkout -- miniature/weights' in the folder of the pack, or install the pack anew. "
    "miniature/README.md says how to train it"
)


class WeightsError(OSError):
    """The miniature's weights are not there or damaged; the message says how to get them."""


class SpecialTokens(NamedTuple):
    """Of a tokenizer: how many tokens it knows, and the ids of those that begin and end a text. ``end`` pads too."""

    vocabulary: int
    start: int
    end: int


def load_vae(folder: Path = FOLDER) -> Any:
    """The autoencoder (diffusers), float32."""
    from . import networks

    vae = networks.autoencoder()
    vae.register_to_config(scaling_factor=config("vae", folder)["scaling_factor"])
    return _filled(vae, "vae", folder)


def load_text_encoder(folder: Path = FOLDER) -> Any:
    """The text encoder with its projection (transformers), float32."""
    from . import networks

    return _filled(networks.text_encoder(*special_tokens(folder)), "text_encoder", folder)


def load_image_encoder(folder: Path = FOLDER) -> Any:
    """The image tower with its projection (transformers), float32."""
    from . import networks

    return _filled(networks.image_encoder(), "image_encoder", folder)


def load_unet(folder: Path = FOLDER) -> Any:
    """The denoiser (diffusers), float32."""
    from . import networks

    return _filled(networks.unet(), "unet", folder)


def load_judge(folder: Path = FOLDER) -> Any:
    """The judge of ``miniature.judge``, float32."""
    from .judge import Judge

    return _filled(Judge(), "judge", folder)


def keep(part: str, state: dict[str, Tensor], config: dict[str, Any] | None, folder: Path = FOLDER) -> None:
    """Write a part in half precision."""
    from perfusion.files import write_atomically

    halves = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    write_atomically(folder / part / FILES[part], halves, {"format": "pt"}, overwrite=True)
    if config is not None:
        (folder / part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read(part: str, folder: Path = FOLDER) -> dict[str, Tensor]:
    """A part's tensors as they are kept. Raises WeightsError where they are missing or damaged."""
    path = folder / part / FILES[part]
    try:
        return load_file(path)
    except FileNotFoundError:
        raise missing(path, part) from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"the miniature's {part} in {path} is damaged ({error}). {_AGAIN}") from error


def config(part: str, folder: Path = FOLDER) -> dict[str, Any]:
    """A part's settings, as its network's class writes them. Raises WeightsError where they are missing or damaged."""
    return _json(folder / part / "config.json", part)


def special_tokens(folder: Path = FOLDER) -> SpecialTokens:
    """What a text encoder has to know of the tokenizer. Raises WeightsError where it is missing or damaged."""
    path = folder / "tokenizer" / "vocab.json"
    tokens = _json(path, "tokenizer")
    try:
        return SpecialTokens(len(tokens), tokens[START], tokens[END])
    except KeyError as error:
        raise WeightsError(f"the miniature's tokenizer in {path} is damaged: it lacks {error}. {_AGAIN}") from None


def missing(path: Path, part: str) -> WeightsError:
    """The error for a file that is not there."""
    return WeightsError(f"the miniature's {part} is missing: {path} does not exist. {_AGAIN}")


def misfit(part: str, why: object) -> WeightsError:
    """The error for weights that are not those of the network."""
    return WeightsError(f"the miniature's {part} does not fit its network: {why}. {_AGAIN}")


def _json(path: Path, part: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise missing(path, part) from None
    except (ValueError, OSError) as error:
        raise WeightsError(f"the miniature's {part} in {path} is damaged ({error}). {_AGAIN}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"the miniature's {part} in {path} is damaged: it holds no settings. {_AGAIN}")
    return content


def _filled(network: nn.Module, part: str, folder: Path) -> nn.Module:
    state = {name: value.float() if value.is_floating_point() else value for name, value in read(part, folder).items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise misfit(part, error) from error
    return network.eval().requires_grad_(False)
