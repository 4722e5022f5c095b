"""Trainings without a graph: what a call gives, how it goes on, and how it fails. Most on the host in miniature."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from miniature import weights
from perfusion.__main__ import main
from perfusion.cli import models
from perfusion.cli.many import ManifestError, read_manifest
from perfusion.cli.options import OPTIONS, SETTINGS, Job, OptionError, Runtime, job_of
from perfusion.concept import load
from perfusion.training.config import TrainingConfig
from tests.miniature_weights import available
from tests.unit.fake_host import FakeHost

HOST = "tests.unit.fake_host:FakeHost"
SMALL = {
    "companions": 0,
    "steps": 6,
    "batch_size": 2,
    "micro_batch": 0,
    "resolution": 64,
    "contexts": 8,
    "every": 2,
    "corpus_size": 64,
}

Call = Callable[..., tuple[int, str, str]]


class StoppingHost(FakeHost):
    """Raises something at a call of the denoiser, or gives no numbers from there on."""

    def __init__(self, at: int, what: type[BaseException] | None = None):
        super().__init__()
        self.at, self.what = at, what

    def denoise(self, noisy: Tensor, *others: Any) -> Tensor:
        if self.calls == self.at and self.what is not None:
            raise self.what
        self.poison = self.what is None and self.calls >= self.at
        return super().denoise(noisy, *others)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """A call of ``python -m perfusion``: exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:  # of argparse
            code = int(error.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def a_folder(path: Path, photos: int = 3) -> Path:
    path.mkdir(parents=True)
    draw = torch.Generator().manual_seed(len(path.name))
    for number in range(photos):
        blocks = (255 * torch.rand(4, 4, 3, generator=draw)).byte().numpy()
        Image.fromarray(blocks).resize((64, 64), Image.Resampling.NEAREST).save(path / f"{number}.png")
    return path


def small(**changes: object) -> list[object]:
    return [word for name, value in {**SMALL, **changes}.items() for word in (f"--{name.replace('_', '-')}", value)]


def training(tmp_path: Path, **changes: object) -> list[object]:
    """A call that trains on the photos in ``bear``."""
    images = tmp_path / "bear"
    if not images.exists():
        a_folder(images)
    required = {"images": images, "super_category": "bear", "host": HOST, "out": tmp_path / "out"}
    return ["train", *small(**{**required, **changes})]


def a_manifest(path: Path, concepts: Sequence[object], **defaults: object) -> Path:
    path.write_text(json.dumps({"defaults": {**SMALL, "out": "out", **defaults}, "concepts": concepts}))
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hosted_by(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    def give(job: Job) -> FakeHost:
        return host

    monkeypatch.setattr(models, "load", give)


# --- one concept


def test_a_concept_is_learned_and_its_file_named_on_stdout(tmp_path: Path, call: Call) -> None:
    code, out, err = call(*training(tmp_path))
    path = tmp_path / "out" / "bear.safetensors"
    assert (code, out) == (0, f"{path}\n")
    concept = load(path)
    assert (concept.placeholder, concept.super_category) == ("<bear>", "bear")
    assert concept.training["best_step"] in (2, 4, 6)
    assert "step 4 of 6" in err and "best at step" in err


def test_json_is_one_line_with_what_came_of_it(tmp_path: Path, call: Call) -> None:
    code, out, _ = call(*training(tmp_path, placeholder="<minka>", name="our cat"), "--json")
    told = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert Path(told["file"]) == tmp_path / "out" / "our-cat.safetensors"
    assert load(Path(told["file"])).placeholder == "<minka>"
    assert told["best_step"] in (2, 4, 6) and told["seconds"] > 0 and told["score"] >= 0 and told["error"] == ""


def test_the_same_call_again_says_that_it_is_finished_and_writes_nothing(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(*training(tmp_path))
    before = files(tmp_path / "out")
    hosted_by(StoppingHost(at=0, what=RuntimeError), monkeypatch)
    code, out, err = call(*training(tmp_path))
    assert code == 0 and out.endswith("bear.safetensors\n") and "finished already" in err
    assert files(tmp_path / "out") == before


def test_without_the_record_it_is_found_out_from_the_state_and_nothing_is_written_twice(
    tmp_path: Path, call: Call
) -> None:
    call(*training(tmp_path))
    before = files(tmp_path / "out")
    (record,) = (tmp_path / "out" / "training").glob("*.json")
    record.unlink()
    assert call(*training(tmp_path))[0] == 0
    assert files(tmp_path / "out") == before


def test_a_changed_photo_is_another_training_beside_the_first(tmp_path: Path, call: Call) -> None:
    call(*training(tmp_path))
    first = (tmp_path / "out" / "bear.safetensors").read_bytes()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "bear" / "9.png")
    Image.effect_noise((64, 64), 80).save(tmp_path / "bear" / "8.png")
    code, out, err = call(*training(tmp_path))
    assert code == 0 and out.endswith("bear_2.safetensors\n")
    assert (tmp_path / "out" / "bear.safetensors").read_bytes() == first


def test_more_steps_go_on_from_those_that_were_done(tmp_path: Path, call: Call) -> None:
    call(*training(tmp_path, patience=0))
    _, out, _ = call(*training(tmp_path, patience=0, steps=8), "--json")
    told = json.loads(out)
    assert (told["resumed_from"], told["steps"]) == (6, 8)


def test_companions_are_drawn_and_trained_with(tmp_path: Path, call: Call) -> None:
    made = []
    for count in (0, 2):
        _, out, _ = call(*training(tmp_path, companions=count, out=tmp_path / str(count)), "--json")
        made.append(load(Path(json.loads(out)["file"])))
    assert [concept.training["companions"] for concept in made] == [0, 2]
    assert made[0].digest != made[1].digest


def test_ctrl_c_saves_says_how_to_go_on_and_the_next_call_ends_as_if_nothing_had_been(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        hosted_by(StoppingHost(at=25, what=KeyboardInterrupt), patch)
        code, out, err = call(*training(tmp_path), "--no-masks")
    assert (code, out) == (130, "")
    assert "saved at step" in err and "start it again to go on" in err
    assert not list((tmp_path / "out").glob("*.safetensors"))
    _, out, _ = call(*training(tmp_path), "--no-masks", "--json")
    told = json.loads(out)
    assert 0 < told["resumed_from"] < 6
    _, out, _ = call(*training(tmp_path, out=tmp_path / "whole"), "--no-masks", "--json")
    assert load(Path(told["file"])).digest == load(Path(json.loads(out)["file"])).digest


def test_a_training_that_fails_keeps_what_was_good_and_is_told(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosted_by(StoppingHost(at=30), monkeypatch)
    code, out, err = call(*training(tmp_path))
    assert (code, out) == (1, "")
    assert "Lower" in err and "It is saved as" in err
    (kept,) = (tmp_path / "out").glob("*.safetensors")
    assert kept.name.startswith("bear-step-")


def test_photos_at_fault_are_exit_code_1(tmp_path: Path, call: Call) -> None:
    empty = tmp_path / "none"
    empty.mkdir()
    code, _, err = call(*training(tmp_path, images=empty))
    assert code == 1 and "there are no photos in none" in err
    (empty / "broken.png").write_bytes(b"no picture")
    code, _, err = call(*training(tmp_path, images=empty))
    assert code == 1 and "no photo in none can be read" in err


def test_a_super_category_that_is_no_word_is_exit_code_1(tmp_path: Path, call: Call) -> None:
    code, _, err = call(*training(tmp_path, super_category="<bear>"))
    assert code == 1 and "super-category" in err


def test_each_wrong_option_is_named_and_nothing_is_run(tmp_path: Path, call: Call) -> None:
    wrong = {"images": tmp_path / "nowhere", "steps": 0, "resolution": 65, "patience": 51, "seed": -1,
             "device": "abacus", "corpus": tmp_path / "no.txt", "placeholder": "bear", "value_rate": "nan"}  # fmt: skip
    code, out, err = call(*training(tmp_path, **wrong))
    assert (code, out) == (2, "")
    for name in wrong:
        assert f"--{name.replace('_', '-')}: " in err
    assert not (tmp_path / "out").exists()


def test_a_program_that_is_not_there_is_a_wrong_call(tmp_path: Path, call: Call) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"")
    words = [
        "train",
        *small(images=a_folder(tmp_path / "bear"), super_category="bear", model=model, out=tmp_path / "out"),
    ]
    code, _, err = call(*words)
    assert code == 2 and "--model-config: it is missing" in err
    code, _, err = call(*words, "--comfyui", tmp_path)
    assert code == 2 and "--comfyui: it is not the folder of a ComfyUI" in err
    code, _, err = call(*words, "--host", HOST)
    assert code == 2 and "--model: it cannot be given together with --host" in err


@pytest.mark.parametrize("words", [["--steps", "many"], ["--form", "other"], ["--no-such"]])
def test_words_that_are_no_options_are_exit_code_2(tmp_path: Path, call: Call, words: list[str]) -> None:
    code, _, err = call(*training(tmp_path), *words)
    assert code == 2 and words[0] in err


def test_a_model_is_required_and_only_safetensors_are_read(tmp_path: Path) -> None:
    images = a_folder(tmp_path / "bear")
    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"")
    for model, told in (
        (None, "it is missing"),
        (tmp_path / "none", "there is no file"),
        (pickled, "only .safetensors"),
    ):
        with pytest.raises(OptionError) as caught:
            job_of({"images": images, "super_category": "bear", "model": model})
        (problem,) = caught.value.problems
        assert problem[0] == "model" and told in problem[1]


def test_a_model_that_cannot_be_loaded_is_exit_code_1(tmp_path: Path, call: Call) -> None:
    (tmp_path / "model").mkdir()
    images = a_folder(tmp_path / "bear")
    code, _, err = call("train", *small(images=images, super_category="bear", model=tmp_path / "model", device="cpu"))
    assert code == 1 and "the model model cannot be loaded" in err
    code, _, err = call(*training(tmp_path, host="tests.unit.fake_host:Nobody"))
    assert code == 1 and "module:function" in err


def test_all_settings_of_a_training_are_options_with_their_help_and_default(tmp_path: Path) -> None:
    assert [option.name for option in SETTINGS] == list(TrainingConfig.__dataclass_fields__)
    assert all(option.help for option in OPTIONS)
    job = job_of({"images": a_folder(tmp_path / "My Bear 2"), "super_category": "bear"}, Runtime(HOST))
    assert job.config == TrainingConfig()
    assert (job.placeholder, job.name) == ("<my-bear-2>", "my-bear-2")


def test_captions_and_masks_beside_the_photos_are_used(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = a_folder(tmp_path / "bear", photos=2)
    (images / "0.txt").write_text("a bear in the wood")
    Image.new("L", (64, 64), 255).save(images / "1-mask.png")
    seen: list[str] = []

    class Listening(FakeHost):
        def encode(self, prompts: Sequence[str], word: Any = None, **keywords: Any) -> Any:
            seen.extend(prompts)
            return super().encode(prompts, word, **keywords)

    hosted_by(Listening(), monkeypatch)
    code, _, err = call(*training(tmp_path))
    assert code == 0 and "a <bear> in the wood" in seen
    assert "masks of photo 1 were made" in err  # the other one has a mask beside it


def test_the_miniature_is_learned_on_as_a_folder_of_diffusers(tmp_path: Path, call: Call) -> None:
    folder = available(tmp_path / "weights")
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        if not (folder / name).exists():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(weights.FOLDER / name, folder / name)
    settings = small(images=a_folder(tmp_path / "bear"), super_category="bear", model=folder, out=tmp_path / "out",
                     steps=2, device="cpu")  # fmt: skip
    code, out, err = call("train", *settings)
    assert code == 0, err
    assert load(Path(out.strip())).family.context_width == 128


# --- many


def test_a_failed_concept_leaves_the_others_alone_and_a_second_call_does_only_what_is_left(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, photos in (("bear", 3), ("nothing", 0), ("My Cat", 2)):
        a_folder(tmp_path / name, photos)
    concepts = [{"images": name, "super_category": "bear"} for name in ("bear", "nothing", "My Cat")]
    manifest = a_manifest(tmp_path / "all.json", concepts)
    code, out, err = call("train-many", manifest, "--host", HOST, "--json")
    told = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert [each["name"] for each in told] == ["bear", "nothing", "my-cat"]
    assert [bool(each["error"]) for each in told] == [False, True, False]
    assert "there are no photos" in told[1]["error"] and "2 of 3 concepts are done, 1 failed" in err
    before = files(tmp_path / "out")
    shutil.copy(tmp_path / "bear" / "0.png", tmp_path / "nothing" / "0.png")
    code, out, err = call("train-many", manifest, "--host", HOST, "--json")
    told = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [each["was_done"] for each in told] == [True, False, True]
    after = files(tmp_path / "out")
    assert {name: after[name] for name in before} == before and "nothing.safetensors" in after


def test_an_unexpected_error_is_a_failed_concept_too(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_folder(tmp_path / "bear")
    concepts = [{"images": "bear", "super_category": "bear", "name": name} for name in ("one", "two")]
    hosted_by(StoppingHost(at=10, what=ZeroDivisionError), monkeypatch)
    code, out, err = call("train-many", a_manifest(tmp_path / "all.json", concepts), "--host", HOST)
    assert (code, out) == (1, "")
    assert err.count("failed: ZeroDivisionError") == 4  # told at once, and in the summary


def test_ctrl_c_ends_all_and_says_what_is_left(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    a_folder(tmp_path / "empty", 0)
    a_folder(tmp_path / "bear")
    concepts = [{"images": name, "super_category": "bear"} for name in ("empty", "bear", "bear")]
    concepts[2]["name"] = "other"
    hosted_by(StoppingHost(at=30, what=KeyboardInterrupt), monkeypatch)
    code, _, err = call("train-many", a_manifest(tmp_path / "all.json", concepts), "--host", HOST)
    assert code == 130
    assert "0 of 3 concepts are done, 1 failed, 2 are left" in err and "saved at step" in err


def test_a_manifest_is_checked_as_a_whole_with_the_number_of_each_concept(tmp_path: Path, call: Call) -> None:
    a_folder(tmp_path / "bear")
    good = {"images": "bear", "super_category": "bear"}
    manifest = a_manifest(
        tmp_path / "all.json",
        [
            good,
            {**good, "steps": "20"},
            {**good, "name": "third", "batch_size": 0, "resolution": True, "color": "red"},
            {"images": "nowhere"},
            "bear",
            good,
        ],
        flip=1,
        host="os:getcwd",
    )
    code, out, err = call("train-many", manifest, "--host", HOST)
    assert (code, out) == (2, "")
    for text in (
        "defaults, flip: 1 is not true or false",
        "defaults, 'host' is no option",
        "concept 2, steps: '20' is not a whole number",
        "concept 3, batch_size: batch_size is 0",
        "concept 3, resolution: True is not a whole number",
        "concept 3, 'color' is no option",
        "concept 4, super_category: it is missing",
        "concept 4, images: there is no folder",
        "concept 5 is no table",
        "concept 6, name: bear is the name of concept 1 too",
    ):
        assert text in err
    assert "concept 1," not in err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"concepts": []}', '{"concepts": {}}', '{"concepts": 3, "x": 1}', "[" * 9999]
)
def test_what_is_no_manifest_is_exit_code_2(tmp_path: Path, call: Call, text: str) -> None:
    (tmp_path / "all.json").write_text(text)
    code, _, err = call("train-many", tmp_path / "all.json", "--host", HOST)
    assert code == 2 and "all.json was not run" in err


def test_a_missing_manifest_is_exit_code_2(tmp_path: Path, call: Call) -> None:
    assert call("train-many", tmp_path / "none.json")[0] == 2


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML needs Python 3.11")
def test_toml_says_the_same_and_the_call_comes_between_defaults_and_concepts(tmp_path: Path) -> None:
    a_folder(tmp_path / "bear")
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "all.toml").write_text(
        '[defaults]\nmodel = "a"\nsteps = 7\nvalue_rate = 1\n'
        '[[concepts]]\nimages = "bear"\nsuper_category = "bear"\n'
        '[[concepts]]\nimages = "bear"\nsuper_category = "bear"\nname = "two"\nmodel = "b"\nsteps = 9\n'
    )
    one, two = read_manifest(tmp_path / "all.toml", {"model": tmp_path / "c"})
    assert (one.model, one.config.steps, one.config.value_rate) == (tmp_path / "c", 7, 1.0)
    assert (two.model, two.config.steps, two.name) == (tmp_path / "b", 9, "two")


def test_only_the_call_can_name_python_code(tmp_path: Path) -> None:
    a_folder(tmp_path / "bear")
    manifest = a_manifest(tmp_path / "all.json", [{"images": "bear", "super_category": "bear", "host": "os:abort"}])
    with pytest.raises(ManifestError, match="'host' is no option"):
        read_manifest(manifest, runtime=Runtime(HOST))


def test_without_ray_it_says_how_to_get_it(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    a_folder(tmp_path / "bear")
    manifest = a_manifest(tmp_path / "all.json", [{"images": "bear", "super_category": "bear"}])
    code, out, err = call("train-many", manifest, "--host", HOST, "--ray")
    assert (code, out) == (2, "") and "pip install" in err


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_ray_spreads_concepts_over_workers_and_a_failed_one_leaves_the_others_alone(
    tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    for name, photos in (("bear", 3), ("nothing", 0), ("My Cat", 2)):
        a_folder(tmp_path / name, photos)
    concepts = [{"images": name, "super_category": "bear"} for name in ("bear", "nothing", "My Cat")]
    manifest = a_manifest(tmp_path / "all.json", concepts)
    monkeypatch.chdir(Path(__file__).parents[2])
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        code, out, _ = call("train-many", manifest, "--host", HOST, "--ray", "--json")
        spread = {each["name"]: each for each in map(json.loads, out.splitlines())}
        again = call("train-many", manifest, "--host", HOST, "--ray", "--json")
    finally:
        ray.shutdown()
    assert code == 1 and [name for name, each in spread.items() if each["error"]] == ["nothing"]
    assert [json.loads(line)["was_done"] for line in again[1].splitlines()].count(True) == 2
    call("train-many", manifest, "--host", HOST, "--out", tmp_path / "here")
    for name in ("bear", "my-cat"):
        assert load(Path(spread[name]["file"])).digest == load(tmp_path / "here" / f"{name}.safetensors").digest
