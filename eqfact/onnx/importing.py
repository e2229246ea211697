"""How does an ONNX network become a graph? Node by node, each by the function that its op type has in :data:`nodes.READERS`.

Nodes whose inputs are all constant are computed by onnx's reference evaluator, with two assumed batch sizes if the batch is
free: what differs between the two depends on the batch, and nothing but a shape may read it. Moves of entries stay
views until a layer reads them, and become ops then. Equal uses of the same constants become one op object.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from eqfact.graph import Graph, Node
from eqfact.onnx.call import Call, Constant, Tensor
from eqfact.onnx.nodes import READERS
from eqfact.onnx.opaque import evaluator, opaque_ops
from eqfact.onnx.origin import OnnxError, Origin, UnsupportedNode
from eqfact.onnx.reading import OLDEST_WRITTEN, opset, read_model
from eqfact.onnx.views import View, moves
from eqfact.ops import Identity, Op, Shape, Weighted

Path_ = str | os.PathLike[str]

#: Two assumed sizes of a free batch; primes, so that no product of other sizes is mistaken for one.
BATCHES = (7919, 7907)
#: Not constant, although all their inputs may be.
RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")
FLOATS = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.DOUBLE: np.float64, onnx.TensorProto.FLOAT16: np.float16}


def load(path: Path_, *, opaque: bool = False, input_shapes: Mapping[str, Sequence[int]] | None = None) -> Graph:
    """Read an ONNX network; every node is named after the ONNX value that it makes.

    ``input_shapes`` gives shapes ``(C, *spatial)`` of inputs whose file leaves them open. With ``opaque=True`` a node that
    eqfact has no layer for is kept as it is (:class:`~eqfact.onnx.Opaque`), and every channel that it touches is pinned.

    Raises :class:`OnnxError` (a :class:`ValueError`), which starts with the path and names node, op type and remedy, for
    files that are not ONNX, truncated, quantized already, of an unknown opset, with missing or outlying external data,
    with weights that are not finite floats, and for nodes that are not supported; :class:`OSError` if there is no file.
    """
    path = Path(path)
    model = read_model(path)
    try:
        return Importer(path, model, opaque, input_shapes or {}).graph()
    except OnnxError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise OnnxError(f"{path}: {error}") from error


class Importer:
    """The state of one import: tensors by ONNX name, and the nodes made so far."""

    def __init__(self, path: Path, model: onnx.ModelProto, opaque: bool, input_shapes: Mapping[str, Sequence[int]]) -> None:
        self.path, self.model, self.opaque = path, model, opaque
        self.opset = opset(model)
        self.opsets = {o.domain: o.version for o in model.opset_import}
        self.tensors: dict[str, Tensor] = {}
        self.inputs: dict[str, Shape] = {}
        self.nodes: dict[str, Node] = {}
        self.shapes: dict[str, Shape] = {}
        self.reads: dict[str, int] = {}
        self.outputs = [str(o.name) for o in model.graph.output]
        self._ops: dict[tuple[object, ...], Op] = {}
        self._written: dict[tuple[object, ...], str] = {}
        self.header = _header(model)
        self.samples: int | None = None
        self.dtype: type[Any] = np.float32
        self._read_initializers()
        self._read_inputs(input_shapes)
        self.names = {*self.tensors, *(name for node in model.graph.node for name in node.output)}
        for node in model.graph.node:
            for name in node.input:
                self.reads[name] = self.reads.get(name, 0) + 1
        for name in self.outputs:
            self.reads[name] = self.reads.get(name, 0) + 1

    # ------------------------------------------------------------------------------------------- inputs and constants

    def _read_initializers(self) -> None:
        for tensor in self.model.graph.initializer:
            try:
                value = np.array(numpy_helper.to_array(tensor))
            except (TypeError, ValueError, KeyError) as error:
                raise OnnxError(f"{self.path}: initializer '{tensor.name}' cannot be read: {error}") from error
            value.flags.writeable = False
            self.tensors[tensor.name] = Constant(tensor.name, (value,))
        del self.model.graph.initializer[:]  # one copy of the weights is enough

    def _read_inputs(self, given: Mapping[str, Sequence[int]]) -> None:
        inputs = [i for i in self.model.graph.input if i.name not in self.tensors]
        unknown = sorted(set(given) - {i.name for i in inputs})
        if unknown:
            raise OnnxError(f"{self.path}: input_shapes (--input-shape) names {unknown}, "
                            f"the network's inputs are {[i.name for i in inputs]}")
        batches = set()
        for info in inputs:
            kind = info.type.tensor_type
            if not info.type.HasField("tensor_type") or kind.elem_type not in FLOATS:
                held = onnx.TensorProto.DataType.Name(kind.elem_type) if info.type.HasField("tensor_type") else "no tensor"
                raise OnnxError(f"{self.path}: input '{info.name}' holds {held}; eqfact computes with floating tensors only")
            self.dtype = FLOATS[kind.elem_type]
            dims = [int(d.dim_value) if d.HasField("dim_value") else None for d in kind.shape.dim]
            shape = self._shape(info.name, dims, given.get(info.name))
            batches.add(dims[0] if dims else None)
            self.inputs[info.name] = self.shapes[info.name] = shape
            self.tensors[info.name] = View(info.name, shape)
        if len(batches) == 1:
            (self.samples,) = batches
        self.batches = BATCHES if self.samples is None else (self.samples,)

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
        if dims[0] == 0 or not all(dims[1:]):
            raise OnnxError(f"{self.path}: input '{name}' has an axis of size 0: shape {list(dims)}")
        return tuple(int(d) for d in dims[1:] if d is not None)

    # ------------------------------------------------------------------------------------------- the walk

    def graph(self) -> Graph:
        """Every node in turn; then those that no output needs are dropped."""
        for proto in self.model.graph.node:
            for name in proto.input:
                if name and name not in self.tensors:
                    raise self.error(proto, f"it reads '{name}', which nothing before it makes")
            made = self._made(proto)
            for name, tensor in zip(proto.output, made, strict=False):
                self.tensors[name] = tensor
        outputs = [self._output(name) for name in self.outputs]
        needed = set(outputs)
        for node in reversed(self.nodes.values()):
            if node.name in needed:
                needed.update(node.inputs)
        return Graph(self.inputs, tuple(n for n in self.nodes.values() if n.name in needed), tuple(outputs))

    def _made(self, proto: onnx.NodeProto) -> Sequence[Tensor]:
        call = Call(self, proto)
        constant = all(isinstance(t, Constant) or t is None for t in call.inputs)
        if constant and proto.op_type not in RANDOM and (call.inputs or proto.op_type == "Constant"):
            return self._folded(proto, call)
        try:
            if proto.domain not in ("", "ai.onnx") or proto.op_type not in READERS:
                call.refuse("eqfact has no such layer")
            made = READERS[proto.op_type](call)
            tensors = [made] if isinstance(made, (View, Constant)) else list(made)
            for name in proto.output[len(tensors):]:
                if name and self.reads.get(name):
                    call.refuse(f"its output '{name}' is read, and eqfact does not compute it")
            return tensors
        except OnnxError as error:
            if not isinstance(error, UnsupportedNode):
                raise
            reason = str(error)
        except (ValueError, TypeError) as error:
            reason = str(error)
        if not self.opaque:
            raise self.error(proto, f"{reason}; load with opaque=True (on the command line --opaque) to keep this node as it is "
                                    "(then its channels are pinned), or export the network without it", UnsupportedNode)
        return self._kept(proto, call)

    def _folded(self, proto: onnx.NodeProto, call: Call) -> Sequence[Tensor]:
        """The outputs of a node that reads nothing but constants."""
        tensors = [t for t in call.inputs if isinstance(t, Constant)]
        if proto.op_type == "Identity":  # the same array: shared weights stay shared
            return tensors
        values = []
        for k in range(max((len(t.values) for t in tensors), default=1)):
            feeds = {name: t.values[min(k, len(t.values) - 1)] for name, t in zip((n for n in proto.input if n), tensors, strict=True)}
            try:
                values.append(evaluator(proto, self.opsets).run(None, feeds))
            except Exception as error:  # whatever a kernel of onnx raises
                raise self.error(proto, f"onnx cannot compute it from its constants: {type(error).__name__}: {str(error)[:300]}") from error
        made = []
        for name, several in zip(proto.output, zip(*values, strict=True), strict=False):
            arrays = tuple(np.asarray(v) for v in several)
            for array in arrays:
                array.flags.writeable = False
            made.append(Constant(name, arrays))
        return made

    def _kept(self, proto: onnx.NodeProto, call: Call) -> Sequence[Tensor]:
        """The node as it is, one op for each of its outputs."""
        if self.opset < OLDEST_WRITTEN:
            raise self.error(proto, f"a node can be kept as it is from opset {OLDEST_WRITTEN} on, the file has {self.opset}; "
                                    "convert it with onnx.version_converter")
        inputs, constants = {}, {}
        for name, tensor in zip(proto.input, call.inputs, strict=True):
            try:
                if isinstance(tensor, Constant):
                    constants[name] = call.constant(list(proto.input).index(name))
                elif isinstance(tensor, View):
                    inputs[name] = call.value(tensor)
            except ValueError as error:
                raise self.error(proto, f"not even opaque=True (--opaque) can keep it: {error}") from error
        try:
            ops = opaque_ops(proto, self.opsets, {name: self.shapes[v] for name, v in inputs.items()}, constants,
                             np.dtype(self.dtype), self.samples)
        except ValueError as error:
            raise self.error(proto, f"not even opaque=True (--opaque) can keep it: {error}", UnsupportedNode) from error
        origin = Origin(str(proto.name), {}, False, self.header)
        return [self.add(name or self.fresh(f"{proto.output[0]}.unused"), op, tuple(inputs.values()), origin)
                for name, op in zip(proto.output, ops, strict=True)]

    def _output(self, name: str) -> str:
        """The eqfact value of a network output, which must have its name."""
        tensor = self.tensors.get(name)
        if not isinstance(tensor, View):
            raise OnnxError(f"{self.path}: output '{name}' is {'a constant' if tensor else 'made by no node'}; remove it from the outputs")
        if name in self.inputs:
            return name
        if tensor.value == name and tensor.index is None:
            return name
        if name in self.nodes:  # made in another layout than it is put out in
            inner = self.fresh(f"{name}.inner")
            self._rename(name, inner)
            tensor = replace(tensor, value=inner if tensor.value == name else tensor.value)
        try:
            return self.written(tensor, name, at=name)
        except ValueError as error:
            raise OnnxError(f"{self.path}: output '{name}': {error}") from error

    # ------------------------------------------------------------------------------------------- nodes

    def add(self, name: str, op: Op, inputs: Sequence[str], origin: Origin) -> View:
        """A new node; :class:`ValueError` with the op's reason if the inputs do not fit."""
        name = self.fresh(name) if name in self.nodes or name in self.inputs else name
        shape = op.output_shape(*(self.shapes[i] for i in inputs))
        self.nodes[name], self.shapes[name] = Node(name, op, tuple(inputs), origin), shape
        return View(name, shape)

    def fresh(self, name: str) -> str:
        """A name that nothing in the file or the graph has."""
        taken = self.names | self.nodes.keys()
        candidates = (name, *(f"{name}_{i}" for i in range(1, len(taken) + 2)))
        return next(c for c in candidates if c not in taken)

    def written(self, view: View, reader: str, at: str | None = None) -> str:
        """The value that is a tensor itself; the ops that move its entries are added, and reused by later readers."""
        key = (view.value, view.batch, view.sample, None if view.index is None else view.index.tobytes())
        if at is None and key in self._written:
            return self._written[key]
        ops = moves(view)
        value = view.value
        if not ops:
            if at is None:
                return value
            ops = [Identity()]
        name = next((n for n, t in self.tensors.items() if t is view), reader)
        for i, op in enumerate(ops):
            last = i == len(ops) - 1
            own = at if at is not None else name if name not in self.nodes and name != reader else None
            made = own if last and own is not None else self.fresh(f"{name}.{type(op).__name__.lower()}")
            value = self.add(made, op, (value,), Origin(self._maker(name) if last else "", {}, False, self.header)).value
        self._written[key] = value
        return value

    def _maker(self, output: str) -> str:
        """The name of the ONNX node that makes a tensor."""
        return next((str(n.name) for n in self.model.graph.node if output in n.output), "")

    def shared(self, op: Weighted, source: tuple[object, ...]) -> Weighted:
        """The same op object for equal uses of the same constants, so that sharing is seen by everyone."""
        plain = tuple((f.name, repr(value)) for f in fields(op)  # type: ignore[arg-type]  # every final op is a dataclass
                      if f.init and not isinstance(value := getattr(op, f.name), np.ndarray))
        known = self._ops.setdefault((type(op), source, plain), op)
        assert isinstance(known, Weighted)
        return known

    def taken(self, value: str, kind: type[Op]) -> Node | None:
        """The node that makes a value, removed, if it is of this kind and the value is read once."""
        node = self.nodes.get(value)
        if node is None or not isinstance(node.op, kind) or self.reads.get(value) != 1:
            return None
        return self.nodes.pop(value)

    def restore(self, node: Node) -> None:
        """Put a taken node back."""
        self.nodes = {node.name: node, **self.nodes}  # Graph sorts them

    def inherit(self, name: str, from_: Node) -> None:
        """The node ``name`` has taken another one in: it remembers that one's initializers too."""
        node = self.nodes[name]
        own, other = node.origin, from_.origin
        assert isinstance(own, Origin) and isinstance(other, Origin)
        merged = replace(own, initializers={**other.initializers, **own.initializers}, transposed=other.transposed)
        self.nodes[name] = replace(node, origin=merged)

    def _rename(self, old: str, new: str) -> None:
        self.shapes[new] = self.shapes[old]
        self.nodes = {(new if n.name == old else n.name): replace(n, name=new if n.name == old else n.name,
                                                                  inputs=tuple(new if i == old else i for i in n.inputs))
                      for n in self.nodes.values()}
        self.tensors = {n: replace(t, value=new) if isinstance(t, View) and t.value == old else t for n, t in self.tensors.items()}

    def error(self, proto: onnx.NodeProto, reason: str, kind: type[OnnxError] = OnnxError) -> OnnxError:
        """An error with the place: path, node and op type."""
        name = proto.name or (proto.output[0] if proto.output else "")
        return kind(f"{self.path}: node '{name}' ({f'{proto.domain}.' if proto.domain else ''}{proto.op_type}): {reason}")


def _header(model: onnx.ModelProto) -> bytes:
    """The file without nodes and weights."""
    header = onnx.ModelProto()
    header.CopyFrom(onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name, producer_version=model.producer_version,
                                    domain=model.domain, model_version=model.model_version, doc_string=model.doc_string))
    header.opset_import.extend(model.opset_import)
    header.metadata_props.extend(model.metadata_props)
    weights = {t.name for t in model.graph.initializer}
    header.graph.name, header.graph.doc_string = model.graph.name, model.graph.doc_string
    header.graph.input.extend(i for i in model.graph.input if i.name not in weights)
    header.graph.output.extend(model.graph.output)
    return bytes(header.SerializeToString())
