"""Measures of pictures in the miniature's world: obedience to a prompt, and likeness to a personal thing.

All take pictures (b, 64, 64, 3) in 0..1, as ``perfusion.hosts.diffusers.draw`` returns them. ``accuracy`` and
``retrieval`` say how far the measures themselves are to be believed, on renders that no network was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from .backgrounds import BACKGROUNDS
from .captions import Caption
from .judge import CATEGORY_NAMES, COLOR_NAMES, WORN, Verdict
from .shapes import Look
from .styles import STYLES
from .tokenizer import load as load_tokenizer
from .weights import FOLDER, load_image_encoder, load_judge, load_text_encoder
from .world import PATTERNS, Scene, look_alike, portrait, render

LOOK_ALIKES = 49
_BATCH = 100
_PORTRAITS = 4


@dataclass(frozen=True)
class Likeness:
    """Of pictures to a personal thing: ``identity`` the share in which it, and none of 49 look-alikes, is the nearest
    by the judge's embedding; ``similarity`` the mean cosine to it; ``image`` the image encoder's mean cosine to the
    photos (the world's CLIP-I)."""

    identity: float
    similarity: float
    image: float


class Metrics:
    """The judge and the contrastive encoders, ready to measure. Raises WeightsError where weights are missing."""

    def __init__(self, folder: Path = FOLDER):
        self.judge = load_judge(folder)
        self.image_encoder = load_image_encoder(folder)
        self.text_encoder = load_text_encoder(folder)
        self.tokenizer = load_tokenizer(folder / "tokenizer")

    def verdict(self, pictures: Tensor) -> Verdict:
        """The judge's logits for pictures."""
        with torch.no_grad():
            parts = [vars(self.judge(part)) for part in _to_network(pictures).split(_BATCH)]
        return Verdict(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def image_embeddings(self, pictures: Tensor) -> Tensor:
        """(b, 128), of length 1."""
        with torch.no_grad():
            parts = [self.image_encoder(part).image_embeds for part in _to_network(pictures).split(_BATCH)]
        return normalize(torch.cat(parts), dim=-1)

    def text_embeddings(self, texts: Sequence[str]) -> Tensor:
        """(b, 128), of length 1."""
        encoded = self.tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            parts = [self.text_encoder(part).text_embeds for part in encoded.input_ids.split(_BATCH)]
        return normalize(torch.cat(parts), dim=-1)

    def text_similarity(self, pictures: Tensor, texts: Sequence[str]) -> float:
        """Mean cosine of each picture to its text (the world's CLIP-T)."""
        return float((self.image_embeddings(pictures) * self.text_embeddings(texts)).sum(-1).mean())

    def likeness(self, pictures: Tensor, photos: Tensor, category: str, look: Look) -> Likeness:
        """How much pictures show the thing of a category that has a look and was photographed so."""
        kind = CATEGORY_NAMES.index(category)
        known = self._known(category, look)
        own = self.verdict(pictures).identity[:, kind]
        nearest = (own @ known.T).argmax(-1)
        image = self.image_embeddings(pictures) @ self.image_embeddings(photos).T
        return Likeness(float((nearest == 0).float().mean()), float((own @ known[0]).mean()), float(image.mean()))

    def of_concept(
        self, pictures: Tensor, photos: Tensor, category: str, look: Look, asked: Sequence[str]
    ) -> dict[str, float]:
        """The fields of ``likeness``, and "text": the similarity to the texts that pictures were ``asked`` for with."""
        return {
            **vars(self.likeness(pictures, photos, category, look)),
            "text": self.text_similarity(pictures, asked),
        }

    def attributes(self, pictures: Tensor, captions: Sequence[Caption]) -> dict[str, list[bool]]:
        """For each attribute, whether each picture whose caption asks for it shows it.

        "category": a thing that was asked for is there; "two_objects": both are; "background", "style", "accessory",
        "color", "pattern": as asked for, the latter three on the thing they were asked for.
        """
        verdict = self.verdict(pictures)
        found: dict[str, list[bool]] = {
            name: [] for name in ("background", "style", "category", "two_objects", "accessory", "color", "pattern")
        }
        for row, asked in enumerate(captions):
            if asked.background is not None:
                found["background"].append(_says(verdict.background[row], BACKGROUNDS, asked.background))
            if asked.style is not None:
                found["style"].append(_says(verdict.style[row], STYLES, asked.style))
            there = []
            for thing in asked.things:
                kind = CATEGORY_NAMES.index(thing.category)
                there.append(bool(verdict.present[row, kind] > 0))
                if thing.accessory is not None:
                    found["accessory"].append(_says(verdict.worn[row, kind], WORN, thing.accessory))
                if thing.color is not None:
                    found["color"].append(_says(verdict.color[row, kind], COLOR_NAMES, thing.color))
                if thing.pattern is not None:
                    found["pattern"].append(_says(verdict.pattern[row, kind], PATTERNS, thing.pattern))
            found["category"] += there
            if len(there) == 2:
                found["two_objects"].append(all(there))
        return found

    def accuracy(self, scenes: Sequence[Scene]) -> dict[str, float]:
        """How often the judge is right about renders of scenes, by attribute."""
        from .training.judges import NOT_ASKED, labels

        verdict, told, right = self.verdict(rendered(scenes)), labels(list(scenes)), {}
        for name in ("background", "style", "worn", "color", "pattern"):
            asked = told[name] != NOT_ASKED
            right[name] = float((getattr(verdict, name).argmax(-1) == told[name])[asked].float().mean())
        present = verdict.present > 0
        right["present"] = float(present[told["present"] == 1].float().mean())
        right["absent"] = float((~present)[told["present"] == 0].float().mean())
        return right

    def retrieval(self, looks: Sequence[tuple[str, Look]], scenes: Sequence[Scene]) -> float:
        """How often the thing of ``looks[k]``, shown in ``scenes[k]``, is found among its 49 look-alikes."""
        pictures, hits = rendered(scenes), []
        for (category, look), identity in zip(looks, self.verdict(pictures).identity, strict=True):
            own = identity[CATEGORY_NAMES.index(category)]
            hits.append(int((self._known(category, look) @ own).argmax()) == 0)
        return sum(hits) / len(hits)

    def look_embeddings(self, category: str, looks: Sequence[Look], rng: Random) -> Tensor:
        """Judge's embeddings (n, e) of length 1 of looks on things of a category, each the mean over four portraits."""
        pictures = rendered([portrait(category, each, rng) for each in looks for _ in range(_PORTRAITS)])
        identity = self.verdict(pictures).identity[:, CATEGORY_NAMES.index(category)]
        return normalize(identity.view(len(looks), _PORTRAITS, -1).mean(1), dim=-1)

    def _known(self, category: str, look: Look) -> Tensor:
        """Embeddings (50, e) of a thing and 49 look-alikes."""
        rng = Random(f"look-alikes {category} {look}")
        return self.look_embeddings(category, [look, *(look_alike(look, rng) for _ in range(LOOK_ALIKES))], rng)


def rendered(scenes: Sequence[Scene]) -> Tensor:
    """Scenes as pictures (b, 64, 64, 3) in 0..1."""
    return torch.from_numpy(np.stack([np.asarray(render(seen)) for seen in scenes])).float() / 255


def _to_network(pictures: Tensor) -> Tensor:
    return pictures.permute(0, 3, 1, 2).float() * 2 - 1


def _says(logits: Tensor, names: Sequence[str], wanted: str) -> bool:
    return names[int(logits.argmax())] == wanted
