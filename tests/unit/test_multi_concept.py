"""What benchmarks.multi_concept calls a success, and how it looks at pictures: no weights, no drawing."""

from __future__ import annotations

import re
from random import Random

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from benchmarks.multi_judging import Reading, halves, joined, look_of, windows
from benchmarks.multi_pictures import (
    MISTAKES,
    figures,
    mistaken,
    order_in,
    ratio,
    scene_with,
    scene_without,
    templates,
    weighted,
)

KINDS = ("cat", "car", "cup")


def reading(present: list[list[int]], nearest: list[list[int]]) -> Reading:
    return Reading(torch.tensor(present, dtype=torch.bool), torch.tensor(nearest))


def test_a_success_shows_every_concept_as_itself() -> None:
    # Right; swapped; one with the other's look; one like nobody; one absent though its place looks right.
    found = reading([[1, 1], [1, 1], [1, 1], [1, 1], [1, 0]], [[0, 1], [1, 0], [0, 0], [0, 5], [0, 1]])
    assert found.success.tolist() == [True, False, False, False, False]
    assert found.all_present.tolist() == [True, True, True, True, False]
    assert found.own.int().tolist() == [[1, 1], [0, 0], [1, 0], [1, 0], [1, 0]]
    assert found.blend.int().tolist() == [[0, 0], [1, 1], [0, 1], [0, 0], [0, 0]]
    assert found.stranger.int().tolist() == [[0, 0], [0, 0], [0, 0], [0, 1], [0, 0]]


def test_each_concept_present_is_one_of_own_blend_and_stranger() -> None:
    draws = torch.Generator().manual_seed(0)
    found = Reading(torch.rand(200, 3, generator=draws) > 0.3, torch.randint(11, (200, 3), generator=draws))
    kinds = torch.stack([found.own, found.blend, found.stranger]).sum(0)
    assert torch.equal(kinds == 1, found.present)
    assert int(kinds.max()) == 1


def test_two_of_a_kind_may_stand_either_way_round() -> None:
    halves_show = reading(
        [[1, 1], [1, 1], [1, 1], [1, 1], [0, 1], [1, 1]], [[0, 1], [1, 0], [1, 1], [7, 0], [1, 0], [7, 8]]
    )
    found = halves_show.assigned()
    assert found.success.tolist() == [True, True, False, False, False, False]
    assert found.own.int().tolist() == [[1, 1], [1, 1], [0, 1], [1, 0], [1, 0], [0, 0]]
    assert found.blend.int().tolist() == [[0, 0], [0, 0], [1, 0], [0, 0], [0, 0], [0, 0]]
    assert found.present.int().tolist()[4] == [1, 0]


def test_halves_keep_their_side_and_show_nothing_of_the_other() -> None:
    picture = torch.arange(64).float().view(1, 1, 64, 1).expand(2, 64, 64, 3)
    left, right = halves(picture).unbind(1)
    assert left.shape == right.shape == picture.shape
    assert left[0, 0, :, 0].tolist() == [*range(31, -1, -1), *range(32)]
    assert right[0, 0, :, 0].tolist() == [*range(32, 64), *range(63, 31, -1)]


@pytest.mark.parametrize(("things", "views"), [(2, 1), (3, 5), (5, 21)])
def test_windows_reach_from_edge_to_edge(things: int, views: int) -> None:
    pictures = torch.zeros(2, 64, 64, 3)
    pictures[:, 63, 0], pictures[:, 63, 63] = 1.0, 1.0
    found = windows(pictures, things)
    assert found.shape == (2, views, 64, 64, 3)
    assert bool(found[:, :, 63, 0].any()) and bool(found[:, :, 63, 63].any())


def test_the_whole_picture_is_the_view_of_two_things() -> None:
    pictures = torch.rand(3, 64, 64, 3)
    assert torch.equal(windows(pictures, 2)[:, 0], pictures)


