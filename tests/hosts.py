"""Finding, starting and driving the programs the tests need: ComfyUI in process, its server, a browser.

Importing this module imports none of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

from tests.models import MODEL_FILES
from tools.setup_env import find_browser, find_comfyui

ROOT = Path(__file__).resolve().parent.parent
PACK_NAME = "ComfyUI-Perfusion"
OLDEST_RUN = "PERFUSION_OLDEST_HOST_RUN"  # set while these tests run on the oldest host, which must not start another
MODEL_STORE = "PERFUSION_TEST_MODELS"  # a folder for test models that outlives the session

Prompt = dict[str, dict[str, Any]]
Link = Sequence[Any]  # (node id, output index)


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() == "true"


def missing(what: str, hint: str, *, required: bool | None = None) -> NoReturn:
    """Ends the running test: in CI (or where `required`) as a failure, for everybody else as a skip."""
    text = f"{what} not found: {hint}"
    if in_ci() if required is None else required:
        pytest.fail(text, pytrace=False)
    pytest.skip(text)


def main_host() -> Path:
    return find_comfyui() or missing("ComfyUI", "set COMFYUI_PATH to its folder")


def oldest_host() -> Path:
    """The oldest supported ComfyUI. Few people have two, so only COMFYUI_OLDEST_REQUIRED=1 makes it a must in CI."""
    folder = Path(os.environ.get("COMFYUI_OLDEST_PATH") or Path.home() / "comfy" / "ComfyUI-0.8.0").expanduser()
    if (folder / "main.py").is_file():
        return folder.resolve()
    required = in_ci() and os.environ.get("COMFYUI_OLDEST_REQUIRED") == "1"
    missing("the oldest supported ComfyUI (0.8.0)", "set COMFYUI_OLDEST_PATH to its folder", required=required)


def browser() -> str:
    return find_browser() or missing("Chromium", "install it, or set PERFUSION_BROWSER to its path")


def other_packs() -> dict[str, Path]:
    """Other people's packs to be tested with, by folder name: PERFUSION_TEST_PACKS, else ~/comfy/packs."""
    folder = Path(os.environ.get("PERFUSION_TEST_PACKS") or Path.home() / "comfy" / "packs").expanduser()
    return {path.name: path.resolve() for path in sorted(folder.glob("*/")) if (path / "__init__.py").is_file()}


class PromptError(RuntimeError):
    """The host refused a prompt, or a node failed.

    node_errors: node id -> what validation found; execution_error: the host's `execution_error` message.
    """

    def __init__(self, message: str, node_errors: dict | None = None, execution_error: dict | None = None):
        super().__init__(message)
        self.node_errors = node_errors or {}
        self.execution_error = execution_error or {}

    @classmethod
    def refused(cls, error: Any, node_errors: dict) -> PromptError:
        return cls(f"{json.dumps(error, default=str)} {json.dumps(node_errors, default=str)}", node_errors)

    @classmethod
    def failed(cls, messages: Sequence[tuple[str, dict]]) -> PromptError:
        """From the status messages of a run that did not succeed."""
        for name, data in reversed(messages):
            if name == "execution_interrupted":
                return PromptInterrupted("interrupted", execution_error=data)
            if name == "execution_error":
                trace = "".join(data.get("traceback", ()))
                text = f"{data['node_type']} ({data['node_id']}): {data['exception_message'].strip()}\n{trace}"
                return cls(text, execution_error=data)
        return cls(f"failed without a reason: {messages}")


class ServerPromptError(PromptError):
    """The same, from a server."""


class PromptInterrupted(ServerPromptError):
    """The run was canceled."""


@dataclass(frozen=True)
class Base:
    """A host's base directory of our own, with the pack (and maybe others) linked into its custom_nodes."""

    folder: Path
    store: Path  # where test models are kept, to be shared between the hosts of a session

    @classmethod
    def make(cls, folder: Path, store: Path, packs: dict[str, Path]) -> Base:
        for name in ("custom_nodes", "input", "output", "models", "user", "temp"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for name, source in {PACK_NAME: ROOT, **packs}.items():
            _link_folder(source, folder / "custom_nodes" / name)
        return cls(folder, store)

    def model(self, kind: str) -> str:
        """Makes sure that a test model (a key of MODEL_FILES) is there; returns its name for a loader node."""
        entry = MODEL_FILES[kind]
        kept = self.store / entry.name
        if not kept.exists():
            entry.write(kept)
        target = self.folder / "models" / entry.folder / entry.name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(kept, target)
            except OSError:  # another file system
                shutil.copy(kept, target)
        return entry.name


def _link_folder(source: Path, target: Path) -> None:
    if target.exists():
        return
    try:
        target.symlink_to(source, target_is_directory=True)
    except OSError:  # Windows without the right to
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*", "node_modules", "__pycache__"))


@dataclass
class Run:
    """One execution of a prompt in process.

    ui: node id -> what the node shows; events: every (name, data) sent to the front end, in order.
    """

    ui: dict[str, dict]
    kept: dict[tuple[str, int], Any]
    events: list[tuple[str, dict]]

    def __getitem__(self, link: tuple[str, int]) -> Any:
        """The value of an output that was asked for by `keep`."""
        return self.kept[link]

    @property
    def executed(self) -> set[str]:
        """Ids of the nodes that ran; the others came from the cache."""
        nodes = {str(data["node"]) for name, data in self.events if name == "executing" and data.get("node")}
        return {node for node in nodes if not node.startswith(KEEP_PREFIX)}


KEEP_NODE, KEEP_PREFIX = "PerfusionTestKeep", "keep:"
_kept: dict[str, Any] = {}


class _AnyType(str):
    def __ne__(self, other: object) -> bool:
        return False

    __eq__ = str.__eq__
    __hash__ = str.__hash__


class KeepNode:
    """An output node that puts whatever it is given where the test can read it."""

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"value": (_AnyType("*"),)}, "hidden": {"node": "UNIQUE_ID"}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        return float("nan")  # never equal to itself: never cached

    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "keep", True, "tests"

    def keep(self, value: Any, node: str) -> tuple:
        _kept[node] = value
        return ()


