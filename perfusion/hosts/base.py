"""What the method asks of a program that runs a diffusion model. Shapes as in the paper; b batch, m tokens, d width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..edit import KeyValueEdit
from ..family import Family
from ..places import Places


@dataclass(frozen=True)
class Word:
    """A word that a prompt may contain and what stands in its place: token embeddings, or plain text.

    ``embeddings`` maps each text encoder to (n, width) rows; with None the tokens of ``text`` stand there. Either way
    the place is known by token, whatever the words before it are made of.
    """

    placeholder: str
    text: str
    embeddings: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Encodings:
    """Encoded prompts: ``context`` (b, m, d) float; ``word`` and ``padding`` (b, m) bool: the word's own tokens, and
    everything behind the first end token. ``pooled`` (b, p) for families whose network wants it."""

    context: Tensor
    word: Tensor
    padding: Tensor
    pooled: Tensor | None = None

    def select(self, index: Tensor) -> Encodings:
        """The encodings of prompts ``index`` (n,), in that order, repeated where it repeats."""
        pooled = None if self.pooled is None else self.pooled[index.to(self.pooled.device)]
        here = index.to(self.word.device)
        return Encodings(self.context[index], self.word[here], self.padding[here], pooled)

    def detached(self, *, requires_grad: bool = False) -> Encodings:
        """The same without what they were made by; gradients may gather at them."""

        def alone(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_(requires_grad)

        pooled = None if self.pooled is None else alone(self.pooled)
        return Encodings(alone(self.context), self.word, self.padding, pooled)

    def to(self, device: torch.device) -> Encodings:
        """The same where a network computes: what follows from a context is remembered for the very same tensor."""
        pooled = None if self.pooled is None else self.pooled.to(device)
        return Encodings(self.context.to(device), self.word, self.padding, pooled)

    @staticmethod
    def joined(parts: Sequence[Encodings]) -> Encodings:
        """The encodings of prompts that were encoded in parts, one or more, of one length."""
        if len(parts) == 1:
            return parts[0]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Encodings(
            torch.cat([part.context for part in parts]),
            torch.cat([part.word for part in parts]),
            torch.cat([part.padding for part in parts]),
            torch.cat(pooled) if pooled else None,
        )


class TextHost(Protocol):
    """The text encoders of a model."""

    @property
    def family(self) -> Family:
        """Structure of the model."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identifies the encoders' weights and settings (layer, norm): statistics of one serve no other."""
        ...

    @property
    def captions(self) -> Sequence[str] | None:
        """Captions in words that the encoders know, where they know few; None where those of the corpus will do."""
        ...

    def encode(self, prompts: Sequence[str], word: Word | None = None, *, until_word: bool = False) -> Encodings:
        """Encode prompts, the first chunk of tokens of each; differentiable with respect to the word's embeddings.

        ``word`` and ``padding`` of the result lie on the CPU. ``until_word`` leaves out the tokens behind the word's
        last one in any of the prompts, and ``pooled``: what has not been asked for is not computed.
        """
        ...

    def token_embeddings(self, text: str) -> dict[str, Tensor]:
        """Encoder -> rows (n, width), float32, of the tokens of a text. Empty where it tokenizes to nothing."""
        ...

    def embedding_scale(self) -> dict[str, float]:
        """Encoder -> standard deviation of its embedding table."""
        ...


class Host(TextHost, Protocol):
    """A model that can be trained on: text encoders, image encoder and denoising network."""

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        ...

    @property
    def prediction(self) -> Literal["eps", "v"]:
        """What the network was trained to predict."""
        ...

    def training(self, *, gradient_checkpointing: bool = False) -> AbstractContextManager[None]:
        """Loads the models and makes them differentiable for the time of the block; leaves nothing patched."""
        ...

    def encode_images(self, images: Tensor) -> Tensor:
        """Photos (b, height, width, 3) in 0..1 -> latents (b, c, h, w), scaled as the network sees them.

        h and w are height and width over the scale of the image encoder: 8 for Stable Diffusion, but not for all.
        """
        ...

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (b, c, h, w), scaled as the network sees them -> pictures (b, height, width, 3) in 0..1.

        The pictures lie on the CPU.
        """
        ...

    def noise_levels(self) -> Tensor:
        """sigma (t,) of each training timestep, ascending, float32."""
        ...

    def denoise(
        self,
        noisy: Tensor,
        sigma: Tensor,
        text: Encodings,
        edit: KeyValueEdit | None,
        sizes: Tensor | None = None,
        places: Places | None = None,
    ) -> Tensor:
        """x0 estimated from ``noisy`` = x0 + sigma * noise (b, c, h, w), sigma (b,), with keys and values edited and
        ``edit.focus`` added before the softmax of cross-attention: where ``places`` has it, without them everywhere.

        ``sizes`` (b, 2): height and width in pixels of what each latent shows, before it was resized, for families
        whose network is told; without, the size that it has now.
        """
        ...

    def project_values(self, vectors: Tensor) -> dict[str, Tensor]:
        """Layer -> W_V v of vectors (n, d): (n, i), float32, by the weights in force."""
        ...

    def attention_maps(self, latents: Tensor, prompts: Sequence[str], word: Word, levels: Sequence[float]) -> Tensor:
        """Where the network looks for a word: (n, h, w), shares of its attention, 0 to 1, on the CPU.

        ``latents`` (n, c, h, w) are clean and scaled, ``prompts`` one for each, with the word's placeholder. Noise of
        each of the sigmas ``levels`` is added, always the same, and the network run once a level. To be had inside
        ``training()`` and outside; the same latents give the same maps.
        """
        ...
