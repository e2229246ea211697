"""The table of networks: one row a topology, with its degrees of freedom counted by hand and the values that are pinned.

Weights are random and have biases, so that every channel matters; float64. Inputs are called x (and y).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

import eqfact as eq
from eqfact import Node


@dataclass(frozen=True, eq=False)
class Net:
    name: str
    graph: eq.Graph
    #: How many factors are free, with the reckoning: names of values and how many channels each sets free.
    free: dict[str, int]
    #: All values with a pinned channel.
    pinned: set[str]

    def __str__(self) -> str:
        return self.name

    @property
    def degrees_of_freedom(self) -> int:
        return sum(self.free.values())

    def data(self, batch: int = 24):
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        return {name: rng.normal(size=(batch, *shape)) for name, shape in self.graph.inputs.items()}


RNG = np.random.default_rng(1902)


def bias(channels: int) -> np.ndarray:
    """Not zero, and too small to switch a channel off for good."""
    return RNG.uniform(0.1, 0.3, channels) * RNG.choice([-1, 1], channels)


def conv(out: int, channels: int, kernel: int = 1, *, groups: int = 1, axes: int = 2, **options) -> eq.Conv:
    weight = RNG.normal(size=(out, channels // groups, *(kernel,) * axes))
    return eq.Conv(weight, bias(out), groups=groups, **options)


def dense(out: int, channels: int) -> eq.Dense:
    return eq.Dense(RNG.normal(size=(out, channels)), bias(out))


def batchnorm(channels: int) -> eq.BatchNorm:
    return eq.BatchNorm(RNG.normal(size=channels), bias(channels), bias(channels), RNG.uniform(0.5, 2, channels))


def layernorm(channels: int) -> eq.LayerNorm:
    return eq.LayerNorm(RNG.normal(size=channels), bias(channels))


def rmsnorm(channels: int) -> eq.RMSNorm:
    return eq.RMSNorm(RNG.normal(size=channels), eps=1e-2)


def rotary(heads: int) -> eq.Rotary:
    """Two pairs of channels a head, over five tokens."""
    angle = np.outer([1.0, 0.1], np.arange(5))
    return eq.Rotary(heads, np.cos(angle), np.sin(angle))


def net(name: str, shape: tuple[int, ...], outputs: list[str], free: dict[str, int], pinned: str, *nodes: tuple,
        y: tuple[int, ...] | None = None) -> Net:
    inputs = {"x": shape} if y is None else {"x": shape, "y": y}
    return Net(name, eq.Graph(inputs, [Node(*node) for node in nodes], outputs), free, set(pinned.split()))


twice, siamese = conv(3, 3, 3, padding=1), conv(4, 2)
rms = eq.RMSNorm(np.array([0.5, -1.0, 2.0]), eps=1e-2)

NETS = [
    net("chain", (2,), ["fc2"], {"fc1": 3}, "x fc2",
        ("fc1", dense(3, 2), ["x"]), ("act", eq.ReLU(), ["fc1"]), ("fc2", dense(2, 3), ["act"])),
    net("all activations", (2,), ["out"], {"fc": 4}, "x out",
        ("fc", dense(4, 2), ["x"]), ("relu", eq.LeakyReLU(0.3), ["fc"]), ("prelu", eq.PReLU(np.array([0.5, -0.5, 2.0, 0.1])), ["relu"]),
        ("clip", eq.Clip(-0.2, np.array([1.0, 2.0, 3.0, 4.0])), ["prelu"]), ("id", eq.Identity(), ["clip"]), ("out", dense(1, 4), ["id"])),
    net("one layer", (2,), ["fc"], {}, "x fc", ("fc", dense(3, 2), ["x"])),
    net("batchnorms", (2, 4, 3), ["out"], {"bn0": 2, "conv": 5, "bn1": 5}, "x out",
        ("bn0", batchnorm(2), ["x"]), ("conv", conv(5, 2, 3), ["bn0"]), ("bn1", batchnorm(5), ["conv"]), ("act", eq.ReLU6(), ["bn1"]),
        ("gap", eq.GlobalAvgPool(), ["act"]), ("flat", eq.Flatten(), ["gap"]), ("out", dense(3, 5), ["flat"])),
    net("residual", (2, 3, 3), ["head"], {"stem": 4, "wide": 6}, "x head",
        ("stem", conv(4, 2), ["x"]), ("wide", conv(6, 4, 3, padding=1), ["stem"]), ("act", eq.ReLU(), ["wide"]),
        ("narrow", conv(4, 6), ["act"]), ("add", eq.Add(), ["narrow", "stem"]), ("head", conv(2, 4), ["add"])),
    net("residual onto the input", (2, 3, 3), ["head"], {"wide": 6}, "x narrow add head",
        ("wide", conv(6, 2), ["x"]), ("act", eq.ReLU(), ["wide"]), ("narrow", conv(2, 6), ["act"]), ("add", eq.Add(), ["narrow", "x"]),
        ("head", conv(2, 2), ["add"])),
    net("two residuals share one stream", (2, 3), ["head"], {"stem": 3}, "x head",
        ("stem", conv(3, 2, axes=1), ["x"]), ("a", conv(3, 3, axes=1), ["stem"]), ("add1", eq.Add(), ["a", "stem"]),
        ("b", conv(3, 3, axes=1), ["add1"]), ("add2", eq.Add(), ["add1", "b", "stem"]), ("head", conv(1, 3, axes=1), ["add2"])),
    net("add over space", (2, 3, 2), ["head"], {"stem": 4}, "x head",
        ("stem", conv(4, 2), ["x"]), ("gap", eq.GlobalAvgPool(), ["stem"]), ("context", conv(4, 4), ["gap"]),
        ("add", eq.Add(), ["stem", "context"]), ("head", conv(2, 4), ["add"])),
    net("difference", (2, 3), ["head"], {"stem": 3}, "x head",
        ("stem", conv(3, 2, axes=1), ["x"]), ("a", conv(3, 3, axes=1), ["stem"]), ("sub", eq.Sub(), ["stem", "a"]),
        ("head", conv(1, 3, axes=1), ["sub"])),
    net("maximum", (2, 3), ["head"], {"stem": 3}, "x head",
        ("stem", conv(3, 2, axes=1), ["x"]), ("a", conv(3, 3, axes=1), ["stem"]), ("max", eq.Max(), ["stem", "a"]),
        ("head", conv(1, 3, axes=1), ["max"])),
    net("one channel joined to all", (2, 3), ["head"], {"stem": 1}, "x head",
        ("stem", conv(3, 2, axes=1), ["x"]), ("one", conv(1, 2, axes=1), ["x"]), ("add", eq.Add(), ["one", "stem"]),
        ("head", conv(2, 3, axes=1), ["add"])),
    net("constants beside values", (2, 3), ["head"], {"stem": 3, "more": 2}, "x head",
        ("stem", conv(3, 2, axes=1), ["x"]), ("token", eq.Extend(RNG.normal(size=(3, 1)), axis=1, front=True), ["stem"]),
        ("more", eq.Extend(RNG.normal(size=(2, 4))), ["token"]), ("act", eq.ReLU(), ["more"]), ("head", conv(2, 5, axes=1), ["act"])),
    net("concat", (2, 3, 3), ["head"], {"stem": 4, "a": 3, "b": 2}, "x head",
        ("stem", conv(4, 2), ["x"]), ("a", conv(3, 4), ["stem"]), ("b", conv(2, 4), ["stem"]), ("cat", eq.Concat(), ["a", "b"]),
        ("head", conv(2, 5), ["cat"])),
    net("dense block", (2, 3, 3), ["head"], {"stem": 2, "a": 3}, "x cat1 cat2 head",
        ("stem", conv(2, 2), ["x"]), ("cat1", eq.Concat(), ["x", "stem"]), ("a", conv(3, 4), ["cat1"]),
        ("cat2", eq.Concat(), ["cat1", "a"]), ("head", conv(2, 7), ["cat2"])),
    net("a value joined with itself", (2, 2), ["head"], {"stem": 3}, "x head",
        ("stem", conv(3, 2, axes=1), ["x"]), ("add", eq.Add(), ["stem", "stem"]), ("cat", eq.Concat(), ["add", "stem"]),
        ("head", conv(2, 6, axes=1), ["cat"])),
    net("fan-out", (2,), ["a", "b"], {"stem": 3}, "x a b",
        ("stem", dense(3, 2), ["x"]), ("act", eq.ReLU(), ["stem"]), ("a", dense(2, 3), ["act"]), ("b", dense(4, 3), ["act"])),
    net("depthwise", (2, 4, 4), ["head"], {"stem": 3, "dw": 6}, "x head",
        ("stem", conv(3, 2), ["x"]), ("act", eq.ReLU6(), ["stem"]), ("dw", conv(6, 3, 3, groups=3, padding=1), ["act"]),
        ("head", conv(2, 6), ["dw"])),
    net("grouped", (2, 3, 3), ["head"], {"stem": 4, "groups": 6}, "x head",
        ("stem", conv(4, 2), ["x"]), ("groups", conv(6, 4, 2, groups=2), ["stem"]), ("head", conv(2, 6), ["groups"])),
    net("transposed", (2, 2, 2), ["head"], {"stem": 4, "up": 6}, "x head",
        ("stem", conv(4, 2), ["x"]), ("up", eq.ConvTranspose(RNG.normal(size=(6, 2, 2, 2)), bias(6), stride=2, groups=2), ["stem"]),
        ("head", conv(2, 6), ["up"])),
    net("flatten", (1, 2, 3), ["head"], {"conv": 2}, "x head",
        ("conv", conv(2, 1), ["x"]), ("flat", eq.Flatten(), ["conv"]), ("head", dense(2, 12), ["flat"])),
    net("flatten, then add", (1, 3), ["head"], {"conv": 2}, "x head",
        ("conv", conv(2, 1, axes=1), ["x"]), ("flat", eq.Flatten(), ["conv"]), ("fc", dense(6, 6), ["flat"]),
        ("add", eq.Add(), ["fc", "flat"]), ("head", dense(2, 6), ["add"])),
    net("unflatten", (2,), ["head"], {"fc": 2, "conv": 3}, "x head",
        ("fc", dense(6, 2), ["x"]), ("act", eq.ReLU(), ["fc"]), ("space", eq.Unflatten((2, 3)), ["act"]),
        ("conv", conv(3, 2, axes=1), ["space"]), ("head", conv(1, 3, axes=1), ["conv"])),
    net("transpose", (2, 4), ["head"], {"conv": 1, "mix": 2}, "x head",
        ("conv", conv(3, 2, axes=1), ["x"]), ("turn", eq.Transpose((1, 0)), ["conv"]), ("mix", conv(2, 4, axes=1), ["turn"]),
        ("head", conv(1, 2, axes=1), ["mix"])),
    net("shuffle", (2, 3, 3), ["head"], {"stem": 4, "groups": 4}, "x head",
        ("stem", conv(4, 2), ["x"]), ("shuffle", eq.Permute((0, 2, 1, 3)), ["stem"]), ("groups", conv(4, 4, groups=2), ["shuffle"]),
        ("back", eq.Permute((3, 1, 0, 2)), ["groups"]), ("head", conv(2, 4), ["back"])),
    net("shuffle onto itself", (2, 3), ["head"], {"stem": 2}, "x head",  # 0 -> 1 -> 2 -> 0 makes one cycle of three; channel 3 stays
        ("stem", conv(4, 2, axes=1), ["x"]), ("shuffle", eq.Permute((1, 2, 0, 3)), ["stem"]), ("add", eq.Add(), ["stem", "shuffle"]),
        ("head", conv(2, 4, axes=1), ["add"])),
    net("slice", (2, 3, 3), ["head"], {"stem": 4, "branch": 2}, "x head",
        ("stem", conv(4, 2), ["x"]), ("left", eq.Slice(0, 2), ["stem"]), ("right", eq.Slice(-2, 4), ["stem"]),
        ("branch", conv(2, 2), ["left"]), ("cat", eq.Concat(), ["branch", "right"]), ("head", conv(2, 4), ["cat"])),
    net("a slice that drops channels", (2,), ["head"], {"stem": 4}, "x head",
        ("stem", dense(4, 2), ["x"]), ("some", eq.Slice(1, 3), ["stem"]), ("head", dense(1, 2), ["some"])),
    net("overlapping slices added", (2,), ["head"], {"stem": 1}, "x head",
        ("stem", dense(4, 2), ["x"]), ("low", eq.Slice(0, 3), ["stem"]), ("high", eq.Slice(1, 4), ["stem"]),
        ("add", eq.Add(), ["low", "high"]), ("head", dense(1, 3), ["add"])),
    net("pools and paddings", (2, 4, 4), ["head"], {"stem": 3}, "x head",
        ("stem", conv(3, 2), ["x"]), ("max", eq.MaxPool(3, stride=1, padding=1), ["stem"]), ("zero", eq.Pad(((1, 0), (0, 2))), ["max"]),
        ("avg", eq.AvgPool(2, padding=1, count_include_pad=False), ["zero"]), ("up", eq.Upsample((2, 1)), ["avg"]),
        ("head", conv(2, 3, 2), ["up"])),
    net("pad with a constant", (2, 3, 3), ["head"], {"conv": 4}, "x stem pad head",
        ("stem", conv(3, 2), ["x"]), ("pad", eq.Pad(1, 1.5), ["stem"]), ("conv", conv(4, 3, 3), ["pad"]), ("head", conv(2, 4), ["conv"])),
    net("conv used twice", (2, 3, 3), ["head"], {"stem": 3}, "x head",  # reads stem and itself, so both ends carry one factor
        ("stem", conv(3, 2), ["x"]), ("first", twice, ["stem"]), ("act", eq.ReLU(), ["first"]), ("second", twice, ["act"]),
        ("head", conv(2, 3), ["second"])),
    net("siamese", (2, 3, 3), ["head"], {"of_x": 4}, "x y head",
        ("of_x", siamese, ["x"]), ("of_y", siamese, ["y"]), ("cat", eq.Concat(), ["of_x", "of_y"]),
        ("head", conv(2, 8), ["cat"]), y=(2, 3, 3)),
    net("siamese, one branch seen", (2, 3, 3), ["head", "of_y"], {}, "x y of_x of_y head",
        ("of_x", siamese, ["x"]), ("of_y", siamese, ["y"]), ("head", conv(2, 4), ["of_x"]), y=(2, 3, 3)),
    net("two inputs, two outputs", (2, 3, 3), ["a", "b"], {"stem_x": 3, "stem_y": 4}, "x y a b",
        ("stem_x", conv(3, 2), ["x"]), ("stem_y", conv(4, 1), ["y"]), ("cat", eq.Concat(), ["stem_x", "stem_y"]),
        ("a", conv(2, 7), ["cat"]), ("b", conv(1, 3), ["stem_x"]), y=(1, 3, 3)),
    net("inner value that is an output", (2,), ["act", "head"], {"fc2": 4}, "x fc1 act head",
        ("fc1", dense(3, 2), ["x"]), ("act", eq.ReLU(), ["fc1"]), ("fc2", dense(4, 3), ["act"]), ("head", dense(1, 4), ["fc2"])),
    net("input that is an output", (2,), ["x", "head"], {"fc": 3}, "x head", ("fc", dense(3, 2), ["x"]), ("head", dense(1, 3), ["fc"])),
    net("sigmoid", (2,), ["head"], {"fc2": 4}, "x fc1 curve head",
        ("fc1", dense(3, 2), ["x"]), ("curve", eq.Sigmoid(), ["fc1"]), ("fc2", dense(4, 3), ["curve"]), ("head", dense(1, 4), ["fc2"])),
    net("one channel of three into a curve", (2,), ["head"], {"fc": 2}, "x fc first curve cat head",
        ("fc", dense(3, 2), ["x"]), ("first", eq.Slice(0, 1), ["fc"]), ("curve", eq.Tanh(), ["first"]), ("rest", eq.Slice(1, 3), ["fc"]),
        ("cat", eq.Concat(), ["curve", "rest"]), ("head", dense(1, 3), ["cat"])),
    net("squeeze and excite", (2, 3, 3), ["head"], {"stem": 4, "squeeze": 2}, "x excite gate head",
        ("stem", conv(4, 2), ["x"]), ("gap", eq.GlobalAvgPool(), ["stem"]), ("squeeze", conv(2, 4), ["gap"]),
        ("act", eq.ReLU(), ["squeeze"]), ("excite", conv(4, 2), ["act"]), ("gate", eq.Sigmoid(), ["excite"]),
        ("mul", eq.Mul(), ["stem", "gate"]), ("head", conv(2, 4), ["mul"])),
    net("softmax", (2,), ["head"], {"fc1": 3}, "x fc2 prob head",
        ("fc1", dense(3, 2), ["x"]), ("fc2", dense(3, 3), ["fc1"]), ("prob", eq.Softmax(), ["fc2"]), ("head", dense(2, 3), ["prob"])),
    net("product", (2,), ["head"], {"a": 3, "b": 3, "fc": 4}, "x head",
        ("a", dense(3, 2), ["x"]), ("b", dense(3, 2), ["x"]), ("mul", eq.Mul(), ["a", "b"]), ("fc", dense(4, 3), ["mul"]),
        ("head", dense(1, 4), ["fc"])),
    net("3d", (1, 2, 3, 2), ["head"], {"conv": 2, "dw": 4}, "x head",
        ("conv", conv(2, 1, axes=3), ["x"]), ("dw", conv(4, 2, 2, groups=2, axes=3), ["conv"]), ("gap", eq.GlobalAvgPool(), ["dw"]),
        ("flat", eq.Flatten(), ["gap"]), ("head", dense(1, 4), ["flat"])),
    net("dead end", (2,), ["head"], {"stem": 3, "loose": 2}, "x head",  # nobody reads it: no equation holds it
        ("stem", dense(3, 2), ["x"]), ("loose", dense(2, 3), ["stem"]), ("looser", eq.ReLU(), ["loose"]), ("head", dense(1, 3), ["stem"])),
    net("product that is an output", (2,), ["mul"], {"a": 3}, "x mul",  # b carries the inverse of a
        ("a", dense(3, 2), ["x"]), ("b", dense(3, 2), ["x"]), ("mul", eq.Mul(), ["a", "b"])),
    net("product of three", (2,), ["head"], {"a": 3, "b": 3, "c": 3}, "x head",
        ("a", dense(3, 2), ["x"]), ("b", dense(3, 2), ["x"]), ("c", dense(3, 2), ["x"]), ("mul", eq.Mul(), ["a", "b", "c"]),
        ("head", dense(1, 3), ["mul"])),
    net("one channel times many", (2, 3), ["head"], {"one": 1, "many": 3}, "x head",
        ("one", conv(1, 2, axes=1), ["x"]), ("many", conv(3, 2, axes=1), ["x"]), ("mul", eq.Mul(), ["many", "one"]),
        ("head", conv(2, 3, axes=1), ["mul"])),
    net("square", (2,), ["head"], {"stem": 3}, "x head",
        ("stem", dense(3, 2), ["x"]), ("square", eq.Mul(), ["stem", "stem"]), ("head", dense(1, 3), ["square"])),
    net("square that is an output", (2,), ["square"], {}, "x stem square",  # 2 u = 0
        ("stem", dense(3, 2), ["x"]), ("square", eq.Mul(), ["stem", "stem"])),
    net("square and cube made equal", (2,), ["head"], {"half": 3}, "x head",  # 2 u = 3 v: u = 3 t, v = 2 t
        ("a", dense(3, 2), ["x"]), ("b", dense(3, 2), ["x"]), ("square", eq.Mul(), ["a", "a"]), ("cube", eq.Mul(), ["b", "b", "b"]),
        ("add", eq.Add(), ["square", "cube"]), ("head", dense(1, 3), ["add"])),
    net("residual around a product", (2,), ["head"], {"stem": 3}, "x gate head",  # x + x gate
        ("stem", dense(3, 2), ["x"]), ("gate", dense(3, 2), ["x"]), ("mul", eq.Mul(), ["stem", "gate"]),
        ("add", eq.Add(), ["stem", "mul"]), ("head", dense(1, 3), ["add"])),
    net("shared gate", (2,), ["head"], {"a": 3, "b": 3}, "x gate curve head",
        ("a", dense(3, 2), ["x"]), ("b", dense(3, 2), ["x"]), ("gate", dense(3, 2), ["x"]), ("curve", eq.Sigmoid(), ["gate"]),
        ("of_a", eq.Mul(), ["a", "curve"]), ("of_b", eq.Mul(), ["b", "curve"]), ("cat", eq.Concat(), ["of_a", "of_b"]),
        ("head", dense(1, 6), ["cat"])),
    net("slopes", (2,), ["head"], {"fc": 4}, "x head",
        ("fc", dense(4, 2), ["x"]), ("act", eq.Sloped(eq.SiLU(), np.array([1.0, 2.0, 0.5, 1.0])), ["fc"]), ("head", dense(1, 4), ["act"])),
    net("swiglu", (3, 4), ["down"], {"norm": 3, "up": 5}, "x gate curve down",
        ("norm", rmsnorm(3), ["x"]), ("gate", conv(5, 3, axes=1), ["norm"]), ("up", conv(5, 3, axes=1), ["norm"]),
        ("curve", eq.SiLU(), ["gate"]), ("mul", eq.Mul(), ["curve", "up"]), ("down", conv(3, 5, axes=1), ["mul"])),
    net("layernorm", (2, 4), ["head"], {"stem": 1, "norm": 3}, "x head",  # all channels of the stem share one factor
        ("stem", conv(3, 2, axes=1), ["x"]), ("norm", layernorm(3), ["stem"]), ("head", conv(2, 3, axes=1), ["norm"])),
    net("groupnorm", (2, 3, 3), ["head"], {"stem": 2, "norm": 4}, "x head",
        ("stem", conv(4, 2), ["x"]), ("norm", eq.GroupNorm(2, np.array([0.5, -1.0, 2.0, 1.0]), bias(4)), ["stem"]),
        ("head", conv(2, 4), ["norm"])),
    net("instancenorm", (2, 3, 3), ["head"], {"stem": 4, "norm": 4}, "x head",
        ("stem", conv(4, 2), ["x"]), ("norm", eq.InstanceNorm(np.array([0.5, -1.0, 2.0, 1.0]), bias(4)), ["stem"]),
        ("act", eq.ReLU(), ["norm"]), ("head", conv(2, 4), ["act"])),
    net("norm used twice", (3, 4), ["head"], {"norm": 3}, "x mid head",
        ("first", rms, ["x"]), ("mid", conv(3, 3, axes=1), ["first"]), ("second", rms, ["mid"]), ("head", conv(2, 3, axes=1), ["second"])),
    net("attention", (3, 5), ["out"], {"norm": 3, "q": 4, "v": 4}, "x scores prob out",  # k carries the inverse of q
        ("norm", layernorm(3), ["x"]), ("q", conv(4, 3, axes=1), ["norm"]), ("k", conv(4, 3, axes=1), ["norm"]),
        ("v", conv(4, 3, axes=1), ["norm"]), ("scores", eq.Scores(2, scale=0.5), ["q", "k"]),
        ("prob", eq.Softmax(-1, "causal"), ["scores"]), ("mix", eq.Mix(2), ["prob", "v"]), ("out", conv(3, 4, axes=1), ["mix"])),
    net("grouped queries, rotary", (3, 5), ["out"], {"k": 4, "v": 8}, "x scores prob out",  # of k two pairs a head
        ("q", conv(16, 3, axes=1), ["x"]), ("k", conv(8, 3, axes=1), ["x"]), ("v", conv(8, 3, axes=1), ["x"]),
        ("turned_q", rotary(4), ["q"]), ("turned_k", rotary(2), ["k"]), ("scores", eq.Scores(4, 2, 0.5), ["turned_q", "turned_k"]),
        ("prob", eq.Softmax(-1), ["scores"]), ("mix", eq.Mix(4, 2), ["prob", "v"]), ("out", conv(3, 16, axes=1), ["mix"])),
    net("linear attention", (3, 4), ["out"], {"q": 4, "k": 1, "v": 4}, "x out",  # no softmax: the head carries a factor of its own
        ("q", conv(4, 3, axes=1), ["x"]), ("k", conv(4, 3, axes=1), ["x"]), ("v", conv(4, 3, axes=1), ["x"]),
        ("scores", eq.Scores(1), ["q", "k"]), ("mix", eq.Mix(1), ["scores", "v"]), ("out", conv(3, 4, axes=1), ["mix"])),
    net("pre-norm block", (3, 4), ["head"], {"stem": 1, "v": 3, "last": 3}, "x norm scores prob head",  # norm norm: 2 u = 0
        ("stem", conv(3, 3, axes=1), ["x"]), ("norm", layernorm(3), ["stem"]), ("v", conv(3, 3, axes=1), ["norm"]),
        ("scores", eq.Scores(1), ["norm", "norm"]), ("prob", eq.Softmax(-1), ["scores"]), ("mix", eq.Mix(1), ["prob", "v"]),
        ("out", conv(3, 3, axes=1), ["mix"]), ("add", eq.Add(), ["stem", "out"]), ("last", layernorm(3), ["add"]),
        ("head", conv(2, 3, axes=1), ["last"])),
]

BY_NAME = {net.name: net for net in NETS}
