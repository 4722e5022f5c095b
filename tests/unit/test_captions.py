"""Captions of photos: where the word goes, and which photo they belong to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perfusion.training.captions import (
    MAX_CHARACTERS,
    PhotoCaptions,
    captions_by_photo,
    lines_of,
    with_placeholder,
)

WORD = "<my-teddy>"
GENERAL = ("a photo of a {}", "my {}", "{} in the snow")


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a {} on a beach", "a <my-teddy> on a beach"),
        ("<My-Teddy> and a teddy bear", "<My-Teddy> and a teddy bear"),
        ("my teddy bear on a beach", "my <my-teddy> on a beach"),
        ("A Teddy Bear.", "A <my-teddy>."),
        ("two teddy bears, a teddy bear", "two <my-teddy>, a teddy bear"),
        ("the teddy-bear's hat", "the <my-teddy>'s hat"),
        ("teddy  bear", "<my-teddy>"),
        ("a bear", "<my-teddy>, a bear"),
        ("teddy bearing gifts", "<my-teddy>, teddy bearing gifts"),
        ("a <teddy bear>", "<my-teddy>, a <teddy bear>"),
        ("on a beach", "<my-teddy>, on a beach"),
        (" , on a beach", "<my-teddy>, on a beach"),
        ("", "<my-teddy>"),
    ],
)
def test_where_the_word_goes(caption: str, expected: str) -> None:
    assert with_placeholder(caption, WORD, "teddy bear") == expected


@pytest.mark.parametrize(
    ("super_category", "caption", "expected"),
    [
        ("bus", "three buses", "three <my-teddy>"),
        ("puppy", "Puppies!", "<my-teddy>!"),
        ("toy", "toies and toys", "toies and <my-teddy>"),
        ("c++ (mug)", "a C++ (mug) here", "a <my-teddy> here"),
        ("", "a cat", "<my-teddy>, a cat"),
        ("cat", "a concatenated cat", "a concatenated <my-teddy>"),
    ],
)
def test_plurals_and_odd_super_categories(super_category: str, caption: str, expected: str) -> None:
    assert with_placeholder(caption, WORD, super_category) == expected


@given(st.text(max_size=60), st.text(max_size=20))
def test_every_caption_ends_up_with_the_word(caption: str, super_category: str) -> None:
    once = with_placeholder(caption, WORD, super_category)
    assert WORD in once.lower()
    assert with_placeholder(once, WORD, super_category) == once


def test_lines_are_clean_and_bounded() -> None:
    text = "\ufeffa cat\x00\x1b[31m red\r\n\r\n  two\tcats \u202e\u2028last\n" + "x" * 5000
    lines = lines_of(text)
    assert lines[:3] == ("a cat [31m red", "two cats", "last")
    assert sum(map(len, lines)) < MAX_CHARACTERS
    assert lines_of(" \n\t\n") == ()


def test_each_photo_has_its_captions_or_the_general_ones() -> None:
    captions = captions_by_photo(["a teddy\nmy {}", "", "on a beach"], 3, WORD, "teddy", GENERAL)
    texts = [[captions.prompts[number] for number in numbers] for numbers in captions.of_photo]
    assert texts == [
        ["a <my-teddy>", "my <my-teddy>"],
        ["a photo of a <my-teddy>", "my <my-teddy>", "<my-teddy> in the snow"],
        ["<my-teddy>, on a beach"],
    ]
    assert len(set(captions.prompts)) == len(captions.prompts) == 5


def test_photos_that_were_left_out_take_their_captions_along() -> None:
    captions = captions_by_photo(["first {}", "second {}", "third {}"], 3, WORD, "teddy", GENERAL).select([0, 2])
    assert captions == PhotoCaptions(("first <my-teddy>", "third <my-teddy>"), ((0,), (1,)))


def test_without_captions_of_their_own_all_photos_draw_as_from_one_list() -> None:
    """The same random numbers as without captions by photo: a training of one seed stays what it was."""
    captions = captions_by_photo(None, 4, WORD, "teddy", GENERAL)
    photo = torch.tensor([0, 3, 1, 2, 2, 0])
    drawn = captions.draw(photo, torch.Generator().manual_seed(5))
    assert torch.equal(drawn, torch.randint(3, (6,), generator=torch.Generator().manual_seed(5)))


def test_captions_are_drawn_evenly_and_only_for_their_photo() -> None:
    captions = captions_by_photo(["a {}\nb {}\nc {}", "d {}\ne {}"], 2, WORD, "teddy", GENERAL)
    photo = torch.arange(2).repeat_interleave(3000)
    drawn = captions.draw(photo, torch.Generator().manual_seed(0))
    counts = torch.stack([torch.bincount(part, minlength=5) for part in drawn.split(3000)])
    assert torch.equal(counts > 0, torch.tensor([[True] * 3 + [False] * 2, [False] * 3 + [True] * 2]))
    assert int(counts[0, :3].min()) > 900
    assert int(counts[1, 3:].min()) > 1400


def test_captions_that_are_not_one_for_each_photo_are_refused() -> None:
    with pytest.raises(ValueError, match="3 photos but 2 captions"):
        captions_by_photo(["a", "b"], 3, WORD, "teddy", GENERAL)
    with pytest.raises(ValueError, match="no captions"):
        captions_by_photo(["a", ""], 2, WORD, "teddy", ())
