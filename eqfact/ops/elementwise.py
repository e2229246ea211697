"""Which layers work entry by entry and let a positive factor pass, ``op(f * x) == f * op(x)``?

The homogeneous activations of section 1 of the paper; and Clip, whose bounds take the factor up, so that ReLU6 is exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from eqfact.ops.base import (
    Array,
    Commuting,
    Op,
    Shape,
    along_channels,
    bounds_on,
    one_input,
    parameter,
    scaled,
)


@dataclass(frozen=True, eq=False)
class Identity(Commuting):
    """``y = x`` (also Dropout at inference).

    >>> Identity().forward(np.array([[-1.0, 2.0]]))
    array([[-1.,  2.]])
    """

    moves = True

    def forward(self, *inputs: Array) -> Array:
        return inputs[0]

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return (cotangent,)


@dataclass(frozen=True, eq=False)
class Abs(Commuting):
    """``y = |x|``.

    >>> Abs().forward(np.array([[-1.0, 2.0]]))
    array([[1., 2.]])
    """

    def forward(self, *inputs: Array) -> Array:
        y: Array = np.abs(inputs[0])
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return (cotangent * np.sign(inputs[0]),)


@dataclass(frozen=True, eq=False)
class ReLU(Commuting):
    """``y = max(x, 0)``.

    >>> ReLU().forward(np.array([[-1.0, 2.0]]))
    array([[0., 2.]])
    """

    activation = True
    bounds = (0.0, math.inf)

    def forward(self, *inputs: Array) -> Array:
        return np.clip(inputs[0], 0, math.inf)  # unlike maximum, numpy's clip is vectorised for constant bounds

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return (cotangent * (inputs[0] > 0),)


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

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        (x,) = inputs
        return (np.where(x > 0, cotangent, cotangent * x.dtype.type(self.slope)),)

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        return _steeper_side(errors[0], inputs[0], u, np.asarray(abs(self.slope), inputs[0].dtype))


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

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        (x,) = inputs
        return (np.where(x > 0, cotangent, cotangent * along_channels(self.slope, x.ndim - 1).astype(x.dtype, copy=False)),)

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        (x,) = inputs
        return _steeper_side(errors[0], x, u, along_channels(np.abs(self.slope), x.ndim - 1).astype(x.dtype))


def _steeper_side(e: Array, x: Array, u: float, slope: Array) -> Array:
    """The error ``e`` times the larger slope, 1 or ``slope``, of the sides of zero within ``u * e`` of ``x``."""
    left, right = np.where(x < u * e, slope * e, 0), np.where(x > -u * e, e, 0)
    return np.maximum(left, right)


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

    @property
    def bounds(self) -> tuple[float | Array, float | Array]:
        return self.low, self.high

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

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        low, high = bounds_on(x, self.bounds)
        if low.size == high.size == 1:
            return np.clip(x, low, high)  # one vectorised pass; with bounds by channel clip is not, and two passes are faster
        y: Array = np.maximum(x, low)
        return np.minimum(y, high, out=y)

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        (x,) = inputs
        low, high = bounds_on(x, self.bounds)
        return (cotangent * ((x > low) & (x < high)),)

    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        super().rescale(f_out, *f_in)
        if np.all(f_out == f_out[0]) and isinstance(self.low, float) and isinstance(self.high, float):
            f_out = f_out[0]  # one bound for all channels stays one bound
        return replace(self, low=self.low * f_out, high=self.high * f_out)


@dataclass(frozen=True, eq=False)
class Affine(Commuting):
    """``y = slope * x + shift``, the same for all samples; both ``(C or 1, *spatial or 1)``, so that they may differ over space.

    For position embeddings, masks and windows; where nothing differs over space a BatchNorm does the same and absorbs factors. Here they
    pass: ``f * (slope * x + shift) == slope * (f * x) + f * shift``.

    >>> Affine(np.ones((1, 1)), np.array([[1.0, 2.0]])).forward(np.zeros((1, 1, 2)))
    array([[[1., 2.]]])
    """

    slope: Array
    shift: Array

    def __post_init__(self) -> None:
        for name in ("slope", "shift"):
            object.__setattr__(self, name, parameter(f"Affine {name}", getattr(self, name)))
        if self.slope.ndim != self.shift.ndim or not self.slope.ndim:
            raise ValueError("Affine needs a slope and a shift (C or 1, *spatial or 1), "
                             f"got shapes {self.slope.shape} and {self.shift.shape}")

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        for array in (self.slope, self.shift):
            if array.ndim != len(shape) or any(n not in (1, m) for n, m in zip(array.shape, shape, strict=True)):
                raise ValueError(f"Affine parameters of shape {array.shape} do not fit a value of shape {shape}")
        return tuple(shape)

    def forward(self, *inputs: Array) -> Array:
        y: Array = inputs[0] * self.slope
        y += self.shift
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return (cotangent * self.slope,)

    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        super().rescale(f_out, *f_in)
        f = along_channels(np.asarray(f_out), self.shift.ndim)
        if np.all(f == f.flat[0]) and len(self.shift) == 1:
            f = f[:1]  # one shift for all channels stays one
        return replace(self, shift=scaled(self.shift, f, "shift"))

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        passed: Array = errors[0] * np.abs(self.slope)
        return passed

    def rounds(self, inputs: Sequence[Array], output: Array) -> Array:
        return self.roundings * np.broadcast_to(np.abs(self.shift), output.shape)
