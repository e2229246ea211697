"""What is a network as people write it in PyTorch? A module with submodules, and a ``forward`` of plain functions between them.

:func:`to_torch` makes a ``torch.fx.GraphModule``: it runs, it shows its code, and ``torch.fx.symbolic_trace`` traces it again. Layers and
activations are submodules of ``torch.nn`` wherever there is one that computes the op; what moves, joins and multiplies values is written
with functions. An op at several nodes is one submodule that is called several times. PyTorch is imported when it is needed, not before.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from eqfact import ops
from eqfact.graph import Graph, Node, fresh_name
from eqfact.ops import Op, Shape
from eqfact.ops.base import along_channels, per_axis, per_side
from eqfact.ops.normalizing import Normalization

Sides = tuple[tuple[int, int], ...]


def to_torch(graph: Graph, dtype: str | None = None) -> Any:
    """The network as a ``torch.fx.GraphModule`` in eval mode, in its own floating type (float64 if it has no weights), or in ``dtype``.

    ``forward`` takes tensors ``(N, C, *spatial)``, as many as the network has inputs, under their names as far as Python allows them, and
    returns a tensor, or a tuple in the order of the outputs. It computes what :func:`eqfact.forward` computes, up to rounding. The fx node
    of a value has the value's name in the list ``meta["eqfact"]``. Raises :class:`TypeError` for an op that is none of ``eqfact.ops.ALL``.

    ::

        module = to_torch(net)
        module(torch.from_numpy(x))
    """
    return _Writer(graph, dtype).module()


class _Writer:
    """A module under construction: its submodules, its arrays, and the lines of ``forward`` so far."""

    def __init__(self, graph: Graph, dtype: str | None) -> None:
        import torch
        from torch import fx

        self.torch, self.nn, self.fx = torch, torch.nn, fx
        self.graph, self.root, self.lines = graph, torch.nn.Module(), fx.Graph()
        self.tracer = fx.proxy.GraphAppendingTracer(self.lines)
        self.dtype = getattr(torch, dtype or ("float64" if graph.dtype is None else graph.dtype.name))
        #: Values of ``forward`` by name; and by id of a shared op the name of its submodule.
        self.values: dict[str, Any] = {}
        self.submodules: dict[int, str] = {}
        self.taken: set[str] = set()

    def module(self) -> Any:
        for name in self.graph.inputs:
            self.values[name] = self.value(self.lines.placeholder(self.fresh(name)))
        for node in self.graph.nodes:
            write = WRITERS.get(type(node.op))
            if write is None:
                raise TypeError(f"node '{node.name}': {type(node.op).__name__} has no counterpart in PyTorch here")
            self.values[node.name] = write(self, node, node.op, *(self.values[i] for i in node.inputs))
        for name, value in self.values.items():
            value.node.meta.setdefault("eqfact", []).append(name)
        outputs = tuple(self.values[name].node for name in self.graph.outputs)
        self.lines.output(outputs if len(outputs) > 1 else outputs[0])
        module = self.fx.GraphModule(self.root, self.lines, "Network")
        return module.eval()

    def value(self, line: Any) -> Any:
        """What a line computes: whatever is done with it becomes another line."""
        return self.fx.Proxy(line, self.tracer)

    def fresh(self, name: str) -> str:
        """A name that Python takes for a variable, and that is not taken yet."""
        plain = re.sub(r"\W", "_", name)
        found = fresh_name(plain if plain.isidentifier() else f"_{plain}", self.taken)
        self.taken.add(found)
        return found

    def tensor(self, array: npt.ArrayLike) -> Any:
        """An array in the network's type, or of whole numbers."""
        array = np.array(array)  # a copy that may be written to
        return self.torch.from_numpy(array) if array.dtype == np.int64 else self.torch.from_numpy(array).to(self.dtype)

    def call(self, node: Node, make: Callable[[], Any], *inputs: Any, **parameters: npt.ArrayLike | None) -> Any:
        """The value of a submodule, which is made for the first node that has this op; ``parameters`` are its arrays."""
        name = self.submodules.get(id(node.op))
        if name is None:
            made = make().to(self.dtype)
            for key, array in parameters.items():
                if array is not None:
                    with self.torch.no_grad():
                        getattr(made, key).copy_(self.tensor(array))
            name = self.submodules[id(node.op)] = self.fresh(node.name)
            self.root.add_module(name, made)
        return self.value(self.lines.call_module(name, tuple(x.node for x in inputs)))

    def array(self, node: Node, name: str, array: npt.ArrayLike) -> Any:
        """The value of a buffer of the module."""
        name = self.fresh(f"{node.name}_{name}")
        self.root.register_buffer(name, self.tensor(array))
        return self.value(self.lines.get_attr(name))

    def shape(self, node: Node) -> Shape:
        """The shape ``(C, *spatial)`` of the first input."""
        return self.graph.shapes[node.inputs[0]]

    def sized(self, kind: str, node: Node) -> Any:
        """``nn.Conv2d`` and its like, for as many axes of space as the input has."""
        return getattr(self.nn, f"{kind}{len(self.shape(node)) - 1}d")

    def padded(self, x: Any, sides: Sides, value: float = 0.0) -> Any:
        """A value with entries around it; the last axis first, as ``nn.functional.pad`` wants them."""
        flat = [n for side in reversed(sides) for n in side]
        return self.nn.functional.pad(x, flat, value=value) if any(flat) else x


