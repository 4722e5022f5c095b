"""The shipped workflows and widgets in a real browser, in both renderers."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.page import (
    comfy_page,
    load_graph,
    open_template,
    prompt_of,
    red_nodes,
    run_graph,
    set_values,
    wait_for_pictures,
)
from tests.comfyui.test_end_to_end import API, MINIATURE, QUICK, executed, put_photos
from tests.hosts import ROOT, Base, ComfyServer, ServerOptions, main_host, running_server

pytest.importorskip("playwright")
pytestmark = [pytest.mark.comfyui, pytest.mark.server, pytest.mark.browser]

RENDERERS = pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes_2"])
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_store: Path) -> Iterator[ComfyServer]:
    base = Base.make(tmp_path_factory.mktemp("browser"), model_store, {})
    with running_server(main_host(), base, ServerOptions()) as running:
        put_photos(running.base / "input")
        yield running


def workflow(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text())


def photograph(page: Any, name: str) -> None:
    """Keeps a picture of the page where PERFUSION_SCREENSHOTS says, for people to look at."""
    if folder := os.environ.get("PERFUSION_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def assert_same(prompt: dict[str, Any], name: str) -> None:
    """A graph has the nodes of the API twin, and the pack's nodes its values, however they are numbered."""
    twin = json.loads((API / f"{name}.json").read_text())
    assert Counter(node["class_type"] for node in prompt.values()) == Counter(
        node["class_type"] for node in twin.values()
    )
    for entry in twin.values():
        if entry["class_type"].startswith("Perfusion"):
            values = {key: value for key, value in entry["inputs"].items() if not isinstance(value, list)}
            same_kind = [node["inputs"] for node in prompt.values() if node["class_type"] == entry["class_type"]]
            assert values in [{key: inputs.get(key) for key in values} for inputs in same_kind]


def test_the_template_browser_lists_the_workflows(server: ComfyServer) -> None:
    assert set(WORKFLOWS) >= {"train_concept", "two_concepts", *MINIATURE}
    assert set(server.get("/api/workflow_templates")["ComfyUI-Perfusion"]) >= set(WORKFLOWS)
    for name in WORKFLOWS:
        served = server.request(f"/api/workflow_templates/ComfyUI-Perfusion/{name}.jpg")
        assert served[:2] == b"\xff\xd8"


@pytest.mark.parametrize(
    "node", ["TrainConcept", "SaveConcept", "LoadConcepts", "ApplyConcepts", "MiniaturePhotos", "TradeOff"]
)
def test_help_pages_are_served(server: ComfyServer, node: str) -> None:
    assert server.request(f"/extensions/ComfyUI-Perfusion/docs/Perfusion{node}.md").startswith(b"#")


@RENDERERS
@pytest.mark.parametrize("name", ["train_concept", "two_concepts"])
def test_a_workflow_says_what_its_api_twin_says(server: ComfyServer, name: str, nodes_2: bool) -> None:
    with comfy_page(server, nodes_2=nodes_2) as page:
        load_graph(page, workflow(name))
        prompt = prompt_of(page)
        photograph(page, f"{name}-{'nodes_2' if nodes_2 else 'classic'}")
    assert_same(prompt, name)


@RENDERERS
def test_train_and_draw_from_the_page(server: ComfyServer, nodes_2: bool) -> None:
    """What a user does: open both workflows, choose the checkpoint, press run."""
    checkpoint = server.model("checkpoint")
    small = {"width": QUICK["resolution"], "height": QUICK["resolution"]}
    with comfy_page(server, nodes_2=nodes_2) as page:
        load_graph(page, workflow("train_concept"))
        for kind, values in {
            "CheckpointLoaderSimple": {"ckpt_name": checkpoint},
            "PerfusionTrainConcept": {**QUICK, "steps": 2},
            "EmptyLatentImage": small,
            "KSampler": {"steps": 2},
        }.items():
            set_values(page, kind, **values)
        run_graph(page)
        photograph(page, f"trained-{'nodes_2' if nodes_2 else 'classic'}")
        load_graph(page, workflow("two_concepts"))
        set_values(page, "PerfusionLoadConcepts", count=1, file_1="my-teddy.safetensors")
        for kind, values in {
            "CheckpointLoaderSimple": {"ckpt_name": checkpoint},
            "EmptyLatentImage": small,
            "KSampler": {"steps": 2},
        }.items():
            set_values(page, kind, **values)
        run_graph(page)
    assert (server.base / "output" / "perfusion" / "my-teddy.safetensors").is_file()


