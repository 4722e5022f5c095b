"""Settings of the trainings of benchmarks on the miniature, as options of their command lines."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from miniature import world
from perfusion.cli.options import SETTINGS, add_option
from perfusion.training.config import TrainingConfig

# How the word is heard, at what it is learned, and what is learned of it.
HEARING = ("scope", "focus", "companions", "timesteps", "embedding_rate", "key_rate", "preservation")


def add_settings(parser: ArgumentParser, *names: str) -> None:
    """Let a benchmark take these settings of ``TrainingConfig``, and how many steps each concept is trained."""
    parser.add_argument("--steps", type=int, default=250, help="training steps for each of them")
    for option in (option for option in SETTINGS if option.name in names):
        add_option(parser, option, option.default)


def config_of(options: Namespace, *names: str) -> TrainingConfig:
    """The trainings that were asked for: whole batches of photos of the miniature's size."""
    chosen = {name: getattr(options, name) for name in names}
    return TrainingConfig(steps=options.steps, micro_batch=0, resolution=world.SIZE, **chosen)
