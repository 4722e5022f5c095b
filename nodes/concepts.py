"""Saving, loading and applying concepts."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..perfusion.concept import read_header
from ..perfusion.edit import Gate
from ..perfusion.hosts.comfyui import library
from ..perfusion.hosts.comfyui.combined import apply_concepts
from ..perfusion.hosts.comfyui.thumbnails import thumbnail as make_thumbnail
from ..perfusion.hosts.comfyui.workflow import metadata
from ..perfusion.locking import LOCKS, Lock
from ..perfusion.stack import ConceptStack, ConceptUse
from .common import GATE, Concepts, gate_inputs, naming, schema

logger = logging.getLogger(__name__)

MAX_ROWS = 8
NO_FILE = "none"


class PerfusionSaveConcept(io.ComfyNode):
    """Keeps a trained concept as a file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ``web/docs/PerfusionSaveConcept.md``."""
        return schema(
            node_id="PerfusionSaveConcept",
            display_name="Save Concept",
            category="Perfusion/concepts",
            description="Saves a trained concept to output/perfusion, a file of about 35 KB. Nothing is overwritten.",
            search_aliases=["perfusion save", "export concept", "personalization"],
            is_output_node=True,
            inputs=[
                Concepts.Input(
                    "concept", tooltip="The concept to save, from Train Concept. Several are saved one by one."
                ),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="File name, without folders. Left empty, the placeholder is used. A number is added where "
                    "the name is taken by another concept.",
                ),
                io.Image.Input(
                    "thumbnail",
                    optional=True,
                    tooltip="A picture to be kept in the file, which the Model Library shows: its middle, small.",
                ),
                io.Boolean.Input(
                    "workflow",
                    default=True,
                    optional=True,
                    tooltip="Keep this workflow in the file: who drops the file on ComfyUI sees how it was trained. "
                    "Off: nothing of it, such as prompts and names of files, goes along.",
                ),
            ],
            outputs=[
                Concepts.Output(display_name="concept", tooltip="The same concept, to go on with."),
                io.String.Output(display_name="file", tooltip="Name of the saved file, as Load Concepts lists it."),
            ],
        )

    @classmethod
    def execute(
        cls, concept: ConceptStack, name: str, thumbnail: Tensor | None = None, workflow: bool = True
    ) -> io.NodeOutput:
        """Save each concept of the stack."""
        if not len(concept):
            raise ValueError("Save Concept: there is no concept on input 'concept'. Connect Train Concept.")
        with naming("Save Concept", "thumbnail"):
            shown = None if thumbnail is None else make_thumbnail(thumbnail)
        files = []
        for use in concept.uses:
            saved = use.concept if shown is None else use.concept.with_thumbnail(shown)
            extra = metadata(cls.hidden.prompt, cls.hidden.extra_pnginfo, saved.header_room) if workflow else {}
            with naming("Save Concept", "name"):
                word = saved.placeholder.strip("<>")
                stem = f"{name.strip()}-{word}" if name.strip() and len(concept) > 1 else name.strip() or word
                try:
                    path = saved.save_numbered(library.output_folder(), stem, library.searched_before_output(), extra)
                except OSError as error:
                    raise OSError(
                        f"the concept could not be saved: {error.strerror or error}. It is not lost: free some space "
                        "or choose another name and queue again, the training is not repeated."
                    ) from error
            if shown is not None and read_header(path).get("__metadata__", {}).get("modelspec.thumbnail") != shown:
                logger.warning(
                    "Save Concept: %s holds this very concept already and was left as it is, without the new "
                    "thumbnail. Give the file another name, or delete the old one, and queue again.",
                    path.name,
                )
            files.append(path.name)
        return io.NodeOutput(concept, "\n".join(files), ui=ui.PreviewText("\n".join(files)))


class PerfusionLoadConcepts(io.ComfyNode):
    """Reads concept files and sets how each is applied."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ``web/docs/PerfusionLoadConcepts.md``.

        Rows are plain inputs, of which ``web/concept_rows.js`` shows as many as ``count`` says: nested ones would lose
        their values whenever the count changes.
        """
        files = library.names()
        return schema(
            node_id="PerfusionLoadConcepts",
            display_name="Load Concepts",
            category="Perfusion/concepts",
            description="Loads up to 8 concept files, each with its own switch, strength, bias and temperature.",
            search_aliases=["perfusion load", "concept loader", "personalization", "textual inversion", "dreambooth"],
            inputs=[
                io.Int.Input(
                    "count",
                    default=1,
                    min=1,
                    max=MAX_ROWS,
                    tooltip="How many concepts to load; further rows are ignored.",
                ),
                *(entry for number in range(1, MAX_ROWS + 1) for entry in _row(number, files)),
                Concepts.Input(
                    "concepts",
                    optional=True,
                    tooltip="Further concepts, from another Load Concepts or Train Concept, to use with these.",
                ),
            ],
            outputs=[Concepts.Output(display_name="concepts", tooltip="For Apply Concepts.")],
        )

    @classmethod
    def validate_inputs(
        cls,
        count: int,
        file_1: str = NO_FILE,
        file_2: str = NO_FILE,
        file_3: str = NO_FILE,
        file_4: str = NO_FILE,
        file_5: str = NO_FILE,
        file_6: str = NO_FILE,
        file_7: str = NO_FILE,
        file_8: str = NO_FILE,
        on_1: bool = True,
        on_2: bool = True,
        on_3: bool = True,
        on_4: bool = True,
        on_5: bool = True,
        on_6: bool = True,
        on_7: bool = True,
        on_8: bool = True,
    ) -> bool | str:
        """Find out about missing files before anything runs. The host looks the arguments up by name."""
        given = locals()
        for row in _rows({name: value for name, value in given.items() if value is not None}):
            try:
                library.find(row["file"])
            except ValueError as error:
                return f"Load Concepts, input 'file_{row['number']}': {error}"
        return True

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Changes when one of the files does."""
        return "|".join(library.stamp(row["file"]) for row in _rows(inputs))

    @classmethod
    def execute(cls, concepts: ConceptStack | None = None, **inputs: Any) -> io.NodeOutput:
        """Read the files of all rows that are on."""
        uses = []
        for row in _rows(inputs):
            with naming("Load Concepts", f"file_{row['number']}"):
                concept = library.read(row["file"])
            gate = Gate(bias=row["bias"], temperature=row["temperature"], strength=row["strength"])
            uses.append(ConceptUse(concept, gate))
        with naming("Load Concepts"):
            return io.NodeOutput((concepts or ConceptStack()) + ConceptStack(tuple(uses)))


