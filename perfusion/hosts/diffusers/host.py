"""A pipeline as the trainer sees it: made differentiable for a while, and put back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from hashlib import sha256
from types import SimpleNamespace
from typing import Any, Literal

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from ...edit import KeyValueEdit
from ...family import Family
from ...places import Places
from ..base import Encodings, Word
from ..frozen import frozen_layers, widened
from .attention import attention_maps
from .patching import EditedProjections
from .structure import UnsupportedPipelineError, cross_attentions, family_of
from .text import ClipText

_PROBES = ("a photo of a cat", "Two red chairs, by the sea; 1987!")
# Schedules that end in pure noise have no finite noise level there; this is where others put it.
_SMALLEST_SIGNAL = 4.8973451890853435e-08


class DiffusersHost:
    """A Stable Diffusion pipeline as a host (``perfusion.hosts.base.Host``).

    Anything with ``unet``, ``vae``, ``text_encoder``, ``tokenizer`` and ``scheduler`` will do; the scheduler is asked
    for its noise levels and prediction type alone. ``captions`` are for encoders of few words (``TextHost.captions``).
    Raises UnsupportedPipelineError when it is of another kind.
    """

    def __init__(self, pipeline: Any, captions: Sequence[str] | None = None):
        self.captions = captions
        self.family: Family = family_of(pipeline)
        self.unet, self.vae = pipeline.unet, pipeline.vae
        self.text_encoder, self.tokenizer = pipeline.text_encoder, pipeline.tokenizer
        self.text = ClipText(self.text_encoder, self.tokenizer)
        self._fingerprint = ""
        self._projections = EditedProjections(self.unet)
        self.prediction: Literal["eps", "v"] = _prediction(pipeline.scheduler)
        self._sigmas = _noise_levels(pipeline.scheduler)
        self._log_sigmas = self._sigmas.log()
        _require_plain_latents(self.unet, self.vae)

    @classmethod
    def of_parts(
        cls,
        *,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        captions: Sequence[str] | None = None,
    ) -> DiffusersHost:
        """A host from models that no pipeline holds together."""
        return cls(
            SimpleNamespace(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler),
            captions,
        )

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next(self.unet.parameters()).device

    @property
    def latent_scale(self) -> int:
        """Pixels per latent pixel, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def fingerprint(self) -> str:
        """Digest of what the encoder makes of two probe texts: weights, adapters, layer and norm all show in it."""
        if not self._fingerprint:
            with torch.no_grad():
                context = self.encode(_PROBES).context
            digits = (context.cpu() * 1000).round().to(torch.int32)
            self._fingerprint = sha256(digits.contiguous().numpy().tobytes()).hexdigest()
        return self._fingerprint

    def encode(self, prompts: Sequence[str], word: Word | None = None, *, until_word: bool = False) -> Encodings:
        """See ``TextHost.encode``."""
        return self.text.encode_word(prompts, word, until_word=until_word)

    def token_embeddings(self, text: str) -> dict[str, Tensor]:
        """See ``TextHost.token_embeddings``."""
        ids = torch.tensor(self.text.ids(text), dtype=torch.long)
        table = self.text.table.detach()
        return {self.text.name: table[ids.to(table.device)].float().cpu().clone()}

    def embedding_scale(self) -> dict[str, float]:
        """See ``TextHost.embedding_scale``."""
        return {self.text.name: float(self.text.table.detach().float().std())}

    def encode_images(self, images: Tensor) -> Tensor:
        """See ``Host.encode_images``. The mode of the VAE's distribution: the same photo gives the same latent."""
        with torch.no_grad():
            parameter = next(self.vae.parameters())
            pixels = (images.permute(0, 3, 1, 2) * 2 - 1).to(parameter.device, parameter.dtype)
            latent = self.vae.encode(pixels).latent_dist.mode()
        return latent.float().cpu() * self.vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (b, c, h, w), scaled as the network sees them -> pictures (b, height, width, 3) in 0..1, on the CPU.

        One at a time: the decoder needs far more memory than the network.
        """
        parameter = next(self.vae.parameters())
        latents = (latents / self.vae.config.scaling_factor).to(parameter.device, parameter.dtype)
        with torch.no_grad():
            pixels = torch.cat([self.vae.decode(latent, return_dict=False)[0] for latent in latents.split(1)])
        return (pixels.float().cpu().permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1)

    def noise_levels(self) -> Tensor:
        """See ``Host.noise_levels``."""
        return self._sigmas.clone()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The training timestep (b,) whose noise level is nearest to sigma (b,), in the logarithm."""
        distance = sigma.float().cpu().log().view(-1, 1) - self._log_sigmas
        return distance.abs().argmin(dim=1).to(sigma.device)

    def edits(self) -> AbstractContextManager[None]:
        """Keeps the projections ready to be edited between calls of ``denoise``, which otherwise does so each time."""
        return self._projections.installed()

    def denoise(
        self,
        noisy: Tensor,
        sigma: Tensor,
        text: Encodings,
        edit: KeyValueEdit | None,
        sizes: Tensor | None = None,
        places: Places | None = None,
    ) -> Tensor:
        """See ``Host.denoise``. The families of this host are not told sizes."""
        spread = sigma.view(-1, 1, 1, 1)
        scale = (1 + spread**2).sqrt()
        dtype = self.unet.dtype
        with self._projections.installed():
            # It stays in force behind this call: checkpointed blocks are computed again in the backward pass.
            self._projections.edit = edit
            self._projections.looking = None if places is None else (places, (noisy.shape[-2], noisy.shape[-1]))
            raw = self.unet(
                (noisy / scale).to(dtype),
                self.timestep(sigma),
                encoder_hidden_states=text.context.to(noisy.device, dtype),
                return_dict=False,
            )[0].to(noisy.dtype)
        return noisy - spread * raw if self.prediction == "eps" else noisy / scale**2 - raw * spread / scale

    def project_values(self, vectors: Tensor) -> dict[str, Tensor]:
        """See ``Host.project_values``."""
        with torch.no_grad(), self._projections.installed():
            self._projections.edit = None
            vectors = vectors.unsqueeze(0).to(self.device, self.unet.dtype)
            return {
                layer: attention.to_v(vectors).squeeze(0).float() for layer, attention in cross_attentions(self.unet)
            }

    def attention_maps(self, latents: Tensor, prompts: Sequence[str], word: Word, levels: Sequence[float]) -> Tensor:
        """See ``Host.attention_maps``."""
        return attention_maps(self, latents.to(self.device), prompts, word, levels)

    @contextmanager
    def training(self, *, gradient_checkpointing: bool = False) -> Iterator[None]:
        """See ``Host.training``. Raises UnsupportedPipelineError for models that are offloaded.

        Networks in half precision compute in 32 bit meanwhile: gradients of target values are far below what 16 bit
        can hold. Those in bfloat16 stay as they are.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for network in (self.unet, self.text_encoder):
                _require_in_place(network)
                stack.enter_context(_frozen(network))
                stack.enter_context(widened(_float16(network), keep=True))
            if self.device.type == "cpu":
                stack.enter_context(_plain_attention(self.unet))
            stack.enter_context(frozen_layers(self.unet, self.text_encoder))
            if gradient_checkpointing:
                stack.enter_context(_checkpointed(self.unet))
            stack.enter_context(self._projections.installed())
            yield


def _prediction(scheduler: Any) -> Literal["eps", "v"]:
    """What the network predicts. Raises UnsupportedPipelineError for flow-matching and other kinds."""
    kind = getattr(scheduler.config, "prediction_type", None)
    if kind not in ("epsilon", "v_prediction") or not hasattr(scheduler, "alphas_cumprod"):
        raise UnsupportedPipelineError(
            f"with a {type(scheduler).__name__} of prediction type {kind} the network predicts neither noise nor "
            "velocity over a fixed schedule: use a Stable Diffusion 1.x or 2.x pipeline with its own scheduler"
        )
    return "eps" if kind == "epsilon" else "v"


def _noise_levels(scheduler: Any) -> Tensor:
    """sigma (t,) of each training timestep, float32."""
    signal = scheduler.alphas_cumprod.detach().double().cpu().clamp_min(_SMALLEST_SIGNAL)
    return ((1 - signal) / signal).sqrt().float()


def _require_plain_latents(unet: Any, vae: Any) -> None:
    """Raise UnsupportedPipelineError for networks that want more than a latent and a prompt, and for other VAEs."""
    if not all(hasattr(getattr(vae, "config", None), name) for name in ("block_out_channels", "scaling_factor")):
        raise UnsupportedPipelineError(
            f"the VAE is a {type(vae).__name__}: use the AutoencoderKL of the model, others only imitate its latents"
        )
    config = unet.config
    further = ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "num_class_embeds")
    wanted = [name for name in further if getattr(config, name, None) is not None]
    if config.in_channels != vae.config.latent_channels or wanted:
        why = ", ".join(wanted) or f"{config.in_channels} channels, the VAE makes {vae.config.latent_channels}"
        raise UnsupportedPipelineError(
            f"the UNet wants more than a latent and a prompt ({why}), as those for inpainting and with an IP-Adapter "
            "do: train on the plain model, the concept can be used on this one afterwards"
        )


def _require_in_place(network: torch.nn.Module) -> None:
    """Raise UnsupportedPipelineError for a network whose weights come and go."""
    if hasattr(network, "_hf_hook") or any(parameter.is_meta for parameter in network.parameters()):
        raise UnsupportedPipelineError(
            f"the {type(network).__name__} is offloaded, and weights that come and go cannot be differentiated "
            "through: load the pipeline again, without enable_model_cpu_offload and enable_sequential_cpu_offload"
        )


@contextmanager
def _frozen(network: torch.nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient and nothing is dropped out, for the time of the block."""
    asked = [parameter for parameter in network.parameters() if parameter.requires_grad]
    in_training = [module for module in network.modules() if module.training]
    try:
        network.requires_grad_(False).eval()
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_()
        for module in in_training:
            module.training = True


def _float16(network: torch.nn.Module) -> list[Tensor]:
    """Parameters and buffers of that precision."""
    return [t for t in (*network.parameters(), *network.buffers()) if t.dtype == torch.float16]


@contextmanager
def _plain_attention(unet: Any) -> Iterator[None]:
    """Attention as plain products, for the time of the block: on CPUs the fused kernel's backward pass takes longer."""
    before = dict(unet.attn_processors)
    try:
        unet.set_attn_processor(AttnProcessor())
        yield
    finally:
        unet.set_attn_processor(before)


@contextmanager
def _checkpointed(unet: Any) -> Iterator[None]:
    """Activations inside residual blocks and spatial transformers are computed again in the backward pass."""
    if unet.is_gradient_checkpointing:
        yield
        return
    try:
        unet.enable_gradient_checkpointing()
        yield
    finally:
        unet.disable_gradient_checkpointing()
