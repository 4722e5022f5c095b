"""Concepts and their files: what is kept, what is refused, and that nothing of a user is ever lost."""

from __future__ import annotations

import errno
import json
import os
import pickle
import stat
import struct
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from perfusion.__main__ import info
from perfusion.concept import (
    FORMATS,
    MAX_HEADER,
    MAX_THUMBNAIL,
    MAX_VECTORS,
    Concept,
    ConceptFileError,
    PlaceholderError,
    check_placeholder,
    file_stem,
    load,
    read_header,
)
from perfusion.family import Family

SD1 = Family(
    "sd1",
    768,
    {"clip_l": 768},
    {
        **{f"input_blocks.{n}.1": (1, 320) for n in (1, 2)},
        **{f"input_blocks.{n}.1": (1, 640) for n in (4, 5)},
        **{f"input_blocks.{n}.1": (1, 1280) for n in (7, 8)},
        "middle_block.1": (1, 1280),
        **{f"output_blocks.{n}.1": (1, 1280) for n in (3, 4, 5)},
        **{f"output_blocks.{n}.1": (1, 640) for n in (6, 7, 8)},
        **{f"output_blocks.{n}.1": (1, 320) for n in (9, 10, 11)},
    },
)
SD2 = Family("sd2", 1024, {"clip_h": 1024}, SD1.transformers)
SDXL = Family(
    "sdxl",
    2048,
    {"clip_l": 768, "clip_g": 1280},
    {
        **{f"input_blocks.{n}.1": (2, 640) for n in (4, 5)},
        **{f"input_blocks.{n}.1": (10, 1280) for n in (7, 8)},
        "middle_block.1": (10, 1280),
        **{f"output_blocks.{n}.1": (10, 1280) for n in (0, 1, 2)},
        **{f"output_blocks.{n}.1": (2, 640) for n in (3, 4, 5)},
    },
)
SMALL = Family("small", 6, {"clip_l": 4, "clip_g": 2}, {"input_blocks.1.1": (2, 3), "middle_block.1": (1, 5)})


def a_concept(family: Family = SMALL, vectors: int = 1, seed: int = 0, **changes: Any) -> Concept:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    i_star = normal(family.context_width)
    fields = {
        "family": family,
        "placeholder": "<my-teddy>",
        "super_category": "teddy bear",
        "embeddings": {name: normal(vectors, width) for name, width in family.encoders.items()},
        "i_star": i_star,
        "d_star": i_star / i_star.abs().max(),
        "e_super": normal(family.context_width),
        "o_star_v": {layer: normal(width) for layer, width in family.layers.items()},
        "training": {"steps": 200, "resolution": 512, "seed": 0},
        "created": "2024-05-06T07:08:09Z",
    }
    return Concept.rounded(**{**fields, **changes})


def same(a: Concept, b: Concept) -> bool:
    """Equal in everything, to the last bit."""
    in_memory = [
        [
            c.i_star,
            c.d_star,
            c.e_super,
            *([] if c.e_key is None else [c.e_key]),
            *(c.embeddings[name] for name in SMALL.encoders if name in c.embeddings),
        ]
        + list(c.o_star_v.values())
        for c in (a, b)
    ]
    exact = all(torch.equal(one, other) for one, other in zip(*in_memory, strict=True))
    return exact and a.metadata == b.metadata and a.family == b.family


# --- round trips


@pytest.mark.parametrize("form", ["paper", "preserving"])
@pytest.mark.parametrize("estimator", ["paper", "robust"])
@pytest.mark.parametrize("vectors", [1, 3, MAX_VECTORS])
def test_round_trip(tmp_path: Path, form: str, estimator: str, vectors: int) -> None:
    concept = a_concept(vectors=vectors, form=form, estimator=estimator)
    found = load(concept.save(tmp_path / "new" / "it.safetensors"))
    assert same(found, concept)
    assert found.digest == concept.digest
    assert (found.form, found.estimator, found.training) == (form, estimator, dict(concept.training))
    assert list(found.o_star_v) == list(SMALL.layers)


@given(st.text(max_size=250), st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9), max_size=4))
def test_any_super_category_and_settings_survive(
    tmp_path_factory: pytest.TempPathFactory, super_category: str, training: dict[str, Any]
) -> None:
    """Also whatever length they give the header, whose first bytes may then look like another kind of file."""
    concept = a_concept(super_category=super_category, training=training)
    assert same(load(concept.save(tmp_path_factory.mktemp("it") / "it.safetensors")), concept)


def test_no_length_of_header_is_mistaken_for_a_pickle(tmp_path: Path) -> None:
    """A header of 128 bytes more than a multiple of 256 starts as a pickle does, one of 19,280 as a zip does."""
    lengths: list[int] = []
    for size in (*range(0, 256, 8), None):
        notes = "x" * (19_280 - lengths[0] if size is None else size)
        path = a_concept(training={"notes": notes}).save(tmp_path / "it.safetensors", overwrite=True)
        lengths.append(struct.unpack("<Q", path.read_bytes()[:8])[0])
        load(path)
    assert lengths[-1] == 19_280
    assert any(length % 256 == 128 for length in lengths)


def test_digest_is_of_all_that_changes_pictures_and_nothing_else() -> None:
    concept = a_concept()
    others = [
        a_concept(seed=1),
        a_concept(placeholder="<other>"),
        a_concept(super_category="cat"),
        a_concept(form="preserving"),
        a_concept(scope="word"),
        replace(concept, e_super=concept.i_star),
        replace(concept, family=replace(SMALL, name="other")),
    ]
    assert len({concept.digest, *(other.digest for other in others)}) == 8
    for same_pictures in (
        a_concept(created="2001"),
        a_concept(training={}),
        concept.with_thumbnail("data:image/png;base64,AA"),
    ):
        assert same_pictures.digest == concept.digest


