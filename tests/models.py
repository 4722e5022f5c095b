"""Test models with random weights: small, seeded, and accepted by the host's own loaders.

The `reduced_*` functions write files. They name every key and shape themselves, so they need torch and safetensors
only, and the same file comes out wherever they run. `miniature_parts` builds a far smaller MODEL, CLIP and VAE in
memory through the classes of a ComfyUI that is already running in this process.

Weights are drawn with a variance of 1 / fan-in, so that activations keep their scale, everything stays finite in half
precision, and no layer is a no-op: a changed key or value always reaches the output.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

CHANNELS, CONTEXT_DIM = 320, 768  # what the host's detection asks of an SD1.x UNet; everything else may shrink
VOCABULARY, TOKENS = 49408, 77
EMBEDDING_VECTORS = 2
SD2_CONTEXT_DIM, SDXL_CONTEXT_DIM, SDXL_VECTOR = 1024, 2048, 2816
# Where the host reads off a SD2.x checkpoint what it predicts: velocity if these values spread by more than 0.09.
SD2_PREDICTION_KEY = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"

# Where the reduced and the miniature UNet have a spatial transformer, as (block, channels in / out).
CROSS_ATTENTION_BLOCKS = (
    "input_blocks.1.1",
    "input_blocks.3.1",
    "middle_block.1",
    "output_blocks.0.1",
    "output_blocks.1.1",
    "output_blocks.2.1",
    "output_blocks.3.1",
)
# The attn2 blocks IPAdapter packs patch in SD1.x: 6 input, 9 output, 1 middle, numbered by odd keys.
IPADAPTER_LAYERS = 16


class Weights:
    """A state dict in the making: each method draws the tensors of one layer under a key."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float16):
        self.tensors: dict[str, Tensor] = {}
        self.dtype = dtype
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, key: str, *shape: int, std: float, mean: float = 0.0) -> None:
        values = torch.empty(shape, dtype=torch.float32).normal_(mean, std, generator=self._generator)
        self.tensors[key] = values.to(self.dtype)

    def linear(self, key: str, inputs: int, outputs: int, *, bias: bool = True, gain: float = 1.0) -> None:
        self.draw(f"{key}.weight", outputs, inputs, std=gain / math.sqrt(inputs))
        if bias:
            self.draw(f"{key}.bias", outputs, std=0.02)

    def conv(self, key: str, inputs: int, outputs: int, size: int = 3, *, bias: bool = True, gain: float = 1.0) -> None:
        self.draw(f"{key}.weight", outputs, inputs, size, size, std=gain / math.sqrt(inputs * size * size))
        if bias:
            self.draw(f"{key}.bias", outputs, std=0.02)

    def norm(self, key: str, channels: int) -> None:
        self.draw(f"{key}.weight", channels, std=0.02, mean=1.0)
        self.draw(f"{key}.bias", channels, std=0.02)

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")  # a run that is cut short leaves no half file under the final name
        save_file(self.tensors, partial, metadata={"format": "pt", **(metadata or {})})
        partial.replace(path)
        return path


# --- state dicts by construction -------------------------------------------------------------------------------------


def _residual_block(w: Weights, key: str, inputs: int, outputs: int, time_dim: int) -> None:
    w.norm(f"{key}.in_layers.0", inputs)
    w.conv(f"{key}.in_layers.2", inputs, outputs)
    w.linear(f"{key}.emb_layers.1", time_dim, outputs)
    w.norm(f"{key}.out_layers.0", outputs)
    w.conv(f"{key}.out_layers.3", outputs, outputs)
    if inputs != outputs:
        w.conv(f"{key}.skip_connection", inputs, outputs, 1)


def _attention(w: Weights, key: str, channels: int, context_dim: int) -> None:
    w.linear(f"{key}.to_q", channels, channels, bias=False)
    w.linear(f"{key}.to_k", context_dim, channels, bias=False)
    w.linear(f"{key}.to_v", context_dim, channels, bias=False)
    w.linear(f"{key}.to_out.0", channels, channels)


def _spatial_transformer(w: Weights, key: str, channels: int, context_dim: int) -> None:
    w.norm(f"{key}.norm", channels)
    w.conv(f"{key}.proj_in", channels, channels, 1)
    _transformer_block(w, f"{key}.transformer_blocks.0", channels, context_dim)
    w.conv(f"{key}.proj_out", channels, channels, 1)


