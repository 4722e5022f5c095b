"""The whole job without ComfyUI: learn two concepts from photos, save them, load them, draw with one and with both.

    python -m benchmarks.demo [--steps N] [--output FOLDER]

Writes both concept files and a contact sheet. The model is a reduced one of random weights until a trained one ships
with the pack: what it draws has no likeness, all figures and files are real.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from perfusion.concept import load
from perfusion.corpus import load_captions
from perfusion.edit import Gate
from perfusion.hosts.base import Word
from perfusion.stack import ConceptStack, ConceptUse
from perfusion.statistics import measure
from perfusion.training.config import TrainingConfig
from perfusion.training.dataset import prepare
from perfusion.training.trainer import StepReport, Subject, Trainer, train

from .small_model import SmallHost

SIZE, CELL, MARGIN, LABEL = 64, 128, 10, 30
THINGS = {
    "<my-teddy>": ("teddy bear", (181, 120, 60), (120, 70, 30)),
    "<my-mug>": ("mug", (60, 120, 180), (240, 220, 90)),
}
PAPER, INK = (250, 249, 246), (40, 40, 40)


def main() -> None:
    """Run the demo and say where its results are."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="training steps for each concept")
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="where files go")
    options = parser.parse_args()
    print("Demo on a reduced model of RANDOM WEIGHTS: the job is real, the pictures cannot look like anything yet.")
    started, host = time.perf_counter(), SmallHost()
    statistics = measure(host, load_captions(None))
    print(
        f"Text encoder measured on {statistics.tokens:,} tokens of {statistics.captions:,} captions "
        f"(condition number {statistics.condition_number:.0f})."
    )
    rows: list[tuple[str, list[tuple[str, Image.Image]]]] = []
    files = []
    for number, (placeholder, (category, body, mark)) in enumerate(THINGS.items()):
        drawn = [photo(body, mark, seed) for seed in range(5)]
        config = TrainingConfig(steps=options.steps, batch_size=8, micro_batch=0, resolution=SIZE, contexts=64)
        photos = prepare(host, [image for image, _ in drawn], [mask for _, mask in drawn], SIZE)
        with tqdm(total=options.steps, desc=placeholder, unit="step") as bar:

            def show(trainer: Trainer, report: StepReport, bar: tqdm = bar) -> None:
                bar.update()

            concept, _ = train(host, photos, Subject(placeholder, category), statistics, config, [show])
        before, after = concept.training["fixed_loss"]
        files.append(concept.save_numbered(options.output, placeholder.strip("<>")))
        print(
            f"{placeholder}: loss on fixed noise {before:.4f} before, {after:.4f} after training; kept as {files[-1]}"
        )
        pictures = [(f"photo {k + 1}", to_image(image)) for k, (image, _) in enumerate(drawn[:4])]
        rows.insert(number, (f"{placeholder}: photos", pictures))

    uses = [ConceptUse(load(file)) for file in files]
    for use in uses:
        word = use.concept.placeholder
        rows.append((f"{word} alone", strip(host, ConceptStack((use,)), f"a photo of a {word} on the beach")))
    both = ConceptStack(tuple(uses))
    together = f"a photo of a {' next to a '.join(both.placeholders)}"
    rows.append(("both together", strip(host, both, together)))
    biased = [
        (f"bias {bias}", render(host, ConceptStack((ConceptUse(uses[0].concept, Gate(bias=bias)),)), together, 0))
        for bias in (0.4, 0.6, 0.75, 0.9)
    ]
    rows.append(("one file, four biases", biased))
    sheet = contact_sheet(rows)
    path = options.output / "contact_sheet.png"
    sheet.save(path)
    print(f"\nContact sheet  {path}")
    for file in files:
        print(f"Concept file   {file}  {file.stat().st_size:,} bytes")
    print(f"Time           {time.perf_counter() - started:.0f} s")


def photo(body: tuple[int, int, int], mark: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor]:
    """A photo (h, w, 3) of one thing on a background of its own, and its mask (h, w)."""
    generator = torch.Generator().manual_seed(seed)
    shift, shade = (torch.randint(0, high, (1,), generator=generator).item() for high in (40, 120))
    scene = Image.new("RGB", (192, 192), (int(shade) + 60, 150, 200 - int(shade)))
    mask = Image.new("L", scene.size)
    spot = [30 + shift, 40, 130 + shift, 160]
    ImageDraw.Draw(mask).ellipse(spot, fill=255)
    pen = ImageDraw.Draw(scene)
    pen.ellipse(spot, fill=body)
    for stripe in range(3):
        pen.rectangle([spot[0] + 15, 70 + 28 * stripe, spot[2] - 15, 80 + 28 * stripe], fill=mark)
    return _to_tensor(scene), _to_tensor(mask)[..., 0]


def render(host: SmallHost, stack: ConceptStack, prompt: str, seed: int) -> Image.Image:
    """A picture of a prompt that may name the concepts of a stack."""
    with torch.no_grad():
        # The reduced encoder knows one taught word a call: the encodings of the others are laid in at their places.
        context = host.encode([prompt]).context
        for concept in stack.concepts:
            text = host.encode([prompt], Word(concept.placeholder, concept.super_category, concept.embeddings))
            context = torch.where(text.word.unsqueeze(-1), text.context, context)
    return to_image(host.draw(context, stack.edit(), SIZE, seed))


def strip(host: SmallHost, stack: ConceptStack, prompt: str) -> list[tuple[str, Image.Image]]:
    """Four pictures of one prompt."""
    return [(f"seed {seed}", render(host, stack, prompt, seed)) for seed in range(4)]


def contact_sheet(rows: list[tuple[str, list[tuple[str, Image.Image]]]]) -> Image.Image:
    """Labeled rows of pictures on one sheet."""
    width = max(len(pictures) for _, pictures in rows) * (CELL + MARGIN) + MARGIN
    height = len(rows) * (CELL + LABEL + 2 * MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for row, (title, pictures) in enumerate(rows):
        top = MARGIN + row * (CELL + LABEL + 2 * MARGIN)
        pen.text((MARGIN, top), title, fill=INK)
        for column, (label, picture) in enumerate(pictures):
            left = MARGIN + column * (CELL + MARGIN)
            sheet.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top + LABEL - 14))
            pen.text((left, top + LABEL + CELL - 12), label, fill=INK)
    return sheet


def to_image(picture: Tensor) -> Image.Image:
    """(h, w, 3) in 0..1 as an image."""
    return Image.fromarray((picture * 255).round().to(torch.uint8).numpy())


def _to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, -1).float() / 255


if __name__ == "__main__":
    main()
