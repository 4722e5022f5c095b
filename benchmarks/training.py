"""Time and memory of a training, against ComfyUI's own LoRA trainer and against each of our savings undone.

    python -m benchmarks.training [--rounds N] [--steps N] [--pixels N] [--only NAME ...] [--json]

Each variant runs in a process of its own, since memory has no other reset, and all take turns, in a new order each
round. Both trainers get the same SD1.5 checkpoint with a reduced UNet and a full-size CLIP, the same pixels, 32 bit and
the same threads. A variant's time is that of its optimizer steps alone, without loading; its ratio is the median over
the rounds of its time divided by the other's in the same round. Memory is the peak of the process, model included.

A row of the table is our trainer at batch 4 with one thing changed: above 1, the change costs time or memory.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from .host import comfyui, now, peak_bytes, say

WORD, KIND = "<my-teddy>", "teddy bear"
PHOTOS = 4
# variant -> batch size
LORA = {"lora_batch1": 1, "lora_batch4": 4, "lora_checkpointed_batch4": 4}
OURS = {"ours_batch1": 1, "ours_batch4": 4}
TABLE = {
    "photos encoded each step": "latents are not kept",
    "prompts encoded each sample": "one encoding for each sample, as a loop over samples has it",
    "micro batches of 1": "the batch one after the other",
    "products by MKL": "linear layers as torch computes them on CPUs",
    "encoders as stored": "their half precision is converted at each use",
    "kept for frozen weights": "layers keep what gradients of weights would need",
    "gradients of frozen weights": "weights are not told that nobody trains them",
    "fused attention": "the kernel for all maps of attention",
    "plain attention": "products and a softmax for all maps of attention",
    "gradient checkpointing": "activations are computed again",
    "channels last": "convolutions in the other memory layout",
    "compiled": "torch.compile",
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns of all variants (%(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each turn, after two others (%(default)s)")
    parser.add_argument("--pixels", type=int, default=256, help="width and height of photos (%(default)s)")
    parser.add_argument("--only", nargs="+", help="these variants", choices=[*LORA, *OURS, *TABLE], metavar="NAME")
    parser.add_argument("--json", action="store_true", help="one JSON line")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        with comfyui() as pack:
            print(json.dumps(run_one(pack, options.one, options.steps, options.pixels)))
        return
    names = options.only or [*LORA, *OURS, *TABLE]
    figures = compare(names, options.rounds, options.steps, options.pixels)
    if options.json:
        print(json.dumps(figures))
        return
    for kind, batches in (("time", figures["time_ratio"]), ("memory", figures["memory_ratio"])):
        for batch, ratio in batches.items():
            print(f"ours over LoRA, {kind}, {batch}: {ratio:.3f}")
    for name, row in figures["table"].items():
        print(f"{name:<28} time {row['time']:.3f}   memory {row['memory']:.3f}")


def compare(names: list[str], rounds: int, steps: int, pixels: int) -> dict[str, Any]:
    """All figures, from ``rounds`` turns of each variant. A variant that fails stands in ``failed`` with its reason."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, list[float]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    facts: dict[str, Any] = {}
    order, shuffled = list(names), random.Random(0)
    for number in range(rounds):
        shuffled.shuffle(order)
        for name in [name for name in order if name not in failed]:
            command = [sys.executable, "-m", "benchmarks.training", "--one", name]
            command += ["--steps", str(steps), "--pixels", str(pixels)]
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            if found.returncode:
                failed[name] = next(iter(found.stderr.strip().splitlines()[-1:]), "no reason given")
                say(f"round {number + 1} of {rounds}, {name}: {failed[name]}")
                continue
            one = json.loads(found.stdout.splitlines()[-1])
            facts = one["facts"]
            seconds[name].append(one["seconds_per_sample"])
            memory[name].append(one["peak_bytes"])
            say(
                f"round {number + 1} of {rounds}, {name}: {seconds[name][-1]:.3f} s a sample, "
                f"{memory[name][-1] / 2**30:.2f} GiB"
            )

    def ratio(what: dict[str, list[float]], a: str, b: str) -> float | None:
        if not (what.get(a) and what.get(b)):
            return None
        return round(statistics.median(x / y for x, y in zip(what[a], what[b], strict=True)), 4)

    def ratios(what: dict[str, list[float]]) -> dict[str, float]:
        pairs = {
            "batch1": ("ours_batch1", "lora_batch1"),
            "batch4": ("ours_batch4", "lora_batch4"),
            "batch4_lora_checkpointed": ("ours_batch4", "lora_checkpointed_batch4"),
        }
        found = {name: ratio(what, *pair) for name, pair in pairs.items()}
        return {name: value for name, value in found.items() if value is not None}

    table = {}
    for name in TABLE:
        row = {"time": ratio(seconds, name, "ours_batch4"), "memory": ratio(memory, name, "ours_batch4")}
        if None not in row.values():
            table[name] = {**row, "what": TABLE[name]}
    return {
        "time_ratio": ratios(seconds),
        "memory_ratio": ratios(memory),
        "table": table,
        "seconds_per_sample": {name: round(statistics.median(s), 4) for name, s in seconds.items() if s},
        "peak_gib": {name: round(statistics.median(m) / 2**30, 3) for name, m in memory.items() if m},
        "failed": failed,
        "rounds": rounds,
        "steps": steps,
        "pixels": pixels,
        **facts,
    }


