"""A training's state in a file: exact, checked, and refused where the training is another."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from perfusion.corpus import captions
from perfusion.hosts.base import Encodings
from perfusion.statistics import measure
from perfusion.training import checkpoint
from perfusion.training import trainer as trainer_module
from perfusion.training.checkpoint import ResumeError, restore, save
from perfusion.training.config import BEFORE, TrainingConfig
from perfusion.training.dataset import prepare
from perfusion.training.trainer import Subject, Trainer
from tests.unit.fake_host import FakeHost
from tests.unit.small_training import TWO_ENCODERS, a_trainer, other_photos, photos, settings


def after(number: int, trainer: Trainer | None = None, **changes: Any) -> Trainer:
    trainer = trainer or a_trainer(**changes)
    for _ in range(number):
        trainer.step()
    return trainer


def assert_same(found: Trainer, expected: Trainer) -> None:
    """Bit for bit."""
    mine, theirs = found.state(), expected.state()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
    assert (found.losses, found.gates) == (expected.losses, expected.gates)
    assert found.concept().digest == expected.concept().digest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The state of a short training."""
    path = tmp_path / "teddy.safetensors"
    save(path, after(2))
    return path


def refusal(path: Path, trainer: Trainer) -> str:
    """What a user is told; the trainer is left as it was."""
    before = trainer.state()
    with pytest.raises(ResumeError) as caught:
        restore(path, trainer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.state().items())
    return str(caught.value)


# --- exact


@pytest.mark.parametrize("estimator", ["robust", "paper"])
@pytest.mark.parametrize("changes", [{}, {"vectors": 3, "micro_batch": 3, "form": "preserving", "rates": "absolute"}])
@examples(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(0, 7), second=st.integers(1, 4))
def test_a_training_in_two_parts_is_the_training(
    estimator: str, changes: dict[str, Any], first: int, second: int, tmp_path: Path
) -> None:
    """Also across the looks at the word in varied captions, which come every third step here."""
    path = tmp_path / "state.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "REFRESH", 3)
        whole = after(first + second, estimator=estimator, steps=20, **changes)
        # The shorter run thinks that it is done, the longer one has no end yet.
        save(path, after(first, estimator=estimator, steps=max(1, first), **changes))
        resumed = a_trainer(estimator=estimator, steps=12, **changes)
        after(1, resumed)  # what it did before does not matter
        restore(path, resumed)
        assert resumed.steps_done == first
        assert_same(after(second, resumed), whole)


def test_two_encoders_and_a_network_that_predicts_velocity(tmp_path: Path) -> None:
    def trainer() -> Trainer:
        return a_trainer(Subject("<it>", "teddy bear"), FakeHost("v", TWO_ENCODERS), steps=40)

    save(tmp_path / "state.safetensors", after(26, trainer()))
    resumed = trainer()
    restore(tmp_path / "state.safetensors", resumed)
    assert_same(after(2, resumed), after(28, trainer()))


def test_what_is_kept_beside_it_comes_back(tmp_path: Path) -> None:
    extra = {"a": torch.arange(3, dtype=torch.uint8), "b": [1, None, {"c": 0.1}], "d": torch.ones(2, 2)}
    save(tmp_path / "state.safetensors", after(1), extra)
    found = restore(tmp_path / "state.safetensors", a_trainer())
    assert found.keys() == extra.keys()
    assert found["b"] == extra["b"]
    assert torch.equal(found["a"], torch.arange(3, dtype=torch.uint8)) and torch.equal(found["d"], torch.ones(2, 2))


def test_saving_and_looking_change_nothing(file: Path) -> None:
    trainer = after(2)
    save(file, trainer)
    checkpoint.settings(trainer)
    assert_same(after(2, trainer), after(4))


