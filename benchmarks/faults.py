"""Which cases of the conformance kit find which bug? Planted faults, and the matrix of what kills them: `python -m benchmarks faults`.

A fault is a small change of the adapter of eqfact itself, that repeats a bug of a real implementation. It is planted in this
process while a question is answered, and gone when the answer is judged. Writes docs/faults-killed.md.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from eqfact import accumulators, blocks, calibration, folding, methods, noise, ops, rules
from eqfact.equalization import equalize
from eqfact.factorization import Factorization
from eqfact.graph import Graph, values
from eqfact.ops import blocking, grid
from eqfact.ops.base import Trace, along_channels
from eqfact.quantizers import FakeQuantize, UniformQuantizer
from eqfact.testing import adapter
from eqfact.testing.cases import LEVELS, all_cases
from eqfact.testing.cases.case import Case
from eqfact.testing.runner import judged

PAGE = Path(__file__).parents[1] / "docs" / "faults-killed.md"

Plant = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class Fault:
    """A wrong adapter: at which level it is wrong, what it does, which bug that repeats, and how it is planted."""

    level: int
    name: str
    repeats: str
    plant: Plant


# ------------------------------------------------------------------------------------------------ how faults are planted


def patched(target: Any, name: str, wrong: Callable[..., Any]) -> Plant:
    """``wrong(original, *arguments)`` in the place of a function or a method."""
    original = target.__dict__[name] if isinstance(target, type) and name in target.__dict__ else getattr(target, name)

    def call(*args: Any, **options: Any) -> Any:
        return wrong(original, *args, **options)

    return lambda: mock.patch.object(target, name, call)


def forward(op: type, wrong: Callable[..., Any]) -> Plant:
    """``wrong(original, op, *inputs)`` in the place of an op's forward pass."""
    return patched(op, "forward", wrong)


def with_op(op: type, change: Callable[[Any], Any]) -> Plant:
    """The op, read from a question as another one."""
    def wrong(original: Callable[[Any], Graph], code: Any) -> Graph:
        graph = original(code)
        done = {id(node.op): change(node.op) for node in graph.nodes if type(node.op) is op}
        return graph.with_ops({node.name: done[id(node.op)] for node in graph.nodes if id(node.op) in done})

    return patched(adapter, "network_of", wrong)


