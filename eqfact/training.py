"""How much of what rounding took can training give back, and does it start better from an equalized network?

The network that is trained is ``quantize(masters, ranges=ranges)`` at every step, whole numbers and all; its gradients pass the rounding
straight through (:meth:`eqfact.FakeQuantize.vjp`, :meth:`eqfact.Grid.vjp`) to float masters of biases and weights, and to the ranges.

Every parameter is ``p`` units from where it started (docs/training.md), with ``n`` the steps of a grid from zero to its end:

    weight = start + p max|row| / n,    bias = start + p rms(channel) / n,    range = start exp(p / n),

A unit is about what rounding moves a channel that makes full use of its grid. Adam, whose steps do not know how large a number is, moves
each by at most about ``learning_rate`` units, at any number of bits; and factors of an equalization scale units as they scale channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from eqfact.accumulators import bias_of
from eqfact.calibration import Statistics, check_statistics
from eqfact.gradients import reverse_walk
from eqfact.graph import Data, Graph, batches_of, forward, values
from eqfact.ops.base import Array, Weighted
from eqfact.ops.grid import Grid
from eqfact.quantization import quantize, quantized_node, scale_dtype, tensor_ranges, unrounded_names, weight_names
from eqfact.quantizers import FakeQuantize, UniformQuantizer, check_quantizers

Vector = npt.NDArray[np.float64]
#: Inputs alone, or inputs and labels ``(N,)``.
Batch = Data | tuple[Data, npt.ArrayLike]
#: From the share of the steps that are done, 0 to 1, to the share of the learning rate that is taken.
Schedule = Callable[[float], float]

SCHEDULES: dict[str, Schedule] = {"constant": lambda done: 1.0, "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2}
PARAMETERS = ("biases", "weights")
LOSSES = ("squared_error", "cross_entropy")
#: Units in a step, by what is trained; ten times as much diverges on the bundled network in 4 bits, where weights are trained.
LEARNING_RATES = {"biases": 0.1, "weights": 0.03}
#: Adam's defaults (Kingma and Ba, ICLR 2015, algorithm 1).
BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True, eq=False)
class TrainingState:
    """Where a training stands: all that it needs to go on to the bit, given the same arguments once more.

    ``parameters`` are the steps ``p`` by name: ``"NODE.weight"``, ``"NODE.bias"``, and ``"TENSOR.range"``, whose first axis holds
    ``low`` and ``high`` (one for both where symmetric); ``mean`` and ``mean_square`` are Adam's of their gradients; ``losses`` ``(step,)``.

    >>> net, x = Graph.chain((2,), fc=Dense([[1.0, 0.3]])), np.array([[1.0, 2.0], [3.0, 1.0]])
    >>> W3, A8 = UniformQuantizer(bits=3), UniformQuantizer(symmetric=False)
    >>> done = train(net, x, stats=calibrate(net, x), weights=W3, activations=A8, steps=2)
    >>> sorted(done.state.parameters)
    ['fc.bias']
    """

    step: int
    parameters: Mapping[str, Vector]
    mean: Mapping[str, Vector]
    mean_square: Mapping[str, Vector]
    losses: Vector

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All of it as arrays by name, for ``numpy.savez``.

        >>> sorted(TrainingState(0, {"fc.bias": np.zeros(2)}, {}, {}, np.zeros(0)).arrays())
        ['losses', 'parameters/fc.bias', 'step']
        """
        groups = {"parameters": self.parameters, "mean": self.mean, "mean_square": self.mean_square}
        return {"step": np.asarray(self.step), "losses": self.losses,
                **{f"{group}/{name}": array for group, named in groups.items() for name, array in named.items()}}

    @classmethod
    def of(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> TrainingState:
        """The state whose :meth:`arrays` these are; :class:`ValueError` if they are no state's."""
        groups: dict[str, dict[str, Vector]] = {"parameters": {}, "mean": {}, "mean_square": {}}
        for key in arrays:
            group, _, name = key.partition("/")
            if group in groups and name:
                groups[group][name] = np.asarray(arrays[key], np.float64)
        if not {"step", "losses"} <= set(arrays) or len({frozenset(group) for group in groups.values()}) > 1:
            raise ValueError("a training's state holds step, losses, and the same names in parameters/, mean/ and mean_square/, "
                             f"got {', '.join(sorted(arrays)[:8]) or 'nothing'}")
        state = cls(int(arrays["step"]), **groups, losses=np.asarray(arrays["losses"], np.float64))
        shapes = [{name: a.shape for name, a in group.items()} for group in groups.values()]
        if shapes[0] != shapes[1] or shapes[0] != shapes[2] or state.losses.shape != (state.step,):
            raise ValueError("a training's state holds arrays of the same shapes in parameters/, mean/ and mean_square/, and one loss a "
                             f"step, got others, or losses of shape {state.losses.shape} for {state.step} steps")
        return state


@dataclass(frozen=True, eq=False)
class Training:
    """What training made: ``graph`` is ``quantize(masters, ranges=ranges)`` with the quantizers given; ``losses`` ``(steps,)``, of each
    batch before its step; and the ``state``, to go on.

    >>> net, x = Graph.chain((2,), fc=Dense([[1.0, 0.3]])), np.array([[1.0, 2.0], [3.0, 1.0]])
    >>> W3, A8 = UniformQuantizer(bits=3), UniformQuantizer(symmetric=False)
    >>> done = train(net, x, stats=calibrate(net, x), weights=W3, activations=A8, steps=2)
    >>> done.losses.shape, done.state.step
    ((2,), 2)
    """

    graph: Graph
    masters: Graph
    ranges: Mapping[str, tuple[Array, Array]]
    losses: Vector
    state: TrainingState


def train(graph: Graph, batches: Iterable[Batch] | Data, *, stats: Statistics, weights: UniformQuantizer | None,
          activations: UniformQuantizer | None, steps: int, parameters: str = "biases", ranges: bool = False, loss: str = "squared_error",
          learning_rate: float | None = None, schedule: str | Schedule = "cosine", outputs: bool = False,
          state: TrainingState | None = None, stop: int | None = None, progress: Callable[[int, float], object] | None = None) -> Training:
    """Train the quantized network, by Adam on one batch a step, towards the outputs of the float network ``graph`` or towards labels.

    ``batches`` are inputs, or pairs ``(inputs, labels)``; what can be iterated again is repeated until ``steps`` are done
    (:func:`shuffled` makes batches of arrays). ``parameters``: ``"biases"`` (the others stay to the bit), or ``"weights"`` and biases;
    ``ranges``: the ranges of weights and activations too, which start at the extrema of the weights and of ``stats``, those of this
    graph. ``loss``: ``"squared_error"``, against the outputs of ``graph``, relative to their power (each output's, their mean), which is
    the inverse SQNR; or ``"cross_entropy"`` of the only output ``(N, classes)``, the logits, and labels ``(N,)`` from 0.
    ``learning_rate`` is in units of each parameter, of about one rounding (0.1 for biases alone, else 0.03); ``schedule`` is ``"cosine"``
    (to 0), ``"constant"`` or a function of the share of the steps that are done. ``outputs``: network outputs are rounded, too.
    ``progress`` is called with the steps done and the loss.

    The same arguments give the same bits. ``stop`` ends after so many of the ``steps``; the same call with the ``state`` of its result, and
    with the same batches from their beginning, goes on to what an uninterrupted one gives, to the bit.

    Weights that several nodes share stay shared. A layer without a bias gets one. Fold BatchNorm first: one that is left is computed in
    float, and not trained. :class:`ValueError` for what does not fit, batches that end early, and a loss that is not finite.

    >>> net = Graph.chain((1,), fc=Dense(np.array([[1.0], [0.3]])))
    >>> x = np.array([[1.0], [3.0]])
    >>> train(net, x, stats=calibrate(net, x), weights=UniformQuantizer(2), activations=None, steps=200).graph["fc"].op.bias.round(1)
    array([0. , 0.6])
    """
    model = _Model(graph, stats, weights, activations, parameters, ranges, outputs)
    rate, decay = _options(LEARNING_RATES[parameters] if learning_rate is None else learning_rate, schedule, steps)
    state = model.initial() if state is None else model.checked(state)
    last = steps if stop is None else min(stop, steps)
    if state.step > last:
        raise ValueError(f"the state has {state.step} steps behind it, more than the {last} to do: give more steps")
    for batch in itertools.islice(_repeated(batches, steps), state.step, last):
        x, labels = batch if isinstance(batch, tuple) else (batch, None)
        value, gradients = model.gradients(state.parameters, x, labels, loss)
        if not math.isfinite(value):
            raise ValueError(f"step {state.step}: the loss is {value}; give a learning_rate below {rate:g}")
        state = _adam(state, gradients, rate * decay(state.step / steps), value)
        if progress is not None:
            progress(state.step, value)
    masters, found = model.at(state.parameters)
    return Training(model.quantized(masters, found), masters, found, state.losses, state)


def shuffled(x: Data, labels: npt.ArrayLike | None = None, *, size: int = 64, seed: int = 0) -> Iterator[Any]:
    """Batches of ``size`` without end, of inputs ``(N, C, *spatial)`` or of pairs with their labels ``(N,)``.

    One shuffling of all of them comes after the other; the same ``seed`` gives the same batches.

    >>> [batch.tolist() for batch in itertools.islice(shuffled(np.arange(3.0), size=2), 3)]
    [[2.0, 0.0], [1.0, 2.0], [1.0, 0.0]]
    """
    arrays = {name: np.asarray(a) for name, a in x.items()} if isinstance(x, Mapping) else np.asarray(x)
    count = len(next(iter(arrays.values()))) if isinstance(arrays, dict) else len(arrays)
    of = None if labels is None else np.asarray(labels)
    if of is not None and of.shape != (count,):
        raise ValueError(f"labels must be one a sample, ({count},), got shape {of.shape}")
    if size < 1 or not count:
        raise ValueError(f"batches need a size of at least 1 and some samples, got size {size} and {count} samples")
    rng, order = np.random.default_rng(seed), np.zeros(0, np.int64)
    while True:
        while len(order) < size:
            order = np.concatenate([order, rng.permutation(count)])
        chosen, order = order[:size], order[size:]
        inputs = {name: a[chosen] for name, a in arrays.items()} if isinstance(arrays, dict) else arrays[chosen]
        yield inputs if of is None else (inputs, of[chosen])


def mean_loss(graph: Graph, quantized: Graph, batches: Iterable[Batch] | Data, *, loss: str = "squared_error") -> float:
    """The loss of a quantized network on batches as :func:`train` takes them, averaged over their samples.

    >>> net = Graph.chain((1,), fc=Dense(np.array([[1.0], [0.5]])))
    >>> mean_loss(net, net.with_ops({"fc": Dense(np.array([[1.0], [0.0]]))}), np.array([[2.0]]))
    0.2
    """
    total, count = 0.0, 0
    for batch in batches_of(batches):  # type: ignore[arg-type]
        x, labels = batch if isinstance(batch, tuple) else (batch, None)
        outputs = _by_name(quantized, forward(quantized, x))
        samples = len(next(iter(outputs.values())))
        total += samples * _loss(loss, graph, x, outputs, labels)[0]
        count += samples
    if not count:
        raise ValueError("a loss needs at least one batch, got none")
    return total / count


# ---------------------------------------------------------------------------------------------------------------
# Parameters, and the network that they make

class _Model:
    """A float network, the quantizers, and what of it is trained: from steps ``p`` to a quantized network, and back to gradients."""

    def __init__(self, graph: Graph, stats: Statistics, weights: UniformQuantizer | None, activations: UniformQuantizer | None,
                 parameters: str, ranges: bool, outputs: bool = False) -> None:
        if parameters not in PARAMETERS:
            raise ValueError(f"parameters must be one of {PARAMETERS}, got {parameters!r}")
        if (node := quantized_node(graph)) is not None:
            raise ValueError(f"node '{node.name}': the network is quantized already: train from the float network")
        check_quantizers(weights, activations)
        check_statistics(graph, stats)
        self.graph, self.weights, self.activations, self.learned, self.outputs = graph, weights, activations, ranges, outputs
        tensors = weight_names(graph)
        #: Of every op that is trained the first node that uses it; and the op, and the name of its range, by that.
        self.owner = {id(node.op): node.name for node in reversed(graph.nodes) if id(node.op) in tensors}
        self.ops = {self.owner[id(node.op)]: node.op for node in graph.nodes if id(node.op) in tensors}
        self.tensors = {name: tensors[id(op)] for name, op in self.ops.items()}
        #: Where each parameter starts, and its unit.
        self.start: dict[str, Array] = {}
        self.unit: dict[str, Vector] = {}
        for name, op in self.ops.items():
            assert isinstance(op, Weighted)
            made = [stats[node.name].mean_square for node in graph.nodes if node.op is op]
            self.start[f"{name}.bias"] = bias_of(op)
            self.unit[f"{name}.bias"] = np.sqrt(np.maximum.reduce(made)) / min(_steps(weights), _steps(activations))
            if parameters == "weights":
                rows = np.abs(op.rows()).max(axis=1).astype(np.float64) / _steps(weights)
                self.start[f"{name}.weight"], self.unit[f"{name}.weight"] = op.weight, rows.reshape(-1, *(1,) * (op.weight.ndim - 1))
        self.ranges = {name: self._ends(name, *ends) for name, ends in tensor_ranges(
            graph, weights=weights, activations=activations, stats=stats, outputs=outputs).items()}

    def _quantizer(self, tensor: str) -> UniformQuantizer:
        found = self.activations if tensor in self.graph.shapes else self.weights
        assert found is not None
        return found

    def _ends(self, tensor: str, low: Array, high: Array) -> tuple[Array, Array]:
        """Both ends alike where the grid is symmetric, so that both are multiplied alike."""
        if self._quantizer(tensor).symmetric:
            high = np.maximum(np.abs(low), np.abs(high)).astype(np.float64)
            low = -high
        return low, high

    def initial(self) -> TrainingState:
        """No steps done."""
        zeros = {name: np.zeros(start.shape) for name, start in self.start.items()}
        if self.learned:
            zeros |= {f"{name}.range": np.zeros((1 if self._quantizer(name).symmetric else 2, *low.shape))
                      for name, (low, _) in self.ranges.items()}
        return TrainingState(0, zeros, zeros, zeros, np.zeros(0))

    def checked(self, state: TrainingState) -> TrainingState:
        """The state, if it is one of this network with these quantizers and parameters."""
        ours, theirs = ({name: a.shape for name, a in s.parameters.items()} for s in (self.initial(), state))
        for name in sorted(set(ours) | set(theirs)):
            if ours.get(name) != theirs.get(name):
                raise ValueError(f"the state is of another training: '{name}' has shape {theirs.get(name)} there and {ours.get(name)} "
                                 "here; give the network, quantizers and parameters that it comes from")
        return state

    def at(self, p: Mapping[str, Vector]) -> tuple[Graph, dict[str, tuple[Array, Array]]]:
        """The float masters after steps ``p``, and the ranges."""
        made: dict[str, Weighted] = {}
        for name, op in self.ops.items():
            assert isinstance(op, Weighted)
            changed = {key: (self.start[full] + self.unit[full] * p[full]).astype(op.weight.dtype)
                       for key in ("weight", "bias") if (full := f"{name}.{key}") in p}
            made[name] = replace(op, **changed)  # type: ignore[type-var]  # every final op is a dataclass
        masters = self.graph.with_ops({node.name: made[self.owner[id(node.op)]] for node in self.graph.nodes if id(node.op) in self.owner})
        steps = {name: p.get(f"{name}.range", np.zeros((1,))) for name in self.ranges}
        factors = {name: np.exp(step / _steps(self._quantizer(name))) for name, step in steps.items()}
        return masters, {name: (low * factors[name][0], high * factors[name][-1]) for name, (low, high) in self.ranges.items()}

    def quantized(self, masters: Graph, ranges: Mapping[str, tuple[Array, Array]]) -> Graph:
        return quantize(masters, weights=self.weights, activations=self.activations, ranges=ranges, outputs=self.outputs)

    def gradients(self, p: Mapping[str, Vector], x: Data, labels: npt.ArrayLike | None, loss: str) -> tuple[float, dict[str, Vector]]:
        """The loss on a batch, and its gradient by the steps ``p``."""
        masters, ranges = self.at(p)
        quantized = self.quantized(masters, ranges)
        env = values(quantized, x)
        value, cotangent = _loss(loss, self.graph, x, {name: env[name] for name in quantized.outputs}, labels)
        found = {name: np.zeros(array.shape) for name, array in p.items()}
        layer_of = {node.name: (self.owner[id(node.op)], master.op) for node, master in zip(self.graph, masters, strict=True)
                    if id(node.op) in self.owner}
        layers, rounded = unrounded_names(masters, quantized), _values_rounded(masters, quantized)
        for node, inputs, g in reverse_walk(quantized, env, cotangent, {}):
            if isinstance(node.op, FakeQuantize) and self.learned:
                tensor = rounded[node.name]
                found[f"{tensor}.range"] += self._range_gradient(tensor, ranges, node.op.grid, *node.op.grid_vjp(g, inputs[0]))
            elif isinstance(node.op, Weighted) and node.op.gridded:
                owner, master = layer_of[layers.get(node.name, node.name)]
                assert isinstance(master, Weighted)
                for name, gradient in self._layer_gradients(owner, node.op, master, g, inputs[0], ranges):
                    found[name] += gradient  # of an op that several nodes share, the sum
        return value, found

    def _layer_gradients(self, name: str, op: Weighted, master: Weighted, g: Array, x: Array,
                         ranges: Mapping[str, tuple[Array, Array]]) -> Iterator[tuple[str, Vector]]:
        """What one use of a layer adds to the gradients, from the cotangent ``g`` of what it makes of ``x``."""
        yield f"{name}.bias", self.unit[f"{name}.bias"] * g.sum(axis=(0, *range(2, g.ndim)), dtype=np.float64)
        weight, tensor, grid = f"{name}.weight", self.tensors[name], op.grid
        if weight in self.start or (self.learned and grid is not None):
            by_weight = op.weight_vjp(g, x)
            if weight in self.start:
                yield weight, self.unit[weight] * (by_weight if grid is None else by_weight * grid.inside(master.weight))
            if self.learned and grid is not None:
                yield f"{tensor}.range", self._range_gradient(tensor, ranges, grid, *grid.vjp(by_weight, master.weight))

    def _range_gradient(self, tensor: str, ranges: Mapping[str, tuple[Array, Array]], grid: Grid, by_scale: Array,
                        by_zero_point: Array) -> Vector:
        """By the units of a range, ``d range / dp = range / n``; 0 where ``quantize`` chose another scale than its range's."""
        quantizer, (low, high) = self._quantizer(tensor), ranges[tensor]
        own = quantizer.grid(low, high).astype(scale_dtype(self.graph)).scale == grid.scale
        by_low, by_high = quantizer.range_vjp(low, high, by_scale, by_zero_point)
        ends: Vector = np.stack([by_low * low, by_high * high]) * own / _steps(quantizer)
        return ends.sum(axis=0, keepdims=True) if quantizer.symmetric else ends


def _steps(quantizer: UniformQuantizer | None) -> int:
    """In how many steps a range is divided; where it is left in float, those of 16 bits."""
    return (UniformQuantizer(bits=16) if quantizer is None else quantizer).steps


def _values_rounded(graph: Graph, quantized: Graph) -> dict[str, str]:
    """Which value of the float network each rounding of the quantized one makes: its own name, a network input, or what is clipped then."""
    readers = quantized.readers
    return {node.name: node.name if node.name in graph.shapes else node.inputs[0] if node.inputs[0] in graph.inputs
            else readers[node.name][0].name for node in quantized.nodes if isinstance(node.op, FakeQuantize)}


# ---------------------------------------------------------------------------------------------------------------
# Losses, with their cotangents; and the optimizer

def _loss(loss: str, graph: Graph, x: Data, outputs: Mapping[str, Array], labels: npt.ArrayLike | None) -> tuple[float, dict[str, Array]]:
    """The named loss, and the cotangents of the outputs."""
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}")
    if loss == "cross_entropy":
        return _cross_entropy(outputs, labels)
    return _squared_error(outputs, _by_name(graph, forward(graph, x)))


