"""What of a file is understood, and what stays as it is? One graph of all parts that eqfact has layers for, inside the file.

Where such a part reads a tensor that something else makes, that tensor is an input of the graph, and where something else, or the
file's output, reads one of its values, that value is an output. Both keep the factor 1 by the law of every network. All else keeps its
types, subgraphs, sizes and names, because nothing of it is touched: a rescaled graph is written by changing parameters in the file.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from scipy import sparse
from scipy.sparse import csgraph

from eqfact.graph import Graph, Node
from eqfact.onnx.building import names_read
from eqfact.onnx.exporting import write_model
from eqfact.onnx.importing import Importer
from eqfact.onnx.origin import Foreign, OnnxError, Source, errors_of, sizes
from eqfact.onnx.patching import patch, save
from eqfact.onnx.qdq import QdqWriter
from eqfact.onnx.reading import read_model
from eqfact.onnx.running import Arrays, Running
from eqfact.onnx.splicing import spliced
from eqfact.onnx.views import View
from eqfact.onnx.writers import GraphWriter
from eqfact.ops import BatchNorm, Shape, Weighted

Feeds = Mapping[str, npt.ArrayLike]

#: Tensors of a file are looked at in groups of this many, so that a large network's are never all held at once.
AT_ONCE = 64
#: Samples that a file with a free batch is run on at a time.
A_PART = 8
#: Sizes of the batch with which a tensor's batch axis is found.
PROBES = (1, 2)
#: Samples of random numbers that stand in for data.
STAND_INS = 4


@dataclass(frozen=True)
class Kept:
    """A node that stays in the file as it is, and why.

    >>> eq.onnx.Kept("top", "ArgMax", "no layer computes it").reason
    'no layer computes it'
    """

    name: str
    op_type: str
    reason: str


@dataclass(frozen=True, eq=False)
class Opened:
    """A file of which eqfact understands parts. Made by :func:`eqfact.onnx.open`.

    ``graph`` holds the parts that are understood; ``kept`` says of every other node why it is not.

    >>> eq.onnx.save("net.onnx", Graph.chain((2,), fc=Dense([[3.0, 1.0]])))
    >>> opened = eq.onnx.open("net.onnx")
    >>> opened.save("same.onnx", opened.graph)
    >>> eq.onnx.load("same.onnx")["fc"].op.weight
    array([[3., 1.]])
    """

    path: Path
    graph: Graph
    kept: tuple[Kept, ...]
    source: Source
    #: The data that the file was opened with, or what stood in for it.
    feeds: Feeds
    #: Samples that the file is run on at a time, where its batch is free.
    at_a_time: int

    def __str__(self) -> str:
        nodes = len(self.source.model.graph.node)
        return "; ".join(filter(None, [f"{self.path}: {nodes - len(self.kept)} of {nodes} nodes are understood", _commonest(self.kept)]))

    @property
    def inputs(self) -> list[str]:
        """The names of the file's inputs."""
        return [str(info.name) for info in self.source.inputs]

    def run(self, feeds: Feeds) -> Arrays:
        """The outputs of the file by name, for its inputs by name and in their own types, by onnxruntime if it is installed.

        A file of a fixed batch is run as often as it takes, and its outputs are joined along their first axis.
        """
        running = Running(self.path)
        made = [running(part) for part in self.parts(feeds)]
        return {name: np.concatenate([of[name] for of in made]) if len(made) > 1 else array for name, array in made[0].items()}

    def boundary(self, feeds: Feeds, path: str | os.PathLike[str] | None = None) -> Arrays:
        """The graph's inputs ``(N, C, *spatial)`` by name, as the file makes them of its own; or that at ``path``, with its names."""
        tensors: dict[str, tuple[str, View]] = {}
        for name, view in self.source.tensors.items():
            if isinstance(view, View) and view.value in self.graph.inputs and view.value not in tensors:
                tensors[view.value] = name, view
        parts = self.parts(feeds)
        inner = [name for name, _ in tensors.values() if name not in parts[0]]
        running = Running(self.path if path is None else path, inner) if inner else None
        arrays: dict[str, list[npt.NDArray[Any]]] = {value: [] for value in self.graph.inputs}
        for part in parts:
            found = {**part, **(running(part, inner) if running else {})}
            for value, shape in self.graph.inputs.items():
                name, view = tensors[value]
                if tuple(n for axis, n in enumerate(found[name].shape) if axis != view.batch) != tuple(
                        n for axis, n in enumerate(view.full_shape(0)) if axis != view.batch):
                    raise OnnxError(f"{self.path}: '{name}' has the shape {found[name].shape} on this data; the graph was read for samples "
                                    f"of shape {shape}: open the file with data of this size")
                arrays[value].append(finite(np.ascontiguousarray(view.value_of(found[name]))))
        return {value: np.concatenate(several) if len(several) > 1 else several[0] for value, several in arrays.items()}

    def shown(self, values: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """The file's outputs by name and in their own order of axes, of the graph's by name; those alone that the graph makes."""
        tensors = {str(info.name): self.source.tensors.get(info.name) for info in self.source.model.graph.output}
        return {name: tensor.tensor_of(values[tensor.value]) for name, tensor in tensors.items()
                if isinstance(tensor, View) and tensor.value in values}

    def parts(self, feeds: Feeds, first: int | None = None) -> list[Arrays]:
        """Data as the file takes it, a few samples at a time, in its own types, or an error that names the input and the rule.

        A file of a fixed batch may be given several batches, one behind the other. ``first`` samples are enough, if it is given.
        """
        return _parts(self.path, self.source, feeds, first, self.at_a_time)

    @property
    def whole(self) -> bool:
        """Whether every node is understood, and inputs and outputs are values, in whatever order of axes."""
        return not self.kept and set(self.inputs) == set(self.graph.inputs) and set(self.graph.outputs) == {
            info.name for info in self.source.model.graph.output}

    def save(self, path: str | os.PathLike[str], graph: Graph) -> None:
        """Write the file with the parameters of ``graph`` in place of its own, whole or not at all.

        ``graph`` is this one, equalized, or with BatchNorms folded. Every node that is kept or unchanged is written as it was read.
        Where the file has no place for a node of ``graph`` (BatchNorms folded across moves), all that is understood is written anew, among
        what is kept. :class:`OnnxError` that names the node for a graph of other inputs or outputs.
        """
        if self.alone:
            save(path, graph)
            return
        try:
            patch(path, graph, self.graph, self.source)
        except OnnxError:
            if graph.inputs != self.graph.inputs or graph.outputs != self.graph.outputs:
                raise
            write_model(path, spliced(path, graph, self.graph, self.source, GraphWriter), full=False)

    def save_qdq(self, path: str | os.PathLike[str], graph: Graph) -> None:
        """Write a quantized form of the graph into the file as :func:`eqfact.onnx.save_qdq` does; what is kept stays as it is.

        The file written takes and makes the tensors of the file read, in their type and order of axes.
        """
        if self.alone_quantized:
            write_model(path, QdqWriter(path, graph).model())
        else:
            write_model(path, spliced(path, graph, self.graph, self.source, QdqWriter), full=False)

    @property
    def alone(self) -> bool:
        """Whether the graph, written without the file around it, takes and makes the file's own tensors."""
        tensors = [self.source.tensors.get(name) for name in (*self.graph.inputs, *self.graph.outputs)]
        return self.whole and all(isinstance(tensor, View) and tensor.plain for tensor in tensors)

    @property
    def alone_quantized(self) -> bool:
        """The same of the quantized graph, which is computed in float32."""
        return self.alone and self.source.dtype() == np.float32


def finite(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Minus infinity, which masks scores, as the lowest number: no Softmax leaves anything of either."""
    bounded: npt.NDArray[Any] = np.maximum(array, np.finfo(array.dtype).min)
    return bounded


def open(path: str | os.PathLike[str], data: Feeds | None = None, *,  # eqfact.onnx.open, as it is read
         input_shapes: Mapping[str, Sequence[int]] | None = None) -> Opened:
    """Read an ONNX file of which only parts may be understood.

    ``data`` holds the file's inputs by name, in the types of the file, with the batch as first axis where that is open; sizes that
    the file leaves open, and those of tensors that eqfact does not make, are taken from it. Without data random numbers of the sizes that
    the file gives stand in, with ``input_shapes`` (without batch, ``(C, *spatial)`` by name) where it leaves them open. Data may hold minus
    infinity, as masks do; where it enters the graph it is the lowest number.

    Raises :class:`OnnxError` as :func:`eqfact.onnx.load`, but for nodes that are not supported, or if nothing is understood.

    >>> eq.onnx.save("net.onnx", Graph.chain((2,), fc=Dense([[3.0, 1.0]])))
    >>> opened = eq.onnx.open("net.onnx")
    >>> opened.graph.outputs, opened.kept, opened.run({"x": np.ones((1, 2))})["fc"]
    (('fc',), (), array([[4.]]))
    """
    path = Path(path)
    with errors_of(path):
        try:
            return _opened(path, read_model(path), data, input_shapes or {}, A_PART)
        except _OneSample:  # the batch is free, and the network is one for single samples all the same
            return _opened(path, read_model(path), data, input_shapes or {}, 1)


def _opened(path: Path, model: onnx.ModelProto, data: Feeds | None, input_shapes: Mapping[str, Sequence[int]], at_a_time: int) -> Opened:
    outside = _Outside(path, model, data, input_shapes)
    importer = Importer(path, model, input_shapes, outside, samples=1 if at_a_time == 1 else None)
    outside.source = importer.source
    outside.samples = importer.building.samples
    importer.walk()
    building, source = importer.building, importer.source
    islands = _islands(tuple(building.nodes.values()))
    reasons = {tuple(proto.output): reason for proto, reason in importer.kept}
    for proto in source.model.graph.node:
        tensors = [source.tensors.get(name) for name in proto.output if name]
        if tensors and all(isinstance(t, View) and t.value in islands for t in tensors):
            reasons.setdefault(tuple(proto.output), "it stands among kept nodes, without a layer that has weights")
    kept = [proto for proto in source.model.graph.node if tuple(proto.output) in reasons]
    outputs = []
    for name in dict.fromkeys([*importer.outputs, *(name for proto in kept for name in names_read(proto))]):
        tensor = source.tensors.get(name)
        if isinstance(tensor, View) and tensor.value in building.nodes and tensor.value not in islands:
            outputs.append(tensor.value)
    described = tuple(Kept(str(p.name or next(iter(p.output), "")), str(p.op_type), reasons[tuple(p.output)]) for p in kept)
    if not outputs:
        raise OnnxError(f"{path}: eqfact understands no layer with weights in this network; {_commonest(described)}")
    return Opened(path, importer.finished(outputs), described, source, outside.feeds, at_a_time)


def _commonest(kept: Sequence[Kept]) -> str:
    """The three commonest reasons for which nodes are kept."""
    found = Counter(f"{k.op_type}: {k.reason}" for k in kept).most_common(3)
    return "; ".join(f"{count} kept ({reason})" for reason, count in found)


def _islands(nodes: Sequence[Node]) -> set[str]:
    """Nodes that are connected, by values that nodes make, with no layer but BatchNorms: nothing there can be equalized or quantized."""
    number = {node.name: i for i, node in enumerate(nodes)}
    edges = np.array([(number[node.name], number[value]) for node in nodes for value in node.inputs if value in number]).reshape(-1, 2).T
    joined = sparse.coo_array((np.ones(edges.shape[1]), (edges[0], edges[1])), shape=(len(nodes), len(nodes)))
    _, part = csgraph.connected_components(joined, directed=False)
    layers = {part[number[n.name]] for n in nodes if isinstance(n.op, Weighted) and not isinstance(n.op, BatchNorm)}
    return {node.name for node in nodes if part[number[node.name]] not in layers}


def _batches(inputs: Sequence[onnx.ValueInfoProto]) -> dict[str, int]:
    """The axis of each input that is the batch, of any size: the first, or the one that is called as the first axis of another is."""
    found = {info.name: 0 for info in inputs if (dims := sizes(info)) and dims[0] is None}
    called = next((info.type.tensor_type.shape.dim[0].dim_param for info in inputs if info.name in found), "")
    for info in inputs if found else ():
        names = [d.dim_param if n is None else None for d, n in zip(info.type.tensor_type.shape.dim, sizes(info), strict=True)]
        if info.name not in found and names.count(called) == 1:  # where nothing has a name: the only open axis
            found[info.name] = names.index(called)
    return found


def _parts(path: Path, source: Source, feeds: Feeds, first: int | None = None, at_a_time: int = A_PART) -> list[Arrays]:
    """Data in the shapes and types that a file takes, a few samples at a time."""
    inputs = source.inputs
    if set(feeds) != {info.name for info in inputs}:
        raise OnnxError(f"{path}: the file needs inputs {sorted(info.name for info in inputs)}, got {sorted(feeds)}")
    arrays, runs = {}, {}
    for info in inputs:
        array, dims = np.asarray(feeds[info.name]), sizes(info)
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type))
        if array.dtype != dtype and not (array.dtype.kind == dtype.kind and np.can_cast(array.dtype, dtype, "same_kind")):
            raise OnnxError(f"{path}: input '{info.name}' holds {dtype}, got {array.dtype}; convert it with .astype")
        if array.dtype.kind == "f" and not (array < np.inf).all():  # minus infinity masks scores
            raise OnnxError(f"{path}: input '{info.name}' holds NaN or infinity; data must be finite")
        fits = len(dims) == array.ndim and all(d in (None, n) for d, n in zip(dims[1:], array.shape[1:], strict=True))
        if array.size == 0 or (info.type.tensor_type.HasField("shape") and not (
                fits and (not dims or dims[0] in (None, array.shape[0]) or array.shape[0] % dims[0] == 0))):
            said = ", ".join("?" if d is None else str(d) for d in dims)
            several = f"; give a multiple of {dims[0]} along the first axis" if fits and dims and array.size else ""
            raise OnnxError(f"{path}: input '{info.name}' has the shape ({said}), got {array.shape}{several}")
        arrays[info.name] = array.astype(dtype, copy=False)
        runs[info.name] = array.shape[0] // dims[0] if dims and dims[0] is not None else 1
    at = _batches(inputs)
    if len({arrays[name].shape[axis] for name, axis in at.items()}) > 1 or len(set(runs.values()) - {1}) > 1:
        raise OnnxError(f"{path}: inputs must have equal batch sizes, got { {name: array.shape for name, array in arrays.items()} }")
    if at:
        count = next(arrays[name].shape[axis] for name, axis in at.items())
        count = count if first is None else min(first, count)
        return [{name: array if name not in at else array.take(range(i, min(i + at_a_time, count)), at[name])
                 for name, array in arrays.items()} for i in range(0, count, at_a_time)]
    count = max(runs.values(), default=1)
    return [{name: array if runs[name] == 1 else np.split(array, count)[i] for name, array in arrays.items()}
            for i in range(count if first is None else min(first, count))]


class _OneSample(Exception):
    """A file with a free batch that runs on one sample and not on two."""


class _Outside:
    """Shapes, types and batch axes of the tensors of a file, found by running it."""

    #: The file, as soon as an importer has begun with it.
    source: Source

    def __init__(self, path: Path, model: onnx.ModelProto, data: Feeds | None, input_shapes: Mapping[str, Sequence[int]]) -> None:
        self.path, self.data, self.input_shapes = path, data, input_shapes
        self.samples: int | None = None
        self._names = [i.name for i in model.graph.input] + [name for node in model.graph.node for name in node.output if name]
        self._found: list[dict[str, tuple[Shape, np.dtype[Any]]]] = []
        #: Whether all tensors have been looked at, not only the inputs.
        self._whole = False

    def __call__(self, tensor: Foreign) -> tuple[Shape, np.dtype[Any], int | None]:
        if not self._found:
            self._found = self._look([])
        if not self._whole and tensor.name not in self._found[0]:  # a run for every few tensors: most files ask for none but inputs
            self._found, self._whole = self._look([name for name in self._names if name not in self._found[0]]), True
        first, *others = (found.get(tensor.name) for found in self._found)
        if first is None or None in others:
            raise ValueError(f"it reads '{tensor.name}', whose size is not known ({tensor.reason})")
        shape, dtype = first
        if self.samples is not None:
            return shape, dtype, 0 if len(shape) > 1 and shape[0] == self.samples else None
        changed = [i for i, (n, m) in enumerate(zip(shape, others[0][0], strict=True)) if n != m] if others and others[0] else []
        if len(changed) > 1 or (changed and (shape[changed[0]], others[0][0][changed[0]]) != PROBES):  # type: ignore[index]
            raise ValueError(f"it reads '{tensor.name}', whose size is no fixed one for every sample ({tensor.reason})")
        return shape, dtype, changed[0] if changed else None

    def _look(self, inner: Sequence[str]) -> list[dict[str, tuple[Shape, np.dtype[Any]]]]:
        """Shapes and types of the inputs and of these inner tensors, for every number of samples that it takes to tell their batch axes."""
        (feeds, *_), at = _parts(self.path, self.source, self.feeds, 1), _batches(self.source.inputs)
        running = Running(self.path, inner)
        found: list[dict[str, tuple[Shape, np.dtype[Any]]]] = []
        for count in PROBES if at and self.samples is None else PROBES[:1]:
            given = {name: array if name not in at else np.concatenate([array] * count, at[name]) for name, array in feeds.items()}
            shapes = {name: (array.shape, array.dtype) for name, array in given.items()}
            try:
                if not inner:
                    running(given)  # does it take so many samples at all?
                for i in range(0, len(inner), AT_ONCE):
                    arrays = running(given, inner[i:i + AT_ONCE])
                    shapes.update((name, (array.shape, array.dtype)) for name, array in arrays.items())
            except OnnxError as error:
                if not found:
                    raise
                raise _OneSample from error
            found.append(shapes)
        return found

    @cached_property
    def feeds(self) -> Arrays:
        """The data given, or what stands in for it."""
        inputs, at = self.source.inputs, _batches(self.source.inputs)
        if self.data is not None:
            _parts(self.path, self.source, self.data)
            return {name: np.asarray(array) for name, array in self.data.items()}
        unknown = sorted(set(self.input_shapes) - {i.name for i in inputs})
        if unknown:
            raise OnnxError(f"{self.path}: input_shapes (--input-shape) names {unknown}, "
                            f"the network's inputs are {[i.name for i in inputs]}")
        rng, feeds = np.random.default_rng(0), {}
        for info in inputs:
            dims = sizes(info)
            given = self.input_shapes.get(info.name)
            shape = [*dims] if given is None else [*dims[:1], *given]
            if (axis := at.get(info.name)) is not None and shape[axis] is None:
                shape[axis] = STAND_INS
            if any(n is None for n in shape) or not info.type.HasField("tensor_type"):
                seen = ", ".join("?" if d is None else str(d) for d in dims)
                raise OnnxError(f"{self.path}: input '{info.name}' has the shape ({seen}): give data (on the command line --data), or "
                                f"input_shapes={{'{info.name}': (C, *spatial)}} (--input-shape {info.name}=C,H,W), without the batch")
            known = [int(n) for n in shape if n is not None]
            if not at and known:  # as many batches of the fixed size
                known[0] *= STAND_INS
            dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type))
            feeds[info.name] = rng.standard_normal(known).astype(dtype) if dtype.kind == "f" else np.ones(known, dtype)
        return feeds
