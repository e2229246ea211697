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

#: Channels with a coupling above this, in units of their own curvatures, are coupled one by one.
COUPLING = 0.1

#: Iterations of conjugate gradients per Newton step.
CG_STEPS = 6


class LogSum:
    """``log sum exp(logs + q (u_made - u_read))`` over each grid of a tensor, for ``u`` around a centre.

    Arrays are ``(groups, out, in)``, with 1 in the place of what is summed over.
    """

    def __init__(self, tensor: Tensor, logs: Vector, q: float, centre: Vector) -> None:
        self.tensor, self.q = tensor, q
        self.centre = made, read = made_and_read(tensor, centre)
        self.logs = logs + q * (made - read)
        top = self.logs.max(axis=axes_of(tensor), keepdims=True)
        self.top = np.where(np.isfinite(top), top, 0.0)
        self.summands = np.exp(self.logs - self.top)

    def at(self, u: Vector) -> Vector:
        """The value by grid. What follows is at the same ``u``."""
        made, read = (now - then for now, then in zip(made_and_read(self.tensor, u), self.centre, strict=True))
        self.moved = self.q * made, -self.q * read
        self.made, self.read = np.exp(self.moved[0]), np.exp(self.moved[1])
        rows = self.made * (self.summands @ self.read.swapaxes(1, 2))
        self.total = rows.sum(axis=axes_of(self.tensor), keepdims=True)
        self.rows = ratio(rows, self.total)
        self.log: Vector = self.top + safe_log(self.total)
        return self.log

    def columns(self, amount: Vector) -> Vector:
        """The sum over the rows of all shares, ``(groups, 1, in)``, each grid counting by its amount; ``rows`` is that over the columns."""
        columns: Vector = self.read * ((ratio(amount, self.total) * self.made).swapaxes(1, 2) @ self.summands)
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
        self.shares = ratio(live.astype(np.float64), live.sum(axis=axes_of(tensor), keepdims=True))
        self.rows = self.shares.sum(axis=2, keepdims=True)

    def at(self, u: Vector) -> Vector:
        made, read = made_and_read(self.tensor, u)
        value: Vector = self.q * (self.rows * made - self.shares @ read.swapaxes(1, 2)).sum(axis=axes_of(self.tensor), keepdims=True)
        return value

    def columns(self, amount: Vector) -> Vector:
        columns: Vector = (amount * self.shares).sum(axis=1, keepdims=True)
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
        strong = np.flatnonzero(piece.summands * ratio(by_row, np.sqrt(rows)) * ratio(by_column, np.sqrt(columns)) > COUPLING)
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


def safe_log(x: Vector) -> Vector:
    """Logarithm, minus infinity at 0."""
    with np.errstate(divide="ignore"):
        return np.log(x)


def ratio(a: Vector, b: Vector) -> Vector:
    """``a / b``, and 0 where ``b`` is 0."""
    result: Vector = a / np.where(b > 0, b, np.inf)
    return result