def test_a_write_that_fails_leaves_the_older_state(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(file, after(3))
    assert list(file.parent.iterdir()) == [file]
    trainer = a_trainer()
    restore(file, trainer)
    assert trainer.steps_done == 2


# --- other trainings


OTHER: dict[str, Any] = {
    "batch_size": 3,
    "micro_batch": 2,
    "resolution": 128,
    "rates": "absolute",
    "value_rate": 0.2,
    "embedding_rate": 0.1,
    "bias": 0.5,
    "temperature": 0.2,
    "form": "preserving",
    "estimator": "paper",
    "scope": "prompt",
    "focus": 2.0,
    "companions": 3,
    "timesteps": "uniform",
    "key_rate": 0.0,
    "preservation": 2.5,
    "contexts": 17,
    "vectors": 2,
    "flip": False,
    "seed": 1,
}


@pytest.mark.parametrize("name", [f.name for f in fields(TrainingConfig) if f.name not in checkpoint._FREE])
def test_another_setting_is_named(file: Path, name: str) -> None:
    told = refusal(file, a_trainer(**{name: OTHER[name]}))
    assert f"learned with {name} {_json(getattr(settings(), name))}, now {_json(OTHER[name])}" in told
    assert "teddy.safetensors" in told and "move the file away" in told


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def test_a_training_that_is_older_than_a_setting_goes_on_as_it_began(tmp_path: Path) -> None:
    old = {name: value for name, value in BEFORE.items() if name != "companions"}
    trainer, path = a_trainer(**old), tmp_path / "old.safetensors"
    trainer.step()
    known = {name: value for name, value in checkpoint.settings(trainer).items() if name not in BEFORE}
    save(path, trainer, known=known)
    resumed = a_trainer(**{**old, "companions": BEFORE["companions"]})
    restore(path, resumed)
    assert_same(resumed, trainer)
    for name in ("key_rate", "preservation"):
        told = refusal(path, a_trainer(**{**old, "companions": 0, name: 0.5}))
        assert f"learned with {name} 0.0, now" in told


def test_every_setting_that_differs_is_named(file: Path) -> None:
    told = refusal(file, a_trainer(Subject("<it>", "cat", ["the {}"]), seed=4, value_rate=0.3))
    for part in (
        "learned with value_rate 0.1, now 0.3",
        "learned with seed 0, now 4",
        "learned with placeholder <bear>, now <it>",
        "learned with super_category bear, now cat",
        "captions to train with are others",
    ):
        assert part in told
    assert "photos" not in told and "batch_size" not in told


def test_other_photos_masks_captions_and_models_are_told_apart(file: Path) -> None:
    images = photos()
    turned = other_photos(latents=images.latents.roll(1, 0))
    painted = other_photos(weights=images.weights.flip(-1))
    fewer = other_photos(**{name: tensor[:2] for name, tensor in vars(images.buckets[0]).items()})
    noisier = FakeHost()
    levels = noisier.noise_levels() * 2
    noisier.noise_levels = lambda: levels
    own_words = FakeHost()
    own_words.captions = [f"a bear {k}" for k in range(30)]
    trained_on_other_captions = a_trainer()
    trained_on_other_captions.statistics = measure(FakeHost(), captions(60))
    cases = {
        "the photos, or their order, are others": a_trainer(pictures=turned),
        "the masks are others": a_trainer(pictures=painted),
        "learned with number_of_photos 3, now 2": a_trainer(pictures=fewer),
        "the captions to train with are others": a_trainer(Subject("<bear>", "bear", ["my {}"])),
        "the captions in which the word is looked at are others": a_trainer(host=own_words),
        "the model is another": a_trainer(host=FakeHost(weights=1)),
        "the text encoder is another": a_trainer(host=FakeHost(weights=1)),
        "the model's noise levels are others": a_trainer(host=noisier),
        "measured on another corpus": trained_on_other_captions,
        "learned with prediction eps, now v": a_trainer(host=FakeHost("v")),
    }
    for told, trainer in cases.items():
        assert told in refusal(file, trainer)


def test_what_another_card_computes_is_still_the_same_training(file: Path) -> None:
    images, draw = photos(), torch.Generator().manual_seed(0)
    near = images.latents * (1 + 1e-3 * torch.randn(images.latents.shape, generator=draw))
    host = FakeHost()
    for layer in host.layers.values():
        layer["v"] = layer["v"] * (1 + 1e-3 * torch.randn(layer["v"].shape, generator=draw))
    trainer = a_trainer(host=host, pictures=other_photos(latents=near))
    restore(file, trainer)
    expected = after(2)
    assert all(torch.equal(tensor, expected.state()[name]) for name, tensor in trainer.state().items())


def test_steps_may_be_added_but_not_taken_away(file: Path) -> None:
    for steps in (2, 3, 100):
        restore(file, a_trainer(steps=steps))
    assert "a training of 2 steps already, and steps is 1: set steps to 2 or more" in refusal(file, a_trainer(steps=1))


def test_activations_may_be_computed_again(file: Path) -> None:
    restore(file, a_trainer(gradient_checkpointing=True))


def test_after_memory_ran_out_fewer_photos_may_be_computed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save(path, after(2), out_of_memory=True)
    trainer = a_trainer(micro_batch=1)
    restore(path, trainer)
    assert trainer.losses == after(2).losses
    assert "seed" in refusal(path, a_trainer(micro_batch=1, seed=1))
    save(path, after(2, micro_batch=2), out_of_memory=True)
    assert "learned with micro_batch 2, now 4" in refusal(path, a_trainer(micro_batch=4))
    assert "learned with micro_batch 2, now 0" in refusal(path, a_trainer(micro_batch=0))


# --- bad files


@examples(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_single_wrong_byte_is_noticed(file: Path, data: st.DataObject) -> None:
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    end = st.integers(0, 8 + header - 1) | st.integers(8 + header, len(content) - 1)
    position = data.draw(end)
    content[position] ^= data.draw(st.integers(1, 255))
    if content[position : position + 1].isspace() and file.read_bytes()[position : position + 1].isspace():
        return  # one blank for another behind the header
    damaged = file.with_name("damaged.safetensors")
    damaged.write_bytes(content)
    with pytest.raises(ResumeError, match="damaged.safetensors"):
        restore(damaged, TRAINER)


TRAINER = a_trainer()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: data[:5], "no .safetensors file"),
        (lambda data: data[:200], "is cut off"),
        (lambda data: data[:-1], "damaged or cut off"),
        (lambda data: data + b"0", "damaged or cut off"),
        (lambda data: b"PK\x03\x04" + data, "no .safetensors file"),
        (lambda data: b"\xff" * 64, "no .safetensors file"),
        (lambda data: (8).to_bytes(8, "little") + b"[" * 8, "not the state of a training"),
        (lambda data: data + bytes(checkpoint.MAX_FILE), "larger than 64 MiB"),
        (
            lambda data: data.replace(b'"perfusion.state":"1"', b'"perfusion.state":"2"'),
            "version 2, this version reads 1",
        ),
        (lambda data: data.replace(b"value_rate", b"value_ratf"), "not what its digest says"),
    ],
)
def test_damaged_and_foreign_files_are_refused_with_what_to_do(file: Path, change: Any, told: str) -> None:
    file.write_bytes(change(file.read_bytes()))
    message = refusal(file, a_trainer())
    assert told in message and "teddy.safetensors" in message and "away" in message


