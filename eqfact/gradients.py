"""How does the output move with every value and every weight? One more walk over the graph, in reverse.

Each op turns the cotangent of its output into those of its inputs (``vjp``) and of its weights (``weight_vjp``); a value read
by several nodes collects the sum. All values of the forward pass are held, and each cotangent until its node has used
it: the peak is about twice the size of all values, and one array the size of the weights. The order of sums is fixed by the
graph, so results are the same bit for bit on every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from eqfact.graph import Data, Graph, Node, values
from eqfact.ops.base import Array, Weighted


@dataclass(frozen=True, eq=False)
class Gradients:
    """Cotangents of every value ``(N, C, *spatial)`` by name, and of the weights of every weighted node, summed over the batch."""

    values: Mapping[str, Array]
    weights: Mapping[str, Array]


def backward(graph: Graph, x: Data, cotangent: Data) -> Gradients:
    """The cotangents of all values and weights, for a cotangent of the output (a dict by name for several outputs).

    Raises :class:`ValueError` if the cotangent does not have the output's shape, :class:`TypeError` if an op has no ``vjp``.

    >>> net = Graph.chain((1,), fc1=Dense(np.array([[2.0]])), act=ReLU(), fc2=Dense(np.array([[3.0]])))
    >>> g = backward(net, np.array([[1.0]]), np.array([[1.0]]))
    >>> g.values["x"], g.weights["fc1"]
    (array([[6.]]), array([[3.]]))
    """
    env = values(graph, x)
    of_values: dict[str, Array] = {}
    of_weights: dict[str, Array] = {}
    for node, inputs, g in reverse_walk(graph, env, cotangent, of_values):
        if isinstance(node.op, Weighted):
            of_weights[node.name] = node.op.weight_vjp(g, *inputs)
    return Gradients(of_values, of_weights)


def reverse_walk(graph: Graph, env: Mapping[str, Array], cotangent: Data,
                 seen: dict[str, Array]) -> Iterator[tuple[Node, list[Array], Array]]:
    """Every node that the output depends on, last first, with its inputs and the cotangent of its output; fills ``seen`` by value.

    ``env`` holds the values of the forward pass.
    """
    given = cotangent if isinstance(cotangent, Mapping) else {graph.outputs[0]: cotangent}
    if set(given) != set(graph.outputs):
        raise ValueError(f"the cotangent must name the outputs {list(graph.outputs)}, got {sorted(given)}")
    for name, value in given.items():
        g = np.asarray(value)
        if g.shape != env[name].shape:
            raise ValueError(f"the cotangent of '{name}' must have the output's shape {env[name].shape}, got {g.shape}")
        seen[name] = g.astype(env[name].dtype, copy=False)
    for node in reversed(graph.nodes):
        if node.name not in seen:
            continue
        inputs = [env[i] for i in node.inputs]
        try:
            back = node.op.vjp(seen[node.name], *inputs)
        except TypeError as error:
            raise TypeError(f"node '{node.name}': {error}") from error
        yield node, inputs, seen[node.name]
        for name, g in zip(node.inputs, back, strict=True):
            seen[name] = seen[name] + g if name in seen else g
