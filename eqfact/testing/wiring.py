"""How is a small network written down? A line for each node: its name, its op, and what it reads."""

from __future__ import annotations

from collections.abc import Mapping

from eqfact.graph import Graph, Node
from eqfact.ops import Op, Shape


def wired(inputs: Shape | Mapping[str, Shape], outputs: str, *nodes: tuple[str, Op, str]) -> Graph:
    """A network from nodes as name, op and the names that it reads, in one string, as the outputs are; a shape alone is that of ``x``.

    >>> wired((2,), "y", ("a", ReLU(), "x"), ("y", Add(), "a x")).shapes["y"]
    (2,)
    """
    return Graph({"x": inputs} if isinstance(inputs, tuple) else inputs,
                 tuple(Node(name, op, tuple(read.split())) for name, op, read in nodes), tuple(outputs.split()))


def needed(graph: Graph) -> set[str]:
    """The values that the outputs depend on, and themselves.

    >>> sorted(needed(wired((2,), "a", ("a", ReLU(), "x"), ("b", ReLU(), "a"))))
    ['a', 'x']
    """
    found = set(graph.outputs)
    for node in reversed(graph.nodes):
        if node.name in found:
            found.update(node.inputs)
    return found
