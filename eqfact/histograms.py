"""How are the entries of a channel spread? Counts by sign and by magnitude, that merge and rescale without another look at the data.

A bin is an eighth of an octave: the magnitudes ``unit * 2**(k // 8) * (1 + (k % 8) / 8)`` up to the next. So a factor that is a power of
two is a shift of ``k``, any other one moves ``unit``, which is kept within ``[1, 2)``. Per channel 16 octaves are kept, that of its largest
magnitude and those below, and all else is counted as 0: what a shard drops the whole would drop, so shards add up to the whole exactly.

Why an eighth: an end between two bins is off by 1/16 at most. Rounding noise grows as the square of the end, and around the least of
rounding and saturation the sum grows by some ``(1/16)**2`` of itself: 0.02 dB. Why 16 octaves: an entry below has less than ``2**-30`` of
the square of the largest, 8e-4 of the rounding noise ``step**2 / 12`` of 8 bits that end there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eqfact.ops.base import Array

#: Bins in an octave, a power of two: as many leading bits of the mantissa.
BINS = 8
#: Bins that are kept, from the last of the octave of the largest magnitude down.
KEPT = 16 * BINS
#: The octave of a channel that has no entry but zeros, or what counts as such: below all others.
EMPTY = -(2**20)
#: The least magnitude that a channel's largest must have: all its bins are of normal numbers, whose leading bits tell them apart.
SMALLEST = 2.0**-1000

#: Entries that are counted at a time: few enough for a processor's cache.
BLOCK = 2**16
#: Channels with fewer entries wait for more of them: counting so few would take less time than adding up the counts.
FEW = 4 * KEPT

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of the entries of every channel of a value.

    ``counts`` ``(C, 2, KEPT)``: of negative and of positive entries, from the last bin of the octave ``top`` ``(C,)`` down. ``unit``
    ``(C,)`` is what magnitudes are measured in; ``count`` is how many entries a channel has, those that are in no bin (0, or 16 octaves
    below the largest) among them.

    >>> histogram = histogram_of(np.array([[-1.0, 0.0, 2.0, 2.0]]))
    >>> histogram.counts.sum(axis=2).tolist(), histogram.zeros.tolist(), (histogram + histogram).zeros.tolist()
    ([[1, 2]], [1], [2])
    """

    count: int
    top: Indices
    unit: Array
    counts: npt.NDArray[np.unsignedinteger]

    @property
    def zeros(self) -> Indices:
        """Entries in no bin, by channel: they are taken for 0."""
        zeros: Indices = self.count - self.live
        return zeros

    @property
    def live(self) -> Indices:
        """Entries in bins, by channel."""
        live: Indices = self.counts.sum(axis=(1, 2), dtype=np.int64)
        return live

    @property
    def middles(self) -> Array:
        """The magnitude in the middle of every bin, ``(C, KEPT)``; those of bins without entries may overflow or underflow."""
        return self.unit[:, None] * _middles(self._bins)

    def values(self, low: Array, high: Array) -> Array:
        """What the entries in every bin are taken for, ``(C, 2, KEPT)``: its middle, but within the extrema ``(C,)``.

        That matters: an activation that clips has much of its mass right at its largest value, and none beyond.
        """
        within: Array = np.clip(np.stack([-self.middles, self.middles], axis=1), low[:, None, None], high[:, None, None])
        return within

    @property
    def widths(self) -> Array:
        """How wide every bin is, ``(C, KEPT)``."""
        return self.unit[:, None] * _power_of_two(self._bins // BINS) / BINS

    @property
    def _bins(self) -> Indices:
        bins: Indices = BINS * (self.top[:, None] + 1) - 1 - np.arange(KEPT)
        return bins

    def __add__(self, other: Histogram) -> Histogram:
        """Of the entries of both; exact where the units are the same, else the second's bins go to the first's that hold their middles."""
        other, count = other._in_units_of(self), self.count + other.count
        top, unit = np.maximum(self.top, other.top), np.where(self.top == EMPTY, other.unit, self.unit)
        counts = self._lowered(top).astype(_dtype(count))
        counts += other._lowered(top)
        return Histogram(count, top, unit, counts)

    def rescaled(self, factor: Array) -> Histogram:
        """Of the entries times positive factors ``(C,)``."""
        mantissa, exponent = np.frexp(self.unit * factor)
        live = self.top != EMPTY
        return Histogram(self.count, np.where(live, self.top + exponent.astype(np.int64) - 1, EMPTY),
                         np.where(live, 2 * mantissa, 1.0), self.counts)

    def _lowered(self, top: Indices) -> npt.NDArray[np.unsignedinteger]:
        """The counts from higher bins down; those that leave the window are dropped."""
        down = np.minimum(top - self.top, KEPT // BINS) * BINS
        if not down.any():
            return self.counts
        counts = self.counts.copy()
        for by in np.unique(down[down > 0]).tolist():
            moved = np.flatnonzero(down == by)
            counts[moved, :, by:] = self.counts[moved, :, :KEPT - by]
            counts[moved, :, :by] = 0
        return counts

    def _in_units_of(self, other: Histogram) -> Histogram:
        """Those channels whose units differ in those of the other, as far as bins tell."""
        apart = np.flatnonzero((self.unit != other.unit) & (self.top != EMPTY) & (other.top != EMPTY))
        if not apart.size:
            return self
        top, unit, counts = self.top.copy(), self.unit.copy(), self.counts.copy()
        bins = _bin(np.maximum(self.middles[apart], np.finfo(np.float64).tiny) / other.unit[apart, None])
        # the octave of the first bin that holds something
        first = np.argmax(self.counts[apart].any(axis=1), axis=1)
        top[apart], unit[apart], counts[apart] = bins[np.arange(len(apart)), first] // BINS, other.unit[apart], 0
        place = BINS * (top[apart, None] + 1) - 1 - bins
        channel, old = np.nonzero((place >= 0) & (place < KEPT))
        for sign in range(2):
            one = counts[:, sign]  # a view
            np.add.at(one, (apart[channel], place[channel, old]), self.counts[apart[channel], sign, old])
        return Histogram(self.count, top, unit, counts)


class Counting:
    """Counts entries that come batch by batch, few of them not before there are more: the counts are the same."""

    def __init__(self) -> None:
        self._counted: Histogram | None = None
        self._waiting: list[Array] = []

    def add(self, entries: Array, largest: Array) -> None:
        """More entries of every channel, ``(C, n)``, which may be overwritten afterwards, and their largest magnitudes ``(C,)``."""
        if entries.shape[1] < FEW:
            self._waiting.append(entries.copy())
        else:
            self._count(histogram_of(entries, largest))
        if sum(few.shape[1] for few in self._waiting) >= FEW:
            self._count_waiting()

    def result(self) -> Histogram:
        """The histogram of all entries, of which there must be some."""
        if self._waiting:
            self._count_waiting()
        assert self._counted is not None
        return self._counted

    def _count_waiting(self) -> None:
        waiting, self._waiting = np.concatenate(self._waiting, axis=1), []
        self._count(histogram_of(waiting))

    def _count(self, found: Histogram) -> None:
        self._counted = found if self._counted is None else self._counted + found


def histogram_of(entries: Array, largest: Array | None = None) -> Histogram:
    """The histogram of channels ``(C, n)``, whose largest magnitudes ``(C,)`` may be known.

    A float's leading bits, as a whole number, are its sign and its bin: nothing is computed but sums and shifts.
    """
    channels, count = entries.shape
    largest = np.abs(entries).max(axis=1) if largest is None else largest
    largest = largest.astype(np.float64)
    live = (largest >= SMALLEST) & np.isfinite(largest)
    top = np.where(live, np.frexp(np.where(live, largest, 1.0))[1].astype(np.int64) - 1, EMPTY)
    # a float32 below 2**-126 has fewer leading bits
    dtype = np.dtype(np.float32 if entries.dtype == np.float32 and not (live & (largest < 2.0**-100)).any() else np.float64)
    counts = np.zeros((channels, 2, KEPT), _dtype(count))
    block = max(1, BLOCK // max(count, 2 * KEPT))
    for start in range(0, channels, block):
        part = slice(start, start + block)
        counts[part] = _counted(np.ascontiguousarray(entries[part], dtype), top[part])
    return Histogram(count, top, np.ones(channels), counts)


def _counted(entries: Array, top: Indices) -> Indices:
    """The counts of channels ``(C, n)`` of float32 or float64."""
    bias = 127 if entries.dtype == np.float32 else 1023
    leading = (entries.view(np.int32) >> 20 if entries.dtype == np.float32 else entries.view(np.int64) >> 49).astype(np.int16)
    # how far the bin of a magnitude of 2**-bias is from the highest; in an empty channel, so far that nothing is in a bin
    highest = np.where(top != EMPTY, (top + bias + 1) * BINS - 1, np.iinfo(np.int16).max).astype(np.int16)[:, None]
    place = np.minimum(highest - (leading & np.int16(2 * (bias + 1) * BINS - 1)), KEPT)
    # channel by channel the counts of both signs, each with a bin more for what is not kept
    place += (leading >= 0) * np.int16(KEPT + 1)
    flat = place + 2 * (KEPT + 1) * np.arange(len(entries))[:, None]
    counts: Indices = np.bincount(flat.reshape(-1), minlength=2 * (KEPT + 1) * len(entries)).reshape(-1, 2, KEPT + 1)[..., :KEPT]
    return counts


def _bin(magnitudes: Array) -> Indices:
    """The bins of positive magnitudes, in units of 1."""
    mantissa, exponent = np.frexp(magnitudes.astype(np.float64))
    bins: Indices = BINS * (exponent.astype(np.int64) - 2) + np.floor(2 * BINS * mantissa).astype(np.int64)
    return bins


def _middles(bins: Indices) -> Array:
    return _power_of_two(bins // BINS) * (1 + (bins % BINS + 0.5) / BINS)


def _power_of_two(exponents: Indices) -> Array:
    with np.errstate(over="ignore", under="ignore"):
        powers: Array = np.ldexp(1.0, np.clip(exponents, -2000, 2000).astype(np.int32))
    return powers


def _dtype(count: int) -> type[np.unsignedinteger]:
    """Half the memory where it serves."""
    return np.uint32 if count < 2**32 else np.uint64
