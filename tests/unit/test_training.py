"""The trainer, on a whole host in miniature."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from perfusion.concept import Concept, PlaceholderError
from perfusion.corpus import captions_naming
from perfusion.hosts.base import Encodings
from perfusion.statistics import word_contexts
from perfusion.training import trainer as trainer_module
from perfusion.training.config import TrainingConfig
from perfusion.training.dataset import prepare
from perfusion.training.trainer import EMA, StepReport, Subject, Trainer, TrainingError, train
from tests.unit.fake_host import FakeHost
from tests.unit.small_training import BEAR, TWO_ENCODERS, a_trainer, other_photos, photos, settings, statistics

# Nothing moves: what is left is the gradient. Without any rate, keys would have none.
STILL: dict[str, Any] = {"value_rate": 0.0, "embedding_rate": 0.0, "key_rate": 1e-12}


def trained(subject: Subject = BEAR, host: FakeHost | None = None, **changes: Any) -> Concept:
    return train(host or FakeHost(), photos(), subject, statistics(), settings(**changes))[0]


def gradients(trainer: Trainer) -> list[Tensor]:
    return [parameter.grad for parameter in trainer._trained.values() if parameter.grad is not None]


# --- learning


@pytest.mark.parametrize("form", ["paper", "preserving"])
@pytest.mark.parametrize("estimator", ["paper", "robust"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_twenty_steps_lower_the_loss(form: str, estimator: str, prediction: Literal["eps", "v"]) -> None:
    trainer = a_trainer(host=FakeHost(prediction), form=form, estimator=estimator, vectors=2)
    before = trainer.fixed_loss()
    trainer.run()
    assert trainer.steps_done == len(trainer.losses) == 20
    assert trainer.fixed_loss() < 0.97 * before


@pytest.mark.parametrize(
    ("super_category", "means"),
    [
        ("bear", [[0]]),
        ("teddy bear", [[0, 1]]),
        ("toy grandfather", [[0, 1], [2]]),
        ("cat", [[0], [0], [0]]),
        ("teddy bear", [[0], [0], [1], [1]]),
    ],
)
def test_everything_starts_at_the_super_category(super_category: str, means: list[list[int]]) -> None:
    """Each vector of the word is the mean of some of the super-category's tokens."""
    host = FakeHost(encoders=TWO_ENCODERS)
    trainer = a_trainer(Subject("<it>", super_category), host, vectors=len(means))
    rows = host.token_embeddings(super_category)
    for name, found in trainer.embeddings.items():
        assert torch.allclose(found, torch.stack([rows[name][mean].mean(0) for mean in means]), atol=1e-6)
    plain = replace(trainer.word, embeddings=None)
    own = word_contexts(host, captions_naming("<it>", 16), plain, last_only=True).own
    assert torch.allclose(trainer.e_super, own.mean(0), atol=1e-6)
    for layer, values in trainer.o_star_v.items():
        assert torch.allclose(values[0], host.layers[layer]["v"] @ trainer.e_super, atol=1e-5)


@pytest.mark.parametrize("estimator", ["paper", "robust"])
@pytest.mark.parametrize("named", [0, 7, 8, 40])
def test_a_host_may_bring_captions_of_its_own(estimator: str, named: int) -> None:
    """The word is looked at in those that name the super-category, unless they are too few."""
    host = FakeHost()
    host.captions = [text for k in range(40) for text in (f"a bear {k}" if k < named else f"an owl {k}", f"a hat {k}")]
    plain = a_trainer(estimator=estimator)
    trainer = a_trainer(host=host, estimator=estimator)
    own = [f"a <bear> {k}" for k in range(named)]
    used = estimator == "robust" and named >= 8
    for count in (8, 16):
        assert trainer._contexts(count) == (own[:count] if used else plain._contexts(count))
    assert torch.equal(trainer.e_super, plain.e_super) is not used


