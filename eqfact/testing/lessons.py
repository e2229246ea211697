"""Is the solution of an exercise right? The checks of docs/lessons, made of the conformance cases: a wrong answer is shown with its law.

A check takes the function that a student wrote, asks it the cases, and raises :class:`AssertionError` with the first entry that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from eqfact.testing.cases import all_cases
from eqfact.testing.wire import array_of

#: Between a scale and what a solution may make of it.
CLOSE = 2.0**-40


def check_quantize(quantize: Callable[..., Any]) -> None:
    """Lesson 1: ``quantize(x, scale, zero_point, qmin, qmax)`` rounds halves to even, and saturates.

    >>> check_quantize(lambda x, s, z, low, high: np.clip(np.rint(x / s) + z, low, high))
    >>> check_quantize(lambda x, s, z, low, high: np.clip(np.floor(x / s + 0.5) + z, low, high))
    Traceback (most recent call last):
    AssertionError: quantize(-1.5, scale=1, zero_point=0, qmin=-128, qmax=127) must be -2, got -1.0: another way to round halves
    """
    for case in all_cases([5]):
        if case.ask != "quantize":
            continue
        grid = case.request["grid"]
        scale, zero = array_of(grid["scale"]), array_of(grid["zero_point"])
        x, expected = array_of(case.request["x"]), array_of(case.expected["answer"]["q"])
        if grid["rounding"] != "half_even" or len(scale) > 1 or x.dtype != np.float64:
            continue
        got = np.asarray(quantize(x, scale[0], zero[0], grid["qmin"], grid["qmax"]))
        for value, wanted, made in zip(x.ravel(), expected.ravel(), got.ravel(), strict=True):
            assert made == wanted, (f"quantize({value:g}, scale={scale[0]:g}, zero_point={zero[0]}, qmin={grid['qmin']}, "
                                    f"qmax={grid['qmax']}) must be {wanted}, got {made}: {case.why}")


def check_affine_grid(affine_grid: Callable[..., Any]) -> None:
    """Lesson 1: ``affine_grid(low, high, bits)`` gives a scale and a zero point for numbers from 0 to ``2**bits - 1``; zero is on the grid.

    >>> check_affine_grid(lambda low, high, bits: ((high - low) / 2**bits, 0))
    Traceback (most recent call last):
    AssertionError: affine_grid(-1, 2.5, 8): the scale must be 0.0137255, got 0.0136719: scale by 2**8 steps in the place of 2**8 - 1
    """
    for case in all_cases([5]):
        quantizer = case.request.get("quantizer", {})
        if case.ask != "grid" or case.expected["judge"] == "refusal" or quantizer["symmetric"] or "signed" in quantizer:
            continue
        answer = case.expected["answer"]
        parts = case.request["low"], case.request["high"], answer["scale"], answer["zero_point"]
        low, high, scale, zero = map(array_of, parts)
        for a, b, s, z in zip(low.tolist(), high.tolist(), scale.tolist(), zero.tolist(), strict=True):
            call = f"affine_grid({a:g}, {b:g}, {quantizer['bits']})"
            made_scale, made_zero = affine_grid(a, b, quantizer["bits"])
            assert abs(made_scale - s) <= CLOSE * s, f"{call}: the scale must be {s:g}, got {made_scale:g}: {case.why}"
            assert made_zero == z, f"{call}: the zero point must be {z}, got {made_zero}: {case.why}"