def _squared_error(outputs: Mapping[str, Array], targets: Mapping[str, Array]) -> tuple[float, dict[str, Array]]:
    """``mean over outputs of sum (y - t)**2 / sum t**2``."""
    value, cotangent = 0.0, dict[str, Array]()
    for name, y in outputs.items():
        error, target = y.astype(np.float64) - targets[name], targets[name].astype(np.float64)
        power = len(outputs) * (float((target**2).sum()) or 1.0)  # outputs that are 0 have no power to be relative to
        value += float((error**2).sum()) / power
        cotangent[name] = 2 * error / power
    return value, cotangent


def _cross_entropy(outputs: Mapping[str, Array], labels: npt.ArrayLike | None) -> tuple[float, dict[str, Array]]:
    """``-mean log softmax(y)[label]``."""
    (name, y), *others = outputs.items()
    if labels is None:
        raise ValueError("cross_entropy needs labels: give batches (inputs, labels), or loss='squared_error', which needs none")
    if others or y.ndim != 2:
        raise ValueError(f"cross_entropy needs one output (N, classes), got {', '.join(f'{n} {a.shape}' for n, a in outputs.items())}")
    of = np.asarray(labels)
    if of.shape != y.shape[:1] or of.dtype.kind not in "iu" or of.min() < 0 or of.max() >= y.shape[1]:
        raise ValueError(f"labels must be whole numbers from 0 to {y.shape[1] - 1}, one for each of {len(y)} samples, got {of.dtype} of "
                         f"shape {of.shape}" + (f" from {of.min()} to {of.max()}" if of.size and of.dtype.kind in "iuf" else ""))
    exact = y.astype(np.float64) - y.max(axis=1, keepdims=True)
    logs = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    rows = np.arange(len(y))
    cotangent = np.exp(logs)
    cotangent[rows, of] -= 1
    return float(-logs[rows, of].mean()), {name: cotangent / len(y)}


