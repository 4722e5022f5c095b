"""What the nodes share: the link type, schemas that every supported ComfyUI knows, and errors that name inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from comfy_api.latest import io
from torch import Tensor
from torch.nn.functional import interpolate

from ..perfusion.edit import Gate

Concepts = io.Custom("PERFUSION_CONCEPTS")
Training = io.Custom("PERFUSION_TRAINING")  # perfusion.training.run.Outcome

TradeOffs = io.Custom("PERFUSION_TRADE_OFF")  # perfusion.tradeoff.TradeOff

SHOWN_SIDE = 512
GATE = Gate()  # what a concept's inputs are set to at first

# Keys that older hosts do not know travel in this dictionary, which every host hands to its front end.
ADVANCED = {"advanced": True}


def schema(**settings: Any) -> io.Schema:
    """An ``io.Schema``; settings that the host's version lacks are left out (aliases for the search, for one)."""
    known = {f.name for f in fields(io.Schema)}
    return io.Schema(**{key: value for key, value in settings.items() if key in known})


def small(image: Tensor) -> Tensor:
    """A picture (h, w, c) reduced to ``SHOWN_SIDE`` pixels on its longer side, to be shown."""
    height, width = image.shape[:2]
    scale = min(1.0, SHOWN_SIDE / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    reduced = interpolate(image.movedim(-1, 0)[None].float(), size, mode="bilinear", antialias=True)
    return reduced[0].movedim(0, -1)


def gate_inputs(suffix: str = "", **settings: Any) -> list[io.Input]:
    """Strength, bias and temperature of one concept. ``suffix`` follows their names; ``settings`` go to all three."""
    return [
        io.Float.Input(
            f"strength{suffix}",
            default=GATE.strength,
            min=0.0,
            max=2.0,
            step=0.05,
            tooltip="How strongly keys and values are edited. 0 switches the concept off.",
            **settings,
        ),
        io.Float.Input(
            f"bias{suffix}",
            default=GATE.bias,
            min=-1.0,
            max=2.0,
            step=0.01,
            tooltip="How much of the concept a word must hold before its gate opens. Lower: more faithful to the "
            "photos. Higher: more obedient to the prompt. 0.6 to 0.75 suit local key lock, 0.4 to 0.6 global.",
            **settings,
        ),
        io.Float.Input(
            f"temperature{suffix}",
            default=GATE.temperature,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="How softly the gate opens. Lower: a switch. Higher: a blend.",
            **settings,
        ),
    ]


@contextmanager
def naming(node: str, input_name: str | None = None) -> Iterator[None]:
    """Errors that a user can act on begin with the node, and the input where one is at fault."""

    def place(error: Exception) -> str:
        at_fault = getattr(error, "input_name", input_name)
        return f"{node}, input '{at_fault}'" if at_fault else node

    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place(error)}: {error}") from error
    except OSError as error:
        raise OSError(f"{place(error)}: {error.strerror or error}") from error


def require_checkpoint(node: str, inputs: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the input, where a loader handed on no model, clip or vae."""
    for name in ("model", "clip", "vae"):
        if inputs.get(name) is None:
            raise ValueError(f"{node}, input '{name}': nothing arrived. Connect the checkpoint's own.")


def flat(batches: Sequence[Tensor | None] | None) -> list[Tensor]:
    """The pictures of any number of IMAGE batches, of any sizes, one by one."""
    return [picture for batch in batches or () if batch is not None for picture in batch]
