"""Which channels are made together, by which layers, and how do the weights range that make and read them?

A *block* is what a rule sees: the free channels that one weighted op makes, with those of every op that shares a label with it
(PAPER 4: residual partners). The weights stay as they are while factors are chosen: ranges are read off ``|W| f_out / f_in``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from eqfact.calibration import Statistics, check_statistics
from eqfact.channels import Channels
from eqfact.graph import Graph
from eqfact.ops.base import Weighted, channel_vector
from eqfact.ops.joining import Concat
from eqfact.quantization import fused_activation
from eqfact.rules import Block, Maker, Vector

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
    """A weighted op as the loop sees it: magnitudes, and the labels of the channels that it makes and reads."""

    op: Weighted
    #: Names of the values that it makes (several if the op is used several times).
    values: tuple[str, ...]
    #: Largest magnitude over the taps, ``(groups, out // groups, in // groups)``.
    magnitude: npt.NDArray[np.float64]
    made: Indices
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
class BlockPlan:
    """Which labels a block holds, which layers make and read them, and whether a layer does both."""

    labels: Indices
    makers: tuple[Layer, ...]
    readers: tuple[Layer, ...]
    #: For every channel that each maker makes, its place in ``labels``, or ``len(labels)`` if it belongs to another block.
    made_at: tuple[Indices, ...]
    #: The same for every channel that each reader reads.
    read_at: tuple[Indices, ...]
    reads_itself: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads_itself", bool(set(map(id, self.makers)) & set(map(id, self.readers))))

    def largest(self, places: Sequence[Indices], ranges: Sequence[Vector]) -> Vector:
        """The maximum of per-channel ranges over layers, for each label of the block."""
        result = np.zeros(len(self.labels) + 1)
        for place, of_layer in zip(places, ranges, strict=True):
            np.maximum.at(result, place, of_layer)
        return result[:-1]


@dataclass(frozen=True, eq=False)
class Activation:
    """Ranges of what a layer makes, after and before its activation, from the statistics, ``(out,)``."""

    after: Vector
    before: Vector
    mates: float


def layers(graph: Graph, resolved: Channels) -> tuple[Layer, ...]:
    """The weighted ops of a network, each once, in dependency order."""
    uses: dict[int, list[str]] = {}
    for node in graph.nodes:
        if isinstance(node.op, Weighted):
            uses.setdefault(id(node.op), []).append(node.name)
    first = [graph[names[0]] for names in uses.values()]
    magnitudes = [np.abs(node.op.taps()).max(axis=3).astype(np.float64) for node in first if isinstance(node.op, Weighted)]
    scratch = np.empty(max((m.size for m in magnitudes), default=0))
    result = []
    for node, names, magnitude in zip(first, uses.values(), magnitudes, strict=True):
        assert isinstance(node.op, Weighted)
        products = scratch[:magnitude.size].reshape(magnitude.shape)
        result.append(Layer(node.op, tuple(names), magnitude, resolved.labels[node.name], resolved.labels[node.inputs[0]],
                            Largest(magnitude, products), Largest(magnitude.swapaxes(1, 2), products.swapaxes(1, 2))))
    return tuple(result)


def blocks(found: Sequence[Layer], resolved: Channels) -> tuple[BlockPlan, ...]:
    """Group the free labels: what one layer makes belongs together, and so do layers that share a label."""
    block_of = np.full(resolved.degrees_of_freedom + 1, -1)
    members: list[list[Layer]] = []
    for layer in found:
        free = layer.made[layer.made > 0]
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
    readers: list[list[Layer]] = [[] for _ in members]
    for layer in found:
        for index in sorted(set(block_of[layer.read].tolist()) - {-1}):
            readers[index].append(layer)
    plans = []
    for index, makers in enumerate(members):
        labels = np.flatnonzero(block_of == index)
        if len(labels):
            place = np.full(len(block_of), len(labels))
            place[labels] = np.arange(len(labels))
            plans.append(BlockPlan(labels, tuple(makers), tuple(readers[index]), tuple(place[layer.made] for layer in makers),
                                   tuple(place[layer.read] for layer in readers[index])))
    return tuple(plans)


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
    check_statistics(graph, stats)
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
        for layer in (*plan.makers, *plan.readers):
            users.setdefault(id(layer), set()).add(index)
    return [set().union(*(users[id(layer)] for layer in (*plan.makers, *plan.readers))) - (set() if plan.reads_itself else {index})
            for index, plan in enumerate(plans)]


def made_and_read(plan: BlockPlan, f: Vector) -> Block:
    """The two ranges of every channel of a block with the factors chosen so far: all that ``cross_layer`` asks for."""
    return Block((), plan.largest(plan.made_at, [layer.made_range(f) for layer in plan.makers]),
                 plan.largest(plan.read_at, [layer.read_range(f) for layer in plan.readers]))


def block_ranges(plan: BlockPlan, f: Vector, activations: dict[int, Activation], preactivation: bool) -> Block:
    """Everything about a block that a rule may ask for, with the factors chosen so far."""
    kernels, columns = [layer.made_range(f) for layer in plan.makers], [layer.read_range(f) for layer in plan.readers]
    makers = []
    for layer, place, kernel in zip(plan.makers, plan.made_at, kernels, strict=True):
        mine = place < len(plan.labels)
        maker = Maker(place[mine], kernel[mine], held_kernel=float(kernel[~mine].max(initial=0.0)))
        if (seen := activations.get(id(layer.op))) is not None:
            # the statistics were taken once; the factors chosen so far scale what this layer puts out
            after = seen.after * f[layer.made]
            maker = replace(maker, activation=after[mine], held_activation=float(after[~mine].max(initial=0.0)),
                            mates_activation=seen.mates, preactivation=(seen.before * f[layer.made])[mine] if preactivation else None)
        makers.append(maker)
    consumed = plan.largest(plan.read_at, [column / (column.max() or 1.0) for column in columns])
    return Block(tuple(makers), plan.largest(plan.made_at, kernels), plan.largest(plan.read_at, columns), consumed)
