"""Which factors are the best, and how far can they be from the best possible?

The expected noise ``N(u)`` of :mod:`eqfact.noise` is convex in ``u = log f`` (PAPER 8). It is a sum over tensors of ``R**2 Q``: a maximum
``R`` of entries ``a f_out / f_in`` and a sum ``Q`` over entries. With weights ``w > 0`` that add up to 1,

    R = max a  is nearly  (sum w a**p)**(1/p),                  smooth; the share of each entry in the sum is its next weight,
    max a >= prod a**w   and   sum a >= prod (a / w)**w,        so log N(u) >= c + g.u for all u, with the slope g of the smooth model.

The first is the exponential method of multipliers: weights close in on the entries that matter, so ``p`` may stay small. Newton's
method minimises each smooth model. The second is the certificate: the least value of ``c + g.u`` over the box, which lies in a corner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.linalg import LinearOperator, cg, splu
from scipy.special import entr

from eqfact.noise import Indices, NoiseModel, Tensor, Vector

#: Exponents of the smooth maxima, stage by stage; the last one stays.
EXPONENTS = (2.0, 4.0, 8.0, 16.0, 32.0)

#: A stage ends after so many Newton steps, or when the slope (l1 norm of ``d log N / d u``) is below ``SLOPE / sum of exponents so far``.
STAGE_STEPS, SLOPE = 6, 0.1

#: No ``u`` moves by more than this over ``sqrt(p)`` in a Newton step.
LONGEST_STEP = 4.0

#: Iterations of conjugate gradients per Newton step.
CG_STEPS = 6
GG = 2.0

#: Channels with a coupling above this, in units of their own curvatures, are coupled one by one.
COUPLING = 0.1

#: exp(600) is still finite in float64: within one stage, p-th powers move by no more than exp(+-300) on either side.
REACH = 300.0

#: Taken off the bound's logarithm for roundoff, which is some 1e-12 in sums of millions of float64 numbers (no interval arithmetic).
ROUNDOFF = 1e-9


@dataclass(frozen=True, eq=False)
class Optimum:
    """Factors by label, their exact noise, a lower bound on the noise of all factors in the box, and how that was found."""

    f: Vector
    noise: float
    bound: float
    #: Newton steps.
    iterations: int
    #: The certified gap in dB, stage by stage.
    residual: tuple[float, ...]

    @property
    def gap_db(self) -> float:
        """By how much the best factors in the box can at most be better, in dB."""
        return float(10 * np.log10(self.noise / self.bound)) if self.noise > 0 else 0.0


def optimal(model: NoiseModel, *, objective: str = "noise", weights: Mapping[str, float] | None = None, box: float = 1024.0,
            start: Vector | None = None, tol: float = 0.05, max_iter: int = 200) -> Optimum:
    """Minimise the expected noise over all factors within ``[1 / box, box]``, and bound it from below.

    ``objective`` is ``"noise"``, the sum over the model's tensors, or ``"range"``, the geometric mean over the tensors of
    ``(R / steps)**2 / 12`` times the geometric mean of ``(f_in / f_out)**2`` over the live channels. That depends on no sensitivity
    (:func:`eqfact.noise.unit_sensitivities` serve); on a chain of layers it is the product of all ranges. ``weights`` multiplies the
    noise (or the logarithm) of tensors by name. ``start`` holds factors by label, 1 if None; the minimum does not depend on it. The
    search ends when the certified gap is at most ``tol`` dB, after ``max_iter`` Newton steps, or when the gap no longer falls.

    Raises :class:`ValueError` for unknown objectives and names, and unusable weights, boxes and starts.

    >>> from eqfact import Dense, Graph, ReLU, UniformQuantizer, noise_model
    >>> from eqfact.noise import unit_sensitivities
    >>> net = Graph.chain((1,), fc1=Dense(np.array([[4.0], [1.0]])), act=ReLU(), fc2=Dense(np.array([[1.0, 4.0]])))
    >>> model = noise_model(net, None, weights=UniformQuantizer(8), activations=None, sensitivities=unit_sensitivities(net))
    >>> f = optimal(model, objective="range", tol=1e-4).f
    >>> round(f[2] / f[1], 3)
    4.0
    """
    limit, size = _limit(objective, box), model.channels.degrees_of_freedom + 1
    terms = _terms(model, objective, weights or {})
    u = _start(start, size, limit)
    best, lowest, bound = u, _exact(terms, u), -np.inf
    if not terms or limit == 0 or size == 1:
        return Optimum(np.exp(u), float(np.exp(lowest)), float(np.exp(lowest)), 0, ())
    iterations, total, residual = 0, 0.0, [np.inf]
    while residual[-1] > tol and iterations < max_iter and (len(residual) < 12 or residual[-1] < 0.99 * residual[-6]):
        p = EXPONENTS[min(len(residual), len(EXPONENTS)) - 1]
        total += p
        for term in terms:
            term.begin(u, p)
        u, now, steps = _minimize(terms, u, p, limit, SLOPE / total, min(STAGE_STEPS, max_iter - iterations))
        iterations += steps
        if (exact := _exact(terms, u)) < lowest:
            best, lowest = u, exact
        bound = max(bound, _lower_bound(terms, now, u, limit))
        residual.append((lowest - bound) * 10 / np.log(10))
    return Optimum(np.exp(best), float(np.exp(lowest)), float(np.exp(min(bound, lowest))), iterations, tuple(residual[1:]))


def _limit(objective: str, box: float) -> float:
    """The largest ``|u|`` in the box."""
    if objective not in ("noise", "range"):
        raise ValueError(f"unknown objective {objective!r}: use 'noise' or 'range'")
    if not 1 <= box <= 1e60:
        raise ValueError(f"box must be a number from 1 to 1e60, got {box}")
    return float(np.log(box))


def _start(start: Vector | None, size: int, limit: float) -> Vector:
    """The logarithm of the factors to start from, within the box; label 0 is that of the pinned channels."""
    f = np.ones(size) if start is None else np.asarray(start, np.float64)
    if f.shape != (size,) or not (np.isfinite(f).all() and (f > 0).all()):
        raise ValueError(f"start must hold {size} positive factors, by label, the first one for pinned channels, got {start}")
    u: Vector = np.clip(np.log(f), -limit, limit)
    u[0] = 0
    return u


def _terms(model: NoiseModel, objective: str, weights: Mapping[str, float]) -> list[Term]:
    """The tensors with a positive weight."""
    names = [tensor.name for tensor in model.tensors]
    for name, weight in weights.items():
        if name not in names:
            raise ValueError(f"weights names '{name}', which is not among the model's tensors {names}")
        if not (np.isfinite(weight) and weight >= 0):
            raise ValueError(f"the weight of '{name}' must be a finite number of at least 0, got {weight}")
    chosen = [(tensor, float(weights.get(tensor.name, 1))) for tensor in model.tensors if weights.get(tensor.name, 1) > 0]
    whole = sum(weight for _, weight in chosen)
    return [Term(tensor, weight) if objective == "noise" else Term(tensor, 1.0, weight / whole) for tensor, weight in chosen]


# ---------------------------------------------------------------------------------------------------- the smooth model


@dataclass(frozen=True, eq=False)
class State:
    """The logarithm of the smooth objective, its slope by label, the share of every term's grids in it, and the slope by rows and columns."""

    value: float
    slope: Vector
    shares: list[Vector]
    slopes: list[tuple[Vector, Vector]]


