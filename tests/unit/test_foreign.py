"""Files of perfusion-pytorch, written by that package itself: refused with a reason, and never opened."""

from __future__ import annotations

import importlib
import os
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from perfusion.concept import ConceptFileError, load


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    """The package. It wants open_clip, which nothing here uses."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stub, tokenizer = types.ModuleType("open_clip"), types.ModuleType("open_clip.tokenizer")
        vars(tokenizer).update(tokenize=lambda texts: None)
        vars(stub).update(tokenizer=tokenizer)
        patch.setitem(sys.modules, "open_clip", stub)
        patch.setitem(sys.modules, "open_clip.tokenizer", tokenizer)
        try:
            yield importlib.import_module("perfusion_pytorch")
        except ModuleNotFoundError as error:
            if os.environ.get("CI"):
                raise
            pytest.skip(f"perfusion-pytorch is not installed ({error})")
        for name in [name for name in sys.modules if name.split(".")[0] == "perfusion_pytorch"]:
            patch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def network(theirs: Any) -> torch.nn.Module:
    """A word and one cross-attention layer, as that package wraps them."""
    layer = {
        path: theirs.Rank1EditModule(torch.nn.Linear(768, 320, bias=False), C=torch.eye(768), is_key_proj=path == "k")
        for path in ("k", "v")
    }
    word = theirs.EmbeddingWrapper(torch.nn.Embedding(10, 768), superclass_embed_id=3)
    return torch.nn.ModuleDict({"word": word, **layer})


@pytest.mark.parametrize("name", ["concept.pt", "concept.safetensors", "concept"])
def test_such_a_file_is_recognized_under_any_name(network: torch.nn.Module, tmp_path: Path, name: str) -> None:
    save = importlib.import_module("perfusion_pytorch.save_load").save
    save(network, str(tmp_path / name))
    with pytest.raises(ConceptFileError, match=f"{name} was saved by perfusion-pytorch.*Learn the concept anew"):
        load(tmp_path / name)


def test_an_older_pickle_is_recognized_too(tmp_path: Path) -> None:
    content = {"embed_params": torch.zeros(1, 4), "key_value_params": [], "C_inv": torch.eye(4)}
    torch.save(content, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    with pytest.raises(ConceptFileError, match="perfusion-pytorch"):
        load(tmp_path / "old.safetensors")


def test_other_pickles_are_not_taken_for_one(tmp_path: Path) -> None:
    torch.save({"string_to_param": {"*": torch.zeros(1, 768)}}, tmp_path / "inversion.pt")
    with pytest.raises(ConceptFileError, match="inversion.pt is a pickle file, which can run code"):
        load(tmp_path / "inversion.pt")


def test_what_such_a_file_holds_was_not_trained(network: torch.nn.Module) -> None:
    """Why nothing is lost by refusing it: o*_V is not among what that package trains."""
    optimizer = importlib.import_module("perfusion_pytorch.optimizer")
    trained = {id(parameter) for parameter in optimizer.get_finetune_parameters(network) if parameter.requires_grad}
    names = {name for name, parameter in network.named_parameters() if id(parameter) in trained}
    assert names == {"word.concepts"}
