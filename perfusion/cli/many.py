"""Many concepts in one call, by a manifest: checked as a whole first, then each learned, whatever becomes of others.

    {
      "defaults": {"model": "stable-diffusion-v1-5", "steps": 200},
      "concepts": [
        {"images": "photos/teddy", "super_category": "teddy bear"},
        {"images": "photos/cat", "super_category": "cat", "placeholder": "<minka>", "steps": 300}
      ]
    }

The same as TOML has ``[defaults]`` and a ``[[concepts]]`` for each. Names are those of the command line's options with
_ for -. Paths are seen from the manifest's folder.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import train as one
from .console import result, say
from .options import BY_NAME, NO_RUNTIME, Job, OptionError, Runtime, job_of, typed
from .train import Result

logger = logging.getLogger(__name__)

MOST_CONCEPTS = 10_000
_LARGEST = 16 << 20  # bytes
_LISTED = 50  # problems
_SECONDS_TO_SAVE = 30.0  # for what Ray runs, when all of it is stopped


class ManifestError(ValueError):
    """A manifest of which nothing is run. ``problems`` is what is wrong with it, one line each."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


class RayMissingError(RuntimeError):
    """Ray is asked for and not installed; the message says how to."""


def read_manifest(path: Path, overrides: Mapping[str, Any] | None = None, runtime: Runtime = NO_RUNTIME) -> list[Job]:
    """The jobs of a manifest. ``overrides`` and a host come before its defaults, and its concepts before those.

    Raises ManifestError with all that is wrong with it, and OSError when it cannot be read.
    """
    content = _parsed(path)
    problems = [f"{_quoted(name)} is unknown: a manifest has defaults and concepts" for name in content
                if name not in ("defaults", "concepts")]  # fmt: skip
    defaults, entries = content.get("defaults", {}), content.get("concepts")
    if not isinstance(defaults, dict):
        raise ManifestError([*problems, "defaults is no table of options"])
    if not isinstance(entries, list) or not 0 < len(entries) <= MOST_CONCEPTS:
        raise ManifestError([*problems, f"concepts must be a list of 1 to {MOST_CONCEPTS:,} tables, one a concept"])
    common, wrong = _typed(defaults, path.parent)
    problems += [f"defaults, {text}" for text in wrong]
    common |= {name: value for name, value in (overrides or {}).items() if value is not None}
    if runtime.host:
        common.pop("model", None)
    jobs: list[Job] = []
    first: dict[tuple[Path, str], int] = {}
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict):
            problems.append(f"concept {number} is no table of options")
            continue
        own, wrong = _typed(entry, path.parent)
        problems += [f"concept {number}, {text}" for text in wrong]
        try:
            job = job_of(common | own, replace(runtime, host="") if "model" in own else runtime)
        except OptionError as error:
            misread = {text.split(":")[0] for text in wrong}
            problems += [f"concept {number}, {name}: {text}" for name, text in error.problems if name not in misread]
            continue
        jobs.append(job)
        other = first.setdefault((job.out, job.name.lower()), number)
        if other != number:
            problems.append(
                f"concept {number}, name: {job.name} is the name of concept {other} too: give one of them another name"
            )
    if problems:
        raise ManifestError(problems[:_LISTED] + ([f"and {len(problems) - _LISTED} more"] * (len(problems) > _LISTED)))
    return jobs


def train_many(jobs: Sequence[Job], *, ray: bool = False, as_json: bool = False) -> bool:
    """Learn each concept; returns whether all went well. Results go to stdout as they come, a summary to stderr.

    Raises RayMissingError; KeyboardInterrupt, with a note on how to go on, when it is stopped.
    """
    results: dict[int, Result] = {}
    learned = _by_ray(jobs) if ray else _one_by_one(jobs)
    try:
        for number, each in learned:
            results[number] = each
            if each.error:
                say(f"{each.name}: failed: {each.error}")
            if as_json:
                result(each.line())
            elif each.file:
                result(each.file)
    finally:
        if results:
            say(summary([results[number] for number in sorted(results)], len(jobs)))
    return not any(each.error for each in results.values())