class ComfyHost:
    """A ComfyUI inside this process: one per process, because its modules are global.

    Models, inputs and outputs are below `base`; use it by the fixture `comfy_host`.
    """

    def __init__(self, comfyui: Path, base: Base):
        self.comfyui = comfyui
        self._base = base
        self._events: list[tuple[str, dict]] = []
        self._loop = asyncio.new_event_loop()
        self._cwd = Path.cwd()
        self._start()

    def _start(self) -> None:
        sys.path.insert(0, str(self.comfyui))
        os.chdir(self.comfyui)
        argv, sys.argv = sys.argv, ["main.py", *host_arguments(self._base.folder)]
        try:
            import comfy.options

            comfy.options.enable_args_parsing()
            import comfy.cli_args  # noqa: F401  reads sys.argv
        finally:
            sys.argv = argv
        import utils.extra_config  # noqa: F401, I001  before `nodes`, which makes `utils` mean comfy/utils.py
        import execution
        import server

        nodes: Any = importlib.import_module("nodes")  # ComfyUI's module: a type checker finds the pack's folder
        self._execution = execution
        asyncio.set_event_loop(self._loop)
        prompt_server = server.PromptServer(self._loop)
        # No socket and no running loop: what would go to the front end goes to the test.
        prompt_server.send_sync = lambda event, data, sid=None: self._events.append((event, data))
        self._loop.run_until_complete(nodes.init_extra_nodes(init_custom_nodes=True, init_api_nodes=False))
        nodes.NODE_CLASS_MAPPINGS[KEEP_NODE] = KeepNode
        self.nodes: dict[str, type] = nodes.NODE_CLASS_MAPPINGS
        self.server = prompt_server
        self.new_executor()
        # Collections behind every test and sampling would look through all that the host's modules made, too.
        gc.collect()
        gc.freeze()

    def close(self) -> None:
        import comfy.model_management

        # While the host's modules still exist: its patchers call them when they are deleted.
        del self._executor
        _kept.clear()
        comfy.model_management.unload_all_models()
        gc.unfreeze()
        gc.collect()
        os.chdir(self._cwd)
        asyncio.set_event_loop(None)
        self._loop.close()

    def new_executor(self) -> None:
        """Forgets everything that is cached between prompts."""
        arguments = {"lru": 0, "ram": 0, "ram_inactive": 0}
        self._executor = self._execution.PromptExecutor(self.server, cache_args=arguments)

    @property
    def base(self) -> Path:
        """The base directory: models, input, output, custom_nodes, user."""
        return self._base.folder

    def model(self, kind: str) -> str:
        """Makes sure that a test model (a key of MODEL_FILES) is there; returns its name for a loader node."""
        return self._base.model(kind)

    def module(self, name: str = "") -> ModuleType:
        """A module of the pack as the host loaded it: `host.module("perfusion.edit")`.

        Not the same object as `perfusion.edit` of a plain import: its classes differ.
        """
        package = str(self.base / "custom_nodes" / PACK_NAME).replace(".", "_x_")
        if package not in sys.modules:
            raise ImportError(f"the host could not load {PACK_NAME}: see the log above")
        return importlib.import_module(f".{name}", package) if name else sys.modules[package]

    def require_pack(self, pack: str, node: str) -> None:
        """Skips the test, in CI too, where another people's pack is not there or does not load on this host."""
        if pack not in other_packs():
            missing(pack, "put it into the folder PERFUSION_TEST_PACKS names", required=False)
        if node not in self.nodes:
            pytest.skip(f"{pack} does not load on this ComfyUI: no node {node}")

    def validate(self, prompt: Prompt, keep: Sequence[Link] = ()) -> list[str]:
        """Ids of the output nodes to run. Raises PromptError with the `node_errors`."""
        prompt = self._with_keepers(prompt, keep)
        return self._validate(prompt)

    def execute(self, prompt: Prompt, keep: Sequence[Link] = ()) -> Run:
        """Runs a prompt in API format. `keep` lists outputs, as (node id, index), to be read from the result.

        A prompt without output nodes is fine when something is kept. Outputs are cached between calls, as in the
        real thing. Raises PromptError.
        """
        prompt = self._with_keepers(prompt, keep)
        outputs = self._validate(prompt)
        self._events.clear()
        _kept.clear()
        self._executor.execute(prompt, str(uuid.uuid4()), {"client_id": "tests"}, outputs)
        events = list(self._events)
        if not self._executor.success:
            raise PromptError.failed(events)
        values = {(str(link[0]), link[1]): _kept[f"{KEEP_PREFIX}{link[0]}:{link[1]}"] for link in keep}
        return Run(self._executor.history_result["outputs"], values, events)

    def _validate(self, prompt: Prompt) -> list[str]:
        valid, error, outputs, node_errors = asyncio.run(
            self._execution.validate_prompt(str(uuid.uuid4()), prompt, None)
        )
        # The host runs the outputs that are valid and drops the others: in a test, every error counts.
        if not valid or node_errors:
            raise PromptError.refused(error, node_errors)
        return outputs

    @staticmethod
    def _with_keepers(prompt: Prompt, keep: Sequence[Link]) -> Prompt:
        keepers = {
            f"{KEEP_PREFIX}{link[0]}:{link[1]}": {"class_type": KEEP_NODE, "inputs": {"value": list(link)}}
            for link in keep
        }
        return {**copy.deepcopy(prompt), **keepers}