def _evaluate(terms: Sequence[Term], u: Vector) -> State:
    value, shares = _combined(terms, [term.at(u) for term in terms])
    slope = np.zeros_like(u)
    slopes = [term.slope(share) for term, share in zip(terms, shares, strict=True)]
    for term, (rows, columns) in zip(terms, slopes, strict=True):
        slope += np.bincount(term.tensor.made, rows, len(u)) + np.bincount(term.tensor.read, columns, len(u))
    slope[0] = 0
    return State(value, slope, shares, slopes)


def _combined(terms: Sequence[Term], logs: Sequence[Vector]) -> tuple[float, list[Vector]]:
    """``log sum exp`` over all grids of all terms, or their mean if shares are fixed; and every grid's share in it."""
    fixed = [term.fixed for term in terms if term.fixed is not None]
    if fixed:
        return sum(float((share * np.where(share > 0, log, 0)).sum()) for share, log in zip(fixed, logs, strict=True)), fixed
    value = float(np.logaddexp.reduce([np.logaddexp.reduce(log, axis=None) for log in logs])) if logs else -np.inf
    return value, [np.exp(log - value) for log in logs]


def _exact(terms: Sequence[Term], u: Vector) -> float:
    return _combined(terms, [term.exact(u) for term in terms])[0]


