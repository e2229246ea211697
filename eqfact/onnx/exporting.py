"""What does the writer of an op need? The ONNX nodes and initializers so far, names that are taken, and what the file was called before.

How a node is written stands in :mod:`eqfact.onnx.writers`, on which tensors in :mod:`eqfact.onnx.patching`. The file computes what
``eqfact.forward`` computes, in the network's own floating type, under the names that an imported network brought along. It is checked by
onnx, with shapes, before anything is written, and it appears whole or not at all.
"""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from eqfact.graph import Graph, Node, fresh_name
from eqfact.onnx.call import AnyArray
from eqfact.onnx.origin import OnnxError, Origin
from eqfact.onnx.reading import LARGEST, OLDEST_WRITTEN, check_model
from eqfact.ops import Extend, Shape, Weighted

Path_ = str | os.PathLike[str]

#: Opset that is written for a network that no file was the origin of.
OPSET = 17
#: IR version that goes with these; before 4, initializers had to be inputs too.
IR_VERSION = 8


def write_model(path: Path_, model: onnx.ModelProto, *, full: bool = True) -> None:
    """Check a model, its shapes too if it is ours in full, and write its file, whole or not at all."""
    path = Path(path)
    if model.ByteSize() > LARGEST:
        raise OnnxError(f"{path}: the network has {model.ByteSize() / 2**30:.1f} GiB; an ONNX file without external data holds 2 GiB")
    try:
        check_model(model, full=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise OnnxError(f"{path}: this network makes no valid ONNX file: {' '.join(str(error).split())[:500]}") from error
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


class Writer(ABC):
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

    @abstractmethod
    def write(self, node: Node) -> None:
        """The ONNX nodes of one eqfact node."""

    def _header(self) -> onnx.ModelProto:
        """The model without nodes: as in the file that the network came from, or a new one."""
        sources = [node.origin.source for node in self.graph.nodes if isinstance(node.origin, Origin) and node.origin.source is not None]
        model = sources[0].header if sources else onnx.ModelProto()
        if not sources:
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
            self.standard.version = version
            self.header.ir_version = max(self.header.ir_version, helper.find_min_ir_version_for([self.standard], ignore_unknown=True))

    def fresh(self, name: str) -> str:
        """A name for a value or initializer that is not taken yet."""
        found = fresh_name(name, self.names)
        self.names.add(found)
        return found

    def fresh_node(self, name: str) -> str:
        """The same for the name of an ONNX node, of which the empty one may be given to several."""
        found = fresh_name(name, self.node_names) if name else name
        self.node_names.add(found)
        return found

    def node(self, kind: str, inputs: Sequence[str], output: str, of: Node, suffix: str = "", **attributes: Any) -> str:
        """An ONNX node; it has the name that it had in its file, else the name of its output."""
        origin = of.origin
        name = origin.node + (suffix if origin.node else "") if isinstance(origin, Origin) else of.name + suffix
        self.nodes.append(helper.make_node(kind, inputs, [output], name=self.fresh_node(name), **attributes))
        return output

    def moved(self, node: Node, value: str, i: int, suffix: str) -> str:
        """A value between the ONNX nodes of one eqfact node that has the entries of the node's input ``i``, as the next one reads it."""
        return value

    def inner(self, node: Node, suffix: str) -> str:
        """A name for a value between the ONNX nodes of one eqfact node."""
        return self.fresh(f"{node.name}.{suffix}")

    def parameter(self, node: Node, name: str, value: AnyArray | float, shape: Sequence[int] | None = None, key: object = None) -> str:
        """An initializer in the network's type, under the name that it had in its file; equal arrays share one."""
        array = np.asarray(value)
        source = array if key is None else key
        with np.errstate(over="ignore"):  # a bound beyond the largest float leaves its side open
            written = np.asarray(array.astype(self.dtype, copy=False).reshape(array.shape if shape is None else shape), order="C")
        return self.constant(written, self.named(node, name), source)

    def vector(self, node: Node, name: str, value: AnyArray) -> str:
        """A parameter with one entry a channel, or one for all, as it broadcasts against the node's tensor."""
        return self.parameter(node, name, value, (value.size, *(1 for _ in range(self.spatial(node)))))

    def over_space(self, node: Node, name: str, value: AnyArray) -> str:
        """A parameter ``(C or 1, *spatial or 1)``, as it broadcasts against the node's tensor."""
        return self.parameter(node, name, value)

    def beside(self, node: Node, op: Extend) -> tuple[AnyArray, int]:
        """The constant of an op as a tensor of one sample beside the node's tensor, batch first, and the axis that it extends."""
        return op.constant[None], op.axis + 1

    def samples(self, node: Node) -> int | None:
        """The size of the batch of the node's tensor; None if it is not known."""
        return self.batch if isinstance(self.batch, int) else None

    def channels_second(self, node: Node) -> bool:
        """Whether the channels of the node's tensor stand where ONNX's layers want them, behind the batch."""
        return True

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

    def space(self, node: Node) -> Shape:
        """The sizes of the spatial axes that the node's input has."""
        return self.graph.shapes[node.inputs[0]][1:]

    def spatial(self, node: Node) -> int:
        """How many spatial axes the node's input has."""
        return len(self.space(node))


def _same(a: AnyArray, b: AnyArray) -> bool:
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b))
