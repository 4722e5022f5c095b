"""How good a concept is at one step of its training, so that the best step can be chosen.

``PictureScorer`` draws it and compares the pictures with the photos and with their prompts, by a pair of encoders that
was trained to tell which picture belongs to which text. ``LossGateScorer`` draws nothing and is weaker.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from statistics import fmean, pvariance
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from ..concept import Concept
from ..corpus import captions_naming, captions_renaming
from ..edit import Gate
from ..hosts.base import Host, TextHost, Word
from ..sampling import latent_shape, pictures_of
from ..scope import ScopedText
from ..stack import ConceptStack, ConceptUse
from .dataset import Photos
from .trainer import Subject, Trainer

_MOST_PHOTOS = 32
_SCORED = 2  # how pictures are scored, counted up where scores of before lack something
_HELD_OUT_DRAW = 2
_NEGATIVE = ""
# Places, light, styles and second things; none asks for a color or a material, which a concept has of its own.
_SCENES = (
    "a photo of a {} on the beach",
    "a photo of a {} in the snow",
    "a {} next to a wooden chair",
    "an oil painting of a {}",
    "a photo of a {} on a city street at night",
    "a {} and a red ball on the grass",
    "a photo of a {} on a table in a kitchen",
    "a pencil drawing of a {}",
    "a {} in a boat on a lake",
    "a photo of a {} in a forest",
    "a {} in front of a blue house",
    "a watercolor of a {} under a tree",
    "a photo of a {} on the moon",
    "a {} beside a cup of coffee",
    "a photo of a {} in a museum",
    "a {} with a mountain in the background",
)
_LATEST = 64  # captions that are looked through; those that the word is looked at in come first in their list
_LONGEST = 14  # words
_DETERMINERS = "an?|the|my|our|his|her|their|your|one|this|that|another"


class Similarity(Protocol):
    """Encoders of pictures and of texts into one space, such as CLIP's."""

    def images(self, pictures: Tensor) -> Tensor:
        """Pictures (n, height, width, 3) in 0..1 -> unit vectors (n, e)."""
        ...

    def texts(self, prompts: Sequence[str]) -> Tensor | None:
        """Unit vectors (n, e) of texts, or None where there is no encoder of texts for that space."""
        ...


@dataclass(frozen=True)
class Score:
    """How good the concept of a step is: ``value``, the higher the better, of what it was made of. ``weak`` ones were
    made without looking at pictures. Scores of one scorer alone can be compared.

    ``pictures`` has for each picture that was looked at its mean cosine to the photos and its cosine to its prompt.
    """

    step: int
    value: float
    image: float | None
    text: float | None
    weak: bool
    pictures: tuple[tuple[float, float], ...] | None = None

    @classmethod
    def of_pictures(cls, step: int, pictures: tuple[tuple[float, float], ...]) -> Score:
        """The score of pictures: the harmonic mean of the means of both cosines."""
        images, texts = zip(*pictures, strict=True)
        image, text = fmean(images), fmean(texts)
        return cls(step, harmonic_mean(image, text), image, text, weak=False, pictures=pictures)

    def error_beside(self, other: Score) -> float:
        """The standard error of the difference between the values of two scores, by the jackknife over their pictures.

        The pictures are of the same prompts and noise, so that what is hard about those counts for both. 0 where no
        pictures were looked at, or there is one alone.
        """
        if self.pictures is None or other.pictures is None or len(self.pictures) != len(other.pictures):
            return 0.0
        own, others = self.pictures, other.pictures
        if len(own) < 2:
            return 0.0

        def value_without(pictures: tuple[tuple[float, float], ...], place: int) -> float:
            return Score.of_pictures(0, pictures[:place] + pictures[place + 1 :]).value

        without = [value_without(own, place) - value_without(others, place) for place in range(len(own))]
        return math.sqrt((len(own) - 1) * pvariance(without))


class Scorer(Protocol):
    """Judges concepts. To be called inside ``host.training()``; leaves the trainer as it was."""

    @property
    def identity(self) -> str:
        """The same for scorers whose scores can be compared."""
        ...

    @property
    def relief(self) -> str | None:
        """What a user can do when memory runs out in it."""
        ...

    def __call__(self, trainer: Trainer, concept: Concept, step: int) -> tuple[Score, Tensor | None]:
        """The score of what was learned in ``step`` steps, and the pictures (n, h, w, 3) that were looked at."""
        ...