@pytest.mark.parametrize("key_rate", [0.0, 0.05])
def test_only_the_word_its_target_values_and_its_key_are_trained(key_rate: float) -> None:
    host = FakeHost(encoders=TWO_ENCODERS)
    weights = [e.table for e in host.encoders.values()] + [w for layer in host.layers.values() for w in layer.values()]
    before = [w.clone() for w in weights]
    trainer = a_trainer(host=host, steps=3, key_rate=key_rate)
    locked = trainer.e_super.clone()
    start = {id(p): p.detach().clone() for p in trainer._trained.values()}
    groups = trainer._optimizer.param_groups
    assert {id(p) for group in groups for p in group["params"]} == set(start)
    assert sum(p.numel() for p in start.values()) == 12 + 6 + 12 + 20 + (18 if key_rate else 0)
    assert all(group["weight_decay"] == 0 for group in groups)
    trainer.run()
    for parameter in trainer._trained.values():
        assert parameter.dtype == torch.float32
        assert not torch.equal(parameter, start[id(parameter)])
    assert torch.equal(trainer.e_super, locked), "values stay anchored where the super-category was"
    concept = trainer.concept()
    assert (concept.e_key is not None) == bool(key_rate), "else keys stay where the super-category was"
    if concept.e_key is not None and trainer.e_key is not None:
        assert torch.equal(concept.e_key, trainer.e_key.detach()[0].half().float())
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(weights, before, strict=True))
    assert not any(t.requires_grad for t in (trainer.i_star, trainer.d_star, trainer.e_super))


def test_relative_rates_are_shares_of_each_tensors_size() -> None:
    host = FakeHost(encoders=TWO_ENCODERS)
    trainer = a_trainer(host=host, rates="relative", value_rate=0.1, embedding_rate=0.05, key_rate=0.02)
    rates = {id(group["params"][0]): group["lr"] for group in trainer._optimizer.param_groups}
    for name, rows in trainer.embeddings.items():
        assert rates[id(rows)] == pytest.approx(0.05 * float(host.encoders[name].table.std()))
    for values in trainer.o_star_v.values():
        assert rates[id(values)] == pytest.approx(0.1 * float(values.detach().square().mean().sqrt()))
    assert rates[id(trainer.e_key)] == pytest.approx(0.02 * float(trainer.e_super.square().mean().sqrt()))
    assert len(set(rates.values())) == 5


def test_absolute_rates_are_taken_as_they_are() -> None:
    trainer = a_trainer(rates="absolute", value_rate=0.03, embedding_rate=0.006, key_rate=0.002)
    assert [group["lr"] for group in trainer._optimizer.param_groups] == [0.006, 0.03, 0.03, 0.002]
    before = {layer: values.detach().clone() for layer, values in trainer.o_star_v.items()}
    trainer.step()
    for layer, values in trainer.o_star_v.items():
        assert float((values.detach() - before[layer]).abs().max()) == pytest.approx(0.03, rel=0.01)


# --- the same run again


def test_one_seed_gives_one_concept_and_another_seed_another() -> None:
    first, again, other = trained(steps=5), trained(steps=5), trained(steps=5, seed=1)
    assert first.digest == again.digest
    assert first.digest != other.digest


def test_the_callers_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    first = trained(steps=2).digest
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert trained(steps=2).digest == first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("estimator", ["paper", "robust"])
def test_looking_at_a_run_does_not_change_it(estimator: str) -> None:
    looks: list[float] = []

    def look(trainer: Trainer, report: StepReport) -> None:
        looks.append(trainer.fixed_loss())
        trainer.concept()

    host = FakeHost()
    watched, _ = train(host, photos(), BEAR, statistics(), settings(steps=4, estimator=estimator), [look])
    assert len(looks) == 4
    assert watched.digest == trained(steps=4, estimator=estimator).digest


@pytest.mark.parametrize("changes", [{}, {"vectors": 3}, {"estimator": "paper"}])
def test_size_of_micro_batches_does_not_matter(changes: dict[str, Any]) -> None:
    whole = a_trainer(micro_batch=0, **STILL, **changes)
    report = whole.step()
    for micro_batch in (1, 2, 3, 4, 9):
        parts = a_trainer(micro_batch=micro_batch, **STILL, **changes)
        found = parts.step()
        assert (found.loss, found.gate) == pytest.approx((report.loss, report.gate), rel=1e-5)
        assert torch.allclose(parts.i_star, whole.i_star, atol=1e-6)
        for a, b in zip(gradients(parts), gradients(whole), strict=True):
            assert float((a - b).abs().max()) < 1e-5 * float(b.abs().max())
        assert parts.fixed_loss() == pytest.approx(whole.fixed_loss(), rel=1e-5)


def test_micro_batches_lead_to_the_same_concept() -> None:
    whole, parts = trained(steps=5), trained(steps=5, micro_batch=1)
    for name, tensor in whole.tensors.items():
        assert torch.allclose(parts.tensors[name].float(), tensor.float(), rtol=2e-3, atol=1e-3), name


