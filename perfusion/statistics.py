"""Second moments of text encodings, and from them a concept's target input i* and dual vector d*.

C = E[e e^T] is the uncentered second moment of the encodings of many captions' tokens, by the very text encoder in use.
It is the metric in which "how much of the concept is in this token" is measured: d* = C^-1 i* (Tewel et al. 2023,
after Meng et al. 2022). Its scale cancels everywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from einops import einsum
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .corpus import load_captions
from .files import write_atomically
from .hosts.base import Encodings, TextHost, Word

logger = logging.getLogger(__name__)

Estimator = Literal["robust", "paper"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

MAX_CONDITION = 1e10
_CACHE_FORMAT = "1"
_BATCH = 32


class SecondMoment:
    """A streaming, weighted C = E[e e^T] over text encodings of width d, in float64."""

    def __init__(self, width: int):
        self.total = torch.zeros(width, width, dtype=torch.float64)
        self.weight = 0.0
        self.count = 0
        self._fourth = 0.0  # sum of w |e|^4, for the shrinkage
        self._weight_squared = 0.0

    def update(self, encodings: Tensor, weights: Tensor | None = None) -> None:
        """Add encodings (n, d) with weights (n,), 1 each by default."""
        e = encodings.detach().to("cpu", torch.float64)
        w = torch.ones(len(e), dtype=torch.float64) if weights is None else weights.to("cpu", torch.float64)
        self.total += einsum(e * w[:, None], e, "n a, n b -> a b")
        self.weight += float(w.sum())
        self._weight_squared += float((w**2).sum())
        self._fourth += float((w * (e**2).sum(-1) ** 2).sum())
        self.count += len(e)

    @property
    def matrix(self) -> Tensor:
        """C (d, d), float64. Raises ValueError before the first update."""
        if self.weight <= 0:
            raise ValueError("no text encodings were added: the second moment is not defined")
        return self.total / self.weight

    def shrinkage(self) -> float:
        """The weight of the scaled identity that minimises the expected squared error (Ledoit and Wolf 2004)."""
        c = self.matrix
        width = len(c)
        spread = float((c**2).sum() - c.trace() ** 2 / width)
        samples = self.weight**2 / self._weight_squared
        noise = (self._fourth / self.weight - float((c**2).sum())) / samples
        return 1.0 if spread <= 0 else min(1.0, max(0.0, noise / spread))


@dataclass(frozen=True)
class Metric:
    """A matrix (d, d) in which text encodings are compared, by its Cholesky factor, float64."""

    factor: Tensor

    def dual(self, i_star: Tensor) -> Tensor:
        """d* = C^-1 i* (d,), float32, with its largest component at 1: its scale cancels, and half precision keeps
        it best there."""
        d_star = torch.cholesky_solve(i_star.double().unsqueeze(-1), self.factor).squeeze(-1)
        return (d_star / d_star.abs().max()).float()


@dataclass(frozen=True)
class TextStatistics:
    """The second moment of one text encoder: C (d, d) after shrinkage, float64, and where it comes from."""

    c: Tensor
    tokens: int
    captions: int
    shrinkage: float
    fingerprint: str

    @classmethod
    def of(
        cls, moment: SecondMoment, captions: int, fingerprint: str, shrinkage: float | None = None
    ) -> TextStatistics:
        """C = (1 - s) C + s tr(C)/d 1, with the Ledoit-Wolf s unless one is given."""
        c = moment.matrix
        s = moment.shrinkage() if shrinkage is None else shrinkage
        c = (1 - s) * c + s * c.trace() / len(c) * torch.eye(len(c), dtype=c.dtype)
        return cls(c=c, tokens=moment.count, captions=captions, shrinkage=s, fingerprint=fingerprint)

    @property
    def condition_number(self) -> float:
        """Largest over smallest eigenvalue of C."""
        values = torch.linalg.eigvalsh(self.c)
        return float(values[-1] / values[0].clamp_min(torch.finfo(values.dtype).tiny))

    def metric(self, within: Tensor | None = None) -> Metric:
        """C, or C + C_within, ready to be inverted. Raises ValueError when that cannot be done safely."""
        matrix = self.c if within is None else self.c + within
        values = torch.linalg.eigvalsh(matrix)
        condition = float(values[-1] / values[0]) if values[0] > 0 else float("inf")
        if not condition < MAX_CONDITION:
            raise ValueError(
                f"the second moment of the text encodings has condition number {condition:.1e}: it cannot be inverted. "
                f"Use more captions (it saw {self.captions}) or more shrinkage (now {self.shrinkage:.2g})."
            )
        return Metric(torch.linalg.cholesky(matrix))

    def save(self, path: Path) -> None:
        """Write atomically. C stays in float64: a run from the cache must equal the one that measured it."""
        metadata = {
            "perfusion.statistics": _CACHE_FORMAT,
            "tokens": str(self.tokens),
            "captions": str(self.captions),
            "shrinkage": repr(self.shrinkage),
            "fingerprint": self.fingerprint,
        }
        write_atomically(path, {"c": self.c}, metadata, overwrite=True)

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> TextStatistics | None:
        """What ``save`` wrote for this text encoder, or None when there is nothing usable (then compute it anew)."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("perfusion.statistics") != _CACHE_FORMAT or metadata.get("fingerprint") != fingerprint:
                    return None
                c = file.get_tensor("c").double()
            if c.ndim != 2 or c.shape[0] != c.shape[1] or not c.isfinite().all():
                return None
            return cls(
                c=c,
                tokens=int(metadata["tokens"]),
                captions=int(metadata["captions"]),
                shrinkage=float(metadata["shrinkage"]),
                fingerprint=fingerprint,
            )
        except (OSError, SafetensorError, KeyError, ValueError):
            return None


