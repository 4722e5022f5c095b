"""Learning a concept from photos: the word's embeddings, the target values of each layer, what keys are locked to.

Follows Tewel et al. 2023: values learned, the gated edit in place at training as at inference, loss weighted by the
mask of the thing. In the paper keys are locked to the super-category; but of the second thing of a prompt little is
then seen, since the model looks little at its word. Here they are locked to an encoding that starts there and is
learned too, one for all layers, so that keys stay what the model could make of some word. A second part of the loss
keeps the thing's looks from spreading: elsewhere, the prediction is to stay what it is with the super-category.

The trainer knows no host: it calls the protocol of ``perfusion.hosts.base`` and reports through callbacks, between
optimizer steps, which may raise to stop it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from einops import reduce
from torch import Tensor

from ..concept import Concept, check_placeholder
from ..corpus import captions_naming, captions_renaming, paper_templates
from ..edit import Directions, Gate, KeyValueEdit
from ..hosts.base import Encodings, Host, TextHost, Word
from ..scope import ScopedText
from ..statistics import Metric, TextStatistics, WordContexts, directions, word_contexts
from .captions import PhotoCaptions, captions_by_photo, with_placeholder
from .config import TrainingConfig
from .dataset import Photos
from .noise import NoiseLevels
from .prompts import EncodedPrompts

if TYPE_CHECKING:
    from .run import Outcome

logger = logging.getLogger(__name__)

EMA = 0.99  # how slowly the paper's i* follows the embedding
REFRESH = 25  # steps between looks at the word in varied captions, for the robust i*
_FIXED_SAMPLES, _FIXED_DRAW = 8, 1
_CAPTIONS_AT_ONCE = 32
_CAPTIONS_KEPT = 256  # encoded once for the whole training; in SDXL one takes 0.6 MB
_FEWEST_CONTEXTS = 8
_FOLLOWED = ("i_star", "d_star", "e_super")
_WHOLE = 1e-3
_MOMENTS = {"mean": "exp_avg", "square": "exp_avg_sq"}  # of the gradient, as Adam calls them


class TrainingError(ValueError):
    """Training cannot start or go on; the message says what to change. ``outcome`` is what had been learned by then."""

    outcome: Outcome | None = None


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did. ``gate`` is how open the gate is on the concept's word, 0 to 1."""

    step: int
    steps: int
    loss: float
    gate: float


class Callback(Protocol):
    """Called after each optimizer step; may raise to stop the training and may ask the trainer for its concept."""

    def __call__(self, trainer: Trainer, report: StepReport) -> None: ...


@dataclass(frozen=True)
class Subject:
    """What is learned: the word that will stand for it, what kind of thing it is, and the captions to train with.

    ``captions`` have ``{}`` or the placeholder where the word goes; into others it is put by the rule of
    ``training.captions``. ``of_photo`` has captions of its own for each photo, one a line; an empty text leaves a photo
    with the general ones.
    """

    placeholder: str
    super_category: str
    captions: Sequence[str] = field(default_factory=paper_templates)
    of_photo: Sequence[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "placeholder", check_placeholder(self.placeholder))

    def prompts(self) -> list[str]:
        """The general captions with the placeholder in place. Raises TrainingError where there are none."""
        prompts = [with_placeholder(caption, self.placeholder, self.super_category) for caption in self.captions]
        if not prompts:
            raise TrainingError("no captions to train with")
        return prompts

    def captions_of(self, photos: Photos) -> PhotoCaptions:
        """The prompts to train these photos with. Raises TrainingError where captions are not one text for each."""
        given = len(self.of_photo) if self.of_photo else max(photos.kept) + 1
        try:
            every = captions_by_photo(self.of_photo, given, self.placeholder, self.super_category, self.prompts())
            return every.select(photos.kept)
        except (ValueError, IndexError) as error:
            raise TrainingError(str(error)) from error


