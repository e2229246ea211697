"""What is a network? A list of nodes in dependency order, every value named once, and one short loop over them.

``forward`` and ``values`` run that loop over arrays; every other analysis of the library runs it over something else
(labels, factors, magnitudes, cotangents). A graph is immutable and checked when it is made; passes are ``Graph -> Graph``.
"""

from __future__ import annotations

import graphlib
import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from eqfact.ops.base import Array, Labels, Op, Shape, Trace, Weighted

#: One array ``(N, C, *spatial)``, or arrays by input name.
Data = npt.ArrayLike | Mapping[str, npt.ArrayLike]


@dataclass(frozen=True, eq=False)
class Node:
    """One use of an op: the value ``name`` is ``op`` of the values ``inputs``. One op object may serve several nodes.

    ``origin`` is what an importer wants to remember of the file that the node came from; nothing else looks at it.

    >>> relu = ReLU()
    >>> net = Graph({"x": (2,)}, [Node("a", relu, ["x"]), Node("y", relu, ["a"])], ["y"])
    >>> net["y"].inputs
    ('a',)
    """

    name: str
    op: Op
    inputs: tuple[str, ...]
    origin: object = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"a node needs a name (a string that is not empty), got {self.name!r}")
        if not isinstance(self.op, Op):
            raise TypeError(f"node '{self.name}': {self.op!r} is not an op; make one, for instance eqfact.ReLU()")
        if isinstance(self.inputs, str):
            raise TypeError(f"node '{self.name}': inputs must be a list of value names, got the string {self.inputs!r}")
        object.__setattr__(self, "inputs", tuple(self.inputs))

    def forward(self, *inputs: Array) -> Array:
        """What the op makes of the inputs; an error of the op gets the node's name."""
        try:
            return self.op.forward(*inputs)
        except (ValueError, TypeError) as error:
            raise type(error)(f"node '{self.name}': {error}") from error