def _lower_bound(terms: Sequence[Term], now: State, u: Vector, limit: float) -> float:
    """The least value in the box of ``c + g.u``, by ``log sum N >= sum share log(N / share)`` and the same within every term."""
    value = sum(term.geometric(share, u) for term, share in zip(terms, now.shares, strict=True))
    return float(value - (now.slope * u + np.abs(now.slope) * limit).sum()) - ROUNDOFF


class LogSum:
    """``log sum exp(logs + q (u_made - u_read))`` over each grid of a tensor, for ``u`` around a centre.

    Arrays are ``(groups, out, in)``, with 1 in the place of what is summed over.
    """

    def __init__(self, tensor: Tensor, logs: Vector, q: float, centre: Vector) -> None:
        self.tensor, self.q = tensor, q
        self.centre = made, read = _both(tensor, centre)
        self.logs = logs + q * (made - read)
        top = self.logs.max(axis=_axes(tensor), keepdims=True)
        self.top = np.where(np.isfinite(top), top, 0.0)
        self.summands = np.exp(self.logs - self.top)

    def at(self, u: Vector) -> Vector:
        """The value by grid. What follows is at the same ``u``."""
        made, read = (now - then for now, then in zip(_both(self.tensor, u), self.centre, strict=True))
        self.moved = self.q * made, -self.q * read
        self.made, self.read = np.exp(self.moved[0]), np.exp(self.moved[1])
        rows = self.made * (self.summands @ self.read.swapaxes(1, 2))
        self.total = rows.sum(axis=_axes(self.tensor), keepdims=True)
        self.rows = _ratio(rows, self.total)
        self.log: Vector = self.top + _log(self.total)
        return self.log

    def columns(self, amount: Vector) -> Vector:
        """The sum over the rows of all shares, ``(groups, 1, in)``, each grid counting by its amount; ``rows`` is that over the columns."""
        columns: Vector = self.read * ((_ratio(amount, self.total) * self.made).swapaxes(1, 2) @ self.summands)
        return columns

    def log_shares(self) -> Vector:
        """The logarithm of every entry's share in its grid."""
        made, read = self.moved
        logs: Vector = self.logs + (made - np.where(np.isfinite(self.log), self.log, 0.0)) + read
        return logs


class LogMean:
    """``q`` times the mean of ``u_made - u_read`` over the live rows and columns of each grid; otherwise like :class:`LogSum`."""

    def __init__(self, tensor: Tensor, q: float) -> None:
        self.tensor, self.q = tensor, q
        live = np.max([part > 0 for part in tensor.parts], axis=0)
        live = live if tensor.by_row else live.any(axis=2, keepdims=True) & live.any(axis=1, keepdims=True)
        self.shares = _ratio(live.astype(np.float64), live.sum(axis=_axes(tensor), keepdims=True))
        self.rows = self.shares.sum(axis=2, keepdims=True)

    def at(self, u: Vector) -> Vector:
        made, read = _both(self.tensor, u)
        value: Vector = self.q * (self.rows * made - self.shares @ read.swapaxes(1, 2)).sum(axis=_axes(self.tensor), keepdims=True)
        return value

    def columns(self, amount: Vector) -> Vector:
        columns: Vector = (amount * self.shares).sum(axis=1, keepdims=True)
        return columns


class Term:
    """The logarithm of one tensor's noise, ``2 log R + log Q - log 12 steps**2``, by grid: one of all its rows, or one a row."""

    def __init__(self, tensor: Tensor, weight: float, share: float | None = None) -> None:
        self.tensor = tensor
        self.entries = [_log(part) for part in tensor.parts]
        self.constant = np.log(weight / (12 * tensor.steps**2))
        self.ranges: list[LogSum] = []
        centre = np.zeros(1 + max(tensor.made.max(), tensor.read.max()))
        self.sum = LogSum(tensor, _log(tensor.sensitivity), -2.0, centre) if share is None else LogMean(tensor, -2.0)
        live = np.max([part.max(axis=_axes(tensor), keepdims=True) for part in tensor.parts], axis=0) > 0
        #: The grids' shares in a mean of logarithms, if the objective is one.
        self.fixed = None if share is None else share * live / live.sum()

    def begin(self, u: Vector, p: float) -> None:
        """Begin a stage around ``u``: the shares of all entries so far are their weights."""
        self.p = p
        weights = [r.log_shares() for r in self.ranges] or [0.0] * len(self.entries)
        self.ranges = [LogSum(self.tensor, p * a + w, p, u) for a, w in zip(self.entries, weights, strict=True)]

    def at(self, u: Vector) -> Vector:
        logs = np.stack([r.at(u) / self.p for r in self.ranges])
        log_range = np.logaddexp.reduce(logs)
        self.parts = np.exp(logs - np.where(np.isfinite(log_range), log_range, 0.0))  # of each part in the range
        value: Vector = 2 * log_range + self.sum.at(u) + self.constant
        return value

    def exact(self, u: Vector) -> Vector:
        """The same without smoothing."""
        made, read = _both(self.tensor, u)
        log_range = np.logaddexp.reduce([(a + made - read).max(axis=_axes(self.tensor), keepdims=True) for a in self.entries])
        value: Vector = 2 * log_range + self.sum.at(u) + self.constant
        return value

    def geometric(self, share: Vector, u: Vector) -> float:
        """``sum share log(N / share)`` with the geometric mean of entries in the place of every maximum, weighted by their shares."""
        made, read = _both(self.tensor, u)
        value = self.sum.at(u) + self.constant
        for part, a, r in zip(self.parts, self.entries, self.ranges, strict=True):
            weights = np.exp(r.log_shares())
            mean = (weights * np.where(weights > 0, a + made - read, 0.0)).sum(axis=_axes(self.tensor), keepdims=True)
            value = value + 2 * (part * mean + entr(part))
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


