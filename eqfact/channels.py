"""Which channels of which values must share one factor, and which must keep the factor 1?

The walk of :class:`eqfact.Graph` gives every channel a label and collects ties and pins; here the ties are resolved
(connected components). Label 0 means pinned, labels 1, 2, ... are free: their number is the network's *degrees of
freedom*. Section 1 of the paper, for any topology: residuals, concats, fan-out and shared weights are no special cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from eqfact.graph import Graph
from eqfact.ops.base import Labels, channel_vector


@dataclass(frozen=True, eq=False)
class Channels:
    """The resolved labels of a network.

    ``labels[value]`` is ``(C,)``: 0 where pinned, else the number of the free factor that the channel carries.
    ``reasons[value]`` gives for each channel why it is pinned, or None; ``pinned`` sums that up for every value that
    has a pinned channel.
    """

    labels: Mapping[str, Labels]
    degrees_of_freedom: int
    reasons: Mapping[str, tuple[str | None, ...]]

    @property
    def pinned(self) -> dict[str, str]:
        """Why channels of a value keep the factor 1, for every value with such a channel."""
        found = {}
        for value, reasons in self.reasons.items():
            distinct = dict.fromkeys(r for r in reasons if r is not None)
            if distinct:
                held = sum(r is not None for r in reasons)
                some = "" if held == len(reasons) else f"{held} of {len(reasons)} channels: "
                found[value] = some + "; ".join(distinct)
        return found


def channels(graph: Graph, *, hold: Mapping[str, str] | None = None) -> Channels:
    """Resolve the channel labels of a network; ``hold`` pins further values, each with its reason.

    >>> net = Graph.chain((1,), fc1=Dense(np.ones((3, 1))), act=ReLU(), fc2=Dense(np.ones((1, 3))))
    >>> channels(net).labels["act"].tolist(), channels(net).labels["x"].tolist()
    ([1, 2, 3], [0])
    """
    traced = graph.traced
    pins = [*traced.pins]
    for value, reason in (hold or {}).items():
        if value not in graph.labels:
            raise ValueError(f"'{value}' is to be held, but is not a value of the network")
        pins.append((channel_vector(graph.labels[value]), reason))
    component = _components(traced.size, traced.ties)
    count = int(component.max()) + 1

    # the first pin of a component gives its reason
    reason_of = np.full(count, -1)
    for index in range(len(pins) - 1, -1, -1):
        reason_of[component[pins[index][0]]] = index
    free = reason_of < 0
    resolved = np.where(free, np.cumsum(free), 0)

    texts = np.array([*(reason for _, reason in pins), None], object)  # the last, which -1 finds: no reason
    labels, reasons = {}, {}
    for value, full in graph.labels.items():
        of_channel = component[channel_vector(full)]
        labels[value] = resolved[of_channel]
        labels[value].flags.writeable = False
        reasons[value] = tuple(texts[reason_of[of_channel]].tolist())
    return Channels(labels, int(free.sum()), reasons)


def degrees_of_freedom(graph: Graph) -> int:
    """How many factors may be chosen freely without changing the function.

    >>> degrees_of_freedom(Graph.chain((1,), fc1=Dense(np.ones((3, 1))), act=ReLU(), fc2=Dense(np.ones((1, 3)))))
    3
    """
    return channels(graph).degrees_of_freedom


def _components(size: int, ties: list[tuple[Labels, Labels]]) -> Labels:
    """Number of the connected component of every label, in the order in which labels were given out."""
    if not ties:
        return np.arange(size)
    a, b = (np.concatenate(side) for side in zip(*ties, strict=True))
    _, component = connected_components(coo_array((np.ones(len(a), np.int8), (a, b)), shape=(size, size)), directed=False)
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    order = np.empty_like(first)
    order[np.argsort(first)] = np.arange(len(first))
    return order[inverse].astype(np.int64)
