"""The structure of a base model as far as concepts depend on it: text encoders, cross-attention layers, widths."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

_NAME = re.compile(r"[a-z0-9_]{1,32}")
_TRANSFORMER = re.compile(r"[a-z_]{1,24}(\.[0-9]{1,2}){1,3}")
_MAX_WIDTH = 16_384
_MAX_BLOCKS = 64
_MAX_TRANSFORMERS = 128

# name -> (ModelSpec architecture, what people call it)
KNOWN = {
    "sd1": ("stable-diffusion-v1", "Stable Diffusion 1.x"),
    "sd2": ("stable-diffusion-v2-768-v", "Stable Diffusion 2.x"),
    "sdxl": ("stable-diffusion-xl-v1-base", "Stable Diffusion XL"),
}
_BY_CONTEXT_WIDTH = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


@dataclass(frozen=True)
class Family:
    """What a concept and a model must share for one to be used on the other.

    ``encoders`` maps a text encoder ("clip_l") to the width of its token embeddings, in the order in which their
    encodings stand side by side in the context. ``transformers`` maps a spatial transformer ("input_blocks.1.1", the
    names of the original latent-diffusion UNet, whatever the host calls it) to (blocks, inner width of its keys).
    """

    name: str
    context_width: int
    encoders: Mapping[str, int]
    transformers: Mapping[str, tuple[int, int]]

    def __post_init__(self) -> None:
        widths = [self.context_width, *self.encoders.values(), *(width for _, width in self.transformers.values())]
        if not all(isinstance(width, int) and 0 < width <= _MAX_WIDTH for width in widths):
            raise ValueError(f"a family's widths must be whole numbers from 1 to {_MAX_WIDTH}")
        if not all(isinstance(n, int) and 0 < n <= _MAX_BLOCKS for n, _ in self.transformers.values()):
            raise ValueError(f"a spatial transformer has 1 to {_MAX_BLOCKS} blocks")
        if not 0 < len(self.encoders) <= 4 or not 0 < len(self.transformers) <= _MAX_TRANSFORMERS:
            raise ValueError("a family has 1 to 4 text encoders and at least one cross-attention layer")
        if not _NAME.fullmatch(self.name) or not all(_NAME.fullmatch(name) for name in self.encoders):
            raise ValueError("names of families and encoders are short words of a-z, 0-9 and _")
        if not all(_TRANSFORMER.fullmatch(name) for name in self.transformers):
            raise ValueError("a spatial transformer is named like input_blocks.1.1")

    @property
    def layers(self) -> dict[str, int]:
        """Cross-attention layer name -> inner width, in the network's order."""
        return {
            f"{transformer}.transformer_blocks.{block}": width
            for transformer, (blocks, width) in self.transformers.items()
            for block in range(blocks)
        }

    @property
    def title(self) -> str:
        """What people call this family."""
        return KNOWN[self.name][1] if self.name in KNOWN else self.name

    @property
    def architecture(self) -> str:
        """ModelSpec architecture identifier of the base model."""
        return KNOWN[self.name][0] if self.name in KNOWN else self.name

    def difference(self, other: Family) -> str | None:
        """Why a concept of this family cannot be used on a model of the other, or None when it can."""
        if self.context_width != other.context_width:
            return (
                f"it was trained for {self.title} (text encodings {self.context_width} wide), "
                f"the model is {other.title} ({other.context_width} wide)"
            )
        if dict(self.encoders) != dict(other.encoders):
            return f"its text encoders are {_names(self.encoders)}, the model's are {_names(other.encoders)}"
        if self.layers != other.layers:
            return (
                f"its cross-attention layers ({len(self.layers)}) are not those of the model ({len(other.layers)}): "
                "the two are of different architectures"
            )
        return None

    def to_json(self) -> str:
        """A compact text form, kept in the metadata of concept files."""
        return json.dumps(
            {
                "name": self.name,
                "context_width": self.context_width,
                "encoders": dict(self.encoders),
                "transformers": {name: list(shape) for name, shape in self.transformers.items()},
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> Family:
        """Read what ``to_json`` wrote. Raises ValueError for anything else."""
        try:
            fields = json.loads(text)
            return cls(
                name=fields["name"],
                context_width=fields["context_width"],
                encoders=dict(fields["encoders"]),
                transformers={name: (blocks, width) for name, (blocks, width) in fields["transformers"].items()},
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a family description: {error!r}") from error


def name_of(context_width: int) -> str:
    """The family's name by the width of its text encodings; 'unet<width>' for networks nobody has named."""
    return _BY_CONTEXT_WIDTH.get(context_width, f"unet{context_width}")


def _names(encoders: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({width})" for name, width in encoders.items())
