"""How large a concept's file is for each family, and what storing target values in 8 bits costs.

    python -m benchmarks.sizes [--json]

"files": the cross-attention layers of the true networks, read off ComfyUI's own classes without allocating a weight,
and the bytes of a file that was written with as many random values, a summary of a training in it and no thumbnail.

"error": relative error (root of the mean square) that storage makes, mean and largest over the layers of the true SDXL,
of o*_V itself and of the edited values at the concept's word, computed by the edit in use. Drawn so: W_V from a normal
distribution of variance 1 / d, "even"; or each of its rows times exp(0.7 n), "uneven", so that single channels are far
larger than others; e_super, normal; o*_V = W_V e_super plus a learned change, normal, half the root mean square of W_V
e_super; i* = e_super plus 0.3 times normal noise, the word's encoding the same around i*. "even_steps" are what 8 bits
are usually spent on, a layer's largest value over 127, and here for comparison.

"prediction": of a reduced SDXL of random weights, how far storage moves the noise it predicts, relative to that noise
and to how far the whole concept moves it; mean and largest over noise levels and draws.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.concepts import TEDDY, make_concept
from tests.models import load_reduced, reduced_sdxl

from .host import comfyui, say

# What tells the networks apart, as their makers published it: v1-inference, v2-inference-v and sd_xl_base.
_LEVELS_SD = {"channel_mult": [1, 2, 4, 4], "attention_resolutions": [4, 2, 1], "transformer_depth": 1}
_LEVELS_XL = {"channel_mult": [1, 2, 4], "attention_resolutions": [4, 2], "transformer_depth": [1, 2, 10]}
_HEADS_64 = {"num_head_channels": 64, "use_linear_in_transformer": True}
_XL = {"context_dim": 2048, "num_classes": "sequential", "adm_in_channels": 2816, **_HEADS_64}
NETWORKS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "sd1": ({**_LEVELS_SD, "context_dim": 768, "num_heads": 8}, {"clip_l": 768}),
    "sd2": ({**_LEVELS_SD, "context_dim": 1024, **_HEADS_64}, {"clip_h": 1024}),
    "sdxl": ({**_LEVELS_XL, **_XL}, {"clip_l": 768, "clip_g": 1280}),
}
STORAGES = ("half", "8bit")
_STEPS = (20, 250, 500, 750, 980)
_DRAWS = 3
Rounding = Callable[[Sequence[Tensor]], list[Tensor]]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sizes", description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON line")
    options = parser.parse_args()
    with comfyui() as pack, torch.inference_mode():
        families = {name: family(pack, name) for name in NETWORKS}
        figures = {
            "files": {name: sizes(pack, families[name], pack.base / "sizes") for name in NETWORKS},
            "error": {
                drawn: errors(pack, families["sdxl"], spread) for drawn, spread in (("even", 0.0), ("uneven", 0.7))
            },
            "prediction": prediction(pack),
        }
    if options.json:
        print(json.dumps(figures))
    else:
        show(figures)


def family(pack: Any, name: str) -> Any:
    """The Family of a true network, whose weights are never allocated."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.model_detection import convert_config

    structure, families = pack.module("perfusion.hosts.comfyui.structure"), pack.module("perfusion.family")
    settings, encoders = NETWORKS[name]
    common = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": 2}
    network = UNetModel(
        **convert_config({**common, **settings}), use_spatial_transformer=True, legacy=False, device="meta"
    )
    transformers: dict[str, tuple[int, int]] = {}
    for layer, _, to_v in structure.projections(network):
        transformer = layer.rpartition(".transformer_blocks.")[0]
        transformers[transformer] = (transformers.get(transformer, (0, 0))[0] + 1, to_v.out_features)
    return families.Family(name, settings["context_dim"], encoders, transformers)