def test_gradient_checkpointing_changes_nothing() -> None:
    assert trained(steps=4, gradient_checkpointing=True).digest == trained(steps=4).digest


# --- the loss


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_loss_is_that_of_the_networks_own_target(prediction: Literal["eps", "v"]) -> None:
    """v = alpha noise - sigma' x0 at unit variance (Salimans and Ho 2022), weighted by the mask."""
    host = FakeHost(prediction)
    trainer = a_trainer(host=host, seed=5, timesteps="uniform", preservation=0.0, **STILL)
    batch = trainer._draw(4, torch.Generator().manual_seed(5))
    x0, weights = photos().pick(batch.photo, batch.flipped)
    sigma = host.noise_levels()[batch.level].view(-1, 1, 1, 1)
    alpha = 1 / (1 + sigma**2).sqrt()
    text = trainer._text([trainer.subject.prompts()[k] for k in batch.prompt], trainer.word)
    trainer._edit.tell_own(text.word)
    found = host.network(alpha * (x0 + sigma * batch.noise), text.context, trainer._edit).detach()
    target = batch.noise if prediction == "eps" else alpha * batch.noise - alpha * sigma * x0
    expected = (weights * (found - target).square()).mean()
    assert trainer.step().loss == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("timesteps", ["uniform", "lognormal"])
@pytest.mark.parametrize("scope", ["word", "prompt"])
def test_elsewhere_the_prediction_is_to_stay_that_of_the_super_category(scope: str, timesteps: str) -> None:
    host = FakeHost()
    settings_ = {"seed": 5, "scope": scope, "timesteps": timesteps, **STILL}
    alone = a_trainer(host=host, preservation=0.0, **settings_)
    trainer = a_trainer(host=host, preservation=3.0, **settings_)
    with torch.no_grad():
        for values in (*alone.o_star_v.values(), *trainer.o_star_v.values()):
            values += 2
    batch = trainer._draw(4, torch.Generator().manual_seed(5))
    x0, weights = photos().pick(batch.photo, batch.flipped)
    sigma = trainer._levels.sigmas[batch.level]
    spread = sigma.view(-1, 1, 1, 1)
    prompts = [trainer.subject.prompts()[k] for k in batch.prompt]
    text = trainer._text(prompts, trainer.word)
    trainer._edit.tell_own(text.word)
    noisy = x0 + spread * batch.noise
    found = host.denoise(noisy, sigma, text, trainer._edit).detach()
    plain = host.denoise(noisy, sigma, host.encode([prompt.replace("<bear>", "bear") for prompt in prompts]), None)
    counted = (found - plain) * trainer._levels.factor(spread, "eps") / spread
    drift = ((1 - weights / weights.amax((1, 2, 3), keepdim=True)) * counted.square()).mean()
    assert float(drift) > 1e-4
    assert trainer.step().loss - alone.step().loss == pytest.approx(3 * float(drift), rel=1e-3)


@pytest.mark.parametrize("size", [(64, 64), (70, 90), (302, 403)])
def test_where_all_of_the_photos_is_the_thing_there_is_nothing_to_preserve(size: tuple[int, int]) -> None:
    host = FakeHost()
    pictures = prepare(host, [torch.rand(*size, 3)], None, 64)
    trainer = a_trainer(host=host, pictures=pictures)
    host.calls = 0
    trainer.step()
    assert host.calls == 1


def test_draws_cover_photos_captions_and_noise_levels() -> None:
    trainer = a_trainer(timesteps="uniform")
    batch = trainer._draw(256, trainer.generator)
    assert set(batch.photo.tolist()) == {0, 1, 2}
    assert set(batch.prompt.tolist()) == set(range(len(BEAR.prompts())))
    assert batch.level.min() < 5
    assert batch.level.max() > 94
    assert 90 < batch.flipped.sum() < 166
    assert float(batch.noise.std()) == pytest.approx(1, abs=0.02)


def test_flip_off_never_mirrors() -> None:
    broken = other_photos(mirrored=torch.full_like(photos().mirrored, torch.nan))
    trainer = a_trainer(pictures=broken, flip=False, steps=10)
    trainer.run()
    with pytest.raises(TrainingError):
        a_trainer(pictures=broken, flip=True, steps=10).run()


