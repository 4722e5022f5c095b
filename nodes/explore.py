"""The trade-off between likeness to the photos and obedience to the prompt: seen whole, and picked from."""

from __future__ import annotations

from typing import Any

import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..perfusion.edit import MAX_FOCUS_SHARE
from ..perfusion.hosts.comfyui.exploring import Sampling, TradeOffDrawing
from ..perfusion.hosts.comfyui.lettering import as_tensor
from ..perfusion.hosts.comfyui.scoring import ClipSimilarity, Comparison
from ..perfusion.hosts.comfyui.tradeoff_sheet import contact_sheet, plot
from ..perfusion.locking import LOCKS, Lock
from ..perfusion.stack import ConceptStack
from ..perfusion.tradeoff import RULES, Rule, Setting, TradeOff, Trial, best, grid, numbers, table
from .common import Concepts, TradeOffs, flat, naming, require_checkpoint, schema

NODE, PICK = "Trade-Off", "Pick Trade-Off"
BOTH = "both"
_PREVIEW = 1024  # pixels of the longer side


class PerfusionTradeOff(io.ComfyNode):
    """Draws one prompt under a grid of settings, from the same noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ``web/docs/PerfusionTradeOff.md``."""
        return schema(
            node_id="PerfusionTradeOff",
            display_name="Trade-Off",
            category="Perfusion/explore",
            description="Shows what a trained concept can be, from most like the photos to most true to the prompt: "
            "one picture for each bias and temperature, with scores and a plot. Nothing is trained again.",
            search_aliases=["xy plot", "grid", "pareto", "bias", "temperature", "compare settings"],
            is_input_list=True,
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model to draw with, as for Apply Concepts."),
                io.Clip.Input("clip", tooltip="The text encoder of that model."),
                io.Vae.Input("vae", tooltip="The VAE of that model."),
                Concepts.Input("concepts", tooltip="From Load Concepts or Train Concept."),
                io.Latent.Input(
                    "latent", tooltip="An empty latent: its size, and how many pictures each cell of the grid shows."
                ),
                io.String.Input(
                    "prompt",
                    default="a photo of a <my-teddy> on the beach",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt of all cells, with the concept's word. One that asks for something the photos "
                    "do not show tells most.",
                ),
                io.String.Input("negative", default="", multiline=True, tooltip="The negative prompt of all cells."),
                io.String.Input(
                    "bias",
                    default="0.3:0.9:5",
                    tooltip="Biases to try: numbers with commas between, or first:last:how many. Empty: each concept's "
                    "own.",
                ),
                io.String.Input(
                    "temperature", default="0.15", tooltip="Temperatures to try, likewise. Empty: each concept's own."
                ),
                io.String.Input(
                    "strength", default="", tooltip="Strengths to try, likewise. Empty: each concept's own."
                ),
                io.Combo.Input(
                    "key_lock",
                    options=[*LOCKS, BOTH],
                    default=LOCKS[0],
                    tooltip="How keys are locked, or both ways in turn.",
                ),
                io.String.Input("guidance", default="", tooltip="Guidance scales to try, likewise. Empty: cfg alone."),
                io.String.Input(
                    "word",
                    default="",
                    tooltip="The word of the concept whose settings are tried, the others keep theirs. Empty: all.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="The noise all cells begin with, as in KSampler.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10_000, tooltip="Steps of sampling."),
                io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance scale."),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.KSampler.SAMPLERS,
                    default="euler",
                    tooltip="The sampler. Those that add noise of their own make cells harder to compare.",
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="normal", tooltip="The scheduler."
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="For scores, with photos: a CLIP Vision such as ViT-L, or the Miniature's own.",
                ),
                io.Clip.Input(
                    "score_clip",
                    optional=True,
                    tooltip="For scores: the text encoder that was trained together with that CLIP Vision. Left out, "
                    "the one on clip is taken.",
                ),
                io.Image.Input("photos", optional=True, tooltip="For scores: photos the pictures should be like."),
                # Came later, and so stands last: saved workflows tell widgets by their order.
                io.String.Input(
                    "focus_share",
                    default="",
                    optional=True,
                    tooltip="Shares of the focus on the concept's word to try, likewise. Empty: each concept's own.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="sheet", tooltip="All cells with their settings and scores, as one picture."
                ),
                io.Image.Output(
                    display_name="plot",
                    tooltip="Text similarity over image similarity of all cells, and the Pareto front among them.",
                ),
                io.Image.Output(display_name="images", tooltip="The pictures of all cells, row by row."),
                TradeOffs.Output(display_name="trade_off", tooltip="For Pick Trade-Off."),
                io.String.Output(display_name="report", tooltip="The settings and scores as a table."),
            ],
        )

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        """Draw and score the cells; every input is a list, as photos may be."""
        photos = flat(inputs.pop("photos", None))
        one = {name: values[0] for name, values in inputs.items() if values}
        require_checkpoint(NODE, one)
        stack: ConceptStack = one["concepts"].active
        with naming(NODE, "concepts"):
            if not len(stack):
                raise ValueError("no concept arrives that is on. Connect Load Concepts or Train Concept")
        cells = _cells(one, len(one["latent"]["samples"]))
        word: str = one["word"].strip().lower()
        with naming(NODE, "word"):
            cells[0].applied(stack, word)
        comparison = _comparison(one, photos, stack)
        sampling = Sampling(
            one["prompt"],
            one["negative"],
            one["latent"],
            one["seed"],
            one["steps"],
            one["cfg"],
            one["sampler_name"],
            one["scheduler"],
        )
        found = TradeOff(stack, word, one["prompt"], ())
        drawn = contact_sheet(found, cells)
        total = one["steps"] * len(cells) * len(one["latent"]["samples"])
        bar, done = comfy.utils.ProgressBar(total, node_id=cls.hidden.unique_id), 0

        def report(rows: int) -> None:
            nonlocal done
            done += rows
            bar.update_absolute(min(done, total), total)

        with naming(NODE, "latent"):
            drawing = TradeOffDrawing(one["model"], one["clip"], one["vae"], stack, word, sampling, report)
        with naming(NODE):
            for trial in drawing(cells):
                scored = trial if comparison is None else comparison.scored(trial)
                found = TradeOff(stack, word, one["prompt"], (*found.trials, scored))
                drawn = contact_sheet(found, cells)
                bar.update_absolute(min(done, total), total, ("JPEG", drawn, _PREVIEW))
        sheet, plotted, text = as_tensor(drawn), as_tensor(plot(found)), table(found)
        shown = [image for part in (sheet, plotted) for image in ui.PreviewImage(part, cls=cls).as_dict()["images"]]
        images = torch.cat([trial.pictures for trial in found.trials])
        return io.NodeOutput(sheet, plotted, images, found, text, ui={"images": shown, "text": (text,)})


