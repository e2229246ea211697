"""How are the ONNX ops read that work entry by entry: arithmetic with values and constants, and activations?

A constant operand is one number a channel in most networks: then ``a x + b`` is a BatchNorm, which absorbs factors on both sides.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from eqfact.graph import Node
from eqfact.onnx.attention import masked
from eqfact.onnx.call import Call, Reader
from eqfact.onnx.moving import identity
from eqfact.onnx.origin import Constant
from eqfact.onnx.views import View, run
from eqfact.ops import (
    GELU,
    Add,
    Affine,
    BatchNorm,
    Clip,
    Conv,
    ConvTranspose,
    Dense,
    Identity,
    Max,
    Min,
    Mul,
    Normalization,
    Op,
    PReLU,
    Scores,
    SiLU,
    Softmax,
    Sub,
)

#: Layers whose bias may be a node of its own.
LAYERS = (Dense, Conv, ConvTranspose)


def plain(make: Callable[[Call], Op]) -> Reader:
    """A reader for ops that do not care where the channels stand."""
    return lambda call: call.entrywise(make(call))


# ------------------------------------------------------------------------------------------------- arithmetic


def _with_constant(call: Call) -> tuple[int, int] | None:
    """Which of two inputs is the value and which the constant; None if both are values."""
    if len(call.inputs) != 2:
        return None
    constant = [i for i, t in enumerate(call.inputs) if isinstance(t, Constant)]
    return None if not constant else (1 - constant[0], constant[0])


def _affine(call: Call, slope: Any, shift: Any, **names: int) -> View:
    """``slope * x + shift`` as a BatchNorm, which absorbs factors exactly."""
    if call.opset < 7 and "axis" in call.attributes:
        call.refuse("it broadcasts by an attribute, as before opset 7; convert the file with onnx.version_converter")
    i = next(i for i, tensor in enumerate(call.inputs) if not isinstance(tensor, Constant))
    dtype = call.building.dtype

    def make(slope: Any, shift: Any) -> Op:
        zero, one = np.zeros_like(shift), np.ones_like(shift)
        return BatchNorm(slope, shift, zero, one, eps=0.0)
    return call.channelwise(call.view(i), {"slope": np.asarray(slope, dtype), "shift": np.asarray(shift, dtype)}, make, names, Affine)


def add(call: Call) -> View:
    pair = _with_constant(call)
    if pair is None:
        return call.entrywise(Add(), *call.views()) if len(call.inputs) > 1 else call.entrywise(Identity())
    x, c = pair
    made = None if "axis" in call.attributes else masked(call, x, call.operand(c, finite=False), {"mask": c})
    if made is not None:
        return made
    view, constant = call.view(x), call.operand(c)
    if "axis" not in call.attributes:
        layer, norm = call.alone(x, LAYERS), call.alone(x, (Normalization,), moved=True)
        if layer is not None and isinstance(layer.op, LAYERS) and layer.op.bias is None:  # a layer, and its bias as a node of its own
            made = _merged(call, view, c, layer, "bias")
        elif norm is not None and isinstance(norm.op, Normalization) and not _shifts(norm.op):
            made = _merged(call, view, c, norm, "beta")
        else:
            made = None
        if made is not None:
            return made
    return _affine(call, 1, constant, beta=c)


def _shifts(op: Normalization) -> bool:
    return op.beta is not None and bool(op.beta.any())


def _merged(call: Call, view: View, c: int, node: Node, name: str, **others: None) -> View | None:
    """The node before with the constant ``c`` as this parameter, if it has one entry a channel."""
    own = call.constants_on(view, {name: call.operand(c)})[name]
    if math.prod(own.shape[1:]) != 1:
        return None
    vector = np.ascontiguousarray(np.broadcast_to(own.reshape(-1), (view.shape[0],)))
    changed = replace(node.op, **{name: vector}, **others)  # type: ignore[type-var]  # final ops are dataclasses
    merged = call.emit(changed, *node.inputs, names={name: c})
    call.building.inherit(merged.value, node)
    return view.of(merged.value)


def subtract(call: Call) -> View:
    pair = _with_constant(call)
    if pair is None:
        return call.entrywise(Sub(), *call.views())
    x, c = pair
    return _affine(call, 1, -call.operand(c), beta=c) if x == 0 else _affine(call, -1, call.operand(c), beta=c)


def multiply(call: Call) -> View:
    pair = _with_constant(call)
    if pair is None:
        return call.entrywise(Mul(), *call.views())
    norm = None if "axis" in call.attributes else call.alone(pair[0], (Normalization,), moved=True)
    if norm is not None and isinstance(norm.op, Normalization) and (norm.op.gamma == 1).all() and not _shifts(norm.op):
        made = _merged(call, call.view(pair[0]), pair[1], norm, "gamma", beta=None)
        if made is not None:
            return made
    return _times(call, pair[0], call.operand(pair[1]), pair[1])


def power(call: Call) -> View:
    """A small whole power, as a product of the value with itself."""
    exponent = call.constant(1)
    if exponent.size != 1 or exponent.ndim > call.view().ndim or exponent.item() not in (1, 2, 3):
        call.refuse("it raises to another power than 1, 2 or 3")
    return call.entrywise(Mul() if exponent.item() > 1 else Identity(), *[call.view()] * int(exponent.item()))


def divide(call: Call) -> View:
    pair = _with_constant(call)
    if pair != (0, 1):
        call.refuse("it divides by a value of the network")
    divisor = call.operand(1)
    if not divisor.all():
        call.refuse("it divides by zero")
    return _times(call, 0, 1 / divisor, 1)


def _times(call: Call, x: int, factor: Any, c: int) -> View:
    """A value times a constant; one number for all scores goes into their scale."""
    view = call.view(x)
    scores = call.building.nodes.get(view.value)
    if scores is None or not isinstance(scores.op, Scores) or factor.size > 1 or factor.ndim > view.ndim or not call.building.read_once(
            scores.name):
        return _affine(call, factor, 0, gamma=c)
    merged = call.emit(replace(scores.op, scale=scores.op.scale * factor.item()), *scores.inputs)
    call.building.inherit(merged.value, scores)
    return view.of(merged.value)


def where(call: Call) -> View:
    """A constant in some places of a value; where it is minus infinity, that is a mask."""
    x = 1 if call.known(1) is None else 2
    constant, condition = call.operand(3 - x, finite=False), call.constant(0, repeats=True)
    kept = condition if x == 1 else ~condition
    if (constant == -np.inf).all():
        made = masked(call, x, np.where(kept, constant.dtype.type(0), constant), {})
        if made is not None:
            return made
    constant = call.operand(3 - x)
    return _affine(call, np.where(kept, np.ones_like(constant), 0), np.where(kept, 0, constant), beta=3 - x)


def negate(call: Call) -> View:
    one = np.ones((), call.building.dtype)
    return call.channelwise(call.view(), {"slope": -one}, lambda slope: BatchNorm(slope, 0 * slope, 0 * slope, -slope, eps=0.0), {})


# ------------------------------------------------------------------------------------------------- activations


def clip(call: Call) -> View:
    low, high = -math.inf, math.inf
    if call.has(1) or "min" in call.attributes:
        low = float(call.constant(1).reshape(())) if call.has(1) else call.number("min", low)
    if call.has(2) or "max" in call.attributes:
        high = float(call.constant(2).reshape(())) if call.has(2) else call.number("max", high)
    return call.entrywise(Clip(low, high), names=call.given(low=1, high=2))


def bound(name: str) -> Reader:
    """Max or Min of values; with a constant one side of a Clip, of which the second of a pair is merged with the first."""
    def read(call: Call) -> View:
        values = [i for i, t in enumerate(call.inputs) if not isinstance(t, Constant)]
        constants = [i for i, t in enumerate(call.inputs) if isinstance(t, Constant)]
        if not constants:
            return identity(call) if len(values) == 1 else call.entrywise(Max() if name == "low" else Min(), *call.views())
        if len(values) > 1:
            call.refuse(f"it compares {len(values)} values and {len(constants)} constants at once")
        (x,), c = values, constants[0]
        given = functools.reduce(np.maximum if name == "low" else np.minimum, (_limit(call, i, name) for i in constants))
        view = call.view(x)
        limit = {name: float(given.reshape(())) if given.size == 1 and given.ndim <= view.ndim else given}

        def make(**bounds: Any) -> Op:
            return Clip(**{"low": -math.inf, "high": math.inf, **bounds})
        other = "high" if name == "low" else "low"
        made = call.entrywise(make(**limit), view, names={name: c}) if isinstance(limit[name], float) else \
            call.channelwise(view, {name: given}, make, {name: c})
        # Min(Max(x, low), high): one Clip, if the value between the two is read here only
        node = call.building.nodes.get(made.value)
        before = call.alone(x, (Clip,)) if view.plain else None
        if before is not None and node is not None:
            first, second = before.op, node.op
            if isinstance(first, Clip) and isinstance(second, Clip) and np.all(np.isinf(getattr(first, name))):
                both = {other: getattr(first, other), name: getattr(second, name)}
                if np.all(np.asarray(both["low"]) <= np.asarray(both["high"])):
                    call.building.nodes[node.name] = replace(node, op=Clip(**both), inputs=before.inputs)
                    call.building.inherit(node.name, before)
        return made
    return read


def _limit(call: Call, i: int, name: str) -> npt.NDArray[Any]:
    """The bounds in input ``i``; minus infinity leaves a lower side open, infinity an upper one."""
    limits = call.operand(i, finite=False)
    none = -np.inf if name == "low" else np.inf
    return limits if (np.isfinite(limits) | (limits == none)).all() else call.operand(i)


def prelu(call: Call) -> View:
    slope = call.operand(1)
    if slope.size == 1:
        return call.entrywise(PReLU(slope.reshape(1)), names={"slope": 1})
    view = call.view()
    shape = view.full_shape(call.building.batches[0])
    if slope.ndim == 1 and view.ndim > 2 and len(slope) == shape[1] and (call.opset < 7 or len(slope) != shape[-1]):
        # (C,) means the channels where it was written before opset 7 or would broadcast against nothing else
        slope = slope.reshape(-1, *(1 for _ in shape[2:]))
    return call.channelwise(view, {"slope": slope}, PReLU, {"slope": 1})


def softmax(call: Call) -> View:
    view, early = call.view(), call.alone(0, (Softmax,))
    if early is not None and early.name in call.building.early:  # with its mask
        merged = call.emit(early.op, *early.inputs)
        call.building.inherit(merged.value, early)
        return view.of(merged.value)
    axis = view.axis(call.integer("axis", 1 if call.opset < 13 else -1))
    n = view.size(axis)
    if call.opset < 13 and math.prod(view.size(a) for a in range(axis, view.ndim)) != n:
        call.refuse(f"before opset 13 it runs over all axes from {axis} on at once")
    layout, atoms = view.layout(), view.axes[axis]
    if layout is not None and axis in layout:
        return view.of(call.emit(Softmax(layout.index(axis) + 1), view.value).value)
    if atoms and atoms == run(atoms[0].axis, view.shape[atoms[0].axis]):
        return view.of(call.emit(Softmax(atoms[0].axis + 1), view.value).value)
    value, back = call.by_channel(view, axis)
    return back(call.emit(Softmax(1), value))


def gelu(call: Call) -> View:
    return call.entrywise(GELU(approximate=call.text("approximate", "none") == "tanh"))


def swish(call: Call) -> View:
    if call.number("alpha", 1.0) != 1:
        call.refuse(f"it has alpha {call.number('alpha', 1.0):g}; eqfact's SiLU has 1")
    return call.entrywise(SiLU())


def dropout(call: Call) -> View:
    if call.has(2) and call.constant(2).any():
        call.refuse("it is in training mode; export the network for inference")
    return identity(call)


def cast(call: Call) -> View:
    to = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(call.integer("to", 0)))
    if to != call.building.dtype:
        call.refuse(f"it casts to {to}; a network is computed in one type here, {call.building.dtype}")
    return identity(call)