class Drawing:
    """Pictures of a concept as its users will draw it, by its file's precision, from noise that is always the same.

    ``prompts`` hold the word. ``size`` of pictures is in pixels; ``batch`` are computed at once. ``between`` is called
    before each step of sampling and may raise to stop.
    """

    def __init__(
        self,
        host: Host,
        prompts: Sequence[str],
        *,
        size: int,
        steps: int = 12,
        guidance: float = 5.0,
        seed: int = 0,
        batch: int = 4,
        gate: Gate | None = None,
        between: Callable[[], None] | None = None,
    ):
        if min(steps, batch, size) < 1:
            raise ValueError(f"steps, batch and size must be at least 1, not {steps}, {batch} and {size}")
        self._host, self.prompts = host, list(prompts)
        self._size, self._steps, self._guidance, self._seed, self._batch = size, steps, guidance, seed, batch
        self._gate, self._between = gate or Gate(), between

    @property
    def settings(self) -> list[object]:
        """All that decides the pictures of a concept, as JSON can hold it."""
        gate = self._gate
        told = [self.prompts, self._size, self._steps, self._guidance, self._seed, gate.bias, gate.temperature]
        return told if (gate.strength, gate.focus_share) == (1, 1) else [*told, gate.strength, gate.focus_share]

    def __call__(self, concept: Concept) -> Tensor:
        """A picture (height, width, 3) in 0..1 of each prompt: (n, height, width, 3), on the CPU."""
        host, word, edit = self._host, _word_of(concept), _stack_of(concept, self._gate).edit()
        with torch.no_grad():
            shape, pictures = latent_shape(host, self._size), []
            for start in range(0, len(self.prompts), self._batch):
                prompts = self.prompts[start : start + self._batch]
                seeds = range(self._seed + start, self._seed + start + len(prompts))
                unwanted = [_NEGATIVE] * len(prompts) if self._guidance != 1 else []
                text = ScopedText(host, concept.scope)([*prompts, *unwanted], word).to(host.device)
                edit.tell_own(text.word)
                pictures.append(pictures_of(host, text, seeds, shape, edit, self._steps, self._guidance, self._between))
            return torch.cat(pictures)


@dataclass(frozen=True)
class Previewed:
    """A scorer that draws nothing, with pictures to look at beside its scores."""

    scorer: Scorer
    drawing: Drawing
    relief: str = "switch previews off"

    @property
    def identity(self) -> str:
        """See ``Scorer``."""
        return self.scorer.identity

    def __call__(self, trainer: Trainer, concept: Concept, step: int) -> tuple[Score, Tensor]:
        """See ``Scorer``."""
        return self.scorer(trainer, concept, step)[0], self.drawing(concept)


