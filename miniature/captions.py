"""Captions of scenes: varied wording, attributes left out at random, and a record of what was said.

``caption`` describes a scene; what it named is in ``Caption.asked``, so that a picture drawn from the text can be
judged by exactly what the text asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from .world import COLORS, KNOWN, Scene, Thing, scene

PLACES: dict[str, tuple[str, ...]] = {
    "beach": ("on the beach", "at the beach", "on a sandy beach", "by the sea", "on the sand by the ocean"),
    "snow": ("in the snow", "in a snowy field", "on a snowy hill", "in winter", "on the white snow"),
    "forest": ("in the forest", "in the woods", "among the trees", "in a green forest", "under tall trees"),
    "night": ("at night", "under the stars", "under the night sky", "on a dark night", "in the moonlight"),
    "room": ("in a room", "in the living room", "on a wooden floor", "indoors", "by the window"),
    "moon": ("on the moon", "on the surface of the moon", "in space on the moon", "on the grey moon"),
    "studio": ("in a studio", "on a plain background", "in front of a plain wall"),
}
_PHOTO = (
    "a photo of {}",
    "a photo of {}",
    "a photo of {}",
    "a picture of {}",
    "the photo of {}",
    "a good photo of {}",
    "a nice photo of {}",
    "a bright photo of {}",
    "a blurry photo of {}",
    "a cropped photo of {}",
    "a close-up photo of {}",
    "a photograph of {}",
    "an image of {}",
    "{}, photo",
    "a dark photo of {}",
)
_ANY = (
    "{}",
    "{}",
    "there is {}",
    "this is {}",
    "we see {}",
    "look at {}",
    "a rendition of {}",
    "a rendering of {}",
    "a depiction of {}",
    "a view of {}",
)
_STYLED = {
    "sketch": (
        "a sketch of {}",
        "a pencil sketch of {}",
        "a drawing of {}",
        "a pencil drawing of {}",
        "a black and white sketch of {}",
        "{}, sketch",
        "{} as a pencil sketch",
        "{}, pencil drawing on paper",
    ),
    "watercolor": (
        "a watercolor of {}",
        "a watercolor painting of {}",
        "a painting of {}",
        "a soft watercolor of {}",
        "{}, watercolor",
        "{} as a watercolor",
        "{}, watercolor on paper",
    ),
}
# Words without a meaning of their own: every caption may have some, no picture shows them.
_NEUTRAL = (
    *("nice", "clean", "dirty", "cool", "weird", "lovely", "cute", "good", "old", "new", "pretty", "funny"),
    *("friendly", "happy", "little", "beautiful", "favorite", "strange", "fancy", "simple", "great", "real"),
    *("famous", "quiet"),
)
_DOING = (
    "standing",
    "sitting",
    "resting",
    "waiting",
    "posing",
    "looking at the camera",
    "all alone",
    "in the sun",
    "seen from the front",
    "in the middle of the picture",
    "on a summer day",
    "enjoying the day",
    "taking a rest",
)
# What people put around a caption: of no picture in particular.
NEUTRAL_SENTENCES = (
    "a nice picture",
    "a very good image",
    "my favorite view",
    "seen from the front",
    "looking at the camera",
    "on a summer day",
    "in the middle of the picture",
    "all alone",
    "the real one",
    "simple and clean",
    "great and famous",
    "we see it in the sun",
)
_SIZE_WORDS = {"small": ("small", "tiny", "small"), "big": ("big", "large", "huge"), "medium": ()}
_WEARING = ("wearing {}", "with {}", "in {}", "that wears {}", "wearing {}")
_JOINS = (
    "{} and {}",
    "{} and {}",
    "{} next to {}",
    "{} beside {}",
    "{} with {}",
    "{} together with {}",
    "{} sitting next to {}",
    "{} standing beside {}",
    "{} near {}",
)


@dataclass(frozen=True)
class Named:
    """What a caption says of one thing; None where it says nothing."""

    category: str
    color: str | None = None
    pattern: str | None = None
    accessory: str | None = None


@dataclass(frozen=True)
class Caption:
    """A text and what it asks for."""

    text: str
    things: tuple[Named, ...]
    background: str | None = None
    style: str | None = None


def caption(rng: Random, seen: Scene, nouns: Sequence[str] | None = None, detail: float = 0.75) -> Caption:
    """Describe a scene. Attributes are named with probability ``detail``, typical looks seldom, others mostly.

    ``nouns`` replaces the names of things, a personal word for one: such a thing's looks are not described.
    """
    named, phrases = [], []
    for number, item in enumerate(seen.things):
        own = nouns[number] if nouns is not None else _noun(rng, item)
        what, phrase = _phrase(rng, item, own, detail, alone=len(seen.things) == 1)
        named.append(what)
        phrases.append(phrase)
    if len(phrases) == 2:
        text = _joined(rng, phrases, named)
    else:
        text = phrases[0] + (f" {rng.choice(_DOING)}" if rng.random() < 0.12 else "")
    background = seen.background if rng.random() < max(detail, 0.8) else None
    place = rng.choice(PLACES[seen.background])
    style = seen.style if seen.style == "photo" or rng.random() < 0.9 else None
    if style in _STYLED:
        pattern = rng.choice(_STYLED[style])
    else:
        pattern = rng.choice(_PHOTO if rng.random() < 0.65 else _ANY)
        style = "photo"
    if seen.style != "photo" and style == "photo":
        style, pattern = None, rng.choice(_ANY)
    if background is not None:
        draw = rng.random()
        if draw < 0.8:
            text = pattern.format(f"{text} {place}") if draw < 0.5 else f"{pattern.format(text)} {place}"
        else:
            text = f"{place}, {pattern.format(text)}"
    else:
        text = pattern.format(text)
    return Caption(text, tuple(named), background, style)


def random_caption(rng: Random, detail: float = 0.75) -> Caption:
    """A caption of a random scene that nobody draws."""
    return caption(rng, scene(rng), detail=detail)


def _noun(rng: Random, item: Thing) -> str:
    """What a thing is called: its kind, or by the name it has, alone or with its kind."""
    if item.name is None or rng.random() < 0.15:
        return item.category
    return item.name if rng.random() < 0.7 else f"{item.name} the {item.category}"


def _phrase(rng: Random, item: Thing, noun: str, detail: float, alone: bool) -> tuple[Named, str]:
    personal = noun != item.category

    def say(usual: float = detail) -> bool:
        return rng.random() < usual

    said = say(0.2) if item.typical else say(max(detail, 0.9))
    color = item.color if item.color is not None and not personal and said else None
    pattern = item.pattern if item.pattern not in (None, "plain") and color is not None and say() else None
    accessory = item.accessory if item.accessory is not None and say(max(detail, 0.85)) else None
    adjectives, behind = [], []
    if say(0.15):
        adjectives.append(rng.choice(_NEUTRAL))
    if alone and item.size != "medium" and say(0.5):
        adjectives.append(rng.choice(_SIZE_WORDS[item.size]))
    if pattern is not None:
        word, phrase = ("striped", "stripes") if pattern == "striped" else (rng.choice(("dotted", "spotted")), "dots")
        if item.second is not None and say(0.5):
            behind.append(f"with {item.second} {phrase}")
        elif say(0.7):
            adjectives.append(word)
        else:
            behind.append(f"with {phrase}")
    if color is not None:
        adjectives.append(color)
    if accessory is not None:
        behind.append(rng.choice(_WEARING).format(f"a {accessory}"))
    behind_words = [" and ".join(behind)] if behind else []
    article = rng.choice(("a", "a", "a", "a", "the", "my", "one"))
    if item.name is not None and noun.split()[0] == item.name and rng.random() < 0.5:
        return Named(item.category, color, pattern, accessory), " ".join([*adjectives, noun, *behind_words])
    words = " ".join([*adjectives, noun, *behind_words])
    if article == "a" and words[0] in "aeiou":
        article = "an"
    return Named(item.category, color, pattern, accessory), f"{article} {words}"


def _joined(rng: Random, phrases: list[str], named: list[Named]) -> str:
    """Both phrases, the left thing first, unless the text says which is left."""
    draw = rng.random()
    if draw < 0.07:
        return f"{phrases[0]} to the left of {phrases[1]}"
    if draw < 0.14:
        named.reverse()
        return f"{phrases[1]} to the right of {phrases[0]}"
    return rng.choice(_JOINS).format(*phrases)


def vocabulary() -> list[str]:
    """Every word that captions use, sorted."""
    texts = [*_PHOTO, *_ANY, *_DOING, *NEUTRAL_SENTENCES, *_WEARING, *_JOINS, *_NEUTRAL, *COLORS]
    texts += [phrase for phrases in (*PLACES.values(), *_STYLED.values(), *_SIZE_WORDS.values()) for phrase in phrases]
    texts += [name for names in KNOWN.values() for name in names]
    texts += ["teddy bear cat cup car house bird fish robot boat mushroom hat crown stripes dots an my one the a"]
    texts += ["left right of to the is that in with not very on at and striped dotted spotted it"]
    return sorted({word.strip("{},") for text in texts for word in text.replace("-", " - ").split()} - {""})


def corpus(count: int = 2400, seed: int = 0) -> list[str]:
    """``count`` distinct captions, for statistics of the text encoder; a longer list starts with the shorter one."""
    rng = Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[random_caption(rng).text] = None
    return list(found)
