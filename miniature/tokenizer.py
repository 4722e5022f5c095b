"""A CLIP tokenizer with a small vocabulary: byte-pair encoding in CLIP's own file format, learned from the captions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from .captions import random_caption, vocabulary

START, END = "<|startoftext|>", "<|endoftext|>"


def make(folder: Path) -> None:
    """Learn the merges and write ``vocab.json`` and ``merges.txt``: every word of the captions is one token, any other
    text falls into smaller pieces."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), byte_level])
    words = Counter({word: 1 for word in vocabulary()})
    rng = Random(0)
    for _ in range(4000):
        words.update(random_caption(rng).text.replace(",", "").split())
    trainer = trainers.BpeTrainer(vocab_size=4000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator([word for word in words for _ in range(words[word])], trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *(a + b for a, b in merges), START, END]
    tokens = list(dict.fromkeys(tokens))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "add_prefix_space": False,
        "errors": "replace",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def load(folder: Path) -> Any:
    """The tokenizer, by transformers."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)
