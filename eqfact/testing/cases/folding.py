"""Level 1: which BatchNorms vanish into a neighbour, and with which weights?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from eqfact import ops
from eqfact.graph import Graph
from eqfact.testing.cases.case import Case
from eqfact.testing.cases.networks import IMAGE, Build, Net, Weights
from eqfact.testing.wire import arrays_json, network_json
from eqfact.testing.wiring import wired

LAW = "what a BatchNorm does to a channel, s x + t, is done by the weights before it (rows) or behind it (columns)"
STAYS = "a BatchNorm stays where folding it would change what something else reads"


def cases() -> Iterator[Case]:
    """The cases of this level."""
    for i, (name, (build, left, why)) in enumerate(TABLE.items()):
        rounds = name.startswith("rounds")
        for dtype in ("float32", "float64") if rounds else [("float32", "float64")[i % 2]]:
            net = Net(f"folding {name}", build, LAW, why)
            expected = {"judge": "network", "inputs": arrays_json(net.inputs(dtype)), "exact": not rounds, "batchnorms": left.split()}
            yield Case(f"1/{name}-{dtype}", "fold_batchnorm", {"network": network_json(net.graph(dtype))}, expected,
                       STAYS if left else LAW, "Meller et al. 2019, set-up (docs/porting.md, Level 1)", why)


_graph = partial(wired, IMAGE)


def _shared(w: Weights) -> Graph:
    op = w.conv(2, 2)
    return _graph("y", ("a", op, "x"), ("n", w.batchnorm(2), "a"), ("y", op, "n"))


def _real(channels: int, eps: float) -> ops.BatchNorm:
    """A variance so small that the eps counts."""
    return ops.BatchNorm(np.array([1.0, -0.5, 0.25])[:channels], np.array([0.5, 0.25, -0.5])[:channels],
                         np.array([0.25, -0.25, 0.5])[:channels], np.array([2.0**-10, 0.375, 1.5])[:channels], eps)


#: How to build a network, which of its BatchNorms stay, and the bug that is looked for.
TABLE: dict[str, tuple[Build, str, str]] = {
    "conv": (lambda w: Graph.chain(IMAGE, a=w.conv(3, 2, 3, padding=1), y=w.batchnorm(3)), "", "rows taken for columns"),
    "conv-no-bias": (lambda w: Graph.chain(IMAGE, a=ops.Conv(w.rows(3, 2, 2, 2)), y=w.batchnorm(3)), "",
                     "a bias that is missing, and needed now"),
    "conv-relu-conv": (lambda w: Graph.chain(IMAGE, a=w.conv(3, 2), n=w.batchnorm(3), r=ops.ReLU(), b=w.conv(2, 3), y=w.batchnorm(2)), "",
                       "the existing bias forgotten: b' = s b + t"),
    "dense": (lambda w: Graph.chain((3,), a=w.dense(4, 3), y=w.batchnorm(4)), "", "the mean taken off after the scale"),
    "depthwise": (lambda w: Graph.chain(IMAGE, a=w.conv(2, 2, 3, groups=2, padding=1), y=w.batchnorm(2)), "", "a depthwise kernel's axis"),
    "grouped": (lambda w: Graph.chain(IMAGE, a=w.conv(4, 2), b=w.conv(4, 4, groups=2), y=w.batchnorm(4)), "",
                "rows counted within a group"),
    "transposed": (lambda w: Graph.chain((2, 2, 2), a=ops.ConvTranspose(w.rows(3, 2, 2, 2), w.bias(3), stride=2), y=w.batchnorm(3)), "",
                   "the axes of a transposed convolution"),
    "transposed-groups": (lambda w: Graph.chain((4, 2, 2), a=ops.ConvTranspose(w.rows(6, 2, 2, 2), w.bias(6), groups=2), y=w.batchnorm(6)),
                          "",
                          "the wrong axis of a grouped transposed convolution (torch.ao)"),
    "identity": (lambda w: Graph.chain(IMAGE, a=w.conv(3, 2), i=ops.Identity(), y=w.batchnorm(3)), "", "a dropout left between the two"),
    "two": (lambda w: Graph.chain(IMAGE, a=w.conv(3, 2), n=w.batchnorm(3), y=w.batchnorm(3)), "", "the second of two in a row"),
    "into-reader": (lambda w: Graph.chain(IMAGE, n=w.batchnorm(2), y=w.conv(3, 2, 3)), "",
                    "a BatchNorm in front: its shift through the weights"),
    "into-dense": (lambda w: Graph.chain((3,), n=w.batchnorm(3), y=ops.Dense(w.rows(2, 3))), "", "a shift that needs a bias"),
    "into-grouped": (lambda w: Graph.chain((4, 3, 3), n=w.batchnorm(4), y=w.conv(6, 4, 2, groups=2)), "", "columns counted within a group"),
    "into-depthwise": (lambda w: Graph.chain(IMAGE, n=w.batchnorm(2), y=w.conv(4, 2, 2, groups=2)), "",
                       "columns of a depthwise multiplier"),
    "padded-reader": (lambda w: Graph.chain(IMAGE, n=w.batchnorm(2), y=w.conv(3, 2, 3, padding=1)), "n",
                      "a shift folded through zero padding, wrong at the border"),
    "relu-between": (lambda w: Graph.chain(IMAGE, a=w.conv(3, 2), r=ops.ReLU(), y=w.batchnorm(3)), "y", "folded through an activation"),
    "two-readers": (lambda w: _graph("y", ("a", w.conv(3, 2), "x"), ("n", w.batchnorm(3), "a"), ("y", ops.Add(), "a n")), "n",
                    "a value that something else reads, too"),
    "output-between": (lambda w: _graph("a n", ("a", w.conv(3, 2), "x"), ("n", w.batchnorm(3), "a")), "n",
                       "a value that is an output, too"),
    "shared": (_shared, "n", "weights that another node uses, too"),
    "after-add": (lambda w: _graph("y", ("a", w.conv(2, 2), "x"), ("s", ops.Add(), "a x"), ("n", w.batchnorm(2), "s"),
                                   ("r", ops.ReLU(), "n"),
                                   ("y", w.conv(2, 2), "r")), "n", "folded into one of two summands"),
    "after-concat": (lambda w: _graph("y", ("a", w.conv(2, 2), "x"), ("s", ops.Concat(), "a x"), ("n", w.batchnorm(4), "s"),
                                      ("r", ops.ReLU(), "n"),
                                      ("y", w.conv(2, 4), "r")), "n", "folded into the first of two branches"),
    "concat-reader": (lambda w: _graph("y", ("a", w.conv(2, 2), "x"), ("s", ops.Concat(), "a x"), ("n", w.batchnorm(4), "s"),
                                       ("y", w.conv(2, 4), "n")), "", "DenseNet's: a BatchNorm behind a concat, in front of a convolution"),
    "negative": (lambda w: Graph.chain(IMAGE, a=w.conv(2, 2),
                                       y=ops.BatchNorm(np.array([-1.0, 0.5]), w.bias(2), w.bias(2), np.array([0.75, 3.75]), 0.25)),
                 "", "the sign of gamma lost in a square root"),
    "switched-off": (lambda w: Graph.chain(IMAGE, a=w.conv(2, 2),
                                           y=ops.BatchNorm(np.array([0.0, 1.0]), w.bias(2), w.bias(2), np.array([0.0, 0.75]), 0.25)),
                     "", "gamma 0 and variance 0: division by the deviation"),
    "rounds": (lambda w: Graph.chain(IMAGE, a=w.conv(3, 2), r=_real(3, 1e-5), y=w.conv(2, 3)), "", "eps forgotten, or outside the root"),
    "rounds-keras": (lambda w: Graph.chain((3,), a=w.dense(3, 3), y=_real(3, 1e-3)), "", "the eps of another framework"),
}
