"""What has been made of a file so far? Tensors by their ONNX names, and the eqfact nodes that they are views of.

Whatever a reader of a node asks for is answered here: a new node, the value that is a tensor itself, some entries along an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import numpy as np
import onnx

from eqfact.graph import Node
from eqfact.onnx.origin import Foreign, Origin, Source, Tensor
from eqfact.onnx.views import BATCH, Axis, View, chosen, moves
from eqfact.ops import Identity, Op, Permute, Shape, Slice, Take, Weighted

#: Two assumed sizes of a free batch; primes, so that no product of other sizes is mistaken for one.
BATCHES = (7919, 7907)
#: What is of the size of what it reads, so that a kept node's outputs have it on whatever data.
ENTRYWISE = {"Cast", "Not", "And", "Or", "Xor", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Where", "Add", "Sub", "Mul",
             "Div", "Neg", "Abs", "Sign", "Min", "Max", "Mod", "Clip", "CumSum", "IsNaN", "IsInf", "Identity", "Transpose"}
#: A file of a few bytes can claim any number of channels; MobileNetV2 has some 50 thousand in all its values.
MOST_CHANNELS = 2**24


class Building:
    """The network that a file is becoming.

    ``samples`` is the size of the batch, None if it is free; ``enter`` makes a network input of a tensor from outside, or raises
    :class:`ValueError` with the reason why not; ``sizes`` tells the shape of a tensor from outside, of whatever type, with each batch.
    """

    def __init__(self, source: Source, samples: int | None, enter: Callable[[Foreign], View],
                 sizes: Callable[[Foreign], Sequence[Shape]]) -> None:
        self.source, self.samples, self._enter, self._sizes = source, samples, enter, sizes
        self.dtype = source.dtype()
        self.batches = BATCHES if samples is None else (samples,)
        self.tensors: dict[str, Tensor] = source.tensors
        self.inputs: dict[str, Shape] = {}
        self.nodes: dict[str, Node] = {}
        self.shapes: dict[str, Shape] = {}
        self.reads: dict[str, int] = {}
        #: The nodes of the file that read each tensor themselves.
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        #: Softmaxes that were made where their mask is added.
        self.early: set[str] = set()
        self._ops: dict[tuple[object, ...], list[Op]] = {}
        self._written: dict[View, str] = {}
        self._channels = 0
        graph = source.model.graph
        self.names = {*source.initializers, *(i.name for i in graph.input), *(name for node in graph.node for name in node.output)}
        self.makers = {str(name): node for node in graph.node for name in node.output}
        for name in (*(name for node in graph.node for name in names_read(node)), *(output.name for output in graph.output)):
            self.reads[name] = self.reads.get(name, 0) + 1
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def view(self, name: str) -> View:
        """A tensor as a view of a value; what comes from outside becomes an input."""
        tensor = self.tensors[name]
        if isinstance(tensor, Foreign):
            tensor = self._enter(tensor)
            self.tensors[name] = tensor
        assert isinstance(tensor, View)
        return tensor

    def full_shapes(self, name: str) -> Sequence[Shape]:
        """The shape of a tensor, with each assumed size of the batch."""
        tensor = self.tensors[name]
        if isinstance(tensor, Foreign) and self._sized(name):
            return self._sizes(tensor)
        return [self.view(name).full_shape(b) for b in self.batches]

    def _sized(self, name: str) -> bool:
        """Whether the size of a tensor is one of the file's inputs', whatever they hold."""
        todo, seen = [name], set[str]()
        while todo:
            name = todo.pop()
            if name and name not in seen and isinstance(self.tensors.get(name), Foreign) and name in self.makers:
                if self.makers[name].op_type not in ENTRYWISE:
                    return False
                todo += self.makers[name].input
            seen.add(name)
        return True

    def input(self, name: str, view: View) -> None:
        """A new input of the network, and the view of it that the tensor is."""
        self.inputs[view.value] = self.shapes[view.value] = self._counted(view.shape)
        self.tensors[name] = view

    def _counted(self, shape: Shape) -> Shape:
        """The shape, if there are not too many channels by now: a graph keeps a label for each."""
        self._channels += shape[0]
        if self._channels > MOST_CHANNELS:
            raise ValueError(f"its {shape[0]} channels are more than a network is read with here (all values together: {MOST_CHANNELS})")
        return shape

    # ------------------------------------------------------------------------------------------- nodes

    def add(self, name: str, op: Op, inputs: Sequence[str], origin: Origin) -> View:
        """A new node; :class:`ValueError` with the op's reason if the inputs do not fit."""
        name = self.fresh(name) if name in self.nodes or name in self.inputs else name
        shape = self._counted(op.output_shape(*(self.shapes[i] for i in inputs)))
        self.nodes[name], self.shapes[name] = Node(name, op, tuple(inputs), origin), shape
        return View.whole(name, shape, self.samples)

    def fresh(self, name: str) -> str:
        """A name that nothing in the file or the network has."""
        taken = self.names | self.nodes.keys()
        candidates = (name, *(f"{name}_{i}" for i in range(1, len(taken) + 2)))
        return next(c for c in candidates if c not in taken)

    def shared(self, op: Weighted, source: tuple[object, ...]) -> Weighted:
        """The same op object for equal uses of the same constants, so that sharing is seen by everyone."""
        known = self._ops.setdefault((type(op), *source), [])
        found = next((other for other in known if same_op(op, other)), None)
        if found is None:
            known.append(op)
            return op
        assert isinstance(found, Weighted)
        return found

    def read_once(self, value: str) -> bool:
        """Whether one node alone reads a value, however its entries are moved before."""
        return all(self.reads.get(name) == 1 for name, tensor in self.tensors.items() if isinstance(tensor, View) and tensor.value == value)

    def inherit(self, name: str, from_: Node) -> None:
        """The node ``name`` takes another one's place: it reads what that one read, and remembers its initializers too."""
        node = self.nodes[name]
        del self.nodes[from_.name]
        own, other = node.origin, from_.origin
        assert isinstance(own, Origin) and isinstance(other, Origin)
        names = [name for name in {**other.places, **own.places} if getattr(node.op, name) is not None]
        merged = replace(own, initializers={name: {**other.initializers, **own.initializers}[name] for name in names},
                         places={name: {**other.places, **own.places}[name] for name in names}, reads=other.reads, span=other.span)
        self.nodes[name] = replace(node, origin=merged)

    def rename(self, old: str, new: str) -> None:
        """Another name for a value."""
        self.shapes[new] = self.shapes[old]
        self.nodes = {(new if n.name == old else n.name): replace(n, name=new if n.name == old else n.name,
                                                                  inputs=tuple(new if i == old else i for i in n.inputs))
                      for n in self.nodes.values()}
        for name, tensor in self.tensors.items():
            if isinstance(tensor, View) and tensor.value == old:
                self.tensors[name] = replace(tensor, value=new)
        self._written = {replace(v, value=new) if v.value == old else v: new if made == old else made for v, made in self._written.items()}

    # ------------------------------------------------------------------------------------------- views

    def written(self, view: View, reader: str, at: str | None = None) -> str:
        """The value that is a tensor itself, batch first; the ops that move its entries are added, and reused by later readers.

        They are named after the tensor, or else its ``reader``; with ``at``, the last one has exactly this name.
        """
        if at is None and view in self._written:
            return self._written[view]
        ops = moves(view)
        value = view.value
        if not ops:
            if at is None:
                return value
            ops = [Identity()]
        name = next((n for n, t in self.tensors.items() if t == view), reader)
        for i, op in enumerate(ops):
            last = i == len(ops) - 1
            own = at if at is not None else name if name not in self.nodes and name != reader else None
            made = own if last and own is not None else self.fresh(f"{name}.{type(op).__name__.lower()}")
            maker = str(self.makers[name].name) if last and name in self.makers else ""
            value = self.add(made, op, (value,), Origin(maker, source=self.source)).value
        self._written[view] = value
        return value

    def settled(self, view: View, reader: str) -> View:
        """The same tensor as a view of a value that has its axes: no axis of it is more than the batch and one axis of that value."""
        space: list[Axis] = [tuple(a for a in axis if not a.is_batch) for axis in view.axes if axis != (BATCH,)]
        batch = () if view.batch is None else (BATCH,)
        if view.batch is None and not view.axes[0]:
            space = space[1:]  # the batch of one sample
        value = self.written(view.with_axes(batch, *space), reader)
        made = View.whole(value, self.shapes[value], self.samples)
        runs = iter(made.axes[1:])
        axes = [axis if axis == (BATCH,) else (*(a for a in axis[:1] if a.is_batch), *next(runs), *(a for a in axis[1:] if a.is_batch))
                for axis in (view.axes[1:] if view.batch is None and not view.axes[0] else view.axes)]
        return made.with_axes(*([()] if len(axes) < view.ndim else []), *axes)

    def choose(self, view: View, axis: int, indices: Sequence[int], name: str, origin: Origin) -> View:
        """Some entries along one axis of a tensor that is not the batch, in any order and any number."""
        axis, n = view.axis(axis), view.size(axis)
        if not len(indices):
            raise ValueError("it leaves no entry")
        if list(indices) == list(range(n)):
            return view
        if len(view.axes[axis]) != 1:
            view = self.settled(view, name)
        if not view.axes[axis]:  # one entry, repeated
            raise ValueError("it repeats the one entry of an axis")
        along, entries, atom = chosen(view, axis, indices)
        made = self.add(name, _selection(entries, along, view.shape[along]), (view.value,), origin)
        return view.on(made.value, made.shape, along, atom.step, len(indices))


def _selection(entries: list[int], axis: int, count: int) -> Op:
    """The op that takes these entries of ``count`` along an axis."""
    if axis == 0 and entries == list(range(entries[0], entries[0] + len(entries))):
        return Slice(entries[0], entries[-1] + 1)
    return Permute(tuple(entries)) if axis == 0 and sorted(entries) == list(range(count)) else Take(tuple(entries), axis)


def same_op(a: Op, b: Op) -> bool:
    """Whether two ops are of one class and have the same parameters, to the bit."""
    if type(a) is not type(b):
        return False
    for f in fields(a):  # type: ignore[arg-type]  # every final op is a dataclass
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
            if x is not y and not (x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()):
                return False
        elif isinstance(x, np.ndarray) or isinstance(y, np.ndarray) or repr(x) != repr(y):
            return False
    return True


def names_read(node: onnx.NodeProto) -> list[str]:
    """The tensors that a node reads, in its own graphs too."""
    found = [str(name) for name in node.input if name]
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
            found += [name for inner in graph.node for name in names_read(inner)]
            found += [output.name for output in graph.output]
    return found
