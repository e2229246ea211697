"""Level 8: which pairs of networks are the same function, up to rounding?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from eqfact import ops
from eqfact.channels import channels
from eqfact.factorization import Factorization
from eqfact.folding import fold_batchnorm
from eqfact.graph import Graph
from eqfact.ops import Array
from eqfact.testing.cases.case import Case, Draw
from eqfact.testing.cases.networks import Net, Weights, all_networks
from eqfact.testing.wire import arrays_json, network_json

SAME = "networks that differ by factors, or by roundings, are the same function"
OTHER = "a change of a thousandth of any channel makes another function, however small the channel beside the others"

EQUAL = ("chain", "convs", "relu6", "clip-channels", "residual", "concat", "depthwise", "transposed-groups", "flatten", "product", "scores",
         "attention",
         "gate", "layernorm", "sigmoid")


def cases() -> Iterator[Case]:
    """The cases of this level."""
    nets = {net.name: net for net in all_networks()}
    for i, name in enumerate(EQUAL):
        dtype = ("float32", "float64")[i % 2]
        graph = nets[name].graph(dtype)
        yield _pair(f"8/equal-{name}-{dtype}", nets[name], graph, rescaled(graph, name), True, "a tolerance that a rounding exceeds")
    for dtype in ("float32", "float64"):
        graph = nets["chain"].graph(dtype)
        yield _pair(f"8/equal-itself-{dtype}", nets["chain"], graph, graph, True, "a network that is not itself")
        graph = nets["batchnorm"].graph(dtype)
        yield _pair(f"8/equal-folded-{dtype}", nets["batchnorm"], graph, fold_batchnorm(graph), True, "nodes compared, not functions")
    # every kind of change, each beside factors
    for i, (name, (of, change, why)) in enumerate(CHANGES.items()):
        dtype = ("float32", "float64")[i % 2]
        net = nets.get(of) or Net(of, SMALL[of], OTHER, why)
        graph = net.graph(dtype)
        yield _pair(f"8/unequal-{name}-{dtype}", net, graph, change(rescaled(graph, of)), False, why)


def rescaled(graph: Graph, name: str) -> Graph:
    """The network with factors that round."""
    resolved = channels(graph)
    free = Draw(f"pair {name}").uniform((resolved.degrees_of_freedom,), 0.25, 4.0)
    return Factorization(resolved, np.concatenate([[1.0], free])).apply(graph)


def _pair(name: str, net: Net, a: Graph, b: Graph, equal: bool, why: str) -> Case:
    request = {"a": network_json(a), "b": network_json(b), "inputs": arrays_json(net.inputs(str(a.dtype), batch=4))}
    return Case(name, "verify", request, {"judge": "arrays", "answer": {"equal": equal}}, SAME if equal else OTHER,
                "docs/porting.md, Level 8", why)


def _changed(node: str, **parameters: Callable[[Array], Array]) -> Callable[[Graph], Graph]:
    def change(graph: Graph) -> Graph:
        op = graph[node].op
        return graph.with_ops({node: replace(op, **{name: of(getattr(op, name)) for name,
                                                    of in parameters.items()})})  # type: ignore[type-var]

    return change


def _row(index: int, by: float) -> Callable[[Array], Array]:
    def change(of: Array) -> Array:
        result = of.copy()
        result[index] *= of.dtype.type(by)
        return result

    return change


def _whole(graph: Graph, name: str, by: float, row: int = 0) -> Graph:
    """One row of a layer, weights and bias."""
    return _changed(name, weight=_row(row, by), bias=_row(row, by))(graph)


def _behind_clip(w: Weights) -> Graph:
    weight = w.rows(3, 3)
    weight[0] *= 2.0**-26
    return Graph.chain((3,), a=ops.Dense(weight), y=ops.ReLU6())


def _small_row(w: Weights) -> Graph:
    weight = w.rows(3, 3)
    weight[0] *= 2.0**-20
    return Graph.chain((3,), y=ops.Dense(weight))


SMALL = {"behind-clip": _behind_clip, "small-row": _small_row}
THOUSANDTH = 1 + 2.0**-10

#: Of which network, what is changed, and the bug that is looked for.
CHANGES: dict[str, tuple[str, Callable[[Graph], Graph], str]] = {
    "weights": ("chain", lambda g: _whole(g, "b", THOUSANDTH, 1), "a tolerance of a percent"),
    "last-layer": ("chain", lambda g: _whole(g, "y", THOUSANDTH), "outputs that are not compared"),
    "bias": ("chain", _changed("a", bias=_row(1, THOUSANDTH)), "biases that are not compared"),
    "one-weight": ("convs", _changed("b", weight=lambda w: np.concatenate([w[:1] * w.dtype.type(THOUSANDTH), w[1:]])),
                   "a mean that hides one channel"),
    "forgotten-reader": ("fan-out", lambda g: _whole(g, "c", 1.5), "a reader that was not divided"),
    "one-output": ("two-outputs", lambda g: _whole(g, "z", THOUSANDTH), "the first output alone compared"),
    "clip-kept": ("relu6", _changed("r", high=lambda h: np.full_like(h, 1.5)), "ReLU6 kept at 6 behind a rescaled layer"),
    "clip-lost": ("relu6", _changed("r", high=lambda h: np.full_like(h, np.inf)), "ReLU6 replaced by ReLU"),
    "slope": ("prelu", _changed("r", slope=_row(0, THOUSANDTH)), "slopes that are not compared"),
    "residual-apart": ("residual", lambda g: _whole(g, "b", 2.0), "tied residuals scaled apart"),
    "depthwise": ("depthwise", lambda g: _whole(g, "d", THOUSANDTH, 2), "a change that pools away"),
    "groups": ("transposed-groups", lambda g: _whole(g, "t", THOUSANDTH), "the first group alone compared"),
    "eps": ("layernorm", _changed("n", eps=lambda e: e * 1.5), "an eps that is not compared"),
    "small-row": ("small-row", _changed("y", weight=_row(0, THOUSANDTH)), "a tolerance relative to the largest channel"),
    "small-behind-clip": ("behind-clip", _changed("a", weight=_row(0, 2.0)),
                          "a bound that the clip's limit enters, whatever the channel (verify's own hole)"),
    "curve": ("sigmoid", lambda g: _whole(g, "b", 1.0625), "a change that a curve hides"),
    "product": ("product", lambda g: _whole(g, "a", THOUSANDTH), "a product taken for a factor"),
    "attention": ("attention", lambda g: _whole(g, "q", 1.0625), "queries that a Softmax hides"),
}