def test_other_precisions_of_the_same_values_are_read(tmp_path: Path) -> None:
    """Other programs convert files; half precision holds every value either way."""
    concept = a_concept()
    save_file({name: t.float() for name, t in concept.tensors.items()}, tmp_path / "it.safetensors", concept.metadata)
    assert same(load(tmp_path / "it.safetensors"), concept)


def test_metadata_tells_other_programs(tmp_path: Path) -> None:
    path = a_concept(SD1).with_thumbnail("data:image/jpeg;base64,AA").save(tmp_path / "it.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/perfusion"
    assert metadata["modelspec.resolution"] == "512x512"
    assert metadata["modelspec.trigger_phrase"] == "<my-teddy>"
    assert metadata["modelspec.thumbnail"] == "data:image/jpeg;base64,AA"
    assert metadata["perfusion.format"] == FORMATS["half", False, "prompt"] == "1"
    assert "modelspec.resolution" not in a_concept(training={}).metadata
    assert "modelspec.thumbnail" not in a_concept().metadata


# --- sizes


def test_families_are_the_real_ones() -> None:
    assert (len(SD1.layers), sum(SD1.layers.values())) == (16, 12_480)
    assert (len(SD2.layers), sum(SD2.layers.values())) == (16, 12_480)
    assert (len(SDXL.layers), sum(SDXL.layers.values())) == (70, 83_200)


@pytest.mark.parametrize("vectors", [3, 4], ids=["keys of the super-category", "keys of its own"])
@pytest.mark.parametrize(
    ("family", "storage", "tensors", "file"),
    [(SD1, "half", 31_200, 36_000), (SD2, "half", 33_200, 37_000), (SDXL, "8bit", 100_000, 100 * 1024)],
)
def test_size(tmp_path: Path, family: Family, storage: str, tensors: int, file: int, vectors: int) -> None:
    width = family.context_width
    key: dict[str, Any] = {"e_key": torch.linspace(-1, 1, width)} if vectors == 4 else {}
    tensors += (vectors - 3) * 2 * width
    file += (vectors - 3) * 2 * width if family != SD1 else 0
    concept = a_concept(family, training={f"setting_{n}": "x" * 10 for n in range(25)}, **key)
    assert concept.storage == storage
    path = concept.save(tmp_path / "it.safetensors")
    size = sum(tensor.numel() * tensor.element_size() for tensor in concept.tensors.values())
    others = 2 * (vectors * width + sum(family.encoders.values()))
    values, scales = sum(family.layers.values()), len(family.layers)
    assert size == others + (2 * values if storage == "half" else values + 2 * scales) <= tensors
    assert path.stat().st_size <= file
    found = load(path)
    assert same(found, concept)


# --- target values in 8 bits


NARROW = a_concept(storage="8bit")


def test_a_concept_in_8_bits_is_read_back_as_it_was(tmp_path: Path) -> None:
    path = NARROW.save(tmp_path / "it.safetensors")
    with safe_open(path, "pt") as file:
        assert file.metadata()["perfusion.format"] == "2"
        assert file.get_tensor("o_star_v").dtype == torch.int8
        assert file.get_tensor("o_star_v.scale").shape == (len(SMALL.layers),)
    found = load(path)
    assert found.storage == "8bit"
    assert same(found, NARROW)
    assert found.save(tmp_path / "again.safetensors").stat().st_size == path.stat().st_size
    assert same(load(tmp_path / "again.safetensors"), NARROW)


@pytest.mark.parametrize("storage", ["half", "8bit"])
def test_values_that_follow_the_model_have_a_name_and_versions_of_their_own(tmp_path: Path, storage: str) -> None:
    concept = a_concept(storage=storage, anchored=True)
    path = concept.save(tmp_path / "it.safetensors")
    assert concept.metadata["perfusion.format"] == {"half": "3", "8bit": "4"}[storage]
    names = {"delta_v"} | ({"delta_v.scale"} if storage == "8bit" else set())
    assert {name for name in concept.tensors if name.endswith(("_v", ".scale"))} == names
    found = load(path)
    assert found.anchored and same(found, concept) and found.digest == concept.digest
    assert found.digest != a_concept(storage=storage).digest, "other pictures, other digest"
    assert len(path.read_bytes()) <= len(a_concept(storage=storage).save(tmp_path / "old.safetensors").read_bytes()) + 8


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("storage", ["half", "8bit"])
def test_words_of_another_scope_have_versions_that_older_programs_refuse(
    tmp_path: Path, storage: str, anchored: bool
) -> None:
    concept = a_concept(storage=storage, anchored=anchored, scope="word")
    assert concept.metadata["perfusion.format"] not in {"1", "2", "3", "4"}
    found = load(concept.save(tmp_path / "it.safetensors"))
    assert found.scope == "word" and found.storage == storage and found.anchored == anchored
    assert same(found, concept) and found.digest == concept.digest
    as_before = a_concept(storage=storage, anchored=anchored)
    assert load(as_before.save(tmp_path / "before.safetensors")).scope == "prompt"
    with pytest.raises(ValueError, match="word, prompt"):
        a_concept(scope="sentence")


@pytest.mark.parametrize("scope", ["word", "prompt"])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("storage", ["half", "8bit"])
def test_words_with_a_focus_have_a_version_of_their_own(
    tmp_path: Path, storage: str, anchored: bool, scope: str
) -> None:
    concept = a_concept(storage=storage, anchored=anchored, scope=scope, focus=12.5)
    assert concept.metadata["perfusion.format"] == "9"
    found = load(concept.save(tmp_path / "it.safetensors"))
    assert found.focus == 12.5
    assert (found.scope, found.storage, found.anchored) == (scope, storage, anchored)
    assert same(found, concept) and found.digest == concept.digest
    plain = a_concept(storage=storage, anchored=anchored, scope=scope)
    assert plain.digest != concept.digest, "other pictures, other digest"
    assert load(plain.save(tmp_path / "plain.safetensors")).focus == 1
    assert not {"perfusion.focus", "perfusion.like"} & set(plain.metadata)


@pytest.mark.parametrize("focus", [1.0, 12.5])
@pytest.mark.parametrize("scope", ["word", "prompt"])
@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("storage", ["half", "8bit"])
def test_keys_of_their_own_have_a_version_of_their_own(
    tmp_path: Path, storage: str, anchored: bool, scope: str, focus: float
) -> None:
    settings = {"storage": storage, "anchored": anchored, "scope": scope, "focus": focus}
    concept = a_concept(e_key=torch.linspace(-1, 1, SMALL.context_width), **settings)
    assert concept.metadata["perfusion.format"] == "10"
    found = load(concept.save(tmp_path / "it.safetensors"))
    assert found.e_key is not None and concept.e_key is not None and torch.equal(found.e_key, concept.e_key)
    assert (found.scope, found.storage, found.anchored, found.focus) == (scope, storage, anchored, focus)
    assert same(found, concept) and found.digest == concept.digest
    locked = a_concept(**settings)
    assert locked.digest != concept.digest, "other pictures, other digest"
    assert load(locked.save(tmp_path / "locked.safetensors")).e_key is None
    assert "e_key" not in locked.tensors


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        pytest.param({"e_key": None}, {}, id="none"),
        pytest.param({"e_key": torch.ones(5).half()}, {}, id="short"),
        pytest.param({"e_key": torch.full((6,), torch.nan).half()}, {}, id="NaN"),
        pytest.param({"e_key": torch.ones(6).half()}, {}, id="another"),
        pytest.param({}, {"perfusion.format": "9", "perfusion.focus": "2.0"}, id="an older version"),
        pytest.param({}, {"perfusion.like": "10"}, id="like itself"),
        pytest.param({}, {"perfusion.like": None}, id="like none"),
        pytest.param({}, {"perfusion.focus": "1.0"}, id="focus of 1"),
        pytest.param({}, {"perfusion.focus": "2.0"}, id="a focus it had not"),
    ],
)
def test_damaged_keys_are_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor | None], metadata: dict[str, str | None]
) -> None:
    concept = a_concept(anchored=True, scope="word", e_key=torch.linspace(-1, 1, SMALL.context_width))
    path = tmp_path / "it.safetensors"
    save_file(
        {name: tensor for name, tensor in {**concept.tensors, **tensors}.items() if tensor is not None},
        path,
        {key: value for key, value in {**concept.metadata, **metadata}.items() if value is not None},
    )
    with pytest.raises(ConceptFileError, match=r"it\.safetensors"):
        load(path)


