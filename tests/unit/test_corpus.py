"""The caption grammar, its shipped captions and the reader of caption files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from perfusion import corpus
from perfusion.corpus import captions, captions_naming, captions_renaming, grammar, load_captions, paper_templates

ROOT = Path(__file__).parents[2]
WORDS = ("<my-teddy>", "teddy bear", "elephant", "umbrella", "unicorn", "hourglass", "SUV", "cat")
SPOKEN_YOU = ("unicorn", "unicycle", "ukulele", "uniform")
# Names that begin with a spoken vowel though a consonant is written first, or the other way round.
AN = {"hourglass": True, "unicorn": False, "SUV": True, "<my-teddy>": False, "<old-clock>": False}


def position(caption: str, word: str) -> int:
    return len(caption[: caption.index(word)].split())


def test_captions_are_distinct_and_of_fitting_length() -> None:
    found = captions()
    assert len(found) == len(set(found)) == 2400
    lengths = [len(caption.split()) for caption in found]
    assert min(lengths) == 3
    assert 35 <= max(lengths) <= 40
    assert sum(length >= 15 for length in lengths) >= 240
    assert all(caption == caption.strip() and "  " not in caption and "\n" not in caption for caption in found)


def test_captions_leave_nothing_unexpanded() -> None:
    for caption in captions() + captions_naming("teddy bear"):
        assert not re.search(r"[{}\[\]@]|:s\b", caption), caption


def test_captions_depend_on_the_seed_alone() -> None:
    assert captions(300, seed=3) == captions(300, seed=3)
    assert captions(100, seed=3) == captions(300, seed=3)[:100]
    assert len(set(captions(300, seed=3)) & set(captions(300, seed=4))) < 30
    assert captions(0) == []


def test_captions_do_not_depend_on_the_hash_seed() -> None:
    code = (
        "import sys, zlib; from perfusion.corpus import captions, captions_naming; "
        "sys.stdout.write(str(zlib.crc32('|'.join(captions(200) + captions_naming('cat', 50)).encode())))"
    )
    sums = set()
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        sums.add(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=environment))
    assert len(sums) == 1


def test_vocabulary_is_broad() -> None:
    found = captions()
    words = {word for caption in found for word in re.findall(r"[a-z][a-z'-]*", caption.lower())}
    assert len(words) > 1500
    assert sum(caption.isupper() for caption in found) >= 50
    assert sum(caption.endswith(".") for caption in found) >= 100
    assert sum('"' in caption for caption in found) >= 50
    assert sum(caption.count(",") >= 3 for caption in found) >= 100
    assert sum(any(letter.isdigit() for letter in caption) for caption in found) >= 200


def test_every_rule_is_defined_and_used() -> None:
    patterns = [*grammar.NAMING]
    for alternatives in (*grammar.RULES.values(), *grammar.THEMES):
        patterns += alternatives
    used = {
        name for text in patterns for slot in re.findall(r"\{([a-z_|]+)(?::s)?\}", text) for name in slot.split("|")
    }
    assert used == set(grammar.RULES)
    assert sum(map(len, grammar.THEMES)) > 100
    for pattern in grammar.NAMING:
        assert pattern.count("{}") + pattern.count("{it}") == 1, pattern


def test_articles_in_captions() -> None:
    for caption in captions():
        for article, following in re.findall(r"\b(an?) ([a-z][\w-]*)", caption):
            vowel = following[0] in "aeiou" and following not in SPOKEN_YOU and not following.startswith("one-")
            assert article == ("an" if vowel or following == "hourglass" else "a"), caption


@pytest.mark.parametrize("word", [*WORDS, "<old-clock>"])
def test_articles_before_the_word(word: str) -> None:
    right = "an" if AN.get(word, word[0] in "aeiou") else "a"
    found = re.findall(rf"\b(an?) {re.escape(word)}", "\n".join(captions_naming(word)), re.IGNORECASE)
    assert len(found) >= 20
    assert {article.lower() for article in found} == {right}


@pytest.mark.parametrize(
    ("following", "article"),
    [
        ("apple", "an"), ("house", "a"), ("hour", "an"), ("herb", "an"), ("herbivore", "a"), ("used car", "a"),
        ("utensil", "a"), ("umpire", "an"), ("unidentified object", "an"), ("union", "a"), ("urn", "an"),
        ("European", "a"), ("one-eyed cat", "a"), ("X-ray", "an"), ("LED", "an"), ("UFO", "a"), ("RAW", "a"),
        ("85mm", "an"), ("18-wheeler", "an"), ("1887", "an"), ("180", "a"), ("11th", "an"), ("3D", "a"),
        ('"open" sign', "an"), ("T-shirt", "a"),
    ],
)  # fmt: skip
def test_article(following: str, article: str) -> None:
    assert grammar._article(following) == f"{article} "


@pytest.mark.parametrize(
    ("noun", "plural"),
    [
        ("cat", "cats"), ("fox", "foxes"), ("puppy", "puppies"), ("monkey", "monkeys"), ("fisherman", "fishermen"),
        ("goldfish", "goldfish"), ("polar bear", "polar bears"), ("spool of thread", "spools of thread"),
        ("mouse", "mice"), ("reindeer", "reindeer"),
    ],
)  # fmt: skip
def test_plural(noun: str, plural: str) -> None:
    assert grammar._plural(noun) == plural


@pytest.mark.parametrize("word", WORDS)
def test_naming_holds_the_word_exactly_once(word: str) -> None:
    found = captions_naming(word)
    assert len(found) == len(set(found)) == 240
    for caption in found:
        assert caption.count(word) == caption.lower().count(word.lower()) == 1, caption


def test_naming_spreads_the_word() -> None:
    found = captions_naming("<my-teddy>")
    positions = [position(caption, "<my-teddy>") for caption in found]
    assert len(set(positions)) >= 15
    assert sum(place >= 6 for place in positions) >= 0.2 * len(found)
    assert sum(place == 0 for place in positions) >= 5
    assert sum(re.search(r"<my-teddy>\W*$", caption) is not None for caption in found) >= 24
    assert all(3 <= len(caption.split()) <= 40 for caption in found)


def test_naming_gives_every_word_the_same_contexts() -> None:
    def contexts(word: str) -> list[str]:
        return [re.sub(r"\b(a)n? \0", "\\1 \0", text.replace(word, "\0"), flags=re.I) for text in named[word]]

    named = {word: captions_naming(word) for word in ("<my-teddy>", "<old-clock>", "aardvark", "hourglassy thing")}
    first, *others = map(contexts, named)
    assert all(other == first for other in others)
    assert captions_naming("<my-teddy>", 50) == captions_naming("<my-teddy>", 100)[:50]
    assert captions_naming("<my-teddy>", 50) != captions_naming("<my-teddy>", 50, seed=1)


def test_naming_redraws_only_the_contexts_that_hold_the_word() -> None:
    plain, cats = captions_naming("<my-pet>"), captions_naming("cat")
    moved = [before for before, after in zip(plain, cats, strict=True) if before.replace("<my-pet>", "cat") != after]
    assert moved
    assert all("cat" in caption.lower() for caption in moved)
    paired = captions_naming("<my-pet>", avoid=("cat",))
    assert [caption.replace("<my-pet>", "cat") for caption in paired] == cats


def test_naming_refuses_words_it_cannot_place() -> None:
    for blank in ("", "  "):
        with pytest.raises(ValueError, match="blank"):
            captions_naming(blank)
    with pytest.raises(ValueError, match="too common"):
        captions_naming("a", avoid=("e", "i", "o"))


def test_paper_templates() -> None:
    templates = paper_templates()
    assert len(templates) == len(set(templates)) == 27
    assert all(template.count("{}") == 1 and len(template.split()) <= 7 for template in templates)


def test_shipped_captions_are_those_of_the_grammar() -> None:
    assert load_captions(None) == captions()
    assert grammar.SHIPPED.read_text(encoding="utf-8").splitlines() == captions()
    assert load_captions(None, limit=7) == captions()[:7]


def test_load_captions_tolerates_what_editors_write(tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_bytes("\ufeffa café\r\n\r\n  a red door \ra café\n".encode() + b"x" * 1200)
    assert load_captions(file) == ["a café", "a red door", "x" * 1000]
    assert load_captions(str(file), limit=2) == ["a café", "a red door"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"), (b"\xef\xbb\xbf \r\n\n", "is empty"),
        (b"caf\xe9", "not UTF-8"), ("a".encode("utf-16"), "not UTF-8"),
    ],
)  # fmt: skip
def test_load_captions_refuses(tmp_path: Path, data: bytes, message: str) -> None:
    file = tmp_path / "captions.txt"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_captions(file)


def test_load_captions_bounds_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "captions.txt"
    file.write_bytes(b"a red door\n")
    monkeypatch.setattr(grammar, "MAX_BYTES", 11)
    assert load_captions(file) == ["a red door"]
    monkeypatch.setattr(grammar, "MAX_BYTES", 10)
    with pytest.raises(ValueError, match="larger than"):
        load_captions(file)


def test_load_captions_without_a_file_or_a_sane_limit(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="check the path"):
        load_captions(tmp_path / "missing.txt")
    with pytest.raises(FileNotFoundError):
        load_captions(tmp_path)
    with pytest.raises(ValueError, match="1 or more"):
        load_captions(None, limit=0)


def test_package_exports() -> None:
    assert all(callable(getattr(corpus, name)) for name in corpus.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = corpus.nothing


def test_renaming_keeps_what_a_caption_says() -> None:
    texts = [
        "a photo of a teddy bear on the beach",
        "A Teddy  Bear, an oil painting",
        "my old teddy bear's hat",
        "a teddy bear and a teddy bear",
        "teddy bears",
        "a teddy-bear and a bear",
        "a photo of <my-teddy>, a teddy bear",
        "an old house",
    ]
    assert captions_renaming(texts, "teddy bear", "<my-teddy>") == [
        "a photo of a <my-teddy> on the beach",
        "A <my-teddy>, an oil painting",
        "my old <my-teddy>'s hat",
    ]
    assert captions_renaming(texts, "house", "owl") == ["an old owl"]
    assert captions_renaming(["An owl in a house"], "owl", "cat") == ["A cat in a house"]
    assert captions_renaming(["a cat"], "cat", "<owl>") == [f"{grammar._article('<owl>')}<owl>"]
    assert captions_renaming(texts, " ", "<my-teddy>") == []
