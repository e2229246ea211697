"""How much quantization noise is to be expected, tensor by tensor, before anything is quantized?

Rounding to a step ``D`` adds noise of variance ``D**2 / 12``, and each tensor's noise reaches the output through its
sensitivities ``S`` (PAPER 6 and 9). With factors ``f`` a tensor with entries ``a`` has the range ``R = max a f_out / f_in`` and the noise

    (R / steps)**2 / 12 * sum S (f_in / f_out)**2 ,

for weights ``(out, in)``, and for activations as the case of one input channel with factor 1. Where the grid ends earlier
(:mod:`eqfact.clips`), its end caps the entries, and what lies beyond adds noise of its own. Both factors of this product are
posynomials or maxima of posynomials in ``f``: the total is convex in ``log f`` (PAPER 8), which :mod:`eqfact.optimal` uses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy import linalg, special

from eqfact.calibration import Statistics, ValueStatistics, check_statistics
from eqfact.channels import Channels, channels
from eqfact.factorization import Factorization
from eqfact.gradients import Sensitivities as Sensitivities
from eqfact.gradients import reverse_walk
from eqfact.graph import Data, Graph, Node, batches_of, checked_inputs, values
from eqfact.metrics import decibels
from eqfact.ops.base import Array, Commuting, Shape, Weighted, along_channels
from eqfact.quantization import stored_values, tensor_ranges, weight_names
from eqfact.quantizers import UniformQuantizer, check_quantizers

Vector = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def gradient_sensitivities(graph: Graph, batches: Data | Iterable[Data], *, projections: int = 4, seed: int = 0,
                           means: Statistics | None = None, relative_to: Statistics | None = None) -> Sensitivities:
    """Squared gradients of random projections of the output (PAPER 9): ``E (d v.y / d w)**2`` over images and ``v`` of +-1.

    ``batches`` is one batch ``(N, C, *spatial)`` (arrays by name for several inputs), or any iterable of batches.
    A weight that is 0 and an activation entry that is 0 are on every grid exactly; they make no noise and do not count. With
    ``means`` (statistics of the same graph) weights are measured against inputs with their channel mean taken off: that is the noise
    which is left when a bias correction removes its mean. With ``relative_to`` (likewise) each output counts relative to its own power
    there: for networks whose outputs go on into something else, where none is worth more for being larger.

    >>> net = Graph.chain((2,), fc=Dense([[3.0, 1.0]]))
    >>> found = gradient_sensitivities(net, np.array([[1.0, 2.0]]))
    >>> found.weights["fc"], found.activations["x"]
    (array([[[1., 4.]]]), array([9., 1.]))
    """
    if projections < 1:
        raise ValueError(f"projections must be at least 1, got {projections}")
    rng = np.random.default_rng(seed)
    power = {name: _power(graph, relative_to, name) for name in graph.outputs}
    of_weights: dict[str, Vector] = {}
    of_values: dict[str, Vector] = {}
    signal, images = 0.0, 0
    for batch in batches_of(batches):
        for x in _single_images(graph, batch):
            env = values(graph, x)
            images += 1
            signal += sum(float((env[name].astype(np.float64) ** 2).sum()) / power[name] for name in graph.outputs)
            for _ in range(projections):
                v = {name: rng.choice((-1.0, 1.0), size=env[name].shape) / power[name]**0.5 for name in graph.outputs}
                seen: dict[str, Array] = {}
                for node, inputs, g in reverse_walk(graph, env, v, seen):
                    if isinstance(node.op, Weighted):
                        (read,) = inputs
                        if means is not None:
                            read = read - along_channels(means[node.inputs[0]].mean, read.ndim - 1).astype(read.dtype)
                        squared = _squares_over_taps(node.op, node.op.weight_vjp(g, read) * (node.op.weight != 0))
                        of_weights[node.name] = of_weights.get(node.name, 0.0) + squared
                for name, g in seen.items():
                    live = (g * (env[name] != 0)).astype(np.float64)
                    live *= live
                    of_values[name] = of_values.get(name, 0.0) + live.sum(axis=(0, *range(2, live.ndim)))
    if not images:
        raise ValueError("sensitivities need at least one image, got none")
    count = images * projections
    return Sensitivities({n: s / count for n, s in of_weights.items()}, {n: s / count for n, s in of_values.items()}, signal / images)


def _power(graph: Graph, stats: Statistics | None, output: str) -> float:
    """The power of an output of one image, the sum of its squares; 1 without statistics, or if it is 0."""
    if stats is None:
        return 1.0
    return float(stats[output].mean_square.sum()) * math.prod(graph.shapes[output][1:]) or 1.0


def forward_sensitivities(graph: Graph, stats: Statistics) -> Sensitivities:
    """The same from statistics alone: noise followed from every value to the outputs, layer by layer, as if all noise were independent.

    A weighted op passes on the squares of its weights, all else the squares of its slopes, averaged over a normal distribution with the
    mean and the deviation of each channel. Weights make noise as large as the mean square of what they read. ``signal`` is 1, the power
    of the outputs. Noise that adds up in step, over pixels or ways, is underrated: a measure more than a prediction, for which
    :func:`gradient_sensitivities` are better.

    Nothing is divided by a power but that of the outputs, which keep the factor 1: so nearly dead channels count for as little as the
    outputs see of them, and it does not matter which equivalent network this is taken of. Channels that are 0 on the data count for
    nothing. :class:`ValueError` if the statistics are of another graph.

    >>> net = Graph.chain((2,), fc=Dense([[3.0, 1.0]]))
    >>> found = forward_sensitivities(net, calibrate(net, np.array([[1.0, 2.0], [-1.0, 0.0]])))
    >>> found.activations["x"].round(3)
    array([0.529, 0.059])
    """
    check_statistics(graph, stats)
    size = {value: np.sqrt(stats[value].mean_square) for value in graph.shapes}
    # roots of sensitivities, whose squares might overflow on the way
    root = {value: np.zeros(shape[0]) for value, shape in graph.shapes.items()}
    pixels = {value: math.prod(graph.shapes[value][1:]) for value in graph.outputs}
    signal = sum(n * float(stats[value].mean_square.sum()) for value, n in pixels.items())
    for value, n in pixels.items():
        root[value] += math.sqrt(n / signal) if signal > 0 else 0.0
    of_weights: dict[str, Vector] = {}
    for node in reversed(graph.nodes):
        if isinstance(node.op, Weighted) and node.op.divides:
            (value,) = node.inputs
            taps = node.op.taps().astype(np.float64)
            groups, out, inner, _ = taps.shape
            made, read = root[node.name].reshape(groups, out, 1), size[value].reshape(groups, 1, inner)
            of_weights[node.name] = (taps != 0).sum(axis=3) * _squares(made * read)
            gains = _norm(taps, axis=3) * made
            root[value] = np.hypot(root[value], _norm(gains, axis=1).reshape(-1))
        else:
            for value in dict.fromkeys(node.inputs):
                root[value] = np.hypot(root[value], _read_back(graph, node, value, stats, root[node.name]))
    return Sensitivities(of_weights, {value: _squares(r) for value, r in root.items()}, 1.0, "take gradient_sensitivities(graph, images)")


#: Beyond this the square of a root would overflow, or the sum of such squares.
LARGEST_ROOT = 1e140
#: Points of the normal distribution, each the middle of as much of it as the others; each with other signs for the entries, which
#: are orthogonal among as many neighbours: what adds up several pixels adds up their powers.
POINTS = 16


def _squares(roots: Vector) -> Vector:
    result: Vector = np.minimum(roots, LARGEST_ROOT) ** 2
    return result


def _norm(a: Vector, axis: int) -> Vector:
    """The root of the sum of squares, none of which overflows or underflows."""
    unit = np.abs(a).max(axis=axis, keepdims=True)
    unit[unit == 0] = 1
    result: Vector = np.sqrt(((a / unit) ** 2).sum(axis=axis)) * unit.squeeze(axis)
    return result


def _read_back(graph: Graph, node: Node, value: str, stats: Statistics, made: Vector) -> Vector:
    """Roots for the channels of an input of an op without weights, from those of its output: squared gradients, as if pixels were alike."""
    op, shapes, made_shape = node.op, [graph.shapes[i] for i in node.inputs], graph.shapes[node.name]
    if isinstance(op, Commuting) and op.activation:  # entry by entry: one pixel tells it all
        shapes, made_shape = [(s[0], *(1 for _ in s[1:])) for s in shapes], (made_shape[0], *(1 for _ in made_shape[1:]))
    # what is divided by its own deviation over space must have one
    varied = isinstance(op, Weighted)
    rng, unit = np.random.default_rng(0), float(made.max()) or 1.0
    squares = np.zeros(graph.shapes[value][0])
    points = special.ndtri((np.arange(POINTS) + 0.5) / POINTS)
    # of two factors only mean and power matter, and two points have them exactly; entries that are added up, or compared, are no twins
    products = {relation.node for relation in graph.traced.relations}
    product, apart = node.name in products, node.name in products or (op.exponential and bool(products))
    if product:
        points = np.sign(points)
    places = np.random.default_rng(1)
    starts = {name: places.integers(POINTS, size=shape) if apart else np.zeros((1,) * len(shape), np.int64)
              for name, shape in zip(node.inputs, shapes, strict=True)}
    for turn, signs in enumerate(linalg.hadamard(POINTS)):
        inputs = [_drawn(stats[name], rng.normal(size=shape) if varied else points[(turn + starts[name]) % POINTS], shape,
                         within=not product)[None] for name, shape in zip(node.inputs, shapes, strict=True)]
        entries = np.arange(math.prod(made_shape)).reshape(1, *made_shape)
        signs = signs[entries % POINTS] * rng.choice((-1.0, 1.0), size=entries.size // POINTS + 1)[entries // POINTS]
        cotangent = signs * along_channels(made / unit / math.sqrt(math.prod(made_shape[1:])), len(made_shape))
        try:
            back = op.vjp(cotangent, *inputs)
        except TypeError:  # nothing is known of what goes where: shared out evenly
            return np.full(len(squares), _norm(made, axis=0) / math.sqrt(len(squares)))
        total: Array = sum(g for g, name in zip(back, node.inputs, strict=True) if name == value)  # type: ignore[assignment]
        squares += (total**2).sum(axis=(0, *range(2, total.ndim))) / POINTS
    return unit * np.sqrt(squares)


def _drawn(stats: ValueStatistics, points: Vector, shape: Shape, within: bool) -> Vector:
    """Values ``(C, *spatial)``, so many deviations from the means of their channels, ``within`` what was seen or not."""
    low, high, mean, deviation = (along_channels(v, len(shape)) for v in (
        stats.min, stats.max, stats.mean, np.sqrt(np.maximum(stats.mean_square - stats.mean**2, 0))))
    drawn: Vector = mean + points * deviation
    whole: Vector = np.broadcast_to(np.clip(drawn, low, high) if within else drawn, shape)
    return whole


def measured_sensitivities(graph: Graph, stats: Statistics, batches: Data | Iterable[Data]) -> Sensitivities:
    """By gradients, each output relative to its power; from the statistics alone where an op of the caller's has no ``vjp``: rough ones."""
    try:
        return gradient_sensitivities(graph, batches, relative_to=stats)
    except TypeError as error:  # which names the node
        return replace(forward_sensitivities(graph, stats), rough=str(error))