# ---------------------------------------------------------------------------------------------------------------
# Weighted


def dense(w: _Writer, node: Node, op: ops.Dense, x: Any) -> Any:
    out, read = op.weight.shape
    return w.call(node, lambda: w.nn.Linear(read, out, op.bias is not None), x, weight=op.weight, bias=op.bias)


def conv(w: _Writer, node: Node, op: ops.Conv, x: Any) -> Any:
    axes = op.weight.ndim - 2
    sides = per_side(op.padding, axes)
    own = _symmetric(sides)
    channels = op.weight.shape[1] * op.groups

    def make() -> Any:
        return w.sized("Conv", node)(channels, len(op.weight), op.weight.shape[2:], per_axis("stride", op.stride, axes), own or 0,
                                     per_axis("dilation", op.dilation, axes), op.groups, op.bias is not None)

    return w.call(node, make, x if own else w.padded(x, sides), weight=op.weight, bias=op.bias)


def conv_transpose(w: _Writer, node: Node, op: ops.ConvTranspose, x: Any) -> Any:
    """PyTorch crops both ends alike; where they differ, the whole is made and cropped behind."""
    axes = op.weight.ndim - 2
    sides = per_side(op.padding, axes)
    own = _symmetric(sides)
    channels, extra = op.weight.shape[1] * op.groups, per_axis("output_padding", op.output_padding, axes)

    def make() -> Any:
        return w.sized("ConvTranspose", node)(channels, len(op.weight), op.weight.shape[2:], per_axis("stride", op.stride, axes), own or 0,
                                              extra, op.groups, op.bias is not None, per_axis("dilation", op.dilation, axes))

    y = w.call(node, make, x, weight=op._adjoint(), bias=op.bias)
    sizes = w.graph.shapes[node.name][1:]
    return y if own else y[(slice(None), slice(None), *(slice(before, before + n) for n, (before, _) in zip(sizes, sides, strict=True)))]


def batch_norm(w: _Writer, node: Node, op: ops.BatchNorm, x: Any) -> Any:
    kind = getattr(w.nn, f"BatchNorm{max(1, len(w.shape(node)) - 1)}d")
    return w.call(node, lambda: kind(len(op.gamma), op.eps), x, weight=op.gamma, bias=op.beta, running_mean=op.mean, running_var=op.var)


def layer_norm(w: _Writer, node: Node, op: ops.LayerNorm, x: Any) -> Any:
    channels, beta = len(op.gamma), np.zeros_like(op.gamma) if op.beta is None else op.beta
    y = w.call(node, lambda: w.nn.LayerNorm(channels, float(np.max(op.eps))), _last(w, x), weight=op.gamma, bias=beta)
    return _second(w, y)


