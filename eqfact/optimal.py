"""Which factors are the best, and how far can they be from the best possible?

The expected noise ``N(u)`` of :mod:`eqfact.noise` is convex in ``u = log f``. It is minimised over a box with every maximum smoothed by
a p-norm, ``max a <= (sum a**p)**(1/p)``, for growing p. The certificate: with weights ``w`` that add up to 1, a geometric mean never
exceeds a maximum, ``prod a**w <= max a``. Putting it in the place of every maximum gives a smooth convex model below ``N``; its
tangent, minimised over the box corner by corner, is a lower bound on ``N`` over the whole box (PAPER 8).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize

from eqfact.noise import NoiseModel, Tensor, Vector

#: Exponents of the p-norms, in turn, each started from the solution before.
EXPONENTS = (4.0, 16.0, 64.0, 256.0, 1024.0)

#: exp(600) is still finite in float64: within one stage p-th powers move by no more than exp(+-300) on each side.
REACH = 300.0


@dataclass(frozen=True, eq=False)
class Optimum:
    """Factors by label, their exact noise, a lower bound on the noise of all factors in the box, and how that was found."""

    f: Vector
    noise: float
    bound: float
    iterations: int
    residual: tuple[float, ...]

    @property
    def gap_db(self) -> float:
        """By how much the best factors in the box can at most be better, in dB."""
        return float(10 * np.log10(self.noise / self.bound)) if self.noise > 0 else 0.0


def optimal(model: NoiseModel, *, box: float = 1024.0, start: Vector | None = None, tol: float = 1e-7, max_iter: int = 300) -> Optimum:
    """Minimise the expected noise over all factors within ``[1 / box, box]``, and bound it from below.

    ``start`` holds factors by label (1 if None); the minimum does not depend on it. ``tol`` is the largest slope of ``log N`` along any
    ``u`` at which a stage ends, ``max_iter`` its largest number of iterations.
    """
    limit = float(np.log(box))
    u = np.zeros(model.channels.degrees_of_freedom + 1) if start is None else np.clip(np.log(start), -limit, limit)
    iterations, residual = 0, []
    best, lowest = u, _exact(model, u)
    terms: list[_Term] = []
    for p in EXPONENTS:
        terms = [_Smooth(tensor, u, p) for tensor in model.tensors]
        u, steps, slope = _minimize(terms, u, np.maximum(-limit, u - REACH / p), np.minimum(limit, u + REACH / p), tol, max_iter)
        iterations += steps
        residual.append(slope)
        if (noise := _exact(model, u)) < lowest:
            best, lowest = u, noise
    terms = [_Lower(term, u) for term in terms]
    low, high = np.full(len(u), -limit), np.full(len(u), limit)
    u, steps, _ = _minimize(terms, u, low, high, tol, max_iter)
    value, slope_at = _total(terms, u)
    corner = np.where(slope_at > 0, low, high)
    corner[0] = 0
    bound = float(np.exp(value + (slope_at * (corner - u))[1:].sum()))
    return Optimum(np.exp(best), lowest, min(bound, lowest), iterations + steps, tuple(residual))


def _exact(model: NoiseModel, u: Vector) -> float:
    f = np.exp(u)
    return sum(tensor.noise(f) for tensor in model.tensors)


def _minimize(terms: Sequence[_Term], u: Vector, low: Vector, high: Vector, tol: float, max_iter: int) -> tuple[Vector, int, float]:
    low, high = low.copy(), high.copy()
    low[0] = high[0] = 0  # the label of the pinned channels
    result = minimize(lambda v: _total(terms, v), np.clip(u, low, high), jac=True, method="L-BFGS-B", bounds=np.stack([low, high], axis=1),
                      options={"maxiter": max_iter, "maxfun": 2 * max_iter, "maxcor": 20, "ftol": 0.0, "gtol": tol})
    return result.x, int(result.nit), float(np.abs(result.jac[1:]).max(initial=0.0))


def _total(terms: Sequence[_Term], u: Vector) -> tuple[float, Vector]:
    """The logarithm of the terms' sum, and its gradient by label."""
    found = [term(u) for term in terms]
    logs = np.array([value for value, _, _ in found])
    value = logsumexp(logs)
    slope = np.zeros_like(u)
    for share, term, (_, made, read) in zip(np.exp(logs - value), terms, found, strict=True):
        slope += share * np.bincount(term.tensor.made, made.reshape(-1), len(u))
        slope += share * np.bincount(term.tensor.read, read.reshape(-1), len(u))
    slope[0] = 0
    return value, slope


