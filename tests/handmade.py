"""Small networks written by hand, one for each thing that equalization, folding and quantization have to get right.

Weights are ill on purpose: the ranges of a layer's channels differ by factors of up to a hundred.
"""

from __future__ import annotations

import numpy as np

import eqfact as eq


class Maker:
    """Weights and data in one dtype from one seed."""

    def __init__(self, seed: int = 0, dtype: str = "float64") -> None:
        self.rng, self.dtype = np.random.default_rng(seed), np.dtype(dtype)

    def weight(self, *shape: int) -> np.ndarray:
        """Normal numbers, with a range of its own for every output channel."""
        spread = np.exp(self.rng.uniform(-2.3, 2.3, (shape[0], *(1 for _ in shape[1:]))))
        return (self.rng.normal(size=shape) * spread / np.sqrt(np.prod(shape[1:]))).astype(self.dtype)

    def vector(self, size: int) -> np.ndarray:
        return self.rng.normal(size=size).astype(self.dtype)

    def positive(self, size: int) -> np.ndarray:
        return self.rng.uniform(0.5, 2, size).astype(self.dtype)

    def dense(self, out: int, inner: int) -> eq.Dense:
        return eq.Dense(self.weight(out, inner), self.vector(out))

    def conv(self, out: int, inner: int, *kernel: int, **options) -> eq.Conv:
        """``inner`` counts the input channels of a group."""
        return eq.Conv(self.weight(out, inner, *kernel), self.vector(out), **options)

    def batchnorm(self, channels: int, eps: float = 1e-5) -> eq.BatchNorm:
        return eq.BatchNorm(self.vector(channels), self.vector(channels), self.vector(channels), self.positive(channels), eps)

    def data(self, graph: eq.Graph, batch: int = 4):
        arrays = {name: (2 * self.rng.normal(size=(batch, *shape))).astype(self.dtype) for name, shape in graph.inputs.items()}
        return arrays if len(arrays) > 1 else next(iter(arrays.values()))


def plain(m: Maker) -> eq.Graph:
    """conv - relu - conv - relu - dense."""
    return eq.Graph.chain((3, 6, 6), conv1=m.conv(4, 3, 3, 3, stride=2, padding=1), act1=eq.ReLU(),
                          conv2=m.conv(5, 4, 2, 2), act2=eq.ReLU(), flat=eq.Flatten(), fc=m.dense(3, 20))


def mobile(m: Maker) -> eq.Graph:
    """A strided conv, an inverted residual with ReLU6, global pooling and a classifier."""
    return eq.Graph({"x": (3, 6, 6)}, [
        eq.Node("stem", m.conv(4, 3, 3, 3, stride=2, padding=1), ["x"]),
        eq.Node("act", eq.ReLU6(), ["stem"]),
        eq.Node("expand", m.conv(8, 4, 1, 1), ["act"]),
        eq.Node("act1", eq.ReLU6(), ["expand"]),
        eq.Node("depth", m.conv(8, 1, 3, 3, padding=1, groups=8), ["act1"]),
        eq.Node("act2", eq.ReLU6(), ["depth"]),
        eq.Node("project", m.conv(4, 8, 1, 1), ["act2"]),
        eq.Node("add", eq.Add(), ["act", "project"]),
        eq.Node("head", m.conv(6, 4, 1, 1), ["add"]),
        eq.Node("act3", eq.ReLU6(), ["head"]),
        eq.Node("pool", eq.GlobalAvgPool(), ["act3"]),
        eq.Node("flat", eq.Flatten(), ["pool"]),
        eq.Node("fc", m.dense(3, 6), ["flat"]),
    ], ["fc"])


def residual(m: Maker) -> eq.Graph:
    """Two residual blocks on one stream: three layers share one factor vector."""
    return eq.Graph({"x": (2,)}, [
        eq.Node("stem", m.dense(4, 2), ["x"]), eq.Node("act0", eq.ReLU(), ["stem"]),
        eq.Node("a1", m.dense(5, 4), ["act0"]), eq.Node("act1", eq.ReLU(), ["a1"]), eq.Node("b1", m.dense(4, 5), ["act1"]),
        eq.Node("add1", eq.Add(), ["act0", "b1"]),
        eq.Node("a2", m.dense(5, 4), ["add1"]), eq.Node("act2", eq.ReLU(), ["a2"]), eq.Node("b2", m.dense(4, 5), ["act2"]),
        eq.Node("add2", eq.Add(), ["b2", "add1"]), eq.Node("act3", eq.ReLU(), ["add2"]),
        eq.Node("fc", m.dense(2, 4), ["act3"]),
    ], ["fc"])


def concat(m: Maker) -> eq.Graph:
    """Three layers meet in a concat of 2 + 3 + 2 channels, and one of them has a reader of its own."""
    return eq.Graph({"x": (2, 5)}, [
        eq.Node("a", m.conv(2, 2, 3, padding=1), ["x"]), eq.Node("act_a", eq.ReLU(), ["a"]),
        eq.Node("b", m.conv(3, 2, 1), ["x"]), eq.Node("act_b", eq.LeakyReLU(0.1), ["b"]),
        eq.Node("c", m.conv(2, 2, 3, padding=1), ["act_a"]),
        eq.Node("cat", eq.Concat(), ["act_a", "act_b", "c"]),
        eq.Node("d", m.conv(4, 7, 2), ["cat"]), eq.Node("act_d", eq.ReLU(), ["d"]), eq.Node("pool", eq.MaxPool(2), ["act_d"]),
        eq.Node("flat", eq.Flatten(), ["pool"]), eq.Node("fc", m.dense(2, 8), ["flat"]),
    ], ["fc"])


