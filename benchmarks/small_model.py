"""A reduced latent diffusion model of random weights in plain torch: stands in where there is no ComfyUI.

It has the parts that the method touches (a causal text encoder, cross-attention whose keys and values are edited, a
denoiser of latents) and nothing it could have learned: it shows that the job runs, not what it looks like.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, scaled_dot_product_attention, silu

from perfusion.edit import KeyValueEdit
from perfusion.family import Family
from perfusion.hosts.base import Encodings, Word

WIDTH, INNER, LENGTH, VOCABULARY = 64, 96, 77, 4096
_START, _END = 0, 1
_LAYERS = {"input_blocks.1.1": (1, INNER), "middle_block.1": (1, INNER), "output_blocks.1.1": (1, INNER)}
_LATENT_SCALE = 8


class _TextLayer(nn.Module):
    """A pre-norm transformer layer with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.grow, self.shrink = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.shrink(silu(self.grow(self.norm_2(x))))


class _CrossAttention(nn.Module):
    """Attention of latent pixels to text, its keys and values projected through the edit in force."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, INNER)
        self.to_q, self.out = nn.Linear(INNER, INNER, bias=False), nn.Linear(INNER, INNER)
        self.to_k, self.to_v = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(WIDTH, INNER, bias=False)

    def forward(self, x: Tensor, context: Tensor, layer: str, edit: KeyValueEdit | None) -> Tensor:
        batch, channels, height, width = x.shape
        q = self.to_q(self.norm(x).flatten(2).transpose(1, 2))
        if edit is None:
            k, v = self.to_k(context), self.to_v(context)
        else:
            k, v = edit.project(layer, "k", context, self.to_k), edit.project(layer, "v", context, self.to_v)
        out = self.out(scaled_dot_product_attention(q, k, v))
        return x + out.transpose(1, 2).view(batch, channels, height, width)


class _Denoiser(nn.Module):
    """Latent (b, 4, h, w) -> noise, with three cross-attention layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Conv2d(4, INNER, 3, padding=1), nn.Conv2d(INNER, 4, 3, padding=1)
        self.level = nn.Linear(16, INNER)
        self.convolutions = nn.ModuleList(nn.Conv2d(INNER, INNER, 3, padding=1) for _ in _LAYERS)
        self.attentions = nn.ModuleList(_CrossAttention() for _ in _LAYERS)

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor, edit: KeyValueEdit | None) -> Tensor:
        waves = sigma.log().view(-1, 1) * torch.arange(1, 9)
        h = self.inward(x / (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt())
        h = h + self.level(torch.cat([waves.sin(), waves.cos()], dim=-1))[..., None, None]
        layers = (f"{name}.transformer_blocks.0" for name in _LAYERS)
        for layer, convolution, attention in zip(layers, self.convolutions, self.attentions, strict=True):
            h = attention(h + convolution(silu(h)), context, layer, edit)
        return self.outward(silu(h))


class SmallHost:
    """The reduced model as a host of the method (``perfusion.hosts.base.Host``), on the CPU in float32."""

    family = Family("reduced", WIDTH, {"clip_l": WIDTH}, _LAYERS)
    fingerprint = sha256(b"reduced model of random weights, seed 0").hexdigest()
    device = torch.device("cpu")
    prediction: Literal["eps", "v"] = "eps"
    captions: Sequence[str] | None = None

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._table = torch.randn(VOCABULARY, WIDTH)
            self._positions = 0.1 * torch.randn(LENGTH, WIDTH)
            self._text = nn.Sequential(*(_TextLayer() for _ in range(2)), nn.LayerNorm(WIDTH)).requires_grad_(False)
            self._denoiser = _Denoiser().requires_grad_(False)

    def encode(self, prompts: Sequence[str], word: Word | None = None) -> Encodings:
        """See ``TextHost.encode``."""
        rows, inside, behind = [], [], []
        for prompt in prompts:
            row, mark = [self._table[_START]], [False]
            for token in re.findall(r"<[\w-]+>|\w+|[^\w\s]", prompt.lower()):
                own = self._rows(word) if word is not None and token == word.placeholder else [self._table[_id(token)]]
                row += own
                mark += [word is not None and token == word.placeholder] * len(own)
            row, mark = row[: LENGTH - 1], mark[: LENGTH - 1]
            padding = LENGTH - 1 - len(row)
            rows.append(torch.stack([*row, *[self._table[_END]] * (padding + 1)]))
            inside.append([*mark, *[False] * (padding + 1)])
            behind.append([False] * (len(row) + 1) + [True] * padding)
        context = self._text(torch.stack(rows) + self._positions)
        return Encodings(context, torch.tensor(inside), torch.tensor(behind))

    def token_embeddings(self, text: str) -> dict[str, Tensor]:
        """See ``TextHost.token_embeddings``."""
        ids = [_id(token) for token in re.findall(r"\w+", text.lower())]
        return {"clip_l": self._table[torch.tensor(ids, dtype=torch.long)].clone()}

    def embedding_scale(self) -> dict[str, float]:
        """See ``TextHost.embedding_scale``."""
        return {"clip_l": float(self._table.std())}

    @contextmanager
    def training(self, *, gradient_checkpointing: bool = False) -> Iterator[None]:
        """See ``Host.training``: nothing to prepare here."""
        yield

    def encode_images(self, images: Tensor) -> Tensor:
        """See ``Host.encode_images``: colors and their mean, eight times smaller."""
        small = avg_pool2d(images.permute(0, 3, 1, 2), _LATENT_SCALE) * 2 - 1
        return torch.cat([small, small.mean(1, keepdim=True)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, 4, h, w) -> images (b, 8h, 8w, 3) in 0..1."""
        images = interpolate(latents[:, :3], scale_factor=_LATENT_SCALE, mode="bicubic")
        return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)

    def noise_levels(self) -> Tensor:
        """See ``Host.noise_levels``."""
        return torch.logspace(-1.5, 1.15, 1000)

    def denoise(self, noisy: Tensor, sigma: Tensor, text: Encodings, edit: KeyValueEdit | None) -> Tensor:
        """See ``Host.denoise``."""
        return noisy - sigma.view(-1, 1, 1, 1) * self._denoiser(noisy, sigma, text.context, edit)

    def project_values(self, vectors: Tensor) -> dict[str, Tensor]:
        """See ``Host.project_values``."""
        attentions = zip(self.family.layers, self._denoiser.attentions, strict=True)
        return {layer: attention.to_v(vectors) for layer, attention in attentions}  # type: ignore[operator]

    @torch.no_grad()
    def draw(self, context: Tensor, edit: KeyValueEdit | None, size: int, seed: int, steps: int = 12) -> Tensor:
        """An image (size, size, 3) by the Euler method from a context (1, m, d)."""
        sigmas = torch.cat([torch.logspace(1.15, -1.5, steps), torch.zeros(1)])
        generator = torch.Generator().manual_seed(seed)
        x = sigmas[0] * torch.randn(1, 4, size // _LATENT_SCALE, size // _LATENT_SCALE, generator=generator)
        text = Encodings(context, torch.zeros(1, LENGTH, dtype=torch.bool), torch.zeros(1, LENGTH, dtype=torch.bool))
        for now, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            x0 = self.denoise(x, now.view(1), text, edit).clamp(-1, 1)
            x = x0 + (x - x0) * following / now
        return self.decode(x)[0]

    def _rows(self, word: Word) -> list[Tensor]:
        if word.embeddings is None:
            return list(self.token_embeddings(word.text)["clip_l"])
        return list(word.embeddings["clip_l"].unbind(0))


def _id(token: str) -> int:
    """A token's place in the table: two for start and end, the others by hash."""
    return 2 + int.from_bytes(sha256(token.encode()).digest()[:4], "little") % (VOCABULARY - 2)
