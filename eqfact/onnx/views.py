"""Where does each entry of an ONNX tensor stand in an eqfact value?

``T[n, ...] = value[n].reshape(-1)[index]``, with the batch at one axis of ``T``. Reshape, Transpose, Slice and their like
are numpy on ``index``; none of them is ever guessed or approximated, because no two entries can be confused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from eqfact.ops import Flatten, Op, Permute, Shape, Slice, Transpose, Unflatten

Index = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class View:
    """An ONNX tensor made of the entries of the eqfact value ``value`` of shape ``(C, *spatial)``.

    ``index`` has the tensor's shape without its batch, which is axis ``batch``; None means every entry in its own place.
    """

    value: str
    shape: Shape
    index: Index | None = None
    batch: int = 0

    @property
    def sample(self) -> Shape:
        """Shape of the tensor without its batch."""
        return self.shape if self.index is None else self.index.shape

    @property
    def positions(self) -> Index:
        """``index``, also where every entry stands in its own place."""
        return _in_place(self.shape) if self.index is None else self.index

    def full_shape(self, batch: int) -> Shape:
        """Shape of the tensor for a batch of this size."""
        return (*self.sample[:self.batch], batch, *self.sample[self.batch:])

    @property
    def ndim(self) -> int:
        """Axes of the tensor, with its batch."""
        return len(self.sample) + 1

    def axis(self, axis: int) -> int:
        """The axis of ``index`` that is axis ``axis`` of the tensor; :class:`ValueError` for the batch."""
        if not -self.ndim <= axis < self.ndim:
            raise ValueError(f"axis {axis} is none of a tensor with {self.ndim} axes")
        axis %= self.ndim
        if axis == self.batch:
            raise ValueError(f"axis {axis} is the batch, and samples are computed one by one")
        return axis - (axis > self.batch)

    def moved(self, index: Index, batch: int = 0) -> View:
        """The same value, looked at in another way."""
        if not batch and index.shape == self.shape and np.array_equal(index, _in_place(self.shape)):
            return View(self.value, self.shape)
        return View(self.value, self.shape, index, batch)

    def reshape(self, *targets: Sequence[int], batches: Sequence[int]) -> View:
        """The tensor in another shape, given as full shape once for each assumed size of the batch."""
        for axis in sorted(range(len(targets[0])), key=lambda a: a != self.batch):
            rest = {(*t[:axis], *t[axis + 1:]) for t in targets}
            if len(rest) > 1 or any(t[axis] != b for t, b in zip(targets, batches, strict=True)):
                continue
            (sample,) = rest
            if math.prod(sample) == math.prod(self.sample) and math.prod(sample[:axis]) == math.prod(self.sample[:self.batch]):
                return self.moved(self.positions.reshape(sample), axis)
        known = "x".join("N" if i == self.batch else str(n) for i, n in enumerate(self.full_shape(0)))
        raise ValueError(f"it reshapes {known} to {list(targets[0])}, which mixes samples of the batch or loses its axis "
                         f"(assumed size {batches[0]})")

    def transpose(self, axes: Sequence[int]) -> View:
        """The tensor with its axes, the batch among them, in another order."""
        if sorted(axes) != list(range(self.ndim)):
            raise ValueError(f"it transposes a tensor with {self.ndim} axes by {list(axes)}")
        return self.moved(self.positions.transpose([self.axis(a) for a in axes if a != self.batch]), list(axes).index(self.batch))

    def take(self, axis: int, chosen: slice | npt.ArrayLike) -> View:
        """Some entries along one axis of the tensor."""
        at = self.axis(axis)
        positions = np.arange(self.sample[at])[chosen] if isinstance(chosen, slice) else np.asarray(chosen)
        return self.moved(np.take(self.positions, positions, axis=at), self.batch)

    def layout(self) -> tuple[int, ...] | None:
        """The order of the value's axes ``(C, *spatial)`` in the tensor, if it differs in nothing else."""
        if self.batch:
            return None
        if self.index is None:
            return tuple(range(len(self.shape)))
        whole = _in_place(self.shape)
        for axes in itertools.permutations(range(len(self.shape))):
            if self.index.shape == tuple(self.shape[a] for a in axes) and np.array_equal(self.index, whole.transpose(axes)):
                return axes
        return None


def _in_place(shape: Shape) -> Index:
    return np.arange(math.prod(shape), dtype=np.int64).reshape(shape)


def moves(view: View) -> list[Op]:
    """The ops that turn the value of a view into the tensor itself, batch first; none if it is the value.

    :class:`ValueError` if the batch stands elsewhere or if entries are repeated.

    >>> moves(View("x", (2, 3), np.array([3, 4, 5])))
    [Slice(start=1, stop=2), Flatten()]
    """
    if view.batch:
        raise ValueError(f"the batch stands at axis {view.batch} of its input; it must be the first axis")
    if view.index is None:
        return []
    target = view.index.shape
    if len(np.unique(view.index)) < view.index.size:
        raise ValueError("entries of its input are repeated, and no op of eqfact does that")
    if not target or not view.index.size:
        raise ValueError(f"its input has the shape (N{''.join(f', {n}' for n in target)}), without channels")
    pixels = math.prod(view.shape[1:])
    chosen = view.index.reshape(target[0], -1)[:, 0] // pixels
    if len(chosen) * pixels == view.index.size and np.array_equal(
            np.take(_in_place(view.shape), chosen, axis=0).reshape(-1), view.index.reshape(-1)):  # whole channels
        channels, shape = _select(chosen, view.shape[0]), (len(chosen), *view.shape[1:])
        return channels + _regroup(shape, target)
    whole = np.unique(view.index // pixels)
    if len(whole) * pixels == view.index.size and len(whole) < view.shape[0] and np.ptp(whole) == len(whole) - 1:
        # first the channels that are needed, then their entries
        rest = replace(view, shape=(len(whole), *view.shape[1:]), index=view.index - whole[0] * pixels)
        return [*_select(whole, view.shape[0]), *moves(rest)]
    axes = view.layout()
    if axes is not None:
        return [Transpose(axes)]
    flat: list[Op] = [Flatten()] if len(view.shape) > 1 else []
    flat += _select(view.index.reshape(-1), math.prod(view.shape))
    return flat + _regroup((view.index.size,), target)


def _select(chosen: Index, count: int) -> list[Op]:
    """Ops that leave the channels ``chosen``, all different, of ``count``."""
    if np.array_equal(chosen, np.arange(chosen[0], chosen[0] + len(chosen))):
        return [] if len(chosen) == count else [Slice(int(chosen[0]), int(chosen[-1]) + 1)]
    others = np.setdiff1d(np.arange(count), chosen)
    order = Permute(tuple(np.concatenate([chosen, others]).tolist()))
    return [order, Slice(0, len(chosen))] if len(others) else [order]


def _regroup(shape: Shape, target: Shape) -> list[Op]:
    """Ops that reshape a value, its entries staying in order."""
    if shape == target:
        return []
    ops: list[Op] = [Flatten()] if len(shape) > 1 else []
    return [*ops, Unflatten(target)] if len(target) > 1 else ops
