"""A real browser on a real server: opening ComfyUI's page, loading graphs, running them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Page, sync_playwright

from tests.hosts import PACK_NAME, ComfyServer, browser

_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def comfy_page(server: ComfyServer, *, nodes_2: bool = False) -> Iterator[Page]:
    """ComfyUI's page, ready for graphs, with the classic nodes or Nodes 2.0."""
    settings = {
        "Comfy.TutorialCompleted": True,
        "Comfy.VueNodes.Enabled": nodes_2,
        "Comfy.Workflow.Persist": False,
        "Comfy.Minimap.Visible": False,
        "LiteGraph.Canvas.MinFontSizeForLOD": 0,
    }
    server.request("/api/settings", settings)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=list(_ARGUMENTS))
        page = chromium.new_page(viewport={"width": 1680, "height": 1050})
        page.goto(server.url, wait_until="domcontentloaded")
        page.wait_for_function("window.app && app.graph && app.extensionManager", timeout=60_000)
        page.wait_for_timeout(1500)
        try:
            yield page
        finally:
            chromium.close()


def load_graph(page: Page, workflow: dict[str, Any]) -> None:
    """Open a workflow, as dropping its file would."""
    page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
    page.wait_for_timeout(1000)


def open_template(page: Page, name: str) -> None:
    """Open one of the pack's workflows as a user does: in the template browser, by a click on its picture."""
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text(PACK_NAME, exact=True).first.click()
    page.get_by_test_id(f"template-workflow-{name}").click()
    page.get_by_test_id("template-workflows-content").wait_for(state="detached")
    page.wait_for_timeout(1000)


def set_values(page: Page, kind: str, **values: Any) -> None:
    """Put values into the widgets of all nodes of a kind."""
    page.evaluate(
        """([kind, values]) => {
            for (const node of app.graph._nodes.filter((n) => n.type === kind))
                for (const [name, value] of Object.entries(values)) {
                    const widget = node.widgets.find((w) => w.name === name);
                    widget.value = value;
                    widget.callback?.(value);
                }
        }""",
        [kind, values],
    )


def red_nodes(page: Page) -> list[str]:
    """Titles of nodes that the page marks as faulty, or does not know."""
    faulty = "(n) => n.has_errors || (!n.isVirtualNode && !LiteGraph.registered_node_types[n.type])"
    return page.evaluate(f"() => app.graph._nodes.filter({faulty}).map((n) => n.title)")


def wait_for_pictures(page: Page, kind: str, count: int) -> None:
    """Until each node of a kind shows so many pictures. Nodes 2.0 have elements for them, classic nodes draw them."""
    page.wait_for_function(
        """([kind, count]) => app.graph._nodes.filter((n) => n.type === kind).every((node) => {
            const pictures = app.nodeOutputs[node.id]?.images ?? [];
            const element = document.querySelector(`[data-node-id="${node.id}"]`);
            const shown = element ? element.querySelectorAll('img').length : node.imgs?.length;
            return pictures.length === count && shown > 0;
        })""",
        arg=[kind, count],
        timeout=20_000,
    )


def run_graph(page: Page, timeout: float = 300) -> None:
    """Press run, and wait for the end. Raises AssertionError with the host's message when it fails."""
    outcome = page.evaluate(
        """timeout => new Promise((resolve) => {
            const done = (name) => (event) => resolve([name, JSON.stringify(event.detail)]);
            for (const name of ['execution_success', 'execution_error', 'execution_interrupted'])
                app.api.addEventListener(name, done(name), { once: true });
            setTimeout(() => resolve(['timeout', '']), timeout * 1000);
            app.queuePrompt(0, 1).then((queued) => { if (queued === false) resolve(['refused', '']); });
        })""",
        timeout,
    )
    assert outcome[0] == "execution_success", outcome


def prompt_of(page: Page) -> dict[str, Any]:
    """The graph in API format, as the page would queue it."""
    return json.loads(page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)"))
