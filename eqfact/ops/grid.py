"""What is a uniform grid, and how is a number rounded to it?

``q = clip(round(x / scale) + zero_point, qmin, qmax)``, and back: ``scale * (q - zero_point)`` (PAPER 5). Weighted ops whose
weights lie on a grid carry it along, for exporters.

A sum of products of numbers on two grids is a whole multiple ``n * step`` of ``step = s_x * s_w``. Integer engines add up ``n`` exactly and
round ``n * M``, with one multiplier ``M = step / scale`` (Jacob et al., CVPR 2018, section 2.2). A float sum is close enough to tell the
same ``n``, so that the same whole numbers follow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from eqfact.ops.base import Array, parameter

ROUNDINGS = ("half_even", "half_away", "half_up", "floor")


@dataclass(frozen=True, eq=False)
class Grid:
    """A uniform grid: the numbers ``scale * (q - zero_point)`` for whole ``q`` from ``qmin`` to ``qmax``.

    ``scale`` and ``zero_point`` are float64 arrays that broadcast against the array on the grid.

    >>> grid = Grid(np.array(0.5), np.array(2.0), qmin=0, qmax=7)
    >>> grid.quantize(np.array([-3.0, 0.6, 1.0])), grid.dequantize([0, 2, 7])
    (array([0, 3, 4], dtype=int32), array([-1. ,  0. ,  2.5]))
    """

    scale: Array
    zero_point: Array
    qmin: int
    qmax: int
    rounding: str = "half_even"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", parameter("Grid scale", np.asarray(self.scale, np.float64)))
        object.__setattr__(self, "zero_point", parameter("Grid zero_point", np.asarray(self.zero_point, np.float64)))
        if not (self.scale > 0).all():
            raise ValueError(f"Grid scale must be positive, got {self.scale.min():g}")
        if self.qmin >= self.qmax or self.rounding not in ROUNDINGS:
            raise ValueError(f"Grid needs qmin < qmax and a rounding among {ROUNDINGS}, got {self.qmin}, {self.qmax}, {self.rounding!r}")
        if (self.zero_point < self.qmin).any() or (self.zero_point > self.qmax).any() or (self.zero_point % 1).any():
            raise ValueError(f"Grid zero_point must be whole and within [{self.qmin}, {self.qmax}], so that zero is on the grid")

    def astype(self, dtype: npt.DTypeLike) -> Grid:
        """The grid with scales that are numbers of ``dtype``, as engines keep them; one too small for it becomes 1 and holds zero alone."""
        scale = self.scale.astype(dtype)
        return replace(self, scale=np.where(scale < np.finfo(scale.dtype).tiny, 1.0, scale))

    def quantize(self, x: npt.ArrayLike, step: npt.ArrayLike | None = None) -> npt.NDArray[np.int32]:
        """The whole numbers ``q`` nearest to ``x`` on the grid, saturating at its ends.

        With ``step`` (which broadcasts against ``x``), ``x`` is taken for the whole multiple of it next to it, and rescaled as integer
        engines do: ``q = round(n * (step / scale)) + zero_point`` with ``n = round(x / step)``, the multiplier in the precision of ``x``.
        """
        x = np.asarray(x)
        dtype = self._precision(x)
        x, scale = x.astype(dtype, copy=False), self.scale.astype(dtype)
        with np.errstate(over="ignore"):  # what overflows saturates
            if step is None:
                unrounded = x / scale
                if self.rounding == "floor":  # what underflows is still below zero
                    unrounded = np.where((unrounded == 0) & (x < 0), -np.finfo(dtype).tiny, unrounded)
            else:
                step = np.asarray(step, dtype)
                n = np.rint(np.divide(x, step, dtype=np.float64))  # exact as long as x itself tells it
                unrounded = n.astype(dtype) * (step / scale)
            q = rounded(unrounded, self.rounding) + self.zero_point.astype(dtype)
        whole: npt.NDArray[np.int32] = np.clip(q, self.qmin, self.qmax).astype(np.int32)
        return whole

    def _precision(self, x: npt.NDArray[Any]) -> np.dtype[Any]:
        """That of ``x``, in which engines divide, too; float64 where it does not hold the scales or the whole numbers."""
        held = x.dtype == np.float32 and self.scale.min(initial=1) >= np.finfo(np.float32).tiny and max(-self.qmin, self.qmax) < 2**24
        return np.dtype(np.float32 if held else np.float64)

    def inside(self, x: Array) -> npt.NDArray[np.bool_]:
        """Where ``x`` is rounded; elsewhere it saturates.

        The nearest number of the grid is at most half a step away, so the range reaches half a step beyond its first and its last number:
        the largest weight stays inside, wherever the rounding of scale and zero point put the end. Where zero is the last number it ends
        there, as the ReLU before it does, that a quantized network leaves out.

        >>> Grid(np.array([0.1]), np.array([0.0]), 0, 15).inside(np.array([-0.01, 0.0, 1.54, 1.56]))
        array([False,  True,  True, False])
        """
        low, high = self.qmin - self.zero_point, self.qmax - self.zero_point
        ends = (self.scale * np.where(low < 0, low - 0.5, 0), self.scale * np.where(high > 0, high + 0.5, 0))
        below, above = (end.astype(x.dtype) for end in ends)
        found: npt.NDArray[np.bool_] = (x >= below) & (x <= above)
        return found

    def vjp(self, cotangent: Array, x: Array) -> tuple[Array, Array]:
        """The cotangents of ``scale`` and ``zero_point`` for one of ``y = fake_quantize(x)``: float64, in the shape of ``scale``.

        ``y = scale (clip(r, qmin, qmax) - zero_point)``, where ``r = x / scale + zero_point + (what rounding added, a constant)``. So
        ``dy/dscale = (y - x) / scale`` and ``dy/dzero_point = 0`` inside, as the scales cancel but for what rounding added; and
        ``dy/dscale = y / scale``, ``dy/dzero_point = -scale`` where ``x`` saturates (Esser et al., ICLR 2020, equation 3).

        >>> Grid(np.array([1.0]), np.array([0.0]), -8, 7).vjp(np.ones(2), np.array([0.25, 9.0]))  # -0.25 + 7, and -1
        (array([6.75]), array([-1.]))
        """
        inside, shape = self.inside(x), self.scale.shape
        off = self.fake_quantize(x)
        off -= x * inside
        off *= cotangent
        by_scale = _reduced(off, shape) / self.scale
        return by_scale, -self.scale * _reduced(cotangent * ~inside, shape)

    def dequantize(self, q: npt.ArrayLike) -> Array:
        """The numbers that ``q`` stands for, in float64."""
        return self.scale * (np.asarray(q, np.float64) - self.zero_point)

    def fake_quantize(self, x: Array, step: npt.ArrayLike | None = None) -> Array:
        """``dequantize(quantize(x, step))`` in the dtype of ``x``."""
        return self.dequantize(self.quantize(x, step)).astype(x.dtype)


def rounded(x: Array, rounding: str) -> Array:
    """``x`` rounded to whole numbers by the named rule.

    >>> [rounded(np.array([0.5, 1.5, -0.5]), r).tolist() for r in ("half_away", "half_up")]
    [[1.0, 2.0, -1.0], [1.0, 2.0, 0.0]]
    """
    if rounding == "half_even":
        return np.rint(x)
    if rounding == "floor":
        return np.floor(x)
    # x + 0.5 would round up just below a half; these differences decide rightly
    whole = np.floor(x) if rounding == "half_up" else np.trunc(x)
    with np.errstate(invalid="ignore"):  # infinity stays what it is
        if rounding == "half_up":
            return whole + (x - whole >= 0.5)
        return whole + np.copysign(np.abs(x - whole) >= 0.5, x)


def _reduced(array: Array, shape: tuple[int, ...]) -> Array:
    """Summed up to a shape that broadcasts to the array's."""
    lead = array.ndim - len(shape)
    axes = (*range(lead), *(lead + i for i, n in enumerate(shape) if n == 1))
    total: Array = array.sum(axis=axes, keepdims=True, dtype=np.float64)
    return total.reshape(shape)
