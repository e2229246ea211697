"""What is left to correct once a network is equalized and quantized? The mean of the error, and biases that waste range.

Rounded weights shift the mean of every channel by ``E[(W_q - W) x]``. *Iterative* correction measures that shift, layer by layer, with all
earlier layers already quantized and corrected, over the entries that the activation behind passes; the *analytic* one computes it
from BatchNorm statistics, over all entries; *high-bias absorption* moves what a ReLU never cuts off into the next bias (PAPER 7). The first
two change biases only; the third is not exact and says how often its assumption fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from eqfact.accumulators import bias_of
from eqfact.factorization import Factorization
from eqfact.graph import Data, Graph, Node, batches_of, checked_inputs, walk
from eqfact.ops.base import Array, Commuting, Op, Shape, Weighted, along_channels, spread
from eqfact.ops.blocking import GELU, HardSigmoid, HardSwish, Sigmoid, SiLU, Sloped, Tanh
from eqfact.ops.elementwise import Clip, Identity, LeakyReLU, PReLU, ReLU
from eqfact.ops.joining import Add, Concat, Extend, Flatten, Permute, Slice, Sub, Transpose, Unflatten
from eqfact.ops.space import AvgPool, Blend, GlobalAvgPool, Pad, Upsample
from eqfact.ops.weighted import BatchNorm, Conv, Dense
from eqfact.quantization import quantized_node, rounded_bias, stored_name, unrounded_names
from eqfact.quantizers import FakeQuantize

Vector = npt.NDArray[np.float64]
#: Mean and standard deviation, ``(C,)`` each, of values that are taken to be normal, by name.
Gaussians = Mapping[str, tuple[Vector, Vector]]

#: What is linear up to a constant: the mean of its output is what it makes of the means of its inputs.
AFFINE = (Weighted, Add, Sub, Concat, Extend, Flatten, Unflatten, Transpose, Slice, Permute, AvgPool, GlobalAvgPool, Pad, Upsample, Blend,
          Identity)

#: What works entry by entry behind a layer, and may cut entries off.
ACTIVATIONS = (ReLU, LeakyReLU, PReLU, Clip, Sigmoid, Tanh, SiLU, HardSwish, HardSigmoid, GELU, Sloped)

#: Weights that are no further apart, relatively, are the same in another floating type.
HALF_PRECISION = 2.0**-10


@dataclass(frozen=True, eq=False)
class Correction:
    """A corrected network, and what was changed: by how much the bias ``(C,)`` of every treated layer went up.

    >>> net = Graph.chain((2,), fc1=Dense([[1.0, 0.3]]), act=ReLU(), fc2=Dense([[1.0]]))
    >>> x = np.array([[1.0, 2.0], [3.0, 1.0]])
    >>> done = correct_bias(net, quantize(net, weights=UniformQuantizer(bits=3)), x)
    >>> {name: shift.round(3) for name, shift in done.shifts.items()}
    {'fc1': array([-0.04]), 'fc2': array([-0.01])}
    """

    graph: Graph
    shifts: Mapping[str, Vector]
    message: str
    #: Why other layers were left as they are, by name.
    left: Mapping[str, str] = field(default_factory=dict)
    #: In how many channels of a layer the 32 bits of its sums had no room for all of the shift, by name.
    bounded: Mapping[str, int] = field(default_factory=dict)
    #: For :func:`absorb_high_bias`: in which share of the entries seen of a layer's output its assumption fails, by name of the layer.
    failed: Mapping[str, float] = field(default_factory=dict)


def correct_bias(graph: Graph, quantized: Graph, batch: Data) -> Correction:
    """Iterative bias correction: ``b += mean(y_float - y_quantized)``, in dependency order, on one batch (PAPER 7).

    ``quantized`` is :func:`eqfact.quantize` of ``graph``; every layer of it runs with all before it already corrected. Where an activation
    alone reads a layer, what it cuts off counts for nothing: the mean is that of the error behind it over the entries that pass, as by
    least squares, and only so much of it is added as lowers the error of images left out, one after the other, if there are several. No
    channel's bias moves where that would raise the squared error behind the activation on this batch.

    Biases on the grid of their accumulator stay on it, and go no further than its 32 bits have room beside the products (``bounded`` says
    where). Weights that several nodes share stay shared, but each node gets its own bias; BatchNorms are left. :class:`ValueError` if
    ``graph`` is quantized itself, or a layer of ``quantized`` is not one of it.

    >>> net = Graph.chain((1,), fc=Dense(np.array([[1.0], [0.3]])))
    >>> q = quantize(net, weights=UniformQuantizer(2))
    >>> correct_bias(net, q, np.array([[1.0], [3.0]])).graph["fc"].op.bias
    array([0. , 0.6])
    """
    layers = _layers(graph, quantized)
    passing = {name: _passing(graph, quantized, name, value) for name, value in layers.items()}
    ends = {name: behind[-1].name if behind else layers[name] for name, behind in passing.items()}
    truth = _Awaited(walk(graph, batch), Counter(ends.values()))
    ops: dict[str, Weighted] = {}
    bounded: dict[str, int] = {}
    env = checked_inputs(quantized, batch)
    last = {name: node.name for node in quantized.nodes for name in node.inputs}
    for node in quantized.nodes:
        inputs = [env[i] for i in node.inputs]
        y = node.forward(*inputs)
        if node.name in layers:
            ops[node.name], y = _corrected_layer(quantized, node, inputs, y, passing[node.name], truth.take(ends[node.name]), bounded)
        env[node.name] = y
        for name in dict.fromkeys((*node.inputs, node.name)):
            if last.get(name, node.name) == node.name:
                del env[name]
    return _corrected("measured", quantized, ops, _batchnorms(quantized), bounded)


def correct_bias_analytically(graph: Graph, quantized: Graph, gaussians: Gaussians) -> Correction:
    """Data-free bias correction: ``b += E[y_float] - E[y_quantized]`` for the same input, that is ``b - E[(W_q - W) x]`` (PAPER 7).

    ``gaussians`` gives mean and standard deviation ``(C,)`` of values taken to be normal, network inputs too, as
    :func:`batchnorm_gaussians` reads them off the unfolded network; those of other values are not used. From there means pass exactly
    through one activation and through everything linear, paddings included. Layers whose input's mean does not follow are left.
    :class:`ValueError` as for :func:`correct_bias`.

    >>> net = Graph.chain((1,), fc=Dense(np.array([[1.0], [0.3]])))
    >>> q = quantize(net, weights=UniformQuantizer(2))
    >>> correct_bias_analytically(net, q, {"x": (2 * np.ones(1), np.ones(1))}).graph["fc"].op.bias
    array([0. , 0.6])
    """
    layers, means = _layers(graph, quantized), _means(graph, gaussians)
    floats = {node.name: node for node in graph.nodes}
    ops: dict[str, Weighted] = {}
    bounded: dict[str, int] = {}
    left = _batchnorms(quantized)
    for node in quantized.nodes:
        if node.name not in layers:
            continue
        op, before = node.op, floats[layers[node.name]]
        assert isinstance(op, Weighted)
        if not isinstance(before.op, Weighted) or before.op.weight.shape != op.weight.shape:
            raise ValueError(f"layer '{node.name}' is not '{before.name}' with rounded weights: give the network that was quantized")
        if (value := before.inputs[0]) not in means:
            left[node.name] = f"the mean of '{value}' does not follow from the normal values"
            continue
        error: Weighted = replace(op, weight=op.weight.astype(np.float64) - before.op.weight,  # type: ignore[type-var]
                                  bias=bias_of(op) - bias_of(before.op))
        ops[node.name] = _shifted(quantized, node, -_channel_means(error.forward(means[value])), bounded)
    return _corrected("computed", quantized, ops, left, bounded)


def batchnorm_gaussians(graph: Graph, factorization: Factorization | None = None) -> dict[str, tuple[Vector, Vector]]:
    """Mean ``beta`` and standard deviation of what every BatchNorm of an unfolded network makes, rescaled if asked.

    The deviation is ``|gamma| sqrt(var / (var + eps))``, the paper's ``|gamma|`` but for channels that hardly vary. Folding keeps the
    names of these values, so the result describes the folded network too; those that a factorization does not know are gone there.

    >>> net = Graph.chain((1,), fc=Dense([[2.0]]), norm=BatchNorm([3.0], [0.5], [0.0], [1.0], eps=0.0))
    >>> batchnorm_gaussians(net)["norm"]
    (array([0.5]), array([3.]))
    """
    found: dict[str, tuple[Vector, Vector]] = {}
    for node in graph.nodes:
        if isinstance(node.op, BatchNorm) and (factorization is None or node.name in factorization):
            f = 1.0 if factorization is None else factorization[node.name]
            var = node.op.var.astype(np.float64)
            deviation = np.abs(node.op.gamma) * np.sqrt(var / (var + node.op.eps))
            found[node.name] = (node.op.beta * f).astype(np.float64), deviation * f
    return found


def absorb_high_bias(graph: Graph, low: Mapping[str, Vector], batches: Data | Iterable[Data] = ()) -> Correction:
    """Move ``c = max(0, low)`` from the bias before a ReLU into the bias of the layer behind it (PAPER 7). **Not exact.**

    ``low`` bounds values before their activation from below, ``(C,)`` by name: ``beta - 3 |gamma|``, or the smallest value seen. Where
    the value lies below ``c`` the network changes; how often that happens on ``batches`` is said. Done where a layer feeds one ReLU
    (or Clip from 0), and that one Dense or Conv without padding; anything else is left, and said.

    >>> net = Graph.chain((1,), a=Dense(np.ones((1, 1)), np.array([5.0])), act=ReLU(), b=Dense(np.array([[2.0]])))
    >>> done = absorb_high_bias(net, {"a": np.array([3.0])}, np.array([[0.0], [-4.0]]))
    >>> done.shifts, done.failed
    ({'a': array([-3.]), 'b': array([6.])}, {'a': 0.5})
    """
    readers, uses = graph.readers, Counter(id(node.op) for node in graph.nodes)
    ops: dict[str, Weighted] = {}
    bounds: dict[str, Op] = {}
    absorbed: dict[str, Vector] = {}
    left = {name: "it is no value of the network" for name in low if name not in graph.shapes}
    for node in graph.nodes:
        if node.name not in low:
            continue
        c = np.maximum(_vector(f"the lower bound of value '{node.name}'", low[node.name], graph.shapes[node.name]), 0)
        if not c.any():
            continue
        behind = _behind(node, graph, readers, uses)
        if isinstance(behind, str):
            left[node.name] = behind
            continue
        act, reader = behind
        if isinstance(act.op, Clip):
            c = np.minimum(c, act.op.high)
            bounds[act.name] = replace(act.op, high=act.op.high - c)
        maker, taker = (ops.get(n.name, n.op) for n in (node, reader))
        assert isinstance(maker, Weighted) and isinstance(taker, Weighted)
        ops[node.name] = _with_bias(maker, -c)
        taps = taker.taps().astype(np.float64).sum(axis=3)
        ops[reader.name] = _with_bias(taker, (taps @ c.reshape(len(taps), -1, 1)).reshape(-1))
        absorbed[node.name] = c
    failed = _shares_below(graph, absorbed, batches)
    said = f"absorbed biases of {len(absorbed)} layers"
    if failed:
        worst = max(failed, key=failed.__getitem__)
        said += f", not exactly: up to {100 * failed[worst]:.3g} % of the entries seen ('{worst}') lie below what was absorbed"
    elif absorbed:
        said += ", not exactly: no data was given to say how often values lie below what was absorbed"
    return Correction(graph.with_ops({**ops, **bounds}), _shifts(graph, ops), said + _said(left), left, failed=failed)


def clipped_normal_mean(mean: npt.ArrayLike, deviation: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike) -> Vector:
    """``E[min(max(x, low), high)]`` for normal ``x``; all arguments ``(C,)`` or numbers.

    >>> clipped_normal_mean(np.zeros(1), np.ones(1), 0.0, np.inf).round(4)  # 1 / sqrt(2 pi)
    array([0.3989])
    """
    mean, deviation, low, high = np.broadcast_arrays(*(np.asarray(v, np.float64) for v in (mean, deviation, low, high)))
    with np.errstate(over="ignore"):  # a bound that is infinitely many deviations away
        a, b = (np.divide(bound - mean, deviation, out=np.zeros_like(mean), where=deviation > 0) for bound in (low, high))
        density_a, density_b = (np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi) for t in (a, b))
    below = np.where(np.isfinite(low), low, 0.0) * ndtr(a)
    above = np.where(np.isfinite(high), high, 0.0) * ndtr(-b)
    inside = mean * (ndtr(b) - ndtr(a)) + deviation * (density_a - density_b)
    result: Vector = np.where(deviation > 0, below + inside + above, np.clip(mean, low, high))
    return result


# ---------------------------------------------------------------------------------------------------------------
# Layers and their biases

def _layers(graph: Graph, quantized: Graph) -> dict[str, str]:
    """The layers of the quantized network that have a bias to correct, and the names of the float network's values that they make."""
    if (node := quantized_node(graph)) is not None:
        raise ValueError(f"the float network comes first, then the quantized one, but node '{node.name}' of the first is quantized: "
                         "give the network that was quantized, and what quantize made of it")
    found, unrounded, floats = {}, unrounded_names(graph, quantized), {node.name: node for node in graph.nodes}
    stored = {stored_name(quantized, name): name for name in quantized.inputs}
    for node in quantized.nodes:
        if isinstance(node.op, Weighted) and node.op.gridded:
            name = unrounded.get(node.name, node.name)
            if name in graph.inputs or graph.shapes.get(name) != quantized.shapes[node.name]:
                raise ValueError(f"layer '{node.name}' of the quantized network makes no value of the float one: "
                                 "give the network that was quantized")
            before = floats.get(name)
            if before is not None and type(before.op) is type(node.op) and [stored.get(i, i) for i in node.inputs] == list(before.inputs):
                _check_rounded(before, node)
            found[node.name] = name
    return found


