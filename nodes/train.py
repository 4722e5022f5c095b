"""Training a concept."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
from comfy_api.latest import io

from ..perfusion.concept import check_placeholder, file_stem
from ..perfusion.corpus import paper_templates
from ..perfusion.edit import FORMS, MAX_FOCUS
from ..perfusion.hosts.comfyui import library
from ..perfusion.hosts.comfyui.memory import require_memory
from ..perfusion.hosts.comfyui.progress import TrainingView, progress_on
from ..perfusion.hosts.comfyui.scoring import ClipSimilarity
from ..perfusion.hosts.comfyui.training import ComfyHost
from ..perfusion.scope import SCOPES
from ..perfusion.stack import ConceptStack, ConceptUse
from ..perfusion.statistics import ESTIMATORS, cached, captions_for
from ..perfusion.training.checkpoint import own_file
from ..perfusion.training.choice import PATIENCE
from ..perfusion.training.companions import learned_from
from ..perfusion.training.config import BEFORE, RATES, TrainingConfig
from ..perfusion.training.masks import attention_masks, dimmed
from ..perfusion.training.noise import TIMESTEPS
from ..perfusion.training.run import MOST_PATIENCE, Outcome, Run
from ..perfusion.training.scoring import (
    Drawing,
    LossGateScorer,
    PictureScorer,
    Previewed,
    Scorer,
    validation_prompts,
)
from ..perfusion.training.trainer import Subject, Trainer, TrainingError, require_words
from .common import ADVANCED, Concepts, Training, flat, naming, require_checkpoint, schema, small

logger = logging.getLogger(__name__)

NODE = "Train Concept"
OWN_CAPTIONS = "built-in"
RESUME = ("automatic", "never")
PREVIEWS = 4


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
                    tooltip="One mask for each photo, in the same order, white where the thing is. Where there is "
                    "none, the model's own attention says where the thing is.",
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
                    tooltip="Captions to train with, one a line, with {} or the placeholder where the word goes. Where "
                    "it is missing, it takes the place of the super-category, or the first. Left empty, short general "
                    "ones are used.",
                    extra_dict=ADVANCED,
                ),
                # Optional from here on: graphs that were saved before these inputs came still run.
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Judges the steps by pictures, so that the best one is found: a CLIP Vision model such as "
                    "ViT-L, or the Miniature's own.",
                ),
                io.Clip.Input(
                    "score_clip",
                    optional=True,
                    tooltip="The text encoder that was trained together with that CLIP Vision, from Load CLIP. "
                    "Checkpoints of Stable Diffusion 1.x lack a part of it. Left out, the one on clip is taken.",
                ),
                io.Int.Input(
                    "checkpoint_every",
                    default=25,
                    min=1,
                    max=10_000,
                    optional=True,
                    tooltip="After how many steps each the concept is judged, and the training saved to go on from.",
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "patience",
                    default=PATIENCE,
                    min=0,
                    max=MOST_PATIENCE,
                    optional=True,
                    tooltip="Stops early when so many judged steps in a row are clearly worse than the best. 0: never.",
                    extra_dict=ADVANCED,
                ),
                io.Boolean.Input(
                    "previews",
                    default=True,
                    optional=True,
                    tooltip="Draws a few pictures at each judged step, always from the same noise. With a CLIP Vision "
                    "connected they are drawn in any case.",
                ),
                io.Combo.Input(
                    "resume",
                    options=[*RESUME, *library.trainings()],
                    default=RESUME[0],
                    optional=True,
                    tooltip="automatic: if this very training was stopped before, it goes on from there, exactly as if "
                    "it had not been. never: begins anew. Or a training by name, which must have these settings.",
                    extra_dict=ADVANCED,
                ),
                io.Boolean.Input(
                    "automatic_masks",
                    default=True,
                    optional=True,
                    tooltip="Photos without a mask get one: where the model itself looks for the super-category. Shown "
                    "on the node. Off: all of such a photo is learned, the background too.",
                ),
                io.Boolean.Input(
                    "aspect_buckets",
                    default=False,
                    optional=True,
                    tooltip="Photos keep their shapes, as nearly as the model can draw them. Off: they become squares.",
                    extra_dict=ADVANCED,
                ),
                io.String.Input(
                    "photo_captions",
                    optional=True,
                    force_input=True,
                    tooltip="Captions of each photo, from Load Photos: one text for each, one caption a line. A photo "
                    "with an empty one is trained with the general captions.",
                ),
                io.Combo.Input(
                    "scope",
                    options=list(SCOPES),
                    default=default.scope,
                    optional=True,
                    tooltip=tip("scope"),
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "focus",
                    default=default.focus,
                    min=1.0,
                    max=float(MAX_FOCUS),
                    step=1.0,
                    optional=True,
                    tooltip=tip("focus"),
                    extra_dict=ADVANCED,
                ),
                io.Int.Input(
                    "companions",
                    default=default.companions,
                    min=0,
                    max=100,
                    optional=True,
                    tooltip=tip("companions"),
                    extra_dict=ADVANCED,
                ),
                io.Combo.Input(
                    "timesteps",
                    options=list(TIMESTEPS),
                    default=default.timesteps,
                    optional=True,
                    tooltip=tip("timesteps"),
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "key_rate",
                    default=default.key_rate,
                    min=0.0,
                    max=10.0,
                    step=0.0001,
                    optional=True,
                    tooltip=tip("key_rate"),
                    extra_dict=ADVANCED,
                ),
                io.Float.Input(
                    "preservation",
                    default=default.preservation,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip=tip("preservation"),
                    extra_dict=ADVANCED,
                ),
            ],
            outputs=[
                Concepts.Output(
                    display_name="concept",
                    tooltip="What was learned, at its best step: for Save Concept and Apply Concepts.",
                ),
                io.LossMap.Output(display_name="loss", tooltip="The loss of each step, for Plot Loss Graph."),
                Training.Output(display_name="steps", tooltip="All judged steps, for Pick Step."),
                io.String.Output(display_name="report", tooltip="The judged steps and their scores, as a table."),
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
        images = flat(inputs.pop("images"))
        masks = _flat_masks(inputs.pop("masks", None))
        of_photo = _photo_captions(inputs.pop("photo_captions", None), len(images))
        one = {name: values[0] for name, values in inputs.items() if values}
        require_checkpoint(NODE, one)
        with naming(NODE, "placeholder"):
            placeholder = check_placeholder(one["placeholder"])
        captions = [line.strip() for line in (one.get("captions") or "").splitlines() if line.strip()]
        subject = Subject(placeholder, one["super_category"].strip(), captions or paper_templates(), of_photo)
        with naming(NODE):
            settings = {name: one[name] for name in TrainingConfig.__dataclass_fields__ if name in one}
            config = TrainingConfig(**{**BEFORE, **settings})
            subject.prompts()
            host = ComfyHost(one["model"], one["clip"], one["vae"])
            similarity = _similarity(host, one)
            require_memory(host, config)
        with naming(NODE, "super_category"):
            require_words(host, subject)
        with TrainingView(cls.hidden.unique_id) as view:
            outcome, notes = cls._learned(host, subject, images, masks, config, one, similarity, view)
        stack = ConceptStack((ConceptUse(outcome.concept),))
        return io.NodeOutput(stack, {"loss": list(outcome.losses)}, outcome, table(outcome, notes))

    @classmethod
    def _learned(
        cls,
        host: ComfyHost,
        subject: Subject,
        images: list[Any],
        masks: list[Any] | None,
        config: TrainingConfig,
        one: dict[str, Any],
        similarity: ClipSimilarity | None,
        view: TrainingView,
    ) -> tuple[Outcome, list[str]]:
        """What came of it, and what its user should know of the photos."""
        report, notes = progress_on(cls.hidden.unique_id), []
        if one.get("automatic_masks", True):
            with naming(NODE, "masks"):
                made = attention_masks(host, images, subject.super_category, config.resolution, masks, report)
            if made.notes:
                notes += made.notes
                view.show_masks(list(map(dimmed, map(small, images), made.masks)), config.steps)
            masks = list(made.masks)
        with naming(NODE, "images"):
            buckets = one.get("aspect_buckets", False)
            photos, subject = learned_from(host, images, masks, subject, config, report, buckets=buckets)
        notes += photos.notes
        for note in notes:
            logger.warning("%s: %s", NODE, note)
        with naming(NODE, "corpus"):
            corpus = _corpus(host, one["corpus"], one["corpus_size"])
            statistics = cached(host, corpus, library.statistics_folder(), progress_on(cls.hidden.unique_id))
        with naming(NODE), host.training(gradient_checkpointing=config.gradient_checkpointing):
            trainer = Trainer(host, photos, subject, statistics, config)
            run = Run(
                trainer,
                scorer=_scorer(host, subject, similarity, config, one.get("previews", True)),
                state=_state(trainer, one.get("resume", RESUME[0])),
                every=one.get("checkpoint_every", 25),
                patience=one.get("patience", PATIENCE),
                listeners=[view],
            )
            return _finished(run, view), notes


class PerfusionPickStep(io.ComfyNode):
    """Another step of a training than the best."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ``web/docs/PerfusionPickStep.md``."""
        return schema(
            node_id="PerfusionPickStep",
            display_name="Pick Step",
            category="Perfusion/train",
            description="Takes the concept as it was after another step of its training than the best one: earlier "
            "ones obey prompts better, later ones are closer to the photos.",
            search_aliases=["perfusion checkpoint", "training step", "epoch"],
            inputs=[
                Training.Input("steps", tooltip="From Train Concept."),
                io.Int.Input(
                    "step",
                    default=0,
                    min=0,
                    max=100_000,
                    tooltip="The judged step nearest to this one is taken. 0: the best.",
                ),
            ],
            outputs=[
                Concepts.Output(display_name="concept", tooltip="For Save Concept and Apply Concepts."),
                io.Int.Output(display_name="step", tooltip="The step that was taken."),
            ],
        )

    @classmethod
    def execute(cls, steps: Outcome, step: int) -> io.NodeOutput:
        """The checkpoint of that step."""
        if not step:
            return io.NodeOutput(ConceptStack((ConceptUse(steps.concept),)), steps.best_step)
        nearest = min(steps.checkpoints, key=lambda each: abs(each.step - step))
        return io.NodeOutput(ConceptStack((ConceptUse(nearest.concept),)), nearest.step)


