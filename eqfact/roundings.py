"""How far may the values of a network be off by roundings alone?

One of two networks that are compared walks through the data here, and asks every op how it passes errors on at the values held
(:meth:`eqfact.ops.Op.errors`): ``c u |W_L| ... |W_1| |x|`` in a chain of layers (PAPER 8). The comparison itself is
:mod:`eqfact.verification`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from eqfact.graph import Graph, Node
from eqfact.ops.base import Array, Labels, Relation, Weighted, along_channels, channel_vector, finite_magnitude

Vector = npt.NDArray[np.float64]

#: Two values are near if no entry differs by more than ``sqrt(u)`` over this, of the largest: by 1.5e-5 in float32, 7e-10 in float64.
NEAR = 16.0


class Side:
    """One of two networks on its way through the data, with what is known of its values.

    :meth:`errors` bounds the rounding errors of the values that it holds, in units of ``u``; they are found when they are asked for.
    :meth:`slopes` is one positive number a channel that any factorization multiplies by the channel's factor: ``|W_L| ... |W_1| s``,
    without biases and summed over taps. Nothing cancels there, so factors read off it stay sharp in any depth. Beside it stands the same
    times the doubt about the factors in it, in units of ``u``.
    """

    #: Roundings of one weight, in both networks, with those of a BatchNorm's slope.
    OF_WEIGHTS = 8.0

    def __init__(self, graph: Graph, held: dict[str, Array], u: float) -> None:
        self.graph, self.held, self.u = graph, held, u
        self._relations: dict[str, list[Relation]] = {}
        for relation in graph.traced.relations:
            self._relations.setdefault(relation.node, []).append(relation)
        self._errors: dict[str, Array] = {}
        self._slopes: dict[str, Vector] = {}
        #: Where a value is taken as it is, its errors in units of its own roundings, one number a channel.
        self._fresh: dict[str, Vector] = {}

    def start(self, name: str, slopes: Vector, unsure: Vector | float = 0.0) -> None:
        """Take the value held as it is, up to its own rounding and a doubt in units of ``u``, and these slopes with the same doubt."""
        self._fresh[name] = np.ones(len(slopes)) + unsure
        self._slopes[name] = np.stack([slopes, slopes * (unsure + 1)])

    def restart(self, name: str, where: npt.NDArray[np.bool_], value: Array, slopes: Vector, unsure: Vector | float = 0.0) -> None:
        """The same with another value in the channels ``where``; the others stay as they are."""
        if where.all():
            self.held[name] = value
            self.start(name, slopes, unsure)
            return
        held, errors, before, channels = self.held[name], self.errors(name), self.slopes(name), along_channels(where, value.ndim - 1)
        self.held[name] = np.where(channels, value, held)
        self.start(name, slopes, unsure)
        self._errors[name] = np.where(channels, self._own(name), errors)
        del self._fresh[name]
        self._slopes[name] = np.where(where, self._slopes[name], before)

    def errors(self, name: str) -> Array:
        """The bound on the errors of a value in units of ``u``, never below its magnitudes."""
        for node in self._missing(name, {*self._errors, *self._fresh}):
            errors, inputs = [self._known(i) for i in node.inputs], [self.held[i] for i in node.inputs]
            with np.errstate(over="ignore", invalid="ignore"):
                bound = node.op.errors(errors, inputs, self.held[node.name], self.u)
                if np.isnan(bound.max()):  # beyond overflow nothing is bounded, not even 0 * inf
                    bound = np.where(np.isnan(bound), np.inf, bound)
            self._errors[node.name] = bound
        return self._known(name)

    def _known(self, name: str) -> Array:
        return self._own(name) if name in self._fresh else self._errors[name]

    def _own(self, name: str) -> Array:
        """The roundings of a value taken as it is, and the doubt about it."""
        value = self.held[name]
        size = finite_magnitude(value)
        with np.errstate(over="ignore"):
            size *= along_channels(self._fresh[name], value.ndim - 1).astype(value.dtype)
        size += np.finfo(value.dtype).tiny  # among subnormal numbers a rounding is as large as at the smallest normal one
        return size

    def slopes(self, name: str) -> Vector:
        """The slopes of a value, ``(2, C)``."""
        for node in self._missing(name, self._slopes):
            with np.errstate(over="ignore", invalid="ignore"):
                self._slopes[node.name] = self._slope(node)
        return self._slopes[name]

    def _missing(self, name: str, known: Collection[str]) -> list[Node]:
        """All nodes that this value depends on, in order, from values that are known."""
        if name in known:
            return []
        needed, todo = {name}, list[Node]()
        for node in reversed(self.graph.nodes):
            if node.name in needed and node.name not in known:
                todo.append(node)
                needed.update(node.inputs)
        return todo[::-1]

    def _slope(self, node: Node) -> Vector:
        op = node.op
        if isinstance(op, Weighted):
            # taps are few: over such short axes einsum takes half the time of sum
            weights = np.einsum("goit->goi", op.absolute.taps(), dtype=np.float64)
            groups, out, inner = weights.shape
            read = np.broadcast_to([1.0, 0.0], (groups, inner, 2))
            if op.divides:
                read = self._slopes[node.inputs[0]].reshape(2, groups, inner).transpose(1, 2, 0)
            s = np.matmul(weights, read).reshape(groups * out, 2).T.copy()
        else:
            # what carries a channel of the input on has its label; what is related to such channels moves with them; all else is pinned
            read = np.concatenate([self._slopes[i] for i in node.inputs], axis=1)
            labels = np.concatenate([channel_vector(self.graph.labels[i]) for i in node.inputs])
            made = channel_vector(self.graph.labels[node.name])
            for relation in self._relations.get(node.name, ()):
                labels, read = _extended(labels, read, relation)
            at, found = _places(labels, made)
            s = np.where(found, read[:, at], [[1.0], [0.0]])
        s = np.where(np.isfinite(s) & (s > 0), s, 0.0)
        s[1] += (self.OF_WEIGHTS * isinstance(op, Weighted) + op.roundings * np.finfo(np.float64).eps / 2 / self.u) * s[0]
        return s

    def nearness(self, name: str) -> Array:
        """Which errors of a value count as near: ``sqrt(u) / 16`` of the most that a channel's last layer adds up, ``|W| |x|``, as it
        passes through what lies between, and the roundings since.

        An entry whose terms happen to cancel out is not more exact than the others for that.
        """
        terms: dict[str, Array] = {}
        since: dict[str, Array] = {}
        needed, todo = {name}, list[Node]()
        for node in reversed(self.graph.nodes):
            if node.name in needed:
                todo.append(node)
                if not _adds_up(node):
                    needed.update(node.inputs)
        with np.errstate(over="ignore", invalid="ignore"):
            for node in reversed(todo):
                op, inputs, y = node.op, [self.held[i] for i in node.inputs], self.held[node.name]
                if _adds_up(node):
                    sizes = [np.abs(v) for v in inputs]
                    terms[node.name] = op.passes(sizes, inputs, self.u) + op.rounds(inputs, y) / op.roundings
                    since[node.name] = np.zeros_like(y)
                    continue
                for i in node.inputs:
                    if i in self.graph.inputs:
                        terms[i], since[i] = np.abs(self.held[i]), np.zeros_like(self.held[i])
                terms[node.name] = op.passes([terms[i] for i in node.inputs], inputs, self.u)
                since[node.name] = op.errors([since[i] for i in node.inputs], inputs, y, self.u)
        near = near_by(largest(terms[name]), self.held[name].dtype, self.u)
        return along_channels(near, since[name].ndim - 1) + self.u * since[name]


def _places(labels: Labels, wanted: Labels) -> tuple[Labels, npt.NDArray[np.bool_]]:
    """Where each label stands among others, and whether it does."""
    order = np.argsort(labels, kind="stable")
    at = order[np.searchsorted(labels[order], wanted).clip(max=len(labels) - 1)]
    return at, labels[at] == wanted


def _extended(labels: Labels, slopes: Vector, relation: Relation) -> tuple[Labels, Vector]:
    """Labels and their slopes, ``(2, n)``, and those that a relation gives for its first term: ``s = prod s_i ** (-c_i / c)``."""
    made, *others = relation.labels.T
    c, *coefficients = relation.coefficients
    log, doubt, known = np.zeros(len(made)), np.zeros(len(made)), np.ones(len(made), bool)
    for term, coefficient in zip(others, coefficients, strict=True):
        at, found = _places(labels, term)
        size = slopes[0, at]
        known &= found & (size > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            log -= coefficient / c * np.log(size)
            doubt += abs(coefficient / c) * slopes[1, at] / size
    with np.errstate(over="ignore", invalid="ignore"):
        s = np.where(known, np.exp(log), 0.0)
        return np.append(labels, made), np.concatenate([slopes, [s, np.where(known, s * doubt, 0.0)]], axis=1)


def _adds_up(node: Node) -> bool:
    """Whether a node is a layer whose terms its outputs are measured by; a BatchNorm belongs to the layer before it."""
    return isinstance(node.op, Weighted) and node.op.gridded


def largest(value: Array) -> Array:
    """The largest entry of each channel, ``(C,)``."""
    entries: Array = value.max(axis=(0, *range(2, value.ndim)))
    return entries


def near_by(sizes: Array, dtype: np.dtype[Any], u: float) -> Vector:
    """What errors count as near, for channels whose largest entries are these; never less than of the smallest normal number."""
    near: Vector = u**0.5 / NEAR * np.maximum(sizes.astype(np.float64), np.finfo(dtype).tiny)
    return near