# --- i* and d*


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[Encodings]:
    """The encodings of every batch trained on."""
    seen: list[Encodings] = []
    original = Trainer._loss

    def recorded(self: Trainer, batch: Any, text: Encodings) -> Tensor:
        seen.append(text)
        return original(self, batch, text)

    monkeypatch.setattr(Trainer, "_loss", recorded)
    return seen


def test_the_papers_target_input_is_a_moving_average(texts: list[Encodings]) -> None:
    trainer = a_trainer(estimator="paper")
    expected = trainer.i_star.clone()
    for _ in range(3):
        trainer.step()
        text = texts.pop()
        expected = 0.99 * expected + 0.01 * text.context[text.word].detach().mean(0)
        assert torch.allclose(trainer.i_star, expected, atol=1e-6)
        assert torch.equal(trainer.d_star, statistics().metric().dual(trainer.i_star))
        assert torch.equal(trainer._edit.directions.i_star[0], trainer.i_star)
    assert EMA == 0.99
    assert torch.equal(trainer.concept().i_star, trainer.i_star.half().float())


def test_the_robust_target_input_is_looked_up_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "REFRESH", 3)
    trainer = a_trainer(steps=7)
    seen = [trainer.i_star.clone()]
    while trainer.steps_done < 7:
        trainer.step()
        assert torch.equal(trainer._edit.directions.i_star[0], trainer.i_star)
        seen.append(trainer.i_star.clone())
    changed = [k for k in range(1, 8) if not torch.equal(seen[k], seen[k - 1])]
    assert changed == [3, 6]
    own = word_contexts(trainer.host, captions_naming("<bear>", 16), trainer.word).own
    assert torch.equal(trainer.concept().i_star, own.mean(0).half().float()), "the concept's is always the latest"


def test_gate_in_the_report_is_that_of_the_concepts_word(texts: list[Encodings]) -> None:
    trainer = a_trainer(**STILL)
    report = trainer.step()
    encoded = texts[0].context[texts[0].word].detach()
    r = encoded @ trainer.d_star / (trainer.i_star @ trainer.d_star)
    assert report.gate == pytest.approx(float(torch.sigmoid((r - 0.75) / 0.1).mean()), rel=1e-4)
    assert (report.step, report.steps, report.loss) == (1, 20, trainer.losses[0])


# --- stopping


class Stop(Exception):
    pass


def test_a_callback_may_stop_the_run_and_what_was_learned_is_kept() -> None:
    kept: list[Trainer] = []
    host = FakeHost()

    def stop(trainer: Trainer, report: StepReport) -> None:
        if report.step == 3:
            raise Stop

    with pytest.raises(Stop):
        train(host, photos(), BEAR, statistics(), settings(), [stop], kept.append)
    assert not host.in_training
    (trainer,) = kept
    assert trainer.steps_done == 3
    concept = trainer.concept({"stopped": True})
    assert (concept.training["steps_done"], concept.training["steps"], concept.training["stopped"]) == (3, 20, True)
    assert concept.digest == trained(steps=3).digest
    with host.training():
        assert trainer.run().digest == trained().digest, "a stopped run can go on as if nothing had happened"


def test_a_loss_that_is_no_number_stops_the_run_and_says_what_to_lower() -> None:
    host = FakeHost()
    trainer = a_trainer(host=host)
    trainer.step()
    before = trainer.concept().digest
    host.poison = True
    with pytest.raises(TrainingError, match="step 2 .*value_rate .*embedding_rate .*key_rate"):
        trainer.run()
    assert trainer.steps_done == 1
    assert trainer.concept().digest == before


def test_the_concept_says_how_it_was_trained() -> None:
    concept = trained(steps=2, form="preserving", seed=7)
    assert concept.training["photos"] == 3
    assert (concept.training["steps_done"], concept.training["seed"]) == (2, 7)
    assert (concept.form, concept.estimator, concept.placeholder) == ("preserving", "robust", "<bear>")
    assert concept.super_category == "bear"
    assert concept.created.endswith("Z")


# --- subjects


@pytest.mark.parametrize("super_category", ["", "  ", "!?", "..."])
def test_a_super_category_that_is_no_word_is_refused(super_category: str) -> None:
    with pytest.raises(TrainingError, match="no word for the text encoder"):
        a_trainer(Subject("<it>", super_category))


