"""The contract of Apply Concepts with how the host runs a network: partial loading, attention kernels, compilers, and
other people's wrappers over the same forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.concepts import CAT, LAYERS, TEDDY, Lab

# What the compiler itself does that Python or torch deprecate.
pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.filterwarnings("ignore:::torch"),
    pytest.mark.usefixtures("nothing_left"),
]

LOCKS = ("local", "global")
TEXT = f"a photo of a {TEDDY}"


@pytest.fixture(scope="module", params=[1.0, 20.0], ids=["unfocused", "focused"])
def teddy(lab: Lab, request: pytest.FixtureRequest) -> Any:
    return replace(lab.concept(), focus=request.param)


@pytest.fixture(scope="module")
def cat(lab: Lab) -> Any:
    return lab.concept(CAT, "cat", seed=1, form="preserving")


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def projections(lab: Lab) -> list[torch.nn.Module]:
    modules = dict(lab.model.model.diffusion_model.named_modules())
    return [modules[f"{layer}.attn2.{path}"] for layer in LAYERS for path in ("to_k", "to_v")]


# --- low memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("with_lora", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5], ids=["nothing loaded", "half loaded"])
def test_partial_loading_equals_full_loading(
    lab: Lab, teddy: Any, cat: Any, monkeypatch: pytest.MonkeyPatch, lock: str, with_lora: bool, share: float
) -> None:
    import comfy.model_management

    model, clip = lab.applied(teddy, cat, lock=lock)
    if with_lora:
        model, clip = lab.with_lora(model, clip, lab.lora())
    texts = lab.encode(clip, TEXT), lab.encode(clip, "blurry")
    full = lab.sample(model, *texts)
    lab.forget()

    original = comfy.model_management.LoadedModel.model_load

    def partially(self: Any, lowvram_model_memory: float = 0, **settings: Any) -> Any:
        return original(self, max(1.0, share * self.model.model_size()), **settings)

    monkeypatch.setattr(comfy.model_management.LoadedModel, "model_load", partially)
    for number in range(2):
        assert apart(lab.sample(model, *texts), full) <= 1e-5, f"run {number}"
        network = lab.model.model.diffusion_model
        offloaded = [module for module in network.modules() if hasattr(module, "prev_comfy_cast_weights")]
        assert offloaded, "the host was meant to load partially"
        if share == 0:
            assert set(projections(lab)) <= set(offloaded)
        if with_lora and share == 0:
            assert all(module.weight_function for module in projections(lab)), "the LoRA was meant to be on the fly"
    if not with_lora:  # ComfyUI 0.33 itself loses a text encoder's LoRA when it loads in part after a full load
        assert apart(lab.encode(clip, TEXT)[0][0], texts[0][0][0]) <= 1e-6


def test_unloading_part_of_a_model_keeps_the_edit(lab: Lab, teddy: Any) -> None:
    model, clip = lab.applied(teddy)
    texts = lab.encode(clip, TEXT), lab.encode(clip, "blurry")
    full = lab.sample(model, *texts)
    model.partially_unload(torch.device("cpu"), memory_to_free=model.model_size() // 2)
    assert apart(lab.sample(model, *texts), full) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_network(lab: Lab, teddy: Any, cat: Any, dtype: torch.dtype) -> None:
    """Weights in half precision, computed in it or cast: the same picture as far as that precision goes."""

    model, clip = lab.applied(teddy, cat)
    texts = lab.encode(clip, f"{TEXT} and a {CAT}"), lab.encode(clip, "blurry")
    layer = LAYERS[0]
    edit = model.get_attachment("perfusion").edit
    context, half = texts[0][0][0], torch.nn.Linear(64, 32, bias=False, dtype=dtype)
    with torch.inference_mode():
        single = torch.nn.Linear(64, 32, bias=False)
        single.weight.copy_(half.weight)
        for path in ("k", "v"):
            exact = edit.project(layer, path, context, single)
            rounded = edit.project(layer, path, context.to(dtype), half)
            assert rounded.dtype == dtype
            assert apart(rounded.float(), exact) <= (4e-3 if dtype == torch.float16 else 3e-2)


# --- attention kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("kernel", ["attention_pytorch", "attention_split", "attention_sub_quad", "attention_basic"])
def test_attention_kernels_agree(
    lab: Lab, teddy: Any, cat: Any, monkeypatch: pytest.MonkeyPatch, lock: str, kernel: str
) -> None:
    """attention_pytorch is what --use-pytorch-cross-attention chooses."""
    import comfy.ldm.modules.attention as attention

    model, clip = lab.applied(teddy, cat, lock=lock)
    texts = lab.encode(clip, TEXT), lab.encode(clip, "blurry")
    default = lab.sample(model, *texts)
    chosen, calls = getattr(attention, kernel), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kernel)
        return chosen(*args, **kwargs)

    monkeypatch.setattr(attention, "optimized_attention", counted)
    assert apart(lab.sample(model, *texts), default) <= 1e-4
    assert calls


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    import comfy.ldm.modules.attention as attention
    import torch._dynamo

    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, name, attention.attention_pytorch)
    torch._dynamo.reset()
    with ExitStack() as stack:
        yield stack
    torch._dynamo.reset()


def compiled(lab: Lab, model: Any, backend: str = "eager", **settings: Any) -> Any:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    clone = model.clone()
    set_torch_compile_wrapper(model=clone, backend=backend, **settings)
    return clone


@pytest.mark.parametrize(
    ("teddy", "backend", "lock"),
    [(20.0, "eager", "local"), (20.0, "aot_eager", "global"), (1.0, "aot_eager", "global")],
    indirect=["teddy"],
)
def test_compiled_network_equals_eager(
    lab: Lab, teddy: Any, cat: Any, compiler: ExitStack, backend: str, lock: str
) -> None:
    """The whole network as one graph: a break, by whomever, would raise."""
    model, clip = lab.applied(teddy, cat, lock=lock)
    fast = compiled(lab, model, backend, fullgraph=True)
    negative = lab.encode(clip, "blurry")
    pictures = []
    for text in (TEXT, f"a {CAT} beside a {TEDDY}", f"a quiet lake with a {TEDDY}"):
        positive = lab.encode(clip, text)
        eager, quick = lab.sample(model, positive, negative), lab.sample(fast, positive, negative)
        assert apart(quick, eager) <= 1e-4, text
        pictures.append(quick)
    assert all(apart(pictures[0], picture) > 1e-2 for picture in pictures[1:])


def test_compiled_layer_follows_changes(lab: Lab, teddy: Any, cat: Any, compiler: ExitStack) -> None:
    """Nothing of one concept, strength, gate, lock or text is baked into what was compiled with another."""
    import torch._dynamo

    compiler.enter_context(torch._dynamo.config.patch(recompile_limit=64))
    _, clip = lab.applied(teddy, cat, lock="global")
    texts = [lab.encode(clip, text)[0] for text in (f"a {CAT} beside a {TEDDY}", f"a lake with a {TEDDY} and a {CAT}")]
    attention = dict(lab.model.model.diffusion_model.named_modules())[f"{LAYERS[0]}.attn2"]
    network = torch.compile(attention, backend="eager", fullgraph=True)
    x = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    variants: list[tuple[list[Any], dict[str, Any]]] = [
        ([teddy], {}),
        ([teddy], {"strength": 0.5}),
        ([teddy], {"bias": 0.2}),
        ([teddy], {"temperature": 0.5}),
        ([lab.concept(seed=9)], {}),
        ([cat], {}),
        ([teddy, cat], {}),
        ([teddy], {"lock": "global"}),
        ([teddy, cat], {"lock": "global"}),
        ([], {}),
    ]
    outputs = []
    for _ in range(2):
        for concepts, settings in variants:
            model, _ = lab.applied(*concepts, **settings)
            lab.load(model)
            for context, extra in texts:
                if settings.get("lock") == "global":
                    shift = extra["model_conds"]["perfusion_key_shift"].cond
                    model.get_attachment("perfusion").edit.key_lock.shift = shift
                with torch.inference_mode():
                    eager, quick = attention(x, context), network(x, context)
                assert apart(quick, eager) <= 1e-5, (len(concepts), settings)
                outputs.append(quick)
    first, second = outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :]
    assert all(apart(a, b) <= 1e-6 for a, b in zip(first, second, strict=True))
    for k, output in enumerate(first):
        assert all(apart(output, earlier) > 1e-3 for earlier in first[:k]), variants[k // 2][1]


def _use_network(patcher: Any, network: Any) -> None:
    """What core's wrapper does, with a network compiled before."""
    from comfy.patcher_extension import WrappersMP

    def wrapper(executor: Any, *args: Any, **kwargs: Any) -> Any:
        original = executor.class_obj.diffusion_model
        executor.class_obj.diffusion_model = network
        try:
            return executor(*args, **kwargs)
        finally:
            executor.class_obj.diffusion_model = original

    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "compiled", wrapper)


