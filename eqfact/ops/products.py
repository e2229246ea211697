"""Which layers multiply values with each other, so that their factors multiply, too?

``y = a b`` asks for ``u_y = u_a + u_b`` of the logarithms of factors, whatever ``a`` and ``b`` are (docs/algebra.md): gates, squeeze and
excite, and the two products of attention. Nothing is pinned here; what an activation or an output pins besides decides what is free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eqfact.ops.base import Array, Labels, Op, Shape, Trace
from eqfact.ops.joining import common_shape, unbroadcast

#: Factors that multiply are rounded, each once; so far may a product of them be off, relatively.
ROUNDING = 1e-12


def check_product(op: Op, f_out: Array, *f_in: Array) -> None:
    """:class:`ValueError` unless the factors of the output are the products of those of the inputs, channel by channel."""
    expected = np.asarray(math.prod(f_in[1:], start=f_in[0]))
    apart = np.abs(f_out - expected) > ROUNDING * expected
    if apart.any():
        channel = int(np.argmax(apart))
        raise ValueError(f"{type(op).__name__} multiplies values, so their factors multiply: channel {channel} of its output must have "
                         f"the factor {np.broadcast_to(expected, np.shape(f_out))[channel]:g}, got {f_out[channel]:g}")


def passes_through_product(errors: Sequence[Array], inputs: Sequence[Array], u: float) -> list[tuple[Array, ...]]:
    """The factors of each summand of a bound on the error of a product: the error of one input, and what the others may come to."""
    largest = [np.abs(x) + u * e for e, x in zip(errors, inputs, strict=True)]
    return [(*largest[:i], e, *largest[i + 1:]) for i, e in enumerate(errors)]


@dataclass(frozen=True, eq=False)
class Mul(Op):
    """Product of two values or more, entry by entry; an axis of size 1 is broadcast (squeeze and excite). Their factors multiply.

    >>> Mul().forward(np.array([[3.0, 1.0]]), np.array([[2.0, 4.0]]))
    array([[6., 4.]])
    """

    def output_shape(self, *shapes: Shape) -> Shape:
        return common_shape(self, shapes)

    def trace(self, trace: Trace, *inputs: Labels) -> Labels:
        y = trace.fresh(self.output_shape(*(x.shape for x in inputs)))
        trace.relate((1, y), *((-1, x) for x in inputs), reason="Mul multiplies values, and the factors of the others leave it none")
        return y

    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        check_product(self, f_out, *f_in)
        return self

    def forward(self, *inputs: Array) -> Array:
        y: Array = math.prod(inputs[1:], start=inputs[0])
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        others = (math.prod((v for j, v in enumerate(inputs) if j != i), start=cotangent) for i in range(len(inputs)))
        return tuple(unbroadcast(product, x.shape) for product, x in zip(others, inputs, strict=True))

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        """The error of each input times what the others may come to."""
        result: Array = sum(self.forward(*summand) for summand in passes_through_product(errors, inputs, u))  # type: ignore[assignment]
        return result
