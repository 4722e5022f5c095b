"""The procedural world: the same seed the same picture, captions that tell the truth, looks that no caption names."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy as np
import pytest
from PIL import Image, ImageChops

from miniature import world
from miniature.backgrounds import BACKGROUNDS
from miniature.captions import caption, vocabulary
from miniature.data import ALIKE, VIEWS, personal_category, pool, pool_scene
from miniature.shapes import CATEGORIES
from miniature.styles import STYLES
from miniature.tokenizer import load as load_tokenizer
from miniature.weights import FOLDER


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_it_is_as_large_as_promised() -> None:
    assert len(CATEGORIES) >= 10 and len(world.COLORS) >= 10 and len(BACKGROUNDS) >= 6 and len(STYLES) >= 2


def test_a_seed_is_a_picture() -> None:
    first, again, other = (world.render(world.scene(Random(seed))) for seed in (3, 3, 4))
    assert first.size == (world.SIZE, world.SIZE) and first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


@pytest.mark.parametrize("category", sorted(CATEGORIES))
@pytest.mark.parametrize("mirrored", [False, True])
def test_every_category_is_drawn_with_every_accessory(category: str, mirrored: bool) -> None:
    look = world.instance(category, 0)
    bare = world.portrait(category, look, Random(1))
    bare = replace(bare, things=(replace(bare.things[0], mirrored=mirrored, y=0.6, radius=0.3),), background="studio")
    pictures = [
        _pixels(world.render(replace(bare, things=(replace(bare.things[0], accessory=worn),))))
        for worn in (None, *world.ACCESSORIES)
    ]
    for worn in pictures[1:]:
        assert (np.abs(worn - pictures[0]).sum(-1) > 60).sum() > 40  # pixels
    assert (np.abs(pictures[1] - pictures[2]).sum(-1) > 60).sum() > 40


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("style", STYLES)
def test_every_background_is_drawn_in_every_style(background: str, style: str) -> None:
    seen = replace(world.scene(Random(0), things=1), background=background, style=style)
    plain = _pixels(world.render(replace(seen, background="studio")))
    changed = np.abs(_pixels(world.render(seen)) - plain).sum(-1) > 20
    assert background == "studio" or changed.mean() > 0.2


def test_masks_lie_on_things_and_do_not_overlap() -> None:
    for seed in range(20):
        seen = world.scene(Random(seed), things=2)
        masks = [_pixels(mask) for mask in world.masks(seen)]
        assert len(masks) == 2 and all(mask.max() == 255 for mask in masks)
        assert np.minimum(*masks).max() < 140  # at most shared edge pixels
        for thing, mask in zip(seen.things, masks, strict=True):
            assert abs(np.average(np.arange(world.SIZE), weights=mask.sum(0)) / world.SIZE - thing.x) < 0.06


def test_a_mask_is_where_the_look_shows() -> None:
    look = world.instance("cat", 5)
    seen = world.portrait("cat", look, Random(2))
    other = replace(seen, things=(replace(seen.things[0], look=world.instance("cat", 6)),))
    changed = np.abs(_pixels(world.render(seen)) - _pixels(world.render(other))).sum(-1) > 30
    mask = _pixels(world.masks(seen)[0]) > 0
    assert changed.sum() > 100 and not (changed & ~mask).any()


def test_things_stay_inside_the_picture() -> None:
    for seed in range(300):
        for thing in world.scene(Random(seed)).things:
            assert thing.radius * 0.9 < thing.x < 1 - thing.radius * 0.9
            assert thing.radius * 0.9 < thing.y < 1 - thing.radius * 0.85


def test_a_personal_thing_keeps_its_look_and_differs_from_others() -> None:
    assert world.instance("car", 7) == world.instance("car", 7)
    looks = {world.instance("car", number) for number in range(50)}
    assert len(looks) == 50 and all(look.mark and look.pattern in world.SECRET_PATTERNS for look in looks)
    seen = [world.portrait("car", world.instance("car", 7), Random(k)) for k in range(5)]
    assert {scene.things[0].look for scene in seen} == {world.instance("car", 7)}
    assert len({scene.seed for scene in seen}) == 5 and all(scene.style == "photo" for scene in seen)


def test_known_things_always_look_the_same_and_are_called_by_their_names() -> None:
    names = [name for known in world.KNOWN.values() for name in known]
    assert set(world.KNOWN) == set(CATEGORIES) and len(set(names)) == len(names) >= 100
    assert len({world.known_look(name) for name in names}) == len(names)
    rng, called, met = Random(4), 0, 0
    for seed in range(400):
        for thing in (seen := world.scene(Random(seed))).things:
            if thing.name is not None:
                assert thing.name in world.KNOWN[thing.category] and thing.look == world.known_look(thing.name)
                assert thing.color is None and thing.pattern is None
                met += 1
                called += thing.name in caption(rng, seen).text.replace(",", "").split()
    assert met > 100 and 0.7 < called / met < 1  # now and then a known thing is only said to be of its kind


def test_of_two_things_the_left_one_comes_first_unless_it_is_said_otherwise() -> None:
    rng = Random(5)
    for seed in range(300):
        seen = world.scene(Random(seed), things=2)
        said = caption(rng, seen)
        left_first = [thing.category for thing in said.things] == [thing.category for thing in seen.things]
        assert left_first == ("to the right of" not in said.text)


def test_look_alikes_share_some_properties_and_never_all() -> None:
    look = world.instance("fish", 1)
    for number in range(100):
        other = world.look_alike(look, Random(number))
        shared = [
            name
            for name in ("color", "pattern", "second", "mark", "mark_color")
            if vars(look)[name] == vars(other)[name]
        ]
        assert 2 <= len(shared) <= 4 and other != look


def test_captions_name_what_is_there() -> None:
    rng, lengths = Random(0), set()
    for seed in range(500):
        seen = world.scene(Random(seed))
        said = caption(rng, seen)
        lengths.add(len(said.text.split()))
        assert said.background in (None, seen.background) and said.style in (None, seen.style)
        there = {thing.category: thing for thing in seen.things}
        assert sorted(thing.category for thing in said.things) == sorted(there)
        for named in said.things:
            thing = there[named.category]
            assert named.category in said.text or thing.name in said.text.replace(",", "").split()
            for attribute in ("color", "pattern", "accessory"):
                value = getattr(named, attribute)
                assert value is None or value == getattr(thing, attribute)
                if value is not None and attribute != "pattern":
                    assert value in said.text
    assert len(lengths) > 12


def test_captions_leave_things_out_and_vary() -> None:
    rng, seen = Random(1), world.scene(Random(11), things=2)
    said = [caption(rng, seen) for _ in range(200)]
    assert len({each.text for each in said}) > 150
    assert {each.background is None for each in said} == {True, False}


def test_a_personal_word_is_said_without_its_looks() -> None:
    rng = Random(2)
    for seed in range(100):
        seen = world.scene(Random(seed), things=1)
        said = caption(rng, seen, nouns=["<my-thing>"])
        assert "<my-thing>" in said.text and seen.things[0].category not in said.text
        assert said.things[0].color is None and said.things[0].pattern is None
        assert not any(f" {color} " in said.text for color in world.COLORS if color not in ("black", "white", "green"))


def test_every_word_of_the_captions_is_one_token() -> None:
    tokenizer = load_tokenizer(FOLDER / "tokenizer")
    split = [word for word in vocabulary() if len(tokenizer(word).input_ids) != 3]
    assert not split
    rng = Random(3)
    for seed in range(300):
        text = caption(rng, world.scene(Random(seed))).text
        words = text.replace(",", " ,").replace("-", " - ").split()
        assert len(tokenizer(text).input_ids) == len(words) + 2, text


def test_a_pool_goes_on_where_it_stopped(tmp_path) -> None:  # noqa: ANN001
    few = pool(tmp_path, "tested", 3, workers=1)
    stamp = (tmp_path / "tested" / "0.npy").stat().st_mtime_ns
    more = pool(tmp_path, "tested", 5, workers=1)
    assert (tmp_path / "tested" / "0.npy").stat().st_mtime_ns == stamp
    assert (few == more[:3]).all()
    expected = world.render(pool_scene("tested", 4))
    assert not ImageChops.difference(Image.fromarray(more[4].numpy()), expected).getbbox()


def test_the_pool_of_personal_things_shows_each_from_several_sides() -> None:
    for thing in range(8):
        category = personal_category(thing)
        views = [pool_scene("personal", thing * VIEWS + view) for view in range(VIEWS)]
        looks = {item.look for seen in views for item in seen.things if item.category == category}
        assert len(looks) == 1 and personal_category(thing // ALIKE * ALIKE) == category