def test_apply_behind_the_compiler_node(lab: Lab, teddy: Any, compiler: ExitStack) -> None:
    model, clip = lab.applied(teddy)
    texts = lab.encode(clip, TEXT), lab.encode(clip, "blurry")
    eager = lab.sample(model, *texts, steps=1)
    node = lab.host.nodes["TorchCompileModel"]
    with torch.inference_mode():
        first = node.execute(lab.model, "eager").result[0]
    assert apart(lab.sample(lab.apply(first, lab.clip, teddy)[0], *texts, steps=1), eager) <= 1e-4
    with torch.inference_mode():
        last = node.execute(model, "eager").result[0]
    assert apart(lab.sample(last, *texts, steps=1), eager) <= 1e-4


@pytest.mark.parametrize("teddy", [20.0], indirect=True, ids=["focused"])
def test_another_load_needs_no_recompilation(lab: Lab, teddy: Any, compiler: ExitStack) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model, clip = lab.applied(teddy)
    texts = lab.encode(clip, TEXT), lab.encode(clip, "blurry")
    network = torch.compile(lab.model.model.diffusion_model, backend=counter, fullgraph=True)
    fast = model.clone()
    _use_network(fast, network)
    lab.sample(fast, *texts)
    lab.sample(fast, *texts)
    settled = counter.frame_count
    for _ in range(3):
        lab.sample(lab.model, *texts)
        lab.sample(fast, *texts)
    lab.forget()
    lab.sample(fast, *texts)
    assert counter.frame_count == settled


