"""Concepts that travel inside a workflow."""

from __future__ import annotations

from comfy_api.latest import io

from ..perfusion.embedding import from_text, to_text
from ..perfusion.hosts.comfyui.workflow import set_widget
from ..perfusion.stack import ConceptStack
from .common import Concepts, naming, schema

NODE = "Embed Concept"
CONNECTED, EMBEDDED = USES = ("connected, else embedded", "embedded")
DATA_WIDGET = 1  # its place in widgets_values
SHOWN = "perfusion_embedded"  # what web/embedded_concept.js looks for


class PerfusionEmbedConcept(io.ComfyNode):
    """Keeps concepts in the workflow itself.

    It is an output node so that its text reaches the front end after every run, from the cache too. The front end
    (``web/embedded_concept.js``) puts it into the widget ``data``, and leaves it out of prompts in which connected
    concepts are used: otherwise embedding would change the signature of all that follows.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ``web/docs/PerfusionEmbedConcept.md``."""
        return schema(
            node_id="PerfusionEmbedConcept",
            display_name="Embed Concept",
            category="Perfusion/concepts",
            description="Keeps concepts inside the workflow, about 45 KB each for SD1.x: its JSON or PNG then opens "
            "elsewhere with them, and no file is needed.",
            search_aliases=["perfusion share", "embed", "portable", "base64", "self-contained"],
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                Concepts.Input(
                    "concepts",
                    optional=True,
                    tooltip="What to embed, with its settings: from Load Concepts or Train Concept. Once embedded, "
                    "this can be left open.",
                ),
                io.Combo.Input(
                    "use",
                    options=list(USES),
                    default=CONNECTED,
                    tooltip="connected, else embedded: concepts that are connected are used, and embedded anew; with "
                    "none, those that are embedded. embedded: always those, whatever is connected.",
                ),
                io.String.Input(
                    "data",
                    default="",
                    multiline=True,
                    tooltip="The embedded concepts as text, a line for each, at most 16 and 4 million characters. It "
                    "is filled in after a run.",
                ),
            ],
            outputs=[Concepts.Output(display_name="concepts", tooltip="For Apply Concepts.")],
        )

    @classmethod
    def validate_inputs(cls, use: str = CONNECTED, data: str | None = "") -> bool | str:
        """Find out about damaged text before anything runs, where it is certain to be used.

        The host leaves the check of inputs that are named here to the node.
        """
        if use not in USES:
            return f"{NODE}, input 'use': {use!r} is none of {', '.join(map(repr, USES))}"
        if use == EMBEDDED and data is not None:
            try:
                _embedded(data)
            except ValueError as error:
                return str(error)
        return True

    @classmethod
    def execute(cls, use: str, data: str, concepts: ConceptStack | None = None) -> io.NodeOutput:
        """The connected concepts, and their text for the workflow; else those of the text."""
        if use == EMBEDDED or concepts is None:
            return io.NodeOutput(_embedded(data))
        if not len(concepts):
            return io.NodeOutput(concepts)
        with naming(NODE, "concepts"):
            text = to_text(concepts)
        set_widget(cls.hidden.extra_pnginfo, cls.hidden.unique_id, DATA_WIDGET, "data", text)
        return io.NodeOutput(concepts, ui={SHOWN: (text,)})


def _embedded(data: str) -> ConceptStack:
    """The concepts of the widget. Raises ValueError where there are none."""
    with naming(NODE, "data"):
        stack = from_text(data)
        if not len(stack):
            raise ValueError(
                "nothing is embedded yet. Connect concepts to this node, set 'use' to 'connected, else embedded' and "
                "run once."
            )
        return stack


NODES = [PerfusionEmbedConcept]
