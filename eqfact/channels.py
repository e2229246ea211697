"""Which channels of which values must share one factor, which must keep the factor 1, and which follow from others?

The walk of :class:`eqfact.Graph` gives every channel a label and collects what factors must obey: with ``u = log f``, relations
``sum c_i u_i = 0`` with whole ``c_i`` (docs/algebra.md). Ties are resolved first (connected components), then the rest by elimination over
the whole numbers: all solutions are ``u = B t``, and ``t`` is whole if and only if ``u`` is, so that powers of two stay powers of two. The
free numbers ``t`` are the network's *degrees of freedom*. Section 1 of the paper, for any topology: residuals, concats, fan-out, shared
weights and products of values are no special cases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array, identity, vstack
from scipy.sparse.csgraph import connected_components

from eqfact.graph import Graph
from eqfact.ops.base import Labels, Relation, channel_vector

Vector = npt.NDArray[np.float64]


def powers(forms: csr_array, f: Vector) -> Vector:
    """``prod f_j ** c_j`` for every row of whole ``c``, by multiplication alone: exact for powers of two."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        base = f[forms.indices]
        base = np.where(forms.data > 0, base, 1 / base)
        power = base.copy()
        for k in range(2, int(np.abs(forms.data).max()) + 1):
            power[np.abs(forms.data) >= k] *= base[np.abs(forms.data) >= k]
        result: Vector = np.multiply.reduceat(power, forms.indptr[:-1])
        return result


@dataclass(frozen=True, eq=False)
class Channels:
    """The resolved labels of a network.

    ``labels[value]`` is ``(C,)``: 0 where pinned, ``1 ... degrees_of_freedom`` for the free number that is the logarithm of the channel's
    factor, and beyond that the place of the channel's form in ``forms``. ``reasons[value]`` gives for each channel why it is pinned, or
    None; ``pinned`` sums that up for every value that has a pinned channel.

    >>> net = Graph.chain((2,), fc1=Dense(np.eye(2)), act=ReLU(), fc2=Dense(np.eye(2)))
    >>> found = channels(net)
    >>> found.labels["act"], found.degrees_of_freedom, sorted(found.pinned)
    (array([1, 2]), 2, ['fc2', 'x'])
    """

    labels: Mapping[str, Labels]
    degrees_of_freedom: int
    reasons: Mapping[str, tuple[str | None, ...]]
    #: Whole coefficients of the free numbers in the forms of labels beyond them, ``(forms, degrees_of_freedom + 1)``.
    compound: csr_array | None = None

    @property
    def pinned(self) -> dict[str, str]:
        """Why channels of a value keep the factor 1, for every value with such a channel."""
        found = {}
        for value, reasons in self.reasons.items():
            distinct = dict.fromkeys(r for r in reasons if r is not None)
            if distinct:
                held = sum(r is not None for r in reasons)
                some = "" if held == len(reasons) else f"{held} of {len(reasons)} channels: "
                found[value] = some + "; ".join(distinct)
        return found

    @property
    def size(self) -> int:
        """How many labels there are, 0 among them."""
        return self.degrees_of_freedom + 1 + (0 if self.compound is None else self.compound.shape[0])

    def numbers(self) -> dict[str, list[int]]:
        """A number for each channel of every value, in the order in which they come: 0 where the factor is 1 whatever the others are, and
        equal where two factors are always equal, be it that they are tied or that they follow from the same free numbers alike.

        >>> from eqfact.ops import Dense, Mul
        >>> from eqfact.graph import Node
        >>> layer = Dense(np.ones((1, 1)))
        >>> net = Graph({"x": (1,)}, (Node("a", layer, ("x",)), Node("y", Mul(), ("a", "x"))), ("a",))
        >>> channels(net).numbers()
        {'x': [0], 'a': [0], 'y': [0]}
        """
        rows = [tuple(sorted(zip(self.forms.indices[start:end].tolist(), self.forms.data[start:end].tolist(), strict=True)))
                for start, end in zip(self.forms.indptr, self.forms.indptr[1:], strict=False)]
        place: dict[object, int] = {rows[0]: 0}
        return {value: [place.setdefault(rows[label], len(place)) for label in of.tolist()] for value, of in self.labels.items()}

    @cached_property
    def forms(self) -> csr_array:
        """``B``: the logarithms of factors by label are ``forms @ t``, for free numbers ``t`` whose entry 0 is 0, ``(size, free + 1)``."""
        free = identity(self.degrees_of_freedom + 1)
        return csr_array(free if self.compound is None else vstack([free, self.compound]))

    def by_label(self, free: Vector) -> Vector:
        """Factors by label, from those of the free numbers, ``(degrees_of_freedom + 1,)``: products of their powers."""
        if self.compound is None:
            return free
        return np.concatenate([free, powers(self.compound, free)])

    def follow(self, f: Vector, labels: Labels) -> None:
        """Set these labels beyond the free numbers to what follows from the others, in factors by label, in place."""
        if len(labels):
            assert self.compound is not None
            f[labels] = powers(csr_array(self.compound[labels - self.degrees_of_freedom - 1]), f)

    def restricted(self, chosen: npt.NDArray[np.bool_], reason: str) -> Channels:
        """The labels when only these free numbers are left, ``(degrees_of_freedom + 1,)``, and channels of others keep the factor 1."""
        kept = self.forms[:, np.flatnonzero(chosen)]
        label, compound = _labels(csr_array(kept))
        labels = {value: label[of_value] for value, of_value in self.labels.items()}
        reasons = {value: tuple(reason if before and not now else old for before, now, old in zip(
            of_value.tolist(), labels[value].tolist(), self.reasons[value], strict=True)) for value, of_value in self.labels.items()}
        return Channels(labels, int(chosen.sum()), reasons, compound)