# --- other wrappers over the same forwards ---------------------------------------------------------------------------


class Louder:
    """Another extension's wrapper, put over a forward by hand while a model is loaded."""

    def __init__(self, module: torch.nn.Module, factor: float = 1.1):
        self.module, self.factor, self.below = module, factor, module.forward
        module.forward = self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.below(x) * self.factor

    def remove(self) -> None:
        self.module.forward = self.below
        if getattr(self.below, "__func__", None) is type(self.module).forward:
            del self.module.forward


def keys(lab: Lab, model: Any, texts: tuple[Any, Any]) -> list[torch.Tensor]:
    """All keys and values of one pass through the layers, with the model loaded as it is now."""
    context = texts[0][0][0]
    with torch.inference_mode():
        return [module(context) for module in projections(lab)]


def equal(a: list[torch.Tensor], b: list[torch.Tensor], factor: float = 1.0, tolerance: float = 1e-6) -> bool:
    return all(apart(x, y * factor) <= tolerance for x, y in zip(a, b, strict=True))


def test_wrapper_over_ours_survives_and_so_does_the_edit(lab: Lab, teddy: Any, cat: Any) -> None:
    model, clip = lab.applied(teddy)
    other = lab.applied(cat)[0]
    texts = lab.encode(clip, TEXT), lab.encode(clip, "blurry")
    lab.load(lab.model)
    plain = keys(lab, lab.model, texts)
    lab.load(model)
    edited = keys(lab, model, texts)
    assert not equal(edited, plain)
    lab.load(other)
    edited_by_other = keys(lab, other, texts)
    lab.load(model)

    wrappers = [Louder(module) for module in projections(lab)]
    assert equal(keys(lab, model, texts), edited, 1.1)
    for _ in range(3):  # ejected below a foreign wrapper, ours falls silent, and only once does it count afterwards
        lab.load(lab.model)
        assert equal(keys(lab, lab.model, texts), plain, 1.1)
        lab.load(model)
        # Now over the wrapper: its target values are not the other's to scale, its keys and W i* are.
        reference = [
            model.get_attachment("perfusion").edit.project(layer, path, texts[0][0][0], _scaled(module))
            for layer in LAYERS
            for path, module in zip("kv", projections(lab)[2 * LAYERS.index(layer) :][:2], strict=True)
        ]
        assert equal(keys(lab, model, texts), reference)
    lab.load(other)
    assert not equal(keys(lab, other, texts), edited, 1.1)
    lab.load(lab.model)
    for wrapper in wrappers:
        wrapper.remove()
    assert equal(keys(lab, lab.model, texts), plain)
    lab.load(model)
    assert equal(keys(lab, model, texts), edited), "behind the other's removal, ours works as before"
    lab.load(other)
    assert equal(keys(lab, other, texts), edited_by_other)
    del model, other
    lab.forget()
    for module in projections(lab):
        # A silent wrapper of ours may stay where another extension put it back by itself; it does nothing.
        vars(module).pop("forward", None)