@dataclass(frozen=True, eq=False)
class Graph:
    """A network: input shapes ``(C, *spatial)`` by name, nodes, and the names of the values it puts out.

    Nodes are sorted into dependency order, if they are not in one. Raises :class:`ValueError` on unknown or repeated
    names, cycles, and on inputs that an op does not take, naming the node.

    >>> net = Graph({"x": (2,)}, [Node("y", ReLU(), ["x"])], ["y"])
    >>> forward(net, np.array([[-1.0, 1.0]]))
    array([[0., 1.]])
    """

    inputs: Mapping[str, Shape]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]
    #: Shape ``(C, *spatial)`` of every value, without the batch.
    shapes: Mapping[str, Shape] = field(init=False, repr=False)
    #: Channel labels of every value, and what the walk learned about them (see :mod:`eqfact.channels`).
    labels: Mapping[str, Labels] = field(init=False, repr=False)
    traced: Trace = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.outputs, str):
            raise TypeError(f"outputs must be a list of value names, got the string {self.outputs!r}")
        object.__setattr__(self, "inputs", MappingProxyType({n: _input_shape(n, s) for n, s in self.inputs.items()}))
        object.__setattr__(self, "outputs", tuple(self.outputs))
        object.__setattr__(self, "nodes", _in_order(self.inputs, tuple(self.nodes)))
        values = {*self.inputs, *(node.name for node in self.nodes)}
        if not self.outputs or not self.inputs:
            raise ValueError("a network needs at least one input and one output")
        for output in self.outputs:
            if output not in values:
                raise ValueError(f"output '{output}' is not a value of the network; its values are {_some(values)}")
        if len(set(self.outputs)) < len(self.outputs):
            raise ValueError(f"outputs must be different values, got {list(self.outputs)}")
        self._trace()

    def _trace(self) -> None:
        """Walk the graph over channel labels: shapes, ties and pins (DESIGN: trace)."""
        trace = Trace()
        env: dict[str, Labels] = {}
        for name, shape in self.inputs.items():
            env[name] = trace.fresh(shape)
            trace.pin(env[name], f"network input '{name}'")
        for node in self.nodes:
            trace.node = node.name
            try:
                env[node.name] = node.op.trace(trace, *(env[i] for i in node.inputs))
            except (ValueError, TypeError) as error:
                raise type(error)(f"node '{node.name}': {error}") from error
        for name in self.outputs:
            trace.pin(env[name], f"network output '{name}'")
        object.__setattr__(self, "labels", MappingProxyType(env))
        object.__setattr__(self, "shapes", MappingProxyType({name: x.shape for name, x in env.items()}))
        object.__setattr__(self, "traced", trace)

    @classmethod
    def chain(cls, shape: Shape, **ops: Op) -> Graph:
        """A plain chain of ops, named by their keywords; the input is called ``"x"``, the last op is the output."""
        names = ["x", *ops]
        nodes = tuple(Node(name, op, (before,)) for before, (name, op) in zip(names, ops.items(), strict=False))
        return cls({"x": shape}, nodes, (names[-1],))

    @property
    def readers(self) -> Mapping[str, tuple[Node, ...]]:
        """The nodes that read each value."""
        found: dict[str, list[Node]] = {name: [] for name in self.shapes}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found[name].append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """The floating dtype of the weights (the widest, if they differ); None if there are none."""
        weights = [node.op.weight for node in self.nodes if isinstance(node.op, Weighted)]
        return np.result_type(*weights) if weights else None

    def __getitem__(self, name: str) -> Node:
        """The node that makes a value."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise KeyError(f"no node makes '{name}'; nodes are {_some(n.name for n in self.nodes)}")

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def with_ops(self, ops: Mapping[str, Op]) -> Graph:
        """The same graph with other ops at the named nodes."""
        names = {node.name for node in self.nodes}
        for name in ops:
            if name not in names:
                raise ValueError(f"no node is called '{name}'; nodes are {_some(names)}")
        return replace(self, nodes=tuple(replace(n, op=ops[n.name]) if n.name in ops else n for n in self.nodes))


def walk(graph: Graph, x: Data) -> Iterator[tuple[str, Array]]:
    """Run the network, yielding every value ``(N, C, *spatial)`` by name in dependency order; each is dropped after its last reader."""
    env = checked_inputs(graph, x)
    last = {name: node.name for node in graph.nodes for name in node.inputs}
    yield from env.items()
    for node in graph.nodes:
        env[node.name] = node.forward(*(env[i] for i in node.inputs))
        yield node.name, env[node.name]
        for name in dict.fromkeys((*node.inputs, node.name)):
            if last.get(name, node.name) == node.name:
                del env[name]


def forward(graph: Graph, x: Data) -> Any:
    """The network's output: an array ``(N, C, *spatial)``, or a dict of arrays by name if it has several outputs.

    ``x`` is an array ``(N, C, *spatial)``, or a dict by name if the network has several inputs. It is converted to
    the dtype of the weights. :class:`ValueError` or :class:`TypeError` if it is empty, not floating, not finite or of another shape.

    >>> forward(Graph.chain((1,), double=Dense(np.array([[2.0]]))), np.array([[3.0]]))
    array([[6.]])
    """
    outputs = {name: value for name, value in walk(graph, x) if name in graph.outputs}
    return outputs[graph.outputs[0]] if len(graph.outputs) == 1 else {name: outputs[name] for name in graph.outputs}


def values(graph: Graph, x: Data) -> dict[str, Array]:
    """Every value of the network by name, inputs included, each ``(N, C, *spatial)``.

    >>> list(values(Graph.chain((1,), double=Dense(np.array([[2.0]])), act=ReLU()), np.array([[3.0]])))
    ['x', 'double', 'act']
    """
    return dict(walk(graph, x))


def batches_of(data: Data | Iterable[Data]) -> Iterable[Data]:
    """The batches that a caller gave: what is one batch, an array or a mapping, is the only one."""
    return [data] if isinstance(data, (np.ndarray, Mapping)) else data  # type: ignore[return-value]


def checked_inputs(graph: Graph, x: Data) -> dict[str, Array]:
    """The input arrays by name, in the network's dtype, or an error that names the input and the rule."""
    if not isinstance(x, Mapping):
        if len(graph.inputs) > 1:
            raise TypeError(f"the network has inputs {list(graph.inputs)}: give a dict of arrays by name")
        x = dict.fromkeys(graph.inputs, x)
    if set(x) != set(graph.inputs):
        raise ValueError(f"the network needs inputs {sorted(graph.inputs)}, got {sorted(x)}")
    arrays = {name: _checked_input(name, x[name], shape, graph.dtype) for name, shape in graph.inputs.items()}
    if len({len(a) for a in arrays.values()}) > 1:
        raise ValueError(f"inputs must have equal batch sizes, got { {n: len(a) for n, a in arrays.items()} }")
    return arrays


