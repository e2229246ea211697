"""How does the logarithm of a sum move with the factors, to first and to second order?

With ``u = log f``, everything that :mod:`eqfact.optimal` minimises is made of sums over the entries of a tensor,

    L(u) = log sum exp(logs + q (u_made - u_read)),     with shares w = exp(logs + q (u_made - u_read) - L):

    dL / du: q times the mean under w of (u_made - u_read);     d2L / du2: q**2 times its covariance (sparse where few entries matter).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.sparse import block_diag, coo_array, csr_array, identity
from scipy.sparse.linalg import LinearOperator, cg, splu

from eqfact.noise import Indices, Tensor, Vector
from eqfact.ops.base import Array

#: Channels with a coupling above this, in units of their own curvatures, are coupled one by one.
COUPLING = 0.2

#: Iterations of conjugate gradients per Newton step.
CG_STEPS = 6


class LogSum:
    """``log sum exp(logs + q (u_made - u_read))`` over each grid of a tensor, for ``u`` around a centre.

    Arrays are ``(groups, out, in)``, with 1 in the place of what is summed over. They are as many as the weights: so ``logs`` are not
    kept, and their memory becomes that of the summands.
    """

    def __init__(self, tensor: Tensor, logs: Vector, q: float, centre: Vector) -> None:
        self.tensor, self.q = tensor, q
        self.centre = made, read = made_and_read(tensor, centre)
        logs += q * made
        logs -= q * read
        top = logs.max(axis=axes_of(tensor), keepdims=True)
        self.top = np.where(np.isfinite(top), top, 0.0)
        logs -= self.top
        self.summands = np.exp(logs, out=logs)

    def at(self, u: Vector) -> Vector:
        """The value by grid. What follows is at the same ``u``."""
        made, read = (now - then for now, then in zip(made_and_read(self.tensor, u), self.centre, strict=True))
        self.made, self.read = np.exp(self.q * made), np.exp(-self.q * read)
        rows = self.made * (self.summands @ self.read.swapaxes(1, 2))
        self.total = rows.sum(axis=axes_of(self.tensor), keepdims=True)
        self.rows = ratio(rows, self.total)
        self.log: Vector = self.top + safe_log(self.total)
        return self.log

    def columns(self, amount: Vector) -> Vector:
        """The sum over the rows of all shares, ``(groups, 1, in)``, each grid counting by its amount; ``rows`` is that over the columns."""
        columns: Vector = self.read * ((ratio(amount, self.total) * self.made).swapaxes(1, 2) @ self.summands)
        return columns

    def shares(self) -> Vector:
        """Every entry's share in its grid."""
        shares: Vector = self.summands * ratio(self.made, self.total)
        shares *= self.read
        return shares


class LogMean:
    """``q`` times the mean of ``u_made - u_read`` over the live rows and columns of each grid; otherwise like :class:`LogSum`."""

    def __init__(self, tensor: Tensor, q: float) -> None:
        self.tensor, self.q = tensor, q
        live = np.logical_or.reduce([part > 0 for part in tensor.parts])
        live = live if tensor.by_row else live.any(axis=2, keepdims=True) & live.any(axis=1, keepdims=True)
        self.live, self.count = live, live.sum(axis=axes_of(tensor), keepdims=True)
        self.rows = ratio(live.sum(axis=2, keepdims=True), self.count)

    def at(self, u: Vector) -> Vector:
        made, read = made_and_read(self.tensor, u)
        sums = self.rows * made - ratio(self.live @ read.swapaxes(1, 2), self.count)
        value: Vector = self.q * sums.sum(axis=axes_of(self.tensor), keepdims=True)
        return value

    def columns(self, amount: Vector) -> Vector:
        per_row = np.broadcast_to(ratio(amount, self.count), self.rows.shape)
        columns: Vector = per_row.swapaxes(1, 2) @ self.live
        return columns


