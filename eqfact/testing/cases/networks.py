"""On which networks are the laws asked for? One small one a topology: what exporters write, and what implementations stumbled over.

Weights are few multiples of a power of two, their rows of different size, so that equalization has something to do and float32 rounds
nothing. A new topology is a row here; every level that asks about networks then asks about it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from eqfact import ops
from eqfact.graph import Graph, Node
from eqfact.ops import Array, Op
from eqfact.testing.cases.case import Draw
from eqfact.testing.wiring import wired

Build = Callable[["Weights"], Graph]


class Weights:
    """Ops with the weights of a network, drawn one after the other."""

    def __init__(self, name: str) -> None:
        self.draw = Draw(f"network {name}")
        #: Binary places of weights; fewer in deep networks, so that float32 holds their outputs.
        self.bits = 2

    def rows(self, out: int, *shape: int) -> Array:
        """Weights ``(out, *shape)``: quarters up to 1, each row times 1, 1/2 or 1/4."""
        sizes = np.array([2.0 ** -self.draw.below(self.bits + 1) for _ in range(out)])
        weight: Array = self.draw.dyadic((out, *shape), 1.0, self.bits) * sizes.reshape(out, *(1,) * len(shape))
        return weight

    def bias(self, out: int) -> Array:
        """Positive, so that no activation is off for good."""
        return self.draw.positive((out,), 0.5, 3)

    def dense(self, out: int, channels: int) -> ops.Dense:
        """A dense layer with a bias."""
        return ops.Dense(self.rows(out, channels), self.bias(out))

    def conv(self, out: int, channels: int, kernel: int = 1, *, groups: int = 1, padding: int = 0, stride: int = 1) -> ops.Conv:
        """A convolution over two axes with a bias."""
        return ops.Conv(self.rows(out, channels // groups, kernel, kernel), self.bias(out), groups=groups, padding=padding, stride=stride)

    def batchnorm(self, channels: int) -> ops.BatchNorm:
        """One whose roots are powers of two."""
        var = np.array([(0.75, 3.75)[self.draw.below(2)] for _ in range(channels)])
        return ops.BatchNorm(self.draw.dyadic((channels,), 1.0, 2), self.bias(channels), self.bias(channels), var, eps=0.25)


@dataclass(frozen=True, eq=False)
class Net:
    """A topology."""

    name: str
    build: Build
    #: What it asks of an implementation, and what went wrong.
    law: str
    why: str
    #: Whether its forward pass rounds nothing.
    exact: bool = True

    def graph(self, dtype: str = "float64") -> Graph:
        """The network in a floating dtype."""
        graph = self.build(Weights(self.name))
        done: dict[int, Op] = {}
        for node in graph.nodes:  # an op at two nodes stays one
            done.setdefault(id(node.op), cast(node.op, dtype))
        return Graph(dict(graph.inputs), tuple(Node(n.name, done[id(n.op)], n.inputs) for n in graph.nodes), graph.outputs)

    def inputs(self, dtype: str = "float64", batch: int = 2) -> dict[str, Array]:
        """Data for it."""
        draw = Draw(f"inputs {self.name}")
        return {name: draw.dyadic((batch, *shape), 2.0, 2).astype(dtype) for name, shape in self.build(Weights(self.name)).inputs.items()}


def cast(op: Op, dtype: str) -> Op:
    """The op with its parameters in another floating dtype."""
    changed = {key: value.astype(dtype) for key, value in vars(op).items()
               if isinstance(value, np.ndarray) and value.dtype.kind == "f" and key in op.__dataclass_fields__}  # type: ignore[attr-defined]
    return replace(op, **changed) if changed else op  # type: ignore[type-var]  # every final op is a dataclass


def all_networks() -> Iterator[Net]:
    """The table."""
    for name, (build, law, why) in EXACT.items():
        yield Net(name, build, law, why)
    for name, (build, law, why) in ROUNDING.items():
        yield Net(name, build, law, why, exact=False)


_chain = Graph.chain


IMAGE = (2, 4, 4)


def _residual(w: Weights) -> Graph:
    return wired(IMAGE, "y", ("a", w.conv(3, 2), "x"), ("r", ops.ReLU(), "a"), ("b", w.conv(3, 3, 3, padding=1), "r"),
                  ("s", ops.Add(), "r b"), ("t", ops.ReLU(), "s"), ("y", w.conv(2, 3), "t"))


def _residuals(w: Weights) -> Graph:
    w.bits = 1
    nodes: list[tuple[str, Op, str]] = [("a", w.conv(3, 2), "x")]
    for i, before in ((1, "a"), (2, "s1")):
        nodes += [(f"b{i}", w.conv(4, 3), before), (f"r{i}", ops.ReLU(), f"b{i}"), (f"c{i}", w.conv(3, 4), f"r{i}"),
                  (f"s{i}", ops.Add(), f"{before} c{i}")]
    return wired(IMAGE, "y", *nodes, ("y", w.conv(2, 3), "s2"))


def _stream(w: Weights) -> Graph:
    """Layers that read the channels of a sum with weights of different size."""
    sizes = np.array([1.0, 0.25, 0.5]).reshape(1, 3, 1, 1)
    first, last = (replace(op, weight=op.weight * sizes) for op in (w.conv(3, 3), w.conv(2, 3)))
    return wired(IMAGE, "y", ("a", w.conv(3, 2), "x"), ("b", first, "a"), ("s", ops.Add(), "a b"), ("y", last, "s"))


def _shared(w: Weights) -> Graph:
    op = w.conv(3, 2)
    return wired({"x": IMAGE, "z": IMAGE}, "y", ("a", op, "x"), ("b", op, "z"), ("s", ops.Concat(), "a b"), ("r", ops.ReLU(), "s"),
                  ("y", w.conv(2, 6), "r"))


def _recurrent(w: Weights) -> Graph:
    op = w.dense(3, 3)
    return wired((2,), "y", ("a", w.dense(3, 2), "x"), ("b", op, "a"), ("r", ops.ReLU(), "b"), ("c", op, "r"), ("y", w.dense(2, 3), "c"))


def _dead(w: Weights) -> Graph:
    first, last = w.rows(4, 3), w.rows(2, 4)
    first[1] = 0
    last[:, 2] = 0
    return _chain((3,), a=ops.Dense(first, np.array([0.25, 0.0, 0.5, -0.25])), r=ops.ReLU(), y=ops.Dense(last, w.bias(2)))


def _nearly_dead(w: Weights) -> Graph:
    first = w.rows(3, 3)
    first[1] *= 2.0**-9
    return _chain((3,), a=ops.Dense(first, np.array([0.25, 2.0**-10, -0.25])), r=ops.ReLU(), y=w.dense(2, 3))


def _attention(w: Weights, *, rotary: bool = False, softmax: bool = False, heads: int = 2, width: int = 2) -> Graph:
    """Two heads of keys and values; as many of queries, or more."""
    w.bits = 1
    turn, keys = (ops.Rotary(n, np.array([[1.0, 0.5, 0.25]]), np.array([[0.0, 0.5, -0.5]])) for n in (heads, 2))
    nodes: list[tuple[str, Op, str]] = [
        (name, ops.Conv(w.rows(n * width, 3, 1), w.bias(n * width)), "x") for name, n in (("q", heads), ("k", 2), ("v", 2))]
    if rotary:
        nodes += [("tq", turn, "q"), ("tk", keys, "k")]
    nodes += [("s", ops.Scores(heads, 2, 0.5), "tq tk" if rotary else "q k")]
    nodes += [("p", ops.Softmax(-1), "s")] * softmax
    return wired((3, 3), "y", *nodes, ("m", ops.Mix(heads, 2), "p v" if softmax else "s v"),
                  ("y", ops.Conv(w.rows(3, heads * width, 1), w.bias(3)), "m"))


def _norm(norm: Callable[[Array, Array], Op]) -> Build:
    def build(w: Weights) -> Graph:
        return _chain((2, 3), a=ops.Conv(w.rows(4, 2, 1), w.bias(4)), n=norm(w.draw.dyadic((4,), 1.0, 2), w.bias(4)),
                      b=ops.Conv(w.rows(3, 4, 1), w.bias(3)), r=ops.ReLU(), y=ops.Conv(w.rows(2, 3, 1)))

    return build


def _curve(op: Op) -> Build:
    return lambda w: _chain((3,), a=w.dense(4, 3), r=ops.ReLU(), b=w.dense(3, 4), c=op, d=w.dense(4, 3),
                            t=ops.LeakyReLU(0.25), y=w.dense(2, 4))


#: Topologies whose forward pass rounds nothing: how to build one, its law, and the bug that is looked for.
EXACT: dict[str, tuple[Build, str, str]] = {
    "chain": (lambda w: _chain((3,), a=w.dense(4, 3), r=ops.ReLU(), b=w.dense(5, 4), s=ops.ReLU(), y=w.dense(2, 5)),
              "each hidden channel has a factor of its own", "the plain case"),
    "linear": (lambda w: _chain((3,), a=w.dense(4, 3), b=w.dense(4, 4), y=w.dense(2, 4)),
               "layers without an activation between them, too", "equalization that looks for activations"),
    "one-layer": (lambda w: _chain((3,), y=w.dense(2, 3)), "input and output are pinned: nothing is free", "the last layer rescaled"),
    "convs": (lambda w: _chain(IMAGE, a=w.conv(4, 2, 3, padding=1), r=ops.ReLU(), b=w.conv(3, 4, 2, stride=2), s=ops.ReLU(),
                               y=w.conv(2, 3)),
              "a factor stands along the channels, whatever the kernel", "a factor along an axis of the kernel"),
    "no-bias": (lambda w: _chain((3,), a=ops.Dense(w.rows(4, 3)), r=ops.ReLU(), y=ops.Dense(w.rows(2, 4))),
                "no bias is needed", "a bias that is read where none is"),
    "relu6": (lambda w: _chain((3,), a=w.dense(4, 3), r=ops.Clip(0.0, 1.5), y=w.dense(2, 4)),
              "clip(f x) = f clip(x) with bounds times f, a channel", "ReLU6 kept at 6, or replaced by ReLU (AIMET, brevitas)"),
    "clip-channels": (lambda w: _chain(IMAGE, a=w.conv(3, 2), r=ops.Clip(np.array([-0.5, 0.0, -math.inf]), np.array([0.5, 1.0, 0.25])),
                                       y=w.conv(2, 3)),
                      "bounds for each channel take up its factor; an open side stays open", "one bound for all channels"),
    "clip-same": (lambda w: _chain((3,), a=w.dense(3, 3), r=ops.Clip(-1.0, math.inf), y=w.dense(2, 3)),
                  "a bound below zero takes up the factor, too", "only upper bounds rescaled"),
    "leakyrelu": (lambda w: _chain((3,), a=w.dense(4, 3), r=ops.LeakyReLU(0.25), y=w.dense(2, 4)), "any slope is homogeneous",
                  "LeakyReLU taken for a curve that blocks"),
    "prelu": (lambda w: _chain(IMAGE, a=w.conv(3, 2), r=ops.PReLU(np.array([0.5, -0.25, 2.0])), y=w.conv(2, 3)),
              "slopes stay as they are", "slopes multiplied by the factor (one of seven tools tried)"),
    "abs": (lambda w: _chain(IMAGE, a=w.conv(4, 2), r=ops.Abs(), p=ops.MinPool(2), y=w.conv(2, 4)), "|f x| = f |x|, and so of minima",
            "an unknown op that blocks"),
    "fan-out": (lambda w: wired(IMAGE, "y", ("a", w.conv(3, 2), "x"), ("r", ops.ReLU(), "a"), ("b", w.conv(2, 3), "r"),
                                 ("c", w.conv(2, 3, 3, padding=1), "r"), ("s", ops.Concat(), "b c"), ("y", w.conv(2, 4), "s")),
                "every reader is divided by the factor", "the first reader alone is divided"),
    "residual": (_residual, "what meets in a sum shares one factor", "tied residuals scaled apart"),
    "residuals": (_residuals, "all that meets along a stream shares one factor", "pairs tied, not chains of them"),
    "residual-input": (lambda w: wired((3, 2, 2), "y", ("a", w.conv(3, 3), "x"), ("s", ops.Add(), "a x"), ("r", ops.ReLU(), "s"),
                                        ("y", w.conv(2, 3), "r")),
                       "a sum with the network's input is pinned", "the input's share of the sum forgotten"),
    "difference": (lambda w: wired((3,), "y", ("a", w.dense(4, 3), "x"), ("b", w.dense(4, 3), "x"), ("s", ops.Sub(), "a b"),
                                    ("y", w.dense(2, 4), "s")),
                   "differences tie as sums do", "Sub taken for an op of one value"),
    "maximum": (lambda w: wired((3,), "y", ("a", w.dense(4, 3), "x"), ("b", w.dense(4, 3), "x"), ("m", ops.Max(), "a b"),
                                 ("y", w.dense(2, 4), "m")),
                "maxima tie as sums do", "Max taken for an op of one value"),
    "add-broadcast": (lambda w: wired(IMAGE, "y", ("a", w.conv(3, 2), "x"), ("g", ops.GlobalAvgPool(), "a"), ("c", w.conv(3, 3), "g"),
                                       ("s", ops.Add(), "a c"), ("y", w.conv(2, 3), "s")),
                      "a sum over broadcast space ties its channels", "values of another size are not tied"),
    "add-one-channel": (lambda w: wired(IMAGE, "y", ("a", w.conv(3, 2), "x"), ("b", w.conv(1, 2), "x"), ("s", ops.Add(), "a b"),
                                         ("y", w.conv(2, 3), "s")),
                        "a single channel added to all ties them all", "a single channel tied to the first"),
    "concat": (lambda w: wired(IMAGE, "y", ("a", w.conv(2, 2), "x"), ("b", w.conv(3, 2), "x"), ("r", ops.ReLU(), "b"),
                                ("s", ops.Concat(), "a r"), ("y", w.conv(2, 5), "s")),
               "the reader's columns are those of the concat's order", "channel offsets of a concat"),
    "concat-input": (lambda w: wired(IMAGE, "y", ("a", w.conv(2, 2), "x"), ("s", ops.Concat(), "x a"), ("y", w.conv(2, 4), "s")),
                     "some channels of a value pinned, others free", "a value that is pinned as a whole"),
    "concat-space": (lambda w: wired(IMAGE, "y", ("a", w.conv(3, 2), "x"), ("b", w.conv(3, 2), "x"), ("s", ops.Concat(1), "a b"),
                                      ("y", w.conv(2, 3), "s")),
                     "what stands side by side in space shares factors", "concat along space taken for one along channels"),
    "concat-twice": (lambda w: wired(IMAGE, "y", ("a", w.conv(2, 2), "x"), ("s", ops.Concat(), "a a"), ("y", w.conv(2, 4), "s")),
                     "two channels of a value with one factor", "a factor applied twice, or once"),
    "depthwise": (lambda w: _chain(IMAGE, a=w.conv(3, 2), r=ops.ReLU(), d=w.conv(3, 3, 3, groups=3, padding=1), s=ops.ReLU(),
                                   y=w.conv(2, 3)),
                  "depthwise channels are made and read one by one", "a depthwise maximum collapsed to one number (the authors' script)"),
    "multiplier": (lambda w: _chain(IMAGE, a=w.conv(2, 2), d=w.conv(4, 2, 2, groups=2), y=w.conv(2, 4)),
                   "a channel read by several of its own group", "a depthwise multiplier of 1 taken for granted"),
    "grouped": (lambda w: _chain(IMAGE, a=w.conv(4, 2), r=ops.ReLU(), g=w.conv(6, 4, 2, groups=2), s=ops.ReLU(), y=w.conv(2, 6)),
                "a group reads its own channels", "columns counted within the group"),
    "transposed": (lambda w: _chain((2, 3, 3), a=w.conv(3, 2), r=ops.ReLU(), t=ops.ConvTranspose(w.rows(4, 3, 2, 2), w.bias(4), stride=2),
                                    s=ops.ReLU(), y=w.conv(2, 4)),
                   "weights of a transposed convolution stand as (in, out) in files", "its axes exchanged (torch.ao, brevitas)"),
    "transposed-groups": (lambda w: _chain((2, 2, 2), a=w.conv(4, 2), r=ops.ReLU(),
                                           t=ops.ConvTranspose(w.rows(6, 2, 2, 2), w.bias(6), stride=2, groups=2), y=w.conv(2, 6)),
                          "the same in groups", "the wrong axis of a grouped transposed convolution"),
    "shared": (_shared, "one set of weights at two nodes has one set of factors", "a shared weight rescaled twice"),
    "recurrent": (_recurrent, "weights that read what they make", "a loop in what makes and what reads"),
    "flatten": (lambda w: _chain(IMAGE, a=w.conv(3, 2, 3), r=ops.ReLU(), f=ops.Flatten(), y=w.dense(2, 12)),
                "a channel's factor is repeated over its pixels", "flatten channel-last (the authors' script reads NHWC)"),
    "unflatten": (lambda w: _chain((3,), a=w.dense(8, 3), r=ops.ReLU(), u=ops.Unflatten((2, 2, 2)), y=w.conv(2, 2)),
                  "pixels of a channel share its factor", "one factor a pixel"),
    "slice": (lambda w: wired(IMAGE, "y", ("a", w.conv(4, 2), "x"), ("b", ops.Slice(0, 2), "a"), ("c", ops.Slice(2, 4), "a"),
                               ("s", ops.Add(), "b c"), ("y", w.conv(2, 2), "s")),
              "two halves of a value, tied by their sum", "a slice that forgets its offset"),
    "permute": (lambda w: _chain(IMAGE, a=w.conv(4, 2), p=ops.Permute((2, 0, 3, 1)), r=ops.ReLU(), y=w.conv(2, 4)),
                "channels keep their factors where they move", "the inverse order"),
    "shuffle": (lambda w: _chain((2, 2, 2), a=w.conv(4, 2), u=ops.Rearrange(((1, 4), (2, 1), (2, 1)), ((0, 1), (2, 3), (4, 5))),
                                 p=ops.Rearrange(((2, 2), (2, 1), (2, 1)), ((1, 0), (2, 3), (4, 5))), g=w.conv(4, 4, 2, groups=2),
                                 y=w.conv(2, 4)),
                "a channel shuffle moves factors", "channel shuffle taken for an op over space"),
    "pixel-shuffle": (lambda w: _chain((2, 2, 2), a=w.conv(8, 2), p=ops.Rearrange(((2, 4), (2, 1), (2, 1)), ((0,), (2, 1), (4, 3, 5))),
                                       y=w.conv(2, 2)),
                      "channels that become pixels of one channel are tied", "channels of a pixel shuffle left apart"),
    "take": (lambda w: _chain(IMAGE, a=w.conv(3, 2), t=ops.Take((2, 0, 0, 1), 0), y=w.conv(2, 4)),
             "a channel that is read twice", "one of two copies divided"),
    "transpose-space": (lambda w: _chain((2, 3, 4), a=w.conv(3, 2), t=ops.Transpose((0, 2, 1)), y=w.conv(2, 3)),
                        "transposing space moves no factor", "any transpose taken for one of channels"),
    "transpose-channels": (lambda w: _chain((2, 3, 4), a=w.conv(3, 2), t=ops.Transpose((1, 0, 2)), y=w.conv(2, 3)),
                           "channels that become space are tied", "a factor that ends up on rows"),
    "pools": (lambda w: _chain((2, 6, 6), a=w.conv(3, 2), m=ops.MaxPool(2, stride=2), p=ops.AvgPool((1, 2)),
                               y=w.conv(2, 3)),
              "pooling passes factors", "average pools that block"),
    "pad": (lambda w: _chain(IMAGE, a=w.conv(3, 2), r=ops.ReLU(), p=ops.Pad(1), y=w.conv(2, 3, 3)), "zeros stay zeros",
            "any padding that blocks"),
    "pad-value": (lambda w: _chain(IMAGE, a=w.conv(3, 2), r=ops.ReLU(), p=ops.Pad(1, 1.5), y=w.conv(2, 3, 3)),
                  "padding with another constant pins", "a constant that is not rescaled"),
    "upsample": (lambda w: _chain((2, 2, 2), a=w.conv(3, 2), u=ops.Upsample(2), y=w.conv(2, 3, 3)), "repeating passes factors",
                 "Resize that blocks"),
    "blend": (lambda w: _chain((2, 3, 2), a=w.conv(3, 2), u=ops.Blend(w.rows(4, 3)), y=w.conv(2, 3)),
              "a matrix over space passes factors", "its rows taken for channels"),
    "affine": (lambda w: _chain((2, 2, 2), a=w.conv(3, 2), u=ops.Affine(w.rows(3, 1, 2), w.rows(3, 2, 1)), y=w.conv(2, 3)),
               "f (s x + t) = s (f x) + f t", "the slope multiplied, too, or the shift left"),
    "extend": (lambda w: _chain((2, 2, 2), a=w.conv(3, 2), u=ops.Extend(w.rows(3, 1, 2), 1), y=w.conv(2, 3)),
               "a constant beside a value takes up its factor", "a class token left as it is"),
    "half-output": (lambda w: wired((3,), "o y", ("a", w.dense(4, 3), "x"), ("o", ops.Slice(0, 2), "a"), ("b", ops.Slice(2, 4), "a"),
                                     ("y", w.dense(2, 2), "b")),
                    "two channels of a layer are an output, two are free", "pinned channels left out of what the layer ranges"),
    "stream": (_stream, "what meets in a sum shares one factor, the smaller of what its layers ask for", "tied layers, each by itself"),
    "two-inputs": (lambda w: wired({"x": (2,), "z": (3,)}, "y", ("a", w.dense(4, 2), "x"), ("b", w.dense(4, 3), "z"),
                                    ("s", ops.Add(), "a b"),
                                    ("r", ops.ReLU(), "s"), ("y", w.dense(2, 4), "r")),
                   "all inputs are pinned", "the first input alone is pinned"),
    "two-outputs": (lambda w: wired((3,), "y z", ("a", w.dense(4, 3), "x"), ("r", ops.ReLU(), "a"), ("y", w.dense(2, 4), "r"),
                                     ("b", w.dense(3, 4), "r"), ("t", ops.ReLU(), "b"), ("z", w.dense(2, 3), "t")),
                    "all outputs are pinned", "the first output alone is pinned"),
    "inner-output": (lambda w: wired((3,), "y r", ("a", w.dense(4, 3), "x"), ("r", ops.ReLU(), "a"), ("b", w.dense(3, 4), "r"),
                                      ("t", ops.ReLU(), "b"), ("y", w.dense(2, 3), "t")),
                     "a value that is an output is pinned although others read it",
                     "an output that feeds a layer, too (the authors' script)"),
    "dead": (_dead, "a channel that nothing makes or reads keeps the factor 1", "0 / 0: NaN, and an endless loop (torch.ao)"),
    "nearly-dead": (_nearly_dead, "next to no range is no reason for a factor without bound", "factors of 1e8 that blow up a bias"),
    "batchnorm": (lambda w: _chain(IMAGE, a=w.conv(3, 2), n=w.batchnorm(3), r=ops.ReLU(), y=w.conv(2, 3)),
                  "a BatchNorm that was not folded absorbs any factor", "a BatchNorm that reads is left as it is"),
    "batchnorm-first": (lambda w: _chain(IMAGE, n=w.batchnorm(2), r=ops.ReLU(), y=w.conv(2, 2, 3, padding=1)),
                        "a BatchNorm makes channels of its own", "layers without a convolution before them"),
    "square": (lambda w: wired((3,), "y", ("a", w.dense(4, 3), "x"), ("p", ops.Mul(), "a a"), ("y", w.dense(2, 4), "p")),
               "(f x)^2 = f^2 x^2", "a product that carries the factor itself"),
    "product": (lambda w: wired((3,), "y", ("a", w.dense(4, 3), "x"), ("b", w.dense(4, 3), "x"), ("p", ops.Mul(), "a b"),
                                 ("y", w.dense(2, 4), "p")),
                "factors multiply where values do", "products that pin, or that carry one of the two"),
    "product-input": (lambda w: wired((3,), "y", ("a", w.dense(3, 3), "x"), ("p", ops.Mul(), "a x"), ("r", ops.ReLU(), "p"),
                                       ("y", w.dense(2, 3), "r")),
                      "a product with a pinned value carries the other's factor", "a product with the input that pins"),
    "product-output": (lambda w: wired((3,), "p", ("a", w.dense(2, 3), "x"), ("b", w.dense(2, 3), "x"), ("p", ops.Mul(), "a b")),
                       "a product that is an output leaves inverse factors", "both sides pinned"),
    "scores": (_attention, "queries and keys carry inverse factors, values and what is mixed the same", "attention that pins"),
    "scores-rotary": (lambda w: _attention(w, rotary=True), "channels that are turned into each other share a factor",
                      "a pair scaled apart"),
    "scores-grouped": (lambda w: _attention(w, heads=4, width=1), "scores carry what queries and keys leave them", "heads in turn"),
}

#: Topologies with roots, quotients and curves.
ROUNDING: dict[str, tuple[Build, str, str]] = {
    "sigmoid": (_curve(ops.Sigmoid()), "a curve blocks on both sides", "a factor through a sigmoid"),
    "hardswish": (_curve(ops.HardSwish()), "x g(x) is not homogeneous", "HardSwish taken for a kind of ReLU (onnxsim users, ESP-PPQ)"),
    "softmax": (_curve(ops.Softmax()), "Softmax blocks", "a factor through Softmax"),
    "sloped": (_curve(ops.Sloped(ops.SiLU(), np.array([0.5, 1.0, 2.0]))), "x g(s x) lets factors pass, which the slope takes up",
               "the slope left"),
    "avgpool-exclude": (lambda w: _chain(IMAGE, a=w.conv(3, 2), p=ops.AvgPool(3, stride=1, padding=1, count_include_pad=False),
                                         y=w.conv(2, 3)),
                        "a mean is homogeneous, whatever it counts", "another count"),
    "gate": (lambda w: wired(IMAGE, "y", ("a", w.conv(3, 2), "x"), ("r", ops.ReLU(), "a"), ("g", ops.GlobalAvgPool(), "r"),
                              ("c", w.conv(3, 3), "g"),
                              ("s", ops.Sigmoid(), "c"), ("p", ops.Mul(), "r s"), ("y", w.conv(2, 3), "p")),
             "squeeze and excite: the gate is pinned, the gated value is not", "the gated value pinned, or scaled without its reader"),
    "attention": (lambda w: _attention(w, softmax=True), "scores before a Softmax are pinned, queries and keys are not",
                  "attention that pins"),
    "attention-grouped": (lambda w: _attention(w, softmax=True, heads=4, width=1),
                          "all queries that read a key share the inverse of its factor",
                          "queries tied in turn"),
    "layernorm": (_norm(lambda g, b: ops.LayerNorm(g, b, 0.25)), "its input's channels are tied, its output's are free",
                  "channels scaled apart before a norm"),
    "rmsnorm": (_norm(lambda g, b: ops.RMSNorm(g, eps=0.25)), "eps takes up the square of the factor", "eps left"),
    "groupnorm": (_norm(lambda g, b: ops.GroupNorm(2, g, b, 0.25)), "a factor for each group", "one factor for all channels"),
    "instancenorm": (_norm(lambda g, b: ops.InstanceNorm(g, b, 0.25)), "a factor for each channel", "one factor for all channels"),
}
