"""The table of ops: one row an op and an option. Every law of ops runs on every row; add a row and it is covered.

Expected values come from elsewhere: ONNX's reference evaluator, scipy.signal, or loops and closed formulas written
differently from the library's. They are computed in float64 from the very parameters given to the op.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from scipy import signal

import eqfact as eq

Expected = Callable[..., np.ndarray]


@dataclass(frozen=True, eq=False)
class Case:
    name: str
    op: eq.Op
    shapes: tuple[tuple[int, ...], ...]
    expected: Expected
    dtype: np.dtype

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}"

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(self.name.encode()))

    def inputs(self, batch: int = 3) -> list[np.ndarray]:
        rng = self.rng
        return [(2 * rng.normal(size=(batch, *shape))).astype(self.dtype) for shape in self.shapes]

    def framed(self) -> eq.Graph:
        """The op between batch normalizations, which absorb any factor: its labels are then those that the op itself demands."""
        rng = self.rng

        def frame(channels):
            gamma, var = rng.uniform(0.5, 2, (2, channels)).astype(self.dtype)
            beta, mean = rng.uniform(-0.5, 0.5, (2, channels)).astype(self.dtype)
            return eq.BatchNorm(gamma, beta, mean, var)

        inputs = {f"x{i}": shape for i, shape in enumerate(self.shapes)}
        nodes = [eq.Node(f"in{i}", frame(shape[0]), [f"x{i}"]) for i, shape in enumerate(self.shapes)]
        nodes.append(eq.Node("op", self.op, [node.name for node in nodes]))
        nodes.append(eq.Node("out", frame(self.op.output_shape(*self.shapes)[0]), ["op"]))
        return eq.Graph(inputs, nodes, ["out"])

    def data(self) -> dict[str, np.ndarray]:
        """Input of the framed graph, enough to reach every side of a limit."""
        return {f"x{i}": x for i, x in enumerate(self.inputs(batch=12))}

    def factors(self, *, powers_of_two: bool) -> tuple[np.ndarray, list[np.ndarray]]:
        """Random factors of output and inputs that the op's labels allow."""
        resolved = eq.channels(self.framed())
        exponents = self.rng.uniform(-4, 4, resolved.degrees_of_freedom + 1)
        by_label = np.exp2(np.rint(exponents) if powers_of_two else exponents)
        by_label[0] = 1
        f = eq.Factorization(resolved, by_label)
        return f["op"], [f[f"in{i}"] for i in range(len(self.shapes))]


# ------------------------------------------------------------------------------------------------ where expected values come from


def onnx(kind: str, *constants: Any, opset: int = 20, **attributes: Any) -> Expected:
    """ONNX's reference evaluator on one node: inputs first, then constants; in double precision."""

    def run(*inputs):
        values = {f"x{i}": np.float64(x) for i, x in enumerate(inputs)}
        tensors = {f"c{i}": np.asarray(c) for i, c in enumerate(constants)}
        tensors = {key: c.astype(np.float64) if c.dtype in (np.float32, np.float16) else c for key, c in tensors.items()}
        if kind == "Resize":  # scales are single precision by definition
            tensors["c1"] = tensors["c1"].astype(np.float32)
        node = helper.make_node(kind, [*values, *tensors], ["y"], **attributes)
        graph = helper.make_graph(
            [node], "one", [helper.make_tensor_value_info(key, TensorProto.DOUBLE, x.shape) for key, x in values.items()],
            [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)],
            [numpy_helper.from_array(c, key) for key, c in tensors.items()])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        return ReferenceEvaluator(model).run(None, values)[0]

    return run


