"""Level 4: which factors do the rules choose? Those of the paper's formulas, and balance."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from eqfact import ops
from eqfact.calibration import Statistics, ValueStatistics
from eqfact.equalization import equalize
from eqfact.graph import Graph
from eqfact.methods import CrossLayer, OneStep, TwoStep
from eqfact.ops import Array
from eqfact.testing.cases.case import Case, Draw, Json
from eqfact.testing.cases.networks import Net, Weights, all_networks
from eqfact.testing.wire import arrays_json, network_json

METHODS = {"one_step": OneStep(), "two_step": TwoStep()}
LAWS = {
    "one_step": "f_i = min(K / K_i, min(A / A_i, 16)): amplified until its kernel or its activation reaches the layer's largest",
    "two_step": "as one-step, after channel i is attenuated by m_i, so that its readers just reach their own largest",
    "cross_layer": "at the end every free channel is made and read with weights of one range: f_i = sqrt(read_i / made_i)",
}
SOURCES = {
    "one_step": "Meller et al. 2019 (docs/paper.md, One-step equalization)",
    "two_step": "Meller et al. 2019 (docs/paper.md, Two-step equalization)",
    "cross_layer": "Nagel et al. 2019 (docs/paper.md, What its followers found)",
}
#: Topologies that the rules of the paper are asked about.
NETWORKS = ("chain", "convs", "relu6", "prelu", "fan-out", "residual", "concat", "depthwise", "grouped", "transposed-groups",
            "flatten",
            "inner-output", "dead", "concat-input", "half-output", "stream", "residuals")
#: Topologies on which balance is reached: each channel that a tensor holds is free, or none stands out.
BALANCED = ("chain", "linear", "convs", "relu6", "clip-channels", "prelu", "fan-out", "stream", "concat", "depthwise", "multiplier",
            "grouped",
            "transposed", "transposed-groups", "shared", "flatten", "slice", "permute", "pools", "pad", "batchnorm", "two-inputs")
#: Topologies on which some channels cannot move, whose factors must be legal and within their bound.
LEGAL = ("dead", "nearly-dead", "concat-input", "residual-input", "inner-output", "sigmoid", "gate", "layernorm")


def cases() -> Iterator[Case]:
    """The cases of this level."""
    nets = {net.name: net for net in all_networks()}
    for i, name in enumerate(NETWORKS):
        for method in METHODS:
            yield _formula(f"4/{method}-{name}", nets[name], method, ("float32", "float64")[i % 2])
    for method in METHODS:
        yield _formula(f"4/{method}-bound", Net("bound", _bound, "no factor exceeds 16", "a bound that is forgotten, or on the wrong side"),
                       method, "float64")
        yield _formula(f"4/{method}-signs", Net("signs", _signs, "ranges are magnitudes",
                                                "the maximum in the place of the largest magnitude"),
                       method, "float64")
    for i, name in enumerate(BALANCED):
        yield _balance(f"4/cross_layer-{name}", nets[name], ("float32", "float64")[i % 2], True)
    for i, name in enumerate(LEGAL):
        yield _balance(f"4/cross_layer-{name}", nets[name], ("float32", "float64")[i % 2], False)
    yield _balance("4/cross_layer-bound", nets["nearly-dead"], "float64", True, max_factor=4.0)
    one = Net("one-pair", lambda w: Graph.chain((3,), a=w.dense(4, 3), r=ops.ReLU(), y=w.dense(2, 4)), LAWS["cross_layer"],
              "sqrt(r1 / r2) upside down")
    graph = one.graph()
    yield _case("4/cross_layer-formula", one, graph, "cross_layer", 1024.0,
                {"judge": "factors", "factors": arrays_json(_pair(graph)), "relative": 2.0**-40})


def _pair(graph: Graph) -> dict[str, Array]:
    """``sqrt(read / made)`` of the one hidden layer of a network."""
    first, last = (graph[name].op for name in ("a", "y"))
    assert isinstance(first, ops.Dense) and isinstance(last, ops.Dense)
    f = np.sqrt(np.abs(last.weight).max(axis=0) / np.abs(first.weight).max(axis=1))
    return {"x": np.ones(3), "a": f, "r": f, "y": np.ones(2)}


def _bound(w: Weights) -> Graph:
    first = w.rows(3, 3)
    first[0] /= 64
    return Graph.chain((3,), a=ops.Dense(first, np.array([0.25, 0.5, -0.5])), r=ops.ReLU(), y=w.dense(2, 3))


def _signs(w: Weights) -> Graph:
    first = np.abs(w.rows(3, 3))
    first[1] *= -4
    return Graph.chain((3,), a=ops.Dense(first), y=w.dense(2, 3))


def statistics(graph: Graph, name: str) -> dict[str, dict[str, Array]]:
    """Extrema of every value, drawn: not those of any data, as the rules take what they are given."""
    draw = Draw(f"statistics {name}")
    found: dict[str, dict[str, Array]] = {}
    for value, shape in graph.shapes.items():
        sizes = np.array([2.0 ** -draw.below(4) for _ in range(shape[0])])
        found[value] = {"min": -draw.positive(shape[:1], 4.0, 2) * sizes, "max": draw.positive(shape[:1], 4.0, 2) * sizes}
    return found


def _formula(name: str, net: Net, method: str, dtype: str) -> Case:
    graph = net.graph(dtype)
    extrema = statistics(graph, net.name)
    stats = Statistics({value: ValueStatistics(1, of["min"], of["max"], of["min"], of["max"]**2) for value, of in extrema.items()})
    factors = equalize(graph, METHODS[method], stats=stats).factorization
    expected = {"judge": "factors", "factors": arrays_json(factors), "relative": 2.0**-40}
    return _case(name, net, graph, method, 16.0, expected, {value: arrays_json(of) for value, of in extrema.items()})


def _balance(name: str, net: Net, dtype: str, balanced: bool, max_factor: float = 1024.0) -> Case:
    graph = net.graph(dtype)
    found = equalize(graph, CrossLayer(max_factor))
    bounded = balanced and any((np.abs(np.log(f)) >= np.log(max_factor) * (1 - 1e-6)).any() for f in found.factorization.values())
    assert found.success, name
    expected = {"judge": "balanced", "balanced": balanced, "bounded": bool(bounded), "relative": 1e-5}
    return _case(name, net, graph, "cross_layer", max_factor, expected)


def _case(name: str, net: Net, graph: Graph, method: str, max_factor: float, expected: Json, extrema: Json | None = None) -> Case:
    inputs = net.inputs(str(graph.dtype))
    request = {"network": network_json(graph), "method": method, "max_factor": max_factor}
    if extrema is not None:
        request["statistics"] = extrema
    return Case(f"{name}-{graph.dtype}", "equalize", request, {**expected, "inputs": arrays_json(inputs)}, LAWS[method], SOURCES[method],
                net.why)