def _check_rounded(before: Node, node: Node) -> None:
    """An error unless a layer's weights are those of the float network's layer, within a step of their grid if they have one."""
    op = node.op
    assert isinstance(before.op, Weighted) and isinstance(op, Weighted)
    if before.op.weight.shape != op.weight.shape:
        raise ValueError(f"layer '{node.name}' is not '{before.name}' with rounded weights, of shapes {op.weight.shape} and "
                         f"{before.op.weight.shape}: give the network that was quantized")
    exact = before.op.weight.astype(np.float64)
    off = np.abs(exact - op.weight)
    allowed = HALF_PRECISION * np.abs(exact)
    if op.grid is not None:  # also what saturates there is right
        low, high = (op.grid.dequantize(q) for q in (op.grid.qmin, op.grid.qmax))
        off, allowed = np.abs(np.clip(exact, low, high) - op.weight), allowed + op.grid.scale
    wrong = off > allowed
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        rule = "equal" if op.grid is None else f"lie within a step of their grid, {op.grid.scale.max():.3g}, of"
        raise ValueError(f"layer '{node.name}': its weights must {rule} those of the float network, got {op.weight[where]:.3g} at {where} "
                         f"where that has {exact[where]:.3g}: give the network that was quantized, after its equalization")


class _Awaited:
    """Values of a walk by name, each kept from when it is made until it was taken as often as it is wanted."""

    def __init__(self, walked: Iterator[tuple[str, Array]], wanted: Counter[str]) -> None:
        self._walked, self._wanted = walked, wanted
        self._held: dict[str, Array] = {}

    def take(self, name: str) -> Array:
        while name not in self._held:
            made, value = next(self._walked)
            if self._wanted[made]:
                self._held[made] = value
        self._wanted[name] -= 1
        return self._held[name] if self._wanted[name] else self._held.pop(name)


