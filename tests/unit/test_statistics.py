"""Second moments of text encodings, and the directions that are made of them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from perfusion.corpus import captions, captions_naming
from perfusion.edit import presence
from perfusion.hosts.base import Encodings, Word
from perfusion.statistics import (
    SecondMoment,
    TextStatistics,
    cached,
    directions,
    measure,
    token_weights,
    word_contexts,
)
from tests.unit.fake_host import LENGTH, FakeHost

CAPTIONS = captions(70)
FINGERPRINT = "f" * 64


def correlated(count: int, width: int = 12, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=draw, dtype=torch.float64)
    return torch.randn(count, width, generator=draw, dtype=torch.float64) @ mixing + 1


def moment_of(encodings: Tensor, weights: Tensor | None = None) -> SecondMoment:
    moment = SecondMoment(encodings.shape[-1])
    moment.update(encodings, weights)
    return moment


def statistics_of(encodings: Tensor, shrinkage: float | None = 0.0) -> TextStatistics:
    return TextStatistics.of(moment_of(encodings), len(encodings), FINGERPRINT, shrinkage)


# --- the second moment


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.booleans())
def test_streaming_is_one_shot(sizes: list[int], weighted: bool) -> None:
    e = correlated(sum(sizes))
    w = torch.linspace(0.1, 2, len(e), dtype=torch.float64) if weighted else None
    streamed = SecondMoment(12)
    for k, part in enumerate(e.split(sizes)):
        streamed.update(part, None if w is None else w.split(sizes)[k])
    whole = moment_of(e, w)
    weights = torch.ones(len(e), dtype=torch.float64) if w is None else w
    expected = sum(weight * torch.outer(row, row) for weight, row in zip(weights, e, strict=True)) / weights.sum()
    assert torch.allclose(streamed.matrix, expected)
    assert torch.allclose(whole.matrix, expected)
    assert streamed.shrinkage() == pytest.approx(whole.shrinkage())
    assert streamed.count == whole.count == len(e)


def test_a_weight_is_a_repetition() -> None:
    e = correlated(5)
    repeated = moment_of(e.repeat_interleave(torch.tensor([1, 2, 3, 1, 0]), dim=0))
    assert torch.allclose(moment_of(e, torch.tensor([1.0, 2, 3, 1, 0])).matrix, repeated.matrix)
    weights = torch.linspace(0.1, 2, 5, dtype=torch.float64)
    assert moment_of(e, 3 * weights).shrinkage() == pytest.approx(moment_of(e, weights).shrinkage())


def test_half_precision_is_summed_in_double() -> None:
    e = torch.full((3000, 2), 0.1, dtype=torch.float16)
    moment = moment_of(e)
    assert moment.matrix.dtype == torch.float64
    assert moment.matrix[0, 1] == pytest.approx(float(e[0, 0]) ** 2, rel=1e-12)


def test_nothing_added_has_no_matrix() -> None:
    with pytest.raises(ValueError, match="no text encodings"):
        _ = SecondMoment(3).matrix


def test_all_encodings_count_d_in_the_metric() -> None:
    """The check of any C: the mean of e^T C^-1 e over its own tokens is d."""
    host = FakeHost()
    found = measure(host, CAPTIONS, shrinkage=0.0)
    encodings = host.encode(CAPTIONS)
    weights = token_weights(encodings).double()
    e = encodings.context.double()
    energy = (e * torch.cholesky_solve(e.flatten(0, 1).mT, found.metric().factor).mT.view_as(e)).sum(-1)
    assert float((energy * weights).sum() / weights.sum()) == pytest.approx(16, rel=1e-9)
    assert found.tokens == len(CAPTIONS) * LENGTH
    assert (found.captions, found.shrinkage, found.fingerprint) == (len(CAPTIONS), 0, host.fingerprint)


# --- shrinkage


def test_shrinkage_is_ledoit_and_wolfs() -> None:
    e = correlated(40)
    c = e.T @ e / 40
    noise = sum(float((torch.outer(row, row) - c).square().sum()) for row in e) / 40**2
    spread = float((c - c.trace() / 12 * torch.eye(12)).square().sum())
    assert moment_of(e).shrinkage() == pytest.approx(noise / spread)


def test_shrinkage_fades_with_samples_and_helps() -> None:
    truth = correlated(200_000)
    truth = truth.T @ truth / len(truth)
    found = [statistics_of(correlated(n, seed=0)[:n], None) for n in (10, 100, 1000, 10_000)]
    shrinkages = [s.shrinkage for s in found]
    assert shrinkages == sorted(shrinkages, reverse=True)
    assert shrinkages[-1] < 0.01 < shrinkages[0]
    errors = [
        [float((statistics_of(correlated(10, seed=k)[:10], s).c - _second_moment(k)).square().sum()) for k in range(40)]
        for s in (None, 0.0)
    ]
    assert sum(errors[0]) < sum(errors[1])


def _second_moment(seed: int) -> Tensor:
    mixing = torch.randn(12, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return mixing.T @ mixing + 1


@given(st.integers(1, 30), st.integers(1, 8), st.floats(1e-4, 1e4), st.integers(0, 5))
def test_shrinkage_is_a_share(count: int, width: int, scale: float, seed: int) -> None:
    e = correlated(count, width, seed)
    share = moment_of(e * scale).shrinkage()
    assert 0 <= share <= 1
    assert share == pytest.approx(moment_of(e).shrinkage(), rel=1e-3, abs=1e-6)


def test_shrinkage_keeps_the_mean_eigenvalue() -> None:
    e = correlated(20)
    plain, shrunk, whole = (statistics_of(e, s).c for s in (0.0, 0.3, 1.0))
    assert shrunk.trace() == pytest.approx(float(plain.trace()))
    assert torch.allclose(shrunk - torch.diag(shrunk.diagonal()), 0.7 * (plain - torch.diag(plain.diagonal())))
    assert torch.allclose(whole, plain.trace() / 12 * torch.eye(12, dtype=torch.float64))


# --- the metric


def test_dual_vector_solves_the_metric() -> None:
    found = statistics_of(correlated(100))
    i_star = correlated(1, seed=1)[0].float()
    d_star = found.metric().dual(i_star)
    assert d_star.dtype == torch.float32
    assert float(d_star.abs().max()) == 1
    back = found.c @ d_star.double()
    assert torch.allclose(back / back.norm(), i_star.double() / i_star.double().norm(), atol=1e-5)


def test_a_second_moment_that_cannot_be_inverted_is_refused() -> None:
    few = statistics_of(correlated(5))
    assert few.condition_number > 1e10
    with pytest.raises(ValueError, match=r"condition number .* more captions \(it saw 5\) or more shrinkage"):
        few.metric()
    statistics_of(correlated(5), 0.1).metric()
    few.metric(within=torch.eye(12, dtype=torch.float64))


def test_condition_number_is_the_ratio_of_extremes() -> None:
    statistics = replace(statistics_of(correlated(20)), c=torch.diag(torch.tensor([8.0, 2.0, 4.0]).double()))
    assert statistics.condition_number == pytest.approx(4)


# --- padding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_padding_counts_as_one_token(dtype: torch.dtype) -> None:
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [0] * 6]).bool()
    found = token_weights(Encodings(torch.zeros(3, 6, 4, dtype=dtype), torch.zeros_like(padding), padding))
    assert found.tolist() == [[1, 1, 0.25, 0.25, 0.25, 0.25], [1] * 6, [1] * 6]


def test_padding_does_not_drown_the_words() -> None:
    host = FakeHost()
    encodings = host.encode(["a cat"])
    e = encodings.context[0].double()
    words, padding = e[~encodings.padding[0]], e[encodings.padding[0]]
    expected = (words.T @ words + padding.T @ padding / len(padding)) / (len(words) + 1)
    found = measure(host, ["a cat"], shrinkage=0.0).c
    assert torch.allclose(found, expected)


# --- measuring and its cache


def test_measure_reports_progress_and_can_be_cancelled() -> None:
    host, seen = FakeHost(), []
    measure(host, CAPTIONS, lambda done, total: seen.append((done, total)))
    assert seen == [(32, 70), (64, 70), (70, 70)]

    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(host, CAPTIONS, cancel)
    with pytest.raises(ValueError, match="one caption a line"):
        measure(host, [])


class Counting(FakeHost):
    """Counts calls of ``encode``."""

    encoded = 0

    def encode(self, *args: Any, **keywords: Any) -> Encodings:
        self.encoded += 1
        return super().encode(*args, **keywords)


def test_cache_is_used_for_the_same_encoder_and_captions_only(tmp_path: Path) -> None:
    first = cached(Counting(), CAPTIONS, tmp_path / "new" / "folder")
    again = Counting()
    found = cached(again, CAPTIONS, tmp_path / "new" / "folder")
    assert again.encoded == 0
    assert replace(found, c=first.c) == first
    for host, texts in ((Counting(weights=1), CAPTIONS), (Counting(), CAPTIONS[:-1])):
        measured = cached(host, texts, tmp_path / "new" / "folder")
        assert host.encoded > 0
        assert torch.equal(measured.c, measure(host, texts).c)
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 3


def test_a_cached_second_moment_is_the_measured_one_to_the_last_bit(tmp_path: Path) -> None:
    """Else the first training of a model and the second would differ."""
    measured = cached(FakeHost(), CAPTIONS, tmp_path)
    assert torch.equal(cached(FakeHost(), CAPTIONS, tmp_path).c, measured.c)
    assert torch.equal(cached(FakeHost(), CAPTIONS, None).c, measured.c)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _damage_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[9] ^= 0xFF
    path.write_bytes(data)


def _rewrite(**changes: Any) -> Callable[[Path], None]:
    def rewrite(path: Path) -> None:
        metadata = {
            "perfusion.statistics": "1",
            "tokens": "9",
            "captions": "9",
            "shrinkage": "0.0",
            "fingerprint": FakeHost().fingerprint,
        }
        tensors = {changes.get("name", "c"): changes.get("c", torch.eye(16))}
        save_file(tensors, path, {**metadata, **changes.get("metadata", {})})

    return rewrite


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(_cut, id="cut off"),
        pytest.param(_damage_header, id="damaged header"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_text("no statistics"), id="text"),
        pytest.param(_rewrite(metadata={"fingerprint": "0"}), id="other encoder"),
        pytest.param(_rewrite(metadata={"perfusion.statistics": "0"}), id="other format"),
        pytest.param(_rewrite(metadata={"tokens": "many"}), id="no number"),
        pytest.param(_rewrite(name="d"), id="other tensor"),
        pytest.param(_rewrite(c=torch.full((16, 16), torch.nan)), id="not finite"),
        pytest.param(_rewrite(c=torch.eye(12)), id="other width"),
        pytest.param(_rewrite(c=torch.ones(16, 12)), id="not square"),
        pytest.param(_rewrite(c=torch.ones(16)), id="a vector"),
    ],
)
def test_an_unusable_cache_is_measured_anew_and_rewritten(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    good = cached(FakeHost(), CAPTIONS, tmp_path)
    (path,) = tmp_path.iterdir()
    spoil(path)
    host = Counting()
    assert torch.equal(cached(host, CAPTIONS, tmp_path).c, good.c)
    assert host.encoded > 0
    rewritten = TextStatistics.load(path, host.fingerprint)
    assert rewritten is not None
    assert torch.equal(rewritten.c, good.c)
    assert list(tmp_path.iterdir()) == [path]


def test_the_rewriter_of_these_tests_can_write_a_good_cache(tmp_path: Path) -> None:
    _rewrite()(tmp_path / "good")
    found = TextStatistics.load(tmp_path / "good", FakeHost().fingerprint)
    assert found is not None
    assert torch.equal(found.c, torch.eye(16, dtype=torch.float64))


@given(st.floats(0, 1, exclude_max=True))
def test_a_cache_cut_anywhere_is_no_cache(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    path = tmp_path_factory.mktemp("cache") / "c.safetensors"
    statistics_of(correlated(20)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert TextStatistics.load(path, FINGERPRINT) is None


def test_no_cache_at_all(tmp_path: Path) -> None:
    assert TextStatistics.load(tmp_path / "missing", FINGERPRINT) is None
    assert TextStatistics.load(tmp_path, FINGERPRINT) is None


@pytest.mark.parametrize("why", ["no folder", "disk full"])
def test_an_unwritable_folder_costs_only_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    folder = tmp_path
    if why == "no folder":
        (tmp_path / "file").touch()
        folder = tmp_path / "file"
    else:

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
    found = cached(FakeHost(), CAPTIONS, folder)
    assert torch.equal(found.c, measure(FakeHost(), CAPTIONS).c)
    assert "measured again" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == (["file"] if why == "no folder" else [])


# --- a word's encodings and directions


@pytest.mark.parametrize(("super_category", "tokens"), [("cat", 1), ("teddy bear", 2), ("toy grandfather", 3)])
def test_word_encodings_are_those_of_the_words_own_tokens(super_category: str, tokens: int) -> None:
    host = FakeHost()
    word = Word("<it>", super_category)
    texts = captions_naming("<it>", 40)
    found = word_contexts(host, texts, word).own
    assert found.shape == (40 * tokens, 16)
    assert torch.equal(word_contexts(host, texts, word, last_only=True).own, found[tokens - 1 :: tokens])
    spelled = host.encode([texts[3].lower().replace("<it>", super_category)]).context[0]
    at = [int((spelled - row).abs().sum(-1).argmin()) for row in found[3 * tokens : 4 * tokens]]
    assert at == list(range(at[0], at[0] + tokens))
    assert torch.allclose(spelled[at], found[3 * tokens : 4 * tokens], atol=1e-5)


def test_what_lies_behind_a_word_is_all_that_has_seen_it() -> None:
    host, word = FakeHost(), Word("<it>", "teddy bear")
    texts = ["a photo of <it> on the moon", "<it> in a room"]
    own, behind = word_contexts(host, texts, word)
    moment = SecondMoment(16)
    for row in range(2):
        encodings = host.encode(texts[row : row + 1], word)
        last = int(encodings.word[0].nonzero()[-1])
        rest, padding = encodings.context[0, last + 1 :], encodings.padding[0, last + 1 :]
        assert padding.any() and not padding.all()
        # All padding of a caption counts as one token.
        moment.update(rest, torch.where(padding, 1 / padding.sum(), 1.0))
    assert torch.allclose(behind, moment.matrix, atol=1e-6)


def test_a_robust_gate_stays_shut_on_what_the_word_leaves_behind() -> None:
    """Tokens behind a strong word hold as much of it as the word itself, beside what is their own."""
    draw = torch.Generator().manual_seed(6)
    width = 32
    others = torch.randn(20_000, width, generator=draw) + 0.5
    core, trace = 3 * torch.randn(2, width, generator=draw)
    own = core + trace + 0.3 * torch.randn(240, width, generator=draw)
    left = trace + torch.randn(2000, width, generator=draw) + 0.5
    statistics, behind = statistics_of(others), SecondMoment(width)
    behind.update(left[:1000])

    def r(e: Tensor, pair: tuple[Tensor, Tensor]) -> Tensor:
        return presence(e, pair[0].unsqueeze(0), pair[1].unsqueeze(0))

    without, within = (directions(own, statistics, "robust", some) for some in (None, behind.matrix))
    assert float(r(left[1000:], without).mean()) > 0.3
    assert float(r(left[1000:], within).mean()) < 0.1
    assert float(r(own, within).min()) > 0.8


def test_word_encodings_carry_no_gradient_and_want_the_word() -> None:
    host = FakeHost()
    rows = {"clip_l": torch.zeros(2, 16, requires_grad=True)}
    found = word_contexts(host, ["a photo of <it>"], Word("<it>", "cat", rows)).own
    assert found.shape == (2, 16)
    assert not found.requires_grad
    for texts in ([], ["a photo of a cat"]):
        with pytest.raises(ValueError, match="none of the captions contains <it>"):
            word_contexts(host, texts, Word("<it>", "cat"))


def test_directions_are_their_formulas() -> None:
    statistics = statistics_of(correlated(200))
    e = correlated(30, seed=3)
    i_star, d_star = directions(e.float(), statistics, "paper")
    assert torch.allclose(i_star.double(), e.mean(0), atol=1e-5)
    assert torch.equal(d_star, statistics.metric().dual(e.float().double().mean(0)))
    _, robust = directions(e.float(), statistics, "robust")
    within = torch.cov(e.float().double().T)
    expected = torch.linalg.solve(statistics.c + within, e.mean(0))
    assert torch.allclose(robust.double(), expected / expected.abs().max(), atol=1e-4)
    behind = correlated(50, seed=4).T @ correlated(50, seed=4) / 50
    _, robust = directions(e.float(), statistics, "robust", behind)
    expected = torch.linalg.solve(statistics.c + within + behind, e.mean(0))
    assert torch.allclose(robust.double(), expected / expected.abs().max(), atol=1e-4)
    assert torch.equal(directions(e.float(), statistics, "paper", behind)[1], d_star)
    one = directions(e[:1].float(), statistics, "robust")
    assert torch.equal(one[1], directions(e[:1].float(), statistics, "paper")[1])


def test_robust_gates_open_where_the_papers_stay_shut() -> None:
    """A word whose encoding changes a lot with its context, in directions in which other words hardly differ.

    The paper's few short templates show one context; in that direction C^-1 is large, and elsewhere r is noise.
    """
    draw = torch.Generator().manual_seed(5)
    width, moving = 32, 6
    spread = torch.ones(width)
    spread[:moving] = 0.3
    others = torch.randn(20_000, width, generator=draw) * spread + 0.5
    core = torch.randn(width, generator=draw)

    def in_contexts(count: int, context: Tensor | None = None) -> Tensor:
        e = core.repeat(count, 1) + 0.1 * torch.randn(count, width, generator=draw)
        e[:, :moving] += torch.randn(count, moving, generator=draw) if context is None else context
        return e

    statistics = statistics_of(others)
    paper = directions(in_contexts(8, torch.randn(moving, generator=draw)), statistics, "paper")
    robust = directions(in_contexts(240), statistics, "robust")
    held_out = in_contexts(1000)

    def share_above(limit: float, e: Tensor, pair: tuple[Tensor, Tensor]) -> float:
        r = presence(e, pair[0].unsqueeze(0), pair[1].unsqueeze(0))
        return float((r > limit).float().mean())

    opens, false_opens = share_above(0.6, held_out, robust), share_above(0.5, others, robust)
    assert opens > 0.97
    assert false_opens < 0.02
    assert share_above(0.6, held_out, paper) < 0.7


def test_robust_gates_open_on_other_captions_than_they_were_made_of() -> None:
    host = FakeHost()
    statistics = measure(host, captions(300))
    word = Word("<it>", "teddy bear")
    held_out = word_contexts(host, captions_naming("<it>", 100, seed=9), word, last_only=True).own
    seen = word_contexts(host, captions_naming("<it>", 240), word, last_only=True).own
    i_star, d_star = directions(seen, statistics, "robust")
    r = presence(held_out, i_star.unsqueeze(0), d_star.unsqueeze(0))
    assert float((r > 0.6).float().mean()) > 0.95
