"""The commands ``train`` and ``train-many``: what they take, and how their ends become exit codes."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .console import result, say
from .options import BY_NAME, OptionError, Runtime, add_options, job_of

DONE, FAILED, WRONG_CALL, STOPPED = 0, 1, 2, 130
_OF_ALL = ("model", "model_config", "out", "device", "precision")


def add_commands(commands: Any) -> None:
    """Add both commands to the subparsers of a parser."""
    train = commands.add_parser(
        "train",
        help="learn a concept from a folder of photos; the same call again goes on where it stopped",
        description="Learn a concept from a folder of photos. Progress goes to stderr, the path of the concept's file "
        "to stdout. The same call again goes on where it stopped; what is finished stays as it is.",
    )
    add_options(train)
    train.add_argument("--json", action="store_true", help="one JSON line in place of the path")
    many = commands.add_parser(
        "train-many",
        help="learn the concepts of a manifest, one after the other or spread by Ray",
        description="Learn the concepts of a manifest. All of it is checked first; one that fails leaves the others "
        "alone; the same call again goes on where it stopped. Options given here replace the manifest's defaults.",
    )
    many.add_argument("manifest", type=Path, help="a .json or .toml file: defaults, and a list of concepts")
    many.add_argument("--ray", action="store_true", help="each concept as a task of Ray, on a GPU of its own")
    add_options(many, _OF_ALL)
    many.add_argument("--json", action="store_true", help="one JSON line for each concept in place of its path")


def run_train(options: Namespace) -> int:
    """Learn one concept; returns the exit code."""
    try:
        job = job_of({name: getattr(options, name) for name in BY_NAME}, _runtime(options))
    except OptionError as error:
        return _told(error)

    def work() -> int:
        from .train import train

        learned = train(job)
        result(learned.line() if options.json else learned.file)
        return DONE

    return _ended(work)


def run_many(options: Namespace) -> int:
    """Learn the concepts of a manifest; returns the exit code."""
    from .many import ManifestError, RayMissingError, read_manifest, train_many

    overrides = {
        name: value.absolute() if isinstance(value, Path) else value
        for name in _OF_ALL
        if (value := getattr(options, name)) is not None
    }
    try:
        if options.host and "model" in overrides:
            raise OptionError([("model", "it cannot be given together with --host: leave one of them out")])
        jobs = read_manifest(options.manifest, overrides, _runtime(options))
    except OptionError as error:
        return _told(error)
    except ManifestError as error:
        say(f"perfusion: {options.manifest.name} was not run:")
        for problem in error.problems:
            say(f"  {problem}")
        return WRONG_CALL
    except OSError as error:
        say(f"perfusion: {options.manifest}: {error.strerror or error}")
        return WRONG_CALL

    def work() -> int:
        try:
            return DONE if train_many(jobs, ray=options.ray, as_json=options.json) else FAILED
        except RayMissingError as error:
            say(f"perfusion: --ray: {error}")
            return WRONG_CALL

    return _ended(work)


def _told(error: OptionError) -> int:
    for name, text in error.problems:
        say(f"perfusion: --{name.replace('_', '-')}: {text}")
    return WRONG_CALL


def _runtime(options: Namespace) -> Runtime:
    """Raises OptionError for programs that are not there, or are two."""
    comfyui = options.comfyui
    if comfyui is None:
        return Runtime(options.host or "")
    if options.host:
        raise OptionError([("host", "it cannot be given together with --comfyui: leave one of them out")])
    if not (comfyui / "comfy" / "sd.py").is_file():
        raise OptionError([("comfyui", "it is not the folder of a ComfyUI, in which its main.py lies")])
    return Runtime(comfyui=comfyui.absolute())


def _ended(work: Callable[[], int]) -> int:
    """The exit code of a piece of work, whose errors are told."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return work()
    except KeyboardInterrupt as stopped:
        notes = getattr(stopped, "__notes__", [])
        say("\n".join(["perfusion: stopped.", *(notes or ["The same call goes on from what is saved."])]))
        return STOPPED
    except (ValueError, OSError) as error:
        say(f"perfusion: {error}")
        return FAILED