def host_arguments(base: Path) -> list[str]:
    """Command line of any ComfyUI the tests start: its own folders, no network, CPU unless PERFUSION_TEST_GPU=1."""
    device = [] if os.environ.get("PERFUSION_TEST_GPU") == "1" else ["--cpu"]
    database = ["--database-url", "sqlite:///:memory:"]
    return [*device, "--base-directory", str(base), "--disable-api-nodes", *database]


@dataclass(frozen=True)
class ServerOptions:
    """How to start a server: the parameter of the fixture `comfy_server`."""

    args: tuple[str, ...] = ()
    packs: bool = False  # link other people's packs too


@dataclass
class ComfyServer:
    """A real ComfyUI server in a process of its own; use it by the fixture `comfy_server`."""

    url: str
    log_path: Path
    _base: Base
    pid: int
    client_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def base(self) -> Path:
        """The base directory: models, input, output, custom_nodes, user."""
        return self._base.folder

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def model(self, kind: str) -> str:
        """Makes sure that a test model (a key of MODEL_FILES) is there; returns its name for a loader node."""
        return self._base.model(kind)

    def request(self, path: str, payload: Any = None, timeout: float = 30) -> bytes:
        """GET, or POST of `payload` as JSON. Raises urllib.error.HTTPError."""
        body = None if payload is None else json.dumps(payload).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.read()

    def get(self, path: str) -> Any:
        """The JSON at a path such as /object_info/KSampler."""
        return json.loads(self.request(path))

    def post(self, path: str, payload: Any) -> Any:
        return json.loads(self.request(path, payload) or b"null")

    def interrupt(self) -> None:
        self.request("/interrupt", {})

    def submit(self, prompt: Prompt) -> str:
        """Queues a prompt; returns its id at once. Raises ServerPromptError with the `node_errors`."""
        try:
            answer = self.post("/prompt", {"prompt": prompt, "client_id": self.client_id})
        except urllib.error.HTTPError as error:
            with error:
                refusal = json.loads(error.read())
            raise ServerPromptError.refused(refusal.get("error"), refusal.get("node_errors", {})) from None
        if answer.get("node_errors"):
            raise ServerPromptError.refused("some outputs are invalid", answer["node_errors"])
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 300) -> dict:
        """The history entry of a submitted prompt when it is done. Raises ServerPromptError."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if entry := self.get(f"/history/{prompt_id}").get(prompt_id):
                if entry["status"]["status_str"] != "success":
                    raise ServerPromptError.failed(entry["status"]["messages"])
                return entry
            time.sleep(0.1)
        raise TimeoutError(f"prompt still running after {timeout} s; the server's log ends:\n{self.log[-3000:]}")

    def queue(self, prompt: Prompt, timeout: float = 300) -> dict:
        """Queues a prompt and waits: its history entry, with "outputs" and "status"."""
        return self.wait(self.submit(prompt), timeout)


@contextlib.contextmanager
def running_server(comfyui: Path, base: Base, options: ServerOptions, timeout: float = 180) -> Iterator[ComfyServer]:
    """Starts a server on a free port, waits until it answers, and ends it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "main.py", *host_arguments(base.folder), "--disable-auto-launch"]
    command += ["--listen", "127.0.0.1", "--port", str(port), *options.args]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    log_path = base.folder / "server.log"
    with open(log_path, "wb") as log:
        process = subprocess.Popen(command, cwd=comfyui, env=environment, stdout=log, stderr=subprocess.STDOUT)
    server = ComfyServer(f"http://127.0.0.1:{port}", log_path, base, process.pid)
    try:
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(OSError):
                server.get("/system_stats")
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{server.log[-5000:]}")
            time.sleep(0.2)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
