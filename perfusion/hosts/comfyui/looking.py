"""Where a MODEL, with all that is on it, looks for the words of a prompt in a picture: through the host's sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ...training.attention import WordAttention
from .attention import watching

_AT_ONCE = 4  # words looked for together, as a batch of the same picture


class _Switch:
    """Hands attention on to whichever collector is in turn."""

    def __init__(self) -> None:
        self.current: WordAttention | None = None

    def add_cross(self, q: Tensor, k: Tensor, heads: int, bias: Tensor | None = None) -> None:
        if self.current is not None:
            self.current.add_cross(q, k, heads, bias)

    def add_own(self, q: Tensor, k: Tensor, heads: int) -> None:
        if self.current is not None:
            self.current.add_own(q, k, heads)


def attention_maps(model: Any, conditioning: Any, latent: Tensor, words: Tensor, at: Sequence[float]) -> Tensor:
    """Where the model looks for words when it draws a picture: (len(at), j, h, w), shares of its attention, on the CPU.

    ``conditioning`` is the encoded prompt, ``latent`` (1, c, h, w) the picture as the VAE encodes it, ``words`` (j, m)
    bool the tokens of each word. ``at`` are places in sampling, 0 its beginning and 1 its end: as much noise as there
    is then is put on the picture, always the same, and the network is run once.
    """
    clone, switch = model.clone(), _Switch()
    options = watching(switch)  # type: ignore[arg-type]
    transformer_options = dict(clone.model_options.get("transformer_options", {}))
    transformer_options["optimized_attention_override"] = options["optimized_attention_override"]
    clone.model_options["transformer_options"] = transformer_options
    for patch in options["patches"]["attn2_patch"]:
        clone.set_model_attn2_patch(patch)
    sampling = clone.get_model_object("model_sampling")
    sigmas = torch.tensor([float(sampling.percent_to_sigma(min(max(place, 0.001), 0.999))) for place in at])
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    found = []
    for start in range(0, len(words), _AT_ONCE):
        some = words[start : start + _AT_ONCE]
        collectors = [WordAttention(some, (latent.shape[-2], latent.shape[-1])) for _ in at]
        guider = comfy.samplers.CFGGuider(clone)
        guider.inner_set_conds({"positive": conditioning})
        guider.sample(
            noise.expand(len(some), -1, -1, -1),
            latent.expand(len(some), -1, -1, -1),
            comfy.samplers.KSAMPLER(_looks(collectors, switch)),
            sigmas,
            disable_pbar=True,
            seed=0,
        )
        found.append(torch.stack([collector.maps() for collector in collectors]))
    return torch.cat(found, dim=1)


def _looks(collectors: Sequence[WordAttention], switch: _Switch) -> Any:
    """A sampler that runs the network once at each level of noise, and leaves the picture as it is."""

    def sample(network: Any, noisy: Tensor, sigmas: Tensor, extra_args: Any = None, **_: Any) -> Tensor:
        for collector, sigma in zip(collectors, sigmas, strict=True):
            comfy.model_management.throw_exception_if_processing_interrupted()
            switch.current = collector
            scaled = network.latent_image + sigma * network.noise
            network(scaled, sigma.expand(len(noisy)), **(extra_args or {}))
        switch.current = None
        return network.latent_image

    return sample
