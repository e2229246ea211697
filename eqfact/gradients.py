"""How does the output move with every value and every weight? One more walk over the graph, in reverse.

Each op turns the cotangent of its output into those of its inputs (``vjp``) and of its weights (``weight_vjp``); a value read
by several nodes collects the sum. All values of the forward pass are held, and each cotangent until its node has used
it: the peak is about twice the size of all values, and one array the size of the weights. The order of sums is fixed by the
graph, so results are the same bit for bit on every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from eqfact.graph import Data, Graph, Node, values
from eqfact.ops.base import Array, Weighted

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Gradients:
    """Cotangents of every value ``(N, C, *spatial)`` by name, and of the weights of every weighted node, summed over the batch.

    >>> net = Graph.chain((2,), fc=Dense([[3.0, 1.0]]))
    >>> found = backward(net, np.array([[1.0, 2.0]]), {"fc": np.array([[1.0]])})
    >>> found.values["x"], found.weights["fc"]
    (array([[3., 1.]]), array([[1., 2.]]))
    """

    values: Mapping[str, Array]
    weights: Mapping[str, Array]


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """How much of the noise in each weight and each activation channel reaches the output, as a power.

    ``weights[node]`` is ``(groups, out // groups, in // groups)``, summed over taps; ``activations[value]`` is ``(C,)``, summed over
    pixels. ``signal`` is the power of the output in the same measure, so that ``noise / signal`` is the inverse SQNR. ``rough``: what would
    do better, where they come from statistics alone; empty for those of gradients.

    >>> net = Graph.chain((2,), fc=Dense([[3.0, 1.0]]))
    >>> found = gradient_sensitivities(net, np.array([[1.0, 2.0]]))
    >>> found.weights["fc"].shape, found.activations["x"]
    ((1, 1, 2), array([9., 1.]))
    """

    weights: Mapping[str, Vector]
    activations: Mapping[str, Vector]
    signal: float
    rough: str = ""

    def rescaled(self, graph: Graph, factors: Mapping[str, Array]) -> Sensitivities:
        """Those of the equivalent network in which the values of ``graph`` are multiplied by ``factors``, a factorization of it for one.

        A weight, ``f_out / f_in`` times as large, matters ``(f_in / f_out)**2`` times as much.
        """
        weights = {}
        for node in graph.nodes:
            if (s := self.weights.get(node.name)) is not None:
                made, read = factors[node.name].reshape(len(s), -1, 1), factors[node.inputs[0]].reshape(len(s), 1, -1)
                weights[node.name] = s * (read / made) ** 2
        return replace(self, weights=weights, activations={value: s / factors[value] ** 2 for value, s in self.activations.items()})


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
            with np.errstate(over="ignore"):  # of a mask made as a product with the lowest number
                back = node.op.vjp(seen[node.name], *inputs)
        except TypeError as error:
            raise TypeError(f"node '{node.name}': {error}") from error
        yield node, inputs, seen[node.name]
        for name, g in zip(node.inputs, back, strict=True):
            seen[name] = seen[name] + g if name in seen else g
