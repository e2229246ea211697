"""What of a file is understood, and what stays as it is? One graph of all parts that eqfact has layers for, inside the file.

Where such a part reads a tensor that something else makes, that tensor is an input of the graph, and where something else, or the
file's output, reads one of its values, that value is an output. Both keep the factor 1 by the law of every network. All else keeps its
types, subgraphs, sizes and names, because nothing of it is touched: a rescaled graph is written by changing parameters in the file.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from eqfact.graph import Graph, Node
from eqfact.onnx.building import names_read
from eqfact.onnx.importing import Importer, errors_of
from eqfact.onnx.origin import Constant, Foreign, OnnxError, Source
from eqfact.onnx.patching import save as patched
from eqfact.onnx.reading import read_model
from eqfact.onnx.running import run
from eqfact.onnx.views import BATCH, View
from eqfact.ops import BatchNorm, Shape, Weighted

Feeds = Mapping[str, npt.ArrayLike]
Arrays = dict[str, npt.NDArray[Any]]

#: Tensors of a file are looked at in groups of this many, so that a large network's are never all held at once.
AT_ONCE = 32
#: Sizes of the batch with which a tensor's batch axis is found.
PROBES = (1, 2)


@dataclass(frozen=True)
class Kept:
    """A node that stays in the file as it is, and why."""

    name: str
    op_type: str
    reason: str


@dataclass(frozen=True, eq=False)
class Opened:
    """A file of which eqfact understands parts. Made by :func:`eqfact.onnx.open`.

    ``graph`` holds the parts that are understood; ``kept`` says of every other node why it is not.
    """

    path: Path
    graph: Graph
    kept: tuple[Kept, ...]
    source: Source

    def __str__(self) -> str:
        nodes = len(self.source.model.graph.node)
        text = f"{self.path}: {nodes - len(self.kept)} of {nodes} nodes are understood"
        reasons = Counter(f"{k.op_type}: {k.reason}" for k in self.kept).most_common(3)
        return "; ".join([text, *(f"{count} kept ({reason})" for reason, count in reasons)])

    def run(self, feeds: Feeds) -> Arrays:
        """The outputs of the file by name, for its inputs by name and in their own types, by onnxruntime if it is installed."""
        return run(self.path, self.checked(feeds))

    def boundary(self, feeds: Feeds) -> Arrays:
        """The graph's inputs ``(N, C, *spatial)`` by name, as the file makes them of its own inputs."""
        feeds = self.checked(feeds)
        views = {name: view for name, view in self.source.tensors.items() if isinstance(view, View) and view.value in self.graph.inputs
                 and view.value not in self._made}
        first = {view.value: name for name, view in reversed(views.items())}
        inner = [name for name in first.values() if name not in feeds]
        found = {**feeds, **(run(self.path, feeds, inner) if inner else {})}
        arrays = {}
        for value in self.graph.inputs:
            view = self.source.tensors[first[value]]
            assert isinstance(view, View)
            arrays[value] = np.ascontiguousarray(view.value_of(found[first[value]]))
            if arrays[value].shape[1:] != self.graph.shapes[value]:
                raise OnnxError(f"{self.path}: '{first[value]}' has the shape {found[first[value]].shape} on this data; the graph was read for "
                                f"samples of shape {self.graph.shapes[value]}: open the file with data of this size")
        return arrays

    @property
    def _made(self) -> set[str]:
        return {node.name for node in self.graph.nodes}

    def checked(self, feeds: Feeds) -> Arrays:
        """Inputs of the file in its own types, or an error that names the input and the rule."""
        return _checked(self.path, self.source, feeds)

    def save(self, path: str | os.PathLike[str], graph: Graph) -> None:
        """Write the file with the parameters of ``graph`` in place of its own, whole or not at all.

        ``graph`` is this one, equalized, or with BatchNorms folded. Every node that is kept or unchanged is written as it was read.
        :class:`OnnxError` that names the node for a graph of another structure.
        """
        patched(path, graph, self.graph, self.source)


