"""Which channels are made together, by which layers, and how do the weights range that make and read them?

A *block* is what a rule sees: the free channels that one weighted op makes, with those of every op that shares a label with it
(PAPER 4: residual partners). Where channels are related (docs/algebra.md), the free numbers in their forms take their place: ranges of
some channels grow with a number, those of others shrink. The weights stay as they are while factors are chosen: ranges are read off
``|W| f_out / f_in``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from eqfact.calibration import Statistics
from eqfact.channels import Channels
from eqfact.graph import Graph
from eqfact.ops.base import Op, Weighted, channel_vector
from eqfact.ops.joining import Concat
from eqfact.quantization import fused_activation
from eqfact.rules import Anchor, Block, Maker, Vector

Indices = npt.NDArray[np.int64]

#: Candidates reach down from the largest of their row by what columns drift apart in so many moves, at the pace of the last ones,
LASTING = 4
#: but at least by the one ratio, lest they be chosen again and again; where it would take the other, they would be too many.
LEAST_ROOM, MOST_ROOM = 1.1, 1.5


@dataclass(frozen=True, eq=False)
class Candidates:
    """The entries that may be the largest of their row, row after row, while columns have moved little."""

    values: Vector
    columns: Indices
    #: The rows that have any, and where the entries of each begin.
    rows: Indices
    starts: Indices
    #: What the product of no other entry of each row exceeded when they were chosen.
    rest: Vector

    def largest(self, by: Vector, rise: float) -> Vector | None:
        """The largest of each row, if no other entry can have overtaken it while columns rose by at most ``rise``."""
        best = np.zeros(len(self.rest))
        best[self.rows] = np.maximum.reduceat(self.values * by[self.columns], self.starts)
        return best if (best >= self.rest * rise).all() else None


class Largest:
    """The largest entry of each row when columns are multiplied by factors that move less and less.

    Looking at all entries is what takes a sweep its time, yet few of them come near the largest. Once columns move slowly, those that do
    are kept as candidates, with room for what the columns may still move; all entries are looked at again when that is used up.
    """

    def __init__(self, entries: npt.NDArray[np.float64], scratch: npt.NDArray[np.float64]) -> None:
        #: ``(groups, rows, columns)``, and memory for products of that shape, shared by all layers.
        self.entries, self.scratch = entries, scratch
        self.candidates: Candidates | None = None
        #: The factors when all entries were last looked at, and how often they have moved since.
        self.seen: Vector | None = None
        self.moves = 0

    def __call__(self, by: Vector) -> Vector:
        """``(groups * rows,)`` for one factor a column, ``(groups * columns,)``."""
        groups, _, columns = self.entries.shape
        if columns == 1:
            only: Vector = (self.entries[:, :, 0] * by[:, None]).reshape(-1)
            return only
        room = np.inf
        if self.seen is not None:
            moved = by / self.seen
            rise, self.moves = moved.max(), self.moves + 1
            if self.candidates is not None and (best := self.candidates.largest(by, rise)) is not None:
                return best
            room = max((rise / moved.min()) ** (LASTING / self.moves), LEAST_ROOM)
        self.seen, self.moves = by, 0
        np.multiply(self.entries, by.reshape(groups, 1, columns), out=self.scratch)
        largest: Vector = self.scratch.max(axis=2)
        self.candidates = self._above(largest / room) if room < MOST_ROOM else None
        return largest.reshape(-1)

    def _above(self, rest: Vector) -> Candidates | None:
        """The entries whose products are above ``rest``, unless too many are."""
        rows, columns = self.entries.shape[1:]
        above = np.flatnonzero(np.greater(self.scratch, rest[:, :, None], order="C"))
        if len(above) > self.entries.size // 4:
            return None
        row, column = np.divmod(above, columns)
        group, place = np.divmod(row, rows)
        starts = np.flatnonzero(np.diff(row, prepend=-1))
        return Candidates(self.entries[group, place, column], group * columns + column, row[starts], starts, rest.reshape(-1))


@dataclass(frozen=True, eq=False)
class Layer:
    """A weighted op as the loop sees it: magnitudes, and the labels of the channels that it makes and reads.

    A value that a product makes is one, too, for rules that look at activations: without weights, by what it came to on the data.
    """

    op: Op
    #: Names of the values that it makes (several if the op is used several times).
    values: tuple[str, ...]
    #: Largest magnitude over the taps, ``(groups, out // groups, in // groups)``.
    magnitude: npt.NDArray[np.float64]
    made: Indices
    #: Zeros where the weights are not divided by the factors of what they read.
    read: Indices
    rows: Largest
    columns: Largest

    def made_range(self, f: Vector) -> Vector:
        """Largest weight magnitude of every output channel, ``(out,)``."""
        return self.rows(1 / f[self.read]) * f[self.made]

    def read_range(self, f: Vector) -> Vector:
        """Largest weight magnitude of every input channel, ``(in,)``."""
        return self.columns(f[self.made]) / f[self.read]


@dataclass(frozen=True, eq=False)
class Side:
    """One side of a layer, what it makes or what it reads, and where the free numbers of a block stand in it."""

    layer: Layer
    makes: bool
    #: Places of channels and of free numbers in the block, one pair for each time that a number stands in a channel's form.
    channels: Indices
    numbers: Indices
    #: The channels of this side in which none of the block's numbers stands.
    held: Indices
    #: Those that no factor moves: pinned, or dead; and those that other blocks move.
    fixed: Indices = field(default_factory=lambda: np.zeros(0, np.int64))
    rest: Indices = field(default_factory=lambda: np.zeros(0, np.int64))

    def ranges(self, f: Vector) -> Vector:
        """Largest weight magnitude of every channel."""
        return self.layer.made_range(f) if self.makes else self.layer.read_range(f)


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """The free numbers that a block holds, and the sides of layers whose ranges grow or shrink with them.

    A range grows with a number if it is that of weights that make a channel with ``c > 0`` in its form, or that read one with ``c < 0``.
    """

    labels: Indices
    growing: tuple[Side, ...]
    shrinking: tuple[Side, ...]
    #: Values that products make, as sides: for rules that look at activations.
    growing_values: tuple[Side, ...]
    shrinking_values: tuple[Side, ...]
    #: The labels beyond the free numbers that follow the block's.
    followers: Indices
    #: The most that a range moves if all numbers move by 1: of one side, and of the weights between two.
    of_side: int
    of_weights: int
    #: Which numbers have weights that grow and weights that shrink with them; the others are dead.
    live: npt.NDArray[np.bool_]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers whose ranges move with the block."""
        sides = (*self.growing, *self.shrinking, *self.growing_values, *self.shrinking_values)
        return tuple({id(side.layer): side.layer for side in sides}.values())

    def largest(self, sides: Sequence[Side], ranges: Sequence[Vector]) -> Vector:
        """The maximum of per-channel ranges over sides, for each number of the block."""
        result = np.zeros(len(self.labels))
        for side, of_side in zip(sides, ranges, strict=True):
            np.maximum.at(result, side.numbers, of_side[side.channels])
        return result


