"""What is a factorization? One positive factor for every free number of the labels; applied, it gives an equivalent network.

Convention: ``x' = f * x``. The op that makes a value is multiplied on its output side, the ops that read it are divided
on their input side (section 1 of the paper). Factorizations form a group: ``(a @ b).apply(g) == a.apply(b.apply(g))``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import overload

import numpy as np
import numpy.typing as npt

from eqfact.calibration import Statistics
from eqfact.channels import Channels, channels
from eqfact.graph import Graph
from eqfact.ops.base import Array, Op, read_only
from eqfact.ops.products import ROUNDING


@dataclass(frozen=True, eq=False)
class Factorization(Mapping[str, Array]):
    """Positive factors ``(C,)`` for every value of a network, equal where channels are tied, 1 where they are pinned.

    Make one with :meth:`of` (from factors by value name), :meth:`identity`, or :func:`eqfact.equalize`.

    >>> net = Graph.chain((1,), fc1=Dense([[4.0], [1.0]]), act=ReLU(), fc2=Dense([[1.0, 4.0]]))
    >>> f = Factorization.of(net, {"act": [0.5, 2.0]})
    >>> f.apply(net)["fc1"].op.weight.ravel(), (f @ f.inverse())["act"]
    (array([2., 2.]), array([1., 1.]))
    """

    channels: Channels
    #: One factor for every free number; entry 0 is the factor of the pinned channels, 1.
    free: Array

    def __post_init__(self) -> None:
        free = read_only(np.asarray(self.free, np.float64))
        assert len(free) == self.channels.degrees_of_freedom + 1 and free[0] == 1, "one factor a free number, 1 for the pinned"
        object.__setattr__(self, "free", free)
        wrong = ~(np.isfinite(self.by_label) & (self.by_label > 0))
        if wrong.any():
            for value, labels in self.channels.labels.items():
                _refuse(wrong[labels], value, self.by_label[labels], "factors must be positive and finite")

    @cached_property
    def by_label(self) -> Array:
        """One factor for every label: those of the free numbers, and those that follow from them."""
        return read_only(self.channels.by_label(np.asarray(self.free, np.float64)))

    # two factorizations are compared by value name, with numpy; Mapping's own == would ask for the truth of arrays
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @classmethod
    def identity(cls, graph: Graph) -> Factorization:
        """All factors 1."""
        resolved = channels(graph)
        return cls(resolved, np.ones(resolved.degrees_of_freedom + 1))

    @classmethod
    def of(cls, graph: Graph, factors: Mapping[str, npt.ArrayLike]) -> Factorization:
        """The factorization with these factors; values tied to a named one follow, all others keep 1.

        Raises :class:`ValueError`, naming value and channel, for factors that are not positive and finite, that differ
        between tied channels, or that are not 1 where the network pins them.

        >>> net = Graph.chain((1,), fc1=Dense(np.ones((2, 1))), act=ReLU(), fc2=Dense(np.ones((1, 2))))
        >>> Factorization.of(net, {"act": [2.0, 4.0]}).apply(net)["fc2"].op.weight
        array([[0.5 , 0.25]])
        """
        return cls._gather(channels(graph), factors)

    @classmethod
    def _gather(cls, resolved: Channels, factors: Mapping[str, npt.ArrayLike]) -> Factorization:
        by_label = np.ones(resolved.size)
        giver = np.full(len(by_label), "", object)
        for value, given in factors.items():
            if value not in resolved.labels:
                raise ValueError(f"factors are given for '{value}', which is not a value of the network")
            labels, f = resolved.labels[value], np.asarray(given, np.float64)
            if f.shape != labels.shape:
                raise ValueError(f"value '{value}' has {len(labels)} channels, its factors have shape {f.shape}")
            _refuse(~(np.isfinite(f) & (f > 0)), value, f, "factors must be positive and finite")
            _refuse((labels == 0) & (f != 1), value, f, "this channel keeps the factor 1", resolved)
            first = np.zeros(len(by_label))
            first[labels[::-1]] = f[::-1]
            known = giver[labels] != ""
            expected = np.where(known, by_label[labels], first[labels])
            apart = np.where(labels > resolved.degrees_of_freedom, np.abs(f - expected) > ROUNDING * f, f != expected)
            _refuse((labels > 0) & apart, value, f, lambda i, v=value, k=known, e=expected, n=labels: (
                f"this channel is tied to one of '{giver[n[i]] if k[i] else v}' with factor {e[i]:g}"))
            by_label[labels], giver[labels] = f, value
        by_label[0] = 1
        result = cls(resolved, _free_numbers(resolved, by_label, giver != ""))
        for value, given in factors.items() if resolved.compound is not None else ():
            labels, f = resolved.labels[value], np.asarray(given, np.float64)
            expected = result.by_label[labels]
            _refuse(np.abs(f - expected) > ROUNDING * f, value, f, lambda i, e=expected: (
                f"this channel's factor follows from others as {e[i]:g} (see docs/algebra.md)"))
        return result

    def __getitem__(self, value: str) -> Array:
        try:
            return self.by_label[self.channels.labels[value]]
        except KeyError:
            raise KeyError(f"'{value}' is not a value of the network of this factorization") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.channels.labels)

    def __len__(self) -> int:
        return len(self.channels.labels)

    @overload
    def apply(self, target: Graph) -> Graph: ...
    @overload
    def apply(self, target: Statistics) -> Statistics: ...

    def apply(self, target: Graph | Statistics) -> Graph | Statistics:
        """The equivalent network, or the statistics that it would have.

        Raises :class:`ValueError` if the network has other values or other ties, so that its function would change.
        """
        if isinstance(target, Statistics):
            for name, stats in target.items():
                if stats.min.shape != self[name].shape:
                    raise ValueError(f"value '{name}' has {len(self[name])} channels, the statistics are of {len(stats.min)}")
            return target.rescaled(self)
        if set(target.shapes) != set(self):
            others = sorted(set(target.shapes) ^ set(self))
            raise ValueError(f"this factorization belongs to another network: values {others[:4]} are in one only")
        agreed = self._gather(channels(target), self)
        memo: dict[tuple[object, ...], Op] = {}
        ops = {}
        for node in target.nodes:
            f = [agreed[name] for name in (node.name, *node.inputs)]
            if all(np.all(v == 1) for v in f):
                continue  # an op that nothing touches is shared, not copied
            key = (id(node.op), *(v.tobytes() for v in f))  # an op used twice stays one op
            if key not in memo:
                try:
                    memo[key] = node.op.rescale(*f)
                except ValueError as error:
                    raise ValueError(f"node '{node.name}': {error}") from error
            ops[node.name] = memo[key]
        return target.with_ops(ops)

    def inverse(self) -> Factorization:
        """The factorization that undoes this one."""
        with np.errstate(over="ignore"):  # refused, with the value's name
            return Factorization(self.channels, 1 / self.free)

    def __matmul__(self, other: Factorization) -> Factorization:
        """First ``other``, then this: factors multiply."""
        if set(self) != set(other):
            raise ValueError("factorizations of different networks do not compose")
        with np.errstate(over="ignore"):
            return self._gather(self.channels, {value: self[value] * other[value] for value in self})

    def power_of_two(self) -> Factorization:
        """The nearest factors (in log) that are powers of two: the rescaled network's outputs are bit-identical.

        >>> net = Graph.chain((1,), fc1=Dense(np.ones((2, 1))), act=ReLU(), fc2=Dense(np.ones((1, 2))))
        >>> Factorization.of(net, {"act": [3.0, 0.7]}).power_of_two()["act"]
        array([4. , 0.5])
        """
        with np.errstate(over="ignore"):
            return Factorization(self.channels, np.exp2(np.rint(np.log2(self.free))))


def _free_numbers(resolved: Channels, by_label: Array, known: npt.NDArray[np.bool_]) -> Array:
    """The factors of the free numbers, from those of labels as far as they are known; 1 where nothing asks for another.

    Each form that is known gives one of its unknown numbers by the others, the first that no form before it has given, as
    ``exp2(log2(f) / c)``, which keeps powers of two; what no form gives is 1.
    """
    count = resolved.degrees_of_freedom + 1
    free, unknown = np.where(known[:count], by_label[:count], 1.0), ~known[:count]
    if resolved.compound is None:
        return free
    starts, ends = resolved.compound.indptr[:-1], resolved.compound.indptr[1:]
    asked = known[count:] & np.logical_or.reduceat(unknown[resolved.compound.indices], starts)
    # log u = rest + sum c log v, for the numbers u that forms give
    given: dict[int, tuple[float, dict[int, Fraction]]] = {}
    for row in np.flatnonzero(asked).tolist():
        numbers, powers = (of[starts[row]:ends[row]] for of in (resolved.compound.indices, resolved.compound.data))
        is_open = unknown[numbers]
        rest = float(np.log2(by_label[count + row]) - powers @ np.log2(free[numbers]))
        form = {v: Fraction(c) for v, c in zip(numbers[is_open].tolist(), powers[is_open].tolist(), strict=True)}
        while (by_others := next((v for v in form if v in given), None)) is not None:
            c, (of_others, others) = form.pop(by_others), given[by_others]
            rest -= float(c) * of_others
            for v, a in others.items():
                form[v] = form.get(v, Fraction()) + c * a
        form = {v: c for v, c in form.items() if c}
        if form:
            first = next(iter(form))
            c = form.pop(first)
            given[first] = rest / float(c), {v: -a / c for v, a in form.items()}
    for number, (rest, others) in reversed(given.items()):  # the last may stand in those before it
        free[number] = np.exp2(rest + sum(float(c) * np.log2(free[v]) for v, c in others.items()))
    return free


def _refuse(wrong: npt.NDArray[np.bool_], value: str, f: Array, rule: object, resolved: Channels | None = None) -> None:
    if wrong.any():
        i = int(np.argmax(wrong))
        text = rule(i) if callable(rule) else rule
        reason = "" if resolved is None else f" ({resolved.reasons[value][i]})"
        raise ValueError(f"value '{value}', channel {i}: {text}{reason}, got {f[i]:g}")