def open(path: str | os.PathLike[str], data: Feeds | None = None, *,  # noqa: A001  # eqfact.onnx.open, as it is read
         input_shapes: Mapping[str, Sequence[int]] | None = None) -> Opened:
    """Read an ONNX file of which only parts may be understood.

    ``data`` holds the file's inputs by name, in the types of the file, with the batch as first axis where that is open; sizes that
    the file leaves open, and those of tensors that eqfact does not make, are taken from it. Without data random numbers of the sizes that
    the file gives stand in, with ``input_shapes`` (without batch, ``(C, *spatial)`` by name) where it leaves them open.

    Raises :class:`OnnxError` as :func:`eqfact.onnx.load`, but for nodes that are not supported, or if nothing is understood.
    """
    path = Path(path)
    model = read_model(path)
    with errors_of(path):
        return _opened(path, model, data, input_shapes or {})


def _opened(path: Path, model: onnx.ModelProto, data: Feeds | None, input_shapes: Mapping[str, Sequence[int]]) -> Opened:
    outside = _Outside(path, model, data, input_shapes)
    importer = Importer(path, model, {}, outside)
    outside.source = importer.source
    outside.samples = importer.building.samples
    importer.walk()
    building, source = importer.building, importer.source
    islands = _islands(tuple(building.nodes.values()))
    alone = "it stands among kept nodes, without a layer that has weights"
    kept = [(proto, reason) for proto, reason in importer.kept]
    unread = {id(proto) for proto, _ in kept}
    for proto in source.model.graph.node:
        tensors = [source.tensors.get(name) for name in proto.output if name]
        if id(proto) not in unread and tensors and all(isinstance(t, View) and t.value in islands for t in tensors):
            kept.append((proto, alone))
    wanted = [*importer.outputs, *(name for proto, _ in kept for name in names_read(proto))]
    outputs = []
    for name in dict.fromkeys(wanted):
        tensor = source.tensors.get(name)
        if isinstance(tensor, View) and tensor.value in building.nodes and tensor.value not in islands:
            outputs.append(tensor.value)
    if not outputs:
        reasons = Counter(f"{proto.op_type}: {reason}" for proto, reason in kept).most_common(3)
        raise OnnxError(f"{path}: eqfact understands no layer with weights in this network; " + "; ".join(
            f"{count} nodes {reason}" for reason, count in reasons))
    graph = importer.finished(outputs)
    order = {id(proto): i for i, proto in enumerate(source.model.graph.node)}
    kept.sort(key=lambda pair: order.get(id(pair[0]), len(order)))
    return Opened(path, graph, tuple(Kept(str(p.name or next(iter(p.output), "")), str(p.op_type), reason) for p, reason in kept), source)


def _islands(nodes: Sequence[Node]) -> set[str]:
    """Nodes that are connected, by values that nodes make, with no layer but BatchNorms: nothing there can be equalized or quantized."""
    parent = {node.name: node.name for node in nodes}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = name = parent[parent[name]]
        return name
    for node in nodes:
        for value in node.inputs:
            if value in parent:
                parent[root(value)] = root(node.name)
    layers = {root(node.name) for node in nodes if isinstance(node.op, Weighted) and not isinstance(node.op, BatchNorm)}
    return {node.name for node in nodes if root(node.name) not in layers}


def _checked(path: Path, source: Source, feeds: Feeds) -> Arrays:
    inputs = {info.name: info for info in source.model.graph.input if info.name not in source.initializers}
    if set(feeds) != set(inputs):
        raise OnnxError(f"{path}: the file needs inputs {sorted(inputs)}, got {sorted(feeds)}")
    arrays = {}
    for name, info in inputs.items():
        kind, array = info.type.tensor_type, np.asarray(feeds[name])
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        dims = kind.shape.dim
        if array.dtype != dtype and not (array.dtype.kind == np.dtype(dtype).kind and np.can_cast(array.dtype, dtype, "same_kind")):
            raise OnnxError(f"{path}: input '{name}' holds {dtype}, got {array.dtype}; convert it with .astype")
        if kind.HasField("shape") and dims and (len(dims) != array.ndim or any(
                d.HasField("dim_value") and d.dim_value != n for d, n in zip(dims, array.shape, strict=True))):
            said = ", ".join(str(d.dim_value) if d.HasField("dim_value") else d.dim_param or "?" for d in dims)
            raise OnnxError(f"{path}: input '{name}' has the shape ({said}), got {array.shape}")
        arrays[name] = array.astype(dtype, copy=False)
    return arrays


