"""Where concept files lie: models/perfusion, and output/perfusion, where freshly trained ones are saved."""

from __future__ import annotations

import ntpath
import os
import re
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from itertools import islice
from pathlib import Path

import folder_paths

from ...concept import Concept, ConceptFileError, load
from ...training.folder import EXTENSIONS as PHOTOS
from ...training.folder import MASK_FOLDER, involved_files, is_below
from ..clipseg import MODEL_FILE as CLIPSEG_FILE

FOLDER = "perfusion"
EXTENSIONS = {".safetensors"}
_STATISTICS = "statistics"
_TRAININGS = "trainings"
CLIPSEG = "clipseg"
_DEEPEST, _MOST_FOLDERS = 4, 2000  # levels below the input folder, and folders in all, that are looked into


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


def training_folder() -> Path:
    """Where trainings are kept that were stopped or may go on; anything in it can be deleted."""
    return Path(folder_paths.get_user_directory()) / FOLDER / _TRAININGS


def trainings() -> list[str]:
    """The trainings that are kept, sorted."""
    return sorted((path.stem for path in training_folder().glob("*.safetensors")), key=str.lower)


def find_training(name: str) -> Path:
    """The file of a training as ``trainings`` gives it. Raises ValueError when there is none."""
    if name not in trainings():
        raise ValueError(
            f"there is no training {name!r} to go on with in user/{FOLDER}/{_TRAININGS}. Press R to refresh the list, "
            "and choose another, or 'automatic'."
        )
    return training_folder() / f"{name}.safetensors"


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
    path = None if _leads_outside(name) else folder_paths.get_full_path(FOLDER, name)
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


def photo_folders() -> list[str]:
    """Folders below ComfyUI's input that hold photos, sorted, as ``a/b``; those of masks are part of their photos'."""
    top = Path(folder_paths.get_input_directory())
    found: list[str] = []
    visited = islice(os.walk(top), _MOST_FOLDERS)
    for place, below, files in visited:
        inside = Path(place).relative_to(top).parts
        below[:] = sorted(name for name in below if name.lower() != MASK_FOLDER and not name.startswith("."))
        if len(inside) == _DEEPEST:
            below.clear()
        if inside and any(Path(name).suffix.lower() in PHOTOS for name in files):
            found.append("/".join(inside))
    return sorted(found, key=str.lower)


def find_photo_folder(name: str) -> Path:
    """The folder of a name as ``photo_folders`` gives it.

    Raises ValueError for names that are no folder below ComfyUI's input: missing, absolute, with ``..``, or by a link
    elsewhere.
    """
    path = Path(folder_paths.get_input_directory()) / name
    if not name or _leads_outside(name) or not path.is_dir() or not is_below(path, input_folder()):
        raise ValueError(
            f"there is no folder {name!r} in ComfyUI's input folder. Put a folder with photos there and press R to "
            "refresh the list, or choose another."
        )
    return path


def input_folder() -> Path:
    """ComfyUI's input folder: links that lead out of it are not followed."""
    return Path(folder_paths.get_input_directory())


def photo_folder_stamp(name: str) -> str:
    """Changes when a photo, mask or text in the folder of that name does, comes or goes; for the host's cache."""
    try:
        files = involved_files(find_photo_folder(name), input_folder())
        status = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    except (ValueError, OSError):
        return f"{name}: missing"
    return f"{name}: {sha256(repr(status).encode()).hexdigest()}"


def clipseg_folder() -> Path:
    """Where CLIPSeg lies, or would: models/clipseg, or a folder of that kind in extra_model_paths.yaml."""
    own = Path(folder_paths.models_dir) / CLIPSEG
    known = folder_paths.folder_names_and_paths.get(CLIPSEG, ([], set()))[0]
    folders = [own, *map(Path, known)]
    return next((folder for folder in folders if (folder / CLIPSEG_FILE).is_file()), own)


def _stamp(name: str, locate: Callable[[str], Path]) -> str:
    try:
        status = locate(name).stat()
    except (ValueError, OSError):
        return f"{name}: missing"
    return f"{name}: {status.st_size} {status.st_mtime_ns}"


def _leads_outside(name: str) -> bool:
    """Whether a name is absolute, on any system, or goes up."""
    return bool(os.path.isabs(name) or ntpath.splitdrive(name)[0] or ".." in re.split(r"[\\/]", name))
