"""Embed Concept in a real browser: concepts go into the workflow, and come out of it without their files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser.page import comfy_page, load_graph, prompt_of, run_graph
from tests.browser.test_workflows import photograph
from tests.hosts import Base, ComfyServer, ServerOptions, main_host, running_server
from tests.unit.test_concept import SD1, a_concept

pytest.importorskip("playwright")
pytestmark = [pytest.mark.comfyui, pytest.mark.server, pytest.mark.browser]

NAME = "shared.safetensors"
BUILD = """() => {
    app.graph.clear();
    const [load, embed] = ['PerfusionLoadConcepts', 'PerfusionEmbedConcept'].map((kind) => LiteGraph.createNode(kind));
    app.graph.add(load);
    app.graph.add(embed);
    embed.pos = [500, 100];
    load.widgets.find((widget) => widget.name === 'file_1').value = 'shared.safetensors';
    load.connect(0, embed, 'concepts');
}"""
NODE = "app.graph._nodes.find((node) => node.type === 'PerfusionEmbedConcept')"
DATA = f"() => {NODE}.widgets.find((widget) => widget.name === 'data').value"
HIDDEN = f"() => {NODE}.widgets.find((widget) => widget.name === 'data').hidden"
SHOWN = f"() => {NODE}.perfusionEmbedded.box.textContent"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_store: Any) -> Iterator[ComfyServer]:
    base = Base.make(tmp_path_factory.mktemp("embedded"), model_store, {})
    a_concept(SD1).save(base.folder / "models" / "perfusion" / NAME)
    with running_server(main_host(), base, ServerOptions()) as running:
        yield running


def embed_entry(prompt: dict[str, Any]) -> dict[str, Any]:
    (entry,) = (entry for entry in prompt.values() if entry["class_type"] == "PerfusionEmbedConcept")
    return entry["inputs"]


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "nodes_2"])
def test_a_workflow_carries_its_concepts_to_where_their_files_are_not(server: ComfyServer, nodes_2: bool) -> None:
    file = server.base / "models" / "perfusion" / NAME
    if not file.exists():
        a_concept(SD1).save(file)
    with comfy_page(server, nodes_2=nodes_2) as page:
        page.evaluate(BUILD)
        page.wait_for_timeout(500)
        assert page.evaluate(SHOWN).startswith("Nothing is embedded yet")
        before = prompt_of(page)
        run_graph(page)
        text = page.evaluate(DATA)
        assert text.startswith("perfusion-concept 1 <my-teddy> ")
        assert page.evaluate(SHOWN).startswith("embedded 33 KB<my-teddy>33 KB")
        photograph(page, f"embedded-{'nodes_2' if nodes_2 else 'classic'}")
        assert prompt_of(page) == before, "what is embedded makes nothing behind it run again"
        page.evaluate(f"() => {NODE}.perfusionEmbedded.box.querySelectorAll('button')[1].click()")
        assert page.evaluate(HIDDEN) is False, "the text can be shown, and hidden again"
        page.evaluate(f"() => {NODE}.perfusionEmbedded.box.querySelectorAll('button')[1].click()")
        assert page.evaluate(HIDDEN) is True
        saved = page.evaluate("() => app.graph.serialize()")

        file.unlink()
        page.evaluate("async () => await app.refreshComboInNodes()")
        load_graph(page, saved)
        assert page.evaluate(DATA) == text
        inputs = embed_entry(prompt_of(page))
        assert "concepts" not in inputs and inputs["data"] == text
        assert "asks for files that are not here" in page.evaluate(SHOWN)
        run_graph(page)
        photograph(page, f"embedded-elsewhere-{'nodes_2' if nodes_2 else 'classic'}")
        if nodes_2:
            page.get_by_role("button", name="Clear").click()
        else:
            page.evaluate(f"() => {NODE}.perfusionEmbedded.box.querySelector('button').click()")
        assert page.evaluate(DATA) == ""
