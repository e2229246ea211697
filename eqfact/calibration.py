"""What range does every value take on data? One pass over batches of any size.

Per channel the minimum, maximum, mean and mean square of every value, as sums, so that the statistics of shards add up
to those of the whole: ``calibrate(g, a) + calibrate(g, b)``. Section 2 of the paper (A and P); all in float64.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from eqfact.graph import Data, Graph, batches_of, walk
from eqfact.ops.base import Array, Commuting, Weighted


@dataclass(frozen=True, eq=False)
class ValueStatistics:
    """Per-channel statistics ``(C,)`` of one value over ``count`` entries a channel (images times pixels)."""

    count: int
    min: Array
    max: Array
    sum: Array
    sum_square: Array

    @property
    def mean(self) -> Array:
        """Mean of each channel."""
        return self.sum / self.count

    @property
    def mean_square(self) -> Array:
        """Mean of the square of each channel."""
        return self.sum_square / self.count

    @property
    def variance(self) -> Array:
        """Variance of each channel; never negative."""
        return np.maximum(self.mean_square - self.mean**2, 0)

    @property
    def max_abs(self) -> Array:
        """Largest magnitude of each channel."""
        return np.maximum(np.abs(self.min), np.abs(self.max))

    def __add__(self, other: ValueStatistics) -> ValueStatistics:
        return ValueStatistics(self.count + other.count, np.minimum(self.min, other.min), np.maximum(self.max, other.max),
                               self.sum + other.sum, self.sum_square + other.sum_square)

    def rescaled(self, factor: Array) -> ValueStatistics:
        """The statistics of ``factor * value``, for positive factors ``(C,)``."""
        return ValueStatistics(self.count, self.min * factor, self.max * factor, self.sum * factor, self.sum_square * factor**2)


class Statistics(Mapping[str, ValueStatistics]):
    """Statistics of every value of a network by name; ``a + b`` merges two runs over different data."""

    __eq__ = object.__eq__  # see Factorization
    __hash__ = object.__hash__

    def __init__(self, of: Mapping[str, ValueStatistics]) -> None:
        self._of = dict(of)

    def __getitem__(self, value: str) -> ValueStatistics:
        try:
            return self._of[value]
        except KeyError:
            raise KeyError(f"no statistics of value '{value}'; calibrate the graph that holds it") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    def __add__(self, other: Statistics) -> Statistics:
        if set(self) != set(other):
            raise ValueError(f"statistics of different networks do not add up: values {sorted(set(self) ^ set(other))[:4]} are in one only")
        for name in self:
            if self[name].min.shape != other[name].min.shape:
                raise ValueError(f"statistics of different networks do not add up: value '{name}' has "
                                 f"{len(self[name].min)} channels in one and {len(other[name].min)} in the other")
        return Statistics({name: self[name] + other[name] for name in self})


def calibrate(graph: Graph, batches: Data | Iterable[Data]) -> Statistics:
    """Statistics of every value over ``batches``: one batch ``(N, C, *spatial)``, or any iterable of batches.

    Raises :class:`ValueError` if there is no batch, and as :func:`eqfact.forward` on bad data.

    >>> net = Graph.chain((1,), double=Dense(np.array([[2.0]])))
    >>> stats = calibrate(net, np.array([[1.0], [-3.0]]))
    >>> float(stats["double"].min[0]), float(stats["double"].mean[0])
    (-6.0, -2.0)
    """
    total: dict[str, ValueStatistics] = {}
    for batch in batches_of(batches):
        for name, value in walk(graph, batch):
            of_batch = _reduce(value)
            total[name] = total[name] + of_batch if name in total else of_batch
    if not total:
        raise ValueError("calibration needs at least one batch, got none")
    for name, of in total.items():
        if not np.isfinite(of.sum_square).all():
            raise ValueError(f"value '{name}' overflows on the calibration data (channel {int(np.argmin(np.isfinite(of.sum_square)))})")
    return Statistics(total)


def check_statistics(graph: Graph, stats: Statistics, values: Collection[str] | None = None) -> None:
    """An error if the statistics of these values, or of all, are not those of this graph, or not finite."""
    if not isinstance(stats, Mapping):
        raise TypeError(f"stats must be what calibrate(graph, batches) returns, got {type(stats).__name__}")
    values = graph.shapes if values is None else values
    missing = sorted(set(values) - set(stats))
    if missing:
        raise ValueError(f"the statistics lack value '{missing[0]}': calibrate this graph, after folding")
    for name in values:
        shape = graph.shapes[name]
        if stats[name].max.shape != shape[:1]:
            raise ValueError(f"the statistics of value '{name}' have {stats[name].max.size} channels, the network has {shape[0]}")
        if not (np.isfinite(stats[name].min).all() and np.isfinite(stats[name].max).all()):
            raise ValueError(f"the statistics of value '{name}' hold NaN or infinity")


def likely_ranges(graph: Graph, stats: Statistics, gaussians: Mapping[str, tuple[Array, Array]] | None = None, *,
                  deviations: float = 8.0) -> Statistics:
    """Statistics with the extremes that other data may reach: what is to be equalized when calibration data are few.

    A channel that hardly fires on ten images may fire on the eleventh, and saturate if it was amplified meanwhile. But before
    its activation it varied all along: so what a layer makes, and its activation passes on, is taken to reach mean +- ``deviations``
    standard deviations, as well as the extremes seen. ``gaussians`` holds mean and deviation ``(C,)`` of layers by name from where they are
    known better, as :func:`eqfact.batchnorm_gaussians` reads them off the unfolded network; names that the graph lacks are left
    out. Give the result to :func:`eqfact.equalize` for ``ranges``; :func:`eqfact.quantize` goes by the extremes seen.

    :class:`ValueError` if ``deviations`` is negative, the statistics are of another graph, or a mean or deviation is no number.

    >>> net = Graph.chain((1,), fc=Dense(np.array([[1.0]])), act=ReLU())
    >>> stats = calibrate(net, np.array([[-5.0], [-3.0]]))
    >>> float(stats["act"].max[0]), float(likely_ranges(net, stats)["act"].max[0])
    (0.0, 4.0)
    """
    if not (np.isfinite(deviations) and deviations >= 0):
        raise ValueError(f"deviations must be a finite number of at least 0, got {deviations}")
    check_statistics(graph, stats)
    layers = [node.name for node in graph.nodes if isinstance(node.op, Weighted)]
    moments: dict[str, object] = {name: (stats[name].mean, np.sqrt(stats[name].variance)) for name in layers}
    moments |= {name: of for name, of in (gaussians or {}).items() if name in graph.shapes}
    ends: dict[str, Array] = {}
    for name, of_value in moments.items():
        mean, deviation = _gaussian(name, of_value, graph.shapes[name][0])
        ends[name] = np.stack([mean - deviations * deviation, mean + deviations * deviation])
    for node in graph.nodes:
        if isinstance(node.op, Commuting) and node.op.activation and node.inputs[0] in ends:
            ends.setdefault(node.name, node.op.forward(ends[node.inputs[0]]))
    return Statistics({name: replace(of, min=np.minimum(of.min, ends[name].min(axis=0)), max=np.maximum(of.max, ends[name].max(axis=0)))
                       if name in ends else of for name, of in stats.items()})


def _gaussian(name: str, of: Any, channels: int) -> tuple[Array, Array]:
    """Mean and standard deviation of a value, ``(C,)`` each, if that is what they are."""
    try:
        mean, deviation = (np.asarray(moment, np.float64) for moment in of)
    except (TypeError, ValueError):
        raise ValueError(f"value '{name}' needs a mean and a standard deviation for each of its {channels} channels, as two arrays "
                         f"({channels},), got {' '.join(repr(of).split())[:80]}; "
                         "eqfact.batchnorm_gaussians reads them off an unfolded network") from None
    if not mean.shape == deviation.shape == (channels,):
        raise ValueError(f"mean and deviation of value '{name}' have shapes {mean.shape} and {deviation.shape}, "
                         f"the network has {channels} channels: give two arrays ({channels},)")
    wrong = ~(np.isfinite(mean) & np.isfinite(deviation) & (deviation >= 0))
    if wrong.any():
        channel = int(np.argmax(wrong))
        raise ValueError(f"value '{name}', channel {channel}: mean {mean[channel]} and standard deviation {deviation[channel]} must be "
                         "finite, and the latter not negative; leave the value out where they are not known")
    return mean, deviation


def _reduce(value: Array) -> ValueStatistics:
    axes: Any = (0, *range(2, value.ndim))
    channels = value.shape[1]
    exact = np.ascontiguousarray(np.moveaxis(value, 1, 0), np.float64).reshape(channels, -1)
    return ValueStatistics(exact.shape[1], value.min(axis=axes).astype(np.float64), value.max(axis=axes).astype(np.float64),
                           exact.sum(axis=1), np.einsum("ij,ij->i", exact, exact))