def channels(graph: Graph, *, hold: Mapping[str, str] | None = None) -> Channels:
    """Resolve the channel labels of a network; ``hold`` pins further values, each with its reason.

    >>> net = Graph.chain((1,), fc1=Dense(np.ones((3, 1))), act=ReLU(), fc2=Dense(np.ones((1, 3))))
    >>> channels(net).labels["act"].tolist(), channels(net).labels["x"].tolist()
    ([1, 2, 3], [0])
    """
    if not hold and graph in _RESOLVED:
        return _RESOLVED[graph]
    traced = graph.traced
    pins = [*traced.pins]
    for value, reason in (hold or {}).items():
        if value not in graph.labels:
            raise ValueError(f"'{value}' is to be held, but is not a value of the network")
        pins.append((channel_vector(graph.labels[value]), reason))
    component = _components(traced.size, traced.ties)

    # the first pin of a component gives its reason
    texts: list[str | None] = [*(reason for _, reason in pins), *(f"held by '{r.node}': {r.reason}" for r in traced.relations), None]
    reason_of = np.full(int(component.max()) + 1, -1)
    for index in range(len(pins) - 1, -1, -1):
        reason_of[component[pins[index][0]]] = index
    forms = _solve(component, traced.relations, reason_of, len(pins))
    label, compound = _labels(forms)

    of_text = np.array(texts, object)  # the last, which -1 finds: no reason
    labels, reasons = {}, {}
    for value, full in graph.labels.items():
        of_channel = component[channel_vector(full)]
        labels[value] = label[of_channel]
        labels[value].flags.writeable = False
        reasons[value] = tuple(of_text[reason_of[of_channel]].tolist())
    found = Channels(labels, forms.shape[1], reasons, compound)
    if not hold:
        _RESOLVED[graph] = found
    return found


#: What was resolved before, of networks that are still there: a network cannot change.
_RESOLVED: WeakKeyDictionary[Graph, Channels] = WeakKeyDictionary()


def degrees_of_freedom(graph: Graph) -> int:
    """How many factors may be chosen freely without changing the function.

    >>> degrees_of_freedom(Graph.chain((1,), fc1=Dense(np.ones((3, 1))), act=ReLU(), fc2=Dense(np.ones((1, 3)))))
    3
    """
    return channels(graph).degrees_of_freedom


def _components(size: int, ties: Sequence[tuple[Labels, Labels]]) -> Labels:
    """Number of the connected component of every label, in the order in which labels were given out."""
    if not ties:
        return np.arange(size)
    a, b = (np.concatenate(side) for side in zip(*ties, strict=True))
    _, component = connected_components(coo_array((np.ones(len(a), np.int8), (a, b)), shape=(size, size)), directed=False)
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    order = np.empty_like(first)
    order[np.argsort(first)] = np.arange(len(first))
    return order[inverse].astype(np.int64)


