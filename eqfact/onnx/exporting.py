"""How is a graph written as ONNX? Node by node, each by the function that its op class has in :data:`WRITERS`.

The file computes what ``eqfact.forward`` computes, in the network's own floating type, under the names that an imported network
brought along. It is checked by onnx, with shapes, before anything is written, and it appears whole or not at all.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from eqfact.graph import Graph, Node
from eqfact.onnx.opaque import Opaque
from eqfact.onnx.origin import OnnxError, Origin
from eqfact.onnx.reading import LARGEST, OLDEST_WRITTEN
from eqfact.ops import (
    GELU,
    Add,
    AvgPool,
    BatchNorm,
    Clip,
    Concat,
    Conv,
    ConvTranspose,
    Dense,
    Erf,
    Flatten,
    GlobalAvgPool,
    HardSigmoid,
    HardSwish,
    Identity,
    LeakyReLU,
    MaxPool,
    Mul,
    Op,
    Pad,
    Permute,
    PReLU,
    ReLU,
    Sigmoid,
    SiLU,
    Slice,
    Softmax,
    Tanh,
    Transpose,
    Unflatten,
    Upsample,
    Weighted,
)
from eqfact.ops.base import Padding, per_axis, per_side
from eqfact.quantization import FakeQuantize

AnyArray = npt.NDArray[Any]
Path_ = str | os.PathLike[str]

#: Opset that is written for a network that no file was the origin of.
OPSET = 17
#: IR version that goes with these; before 4, initializers had to be inputs too.
IR_VERSION = 8


def save(path: Path_, graph: Graph) -> None:
    """Write a network as an ONNX file with a free batch, or with the batch of the file that it came from.

    Opset and IR version are those of that file (at least 13 and 8), or 17 and 8; a newer opset is taken where an op needs one
    (GELU: 20). Float64
    networks stay in float64, which onnxruntime does not run for every op: convert the weights to float32 for deployment.

    Raises :class:`OnnxError` (a :class:`ValueError`) that names the node whose op has no ONNX counterpart; no file is left then.
    """
    write_model(path, Writer(path, graph).model())


def write_model(path: Path_, model: onnx.ModelProto) -> None:
    """Check a model and write its file, whole or not at all."""
    path = Path(path)
    if model.ByteSize() > LARGEST:
        raise OnnxError(f"{path}: the network has {model.ByteSize() / 2**30:.1f} GiB; an ONNX file without external data holds 2 GiB")
    onnx.checker.check_model(model, full_check=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(model.SerializeToString(deterministic=True))
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class Writer:
    """The state of one export: the ONNX nodes and initializers written so far, and the names that are taken."""

    def __init__(self, path: Path_, graph: Graph) -> None:
        self.path, self.graph = Path(path), graph
        self.header = self._header()
        self.standard = next(o for o in self.header.opset_import if o.domain in ("", "ai.onnx"))
        self.dtype = self._dtype()
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, AnyArray] = {}
        self.names = set(graph.shapes)
        self.node_names: set[str] = set()
        #: Names of initializers by the id of the array that they were made of, which is kept alive beside them.
        self.made_of: dict[int, tuple[object, str]] = {}

    def model(self) -> onnx.ModelProto:
        """The whole network."""
        for node in self.graph.nodes:
            self.write(node)
        model = self.header
        for field, names in ((model.graph.input, list(self.graph.inputs)), (model.graph.output, list(self.graph.outputs))):
            known = {info.name: info for info in field}
            del field[:]
            field.extend(self._info(known.get(name), name) for name in names)
        model.graph.node.extend(self.nodes)
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in self.initializers.items())
        return model

    def write(self, node: Node) -> None:
        """The ONNX nodes of one eqfact node."""
        writer = WRITERS.get(type(node.op))
        if writer is None:
            remedy = ("use eqfact.onnx.save_qdq for a quantized network" if isinstance(node.op, FakeQuantize)
                      else "replace it, or remove it from the network")
            raise OnnxError(f"{self.path}: node '{node.name}': {type(node.op).__name__} has no ONNX counterpart here; {remedy}")
        writer(self, node, node.op)

    def _header(self) -> onnx.ModelProto:
        """The model without nodes: as in the file that the network came from, or a new one."""
        origins = [node.origin for node in self.graph.nodes if isinstance(node.origin, Origin) and node.origin.header]
        model = onnx.ModelProto.FromString(origins[0].header) if origins else onnx.ModelProto(ir_version=IR_VERSION)
        if not origins:
            model.opset_import.append(helper.make_opsetid("", OPSET))
            model.graph.name, model.producer_name = "network", "eqfact"
        model.ir_version = max(model.ir_version, IR_VERSION)
        for standard in model.opset_import:
            if standard.domain in ("", "ai.onnx"):
                standard.version = max(standard.version, OLDEST_WRITTEN)
        dims = [info.type.tensor_type.shape.dim for info in model.graph.input]
        batch = dims[0][0] if dims and dims[0] else None
        self.batch: int | str = "N" if batch is None else batch.dim_value if batch.HasField("dim_value") else batch.dim_param or "N"
        return model

    def _info(self, known: onnx.ValueInfoProto | None, name: str) -> onnx.ValueInfoProto:
        """Name, type and shape of an input or output; a batch of fixed size keeps it."""
        batch = self.batch
        if known is not None and known.type.tensor_type.shape.dim:
            first = known.type.tensor_type.shape.dim[0]
            batch = first.dim_value if first.HasField("dim_value") else first.dim_param or "N"
        info = helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(self.dtype), [batch, *self.graph.shapes[name]])
        if known is not None and known.doc_string:
            info.doc_string = known.doc_string
        return info

    def _dtype(self) -> np.dtype[Any]:
        """The network's type; one without weights has that of its file, or float32."""
        kinds = [info.type.tensor_type.elem_type for info in self.header.graph.input]
        return self.graph.dtype or np.dtype(helper.tensor_dtype_to_np_dtype(kinds[0]) if kinds else np.float32)

    # ------------------------------------------------------------------------------------------- what writers use

    def need_opset(self, version: int, node: Node) -> None:
        """Raise the opset, if an op is too new for it."""
        if self.standard.version < version:
            if any(isinstance(n.op, Opaque) for n in self.graph.nodes):
                raise OnnxError(f"{self.path}: node '{node.name}': {type(node.op).__name__} needs opset {version}, and a node kept "
                                f"as it is (opaque) needs its own, {self.standard.version}")
            self.standard.version = version
            self.header.ir_version = max(self.header.ir_version, helper.find_min_ir_version_for([self.standard], ignore_unknown=True))

    def fresh(self, name: str) -> str:
        """A name for a value or initializer that is not taken yet."""
        candidates = (name, *(f"{name}_{i}" for i in range(1, len(self.names) + 2)))
        found = next(c for c in candidates if c not in self.names)
        self.names.add(found)
        return found

    def node(self, kind: str, inputs: Sequence[str], output: str, of: Node, suffix: str = "", **attributes: Any) -> str:
        """An ONNX node; it has the name that it had in its file, else the name of its output."""
        origin = of.origin
        name = origin.node + (suffix if origin.node else "") if isinstance(origin, Origin) else of.name + suffix
        if name in self.node_names:
            name = next(c for i in range(1, len(self.node_names) + 2) if (c := f"{name}_{i}") not in self.node_names)
        if name:
            self.node_names.add(name)
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name, **attributes))
        return output

    def inner(self, node: Node, suffix: str) -> str:
        """A name for a value between the ONNX nodes of one eqfact node."""
        return self.fresh(f"{node.name}.{suffix}")

    def parameter(self, node: Node, name: str, value: AnyArray | float, shape: Sequence[int] | None = None, key: object = None) -> str:
        """An initializer in the network's type, under the name that it had in its file; equal arrays share one."""
        array = np.asarray(value)
        source = array if key is None else key
        with np.errstate(over="ignore"):  # a bound beyond the largest float leaves its side open
            written = np.ascontiguousarray(array.astype(self.dtype, copy=False).reshape(array.shape if shape is None else shape))
        return self.constant(written, self.named(node, name), source)

    def weight(self, node: Node, op: Weighted, arranged: Callable[[AnyArray], AnyArray]) -> str:
        """The weight of an op as ONNX has its axes; ``arranged`` moves them."""
        return self.parameter(node, "weight", arranged(op.weight), key=op.weight)

    def named(self, node: Node, name: str) -> str:
        """The name of a parameter in its file, or a new one."""
        origin = node.origin
        return origin.initializers.get(name) or f"{node.name}.{name}" if isinstance(origin, Origin) else f"{node.name}.{name}"

    def constant(self, array: AnyArray, name: str, source: object = None) -> str:
        """An initializer; ``source`` is the array that it was made of, so that sharing survives."""
        _, known = self.made_of.get(id(source), (None, ""))
        if source is not None and known and _same(self.initializers[known], array):
            return known
        if not (name in self.initializers and _same(self.initializers[name], array)):
            name = self.fresh(name)
            self.initializers[name] = array
        if source is not None:
            self.made_of[id(source)] = source, name
        return name

    def integers(self, node: Node, name: str, values: Sequence[int]) -> str:
        """An initializer of integers (shapes, axes, indices)."""
        return self.constant(np.array(values, np.int64), f"{node.name}.{name}")

    def spatial(self, node: Node) -> int:
        """How many spatial axes the node's input has."""
        return len(self.graph.shapes[node.inputs[0]]) - 1

    def kept(self, node: Node, op: Opaque) -> None:
        """An opaque node, once for all its outputs."""
        mates = [n for n in self.graph.nodes if isinstance(n.op, Opaque) and n.op.node == op.node and n.inputs == node.inputs]
        if node is not mates[0]:
            return
        proto = onnx.NodeProto.FromString(op.node)
        values = dict(zip(op.inputs, node.inputs, strict=True))
        for name, array in op.constants.items():
            values[name] = self.constant(array, name, array)
        proto.input[:] = [values.get(name, name) for name in proto.input]
        outputs = {n.op.output: n.name for n in mates if isinstance(n.op, Opaque)}
        proto.output[:] = [outputs[i] if i in outputs else name and self.fresh(name) for i, name in enumerate(proto.output)]
        self.nodes.append(proto)


