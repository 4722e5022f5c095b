"""The demo on a few steps: what it leaves behind, and what it says when it cannot go on."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from benchmarks import demo
from perfusion.concept import load
from perfusion.statistics import TextStatistics, measure
from tests.miniature_weights import available

FILES = ["my-cat.safetensors", "my-teddy.safetensors"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return available(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Iterator[Path]:
    """The folder of a whole run, a short one."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "measure", _measure_few)
        patch.setitem(demo.DRAWING, "steps", 1)
        assert demo.main(arguments(weights, folder)) == 0
    yield folder


def _measure_few(host: Any, captions: Sequence[str], progress: Any) -> TextStatistics:
    return measure(host, captions[:200], progress)


def arguments(weights: Path, output: Path) -> list[str]:
    return ["--steps", "2", "--seeds", "1", "--weights", str(weights), "--output", str(output)]


def test_it_leaves_two_concepts_and_a_sheet(output: Path) -> None:
    assert sorted(path.name for path in output.iterdir()) == ["contact_sheet.png", *FILES]
    for file, category in zip(FILES, ("cat", "teddy bear"), strict=True):
        concept = load(output / file)
        assert concept.placeholder == f"<{file.removesuffix('.safetensors')}>"
        assert concept.super_category == category
        assert concept.training["steps_done"] == 2
        assert concept.training["photos"] == 5
        assert (output / file).stat().st_size < 8_000


def test_the_sheet_shows_every_row(output: Path) -> None:
    with Image.open(output / "contact_sheet.png") as sheet:
        assert sheet.mode == "RGB"
        assert sheet.width == 2 * demo.MARGIN + demo.SIDE + 6 * demo.CELL + 5 * demo.GAP
        assert 9 * (demo.CELL + demo.GAP) < sheet.height < 9 * (demo.CELL + demo.GAP) + 800
        for left in (0, sheet.width - demo.MARGIN):
            margin = sheet.crop((left, 0, left + demo.MARGIN, sheet.height))
            assert margin.getcolors() == [(demo.MARGIN * sheet.height, demo.PAPER)], "a label runs over the edge"


def test_the_sheet_shows_each_picture_in_its_place() -> None:
    red, blue = (torch.tensor(color).expand(64, 64, 3) for color in ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0)))
    rows = [demo.Row("a row", "of one", [red], ["a caption"]), demo.Row("two", "", [blue, red], title="A section")]
    sheet = demo.contact_sheet("A title", "facts", rows)
    for column, expected in ((0, [red, blue]), (1, [red])):
        middle = demo._left(column) + demo.CELL // 2
        colors = sheet.crop((middle, 0, middle + 1, sheet.height)).getcolors(sheet.height) or []
        counts = {color: count for count, color in colors}
        for picture in expected:
            color = tuple(int(255 * channel) for channel in picture[0, 0])
            assert counts[color] == demo.CELL


def test_photos_show_the_thing_where_no_picture_is_asked_for() -> None:
    asked = " ".join((*demo.SCENES, *demo.SCENES_OF_TWO, demo.TRADE_OFF))
    assert not any(place in asked for place in demo.PHOTOGRAPHED)
    assert len(demo.THINGS) == 2
    assert all(thing.look.mark for thing in demo.THINGS)


def test_score_compares_with_photos_and_prompts(weights: Path) -> None:
    from miniature.host import load_host
    from miniature.weights import load_image_encoder

    host, encoder = load_host(weights), load_image_encoder(weights)
    photos = torch.rand(2, 64, 64, 3)
    same, _ = demo.score(host, encoder, photos[:1], photos[:1], ["a photo of a cat"])
    assert same == pytest.approx(1, abs=1e-5)
    one, other = (demo.score(host, encoder, photos, photos, [text] * 2) for text in ("a photo of a cat", "a red car"))
    assert one.image == other.image < 1
    assert one.text != other.text


def test_long_labels_are_wrapped() -> None:
    lines = demo._wrapped("a photo of a … wearing a crown on the moon\n\nlast", 100)
    assert " ".join(lines) == "a photo of a … wearing a crown on the moon  last"
    assert all(demo._font(15).getlength(line) <= 100 for line in lines)


def test_missing_weights_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert demo.main(arguments(tmp_path / "empty", tmp_path / "out")) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("The demo cannot go on: the miniature's unet is missing")
    assert "\n" not in said
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_one_clear_line(
    tmp_path: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert demo.main(arguments(weights, tmp_path / "file" / "out")) == 1
    said = capsys.readouterr().err.strip()
    assert f"cannot write to {tmp_path / 'file' / 'out'}" in said
    assert "--output" in said
    assert "\n" not in said


def test_without_diffusers_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in list(sys.modules):
        if name.startswith("perfusion.hosts.diffusers"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert demo.main(arguments(tmp_path, tmp_path)) == 1
    assert 'pip install "comfyui-perfusion[demo]"' in capsys.readouterr().err


def test_stopped_it_says_what_is_kept(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    def learn_one(run: demo.Run, *_: Any) -> None:
        if run.kept:
            raise KeyboardInterrupt
        run.kept.append(tmp_path / "my-teddy.safetensors")

    monkeypatch.setattr(demo, "measure", stop)
    assert demo.main(arguments(weights, tmp_path)) == 130
    assert "Nothing was written yet" in capsys.readouterr().out
    monkeypatch.setattr(demo, "measure", lambda *_: None)
    monkeypatch.setattr(demo, "_learn", learn_one)
    assert demo.main(arguments(weights, tmp_path)) == 130
    assert str(tmp_path / "my-teddy.safetensors") in capsys.readouterr().out


@pytest.mark.parametrize("steps", ["0", "-3", "many"])
def test_numbers_that_make_no_sense_are_refused(steps: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--steps", steps])
    assert stopped.value.code == 2
    assert "--steps" in capsys.readouterr().err
