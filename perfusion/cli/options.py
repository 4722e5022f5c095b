"""What a training can be told, by the command line and by manifests alike, and the checked ``Job`` that comes of it."""

from __future__ import annotations

import math
import re
from argparse import ArgumentParser, BooleanOptionalAction
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from ..concept import check_placeholder, file_stem
from ..training.choice import PATIENCE
from ..training.config import TrainingConfig
from ..training.run import MOST_PATIENCE

AUTOMATIC = "auto"
PRECISIONS = (AUTOMATIC, "float32", "bfloat16")
_LONGEST_TEXT = 1000
_SHOWN = 60  # characters of a wrong value in a message
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}


@dataclass(frozen=True)
class Option:
    """Something that can be set: ``--batch-size`` on the command line is ``batch_size`` in a manifest."""

    name: str
    kind: type
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()
    required: bool = False
    least: float = -math.inf
    most: float = math.inf

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")


def _settings() -> tuple[Option, ...]:
    """An option for each field of ``TrainingConfig``, which checks the values itself."""
    hints = get_type_hints(TrainingConfig)
    options = []
    for field in fields(TrainingConfig):
        hint, text = hints[field.name], TrainingConfig.help(field.name)
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        most = 2**53 - 1 if field.name == "seed" else math.inf
        least = 0 if field.name == "seed" else -math.inf
        options.append(
            Option(field.name, str if choices else hint, text, field.default, choices, least=least, most=most)
        )
    return tuple(options)


SETTINGS = _settings()
OPTIONS = (
    Option(
        "images",
        Path,
        "The folder with the photos, 1 to 10 of the thing. A mask beside a photo is named like it with -mask, its "
        "captions with .txt, one a line.",
        required=True,
    ),
    Option("super_category", str, "What kind of thing it is, in plain words: teddy bear, cat, chair.", required=True),
    Option(
        "model",
        Path,
        "The model to learn on: a folder as diffusers keeps them, or a .safetensors checkpoint with --model-config or "
        "--comfyui.",
    ),
    Option("model_config", Path, "For a checkpoint: a folder as diffusers keeps them whose networks are of its kind."),
    Option(
        "placeholder",
        str,
        "The word that will stand for the thing in prompts, such as <my-teddy>. Left out, it is made of the name of "
        "the folder.",
    ),
    Option("name", str, "The name of the concept's file. Left out, it is the placeholder's."),
    Option(
        "out",
        Path,
        "The folder for concept files. What is needed to go on, and measurements of the text encoder, lie in it too.",
        Path("concepts"),
    ),
    *SETTINGS,
    Option("every", int, "After how many steps each the concept is judged and the training saved.", 25, (), False, 1),
    Option(
        "patience",
        int,
        "Stops early when so many judged steps in a row are clearly worse than the best. 0: never.",
        PATIENCE,
        least=0,
        most=MOST_PATIENCE,
    ),
    Option(
        "masks",
        bool,
        "Learn the thing alone: where its mask is, else where the model itself looks for it. Off: all of the photos "
        "is learned, the background too.",
        True,
    ),
    Option("aspect_buckets", bool, "Photos keep their shapes, as nearly as can be. Off: they become squares.", False),
    Option("captions", Path, "A .txt file of captions to train with, one a line, with {} where the word goes."),
    Option("corpus", Path, "A .txt file of captions, one a line, by which the text encoder is measured, once."),
    Option("corpus_size", int, "How many of those captions are read, at most.", 2400, least=32, most=1_000_000),
    Option("device", str, "Where to compute: cpu, cuda, cuda:1, mps; auto takes a GPU where there is one.", AUTOMATIC),
    Option(
        "precision",
        str,
        "What the network computes in: auto is bfloat16 on GPUs that are made for it, else float32.",
        AUTOMATIC,
        PRECISIONS,
    ),
)
BY_NAME = {option.name: option for option in OPTIONS}


@dataclass(frozen=True)
class Runtime:
    """Programs that a call lets in, and no manifest can, since they run code.

    ``host`` is the ``module:function`` that makes the host in place of a model; ``comfyui`` the folder of a ComfyUI
    whose loaders read a checkpoint.
    """

    host: str = ""
    comfyui: Path | None = None


NO_RUNTIME = Runtime()


@dataclass(frozen=True)
class Job:
    """One concept to be learned, with everything checked that can be without a model. Paths are absolute."""

    images: Path
    super_category: str
    placeholder: str
    name: str
    out: Path
    config: TrainingConfig
    model: Path | None
    model_config: Path | None
    runtime: Runtime
    every: int
    patience: int
    masks: bool
    aspect_buckets: bool
    captions: Path | None
    corpus: Path | None
    corpus_size: int
    device: str
    precision: str


class OptionError(ValueError):
    """A call that cannot be meant. ``problems``: the option's name, empty for none, and what is wrong with it."""

    def __init__(self, problems: list[tuple[str, str]]):
        super().__init__("; ".join(f"{name}: {text}" if name else text for name, text in problems))
        self.problems = problems


def add_option(parser: ArgumentParser, option: Option, default: Any = None) -> None:
    """Let a command take one option, which is ``default`` where it is not given."""
    told = "" if option.default is None else f" Default: {_told(option.default)}."
    text = (option.help + told).replace("%", "%%")
    if option.kind is bool:
        parser.add_argument(option.flag, action=BooleanOptionalAction, help=text, default=default)
    else:
        parser.add_argument(
            option.flag,
            type=option.kind,
            help=text,
            default=default,
            choices=option.choices or None,
            metavar=None if option.choices else "PATH" if option.kind is Path else option.name.upper(),
        )


