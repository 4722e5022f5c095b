"""Words in prompts: what a CLIP with concepts makes of them, on the miniature text encoder."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch

from tests.concepts import CAT, TEDDY, Lab
from tests.models import EMBEDDING_VECTORS, MINIATURE_CONTEXT_DIM, Weights

pytestmark = [pytest.mark.comfyui, pytest.mark.usefixtures("nothing_left")]


@pytest.fixture(scope="module")
def teddy(lab: Lab) -> Any:
    return lab.concept(vectors=1)


@pytest.fixture(scope="module")
def cat(lab: Lab) -> Any:
    return lab.concept(CAT, "cat", seed=1, vectors=3)


@pytest.fixture(scope="module")
def clip(lab: Lab, teddy: Any, cat: Any) -> Any:
    return lab.applied(teddy, cat)[1]


def words(clip: Any, text: str, key: str = "l") -> list[list[Any]]:
    """Tokens of each chunk: ids, or (placeholder, place) where a concept's row stands."""
    return [[getattr(token, "perfusion_word", token) for token, *_ in chunk] for chunk in clip.tokenize(text)[key]]


def ids(clip: Any, text: str) -> list[int]:
    """Ids of a text, without start, end and padding."""
    (tokens,) = words(clip, text)
    return tokens[1 : tokens.index(49407)]


T, C = [(TEDDY, 0)], [(CAT, 0), (CAT, 1), (CAT, 2)]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (TEDDY, [T]),
        (f"{TEDDY} on the moon", [T, "on the moon"]),
        (f"a photo of a {TEDDY} on the moon", ["a photo of a", T, "on the moon"]),
        (f"a photo of a {TEDDY}", ["a photo of a", T]),
        (f"a {TEDDY} and a {TEDDY}", ["a", T, "and a", T]),
        ("A <MY-TEDDY> here, a <My-Teddy> there", ["a", T, "here, a", T, "there"]),
        (f"my{TEDDY}'s hat,{TEDDY}.", ["my", T, "'s hat,", T, "."]),
        (f"{TEDDY}{TEDDY}", [T, T]),
        (f"a {CAT} beside a {TEDDY}", ["a", C, "beside a", T]),
        (f"a {CAT}", ["a", C]),
        ("<my-teddy-2> <my-tedd> <my teddy>", ["<my-teddy-2> <my-tedd> <my teddy>"]),
        (f"line one\n{TEDDY}\nline two", ["line one", T, "line two"]),
        (f"\\(not a weight {TEDDY}\\)", ["(not a weight", T, ")"]),
    ],
)
def test_word_at_any_place(lab: Lab, clip: Any, text: str, parts: list[Any]) -> None:
    expected: list[Any] = []
    for part in parts:
        expected += ids(lab.clip, part) if isinstance(part, str) else part
    assert ids(clip, text) == expected


def test_rows_are_the_concepts(clip: Any, teddy: Any, cat: Any) -> None:
    rows = [token for token, _ in clip.tokenize(f"a {CAT} and a {TEDDY}")["l"][0] if isinstance(token, torch.Tensor)]
    assert torch.equal(torch.stack(rows), torch.cat([cat.embeddings["clip_l"], teddy.embeddings["clip_l"]]))


def test_prompt_weights(lab: Lab, clip: Any) -> None:
    tokens = clip.tokenize(f"a ({TEDDY}:1.3) and (a [{CAT}]:0.5)")["l"][0]
    weights = {getattr(token, "perfusion_word", (None,))[0]: weight for token, weight in tokens}
    assert weights[TEDDY] == pytest.approx(1.3)
    assert weights[CAT] == pytest.approx(0.5)
    plain, loud = lab.encode(clip, f"a {TEDDY}")[0][0], lab.encode(clip, f"a ({TEDDY}:1.3)")[0][0]
    empty = lab.encode(lab.clip, "")[0][0]
    assert torch.allclose(loud[:, 2], empty[:, 2] + 1.3 * (plain[:, 2] - empty[:, 2]), atol=1e-5)
    assert torch.allclose(loud[:, 1], plain[:, 1], atol=1e-5)


