"""Which layers let no factor pass? Curves that are not positively homogeneous, and Softmax; but some can be opened by a slope.

All that they read and make is pinned to the factor 1. How an error passes depends on the value: a sigmoid at -80 passes next to none of
it, and makes roundings as small as its output. So each states how steep it is near a value, for the bound of :func:`eqfact.verify`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import special

from eqfact.ops.base import Array, Blocking, Commuting, Op, Shape, along_channels, finite_magnitude, one_input, parameter

#: Beyond this the tails of the curves below are 0 or 1 in every precision.
FAR = 40.0
#: ``exp(-x)`` is 0 for all ``x`` beyond this, even in float64.
LARGEST_EXPONENT = 1024.0


class _Curve(Blocking):
    """A function of one number, entry by entry, whose output is as exact as its entries are large."""

    #: How far apart two outputs may be at all: no error is larger.
    span: float = math.inf

    def rounds(self, inputs: Sequence[Array], output: Array) -> Array:
        """Relative to the output; but exponentials, and what they are multiplied by, may be 0 among the smallest numbers."""
        limits, size = np.finfo(output.dtype), finite_magnitude(output)
        smallest = LARGEST_EXPONENT * limits.tiny
        return self.roundings * np.where(size < smallest, smallest / limits.eps, size)

    @abstractmethod
    def steepest(self, x: Array, reach: Array) -> Array:
        """A bound on the slope's magnitude within ``reach`` of ``x``."""

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        (e,), (x,) = errors, inputs
        with np.errstate(over="ignore"):
            return np.minimum(self.steepest(x, u * e) * e, x.dtype.type(self.span / u))


class _Step(_Curve):
    """A curve whose slope is even, and the flatter the farther from zero."""

    def steepest(self, x: Array, reach: Array) -> Array:
        (slope,) = self.vjp(np.ones_like(x), -_nearest(x, reach))  # to the left, where a sigmoid is small and its slope exact
        return slope


def _nearest(x: Array, reach: Array) -> Array:
    """The smallest magnitude within ``reach`` of ``x``."""
    result: Array = np.maximum(np.abs(x) - reach, 0)
    return result


def _logistic_slope(x: Array) -> Array:
    result: Array = special.expit(x) * special.expit(-x)
    return result


def _density(x: Array) -> Array:
    """Of the normal distribution."""
    result: Array = np.exp(-(x * x) / 2) * x.dtype.type(1 / math.sqrt(2 * math.pi))
    return result


@dataclass(frozen=True, eq=False)
class Sigmoid(_Step):
    """``y = 1 / (1 + exp(-x))``.

    >>> Sigmoid().forward(np.array([[0.0, 2.0]])).round(3)
    array([[0.5  , 0.881]])
    """

    span = 1.0

    def forward(self, *inputs: Array) -> Array:
        y: Array = special.expit(inputs[0])
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        y = self.forward(*inputs)
        return (cotangent * y * (1 - y),)


@dataclass(frozen=True, eq=False)
class Tanh(_Step):
    """``y = tanh(x)``.

    >>> Tanh().forward(np.array([[0.0, 2.0]])).round(3)
    array([[0.   , 0.964]])
    """

    span = 2.0

    def forward(self, *inputs: Array) -> Array:
        return np.tanh(inputs[0])

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return (cotangent * (1 - self.forward(*inputs) ** 2),)


@dataclass(frozen=True, eq=False)
class SiLU(_Curve):
    """``y = x / (1 + exp(-x))`` (swish).

    >>> SiLU().forward(np.array([[0.0, 2.0]])).round(3)
    array([[0.   , 1.762]])
    """

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        y: Array = x * special.expit(x)
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        s = special.expit(inputs[0])
        return (cotangent * s * (1 + inputs[0] * (1 - s)),)

    def steepest(self, x: Array, reach: Array) -> Array:
        slope: Array = special.expit(x + reach) + (np.abs(x) + reach) * _logistic_slope(_nearest(x, reach))
        return slope