def _passing(graph: Graph, quantized: Graph, name: str, value: str) -> list[Node]:
    """The nodes that a layer's value alone goes through, and nothing else reads, to that of the activations behind it; none without any."""
    end = value
    while len(readers := graph.readers[end]) == 1 and isinstance(readers[0].op, ACTIVATIONS) and end not in graph.outputs:
        end = readers[0].name
    found: list[Node] = []
    while end != value and (found[-1].name if found else name) != end:
        readers = quantized.readers[found[-1].name if found else name]
        if len(readers) != 1 or not isinstance(readers[0].op, (*ACTIVATIONS, FakeQuantize)):
            return []
        found.append(readers[0])
    return found


def _corrected_layer(quantized: Graph, node: Node, inputs: Sequence[Array], y: Array, behind: Sequence[Node], expected: Array,
                     bounded: dict[str, int]) -> tuple[Weighted, Array]:
    """A layer's op with its bias corrected, and what it makes then; ``expected`` is the float network's value behind the activations."""
    assert isinstance(node.op, Weighted)
    values = _through(behind, y)
    op = _shifted(quantized, node, _shift(values, behind, expected) if behind else _channel_means(expected) - _channel_means(y), bounded)
    if op is node.op:
        return op, y
    y = op.forward(*inputs)  # not y + shift: what comes later must see the corrected network to the last bit
    if behind:
        worse = _noise(_through(behind, y)[-1], expected) > _noise(values[-1], expected)
        if worse.any():
            bias = np.where(worse, bias_of(node.op), bias_of(op)).astype(op.weight.dtype if op.bias is None else op.bias.dtype)
            op = node.op if np.array_equal(bias, bias_of(node.op)) else replace(op, bias=bias)  # type: ignore[type-var]
            y = op.forward(*inputs)
    return op, y