def test_other_safetensors_files_are_refused(file: Path) -> None:
    after(1).concept().save(file, overwrite=True)
    assert "not the state of a training" in refusal(file, a_trainer())
    save_file({"lora_up": torch.ones(3)}, file)
    assert "not the state of a training" in refusal(file, a_trainer())


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("trainer.i_star"),
        lambda tensors: tensors.update({"trainer.more": torch.ones(1)}),
        lambda tensors: tensors.update({"trainer.losses": torch.ones(2, 1, dtype=torch.float64)}),
        lambda tensors: tensors.update({"trainer.gates": torch.ones(3, dtype=torch.float64)}),
        lambda tensors: tensors.update({"trainer.i_star": torch.ones(3)}),
        lambda tensors: tensors.update({"trainer.d_star": torch.full((16,), torch.nan)}),
        lambda tensors: tensors.update({"trainer.generator": torch.zeros(8, dtype=torch.uint8)}),
        lambda tensors: tensors.update({"trainer.e_super": torch.ones(16, dtype=torch.float64)}),
    ],
)
def test_a_well_made_file_of_wrong_content_is_refused(file: Path, change: Any) -> None:
    """Its digest is right: somebody made it so."""
    tensors: dict[str, Tensor] = load_file(file)
    metadata, _ = checkpoint._read(file)
    change(tensors)
    metadata["perfusion.digest"] = checkpoint._content_digest(tensors, metadata)
    save_file(tensors, file, metadata)
    assert "is damaged" in refusal(file, a_trainer())


