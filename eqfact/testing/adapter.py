"""How does eqfact itself answer the questions of the conformance kit? ``python -m eqfact.testing.adapter``, one JSON line a question.

Also an example of an adapter: a function for each ask, from the question's fields to the answer's, and a loop over lines. What breaks a
rule raises ValueError or TypeError: that is a refusal, which is an answer; anything else is an error. The protocol is docs/porting.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, TextIO

import numpy as np

from eqfact import __version__
from eqfact.calibration import Statistics, ValueStatistics
from eqfact.channels import channels
from eqfact.equalization import equalize
from eqfact.factorization import Factorization
from eqfact.folding import fold_batchnorm
from eqfact.gradients import Sensitivities
from eqfact.graph import Graph, values
from eqfact.methods import CrossLayer, Method, OneStep, Optimal, TwoStep
from eqfact.noise import noise_model
from eqfact.ops import Conv, Dense
from eqfact.ops.grid import Grid
from eqfact.quantization import grid_of, quantize
from eqfact.quantizers import UniformQuantizer
from eqfact.testing.wire import array_json, array_of, arrays_json, arrays_of, network_json, network_of
from eqfact.verification import verify

Json = dict[str, Any]

#: The version of the protocol.
PROTOCOL = 1


def hello(protocol: int) -> Json:
    """Who answers, and which levels."""
    return {"name": "eqfact", "version": __version__, "language": "Python", "protocol": PROTOCOL, "levels": list(range(9))}


def forward(network: Json, inputs: Json) -> Json:
    """The outputs of a network."""
    graph = network_of(network)
    every = values(graph, arrays_of(inputs))
    return {"outputs": arrays_json({name: every[name] for name in graph.outputs})}


def fold(network: Json) -> Json:
    """The network with its BatchNorms folded."""
    return {"network": network_json(fold_batchnorm(network_of(network)))}


def labels(network: Json) -> Json:
    """A number for each channel of each value: 0 where pinned, equal where factors are always equal."""
    found = channels(network_of(network))
    return {"degrees_of_freedom": found.degrees_of_freedom, "channels": found.numbers()}


def rescale(network: Json, factors: Json) -> Json:
    """The network with its values multiplied by factors."""
    graph = network_of(network)
    return {"network": network_json(Factorization.of(graph, arrays_of(factors)).apply(graph))}


def equalized(network: Json, method: str, max_factor: float, statistics: Json | None = None, max_iter: int = 1000) -> Json:
    """The factors of one of the rules, and the network with them."""
    balance = CrossLayer(max_factor, tol=1e-12, max_iter=max_iter, max_bias=np.inf)
    chosen: dict[str, Method] = {"one_step": OneStep(max_factor), "two_step": TwoStep(max_factor), "cross_layer": balance}
    if method not in chosen:
        raise ValueError(f"unknown method {method!r}: one of {', '.join(chosen)}")
    result = equalize(network_of(network), chosen[method], stats=None if statistics is None else statistics_of(statistics))
    return {"factors": arrays_json(result.factorization), "network": network_json(result.graph)}


def statistics_of(code: Json) -> Statistics:
    """Statistics of which the extrema alone are known."""
    ends = {value: arrays_of(of) for value, of in code.items()}
    return Statistics({value: ValueStatistics(1, of["min"], of["max"], 0 * of["min"], np.maximum(of["min"]**2, of["max"]**2))
                       for value, of in ends.items()})


def grid(quantizer: Json, low: Json, high: Json) -> Json:
    """The grid for values from low to high."""
    found = UniformQuantizer(**quantizer).grid(array_of(low), array_of(high))
    return {"scale": array_json(found.scale), "zero_point": array_json(found.zero_point.astype(np.int64)), "qmin": found.qmin,
            "qmax": found.qmax}


def weight_grid(quantizer: Json, weight: Json) -> Json:
    """The scales of a weight, and its whole numbers."""
    w = array_of(weight)
    found = UniformQuantizer(**quantizer).weight_grid(Dense(w) if w.ndim == 2 else Conv(w))
    scale = np.broadcast_to(found.scale, w.shape)
    return {"scale": array_json(scale), "q": array_json(found.quantize(w))}


def _grid(code: Json, axes: int = 1) -> Grid:
    scale, zero_point = array_of(code["scale"]), array_of(code["zero_point"]).astype(np.float64)
    shape = (-1, *(1,) * (axes - 1))
    return Grid(scale.reshape(shape), zero_point.reshape(shape), code["qmin"], code["qmax"], code.get("rounding", "half_even"))


def quantize_array(grid: Json, x: Json) -> Json:
    """Numbers ``(N, C, *spatial)`` as whole numbers on a grid."""
    array = array_of(x)
    return {"q": array_json(_grid(grid, array.ndim - 1).quantize(array))}


def dequantize_array(grid: Json, q: Json, dtype: str) -> Json:
    """What whole numbers on a grid stand for."""
    array = array_of(q)
    return {"x": array_json(_grid(grid, array.ndim - 1).dequantize(array).astype(dtype))}


def requantize(n: Json, input_scale: float, weight_scale: Json, grid: Json, dtype: str) -> Json:
    """Sums ``(N, C, *spatial)`` of an integer engine as whole numbers on the output's grid."""
    sums = array_of(n)
    to = _grid(grid).astype(dtype)
    step = np.asarray(input_scale, dtype) * array_of(weight_scale).astype(dtype)
    multiplier = (step / to.scale.astype(dtype)).reshape(-1, *(1,) * (sums.ndim - 2))
    q = np.rint(sums.astype(dtype) * multiplier) + to.zero_point
    return {"q": array_json(np.clip(q, to.qmin, to.qmax).astype(np.int32))}


