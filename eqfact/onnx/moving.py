"""How are the ONNX ops read that move entries: over space, between channels, or only on paper (views)?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eqfact.onnx.call import Call, Constant
from eqfact.onnx.layers import sides_of
from eqfact.onnx.views import View
from eqfact.ops import Concat, Identity, Pad, Shape, Upsample


def pad(call: Call) -> View:
    view = call.view()
    if call.text("mode", "constant") != "constant":
        call.refuse(f"its mode is '{call.text('mode', '')}'; only constant padding is supported")
    pads = call.listed("pads", 1)
    if pads is None:
        raise ValueError("it has no pads")
    value = float(call.constant(2).reshape(())) if call.has(2) and call.constant(2).size else call.number("value", 0.0)
    axes = [int(a) % view.ndim for a in call.constant(3).reshape(-1)] if call.has(3) else list(range(view.ndim))
    sides = dict(zip(axes, sides_of(pads), strict=True))
    padded = {}
    for axis, (before, after) in sides.items():
        if min(before, after) < 0:
            count = view.full_shape(0)[axis]
            view = view.take(axis, slice(max(0, -before), count + min(0, after)))
        if max(before, after) > 0:
            padded[view.axis(axis)] = (max(0, before), max(0, after))
    if not padded:
        return identity(call) if view is call.view() else view
    layout = view.layout()
    if layout is None:
        layout = tuple(range(len(view.sample)))
        view = View(call.value(view), view.sample)
    at = {layout[axis]: side for axis, side in padded.items()}
    if 0 in at:
        call.refuse("it pads the channels")
    made = call.emit(Pad(tuple(at.get(a, (0, 0)) for a in range(1, len(view.shape))), value), view.value)
    return made.transpose((0, *(a + 1 for a in layout)))


def resize(call: Call) -> View:
    """Nearest neighbours by whole factors, whatever mix of attributes says so."""
    if call.text("mode", "nearest") != "nearest":
        call.refuse(f"its mode is '{call.text('mode', '')}'; only nearest neighbours by whole factors are supported")
    view = call.view()
    if view.batch:
        call.refuse(f"the batch stands at axis {view.batch} of its input")
    axes = [a % view.ndim for a in call.integers("axes", range(view.ndim))]
    i = 1 if call.opset < 11 else 2
    if call.node.op_type == "Upsample" and "scales" in call.attributes:
        scales = [float(s) for s in call.attributes["scales"]]
    elif call.has(i) and call.constant(i).size:
        scales = call.constant(i).reshape(-1).tolist()
    else:
        scales = _scales_of_sizes(call, view, axes)
    factors = [1] * view.ndim
    for axis, scale in zip(axes, scales, strict=True):
        factors[axis] = round(scale)
        n = view.full_shape(1)[axis]
        if scale < 1 or not np.array_equal(_sources(call, n, scale), np.repeat(np.arange(n), factors[axis])):
            call.refuse(f"its scale {scale:g} along axis {axis} is not a plain repetition; "
                        "only nearest neighbours by whole factors are supported")
    layout = view.layout()
    if layout is None:
        layout = tuple(range(len(view.sample)))
        view = View(call.value(view), view.sample)
    at = {layout[axis - 1]: factors[axis] for axis in range(1, view.ndim)}
    if at[0] != 1 or factors[0] != 1:
        call.refuse("it repeats channels or samples")
    made = call.emit(Upsample(tuple(at[a] for a in range(1, len(view.shape)))), view.value)
    return made.transpose((0, *(a + 1 for a in layout)))


def _scales_of_sizes(call: Call, view: View, axes: Sequence[int]) -> list[float]:
    """The scales of a Resize that is given the sizes of its output, which may name the batch."""
    given = call.inputs[3] if call.has(3) else None
    if not isinstance(given, Constant) or call.text("keep_aspect_ratio_policy", "stretch") != "stretch":
        call.refuse("its scales or sizes are not constant")
    found = set()
    for k, b in enumerate(call.importer.batches):
        sizes = given.values[min(k, len(given.values) - 1)].reshape(-1).tolist()
        found.add(tuple(n / view.full_shape(b)[a] for n, a in zip(sizes, axes, strict=True)))
    if len(found) > 1:
        call.refuse("its scales depend on the size of the batch")
    return list(found.pop())


def _sources(call: Call, n: int, scale: float) -> Any:
    """Which entry each entry of a nearest Resize comes from, along one axis of ``n`` entries (ONNX, Resize)."""
    count = int(n * scale)
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
    if any(v.ndim != views[0].ndim or v.batch for v in views):
        call.refuse("it joins tensors with other axes, or with the batch at another axis")
    order = (axis, *(a for a in range(len(views[0].sample)) if a != axis))
    made = call.emit(Concat(), *(call.value(v.transpose((0, *(a + 1 for a in order)))) for v in views))
    return made.transpose((0, *(int(a) + 1 for a in np.argsort(order))))


# ------------------------------------------------------------------------------------------------- views only


def identity(call: Call) -> View:
    view = call.view()
    return view if view.batch else call.entrywise(Identity())


def shape_of(call: Call) -> Constant:
    view = call.view()
    chosen = slice(call.integer("start", 0), call.attributes.get("end"))
    return Constant(call.output, tuple(np.array(view.full_shape(b)[chosen], np.int64) for b in call.importer.batches))


def size_of(call: Call) -> Constant:
    return Constant(call.output, tuple(np.array(math.prod(call.view().full_shape(b)), np.int64) for b in call.importer.batches))


def _reshaped(call: Call, target: Callable[[Shape, int], Sequence[int]]) -> View:
    """The first input in the shape that ``target`` gives for its full shape and the number of an assumed batch."""
    view, batches = call.view(), call.importer.batches
    return view.reshape(*(target(view.full_shape(b), k) for k, b in enumerate(batches)), batches=batches)


def reshape(call: Call) -> View:
    given = call.inputs[1] if call.has(1) else Constant("", (np.array(call.integers("shape")),))
    if not isinstance(given, Constant):
        call.refuse("its shape is computed by the network")

    def target(shape: Shape, k: int) -> list[int]:
        wanted = [int(n) for n in given.values[min(k, len(given.values) - 1)].reshape(-1)]
        if not call.integer("allowzero", 0):
            wanted = [shape[i] if n == 0 and i < len(shape) else n for i, n in enumerate(wanted)]
        return _filled(wanted, math.prod(shape))
    return _reshaped(call, target)


def _filled(wanted: list[int], size: int) -> list[int]:
    """A shape with its -1 replaced by what is left."""
    known = math.prod(n for n in wanted if n != -1)
    if wanted.count(-1) == 1 and known > 0 and size % known == 0:
        return [size // known if n == -1 else n for n in wanted]
    return wanted


def flatten(call: Call) -> View:
    axis = call.integer("axis", 1)
    return _reshaped(call, lambda shape, _: (math.prod(shape[:axis]), math.prod(shape[axis:])))


def squeeze(call: Call) -> View:
    axes = call.listed("axes", 1)

    def target(shape: Shape, _: int) -> list[int]:
        gone = [a % len(shape) for a in axes] if axes is not None else [i for i, n in enumerate(shape) if n == 1]
        if any(shape[a] != 1 for a in gone):
            raise ValueError(f"it removes axes {axes} of the shape {shape}, and not all of them are 1")
        return [n for i, n in enumerate(shape) if i not in gone]
    return _reshaped(call, target)


def unsqueeze(call: Call) -> View:
    axes = call.listed("axes", 1) or []

    def target(shape: Shape, _: int) -> list[int]:
        count = len(shape) + len(axes)
        rest = iter(shape)
        new = {a % count for a in axes}
        return [1 if i in new else next(rest) for i in range(count)]
    return _reshaped(call, target)


def transpose(call: Call) -> View:
    view = call.view()
    return view.transpose([a % view.ndim for a in call.integers("perm", range(view.ndim)[::-1])])


def slice_(call: Call) -> View:
    view = call.view()
    starts, ends = call.listed("starts", 1), call.listed("ends", 2)
    if starts is None or ends is None:
        raise ValueError("it lacks starts or ends")
    axes = call.listed("axes", 3, range(len(starts))) or []
    steps = call.listed("steps", 4, [1] * len(starts)) or []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if axis % view.ndim == view.batch and (start, step) == (0, 1) and end >= max(call.importer.batches):
            continue
        n = view.full_shape(0)[axis]
        stop: int | None = end
        if step < 0 and end < -n:  # down to the first entry and with it
            stop = None
        view = view.take(axis, slice(start, stop, step))
    return view


def split(call: Call) -> list[View]:
    view, axis, count = call.view(), call.integer("axis", 0), len(call.node.output)
    n = view.sample[view.axis(axis)]
    even = [min(-(-n // count), n - i * -(-n // count)) for i in range(count)]
    sizes = call.listed("split", 1, even) or []
    edges = [0, *np.cumsum(sizes).tolist()]
    if edges[-1] != n or len(sizes) != count:
        raise ValueError(f"it splits {n} entries into {sizes}")
    return [view.take(axis, slice(a, b)) for a, b in itertools.pairwise(edges)]


def gather(call: Call) -> View:
    view, axis, chosen = call.view(), call.integer("axis", 0), call.constant(1)
    n = view.sample[view.axis(axis)]
    chosen = np.where(chosen < 0, chosen + n, chosen)
    if chosen.ndim == 1:
        return view.take(axis, chosen)
    if chosen.ndim == 0:
        taken = view.take(axis, chosen.reshape(1))
        return taken.moved(np.squeeze(taken.positions, taken.axis(axis)), taken.batch - (axis % view.ndim < view.batch))
    return call.refuse(f"its indices have the shape {chosen.shape}")


def depth_to_space(call: Call) -> View:
    view, b = call.view(), call.integer("blocksize", 1)
    c, h, w = view.sample
    if call.text("mode", "DCR") == "DCR":
        moved = view.positions.reshape(b, b, c // b**2, h, w).transpose(2, 3, 0, 4, 1)
    else:
        moved = view.positions.reshape(c // b**2, b, b, h, w).transpose(0, 3, 1, 4, 2)
    return view.moved(moved.reshape(c // b**2, h * b, w * b), view.batch)


def space_to_depth(call: Call) -> View:
    view, b = call.view(), call.integer("blocksize", 1)
    c, h, w = view.sample
    blocks = view.positions.reshape(c, h // b, b, w // b, b)
    moved = blocks.transpose((2, 4, 0, 1, 3) if call.text("mode", "DCR") == "DCR" else (0, 2, 4, 1, 3))
    return view.moved(moved.reshape(c * b * b, h // b, w // b), view.batch)


def expand(call: Call) -> View:
    view, given = call.view(), call.inputs[1]
    if not isinstance(given, Constant):
        call.refuse("its shape is computed by the network")
    for k, b in enumerate(call.importer.batches):
        full, wanted = view.full_shape(b), tuple(given.values[min(k, len(given.values) - 1)].reshape(-1).tolist())
        if np.broadcast_shapes(full, wanted) != full:
            call.refuse(f"it repeats entries, from shape {full} to {wanted}")
    return identity(call)
