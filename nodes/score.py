"""Scores of any pictures."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..perfusion.hosts.comfyui.scoring import ClipSimilarity, per_picture
from ..perfusion.training.scoring import harmonic_mean
from .common import flat, naming, schema

NODE = "Score"


class PerfusionScore(io.ComfyNode):
    """Tells how like photos, and how true to a text, pictures are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ``web/docs/PerfusionScore.md``."""
        return schema(
            node_id="PerfusionScore",
            display_name="Score",
            category="Perfusion/explore",
            description="Measures pictures by CLIP: likeness to photos (CLIP-I) and obedience to a prompt (CLIP-T). "
            "Works for pictures of any origin.",
            search_aliases=["clip score", "clip-i", "clip-t", "similarity", "evaluate", "metric"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures to measure, as a batch or a list."),
                io.ClipVision.Input("clip_vision", tooltip="A CLIP Vision such as ViT-L, or the Miniature's own."),
                io.Image.Input("photos", optional=True, tooltip="For image similarity: what they should be like."),
                io.Clip.Input(
                    "score_clip",
                    optional=True,
                    tooltip="For text similarity, with prompt: the text encoder that was trained together with that "
                    "CLIP Vision, from Load CLIP.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="For text similarity: what they should show, in plain words, without a concept's made-up "
                    "word. One text for all, or a line for each picture.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="image_similarity", tooltip="Mean cosine to the photos; 0 without photos."
                ),
                io.Float.Output(display_name="text_similarity", tooltip="Mean cosine to the text; 0 without a text."),
                io.Float.Output(display_name="harmonic_mean", tooltip="Of both; 0 where one is missing."),
                io.String.Output(display_name="report", tooltip="The scores of each picture, as a table."),
            ],
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        """Measure; every input is a list, as pictures may be."""
        images, photos = flat(inputs.pop("images")), flat(inputs.pop("photos", None))
        one = {name: values[0] for name, values in inputs.items() if values}
        prompts = [prompt or "" for prompt in inputs.get("prompt") or ()]
        lines = prompts if len(prompts) > 1 else "".join(prompts).splitlines()
        texts = [line.strip() for line in lines if line.strip()]
        if not photos and not texts:
            raise ValueError(f"{NODE}: connect photos, or score_clip and a prompt, or all of them: to compare with.")
        if texts and one.get("score_clip") is None:
            raise ValueError(f"{NODE}, input 'score_clip': connect the text encoder that belongs to the CLIP Vision.")
        if len(texts) not in (0, 1, len(images)):
            raise ValueError(
                f"{NODE}, input 'prompt': there are {len(texts)} texts for {len(images)} pictures. Write one line for "
                "all, or one for each."
            )
        with naming(NODE):
            similarity = ClipSimilarity(one["clip_vision"], one["score_clip"] if texts else None)
            image, text = per_picture(similarity, images, photos, texts)
        means = [0.0 if scores is None else float(scores.mean()) for scores in (image, text)]
        rows = ["picture   image    text"]
        for number in range(len(images)):
            told = ["      -" if scores is None else f"{float(scores[number]):7.4f}" for scores in (image, text)]
            rows.append(f"{number + 1:7d} {' '.join(told)}")
        both = 0.0 if image is None or text is None else harmonic_mean(*means)
        report = "\n".join(rows)
        return io.NodeOutput(*means, both, report, ui=ui.PreviewText(report))


NODES = [PerfusionScore]
