"""What a training will take, told before it is loaded, against what it really keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.hosts import ComfyHost, PromptError
from tests.models import Parts, miniature_parts

pytestmark = pytest.mark.comfyui


@pytest.fixture
def parts() -> Parts:
    with torch.inference_mode():
        return miniature_parts()


@pytest.fixture
def memory(comfy_host: ComfyHost) -> Any:
    return comfy_host.module("perfusion.hosts.comfyui.memory")


def host_of(comfy_host: ComfyHost, parts: Parts) -> Any:
    return comfy_host.module("perfusion.hosts.comfyui.training").ComfyHost(parts.model, parts.clip, parts.vae)


def config(comfy_host: ComfyHost, **settings: Any) -> Any:
    small = {"batch_size": 4, "micro_batch": 2, "resolution": 128}
    return comfy_host.module("perfusion.training.config").TrainingConfig(**{**small, **settings})


@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_told_of_the_network_is_what_it_keeps(
    comfy_host: ComfyHost, parts: Parts, memory: Any, batch: int
) -> None:
    host = host_of(comfy_host, parts)
    found: dict[int, torch.Tensor] = {}
    weights: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.inference_mode(), host.training():
        weights |= {p.untyped_storage().data_ptr() for p in host.model.model.parameters()}
        text = host.encode(["a cat"] * batch)
        latents, sigma = torch.randn(batch, 4, 16, 16), torch.ones(batch)
        text = text.detached(requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = host.denoise(latents, sigma, text, None)
    really = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    del out
    settings = config(comfy_host, micro_batch=batch, batch_size=batch)
    told = memory._kept_by_network(host, batch, settings, torch.float32)
    assert told == pytest.approx(really, rel=0.03)


@pytest.mark.any_host
def test_it_is_less_for_smaller_parts_and_with_checkpointing(comfy_host: ComfyHost, parts: Parts, memory: Any) -> None:
    host = host_of(comfy_host, parts)

    def told(**settings: Any) -> int:
        with torch.inference_mode():
            return memory.training_bytes(host, config(comfy_host, **settings))

    assert told(micro_batch=1) < told() < told(micro_batch=0) == told(micro_batch=4)
    assert told(resolution=64) < told(), "smaller pictures"
    assert told(gradient_checkpointing=True) < told()
    assert told(gradient_checkpointing=True) < told(gradient_checkpointing=True, resolution=512)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_weights_that_are_stored_otherwise_only_the_edited_projections_are_copied(
    comfy_host: ComfyHost, parts: Parts, memory: Any, dtype: torch.dtype
) -> None:
    network = parts.model.model.diffusion_model
    host = host_of(comfy_host, parts)
    plain = memory.training_bytes(host, config(comfy_host))
    network.to(dtype).dtype = dtype
    parts.model.model.manual_cast_dtype = torch.float32
    host = host_of(comfy_host, parts)
    edited = [p for name, p in network.named_parameters() if "attn2.to_k" in name or "attn2.to_v" in name]
    assert memory.training_bytes(host, config(comfy_host)) - plain == 4 * sum(p.numel() for p in edited)


@pytest.mark.any_host
def test_too_large_a_training_is_refused_with_what_would_fit_and_nothing_is_loaded(
    comfy_host: ComfyHost, parts: Parts, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management

    host = host_of(comfy_host, parts)
    need = {name: memory.training_bytes(host, config(comfy_host, **settings)) for name, settings in {
        "all": {}, "one": {"micro_batch": 1}, "less": {"micro_batch": 1, "gradient_checkpointing": True},
    }.items()}  # fmt: skip
    comfy.model_management.unload_all_models()
    advice = {
        "one": "set micro_batch to 1, which",
        "less": "set micro_batch to 1 and gradient_checkpointing on, which",
        "none": "lower resolution",
    }
    for name, text in advice.items():
        monkeypatch.setattr(memory, "available_bytes", lambda _, name=name: need.get(name, 1000))
        with pytest.raises(ValueError, match=f"at least .* of memory, and .* can be had on cpu: {text}"):
            memory.require_memory(host, config(comfy_host))
    monkeypatch.setattr(memory, "available_bytes", lambda _: need["all"])
    memory.require_memory(host, config(comfy_host))
    assert not comfy.model_management.current_loaded_models


def test_the_node_refuses_it(comfy_host: ComfyHost, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.comfyui.test_miniature import training_graph

    monkeypatch.setattr(memory, "available_bytes", lambda _: 1000)
    with pytest.raises(PromptError, match="Train Concept.*of memory.*lower resolution"):
        comfy_host.execute(training_graph(), keep=[("train", 0)])