@dataclass(frozen=True, eq=False)
class Activation:
    """Ranges of what a layer makes, after and before its activation, from the statistics, ``(out,)``."""

    after: Vector
    before: Vector
    mates: float


def layers(graph: Graph, resolved: Channels, stats: Statistics | None = None) -> tuple[Layer, ...]:
    """The weighted ops of a network, each once, in dependency order.

    With statistics, a normalisation counts by the range of what it puts out: that is what lies on a grid, its weights do not.
    """
    uses: dict[int, list[str]] = {}
    for node in graph.nodes:
        if isinstance(node.op, Weighted):
            uses.setdefault(id(node.op), []).append(node.name)
    first = [graph[names[0]] for names in uses.values()]
    magnitudes = []
    for node, names in zip(first, uses.values(), strict=True):
        assert isinstance(node.op, Weighted)
        if stats is None or node.op.divides:
            magnitudes.append(np.abs(node.op.taps()).max(axis=3).astype(np.float64))
        else:
            magnitudes.append(np.maximum.reduce([stats[activation_of(graph, name)].max_abs for name in names]).reshape(-1, 1, 1))
    scratch = np.empty(max((m.size for m in magnitudes), default=0))
    result = []
    for node, names, magnitude in zip(first, uses.values(), magnitudes, strict=True):
        assert isinstance(node.op, Weighted)
        read = resolved.labels[node.inputs[0]]
        result.append(_layer(node.op, tuple(names), magnitude, resolved.labels[node.name],
                             read if node.op.divides else np.zeros_like(read), scratch))
    return tuple(result)


