"""The miniature: a small Stable Diffusion that comes with the pack."""

from __future__ import annotations

from typing import Any

import folder_paths
from comfy_api.latest import io, ui

from ..miniature import comfyui as miniature
from ..miniature.weights import FOLDER
from ..miniature.world import CATEGORY_NAMES
from .common import naming, schema

NODE = "Miniature"
LATENT_NODE = "Empty Miniature Latent"
PREVIEW_SCALE = 4


class PerfusionMiniature(io.ComfyNode):
    """Loads the miniature.

    It has no inputs: what it loads is part of the signature of everything behind it, and an unchanged training must
    not be repeated because a batch size has changed.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ``web/docs/PerfusionMiniature.md``."""
        return schema(
            node_id="PerfusionMiniature",
            display_name="Miniature",
            category="Perfusion/miniature",
            description="A small Stable Diffusion that comes with the pack, to try everything at once and with nothing "
            "to download. It knows a little world of toys, and draws it at 64 x 64 pixels.",
            search_aliases=["tiny model", "demo model", "toy model", "load checkpoint", "example"],
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For the sampler, Train Concept and Apply Concepts."),
                io.Clip.Output(
                    display_name="clip", tooltip="The text encoder. It knows the words of the little world alone."
                ),
                io.Vae.Output(display_name="vae", tooltip="Between pictures and latents of a quarter of their size."),
                io.ClipVision.Output(
                    display_name="clip vision",
                    tooltip="The image tower that was trained together with the text encoder: it says how alike "
                    "pictures are, and how true to a prompt.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, **_: Any) -> bool:
        """Find out about missing files before anything runs. The host repeats what is returned for each input: here
        there is none, so it is raised."""
        with naming(NODE):
            miniature.require_files(FOLDER)
        return True

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> str:
        """Changes when the weights do."""
        return miniature.stamp(FOLDER)

    @classmethod
    def execute(cls) -> io.NodeOutput:
        """Load all parts, anew: what is handed out belongs to whoever gets it."""
        with naming(NODE):
            parts = miniature.load(FOLDER, folder_paths.get_folder_paths("embeddings"))
            return io.NodeOutput(*parts, miniature.load_clip_vision(FOLDER))


class PerfusionMiniatureLatent(io.ComfyNode):
    """An empty latent of the miniature's scale, which is not Stable Diffusion's."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ``web/docs/PerfusionMiniatureLatent.md``."""
        return schema(
            node_id="PerfusionMiniatureLatent",
            display_name="Empty Miniature Latent",
            category="Perfusion/miniature",
            description="Empty latents to draw on with the Miniature, whose latents have a quarter of the size of "
            "pictures, not an eighth.",
            search_aliases=["empty latent", "new latent", "blank"],
            inputs=[
                io.Int.Input("width", default=64, min=32, max=256, step=8, tooltip="Width of the pictures, in pixels."),
                io.Int.Input(
                    "height",
                    default=64,
                    min=32,
                    max=256,
                    step=8,
                    tooltip="Height of the pictures, in pixels. It was trained on 64 x 64.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="How many pictures are drawn at once."),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For the sampler.")],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int) -> io.NodeOutput:
        """Zeros of the fitting shape."""
        with naming(LATENT_NODE):
            return io.NodeOutput(miniature.empty_latent(width, height, batch_size, FOLDER))


class PerfusionMiniaturePhotos(io.ComfyNode):
    """Photos of a personal thing of the miniature's world, to learn from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ``web/docs/PerfusionMiniaturePhotos.md``."""
        return schema(
            node_id="PerfusionMiniaturePhotos",
            display_name="Miniature Photos",
            category="Perfusion/miniature",
            description="Photos of one particular thing of the Miniature's world, with masks, to try Train Concept "
            "without photos of your own.",
            search_aliases=["example photos", "sample images", "demo photos", "training images"],
            is_output_node=True,  # so that it shows the photos even where what was learned from them is cached
            inputs=[
                io.Combo.Input(
                    "category",
                    options=list(CATEGORY_NAMES),
                    default="teddy bear",
                    tooltip="What kind of thing is in the photos.",
                ),
                io.Int.Input(
                    "thing",
                    default=0,
                    min=0,
                    max=9999,
                    tooltip="Which one of them. Each has colors, a pattern and a mark that no prompt can describe.",
                ),
                io.Int.Input("count", default=5, min=1, max=16, tooltip="How many photos are taken."),
                # A new seed after each run, which the front end offers for inputs of this name, would train each time.
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Another seed takes other photos of the same thing.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The photos, 64 x 64, for Train Concept."),
                io.Mask.Output(display_name="masks", tooltip="Where the thing is in each photo, for Train Concept."),
                io.String.Output(
                    display_name="super-category", tooltip="The category, for the input of that name on Train Concept."
                ),
            ],
        )

    @classmethod
    def execute(cls, category: str, thing: int, count: int, seed: int) -> io.NodeOutput:
        """Take them, and show them on the node, large enough to be looked at."""
        images, masks = miniature.photos(category, thing, count, seed)
        enlarged = images.repeat_interleave(PREVIEW_SCALE, 1).repeat_interleave(PREVIEW_SCALE, 2)
        return io.NodeOutput(images, masks, category, ui=ui.PreviewImage(enlarged))


NODES = [PerfusionMiniature, PerfusionMiniatureLatent, PerfusionMiniaturePhotos]
