"""Which of several concepts' words is looked at where."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from perfusion.focus import Focus
from perfusion.places import Places, placed

SIZE = (4, 6)
PLACES = SIZE[0] * SIZE[1]
LOG = math.log(20)


def focus_of(*tokens: tuple[int, ...], length: int = 9) -> Focus:
    """One row in which concept j has its words at ``tokens[j]``."""
    parts = torch.zeros(1, length, len(tokens))
    for j, places in enumerate(tokens):
        parts[0, list(places), j] = LOG
    return Focus(parts)


def left() -> Tensor:
    """1 at places in the left half, -1 in the right one: (t,)."""
    columns = torch.arange(PLACES) % SIZE[1]
    return torch.where(columns < SIZE[1] // 2, 1.0, -1.0)


def of_two(focus: Focus) -> Places:
    """A call in which the key of token 2 is what queries on the left hold, and that of token 5 the opposite."""
    direction = torch.randn(8, generator=torch.Generator().manual_seed(0))
    queries = (left().unsqueeze(1) * direction).unsqueeze(0)
    keys = torch.zeros(1, 9, 8)
    keys[0, 2], keys[0, 5] = direction, -direction
    places = Places()
    places.add(queries, keys, focus, SIZE)
    return places


def test_each_word_is_looked_at_where_its_thing_is_to_be() -> None:
    focus = focus_of((2,), (5,))
    shares = of_two(focus).shares(focus, SIZE)
    assert shares is not None and shares.shape == (1, PLACES, 2)
    assert float(shares.sum(-1).max()) <= 1, "the rest is nobody's"
    on_the_left = left() > 0
    assert (shares[0, on_the_left, 0] > 0.9).all() and (shares[0, ~on_the_left, 1] > 0.9).all()
    bias = placed(focus, shares)
    assert bias.shape == (1, PLACES, 9)
    assert float(bias[0, on_the_left, 2].min()) > 0.85 * LOG
    assert float(bias[0, on_the_left, 5].max()) < -0.85 * LOG, "taken away where the other is"
    assert not bias[0, :, [0, 1, 3, 4, 6, 7, 8]].any(), "other tokens are looked at as ever"


def test_prompt_weights_count_at_all_places_alike() -> None:
    focus, weighing = focus_of((2,), (5,)), torch.zeros(1, 9)
    weighing[0, 2] = math.log(0.8)
    shares = of_two(focus).shares(focus, SIZE)
    assert shares is not None
    weighed = Focus(focus.parts, weighing=weighing)
    same = of_two(weighed).shares(weighed, SIZE)
    assert same is not None and torch.equal(same, shares), "they do not say where"
    assert torch.allclose(placed(weighed, shares) - placed(focus, shares), weighing.expand(PLACES, 9), atol=1e-6)
    assert torch.allclose(weighed.everywhere - focus.everywhere, weighing.unsqueeze(1), atol=1e-6)


@pytest.mark.parametrize("size", [(2, 3), (8, 12), (7, 11)])
def test_layers_of_any_size_look_alike(size: tuple[int, int]) -> None:
    focus = focus_of((2,), (5,))
    shares = of_two(focus).shares(focus, size)
    assert shares is not None and shares.shape == (1, size[0] * size[1], 2)
    columns = shares[0, :, 0].view(size)
    assert (columns[:, 0] > 0.9).all() and (columns[:, -1] < 0.1).all()


def test_a_word_alone_leaves_other_things_their_places() -> None:
    focus = focus_of((2,), ())
    shares = of_two(focus).shares(focus, SIZE)
    assert shares is not None
    bias = placed(focus, shares)
    assert float(bias[0, left() > 0, 2].min()) > 0.8 * LOG and float(bias[0, left() < 0, 2].max()) < -0.8 * LOG


def test_rows_without_words_are_left_alone() -> None:
    focus = Focus(torch.cat([focus_of((2,), (5,)).parts, torch.zeros(1, 9, 2)]))
    places = Places()
    places.add(torch.randn(2, PLACES, 8), torch.randn(2, 9, 8), focus, SIZE)
    shares = places.shares(focus, SIZE)
    assert shares is not None
    bias = placed(focus, shares)
    assert bias.isfinite().all() and not bias[1].any()


def test_a_word_of_several_tokens_is_heard_as_one() -> None:
    """By the mean of its keys: token 5 says nothing here that token 2 has not said."""
    one, several = focus_of((2,), (7,)), focus_of((2, 5), (7,))
    queries, keys = torch.randn(1, PLACES, 8), torch.randn(1, 9, 8)
    keys[0, 5] = keys[0, 2]
    found = []
    for focus in (one, several):
        places = Places()
        places.add(queries, keys, focus, SIZE)
        found.append(places.shares(focus, SIZE))
    assert found[0] is not None and found[1] is not None
    assert torch.allclose(*found, atol=1e-5)


def test_only_where_the_decoder_begins_is_asked() -> None:
    places = Places()
    layers = [("input", (8, 8)), ("input", (4, 4)), ("middle", (4, 4)), ("output", (4, 4)), ("output", (8, 8))]
    assert [places.asks(stage, size) for stage, size in layers] == [False, False, False, True, False]  # type: ignore[arg-type]


def test_what_was_said_counts_for_all_of_the_next_call() -> None:
    focus = focus_of((2,), (5,))
    first = of_two(focus)
    assert Places().shares(focus, SIZE) is None, "nothing is known at first"
    following = Places(first.said)
    assert torch.equal(torch.as_tensor(following.shares(focus, SIZE)), torch.as_tensor(first.shares(focus, SIZE)))
    following.add(torch.randn(1, PLACES, 8), torch.randn(1, 9, 8), focus, SIZE)
    assert torch.equal(torch.as_tensor(following.shares(focus, SIZE)), torch.as_tensor(first.shares(focus, SIZE)))
    assert following.said is not None and first.said is not None
    assert not torch.equal(following.said, first.said), "and what is said in it, for the one behind it"


def test_a_concept_that_is_hardly_looked_at_takes_no_place() -> None:
    focus = focus_of((2,), (5,))
    focus = Focus(focus.parts * torch.tensor([1.0, 1e-4]))
    shares = of_two(focus).shares(focus, SIZE)
    assert shares is not None and float(shares[0, left() > 0, 0].min()) > 0.9 and float(shares[..., 1].max()) < 0.01


def test_a_concept_that_comes_in_later_was_not_asked() -> None:
    """Until it is, words are looked at everywhere."""
    before = of_two(focus_of((2,), (5,))).said
    assert before is not None
    third = torch.cat([before, torch.zeros_like(before[:, :1])], 1)
    focus = focus_of((2,), (5,), (7,))
    shares = Places(third).shares(focus, SIZE)
    assert shares is not None and torch.equal(shares, torch.ones(1, PLACES, 3))
    still_out = Places(third).shares(focus_of((2,), (5,), ()), SIZE)
    assert still_out is not None and float(still_out[..., :2].min()) < 0.1


def test_what_was_said_of_another_batch_is_not_heard() -> None:
    focus = focus_of((2,), (5,))
    two = Focus(focus.parts.repeat(2, 1, 1))
    assert Places(of_two(focus).said).shares(two, SIZE) is None


def alike(focus: Focus, columns: Sequence[int] = (1, 2, 3, 4)) -> Places:
    """A call in which all keys are what queries in some columns hold."""
    direction = torch.randn(8, generator=torch.Generator().manual_seed(0))
    weights = torch.full((SIZE[1],), -3.0)
    weights[list(columns)] = 2.0
    weights = weights.repeat(SIZE[0])
    queries = (weights.unsqueeze(1) * direction).expand(len(focus.parts), PLACES, 8)
    places = Places()
    places.add(queries, direction.expand(len(focus.parts), 9, 8), focus, SIZE)
    return places


def columns_of(focus: Focus, size: tuple[int, int] = SIZE) -> Tensor:
    """What each concept has of each column, by ``alike``: (width, j)."""
    shares = alike(focus).shares(focus, size)
    assert shares is not None
    return shares.view(*size, -1).mean(0)


@pytest.mark.parametrize(("first", "second"), [(2, 5), (5, 2)])
def test_two_of_one_kind_stand_side_by_side_in_the_order_of_their_words(first: int, second: int) -> None:
    alone = columns_of(focus_of((first,), (second,)))
    assert torch.equal(alone[:, 0], alone[:, 1]), "by their keys, nothing tells them apart"
    parts = focus_of((first,), (second,)).parts
    columns = columns_of(Focus(parts, kinds=[0, 0]))
    assert torch.allclose(columns.sum(1), alone.sum(1)), "together they have the places that were theirs"
    left, right = (0, 1) if first < second else (1, 0)
    assert (columns[1:3, left] > 0.9).all() and (columns[3:5, left] < 1e-4).all()
    assert (columns[3:5, right] > 0.9).all() and (columns[1:3, right] < 1e-4).all()
    assert (columns[[0, 5]] < 0.1).all(), "and nothing of others' places"


def test_three_of_one_kind_share_a_column_where_their_places_meet() -> None:
    """Four columns for three: the first has one and a third of them."""
    columns = columns_of(Focus(focus_of((2,), (5,), (7,)).parts, kinds=[0, 0, 0]))
    whole = columns.sum(1)[1]
    expected = torch.tensor([[1, 0, 0], [1 / 3, 2 / 3, 0], [0, 2 / 3, 1 / 3], [0, 0, 1]]) * whole
    assert torch.allclose(columns[1:5], expected, atol=0.05)


@pytest.mark.parametrize(("left", "right"), [([0], [1]), ([1, 2], [4, 5]), ([3, 4], [5])])
def test_they_share_their_things_not_the_picture(left: list[int], right: list[int]) -> None:
    """Wherever these are, and in the upper rows alone."""
    focus = Focus(focus_of((2,), (5,)).parts, kinds=[0, 0])
    places = alike(focus, [*left, *right])
    assert places.said is not None
    said = places.said.clone()
    said[:, :, 2:] = said.amin()
    shares = Places(said).shares(focus, SIZE)
    assert shares is not None
    of_first, of_second = shares.view(*SIZE, 2)[:2].mean(0).unbind(-1)
    assert (of_first[left[:1]] > 0.9).all() and (of_second[left[:1]] < 0.05).all()
    assert (of_second[right[-1:]] > 0.9).all() and (of_first[right[-1:]] < 0.05).all()


def test_in_a_part_of_the_picture_they_compete_as_others_do() -> None:
    focus = Focus(focus_of((2,), (5,)).parts, kinds=[0, 0])
    said = alike(focus).said
    tile, others = Places(said, part=True).shares(focus, SIZE), Places(said).shares(Focus(focus.parts), SIZE)
    assert tile is not None and others is not None and torch.equal(tile, others)


def test_words_at_one_token_have_places_of_their_own() -> None:
    columns = columns_of(Focus(focus_of((2,), (2,)).parts, kinds=[0, 0]))
    assert float(columns[1:3, 0].min()) > 0.9 and float(columns[3:5, 1].min()) > 0.9


def test_a_trace_of_a_concept_before_its_word_is_not_its_word() -> None:
    parts = focus_of((2,), (5,)).parts
    parts[0, 1, 1] = 1e-4
    columns = columns_of(Focus(parts, kinds=[0, 0]))
    assert torch.allclose(columns[1], columns[2], atol=0.01)
    assert float(columns[1, 0]) > 0.9


def test_one_of_a_kind_that_is_alone_in_its_prompt_has_all_places() -> None:
    """Of two rows, the first names one of them, the second both."""
    parts = torch.cat([focus_of((2,), ()).parts, focus_of((2,), (5,)).parts])
    kin, by_themselves = (alike(focus).shares(focus, SIZE) for focus in (Focus(parts, kinds=[4, 4]), Focus(parts)))
    assert kin is not None and by_themselves is not None
    assert torch.equal(kin[0], by_themselves[0]) and not torch.equal(kin[1], by_themselves[1])


@pytest.mark.parametrize(("loudness", "columns_of_first"), [(1.0, 2.0), (0.5, 2.0), (0.25, 4 / 3), (1e-5, 0.0)])
def test_one_of_a_kind_that_is_hardly_looked_at_leaves_its_places(loudness: float, columns_of_first: float) -> None:
    parts = focus_of((2,), (5,)).parts * torch.tensor([loudness, 1.0])
    columns = columns_of(Focus(parts, kinds=[0, 0]))
    whole = float(columns.sum(1)[1:5].mean())
    assert float(columns[:, 0].sum()) / whole == pytest.approx(columns_of_first, abs=0.06)
    assert float(columns[1:5].sum()) / whole == pytest.approx(4)


def test_concepts_of_another_kind_keep_their_places() -> None:
    parts = focus_of((2,), (5,), (7,)).parts
    kin, by_themselves = columns_of(Focus(parts, kinds=[0, 1, 0])), columns_of(Focus(parts))
    assert torch.equal(kin[:, 1], by_themselves[:, 1])
    assert float(kin[1, 0]) > 0.6 and float(kin[4, 0]) < 1e-4


@pytest.mark.parametrize("size", [(2, 3), (8, 12)])
def test_side_by_side_in_layers_of_any_size(size: tuple[int, int]) -> None:
    columns = columns_of(Focus(focus_of((2,), (5,)).parts, kinds=[0, 0]), size)
    half = size[1] // 2
    assert float(columns[:half, 0].sum()) > 4 * float(columns[size[1] - half :, 0].sum())
