"""A whole host in miniature: causal text encoders, two cross-attention layers and a denoiser, all of random weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal
from zlib import crc32

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, layer_norm, linear
from torch.utils.checkpoint import checkpoint

from perfusion.edit import KeyValueEdit
from perfusion.family import Family
from perfusion.hosts.base import Encodings, Word
from perfusion.places import Places
from perfusion.scope import until_last
from perfusion.training.attention import WordAttention, collect

LENGTH = 48
VOCABULARY = 512
START, END = 0, 1
_WORDS = re.compile(r"<[^<>\s]+>|\w+")


def tokenize(text: str) -> list[int]:
    """A token a word, two for words of nine letters and more; none for what holds no word."""
    ids = []
    for word in _WORDS.findall(text.lower()):
        parts = [word[:5], word[5:]] if len(word) > 8 else [word]
        ids += [2 + crc32(part.encode()) % (VOCABULARY - 2) for part in parts]
    return ids


class FakeTextEncoder:
    """Embeddings, one causal attention layer and a norm."""

    def __init__(self, width: int, draw: torch.Generator):
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw)

        self.table = 0.2 * normal(VOCABULARY, width)
        self.positions = 0.1 * normal(LENGTH, width)
        self.mixing = [normal(width, width) / width**0.5 for _ in range(3)]
        self.gain = 1 + 0.3 * normal(width)
        self.offset = 0.5 * normal(width)

    def encode(self, embedded: Tensor) -> Tensor:
        x = layer_norm(embedded, embedded.shape[-1:]) + self.positions[: embedded.shape[1]]
        q, k, v = (x @ m for m in self.mixing)
        mask = torch.ones(len(x[0]), len(x[0]), dtype=torch.bool).tril()
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return layer_norm(x + 0.5 * attended, x.shape[-1:]) * self.gain + self.offset


class FakeHost:
    """See ``perfusion.hosts.base.Host``. ``calls`` counts denoiser calls; ``poison`` makes them return NaN."""

    device = torch.device("cpu")
    captions: Sequence[str] | None = None

    def __init__(
        self, prediction: Literal["eps", "v"] = "eps", encoders: dict[str, int] | None = None, weights: int = 0
    ):
        encoders = encoders or {"clip_l": 16}
        self.prediction: Literal["eps", "v"] = prediction
        self.family = Family(
            name="tiny",
            context_width=sum(encoders.values()),
            encoders=encoders,
            transformers={"input_blocks.1.1": (1, 12), "middle_block.1": (1, 20)},
        )
        self.fingerprint = f"{weights:x}".ljust(64, "0")
        draw = torch.Generator().manual_seed(weights)
        self.encoders = {name: FakeTextEncoder(width, draw) for name, width in encoders.items()}

        def matrix(rows: int, columns: int) -> Tensor:
            return torch.randn((rows, columns), generator=draw) / columns**0.5

        d = self.family.context_width
        self.to_latent = matrix(4, 3)
        self.layers = {
            layer: {"q": matrix(i, 4), "k": matrix(i, d), "v": matrix(i, d), "out": matrix(4, i)}
            for layer, i in self.family.layers.items()
        }
        self.in_training = False
        self.checkpointing = False
        self.calls = 0
        self.poison = False
        self.told_sizes: Tensor | None = None
        self.watching: WordAttention | None = None

    # --- text

    def encode(self, prompts: Sequence[str], word: Word | None = None, *, until_word: bool = False) -> Encodings:
        ids = torch.full((len(prompts), LENGTH), END)
        words = torch.zeros(len(prompts), LENGTH, dtype=torch.bool)
        rows = torch.zeros(len(prompts), LENGTH, dtype=torch.long)
        padding = torch.zeros(len(prompts), LENGTH, dtype=torch.bool)
        for b, prompt in enumerate(prompts):
            tokens = [(START, -1)]
            for found in _WORDS.findall(prompt):
                if word is None or found.lower() != word.placeholder:
                    tokens += [(id_, -1) for id_ in tokenize(found)]
                elif word.embeddings is None:
                    tokens += [(id_, 0) for id_ in tokenize(word.text)]
                else:
                    tokens += [(END, k) for k in range(len(next(iter(word.embeddings.values()))))]
            tokens = tokens[: LENGTH - 1]
            ids[b, : len(tokens)] = torch.tensor([id_ for id_, _ in tokens])
            row = torch.tensor([k for _, k in tokens])
            words[b, : len(tokens)] = row >= 0
            rows[b, : len(tokens)] = row.clamp_min(0)
            padding[b, len(tokens) + 1 :] = True
        if until_word:
            length = until_last(words)
            ids, words, rows, padding = (tensor[:, :length] for tensor in (ids, words, rows, padding))
        sides = []
        for name, encoder in self.encoders.items():
            embedded = encoder.table[ids]
            if word is not None and word.embeddings is not None:
                embedded = torch.where(words.unsqueeze(-1), word.embeddings[name][rows], embedded)
            sides.append(encoder.encode(embedded))
        return Encodings(torch.cat(sides, dim=-1), words, padding)

    def token_embeddings(self, text: str) -> dict[str, Tensor]:
        ids = torch.tensor(tokenize(text), dtype=torch.long)
        return {name: encoder.table[ids].clone() for name, encoder in self.encoders.items()}

    def embedding_scale(self) -> dict[str, float]:
        return {name: float(encoder.table.std()) for name, encoder in self.encoders.items()}

    # --- pictures

    def encode_images(self, images: Tensor) -> Tensor:
        assert images.ndim == 4 and images.shape[-1] == 3
        return linear(avg_pool2d(images.permute(0, 3, 1, 2), 8).permute(0, 2, 3, 1) - 0.5, self.to_latent).permute(
            0, 3, 1, 2
        )

    def decode_latents(self, latents: Tensor) -> Tensor:
        colors = linear(latents.permute(0, 2, 3, 1), torch.linalg.pinv(self.to_latent)) + 0.5
        return colors.repeat_interleave(8, 1).repeat_interleave(8, 2).clamp(0, 1)

    def noise_levels(self) -> Tensor:
        return torch.logspace(-1.5, 1.15, 100)

    @contextmanager
    def training(self, *, gradient_checkpointing: bool = False) -> Iterator[None]:
        self.in_training, self.checkpointing = True, gradient_checkpointing
        try:
            yield
        finally:
            self.in_training = self.checkpointing = False

    def network(self, scaled: Tensor, context: Tensor, edit: KeyValueEdit | None) -> Tensor:
        """The raw prediction for pictures (b, 4, h, w) of unit variance."""
        x = scaled.flatten(2).mT
        for layer in self.layers:
            x = (
                checkpoint(self._attend, layer, x, context, edit, use_reentrant=False)
                if self.checkpointing
                else (self._attend(layer, x, context, edit))
            )
        return x.mT.unflatten(2, scaled.shape[2:])

    def _attend(self, layer: str, x: Tensor, context: Tensor, edit: KeyValueEdit | None) -> Tensor:
        w = self.layers[layer]
        k, v = (
            linear(context, w[path])
            if edit is None
            else edit.project(layer, path, context, lambda e, path=path: linear(e, w[path]))
            for path in ("k", "v")
        )
        q = linear(x, w["q"])
        if self.watching is not None:
            self.watching.add_cross(q, k, heads=1)
        attention = torch.softmax(q @ k.mT / k.shape[-1] ** 0.5, dim=-1)
        return x + 0.5 * linear(attention @ v, w["out"])

    def denoise(
        self,
        noisy: Tensor,
        sigma: Tensor,
        text: Encodings,
        edit: KeyValueEdit | None,
        sizes: Tensor | None = None,
        places: Places | None = None,
    ) -> Tensor:
        self.told_sizes = sizes
        assert self.in_training, "the protocol promises a loaded model only inside training()"
        self.calls += 1
        spread = sigma.view(-1, 1, 1, 1)
        scale = (1 + spread**2).sqrt()
        raw = self.network(noisy / scale, text.context, edit)
        if self.poison:
            raw = raw * float("nan")
        return noisy - spread * raw if self.prediction == "eps" else noisy / scale**2 - raw * spread / scale

    def attention_maps(self, latents: Tensor, prompts: Sequence[str], word: Word, levels: Sequence[float]) -> Tensor:
        def run(noisy: Tensor, sigma: Tensor, text: Encodings, attention: WordAttention) -> None:
            self.watching = attention
            self.network(noisy / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt(), text.context, None)
            self.watching = None

        return collect(self, latents, prompts, word, levels, run)

    def project_values(self, vectors: Tensor) -> dict[str, Tensor]:
        return {layer: linear(vectors, w["v"]) for layer, w in self.layers.items()}
