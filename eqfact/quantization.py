"""How do numbers get onto a grid, and what does a network compute with numbers on grids?

``q = clip(round(x / scale) + zero_point, qmin, qmax)`` and back, ``scale * (q - zero_point)`` (PAPER 5 and 6). A
:class:`UniformQuantizer` says which grids there are, :class:`Grid` is one with its numbers, :class:`FakeQuantize` the op that
rounds an activation, and :func:`quantize` a pass ``Graph -> Graph``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from eqfact.calibration import Statistics, ValueStatistics, check_statistics
from eqfact.clips import RANGES, Entries, clipped, of_histogram, of_numbers, together
from eqfact.gradients import Sensitivities
from eqfact.graph import Graph, Node, fresh_name
from eqfact.ops.base import Array, Blocking, Commuting, Op, Shape, Weighted, along_channels, one_input, parameter
from eqfact.ops.elementwise import Clip
from eqfact.ops.grid import ROUNDINGS, Grid

GRANULARITIES = ("per_tensor", "per_channel", "per_group")

#: The ends ``(low, high)`` of a range: numbers, or arrays that broadcast as the scales of its grid do.
Range = tuple[npt.ArrayLike, npt.ArrayLike]

#: Integer engines add up products of 8 bits in 32, a sign among them.
ACCUMULATOR = 2**31
#: The most steps of its layer's sums that a bias gets: float32 tells the steps of numbers as large, with a margin of three bits.
TOLD = 2**20
#: That of a bias that no product is added to; float32 holds it exactly.
TOLD_ALONE = 2**23


@dataclass(frozen=True)
class UniformQuantizer:
    """A family of uniform grids: how many bits, symmetric or affine, and which entries share a grid.

    ``bits`` from 2 to 16; weights of 7 are what engines call *reduce_range*: stored in 8 bits, exact where pairs of products are added in
    16 (docs/integers.md). ``symmetric``: the range is ``[-a, a]`` and zero sits in the middle; else *affine*: the range is
    ``[min, max]``, widened to hold zero. ``signed`` by default if symmetric, unsigned if affine. ``granularity`` is
    ``"per_tensor"``, ``"per_channel"`` (weights: output channels) or ``"per_group"`` (weights: runs of ``group_size`` input
    channels of every output channel). ``narrow_range`` leaves out the lowest number, so that a signed grid is symmetric.
    ``rounding`` is ``"half_even"``, ``"half_away"``, ``"half_up"`` or ``"floor"``. Zero is always on the grid exactly; a range of 0 gets
    scale 1.

    ``range`` is the rule that grids end by (:mod:`eqfact.clips`): at the extrema, ``"minmax"``; where ``percentile`` percent of the entries
    end, ``"percentile"``; where the expected error of rounding and saturation is least, ``"mse"``, or the divergence of distributions,
    ``"entropy"``; or where the noise that is expected to reach the output is least, ``"noise"``, which takes sensitivities. What lies
    outside saturates. Weights are looked at one by one, activations in the histograms of their statistics.

    >>> UniformQuantizer(bits=8).grid(-1.0, 0.5).fake_quantize(np.array([-1.0, 0.0]))
    array([-1.,  0.])
    """

    bits: int = 8
    symmetric: bool = True
    granularity: str = "per_tensor"
    signed: bool | None = None
    narrow_range: bool = False
    rounding: str = "half_even"
    group_size: int | None = None
    range: str = "minmax"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, (int, np.integer)) or not 2 <= self.bits <= 16:
            raise ValueError(f"bits must be an integer from 2 to 16, got {self.bits!r}")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {GRANULARITIES}, got {self.granularity!r}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {ROUNDINGS}, got {self.rounding!r}")
        if (self.granularity == "per_group") != (self.group_size is not None):
            raise ValueError(f"group_size goes with granularity 'per_group', got {self.group_size} with {self.granularity!r}")
        if self.group_size is not None and (not isinstance(self.group_size, (int, np.integer)) or self.group_size < 1):
            raise ValueError(f"group_size must be a positive integer, got {self.group_size!r}")
        if self.range not in RANGES:
            raise ValueError(f"range must be one of {RANGES}, got {self.range!r}")
        if not 50 <= self.percentile <= 100:
            raise ValueError(f"percentile must be a number from 50 to 100, got {self.percentile!r}")

    @property
    def qmin(self) -> int:
        """Smallest whole number of the grid."""
        lowest = -(1 << (self.bits - 1)) if self._signed else 0
        return lowest + int(self.narrow_range)

    @property
    def qmax(self) -> int:
        """Largest whole number of the grid."""
        return (1 << (self.bits - 1)) - 1 if self._signed else (1 << self.bits) - 1

    @property
    def steps(self) -> int:
        """The steps of the whole range of an affine grid; of a symmetric one those from zero to its end."""
        if not self.symmetric:
            return self.qmax - self.qmin
        return self.qmax - (0 if self._signed else 1 << (self.bits - 1))

    @property
    def _signed(self) -> bool:
        return self.symmetric if self.signed is None else self.signed

    def grid(self, low: npt.ArrayLike, high: npt.ArrayLike) -> Grid:
        """The grid for values from ``low`` to ``high`` (arrays: one grid an entry).

        Symmetric: ``scale = max(|low|, |high|) / n`` with ``n`` the steps from the zero point to ``qmax``, so that the largest
        magnitude is on the grid. Affine: ``scale = (high - low) / (qmax - qmin)``.
        """
        low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise ValueError("a range to quantize must be finite, got NaN or infinity")
        if (low > high).any():
            raise ValueError(f"a range to quantize must not be empty, got low {low.max():g} above high {high.min():g}")
        if self.symmetric:
            zero = 0 if self._signed else 1 << (self.bits - 1)
            scale = np.maximum(np.abs(low), np.abs(high)) / (self.qmax - zero)
            zero_point = np.full_like(scale, zero)
        else:
            below, above = np.minimum(low, 0), np.maximum(high, 0)
            scale = above / (self.qmax - self.qmin) - below / (self.qmax - self.qmin)
            exact = np.divide(below, scale, out=np.zeros_like(scale), where=scale > 0)
            zero_point = np.clip(np.rint(self.qmin - exact), self.qmin, self.qmax)
        # a range of 0 (or so small that a step underflows) holds zero alone
        return Grid(np.where(scale > np.finfo(np.float64).tiny, scale, 1.0), zero_point, self.qmin, self.qmax, self.rounding)

    def range_vjp(self, low: Array, high: Array, by_scale: Array, by_zero_point: Array) -> tuple[Array, Array]:
        """The cotangents of ``low`` and ``high`` from those of the scale and the zero point that :meth:`grid` makes of them.

        Affine, with ``n = qmax - qmin``: ``scale = (high - low) / n`` and ``zero_point = qmin - low / scale + (what rounding added, a
        constant)``. An end at zero stays there, as ranges hold zero. Symmetric: the range is ``[-a, a]``, and the two ends share what ``a``
        gets.

        >>> UniformQuantizer(4, symmetric=False).range_vjp(np.array([0.0]), np.array([3.0]), np.array([15.0]), np.array([-0.2]))
        (array([0.]), array([1.]))
        """
        if self.symmetric:
            half = by_scale / (2 * self.steps)
            return -half, half
        below, above = np.minimum(low, 0), np.maximum(high, 0)
        scale = (above - below) / self.steps
        scale = np.where(scale > 0, scale, 1)
        by_width = (by_scale + by_zero_point * below / scale**2) / self.steps
        return np.where(below < 0, -by_zero_point / scale - by_width, 0), np.where(above > 0, by_width, 0)

    def weight_range(self, op: Weighted, sensitivities: npt.NDArray[np.float64] | None = None) -> tuple[Array, Array]:
        """The ranges of the grids of an op's weights, in shapes that broadcast against ``(out, in // groups, *kernel)``.

        The extrema of the weights that share a grid, or within these by the rule; ``sensitivities`` are those of the weights, ``(groups,
        out // groups, in // groups)``, which ``"noise"`` needs.
        """
        w = op.weight
        if self.granularity == "per_group" and self.group_size is not None and self.group_size < w.shape[1]:
            starts = np.arange(0, w.shape[1], self.group_size)
            axes: Any = tuple(range(2, w.ndim))
            group = np.arange(w.shape[1]) // self.group_size
            low, high = (extreme.reduceat(extreme.reduce(w, axis=axes, keepdims=True), starts, axis=1)[:, group]
                         for extreme in (np.minimum, np.maximum))
            columns = [slice(start, start + self.group_size) for start in starts.tolist()]
        else:
            axes = tuple(range(w.ndim)) if self.granularity == "per_tensor" else tuple(range(1, w.ndim))
            low, high = w.min(axis=axes, keepdims=True), w.max(axis=axes, keepdims=True)
            columns = [slice(None)]
        if self.range == "minmax":
            return low, high
        low, high, weights = low.astype(np.float64), high.astype(np.float64), self._weighing(w, sensitivities)
        rows = [slice(None)] if len(low) == 1 else [slice(row, row + 1) for row in range(len(low))]
        for grid in ((row, column) for row in rows for column in columns):
            ends = self._clipped(of_numbers(w[grid], weights[grid]), float(low[grid].flat[0]), float(high[grid].flat[0]))
            low[grid], high[grid] = ends
        return low, high

    def _weighing(self, w: Array, sensitivities: npt.NDArray[np.float64] | None) -> npt.NDArray[np.float64]:
        """How much the square of each weight's error counts, for ``"noise"``: taps share their sensitivity."""
        if self.range != "noise":
            return np.ones_like(w, np.float64)
        if sensitivities is None:
            raise ValueError("range 'noise' needs sensitivities of these weights: give sensitivities=gradient_sensitivities(graph, images)")
        axes = tuple(np.arange(2, w.ndim))
        live = np.maximum(np.count_nonzero(w, axis=axes, keepdims=True), 1)
        return np.broadcast_to(sensitivities.reshape(live.shape) / live, w.shape)

    def weight_grid(self, op: Weighted, sensitivities: npt.NDArray[np.float64] | None = None) -> Grid:
        """The grid for the weights of an op, ``(out, in // groups, *kernel)``, by granularity and rule."""
        return self.grid(*self.weight_range(op, sensitivities))

    def value_range(self, stats: ValueStatistics, sensitivities: npt.NDArray[np.float64] | None = None) -> tuple[Array, Array]:
        """The ranges of an activation's grids by the rule, ``(1,)`` for the tensor, or ``(C,)``; ``"noise"`` needs ``sensitivities``."""
        low, high = self.activation_range(stats.min, stats.max)
        if self.range == "minmax":
            return low, high
        if stats.histogram is None:
            raise ValueError(f"range {self.range!r} needs a histogram, which these statistics do not hold: give those of "
                             "calibrate(graph, batches), or range='minmax'")
        if self.range == "noise" and sensitivities is None:
            raise ValueError("range 'noise' needs sensitivities of this value: give sensitivities=gradient_sensitivities(graph, images)")
        entries = of_histogram(stats.histogram, stats.min, stats.max, sensitivities if self.range == "noise" else None)
        entries = [together(entries)] if len(low) == 1 else entries
        ends = np.array([self._clipped(e, a, b) for e, a, b in zip(entries, low.tolist(), high.tolist(), strict=True)])
        return ends[:, 0], ends[:, 1]

    def _clipped(self, entries: Entries, low: float, high: float) -> tuple[float, float]:
        return clipped(entries, self.range, low, high, steps=self.steps, symmetric=self.symmetric, percentile=self.percentile)

    def activation_range(self, low: Array, high: Array) -> tuple[Array, Array]:
        """Of the extrema ``(C,)`` of an activation, those of its grids: ``(1,)`` for the tensor, or ``(C,)``."""
        if self.granularity == "per_group":
            raise ValueError("granularity 'per_group' is for weights; quantize activations per_tensor or per_channel")
        if self.granularity == "per_tensor":
            low, high = low.min(keepdims=True), high.max(keepdims=True)
        return low, high

    def activation_grid(self, low: Array, high: Array) -> Grid:
        """The grid for an activation with these extrema ``(C,)``: one for the tensor, or ``(C,)`` of them."""
        return self.grid(*self.activation_range(low, high))


@dataclass(frozen=True, eq=False)
class FakeQuantize(Blocking):
    """Round a value to a grid, ``scale`` and ``zero_point`` one for the tensor or ``(C,)``; pins what it touches.

    ``step``, ``(1,)`` or ``(C,)``: the value is made of whole multiples of it, an integer engine's sums, and is rescaled as there
    (:meth:`Grid.quantize`); :class:`ValueError` if one does not fit into 32 bits.

    >>> FakeQuantize(UniformQuantizer(bits=2, symmetric=False).grid([0.0], [3.0])).forward(np.array([[0.6, 9.0]]))
    array([[1., 3.]])
    """

    grid: Grid
    step: Array | None = None
    reason = "has a fixed grid"

    def __post_init__(self) -> None:
        if not isinstance(self.grid, Grid):
            raise TypeError(f"FakeQuantize needs a Grid, got {self.grid!r}: UniformQuantizer(...).grid(low, high) makes one")
        if self.step is not None:
            object.__setattr__(self, "step", parameter("FakeQuantize step", np.asarray(self.step, np.float64), 1))
            if not (self.step > 0).all():
                raise ValueError(f"FakeQuantize step must be positive, got {self.step.min():g}")

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        for name, numbers in (("scales", self.grid.scale), ("steps", self.step)):
            if numbers is not None and numbers.shape not in ((1,), (shape[0],)):
                raise ValueError(f"FakeQuantize has {name} of shape {numbers.shape} for {shape[0]} channels")
        return tuple(shape)

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        step = None if self.step is None else along_channels(self.step, x.ndim - 1)
        if self.step is not None:
            sums = np.abs(x).max(axis=(0, *range(2, x.ndim)), initial=0).astype(np.float64) / self.step
            if sums.max() >= ACCUMULATOR:
                channel = int(np.argmax(sums))
                raise ValueError(f"channel {channel}: a sum of {sums[channel]:.10g} steps does not fit into an integer engine's 32 bits, "
                                 f"which hold less than {ACCUMULATOR}; raise the scale of the weights, as eqfact.quantize does")
        return self._along(x).fake_quantize(x, step)

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        """Straight through, as if nothing were rounded, where the value lies in the range of the grid; 0 where it saturates."""
        return (cotangent * self._along(inputs[0]).inside(inputs[0]),)

    def grid_vjp(self, cotangent: Array, x: Array) -> tuple[Array, Array]:
        """The cotangents of the grid's scale and zero point, in their shapes (:meth:`Grid.vjp`)."""
        by_scale, by_zero_point = self._along(x).vjp(cotangent, x)
        return by_scale.reshape(self.grid.scale.shape), by_zero_point.reshape(self.grid.scale.shape)

    def _along(self, x: Array) -> Grid:
        """The grid, to broadcast against a value."""
        return replace(self.grid, scale=along_channels(self.grid.scale, x.ndim - 1),
                       zero_point=along_channels(self.grid.zero_point, x.ndim - 1))

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        """Rounding is monotone: how far the ends of the interval come apart."""
        (e,), (x,) = errors, inputs
        with np.errstate(over="ignore"):
            low, middle, high = (self.forward(v) for v in (x - u * e, x, x + u * e))
        return np.maximum(high - middle, middle - low) / x.dtype.type(u)

    rounds = Op.rounds


def quantize(graph: Graph, *, weights: UniformQuantizer | None = None, activations: UniformQuantizer | None = None,
             stats: Statistics | None = None, ranges: Mapping[str, Range] | None = None, sensitivities: Sensitivities | None = None,
             biases: bool = True, outputs: bool = False) -> Graph:
    """The network with weights on grids and fake-quantized activations, as an integer engine would compute it.

    ``weights`` and ``activations`` say on which grids (None leaves them in float); activations need ``stats`` of this graph,
    whose extrema give the ranges. Every value that an engine stores is rounded: inputs, and the values of layers after
    their activation; ops that only select or move entries stay on the grid of their input; network outputs are rounded with
    ``outputs=True``. The value keeps its name, and the unrounded one is called ``"NAME.float"``; of a network input, the rounded one is
    called ``"NAME.quantized"`` (a number follows where the network has such a value). A ReLU or Clip behind a layer works on the
    layer's rounded value, ``"LAYER.quantized"``, with bounds on the same grid, or is gone where the grid ends as early: rounding is
    monotone, so that this is the same function, and an engine need not leave the whole numbers for it.

    ``ranges``: ends ``(low, high)`` in the place of those by the quantizer's rule, of activations by the name of the value, of weights as
    ``"NODE.weight"`` (the first node of those that share them; a number follows where a value has this name); each a number, or an array
    that broadcasts as the scales of its grid do: ``(C,)`` for activations, ``(out,)`` or ``(out, in // groups, 1, ...)`` for weights. What
    lies outside saturates. Activations whose ranges are all given need no ``stats``. ``sensitivities`` are those of this graph, for
    quantizers of ``range="noise"``
    (:func:`eqfact.gradient_sensitivities`; after an equalization ``sensitivities.rescaled(graph, factorization)``).

    ``biases``: to whole multiples of ``s_x * s_w``, where both scales exist (per-tensor activations). The layer's sums are such multiples
    then, too, and are rounded as an integer engine rounds them: the same whole numbers come out. No input makes a sum that 32 bits do
    not hold: where weights and activations have 8 bits, ``s_w`` is raised as far as that needs, and, per channel, until no bias has more
    steps than float32 tells (2**20); where they have more bits, and sums could be too large, bias and sums stay in float. The scale of
    weights that are all 0 is chosen for their bias. Scales are numbers of the network's own type.

    Fold BatchNorm first: one that is left is computed in float. :class:`TypeError` if ``weights`` or ``activations`` is no quantizer,
    :class:`ValueError` if the network has quantized activations already, the statistics are of another one, or a range is of nothing
    that is quantized here, empty, not finite or of another shape.

    >>> net = Graph.chain((2,), fc=Dense([[1.0, 0.3]]))
    >>> quantize(net, weights=UniformQuantizer(bits=3))["fc"].op.weight.round(3)
    array([[1.   , 0.333]])
    """
    check_quantizers(weights, activations)
    for node in graph.nodes:  # weights alone may be quantized again
        if isinstance(node.op, FakeQuantize):
            raise ValueError(f"node '{node.name}': the network is quantized already: quantize the float network")
    dtype = scale_dtype(graph)
    extrema = tensor_ranges(graph, weights=weights, activations=activations, stats=stats, ranges=ranges, outputs=outputs,
                            sensitivities=sensitivities)
    shared = weight_names(graph)
    grids = {} if activations is None else {value: activations.grid(*extrema[value]).astype(dtype)
                                            for value in stored_values(graph, outputs=outputs)}
    stored = set(grids)
    names = set(graph.shapes)

    def fresh(name: str) -> str:
        names.add(found := fresh_name(name, names))
        return found
    rename = {value: fresh(f"{value}.quantized") for value in graph.inputs if value in stored}
    nodes = [Node(name, FakeQuantize(grids[value]), (value,)) for value, name in rename.items()]
    steps: dict[str, Array] = {}
    on_grid: dict[tuple[int, bytes], tuple[Weighted, Array | None]] = {}
    for node in graph.nodes:
        op, source = node.op, node.inputs[0]
        if isinstance(op, Weighted) and op.gridded:
            input_grid = grids.get(source) if biases else None
            key = (id(op), b"" if input_grid is None else input_grid.scale.tobytes())
            if key not in on_grid:  # an op used twice stays one op, if what it reads has one grid
                grid = None if weights is None else weights.grid(*extrema[shared[id(op)]]).astype(dtype)
                on_grid[key] = _on_grids(op, grid, input_grid, dtype)
            op, step = on_grid[key]
            if step is not None:
                steps[node.name] = step
        elif isinstance(op, Commuting) and op.moves and source in grids:
            grids[node.name] = grids[source]
        node = replace(node, op=op, inputs=tuple(rename.get(i, i) for i in node.inputs))
        if node.name not in stored:
            nodes.append(node)
            continue
        bounds = op.bounds if isinstance(op, Commuting) and source not in grids else None
        if bounds is not None:
            nodes += _rounded_then_clipped(node, bounds, FakeQuantize(grids[node.name], steps.get(source)), dtype, fresh)
        else:
            rounding, unrounded = FakeQuantize(grids[node.name], steps.get(node.name)), fresh(f"{node.name}.float")
            nodes += [replace(node, name=unrounded), Node(node.name, rounding, (unrounded,))]
    return replace(graph, nodes=tuple(nodes))


def tensor_ranges(graph: Graph, *, weights: UniformQuantizer | None, activations: UniformQuantizer | None, stats: Statistics | None = None,
                  ranges: Mapping[str, Range] | None = None, outputs: bool = False,
                  sensitivities: Sensitivities | None = None) -> dict[str, tuple[Array, Array]]:
    """The range ``(low, high)`` of every tensor that :func:`quantize` would put on a grid, by name, in the shape of its grid's scales.

    >>> net = Graph.chain((1,), fc=Dense(np.array([[0.5], [-1.0]])))
    >>> tensor_ranges(net, weights=UniformQuantizer(8), activations=None)
    {'fc.weight': (array([[-1.]]), array([[0.5]]))}
    """
    given = ranges or {}
    found: dict[str, tuple[Array, Array]] = {}
    if activations is not None:
        stored = stored_values(graph, outputs=outputs)
        if stats is None and not set(stored) <= set(given):
            raise ValueError("quantizing activations needs their ranges: give stats=calibrate(graph, batches)")
        if stats is not None:
            check_statistics(graph, stats, stored)
        for value in stored:
            if stats is None or value in given:  # the shape counts alone
                found[value] = activations.activation_range(*(np.zeros(graph.shapes[value][0]),) * 2)
            else:
                found[value] = _of_tensor(value, activations.value_range, stats[value], sensitivities and sensitivities.activations.get(
                    value, np.zeros(graph.shapes[value][0])))
    if weights is not None:
        ops = {id(node.op): node.op for node in graph.nodes}
        for key, name in weight_names(graph).items():
            op = ops[key]
            assert isinstance(op, Weighted)
            rule = replace(weights, range="minmax") if name in given else weights
            of_op = None if sensitivities is None else sum(
                (sensitivities.weights[node.name] for node in graph.nodes if node.op is op and node.name in sensitivities.weights),
                np.zeros(op.taps().shape[:3]))
            found[name] = _of_tensor(name, rule.weight_range, op, of_op)
    for name, ends in given.items():
        if name not in found:
            raise ValueError(f"a range is given for '{name}', which is not quantized here; quantized are "
                             f"{', '.join(sorted(found)[:8]) or 'none'}{', ...' if len(found) > 8 else ''}")
        found[name] = _range_given(name, ends, found[name][0].shape)
    return found


def _of_tensor(name: str, rule: Callable[[Any, Any], tuple[Array, Array]], *arguments: Any) -> tuple[Array, Array]:
    """The range by a rule, or an error that names the tensor."""
    try:
        return rule(*arguments)
    except ValueError as error:
        raise ValueError(f"'{name}': {error}") from error


def _range_given(name: str, given: Range, shape: Shape) -> tuple[Array, Array]:
    """The ends of a range in the shape of its grid's scales, or an error that names the tensor."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise ValueError(f"the range of '{name}' must be (low, high), got {given!r}")
    low, high = (np.asarray(end, np.float64) for end in given)
    ends = [end.reshape(-1, *(1,) * (len(shape) - 1)) if end.ndim == 1 else end for end in (low, high)]
    if any(end.ndim > len(shape) or any(n not in (1, m) for n, m in zip(end.shape[::-1], shape[::-1], strict=False))
           for end in ends):
        raise ValueError(f"the ends of the range of '{name}' must be numbers or arrays that broadcast to {shape}, the scales of its grid, "
                         f"got shapes {low.shape} and {high.shape}")
    low, high = (np.broadcast_to(end, shape) for end in ends)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError(f"the range of '{name}' must be finite, got NaN or infinity")
    if (low > high).any():
        raise ValueError(f"the range of '{name}' must not be empty, got low {low[low > high][0]:g} above high {high[low > high][0]:g}")
    return low, high


def weight_names(graph: Graph) -> dict[int, str]:
    """``"NODE.weight"`` for every op (by ``id``) whose weights lie on a grid in a quantized network, with the first node that uses it.

    A number follows where a value of the network has this name.
    """
    names: dict[int, str] = {}
    for node in graph.nodes:
        if isinstance(node.op, Weighted) and node.op.gridded:
            names.setdefault(id(node.op), fresh_name(f"{node.name}.weight", graph.shapes))
    return names


def check_quantizers(weights: object, activations: object) -> None:
    """An error if one of the two is neither a quantizer nor None."""
    for argument, quantizer in (("weights", weights), ("activations", activations)):
        if not isinstance(quantizer, UniformQuantizer | None):
            raise TypeError(f"{argument} must be a quantizer or None (float), got {quantizer!r}: "
                            "give for instance UniformQuantizer(bits=8)")


def clips(*quantizers: UniformQuantizer | None) -> bool:
    """Does one of the quantizers end its grids by another rule than the extrema?"""
    return any(q is not None and q.range != "minmax" for q in quantizers)


def quantized_node(graph: Graph) -> Node | None:
    """The first node whose weights are on a grid, or that puts its input on one; None in a float network."""
    return next((node for node in graph.nodes if isinstance(node.op, FakeQuantize)
                 or (isinstance(node.op, Weighted) and node.op.grid is not None)), None)


def stored_values(graph: Graph, *, outputs: bool = False) -> list[str]:
    """The values that an integer engine rounds and stores, in dependency order.

    Not stored are: a value whose only reader is an activation (it is fused with it), what ops that only move entries make
    (it is on its input's grid already), scores on their way to a Softmax and their masks, what is only scaled for a normalisation (engines
    compute these in float), and, unless ``outputs``, network outputs that no node reads.

    >>> net = Graph.chain((1,), fc1=Dense(np.ones((3, 1))), act=ReLU(), fc2=Dense(np.ones((1, 3))))
    >>> stored_values(net)
    ['x', 'act']
    """
    readers = graph.readers
    moved = {node.name for node in graph.nodes if isinstance(node.op, Commuting) and node.op.moves} | _in_float(graph)
    return [value for value in graph.shapes if value not in moved and (
        (outputs or bool(readers[value])) if value in graph.outputs else value in graph.inputs or fused_activation(readers[value]) is None)]


def _in_float(graph: Graph) -> set[str]:
    """Values that an engine goes on with as they are: sums of products of values on their way to a Softmax, perhaps with a mask on them,
    that nothing else reads; these masks; and what one op computed in float makes for normalisations, which are computed so, too.
    """
    sums = set[str]()
    for node in graph.nodes:
        if node.op.sums or (isinstance(node.op, Commuting) and not sums.isdisjoint(node.inputs)):
            sums.add(node.name)
    readers, masks = graph.readers, set[str]()
    for value in reversed([*graph.shapes]):
        if value in graph.outputs or not readers[value]:
            sums.discard(value)
        elif value in sums:
            if any(r.name not in sums and not r.op.exponential for r in readers[value]):
                sums.remove(value)
        elif all((r.name in sums or r.name in masks) and not r.op.sums and _gridded(r.op) is not True for r in readers[value]):
            masks.add(value)
    scaled = {node.name for node in graph.nodes if _gridded(node.op) is False and node.name not in graph.outputs and readers[node.name]
              and all(isinstance(r.op, Weighted) and not r.op.divides for r in readers[node.name])}
    return sums | masks | scaled


def _gridded(op: Op) -> bool | None:
    """Whether the weights of an op lie on a grid; None if it has none."""
    return op.gridded if isinstance(op, Weighted) else None


def fused_activation(readers: tuple[Node, ...]) -> Node | None:
    """The activation that an engine fuses with the op before it, because it alone reads that op's value."""
    if len(readers) == 1 and isinstance(readers[0].op, Commuting) and readers[0].op.activation:
        return readers[0]
    return None


def stored_name(quantized: Graph, value: str) -> str:
    """What a value of the float network, as an engine stores it, is called in the quantized one: as before, but for network inputs.

    >>> net = Graph.chain((1,), fc=Dense(np.ones((1, 1))))
    >>> q = quantize(net, activations=UniformQuantizer(), stats=eq.calibrate(net, np.ones((1, 1))))
    >>> stored_name(q, "x")
    'x.quantized'
    """
    readers = quantized.readers[value] if value in quantized.inputs else ()
    return next((node.name for node in readers if isinstance(node.op, FakeQuantize)), value)


def unrounded_names(graph: Graph, quantized: Graph) -> dict[str, str]:
    """What the nodes of a quantized network that make a value before it is rounded make in the float network, by name.

    >>> net = Graph.chain((1,), fc=Dense(np.ones((1, 1))))
    >>> q = quantize(net, activations=UniformQuantizer(), stats=eq.calibrate(net, np.ones((1, 1))), outputs=True)
    >>> unrounded_names(net, q)
    {'fc.float': 'fc'}
    """
    return {node.inputs[0]: node.name for node in quantized.nodes
            if isinstance(node.op, FakeQuantize) and node.name in graph.shapes and node.inputs[0] not in graph.shapes}


def grid_of(quantized: Graph, value: str) -> Grid | None:
    """The grid that a value of a quantized network lies on: the one that it was rounded to, before ops that keep values on it."""
    if value in quantized.inputs:
        return None
    node = quantized[value]
    if isinstance(node.op, FakeQuantize):
        return node.op.grid
    grid = grid_of(quantized, node.inputs[0]) if isinstance(node.op, Commuting) else None
    return grid if grid is not None and keeps_grid(node.op, grid) else None


def keeps_grid(op: Op, grid: Grid) -> bool:
    """Does the op make of values on a grid values on the same grid: move entries, or clip them between numbers on it?

    >>> grid = UniformQuantizer(symmetric=False).grid(0.0, 255.0)
    >>> keeps_grid(Clip(0.0, 6.0), grid), keeps_grid(Clip(0.0, 6.5), grid)
    (True, False)
    """
    if not isinstance(op, Commuting) or grid.scale.size > 1:  # one scale a channel: where an op moves entries to, another may hold
        return False
    if op.bounds is None:
        return op.moves
    nearest, exact = replace(grid, rounding="half_even"), 2.0**-23  # a bound may be kept in float32
    bounds = [np.asarray(bound, np.float64) for bound in op.bounds]
    return all((np.isinf(b) | (np.abs(nearest.fake_quantize(b) - b) <= exact * np.abs(b))).all() for b in bounds)


def rounded_bias(quantized: Graph, node: Node, op: Weighted) -> tuple[Weighted, int]:
    """An op that takes a node's place in a quantized network, its bias rounded to multiples of ``s_x * s_w`` if both scales exist.

    And in how many channels the 32 bits of their sums had no room for all of it.
    """
    input_grid = grid_of(quantized, node.inputs[0])
    step = accumulator_step(op, input_grid, scale_dtype(quantized))
    if step is None or input_grid is None:
        return op, 0
    wanted, room = np.abs(np.rint(bias_of(op) / step)), np.maximum(bias_room(op, input_grid), 0)
    return _on_accumulator(op, step, input_grid), int((wanted > room).sum())


def _rounded_then_clipped(node: Node, bounds: tuple[float | Array, ...], rounding: FakeQuantize, dtype: np.dtype[Any],
                          fresh: Callable[[str], str]) -> list[Node]:
    """Nodes that round what a saturating activation reads: ``round(clip(x)) == clip'(round(x))``, with ``clip'`` between rounded bounds."""
    grid = rounding.grid
    low, high, bottom, top = (grid.fake_quantize(np.asarray(b, dtype)) for b in (*bounds, -math.inf, math.inf))
    below, above = (low > bottom).any(), (high < top).any()
    if not (below or above):
        return [Node(node.name, rounding, node.inputs)]  # the grid saturates as early
    rounded = [bound.item() if bound.size == 1 else bound for bound in (low, high)]
    clip = Clip(rounded[0] if below else -math.inf, rounded[1] if above else math.inf)
    (value,) = node.inputs
    stored = fresh(f"{value}.quantized")
    return [Node(stored, rounding, (value,)), replace(node, op=clip, inputs=(stored,))]


def scale_dtype(graph: Graph) -> np.dtype[Any]:
    """In which precision the scales of a network are kept: its own, and float32 at least."""
    return np.result_type(graph.dtype or np.float64, np.float32)


def _on_grids(op: Weighted, grid: Grid | None, input_grid: Grid | None, dtype: np.dtype[Any]) -> tuple[Weighted, Array | None]:
    """The op with its weights on a grid, if one is given, and its bias on that of its sums; and their step, if there is one."""
    given = op
    if grid is not None:
        if input_grid is not None and _one_step(op, grid, input_grid):
            grid = _roomy(grid, op, input_grid, dtype)
        op = replace(op, weight=grid.fake_quantize(op.weight), grid=grid)  # type: ignore[type-var]  # every final op is a dataclass
    if op.grid is not None and input_grid is not None and _one_step(op, op.grid, input_grid):
        op = replace(op, grid=_with_free_scales(op.grid, op, given, input_grid, dtype))  # type: ignore[type-var]
    step = accumulator_step(op, input_grid, dtype)
    if step is None or input_grid is None or (bias_room(op, input_grid) < np.abs(np.rint(bias_of(op) / step))).any():
        return op, None
    return _on_accumulator(op, step, input_grid), step


def _roomy(grid: Grid, op: Weighted, input_grid: Grid, dtype: np.dtype[Any]) -> Grid:
    """The weights' grid, its scale raised where a layer of 8 bits would not fit into 32 bits, or ``TOLD`` not hold the bias of a channel.

    The latter only where a channel has its own scale: others would pay for a large bias, be its channel dead. Products of more bits are
    added up in more than 32, if at all: their scales stay.
    """
    if max(of.qmax - of.qmin for of in (grid, input_grid)) >= 2**8:
        return grid
    rows, reach, s_x = op.rows().astype(np.float64), _reach(input_grid), input_grid.scale.item()
    # rounding moves a weight by a step at most; and the scale itself, rounded to float32, all sums by 2**-24
    room = np.maximum(ACCUMULATOR - reach * np.count_nonzero(rows, axis=1) - 2**9, ACCUMULATOR // 2)
    bias = np.abs(bias_of(op))
    with np.errstate(over="ignore"):
        needed = (bias + s_x * reach * np.abs(rows).sum(axis=1)) / room / s_x
        if grid.scale.size > 1:
            needed = np.maximum(needed, bias / TOLD / s_x)
    needed = _as(grid.scale, needed)
    return replace(grid, scale=np.where((needed > grid.scale) & (needed < np.finfo(dtype).max), needed, grid.scale)).astype(dtype)


def _with_free_scales(grid: Grid, op: Weighted, given: Weighted, input_grid: Grid, dtype: np.dtype[Any]) -> Grid:
    """The weights' grid, the scale of weights that are all 0, which is free, chosen so that a bias has ``TOLD_ALONE`` steps.

    As far as the weights that were ``given`` are 0 on it, too.
    """
    dead = _as(grid.scale, np.logical_not(op.rows().any(axis=1)), np.minimum)
    smallest, s_x = float(np.finfo(dtype).tiny), input_grid.scale.item()
    with np.errstate(over="ignore"):
        needed = _as(grid.scale, np.abs(bias_of(op))) / TOLD_ALONE / s_x
        free = np.maximum(needed, 2 * smallest / min(s_x, 1.0))  # so that scale and step are normal numbers
    dead &= (needed > 0) & (free < np.finfo(dtype).max) & (2 * _as(grid.scale, np.abs(given.rows()).max(axis=1)) < free)
    return replace(grid, scale=np.where(dead, free, grid.scale)).astype(dtype)


def _as(scale: Array, by_channel: npt.NDArray[Any], reduce: Any = np.maximum) -> npt.NDArray[Any]:
    """Numbers of the output channels in the shape of the scales: those of one scale are reduced to one."""
    together: npt.NDArray[Any] = np.asarray(reduce.reduce(by_channel)) if scale.size == 1 else by_channel
    return together.reshape(scale.shape)


def bias_of(op: Weighted) -> npt.NDArray[np.float64]:
    """The bias in float64; 0 where there is none."""
    return np.zeros(op.out_channels) if op.bias is None else op.bias.astype(np.float64)


def _reach(grid: Grid) -> int:
    """How far from its zero point a grid of one scale reaches, in steps."""
    zero_point = int(grid.zero_point.item())
    return max(grid.qmax - zero_point, zero_point - grid.qmin)


def bias_room(op: Weighted, input_grid: Grid) -> Array:
    """What the products ``(q_x - z_x)(q_w - z_w)`` leave for a bias ``(out,)`` in an integer engine's 32 bits, whatever the input holds.

    ``op`` and input have the grids of one step; negative where the products alone do not fit.
    """
    assert op.grid is not None
    steps = np.abs(np.rint(op.weight.astype(np.float64) / op.grid.scale))
    room: Array = ACCUMULATOR - 1 - _reach(input_grid) * steps.reshape(op.out_channels, -1).sum(axis=1)
    return room


def _one_step(op: Weighted, grid: Grid, input_grid: Grid) -> bool:
    """Is there one step ``s_x * s_w`` for all products that add up to an output channel?"""
    return input_grid.scale.size == 1 and grid.scale.size in (1, len(op.weight))


def accumulator_step(op: Weighted, input_grid: Grid | None, dtype: npt.DTypeLike = np.float64) -> Array | None:
    """``s_x * s_w``, ``(1,)`` or ``(out,)``, of which a layer's sums are whole multiples; the product of ``dtype``'s numbers.

    None where an output channel has no such number: input or weights in float, scales by input channel, a product that underflows.

    >>> x, w = UniformQuantizer(symmetric=False).grid(0, 51.0), UniformQuantizer().grid(-127.0, 127.0)
    >>> accumulator_step(Dense(np.ones((1, 1)), grid=w), x)
    array([0.2])
    """
    if input_grid is None or op.grid is None or not _one_step(op, op.grid, input_grid):
        return None
    step = input_grid.scale.astype(dtype).reshape(()) * op.grid.scale.astype(dtype).reshape(-1)
    return step.astype(np.float64) if (step >= np.finfo(dtype).tiny).all() else None


def _on_accumulator(op: Weighted, step: Array, input_grid: Grid) -> Weighted:
    """The op with its bias on the grid of its integer accumulator, as far as the 32 bits have room for it beside the products."""
    if op.bias is None:
        return op
    room = np.maximum(bias_room(op, input_grid), 0)
    whole = np.clip(np.rint(bias_of(op) / step), -room, room)
    return replace(op, bias=(whole * step).astype(op.bias.dtype))  # type: ignore[type-var]


def effective_bits(ranges: Array, bits: int) -> Array:
    """How many of a tensor's bits each channel gets, ``bits - log2(largest range / range)``; minus infinity for dead channels.

    >>> effective_bits(np.array([1.0, 0.25]), 8)
    array([8., 6.])
    """
    top = float(np.max(ranges, initial=0.0))
    with np.errstate(divide="ignore"):
        return bits + np.log2(ranges / top) if top > 0 else np.full(len(ranges), -math.inf)