def summary(results: Sequence[Result], jobs: int) -> str:
    """A table of results, one a line, and how many of all ``jobs`` came out how."""
    width = min(40, max([len(each.name) for each in results] + [len("concept")]))
    lines = [f"{'concept':<{width}} {'steps':>6} {'best':>6} {'score':>7} {'seconds':>8}  result"]
    for each in results:
        best, score = each.best_step or "-", "-" if each.score is None else f"{each.score:.4f}"
        told = f"failed: {each.error.splitlines()[0][:80]}" if each.error else "was done" if each.was_done else "done"
        lines.append(
            f"{each.name[:width]:<{width}} {each.steps or '-':>6} {best:>6} {score:>7} {each.seconds:8.1f}  {told}"
        )
    failed = sum(bool(each.error) for each in results)
    left = f", {jobs - len(results)} are left" if jobs > len(results) else ""
    lines.append(f"{len(results) - failed} of {jobs} concepts are done, {failed} failed{left}.")
    return "\n".join(lines)


def attempt(job: Job) -> Result:
    """Learn a concept. Whatever goes wrong with it is in the result."""
    started = time.monotonic()
    try:
        return one.train(job)
    except (ValueError, OSError) as error:
        message = str(error)
    except Exception as error:
        logger.exception("%s", job.name)
        message = f"{type(error).__name__}: {error}"
    return Result(job.name, job.placeholder, seconds=time.monotonic() - started, error=message or "it failed")


def _one_by_one(jobs: Sequence[Job]) -> Iterator[tuple[int, Result]]:
    for number, job in enumerate(jobs):
        yield number, attempt(job)


def _by_ray(jobs: Sequence[Job]) -> Iterator[tuple[int, Result]]:
    """Each concept as a task of Ray, on a GPU of its own where there are any. Results come as they finish."""
    try:
        import ray
    except ImportError as error:
        raise RayMissingError(
            'Ray is not installed: pip install "comfyui-perfusion[ray]", or leave --ray out to train here, one after '
            "the other"
        ) from error
    with _connected(ray):
        resources: dict[str, Any] = {"num_gpus": 1} if ray.cluster_resources().get("GPU", 0) else {"num_cpus": 1}
        task: Any = ray.remote(**resources)(attempt)
        open_: dict[Any, int] = {}
        for number, job in enumerate(jobs):
            known = one.finished(job)
            if known is not None:
                yield number, known
            else:
                open_[task.remote(job)] = number
        try:
            while open_:
                (done,), _ = ray.wait(list(open_), num_returns=1)
                number = open_.pop(done)
                yield number, _gathered(lambda done=done: ray.get(done), jobs[number])
        except (KeyboardInterrupt, GeneratorExit):
            # Each saves its state, as at Ctrl-C.
            for reference in open_:
                ray.cancel(reference)
            if open_:
                ray.wait(list(open_), num_returns=len(open_), timeout=_SECONDS_TO_SAVE)
            raise


def _gathered(get: Callable[[], Result], job: Job) -> Result:
    """The result of a task; a worker that died is a failed concept like any other."""
    try:
        return get()
    except Exception as error:
        text = next(iter(str(error).strip().splitlines()), "")
        return Result(job.name, job.placeholder, error=f"its worker failed ({type(error).__name__}: {text[:200]})")


@contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """Ray as it runs here, or at RAY_ADDRESS, or else one of this machine for as long as this takes."""
    if ray.is_initialized():
        yield
        return
    ray.init(include_dashboard=False, log_to_driver=True)
    try:
        yield
    finally:
        ray.shutdown()


def _typed(entry: Mapping[Any, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The options of a table as they should be, paths seen from ``folder``, and what is wrong with others."""
    values: dict[str, Any] = {}
    problems = []
    for name, value in entry.items():
        if name not in BY_NAME:
            problems.append(f"{_quoted(name)} is no option: see python -m perfusion train --help")
            continue
        try:
            found = typed(BY_NAME[name], value)
        except ValueError as error:
            problems.append(f"{name}: {error}")
        else:
            values[name] = folder / found.expanduser() if isinstance(found, Path) else found
    return values, problems


def _parsed(path: Path) -> dict[str, Any]:
    """The table that a JSON or TOML file holds. Raises ManifestError for what is none."""
    with path.open("rb") as file:
        data = file.read(_LARGEST + 1)
    if len(data) > _LARGEST:
        raise ManifestError([f"{path.name} is larger than {_LARGEST >> 20} MiB, which no manifest is"])
    try:
        text = data.decode("utf-8-sig")
        content = _toml(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError([f"{path.name} cannot be read ({error}): it must be JSON, or TOML as .toml"]) from None
    if not isinstance(content, dict):
        raise ManifestError([f"{path.name} must hold a table with concepts"])
    return content


def _toml(text: str) -> Any:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError("Python before 3.11 reads TOML with tomli alone, pip install tomli, or use JSON") from None
    return tomllib.loads(text)


def _quoted(name: Any) -> str:
    return "".join(c if c.isprintable() else "?" for c in repr(name)[:60])