@dataclass(frozen=True, eq=False)
class HardSwish(_Curve):
    """``y = x * min(max(x / 6 + 1/2, 0), 1)``.

    >>> HardSwish().forward(np.array([[-4.0, 0.0, 3.0]]))
    array([[-0.,  0.,  3.]])
    """

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        y: Array = x * np.clip(x / 6 + x.dtype.type(0.5), 0, 1)
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        (x,) = inputs
        return (cotangent * np.where(x >= 3, 1, np.where(x <= -3, 0, x / 3 + x.dtype.type(0.5))),)

    def steepest(self, x: Array, reach: Array) -> Array:
        low, high = x - reach, x + reach
        inside = np.maximum(*(np.abs(np.clip(end, -3, 3) / 3 + x.dtype.type(0.5)) for end in (low, high)))
        slope: Array = np.maximum(np.where((low < 3) & (high > -3), inside, 0), high >= 3)
        return slope

    def rounds(self, inputs: Sequence[Array], output: Array) -> Array:
        """Between the limits the sum of ``x / 6`` and ``1/2`` is rounded."""
        m = np.abs(inputs[0])
        return self.roundings * np.where(m < 3, m * (m / 6 + m.dtype.type(0.5)), np.abs(output))


@dataclass(frozen=True, eq=False)
class HardSigmoid(_Curve):
    """``y = min(max(alpha * x + beta, 0), 1)``; the defaults are those of ONNX, PyTorch has ``alpha = 1/6``.

    >>> HardSigmoid().forward(np.array([[-3.0, 0.0, 1.0]]))
    array([[0. , 0.5, 0.7]])
    """

    alpha: float = 0.2
    beta: float = 0.5
    span = 1.0

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            object.__setattr__(self, name, float(getattr(self, name)))
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"HardSigmoid {name} must be finite, got {getattr(self, name)}")

    def forward(self, *inputs: Array) -> Array:
        return np.clip(self._unlimited(inputs[0]), 0, 1)

    def _unlimited(self, x: Array) -> Array:
        y: Array = x * x.dtype.type(self.alpha) + x.dtype.type(self.beta)
        return y

    def steepest(self, x: Array, reach: Array) -> Array:
        y, moved = self._unlimited(x), abs(self.alpha) * reach
        return np.where((y + moved > 0) & (y - moved < 1), x.dtype.type(abs(self.alpha)), 0)

    def rounds(self, inputs: Sequence[Array], output: Array) -> Array:
        """Between the limits the sum of ``alpha x`` and ``beta`` is rounded."""
        inside = (output > 0) & (output < 1)
        return self.roundings * np.where(inside, np.maximum(np.abs(output), output.dtype.type(abs(self.beta))), output)

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        y = self.forward(*inputs)
        return (cotangent * inputs[0].dtype.type(self.alpha) * ((y > 0) & (y < 1)),)


@dataclass(frozen=True, eq=False)
class Erf(_Step):
    """``y = erf(x)``, out of which exporters build GELU.

    >>> Erf().forward(np.array([[0.0, 2.0]])).round(3)
    array([[0.   , 0.995]])
    """

    span = 2.0

    def forward(self, *inputs: Array) -> Array:
        y: Array = special.erf(inputs[0])
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return (cotangent * inputs[0].dtype.type(2 / math.sqrt(math.pi)) * np.exp(-(inputs[0] ** 2)),)