def run_one(pack: Any, name: str, steps: int, pixels: int) -> dict[str, Any]:
    """One variant in this process: seconds of a sample, and the peak of memory."""
    loaded = pack.nodes["CheckpointLoaderSimple"]().load_checkpoint(pack.model("checkpoint"))
    model, clip, vae = loaded[:3]
    photos = torch.rand(PHOTOS, pixels, pixels, 3, generator=torch.Generator().manual_seed(0))
    work = _lora if name in LORA else _ours
    batch, ends = work(pack, name, steps + 2, photos, model, clip, vae)
    taken = [after - before for before, after in zip(ends, ends[1:], strict=False)]
    return {
        "seconds_per_sample": statistics.median(taken[-steps:]) / batch,
        "peak_bytes": peak_bytes(),
        "facts": {
            "model": "SD1.5 with a reduced UNet and a full-size CLIP, random weights",
            "threads": torch.get_num_threads(),
            "device": str(model.load_device),
            "torch": torch.__version__,
        },
    }


def _forget_peak() -> None:
    """Let memory be counted from here on: loading a checkpoint may take more than any training."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def _lora(
    pack: Any, name: str, steps: int, photos: torch.Tensor, model: Any, clip: Any, vae: Any
) -> tuple[int, list[float]]:
    """ComfyUI's node, as a graph runs it: latents and prompts are encoded before, by others. Batch, ends of steps."""
    import comfy.utils

    node, batch = pack.nodes["TrainLoraNode"], LORA[name]
    with torch.inference_mode():
        latents = {"samples": vae.encode(photos)}
        positive = clip.encode_from_tokens_scheduled(clip.tokenize(f"a photo of a {KIND}"))
    settings = {
        **{
            entry.id: entry.default for entry in node.GET_SCHEMA().inputs if getattr(entry, "default", None) is not None
        },
        "batch_size": batch,
        "steps": steps,
        "training_dtype": "fp32",
        "lora_dtype": "fp32",
        "gradient_checkpointing": "checkpointed" in name,
    }
    ends: list[float] = []
    comfy.utils.set_progress_bar_global_hook(lambda *_, **__: ends.append(now()))
    _forget_peak()
    with torch.inference_mode():
        node.execute([model], [latents], [positive], **{key: [value] for key, value in settings.items()})
    comfy.utils.set_progress_bar_global_hook(None)
    return batch, ends[-steps:]


def _ours(
    pack: Any, name: str, steps: int, photos: torch.Tensor, model: Any, clip: Any, vae: Any
) -> tuple[int, list[float]]:
    """Our trainer. Batch, ends of steps."""
    batch = OURS.get(name, 4)
    measured = pack.module("perfusion.statistics")
    trainer_module = pack.module("perfusion.training.trainer")
    host = pack.module("perfusion.hosts.comfyui.training").ComfyHost(model, clip, vae)
    prepared = pack.module("perfusion.training.dataset").prepare(host, photos, None, photos.shape[1])
    config = pack.module("perfusion.training.config").TrainingConfig(
        steps=steps,
        batch_size=batch,
        micro_batch=1 if name == "micro batches of 1" else 0,
        resolution=photos.shape[1],
        contexts=8,
        gradient_checkpointing=name == "gradient checkpointing",
    )
    width = host.family.context_width
    moment = measured.TextStatistics(torch.eye(width, dtype=torch.float64), 1, 1, 0.0, host.fingerprint)
    ends = []
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())  # as nodes run
        stack.enter_context(host.training(gradient_checkpointing=config.gradient_checkpointing))
        trainer = trainer_module.Trainer(host, prepared, trainer_module.Subject(WORD, KIND), moment, config)
        if name in _CHANGES:
            stack.enter_context(_CHANGES[name](pack, host, trainer, photos))
        _forget_peak()
        for _ in range(steps):
            trainer.step()
            ends.append(now())
    return batch, ends


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _photos_each_step(pack: Any, host: Any, trainer: Any, photos: torch.Tensor) -> Iterator[None]:
    pick = type(trainer.photos).pick

    def encoding(self: Any, index: torch.Tensor, flipped: torch.Tensor) -> Any:
        for number, mirrored in zip(index.tolist(), flipped.tolist(), strict=True):
            photo = photos[number : number + 1]
            host._vae.encode(photo.flip(2) if mirrored else photo)
        return pick(self, index, flipped)

    with _attribute(type(trainer.photos), "pick", encoding):
        yield