def _through(behind: Sequence[Node], y: Array) -> list[Array]:
    """A layer's value, and what one node after the other makes of it."""
    values = [y]
    for node in behind:
        values.append(node.forward(values[-1]))
    return values


def _shift(values: Sequence[Array], behind: Sequence[Node], expected: Array) -> Vector:
    """By how much a bias must go up for the least squared error behind the activations: as much of it as holds on images left out.

    One step of Gauss and Newton, ``b = sum_k E_k / sum_k n_k`` with ``E`` the sum of slope times error and ``n`` that of the squared slopes
    in image ``k``, rounding taken as if it had the slope 1. The share ``0 <= t <= 1`` of it is that of the least error
    ``sum_k (t b_k)^2 n_k - 2 t b_k E_k``, where ``b_k`` comes from all images but ``k``. Where nothing passes it is the mean error.
    """
    slope = np.ones_like(values[0])
    for node, x in zip(reversed(behind), reversed(values[:-1]), strict=True):
        (slope,) = node.op.vjp(slope, x)
    axes = tuple(range(2, slope.ndim))
    error = expected - values[-1]
    errors = (slope * error).sum(axis=axes, dtype=np.float64)  # (N, C), as all below
    passed = (slope * slope).sum(axis=axes, dtype=np.float64)
    total, count = errors.sum(axis=0), passed.sum(axis=0)
    shift = _quotient(total, count)
    if len(errors) > 1:  # nothing speaks against the only image
        others = _quotient(_of_others(errors), _of_others(passed))
        shift *= np.clip(_quotient((others * errors).sum(axis=0), (others**2 * passed).sum(axis=0)), 0, 1)
    return np.where(count > 0, shift, _channel_means(error))