def rms_norm(w: _Writer, node: Node, op: ops.RMSNorm, x: Any) -> Any:
    y = _second(w, w.call(node, lambda: w.nn.RMSNorm(len(op.gamma), float(np.max(op.eps))), _last(w, x), weight=op.gamma))
    return y if op.beta is None else y + w.array(node, "beta", along_channels(op.beta, len(w.shape(node))))


def group_norm(w: _Writer, node: Node, op: ops.GroupNorm | ops.InstanceNorm, x: Any) -> Any:
    """PyTorch's own, with one eps and more than one entry to be normalised; else step by step."""
    channels, *sizes = w.shape(node)
    beta = np.zeros_like(op.gamma) if op.beta is None else op.beta
    if not isinstance(op.eps, float) or channels // op.norm_groups * math.prod(sizes) == 1:
        return _normalized(w, node, op, x)
    if isinstance(op, ops.InstanceNorm):
        return w.call(node, lambda: w.sized("InstanceNorm", node)(channels, op.eps, affine=True), x, weight=op.gamma, bias=beta)
    return w.call(node, lambda: w.nn.GroupNorm(op.norm_groups, channels, op.eps), x, weight=op.gamma, bias=beta)


def _normalized(w: _Writer, node: Node, op: Normalization, x: Any) -> Any:
    axes = len(w.shape(node))
    grouped = x.unflatten(1, (op.norm_groups, -1))
    over = tuple(range(2, axes + 2))
    centred = grouped - grouped.mean(over, keepdim=True)
    eps = w.array(node, "eps", np.broadcast_to(op.eps, op.norm_groups).reshape(-1, *(1,) * axes))
    y = (centred / w.torch.sqrt((centred * centred).mean(over, keepdim=True) + eps)).flatten(1, 2)
    y = y * w.array(node, "gamma", along_channels(op.gamma, axes))
    return y if op.beta is None else y + w.array(node, "beta", along_channels(op.beta, axes))


def _last(w: _Writer, x: Any) -> Any:
    return w.torch.movedim(x, 1, -1)


def _second(w: _Writer, x: Any) -> Any:
    return w.torch.movedim(x, -1, 1)


def _symmetric(sides: Sides) -> tuple[int, ...] | None:
    """One number an axis, if both ends are padded alike."""
    return tuple(before for before, _ in sides) if all(before == after for before, after in sides) else None


# ---------------------------------------------------------------------------------------------------------------
# Entry by entry


def _activation(make: Callable[[Any, Any], Callable[[], Any]]) -> Callable[[_Writer, Node, Any, Any], Any]:
    """A writer of a submodule without arrays."""
    return lambda w, node, op, x: w.call(node, make(w.nn, op), x)


def prelu(w: _Writer, node: Node, op: ops.PReLU, x: Any) -> Any:
    return w.call(node, lambda: w.nn.PReLU(op.slope.size), x, weight=op.slope.reshape(-1))


def clip(w: _Writer, node: Node, op: ops.Clip, x: Any) -> Any:
    if isinstance(op.low, float) and isinstance(op.high, float):
        low, high = op.low, op.high
        if (low, high) == (0, 6):
            return w.call(node, w.nn.ReLU6, x)
        if math.isfinite(low) and math.isfinite(high) and low < high:
            return w.call(node, lambda: w.nn.Hardtanh(low, high), x)
        return w.torch.clamp(x, low, high)
    bounds = (np.broadcast_to(bound, max(np.size(op.low), np.size(op.high))) for bound in (op.low, op.high))
    return w.torch.clamp(x, *(w.array(node, name, along_channels(bound, len(w.shape(node))))
                              for name, bound in zip(("low", "high"), bounds, strict=True)))


def affine(w: _Writer, node: Node, op: ops.Affine, x: Any) -> Any:
    return x * w.array(node, "slope", op.slope) + w.array(node, "shift", op.shift)


