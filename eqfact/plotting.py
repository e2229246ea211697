"""What does equalization look like? The range of every channel of every weight tensor, before and after.

A channel at ``2**-k`` of its tensor's range has lost ``k`` of the bits (section 1 of the paper). Needs matplotlib (the extra
``plot``), which is imported only when a figure is drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from eqfact.graph import Graph
from eqfact.report import Ranges, weight_ranges

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Channels below this share of their tensor's range are drawn at it: even 16 bits do not see them.
FLOOR = 2.0**-16
BEFORE, AFTER = "#c44e52", "#2b6ca3"


def plot_ranges(before: Graph, after: Graph, path: str, *, title: str = "") -> None:
    """Draw the channel ranges of two equivalent networks, relative to their tensors' ranges, into an image file.

    The channels of a tensor stand side by side, sorted. Raises :class:`ValueError` without matplotlib, for a suffix that
    it does not know, and for networks with no or with different weight tensors.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a figure needs matplotlib: pip install 'eqfact[plot]'") from None
    first, second = weight_ranges(before), weight_ranges(after)
    if not first or {n: len(r) for n, r in first.items()} != {n: len(r) for n, r in second.items()}:
        raise ValueError("a figure of ranges needs two networks with the same weight tensors, at least one")
    figure = Figure(figsize=(min(max(7.0, 0.55 * len(first)), 24.0), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw(axes, first, BEFORE, "before")
    _draw(axes, second, AFTER, "after")
    _label(axes, list(first), title)
    figure.savefig(path, dpi=140)


def _draw(axes: Axes, ranges: dict[str, Ranges], color: str, label: str) -> None:
    for slot, of in enumerate(ranges.values()):
        share = np.sort(np.maximum(of / (of.max() or 1.0), FLOOR))
        x = slot + 0.4 * np.linspace(-1, 1, len(share) + 2)[1:-1]
        axes.plot(x, share, ".", color=color, markersize=4, alpha=0.7, markeredgewidth=0, label=label if slot == 0 else None)
        axes.hlines(float(np.median(share)), slot - 0.4, slot + 0.4, color=color, linewidth=1.2)


def _label(axes: Axes, names: list[str], title: str) -> None:
    axes.set_yscale("log", base=2)
    axes.set_ylim(FLOOR / 1.5, 1.5)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    for edge in range(1, len(names)):
        axes.axvline(edge - 0.5, color="0.9", linewidth=0.8, zorder=0)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_ylabel("channel range / tensor range\n(each halving costs a channel one bit)")
    axes.set_xlabel("weights of layer, channels sorted (dead ones at the bottom); lines are medians")
    if title:
        axes.set_title(title, fontsize=11)
    axes.legend(loc="lower right", markerscale=4, framealpha=0.95)