class PictureScorer:
    """Draws a concept and compares: the harmonic mean of likeness to the photos and faithfulness to the prompts.

    Both are mean cosines, as CLIP-I and CLIP-T: of each picture to each photo, and to its own prompt with the
    super-category in the word's place. Only together they say something: the first grows for as long as the training
    forgets all prompts for the photos. The concept is drawn as its users will, by its file's precision and the usual
    gate, from noise that is the same each time.

    ``prompts`` hold the word. ``photos``, each (height, width, 3) in 0..1, are best cropped as training crops them.
    Left out, those that training has are decoded: cropped, and with the decoder's traces that drawn pictures have too.
    ``size`` of pictures is in pixels. ``between`` is called before each step of sampling and may raise to stop.

    Raises ValueError when the encoders know no texts, or there are no prompts.
    """

    relief = "leave out the encoders that judge the pictures"

    def __init__(
        self,
        host: Host,
        similarity: Similarity,
        photos: Sequence[Tensor] | None,
        prompts: Sequence[str],
        *,
        size: int,
        steps: int = 12,
        guidance: float = 5.0,
        seed: int = 0,
        batch: int = 4,
        gate: Gate | None = None,
        between: Callable[[], None] | None = None,
    ):
        if not prompts:
            raise ValueError("no prompts to judge the concept by: give one to eight that hold its word")
        texts = similarity.texts(prompts)
        if texts is None:
            raise ValueError(
                "without embeddings of texts the best step cannot be chosen, since likeness to the photos alone grows "
                "with overfitting: connect the text encoder that belongs to the image encoder (a CLIP with its text "
                "projection), or leave out both"
            )
        self._host, self._similarity = host, similarity
        self.draw = Drawing(
            host,
            prompts,
            size=size,
            steps=steps,
            guidance=guidance,
            seed=seed,
            batch=batch,
            gate=gate,
            between=between,
        )
        self._photos = None if photos is None else self._embedded(photos)
        self._texts: dict[str, Tensor] = {}
        settings = [*self.draw.settings, photos is None]
        told = json.dumps([_SCORED, settings, (100 * texts.float().mean(0)).round().int().tolist()])
        self.identity = f"pictures {sha256(told.encode()).hexdigest()[:16]}"

    def __call__(self, trainer: Trainer, concept: Concept, step: int) -> tuple[Score, Tensor]:
        """See ``Scorer``."""
        with torch.no_grad():
            if self._photos is None:
                self._photos = self._embedded(self._decoded(trainer.photos))
            pictures = self.draw(concept)
            embedded = self._similarity.images(pictures).float().cpu()
            images = (embedded @ self._photos.T).mean(1)
            texts = (embedded * self._plain_texts(concept)).sum(-1)
        return Score.of_pictures(step, tuple(zip(images.tolist(), texts.tolist(), strict=True))), pictures

    def _decoded(self, photos: Photos) -> list[Tensor]:
        latents = [latent for bucket in photos.own for latent in bucket.latents.split(1)]
        chosen = torch.linspace(0, len(latents) - 1, min(len(latents), _MOST_PHOTOS)).round().long()
        return [self._host.decode_latents(latents[k].to(self._host.device))[0] for k in chosen.tolist()]

    def _embedded(self, photos: Sequence[Tensor]) -> Tensor:
        if not len(photos):
            raise ValueError("no photos to compare pictures with")
        return torch.cat([self._similarity.images(photo[None, ..., :3].float()).float().cpu() for photo in photos])

    def _plain_texts(self, concept: Concept) -> Tensor:
        """Embeddings (n, e) of the prompts with the super-category in the word's place."""
        kind = concept.super_category
        if kind not in self._texts:
            plain = [renamed(prompt, concept.placeholder, kind) for prompt in self.draw.prompts]
            embedded = self._similarity.texts(plain)
            if embedded is None:
                raise ValueError("the text encoder that pictures are judged by has gone")
            self._texts[kind] = embedded.float().cpu()
        return self._texts[kind]


@dataclass
class LossGateScorer:
    """Judges without drawing: how much the loss fell on noise that is never trained on, and how selective the gate is.

    The product of two shares. The first: how far the loss of the concept lies below that of the plain super-category,
    on the photos. The second: how open the gate is on the word in ``prompts`` that were not trained on, times how shut
    it is on the other word of each that opens it most.

    Weaker than looking at pictures: the loss is that of the photos, so that it sees no overfitting until the gate does;
    it knows nothing of what a prompt's other words have become in the picture. It leans to late steps.
    """

    prompts: Sequence[str]
    samples: int = 32
    gate: Gate = field(default_factory=Gate)
    relief: str | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("no prompts to look at the gate in: give one to eight that hold the concept's word")
        self._plain: tuple[Trainer, float] | None = None

    @property
    def identity(self) -> str:
        """See ``Scorer``."""
        settings = json.dumps([list(self.prompts), self.samples, self.gate.bias, self.gate.temperature])
        return f"loss and gate {sha256(settings.encode()).hexdigest()[:16]}"

    def __call__(self, trainer: Trainer, concept: Concept, step: int) -> tuple[Score, None]:
        """See ``Scorer``."""
        stack = _stack_of(concept, self.gate)
        loss = trainer.loss_on(_HELD_OUT_DRAW, self.samples, _word_of(concept), stack.edit())
        fallen = max(0.0, 1 - loss / self._plain_loss(trainer, concept))
        own, other = gate_openness(trainer.host, concept, self.prompts, self.gate)
        return Score(step, fallen * own * (1 - other), None, None, weak=True), None

    def _plain_loss(self, trainer: Trainer, concept: Concept) -> float:
        """The loss of the super-category itself, by the model as it is."""
        if self._plain is None or self._plain[0] is not trainer:
            word = Word(concept.placeholder, concept.super_category)
            loss = trainer.loss_on(_HELD_OUT_DRAW, self.samples, word, None)
            self._plain = trainer, max(loss, torch.finfo(torch.float32).tiny)
        return self._plain[1]


