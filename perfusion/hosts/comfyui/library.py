"""Where concept files lie: models/perfusion, and output/perfusion, where freshly trained ones are saved."""

from __future__ import annotations

import ntpath
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import folder_paths

from ...concept import Concept, ConceptFileError, load

FOLDER = "perfusion"
EXTENSIONS = {".safetensors"}
_STATISTICS = "statistics"


def register() -> None:
    """Tell ComfyUI of the folders, after which its own combos, browser and API know them."""
    with suppress(OSError):  # a place to put files; without it, output/perfusion remains
        os.makedirs(os.path.join(folder_paths.models_dir, FOLDER), exist_ok=True)
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    folder_paths.add_model_folder_path(FOLDER, str(output_folder()))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, EXTENSIONS)


def output_folder() -> Path:
    """Where concepts are saved."""
    return Path(folder_paths.get_output_directory()) / FOLDER


def searched_before_output() -> list[Path]:
    """Folders in which a file hides one of the same name in the output folder."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(FOLDER)]
    return folders[: folders.index(output_folder())] if output_folder() in folders else folders


def statistics_folder() -> Path:
    """Where second moments of text encodings are kept; anything in it can be deleted."""
    return Path(folder_paths.get_user_directory()) / FOLDER / _STATISTICS


def names() -> list[str]:
    """The concept files that a user can choose, sorted."""
    return sorted(folder_paths.get_filename_list(FOLDER), key=str.lower)


def find(name: str) -> Path:
    """The file of a name as ``names`` gives it.

    Raises ConceptFileError for names that are no file below the folders: missing, absolute, or with ``..``.
    """
    if Path(name).suffix.lower() not in EXTENSIONS:
        raise ConceptFileError(
            f"{name!r} is not a .safetensors file; other kinds (.pt, .ckpt) can run code when they are opened and are "
            "never read. Choose a file saved by Save Concept."
        )
    outside = os.path.isabs(name) or ntpath.splitdrive(name)[0] or ".." in re.split(r"[\\/]", name)
    path = None if outside else folder_paths.get_full_path(FOLDER, name)
    if path is None:
        raise ConceptFileError(
            f"there is no concept file {name!r} in models/{FOLDER} or output/{FOLDER}. Put it there and press R to "
            "refresh the list, or choose another."
        )
    return Path(path)


def read(name: str) -> Concept:
    """The concept of a name as ``names`` gives it. Raises ConceptFileError when there is no usable one."""
    path = find(name)
    try:
        return load(path)
    except OSError as error:
        raise ConceptFileError(f"{name} cannot be read: {error.strerror or error}") from None


def stamp(name: str) -> str:
    """Changes when the file of that name does; for the host's cache."""
    return _stamp(name, find)


def corpora() -> list[str]:
    """Caption files (.txt) that users have put into models/perfusion, sorted."""
    folder = Path(folder_paths.models_dir) / FOLDER
    return sorted(path.name for path in folder.glob("*.txt")) if folder.is_dir() else []


def find_corpus(name: str) -> Path:
    """The caption file of a name as ``corpora`` gives it. Raises ValueError when there is none."""
    if name not in corpora():
        raise ValueError(f"there is no caption file {name!r} in models/{FOLDER}")
    return Path(folder_paths.models_dir) / FOLDER / name


def corpus_stamp(name: str) -> str:
    """Changes when the caption file of that name does; for the host's cache."""
    return _stamp(name, find_corpus)


def _stamp(name: str, locate: Callable[[str], Path]) -> str:
    try:
        status = locate(name).stat()
    except (ValueError, OSError):
        return f"{name}: missing"
    return f"{name}: {status.st_size} {status.st_mtime_ns}"
