"""Which factors could be free if engines did one multiplication more, and at what price?

Two passes ``Graph -> Graph`` that change no value, both opt-in. ``x g(x)`` (SiLU, GELU, HardSwish) lets a factor pass as ``x g(s x)``,
with a slope ``s' = s / f`` a channel. And where nothing can take a factor up, as behind a residual that runs into a normalisation, a
multiplication by channel can (docs/algebra.md).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from eqfact.channels import channels
from eqfact.graph import Graph, Node, fresh_name
from eqfact.ops import BatchNorm, Op, Sloped, Weighted
from eqfact.ops.blocking import GATES


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
    """The network with a multiplication by channel, by 1 so far, between values and the normalisations, or else the layers, that read them.

    A normalisation wants one factor of all channels that it takes together: behind a residual nothing else can take up others. ``values``
    names where; if None, it is wherever a normalisation reads channels that have not each a factor of its own, inputs left aside. The op is
    a BatchNorm that only multiplies, called ``"NAME.scale"``: fold BatchNorms before, not behind. The price is one multiplication an entry;
    before a normalisation, which engines compute in float, nothing is rounded for it, elsewhere the value is stored once more.
    :class:`ValueError` for a name that is no value, or that neither a normalisation nor a layer reads.

    >>> from eqfact import Dense, degrees_of_freedom
    >>> net = Graph.chain((3,), fc=Dense(np.ones((2, 3))))
    >>> degrees_of_freedom(add_scales(net, ["x"]))
    3
    """
    norms, layers = ({value: [node.name for node in nodes if isinstance(node.op, Weighted) and node.op.divides == divides]
                      for value, nodes in graph.readers.items()} for divides in (False, True))
    for value in values or ():
        if not norms.get(value) and not layers.get(value):
            what = "which neither a normalisation nor a layer reads" if value in graph.shapes else "which is not a value of the network"
            raise ValueError(f"a scale is asked for at '{value}', {what}")
    if values is None:
        labels = channels(graph).labels
        values = [value for value, of_value in labels.items() if norms[value] and value not in graph.inputs
                  and len(set(of_value.tolist()) - {0}) < len(of_value)]
    names, scaled, instead = set(graph.shapes), list[Node](), dict[tuple[str, str], str]()
    for value in values:
        one = np.ones(graph.shapes[value][0], graph.dtype)
        name = fresh_name(f"{value}.scale", names)
        names.add(name)
        scaled.append(Node(name, BatchNorm(one, 0 * one, 0 * one, one, eps=0.0), (value,)))
        instead |= {(reader, value): name for reader in norms[value] or layers[value]}
    nodes = [replace(node, inputs=tuple(instead.get((node.name, i), i) for i in node.inputs)) for node in graph.nodes]
    return replace(graph, nodes=(*nodes, *scaled))


def freed_by_slopes(graph: Graph) -> int:
    """How many more factors :func:`slope_gates` would make free."""
    if not any(isinstance(node.op, GATES) for node in graph.nodes):
        return 0
    return channels(slope_gates(graph)).degrees_of_freedom - channels(graph).degrees_of_freedom
