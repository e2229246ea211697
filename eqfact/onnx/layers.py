"""How are the layers of ONNX that have windows or weights read: convolutions, pools, reductions, products, BatchNormalization?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eqfact.onnx import attention
from eqfact.onnx.call import AnyArray, Call, Reader
from eqfact.onnx.views import View
from eqfact.ops import AvgPool, BatchNorm, Blend, Conv, ConvTranspose, Dense, GlobalAvgPool, Identity, LpPool, MaxPool, Op, Pad, Shape

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


class _Pooling(NamedTuple):
    """What a pool reads, its window, and how much more is padded behind because of ``ceil_mode``."""

    value: str
    kernel: list[int]
    padding: Sides
    more: Sides
    #: Stride and dilation, as the ops of eqfact have them.
    steps: dict[str, Any]


def _pool(call: Call) -> _Pooling:
    kernel = call.integers("kernel_shape")
    x = call.value(call.view())
    sizes = call.building.shapes[x][1:]
    stride, padding, dilation = _window(call, sizes, kernel)
    more = [0] * len(kernel)
    if call.integer("ceil_mode", 0):
        for axis, (n, k, s, d, (before, after)) in enumerate(zip(sizes, kernel, stride, dilation, padding, strict=True)):
            reach = d * (k - 1) + 1
            count = math.ceil((n + before + after - reach) / s) + 1
            count -= (count - 1) * s >= n + before  # every window starts inside the input or before it
            more[axis] = max(0, (count - 1) * s + reach - n - before - after)
    return _Pooling(x, kernel, padding, tuple((0, m) for m in more), {"stride": _one(stride), "dilation": _one(dilation)})


def _plus(padding: Sides, more: Sides) -> Sides:
    return tuple((a + c, b + d) for (a, b), (c, d) in zip(padding, more, strict=True))


def max_pool(call: Call) -> View:
    x, kernel, padding, more, steps = _pool(call)
    return call.emit(MaxPool(_one(kernel), padding=_plus(padding, more), **steps), x)


def lp_pool(call: Call) -> View:
    x, kernel, padding, more, steps = _pool(call)
    return call.emit(LpPool(_one(kernel), padding=_plus(padding, more), p=_power(call), **steps), x)


def _power(call: Call) -> int:
    power = call.number("p", 2)
    if power != int(power):
        call.refuse(f"it takes the power {power:g}, which is no whole number")
    return int(power)


def average_pool(call: Call) -> View:
    x, kernel, padding, more, steps = _pool(call)
    counted = bool(call.integer("count_include_pad", 0)) and any(map(any, padding))
    if counted and any(map(any, more)):  # explicit padding counts, what ceil_mode adds does not
        x, padding, counted = call.emit(Pad(padding), x, suffix=".pad").value, more, False
    else:
        padding = _plus(padding, more)
    counted = counted or not any(map(any, padding))
    return call.emit(AvgPool(_one(kernel), padding=padding, count_include_pad=counted, **steps), x)


def global_average_pool(call: Call) -> View:
    return call.emit(GlobalAvgPool(), call.value(call.view()))


def global_max_pool(call: Call) -> View:
    x = call.value(call.view())
    return call.emit(MaxPool(call.building.shapes[x][1:], stride=1), x)


def global_lp_pool(call: Call) -> View:
    x = call.value(call.view())
    return call.emit(LpPool(call.building.shapes[x][1:], stride=1, p=_power(call)), x)


def reduce_space(make: Callable[..., Op] | None) -> Reader:
    """A reader for reductions over some of space: ``make`` of a pool's kernel, or sums if there is none."""
    def reduce(call: Call) -> View:
        view, given = call.view(), call.listed("axes", 1)
        if not given and call.integer("noop_with_empty_axes", 0):
            return call.entrywise(Identity())
        reduced = sorted({view.axis(a) for a in given or range(view.ndim)})
        for axis in reduced:
            view.size(axis)
        kept = [a for a in range(view.ndim) if a not in reduced and a != view.batch]
        channel = next((a for a in kept if view.axes[a]), None)
        if make is None:
            made = along(call, view, {a: np.ones((1, view.size(a))) for a in reduced if view.axes[a]})
            return made if call.integer("keepdims", 1) else made.with_axes(*(axis for i, axis in enumerate(made.axes) if i not in reduced))
        x, axes, back = call.apart(view, reduced) if channel is None else call.standing(view, view.home if view.home in kept else channel)
        sizes, space = call.building.shapes[x][1:], {axes[a] for a in reduced if a in axes}
        kernel = tuple(n if i in space else 1 for i, n in enumerate(sizes, 1))
        if not space:
            made = call.emit(Identity(), x)
        elif make is AvgPool and len(space) == len(sizes):
            made = call.emit(GlobalAvgPool(), x)
        else:
            made = call.emit(make(kernel, stride=1), x)
        made = back(made)
        if call.integer("keepdims", 1):
            return made
        return made.with_axes(*(axis for i, axis in enumerate(made.axes) if i not in reduced))
    return reduce


