"""Which layers let a positive factor pass, ``op(f * x) == f * op(x)``?

First those that work entry by entry (section 1 of the paper: homogeneous activations), with Clip, whose bounds take the
factor up, so that ReLU6 is exact; then pooling and padding over space; then those that join, select or move channels.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np
import numpy.typing as npt

from eqfact.ops.base import (
    Array,
    Commuting,
    Labels,
    Op,
    Padding,
    Shape,
    T,
    Trace,
    along_channels,
    channel_vector,
    integers,
    one_input,
    paddings,
    parameter,
    per_axis,
    per_side,
    spread,
    window_sizes,
)
from eqfact.ops.convolution import Sides, channels_first, channels_last, tap_windows

# --------------------------------------------------------------------------------------------- entry by entry


@dataclass(frozen=True, eq=False)
class Identity(Commuting):
    """``y = x`` (also Dropout at inference)."""

    moves = True

    def forward(self, *inputs: Array) -> Array:
        return inputs[0]


@dataclass(frozen=True, eq=False)
class ReLU(Commuting):
    """``y = max(x, 0)``."""

    activation = True

    def forward(self, *inputs: Array) -> Array:
        return np.maximum(inputs[0], 0)


@dataclass(frozen=True, eq=False)
class LeakyReLU(Commuting):
    """``y = x`` where positive, ``slope * x`` elsewhere; one slope for all channels.

    >>> LeakyReLU(0.1).forward(np.array([[-1.0, 2.0]]))
    array([[-0.1,  2. ]])
    """

    slope: float = 0.01
    activation = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "slope", float(self.slope))
        if not math.isfinite(self.slope):
            raise ValueError(f"LeakyReLU slope must be finite, got {self.slope}")

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        return np.where(x > 0, x, x * x.dtype.type(self.slope))

    def magnitude(self, *inputs: Array) -> Array:
        m: Array = max(1.0, abs(self.slope)) * inputs[0]
        return m


@dataclass(frozen=True, eq=False)
class PReLU(Commuting):
    """LeakyReLU with a slope for every channel, ``(C,)``, or one for all.

    >>> PReLU(np.array([0.5, 0.25])).forward(np.array([[-1.0, -1.0]]))
    array([[-0.5 , -0.25]])
    """

    slope: Array
    activation = True

    def __post_init__(self) -> None:
        slope = np.asarray(self.slope)
        if isinstance(self.slope, (int, float)):
            slope = slope.astype(np.float64)
        if slope.ndim > 1:
            raise ValueError(f"PReLU slope must be one number or (C,), got shape {slope.shape}")
        object.__setattr__(self, "slope", parameter("PReLU slope", slope))

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        if self.slope.size not in (1, shape[0]):
            raise ValueError(f"PReLU has {self.slope.size} slopes for {shape[0]} channels")
        return tuple(shape)

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        return np.where(x > 0, x, x * along_channels(self.slope, x.ndim - 1).astype(x.dtype, copy=False))

    def magnitude(self, *inputs: Array) -> Array:
        (m,) = inputs
        result: Array = m * along_channels(np.maximum(np.abs(self.slope), 1), m.ndim - 1)
        return result


@dataclass(frozen=True, eq=False)
class Clip(Commuting):
    """``y = min(max(x, low), high)`` with bounds for all channels or one a channel, ``(C,)``; ``-inf`` and ``inf`` leave a side open.

    The bounds take up the factor: ``f * clip(x, low, high) == clip(f * x, f * low, f * high)``.

    >>> Clip(0, 6).rescale(np.array([1.0, 0.5]), np.array([1.0, 0.5])).high
    array([6., 3.])
    """

    low: float | Array
    high: float | Array
    activation = True

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            object.__setattr__(self, name, self._bound(name, getattr(self, name)))
        if len({np.size(self.low), np.size(self.high)} - {1}) > 1:
            raise ValueError(f"Clip has {np.size(self.low)} low bounds and {np.size(self.high)} high ones")
        if np.any(np.asarray(self.low) > np.asarray(self.high)):
            raise ValueError(f"Clip needs low <= high, got low {self.low} and high {self.high}")

    @staticmethod
    def _bound(name: str, value: float | Array) -> float | Array:
        bound: float | Array
        if isinstance(value, (int, float, np.floating, np.integer)) or np.ndim(value) == 0:
            bound = float(value)
        else:
            bound = parameter(f"Clip {name}", value, 1, finite=False)
        if np.isnan(bound).any():
            raise ValueError(f"Clip {name} holds NaN")
        return bound

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        for name in ("low", "high"):
            size = np.size(getattr(self, name))
            if size not in (1, shape[0]):
                raise ValueError(f"Clip {name} has {size} bounds for {shape[0]} channels")
        return tuple(shape)

    def _on(self, x: Array, bound: float | Array) -> Array:
        with np.errstate(over="ignore"):  # a bound beyond the largest float32 leaves its side open
            return along_channels(np.asarray(bound).astype(x.dtype), x.ndim - 1)

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        y: Array = np.maximum(x, self._on(x, self.low))
        return np.minimum(y, self._on(x, self.high), out=y)

    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        super().rescale(f_out, *f_in)
        if np.all(f_out == f_out[0]) and isinstance(self.low, float) and isinstance(self.high, float):
            f_out = f_out[0]  # one bound for all channels stays one bound
        return replace(self, low=self.low * f_out, high=self.high * f_out)

    def magnitude(self, *inputs: Array) -> Array:
        # an error passes unclipped; a saturated channel takes the rounding of its bound
        (m,) = inputs
        for bound in (self.low, self.high):
            finite = np.where(np.isfinite(bound), np.abs(bound), 0)
            m = np.maximum(m, self._on(m, finite))
        return m


# --------------------------------------------------------------------------------------------- over space


def spatial_shape(op: Op, shapes: tuple[Shape, ...]) -> Shape:
    """The shape of the one input, if it has spatial axes."""
    (shape,) = one_input(op, shapes)
    if len(shape) < 2:
        raise ValueError(f"{type(op).__name__} needs spatial axes, got a value of shape {shape}")
    return shape


@dataclass(frozen=True, eq=False)
class _Pool(Commuting):
    """What the sliding-window pools share: kernel, stride (the kernel's, unless given) and padding."""

    kernel: int | tuple[int, ...]
    _: KW_ONLY
    stride: int | tuple[int, ...] | None = None
    padding: Padding = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "kernel", integers(f"{name} kernel", self.kernel, 1))
        object.__setattr__(self, "stride", None if self.stride is None else integers(f"{name} stride", self.stride, 1))
        object.__setattr__(self, "padding", paddings(self.padding))

    def _geometry(self, ndim: int) -> tuple[Shape, Shape, Sides]:
        kernel = per_axis("kernel", self.kernel, ndim)
        stride = kernel if self.stride is None else per_axis("stride", self.stride, ndim)
        padding = per_side(self.padding, ndim)
        for k, sides in zip(kernel, padding, strict=True):
            if max(sides) >= k:
                raise ValueError(f"{type(self).__name__} padding {padding} must be smaller than the kernel {kernel}")
        return kernel, stride, padding

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = spatial_shape(self, shapes)
        kernel, stride, padding = self._geometry(len(shape) - 1)
        return (shape[0], *window_sizes(type(self).__name__, shape[1:], kernel, stride, padding, (1,) * len(kernel)))

    def _windows(self, x: Array, fill: float) -> list[Array]:
        kernel, stride, padding = self._geometry(x.ndim - 2)
        sizes = self.output_shape(x.shape[1:])[1:]
        return list(tap_windows(channels_last(x, padding, fill), sizes, kernel, stride, (1,) * len(kernel)))


