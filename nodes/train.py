"""Training a concept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..perfusion.concept import check_placeholder
from ..perfusion.corpus import load_captions, paper_templates
from ..perfusion.edit import FORMS
from ..perfusion.hosts.comfyui import library
from ..perfusion.hosts.comfyui.progress import progress_on
from ..perfusion.hosts.comfyui.training import ComfyHost
from ..perfusion.stack import ConceptStack, ConceptUse
from ..perfusion.statistics import ESTIMATORS, cached
from ..perfusion.training.config import RATES, TrainingConfig
from ..perfusion.training.dataset import prepare
from ..perfusion.training.trainer import StepReport, Subject, Trainer, require_words, train
from .common import ADVANCED, Concepts, naming, schema

NODE = "Train Concept"
OWN_CAPTIONS = "built-in"


class PerfusionTrainConcept(io.ComfyNode):
    """Learns a concept from photos."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ``web/docs/PerfusionTrainConcept.md``."""
        default, tip = TrainingConfig(), TrainingConfig.help
        return schema(
            node_id="PerfusionTrainConcept",
            display_name="Train Concept",
            category="Perfusion/train",
            description="Teaches a model one thing (my teddy, my cat, my chair) from a few photos. Save the result "
            "with Save Concept, or connect it straight to Apply Concepts.",
            search_aliases=["perfusion train", "personalization", "dreambooth", "textual inversion", "train lora"],
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
            is_experimental=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to learn on: SD1.x, SD2.x or SDXL."),
                io.Clip.Input("clip", tooltip="The text encoder of that model."),
                io.Vae.Input("vae", tooltip="The VAE of that model."),
                io.Image.Input("images", tooltip="1 to 10 photos of the thing, as a batch or a list of any sizes."),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="One mask for each photo, in the same order, white where the thing is. Without masks the "
                    "background is learned too.",
                ),
                io.String.Input(
                    "super_category",
                    default="teddy bear",
                    tooltip="What kind of thing it is, in plain words: teddy bear, cat, chair.",
                ),
                io.String.Input(
                    "placeholder",
                    default="<my-teddy>",
                    tooltip="The word that will stand for it in prompts: letters, digits, - and _ in angle brackets.",
                ),
                io.Int.Input("steps", default=default.steps, min=1, max=100_000, tooltip=tip("steps")),
                io.Int.Input("batch_size", default=default.batch_size, min=1, max=256, tooltip=tip("batch_size")),
                io.Int.Input(
                    "resolution", default=default.resolution, min=64, max=2048, step=64, tooltip=tip("resolution")
                ),
                # A new seed after each run, which the front end offers for inputs of this name, would train each time.
                io.Int.Input(
                    "seed", default=0, min=0, max=2**53 - 1, control_after_generate=False, tooltip=tip("seed")
                ),
                io.Boolean.Input("flip", default=default.flip, tooltip=tip("flip")),
                io.Int.Input(
                    "micro_batch",
                    default=default.micro_batch,
                    min=0,
                    max=256,
                    tooltip=tip("micro_batch"),
                    extra_dict=ADVANCED,
                ),
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=default.gradient_checkpointing,
                    tooltip=tip("gradient_checkpointing"),
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "rates", options=list(RATES), default=default.rates, tooltip=tip("rates"), extra_dict=ADVANCED
                ),
                io.Float.Input(
                    "value_rate",
                    default=default.value_rate,
                    min=0.0,
                    max=10.0,
                    step=0.0001,
                    tooltip=tip("value_rate"),
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "embedding_rate",
                    default=default.embedding_rate,
                    min=0.0,
                    max=10.0,
                    step=0.0001,
                    tooltip=tip("embedding_rate"),
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "estimator",
                    options=list(ESTIMATORS),
                    default=default.estimator,
                    tooltip=tip("estimator"),
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "form", options=list(FORMS), default=default.form, tooltip=tip("form"), extra_dict=ADVANCED
                ),
                io.Int.Input(
                    "vectors", default=default.vectors, min=1, max=32, tooltip=tip("vectors"), extra_dict=ADVANCED
                ),
                io.Int.Input(
                    "contexts", default=default.contexts, min=8, max=2000, tooltip=tip("contexts"), extra_dict=ADVANCED
                ),
                io.Combo.Input(
                    "corpus",
                    options=[OWN_CAPTIONS, *library.corpora()],
                    default=OWN_CAPTIONS,
                    tooltip="Captions by which the text encoder is measured, once: the built-in ones, or a .txt file "
                    "in models/perfusion with one caption a line.",
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "corpus_size",
                    default=2400,
                    min=32,
                    max=1_000_000,
                    tooltip="How many of those captions are read, at most. Fewer are faster and less exact.",
                    extra_dict=ADVANCED,
                ),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    tooltip="Captions to train with, one a line, with {} or the placeholder where the word goes. Left "
                    "empty, short general ones are used.",
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[
                Concepts.Output(
                    display_name="concept", tooltip="What was learned: for Save Concept and Apply Concepts."
                ),
                io.LossMap.Output(display_name="loss", tooltip="The loss of each step, for Plot Loss Graph."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, corpus: Any = None, **_: Any) -> str:
        """Changes when the caption file does; photos, masks and settings are the host's to watch."""
        name: Any = corpus[0] if isinstance(corpus, (list, tuple)) and corpus else corpus
        return "" if name in (None, OWN_CAPTIONS) else library.corpus_stamp(name)

    @classmethod
    def execute(cls, **inputs: Any) -> io.NodeOutput:
        """Train; every input is a list, as photos may be."""
        images = [photo for batch in inputs.pop("images") for photo in batch]
        masks = _flat_masks(inputs.pop("masks", None))
        one = {name: values[0] for name, values in inputs.items() if values}
        for name in ("model", "clip", "vae"):
            if one.get(name) is None:
                raise ValueError(f"{NODE}, input '{name}': nothing arrived. Connect the checkpoint's own.")
        with naming(NODE, "placeholder"):
            placeholder = check_placeholder(one["placeholder"])
        captions = [line.strip() for line in (one.get("captions") or "").splitlines() if line.strip()]
        subject = Subject(placeholder, one["super_category"].strip(), captions or paper_templates())
        with naming(NODE):
            settings = {name: one[name] for name in TrainingConfig.__dataclass_fields__ if name in one}
            config = TrainingConfig(**settings)
            subject.prompts()
            host = ComfyHost(one["model"], one["clip"], one["vae"])
        with naming(NODE, "super_category"):
            require_words(host, subject)
        with naming(NODE, "images"):
            photos = prepare(host, images, masks, config.resolution, progress_on(cls.hidden.unique_id))
        with naming(NODE, "corpus"):
            corpus = _corpus(host, one["corpus"], one["corpus_size"])
            statistics = cached(host, corpus, library.statistics_folder(), progress_on(cls.hidden.unique_id))
        report_step = progress_on(cls.hidden.unique_id)

        def show(trainer: Trainer, report: StepReport) -> None:
            report_step(report.step, report.steps)

        with naming(NODE):
            concept, trainer = train(host, photos, subject, statistics, config, [show])
        return io.NodeOutput(ConceptStack((ConceptUse(concept),)), {"loss": trainer.losses})


def _flat_masks(batches: list[Any] | None) -> list[Any] | None:
    """Masks (h, w) one by one, of batches (n, h, w) or single ones; None when no mask is connected."""
    connected = [batch for batch in batches or [] if batch is not None]
    return [mask for batch in connected for mask in (batch if batch.ndim == 3 else [batch])] or None


def _corpus(host: ComfyHost, name: str, size: int) -> list[str]:
    """The captions of a file, or the text encoder's own where it brings some, or the pack's."""
    if name == OWN_CAPTIONS and host.captions is not None:
        return list(host.captions[:size])
    path: Path | None = None if name == OWN_CAPTIONS else library.find_corpus(name)
    return load_captions(path, limit=size)


NODES = [PerfusionTrainConcept]
