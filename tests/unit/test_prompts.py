"""The prompts of a batch are encoded once, and gradients reach what they were made of as if each sample had its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from perfusion.hosts.base import Encodings
from perfusion.training.prompts import EncodedPrompts

TEXTS = {7: "a bear", 2: "two bears", 9: "a bear at sea"}


class Encoder:
    """Encodings that depend on a row of numbers; it remembers what it was asked for, and whether with a gradient."""

    def __init__(self, pooled: bool = True):
        self.row = torch.linspace(-1, 1, 6).requires_grad_()
        self.pooled = pooled
        self.asked: list[tuple[list[str], bool]] = []

    def __call__(self, texts: list[str]) -> Encodings:
        self.asked.append((texts, torch.is_grad_enabled()))
        seeds = torch.stack([torch.arange(4.0) * len(text) for text in texts])
        context = torch.sin(seeds.unsqueeze(-1) + self.row)
        marks = torch.zeros(len(texts), 4, dtype=torch.bool)
        return Encodings(context, marks, ~marks, context.prod(1) if self.pooled else None)


def loss(text: Encodings) -> Tensor:
    pooled = 0.0 if text.pooled is None else text.pooled.square().sum()
    return text.context.pow(3).sum() + pooled


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_gradients_are_those_of_samples_encoded_alone(pooled: bool, kept: bool, at_once: int) -> None:
    batch = torch.tensor([9, 7, 7, 2, 9])
    alone = Encoder(pooled)
    loss(alone([TEXTS[k] for k in batch.tolist()])).backward()

    encoder = Encoder(pooled)
    prompts = EncodedPrompts(encoder, TEXTS, at_once, kept=kept)
    for part in batch.split(2):
        loss(prompts.of(part)).backward()
    assert encoder.row.grad is None, "not before all of the batch is done"
    prompts.backward()
    assert encoder.row.grad is not None and alone.row.grad is not None
    assert torch.allclose(encoder.row.grad, alone.row.grad, rtol=1e-5)


def test_each_is_encoded_once_and_without_keeping_once_more_in_parts() -> None:
    encoder = Encoder()
    prompts = EncodedPrompts(encoder, TEXTS, 2)
    loss(prompts.of(torch.tensor([2, 2, 7]))).backward()
    prompts.backward()
    assert encoder.asked == [(list(TEXTS.values()), True)]

    encoder = Encoder()
    prompts = EncodedPrompts(encoder, TEXTS, 2, kept=False)
    parts = [["a bear", "two bears"], ["a bear at sea"]]
    assert encoder.asked == [(part, False) for part in parts]
    loss(prompts.of(torch.tensor([2]))).backward()
    prompts.backward()
    assert encoder.asked[2:] == [(part, True) for part in parts]


def test_without_gradient_nothing_is_kept() -> None:
    encoder = Encoder()
    with torch.no_grad():
        prompts = EncodedPrompts(encoder, TEXTS, 2)
        found = prompts.of(torch.tensor([9, 2]))
    assert not found.context.requires_grad
    assert [asked for asked, _ in encoder.asked] == [["a bear", "two bears"], ["a bear at sea"]]
    assert torch.equal(found.context, encoder(["a bear at sea", "two bears"]).context.detach())


def test_encodings_that_nothing_is_learned_in_are_left_alone() -> None:
    encoder = Encoder()
    encoder.row = encoder.row.detach()
    prompts = EncodedPrompts(encoder, TEXTS, 2)
    loss(prompts.of(torch.tensor([9]))).backward()
    prompts.backward()