def _similarity(host: ComfyHost, one: dict[str, Any]) -> ClipSimilarity | None:
    """The encoders that judge pictures, if they are connected."""
    if one.get("clip_vision") is None:
        return None
    own = one.get("score_clip") is None
    return ClipSimilarity(one["clip_vision"], one["clip" if own else "score_clip"], host.reload)


def _scorer(
    host: ComfyHost, subject: Subject, similarity: ClipSimilarity | None, config: TrainingConfig, previews: bool
) -> Scorer:
    """By pictures where there is a CLIP Vision to look at them, else by loss and gate, which is weaker."""
    prompts = validation_prompts(host, subject)
    drawing: dict[str, Any] = {
        "size": config.resolution,
        "batch": config.drawn_at_once,
        "between": comfy.model_management.throw_exception_if_processing_interrupted,
    }
    if similarity is not None:
        return PictureScorer(host, similarity, None, prompts, **drawing)
    logger.warning(
        "%s: no CLIP Vision is connected, so steps are judged by loss and gate, which is weaker: it does not see "
        "pictures, and leans to late steps.",
        NODE,
    )
    scorer = LossGateScorer(prompts)
    if not previews:
        return scorer
    return Previewed(scorer, Drawing(host, prompts[:PREVIEWS], **drawing))


