"""Concepts on a MODEL: one injection that wraps the forward of each cross-attention's ``to_k`` and ``to_v``.

An injection, and not an object patch or an attention patch, because it alone sees tokens and projections, leaves
state-dict keys and so LoRA alone, leaves ``attn2_replace`` to others, follows a patcher to whichever network it is
loaded on, and is undone by the host itself. Weights are read only by calling the wrapped forward. What is added before
the softmax, for regions and words with a focus, goes into the options of one call: see ``steering``.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from comfy.patcher_extension import CallbacksMP, PatcherInjection, WrappersMP
from torch import Tensor

from ...edit import Gate, KeyValueEdit
from ...places import Places
from ...stack import ConceptStack, shut_words
from .steering import replaced_in, steered
from .structure import projections
from .text import KEY, KEY_SHIFT, KEY_WEIGHED, KEY_WORDS, Companion, told_with, unpacked

logger = logging.getLogger(__name__)

Rows = Sequence[Sequence[Gate]]

_OPTIONS_PLACE = 5  # of transformer_options among the arguments of the host's apply_model


@dataclass
class _Sampling:
    """One run of a sampler: the height and width of what is sampled, how many ``pictures`` of it, and what the last
    call of the network ``said`` of the places of words, by the id of the prompt.
    """

    size: tuple[int, int]
    pictures: int
    said: dict[Any, Tensor] = field(default_factory=dict)


class Applied:
    """What is applied to one patcher, as its attachment; a clone of the patcher gets a copy of its own.

    ``rows``: gates of each concept for each row of a batch, see ``ConceptStack.edit``. ``edit`` is what is in force:
    that of all concepts, but for the time of one call of the network that in which those are shut that are not in at
    its level of noise. ``sampling`` is the one that goes on, if any: clones that the host makes in it, for other GPUs,
    share it.
    """

    def __init__(self, stack: ConceptStack, rows: Rows | None = None):
        self.stack = stack
        self.rows = rows
        self.told_of_fallback = self.told_of_regions = self.told_of_scope = self.told_of_blocks = False
        self.sampling: _Sampling | None = None
        self.edit: KeyValueEdit | None = stack.edit(rows) if len(stack) else None
        self.scheduled = not all(use.always for use in stack.uses)
        self.has_regions = any(use.region is not None for use in stack.uses)
        self._edits: dict[tuple[bool, ...], KeyValueEdit | None] = {(True,) * len(stack): self.edit}

    def on_model_patcher_clone(self) -> Applied:
        """Called by the host when it clones a patcher."""
        clone = Applied(self.stack, self.rows)
        clone.sampling = self.sampling
        return clone

    def edit_of(self, chosen: tuple[bool, ...]) -> KeyValueEdit | None:
        """The edit of some of the concepts, None for none of them. The others change nothing, but their words stay
        theirs: else those that are in would take them.
        """
        if chosen not in self._edits:
            uses = [use if on else use.shut() for use, on in zip(self.stack.uses, chosen, strict=True)]
            rows = self.rows and [
                [gate if on else replace(gate, strength=0.0) for gate, on in zip(gates, chosen, strict=True)]
                for gates in self.rows
            ]
            self._edits[chosen] = ConceptStack(tuple(uses)).edit(rows) if any(chosen) else None
        return self._edits[chosen]


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

    @property
    def on_top(self) -> bool:
        """Whether the projection calls this wrapper, and none that lies over it."""
        module = self._module()
        return module is not None and vars(module).get("forward") is self

    def install(self, owner: Applied) -> _Forward:
        """Take the projection's forward over, over whatever lies there; returns the wrapper that does.

        A wrapper that was not on top when it was removed may still be part of another extension's chain, or have been
        dropped from it: it stays silent where it is, and a new one takes its place.
        """
        module = self._module()
        if self.previous is not None and not self.on_top and module is not None:
            return _Forward(module, self.layer, self.path).install(owner)
        self.owner = owner
        if self.previous is None and module is not None:
            self._was_own = "forward" in vars(module)
            self.previous = module.forward
            module.forward = self  # type: ignore[method-assign]
        return self

    def remove(self, owner: Applied) -> None:
        """Give the forward back, if it is this owner's. Under another extension's wrapper it only falls silent."""
        if self.owner is not owner:
            return
        self.owner = None
        module = self._module()
        if module is None or not self.on_top:
            return
        if self._was_own:
            module.forward = self.previous
        else:
            del module.forward
        self.previous = None


# One wrapper per projection for its whole life: a compiler that has seen it need not compile anew.
_forwards: weakref.WeakKeyDictionary[torch.nn.Module, _Forward] = weakref.WeakKeyDictionary()


def _forwards_of(patcher: Any) -> list[tuple[torch.nn.Module, _Forward]]:
    found = []
    for layer, to_k, to_v in projections(patcher.model.diffusion_model):
        for path, module in (("k", to_k), ("v", to_v)):
            if module not in _forwards:
                _forwards[module] = _Forward(module, layer, path)
            found.append((module, _forwards[module]))
    return found


def _inject(patcher: Any) -> None:
    owner = patcher.get_attachment(KEY)
    # The host injects also where loading has failed and the weights were given up: nothing would eject it there.
    if owner is not None and patcher.model.current_weight_patches_uuid is not None:
        for module, forward in _forwards_of(patcher):
            _forwards[module] = forward.install(owner)


def _eject(patcher: Any) -> None:
    owner = patcher.get_attachment(KEY)
    if owner is not None:
        for _, forward in _forwards_of(patcher):
            forward.remove(owner)


def _nothing(patcher: Any) -> None:
    """Stands in for an injection that happens later: see ``attach``."""


class _Came(NamedTuple):
    """What came with a conditioning: the shift of globally locked keys, whose word each token is, and what prompt
    weights do to words, as ``text`` lays them out."""

    shift: Tensor | None
    words: Tensor | None
    weighed: Tensor | None


def _around_network(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around one call of the network: those concepts are in whose part of sampling it is, the words of those with a
    region are looked for there only, those with a focus are looked at more, and what came with the conditioning is
    handed to the edit in force.
    """
    came = _Came(*(kwargs.pop(key, None) for key in (KEY_SHIFT, KEY_WORDS, KEY_WEIGHED)))
    patcher = getattr(executor.class_obj, "current_patcher", None)
    owner = patcher.get_attachment(KEY) if patcher is not None else None
    if owner is None or owner.edit is None:
        return executor(*args, **kwargs)
    if not owner.scheduled and not owner.has_regions and not owner.edit.focuses:
        return _told(owner, came, executor, args, kwargs)
    everything, chosen = owner.edit, (True,) * len(owner.stack)
    if owner.scheduled:
        chosen = _in_turn(owner.stack, args[1], executor.class_obj.model_sampling)
    owner.edit = owner.edit_of(chosen)
    try:
        if owner.edit is None:
            return executor(*args, **kwargs)
        regions = [use.region for use in owner.stack.uses] if owner.has_regions and _is_whole(owner, args[0]) else []
        if not regions and not owner.edit.focuses:
            return _told(owner, came, executor, args, kwargs)
        sampling, options = owner.sampling, _options_of(args, kwargs)
        part = _is_part(sampling, args[0], options)
        rows = [] if sampling is None or part else _prompts_of(sampling, args[0], options)
        places = Places(None if sampling is None else _said_before(sampling, rows), part=part)
        steer = partial(steered, edit=owner.edit, regions=regions, places=places)
        args, kwargs = _with_options(args, kwargs, partial(_told_of_blocks, owner, steer))
        made = _told(owner, came, executor, args, kwargs)
        said = places.said
        # Whoever enlarges the batch on its way to the layers has rows of its own.
        if sampling is not None and rows and said is not None and len(said) == len(rows) * sampling.pictures:
            sampling.said |= dict(zip(rows, said.split(sampling.pictures), strict=True))
        return made
    finally:
        owner.edit = everything


