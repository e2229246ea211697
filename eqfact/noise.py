"""How much quantization noise is to be expected, tensor by tensor, before anything is quantized?

Rounding to a step ``D`` adds noise of variance ``D**2 / 12``, and each tensor's noise reaches the output through its
sensitivities ``S`` (PAPER 6 and 9). With factors ``f`` a tensor with entries ``a`` has the range ``R = max a f_out / f_in`` and the noise

    (R / steps)**2 / 12 * sum S (f_in / f_out)**2 ,

for weights ``(out, in)``, and for activations as the case of one input channel with factor 1. Both factors of this product are
posynomials or maxima of posynomials in ``f``: the total is convex in ``log f`` (PAPER 8), which :mod:`eqfact.optimal` uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from eqfact.calibration import Statistics, check_statistics
from eqfact.channels import Channels, channels
from eqfact.factorization import Factorization
from eqfact.gradients import reverse_walk
from eqfact.graph import Data, Graph, batches_of, checked_inputs, values
from eqfact.ops.base import Array, Weighted, along_channels
from eqfact.ops.weighted import BatchNorm
from eqfact.quantization import UniformQuantizer, check_quantizers, stored_values

Vector = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Sensitivities:
    """How much of the noise in each weight and each activation channel reaches the output, as a power.

    ``weights[node]`` is ``(groups, out // groups, in // groups)``, summed over taps; ``activations[value]`` is ``(C,)``, summed over
    pixels. ``signal`` is the power of the output in the same measure, so that ``noise / signal`` is the inverse SQNR.
    """

    weights: Mapping[str, Vector]
    activations: Mapping[str, Vector]
    signal: float


def gradient_sensitivities(graph: Graph, batches: Data | Iterable[Data], *, projections: int = 4, seed: int = 0,
                           means: Statistics | None = None) -> Sensitivities:
    """Squared gradients of random projections of the output (PAPER 9): ``E (d v.y / d w)**2`` over images and ``v`` of +-1.

    ``batches`` is one batch ``(N, C, *spatial)`` (arrays by name for several inputs), or any iterable of batches.
    A weight that is 0 and an activation entry that is 0 are on every grid exactly; they make no noise and do not count. With
    ``means`` (statistics of the same graph) weights are measured against inputs with their channel mean taken off: that is the noise
    which is left when a bias correction removes its mean.
    """
    if projections < 1:
        raise ValueError(f"projections must be at least 1, got {projections}")
    rng = np.random.default_rng(seed)
    of_weights: dict[str, Vector] = {}
    of_values: dict[str, Vector] = {}
    signal, images = 0.0, 0
    for batch in batches_of(batches):
        for x in _single_images(graph, batch):
            env = values(graph, x)
            images += 1
            signal += sum(float((env[name].astype(np.float64) ** 2).sum()) for name in graph.outputs)
            for _ in range(projections):
                v = {name: rng.choice((-1.0, 1.0), size=env[name].shape) for name in graph.outputs}
                seen: dict[str, Array] = {}
                for node, inputs, g in reverse_walk(graph, env, v, seen):
                    if isinstance(node.op, Weighted):
                        (read,) = inputs
                        if means is not None:
                            read = read - along_channels(means[node.inputs[0]].mean, read.ndim - 1).astype(read.dtype)
                        squared = _taps(node.op, node.op.weight_vjp(g, read).astype(np.float64) ** 2 * (node.op.weight != 0))
                        of_weights[node.name] = of_weights.get(node.name, 0.0) + squared
                for name, g in seen.items():
                    live = (g * (env[name] != 0)).astype(np.float64)
                    live *= live
                    of_values[name] = of_values.get(name, 0.0) + live.sum(axis=(0, *range(2, live.ndim)))
    if not images:
        raise ValueError("sensitivities need at least one image, got none")
    count = images * projections
    return Sensitivities({n: s / count for n, s in of_weights.items()}, {n: s / count for n, s in of_values.items()}, signal / images)


def forward_sensitivities(graph: Graph, stats: Statistics) -> Sensitivities:
    """Noise-to-signal ratios at what reads the noise, from statistics alone: the mean over the channels of a weighted op (PAPER 6), or of
    the value itself where something else reads it.

    Their sum is no prediction of the output's noise, but a measure that needs neither data nor gradients, and does not depend on which
    equivalent network it is taken of; ``signal`` is 1. Channels that are 0 on the data count for nothing.
    :class:`ValueError` if the statistics are of another graph.
    """
    check_statistics(graph, stats)
    of_weights: dict[str, Vector] = {}
    of_values: dict[str, Vector] = {name: np.zeros(shape[0]) for name, shape in graph.shapes.items()}
    for node in graph.nodes:
        for value in dict.fromkeys(node.inputs):
            if isinstance(node.op, Weighted):
                taps = node.op.taps().astype(np.float64)
                groups, out, inner, _ = taps.shape
                made, read = _per_power(stats, node.name).reshape(groups, out, 1), stats[value].mean_square.reshape(groups, 1, inner)
                of_weights[node.name] = (taps != 0).sum(axis=3) * read * made
                of_values[value] += ((taps**2).sum(axis=3) * made).sum(axis=1).reshape(-1)
            else:
                of_values[value] += _per_power(stats, value)
    return Sensitivities(of_weights, of_values, 1.0)


def _per_power(stats: Statistics, value: str) -> Vector:
    """``1 / E[x**2]`` a channel, over the number of channels; 0 for those that are 0 on the data."""
    power = stats[value].mean_square
    per_power: Vector = np.divide(1 / len(power), power, out=np.zeros_like(power), where=power > 0)
    return per_power


def unit_sensitivities(graph: Graph) -> Sensitivities:
    """All sensitivities 1: for objectives that look at ranges alone."""
    taps = {node.name: node.op.taps().shape[:3] for node in graph.nodes if isinstance(node.op, Weighted)}
    return Sensitivities({name: np.ones(shape) for name, shape in taps.items()},
                         {name: np.ones(shape[0]) for name, shape in graph.shapes.items()}, 1.0)


@dataclass(frozen=True, eq=False)
class Tensor:
    """A quantized tensor as the noise model sees it: entries ``a f_out / f_in``, sensitivities ``S (f_in / f_out)**2``."""

    name: str
    #: Magnitudes whose maxima add up to the range: one array if symmetric, positive and negative ones if affine.
    parts: tuple[Vector, ...]
    #: The range is this many steps wide.
    steps: float
    sensitivity: Vector
    made: Indices
    read: Indices
    #: Every row has a grid of its own (per-channel granularity).
    by_row: bool

    def noise(self, f: Vector) -> float:
        """``sum (R / steps)**2 / 12 * sum S (f_in / f_out)**2`` for factors by label, exactly."""
        groups, rows, inner = self.sensitivity.shape
        ratio = f[self.made].reshape(groups, rows, 1) / f[self.read].reshape(groups, 1, inner)
        axes = (2,) if self.by_row else (0, 1, 2)
        largest = sum((part * ratio).max(axis=axes) for part in self.parts)
        return float(((largest / self.steps) ** 2 / 12 * (self.sensitivity / ratio**2).sum(axis=axes)).sum())


@dataclass(frozen=True, eq=False)
class NoiseModel:
    """All quantized tensors of a network, as functions of the factors."""

    channels: Channels
    tensors: tuple[Tensor, ...]
    signal: float

    def terms(self, factorization: Factorization | None = None) -> dict[str, float]:
        """Expected noise power at the output from each tensor, after the factorization (identity if None)."""
        f = np.ones(self.channels.degrees_of_freedom + 1) if factorization is None else self.by_label(factorization)
        return {tensor.name: tensor.noise(f) for tensor in self.tensors}

    def sqnr(self, factorization: Factorization | None = None) -> float:
        """Expected SQNR of the output in dB; infinite if nothing is quantized."""
        noise = sum(self.terms(factorization).values())
        return float(10 * np.log10(self.signal / noise)) if noise > 0 else np.inf

    def by_label(self, factorization: Factorization) -> Vector:
        """The factors of a factorization of the same network, by label of this model."""
        f = np.ones(self.channels.degrees_of_freedom + 1)
        for value, labels in self.channels.labels.items():
            f[labels] = factorization[value]
        f[0] = 1
        return f


def noise_model(graph: Graph, stats: Statistics | None, *, weights: UniformQuantizer | None, activations: UniformQuantizer | None,
                sensitivities: Sensitivities, resolved: Channels | None = None, outputs: bool = False) -> NoiseModel:
    """The model for the quantizers that one intends to use, as :func:`eqfact.quantize` would use them.

    Weights per tensor or per channel; activations need ``stats`` of this graph.
    """
    check_quantizers(weights, activations)
    resolved = channels(graph) if resolved is None else resolved
    tensors: dict[object, Tensor] = {}
    if weights is not None:
        if weights.granularity == "per_group":
            raise ValueError("the noise model knows granularities 'per_tensor' and 'per_channel' of weights, not 'per_group'")
        for node in graph.nodes:
            op = node.op
            if isinstance(op, Weighted) and not isinstance(op, BatchNorm):
                s = sensitivities.weights.get(node.name)
                s = np.zeros(op.taps().shape[:3]) if s is None else s  # an output does not depend on it
                if id(op) in tensors:
                    # shared weights: one tensor, whose noise reaches the output on all ways
                    first = tensors[id(op)]
                    tensors[id(op)] = replace(first, sensitivity=first.sensitivity + s)
                else:
                    tensors[id(op)] = _tensor(f"{node.name}.weight", op.taps().astype(np.float64), s, weights,
                                              resolved.labels[node.name], resolved.labels[node.inputs[0]])
    if activations is not None:
        if stats is None:
            raise ValueError("the noise of activations needs their ranges: give stats=calibrate(graph, batches)")
        for value in stored_values(graph, outputs=outputs):
            labels = resolved.labels[value]
            extremes = np.stack([stats[value].min, stats[value].max], axis=1).astype(np.float64)[None, :, None, :]
            s = sensitivities.activations.get(value, np.zeros(len(labels)))
            tensors[value] = _tensor(value, extremes, s.reshape(1, -1, 1), activations, labels, np.zeros(1, np.int64))
    live = tuple(t for t in tensors.values() if t.sensitivity.any() and any(part.any() for part in t.parts))
    return NoiseModel(resolved, live, sensitivities.signal)


def predict_noise(graph: Graph, stats: Statistics | None, *, weights: UniformQuantizer | None, activations: UniformQuantizer | None,
                  sensitivities: Sensitivities) -> dict[str, float]:
    """Expected noise of each quantized tensor at the output, in dB of the output's power.

    >>> net = Graph.chain((1,), fc=Dense(np.array([[1.0]])))
    >>> s = gradient_sensitivities(net, [np.array([[1.0]])])
    >>> round(predict_noise(net, None, weights=UniformQuantizer(8), activations=None, sensitivities=s)["fc.weight"], 2)
    -52.87
    """
    model = noise_model(graph, stats, weights=weights, activations=activations, sensitivities=sensitivities)
    return {name: float(10 * np.log10(noise / model.signal)) for name, noise in model.terms().items()}


def _tensor(name: str, entries: Vector, sensitivity: Vector, quantizer: UniformQuantizer, made: Indices, read: Indices) -> Tensor:
    """A tensor from its signed entries ``(groups, out, in, taps)``."""
    if quantizer.symmetric:
        parts: tuple[Vector, ...] = (np.abs(entries).max(axis=3),)
        steps = quantizer.qmax - (quantizer.qmax + quantizer.qmin + 1) // 2 if quantizer.qmin >= 0 else quantizer.qmax
    else:
        parts = (np.maximum(entries, 0).max(axis=3), np.maximum(-entries, 0).max(axis=3))
        steps = quantizer.qmax - quantizer.qmin
    return Tensor(name, tuple(p for p in parts if p.any()), steps, sensitivity, made, read, quantizer.granularity == "per_channel")


def _taps(op: Weighted, array: Array) -> Vector:
    """Sum an array of the weight's shape over its taps, ``(groups, out // groups, in // groups)``."""
    groups, out, inner, taps = op.taps().shape
    result: Vector = array.reshape(groups, out, inner, taps).sum(axis=3)
    return result


def _single_images(graph: Graph, batch: Data) -> Iterable[Data]:
    arrays = checked_inputs(graph, batch)
    return [{name: a[i:i + 1] for name, a in arrays.items()} for i in range(len(next(iter(arrays.values()))))]
