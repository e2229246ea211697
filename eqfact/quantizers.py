"""How do numbers get onto a grid? ``q = clip(round(x / scale) + zero_point, qmin, qmax)``, and back, ``scale * (q - zero_point)``.

PAPER 5 and 6. A :class:`UniformQuantizer` says which grids there are, :class:`~eqfact.ops.grid.Grid` is one with its numbers, and
:class:`FakeQuantize` is the op that rounds an activation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from eqfact.accumulators import ACCUMULATOR
from eqfact.calibration import ValueStatistics
from eqfact.clips import RANGES, Entries, clipped, of_histogram, of_numbers, together
from eqfact.ops.base import Array, Blocking, Op, Shape, Weighted, along_channels, one_input, parameter
from eqfact.ops.grid import ROUNDINGS, Grid

GRANULARITIES = ("per_tensor", "per_channel", "per_group")


@dataclass(frozen=True)
class UniformQuantizer:
    """A family of uniform grids: how many bits, symmetric or affine, and which entries share a grid.

    ``bits`` from 2 to 16; weights of 7 are what engines call *reduce_range*: stored in 8 bits, exact where pairs of products are added in
    16 (docs/integers.md). ``symmetric``: the range is ``[-a, a]`` and zero sits in the middle; else *affine*: the range is
    ``[min, max]``, widened to hold zero. ``signed`` by default if symmetric, unsigned if affine. ``granularity`` is
    ``"per_tensor"``, ``"per_channel"`` (weights: output channels) or ``"per_group"`` (weights: runs of ``group_size`` input
    channels of every output channel). ``narrow_range`` leaves out the lowest number, so that a signed grid is symmetric.
    ``rounding`` is ``"half_even"``, ``"half_away"``, ``"half_up"`` or ``"floor"``. Zero is always on the grid exactly; a range of 0 gets
    scale 1.

    ``range`` is the rule that grids end by (:mod:`eqfact.clips`): at the extrema, ``"minmax"``; where ``percentile`` percent of the entries
    end, ``"percentile"``; where the expected error of rounding and saturation is least, ``"mse"``, or the divergence of distributions,
    ``"entropy"``; or where the noise that is expected to reach the output is least, ``"noise"``, which takes sensitivities. What lies
    outside saturates. Weights are looked at one by one, activations in the histograms of their statistics.

    >>> UniformQuantizer(bits=8).grid(-1.0, 0.5).fake_quantize(np.array([-1.0, 0.0]))
    array([-1.,  0.])
    """

    bits: int = 8
    symmetric: bool = True
    granularity: str = "per_tensor"
    signed: bool | None = None
    narrow_range: bool = False
    rounding: str = "half_even"
    group_size: int | None = None
    range: str = "minmax"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, (int, np.integer)) or not 2 <= self.bits <= 16:
            raise ValueError(f"bits must be an integer from 2 to 16, got {self.bits!r}")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {GRANULARITIES}, got {self.granularity!r}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {ROUNDINGS}, got {self.rounding!r}")
        if (self.granularity == "per_group") != (self.group_size is not None):
            raise ValueError(f"group_size goes with granularity 'per_group', got {self.group_size} with {self.granularity!r}")
        if self.group_size is not None and (not isinstance(self.group_size, (int, np.integer)) or self.group_size < 1):
            raise ValueError(f"group_size must be a positive integer, got {self.group_size!r}")
        if self.range not in RANGES:
            raise ValueError(f"range must be one of {RANGES}, got {self.range!r}")
        if not 50 <= self.percentile <= 100:
            raise ValueError(f"percentile must be a number from 50 to 100, got {self.percentile!r}")

    @property
    def qmin(self) -> int:
        """Smallest whole number of the grid."""
        lowest = -(1 << (self.bits - 1)) if self._signed else 0
        return lowest + int(self.narrow_range)

    @property
    def qmax(self) -> int:
        """Largest whole number of the grid."""
        return (1 << (self.bits - 1)) - 1 if self._signed else (1 << self.bits) - 1

    @property
    def steps(self) -> int:
        """The steps of the whole range of an affine grid; of a symmetric one those from zero to its end."""
        if not self.symmetric:
            return self.qmax - self.qmin
        return self.qmax - (0 if self._signed else 1 << (self.bits - 1))

    @property
    def _signed(self) -> bool:
        return self.symmetric if self.signed is None else self.signed

    def grid(self, low: npt.ArrayLike, high: npt.ArrayLike) -> Grid:
        """The grid for values from ``low`` to ``high`` (arrays: one grid an entry).

        Symmetric: ``scale = max(|low|, |high|) / n`` with ``n`` the steps from the zero point to ``qmax``, so that the largest
        magnitude is on the grid. Affine: ``scale = (high - low) / (qmax - qmin)``.
        """
        low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError("a range to quantize must be finite, got NaN or infinity")
        if (low > high).any():
            raise ValueError(f"a range to quantize must not be empty, got low {low.max():g} above high {high.min():g}")
        if self.symmetric:
            zero = 0 if self._signed else 1 << (self.bits - 1)
            scale = np.maximum(np.abs(low), np.abs(high)) / (self.qmax - zero)
            zero_point = np.full_like(scale, zero)
        else:
            below, above = np.minimum(low, 0), np.maximum(high, 0)
            scale = above / (self.qmax - self.qmin) - below / (self.qmax - self.qmin)
            exact = np.divide(below, scale, out=np.zeros_like(scale), where=scale > 0)
            zero_point = np.clip(np.rint(self.qmin - exact), self.qmin, self.qmax)
        # a range of 0 (or so small that a step underflows) holds zero alone
        return Grid(np.where(scale > np.finfo(np.float64).tiny, scale, 1.0), zero_point, self.qmin, self.qmax, self.rounding)

    def range_vjp(self, low: Array, high: Array, by_scale: Array, by_zero_point: Array) -> tuple[Array, Array]:
        """The cotangents of ``low`` and ``high`` from those of the scale and the zero point that :meth:`grid` makes of them.

        Affine, with ``n = qmax - qmin``: ``scale = (high - low) / n`` and ``zero_point = qmin - low / scale + (what rounding added, a
        constant)``. An end at zero stays there, as ranges hold zero. Symmetric: the range is ``[-a, a]``, and the two ends share what ``a``
        gets.

        >>> UniformQuantizer(4, symmetric=False).range_vjp(np.array([0.0]), np.array([3.0]), np.array([15.0]), np.array([-0.2]))
        (array([0.]), array([1.]))
        """
        if self.symmetric:
            half = by_scale / (2 * self.steps)
            return -half, half
        below, above = np.minimum(low, 0), np.maximum(high, 0)
        scale = (above - below) / self.steps
        scale = np.where(scale > 0, scale, 1)
        by_width = (by_scale + by_zero_point * below / scale**2) / self.steps
        return np.where(below < 0, -by_zero_point / scale - by_width, 0), np.where(above > 0, by_width, 0)

    def weight_range(self, op: Weighted, sensitivities: npt.NDArray[np.float64] | None = None) -> tuple[Array, Array]:
        """The ranges of the grids of an op's weights, in shapes that broadcast against ``(out, in // groups, *kernel)``.

        The extrema of the weights that share a grid, or within these by the rule; ``sensitivities`` are those of the weights, ``(groups,
        out // groups, in // groups)``, which ``"noise"`` needs.
        """
        w = op.weight
        if self.granularity == "per_group" and self.group_size is not None and self.group_size < w.shape[1]:
            starts = np.arange(0, w.shape[1], self.group_size)
            axes: Any = tuple(range(2, w.ndim))
            group = np.arange(w.shape[1]) // self.group_size
            low, high = (extreme.reduceat(extreme.reduce(w, axis=axes, keepdims=True), starts, axis=1)[:, group]
                         for extreme in (np.minimum, np.maximum))
            columns = [slice(start, start + self.group_size) for start in starts.tolist()]
        else:
            axes = tuple(range(w.ndim)) if self.granularity == "per_tensor" else tuple(range(1, w.ndim))
            low, high = w.min(axis=axes, keepdims=True), w.max(axis=axes, keepdims=True)
            columns = [slice(None)]
        if self.range == "minmax":
            return low, high
        low, high, weights = low.astype(np.float64), high.astype(np.float64), self._weighing(w, sensitivities)
        rows = [slice(None)] if len(low) == 1 else [slice(row, row + 1) for row in range(len(low))]
        for grid in ((row, column) for row in rows for column in columns):
            ends = self._clipped(of_numbers(w[grid], weights[grid]), float(low[grid].flat[0]), float(high[grid].flat[0]))
            low[grid], high[grid] = ends
        return low, high

    def _weighing(self, w: Array, sensitivities: npt.NDArray[np.float64] | None) -> npt.NDArray[np.float64]:
        """How much the square of each weight's error counts, for ``"noise"``: taps share their sensitivity."""
        if self.range != "noise":
            return np.ones_like(w, np.float64)
        if sensitivities is None:
            raise ValueError("range 'noise' needs sensitivities of these weights: give sensitivities=gradient_sensitivities(graph, images)")
        axes = tuple(np.arange(2, w.ndim))
        live = np.maximum(np.count_nonzero(w, axis=axes, keepdims=True), 1)
        return np.broadcast_to(sensitivities.reshape(live.shape) / live, w.shape)

    def weight_grid(self, op: Weighted, sensitivities: npt.NDArray[np.float64] | None = None) -> Grid:
        """The grid for the weights of an op, ``(out, in // groups, *kernel)``, by granularity and rule."""
        return self.grid(*self.weight_range(op, sensitivities))

    def value_range(self, stats: ValueStatistics, sensitivities: npt.NDArray[np.float64] | None = None) -> tuple[Array, Array]:
        """The ranges of an activation's grids by the rule, ``(1,)`` for the tensor, or ``(C,)``; ``"noise"`` needs ``sensitivities``."""
        low, high = self.activation_range(stats.min, stats.max)
        if self.range == "minmax":
            return low, high
        if stats.histogram is None:
            raise ValueError(f"range {self.range!r} needs a histogram, which these statistics do not hold: give those of "
                             "calibrate(graph, batches), or range='minmax'")
        if self.range == "noise" and sensitivities is None:
            raise ValueError("range 'noise' needs sensitivities of this value: give sensitivities=gradient_sensitivities(graph, images)")
        entries = of_histogram(stats.histogram, stats.min, stats.max, sensitivities if self.range == "noise" else None)
        entries = [together(entries)] if len(low) == 1 else entries
        ends = np.array([self._clipped(e, a, b) for e, a, b in zip(entries, low.tolist(), high.tolist(), strict=True)])
        return ends[:, 0], ends[:, 1]

    def _clipped(self, entries: Entries, low: float, high: float) -> tuple[float, float]:
        return clipped(entries, self.range, low, high, steps=self.steps, symmetric=self.symmetric, percentile=self.percentile)

    def activation_range(self, low: Array, high: Array) -> tuple[Array, Array]:
        """Of the extrema ``(C,)`` of an activation, those of its grids: ``(1,)`` for the tensor, or ``(C,)``."""
        if self.granularity == "per_group":
            raise ValueError("granularity 'per_group' is for weights; quantize activations per_tensor or per_channel")
        if self.granularity == "per_tensor":
            low, high = low.min(keepdims=True), high.max(keepdims=True)
        return low, high

    def activation_grid(self, low: Array, high: Array) -> Grid:
        """The grid for an activation with these extrema ``(C,)``: one for the tensor, or ``(C,)`` of them."""
        return self.grid(*self.activation_range(low, high))


@dataclass(frozen=True, eq=False)
class FakeQuantize(Blocking):
    """Round a value to a grid, ``scale`` and ``zero_point`` one for the tensor or ``(C,)``; pins what it touches.

    ``step``, ``(1,)`` or ``(C,)``: the value is made of whole multiples of it, an integer engine's sums, and is rescaled as there
    (:meth:`Grid.quantize`); :class:`ValueError` if one does not fit into 32 bits.

    >>> FakeQuantize(UniformQuantizer(bits=2, symmetric=False).grid([0.0], [3.0])).forward(np.array([[0.6, 9.0]]))
    array([[1., 3.]])
    """

    grid: Grid
    step: Array | None = None
    reason = "has a fixed grid"

    def __post_init__(self) -> None:
        if not isinstance(self.grid, Grid):
            raise TypeError(f"FakeQuantize needs a Grid, got {self.grid!r}: UniformQuantizer(...).grid(low, high) makes one")
        if self.step is not None:
            object.__setattr__(self, "step", parameter("FakeQuantize step", np.asarray(self.step, np.float64), 1))
            if not (self.step > 0).all():
                raise ValueError(f"FakeQuantize step must be positive, got {self.step.min():g}")

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        for name, numbers in (("scales", self.grid.scale), ("steps", self.step)):
            if numbers is not None and numbers.shape not in ((1,), (shape[0],)):
                raise ValueError(f"FakeQuantize has {name} of shape {numbers.shape} for {shape[0]} channels")
        return shape

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        step = None if self.step is None else along_channels(self.step, x.ndim - 1)
        if self.step is not None:
            sums = np.abs(x).max(axis=(0, *range(2, x.ndim)), initial=0).astype(np.float64) / self.step
            if sums.max() >= ACCUMULATOR:
                channel = int(np.argmax(sums))
                raise ValueError(f"channel {channel}: a sum of {sums[channel]:.10g} steps does not fit into an integer engine's 32 bits, "
                                 f"which hold less than {ACCUMULATOR}; raise the scale of the weights, as eqfact.quantize does")
        return self._along(x).fake_quantize(x, step)

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        """Straight through, as if nothing were rounded, where the value lies in the range of the grid; 0 where it saturates."""
        return (cotangent * self._along(inputs[0]).inside(inputs[0]),)

    def grid_vjp(self, cotangent: Array, x: Array) -> tuple[Array, Array]:
        """The cotangents of the grid's scale and zero point, in their shapes (:meth:`Grid.vjp`)."""
        by_scale, by_zero_point = self._along(x).vjp(cotangent, x)
        return by_scale.reshape(self.grid.scale.shape), by_zero_point.reshape(self.grid.scale.shape)

    def _along(self, x: Array) -> Grid:
        """The grid, to broadcast against a value."""
        return replace(self.grid, scale=along_channels(self.grid.scale, x.ndim - 1),
                       zero_point=along_channels(self.grid.zero_point, x.ndim - 1))

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        """Rounding is monotone: how far the ends of the interval come apart."""
        (e,), (x,) = errors, inputs
        with np.errstate(over="ignore"):
            low, middle, high = (self.forward(v) for v in (x - u * e, x, x + u * e))
        return np.maximum(high - middle, middle - low) / x.dtype.type(u)

    rounds = Op.rounds


def check_quantizers(weights: object, activations: object) -> None:
    """An error if one of the two is neither a quantizer nor None."""
    for argument, quantizer in (("weights", weights), ("activations", activations)):
        if not isinstance(quantizer, UniformQuantizer | None):
            raise TypeError(f"{argument} must be a quantizer or None (float), got {quantizer!r}: "
                            "give for instance UniformQuantizer(bits=8)")


def clips(*quantizers: UniformQuantizer | None) -> bool:
    """Does one of the quantizers end its grids by another rule than the extrema?"""
    return any(q is not None and q.range != "minmax" for q in quantizers)


def effective_bits(ranges: Array, bits: int) -> Array:
    """How many of a tensor's bits each channel gets, ``bits - log2(largest range / range)``; minus infinity for dead channels.

    >>> effective_bits(np.array([1.0, 0.25]), 8)
    array([8., 6.])
    """
    top = float(np.max(ranges, initial=0.0))
    with np.errstate(divide="ignore"):
        return bits + np.log2(ranges / top) if top > 0 else np.full(len(ranges), -math.inf)