def asked(ask: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Plant:
    """Another question than was asked."""
    original = adapter.ASKS[ask]
    return lambda: mock.patch.dict(adapter.ASKS, {ask: lambda **question: original(**change(question))})


def answered(ask: str, change: Callable[..., dict[str, Any]]) -> Plant:
    """Another answer than was found; ``change(answer, **question)``."""
    original = adapter.ASKS[ask]
    return lambda: mock.patch.dict(adapter.ASKS, {ask: lambda **question: change(original(**question), **question)})


def array(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A change of an array as one of its JSON."""
    return lambda code: adapter.array_json(change(adapter.array_of(code)))


def rescaled(op: type, change: Callable[..., Any]) -> Plant:
    """``change(right, op, f_out, *f_in)`` of what an op becomes when it is rescaled."""
    return patched(op, "rescale", lambda original, self, f_out, *f_in: change(original(self, f_out, *f_in), self, f_out, *f_in))


def _flipped(self: Any) -> Any:
    return replace(self, weight=np.flip(self.weight, tuple(range(2, self.weight.ndim))))


def _exchanged(op: Any) -> Any:
    """The weights of a transposed convolution taken for (in, out / groups), where that fits."""
    out, inner, *kernel = op.weight.shape
    if out // op.groups != inner:
        return op
    swapped = op.weight.reshape(op.groups, inner, inner, *kernel).swapaxes(1, 2)
    return replace(op, weight=swapped.reshape(op.weight.shape))


def _interleaved(original: Any, self: Any, x: Any) -> Any:
    groups = getattr(self, "groups", 1) if not isinstance(self, ops.GroupNorm) else self.norm_groups
    order = np.arange(x.shape[1]).reshape(-1, groups).T.reshape(-1)
    return original(self, x[:, order])


def _reversed_axes(value: Any) -> Any:
    return value[::-1] if isinstance(value, tuple) else value


def _sides(padding: Any) -> Any:
    return padding if isinstance(padding, int) else tuple(p if isinstance(p, int) else p[::-1] for p in padding)


def _permuted(self: Any) -> Any:
    return replace(self, order=tuple(np.argsort(self.order).tolist()))


def _wrong_slope_axis(original: Any, self: Any, x: Any) -> Any:
    slope = np.broadcast_to(self.slope, x.shape[-1]) if len(self.slope) in (1, x.shape[-1]) else np.resize(self.slope, x.shape[-1])
    return np.where(x > 0, x, x * slope.astype(x.dtype))


def _over_space(original: Any, self: Any, x: Any) -> Any:
    axes = tuple(range(1, x.ndim))
    centred = x - x.mean(axis=axes, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(axis=axes, keepdims=True) + self.eps)
    y = y * along_channels(self.gamma, x.ndim - 1)
    return (y if self.beta is None else y + along_channels(self.beta, x.ndim - 1)).astype(x.dtype)


def _sample_variance(original: Any, self: Any, x: Any) -> Any:
    c = x.shape[1]
    y = original(replace(self, beta=None), x) * np.sqrt((c - 1) / c).astype(x.dtype)
    return y if self.beta is None else y + along_channels(self.beta, x.ndim - 1)


def _padded(original: Any, self: Any, x: Any) -> Any:
    padding = [(0, 0), (0, 0), *((p, p) if isinstance(p, int) else p for p in (
        [self.padding] * (x.ndim - 2) if isinstance(self.padding, int) else self.padding))]
    return original(replace(self, padding=0), np.pad(x, padding))


def _tiled(original: Any, self: Any, x: Any) -> Any:
    factor = np.broadcast_to(self.factor, x.ndim - 2).tolist()
    return np.tile(x, (1, 1, *factor))


def _first_two(original: Any, self: Any, *inputs: Any) -> Any:
    return original(self, *inputs[:2])


def _channel_last(original: Any, self: Any, x: Any) -> Any:
    return np.moveaxis(x, 1, -1).reshape(len(x), -1)


def _repeated_in_turn(original: Any, self: Any, of_kv: Any) -> Any:
    return np.tile(of_kv.reshape(self.kv_heads, -1), (self.heads // self.kv_heads, 1))


def _by_kv_head_in_turn(original: Any, self: Any, x: Any, heads: int) -> Any:
    if heads == self.kv_heads:
        return original(self, x, heads)
    width = x.shape[1] // heads
    order = np.arange(heads).reshape(-1, self.kv_heads).T.reshape(-1)
    return original(self, x.reshape(len(x), heads, width, *x.shape[2:])[:, order].reshape(x.shape), heads)


def _closed(op: Any) -> Any:
    """Open sides of a clip closed."""
    low, high = (np.where(np.isinf(bound), np.sign(bound) * 0.375, bound) for bound in (op.low, op.high))
    return replace(op, low=low if low.ndim else float(low), high=high if high.ndim else float(high))


def _ceiled(original: Any, self: Any, x: Any) -> Any:
    """Windows that begin inside, and end outside."""
    if self.padding != 0 or self.stride is not None:
        return original(self, x)
    return original(self, np.pad(x, [(0, 0), (0, 0), *[(0, 1)] * (x.ndim - 2)], constant_values=-np.inf))


ANSWER = adapter.answer


def _never_refuses(question: dict[str, Any]) -> dict[str, Any]:
    found = ANSWER(question)
    if "refused" in found.get("answer", {}):
        return {"id": question["id"], "answer": {"outputs": {}, "network": {}, "scale": 1.0}}
    return found


def NEVER_REFUSES() -> contextlib.AbstractContextManager[Any]:
    """An adapter that answers whatever it is asked."""
    return mock.patch.object(adapter, "answer", _never_refuses)


LEVEL_0 = [
    Fault(0, "transposed weight", "Dense with (in, out), as Keras has it",
          with_op(ops.Dense, lambda op: replace(op, weight=op.weight.T.copy())
          if op.weight.shape[0] == op.weight.shape[1] else op)),
    Fault(0, "bias left out", "a bias that an importer drops", with_op(ops.Conv, lambda op: replace(op, bias=None))),
    Fault(0, "axes of a transposed convolution", "torch.ao: (in, out / groups) taken for (out, in / groups)",
          with_op(ops.ConvTranspose, _exchanged)),
    Fault(0, "kernel turned round", "convolution for correlation", with_op(ops.Conv, _flipped)),
    Fault(0, "kernel of a transposed convolution turned round", "the same, transposed", with_op(ops.ConvTranspose, _flipped)),
    Fault(0, "sides of padding exchanged", "TensorFlow's SAME", with_op(ops.Conv, lambda op: replace(op, padding=_sides(op.padding)))),
    Fault(0, "strides exchanged", "(x, y) for (y, x)", with_op(ops.Conv, lambda op: replace(op, stride=_reversed_axes(op.stride)))),
    Fault(0, "dilation forgotten", "an attribute that is not read", with_op(ops.ConvTranspose, lambda op: replace(op, dilation=1))),
    Fault(0, "groups interleaved", "channel i in group i mod groups", patched(ops.Conv, "forward", lambda original, self, x: _interleaved(
        original, self, x) if 1 < self.groups < x.shape[1] else original(self, x))),
    Fault(0, "output_padding on the wrong side", "ONNX's output_shape", forward(ops.ConvTranspose, lambda original, self, x: np.roll(
        original(self, x), 1, axis=2) if np.any(self.output_padding) else original(self, x))),
    Fault(0, "eps outside the root", "sqrt(var) + eps", patched(ops.BatchNorm, "forward", lambda original, self, x: original(
        replace(self, var=(np.sqrt(self.var) + self.eps)**2, eps=0.0), x))),
    Fault(0, "another framework's eps", "1e-3 for 1e-5", with_op(ops.BatchNorm,
                                                                 lambda op: replace(op, eps=1e-3) if op.eps == 1e-5 else op)),
    Fault(0, "sample variance", "n - 1 in a LayerNorm", forward(ops.LayerNorm, _sample_variance)),
    Fault(0, "LayerNorm over space", "normalized_shape of all axes", forward(ops.LayerNorm, _over_space)),
    Fault(0, "RMSNorm with mean", "taken for LayerNorm", with_op(ops.RMSNorm, lambda op: ops.LayerNorm(op.gamma, op.beta, op.eps))),
    Fault(0, "groups of a norm interleaved", "channel shuffle inside GroupNorm", forward(ops.GroupNorm, _interleaved)),
    Fault(0, "InstanceNorm over channels", "taken for GroupNorm(1)",
          with_op(ops.InstanceNorm, lambda op: ops.GroupNorm(1, op.gamma, op.beta, op.eps))),
    Fault(0, "LeakyReLU as a maximum", "max(x, slope x)", forward(ops.LeakyReLU, lambda original, self,
                                                                  x: np.maximum(x, x * x.dtype.type(self.slope)))),
    Fault(0, "slopes along the last axis", "numpy's broadcasting", forward(ops.PReLU, _wrong_slope_axis)),
    Fault(0, "ReLU6 taken for ReLU", "AIMET, brevitas: before equalization", with_op(ops.Clip, lambda op: replace(op, high=np.inf))),
    Fault(0, "Abs taken for ReLU", "a fall-through", with_op(ops.Abs, lambda op: ops.ReLU())),
    Fault(0, "zeros in the padding of a maximum", "np.pad before the pool", forward(ops.MaxPool, _padded)),
    Fault(0, "MinPool taken for MaxPool", "a sign lost", with_op(ops.MinPool, lambda op: ops.MaxPool(
        op.kernel, stride=op.stride, padding=op.padding, dilation=op.dilation))),
    Fault(0, "padding counted", "count_include_pad ignored", with_op(ops.AvgPool, lambda op: replace(op, count_include_pad=True))),
    Fault(0, "padding not counted", "ONNX's default for PyTorch's", with_op(ops.AvgPool, lambda op: replace(op, count_include_pad=False))),
    Fault(0, "signs kept in a norm", "x^p for |x|^p", forward(ops.LpPool, lambda original, self, x: original(self, np.maximum(x, 0)))),
    Fault(0, "a sum for a mean", "ReduceSum", forward(ops.GlobalAvgPool, lambda original, self,
                                                      x: x.sum(axis=tuple(range(2, x.ndim)), keepdims=True))),
    Fault(0, "axes of padding reversed", "PyTorch's F.pad", with_op(ops.Pad, lambda op: replace(op, padding=_reversed_axes(op.padding)))),
    Fault(0, "padding's constant forgotten", "an optional input", with_op(ops.Pad, lambda op: replace(op, value=0.0))),
    Fault(0, "tiles for repeats", "np.tile", forward(ops.Upsample, _tiled)),
    Fault(0, "matrix of space transposed", "x @ M for M @ x", with_op(ops.Blend, lambda op: replace(op, matrix=op.matrix.T.copy())
          if op.matrix.shape[0] == op.matrix.shape[1] else op)),
    Fault(0, "third summand forgotten", "variadic Sum", forward(ops.Add, _first_two)),
    Fault(0, "third of a maximum forgotten", "variadic Max", forward(ops.Max, _first_two)),
    Fault(0, "difference turned round", "the side of a constant", forward(ops.Sub, lambda original, self, a, b: original(self, b, a))),
    Fault(0, "Min taken for Max", "a fall-through", with_op(ops.Min, lambda op: ops.Max())),
    Fault(0, "Mul taken for Add", "a fall-through", with_op(ops.Mul, lambda op: ops.Add())),
    Fault(0, "concat reversed", "a stack of branches", forward(ops.Concat, lambda original, self, *inputs: original(self, *inputs[::-1]))),
    Fault(0, "constant behind for in front", "a class token's place", with_op(ops.Extend, lambda op: replace(op, front=False))),
    Fault(0, "flatten channel-last", "TensorFlow's order; the authors' script", forward(ops.Flatten, _channel_last)),
    Fault(0, "transpose's inverse", "perm for its inverse", with_op(ops.Transpose,
                                                                    lambda op: replace(op, axes=tuple(np.argsort(op.axes).tolist())))),
    Fault(0, "permutation's inverse", "argsort for the order", with_op(ops.Permute, _permuted)),
    Fault(0, "negative starts", "-2 taken for 0", forward(ops.Slice, lambda original, self, x: original(
        replace(self, start=0, stop=self.stop - self.start) if self.start < 0 else self, x))),
    Fault(0, "indices sorted", "np.unique in Gather", forward(ops.Take, lambda original, self, x: original(
        replace(self, indices=tuple(sorted(self.indices))), x))),
    Fault(0, "softmax over the last axis", "a default of another opset", with_op(ops.Softmax, lambda op: replace(op, axis=-1))),
    Fault(0, "the mask left out", "attention that looks ahead", with_op(ops.Softmax, lambda op: replace(op, mask=None))),
    Fault(0, "GELU by tanh", "approximate ignored", with_op(ops.GELU, lambda op: ops.GELU(approximate=True))),
    Fault(0, "GELU exact", "approximate ignored", with_op(ops.GELU, lambda op: ops.GELU())),
    Fault(0, "HardSigmoid of PyTorch", "alpha = 1/6", with_op(ops.HardSigmoid, lambda op: replace(op, alpha=1 / 6))),
    Fault(0, "HardSwish as SiLU", "a smooth curve for a hard one", with_op(ops.HardSwish, lambda op: ops.SiLU())),
    Fault(0, "Sigmoid as HardSigmoid", "the other way round", with_op(ops.Sigmoid, lambda op: ops.HardSigmoid())),
    Fault(0, "slope outside", "slope * op(x)", forward(blocking.Sloped, lambda original, self, x: self.op.forward(x) * along_channels(
        np.atleast_1d(np.asarray(self.slope)).astype(x.dtype), x.ndim - 1))),
    Fault(0, "scale of scores left out", "attention without 1 / sqrt(d)", with_op(ops.Scores, lambda op: replace(op, scale=1.0))),
    Fault(0, "heads repeated in turn", "tile for repeat_interleave", patched(ops.Scores.__mro__[1], "_by_kv_head", _by_kv_head_in_turn)),
    Fault(0, "rotary halves for neighbours", "LLaMA's two layouts", with_op(ops.Rotary, lambda op: replace(op, interleaved=False))),
    Fault(0, "rotary turned back", "the sign of the angle", with_op(ops.Rotary, lambda op: replace(op, sin=-op.sin))),
    Fault(0, "bias of a dense layer left out", "an optional input", with_op(ops.Dense, lambda op: replace(op, bias=None))),
    Fault(0, "ReLU left out", "fused into nothing", with_op(ops.ReLU, lambda op: ops.Identity())),
    Fault(0, "slope on the wrong side", "x > 0 for x < 0", forward(ops.LeakyReLU, lambda original, self, x: -original(self, -x))),
    Fault(0, "one slope for the first channel", "a list of one", forward(ops.PReLU, lambda original, self, x: original(replace(
        self, slope=np.r_[self.slope, np.zeros(x.shape[1] - 1)].astype(x.dtype)) if len(self.slope) == 1 else self, x))),
    Fault(0, "one slope for all channels", "the first of a list", with_op(ops.PReLU, lambda op: replace(op, slope=op.slope[:1]))),
    Fault(0, "open sides closed", "infinity as the largest number of 8 bits", with_op(ops.Clip, _closed)),
    Fault(0, "shift before slope", "slope (x + shift)", forward(ops.Affine, lambda original, self,
                                                                x: self.slope.astype(x.dtype) * (x + self.shift.astype(x.dtype)))),
    Fault(0, "incomplete windows kept", "ceil_mode", forward(ops.MaxPool, _ceiled)),
    Fault(0, "dilation of a pool forgotten", "an attribute that is not read", with_op(ops.MaxPool, lambda op: replace(op, dilation=1))),
    Fault(0, "axes of a window exchanged", "(x, y) for (y, x)",
          with_op(ops.AvgPool, lambda op: replace(op, kernel=_reversed_axes(op.kernel)))),
    Fault(0, "sum of a window", "an average that does not divide",
          forward(ops.AvgPool, lambda original, self, x: original(self, x) * x.dtype.type(4))),
    Fault(0, "matrix along the last axis", "axis ignored", with_op(ops.Blend, lambda op: replace(op, axis=2))),
    Fault(0, "one summand", "the residual left out", forward(ops.Add, lambda original, self, a, *rest: np.broadcast_to(
        a, original(self, a, *rest).shape).copy())),
    Fault(0, "constant in front for behind", "a class token's place", with_op(ops.Extend, lambda op: replace(op, front=True))),
    Fault(0, "unflatten channel-last", "NHWC", forward(ops.Unflatten, lambda original, self, x: np.moveaxis(
        x.reshape(len(x), *self.shape[1:], self.shape[0]), -1, 1))),
    Fault(0, "transpose with the batch", "axes counted from the batch", forward(ops.Transpose, lambda original, self, x: x.transpose(
        tuple(a for a in self.axes)[:1] + tuple(range(1, x.ndim))) if sorted(self.axes)[:1] == [0] and self.axes[0] == 0 else np.swapaxes(x,
            1, 2)
        if self.axes != (1, 0, 2) else x)),
    Fault(0, "stop included", "Fortran's and Matlab's ranges", forward(ops.Slice, lambda original, self, x: original(
        replace(self, stop=self.stop + 1) if 0 < self.stop < x.shape[1] else self, x))),
    Fault(0, "merged in the other order", "pixel shuffle for channel shuffle", with_op(ops.Rearrange, lambda op: replace(
        op, groups=tuple(g[::-1] for g in op.groups)))),
    Fault(0, "values of the other head", "heads exchanged", forward(ops.Mix, lambda original, self, p, v: original(self, p[:, ::-1], v))),
    Fault(0, "Tanh as Sigmoid", "a fall-through", with_op(ops.Tanh, lambda op: ops.Sigmoid())),
    Fault(0, "SiLU as Sigmoid", "x left out", with_op(ops.SiLU, lambda op: ops.Sigmoid())),
    Fault(0, "Erf as Tanh", "an approximation", with_op(ops.Erf, lambda op: ops.Tanh())),
    Fault(0, "HardSigmoid of ONNX", "alpha = 0.2", with_op(ops.HardSigmoid, lambda op: replace(op, alpha=0.2))),
    Fault(0, "softmax over the channels", "axis ignored", with_op(ops.Softmax, lambda op: replace(op, axis=1))),
    Fault(0, "inputs exchanged", "by place, not by name", asked("forward", lambda q: {**q, "inputs": dict(zip(
        q["inputs"], [*q["inputs"].values()][::-1], strict=True))})),
    Fault(0, "first output for all", "outputs[0]", answered("forward", lambda answer, **_: {"outputs": dict.fromkeys(
        answer["outputs"], next(iter(answer["outputs"].values())))})),
    Fault(0, "refusals answered", "NaN, and channels that do not fit, computed with", NEVER_REFUSES),
]


def _labelled(change: Callable[[dict[str, list[int]], Graph], None]) -> Plant:
    """Another numbering of channels."""
    def wrong(answer: dict[str, Any], network: Any) -> dict[str, Any]:
        channels = {value: list(of) for value, of in answer["channels"].items()}
        change(channels, adapter.network_of(network))
        return {**answer, "channels": channels}

    return answered("channels", wrong)


def traced(op: type, wrong: Callable[..., Any]) -> Plant:
    """``wrong(original, op, trace, *labels)`` in the place of an op's trace."""
    return patched(op, "trace", wrong)


def _blocks_too(original: Any, self: Any, trace: Any, *inputs: Any) -> Any:
    for x in inputs:
        trace.pin(x, "blocked")
    made = original(self, trace, *inputs)
    trace.pin(made, "blocked")
    return made


def _passes(original: Any, self: Any, trace: Any, *inputs: Any) -> Any:
    return inputs[0]


def _untied(kind: type) -> Plant:
    """An op that passes its first input's labels, and ties nothing."""
    def wrong(original: Any, self: Any, trace: Any, *inputs: Any) -> Any:
        fake = Trace()
        fake.size, fake.node = trace.size, trace.node
        made = original(self, fake, *inputs)
        trace.size = fake.size
        trace.pins += fake.pins
        return made

    return traced(kind, wrong)


def _through_padding(original: Any, graph: Graph, node: Any) -> Any:
    """Readers looked at as if they did not pad."""
    def with_padding(of: Graph, padding: Callable[[str], Any]) -> Graph:
        return of.with_ops({n.name: replace(n.op, padding=padding(n.name)) for n in of.nodes if isinstance(n.op, ops.Conv)})

    found = original(with_padding(graph, lambda name: 0), node)
    return found if isinstance(found, str) else with_padding(found, lambda name: graph[name].op.padding)  # type: ignore[attr-defined]


LEVEL_1 = [
    Fault(1, "existing bias forgotten", "b' = t", patched(folding, "_scaled_rows", lambda original, op, s, t: original(
        op if isinstance(op, ops.BatchNorm) else replace(op, bias=None), s, t))),
    Fault(1, "bias not scaled", "b' = b + t", patched(folding, "_scaled_rows", lambda original, op, s,
                                                      t: original(op, s, t) if op.bias is None or isinstance(
        op, ops.BatchNorm) else replace(original(op, s, t), bias=(op.bias + t).astype(op.bias.dtype)))),
    Fault(1, "eps outside the root", "gamma / (sqrt(var) + eps)", patched(folding, "_affine", lambda original, node: original(
        replace(node, op=replace(node.op, var=(np.sqrt(node.op.var) + node.op.eps)**2, eps=0.0))))),
    Fault(1, "eps forgotten", "gamma / sqrt(var)", patched(folding, "_affine", lambda original, node: original(
        replace(node, op=replace(node.op, eps=1e-30))))),
    Fault(1, "sign of gamma lost", "a magnitude for a number", patched(folding, "_affine", lambda original, node: (
        np.abs(original(node)[0]), original(node)[1]))),
    Fault(1, "mean not scaled", "t = beta - mean", patched(folding, "_affine", lambda original, node: (
        original(node)[0], node.op.beta - node.op.mean))),
    Fault(1, "folded through padding", "the shift at the border", patched(folding, "_into_reader", _through_padding)),
    Fault(1, "other readers not asked", "a value that is read twice",
          patched(folding, "_not_alone", lambda original, graph, value, weighted=None: None)),
    Fault(1, "axis of grouped transposed weights", "torch.ao's fuse_conv_bn_weights with transpose=True",
          patched(folding, "_scaled_rows", lambda original, op, s, t: (
        replace(original(op, s, t), weight=(op.weight * np.resize(s, op.weight.shape[1]).reshape(1, -1,
                                                                                                 *(1,) * (op.weight.ndim - 2))).astype(
            op.weight.dtype)) if isinstance(op, ops.ConvTranspose) else original(op, s, t)))),
    Fault(1, "shift of a reader left out", "b' = b", patched(folding, "_scaled_columns", lambda original, op, s,
                                                             t: original(op, s, 0 * t))),
    Fault(1, "columns counted within the group", "the first group's factors for all",
          patched(folding, "_scaled_columns", lambda original, op, s, t: original(
        op, np.resize(s[:len(s) // op.groups], len(s)), t) if op.groups > 1 and not isinstance(op, ops.BatchNorm) else original(op, s, t))),
    Fault(1, "nothing folded", "a pass that finds no pattern", patched(adapter, "fold_batchnorm", lambda original, graph: graph)),
    Fault(1, "BatchNorm in front not folded", "the pattern conv, bn alone",
          patched(folding, "_into_reader", lambda original, graph, node: "no")),
]


def _first_output(channels: dict[str, list[int]], graph: Graph) -> None:
    for name in graph.outputs[1:]:
        top = max(max(of) for of in channels.values())
        channels[name] = [top + i + 1 for i in range(len(channels[name]))]


def _all_or_none(channels: dict[str, list[int]], graph: Graph) -> None:
    for name, of in channels.items():
        if 0 in of:
            channels[name] = [0] * len(of)


LEVEL_2 = [
    Fault(2, "residuals not tied", "tied residuals scaled apart", _untied(ops.Add)),
    Fault(2, "differences not tied", "Sub and Max taken for ops of one value", _untied(ops.Sub)),
    Fault(2, "maxima not tied", "the same", _untied(ops.Max)),
    Fault(2, "first output alone pinned", "outputs[0]", _labelled(_first_output)),
    Fault(2, "pinned as a whole", "one flag a value", _labelled(_all_or_none)),
    Fault(2, "shared weights not tied", "one op at two nodes",
          patched(Trace, "absorb", lambda original, self, op, read, shape: self.fresh(shape))),
    Fault(2, "LeakyReLU blocks", "a list of activations with ReLU alone", traced(ops.LeakyReLU, _blocks_too)),
    Fault(2, "PReLU blocks", "the same", traced(ops.PReLU, _blocks_too)),
    Fault(2, "Clip blocks", "ReLU6 is not homogeneous by itself", traced(ops.Clip, _blocks_too)),
    Fault(2, "average pools block", "a list of ops", traced(ops.AvgPool, _blocks_too)),
    Fault(2, "padding pins whatever it pads with", "a list of ops", traced(ops.Pad, _blocks_too)),
    Fault(2, "padding's constant passes", "Pad in a list of ops that commute", traced(ops.Pad, lambda original, self, trace, x: original(
        replace(self, value=0.0), trace, x))),
    Fault(2, "Abs blocks", "a list of activations with ReLU alone", traced(ops.Abs, _blocks_too)),
    Fault(2, "resizing blocks", "a list of ops", traced(ops.Upsample, _blocks_too)),
    Fault(2, "matrices over space block", "MatMul as an unknown op", traced(ops.Blend, _blocks_too)),
    Fault(2, "slope and shift over space block", "Mul and Add with constants as unknown ops", traced(ops.Affine, _blocks_too)),
    Fault(2, "gathering blocks", "Gather as an unknown op", traced(ops.Take, _blocks_too)),
    Fault(2, "permuting blocks", "the same", traced(ops.Permute, _blocks_too)),
    Fault(2, "flatten blocks", "a layer behind it left alone", traced(ops.Flatten, _blocks_too)),
    Fault(2, "reshape blocks", "the same, the other way", traced(ops.Unflatten, _blocks_too)),
    Fault(2, "transposes block", "any transpose taken for one of channels", traced(ops.Transpose, _blocks_too)),
    Fault(2, "shuffles block", "Reshape and Transpose as unknown ops", traced(ops.Rearrange, _blocks_too)),
    Fault(2, "gates with a slope block", "SiLU however it is written", traced(blocking.Sloped, _blocks_too)),
    Fault(2, "BatchNorm passes", "an affine map taken for a homogeneous one", traced(ops.BatchNorm, _passes)),
    Fault(2, "ReLU blocks", "layers without an activation alone", traced(ops.ReLU, _blocks_too)),
    Fault(2, "layers pass", "depthwise taken for an op of one value", patched(ops.Weighted, "trace", lambda original, self, trace, x: x if (
        self.groups == len(self.weight) == x.shape[0] and not isinstance(self, ops.BatchNorm)) else original(self, trace, x))),
    Fault(2, "the last layer free", "outputs not pinned", _labelled(lambda channels, graph: channels.update({
        name: [1000 + i for i in range(len(channels[name]))] for name in graph.outputs}))),
    Fault(2, "Sigmoid passes", "a list of activations with too many", traced(ops.Sigmoid, _passes)),
    Fault(2, "Softmax passes", "the same", traced(ops.Softmax, _passes)),
    Fault(2, "all channels of a norm tied", "InstanceNorm taken for LayerNorm",
          traced(ops.InstanceNorm, lambda original, self, trace, x: original(
        self, trace, _tied(trace, x)))),
    Fault(2, "HardSwish passes", "a list of activations with too many", traced(ops.HardSwish, _passes)),
    Fault(2, "products pin", "every tool but few", traced(ops.Mul, _blocks_too)),
    Fault(2, "products carry one factor", "Mul in a list of ops that commute", traced(ops.Mul, _passes)),
    Fault(2, "attention pins", "Scores as a curve", traced(ops.Scores, _blocks_too)),
    Fault(2, "heads of grouped queries in turn", "tile for repeat_interleave",
          patched(ops.Scores.__mro__[1], "_repeated", _repeated_in_turn)),
    Fault(2, "rotary pairs not tied", "queries scaled apart", _untied(ops.Rotary)),
    Fault(2, "channels before a norm free", "LayerNorm as a weighted op", patched(Trace, "tie_rows", lambda original, self, mates: None)),
    Fault(2, "a concat tied as a whole", "one factor a branch", traced(ops.Concat, lambda original, self, trace, *inputs: _tied(
        trace, original(self, trace, *inputs)))),
    Fault(2, "channels of an extension forgotten", "a constant that takes no factor", traced(ops.Extend, _blocks_too)),
    Fault(2, "degrees of freedom by layer", "channels counted twice where they are tied", answered("channels", lambda answer, network: {
        **answer, "degrees_of_freedom": sum(len({*of} - {0}) for name, of in answer["channels"].items()
                                            if isinstance(getattr(next((n.op for n in adapter.network_of(network).nodes if n.name == name),
                                                                       None), "weight", None), np.ndarray))})),
]


def _tied(trace: Any, labels: Any) -> Any:
    vector = labels.reshape(len(labels), -1)[:, 0]
    trace.tie(np.repeat(vector[:1], len(vector)), vector)
    return labels


def _rescale_weights(wrong: Callable[[Any, Any, Any], tuple[Any, Any]]) -> Plant:
    """Weights rescaled by other factors than they were given."""
    original = ops.Weighted.rescale
    return lambda: mock.patch.object(ops.Weighted, "rescale", lambda self, f_out, f_in: original(self, *wrong(self, f_out, f_in)))


LEVEL_3 = [
    Fault(3, "columns not divided", "the maker alone rescaled", _rescale_weights(lambda op, f_out, f_in: (f_out, np.ones_like(f_in)))),
    Fault(3, "rows not multiplied", "the reader alone rescaled", _rescale_weights(lambda op, f_out, f_in: (np.ones_like(f_out), f_in))),
    Fault(3, "factors upside down", "s = 1 / f, as DFQ writes it", _rescale_weights(lambda op, f_out, f_in: (1 / f_out, 1 / f_in))),
    Fault(3, "bias not multiplied", "W alone", rescaled(ops.Weighted, lambda right, op, f_out,
                                                        *f_in: right if op.bias is None else replace(right, bias=op.bias))),
    Fault(3, "columns counted within the group", "the first group's factors for all", _rescale_weights(lambda op, f_out, f_in: (
        f_out, np.resize(f_in[:len(f_in) // op.groups], len(f_in))))),
    Fault(3, "one factor a tensor", "the mean of the factors",
          _rescale_weights(lambda op, f_out, f_in: (f_out, np.full_like(f_in, np.exp(np.log(f_in).mean()))))),
    Fault(3, "ReLU6 kept", "Clip as it was: AIMET, brevitas, the authors' script", rescaled(ops.Clip, lambda right, op, *_: op)),
    Fault(3, "upper bounds only", "a lower bound that is not 0", rescaled(ops.Clip, lambda right, op, *_: replace(right, low=op.low))),
    Fault(3, "one bound for all channels", "the largest factor",
          rescaled(ops.Clip, lambda right, op, f_out, *_: replace(right, high=np.max(right.high)))),
    Fault(3, "slopes multiplied", "PReLU as a weighted op", rescaled(ops.PReLU, lambda right, op, f_out,
                                                                     *_: replace(op, slope=op.slope * f_out))),
    Fault(3, "slope of a gate left", "SiLU as a homogeneous op", rescaled(blocking.Sloped, lambda right, op, *_: op)),
    Fault(3, "shift left", "Affine as homogeneous", rescaled(ops.Affine, lambda right, op, *_: op)),
    Fault(3, "slope and shift multiplied", "Affine as weights", rescaled(ops.Affine, lambda right, op, f_out, *_: replace(
        right, slope=np.broadcast_to(op.slope, (len(f_out), *op.slope.shape[1:])) * along_channels(f_out, op.slope.ndim)[0]))),
    Fault(3, "constant of an extension left", "a class token as it was", rescaled(ops.Extend, lambda right, op, *_: op)),
    Fault(3, "mean of a BatchNorm left", "gamma and beta alone",
          rescaled(ops.BatchNorm, lambda right, op, *_: replace(right, mean=op.mean))),
    Fault(3, "eps of a norm left", "gamma alone", rescaled(ops.Normalization, lambda right, op, *_: replace(right, eps=op.eps))),
    Fault(3, "eps by the factor, not its square", "s for s squared", rescaled(ops.Normalization, lambda right, op, f_out, f_in: replace(
        right, eps=np.asarray(op.eps) * np.asarray(f_in).reshape(op.norm_groups, -1)[:, 0]))),
    Fault(3, "nothing is refused", "factors on pinned and tied channels", NEVER_REFUSES),
    Fault(3, "factors left out", "the network as it was", answered("rescale", lambda answer, network, factors: {"network": network})),
]


def _block(change: Callable[[Any], Any]) -> Plant:
    """Rules of the paper that are shown another block."""
    return patched(methods, "block_ranges", lambda original, *args: change(original(*args)))


def _makers(change: Callable[[Any], Any]) -> Plant:
    return _block(lambda block: replace(block, makers=tuple(map(change, block.makers))))


def _balance(wrong: Callable[..., Any]) -> Plant:
    def plant() -> contextlib.AbstractContextManager[Any]:
        return mock.patch.object(methods, "cross_layer", lambda block: wrong(rules.cross_layer, block))

    return plant


LEVEL_4 = [
    Fault(4, "sqrt(r1 / r2) upside down", "DFQ's s = 1 / f", _balance(lambda original, block: 1 / original(block))),
    Fault(4, "no square root", "read / made", _balance(lambda original, block: original(block)**2)),
    Fault(4, "one sweep", "not repeated until nothing moves", asked("equalize", lambda question: {**question, "max_iter": 1})),
    Fault(4, "bound forgotten", "factors without limit", asked("equalize", lambda question: {**question, "max_factor": 1e30})),
    Fault(4, "two-step equals one-step", "the authors' script with a single reader",
          _block(lambda block: replace(block, consumed=np.ones_like(block.made)))),
    Fault(4, "one-step equals two-step", "m_i in both", lambda: mock.patch.object(methods, "one_step", rules.two_step)),
    Fault(4, "kernel forgotten", "activations alone", _makers(lambda maker: replace(maker, kernel=np.where(maker.kernel > 0, 1.0, 0.0)))),
    Fault(4, "activation forgotten", "weights alone", _makers(lambda maker: replace(maker,
                                                                                    activation=np.where(maker.activation > 0, 1.0, 0.0)))),
    Fault(4, "depthwise maximum collapsed", "one number for all channels: the authors' script", _makers(lambda maker: replace(
        maker, kernel=np.full_like(maker.kernel, maker.kernel.max())))),
    Fault(4, "residuals not shared", "tied layers, each by itself", patched(rules, "_share", lambda original, candidates: candidates)),
    Fault(4, "concat not lifted", "the mates left apart", patched(rules, "_lift", lambda original, block, f: 1.0)),
    Fault(4, "the maximum for the largest magnitude", "max(x) for max|x|", lambda: mock.patch.object(
        calibration.ValueStatistics, "max_abs", property(lambda self: np.maximum(self.max, 0)))),
    Fault(4, "signed weights", "max(W) for max|W|", patched(ops.Weighted, "taps", lambda original, self: np.maximum(original(self), 0))),
    Fault(4, "dead channels divided", "0 / 0 (torch.ao)", patched(rules, "_equalize", lambda original, block, m, bound: np.where(
        (block.made == 0) | (block.read == 0), bound, original(block, m, bound)))),
    Fault(4, "range before the activation", "the layer's own output",
          patched(blocks, "activation_of", lambda original, graph, value: value)),
    Fault(4, "pinned channels left out of the layer's range", "free channels alone",
          _makers(lambda maker: replace(maker, held_kernel=0.0, held_activation=0.0))),
    Fault(4, "tied channels apart", "a factor for each use of a channel", answered("equalize", lambda answer, **_: {"factors": {
        value: array(lambda f: f * np.linspace(1, 2, len(f)))(f) for value, f in answer.get("factors", {}).items()}})),
    Fault(4, "the first reader alone", "next_layers[0]", patched(
        blocks.BlockPlan, "largest", lambda original, self, sides, ranges: original(self, sides[:1], ranges[:1]))),
]


def _grids(change: Callable[..., Any]) -> Plant:
    """``change(right, quantizer, low, high)`` of the grid for a range."""
    return patched(UniformQuantizer, "grid", lambda original, self, low, high: change(original(self, low, high), self, low, high))


def _rounding(wrong: Callable[..., Any]) -> Plant:
    """Another way from numbers to whole numbers, ``wrong(grid, x, scale)``, in ``x``'s type."""
    def quantize(original: Any, self: Any, x: Any, step: Any = None) -> Any:
        x = np.asarray(x)
        return wrong(self, x, self.scale.astype(x.dtype))

    return patched(grid.Grid, "quantize", quantize)


def _saturated(self: Any, q: Any) -> Any:
    return np.clip(q, self.qmin, self.qmax).astype(np.int32)


def _unwidened(right: Any, self: Any, low: Any, high: Any) -> Any:
    if self.symmetric or np.any(np.asarray(low) >= high):
        return right
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    scale = (high - low) / self.steps
    return replace(right, scale=scale, zero_point=np.clip(np.rint(self.qmin - low / scale), self.qmin, self.qmax))


def _layer(change: Callable[..., dict[str, Any]]) -> Plant:
    """``change(scale, q_w, q_b, question)`` to some of the three."""
    def wrong(answer: dict[str, Any], **question: Any) -> dict[str, Any]:
        parts = {name: adapter.array_of(answer[name]) for name in ("scale", "q_w", "q_b")}
        return {**answer, **adapter.arrays_json(change(**parts, question=question))}

    return answered("quantize_layer", wrong)


def _bias_without_input_scale(scale: Any, q_w: Any, q_b: Any, question: Any) -> dict[str, Any]:
    return {"q_b": np.rint(adapter.array_of(question["bias"]) / scale).astype(np.int64)}


def _first_scale(question: dict[str, Any]) -> dict[str, Any]:
    return {**question, "weight_scale": array(lambda a: np.full_like(a, a[0]))(question["weight_scale"])}


def _requantized(wrong: Callable[[Any, Any], Any]) -> Plant:
    """Another rounding of ``n M``, whose exact value in the type asked for is given, with the grid."""
    def answer(n: Any, input_scale: float, weight_scale: Any, grid: Any, dtype: str) -> dict[str, Any]:
        sums, to = adapter.array_of(n), adapter._grid(grid).astype(dtype)
        step = np.asarray(input_scale, dtype) * adapter.array_of(weight_scale).astype(dtype)
        multiplier = (step / to.scale.astype(dtype)).reshape(-1, *(1,) * (sums.ndim - 2))
        return {"q": adapter.array_json(wrong(sums.astype(dtype) * multiplier, to).astype(np.int32))}

    return lambda: mock.patch.dict(adapter.ASKS, {"requantize": answer})


LEVEL_5 = [
    Fault(5, "2**b steps", "(max - min) / 2**b: the paper's own script",
          _grids(lambda right, self, *_: replace(right, scale=right.scale * self.steps / (self.steps + 1)))),
    Fault(5, "range that does not hold zero", "min and max as they come", _grids(_unwidened)),
    Fault(5, "zero point rounded down", "int() for round()", _grids(lambda right, self, low, high: right if self.symmetric else replace(
        right, zero_point=np.clip(np.floor(self.qmin - np.minimum(low, 0) / right.scale), self.qmin, self.qmax)))),
    Fault(5, "zero point half away from zero", "C's round()", _grids(lambda right, self, low, high: right if self.symmetric else replace(
        right, zero_point=np.clip(grid.rounded(self.qmin - np.minimum(low, 0) / right.scale, "half_away"), self.qmin, self.qmax)))),
    Fault(5, "the largest for the largest magnitude", "max(x) / 127", _grids(lambda right, self, low, high: replace(
        right, scale=np.where(np.asarray(high) > 0, np.abs(np.asarray(high, np.float64)) / self.steps,
                              right.scale)) if self.symmetric else right)),
    Fault(5, "narrow range ignored", "qmin of -128", asked("grid",
                                                           lambda q: {**q, "quantizer": {**q["quantizer"], "narrow_range": False}})),
    Fault(5, "sign ignored", "uint8 taken for granted", asked("grid",
        lambda q: {**q, "quantizer": {k: v for k, v in q["quantizer"].items() if k != "signed"}})),
    Fault(5, "8 bits taken for granted", "an option that is not read",
          asked("grid", lambda q: {**q, "quantizer": {**q["quantizer"], "bits": 8}})),
    Fault(5, "an epsilon in the scale", "max(scale, 1e-8), as in PyTorch's observers",
          answered("grid", lambda answer, **_: {**answer, "scale": array(
        lambda scale: np.maximum(scale, 1e-8))(answer["scale"])} if "scale" in answer else answer)),
    Fault(5, "one grid for all channels", "min and max over everything", asked("grid", lambda q: {
        **q, "low": array(lambda a: np.full_like(a, a.min()))(q["low"]), "high": array(lambda a: np.full_like(a, a.max()))(q["high"])})),
    Fault(5, "ranges not checked", "NaN in all that follows", NEVER_REFUSES),
    Fault(5, "scales along the input channels", "axis 1 for axis 0",
          patched(UniformQuantizer, "weight_range", lambda original, self, op, *rest: (
        op.weight.min(axis=(0, *range(2, op.weight.ndim)), keepdims=True),
        op.weight.max(axis=(0, *range(2, op.weight.ndim)), keepdims=True)))),
    Fault(5, "scales of the first channel", "per channel ignored",
          patched(UniformQuantizer, "weight_range", lambda original, self, op, *rest: original(
        replace(self, granularity="per_tensor"), op, *rest))),
    Fault(5, "half away for half to even", "C's round()", asked("quantize",
                                                                lambda q: {**q, "grid": {**q["grid"], "rounding": "half_away"}})),
    Fault(5, "half to even for half up", "numpy's round()", asked("quantize",
                                                                  lambda q: {**q, "grid": {**q["grid"], "rounding": "half_even"}})),
    Fault(5, "floor(x + 1/2)", "half up, as it is mostly written",
          lambda: mock.patch.object(grid, "rounded", lambda x, rounding: np.floor(x + 0.5))),
    Fault(5, "truncated", "a cast for a rounding", lambda: mock.patch.object(grid, "rounded", lambda x, rounding: np.trunc(x))),
    Fault(5, "not saturated", "a cast to int8 that wraps", _rounding(lambda self, x,
        scale: (grid.rounded(x / scale, self.rounding) + self.zero_point).astype(np.int32))),
    Fault(5, "zero point before rounding", "round(x / s + z)",
          _rounding(lambda self, x, scale: _saturated(self, grid.rounded(x / scale + self.zero_point, self.rounding)))),
    Fault(5, "divided in float64", "Python's numbers", _rounding(lambda self, x, scale: _saturated(self, grid.rounded(
        x.astype(np.float64) / scale.astype(np.float64), self.rounding) + self.zero_point))),
    Fault(5, "multiplied by 1 / s", "a reciprocal, once", _rounding(lambda self, x, scale: _saturated(self, grid.rounded(
        x * (scale.dtype.type(1) / scale), self.rounding) + self.zero_point))),
    Fault(5, "scales along the last axis", "numpy's broadcasting",
          patched(adapter, "_grid", lambda original, code, axes=1: original(code, 1))),
    Fault(5, "s q without z", "a zero point taken for 0", patched(grid.Grid, "dequantize", lambda original, self,
                                                                  q: self.scale * np.asarray(q, np.float64))),
    Fault(5, "multiplier in float64", "another rounding of n M", asked("requantize", lambda q: {**q, "dtype": "float64"})),
    Fault(5, "one multiplier for all channels", "weight_scale[0]", asked("requantize", _first_scale)),
    Fault(5, "sums half away from zero", "an engine's rounding shift", _requantized(lambda r, to: np.clip(
        grid.rounded(r, "half_away") + to.zero_point, to.qmin, to.qmax))),
    Fault(5, "sums not saturated", "a cast to uint8 that wraps", _requantized(lambda r, to: np.mod(np.rint(r) + to.zero_point, 256))),
    Fault(5, "sums clipped before the zero point", "the order of the two",
          _requantized(lambda r, to: np.clip(np.rint(r), to.qmin, to.qmax) + to.zero_point)),
    Fault(5, "bias scale without s_x", "b / s_w", _layer(_bias_without_input_scale)),
    Fault(5, "bias in 16 bits", "the accelerator's registers",
          _layer(lambda scale, q_w, q_b, question: {"q_b": np.clip(q_b, -2**15, 2**15 - 1)})),
    Fault(5, "int32 wraps", "no room for sums beside the bias", patched(accumulators, "_roomy", lambda original, of, *_: of)),
    Fault(5, "scales raised for no reason", "room for what never comes",
          patched(accumulators, "_roomy", lambda original, of, *_: replace(of, scale=of.scale * 4))),
]


def _shifts(op: Any) -> Any:
    """A multiplier that is a power of two."""
    if op.step is None:
        return op
    ratio = op.step / op.grid.scale
    return replace(op, step=op.grid.scale * np.exp2(np.rint(np.log2(ratio))))


def _regrid(**changes: Callable[[Any], Any]) -> Plant:
    """Activations on another grid."""
    return with_op(FakeQuantize, lambda op: replace(op, grid=replace(op.grid,
        **{name: change(getattr(op.grid, name)) for name, change in changes.items()})))


def _lowest_padding(original: Any, self: Any, x: Any) -> Any:
    if not np.any(self.padding):
        return original(self, x)
    sides = [self.padding] * (x.ndim - 2) if isinstance(self.padding, int) else self.padding
    pairs = [(0, 0), (0, 0), *((p, p) if isinstance(p, int) else p for p in sides)]
    return original(replace(self, padding=0), np.pad(x, pairs, constant_values=x.min()))


LEVEL_6 = [
    Fault(6, "sums rounded in float", "no whole number behind a sum", with_op(FakeQuantize, lambda op: replace(op, step=None))),
    Fault(6, "a shift for a multiplier", "M as a power of two", with_op(FakeQuantize, _shifts)),
    Fault(6, "one multiplier for all channels", "step[0]", with_op(FakeQuantize,
        lambda op: op if op.step is None else replace(op, step=np.full_like(op.step, op.step[0])))),
    Fault(6, "zero point forgotten", "symmetric activations taken for granted",
          _regrid(zero_point=np.zeros_like, qmin=lambda q: min(q, 0))),
    Fault(6, "signed for unsigned", "int8 activations", _regrid(qmax=lambda q: 127 if q == 255 else q,
                                                                zero_point=lambda z: np.minimum(z, 127))),
    Fault(6, "not saturated", "a grid without ends", _regrid(qmax=lambda q: 4 * q)),
    Fault(6, "rounded down", "truncation", _regrid(rounding=lambda r: "floor")),
    Fault(6, "padding with the whole number 0", "zero point forgotten at the border", forward(ops.Conv, _lowest_padding)),
    Fault(6, "bias left out", "an int32 input that is not read", with_op(ops.Dense, lambda op: replace(op, bias=None))),
    Fault(6, "bias of convolutions left out", "the same", with_op(ops.Conv, lambda op: replace(op, bias=None))),
    Fault(6, "the clip left out", "ReLU6 taken for the grid's end", with_op(ops.Clip, lambda op: ops.Identity())),
    Fault(6, "one bound for all channels", "the first channel's",
          with_op(ops.Clip, lambda op: op if np.size(op.high) == 1 else replace(op, high=float(np.ravel(op.high)[0])))),
    Fault(6, "sums in 16 bits", "a narrow accumulator", forward(FakeQuantize, lambda original, self,
                                                                x: original(self, x if self.step is None else np.clip(
        x, -2**15 * along_channels(self.step, x.ndim - 1), (2**15 - 1) * along_channels(self.step, x.ndim - 1)).astype(x.dtype)))),
    Fault(6, "weights of 7 bits", "reduce_range, unasked", with_op(ops.Dense, lambda op: op if op.grid is None else replace(
        op, weight=np.clip(op.weight, -63 * op.grid.scale, 63 * op.grid.scale).astype(op.weight.dtype)))),
    Fault(6, "the second summand on the first's grid", "whole numbers added",
          forward(ops.Add, lambda original, self, a, b: a + b * a.dtype.type(
        np.abs(a).max() / np.abs(b).max()))),
    Fault(6, "difference turned round", "the side of an operand", forward(ops.Sub, lambda original, self, a, b: b - a)),
    Fault(6, "product of one", "a gate left out", forward(ops.Mul, lambda original, self, a, b: a)),
    Fault(6, "branches exchanged", "a concat's order", forward(ops.Concat, lambda original, self, *inputs: original(self, *inputs[::-1]))),
    Fault(6, "flatten channel-last", "NHWC engines", forward(ops.Flatten, _channel_last)),
    Fault(6, "axes of a transposed convolution", "(in, out)", with_op(ops.ConvTranspose, _flipped)),
    Fault(6, "a mean for a maximum", "another pool", with_op(ops.MaxPool, lambda op: ops.AvgPool(op.kernel, stride=op.stride))),
]


def _ones(question: dict[str, Any]) -> dict[str, Any]:
    return {**question, "factors": {value: array(np.ones_like)(f) for value, f in question["factors"].items()}}


def _power(power: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda question: {**question, "factors": {value: array(lambda a: a**power)(f) for value, f in question["factors"].items()}}


def _other_quantizer(which: str, **options: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda question: {**question, which: None if question[which] is None else {**question[which], **options}}


def _found(change: Callable[[Any], Any]) -> Plant:
    """Other factors than the best; those of free channels are changed."""
    def wrong(answer: dict[str, Any], network: Any, **_: Any) -> dict[str, Any]:
        graph = adapter.network_of(network)
        best = Factorization.of(graph, adapter.arrays_of(answer["factors"]))
        return {"factors": adapter.arrays_json(replace(best, free=np.concatenate([[1.0], change(best.free[1:])])))}

    return answered("optimize", wrong)


def _of_method(name: str) -> Plant:
    def wrong(answer: dict[str, Any], network: Any, **_: Any) -> dict[str, Any]:
        return {"factors": adapter.arrays_json(equalize(adapter.network_of(network), name).factorization)}

    return answered("optimize", wrong)


LEVEL_7 = [
    Fault(7, "factors ignored", "noise of the network as it was", asked("expected_noise", _ones)),
    Fault(7, "factors upside down", "s = 1 / f", asked("expected_noise", _power(-1.0))),
    Fault(7, "the factor for its square", "sensitivities by f", asked("expected_noise", _power(0.5))),
    Fault(7, "symmetric activations", "max|x| for max - min", asked("expected_noise", _other_quantizer("activations", symmetric=True))),
    Fault(7, "one bit less", "2**(b - 1) steps", asked("expected_noise", _other_quantizer("weights", bits=7))),
    Fault(7, "activations left out", "weight noise alone", asked("expected_noise", lambda question: {**question, "activations": None})),
    Fault(7, "weights left out", "activation noise alone", asked("expected_noise", lambda question: {**question, "weights": None})),
    Fault(7, "every value rounded", "those before an activation, too",
          lambda: mock.patch.object(noise, "stored_values", lambda graph, outputs=False: list(graph.shapes))),
    Fault(7, "balance for the best", "cross-layer", _of_method("cross_layer")),
    Fault(7, "nothing done", "all factors 1", _found(np.ones_like)),
    Fault(7, "far from converged", "off by a fifth", _found(lambda f: f * np.where(np.arange(len(f)) % 2, 1.25, 0.8))),
    Fault(7, "beyond the box", "bounds forgotten", _found(lambda f: f * 2.0**12)),
    Fault(7, "granularity ignored", "per channel taken for per tensor",
          asked("optimize", _other_quantizer("weights", granularity="per_tensor"))),
]


def _verdict(same: Callable[..., bool]) -> Plant:
    """Outputs compared in another way: ``same(output of a, output of b)``, for all of them."""
    def wrong(original: Any, a: Graph, b: Graph, x: Any) -> bool:
        of_a, of_b = values(a, x), values(b, x)
        return all(same(of_a[name], of_b[name]) for name in a.outputs)

    return patched(adapter, "verify", wrong)


LEVEL_8 = [
    Fault(8, "equal to the bit", "no rounding allowed", _verdict(np.array_equal)),
    Fault(8, "a percent", "allclose(rtol=1e-2)", _verdict(lambda a, b: np.allclose(a, b, rtol=1e-2))),
    Fault(8, "numpy's tolerance", "allclose(rtol=1e-5, atol=1e-8)", _verdict(np.allclose)),
    Fault(8, "relative to the largest output", "max|a - b| / max|a| < 1e-4",
          _verdict(lambda a, b: np.abs(a - b).max() <= 1e-4 * np.abs(a).max())),
    Fault(8, "means compared", "mean|a - b| < 1e-3", _verdict(lambda a, b: np.abs(a - b).mean() < 1e-3)),
    Fault(8, "always equal", "no comparison", patched(adapter, "verify", lambda original, *_: True)),
    Fault(8, "never equal", "a comparison of names", patched(adapter, "verify", lambda original, *_: False)),
    Fault(8, "weights compared", "nodes, not functions", patched(adapter, "verify", lambda original, a, b,
                                                                 x: [n.name for n in a.nodes] == [n.name for n in b.nodes]
          and all(np.array_equal(n.op.weight, b[n.name].op.weight) for n in a.nodes if isinstance(n.op, ops.Weighted)))),
    Fault(8, "first output alone", "outputs[0]", patched(adapter, "verify", lambda original, a, b, x: original(
        *(Graph(dict(g.inputs), g.nodes, g.outputs[:1]) for g in (a, b)), x))),
]

FAULTS: list[Fault] = [*LEVEL_0, *LEVEL_1, *LEVEL_2, *LEVEL_3, *LEVEL_4, *LEVEL_5, *LEVEL_6, *LEVEL_7, *LEVEL_8]


def killed(fault: Fault, cases: list[Case]) -> Iterator[Case]:
    """The cases that find the fault."""
    for case in cases:
        with fault.plant(), np.errstate(all="ignore"):
            reply = adapter.answer({"id": 0, "ask": case.ask, **case.request})
        if "answer" not in reply or judged(case, reply["answer"]).verdict != "passed":
            yield case


def matrix(faults: list[Fault]) -> dict[str, list[str]]:
    """For every fault, ``LEVEL NAME``, the cases of its level that kill it."""
    cases = {level: all_cases([level]) for level in {fault.level for fault in faults}}
    return {f"{fault.level} {fault.name}": [case.id for case in killed(fault, cases[fault.level])] for fault in faults}


def page(found: dict[str, list[str]]) -> str:
    """The matrix as a page."""
    cases = all_cases()
    killers = {case for ids in found.values() for case in ids}
    lines = ["# What the conformance cases find", "",
             "Small changes of a right adapter, each the repetition of a real bug, and the cases of its level that tell them: the first",
             "few, and how many. Made by `python -m benchmarks faults`.", "",
             f"{len(found)} faults, {sum(map(bool, found.values()))} killed; {len(cases)} cases, {len(killers)} of which kill one.", ""]
    for level in LEVELS:
        lines += [f"## Level {level.number}: {level.title}", "", "| fault | repeats | killed by |", "|---|---|---|"]
        for fault in FAULTS:
            if fault.level == level.number:
                ids = [case.partition("/")[2] for case in found[f"{fault.level} {fault.name}"]]
                more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
                lines.append(f"| {fault.name} | {fault.repeats} | {', '.join(ids[:3]) + more or 'nothing'} |".replace("|x|", "abs x"))
        idle = [case for case in cases if case.level == level.number and case.id not in killers]
        if idle:
            lines += ["", f"Cases that kill none of these, and what each looks for ({len(idle)}):", ""]
            lines += [f"* {case.name}: {case.why}" for case in idle]
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Plant every fault, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks faults",
                                     description="What kills each planted fault of the conformance kit.")
    parser.add_argument("--level", type=int, nargs="+", help="the faults of these levels; writes nothing")
    args = parser.parse_args(argv)
    chosen = [fault for fault in FAULTS if args.level is None or fault.level in args.level]
    found = matrix(chosen)
    for name, ids in found.items():
        print(f"{name}: {len(ids)}" + ("" if ids else "   SURVIVES"))
    if args.level is None:
        PAGE.write_text(page(found), encoding="utf-8")
    return 0 if all(found.values()) else 1
