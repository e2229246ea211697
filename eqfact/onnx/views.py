"""Where does each entry of an ONNX tensor stand in an eqfact value?

Every axis of the tensor is a product of *atoms*, runs of equally spaced entries of one axis of the value ``(C, *spatial)``; the batch is an
atom of its own, wherever it stands. Reshape splits atoms and Transpose orders them, so that no entry is ever looked at, no two can be
confused, and a view of a million pixels is as small as one of ten.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from eqfact.ops import Flatten, Op, Permute, Rearrange, Shape, Transpose, Unflatten


class Atom(NamedTuple):
    """``size`` entries of the value's axis ``axis``, ``step`` apart."""

    axis: int
    size: int
    step: int = 1

    @property
    def is_batch(self) -> bool:
        """Whether these are the samples of the batch, however many."""
        return self.axis < 0


AnyArray = npt.NDArray[Any]

BATCH = Atom(-1, 0)


class OneSample(ValueError):
    """A shape that holds a single sample, where the batch is free: whoever wrote it runs the file on single samples."""


Axis = tuple[Atom, ...]


@dataclass(frozen=True)
class View:
    """An ONNX tensor made of the entries of the eqfact value ``value`` of shape ``(C, *spatial)``, each once.

    ``axes`` are the tensor's axes, of atoms from the outermost to the innermost. A batch of one sample has no atom.
    """

    value: str
    shape: Shape
    axes: tuple[Axis, ...]

    @classmethod
    def whole(cls, value: str, shape: Shape, samples: int | None = None, batch: int | None = 0) -> View:
        """The value as it is, its batch (of ``samples``, if that is known) at axis ``batch``, or without one."""
        axes: list[Axis] = [run(axis, n) for axis, n in enumerate(shape)]
        if batch is not None:
            axes.insert(batch, () if samples == 1 else (BATCH,))
        return cls(value, shape, tuple(axes))

    @property
    def ndim(self) -> int:
        """Axes of the tensor."""
        return len(self.axes)

    @property
    def batch(self) -> int | None:
        """The axis that the batch is, or is part of; None if there is one sample."""
        return next((i for i, axis in enumerate(self.axes) if BATCH in axis), None)

    def axis(self, axis: int) -> int:
        """An axis, counted from the start."""
        if not -self.ndim <= axis < self.ndim:
            raise ValueError(f"axis {axis} is none of a tensor with {self.ndim} axes")
        return axis % self.ndim

    def size(self, axis: int) -> int:
        """Entries along an axis that is not the batch."""
        atoms = self.axes[self.axis(axis)]
        if BATCH in atoms:
            raise ValueError(f"axis {axis} is the batch, and samples are computed one by one")
        return math.prod(a.size for a in atoms)

    def full_shape(self, batch: int) -> Shape:
        """Shape of the tensor for a batch of this size."""
        return tuple(math.prod(batch if a.is_batch else a.size for a in axis) for axis in self.axes)

    def described(self) -> str:
        """The shape in words, the batch as N."""
        return "x".join("N" * (BATCH in axis) + ("" if axis == (BATCH,) else str(math.prod(a.size for a in axis if not a.is_batch)))
                        for axis in self.axes) or "a single number"

    def reshape(self, *targets: Sequence[int], batches: Sequence[int]) -> View:
        """The tensor in another shape, given in full once for each assumed size of the batch."""
        atoms = [a for axis in self.axes for a in axis]
        axes, todo = [], atoms[::-1]
        for target in targets[0]:
            axis, count = list[Atom](), 1
            while count < target and todo:
                atom = todo.pop()
                size, wanted = batches[0] if atom.is_batch else atom.size, target // count
                if target % count == 0 and size > wanted and size % wanted == 0 and not atom.is_batch:  # the rest belongs to the next axes
                    todo.append(Atom(atom.axis, size // wanted, atom.step))
                    atom = Atom(atom.axis, wanted, atom.step * (size // wanted))
                axis.append(atom)
                count *= batches[0] if atom.is_batch else atom.size
            axes.append(_merged(axis))
        made = View(self.value, self.shape, tuple(axes))
        if todo or any(made.full_shape(b) != tuple(t) for b, t in zip(batches, targets, strict=True)):
            single = all(math.prod(t) == math.prod(self.full_shape(1)) for t in targets)
            raise (OneSample if single else ValueError)(
                f"it reshapes {self.described()} to {list(targets[0])}, which mixes samples of the batch or loses its axis "
                f"(assumed size {batches[0]})")
        return made

    def transpose(self, axes: Sequence[int]) -> View:
        """The tensor with its axes, the batch among them, in another order."""
        if sorted(axes) != list(range(self.ndim)):
            raise ValueError(f"it transposes a tensor with {self.ndim} axes by {list(axes)}")
        return View(self.value, self.shape, tuple(self.axes[a] for a in axes))

    def with_axes(self, *axes: Axis) -> View:
        """The same entries, arranged into these axes."""
        return View(self.value, self.shape, tuple(map(_merged, axes)))

    def layout(self) -> tuple[int, ...] | None:
        """The tensor's axes that the axes of the value ``(C, *spatial)`` are, if it differs in no more than their order."""
        if self.ndim != len(self.shape) + 1 or self.batch not in (None, 0):
            return None
        left = dict(enumerate(self.axes[1:], 1))
        found = []
        for axis, n in enumerate(self.shape):
            at = next((i for i, atoms in left.items() if atoms == run(axis, n)), None)
            if at is None:
                return None
            del left[at]
            found.append(at)
        return tuple(found)

    @property
    def home(self) -> int | None:
        """The tensor's axis that the channels of the value are, all in their order and nothing else; None if there is no such axis."""
        layout = self.layout()
        if layout is not None:
            return layout[0]
        own = run(0, self.shape[0])
        return next((i for i, axis in enumerate(self.axes) if own and axis == own), None)

    def like(self, other: View, batches: Sequence[int]) -> View:
        """This tensor, which broadcasts to the tensor ``other``, in the arrangement in which ``other`` is a value, batch first.

        :class:`ValueError` if an axis of that value would be repeated in part.
        """
        aligned = self.with_axes(*((),) * (other.ndim - self.ndim), *self.axes)
        targets = []
        for b in batches:
            mine = aligned.full_shape(b)
            targets.append([1 if n == 1 else b if a.is_batch else a.size for n, axis in zip(mine, other.axes, strict=True) for a in axis])
        split = aligned.reshape(*targets, batches=batches)
        atoms = [a for axis in other.axes for a in axis]
        at = dict(zip(atoms, split.axes, strict=True))
        axes = []
        for axis in range(len(other.shape)):
            parts = [at[a] for a in other.atoms_of(axis)]
            if any(parts) and not all(parts):
                raise ValueError("it repeats a part of an axis")
            axes.append(tuple(a for part in parts for a in part))
        return self.with_axes(at.get(BATCH, ()), *axes)

    @property
    def plain(self) -> bool:
        """Whether the tensor is the value itself, batch first."""
        return self.layout() == tuple(range(1, len(self.shape) + 1))

    def of(self, value: str) -> View:
        """The same view of another value of this shape."""
        return View(value, self.shape, self.axes)

    def tensor_of(self, value: AnyArray) -> AnyArray:
        """The tensor, from its value ``(N, C, *spatial)``."""
        split, order = self.atoms()
        sizes = [len(value) if a.is_batch else a.size for a in split]
        whole = value.reshape(sizes if BATCH in split else [len(value), *sizes])
        if BATCH not in split:
            (whole,) = whole  # one sample
        return whole.transpose(order).reshape(self.full_shape(len(value)))

    def value_of(self, tensor: AnyArray) -> AnyArray:
        """The value ``(N, C, *spatial)``, from the tensor."""
        split, order = self.atoms()
        count = next((n for n, axis in zip(tensor.shape, self.axes, strict=True) if axis == (BATCH,)), None)
        if count is None:
            count = tensor.size // math.prod(self.shape)
        sizes = [count if split[i].is_batch else split[i].size for i in order]
        back: AnyArray = tensor.reshape(sizes).transpose([int(i) for i in np.argsort(order)]).reshape(count, *self.shape)
        return back

    def atoms(self) -> tuple[list[Atom], list[int]]:
        """The atoms as the value has them, batch first, and the order of these in the tensor."""
        split = [a for axis in range(-1, len(self.shape)) for a in self.atoms_of(axis)]
        return split, [split.index(a) for axis in self.axes for a in axis]

    def spread(self, vector: AnyArray) -> AnyArray:
        """One entry a channel of the value, as it broadcasts against the tensor."""
        split, order = self.atoms()
        beside = {a for axis in self.axes if any(a.axis == 0 for a in axis) for a in axis}  # channels, and what shares an axis with them
        if BATCH in beside:
            raise ValueError("its channels share an axis with the batch")
        own = [a for a in split if not a.is_batch and a.axis == 0]
        whole = vector.reshape([a.size for a in own] + [1] * sum(a.axis > 0 for a in split))
        whole = np.broadcast_to(whole, [a.size if a in beside else 1 for a in split if not a.is_batch])
        if BATCH in split:
            whole = whole[None]
        array: AnyArray = whole.transpose(order).reshape([math.prod(a.size for a in axis) if any(a in beside for a in axis) else 1
                                                          for axis in self.axes])
        first = next((i for i, n in enumerate(array.shape) if n != 1), array.ndim - 1)
        return array.reshape(array.shape[first:])

    def flat(self) -> View:
        """The whole value, flattened."""
        entries = tuple(Atom(axis, n) for axis, n in enumerate(self.shape) if n > 1)
        return self.with_axes(() if self.batch is None else (BATCH,), entries)

    def of_flat(self, value: str) -> View:
        """The same view of the flattened value."""
        strides = [math.prod(self.shape[axis + 1:]) for axis in range(len(self.shape))]
        axes = (tuple(a if a.is_batch else Atom(0, a.size, a.step * strides[a.axis]) for a in axis) for axis in self.axes)
        return View(value, (math.prod(self.shape),), tuple(map(_merged, axes)))

    def on(self, value: str, shape: Shape, axis: int, before: int, count: int) -> View:
        """The same view of a value of which ``count`` entries along an atom of step ``before`` of its axis ``axis`` were chosen."""
        chosen = next(a for a in self.atoms_of(axis) if a.step == before)
        inner = {a: a.step if a.step <= before else a.step // chosen.size * count for a in self.atoms_of(axis)}
        new = {a: Atom(axis, count if a is chosen else a.size, step) for a, step in inner.items()}
        axes = (_merged([new.get(a, a) for a in atoms if new.get(a, a).size != 1 or a.is_batch]) for atoms in self.axes)
        return View(value, shape, tuple(axes))

    def atoms_of(self, axis: int) -> list[Atom]:
        """The atoms of an axis of the value, from the outermost to the innermost."""
        return sorted((a for atoms in self.axes for a in atoms if a.axis == axis), key=lambda a: -a.step)


def run(axis: int, n: int) -> Axis:
    """A whole axis of a value."""
    return () if n == 1 else (Atom(axis, n),)


def _merged(atoms: Sequence[Atom]) -> Axis:
    """Neighbours that are one run of entries are one atom."""
    found: list[Atom] = []
    for atom in atoms:
        if found and not atom.is_batch and found[-1].axis == atom.axis and found[-1].step == atom.step * atom.size:
            atom = Atom(atom.axis, found.pop().size * atom.size, atom.step)
        found.append(atom)
    return tuple(found)


def chosen(view: View, axis: int, indices: Sequence[int]) -> tuple[int, list[int], Atom]:
    """The axis of the value, the indices along it, and the atom, that some ``indices`` along an axis of the tensor choose.

    :class:`LookupError` where that axis is not one atom.
    """
    atoms = view.axes[axis]
    if len(atoms) != 1 or atoms[0].is_batch:
        raise LookupError("no single atom")
    (atom,) = atoms
    rest = np.arange(view.shape[atom.axis] // atom.size)
    outer, inner = np.divmod(rest.reshape(-1, 1, atom.step), atom.step)
    along = outer * atom.step * atom.size + np.reshape(indices, (1, -1, 1)) * atom.step + inner
    return atom.axis, along.reshape(-1).tolist(), atom


def moves(view: View) -> list[Op]:
    """The ops that turn the value of a view into the tensor itself, batch first; none if it is the value.

    :class:`ValueError` if the batch stands elsewhere.

    >>> moves(View("x", (2, 3), ((BATCH,), (Atom(0, 2), Atom(1, 3)))))
    [Flatten()]
    """
    if not view.axes or any(BATCH in axis for axis in view.axes[1:]) or any(not a.is_batch for a in view.axes[0]):
        raise ValueError(f"the batch of its input ({view.described()}) must be the first axis, and nothing else in it")
    groups = view.axes[1:]
    if not groups:
        raise ValueError("its input has the shape (N), without channels")
    layout = view.layout()
    if layout is not None:
        order = tuple(int(i) for i in np.argsort(layout))
        return [] if order == tuple(range(len(order))) else [Transpose(order)]
    split = [view.atoms_of(axis) for axis in range(len(view.shape))]
    number = {atom: i for i, atom in enumerate(a for atoms in split for a in atoms)}
    order = tuple(number[a] for group in groups for a in group)
    sizes = tuple(math.prod(a.size for a in group) for group in groups)
    if order == tuple(range(len(order))):  # only axes are split or joined
        if len(groups) == 1:
            return [Flatten()]
        if len(view.shape) == 1:
            return [Unflatten(sizes)]
    elif groups[1:] == tuple(run(i, n) for i, n in enumerate(view.shape) if i):
        return [Permute(channel_order(view))]
    elif len(groups) == 1:
        entries = np.arange(math.prod(view.shape)).reshape([a.size for atoms in split for a in atoms]).transpose(order)
        flat: list[Op] = [] if len(view.shape) == 1 else [Flatten()]
        return [*flat, Permute(tuple(entries.reshape(-1).tolist()))]
    return [Rearrange(tuple(tuple(a.size for a in atoms) for atoms in split), tuple(tuple(number[a] for a in group) for group in groups))]


def channel_order(view: View) -> tuple[int, ...]:
    """The channels of the value as a tensor, batch first, has them on its second axis, which holds all of them."""
    split = view.atoms_of(0)
    entries = np.arange(view.shape[0]).reshape([a.size for a in split]).transpose([split.index(a) for a in view.axes[1]])
    return tuple(entries.reshape(-1).tolist())