def _transformer_block(w: Weights, block: str, channels: int, context_dim: int) -> None:
    _attention(w, f"{block}.attn1", channels, channels)
    _attention(w, f"{block}.attn2", channels, context_dim)
    for norm in ("norm1", "norm2", "norm3"):
        w.norm(f"{block}.{norm}", channels)
    w.linear(f"{block}.ff.net.0.proj", channels, channels * 8)
    w.linear(f"{block}.ff.net.2", channels * 4, channels)


def _unet_encoder(w: Weights, prefix: str, channels: int, context_dim: int) -> None:
    """Time embedding, down path and middle: what a UNet and its ControlNet have in common."""
    time_dim = channels * 4
    w.linear(f"{prefix}time_embed.0", channels, time_dim)
    w.linear(f"{prefix}time_embed.2", time_dim, time_dim)
    w.conv(f"{prefix}input_blocks.0.0", 4, channels)
    for block in ("input_blocks.1", "input_blocks.3"):
        _residual_block(w, f"{prefix}{block}.0", channels, channels, time_dim)
        _spatial_transformer(w, f"{prefix}{block}.1", channels, context_dim)
    w.conv(f"{prefix}input_blocks.2.0.op", channels, channels)
    _residual_block(w, f"{prefix}middle_block.0", channels, channels, time_dim)
    _spatial_transformer(w, f"{prefix}middle_block.1", channels, context_dim)
    _residual_block(w, f"{prefix}middle_block.2", channels, channels, time_dim)


def unet(w: Weights, prefix: str = "", channels: int = CHANNELS, context_dim: int = CONTEXT_DIM) -> None:
    """A UNet of two levels (channel_mult [1, 1], one residual block each) with seven cross-attentions."""
    _unet_encoder(w, prefix, channels, context_dim)
    for index in range(4):
        _residual_block(w, f"{prefix}output_blocks.{index}.0", channels * 2, channels, channels * 4)
        _spatial_transformer(w, f"{prefix}output_blocks.{index}.1", channels, context_dim)
    w.conv(f"{prefix}output_blocks.1.2.conv", channels, channels)
    w.norm(f"{prefix}out.0", channels)
    w.conv(f"{prefix}out.2", channels, 4)


class UNetShape(NamedTuple):
    """A UNet as SD2.x and SDXL have it, with linear projections around its transformers, every level 320 channels wide.

    ``blocks``: residual blocks of each level; ``inputs``, ``middle``, ``outputs``: transformer blocks behind each
    residual block of that part, 0 for none; ``vector``: width of what comes in beside the time, 0 for nothing.
    """

    context_dim: int
    blocks: tuple[int, ...]
    inputs: tuple[int, ...]
    middle: int
    outputs: tuple[int, ...]
    vector: int = 0


# Detection looks at twelve output blocks, and there at a transformer behind the last one.
SD2_UNET = UNetShape(SD2_CONTEXT_DIM, (2, 2, 2, 2), (1, 0, 0, 1, 0, 0, 0, 0), 1, (0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1))
# Detection asks for these very blocks in the first half; the others are free.
SDXL_UNET = UNetShape(SDXL_CONTEXT_DIM, (2, 2, 2), (0, 0, 2, 2, 10, 10), 1, (1, 0, 0, 1, 0, 0, 0, 0, 0), SDXL_VECTOR)