def _of_others(a: Vector) -> Vector:
    """The sum of all rows but each: of the ones before it and the ones behind it, that nothing be left of rows that are 0."""
    none = np.zeros((1, *a.shape[1:]))
    result: Vector = np.concatenate([none, np.cumsum(a[:-1], axis=0)]) + np.concatenate([np.cumsum(a[:0:-1], axis=0)[::-1], none])
    return result


def _quotient(a: Vector, b: Vector) -> Vector:
    """``a / b``, 0 where nothing is divided by."""
    result: Vector = np.divide(a, b, out=np.zeros_like(a), where=b > 0)
    return result


def _noise(value: Array, expected: Array) -> Vector:
    """The mean squared error ``(C,)``."""
    error = (value - expected).astype(np.float64)
    error *= error
    return _channel_means(error)


def _batchnorms(graph: Graph) -> dict[str, str]:
    return {node.name: f"{type(node.op).__name__} is computed in float" for node in graph.nodes
            if isinstance(node.op, Weighted) and not node.op.gridded}


def _channel_means(value: Array) -> Vector:
    means: Vector = value.mean(axis=(0, *range(2, value.ndim)), dtype=np.float64)
    return means


def _with_bias(op: Weighted, shift: Vector) -> Weighted:
    bias = (bias_of(op) + shift).astype(op.weight.dtype if op.bias is None else op.bias.dtype)
    return replace(op, bias=bias)  # type: ignore[type-var]  # every final op is a dataclass


def _shifted(quantized: Graph, node: Node, shift: Vector, bounded: dict[str, int]) -> Weighted:
    """The node's op with its bias shifted, and on the accumulator's grid if it was (none counts as 0); the op itself if nothing changes."""
    op = node.op
    assert isinstance(op, Weighted)
    shifted = _with_bias(op, shift)
    if np.array_equal(bias_of(rounded_bias(quantized, node, op)[0]), bias_of(op)):
        shifted, cut = rounded_bias(quantized, node, shifted)
        if cut:
            bounded[node.name] = cut
    return op if np.array_equal(bias_of(shifted), bias_of(op)) else shifted


def _shifts(graph: Graph, ops: Mapping[str, Weighted]) -> dict[str, Vector]:
    """By how much the biases of these ops are above those of a graph's."""
    before = {node.name: node.op for node in graph.nodes}
    return {name: bias_of(op) - bias_of(was) for name, op in ops.items() if isinstance(was := before[name], Weighted)}


