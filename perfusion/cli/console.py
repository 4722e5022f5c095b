"""What a person sees of a training in a terminal: on stderr, so that stdout holds results alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..training.run import Update


def say(text: str) -> None:
    """A line for the person at the terminal."""
    sys.stderr.write("".join(c if c.isprintable() or c == "\n" else "?" for c in text) + "\n")
    sys.stderr.flush()


def result(line: str) -> None:
    """A line for whoever reads the results."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for a piece of work, to be called with what is done of how much. Only a terminal shows it."""
    from tqdm import tqdm

    with tqdm(desc=what, leave=False, disable=None, file=sys.stderr) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield report


@contextmanager
def following(name: str, steps: int, done: Callable[[], int]) -> Iterator[Callable[[Update], None]]:
    """A listener for ``Run``: a bar in a terminal, and a line for each judged step anywhere."""
    from tqdm import tqdm

    with tqdm(desc=name, total=steps, unit="step", leave=False, disable=None, file=sys.stderr) as bar:

        def listen(update: Update) -> None:
            bar.update(done() - bar.n)
            bar.set_postfix_str(f"loss {update.loss:.4f}, gate {update.gate:.2f}", refresh=False)
            lines = [] if update.warning is None else [update.warning]
            if update.score is not None:
                lines.append(
                    f"step {update.step} of {update.steps}: loss {update.loss:.4f}, gate {update.gate:.2f}, score "
                    f"{update.score.value:.4f}, best at step {update.best_step}, {_time(update.seconds_left)} left"
                )
            if lines:
                with tqdm.external_write_mode(file=sys.stderr):
                    for line in lines:
                        say(f"{name}: {line}")

        yield listen


def _time(seconds: float) -> str:
    """A time as people say it: 75 -> "1:15 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02} h"
    return f"{minutes}:{rest:02} min" if minutes else f"{rest} s"
