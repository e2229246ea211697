"""What does a network remember of the ONNX file that it came from?

Values keep their names, because an eqfact node is named after the value that it makes. What else people see when they compare
files is kept in ``Node.origin``: the names of nodes and initializers, the layout of a weight, and the file itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from eqfact.graph import Graph
from eqfact.onnx.views import View


class OnnxError(ValueError):
    """A file that cannot be read or written; the message starts with its path."""


class UnsupportedNode(OnnxError):
    """A node that has no counterpart in eqfact; :func:`eqfact.onnx.open` keeps it as it is."""


@contextlib.contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Within it, whatever a file has wrong is an :class:`OnnxError` that starts with its path; so is what the disk has wrong behind it.

    That there is no such file, or that it must not be read, stays an :class:`OSError`.
    """
    try:
        yield
    except OnnxError:
        raise
    except (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and str(error.filename) == str(path):
            raise
        what = f"{type(error).__name__}: " if isinstance(error, LookupError | AttributeError) else ""
        raise OnnxError(f"{path}: {what}{' '.join(str(error).split())[:1000]}") from error


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor known without running the network; ``values`` holds it for each assumed size of the batch."""

    name: str
    values: tuple[npt.NDArray[Any], ...]


@dataclass(frozen=True, eq=False)
class Foreign:
    """A tensor that is no eqfact value (yet): an input of the file or what a kept node makes. ``reason`` says why."""

    name: str
    reason: str


Tensor = View | Constant | Foreign


@dataclass(eq=False)
class Source:
    """A file as it was read: its model without initializers, these by name, and what became of its tensors."""

    model: onnx.ModelProto
    initializers: dict[str, npt.NDArray[Any]]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    #: The graph that was read.
    read: Graph | None = None
    #: The tensors that the file itself can show; those of an If that was resolved are not among them.
    shown: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        graph = self.model.graph
        self.shown = frozenset((*(str(i.name) for i in graph.input), *(str(name) for node in graph.node for name in node.output if name)))

    @property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """The inputs of the file that are no weights."""
        return [info for info in self.model.graph.input if info.name not in self.initializers]

    def without_weights(self, model: onnx.ModelProto) -> None:
        """Of the weights that a file lists among its inputs, as old ones do, those stay there that a model written into it still has."""
        there = {tensor.name for tensor in model.graph.initializer}
        inputs = [info for info in model.graph.input if info.name not in self.initializers or info.name in there]
        del model.graph.input[:]
        model.graph.input.extend(inputs)

    @property
    def header(self) -> onnx.ModelProto:
        """The file without nodes and weights: opset, producer, inputs, outputs, metadata."""
        model = self.model
        header = onnx.ModelProto(ir_version=model.ir_version, producer_name=model.producer_name, producer_version=model.producer_version,
                                 domain=model.domain, model_version=model.model_version, doc_string=model.doc_string)
        header.opset_import.extend(model.opset_import)
        header.metadata_props.extend(model.metadata_props)
        header.graph.name, header.graph.doc_string = model.graph.name, model.graph.doc_string
        header.graph.input.extend(self.inputs)
        header.graph.output.extend(model.graph.output)
        return header

    def dtype(self) -> np.dtype[Any]:
        """The floating type of most weights, or of the inputs if there are none; float32 if nothing is floating.

        Weights that are stored in another type are of the one that they are cast to.
        """
        entries: dict[np.dtype[Any], int] = {}
        cast = {str(node.input[0]): node.attribute[0].i for node in self.model.graph.node if node.op_type == "Cast" and node.attribute}
        for name, array in self.initializers.items():
            dtype = np.dtype(FLOATS.get(cast.get(name, 0), array.dtype))
            entries[dtype] = entries.get(dtype, 0) + array.size
        for info in self.model.graph.input:
            kind = info.type.tensor_type.elem_type
            if kind in FLOATS:
                entries.setdefault(np.dtype(FLOATS[kind]), 0)
        found = [dtype for dtype in entries if dtype in FLOATS.values()]
        return max(found, key=entries.__getitem__, default=np.dtype(np.float32))


#: The floating types that networks are computed in.
FLOATS: dict[int, np.dtype[Any]] = {
    int(onnx.TensorProto.FLOAT): np.dtype(np.float32), int(onnx.TensorProto.DOUBLE): np.dtype(np.float64),
    int(onnx.TensorProto.FLOAT16): np.dtype(np.float16)}


def sizes(info: onnx.ValueInfoProto) -> list[int | None]:
    """The sizes of a tensor as a file states them; None where it leaves one open, as some exporters do by 0 or -1."""
    return [int(d.dim_value) if d.HasField("dim_value") and d.dim_value > 0 else None for d in info.type.tensor_type.shape.dim]


@dataclass(frozen=True)
class Origin:
    """What a node was called in its file: the ONNX node's name, and the initializers' by the op's parameter names.

    >>> eq.onnx.save("net.onnx", Graph.chain((2,), fc=Dense([[3.0, 1.0]])))
    >>> eq.onnx.load("net.onnx")["fc"].origin.initializers
    {'weight': 'fc.weight'}
    """

    node: str
    initializers: Mapping[str, str] = field(default_factory=dict)
    source: Source | None = field(default=None, repr=False)
    #: The ONNX tensors that the ONNX node reads, constants apart, and the one that it makes; none for a node that stands in no file.
    reads: tuple[str, ...] = ()
    makes: str = ""
    #: Where its parameters stand in the file: the tensor that a node makes, and which of that node's inputs it is.
    places: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    #: What the nodes make that are the op together; a factor or shift behind it that went into its parameters is none of them.
    span: tuple[str, ...] = ()


def source_of(graph: Graph) -> Source | None:
    """The one file that nodes of a graph were read from; None if there is none, or several."""
    sources = {id(node.origin.source): node.origin.source for node in graph.nodes if isinstance(node.origin, Origin)}
    return sources.popitem()[1] if len(sources) == 1 else None