def token_weights(encodings: Encodings) -> Tensor:
    """How much each token (b, m) counts in C: 1, but all padding of a caption together counts as one token.

    Padding fills most of a context; counted one by one it would drown the words, left out it could open gates.
    """
    padding = encodings.padding.float()
    share = padding / padding.sum(dim=-1, keepdim=True).clamp_min(1)
    return torch.where(encodings.padding, share, torch.ones_like(padding))


def measure(
    host: TextHost,
    captions: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
    shrinkage: float | None = None,
) -> TextStatistics:
    """C over the captions by the host's text encoder. ``progress(done, total)`` may raise to cancel.

    Raises ValueError when there are no captions.
    """
    if not captions:
        raise ValueError("no captions to measure text encodings on: give a file with one caption a line")
    moment = SecondMoment(host.family.context_width)
    for start in range(0, len(captions), _BATCH):
        encodings = host.encode(captions[start : start + _BATCH])
        weights = token_weights(encodings)
        moment.update(encodings.context.flatten(0, 1), weights.flatten())
        if progress is not None:
            progress(min(start + _BATCH, len(captions)), len(captions))
    return TextStatistics.of(moment, len(captions), host.fingerprint, shrinkage)


def captions_for(host: TextHost, path: Path | None, limit: int) -> list[str]:
    """Captions to measure encoders by, ``limit`` at most: those of a file, else the encoders' own, else the package's.

    Raises what ``load_captions`` does.
    """
    if path is None and host.captions is not None:
        return list(host.captions[:limit])
    return load_captions(path, limit=limit)


def cached(
    host: TextHost,
    captions: Sequence[str],
    folder: Path | None,
    progress: Callable[[int, int], None] | None = None,
) -> TextStatistics:
    """``measure``, or what an earlier call left in ``folder`` for the same text encoder and the same captions."""
    if folder is None:
        return measure(host, captions, progress)
    corpus = sha256("\n".join(captions).encode()).hexdigest()[:12]
    path = folder / f"{host.family.name}-{host.fingerprint[:16]}-{corpus}.safetensors"
    statistics = TextStatistics.load(path, host.fingerprint)
    if statistics is not None and len(statistics.c) == host.family.context_width:
        return statistics
    statistics = measure(host, captions, progress)
    logger.info(
        "text statistics: %d tokens of %d captions, shrinkage %.3g, condition number %.3g",
        statistics.tokens,
        statistics.captions,
        statistics.shrinkage,
        statistics.condition_number,
    )
    try:
        statistics.save(path)
    except OSError as error:
        logger.warning("could not keep the text statistics in %s (%s): they will be measured again", folder, error)
    return statistics


class WordContexts(NamedTuple):
    """A word in captions: the encodings (n, d) of its own tokens, float32, and the second moment (d, d), float64, of
    all tokens behind it. In a causal encoder these have seen the word, and hold some of it."""

    own: Tensor
    behind: Tensor


def word_contexts(
    host: TextHost, captions: Iterable[str], word: Word, *, last_only: bool = False, own_only: bool = False
) -> WordContexts:
    """A word in captions that contain it, without gradient.

    ``last_only`` takes a word's last token alone for its own, which in a causal encoder has seen the whole phrase.
    ``own_only`` looks at no token behind the word: for words that these do not hear, whose ``behind`` is zero.

    Raises ValueError when no caption contains the word.
    """
    captions = list(captions)
    found, behind = [], SecondMoment(host.family.context_width)
    for start in range(0, len(captions), _BATCH):
        with torch.no_grad():
            encodings = host.encode(captions[start : start + _BATCH], word, until_word=own_only)
        mask = encodings.word
        if not own_only:
            weights = token_weights(encodings) * ((mask.cumsum(dim=1) > 0) & ~mask)
            behind.update(encodings.context.flatten(0, 1), weights.flatten())
        if last_only:
            mask = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
        found.append(encodings.context[mask.to(encodings.context.device)].float().cpu())
    own = torch.cat(found) if found else torch.empty(0)
    if not len(own):
        raise ValueError(f"none of the captions contains {word.placeholder} within its first tokens")
    return WordContexts(own, behind.matrix if behind.weight else torch.zeros_like(behind.total))


def directions(
    encodings: Tensor, statistics: TextStatistics, estimator: Estimator, behind: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """i* and d* (d,), float32, from encodings (n, d) of the concept's word.

    i* is their mean. "paper": d* = C^-1 i*, the encodings being those of a few short templates.
    "robust": d* = (C + C_within + C_behind)^-1 i*. C_within is the covariance of the word's own encodings over varied
    captions: directions in which the word's encoding changes with its context no longer shut the gate. C_behind (d, d)
    is the second moment of the tokens behind it: what the word leaves in these does not open it, so that a strong
    concept stays at its word. Left out where it is not given.
    """
    e = encodings.double()
    i_star = e.mean(0)
    within = None
    if estimator == "robust" and len(e) > 1:
        deviation = e - i_star
        within = deviation.T @ deviation / (len(e) - 1)
        if behind is not None:
            within = within + behind
    return i_star.float(), statistics.metric(within).dual(i_star)
