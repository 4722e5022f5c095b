"""Writing files so that nothing of a user is ever overwritten by accident or left half written."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

from safetensors.torch import save
from torch import Tensor


def write_atomically(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, overwrite: bool
) -> None:
    """Write a .safetensors file in one step: it appears whole or not at all, also when the disk is full.

    Raises FileExistsError when the file exists and ``overwrite`` is off, OSError when it cannot be written.
    """
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, dict(metadata))
    write_bytes_atomically(path, data, overwrite=overwrite)


def write_bytes_atomically(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Write any file in one step; raises as ``write_atomically``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # that is said of the file alone
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from None
    temporary = path.parent / f".{path.stem[:40]}-{uuid4().hex}.part"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            _publish(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _publish(temporary: Path, path: Path) -> None:
    """Give the finished file its name, which nobody else may have taken meanwhile."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        # A file system without hard links: claim the name first, then put the finished file there.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.replace(temporary, path)
        except OSError:
            os.unlink(path)
            raise
