"""Training inside ComfyUI: the same numbers however it is computed, and models left as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.hosts import ComfyHost
from tests.models import Parts, miniature_parts

pytestmark = pytest.mark.comfyui


class Training:
    """The pack's training on the miniature, with few and small steps."""

    def __init__(self, pack: ComfyHost, parts: Parts):
        self.pack = pack
        self.parts = parts
        self.host = pack.module("perfusion.hosts.comfyui.training").ComfyHost(parts.model, parts.clip, parts.vae)
        captions = pack.module("perfusion.corpus").load_captions(None, 200)
        self.statistics = pack.module("perfusion.statistics").measure(self.host, captions)

    def run(self, callback: Callable[..., None] | None = None, **settings: Any) -> Any:
        config = self.pack.module("perfusion.training.config").TrainingConfig
        trainer = self.pack.module("perfusion.training.trainer")
        generator = torch.Generator().manual_seed(3)
        images = [torch.rand(64, 64, 3, generator=generator) for _ in range(3)]
        masks = [torch.zeros(64, 64) for _ in images]
        for mask in masks:
            mask[8:, 8:56] = 1  # what is around it is to be preserved
        photos = self.pack.module("perfusion.training.dataset").prepare(self.host, images, masks, 64)
        settings = {"steps": 4, "batch_size": 2, "micro_batch": 0, "resolution": 64, "contexts": 8} | settings
        subject = trainer.Subject("<my-teddy>", "teddy bear")
        callbacks = [callback] if callback else []
        concept, _ = trainer.train(self.host, photos, subject, self.statistics, config(**settings), callbacks)
        return concept


@pytest.fixture
def training(comfy_host: ComfyHost) -> Training:
    with torch.inference_mode():
        return Training(comfy_host, miniature_parts())


@torch.no_grad()
def predict(parts: Parts) -> torch.Tensor:
    """What the stock model makes of a fixed input, loaded as the host loads it for sampling."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([parts.model])
    generator = torch.Generator().manual_seed(5)
    x, context = (
        torch.randn(1, 4, 8, 8, generator=generator),
        parts.clip.encode_from_tokens(parts.clip.tokenize("a cat")),
    )
    return parts.model.model.apply_model(x, torch.ones(1), c_crossattn=context, transformer_options={})


def left_alone(parts: Parts) -> bool:
    """No module of the model or the text encoder carries a forward of its own."""
    networks = (parts.model.model, parts.clip.cond_stage_model)
    return not any("forward" in vars(module) for network in networks for module in network.modules())


@pytest.mark.parametrize("mode", [True, False], ids=["inference_mode", "plain"])
def test_the_loss_on_fixed_noise_falls_and_the_model_is_left_alone(training: Training, mode: bool) -> None:
    with torch.inference_mode(mode):
        before = predict(training.parts)
        concept = training.run(steps=30, batch_size=4)
        assert torch.equal(predict(training.parts), before)
    first, last = concept.training["fixed_loss"]
    assert last < first
    assert left_alone(training.parts)


def test_a_model_in_half_precision_trains_in_more_each_time(comfy_host: ComfyHost) -> None:
    """Also where the training before has left its own precision on the network that both share."""
    module, parts, seen = comfy_host.module("perfusion.hosts.comfyui.training"), miniature_parts(), []
    parts.model.model.diffusion_model.half().dtype = torch.float16
    for _ in range(3):
        host = module.ComfyHost(parts.model, parts.clip, parts.vae)
        with host.training():
            seen.append(module._compute_dtype(host._model.model))
    assert seen == [torch.float32] * 3


def test_encoders_stored_in_half_precision_are_converted_once(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which changes no number, and leaves them as they were, also when a training fails."""
    encoder = training.parts.clip.cond_stage_model
    layers = [module for module in encoder.modules() if isinstance(module, torch.nn.Linear)]
    for layer in layers:
        layer.half()

    def stored() -> list[torch.Tensor]:
        return [parameter.detach().clone() for layer in layers for parameter in layer.parameters()]

    before = stored()
    assert {tensor.dtype for tensor in before} == {torch.float16}
    with pytest.raises(ZeroDivisionError), training.host.training():
        assert {tensor.dtype for tensor in stored()} == {torch.float32}
        raise ZeroDivisionError
    with torch.inference_mode():
        once = training.run()
        module = training.pack.module("perfusion.hosts.comfyui.training")
        monkeypatch.setattr(module, "widened", lambda tensors, keep: contextlib.nullcontext())
        assert training.run().digest == once.digest
    after = stored()
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_training_that_cannot_begin_leaves_nothing_patched(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = training.pack.module("perfusion.hosts.comfyui.training")

    def fail(network: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(module, "_make_ordinary", fail)
    with pytest.raises(MemoryError), training.host.training():
        pass
    assert left_alone(training.parts)


@pytest.mark.any_host
def test_a_seed_says_everything(training: Training) -> None:
    with torch.inference_mode():
        assert training.run().digest == training.run().digest != training.run(seed=1).digest


@pytest.mark.any_host
def test_checkpointing_and_micro_batches_change_nothing_but_memory(training: Training) -> None:
    with torch.inference_mode():
        plain, checkpointed, split = (
            training.run(),
            training.run(gradient_checkpointing=True),
            training.run(micro_batch=1),
        )
    for other in (checkpointed, split):
        for layer, values in plain.o_star_v.items():
            torch.testing.assert_close(
                other.o_star_v[layer], values, rtol=1e-2, atol=2e-3
            )  # half precision of the file


def test_a_half_precision_model_is_trained_in_more(training: Training) -> None:
    """Gradients of the target values are too small for float16."""
    with torch.inference_mode():
        full = training.run()
        parts = training.parts
        parts.model.model.diffusion_model.half()
        parts.model.model.diffusion_model.dtype = torch.float16
        before = predict(parts)
        half = Training(training.pack, parts).run()
        assert torch.equal(predict(parts), before), "the model computes in its own precision again"
    moved = {layer: (half.o_star_v[layer] - full.o_star_v[layer]).abs().max() for layer in full.o_star_v}
    scale = {layer: full.o_star_v[layer].abs().max() for layer in full.o_star_v}
    assert all(moved[layer] < 0.1 * scale[layer] for layer in moved)


def test_stopping_midway_leaves_nothing_behind(training: Training) -> None:
    class Stop(Exception):
        pass

    def stop(trainer: Any, report: Any) -> None:
        if report.step == 2:
            raise Stop

    with torch.inference_mode():
        before, whole = predict(training.parts), training.run().digest
        for checkpointing in (False, True):
            with pytest.raises(Stop):
                training.run(stop, gradient_checkpointing=checkpointing)
            assert left_alone(training.parts)
        assert torch.equal(predict(training.parts), before)
        assert training.run().digest == whole


def test_concepts_that_are_applied_take_no_part_in_training(training: Training) -> None:
    pack, parts = training.pack, training.parts
    stack, combined = pack.module("perfusion.stack"), pack.module("perfusion.hosts.comfyui.combined")
    with torch.inference_mode():
        concept = training.run()
        concepts = stack.ConceptStack((stack.ConceptUse(concept),))
        model, clip = combined.apply_concepts(parts.model, parts.clip, concepts)
        again = Training(pack, Parts(model, clip, parts.vae))
        assert again.run().digest == concept.digest


def test_other_models_are_refused_by_name(comfy_host: ComfyHost) -> None:
    parts = miniature_parts()
    structure = comfy_host.module("perfusion.hosts.comfyui.structure")
    for module in parts.model.model.diffusion_model.modules():
        if hasattr(module, "attn2"):
            module.attn2 = None
    with pytest.raises(structure.UnsupportedModelError, match="input 'model' has no cross-attention"):
        structure.family_of(parts.model, parts.clip)


def test_weights_that_were_moved_since_they_were_loaded_can_be_trained_through(comfy_host: ComfyHost) -> None:
    """Inference tensors that are moved, as to a GPU, no longer say that they are, and still refuse a backward pass."""
    training = comfy_host.module("perfusion.hosts.comfyui.training")
    with torch.inference_mode():
        network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2).eval())
    network.to(torch.float64)  # on a machine without a GPU, another type moves the data as well
    training._make_ordinary(network)
    network.requires_grad_(False)
    x = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    network(x).square().sum().backward()
    assert x.grad is not None and bool(x.grad.any())