def unet_of(w: Weights, prefix: str, shape: UNetShape) -> None:
    """The weights of a UNet of this shape."""
    channels, time_dim = CHANNELS, CHANNELS * 4

    def transformer(key: str, depth: int) -> None:
        if depth:
            w.norm(f"{key}.norm", channels)
            w.linear(f"{key}.proj_in", channels, channels)
            for index in range(depth):
                _transformer_block(w, f"{key}.transformer_blocks.{index}", channels, shape.context_dim)
            w.linear(f"{key}.proj_out", channels, channels)

    w.linear(f"{prefix}time_embed.0", channels, time_dim)
    w.linear(f"{prefix}time_embed.2", time_dim, time_dim)
    if shape.vector:
        w.linear(f"{prefix}label_emb.0.0", shape.vector, time_dim)
        w.linear(f"{prefix}label_emb.0.2", time_dim, time_dim)
    w.conv(f"{prefix}input_blocks.0.0", 4, channels)
    number, depths = 1, list(shape.inputs)
    for level, count in enumerate(shape.blocks):
        if level:
            w.conv(f"{prefix}input_blocks.{number}.0.op", channels, channels)
            number += 1
        for _ in range(count):
            _residual_block(w, f"{prefix}input_blocks.{number}.0", channels, channels, time_dim)
            transformer(f"{prefix}input_blocks.{number}.1", depths.pop(0))
            number += 1
    _residual_block(w, f"{prefix}middle_block.0", channels, channels, time_dim)
    transformer(f"{prefix}middle_block.1", shape.middle)
    _residual_block(w, f"{prefix}middle_block.2", channels, channels, time_dim)
    number, depths = 0, list(shape.outputs)
    for level, count in reversed(list(enumerate(shape.blocks))):
        for block in range(count + 1):
            depth = depths.pop(0)
            _residual_block(w, f"{prefix}output_blocks.{number}.0", channels * 2, channels, time_dim)
            transformer(f"{prefix}output_blocks.{number}.1", depth)
            if level and block == count:
                w.conv(f"{prefix}output_blocks.{number}.{2 if depth else 1}.conv", channels, channels)
            number += 1
    w.norm(f"{prefix}out.0", channels)
    w.conv(f"{prefix}out.2", channels, 4)


def text_encoder(
    w: Weights, prefix: str, width: int = CONTEXT_DIM, layers: int = 12, inner: int = 3072, std: float = 0.02
) -> None:
    """A CLIP text model. Small layer weights keep a token's own embedding dominant, as in a trained one."""
    w.draw(f"{prefix}embeddings.token_embedding.weight", VOCABULARY, width, std=std)
    w.draw(f"{prefix}embeddings.position_embedding.weight", TOKENS, width, std=0.01)
    for index in range(layers):
        layer = f"{prefix}encoder.layers.{index}"
        w.norm(f"{layer}.layer_norm1", width)
        w.norm(f"{layer}.layer_norm2", width)
        for projection in ("q_proj", "k_proj", "v_proj"):
            w.linear(f"{layer}.self_attn.{projection}", width, width)
        w.linear(f"{layer}.self_attn.out_proj", width, width, gain=0.01)
        w.linear(f"{layer}.mlp.fc1", width, inner)
        w.linear(f"{layer}.mlp.fc2", inner, width, gain=0.01)
    w.norm(f"{prefix}final_layer_norm", width)


def open_clip_text_encoder(w: Weights, prefix: str, width: int, layers: int, inner: int, std: float = 0.02) -> None:
    """The same as OpenCLIP names it, in whose form the checkpoints of SD2.x and SDXL hold theirs."""
    w.draw(f"{prefix}token_embedding.weight", VOCABULARY, width, std=std)
    w.draw(f"{prefix}positional_embedding", TOKENS, width, std=std / 2)
    for index in range(layers):
        layer = f"{prefix}transformer.resblocks.{index}"
        w.norm(f"{layer}.ln_1", width)
        w.norm(f"{layer}.ln_2", width)
        w.draw(f"{layer}.attn.in_proj_weight", 3 * width, width, std=width**-0.5)
        w.draw(f"{layer}.attn.in_proj_bias", 3 * width, std=0.02)
        w.linear(f"{layer}.attn.out_proj", width, width, gain=0.5 * std)
        w.linear(f"{layer}.mlp.c_fc", width, inner)
        w.linear(f"{layer}.mlp.c_proj", inner, width, gain=0.5 * std)
    w.norm(f"{prefix}ln_final", width)
    w.draw(f"{prefix}text_projection", width, width, std=width**-0.5)


