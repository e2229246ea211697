"""Level 5: which grids are there, how are numbers rounded to them, and what becomes of a layer's sums and biases?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from eqfact.ops import Array
from eqfact.ops.grid import ROUNDINGS
from eqfact.testing.cases.case import Case, Draw, Json
from eqfact.testing.wire import array_json, arrays_json

ENDS = "scale = (high - low) / (qmax - qmin), zero_point = qmin - low / scale, rounded half to even; the range is widened to hold zero"
MIDDLE = "scale = max(|low|, |high|) / qmax, zero in the middle"
ROUND = "q = clip(round(x / s) + z, qmin, qmax), the division in the type of x"
NUMBER = "x = s (q - z), rounded once"
SUMS = "q = clip(round(n M) + z, qmin, qmax) with M = (s_x s_w) / s_y, in the network's type"
WRAP = "|q_b| + sum |q_w| max|q_x - z_x| < 2**31 in every output channel"
PAGE = "docs/integers.md"


def cases() -> Iterator[Case]:
    """The cases of this level."""
    yield from _grids()
    yield from _weights()
    yield from _roundings()
    yield from _sums()
    yield from _layers()


def _grids() -> Iterator[Case]:
    affine: Json = {"bits": 8, "symmetric": False}
    symmetric: Json = {"bits": 8, "symmetric": True}
    for name, quantizer, low, high, why in (
        ("affine", affine, [-1.0], [2.5], "scale by 2**8 steps in the place of 2**8 - 1"),
        ("affine-above-zero", affine, [1.0], [3.0], "zero that is not on the grid"),
        ("affine-below-zero", affine, [-3.0], [-0.5], "a zero point beyond qmax"),
        ("affine-relu", affine, [0.0], [6.0], "a zero point that is not 0 behind a ReLU"),
        ("affine-tie-even", affine, [-2.5], [252.5], "half away from zero where half to even is meant"),
        ("affine-tie-odd", affine, [-3.5], [251.5], "half down where half to even is meant"),
        ("affine-nothing", affine, [0.0], [0.0], "a scale of 0: division by zero"),
        ("affine-channels", affine, [-1.0, 0.0, -0.25], [1.0, 2.0, 0.0], "one grid for all channels"),
        ("affine-signed", {**affine, "signed": True}, [-1.0], [3.0], "a signed grid with the zero point of an unsigned one"),
        ("affine-4-bits", {**affine, "bits": 4}, [-0.5], [1.0], "8 bits taken for granted"),
        ("affine-16-bits", {**affine, "bits": 16}, [-1.0], [2.0], "qmax of a signed type"),
        ("affine-tiny", affine, [-1e-30], [2e-30], "an epsilon added to the scale"),
        ("affine-huge", affine, [-1e30], [2e30], "a range that overflows in float32 squares"),
        ("symmetric", symmetric, [-1.0], [0.5], "the largest value in the place of the largest magnitude"),
        ("symmetric-positive", symmetric, [0.25], [1.0], "a range that is not symmetric round zero"),
        ("symmetric-nothing", symmetric, [0.0], [0.0], "a scale of 0: division by zero"),
        ("symmetric-narrow", {**symmetric, "narrow_range": True}, [-1.0], [0.5], "qmin of -128 where -127 is meant"),
        ("symmetric-unsigned", {**symmetric, "signed": False}, [-1.0], [0.5], "a zero point of 0 on an unsigned grid"),
        ("symmetric-4-bits", {**symmetric, "bits": 4}, [-7.0], [3.0], "8 bits taken for granted"),
        ("symmetric-2-bits", {**symmetric, "bits": 2}, [-1.0], [1.0], "a grid of three numbers and one more"),
        ("symmetric-7-bits", {**symmetric, "bits": 7}, [-1.0], [0.75], "a reduced range taken for 8 bits"),
        ("symmetric-channels", symmetric, [-1.0, -0.25, 0.0], [0.5, 0.125, 0.0], "one grid for all channels; a dead channel"),
    ):
        yield _grid(f"5/grid-{name}", quantizer, low, high, why)
    for name, low, high, why in (("empty", [1.0], [-1.0], "a negative scale"), ("nan", [np.nan], [1.0], "NaN in all that follows"),
                                 ("infinite", [0.0], [np.inf], "a step of infinity")):
        yield Case(f"5/refuse-{name}", "grid", {"quantizer": affine, "low": array_json(np.array(low)), "high": array_json(np.array(high))},
                   {"judge": "refusal"}, "a range is finite and not empty", PAGE, why)


def _grid(name: str, quantizer: Json, low: Sequence[float], high: Sequence[float], why: str) -> Case:
    bits, signed = quantizer["bits"], quantizer.get("signed", quantizer["symmetric"])
    qmax = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    qmin = (-(2 ** (bits - 1)) if signed else 0) + int(quantizer.get("narrow_range", False))
    scales, zeros = [], []
    for a, b in zip(low, high, strict=True):
        if quantizer["symmetric"]:
            zero = 0 if signed else 2 ** (bits - 1)
            scale = max(abs(a), abs(b)) / (qmax - zero)
        else:
            a, b = min(a, 0.0), max(b, 0.0)
            scale = b / (qmax - qmin) - a / (qmax - qmin)
            zero = round(qmin - a / scale) if scale else qmin  # Python rounds half to even
        scales.append(scale or 1.0)
        zeros.append(zero)
    answer = {"scale": array_json(np.array(scales)), "zero_point": array_json(np.array(zeros, np.int64)), "qmin": qmin, "qmax": qmax}
    return Case(name, "grid", {"quantizer": quantizer, "low": array_json(np.array(low)), "high": array_json(np.array(high))},
                {"judge": "arrays", "answer": answer, "within": {"scale": min(scales) * 2.0**-50}},
                MIDDLE if quantizer["symmetric"] else ENDS, "docs/porting.md, Level 5", why)


def _weights() -> Iterator[Case]:
    draw = Draw("weights")
    dense, conv = draw.dyadic((3, 4), 1.0, 6), draw.dyadic((2, 3, 2, 2), 1.0, 6)
    dense[0] *= 0.25
    conv[1] *= 8
    dead = dense.copy()
    dead[1] = 0
    table: tuple[tuple[str, Array, Json, tuple[int, ...], str], ...] = (
        ("tensor", dense, {"bits": 8}, (0, 1), "a scale a row where one is meant"),
        ("channels", dense, {"bits": 8, "granularity": "per_channel"}, (1,), "input channels in the place of output channels"),
        ("channels-dead", dead, {"bits": 8, "granularity": "per_channel"}, (1,), "NaN in a row of zeros"),
        ("conv-tensor", conv, {"bits": 4}, (0, 1, 2, 3), "a scale a tap"),
        ("conv-channels", conv, {"bits": 4, "granularity": "per_channel"}, (1, 2, 3), "a scale for each row of the kernel"))
    for name, weight, quantizer, axes, why in table:
        for dtype in ("float32", "float64"):
            w = weight.astype(dtype)
            limit = 2 ** (quantizer["bits"] - 1) - 1
            scale = np.abs(w).max(axis=axes, keepdims=True).astype(np.float64) / limit
            scale = np.broadcast_to(np.where(scale > 0, scale, 1.0), w.shape)
            q = np.clip(np.rint(w / scale.astype(dtype)), -limit - 1, limit).astype(np.int32)
            yield Case(f"5/weights-{name}-{dtype}", "weight_grid", {"quantizer": quantizer, "weight": array_json(w)},
                       {"judge": "arrays", "answer": arrays_json({"scale": scale, "q": q}),
                        "within": {"scale": float(scale.min()) * 2.0**-20}},
                       MIDDLE, "docs/porting.md, Level 5", why)


def _code(scale: npt.ArrayLike, zero_point: npt.ArrayLike, qmin: int = 0, qmax: int = 255, rounding: str = "half_even") -> Json:
    return {"scale": array_json(np.atleast_1d(np.asarray(scale, np.float64))),
            "zero_point": array_json(np.atleast_1d(np.asarray(zero_point, np.int64))),
            "qmin": qmin, "qmax": qmax, "rounding": rounding}


def _roundings() -> Iterator[Case]:
    halves = np.array([[-2.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 0.75, -0.75, 0.25, -0.25, 300.0, -300.0]])
    expected = {
        "half_even": [-2, -2, 0, 0, 0, 2, 2, 1, -1, 0, 0, 127, -128],
        "half_away": [-3, -2, -1, 0, 1, 2, 3, 1, -1, 0, 0, 127, -128],
        "half_up": [-2, -1, 0, 0, 1, 2, 3, 1, -1, 0, 0, 127, -128],
        "floor": [-3, -2, -1, 0, 0, 1, 2, 0, -1, 0, -1, 127, -128],
    }
    assert set(expected) == set(ROUNDINGS)
    for rounding, whole in expected.items():
        for dtype in ("float32", "float64"):
            yield _quantize(f"5/quantize-{rounding}-{dtype}", halves.astype(dtype), _code(1.0, 0, -128, 127, rounding), np.array([whole]),
                            "another way to round halves")
    yield _quantize("5/quantize-below-half", np.array([[0.49999999999999994, -0.49999999999999994, 4503599627370497.0]]),
                    _code(1.0, 0, -128, 127, "half_up"), np.array([[0, 0, 127]]), "floor(x + 0.5), which rounds up just below a half")
    yield _quantize("5/quantize-zero-point", halves, _code(0.5, 10), np.array([[5, 7, 9, 10, 11, 13, 15, 12, 8, 10, 10, 255, 0]]),
                    "the zero point added before rounding, or not clamped")
    yield _quantize("5/quantize-odd-zero-point", halves, _code(1.0, 3), np.array([[1, 1, 3, 3, 3, 5, 5, 4, 2, 3, 3, 255, 0]]),
                    "the zero point added before rounding: halves fall on the other side")
    channels = np.array([[1.0, -1.0, 5.0], [0.5, 0.25, -8.0]])
    yield _quantize("5/quantize-channels", channels, _code([0.5, 0.25, 1.0], [0, 8, 4]), np.array([[2, 4, 9], [1, 9, 0]]),
                    "scales along the batch")
    image = channels.reshape(1, 2, 3)
    yield _quantize("5/quantize-channels-space", image, _code([0.5, 0.25], [0, 8]), np.array([[[2, 0, 10], [10, 9, 0]]]),
                    "scales along the last axis")
    draw = Draw("divisions")
    x, scale = _differ(draw, lambda x, s: np.rint(x / s), lambda x, s: np.rint(x.astype(np.float64) / float(s)))
    yield _quantize("5/quantize-divide-float32", x, _code(scale, 0, -128, 127), np.rint(x / np.float32(scale)),
                    "float32 divided in float64")
    x, scale = _differ(draw, lambda x, s: np.rint(x / s), lambda x, s: np.rint(x * (np.float32(1) / s)))
    yield _quantize("5/quantize-reciprocal", x, _code(scale, 0, -128, 127), np.rint(x / np.float32(scale)),
                    "multiplied by 1 / s in the place of a division")
    q = np.array([[0, 1, 127, 255, 3]], np.int32)
    for dtype in ("float32", "float64"):
        scale = float(np.dtype(dtype).type(0.1))  # a number of the type, as networks have them
        made = (scale * (q - 3.0)).astype(dtype)
        yield Case(f"5/dequantize-{dtype}", "dequantize", {"grid": _code(scale, 3), "q": array_json(q), "dtype": dtype},
                   {"judge": "arrays", "answer": arrays_json({"x": made})}, NUMBER, PAGE, "s q - s z, which is not 0 at the zero point")
    yield Case("5/dequantize-channels", "dequantize", {"grid": _code([0.5, 0.25], [0, 2]),
                                                       "q": array_json(np.array([[[1, 2]], [[3, 4]]], np.int32)
                                                                                                              .reshape(1, 2, 2)),
                                                                                                              "dtype": "float64"},
               {"judge": "arrays", "answer": arrays_json({"x": np.array([[[0.5, 1.0], [0.25, 0.5]]])})}, NUMBER, PAGE,
               "scales along the last axis")


def _differ(draw: Draw, right: Any, wrong: Any) -> tuple[npt.NDArray[np.float32], float]:
    """Numbers in float32, and a scale, that two ways to divide round to different whole numbers."""
    while True:
        scale = np.float32(draw.uniform((1,), 0.01, 0.1)[0])
        whole = np.arange(-100, 101, dtype=np.float64) + 0.5
        near = (whole * float(scale)).astype(np.float32)
        hit = near[right(near, scale) != wrong(near, scale)]
        if len(hit) >= 4:
            return hit[:8].reshape(1, -1), float(scale)


def _quantize(name: str, x: npt.NDArray[Any], grid: Json, q: npt.NDArray[Any], why: str) -> Case:
    return Case(name, "quantize", {"grid": grid, "x": array_json(x)}, {"judge": "arrays", "answer": arrays_json({"q": q.astype(np.int32)})},
                ROUND, PAGE, why)


def _sums() -> Iterator[Case]:
    draw = Draw("sums")
    for dtype in ("float32", "float64"):
        n = np.array([[0, 1, -1, 3, 5, -3, 100, -100, 1000, 100000, -100000, 2**31 - 1, -(2**31)]], np.int64)
        yield _requantize(f"5/sums-halves-{dtype}", n, 0.5, [0.25], 0.25, 10, dtype,
                          "halves rounded away from zero, or the zero point not clamped")
        yield _requantize(f"5/sums-{dtype}", n, 0.013, [0.0071], 0.0319, 100, dtype,
                          "the bias or the sum rounded to the output's grid twice")
        channels = np.array([[[40, -7], [40, -7], [41, 123]]], np.int64)
        yield _requantize(f"5/sums-channels-{dtype}", channels, 0.5, [0.01, 0.02, 0.03], 0.02, 128, dtype,
                          "one multiplier for all channels")
    while True:  # sums that a multiplier in float64 rounds to another whole number
        s_x, s_w, s_y = (np.float32(v) for v in draw.uniform((3,), 0.005, 0.05))
        single, double = (s_x * s_w) / s_y, float(s_x) * float(s_w) / float(s_y)
        n = np.arange(-20000, 20000, dtype=np.int64)
        hit = n[np.rint(n.astype(np.float32) * single) != np.rint(n * double)]
        hit = hit[np.abs(hit * double) < 100][:8]
        if len(hit) == 8:
            break
    yield _requantize("5/sums-multiplier", hit.reshape(1, -1), float(s_x), [float(s_w)], float(s_y), 128, "float32",
                      "the multiplier in float64")


def _requantize(name: str, n: npt.NDArray[np.int64], s_x: float, s_w: Sequence[float], s_y: float, z: int, dtype: str, why: str) -> Case:
    kind = np.dtype(dtype).type
    scales = np.array(s_w)
    multiplier = ((kind(s_x) * scales.astype(dtype)) / kind(s_y)).reshape(-1, *(1,) * (n.ndim - 2))
    q = np.clip(np.rint(n.astype(dtype) * multiplier).astype(np.float64) + z, 0, 255).astype(np.int32)
    request = {"n": array_json(n), "input_scale": s_x, "weight_scale": array_json(scales), "grid": _code(s_y, z), "dtype": dtype}
    return Case(name, "requantize", request, {"judge": "arrays", "answer": arrays_json({"q": q})}, SUMS,
                "docs/integers.md, Layers with weights", why)


def _layers() -> Iterator[Case]:
    draw = Draw("layers")
    weight, bias = draw.uniform((3, 5), -1, 1), draw.uniform((3,), -1, 1)
    small = weight * np.array([[1.0], [1e-6], [1.0]])
    for dtype in ("float32", "float64"):
        for granularity in ("per_tensor", "per_channel"):
            yield _layer(f"5/layer-{granularity}-{dtype}", weight, bias, granularity, dtype, False, "bias scale without s_x")
    yield _layer("5/layer-wrap-float32", small, np.array([0.5, 1.0, -0.5]), "per_channel", "float32", True,
                 "int32 sums that wrap: a channel of weights of 1e-6 and bias 1")
    yield _layer("5/layer-wrap-negative-float32", small, np.array([0.5, -1.0, -0.5]), "per_channel", "float32", True,
                 "a negative bias that wraps")
    yield _layer("5/layer-wrap-tensor-float32", weight * 1e-7, bias, "per_tensor", "float32", True,
                 "the same with one scale for the tensor")
    yield _layer("5/layer-wrap-float64", small, np.array([0.5, 1.0, -0.5]), "per_channel", "float64", True, "int32 sums that wrap")
    yield _layer("5/layer-no-bias-float32", weight, 0 * bias, "per_tensor", "float32", False, "a scale raised for no reason")
    yield _layer("5/layer-zeros-float32", 0 * weight, bias, "per_channel", "float32", None,
                 "weights that are all 0, and a bias that is not")


def _layer(name: str, weight: Array, bias: Array, granularity: str, dtype: str, raised: bool | None,
           why: str) -> Case:
    w, b = weight.astype(dtype), bias.astype(dtype)
    s_x, z_x = 0.03125, 17
    expected: Json = {"judge": "layer", "raised": raised}
    if raised:  # as far as 2**20 steps of the largest bias ask for
        rows = np.abs(w).max(axis=1) if granularity == "per_channel" else np.array([np.abs(w).max()])
        needed = np.abs(b) / s_x / 2**20 if granularity == "per_channel" else np.abs(b).max() / s_x / 2**20
        expected["most"] = float(2.0 ** np.ceil(np.log2(np.max(needed * 127 / rows))))
    weights: Mapping[str, Any] = {"bits": 8, "granularity": granularity}
    request = {"weight": array_json(w), "bias": array_json(b), "weights": weights, "input": _code(s_x, z_x)}
    return Case(name, "quantize_layer", request, expected, WRAP, "docs/integers.md, Layers with weights", why)