def product_values(graph: Graph, resolved: Channels, stats: Statistics) -> tuple[Layer, ...]:
    """The values that products make, as the sides of layers without weights."""
    found = []
    for name in dict.fromkeys(relation.node for relation in graph.traced.relations):
        magnitude = stats[activation_of(graph, name)].max_abs.astype(np.float64).reshape(-1, 1, 1)
        labels = resolved.labels[name]
        found.append(_layer(graph[name].op, (name,), magnitude, labels, np.zeros_like(labels), np.empty(magnitude.size)))
    return tuple(found)


def _layer(op: Op, names: tuple[str, ...], magnitude: Vector, made: Indices, read: Indices, scratch: Vector) -> Layer:
    products = scratch[:magnitude.size].reshape(magnitude.shape)
    return Layer(op, names, magnitude, made, read, Largest(magnitude, products), Largest(magnitude.swapaxes(1, 2), products.swapaxes(1, 2)))


def blocks(found: Sequence[Layer], resolved: Channels, values: Sequence[Layer] = ()) -> tuple[BlockPlan, ...]:
    """Group the free numbers: those in what one layer makes belong together, and so do layers that share one."""
    forms = resolved.forms
    block_of = np.full(forms.shape[1], -1)
    members: list[list[Layer]] = []
    for layer in found:
        free = _entries(forms, layer.made)[1]
        touched = sorted(set(block_of[free].tolist()) - {-1})
        target = touched[0] if touched else len(members)
        if not touched:
            members.append([])
        for other in touched[1:]:
            members[target] += members[other]
            members[other] = []
            block_of[block_of == other] = target
        members[target].append(layer)
        block_of[free] = target
    numbers = [np.flatnonzero(block_of == index) for index in range(len(members))]
    sides: list[dict[tuple[bool, bool], list[Side]]] = [{} for _ in members]
    reach = [dict[tuple[int, bool], int]() for _ in members]
    place = np.full(len(block_of), -1)
    for of_block in numbers:
        place[of_block] = np.arange(len(of_block))
    for layer, weighted in (*((layer, True) for layer in found), *((value, False) for value in values)):
        for makes, labels in ((True, layer.made), (False, layer.read)):
            channels, free, c = _entries(forms, labels)
            for index in sorted(set(block_of[free].tolist()) - {-1}):
                mine = block_of[free] == index
                held = np.setdiff1d(np.arange(len(labels)), channels[mine])
                for grows in (True, False):
                    chosen = mine & ((c > 0) == (makes == grows))
                    if chosen.any():
                        sides[index].setdefault((weighted, grows), []).append(
                            Side(layer, makes, channels[chosen], place[free[chosen]], held))
                reach[index][id(layer), makes] = int(np.bincount(channels[mine], np.abs(c[mine])).max())
    plans = []
    followers = _followers(resolved, block_of)
    for index, labels in enumerate(numbers):
        if len(labels):
            of_layer: dict[int, int] = {}
            for (layer_id, _), amount in reach[index].items():
                of_layer[layer_id] = of_layer.get(layer_id, 0) + amount

            def kind(weighted: bool, grows: bool, of: dict[tuple[bool, bool], list[Side]] = sides[index]) -> tuple[Side, ...]:
                return tuple(of.get((weighted, grows), ()))
            plan = BlockPlan(labels, kind(True, True), kind(True, False), kind(False, True), kind(False, False),
                             followers.get(index, np.zeros(0, np.int64)), max(reach[index].values()), max(of_layer.values()),
                             np.zeros(len(labels), bool))
            given = made_and_read(plan, np.ones(resolved.size))
            plans.append(replace(plan, live=(given.made > 0) & (given.read > 0)))
    moved = np.zeros(len(block_of), bool)
    for plan in plans:
        moved[plan.labels] = plan.live
    return tuple(replace(plan, growing=tuple(_with_fixed(side, forms, moved) for side in plan.growing),
                         shrinking=tuple(_with_fixed(side, forms, moved) for side in plan.shrinking)) for plan in plans)