def test_prompt_weights_of_words_that_are_looked_at_more(lab: Lab) -> None:
    """The encoding is the host's, for whoever knows no better; with it comes what it is without, and the weight."""
    focused, plain = dataclasses.replace(lab.concept(), focus=20.0), lab.concept(CAT, "cat", seed=1)
    clip = lab.applied(focused, plain)[1]
    text = f"a ({TEDDY}:1.3) and a ({CAT}:1.3) on the (beach:0.7)"
    (context, extra), *_ = lab.encode(clip, text)
    (without, other), *_ = lab.encode(clip, text.replace(f"({TEDDY}:1.3)", TEDDY))
    empty = lab.encode(lab.clip, "")[0][0]
    assert torch.allclose(context[:, 2], empty[:, 2] + 1.3 * (without[:, 2] - empty[:, 2]), atol=1e-5)
    told, of_none = (each["model_conds"]["perfusion_weighed"].cond for each in (extra, other))
    assert told.shape == (1, 77, context.shape[-1] + 1)
    assert torch.allclose(context[:, 2] + told[:, 2, :-1], without[:, 2], atol=1e-5)
    assert told[..., :-1].abs().amax(-1).nonzero()[:, 1].tolist() == [2], "weights of all else are the host's"
    assert (told[0, :, -1] != 1).nonzero().flatten().tolist() == [2] and float(told[0, 2, -1]) == pytest.approx(1.3)
    # Nothing is looked at 0 times as much, or less.
    none = lab.encode(clip, f"a ({TEDDY}:0)")[0][1]["model_conds"]["perfusion_weighed"].cond
    for each in (of_none, none):
        assert not each[..., :-1].any() and (each[..., -1] == 1).all()
    assert "perfusion_weighed" not in lab.encode(lab.applied(plain)[1], text)[0][1].get("model_conds", {})


@pytest.mark.parametrize("scope", ["word", "prompt"])
def test_whoever_passes_on_the_encoding_alone_has_the_host_s_weights(lab: Lab, scope: str) -> None:
    """Many text nodes of others do, and joined conditionings tell nothing of their tokens."""
    focused = dataclasses.replace(lab.concept(), focus=20.0, scope=scope)
    model, clip = lab.applied(focused)
    pictures = []
    for text in (f"a ({TEDDY}:1.6) sits", f"a {TEDDY} sits"):
        alone = [[lab.encode(clip, text)[0][0], {}]]
        pictures.append(lab.sample(model, alone, lab.encode(clip, "blurry")))
    assert not torch.allclose(*pictures, atol=1e-3)