def _prompts_of(sampling: _Sampling, latent: Tensor, options: dict[str, Any]) -> list[Any]:
    """The ids of the prompts in one call of the network, each for all pictures; none for some of them, or where the
    host does not tell.
    """
    ids = list(options.get("uuids") or [])
    return ids if len(latent) == len(ids) * sampling.pictures else []


def _is_part(sampling: _Sampling | None, latent: Tensor, options: dict[str, Any]) -> bool:
    """Whether a call of the network is for a part of the picture, or of several that are drawn as one."""
    windowed = sampling is not None and options.get("context_window") is not None
    return windowed or not _has_size(sampling, latent)


def _has_size(sampling: _Sampling | None, latent: Tensor) -> bool:
    """Whether a latent has the height and width of what is sampled, as far as that is known."""
    return sampling is None or sampling.size == tuple(latent.shape[-2:])


def _said_before(sampling: _Sampling, rows: Sequence[Any]) -> Tensor | None:
    """What the last call said of the places of words in these prompts, where it did of all."""
    found = [sampling.said.get(row) for row in rows]
    known = [said for said in found if said is not None]
    alike = len({said.shape for said in known}) == 1
    return torch.cat(known) if alike and len(known) == len(found) else None


def _told_of_blocks(
    owner: Applied, steer: Callable[[dict[str, Any]], dict[str, Any]], options: dict[str, Any]
) -> dict[str, Any]:
    """The options steered; tells once of blocks that nobody can steer."""
    if replaced_in(options) and not owner.told_of_blocks:
        owner.told_of_blocks = True
        logger.info(
            "Another extension does the cross-attention of some blocks in its own way (IPAdapter does): focus and "
            "regions are left out there, and concepts may come out weaker than they were trained."
        )
    return steer(options)