def _row(number: int, files: list[str]) -> list[io.Input]:
    """The inputs of one row; optional, so that a graph in API format need not list empty rows."""
    return [
        io.Combo.Input(
            f"file_{number}",
            options=[NO_FILE, *files],
            default=NO_FILE,
            optional=True,
            tooltip="A concept file from models/perfusion or output/perfusion. Press R to refresh the list.",
        ),
        io.Boolean.Input(
            f"on_{number}", default=True, optional=True, tooltip="Off: as if the concept were not loaded."
        ),
        *gate_inputs(f"_{number}", optional=True),
    ]


_OF_ROWS = ("strength", "bias", "temperature")


def _rows(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows in use: number, file, strength, bias and temperature of each that has a file and is on."""
    rows = []
    for number in range(1, int(inputs.get("count") or 0) + 1):
        file = inputs.get(f"file_{number}", NO_FILE)
        if file not in (None, NO_FILE) and inputs.get(f"on_{number}", True):
            gate = {name: inputs.get(f"{name}_{number}", getattr(GATE, name)) for name in _OF_ROWS}
            rows.append({"number": number, "file": file, **gate})
    return rows


class PerfusionApplyConcepts(io.ComfyNode):
    """Puts concepts on a model and its text encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ``web/docs/PerfusionApplyConcepts.md``."""
        return schema(
            node_id="PerfusionApplyConcepts",
            display_name="Apply Concepts",
            category="Perfusion/concepts",
            description="Makes a model draw the concepts wherever a prompt says their words. Use it like a LoRA "
            "loader, before or after others.",
            search_aliases=["perfusion", "apply concept", "personalization", "key locked rank one editing"],
            inputs=[
                io.Model.Input("model", tooltip="The model to draw with: SD1.x, SD2.x or SDXL, as the concepts are."),
                io.Clip.Input("clip", tooltip="The text encoder of that model; it learns the concepts' words."),
                Concepts.Input("concepts", tooltip="From Load Concepts or Train Concept."),
                io.Combo.Input(
                    "key_lock",
                    options=list(LOCKS),
                    default="local",
                    tooltip="local: the concept's word attends as its super-category; more faithful. global: the whole "
                    "prompt attends as if the super-category stood there; richer scenes, more variation, best with a "
                    "bias of 0.4 to 0.6.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For the sampler, or for further patches."),
                io.Clip.Output(display_name="clip", tooltip="For the text nodes whose prompts contain the words."),
                io.String.Output(
                    display_name="trigger",
                    tooltip="The words of the concepts, to write into prompts where their super-categories would be.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model: Any, clip: Any, concepts: ConceptStack, key_lock: Lock) -> io.NodeOutput:
        """Apply the concepts that are on."""
        if clip is None:
            raise ValueError("Apply Concepts, input 'clip': there is no CLIP. Connect the checkpoint's own CLIP.")
        with naming("Apply Concepts", "concepts"):
            stack = concepts.active.locked(key_lock)
            if not len(stack):
                logger.warning("Apply Concepts: no concept is on, so the model is passed on as it is.")
            model, clip = apply_concepts(model, clip, stack)
        return io.NodeOutput(model, clip, ", ".join(stack.placeholders))


NODES = [PerfusionSaveConcept, PerfusionLoadConcepts, PerfusionApplyConcepts]
