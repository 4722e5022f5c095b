"""The picture half of ``benchmarks.multi_concept``: is every concept of a prompt in the picture, and itself?

Each set of concepts is drawn together from prompts of varied wording and order, with adjectives and now and then a
prompt weight; and with the same prompts and seeds by the base model with plain super-categories, and with each concept
alone among plain words. Looks show in photos: prompts ask for no other style.

``benchmarks.multi_judging`` reads the pictures; how far it is to be believed is measured by renders.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from miniature import world
from miniature.captions import caption
from miniature.metrics import Metrics, rendered
from miniature.shapes import Look
from perfusion.hosts.diffusers import DiffusersHost, draw
from perfusion.stack import ConceptStack

from .choice import jackknife
from .multi_judging import Eyes, Reading, Thing, joined, look_of, photos_of
from .quality import SAMPLER

RENDERS = 100
SHOWN = 16  # pictures of each set of concepts on the sheet
MISTAKES = ("swapped", "same", "mixed")
PROPERTIES = ("color", "pattern", "second", "mark", "mark_color")
# For more things than a caption of the little world names; adjectives that leave looks alone.
LISTS = ("a photo of {}", "{} on the beach", "{} in the snow", "there are {} at night", "a photo: {}")
ADJECTIVES = ("a", "a", "a small", "the", "my", "a nice", "a happy little")
WEIGHTS, WEIGHTED_EVERY = (0.8, 1.2, 1.4), 4


def templates(things: int, count: int, rng: Random) -> list[str]:
    """Prompts of photos with ``{0}``, ``{1}`` and so on in any order: captions of the world for two, else lists."""
    found = []
    for _ in range(count):
        places = [f"{{{k}}}" for k in rng.sample(range(things), things)]
        if things == 2:
            found.append(caption(rng, replace(world.scene(rng, things=2), style="photo"), nouns=places).text)
            continue
        named = [f"{rng.choice(ADJECTIVES)} {place}" for place in places]
        found.append(rng.choice(LISTS).format(f"{', '.join(named[:-1])} and {named[-1]}"))
    return found


def weighted(texts: Sequence[str], things: Sequence[str]) -> list[str]:
    """Prompts, in every fourth of which one of the things, by its word or ``{k}``, has a weight: ``({0}:1.2)``."""
    found = list(texts)
    for number in range(WEIGHTED_EVERY - 1, len(found), WEIGHTED_EVERY):
        rng = Random(f"weight {found[number]}")
        thing = rng.choice(list(things))
        found[number] = found[number].replace(thing, f"({thing}:{rng.choice(WEIGHTS)})")
    return found


def order_in(texts: Sequence[str], things: int) -> Tensor:
    """As which of its things, 0 the first, each text names ``{k}``: (b, things)."""
    places = torch.tensor([[text.index(f"{{{k}}}") for k in range(things)] for text in texts])
    return places.argsort(1).argsort(1)


def scene_with(kinds: Sequence[str], looks: Sequence[Look], rng: Random) -> world.Scene:
    """A photo of things with these looks side by side, in any order. More than two are smaller than in the world."""
    count, things = len(kinds), []
    for place, k in enumerate(rng.sample(range(count), count)):
        drawn = world.thing(rng, kinds[k], min(place, 1), 2, look=looks[k])
        if count > 2:
            x, radius = (place + 0.5) / count + rng.uniform(-0.01, 0.01), 0.45 / count
            drawn = replace(drawn, x=x, y=drawn.y + drawn.radius - radius, radius=radius)
        things.append(drawn)
    return world.Scene(tuple(things), rng.choice(world.BACKGROUNDS), "photo", rng.getrandbits(32))


def scene_without(kinds: Sequence[str], looks: Sequence[Look], rng: Random) -> world.Scene:
    """A photo in which one of two things, or of more, is missing; one alone stands as things alone do."""
    complete = scene_with(kinds, looks, rng)
    things = complete.things[1:]
    if len(things) == 1:
        things = (world.thing(rng, things[0].category, look=things[0].look),)
    return replace(complete, things=things)


def mistaken(looks: Sequence[Look], rng: Random) -> dict[str, list[Look]]:
    """Looks in place of those of concepts: ``MISTAKES``, each thing "mixed" with two or three properties of another."""
    turned = [*looks[1:], looks[0]]
    mixed = [
        replace(look, **{name: getattr(other, name) for name in rng.sample(PROPERTIES, rng.choice((2, 3)))})
        for look, other in zip(looks, turned, strict=True)
    ]
    return dict(zip(MISTAKES, (turned, [rng.choice(looks)] * len(looks), mixed), strict=True))


@dataclass
class Pictures:
    """Draws and judges ``count`` pictures for each set of concepts, and keeps rows of some of them for a sheet."""

    host: DiffusersHost
    metrics: Metrics
    count: int
    sheet: list[Tensor] = field(default_factory=list)

    def measured(self, name: str, sets: Sequence[tuple[Sequence[Thing], ConceptStack]]) -> dict[str, Any]:
        """The figures of an arrangement: see ``figures``."""
        found: dict[str, list[Reading]] = defaultdict(list)
        order: list[Tensor] = []
        weights: list[Tensor] = []
        for things, stack in tqdm(sets, desc=f"{name}: pictures"):
            eyes = Eyes(self.metrics, [kind for kind, _ in things], list(map(look_of, things)))
            plain = templates(len(things), self.count, rng := Random(f"pictures {name} {things}"))
            texts = weighted(plain, [f"{{{k}}}" for k in range(len(things))])
            order.append(order_in(texts, len(things)))
            weights.append(torch.tensor([text != other for text, other in zip(texts, plain, strict=True)]))
            for way, reading in self._drawn(eyes, things, stack, texts, rng).items():
                found[way].append(reading)
            for way, reading in rendered_readings(eyes, things, Random(f"renders {name} {things}")).items():
                found[way].append(reading)
        all_found = {way: joined(readings) for way, readings in found.items()}
        return figures(all_found, torch.cat(order), torch.cat(weights))

    def _drawn(
        self, eyes: Eyes, things: Sequence[Thing], stack: ConceptStack, texts: Sequence[str], rng: Random
    ) -> dict[str, Reading]:
        """Readings of "stack", "base", "known" and "single"; of the last, concept k is read where it alone is no plain
        word.
        """
        seeds = [rng.getrandbits(32) for _ in texts]

        def drawn(stack: ConceptStack, words: Sequence[str]) -> Tensor:
            return draw(self.host, stack, [text.format(*words) for text in texts], seeds, **SAMPLER)

        together, base = drawn(stack, stack.placeholders), drawn(ConceptStack(), eyes.kinds)
        photos = rendered([photo for thing in things for photo in photos_of(thing)])
        self.sheet += [photos, together[:SHOWN], base[:SHOWN]]
        alone = []
        for k, use in enumerate(stack.uses):
            words = [use.concept.placeholder if j == k else kind for j, kind in enumerate(eyes.kinds)]
            alone.append(eyes.read(drawn(ConceptStack((use,)), words)))
        columns = range(len(things))
        single = Reading(
            torch.stack([alone[k].present[:, k] for k in columns], 1),
            torch.stack([alone[k].nearest[:, k] for k in columns], 1),
        )
        names = [world.KNOWN[kind][number] for kind, number in things]
        nameless = [
            re.sub(r"\ba (?=\(?{)", "", text) for text in texts
        ]  # names go without this article, as in captions
        known = draw(self.host, ConceptStack(), [text.format(*names) for text in nameless], seeds, **SAMPLER)
        of_known = Eyes(self.metrics, eyes.kinds, list(map(world.known_look, names)))
        return {
            "stack": eyes.read(together),
            "base": eyes.read(base),
            "known": of_known.read(known),
            "single": single,
        }


def rendered_readings(eyes: Eyes, things: Sequence[Thing], rng: Random) -> dict[str, Reading]:
    """Readings of scenes with the very things, "right", and with mistakes: see ``mistaken`` and ``scene_without``."""
    looks = [look_of(thing) for thing in things]
    scenes: dict[str, list[world.Scene]] = defaultdict(list)
    for _ in range(RENDERS):
        scenes["right"].append(scene_with(eyes.kinds, looks, rng))
        scenes["missing"].append(scene_without(eyes.kinds, looks, rng))
        for mistake, wrong in mistaken(looks, rng).items():
            # Two things of one kind that change places are still the two.
            if not (eyes.same and mistake == "swapped"):
                scenes[mistake].append(scene_with(eyes.kinds, wrong, rng))
    return {way: eyes.read(rendered(shown)) for way, shown in scenes.items()}


def figures(found: dict[str, Reading], order: Tensor, weights: Tensor) -> dict[str, Any]:
    """Shares of pictures ("present", "base_present", "success") and of concepts (all others), each with its error.

    "present" and "base_present": a thing for every concept, drawn with concepts and with plain super-categories.
    "own", "blend", "stranger" and "success" are what ``Reading`` says; "base_own" is how often chance makes one's own.
    "single_own": own, where a concept is the only one of its prompt. "known_own" and "known_success": the same for
    things that the model has names for since it was trained, in the same prompts, which shows how much of a look the
    model itself can put into such pictures. "success_over_base", "success_over_known" and "own_over_single": what is
    left of the base model's, the known things' and the single concept's share; None where there is hardly any.
    "own_as", "single_own_as" and "known_own_as": own by whether it is named first, second and so on, by ``order``
    (b, J). "success_weighted" and "base_present_weighted": of prompts in which something has a weight, ``weights``
    (b,). "renders": how much is called a success of scenes that are one ("right") and that are none (all others);
    "own" and "present" of the former.
    """
    stack, base, single, known = found["stack"], found["base"], found["single"], found["known"]

    def by_place(reading: Reading) -> list[float]:
        places = range(order.shape[1])
        return [round(float(reading.own[order == place].float().mean()), 4) for place in places]

    right = found["right"]
    shares = {
        "present": stack.all_present,
        "each_present": stack.present,
        "own": stack.own,
        "blend": stack.blend,
        "stranger": stack.stranger,
        "success": stack.success,
        "base_present": base.all_present,
        "base_each_present": base.present,
        "base_own": base.own,
        "single_own": single.own,
        "known_own": known.own,
        "known_success": known.success,
    }
    ratios = {
        "success_over_base": (stack.success, base.all_present),
        "success_over_known": (stack.success, known.success),
        "own_over_single": (stack.own, single.own),
    }
    of_ratios = {name: ratio(*parts) for name, parts in ratios.items()}
    return {
        "pictures": len(stack.present),
        **{name: round(float(share.float().mean()), 4) for name, share in shares.items()},
        **{name: value for name, (value, _) in of_ratios.items()},
        "own_as": by_place(stack),
        "single_own_as": by_place(single),
        "known_own_as": by_place(known),
        "success_weighted": share_of(stack.success[weights]),
        "base_present_weighted": share_of(base.all_present[weights]),
        "errors": {
            **{name: standard_error(share) for name, share in shares.items()},
            **{name: error for name, (_, error) in of_ratios.items()},
        },
        "renders": {
            "own": round(float(right.own.float().mean()), 4),
            "present": round(float(right.all_present.float().mean()), 4),
            **{
                way: round(float(reading.success.float().mean()), 4)
                for way, reading in found.items()
                if way in ("right", "missing", *MISTAKES)
            },
        },
    }


def share_of(hits: Tensor) -> float | None:
    """How many of some (b,) there are; None of none."""
    return round(float(hits.float().mean()), 4) if len(hits) else None


def standard_error(share: Tensor) -> float | None:
    """Of the share of true values (b,) or (b, J), the J of a picture together; None of a single picture."""
    rows = share.float().reshape(len(share), -1).mean(1)
    return round(float(rows.std() / len(rows) ** 0.5), 4) if len(rows) > 1 else None


def ratio(part: Tensor, whole: Tensor) -> tuple[float | None, float | None]:
    """Of two shares over the same pictures, (b,) or (b, J), and its error; None where fewer than two are in ``whole``.

    The error is a jackknife estimate that leaves out one picture at a time.
    """
    top, bottom = (share.float().reshape(len(share), -1).sum(1) for share in (part, whole))
    if int((bottom > 0).sum()) < 2:
        return None, None
    error = jackknife(lambda kept: float(top[kept].sum() / bottom[kept].sum()), len(top))
    return round(float(top.sum() / bottom.sum()), 4), round(error, 4)