@dataclass(frozen=True, eq=False)
class MaxPool(_Pool):
    """Largest entry of each window; padding counts as minus infinity.

    >>> MaxPool(2).forward(np.array([[[1.0, 3.0, 2.0, 0.0]]]))
    array([[[3., 2.]]])
    """

    moves = True

    def forward(self, *inputs: Array) -> Array:
        first, *others = self._windows(inputs[0], -math.inf)
        y = first.copy()
        for window in others:
            np.maximum(y, window, out=y)
        return channels_first(y)


@dataclass(frozen=True, eq=False)
class AvgPool(_Pool):
    """Mean of each window; ``count_include_pad`` says whether padding counts as zeros or not at all.

    >>> AvgPool(3, stride=1, padding=1, count_include_pad=False).forward(np.array([[[1.0, 2.0, 3.0]]]))
    array([[[1.5, 2. , 2.5]]])
    """

    _: KW_ONLY
    count_include_pad: bool = True

    @property
    def roundings(self) -> int:
        """One sum an entry of the window (of at most three axes), in each of two networks."""
        return 4 + 2 * (self.kernel**3 if isinstance(self.kernel, int) else math.prod(self.kernel))

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        first, *others = self._windows(x, 0.0)
        y = first.copy()
        for window in others:
            y += window
        if self.count_include_pad:
            y /= x.dtype.type(math.prod(per_axis("kernel", self.kernel, x.ndim - 2)))
        else:
            ones = np.ones((1, 1, *x.shape[2:]), x.dtype)
            y /= sum(self._windows(ones, 0.0))
        return channels_first(y)


