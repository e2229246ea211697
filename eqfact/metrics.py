"""How good is a quantized network? The signal-to-noise ratio of its outputs, in decibels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from eqfact.graph import Data


def sqnr(reference: Data, test: Data) -> float:
    """``10 log10(sum(reference**2) / sum((reference - test)**2))`` in dB, over all entries (of all outputs, for dicts).

    Infinite where the two are equal; minus infinity where the reference is 0 and the test is not.

    >>> sqnr(np.array([10.0, 0.0]), np.array([10.0, 1.0]))
    20.0
    """
    if isinstance(reference, Mapping) != isinstance(test, Mapping):
        raise TypeError("sqnr compares two arrays or two dicts of arrays")
    if isinstance(reference, Mapping) and isinstance(test, Mapping):
        if set(reference) != set(test):
            raise ValueError(f"sqnr needs the same names on both sides, got {sorted(reference)} and {sorted(test)}")
        pairs = [(np.asarray(reference[name], np.float64), np.asarray(test[name], np.float64)) for name in reference]
    else:
        pairs = [(np.asarray(reference, np.float64), np.asarray(test, np.float64))]
    for a, b in pairs:
        if a.shape != b.shape:
            raise ValueError(f"sqnr needs equal shapes, got {a.shape} and {b.shape}")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ValueError("sqnr needs finite arrays, got NaN or infinity")
    # in units of the largest entry, so that no square overflows or underflows
    unit = max(float(np.abs(v).max(initial=0.0)) for pair in pairs for v in pair) or 1.0
    noise = sum(float(((a / unit - b / unit) ** 2).sum()) for a, b in pairs)
    signal = sum(float(((a / unit) ** 2).sum()) for a, _ in pairs)
    return decibels(signal, noise)


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``, of sums of squares; infinite without noise, else minus infinity without signal.

    >>> decibels(100.0, 1.0)
    20.0
    """
    if noise == 0:
        return np.inf
    return float(10 * np.log10(signal / noise)) if signal > 0 else -np.inf