def along(call: Call, view: View, matrices: Mapping[int, AnyArray], names: Mapping[str, int] | None = None) -> View:
    """A matrix along each of some axes of a tensor, none of which should be its channels."""
    if not matrices:
        return call.entrywise(Identity(), view)
    for i, (axis, matrix) in enumerate(matrices.items(), 1):
        view.size(axis)
        matrix, suffix = np.asarray(matrix, call.building.dtype), "" if i == len(matrices) else f".axis{axis}"
        place = space_axis(view, axis)
        if place is not None:
            made = call.emit(Blend(matrix, place), view.value, names=names, suffix=suffix)
            run = made.with_axes((), *made.axes[-len(view.shape):]).axes[place + 1]
            view = View(made.value, made.shape, (*view.axes[:axis], run, *view.axes[axis + 1:]))
        else:
            value, axes, back = call.apart(view, {axis})
            view = back(call.emit(Blend(matrix, axes[axis]), value, names=names, suffix=suffix))
    return view


def space_axis(view: View, axis: int) -> int | None:
    """The axis of space of the value that an axis of the tensor is, all of it and nothing else."""
    atoms = view.axes[axis]
    alone = len(atoms) == 1 and atoms[0].axis > 0 and atoms[0].size == view.shape[atoms[0].axis]
    return atoms[0].axis if alone else None


def cumulate(call: Call) -> View:
    """A running sum: a triangle of ones."""
    view = call.view()
    axis = view.axis(int(call.constant(1).reshape(())))
    n = view.size(axis)
    triangle = np.tri(n, k=-call.integer("exclusive", 0))
    return along(call, view, {axis: triangle.T if call.integer("reverse", 0) else triangle})


# ------------------------------------------------------------------------------------------------- products with weights


def gemm(call: Call) -> View:
    """``x @ W + b`` over the columns, be the rows samples, space, or both (tokens that an exporter has joined with the batch)."""
    view = call.view()
    weight, alpha, beta = call.parameter(1), call.number("alpha", 1.0), call.number("beta", 1.0)
    if weight.ndim != 2 or view.ndim != 2:
        raise ValueError(f"it multiplies tensors with {view.ndim} and {weight.ndim} axes; Gemm takes matrices")
    if call.integer("transA", 0):
        view = view.transpose((1, 0))
    rows = _times(weight if call.integer("transB", 0) else weight.T, alpha)
    bias = bias_row(call, call.parameter(2), len(rows)) if call.has(2) else None
    return _layer(call, view, -1, rows, bias if bias is None else _times(bias, beta), names=call.given(weight=1, bias=2))


def _times(array: Any, factor: float) -> Any:
    return array if factor == 1 else array * array.dtype.type(factor)


def bias_row(call: Call, bias: Any, out: int) -> Any:
    """A bias ``(out,)`` from what broadcasts to one."""
    if bias.size not in (1, out) or bias.shape not in ((), (1,), (out,), (1, 1), (1, out)):
        call.refuse(f"its third input has the shape {bias.shape}, which is no bias of {out} outputs")
    return bias.reshape(-1) if bias.size == out else np.full(out, bias.reshape(-1)[0])


def matmul(call: Call) -> View:
    """``x @ W`` over the last axis: Dense, or a pointwise convolution if there are axes in between. ``W @ x`` over the last but one: the
    same if that is the channels, else a matrix along an axis of space. Of two values see :mod:`eqfact.onnx.attention`."""
    if call.known(0) is not None:
        return _matmul_from_the_left(call)
    if call.known(1) is None:
        return attention.product(call, call.view(0), call.view(1))
    view, weight = call.view(), call.parameter(1)
    if weight.ndim != 2 or view.ndim < 2:
        call.refuse(f"it multiplies a value with {view.ndim} axes by a constant of shape {weight.shape}; "
                    "(N, ..., in) times (in, out) is supported")
    return _layer(call, view, -1, weight.T, names={"weight": 1})


def _matmul_from_the_left(call: Call) -> View:
    matrix, view = call.parameter(0), call.view(1)
    if matrix.ndim != 2 or view.ndim < 2:
        call.refuse(f"it multiplies a constant of shape {matrix.shape} by a value with {view.ndim} axes; "
                    "(out, in) times (N, ..., in, ...) is supported")
    axis = view.ndim - 2
    if space_axis(view, axis) is None and view.home in (None, axis):
        return _layer(call, view, axis, matrix, names={"weight": 0})
    return along(call, view, {axis: matrix}, {"matrix": 0})


