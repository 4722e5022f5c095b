"""What concepts make of a prompt: r and gate of every token, which concepts will appear, and what to change.

r_m = (e_m . d*) / (i* . d*) says how much of a concept is in token m, and its gate g_m how far the edit answers (Tewel
et al. 2023, eq. 3). Both are read from ``Directions``, so that what is told here is what the edit does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .concept import Concept
from .edit import ParallelConceptsError, Weighed, gate, preserving_gate
from .stack import ConceptStack, ConceptUse, word_number

Role = Literal["start", "text", "end"]
State = Literal["appears", "shut", "missing", "off"]

OPEN = 0.5  # a gate below this on its own word: the concept will not appear
WELL_OPEN = 0.75  # what advice aims at
THRESHOLD = 0.25
PART = "\u00b7"  # what a token is called that holds only a part of a letter
# The range and step of a bias on nodes.
_LOWEST, _HIGHEST, _STEP = -1.0, 2.0, 0.01
_NEUTRAL = "a photo of a {}"
_SHOWN_WORDS = 6


@dataclass(frozen=True)
class Token:
    """One token of an encoded prompt: what it stands for, and the concept's word it is a part of, if any.

    ``text`` is empty where a letter is not complete yet. ``ends_word`` tells the last token of a written word;
    ``chunk`` counts the parts that a long prompt is encoded in.
    """

    text: str
    role: Role = "text"
    placeholder: str = ""
    ends_word: bool = True
    weight: float = 1.0
    chunk: int = 0


@dataclass(frozen=True)
class EncodedPrompt:
    """The tokens of a prompt, padding included, their encodings ``context`` (1, m, d), and what weights of words that
    are looked at more do to these, where that is known.
    """

    tokens: tuple[Token, ...]
    context: Tensor
    weighed: Weighed | None = None

    def __post_init__(self) -> None:
        if self.context.ndim != 3 or self.context.shape[:2] != (1, len(self.tokens)):
            raise ValueError(
                f"the prompt has {len(self.tokens)} tokens but encodings of shape {tuple(self.context.shape)}: the "
                "output of this text encoder does not follow its tokens, so they cannot be inspected"
            )


@dataclass(frozen=True)
class Affected:
    """A word that is no concept's own, or the prompt's end, and how far a concept's gate opens on it."""

    text: str
    gate: float


@dataclass(frozen=True)
class ConceptReport:
    """What becomes of one concept in a prompt.

    ``r`` and ``gate`` are the largest on its own word, NaN where it does not stand there. ``affected`` are words whose
    gate is above the threshold, ``answers`` such words of other concepts; ``advice`` is what to change, most important
    first.
    """

    use: ConceptUse
    state: State
    r: float
    gate: float
    affected: tuple[Affected, ...]
    answers: tuple[Affected, ...]
    advice: tuple[str, ...]

    @property
    def summary(self) -> str:
        """One sentence."""
        word, kind = self.use.concept.placeholder, self.use.concept.super_category
        told = {
            "appears": f"appears: its gate opens to {self.gate:.2f} on its word (r {self.r:.2f})",
            "shut": f"will not appear: its gate opens only to {self.gate:.2f} on its word (r {self.r:.2f})",
            "missing": "will not appear: its word is not in the prompt",
            "off": "is off: its strength is 0",
        }[self.state]
        return f"{word} ({kind}) {told}."


