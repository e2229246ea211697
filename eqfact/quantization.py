"""What does a network compute with numbers on grids? :func:`quantize`, a pass ``Graph -> Graph``, and what can be asked of its result.

Which values an engine stores, on which grids, and where it works on what is rounded already (docs/integers.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from eqfact.accumulators import accumulator_step, bias_room, bias_steps, on_accumulator, on_grids
from eqfact.calibration import Statistics, check_statistics
from eqfact.gradients import Sensitivities
from eqfact.graph import Graph, Node, fresh_name
from eqfact.ops.base import Array, Commuting, Op, Shape, Weighted
from eqfact.ops.elementwise import Clip
from eqfact.ops.grid import Grid
from eqfact.quantizers import FakeQuantize, UniformQuantizer, check_quantizers

#: The ends ``(low, high)`` of a range: numbers, or arrays that broadcast as the scales of its grid do.
Range = tuple[npt.ArrayLike, npt.ArrayLike]


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
                on_grid[key] = on_grids(op, grid, input_grid, dtype)
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
    wanted, room = np.abs(bias_steps(op, step)), np.maximum(bias_room(op, input_grid), 0)
    return on_accumulator(op, step, input_grid), int((wanted > room).sum())


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