def _layer(call: Call, view: View, axis: int, rows: AnyArray, bias: Any = None, *, names: Mapping[str, int]) -> View:
    """The layer with the weights ``rows``, ``(out, in)``, whose channels are one axis of a tensor."""
    x, back = call.by_channel(view, axis)
    axes = len(call.building.shapes[x]) - 1
    op = Dense(rows, bias) if axes == 0 else Conv(rows.reshape(*rows.shape, *(1 for _ in range(axes))), bias)
    return back(call.emit(op, x, names=names))


class Einsum(NamedTuple):
    """An equation of a value and a constant, by the letters of their axes: each of the constant's is contracted or made."""

    value: str
    constant: str
    made: str

    @property
    def contracted(self) -> str:
        """The axes that both have and the result has not."""
        return "".join(a for a in self.value if a in self.constant)

    @property
    def new(self) -> str:
        """The axes of the result that the value has not."""
        return "".join(a for a in self.made if a in self.constant)

    @classmethod
    def of(cls, equation: str, constant: int, ndim: int) -> Einsum | None:
        """The equation, if it is a layer with weights: a product of which every axis of the constant is contracted or made."""
        terms, arrow, made = equation.replace(" ", "").partition("->")
        both = terms.split(",")
        if len(both) != 2:
            return None
        if not arrow:
            made = "".join(sorted(a for a in set(terms) - {",", "."} if terms.count(a) == 1))
        value, own = both[1 - constant], both[constant]
        if "..." in value:
            letters = [a for a in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" if a not in equation]
            between = "".join(letters[:ndim - len(value) + 3])
            value = value.replace("...", between)
            made = made.replace("...", between) if arrow else between + made
        found = cls(value, own, made)
        distinct = all(len(set(term)) == len(term) and "." not in term for term in found)
        sides = [(a in value) != (a in made) for a in own]
        whole = set(value) - set(own) == set(made) - set(own)
        return found if distinct and all(sides) and whole and found.contracted and found.new and len(value) == ndim else None

    def rows(self, constant: AnyArray) -> AnyArray:
        """The weights ``(out, in)`` of a constant."""
        moved: AnyArray = np.einsum(f"{self.constant}->{self.new}{self.contracted}", constant)
        return moved.reshape(math.prod(moved.shape[:len(self.new)]), -1)

    def back(self, rows: AnyArray, shape: Sequence[int]) -> AnyArray:
        """The constant of this shape that has these weights."""
        sizes = dict(zip(self.constant, shape, strict=True))
        array: AnyArray = np.einsum(f"{self.new}{self.contracted}->{self.constant}",
                                    rows.reshape([sizes[a] for a in self.new + self.contracted]))
        return array


def einsum(call: Call) -> View:
    """A layer with weights, or a product of two values, if that is what it comes to."""
    constants = [i for i in range(len(call.inputs)) if call.known(i) is not None]
    if len(call.inputs) == 2 and not constants:
        return attention.einsum(call, call.text("equation", ""))
    if len(call.inputs) != 2 or len(constants) != 1:
        call.refuse(f"it joins {len(call.inputs) - len(constants)} values and {len(constants)} constants; one of each is supported")
    (i,) = constants
    view, weight, equation = call.view(1 - i), call.parameter(i), call.text("equation", "")
    terms = Einsum.of(equation, i, view.ndim)
    if terms is None or len(terms.constant) != weight.ndim:
        call.refuse(f"'{equation}' is no layer: each axis of the constant must be contracted or new")
    at = {a: view.axes[n] for n, a in enumerate(terms.value)}
    kept = [a for a in terms.value if a not in terms.contracted]
    for a in terms.contracted:
        view.size(terms.value.index(a))
    whole = view.with_axes(*(at[a] for a in kept), tuple(atom for a in terms.contracted for atom in at[a]))
    made = _layer(call, whole, -1, terms.rows(weight), names={"weight": i})
    sizes = dict(zip(terms.constant, weight.shape, strict=True))
    batches = call.building.batches
    split = made.reshape(*((*made.full_shape(b)[:-1], *(sizes[a] for a in terms.new)) for b in batches), batches=batches)
    names = [*kept, *terms.new]
    return split.transpose([names.index(a) for a in terms.made])


def batch_normalization(call: Call) -> View:
    if call.integer("training_mode", 0) or (call.opset < 14 and sum(map(bool, call.node.output)) > 1):
        call.refuse("it is in training mode; export the network for inference")
    if not call.integer("spatial", 1):
        call.refuse("it has spatial=0, one set of parameters for every pixel")
    names = {"gamma": 1, "beta": 2, "mean": 3, "var": 4}
    op = BatchNorm(**{name: call.parameter(i, cast=True) for name, i in names.items()}, eps=call.number("epsilon", 1e-5))
    return call.emit(op, call.value(call.view()), names=names)
