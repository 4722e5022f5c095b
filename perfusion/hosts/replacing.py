"""Other methods for single objects, for a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced(thing: Any, name: str, replacement: Any) -> Iterator[None]:
    """Another method ``name`` on this one object for the time of the block."""
    own = vars(thing).get(name)
    setattr(thing, name, replacement)
    try:
        yield
    finally:
        # Under somebody else's replacement that was laid over it since, ours stays where it is.
        if vars(thing).get(name) is replacement:
            if own is None:
                delattr(thing, name)
            else:
                setattr(thing, name, own)


@contextmanager
def replaced_forwards(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Other forwards for some modules, for the time of the block."""
    with ExitStack() as stack:
        for module, forward in replacements.items():
            stack.enter_context(replaced(module, "forward", forward))
        yield
