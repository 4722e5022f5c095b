"""Makes ``workflows/*.json`` and their thumbnails: each API twin opened, arranged, run and photographed in a browser.

    python tools/make_workflows.py

Needs ComfyUI, a Chromium and the packages of ``.[dev]``; the runs are on a reduced checkpoint of random weights.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402

from tests.browser.page import comfy_page, run_graph  # noqa: E402
from tests.comfyui.test_end_to_end import cat_of, graph, put_photos  # noqa: E402
from tests.hosts import Base, ServerOptions, main_host, running_server  # noqa: E402

# Column by column, by the names of the API twin.
COLUMNS: dict[str, list[list[str]]] = {
    "train_concept": [
        ["photo_1", "photo_2", "photo_3", "photo_4"],
        ["mask_1", "mask_2", "mask_3", "mask_4"],
        ["checkpoint", "photos", "masks", "note"],
        ["train", "save", "loss"],
        ["apply", "positive", "negative", "latent"],
        ["sampler", "decode", "save_image"],
    ],
    "two_concepts": [
        ["checkpoint", "load"],
        ["apply", "positive", "negative", "latent"],
        ["sampler", "decode"],
        ["save_image", "note"],
    ],
}
GROUPS = {
    "train_concept": [("Photos and masks", 0, 2), ("Learn and keep", 3, 3), ("Draw", 4, 5)],
    "two_concepts": [("Concepts", 0, 0), ("Draw", 1, 3)],
}
NOTES = {
    "train_concept": "1. Choose your checkpoint, and 1 to 10 photos of one thing, each with a mask (white where the "
    "thing is).\n2. Say what kind of thing it is (super-category) and which word shall stand for it (placeholder).\n"
    "3. Write the placeholder into the prompt, where it would name the thing.\n"
    "4. Run. The concept is kept in output/perfusion under the placeholder's name, about 31 KB.",
    "two_concepts": "Train two concepts first, or put their files into models/perfusion and press R.\nEach row has its "
    "own switch, strength, bias and temperature. Write both placeholders into the prompt.",
}
COLUMN_WIDTH, GAP = 340, 90

_ARRANGE = """async ([api, columns, groups, note, width, gap]) => {
    await app.loadApiJson(api, 'workflow');
    await new Promise((resolve) => setTimeout(resolve, 1500));
    const byTitle = {};
    const ids = Object.keys(api);
    const nodes = Object.fromEntries(app.graph._nodes.map((node) => [String(node.id), node]));
    for (const id of ids) byTitle[id] = nodes[id];
    const text = LiteGraph.createNode('MarkdownNote') ?? LiteGraph.createNode('Note');
    app.graph.add(text);
    text.title = 'How to use this';
    text.widgets[0].value = note;
    text.size = [width, 260];
    byTitle.note = text;
    let left = 0;
    const bounds = [];
    for (const column of columns) {
        let top = 0;
        for (const id of column) {
            const node = byTitle[id];
            const least = node.computeSize();
            const height = id === 'note' ? 260 : Math.max(least[1], node.type.startsWith('LoadImage') ? 315 : 0,
                ['SaveImage', 'LossGraphNode'].includes(node.type) ? 320 : 0, node.type === 'CLIPTextEncode' ? 140 : 0);
            node.setSize([width, height]);
            node.pos = [left, top];
            top += height + gap;
        }
        bounds.push([left, top]);
        left += width + gap;
    }
    for (const [title, first, last] of groups) {
        const group = new LiteGraph.LGraphGroup(title);
        const bottom = Math.max(...bounds.slice(first, last + 1).map((b) => b[1]));
        group.pos = [bounds[first][0] - 20, -90];
        group.size = [bounds[last][0] + width + 20 - bounds[first][0] + 20, bottom + 60];
        app.graph.add(group);
    }
    return JSON.stringify(app.graph.serialize());
}"""

# The part of the page that no bar or panel covers.
VIEW = (60, 90, 1600, 900)
_FIT = """([left, top, width, height]) => {
    const boxes = app.graph._nodes.map((n) => [n.pos[0], n.pos[1] - 40, n.pos[0] + n.size[0], n.pos[1] + n.size[1]]);
    const x = Math.min(...boxes.map((b) => b[0])) - 30, y = Math.min(...boxes.map((b) => b[1])) - 70;
    const right = Math.max(...boxes.map((b) => b[2])) + 30, bottom = Math.max(...boxes.map((b) => b[3])) + 30;
    const scale = Math.min(width / (right - x), height / (bottom - y));
    const ds = app.canvas.ds;
    ds.scale = scale;
    ds.offset[0] = left / scale - x + (width / scale - (right - x)) / 2;
    ds.offset[1] = top / scale - y + (height / scale - (bottom - y)) / 2;
    for (const node of app.graph._nodes) node.has_errors = false;
    app.canvas.setDirty(true, true);
}"""


def main() -> None:
    """Make both workflows."""
    with tempfile.TemporaryDirectory() as folder:
        base = Base.make(Path(folder) / "base", Path(folder) / "models", {})
        with running_server(main_host(), base, ServerOptions()) as server:
            put_photos(server.base / "input")
            checkpoint = server.model("checkpoint")
            make(server, "train_concept", checkpoint)
            server.queue(cat_of(graph(server, "train_concept")), timeout=600)
            make(server, "two_concepts", checkpoint)


def make(server: Any, name: str, checkpoint: str) -> None:
    """One workflow and its thumbnail."""
    api = json.loads((ROOT / "tests" / "api" / f"{name}.json").read_text())
    numbered = {node: str(number) for number, node in enumerate(api, start=1)}
    graph = {
        numbered[node]: {
            **entry,
            "inputs": {
                key: [numbered[value[0]], value[1]] if isinstance(value, list) else value
                for key, value in entry["inputs"].items()
            },
        }
        for node, entry in api.items()
    }
    columns = [[numbered.get(node, node) for node in column] for column in COLUMNS[name]]
    with comfy_page(server) as page:
        arguments = [graph, columns, GROUPS[name], NOTES[name], COLUMN_WIDTH, GAP]
        workflow = json.loads(page.evaluate(_ARRANGE, arguments))
        (ROOT / "workflows" / f"{name}.json").write_text(json.dumps(workflow, indent=1) + "\n")
        quick = """([checkpoint, size]) => {
            const set = (node, name, value) => {
                const widget = node.widgets?.find((w) => w.name === name);
                if (widget) widget.value = value;
            };
            for (const node of app.graph._nodes) {
                if (node.type === 'CheckpointLoaderSimple') set(node, 'ckpt_name', checkpoint);
                if (node.type === 'EmptyLatentImage') { set(node, 'width', size); set(node, 'height', size); }
                if (node.type === 'KSampler') set(node, 'steps', 4);
                if (node.type === 'PerfusionTrainConcept')
                    for (const [key, value] of Object.entries(
                        { steps: 20, batch_size: 2, resolution: size, contexts: 8, corpus_size: 64 }))
                        set(node, key, value);
            }
        }"""
        page.evaluate(quick, [checkpoint, 64])
        run_graph(page, timeout=600)
        page.evaluate(_FIT, list(VIEW))
        page.wait_for_timeout(7000)  # until messages have gone
        picture = ROOT / "workflows" / f"{name}.png"
        left, top, width, height = VIEW
        page.screenshot(path=str(picture), clip={"x": left, "y": top, "width": width, "height": height})
        Image.open(picture).convert("RGB").resize((960, 540), Image.Resampling.LANCZOS).save(
            picture.with_suffix(".jpg"), quality=88
        )
        picture.unlink()


if __name__ == "__main__":
    main()
