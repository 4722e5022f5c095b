"""Concepts one by one, in a chain: each node takes concepts and hands them on with one more, or with other settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..perfusion.concept import Concept
from ..perfusion.edit import MAX_FOCUS_SHARE, Gate
from ..perfusion.hosts.comfyui import library
from ..perfusion.locking import LOCKS
from ..perfusion.stack import ConceptStack, ConceptUse
from .common import Concepts, gate_inputs, naming, schema

LOAD, SETTINGS = "Load Concept", "Concept Settings"
BY_APPLY = "as Apply Concepts"


def _settings() -> list[io.Input]:
    """How one concept is applied."""
    return [
        io.Boolean.Input("on", default=True, tooltip="Off: as if the concept were not there."),
        *gate_inputs(),
        io.Combo.Input(
            "key_lock",
            options=[BY_APPLY, *LOCKS],
            default=BY_APPLY,
            tooltip="How this concept's keys are locked, whatever Apply Concepts says for the others. local: more "
            "faithful. global: richer scenes, more variation.",
        ),
        io.Float.Input(
            "start",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="From which part of sampling on the concept is in. 0: from the beginning. Later: the prompt alone "
            "makes the layout.",
        ),
        io.Float.Input(
            "end",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Up to which part of sampling the concept is in. 1: to the end.",
        ),
        io.Mask.Input(
            "region",
            optional=True,
            tooltip="Where in the picture the model may look for the concept's word: white. A mask of the whole "
            "picture, of any size. Regions of two concepts may overlap.",
        ),
    ]


def _later() -> list[io.Input]:
    """What came later than all other inputs, and so stands behind them: saved workflows tell widgets by their order."""
    return [
        io.Float.Input(
            "focus_share",
            default=1.0,
            min=0.0,
            max=MAX_FOCUS_SHARE,
            step=0.05,
            optional=True,
            tooltip="How much of the focus it was trained with the concept's word has. 1: as trained. Lower: the rest "
            "of the prompt gets more room. 0: the model looks at it as much as by itself.",
        )
    ]


def _changes(node: str, settings: dict[str, Any]) -> Callable[[ConceptUse], ConceptUse]:
    """What the settings make of a concept's use."""
    region = settings.get("region")
    with naming(node, "region"):
        region = None if region is None else _region(region)
    strength = settings["strength"] if settings["on"] else 0.0
    with naming(node, "focus_share"):
        gate = Gate(settings["bias"], settings["temperature"], strength, settings.get("focus_share", 1.0))
    fixed = settings["key_lock"] != BY_APPLY
    further: dict[str, Any] = {"lock": settings["key_lock"]} if fixed else {}

    def change(use: ConceptUse) -> ConceptUse:
        return replace(
            use,
            gate=gate,
            lock_fixed=fixed,
            start=settings["start"],
            end=settings["end"],
            region=region if region is not None else use.region,
            **further,
        )

    return change


def _region(mask: Tensor) -> Tensor:
    """(height, width) of a MASK, the first of several."""
    return mask.reshape(-1, *mask.shape[-2:])[0].detach().float().cpu().clamp(0, 1)


class PerfusionLoadConcept(io.ComfyNode):
    """Adds the concept of one file to those that arrive."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ``web/docs/PerfusionLoadConcept.md``."""
        return schema(
            node_id="PerfusionLoadConcept",
            display_name="Load Concept",
            category="Perfusion/concepts",
            description="Loads one concept with all its settings, and hands it on together with those that arrive: "
            "chain one for each.",
            search_aliases=["perfusion load", "concept loader", "stack", "lora stack", "region", "schedule"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=library.names(),
                    tooltip="A concept file from models/perfusion or output/perfusion. Press R to refresh the list.",
                ),
                *_settings(),
                Concepts.Input("concepts", optional=True, tooltip="Concepts to go along with, from a node like this."),
                *_later(),
            ],
            outputs=[Concepts.Output(display_name="concepts", tooltip="For Apply Concepts, or the next of the chain.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None, on: bool | None = True) -> bool | str:
        """Find out about a missing file before anything runs, unless it is off; what is linked is not known yet."""
        try:
            if on and file is not None:
                library.find(file)
        except ValueError as error:
            return f"{LOAD}, input 'file': {error}"
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None, **_: Any) -> str:
        """Changes when the file does."""
        return "" if file is None else library.stamp(file)

    @classmethod
    def execute(cls, file: str, concepts: ConceptStack | None = None, **settings: Any) -> io.NodeOutput:
        """Read the file, unless the concept is off."""
        stack = concepts or ConceptStack()
        if not settings["on"]:
            return io.NodeOutput(stack)
        with naming(LOAD, "file"):
            concept: Concept = library.read(file)
        with naming(LOAD):
            return io.NodeOutput(stack + ConceptStack((_changes(LOAD, settings)(ConceptUse(concept)),)))


class PerfusionConceptSettings(io.ComfyNode):
    """Changes how concepts that arrive are applied."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ``web/docs/PerfusionConceptSettings.md``."""
        return schema(
            node_id="PerfusionConceptSettings",
            display_name="Concept Settings",
            category="Perfusion/concepts",
            description="Sets strength, bias, temperature, key lock, schedule and region of one concept, or of all "
            "that arrive.",
            search_aliases=["perfusion", "concept strength", "region", "schedule", "bias", "temperature"],
            inputs=[
                Concepts.Input("concepts", tooltip="From Train Concept, Load Concepts or any node that hands them on."),
                io.String.Input(
                    "word",
                    default="",
                    tooltip="The concept's word, such as <my-teddy>. Left empty, all concepts that arrive are set.",
                ),
                *_settings(),
                *_later(),
            ],
            outputs=[Concepts.Output(display_name="concepts", tooltip="The same concepts, with these settings.")],
        )

    @classmethod
    def execute(cls, concepts: ConceptStack, word: str, **settings: Any) -> io.NodeOutput:
        """The stack with other settings."""
        change = _changes(SETTINGS, settings)
        with naming(SETTINGS, "word"):
            return io.NodeOutput(concepts.changed(word, change))


NODES = [PerfusionLoadConcept, PerfusionConceptSettings]