def _labels(forms: csr_array) -> tuple[Labels, csr_array | None]:
    """Labels for forms: 0 for none, the number of a free number for that alone, and a number of its own for every other form."""
    terms, free = np.diff(forms.indptr), forms.shape[1]
    label = np.zeros(len(terms), np.int64)
    first = forms.indptr[:-1][terms == 1]
    alone = np.flatnonzero(terms == 1)[forms.data[first] == 1]
    label[alone] = forms.indices[forms.indptr[:-1][alone]] + 1
    others = np.flatnonzero((terms > 0) & (label == 0))
    label[others] = np.arange(free + 1, free + 1 + len(others))
    if not len(others):
        return label, None
    rest = coo_array(forms[others])
    return label, csr_array((rest.data.astype(np.float64), (rest.row, rest.col + 1)), shape=(len(others), free + 1))


# ------------------------------------------------------------------------------------------------- whole-number elimination

#: Whole coefficients by variable.
Form = dict[int, int]


def _solve(component: Labels, relations: Sequence[Relation], reason_of: Labels, first_reason: int) -> csr_array:
    """``B``, a row for every component: its logarithm as a whole combination of free numbers, in the order of components.

    ``reason_of`` holds for every component the reason of its pin, or -1; pins that follow from relations are entered, with the place of the
    relation's reason from ``first_reason`` on.
    """
    count = len(reason_of)
    solved = _Elimination(count, np.flatnonzero(reason_of >= 0))
    for index, relation in enumerate(relations):
        for row in component[relation.labels].tolist():
            solved.add(zip(row, relation.coefficients, strict=True), first_reason + index)
    free = np.ones(solved.size, bool)
    free[list(solved.forms)] = False
    place = np.cumsum(free) - 1
    rows = [*np.flatnonzero(free[:count]).tolist()]
    columns, data = place[rows].tolist(), [1] * len(rows)
    for variable, form in solved.forms.items():
        if variable < count:
            if not form and reason_of[variable] < 0:
                reason_of[variable] = solved.cause[variable]
            rows += [variable] * len(form)
            columns += [int(place[v]) for v in form]
            data += form.values()
    return csr_array((np.array(data, np.int64), (rows, columns)), shape=(count, int(free.sum())))


class _Elimination:
    """Relations with whole coefficients, solved one by one; ``forms`` holds variables in terms of those that are still free.

    The pivot of a relation is the variable of the smallest ``|c|``, the first of equals. At ``|c| = 1`` it is expressed by the others;
    else a new variable takes its place, with the remainders of the other coefficients, as in Euclid's algorithm. Every step is unimodular.
    """

    def __init__(self, count: int, pinned: Labels) -> None:
        self.size = count
        self.forms: dict[int, Form] = {variable: {} for variable in pinned.tolist()}
        #: For each eliminated variable the reason that it was given.
        self.cause: dict[int, int] = {}
        #: For each free variable those whose forms hold it.
        self._users: dict[int, set[int]] = {}

    def add(self, terms: Iterable[tuple[int, int]], cause: int) -> None:
        """One more relation ``sum c u = 0``, over terms ``(variable, c)``."""
        relation: Form = {}
        for variable, c in terms:
            form = self.forms.get(variable)
            if form is None:
                relation[variable] = relation.get(variable, 0) + c
            else:
                for v, amount in form.items():
                    relation[v] = relation.get(v, 0) + c * amount
        if 0 in relation.values():
            relation = {v: c for v, c in relation.items() if c}
        while relation:
            pivot = next(iter(relation))
            if abs(relation[pivot]) > 1:
                pivot = min(relation, key=lambda v: abs(relation[v]))
            c = relation.pop(pivot)
            if abs(c) == 1 or not relation:
                self._replace(pivot, {v: -c * a for v, a in relation.items()}, cause)
                return
            # u_pivot = u_new - sum (a // c) u, so that c u_new + sum (a mod c) u = 0
            new, self.size = self.size, self.size + 1
            self._replace(pivot, {new: 1, **{v: -(a // c) for v, a in relation.items() if a // c}}, cause)
            relation = {new: c, **{v: a % c for v, a in relation.items() if a % c}}

    def _replace(self, variable: int, form: Form, cause: int) -> None:
        """Express a free variable by others, wherever it stands."""
        self.forms[variable], self.cause[variable] = form, cause
        for v in form:
            self._users.setdefault(v, set()).add(variable)
        for user in self._users.pop(variable, ()):
            of_user = self.forms[user]
            amount = of_user.pop(variable)
            for v, a in form.items():
                of_user[v] = of_user.get(v, 0) + amount * a
                if of_user[v]:
                    self._users[v].add(user)
                else:
                    del of_user[v]
                    self._users[v].discard(user)
            if not of_user:
                self.cause[user] = cause
