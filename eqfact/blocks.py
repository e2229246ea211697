"""Which channels are made together, by which layers, and how do the weights range that make and read them?

A *block* is what a rule sees: the free channels that one weighted op makes, with those of every op that shares a label with it
(PAPER 4: residual partners). The weights stay as they are while factors are chosen: ranges are read off ``|W| f_out / f_in``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from eqfact.calibration import Statistics
from eqfact.channels import Channels
from eqfact.graph import Graph
from eqfact.ops.base import Weighted, channel_vector
from eqfact.ops.joining import Concat
from eqfact.quantization import fused_activation
from eqfact.rules import Block, Maker, Vector

Indices = npt.NDArray[np.int64]


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
    #: Memory for products, shared by all layers: a sweep allocates nothing.
    scratch: npt.NDArray[np.float64]

    def made_range(self, f: Vector) -> Vector:
        """Largest weight magnitude of every output channel, ``(out,)``."""
        groups, _, inner = self.magnitude.shape
        np.multiply(self.magnitude, (1 / f[self.read]).reshape(groups, 1, inner), out=self.scratch)
        largest: Vector = self.scratch.max(axis=2).reshape(-1) * f[self.made]
        return largest

    def read_range(self, f: Vector) -> Vector:
        """Largest weight magnitude of every input channel, ``(in,)``."""
        groups, out, _ = self.magnitude.shape
        np.multiply(self.magnitude, f[self.made].reshape(groups, out, 1), out=self.scratch)
        largest: Vector = self.scratch.max(axis=1).reshape(-1) / f[self.read]
        return largest


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """Which labels a block holds, which layers make and read them, and whether a layer does both."""

    labels: Indices
    makers: tuple[Layer, ...]
    readers: tuple[Layer, ...]
    #: The label's place in ``labels``, or ``len(labels)`` for labels of other blocks.
    place: Indices
    reads_itself: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads_itself", bool(set(map(id, self.makers)) & set(map(id, self.readers))))

    def largest(self, layers: Iterable[Layer], labels: Callable[[Layer], Indices], ranges: Callable[[Layer], Vector]) -> Vector:
        """The maximum of per-channel ranges over layers, for each label of the block."""
        result = np.zeros(len(self.labels) + 1)
        for layer in layers:
            np.maximum.at(result, self.place[labels(layer)], ranges(layer))
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
    return tuple(Layer(node.op, tuple(names), magnitude, resolved.labels[node.name], resolved.labels[node.inputs[0]],
                       scratch[:magnitude.size].reshape(magnitude.shape))
                 for node, names, magnitude in zip(first, uses.values(), magnitudes, strict=True) if isinstance(node.op, Weighted))


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
    plans = []
    for index, makers in enumerate(members):
        labels = np.flatnonzero(block_of == index)
        if len(labels):
            place = np.full(len(block_of), len(labels))
            place[labels] = np.arange(len(labels))
            readers = tuple(layer for layer in found if (place[layer.read] < len(labels)).any())
            plans.append(BlockPlan(labels, tuple(makers), readers, place))
    return tuple(plans)


def activation_of(graph: Graph, value: str) -> str:
    """The value after the activations that directly follow: what an integer engine stores for this layer.

    Activations are followed while each value has exactly one reader and is not an output.
    """
    readers = graph.readers
    while value not in graph.outputs and (reader := fused_activation(readers[value])) is not None:
        value = reader.name
    return value


def check_statistics(graph: Graph, stats: Statistics) -> None:
    """An error if the statistics are not of this graph, or not finite."""
    missing = sorted(set(graph.shapes) - set(stats))
    if missing:
        raise ValueError(f"the statistics lack value '{missing[0]}': calibrate this graph, after folding")
    for name, shape in graph.shapes.items():
        if stats[name].max.shape != shape[:1]:
            raise ValueError(f"the statistics of value '{name}' have {stats[name].max.size} channels, the network has {shape[0]}")
        if not (np.isfinite(stats[name].min).all() and np.isfinite(stats[name].max).all()):
            raise ValueError(f"the statistics of value '{name}' hold NaN or infinity")


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


def block_ranges(plan: BlockPlan, f: Vector, activations: dict[int, Activation], preactivation: bool) -> Block:
    """The ranges of a block with the factors chosen so far."""
    made_of = {id(layer): layer.made_range(f) for layer in plan.makers}
    read_of = {id(layer): layer.read_range(f) for layer in plan.readers}
    makers = []
    for layer in plan.makers:
        place = plan.place[layer.made]
        mine = place < len(plan.labels)
        kernel = made_of[id(layer)]
        maker = Maker(place[mine], kernel[mine], held_kernel=float(kernel[~mine].max(initial=0.0)))
        if (seen := activations.get(id(layer.op))) is not None:
            # the statistics were taken once; the factors chosen so far scale what this layer puts out
            after = seen.after * f[layer.made]
            maker = replace(maker, activation=after[mine], held_activation=float(after[~mine].max(initial=0.0)),
                            mates_activation=seen.mates, preactivation=(seen.before * f[layer.made])[mine] if preactivation else None)
        makers.append(maker)
    return Block(
        tuple(makers),
        made=plan.largest(plan.makers, lambda layer: layer.made, lambda layer: made_of[id(layer)]),
        read=plan.largest(plan.readers, lambda layer: layer.read, lambda layer: read_of[id(layer)]),
        consumed=plan.largest(plan.readers, lambda layer: layer.read,
                              lambda layer: read_of[id(layer)] / (read_of[id(layer)].max() or 1.0)),
    )
