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
from torch.nn.functional import pad

from ...edit import KeyValueEdit
from ...focus import with_mask
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

    def __init__(self, owner: EditedProjections, layer: Any):
        self.owner = owner
        self.layer = layer
        self.previous: Callable[..., Tensor] = layer.forward

    def __call__(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[Tensor, Any] | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        edit = self.owner.edit
        # Picture adapters hand over what they look at behind the text; the mask counts for the text.
        told = encoder_hidden_states
        context = told[0] if isinstance(told, tuple) else told
        if edit is not None and edit.focuses and context is not None:
            self.owner.tell(context)
            bias = edit.focus_bias(context)
            if bias is not None:
                attention_mask = self._mask(with_mask(bias, attention_mask), hidden_states)
        return self.previous(hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)

    def _mask(self, bias: Tensor, hidden_states: Tensor) -> Tensor:
        """What is added before the softmax, (b, 1 or t, m), as every processor takes it: for each head, in rows that
        begin at a multiple of 8 numbers, and in the precision of the scores.
        """
        upcast = self.layer.upcast_attention and not type(self.layer.processor).__name__.endswith("2_0")
        dtype = torch.float32 if upcast else hidden_states.dtype
        heads, length = bias.repeat_interleave(self.layer.heads, dim=0), bias.shape[-1]
        return pad(heads.to(hidden_states.device, dtype), (0, -length % 8))[..., :length]


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
                stack.enter_context(replaced(attention, "forward", _Attention(self, attention)))
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
