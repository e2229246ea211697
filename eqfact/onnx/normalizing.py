"""How are normalizations read: the operators, and what stands for them where an opset lacks them?

What is normalized over one axis are features, wherever it stands, and all other axes are tokens; over space, the channels are those of the
value. Factor and shift of one entry a channel that follow (:mod:`eqfact.onnx.arithmetic`) become those of the normalization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from eqfact.onnx.call import AnyArray, Call, Reader
from eqfact.onnx.views import View
from eqfact.ops import GroupNorm, InstanceNorm, LayerNorm, Op


def over_features(make: Callable[..., Op]) -> Reader:
    """A reader for an operator that normalizes over the last axes, of which there must be one."""
    def read(call: Call) -> View:
        view = call.view()
        axis = view.axis(call.integer("axis", -1))
        if axis != view.ndim - 1:
            call.refuse(f"it normalizes over {view.ndim - axis} axes, with parameters for every entry of them")
        names = call.given(gamma=1, beta=2)
        own = {name: _vector(call, i, view.size(axis)) for name, i in names.items()}
        return _features(call, view, axis, make(**own, eps=call.number("epsilon", 1e-5)), names)
    return read


def _vector(call: Call, i: int, count: int, repeats: int = 1) -> AnyArray:
    """Input ``i`` as one number a channel, each ``repeats`` times."""
    array: AnyArray = np.broadcast_to(np.repeat(call.parameter(i).reshape(-1), repeats), (count,))
    return array


def _features(call: Call, view: View, axis: int, op: Op, names: Mapping[str, int]) -> View:
    value, back = call.by_channel(view, axis)
    return back(call.emit(op, value, names=names))


def group_normalization(call: Call) -> View:
    """Of opset 21: the one before, with a factor and a shift a group, is invalid in the standard itself."""
    view, names = call.view(), {"gamma": 1, "beta": 2}
    own = {name: _vector(call, i, view.size(1)) for name, i in names.items()}
    return _features(call, view, 1, GroupNorm(call.integer("num_groups", 1), **own, eps=call.number("epsilon", 1e-5)), names)


def instance_normalization(call: Call) -> View:
    """Between two Reshapes it normalizes groups of channels."""
    view, names, eps = call.view(), {"gamma": 1, "beta": 2}, call.number("epsilon", 1e-5)
    groups, channels = _groups(view, range(2, view.ndim)), view.shape[0]
    if groups is None or groups == channels:
        own = {name: _vector(call, i, view.size(1)) for name, i in names.items()}
        return _features(call, view, 1, InstanceNorm(**own, eps=eps), names)
    own = {name: _vector(call, i, channels, channels // groups) for name, i in names.items()}
    return view.of(call.emit(GroupNorm(groups, **own, eps=eps), view.value).value)


def _groups(view: View, axes: Sequence[int]) -> int | None:
    """Of how many groups of channels these axes are all entries, space included; None if they are not that."""
    kept = [a for i, axis in enumerate(view.axes) if i not in axes for a in axis if not a.is_batch]
    batch_apart = view.batch is None or view.batch not in axes
    return ([1, *(a.size for a in kept)][-1] if batch_apart and len(kept) < 2 and kept == view.atoms_of(0)[:len(kept)]
            and all(a.axis == 0 for a in kept) else None)


def decomposed(make: Callable[..., Op]) -> Reader:
    """A reader for ``x / sqrt(mean(x**2) + eps)``; of a LayerNorm the mean has been taken off, over whatever axes."""
    def read(call: Call) -> View:
        view, eps = call.view(), call.parameter(1)
        axes = sorted({view.axis(a) for a in call.integers("axes")})
        if eps.size != 1 or eps.ndim > view.ndim:
            call.refuse(f"its eps has the shape {eps.shape}")
        number = float(eps.reshape(()))
        if call.has(2) and not np.allclose(call.parameter(2) * math.prod(view.size(a) for a in axes), 1, rtol=2**-9, atol=0):
            call.refuse("its means are none")
        groups, gamma = _groups(view, axes), np.ones(view.shape[0], eps.dtype)
        names = call.given(gamma=3, beta=4)
        with_space = any(a.axis > 0 for i in axes for a in view.axes[i])
        plainly = len(axes) == 1 and axes[0] in (view.ndim - 1, view.home) and not (with_space and groups not in (None, 1, len(gamma)))
        if plainly or (len(axes) == 1 and names):
            own = {"gamma": np.ones(view.size(axes[0]), eps.dtype)} | {name: _along(call, i, view, axes[0]) for name, i in names.items()}
            return _features(call, view, axes[0], make(**own, eps=number), {"eps": 1, **names})
        if make is not LayerNorm or groups is None or names:
            call.refuse(f"it normalizes over the axes {axes} together")
        op = InstanceNorm(gamma, eps=number) if groups == len(gamma) else GroupNorm(groups, gamma, eps=number)
        return view.of(call.emit(op, view.value, names={"eps": 1}).value)
    return read


def _along(call: Call, i: int, view: View, axis: int) -> AnyArray:
    """Input ``i`` as one number for each entry of an axis."""
    array = call.parameter(i)
    full = array.reshape((1,) * (view.ndim - array.ndim) + array.shape)
    if array.ndim > view.ndim or any(n > 1 for k, n in enumerate(full.shape) if k != axis):
        call.refuse(f"its parameters of shape {array.shape} are not one for each entry of axis {axis}")
    vector: AnyArray = np.broadcast_to(full.reshape(-1), (view.size(axis),))
    return vector
