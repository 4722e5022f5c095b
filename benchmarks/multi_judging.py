"""What pictures show of the concepts of their prompts, by the judge: for ``benchmarks.multi_pictures``.

The judge looks at the place of each concept: whether its super-category is there ("present"), and which known look is
the nearest there, of all concepts of the prompt and of eight strangers. A concept is "own" where it is present and its
own look is the nearest, a "blend" where it is present and the nearest is another concept's, a "stranger" where it is
present and resembles none of them. A picture is a success when all concepts are their own.

The judge has one answer for each super-category. So two things of one super-category are judged in each half of the
picture by itself, where this world puts them; halves are assigned to concepts as suits them best, and when both halves
show the same look, one concept is its own and the other a blend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from miniature import world
from miniature.metrics import Metrics
from miniature.shapes import Look

from .quality import PHOTOS

STRANGERS = 8
FIRST_LOOK, FIRST_STRANGER = 3_000_000, 5_000_000
USUAL_SPREAD = 2.05  # the width of a window that shows one of n things side by side, times n, in pictures

Thing = tuple[str, int]  # a super-category, and which of its things


@dataclass(frozen=True)
class Reading:
    """What b pictures show of J concepts: whether the thing of each is ``present`` (b, J), and which known look is
    ``nearest`` there (b, J): those of the concepts are 0 to J - 1, strangers the further ones."""

    present: Tensor
    nearest: Tensor

    @property
    def own(self) -> Tensor:
        """Which concepts are present and themselves: (b, J)."""
        return self.present & (self.nearest == torch.arange(self.present.shape[1]))

    @property
    def blend(self) -> Tensor:
        """Which are present with the look of another concept: (b, J)."""
        return self.present & (self.nearest < self.present.shape[1]) & ~self.own

    @property
    def stranger(self) -> Tensor:
        """Which are present with the look of none: (b, J)."""
        return self.present & (self.nearest >= self.present.shape[1])

    @property
    def all_present(self) -> Tensor:
        """Which pictures show a thing for every concept: (b,)."""
        return self.present.all(-1)

    @property
    def success(self) -> Tensor:
        """Which pictures show every concept as itself: (b,)."""
        return self.own.all(-1)

    def assigned(self) -> Reading:
        """Of what two places show: each place given to one of two concepts, so that the most are their own."""
        swapped = Reading(self.present.flip(1), self.nearest.flip(1))
        better = (swapped.own.sum(1) > self.own.sum(1)).unsqueeze(1)
        return Reading(
            torch.where(better, swapped.present, self.present), torch.where(better, swapped.nearest, self.nearest)
        )


def joined(readings: Sequence[Reading]) -> Reading:
    """Readings of the same number of concepts as one."""
    return Reading(torch.cat([each.present for each in readings]), torch.cat([each.nearest for each in readings]))


class Eyes:
    """Reads pictures for a set of concepts."""

    def __init__(self, metrics: Metrics, kinds: Sequence[str], looks: Sequence[Look]):
        self.kinds = list(kinds)
        self.same = len(set(self.kinds)) < len(self.kinds)
        if self.same and len(self.kinds) > 2:
            raise ValueError("things of one super-category are told apart by halves of the picture: two, no more")
        self._metrics = metrics
        self._known = {kind: self._references(kind, looks) for kind in dict.fromkeys(self.kinds)}

    def read(self, pictures: Tensor) -> Reading:
        """What pictures (b, 64, 64, 3) in 0..1 show."""
        if self.same:
            left_and_right = halves(pictures)
            sides = [self._best(left_and_right[:, side : side + 1], self.kinds[:1]) for side in (0, 1)]
            present, nearest = (torch.cat([getattr(s, name) for s in sides], 1) for name in ("present", "nearest"))
            return Reading(present, nearest).assigned()
        return self._best(windows(pictures, len(self.kinds)), self.kinds)

    def _best(self, views: Tensor, kinds: Sequence[str]) -> Reading:
        """Of each super-category, in that of the views (b, v, 64, 64, 3) that shows it most clearly."""
        verdict = self._metrics.verdict(views.flatten(0, 1))
        present, nearest = [], []
        for kind in kinds:
            number = world.CATEGORY_NAMES.index(kind)
            clearest, view = verdict.present[:, number].view(views.shape[:2]).max(1)
            identity = verdict.identity[:, number].unflatten(0, views.shape[:2])[torch.arange(len(views)), view]
            present.append(clearest > 0)
            nearest.append((identity @ self._known[kind].T).argmax(-1))
        return Reading(torch.stack(present, 1), torch.stack(nearest, 1))

    def _references(self, kind: str, looks: Sequence[Look]) -> Tensor:
        strangers = [world.instance(kind, FIRST_STRANGER + number) for number in range(STRANGERS)]
        return self._metrics.look_embeddings(kind, [*looks, *strangers], Random(f"references {kind}"))


def halves(pictures: Tensor) -> Tensor:
    """The left and the right half of pictures (b, h, w, 3), each as a picture of its own: (b, 2, h, w, 3).

    A half stays where it is, and its mirror image continues it beyond the picture's outer edge: of all ways to fill a
    picture the judge knows most from this one, and one thing in the middle is cut in two that are never joined to one.
    """
    left, right = pictures.chunk(2, dim=2)
    return torch.stack([torch.cat([left.flip(2), left], 2), torch.cat([right, right.flip(2)], 2)], 1)


def windows(pictures: Tensor, things: int) -> Tensor:
    """Views (b, v, h, w, 3) of square pictures (b, h, w, 3) in which so many things are as large as the judge knows.

    It was shown two at most: for these the whole picture is the view; else windows along the ground, enlarged.
    """
    if things < 3:
        return pictures.unsqueeze(1)
    size, views = pictures.shape[1], []
    for across in range(3, things + 1):
        side = round(size * USUAL_SPREAD / across)
        for left in torch.linspace(0, size - side, 2 * across - 1).round().int().tolist():
            part = pictures[:, size - side :, left : left + side].permute(0, 3, 1, 2)
            views.append(interpolate(part, size=size, mode="bilinear").permute(0, 2, 3, 1))
    return torch.stack(views, 1)


def look_of(thing: Thing) -> Look:
    """The personal look of a thing."""
    kind, number = thing
    return world.instance(kind, FIRST_LOOK + number)


def photos_of(thing: Thing) -> list[world.Scene]:
    """The photos by which a thing is learned."""
    name = f"{thing[0].replace(' ', '-')}-{thing[1]}"
    return [world.portrait(thing[0], look_of(thing), Random(f"photo {name} {k}")) for k in range(PHOTOS)]
