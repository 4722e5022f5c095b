"""What people read agrees with what the code says: help pages, locale, README and CONTRIBUTING."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from perfusion.training.config import TrainingConfig

ROOT = Path(__file__).resolve().parent.parent.parent
LOCALE = ROOT / "locales" / "en" / "nodeDefs.json"
GUIDES = ("README.md", "CONTRIBUTING.md")

# The front end compiles translations: these characters mean something to it, in some versions also in tooltips.
# A tooltip with one of them stays out of the locale, and the front end shows the schema's.
MESSAGE_SYNTAX = re.compile(r"[{}@$|]")


@dataclass
class Output:
    name: str
    tooltip: str


@dataclass
class Node:
    """The texts of a node's schema. ``inputs``: id -> tooltip."""

    display_name: str
    description: str
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)


def nodes() -> dict[str, Node]:
    """Node id -> its texts, read from the source: nothing of a host is needed, or imported."""
    found = {}
    for path in sorted((ROOT / "nodes").glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        for definition in module.body:
            if isinstance(definition, ast.ClassDef):
                for call in _calls(definition):
                    if ast.unparse(call.func) in ("schema", "io.Schema"):
                        found[_text(_keywords(call)["node_id"])] = _node(call, module)
    return found


def _node(schema: ast.Call, module: ast.Module) -> Node:
    texts = _keywords(schema)
    node = Node(_text(texts["display_name"]), _text(texts["description"]))
    # Inputs that nodes share, and rows of inputs that are alike, are made by a function of the module; the latter is
    # called with their number.
    functions = {f.name: f for f in module.body if isinstance(f, ast.FunctionDef)}
    called = {ast.unparse(call.func): bool(call.args) for call in _calls(texts["inputs"])}
    node.inputs |= _inputs(texts["inputs"])
    for function in (name for name in called if name in functions):
        numbers = range(1, _constant(module, "MAX_ROWS") + 1) if called[function] else [0]
        if _of_kind(functions[function], "Input"):
            for number in numbers:
                node.inputs |= _inputs(functions[function], number)
    for call in _of_kind(texts["outputs"], "Output"):
        node.outputs.append(Output(_text(_keywords(call)["display_name"]), _tooltip(call)))
    return node


def _inputs(tree: ast.AST, number: int | str = 0) -> dict[str, str]:
    """Id -> tooltip of the inputs that are made here, in the order of the source; f-strings contain the number."""
    found: dict[str, str] = {}
    shared = [call for call in _calls(tree) if ast.unparse(call.func) == "gate_inputs"]
    for call in sorted([*_of_kind(tree, "Input"), *shared], key=lambda call: (call.lineno, call.col_offset)):
        if call in shared:
            common = ast.parse((ROOT / "nodes" / "common.py").read_text(encoding="utf-8"))
            made = next(f for f in common.body if isinstance(f, ast.FunctionDef) and f.name == "gate_inputs")
            found |= _inputs(made, _text(call.args[0], number) if call.args else "")
        else:
            found[_text(call.args[0], number)] = _tooltip(call)
    return found


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (entry for entry in ast.walk(tree) if isinstance(entry, ast.Call))


def _of_kind(tree: ast.AST, kind: str) -> list[ast.Call]:
    """Calls of io.<Type>.Input or io.<Type>.Output, in the order of the source."""
    found = [call for call in _calls(tree) if isinstance(call.func, ast.Attribute) and call.func.attr == kind]
    return sorted(found, key=lambda call: (call.lineno, call.col_offset))


def _keywords(call: ast.Call) -> dict[str, ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}


def _tooltip(call: ast.Call) -> str:
    """The tooltip of an input or output: a literal, or ``tip("setting")``, the help of a training setting."""
    value = _keywords(call).get("tooltip")
    assert value is not None, f"{ast.unparse(call)[:80]} has no tooltip"
    if isinstance(value, ast.Call):
        assert ast.unparse(value.func) == "tip", f"a tooltip made by {ast.unparse(value)}: teach this test to read it"
        return TrainingConfig.help(_text(value.args[0]))
    return _text(value)


def _text(value: ast.expr, number: int | str = 0) -> str:
    """A literal text; f-strings may contain the number of a row."""
    if isinstance(value, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else number for part in value.values]
        return "".join(map(str, parts))
    text = ast.literal_eval(value)
    assert isinstance(text, str)
    return text


def _constant(module: ast.Module, name: str) -> int:
    for statement in module.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            return ast.literal_eval(statement.value)
    raise AssertionError(f"no {name} in the module")


def in_locale(text: str) -> bool:
    return not MESSAGE_SYNTAX.search(text)


def locale() -> dict:
    return json.loads(LOCALE.read_text(encoding="utf-8"))


NODES = nodes()


def test_nodes_are_found() -> None:
    assert len(NODES) >= 4
    assert all(name.startswith("Perfusion") for name in NODES)
    assert "file_8" in NODES["PerfusionLoadConcepts"].inputs


def test_locale_has_these_nodes_and_no_others() -> None:
    assert set(locale()) == set(NODES)


@pytest.mark.parametrize("node_id", NODES)
def test_locale_says_what_the_schema_says(node_id: str) -> None:
    node, entry = NODES[node_id], locale()[node_id]
    assert entry["display_name"] == node.display_name
    assert entry["description"] == node.description
    assert list(entry["inputs"]) == list(node.inputs)
    for name, tooltip in node.inputs.items():
        expected = tooltip if in_locale(tooltip) else None
        assert entry["inputs"][name].get("tooltip") == expected, f"tooltip of {name}"
        assert entry["inputs"][name]["name"].strip()
    assert list(entry["outputs"]) == [str(index) for index in range(len(node.outputs))]
    for index, output in enumerate(node.outputs):
        assert entry["outputs"][str(index)] == {"name": output.name, "tooltip": output.tooltip}


def test_locale_contains_no_message_syntax() -> None:
    def texts(entry: Mapping | str) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values():
                yield from texts(value)

    assert [text for text in texts(locale()) if not in_locale(text)] == []


def test_labels_of_one_node_differ() -> None:
    for node_id, entry in locale().items():
        labels = [named["name"] for named in entry["inputs"].values()]
        assert len(set(labels)) == len(labels), node_id


@pytest.mark.parametrize("node_id", NODES)
def test_help_page_explains_every_input_and_output(node_id: str) -> None:
    page = (ROOT / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8")
    entry = locale()[node_id]
    assert page.startswith(f"# {entry['display_name']}\n")
    named = [*entry["inputs"].values(), *entry["outputs"].values()]
    # Numbered rows are explained once: "file 1" to "file 8" as "file".
    labels = {re.sub(r" \d$", "", value["name"]) for value in named}
    assert sorted(label for label in labels if f"**{label}**" not in page) == []


def test_every_help_page_has_its_node() -> None:
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == set(NODES)


@pytest.mark.parametrize("guide", GUIDES)
def test_commands_in_the_guides_exist(guide: str) -> None:
    text = (ROOT / guide).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    commands = set(re.findall(r"`make ([\w-]+)|^make ([\w-]+)", text, re.MULTILINE))
    named = {name for pair in commands for name in pair if name}
    assert named
    assert named - targets == set()
    for module in set(re.findall(r"python -m ((?:perfusion|benchmarks|miniature)[\w.]*)", text)):
        place = ROOT.joinpath(*module.split("."))
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), f"{guide}: python -m {module}"


@pytest.mark.parametrize("guide", GUIDES)
def test_links_in_the_guides_lead_somewhere(guide: str) -> None:
    text = (ROOT / guide).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", [*GUIDES, *sorted(f"web/docs/{name}.md" for name in NODES)])
def test_tables_are_whole(page: str) -> None:
    """Every row of a table has as many cells as its first."""
    cells = 0
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("|"):
            cells = 0
            continue
        count = len(re.findall(r"(?<!\\)\|", line))
        cells = cells or count
        assert count == cells, f"{page}, line {number}"


def files_of_the_repository() -> Iterator[Path]:
    """Text files that belong to the pack, without tests and what tools have left behind."""
    not_ours = {"tests", "build", "dist", "node_modules", "__pycache__"}
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in not_ours
            and not name.endswith(".egg-info")
            and (name[0] != "." or name in (".ci", ".github"))
        ]
        for name in names:
            if (
                Path(name).suffix in {".py", ".md", ".json", ".toml", ".yml", ".txt", ".js", ".css", ""}
                and name != ".git"
            ):
                yield Path(folder) / name


def test_nothing_speaks_of_where_it_was_made() -> None:
    traces = re.compile(
        r"(?<![\w.*~])/(?:work|root)(?:/|\b(?!\w))"  # folders of one machine
        r"|\b(?:sessions?|workplaces?)\b"
        r"|\bpypi\.\w|pythonhosted|registry\.npmjs|\bartifactory\b|\bnexus\.\w",
        re.IGNORECASE,
    )
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files_of_the_repository()
        for match in traces.finditer(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert found == []
