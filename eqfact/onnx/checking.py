"""Does a file compute what eqfact takes it for? Value by value, against another runtime on the same data.

Every node computes from the values that the runtime has for its inputs, so that no error is carried along, and the first node that parts
is the one that was misread. Its output may differ by ``sqrt(u) / 16`` of what it comes from (``u`` the unit roundoff): far more than any
order of summation makes, far less than any mistake. A graph from elsewhere, equalized for instance, is checked against its file likewise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from eqfact.graph import Graph, Node, forward
from eqfact.onnx.opened import AT_ONCE, Opened, finite, open
from eqfact.onnx.origin import OnnxError, source_of
from eqfact.onnx.running import Arrays, Running, runtime, tensors
from eqfact.onnx.views import View
from eqfact.ops import Blocking, Weighted
from eqfact.ops.base import Array
from eqfact.roundings import NEAR
from eqfact.verification import Verification

#: Samples that are looked at: a misreading shows on the first, or on none.
CHECKED = 4


def check(path: str | os.PathLike[str], graph: Graph, data: Mapping[str, npt.ArrayLike]) -> Verification:
    """Is ``graph`` what a file computes on this data, value by value in file order, by another runtime's account?

    ``data`` holds the file's inputs by name, as for :func:`eqfact.onnx.open`; ``graph`` is what was read from the file, or what was written
    to it. The message names the first value where they part. Run by onnxruntime if it is installed, else by onnx's reference evaluator.

    Raises :class:`OnnxError` if the file cannot be read or run, or has none of the graph's values.

    >>> net = Graph.chain((2,), fc=Dense([[3.0, 1.0]]))
    >>> eq.onnx.save("net.onnx", net)
    >>> eq.onnx.check("net.onnx", net, {"x": np.ones((1, 2))}).equal
    True
    """
    return checked(open(path, data), graph, data)


def checked(opened: Opened, graph: Graph, data: Mapping[str, npt.ArrayLike], path: str | os.PathLike[str] | None = None) -> Verification:
    """The same for a file that is open, or for another one, at ``path``, that was written with its names."""
    path = opened.path if path is None else path
    views = _views(opened, graph, path)
    verdicts = [_checked(opened, graph, part, path, views) for part in opened.parts(data, CHECKED)]
    return next((v for v in verdicts if not v.equal), max(verdicts, key=lambda v: v.apart))


def _checked(opened: Opened, graph: Graph, feeds: Arrays, path: str | os.PathLike[str],
             views: Mapping[str, tuple[str, View]]) -> Verification:
    """The verdict on data that the file takes in one run."""
    compared = [node for node in graph.nodes if node.name in views]
    if not compared:
        raise OnnxError(f"{opened.path}: the file has none of the values of the network to compare with")
    running = Running(path, [name for name, _ in views.values() if name not in feeds])
    boundary = _boundary(opened, graph, feeds, path)
    worst = Verification(True, 0.0, 0.0, compared[0].name, "")
    for nodes in _groups(graph, views):
        held = _held(nodes, views, running, feeds, boundary)
        for node in nodes:
            inputs = [held[i] for i in node.inputs]
            y = node.op.forward(*inputs)
            if node.name in views and node.name in held:
                error, bound = _apart(node, y, held[node.name], inputs)
                if error > bound:
                    return Verification(False, error, bound, node.name, (
                        f"not equal: '{views[node.name][0]}' ({type(node.op).__name__}) differs by {error:.3g} from what {runtime()} makes "
                        f"of the same inputs, where rounding explains {bound:.3g}"))
                if error * (worst.bound or 1) >= worst.max_error * bound:
                    worst = Verification(True, error, bound, node.name, "")
            else:
                held[node.name] = y
    message = (f"equal: {len(compared)} values, each computed from {runtime()}'s own inputs, differ by at most {worst.max_error:.3g} of "
               f"{worst.bound:.3g} allowed, at '{worst.worst}'")
    return Verification(True, worst.max_error, worst.bound, worst.worst, message, _end_to_end(graph, feeds, boundary, path, views))


def _boundary(opened: Opened, graph: Graph, feeds: Arrays, path: str | os.PathLike[str]) -> Arrays:
    """The graph's inputs; those that are none of the file's own graph are tensors of their names."""
    found = {name: array for name, array in opened.boundary(feeds, path).items() if name in graph.inputs}
    others = [name for name in graph.inputs if name not in found]
    if not opened.source.shown.issuperset(others):
        raise OnnxError(f"{opened.path}: the network has inputs {others} that the file does not have")
    return {**found, **(Running(path, others)(feeds, others) if others else {})}


def _views(opened: Opened, graph: Graph, path: str | os.PathLike[str]) -> dict[str, tuple[str, View]]:
    """A tensor of the file for every value that has one, and how it is a view of it; one that the file at ``path`` still makes.

    A graph that was read from a file says itself what its values are: :func:`eqfact.onnx.load` puts outputs in the file's order of axes,
    under names that stand for other values in what is opened.
    """
    found: dict[str, tuple[str, View]] = {}
    shown = opened.source.shown if Path(path) == opened.path else opened.source.shown & tensors(path)
    for name, view in (source_of(graph) or opened.source).tensors.items():
        if name in shown and isinstance(view, View) and graph.shapes.get(view.value) == view.shape and (
                view.value not in found or name == view.value):
            found[view.value] = name, view
    return found


def _groups(graph: Graph, views: Mapping[str, object]) -> Iterator[list[Node]]:
    """The nodes in order, a few at a time, each group with the nodes before it that it needs and that no tensor of the file stands for."""
    made = {node.name: node for node in graph.nodes}
    for start in range(0, len(graph.nodes), AT_ONCE):
        group = {node.name: node for node in graph.nodes[start:start + AT_ONCE]}
        todo = [value for node in group.values() for value in node.inputs]
        while todo:
            value = todo.pop()
            if value in made and value not in views and value not in group:
                group[value] = made[value]
                todo += made[value].inputs
        yield [node for node in graph.nodes if node.name in group]


def _held(nodes: list[Node], views: Mapping[str, tuple[str, View]], running: Running, feeds: Arrays, boundary: Arrays) -> dict[str, Array]:
    """The values that these nodes read and make, as the file has them."""
    wanted = dict.fromkeys(value for node in nodes for value in (*node.inputs, node.name))
    names = {value: views[value] for value in wanted if value in views and value not in boundary}
    found = {**feeds, **running(feeds, list(dict.fromkeys(name for name, _ in names.values() if name not in feeds)))}
    held = {value: finite(view.value_of(found[name])) for value, (name, view) in names.items()}
    return held | {value: boundary[value] for value in wanted if value in boundary}


def _apart(node: Node, y: Array, truth: Array, inputs: list[Array]) -> tuple[float, float]:
    """The largest difference against what is allowed in its channel, and that."""
    if y.shape != truth.shape or not np.isfinite(truth).all():
        return np.inf, 0.0
    axes, limits = (0, *range(2, y.ndim)), np.finfo(truth.dtype)
    masked = truth < limits.min / 2  # the lowest number, give or take a score: it tells nothing of the size of others
    if (masked != (y < limits.min / 2)).any():
        return np.inf, 0.0
    y, truth = (np.where(masked, 0, v) for v in (y, truth))
    error = np.abs(y.astype(np.float64) - truth).max(axis=axes)
    if isinstance(node.op, Weighted):
        scale = node.op.magnitude(*map(np.abs, inputs)).max(axis=axes)
    else:  # runtimes approximate curves, by so much of the largest value that they can take
        scale = np.full(len(error), max(float(np.abs(truth).max()), float(isinstance(node.op, Blocking))))
    bound = float(limits.eps / 2) ** 0.5 / NEAR * scale.astype(np.float64) + float(limits.tiny)  # engines drop what is subnormal
    channel = int(np.argmax(error - bound))
    return float(error[channel]), float(bound[channel])


def _end_to_end(graph: Graph, feeds: Arrays, boundary: Arrays, path: str | os.PathLike[str],
                views: Mapping[str, tuple[str, View]]) -> float:
    """How far the graph's outputs end apart from the file's, from end to end, in units of each output's largest entry."""
    ends = {value: found for value, found in views.items() if value in graph.outputs}
    inner = [name for name, _ in ends.values()]
    file = Running(path, inner)(feeds, inner)
    ours = forward(graph, boundary)
    ours = ours if isinstance(ours, dict) else {graph.outputs[0]: ours}
    apart = 0.0
    for value, (name, view) in ends.items():
        truth = finite(view.value_of(file[name]))
        apart = max(apart, float(np.abs(ours[value] - truth).max() / (np.abs(truth).max() or 1.0)))
    return apart



