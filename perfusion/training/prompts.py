"""The prompts of a batch, each encoded once, however many samples have it and in however many parts they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..hosts.base import Encodings


class EncodedPrompts:
    """Encoded prompts, to be picked by number for the samples of a batch.

    Gradients of the network gather at the encodings, part by part of a batch; ``backward`` takes them through the text
    encoder, once for all. Unless the encoder's activations are ``kept`` meanwhile, they are made again for it, and
    encoding, like all that needs no gradient, goes ``at_once`` prompts at a time.

    ``texts`` has the prompts by number. ``encode`` gives encodings of one length.
    """

    def __init__(
        self, encode: Callable[[list[str]], Encodings], texts: Mapping[int, str], at_once: int, *, kept: bool = True
    ):
        self._encode = encode
        self._place = {number: place for place, number in enumerate(texts)}
        self._texts = list(texts.values())
        learning = torch.is_grad_enabled()
        self._kept = learning and kept
        self._at_once = len(self._texts) if self._kept else at_once
        with torch.set_grad_enabled(self._kept):
            self._encoded = Encodings.joined(list(self._parts()))
        self._held = self._encoded.detached(requires_grad=learning)

    def of(self, numbers: Tensor) -> Encodings:
        """The encodings of prompts by number (b,), repeated where one repeats."""
        places = torch.tensor([self._place[number] for number in numbers.tolist()])
        return self._held.select(places.to(self._held.context.device))

    def backward(self) -> None:
        """Take the gradients at the encodings on to what they were made of."""
        start = 0
        for part in [self._encoded] if self._kept else self._parts():
            stop = start + len(part.context)
            ends = ((part.context, self._held.context), (part.pooled, self._held.pooled))
            reached = [
                (made, held.grad[start:stop])
                for made, held in ends
                if made is not None and held is not None and held.grad is not None and made.requires_grad
            ]
            if reached:
                torch.autograd.backward([made for made, _ in reached], [gradient for _, gradient in reached])
            start = stop

    def _parts(self) -> Iterator[Encodings]:
        for start in range(0, len(self._texts), self._at_once):
            yield self._encode(self._texts[start : start + self._at_once])