class Trainer:
    """One training run, to be used inside ``host.training()``.

    ``step`` does one optimizer step, ``concept`` gives what has been learned so far, at any time. ``losses`` and
    ``gates`` hold what each step reported. All randomness comes from the seed of the config. Nothing depends on how
    many steps are still to come, so that a run with more of them goes on from the ``state`` of a shorter one.
    """

    def __init__(
        self, host: Host, photos: Photos, subject: Subject, statistics: TextStatistics, config: TrainingConfig
    ):
        self.host = host
        self.photos = photos
        self.subject = subject
        self.statistics = statistics
        self.config = config
        self.losses: list[float] = []
        self.gates: list[float] = []
        self.generator = torch.Generator().manual_seed(config.seed)
        self.captions = subject.captions_of(photos)
        self._text = ScopedText(host, config.scope, kept=_CAPTIONS_KEPT)
        self._levels = NoiseLevels(host.noise_levels(), config.timesteps)
        self._start()
        self._optimizer = torch.optim.Adam(self._parameter_groups(), betas=(0.9, 0.999))

    @property
    def steps_done(self) -> int:
        """Optimizer steps so far."""
        return len(self.losses)

    @property
    def word(self) -> Word:
        """The concept's word with the embeddings being trained."""
        return Word(self.subject.placeholder, self.subject.super_category, self.embeddings)

    def step(self) -> StepReport:
        """One optimizer step; one that does not come to its end leaves everything as it was before it.

        Raises TrainingError when the loss is no longer a finite number.
        """
        before = self.state()
        try:
            return self._step()
        except BaseException:
            self._go_to(before)
            raise

    def _step(self) -> StepReport:
        config = self.config
        batch = self._draw(config.batch_size, self.generator)
        micro = config.micro_batch or config.batch_size
        self._optimizer.zero_grad(set_to_none=True)
        prompts = self._prompts(batch, self.word, micro, kept=not config.gradient_checkpointing)
        loss = 0.0
        for part in batch.split(micro):
            share = len(part) / config.batch_size
            part_loss = self._loss(part, prompts.of(part.prompt))
            (part_loss * share).backward()
            loss += float(part_loss.detach()) * share
        prompts.backward()
        with torch.no_grad():
            text = prompts.of(batch.prompt)
            encoded = text.context[text.word.to(text.context.device)].float()
            gate = float(self._edit.directions.to(encoded.device).gates(encoded)[1].mean())
        gradients = [parameter.grad for parameter in self._trained.values()]
        if any(gradient is None for gradient in gradients):
            raise TrainingError("no gradient reaches the concept: the model's cross-attention is not the edited one")
        finite = all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)
        if not (math.isfinite(loss) and finite):
            raise TrainingError(
                f"the loss of step {self.steps_done + 1} or its gradient is not a finite number. "
                f"Lower {config.rates_now}, or run the model in 32 bit."
            )
        self._optimizer.step()
        self.losses.append(loss)
        self.gates.append(gate)
        self._follow(encoded.mean(0).cpu())
        return StepReport(self.steps_done, config.steps, loss, gate)

    def run(self, callbacks: Iterable[Callback] = ()) -> Concept:
        """Train up to the configured number of steps and return the concept.

        Its training summary holds the fixed loss before and after.
        """
        callbacks = list(callbacks)
        before = self.fixed_loss()
        while self.steps_done < self.config.steps:
            report = self.step()
            for callback in callbacks:
                callback(self, report)
        concept, after = self.take()
        logger.info("%s: loss on fixed noise %.5f before, %.5f after", self.subject.placeholder, before, after)
        return with_summary(concept, {"fixed_loss": [round(before, 6), round(after, 6)]})

    def concept(self, extra: Mapping[str, object] | None = None) -> Concept:
        """What has been learned so far, in the precision of its file. ``extra`` joins the training summary."""
        return self._concept(*self._directions(self.config.contexts), extra or {})

    def take(self) -> tuple[Concept, float]:
        """The concept so far, and its loss on fixed noise."""
        i_star, d_star = self._directions(self.config.contexts)
        loss = self.loss_on(_FIXED_DRAW, _FIXED_SAMPLES, self.word, self._edit_with(i_star, d_star))
        return self._concept(i_star, d_star, {}), loss

    def fixed_loss(self) -> float:
        """The error at the thing on noise, noise levels, photos and captions that are always the same: comparable
        between steps. What a step reports has more in it, where something is to be preserved.
        """
        return self.loss_on(_FIXED_DRAW, _FIXED_SAMPLES, self.word, self._edit)

    def loss_on(self, draw: int, samples: int, word: Word, edit: KeyValueEdit | None) -> float:
        """The error at the thing of any word and edit, without gradient, on ``samples`` draws: the same ones for the
        same ``draw``.

        Training itself has others: ``draw``, 1 or more, is added to its seed.
        """
        with torch.no_grad():
            generator = torch.Generator().manual_seed(self.config.seed + draw)
            at_once = self.config.micro_batch or self.config.batch_size
            total = 0.0
            # A draw is of photos of one shape: as many draws as there are shapes.
            for some in torch.arange(samples).chunk(len(self.photos.buckets)):
                batch = self._draw(len(some), generator)
                prompts = self._prompts(batch, word, at_once)
                for part in batch.split(at_once):
                    total += float(self._error(part, prompts.of(part.prompt), edit)) * len(part)
            return total / samples

    def summary(self, step: int) -> dict[str, object]:
        """The training summary of the concept as it was after ``step`` steps."""
        photos = self.photos
        return {
            **asdict(self.config),
            "steps_done": step,
            "photos": photos.photographed,
            "companions": photos.made,
        }

    def context_captions(self) -> list[str]:
        """The captions in which the word is looked at, to find it in any prompt."""
        return self._contexts(self.config.contexts)

    def state(self) -> dict[str, Tensor]:
        """A copy of all that decides the steps to come, besides photos, texts, model and settings."""
        moments = {p: self._optimizer.state[p] for p in self._trained.values() if p in self._optimizer.state}
        state = {
            "generator": self.generator.get_state(),
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "gates": torch.tensor(self.gates, dtype=torch.float64),
            "rates": torch.tensor([group["lr"] for group in self._optimizer.param_groups], dtype=torch.float64),
            **{name: getattr(self, name).clone() for name in _FOLLOWED},
        }
        for name, parameter in self._trained.items():
            state[name] = parameter.detach().clone()
            for key, moment in _MOMENTS.items():
                known = parameter in moments
                state[f"{name}.{key}"] = moments[parameter][moment].clone() if known else torch.zeros_like(state[name])
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` gave. Raises ValueError, changing nothing, for anything else."""
        self._require_own(state)
        self._go_to(state)

    def _go_to(self, state: Mapping[str, Tensor]) -> None:
        steps = len(state["losses"])
        self.generator.set_state(state["generator"].cpu())
        self.losses, self.gates = state["losses"].tolist(), state["gates"].tolist()
        for group, rate in zip(self._optimizer.param_groups, state["rates"].tolist(), strict=True):
            group["lr"] = rate
        for name in _FOLLOWED:
            setattr(self, name, state[name].to(getattr(self, name), copy=True))
        self._optimizer.state.clear()
        for name, parameter in self._trained.items():
            with torch.no_grad():
                parameter.copy_(state[name])
            if steps:
                moments = {moment: state[f"{name}.{key}"].to(parameter, copy=True) for key, moment in _MOMENTS.items()}
                self._optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **moments}
        self._locate()

    def _require_own(self, state: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless it can be a state of this very training."""
        own = self.state()
        if set(state) != set(own):
            odd = sorted(str(name)[:60] for name in set(state) ^ set(own))
            raise ValueError(f"missing or unknown: {', '.join(odd[:4])}")
        steps = state["losses"].numel()
        for name, tensor in state.items():
            shape, dtype = (steps,) if name in ("losses", "gates") else tuple(own[name].shape), own[name].dtype
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not {dtype} of {shape}")
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(f"{name} holds numbers that are not finite")

    def _start(self) -> None:
        """Everything starts at the super-category: embeddings, target values, i*, and what keys are locked to."""
        host, subject, config = self.host, self.subject, self.config
        rows = require_words(host, subject)
        self.embeddings = {name: _resample(r, config.vectors).requires_grad_() for name, r in rows.items()}
        unchanged = all(torch.equal(rows[name], self.embeddings[name]) for name in rows)
        plain = Word(subject.placeholder, subject.super_category)
        contexts = self._word_contexts(config.contexts, plain, last_only=True)
        self.e_super = contexts.own.mean(0)
        same = unchanged and config.vectors == 1
        self.i_star, self.d_star = self._directions(config.contexts, contexts if same else None)
        self._paper_metric: Metric | None = self.statistics.metric() if config.estimator == "paper" else None
        self._anchors = host.project_values(self.e_super.unsqueeze(0))
        self.o_star_v = {layer: values.detach().clone().requires_grad_() for layer, values in self._anchors.items()}
        self.e_key = self.e_super.unsqueeze(0).clone().requires_grad_() if config.key_rate else None
        self._locate()
        self._require_words_in_reach()
        self._text.prepare(self.captions.prompts, self.word, plain=config.preservation > 0)

    def _require_words_in_reach(self) -> None:
        """Raise TrainingError for a caption whose word the encoder would not see, before anything is learned."""
        subject = self.subject
        short = {with_placeholder(text, subject.placeholder, subject.super_category) for text in paper_templates()}
        others = [prompt for prompt in self.captions.prompts if prompt not in short]
        for start in range(0, len(others), _CAPTIONS_AT_ONCE):
            prompts = others[start : start + _CAPTIONS_AT_ONCE]
            with torch.no_grad():
                inside = self.host.encode(prompts, self.word).word.any(dim=1)
            for prompt, found in zip(prompts, inside, strict=True):
                if not found:
                    raise TrainingError(
                        f"the caption {prompt[:60]!r}... is too long: {self.subject.placeholder} lies beyond its first "
                        "75 tokens. Move it to the front, or shorten the caption."
                    )

    @property
    def _trained(self) -> dict[str, Tensor]:
        """All that the optimizer changes, by name, in its order."""
        embeddings = {f"embedding.{name}": rows for name, rows in self.embeddings.items()}
        values = {f"o_star_v.{layer}": values for layer, values in self.o_star_v.items()}
        return embeddings | values | ({} if self.e_key is None else {"e_key": self.e_key})

    def _parameter_groups(self) -> list[dict]:
        """One group a tensor: relative rates are shares of its own initial size."""
        config = self.config
        relative = config.rates == "relative"
        scale = self.host.embedding_scale()
        groups = [
            {"params": [rows], "lr": config.embedding_rate * (scale[name] if relative else 1.0)}
            for name, rows in self.embeddings.items()
        ]
        for values in self.o_star_v.values():
            size = float(values.detach().pow(2).mean().sqrt())
            groups.append({"params": [values], "lr": config.value_rate * (size if relative else 1.0)})
        if self.e_key is not None:
            size = float(self.e_super.pow(2).mean().sqrt())
            groups.append({"params": [self.e_key], "lr": config.key_rate * (size if relative else 1.0)})
        return groups

    def _contexts(self, count: int) -> list[str]:
        """Captions in which the word is looked at: varied ones, the encoders' own if any, or the paper's short ones."""
        if self.config.estimator == "paper":
            return [template.replace("{}", self.subject.placeholder) for template in paper_templates()]
        if self.host.captions is not None:
            own = captions_renaming(self.host.captions, self.subject.super_category, self.subject.placeholder)
            if len(own) >= _FEWEST_CONTEXTS:
                return own[:count]
        return captions_naming(self.subject.placeholder, count)

    def _concept(self, i_star: Tensor, d_star: Tensor, extra: Mapping[str, object]) -> Concept:
        return Concept.rounded(
            family=self.host.family,
            placeholder=self.subject.placeholder,
            super_category=self.subject.super_category,
            embeddings=self.embeddings,
            i_star=i_star,
            d_star=d_star,
            e_super=self.e_super,
            e_key=None if self.e_key is None else self.e_key.squeeze(0),
            o_star_v={layer: (o - self._anchors[layer]).squeeze(0) for layer, o in self.o_star_v.items()},
            anchored=True,
            scope=self.config.scope,
            focus=self.config.focus,
            form=self.config.form,
            estimator=self.config.estimator,
            training={**self.summary(self.steps_done), **extra},
        )

    def _word_contexts(self, count: int, word: Word, *, last_only: bool = False) -> WordContexts:
        alone = self.config.scope == "word"
        return word_contexts(self.host, self._contexts(count), word, last_only=last_only, own_only=alone)

    def _directions(self, contexts: int, known: WordContexts | None = None) -> tuple[Tensor, Tensor]:
        if self.config.estimator == "paper" and self.losses:
            return self.i_star, self.d_star
        own, behind = known or self._word_contexts(contexts, self.word)
        return directions(own, self.statistics, self.config.estimator, behind)

    def _follow(self, mean: Tensor) -> None:
        """Let i* and d* follow the embedding: the paper's moving average, or a look at varied captions now and then."""
        if self._paper_metric is not None:
            self.i_star = EMA * self.i_star + (1 - EMA) * mean
            self.d_star = self._paper_metric.dual(self.i_star)
        elif self.steps_done % REFRESH == 0:
            self.i_star, self.d_star = self._directions(max(_FEWEST_CONTEXTS, self.config.contexts // 4))
        else:
            return
        self._locate()

    def _locate(self) -> None:
        """Put the current i* and d* into the edit."""
        self._edit = self._edit_with(self.i_star, self.d_star)

    def _edit_with(self, i_star: Tensor, d_star: Tensor) -> KeyValueEdit:
        """The edit that is being learned, with these i* and d*."""
        gate = Gate(self.config.bias, self.config.temperature)
        directions_ = Directions.of(
            i_star.unsqueeze(0),
            d_star.unsqueeze(0),
            [gate],
            [self.config.form],
            confined=[self.config.scope == "word"],
        )
        return KeyValueEdit(
            directions_,
            self.e_super.unsqueeze(0),
            self.o_star_v,
            numbers=[1],
            focus=[self.config.focus],
            e_key=self.e_key,
        )

    def _draw(self, count: int, generator: torch.Generator) -> _Batch:
        photo = self.photos.draw(count, generator)
        prompt = self.captions.draw(photo, generator)
        level = self._levels.draw(count, generator)
        flipped = (torch.rand(count, generator=generator) < 0.5) & self.config.flip
        noise = torch.randn((count, *self.photos.shape(photo)), generator=generator)
        return _Batch(photo, flipped, prompt, level, noise)

    def _prompts(self, batch: _Batch, word: Word, at_once: int, *, kept: bool = True) -> EncodedPrompts:
        """The prompts of a batch, encoded; see ``EncodedPrompts``."""
        texts = {k: self.captions.prompts[k] for k in batch.prompt.unique().tolist()}
        return EncodedPrompts(lambda some: self._text(some, word), texts, at_once, kept=kept)

    def _loss(self, batch: _Batch, text: Encodings) -> Tensor:
        """What a step lowers: the error at the thing, and how far the prediction elsewhere drifts from the model's own.

        The model's own is its prediction of the same noisy photo with the super-category in the word's place.
        """
        noised = self._noised(batch)
        elsewhere, own = 1 - noised.weights / noised.weights.amax((1, 2, 3), keepdim=True), None
        # A mask of the whole photo comes out of resizing as ones to the last digits.
        if self.config.preservation and bool((elsewhere > _WHOLE).any()):
            prompts = [self.captions.prompts[number] for number in batch.prompt.tolist()]
            with torch.no_grad():
                own = self._prediction(noised, self._text.plain(prompts, self.word), None)
        # Last, for the backward pass may compute blocks again, with the edit that was in use last.
        found = self._prediction(noised, text, self._edit)
        loss = noised.error(found, noised.clean, noised.weights)
        return loss if own is None else loss + self.config.preservation * noised.error(found, own, elsewhere)

    def _error(self, batch: _Batch, text: Encodings, edit: KeyValueEdit | None) -> Tensor:
        """Mask-weighted error of the network's prediction with these encodings, mean over the batch."""
        noised = self._noised(batch)
        return noised.error(self._prediction(noised, text, edit), noised.clean, noised.weights)

    def _noised(self, batch: _Batch) -> _Noised:
        device = self.host.device
        clean, weights = (tensor.to(device) for tensor in self.photos.pick(batch.photo, batch.flipped))
        sigma = self._levels.sigmas[batch.level].to(device)
        spread = sigma.view(-1, 1, 1, 1)
        # eps = (x_t - x0) / sigma
        factor = self._levels.factor(spread, self.host.prediction) / spread
        noisy = clean + spread * batch.noise.to(device)
        return _Noised(noisy, clean, weights, sigma, factor, self.photos.sizes(batch.photo))

    def _prediction(self, noised: _Noised, text: Encodings, edit: KeyValueEdit | None) -> Tensor:
        """What noised photos are without noise, as the network has it: (b, c, h, w), float32."""
        if edit is not None:
            edit.tell_own(text.word)
        return self.host.denoise(noised.noisy, noised.sigma, text, edit, noised.sizes).float()


def require_words(host: TextHost, subject: Subject) -> dict[str, Tensor]:
    """Encoder -> embedding rows (n, width) of the super-category. Raises TrainingError where there are none."""
    rows = host.token_embeddings(subject.super_category)
    if "<" in subject.super_category or not all(len(r) for r in rows.values()):
        raise TrainingError(
            f"super-category {subject.super_category!r} is no word for the text encoder: "
            "write what kind of thing it is, such as teddy bear, cat or chair"
        )
    return rows


def with_summary(concept: Concept, extra: Mapping[str, object]) -> Concept:
    """The same concept with more in its training summary."""
    return replace(concept, training={**concept.training, **extra})


@dataclass(frozen=True)
class _Batch:
    photo: Tensor
    flipped: Tensor
    prompt: Tensor
    level: Tensor
    noise: Tensor

    def __len__(self) -> int:
        return len(self.photo)

    def split(self, size: int) -> list[_Batch]:
        parts = zip(*(tensor.split(size) for tensor in vars(self).values()), strict=True)
        return [_Batch(*tensors) for tensors in parts]


@dataclass(frozen=True)
class _Noised:
    """Photos without noise, ``clean``, and with it, ``noisy``, at levels ``sigma`` (b,): (b, c, h, w). ``weights`` of
    their places (b, 1, h, w), and the ``factor`` (b, 1, 1, 1) by which errors count at these levels."""

    noisy: Tensor
    clean: Tensor
    weights: Tensor
    sigma: Tensor
    factor: Tensor
    sizes: Tensor

    def error(self, found: Tensor, right: Tensor, weights: Tensor) -> Tensor:
        """Mean square of how far two such photos (b, c, h, w) differ, by weights."""
        return reduce(weights * ((found - right) * self.factor) ** 2, "b c h w -> ", "mean")


def _resample(rows: Tensor, count: int) -> Tensor:
    """``count`` embeddings that say the same as the rows (n, width) of the super-category: averaged or repeated."""
    if count <= len(rows):
        return torch.stack([part.mean(0) for part in torch.tensor_split(rows, count)])
    return rows[torch.arange(count) * len(rows) // count].clone()


def train(
    host: Host,
    photos: Photos,
    subject: Subject,
    statistics: TextStatistics,
    config: TrainingConfig,
    callbacks: Iterable[Callback] = (),
    prepared: Callable[[Trainer], None] | None = None,
) -> tuple[Concept, Trainer]:
    """A whole run inside ``host.training()``: the concept and the trainer that made it, with its losses."""
    with host.training(gradient_checkpointing=config.gradient_checkpointing):
        trainer = Trainer(host, photos, subject, statistics, config)
        if prepared is not None:
            prepared(trainer)
        return trainer.run(callbacks), trainer