def unit_sensitivities(graph: Graph) -> Sensitivities:
    """All sensitivities 1: for objectives that look at ranges alone."""
    taps = {node.name: node.op.taps().shape[:3] for node in graph.nodes if isinstance(node.op, Weighted)}
    return Sensitivities({name: np.ones(shape) for name, shape in taps.items()},
                         {name: np.ones(shape[0]) for name, shape in graph.shapes.items()}, 1.0)


@dataclass(frozen=True, eq=False)
class Tensor:
    """A quantized tensor as the noise model sees it: entries ``a f_out / f_in``, sensitivities ``S (f_in / f_out)**2``."""

    name: str
    #: Magnitudes whose maxima add up to the range: one array if symmetric, positive and negative ones if affine. In the dtype of the
    #: weights, which holds them exactly: they are as many as these. (Products with factors are made in float64.)
    parts: tuple[Array, ...]
    #: The range is this many steps wide.
    steps: float
    sensitivity: Vector
    made: Indices
    read: Indices
    #: Every row has a grid of its own (per-channel granularity).
    by_row: bool
    #: The noise of entries that are larger than their part, as grids that end earlier leave them: a clip of each channel, which its factor
    #: moves along with the channel.
    saturation: float = 0.0

    def noise(self, f: Vector) -> float:
        """``sum (R / steps)**2 / 12 * sum S (f_in / f_out)**2`` for factors by label, exactly, and that of saturation."""
        groups, rows, inner = self.sensitivity.shape
        ratio = f[self.made].reshape(groups, rows, 1) / f[self.read].reshape(groups, 1, inner)
        axes = (2,) if self.by_row else (0, 1, 2)
        largest = sum((part * ratio).max(axis=axes) for part in self.parts)
        return float(((largest / self.steps) ** 2 / 12 * (self.sensitivity / ratio**2).sum(axis=axes)).sum()) + self.saturation


