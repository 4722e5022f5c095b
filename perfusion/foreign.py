"""Files of other programs that people take for concepts: told apart without being opened, and why they are refused."""

from __future__ import annotations

LOOKED_AT = 4096
_PERFUSION_PYTORCH = (b"embed_params", b"key_value_params")


def refusal(start: bytes) -> str | None:
    """Why a pickle file with this start (its first ``LOOKED_AT`` bytes) cannot be imported, None for unknown ones.

    The checkpoints of perfusion-pytorch 0.1.23 hold, for all layers in the order of the network's modules, i* and o*,
    the word's embedding and C^-1. They name no word, no super-category, no layer and no model, hold the locked keys in
    place of the encoding e_super that they stand for, and o*_V as it began: its ``Rank1EditModule.parameters()`` offers
    that of keys to the optimizer, not that of values.
    """
    if all(name in start for name in _PERFUSION_PYTORCH):
        return (
            "was saved by perfusion-pytorch and cannot be imported: it is a pickle file, which can run code when it is "
            "opened, and it names neither the concept's word nor its super-category nor the model it belongs to. Learn "
            "the concept anew from its photos, with Train Concept."
        )
    return None