@pytest.mark.parametrize(
    "damage",
    [
        {"perfusion.like": "9"},
        {"perfusion.like": None},
        {"perfusion.focus": None},
        {"perfusion.focus": "nan"},
        {"perfusion.focus": "0.5"},
        {"perfusion.focus": "1.0"},
        {"perfusion.focus": "1" * 400},
        {"perfusion.focus": "1e9"},
        {"perfusion.focus": "much"},
        {"perfusion.focus": "13.0"},
        {"perfusion.like": "1"},
    ],
)
def test_a_damaged_focus_is_refused(tmp_path: Path, damage: dict[str, str | None]) -> None:
    concept = a_concept(anchored=True, scope="word", focus=12.5)
    metadata = {key: value for key, value in {**concept.metadata, **damage}.items() if value is not None}
    path = tmp_path / "it.safetensors"
    save_file(concept.tensors, path, metadata)
    with pytest.raises(ConceptFileError, match=r"it\.safetensors"):
        load(path)


@pytest.mark.parametrize("focus", [0.0, 0.99, 1001.0, float("nan"), float("inf")])
def test_a_focus_lies_between_1_and_1000(focus: float) -> None:
    with pytest.raises(ValueError, match="from 1 to 1000"):
        a_concept(focus=focus)


def test_storage_is_the_familys_unless_said_otherwise(tmp_path: Path) -> None:
    assert a_concept(SD1).storage == a_concept(SD2).storage == a_concept(SMALL).storage == "half"
    assert a_concept(SDXL).storage == "8bit"
    wide = a_concept(SDXL, storage="half")
    assert wide.metadata["perfusion.format"] == "1"
    assert same(load(wide.save(tmp_path / "it.safetensors")), wide), "as SDXL files were before"
    assert same(load(a_concept(SD1, storage="8bit").save(tmp_path / "sd1.safetensors")), a_concept(SD1, storage="8bit"))
    with pytest.raises(ValueError, match="half, 8bit"):
        a_concept(storage="4bit")