class _Term:
    """The logarithm of one tensor's noise, ``2 log R + log sum S (f_in / f_out)**2 - log 12 steps**2``, around a centre ``u``."""

    def __init__(self, tensor: Tensor, u: Vector) -> None:
        self.tensor = tensor
        groups, rows, inner = tensor.sensitivity.shape
        self.shape_made, self.shape_read = (groups, rows, 1), (groups, 1, inner)
        self.centre_made, self.centre_read = u[tensor.made].reshape(self.shape_made), u[tensor.read].reshape(self.shape_read)
        self.sensitivity = tensor.sensitivity * np.exp(2 * (self.centre_read - self.centre_made))

    def ranges(self, made: Vector, read: Vector) -> list[_Range]:
        """The logarithm of each part's range, and what it hands back to the channels."""
        raise NotImplementedError

    def __call__(self, u: Vector) -> tuple[float, Vector, Vector]:
        made = u[self.tensor.made].reshape(self.shape_made) - self.centre_made
        read = u[self.tensor.read].reshape(self.shape_read) - self.centre_read
        parts = self.ranges(made, read)
        log_range = np.logaddexp.reduce([part.log for part in parts])
        spread = np.exp(2 * read)
        sums = self.sensitivity @ spread.swapaxes(1, 2)
        log_rows = safe_log(sums) - 2 * made
        log_sum = log_rows if self.tensor.by_row else logsumexp(log_rows)
        logs = 2 * log_range + log_sum - np.log(12 * self.tensor.steps**2)
        value = logsumexp(logs)
        share = np.exp(logs - value)  # of every row with a grid of its own, or 1
        rows = share * np.exp(log_rows - log_sum) if not self.tensor.by_row else share
        d_made, d_read = -2 * rows, 2 * spread * (ratio(rows, sums).swapaxes(1, 2) @ self.sensitivity)
        for part in parts:
            with np.errstate(invalid="ignore"):
                mine = np.where(np.isfinite(log_range), np.exp(part.log - log_range), 0.0)
            back_made, back_read = part.back(2 * share * mine)
            d_made = d_made + back_made
            d_read = d_read + back_read
        return value, d_made, d_read


@dataclass(frozen=True, eq=False)
class _Range:
    log: Vector
    #: From the slope by this range to the slopes by ``u`` of what the tensor makes and reads.
    back: Callable[[Vector], tuple[Vector, Vector]]


class _Smooth(_Term):
    """Maxima smoothed from above: ``R = (sum a**p)**(1/p)``."""

    def __init__(self, tensor: Tensor, u: Vector, p: float) -> None:
        super().__init__(tensor, u)
        self.p = p
        axes: Any = (2,) if tensor.by_row else (0, 1, 2)
        self.entries = [part * np.exp(self.centre_made - self.centre_read) for part in tensor.parts]
        self.tops = [np.where(top > 0, top, 1.0) for top in (e.max(axis=axes, keepdims=True) for e in self.entries)]
        self.powers = [(entries / top) ** p for entries, top in zip(self.entries, self.tops, strict=True)]

    def ranges(self, made: Vector, read: Vector) -> list[_Range]:
        found = []
        spread = np.exp(-self.p * read)
        for top, powers in zip(self.tops, self.powers, strict=True):
            sums = powers @ spread.swapaxes(1, 2)
            log_rows = safe_log(sums) + self.p * made
            log = log_rows if self.tensor.by_row else np.asarray(logsumexp(log_rows))
            rows = 1.0 if self.tensor.by_row else np.exp(log_rows - log)

            def back(slope: Vector, rows: Any = rows, sums: Vector = sums, powers: Vector = powers) -> tuple[Vector, Vector]:
                by_row = slope * rows
                return by_row, -spread * (ratio(by_row, sums).swapaxes(1, 2) @ powers)

            found.append(_Range(np.log(top) + log / self.p, back))
        return found

    def weights(self, u: Vector) -> list[Vector]:
        """Each entry's share in its p-norm: weights that add up to 1, for every grid."""
        made = u[self.tensor.made].reshape(self.shape_made) - self.centre_made
        read = u[self.tensor.read].reshape(self.shape_read) - self.centre_read
        axes: Any = (2,) if self.tensor.by_row else (0, 1, 2)
        shares = [powers * np.exp(self.p * (made - read)) for powers in self.powers]
        return [ratio(share, share.sum(axis=axes, keepdims=True)) for share in shares]


class _Lower(_Term):
    """Maxima bounded from below by geometric means with fixed weights: linear in ``u``."""

    def __init__(self, smooth: _Term, u: Vector) -> None:
        assert isinstance(smooth, _Smooth)
        super().__init__(smooth.tensor, u)
        axes: Any = (2,) if self.tensor.by_row else (0, 1, 2)
        self.weights = smooth.weights(u)
        self.offsets = []
        for weights, part in zip(self.weights, self.tensor.parts, strict=True):
            entries = part * np.exp(self.centre_made - self.centre_read)
            mean = (weights * safe_log(np.where(weights > 0, entries, 1.0))).sum(axis=axes, keepdims=True)
            self.offsets.append(np.where(weights.sum(axis=axes, keepdims=True) > 0, mean, -np.inf))

    def ranges(self, made: Vector, read: Vector) -> list[_Range]:
        found = []
        for weights, offset in zip(self.weights, self.offsets, strict=True):
            moved = weights.sum(axis=2, keepdims=True) * made - weights @ read.swapaxes(1, 2)

            def back(slope: Vector, weights: Vector = weights) -> tuple[Vector, Vector]:
                rows = np.broadcast_to(slope, self.shape_made)
                return rows * weights.sum(axis=2, keepdims=True), -(rows.swapaxes(1, 2) @ weights)

            found.append(_Range(offset + (moved if self.tensor.by_row else moved.sum()), back))
        return found


def logsumexp(logs: Vector) -> float:
    """``log sum exp`` over all entries."""
    return float(np.logaddexp.reduce(logs, axis=None))


def safe_log(x: Vector) -> Vector:
    """Logarithm, minus infinity at 0."""
    with np.errstate(divide="ignore"):
        return np.log(x)


def ratio(a: Vector, b: Vector) -> Vector:
    """``a / b``, and 0 where ``b`` is 0."""
    return np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape)), where=b > 0)