def fan_out(m: Maker) -> eq.Graph:
    """One value read by three layers, two of which are outputs."""
    return eq.Graph({"x": (2, 4)}, [
        eq.Node("a", m.conv(4, 2, 3), ["x"]), eq.Node("act", eq.PReLU(m.vector(4)), ["a"]),
        eq.Node("b", m.conv(3, 4, 1), ["act"]), eq.Node("act_b", eq.ReLU(), ["b"]),
        eq.Node("c", m.conv(2, 4, 2), ["act"]), eq.Node("d", m.conv(4, 1, 1, groups=4), ["act"]),
        eq.Node("e", m.conv(2, 3, 2), ["act_b"]), eq.Node("act_d", eq.ReLU(), ["d"]), eq.Node("f", m.conv(1, 4, 1), ["act_d"]),
    ], ["c", "e", "f"])


def grouped(m: Maker) -> eq.Graph:
    """ShuffleNet: grouped convolutions with a channel shuffle between, a slice and a transposed convolution."""
    return eq.Graph({"x": (2, 4, 3)}, [
        eq.Node("a", m.conv(6, 1, 1, 1, groups=2), ["x"]), eq.Node("act_a", eq.Clip(-1.0, 4.0), ["a"]),
        eq.Node("shuffle", eq.Permute((0, 3, 1, 4, 2, 5)), ["act_a"]),
        eq.Node("b", m.conv(6, 2, 3, 2, groups=3, padding=1), ["shuffle"]), eq.Node("act_b", eq.ReLU(), ["b"]),
        eq.Node("half", eq.Slice(2, 6), ["act_b"]),
        eq.Node("up", eq.ConvTranspose(m.weight(4, 2, 2, 2), m.vector(4), stride=2, groups=2), ["half"]),
        eq.Node("act_c", eq.ReLU(), ["up"]),
        eq.Node("pool", eq.AvgPool(2), ["act_c"]), eq.Node("pad", eq.Pad(1), ["pool"]),
        eq.Node("out", m.conv(2, 4, 3, 3), ["pad"]),
        eq.Node("rest", eq.Slice(-6, -4), ["act_b"]), eq.Node("side", m.conv(1, 2, 1, 1), ["rest"]),
    ], ["out", "side"])


def shared(m: Maker) -> eq.Graph:
    """One conv at two nodes, one behind the other: what it reads and what it makes must carry one factor vector."""
    conv = m.conv(3, 3, 1)
    return eq.Graph.chain((2, 4), stem=m.conv(3, 2, 2), act0=eq.ReLU(), first=conv, act1=eq.ReLU(), second=conv, act2=eq.ReLU(),
                          out=m.conv(2, 3, 1))


def inner_output(m: Maker) -> eq.Graph:
    """The activation between two layers is an output, too."""
    nodes = plain(m).nodes
    return eq.Graph({"x": (3, 6, 6)}, nodes, ["act1", "fc"])


def two_inputs(m: Maker) -> eq.Graph:
    """Two inputs, each with a layer, added; then a curve that no factor passes."""
    return eq.Graph({"x": (2, 3), "y": (3, 3)}, [
        eq.Node("a", m.conv(3, 2, 1), ["x"]), eq.Node("b", m.conv(3, 3, 1), ["y"]), eq.Node("add", eq.Add(), ["a", "b"]),
        eq.Node("act", eq.ReLU(), ["add"]), eq.Node("c", m.conv(4, 3, 1), ["act"]), eq.Node("curve", eq.SiLU(), ["c"]),
        eq.Node("d", m.conv(4, 4, 1), ["curve"]), eq.Node("act_d", eq.ReLU(), ["d"]), eq.Node("e", m.conv(2, 4, 3), ["act_d"]),
    ], ["e"])


def itself(m: Maker) -> eq.Graph:
    """``x + conv(x)`` on a stream of two channels: the conv reads and makes the same labels."""
    return eq.Graph({"x": (2,)}, [
        eq.Node("stem", m.dense(2, 2), ["x"]), eq.Node("act", eq.ReLU(), ["stem"]), eq.Node("fc1", m.dense(2, 2), ["act"]),
        eq.Node("add", eq.Add(), ["act", "fc1"]), eq.Node("fc2", m.dense(1, 2), ["add"]),
    ], ["fc2"])


def volume(m: Maker) -> eq.Graph:
    """Three spatial axes and BatchNorms that nothing folds: one at the input, one behind a value with two readers."""
    return eq.Graph({"x": (2, 3, 2, 3)}, [
        eq.Node("bn0", m.batchnorm(2), ["x"]), eq.Node("act", eq.ReLU(), ["bn0"]),
        eq.Node("a", m.conv(3, 2, 2, 1, 2), ["act"]), eq.Node("bn", m.batchnorm(3), ["a"]), eq.Node("act_bn", eq.ReLU(), ["bn"]),
        eq.Node("mix", eq.Add(), ["a", "act_bn"]), eq.Node("up", eq.Upsample(2), ["mix"]),
        eq.Node("b", m.conv(2, 3, 2, 2, 2), ["up"]),
    ], ["b"])


def uneven(m: Maker) -> eq.Graph:
    """The same function as :func:`plain`, with channels that are up to 64 times as large as their mates."""
    graph = plain(m)
    free = eq.Factorization.identity(graph)
    return eq.Factorization.of(graph, {name: 2.0 ** (np.arange(len(free[name])) % 4 * 2) for name in ("act1", "act2")}).apply(graph)


NETS = (plain, mobile, residual, concat, fan_out, grouped, shared, inner_output, two_inputs, itself, volume)
#: No channel of these is tied to another one, so that cross_layer has one fixed point.
WITHOUT_TIES = (plain, concat, fan_out, grouped, inner_output)