def transposed(weight: np.ndarray, groups: int = 1) -> np.ndarray:
    """From ``(out, in // groups, *kernel)`` to ONNX's ``(in, out // groups, *kernel)``, entry by entry."""
    out, inner, *kernel = weight.shape
    per_group = out // groups
    result = np.empty((groups * inner, per_group, *kernel), weight.dtype)
    for o, i in np.ndindex(out, inner):
        result[o // per_group * inner + i, o % per_group] = weight[o, i]
    return result


def correlated(weight: np.ndarray, bias: np.ndarray | None = None) -> Expected:
    """scipy.signal.correlate, image by image, for a convolution without options."""

    def run(x):
        def one(image, row):
            return sum(signal.correlate(channel, kernel, "valid", "direct") for channel, kernel in zip(image, row, strict=True))

        y = np.stack([[one(image, row) for row in np.float64(weight)] for image in np.float64(x)])
        return y if bias is None else y + bias.reshape(-1, *[1] * (y.ndim - 2))

    return run


def looped(weight: np.ndarray, bias: np.ndarray | None, stride: Any, before: Any, dilation: Any, groups: int, sizes: Any) -> Expected:
    """A convolution by its definition, output entry by output entry."""

    def run(x):
        out, inner, *kernel = weight.shape
        y = np.zeros((len(x), out, *sizes))
        for n, o in np.ndindex(len(x), out):
            for at in np.ndindex(*sizes):
                total = 0.0 if bias is None else float(bias[o])
                for i in range(inner):
                    channel = o // (out // groups) * inner + i
                    for tap in np.ndindex(*kernel):
                        where = [a * s + t * d - b for a, s, t, d, b in zip(at, stride, tap, dilation, before, strict=True)]
                        if all(0 <= w < size for w, size in zip(where, x.shape[2:], strict=True)):
                            total += float(weight[(o, i, *tap)]) * float(x[(n, channel, *where)])
                y[(n, o, *at)] = total
        return y

    return run


def spread_loops(weight: np.ndarray, bias: np.ndarray | None, stride: Any, before: Any, dilation: Any, groups: int, sizes: Any) -> Expected:
    """A transposed convolution by its definition: every input entry is spread over the kernel."""

    def run(x):
        out, inner, *kernel = weight.shape
        y = np.zeros((len(x), out, *sizes))
        for n, o, i in np.ndindex(len(x), out, inner):
            channel = o // (out // groups) * inner + i
            for at, tap in itertools.product(np.ndindex(*x.shape[2:]), np.ndindex(*kernel)):
                where = [a * s + t * d - b for a, s, t, d, b in zip(at, stride, tap, dilation, before, strict=True)]
                if all(0 <= w < size for w, size in zip(where, sizes, strict=True)):
                    y[(n, o, *where)] += float(weight[(o, i, *tap)]) * float(x[(n, channel, *at)])
        return y if bias is None else y + bias.reshape(-1, *[1] * (y.ndim - 2))

    return run


def entrywise(function: Callable[[float], float]) -> Expected:
    """A function of one Python float, entry by entry."""
    return lambda x: np.vectorize(function, otypes=[np.float64])(np.float64(x))


def by_channel(function: Callable[[float, int], float]) -> Expected:
    """A function of one entry and its channel."""

    def run(x):
        y = np.empty(x.shape)
        for index in np.ndindex(*x.shape):
            y[index] = function(float(x[index]), index[1])
        return y

    return run


def features_last(expected: Expected) -> Expected:
    """An operator whose features are the last axis."""
    return lambda x: np.moveaxis(expected(np.moveaxis(x, 1, -1)), -1, 1)


def causal(x: np.ndarray) -> np.ndarray:
    """Token by token, over those that it may look at."""
    y = np.zeros(x.shape)
    for t in range(x.shape[-2]):
        y[..., t, :t + 1] = onnx("Softmax", axis=-1)(x[..., t, :t + 1])
    return y


def scored(q: np.ndarray, k: np.ndarray, heads: int, kv_heads: int, scale: float) -> np.ndarray:
    """Head by head, and window by window where tokens have one."""
    width, windowed = q.shape[1] // heads, q.ndim == 4
    q, k = (np.float64(v) if windowed else np.float64(v)[:, :, None] for v in (q, k))
    y = np.stack([scale * np.einsum("ndwt,ndws->nwts", q[:, h * width:(h + 1) * width], k[:, g * width:(g + 1) * width])
                  for h in range(heads) for g in [h * kv_heads // heads]], axis=1)
    return y if windowed else y[:, :, 0]


def mixed(p: np.ndarray, v: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    width, windowed = v.shape[1] // kv_heads, v.ndim == 4
    p, v = (np.float64(p), np.float64(v)) if windowed else (np.float64(p)[:, :, None], np.float64(v)[:, :, None])
    y = np.concatenate([np.einsum("nwts,ndws->ndwt", p[:, h], v[:, g * width:(g + 1) * width])
                        for h in range(heads) for g in [h * kv_heads // heads]], axis=1)
    return y if windowed else y[:, :, 0]


def turned(x: np.ndarray, angle: np.ndarray, heads: int, interleaved: bool) -> np.ndarray:
    """Pairs of channels as complex numbers."""
    y, pairs, width = np.float64(x), len(angle), x.shape[1] // heads
    for h, i in np.ndindex(heads, pairs):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + pairs)
        z = (x[:, h * width + first] + 1j * x[:, h * width + second]) * np.exp(1j * np.float64(angle[i]))
        y[:, h * width + first], y[:, h * width + second] = z.real, z.imag
    return y


# ------------------------------------------------------------------------------------------------ the table


def table(dtype: Any) -> list[Case]:
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(2019)
    rows: list[Case] = []

    def a(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(dtype)

    def row(name: str, op: eq.Op, *shapes: tuple[int, ...], expected: Expected) -> None:
        rows.append(Case(name, op, shapes, expected, dtype))

    # Dense
    w, b = a(4, 3), a(4)
    row("dense", eq.Dense(w, b), (3,), expected=onnx("Gemm", w, b, transB=1))
    row("dense without bias", eq.Dense(w), (3,), expected=lambda x, w=w: np.einsum("ni,oi->no", np.float64(x), w))

    # Conv: 1d, 2d, 3d; stride, padding, dilation, groups
    w, b = a(3, 2, 3), a(3)
    row("conv 1d", eq.Conv(w, b), (2, 7), expected=correlated(w, b))
    w = a(4, 2, 3)
    row("conv 1d, all options", eq.Conv(w, stride=2, padding=((2, 0),), dilation=2, groups=2), (4, 9),
        expected=onnx("Conv", w, strides=[2], pads=[2, 0], dilations=[2], group=2))
    w, b = a(4, 3, 3, 2), a(4)
    row("conv 2d", eq.Conv(w, b), (3, 5, 4), expected=correlated(w, b))
    row("conv 2d without bias", eq.Conv(w), (3, 5, 4), expected=correlated(w))
    row("conv 2d, stride and padding", eq.Conv(w, b, stride=2, padding=1), (3, 5, 6),
        expected=onnx("Conv", w, b, strides=[2, 2], pads=[1] * 4))
    row("conv 2d, options an axis", eq.Conv(w, b, stride=(2, 1), padding=(1, 2), dilation=(1, 3)), (3, 5, 6),
        expected=onnx("Conv", w, b, strides=[2, 1], pads=[1, 2, 1, 2], dilations=[1, 3]))
    row("conv 2d, asymmetric padding", eq.Conv(w, b, padding=((0, 2), (1, 0))), (3, 4, 5), expected=onnx("Conv", w, b, pads=[0, 1, 2, 0]))
    row("conv 2d, padding of both kinds", eq.Conv(w, b, padding=(1, (0, 2))), (3, 4, 5), expected=onnx("Conv", w, b, pads=[1, 0, 1, 2]))
    row("conv 2d, dilation", eq.Conv(w, b, dilation=2), (3, 7, 6), expected=onnx("Conv", w, b, dilations=[2, 2]))
    row("conv 2d, one output pixel", eq.Conv(w, b), (3, 3, 2), expected=lambda x, w=w, b=b: (
        np.tensordot(np.float64(x), w, ([1, 2, 3], [1, 2, 3])) + b)[:, :, None, None])
    w, b = a(6, 2, 3, 3), a(6)
    row("conv 2d, groups", eq.Conv(w, b, groups=3, padding=1), (6, 4, 3), expected=onnx("Conv", w, b, group=3, pads=[1] * 4))
    row("conv 2d, groups, by definition", eq.Conv(w, b, groups=3, stride=(1, 2), padding=((1, 0), (2, 1)), dilation=(2, 1)), (6, 5, 3),
        expected=looped(w, b, (1, 2), (1, 2), (2, 1), 3, (2, 2)))
    w, b = a(6, 1, 1, 1), a(6)
    row("conv 2d, pointwise groups", eq.Conv(w, b, groups=3), (3, 2, 2), expected=lambda x, w=w, b=b: (
        np.repeat(np.float64(x), 2, axis=1) * w[:, 0] + b[:, None, None]))
    w, b = a(5, 3, 1, 1), a(5)
    row("conv 2d, pointwise", eq.Conv(w, b), (3, 4, 2), expected=lambda x, w=w, b=b: (
        np.einsum("nihw,oi->nohw", np.float64(x), w[:, :, 0, 0]) + b[:, None, None]))
    row("conv 2d, pointwise, stride and padding", eq.Conv(w, b, stride=2, padding=((1, 0), (0, 1))), (3, 4, 4),
        expected=onnx("Conv", w, b, strides=[2, 2], pads=[1, 0, 0, 1]))
    w, b = a(3, 1, 3, 3), a(3)
    row("conv 2d, depthwise", eq.Conv(w, b, groups=3, padding=1), (3, 5, 4), expected=onnx("Conv", w, b, group=3, pads=[1] * 4))
    w, b = a(6, 1, 3, 2), a(6)
    row("conv 2d, depthwise, multiplier, all options", eq.Conv(w, b, groups=3, stride=(2, 1), padding=((2, 1), (0, 1)), dilation=(1, 2)),
        (3, 5, 4), expected=looped(w, b, (2, 1), (2, 0), (1, 2), 3, (3, 3)))
    row("conv 2d, one input channel", eq.Conv(w, b, padding=1), (1, 3, 4), expected=onnx("Conv", w, b, pads=[1] * 4))
    w = a(4, 1, 3)
    row("conv 1d, depthwise, multiplier", eq.Conv(w, groups=2, padding=1, stride=2), (2, 6),
        expected=onnx("Conv", w, group=2, pads=[1, 1], strides=[2]))
    w, b = a(3, 2, 2, 1, 3), a(3)
    row("conv 3d", eq.Conv(w, b), (2, 3, 2, 4), expected=correlated(w, b))
    row("conv 3d, all options", eq.Conv(w, b, stride=(1, 2, 1), padding=((1, 0), (0, 0), (0, 2)), dilation=(2, 1, 1)), (2, 3, 3, 3),
        expected=onnx("Conv", w, b, strides=[1, 2, 1], pads=[1, 0, 0, 0, 0, 2], dilations=[2, 1, 1]))
    w = a(4, 1, 2, 2, 2)
    row("conv 3d, depthwise", eq.Conv(w, groups=4), (4, 3, 2, 2), expected=onnx("Conv", w, group=4))

    # ConvTranspose
    w, b = a(4, 3, 3, 2), a(4)
    row("conv transpose 2d", eq.ConvTranspose(w, b), (3, 3, 4), expected=onnx("ConvTranspose", transposed(w), b))
    row("conv transpose 2d, output padding", eq.ConvTranspose(w, b, stride=2, padding=1, output_padding=1), (3, 4, 3),
        expected=onnx("ConvTranspose", transposed(w), b, strides=[2, 2], pads=[1] * 4, output_padding=[1, 1]))
    row("conv transpose 2d, output padding of one axis", eq.ConvTranspose(w, stride=(3, 1), output_padding=(2, 0)), (3, 2, 3),
        expected=onnx("ConvTranspose", transposed(w), strides=[3, 1], output_padding=[2, 0]))
    row("conv transpose 2d, output padding beyond the kernel", eq.ConvTranspose(w, b, stride=5, output_padding=4), (3, 2, 2),
        expected=spread_loops(w, b, (5, 5), (0, 0), (1, 1), 1, (12, 11)))
    w, b = a(4, 2, 3, 2), a(4)
    row("conv transpose 2d, groups", eq.ConvTranspose(w, b, groups=2), (4, 3, 2),
        expected=spread_loops(w, b, (1, 1), (0, 0), (1, 1), 2, (5, 3)))
    row("conv transpose 2d, all options",
        eq.ConvTranspose(w, b, stride=(2, 1), padding=((1, 0), (0, 1)), output_padding=(1, 0), dilation=(1, 2), groups=2), (4, 3, 4),
        expected=spread_loops(w, b, (2, 1), (1, 0), (1, 2), 2, (7, 5)))
    w = a(3, 1, 2, 2)
    row("conv transpose 2d, depthwise", eq.ConvTranspose(w, stride=2, groups=3), (3, 2, 3),
        expected=spread_loops(w, None, (2, 2), (0, 0), (1, 1), 3, (4, 6)))
    w, b = a(2, 4, 3), a(2)
    row("conv transpose 1d", eq.ConvTranspose(w, b, stride=3, output_padding=2), (4, 4),
        expected=onnx("ConvTranspose", transposed(w), b, strides=[3], output_padding=[2]))
    w = a(2, 3, 2, 2, 2)
    row("conv transpose 3d", eq.ConvTranspose(w, stride=2), (3, 2, 2, 3), expected=onnx("ConvTranspose", transposed(w), strides=[2] * 3))

    # BatchNorm
    gamma, beta, mean, var = a(3), a(3), a(3), np.abs(a(3))
    for spatial in ((), (4,), (2, 3), (2, 1, 2)):
        row(f"batchnorm {len(spatial)}d", eq.BatchNorm(gamma, beta, mean, var, eps=2.0**-10), (3, *spatial),
            expected=onnx("BatchNormalization", gamma, beta, mean, var, epsilon=2.0**-10))
    row("batchnorm, default eps", eq.BatchNorm(gamma, beta, mean, var), (3, 2), expected=by_channel(
        lambda x, c, g=gamma, b=beta, m=mean, v=var: float(b[c]) + (x - float(m[c])) * float(g[c]) / math.sqrt(float(v[c]) + 1e-5)))

    # entry by entry
    row("identity", eq.Identity(), (3, 2), expected=onnx("Identity"))
    row("abs", eq.Abs(), (3, 4), expected=entrywise(lambda x: math.copysign(x, 1)))
    row("relu", eq.ReLU(), (3, 4), expected=onnx("Relu"))
    row("leaky relu", eq.LeakyReLU(0.25), (3, 4), expected=onnx("LeakyRelu", alpha=0.25))
    row("leaky relu, negative slope", eq.LeakyReLU(-0.5), (3, 4), expected=entrywise(lambda x: x if x >= 0 else -0.5 * x))
    row("leaky relu, steep", eq.LeakyReLU(2.0), (3, 4), expected=entrywise(lambda x: min(x, 2 * x)))
    slope = a(3)
    row("prelu a channel", eq.PReLU(slope), (3, 2, 2), expected=onnx("PRelu", slope[:, None, None]))
    row("prelu, one slope", eq.PReLU(0.25), (3, 4), expected=onnx("PRelu", np.array([0.25])))
    row("prelu, one slope in an array", eq.PReLU(slope[:1]), (3,), expected=onnx("PRelu", slope[:1]))
    low, high = -0.25 - np.abs(a(3)), 0.25 + np.abs(a(3))
    row("clip", eq.Clip(-0.5, 0.75), (3, 4), expected=onnx("Clip", np.float64(-0.5), np.float64(0.75)))
    row("relu6", eq.ReLU6(), (3, 4), expected=entrywise(lambda x: sorted([0.0, x, 6.0])[1]))
    row("clip a channel", eq.Clip(low, high), (3, 2, 2), expected=by_channel(
        lambda x, c, low=low, high=high: np.median([low[c], x, high[c]])))
    row("clip, one bound a channel", eq.Clip(low, 0.5), (3, 2), expected=by_channel(lambda x, c, low=low: np.median([low[c], x, 0.5])))
    row("clip, one bound in an array", eq.Clip(low[:1], high), (3, 2), expected=by_channel(
        lambda x, c, low=low, high=high: np.median([low[0], x, high[c]])))
    row("clip, open above", eq.Clip(-0.5, math.inf), (3, 4), expected=entrywise(lambda x: max(x, -0.5)))
    row("clip, open below", eq.Clip(-math.inf, high), (3, 4), expected=by_channel(lambda x, c, h=high: min(x, float(h[c]))))

    # over space
    row("maxpool", eq.MaxPool(2), (3, 4, 5), expected=onnx("MaxPool", kernel_shape=[2, 2], strides=[2, 2]))
    row("maxpool, all options", eq.MaxPool((3, 2), stride=(2, 1), padding=((1, 2), (0, 1))), (3, 5, 4),
        expected=onnx("MaxPool", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 2, 1]))
    row("maxpool 1d", eq.MaxPool(3, stride=2, padding=1), (3, 7), expected=onnx("MaxPool", kernel_shape=[3], strides=[2], pads=[1, 1]))
    row("maxpool 3d", eq.MaxPool(2, stride=1), (2, 3, 2, 4), expected=onnx("MaxPool", kernel_shape=[2] * 3, strides=[1] * 3))
    row("maxpool, dilation", eq.MaxPool((2, 3), stride=(1, 2), padding=(0, 1), dilation=(3, 2)), (2, 5, 8),
        expected=onnx("MaxPool", kernel_shape=[2, 3], strides=[1, 2], pads=[0, 1, 0, 1], dilations=[3, 2]))
    row("minpool", eq.MinPool(2), (3, 4, 5), expected=lambda x: (
        np.float64(x)[:, :, :4, :4].reshape(-1, 3, 2, 2, 2, 2).min(axis=(3, 5))))
    row("minpool, all options", eq.MinPool(3, stride=2, padding=((1, 1),), dilation=2), (3, 9), expected=lambda x: np.stack(
        [np.float64(x)[:, :, [i for i in (at, at + 2, at + 4) if 0 <= i < 9]].min(axis=2) for at in (-1, 1, 3, 5)], axis=2))
    for p in (1, 2, 3):
        row(f"lppool, p {p}", eq.LpPool((3, 2), stride=(2, 1), padding=((1, 1), (0, 1)), p=p), (3, 5, 4),
            expected=onnx("LpPool", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1], p=p))
    row("lppool over all of space", eq.LpPool((4, 3)), (2, 4, 3), expected=onnx("ReduceL2", np.array([2, 3])))
    row("lppool, dilation", eq.LpPool(2, stride=1, dilation=2, p=5), (2, 5), expected=lambda x: (
        np.abs(np.float64(x)[:, :, :3]) ** 5 + np.abs(np.float64(x)[:, :, 2:]) ** 5) ** 0.2)
    row("avgpool, dilation", eq.AvgPool(2, stride=1, padding=1, dilation=2, count_include_pad=False), (3, 4, 5),
        expected=onnx("AveragePool", kernel_shape=[2, 2], pads=[1] * 4, dilations=[2, 2], count_include_pad=0))
    for count in (True, False):
        said = "padding counted" if count else "padding not counted"
        row(f"avgpool, {said}", eq.AvgPool((3, 2), stride=(2, 1), padding=((1, 2), (0, 1)), count_include_pad=count), (3, 5, 4),
            expected=onnx("AveragePool", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 2, 1], count_include_pad=int(count)))
        row(f"avgpool 1d, {said}", eq.AvgPool(3, stride=2, padding=((2, 1),), count_include_pad=count), (3, 7),
            expected=onnx("AveragePool", kernel_shape=[3], strides=[2], pads=[2, 1], count_include_pad=int(count)))
        row(f"avgpool 3d, {said}", eq.AvgPool(2, stride=1, padding=1, count_include_pad=count), (2, 3, 2, 2),
            expected=onnx("AveragePool", kernel_shape=[2] * 3, strides=[1] * 3, pads=[1] * 6, count_include_pad=int(count)))
    row("avgpool, default stride", eq.AvgPool(2), (3, 4, 5), expected=lambda x: (
        np.float64(x)[:, :, :4, :4].reshape(-1, 3, 2, 2, 2, 2).sum(axis=(3, 5)) / 4))
    for spatial in ((5,), (3, 4), (2, 3, 2)):
        row(f"global avgpool {len(spatial)}d", eq.GlobalAvgPool(), (3, *spatial), expected=onnx("GlobalAveragePool"))
    row("pad with zero", eq.Pad(((1, 0), (0, 2))), (3, 4, 2), expected=onnx("Pad", np.array([0, 0, 1, 0, 0, 0, 0, 2])))
    row("pad with a constant", eq.Pad(((1, 0), (0, 2)), 1.5), (3, 4, 2),
        expected=onnx("Pad", np.array([0, 0, 1, 0, 0, 0, 0, 2]), np.float64(1.5)))
    row("pad all around", eq.Pad(1, -0.5), (2, 3), expected=lambda x: np.pad(np.float64(x), ((0, 0), (0, 0), (1, 1)), constant_values=-0.5))
    row("upsample", eq.Upsample(2), (2, 2, 3), expected=lambda x: np.kron(np.float64(x), np.ones((1, 1, 2, 2))))
    row("upsample, a factor an axis", eq.Upsample((2, 3)), (2, 2, 3), expected=onnx(
        "Resize", np.zeros(0, np.float32), np.array([1, 1, 2, 3], np.float32), mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor"))

    m = a(3, 4)
    row("blend over the last axis", eq.Blend(m, axis=2), (2, 3, 4), expected=lambda x, m=m: np.einsum("nchw,ow->ncho", np.float64(x), m))
    row("blend over another axis", eq.Blend(m), (2, 4, 3), expected=lambda x, m=m: np.einsum("nchw,oh->ncow", np.float64(x), m))
    row("blend of three axes", eq.Blend(m, axis=2), (2, 2, 4, 3), expected=lambda x, m=m: np.einsum("ncdhw,oh->ncdow", np.float64(x), m))
    row("blend, a sum", eq.Blend(np.ones((1, 4), dtype)), (3, 4), expected=onnx("ReduceSum", np.array([2])))
    row("blend, a running sum", eq.Blend(np.tri(4, dtype=dtype)), (3, 4), expected=onnx("CumSum", np.array(2)))

    # joining and moving channels
    row("sub", eq.Sub(), (3, 2), (3, 2), expected=onnx("Sub"))
    row("sub over space and channels", eq.Sub(), (1, 4, 2), (3, 1, 2), expected=onnx("Sub"))
    row("add one channel to all", eq.Add(), (1, 4, 2), (3, 4, 2), expected=onnx("Add"))
    row("add three, of one channel and of three", eq.Add(), (3, 2), (1, 2), (3, 1), expected=onnx("Sum"))
    for kind, op in (("Max", eq.Max()), ("Min", eq.Min())):
        row(kind.lower(), op, (3, 4), (3, 4), expected=onnx(kind))
        row(f"{kind.lower()} of three, over space", op, (3, 4), (3, 1), (3, 4), expected=onnx(kind))
        row(f"{kind.lower()} with one channel", op, (3, 4), (1, 4), expected=onnx(kind))
    c = a(2, 4)
    row("extend by channels", eq.Extend(c), (3, 4), expected=lambda x, c=c: np.stack(
        [*np.moveaxis(np.float64(x), 1, 0), *(np.broadcast_to(row, (len(x), 4)) for row in c)], axis=1))
    row("extend by channels in front", eq.Extend(c, front=True), (3, 4), expected=lambda x, c=c: np.stack(
        [*(np.broadcast_to(row, (len(x), 4)) for row in c), *np.moveaxis(np.float64(x), 1, 0)], axis=1))
    c = a(3, 1, 2)
    row("extend over space", eq.Extend(c, axis=1, front=True), (3, 4, 2), expected=lambda x, c=c: (
        np.pad(np.float64(x), ((0, 0), (0, 0), (1, 0), (0, 0))) + np.pad(c, ((0, 0), (0, 4), (0, 0)))))
    c = a(3, 2, 2)
    row("extend over the last axis", eq.Extend(c, axis=2), (3, 2, 3), expected=lambda x, c=c: (
        np.pad(np.float64(x), ((0, 0), (0, 0), (0, 0), (0, 2))) + np.pad(c, ((0, 0), (0, 0), (3, 0)))))
    row("add", eq.Add(), (3, 2), (3, 2), expected=onnx("Add"))
    row("add three", eq.Add(), (3, 2), (3, 2), (3, 2), expected=onnx("Sum"))
    row("add over space", eq.Add(), (3, 4, 1), (3, 1, 2), expected=onnx("Add"))
    row("concat", eq.Concat(), (2, 3), (1, 3), (3, 3), expected=onnx("Concat", axis=1))
    row("concat of one", eq.Concat(), (2, 3), expected=onnx("Identity"))
    row("concat without space", eq.Concat(), (2,), (3,), expected=onnx("Concat", axis=1))
    row("flatten", eq.Flatten(), (3, 2, 4), expected=onnx("Flatten"))
    row("flatten flat", eq.Flatten(), (3,), expected=onnx("Flatten"))
    row("unflatten", eq.Unflatten((3, 2, 2)), (12,), expected=lambda x: (
        np.stack([np.stack([np.float64(x)[:, 4 * c:4 * c + 2], np.float64(x)[:, 4 * c + 2:4 * c + 4]], axis=1) for c in range(3)], axis=1)))
    row("transpose of space", eq.Transpose((0, 2, 1)), (3, 2, 4), expected=onnx("Transpose", perm=[0, 1, 3, 2]))
    row("transpose, channels last", eq.Transpose((1, 2, 0)), (3, 2, 4), expected=onnx("Transpose", perm=[0, 2, 3, 1]))
    row("transpose in 1d", eq.Transpose((1, 0)), (3, 2), expected=lambda x: np.einsum("ncl->nlc", np.float64(x)))
    for start, stop in ((1, 3), (0, 4), (-3, -1), (1, -1), (-2, 4)):
        row(f"slice {start}:{stop}", eq.Slice(start, stop), (4, 2), expected=onnx("Slice", *(np.array([i]) for i in (start, stop, 1))))
    row("permute", eq.Permute((2, 0, 3, 1)), (4, 2), expected=onnx("Gather", np.array([2, 0, 3, 1]), axis=1))
    row("permute, channel shuffle", eq.Permute((0, 3, 1, 4, 2, 5)), (6, 2), expected=lambda x: (
        np.float64(x).reshape(-1, 2, 3, 2).transpose(0, 2, 1, 3).reshape(-1, 6, 2)))

    row("rearrange, depth to space", eq.Rearrange(((2, 2, 2), (2,), (3,)), ((2,), (3, 0), (4, 1))), (8, 2, 3),
        expected=onnx("DepthToSpace", blocksize=2))
    row("rearrange, space to depth", eq.Rearrange(((2,), (2, 2), (3, 2)), ((2, 4, 0), (1,), (3,))), (2, 4, 6),
        expected=onnx("SpaceToDepth", blocksize=2))
    row("rearrange, some channels into space", eq.Rearrange(((2, 3), (4,)), ((2, 0), (1,))), (6, 4),
        expected=lambda x: np.stack([np.float64(x)[:, 3 * i:3 * i + 3, j] for j in range(4) for i in range(2)], axis=1))
    row("rearrange, space by space", eq.Rearrange(((2,), (3,), (4,)), ((0,), (2, 1))), (2, 3, 4), expected=lambda x: np.stack(
        [np.float64(x)[:, :, i, j] for j in range(4) for i in range(3)], axis=2))
    row("take channels, one twice", eq.Take((2, 0, 2)), (3, 2), expected=onnx("Gather", np.array([2, 0, 2]), axis=1))
    row("take backwards over space", eq.Take((3, 1), axis=2), (3, 2, 4), expected=lambda x: np.float64(x)[:, :, :, 3:0:-2])
    row("take backwards, but for the first channel", eq.Take((2, 1)), (3, 2), expected=lambda x: np.float64(x)[:, 2:0:-1]),
    row("take, reflected over space", eq.Take((2, 1, 0, 1, 2, 3, 2), axis=1), (2, 4), expected=lambda x: np.pad(
        np.float64(x), ((0, 0), (0, 0), (2, 1)), mode="reflect"))
    row("concat over space", eq.Concat(axis=1), (3, 2, 4), (3, 1, 4), expected=onnx("Concat", axis=2))
    row("concat three over the last axis", eq.Concat(axis=2), (2, 2, 1), (2, 2, 2), (2, 2, 3), expected=onnx("Concat", axis=3))
    c, d = a(3, 2, 1), a(1, 2, 4)
    row("affine over space", eq.Affine(c, d), (3, 2, 4), expected=lambda x, c=c, d=d: np.float64(x) * c + d)
    c = a(1, 4)
    row("affine, a mask", eq.Affine((c > 0).astype(dtype), np.zeros((3, 1), dtype)), (3, 4),
        expected=lambda x, c=c: np.where(c > 0, x, 0.0))

    # blocking
    row("sigmoid", eq.Sigmoid(), (3, 4), expected=entrywise(lambda x: (1 + math.tanh(x / 2)) / 2))
    row("tanh", eq.Tanh(), (3, 4), expected=entrywise(lambda x: math.sinh(x) / math.cosh(x)))
    row("silu", eq.SiLU(), (3, 4), expected=entrywise(lambda x: x / (1 + math.exp(-x))))
    row("hardswish", eq.HardSwish(), (3, 4), expected=entrywise(lambda x: 0 if x <= -3 else x if x >= 3 else x * (x + 3) / 6))
    row("gelu", eq.GELU(), (3, 4), expected=entrywise(lambda x: x * math.erfc(-x / math.sqrt(2)) / 2))
    row("gelu, approximate", eq.GELU(approximate=True), (3, 4), expected=entrywise(
        lambda x: x / (1 + math.exp(-math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)))))
    c = np.exp2(a(3))
    for inner, name in ((eq.SiLU(), "silu"), (eq.HardSwish(), "hardswish"), (eq.GELU(), "gelu")):
        row(f"{name} with a slope a channel", eq.Sloped(inner, c), (3, 4), expected=by_channel({
            "silu": lambda x, i, c=c: x / (1 + math.exp(-x * float(c[i]))),
            "hardswish": lambda x, i, c=c: x * sorted([0, x * float(c[i]) / 6 + 0.5, 1])[1],
            "gelu": lambda x, i, c=c: x * math.erfc(-x * float(c[i]) / math.sqrt(2)) / 2}[name]))
    row("gelu with one slope", eq.Sloped(eq.GELU(approximate=True), 0.5), (3,), expected=entrywise(
        lambda x: x / (1 + math.exp(-math.sqrt(8 / math.pi) * (x / 2 + 0.044715 * x**3 / 8)))))
    row("erf", eq.Erf(), (3, 4), expected=entrywise(math.erf))
    row("hardsigmoid", eq.HardSigmoid(), (3, 4), expected=entrywise(lambda x: sorted([0, 0.2 * x + 0.5, 1])[1]))
    row("hardsigmoid, alpha and beta", eq.HardSigmoid(0.125, 0.25), (3, 4), expected=onnx("HardSigmoid", alpha=0.125, beta=0.25))
    for axis in (1, 2, -1):
        row(f"softmax over axis {axis}", eq.Softmax(axis), (3, 2, 4), expected=onnx("Softmax", axis=axis))
    row("softmax without space", eq.Softmax(), (4,), expected=onnx("Softmax", axis=1))
    row("mul", eq.Mul(), (3, 2), (3, 2), expected=onnx("Mul"))
    row("mul three", eq.Mul(), (3,), (3,), (3,), expected=lambda x, y, z: np.exp(
        np.log(np.abs(np.float64(x))) + np.log(np.abs(y)) + np.log(np.abs(z))) * np.sign(x) * np.sign(y) * np.sign(z))
    row("mul with one channel", eq.Mul(), (3, 4), (1, 4), expected=onnx("Mul"))
    row("mul over space", eq.Mul(), (3, 2, 4), (3, 1, 1), expected=onnx("Mul"))
    c = np.where(np.arange(12).reshape(3, 1, 4) % 5 == 1, -np.inf, a(3, 1, 4)).astype(dtype)
    row("softmax with a mask", eq.Softmax(-1, c), (3, 2, 4), expected=lambda x, c=c: onnx("Softmax", axis=-1)(np.float64(x) + c))
    row("softmax, causal", eq.Softmax(-1, "causal"), (2, 3, 4), expected=causal)

    # normalisations
    w, b = a(4), a(4)
    eps = 2.0**-10  # ONNX holds it in single precision
    row("layernorm", eq.LayerNorm(w, b, eps), (4,), expected=onnx("LayerNormalization", w, b, epsilon=eps))
    row("layernorm of tokens", eq.LayerNorm(w, eps=0.5), (4, 3, 2), expected=features_last(onnx("LayerNormalization", w, epsilon=0.5)))
    row("rmsnorm", eq.RMSNorm(w, eps=eps), (4, 3), expected=features_last(onnx("RMSNormalization", w, opset=23, epsilon=eps)))
    def affine(x, w=w, b=b):
        return by_channel(lambda v, i: v * float(w[i]) + float(b[i]))(x)

    row("rmsnorm with beta", eq.RMSNorm(w, b, 0.25), (4, 3), expected=lambda x: affine(
        np.float64(x) / np.linalg.norm(np.concatenate([np.float64(x), np.full((len(x), 4, 3), 0.5)], axis=1), axis=1, keepdims=True) * 2))
    row("groupnorm", eq.GroupNorm(2, w, b, eps), (4, 3, 2), expected=lambda x: affine(
        onnx("LayerNormalization", np.ones(12), epsilon=eps)(x.reshape(len(x), 2, 12)).reshape(x.shape)))
    row("groupnorm without space, an eps a group", eq.GroupNorm(2, w, eps=np.array([0.5, 2.0])), (4,),
        expected=lambda x, w=w: np.concatenate([
            onnx("LayerNormalization", w[i:i + 2], epsilon=e)(x[:, i:i + 2]) for i, e in ((0, 0.5), (2, 2.0))], axis=1))
    row("instancenorm", eq.InstanceNorm(w, b, eps), (4, 3, 2), expected=onnx("InstanceNormalization", w, b, epsilon=eps))

    # attention
    row("scores", eq.Scores(2, scale=0.25), (6, 4), (6, 3), expected=lambda q, k: scored(q, k, 2, 2, 0.25))
    row("scores of grouped queries, windows", eq.Scores(4, 2), (8, 2, 3), (4, 2, 3), expected=lambda q, k: scored(q, k, 4, 2, 1.0))
    row("mix", eq.Mix(2), (2, 4, 3), (6, 3), expected=lambda p, v: mixed(p, v, 2, 2))
    row("mix of grouped queries, windows", eq.Mix(4, 2), (4, 2, 3, 5), (2, 2, 5), expected=lambda p, v: mixed(p, v, 4, 2))
    angle = a(2, 3)
    for interleaved in (False, True):
        row(f"rotary, {'interleaved' if interleaved else 'halves'}", eq.Rotary(2, np.cos(angle), np.sin(angle), interleaved), (10, 3),
            expected=lambda x, angle=angle, interleaved=interleaved: turned(x, angle, 2, interleaved))
    return rows


CASES = [*table(np.float32), *table(np.float64)]
IN_FLOAT64 = [case for case in CASES if case.dtype == np.float64]
WEIGHTED = [case for case in CASES if isinstance(case.op, eq.Weighted)]