def gate_openness(host: TextHost, concept: Concept, prompts: Sequence[str], gate: Gate) -> tuple[float, float]:
    """How open the gate is, 0 to 1, on the word in prompts, and on the other token of each that opens it most."""
    edit = _stack_of(concept, gate).edit()
    with torch.no_grad():
        text = ScopedText(host, concept.scope)(prompts, _word_of(concept))
        # Not told where the word is: how well the gate tells it from others by what is in the encodings.
        opened = edit.gates(text.context)
    opened = rearrange(opened, "b m 1 -> b m").cpu()
    own = (opened * text.word).sum(1) / text.word.sum(1).clamp_min(1)
    other = (opened * ~(text.word | text.padding)).amax(1)
    return float(own.mean()), float(other.mean())


def harmonic_mean(a: float, b: float) -> float:
    """Of two numbers, either of which at 0 or below makes it 0."""
    a, b = max(a, 0.0), max(b, 0.0)
    return 2 * a * b / (a + b) if a and b else 0.0


def validation_prompts(host: TextHost, subject: Subject, count: int = 8) -> list[str]:
    """Prompts with the word in place to judge a concept by: the same for the same subject, varied, not trained on.

    From the captions that the host's encoders know, where they know few: those of the super-category that share the
    fewest words. Else scenes that ask for nothing the concept has its own way with, then captions of the corpus.
    """
    word, trained = subject.placeholder, {prompt.lower() for prompt in subject.prompts()}
    if host.captions is not None:
        known = captions_renaming(host.captions, subject.super_category, word)[-_LATEST:]
        known = [text for text in known if text.lower() not in trained]
        simple = [text for text in known if _is_simple(text, word)]
        for choice in (simple, known):
            if len(choice) >= count:
                return _most_varied(choice, count)
    found = [scene.replace("{}", word) for scene in _SCENES]
    if count > len(found) - len(trained):
        # Another seed than that of the captions in which the word is looked at.
        found += captions_naming(word, count + len(trained), seed=1, avoid=[subject.super_category])
    return [text for text in found if text.lower() not in trained][:count]


def _is_simple(text: str, word: str) -> bool:
    """Whether it is short and no adjective stands before the word, which would ask for another look."""
    bare = rf"(?:^|[^\w\s]\s*|\b(?:{_DETERMINERS})\s+){re.escape(word)}"
    return len(text.split()) <= _LONGEST and re.search(bare, text, re.IGNORECASE) is not None


def _most_varied(texts: Sequence[str], count: int) -> list[str]:
    """``count`` of the texts, one after the other that which shares the fewest words with those before."""
    words = [set(re.findall(r"\w+", text.lower())) for text in texts]
    chosen = [0]
    while len(chosen) < count:
        left = [k for k in range(len(texts)) if k not in chosen]
        chosen.append(min(left, key=lambda k: max(len(words[k] & words[c]) / len(words[k] | words[c]) for c in chosen)))
    return [texts[k] for k in chosen]


def renamed(prompt: str, word: str, kind: str) -> str:
    """A prompt with another name for the thing, and the article that goes with it."""
    blank = re.sub(re.escape(word), "\0", prompt, flags=re.IGNORECASE)
    renamed = captions_renaming([blank], "\0", kind)
    return renamed[0] if renamed else blank.replace("\0", kind)


def _word_of(concept: Concept) -> Word:
    return Word(concept.placeholder, concept.super_category, concept.embeddings)


def _stack_of(concept: Concept, gate: Gate) -> ConceptStack:
    return ConceptStack((ConceptUse(concept, gate),))