def test_a_streamed_text_encoder_is_read_once_more_as_a_whole(comfy_host: ComfyHost) -> None:
    training = comfy_host.module("perfusion.hosts.comfyui.training")
    parts = miniature_parts()

    class Streamed:
        cond_stage_model = object()
        patcher = type("Patcher", (), {"is_dynamic": lambda self: True})()

        def clone(self, disable_dynamic: bool = False) -> Any:
            clone = parts.clip.clone()
            clone.cond_stage_model = self.cond_stage_model
            return clone

    streamed = Streamed()
    clone = training._static_clone(streamed, streamed.patcher)
    assert clone.cond_stage_model is clone.patcher.model is parts.clip.cond_stage_model


def test_a_model_for_inpainting_is_refused_by_name(comfy_host: ComfyHost) -> None:
    parts = miniature_parts()
    parts.model.model.concat_keys = ("mask", "masked_image")
    structure = comfy_host.module("perfusion.hosts.comfyui.structure")
    with pytest.raises(structure.UnsupportedModelError, match="input 'model' is one for inpainting"):
        comfy_host.module("perfusion.hosts.comfyui.training").ComfyHost(parts.model, parts.clip, parts.vae)


@pytest.mark.parametrize(("side", "kernel"), [(8, "attention_basic"), (32, "attention_pytorch")])
def test_maps_of_attention_are_not_kept_where_they_are_large(
    comfy_host: ComfyHost, monkeypatch: pytest.MonkeyPatch, side: int, kernel: str
) -> None:
    """Each gives the same numbers and gradients, so only what is chosen can be seen."""
    import comfy.ldm.modules.attention as attention

    module, chosen = comfy_host.module("perfusion.hosts.comfyui.training"), []
    for name in ("attention_basic", "attention_pytorch"):
        own = getattr(attention, name)
        monkeypatch.setattr(
            attention, name, lambda *args, name=name, own=own, **kwargs: (chosen.append(name), own(*args, **kwargs))[1]
        )
    q = torch.randn(1, side * side, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = module._differentiable_attention(None, q, q, q, 2)
    (gradient,) = torch.autograd.grad(out.square().sum(), q)
    assert chosen == [kernel]
    plain = torch.softmax(torch.einsum("bnhd,bmhd->bhnm", *[q.unflatten(-1, (2, 8))] * 2) / 8**0.5, -1)
    expected = torch.einsum("bhnm,bmhd->bnhd", plain, q.unflatten(-1, (2, 8))).flatten(2)
    assert torch.allclose(out, expected, atol=1e-5)
    (wanted,) = torch.autograd.grad(expected.square().sum(), q)
    assert torch.allclose(gradient, wanted, atol=1e-4)
