"""What is the smallest network that breaks a law? What can be left out is, and numbers become short, as long as the law stays broken.

Hypothesis makes what it draws smaller as it was drawn; this goes on from any network: one output, a node less, a value that is an input, an
option less, fewer digits.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eqfact.graph import Graph, values
from eqfact.ops import Array, Op
from eqfact.testing.wiring import needed

Arrays = dict[str, Array]
#: Larger networks stay as they are.
MOST_ENTRIES = 10_000
#: For slow passes: how long anyone likes to wait.
SECONDS = 30.0


class Violation(AssertionError):
    """A law that a pass breaks. ``str`` is the whole report."""

    def __init__(self, law: str, finding: str, graph: Graph, data: Arrays) -> None:
        super().__init__(f"{law}: {finding}")
        self.law, self.finding, self.graph, self.data = law, finding, graph, data
        #: Where the network is kept, if it is.
        self.path: Path | None = None


#: The violation of a law by a network and its data, if there is one.
FailsToo = Callable[[Graph, Arrays, str], Violation | None]


def made_small(fails_too: FailsToo, found: Violation, seconds: float = SECONDS) -> Violation:
    """A violation of the same law by a smaller network with shorter numbers, as small as it gets in so many ``seconds``."""
    if entries(found.graph) > MOST_ENTRIES:
        return found
    end = time.monotonic() + seconds

    def in_time(graph: Graph, data: Arrays, law: str) -> Violation | None:
        return fails_too(graph, data, law) if time.monotonic() < end else None

    for candidates in (_structures, _samples, _options, _numbers):
        found = _least(in_time, candidates, found)
    return found


def entries(graph: Graph) -> int:
    """How many numbers the parameters of a network are."""
    return sum(array.size for node in graph.nodes for array in vars(node.op).values() if isinstance(array, np.ndarray))


def _least(fails_too: FailsToo, candidates: Callable[[Graph, Arrays], Iterator[tuple[Graph, Arrays]]], found: Violation) -> Violation:
    """Take the first candidate that fails, too, and begin again, until none does; each is smaller than the one before."""
    while True:
        for graph, data in candidates(found.graph, found.data):
            smaller = fails_too(graph, data, found.law)
            if smaller is not None:
                found = smaller
                break
        else:
            return found


def _structures(graph: Graph, data: Arrays) -> Iterator[tuple[Graph, Arrays]]:
    """Without what no output needs; one output of several; what the last node reads as output; a node as an input; readers of a node
    that read its input instead. What no output needs may be what breaks the law, so each is tried with it, too; but nothing becomes a
    dead end that was none, or another mistake of the same pass might be found than the one that is to be shown."""
    every, read = values(graph, data), {name for node in graph.nodes for name in node.inputs}
    if len(needed(graph)) < len(graph.nodes) + len(graph.inputs):
        yield from _changed(graph, data, True)
    for name in graph.outputs if len(graph.outputs) > 1 else ():
        for prune in (True, False):
            yield from _changed(graph, data, prune, outputs=(name,))
    for node in reversed(graph.nodes):
        if graph.outputs == (node.name,):
            for name, prune in itertools.product(dict.fromkeys(node.inputs), (True, False)):
                yield from _changed(graph, data, prune, outputs=(name,))
    for node in reversed(graph.nodes):
        rest = tuple(other for other in graph.nodes if other is not node)
        inputs = {**graph.inputs, node.name: graph.shapes[node.name]}
        for prune in (True, False):
            if node.name not in graph.outputs and node.name in read:
                yield from _changed(graph, {**data, node.name: every[node.name]}, prune, inputs=inputs, nodes=rest)
            elif node.name not in graph.outputs:
                yield from _changed(graph, data, prune, nodes=rest)
            for name in dict.fromkeys(node.inputs):
                if graph.shapes[name] == graph.shapes[node.name]:
                    others = tuple(replace(other, inputs=_instead(other.inputs, node.name, name)) for other in rest)
                    yield from _changed(graph, data, prune, nodes=others, outputs=_instead(graph.outputs, node.name, name))


def _instead(names: tuple[str, ...], old: str, new: str) -> tuple[str, ...]:
    return tuple(new if name == old else name for name in names)


def _changed(graph: Graph, data: Arrays, prune: bool, **changes: Any) -> Iterator[tuple[Graph, Arrays]]:
    """The network with changes, and perhaps without what its outputs do not need; nothing if that is no network, or has no nodes."""
    try:
        made = replace(graph, **changes)
        kept = needed(made)
        used = kept | {name for node in made.nodes for name in node.inputs if not prune}
        inputs = {name: shape for name, shape in made.inputs.items() if name in used}
        made = replace(made, inputs=inputs, nodes=tuple(node for node in made.nodes if node.name in kept or not prune))
    except ValueError:
        return
    if made.nodes and not {node.name for node in made.nodes} & needed(graph) - kept:
        yield made, {name: data[name] for name in inputs}


def _samples(graph: Graph, data: Arrays) -> Iterator[tuple[Graph, Arrays]]:
    """One sample of several."""
    count = max(map(len, data.values()))
    for i in range(count if count > 1 else 0):
        yield graph, {name: array[i:i + 1] for name, array in data.items()}


def _options(graph: Graph, data: Arrays) -> Iterator[tuple[Graph, Arrays]]:
    """One option of an op as it is by default."""
    for op in _ops(graph):
        for field in dataclasses.fields(op):  # type: ignore[arg-type]  # every final op is a dataclass
            own = getattr(op, field.name)
            if field.init and field.default is not dataclasses.MISSING and repr(own) != repr(field.default):
                yield from _with(graph, data, op, field.name, field.default)


def _numbers(graph: Graph, data: Arrays) -> Iterator[tuple[Graph, Arrays]]:
    """One array with shorter numbers."""
    for name, array in data.items():
        for short in _shorter(array):
            yield graph, {**data, name: short}
    for op in _ops(graph):
        for field in dataclasses.fields(op):  # type: ignore[arg-type]  # every final op is a dataclass
            own = getattr(op, field.name)
            for short in _shorter(own) if field.init and isinstance(own, np.ndarray) else ():
                yield from _with(graph, data, op, field.name, short)


def _ops(graph: Graph) -> list[Op]:
    return list({id(node.op): node.op for node in graph.nodes}.values())


def _with(graph: Graph, data: Arrays, op: Op, name: str, value: object) -> Iterator[tuple[Graph, Arrays]]:
    """The network with another parameter of an op, if that makes one."""
    try:
        other = replace(op, **{name: value})  # type: ignore[type-var]  # every final op is a dataclass
        made = graph.with_ops({node.name: other for node in graph.nodes if node.op is op})
    except (ValueError, TypeError):
        return
    if repr(getattr(other, name)) != repr(getattr(op, name)):  # a default may stand for what it was
        yield made, data


def _shorter(array: Array) -> Iterator[Array]:
    """Arrays of the same type and shape with shorter numbers, the shortest first; none for ones."""
    for short in (np.ones_like(array), *(np.round(array, digits) + 0 for digits in range(4))):
        if np.array_equal(array, short):
            return
        yield short
