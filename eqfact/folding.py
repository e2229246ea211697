"""Which BatchNorms vanish into a neighbour without changing the function?

At inference BatchNorm is ``s x + t`` a channel. Behind a weighted op it scales rows and shifts the bias, ``W' = s W, b' = s b + t``;
in front of one it scales columns, ``W' = W s, b' = b + sum W t``, if no padding stands between them. An Identity between the two goes with
them. The merged op takes the name of the value that it now computes, so every value that survives keeps its name and its meaning (PAPER 2).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from eqfact.graph import Graph, Node
from eqfact.ops.base import Weighted
from eqfact.ops.elementwise import Identity
from eqfact.ops.normalizing import Normalization
from eqfact.ops.weighted import BatchNorm, Conv, Dense

Vector = npt.NDArray[np.float64]


def fold_batchnorm(graph: Graph) -> Graph:
    """Fold every BatchNorm into the weighted op before it, or else after it, wherever that is exact.

    A BatchNorm stays where the value between the two has another reader or is an output, where the weights are shared with
    another node, and where padding or a transposed convolution stands behind it; :func:`folding_obstacles` says which and why.

    >>> one = np.ones(1)
    >>> net = Graph.chain((1,), fc=Dense(np.array([[2.0]])), bn=BatchNorm(3 * one, one, 0 * one, one, eps=0.0))
    >>> fold_batchnorm(net)["bn"].op.weight, fold_batchnorm(net)["bn"].op.bias
    (array([[6.]]), array([1.]))
    """
    while True:
        for node in graph.nodes:
            if isinstance(node.op, BatchNorm):
                folded = _fold(graph, node)
                if isinstance(folded, Graph):
                    graph = folded
                    break
        else:
            return graph


def folding_obstacles(graph: Graph) -> dict[str, str]:
    """Why each BatchNorm of a network cannot be folded, by name; one that can be folded is not listed.

    >>> one = np.ones(1)
    >>> folding_obstacles(Graph.chain((1,), bn=BatchNorm(one, one, one, one)))
    {'bn': "'x' before it is a network input; 'bn' behind it is a network output"}
    """
    verdicts = {node.name: _fold(graph, node) for node in graph.nodes if isinstance(node.op, BatchNorm)}
    return {name: verdict for name, verdict in verdicts.items() if isinstance(verdict, str)}


def _fold(graph: Graph, node: Node) -> Graph | str:
    """The graph without this BatchNorm, or the reasons on both sides."""
    before = _into_maker(graph, node)
    if isinstance(before, Graph):
        return before
    after = _into_reader(graph, node)
    return after if isinstance(after, Graph) else f"{before}; {after}"


def _into_maker(graph: Graph, node: Node) -> Graph | str:
    (value,) = node.inputs
    passed: set[str] = set()
    while value not in graph.inputs and isinstance(graph[value].op, Identity) and not _not_alone(graph, value):
        passed.add(value)
        (value,) = graph[value].inputs
    if value in graph.inputs:
        return f"'{value}' before it is a network input"
    maker = graph[value]
    if not isinstance(maker.op, Weighted):
        return f"'{value}' before it is made by {type(maker.op).__name__}, which has no weights"
    if obstacle := _not_alone(graph, value, maker):
        return obstacle
    s, t = _affine(node)
    return _merge(graph, {maker.name, node.name, *passed}, replace(maker, name=node.name, op=_scaled_rows(maker.op, s, t)))


def _into_reader(graph: Graph, node: Node) -> Graph | str:
    value, passed = node.name, set[str]()
    while len(graph.readers[value]) == 1 and isinstance(graph.readers[value][0].op, Identity) and value not in graph.outputs:
        value = graph.readers[value][0].name
        passed.add(value)
    readers = graph.readers[value]
    if not readers or value in graph.outputs:
        return f"'{value}' behind it is {'a network output' if value in graph.outputs else 'read by nobody'}"
    reader = readers[0]
    if not isinstance(reader.op, Weighted):
        return f"'{value}' behind it is read by '{reader.name}' ({type(reader.op).__name__}), which has no weights"
    if not reader.op.divides:
        return f"'{reader.name}' behind it ({type(reader.op).__name__}) divides by what it reads"
    if obstacle := _not_alone(graph, value, reader):
        return obstacle
    s, t = _affine(node)
    if t.any() and not isinstance(reader.op, (Dense, BatchNorm)) and not (isinstance(reader.op, Conv) and not np.any(reader.op.padding)):
        return f"'{reader.name}' behind it ({type(reader.op).__name__}) meets the shift with only part of its taps at the border"
    return _merge(graph, {node.name, reader.name, *passed}, replace(reader, op=_scaled_columns(reader.op, s, t), inputs=node.inputs))


def _not_alone(graph: Graph, value: str, weighted: Node | None = None) -> str | None:
    """Why the value between BatchNorm and weighted op, or the weights, cannot be changed, if that is so."""
    if value in graph.outputs:
        return f"'{value}' between is a network output"
    if len(readers := graph.readers[value]) > 1:
        return f"'{value}' between has {len(readers)} readers"
    if weighted is not None and (uses := Counter(id(n.op) for n in graph.nodes)[id(weighted.op)]) > 1:
        return f"the weights of '{weighted.name}' are used by {uses} nodes"
    return None


def _affine(node: Node) -> tuple[Vector, Vector]:
    """BatchNorm as ``s x + t``, in float64."""
    op = node.op
    assert isinstance(op, BatchNorm)
    s = op.gamma / np.sqrt(op.var.astype(np.float64) + op.eps)
    return s, op.beta - op.mean * s


def _scaled_rows(op: Weighted, s: Vector, t: Vector) -> Weighted:
    """``s * op(x) + t``."""
    if isinstance(op, BatchNorm):
        return replace(op, gamma=(op.gamma * s).astype(op.gamma.dtype), beta=(op.beta * s + t).astype(op.beta.dtype))
    dtype = op.weight.dtype
    bias = t if op.bias is None else op.bias * s + t
    if isinstance(op, Normalization):
        return replace(op, gamma=(op.gamma * s).astype(dtype), beta=bias.astype(dtype))  # type: ignore[type-var]  # final ops are dataclasses
    return _with(op, op.weight * s.reshape(-1, *(1,) * (op.weight.ndim - 1)), bias, dtype)


def _scaled_columns(op: Weighted, s: Vector, t: Vector) -> Weighted:
    """``op(s * x + t)``, for ops that meet the shift with all their taps."""
    if isinstance(op, BatchNorm):  # gamma (s x + t - mean) = gamma s (x - (mean - t) / s), but s may be 0: shift beta instead
        slope, shift = op.weight[:, 0].astype(np.float64), op.bias.astype(np.float64)
        ones = np.ones_like(op.gamma)
        return BatchNorm((slope * s).astype(op.gamma.dtype), (slope * t + shift).astype(op.gamma.dtype), 0 * ones, ones, eps=0.0)
    taps = op.taps().astype(np.float64)
    groups, _, inner, _ = taps.shape
    shift = (taps * t.reshape(groups, 1, inner, 1)).sum(axis=(2, 3)).reshape(-1)
    bias = shift if op.bias is None else op.bias + shift
    if op.bias is None and not t.any():
        bias = None
    return _with(op, (taps * s.reshape(groups, 1, inner, 1)).reshape(op.weight.shape), bias, op.weight.dtype)


def _with(op: Weighted, weight: Vector, bias: Vector | None, dtype: npt.DTypeLike) -> Weighted:
    changed = {"weight": weight.astype(dtype), "bias": None if bias is None else bias.astype(dtype), "grid": None}
    return replace(op, **changed)  # type: ignore[type-var]  # every final op is a dataclass


def _merge(graph: Graph, gone: set[str], merged: Node) -> Graph:
    """The graph with one node in the place of two."""
    nodes = []
    for node in graph.nodes:
        if node.name == merged.name:
            nodes.append(merged)
        elif node.name not in gone:
            nodes.append(node)
    return replace(graph, nodes=tuple(nodes))
