"""diffusers with SD2.x of either prediction: a concept's whole way on random weights; and SDXL, which is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

import tests.diffusers_models as models
from perfusion.concept import load
from perfusion.corpus import captions
from perfusion.hosts.base import Word
from perfusion.hosts.diffusers import DiffusersHost, UnsupportedPipelineError, apply, draw
from perfusion.stack import ConceptStack, ConceptUse
from perfusion.statistics import measure
from perfusion.training.config import TrainingConfig
from perfusion.training.dataset import prepare
from perfusion.training.trainer import Subject, train

TEDDY = "<my-teddy>"


def sd2(folder: Path, prediction: str) -> Any:
    """A pipeline with all that tells SD2.x from SD1.x: text 1,024 wide, padded with "!", linear projections around
    transformers, a number of heads for each level, attention in 32 bits, and its scheduler's prediction."""
    models.tokenizer(folder)
    words = CLIPTokenizer.from_pretrained(str(folder), model_max_length=77, pad_token="!")
    network = models.unet(
        cross_attention_dim=1024, attention_head_dim=(4, 8), use_linear_projection=True, upcast_attention=True
    )
    return models.pipeline(
        folder,
        tokenizer=words,
        text_encoder=models.text_encoder(words, 1024),
        unet=network,
        scheduler=models.scheduler(prediction_type=prediction),
    )


# The pipeline's scheduler calls numpy in a way that numpy 2 deprecates.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sd2_from_photos_to_pictures(tmp_path: Path, prediction: str) -> None:
    torch.manual_seed(0)
    pipe = sd2(tmp_path / "tokenizer", prediction)
    host = DiffusersHost(pipe)
    assert (host.family.name, host.family.encoders) == ("sd2", {"clip_h": 1024})
    assert host.prediction == {"epsilon": "eps", "v_prediction": "v"}[prediction]
    photos = prepare(host, [torch.rand(16, 16, 3) for _ in range(2)], None, 16)
    config = TrainingConfig(steps=8, batch_size=8, micro_batch=0, resolution=64, contexts=8)
    subject = Subject(TEDDY, "teddy bear", ["a photo of a {}"])
    concept, _ = train(host, photos, subject, measure(host, captions(40)), config)
    first, last = concept.training["fixed_loss"]
    assert last < first

    path = concept.save_numbered(tmp_path, TEDDY)
    found = load(path)
    assert (found.digest, found.storage, found.family.title) == (concept.digest, "half", "Stable Diffusion 2.x")
    stack, prompts = ConceptStack((ConceptUse(found),)), [f"a photo of a {TEDDY} on the beach"]
    drawn = draw(host, stack, prompts, [3], steps=4, guidance=4.0, size=16, negative="blurry")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    largest = float(host.noise_levels()[-1])
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    with apply(pipe, stack):
        made = pipe(
            prompt=prompts,
            negative_prompt=["blurry"],
            height=16,
            width=16,
            num_inference_steps=4,
            guidance_scale=4.0,
            latents=noise * (1 + largest**2) ** 0.5 / largest,
            output_type="pt",
        ).images
    assert torch.allclose(drawn, made.permute(0, 2, 3, 1), atol=2e-3)
    plain = draw(host, ConceptStack(), prompts, [3], steps=4, guidance=4.0, size=16, negative="blurry")
    assert not torch.allclose(plain, drawn, atol=1e-3)


def test_sd2_pads_with_a_token_of_its_own(tmp_path: Path) -> None:
    pipe = sd2(tmp_path, "epsilon")
    host = DiffusersHost(pipe)
    prompts = ["a photo of a teddy bear", "", "! a cat!"]
    with torch.no_grad():
        stock = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
        found = host.encode(prompts, Word(TEDDY, "teddy bear"))
    assert torch.equal(found.context, stock)
    lengths = [len(pipe.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    assert found.padding.sum(1).tolist() == [77 - length for length in lengths]


def test_sdxl_is_refused_by_name(tmp_path: Path) -> None:
    words = models.tokenizer(tmp_path)
    settings: dict[str, Any] = {"vocab_size": len(words), "hidden_size": 32, "num_attention_heads": 2}
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(**settings, num_hidden_layers=2, intermediate_size=32, projection_dim=32)
    )
    scheduler: Any = models.scheduler()
    pipe = StableDiffusionXLPipeline(
        vae=models.vae(),
        text_encoder=models.text_encoder(words, 32),
        text_encoder_2=second,
        tokenizer=words,
        tokenizer_2=words,
        unet=models.unet(
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        ),
        scheduler=scheduler,
    )
    with pytest.raises(UnsupportedPipelineError, match="more than one text encoder, as SDXL has.*use ComfyUI"):
        DiffusersHost(pipe)
