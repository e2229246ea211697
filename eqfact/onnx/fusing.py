"""Which nodes of a file are one op together? What exporters write for ops that older opsets lack, found before any of these nodes is read.

A pattern is ``(op type, *inputs)``. An input is a pattern, a list of several that it may be, a number that a constant must hold, or the
name of a tensor, which is the same one wherever that name stands. Sums and products are found in either order, and identities are looked
through. Nothing else may read what stands between: then it is no pattern, and its nodes are read one by one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper

from eqfact.onnx.building import Building, names_read
from eqfact.onnx.call import Call
from eqfact.onnx.origin import Constant

#: What these compute does not depend on the order of their two inputs.
COMMUTATIVE = ("Add", "Mul")


def _half(x: Any) -> list[Any]:
    return [("Mul", x, 0.5), ("Div", x, 2.0)]


def _gelu(curve: Any) -> list[Any]:
    """``x (1 + curve) / 2``."""
    more = ("Add", curve, 1.0)
    return [*_half(("Mul", "x", more)), ("Mul", "x", _half(more)), ("Mul", _half("x"), more)]


def _tanh() -> tuple[Any, ...]:
    """``tanh(sqrt(2 / pi) (x + 0.044715 x**3))``."""
    c, k = 0.044715, math.sqrt(2 / math.pi)
    squares = [("Mul", ("Mul", "x", "x"), c), ("Mul", ("Pow", "x", 2.0), c), ("Mul", "x", ("Mul", "x", c))]
    cubes = [("Mul", ("Pow", "x", 3.0), c), ("Mul", ("Mul", "x", ("Mul", "x", "x")), c), ("Mul", "x", squares)]
    one_more = ("Add", squares, 1.0)
    return "Tanh", [("Mul", [("Add", "x", cubes), ("Mul", "x", one_more)], k), ("Mul", ("Mul", "x", k), one_more)]


def _mean(x: Any) -> list[Any]:
    return [("ReduceMean", x), ("Mul", ("ReduceSum", x), "share"), ("GlobalAveragePool", x)]


def _power(x: Any) -> tuple[Any, ...]:
    """``mean(x**2) + eps``."""
    return "Add", _mean([("Pow", x, 2.0), ("Mul", x, x)]), "eps"


def _root(x: Any) -> list[Any]:
    return [("Sqrt", _power(x)), ("Pow", _power(x), 0.5)]


def _inverse(x: Any) -> list[Any]:
    return [("Reciprocal", _root(x)), ("Div", 1.0, _root(x)), ("Pow", _power(x), -0.5)]


def _divided(x: Any) -> list[Any]:
    """``x / sqrt(mean(x**2) + eps)``."""
    return [("Div", x, _root(x)), ("Mul", x, _inverse(x))]


def _shifted(scale: Any, *betas: str) -> list[Any]:
    """``x s + (beta - mean(x) s)``, as TensorFlow has it; Keras takes the minus to the mean."""
    moved, scaled, less = ("Mul", _mean("x"), scale), ("Mul", "x", scale), ("Mul", ("Neg", _mean("x")), scale)
    shifts = [("Neg", moved), less, *(shift for beta in betas for shift in (("Sub", beta, moved), ("Add", less, beta)))]
    return [("Add", scaled, shifts), ("Sub", scaled, moved)]


#: What these are made of; the last one has its axes from where it stands, as converters write a mean over the last of three.
MEANS = ("ReduceMean", "ReduceSum", "GlobalAveragePool")
CENTRED = ("Sub", "x", _mean("x"))

#: What is looked for, in this order: the reader's name (:data:`eqfact.onnx.nodes.FUSED`), and the pattern of the last node.
PATTERNS: tuple[tuple[str, Any], ...] = (
    ("LayerNorm", [*_divided(CENTRED), *_shifted(("Mul", _inverse(CENTRED), "gamma"), "beta"), *_shifted(_inverse(CENTRED))]),
    ("RMSNorm", _divided("x")),
    ("GELU", _gelu(("Erf", [("Div", "x", math.sqrt(2)), ("Mul", "x", math.sqrt(0.5))]))), ("tanh GELU", _gelu(_tanh())),
    ("SiLU", ("Mul", "x", ("Sigmoid", ["x", ("Mul", "x", 1.0)]))),
)


class Tie(NamedTuple):
    """A tensor that a pattern has a name for, and the node and its input by which it was found first."""

    tensor: str
    place: tuple[str, int]


@dataclass(frozen=True)
class Group:
    """Nodes that a pattern fits, by what they make, and the tensors that it has names and numbers for."""

    kind: str
    nodes: dict[str, onnx.NodeProto]
    names: dict[str, Tie]
    numbers: tuple[tuple[str, float], ...]

    @property
    def last(self) -> str:
        """The tensor that the op makes."""
        return list(self.nodes)[-1]

    def call(self, building: Building, opset: int) -> Call | None:
        """The group as one node for its reader, if the numbers are what they should be and all means are taken over the same axes."""
        limit = 4 * float(np.finfo(building.dtype).eps)
        for name, number in self.numbers:
            tensor = building.tensors.get(name)
            if not isinstance(tensor, Constant) or any(v.size != 1 or abs(v.item() - number) > limit * abs(number) for v in tensor.values):
                return None
        if isinstance(building.tensors.get(self.names["x"].tensor), Constant):
            return None
        last = self.nodes[self.last]
        ties = [self.names.get(name, Tie("", ("", 0))) for name in ("x", "eps", "share", "gamma", "beta")]
        node = helper.make_node(self.kind, [tie.tensor for tie in ties], list(last.output), name=last.name)
        means = [Call(building, proto, opset) for proto in self.nodes.values() if proto.op_type in MEANS]
        pooled = [mean for mean in means if mean.node.op_type == MEANS[-1]]
        axes = {tuple(mean.listed("axes", 1, ()) or ()) if mean.integer("keepdims", 1) else () for mean in means if mean not in pooled}
        if pooled:
            ndim = building.view(self.names["x"].tensor).ndim
            axes = {tuple(a % ndim for a in some) for some in axes} | {tuple(range(2, ndim))}
        if means:
            if len(axes) > 1 or () in axes:
                return None
            node.attribute.append(helper.make_attribute("axes", axes.pop()))
        return Call(building, node, opset, [tie.place for tie in ties], tuple(self.nodes))


def groups(nodes: Sequence[onnx.NodeProto], building: Building) -> dict[str, Group]:
    """The groups among these nodes, by every tensor that they make; no node belongs to two."""
    finder = _Finder(nodes, building)
    found: dict[str, Group] = {}
    for proto in reversed(nodes):
        if proto.output and (group := finder.ending_with(str(proto.output[0]))) is not None and found.keys().isdisjoint(group.nodes):
            found.update(dict.fromkeys(group.nodes, group))
    return found


class _Finder:
    """Patterns among the nodes of one graph, by backtracking."""

    def __init__(self, nodes: Sequence[onnx.NodeProto], building: Building) -> None:
        self.building = building
        self.makers = {str(node.output[0]): node for node in nodes if len(node.output) == 1 and node.domain in ("", "ai.onnx")}
        self.number = {name: i for i, name in enumerate(self.makers)}
        self.kept_type = helper.np_dtype_to_tensor_dtype(building.dtype)

    def ending_with(self, name: str) -> Group | None:
        """The first pattern that the nodes up to this tensor fit."""
        if name not in self.makers or self._passes(name):
            return None
        for kind, pattern in PATTERNS:
            for group in self._fits(pattern, name, ("", 0), Group(kind, {}, {}, ())):
                if self._alone(group, name):
                    return replace(group, nodes={made: self.makers[made] for made in sorted(group.nodes, key=self.number.__getitem__)})
        return None

    def _passes(self, name: str) -> bool:
        """Whether a tensor is another one under a new name."""
        node = self.makers.get(name)
        return node is not None and (node.op_type == "Identity" or (
            node.op_type == "Cast" and any(a.name == "to" and a.i == self.kept_type for a in node.attribute)))

    def _alone(self, group: Group, last: str) -> bool:
        """Whether nothing else reads what stands between."""
        reads = Counter(name for node in group.nodes.values() for name in names_read(node))
        return all(self.building.reads.get(name) == reads[name] for name in group.nodes if name != last)

    def _fits(self, pattern: Any, name: str, place: tuple[str, int], found: Group) -> Iterator[Group]:
        """All ways in which a tensor is what a pattern says, besides what was found before."""
        if isinstance(pattern, list):
            for one in pattern:
                yield from self._fits(one, name, place, found)
        elif isinstance(pattern, float):
            yield replace(found, numbers=(*found.numbers, (name, pattern)))
        elif isinstance(pattern, str):
            while self._passes(name):
                name = str(self.makers[name].input[0])
            tie = found.names.get(pattern, Tie(name, place))
            if tie.tensor == name:
                yield replace(found, names={**found.names, pattern: tie})
        elif (node := self.makers.get(name)) is not None:
            within = replace(found, nodes={**found.nodes, name: node})
            if self._passes(name):
                yield from self._fits(pattern, str(node.input[0]), (name, 0), within)
            elif node.op_type == pattern[0] and len(node.input) > len(pattern) - 2:
                order = list(range(len(pattern) - 1))
                for places in (order, order[::-1])[:1 + (node.op_type in COMMUTATIVE)]:
                    yield from self._all_fit(pattern[1:], name, node, places, within)

    def _all_fit(self, patterns: Sequence[Any], name: str, node: onnx.NodeProto, places: Sequence[int], found: Group) -> Iterator[Group]:
        if not patterns:
            yield found
            return
        for first in self._fits(patterns[0], str(node.input[places[0]]), (name, places[0]), found):
            yield from self._all_fit(patterns[1:], name, node, places[1:], first)
