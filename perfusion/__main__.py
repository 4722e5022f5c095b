"""``python -m perfusion``: the same core without a graph.

python -m perfusion info FILE [--json]    what a concept file holds, and its size piece by piece
python -m perfusion train --images DIR --super-category teddy --model MODEL    learn a concept from photos
python -m perfusion train-many MANIFEST [--ray]    learn many, here or spread over machines
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .cli.commands import add_commands, run_many, run_train
from .concept import ConceptFileError, load


def info(path: Path) -> dict[str, object]:
    """What a concept file holds: word, family, settings, and bytes of each tensor, of the header and in all.

    Raises ConceptFileError when it is not a usable concept, OSError when it cannot be read.
    """
    concept = load(path)
    tensors = {name: tensor.numel() * tensor.element_size() for name, tensor in concept.tensors.items()}
    size, thumbnail = path.stat().st_size, len(concept.thumbnail)
    return {
        "file": path.name,
        "placeholder": concept.placeholder,
        "super_category": concept.super_category,
        "family": concept.family.title,
        "layers": len(concept.o_star_v),
        "storage": concept.storage,
        "form": concept.form,
        "estimator": concept.estimator,
        "scope": concept.scope,
        "focus": concept.focus,
        "keys": "the super-category's" if concept.e_key is None else "its own",
        "created": concept.created,
        "digest": concept.digest,
        "training": dict(concept.training),
        "bytes": {
            **tensors,
            "tensors": sum(tensors.values()),
            "thumbnail": thumbnail,
            "header": size - sum(tensors.values()) - thumbnail,
            "file": size,
        },
    }


def _print_info(facts: dict[str, object]) -> None:
    sizes = facts.pop("bytes")
    training = facts.pop("training")
    assert isinstance(sizes, dict) and isinstance(training, dict)
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):16} {value}")
    print(f"{'training':16} {', '.join(f'{name} {value}' for name, value in training.items())}")
    print("\nbytes")
    for name, count in sizes.items():
        print(f"  {name:18} {count:>9,}")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0 done, 1 a file, the photos or the training are at fault, 2 the call was wrong, 130 stopped by Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m perfusion", description="Perfusion concepts without a graph.")
    commands = parser.add_subparsers(dest="command", required=True)
    info_command = commands.add_parser("info", help="what a concept file holds, and its size piece by piece")
    info_command.add_argument("file", type=Path)
    info_command.add_argument("--json", action="store_true", help="one JSON line")
    add_commands(commands)
    options = parser.parse_args(arguments)
    if options.command == "train":
        return run_train(options)
    if options.command == "train-many":
        return run_many(options)
    try:
        facts = info(options.file)
    except (ConceptFileError, OSError) as error:
        print(f"perfusion: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(facts))
    else:
        _print_info(facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