def test_storage_changes_target_values_alone_and_little() -> None:
    wide, narrow = a_concept(SDXL, storage="half"), a_concept(SDXL)
    assert torch.equal(wide.i_star, narrow.i_star)
    assert torch.equal(wide.embeddings["clip_g"], narrow.embeddings["clip_g"])
    for layer, values in wide.o_star_v.items():
        assert (narrow.o_star_v[layer] - values).norm() / values.norm() < 0.01
    assert wide.digest != narrow.digest
    assert narrow.with_thumbnail("data:image/png;base64,AA").storage == "8bit"


def test_digests_of_8_bits_are_of_codes_and_scales(tmp_path: Path) -> None:
    for name, change in (("o_star_v", lambda t: t.neg_()), ("o_star_v.scale", lambda t: t.mul_(1.01))):
        NARROW.save(tmp_path / "it.safetensors", overwrite=True)
        tensors = load_file(tmp_path / "it.safetensors")
        change(tensors[name])
        save_file(tensors, tmp_path / "it.safetensors", NARROW.metadata)
        assert "digest" in refused(tmp_path / "it.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda t: t.pop("o_star_v.scale"), "missing or unknown: o_star_v.scale", id="no scales"),
        pytest.param(lambda t: t.update({"o_star_v.scale": torch.ones(2).half()}), "scale has shape", id="few scales"),
        pytest.param(lambda t: t.update({"o_star_v.scale": torch.ones(3, 1).half()}), "scale has shape", id="axes"),
        pytest.param(lambda t: t["o_star_v.scale"].zero_(), "not above 0", id="zero scales"),
        pytest.param(lambda t: t["o_star_v.scale"].neg_(), "not above 0", id="negative scales"),
        pytest.param(lambda t: t["o_star_v.scale"].fill_(torch.inf), "not finite", id="infinite scales"),
        pytest.param(lambda t: t["o_star_v.scale"].fill_(torch.nan), "not finite", id="NaN scales"),
        pytest.param(lambda t: t.update({"o_star_v.scale": torch.ones(3).int()}), "unknown types", id="whole scales"),
        pytest.param(lambda t: t.update(o_star_v=torch.ones(11).half()), "o_star_v must be I8", id="half values"),
        pytest.param(lambda t: t.update(o_star_v=torch.ones(11).byte()), "o_star_v must be I8", id="unsigned"),
        pytest.param(lambda t: t.update(i_star=torch.ones(6).to(torch.int8)), "unknown types", id="i* in 8 bits"),
        pytest.param(lambda t: t.update(o_star_v=torch.ones(10).to(torch.int8)), "o_star_v has shape", id="few values"),
        pytest.param(
            lambda t: t.update(o_star_v=torch.full((11,), -128).to(torch.int8)), "digest", id="more than 127 levels"
        ),
    ],
)
def test_damaged_files_in_8_bits(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    path = NARROW.save(tmp_path / "it.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, NARROW.metadata)
    assert message in refused(path)


def test_versions_are_of_their_own_storage(tmp_path: Path) -> None:
    for concept, version in ((WHOLE, "2"), (NARROW, "1")):
        metadata = {**concept.metadata, "perfusion.format": version}
        save_file(concept.tensors, tmp_path / "it.safetensors", metadata)
        assert "o_star_v.scale" in refused(tmp_path / "it.safetensors")


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_damaged_byte_in_8_bits_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, position: int, change: int
) -> None:
    path = NARROW.save(tmp_path_factory.mktemp("it") / "it.safetensors")
    data = bytearray(path.read_bytes())
    body = 8 + struct.unpack("<Q", data[:8])[0]
    data[body + position % (len(data) - body)] ^= change
    path.write_bytes(data)
    refused(path)


@pytest.mark.parametrize(("concept", "storage", "values"), [(a_concept(), "half", 22), (NARROW, "8bit", 11)])
def test_info_shows_storage_and_its_bytes(tmp_path: Path, concept: Concept, storage: str, values: int) -> None:
    path = concept.save(tmp_path / "it.safetensors")
    facts: Any = info(path)
    assert (facts["storage"], facts["bytes"]["o_star_v"]) == (storage, values)
    assert facts["bytes"].get("o_star_v.scale") == (6 if storage == "8bit" else None)
    assert facts["bytes"]["tensors"] + facts["bytes"]["header"] == facts["bytes"]["file"] == path.stat().st_size


def test_target_values_that_8_bits_cannot_hold_are_refused() -> None:
    for bad in (torch.nan, torch.inf, 1e6):
        values = {layer: torch.full((width,), bad) for layer, width in SMALL.layers.items()}
        with pytest.raises(ConceptFileError, match="not finite"):
            a_concept(o_star_v=values, storage="8bit")


# --- concepts that cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"i_star": torch.zeros(5)}, "i_star has shape"),
        ({"e_super": torch.full((6,), torch.nan)}, "e_super holds numbers that are not finite"),
        ({"d_star": torch.full((6,), 1e6)}, "d_star holds numbers that are not finite"),
        ({"d_star": -a_concept().d_star}, "contradict"),
        ({"d_star": torch.zeros(6)}, "contradict"),
        ({"embeddings": {"clip_l": torch.zeros(1, 4)}}, "embeddings for each text encoder"),
        ({"embeddings": {"clip_l": torch.zeros(1, 4), "clip_g": torch.zeros(2, 2)}}, "different numbers of vectors"),
        ({"embeddings": {"clip_l": torch.zeros(0, 4), "clip_g": torch.zeros(0, 2)}}, "0 vectors"),
        ({"embeddings": {"clip_l": torch.zeros(33, 4), "clip_g": torch.zeros(33, 2)}}, "33 vectors"),
        ({"embeddings": {"clip_l": torch.zeros(4), "clip_g": torch.zeros(1, 2)}}, "embedding.clip_l has shape"),
        ({"embeddings": {"clip_l": torch.tensor(1.0), "clip_g": torch.zeros(1, 2)}}, "embedding.clip_l has shape"),
        ({"o_star_v": {}}, "its layers are not those of its family"),
        ({"o_star_v": dict(reversed(list(a_concept().o_star_v.items())))}, "its layers are not those"),
        ({"o_star_v": dict.fromkeys(SMALL.layers, torch.ones(4))}, "o_star_v of input_blocks.1.1"),
        ({"form": "baroque"}, "baroque"),
        ({"estimator": "oracle"}, "oracle"),
    ],
)
def test_impossible_concepts_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConceptFileError, match=message):
        a_concept(**changes)


