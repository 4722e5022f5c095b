"""The gated rank-one edit of keys and values (Tewel et al. 2023), for any number of concepts.

Axes are named as follows: ``b`` batch, ``m`` token, ``d`` width of a text encoding, ``j`` concept, ``i`` inner width of
one layer's keys or values. For a text encoding e_m and concepts j with target input i*_j, dual vector d*_j and target
output o*_j of the layer,

    r_mj = (e_m . d*_j) / (i*_j . d*_j)        how much of the concept is in the token
    g_mj = sigmoid((r_mj - beta_j) / tau_j)    its gate

and the edited projection h_m of W e_m is, in the paper's form and in the form that leaves unrelated tokens alone,

    h_m = W (e_m - sum_j a_mj i*_j) + sum_j g_mj o*_j       with a = S G^-1, S = E D^T, G = I D^T
    h_m = W e_m + sum_j g'_mj (o*_j - W i*_j)               with g' = g, brought to 0 for r <= beta / 2

Several concepts compete. Read by its own r alone, as in the paper, the word of one concept also opens the gates of
others: detectors are made to stand out from ordinary words, and learned words all do, alike kinds of things most. The
dual basis a = S G^-1 tells them apart, for it is 1 for a concept's own i* and 0 for all others', so each gate is
multiplied by the concept's share

    softmax_j(a_mj / 0.1)

which is 1 for a concept alone. Where a host tells which tokens are whose word, those are their concept's altogether
(``benchmarks.multi_concept`` measures all three). The word of a concept that is at its own words alone then gives up
r of that concept and nothing else, as if no other were there; elsewhere those that are everywhere share a dual basis
among themselves. Until words are told, such concepts may be too alike for a dual basis: twins count as one in it.

A shut gate of the paper's form leaves nothing of the concept's word. The told word of a concept that is at its own
words alone fades instead: of what its gate is further shut than that of training, gamma, its values get the word's own
back, and its keys and focus stay as they were learned,

    v_m = W_V (e_m - (r_m - [gamma_m - g_m]+) i*) + g_m o*        k_m = W_K (e_m - r_m i*) + max(g_m, gamma_m) W_K e_key

so that the thing is still where it was asked for, of looks that are any of its kind.

Both forms are ``W e_m`` plus a correction of rank 2J whose coefficients depend on the text alone: they are computed
once per context, in float32 with autocast off, and serve every layer.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from einops import einsum, rearrange
from torch import Tensor

from .focus import Focus
from .locking import KeyLock, Lock

Form = Literal["paper", "preserving"]
FORMS: tuple[Form, ...] = get_args(Form)
Pair = tuple[Tensor, Tensor]

# Beyond this cosine (in the metric of d*) two concepts cannot be told apart: the inverse of G would amplify noise.
PARALLEL = 0.995
_MAX_GRAM_CONDITION = 1e6
MAX_FOCUS, MAX_FOCUS_SHARE = 1000, 2.0
_REMEMBERED_CONTEXTS = 4
_COMPETITION = 0.1  # temperature of the concepts' shares
_FOREIGN, _OWN = 0.5, 0.8  # below the first belonging a token is no word of a concept, above the second it is


class ParallelConceptsError(ValueError):
    """Two concepts whose target inputs are so alike that no gate can tell one from the other."""


@dataclass(frozen=True)
class Gate:
    """One concept's gate: bias beta, temperature tau, and how strongly its edit is applied (0 to 1, or beyond).

    ``focus_share`` is how much of the focus that the concept was trained with its word has: 1 all of it, 0 none, and
    between as far in the logarithm.
    """

    bias: float = 0.6
    temperature: float = 0.15
    strength: float = 1.0
    focus_share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.focus_share <= MAX_FOCUS_SHARE:
            raise ValueError(f"focus_share is {self.focus_share}; it must be from 0 to {MAX_FOCUS_SHARE:g}")
        if not (self.temperature > 0 and all(map(math.isfinite, vars(self).values()))):
            raise ValueError(f"a gate's temperature must be above 0, and all its numbers finite: {self}")


# That of trainings, as in the paper.
TRAINING_GATE = Gate(bias=0.75, temperature=0.1)


def presence(context: Tensor, i_star: Tensor, d_star: Tensor) -> Tensor:
    """r: how much of each concept is in each token. (..., m, d), (j, d), (j, d) -> (..., m, j), float32."""
    with _full_precision(context.device):
        scale = einsum(i_star.float(), d_star.float(), "j d, j d -> j")
        return einsum(context.float(), d_star.float(), "... m d, j d -> ... m j") / scale


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off, where it is on: some devices know no autocast at all."""
    known = device.type in ("cpu", "cuda", "mps", "xpu") and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def gate(r: Tensor, bias: Tensor | float, temperature: Tensor | float) -> Tensor:
    """g = sigmoid((r - beta) / tau). Any shape; bias and temperature broadcast against it."""
    return torch.sigmoid((r - bias) / temperature)