def add_options(parser: ArgumentParser, names: tuple[str, ...] = tuple(BY_NAME)) -> None:
    """Let a command take options. Those that are not given are None, so that defaults have one place."""
    for name in names:
        add_option(parser, BY_NAME[name])
    parser.add_argument(
        "--comfyui",
        type=Path,
        metavar="PATH",
        help="The folder of a ComfyUI whose loaders read the checkpoint, in place of diffusers; SDXL needs it.",
    )
    parser.add_argument(
        "--host",
        metavar="MODULE:FUNCTION",
        help="In place of --model: a Python function without arguments that gives the host to learn on, such as "
        "miniature.host:load_host.",
    )


def typed(option: Option, value: Any) -> Any:
    """A value of a manifest as the option has it. Raises ValueError for one of another kind."""
    if not _fits(option.kind, value):
        raise ValueError(f"{_shown(value)} is not {_KINDS[option.kind]}")
    return option.kind(value)


def _fits(kind: type, value: Any) -> bool:
    if kind in (str, Path):
        return isinstance(value, (str, Path)) and 0 < len(str(value)) <= _LONGEST_TEXT and "\0" not in str(value)
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float) if kind is float else int)


def job_of(values: Mapping[str, Any], runtime: Runtime = NO_RUNTIME) -> Job:
    """A job of typed values, by option; what is missing or None has its default.

    Raises OptionError with all that is wrong, each with its option.
    """
    problems: list[tuple[str, str]] = []
    given = {name: value for name, value in values.items() if value is not None}
    chosen = {option.name: given.get(option.name, option.default) for option in OPTIONS}
    for option in OPTIONS:
        problem = _problem(option, chosen[option.name])
        if problem:
            problems.append((option.name, problem))
    if not runtime.host and chosen["model"] is None:
        problems.append(("model", "it is missing: give the model to learn on"))
    if runtime.host and chosen["model"] is not None:
        problems.append(("model", "it cannot be given together with --host: leave one of them out"))
    paths = {option.name for option in OPTIONS if option.kind is Path}
    absolute = {name: value if value is None else value.expanduser().absolute() for name, value in chosen.items()
                if name in paths}  # fmt: skip
    problems += _path_problems(absolute, {name for name, _ in problems})
    problems += _model_problems(absolute["model"], absolute["model_config"], runtime)
    placeholder = name = ""
    try:
        placeholder = check_placeholder(chosen["placeholder"] or _word_of(absolute["images"]))
        name = file_stem(chosen["name"] or placeholder.strip("<>"))
    except ValueError as error:
        problems.append(("name" if placeholder else "placeholder", str(error)))
    if problems:
        raise OptionError(problems)
    config = TrainingConfig(**{option.name: chosen.pop(option.name) for option in SETTINGS})
    chosen |= {"super_category": chosen["super_category"].strip(), "placeholder": placeholder, "name": name}
    return Job(**{**chosen, **absolute}, config=config, runtime=runtime)


def _problem(option: Option, value: Any) -> str:
    """What is wrong with a value, by itself; empty for nothing."""
    if value is None or (option.kind is str and option.required and not value.strip()):
        return "it is missing" if option.required else ""
    if option.choices and value not in option.choices:
        return f"{_shown(value)} is not one of {', '.join(option.choices)}"
    if option.kind in (int, float) and not option.least <= value <= option.most:
        top = f" to {option.most:,.0f}" if option.most < math.inf else " or more"
        return f"{value} is out of range: it must be {option.least:,.0f}{top}"
    if option in SETTINGS:
        try:
            TrainingConfig(**{option.name: value})
        except ValueError as error:
            return str(error)
    if option.name == "device" and value != AUTOMATIC:
        try:
            torch.device(value)
        except RuntimeError:
            return f"{_shown(value)} is no device: cpu, cuda, cuda:1 and mps are some"
    return ""


def _path_problems(paths: Mapping[str, Path | None], known: set[str]) -> list[tuple[str, str]]:
    """What cannot be found where it is said to be."""
    problems = []
    for name, folder in (("images", True), ("model_config", True), ("captions", False), ("corpus", False)):
        path = paths[name]
        if path is not None and name not in known and not (path.is_dir() if folder else path.is_file()):
            problems.append((name, f"there is no {'folder' if folder else 'file'} {_shown(path)}"))
    out = paths["out"]
    if out is not None and out.exists() and not out.is_dir():
        problems.append(("out", f"{_shown(out)} is a file: give a folder"))
    return problems


def _model_problems(model: Path | None, config: Path | None, runtime: Runtime) -> list[tuple[str, str]]:
    """What is wrong with a model that is said to be in a file or folder."""
    if model is None:
        return []
    if not model.exists():
        return [("model", f"there is no file or folder {_shown(model)}")]
    if model.is_file() and model.suffix != ".safetensors":
        return [("model", "only .safetensors files are read: opening others can run code that is in them")]
    if runtime.comfyui is not None:
        return [] if model.is_file() else [("model", "with --comfyui it must be a checkpoint, a .safetensors file")]
    if model.is_file() and config is None:
        return [("model_config", "it is missing: nothing is downloaded, so a checkpoint needs it, or --comfyui")]
    return []


def _word_of(folder: Path | None) -> str:
    """A placeholder made of a folder's name: "My Teddy" -> "<my-teddy>"."""
    name = "" if folder is None else folder.resolve().name.lower()
    return f"<{re.sub(r'[^a-z0-9_-]+', '-', name).strip('-_')[:48].strip('-_') or 'my-thing'}>"


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, Path) else repr(value)
    return "".join(c if c.isprintable() else "?" for c in text[: 4 * _SHOWN if isinstance(value, Path) else _SHOWN])


def _told(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