def _is_whole(owner: Applied, latent: Tensor) -> bool:
    """Whether a call of the network is for the whole picture, whose places regions are of; tells once if not."""
    if _has_size(owner.sampling, latent):
        return True
    if not owner.told_of_regions:
        owner.told_of_regions = True
        logger.warning(
            "Regions are left out where a conditioning has an area of its own, or a picture is drawn in parts: the "
            "model is not told which part it is."
        )
    return False


def _in_turn(stack: ConceptStack, sigma: Tensor, sampling: Any) -> tuple[bool, ...]:
    """Which concepts are in at a level of noise, as the host counts parts of sampling."""
    level = float(sigma.max())
    return tuple(
        sampling.percent_to_sigma(use.start) >= level and (use.end == 1 or level > sampling.percent_to_sigma(use.end))
        for use in stack.uses
    )


def _options_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The transformer options of a call of the network, given by name or in their place."""
    return (args[_OPTIONS_PLACE] if len(args) > _OPTIONS_PLACE else kwargs.get("transformer_options")) or {}


def _with_options(
    args: tuple[Any, ...], kwargs: dict[str, Any], changed: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call of the network with other transformer options, by name or in their place."""
    options = changed(_options_of(args, kwargs))
    if len(args) > _OPTIONS_PLACE:
        return (*args[:_OPTIONS_PLACE], options, *args[_OPTIONS_PLACE + 1 :]), kwargs
    return args, {**kwargs, "transformer_options": options}


def _told(owner: Applied, came: _Came, executor: Any, args: Any, kwargs: Any) -> Any:
    """The call of the network, with what came along set on the edit in force."""
    assert owner.edit is not None
    if came.shift is None and "global" in owner.edit.key_lock.locks and not owner.told_of_fallback:
        owner.told_of_fallback = True
        logger.info(
            "Key lock 'global' needs prompts encoded by the CLIP of Apply Concepts and passed on as they are; for "
            "others, and with extensions that rearrange them, 'local' is used."
        )
    if came.words is None and (owner.stack.rescopes or owner.stack.focuses) and not owner.told_of_scope:
        owner.told_of_scope = True
        logger.info(
            "A conditioning comes without word of whose each of its tokens is: it was not encoded by the CLIP of Apply "
            "Concepts, or another extension has rearranged it. Gates are opened there by what is in the encodings."
        )
    with owner.edit.told(*unpacked(came.words, came.weighed), came.shift):
        return executor(*args, **kwargs)