# ------------------------------------------------------------------------------------------------------ Newton's method


def _minimize(terms: Sequence[Term], u: Vector, p: float, limit: float, slope: float, max_iter: int) -> tuple[Vector, State, int]:
    """Newton's method for the smooth model within the box; labels that lean on its walls stay."""
    low, high = np.maximum(-limit, u - REACH / p), np.minimum(limit, u + REACH / p)
    now = _evaluate(terms, u)
    for steps in range(max_iter):
        free = ~((u <= low) & (now.slope > 0) | (u >= high) & (now.slope < 0))
        free[0] = False
        if np.abs(now.slope[free]).sum() <= slope:
            return u, now, steps
        step = np.clip(_newton_step(terms, now, free), -LONGEST_STEP / p**0.5, LONGEST_STEP / p**0.5)
        for t in 0.5 ** np.arange(20):
            moved = np.clip(u + t * step, low, high)
            then = _evaluate(terms, moved)
            if then.value <= now.value + 1e-4 * float(now.slope @ (moved - u)):
                break
        else:
            return u, _evaluate(terms, u), steps + 1  # within roundoff of the minimum
        u, now = moved, then
    return u, now, max_iter


def _newton_step(terms: Sequence[Term], now: State, free: npt.NDArray[np.bool_]) -> Vector:
    """To the minimum of the quadratic model over the free labels: ``sum share (H + g g')`` from every grid, ``g g'`` for ``log sum exp``."""
    curvature = Curvature(len(free))
    for term, share, slopes in zip(terms, now.shares, now.slopes, strict=True):
        if not share.any():
            continue
        for amount, piece in term.pieces(share):
            if isinstance(piece, LogSum):
                curvature.covariance(piece, amount * piece.q**2)
        if term.fixed is None and term.tensor.by_row:
            curvature.diagonal(term.tensor.read, GG * np.abs(slopes[1]))
        elif term.fixed is None:
            curvature.rank_one(term.tensor.made, slopes[0], term.tensor.read, slopes[1], 1 / share.item())
    return curvature.solve(-now.slope, free)