def tiny_autoencoder(w: Weights, prefix: str = "") -> None:
    """A TAESD: the smallest autoencoder the host knows, 2.4 M parameters."""

    def block(key: str) -> None:
        w.conv(f"{key}.conv.0", 64, 64)
        w.conv(f"{key}.conv.2", 64, 64)
        w.conv(f"{key}.conv.4", 64, 64, gain=0.5)

    encoder, decoder = f"{prefix}taesd_encoder", f"{prefix}taesd_decoder"
    w.conv(f"{encoder}.0", 3, 64, gain=2.0)
    for index in (2, 6, 10):
        w.conv(f"{encoder}.{index}", 64, 64, bias=False)
    for index in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13):
        block(f"{encoder}.{index}")
    w.conv(f"{encoder}.14", 64, 4, gain=3.5)  # latents of about unit variance

    w.conv(f"{decoder}.1", 4, 64)
    for index in (7, 12, 17):
        w.conv(f"{decoder}.{index}", 64, 64, bias=False)
    for index in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18):
        block(f"{decoder}.{index}")
    w.conv(f"{decoder}.19", 64, 3, bias=False, gain=0.2)
    w.draw(f"{decoder}.19.bias", 3, std=0.02, mean=0.5)  # around mid-gray, so that little is clipped
    w.tensors[f"{prefix}vae_scale"] = torch.tensor(0.18215)
    w.tensors[f"{prefix}vae_shift"] = torch.tensor(0.0)


# --- files -----------------------------------------------------------------------------------------------------------


def reduced_sd15(path: Path, seed: int = 15) -> Path:
    """A checkpoint that loads as SD1.x: a two-level UNet, the whole CLIP-L, a TAESD. Half precision."""
    w = Weights(seed)
    unet(w, "model.diffusion_model.")
    text_encoder(w, "cond_stage_model.transformer.text_model.")
    tiny_autoencoder(w, "first_stage_model.")
    return w.save(path)


REDUCED_LAYERS, REDUCED_INNER = 3, 256  # of text encoders; the last two layers of three are told apart


def reduced_sd2(path: Path, seed: int = 21) -> Path:
    """A checkpoint that loads as SD2.x of v-prediction, where ``load_reduced`` loads it. Half precision, 300 MB."""
    w = Weights(seed)
    unet_of(w, "model.diffusion_model.", SD2_UNET)
    w.draw(SD2_PREDICTION_KEY, CHANNELS, std=0.2)
    open_clip_text_encoder(w, "cond_stage_model.model.", SD2_CONTEXT_DIM, REDUCED_LAYERS, REDUCED_INNER)
    tiny_autoencoder(w, "first_stage_model.")
    return w.save(path)


def reduced_sdxl(path: Path, seed: int = 22) -> Path:
    """A checkpoint that loads as SDXL, where ``load_reduced`` loads it. Half precision, 560 MB.

    SDXL takes hidden states before the last norm: embeddings are drawn at the size that these have in a trained one.
    """
    w = Weights(seed)
    unet_of(w, "model.diffusion_model.", SDXL_UNET)
    embedders = "conditioner.embedders"
    text_encoder(w, f"{embedders}.0.transformer.text_model.", CONTEXT_DIM, REDUCED_LAYERS, REDUCED_INNER, std=0.5)
    open_clip_text_encoder(w, f"{embedders}.1.model.", 1280, REDUCED_LAYERS, REDUCED_INNER, std=0.5)
    tiny_autoencoder(w, "first_stage_model.")
    return w.save(path)


def reduced_lora(path: Path, seed: int = 16, rank: int = 4, strength: float = 0.5) -> Path:
    """A LoRA on every attn2.to_k and attn2.to_v of the reduced UNet, some other layers, and the text encoder."""
    w = Weights(seed)

    def pair(key: str, inputs: int, outputs: int) -> None:
        w.draw(f"{key}.lora_down.weight", rank, inputs, std=1 / math.sqrt(inputs))
        w.draw(f"{key}.lora_up.weight", outputs, rank, std=strength / math.sqrt(rank))
        w.tensors[f"{key}.alpha"] = torch.tensor(float(rank))

    for block in CROSS_ATTENTION_BLOCKS:
        attention = f"lora_unet_{block.replace('.', '_')}_transformer_blocks_0_attn"
        pair(f"{attention}2_to_k", CONTEXT_DIM, CHANNELS)
        pair(f"{attention}2_to_v", CONTEXT_DIM, CHANNELS)
        pair(f"{attention}1_to_q", CHANNELS, CHANNELS)
    pair("lora_te_text_model_encoder_layers_0_self_attn_v_proj", CONTEXT_DIM, CONTEXT_DIM)
    return w.save(path)


