"""Which kinds of networks break passes? Small ones with names, a few numbers each, so that a failure says by its name what it needs.

Each is a function of a random generator and a floating type; numbers have two digits, so that reports are short.

>>> [type(node.op).__name__ for node in KINDS["residual"](np.random.default_rng(0), np.dtype(np.float32))]
['Conv', 'ReLU', 'Conv', 'Add', 'ReLU']
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from eqfact import ops
from eqfact.graph import Graph
from eqfact.ops import Array, Op, Shape
from eqfact.ops.base import per_axis, per_side
from eqfact.testing.wiring import needed, wired

Kind = Callable[[np.random.Generator, np.dtype[Any]], Graph]
#: What a network may be drawn without: ops of some kind, and structures that no op stands for.
KINDS_OF_OPS: dict[str, tuple[type[Op], ...]] = {
    "attention": (ops.Scores, ops.Mix, ops.Rotary),
    "batchnorm": (ops.BatchNorm,),
    "concat": (ops.Concat,),
    "constants": (ops.Affine, ops.Blend, ops.Extend),
    "curves": (ops.Sigmoid, ops.HardSigmoid, ops.Tanh, ops.SiLU, ops.HardSwish, ops.Erf, ops.GELU, ops.Sloped, ops.Softmax),
    "joins": (ops.Add, ops.Sub, ops.Max, ops.Min),
    "moves": (ops.Unflatten, ops.Transpose, ops.Slice, ops.Permute, ops.Rearrange, ops.Take),
    "normalisation": (ops.LayerNorm, ops.RMSNorm, ops.GroupNorm, ops.InstanceNorm),
    "pools": (ops.MaxPool, ops.MinPool, ops.AvgPool, ops.LpPool, ops.GlobalAvgPool),
    "products": (ops.Mul, ops.Scores, ops.Mix, ops.Rotary),
    "transposed": (ops.ConvTranspose,),
}
STRUCTURES = ("asymmetric padding", "constant padding", "dead channels", "dead ends", "depthwise", "groups",
              "output padding beyond the stride", "several inputs", "several outputs", "shared ops")
PADDED = (ops.Conv, ops.ConvTranspose, ops.MaxPool, ops.MinPool, ops.AvgPool, ops.LpPool, ops.Pad)
#: What most of them read.
SHAPE: Shape = (2, 4, 4)
#: Rows of weights this much smaller than the largest are nearly dead.
NEARLY_DEAD = 2.0**-9


def excluded(without: Collection[str | type[Op]]) -> frozenset[str | type[Op]]:
    """The ops and structures that these names stand for."""
    if isinstance(without, str):
        raise TypeError(f"without must be a list of names, got the string {without!r}")
    found: set[str | type[Op]] = set()
    for name in without:
        if isinstance(name, str) and name in KINDS_OF_OPS:
            found.update(KINDS_OF_OPS[name])
        elif name in STRUCTURES or (name in ops.ALL and name not in (ops.Dense, ops.Conv)):
            found.add(name)
        else:
            raise ValueError(f"networks cannot be drawn without {name!r}; they can without ops other than Dense and Conv, and without "
                             f"{', '.join(sorted({*KINDS_OF_OPS, *STRUCTURES}))}")
    return frozenset(found)


def shows(graph: Graph) -> frozenset[str | type[Op]]:
    """The ops and the :data:`STRUCTURES` that a network has."""
    found: set[str | type[Op]] = {type(node.op) for node in graph.nodes}
    found |= {"dead ends"} if {node.name for node in graph.nodes} - needed(graph) else set()
    found |= {"several inputs"} if len(graph.inputs) > 1 else set()
    found |= {"several outputs"} if len(graph.outputs) > 1 else set()
    found |= {"shared ops"} if len({id(node.op) for node in graph.nodes if isinstance(node.op, ops.Weighted)}) < sum(
        isinstance(node.op, ops.Weighted) for node in graph.nodes) else set()
    for node in graph.nodes:
        op, axes = node.op, len(graph.shapes[node.inputs[0]]) - 1
        if isinstance(op, (ops.Conv, ops.ConvTranspose)) and op.groups > 1:
            found.add("groups")
            found |= {"depthwise"} if op.groups == graph.shapes[node.inputs[0]][0] else set()
        if isinstance(op, ops.ConvTranspose) and any(e >= s for e, s in zip(
                per_axis("output_padding", op.output_padding, axes), per_axis("stride", op.stride, axes), strict=True)):
            found.add("output padding beyond the stride")
        padded = (op.padding,) if isinstance(op, PADDED) else ()
        if any(before != after for padding in padded for before, after in per_side(padding, axes)):
            found.add("asymmetric padding")
        if isinstance(op, ops.Pad) and op.value != 0:
            found.add("constant padding")
        if isinstance(op, ops.Weighted):
            sizes = (np.abs(v).max(axis=1, initial=0) for v in (op.rows(), op.columns()))
            found |= {"dead channels"} if any(size.min() <= size.max() * NEARLY_DEAD for size in sizes) else set()
    return frozenset(found)


class _Numbers:
    """Parameters of two digits; a name for each node is its place."""

    def __init__(self, rng: np.random.Generator, dtype: np.dtype[Any]) -> None:
        self.rng, self.dtype = rng, dtype

    def normal(self, *shape: int, size: float = 0.5) -> Array:
        return (np.round(self.rng.normal(size=shape) * size, 2) + 0.0).astype(self.dtype)

    def uniform(self, low: float, high: float, *shape: int) -> Array:
        return np.round(self.rng.uniform(low, high, shape), 2).astype(self.dtype)

    def conv(self, out: int, read: int, kernel: int = 2, axes: int = 2, bias: bool | None = None, **options: Any) -> ops.Conv:
        """A convolution, with a bias every other time unless it is said."""
        given = bool(self.rng.integers(2)) if bias is None else bias
        weight = self.normal(out, read // options.get("groups", 1), *(kernel,) * axes)
        return ops.Conv(weight, self.normal(out) if given else None, **options)

    def dense(self, out: int, read: int) -> ops.Dense:
        return ops.Dense(self.normal(out, read), self.normal(out) if self.rng.integers(2) else None)

    def batchnorm(self, channels: int, var: Array | None = None, eps: float = 1e-5) -> ops.BatchNorm:
        return ops.BatchNorm(self.uniform(0.5, 1.5, channels), self.normal(channels), self.normal(channels),
                             self.uniform(0.25, 2, channels) if var is None else var.astype(self.dtype), eps)


def _graph(*nodes: tuple[str, Op, str], inputs: Mapping[str, Shape] | None = None, outputs: str = "") -> Graph:
    """Nodes of one value of ``SHAPE``, of which the last is the output, unless it is said."""
    return wired(SHAPE if inputs is None else inputs, outputs or nodes[-1][0], *nodes)


def plain_chain(n: _Numbers) -> Graph:
    return _graph(("conv1", n.conv(3, 2), "x"), ("relu", ops.ReLU(), "conv1"), ("conv2", n.conv(2, 3), "relu"))


def one_axis(n: _Numbers) -> Graph:
    return _graph(("conv1", n.conv(3, 2, axes=1), "x"), ("relu", ops.ReLU(), "conv1"), ("conv2", n.conv(2, 3, axes=1), "relu"),
                  inputs={"x": (2, 5)})


def three_axes(n: _Numbers) -> Graph:
    return _graph(("conv1", n.conv(2, 1, axes=3), "x"), ("relu", ops.ReLU(), "conv1"), ("conv2", n.conv(1, 2, 1, axes=3), "relu"),
                  inputs={"x": (1, 3, 3, 3)})


def dense_layers(n: _Numbers) -> Graph:
    return _graph(("fc1", n.dense(4, 3), "x"), ("relu", ops.ReLU(), "fc1"), ("fc2", n.dense(2, 4), "relu"), inputs={"x": (3,)})


def fan_out(n: _Numbers) -> Graph:
    """One value, read by three nodes that are all put out."""
    return _graph(("conv", n.conv(3, 2), "x"), ("relu", ops.ReLU(), "conv"), ("left", n.conv(2, 3), "relu"),
                  ("right", n.conv(1, 3), "relu"),
                  ("sigmoid", ops.Sigmoid(), "relu"), outputs="left right sigmoid")


def residual(n: _Numbers) -> Graph:
    return _graph(("conv1", n.conv(2, 2, 3, padding=1), "x"), ("relu1", ops.ReLU(), "conv1"),
                  ("conv2", n.conv(2, 2, 3, padding=1), "relu1"),
                  ("add", ops.Add(), "conv2 relu1"), ("relu2", ops.ReLU(), "add"))


def chain_of_residuals(n: _Numbers) -> Graph:
    return _graph(("stem", n.conv(2, 2, 1), "x"), ("conv1", n.conv(2, 2, 1), "stem"), ("add1", ops.Add(), "stem conv1"),
                  ("relu", ops.ReLU(), "add1"), ("conv2", n.conv(2, 2, 1), "relu"), ("add2", ops.Add(), "conv2 add1"),
                  ("head", n.conv(1, 2, 1), "add2"))


def added_to_itself(n: _Numbers) -> Graph:
    return _graph(("conv1", n.conv(2, 2), "x"), ("add", ops.Add(), "conv1 conv1"), ("conv2", n.conv(2, 2), "add"))


def concat(n: _Numbers) -> Graph:
    return _graph(("conv1", n.conv(2, 2), "x"), ("relu1", ops.ReLU(), "conv1"), ("conv2", n.conv(1, 2), "x"),
                  ("concat", ops.Concat(), "relu1 conv2"), ("conv3", n.conv(2, 3), "concat"))


def groups(n: _Numbers) -> Graph:
    return _graph(("conv1", n.conv(4, 2), "x"), ("relu1", ops.ReLU(), "conv1"), ("grouped", n.conv(4, 4, groups=2), "relu1"),
                  ("relu2", ops.ReLU(), "grouped"), ("conv2", n.conv(2, 4, 1), "relu2"))


def depthwise(n: _Numbers) -> Graph:
    return _graph(("wide", n.conv(3, 2, 1), "x"), ("relu1", ops.ReLU6(), "wide"), ("deep", n.conv(3, 3, 3, padding=1, groups=3), "relu1"),
                  ("relu2", ops.ReLU6(), "deep"), ("narrow", n.conv(2, 3, 1), "relu2"))


def depthwise_multiplied(n: _Numbers) -> Graph:
    """Two output channels for each input channel."""
    return _graph(("wide", n.conv(2, 2, 1), "x"), ("deep", n.conv(4, 2, groups=2), "wide"), ("norm", n.batchnorm(4), "deep"),
                  ("narrow", n.conv(2, 4, 1), "norm"))


def transposed(n: _Numbers, groups: int = 1) -> Graph:
    up = ops.ConvTranspose(n.normal(6, 4 // groups, 2, 2), n.normal(6), stride=2, groups=groups)
    return _graph(("conv", n.conv(4, 2), "x"), ("relu1", ops.ReLU(), "conv"), ("up", up, "relu1"), ("norm", n.batchnorm(6), "up"),
                  ("head", n.conv(1, 6, 1), "norm"))


def transposed_groups(n: _Numbers) -> Graph:
    return transposed(n, groups=2)


def strided(n: _Numbers) -> Graph:
    """Strides, dilation and padding that differ between the axes, and between their ends."""
    return _graph(("conv1", n.conv(3, 2, 2, stride=(2, 1), padding=((1, 0), (0, 2)), dilation=(1, 2)), "x"), ("relu", ops.ReLU(), "conv1"),
                  ("conv2", n.conv(2, 3, 2), "relu"))


def shared_op(n: _Numbers) -> Graph:
    """One convolution at two nodes, one behind the other."""
    op = n.conv(2, 2, 1)
    return _graph(("conv1", op, "x"), ("relu", ops.ReLU(), "conv1"), ("conv2", op, "relu"), ("head", n.conv(1, 2, 1), "conv2"))


def shared_op_on_two_values(n: _Numbers) -> Graph:
    """One convolution on two inputs, each followed by a BatchNorm of its own."""
    op = n.conv(2, 2, 1)
    return _graph(("conv1", op, "x"), ("conv2", op, "y"), ("norm1", n.batchnorm(2), "conv1"), ("norm2", n.batchnorm(2), "conv2"),
                  ("add", ops.Add(), "norm1 norm2"), inputs={"x": SHAPE, "y": SHAPE})


def dead_channel(n: _Numbers, size: float = 0.0) -> Graph:
    first = n.conv(3, 2)
    weight = first.weight.copy()
    weight[1] *= weight.dtype.type(size)
    bias = None if first.bias is None else first.bias * np.array([1, size, 1], first.bias.dtype)
    return _graph(("conv1", ops.Conv(weight, bias), "x"), ("relu", ops.ReLU(), "conv1"), ("conv2", n.conv(2, 3), "relu"))


def nearly_dead_channel(n: _Numbers) -> Graph:
    return dead_channel(n, 2.0**-10)


def unread_channel(n: _Numbers) -> Graph:
    """A channel that the next layer multiplies by zero."""
    second = n.conv(2, 3)
    weight = second.weight.copy()
    weight[:, 1] = 0
    return _graph(("conv1", n.conv(3, 2), "x"), ("relu", ops.ReLU(), "conv1"), ("conv2", ops.Conv(weight, second.bias), "relu"))


def relu6(n: _Numbers) -> Graph:
    """Values that reach both limits."""
    return _graph(("conv1", ops.Conv(n.normal(3, 2, 2, 2, size=4.0), n.normal(3)), "x"), ("relu6", ops.ReLU6(), "conv1"),
                  ("conv2", n.conv(2, 3), "relu6"))


def relu_and_clip(n: _Numbers) -> Graph:
    """A ReLU before limits that reach below zero."""
    return _graph(("conv1", n.conv(3, 2), "x"), ("relu", ops.ReLU(), "conv1"), ("clip", ops.Clip(-0.25, 0.5), "relu"),
                  ("conv2", n.conv(2, 3), "clip"))


def limits_above_zero(n: _Numbers) -> Graph:
    return _graph(("conv1", n.conv(3, 2), "x"), ("clip", ops.Clip(0.25, 0.75), "conv1"), ("relu", ops.ReLU(), "clip"),
                  ("conv2", n.conv(2, 3, padding=1), "relu"))


def prelu(n: _Numbers) -> Graph:
    """A slope a channel, one of them negative."""
    slopes = n.uniform(0.1, 0.5, 3)
    slopes[1] *= -1
    return _graph(("conv1", n.conv(3, 2), "x"), ("prelu", ops.PReLU(slopes), "conv1"), ("conv2", n.conv(2, 3), "prelu"))


def leaky_relu(n: _Numbers) -> Graph:
    return _graph(("conv1", n.conv(3, 2), "x"), ("leaky", ops.LeakyReLU(0.1), "conv1"), ("conv2", n.conv(2, 3), "leaky"))


def identity(n: _Numbers) -> Graph:
    """Nodes that do nothing: inside, at the output, and where one value has two names that are put out."""
    return _graph(("conv1", n.conv(3, 2), "x"), ("same", ops.Identity(), "conv1"), ("relu", ops.ReLU(), "same"),
                  ("conv2", n.conv(2, 3), "relu"), ("copy", ops.Identity(), "conv2"), outputs="copy conv2")


def constant_padding(n: _Numbers) -> Graph:
    """Ones around a value, and a convolution that pads with zeros behind it."""
    return _graph(("conv1", n.conv(3, 2), "x"), ("pad", ops.Pad(1, 1.0), "conv1"), ("conv2", n.conv(2, 3, padding=1), "pad"))


def zero_padding(n: _Numbers) -> Graph:
    """A Pad that a convolution could take up."""
    return _graph(("conv1", n.conv(3, 2), "x"), ("pad", ops.Pad(((1, 0), (0, 1))), "conv1"), ("conv2", n.conv(2, 3, padding=1), "pad"))


def max_pool(n: _Numbers) -> Graph:
    return _graph(("conv1", n.conv(3, 2), "x"), ("pool", ops.MaxPool(2, stride=1, padding=1), "conv1"), ("conv2", n.conv(2, 3), "pool"))


def average_pool(n: _Numbers) -> Graph:
    """Means that do not count the padding."""
    pool = ops.AvgPool(2, stride=1, padding=1, count_include_pad=False)
    return _graph(("conv1", n.conv(3, 2), "x"), ("relu", ops.ReLU(), "conv1"), ("pool", pool, "relu"), ("conv2", n.conv(2, 3), "pool"))


def flatten(n: _Numbers) -> Graph:
    return _graph(("conv", n.conv(2, 2, 3), "x"), ("relu", ops.ReLU(), "conv"), ("flat", ops.Flatten(), "relu"),
                  ("fc", n.dense(2, 8), "flat"))


def classifier(n: _Numbers) -> Graph:
    return _graph(("conv", n.conv(3, 2), "x"), ("norm", n.batchnorm(3), "conv"), ("relu", ops.ReLU(), "norm"),
                  ("pool", ops.GlobalAvgPool(), "relu"), ("flat", ops.Flatten(), "pool"), ("fc", n.dense(4, 3), "flat"),
                  ("softmax", ops.Softmax(), "fc"))


def channel_shuffle(n: _Numbers) -> Graph:
    return _graph(("conv1", n.conv(4, 2), "x"), ("relu", ops.ReLU(), "conv1"), ("shuffle", ops.Permute((0, 2, 1, 3)), "relu"),
                  ("first", ops.Slice(0, 2), "shuffle"), ("conv2", n.conv(2, 2), "first"))


def several_inputs(n: _Numbers) -> Graph:
    return _graph(("conv1", n.conv(2, 2), "x"), ("conv2", n.conv(2, 1), "y"), ("add", ops.Add(), "conv2 conv1"),
                  ("relu", ops.ReLU(), "add"),
                  inputs={"x": SHAPE, "y": (1, *SHAPE[1:])})


def inner_output(n: _Numbers) -> Graph:
    """A value between layers that is an output, too: nothing may be done to it."""
    return _graph(("conv1", n.conv(3, 2), "x"), ("norm", n.batchnorm(3), "conv1"), ("relu", ops.ReLU(), "norm"),
                  ("conv2", n.conv(2, 3), "relu"),
                  outputs="conv2 relu conv1")


def input_output(n: _Numbers) -> Graph:
    """An input that is an output, as it comes."""
    return _graph(("conv", n.conv(3, 2), "x"), ("relu", ops.ReLU(), "conv"), outputs="relu x")


def dead_end(n: _Numbers) -> Graph:
    """A branch that nobody reads."""
    return _graph(("conv1", n.conv(3, 2), "x"), ("norm", n.batchnorm(3), "conv1"), ("relu", ops.ReLU(), "norm"),
                  ("unused", n.conv(1, 3), "conv1"), ("conv2", n.conv(2, 3), "relu"), outputs="conv2")


def batchnorm(n: _Numbers) -> Graph:
    """Small variances, so that eps counts."""
    return _graph(("conv", n.conv(3, 2), "x"), ("norm", n.batchnorm(3, n.uniform(0.0, 0.1, 3), 1e-2), "conv"), ("relu", ops.ReLU(), "norm"))


def batchnorm_with_bias(n: _Numbers) -> Graph:
    return _graph(("conv", n.conv(3, 2, bias=True), "x"), ("norm", n.batchnorm(3), "conv"))


def batchnorm_zero_variance(n: _Numbers) -> Graph:
    return _graph(("conv", n.conv(3, 2), "x"), ("norm", n.batchnorm(3, np.array([1.0, 0.0, 0.5])), "conv"), ("relu", ops.ReLU(), "norm"))


def batchnorm_first(n: _Numbers) -> Graph:
    """A BatchNorm before a convolution that pads with zeros, which its shift does not reach."""
    return _graph(("norm", n.batchnorm(2), "x"), ("conv", n.conv(3, 2, 3, padding=1), "norm"), ("relu", ops.ReLU(), "conv"))


def batchnorm_beside_another_reader(n: _Numbers) -> Graph:
    """A convolution that a BatchNorm reads, and another node, too."""
    return _graph(("conv", n.conv(2, 2), "x"), ("norm", n.batchnorm(2), "conv"), ("relu", ops.ReLU(), "norm"),
                  ("add", ops.Add(), "relu conv"))


def batchnorm_after_dense(n: _Numbers) -> Graph:
    return _graph(("fc1", n.dense(4, 3), "x"), ("norm", n.batchnorm(4), "fc1"), ("relu", ops.ReLU(), "norm"),
                  ("fc2", n.dense(2, 4), "relu"),
                  inputs={"x": (3,)})


def two_batchnorms(n: _Numbers) -> Graph:
    return _graph(("conv", n.conv(3, 2), "x"), ("norm1", n.batchnorm(3), "conv"), ("norm2", n.batchnorm(3), "norm1"))


def product(n: _Numbers) -> Graph:
    """Two layers of one value, multiplied."""
    return _graph(("a", n.conv(3, 2), "x"), ("b", n.conv(3, 2), "x"), ("gate", ops.SiLU(), "a"), ("mul", ops.Mul(), "gate b"),
                  ("conv", n.conv(2, 3), "mul"))


def squeeze_and_excite(n: _Numbers) -> Graph:
    return _graph(("conv", n.conv(3, 2), "x"), ("relu", ops.ReLU(), "conv"), ("mean", ops.GlobalAvgPool(), "relu"),
                  ("fc", n.conv(3, 3, 1), "mean"), ("gate", ops.Sigmoid(), "fc"), ("mul", ops.Mul(), "relu gate"),
                  ("head", n.conv(1, 3), "mul"))


def curves(n: _Numbers) -> Graph:
    return _graph(("conv1", n.conv(3, 2), "x"), ("swish", ops.HardSwish(), "conv1"), ("conv2", n.conv(2, 3), "swish"),
                  ("gelu", ops.GELU(), "conv2"), ("conv3", n.conv(1, 2), "gelu"))


def attention(n: _Numbers) -> Graph:
    """One head over four tokens, with a residual."""
    def of_tokens(out: int) -> Op:
        return n.conv(out, 2, 1, axes=1)
    return _graph(("q", of_tokens(2), "x"), ("k", of_tokens(2), "x"), ("v", of_tokens(2), "x"),
                  ("scores", ops.Scores(1, scale=1 / math.sqrt(2)), "q k"), ("softmax", ops.Softmax(-1, "causal"), "scores"),
                  ("mix", ops.Mix(1), "softmax v"), ("out", of_tokens(2), "mix"), ("add", ops.Add(), "out x"), inputs={"x": (2, 4)})


def layer_norm(n: _Numbers) -> Graph:
    """The residual stream of a transformer: a normalisation before the layer, and a residual around both."""
    norm = ops.LayerNorm(n.uniform(0.5, 1.5, 3), n.normal(3), 1e-2)
    return _graph(("stem", n.conv(3, 2, 1, axes=1), "x"), ("norm", norm, "stem"), ("conv1", n.conv(4, 3, 1, axes=1), "norm"),
                  ("gelu", ops.GELU(), "conv1"), ("conv2", n.conv(3, 4, 1, axes=1), "gelu"), ("add", ops.Add(), "conv2 stem"),
                  inputs={"x": (2, 4)})


def group_norm(n: _Numbers) -> Graph:
    norm = ops.GroupNorm(2, n.uniform(0.5, 1.5, 4), n.normal(4), 1e-2)
    return _graph(("conv1", n.conv(4, 2), "x"), ("norm", norm, "conv1"), ("relu", ops.ReLU(), "norm"), ("conv2", n.conv(2, 4), "relu"))


def upsampled(n: _Numbers) -> Graph:
    return _graph(("conv1", n.conv(3, 2), "x"), ("relu", ops.ReLU(), "conv1"), ("up", ops.Upsample(2), "relu"),
                  ("conv2", n.conv(2, 3), "up"))


def _named(build: Callable[[_Numbers], Graph]) -> Kind:
    return lambda rng, dtype: build(_Numbers(rng, dtype))


#: Kinds of networks by name: functions of a generator of random numbers and a floating type.
KINDS: Mapping[str, Kind] = MappingProxyType({build.__name__: _named(build) for build in (
    plain_chain, dense_layers, one_axis, three_axes, batchnorm, batchnorm_with_bias, batchnorm_after_dense, batchnorm_first,
    batchnorm_beside_another_reader, batchnorm_zero_variance, two_batchnorms, fan_out, residual, chain_of_residuals, added_to_itself,
    concat, groups, depthwise, depthwise_multiplied, transposed, transposed_groups, strided, shared_op, shared_op_on_two_values,
    dead_channel, nearly_dead_channel, unread_channel, relu6, relu_and_clip, limits_above_zero, prelu, leaky_relu, identity,
    constant_padding, zero_padding, max_pool, average_pool, flatten, classifier, channel_shuffle, several_inputs, inner_output,
    input_output, dead_end, product, squeeze_and_excite, curves, attention, layer_norm, group_norm, upsampled,
)})
