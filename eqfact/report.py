"""Where does a network lose precision? One row for each tensor: its range ratio, its weakest channel, its noise, its pins.

Per-tensor quantization gives every channel the step of the largest one; a channel whose range is ``r`` times smaller loses
``log2(r)`` bits (section 1 of the paper). Pure functions from networks to rows; a range is the largest magnitude of a channel. And how
much noise does each tensor alone add to the output: as :mod:`eqfact.noise` expects it, and as it is measured?
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from eqfact.calibration import Statistics
from eqfact.channels import channels
from eqfact.gradients import Sensitivities
from eqfact.graph import Data, Graph, batches_of, values, walk
from eqfact.metrics import decibels, sqnr
from eqfact.noise import predict_noise
from eqfact.ops import Weighted
from eqfact.ops.base import Array, Op
from eqfact.quantization import quantize, scale_dtype, stored_name, stored_values, tensor_ranges, weight_names
from eqfact.quantizers import FakeQuantize, UniformQuantizer, effective_bits
from eqfact.verification import Verification, verify

Ranges = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Tensor:
    """How well one tensor, the weights of a layer or a value that an engine stores, keeps its channels apart from zero."""

    name: str
    #: ``"weight"`` or ``"value"``.
    kind: str
    channels: int
    #: Channels whose range is 0.
    dead: int
    #: Largest range over smallest, of the channels that are not dead.
    range_ratio: float
    #: Bits that the weakest live channel gets of the tensor's bits, if all channels share one step.
    weakest_bits: float
    #: Signal to quantization noise in dB: of the weights themselves, or of the value in the quantized network.
    sqnr: float | None = None
    #: Why channels of a value keep the factor 1.
    pinned: str | None = None


@dataclass(frozen=True)
class TensorNoise:
    """The noise at the output when one tensor alone is quantized, in dB of the output's power: expected and measured."""

    name: str
    #: ``"weight"`` or ``"value"``.
    kind: str
    predicted: float
    #: Minus infinity if all outputs are what they were.
    measured: float


def range_ratio(ranges: Ranges) -> float:
    """The largest of the ranges over the smallest that is not 0.

    >>> range_ratio(np.array([4.0, 0.0, 0.5]))
    8.0
    """
    live = ranges[ranges > 0]
    return float(live.max() / live.min()) if live.size else 1.0


def weight_ranges(graph: Graph) -> dict[str, Ranges]:
    """Range of every output channel of every layer with weights, BatchNorms apart, by node.

    >>> from eqfact.ops import Dense
    >>> weight_ranges(Graph.chain((1,), fc=Dense(np.array([[4.0], [-0.5]]))))
    {'fc': array([4. , 0.5])}
    """
    return {name: np.abs(op.rows()).max(axis=1).astype(np.float64) for name, op in _layers(graph).items()}


def _layers(graph: Graph) -> dict[str, Weighted]:
    return {node.name: node.op for node in graph.nodes if isinstance(node.op, Weighted) and node.op.gridded}


def value_ranges(graph: Graph, stats: Statistics) -> dict[str, Ranges]:
    """Range of every channel of every value that an integer engine stores, and of the outputs."""
    return {value: stats[value].max_abs.astype(np.float64) for value in stored_values(graph, outputs=True)}


def largest_ratio(ranges: Mapping[str, Ranges]) -> float:
    """The range ratio of the tensor with the largest."""
    return max(map(range_ratio, ranges.values()), default=1.0)


def weight_report(graph: Graph, quantizer: UniformQuantizer, sensitivities: Sensitivities | None = None) -> list[Tensor]:
    """A row for the weights of every layer, BatchNorms apart; ``sensitivities`` for quantizers of ``range="noise"``."""
    float_layers, layers = _layers(graph), _layers(quantize(graph, weights=quantizer, sensitivities=sensitivities))
    return [_tensor(name, "weight", ranges, quantizer.bits, sqnr(float_layers[name].weight, layers[name].weight))
            for name, ranges in weight_ranges(graph).items()]


def value_report(graph: Graph, stats: Statistics, noise: Mapping[str, float], bits: int) -> list[Tensor]:
    """A row for every value that an integer engine stores and every output; ``noise`` is their :func:`local_sqnr`."""
    pinned = channels(graph).pinned
    return [_tensor(name, "value", of, bits, noise[name], pinned.get(name)) for name, of in value_ranges(graph, stats).items()]


def _tensor(name: str, kind: str, ranges: Ranges, bits: int, noise: float, pinned: str | None = None) -> Tensor:
    live = ranges > 0
    weakest = float(effective_bits(ranges, bits)[live].min()) if live.any() else -math.inf
    return Tensor(name, kind, len(ranges), int((~live).sum()), range_ratio(ranges), weakest, noise, pinned)


