"""Level 7: how much noise is to be expected of a factorization, and which is the best?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from eqfact.calibration import Statistics, ValueStatistics
from eqfact.equalization import equalize
from eqfact.gradients import Sensitivities
from eqfact.graph import Graph
from eqfact.methods import Optimal
from eqfact.ops import Array, Weighted
from eqfact.quantization import stored_values
from eqfact.quantizers import UniformQuantizer
from eqfact.testing.cases.case import Case, Draw, Json
from eqfact.testing.cases.networks import all_networks
from eqfact.testing.cases.rescaling import drawn
from eqfact.testing.cases.rules import statistics
from eqfact.testing.wire import arrays_json, network_json

NOISE = "each tensor adds range**2 / (12 steps**2) sum S (f_in / f_out)**2, its range with the factors"
LEAST = "no factors within the bound have less noise than the certified bound; those of an optimum have hardly more"
SOURCE = "Meller et al. 2019, noise analysis (docs/optimal.md)"

NETWORKS = ("chain", "convs", "relu6", "fan-out", "residual", "concat", "depthwise", "transposed-groups", "flatten", "inner-output",
            "product", "scores")
QUANTIZERS: dict[str, tuple[Json | None, Json | None]] = {
    "W8A8": ({"bits": 8}, {"bits": 8, "symmetric": False}),
    "W4": ({"bits": 4}, None),
    "A8": (None, {"bits": 8, "symmetric": False}),
    "channels": ({"bits": 8, "granularity": "per_channel"}, {"bits": 8, "symmetric": True}),
}
#: Arrays of kinds of things, by name.
Arrays = Mapping[str, Mapping[str, Any]]

#: By how much, relative, the least noise may be missed.
GAP = 0.01


def cases() -> Iterator[Case]:
    """The cases of this level."""
    nets = {net.name: net for net in all_networks()}
    for i, name in enumerate(NETWORKS):
        graph = nets[name].graph(("float32", "float64")[i % 2])
        for j, (of, (weights, activations)) in enumerate(QUANTIZERS.items()):
            if (i + j) % 2 and of != "W8A8":
                continue
            extrema, weighed = statistics(graph, name), sensitivities(graph, name)
            model = {"network": network_json(graph), "statistics": {value: arrays_json(e) for value, e in extrema.items()},
                     "sensitivities": {kind: arrays_json(arrays) for kind, arrays in weighed.items()}, "weights": weights,
                     "activations": activations}
            if j % 2 == 0:
                factors = drawn(nets[name], powers_of_two=of == "W4")
                noise = total(graph, extrema, weighed, weights, activations, factors)
                yield Case(f"7/noise-{name}-{of}", "expected_noise", {**model, "factors": arrays_json(factors)},
                           {"judge": "noise", "noise": noise, "relative": 2.0**-16}, NOISE, SOURCE,
                           "the square of a factor forgotten, or upside down; zeros that count; one range for both signs")
            if of != "A8":
                least = _least(graph, extrema, weighed, weights, activations)
                yield Case(f"7/optimum-{name}-{of}", "optimize", {**model, "max_factor": 1024.0},
                           {"judge": "optimum", "least": least, "gap": GAP}, LEAST, SOURCE, "a local balance taken for the best")


def sensitivities(graph: Graph, name: str) -> dict[str, dict[str, Array]]:
    """Sensitivities of weights and of values, drawn."""
    draw = Draw(f"sensitivities {name}")
    weights = {node.name: draw.positive(node.op.taps().shape[:3], 1.0, 4) for node in graph.nodes
               if isinstance(node.op, Weighted) and node.op.gridded}
    return {"weights": weights, "activations": {value: draw.positive(shape[:1], 1.0, 4) for value, shape in graph.shapes.items()}}


def total(graph: Graph, extrema: Arrays, weighed: Arrays, weights: Json | None,
          activations: Json | None, factors: Mapping[str, Array]) -> float:
    """The expected noise by its formula, in fractions."""
    noise = Fraction(0)
    for node in graph.nodes:
        op = node.op
        if weights is not None and isinstance(op, Weighted) and op.gridded:
            taps, s = op.taps(), weighed["weights"][node.name]
            groups, rows, inner = s.shape
            ones = np.ones(inner * groups)
            made, read = factors[node.name].reshape(groups, rows), (factors[node.inputs[0]] if op.divides else ones).reshape(groups, inner)
            per_row = []
            for g, o in np.ndindex(groups, rows):
                ratios = [Fraction(float(made[g, o])) / Fraction(float(read[g, i])) for i in range(inner)]
                largest = max(abs(Fraction(float(w))) * ratios[i] for i in range(inner) for w in taps[g, o, i])
                reaching = sum(Fraction(float(s[g, o, i])) / ratios[i] ** 2 for i in range(inner) if taps[g, o, i].any())
                per_row.append((largest, reaching))
            steps = UniformQuantizer(**weights).steps
            if weights.get("granularity") == "per_channel":
                noise += sum((a / steps) ** 2 / 12 * reaching for a, reaching in per_row)
            else:
                noise += (max(a for a, _ in per_row) / steps) ** 2 / 12 * sum(reaching for _, reaching in per_row)
    for value in stored_values(graph) if activations is not None else ():
        f = [Fraction(float(v)) for v in factors[value]]
        lows, highs = ([Fraction(float(v)) * k for v, k in zip(extrema[value][end], f, strict=True)] for end in ("min", "max"))
        assert activations is not None
        width = max(map(abs, (*lows, *highs))) if activations["symmetric"] else max(*highs, Fraction(0)) - min(*lows, Fraction(0))
        reaching = sum(Fraction(float(v)) / k**2 for v, k in zip(weighed["activations"][value], f, strict=True))
        noise += (width / UniformQuantizer(**activations).steps) ** 2 / 12 * reaching
    return float(noise)


def _least(graph: Graph, extrema: Arrays, weighed: Arrays, weights: Json | None,
           activations: Json | None) -> float:
    """The certified bound, rounded down to three digits: those are the same on every machine."""
    stats = Statistics({value: ValueStatistics(1, of["min"], of["max"], of["min"], of["max"]**2) for value, of in extrema.items()})
    method = Optimal(Sensitivities(weighed["weights"], weighed["activations"], 1.0), ranges=stats, ridge=0.0, tol=1e-3, max_iter=1000)
    result = equalize(graph, method, stats=stats, weights=None if weights is None else UniformQuantizer(**weights),
                      activations=None if activations is None else UniformQuantizer(**activations))
    assert result.success and result.bound is not None, result.message
    unit = 10.0 ** (math.floor(math.log10(result.bound)) - 2)
    return math.floor(result.bound / unit) * unit
