"""The miniature's parts, each of a standard class, untrained. Stable Diffusion 1.x's architecture at a smaller size."""

from __future__ import annotations

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

WIDTH = 128  # of a text encoding
TOKENS = 77
LATENT_SIZE = 16
_TOWER: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
TRAINING_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012  # scaled linear, as Stable Diffusion 1.x


def autoencoder() -> AutoencoderKL:
    """Pictures (b, 3, 64, 64) in -1..1 to latents (b, 4, 16, 16) and back."""
    sizes: Any = (32, 32, 64)  # declared as tuples of one in diffusers
    down: Any = ("DownEncoderBlock2D",) * len(sizes)
    up: Any = ("UpDecoderBlock2D",) * len(sizes)
    return AutoencoderKL(
        block_out_channels=sizes,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=1,
        latent_channels=4,
        # Not the usual 32: a norm over single channels takes away how bright and of what color a picture is.
        norm_num_groups=8,
        sample_size=64,
    )


def _text_config(vocabulary_size: int, start: int, end: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary_size,
        max_position_embeddings=TOKENS,
        hidden_act="quick_gelu",
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
        projection_dim=WIDTH,
        **_TOWER,
    )


def _vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(image_size=64, patch_size=8, hidden_act="quick_gelu", projection_dim=WIDTH, **_TOWER)


def contrastive(vocabulary_size: int, start: int, end: int) -> CLIPModel:
    """Text encoder and image tower, to be trained together; the text encoder then serves the UNet."""
    text, vision = _text_config(vocabulary_size, start, end), _vision_config()
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH))


def text_encoder(vocabulary_size: int, start: int, end: int) -> CLIPTextModelWithProjection:
    """The text side of ``contrastive``."""
    return CLIPTextModelWithProjection(_text_config(vocabulary_size, start, end))


def image_encoder() -> CLIPVisionModelWithProjection:
    """The image side of ``contrastive``: pictures (b, 3, 64, 64) in -1..1 to embeddings (b, 128)."""
    return CLIPVisionModelWithProjection(_vision_config())


def unet() -> UNet2DConditionModel:
    """The denoiser of latents (b, 4, 16, 16), with cross-attention at 16 x 16 and 8 x 8."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads
    )
