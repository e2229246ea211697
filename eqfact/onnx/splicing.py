"""How does a graph of another structure (quantized, say) go into the file that it is part of? As a network of its own among the kept nodes.

The whole graph is written anew, every value batch and channels first. What else the file has is copied, and reads the tensors that it
read before: these are made of the graph's values, in their own order of axes, where somebody asks for them.
"""

from __future__ import annotations

import graphlib
import math
import os
from collections.abc import Mapping
from dataclasses import replace

import onnx
from onnx import helper, numpy_helper, version_converter

from eqfact.graph import Graph
from eqfact.onnx.building import names_read
from eqfact.onnx.exporting import Writer
from eqfact.onnx.origin import OnnxError, Origin, Source, sizes
from eqfact.onnx.reading import OLDEST_WRITTEN, opset
from eqfact.onnx.views import BATCH, View
from eqfact.ops import AvgPool, Blend, LpPool, MaxPool, MinPool, Mix, Rearrange, Rotary, Scores, Take, Unflatten

#: Ops that are written with sizes of their inputs in them.
SIZED = (AvgPool, Blend, LpPool, MaxPool, MinPool, Mix, Rearrange, Rotary, Scores, Take, Unflatten)


def spliced(path: str | os.PathLike[str], graph: Graph, read: Graph, source: Source, kind: type[Writer]) -> onnx.ModelProto:
    """The file of ``source``, of which ``read`` was understood, with ``graph`` as ``kind`` writes it in the place of that."""
    file = _recent(path, source)
    protos = file.graph.node
    views = {name: tensor for name, tensor in source.tensors.items() if isinstance(tensor, View)}
    made = {node.origin.makes: node.name for node in read.nodes if isinstance(node.origin, Origin) and node.origin.makes in views
            and views[node.origin.makes].value == node.name}
    taken_there = {str(name) for proto in protos for name in (*proto.output, *names_read(proto))} | set(source.initializers)
    taken = taken_there | set(graph.shapes)
    away = {value for tensor, value in made.items() if tensor != value or not views[tensor].plain}
    # a tensor of the file may be called as another value: of several nodes that one became, as the first
    away |= {value for value in graph.shapes if value in taken_there and value not in graph.inputs and made.get(value) != value}
    types = [helper.np_dtype_to_tensor_dtype(dtype) for dtype in (source.dtype(), kind(path, graph).dtype)]
    # onnxruntime moves roundings on to readers, and crashes where these are graphs within nodes: a sum of one hides them
    hidden = any(len(names_read(proto)) > sum(map(bool, proto.input)) for proto in protos)
    there, back = types if types[0] != types[1] else (None, None)  # the casts that the two sides need
    if there is not None or hidden:
        away |= {*made.values(), *graph.inputs}
    names = {value: _fresh(f"{value}.samples", taken) for value in sorted(away)}
    writer = kind(path, _renamed(graph, names))
    writer.names |= taken
    writer.node_names = {str(proto.name) for proto in protos}
    inner = writer.model()
    left = [copied for proto in protos if (copied := _without(proto, made, taken)) is not None]
    nodes = [*inner.graph.node, *left]
    extra: dict[str, onnx.TensorProto] = {}
    for tensor, value in made.items():
        if names.get(value, value) != tensor:
            nodes += _tensor_from(tensor, names.get(value, value), views[tensor], there, extra, taken, hidden)
    for value in graph.inputs:
        tensor = next(name for name, view in views.items() if view.value == value)
        if names.get(value, value) != tensor:
            nodes += _value_from(tensor, names.get(value, value), views[tensor], back, extra, taken)
    nodes = _ordered(nodes, {str(info.name) for info in file.graph.output})
    model = onnx.ModelProto()
    model.CopyFrom(file)
    del model.graph.initializer[:]
    model.ir_version = max(model.ir_version, inner.ir_version)
    for standard in model.opset_import:
        if standard.domain in ("", "ai.onnx"):
            standard.version = opset(inner)  # which is the file's at least
    if opset(inner) > opset(file) and any(node in nodes for node in left):
        raise OnnxError(f"{path}: the network needs opset {opset(inner)}, and the nodes that are kept as they are have "
                        f"{opset(file)}; convert the file with onnx.version_converter")
    if any(isinstance(node.op, SIZED) for node in graph.nodes):
        _fix_sizes(model, views, source)
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    wanted = {name for node in nodes for name in names_read(node)} | {info.name for info in model.graph.output}
    own = {tensor.name: tensor for tensor in inner.graph.initializer}
    model.graph.initializer.extend(tensor for name, tensor in {**own, **extra}.items() if name in wanted)
    model.graph.initializer.extend(tensor for tensor in file.graph.initializer if tensor.name in wanted and tensor.name not in own)
    source.without_weights(model)
    return model


