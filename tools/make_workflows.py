"""Makes ``workflows/*.json`` and their thumbnails: each API twin opened, arranged, run and photographed in a browser.

    python tools/make_workflows.py [--only NAME ...]

Needs ComfyUI, a Chromium and the packages of ``.[dev]``. Those that name a checkpoint run on a reduced one of random
weights, in few steps; those with the miniature run as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = ROOT / "workflows"
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402

from tests.browser.page import comfy_page, run_graph  # noqa: E402
from tests.comfyui.test_end_to_end import API, cat_of, graph, put_photos  # noqa: E402
from tests.hosts import Base, ServerOptions, main_host, running_server  # noqa: E402


@dataclass(frozen=True)
class Group:
    """A frame around columns of nodes, which have the names of the API twin.

    A column is a list of cells, each a node or several below each other. Where ``aligned``, cells of one row begin at
    the same height.
    """

    title: str
    columns: list[list[str | list[str]]]
    aligned: bool = False


@dataclass(frozen=True)
class Layout:
    """How a workflow looks: its groups from left to right, and the text of its note, the node "note"."""

    groups: list[Group]
    note: str


LAYOUTS: dict[str, Layout] = {
    "train_concept": Layout(
        [
            Group(
                "Photos and masks",
                [
                    ["photo_1", "photo_2", "photo_3", "photo_4"],
                    ["mask_1", "mask_2", "mask_3", "mask_4"],
                    ["checkpoint", "photos", "masks", "note"],
                ],
            ),
            Group("Learn and keep", [["train"], ["save", "loss"]]),
            Group("Draw", [["apply", "positive", "negative", "latent"], ["sampler", "decode", "save_image"]]),
        ],
        "1. Choose your checkpoint, and 1 to 10 photos of one thing, each with a mask (white where the thing is).\n"
        "2. Say what kind of thing it is (super-category) and which word shall stand for it (placeholder).\n"
        "3. Write the placeholder into the prompt, where it would name the thing.\n"
        "4. Run. The concept is kept in output/perfusion under the placeholder's name, about 35 KB.",
    ),
    "two_concepts": Layout(
        [
            Group("Concepts", [["checkpoint", "load"]]),
            Group(
                "Draw",
                [["apply", "positive", "negative", "latent"], ["sampler", "decode"], ["save_image", "note"]],
            ),
        ],
        "Train two concepts first, or put their files into models/perfusion and press R.\nEach row has its "
        "own switch, strength, bias and temperature. Write both placeholders into the prompt.",
    ),
    "miniature_train": Layout(
        [
            Group("A model and photos", [["checkpoint", "photos", "note"]]),
            Group("Learn and keep", [["train"], ["save", "report", "loss"]]),
            Group(
                "Draw", [["apply", "positive", "negative", "latent"], ["sampler", "decode", "enlarge"], ["save_image"]]
            ),
        ],
        "Press Run. There is nothing to choose and nothing to download: the *Miniature* is a small Stable Diffusion "
        "that comes with the pack.\n\nIt learns one teddy bear from five photos, and draws it at a place that none of "
        "them shows. No prompt can describe this one: its colors and the sign on its belly come from the photos.\n\n"
        "Then change the prompt, and Run again: nothing is trained anew. **thing** and **category** of *Miniature "
        "Photos* give something else to learn.",
    ),
    "several_concepts": Layout(
        [
            Group("A model", [["checkpoint", "note"]]),
            Group(
                "Learn two of one kind",
                [["photos_left", "photos_right"], ["train_left"], ["train_right"]],
            ),
            Group(
                "Each in its half of the picture",
                [["half", "nothing", "mask_left", "mask_right"], ["settings_left", "settings_right"]],
            ),
            Group(
                "Draw both",
                [
                    ["apply_left", "apply_right", "positive", "negative", "latent"],
                    ["inspect", "sampler", "decode", "enlarge"],
                    ["save_image"],
                ],
            ),
        ],
        "Press Run. Nothing has to be downloaded.\n\nTwo things of one kind are the hardest to keep apart: both words "
        "mean nearly the same to the model. A **region** for each says where its word is looked for. Without, they "
        "stand side by side, from left to right as the prompt names them.\n\n"
        "*Inspect Prompt* shows how far each concept's gate opens on each word.\n\nWith concepts from files, "
        "*Load Concept* has the same settings; chain one for each.",
    ),
    "trade_off": Layout(
        [
            Group("A model and photos", [["checkpoint", "photos", "latent", "note"]]),
            Group("Learn", [["train"]]),
            Group("See the whole trade-off", [["trade_off"], ["sheet", "report"]]),
            Group(
                "Draw with the best setting",
                [["pick", "apply", "positive", "negative"], ["sampler", "decode", "enlarge"], ["save_image", "plot"]],
            ),
        ],
        "Press Run. Nothing has to be downloaded.\n\n*Trade-Off* draws one prompt with five biases and two "
        "temperatures, and measures each picture: how like the photos, how true to the prompt. Nothing is trained "
        "again.\n\n*Pick Trade-Off* hands on the best setting by a rule of yours, and another prompt is drawn with it.",
    ),
    "shared_concept": Layout(
        [
            Group("A model", [["checkpoint", "note"]]),
            Group("The concept, inside this workflow", [["embed", "inspect"]]),
            Group(
                "Draw", [["apply", "positive", "negative", "latent"], ["sampler", "decode", "enlarge"], ["save_image"]]
            ),
        ],
        "Press Run. No file is needed, and nothing is trained: the concept is in the workflow itself, as text in "
        "*Embed Concept*.\n\nTo share one of yours, connect it to **concepts** there and run once: then the saved "
        "workflow, and every picture that was made with it, carries it along.",
    ),
    "miniature_two_concepts": Layout(
        [
            Group("A model", [["checkpoint", "note"]]),
            Group(
                "Learn two things",
                [["photos_teddy", "photos_cat"], ["train_teddy"], ["train_cat"]],
            ),
            Group("Apply both", [["apply_teddy", "apply_cat"]]),
            Group(
                "Draw both, and each alone",
                [
                    ["both", "teddy", "cat", "negative"],
                    ["sampler_both", "sampler_teddy", "sampler_cat", "latent"],
                    [[f"decode_{name}", f"enlarge_{name}"] for name in ("both", "teddy", "cat")],
                    ["save_image_both", "save_image_teddy", "save_image_cat"],
                ],
                aligned=True,
            ),
        ],
        "Press Run. A teddy bear and a cat are learned, one after the other, from five photos each. Nothing has to be "
        "downloaded or trained before.\n\nTwo *Apply Concepts* in a row add up: the same model then draws both in one "
        "picture, and each alone, as the prompts say.\n\nTo use files of *Save Concept* instead, and to set the "
        "strength and bias of each, there is *Load Concepts*.",
    ),
}
COLUMN_WIDTH, GAP = 340, 90

_ARRANGE = """async ([api, groups, note, width, gap]) => {
    await app.loadApiJson(api, 'workflow');
    await new Promise((resolve) => setTimeout(resolve, 1500));
    const nodes = Object.fromEntries(app.graph._nodes.map((node) => [String(node.id), node]));
    for (const node of Object.values(nodes)) {
        // Nodes 2.0 show what a linked widget holds.
        const slot = node.findInputSlot('super_category');
        if (slot >= 0 && node.getInputNode(slot)) {
            const category = node.getInputNode(slot).widgets.find((w) => w.name === 'category');
            node.widgets.find((w) => w.name === 'super_category').value = category.value;
        }
    }
    const text = LiteGraph.createNode('MarkdownNote') ?? LiteGraph.createNode('Note');
    app.graph.add(text);
    text.title = 'How to use this';
    text.widgets[0].value = note;
    nodes.note = text;
    const room = {
        LoadImage: 315, LoadImageMask: 315, SaveImage: 320, PreviewImage: 320, LossGraphNode: 320, CLIPTextEncode: 140,
        PerfusionInspectPrompt: 460,
        PerfusionMiniaturePhotos: 460,
    };
    for (const [id, node] of Object.entries(nodes)) {
        const least = id === 'note' ? 260 : node.computeSize()[1];
        node.setSize([width, Math.max(least, room[node.type] ?? 0)]);
    }
    const below = { PerfusionTrainConcept: width, PerfusionTradeOff: width };  // where previews will be
    const roomOf = (id) => nodes[id].size[1] + (below[nodes[id].type] ?? 0) + gap;
    const heightOf = (cell) => cell.reduce((sum, id) => sum + roomOf(id), 0);
    let left = 0;
    for (const { title, columns, aligned } of groups) {
        const first = left;
        let bottom = 0;
        const rows = Math.max(...columns.map((column) => column.length));
        const rowHeights = Array.from({ length: rows }, (_, row) =>
            Math.max(...columns.filter((column) => column[row]).map((column) => heightOf(column[row]))));
        for (const column of columns) {
            let top = 0;
            column.forEach((cell, row) => {
                let place = top;
                for (const id of cell) {
                    nodes[id].pos = [left, place];
                    place += roomOf(id);
                }
                top = aligned ? top + rowHeights[row] : place;
            });
            bottom = Math.max(bottom, top);
            left += width + gap;
        }
        const group = new LiteGraph.LGraphGroup(title);
        group.pos = [first - 20, -90];
        group.size = [left - gap - first + 40, bottom + 60];
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

# Enough for a look at a reduced checkpoint of random weights, whose pictures show nothing.
_QUICK = """([checkpoint, size]) => {
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


def main() -> None:
    """Make the workflows."""
    parser = argparse.ArgumentParser(
        prog="python tools/make_workflows.py", description="Makes workflows/*.json and their thumbnails."
    )
    parser.add_argument("--only", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="NAME", help="these alone")
    names = parser.parse_args().only
    with tempfile.TemporaryDirectory() as folder:
        base = Base.make(Path(folder) / "base", Path(folder) / "models", {})
        with running_server(main_host(), base, ServerOptions()) as server:
            put_photos(server.base / "input")
            if "two_concepts" in names:
                teddy = graph(server, "train_concept")
                for prompt in (teddy, cat_of(teddy)):
                    server.queue(prompt, timeout=600)
            for name in names:
                make(server, name)


def make(server: Any, name: str) -> None:
    """One workflow and its thumbnail."""
    api = json.loads((API / f"{name}.json").read_text())
    numbered = {node: str(number) for number, node in enumerate(api, start=1)}
    prompt = {
        numbered[node]: {
            **entry,
            "inputs": {
                key: [numbered[value[0]], value[1]] if isinstance(value, list) else value
                for key, value in entry["inputs"].items()
            },
        }
        for node, entry in api.items()
    }
    layout = LAYOUTS[name]
    groups = [
        {
            "title": group.title,
            "aligned": group.aligned,
            "columns": [
                [[numbered.get(node, node) for node in ([cell] if isinstance(cell, str) else cell)] for cell in column]
                for column in group.columns
            ],
        }
        for group in layout.groups
    ]
    with comfy_page(server) as page:
        workflow = json.loads(page.evaluate(_ARRANGE, [prompt, groups, layout.note, COLUMN_WIDTH, GAP]))
        (WORKFLOWS / f"{name}.json").write_text(json.dumps(workflow, indent=1) + "\n")
        if any(entry["class_type"] == "CheckpointLoaderSimple" for entry in api.values()):
            page.evaluate(_QUICK, [server.model("checkpoint"), 64])
        run_graph(page, timeout=1200)
        page.evaluate(_FIT, list(VIEW))
        page.wait_for_timeout(7000)  # until messages have gone
        picture = WORKFLOWS / f"{name}.png"
        left, top, width, height = VIEW
        page.screenshot(path=str(picture), clip={"x": left, "y": top, "width": width, "height": height})
        Image.open(picture).convert("RGB").resize((960, 540), Image.Resampling.LANCZOS).save(
            picture.with_suffix(".jpg"), quality=88
        )
        picture.unlink()


if __name__ == "__main__":
    main()
