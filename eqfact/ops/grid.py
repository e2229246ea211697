"""What is a uniform grid, and how is a number rounded to it?

``q = clip(round(x / scale) + zero_point, qmin, qmax)``, and back: ``scale * (q - zero_point)`` (PAPER 5). Weighted ops whose
weights lie on a grid carry it along, for exporters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eqfact.ops.base import Array, parameter

ROUNDINGS = ("half_even", "half_away", "half_up", "floor")



@dataclass(frozen=True, eq=False)
class Grid:
    """A uniform grid: the numbers ``scale * (q - zero_point)`` for whole ``q`` from ``qmin`` to ``qmax``.

    ``scale`` and ``zero_point`` are float64 arrays that broadcast against the array on the grid.
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

    def quantize(self, x: npt.ArrayLike) -> npt.NDArray[np.int32]:
        """The whole numbers ``q`` nearest to ``x`` on the grid, saturating at its ends."""
        with np.errstate(over="ignore"):  # what overflows saturates
            q = rounded(np.asarray(x, np.float64) / self.scale, self.rounding) + self.zero_point
        return np.clip(q, self.qmin, self.qmax).astype(np.int32)

    def dequantize(self, q: npt.ArrayLike) -> Array:
        """The numbers that ``q`` stands for, in float64."""
        return self.scale * (np.asarray(q, np.float64) - self.zero_point)

    def fake_quantize(self, x: Array) -> Array:
        """``dequantize(quantize(x))`` in the dtype of ``x``."""
        return self.dequantize(self.quantize(x)).astype(x.dtype)


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