@RENDERERS
def test_the_miniature_needs_nothing_but_run(server: ComfyServer, nodes_2: bool) -> None:
    """Both of its workflows, one after the other, in fewer steps. The template browser is the same for both renderers,
    and slow here."""
    shown = {"PerfusionMiniaturePhotos": 5, "SaveImage": 4}
    with comfy_page(server, nodes_2=nodes_2) as page:
        for name in MINIATURE:
            load_graph(page, workflow(name)) if nodes_2 else open_template(page, name)
            assert_same(prompt_of(page), name)
            set_values(page, "PerfusionTrainConcept", **QUICK | {"steps": 4})
            set_values(page, "KSampler", steps=2)
            run_graph(page)
            for kind, count in shown.items():
                wait_for_pictures(page, kind, count)
            photograph(page, f"{name}-{'nodes_2' if nodes_2 else 'classic'}")
            assert red_nodes(page) == []
    last = list(server.get("/history").values())[-1]
    kinds = [last["prompt"][2][node]["class_type"] for node in executed(last)]
    # What the first has learned is used by the second: trainings of one node id and the same settings are.
    assert kinds.count("PerfusionTrainConcept") == 1


def test_what_is_new_in_the_miniature_s_world_needs_nothing_but_run_either(server: ComfyServer) -> None:
    """The trade-off, two of one kind in regions, and a concept inside the workflow; in fewer steps."""
    with comfy_page(server) as page:
        for name in ("shared_concept", "several_concepts", "trade_off"):
            load_graph(page, workflow(name))
            assert_same(prompt_of(page), name)
            if name != "shared_concept":
                # As many steps as two of one kind need to be told apart.
                set_values(page, "PerfusionTrainConcept", **QUICK | {"steps": 8})
            if name == "trade_off":
                set_values(page, "PerfusionTradeOff", steps=2, bias="0.3, 0.9", temperature="0.15")
                set_values(page, "PerfusionMiniatureLatent", batch_size=2)
            set_values(page, "KSampler", steps=2)
            run_graph(page)
            # How many pictures each node got; those out of sight are not drawn.
            counts = (
                "kind => app.graph._nodes.filter((n) => n.type === kind)"
                ".map((n) => app.nodeOutputs[n.id].images.length)"
            )
            saved = {"shared_concept": [4], "several_concepts": [4], "trade_off": [1, 2]}[name]
            assert sorted(page.evaluate(counts, "SaveImage")) == saved
            if name == "trade_off":
                assert page.evaluate(counts, "PerfusionTradeOff") == [2]
            photograph(page, name)
            assert red_nodes(page) == []


@pytest.mark.parametrize("named", [True, False], ids=["named", "in order"])
def test_a_training_saved_before_there_was_a_choice_does_what_it_did(server: ComfyServer, named: bool) -> None:
    graph = workflow("miniature_train")
    (node,) = [node for node in graph["nodes"] if node["type"] == "PerfusionTrainConcept"]
    new = ("scope", "focus", "companions", "timesteps", "key_rate", "preservation")
    node["inputs"] = [entry for entry in node["inputs"] if entry["name"] not in new]
    node["widgets_values"] = node["widgets_values"][: -len(new)]
    saved = node.pop("widgets_values_named", {})
    if named:
        node["widgets_values_named"] = {name: value for name, value in saved.items() if name not in new}
    with comfy_page(server) as page:
        load_graph(page, graph)
        (before,) = [each for each in prompt_of(page).values() if each["class_type"] == "PerfusionTrainConcept"]
        assert [before["inputs"][name] for name in new] == ["prompt", 1, 0, "uniform", 0, 0]
        load_graph(page, workflow("miniature_train"))
        (now,) = [each for each in prompt_of(page).values() if each["class_type"] == "PerfusionTrainConcept"]
        assert [now["inputs"][name] for name in new] == ["word", 20, 5, "lognormal", 0.02, 2]


@RENDERERS
def test_rows_follow_the_count_and_keep_their_values(server: ComfyServer, nodes_2: bool) -> None:
    visible = """() => app.graph._nodes[0].widgets.filter((w) => !w.hidden).map((w) => w.name)"""
    set_count = """(count) => {
        const widget = app.graph._nodes[0].widgets.find((w) => w.name === 'count');
        widget.value = count;
        widget.callback(count);
    }"""
    with comfy_page(server, nodes_2=nodes_2) as page:
        page.evaluate("() => { app.graph.clear(); app.graph.add(LiteGraph.createNode('PerfusionLoadConcepts')); }")
        page.wait_for_timeout(500)
        assert page.evaluate(visible) == ["count", "file_1", "on_1", "strength_1", "bias_1", "temperature_1"]
        page.evaluate(set_count, 3)
        assert len(page.evaluate(visible)) == 16
        page.evaluate("() => { app.graph._nodes[0].widgets.find((w) => w.name === 'bias_3').value = 0.42; }")
        page.wait_for_timeout(300)
        photograph(page, f"rows-{'nodes_2' if nodes_2 else 'classic'}")
        page.evaluate(set_count, 1)
        page.evaluate(set_count, 8)
        assert len(page.evaluate(visible)) == 41
        saved = page.evaluate("() => app.graph.serialize()")
        load_graph(page, saved)
        assert len(page.evaluate(visible)) == 41
        (load,) = prompt_of(page).values()
        assert load["inputs"]["bias_3"] == 0.42 and load["inputs"]["count"] == 8