def _checked_input(name: str, value: npt.ArrayLike, shape: Shape, dtype: np.dtype[Any] | None) -> Array:
    array = np.asarray(value)
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"input '{name}' must be a floating array, got {array.dtype}; convert it with .astype(np.float32)")
    if array.shape[1:] != shape or not array.ndim:
        raise ValueError(f"input '{name}' must be (N, {', '.join(map(str, shape))}), got {array.shape}")
    if not len(array):
        raise ValueError(f"input '{name}' is an empty batch: shape {array.shape}")
    with np.errstate(over="ignore"):  # what overflows is found below
        converted = array if dtype is None else array.astype(dtype, copy=False)
    if not np.isfinite(converted).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(converted))[0])
        raise ValueError(f"input '{name}' holds {array[where]} at index {where}; data must be finite (in {converted.dtype})")
    return converted


def _input_shape(name: str, shape: Sequence[int]) -> Shape:
    if not isinstance(name, str) or not name:
        raise TypeError(f"an input needs a name (a string that is not empty), got {name!r}")
    if isinstance(shape, (str, int)) or not all(isinstance(n, (int, np.integer)) and n > 0 for n in shape) or not len(shape):
        raise ValueError(f"input '{name}' needs a shape (C, *spatial) of positive integers, without the batch, got {shape!r}")
    return tuple(int(n) for n in shape)


def _in_order(inputs: Mapping[str, Shape], nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """The nodes in dependency order: as given if that is one, else sorted."""
    known = set(inputs)
    for node in nodes:
        if not isinstance(node, Node):
            raise TypeError(f"nodes must be eqfact.Node, got {node!r}")
        if node.name in known:
            raise ValueError(f"node '{node.name}': this name is taken already; every value needs its own")
        known.add(node.name)
    for node in nodes:
        for name in node.inputs:
            if name not in known:
                raise ValueError(f"node '{node.name}' reads '{name}', which is neither an input nor a node; known are {_some(known)}")
    done = set(inputs)
    for node in nodes:
        if not done.issuperset(node.inputs):
            break
        done.add(node.name)
    else:
        return nodes
    by_name = {node.name: node for node in nodes}
    sorter = graphlib.TopologicalSorter({node.name: [i for i in node.inputs if i in by_name] for node in nodes})
    try:
        return tuple(by_name[name] for name in sorter.static_order())
    except graphlib.CycleError as error:
        raise ValueError(f"the nodes form a cycle: {' -> '.join(reversed(error.args[1]))}") from None


def fresh_name(name: str, taken: Container[str]) -> str:
    """The name, with a number behind it where it is taken already.

    >>> fresh_name("x", ["x", "x_1"])
    'x_2'
    """
    return next(c for i in itertools.count() if (c := f"{name}_{i}" if i else name) not in taken)


def _some(names: Iterable[str]) -> str:
    """A few names, for an error message."""
    listed = sorted(names)
    return ", ".join(listed[:8]) + (f", and {len(listed) - 8} more" if len(listed) > 8 else "")
