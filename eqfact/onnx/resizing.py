"""How is a Resize read? Every entry it makes lies somewhere among those that it reads; each axis by itself (ONNX, Resize).

Nearest neighbours choose entries; linear and cubic interpolation is a matrix along the axis, of a kernel around each place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from eqfact.onnx.call import Call
from eqfact.onnx.folding import MOST_ENTRIES
from eqfact.onnx.layers import along
from eqfact.onnx.moving import bounded, choose, identity, over_space
from eqfact.onnx.views import View
from eqfact.ops import Upsample


def resize(call: Call) -> View:
    """Nearest neighbours, whatever mix of attributes says so: whole factors repeat entries, others choose some. Linear and cubic
    interpolation is a matrix along each axis."""
    mode = call.text("mode", "nearest")
    if mode not in ("nearest", "linear", "cubic"):
        call.refuse(f"its mode is '{mode}'")
    view = call.view()
    axes = [view.axis(a) for a in call.integers("axes", range(view.ndim))]
    roi = [(0.0, 1.0)] * len(axes)
    if _transformation(call) == "tf_crop_and_resize":
        ends = call.constant(1).reshape(2, -1).astype(float)
        roi = list(zip(*ends.tolist(), strict=True))
    repeated, taken, blended = {}, {}, dict[int, Any]()
    for axis, (scale, count), part in zip(axes, _scaled(call, view, axes), roi, strict=True):
        if scale == 1 and part == (0, 1):
            continue
        n = view.size(axis)
        count = bounded(n * scale + 1e-9 if count is None else count)
        at = _coordinates(call, n, count, scale, part)
        outside = (at < 0) | (at > n - 1) if _transformation(call) == "tf_crop_and_resize" else np.zeros(count, bool)
        if outside.any() and call.number("extrapolation_value", 0.0):
            call.refuse(f"what lies outside is {call.number('extrapolation_value', 0.0):g}, not 0")
        if mode != "nearest" or outside.any():
            if count * n > MOST_ENTRIES:
                call.refuse(f"its matrix of {count} by {n} entries is larger than what is computed while a file is read")
            matrix = _interpolation(call, n, at, scale, mode) if mode != "nearest" else np.eye(n)[_nearest(call, n, at)]
            blended[axis] = np.where(outside[:, None], 0, matrix)
            continue
        sources = _nearest(call, n, at)
        if scale >= 1 and np.array_equal(sources, np.repeat(np.arange(n), round(scale))):
            repeated[axis] = round(scale)
        else:
            taken[axis] = sources
    for axis, sources in taken.items():
        view = choose(call, view, axis, sources)
    if blended:
        view = along(call, view, blended)
    if not repeated:
        return view if taken or blended else identity(call)
    return over_space(call, view, repeated, Upsample, 1)


def _scaled(call: Call, view: View, axes: Sequence[int]) -> list[tuple[float, int | None]]:
    """The scale of each axis, and its size behind it, if that is not the scale's."""
    i = 1 if call.opset < 11 else 2
    if call.node.op_type == "Upsample" and "scales" in call.attributes:
        return [(float(s), None) for s in call.attributes["scales"]]
    if call.has(i) and call.constant(i).size:
        return [(s, None) for s in call.constant(i).reshape(-1).tolist()]
    policy = call.text("keep_aspect_ratio_policy", "stretch")
    if call.known(3) is None:
        call.refuse("its scales or sizes are not constant")
    found = set()
    for sizes, b in zip(call.constants(3), call.building.batches, strict=True):
        full = [view.full_shape(b)[a] for a in axes]
        scales = [n / m for n, m in zip(sizes.reshape(-1).tolist(), full, strict=True)]
        if policy != "stretch":
            one = min(scales) if policy == "not_larger" else max(scales)
            found.add(tuple((one, math.floor(one * n + 0.5)) for n in full))
        else:
            found.add(tuple((s, None) for s in scales))
    if len(found) > 1:
        call.refuse("its scales depend on the size of the batch")
    return list(found.pop())


def _transformation(call: Call) -> str:
    return call.text("coordinate_transformation_mode", "asymmetric" if call.opset < 11 else "half_pixel")


def _coordinates(call: Call, n: int, count: int, scale: float, roi: tuple[float, float]) -> Any:
    """Where among ``n`` entries each of ``count`` entries of a Resize lies (ONNX, Resize)."""
    x, length, transformation = np.arange(count), n * scale, _transformation(call)
    if transformation in ("align_corners", "tf_crop_and_resize") and abs(length - count) > 1e-3:
        call.refuse(f"its mode {transformation} makes {count} entries of {n} by the scale {scale:g}: the standard places them along "
                    f"{length:g}, engines along {count}; give whole sizes")
    halves = (x + 0.5) / scale - 0.5
    at = {
        "asymmetric": x / scale,
        "half_pixel": halves,
        "half_pixel_symmetric": n / 2 * (1 - count / length) + halves,
        "pytorch_half_pixel": halves if count > 1 else 0.0 * x,
        "align_corners": x * ((n - 1) / (length - 1)) if length != 1 else 0.0 * x,
        "tf_half_pixel_for_nn": (x + 0.5) / scale,
        "tf_crop_and_resize": roi[0] * (n - 1) + (x * (roi[1] - roi[0]) * (n - 1) / (length - 1) if length != 1
                                                  else (roi[1] - roi[0]) * (n - 1) / 2),
    }.get(transformation)
    if at is None:
        call.refuse(f"its coordinate_transformation_mode is '{transformation}'")
    return np.broadcast_to(at, count)


def _nearest(call: Call, n: int, at: Any) -> Any:
    """Which of ``n`` entries is nearest to each place."""
    rounding = call.text("nearest_mode", "floor" if call.opset < 11 else "round_prefer_floor")
    whole = {"round_prefer_floor": np.ceil(at - 0.5), "round_prefer_ceil": np.floor(at + 0.5), "floor": np.floor(at), "ceil": np.ceil(at)}
    return np.clip(whole[rounding], 0, n - 1).astype(int)


def _interpolation(call: Call, n: int, at: Any, scale: float, mode: str) -> Any:
    """The matrix of weights with which each place reads ``n`` entries: the kernel, wider if it is to smooth what is left out; entries
    beyond the ends are the last ones, or left out."""
    smooth = bool(call.integer("antialias", 0))
    width = min(scale, 1.0) if smooth else 1.0
    kernel, reach = (_hat, 1) if mode == "linear" else (lambda t: _cubic(t, call.number("cubic_coeff_a", -0.75)), 2)
    near = np.floor(at).astype(int)[:, None] + np.arange(-math.ceil(reach / width), math.ceil(reach / width) + 2)
    weights = kernel(np.abs(near - at[:, None]) * width)
    if call.integer("exclude_outside", 0):
        weights = np.where((near >= 0) & (near < n), weights, 0)
    if smooth or call.integer("exclude_outside", 0):
        weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((len(at), n))
    np.add.at(matrix, (np.arange(len(at))[:, None], np.clip(near, 0, n - 1)), weights)
    return matrix


def _hat(t: Any) -> Any:
    return np.maximum(1 - t, 0)


def _cubic(t: Any, a: float) -> Any:
    inner, outer = ((a + 2) * t - (a + 3)) * t * t + 1, ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, inner, np.where(t < 2, outer, 0))
