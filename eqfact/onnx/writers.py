"""How is each op written as ONNX? One short function each, in the table :data:`WRITERS`: the way back of :mod:`eqfact.onnx.nodes`.

A function gets the :class:`~eqfact.onnx.exporting.Writer`, the node and its op, and adds the ONNX nodes and initializers that compute
the same. The value has the name of the node; what stands between several ONNX nodes is named after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from eqfact.graph import Node
from eqfact.onnx.call import AnyArray
from eqfact.onnx.exporting import Writer
from eqfact.onnx.origin import OnnxError
from eqfact.ops import (
    GELU,
    Abs,
    Add,
    Affine,
    AvgPool,
    BatchNorm,
    Blend,
    Clip,
    Concat,
    Conv,
    ConvTranspose,
    Dense,
    Erf,
    Extend,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    HardSigmoid,
    HardSwish,
    Identity,
    InstanceNorm,
    LayerNorm,
    LeakyReLU,
    LpPool,
    Max,
    MaxPool,
    Min,
    MinPool,
    Mix,
    Mul,
    Normalization,
    Op,
    Pad,
    Permute,
    PReLU,
    Rearrange,
    ReLU,
    RMSNorm,
    Rotary,
    Scores,
    Sigmoid,
    SiLU,
    Slice,
    Sloped,
    Softmax,
    Sub,
    Take,
    Tanh,
    Transpose,
    Unflatten,
    Upsample,
)
from eqfact.ops.base import Padding, per_axis, per_side
from eqfact.quantizers import FakeQuantize


def _plain(kind: str, **attributes: Callable[[Any], Any]) -> Callable[[Writer, Node, Any], None]:
    """A writer for ops that are one ONNX node without parameters."""
    def write(w: Writer, node: Node, op: Any) -> None:
        w.node(kind, node.inputs, node.name, node, **{name: of(op) for name, of in attributes.items()})
    return write


def _pads(padding: Padding, axes: int) -> list[int]:
    sides = per_side(padding, axes)
    return [s[0] for s in sides] + [s[1] for s in sides]


def dense(w: Writer, node: Node, op: Dense) -> None:
    # of a product with quantized weights (in, out), onnxruntime makes MatMulNBits, which rounds what it reads to 8 bits of its own
    weights = [w.weight(node, op, np.asarray), *([] if op.bias is None else [w.parameter(node, "bias", op.bias)])]
    w.node("Gemm", [*node.inputs, *weights], node.name, node, transB=1)


def conv(w: Writer, node: Node, op: Conv) -> None:
    inputs = [*node.inputs, w.weight(node, op, np.asarray), *([] if op.bias is None else [w.parameter(node, "bias", op.bias)])]
    w.node("Conv", inputs, node.name, node, **_geometry(op))


def _geometry(op: Conv | ConvTranspose) -> dict[str, Any]:
    axes = op.weight.ndim - 2
    return {"kernel_shape": op.weight.shape[2:], "strides": per_axis("stride", op.stride, axes), "pads": _pads(op.padding, axes),
            "dilations": per_axis("dilation", op.dilation, axes), "group": op.groups}


def conv_transpose(w: Writer, node: Node, op: ConvTranspose) -> None:
    out, inner, *kernel = op.weight.shape

    def columns(weight: AnyArray) -> AnyArray:
        return weight.reshape(op.groups, out // op.groups, inner, *kernel).swapaxes(1, 2).reshape(op.groups * inner, -1, *kernel)
    inputs = [*node.inputs, w.weight(node, op, columns)]
    inputs += [] if op.bias is None else [w.parameter(node, "bias", op.bias)]
    w.node("ConvTranspose", inputs, node.name, node, **_geometry(op),
           output_padding=per_axis("output_padding", op.output_padding, len(kernel)))


def batch_norm(w: Writer, node: Node, op: BatchNorm) -> None:
    """As Add or Mul with a constant where it is no more than that, or where the channels do not stand at axis 1."""
    centred = not op.mean.any() and (op.var == 1).all() and op.eps == 0
    if w.channels_second(node) and not (centred and ((op.gamma == 1).all() or not op.beta.any())):
        parameters = [w.parameter(node, name, getattr(op, name)) for name in ("gamma", "beta", "mean", "var")]
        w.node("BatchNormalization", [*node.inputs, *parameters], node.name, node, epsilon=op.eps)
        return
    slope, shift = (op.gamma, op.beta) if centred else (op.weight[:, 0], op.bias)
    (value,) = node.inputs
    if (slope != 1).any():
        last = not shift.any()
        value = w.node("Mul", [value, w.vector(node, "gamma", slope)], node.name if last else w.inner(node, "scaled"), node,
                       suffix="" if last else ".mul")
    if shift.any() or (slope == 1).all():
        w.node("Add", [value, w.vector(node, "beta", shift)], node.name, node)


def _scaled(w: Writer, node: Node, op: Normalization) -> tuple[str, float]:
    """What is normalized, and the one eps that ONNX has: of several, the input is multiplied instead."""
    (value,) = node.inputs
    if np.any(op.eps) and not np.all(op.eps):
        raise OnnxError(f"{w.path}: node '{node.name}': some of its groups have an eps of 0, and others not; give all of them one")
    eps, factor = one_eps(op)
    if factor is not None:
        value = w.node("Mul", [value, w.vector(node, "factor", factor)], w.inner(node, "scaled"), node, ".mul")
    return value, eps


def one_eps(op: Normalization, eps: float | AnyArray | None = None) -> tuple[float, AnyArray | None]:
    """One eps for all groups of channels, and by what the channels are multiplied so that it is theirs, if they have several.

    >>> one_eps(GroupNorm(2, np.ones(4), eps=np.array([4.0, 1.0])))
    (4.0, array([1., 1., 2., 2.]))
    """
    own = np.atleast_1d(np.asarray(op.eps))
    if np.all(own == own[0]):
        return float(own[0]), None
    most = float(own.max()) if eps is None else float(eps)
    return most, np.repeat(np.sqrt(most / own), len(op.gamma) // op.norm_groups).astype(op.gamma.dtype)


def over_features(kind: str, opset: int) -> Callable[[Writer, Node, Any], None]:
    """A writer of the operator, which has the opset ``opset`` and the last axis for its channels; before that, in steps."""
    def write(w: Writer, node: Node, op: LayerNorm | RMSNorm) -> None:
        if w.standard.version < opset:
            _behind(w, node, op, _unit(w, node, op))
            return
        axes, (value,) = w.spatial(node) + 2, node.inputs
        shifted = op.beta is not None and not op.centred  # RMSNormalization has no shift
        made = w.inner(node, "unshifted") if shifted else node.name
        own = [w.parameter(node, "gamma", op.gamma), *([] if op.beta is None or shifted else [w.parameter(node, "beta", op.beta)])]
        if axes > 2:
            value = w.node("Transpose", [value], w.inner(node, "turned"), node, ".turn", perm=[0, *range(2, axes), 1])
        last = w.inner(node, "normalized") if axes > 2 else made
        w.node(kind, [value, *own], last, node, ".normalize" if last != node.name else "", axis=-1, epsilon=op.eps)
        if axes > 2:
            w.node("Transpose", [last], made, node, ".back" if shifted else "", perm=[0, axes - 1, *range(1, axes - 1)])
        if shifted:
            w.node("Add", [made, w.vector(node, "beta", np.asarray(op.beta))], node.name, node)
    return write


def _unit(w: Writer, node: Node, op: LayerNorm | RMSNorm) -> str:
    """``x / sqrt(mean(x**2) + eps)``, after the mean was taken off if the op does so. ReduceSum is alike in all opsets, ReduceMean not."""
    (x,) = node.inputs
    axes, share, step = w.integers(node, "axes", [1]), w.parameter(node, "share", 1 / len(op.gamma), ()), _steps(w, node)
    if op.centred:
        x = step("Sub", [x, step("Mul", [step("ReduceSum", [x, axes], "sum"), share], "mean")], "centred")
    power = step("Mul", [step("ReduceSum", [step("Mul", [x, x], "square"), axes], "squares"), share], "power")
    return step("Div", [x, step("Sqrt", [step("Add", [power, w.parameter(node, "eps", op.eps, ())], "more")], "root")], "unit")


def _behind(w: Writer, node: Node, op: Normalization, value: str) -> None:
    """Factor and shift as nodes of their own."""
    scaled = w.node("Mul", [value, w.vector(node, "gamma", op.gamma)], *(
        (node.name, node) if op.beta is None else (w.inner(node, "scaled"), node, ".mul")))
    if op.beta is not None:
        w.node("Add", [scaled, w.vector(node, "beta", op.beta)], node.name, node)


def group_norm(w: Writer, node: Node, op: GroupNorm) -> None:
    """Before opset 21 as the instances of what is reshaped to have the groups for channels."""
    value, eps = _scaled(w, node, op)
    if w.standard.version >= 21:
        w.node("GroupNormalization", [value, *_both(w, node, op)], node.name, node, num_groups=op.norm_groups, epsilon=eps)
        return
    one = np.ones(op.norm_groups, op.gamma.dtype)
    inputs = [w.parameter(node, "one", one), w.parameter(node, "zero", 0 * one)]
    sizes = w.node("Shape", [value], w.inner(node, "sizes"), node, ".sizes")
    split = w.node("Reshape", [value, w.integers(node, "split", [0, op.norm_groups, -1])], w.inner(node, "split"), node, ".split")
    made = w.node("InstanceNormalization", [split, *inputs], w.inner(node, "normalized"), node, ".normalize", epsilon=eps)
    _behind(w, node, op, w.node("Reshape", [made, sizes], w.inner(node, "unit"), node, ".unit"))


def instance_norm(w: Writer, node: Node, op: InstanceNorm) -> None:
    """Where there is no space, nothing is left but the shift."""
    if not w.spatial(node):
        zero = w.node("Sub", [*node.inputs, *node.inputs], w.inner(node, "zero"), node, ".zero")
        w.node("Add", [zero, w.vector(node, "beta", np.zeros_like(op.gamma) if op.beta is None else op.beta)], node.name, node)
        return
    value, eps = _scaled(w, node, op)
    w.node("InstanceNormalization", [value, *_both(w, node, op)], node.name, node, epsilon=eps)


def _both(w: Writer, node: Node, op: Normalization) -> list[str]:
    return [w.parameter(node, "gamma", op.gamma), w.parameter(node, "beta", np.zeros_like(op.gamma) if op.beta is None else op.beta)]


def prelu(w: Writer, node: Node, op: PReLU) -> None:
    w.node("PRelu", [*node.inputs, w.vector(node, "slope", op.slope)], node.name, node)


def clip(w: Writer, node: Node, op: Clip) -> None:
    """Clip with one bound for all channels; Max and Min with a broadcast bound for one a channel."""
    bounds = {name: bound for name, bound in (("low", op.low), ("high", op.high)) if not np.all(np.isinf(bound))}
    if all(np.size(b) == 1 for b in bounds.values()):
        names = {name: w.parameter(node, name, bound, ()) for name, bound in bounds.items()}
        inputs = [*node.inputs, names.get("low", ""), names.get("high", "")]
        w.node("Clip" if names else "Identity", inputs[:max(i for i, name in enumerate(inputs) if name) + 1], node.name, node)
        return
    (value,) = node.inputs
    for i, (name, bound) in enumerate(bounds.items()):
        last = i == len(bounds) - 1
        value = w.node("Max" if name == "low" else "Min", [value, w.vector(node, name, np.asarray(bound))],
                       node.name if last else w.inner(node, name), node, suffix="" if last else f".{name}")


#: Over how many axes of space engines pool, and the reductions that do the same over all of some axes.
MOST_POOLED = 3
REDUCTIONS: dict[type[Op], Callable[[Any], str]] = {
    AvgPool: lambda _: "ReduceMean", MaxPool: lambda _: "ReduceMax", MinPool: lambda _: "ReduceMin", LpPool: lambda op: f"ReduceL{op.p}"}


def _reduction(w: Writer, node: Node, op: MaxPool | MinPool | AvgPool | LpPool) -> bool:
    """Whether a pool over more axes than engines pool over takes in all of some, and is written as that."""
    if w.spatial(node) <= MOST_POOLED or (isinstance(op, LpPool) and op.p > 2):
        return False
    sizes = w.space(node)
    kernel = per_axis("kernel", op.kernel, len(sizes))
    made = tuple(1 if k == n else n for k, n in zip(kernel, sizes, strict=True))
    if any(_pads(op.padding, len(sizes))) or op.output_shape((1, *sizes))[1:] != made:
        return False
    w.need_opset(18, node)
    reduced = w.integers(node, "axes", [i for i, k in enumerate(kernel, 2) if k > 1])
    w.node(REDUCTIONS[type(op)](op), [*node.inputs, reduced], node.name, node, keepdims=1)
    return True


def _pool(kind: str, dilated: int, *names: str) -> Callable[[Writer, Node, Any], None]:
    """A writer for pools; the opset ``dilated`` is the first in which this one has dilations, ``names`` are its own parameters."""
    def write(w: Writer, node: Node, op: Any) -> None:
        if _reduction(w, node, op):
            return
        own: dict[str, Any] = {name: int(getattr(op, name)) for name in names}
        w.node(kind, node.inputs, node.name, node, **_window(w, node, op, dilated), **own)
    return write


def _window(w: Writer, node: Node, op: MaxPool | MinPool | AvgPool | LpPool, dilated: int) -> dict[str, Any]:
    axes = w.spatial(node)
    kernel, dilation = per_axis("kernel", op.kernel, axes), per_axis("dilation", op.dilation, axes)
    if set(dilation) != {1}:
        w.need_opset(dilated, node)
    return {"kernel_shape": kernel, "strides": kernel if op.stride is None else per_axis("stride", op.stride, axes),
            "pads": _pads(op.padding, axes), **({} if set(dilation) == {1} else {"dilations": dilation})}


def min_pool(w: Writer, node: Node, op: MinPool) -> None:
    if _reduction(w, node, op):
        return
    negated = w.node("Neg", node.inputs, w.inner(node, "negated"), node, ".negated")
    largest = w.node("MaxPool", [negated], w.inner(node, "largest"), node, ".largest", **_window(w, node, op, 10))
    w.node("Neg", [largest], node.name, node)


def blend(w: Writer, node: Node, op: Blend) -> None:
    """As a product from the left, over the last axis but one; another axis is exchanged with that before and after."""
    axes = w.spatial(node) + 2
    order = list(range(axes))
    order[axes - 2], order[op.axis + 1] = order[op.axis + 1], order[axes - 2]
    matrix = w.parameter(node, "matrix", op.matrix)
    if order == list(range(axes)):
        w.node("MatMul", [matrix, *node.inputs], node.name, node)
        return
    turned = w.node("Transpose", node.inputs, w.inner(node, "turned"), node, ".turn", perm=order)
    made = w.node("MatMul", [matrix, turned], w.inner(node, "product"), node, ".product")
    w.node("Transpose", [made], node.name, node, perm=order)


def extend(w: Writer, node: Node, op: Extend) -> None:
    """As Concat with the constant, repeated for every sample."""
    constant, axis = w.beside(node, op)
    own = w.parameter(node, "constant", constant)
    if w.samples(node) != 1:
        shape = w.node("Shape", node.inputs[:1], w.inner(node, "sizes"), node, ".sizes")
        first, second = w.integers(node, "first", [0]), w.integers(node, "second", [1])
        count = w.node("Slice", [shape, first, second], w.inner(node, "samples"), node, ".samples")
        sizes = w.node("Concat", [count, w.integers(node, "rest", constant.shape[1:])], w.inner(node, "shape"), node, ".shape", axis=0)
        own = w.node("Expand", [own, sizes], w.inner(node, "constants"), node, ".constants")
    w.node("Concat", [own, *node.inputs] if op.front else [*node.inputs, own], node.name, node, axis=axis)


def pad(w: Writer, node: Node, op: Pad) -> None:
    axes = w.spatial(node)
    pads = _pads(op.padding, axes)
    sides = w.integers(node, "pads", [0, 0, *pads[:axes], 0, 0, *pads[axes:]])
    w.node("Pad", [*node.inputs, sides, w.parameter(node, "value", op.value, ())], node.name, node, mode="constant")


def upsample(w: Writer, node: Node, op: Upsample) -> None:
    scales = w.constant(np.array([1, 1, *per_axis("factor", op.factor, w.spatial(node))], np.float32), f"{node.name}.scales")
    w.node("Resize", [*node.inputs, "", scales], node.name, node, mode="nearest", coordinate_transformation_mode="asymmetric",
           nearest_mode="floor")


def add(w: Writer, node: Node, op: Add) -> None:
    w.node("Add" if len(node.inputs) == 2 else "Sum", node.inputs, node.name, node)


def mul(w: Writer, node: Node, op: Mul) -> None:
    value = node.inputs[0]
    for i, other in enumerate(node.inputs[1:], 2):
        last = i == len(node.inputs)
        value = w.node("Mul", [value, other], node.name if last else w.inner(node, "product"), node, suffix="" if last else f".{i}")


def unflatten(w: Writer, node: Node, op: Unflatten) -> None:
    w.node("Reshape", [*node.inputs, w.integers(node, "shape", [0, *op.shape])], node.name, node)


def transpose(w: Writer, node: Node, op: Transpose) -> None:
    w.node("Transpose", node.inputs, node.name, node, perm=[0, *(a + 1 for a in op.axes)])


def slice_(w: Writer, node: Node, op: Slice) -> None:
    start, stop, _ = slice(op.start, op.stop).indices(w.graph.shapes[node.inputs[0]][0])
    bounds = [w.integers(node, name, [value]) for name, value in (("start", start), ("stop", stop), ("axes", 1))]
    w.node("Slice", [*node.inputs, *bounds], node.name, node)


def permute(w: Writer, node: Node, op: Permute) -> None:
    w.node("Gather", [*node.inputs, w.integers(node, "order", op.order)], node.name, node, axis=1)


def silu(w: Writer, node: Node, op: SiLU) -> None:
    gate = w.node("Sigmoid", node.inputs, w.inner(node, "sigmoid"), node, suffix=".sigmoid")
    w.node("Mul", [*node.inputs, gate], node.name, node)


def hard_swish(w: Writer, node: Node, op: HardSwish) -> None:
    if w.standard.version >= 14:
        w.node("HardSwish", node.inputs, node.name, node)
        return
    gate = w.node("HardSigmoid", node.inputs, w.inner(node, "gate"), node, suffix=".gate", alpha=1 / 6, beta=0.5)
    w.node("Mul", [*node.inputs, gate], node.name, node)


Step = Callable[[str, list[str | float], str], str]


def _steps(w: Writer, node: Node) -> Step:
    """Writes one of the operators that a node consists of, on tensors and numbers, under a name of its own."""
    def step(kind: str, inputs: list[str | float], name: str) -> str:
        given = [i if isinstance(i, str) else w.parameter(node, f"{name}_by", i, ()) for i in inputs]
        return w.node(kind, given, w.inner(node, name), node, f".{name}")
    return step


def _bell(step: Step, z: str, op: GELU) -> str:
    """``2 Phi(z)``, of which GELU is made, as exporters write it."""
    if op.approximate:
        cube = step("Mul", [step("Mul", [z, step("Mul", [z, z], "square")], "cube"), 0.044715], "small")
        curve = step("Tanh", [step("Mul", [step("Add", [z, cube], "sum"), math.sqrt(2 / math.pi)], "argument")], "curve")
    else:
        curve = step("Erf", [step("Div", [z, math.sqrt(2)], "argument")], "curve")
    return step("Add", [curve, 1.0], "more")


def gelu(w: Writer, node: Node, op: GELU) -> None:
    """In steps before opset 20."""
    if w.standard.version >= 20:
        w.node("Gelu", node.inputs, node.name, node, approximate="tanh" if op.approximate else "none")
        return
    (x,), step = node.inputs, _steps(w, node)
    w.node("Mul", [step("Mul", [x, _bell(step, x, op)], "twice"), w.parameter(node, "half", 0.5, ())], node.name, node)


def sloped(w: Writer, node: Node, op: Sloped) -> None:
    """The value times a curve of what it comes to with its slopes."""
    (x,), step, (channels, *space) = node.inputs, _steps(w, node), w.graph.shapes[node.name]
    slope = w.over_space(node, "slope", np.broadcast_to(op.slope, channels).reshape(channels, *(1 for _ in space)))
    z = step("Mul", [x, slope], "steeper")
    if isinstance(op.op, GELU):
        gate = step("Mul", [_bell(step, z, op.op), 0.5], "gate")
    elif isinstance(op.op, SiLU):
        gate = step("Sigmoid", [z], "gate")
    else:
        gate = w.node("HardSigmoid", [z], w.inner(node, "gate"), node, ".gate", alpha=1 / 6, beta=0.5)
    w.node("Mul", [x, gate], node.name, node)


def affine(w: Writer, node: Node, op: Affine) -> None:
    value = node.inputs[0]
    if (op.slope != 1).any():
        last = not op.shift.any()
        value = w.node("Mul", [value, w.over_space(node, "slope", op.slope)], node.name if last else w.inner(node, "scaled"), node,
                       suffix="" if last else ".mul")
    if op.shift.any() or (op.slope == 1).all():
        w.node("Add", [value, w.over_space(node, "shift", op.shift)], node.name, node)


def rearrange(w: Writer, node: Node, op: Rearrange) -> None:
    sizes = [n for part in op.split for n in part]
    order = [i for group in op.groups for i in group]
    split = w.node("Reshape", [*node.inputs, w.integers(node, "split", [0, *sizes])], w.inner(node, "split"), node, ".split")
    moved = w.node("Transpose", [split], w.inner(node, "moved"), node, ".move", perm=[0, *(i + 1 for i in order)])
    shape = op.output_shape(w.graph.shapes[node.inputs[0]])
    w.node("Reshape", [moved, w.integers(node, "shape", [0, *shape])], node.name, node)


def take(w: Writer, node: Node, op: Take) -> None:
    """As Slice where the entries are equally spaced."""
    axis = op.axis + 1
    steps = set(np.diff(op.indices).tolist())
    if len(op.indices) > 1 and len(steps) == 1 and 0 not in steps:
        (step,) = steps
        stop = op.indices[-1] + (1 if step > 0 else -1)
        ends = {"start": op.indices[0], "stop": stop if stop >= 0 else -(2**31), "axes": axis, "step": step}
        w.node("Slice", [*node.inputs, *(w.integers(node, name, [value]) for name, value in ends.items())], node.name, node)
    else:
        w.node("Gather", [*node.inputs, w.integers(node, "indices", op.indices)], node.name, node, axis=axis)


def softmax(w: Writer, node: Node, op: Softmax) -> None:
    """The mask is added before."""
    value, shape = node.inputs[0], w.graph.shapes[node.name]
    if op.mask is not None:
        value = w.node("Add", [value, w.over_space(node, "mask", op.numbers(shape))], w.inner(node, "masked"), node, ".mask")
    w.node("Softmax", [value], node.name, node, axis=op.axis)


def _by_head(w: Writer, node: Node, i: int, heads: Sequence[int], *, channels_last: bool) -> str:
    """Input ``i`` as ``(N, *heads, ..., T, channels)``, or with these two the other way round."""
    space, name = w.graph.shapes[node.inputs[i]][1:], "ab"[i]
    value = _split(w, node, i, [*heads, -1, *space])
    count, last = 1 + len(heads), len(heads) + len(space)
    order = [*range(count), *range(count + 1, last + 1), *((last + 1, count) if channels_last else (count, last + 1))]
    if order == sorted(order):
        return value
    value = w.node("Transpose", [value], w.inner(node, f"{name}.moved"), node, f".{name}.move", perm=order)
    return w.moved(node, value, i, f".{name}.moved")


def _split(w: Writer, node: Node, i: int, sizes: Sequence[int]) -> str:
    name = "ab"[i]
    shape = w.integers(node, f"{name}.split", [0, *sizes])
    value = w.node("Reshape", [node.inputs[i], shape], w.inner(node, f"{name}.heads"), node, f".{name}.heads")
    return w.moved(node, value, i, f".{name}.heads")


def _shared(op: Scores | Mix) -> tuple[list[int], list[int]]:
    """The axes of heads that both inputs of a product have: those that share keys or values have one of their own."""
    if op.heads == op.kv_heads:
        return [op.heads], [op.heads]
    return [op.kv_heads, op.heads // op.kv_heads], [op.kv_heads, 1]


def scores(w: Writer, node: Node, op: Scores) -> None:
    """Queries by tokens times keys by channels."""
    (ours, theirs), shape = _shared(op), w.graph.shapes[node.name]
    factors = [_by_head(w, node, 0, ours, channels_last=True), _by_head(w, node, 1, theirs, channels_last=False)]
    steps: list[tuple[str, str, list[str]]] = [("product", "MatMul", factors)]
    if len(ours) > 1:
        steps.append(("whole", "Reshape", [w.integers(node, "shape", [0, *shape])]))
    if op.scale != 1:
        steps.append(("scaled", "Mul", [w.parameter(node, "scale", op.scale, ())]))
    value: list[str] = []
    for i, (name, kind, others) in enumerate(steps, 1):
        last = i == len(steps)
        value = [w.node(kind, [*value, *others], node.name if last else w.inner(node, name), node, "" if last else f".{name}")]


def mix(w: Writer, node: Node, op: Mix) -> None:
    """Probabilities times values by tokens."""
    (ours, theirs), shape = _shared(op), w.graph.shapes[node.name]
    p = node.inputs[0] if len(ours) == 1 else _split(w, node, 0, [*ours, *w.graph.shapes[node.inputs[0]][1:]])
    made = w.node("MatMul", [p, _by_head(w, node, 1, theirs, channels_last=True)], w.inner(node, "product"), node, ".product")
    count, last = 1 + len(ours), len(ours) + len(shape)
    turned = w.node("Transpose", [made], w.inner(node, "moved"), node, ".move", perm=[*range(count), last, *range(count, last)])
    w.node("Reshape", [turned, w.integers(node, "shape", [0, *shape])], node.name, node)


def rotary(w: Writer, node: Node, op: Rotary) -> None:
    """Each channel times its cosine, plus the other one of its pair times its sine, which is negative for the first."""
    channels, *space = w.graph.shapes[node.name]
    cos, sin, partner = np.ones((channels, space[-1])), np.zeros((channels, space[-1])), np.arange(channels)
    first, second = op._pairs(channels)
    cos[first], cos[second], sin[first], sin[second] = op.cos, op.cos, -op.sin, op.sin
    partner[first], partner[second] = second, first
    shape = (channels, *(1 for _ in space[1:]), space[-1])
    mates = w.node("Gather", [*node.inputs, w.integers(node, "pairs", partner.tolist())], w.inner(node, "mates"), node, ".mates", axis=1)
    own = w.node("Mul", [*node.inputs, w.over_space(node, "cos", cos.reshape(shape))], w.inner(node, "own"), node, ".own")
    other = w.node("Mul", [mates, w.over_space(node, "sin", sin.reshape(shape))], w.inner(node, "other"), node, ".other")
    w.node("Add", [own, other], node.name, node)


WRITERS: dict[type[Op], Callable[[Writer, Node, Any], None]] = {
    Dense: dense, Conv: conv, ConvTranspose: conv_transpose, BatchNorm: batch_norm,
    LayerNorm: over_features("LayerNormalization", 17), RMSNorm: over_features("RMSNormalization", 23),
    GroupNorm: group_norm, InstanceNorm: instance_norm,
    Identity: _plain("Identity"), ReLU: _plain("Relu"), LeakyReLU: _plain("LeakyRelu", alpha=lambda op: op.slope), PReLU: prelu, Clip: clip,
    Abs: _plain("Abs"), MaxPool: _pool("MaxPool", 10), MinPool: min_pool, AvgPool: _pool("AveragePool", 19, "count_include_pad"),
    LpPool: _pool("LpPool", 18, "p"), GlobalAvgPool: _plain("GlobalAveragePool"),
    Pad: pad, Upsample: upsample, Blend: blend,
    Add: add, Sub: _plain("Sub"), Max: _plain("Max"), Min: _plain("Min"), Extend: extend,
    Concat: _plain("Concat", axis=lambda op: op.axis + 1), Flatten: _plain("Flatten", axis=lambda op: 1), Unflatten: unflatten,
    Transpose: transpose, Slice: slice_, Permute: permute, Rearrange: rearrange, Take: take,
    Sigmoid: _plain("Sigmoid"), HardSigmoid: _plain("HardSigmoid", alpha=lambda op: op.alpha, beta=lambda op: op.beta),
    Tanh: _plain("Tanh"), SiLU: silu, HardSwish: hard_swish, Erf: _plain("Erf"), GELU: gelu,
    Sloped: sloped,
    Softmax: softmax, Mul: mul, Scores: scores, Mix: mix, Rotary: rotary, Affine: affine,
}


class GraphWriter(Writer):
    """A writer of whole graphs, every value batch and channels first."""

    def write(self, node: Node) -> None:
        writer = WRITERS.get(type(node.op))
        if writer is None:
            remedy = ("use eqfact.onnx.save_qdq for a quantized network" if isinstance(node.op, FakeQuantize)
                      else "replace it, or remove it from the network")
            raise OnnxError(f"{self.path}: node '{node.name}': {type(node.op).__name__} has no ONNX counterpart here; {remedy}")
        writer(self, node, node.op)
