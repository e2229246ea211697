"""Which layers work over space, each channel by itself, and let a positive factor pass? Pooling, padding, upsampling, interpolation."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np

from eqfact.ops.base import (
    Array,
    Commuting,
    Labels,
    Op,
    Padding,
    Shape,
    Trace,
    integers,
    one_input,
    paddings,
    parameter,
    per_axis,
    per_side,
    product,
    window_sizes,
)
from eqfact.ops.convolution import Sides, channels_first, channels_last, over_space, tap_windows

#: So many windows may begin in padding and take steps that are wider than the value; whether one of more sees nothing else is not asked.
MOST_LEAPS = 2**20


def spatial_shape(op: Op, shapes: tuple[Shape, ...]) -> Shape:
    """The shape of the one input, if it has spatial axes."""
    (shape,) = one_input(op, shapes)
    if len(shape) < 2:
        raise ValueError(f"{type(op).__name__} needs spatial axes, got a value of shape {shape}")
    return shape


@dataclass(frozen=True, eq=False)
class _Pool(Commuting):
    """What the sliding-window pools share: kernel, stride (the kernel's, unless given), padding and dilation."""

    kernel: int | tuple[int, ...]
    _: KW_ONLY
    stride: int | tuple[int, ...] | None = None
    padding: Padding = 0
    dilation: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "kernel", integers(f"{name} kernel", self.kernel, 1))
        object.__setattr__(self, "stride", None if self.stride is None else integers(f"{name} stride", self.stride, 1))
        object.__setattr__(self, "padding", paddings(self.padding))
        object.__setattr__(self, "dilation", integers(f"{name} dilation", self.dilation, 1))

    def _geometry(self, ndim: int) -> tuple[Shape, Shape, Sides, Shape]:
        kernel = per_axis("kernel", self.kernel, ndim)
        stride = kernel if self.stride is None else per_axis("stride", self.stride, ndim)
        padding = per_side(self.padding, ndim)
        dilation = per_axis("dilation", self.dilation, ndim)
        for k, d, sides in zip(kernel, dilation, padding, strict=True):
            if max(sides) > d * (k - 1):
                raise ValueError(f"{type(self).__name__} padding {padding} must be smaller than the kernel {kernel}")
        return kernel, stride, padding, dilation

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = spatial_shape(self, shapes)
        kernel, stride, padding, dilation = self._geometry(len(shape) - 1)
        sizes = window_sizes(type(self).__name__, shape[1:], kernel, stride, padding, dilation)
        for n, count, s, (before, _), d in zip(shape[1:], sizes, stride, padding, dilation, strict=True):
            begun = min(count, -(-before // s), d // math.gcd(s, d)) if d > n else 0  # in padding, from where steps may leap over the value
            if begun > MOST_LEAPS or ((np.arange(begun) * s - before) % d >= n).any():
                raise ValueError(f"{type(self).__name__} with kernel {kernel}, dilation {dilation} and padding {padding} has windows "
                                 f"over {shape[1:]} that see nothing but padding")
        return (shape[0], *sizes)

    def _met(self, space: Shape) -> tuple[Shape, Shape, Shape, Sides, Shape]:
        """Sizes of the output, kernel, stride, padding and dilation, without the ends of the kernel that meet nothing but padding.

        There are such in a kernel that is larger than the input and its padding in front: of a mean over all of space, as exporters
        write one for whatever size may come.
        """
        kernel, stride, padding, dilation = self._geometry(len(space))
        sizes, met, sides = self.output_shape((1, *space))[1:], [], []
        for n, count, k, s, (before, after), d in zip(space, sizes, kernel, stride, padding, dilation, strict=True):
            first, last = (max(0, before - (count - 1) * s), min(k, n + before)) if d == 1 else (0, k)
            met.append(last - first)
            sides.append((before - first, after - (k - last)))
        return sizes, tuple(met), stride, tuple(sides), dilation

    @property
    def _taps(self) -> int:
        """How many entries a window has, of at most three axes."""
        return self.kernel**3 if isinstance(self.kernel, int) else math.prod(self.kernel)

    def _windows(self, x: Array, fill: float) -> list[Array]:
        sizes, kernel, stride, padding, dilation = self._met(x.shape[2:])
        return list(tap_windows(channels_last(x, padding, fill), sizes, kernel, stride, dilation))

    def _spread(self, x: Array, shares: list[Array]) -> Array:
        """The adjoint of :meth:`_windows`: add what each tap's entries get."""
        sizes, kernel, stride, padding, dilation = self._met(x.shape[2:])
        padded = np.zeros_like(channels_last(x, padding))
        for window, share in zip(tap_windows(padded, sizes, kernel, stride, dilation), shares, strict=True):
            window += share
        inside = (slice(before, before + n) for n, (before, _) in zip(x.shape[2:], padding, strict=True))
        return channels_first(over_space(padded, inside))


def added(terms: Iterable[Array]) -> Array:
    """The sum, two by two: no term of n is rounded more often than twice the logarithm of n to base 2."""
    sums: list[tuple[int, Array]] = []  # of how many terms: powers of two, each less than the one before
    for term in terms:
        count = 1
        while sums and sums[-1][0] == count:
            first = sums.pop()[1]
            term = np.add(first, term, out=first if count > 1 else None)
            count *= 2
        sums.append((count, term))
    return functools.reduce(lambda total, more: more[1] + total, sums[-2::-1], sums[-1][1])


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

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        (x,) = inputs
        left = channels_last(cotangent).copy()
        y = channels_last(self.forward(x))

        def share(window: Array) -> Array:
            """The cotangent of a window goes to its first largest entry."""
            hit: Array = np.where(window == y, left, 0)
            left[hit != 0] = 0
            return hit

        return (self._spread(x, [share(w) for w in self._windows(x, -math.inf)]),)

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        """The largest error among the entries of a window that may be its largest."""
        (e,), (x,) = errors, inputs
        surely = channels_last(self.forward(x - u * e))
        within = [np.where(highest >= surely, error, 0)
                  for highest, error in zip(self._windows(x + u * e, -math.inf), self._windows(e, 0.0), strict=True)]
        return channels_first(np.maximum.reduce(within))


@dataclass(frozen=True, eq=False)
class MinPool(_Pool):
    """Smallest entry of each window, ``-max(-x)``; padding counts as infinity.

    >>> MinPool(2).forward(np.array([[[1.0, 3.0, 2.0, 0.0]]]))
    array([[[1., 0.]]])
    """

    moves = True

    @property
    def _largest(self) -> MaxPool:
        return MaxPool(self.kernel, stride=self.stride, padding=self.padding, dilation=self.dilation)

    def forward(self, *inputs: Array) -> Array:
        return -self._largest.forward(-inputs[0])

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return self._largest.vjp(cotangent, -inputs[0])

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        return self._largest.passes(errors, [-inputs[0]], u)


@dataclass(frozen=True, eq=False)
class LpPool(_Pool):
    """``(sum |x|^p)^(1/p)`` over each window; padding counts as zeros. ``p`` is a whole number.

    Powers are taken of entries relative to the largest power of two in their window: none overflows, and powers of two pass exactly.

    >>> LpPool(2).forward(np.array([[[3.0, -4.0, 0.0, 1.0]]]))
    array([[[5., 1.]]])
    """

    p: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(p := integers("LpPool p", self.p, 1), tuple):
            raise TypeError(f"LpPool p must be an integer, got {self.p!r}")
        object.__setattr__(self, "p", p)

    @property
    def roundings(self) -> int:
        """A power, the sums of a window (see :func:`added`), and a root, in each of two networks."""
        return 16 + 4 * self._taps.bit_length() + 2 * self.p

    def _unit(self, windows: list[Array]) -> Array:
        """The power of two that each window is measured in, by its exponent."""
        exponents: Array = np.frexp(np.maximum.reduce(windows))[1]
        return exponents

    def forward(self, *inputs: Array) -> Array:
        windows = self._windows(np.abs(inputs[0]), 0.0)
        unit = self._unit(windows)
        total = added(np.ldexp(window, -unit) ** self.p for window in windows)
        if self.p == 2:
            total = np.sqrt(total)
        elif self.p > 2:
            total **= total.dtype.type(1 / self.p)
        return channels_first(np.ldexp(total, unit))

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        (x,) = inputs
        y, made = channels_last(self.forward(x)), channels_last(cotangent)
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = [np.where(y > 0, window / y, 0) for window in self._windows(x, 0.0)]
        return (self._spread(x, [made * np.sign(r) * np.abs(r) ** (self.p - 1) for r in relative]),)


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
        """The sums of a window (see :func:`added`), in each of two networks."""
        return 4 + 4 * self._taps.bit_length()

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        return channels_first(added(self._windows(x, 0.0)) / self._counts(x))

    def _counts(self, x: Array) -> Array:
        """How many entries each window counts."""
        if self.count_include_pad:
            return np.asarray(math.prod(per_axis("kernel", self.kernel, x.ndim - 2)), x.dtype)
        return added(self._windows(np.ones((1, 1, *x.shape[2:]), x.dtype), 0.0))

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        (x,) = inputs
        share = channels_last(cotangent) / self._counts(x)
        return (self._spread(x, [share] * len(self._windows(x, 0.0))),)


@dataclass(frozen=True, eq=False)
class GlobalAvgPool(Commuting):
    """Mean over all of space; keeps the axes: ``(N, C, 1, ...)``.

    >>> GlobalAvgPool().forward(np.arange(8.0).reshape(1, 2, 2, 2)).shape
    (1, 2, 1, 1)
    """

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

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        (x,) = inputs
        pixels = x.dtype.type(math.prod(x.shape[2:]))
        return (np.broadcast_to(cotangent / pixels, x.shape),)


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

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        (x,) = inputs
        sides = per_side(self.padding, x.ndim - 2)
        inside = (slice(before, before + n) for n, (before, _) in zip(x.shape[2:], sides, strict=True))
        return (channels_first(over_space(np.moveaxis(cotangent, 1, -1), inside)),)

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        return replace(self, value=0.0).forward(*errors)


@dataclass(frozen=True, eq=False)
class Upsample(Commuting):
    """Nearest-neighbour upsampling by whole factors ``factor``, one for all spatial axes or one an axis.

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

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        for axis, k in enumerate(per_axis("factor", self.factor, cotangent.ndim - 2), 2):
            cotangent = cotangent.reshape(*cotangent.shape[:axis], -1, k, *cotangent.shape[axis + 1:]).sum(axis=axis + 1)
        return (cotangent,)


@dataclass(frozen=True, eq=False)
class Blend(Commuting):
    """``y = M x`` along one axis of space, for all channels alike: interpolation, sums, running sums, products with a constant.

    ``matrix`` is ``(out, in)``; ``axis`` counts in ``(C, *spatial)``, so 1 is the first of space.

    >>> Blend(np.array([[0.5, 0.5], [0.0, 1.0]])).forward(np.array([[[1.0, 3.0]]]))
    array([[[2., 3.]]])
    """

    matrix: Array
    axis: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrix", parameter("Blend matrix", self.matrix, 2))
        axis = integers("Blend axis", self.axis, 1)
        object.__setattr__(self, "axis", axis)

    @property
    def roundings(self) -> int:
        """One product and one sum an entry of a row that is not 0, in each of two networks."""
        return 4 + 2 * int(np.count_nonzero(self.matrix, axis=1).max())

    def output_shape(self, *shapes: Shape) -> Shape:
        shape = spatial_shape(self, shapes)
        if self.axis >= len(shape) or shape[self.axis] != self.matrix.shape[1]:
            raise ValueError(f"Blend with a matrix {self.matrix.shape} along axis {self.axis} does not fit a value of shape {shape}")
        return (*shape[:self.axis], len(self.matrix), *shape[self.axis + 1:])

    def _along(self, matrix: Array, x: Array) -> Array:
        """``matrix`` times ``x`` along the axis."""
        if self.axis == x.ndim - 2:
            return product(x, matrix.T)
        rest = x.reshape(*x.shape[:self.axis + 2], -1)
        return product(matrix, rest).reshape(*x.shape[:self.axis + 1], len(matrix), *x.shape[self.axis + 2:])

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        return self._along(self.matrix.astype(x.dtype, copy=False), x)

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return (self._along(self.matrix.T.astype(cotangent.dtype, copy=False), cotangent),)

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        return self._along(np.abs(self.matrix).astype(errors[0].dtype, copy=False), errors[0])