def preserving_gate(r: Tensor, bias: Tensor | float, temperature: Tensor | float) -> Tensor:
    """The gate of the identity-preserving form: exactly 0 for r <= beta / 2, then rising to 1 without a jump.

    The plain gate is 0.0006 to 0.07 at r = 0; times the full difference o* - W i* that would touch every token.
    """
    floor = torch.sigmoid(torch.as_tensor(-bias / (2 * temperature), dtype=r.dtype, device=r.device))
    return torch.relu(gate(r, bias, temperature) - floor) / (1 - floor)


def gram(i_star: Tensor, d_star: Tensor) -> Tensor:
    """G_ab = i*_a . d*_b in float64. (j, d), (j, d) -> (j, j)."""
    return einsum(i_star.double(), d_star.double(), "a d, b d -> a b")


def require_distinct(i_star: Tensor, d_star: Tensor, names: Sequence[str]) -> None:
    """Raise ParallelConceptsError, naming both, when two target inputs (j, d) are near-parallel in the metric."""
    read = _mutual(i_star, d_star)
    cosine = _cosines(read)
    for a in range(len(names)):
        for b in range(a + 1, len(names)):
            if cosine[a, b].abs() > PARALLEL:
                raise ParallelConceptsError(
                    f"{names[a]} and {names[b]} are too alike to be combined (cosine {cosine[a, b]:.4f}): their gates "
                    "would answer to each other's word. Switch one of them off, or train both with scope word, which "
                    "keeps them apart."
                )
    if len(names) > 1 and torch.linalg.cond(read) > _MAX_GRAM_CONDITION:
        raise ParallelConceptsError(
            f"{', '.join(names)} together are too alike to be told apart. Switch one of them off."
        )


def _mutual(i_star: Tensor, d_star: Tensor) -> Tensor:
    """r of each concept (column) at each target input (row), float64. (j, d), (j, d) -> (j, j)."""
    g = gram(i_star, d_star)
    return g / g.diagonal()


def _cosines(read: Tensor) -> Tensor:
    """Between target inputs, by what ``_mutual`` says: (j, j)."""
    # Every d* has a scale of its own, and a metric where C_within is in it: only the product of both directions is
    # free of scale, the squared cosine where the metric is shared.
    return read.sign() * (read * read.T).clamp_min(0).sqrt()


def _twins(i_star: Tensor, d_star: Tensor, confined: Sequence[bool]) -> list[int]:
    """For each concept, the first that it is a twin of, itself where of none: confined ones, near-parallel in a row."""
    near, first = _cosines(_mutual(i_star, d_star)).abs() > PARALLEL, list(range(len(i_star)))
    for b in range(len(first)):
        for a in range(b):
            if near[a, b] and confined[a] and confined[b]:
                first = [min(first[a], first[b]) if each in (first[a], first[b]) else each for each in first]
    return first