def _cells(one: dict[str, Any], pictures: int) -> list[Setting]:
    """The grid that the inputs ask for."""
    values: dict[str, Any] = {}
    bounds = {
        "bias": (-1, 2),
        "temperature": (0.01, 1),
        "strength": (0.01, 2),
        "guidance": (0, 100),
        "focus_share": (0, MAX_FOCUS_SHARE),
    }
    for name, (least, most) in bounds.items():
        with naming(NODE, name):
            values[name] = numbers(one.get(name, ""), least, most)
    lock: Lock | str = one["key_lock"]
    with naming(NODE):
        return grid(
            values["bias"],
            values["temperature"],
            values["strength"],
            list(LOCKS) if lock == BOTH else [lock],  # type: ignore[list-item]
            values["guidance"] or [one["cfg"]],
            pictures,
            values["focus_share"],
        )


def _comparison(one: dict[str, Any], photos: list[Tensor], stack: ConceptStack) -> Comparison | None:
    """What scores the pictures, where all that it needs is connected; found out before anything is drawn."""
    vision = one.get("clip_vision")
    if vision is None:
        return None
    if not photos:
        raise ValueError(f"{NODE}, input 'photos': connect the photos that the pictures should be like.")
    with naming(NODE):
        similarity = ClipSimilarity(vision, one.get("score_clip") or one["clip"])
        return Comparison(similarity, photos, one["prompt"], stack)


class PerfusionPickTradeOff(io.ComfyNode):
    """Returns the concepts with the best setting of a trade-off."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ``web/docs/PerfusionPickTradeOff.md``."""
        return schema(
            node_id="PerfusionPickTradeOff",
            display_name="Pick Trade-Off",
            category="Perfusion/explore",
            description="Picks the best setting of a trade-off by a rule, so that a workflow chooses for itself.",
            search_aliases=["best setting", "pareto", "knee", "choose bias"],
            inputs=[
                TradeOffs.Input("trade_off", tooltip="From Trade-Off, with scores."),
                io.Combo.Input(
                    "rule",
                    options=list(RULES),
                    default=RULES[0],
                    tooltip="harmonic mean: the best of both. most faithful: the most like the photos among those that "
                    "obey the prompt by at least least_text. knee: where more of the one begins to cost much of the "
                    "other.",
                ),
                io.Float.Input(
                    "least_text",
                    default=0.25,
                    min=-1.0,
                    max=1.0,
                    step=0.005,
                    tooltip="For most faithful: the least text similarity, as Trade-Off shows it below each cell.",
                ),
            ],
            outputs=[
                Concepts.Output(display_name="concepts", tooltip="With that setting: for Apply Concepts."),
                io.Float.Output(display_name="cfg", tooltip="The guidance scale of that setting, for the sampler."),
                io.Float.Output(display_name="bias", tooltip="Its bias."),
                io.Float.Output(display_name="temperature", tooltip="Its temperature."),
                io.Float.Output(display_name="strength", tooltip="Its strength."),
                io.Image.Output(display_name="images", tooltip="The pictures of that setting."),
                io.String.Output(display_name="report", tooltip="The setting and its scores as text."),
                io.Float.Output(display_name="focus share", tooltip="Its share of the focus."),
            ],
        )

    @classmethod
    def execute(cls, trade_off: TradeOff, rule: Rule, least_text: float) -> io.NodeOutput:
        """Apply the rule."""
        with naming(PICK, "least_text" if rule == "most faithful" else "trade_off"):
            picked: Trial = best(trade_off.trials, rule, least_text)
        stack = picked.setting.applied(trade_off.stack, trade_off.word)
        # Of several concepts that are set alike but for what is their own, the first speaks for all.
        gate = next(u.gate for u in stack.uses if trade_off.word in ("", u.concept.placeholder.lower()))
        told = ", ".join(f"{name} {value}" for name, value in picked.setting.told.items())
        report = f"{told}: image similarity {picked.image:.4f}, text similarity {picked.text:.4f}"
        return io.NodeOutput(
            stack,
            picked.setting.guidance,
            gate.bias,
            gate.temperature,
            gate.strength,
            picked.pictures,
            report,
            gate.focus_share,
            ui=ui.PreviewText(report),
        )


NODES = [PerfusionTradeOff, PerfusionPickTradeOff]
