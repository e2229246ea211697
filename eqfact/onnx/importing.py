"""How does an ONNX network become a graph? Node by node, each by the function that its op type has in :data:`nodes.READERS`.

Nodes whose inputs are all constant are computed, with two assumed batch sizes if the batch is free: what differs between the two depends
on the batch, and nothing but a shape may read it. Moves of entries stay views until a layer reads them, and become ops then. A node that
eqfact has no layer for is refused (``load``) or kept (:func:`eqfact.onnx.open`): then what it makes comes from outside.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from eqfact.graph import Graph
from eqfact.onnx import folding, fusing
from eqfact.onnx.building import Building
from eqfact.onnx.call import Call
from eqfact.onnx.nodes import FUSED, READERS
from eqfact.onnx.origin import FLOATS, Constant, Foreign, OnnxError, Source, Tensor, UnsupportedNode, errors_of, sizes
from eqfact.onnx.reading import opset, read_model
from eqfact.onnx.views import OneSample, View
from eqfact.ops import Shape

Path_ = str | os.PathLike[str]


def load(path: Path_, *, input_shapes: Mapping[str, Sequence[int]] | None = None) -> Graph:
    """Read an ONNX network that eqfact understands whole; every node is named after the ONNX value that it makes.

    ``input_shapes`` gives shapes ``(C, *spatial)`` of inputs whose file leaves them open. For files of which only parts are understood
    there is :func:`eqfact.onnx.open`.

    Raises :class:`OnnxError` (a :class:`ValueError`), which starts with the path and names node, op type and remedy, for
    files that are not ONNX, truncated, quantized already, of an unknown opset, with missing or outlying external data,
    with weights that are not finite floats, and for nodes that are not supported; :class:`OSError` if there is no file.

    >>> net = Graph.chain((2,), fc=Dense([[3.0, 1.0]]))
    >>> eq.onnx.save("net.onnx", net)
    >>> eq.onnx.load("net.onnx")["fc"].op.weight
    array([[3., 1.]])
    """
    path = Path(path)
    with errors_of(path):
        try:
            return Importer(path, read_model(path), input_shapes or {}).graph()
        except OnnxError as error:
            if not isinstance(error.__cause__, OneSample):
                raise
            try:  # a free batch, but a batch of one sample baked into a node: then the network is one for single samples
                return Importer(path, read_model(path), input_shapes or {}, samples=1).graph()
            except OnnxError:
                raise error from None


class Importer:
    """One walk through a file.

    ``outside`` knows the full shapes of tensors that are no eqfact values, their types, and where their batch stands. With it a node that
    cannot be read is kept, with the reason (:mod:`eqfact.onnx.opened`); without it that is an error.
    """

    def __init__(self, path: Path, model: onnx.ModelProto, input_shapes: Mapping[str, Sequence[int]],
                 outside: Callable[[Foreign], tuple[Shape, np.dtype[Any], int | None]] | None = None, samples: int | None = None) -> None:
        self.path, self.model, self.outside = path, model, outside
        self.opset = opset(model)
        self.opsets = {o.domain: o.version for o in model.opset_import}
        self.kept: list[tuple[onnx.NodeProto, str]] = []
        self.outputs = [str(o.name) for o in model.graph.output]
        initializers = folding.constant_arrays(model.graph.initializer)
        del model.graph.initializer[:]  # one copy of the weights is enough
        self.source = Source(model, initializers)
        self.building = Building(self.source, self._samples() if samples is None else samples, self._enter, self._sizes)
        for name, value in initializers.items():
            self.source.tensors[name] = Constant(name, (value,))
        self._read_inputs(input_shapes)

    # ------------------------------------------------------------------------------------------- inputs

    def _samples(self) -> int | None:
        """The size of the batch, if all inputs have a fixed and the same one; 1 where they are fixed and there is no batch. Inputs of a
        single number have no axis that could be one."""
        firsts = {dims[0] if dims else None for info in self.source.inputs
                  if (dims := sizes(info)) or not info.type.tensor_type.HasField("shape")}
        return firsts.pop() if len(firsts) == 1 else None if None in firsts or self.outside is None else 1

    def _read_inputs(self, given: Mapping[str, Sequence[int]]) -> None:
        inputs = self.source.inputs
        unknown = sorted(set(given) - {i.name for i in inputs})
        if unknown:
            raise OnnxError(f"{self.path}: input_shapes (--input-shape) names {unknown}, "
                            f"the network's inputs are {[i.name for i in inputs]}")
        for info in inputs:
            if self.outside is not None:  # it becomes an input of the graph where a layer reads it
                self.source.tensors[info.name] = Foreign(info.name, "it is an input of the file")
                continue
            kind = info.type.tensor_type
            if not info.type.HasField("tensor_type") or kind.elem_type not in FLOATS:
                held = onnx.TensorProto.DataType.Name(kind.elem_type) if info.type.HasField("tensor_type") else "no tensor"
                raise OnnxError(f"{self.path}: input '{info.name}' holds {held}; load computes with floating tensors only: "
                                "eqfact.onnx.open reads the parts of this file that are floating")
            if FLOATS[kind.elem_type] != self.building.dtype:
                raise OnnxError(f"{self.path}: input '{info.name}' holds {FLOATS[kind.elem_type]}, the weights {self.building.dtype}; "
                                "load computes in one type: eqfact.onnx.open reads files of several")
            shape = self._shape(info.name, sizes(info), given.get(info.name))
            self.building.input(info.name, View.whole(info.name, shape, self.building.samples))

    def _shape(self, name: str, dims: Sequence[int | None], given: Sequence[int] | None) -> Shape:
        if given is not None:
            if dims and (len(given) != len(dims) - 1 or any(d not in (None, g) for d, g in zip(dims[1:], given, strict=True))):
                raise OnnxError(f"{self.path}: input_shapes (--input-shape) gives input '{name}' the shape {tuple(given)} (without batch), "
                                f"the file says {dims}")
            return tuple(int(n) for n in given)
        if len(dims) < 2 or any(d is None for d in dims[1:]):
            seen = ", ".join("?" if d is None else str(d) for d in dims)
            raise OnnxError(f"{self.path}: input '{name}' has the shape ({seen}); eqfact needs a batch and fixed sizes (N, C, *spatial): "
                            f"give input_shapes={{'{name}': (C, *spatial)}} (on the command line --input-shape {name}=C,H,W), "
                            "without the batch")
        return tuple(int(d) for d in dims[1:] if d is not None)

    def _enter(self, tensor: Foreign) -> View:
        """A tensor from outside as a new input of the graph."""
        assert self.outside is not None
        shape, dtype, batch = self.outside(tensor)
        if dtype != self.building.dtype:
            raise ValueError(f"it reads '{tensor.name}', which holds {dtype} ({tensor.reason}); the weights are {self.building.dtype}")
        if batch is None and self.building.samples != 1:
            raise ValueError(f"it reads '{tensor.name}', which has no batch ({tensor.reason})")
        if 0 in shape:
            raise ValueError(f"it reads '{tensor.name}', which is empty ({tensor.reason})")
        sample = tuple(n for axis, n in enumerate(shape) if axis != batch)
        name = tensor.name if batch == 0 and sample else self.building.fresh(f"{tensor.name}.samples")
        view = View.whole(name, sample or (1,), self.building.samples, batch)
        view = view.with_axes(*view.axes[:len(shape)])  # one number a sample is a channel that the tensor has no axis for
        self.building.input(tensor.name, view)
        return view

    def _sizes(self, tensor: Foreign) -> Sequence[Shape]:
        """The shape of a tensor from outside, with each assumed size of the batch."""
        assert self.outside is not None
        shape, _, batch = self.outside(tensor)
        return [tuple(size if axis == batch else n for axis, n in enumerate(shape)) for size in self.building.batches]

    # ------------------------------------------------------------------------------------------- the walk

    def graph(self) -> Graph:
        """The whole network."""
        self.walk()
        return self.finished([self.output(name) for name in self.outputs])

    def finished(self, outputs: Sequence[str]) -> Graph:
        """The graph of all nodes that these values need."""
        needed = set(outputs)
        for node in reversed(self.building.nodes.values()):
            if node.name in needed:
                needed.update(node.inputs)
        inputs = {name: shape for name, shape in self.building.inputs.items() if self.outside is None or name in needed}
        graph = Graph(inputs, tuple(n for n in self.building.nodes.values() if n.name in needed), tuple(dict.fromkeys(outputs)))
        self.source.read = graph
        return graph

    def walk(self) -> None:
        """Read every node in turn."""
        nodes = list(self._flat(self.model.graph.node))
        del self.model.graph.node[:]
        self.model.graph.node.extend(nodes)

    def _flat(self, nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
        """Read the nodes, and yield them; of an If whose condition is known, those of its branch instead.

        Of nodes that may be one op together all are read with the last.
        """
        groups = fusing.groups(nodes, self.building)
        for node in nodes:
            proto = onnx.NodeProto()
            proto.CopyFrom(node)
            group = groups.get(proto.output[0]) if proto.output else None
            if group is not None:
                if proto.output[0] == group.last and not self._fused(group):
                    for each in group.nodes.values():
                        self._read(each)
                yield proto
                continue
            branch = self._branch(proto)
            if branch is not None:
                for name, value in folding.constant_arrays(branch.initializer).items():
                    self.source.initializers[name] = value
                    self.source.tensors[name] = Constant(name, (value,))
                yield from self._flat(branch.node)
                for name, output in zip(proto.output, branch.output, strict=True):
                    yield from self._flat([onnx.helper.make_node("Identity", [output.name], [name])])
                continue
            self._read(proto)
            yield proto

    def _read(self, proto: onnx.NodeProto) -> None:
        """Note what a node makes."""
        for name in proto.input:
            if name and name not in self.source.tensors:
                raise self.error(proto, f"it reads '{name}', which nothing before it makes")
        for name, tensor in zip(proto.output, self._made(proto), strict=False):
            if name:
                self.source.tensors[name] = tensor

    def _fused(self, group: fusing.Group) -> bool:
        """Whether nodes are one op together, whose output is then noted."""
        try:
            call = group.call(self.building, self.opset)
            made = None if call is None else FUSED[group.kind](call)
        except (ArithmeticError, LookupError, TypeError, ValueError):  # read one by one they say what is the matter
            return False
        if isinstance(made, View):
            self.source.tensors[group.last] = made
        return made is not None

    def _branch(self, proto: onnx.NodeProto) -> onnx.GraphProto | None:
        """What an If comes down to, if that is known."""
        condition = self.source.tensors.get(proto.input[0]) if proto.op_type == "If" and proto.input else None
        if not isinstance(condition, Constant) or len({bool(v.reshape(-1)[0]) for v in condition.values if v.size}) != 1:
            return None
        wanted = "then_branch" if condition.values[0].reshape(-1)[0] else "else_branch"
        branch: onnx.GraphProto | None = next((a.g for a in proto.attribute if a.name == wanted), None)
        return branch

    def _made(self, proto: onnx.NodeProto) -> Sequence[Tensor]:
        try:
            call = Call(self.building, proto, self.opset)
            constant = all(isinstance(t, Constant) or t is None for t in call.inputs)
            if constant and proto.op_type not in folding.RANDOM and (call.inputs or proto.op_type == "Constant"):
                return self._computed(proto, call)
            if proto.domain not in ("", "ai.onnx") or proto.op_type not in READERS:
                call.refuse("eqfact has no such layer")
            made = READERS[proto.op_type](call)
            tensors = [made] if isinstance(made, (View, Constant, Foreign)) else list(made)
            for name in proto.output[len(tensors):]:
                if self.building.reads.get(name):
                    call.refuse(f"its output '{name}' is read, and eqfact does not compute it")
            return tensors
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, OnnxError) and not isinstance(error, UnsupportedNode):
                raise
            reason = str(error)
            if self.outside is None:
                raise self.error(proto, f"{reason}; eqfact.onnx.open (and the command line without --strict) keeps such nodes as they are; "
                                        "or export the network without it", UnsupportedNode) from error
        self.kept.append((proto, reason))
        for name in proto.output:  # read before it was refused
            self.building.nodes.pop(name, None)
        return [Foreign(name, f"it is made by a kept node, {proto.op_type}") for name in proto.output]

    def _computed(self, proto: onnx.NodeProto, call: Call) -> Sequence[Tensor]:
        """The outputs of a node that reads nothing but constants."""
        tensors = [t for t in call.inputs if isinstance(t, Constant)]
        if proto.op_type == "Identity":  # the same array: shared weights stay shared
            return tensors
        values = []
        for k in range(max((len(t.values) for t in tensors), default=1)):
            feeds = {name: t.values[min(k, len(t.values) - 1)] for name, t in zip((n for n in proto.input if n), tensors, strict=True)}
            if proto.op_type == "Expand" and len(tensors[-1].values) > 1:  # to the size of the batch: it stands for any
                values.append([folding.expanded(feeds[proto.input[0]], feeds[proto.input[1]])])
            else:
                values.append(folding.computed(proto, self.opsets, feeds))
        made = []
        for name, several in zip((n for n in proto.output if n), zip(*values, strict=True), strict=False):
            for array in several:
                array.flags.writeable = False
            made.append(Constant(name, several))
        return made

    def output(self, name: str) -> str:
        """The eqfact value of a network output, which must have its name."""
        tensor, building = self.source.tensors.get(name), self.building
        if not isinstance(tensor, View):
            raise OnnxError(f"{self.path}: output '{name}' is {'a constant' if tensor else 'made by no node'}; remove it from the outputs")
        if tensor.plain and tensor.value == name:
            return name
        if name in building.nodes:  # made in another layout than it is put out in
            inner = building.fresh(f"{name}.inner")
            building.rename(name, inner)
            tensor = replace(tensor, value=inner if tensor.value == name else tensor.value)
        try:
            return building.written(tensor, name, at=name)
        except ValueError as error:
            raise OnnxError(f"{self.path}: output '{name}': {error}") from error

    def error(self, proto: onnx.NodeProto, reason: str, kind: type[OnnxError] = OnnxError) -> OnnxError:
        """An error with the place: path, node and op type."""
        name = proto.name or (proto.output[0] if proto.output else "")
        return kind(f"{self.path}: node '{name}' ({f'{proto.domain}.' if proto.domain else ''}{proto.op_type}): {reason}")
