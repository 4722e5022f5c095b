"""See the package."""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    """Train one part."""
    parser = argparse.ArgumentParser(prog="python -m miniature.training", description=__doc__)
    parser.add_argument("part", choices=["vae", "text", "unet", "judges"])
    parser.add_argument("--cache", type=Path, default=Path(".cache/miniature"), help="pictures and checkpoints")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--pictures", type=int, default=60_000)
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster, needs a C++ compiler")
    o = parser.parse_args()
    if o.part == "vae":
        from .vae import train

        train(o.cache, o.steps or 1400, o.rate or 1e-3, o.batch or 32, o.pictures, o.compile)
    elif o.part == "text":
        from .text import train

        train(o.cache, o.steps or 1500, o.rate or 1e-3, o.batch or 128, o.pictures)


if __name__ == "__main__":
    main()
