"""Where should a grid end? Numbers beyond its end saturate, and all others have finer steps.

Of entries ``x`` with weights ``w``, a grid of ``steps`` steps that ends at ``-l`` and ``h`` is expected to make the error

    E(l, h) = (l + h)**2 / (12 steps**2) sum of all w  +  sum w (|x| - end)**2 over the x beyond the end on their side,

rounding and saturation; a symmetric grid has one end, ``h``, for magnitudes, and no ``l``. Zeros lie on every grid and do not count. What
saturates counts as rounded, too: it is little, and keeps ``E`` convex, so that its minimum is found exactly (and, with factors and ends
alternated, every step is a descent: :mod:`eqfact.methods`). Other rules know nothing of errors: percentiles, and the least divergence of
distributions (Migacz, 8-bit inference with TensorRT, GTC 2017). Every rule stays within the extrema.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eqfact.histograms import Histogram
from eqfact.ops.base import Array

Vector = npt.NDArray[np.float64]

#: The rules: extrema; percentiles; least expected error; least divergence; least expected noise at the output.
RANGES = ("minmax", "percentile", "mse", "entropy", "noise")
#: Bins of equal width over all magnitudes, for the divergence, and by how many of them ends are tried (Migacz: 2048, every one).
LINEAR_BINS, TRIED = 2048, 16


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries that share a grid, zeros apart: ``values`` ``(n,)``, how often each occurs, how much the square of its error counts.

    ``widths`` ``(n,)``: the entries are spread evenly over bins so wide around the values; None if these are exact. ``zeros``: how many.
    """

    values: Vector
    counts: Vector
    weights: Vector
    zeros: float
    widths: Vector | None = None


def of_numbers(numbers: Array, weights: npt.ArrayLike = 1.0) -> Entries:
    """Numbers of any shape as entries; ``weights`` broadcast against them.

    >>> of_numbers(np.array([0.0, 2.0])).values, of_numbers(np.array([0.0, 2.0])).zeros
    (array([2.]), 1.0)
    """
    live = numbers != 0
    values = numbers[live].astype(np.float64)
    return Entries(values, np.ones(len(values)), np.broadcast_to(np.asarray(weights, np.float64), numbers.shape)[live],
                   float(numbers.size - len(values)))


def of_histogram(histogram: Histogram, low: Array, high: Array, weights: Vector | None = None) -> list[Entries]:
    """The entries of every channel, in the middles of their bins and within the extrema ``(C,)``.

    ``weights`` ``(C,)``: of all live entries of a channel together.
    """
    live, zeros = histogram.live, histogram.zeros.astype(np.float64)
    each = np.ones(len(live)) if weights is None else weights / np.maximum(live, 1)
    values, widths = histogram.values(low, high), histogram.widths
    found = []
    for channel, counts in enumerate(histogram.counts):
        sign, place = np.nonzero(counts)
        n = counts[sign, place].astype(np.float64)
        found.append(Entries(values[channel, sign, place], n, n * each[channel], float(zeros[channel]), widths[channel, place]))
    return found


def together(parts: list[Entries]) -> Entries:
    """The entries of several channels that share a grid."""
    widths = [part.widths for part in parts if part.widths is not None]
    return Entries(np.concatenate([part.values for part in parts]), np.concatenate([part.counts for part in parts]),
                   np.concatenate([part.weights for part in parts]), sum(part.zeros for part in parts),
                   np.concatenate(widths) if len(widths) == len(parts) else None)


def clipped(entries: Entries, rule: str, low: float, high: float, *, steps: float, symmetric: bool, percentile: float = 99.99,
            ) -> tuple[float, float]:
    """The range ``(low, high)`` of a grid by a rule of ``RANGES``, from the extrema; symmetric grids reach as far on either side.

    ``steps``: those of the whole range of an affine grid, or from 0 to the end of a symmetric one.

    >>> low, high = clipped(of_numbers(np.array([1.0] * 999 + [4.0])), "mse", 1.0, 4.0, steps=15, symmetric=False)
    >>> low, round(high, 2)
    (1.0, 2.92)
    """
    if rule == "minmax" or not entries.values.size or (rule == "noise" and not entries.weights.any()):
        return low, high
    if rule == "percentile":
        below, above = percentile_ends(entries, percentile, symmetric)
    elif rule == "entropy":
        below = above = least_divergence(entries, steps, symmetric)
    else:
        below, above = least_error(entries, entries.counts if rule == "mse" else entries.weights, steps, symmetric)
    return max(low, min(-below, 0.0)), min(high, max(above, 0.0))


