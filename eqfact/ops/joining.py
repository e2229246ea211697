"""Which layers join, select or move channels, and pass each channel's factor on with it?

Add ties the factors of its inputs (the residual rule of PAPER 4 follows from that), and so do differences, maxima and minima; Concat and
Slice carry them along, Flatten repeats each over its pixels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np
import numpy.typing as npt

from eqfact.ops.base import (
    Array,
    Commuting,
    Labels,
    Op,
    Shape,
    T,
    Trace,
    along_channels,
    channel_vector,
    integers,
    one_input,
    parameter,
    scaled,
    spread,
)


def common_shape(op: Op, shapes: tuple[Shape, ...]) -> Shape:
    """The shape of values joined entry by entry: equally many axes, each of equal sizes or 1, the channels too."""
    name = type(op).__name__
    if len(shapes) < 2:
        raise ValueError(f"{name} reads two values or more, got {len(shapes)}")
    if len({s[0] for s in shapes} - {1}) > 1:
        raise ValueError(f"{name} needs equal channel counts, got {' and '.join(str(s[0]) for s in shapes)}")
    if len({len(s) for s in shapes}) > 1:
        raise ValueError(f"{name} needs values with equally many axes, got shapes {' and '.join(map(str, shapes))}")
    try:
        return tuple(np.broadcast_shapes(*shapes))
    except ValueError:
        raise ValueError(f"{name} needs equal spatial shapes, got {' and '.join(str(s[1:]) for s in shapes)}") from None


def tie_all(trace: Trace, inputs: Sequence[Labels]) -> None:
    """Channel ``i`` of all these must carry the same factor."""
    for x in inputs[1:]:
        trace.tie(inputs[0], x)


def unbroadcast(cotangent: Array, shape: Shape) -> Array:
    """Sum a cotangent over the axes along which a value of this shape was broadcast."""
    axes = tuple(i for i, (n, m) in enumerate(zip(cotangent.shape, shape, strict=True)) if n != m)
    result: Array = cotangent.sum(axis=axes, keepdims=True)
    return result


class _Joined(Commuting):
    """Values joined entry by entry: their factors are tied, and a value of one channel ties all the channels that it is joined to."""

    def output_shape(self, *shapes: Shape) -> Shape:
        return common_shape(self, shapes)

    def carry(self, *vectors: npt.NDArray[T]) -> npt.NDArray[T]:
        return np.broadcast_to(vectors[0], max(map(len, vectors)))

    def trace(self, trace: Trace, *inputs: Labels) -> Labels:
        labels = super().trace(trace, *inputs)
        count = len(labels)
        tie_all(trace, [np.broadcast_to(channel_vector(x), count) for x in inputs])
        return labels

    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        for f in f_in:
            super().rescale(f_out, np.broadcast_to(f, len(f_out)))
        return self


@dataclass(frozen=True, eq=False)
class Add(_Joined):
    """Sum of two or more values; an axis of size 1 is broadcast. Ties its inputs' factors.

    >>> Add().forward(np.array([[1.0, 2.0]]), np.array([[10.0, 20.0]]))
    array([[11., 22.]])
    """

    def forward(self, *inputs: Array) -> Array:
        y = inputs[0] + inputs[1]
        for x in inputs[2:]:
            y = y + x
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return tuple(unbroadcast(cotangent, x.shape) for x in inputs)


@dataclass(frozen=True, eq=False)
class Sub(_Joined):
    """Difference of two values; an axis of size 1 is broadcast. Ties its inputs' factors.

    >>> Sub().forward(np.array([[3.0]]), np.array([[1.0]]))
    array([[2.]])
    """

    def output_shape(self, *shapes: Shape) -> Shape:
        if len(shapes) != 2:
            raise ValueError(f"Sub reads two values, got {len(shapes)}")
        return super().output_shape(*shapes)

    def forward(self, *inputs: Array) -> Array:
        y: Array = inputs[0] - inputs[1]
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return unbroadcast(cotangent, inputs[0].shape), unbroadcast(-cotangent, inputs[1].shape)

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        passed: Array = errors[0] + errors[1]
        return passed


@dataclass(frozen=True, eq=False)
class Max(_Joined):
    """Largest of two or more values, entry by entry; an axis of size 1 is broadcast. Ties its inputs' factors.

    >>> Max().forward(np.array([[3.0, 1.0]]), np.array([[2.0, 4.0]]))
    array([[3., 4.]])
    """

    def forward(self, *inputs: Array) -> Array:
        y: Array = functools.reduce(np.maximum, inputs)
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        """The cotangent goes to the first largest entry."""
        y, left, shares = self.forward(*inputs), cotangent, list[Array]()
        for x in inputs:
            hit = np.where(x == y, left, 0)
            left = np.where(x == y, 0, left)
            shares.append(unbroadcast(hit, x.shape))
        return tuple(shares)

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        """The largest error among the entries that may be the largest."""
        surely = self.forward(*(x - u * e for x, e in zip(inputs, errors, strict=True)))
        passed: Array = functools.reduce(np.maximum, (np.where(x + u * e >= surely, e, 0) for x, e in zip(inputs, errors, strict=True)))
        return passed


@dataclass(frozen=True, eq=False)
class Min(_Joined):
    """Smallest of two or more values, ``-max(-x, -y)``; an axis of size 1 is broadcast. Ties its inputs' factors.

    >>> Min().forward(np.array([[1.0, 20.0]]), np.array([[10.0, 2.0]]))
    array([[1., 2.]])
    """

    def forward(self, *inputs: Array) -> Array:
        y: Array = functools.reduce(np.minimum, inputs)
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return Max().vjp(cotangent, *(-x for x in inputs))

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        return Max().passes(errors, [-x for x in inputs], u)


@dataclass(frozen=True, eq=False)
class Concat(Commuting):
    """Join values along the channels, or along another ``axis`` of ``(C, *spatial)``; there it ties its inputs' factors, as Add does.

    >>> Concat().forward(np.zeros((1, 1)), np.ones((1, 2)))
    array([[0., 1., 1.]])
    """

    axis: int = 0

    def __post_init__(self) -> None:
        axis = integers("Concat axis", self.axis, 0)
        object.__setattr__(self, "axis", axis)

    def output_shape(self, *shapes: Shape) -> Shape:
        if not shapes:
            raise ValueError("Concat reads at least one value")
        if self.axis >= len(shapes[0]):
            raise ValueError(f"Concat joins along axis {self.axis}, got values of shape {' and '.join(map(str, shapes))}")
        if len({(*s[:self.axis], *s[self.axis + 1:]) for s in shapes}) > 1:
            rule = "spatial shapes" if self.axis == 0 else f"sizes of all axes but {self.axis}"
            seen = (s[1:] if self.axis == 0 else s for s in shapes)
            raise ValueError(f"Concat needs equal {rule}, got {' and '.join(map(str, seen))}")
        return (*shapes[0][:self.axis], sum(s[self.axis] for s in shapes), *shapes[0][self.axis + 1:])

    def carry(self, *vectors: npt.NDArray[T]) -> npt.NDArray[T]:
        return vectors[0] if self.axis else np.concatenate(vectors)

    def trace(self, trace: Trace, *inputs: Labels) -> Labels:
        labels = super().trace(trace, *inputs)
        if self.axis:
            tie_all(trace, inputs)
        return labels

    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        for f in f_in if self.axis else ():
            super().rescale(f_out, f)
        return super().rescale(f_out, *f_in)

    def forward(self, *inputs: Array) -> Array:
        return np.concatenate(inputs, axis=self.axis + 1)

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        ends = np.cumsum([x.shape[self.axis + 1] for x in inputs])[:-1]
        return tuple(np.split(cotangent, ends, axis=self.axis + 1))


@dataclass(frozen=True, eq=False)
class Extend(Commuting):
    """A constant of shape ``(C, *spatial)`` beside the value along ``axis``: behind it, or in ``front`` of it (a class token, coordinates).

    The constant absorbs factors. As channels it has factors of its own; over space each of its entries takes that of its channel.

    >>> Extend(np.array([[7.0]]), axis=1, front=True).forward(np.array([[[1.0, 2.0]]]))
    array([[[7., 1., 2.]]])
    """

    constant: Array
    axis: int = 0
    _: KW_ONLY
    front: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "constant", parameter("Extend constant", self.constant))
        object.__setattr__(self, "axis", integers("Extend axis", self.axis, 0))
        if not isinstance(self.front, bool):
            raise TypeError(f"Extend front must be True or False, got {self.front!r}")

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        own = self.constant.shape
        if self.axis >= len(shape) or len(own) != len(shape) or any(
                n != m for i, (n, m) in enumerate(zip(own, shape, strict=True)) if i != self.axis):
            raise ValueError(f"Extend by a constant of shape {own} along axis {self.axis} does not fit a value of shape {shape}")
        return (*shape[:self.axis], shape[self.axis] + own[self.axis], *shape[self.axis + 1:])

    def _joined(self, constant: npt.NDArray[T], x: npt.NDArray[T], axis: int) -> npt.NDArray[T]:
        return np.concatenate([constant, x] if self.front else [x, constant], axis=axis)

    def _parts(self, y: npt.NDArray[T], axis: int) -> tuple[npt.NDArray[T], npt.NDArray[T]]:
        """Of what is joined: the value, and the constant."""
        count = self.constant.shape[self.axis]
        if self.front:
            own, rest = np.split(y, [count], axis=axis)
        else:
            rest, own = np.split(y, [y.shape[axis] - count], axis=axis)
        return rest, own

    def trace(self, trace: Trace, *inputs: Labels) -> Labels:
        shape = self.output_shape(*(x.shape for x in inputs))
        vector = channel_vector(inputs[0])
        if self.axis == 0:
            vector = self._joined(channel_vector(trace.fresh(self.constant.shape)), vector, 0)
        return spread(vector, shape)

    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        passed, own = self._parts(np.asarray(f_out), 0) if self.axis == 0 else (f_out, f_out)
        super().rescale(passed, *f_in)
        return replace(self, constant=scaled(self.constant, along_channels(np.asarray(own), self.constant.ndim), "constant"))

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        own = np.broadcast_to(self.constant.astype(x.dtype, copy=False), (len(x), *self.constant.shape))
        return self._joined(own, x, self.axis + 1)

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return (self._parts(cotangent, self.axis + 1)[0],)

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        (e,) = errors
        return self._joined(np.zeros((len(e), *self.constant.shape), e.dtype), e, self.axis + 1)


@dataclass(frozen=True, eq=False)
class Flatten(Commuting):
    """``(N, C, *spatial)`` to ``(N, C * pixels)``, channel by channel: each channel's factor is repeated over its pixels.

    >>> Flatten().forward(np.arange(8.0).reshape(1, 2, 2, 2))
    array([[0., 1., 2., 3., 4., 5., 6., 7.]])
    """

    moves = True

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        return (math.prod(shape),)

    def trace(self, trace: Trace, *inputs: Labels) -> Labels:
        (x,) = one_input(self, inputs)
        labels: Labels = x.reshape(-1)
        return labels

    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        return super().rescale(f_out, np.repeat(f_in[0], len(f_out) // len(f_in[0])))

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        return x.reshape(len(x), -1)

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return (cotangent.reshape(inputs[0].shape),)


@dataclass(frozen=True, eq=False)
class Unflatten(Commuting):
    """``(N, C * pixels)`` to ``(N, C, *spatial)``: the entries that become one channel must share one factor.

    >>> Unflatten((2, 2)).forward(np.array([[1.0, 2.0, 3.0, 4.0]]))
    array([[[1., 2.],
            [3., 4.]]])
    """

    shape: Shape
    moves = True

    def __post_init__(self) -> None:
        shape = integers("Unflatten shape", tuple(self.shape), 1)
        if not isinstance(shape, tuple) or len(shape) < 2:
            raise ValueError(f"Unflatten needs a shape (C, *spatial), got {self.shape!r}")
        object.__setattr__(self, "shape", shape)

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        if shape != (math.prod(self.shape),):
            raise ValueError(f"Unflatten to {self.shape} reads (N, {math.prod(self.shape)}), got a value of shape {shape}")
        return self.shape

    def trace(self, trace: Trace, *inputs: Labels) -> Labels:
        self.output_shape(*(x.shape for x in inputs))
        return _tied_over_space(trace, inputs[0].reshape(self.shape))

    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        return super().rescale(np.repeat(f_out, len(f_in[0]) // len(f_out)), *f_in)

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        return x.reshape(len(x), *self.shape)

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return (cotangent.reshape(inputs[0].shape),)


@dataclass(frozen=True, eq=False)
class Transpose(Commuting):
    """Axis ``i`` of the output's ``(C, *spatial)`` is axis ``axes[i]`` of the input's (0 is the channels).

    If the channels change their place, all of them must share one factor.

    >>> Transpose((1, 0)).forward(np.array([[[1.0, 2.0]]]))
    array([[[1.],
            [2.]]])
    """

    axes: tuple[int, ...]
    moves = True

    def __post_init__(self) -> None:
        if sorted(self.axes) != list(range(len(self.axes))):
            raise ValueError(f"Transpose axes must name every axis of (C, *spatial) from 0 to {len(self.axes) - 1} once, got {self.axes}")
        object.__setattr__(self, "axes", tuple(int(a) for a in self.axes))

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        if len(shape) != len(self.axes):
            raise ValueError(f"Transpose orders {len(self.axes)} axes, got a value of shape {shape}")
        return tuple(shape[a] for a in self.axes)

    def trace(self, trace: Trace, *inputs: Labels) -> Labels:
        self.output_shape(*(x.shape for x in inputs))
        return _tied_over_space(trace, inputs[0].transpose(self.axes))

    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        if self.axes[0] == 0:
            return super().rescale(f_out, *f_in)
        if not (np.all(f_out == f_out[0]) and np.all(f_in[0] == f_out[0])):
            raise ValueError(f"Transpose {self.axes} moves the channels: all channels of its input and output must share one factor")
        return self

    def forward(self, *inputs: Array) -> Array:
        return np.transpose(inputs[0], (0, *(a + 1 for a in self.axes)))

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return (np.transpose(cotangent, (0, *(int(a) + 1 for a in np.argsort(self.axes)))),)


def _tied_over_space(trace: Trace, labels: Labels) -> Labels:
    """Labels ``(C, *spatial)`` that may differ over space, with those of each channel tied; the first stands for the channel."""
    shape = labels.shape
    labels = labels[tuple(slice(None if step else 1) for step in labels.strides)]  # an axis of stride 0 repeats one entry
    first = channel_vector(labels)
    mates = labels.reshape(len(first), -1)
    differ = mates != first[:, None]
    if differ.any():
        trace.tie(np.broadcast_to(first[:, None], mates.shape)[differ], mates[differ])
    return spread(first, shape)


@dataclass(frozen=True, eq=False)
class Slice(Commuting):
    """Channels ``start`` to ``stop`` (exclusive); counted from the end if negative, as in Python.

    >>> Slice(1, 3).forward(np.array([[0.0, 1.0, 2.0, 3.0]]))
    array([[1., 2.]])
    """

    start: int
    stop: int
    moves = True

    def __post_init__(self) -> None:
        for name in ("start", "stop"):
            if not isinstance(getattr(self, name), (int, np.integer)):
                raise TypeError(f"Slice {name} must be an integer, got {getattr(self, name)!r}")
            object.__setattr__(self, name, int(getattr(self, name)))

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        first, last, _ = slice(self.start, self.stop).indices(shape[0])
        if last <= first or max(self.stop, -self.start) > shape[0]:
            raise ValueError(f"Slice({self.start}, {self.stop}) does not fit {shape[0]} channels")
        return (last - first, *shape[1:])

    def carry(self, *vectors: npt.NDArray[T]) -> npt.NDArray[T]:
        return vectors[0][self.start:self.stop]

    def forward(self, *inputs: Array) -> Array:
        return inputs[0][:, self.start:self.stop]

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        whole = np.zeros_like(inputs[0])
        whole[:, self.start:self.stop] = cotangent
        return (whole,)


@dataclass(frozen=True, eq=False)
class Permute(Commuting):
    """Channel ``i`` of the output is channel ``order[i]`` of the input (channel shuffle).

    >>> Permute((2, 0, 1)).forward(np.array([[0.0, 1.0, 2.0]]))
    array([[2., 0., 1.]])
    """

    order: tuple[int, ...]
    moves = True

    def __post_init__(self) -> None:
        if not all(isinstance(i, (int, np.integer)) for i in self.order):
            raise TypeError(f"Permute order must hold integers, got {self.order!r}")
        order = tuple(int(i) for i in self.order)
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"Permute order must name every channel from 0 to {len(order) - 1} once, got {order}")
        object.__setattr__(self, "order", order)

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        if shape[0] != len(self.order):
            raise ValueError(f"Permute orders {len(self.order)} channels, got {shape[0]}")
        return tuple(shape)

    def carry(self, *vectors: npt.NDArray[T]) -> npt.NDArray[T]:
        return vectors[0][list(self.order)]

    def forward(self, *inputs: Array) -> Array:
        return inputs[0][:, list(self.order)]

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return (cotangent[:, np.argsort(self.order)],)