def _warn_of_shut_gates(owner: Applied, conds: dict[str, list[dict[str, Any]]]) -> None:
    """Name the concepts whose gate no token of any prompt opens by half."""
    if owner.edit is None:
        return
    told = []
    for conditioning in (conditioning for some in conds.values() for conditioning in some):
        if (encoding := conditioning.get("cross_attn")) is not None:
            told.append((encoding, *told_with(conditioning)))
    if shut := shut_words(owner.stack, owner.edit, told):
        logger.warning(
            "%s will not appear: no prompt of this run contains the word, or its gate stays shut. Write the word into "
            "the text, in a text node that is connected to the CLIP of Apply Concepts, or lower its bias.",
            ", ".join(shut),
        )


def _before_sampling(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Before sampling, says which concepts cannot appear, and takes what is told of each token from conditionings that
    other nodes have joined, blended or blanked since: it belongs to one encoding only. Without a shift their keys are
    locked locally, and without words their gates compete by what is in the encodings.
    """
    for conditionings in getattr(executor.class_obj, "conds", {}).values():
        for conditioning in conditionings:
            told, encoding = conditioning.get("model_conds", {}), conditioning.get("cross_attn")
            stale = [k for k, v in told.items() if isinstance(v, Companion) and not v.belongs_to(encoding)]
            if stale:
                conditioning["model_conds"] = {key: value for key, value in told.items() if key not in stale}
    owner = executor.class_obj.model_patcher.get_attachment(KEY)
    if owner is None:
        return executor(*args, **kwargs)
    _warn_of_shut_gates(owner, getattr(executor.class_obj, "conds", {}))
    before, owner.sampling = owner.sampling, _Sampling(tuple(args[0].shape[-2:]), len(args[0]))
    try:
        return executor(*args, **kwargs)
    finally:
        owner.sampling = before


_WRAPPERS = {WrappersMP.APPLY_MODEL: _around_network, WrappersMP.OUTER_SAMPLE: _before_sampling}


def attach(patcher: Any, applied: Applied) -> None:
    """Make a patcher carry these edits, in place; they take effect whenever the host loads it.

    They are put over the forwards when all injections are in (the host's bypass LoRA is one), whatever their order,
    and taken off before all others: so W i* and the locked keys are read with everything that others add.
    """
    detach(patcher)
    patcher.set_attachments(KEY, applied)
    patcher.injections = {KEY: [PatcherInjection(inject=_nothing, eject=_eject)], **patcher.injections}
    patcher.add_callback_with_key(CallbacksMP.ON_INJECT_MODEL, KEY, _inject)
    for kind, wrapper in _WRAPPERS.items():
        patcher.add_wrapper_with_key(kind, KEY, wrapper)


def detach(patcher: Any) -> None:
    """Make a patcher carry no edits, in place."""
    patcher.remove_attachments(KEY)
    patcher.remove_injections(KEY)
    patcher.remove_callbacks_with_key(CallbacksMP.ON_INJECT_MODEL, KEY)
    for kind in _WRAPPERS:
        patcher.remove_wrappers_with_key(kind, KEY)


def apply_to_model(model: Any, stack: ConceptStack) -> Any:
    """A clone of the MODEL with these concepts added to those it carries; with nothing to add, it stays the host's own.

    Raises StackError and ParallelConceptsError for concepts that cannot be used together.
    """
    clone = model.clone()
    stack = stack.active
    if len(stack):
        before = model.get_attachment(KEY) or Applied(ConceptStack())
        attach(clone, Applied(before.stack + stack))
    return clone


def with_rows(model: Any, rows: Rows) -> Any:
    """A clone of a MODEL that carries concepts, with gates of their own for each row of a batch: ``rows[n][j]``.

    The last concepts are meant where a row has fewer gates than the model has concepts.
    """
    clone = model.clone()
    stack = model.get_attachment(KEY).stack
    first = [use.gate for use in stack.uses[: len(stack) - len(rows[0])]]
    attach(clone, Applied(stack, [[*first, *gates] for gates in rows]))
    return clone
