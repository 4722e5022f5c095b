"""Makes the development environment `.venv`, with nothing but the standard library.

    python tools/setup_env.py             what the pure tests and the demo need
    python tools/setup_env.py --comfyui   and what a ComfyUI found on this machine needs, and a browser

It says what it does. A stamp in the environment holds a hash of everything that went into it, so a second run with
nothing changed returns at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHIM = ROOT / "tools" / "torchvision_cpu_shim.py"
TORCH = "torch==2.13.0"
TORCH_COMPANIONS = {"torchvision": "0.28.0", "torchaudio": "2.11.0"}
# The peer whose equations ours are tested against. Without dependencies: open_clip and its models are never used.
PEER = "perfusion-pytorch==0.1.23"
# Of a ComfyUI's requirements: torch and its companions are installed here, comfy-angle only serves GLSL nodes.
NOT_FROM_COMFYUI = {"torch", "torchvision", "torchaudio", "comfy-angle"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def find_comfyui() -> Path | None:
    """The ComfyUI folder: COMFYUI_PATH, else the one this pack is installed in, else ~/comfy/ComfyUI."""
    if configured := os.environ.get("COMFYUI_PATH"):
        candidates = [Path(configured).expanduser()]
    else:
        candidates = [ROOT.parent.parent, Path.home() / "comfy" / "ComfyUI"]
    for folder in candidates:
        if (folder / "main.py").is_file() and (folder / "comfy").is_dir():
            return folder.resolve()
    return None


def find_browser() -> str | None:
    """A Chromium: PERFUSION_BROWSER, else the first one on PATH."""
    if configured := os.environ.get("PERFUSION_BROWSER"):
        return shutil.which(configured)
    return next(filter(None, map(shutil.which, BROWSERS)), None)


class Environment:
    def __init__(self, folder: Path):
        self.folder = folder
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        self._stamp = folder / "perfusion-setup.json"

    def stamps(self) -> dict[str, str]:
        try:
            return json.loads(self._stamp.read_text())
        except (OSError, ValueError):
            return {}

    def stamp(self, step: str, digest: str) -> None:
        self._stamp.write_text(json.dumps({**self.stamps(), step: digest}, indent=2) + "\n")

    def run(self, *arguments: str) -> None:
        subprocess.run([str(self.python), *arguments], check=True, cwd=ROOT)

    def pip(self, *arguments: str) -> None:
        say(f"pip install {' '.join(arguments)}")
        self.run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments)

    def answers(self, code: str) -> str | None:
        """What `code` prints, or None where it fails."""
        # Outside the repository, whose folders must not shadow what is installed.
        result = subprocess.run(
            [str(self.python), "-c", code], capture_output=True, text=True, cwd=tempfile.gettempdir()
        )
        return result.stdout.strip() if result.returncode == 0 else None

    def install_pure(self) -> None:
        if not self.python.exists():
            say(f"creating {self.folder}")
            subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=True)
        self.pip(TORCH)  # first and alone: nothing that follows may choose another one
        self.pip("-e", ".[demo,dev]", TORCH)
        self.pip("--no-deps", PEER)

    def install_comfyui(self, comfyui: Path) -> None:
        say(f"requirements of the ComfyUI in {comfyui}")
        self.pip(*comfyui_requirements(comfyui), TORCH, "requests")
        # --no-deps: each of them pins the torch it was built with, but works with the one that is here.
        self.pip("--no-deps", *(f"{name}=={version}" for name, version in TORCH_COMPANIONS.items()))
        if self.answers("import torch; print(torch.version.cuda)") == "None":
            self.mend_torch_companions()

    def mend_torch_companions(self) -> None:
        """Makes CUDA builds of torchvision and torchaudio importable beside CPU torch."""
        packages = Path(self.answers("import sysconfig; print(sysconfig.get_paths()['purelib'])") or "")
        if self.answers("import torchvision") is None:
            say("torchvision is a CUDA build, torch is not: installing tools/torchvision_cpu_shim.py")
            shutil.copy(SHIM, packages / SHIM.name)
            (packages / f"{SHIM.stem}.pth").write_text(f"import {SHIM.stem}\n")
        if self.answers("import torchaudio") is None:
            say("torchaudio is a CUDA build, torch is not: removing its libraries, it has Python code for the same")
            for library in (packages / "torchaudio" / "lib").glob("*.so"):
                library.unlink()
        for name in TORCH_COMPANIONS:
            if self.answers(f"import {name}") is None:
                raise SystemExit(f"[setup] {name} cannot be imported: run {self.python} -c 'import {name}' to see why")


def comfyui_requirements(comfyui: Path) -> list[str]:
    lines = (line.split("#")[0].strip() for line in (comfyui / "requirements.txt").read_text().splitlines())
    name = re.compile(r"[A-Za-z0-9._-]+")
    return [line for line in lines if (match := name.match(line)) and match[0].lower() not in NOT_FROM_COMFYUI]


def provide_browser() -> None:
    if browser := find_browser():
        say(f"browser: {browser}")
        return
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    if sys.platform.startswith("linux") and is_root and shutil.which("apt-get"):
        say("no Chromium found, and this is root on Linux: apt-get install chromium")
        for command in (["apt-get", "update"], ["apt-get", "install", "--yes", "chromium"]):
            subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    if not find_browser():
        say("no Chromium found: install one, or set PERFUSION_BROWSER to its path, to run the browser tests")


def digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", action="store_true", help="also what ComfyUI and the browser tests need")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="where the environment lies (%(default)s)")
    parser.add_argument("--where", action="store_true", help="only print the ComfyUI folder that would be used")
    options = parser.parse_args()
    if options.where:
        print(find_comfyui() or "")
        return

    environment = Environment(options.venv.absolute())
    stamps = environment.stamps()
    inputs = [path.read_text() for path in (Path(__file__), SHIM, ROOT / "pyproject.toml")]
    pure = digest(sys.version, environment.folder, *inputs)
    if stamps.get("pure") != pure:
        environment.install_pure()
        environment.stamp("pure", pure)
    if options.comfyui:
        provide_browser()
        comfyui = find_comfyui()
        if comfyui is None:
            say("no ComfyUI found: set COMFYUI_PATH to its folder to run the tests that need it")
        else:
            full = digest(pure, *comfyui_requirements(comfyui))
            if stamps.get("comfyui") != full:
                environment.install_comfyui(comfyui)
                environment.stamp("comfyui", full)
    say(f"ready: {environment.python}")


if __name__ == "__main__":
    main()