@dataclass(frozen=True)
class Inspection:
    """Tokens of a prompt, the padding of a chunk as one, and r and gates (m, j) of the concepts, float32 on the CPU."""

    tokens: tuple[Token, ...]
    r: Tensor
    gates: Tensor
    concepts: tuple[ConceptReport, ...]
    threshold: float
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """The whole of it as plain text."""
        return "\n\n".join(filter(None, ["\n".join(self._findings()), "\n".join(self._table())]))

    def _findings(self) -> list[str]:
        lines = [*self.notes] or ([] if self.concepts else ["There is no concept: the prompt is the model's own."])
        for report in self.concepts:
            g = report.use.gate
            lines.append(f"{report.summary} Bias {g.bias:.2f}, temperature {g.temperature:.2f}.")
            if report.affected:
                lines.append(f"  It also affects {listed(report.affected)}.")
            if report.answers:
                lines.append(f"  It answers to {listed(report.answers)}.")
            lines += [f"  - {advice}" for advice in report.advice]
        return lines

    def _table(self) -> list[str]:
        """r and gate of every token; own words are marked."""
        names = [report.use.concept.placeholder for report in self.concepts]
        labels = [label(token) for token in self.tokens]
        first = max([5, *map(len, labels)])
        widths = [max(13, len(name)) for name in names]
        rows = ["  ".join(["token".ljust(first), *(n.ljust(w) for n, w in zip(names, widths, strict=True))])]
        rows.append("  ".join([" " * first, *("     r   gate".ljust(width) for width in widths)]))
        for m, token in enumerate(self.tokens):
            cells = [
                f"{self.r[m, j]:6.2f}  {self.gates[m, j]:5.2f}{'*' if token.placeholder == names[j] else ''}".ljust(
                    widths[j]
                )
                for j in range(len(names))
            ]
            rows.append("  ".join([labels[m].ljust(first), *cells]).rstrip())
        return [row.rstrip() for row in rows]


def label(token: Token) -> str:
    """What a token is called in tables: its text and its weight, or which end of the prompt it is."""
    if token.role != "text":
        return f"[{token.role}]" if token.chunk == 0 else f"[{token.role} {token.chunk + 1}]"
    text = token.text or PART
    return text if math.isclose(token.weight, 1.0) else f"{text} x{token.weight:.4g}"


def listed(found: tuple[Affected, ...]) -> str:
    """Words and their gates for people, the first few of them."""
    told = [f"{entry.text} ({entry.gate:.2f})" for entry in found[:_SHOWN_WORDS]]
    return ", ".join(told) + (f" and {len(found) - _SHOWN_WORDS} more" if len(found) > _SHOWN_WORDS else "")