def reduced_controlnet(path: Path, seed: int = 17) -> Path:
    """A ControlNet of the reduced UNet; its `zero_convs` are not zero."""
    w = Weights(seed)
    _unet_encoder(w, "", CHANNELS, CONTEXT_DIM)
    widths = (3, 16, 16, 32, 32, 96, 96, 256, CHANNELS)
    for index, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        w.conv(f"input_hint_block.{index * 2}", inputs, outputs)
    for index in range(4):
        w.conv(f"zero_convs.{index}.0", CHANNELS, CHANNELS, 1)
    w.conv("middle_block_out.0", CHANNELS, CHANNELS, 1)
    return w.save(path)


def reduced_ipadapter(path: Path, seed: int = 18) -> Path:
    """An IPAdapter (plain image projection, 4 tokens) whose every layer fits the reduced UNet."""
    w = Weights(seed)
    w.linear("image_proj.proj", 768, 4 * CONTEXT_DIM)
    w.norm("image_proj.norm", CONTEXT_DIM)
    for index in range(IPADAPTER_LAYERS):
        w.linear(f"ip_adapter.{2 * index + 1}.to_k_ip", CONTEXT_DIM, CHANNELS, bias=False)
        w.linear(f"ip_adapter.{2 * index + 1}.to_v_ip", CONTEXT_DIM, CHANNELS, bias=False)
    return w.save(path)


def reduced_clip_vision(path: Path, seed: int = 19) -> Path:
    """A CLIP vision model. Loaders know ViT-L and larger only, so all but its first layer is zero: holes in the file.

    A zero layer passes its input on. Of the 600 MB a file system with sparse files stores 30.
    """
    width, inner, layers = 1024, 4096, 24
    w = Weights(seed)
    w.draw("vision_model.embeddings.class_embedding", width, std=0.5)
    w.conv("vision_model.embeddings.patch_embedding", 3, width, 14, bias=False)
    w.draw("vision_model.embeddings.position_embedding.weight", 257, width, std=0.5)
    w.norm("vision_model.pre_layrnorm", width)
    w.norm("vision_model.post_layernorm", width)
    w.linear("visual_projection", width, 768, bias=False)
    first = "vision_model.encoder.layers.0."
    for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
        w.linear(f"{first}self_attn.{projection}", width, width)
    w.linear(f"{first}mlp.fc1", width, inner)
    w.linear(f"{first}mlp.fc2", inner, width)
    w.norm(f"{first}layer_norm1", width)
    w.norm(f"{first}layer_norm2", width)
    holes = {
        key.replace(first, f"vision_model.encoder.layers.{index}."): tuple(tensor.shape)
        for key, tensor in w.tensors.items()
        if key.startswith(first)
        for index in range(1, layers)
    }
    return _save_with_holes(path, w.tensors, holes)


def _save_with_holes(path: Path, tensors: dict[str, Tensor], holes: dict[str, tuple[int, ...]]) -> Path:
    """Writes half-precision `tensors`, then zeros for the shapes in `holes` without storing them."""
    header: dict[str, Any] = {}
    position = 0
    for key, shape in [*((key, tuple(tensor.shape)) for key, tensor in tensors.items()), *holes.items()]:
        start, position = position, position + 2 * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, position]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.numpy().tobytes())
        file.truncate(8 + len(text) + position)
    partial.replace(path)
    return path


def textual_inversion(path: Path, seed: int = 20) -> Path:
    """A textual inversion of two vectors: `embedding:<file name without its suffix>` in a prompt."""
    w = Weights(seed)
    w.draw("emb_params", EMBEDDING_VECTORS, CONTEXT_DIM, std=0.02)
    return w.save(path)


class ModelFile(NamedTuple):
    """Where a test model lies below a host's `models` folder, and what writes it."""

    folder: str
    name: str
    write: Callable[[Path], Path]


MODEL_FILES = {
    "checkpoint": ModelFile("checkpoints", "reduced_sd15.safetensors", reduced_sd15),
    "sd2": ModelFile("checkpoints", "reduced_sd2.safetensors", reduced_sd2),
    "sdxl": ModelFile("checkpoints", "reduced_sdxl.safetensors", reduced_sdxl),
    "lora": ModelFile("loras", "reduced_lora.safetensors", reduced_lora),
    "controlnet": ModelFile("controlnet", "reduced_controlnet.safetensors", reduced_controlnet),
    "ipadapter": ModelFile("ipadapter", "reduced_ipadapter.safetensors", reduced_ipadapter),
    "clip_vision": ModelFile("clip_vision", "reduced_clip_vision.safetensors", reduced_clip_vision),
    "embedding": ModelFile("embeddings", "reduced_embedding.safetensors", textual_inversion),
}