def _with_fixed(side: Side, forms: csr_array, moved: npt.NDArray[np.bool_]) -> Side:
    labels = side.layer.made if side.makes else side.layer.read
    channels, free, _ = _entries(forms, labels)
    moving = channels[moved[free]]
    return replace(side, fixed=np.setdiff1d(np.arange(len(labels)), moving), rest=np.setdiff1d(moving, side.channels))


def _entries(forms: csr_array, labels: Indices) -> tuple[Indices, Indices, Vector]:
    """Where free numbers stand in the forms of these channels: places of channels, the numbers, and their coefficients."""
    counts = np.diff(forms.indptr)[labels]
    channels = np.repeat(np.arange(len(labels)), counts)
    at = np.repeat(forms.indptr[:-1][labels] - np.cumsum(counts) + counts, counts) + np.arange(len(channels))
    free = forms.indices[at].astype(np.int64)
    live = free > 0
    return channels[live], free[live], forms.data[at][live]


def _followers(resolved: Channels, block_of: Indices) -> dict[int, Indices]:
    """For every block the labels beyond the free numbers in whose forms its numbers stand."""
    if resolved.compound is None:
        return {}
    rows = resolved.degrees_of_freedom + 1 + np.repeat(np.arange(resolved.compound.shape[0]), np.diff(resolved.compound.indptr))
    of_entry = block_of[resolved.compound.indices]
    return {int(index): np.unique(rows[of_entry == index]) for index in np.unique(of_entry)}


def activation_of(graph: Graph, value: str) -> str:
    """The value after the activations that directly follow: what an integer engine stores for this layer.

    Activations are followed while each value has exactly one reader and is not an output.
    """
    readers = graph.readers
    while value not in graph.outputs and (reader := fused_activation(readers[value])) is not None:
        value = reader.name
    return value


def activation_ranges(graph: Graph, found: Sequence[Layer], stats: Statistics) -> dict[int, Activation]:
    """A, P and the concat mates' A of every layer (PAPER 2 and 4)."""
    largest = {}
    for layer in found:
        after = np.maximum.reduce([stats[activation_of(graph, v)].max_abs for v in layer.values])
        before = np.maximum.reduce([np.maximum(-stats[v].min, 0) for v in layer.values])
        largest[id(layer.op)] = Activation(after, before, 0.0)
    for node in graph.nodes:
        if isinstance(node.op, Concat):
            inside = set(channel_vector(graph.labels[node.name]).tolist())
            mates = [layer for layer in found if any(inside & set(channel_vector(graph.labels[v]).tolist()) for v in layer.values)]
            top = max((float(largest[id(m.op)].after.max()) for m in mates), default=0.0)
            for mate in mates:
                old = largest[id(mate.op)]
                largest[id(mate.op)] = replace(old, mates=max(old.mates, top))
    return largest


def neighbours(plans: Sequence[BlockPlan]) -> list[set[int]]:
    """Which blocks share a layer with each block, so that a move of the one may move the other."""
    users: dict[int, set[int]] = {}
    for index, plan in enumerate(plans):
        for layer in plan.layers:
            users.setdefault(id(layer), set()).add(index)
    return [set().union(*(users[id(layer)] for layer in plan.layers)) - (set() if plan.of_weights > 1 else {index})
            for index, plan in enumerate(plans)]