# --- placeholders


@given(st.from_regex(r"[a-zA-Z0-9]([a-zA-Z0-9_-]{0,46}[a-zA-Z0-9])?", fullmatch=True), st.sampled_from(["", " ", "\n"]))
def test_placeholders_are_kept_in_lower_case(name: str, around: str) -> None:
    placeholder = f"<{name}>"
    word = check_placeholder(around + placeholder + around)
    assert word == placeholder.lower() == check_placeholder(word)
    assert a_concept(placeholder=around + placeholder).placeholder == word


@given(st.text())
def test_whatever_is_accepted_is_one_made_up_word(text: str) -> None:
    try:
        word = check_placeholder(text)
    except PlaceholderError as error:
        assert "<my-teddy>" in str(error)
        return
    assert word[0] + word[-1] == "<>"
    assert word[1:-1].replace("-", "a").replace("_", "a").isalnum()
    assert word.isascii()


@pytest.mark.parametrize(
    "text",
    ["", "<>", "teddy", "my-teddy", "<my teddy>", "<my\nteddy>", "<-a>", "<a->", "<_>", "<a", "a>", "<<a>>"]
    + ["<a><b>", "<b>x</b>", "<img src=x>", "<a:1.2>", "<(a)>", "<a,b>", "<a.b>", "<é>", "<a>\0", f"<{'a' * 49}>"],
)
def test_ordinary_words_and_markup_cannot_stand_for_a_concept(text: str) -> None:
    with pytest.raises(PlaceholderError, match="one made-up word in angle brackets"):
        check_placeholder(text)
    with pytest.raises(PlaceholderError):
        a_concept(placeholder=text)


# --- bad files


def refused(path: Path) -> str:
    """The message with which a file is refused, which must name it, soon."""
    started = time.monotonic()
    with pytest.raises(ConceptFileError) as caught:
        load(path)
    assert time.monotonic() - started < 2
    message = str(caught.value)
    assert path.name in message
    assert len(message) < 700
    return message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"abc", "not a concept file"),
        (b"\0" * 8, "not a concept file"),
        (struct.pack("<Q", 200 << 20) + b"{}", f"header would be {200 << 20} bytes"),
        (struct.pack("<Q", 2**64 - 1), "not a concept file"),
        (struct.pack("<Q", MAX_HEADER + 8) + b"{" * 100, "not a concept file"),
        (struct.pack("<Q", 100) + b"{}", "cut off"),
        (struct.pack("<Q", 4) + b"nope", "not a .safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "not a .safetensors file"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "not a .safetensors file"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "not a .safetensors file"),
        (struct.pack("<Q", 2) + b"{}", "no Perfusion concept"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "not a concept file"),
        (b"GIF89a" + b"\0" * 50, "not a concept file"),
    ],
)
def test_files_that_are_no_safetensors(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "it.safetensors"
    path.write_bytes(data)
    assert message in refused(path)


@pytest.mark.parametrize("protocol", range(1, 6))
@pytest.mark.parametrize("content", [None, {"o_star_v": [1.0] * 999}])
def test_pickles_are_refused_unread(tmp_path: Path, protocol: int, content: Any) -> None:
    path = tmp_path / "it.safetensors"
    path.write_bytes(pickle.dumps(content, protocol))
    message = refused(path)
    assert "pickle" in message or protocol == 1


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".pth", ".bin", ".PT", ".safetensors"])
def test_torch_files_are_refused_unread(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"it{suffix}"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
    assert "pickle file" in refused(path)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = a_concept().save(tmp_path / "it.safetensors")
    os.truncate(path, 40 << 20)
    assert f"{40 << 20} bytes" in refused(path)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "it.safetensors")


def test_another_kind_of_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file({"unet.to_k.lora_up.weight": torch.zeros(4, 4)}, path, {"format": "pt"})
    assert "LoRA" in refused(path)
    save_file({"unet.to_k.lora_up.weight": torch.zeros(4, 4)}, path)
    assert "LoRA" in refused(path)


WHOLE = a_concept()