def _same(a: AnyArray, b: AnyArray) -> bool:
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b))


# ------------------------------------------------------------------------------------------------- one function an op


def _plain(kind: str, **attributes: Callable[[Any], Any]) -> Callable[[Writer, Node, Any], None]:
    """A writer for ops that are one ONNX node without parameters."""
    def write(w: Writer, node: Node, op: Any) -> None:
        w.node(kind, node.inputs, node.name, node, **{name: of(op) for name, of in attributes.items()})
    return write


def _pads(padding: Padding, axes: int) -> list[int]:
    sides = per_side(padding, axes)
    return [s[0] for s in sides] + [s[1] for s in sides]


def dense(w: Writer, node: Node, op: Dense) -> None:
    as_was = isinstance(node.origin, Origin) and node.origin.transposed
    weight = w.weight(node, op, np.transpose if as_was else np.asarray)
    if as_was and op.bias is None:
        w.node("MatMul", [*node.inputs, weight], node.name, node)
        return
    bias = [] if op.bias is None else [w.parameter(node, "bias", op.bias)]
    w.node("Gemm", [*node.inputs, weight, *bias], node.name, node, transB=int(not as_was))


def conv(w: Writer, node: Node, op: Conv) -> None:
    inputs = [*node.inputs, w.weight(node, op, np.asarray), *([] if op.bias is None else [w.parameter(node, "bias", op.bias)])]
    w.node("Conv", inputs, node.name, node, **_geometry(op))