def hard_sigmoid(w: _Writer, node: Node, op: ops.HardSigmoid, x: Any) -> Any:
    if (op.alpha, op.beta) == (1 / 6, 0.5):
        return w.call(node, w.nn.Hardsigmoid, x)
    return w.torch.clamp(x * op.alpha + op.beta, 0, 1)


def sloped(w: _Writer, node: Node, op: ops.Sloped, x: Any) -> Any:
    slope = w.array(node, "slope", along_channels(np.atleast_1d(op.slope), len(w.shape(node))))
    return WRITERS[type(op.op)](w, replace(node, op=op.op), op.op, x * slope) / slope


def softmax(w: _Writer, node: Node, op: ops.Softmax, x: Any) -> Any:
    if op.mask is not None:
        x = x + w.array(node, "mask", op.numbers(w.shape(node)))
    return w.call(node, lambda: w.nn.Softmax(op.axis), x)


# ---------------------------------------------------------------------------------------------------------------
# Over space


def _geometry(w: _Writer, node: Node, op: Any) -> tuple[Shape, Shape, Sides, Shape]:
    axes = len(w.shape(node)) - 1
    kernel = per_axis("kernel", op.kernel, axes)
    return (kernel, kernel if op.stride is None else per_axis("stride", op.stride, axes), per_side(op.padding, axes),
            per_axis("dilation", op.dilation, axes))


def _held(sides: Sides, kernel: Shape) -> tuple[int, ...] | None:
    """The padding, if PyTorch's pools take it: both ends alike, and at most half a window."""
    own = _symmetric(sides)
    return own if own is not None and all(2 * n <= k for n, k in zip(own, kernel, strict=True)) else None


def max_pool(w: _Writer, node: Node, op: ops.MaxPool | ops.MinPool, x: Any) -> Any:
    kernel, stride, sides, dilation = _geometry(w, node, op)
    own = _held(sides, kernel)
    x = x if own else w.padded(x, sides, -math.inf)
    return w.call(node, lambda: w.sized("MaxPool", node)(kernel, stride, own or 0, dilation), x)


def min_pool(w: _Writer, node: Node, op: ops.MinPool, x: Any) -> Any:
    return -max_pool(w, node, op, -x)


def avg_pool(w: _Writer, node: Node, op: ops.AvgPool, x: Any) -> Any:
    kernel, stride, sides, dilation = _geometry(w, node, op)
    own = _held(sides, kernel)
    if set(dilation) == {1} and (own or op.count_include_pad):
        x = x if own else w.padded(x, sides)
        return w.call(node, lambda: w.sized("AvgPool", node)(kernel, stride, own or 0, count_include_pad=op.count_include_pad), x)
    counts = op._counts(np.empty((1, *w.shape(node))))  # channel-last, as eqfact counts
    if counts.ndim:
        counts = np.moveaxis(counts, -1, 1)
    return sum(_taps(w, node, op, x)) / w.array(node, "counts", counts)


def lp_pool(w: _Writer, node: Node, op: ops.LpPool, x: Any) -> Any:
    """PyTorch's takes powers of the entries themselves, not of their magnitudes."""
    kernel, stride, sides, dilation = _geometry(w, node, op)
    x = w.torch.abs(x)
    if set(dilation) == {1}:
        window = (kernel, stride) if len(kernel) > 1 else (kernel[0], stride[0])
        return w.call(node, lambda: w.sized("LPPool", node)(op.p, *window), w.padded(x, sides))
    return sum(tap**op.p for tap in _taps(w, node, op, x)) ** (1 / op.p)


def _taps(w: _Writer, node: Node, op: Any, x: Any) -> list[Any]:
    """For each tap of the window the entries that it meets."""
    kernel, stride, sides, dilation = _geometry(w, node, op)
    x, sizes = w.padded(x, sides), w.graph.shapes[node.name][1:]
    return [x[(slice(None), slice(None), *(slice(t * d, t * d + (n - 1) * s + 1, s)
                                           for t, d, n, s in zip(tap, dilation, sizes, stride, strict=True)))]
            for tap in itertools.product(*map(range, kernel))]