@dataclass(frozen=True, eq=False)
class GELU(_Curve):
    """``y = x Phi(x)`` with the normal distribution function, or its approximation by ``tanh`` if ``approximate``.

    The approximation of ``Phi(x)``, ``(1 + tanh(z / 2)) / 2``, is computed as the logistic function of ``z``, exact in its tail.

    >>> GELU().forward(np.array([[0.0, 2.0]])).round(3)
    array([[0.   , 1.954]])
    """

    approximate: bool = False

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        if not self.approximate:
            y: Array = x * special.ndtr(x)
            return y
        y = x * special.expit(self._argument(x))
        return y

    @staticmethod
    def _argument(x: Array) -> Array:
        """The ``z`` of the approximation."""
        z: Array = x.dtype.type(math.sqrt(8 / math.pi)) * (x + x.dtype.type(0.044715) * x * x * x)
        return z

    @staticmethod
    def _argument_slope(x: Array) -> Array:
        slope: Array = x.dtype.type(math.sqrt(8 / math.pi)) * (1 + x.dtype.type(3 * 0.044715) * x * x)
        return slope

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        (x,) = inputs
        if not self.approximate:
            return (cotangent * (special.ndtr(x) + x * _density(x)),)
        z = self._argument(x)
        return (cotangent * (special.expit(z) + x * _logistic_slope(z) * self._argument_slope(x)),)

    def steepest(self, x: Array, reach: Array) -> Array:
        nearest, farthest = np.minimum(_nearest(x, reach), x.dtype.type(FAR)), np.abs(x) + reach
        if not self.approximate:
            slope: Array = special.ndtr(x + reach) + farthest * _density(nearest)
            return slope
        rise = _logistic_slope(self._argument(nearest)) * self._argument_slope(np.minimum(farthest, nearest + x.dtype.type(FAR)))
        slope = special.expit(self._argument(x + reach)) + farthest * rise
        return slope

    def rounds(self, inputs: Sequence[Array], output: Array) -> Array:
        """In its tail the function falls as fast as its exponent is large, whose roundings count so many times."""
        tail = np.clip(inputs[0], -FAR, 0)
        exponent = np.abs(self._argument(tail)) if self.approximate else tail * tail
        return super().rounds(inputs, output) * (1 + exponent)


#: Activations that are a value times a function of it, between 0 and 1 but for a little.
GATES = (SiLU, GELU, HardSwish)


@dataclass(frozen=True, eq=False)
class Sloped(Commuting):
    """``x g(slope x)`` for an activation ``x g(x)`` (SiLU, GELU, HardSwish), with one positive slope or one a channel, ``(C,)``.

    A factor passes, which the slope takes up: ``f x g(slope x) == (f x) g(slope / f (f x))``. It is computed as ``op(slope x) / slope``.

    >>> Sloped(SiLU(), 2.0).rescale(np.array([4.0]), np.array([4.0])).slope
    0.5
    """

    op: Op
    slope: float | Array = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.op, GATES):
            raise TypeError(f"Sloped needs an activation x g(x), SiLU(), GELU() or HardSwish(), got {self.op!r}")
        slope: float | Array = float(self.slope) if np.ndim(self.slope) == 0 else parameter("Sloped slope", self.slope, 1)
        if not (np.isfinite(slope).all() and np.all(np.asarray(slope) > 0)):
            raise ValueError(f"Sloped slope must be positive and finite, got {np.min(slope):g}")
        object.__setattr__(self, "slope", slope)

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        if np.size(self.slope) not in (1, shape[0]):
            raise ValueError(f"Sloped has {np.size(self.slope)} slopes for {shape[0]} channels")
        return tuple(shape)

    def _slope(self, x: Array) -> Array:
        return along_channels(np.atleast_1d(np.asarray(self.slope)).astype(x.dtype), x.ndim - 1)

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        slope = self._slope(x)
        y: Array = self.op.forward(x * slope) / slope
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return self.op.vjp(cotangent, inputs[0] * self._slope(inputs[0]))

    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        super().rescale(f_out, *f_in)
        f = np.asarray(f_out, np.float64)
        if np.all(f == f[0]) and isinstance(self.slope, float):
            return replace(self, slope=self.slope / float(f[0]))  # one slope for all channels stays one
        return replace(self, slope=self.slope / f)

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        (e,), (x,) = errors, inputs
        slope = self._slope(x)
        passed: Array = self.op.passes([e * slope], [x * slope], u) / slope
        return passed

    def rounds(self, inputs: Sequence[Array], output: Array) -> Array:
        slope = self._slope(inputs[0])
        rounded: Array = self.op.rounds([inputs[0] * slope], output * slope) / slope
        return rounded + self.roundings * finite_magnitude(output)