@pytest.mark.parametrize("things", [2, 3, 5])
def test_prompts_name_every_thing_once_in_any_order(things: int) -> None:
    texts = templates(things, 30, Random("texts"))
    assert len(texts) == 30
    assert all(text.count(f"{{{k}}}") == 1 for text in texts for k in range(things))
    assert len({text.index("{0}") < text.index("{1}") for text in texts}) == 2
    assert not any("sketch" in text or "watercolor" in text for text in texts)


def test_every_fourth_prompt_gives_one_thing_a_weight() -> None:
    texts = templates(2, 12, Random("texts"))
    found = weighted(texts, ["{0}", "{1}"])
    changed = [number for number, (text, other) in enumerate(zip(found, texts, strict=True)) if text != other]
    assert changed == [3, 7, 11]
    assert all(re.search(r"\({[01]}:(0.8|1.2|1.4)\)", found[number]) for number in changed)
    assert found == weighted(texts, ["{0}", "{1}"])


@pytest.mark.parametrize("count", [2, 3])
def test_scenes_show_all_things_with_their_looks_or_all_but_one(count: int) -> None:
    looks = [look_of((kind, 0)) for kind in KINDS[:count]]
    complete = scene_with(KINDS[:count], looks, Random(1))
    assert {(thing.category, thing.look) for thing in complete.things} == set(zip(KINDS, looks, strict=False))
    assert len({thing.x for thing in complete.things}) == count
    assert len(scene_without(KINDS[:count], looks, Random(1)).things) == count - 1


def test_mistaken_looks_are_never_all_right() -> None:
    looks = [look_of((kind, 0)) for kind in KINDS]
    for seed in range(20):
        wrong = mistaken(looks, Random(seed))
        assert tuple(wrong) == MISTAKES
        assert all(len(each) == len(looks) and each != looks for each in wrong.values())
        assert set(wrong["swapped"]) == set(looks) and len(set(wrong["same"])) == 1
        assert not set(wrong["mixed"]) & set(looks)


def test_ratios_need_something_to_compare_with() -> None:
    whole = torch.tensor([True, True, True, True, False])
    assert ratio(whole & torch.tensor([True, True, False, False, True]), whole)[0] == 0.5
    assert ratio(whole, torch.tensor([True, False, False, False, False])) == (None, None)


def test_figures_of_one_perfect_arrangement() -> None:
    perfect = reading([[1, 1]] * 3, [[0, 1]] * 3)
    plain = reading([[1, 1], [1, 1], [1, 0]], [[4, 5], [6, 4], [0, 9]])
    ways = {"stack": perfect, "base": plain, "single": perfect, "known": plain, "right": perfect, "same": plain}
    order = order_in(["a {1} and a {0}", "{0}, {1}", "{0}, {1}"], 2)
    assert order.tolist() == [[1, 0], [0, 1], [0, 1]]
    weights = torch.tensor([False, False, True])
    found = figures(ways, order, weights)
    assert found["success_weighted"] == 1.0 and found["base_present_weighted"] == 0.0
    assert found["own_as"] == [1.0, 1.0]
    assert found["known_own"] == pytest.approx(1 / 6, abs=1e-4) and found["known_success"] == 0.0
    assert found["success_over_known"] is None
    first_alone = reading([[1, 1]] * 3, [[5, 1], [0, 5], [0, 5]])
    assert figures({**ways, "stack": first_alone}, order, weights)["own_as"] == [1.0, 0.0]
    assert found["success"] == found["own"] == found["own_over_single"] == 1.0
    assert found["base_present"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["success_over_base"] == 1.5
    assert found["errors"]["success"] == 0.0
    assert found["renders"] == {"own": 1.0, "present": 1.0, "right": 1.0, "same": 0.0}


def test_readings_of_several_sets_are_one() -> None:
    one, other = reading([[1, 1]], [[0, 1]]), reading([[0, 1]], [[3, 1]])
    assert joined([one, other]).own.int().tolist() == [[1, 1], [0, 1]]