class _Outside:
    """Shapes, types and batch axes of the tensors of a file, found by running it."""

    def __init__(self, path: Path, model: onnx.ModelProto, data: Feeds | None, input_shapes: Mapping[str, Sequence[int]]) -> None:
        self.path, self.data, self.input_shapes = path, data, input_shapes
        self.source = Source(onnx.ModelProto(), {})
        self.samples: int | None = None
        self._inputs = [i for i in model.graph.input]
        self._initializers = {t.name for t in model.graph.initializer}
        self._names = [i.name for i in model.graph.input] + [name for node in model.graph.node for name in node.output if name]
        self._found: list[dict[str, tuple[Shape, np.dtype[Any]]]] = []

    def __call__(self, tensor: Foreign) -> tuple[Shape, np.dtype[Any], int | None]:
        if not self._found:
            self._found = self._look()
        first, *others = (found.get(tensor.name) for found in self._found)
        if first is None or None in others:
            raise ValueError(f"it reads '{tensor.name}', whose size is not known ({tensor.reason})")
        shape, dtype = first
        if self.samples == 1:
            return shape, dtype, 0 if len(shape) > 1 and shape[0] == 1 else None
        if self.samples is not None:
            return shape, dtype, 0 if len(shape) > 1 and shape[0] == self.samples else None
        changed = [i for i, (n, m) in enumerate(zip(shape, others[0][0], strict=True)) if n != m] if others and others[0] else []
        if len(changed) > 1 or (changed and (shape[changed[0]], others[0][0][changed[0]]) != PROBES):  # type: ignore[index]
            raise ValueError(f"it reads '{tensor.name}', whose size is no fixed one for every sample ({tensor.reason})")
        return shape, dtype, changed[0] if changed else None

    def _look(self) -> list[dict[str, tuple[Shape, np.dtype[Any]]]]:
        feeds = self._feeds()
        found = []
        for count in PROBES if self.samples is None else (self.samples,):
            given = {name: np.concatenate([array[:1]] * count) if name in self._open and array.ndim else array for name, array in feeds.items()}
            shapes = {name: (array.shape, array.dtype) for name, array in given.items()}
            inner = [name for name in self._names if name not in given]
            for i in range(0, len(inner), AT_ONCE):
                arrays = run(self.path, given, inner[i:i + AT_ONCE])
                shapes.update((name, (array.shape, array.dtype)) for name, array in arrays.items())
            found.append(shapes)
        return found

    @property
    def _open(self) -> set[str]:
        """Inputs whose first axis, the batch, is of any size."""
        return {i.name for i in self._inputs if i.type.tensor_type.shape.dim and not i.type.tensor_type.shape.dim[0].HasField("dim_value")}

    def _feeds(self) -> Arrays:
        """The data given, or what stands in for it."""
        inputs = [i for i in self._inputs if i.name not in self._initializers]
        if self.data is not None:
            return _checked(self.path, self.source, self.data)
        unknown = sorted(set(self.input_shapes) - {i.name for i in inputs})
        if unknown:
            raise OnnxError(f"{self.path}: input_shapes (--input-shape) names {unknown}, the network's inputs are {[i.name for i in inputs]}")
        rng, feeds = np.random.default_rng(0), {}
        for info in inputs:
            dims = [int(d.dim_value) if d.HasField("dim_value") else None for d in info.type.tensor_type.shape.dim]
            given = self.input_shapes.get(info.name)
            shape = [dims[0] if dims and dims[0] is not None else 1, *(dims[1:] if given is None else given)]
            if any(n is None for n in shape) or not info.type.HasField("tensor_type"):
                seen = ", ".join("?" if d is None else str(d) for d in dims)
                raise OnnxError(f"{self.path}: input '{info.name}' has the shape ({seen}): give data (on the command line --data), or "
                                f"input_shapes={{'{info.name}': (C, *spatial)}} (--input-shape {info.name}=C,H,W), without the batch")
            sizes = [int(n) for n in shape if n is not None][:max(len(dims), 1 + len(given or ()))]
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type))
            feeds[info.name] = rng.standard_normal(sizes).astype(dtype) if dtype.kind == "f" else np.ones(sizes, dtype)
        return feeds


__all__ = ["BATCH", "Constant", "Kept", "Opened", "math", "open"]