@dataclass(frozen=True, eq=False)
class NoiseModel:
    """All quantized tensors of a network, as functions of the factors.

    >>> net = Graph.chain((2,), fc=Dense([[4.0, 1.0]]))
    >>> felt = gradient_sensitivities(net, np.array([[1.0, -1.0]]))
    >>> model = noise_model(net, None, weights=UniformQuantizer(), activations=None, sensitivities=felt)
    >>> [tensor.name for tensor in model.tensors]
    ['fc.weight']
    """

    channels: Channels
    tensors: tuple[Tensor, ...]
    signal: float

    @property
    def saturation(self) -> float:
        """The part of the noise that no factor changes, clips being held channel by channel."""
        return sum(tensor.saturation for tensor in self.tensors)

    def terms(self, factorization: Factorization | None = None) -> dict[str, float]:
        """Expected noise power at the output from each tensor, after the factorization (identity if None)."""
        f = np.ones(self.channels.size) if factorization is None else self.by_label(factorization)
        return {tensor.name: tensor.noise(f) for tensor in self.tensors}

    def decibels(self, factorization: Factorization | None = None) -> dict[str, float]:
        """The same in dB of the output's power."""
        return {name: -decibels(self.signal, noise) for name, noise in self.terms(factorization).items()}

    def sqnr(self, factorization: Factorization | None = None) -> float:
        """Expected SQNR of the output in dB; infinite if nothing is quantized."""
        noise = sum(self.terms(factorization).values())
        return float(10 * np.log10(self.signal / noise)) if noise > 0 else np.inf

    def by_label(self, factorization: Factorization) -> Vector:
        """The factors of a factorization of the same network, by label of this model."""
        f = np.ones(self.channels.size)
        for value, labels in self.channels.labels.items():
            f[labels] = factorization[value]
        f[0] = 1
        return f