def inspect(
    stack: ConceptStack, prompt: str, read: Callable[[str], EncodedPrompt], threshold: float = THRESHOLD
) -> Inspection:
    """What the concepts of a stack make of a prompt. ``read`` encodes one as the host does for pictures.

    ``threshold`` is the gate above which a word counts as affected. Raises ValueError where it is not within 0 and 1.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"a gate lies between 0 and 1, and so must the threshold; it is {threshold}")
    encoded = read(prompt)
    r, gates, notes = _measure(stack, encoded)
    tokens, r, gates = _folded(encoded.tokens, r, gates)
    reports = tuple(
        _report(use, tokens, r[:, j], gates[:, j], prompt, read, threshold) for j, use in enumerate(stack.uses)
    )
    return Inspection(tokens, r, gates, reports, threshold, notes)


def _measure(stack: ConceptStack, encoded: EncodedPrompt) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """r and gates (m, j) of a prompt. Concepts that are off are measured as if they were on, alone."""
    context = encoded.context
    words = torch.tensor([[word_number(t.placeholder) if t.placeholder else 0 for t in encoded.tokens]])
    r = torch.zeros(context.shape[1], len(stack))
    gates, notes = torch.zeros_like(r), []
    on = [j for j, use in enumerate(stack.uses) if use.active]
    groups = [[j] for j in range(len(stack)) if j not in on]
    try:
        groups += [on] if on and stack.active.edit() else []
    except ParallelConceptsError as error:
        notes.append(f"Apply Concepts will refuse these concepts: {error}")
        groups += [[j] for j in on]
    for group in groups:
        edit = ConceptStack(tuple(stack.uses[j] for j in group)).edit()
        with edit.told(words, encoded.weighed):
            found, opened = edit.read(context)
        r[:, group], gates[:, group] = found[0].cpu(), opened[0].cpu()
    return r, gates, tuple(notes)


def _folded(tokens: tuple[Token, ...], r: Tensor, gates: Tensor) -> tuple[tuple[Token, ...], Tensor, Tensor]:
    """All end tokens and padding of a chunk as one token, with the largest r and gate of them."""
    groups: list[list[int]] = []
    for m, token in enumerate(tokens):
        before = tokens[groups[-1][0]] if groups else None
        if before is not None and token.role == before.role == "end" and token.chunk == before.chunk:
            groups[-1].append(m)
        else:
            groups.append([m])
    largest = [torch.stack([values[group].amax(dim=0) for group in groups]) for values in (r, gates)]
    return tuple(tokens[group[0]] for group in groups), largest[0], largest[1]


def _report(
    use: ConceptUse,
    tokens: tuple[Token, ...],
    r: Tensor,
    gates: Tensor,
    prompt: str,
    read: Callable[[str], EncodedPrompt],
    threshold: float,
) -> ConceptReport:
    """One concept's part: r and gates (m,) of the tokens of a prompt."""
    word = use.concept.placeholder
    own = torch.tensor([token.placeholder == word for token in tokens])
    there = bool(own.any())
    own_r, own_gate = (float(values[own].max()) if there else math.nan for values in (r, gates))
    widest: dict[tuple[str, str], float] = {}  # of words that are written several times, once
    for text, placeholder, group in _words(tokens):
        if placeholder != word:
            widest[text, placeholder] = max(float(gates[group].max()), widest.get((text, placeholder), 0.0))
    others = sorted((entry for entry in widest.items() if entry[1] > threshold), key=lambda entry: -entry[1])
    affected = tuple(Affected(text, g) for (text, placeholder), g in others if not placeholder)
    answers = tuple(Affected(text, g) for (text, placeholder), g in others if placeholder)
    if not use.active:
        off = f"Set its strength above 0 to use {word}."
        return ConceptReport(use, "off", own_r, own_gate, (), (), (off,))
    state: State = "missing" if not there else "appears" if own_gate >= OPEN else "shut"
    # Words of other concepts are theirs, whatever is in them.
    ordinary = torch.tensor([not token.placeholder for token in tokens])
    alone = use.concept.scope == "word"  # whatever is in other words, its gate stays shut on them
    other_r = float(r[ordinary].max()) if ordinary.any() and not alone else -math.inf
    advice = [_how_to_write(word, use.concept, prompt)] if state == "missing" else []
    # One piece of advice about the bias, not two that contradict each other.
    if state == "shut" or (state == "appears" and own_gate < WELL_OPEN and not others):
        advice.append(_how_to_open(use, own_r, other_r, threshold, read))
    elif others:
        advice.append(_how_to_close(use, own_r, other_r, answers, threshold))
    return ConceptReport(use, state, own_r, own_gate, affected, answers, tuple(advice))


def _words(tokens: tuple[Token, ...]) -> list[tuple[str, str, list[int]]]:
    """Written words, put together from their tokens, and the prompt's start and end: text, placeholder, indices."""
    found: list[tuple[str, str, list[int]]] = []
    unfinished = False
    for m, token in enumerate(tokens):
        if token.role != "text":
            found.append((f"the {token.role} of the prompt", "", [m]))
        elif token.placeholder:
            if found and found[-1][1] == token.placeholder:
                found[-1][2].append(m)
            else:
                found.append((token.placeholder, token.placeholder, [m]))
        elif unfinished:
            text, placeholder, group = found[-1]
            found[-1] = (text + token.text, placeholder, [*group, m])
        else:
            found.append((token.text, "", [m]))
        unfinished = token.role == "text" and not token.placeholder and not token.ends_word
    return found


def _how_to_write(word: str, concept: Concept, prompt: str) -> str:
    bare, text = word.strip("<>"), prompt.lower()
    if bare in text:
        return f"The prompt says {bare!r} without its angle brackets: write {word}."
    if concept.super_category.lower() in text:
        return f"Write {word} in place of {concept.super_category!r}."
    return f"Write {word} where it would say {concept.super_category!r}."


