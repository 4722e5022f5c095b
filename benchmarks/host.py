"""A ComfyUI in this process, and models with random weights of real shapes, for benchmarks."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.hosts import Base, ComfyHost, find_comfyui


def say(text: str) -> None:
    """Progress, for the person who started the command."""
    print(text, file=sys.stderr, flush=True)


def now() -> float:
    """Seconds, when all that a GPU was given is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes() -> int:
    """The most memory that was held so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def comfyui() -> Iterator[ComfyHost]:
    """ComfyUI with the pack loaded. Ends the program with one clear line where there is none."""
    folder = find_comfyui()
    if folder is None:
        sys.exit("This benchmark needs ComfyUI: set COMFYUI_PATH to its folder.")
    with tempfile.TemporaryDirectory() as temporary:
        base = Base.make(Path(temporary) / "base", Path(temporary) / "models", {})
        host = ComfyHost(folder, base)
        import comfy.utils

        comfy.utils.set_progress_bar_enabled(False)
        try:
            yield host
        finally:
            host.close()


def random_unet(full: bool, seed: int = 0) -> Any:
    """A MODEL with the UNet of SD1.5, or with two of its four levels, random weights, in memory."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    shape = (
        {
            "channel_mult": [1, 2, 4, 4],
            "num_res_blocks": [2, 2, 2, 2],
            "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
            "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        }
        if full
        else {
            "channel_mult": [1, 1],
            "num_res_blocks": [1, 1],
            "transformer_depth": [1, 1],
            "transformer_depth_output": [1, 1, 1, 1],
        }
    )
    config = comfy.supported_models.SD15(
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 320,
            "transformer_depth_middle": 1,
            "context_dim": 768,
            "use_spatial_transformer": True,
            "use_linear_in_transformer": False,
            "use_temporal_attention": False,
            "use_temporal_resblock": False,
            "adm_in_channels": None,
            "legacy": False,
            "use_checkpoint": False,
            **shape,
        }
    )
    config.unet_config["num_heads"] = 8
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.diffusion_model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(0.0)
        for module in model.diffusion_model.modules():
            if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
                module.weight.fill_(1.0)
    return comfy.model_patcher.ModelPatcher(
        model.eval(),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def random_concepts(pack: ComfyHost, model: Any, count: int) -> Any:
    """A stack of concepts of random numbers that fit a model, of no use but for timing."""
    structure, family = pack.module("perfusion.hosts.comfyui.structure"), pack.module("perfusion.family")
    concept, stack = pack.module("perfusion.concept"), pack.module("perfusion.stack")
    config = pack.module("perfusion.training.config").TrainingConfig
    transformers: dict[str, tuple[int, int]] = {}
    for layer, _, to_v in structure.projections(model.model.diffusion_model):
        transformers[layer.rpartition(".transformer_blocks.")[0]] = (1, to_v.weight.shape[0])
    shape = family.Family("sd1", 768, {"clip_l": 768}, transformers)
    generator = torch.Generator().manual_seed(1)
    uses = []
    for number in range(count):
        i_star = torch.randn(768, generator=generator)
        uses.append(
            stack.ConceptUse(
                concept.Concept.rounded(
                    family=shape,
                    placeholder=f"<concept-{number}>",
                    super_category="thing",
                    embeddings={"clip_l": torch.randn(1, 768, generator=generator)},
                    i_star=i_star,
                    d_star=i_star / i_star.abs().max(),
                    e_super=torch.randn(768, generator=generator),
                    e_key=torch.randn(768, generator=generator),
                    o_star_v={n: torch.randn(w, generator=generator) for n, w in shape.layers.items()},
                    anchored=True,
                    scope=config.scope,
                    focus=config.focus,
                )
            )
        )
    return stack.ConceptStack(tuple(uses))
