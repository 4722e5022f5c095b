"""Starting the training of a part, in one process or several."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch.multiprocessing.spawn import spawn


def start(options: argparse.Namespace) -> None:
    """Train or export one part, by the options of the command line."""
    if options.processes > 1 and not options.export:
        try:
            spawn(_worker, (options,), options.processes)
        finally:
            _meeting(options, os.getpid()).unlink(missing_ok=True)
    else:
        _run(options)


def _meeting(options: argparse.Namespace, parent: int) -> Path:
    """The file by which the processes of a parent find each other."""
    return (options.cache / f"processes-{parent}").absolute()


def _worker(number: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    meeting = _meeting(options, os.getppid()).as_uri()
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=number, world_size=options.processes)
    _run(options)


def _run(o: argparse.Namespace) -> None:
    """Train or export one part."""
    if o.export:
        from .export import export

        export(o.cache, o.part)
    elif o.part == "vae":
        from .vae import train

        share = (o.batch or 16) // o.processes
        train(o.cache, o.steps or 1500, o.rate or 1e-3, share, o.pictures, o.compile, o.from_weights, o.seed)
    elif o.part == "text":
        from .text import train

        train(o.cache, o.steps or 1500, o.rate or 1e-3, o.batch or 128, o.pictures, o.from_weights, o.seed)
    elif o.part == "unet":
        from .unet import train

        share = (o.batch or 32) // o.processes
        train(o.cache, o.steps or 12_000, o.rate or 1e-3, share, o.pictures, o.compile, o.from_weights, o.seed)
    else:
        from .judges import train

        train(o.cache, o.steps or 3000, o.rate or 1e-3, o.batch or 192, o.pictures, o.from_weights, o.seed)