def noise_model(graph: Graph, stats: Statistics | None, *, weights: UniformQuantizer | None, activations: UniformQuantizer | None,
                sensitivities: Sensitivities, resolved: Channels | None = None, outputs: bool = False,
                at: Factorization | None = None) -> NoiseModel:
    """The model for the quantizers that one intends to use, as :func:`eqfact.quantize` would use them.

    Weights per tensor or per channel; activations need ``stats`` of this graph. Where the quantizers' ``range`` is not ``"minmax"``, grids
    end as they would after the factorization ``at`` (identity if None), and there the noise is theirs. An end ``c`` of the grid caps a
    channel of factor ``f`` at ``c / f``. For other factors these caps stay: a grid that goes as far as the largest of them saturates no
    more than that, so that the model bounds its noise from above (and is convex, as without clips).

    >>> net, x = Graph.chain((2,), fc=Dense([[4.0, 1.0]])), np.array([[1.0, -1.0], [0.5, 2.0]])
    >>> felt, W8, A8 = gradient_sensitivities(net, x), UniformQuantizer(), UniformQuantizer(symmetric=False)
    >>> model = noise_model(net, calibrate(net, x), weights=W8, activations=A8, sensitivities=felt)
    >>> sorted(tensor.name for tensor in model.tensors)
    ['fc.weight', 'x']
    """
    check_quantizers(weights, activations)
    resolved = channels(graph) if resolved is None else resolved
    ends = _ends(graph, stats, weights, activations, sensitivities, outputs, at)
    tensors: dict[object, Tensor] = {}
    ways: dict[object, Node] = {}
    names = weight_names(graph)
    if weights is not None:
        if weights.granularity == "per_group":
            raise ValueError("the noise model knows granularities 'per_tensor' and 'per_channel' of weights, not 'per_group': "
                             "give 'per_channel', which is nearest")
        for node in graph.nodes:
            op = node.op
            if isinstance(op, Weighted) and op.gridded:
                s = sensitivities.weights.get(node.name)
                s = np.zeros(op.taps().shape[:3]) if s is None else s  # an output does not depend on it
                if id(op) in tensors:
                    # shared weights: one tensor, whose noise reaches the output on all ways
                    first = tensors[id(op)]
                    tensors[id(op)] = replace(first, sensitivity=first.sensitivity + s)
                else:
                    tensors[id(op)] = _tensor(names[id(op)], op.taps(), s, weights,
                                              resolved.labels[node.name], resolved.labels[node.inputs[0]])
                    ways[id(op)] = node
        for key, node in ways.items():
            assert isinstance(node.op, Weighted)
            if (end := ends.get(names[id(node.op)])) is not None:
                tensors[key] = _clipped_weights(tensors[key], node, end, at)
    if activations is not None:
        if stats is None:
            raise ValueError("the noise of activations needs their ranges: give stats=calibrate(graph, batches)")
        for value in stored_values(graph, outputs=outputs):
            labels = resolved.labels[value]
            extremes = np.stack([stats[value].min, stats[value].max], axis=1).astype(np.float64)[None, :, None, :]
            s = sensitivities.activations.get(value, np.zeros(len(labels)))
            tensors[value] = _tensor(value, extremes, s.reshape(1, -1, 1), activations, labels, np.zeros(1, np.int64))
            if (end := ends.get(value)) is not None:
                tensors[value] = _clipped_values(tensors[value], stats[value], end, None if at is None else at[value])
    parts = {key: tuple(part for part in tensor.parts if part.any()) for key, tensor in tensors.items()}
    live = tuple(replace(tensor, parts=parts[key]) for key, tensor in tensors.items() if tensor.sensitivity.any() and parts[key])
    return NoiseModel(resolved, live, sensitivities.signal)


