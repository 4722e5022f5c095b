"""See the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from .start import start


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
    parser.add_argument("--from-weights", action="store_true", help="begin a new run with the weights that ship")
    parser.add_argument("--seed", type=int, default=0, help="another one for a run that goes on from weights")
    parser.add_argument(
        "--processes", type=int, default=1, help="share each batch between so many processes; on a CPU, one a core"
    )
    start(parser.parse_args())


if __name__ == "__main__":
    main()