@given(st.floats(0, 1, exclude_max=True))
def test_a_file_cut_anywhere(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    path = WHOLE.save(tmp_path_factory.mktemp("it") / "it.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(path)


@pytest.mark.parametrize("back", [1, 2, 7])
@pytest.mark.parametrize("place", ["length", "header", "tensors", "end"])
def test_a_file_cut_where_it_hurts(tmp_path: Path, place: str, back: int) -> None:
    path = WHOLE.save(tmp_path / "it.safetensors")
    data = path.read_bytes()
    header = struct.unpack("<Q", data[:8])[0]
    end = {"length": 8, "header": 8 + header, "tensors": 8 + header + 9, "end": len(data)}[place]
    path.write_bytes(data[: end - back])
    refused(path)


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_damaged_byte_is_noticed_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, change: int
) -> None:
    """Any other error than ConceptFileError fails; a byte that nothing guards leaves the pictures as they were."""
    path = WHOLE.save(tmp_path_factory.mktemp("it") / "it.safetensors")
    data = bytearray(path.read_bytes())
    position %= len(data)
    data[position] ^= change
    path.write_bytes(data)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    if position >= header:
        assert "it.safetensors" in refused(path)
        return
    try:
        found = load(path)
    except ConceptFileError:
        return
    assert found.digest == WHOLE.digest


def changed(path: Path, edit: Callable[[dict[str, Any], dict[str, str]], Any]) -> Path:
    """A concept file with other tensors or metadata."""
    WHOLE.save(path, overwrite=True)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    edit(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(lambda t, m: None, None, id="nothing changed"),
        pytest.param(lambda t, m: t.pop("d_star"), "missing or unknown: d_star", id="missing tensor"),
        pytest.param(lambda t, m: t.update(extra=torch.ones(1)), "missing or unknown: extra", id="unknown tensor"),
        pytest.param(lambda t, m: t["i_star"].fill_(torch.nan), "i_star holds numbers", id="NaN"),
        pytest.param(lambda t, m: t["o_star_v"].fill_(torch.inf), "not finite", id="inf"),
        pytest.param(lambda t, m: t.update(e_super=torch.ones(7).half()), "e_super has shape", id="shape"),
        pytest.param(lambda t, m: t.update(o_star_v=torch.ones(10).half()), "o_star_v has shape", id="few values"),
        pytest.param(lambda t, m: t.update(o_star_v=torch.ones(11, 1).half()), "o_star_v has shape", id="axes"),
        pytest.param(lambda t, m: t.update(i_star=torch.tensor(1.0)), "i_star has shape", id="scalar"),
        pytest.param(lambda t, m: t.update({"embedding.clip_l": torch.ones(4)}), "embedding.clip_l", id="flat rows"),
        pytest.param(lambda t, m: t.update(i_star=torch.ones(6).int()), "unknown types", id="whole numbers"),
        pytest.param(lambda t, m: t.update(i_star=torch.ones(6).double()), "unknown types", id="double"),
        pytest.param(lambda t, m: t["o_star_v"].neg_(), "digest", id="other values"),
        pytest.param(lambda t, m: m.update({"perfusion.digest": "0" * 64}), "digest", id="other digest"),
        pytest.param(lambda t, m: m.pop("perfusion.digest"), "digest", id="no digest"),
        pytest.param(lambda t, m: m.update({"perfusion.super_category": "cat"}), "digest", id="other super-category"),
        pytest.param(lambda t, m: m.update({"perfusion.form": "preserving"}), "digest", id="other form"),
        pytest.param(lambda t, m: m.update({"perfusion.form": "baroque"}), "baroque", id="unknown form"),
        pytest.param(lambda t, m: m.update({"perfusion.estimator": ""}), "this version lacks", id="no estimator"),
        pytest.param(lambda t, m: m.update({"perfusion.format": "11"}), "Update ComfyUI-Perfusion", id="newer"),
        pytest.param(lambda t, m: m.update({"perfusion.format": "9" * 500}), "Update", id="much newer"),
        pytest.param(lambda t, m: m.pop("perfusion.format"), "no Perfusion concept", id="no format"),
        pytest.param(lambda t, m: m.pop("perfusion.placeholder"), "metadata is damaged", id="no placeholder"),
        pytest.param(lambda t, m: m.update({"perfusion.placeholder": "cat"}), "angle brackets", id="plain placeholder"),
        pytest.param(lambda t, m: m.pop("perfusion.super_category"), "metadata is damaged", id="no super-category"),
        pytest.param(lambda t, m: m.update({"perfusion.training": "{"}), "metadata is damaged", id="training no JSON"),
        pytest.param(lambda t, m: m.update({"perfusion.training": "[]"}), "not a table", id="training no table"),
        pytest.param(
            lambda t, m: m.update({"perfusion.training": "[" * 100_000}), "metadata is damaged", id="deep training"
        ),
        pytest.param(lambda t, m: m.update({"perfusion.family": "["}), "metadata is damaged", id="family no JSON"),
    ],
)
def test_changed_files(tmp_path: Path, edit: Callable[[Any, Any], Any], message: str | None) -> None:
    path = changed(tmp_path / "it.safetensors", edit)
    if message is None:
        assert same(load(path), WHOLE)
    else:
        assert message in refused(path)


FAMILY: dict[str, Any] = json.loads(SMALL.to_json())


