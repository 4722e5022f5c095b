"""Photos to learn from: a folder of them, and their masks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor
from torch.nn.functional import interpolate

from ..perfusion.hosts.clipseg import clipseg_masks
from ..perfusion.hosts.comfyui import library
from ..perfusion.hosts.comfyui.progress import progress_on
from ..perfusion.hosts.comfyui.training import ComfyHost
from ..perfusion.training.config import TrainingConfig
from ..perfusion.training.folder import read_folder
from ..perfusion.training.masks import PLACEHOLDER, Masks, attention_masks, dimmed
from ..perfusion.training.trainer import Subject, require_words
from .common import flat, naming, schema, small

logger = logging.getLogger(__name__)

NODE = "Load Photos"
MASKS_NODE = "Make Masks"
NO_FOLDER = "none"
METHODS = ("attention", "clipseg")
MOST_SHOWN = 16  # pictures on a node


class PerfusionLoadPhotos(io.ComfyNode):
    """Reads a folder of photos, with captions and masks beside them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ``web/docs/PerfusionLoadPhotos.md``."""
        return schema(
            node_id="PerfusionLoadPhotos",
            display_name="Load Photos",
            category="Perfusion/train",
            description="Reads all photos of a folder in ComfyUI's input folder, each in its own size, with the "
            "captions and masks that lie beside them.",
            search_aliases=["load folder", "dataset", "training images", "image folder", "captions"],
            is_output_node=True,  # so that it shows the photos even where what was learned from them is cached
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=library.photo_folders() or [NO_FOLDER],
                    tooltip="A folder with photos in ComfyUI's input folder. Press R to refresh the list.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images", is_output_list=True, tooltip="The photos, upright, as a list of any sizes."
                ),
                io.Mask.Output(
                    display_name="masks",
                    is_output_list=True,
                    tooltip="One for each photo: the picture named like it with -mask at the end, or its transparency. "
                    "Empty for a photo without one.",
                ),
                io.String.Output(
                    display_name="captions",
                    is_output_list=True,
                    tooltip="One text for each photo, from the .txt file named like it. Empty for a photo without one.",
                ),
                io.String.Output(display_name="notes", tooltip="What was left out, and why."),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str) -> bool | str:
        """Find out about a missing folder before anything runs."""
        try:
            library.find_photo_folder(folder)
        except ValueError as error:
            return f"{NODE}, input 'folder': {error}"
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: str) -> str:
        """Changes when a file of the folder does."""
        return library.photo_folder_stamp(folder)

    @classmethod
    def execute(cls, folder: str) -> io.NodeOutput:
        """Read them, and show the first ones."""
        with naming(NODE, "folder"):
            place = library.find_photo_folder(folder)
            photos = read_folder(place, progress_on(cls.hidden.unique_id), within=library.input_folder())
        # Empty, as Load Image gives it for a picture without one.
        masks = [
            torch.zeros(image.shape[:2]) if mask is None else mask
            for image, mask in zip(photos.images, photos.masks, strict=True)
        ]
        notes = _told(NODE, photos.notes)
        return io.NodeOutput(
            [image.unsqueeze(0) for image in photos.images],
            [mask.unsqueeze(0) for mask in masks],
            ["\n".join(lines) for lines in photos.captions],
            notes,
            ui=_shown(cls, photos.images, notes or f"{len(photos)} photos"),
        )


class PerfusionMasks(io.ComfyNode):
    """Masks for photos that have none."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ``web/docs/PerfusionMasks.md``."""
        return schema(
            node_id="PerfusionMasks",
            display_name="Make Masks",
            category="Perfusion/train",
            description="Finds the thing in photos, and makes the masks that Train Concept needs: by the model's own "
            "attention to the word for it, with nothing to download, or by CLIPSeg.",
            search_aliases=["mask", "segment", "clipseg", "attention map", "remove background"],
            is_input_list=True,
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("images", tooltip="The photos, as a batch or a list of any sizes."),
                io.String.Input(
                    "super_category",
                    default="teddy bear",
                    tooltip="What kind of thing it is, in plain words: teddy bear, cat, chair.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default=METHODS[0],
                    tooltip="attention: where the model itself looks for such a thing. clipseg: by a model of its own, "
                    "whose files you have put into models/clipseg.",
                ),
                io.Int.Input(
                    "resolution",
                    default=TrainingConfig.resolution,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip="At what size the model looks at the photos: the same as for Train Concept. For attention "
                    "only.",
                ),
                io.Model.Input("model", optional=True, tooltip="The model to learn on. For attention only."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder of that model. For attention only."),
                io.Vae.Input("vae", optional=True, tooltip="The VAE of that model. For attention only."),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="Masks that are there already, one for each photo, in the same order. Only for empty ones "
                    "masks are made.",
                ),
            ],
            outputs=[
                io.Mask.Output(
                    display_name="masks",
                    is_output_list=True,
                    tooltip="One for each photo, with soft edges. White where the whole photo counts.",
                ),
                io.Image.Output(
                    display_name="preview", is_output_list=True, tooltip="The photos, dark outside their masks."
                ),
                io.String.Output(display_name="notes", tooltip="For which photos masks were made, and how surely."),
            ],
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        """Make them, and show the first ones. Every input is a list, as photos may be."""
        images = flat(inputs.pop("images"))
        given = [mask for batch in inputs.pop("masks", None) or [] if batch is not None for mask in _single(batch)]
        one = {name: values[0] for name, values in inputs.items() if values}
        found = _made(images, given, one, cls.hidden.unique_id)
        notes = _told(MASKS_NODE, found.notes)
        sure = ", ".join(f"{confidence:.0%}" for confidence in found.confidence)
        previews = [dimmed(_colors(image), mask) for image, mask in _sized(images, found.masks)]
        masks = [torch.ones(image.shape[:2]) if mask is None else mask for image, mask in _sized(images, found.masks)]
        return io.NodeOutput(
            [mask.unsqueeze(0) for mask in masks],
            [preview.unsqueeze(0) for preview in previews],
            f"{notes}\nconfidence: {sure}".strip(),
            ui=_shown(cls, previews, notes),
        )