def _recent(path: str | os.PathLike[str], source: Source) -> onnx.ModelProto:
    """The whole file, of an opset that can be written into; onnx itself converts an older one."""
    model = onnx.ModelProto()
    model.CopyFrom(source.model)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in source.initializers.items())
    if opset(model) >= OLDEST_WRITTEN:
        return model
    try:
        recent: onnx.ModelProto = version_converter.convert_version(model, OLDEST_WRITTEN)
    except RuntimeError as error:
        raise OnnxError(f"{path}: the file has opset {opset(model)}, what is written into it needs {OLDEST_WRITTEN} at least, and onnx "
                        f"does not convert it: {' '.join(str(error).split())[:300]}") from error
    return recent


def _without(proto: onnx.NodeProto, made: Mapping[str, str], taken: set[str]) -> onnx.NodeProto | None:
    """A node of the file that no longer makes these tensors: as it is, or under other names beside what else it makes, or not at all."""
    if all(name in made for name in proto.output):
        return None
    if not any(name in made for name in proto.output):
        return proto
    rest = onnx.NodeProto()
    rest.CopyFrom(proto)
    rest.output[:] = [_fresh(f"{name}.unread", taken) if name in made else name for name in proto.output]
    return rest


def _fresh(name: str, taken: set[str]) -> str:
    candidates = (name, *(f"{name}_{i}" for i in range(1, len(taken) + 2)))
    found = next(c for c in candidates if c not in taken)
    taken.add(found)
    return found


def _renamed(graph: Graph, names: Mapping[str, str]) -> Graph:
    """The graph with other names for some values."""
    nodes = tuple(replace(node, name=names.get(node.name, node.name), inputs=tuple(names.get(i, i) for i in node.inputs))
                  for node in graph.nodes)
    return Graph({names.get(n, n): shape for n, shape in graph.inputs.items()}, nodes, tuple(names.get(o, o) for o in graph.outputs))


def _shape(name: str, dims: list[int], extra: dict[str, onnx.TensorProto], taken: set[str]) -> str:
    name = _fresh(name, taken)
    extra[name] = helper.make_tensor(name, onnx.TensorProto.INT64, [len(dims)], dims)
    return name


def _tensor_from(tensor: str, value: str, view: View, cast: int | None, extra: dict[str, onnx.TensorProto], taken: set[str],
                 hidden: bool) -> list[onnx.NodeProto]:
    """Nodes that make a tensor of its value: split into atoms, ordered, joined."""
    split, order = view.atoms()
    target = [-1 if BATCH in axis else math.prod(a.size for a in axis) for axis in view.axes]
    last = _fresh(f"{tensor}.shown", taken) if hidden else tensor
    nodes = _moved(value, last, [-1 if a.is_batch else a.size for a in split], order, target, cast, extra, taken)
    return [*nodes, helper.make_node("Sum", [last], [tensor])] if hidden else nodes


def _value_from(tensor: str, value: str, view: View, cast: int | None, extra: dict[str, onnx.TensorProto],
                taken: set[str]) -> list[onnx.NodeProto]:
    """Nodes that make a value of a tensor: the way back."""
    split, order = view.atoms()
    parts = [-1 if split[i].is_batch else split[i].size for i in order]
    return _moved(tensor, value, parts, [order.index(i) for i in range(len(order))], [-1, *view.shape], cast, extra, taken)


def _moved(source: str, target: str, split: list[int], order: list[int], shape: list[int], cast: int | None,
           extra: dict[str, onnx.TensorProto], taken: set[str]) -> list[onnx.NodeProto]:
    parts, moved, joined = (_fresh(f"{target}.{what}", taken) for what in ("parts", "moved", "joined"))
    nodes = []
    if order != sorted(order):
        nodes = [helper.make_node("Reshape", [source, _shape(f"{target}.split", split, extra, taken)], [parts]),
                 helper.make_node("Transpose", [parts], [moved], perm=order)]
        source = moved
    last = target if cast is None else joined
    nodes.append(helper.make_node("Reshape", [source, _shape(f"{target}.shape", shape, extra, taken)], [last]))
    return nodes if cast is None else [*nodes, helper.make_node("Cast", [joined], [target], to=cast)]


def _ordered(nodes: list[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    """The nodes that outputs need, in dependency order."""
    maker = {str(name): i for i, node in enumerate(nodes) for name in node.output if name}
    wanted, todo = set[int](), [maker[name] for name in outputs if name in maker]
    needs: dict[int, set[int]] = {}
    while todo:
        i = todo.pop()
        if i in wanted:
            continue
        wanted.add(i)
        needs[i] = {maker[name] for name in names_read(nodes[i]) if name in maker}
        todo += needs[i]
    return [nodes[i] for i in graphlib.TopologicalSorter({i: sorted(needs[i]) for i in sorted(wanted)}).static_order()]


def _fix_sizes(model: onnx.ModelProto, views: Mapping[str, View], source: Source) -> None:
    """State the sizes that the graph was read for, where the file leaves them open."""
    for info in model.graph.input:
        view = views.get(info.name)
        if view is not None and any(n is None for n in sizes(info)[1:]):
            for axis, dim in enumerate(info.type.tensor_type.shape.dim):
                if BATCH not in view.axes[axis] and not dim.dim_value > 0:
                    dim.dim_value = view.size(axis)