def _scaled(module: Any) -> Any:
    return lambda x: torch.nn.functional.linear(x, module.weight) * 1.1


def test_wrapper_below_ours_that_leaves_first(lab: Lab, teddy: Any) -> None:
    """It restores the forward from before both; ours notices that it was dropped, and comes back at the next load."""
    model, clip = lab.applied(teddy)
    texts = lab.encode(clip, TEXT), lab.encode(clip, "blurry")
    lab.load(lab.model)
    plain = keys(lab, lab.model, texts)
    lab.load(model)
    edited = keys(lab, model, texts)
    lab.load(lab.model)
    wrappers = [Louder(module) for module in projections(lab)]
    lab.load(model)
    assert not equal(keys(lab, model, texts), edited)
    for wrapper in wrappers:
        wrapper.remove()
    assert equal(keys(lab, model, texts), plain), "it took ours along"
    for _ in range(2):
        lab.load(lab.model)
        assert equal(keys(lab, lab.model, texts), plain)
        lab.load(model)
        assert equal(keys(lab, model, texts), edited)


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_injections_of_others_are_read_through(lab: Lab, teddy: Any, first: str) -> None:
    """An injection that wraps the same forwards: whatever the order of the nodes, W i* and locked keys contain it."""
    from comfy.patcher_extension import PatcherInjection

    wrappers: list[Louder] = []

    def inject(_: Any) -> None:
        wrappers.extend(Louder(module) for module in projections(lab))

    def eject(_: Any) -> None:
        while wrappers:
            wrappers.pop().remove()

    _, clip = lab.applied(teddy)
    texts = lab.encode(clip, TEXT), lab.encode(clip, "blurry")
    model = lab.model.clone()
    if first == "ours":
        model = lab.apply(model, lab.clip, teddy)[0].clone()
    model.set_injections("theirs", [PatcherInjection(inject=inject, eject=eject)])
    if first == "theirs":
        model = lab.apply(model, lab.clip, teddy)[0]
    edit = model.get_attachment("perfusion").edit
    for _ in range(3):
        lab.load(model)
        found = keys(lab, model, texts)
        with torch.inference_mode():
            expected = [
                edit.project(layer, path, texts[0][0][0], _scaled(module))
                for layer, pair in zip(LAYERS, zip(*[iter(projections(lab))] * 2, strict=True), strict=True)
                for path, module in zip("kv", pair, strict=True)
            ]
        assert equal(found, expected)
        lab.load(lab.model, lab.clip.patcher)
        lab.assert_untouched()