@dataclass(frozen=True, eq=False)
class GlobalAvgPool(Commuting):
    """Mean over all of space; keeps the axes: ``(N, C, 1, ...)``."""

    @property
    def roundings(self) -> int:
        """numpy sums pairwise, in blocks of 128 with 8 partial sums: fewer than 16 + 3 + log2 of the pixels, in each network."""
        return 128

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = spatial_shape(self, shapes)
        return (shape[0], *(1 for _ in shape[1:]))

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        y: Array = np.ascontiguousarray(x).mean(axis=tuple(range(2, x.ndim)), keepdims=True)
        return y


@dataclass(frozen=True, eq=False)
class Pad(Commuting):
    """Constant padding over space, ``padding`` as for Conv. Zero (and infinity) is transparent; another constant pins its channels.

    >>> Pad(((1, 0),)).forward(np.array([[[5.0]]]))
    array([[[0., 5.]]])
    """

    padding: Padding
    value: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "padding", paddings(self.padding))
        object.__setattr__(self, "value", float(self.value))
        if math.isnan(self.value):
            raise ValueError("Pad value must not be NaN")

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = spatial_shape(self, shapes)
        return (shape[0], *(n + sum(p) for n, p in zip(shape[1:], per_side(self.padding, len(shape) - 1), strict=True)))

    @property
    def moves(self) -> bool:
        return self.value == 0

    @property
    def _transparent(self) -> bool:
        return self.value == 0 or math.isinf(self.value)

    def trace(self, trace: Trace, *inputs: Labels) -> Labels:
        if not self._transparent:
            trace.pin(inputs[0], f"read by '{trace.node}': Pad with the constant {self.value:g} would have to pad {self.value:g} * f")
        return super().trace(trace, *inputs)

    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        if not self._transparent and np.any(f_out != 1):
            raise ValueError(f"Pad with the constant {self.value:g} is not positively homogeneous: its factors must be 1")
        return super().rescale(f_out, *f_in)

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        return channels_first(channels_last(x, per_side(self.padding, x.ndim - 2), self.value))

    def magnitude(self, *inputs: Array) -> Array:
        return replace(self, value=abs(self.value)).forward(*inputs)


