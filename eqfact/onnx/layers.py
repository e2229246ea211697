"""How are the layers of ONNX that have windows or weights read: convolutions, pools, reductions, products, BatchNormalization?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from eqfact.onnx.call import Call, Reader
from eqfact.onnx.views import View
from eqfact.ops import AvgPool, BatchNorm, Conv, ConvTranspose, Dense, GlobalAvgPool, Identity, MaxPool, Pad, Shape

Sides = tuple[tuple[int, int], ...]


def _window(call: Call, sizes: Shape, kernel: Sequence[int]) -> tuple[list[int], Sides, list[int]]:
    """Strides, padding and dilations of a sliding window, with ``auto_pad`` resolved."""
    axes = len(kernel)
    if len(sizes) != axes:
        call.refuse(f"its kernel has {axes} spatial axes, its input {len(sizes)}")
    strides, dilations = call.integers("strides", [1] * axes), call.integers("dilations", [1] * axes)
    mode = call.text("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        return strides, sides_of(call.integers("pads", [0] * 2 * axes)), dilations
    if mode == "VALID":
        return strides, ((0, 0),) * axes, dilations
    totals = [max(0, (math.ceil(n / s) - 1) * s + d * (k - 1) + 1 - n)
              for n, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)]
    return strides, _shared_out(mode, totals), dilations


def sides_of(pads: Sequence[int]) -> Sides:
    """ONNX pads ``(before..., after...)`` as ``((before, after), ...)``."""
    half = len(pads) // 2
    return tuple(zip(pads[:half], pads[half:], strict=True))


def _shared_out(mode: str, totals: Sequence[int]) -> Sides:
    """Padding before and after that sums to ``totals``; SAME_UPPER puts the odd one behind, SAME_LOWER in front."""
    upper = tuple((t // 2, t - t // 2) for t in totals)
    return tuple((after, before) for before, after in upper) if mode == "SAME_LOWER" else upper


def conv(call: Call) -> View:
    weight = call.parameter(1)
    x = call.value(call.view())
    stride, padding, dilation = _window(call, call.building.shapes[x][1:], call.integers("kernel_shape", weight.shape[2:]))
    if tuple(call.integers("kernel_shape", weight.shape[2:])) != weight.shape[2:]:
        raise ValueError(f"its kernel_shape {call.integers('kernel_shape')} is not that of its weight {weight.shape}")
    op = Conv(weight, call.parameter(2) if call.has(2) else None, stride=_one(stride), padding=padding if any(map(any, padding)) else 0,
              dilation=_one(dilation), groups=call.integer("group", 1))
    return call.emit(op, x, names=call.given(weight=1, bias=2))


def conv_transpose(call: Call) -> View:
    weight, groups = call.parameter(1), call.integer("group", 1)
    x = call.value(call.view())
    sizes, kernel = call.building.shapes[x][1:], weight.shape[2:]
    if len(sizes) != len(kernel) or weight.shape[0] % groups:
        raise ValueError(f"its weight {weight.shape} does not fit {groups} groups and an input with {len(sizes)} spatial axes")
    strides, dilations = call.integers("strides", [1] * len(kernel)), call.integers("dilations", [1] * len(kernel))
    extra = call.integers("output_padding", [0] * len(kernel))
    mode = call.text("auto_pad", "NOTSET")
    full = [(n - 1) * s + d * (k - 1) + 1 + e for n, s, k, d, e in zip(sizes, strides, kernel, dilations, extra, strict=True)]
    padding = sides_of(call.integers("pads", [0] * 2 * len(kernel)))
    wanted = call.integers("output_shape", [])[-len(kernel):]
    if mode in ("SAME_UPPER", "SAME_LOWER") and not wanted:
        wanted = [n * s for n, s in zip(sizes, strides, strict=True)]
    if wanted:
        totals = [f - w for f, w in zip(full, wanted, strict=True)]
        extra = [e + max(0, -t) for e, t in zip(extra, totals, strict=True)]
        padding = _shared_out("SAME_UPPER" if mode == "SAME_UPPER" else "SAME_LOWER", [max(0, t) for t in totals])
    inner, out = weight.shape[0] // groups, weight.shape[1]
    rows = weight.reshape(groups, inner, out, *kernel).swapaxes(1, 2).reshape(groups * out, inner, *kernel)
    op = ConvTranspose(rows, call.parameter(2) if call.has(2) else None, stride=_one(strides),
                       padding=padding if any(map(any, padding)) else 0, dilation=_one(dilations),
                       output_padding=_one(extra), groups=groups)
    return call.emit(op, x, names=call.given(weight=1, bias=2))


def _one(values: Sequence[int]) -> int | tuple[int, ...]:
    """One number for all axes, if they agree."""
    return values[0] if len(set(values)) == 1 else tuple(values)


def _pool(call: Call) -> tuple[str, list[int], list[int], Sides, Sides]:
    """The value, kernel, stride, padding, and how much more is padded behind because of ``ceil_mode``."""
    kernel = call.integers("kernel_shape")
    x = call.value(call.view())
    sizes = call.building.shapes[x][1:]
    stride, padding, dilation = _window(call, sizes, kernel)
    if any(d != 1 for d in dilation):
        call.refuse(f"it has dilations {dilation}, and the pools of eqfact have none")
    more = [0] * len(kernel)
    if call.integer("ceil_mode", 0):
        for axis, (n, k, s, (before, after)) in enumerate(zip(sizes, kernel, stride, padding, strict=True)):
            count = math.ceil((n + before + after - k) / s) + 1
            count -= (count - 1) * s >= n + before  # every window starts inside the input or before it
            more[axis] = max(0, (count - 1) * s + k - n - before - after)
    return x, kernel, stride, padding, tuple((0, m) for m in more)


def _plus(padding: Sides, more: Sides) -> Sides:
    return tuple((a + c, b + d) for (a, b), (c, d) in zip(padding, more, strict=True))


def max_pool(call: Call) -> View:
    x, kernel, stride, padding, more = _pool(call)
    return call.emit(MaxPool(_one(kernel), stride=_one(stride), padding=_plus(padding, more)), x)


def average_pool(call: Call) -> View:
    x, kernel, stride, padding, more = _pool(call)
    counted = bool(call.integer("count_include_pad", 0)) and any(map(any, padding))
    if counted and any(map(any, more)):  # explicit padding counts, what ceil_mode adds does not
        x, padding, counted = call.emit(Pad(padding), x, suffix=".pad").value, more, False
    else:
        padding = _plus(padding, more)
    counted = counted or not any(map(any, padding))
    return call.emit(AvgPool(_one(kernel), stride=_one(stride), padding=padding, count_include_pad=counted), x)


def global_average_pool(call: Call) -> View:
    return call.emit(GlobalAvgPool(), call.value(call.view()))


def global_max_pool(call: Call) -> View:
    x = call.value(call.view())
    return call.emit(MaxPool(call.building.shapes[x][1:], stride=1), x)


def reduce_space(average: bool) -> Reader:
    def reduce(call: Call) -> View:
        view, given = call.view(), call.listed("axes", 1)
        if not given and call.integer("noop_with_empty_axes", 0):
            return call.entrywise(Identity())
        reduced = sorted({view.axis(a) for a in given or range(view.ndim)})
        for axis in reduced:
            view.size(axis)
        kept = [a for a in range(view.ndim) if a not in reduced and a != view.batch]
        channel = next((a for a in kept if view.axes[a]), None)
        if channel is None:
            call.refuse("it reduces the channels with all else, and leaves no channel")
        layout = view.layout()
        if layout is not None and layout[0] in kept:
            channel = layout[0]  # the channels that it has already
        x, back = call.by_channel(view, channel)
        first = int(view.batch is None and not view.axes[0] and channel > 0)
        space = [a for a in range(first, view.ndim) if a not in (channel, view.batch)]
        if not space:
            return call.entrywise(Identity())
        kernel = tuple(n if a in reduced else 1 for a, n in zip(space, call.building.shapes[x][1:], strict=True))
        everything = all(a in reduced for a in space)
        op = (GlobalAvgPool() if everything else AvgPool(kernel, stride=1)) if average else MaxPool(kernel, stride=1)
        made = back(call.emit(op, x))
        if call.integer("keepdims", 1):
            return made
        return made.with_axes(*(axis for i, axis in enumerate(made.axes) if i not in reduced))
    return reduce


# ------------------------------------------------------------------------------------------------- products with weights


def gemm(call: Call) -> View:
    view = call.view()
    weight, alpha, beta = call.parameter(1), call.number("alpha", 1.0), call.number("beta", 1.0)
    if weight.ndim != 2 or view.ndim != 2:
        raise ValueError(f"it multiplies tensors with {view.ndim} and {weight.ndim} axes; Gemm takes matrices")
    if call.integer("transA", 0):
        view = view.transpose((1, 0))
    transposed = not call.integer("transB", 0)
    rows = _times(weight.T if transposed else weight, alpha)
    bias = bias_row(call, call.parameter(2), len(rows)) if call.has(2) else None
    return call.emit(Dense(rows, bias if bias is None else _times(bias, beta)), call.value(view), names=call.given(weight=1, bias=2),
                     transposed=transposed)


def _times(array: Any, factor: float) -> Any:
    return array if factor == 1 else array * array.dtype.type(factor)


def bias_row(call: Call, bias: Any, out: int) -> Any:
    """A bias ``(out,)`` from what broadcasts to one."""
    if bias.size not in (1, out) or bias.shape not in ((), (1,), (out,), (1, 1), (1, out)):
        call.refuse(f"its third input has the shape {bias.shape}, which is no bias of {out} outputs")
    return bias.reshape(-1) if bias.size == out else np.full(out, bias.reshape(-1)[0])


def matmul(call: Call) -> View:
    """``x @ W`` over the last axis: Dense, or a pointwise convolution if there are axes in between."""
    view, weight = call.view(), call.parameter(1)
    if weight.ndim != 2 or view.ndim < 2:
        call.refuse(f"it multiplies a value with {view.ndim} axes by a constant of shape {weight.shape}; "
                    "(N, ..., in) times (in, out) is supported")
    x, back = call.by_channel(view, -1)
    axes = len(call.building.shapes[x]) - 1
    op = Dense(weight.T) if axes == 0 else Conv(weight.T.reshape(*weight.T.shape, *(1 for _ in range(axes))))
    return back(call.emit(op, x, names={"weight": 1}, transposed=True))


def batch_normalization(call: Call) -> View:
    if call.integer("training_mode", 0) or (call.opset < 14 and sum(map(bool, call.node.output)) > 1):
        call.refuse("it is in training mode; export the network for inference")
    if not call.integer("spatial", 1):
        call.refuse("it has spatial=0, one set of parameters for every pixel")
    names = {"gamma": 1, "beta": 2, "mean": 3, "var": 4}
    op = BatchNorm(**{name: call.parameter(i, cast=True) for name, i in names.items()}, eps=call.number("epsilon", 1e-5))
    return call.emit(op, call.value(call.view()), names=names)
