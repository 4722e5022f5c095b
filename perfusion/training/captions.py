"""Captions of photos: where the word goes in a caption that has no place for it, and which captions go with a photo.

The rule, for a caption that holds neither ``{}`` nor the placeholder:

1. The first mention of the super-category, or of its plural, becomes the placeholder: "my teddy bear on a beach" is
   "my <my-teddy> on a beach".
2. Where it is not mentioned, the placeholder comes first: "on a beach" is "<my-teddy>, on a beach".
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_CHARACTERS = 2000  # of one photo's captions; an encoder sees about 300 of each


@dataclass(frozen=True)
class PhotoCaptions:
    """What to train each photo with: ``prompts``, and for each photo the numbers of those that go with it."""

    prompts: tuple[str, ...]
    of_photo: tuple[tuple[int, ...], ...]

    def select(self, photos: Sequence[int]) -> PhotoCaptions:
        """The captions of these photos alone, such as ``Photos.kept``, in that order."""
        chosen = [self.of_photo[photo] for photo in photos]
        used = sorted({number for numbers in chosen for number in numbers})
        place = {number: k for k, number in enumerate(used)}
        return PhotoCaptions(
            tuple(self.prompts[number] for number in used),
            tuple(tuple(place[number] for number in numbers) for numbers in chosen),
        )

    def draw(self, photo: Tensor, generator: torch.Generator) -> Tensor:
        """For each of the photos (b,) the number of a prompt (b,), each that goes with it as likely as the others."""
        counts = torch.tensor([len(numbers) for numbers in self.of_photo])
        # Below a multiple of all counts the remainder favors none; below a number as large as 2^62, none that shows.
        limit = min(math.lcm(*counts.tolist()), 2**62)
        drawn = torch.randint(limit, photo.shape, generator=generator) % counts[photo]
        return torch.tensor([self.of_photo[k][n] for k, n in zip(photo.tolist(), drawn.tolist(), strict=True)])


def captions_by_photo(
    texts: Sequence[str] | None, photos: int, placeholder: str, super_category: str, general: Sequence[str]
) -> PhotoCaptions:
    """Captions for each of ``photos`` photos.

    ``texts``: one for each photo, of one caption a line; a photo with an empty one, or all where there are none, is
    trained with the ``general`` captions. The placeholder is put into all of them: see ``with_placeholder``.

    Raises ValueError when the texts are not one for each photo, or a photo has no caption at all.
    """
    texts = texts or [""] * photos
    if len(texts) != photos:
        raise ValueError(
            f"{photos} photos but {len(texts)} captions: give one caption for each photo, in the same order; an empty "
            "one for a photo without"
        )
    number: dict[str, int] = {}

    def numbered(captions: Sequence[str]) -> tuple[int, ...]:
        prompts = dict.fromkeys(with_placeholder(caption, placeholder, super_category) for caption in captions)
        return tuple(number.setdefault(prompt, len(number)) for prompt in prompts)

    of_photo = []
    for text in texts:
        own = lines_of(text)
        of_photo.append(numbered(own if own else general))
        if not of_photo[-1]:
            raise ValueError("no captions to train with")
    return PhotoCaptions(tuple(number), tuple(of_photo))


def with_placeholder(caption: str, placeholder: str, super_category: str) -> str:
    """A caption with the placeholder in it, by the rule of this module.

    One that holds ``{}`` or the placeholder stays as it is, with the placeholder for each ``{}``.
    """
    if "{}" in caption or placeholder in caption.lower():
        return caption.replace("{}", placeholder)
    mention = _mentions(super_category).search(caption) if super_category.strip() else None
    if mention:
        return caption[: mention.start()] + placeholder + caption[mention.end() :]
    caption = caption.strip().lstrip(",").lstrip()
    return f"{placeholder}, {caption}" if caption else placeholder


def lines_of(text: str) -> tuple[str, ...]:
    """The captions of a text, one a line: of its first 2,000 characters, without control characters and blanks."""
    lines = re.split(r"[\r\n\u2028\u2029]+", text.removeprefix("\ufeff")[:MAX_CHARACTERS])
    readable = ("".join(" " if _is_control(char) else char for char in line) for line in lines)
    return tuple(joined for line in readable if (joined := " ".join(line.split())))


def _is_control(char: str) -> bool:
    """Whether nobody can see it: control, format, surrogate or private. Joiners between letters are seen."""
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co") and char not in "\u200c\u200d"


def _mentions(super_category: str) -> re.Pattern[str]:
    """Matches a super-category as whole words, in any case, in the singular or the plural."""
    *before, last = super_category.split()
    ending = re.escape(last) + "(?:s|es)?"
    if re.search(r"[^aeiou]y$", last, re.IGNORECASE):
        ending = f"(?:{ending}|{re.escape(last[:-1])}ies)"
    words = r"[\s-]+".join([*map(re.escape, before), ending])
    return re.compile(rf"(?<![\w<])(?:{words})(?![\w>])", re.IGNORECASE)