@contextmanager
def _prompts_each_sample(pack: Any, host: Any, trainer: Any, photos: torch.Tensor) -> Iterator[None]:
    encoded = pack.module("perfusion.hosts.base").Encodings

    class EachSample:
        def __init__(self, encode: Callable[[list[str]], Any], texts: dict[int, str], *_: Any, **__: Any):
            self._encode, self._texts = encode, texts

        def of(self, numbers: torch.Tensor) -> Any:
            return encoded.joined([self._encode([self._texts[number]]) for number in numbers.tolist()])

        def backward(self) -> None:
            """Each part has gone through the encoder already."""

    with _attribute(pack.module("perfusion.training.trainer"), "EncodedPrompts", EachSample):
        yield


@contextmanager
def _encoders_as_stored(pack: Any, host: Any, trainer: Any, photos: torch.Tensor) -> Iterator[None]:
    """The numbers are those of half precision, so that they fit in it again."""
    layers = [module for module in host.clip.cond_stage_model.modules() if isinstance(module, torch.nn.Linear)]
    with ExitStack() as stack:
        for layer in layers:
            before = layer.weight.data
            layer.weight.data = before.half()
            stack.callback(setattr, layer.weight, "data", before)
        yield


@contextmanager
def _products_by_mkl(pack: Any, host: Any, trainer: Any, photos: torch.Tensor) -> Iterator[None]:
    with _attribute(pack.module("perfusion.hosts.frozen"), "_by_onednn", lambda x: False):
        yield


@contextmanager
def _kept_for_frozen_weights(pack: Any, host: Any, trainer: Any, photos: torch.Tensor) -> Iterator[None]:
    with _attribute(pack.module("perfusion.hosts.frozen"), "frozen", lambda module, x: type(module).forward(module, x)):
        yield


@contextmanager
def _gradients_of_frozen_weights(pack: Any, host: Any, trainer: Any, photos: torch.Tensor) -> Iterator[None]:
    networks = (host.model.model.diffusion_model, host.clip.cond_stage_model)
    for network in networks:
        network.requires_grad_(True)
    try:
        yield
    finally:
        for network in networks:
            network.requires_grad_(False)


def _attention(kernel: str) -> Any:
    @contextmanager
    def change(pack: Any, host: Any, trainer: Any, photos: torch.Tensor) -> Iterator[None]:
        import comfy.ldm.modules.attention

        def alone(chosen: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return getattr(comfy.ldm.modules.attention, kernel)(*args, **kwargs)

        with _attribute(pack.module("perfusion.hosts.comfyui.training"), "_differentiable_attention", alone):
            yield

    return change


@contextmanager
def _channels_last(pack: Any, host: Any, trainer: Any, photos: torch.Tensor) -> Iterator[None]:
    host.model.model.diffusion_model.to(memory_format=torch.channels_last)
    yield


@contextmanager
def _compiled(pack: Any, host: Any, trainer: Any, photos: torch.Tensor) -> Iterator[None]:
    network = host.model.model.diffusion_model
    with _attribute(network, "forward", torch.compile(network.forward, dynamic=False)):
        yield


_CHANGES: dict[str, Any] = {
    "photos encoded each step": _photos_each_step,
    "prompts encoded each sample": _prompts_each_sample,
    "encoders as stored": _encoders_as_stored,
    "kept for frozen weights": _kept_for_frozen_weights,
    "gradients of frozen weights": _gradients_of_frozen_weights,
    "products by MKL": _products_by_mkl,
    "fused attention": _attention("attention_pytorch"),
    "plain attention": _attention("attention_basic"),
    "channels last": _channels_last,
    "compiled": _compiled,
}


if __name__ == "__main__":
    main()