class Curvature:
    """A quadratic form of the labels: a Laplacian (a diagonal, and links between two labels) and rank-one terms."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.entries: list[tuple[Indices, Indices, Vector]] = []
        self.spans: list[tuple[Indices, Vector]] = []
        self.amounts: list[float] = []

    def rank_one(self, made: Indices, rows: Vector, read: Indices, columns: Vector, amount: float) -> None:
        """``amount (rows . u_made + columns . u_read)**2``."""
        self.spans.append((np.concatenate([made, read]), np.concatenate([rows, columns])))
        self.amounts.append(amount)

    def diagonal(self, labels: Indices, x: Vector) -> None:
        self.entries.append((labels, labels, x.reshape(-1)))

    def covariance(self, piece: LogSum, amount: Vector) -> None:
        """``amount`` times the covariance of ``u_made - u_read`` under the entries' shares: a log-sum's second derivative.

        ``sum w (u_made - u_read)**2 - (sum w (u_made - u_read))**2``, with the products ``u_made u_read`` one by one where they couple
        strongly, and as if rows and columns were independent elsewhere. If every row has a grid of its own, ``u_made`` cancels; the
        least over a free number in its place takes off the mean.
        """
        tensor, made = piece.tensor, piece.tensor.made
        if tensor.by_row:
            made = np.arange(self.size, self.size + len(made))
            self.size += len(made)
        rows, columns = amount * piece.rows, piece.columns(amount)
        self.entries += [(made, made, rows.reshape(-1)), (tensor.read, tensor.read, columns.reshape(-1))]
        left, right = _ratio(_ratio(amount, piece.total) * piece.made, np.sqrt(rows)), _ratio(piece.read, np.sqrt(columns))
        strong = np.flatnonzero(piece.summands * left * right > COUPLING)
        _, out, inner = piece.summands.shape
        row = strong // inner
        column = row // out * inner + strong % inner
        link = piece.summands.reshape(-1)[strong] * (_ratio(amount, piece.total) * piece.made).reshape(-1)[row] * piece.read.reshape(-1)[column]
        self.entries += [(made[row], tensor.read[column], -link), (tensor.read[column], made[row], -link)]
        rows, columns = rows.reshape(-1), columns.reshape(-1)
        if not tensor.by_row:
            self.rank_one(made, rows, tensor.read, -columns, -1 / amount.item())
        weak_rows = np.maximum(rows - np.bincount(row, link, len(rows)), 0)
        weak_columns = np.maximum(columns - np.bincount(column, link, len(columns)), 0)
        if (weak := float(weak_rows.sum())) > 1e-6 * float(rows.sum()):  # -2 x y = ((x - y)**2 - (x + y)**2) / 2
            self.rank_one(made, weak_rows, tensor.read, weak_columns, -1 / (2 * weak))
            self.rank_one(made, weak_rows, tensor.read, -weak_columns, 1 / (2 * weak))

    def solve(self, target: Vector, free: npt.NDArray[np.bool_]) -> Vector:
        """Where the form's slope is the target, on free labels; 0 elsewhere. Flat directions (a dead channel, an orbit) get a tiny ridge."""
        chosen = np.append(free, np.ones(self.size - len(free), bool))
        count = int(chosen.sum())
        place = np.where(chosen, np.cumsum(chosen) - 1, -1)
        i, j, x = (np.concatenate(arrays) for arrays in zip(*self.entries, strict=True))
        i, j = place[i], place[j]
        mine = (i >= 0) & (j >= 0)
        i, j, x = i[mine], j[mine], x[mine]
        diagonal = np.bincount(i[i == j], x[i == j], count)
        ridge = 1e-6 * diagonal + 1e-9 * diagonal.max()
        every = np.arange(count)
        laplacian = coo_array((np.append(x, ridge), (np.append(i, every), np.append(j, every))), shape=(count, count)).tocsc()
        form = laplacian
        if self.spans:
            rows = place[np.concatenate([labels for labels, _ in self.spans])]
            columns = np.repeat(np.arange(len(self.spans)), [len(labels) for labels, _ in self.spans])
            values = np.concatenate([value for _, value in self.spans])
            spans = coo_array((values[rows >= 0], (rows[rows >= 0], columns[rows >= 0])), shape=(count, len(self.spans))).tocsr()
            across, amounts = spans.T.tocsr(), np.array(self.amounts)
            form = LinearOperator((count, count), lambda v: laplacian @ v + spans @ (amounts * (across @ v)), dtype=np.float64)
        factors = splu(laplacian, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
        metric = LinearOperator((count, count), factors.solve, dtype=np.float64)
        step = np.zeros(self.size)
        step[chosen], _ = cg(form, np.append(target, np.zeros(self.size - len(free)))[chosen], M=metric, maxiter=CG_STEPS)
        return step[:len(free)]


# -------------------------------------------------------------------------------------------------------------- helpers


def _axes(tensor: Tensor) -> int | tuple[int, ...]:
    """What one grid spans of ``(groups, out, in)``."""
    return 2 if tensor.by_row else (0, 1, 2)


def _both(tensor: Tensor, u: Vector) -> tuple[Vector, Vector]:
    """What a tensor makes and reads, beside its rows and columns."""
    groups, out, inner = tensor.sensitivity.shape
    return u[tensor.made].reshape(groups, out, 1), u[tensor.read].reshape(groups, 1, inner)


def _log(x: Vector) -> Vector:
    """Logarithm, minus infinity at 0."""
    with np.errstate(divide="ignore"):
        return np.log(x)


def _ratio(a: Vector, b: Vector) -> Vector:
    """``a / b``, and 0 where ``b`` is 0."""
    result: Vector = a / np.where(b > 0, b, np.inf)
    return result