def global_avg_pool(w: _Writer, node: Node, op: ops.GlobalAvgPool, x: Any) -> Any:
    return w.call(node, lambda: w.sized("AdaptiveAvgPool", node)(1), x)


def pad(w: _Writer, node: Node, op: ops.Pad, x: Any) -> Any:
    return w.padded(x, per_side(op.padding, len(w.shape(node)) - 1), op.value)


def upsample(w: _Writer, node: Node, op: ops.Upsample, x: Any) -> Any:
    factors = per_axis("factor", op.factor, len(w.shape(node)) - 1)
    if all(k & (k - 1) == 0 for k in factors):  # then no rounding of its positions can choose another pixel
        return w.call(node, lambda: w.nn.Upsample(scale_factor=tuple(map(float, factors)), mode="nearest"), x)
    for axis, k in enumerate(factors, 2):
        x = w.torch.repeat_interleave(x, k, axis)
    return x


def blend(w: _Writer, node: Node, op: ops.Blend, x: Any) -> Any:
    y = w.torch.matmul(w.torch.movedim(x, op.axis + 1, -1), w.array(node, "matrix", op.matrix.T))
    return w.torch.movedim(y, -1, op.axis + 1)


# ---------------------------------------------------------------------------------------------------------------
# Joined and moved


def _folded(join: Callable[[_Writer, Any, Any], Any]) -> Callable[..., Any]:
    """A writer of a function of two values, one after the other."""
    def write(w: _Writer, node: Node, op: Op, *inputs: Any) -> Any:
        y = inputs[0]
        for x in inputs[1:]:
            y = join(w, y, x)
        return y
    return write


def concat(w: _Writer, node: Node, op: ops.Concat, *inputs: Any) -> Any:
    return w.torch.cat(inputs, op.axis + 1)


def extend(w: _Writer, node: Node, op: ops.Extend, x: Any) -> Any:
    """The constant is a parameter, as class tokens are: torch.fx takes a buffer for a tensor already, which no traced size expands."""
    name = w.fresh(f"{node.name}_constant")
    w.root.register_parameter(name, w.nn.Parameter(w.tensor(op.constant)))
    own = w.value(w.lines.get_attr(name)).expand(x.shape[0], *op.constant.shape)
    return w.torch.cat((own, x) if op.front else (x, own), op.axis + 1)


def transpose(w: _Writer, node: Node, op: ops.Transpose, x: Any) -> Any:
    return x.permute(0, *(a + 1 for a in op.axes))


def slice_(w: _Writer, node: Node, op: ops.Slice, x: Any) -> Any:
    return x[:, op.start:op.stop]


def _chosen(w: _Writer, node: Node, x: Any, indices: Sequence[int], axis: int = 0) -> Any:
    return w.torch.index_select(x, axis + 1, w.array(node, "indices", np.array(indices, np.int64)))


def permute(w: _Writer, node: Node, op: ops.Permute, x: Any) -> Any:
    return _chosen(w, node, x, op.order)


def take(w: _Writer, node: Node, op: ops.Take, x: Any) -> Any:
    return _chosen(w, node, x, op.indices, op.axis)


def rearrange(w: _Writer, node: Node, op: ops.Rearrange, x: Any) -> Any:
    order = itertools.chain(*op.groups)
    split = x.reshape(-1, *itertools.chain(*op.split))
    return split.permute(0, *(i + 1 for i in order)).reshape(-1, *w.graph.shapes[node.name])


# ---------------------------------------------------------------------------------------------------------------
# Attention


def _by_head(w: _Writer, x: Any, kv_heads: int, repeated: int) -> Any:
    """``(N, heads * width, ..., T)`` as ``(N, kv_heads, repeated, ..., T, width)``."""
    return w.torch.movedim(x.unflatten(1, (kv_heads, repeated, -1)), 3, -1)