def _made(images: Sequence[Tensor], given: list[Tensor], one: dict[str, Any], node_id: str | None) -> Masks:
    """Masks by the chosen method."""
    kind, progress = one["super_category"].strip(), progress_on(node_id)
    if one["method"] == "clipseg":
        with naming(MASKS_NODE, "images"):
            return clipseg_masks(images, kind, library.clipseg_folder(), given, progress)
    for name in ("model", "clip", "vae"):
        if one.get(name) is None:
            raise ValueError(
                f"{MASKS_NODE}, input '{name}': nothing arrived. Masks by attention are made by the checkpoint that "
                "you train on: connect its own, or choose the method 'clipseg'."
            )
    with naming(MASKS_NODE):
        host = ComfyHost(one["model"], one["clip"], one["vae"])
    with naming(MASKS_NODE, "super_category"):
        require_words(host, Subject(PLACEHOLDER, kind))
    with naming(MASKS_NODE, "images"):
        return attention_masks(host, images, kind, one["resolution"], given, progress)


def _single(batch: Tensor) -> Iterable[Tensor]:
    """Masks (h, w) of a batch (n, h, w), or of a single one."""
    return batch if batch.ndim == 3 else [batch]


def _sized(images: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Iterable[tuple[Tensor, Tensor | None]]:
    """Each photo with its mask, of its size."""
    for image, mask in zip(images, masks, strict=True):
        if mask is not None and mask.shape != image.shape[:2]:
            size = (image.shape[0], image.shape[1])
            mask = interpolate(mask[None, None].float(), size, mode="bilinear", antialias=True)[0, 0]
        yield image, mask if mask is None else mask.cpu()


def _colors(image: Tensor) -> Tensor:
    """A photo (h, w, 3), whatever channels it came with, to be shown."""
    return image[..., :3].cpu() if image.shape[-1] >= 3 else image[..., :1].cpu().expand(-1, -1, 3)


def _told(node: str, notes: Sequence[str]) -> str:
    """Notes as one text, which the log has too."""
    for note in notes:
        logger.warning("%s: %s", node, note)
    return "\n".join(notes)


def _shown(node: type[io.ComfyNode], images: Sequence[Tensor], text: str) -> dict[str, Any]:
    """The first pictures, reduced, and a text, for the face of a node."""
    shown = []
    for image in images[:MOST_SHOWN]:
        shown += ui.PreviewImage(small(image).unsqueeze(0), cls=node).as_dict()["images"]
    return {"images": shown, "text": (text,)}


NODES = [PerfusionLoadPhotos, PerfusionMasks]
