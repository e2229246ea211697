"""How are the ONNX ops read that move entries: over space, between channels, or only on paper (views)?

Choosing entries along an axis, in any order and number, is one op (:class:`~eqfact.ops.Take`); splitting, joining and ordering axes
is none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eqfact.onnx.building import MOST_CHANNELS
from eqfact.onnx.call import Call
from eqfact.onnx.layers import sides_of
from eqfact.onnx.origin import Constant
from eqfact.onnx.views import View
from eqfact.ops import Concat, Identity, Pad, Shape, Upsample

#: How ``numpy.pad`` calls the modes of ONNX that repeat entries of the tensor.
REPEATING = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}


def _bounded(count: float) -> int:
    """How many entries are chosen along an axis, if not more than is read with here; they are listed."""
    if not count <= MOST_CHANNELS:
        raise ValueError(f"it chooses {count:g} entries along an axis, more than a network is read with here ({MOST_CHANNELS})")
    return int(count)


def _choose(call: Call, view: View, axis: int, indices: Any) -> View:
    """Entries along one axis."""
    _bounded(len(indices))
    return call.building.choose(view, axis, np.asarray(indices).tolist(), call.output, call.origin())


def pad(call: Call) -> View:
    view, mode = call.view(), call.text("mode", "constant")
    pads = call.listed("pads", 1)
    if pads is None:
        raise ValueError("it has no pads")
    value = float(call.constant(2).reshape(())) if call.has(2) and call.constant(2).size else call.number("value", 0.0)
    axes = [view.axis(int(a)) for a in call.constant(3).reshape(-1)] if call.has(3) else list(range(view.ndim))
    if len(set(axes)) < len(axes) or len(pads) != 2 * len(axes):
        raise ValueError(f"it pads axes {axes} by {pads}: two numbers for each axis, each axis once")
    padded: dict[int, tuple[int, int]] = {}
    for axis, (before, after) in zip(axes, sides_of(pads), strict=True):
        if before == after == 0:
            continue
        n = view.size(axis)
        if min(before, after) < 0:  # first what is cut off
            view = _choose(call, view, axis, range(max(0, -before), n + min(0, after)))
            n = view.size(axis)
        before, after = max(0, before), max(0, after)
        if mode in REPEATING and before + after:
            _bounded(n + before + after)
            if n < 2 and mode == "reflect":
                raise ValueError(f"it reflects along axis {axis}, which has {n} entries")
            view = _choose(call, view, axis, np.pad(np.arange(n), (before, after), mode=REPEATING[mode]))  # type: ignore[call-overload]
        elif before + after:
            padded[axis] = (before, after)
    if mode not in (*REPEATING, "constant"):
        call.refuse(f"its mode is '{mode}'")
    if not padded:
        return view if view != call.view() else identity(call)
    return _over_space(call, view, padded, lambda sides: Pad(sides, value), (0, 0), "pads the channels")


def _over_space(call: Call, view: View, at: dict[int, Any], make: Callable[[tuple[Any, ...]], Any], neutral: Any, what: str) -> View:
    """An op with one parameter an axis of space: on the value itself if its channels stay out of it, else on the tensor as it stands."""
    layout = view.layout()
    if layout is None:
        view = call.building.settled(view, call.output)
        layout = view.layout()
    if layout is None or layout[0] in at:  # some other axis must be the channels
        channel = next((a for a in range(view.ndim) if a not in at and a != view.batch and view.axes[a]), None)
        if channel is None:
            call.refuse(f"it {what}")
        value, back = call.by_channel(view, channel)
        space = [a for a in range(int(view.batch is None and not view.axes[0]), view.ndim) if a not in (channel, view.batch)]
        return back(call.emit(make(tuple(at.get(a, neutral) for a in space)), value))
    made = call.emit(make(tuple(at.get(a, neutral) for a in layout[1:])), view.value)
    order = [0, *layout]
    return made.transpose([int(i) for i in np.argsort(order)])


def resize(call: Call) -> View:
    """Nearest neighbours, whatever mix of attributes says so: whole factors repeat entries, others choose some."""
    if call.text("mode", "nearest") != "nearest":
        call.refuse(f"its mode is '{call.text('mode', '')}'; only nearest neighbours are supported")
    view = call.view()
    axes = [view.axis(a) for a in call.integers("axes", range(view.ndim))]
    i = 1 if call.opset < 11 else 2
    if call.node.op_type == "Upsample" and "scales" in call.attributes:
        scales = [float(s) for s in call.attributes["scales"]]
    elif call.has(i) and call.constant(i).size:
        scales = call.constant(i).reshape(-1).tolist()
    else:
        scales = _scales_of_sizes(call, view, axes)
    repeated, taken = {}, {}
    for axis, scale in zip(axes, scales, strict=True):
        if scale == 1:
            continue
        n = view.size(axis)
        sources = _sources(call, n, scale)
        if scale >= 1 and np.array_equal(sources, np.repeat(np.arange(n), round(scale))):
            repeated[axis] = round(scale)
        else:
            taken[axis] = sources
    for axis, sources in taken.items():
        view = _choose(call, view, axis, sources)
    if not repeated:
        return view if taken else identity(call)
    return _over_space(call, view, repeated, Upsample, 1, "repeats channels")


def _scales_of_sizes(call: Call, view: View, axes: Sequence[int]) -> list[float]:
    """The scales of a Resize that is given the sizes of its output, which may name the batch."""
    if call.known(3) is None or call.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        call.refuse("its scales or sizes are not constant")
    found = set()
    for sizes, b in zip(call.constants(3), call.building.batches, strict=True):
        found.add(tuple(n / view.full_shape(b)[a] for n, a in zip(sizes.reshape(-1).tolist(), axes, strict=True)))
    if len(found) > 1:
        call.refuse("its scales depend on the size of the batch")
    return list(found.pop())


def _sources(call: Call, n: int, scale: float) -> Any:
    """Which entry each entry of a nearest Resize comes from, along one axis of ``n`` entries (ONNX, Resize)."""
    count = _bounded(n * scale + 1e-9)
    x = np.arange(count)
    transformation = call.text("coordinate_transformation_mode", "asymmetric" if call.opset < 11 else "half_pixel")
    at = {
        "asymmetric": x / scale,
        "half_pixel": (x + 0.5) / scale - 0.5,
        "half_pixel_symmetric": (x + 0.5) / scale - 0.5,
        "pytorch_half_pixel": (x + 0.5) / scale - 0.5 if count > 1 else 0.0 * x,
        "align_corners": x * ((n - 1) / (count - 1)) if count > 1 else 0.0 * x,
    }.get(transformation)
    if at is None:
        call.refuse(f"its coordinate_transformation_mode is '{transformation}'")
    rounding = call.text("nearest_mode", "floor" if call.opset < 11 else "round_prefer_floor")
    whole = {"round_prefer_floor": np.ceil(at - 0.5), "round_prefer_ceil": np.floor(at + 0.5), "floor": np.floor(at), "ceil": np.ceil(at)}
    return np.clip(whole[rounding], 0, n - 1).astype(int)


def concat(call: Call) -> View:
    views = call.views()
    axis = views[0].axis(call.integer("axis", 1))
    if any(v.ndim != views[0].ndim for v in views):
        raise ValueError(f"it joins tensors of shapes {' and '.join(v.described() for v in views)}")
    for v in views:
        v.size(axis)
    layouts = {v.layout() for v in views}
    layout = layouts.pop() if len(layouts) == 1 else None
    if layout is not None and axis in layout[1:]:  # along space
        made = call.emit(Concat(layout.index(axis)), *(v.value for v in views))
        return made.transpose([int(i) for i in np.argsort([0, *layout])])
    turned = [call.by_channel(v, axis) for v in views]
    return turned[0][1](call.emit(Concat(), *(value for value, _ in turned)))


# ------------------------------------------------------------------------------------------------- views only


def identity(call: Call) -> View:
    return call.entrywise(Identity())


def shape_of(call: Call) -> Constant:
    view = call.view()
    chosen = slice(call.integer("start", 0), call.attributes.get("end"))
    return Constant(call.output, tuple(np.array(view.full_shape(b)[chosen], np.int64) for b in call.building.batches))


def size_of(call: Call) -> Constant:
    return Constant(call.output, tuple(np.array(math.prod(call.view().full_shape(b)), np.int64) for b in call.building.batches))


def _reshaped(call: Call, target: Callable[[Shape, int], Sequence[int]]) -> View:
    """The first input in the shape that ``target`` gives for its full shape and the number of an assumed batch."""
    view, batches = call.view(), call.building.batches
    targets = [target(view.full_shape(b), k) for k, b in enumerate(batches)]
    try:
        return view.reshape(*targets, batches=batches)
    except ValueError as error:
        # no axis is a factor of another, as from 3x4 to 4x3: through one axis of all entries
        entries = tuple(a for axis in view.axes for a in axis if not a.is_batch)
        try:
            flat = call.value(view.with_axes(() if view.batch is None else view.axes[0], entries))
            return View.whole(flat, call.building.shapes[flat], call.building.samples).reshape(*targets, batches=batches)
        except ValueError:
            raise error from None


def reshape(call: Call) -> View:
    given = call.constants(1) if call.has(1) else (np.array(call.integers("shape")),) * len(call.building.batches)

    def target(shape: Shape, k: int) -> list[int]:
        wanted = [int(n) for n in given[k].reshape(-1)]
        if not call.integer("allowzero", 0):
            if any(n == 0 and i >= len(shape) for i, n in enumerate(wanted)):
                raise ValueError(f"it copies sizes by 0 in {wanted} that its input {shape} does not have")
            wanted = [shape[i] if n == 0 else n for i, n in enumerate(wanted)]
        return _filled(wanted, math.prod(shape))
    return _reshaped(call, target)


def _filled(wanted: list[int], size: int) -> list[int]:
    """A shape with its -1 replaced by what is left."""
    known = math.prod(n for n in wanted if n != -1)
    if wanted.count(-1) == 1 and known > 0 and size % known == 0:
        return [size // known if n == -1 else n for n in wanted]
    return wanted


def flatten(call: Call) -> View:
    axis, ndim = call.integer("axis", 1), call.view().ndim
    if not -ndim <= axis <= ndim:
        raise ValueError(f"it flattens from axis {axis} on a tensor with {ndim} axes")
    axis += ndim if axis < 0 else 0
    return _reshaped(call, lambda shape, _: (math.prod(shape[:axis]), math.prod(shape[axis:])))


def squeeze(call: Call) -> View:
    view, axes = call.view(), call.listed("axes", 1)
    gone = {view.axis(a) for a in axes} if axes is not None else {i for i, axis in enumerate(view.axes) if not axis}
    if any(view.axes[a] for a in gone):
        raise ValueError(f"it removes axes {axes} of the shape {view.described()}, and not all of them are 1")
    return view.with_axes(*(axis for i, axis in enumerate(view.axes) if i not in gone))


def unsqueeze(call: Call) -> View:
    view, axes = call.view(), call.listed("axes", 1) or []
    count = view.ndim + len(axes)
    new = {a % count for a in axes}
    if len(new) < len(axes) or any(not -count <= a < count for a in axes):
        raise ValueError(f"it adds axes {axes} to a tensor with {view.ndim} axes")
    rest = iter(view.axes)
    return view.with_axes(*(() if i in new else next(rest) for i in range(count)))


def transpose(call: Call) -> View:
    view = call.view()
    return view.transpose([view.axis(a) for a in call.integers("perm", range(view.ndim)[::-1])])


def slice_(call: Call) -> View:
    view = call.view()
    starts, ends = call.listed("starts", 1), call.listed("ends", 2)
    if starts is None or ends is None:
        raise ValueError("it lacks starts or ends")
    axes = call.listed("axes", 3, range(len(starts))) or []
    steps = call.listed("steps", 4, [1] * len(starts)) or []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step == 0:
            raise ValueError(f"it steps by 0 along axis {axis}")
        if view.batch == view.axis(axis) and (start, step) == (0, 1) and end >= max(call.building.batches):
            continue
        n = view.size(axis)
        stop: int | None = end
        if step < 0 and end < -n:  # down to the first entry and with it
            stop = None
        view = _choose(call, view, axis, range(n)[start:stop:step])
    return view


def split(call: Call) -> list[View]:
    view, axis, count = call.view(), call.integer("axis", 0), len(call.node.output)
    n = view.size(axis)
    even = [min(-(-n // count), n - i * -(-n // count)) for i in range(count)]
    sizes = call.listed("split", 1, even) or []
    if sum(sizes) != n or len(sizes) != count or min(sizes) < 1:
        raise ValueError(f"it splits {n} entries into {sizes}")
    edges = [0, *itertools.accumulate(sizes)]
    return [call.building.choose(view, axis, range(a, b), name, call.origin()) for name, (a, b) in zip(
        call.node.output, itertools.pairwise(edges), strict=True)]


def gather(call: Call) -> View:
    view, chosen = call.view(), call.constant(1)
    axis = view.axis(call.integer("axis", 0))
    n = view.size(axis)
    if chosen.size and not -n <= chosen.min() <= chosen.max() < n:
        raise ValueError(f"it takes entries {chosen.min()} to {chosen.max()} of {n}")
    view = _choose(call, view, axis, np.where(chosen < 0, chosen + n, chosen).reshape(-1))
    if chosen.ndim == 0:
        return view.with_axes(*view.axes[:axis], *view.axes[axis + 1:])
    batches = call.building.batches
    shapes = [view.full_shape(b) for b in batches]
    return view.reshape(*((*s[:axis], *chosen.shape, *s[axis + 1:]) for s in shapes), batches=batches)


def _regrouped(call: Call, split: Callable[[Shape], Sequence[int]], order: Sequence[int], join: Callable[[Shape], Sequence[int]]) -> View:
    """A reshape, a transpose and another reshape."""
    view, batches = call.view(), call.building.batches
    if view.ndim != 4:
        raise ValueError(f"it reads a tensor of 4 axes, got {view.described()}")
    shapes = [view.full_shape(b) for b in batches]
    return view.reshape(*map(split, shapes), batches=batches).transpose(order).reshape(*map(join, shapes), batches=batches)


def depth_to_space(call: Call) -> View:
    b, columns = call.integer("blocksize", 1), call.text("mode", "DCR") == "DCR"
    return _regrouped(call, lambda s: (s[0], b, b, s[1] // b**2, *s[2:]) if columns else (s[0], s[1] // b**2, b, b, *s[2:]),
                      (0, 3, 4, 1, 5, 2) if columns else (0, 1, 4, 2, 5, 3), lambda s: (s[0], s[1] // b**2, s[2] * b, s[3] * b))


def space_to_depth(call: Call) -> View:
    b, order = call.integer("blocksize", 1), (0, 3, 5, 1, 2, 4) if call.text("mode", "DCR") == "DCR" else (0, 1, 3, 5, 2, 4)
    return _regrouped(call, lambda s: (s[0], s[1], s[2] // b, b, s[3] // b, b), order,
                      lambda s: (s[0], s[1] * b * b, s[2] // b, s[3] // b))


def expand(call: Call) -> View:
    view = call.view()
    for b, given in zip(call.building.batches, call.constants(1), strict=True):
        full, wanted = view.full_shape(b), tuple(given.reshape(-1).tolist())
        if np.broadcast_shapes(full, wanted) != full:
            call.refuse(f"it repeats entries, from shape {full} to {wanted}")
    return identity(call)