def made_and_read(plan: BlockPlan, f: Vector) -> Block:
    """What grows and what shrinks with every number of a block, with the factors chosen so far: all that ``cross_layer`` asks for."""
    growing, shrinking = [side.ranges(f) for side in plan.growing], [side.ranges(f) for side in plan.shrinking]
    return Block((), plan.largest(plan.growing, growing), plan.largest(plan.shrinking, shrinking),
                 made_anchors=_anchors(plan.growing, growing), read_anchors=_anchors(plan.shrinking, shrinking))


def bias_bounds(found: Sequence[Layer], resolved: Channels, f: Vector, most: float) -> Vector:
    """By free number the largest factors at which no bias exceeds ``most`` times the largest of its layer, times the layer's median factor.

    For numbers that are a channel's label by themselves; infinite where no bias says anything.
    """
    bounds = np.full(resolved.degrees_of_freedom + 1, np.inf)
    for layer in found:
        bias = layer.op.bias if isinstance(layer.op, Weighted) else None
        own = (layer.made > 0) & (layer.made <= resolved.degrees_of_freedom)
        if bias is None or not own.any() or not bias.any():
            continue
        sizes = np.abs(bias.astype(np.float64)) / np.abs(bias).max()
        level = most * float(np.median(f[layer.made[own]]))
        with np.errstate(over="ignore"):  # of next to no bias
            limits = np.divide(level, sizes, out=np.full(len(sizes), np.inf), where=sizes > 0)
        np.minimum.at(bounds, layer.made[own], limits[own])
    return bounds


def _anchors(sides: Sequence[Side], ranges: Sequence[Vector]) -> tuple[Anchor, ...]:
    """The sides that hold ranges which no factor moves."""
    return tuple(Anchor(side.numbers, of_side[side.channels], float(of_side[side.fixed].max()), float(of_side[side.rest].max(initial=0.0)))
                 for side, of_side in zip(sides, ranges, strict=True) if len(side.fixed))


def block_ranges(plan: BlockPlan, f: Vector, activations: dict[int, Activation], preactivation: bool) -> Block:
    """Everything about a block that a rule may ask for, with the factors chosen so far."""
    growing, shrinking = [side.ranges(f) for side in plan.growing], [side.ranges(f) for side in plan.shrinking]
    makers, limits = list[Maker](), list[Maker]()
    for side, kernel in zip(plan.growing, growing, strict=True):
        maker = Maker(side.numbers, kernel[side.channels], held_kernel=float(kernel[side.held].max(initial=0.0)))
        if not side.makes:
            limits.append(replace(maker, activation=maker.kernel, held_activation=maker.held_kernel))
            continue
        if (seen := activations.get(id(side.layer.op))) is not None:
            # the statistics were taken once; the factors chosen so far scale what this layer puts out
            after = seen.after * f[side.layer.made]
            maker = replace(maker, activation=after[side.channels], held_activation=float(after[side.held].max(initial=0.0)),
                            mates_activation=seen.mates,
                            preactivation=(seen.before * f[side.layer.made])[side.channels] if preactivation else None)
        makers.append(maker)
    for side in plan.growing_values:
        after = side.ranges(f)
        held = float(after[side.held].max(initial=0.0))
        limits.append(Maker(side.numbers, after[side.channels], after[side.channels], held_kernel=held, held_activation=held))
    sides, ranges = [*plan.shrinking, *plan.shrinking_values], [*shrinking, *(side.ranges(f) for side in plan.shrinking_values)]
    for side in plan.shrinking:
        if side.makes and (seen := activations.get(id(side.layer.op))) is not None:
            sides, ranges = [*sides, side], [*ranges, seen.after * f[side.layer.made]]
    consumed = plan.largest(sides, [of_side / (of_side.max() or 1.0) for of_side in ranges])
    return Block(tuple(makers), plan.largest(plan.growing, growing), plan.largest(plan.shrinking, shrinking), consumed,
                 tuple(limits))
