"""Training inside ComfyUI's executor: its models made differentiable for a while, and put back as they were."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from hashlib import sha256
from typing import Any, Literal

import comfy.clip_model
import comfy.ldm.modules.attention as comfy_attention
import comfy.model_management
import comfy.model_sampling
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...edit import KeyValueEdit
from ...family import Family
from ...places import Places
from ...stack import ConceptStack
from ...training.attention import WordAttention, collect
from ..base import Encodings, Word
from ..frozen import frozen_layers, widened
from ..replacing import replaced_forwards
from . import text as text_side
from .apply import Applied, attach, detach
from .attention import watching
from .steering import steered
from .structure import UnsupportedModelError, encoder_widths, family_of, projections

_EVERYTHING = 10**20  # bytes
_HALF = (torch.float16, torch.bfloat16)
_LARGE_MAP = 512 * 512  # of attention, in numbers for each head
_PIXELS = 8  # along each side of a latent pixel, as the host counts when it tells SDXL the size of a picture
_PROBES = ("a photo of a cat", "Two red chairs, by the sea; 1987!")


class ComfyHost:
    """A MODEL, its CLIP and its VAE, as the trainer sees them (``perfusion.hosts.base.Host``).

    Raises UnsupportedModelError when the model or CLIP is of another kind.
    """

    def __init__(self, model: Any, clip: Any, vae: Any = None):
        self._model = _static_clone(model, model)
        self._clip = _static_clone(clip, clip.patcher)
        self._vae = vae
        self._fingerprint = ""
        detach(self._model)
        self.family: Family = family_of(model, clip)
        _require_plain_input(model.model)
        self._live = Applied(ConceptStack())
        self._visited = False  # whether other models were loaded since the last step of a training
        attach(self._model, self._live)

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return self._model.load_device

    @property
    def model(self) -> Any:
        """The MODEL, a clone of the one that was given."""
        return self._model

    @property
    def clip(self) -> Any:
        """The CLIP, a clone of the one that was given."""
        return self._clip

    @property
    def latent_scale(self) -> int:
        """Pixels per latent pixel, along each side."""
        return int(self._vae.spacial_compression_encode()) if self._vae is not None else _PIXELS

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the network computes in while it trains."""
        own = _own_compute_dtype(self._model)
        if own != torch.float16:
            return own
        # Gradients of target values are far below what float16 can hold.
        return torch.bfloat16 if comfy.model_management.should_use_bf16(self.device) else torch.float32

    @property
    def prediction(self) -> Literal["eps", "v"]:
        """What the network predicts. Raises UnsupportedModelError for flow-matching and other kinds."""
        sampling = self._model.get_model_object("model_sampling")
        if isinstance(sampling, comfy.model_sampling.V_PREDICTION):
            return "v"
        if isinstance(sampling, comfy.model_sampling.EPS):
            return "eps"
        raise UnsupportedModelError(
            f"the model on input 'model' predicts neither noise nor velocity ({type(sampling).__name__}): "
            "use a Stable Diffusion 1.x, 2.x or SDXL checkpoint"
        )

    @property
    def fingerprint(self) -> str:
        """Digest of what the encoders make of two probe texts: weights, patches, layer and norm all show in it."""
        if not self._fingerprint:
            with torch.no_grad():
                context = text_side.encode(self._clip, _PROBES).context
            digits = (context.detach().float().cpu() * 1000).round().to(torch.int32)
            self._fingerprint = sha256(digits.contiguous().numpy().tobytes()).hexdigest()
        return self._fingerprint

    @property
    def captions(self) -> Sequence[str] | None:
        """See ``TextHost.captions``."""
        return text_side.captions_of(self._clip)

    def encode(self, prompts: Sequence[str], word: Word | None = None, *, until_word: bool = False) -> Encodings:
        """See ``TextHost.encode``."""
        pooled = self.wants_pooled and not until_word
        return text_side.encode(self._clip, prompts, word, pooled=pooled, until_word=until_word)

    def token_embeddings(self, text: str) -> dict[str, Tensor]:
        """See ``TextHost.token_embeddings``."""
        rows = {}
        for encoder in encoder_widths(self._clip):
            ids = text_side.ids_of(self._clip, encoder, text)
            rows[encoder] = self._table(encoder)[torch.tensor(ids, dtype=torch.long)].detach().float().cpu().clone()
        return rows

    def embedding_scale(self) -> dict[str, float]:
        """See ``TextHost.embedding_scale``."""
        return {encoder: float(self._table(encoder).detach().float().std()) for encoder in encoder_widths(self._clip)}

    def encode_images(self, images: Tensor) -> Tensor:
        """See ``Host.encode_images``."""
        with torch.no_grad(), self._visiting():
            latent = self._vae.encode(images)
        channels = self._model.model.latent_format.latent_channels
        if latent.ndim != 4 or latent.shape[1] != channels:
            raise UnsupportedModelError(
                f"the VAE on input 'vae' makes latents of shape {tuple(latent.shape[1:])}, the model needs {channels} "
                "channels in two dimensions: connect the checkpoint's own VAE"
            )
        return self._model.model.process_latent_in(latent.float().cpu()).clone()

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See ``Host.decode_latents``."""
        with torch.no_grad(), self._visiting():
            pictures = self._vae.decode(self._model.model.process_latent_out(latents.float()))
        if pictures.ndim != 4 or pictures.shape[-1] != 3:
            raise UnsupportedModelError(
                f"the VAE on input 'vae' makes pictures of shape {tuple(pictures.shape[1:])}, not of height, width and "
                "three colors: connect the checkpoint's own VAE"
            )
        return pictures.float().cpu().clamp(0, 1)

    def noise_levels(self) -> Tensor:
        """See ``Host.noise_levels``."""
        return self._model.get_model_object("model_sampling").sigmas.detach().float().clone()

    def denoise(
        self,
        noisy: Tensor,
        sigma: Tensor,
        text: Encodings,
        edit: KeyValueEdit | None,
        sizes: Tensor | None = None,
        places: Places | None = None,
    ) -> Tensor:
        """See ``Host.denoise``. SDXL is told the sizes, other families don't ask."""
        if self._visited and (torch.is_grad_enabled() or edit is None):
            # A step needs the room that was taken meanwhile, and begins with what the model does without the concept.
            self.reload(_EVERYTHING)
            self._visited = False
        # It stays in force behind this call: checkpointed blocks are computed again in the backward pass.
        self._live.edit = edit
        options: dict[str, Any] = {"optimized_attention_override": _differentiable_attention}
        if edit is not None and edit.focuses:
            options = steered(options, edit=edit, places=places)
        return self._estimate(noisy, sigma, text, options, sizes)

    def attention_maps(self, latents: Tensor, prompts: Sequence[str], word: Word, levels: Sequence[float]) -> Tensor:
        """See ``Host.attention_maps``."""
        self._live.edit = None
        with ExitStack() as stack:
            if not self._in_training:
                stack.callback(self._model.eject_model)

            def run(noisy: Tensor, sigma: Tensor, text: Encodings, attention: WordAttention) -> None:
                if not self._in_training:
                    comfy.model_management.load_models_gpu([self._model])
                self._estimate(noisy, sigma, text, watching(attention))

            return collect(self, latents.to(self.device), prompts, word, levels, run)

    def _estimate(
        self, noisy: Tensor, sigma: Tensor, text: Encodings, options: dict[str, Any], sizes: Tensor | None = None
    ) -> Tensor:
        """x0 by the network with these transformer options; ``sizes`` as for ``denoise``."""
        model, extra = self._model.model, {}
        if self.wants_pooled:
            extra["y"] = self._size_conditioning(noisy, text, sizes)
        context = text.context.to(noisy.device)
        return model.apply_model(noisy, sigma, c_crossattn=context, transformer_options=options, **extra)

    def _size_conditioning(self, noisy: Tensor, text: Encodings, sizes: Tensor | None) -> Tensor:
        """What SDXL wants besides the context (b, n): pooled text and three sizes (Podell et al. 2023, section 2.2).

        The size before resizing is the photo's own, so that a small photo's blur is put down to its size and is not
        learned. A crop was chosen to show the thing whole, and says as an uncropped picture would that nothing is cut
        off: (0, 0), which is also what pictures are drawn with.
        """
        if text.pooled is None:
            raise ValueError("this network wants pooled encodings, and these have none: encode with this very host")
        target = [_PIXELS * side for side in noisy.shape[-2:]]
        sizes = torch.tensor([target] * len(noisy)) if sizes is None else sizes
        vectors = [
            self._model.model.encode_adm(
                pooled_output=pooled.unsqueeze(0),
                height=height,
                width=width,
                crop_h=0,
                crop_w=0,
                target_height=target[0],
                target_width=target[1],
                device=noisy.device,
            )
            for pooled, (height, width) in zip(text.pooled, sizes.tolist(), strict=True)
        ]
        return torch.cat(vectors).to(noisy.device)

    def project_values(self, vectors: Tensor) -> dict[str, Tensor]:
        """See ``Host.project_values``."""
        model, self._live.edit = self._model.model, None
        with torch.no_grad():
            vectors = vectors.unsqueeze(0).to(self.device, _compute_dtype(model))
            return {layer: to_v(vectors).squeeze(0).float() for layer, _, to_v in projections(model.diffusion_model)}

    @contextmanager
    def training(self, *, gradient_checkpointing: bool = False) -> Iterator[None]:
        """See ``Host.training``. Nodes run in inference mode, whose tensors autograd refuses: the block leaves it."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            if (dtype := self.compute_dtype) != _own_compute_dtype(self._model):
                self._model.set_model_compute_dtype(dtype)
            stack.callback(self._put_back)
            # Training needs room for activations: whatever else is loaded makes way.
            self.reload(_EVERYTHING)
            # Everything is loaded now, and stays: each encoding would load anew, and might evict the network for it.
            self._clip.load_model = lambda tokens=None: self._clip.patcher
            stack.callback(vars(self._clip).pop, "load_model")
            self._make_ordinary()
            stack.enter_context(widened(_stored_narrow(self.narrow_layers), keep=False))
            stack.enter_context(_differentiable_encoders(self._clip.cond_stage_model))
            stack.enter_context(
                frozen_layers(self._model.model.diffusion_model, self._clip.cond_stage_model, patched=_patched)
            )
            if gradient_checkpointing:
                stack.enter_context(checkpointed(self._model.model.diffusion_model))
            stack.enter_context(_host_in_training())
            yield

    def reload(self, memory_required: int = 0) -> None:
        """Have the models of a training loaded, whole: what was loaded meanwhile may have pushed them out."""
        models = [self._model, self._clip.patcher]
        comfy.model_management.load_models_gpu(models, memory_required=memory_required, force_full_load=True)
        if self._in_training:
            self._make_ordinary()
            self._visited = True

    def _make_ordinary(self) -> None:
        for network in (self._model.model, self._clip.cond_stage_model):
            _make_ordinary(network)
            network.requires_grad_(False)

    def _put_back(self) -> None:
        self._live.edit = None
        self._model.eject_model()

    @contextmanager
    def _visiting(self) -> Iterator[None]:
        """Another model is used in the block, which may push those of a training out."""
        try:
            yield
        finally:
            if self._in_training:
                self.reload()

    @property
    def _in_training(self) -> bool:
        """Whether a ``training`` block is open, in which everything is loaded and stays so."""
        return "load_model" in vars(self._clip)

    @property
    def narrow_layers(self) -> list[torch.nn.Linear]:
        """Linear layers of the encoders on a CPU that are stored in half precision. They compute in 32 bit, and every
        use of one, several a step, converts it anew: of a few tokens that takes longer than the product.
        """
        if not comfy.model_management.is_device_cpu(self._clip.patcher.load_device):
            return []
        layers = [m for m in self._clip.cond_stage_model.modules() if isinstance(m, torch.nn.Linear)]
        return [m for m in layers if type(m.weight) is torch.nn.Parameter and m.weight.dtype in _HALF]

    @property
    def wants_pooled(self) -> bool:
        """Whether the network wants pooled encodings and sizes, as SDXL's does."""
        return getattr(self._model.model, "adm_channels", 0) > 0

    def _table(self, encoder: str) -> Tensor:
        return getattr(self._clip.cond_stage_model, encoder).transformer.get_input_embeddings().weight


