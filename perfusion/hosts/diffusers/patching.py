"""How edits are put over a network's projections and taken off again.

The forward of whatever module stands at ``attn2.to_k`` or ``attn2.to_v``, and of ``attn2`` itself, is replaced on the
instance, never the module: a low-rank adapter that has taken its place keeps working, and so do offloading hooks,
attention processors and state-dict keys. Weights are read only by calling the replaced forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ...edit import KeyValueEdit
from ..replacing import replaced
from .structure import cross_attentions

Told = tuple[Tensor | None, Tensor | None]  # the shift (b, m, d) and the words (b, m) of a context


class _Forward:
    """Stands in for the forward of one projection."""

    def __init__(self, owner: EditedProjections, layer: str, path: Any, previous: Callable[..., Tensor]):
        self.owner = owner
        self.layer = layer
        self.path = path
        self.previous = previous

    def __call__(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        edit = self.owner.edit
        if edit is None:
            return self.previous(context, *args, **kwargs)
        self.owner.tell(context)
        return edit.project(self.layer, self.path, context, self.previous)


class _Attention:
    """Stands in for the forward of one cross-attention layer, which looks at some words more."""

    def __init__(self, owner: EditedProjections, previous: Callable[..., Tensor]):
        self.owner = owner
        self.previous = previous

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        edit = self.owner.edit
        # Adapters hand pictures over beside the text, as a tuple: what they look at is theirs.
        if edit is not None and edit.focuses and isinstance(encoder_hidden_states, Tensor):
            self.owner.tell(encoder_hidden_states)
            bias = edit.focus_bias(encoder_hidden_states)
            if bias is not None:
                bias = bias.to(hidden_states)
                attention_mask = bias if attention_mask is None else attention_mask + bias
        return self.previous(hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)


class EditedProjections:
    """The key and value projections of a UNet's cross-attention, and the edit that is in force on them.

    ``edit`` counts while ``installed()``; with None the network is as ever. ``told_of`` finds what belongs to a
    context: its shift, for globally locked keys, and whose word each token is; without it the edit keeps what it holds.
    """

    def __init__(self, unet: torch.nn.Module, told_of: Callable[[Tensor], Told] | None = None):
        self.edit: KeyValueEdit | None = None
        self.told_of = told_of
        self._unet = unet
        self._installed = False

    def tell(self, context: Tensor) -> None:
        """Set on the edit what belongs to a context."""
        if self.told_of is not None and self.edit is not None:
            self.edit.key_lock.shift, self.edit.words = self.told_of(context)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Puts the edit over the projections for the time of the outermost such block; leaves nothing patched.

        Raises RuntimeError when concepts are applied to the network already.
        """
        if self._installed:
            yield
            return
        with ExitStack() as stack:
            for layer, attention in cross_attentions(self._unet):
                for path, module in (("k", attention.to_k), ("v", attention.to_v)):
                    _require_free(module)
                    stack.enter_context(replaced(module, "forward", _Forward(self, layer, path, module.forward)))
                stack.enter_context(replaced(attention, "forward", _Attention(self, attention.forward)))
            self._installed = True
            try:
                yield
            finally:
                self._installed, self.edit = False, None


def _require_free(projection: torch.nn.Module) -> None:
    present = vars(projection).get("forward")
    if isinstance(present, _Forward) and present.owner._installed:
        raise RuntimeError(
            "concepts are applied to this pipeline already. Leave that block first; to use more concepts at once, "
            "apply one stack that holds them all (first + second)."
        )
