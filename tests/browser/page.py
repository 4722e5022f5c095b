"""A real browser on a real server: opening ComfyUI's page, loading graphs, running them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Page, sync_playwright

from tests.hosts import ComfyServer, browser

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