def _how_to_open(
    use: ConceptUse, own_r: float, other_r: float, threshold: float, read: Callable[[str], EncodedPrompt]
) -> str:
    """What opens a gate that is shut, or half shut, on its own word: a lower bias where that singles the word out."""
    word = use.concept.placeholder
    bias = bias_that_opens(use, own_r)
    if bias is not None and own_r > other_r:
        beside = _gate_at(use, other_r, bias)
        price = f", and to {beside:.2f} on other words" if beside > threshold else ""
        return f"Lower the bias of {word} to {bias:.2f}: its gate opens to {_gate_at(use, own_r, bias):.2f}{price}."
    elsewhere = _own_gate(use, read(_NEUTRAL.format(word)))
    if elsewhere >= WELL_OPEN:
        return (
            f"Move {word} to the front of the prompt, or to a phrase of its own: in {_NEUTRAL.format(word)!r} its gate "
            f"opens to {elsewhere:.2f}."
        )
    if use.concept.estimator == "paper":
        return f"Train {word} again with the estimator 'robust', whose gates open wherever the word stands."
    if bias is not None:
        return (
            f"Lower the bias of {word} to {bias:.2f}; other words hold more of it than its own, and will change too. "
            "Better, train it again, on the text encoder that you draw with."
        )
    return f"No bias opens the gate of {word}: train it again, on the text encoder that you draw with."


def _how_to_close(
    use: ConceptUse, own_r: float, other_r: float, answers: tuple[Affected, ...], threshold: float
) -> str:
    """What shuts a gate on words that are not its own, without shutting it on its own."""
    word = use.concept.placeholder
    bias = bias_that_shuts(use, other_r, threshold)
    stays = math.nan if bias is None or math.isnan(own_r) else _gate_at(use, own_r, bias)
    if bias is not None and not stays < OPEN:
        kept = "" if math.isnan(stays) else f", and {stays:.2f} remains on its own word"
        return f"Raise the bias of {word} to {bias:.2f}: other words then stay below {threshold:.2f}{kept}."
    if answers:
        return (
            f"{word} cannot be told from {', '.join(entry.text for entry in answers)} by its bias alone: lower its "
            "temperature, name each in a phrase of its own, or train one of them again under another super-category."
        )
    if use.concept.estimator == "paper":
        return f"Train {word} again with the estimator 'robust', which tells it better from the words around it."
    return f"Lower the temperature of {word}, so that its gate decides more sharply between its word and others."


def _own_gate(use: ConceptUse, encoded: EncodedPrompt) -> float:
    """The largest gate on a concept's own word in a prompt, 0 where it does not stand there."""
    own = [m for m, token in enumerate(encoded.tokens) if token.placeholder == use.concept.placeholder]
    _, gates, _ = _measure(ConceptStack((use,)), encoded)
    return float(gates[own].max()) if own else 0.0


def bias_that_opens(use: ConceptUse, r: float) -> float | None:
    """The largest bias, at most the concept's own, at which its gate is well open at r; None where none is."""
    return _bias(lambda biases: (biases <= use.gate.bias) & (_gates_at(use, r, biases) >= WELL_OPEN), -1)


def bias_that_shuts(use: ConceptUse, r: float, threshold: float) -> float | None:
    """The smallest bias, at least the concept's own, at which its gate is below the threshold at r; None: none is."""
    return _bias(lambda biases: (biases >= use.gate.bias) & (_gates_at(use, r, biases) < threshold), 0)


def _bias(fits: Callable[[Tensor], Tensor], which: int) -> float | None:
    """The first or last bias of those that a node can be set to which fits."""
    biases = torch.arange(round(_LOWEST / _STEP), round(_HIGHEST / _STEP) + 1) * _STEP
    found = biases[fits(biases)]
    return round(float(found[which]), 2) if len(found) else None


def _gates_at(use: ConceptUse, r: float, biases: Tensor) -> Tensor:
    """A concept's gate at r with other biases (n,) than its own: (n,)."""
    function = preserving_gate if use.concept.form == "preserving" else gate
    return function(torch.tensor(r), biases, use.gate.temperature)


def _gate_at(use: ConceptUse, r: float, bias: float) -> float:
    return float(_gates_at(use, r, torch.tensor([bias])))