def scores(w: _Writer, node: Node, op: ops.Scores, q: Any, k: Any) -> Any:
    of_q, of_k = _by_head(w, q, op.kv_heads, op.heads // op.kv_heads), _by_head(w, k, op.kv_heads, 1)
    return (w.torch.matmul(of_q, of_k.transpose(-1, -2)) * op.scale).flatten(1, 2)


def mix(w: _Writer, node: Node, op: ops.Mix, p: Any, v: Any) -> Any:
    of_p = p.unflatten(1, (op.kv_heads, op.heads // op.kv_heads))
    return w.torch.movedim(w.torch.matmul(of_p, _by_head(w, v, op.kv_heads, 1)), -1, 3).flatten(1, 3)


def rotary(w: _Writer, node: Node, op: ops.Rotary, x: Any) -> Any:
    channels, *sizes = w.shape(node)
    first, second = op._pairs(channels)
    mates, cos, sin = np.arange(channels), np.ones((channels, sizes[-1])), np.zeros((channels, sizes[-1]))
    mates[first], mates[second] = second, first
    cos[first] = cos[second] = op.cos
    sin[first], sin[second] = -op.sin, op.sin
    shape = (channels, *(1 for _ in sizes[1:]), sizes[-1])
    return x * w.array(node, "cos", cos.reshape(shape)) + _chosen(w, node, x, mates.tolist()) * w.array(node, "sin", sin.reshape(shape))


#: How each op is written.
WRITERS: dict[type[Op], Callable[..., Any]] = {
    ops.Dense: dense, ops.Conv: conv, ops.ConvTranspose: conv_transpose, ops.BatchNorm: batch_norm,
    ops.LayerNorm: layer_norm, ops.RMSNorm: rms_norm, ops.GroupNorm: group_norm, ops.InstanceNorm: group_norm,
    ops.Identity: _activation(lambda nn, op: nn.Identity), ops.ReLU: _activation(lambda nn, op: nn.ReLU),
    ops.Abs: lambda w, node, op, x: w.torch.abs(x), ops.Erf: lambda w, node, op, x: w.torch.erf(x),
    ops.LeakyReLU: _activation(lambda nn, op: lambda: nn.LeakyReLU(op.slope)), ops.PReLU: prelu, ops.Clip: clip, ops.Affine: affine,
    ops.MaxPool: max_pool, ops.MinPool: min_pool, ops.AvgPool: avg_pool, ops.LpPool: lp_pool, ops.GlobalAvgPool: global_avg_pool,
    ops.Pad: pad, ops.Upsample: upsample, ops.Blend: blend,
    ops.Add: _folded(lambda w, x, y: x + y), ops.Sub: _folded(lambda w, x, y: x - y), ops.Mul: _folded(lambda w, x, y: x * y),
    ops.Max: _folded(lambda w, x, y: w.torch.maximum(x, y)), ops.Min: _folded(lambda w, x, y: w.torch.minimum(x, y)),
    ops.Concat: concat, ops.Extend: extend, ops.Flatten: _activation(lambda nn, op: nn.Flatten),
    ops.Unflatten: _activation(lambda nn, op: lambda: nn.Unflatten(1, op.shape)),
    ops.Transpose: transpose, ops.Slice: slice_, ops.Permute: permute, ops.Rearrange: rearrange, ops.Take: take,
    ops.Sigmoid: _activation(lambda nn, op: nn.Sigmoid), ops.HardSigmoid: hard_sigmoid, ops.Tanh: _activation(lambda nn, op: nn.Tanh),
    ops.SiLU: _activation(lambda nn, op: nn.SiLU), ops.HardSwish: _activation(lambda nn, op: nn.Hardswish),
    ops.GELU: _activation(lambda nn, op: lambda: nn.GELU("tanh" if op.approximate else "none")),
    ops.Sloped: sloped, ops.Softmax: softmax, ops.Scores: scores, ops.Mix: mix, ops.Rotary: rotary,
}
