"""Settings of a training run. Each field carries its help; nodes and the command line read it from there."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from ..edit import FORMS, MAX_FOCUS, TRAINING_GATE, Form
from ..scope import SCOPES, Scope
from ..statistics import ESTIMATORS, Estimator
from .noise import TIMESTEPS, Timesteps

Rates = Literal["relative", "absolute"]
RATES: tuple[Rates, ...] = get_args(Rates)


# What settings were before there was a choice: for trainings and graphs that were saved without them.
BEFORE: dict[str, Any] = {
    "scope": "prompt",
    "focus": 1.0,
    "companions": 0,
    "timesteps": "uniform",
    "key_rate": 0.0,
    "preservation": 0.0,
}


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainingConfig:
    """All that decides the outcome of a training run, besides photos, masks, captions and the model.

    Raises ValueError, naming the setting, for a value out of range.
    """

    steps: int = _setting(200, "Optimizer steps. The best concepts are often found well before the last step.")
    batch_size: int = _setting(16, "Photos per optimizer step.")
    micro_batch: int = _setting(
        2,
        "Photos computed at once; 0 takes the whole batch. Lower it when memory runs out: "
        "the result of a step stays the same, it only takes longer.",
    )
    resolution: int = _setting(512, "Photos are resized and cropped to this many pixels, a multiple of 64.")
    rates: Rates = _setting(
        "relative",
        "relative: learning rates are shares of the initial size of what is trained, "
        "right for every model. absolute: plain Adam learning rates; the paper has 0.03 for values and 0.006 for "
        "the embedding.",
    )
    value_rate: float = _setting(0.1, "Learning rate of the target values, per step.")
    embedding_rate: float = _setting(0.01, "Learning rate of the word's embedding, per step.")
    bias: float = _setting(TRAINING_GATE.bias, "Gate bias while training.")
    temperature: float = _setting(TRAINING_GATE.temperature, "Gate temperature while training.")
    form: Form = _setting(
        "paper",
        "paper: the concept's part of each token is replaced. preserving: tokens far from "
        "the concept are left exactly alone.",
    )
    estimator: Estimator = _setting(
        "robust",
        "How the concept is found in a prompt. robust: learned from many "
        "varied captions, works anywhere in a prompt. paper: from short ones.",
    )
    scope: Scope = _setting(
        "word",
        "How far the word is heard in a prompt. word: by itself alone; all other words are read as if the "
        "super-category stood there, so that they keep their meaning. prompt: by all words behind it, as in the paper.",
    )
    focus: float = _setting(
        20.0,
        "How many times more the model looks at the word, in training and in use: its looks then come from its values, "
        "also where the model would rather look at other words. 1: as much as by itself, as in the paper.",
    )
    companions: int = _setting(
        5,
        "How many pictures are put together of the photos and of other things, which the model draws: the thing is "
        "then also learned as one of two. 0: from the photos alone, as in the paper.",
    )
    timesteps: Timesteps = _setting(
        "lognormal",
        "At how much noise the concept is learned. lognormal: at some, mostly, where looks are decided, and errors "
        "count as they do in the picture. uniform: at any alike, and errors count as in the noise, as in the paper.",
    )
    key_rate: float = _setting(
        0.02,
        "Learning rate of the word's keys, per step: of the encoding that they are locked to, which starts at the "
        "super-category's. The thing is then itself wherever its word stands in a prompt. 0: keys stay locked to the "
        "super-category, as in the paper.",
    )
    preservation: float = _setting(
        2.0,
        "How much it counts that all but the thing is left as the model draws it for the super-category; this takes "
        "another pass of the network in each step. 0: not at all, as in the paper.",
    )
    contexts: int = _setting(240, "In how many varied captions the word is looked at to find it in any prompt.")
    vectors: int = _setting(1, "How many token embeddings the word has.")
    flip: bool = _setting(True, "Mirror half of the photos. Switch it off for things with writing or a left and right.")
    gradient_checkpointing: bool = _setting(
        False, "Use less memory and take longer: activations are computed again for the backward pass."
    )
    seed: int = _setting(
        0, "The same seed, photos and settings give the same concept on one machine, on CPUs byte for byte."
    )

    def __post_init__(self) -> None:
        def check(name: str, valid: bool, range_: str) -> None:
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {range_}")

        check("steps", 1 <= self.steps <= 100_000, "1 to 100,000")
        check("batch_size", 1 <= self.batch_size <= 256, "1 to 256")
        check("micro_batch", 0 <= self.micro_batch <= 256, "0 to 256")
        check("resolution", 64 <= self.resolution <= 2048 and self.resolution % 64 == 0, "a multiple of 64 up to 2048")
        for rate in ("value_rate", "embedding_rate", "key_rate"):
            check(rate, 0 <= getattr(self, rate) <= 10, "from 0 to 10")
        check("preservation", 0 <= self.preservation <= 100, "from 0 to 100")
        check("temperature", 0.001 <= self.temperature <= 10, "from 0.001 to 10")
        check("bias", -10 <= self.bias <= 10, "from -10 to 10")
        check("contexts", 8 <= self.contexts <= 2000, "8 to 2000")
        check("focus", 1 <= self.focus <= MAX_FOCUS, f"from 1 to {MAX_FOCUS}")
        check("companions", 0 <= self.companions <= 100, "from 0 to 100")
        check("vectors", 1 <= self.vectors <= 32, "1 to 32")
        check("form", self.form in FORMS, f"one of {', '.join(FORMS)}")
        check("timesteps", self.timesteps in TIMESTEPS, f"one of {', '.join(TIMESTEPS)}")
        check("estimator", self.estimator in ESTIMATORS, f"one of {', '.join(ESTIMATORS)}")
        check("scope", self.scope in SCOPES, f"one of {', '.join(SCOPES)}")
        check("rates", self.rates in RATES, f"one of {', '.join(RATES)}")

    @property
    def drawn_at_once(self) -> int:
        """How many guided pictures, of two rows each, take no more memory than a training step."""
        return max(1, (self.micro_batch or self.batch_size) // 2)

    @property
    def rates_now(self) -> str:
        """The learning rates and what they are, for messages on a training that goes wrong."""
        names = ["value_rate", "embedding_rate", *(["key_rate"] if self.key_rate else [])]
        *others, last = [f"{name} (now {getattr(self, name):g})" for name in names]
        return f"{', '.join(others)} and {last}"

    @classmethod
    def help(cls, name: str) -> str:
        """What a setting does, for tooltips and ``--help``."""
        return next(f.metadata["help"] for f in fields(cls) if f.name == name)

    @classmethod
    def paper(cls, **changes: Any) -> TrainingConfig:
        """The paper's own setup as far as it is known: its absolute rates, i* over short templates, 400 steps, the word
        heard by all words behind it and looked at as much as any, its keys the super-category's, photos alone and only
        the thing in them, and any noise alike.
        """
        setup = {
            **BEFORE,  # each of them came as a choice beside the paper's
            "steps": 400,
            "rates": "absolute",
            "value_rate": 0.03,
            "embedding_rate": 0.006,
            "estimator": "paper",
        }
        return cls(**{**setup, **changes})
