"""Level 0: what does every op compute? One small network an op and an option, and the ways in which nodes can be connected."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from eqfact import ops
from eqfact.graph import Graph, Node
from eqfact.ops import Array, Op, Shape
from eqfact.testing.cases import exact, networks
from eqfact.testing.cases.case import Case, Draw, Json
from eqfact.testing.laws import rounding_bounds
from eqfact.testing.wire import array_json, arrays_json, network_json

DTYPES = ("float32", "float64")
#: Networks that are no chains.
CONNECTIONS = ("fan-out", "residual", "concat-input", "concat-twice", "shared", "recurrent", "two-inputs", "two-outputs", "inner-output")


@dataclass(frozen=True, eq=False)
class Row:
    """An op to ask for, on inputs of these shapes."""

    name: str
    op: Op
    shapes: tuple[Shape, ...]
    law: str
    why: str
    source: str = "docs/porting.md, Ops"
    #: Whether the result is rounded at all: then it is judged within a bound.
    rounds: bool = False
    #: The largest input, and how many binary places inputs have.
    largest: float = 2.0
    bits: int = 3


def cases() -> Iterator[Case]:
    """The cases of this level."""
    for i, row in enumerate(rows()):
        for dtype in DTYPES if row.rounds else [DTYPES[i % 2]]:
            yield _case(row, dtype)
    for i, net in enumerate(networks.all_networks()):
        if net.name in CONNECTIONS:
            dtype = DTYPES[i % 2]
            yield asked(f"0/network-{net.name}-{dtype}", net.graph(dtype), net.inputs(dtype), net.law, "docs/porting.md, Networks", net.why)
    yield from _refusals()


def asked(name: str, graph: Graph, inputs: dict[str, Array], law: str, source: str, why: str, rounds: bool = False) -> Case:
    """A case that asks for the outputs of a network: equal to the bit, or within the bound on roundings where the network rounds."""
    dtype = next(iter(inputs.values())).dtype
    made = exact.values(graph, inputs)
    outputs = {output: exact.rounded(made[output], dtype) for output in graph.outputs}
    expected: Json = {"judge": "arrays", "answer": {"outputs": arrays_json(outputs)}}
    if rounds:
        expected["within"] = {name: power_of_two(bound) for name, bound in rounding_bounds(graph, inputs).items() if name in outputs}
    else:  # nothing is rounded, in whatever order it is added up
        assert all((made[output].astype(np.float64) == outputs[output]).all() for output in outputs), name
    return Case(name, "forward", {"network": network_json(graph), "inputs": arrays_json(inputs)}, expected, law, source, why)


def power_of_two(bound: Array) -> float:
    """The largest of a bound, rounded up to a power of two: the same on machines that differ in the last bit."""
    largest = float(bound.max(initial=0.0))
    return 2.0 ** math.ceil(math.log2(largest)) if largest > 0 else 0.0


def _case(row: Row, dtype: str) -> Case:
    draw = Draw(f"0/{row.name}")
    inputs = {f"x{i}": draw.dyadic((2, *shape), row.largest, row.bits).astype(dtype) for i, shape in enumerate(row.shapes)}
    inputs["x0"].flat[::5] *= 0  # zeros are where activations turn
    graph = Graph(dict(zip(inputs, row.shapes, strict=True)), (Node("y", networks.cast(row.op, dtype), tuple(inputs)),), ("y",))
    return asked(f"0/{row.name}-{dtype}", graph, inputs, row.law, row.source, row.why, row.rounds)


def _refusals() -> Iterator[Case]:
    w = np.ones((2, 3))
    fine = network_json(Graph.chain((3,), y=ops.Dense(w)))

    def changed(**entries: Any) -> Json:
        return {**fine, "nodes": [{**fine["nodes"][0], **entries}]}

    def dense(weight: Array) -> Json:
        return {"Dense": {"weight": {"array": array_json(weight)}, "bias": None, "grid": None}}

    x = {"x": array_json(np.ones((1, 3)))}
    two = network_json(Graph({"x": (3,)}, (Node("a", ops.Dense(w), ("x",)), Node("y", ops.Add(), ("a", "a"))), ("y",)))
    add = {**two, "nodes": [two["nodes"][0], {**two["nodes"][1], "inputs": ["a", "x"]}]}
    image = network_json(Graph.chain((1, 3, 3), y=ops.Conv(np.ones((1, 1, 3, 3)))))
    small = {**image, "inputs": {"x": [1, 2, 2]}}
    bad = dense(np.array([[1.0, np.nan, 1.0], [1.0, 1.0, 1.0]]))
    for name, network, inputs, law, why in (
        ("unknown-value", changed(inputs=["z"]), x, "a node reads inputs and nodes before it", "a name misspelt, taken for a zero"),
        ("unknown-op", changed(op={"Dens": {}}), x, "an op is one of the table", "an unknown op skipped, as if it were Identity"),
        ("wrong-channels", changed(op=dense(np.ones((2, 4)))), x, "Dense with weight (out, in) reads in channels",
         "weights broadcast, or cut off, where channels do not fit"),
        ("add-unequal", add, x, "Add needs equal channel counts, or one", "channels broadcast, or repeated in turn"),
        ("kernel-too-large", small, {"x": array_json(np.ones((1, 1, 2, 2)))}, "a window fits into its padded input",
         "an empty or negative size"),
        ("nan-weight", changed(op=bad), x, "weights are finite", "NaN that spreads, and later passes for a range"),
        ("wrong-input", fine, {"x": array_json(np.ones((1, 4)))}, "inputs have the shape that the network states", "inputs cut off"),
        ("missing-input", fine, {}, "every input is given", "a missing input taken for zeros"),
    ):
        yield Case(f"0/refuse-{name}", "forward", {"network": network, "inputs": inputs}, {"judge": "refusal"}, law,
                   "docs/porting.md, Refusals", why)


def rows() -> list[Row]:
    """The table of ops."""
    d = Draw("ops")

    def w(*shape: int) -> Array:
        return d.dyadic(shape, 1.0, 3)

    half = np.array([0.5, -0.25, 1.5])
    image = ((3, 5, 4),)
    conv = "y[o] = b[o] + sum w[o, i, t] x[i, stride * p + dilation * t - padding]"
    transposed = "every entry of x is spread over the kernel"
    pool, curve = "each window by itself", "y = g(x), entry by entry"
    rope = np.array([[1.0, 0.5, -0.5], [0.25, 1.0, 0.0]]), np.array([[0.0, 0.5, 0.25], [-1.0, 0.5, 0.125]])
    minus = -math.inf
    mask = np.array([[[0.0, minus, minus], [0.5, 0.0, minus], [0.0, -1.0, 0.25]]])
    table = [
        Row("dense", ops.Dense(w(3, 4), w(3)), ((4,),), "y = W x + b", "the transposed weight"),
        Row("dense-no-bias", ops.Dense(w(3, 4)), ((4,),), "y = W x", "a bias where none is"),
        Row("dense-square", ops.Dense(w(3, 3), w(3)), ((3,),), "y = W x + b", "the transposed weight, which a square one hides"),
        Row("conv1d", ops.Conv(w(3, 2, 3), w(3)), ((2, 6),), conv, "one axis of space taken for channels"),
        Row("conv2d", ops.Conv(w(4, 3, 3, 2), w(4)), image, conv, "kernel axes exchanged, or the kernel turned round"),
        Row("conv3d", ops.Conv(w(2, 2, 2, 1, 2)), ((2, 3, 2, 3),), conv, "three axes of space"),
        Row("conv-stride", ops.Conv(w(2, 3, 2, 2), w(2), stride=(2, 1)), image, conv, "strides of the axes exchanged"),
        Row("conv-padding", ops.Conv(w(2, 3, 3, 3), padding=1), image, conv, "padding forgotten"),
        Row("conv-padding-sides", ops.Conv(w(2, 3, 3, 3), padding=((2, 0), (1, 1))), image, conv, "padding before taken for padding after"),
        Row("conv-dilation", ops.Conv(w(2, 3, 2, 2), w(2), dilation=(2, 3)), image, conv, "dilations exchanged or forgotten"),
        Row("conv-same", ops.Conv(w(2, 3, 3, 3), w(2), stride=2, padding=((0, 1), (1, 1))), image, conv,
            "TensorFlow's SAME taken for padding=1"),
        Row("conv-groups", ops.Conv(w(6, 2, 2, 2), w(6), groups=2), ((4, 3, 3),), conv, "groups interleaved, or read as one"),
        Row("conv-depthwise", ops.Conv(w(3, 1, 3, 3), w(3), groups=3), image, conv, "a depthwise kernel for all channels"),
        Row("conv-depthwise-multiplier", ops.Conv(w(6, 1, 2, 2), groups=3), image, conv, "outputs ordered by multiplier, not by channel"),
        Row("transposed1d", ops.ConvTranspose(w(2, 3, 3), w(2), stride=2), ((3, 3),), transposed, "(in, out) taken for (out, in)"),
        Row("transposed2d", ops.ConvTranspose(w(3, 2, 3, 2), w(3), stride=(2, 1), padding=1), ((2, 3, 3),), transposed, "a flipped kernel"),
        Row("transposed-square", ops.ConvTranspose(w(2, 2, 2, 2)), ((2, 2, 2),), transposed, "(in, out), which a square weight hides"),
        Row("transposed-output-padding", ops.ConvTranspose(w(2, 2, 2, 2), stride=2, padding=((1, 0), (0, 1)), output_padding=1),
            ((2, 2, 2),), transposed, "output_padding added on the wrong side"),
        Row("transposed-groups", ops.ConvTranspose(w(4, 2, 2, 2), w(4), groups=2, stride=2), ((4, 2, 2),), transposed,
            "the wrong axis of a grouped transposed convolution (torch.ao)"),
        Row("transposed-depthwise", ops.ConvTranspose(w(3, 1, 2, 2), groups=3), ((3, 2, 2),), transposed, "groups forgotten"),
        Row("transposed-dilation", ops.ConvTranspose(w(2, 2, 2, 2), dilation=2), ((2, 2, 2),), transposed, "dilation forgotten"),
        Row("batchnorm", ops.BatchNorm(half, w(3), w(3), np.array([0.75, 3.75, 15.75]), eps=0.25), image,
            "y = gamma (x - mean) / sqrt(var + eps) + beta", "eps outside the root"),
        Row("batchnorm-vector", ops.BatchNorm(half, w(3), w(3), np.array([0.75, 3.75, 0.0]), eps=0.25), ((3,),),
            "y = gamma (x - mean) / sqrt(var + eps) + beta", "a variance of 0; values without space"),
        Row("batchnorm-rounds", ops.BatchNorm(half, w(3), w(3), np.array([0.5, 1.25, 3.0]), eps=1e-5), image,
            "y = gamma (x - mean) / sqrt(var + eps) + beta", "the eps of another framework (1e-3)", rounds=True),
        Row("layernorm", ops.LayerNorm(half, w(3), 0.25), ((3, 4),), "channels by themselves at each place", "space normalised, too",
            rounds=True),
        Row("layernorm-no-beta", ops.LayerNorm(half), ((3,),), "channels by themselves", "the variance of a sample, n - 1", rounds=True),
        Row("rmsnorm", ops.RMSNorm(half, eps=0.25), ((3, 4),), "y = gamma x / sqrt(mean x^2 + eps)", "the mean taken off", rounds=True),
        Row("groupnorm", ops.GroupNorm(2, w(4), w(4), 0.25), ((4, 3, 2),), "each group over its channels and space",
            "groups interleaved, or each place by itself", rounds=True),
        Row("instancenorm", ops.InstanceNorm(half, w(3), 0.25), image, "each channel over space", "the batch normalised, too", rounds=True),
        Row("identity", ops.Identity(), image, "y = x", "a copy left out"),
        Row("abs", ops.Abs(), image, "y = |x|", "taken for ReLU"),
        Row("relu", ops.ReLU(), image, "y = max(x, 0)", "the sign lost"),
        Row("leakyrelu", ops.LeakyReLU(0.25), image, "y = x, or slope x below 0", "the slope on the wrong side"),
        Row("leakyrelu-steep", ops.LeakyReLU(2.0), image, "y = x, or slope x below 0",
            "max(x, slope x), which is another for slopes above 1"),
        Row("leakyrelu-negative", ops.LeakyReLU(-0.5), image, "y = x, or slope x below 0", "max(x, slope x), which is another below 0"),
        Row("prelu", ops.PReLU(half), image, "a slope for each channel", "slopes along the last axis"),
        Row("prelu-one", ops.PReLU(np.array([0.25])), image, "one slope for all channels", "one slope taken for the first channel's"),
        Row("prelu-vector", ops.PReLU(half), ((3,),), "a slope for each channel", "values without space"),
        Row("clip", ops.Clip(-0.5, 1.5), image, "y = min(max(x, low), high)", "bounds exchanged"),
        Row("relu6", ops.ReLU6(), image, "y = min(max(x, 0), 6)", "ReLU6 taken for ReLU", largest=16.0, bits=1),
        Row("clip-channels", ops.Clip(-half**2, half**2 + 0.25), image, "bounds for each channel", "bounds along the last axis"),
        Row("clip-open", ops.Clip(minus, 0.5), image, "an open side", "minus infinity as a number that is quantized or multiplied by 0"),
        Row("clip-open-above", ops.Clip(np.array([0.0, -1.0, 0.5]), math.inf), image, "an open side", "infinity times 0"),
        Row("affine", ops.Affine(w(3, 1, 4), w(1, 5, 4)), image, "y = slope x + shift, broadcast", "shift before slope"),
        Row("maxpool", ops.MaxPool(2), image, pool, "the last, incomplete window kept"),
        Row("maxpool-padding", ops.MaxPool(3, stride=2, padding=1), ((2, 4, 4),), pool, "padding that counts as zeros"),
        Row("maxpool-dilation", ops.MaxPool((2, 2), stride=1, dilation=2), image, pool, "dilation forgotten"),
        Row("minpool", ops.MinPool(2, stride=1, padding=((1, 0), (0, 1))), image, pool, "taken for MaxPool; padding that counts"),
        Row("avgpool", ops.AvgPool(2), image, pool, "a sum taken for a mean"),
        Row("avgpool-rectangle", ops.AvgPool((4, 1), stride=(1, 2)), image, pool, "axes exchanged"),
        Row("avgpool-padding", ops.AvgPool(2, stride=2, padding=1), ((2, 4, 4),), pool, "padding left out of the count"),
        Row("avgpool-exclude", ops.AvgPool(2, stride=2, padding=1, count_include_pad=False), ((2, 4, 4),), pool, "padding counted"),
        Row("avgpool-three", ops.AvgPool(3, stride=1, padding=1, count_include_pad=False), image, pool, "border windows divided by 9",
            rounds=True),
        Row("lppool-1", ops.LpPool(2, p=1), image, "(sum |x|^p)^(1/p)", "signs kept", rounds=True),
        Row("lppool-2", ops.LpPool(2, stride=1), image, "(sum |x|^p)^(1/p)", "a mean of squares", rounds=True),
        Row("lppool-3", ops.LpPool((2, 3), p=3, padding=1), image, "(sum |x|^p)^(1/p)", "odd powers of negative entries", rounds=True),
        Row("globalavgpool", ops.GlobalAvgPool(), ((3, 2, 4),), "(N, C, 1, 1): the axes stay", "axes dropped; the batch averaged"),
        Row("globalavgpool-odd", ops.GlobalAvgPool(), image, "(N, C, 1, 1): the axes stay", "another count", rounds=True),
        Row("pad", ops.Pad(((1, 0), (0, 2))), image, "padding before and after each axis", "axes in reverse, as PyTorch has them"),
        Row("pad-value", ops.Pad(1, 1.5), image, "padding with a constant", "the constant forgotten"),
        Row("upsample", ops.Upsample((2, 3)), ((2, 2, 2),), "every entry repeated", "tiles in the place of repeats"),
        Row("blend", ops.Blend(w(3, 5), 1), image, "y = M x along one axis of space", "the transposed matrix"),
        Row("blend-last", ops.Blend(w(4, 4), 2), image, "y = M x along one axis of space", "a square matrix transposed"),
        Row("add", ops.Add(), image * 2, "y = a + b", "one of the two"),
        Row("add-three", ops.Add(), ((3, 2),) * 3, "y = a + b + c", "all but the first two forgotten"),
        Row("add-space", ops.Add(), ((3, 4, 5), (3, 1, 1)), "an axis of one entry is repeated", "broadcast from the wrong end"),
        Row("sub", ops.Sub(), image * 2, "y = a - b", "operands exchanged"),
        Row("max", ops.Max(), ((3, 2),) * 3, "the largest of all", "all but the first two forgotten"),
        Row("min", ops.Min(), image * 2, "the smallest of all", "taken for Max"),
        Row("mul", ops.Mul(), image * 2, "y = a b", "taken for Add"),
        Row("mul-space", ops.Mul(), ((3, 4, 5), (3, 1, 1)), "an axis of one entry is repeated", "a gate along the wrong axis"),
        Row("concat", ops.Concat(), ((1, 2), (3, 2), (2, 2)), "channels one behind the other", "order of inputs reversed"),
        Row("concat-space", ops.Concat(2), ((2, 3, 2), (2, 3, 1)), "axes count without the batch", "the batch counted"),
        Row("extend", ops.Extend(w(1, 5, 4), 0), image, "a constant behind the channels", "in front of them"),
        Row("extend-front", ops.Extend(w(3, 1, 4), 1, front=True), image, "a constant in front, along space",
            "behind; along the wrong axis"),
        Row("flatten", ops.Flatten(), ((3, 2, 2),), "channels vary slowest: c, h, w", "channel-last order, as in TensorFlow"),
        Row("unflatten", ops.Unflatten((3, 2, 2)), ((12,),), "channels vary slowest", "channel-last order"),
        Row("transpose", ops.Transpose((1, 0, 2)), image, "axes (C, *spatial) reordered", "the batch counted; the inverse order"),
        Row("transpose-cycle", ops.Transpose((2, 0, 1)), image, "axis i of y is axis axes[i] of x",
            "the inverse order, another for cycles"),
        Row("slice", ops.Slice(1, 3), ((4, 5),), "channels start to stop - 1", "stop included"),
        Row("slice-negative", ops.Slice(-2, -1), ((4, 2),), "counted from the end", "negative numbers taken for 0"),
        Row("permute", ops.Permute((2, 0, 1)), image, "channel i of y is channel order[i] of x", "the inverse order"),
        Row("rearrange", ops.Rearrange(((2, 2), (4, 1), (2, 2)), ((0, 5), (2, 4), (1, 3))), ((4, 4, 4),),
            "axes split, reordered, merged", "channel shuffle and pixel shuffle exchanged"),
        Row("take", ops.Take((2, 0, 0), 0), image, "entries in this order, some twice", "repeats left out"),
        Row("take-space", ops.Take((3, 1), 2), image, "entries along an axis of space", "along the channels"),
        Row("scores", ops.Scores(2, scale=0.5), ((4, 3), (4, 2)), "scale q . k in each head", "heads interleaved; the scale forgotten"),
        Row("scores-grouped", ops.Scores(4, 2), ((8, 2), (4, 3)), "heads in a row share keys", "keys repeated in turn"),
        Row("mix", ops.Mix(2), ((2, 3, 2), (4, 2)), "each head's weights times its values", "keys and queries exchanged"),
        Row("mix-grouped", ops.Mix(4, 2), ((4, 2, 3), (4, 3)), "heads in a row share values", "values repeated in turn"),
        Row("rotary", ops.Rotary(1, *rope), ((5, 3),), "channel i is turned with i + pairs", "interleaved pairs; the angle's sign"),
        Row("rotary-interleaved", ops.Rotary(2, *rope, interleaved=True), ((10, 3),), "channel 2i is turned with 2i + 1", "halves"),
    ]
    curves: tuple[tuple[str, Op, str], ...] = (
        ("sigmoid", ops.Sigmoid(), "hard sigmoid"), ("tanh", ops.Tanh(), "sigmoid"), ("silu", ops.SiLU(), "sigmoid alone"),
        ("hardsigmoid", ops.HardSigmoid(), "PyTorch's slope of 1/6"),
        ("hardsigmoid-sixth", ops.HardSigmoid(1 / 6, 0.5), "ONNX's slope of 0.2"),
        ("hardswish", ops.HardSwish(), "x relu6(x + 3) without the sixth"), ("erf", ops.Erf(), "tanh"),
        ("gelu", ops.GELU(), "the approximation by tanh"), ("gelu-tanh", ops.GELU(approximate=True), "the exact one"),
        ("sloped-silu", ops.Sloped(ops.SiLU(), np.array([0.5, 2.0, 1.0])), "the slope outside"),
        ("sloped-gelu", ops.Sloped(ops.GELU(), 2.0), "the slope outside"))
    for name, op, why in curves:
        table.append(Row(name, op, ((3, 8),), curve, why, rounds=True, largest=6.0, bits=4))
    axes: tuple[tuple[str, Op, Shape, str], ...] = (
        ("softmax", ops.Softmax(), (3, 4), "the last axis"), ("softmax-last", ops.Softmax(-1), (2, 3, 4), "the channels"),
        ("softmax-causal", ops.Softmax(-1, "causal"), (2, 3, 3), "a token that looks ahead"),
        ("softmax-mask", ops.Softmax(-1, mask), (2, 3, 3), "a mask that multiplies"))
    for name, op, shape, why in axes:
        table.append(Row(name, op, (shape,), "y = exp(x) / sum exp(x) along one axis", why, rounds=True))
    return table
