"""Which factors could be free if engines did one multiplication more, and at what price?

Two passes ``Graph -> Graph`` that change no value, both opt-in. ``x g(x)`` (SiLU, GELU, HardSwish) lets a factor pass as ``x g(s x)``, with a
slope ``s' = s / f`` a channel. And where nothing can take a factor up, as behind a residual that runs into a normalisation, a multiplication
by channel can (docs/algebra.md).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from eqfact.channels import channels
from eqfact.graph import Graph, Node, fresh_name
from eqfact.ops import GELU, BatchNorm, HardSwish, Normalization, Op, SiLU, Sloped, Weighted

#: Activations that are a value times a function of it, between 0 and 1 but for a little.
GATES = (SiLU, GELU, HardSwish)


def slope_gates(graph: Graph) -> Graph:
    """The network with a slope, 1 so far, in every SiLU, GELU and HardSwish: the same function, through which factors pass.

    The price: equalized, each of them has a slope a channel, so that an engine needs a multiplication or a table a channel.

    >>> from eqfact import Dense, degrees_of_freedom
    >>> net = Graph.chain((1,), fc1=Dense(np.ones((3, 1))), act=SiLU(), fc2=Dense(np.ones((1, 3))))
    >>> degrees_of_freedom(net), degrees_of_freedom(slope_gates(net))
    (0, 3)
    """
    memo: dict[int, Op] = {}
    return graph.with_ops({node.name: memo.setdefault(id(node.op), Sloped(node.op, 1.0))
                           for node in graph.nodes if isinstance(node.op, GATES)})


def add_scales(graph: Graph, values: Collection[str] | None = None) -> Graph:
    """The network with a multiplication by channel, by 1 so far, between values and the weights or normalisations that read them.

    ``values`` names them; if None, all but inputs whose channels have not each a factor of its own. It is a BatchNorm that only multiplies,
    called ``"NAME.scale"``: fold BatchNorms before, not behind. The price: one multiplication an entry, and one more rounding, but
    before normalisations, which are computed in float. :class:`ValueError` for a name that is no value, or that none of them reads.

    >>> from eqfact import Dense, degrees_of_freedom
    >>> net = Graph.chain((3,), fc=Dense(np.ones((2, 3))))
    >>> degrees_of_freedom(add_scales(net, ["x"]))
    3
    """
    readers = {value: [node for node in nodes if _absorbs(node)] for value, nodes in graph.readers.items()}
    for value in values or ():
        if not readers.get(value):
            what = "which no layer with weights on a grid reads" if value in graph.shapes else "which is not a value of the network"
            raise ValueError(f"a scale is asked for at '{value}', {what}")
    if values is None:
        # before normalisations first: they tie channels, and what is free without them needs no scale
        normalised = _unfree(graph, {value for value, nodes in readers.items() if any(isinstance(n.op, Normalization) for n in nodes)})
        opened = add_scales(graph, normalised) if normalised else graph
        return add_scales(opened, left) if (left := _unfree(opened, {v for v in readers if readers[v] and v not in normalised})) else opened
    names, scaled, nodes = set(graph.shapes), dict[str, Node](), list[Node]()
    for value in values:
        one = np.ones(graph.shapes[value][0], graph.dtype or np.float64)
        name = fresh_name(f"{value}.scale", names)
        names.add(name)
        scaled[value] = Node(name, BatchNorm(one, 0 * one, 0 * one, one, eps=0.0), (value,))
    for node in graph.nodes:
        nodes.append(replace(node, inputs=tuple(scaled[i].name if _absorbs(node) and i in scaled else i for i in node.inputs)))
    return replace(graph, nodes=(*nodes, *scaled.values()))


def _absorbs(node: Node) -> bool:
    """Does a scale in front of this node help: weights on a grid, or channels that are normalised together?"""
    return isinstance(node.op, Normalization) or (isinstance(node.op, Weighted) and node.op.gridded)


def _unfree(graph: Graph, values: Collection[str]) -> list[str]:
    """Those of the values, no inputs, whose channels have not each a factor of its own."""
    labels = channels(graph).labels
    return [value for value, of_value in labels.items() if value in values and value not in graph.inputs
            and len(set(of_value.tolist()) - {0}) < len(of_value)]


def freed_by_slopes(graph: Graph) -> int:
    """How many more factors :func:`slope_gates` would make free."""
    if not any(isinstance(node.op, GATES) for node in graph.nodes):
        return 0
    return channels(slope_gates(graph)).degrees_of_freedom - channels(graph).degrees_of_freedom