def quantize_layer(weight: Json, bias: Json, weights: Json, input: Json) -> Json:
    """The whole numbers of a dense layer behind values on a grid: weights, their scale, and the bias."""
    w, b = array_of(weight), array_of(bias)
    of = _grid(input)
    low, high = (float(of.scale[0]) * (end - float(of.zero_point[0])) for end in (of.qmin, of.qmax))
    net = Graph.chain((w.shape[1],), fc=Dense(w, b))
    bits = (of.qmax - of.qmin).bit_length()
    made = quantize(net, weights=UniformQuantizer(**weights), activations=UniformQuantizer(bits, symmetric=False),
                    ranges={"x": (low, high)})
    op = made["fc"].op
    assert isinstance(op, Dense) and op.grid is not None and op.bias is not None
    step = of.scale.astype(w.dtype)[0] * op.grid.scale.astype(w.dtype).reshape(-1)
    q_b = np.rint(op.bias.astype(np.float64) / step)
    return {"scale": array_json(np.broadcast_to(op.grid.scale.reshape(-1), len(w))), "q_w": array_json(op.grid.quantize(op.weight)),
            "q_b": array_json(q_b.astype(np.int64))}


def quantized_forward(network: Json, inputs: Json, stored: list[str]) -> Json:
    """The whole numbers of some values of a quantized network."""
    graph = network_of(network)
    every = values(graph, arrays_of(inputs))
    integers = {}
    for name in stored:
        of = grid_of(graph, name)
        if of is None or of.scale.size > 1:
            raise ValueError(f"value '{name}' lies on no grid of one scale")
        exact = Grid(of.scale.reshape(()), of.zero_point.reshape(()), of.qmin, of.qmax)
        integers[name] = exact.quantize(every[name])
    return {"integers": arrays_json(integers)}


def _noise(network: Json, statistics: Json, sensitivities: Json, weights: Json | None,
           activations: Json | None) -> tuple[Graph, Statistics, Sensitivities, UniformQuantizer | None, UniformQuantizer | None]:
    weighed = Sensitivities(arrays_of(sensitivities["weights"]), arrays_of(sensitivities["activations"]), 1.0)
    return (network_of(network), statistics_of(statistics), weighed, None if weights is None else UniformQuantizer(**weights),
            None if activations is None else UniformQuantizer(**activations))


def expected_noise(factors: Json, **model: Any) -> Json:
    """The noise that is expected at the output with these factors."""
    graph, stats, weighed, weights, activations = _noise(**model)
    at = Factorization.of(graph, arrays_of(factors))
    found = noise_model(graph, stats, weights=weights, activations=activations, sensitivities=weighed)
    return {"noise": sum(found.terms(at).values())}


def optimize(max_factor: float, **model: Any) -> Json:
    """The factors of the least noise."""
    graph, stats, weighed, weights, activations = _noise(**model)
    method = Optimal(weighed, ranges=stats, ridge=0.0, max_factor=max_factor, tol=1e-4, max_iter=1000)
    return {"factors": arrays_json(equalize(graph, method, stats=stats, weights=weights, activations=activations).factorization)}


def verified(a: Json, b: Json, inputs: Json) -> Json:
    """Whether two networks are the same function on this data, up to rounding."""
    return {"equal": bool(verify(network_of(a), network_of(b), arrays_of(inputs)))}


#: What can be asked, and who answers.
ASKS: dict[str, Callable[..., Json]] = {
    "hello": hello, "forward": forward, "fold_batchnorm": fold, "channels": labels, "rescale": rescale, "equalize": equalized,
    "grid": grid, "weight_grid": weight_grid, "quantize": quantize_array, "dequantize": dequantize_array, "requantize": requantize,
    "quantize_layer": quantize_layer, "quantized_forward": quantized_forward, "expected_noise": expected_noise, "optimize": optimize,
    "verify": verified,
}


def answer(question: Json) -> Json:
    """The line that answers a question.

    >>> answer({"id": 1, "ask": "juggle"})
    {'id': 1, 'skip': "no answer to 'juggle'"}
    """
    asked = {key: value for key, value in question.items() if key not in ("id", "ask")}
    ask = ASKS.get(question["ask"])
    if ask is None:
        return {"id": question["id"], "skip": f"no answer to '{question['ask']}'"}
    try:
        return {"id": question["id"], "answer": ask(**asked)}
    except (TypeError, ValueError) as error:
        return {"id": question["id"], "answer": {"refused": str(error)}}
    except Exception as error:  # an adapter goes on to the next question
        return {"id": question["id"], "error": f"{type(error).__name__}: {error}"}


def serve(lines: TextIO, out: TextIO) -> None:
    """Answer questions, a line each, until there are no more."""
    for line in lines:
        out.write(json.dumps(answer(json.loads(line))) + "\n")
        out.flush()


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