def _adam(state: TrainingState, gradients: Mapping[str, Vector], rate: float, loss: float) -> TrainingState:
    """One step of Adam (Kingma and Ba, algorithm 1)."""
    step, (first, second) = state.step + 1, BETAS
    mean = {name: first * m + (1 - first) * gradients[name] for name, m in state.mean.items()}
    square = {name: second * v + (1 - second) * gradients[name] ** 2 for name, v in state.mean_square.items()}
    moved = {name: p - rate * (mean[name] / (1 - first**step)) / (np.sqrt(square[name] / (1 - second**step)) + EPS)
             for name, p in state.parameters.items()}
    return TrainingState(step, moved, mean, square, np.append(state.losses, loss))


def _options(learning_rate: float, schedule: str | Schedule, steps: int) -> tuple[float, Schedule]:
    """The learning rate and the schedule, checked."""
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise ValueError(f"learning_rate must be positive and finite, got {learning_rate!r}")
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}")
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {tuple(SCHEDULES)} or a function of the share of the steps done, got {schedule!r}")
        schedule = SCHEDULES[schedule]
    return learning_rate, schedule


def _repeated(batches: Iterable[Batch] | Data, steps: int) -> Iterator[Batch]:
    """The batches, again and again where they can be iterated again."""
    done = 0
    while True:
        before = done
        for batch in batches_of(batches):  # type: ignore[arg-type]
            done += 1
            yield batch
        if done == before:
            raise ValueError(f"the batches end after {done} of {steps} steps: give more, or a list, which is repeated")


def _by_name(graph: Graph, outputs: Any) -> Mapping[str, Array]:
    return outputs if isinstance(outputs, Mapping) else {graph.outputs[0]: outputs}