def test_a_file_that_is_not_there_is_the_callers_to_notice(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        restore(tmp_path / "nothing.safetensors", a_trainer())


# --- the trainer itself


def test_a_step_that_fails_never_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever in the step it is: the noise that was drawn is drawn again."""
    monkeypatch.setattr(trainer_module, "REFRESH", 3)
    trainer, reference = after(2), after(2)

    class Broken(Exception):
        pass

    def fail(*_: Any, **__: Any) -> Any:
        raise Broken

    for name in ("_draw", "_loss", "_follow"):
        with monkeypatch.context() as patch, pytest.raises(Broken):
            patch.setattr(trainer, name, fail)
            trainer.step()
        assert_same(trainer, reference)
    counted = trainer.host.encode

    def encode_later(prompts: Any, word: Any = None, **keywords: Any) -> Encodings:
        if len(prompts) > 4:  # the captions in which the word is looked at
            raise Broken
        return counted(prompts, word, **keywords)

    with monkeypatch.context() as patch, pytest.raises(Broken):
        patch.setattr(trainer.host, "encode", encode_later)
        trainer.step()
    assert_same(after(3, trainer), after(3, reference))


def test_gates_are_recorded_like_losses() -> None:
    trainer = a_trainer()
    reports = [trainer.step() for _ in range(3)]
    assert [report.gate for report in reports] == trainer.gates
    assert [report.loss for report in reports] == trainer.losses


# --- before anything is changed


def test_whether_a_file_fits_can_be_asked_without_using_it(file: Path) -> None:
    trainer = after(1)
    before = trainer.state()
    assert checkpoint.goes_on(file, trainer)
    assert not checkpoint.goes_on(file, a_trainer(seed=1))
    assert not checkpoint.goes_on(file, a_trainer(steps=1))
    assert not checkpoint.goes_on(file.with_name("nothing.safetensors"), trainer)
    file.write_bytes(file.read_bytes()[:300])
    assert not checkpoint.goes_on(file, trainer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.state().items())


def test_photos_are_known_by_their_last_bit() -> None:
    images = photos()
    assert checkpoint.photos_digest(images) == checkpoint.photos_digest(other_photos())
    nearly = images.latents * (1 + 1e-6)
    others = [other_photos(latents=nearly), other_photos(weights=images.weights.flip(-1))]
    assert len({checkpoint.photos_digest(each) for each in (images, *others)}) == 3


def test_photos_of_several_shapes_go_on_too(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(1)
    images = [torch.rand(*size, 3, generator=draw) for size in ((192, 320), (256, 256), (320, 192))]
    pictures = prepare(FakeHost(), images, None, 256, buckets=True)
    assert len(pictures.buckets) == 3
    path = tmp_path / "state.safetensors"
    save(path, after(2, pictures=pictures, batch_size=2))
    resumed = a_trainer(pictures=pictures, batch_size=2)
    restore(path, resumed)
    assert_same(after(3, resumed), after(5, pictures=pictures, batch_size=2))
    assert resumed.fixed_loss() == resumed.fixed_loss()
    assert "photos" in refusal(path, a_trainer(pictures=prepare(FakeHost(), images, None, 256), batch_size=2))