def sizes(pack: Any, shape: Any, folder: Path) -> dict[str, Any]:
    """Layers, values, the family's own storage, and for each storage the bytes of tensors and of a written file."""
    module, config = pack.module("perfusion.concept"), pack.module("perfusion.training.config")
    draw = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw)

    i_star = normal(shape.context_width)
    fields = {
        "family": shape,
        "placeholder": TEDDY,
        "super_category": "teddy bear",
        "embeddings": {name: 0.02 * normal(1, width) for name, width in shape.encoders.items()},
        "i_star": i_star,
        "d_star": i_star / i_star.abs().max(),
        "e_super": normal(shape.context_width),
        "e_key": normal(shape.context_width),
        "o_star_v": {layer: normal(width) for layer, width in shape.layers.items()},
        "anchored": True,
        "scope": config.TrainingConfig.scope,
        "focus": config.TrainingConfig.focus,
        "training": {
            **asdict(config.TrainingConfig()),
            "steps_done": 200,
            "photos": 5,
            "fixed_loss": [0.123456, 0.098765],
        },
    }
    found: dict[str, Any] = {
        "layers": len(shape.layers),
        "values": sum(shape.layers.values()),
        "storage": module.Concept.rounded(**fields).storage,
    }
    for storage in STORAGES:
        concept = module.Concept.rounded(**{**fields, "storage": storage})
        path = concept.save(folder / f"{shape.name}-{storage}.safetensors")
        tensors = sum(tensor.numel() * tensor.element_size() for tensor in concept.tensors.values())
        found[storage] = {"tensors": tensors, "file": path.stat().st_size}
    return found


def roundings(pack: Any) -> dict[str, Rounding]:
    """Each way to store the values of some layers -> what comes back of them."""

    def even_steps(layers: Sequence[Tensor]) -> list[Tensor]:
        scales = [(values.abs().max() / 127).half().float() for values in layers]
        return [(values / scale).round() * scale for values, scale in zip(layers, scales, strict=True)]

    return {
        "half": lambda layers: [values.half().float() for values in layers],
        "8bit": pack.module("perfusion.quantization").rounded,
        "even_steps": even_steps,
    }


def errors(pack: Any, shape: Any, spread: float) -> dict[str, Any]:
    """By rounding: the relative error of o*_V and of the edited values at the word, over the layers."""
    say(f"target values of {len(shape.layers)} layers, rows of W_V differing by exp({spread} n)")
    ways = roundings(pack)
    seen: dict[str, dict[str, list[float]]] = {name: {"o_star_v": [], "edited": []} for name in ways}
    for exact, project in drawn_layers(pack, shape, spread):
        edited = project(exact)
        for name, way in ways.items():
            (stored,) = way([exact])
            seen[name]["o_star_v"].append(relative(stored, exact))
            seen[name]["edited"].append(relative(project(stored), edited))
    return {name: {what: summary(values) for what, values in found.items()} for name, found in seen.items()}


def drawn_layers(pack: Any, shape: Any, spread: float) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """o*_V (i,) of each layer, and what makes edited values (i,) at the word of any such vector."""
    edit = pack.module("perfusion.edit")
    draw, d = torch.Generator().manual_seed(1), shape.context_width

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw)

    e_super = normal(d)
    i_star = e_super + 0.3 * normal(d)
    context = torch.cat([i_star + 0.3 * normal(1, d), normal(7, d)]).unsqueeze(0)
    directions = edit.Directions.of(i_star.unsqueeze(0), i_star.unsqueeze(0), [edit.Gate()], ["paper"])
    for layer, width in shape.layers.items():
        weight = normal(width, d) * d**-0.5 * torch.exp(spread * normal(width, 1))
        plain = weight @ e_super
        exact = plain + 0.5 * plain.square().mean().sqrt() * normal(width)

        def project(values: Tensor, layer: str = layer, weight: Tensor = weight) -> Tensor:
            one = edit.KeyValueEdit(directions, e_super.unsqueeze(0), {layer: values.unsqueeze(0)})
            return one.project(layer, "v", context, lambda tokens: tokens @ weight.T)[0, 0]

        yield exact, project


