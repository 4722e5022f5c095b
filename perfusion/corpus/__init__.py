"""Captions that the method's statistics and concept encodings are estimated from."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .grammar import captions, captions_naming, captions_renaming, load_captions, paper_templates

__all__ = ["captions", "captions_naming", "captions_renaming", "load_captions", "paper_templates"]


def __getattr__(name: str) -> Any:
    """Import the grammar on first use, so that ``python -m perfusion.corpus.grammar`` does not load it twice."""
    if name in __all__:
        return getattr(import_module(".grammar", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
