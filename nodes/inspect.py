"""Seeing what concepts make of a prompt, and where in a picture they are looked for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..perfusion.hosts.comfyui.attention_sheet import notice, sheet
from ..perfusion.hosts.comfyui.heat_table import picture
from ..perfusion.hosts.comfyui.inspection import in_force, read
from ..perfusion.hosts.comfyui.looking import attention_maps
from ..perfusion.inspection import THRESHOLD, inspect
from ..perfusion.stack import ConceptStack
from .common import Concepts, naming, schema

NODE = "Inspect Prompt"
MAX_PLACES = 8
_HOW_TO_LOOK = (
    "To see where the model looks for each concept's word, connect model (from Apply Concepts), vae and image, a "
    "picture that was drawn with this prompt."
)


class PerfusionInspectPrompt(io.ComfyNode):
    """Shows how far each concept's gate opens on each token of a prompt, and where in a picture the model looks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ``web/docs/PerfusionInspectPrompt.md``."""
        return schema(
            node_id="PerfusionInspectPrompt",
            display_name="Inspect Prompt",
            category="Perfusion/explore",
            description="Shows which words of a prompt each concept answers to, whether it will appear, and what to "
            "change; and, with a model and a picture, where the model looks for each concept's word.",
            search_aliases=["gate", "token", "heatmap", "prompt debug", "why does it not appear", "attention"],
            is_output_node=True,
            inputs=[
                io.Clip.Input(
                    "clip",
                    tooltip="The CLIP of Apply Concepts, whose concepts are shown; or any other, with the concepts "
                    "on the input below.",
                ),
                io.String.Input(
                    "prompt",
                    default="a photo of a <my-teddy>",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The text, as you write it for pictures: with weights, and as long as you like.",
                ),
                io.Float.Input(
                    "threshold",
                    default=THRESHOLD,
                    min=0.01,
                    max=0.99,
                    step=0.01,
                    tooltip="A word whose gate opens further than this counts as affected by the concept.",
                ),
                Concepts.Input(
                    "concepts",
                    optional=True,
                    tooltip="Concepts that the CLIP does not know yet, from Load Concepts or Train Concept.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="For attention, with vae and image: the model of Apply Concepts, or any other to compare.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="For attention: the VAE of that model."),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="For attention: a picture that was drawn with this prompt. The first one is looked at.",
                ),
                io.String.Input(
                    "at",
                    default="0.3, 0.6, 0.9",
                    optional=True,
                    tooltip="For attention: where in sampling to look, from 0, its beginning, to 1, its end. Up to 8.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="picture",
                    tooltip="A row for each concept, a column for each token: how far its gate opens, and r, how much "
                    "of the concept is in the token.",
                ),
                io.String.Output(
                    display_name="report", tooltip="The same as text: what will appear, what to change, and the table."
                ),
                io.Image.Output(
                    display_name="attention",
                    tooltip="Where the model looks for each concept's word, over the picture: a row for each concept, "
                    "a column for each place in sampling.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        prompt: str,
        threshold: float,
        concepts: ConceptStack | None = None,
        model: Any = None,
        vae: Any = None,
        image: Tensor | None = None,
        at: str = "0.3, 0.6, 0.9",
    ) -> io.NodeOutput:
        """Encode the prompt with the concepts' words, and tell what their gates do."""
        if clip is None:
            raise ValueError(f"{NODE}, input 'clip': there is no CLIP. Connect the checkpoint's own CLIP.")
        with naming(NODE, "concepts"):
            stack, clip = in_force(clip, concepts or ConceptStack())
        with naming(NODE):
            found = inspect(stack, prompt, partial(read, clip), threshold)
        table, report = picture(found, prompt), found.text()
        attention = notice(_HOW_TO_LOOK)
        if model is not None or vae is not None or image is not None:
            if model is None or vae is None or image is None:
                raise ValueError(f"{NODE}: attention needs model, vae and image, all three. Connect what is missing.")
            with naming(NODE, "at"):
                places = _places(at)
            attention = _look(clip, prompt, stack.placeholders, model, vae, image, places)
        shown = ui.PreviewImage(table, cls=cls).as_dict()
        return io.NodeOutput(table, report, attention, ui={**shown, "text": (report,)})


def _places(text: str) -> list[float]:
    """Numbers from 0 to 1. Raises ValueError for anything else."""
    try:
        places = [float(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError:
        places = []
    if not 0 < len(places) <= MAX_PLACES or not all(0 <= place <= 1 for place in places):
        raise ValueError(
            f"{text[:40]!r} does not say where in sampling to look: give 1 to {MAX_PLACES} numbers from 0 to 1, with "
            "commas between them, such as 0.3, 0.6, 0.9."
        )
    return places


def _look(
    clip: Any, prompt: str, words: Sequence[str], model: Any, vae: Any, image: Tensor, places: Sequence[float]
) -> Tensor:
    """A sheet of where the model looks for those words that the prompt has."""
    tokens = read(clip, prompt).tokens
    masks = {word: torch.tensor([token.placeholder == word for token in tokens]) for word in words}
    there = [word for word in words if masks[word].any()]
    if not there:
        return notice("There is no word of a concept in this prompt to look for.")
    conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    latent = vae.encode(image[:1, :, :, :3].expand(-1, -1, -1, 3))
    maps = attention_maps(model, conditioning, latent, torch.stack([masks[word] for word in there]), places)
    return sheet(image[0], maps, there, places)


NODES = [PerfusionInspectPrompt]