def least_error(entries: Entries, weights: Vector, steps: float, symmetric: bool) -> tuple[float, float]:
    """The ends ``(l, h)`` of the least ``E``, exactly; both the same for symmetric grids. Some weight must be positive.

    Where ``E`` is least, ``m = (l + h) sum w / (12 steps**2)`` is at either end what lies beyond, ``sum w (|x| - end)``. This falls as the
    end moves out, in straight lines between the entries. So ``l`` and ``h`` are piecewise linear in ``m``, and so is the equation for it.
    """
    largest, whole = float(np.abs(entries.values).max()), float(weights.sum())
    values, weights = entries.values / largest, weights / whole  # so that nothing underflows
    sides = [np.ones(len(values), bool)] if symmetric else [values < 0, values > 0]
    pieces = [_beyond(np.abs(values[side]), weights[side]) for side in sides]

    def ends(m: Vector) -> list[Vector]:
        return [np.interp(m, beyond[::-1], end[::-1]) for end, beyond in pieces]
    knots = np.unique(np.concatenate([beyond for _, beyond in pieces]))
    excess = np.sum(ends(knots), axis=0) / (12 * steps**2) - knots  # falls, from above 0 where nothing lies beyond
    last = int(np.argmax(excess <= 0))
    part = excess[last - 1] / (excess[last - 1] - excess[last])
    found = [largest * float(end) for end in ends(knots[last - 1] + part * (knots[last] - knots[last - 1]))]
    return found[0], found[-1]


def _beyond(magnitudes: Vector, weights: Vector) -> tuple[Vector, Vector]:
    """At 0 and at every magnitude, rising, the sum of ``w (x - end)`` over the ``x`` beyond."""
    order = np.argsort(magnitudes)
    end = np.concatenate([[0.0], magnitudes[order]])
    steps = np.diff(end) * np.cumsum(weights[order][::-1])[::-1]  # times the weight beyond each end
    return end, np.concatenate([np.cumsum(steps[::-1])[::-1], [0.0]])


def percentile_ends(entries: Entries, percentile: float, symmetric: bool) -> tuple[float, float]:
    """The ends ``(l, h)``: of magnitudes the percentile; or of values this one, and the ``100 - percentile``-th."""
    zero = np.array([0.0])
    values, counts = np.concatenate([entries.values, zero]), np.concatenate([entries.counts, zero + entries.zeros])
    if symmetric:
        end = _quantile(np.abs(values), counts, percentile)
        return end, end
    return _quantile(-values, counts, percentile), _quantile(values, counts, percentile)


def _quantile(values: Vector, counts: Vector, percentile: float) -> float:
    """The smallest value that is not exceeded by this percentage (``np.percentile`` of method ``"inverted_cdf"``)."""
    order = np.argsort(values)
    share = np.cumsum(counts[order])
    wanted = percentile / 100 * share[-1]
    return float(values[order][np.searchsorted(share, wanted * (1 - 1e-12))])


def least_divergence(entries: Entries, steps: float, symmetric: bool) -> float:
    """The end for magnitudes whose clipped distribution loses the least to rounding, by Kullback and Leibler's divergence.

    Over ``LINEAR_BINS`` bins of equal width: ``P`` is the distribution with all that lies beyond in the last bin, ``Q`` that without it,
    the bins averaged, as far as they hold something, over the numbers of the grid (Migacz 2017). A grid that is finer than the bins ends
    at the largest magnitude.
    """
    magnitudes = np.abs(entries.values)
    largest = float((magnitudes if entries.widths is None else magnitudes + entries.widths / 2).max())
    signs = np.unique(np.sign(entries.values)).size
    levels = math.ceil(steps if symmetric else steps / signs)
    if levels > LINEAR_BINS:
        return largest
    edges = np.linspace(0.0, largest, LINEAR_BINS + 1)
    linear = np.histogram(magnitudes, edges, weights=entries.counts)[0] if entries.widths is None else \
        np.diff(_distribution(magnitudes, entries.widths, entries.counts, edges))
    tried = [*range(levels, LINEAR_BINS, TRIED), LINEAR_BINS]
    found = [divergence(linear, end, levels) for end in tried]
    return float(edges[tried[len(found) - 1 - int(np.argmin(found[::-1]))]])


def divergence(linear: Vector, end: int, levels: int) -> float:
    """``sum P log(P / Q)`` for a grid of ``levels`` numbers that ends after so many of the bins.

    >>> divergence(np.array([1.0, 1.0, 0.0, 2.0]), 4, 2), round(divergence(np.array([3.0, 1.0, 1.0, 1.0]), 2, 1), 3)
    (0.0, 0.0)
    """
    inside = linear[:end]
    p = inside.copy()
    p[-1] += linear[end:].sum()
    starts = np.arange(levels) * end // levels
    sizes = np.diff(np.append(starts, end))
    live = inside > 0
    share = np.add.reduceat(inside, starts) / np.maximum(np.add.reduceat(live.astype(np.float64), starts), 1)
    q = np.where(live, np.repeat(share, sizes), 0.0)
    p, q, both = p / p.sum(), q / max(float(q.sum()), np.finfo(np.float64).tiny), (p > 0)
    if (q[both] == 0).any():  # what lies beyond went where nothing was
        return math.inf
    return float((p[both] * np.log(p[both] / q[both])).sum())


def _distribution(middles: Vector, widths: Vector, counts: Vector, at: Vector) -> Vector:
    """How many entries lie below each point, those of a bin evenly spread."""
    corners = np.concatenate([middles - widths / 2, middles + widths / 2])
    density = np.concatenate([counts / widths, -counts / widths])
    order = np.argsort(corners)
    below = np.concatenate([[0.0], np.cumsum(np.cumsum(density[order])[:-1] * np.diff(corners[order]))])
    result: Vector = np.interp(at, corners[order], below)
    return result