def predict_noise(graph: Graph, stats: Statistics | None, *, weights: UniformQuantizer | None, activations: UniformQuantizer | None,
                  sensitivities: Sensitivities) -> dict[str, float]:
    """Expected noise of each quantized tensor at the output, in dB of the output's power; rounding, and saturation where grids are clipped.

    >>> net = Graph.chain((1,), fc=Dense(np.array([[1.0]])))
    >>> s = gradient_sensitivities(net, [np.array([[1.0]])])
    >>> round(predict_noise(net, None, weights=UniformQuantizer(8), activations=None, sensitivities=s)["fc.weight"], 2)
    -52.87
    """
    return noise_model(graph, stats, weights=weights, activations=activations, sensitivities=sensitivities).decibels()


def _tensor(name: str, entries: Array, sensitivity: Vector, quantizer: UniformQuantizer, made: Indices, read: Indices) -> Tensor:
    """A tensor from its signed entries ``(groups, out, in, taps)``."""
    if quantizer.symmetric:
        parts: tuple[Array, ...] = (np.abs(entries).max(axis=3),)
    else:
        parts = (np.maximum(entries, 0).max(axis=3), np.maximum(-entries, 0).max(axis=3))
    return Tensor(name, parts, quantizer.steps, sensitivity, made, read, quantizer.granularity == "per_channel")