def local_sqnr(graph: Graph, quantized: Graph, batches: Iterable[Data]) -> dict[str, float]:
    """SQNR in dB over all batches, in a quantized form of the network, of the values that an integer engine stores and of the outputs."""
    stored = dict.fromkeys((*stored_values(graph, outputs=True), *graph.outputs))  # an output may lie on the grid of another value
    name_of = {stored_name(quantized, value): value for value in stored}
    signal, noise = dict.fromkeys(name_of.values(), 0.0), dict.fromkeys(name_of.values(), 0.0)
    for x in batches:
        truth = {name: value for name, value in walk(graph, x) if name in signal}
        for inner, value in walk(quantized, x):
            if (name := name_of.get(inner)) is not None:
                exact = truth.pop(name).astype(np.float64)
                signal[name] += float((exact**2).sum())
                noise[name] += float(((exact - value) ** 2).sum())
    return {name: decibels(signal[name], noise[name]) for name in signal}


def verify_batches(a: Graph, b: Graph, batches: Iterable[Data]) -> Verification:
    """The verdict of :func:`eqfact.verify` over batches: that of the batch whose error is largest against its bound."""
    return max((verify(a, b, x) for x in batches), key=lambda v: (not v.equal, v.max_error / v.bound if v.bound else v.max_error))


def noise_report(graph: Graph, batches: Data | Iterable[Data], *, weights: UniformQuantizer | None, activations: UniformQuantizer | None,
                 sensitivities: Sensitivities, stats: Statistics | None = None) -> list[TensorNoise]:
    """A row for every tensor that makes noise: as :func:`eqfact.predict_noise` has it, and as measured with that tensor alone on its grid.

    ``stats`` (for activations) and ``sensitivities`` are those of the graph. Of several outputs each counts relative to its own power, as
    with ``gradient_sensitivities(relative_to=stats)``. It takes about half a forward pass for every tensor. :class:`ValueError` as in
    :func:`eqfact.noise_model`, and without a batch.

    >>> net = Graph.chain((1,), fc=eq.Dense(np.array([[1.0], [0.3]])))
    >>> s = eq.gradient_sensitivities(net, np.ones((1, 1)))
    >>> [row.name for row in noise_report(net, np.ones((1, 1)), weights=UniformQuantizer(4), activations=None, sensitivities=s)]
    ['fc.weight']
    """
    predicted = predict_noise(graph, stats, weights=weights, activations=activations, sensitivities=sensitivities)
    ends = tensor_ranges(graph, weights=weights, activations=activations, stats=stats, sensitivities=sensitivities)
    dtype, names = scale_dtype(graph), weight_names(graph)
    ops: dict[str, dict[str, Op]] = {name: {} for name in predicted}  # by tensor: the nodes with its weights, these on their grid
    for node in graph.nodes:
        if (name := names.get(id(node.op), "")) in ops and isinstance(node.op, Weighted):
            assert weights is not None
            on_grid = weights.grid(*ends[name]).astype(dtype).fake_quantize(node.op.weight)
            ops[name][node.name] = replace(node.op, weight=on_grid)  # type: ignore[type-var]  # every final op is a dataclass
    rounding = {name: FakeQuantize(activations.grid(*ends[name]).astype(dtype))
                for name, nodes in ops.items() if activations is not None and not nodes}
    signal, noise = dict.fromkeys(graph.outputs, 0.0), {name: dict.fromkeys(graph.outputs, 0.0) for name in predicted}
    for x in batches_of(batches):
        env = values(graph, x)
        for output in graph.outputs:
            signal[output] += float((env[output].astype(np.float64) ** 2).sum())
        for name, of in noise.items():
            changed = {name: rounding[name].forward(env[name])} if name in rounding else {}
            for output, value in _outputs(graph, env, ops[name], changed).items():
                of[output] += float(((env[output].astype(np.float64) - value) ** 2).sum())
    if not any(signal.values()):
        raise ValueError("noise is measured relative to the output, which is 0 on these batches, or there are none")
    return [TensorNoise(name, "value" if name in rounding else "weight", predicted[name],
                        -decibels(len(signal), sum(of[output] / (signal[output] or 1.0) for output in signal)))
            for name, of in noise.items()]


def _outputs(graph: Graph, env: Mapping[str, Array], ops: Mapping[str, Op], changed: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs with other ops at some nodes and other arrays for some values; what does not follow from these is taken from ``env``."""
    env, moved = dict(env) | dict(changed), set(changed)
    for node in graph.nodes:
        if node.name in ops or (node.name not in changed and not moved.isdisjoint(node.inputs)):
            env[node.name] = replace(node, op=ops.get(node.name, node.op)).forward(*(env[i] for i in node.inputs))
            moved.add(node.name)
    return {name: env[name] for name in graph.outputs}
