"""Which factors are the best, and how far can they be from the best possible?

The expected noise ``N(u)`` of :mod:`eqfact.noise` is convex in ``u = log f`` (PAPER 8). It is a sum over tensors of ``R**2 Q``: a maximum
``R`` of entries ``a f_out / f_in`` and a sum ``Q`` over entries. With weights ``w > 0`` that add up to 1,

    R = max a  is nearly  (sum w a**p)**(1/p),                  smooth; the share of each entry in the sum is its next weight,
    max a >= prod a**w   and   sum a >= prod (a / w)**w,        so log N(u) >= c + g.u for all u, with the slope g of the smooth model.

The first is the exponential method of multipliers: weights close in on the entries that matter, so ``p`` may stay small. Newton's
method minimises each smooth model. The second is the certificate: the least value of ``c + g.u`` over the box, which lies in a corner.
In products of values ``u = B t`` (docs/algebra.md): a linear function of the free numbers ``t``, so all this holds for these.

The optimum is flat in most directions, and calibration images are few: a *ridge* ``rho |t|**2`` beside ``log N`` leaves a factor at 1 that
hardly earns anything. It is strictly convex, and part of the certificate: the least value of ``c + g.t + rho |t|**2``, number by number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.special import entr

from eqfact.logsums import Curvature, LogMean, LogSum, axes_of, made_and_read, safe_log
from eqfact.noise import NoiseModel, Tensor, Vector
from eqfact.ops.base import Array

#: The exponent of the smooth maxima doubles with every stage up to the second, and then with every stage of few steps up to the third.
FIRST_EXPONENT, EXPONENT, LAST_EXPONENT, FEW_STEPS = 2.0, 32.0, 4096.0, 3

#: A stage (but the first) ends after so many Newton steps, or when the slope within the box costs the bound less than this part of the
#: gap so far.
STAGE_STEPS, SLOPE = 8, 0.1

#: The gap that the first stage assumes before it: 20 dB.
BEFORE = float(np.log(100))

#: No ``t`` moves by more than this over ``sqrt(p)`` in a Newton step.
LONGEST_STEP = 4.0

#: exp(600) is still finite in float64: within one stage, p-th powers move by no more than exp(+-300) on either side.
REACH = 300.0

#: What a dB is in a logarithm of power.
NEPER = float(np.log(10) / 10)

#: Taken off the bound's logarithm for roundoff, which is some 1e-12 in sums of millions of float64 numbers (no interval arithmetic).
ROUNDOFF = 1e-9


def decibels_above(bound: float, noise: float) -> float:
    """By how many dB a noise is above a lower bound on it; 0 where there is none."""
    return float(10 * np.log10(noise / bound)) if noise > 0 else 0.0


class Stage(NamedTuple):
    """Where the search for the optimum stood: at the start, or after a stage of it."""

    #: Newton steps so far.
    iterations: int
    #: The least objective so far, and the greatest lower bound that was certified so far; 0 where there is none yet.
    objective: float
    bound: float


@dataclass(frozen=True, eq=False)
class Optimum:
    """Factors of the free numbers, and how they were found."""

    f: Vector
    #: The objective there, without smoothing: the noise, times ``exp`` of the ridge.
    noise: float
    #: A lower bound on the objective of all factors in the box.
    bound: float
    #: Newton steps.
    iterations: int
    #: The certified gap in dB, stage by stage.
    residual: tuple[float, ...]
    #: The start, then every stage.
    history: tuple[Stage, ...]

    @property
    def gap_db(self) -> float:
        """By how much the best factors in the box can at most be better, in dB."""
        return decibels_above(self.bound, self.noise)


def optimal(model: NoiseModel, *, objective: str = "noise", weights: Mapping[str, float] | None = None, box: float = 1024.0,
            start: Vector | None = None, held: npt.NDArray[np.bool_] | None = None, ridge: float = 0.0, tol: float = 0.05,
            max_iter: int = 200) -> Optimum:
    """Minimise the expected noise over all factors within ``[1 / box, box]``, and bound it from below.

    ``objective`` is ``"noise"``, the sum over the model's tensors, or ``"range"``, the geometric mean over the tensors of
    ``(R / steps)**2 / 12`` times the geometric mean of ``(f_in / f_out)**2`` over the live channels. That depends on no sensitivity
    (:func:`eqfact.noise.unit_sensitivities` serve); on a chain of layers it is the product of all ranges. ``weights`` multiplies the
    noise (or the logarithm) of tensors by name. ``start`` holds the factors of the free numbers, 1 if None; the minimum does not depend
    on it. Numbers that are ``held`` keep the factor 1, in the bound too. ``ridge``: what a number that moves by a factor of e must earn,
    in dB of noise; one that moves by ``e**2`` four times as much. The search ends when the certified gap is at most ``tol`` dB, after
    ``max_iter`` Newton steps, or when the gap no longer falls.

    Raises :class:`ValueError` for unknown objectives and names, and unusable weights, boxes and starts.

    >>> from eqfact import Dense, Graph, ReLU, UniformQuantizer, noise_model
    >>> from eqfact.noise import unit_sensitivities
    >>> net = Graph.chain((1,), fc1=Dense(np.array([[4.0], [1.0]])), act=ReLU(), fc2=Dense(np.array([[1.0, 4.0]])))
    >>> model = noise_model(net, None, weights=UniformQuantizer(8), activations=None, sensitivities=unit_sensitivities(net))
    >>> f = optimal(model, objective="range", tol=1e-4).f
    >>> round(float(f[2] / f[1]), 3)
    4.0
    """
    size = model.channels.degrees_of_freedom + 1
    limit = np.where(_held(held, size), 0.0, _limit(objective, box))
    goal = _goal(model, objective, weights or {}, ridge)
    t = _start(start, size, limit)
    best, lowest, bound = t, goal.exact(t), -np.inf
    if not goal.terms or not limit.any():
        only = Stage(0, float(np.exp(lowest)), float(np.exp(lowest - ROUNDOFF)))
        return Optimum(np.exp(t), only.objective, only.bound, 0, (), (only,))
    p, iterations, gap, residual = FIRST_EXPONENT, 0, BEFORE, list[float]()
    history = [Stage(0, float(np.exp(lowest)), 0.0)]
    while True:
        for term in goal.terms:
            term.begin(goal.spread(t), p)
        most = min(STAGE_STEPS, max_iter - iterations) if residual else max_iter
        t, now, steps = _minimize(goal, t, p, limit, SLOPE * gap / limit.max(), most)
        iterations += steps
        if (exact := goal.exact(t)) < lowest:
            best, lowest = t, exact
        bound = max(bound, goal.lower_bound(now, t, limit))
        gap = max(lowest - bound, 0.0)
        residual.append(float(gap * 10 / np.log(10)))
        history.append(Stage(iterations, float(np.exp(lowest)), float(np.exp(min(bound, lowest - ROUNDOFF)))))
        if p < EXPONENT or (steps <= FEW_STEPS and p < LAST_EXPONENT):
            p *= 2
        stalled = len(residual) > 10 and residual[-1] > 0.99 * residual[-6]
        if residual[-1] <= tol or iterations >= max_iter or stalled:
            return Optimum(np.exp(best), history[-1].objective, history[-1].bound, iterations, tuple(residual), tuple(history))


def objective_at(model: NoiseModel, free: Vector, *, objective: str = "noise", weights: Mapping[str, float] | None = None,
                 ridge: float = 0.0) -> float:
    """What :func:`optimal` minimises, at the factors of the free numbers: to be compared with its bound."""
    return float(np.exp(_goal(model, objective, weights or {}, ridge).exact(np.log(free))))


def _held(held: npt.NDArray[np.bool_] | None, size: int) -> npt.NDArray[np.bool_]:
    """The free numbers whose factor stays 1; entry 0, that of the pinned channels, always does."""
    mask = np.zeros(size, bool) if held is None else np.array(held, bool)
    if mask.shape != (size,):
        raise ValueError(f"held must be a mask of {size} labels, the first one for pinned channels, got shape {mask.shape}")
    mask[0] = True
    return mask


def _limit(objective: str, box: float) -> float:
    """The largest ``|t|`` in the box."""
    if objective not in ("noise", "range"):
        raise ValueError(f"unknown objective {objective!r}: use 'noise' or 'range'")
    if not 1 <= box <= 1e60:
        raise ValueError(f"box must be a number from 1 to 1e60, got {box}")
    return float(np.log(box))


def _start(start: Vector | None, size: int, limit: Vector) -> Vector:
    """The logarithm of the factors to start from, within the box."""
    f = np.ones(size) if start is None else np.asarray(start, np.float64)
    if f.shape != (size,) or not (np.isfinite(f).all() and (f > 0).all()):
        raise ValueError(f"start must hold {size} positive factors, by label, the first one for pinned channels, got {start}")
    return np.clip(np.log(f), -limit, limit)


def _goal(model: NoiseModel, objective: str, weights: Mapping[str, float], ridge: float = 0.0) -> Goal:
    """The tensors with a positive weight."""
    if not (np.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge must be a finite number of dB, at least 0, got {ridge}")
    names = [tensor.name for tensor in model.tensors]
    for name, weight in weights.items():
        if name not in names:
            raise ValueError(f"weights names '{name}', which is not among the model's tensors {names}")
        if not (np.isfinite(weight) and weight >= 0):
            raise ValueError(f"the weight of '{name}' must be a finite number of at least 0, got {weight}")
    chosen = [(tensor, float(weights.get(tensor.name, 1))) for tensor in model.tensors if weights.get(tensor.name, 1) > 0]
    whole = sum(weight for _, weight in chosen)
    terms = [Term(tensor, weight) if objective == "noise" else Term(tensor, 1.0, weight / whole) for tensor, weight in chosen]
    return Goal(terms, None if model.channels.compound is None else model.channels.forms, ridge * NEPER)


# ---------------------------------------------------------------------------------------------------- the smooth model


@dataclass(frozen=True, eq=False)
class State:
    """The smooth objective at a point."""

    #: The logarithm.
    value: float
    #: Its slope by free number, and term by term by rows and columns.
    slope: Vector
    slopes: list[tuple[Vector, Vector]]
    #: The share of each grid, term by term.
    shares: list[Vector]


@dataclass(frozen=True, eq=False)
class Goal:
    """The logarithm of a sum of terms, or the mean of their logarithms, as a function of the free numbers ``t``; by label ``u = B t``.

    And ``ridge |t|**2`` beside it.
    """

    terms: list[Term]
    #: ``B``, if channels are related in other ways than ties and pins (docs/algebra.md).
    forms: csr_array | None
    ridge: float = 0.0

    def spread(self, t: Vector) -> Vector:
        """``u``, by label."""
        u: Vector = t if self.forms is None else self.forms @ t
        return u

    def gathered(self, slope: Vector) -> Vector:
        """A slope by label as one by free number: ``B.T g``."""
        of_free: Vector = slope if self.forms is None else self.forms.T @ slope
        of_free[0] = 0
        return of_free

    def reach(self) -> float:
        """The most that a ``u`` moves when no ``t`` moves by more than 1."""
        return 1.0 if self.forms is None else float(abs(self.forms).sum(axis=1).max())

    def at(self, t: Vector) -> State:
        """The smooth model."""
        u = self.spread(t)
        value, shares = self._combined([term.at(u) for term in self.terms])
        slope = np.zeros_like(u)
        slopes = [term.slope(share) for term, share in zip(self.terms, shares, strict=True)]
        for term, (rows, columns) in zip(self.terms, slopes, strict=True):
            slope += np.bincount(term.tensor.made, rows, len(u)) + np.bincount(term.tensor.read, columns, len(u))
        return State(value + self.ridge * float(t @ t), self.gathered(slope) + 2 * self.ridge * t, slopes, shares)

    def exact(self, t: Vector) -> float:
        """The same without smoothing."""
        u = self.spread(t)
        return self._combined([term.exact(u) for term in self.terms])[0] + self.ridge * float(t @ t)

    def _combined(self, logs: Sequence[Vector]) -> tuple[float, list[Vector]]:
        """``log sum exp`` over all grids of all terms, or their mean if shares are fixed; and every grid's share in it."""
        fixed = [term.fixed for term in self.terms if term.fixed is not None]
        if fixed:
            return sum(float((share * np.where(share > 0, log, 0)).sum()) for share, log in zip(fixed, logs, strict=True)), fixed
        value = float(np.logaddexp.reduce([np.logaddexp.reduce(log, axis=None) for log in logs])) if logs else -np.inf
        return value, [np.exp(log - value) for log in logs]

    def lower_bound(self, now: State, t: Vector, limit: Vector) -> float:
        """The least value in the box of ``c + g.t + ridge |t|**2``.

        By ``log sum N >= sum share log(N / share)``, and the same within every term.
        """
        u = self.spread(t)
        value = sum(term.geometric(share, u) for term, share in zip(self.terms, now.shares, strict=True))
        g = now.slope - 2 * self.ridge * t
        lowest = np.clip(-g / (2 * self.ridge), -limit, limit) if self.ridge else -np.sign(g) * limit
        return float(value + (g * (lowest - t) + self.ridge * lowest**2).sum()) - ROUNDOFF

    def newton_step(self, now: State, free: npt.NDArray[np.bool_]) -> Vector:
        """To the minimum of the quadratic model over the free numbers that may move."""
        curvature = Curvature(len(free) if self.forms is None else self.forms.shape[0], self.forms)
        for term, share, slopes in zip(self.terms, now.shares, now.slopes, strict=True):
            if share.any():
                term.bend(curvature, share, slopes)
        if self.ridge:
            curvature.free_diagonal(np.full(len(free), 2 * self.ridge))
        return curvature.solve(-now.slope, free)


