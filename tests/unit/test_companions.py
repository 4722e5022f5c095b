"""Pictures of a thing beside other things, put together of its photos and of what the model draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from perfusion.training.checkpoint import photos_digest
from perfusion.training.companions import Lesson, things_beside, with_companions
from perfusion.training.dataset import MaskError, prepare
from perfusion.training.trainer import Subject
from tests.unit.fake_host import FakeHost
from tests.unit.small_training import a_trainer

SIDE = 64
RED, GREEN = torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.1, 0.8, 0.1])


def photo() -> Tensor:
    """A red thing in the middle of something green."""
    made = GREEN.expand(SIDE, SIDE, 3).clone()
    made[16:48, 16:48] = RED
    return made


def mask() -> Tensor:
    made = torch.zeros(SIDE, SIDE)
    made[16:48, 16:48] = 1
    return made


def subject(**changes: Any) -> Subject:
    return Subject("<bear>", "bear", **changes)


def lesson(count: int = 4, host: FakeHost | None = None, **changes: Any) -> Lesson:
    given: dict[str, Any] = {"images": [photo(), photo()], "masks": [mask(), mask()], "subject": subject()}
    return with_companions(host or FakeHost(), count=count, resolution=SIDE, **{**given, **changes})


def test_the_thing_stands_in_half_of_each_and_its_mask_knows_where() -> None:
    made = lesson()
    assert (len(made.images), made.made) == (6, 4)
    assert torch.equal(made.images[0], photo())
    assert made.masks is not None and torch.equal(torch.as_tensor(made.masks[0]), mask())
    for number in range(4):
        picture, where = made.images[2 + number], torch.as_tensor(made.masks[2 + number])
        assert picture.shape == (SIDE, SIDE, 3) and where.shape == (SIDE, SIDE)
        own, other = where.chunk(2, dim=1) if number % 2 == 0 else where.chunk(2, dim=1)[::-1]
        assert float(own.sum()) > 100 and not other.any()
        assert torch.allclose(picture[where > 0.99], RED.expand(int((where > 0.99).sum()), 3), atol=0.05)
        edge = where.sum(0)[own.shape[1] * (number % 2) :][: own.shape[1]]
        assert edge[0] < 1 and edge[-1] < 1, "the whole of the thing is in its half"


def test_what_is_named_first_stands_on_the_left() -> None:
    made = lesson()
    texts = list(made.subject.of_photo or [])
    assert texts[:2] == ["", ""], "photos keep the captions they have"
    for number, text in enumerate(texts[2:]):
        for line in text.splitlines():
            first = line.index("a {}") < max(line.rfind(f"a {noun}") for noun in things_beside(FakeHost(), subject()))
            assert first is (number % 2 == 0), line
    kept = lesson(subject=subject(of_photo=["on a hill", ""])).subject.of_photo
    assert kept is not None and list(kept[:2]) == ["on a hill", ""]


def test_none_are_made_where_none_are_wanted_or_possible() -> None:
    host = FakeHost()
    calls = host.calls
    images, masks = [photo()], [mask()]
    none = lesson(0, host, images=images, masks=masks)
    assert none.made == 0 and list(none.images) == images and none.subject.of_photo is None
    assert host.calls == calls, "nothing is drawn"
    plain = torch.full((SIDE, SIDE, 3), 0.5)
    assert lesson(3, images=[plain], masks=None).made == 0, "photos of one color are refused later"
    only_plain_left_out = lesson(2, images=[plain, photo()], masks=[None, mask()])
    assert only_plain_left_out.made == 2


def test_things_that_the_encoders_know() -> None:
    host = FakeHost()
    assert "cat" in things_beside(host, subject()) and "cat" not in things_beside(host, Subject("<a>", "fat cat"))
    vars(host)["captions"] = ["a cat and a cup in the snow", "the boats"]
    assert things_beside(host, subject()) == ["cat", "cup"]
    vars(host)["captions"] = ["nothing of it"]
    assert lesson(3, host).made == 0


def test_the_same_seed_gives_the_same_pictures() -> None:
    first, again, other = lesson(), lesson(), lesson(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.images, again.images, strict=True))
    assert first.subject.of_photo == again.subject.of_photo != other.subject.of_photo


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="2 photos but 1 captions"):
        lesson(subject=subject(of_photo=["one"]))
    with pytest.raises(MaskError, match="2 photos but 1 masks"):
        lesson(masks=[mask()])
    with pytest.raises(ValueError, match="photo 1 has shape"):
        lesson(images=[torch.zeros(3, 4)], masks=None)


def test_drawing_can_be_stopped() -> None:
    def stop(done: int, total: int) -> None:
        assert 0 <= done < total == 16
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lesson(progress=stop)


def test_they_are_trained_with_but_are_no_photos() -> None:
    host, made = FakeHost(), lesson()
    photos = prepare(host, made.images, made.masks, SIDE, made=made.made)
    assert (len(photos), photos.made) == (6, 4)
    (bucket,) = photos.buckets
    assert torch.equal(bucket.mirrored[2:], bucket.latents[2:]), "left and right mean something in them"
    assert [len(own) for own in photos.own] == [2]
    alone = prepare(host, [photo(), photo()], [mask(), mask()], SIDE)
    assert photos_digest(photos) == photos_digest(alone)
    trainer = a_trainer(made.subject, FakeHost(), photos, companions=4, steps=2)
    trainer.run()
    summary = trainer.concept().training
    assert (summary["photos"], summary["companions"]) == (2, 4)