def _state(trainer: Trainer, resume: str) -> Path:
    """The file in which this training is kept: that of the same training before, or a new one."""
    if resume not in RESUME:
        with naming(NODE, "resume"):
            return library.find_training(resume)
    name = file_stem(trainer.subject.placeholder)
    return own_file(library.training_folder(), name, trainer, resume=resume == RESUME[0])


def _finished(run: Run, view: TrainingView) -> Outcome:
    """Run a run. What was learned when it is stopped is kept as a concept file, too, to be tried at once."""
    try:
        return run.run()
    except BaseException as error:
        if (best := run.best) is not None:
            name = f"{best.concept.placeholder.strip('<>')}-step-{best.step}"
            try:
                path = best.concept.save_numbered(library.output_folder(), name, library.searched_before_output())
            except OSError as problem:
                logger.warning("%s: the concept of step %d could not be saved: %s", NODE, best.step, problem)
            else:
                logger.warning("%s: stopped; the concept of step %d is saved as %s", NODE, best.step, path.name)
                view.tell(step=best.step, saved=path.name)
                if isinstance(error, TrainingError):
                    raise TrainingError(f"{error} It is saved as {path.name}.") from error
        raise


def table(outcome: Outcome, notes: Sequence[str] = ()) -> str:
    """The judged steps of a training, one a line, as plain text, and what else its user should know."""

    def said(value: float | None) -> str:
        return "      -" if value is None else f"{value:7.4f}"

    scores = [each.score for each in outcome.checkpoints]
    weak = any(score is not None and score.weak for score in scores)
    lines = [f"{'step':>6} {'score':>7} {'image':>7} {'text':>7} {'loss':>7}"]
    for each, score in zip(outcome.checkpoints, scores, strict=True):
        values = (None, None, None) if score is None else (score.value, score.image, score.text)
        best = "  best" if each.step == outcome.best_step else ""
        lines.append(f"{each.step:6} {' '.join(map(said, (*values, each.loss)))}{best}")
    if outcome.resumed_from:
        lines.append(f"Went on from step {outcome.resumed_from}.")
    if outcome.stopped_early:
        lines.append("Stopped early: the score had clearly passed its best.")
    if weak:
        lines.append("Judged by loss and gate alone. Connect a CLIP Vision to judge by pictures.")
    return "\n".join([*lines, *notes])


def _photo_captions(texts: list[Any] | None, photos: int) -> list[str] | None:
    """One text for each photo; None where nothing is connected."""
    if not texts or all(text is None for text in texts):
        return None
    if len(texts) != photos:
        raise ValueError(
            f"{NODE}, input 'photo_captions': {photos} photos but {len(texts)} captions. Connect both to the same Load "
            "Photos, or give one text for each photo."
        )
    return [text or "" for text in texts]


def _flat_masks(batches: list[Any] | None) -> list[Any] | None:
    """Masks (h, w) one by one, of batches (n, h, w) or single ones; None when no mask is connected."""
    connected = [batch for batch in batches or [] if batch is not None]
    return [mask for batch in connected for mask in (batch if batch.ndim == 3 else [batch])] or None


def _corpus(host: ComfyHost, name: str, size: int) -> list[str]:
    """The captions that the input names."""
    return captions_for(host, None if name == OWN_CAPTIONS else library.find_corpus(name), size)


NODES = [PerfusionTrainConcept, PerfusionPickStep]