class Term:
    """The logarithm of one tensor's noise, ``2 log R + log Q - log 12 steps**2``, by grid: one of all its rows, or one a row."""

    def __init__(self, tensor: Tensor, weight: float, share: float | None = None) -> None:
        self.tensor = tensor
        self.constant = np.log(weight / (12 * tensor.steps**2))
        self.p, self.ranges = FIRST_EXPONENT, list[LogSum]()
        #: Logarithms of the entries' weights in this stage. As the bound holds for any weights, float32 does: a share is off by less than
        #: 1e-7, and slope and bound are made of the same summands, in float64.
        self.weights: list[npt.NDArray[np.float32]] = [np.zeros(1, np.float32) for _ in tensor.parts]
        centre = np.zeros(1 + max(tensor.made.max(), tensor.read.max()))
        self.sum = LogSum(tensor, safe_log(tensor.sensitivity), -2.0, centre) if share is None else LogMean(tensor, -2.0)
        live = np.max([part.max(axis=axes_of(tensor), keepdims=True) for part in tensor.parts], axis=0) > 0
        #: The grids' shares in a mean of logarithms, if the objective is one.
        self.fixed = None if share is None else share * live / live.sum()

    def begin(self, u: Vector, p: float) -> None:
        """Begin a stage around ``u``: the shares of all entries so far are their weights."""
        for k, (part, r) in enumerate(zip(self.tensor.parts, self.ranges, strict=False)):  # there are none in the first stage
            shares = self._logs(part, u)
            shares *= self.p
            shares += self.weights[k]
            shares -= np.where(np.isfinite(r.log), r.log, 0.0)
            self.weights[k] = shares.astype(np.float32)
        self.p = p
        self.ranges = []  # their memory goes to those that take their place
        for part, weights in zip(self.tensor.parts, self.weights, strict=True):
            logs = safe_log(part)
            logs *= p
            logs += weights
            self.ranges.append(LogSum(self.tensor, logs, p, u))

    def at(self, u: Vector) -> Vector:
        logs = np.stack([r.at(u) / self.p for r in self.ranges])
        log_range = np.logaddexp.reduce(logs)
        self.parts = np.exp(logs - np.where(np.isfinite(log_range), log_range, 0.0))  # of each part in the range
        value: Vector = 2 * log_range + self.sum.at(u) + self.constant
        return value

    def exact(self, u: Vector) -> Vector:
        """The same without smoothing."""
        log_range = np.logaddexp.reduce([self._logs(part, u).max(axis=axes_of(self.tensor), keepdims=True) for part in self.tensor.parts])
        value: Vector = 2 * log_range + self.sum.at(u) + self.constant
        return value

    def _logs(self, part: Array, u: Vector) -> Vector:
        """The logarithms of all entries, ``a f_out / f_in``: made anew whenever a stage needs them, as they are as many as the weights."""
        made, read = made_and_read(self.tensor, u)
        logs = safe_log(part)
        logs += made
        logs -= read
        return logs

    def geometric(self, share: Vector, u: Vector) -> float:
        """``sum share log(N / share)`` with the geometric mean of entries in the place of every maximum, weighted by their shares."""
        value = self.sum.at(u) + self.constant
        for of_range, part, r in zip(self.parts, self.tensor.parts, self.ranges, strict=True):
            weights, logs = r.shares(), self._logs(part, u)
            logs[weights == 0] = 0
            logs *= weights
            mean = logs.sum(axis=axes_of(self.tensor), keepdims=True)
            value = value + 2 * (of_range * mean + entr(of_range))
        sum_of_logs = float((share * np.where(share > 0, value, 0.0)).sum())
        return sum_of_logs + (float(entr(share).sum()) if self.fixed is None else 0.0)

    def pieces(self, share: Vector) -> list[tuple[Vector, LogSum | LogMean]]:
        """What the objective's logarithm is made of, to first order: log-sums, each with its amount by grid."""
        return [*((2 / self.p * share * part, r) for part, r in zip(self.parts, self.ranges, strict=True)), (share, self.sum)]

    def slope(self, share: Vector) -> tuple[Vector, Vector]:
        """By what the rows make and by what the columns read."""
        groups, out, inner = self.tensor.sensitivity.shape
        rows, columns = np.zeros((groups, out, 1)), np.zeros((groups, 1, inner))
        for amount, piece in self.pieces(share):
            rows += piece.q * amount * piece.rows
            columns -= piece.q * piece.columns(amount)
        return rows.reshape(-1), columns.reshape(-1)

    def bend(self, curvature: Curvature, share: Vector, slopes: tuple[Vector, Vector]) -> None:
        """Add the second derivatives: of every log-sum, and of the logarithms of sums of parts and of grids, ``w g g'`` for each summand.

        If grids are as many as rows, a diagonal of that size stands for these last.
        """
        made, read, by_row = self.tensor.made, self.tensor.read, self.tensor.by_row
        for amount, piece in self.pieces(share):
            if isinstance(piece, LogSum):
                curvature.covariance(piece, amount * piece.q**2)
        if len(self.ranges) == 2:
            amount = 2 * share * self.parts[0] * self.parts[1]
            (rows, columns), (other_rows, other_columns) = ((r.rows, r.columns(amount)) for r in self.ranges)
            if by_row:
                curvature.diagonal(read, 2 * (columns + other_columns))
            elif amount > 0:
                difference = (amount * (rows - other_rows)).reshape(-1), (other_columns - columns).reshape(-1)
                curvature.rank_one(made, difference[0], read, difference[1], 1 / amount.item())
        if self.fixed is None and by_row:
            for amount, piece in self.pieces(share):
                curvature.diagonal(read, abs(piece.q) / 2 * piece.columns(amount))
        elif self.fixed is None:
            curvature.rank_one(made, slopes[0], read, slopes[1], 1 / share.item())


# ------------------------------------------------------------------------------------------------------ Newton's method


def _minimize(goal: Goal, t: Vector, p: float, limit: Vector, slope: float, max_iter: int) -> tuple[Vector, State, int]:
    """Newton's method for the smooth model within the box; numbers that lean on its walls stay."""
    reach = REACH / (p * goal.reach())
    low, high = np.maximum(-limit, t - reach), np.minimum(limit, t + reach)
    now = goal.at(t)
    for steps in range(max_iter):
        free = ~((t <= low) & (now.slope > 0) | (t >= high) & (now.slope < 0))
        free &= limit > 0
        if np.abs(now.slope[free]).sum() <= slope:
            return t, now, steps
        step = np.clip(goal.newton_step(now, free), -LONGEST_STEP / p**0.5, LONGEST_STEP / p**0.5)
        for part in 0.5 ** np.arange(20):
            moved = np.clip(t + part * step, low, high)
            then = goal.at(moved)
            if then.value <= now.value + 1e-4 * float(now.slope @ (moved - t)):
                break
        else:
            return t, goal.at(t), steps + 1  # within roundoff of the minimum
        t, now = moved, then
    return t, now, max_iter