def _dual_basis(i_star: Tensor, d_star: Tensor, first: Sequence[int], among: Tensor) -> Tensor:
    """What reads a = S G^-1 of the concepts ``among`` (j,) from encodings, 0 for others: (j, d), (j, d) -> (j, d),
    float64; of twins, all read that of the first.
    """
    found = torch.zeros_like(d_star, dtype=torch.float64)
    distinct: dict[int, int] = {}  # the first of each that is there
    for j in among.nonzero().flatten().tolist():
        distinct.setdefault(first[j], j)
    if distinct:
        chosen = list(distinct.values())
        basis = torch.linalg.solve(gram(i_star[chosen], d_star[chosen]).T, d_star[chosen].double())
        places = list(distinct)
        found[among] = basis[[places.index(each) for each, there in zip(first, among.tolist(), strict=True) if there]]
    return found


def _detector(
    i_star: Tensor, d_star: Tensor, first: Sequence[int], among: Tensor, subtracting: Tensor, competing: bool
) -> Tensor:
    """The matrix of ``Directions.detector`` whose dual bases are of the concepts ``among`` (j,) alone; the columns of
    others in them are 0. ``subtracting`` (j,) are those of the paper's form. (j, d), (j, d) -> (d, 3j) or (d, 2j).
    """
    together = torch.tensor([first.count(each) for each in first], device=d_star.device).unsqueeze(-1)
    own = d_star.double() / gram(i_star, d_star).diagonal().unsqueeze(-1)
    # Only concepts of the paper's form subtract their part of the encoding, so only these share a Gram matrix.
    columns = [own, _dual_basis(i_star, d_star, first, among & subtracting) / together]
    if competing:
        columns.append(_dual_basis(i_star, d_star, first, among))
    return rearrange(torch.cat(columns), "columns d -> d columns").float().contiguous()


