"""How edits are put over a network's projections and taken off again.

The forward of whatever module stands at ``attn2.to_k`` or ``attn2.to_v``, of ``attn2`` itself, and of the network, is
replaced on the instance, never the module: a low-rank adapter that has taken its place keeps working, and so do
offloading hooks, attention processors and state-dict keys. Weights are read only by calling the replaced forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...edit import KeyValueEdit
from ...focus import Focus, with_mask
from ...places import Places, placed
from ...regions import sizes_of
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


class _Network:
    """Stands in for the forward of the network, whose calls follow each other in one sampling."""

    def __init__(self, owner: EditedProjections, network: torch.nn.Module):
        self.owner = owner
        self.previous: Callable[..., Any] = network.forward

    def __call__(self, sample: Tensor, timestep: Tensor | float, *args: Any, **kwargs: Any) -> Any:
        with self.owner.calls.one(sample, timestep):
            return self.previous(sample, timestep, *args, **kwargs)


class _Calls:
    """The calls of a network, one after the other: what each says of the places of words is there for the next."""

    def __init__(self) -> None:
        self.size: tuple[int, int] | None = None
        self._timestep: Tensor | float = 0.0
        self._places: Places | None = None
        self._context: weakref.ref[Tensor] | None = None
        self._said: Tensor | None = None
        self._first = self._last = float("inf")

    @contextmanager
    def one(self, sample: Tensor, timestep: Tensor | float) -> Iterator[None]:
        """Around one call with latents (b, c, h, w)."""
        self.size, self._timestep = (sample.shape[-2], sample.shape[-1]), timestep
        try:
            yield
            if self._places is not None:
                self._said = self._places.said
        finally:
            self.size = self._places = None

    def places(self, context: Tensor) -> Places:
        """The places of words in this call. A prompt that was not that of the last call, or noise as strong as that of
        the first, or stronger than that of the last: a new sampling begins.
        """
        if self._places is None:
            level = float(torch.as_tensor(self._timestep).max())
            known = self._context is not None and self._context() is context
            if not known or level >= self._first or level > self._last:
                self._context, self._said, self._first = weakref.ref(context), None, level
            self._last = level
            self._places = Places(self._said)
        return self._places


class _Attention:
    """Stands in for the forward of one cross-attention layer, which looks at some words more."""

    def __init__(self, owner: EditedProjections, name: str, layer: Any):
        self.owner = owner
        self.layer = layer
        self._stage: Any = name.split("_")[0]
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
            focus = edit.focus(context)
            if focus is not None:
                bias = self._placed(focus, hidden_states, context)
                attention_mask = self._mask(with_mask(bias, attention_mask), hidden_states)
        return self.previous(hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)

    def _placed(self, focus: Focus, hidden_states: Tensor, context: Tensor) -> Tensor:
        """What is added before the softmax: (b, t, m), or (b, 1, m) where all places look alike."""
        latent = self.owner.calls.size
        if latent is None or torch.compiler.is_compiling() or hidden_states.ndim != 3 or not focus.competes:
            return focus.everywhere
        size = sizes_of(*latent).get(hidden_states.shape[1])
        if size is None:
            return focus.everywhere
        places = self.owner.calls.places(context)
        if places.asks(self._stage, size):
            places.add(self.layer.to_q(hidden_states), self.layer.to_k(context), focus, size)
        shares = places.shares(focus, size)
        return focus.everywhere if shares is None else placed(focus, shares)

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
        self.calls = _Calls()
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
                stack.enter_context(replaced(attention, "forward", _Attention(self, layer, attention)))
            stack.enter_context(replaced(self._unet, "forward", _Network(self, self._unet)))
            self._installed = True
            try:
                yield
            finally:
                self._installed, self.edit, self.calls = False, None, _Calls()


def _require_free(projection: torch.nn.Module) -> None:
    present = vars(projection).get("forward")
    if isinstance(present, _Forward) and present.owner._installed:
        raise RuntimeError(
            "concepts are applied to this pipeline already. Leave that block first; to use more concepts at once, "
            "apply one stack that holds them all (first + second)."
        )
