"""How edits are put over a network's projections and taken off again.

The forward of whatever module stands at ``attn2.to_k`` or ``attn2.to_v``, and of ``attn2`` itself, is replaced on the
instance, never the module: a low-rank adapter that has taken its place keeps working, and so do offloading hooks,
attention processors and state-dict keys. Weights are read only by calling the replaced forward.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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

_REMEMBERED_SAMPLINGS = 4

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


@dataclass
class _Sampling:
    """What is known of the places of words in one prompt: ``said`` by the last call, at ``last``, since ``first``."""

    context: weakref.ref[Tensor]
    first: float
    last: float
    said: Tensor | None = None


class _Calls:
    """The calls of a pipeline's network: what each says of the places of words is there for the next.

    Followed by hooks, which those who offload the network leave alone.
    """

    def __init__(self, owner: EditedProjections):
        self._owner = owner
        self._known: deque[_Sampling] = deque(maxlen=_REMEMBERED_SAMPLINGS)
        self._now: _Sampling | None = None

    @contextmanager
    def of(self, network: torch.nn.Module) -> Iterator[None]:
        """Follows the calls of a network for the time of the block."""
        hooks = [
            network.register_forward_pre_hook(self._begin, with_kwargs=True),
            network.register_forward_hook(self._end, always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        edit = self._owner.edit
        if edit is None or not edit.focuses:
            return
        names = ("sample", "timestep", "encoder_hidden_states")
        given: list[Any] = [args[k] if len(args) > k else kwargs.get(name) for k, name in enumerate(names)]
        sample, timestep, context = given
        if isinstance(context, Tensor):
            self._now = self._sampling(context, float(torch.as_tensor(timestep).max()))
            self._owner.looking = Places(self._now.said), (sample.shape[-2], sample.shape[-1])

    def _sampling(self, context: Tensor, level: float) -> _Sampling:
        """A prompt that is new, or noise as strong as that of its first call, or stronger than that of its last: a new
        sampling begins.
        """
        found = next((known for known in self._known if known.context() is context), None)
        if found is None or level >= found.first or level > found.last:
            found = _Sampling(weakref.ref(context), level, level)
            self._known.appendleft(found)
        found.last = level
        return found

    def _end(self, _: Any, args: tuple[Any, ...], output: Any) -> None:
        if self._now is not None and self._owner.looking is not None:
            if output is None:  # nothing came of a call that raised, and nothing does of its sampling
                self._known.clear()
            else:
                self._now.said = self._owner.looking[0].said
        self._now = self._owner.looking = None


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
        looking = self.owner.looking
        if looking is None or torch.compiler.is_compiling() or hidden_states.ndim != 3:
            return focus.everywhere
        places, latent = looking
        size = sizes_of(*latent).get(hidden_states.shape[1])
        if size is None:
            return focus.everywhere
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
        length = bias.shape[-1]
        padded = pad(bias.to(hidden_states.device, dtype), (0, -length % 8))
        heads = padded.repeat_interleave(self.layer.heads, dim=0)
        return heads[..., :length]


class EditedProjections:
    """The key and value projections of a UNet's cross-attention, and the edit that is in force on them.

    ``edit`` counts while ``installed()``; with None the network is as ever. ``told_of`` finds what belongs to a
    context: its shift, for globally locked keys, and whose word each token is; without it the edit keeps what it holds.
    ``looking`` are the places of words in the call that goes on, and the height and width of its latents; a network
    that ``follows`` a pipeline's sampling finds them by itself.
    """

    def __init__(
        self, unet: torch.nn.Module, told_of: Callable[[Tensor], Told] | None = None, *, follows: bool = False
    ):
        self.edit: KeyValueEdit | None = None
        self.looking: tuple[Places, tuple[int, int]] | None = None
        self.told_of = told_of
        self._follows = follows
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
            if self._follows:
                stack.enter_context(_Calls(self).of(self._unet))
            self._installed = True
            try:
                yield
            finally:
                self._installed, self.edit, self.looking = False, None, None


def _require_free(projection: torch.nn.Module) -> None:
    present = vars(projection).get("forward")
    if isinstance(present, _Forward) and present.owner._installed:
        raise RuntimeError(
            "concepts are applied to this pipeline already. Leave that block first; to use more concepts at once, "
            "apply one stack that holds them all (first + second)."
        )