# --- in memory, through the host's classes ---------------------------------------------------------------------------

MINIATURE_CHANNELS, MINIATURE_CONTEXT_DIM, MINIATURE_LAYERS, MINIATURE_HEADS = 32, 64, 2, 2


@dataclass(frozen=True)
class Parts:
    """What CheckpointLoaderSimple returns."""

    model: Any
    clip: Any
    vae: Any


def load_reduced(path: Path, *, predicts_noise: bool = False) -> Parts:
    """A checkpoint of reduced text encoders, by the host's own loader, which is told how many layers these have.

    ``predicts_noise`` makes the SD2.x of v-prediction one that predicts noise. Needs a ComfyUI running in this process.
    """
    import comfy.sd
    import comfy.utils

    layers = {"num_hidden_layers": REDUCED_LAYERS, "intermediate_size": REDUCED_INNER}
    options = {f"clip_{name}_model_config": layers for name in "lhg"}
    if not predicts_noise:
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(path), te_model_options=options)
        return Parts(model, clip, vae)
    tensors: Any = comfy.utils.load_torch_file(str(path))
    tensors[SD2_PREDICTION_KEY] = tensors[SD2_PREDICTION_KEY] * 0.1
    loaded: Any = comfy.sd.load_state_dict_guess_config(tensors, te_model_options=options)
    return Parts(*loaded[:3])


@functools.cache
def _miniature_weights(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    model, clip, vae = (Weights(seed + index, torch.float32) for index in range(3))
    unet(model, channels=MINIATURE_CHANNELS, context_dim=MINIATURE_CONTEXT_DIM)
    width = MINIATURE_CONTEXT_DIM
    text_encoder(clip, "clip_l.transformer.text_model.", width, MINIATURE_LAYERS, width * 4)
    clip.linear("clip_l.transformer.text_projection", width, width, bias=False)
    clip.tensors["clip_l.logit_scale"] = torch.tensor(4.6)
    tiny_autoencoder(vae)
    return model.tensors, clip.tensors, vae.tensors


def miniature_parts(seed: int = 1) -> Parts:
    """MODEL, CLIP (64-d, two layers, full vocabulary) and VAE in memory, float32, fresh objects at every call.

    Needs a ComfyUI running in this process (fixture `comfy_host`). Equal seeds give equal weights.
    """
    import comfy.latent_formats
    import comfy.model_management
    import comfy.model_patcher
    import comfy.sd
    import comfy.sd1_clip
    import comfy.supported_models
    import comfy.supported_models_base

    model_weights, clip_weights, vae_weights = _miniature_weights(seed)

    config = comfy.supported_models.SD15(
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": MINIATURE_CHANNELS,
            "channel_mult": [1, 1],
            "num_res_blocks": [1, 1],
            "transformer_depth": [1, 1],
            "transformer_depth_output": [1, 1, 1, 1],
            "transformer_depth_middle": 1,
            "context_dim": MINIATURE_CONTEXT_DIM,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": False,
            "use_temporal_attention": False,
            "use_temporal_resblock": False,
            "adm_in_channels": None,
            "legacy": False,
            "use_checkpoint": False,
        }
    )
    config.unet_config["num_heads"] = MINIATURE_HEADS
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, "")
    base.diffusion_model.load_state_dict(model_weights)
    base.eval()
    # The patcher class a loader would take: dynamic where the host has made that its default.
    patcher_class = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    model = patcher_class(
        base,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )

    width = MINIATURE_CONTEXT_DIM
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
        tokenizer_data={"clip_l_tokenizer_class": functools.partial(comfy.sd1_clip.SDTokenizer, embedding_size=width)},
        model_options={
            "clip_l_model_config": {
                "hidden_size": width,
                "intermediate_size": width * 4,
                "num_attention_heads": MINIATURE_HEADS,
                "num_hidden_layers": MINIATURE_LAYERS,
            },
            "dtype": torch.float32,
        },
    )
    clip.cond_stage_model.load_state_dict(clip_weights)
    vae = comfy.sd.VAE(sd={key: value.clone() for key, value in vae_weights.items()})
    return Parts(model, clip, vae)