@dataclass(frozen=True)
class Directions:
    """What the text side of J concepts needs: the matrices that turn a context into gates. All float32.

    ``detector`` (d, 3j) gives r in its first J columns, what is subtracted in the next, and a = S G^-1 of all concepts,
    by which they compete, in the last; where they do not, it is (d, 2j). ``preserving`` is (j,), and so are ``bias``,
    ``temperature``, ``strength`` and ``focus_share``, or (rows, 1, j) where each row of a batch has gates of its own.
    ``confined`` (j,) are concepts that are at their own words alone, where these are told. ``elsewhere`` is the
    detector for tokens of such a context that are no word of theirs: that of the other concepts among themselves.
    """

    i_star: Tensor
    detector: Tensor
    bias: Tensor
    temperature: Tensor
    strength: Tensor
    focus_share: Tensor
    preserving: Tensor
    confined: Tensor
    elsewhere: Tensor
    any_preserving: bool
    any_confined: bool
    mixed: bool
    competing: bool

    @classmethod
    def of(
        cls,
        i_star: Tensor,
        d_star: Tensor,
        gates: Sequence[Gate],
        forms: Sequence[Form],
        names: Sequence[str] | None = None,
        *,
        competing: bool = False,
        confined: Sequence[bool] | None = None,
    ) -> Directions:
        """Stack J concepts: i* and d* (j, d), a gate and a form each; ``competing``, or each by itself as in the paper.
        ``confined`` says which are at their own words alone, where these are told; these may be as alike as they like.

        Raises ParallelConceptsError when two of them cannot be told apart.
        """
        confined = confined or [False] * len(gates)
        if not (len(i_star) == len(d_star) == len(gates) == len(forms) == len(confined)):
            raise ValueError("i*, d*, gates, forms and confined must be given for the same number of concepts")
        names = names or [f"concept {j + 1}" for j in range(len(gates))]
        first = _twins(i_star, d_star, confined)
        distinct = sorted(set(first))
        require_distinct(i_star[distinct], d_star[distinct], [names[k] for k in distinct])
        preserving = torch.tensor([form == "preserving" for form in forms])
        everywhere = torch.tensor([not of_word for of_word in confined])
        competing = competing and len(gates) > 1
        mixed = any(confined) and not all(confined)

        def detector(among: Tensor) -> Tensor:
            return _detector(i_star, d_star, first, among, ~preserving, competing)

        of_all = detector(torch.ones_like(everywhere))
        return cls(
            i_star=i_star.float(),
            detector=of_all,
            bias=torch.tensor([g.bias for g in gates]),
            temperature=torch.tensor([g.temperature for g in gates]),
            strength=torch.tensor([g.strength for g in gates]),
            focus_share=torch.tensor([g.focus_share for g in gates]),
            preserving=preserving,
            confined=~everywhere,
            elsewhere=detector(everywhere) if mixed else of_all,
            any_preserving="preserving" in forms,
            any_confined=any(confined),
            mixed=mixed,
            competing=competing,
        )

    def __len__(self) -> int:
        return len(self.i_star)

    def varied(self, rows: Sequence[Sequence[Gate]]) -> Directions:
        """The same with other gates for each row of a batch: ``rows[n]`` holds those of the J concepts in row n.

        Contexts then have as many rows, or a multiple of them, one set after the other, as hosts lay prompts and
        negative prompts into one batch.
        """
        if not rows or any(len(gates) != len(self) for gates in rows):
            raise ValueError(f"each row needs a gate for each of {len(self)} concepts")

        def table(name: str) -> Tensor:
            return torch.tensor([[[getattr(gate, name) for gate in gates]] for gates in rows]).to(self.bias)

        return replace(self, **{field.name: table(field.name) for field in fields(Gate)})

    def to(self, device: torch.device) -> Directions:
        """The same on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def coefficients(self, context: Tensor, owners: Tensor | None = None) -> tuple[Pair, Pair | None]:
        """Coefficients of ``W i*`` and of ``o*`` for each token: (b, m, d) -> two of (b, m, j), in float32; those of
        values, and those of keys, None where they are the same.

        ``owners`` (b, m, j) bool: whose word each token is, where that is known.
        """
        with _full_precision(context.device):
            _, subtracted, opened, attended = self._read(context, owners)
            strength = _for_batch(self.strength, len(context), alone=False)

            def pair(subtracted: Tensor, added: Tensor) -> Pair:
                if self.any_preserving:
                    subtracted = torch.where(self.preserving, added, subtracted)
                return -strength * subtracted, strength * added

            if attended is None:
                return pair(subtracted, opened), None
            return pair(subtracted - (attended - opened), opened), pair(subtracted, attended)

    def gates(self, context: Tensor, owners: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """r and g of each token, as the edit uses them, before strength: (b, m, d) -> two of (b, m, j), float32.

        ``owners`` as for ``coefficients``.
        """
        with _full_precision(context.device):
            r, _, opened, _ = self._read(context, owners)
        return r, opened

    def attended(self, context: Tensor, owners: Tensor | None = None) -> Tensor:
        """g as far as attention goes, of words that fade no less than in training: (b, m, d) -> (b, m, j).

        ``owners`` as for ``coefficients``.
        """
        with _full_precision(context.device):
            _, _, opened, attended = self._read(context, owners)
        return opened if attended is None else attended

    def focused(self, context: Tensor) -> Tensor:
        """How far each concept's focus counts: its share, as far as the concept is applied at all; of a shape that goes
        with gates on a context (b, m, d).
        """
        return _for_batch(self.strength.clamp(0, 1) * self.focus_share, len(context), alone=False)

    def belonging(self, context: Tensor) -> Tensor:
        """How far each token is a concept's word, whatever its gate is set to: (b, m, d) -> (b, m, j), 0 to 1."""
        with _full_precision(context.device):
            parts = (context.float() @ self.detector).split(len(self), dim=-1)
            return self._shared(gate(parts[0], Gate.bias, Gate.temperature), parts, None)

    def _read(self, context: Tensor, owners: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """r, what of it is subtracted in the paper's form, g, and g as far as attention goes, None where it is g:
        (b, m, d) -> four of (b, m, j).
        """
        told = owners if self.any_confined else None
        parts = (context.float() @ (self.detector if told is None else self.elsewhere)).split(len(self), dim=-1)
        r, subtracted = parts[0], parts[1]
        if told is None:
            return r, subtracted, self._shared(self._opened(r), parts, owners), None
        word = told & self.confined
        subtracted = torch.where(word.any(dim=-1, keepdim=True), word * r, subtracted)
        if self.mixed and self.competing:
            parts = (r, subtracted, parts[2].masked_fill(self.confined, -math.inf))
        opened = self._shared(self._opened(r), parts, owners)
        trained = self._by_form(r, TRAINING_GATE.bias, TRAINING_GATE.temperature)
        return r, subtracted, opened, torch.where(word, torch.maximum(opened, trained), opened)

    def _shared(self, opened: Tensor, parts: Sequence[Tensor], owners: Tensor | None) -> Tensor:
        """Gates (b, m, j) by each concept's share of a token, by its part of the dual basis or whose word it is."""
        if not self.competing:
            return opened
        share = torch.softmax(parts[2] / _COMPETITION, dim=-1)
        if owners is not None:
            share = torch.where(owners.any(dim=-1, keepdim=True), owners.to(share), share)
        return opened * share

    def _opened(self, r: Tensor) -> Tensor:
        """Each concept's gate by its own form, without competition: (..., j) -> (..., j)."""
        return self._by_form(r, _for_batch(self.bias, len(r)), _for_batch(self.temperature, len(r)))

    def _by_form(self, r: Tensor, bias: Tensor | float, temperature: Tensor | float) -> Tensor:
        opened = gate(r, bias, temperature)
        if not self.any_preserving:
            return opened
        return torch.where(self.preserving, preserving_gate(r, bias, temperature), opened)


def of_own_word(belonging: Tensor) -> Tensor:
    """Which tokens count as a concept's word, from how far they are: 0 to 1, with little between.

    Belonging that is guessed from encodings seldom reaches 1, and is seldom 0.
    """
    return ((belonging - _FOREIGN) / (_OWN - _FOREIGN)).clamp(0, 1)


def _through(linear: Callable[[Tensor], Tensor], tokens: Tensor, *behind: Tensor) -> tuple[Tensor, Tensor]:
    """What ``linear`` makes of tokens (b, m, d) and, in the same call, of all vectors behind them, (n, d) each."""
    length = tokens.shape[1]
    vectors = [each.to(tokens).expand(len(tokens), *each.shape) for each in behind]
    projected = linear(torch.cat([tokens, *vectors], dim=1))
    return projected[:, :length], projected[:, length:]


def _added(projected: Tensor, coefficients: Tensor, basis: Tensor) -> Tensor:
    """Projected tokens (b, m, i) plus coefficients (b, m, 2j) times the basis [W i*; o*] (b, 2j, i)."""
    return torch.baddbmm(projected, coefficients.to(projected), basis)


def _for_batch(values: Tensor, batch: int, *, alone: bool = True) -> Tensor:
    """Settings (j,), which serve any batch, or (rows, 1, j), repeated for each set of rows in the batch.

    Where it may stand ``alone``, a single context is looked at with the settings of every row.
    """
    if values.ndim == 1 or (alone and batch == 1):
        return values
    if batch % len(values):
        raise ValueError(
            f"gates were set for the {len(values)} rows of a batch, and {batch} arrived: another extension rearranges "
            "the batch. Take it out of this model."
        )
    return values.repeat(batch // len(values), 1, 1)


class _Remembered:
    """What was computed from a context and what is told of it, for as long as these very tensors live unchanged."""

    def __init__(self, made_of: tuple[Tensor | None, ...], value: Any):
        self._made_of = [None if tensor is None else weakref.ref(tensor) for tensor in made_of]
        self._versions = list(map(_version, made_of))
        self.value = value

    def alive(self) -> bool:
        return all(tensor is None or tensor() is not None for tensor in self._made_of)

    def is_of(self, tensors: tuple[Tensor | None, ...]) -> bool:
        own = [None if tensor is None else tensor() for tensor in self._made_of]
        if any(mine is not given for mine, given in zip(own, tensors, strict=True)):
            return False
        # A tensor that died looks like none at all.
        return self.alive() and self._versions == list(map(_version, tensors))


def _version(tensor: Tensor | None) -> int | None:
    # Inference tensors keep no version counter; hosts never write into a context in place.
    return None if tensor is None or tensor.is_inference() else tensor._version


class _Memory:
    """What was made of the last few contexts."""

    def __init__(self) -> None:
        self._entries: list[_Remembered] = []

    def value(self, made_of: tuple[Tensor | None, ...], make: Callable[[], Any]) -> Any:
        """What was made of these very tensors, or what ``make`` makes of them now."""
        for entry in self._entries:
            if entry.is_of(made_of):
                return entry.value
        value = make()
        alive = [entry for entry in self._entries if entry.alive()][: _REMEMBERED_CONTEXTS - 1]
        self._entries = [_Remembered(made_of, value), *alive]
        return value


class Weighed(NamedTuple):
    """Prompt weights of words that are looked at more, 1 for all other tokens, (b, m); and ``without`` (b, m, d), what
    their encodings differ by where they have none, 0 for all other tokens.
    """

    weights: Tensor
    without: Tensor


class KeyValueEdit:
    """The edits of J concepts on the key and value projections of one model.

    ``e_super`` (j, d) are the encodings of super-categories; ``o_star_v`` maps a layer to its target values
    (j, i). Of concepts that are ``anchored`` (j,), these are what is added to ``W_V e_super``: as locked keys do, their
    values follow the weights in use. Local keys are ``W_K e_key``, of ``e_key`` (j, d) or, where none is given,
    ``e_super``. ``project`` is what a host calls in place of a layer's ``to_k`` or ``to_v``.

    A host that knows whose word each token of a context is sets ``words`` (b, m) around the call: the number, of
    ``numbers``, of the concept whose word it is, 0 for others. Of concepts that are confined (``Directions``), the edit
    is then at their own words alone, whatever r is elsewhere: W e_m of all other tokens stays as it is.

    Concepts of a ``focus`` (j,) above 1 have their words looked at more: a host that can adds what ``focus()`` says
    before the softmax of cross-attention, for several concepts place by place (``places``), those of the same number in
    ``kinds`` (j,) side by side. Prompt weights would change the looks of such words, which were learned without. A host
    that knows what they do sets ``weighed``: then encodings are as without, and a word is looked at so many times as
    much as its weight says.
    """

    def __init__(
        self,
        directions: Directions,
        e_super: Tensor,
        o_star_v: dict[str, Tensor],
        locks: Iterable[Lock] | None = None,
        numbers: Sequence[int] | None = None,
        anchored: Sequence[bool] | None = None,
        focus: Sequence[float] | None = None,
        e_key: Tensor | None = None,
        kinds: Sequence[int] | None = None,
    ):
        # Words are looked at no more where their concept's focus is 1 or none of it is wanted, in any row.
        looked_at = directions.focus_share.reshape(-1, len(directions)).amax(0) > 0
        factors = torch.tensor(focus or [1.0] * len(directions)).float().log() * looked_at.cpu()
        self._focus = factors if bool(factors.any()) else None
        self._kinds = kinds
        self._anchors = torch.tensor(anchored).float().unsqueeze(-1) if anchored and any(anchored) else None
        self.words: Tensor | None = None
        self.weighed: Weighed | None = None
        self.numbers = None if numbers is None else torch.tensor(numbers)
        self.directions = directions
        self.o_star_v = o_star_v
        self._e_super = e_super
        self._e_key = e_super if e_key is None else e_key
        self.key_lock = KeyLock(tuple(locks) if locks is not None else ("local",) * len(directions))
        self._placed: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self._directions_on: dict[torch.device, Directions] = {}
        self._remembered, self._remembered_focus, self._remembered_unweighed = _Memory(), _Memory(), _Memory()

    def project(
        self, layer: str, path: Literal["k", "v"], context: Tensor, linear: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The edited projection of a context: (b, m, d) -> (b, m, i). ``linear`` is the layer's own projection.

        ``W i*`` and the locked ``W_K e_key`` are read by sending them through ``linear`` behind the tokens, in the same
        call: exact under whatever the host does to its weights (low-rank patches, casting, offloading, hooks).
        """
        given, context = context, self._unweighed(context)
        coefficients = self._coefficients(context, given)
        i_star = self._place("i*", self.directions.i_star, context)
        if path == "k":
            tokens = coefficients.get("k_tokens", context)
            if "k" not in coefficients:
                return linear(tokens)
            projected, basis = _through(linear, tokens, i_star, self._place("key", self._e_key, context))
            return _added(projected, coefficients["k"], basis)
        target = self._place(layer, self.o_star_v[layer], context)
        if self._anchors is None:
            projected, read = _through(linear, context, i_star)
            target = target.to(read).expand(len(read), *target.shape)
        else:
            projected, read = _through(linear, context, i_star, self._place("anchor", self._e_super, context))
            read, anchor = read.chunk(2, dim=1)
            target = target.to(read) + anchor * self._place("anchors", self._anchors, context).to(anchor)
        return _added(projected, coefficients["v"], torch.cat([read, target], dim=1))

    def _unweighed(self, context: Tensor) -> Tensor:
        """A context with the encodings of words as they are without their weights."""
        weighed = self._weighed_in(context)
        if weighed is None:
            return context
        if torch.compiler.is_compiling():
            return context + weighed.without.to(context)
        made_of = context, weighed.without
        return self._remembered_unweighed.value(made_of, lambda: context + weighed.without.to(context))

    def _weighed_in(self, context: Tensor) -> Weighed | None:
        """What is told of this very context, where its words are looked at more."""
        weighed = self.weighed if self._focus is not None else None
        return weighed if weighed is not None and weighed.without.shape == context.shape else None

    def _coefficients(self, context: Tensor, given: Tensor) -> dict[str, Tensor]:
        # A compiler removes the common subexpressions itself and must not trace bookkeeping on weak references.
        # What carries a graph is computed anew: a checkpointed block must do the same work in the backward pass, and
        # what was computed without a graph has none to give.
        if torch.compiler.is_compiling() or (context.requires_grad and torch.is_grad_enabled()):
            return self._compute(context, given)
        made_of = context, self.key_lock.shift, self.words
        return self._remembered.value(made_of, lambda: self._compute(context, given))

    @contextmanager
    def told(
        self, words: Tensor | None = None, weighed: Weighed | None = None, shift: Tensor | None = None
    ) -> Iterator[None]:
        """Within the block, what a host knows of the contexts that come: ``words``, ``weighed``, and the ``shift`` that
        globally locked keys read (``KeyLock``). Behind it, nothing is known.
        """
        self.words, self.weighed, self.key_lock.shift = words, weighed, shift
        try:
            yield
        finally:
            self.words = self.weighed = self.key_lock.shift = None

    def gates(self, context: Tensor) -> Tensor:
        """g of each token, as ``read``."""
        return self.read(context)[1]

    def read(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """r and g of each token, before strength, by what is told of it: (b, m, d) -> two of (b, m, j), float32."""
        context = self._unweighed(context)
        owners = self._owners(context)
        r, opened = self.directions_on(context.device).gates(context, owners)
        return r, self._kept_in(opened, owners)

    def tell_own(self, word: Tensor) -> None:
        """Set where the word of the first concept is, (b, m) bool, as what the next contexts are made of."""
        if self.numbers is not None:
            self.words = word.long() * self.numbers[0]

    def belonging(self, context: Tensor) -> Tensor:
        """How far each token is a concept's word: exactly, where words are set. (b, m, d) -> (b, m, j), float32."""
        owners = self._owners(context)
        if owners is not None:
            return owners.float()
        return self.directions_on(context.device).belonging(self._unweighed(context))

    @property
    def focuses(self) -> bool:
        """Whether the words of any concept are to be looked at more than by themselves."""
        return self._focus is not None

    def focus(self, context: Tensor) -> Focus | None:
        """What is added before the softmax of cross-attention for each concept's words in a context (b, m, d); None
        where no word is to be looked at more.

        Of a token m and concept j it is ``share_j strength_j g_mj w_mj log(focus_j)``, of a strength that counts up to
        1, with w_mj 1 for a word of the concept and 0 for others: at full share and strength, with its gate open, the
        word's part of the attention is multiplied by the focus (before all parts are brought to a sum of 1); as the
        gate shuts, by less, but for words that fade (see the module). With it comes the logarithm of each token's
        weight, where these are told (``weighed``). No gradient goes through any of it.
        """
        factors = self._focus
        if factors is None:
            return None
        if torch.compiler.is_compiling():
            return self._focus_of(context, factors)
        weighed = self._weighed_in(context)
        made_of = context, self.words, None if weighed is None else weighed.weights
        return self._remembered_focus.value(made_of, lambda: self._focus_of(context, factors))

    def _focus_of(self, context: Tensor, factors: Tensor) -> Focus:
        with torch.no_grad(), _full_precision(context.device):
            directions = self.directions_on(context.device)
            attended = directions.attended(self._unweighed(context), self._owners(context))
            share = directions.focused(context) * attended * of_own_word(self.belonging(context))
            weighed = self._weighed_in(context)
            weighing = None if weighed is None else weighed.weights.to(share).log()
            return Focus(share * self._place("focus", factors, share), self._kinds, weighing)

    def _owners(self, context: Tensor) -> Tensor | None:
        """Whose word each token is, (b, m, j) bool; None where it is not known of this very context."""
        if self.words is None or self.numbers is None or self.words.shape != context.shape[:2]:
            return None
        words = self.words.to(context.device).unsqueeze(-1)
        return words == self._place("numbers", self.numbers, words)

    def _kept_in(self, coefficients: Tensor, owners: Tensor | None) -> Tensor:
        """Coefficients (b, m, j), 0 where those of a confined concept would be at tokens that are not of its word."""
        directions = self.directions_on(coefficients.device)
        if owners is None or not directions.any_confined:
            return coefficients
        return coefficients * (owners | ~directions.confined)

    def _compute(self, context: Tensor, given: Tensor) -> dict[str, Tensor]:
        owners = self._owners(context)
        directions = self.directions_on(context.device)

        def joined(pair: Pair) -> Tensor:
            return torch.cat([self._kept_in(part, owners) for part in pair], dim=-1).to(context.dtype)

        of_values, of_keys = directions.coefficients(context, owners)
        value = {"v": joined(of_values)}
        shifted = self.key_lock.shifted(given)
        if shifted is not None:
            value["k_tokens"] = shifted
        locally = self.key_lock.locally(shifted is not None)
        if any(locally):
            value["k"] = value["v"] if of_keys is None else joined(of_keys)
        if any(locally) and not all(locally):
            value["k"] = value["k"] * torch.tensor(locally * 2, dtype=context.dtype, device=context.device)
        return value

    def directions_on(self, device: torch.device) -> Directions:
        """The text side on a device, moved there once."""
        if device not in self._directions_on:
            self._directions_on[device] = self.directions.to(device)
        return self._directions_on[device]

    def _place(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        """A tensor on the device and in the dtype of another; remembered, since nothing moves ours for us."""
        if tensor.requires_grad:
            return tensor.to(device=like.device, dtype=like.dtype)
        key = (name, like.device, like.dtype)
        if key not in self._placed:
            self._placed[key] = tensor.detach().to(device=like.device, dtype=like.dtype)
        return self._placed[key]