class Curvature:
    """A quadratic form of the labels: a Laplacian (a diagonal, and links between two labels) and rank-one terms.

    With ``forms`` ``B`` it is solved for the free numbers ``t`` of ``u = B t``.
    """

    def __init__(self, size: int, forms: csr_array | None = None) -> None:
        self.size, self.forms, self._labels = size, forms, size
        self.entries: list[tuple[Indices, Indices, Vector]] = []
        self.of_free: Vector | None = None
        self.spans: list[tuple[Indices, Vector]] = []
        self.amounts: list[float] = []

    def rank_one(self, made: Indices, rows: Vector, read: Indices, columns: Vector, amount: float) -> None:
        """``amount (rows . u_made + columns . u_read)**2``."""
        self.spans.append((np.concatenate([made, read]), np.concatenate([rows, columns])))
        self.amounts.append(amount)

    def free_diagonal(self, x: Vector) -> None:
        """``sum x t**2 / 2`` over the free numbers themselves."""
        self.of_free = x

    def diagonal(self, labels: Indices, x: Vector) -> None:
        self.entries.append((labels, labels, x.reshape(-1)))

    def covariance(self, piece: LogSum, amount: Vector) -> None:
        """``amount`` times the covariance of ``u_made - u_read`` under the entries' shares: a log-sum's second derivative.

        ``sum w (u_made - u_read)**2 - (sum w (u_made - u_read))**2``, with the products ``u_made u_read`` one by one where they couple
        strongly, and as if rows and columns were independent elsewhere. If every row has a grid of its own, ``u_made`` cancels; the
        least over a free number in its place takes off the mean.
        """
        if not amount.any():
            return
        tensor, made = piece.tensor, piece.tensor.made
        if tensor.by_row:
            made = np.arange(self.size, self.size + len(made))
            self.size += len(made)
        rows, columns = amount * piece.rows, piece.columns(amount)
        self.entries += [(made, made, rows.reshape(-1)), (tensor.read, tensor.read, columns.reshape(-1))]
        by_row, by_column = ratio(amount, piece.total) * piece.made, piece.read
        coupling = piece.summands * ratio(by_row, np.sqrt(rows))
        coupling *= ratio(by_column, np.sqrt(columns))
        strong = np.flatnonzero(coupling > COUPLING)
        del coupling
        _, out, inner = piece.summands.shape
        row = strong // inner
        column = row // out * inner + strong % inner
        link = piece.summands.reshape(-1)[strong] * by_row.reshape(-1)[row] * by_column.reshape(-1)[column]
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
        """The numbers at which the form's slope is the target, for those that are free; 0 for the others.

        By conjugate gradients, with the factors of the Laplacian for a metric. Flat directions (dead channels) get a tiny ridge.
        """
        (i, j, x), spans = self._by_number()
        size = len(target) + self.size - self._labels
        free = np.append(free, np.ones(size - len(free), bool))
        place, count = np.where(free, np.cumsum(free) - 1, -1), int(free.sum())
        mine = free[i] & free[j]
        i, j, x = place[i[mine]], place[j[mine]], x[mine]
        if self.of_free is not None:
            own = np.flatnonzero(free[:len(target)])
            i, j, x = np.append(i, place[own]), np.append(j, place[own]), np.append(x, self.of_free[own])
        diagonal = np.maximum(np.bincount(i[i == j], x[i == j], count), 0)
        ridge, every = 1e-6 * diagonal + 1e-9 * (diagonal.max() or 1.0), np.arange(count)
        laplacian = coo_array((np.append(x, ridge), (np.append(i, every), np.append(j, every))), shape=(count, count)).tocsc()
        spans, amounts = spans[free], np.array(self.amounts)
        across = spans.T.tocsr()
        form = LinearOperator((count, count), lambda v: laplacian @ v + spans @ (amounts * (across @ v)), dtype=np.float64)
        factors = splu(laplacian, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
        metric = LinearOperator((count, count), factors.solve, dtype=np.float64)
        every_target, t = np.append(target, np.zeros(size - len(target))), np.zeros(size)
        t[free], _ = cg(form, every_target[free], M=metric, maxiter=CG_STEPS)
        return t[:len(target)]

    def _by_number(self) -> tuple[tuple[Indices, Indices, Vector], csr_array]:
        """The Laplacian's entries, and the vectors of the rank-one terms as columns: ``B.T L B`` and ``B.T v``; grids' own numbers stay."""
        i, j, x = (np.concatenate(arrays) for arrays in zip(*self.entries, strict=True))
        rows = np.concatenate([labels for labels, _ in self.spans]) if self.spans else np.zeros(0, np.int64)
        columns = np.repeat(np.arange(len(self.spans)), [len(labels) for labels, _ in self.spans])
        values = np.concatenate([value for _, value in self.spans]) if self.spans else np.zeros(0)
        spans = coo_array((values, (rows, columns)), shape=(self.size, len(self.spans))).tocsr()
        if self.forms is None:
            return (i, j, x), spans
        basis = csr_array(block_diag([self.forms, identity(self.size - self._labels)]))
        laplacian = coo_array(basis.T @ coo_array((x, (i, j)), shape=(self.size, self.size)).tocsr() @ basis)
        return (laplacian.row.astype(np.int64), laplacian.col.astype(np.int64), laplacian.data), csr_array(basis.T @ spans)


def axes_of(tensor: Tensor) -> int | tuple[int, ...]:
    """What one grid spans of ``(groups, out, in)``."""
    return 2 if tensor.by_row else (0, 1, 2)


def made_and_read(tensor: Tensor, u: Vector) -> tuple[Vector, Vector]:
    """By row, ``(groups, out, 1)``, and by column, ``(groups, 1, in)``."""
    groups, out, inner = tensor.sensitivity.shape
    return u[tensor.made].reshape(groups, out, 1), u[tensor.read].reshape(groups, 1, inner)


def safe_log(x: Array) -> Vector:
    """Logarithm in float64, minus infinity at 0."""
    with np.errstate(divide="ignore"):
        log: Vector = np.log(x, dtype=np.float64)
    return log


def ratio(a: Vector, b: Vector) -> Vector:
    """``a / b``, and 0 where ``b`` is 0."""
    result: Vector = a / np.where(b > 0, b, np.inf)
    return result
