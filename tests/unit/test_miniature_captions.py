"""The little world's captions, as statistics of its text encoder are measured on them."""

from __future__ import annotations

import json
import re

from miniature.captions import corpus
from miniature.shapes import CATEGORIES
from miniature.weights import FOLDER


def test_corpus_depends_on_the_seed_alone() -> None:
    found = corpus()
    assert len(found) == len(set(found)) == 2400
    assert corpus(100) == found[:100]
    assert len(set(corpus(300, seed=1)) & set(found)) < 100
    assert corpus(0) == []


def test_corpus_is_in_the_text_encoders_words() -> None:
    vocabulary = json.loads((FOLDER / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    words = {word for text in corpus() for word in re.findall(r"[a-z]+|[^a-z\s]", text.lower())}
    assert sorted(word for word in words if f"{word}</w>" not in vocabulary) == []


def test_corpus_names_every_kind_of_thing_often_enough() -> None:
    """In as many captions as a concept's word is looked at by default, or nearly so."""
    texts = corpus()
    for category in CATEGORIES:
        assert sum(category in text for text in texts) >= 200, category
