"""What range does every value take on data? One pass over batches of any size.

Per channel the minimum, maximum, mean and mean square of every value, as sums, and a histogram, so that the statistics of shards add
up to those of the whole: ``calibrate(g, a) + calibrate(g, b)``. Section 2 of the paper (A and P); all in float64.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from eqfact.graph import Data, Graph, Node, batches_of, walk
from eqfact.histograms import BLOCK, Counting, Histogram
from eqfact.ops.base import Array, Commuting, Weighted
from eqfact.ops.joining import Flatten
from eqfact.ops.space import AvgPool, GlobalAvgPool

#: A layer's channel counts as another one when its weights are so many times as large or small; tuning and pruning moves them less.
RESIZED = 1.25


@dataclass(frozen=True, eq=False)
class ValueStatistics:
    """Per-channel statistics ``(C,)`` of one value over ``count`` entries a channel (images times pixels).

    ``histogram`` may be missing where they are made by hand: ranges by other rules than ``"minmax"`` need one.

    >>> net = Graph.chain((2,), act=ReLU())
    >>> of = calibrate(net, np.array([[1.0, -2.0], [3.0, 4.0]]))["act"]
    >>> of.count, of.mean, of.mean_square
    (2, array([2., 2.]), array([5., 8.]))
    """

    count: int
    min: Array
    max: Array
    sum: Array
    sum_square: Array
    histogram: Histogram | None = None

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
        histogram = None if self.histogram is None or other.histogram is None else self.histogram + other.histogram
        return ValueStatistics(self.count + other.count, np.minimum(self.min, other.min), np.maximum(self.max, other.max),
                               self.sum + other.sum, self.sum_square + other.sum_square, histogram)

    def rescaled(self, factor: Array) -> ValueStatistics:
        """The statistics of ``factor * value``, for positive factors ``(C,)``."""
        return ValueStatistics(self.count, self.min * factor, self.max * factor, self.sum * factor, self.sum_square * factor**2,
                               None if self.histogram is None else self.histogram.rescaled(factor))


class Statistics(Mapping[str, ValueStatistics]):
    """Statistics of every value of a network by name; ``a + b`` merges two runs over different data.

    ``graph`` is the network that was calibrated and ``factors`` ``(C,)``, by value, what its values were multiplied by since, where that is
    known: passes refuse statistics of a network whose channels had other sizes. Those made by hand need not know.

    >>> net = Graph.chain((2,), act=ReLU())
    >>> one, two = (calibrate(net, np.array([row])) for row in ([1.0, -2.0], [3.0, 4.0]))
    >>> (one + two)["act"].max, (one + two)["x"].min
    (array([3., 4.]), array([ 1., -2.]))
    """

    __eq__ = object.__eq__  # see Factorization
    __hash__ = object.__hash__

    def __init__(self, of: Mapping[str, ValueStatistics], graph: Graph | None = None, factors: Mapping[str, Array] | None = None) -> None:
        self._of = dict(of)
        self.graph = graph
        self.factors = dict(factors or {})

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
        graph = self.graph if other.graph is not None else None
        if graph is not None and other.graph is not None and (moved := _moved_channel(self, other.graph, other.factors)) is not None:
            raise ValueError(f"statistics of different networks do not add up: {moved} in the second; give both the same factors first")
        return Statistics({name: self[name] + other[name] for name in self}, graph, self.factors)

    def rescaled(self, factors: Mapping[str, Array]) -> Statistics:
        """The statistics of the network whose values are multiplied by these factors."""
        together = {name: self.factors.get(name, 1.0) * np.asarray(factors[name], np.float64) for name in self}
        return Statistics({name: of.rescaled(factors[name]) for name, of in self.items()}, self.graph, together)


def calibrate(graph: Graph, batches: Data | Iterable[Data], *, histograms: bool = True) -> Statistics:
    """Statistics of every value over ``batches``: one batch ``(N, C, *spatial)``, or any iterable of batches.

    ``histograms=False`` leaves out what ranges by other rules than ``"minmax"`` are read off: 1 kB a channel and up to half of the time.

    Raises :class:`ValueError` if there is no batch, and as :func:`eqfact.forward` on bad data.

    >>> net = Graph.chain((1,), double=Dense(np.array([[2.0]])))
    >>> stats = calibrate(net, np.array([[1.0], [-3.0]]))
    >>> float(stats["double"].min[0]), float(stats["double"].mean[0])
    (-6.0, -2.0)
    """
    total: dict[str, ValueStatistics] = {}
    counting: dict[str, Counting] = {}
    for batch in batches_of(batches):
        for name, value in walk(graph, batch):
            entries = np.ascontiguousarray(np.moveaxis(value, 1, 0)).reshape(value.shape[1], -1)
            of_batch = _reduce(entries)
            total[name] = total[name] + of_batch if name in total else of_batch
            if histograms:
                counting.setdefault(name, Counting()).add(entries, of_batch.max_abs)
    if not total:
        raise ValueError("calibration needs at least one batch, got none")
    for name, of in total.items():
        if not np.isfinite(of.sum_square).all():
            raise ValueError(f"value '{name}' overflows on the calibration data (channel {int(np.argmin(np.isfinite(of.sum_square)))})")
    return Statistics({name: replace(of, histogram=counting[name].result()) if histograms else of for name, of in total.items()}, graph)


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
    if isinstance(stats, Statistics) and (moved := _moved_channel(stats, graph, {})) is not None:
        raise ValueError(f"these are the statistics of another network: {moved} in this one, as after an equalization; "
                         "give factorization.apply(stats), or calibrate this network")


def _moved_channel(stats: Statistics, graph: Graph, factors: Mapping[str, Array]) -> str | None:
    """In words, a layer and channel whose weights have another size in a network than in the one that was calibrated, or None.

    Layers of the same name, kind and shape that read the same are compared, so that folded networks pass, and so do weights on grids.
    """
    if stats.graph is None or (stats.graph is graph and not stats.factors and not factors):
        return None
    layers = {node.name: node for node in stats.graph.nodes if isinstance(node.op, Weighted)}
    for node in graph.nodes:
        op, before = node.op, layers.get(node.name)
        if not isinstance(op, Weighted) or before is None or before.inputs != node.inputs or type(op) is not type(before.op) \
                or op.weight.shape != before.op.weight.shape:
            continue
        was, now = _rescaled(before, stats.factors), _rescaled(node, factors)
        sizes = [np.sqrt(np.square(w.reshape(len(w), -1), dtype=np.float64).sum(axis=1)) for w in (was, now)]
        ratio = np.divide(sizes[1], sizes[0], out=np.ones(len(was)), where=(sizes[0] > 0) & (sizes[1] > 0))
        moved = np.maximum(ratio, 1 / ratio) > RESIZED
        if op.grid is not None and moved.any():  # weights may be a step off theirs
            moved &= (np.abs(now - was) > op.grid.scale).reshape(len(was), -1).any(axis=1)
        if moved.any():
            channel = int(np.argmax(np.where(moved, np.abs(np.log(ratio)), 0)))
            return f"the weights of layer '{node.name}', channel {channel}, are {ratio[channel]:.3g} times as large"
    return None


def _rescaled(node: Node, factors: Mapping[str, Array]) -> Array:
    """The weights of a layer whose input and output are multiplied by these factors."""
    assert isinstance(node.op, Weighted)
    names = (node.name, *node.inputs)
    if not all(name in factors for name in names):
        return node.op.weight
    return node.op.rescale(*(factors[name] for name in names)).weight


def likely_ranges(graph: Graph, stats: Statistics, gaussians: Mapping[str, tuple[Array, Array]] | None = None, *,
                  deviations: float = 8.0) -> Statistics:
    """Statistics with the extremes that other data may reach: what is to be equalized when calibration data are few.

    A channel that hardly fires on ten images may fire on the eleventh, and saturate if it was amplified meanwhile. But before
    its activation it varied all along: so what a layer makes, and its activation passes on, is taken to reach mean +- ``deviations``
    standard deviations, as well as the extremes seen. ``gaussians`` holds mean and deviation ``(C,)`` of layers by name from where they are
    known better, as :func:`eqfact.batchnorm_gaussians` reads them off the unfolded network; names that the graph lacks are left
    out. A mean over space has one entry an image, so its extremes are those of few: the largest share of what its input may reach
    that any channel was seen to have, all channels may have.

    Give the result to :func:`eqfact.equalize` for ``ranges``; :func:`eqfact.quantize` goes by the extremes seen.

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
    likely = {name: replace(of, min=np.minimum(of.min, ends[name].min(axis=0)), max=np.maximum(of.max, ends[name].max(axis=0)))
              if name in ends else of for name, of in stats.items()}
    for node in graph.nodes:
        own, reach = likely[node.name], likely[node.inputs[0]]
        if isinstance(node.op, (AvgPool, GlobalAvgPool)):
            likely[node.name] = _sharing(own, reach)
        elif isinstance(node.op, Flatten) and len(own.max) == len(reach.max):  # of a mean over all of space
            likely[node.name] = replace(own, min=reach.min, max=reach.max)
    return Statistics(likely, stats.graph, stats.factors)


def _sharing(own: ValueStatistics, reach: ValueStatistics) -> ValueStatistics:
    """Every channel with that share of its reach which the one with the largest share has; a share is no matter of the factors."""
    low, high = np.minimum(reach.min, 0), np.maximum(reach.max, 0)
    shares = [np.divide(seen, end, out=np.zeros_like(end), where=end != 0) for seen, end in ((own.min, low), (own.max, high))]
    share = max(float(of.max()) for of in shares)
    return replace(own, min=np.minimum(own.min, share * low), max=np.maximum(own.max, share * high))


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


def _reduce(entries: Array) -> ValueStatistics:
    """Of channels ``(C, n)``; in float64, a block at a time."""
    channels, count = entries.shape
    total, square = np.empty(channels), np.empty(channels)
    block = max(1, BLOCK // count)
    for start in range(0, channels, block):
        part = slice(start, start + block)
        exact = entries[part].astype(np.float64)
        total[part], square[part] = exact.sum(axis=1), np.einsum("ij,ij->i", exact, exact)
    return ValueStatistics(count, entries.min(axis=1).astype(np.float64), entries.max(axis=1).astype(np.float64), total, square)