def _corrected(how: str, quantized: Graph, ops: Mapping[str, Weighted], left: Mapping[str, str],
               bounded: Mapping[str, int]) -> Correction:
    shifts = _shifts(quantized, ops)
    said = f"{how} shifts corrected in {len(shifts)} layers"
    if shifts:
        largest = {name: float(np.abs(shift).max()) for name, shift in shifts.items()}
        worst = max(largest, key=largest.__getitem__)
        said += f", the largest by {largest[worst]:.3g} at '{worst}'"
    if bounded:
        said += "; only as far as the 32 bits of the sums have room: " + ", ".join(
            f"'{name}' ({count} channel{'s' if count > 1 else ''})" for name, count in bounded.items())
    return Correction(quantized.with_ops(ops), shifts, said + _said(left), left, bounded)


def _said(left: Mapping[str, str]) -> str:
    return "; left as they are: " + ", ".join(f"'{name}' ({reason})" for name, reason in left.items()) if left else ""


def _vector(what: str, value: npt.ArrayLike, shape: Shape) -> Vector:
    vector = np.asarray(value, np.float64)
    if vector.shape != shape[:1] or np.isnan(vector).any() or (vector == np.inf).any():
        raise ValueError(f"{what} must be {shape[0]} numbers, one a channel, got {vector.tolist()[:4] if vector.ndim else vector} "
                         f"of shape {vector.shape}")
    return vector


# ---------------------------------------------------------------------------------------------------------------
# Means without data

def _means(graph: Graph, gaussians: Gaussians) -> dict[str, Array]:
    """The means ``(1, C, *spatial)`` of all values that follow from normal ones: one more walk over the graph, over means."""
    normal = {name: tuple(_vector(f"a moment of value '{name}'", v, graph.shapes[name]) for v in gaussians[name])
              for name in graph.shapes if name in gaussians}
    means: dict[str, Array] = {name: spread(mean, graph.shapes[name])[None] for name, (mean, _) in normal.items()}
    for node in graph.nodes:
        given = [means[i] for i in node.inputs if i in means]
        if node.name in means or len(given) < len(node.inputs):
            continue
        if isinstance(node.op, AFFINE):
            means[node.name] = node.op.forward(*given)
        elif (source := node.inputs[0]) in normal and (mean := _activated_mean(node.op, *normal[source])) is not None:
            means[node.name] = spread(mean, graph.shapes[node.name])[None]
    return means


def _activated_mean(op: Op, mean: Vector, deviation: Vector) -> Vector | None:
    """The mean of an activation of a normal value, if there is a formula."""
    if isinstance(op, Commuting) and op.bounds is not None:
        return clipped_normal_mean(mean, deviation, *op.bounds)
    if isinstance(op, (LeakyReLU, PReLU)):
        positive = clipped_normal_mean(mean, deviation, 0.0, np.inf)
        return positive + op.slope * (mean - positive)
    return None


# ---------------------------------------------------------------------------------------------------------------
# High biases

def _behind(node: Node, graph: Graph, readers: Mapping[str, Sequence[Node]], uses: Counter[int]) -> tuple[Node, Node] | str:
    """The activation and the layer behind a layer, if a constant can move from its bias to the latter's; else the reason why not."""
    if not isinstance(node.op, Weighted) or not node.op.gridded:
        return "it is not made by a layer with a bias"
    path = [node]
    for _ in range(2):
        if path[-1].name in graph.outputs:
            return f"'{path[-1].name}' is a network output"
        if len(readers[path[-1].name]) != 1:
            return f"'{path[-1].name}' has {len(readers[path[-1].name])} readers"
        path += readers[path[-1].name]
    _, act, reader = path
    if not (isinstance(act.op, ReLU) or (isinstance(act.op, Clip) and not np.any(act.op.low))):
        return f"'{act.name}' behind it is no ReLU and no Clip from 0"
    if not isinstance(reader.op, (Dense, Conv)) or (isinstance(reader.op, Conv) and np.any(reader.op.padding)):
        return f"'{reader.name}' behind the activation is no Dense and no Conv without padding"
    for layer in (node, reader):
        if uses[id(layer.op)] > 1:
            return f"the weights of '{layer.name}' are used by {uses[id(layer.op)]} nodes"
    return act, reader


def _shares_below(graph: Graph, absorbed: Mapping[str, Vector], batches: Data | Iterable[Data]) -> dict[str, float]:
    """The share of the entries, of the channels where something was absorbed, that lie below that."""
    below, seen = Counter[str](), Counter[str]()
    for batch in batches_of(batches):
        for name, value in walk(graph, batch):
            if name in absorbed:
                moved = np.flatnonzero(absorbed[name])
                failed = value[:, moved] < along_channels(absorbed[name][moved], value.ndim - 1)
                below[name] += int(failed.sum())
                seen[name] += failed.size
    return {name: below[name] / seen[name] for name in seen}
