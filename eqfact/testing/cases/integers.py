"""Level 6: which whole numbers does a quantized network compute?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from eqfact import ops
from eqfact.calibration import calibrate
from eqfact.graph import Graph, Node, values
from eqfact.ops import Array
from eqfact.ops.grid import Grid
from eqfact.quantization import quantize, stored_values
from eqfact.quantizers import FakeQuantize, UniformQuantizer
from eqfact.testing.cases.case import Case, Draw
from eqfact.testing.cases.networks import IMAGE, cast
from eqfact.testing.wire import arrays_json, network_json
from eqfact.testing.wiring import wired

LAW = "n = sum (q_x - z_x) (q_w - z_w) + q_b, q_y = clip(round(n (s_x s_w) / s_y) + z_y, qmin, qmax), whole number by whole number"


def cases() -> Iterator[Case]:
    """The cases of this level."""
    for i, (name, (build, options, why)) in enumerate(TABLE.items()):
        dtype = ("float32", "float64")[i % 2]
        yield _case(f"6/{name}-{dtype}", name, build(Draw(f"6/{name}")), dtype, options, why)
        if name in ("dense", "conv", "residual"):
            other = ("float64", "float32")[i % 2]
            yield _case(f"6/{name}-{other}", name, build(Draw(f"6/{name}")), other, options, why)
    yield _halves()


def _case(name: str, row: str, net: Graph, dtype: str, options: dict[str, Any], why: str) -> Case:
    graph = net.with_ops({node.name: cast(node.op, dtype) for node in net.nodes})
    draw = Draw(f"data {row}")
    x = {value: draw.uniform((4, *shape), -2.0, 2.0).astype(dtype) for value, shape in graph.inputs.items()}
    weights = UniformQuantizer(options.get("weights", 8), granularity=options.get("granularity", "per_tensor"))
    activations = UniformQuantizer(8, symmetric=options.get("symmetric", False))
    seen = calibrate(graph, x)
    # to sixteenths, which no rounding of a sum moves
    ranges = {value: (np.floor(16 * seen[value].min.min()) / 16, np.ceil(16 * seen[value].max.max()) / 16)
              for value in stored_values(graph, outputs=True)}
    quantized = quantize(graph, weights=weights, activations=activations, ranges=ranges, outputs=True)
    wider = {value: (of * 1.25).astype(dtype) for value, of in x.items()}  # so that grids saturate
    every = values(quantized, wider)
    asked, expected = [], {}
    for node in quantized.nodes:
        if isinstance(node.op, FakeQuantize) and node.op.grid.scale.size == 1:
            grid = node.op.grid
            asked.append(node.name)
            expected[node.name] = np.clip(np.rint(every[node.name] / grid.scale.item() + grid.zero_point.item()), grid.qmin,
                                          grid.qmax).astype(np.int32)
    request = {"network": network_json(quantized), "inputs": arrays_json(wider), "stored": asked}
    return Case(name, "quantized_forward", request, {"judge": "arrays", "answer": {"integers": arrays_json(expected)}}, LAW,
                "docs/integers.md", why)


def _halves() -> Case:
    """A layer of which every other sum lies just between two steps: ``M = 1/2``, with scales that no sum of products keeps to."""
    draw = Draw("halves")
    s_x, s_w = np.float32(0.0317), np.float32(0.0053)
    step = s_x * s_w
    q_w = np.array([[draw.below(255) - 127 for _ in range(24)] for _ in range(4)])
    q_b = np.array([draw.below(2001) - 1000 for _ in range(4)])
    read = Grid(np.array([s_x]), np.array([128.0]), 0, 255)
    made = Grid(np.array([2 * step]), np.array([0.0]), -2**15, 2**15 - 1)
    of_weights = Grid(np.array([[s_w]]), np.array([[0.0]]), -128, 127)
    layer = ops.Dense(of_weights.dequantize(q_w).astype(np.float32), (q_b * float(step)).astype(np.float32), grid=of_weights)
    net = Graph({"x": (24,)}, (Node("q", FakeQuantize(read), ("x",)), Node("y.float", layer, ("q",)),
                               Node("y", FakeQuantize(made, np.array([step])), ("y.float",))), ("y",))
    q_x = np.array([[draw.below(256) for _ in range(24)] for _ in range(8)])
    n = (q_x - 128) @ q_w.T + q_b
    q_y = np.clip(np.rint(n / 2), made.qmin, made.qmax).astype(np.int32)
    request = {"network": network_json(net), "inputs": arrays_json({"x": read.dequantize(q_x).astype(np.float32)}), "stored": ["q", "y"]}
    return Case("6/halves-float32", "quantized_forward", request,
                {"judge": "arrays", "answer": {"integers": arrays_json({"q": q_x.astype(np.int32), "y": q_y})}}, LAW, "docs/integers.md",
                "sums rounded in float, where a step lies between two numbers")


def _rows(d: Draw, out: int, *shape: int) -> Array:
    rows: Array = d.uniform((out, *shape), -1.0, 1.0) * np.array([2.0 ** -d.below(3) for _ in range(out)]).reshape(out, *(1,) * len(shape))
    return rows


def _dense(d: Draw, out: int, channels: int) -> ops.Dense:
    return ops.Dense(_rows(d, out, channels), d.uniform((out,), -0.5, 0.5))


def _conv(d: Draw, out: int, channels: int, kernel: int = 1, **options: Any) -> ops.Conv:
    return ops.Conv(_rows(d, out, channels // options.get("groups", 1), kernel, kernel), d.uniform((out,), -0.5, 0.5), **options)


#: How to build the float network, how it is quantized, and the bug that is looked for.
TABLE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "dense": (lambda d: Graph.chain((5,), a=_dense(d, 6, 5), r=ops.ReLU(), y=_dense(d, 3, 6)), {},
              "rounded in float, not as a whole number"),
    "dense-channels": (lambda d: Graph.chain((5,), a=_dense(d, 6, 5), r=ops.ReLU(), y=_dense(d, 3, 6)), {"granularity": "per_channel"},
                       "one multiplier for all channels"),
    "no-bias": (lambda d: Graph.chain((5,), a=ops.Dense(_rows(d, 6, 5)), y=ops.Dense(_rows(d, 3, 6))), {},
                "a bias that is read where none is"),
    "no-activation": (lambda d: Graph.chain((5,), a=_dense(d, 4, 5), y=_dense(d, 3, 4)), {}, "a zero point that is taken for 0"),
    "conv": (lambda d: Graph.chain(IMAGE, a=_conv(d, 3, 2, 3, padding=1), r=ops.ReLU(), y=_conv(d, 2, 3)), {},
             "padding with the whole number 0 in the place of the zero point"),
    "conv-stride": (lambda d: Graph.chain(IMAGE, a=_conv(d, 3, 2, 2, stride=2), r=ops.ReLU(), y=_conv(d, 2, 3)),
                    {"granularity": "per_channel"},
                    "a stride of 1"),
    "depthwise": (lambda d: Graph.chain(IMAGE, a=_conv(d, 3, 2), r=ops.ReLU6(), b=_conv(d, 3, 3, 3, groups=3, padding=1), s=ops.ReLU6(),
                                        y=_conv(d, 2, 3)),
                  {}, "a depthwise sum over all channels"),
    "grouped": (lambda d: Graph.chain(IMAGE, a=_conv(d, 4, 2), b=_conv(d, 4, 4, 2, groups=2), y=_conv(d, 2, 4)), {}, "groups interleaved"),
    "transposed": (lambda d: Graph.chain((2, 2, 2), a=_conv(d, 3, 2),
                                         t=ops.ConvTranspose(_rows(d, 2, 3, 2, 2), d.uniform((2,), -0.5, 0.5), stride=2)),
                   {}, "the axes of a transposed convolution"),
    "relu6": (lambda d: Graph.chain((5,), a=ops.Dense(_rows(d, 6, 5) * 8, d.uniform((6,), -1, 1)), r=ops.ReLU6(), y=_dense(d, 3, 6)), {},
              "a clip in float, before rounding"),
    "clip-channels": (lambda d: Graph.chain((5,), a=_dense(d, 4, 5),
                                            r=ops.Clip(np.array([-0.5, 0.0, -0.25, -1.0]), np.array([0.5, 1.0, 0.3, 0.2])),
                                            y=_dense(d, 3, 4)), {},
                                            "a clip with one bound, or with bounds that are not rounded to the grid"),
    "residual": (lambda d: wired(IMAGE, "y", ("a", _conv(d, 3, 2), "x"), ("r", ops.ReLU(), "a"), ("b", _conv(d, 3, 3), "r"),
                                  ("s", ops.Add(), "r b"),
                                  ("t", ops.ReLU(), "s"), ("y", _conv(d, 2, 3), "t")), {}, "whole numbers of two grids added"),
    "concat": (lambda d: wired(IMAGE, "y", ("a", _conv(d, 2, 2), "x"), ("b", _conv(d, 3, 2), "x"), ("r", ops.ReLU(), "b"),
                                ("s", ops.Concat(), "a r"),
                                ("y", _conv(d, 2, 5), "s")), {}, "whole numbers of two grids side by side"),
    "fan-out": (lambda d: wired(IMAGE, "y", ("a", _conv(d, 3, 2), "x"), ("r", ops.ReLU(), "a"), ("b", _conv(d, 3, 3), "a"),
                                 ("s", ops.Add(), "r b"),
                                 ("y", _conv(d, 2, 3), "s")), {}, "a ReLU fused with a layer that something else reads, too"),
    "maxpool": (lambda d: Graph.chain(IMAGE, a=_conv(d, 3, 2), r=ops.ReLU(), p=ops.MaxPool(2, stride=2), y=_conv(d, 2, 3)), {},
                "a pool on another grid"),
    "flatten": (lambda d: Graph.chain(IMAGE, a=_conv(d, 2, 2, 3), r=ops.ReLU(), f=ops.Flatten(), y=_dense(d, 3, 8)), {},
                "flatten channel-last"),
    "pad": (lambda d: Graph.chain(IMAGE, a=_conv(d, 3, 2), p=ops.Pad(1), y=_conv(d, 2, 3, 3)), {}, "padding with the whole number 0"),
    "upsample": (lambda d: Graph.chain((2, 2, 2), a=_conv(d, 3, 2), u=ops.Upsample(2), y=_conv(d, 2, 3)), {}, "rounded once more"),
    "slice": (lambda d: Graph.chain(IMAGE, a=_conv(d, 4, 2), u=ops.Slice(1, 3), y=_conv(d, 2, 2)), {},
              "another grid for some of the channels"),
    "product": (lambda d: wired((4,), "y", ("a", _dense(d, 3, 4), "x"), ("b", _dense(d, 3, 4), "x"), ("p", ops.Mul(), "a b"),
                                 ("y", _dense(d, 2, 3), "p")),
                {}, "whole numbers multiplied, zero points with them"),
    "difference": (lambda d: wired((4,), "y", ("a", _dense(d, 3, 4), "x"), ("b", _dense(d, 3, 4), "x"), ("p", ops.Sub(), "a b"),
                                    ("y", _dense(d, 2, 3), "p")),
                   {}, "zero points that do not cancel"),
    "shared": (lambda d: _shared(d), {}, "one bias for two input scales"),
    "four-bits": (lambda d: Graph.chain((5,), a=_dense(d, 6, 5), r=ops.ReLU(), y=_dense(d, 3, 6)), {"weights": 4},
                  "8 bits taken for granted"),
    "symmetric": (lambda d: Graph.chain((5,), a=_dense(d, 6, 5), r=ops.ReLU(), y=_dense(d, 3, 6)), {"symmetric": True},
                  "unsigned activations taken for granted"),
    "many": (lambda d: Graph.chain((96,), a=_dense(d, 3, 96), y=_dense(d, 2, 3)), {}, "sums in 16 bits, or a float sum that is off by one"),
    "tiny-channel": (lambda d: Graph.chain((4,), a=ops.Dense(_rows(d, 3, 4) * np.array([[1.0], [1e-6], [1.0]]),
                                                             np.array([0.25, 1.0, -0.5])),
                                           r=ops.ReLU(), y=_dense(d, 2, 3)), {"granularity": "per_channel"}, "int32 sums that wrap"),
    "dead": (lambda d: Graph.chain((4,), a=ops.Dense(_rows(d, 3, 4) * np.array([[1.0], [0.0], [1.0]]), np.array([0.25, 0.0, -0.5])),
                                   r=ops.ReLU(),
                                   y=_dense(d, 2, 3)), {"granularity": "per_channel"}, "NaN in a row of zeros"),
}


def _shared(d: Draw) -> Graph:
    op = _dense(d, 3, 3)
    return wired((3,), "y", ("a", op, "x"), ("r", ops.ReLU(), "a"), ("b", op, "r"), ("y", _dense(d, 2, 3), "b"))