def _geometry(op: Conv | ConvTranspose) -> dict[str, Any]:
    axes = op.weight.ndim - 2
    return {"kernel_shape": op.weight.shape[2:], "strides": per_axis("stride", op.stride, axes), "pads": _pads(op.padding, axes),
            "dilations": per_axis("dilation", op.dilation, axes), "group": op.groups}


def conv_transpose(w: Writer, node: Node, op: ConvTranspose) -> None:
    out, inner, *kernel = op.weight.shape

    def columns(weight: AnyArray) -> AnyArray:
        return weight.reshape(op.groups, out // op.groups, inner, *kernel).swapaxes(1, 2).reshape(op.groups * inner, -1, *kernel)
    inputs = [*node.inputs, w.weight(node, op, columns)]
    inputs += [] if op.bias is None else [w.parameter(node, "bias", op.bias)]
    w.node("ConvTranspose", inputs, node.name, node, **_geometry(op),
           output_padding=per_axis("output_padding", op.output_padding, len(kernel)))


def batch_norm(w: Writer, node: Node, op: BatchNorm) -> None:
    """As Add or Mul with a constant where it is no more than that."""
    shape = (-1, *(1 for _ in range(w.spatial(node))))
    centred = not op.mean.any() and (op.var == 1).all() and op.eps == 0
    if centred and (op.gamma == 1).all():
        w.node("Add", [*node.inputs, w.parameter(node, "beta", op.beta, shape)], node.name, node)
    elif centred and not op.beta.any():
        w.node("Mul", [*node.inputs, w.parameter(node, "gamma", op.gamma, shape)], node.name, node)
    else:
        parameters = [w.parameter(node, name, getattr(op, name)) for name in ("gamma", "beta", "mean", "var")]
        w.node("BatchNormalization", [*node.inputs, *parameters], node.name, node, epsilon=op.eps)


def prelu(w: Writer, node: Node, op: PReLU) -> None:
    shape = (op.slope.size, *(1 for _ in range(w.spatial(node))))
    w.node("PRelu", [*node.inputs, w.parameter(node, "slope", op.slope, shape)], node.name, node)


def clip(w: Writer, node: Node, op: Clip) -> None:
    """Clip with one bound for all channels; Max and Min with a broadcast bound for one a channel."""
    bounds = {name: bound for name, bound in (("low", op.low), ("high", op.high)) if not np.all(np.isinf(bound))}
    if all(np.size(b) == 1 for b in bounds.values()):
        names = {name: w.parameter(node, name, bound, ()) for name, bound in bounds.items()}
        inputs = [*node.inputs, names.get("low", ""), names.get("high", "")]
        w.node("Clip" if names else "Identity", inputs[:max(i for i, name in enumerate(inputs) if name) + 1], node.name, node)
        return
    (value,) = node.inputs
    for i, (name, bound) in enumerate(bounds.items()):
        last = i == len(bounds) - 1
        limit = w.parameter(node, name, bound, (np.size(bound), *(1 for _ in range(w.spatial(node)))))
        value = w.node("Max" if name == "low" else "Min", [value, limit], node.name if last else w.inner(node, name), node,
                       suffix="" if last else f".{name}")


def pool(w: Writer, node: Node, op: MaxPool | AvgPool) -> None:
    axes = w.spatial(node)
    kernel = per_axis("kernel", op.kernel, axes)
    counted: dict[str, Any] = {"count_include_pad": int(op.count_include_pad)} if isinstance(op, AvgPool) else {}
    w.node("AveragePool" if isinstance(op, AvgPool) else "MaxPool", node.inputs, node.name, node, kernel_shape=kernel,
           strides=kernel if op.stride is None else per_axis("stride", op.stride, axes), pads=_pads(op.padding, axes), **counted)


def pad(w: Writer, node: Node, op: Pad) -> None:
    axes = w.spatial(node)
    pads = _pads(op.padding, axes)
    sides = w.integers(node, "pads", [0, 0, *pads[:axes], 0, 0, *pads[axes:]])
    w.node("Pad", [*node.inputs, sides, w.parameter(node, "value", op.value, ())], node.name, node, mode="constant")


def upsample(w: Writer, node: Node, op: Upsample) -> None:
    scales = w.constant(np.array([1, 1, *per_axis("factor", op.factor, w.spatial(node))], np.float32), f"{node.name}.scales")
    w.node("Resize", [*node.inputs, "", scales], node.name, node, mode="nearest", coordinate_transformation_mode="asymmetric",
           nearest_mode="floor")


def add(w: Writer, node: Node, op: Add) -> None:
    w.node("Add" if len(node.inputs) == 2 else "Sum", node.inputs, node.name, node)


def mul(w: Writer, node: Node, op: Mul) -> None:
    value = node.inputs[0]
    for i, other in enumerate(node.inputs[1:], 2):
        last = i == len(node.inputs)
        value = w.node("Mul", [value, other], node.name if last else w.inner(node, "product"), node, suffix="" if last else f".{i}")


def unflatten(w: Writer, node: Node, op: Unflatten) -> None:
    w.node("Reshape", [*node.inputs, w.integers(node, "shape", [0, *op.shape])], node.name, node)


def transpose(w: Writer, node: Node, op: Transpose) -> None:
    w.node("Transpose", node.inputs, node.name, node, perm=[0, *(a + 1 for a in op.axes)])


def slice_(w: Writer, node: Node, op: Slice) -> None:
    start, stop, _ = slice(op.start, op.stop).indices(w.graph.shapes[node.inputs[0]][0])
    bounds = [w.integers(node, name, [value]) for name, value in (("start", start), ("stop", stop), ("axes", 1))]
    w.node("Slice", [*node.inputs, *bounds], node.name, node)


def permute(w: Writer, node: Node, op: Permute) -> None:
    w.node("Gather", [*node.inputs, w.integers(node, "order", op.order)], node.name, node, axis=1)


def silu(w: Writer, node: Node, op: SiLU) -> None:
    gate = w.node("Sigmoid", node.inputs, w.inner(node, "sigmoid"), node, suffix=".sigmoid")
    w.node("Mul", [*node.inputs, gate], node.name, node)


def hard_swish(w: Writer, node: Node, op: HardSwish) -> None:
    if w.standard.version >= 14:
        w.node("HardSwish", node.inputs, node.name, node)
        return
    gate = w.node("HardSigmoid", node.inputs, w.inner(node, "gate"), node, suffix=".gate", alpha=1 / 6, beta=0.5)
    w.node("Mul", [*node.inputs, gate], node.name, node)


def gelu(w: Writer, node: Node, op: GELU) -> None:
    w.need_opset(20, node)
    w.node("Gelu", node.inputs, node.name, node, approximate="tanh" if op.approximate else "none")


WRITERS: dict[type[Op], Callable[[Writer, Node, Any], None]] = {
    Dense: dense, Conv: conv, ConvTranspose: conv_transpose, BatchNorm: batch_norm,
    Identity: _plain("Identity"), ReLU: _plain("Relu"), LeakyReLU: _plain("LeakyRelu", alpha=lambda op: op.slope), PReLU: prelu, Clip: clip,
    MaxPool: pool, AvgPool: pool, GlobalAvgPool: _plain("GlobalAveragePool"), Pad: pad, Upsample: upsample,
    Add: add, Concat: _plain("Concat", axis=lambda op: 1), Flatten: _plain("Flatten", axis=lambda op: 1), Unflatten: unflatten,
    Transpose: transpose, Slice: slice_, Permute: permute,
    Sigmoid: _plain("Sigmoid"), HardSigmoid: _plain("HardSigmoid", alpha=lambda op: op.alpha, beta=lambda op: op.beta),
    Tanh: _plain("Tanh"), SiLU: silu, HardSwish: hard_swish, Erf: _plain("Erf"), GELU: gelu,
    Softmax: _plain("Softmax", axis=lambda op: op.axis), Mul: mul, Opaque: Writer.kept,
}