@pytest.mark.parametrize(
    "family",
    [
        None,
        [],
        1,
        "sd1",
        {},
        {**FAMILY, "name": ""},
        {**FAMILY, "name": 5},
        {**FAMILY, "name": "<b>"},
        {**FAMILY, "name": "x" * 9999},
        {**FAMILY, "context_width": "6"},
        {**FAMILY, "context_width": 6.0},
        {**FAMILY, "context_width": -6},
        {**FAMILY, "context_width": 10**12},
        {**FAMILY, "context_width": float("nan")},
        {**FAMILY, "encoders": {}},
        {**FAMILY, "encoders": []},
        {**FAMILY, "encoders": "clip_l"},
        {**FAMILY, "encoders": {"clip_l": None}},
        {**FAMILY, "encoders": {"../clip": 4}},
        {**FAMILY, "encoders": {f"clip_{n}": 4 for n in range(5)}},
        {**FAMILY, "transformers": {}},
        {**FAMILY, "transformers": None},
        {**FAMILY, "transformers": {"middle_block.1": 5}},
        {**FAMILY, "transformers": {"middle_block.1": [1]}},
        {**FAMILY, "transformers": {"middle_block.1": [1, 2, 3]}},
        {**FAMILY, "transformers": {"middle_block.1": ["1", "2"]}},
        {**FAMILY, "transformers": {"middle_block.1": [10**9, 5]}},
        {**FAMILY, "transformers": {"middle_block.1": [1, 10**9]}},
        {**FAMILY, "transformers": {"middle_block.1": [0, 5]}},
        {**FAMILY, "transformers": {"a" * 999 + ".1": [1, 5]}},
        {**FAMILY, "transformers": {f"input_blocks.{a}.{b}": [64, 16_384] for a in range(90) for b in range(90)}},
    ],
)
def test_absurd_families_are_refused_at_once(tmp_path: Path, family: Any) -> None:
    path = changed(tmp_path / "it.safetensors", lambda t, m: m.update({"perfusion.family": json.dumps(family)}))
    assert "metadata is damaged" in refused(path)


def test_a_family_as_large_as_possible_is_refused_unallocated(tmp_path: Path) -> None:
    """94 million values by its own account."""
    family = {**FAMILY, "transformers": {f"input_blocks.{n}.1": [64, 16_384] for n in range(90)}}
    path = changed(tmp_path / "it.safetensors", lambda t, m: m.update({"perfusion.family": json.dumps(family)}))
    assert "o_star_v has shape (11,), its family asks for (94371840,)" in refused(path)


def test_a_family_without_end_is_refused(tmp_path: Path) -> None:
    path = changed(tmp_path / "it.safetensors", lambda t, m: m.update({"perfusion.family": "[" * 100_000}))
    assert "metadata is damaged" in refused(path)


@pytest.mark.parametrize("key", ["format", "family", "placeholder", "super_category", "training", "digest", "form"])
@pytest.mark.parametrize("value", [5, None, ["x"], {"a": 1}])
def test_metadata_that_is_no_text(tmp_path: Path, key: str, value: Any) -> None:
    path = WHOLE.save(tmp_path / "it.safetensors")
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"][f"perfusion.{key}"] = value
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
    refused(path)


@pytest.mark.parametrize("metadata", [5, "text", ["perfusion.format"]])
def test_metadata_that_is_no_table(tmp_path: Path, metadata: Any) -> None:
    raw = json.dumps({"__metadata__": metadata}).encode()
    (tmp_path / "it.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    assert "no Perfusion concept" in refused(tmp_path / "it.safetensors")


def test_a_header_is_read_without_the_tensors(tmp_path: Path) -> None:
    path = WHOLE.save(tmp_path / "it.safetensors")
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    os.truncate(path, 8 + length)
    header = read_header(path)
    assert header["o_star_v"] == {"dtype": "F16", "shape": [11], "data_offsets": header["o_star_v"]["data_offsets"]}
    assert header["__metadata__"]["perfusion.digest"] == WHOLE.digest


# --- names


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("<my teddy>", "my-teddy"),
        ("teddy.safetensors", "teddy"),
        ("teddy v1.5", "teddy-v1.5"),
        ("  .hidden", "hidden"),
        ("Bär 熊", "Bär-熊"),
        ("a:b*c?", "a-b-c"),
        ("x" * 300, "x" * 100),
    ],
)
def test_file_names(name: str, stem: str) -> None:
    assert file_stem(name) == stem


@pytest.mark.parametrize(
    "name", ["../it", "a/b", "a\\b", "..", "a..b", "/etc/it", "C:\\it", "...", "<>", "-", ".safetensors"] + [""]
)
def test_names_of_folders_or_nothing_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="file name|name of letters"):
        file_stem(name)
    with pytest.raises(ValueError):
        WHOLE.save_numbered(tmp_path, name)
    assert not list(tmp_path.iterdir())


@given(st.text(min_size=1))
def test_any_accepted_name_can_be_written(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.mktemp("names")
    try:
        path = WHOLE.save_numbered(folder, name)
    except ValueError:
        return
    assert path.parent == folder
    assert list(folder.iterdir()) == [path]


def test_the_longest_names_of_the_widest_letters_can_be_written(tmp_path: Path) -> None:
    for name in ("熊" * 200, "𠀀" * 200):
        assert load(WHOLE.save_numbered(tmp_path, name)).digest == WHOLE.digest


# --- saving


def test_saving_numbers_names_and_keeps_every_file(tmp_path: Path) -> None:
    concepts = [a_concept(seed=k) for k in range(3)]
    paths = [concept.save_numbered(tmp_path, "<it>") for concept in concepts]
    assert [path.name for path in paths] == ["it.safetensors", "it_2.safetensors", "it_3.safetensors"]
    before = {path: path.read_bytes() for path in paths}
    assert [concept.save_numbered(tmp_path, "it") for concept in concepts] == paths
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert [load(path).digest for path in paths] == [concept.digest for concept in concepts]


@pytest.mark.parametrize("data", [b"", b"somebody's notes", b"\x80\x02."])
def test_a_strangers_file_of_that_name_is_left_alone(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "it.safetensors").write_bytes(data)
    assert WHOLE.save_numbered(tmp_path, "it").name == "it_2.safetensors"
    assert (tmp_path / "it.safetensors").read_bytes() == data


def test_a_folder_of_that_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "it.safetensors").mkdir()
    assert WHOLE.save_numbered(tmp_path, "it").name == "it_2.safetensors"


