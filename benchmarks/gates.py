"""Does the gate open on the concept's word, wherever it stands, and on no other? The paper's i* against the robust one.

    python -m benchmarks.gates [--checkpoint FILE] [--words teddy bear,cat,...] [--json]

For each word a concept is placed at its super-category (no training), i* and d* are estimated both ways from captions
of one seed, and r is read on held-out captions of another seed that contain the word once. "opens": share of the word's
tokens with r above the threshold; "false_opens": share of all other tokens (start, end and padding left out) above it.
Without ``--checkpoint`` the text encoder is CLIP-L of random weights, which shows the machinery and not the language.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from tests.models import reduced_sd15

from .host import comfyui, say

WORDS = "teddy bear,cat,chair,backpack,clock"
OPEN, WRONGLY_OPEN = 0.6, 0.5


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates", description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint whose text encoder is measured")
    parser.add_argument("--words", default=WORDS, help="super-categories, separated by commas")
    parser.add_argument("--captions", type=int, default=400, help="captions for the second moment")
    parser.add_argument("--contexts", type=int, default=120, help="captions for the robust i* and d*")
    parser.add_argument("--held-out", type=int, default=60, help="captions for the test, for each word")
    parser.add_argument("--json", action="store_true", help="one JSON line")
    options = parser.parse_args()
    with comfyui() as pack, torch.inference_mode():
        figures = measure(pack, options)
    if options.json:
        print(json.dumps(figures))
    else:
        for name in ("paper", "robust"):
            print(f"{name:7} opens {figures[name]['opens']:.1%}   other words {figures[name]['false_opens']:.2%}")


def measure(pack: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Shares by estimator, and what they were measured on."""
    import comfy.sd

    path = options.checkpoint or reduced_sd15(pack.base / "reduced_sd15.safetensors")
    model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=True, output_clip=True)[:3]
    host = pack.module("perfusion.hosts.comfyui.training").ComfyHost(model, clip, vae)
    statistics, corpus = pack.module("perfusion.statistics"), pack.module("perfusion.corpus")
    word_of = pack.module("perfusion.hosts.base").Word
    say(f"measuring the text encoder on {options.captions} captions")
    moment = statistics.measure(host, corpus.load_captions(None, options.captions))
    counts = {name: [0, 0, 0, 0] for name in ("paper", "robust")}
    for category in options.words.split(","):
        word = word_of("<it>", category.strip())
        templates = [template.replace("{}", "<it>") for template in corpus.paper_templates()]
        sources = {"paper": templates, "robust": corpus.captions_naming("<it>", options.contexts, seed=1)}
        found = {}
        for name, captions in sources.items():
            contexts = statistics.word_contexts(host, captions, word, last_only=True, own_only=True)
            found[name] = statistics.directions(contexts.own, moment, name)
        for name, (i_star, d_star) in found.items():
            tally(counts[name], pack, host, word, i_star, d_star, options.held_out)
        so_far = ", ".join(f"{name} {opens}/{words}" for name, (opens, words, _, _) in counts.items())
        say(f"{category}: gates open so far: {so_far}")
    return {
        name: {"opens": round(opens / words, 4), "false_opens": round(wrong / others, 5)}
        for name, (opens, words, wrong, others) in counts.items()
    } | {
        "words": options.words.split(","),
        "held_out_captions": options.held_out,
        "second_moment": {
            "captions": moment.captions,
            "shrinkage": round(moment.shrinkage, 5),
            "condition_number": round(moment.condition_number, 1),
        },
        "encoder": str(options.checkpoint.name) if options.checkpoint else "CLIP-L, random weights",
    }


def tally(counts: list[int], pack: Any, host: Any, word: Any, i_star: Any, d_star: Any, held_out: int) -> None:
    """Add to opens, words, wrong opens and other tokens what held-out captions show."""
    edit, corpus = pack.module("perfusion.edit"), pack.module("perfusion.corpus")
    captions = corpus.captions_naming("<it>", held_out, seed=2)
    for start in range(0, held_out, 32):
        text = host.encode(captions[start : start + 32], word)
        r = edit.presence(text.context.cpu(), i_star.unsqueeze(0), d_star.unsqueeze(0)).squeeze(-1)
        last = text.word & ~torch.nn.functional.pad(text.word[:, 1:], (0, 1))
        other = ~text.word & ~text.padding
        other[:, 0] = False
        other &= torch.nn.functional.pad(~text.padding[:, 1:], (0, 1))  # the end token stands before the padding
        counts[0] += int((r[last] > OPEN).sum())
        counts[1] += int(last.sum())
        counts[2] += int((r[other] > WRONGLY_OPEN).sum())
        counts[3] += int(other.sum())


if __name__ == "__main__":
    main()