def test_prompts_of_other_weights_and_lengths_in_one_batch(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    model, clip = lab.applied(dataclasses.replace(lab.concept(), focus=20.0))
    long = lab.encode(clip, "a house by the sea and a boat, " * 9 + f" ({TEDDY}:1.6)")
    short, other = (lab.encode(clip, f"a ({TEDDY}:{weight}) sits") for weight in (0.4, 1.0))
    assert long[0][0].shape[1] > short[0][0].shape[1]
    network, batches = lab.model.model.diffusion_model, []
    forward = network._forward
    monkeypatch.setattr(
        network, "_forward", lambda x, *args, **kwargs: batches.append(len(x)) or forward(x, *args, **kwargs)
    )
    together, differing = lab.sample(model, long, short), lab.sample(model, long, other)
    monkeypatch.setattr(lab.model.model, "memory_required", lambda *_, **__: 1e30)
    apart = lab.sample(model, long, short)
    assert set(batches[: len(batches) // 2]) == {2} and batches[-1] == 1
    assert torch.allclose(together, apart, rtol=1e-4, atol=1e-3)
    assert not torch.allclose(together, differing, rtol=1e-2, atol=1e-2)


def test_beyond_the_first_chunk(lab: Lab, clip: Any) -> None:
    long = "an old house by the sea and a boat, " * 9
    first, second = words(clip, f"{long} {TEDDY} {CAT}")
    assert (TEDDY, 0) not in first
    assert [token for token in second if isinstance(token, tuple)] == [*T, *C]
    context = lab.encode(clip, f"{long} {TEDDY}")[0][0]
    assert context.shape[1] == 154
    assert not torch.equal(context[:, 77:], lab.encode(lab.clip, f"{long} teddy")[0][0][:, 77:])


@pytest.mark.parametrize("lock", ["local", "global"])
@pytest.mark.parametrize("before", [70, 71, 72, 73, 74, 75, 76])
def test_around_the_chunk_border(lab: Lab, teddy: Any, cat: Any, lock: str, before: int) -> None:
    """A word of several vectors, or a super-category of several tokens, where a chunk ends."""
    _, clip = lab.applied(teddy, cat, lock=lock)
    for word, count in ((TEDDY, 1), (CAT, 3)):
        text = "a " * before + word
        found = [token for chunk in words(clip, text) for token in chunk if isinstance(token, tuple)]
        assert found == [(word, k) for k in range(count)]
        (context, extra), *_ = lab.encode(clip, text)
        assert torch.isfinite(context).all()
        if lock == "global":
            shift = extra["model_conds"]["perfusion_key_shift"].cond
            assert shift.shape == context.shape
            assert torch.isfinite(shift).all()


@pytest.mark.parametrize("text", ["", "a photo of a teddy bear", "(a cat:1.4) and my-teddy", "a house, " * 60])
@pytest.mark.parametrize("lock", ["local", "global"])
def test_texts_without_words_encode_as_ever(lab: Lab, teddy: Any, cat: Any, text: str, lock: str) -> None:
    _, clip = lab.applied(teddy, cat, lock=lock)
    assert words(clip, text) == words(lab.clip, text)
    (ours, extra), *_ = lab.encode(clip, text)
    (stock, stock_extra), *_ = lab.encode(lab.clip, text)
    assert torch.equal(ours, stock)
    assert torch.equal(extra["pooled_output"], stock_extra["pooled_output"])
    if lock == "global":
        assert not extra["model_conds"]["perfusion_key_shift"].cond.any()


def test_stock_clip_is_not_taught(lab: Lab, clip: Any) -> None:
    lab.encode(clip, TEDDY)
    assert all(isinstance(token, int) for token in words(lab.clip, f"a {TEDDY}")[0])
    assert len(ids(lab.clip, TEDDY)) > 1


def test_words_survive_other_clip_nodes(lab: Lab, clip: Any, teddy: Any, cat: Any) -> None:
    text, nodes = f"a {CAT} and a {TEDDY}", lab.host.nodes
    expected = words(clip, text)
    _, with_lora = lab.with_lora(lab.model, clip, lab.lora())
    assert words(with_lora, text) == expected
    skipped = nodes["CLIPSetLastLayer"]().set_last_layer(clip, -2)[0]
    assert words(skipped, text) == expected
    plain, other, lora = (lab.encode(c, text)[0][0] for c in (clip, skipped, with_lora))
    assert not torch.equal(plain, other)
    assert not torch.equal(plain, lora)
    _, late = lab.apply(lab.model, nodes["CLIPSetLastLayer"]().set_last_layer(lab.clip, -2)[0], teddy, cat)
    assert torch.equal(lab.encode(late, text)[0][0], other)
    # Under global lock the twin goes through the same layer.
    _, local_then_global = lab.applied(cat, lock="global")
    deep = nodes["CLIPSetLastLayer"]().set_last_layer(local_then_global, -2)[0]
    (context, extra), *_ = lab.encode(deep, f"a {CAT}")
    shift = extra["model_conds"]["perfusion_key_shift"].cond
    stock = lab.encode(nodes["CLIPSetLastLayer"]().set_last_layer(lab.clip, -2)[0], "a cat")[0][0]
    assert torch.allclose((context + shift)[:, :2], stock[:, :2], atol=1e-5)


def test_next_to_embedding_words(lab: Lab, clip: Any, tmp_path: Any) -> None:
    weights = Weights(3, torch.float32)
    weights.draw("emb_params", EMBEDDING_VECTORS, MINIATURE_CONTEXT_DIM, std=0.02)
    weights.save(tmp_path / "moody.safetensors")
    clip = clip.clone()
    tokenizer = clip.tokenizer.clip_l
    before, tokenizer.embedding_directory = tokenizer.embedding_directory, [str(tmp_path)]
    try:
        for text in (f"a {TEDDY} embedding:moody {CAT} here", f"embedding:moody {TEDDY}, {CAT}"):
            tokens = [token for token, _ in clip.tokenize(text)["l"][0] if isinstance(token, torch.Tensor)]
            marks = [getattr(token, "perfusion_word", None) for token in tokens]
            assert marks.count(None) == EMBEDDING_VECTORS
            assert [mark for mark in marks if mark] == [*T, *C]
            assert torch.isfinite(lab.encode(clip, text)[0][0]).all()
    finally:
        tokenizer.embedding_directory = before


@pytest.mark.parametrize("vectors", [1, 2, 4])
@pytest.mark.parametrize("super_category", ["cat", "teddy bear", "small red toy house"])
def test_shift_leads_to_the_twin(lab: Lab, vectors: int, super_category: str) -> None:
    """Context + shift: every token reads the encoding of the prompt with the super-category, words aligned at ends."""
    _, clip = lab.applied(lab.concept("<it>", super_category, vectors=vectors, seed=4), lock="global")
    (context, extra), *_ = lab.encode(clip, "a photo of a <it> on the moon")
    there = context + extra["model_conds"]["perfusion_key_shift"].cond
    stock = lab.encode(lab.clip, f"a photo of a {super_category} on the moon")[0][0]
    count = len(ids(lab.clip, super_category))
    ends_here, ends_there = 5 + vectors, 5 + count
    assert torch.allclose(there[:, :5], stock[:, :5], atol=1e-5)
    assert torch.allclose(
        there[:, ends_here - 1 : ends_here + 20], stock[:, ends_there - 1 : ends_there + 20], atol=1e-5
    )


def with_scope(concept: Any, scope: str = "word") -> Any:
    return dataclasses.replace(concept, scope=scope)


@pytest.mark.parametrize("lock", ["local", "global"])
@pytest.mark.parametrize("weighted", [False, True])
def test_each_word_is_heard_by_its_own_tokens_alone(lab: Lab, lock: str, weighted: bool) -> None:
    teddy, cat = with_scope(lab.concept(super_category="toy")), with_scope(lab.concept(CAT, "cat", seed=1))

    def written(one: str, other: str) -> str:
        return f"a ({one}:1.4) and a {other} on the (beach:0.7)" if weighted else f"a {one} and a {other} on the beach"

    (context, extra), *_ = lab.encode(lab.applied(teddy, cat, lock=lock)[1], written(TEDDY, CAT))
    (plain, plain_extra), *_ = lab.encode(lab.clip, written("toy", "cat"))
    first = lab.encode(lab.applied(with_scope(teddy, "prompt"))[1], written(TEDDY, "cat"))[0][0]
    second = lab.encode(lab.applied(with_scope(cat, "prompt"))[1], written("toy", CAT))[0][0]
    others = [m for m in range(77) if m not in (2, 5)]
    assert torch.allclose(context[:, others], plain[:, others], atol=1e-5)
    assert torch.allclose(context[:, 2], first[:, 2], atol=1e-5) and torch.allclose(
        context[:, 5], second[:, 5], atol=1e-5
    )
    assert not torch.allclose(first[:, 3:20], plain[:, 3:20], atol=1e-2), "heard by all behind it, as in the paper"
    assert torch.allclose(extra["pooled_output"], plain_extra["pooled_output"], atol=1e-5)
    if lock == "global":
        shift = extra["model_conds"]["perfusion_key_shift"].cond
        assert torch.allclose(context + shift, plain, atol=1e-5)


@pytest.mark.parametrize("lock", ["local", "global"])
def test_scoped_words_beyond_the_first_chunk(lab: Lab, lock: str) -> None:
    long = "an old house by the sea and a boat, " * 9
    clip = lab.applied(with_scope(lab.concept(super_category="toy")), lock=lock)[1]
    context = lab.encode(clip, f"a {TEDDY} {long} {TEDDY}")[0][0]
    plain = lab.encode(lab.clip, f"a toy {long} toy")[0][0]
    changed = ((context - plain).abs().amax(-1) > 1e-4).nonzero()[:, 1].tolist()
    assert context.shape[1] == 154
    assert len(changed) == 2 and changed[0] == 2 and changed[1] > 77
    # A super-category of two tokens pushes one out of the full first chunk, but never its end.
    clip = lab.applied(with_scope(lab.concept(super_category="teddy bear")), lock=lock)[1]
    (context, extra), *_ = lab.encode(clip, f"a {TEDDY} {long}")
    (plain, plain_extra), *_ = lab.encode(lab.clip, f"a teddy bear {long}")
    assert torch.allclose(context[:, 3:75], plain[:, 4:76], atol=1e-5)
    assert torch.isfinite(extra["pooled_output"]).all()


@pytest.mark.parametrize("lock", ["local", "global"])
def test_texts_without_scoped_words_encode_as_ever(lab: Lab, lock: str) -> None:
    clip = lab.applied(with_scope(lab.concept()), with_scope(lab.concept(CAT, "cat", seed=1)), lock=lock)[1]
    (ours, extra), *_ = lab.encode(clip, "a photo of a teddy bear")
    (stock, stock_extra), *_ = lab.encode(lab.clip, "a photo of a teddy bear")
    assert torch.equal(ours, stock) and torch.equal(extra["pooled_output"], stock_extra["pooled_output"])


@pytest.mark.parametrize("skipped", [False, True])
def test_encoding_until_the_word_gives_the_same_tokens(lab: Lab, skipped: bool) -> None:
    text, word = lab.host.module("perfusion.hosts.comfyui.text"), lab.host.module("perfusion.hosts.base").Word
    clip = lab.host.nodes["CLIPSetLastLayer"]().set_last_layer(lab.clip, -2)[0] if skipped else lab.clip
    own = word(TEDDY, "teddy bear", lab.concept(vectors=2).embeddings)
    prompts = [f"a photo of a {TEDDY} on the beach", f"a {TEDDY}"]
    with torch.inference_mode():
        full, short = text.encode(clip, prompts, own), text.encode(clip, prompts, own, until_word=True)
    assert short.context.shape[1] == short.word.shape[1] == short.padding.shape[1] == 7
    assert torch.allclose(short.context, full.context[:, :7], atol=1e-5)
    assert torch.equal(short.word, full.word[:, :7])


def test_encoders_with_texts_of_their_own_are_left_alone(lab: Lab, sdxl: Any) -> None:
    """As the host's node for SDXL gives them: whose word a token is cannot be said of both at once."""
    text = lab.host.module("perfusion.hosts.comfyui.text")
    rows = {"clip_l": torch.randn(1, 32), "clip_g": torch.randn(1, 48)}
    stand_ins = {name: [text.marked(row.clone(), TEDDY, 0) for row in rows[name]] for name in rows}
    own = text.taught(sdxl, {TEDDY: stand_ins})
    stack = lab.stack(with_scope(lab.concept()))
    super_categories = {key: {TEDDY: text.ids_of(sdxl, f"clip_{key}", "teddy bear")} for key in ("l", "g")}
    same, other = own.tokenize_with_weights(f"a {TEDDY} sits"), own.tokenize_with_weights("")
    long = own.tokenize_with_weights(f"a {TEDDY} " + "and a house " * 24)
    with torch.inference_mode():
        encode = sdxl.cond_stage_model.encode_token_weights
        out, told = text._heard({"g": other["g"], "l": same["l"]}, stack, super_categories, encode)
        assert not told and torch.equal(out[0], encode({"g": other["g"], "l": same["l"]})[0])
        focused = lab.stack(dataclasses.replace(with_scope(lab.concept()), focus=20.0))
        loud, less = (
            own.tokenize_with_weights(f"a ({TEDDY}:1.3) sits"),
            own.tokenize_with_weights(f"a ({TEDDY}:.5) sits"),
        )
        for given, weight in ((loud, 1.3), ({"g": loud["g"], "l": less["l"]}, 1.0)):
            out, told = text._heard(given, focused, super_categories, encode)
            assert told[text.KEY_WEIGHED][0, 2, -1] == pytest.approx(weight), "both have to say the same"
            expected = encode(same)[0][:, 2] if weight != 1 else out[0][:, 2]
            assert torch.allclose(out[0][:, 2] + told[text.KEY_WEIGHED][:, 2, :-1], expected, atol=1e-4)
        for tokens, written in ((same, "a teddy bear sits"), (long, "a teddy bear " + "and a house " * 24)):
            out, told = text._heard(tokens, stack, super_categories, encode)
            assert text.KEY_WORDS in told
            stock = encode(sdxl.tokenize(written))
            assert torch.allclose(out[0][:, 3:70], stock[0][:, 4:71], atol=1e-5)
            if tokens is same:
                assert torch.allclose(out[1], stock[1], atol=1e-5), "pooled is the plain prompt's"
        # The end of the first chunk keeps its place, where the host reads what is pooled.
        twins, _ = text._twins(long, super_categories, frozenset({TEDDY}))
        assert all(chunks[0][-1] == long[key][0][-1] for key, chunks in twins.items())


def test_warning_for_prompts_without_the_word(lab: Lab, teddy: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model, clip = lab.applied(teddy)
        lab.draw(model, clip)
        assert "will not appear" not in caplog.text, "the word is there"
        model, clip = lab.applied(teddy)
        lab.draw(model, clip, "a photo of a teddy bear")
        lab.draw(model, clip, "a photo of a teddy bear")
        lab.draw(model, clip)
    assert caplog.text.count(f"{TEDDY} will not appear") == 2, "at each run that lacks the word, and at no other"


def test_a_low_weight_of_a_word_that_is_looked_at_more_shuts_no_gate(
    lab: Lab, teddy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a weight leaves the encoding, by which gates open, as it was learned."""
    with caplog.at_level(logging.WARNING):
        for focus in (20.0, 1.0):
            model, clip = lab.applied(dataclasses.replace(teddy, focus=focus))
            lab.draw(model, clip, f"a photo of a ({TEDDY}:0.2)")
            assert ("will not appear" in caplog.text) is (focus == 1)


def test_own_encoding_is_the_hosts(lab: Lab) -> None:
    text = lab.host.module("perfusion.hosts.comfyui.text")
    prompts = ["a photo of a cat", "two (red) chairs, by the sea", ""]
    with torch.inference_mode():
        encoded = text.encode(lab.clip, prompts)
        for prompt, context in zip(prompts, encoded.context, strict=True):
            escaped = prompt.replace("(", "\\(").replace(")", "\\)")
            stock = lab.clip.encode_from_tokens(lab.clip.tokenize(escaped))[0]
            assert torch.allclose(context, stock, atol=1e-6)
    assert encoded.padding.sum(1).tolist() == [77 - 2 - len(ids(lab.clip, p.replace("(", "\\("))) for p in prompts]


# --- two encoders ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl(lab: Lab) -> Any:
    """A CLIP as SDXL has it, 32 and 48 wide."""
    import comfy.sd
    import comfy.sdxl_clip
    import comfy.supported_models_base

    def config(width: int) -> dict[str, int]:
        return {
            "hidden_size": width,
            "intermediate_size": width * 2,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
        }

    torch.manual_seed(0)
    clip = comfy.sd.CLIP(
        comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
        model_options={"clip_l_model_config": config(32), "clip_g_model_config": config(48), "dtype": torch.float32},
    )
    generator = torch.Generator().manual_seed(7)
    for name, parameter in clip.cond_stage_model.named_parameters():
        scale = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = scale + 0.05 * torch.randn(parameter.shape, generator=generator)
    return clip


def test_two_encoders_are_taught_side_by_side(lab: Lab, sdxl: Any) -> None:
    text, word = lab.host.module("perfusion.hosts.comfyui.text"), lab.host.module("perfusion.hosts.base").Word
    structure = lab.host.module("perfusion.hosts.comfyui.structure")
    assert structure.encoder_widths(sdxl) == {"clip_l": 32, "clip_g": 48}
    with torch.inference_mode():
        encoded = text.encode(sdxl, ["a photo of a cat", "a lake"], pooled=True)
        for prompt, context, pooled in zip(
            ["a photo of a cat", "a lake"], encoded.context, encoded.pooled, strict=True
        ):
            stock, stock_pooled = sdxl.encode_from_tokens(sdxl.tokenize(prompt), return_pooled=True)
            assert torch.allclose(context, stock[0], atol=1e-5)
            assert torch.allclose(pooled, stock_pooled[0], atol=1e-5)
        assert encoded.context.shape == (2, 77, 80)
        rows = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 48)}
        taught = text.encode(sdxl, [f"a photo of a {TEDDY}"], word(TEDDY, "teddy bear", rows))
        assert taught.word[0].nonzero().flatten().tolist() == [5, 6]
        for part in (slice(0, 32), slice(32, 80)):
            change = (taught.context[0, :, part] - encoded.context[0, :, part]).abs().amax(-1)
            assert change[:5].max() < 1e-5 < change[5:].min()
        own = text.taught(sdxl, {TEDDY: {name: list(values) for name, values in rows.items()}})
        for key, name in (("l", "clip_l"), ("g", "clip_g")):
            tokens = [token for token, _ in own.tokenize_with_weights(f"a {TEDDY}")[key][0]]
            assert torch.equal(torch.stack([t for t in tokens if isinstance(t, torch.Tensor)]), rows[name])


def test_two_encoders_share_one_twin(lab: Lab, sdxl: Any) -> None:
    """Global lock: super-categories stand in both halves of the context."""
    text = lab.host.module("perfusion.hosts.comfyui.text")
    rows = {"clip_l": torch.randn(1, 32), "clip_g": torch.randn(1, 48)}
    stand_ins = {name: [text.marked(row.clone(), TEDDY, 0) for row in rows[name]] for name in rows}
    tokens = text.taught(sdxl, {TEDDY: stand_ins}).tokenize_with_weights(f"a {TEDDY} sits")
    super_categories = {key: {TEDDY: text.ids_of(sdxl, f"clip_{key}", "teddy bear")} for key in ("l", "g")}
    twins, index = text._twins(tokens, super_categories, frozenset({TEDDY}))
    with torch.inference_mode():
        there = sdxl.encode_from_tokens(twins)[:, index]
        stock = sdxl.encode_from_tokens(sdxl.tokenize("a teddy bear sits"))
    assert torch.allclose(there[:, :2], stock[:, :2], atol=1e-5)
    assert torch.allclose(there[:, 2:20], stock[:, 3:21], atol=1e-5)