@dataclass(frozen=True, eq=False)
class Upsample(Commuting):
    """Nearest-neighbour upsampling by whole ``factor``s, one for all spatial axes or one an axis.

    >>> Upsample(2).forward(np.array([[[1.0, 2.0]]]))
    array([[[1., 1., 2., 2.]]])
    """

    factor: int | tuple[int, ...]
    moves = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", integers("Upsample factor", self.factor, 1))

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = spatial_shape(self, shapes)
        return (shape[0], *(n * k for n, k in zip(shape[1:], per_axis("factor", self.factor, len(shape) - 1), strict=True)))

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        for axis, k in enumerate(per_axis("factor", self.factor, x.ndim - 2), 2):
            x = np.repeat(x, k, axis=axis)
        return x


# --------------------------------------------------------------------------------------------- joining and moving channels


def common_shape(op: Op, shapes: tuple[Shape, ...]) -> Shape:
    """The shape of values joined entry by entry: equal channels, spatial axes equal or 1."""
    name = type(op).__name__
    if len(shapes) < 2:
        raise ValueError(f"{name} reads two values or more, got {len(shapes)}")
    if len({s[0] for s in shapes}) > 1:
        raise ValueError(f"{name} needs equal channel counts, got {' and '.join(str(s[0]) for s in shapes)}")
    if len({len(s) for s in shapes}) > 1:
        raise ValueError(f"{name} needs values with equally many axes, got shapes {' and '.join(map(str, shapes))}")
    try:
        return tuple(np.broadcast_shapes(*shapes))
    except ValueError:
        raise ValueError(f"{name} needs equal spatial shapes, got {' and '.join(str(s[1:]) for s in shapes)}") from None


@dataclass(frozen=True, eq=False)
class Add(Commuting):
    """Sum of two or more values of equal channels; a spatial axis of size 1 is broadcast. Ties its inputs' factors."""

    def output_shape(self, *shapes: Shape) -> Shape:
        return common_shape(self, shapes)

    def trace(self, trace: Trace, *inputs: Labels) -> Labels:
        labels = super().trace(trace, *inputs)
        for x in inputs[1:]:
            trace.tie(inputs[0], x)
        return labels

    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        for f in f_in:
            super().rescale(f_out, f)
        return self

    def forward(self, *inputs: Array) -> Array:
        y = inputs[0] + inputs[1]
        for x in inputs[2:]:
            y = y + x
        return y


@dataclass(frozen=True, eq=False)
class Concat(Commuting):
    """Join values along the channels.

    >>> Concat().forward(np.zeros((1, 1)), np.ones((1, 2)))
    array([[0., 1., 1.]])
    """

    def output_shape(self, *shapes: Shape) -> Shape:
        if not shapes:
            raise ValueError("Concat reads at least one value")
        if len({s[1:] for s in shapes}) > 1:
            raise ValueError(f"Concat needs equal spatial shapes, got {' and '.join(str(s[1:]) for s in shapes)}")
        return (sum(s[0] for s in shapes), *shapes[0][1:])

    def carry(self, *vectors: npt.NDArray[T]) -> npt.NDArray[T]:
        return np.concatenate(vectors)

    def forward(self, *inputs: Array) -> Array:
        return np.concatenate(inputs, axis=1)


@dataclass(frozen=True, eq=False)
class Flatten(Commuting):
    """``(N, C, *spatial)`` to ``(N, C * pixels)``, channel by channel: each channel's factor is repeated over its pixels."""

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


def _tied_over_space(trace: Trace, labels: Labels) -> Labels:
    """Labels ``(C, *spatial)`` that may differ over space, with those of each channel tied; the first stands for the channel."""
    first = channel_vector(labels)
    pairs = np.stack([np.repeat(first, labels[0].size), labels.reshape(-1)])
    pairs = np.unique(pairs[:, pairs[0] != pairs[1]], axis=1)
    if pairs.size:
        trace.tie(pairs[0], pairs[1])
    return spread(first, labels.shape)


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