def test_saving_overwrites_only_when_told_to(tmp_path: Path) -> None:
    path = WHOLE.save(tmp_path / "it.safetensors")
    other = a_concept(seed=1)
    with pytest.raises(FileExistsError):
        other.save(path)
    assert load(path).digest == WHOLE.digest
    other.save(path, overwrite=True)
    assert load(path).digest == other.digest
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_in_the_folders_place_is_an_error_and_no_endless_search(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        WHOLE.save_numbered(tmp_path / "file", "it")


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_two_threads_saving_one_name(tmp_path: Path, seeds: tuple[int, int]) -> None:
    concepts = [a_concept(seed=seed) for seed in seeds]
    start, paths, errors = threading.Barrier(8), [], []

    def save(concept: Concept) -> None:
        try:
            start.wait()
            paths.append(concept.save_numbered(tmp_path, "it"))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(concept,)) for concept in concepts * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(paths) == 8
    assert set(tmp_path.iterdir()) == set(paths)
    assert {load(path).digest for path in paths} == {concept.digest for concept in concepts}
    if len(set(seeds)) == 1:
        assert len(set(paths)) == 1


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def unsupported(*_: Any, **__: Any) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, overwrite: bool
) -> None:
    path = tmp_path / "it.safetensors"
    if overwrite:
        WHOLE.save(path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        patch.setattr(os, "link", unsupported)
        with pytest.raises(OSError, match="No space left"):
            a_concept(seed=1).save(path, overwrite=overwrite)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    if not overwrite:
        assert WHOLE.save_numbered(tmp_path, "it") == path


@pytest.mark.parametrize("links", [True, False])
def test_file_systems_without_hard_links_keep_files_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", unsupported)
    first, second = (a_concept(seed=seed).save_numbered(tmp_path, "it") for seed in (0, 1))
    assert {path: load(path).digest for path in tmp_path.iterdir()} == {
        first: WHOLE.digest,
        second: a_concept(seed=1).digest,
    }


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_files_have_the_usual_permissions_without_touching_those_of_other_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("the umask is of the whole process"))
            path = WHOLE.save(tmp_path / "it.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


_PICTURE = "data:image/png;base64,"


def test_thumbnails_are_bounded(tmp_path: Path) -> None:
    largest = WHOLE.with_thumbnail(_PICTURE + "x" * (MAX_THUMBNAIL - len(_PICTURE)))
    assert same(load(largest.save(tmp_path / "it.safetensors")), largest)
    with pytest.raises(ValueError, match=str(MAX_THUMBNAIL)):
        WHOLE.with_thumbnail(largest.thumbnail + "x")


@pytest.mark.parametrize(
    "thumbnail",
    [_PICTURE + "y" * 500_000, "javascript:alert(1)", _PICTURE + '"><img onerror=x>', "data:text/html;base64,aGk=", ""],
)
def test_what_is_no_thumbnail_is_dropped(tmp_path: Path, thumbnail: str) -> None:
    save_file(WHOLE.tensors, tmp_path / "it.safetensors", {**WHOLE.metadata, "modelspec.thumbnail": thumbnail})
    assert load(tmp_path / "it.safetensors").thumbnail == ""
    if thumbnail:
        with pytest.raises(ValueError, match="data URI"):
            WHOLE.with_thumbnail(thumbnail)


def test_digests_stay_what_they_are() -> None:
    """A file of today must load for ever: its digest is checked then."""
    family = Family("golden", 2, {"clip_l": 2}, {"middle_block.1": (1, 2)})
    direction = torch.tensor([1.0, -0.5])
    concept = Concept(
        family=family,
        placeholder="<golden>",
        super_category="cat",
        embeddings={"clip_l": torch.tensor([[0.25, 2.0]])},
        i_star=direction,
        d_star=direction,
        e_super=direction,
        o_star_v={"middle_block.1.transformer_blocks.0": torch.tensor([3.0, 4.0])},
    )
    assert concept.digest == "b2cfeb6c746586ebec44cd94bb74c4d2ede589f5f3fb89971785ed59c562c0f2"


def test_a_damaged_file_is_not_taken_for_the_concept(tmp_path: Path) -> None:
    first = WHOLE.save_numbered(tmp_path, "it")
    first.write_bytes(first.read_bytes()[:-4])
    second = WHOLE.save_numbered(tmp_path, "it")
    assert second != first
    assert same(load(second), WHOLE)


def test_a_name_that_another_folder_would_hide_is_taken(tmp_path: Path) -> None:
    models, output = tmp_path / "models", tmp_path / "output"
    models.mkdir()
    a_concept(seed=1).save(models / "it.safetensors")
    assert WHOLE.save_numbered(output, "it", [models]).name == "it_2.safetensors"
    assert WHOLE.save_numbered(output, "other", [models]).name == "other.safetensors"
    WHOLE.save(models / "it_3.safetensors")
    a_concept(seed=2).save(output / "it_2.safetensors", overwrite=True)
    assert WHOLE.save_numbered(output, "it", [models]).name == "it_3.safetensors", "the same concept hides nothing"


@pytest.mark.parametrize("name", ["con", "NUL", "lpt1", "aux.it"])
def test_names_of_devices_are_avoided(name: str) -> None:
    assert file_stem(name) == f"concept-{name}"
