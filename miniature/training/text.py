"""The text encoder and its image tower, trained contrastively on scenes and captions written anew at each step.

Padding is trained to say nothing. In a causal encoder it sees the whole caption and would repeat it 60 times over; a
denoiser then reads looks there and hardly from the words, and no word can be taught one.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from random import Random
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .. import tokenizer as tokens
from ..captions import NEUTRAL_SENTENCES, caption
from ..data import pool, pool_scene, to_network
from ..networks import TOKENS, contrastive
from ..weights import FOLDER
from .run import Run, autocast, begin_with_weights, device

_LONG = 0.04  # share of batches with captions of up to 77 tokens, so that no position stays untrained
_WHOLE = 0.25  # share of batches with padding up to 77 tokens
_SILENCE = 1.0  # weight of what padding still says


def train(
    cache: Path,
    steps: int,
    rate: float,
    batch: int,
    pictures: int,
    start_from_weights: bool = False,
    seed: int = 0,
) -> None:
    """Train on ``pictures`` scenes; the checkpoint goes to ``cache/text``.

    ``start_from_weights``: a new run begins with the weights that ship, not at random.
    """
    torch.manual_seed(seed)
    here = device()
    tokenizer = tokens.load(FOLDER / "tokenizer")
    model = contrastive(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    model.set_attn_implementation("eager")
    cast(torch.nn.Module, model).to(here)
    if start_from_weights:
        # How sharply pictures and texts are compared is learned anew: it does not ship.
        begin_with_weights(cast(torch.nn.Module, model), "image_encoder", "text_encoder", strict=False)
    run = Run(cache / "text", {"clip": model}, steps=steps, rate=rate, seed=seed, ema=0.998, weight_decay=0.05)
    data = pool(cache, "train", pictures)
    scenes = [pool_scene("train", k) for k in range(pictures)]
    # Half of each batch shows the same kinds of things: there only color, place and accessory tell captions apart.
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for k, seen in enumerate(scenes):
        alike[tuple(sorted(thing.category for thing in seen.things))].append(k)
    groups = sorted(group for group in alike if len(alike[group]) >= batch // 2)

    def loss_of(generator: torch.Generator) -> Tensor:
        rng = Random(int(torch.randint(2**62, (1,), generator=generator)))
        group = alike[rng.choice(groups)]
        index = [*rng.sample(range(pictures), batch - batch // 2), *rng.sample(group, min(len(group), batch // 2))]
        texts = [caption(rng, scenes[k], detail=0.85).text for k in index]
        if rng.random() < _LONG:
            texts = [_lengthened(rng, text) for text in texts]
        padding = "max_length" if rng.random() < _WHOLE else True
        encoded = tokenizer(texts, padding=padding, truncation=True, max_length=TOKENS, return_tensors="pt")
        pictures_seen = to_network(data[torch.tensor(index)]).to(here)
        with autocast():
            out = model(input_ids=encoded.input_ids.to(here), attention_mask=None, pixel_values=pictures_seen)
        logits = out.logits_per_text.float()
        target = torch.arange(len(index), device=here)
        contrast = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        padded = encoded.attention_mask.to(here) == 0
        return contrast + _SILENCE * said_by_padding(out.text_model_output.last_hidden_state.float(), padded)

    run.train(loss_of)


def said_by_padding(encodings: Tensor, padding: Tensor) -> Tensor:
    """How much encodings (b, m, d) differ between captions where they are padding (b, m): a variance, 0 if none is."""
    share = padding.float().unsqueeze(-1)
    count = share.sum(dim=0).clamp_min(1)
    mean = (encodings * share).sum(dim=0) / count
    return ((encodings - mean).square() * share).sum() / (share.sum() * encodings.shape[-1]).clamp_min(1)


def _lengthened(rng: Random, text: str) -> str:
    """A caption with sentences before and behind it that say nothing of the picture."""
    before = [rng.choice(NEUTRAL_SENTENCES) for _ in range(rng.randint(0, 5))]
    behind = [rng.choice(NEUTRAL_SENTENCES) for _ in range(rng.randint(4, 9))]
    return ", ".join([*before, text, *behind])