def test_captions_are_given_the_word() -> None:
    subject = Subject(" <My-Bear>", "bear", ["{} on a hill", "A photo of <MY-BEAR>", "{} beside {}"])
    assert subject.placeholder == "<my-bear>"
    assert subject.prompts() == ["<my-bear> on a hill", "A photo of <MY-BEAR>", "<my-bear> beside <my-bear>"]
    a_trainer(subject, steps=1).run()


def test_a_caption_without_the_word_is_given_it() -> None:
    subject = Subject("<it>", "bear", ["my bear on a hill", "on a hill"])
    assert subject.prompts() == ["my <it> on a hill", "<it>, on a hill"]


def test_each_photo_is_trained_with_its_own_captions() -> None:
    subject = Subject("<bear>", "bear", ["a photo of a {}"], ["a bear in a boat", "", "a {} asleep\non a chair"])
    trainer = a_trainer(subject, batch_size=64)
    seen: dict[int, set[str]] = {0: set(), 1: set(), 2: set()}
    batch = trainer._draw(64, trainer.generator)
    for photo, prompt in zip(batch.photo.tolist(), batch.prompt.tolist(), strict=True):
        seen[photo].add(trainer.captions.prompts[prompt])
    assert seen == {
        0: {"a <bear> in a boat"},
        1: {"a photo of a <bear>"},
        2: {"a <bear> asleep", "<bear>, on a chair"},
    }
    assert a_trainer(subject, steps=2).run().digest != a_trainer(steps=2).run().digest


def test_photos_of_several_shapes_are_drawn_in_batches_of_one() -> None:
    host, draw = FakeHost(), torch.Generator().manual_seed(1)
    images = [torch.rand(64, width, 3, generator=draw) for width in (64, 128, 64, 32)]
    pictures = prepare(host, images, None, 256, buckets=True)
    shapes = {tuple(bucket.latents.shape[-2:]) for bucket in pictures.buckets}
    assert len(shapes) == 3
    trainer = a_trainer(host=host, pictures=pictures, steps=6)
    drawn = {tuple(trainer._draw(4, trainer.generator).noise.shape[-2:]) for _ in range(40)}
    assert drawn == shapes
    trainer.run()


def test_the_network_is_told_how_large_photos_were() -> None:
    host = FakeHost()
    images = [torch.rand(48, 80, 3), torch.rand(100, 90, 3)]
    trainer = a_trainer(host=host, pictures=prepare(host, images, None, 64), batch_size=16, steps=1)
    trainer.step()
    assert host.told_sizes is not None and {tuple(size) for size in host.told_sizes.tolist()} == {(48, 48), (90, 90)}


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([], "no captions"),
        (["very " * 60 + "large {}"], "too long"),
    ],
)
def test_captions_without_the_word_are_refused(captions: list[str], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        a_trainer(Subject("<it>", "bear", captions)).step()


def test_an_ordinary_word_is_no_placeholder() -> None:
    with pytest.raises(PlaceholderError):
        Subject("bear", "bear")


# --- settings


@pytest.mark.parametrize(
    "setting",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"batch_size": 257},
        {"micro_batch": -1},
        {"resolution": 500},
        {"resolution": 0},
        {"resolution": 4096},
        {"value_rate": -0.1},
        {"embedding_rate": float("nan")},
        {"key_rate": -0.1},
        {"preservation": 101.0},
        {"preservation": float("nan")},
        {"temperature": 0.0},
        {"bias": float("inf")},
        {"contexts": 7},
        {"vectors": 0},
        {"vectors": 33},
        {"form": "baroque"},
        {"estimator": "oracle"},
        {"rates": "fast"},
    ],
)
def test_settings_out_of_range_are_named(setting: dict[str, Any]) -> None:
    ((name, _),) = setting.items()
    with pytest.raises(ValueError, match=f"{name} is .* must be"):
        TrainingConfig(**setting)


def test_every_setting_has_help() -> None:
    for setting in fields(TrainingConfig):
        assert len(TrainingConfig.help(setting.name)) > 15


def test_the_papers_setup() -> None:
    config = TrainingConfig.paper(steps=50)
    assert (config.rates, config.value_rate, config.embedding_rate) == ("absolute", 0.03, 0.006)
    assert (config.bias, config.temperature, config.batch_size) == (0.75, 0.1, 16)
    assert (config.form, config.estimator, config.steps) == ("paper", "paper", 50)
