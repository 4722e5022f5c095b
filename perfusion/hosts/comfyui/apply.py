"""Concepts on a MODEL: one injection that wraps the forward of each cross-attention's ``to_k`` and ``to_v``.

An injection, and not an object patch or an attention patch, because it alone sees tokens and projections, leaves
state-dict keys and so LoRA alone, leaves ``attn2_replace`` to others, follows a patcher to whichever network it is
loaded on, and is undone by the host itself. Weights are read only by calling the wrapped forward.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP
from torch import Tensor

from ...edit import KeyValueEdit
from ...stack import ConceptStack
from .structure import projections
from .text import KEY_SHIFT, WordUsage

KEY = "perfusion"


class Applied:
    """What is applied to one patcher, as its attachment; a clone of the patcher gets a copy of its own."""

    def __init__(self, stack: ConceptStack, usages: tuple[WordUsage, ...] = ()):
        self.stack = stack
        self.usages = usages
        self.edit: KeyValueEdit | None = stack.edit() if len(stack) else None

    def on_model_patcher_clone(self) -> Applied:
        """Called by the host when it clones a patcher."""
        return Applied(self.stack, self.usages)


class _Forward:
    """Stands in for the forward of one projection for as long as a patcher with concepts is loaded."""

    def __init__(self, module: torch.nn.Module, layer: str, path: Any):
        self.layer = layer
        self.path = path
        self.owner: Applied | None = None
        self.previous: Any = None
        self._was_own = False
        self._module = weakref.ref(module)

    def __call__(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        owner = self.owner
        if owner is None or owner.edit is None:
            return self.previous(context, *args, **kwargs)
        return owner.edit.project(self.layer, self.path, context, self.previous)

    def install(self, owner: Applied) -> None:
        """Take the projection's forward over, or only change hands where this wrapper still lies in the chain."""
        self.owner = owner
        module = self._module()
        if self.previous is None and module is not None:
            self._was_own = "forward" in vars(module)
            self.previous = module.forward
            module.forward = self  # type: ignore[method-assign]

    def remove(self, owner: Applied) -> None:
        """Give the forward back, if it is this owner's. Under another extension's wrapper it only falls silent."""
        if self.owner is not owner:
            return
        self.owner = None
        module = self._module()
        if module is None or vars(module).get("forward") is not self:
            return
        if self._was_own:
            module.forward = self.previous
        else:
            del module.forward
        self.previous = None


# One wrapper per projection for its whole life: a compiler that has seen it need not compile anew.
_forwards: weakref.WeakKeyDictionary[torch.nn.Module, _Forward] = weakref.WeakKeyDictionary()


def _forwards_of(patcher: Any) -> list[_Forward]:
    found = []
    for layer, to_k, to_v in projections(patcher.model.diffusion_model):
        for path, module in (("k", to_k), ("v", to_v)):
            if module not in _forwards:
                _forwards[module] = _Forward(module, layer, path)
            found.append(_forwards[module])
    return found


def _inject(patcher: Any) -> None:
    owner = patcher.get_attachment(KEY)
    if owner is not None:
        for forward in _forwards_of(patcher):
            forward.install(owner)


def _eject(patcher: Any) -> None:
    owner = patcher.get_attachment(KEY)
    if owner is not None:
        for forward in _forwards_of(patcher):
            forward.remove(owner)


def _with_key_shift(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Hands the shift that came with the conditioning to the edit in force, around one call of the network."""
    shift = kwargs.pop(KEY_SHIFT, None)
    patcher = getattr(executor.class_obj, "current_patcher", None)
    owner = patcher.get_attachment(KEY) if patcher is not None else None
    if owner is None or owner.edit is None:
        return executor(*args, **kwargs)
    for usage in owner.usages:
        usage.warn_of_missing()
    owner.edit.key_lock.shift = shift
    try:
        return executor(*args, **kwargs)
    finally:
        owner.edit.key_lock.shift = None


def attach(patcher: Any, applied: Applied) -> None:
    """Make a patcher carry these edits, in place; they take effect whenever the host loads it."""
    patcher.set_attachments(KEY, applied)
    patcher.set_injections(KEY, [PatcherInjection(inject=_inject, eject=_eject)])
    patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _with_key_shift)


def detach(patcher: Any) -> None:
    """Make a patcher carry no edits, in place."""
    patcher.remove_attachments(KEY)
    patcher.remove_injections(KEY)
    patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)


def apply_to_model(model: Any, stack: ConceptStack, usage: WordUsage) -> Any:
    """A clone of the MODEL with these concepts added to those it carries; with nothing to add, it stays the host's own.

    Raises StackError and ParallelConceptsError for concepts that cannot be used together.
    """
    clone = model.clone()
    stack = stack.active
    if len(stack):
        before = model.get_attachment(KEY) or Applied(ConceptStack())
        usage.expect(stack.placeholders)
        attach(clone, Applied(before.stack + stack, (*before.usages, usage)))
    return clone
