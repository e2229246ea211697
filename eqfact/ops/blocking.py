"""Which layers let no factor pass? Curves that are not positively homogeneous, Softmax, and products of values.

All that they read and make is pinned to the factor 1. Each states the bound on its slope, for the rounding bound of
:func:`eqfact.verify`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import special

from eqfact.ops.base import Array, Blocking, Shape, one_input
from eqfact.ops.joining import common_shape, unbroadcast


@dataclass(frozen=True, eq=False)
class Sigmoid(Blocking):
    """``y = 1 / (1 + exp(-x))``."""

    lipschitz = 0.25

    def forward(self, *inputs: Array) -> Array:
        y: Array = special.expit(inputs[0])
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        y = self.forward(*inputs)
        return (cotangent * y * (1 - y),)


@dataclass(frozen=True, eq=False)
class Tanh(Blocking):
    """``y = tanh(x)``."""

    def forward(self, *inputs: Array) -> Array:
        return np.tanh(inputs[0])

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return (cotangent * (1 - self.forward(*inputs) ** 2),)


@dataclass(frozen=True, eq=False)
class SiLU(Blocking):
    """``y = x / (1 + exp(-x))`` (swish)."""

    lipschitz = 1.1

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        y: Array = x * special.expit(x)
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        s = special.expit(inputs[0])
        return (cotangent * s * (1 + inputs[0] * (1 - s)),)


@dataclass(frozen=True, eq=False)
class HardSwish(Blocking):
    """``y = x * min(max(x / 6 + 1/2, 0), 1)``."""

    lipschitz = 1.5

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        y: Array = x * np.clip(x / 6 + x.dtype.type(0.5), 0, 1)
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        (x,) = inputs
        return (cotangent * np.where(x >= 3, 1, np.where(x <= -3, 0, x / 3 + x.dtype.type(0.5))),)


@dataclass(frozen=True, eq=False)
class HardSigmoid(Blocking):
    """``y = min(max(alpha * x + beta, 0), 1)``; the defaults are those of ONNX, PyTorch has ``alpha = 1/6``.

    >>> HardSigmoid().forward(np.array([[-3.0, 0.0, 1.0]]))
    array([[0. , 0.5, 0.7]])
    """

    alpha: float = 0.2
    beta: float = 0.5

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            object.__setattr__(self, name, float(getattr(self, name)))
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"HardSigmoid {name} must be finite, got {getattr(self, name)}")

    @property
    def lipschitz(self) -> float:  # type: ignore[override]
        """The slope between the two limits."""
        return abs(self.alpha)

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        y: Array = np.clip(x * x.dtype.type(self.alpha) + x.dtype.type(self.beta), 0, 1)
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        y = self.forward(*inputs)
        return (cotangent * inputs[0].dtype.type(self.alpha) * ((y > 0) & (y < 1)),)


@dataclass(frozen=True, eq=False)
class Erf(Blocking):
    """``y = erf(x)``, out of which exporters build GELU."""

    lipschitz = 1.13

    def forward(self, *inputs: Array) -> Array:
        y: Array = special.erf(inputs[0])
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return (cotangent * inputs[0].dtype.type(2 / math.sqrt(math.pi)) * np.exp(-(inputs[0] ** 2)),)


@dataclass(frozen=True, eq=False)
class GELU(Blocking):
    """``y = x Phi(x)`` with the normal distribution function, or its approximation by ``tanh`` if ``approximate``."""

    approximate: bool = False
    lipschitz = 1.13

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        if not self.approximate:
            y: Array = x * special.ndtr(x)
            return y
        inner = x.dtype.type(math.sqrt(2 / math.pi)) * (x + x.dtype.type(0.044715) * x * x * x)
        y = x.dtype.type(0.5) * x * (1 + np.tanh(inner))
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        (x,) = inputs
        if not self.approximate:
            density = np.exp(-(x**2) / 2) * x.dtype.type(1 / math.sqrt(2 * math.pi))
            return (cotangent * (special.ndtr(x) + x * density),)
        root = x.dtype.type(math.sqrt(2 / math.pi))
        t = np.tanh(root * (x + x.dtype.type(0.044715) * x * x * x))
        slope = (1 + t) / 2 + x / 2 * (1 - t * t) * root * (1 + x.dtype.type(3 * 0.044715) * x * x)
        return (cotangent * slope,)


@dataclass(frozen=True, eq=False)
class Softmax(Blocking):
    """``y = exp(x) / sum(exp(x))`` along ``axis`` of ``(N, C, *spatial)``, the channels by default.

    >>> Softmax().forward(np.zeros((1, 4)))
    array([[0.25, 0.25, 0.25, 0.25]])
    """

    axis: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.axis, (int, np.integer)) or self.axis == 0:
            raise ValueError(f"Softmax axis must be an integer other than 0 (the batch), got {self.axis!r}")
        object.__setattr__(self, "axis", int(self.axis))

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        if not -len(shape) <= self.axis <= len(shape):
            raise ValueError(f"Softmax axis {self.axis} is none of a value (N, {', '.join(map(str, shape))})")
        return tuple(shape)

    def forward(self, *inputs: Array) -> Array:
        y: Array = special.softmax(inputs[0], axis=self.axis)
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        weighted = cotangent * (y := self.forward(*inputs))
        return (weighted - y * weighted.sum(axis=self.axis, keepdims=True),)

    def magnitude(self, *inputs: Array) -> Array:
        (m,) = inputs
        # |dy_i| <= y_i (|dx_i| + max |dx|) <= 2 max |dx|
        return np.broadcast_to(2 * m.max(axis=self.axis, keepdims=True) + 1, m.shape)


@dataclass(frozen=True, eq=False)
class Mul(Blocking):
    """Product of two values, entry by entry; a spatial axis of size 1 is broadcast (squeeze and excite)."""

    reason = "multiplies two values, whose factors would multiply too"

    def output_shape(self, *shapes: Shape) -> Shape:
        return common_shape(self, shapes)

    def forward(self, *inputs: Array) -> Array:
        y: Array = math.prod(inputs[1:], start=inputs[0])
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        others = (math.prod((v for j, v in enumerate(inputs) if j != i), start=cotangent) for i in range(len(inputs)))
        return tuple(unbroadcast(product, x.shape) for product, x in zip(others, inputs, strict=True))

    def magnitude(self, *inputs: Array) -> Array:
        # a product takes the relative errors of all its inputs
        return len(inputs) * self.forward(*inputs)