Ends = tuple[Array, Array]


def _ends(graph: Graph, stats: Statistics | None, weights: UniformQuantizer | None, activations: UniformQuantizer | None,
          sensitivities: Sensitivities, outputs: bool, at: Factorization | None) -> dict[str, Ends]:
    """Where the grids of those quantizers that clip end, by tensor, after the factorization: what :func:`eqfact.quantize` would take."""
    weights, activations = (None if q is None or q.range == "minmax" else q for q in (weights, activations))
    if weights is None and activations is None:
        return {}
    if at is not None:
        sensitivities = sensitivities.rescaled(graph, at)
        graph, stats = at.apply(graph), None if stats is None else at.apply(stats)
    return tensor_ranges(graph, weights=weights, activations=activations, stats=stats, sensitivities=sensitivities, outputs=outputs)


def _clipped_weights(tensor: Tensor, node: Node, ends: Ends, at: Factorization | None) -> Tensor:
    """The tensor with its entries capped at a range of its grids at these factors."""
    op, (groups, rows, inner) = node.op, tensor.sensitivity.shape
    assert isinstance(op, Weighted)
    taps = op.taps().astype(np.float64)
    made, read = (np.ones(n) if at is None else at[value] for n, value in ((groups * rows, node.name), (groups * inner, node.inputs[0])))
    ratio = (made.reshape(groups, rows, 1) / read.reshape(groups, 1, inner))[..., None]
    low, high = (end.reshape((groups, rows, 1, 1) if end.size > 1 else (1, 1, 1, 1)) / ratio for end in ends)
    each = tensor.sensitivity[..., None] / np.maximum((taps != 0).sum(axis=3, keepdims=True), 1)
    return _capped(tensor, taps, each, low, high)


def _clipped_values(tensor: Tensor, stats: ValueStatistics, ends: Ends, factor: Array | None) -> Tensor:
    """The same of an activation, whose entries are known by their histogram."""
    assert stats.histogram is not None
    channels = len(stats.min)
    shares = stats.histogram.counts.reshape(channels, -1) / np.maximum(stats.histogram.live, 1)[:, None]
    entries = stats.histogram.values(stats.min, stats.max).reshape(1, channels, 1, -1)
    each = tensor.sensitivity[..., None] * shares[None, :, None, :]
    low, high = (np.reshape(end / (1.0 if factor is None else factor), (1, -1, 1, 1)) for end in ends)
    return _capped(tensor, entries, each, low, high)


def _capped(tensor: Tensor, entries: Array, each: Vector, low: Array, high: Array) -> Tensor:
    """A tensor whose grids end there, in units of the channels at factors of 1; ``each`` is the sensitivity of every entry."""
    if len(tensor.parts) == 1:  # symmetric
        high = np.maximum(-low, high)
        parts: tuple[Array, ...] = (np.minimum(tensor.parts[0], high[..., 0]),)
        low = -high
    else:
        high, low = np.maximum(high, 0), np.minimum(low, 0)
        parts = (np.minimum(tensor.parts[0], high[..., 0]), np.minimum(tensor.parts[1], -low[..., 0]))
    with np.errstate(over="ignore"):  # of bins that hold nothing
        beyond = np.where(each > 0, np.maximum(entries - high, 0) + np.maximum(low - entries, 0), 0)
    return replace(tensor, parts=parts, saturation=float((each * beyond**2).sum()))


def _squares_over_taps(op: Weighted, array: Array) -> Vector:
    """Sum the squares of an array of the weight's shape over its taps, ``(groups, out // groups, in // groups)``."""
    entries = array.reshape(op.taps().shape)
    # einsum widens to float64 in small pieces: no copy of all the weights, at half the time
    result: Vector = np.einsum("goit,goit->goi", entries, entries, dtype=np.float64)
    return result


def _single_images(graph: Graph, batch: Data) -> Iterable[Data]:
    arrays = checked_inputs(graph, batch)
    return [{name: a[i:i + 1] for name, a in arrays.items()} for i in range(len(next(iter(arrays.values()))))]
