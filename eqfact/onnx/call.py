"""What does the reader of an ONNX node see? The node's attributes and tensors, and ways to make ops of them.

An ONNX tensor is a :class:`Constant` or a :class:`~eqfact.onnx.views.View` of an eqfact value. Every refusal is raised here or
below with the plain reason; the importer adds path, node and op type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt
import onnx

from eqfact.graph import Node
from eqfact.onnx.origin import Origin, UnsupportedNode
from eqfact.onnx.views import View
from eqfact.ops import Op, Weighted

if TYPE_CHECKING:
    from eqfact.onnx.importing import Importer

AnyArray = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor known without running the network; ``values`` holds it for each assumed size of the batch."""

    name: str
    values: tuple[AnyArray, ...]


Tensor = View | Constant


class Call:
    """One node of the file, with its attributes and the tensors that it reads: what a reader function sees."""

    def __init__(self, importer: Importer, node: onnx.NodeProto) -> None:
        self.importer, self.node = importer, node
        self.attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        self.inputs = [importer.tensors[name] if name else None for name in node.input]
        self.opset = importer.opset

    @property
    def output(self) -> str:
        """Name of the first output."""
        return str(self.node.output[0])

    def refuse(self, reason: str) -> NoReturn:
        """This node has no counterpart, for this reason."""
        raise UnsupportedNode(reason)

    # ------------------------------------------------------------------------------------------- what it says

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        return int(self.attributes.get(name, default))

    def number(self, name: str, default: float) -> float:
        """A floating attribute."""
        return float(self.attributes.get(name, default))

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else str(value)

    def integers(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        """A list of integers as attribute."""
        if name not in self.attributes and default is None:
            raise ValueError(f"it lacks the attribute {name}")
        return [int(v) for v in self.attributes.get(name, default or ())]

    # ------------------------------------------------------------------------------------------- what it reads

    def has(self, i: int) -> bool:
        """Whether the optional input ``i`` is there."""
        return i < len(self.inputs) and self.inputs[i] is not None

    def view(self, i: int = 0) -> View:
        """Input ``i``, which must be a value of the network."""
        tensor = self.inputs[i] if i < len(self.inputs) else None
        if not isinstance(tensor, View):
            self.refuse(f"its input {i} is a constant, where a value of the network is read")
        return tensor

    def views(self) -> list[View]:
        """All inputs, which must be values of the network."""
        return [self.view(i) for i in range(len(self.inputs))]

    def constant(self, i: int) -> AnyArray:
        """Input ``i``, which must be known without running the network."""
        tensor = self.inputs[i] if i < len(self.inputs) else None
        if not isinstance(tensor, Constant):
            self.refuse(f"its input {i} ('{self.node.input[i] if i < len(self.node.input) else ''}') is computed by the network, "
                        "where a constant is needed")
        if any(not np.array_equal(tensor.values[0], other) for other in tensor.values[1:]):
            self.refuse(f"its input {i} ('{self.node.input[i]}') depends on the size of the batch")
        return tensor.values[0]

    def parameter(self, i: int) -> AnyArray:
        """Input ``i``, a constant of finite floating numbers."""
        value, name = self.constant(i), self.node.input[i]
        if value.dtype not in (np.float16, np.float32, np.float64):
            raise self.importer.error(self.node, f"initializer '{name}' holds {value.dtype}; weights must be floats: "
                                                 "export the float network")
        if not np.isfinite(value).all():
            where = tuple(int(k) for k in np.argwhere(~np.isfinite(value))[0])
            raise self.importer.error(self.node, f"initializer '{name}' holds {value[where]} at index {where}; weights must be finite")
        return value

    def given(self, **inputs: int) -> dict[str, int]:
        """Those of these inputs, by parameter name, that are there."""
        return {name: i for name, i in inputs.items() if self.has(i)}

    def listed(self, name: str, i: int, default: Sequence[int] | None = None) -> list[int] | None:
        """Integers that were an attribute in old opsets and are input ``i`` in new ones."""
        if self.has(i):
            return [int(v) for v in self.constant(i).reshape(-1)]
        return self.integers(name) if name in self.attributes else (None if default is None else list(default))

    # ------------------------------------------------------------------------------------------- what it makes

    def emit(self, op: Op, *values: str, names: Mapping[str, int] | None = None, transposed: bool = False, suffix: str = "") -> View:
        """A node with ``op`` on eqfact values, named after the first output; ``names`` says which inputs are its parameters."""
        initializers = {name: str(self.node.input[i]) for name, i in (names or {}).items()}
        origin = Origin(str(self.node.name), initializers, transposed, self.importer.header)
        if isinstance(op, Weighted):
            op = self.importer.shared(op, (self.node.op_type, *(id(t) for t in self.inputs if isinstance(t, Constant)),
                                           *(a.SerializeToString() for a in self.node.attribute)))
        return self.importer.add(f"{self.output}{suffix}", op, values, origin)

    def value(self, tensor: View) -> str:
        """The eqfact value that is this tensor, batch and channels first; what its moves leave over becomes nodes."""
        return self.importer.written(tensor, self.output)

    def entrywise(self, op: Op, *views: View, names: Mapping[str, int] | None = None) -> View:
        """An op that does not care where the channels stand: on the values themselves, if all tensors have the same layout."""
        views = views or (self.view(),)
        layouts = {v.layout() for v in views}
        if len(layouts) > 1 or None in layouts:
            return self.emit(op, *(self.value(v) for v in views), names=names)
        made = self.emit(op, *(v.value for v in views), names=names)
        (axes,) = layouts
        assert axes is not None
        return made.transpose((0, *(a + 1 for a in axes)))

    def channelwise(self, view: View, constants: Mapping[str, AnyArray], make: type[Op] | Any, names: Mapping[str, int]) -> View:
        """An op whose parameters are constants that broadcast against a tensor: one entry a channel if they allow it, else one an entry."""
        if view.batch:
            self.refuse(f"the batch stands at axis {view.batch} of its input")
        spread = {}
        for name, value in constants.items():
            if value.ndim == view.ndim and value.shape[0] != 1:
                self.refuse(f"its constant of shape {value.shape} differs between samples")
            value = value.reshape(value.shape[1:]) if value.ndim == view.ndim else value
            try:
                spread[name] = np.broadcast_to(value, view.sample)
            except ValueError:
                self.refuse(f"its constant of shape {constants[name].shape} does not broadcast against samples of shape {view.sample}")
        axes = view.layout()
        if axes is not None:
            own = {name: value.transpose(np.argsort(axes)).reshape(view.shape[0], -1) for name, value in spread.items()}
            if all((value == value[:, :1]).all() for value in own.values()):
                vectors = {name: np.ascontiguousarray(value[:, 0]) for name, value in own.items()}
                return self.entrywise(make(**vectors), view, names=names)
        flat = view.moved(view.positions.reshape(-1))
        vectors = {name: np.ascontiguousarray(value).reshape(-1) for name, value in spread.items()}
        made = self.emit(make(**vectors), self.value(flat), names=names, suffix=".flat")
        return made.moved(made.positions.reshape(view.sample))

    def absorbed(self, i: int, kind: type[Op]) -> Node | None:
        """The node that makes input ``i``, taken out of the graph again, if it is of this kind and nothing else reads it."""
        view = self.view(i)
        return self.importer.taken(view.value, kind) if view.index is None and view.value == self.node.input[i] else None


#: What the table of op types holds: a function that makes the tensors of a node.
Reader = Callable[[Call], Tensor | Sequence[Tensor]]
