"""What does the reader of an ONNX node see? The node's attributes and tensors, and ways to make ops of them.

An ONNX tensor is a :class:`Constant` or a :class:`~eqfact.onnx.views.View` of an eqfact value. Every refusal is raised here or
below with the plain reason; the importer adds path, node and op type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt
import onnx

from eqfact.graph import Node
from eqfact.onnx.building import Building
from eqfact.onnx.origin import FLOATS, Constant, Foreign, Origin, Tensor, UnsupportedNode
from eqfact.onnx.views import BATCH, Axis, View
from eqfact.ops import Op, Shape, Weighted

AnyArray = npt.NDArray[Any]


class Standing(NamedTuple):
    """A tensor as a value, where its axes stand in ``(C, *spatial)``, and the way back for what is made of it."""

    value: str
    axes: dict[int, int]
    back: Callable[[View], View]


class Call:
    """One node of the file, or several that are one, with its attributes and the tensors that it reads: what a reader function sees.

    ``places`` says where in the file the inputs stand, and ``span`` what the nodes make, if these are several.
    """

    def __init__(self, building: Building, node: onnx.NodeProto, opset: int, places: Sequence[tuple[str, int]] | None = None,
                 span: tuple[str, ...] = ()) -> None:
        self.building, self.node, self.opset = building, node, opset
        self.places = [(self.output, i) for i in range(len(node.input))] if places is None else places
        self.span = span or (self.output,)
        self.attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        self.inputs = [building.tensors.get(name) for name in node.input]

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
        return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

    def integers(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        """A list of integers as attribute."""
        if name not in self.attributes and default is None:
            raise ValueError(f"it lacks the attribute {name}")
        return [int(v) for v in self.attributes.get(name, default or ())]

    # ------------------------------------------------------------------------------------------- what it reads

    def has(self, i: int) -> bool:
        """Whether the optional input ``i`` is there."""
        return i < len(self.inputs) and self.inputs[i] is not None

    def known(self, i: int) -> Constant | None:
        """Input ``i``, if it is known without running the network."""
        tensor = self.inputs[i] if self.has(i) else None
        return tensor if isinstance(tensor, Constant) else None

    def view(self, i: int = 0) -> View:
        """Input ``i``, which must be a value of the network."""
        tensor = self.inputs[i] if self.has(i) else None
        if isinstance(tensor, Foreign):
            return self.building.view(tensor.name)
        if not isinstance(tensor, View):
            self.refuse(f"its input {i} is {'a constant' if tensor else 'missing'}, where a value of the network is read")
        return tensor

    def views(self) -> list[View]:
        """All inputs, which must be values of the network."""
        return [self.view(i) for i in range(len(self.inputs))]

    def full_shapes(self, i: int = 0) -> Sequence[Shape]:
        """The shape of input ``i``, be it a tensor from outside of whatever type, with each assumed size of the batch."""
        if not self.has(i):
            self.refuse(f"its input {i} is missing")
        return self.building.full_shapes(str(self.node.input[i]))

    def constants(self, i: int) -> tuple[AnyArray, ...]:
        """Input ``i`` for each assumed size of the batch; it must be known without running the network."""
        tensor = self.known(i)
        if tensor is None:
            self.refuse(f"its input {i} ('{self.node.input[i] if i < len(self.node.input) else ''}') is computed by the network, "
                        "where a constant is needed")
        batches = self.building.batches
        return tensor.values * len(batches) if len(tensor.values) == 1 else tensor.values

    def constant(self, i: int, *, repeats: bool = False) -> AnyArray:
        """Input ``i``, which must be known without running the network, and not depend on the batch; if it ``repeats``, what it holds for
        every sample is given once, on an axis of size 1."""
        first, *others = self.constants(i)
        if repeats and others and (axis := _repeated(first, others[0])) is not None:
            return first.take([0], axis)
        if any(first is not other and not np.array_equal(first, other) for other in others):
            self.refuse(f"its input {i} ('{self.node.input[i]}') depends on the size of the batch")
        return first

    def parameter(self, i: int, *, cast: bool = False, finite: bool = True, repeats: bool = False) -> AnyArray:
        """Input ``i``, a constant of (``finite``) floating numbers in the network's type; ``cast`` to it if need be."""
        value, name = self.constant(i, repeats=repeats), self.node.input[i]
        if value.dtype not in FLOATS.values():
            self.refuse(f"initializer '{name}' holds {value.dtype}; weights must be floats: export the float network")
        if finite and not np.isfinite(value).all():
            where = tuple(int(k) for k in np.argwhere(~np.isfinite(value))[0])
            raise ValueError(f"initializer '{name}' holds {value[where]} at index {where}; weights must be finite")
        if cast and value.dtype != self.building.dtype:
            with np.errstate(over="ignore"):
                value = value.astype(self.building.dtype)
            if not np.isfinite(value).all():
                self.refuse(f"initializer '{name}' does not fit into {self.building.dtype}, in which the network is computed")
        if value.dtype != self.building.dtype:
            self.refuse(f"initializer '{name}' holds {value.dtype}; a network is computed in one type here, {self.building.dtype}")
        return value

    def operand(self, i: int, *, finite: bool = True) -> AnyArray:
        """The same of a constant that is broadcast against a value: what it holds for every sample is given once."""
        return self.parameter(i, finite=finite, repeats=True)

    def given(self, **inputs: int) -> dict[str, int]:
        """Those of these inputs, by parameter name, that are there."""
        return {name: i for name, i in inputs.items() if self.has(i)}

    def listed(self, name: str, i: int, default: Sequence[int] | None = None) -> list[int] | None:
        """Integers that were an attribute in old opsets and are input ``i`` in new ones."""
        if self.has(i):
            return [int(v) for v in self.constant(i).reshape(-1)]
        return self.integers(name) if name in self.attributes else (None if default is None else list(default))

    # ------------------------------------------------------------------------------------------- what it makes

    def origin(self, names: Mapping[str, int] | None = None) -> Origin:
        """What an op that this node becomes remembers of it; ``names`` says which inputs are its parameters."""
        initializers = {name: str(self.node.input[i]) for name, i in (names or {}).items()}
        reads = tuple(str(name) for name, tensor in zip(self.node.input, self.inputs, strict=True)
                      if tensor is not None and not isinstance(tensor, Constant))
        places = {name: self.places[i] for name, i in (names or {}).items()}
        return Origin(str(self.node.name), initializers, self.building.source, reads, self.output, places, self.span)

    def emit(self, op: Op, *values: str, names: Mapping[str, int] | None = None, suffix: str = "") -> View:
        """A node with ``op`` on eqfact values, named after the first output; ``names`` says which inputs are its parameters."""
        constants = tuple(id(t) for t in self.inputs if isinstance(t, Constant))
        if isinstance(op, Weighted) and constants and not {"eps"}.issuperset(names or ()):
            op = self.building.shared(op, (self.node.op_type, *constants))
        return self.building.add(f"{self.output}{suffix}", op, values, self.origin(names))

    def value(self, tensor: View) -> str:
        """The eqfact value that is this tensor, batch and channels first; what its moves leave over becomes nodes."""
        return self.building.written(tensor, self.output)

    def by_channel(self, view: View, axis: int) -> tuple[str, Callable[[View], View]]:
        """The value whose channels are one axis of a tensor, all others but the batch being space; and the way back for what is made of it.

        That may have other channels, and the same space or all of its sizes 1.
        """
        axis = view.axis(axis)
        view.size(axis)
        others = self._beside(view, axis)
        space: list[Axis] = []
        for i in others:
            if BATCH in view.axes[i][1:-1]:
                self.refuse("its samples lie between entries of one axis")
            space.append(tuple(a for a in view.axes[i] if not a.is_batch))
        value = self.value(view.with_axes(() if view.batch is None else (BATCH,), view.axes[axis], *space))

        def back(made: View) -> View:
            axes: dict[int, Axis] = {axis: made.axes[1]}
            for i, run in zip(others, made.axes[2:], strict=True):
                old = view.axes[i]
                axes[i] = (*(old[:1] if BATCH in old[:1] else ()), *run, *(old[-1:] if BATCH in old[1:] else ()))
            return made.with_axes(*(axes.get(i, () if view.axes[i] != (BATCH,) else (BATCH,)) for i in range(view.ndim)))
        return value, back

    @staticmethod
    def _beside(view: View, channel: int) -> list[int]:
        """The axes of a tensor that are space if ``channel`` is its channels: all others but the batch, or what stands for one sample."""
        first = int(view.batch is None and not view.axes[0] and channel > 0)
        return [i for i in range(first, view.ndim) if i != channel and view.axes[i] != (BATCH,)]

    def standing(self, view: View, channel: int, *, as_is: bool = True) -> Standing:
        """A tensor as a value whose channels are its axis ``channel``: the value itself, if they are that, else what is moved there."""
        layout = view.layout() if as_is else None
        if layout is not None and layout[0] == channel:
            order = [int(i) for i in np.argsort([0, *layout])]
            return Standing(view.value, {axis: i for i, axis in enumerate(layout)}, lambda made: made.transpose(order))
        value, back = self.by_channel(view, channel)
        return Standing(value, {channel: 0, **{axis: i for i, axis in enumerate(self._beside(view, channel), 1)}}, back)

    def apart(self, view: View, axes: Collection[int]) -> Standing:
        """The same for an op along some axes, of which none may be the channels; where no other axis is left, all is one channel."""
        channel = view.home
        if channel is None or channel in axes:
            channel = next((a for a in range(view.ndim) if a not in axes and a != view.batch and view.axes[a]), None)
        if channel is not None:
            return self.standing(view, channel)
        value, places, back = self.standing(view.with_axes(*view.axes, ()), view.ndim)
        del places[view.ndim]

        def without(made: View) -> View:
            whole = back(made)
            return whole.with_axes(*whole.axes[:-1])
        return Standing(value, places, without)

    def entrywise(self, op: Op, *views: View, names: Mapping[str, int] | None = None) -> View:
        """An op that does not care where the channels stand: on the values themselves, if one arrangement fits all tensors."""
        views = views or (self.view(),)
        batches = self.building.batches
        shapes = [v.full_shape(batches[0]) for v in views]
        try:
            shape = tuple(np.broadcast_shapes(*shapes))
        except ValueError:
            raise ValueError(f"it joins tensors of shapes {' and '.join(v.described() for v in views)}, which do not broadcast") from None
        whole = [v for v, s in zip(views, shapes, strict=True) if s == shape]
        for model in sorted(dict.fromkeys(whole), key=lambda v: -sum(v.axes == w.axes and v.shape == w.shape for w in whole)):
            try:
                alike = [v.like(model, batches) for v in views]
                made = self.emit(op, *(self.value(v) for v in alike), names=names)
            except (ValueError, LookupError):
                continue
            if made.shape == model.shape:
                return model.of(made.value)
            del self.building.nodes[made.value]
        ndim = len(shape)
        aligned = [v.with_axes(*((),) * (ndim - v.ndim), *v.axes) for v in views]
        return self.emit(op, *(self.value(v) for v in aligned), names=names)

    def constants_on(self, view: View, constants: Mapping[str, AnyArray]) -> dict[str, AnyArray]:
        """Constants that broadcast against a tensor, as they stand against its value: ``(C or 1, *spatial or 1)``."""
        found = {}
        for name, value in constants.items():
            full = value.reshape((1,) * (view.ndim - value.ndim) + value.shape)
            for i, axis in enumerate(view.axes[:full.ndim]):
                if full.shape[i] != 1 and BATCH in axis:
                    if axis != (BATCH,) or full.shape[i] != self.building.samples or (full != (once := full.take([0], i))).any():
                        self.refuse(f"its constant of shape {value.shape} differs between samples")
                    full = once
            shape = full.shape
            if value.ndim > view.ndim or any(n not in (1, math.prod(a.size for a in axis))
                                             for n, axis in zip(shape, view.axes, strict=True) if BATCH not in axis):
                self.refuse(f"its constant of shape {value.shape} does not broadcast against samples of shape {view.described()}")
            atoms = [a for axis in view.axes for a in axis if not a.is_batch]
            spread = full.reshape([1 if n == 1 else a.size for n, axis in zip(shape, view.axes, strict=True)
                                    for a in axis if not a.is_batch])
            order = [atoms.index(a) for i in range(len(view.shape)) for a in view.atoms_of(i)]
            spread = spread.transpose(order)
            sizes, at = [], 0
            for i, size in enumerate(view.shape):
                count = len(view.atoms_of(i))
                if set(spread.shape[at:at + count]) <= {1}:
                    sizes.append(1)
                else:
                    own = [a.size for a in view.atoms_of(i)]
                    spread = np.broadcast_to(spread, (*spread.shape[:at], *own, *spread.shape[at + count:]))
                    sizes.append(size)
                at += count
            found[name] = np.ascontiguousarray(spread).reshape(sizes)
        return found

    def channelwise(self, view: View, constants: Mapping[str, AnyArray], make: Callable[..., Op], names: Mapping[str, int],
                    over_space: Callable[..., Op] | None = None) -> View:
        """An op whose parameters are constants that broadcast against a tensor: ``make`` of one entry a channel if they allow it, else
        ``over_space`` of ``(C or 1, *spatial or 1)``, or if there is no such op ``make`` of one entry an entry."""
        own = self.constants_on(view, constants)
        if all(math.prod(value.shape[1:]) == 1 for value in own.values()):
            count = view.shape[0]
            vectors = {name: np.ascontiguousarray(np.broadcast_to(value.reshape(-1), (count,))) for name, value in own.items()}
            return view.of(self.emit(make(**vectors), view.value, names=names).value)
        if over_space is not None:
            return view.of(self.emit(over_space(**own), view.value, names=names).value)
        spread = {name: np.ascontiguousarray(np.broadcast_to(value, view.shape)).reshape(-1) for name, value in own.items()}
        made = self.emit(make(**spread), self.value(view.flat()), names=names, suffix=".flat")
        return view.of_flat(made.value)

    def alone(self, i: int, kinds: tuple[type[Op], ...], *, moved: bool = False) -> Node | None:
        """The node that makes input ``i``, if it is of these kinds and nothing else reads it; ``moved``: entries may be moved between."""
        value, name, building = self.view(i).value, str(self.node.input[i]), self.building
        while moved and name != value and building.reads.get(name) == 1 and name in building.makers:
            name = str(building.makers[name].input[0])
        node = building.nodes.get(value) if value == name else None
        return node if node is not None and isinstance(node.op, kinds) and building.reads.get(value) == 1 else None


def _repeated(a: AnyArray, b: AnyArray) -> int | None:
    """The one axis along which two arrays differ in size, if each holds the same for all of its entries."""
    axis, *others = [i for i, (n, m) in enumerate(zip(a.shape, b.shape, strict=False)) if n != m] or [-1]
    if a.ndim != b.ndim or axis < 0 or others or 0 in (a.size, b.size):
        return None
    one = a.take([0], axis)
    same = all(not array.strides[axis] or (array == one).all() for array in (a, b)) and np.array_equal(one, b.take([0], axis))
    return axis if same else None


#: What the table of op types holds: a function that makes the tensors of a node.
Reader = Callable[[Call], Tensor | Sequence[Tensor]]
