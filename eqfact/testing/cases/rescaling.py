"""Level 3: what becomes of a network whose values are multiplied by given factors?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from eqfact.channels import channels
from eqfact.factorization import Factorization
from eqfact.graph import Graph
from eqfact.ops import Array
from eqfact.testing.cases.case import Case, Draw
from eqfact.testing.cases.networks import Net, all_networks
from eqfact.testing.wire import arrays_json, network_json

LAW = "every value is its factor times what it was, and the outputs are the same"
EXACT = LAW + ": bit for bit, with powers of two"
SOURCE = "Meller et al. 2019 (docs/paper.md, Three layers)"
REFUSED = "a factor that no rescaling can make up for is refused"


def cases() -> Iterator[Case]:
    """The cases of this level."""
    nets = {net.name: net for net in all_networks()}
    for i, net in enumerate(nets.values()):
        dtype = ("float32", "float64")[i % 2]
        if channels(net.graph()).degrees_of_freedom:
            yield asked(f"3/{net.name}-{dtype}", net, dtype, drawn(net, powers_of_two=True), True)
    for i, name in enumerate(("chain", "convs", "clip-channels", "residual", "transposed-groups", "batchnorm", "product", "scores",
                              "attention",
                              "rmsnorm", "sloped")):
        dtype = ("float32", "float64")[i % 2]
        yield asked(f"3/free-{name}-{dtype}", nets[name], dtype, drawn(nets[name], powers_of_two=False), False)
    identity = {value: np.ones(shape[0]) for value, shape in nets["convs"].graph().shapes.items()}
    yield asked("3/identity-float32", nets["convs"], "float32", identity, True)
    for name, of, factors in (
        ("input", "chain", {"x": [2.0, 1.0, 1.0]}), ("output", "chain", {"y": [1.0, 0.5]}),
        ("inner-output", "inner-output", {"r": [2.0] * 4}),
        ("sum", "residual", {"r": [2.0, 1.0, 1.0], "a": [2.0, 1.0, 1.0]}),
        ("sum-with-input", "residual-input", {"a": [2.0] * 3, "s": [2.0] * 3}),
        ("copies", "concat-twice", {"s": [2.0, 1.0, 1.0, 1.0]}), ("curve", "sigmoid", {"b": [2.0] * 3}),
        ("padding", "pad-value", {"p": [2.0] * 3}),
        ("norm", "layernorm", {"a": [2.0, 1.0, 1.0, 1.0]}), ("product", "product", {"a": [2.0] * 4, "p": [1.0] * 4, "b": [1.0] * 4}),
        ("zero", "chain", {"a": [0.0, 1.0, 1.0, 1.0], "r": [0.0, 1.0, 1.0, 1.0]}),
        ("negative", "chain", {"a": [-1.0] * 4, "r": [-1.0] * 4}),
        ("nan", "chain", {"a": [np.nan] * 4, "r": [np.nan] * 4}), ("infinite", "chain", {"a": [np.inf] * 4, "r": [np.inf] * 4}),
        ("length", "chain", {"a": [1.0] * 3}), ("unknown", "chain", {"q": [1.0] * 3}),
    ):
        graph = nets[of].graph()
        given = {value: np.ones(shape[0]) for value, shape in graph.shapes.items()} | {k: np.array(f) for k, f in factors.items()}
        yield Case(f"3/refuse-{name}", "rescale", {"network": network_json(graph), "factors": arrays_json(given)}, {"judge": "refusal"},
                   REFUSED,
                   SOURCE, "a network that is another function, written without a word")


def drawn(net: Net, *, powers_of_two: bool) -> dict[str, Array]:
    """Legal factors for every value, within ``[1/16, 16]``."""
    resolved, draw = channels(net.graph()), Draw(f"factors {net.name}")
    free = draw.powers(resolved.degrees_of_freedom) if powers_of_two else draw.uniform((resolved.degrees_of_freedom,), 0.25, 4.0)
    return dict(Factorization(resolved, np.concatenate([[1.0], free])))


def asked(name: str, net: Net, dtype: str, factors: Mapping[str, Array], exact: bool) -> Case:
    """A case that asks for the network with these factors."""
    graph: Graph = net.graph(dtype)
    expected = {"judge": "network", "inputs": arrays_json(net.inputs(dtype)), "exact": exact, "factors": arrays_json(factors)}
    return Case(name, "rescale", {"network": network_json(graph), "factors": arrays_json(factors)}, expected, EXACT if exact else LAW,
                SOURCE, net.why)
