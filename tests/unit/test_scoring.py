"""Scores of concepts, on the host in miniature and encoders that know nothing but colors and words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from perfusion.concept import Concept
from perfusion.corpus import captions_naming
from perfusion.edit import Gate
from perfusion.hosts.base import Word
from perfusion.scope import ScopedText
from perfusion.stack import ConceptStack, ConceptUse
from perfusion.training.scoring import (
    Drawing,
    LossGateScorer,
    PictureScorer,
    Previewed,
    gate_openness,
    harmonic_mean,
    validation_prompts,
)
from perfusion.training.trainer import Subject, Trainer
from tests.unit.fake_host import FakeHost
from tests.unit.small_training import BEAR, a_trainer, photos

PROMPTS = ["a <bear> on a hill", "a <bear> and a hat", "my <bear>"]


class Colors:
    """Pictures by their mean color, texts by their number of letters; remembers what it was asked."""

    def __init__(self, knows_texts: bool = True):
        self.knows_texts = knows_texts
        self.asked: list[list[str]] = []
        self.seen: list[Tensor] = []

    def images(self, pictures: Tensor) -> Tensor:
        assert pictures.ndim == 4 and pictures.shape[-1] == 3
        assert pictures.min() >= 0 and pictures.max() <= 1
        self.seen.append(pictures)
        return normalize(pictures.mean((1, 2)) + 0.1, dim=-1)

    def texts(self, prompts: Sequence[str]) -> Tensor | None:
        self.asked.append(list(prompts))
        if not self.knows_texts:
            return None
        return normalize(torch.tensor([[1.0, len(prompt) % 5, len(prompt) % 3] for prompt in prompts]), dim=-1)


def some_photos() -> list[Tensor]:
    draw = torch.Generator().manual_seed(8)
    return [torch.rand(40, 24, 3, generator=draw) * tint for tint in (0.3, 0.9)]


def scorer_for(trainer: Trainer, similarity: Any = None, given_photos: Any = None, **changes: Any) -> PictureScorer:
    chosen = {"size": 64, "steps": 3, "guidance": 3.0, **changes}
    return PictureScorer(trainer.host, similarity or Colors(), given_photos, PROMPTS, **chosen)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@given(st.floats(-2, 2), st.floats(-2, 2))
def test_the_harmonic_mean_asks_for_both(a: float, b: float) -> None:
    mean = harmonic_mean(a, b)
    assert mean == harmonic_mean(b, a)
    assert 0 <= mean <= max(a, b, 0) * 1.001
    if min(a, b) <= 0:
        assert mean == 0
    elif min(a, b) > 1e-6:
        assert 1 / mean == pytest.approx((1 / a + 1 / b) / 2)


# --- pictures


def test_a_score_is_made_of_likeness_and_faithfulness() -> None:
    trainer, colors = a_trainer(), Colors()
    score, pictures = scorer_for(trainer, colors, some_photos())(trainer, trainer.concept(), 7)
    assert pictures.shape == (3, 64, 64, 3)
    own = normalize(pictures.mean((1, 2)) + 0.1, dim=-1)
    known = normalize(torch.stack([photo.mean((0, 1)) for photo in some_photos()]) + 0.1, dim=-1)
    asked = Colors().texts(["a bear on a hill", "a bear and a hat", "my bear"])
    assert asked is not None
    assert score.image == pytest.approx(float((own @ known.T).mean()), abs=1e-5)
    assert score.text == pytest.approx(float((own * asked).sum(1).mean()), abs=1e-5)
    assert score.image is not None and score.text is not None
    assert score.value == pytest.approx(harmonic_mean(score.image, score.text))
    assert (score.step, score.weak) == (7, False)


def test_prompts_are_compared_with_the_super_category_and_its_article() -> None:
    trainer, colors = a_trainer(Subject("<my-owl>", "owl")), Colors()
    prompts = ["a <my-owl> on a hill", "A <MY-OWL>!", "an owl beside the <my-owl>"]
    scorer = PictureScorer(trainer.host, colors, some_photos(), prompts, size=64, steps=1)
    scorer(trainer, trainer.concept(), 1)
    assert colors.asked[-1] == ["an owl on a hill", "An owl!", "an owl beside the owl"]
    scorer(trainer, trainer.concept(), 2)
    assert len(colors.asked) == 2, "texts are embedded once, after the question whether they can be"


def test_without_texts_it_refuses_and_says_what_to_connect() -> None:
    with pytest.raises(ValueError, match="connect the text encoder .* text projection"):
        scorer_for(a_trainer(), Colors(knows_texts=False))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch": 0}, {"size": 0}])
def test_it_refuses_nonsense(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        scorer_for(a_trainer(), **wrong)
    trainer = a_trainer()
    with pytest.raises(ValueError, match="no prompts"):
        PictureScorer(trainer.host, Colors(), some_photos(), [], size=64)
    with pytest.raises(ValueError, match="no photos"):
        scorer_for(trainer, given_photos=[])


def test_pictures_are_of_the_concept_and_of_nothing_else() -> None:
    """Neither of what the trainer has become since, nor of the batch, nor of the random state."""
    trainer = a_trainer()
    early, scorer = trainer.concept(), scorer_for(trainer)
    _, first = scorer(trainer, early, 0)
    for _ in range(3):
        trainer.step()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    _, again = scorer(trainer, early, 0)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(scorer_for(trainer, batch=1).draw(early), first, atol=1e-5)
    assert not torch.allclose(scorer.draw(trainer.concept()), first, atol=1e-3)
    assert not torch.allclose(scorer_for(trainer, seed=9).draw(early), first, atol=1e-3)
    assert not torch.allclose(scorer_for(trainer, guidance=1).draw(early), first, atol=1e-3)


def test_photos_are_decoded_from_what_training_sees_where_none_are_given() -> None:
    trainer, colors = a_trainer(), Colors()
    scorer = scorer_for(trainer, colors)
    score, pictures = scorer(trainer, trainer.concept(), 1)
    decoded = trainer.host.decode_latents(photos().latents)
    assert torch.equal(torch.cat(colors.seen[:3]), decoded)
    own, known = (normalize(p.mean((1, 2)) + 0.1, dim=-1) for p in (pictures, decoded))
    assert score.image == pytest.approx(float((own @ known.T).mean()), abs=1e-5)
    scorer(trainer, trainer.concept(), 2)
    assert len(colors.seen) == 3 + 2, "photos are looked at once"


def test_drawing_may_be_stopped_between_steps() -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    trainer = a_trainer()
    with pytest.raises(Stop):
        scorer_for(trainer, between=stop)(trainer, trainer.concept(), 1)


def test_scores_of_other_prompts_and_encoders_are_told_apart() -> None:
    trainer = a_trainer()
    prompts = PROMPTS[:2]
    identities = [
        scorer_for(trainer).identity,
        scorer_for(trainer, given_photos=some_photos()).identity,
        scorer_for(trainer, seed=1).identity,
        scorer_for(trainer, gate=Gate(bias=0.4)).identity,
        PictureScorer(trainer.host, Colors(), None, prompts, size=64, steps=3, guidance=3.0).identity,
        LossGateScorer(PROMPTS).identity,
        LossGateScorer(prompts).identity,
    ]
    assert len(set(identities)) == len(identities)
    assert scorer_for(trainer, batch=1).identity == identities[0]


@pytest.mark.parametrize("kind", ["pictures", "loss and gate"])
@pytest.mark.parametrize("estimator", ["robust", "paper"])
def test_training_does_not_notice_that_it_is_judged(kind: str, estimator: str) -> None:
    plain, judged = a_trainer(estimator=estimator), a_trainer(estimator=estimator)
    scorer = scorer_for(judged) if kind == "pictures" else LossGateScorer(PROMPTS, samples=5)
    for _ in range(4):
        plain.step()
        judged.step()
        before = judged.state()
        score, _ = scorer(judged, judged.concept(), judged.steps_done)
        assert same(judged.state(), before)
        assert not any(p.requires_grad for p in vars(score).values() if isinstance(p, Tensor))
    assert same(judged.state(), plain.state())
    assert judged.concept().digest == plain.concept().digest


# --- loss and gate


def test_what_was_learned_scores_more_than_what_was_not() -> None:
    trainer = a_trainer(steps=60)
    scorer = LossGateScorer(PROMPTS)
    values = []
    for _ in range(3):
        score, pictures = scorer(trainer, trainer.concept(), trainer.steps_done)
        assert pictures is None
        assert score.weak and score.image is None and score.text is None
        assert 0 <= score.value <= 1
        values.append(score.value)
        for _ in range(20):
            trainer.step()
    assert values == sorted(values) and values[0] < 0.1 < values[2]


def test_weaker_scores_are_made_of_loss_and_gate() -> None:
    trainer = a_trainer()
    for _ in range(20):
        trainer.step()
    concept, gate = trainer.concept(), Gate(bias=0.2, temperature=0.2)
    edit = ConceptStack((ConceptUse(concept, gate),)).edit()
    learned = trainer.loss_on(2, 32, Word("<bear>", "bear", concept.embeddings), edit)
    plain = trainer.loss_on(2, 32, Word("<bear>", "bear"), None)
    own, other = gate_openness(trainer.host, concept, PROMPTS, gate)
    assert learned < 0.9 * plain and 0.1 < other < 0.9
    score, _ = LossGateScorer(PROMPTS, gate=gate)(trainer, concept, 20)
    assert score.value == pytest.approx((1 - learned / plain) * own * (1 - other))


def test_a_gate_that_is_shut_or_open_everywhere_is_worth_nothing() -> None:
    trainer = a_trainer()
    for _ in range(20):
        trainer.step()
    concept = trainer.concept()
    values = {
        bias: LossGateScorer(PROMPTS, gate=Gate(bias=bias, temperature=0.05))(trainer, concept, 20)[0].value
        for bias in (-4.0, 0.6, 4.0)
    }
    assert values[0.6] > 0.1 > max(values[-4.0], values[4.0])


def test_the_loss_is_judged_on_noise_that_is_not_trained_on_nor_that_of_the_fixed_loss() -> None:
    trainer = a_trainer()
    drawn = [trainer._draw(4, torch.Generator().manual_seed(trainer.config.seed + draw)).noise for draw in range(3)]
    assert torch.equal(drawn[0], a_trainer()._draw(4, trainer.generator).noise)
    assert not any(torch.equal(a, b) for a, b in zip(drawn, drawn[1:] + drawn[:1], strict=True))
    plain = Word("<bear>", "bear")
    losses = [trainer.loss_on(draw, 6, plain, None) for draw in (2, 2, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert trainer.loss_on(2, 7, plain, None) == pytest.approx(
        a_trainer(micro_batch=2).loss_on(2, 7, plain, None), rel=1e-5
    )


def test_openness_is_that_of_the_word_and_of_the_other_word_that_opens_most() -> None:
    trainer = a_trainer(vectors=2)
    concept, gate = trainer.concept(), Gate(bias=0.3, temperature=0.2)
    own, other = gate_openness(trainer.host, concept, PROMPTS, gate)
    text = ScopedText(trainer.host, "word")(PROMPTS, Word("<bear>", "bear", concept.embeddings))
    r = text.context @ concept.d_star / (concept.i_star @ concept.d_star)
    g = torch.sigmoid((r - 0.3) / 0.2)
    expected = [(g[b][text.word[b]].mean(), g[b][~text.word[b] & ~text.padding[b]].max()) for b in range(3)]
    assert own == pytest.approx(float(torch.stack([a for a, _ in expected]).mean()), abs=1e-4)
    assert other == pytest.approx(float(torch.stack([b for _, b in expected]).mean()), abs=1e-4)


def test_weaker_scores_may_come_with_pictures_to_look_at() -> None:
    trainer = a_trainer()
    concept, weak = trainer.concept(), LossGateScorer(PROMPTS, samples=4)
    drawing = Drawing(trainer.host, PROMPTS[:2], size=64, steps=2)
    previewed = Previewed(weak, drawing)
    score, pictures = previewed(trainer, concept, 0)
    assert score == weak(trainer, concept, 0)[0]
    assert previewed.identity == weak.identity, "pictures that nobody judges change no score"
    assert torch.equal(pictures, drawing(concept)) and pictures.shape == (2, 64, 64, 3)


# --- prompts


@pytest.mark.parametrize("count", [1, 8, 16, 30])
def test_validation_prompts_are_varied_and_not_trained_on(count: int) -> None:
    prompts = validation_prompts(FakeHost(), BEAR, count)
    assert prompts == validation_prompts(FakeHost(), BEAR, count)
    assert len(set(prompts)) == count
    assert all(prompt.count("<bear>") == 1 for prompt in prompts)
    seen_in_training = {*BEAR.prompts(), *captions_naming("<bear>", 240)}
    assert not seen_in_training & set(prompts)


def test_a_prompt_that_is_trained_on_is_no_test() -> None:
    first = validation_prompts(FakeHost(), BEAR, 3)
    subject = replace(BEAR, captions=[first[1].replace("<bear>", "{}").upper(), first[2]])
    found = validation_prompts(FakeHost(), subject, 16)
    assert len(found) == 16
    assert found[0] == first[0] and not {first[1], first[2]} & set(found)


def test_they_are_in_the_words_that_the_encoders_know() -> None:
    places, others = ("beach", "moon", "forest", "road"), ("an owl", "a hat", "a red boat", "the sun")
    host = FakeHost()
    host.captions = [
        *("a cat by the sea" for _ in range(30)),
        *(f"a blue bear on the {place}" for place in places),
        *(f"{other} and a bear on the {place}" for place in places for other in others),
        "a bear " + "very " * 30 + "far away",
    ]
    prompts = validation_prompts(host, BEAR, 4)
    assert len(prompts) == 4
    for prompt in prompts:
        assert re.fullmatch(r"(an owl|a hat|a red boat|the sun) and a <bear> on the \w+", prompt), prompt
    assert {prompt.rsplit(" ", 1)[1] for prompt in prompts} == set(places)
    assert {prompt.split(" and ")[0] for prompt in prompts} == set(others)
    assert len(validation_prompts(host, BEAR, 18)) == 18, "colored ones where the others are too few"
    unknown = Subject("<it>", "dog")
    assert validation_prompts(host, unknown, 4) == validation_prompts(FakeHost(), unknown, 4)


def test_judging_needs_prompts() -> None:
    with pytest.raises(ValueError, match="no prompts"):
        LossGateScorer([])


def test_concepts_are_what_is_judged_also_without_their_trainer() -> None:
    """So that checkpoints of an earlier run can be judged again."""
    trainer = a_trainer()
    for _ in range(5):
        trainer.step()
    concept: Concept = trainer.concept()
    other = a_trainer()
    for scorer in (LossGateScorer(PROMPTS), scorer_for(trainer)):
        assert scorer(trainer, concept, 5)[0] == scorer(other, concept, 5)[0]