def prediction(pack: Any) -> dict[str, Any]:
    """By rounding: how far it moves the noise that a reduced SDXL predicts."""
    say("writing a reduced SDXL of random weights, 560 MB, and predicting noise with it")
    model, clip, vae = vars(load_reduced(reduced_sdxl(pack.base / "reduced_sdxl.safetensors"))).values()
    host = pack.module("perfusion.hosts.comfyui.training").ComfyHost(model, clip, vae)
    word, stack = pack.module("perfusion.hosts.base").Word, pack.module("perfusion.stack")
    concept, draw = make_concept(pack, model, clip), torch.Generator().manual_seed(2)
    plain = host.project_values(concept.e_super.unsqueeze(0))
    exact = {
        layer: v.squeeze(0).cpu() + 0.5 * v.square().mean().sqrt().cpu() * torch.randn(v.shape[-1], generator=draw)
        for layer, v in plain.items()
    }

    def edit(values: Mapping[str, Tensor]) -> Any:
        return stack.ConceptStack((stack.ConceptUse(replace(concept, o_star_v=values)),)).edit()

    ways = roundings(pack)
    edits = {name: edit(dict(zip(exact, way(list(exact.values())), strict=True))) for name, way in ways.items()}
    of_noise: dict[str, list[float]] = {name: [] for name in ways}
    of_concept: dict[str, list[float]] = {name: [] for name in ways}
    with host.training(), torch.no_grad():
        text = host.encode([f"a photo of a {TEDDY} on the beach"], word(TEDDY, "teddy bear", concept.embeddings))
        for step in _STEPS:
            sigma = host.noise_levels()[step].view(1)
            for _ in range(_DRAWS):
                noisy = (1 + sigma**2).sqrt() * torch.randn(1, 4, 16, 16, generator=draw)

                def noise(used: Any, noisy: Tensor = noisy, sigma: Tensor = sigma) -> Tensor:
                    return (noisy - host.denoise(noisy, sigma, text, used).float().cpu()) / sigma

                right, without = noise(edit(exact)), noise(None)
                for name, used in edits.items():
                    moved = noise(used) - right
                    of_noise[name].append(float(moved.norm() / right.norm()))
                    of_concept[name].append(float(moved.norm() / (right - without).norm()))
    return {name: {"of_noise": summary(of_noise[name]), "of_concept": summary(of_concept[name])} for name in ways} | {
        "layers": len(exact),
        "levels": len(_STEPS),
        "draws": _DRAWS,
    }


def relative(found: Tensor, right: Tensor) -> float:
    """The error's norm over the right one's."""
    return float((found.double() - right.double()).norm() / right.double().norm())


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean and largest, to three digits."""
    return {"mean": float(f"{statistics.mean(values):.3g}"), "max": float(f"{max(values):.3g}")}


def show(figures: Mapping[str, Any]) -> None:
    """The figures as tables."""
    print("family  layers  values   storage   tensors      file")
    for name, found in figures["files"].items():
        for storage in STORAGES:
            mark = "*" if storage == found["storage"] else " "
            print(
                f"{name:7} {found['layers']:>5} {found['values']:>8,}  {storage:>5} {mark} "
                f"{found[storage]['tensors']:>9,} {found[storage]['file']:>9,}"
            )
    print("* what the family uses; a vector more of the word adds its embedding\n")
    print("relative error, SDXL            mean      max")
    for drawn, ways in figures["error"].items():
        for name, found in ways.items():
            for what, label in (("o_star_v", "o*_V"), ("edited", "edited")):
                print(f"{drawn:7} {name:10} {label:7} {found[what]['mean']:>9.4%} {found[what]['max']:>9.4%}")
    for what, label in (("of_noise", "of the noise"), ("of_concept", "of the concept's effect")):
        for name in figures["error"]["even"]:
            found = figures["prediction"][name][what]
            print(f"predicted noise, {name:10} {label:23} {found['mean']:>9.4%} {found['max']:>9.4%}")


if __name__ == "__main__":
    main()
