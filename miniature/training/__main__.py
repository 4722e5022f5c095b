"""See the package."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch.multiprocessing.spawn import spawn


def main() -> None:
    """Train one part."""
    parser = argparse.ArgumentParser(prog="python -m miniature.training", description=__doc__)
    parser.add_argument("part", choices=["vae", "text", "unet", "judges"])
    parser.add_argument("--export", action="store_true", help="write the weights of its checkpoint instead")
    parser.add_argument("--cache", type=Path, default=Path(".cache/miniature"), help="pictures and checkpoints")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--pictures", type=int, default=60_000)
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster, needs a C++ compiler")
    parser.add_argument("--from-weights", action="store_true", help="unet: begin a new run with the weights that ship")
    parser.add_argument(
        "--processes", type=int, default=1, help="share each batch between so many processes; on a CPU, one a core"
    )
    o = parser.parse_args()
    if o.processes > 1 and not o.export:
        spawn(_worker, (o,), o.processes)
    else:
        run(o)


def _worker(number: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    meeting = (options.cache / f"processes-{os.getppid()}").absolute().as_uri()
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=number, world_size=options.processes)
    run(options)


def run(o: argparse.Namespace) -> None:
    """Train or export one part."""
    if o.export:
        from .export import export

        export(o.cache, o.part)
    elif o.part == "vae":
        from .vae import train

        train(o.cache, o.steps or 1500, o.rate or 1e-3, o.batch or 16, o.pictures, o.compile)
    elif o.part == "text":
        from .text import train

        train(o.cache, o.steps or 1500, o.rate or 1e-3, o.batch or 128, o.pictures)
    elif o.part == "unet":
        from .unet import train

        share = (o.batch or 32) // o.processes
        train(o.cache, o.steps or 12_000, o.rate or 1e-3, share, o.pictures, o.compile, o.from_weights)
    else:
        from .judges import train

        train(o.cache, o.steps or 3000, o.rate or 2e-3, o.batch or 64, o.pictures)


if __name__ == "__main__":
    main()