def _differentiable_attention(chosen: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In place of the attention the host was started with, some of which have no backward pass."""
    plain = comfy.model_management.is_device_cpu(q.device) and is_faster_plain(q, k)
    kernel = comfy_attention.attention_basic if plain else comfy_attention.attention_pytorch
    return kernel(q, k, *args, **kwargs)


def is_faster_plain(q: Tensor, k: Tensor) -> bool:
    """Whether plain products take less time on a CPU than the fused kernel, whose backward pass is slow there.

    Of q (b, n, w) or (b, heads, n, w), and k likewise. Large maps are another matter: writing and reading them takes
    longer than any kernel (``benchmarks.training`` at 128 and 256 pixels), and much memory.
    """
    return q.shape[-2] * k.shape[-2] < _LARGE_MAP


def _static_clone(thing: Any, patcher: Any) -> Any:
    """A clone whose weights lie still: those that are streamed in call by call cannot be differentiated through."""
    if not getattr(patcher, "is_dynamic", lambda: False)():
        return thing.clone()
    try:
        clone = thing.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise UnsupportedModelError(
            "this model streams its weights and its loader cannot read it once more for training. Load it with Load "
            "Checkpoint, or start ComfyUI with --disable-dynamic-vram."
        ) from error
    if hasattr(clone, "cond_stage_model"):  # a CLIP's clone still names the streamed network
        clone.cond_stage_model = clone.patcher.model
    return clone


def _compute_dtype(model: Any) -> torch.dtype:
    """What the network computes in."""
    return model.manual_cast_dtype if model.manual_cast_dtype is not None else model.get_dtype()


def _own_compute_dtype(patcher: Any) -> torch.dtype:
    """What a model computes in when this patcher is loaded: what another left on the shared network is not asked."""
    cast = patcher.get_model_object("manual_cast_dtype")
    return cast if cast is not None else patcher.model.get_dtype()


def _require_plain_input(model: Any) -> None:
    """Raise UnsupportedModelError for networks that want more than a latent, as those for inpainting do."""
    if getattr(model, "concat_keys", ()):
        raise UnsupportedModelError(
            "the model on input 'model' is one for inpainting or editing, which needs a picture besides the prompt: "
            "train on the plain checkpoint, the concept can be used on this one afterwards"
        )


def _refused_by_autograd(tensor: Tensor) -> bool:
    """Whether it was made in inference mode; one that was moved since says it was not, but still counts no versions."""
    try:
        return tensor.is_inference() or tensor._version < 0
    except RuntimeError:
        return True


def _make_ordinary(network: torch.nn.Module) -> None:
    """Replace inference tensors, once, by ordinary ones of the same values, in which autograd can work."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and _refused_by_autograd(parameter):
                module._parameters[name] = torch.nn.Parameter(parameter.clone(), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and _refused_by_autograd(buffer):
                module._buffers[name] = buffer.clone()


def _differentiable_encoders(cond_stage_model: torch.nn.Module) -> Any:
    """The host's CLIP layers add in place, which destroys what their norms keep for the backward pass."""

    def out_of_place(layer: Any, x: Tensor, mask: Any = None, optimized_attention: Any = None) -> Tensor:
        attended = x + layer.self_attn(layer.layer_norm1(x), mask, optimized_attention)
        return attended + layer.mlp(layer.layer_norm2(attended))

    layers = [m for m in cond_stage_model.modules() if isinstance(m, comfy.clip_model.CLIPLayer)]
    return replaced_forwards({layer: partial(out_of_place, layer) for layer in layers})


def _stored_narrow(layers: Sequence[torch.nn.Linear]) -> list[Tensor]:
    return [tensor for layer in layers for tensor in layer.parameters() if tensor.dtype in _HALF]


def _patched(module: Any) -> bool:
    """Whether weights of a layer are made anew at each call, by functions that the host keeps for it."""
    return bool(getattr(module, "weight_function", ()) or getattr(module, "bias_function", ()))


def blocks_of(diffusion_model: torch.nn.Module) -> list[torch.nn.Module]:
    """The residual blocks and spatial transformers of a network."""
    return [m for m in diffusion_model.modules() if isinstance(m, (ResBlock, comfy_attention.SpatialTransformer))]


def checkpointed(diffusion_model: torch.nn.Module) -> Any:
    """Activations inside residual blocks and spatial transformers are computed again in the backward pass."""
    blocks = blocks_of(diffusion_model)
    return replaced_forwards({block: partial(checkpoint, block.forward, use_reentrant=False) for block in blocks})


@contextmanager
def _host_in_training() -> Iterator[None]:
    """Tells the host's operators, where they ask, that a backward pass will follow."""
    management = comfy.model_management
    before = getattr(management, "in_training", None)
    if before is None:
        yield
        return
    management.in_training = True
    try:
        yield
    finally:
        management.in_training = before