@dataclass(frozen=True, eq=False)
class Softmax(Blocking):
    """``y = exp(x) / sum(exp(x))`` along ``axis`` of ``(N, C, *spatial)``, the channels by default.

    ``mask`` is added to ``x`` before: an array ``(C or 1, *spatial or 1)``, minus infinity where an entry shall count for nothing, or
    ``"causal"``, which leaves out all entries of the last axis behind the place in the one before (no token looks ahead).

    >>> Softmax().forward(np.zeros((1, 4)))
    array([[0.25, 0.25, 0.25, 0.25]])
    >>> Softmax(-1, mask="causal").forward(np.zeros((1, 1, 2, 2)))
    array([[[[1. , 0. ],
             [0.5, 0.5]]]])
    """

    axis: int = 1
    mask: Array | str | None = None
    exponential = True

    def __post_init__(self) -> None:
        if not isinstance(self.axis, (int, np.integer)) or self.axis == 0:
            raise ValueError(f"Softmax axis must be an integer other than 0 (the batch), got {self.axis!r}")
        object.__setattr__(self, "axis", int(self.axis))
        if isinstance(self.mask, str):
            if self.mask != "causal":
                raise ValueError(f"Softmax mask must be an array, 'causal' or None, got {self.mask!r}")
        elif self.mask is not None:
            mask = parameter("Softmax mask", self.mask, finite=False)
            if not (mask < np.inf).all():
                raise ValueError("Softmax mask must hold numbers or minus infinity, got NaN or infinity")
            object.__setattr__(self, "mask", mask)

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        if not -len(shape) <= self.axis <= len(shape):
            raise ValueError(f"Softmax axis {self.axis} is none of a value (N, {', '.join(map(str, shape))})")
        axis = self.axis % (len(shape) + 1) - 1
        if self.mask is None:
            return tuple(shape)
        if isinstance(self.mask, str):
            if axis != len(shape) - 1 or axis < 2:
                raise ValueError(f"Softmax with a causal mask goes along the last of two axes of tokens, got axis {self.axis} of {shape}")
        elif self.mask.ndim != len(shape) or any(n not in (1, m) for n, m in zip(self.mask.shape, shape, strict=True)):
            raise ValueError(f"Softmax mask of shape {self.mask.shape} does not fit a value of shape {shape}")
        elif not np.isfinite(self.mask).any(axis=axis).all():
            raise ValueError("Softmax mask leaves out all entries of a line")
        return tuple(shape)

    def numbers(self, shape: Shape) -> Array:
        """The mask, if there is one, as numbers to be added to a value of this shape."""
        assert self.mask is not None
        return np.triu(np.full(shape[-2:], -np.inf), 1) if isinstance(self.mask, str) else self.mask

    def _masked(self, x: Array) -> Array:
        return x if self.mask is None else x + self.numbers(x.shape).astype(x.dtype, copy=False)

    def forward(self, *inputs: Array) -> Array:
        y: Array = special.softmax(self._masked(inputs[0]), axis=self.axis)
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        weighted = cotangent * (y := self.forward(*inputs))
        return (weighted - y * weighted.sum(axis=self.axis, keepdims=True),)

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        """``|dy_i| <= y_i (|dx_i| + sum_j y_j |dx_j|)``, with growth by ``exp(2 max |dx|)`` on the way; and no more than 1."""
        (e,), (x,) = errors, inputs
        y, span = self.forward(x), 2 * u * e.max(axis=self.axis, keepdims=True)
        grown = np.exp(np.minimum(span, 1))
        bound = y * grown * (e + grown * (y * e).sum(axis=self.axis, keepdims=True))
        return np.where(span > 1, x.dtype.type(1 / u), np.minimum(bound, x.dtype.type(1 / u)))

    def rounds(self, inputs: Sequence[Array], output: Array) -> Array:
        """One rounding an entry of the sum; and that of what is masked, relative to the probability."""
        bound: Array = (self.roundings + output.shape[self.axis]) * finite_magnitude(output)
        if self.mask is not None:
            rounded = output * finite_magnitude(self._masked(inputs[0]))
            bound += self.roundings * (rounded + output * rounded.sum(axis=self.axis, keepdims=True))
        return bound
