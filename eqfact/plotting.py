"""What does equalization look like? Ranges of channels, noise of tensors, weights on their grid, the way to the optimum.

A channel at ``2**-k`` of its tensor's range has lost ``k`` of the bits (section 1 of the paper); what that costs is the noise of
:mod:`eqfact.noise`. Every function returns a matplotlib ``Figure``, which notebooks show, and writes it if given a ``path``. Needs
matplotlib (the extra ``plot``), which is imported only when a figure is drawn; none of pyplot's state is touched.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from eqfact.equalization import EqualizeResult
from eqfact.graph import Graph
from eqfact.ops import Weighted
from eqfact.ops.grid import Grid
from eqfact.optimal import decibels_above
from eqfact.quantization import weight_names
from eqfact.report import TensorNoise, weight_ranges

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Channels below this share of their tensor's range are drawn at it: even 16 bits do not see them.
FLOOR = 2.0**-16
#: Tensors by so many dB below the noisiest are drawn there: together they add nothing.
FLOOR_DB = 80.0
#: Factors that move by less stand still, but for rounding.
STILL = 2.0**-52
BEFORE, AFTER = "#c44e52", "#2b6ca3"
#: The most tensors with a name of their own beside each other.
MOST = 30


def plot_ranges(before: Graph, after: Graph, path: str | None = None, *, title: str = "") -> Figure:
    """The range of every channel of every weight tensor of two equivalent networks, relative to the tensors' ranges.

    The channels of a tensor stand side by side, sorted. Raises :class:`ValueError` without matplotlib, for a suffix that
    it does not know, and for networks with no or with different weight tensors.

    >>> net = Graph.chain((1,), fc1=eq.Dense(np.array([[4.0], [1.0]])), act=eq.ReLU(), fc2=eq.Dense(np.array([[1.0, 4.0]])))
    >>> figure = plot_ranges(net, eq.equalize(net).graph)
    """
    first, second = weight_ranges(before), weight_ranges(after)
    if not first or {n: len(r) for n, r in first.items()} != {n: len(r) for n, r in second.items()}:
        raise ValueError("a figure of ranges needs two networks with the same weight tensors, at least one")
    figure, (axes,) = _figure(_width(len(first)), 4.8)
    for ranges, color, label in ((first, BEFORE, "before"), (second, AFTER, "after")):
        for slot, of in enumerate(ranges.values()):
            share = np.sort(np.maximum(of / (of.max() or 1.0), FLOOR))
            x = slot + 0.4 * np.linspace(-1, 1, len(share) + 2)[1:-1]
            axes.plot(x, share, ".", color=color, markersize=4, alpha=0.7, markeredgewidth=0, label=label if slot == 0 else None)
            axes.hlines(float(np.median(share)), slot - 0.4, slot + 0.4, color=color, linewidth=1.2)
    axes.set_yscale("log", base=2)
    axes.set_ylim(FLOOR / 1.5, 1.5)
    _name_slots(axes, list(first))
    axes.set_ylabel("channel range / tensor range\n(each halving costs a channel one bit)")
    axes.set_xlabel("weights of layer, channels sorted (dead ones at the bottom); lines are medians")
    axes.legend(loc="lower right", markerscale=4, framealpha=0.95)
    return _finished(figure, path, title)


def plot_noise(before: Mapping[str, float], after: Mapping[str, float] | None = None, path: str | None = None, *, most: int = MOST,
               title: str = "") -> Figure:
    """The expected noise of every tensor at the output, before and after, with lines at the sums.

    ``before`` and ``after`` are what :func:`eqfact.predict_noise` gives, in dB of the output's power by tensor;
    ``plot_noise(*result.noise)`` draws those of an equalization. Of more than ``most`` tensors those with the most noise are drawn (before
    or after), in the order of the network; the title says so. Raises :class:`ValueError` for no or for different tensors, and as
    :func:`plot_ranges` does.

    >>> figure = plot_noise({"fc1.weight": -30.0, "act": -48.0}, {"fc1.weight": -41.0, "act": -47.0})
    """
    if not before or (after is not None and set(after) != set(before)):
        raise ValueError("a figure of noise needs the same tensors before and after, at least one, got "
                         f"{len(before)} and {'none' if after is None else len(after)}: predict both with the same quantizers")
    sides = [(before, AFTER, "each tensor")] if after is None else [(before, BEFORE, "before"), (after, AFTER, "after")]
    largest = {name: max(of[name] for of, *_ in sides) for name in before}
    names = _noisiest(largest, most)
    figure, (axes,) = _figure(_width(len(names)), 4.8)
    top = max(largest.values())
    drawn = [[max(of[name], top - FLOOR_DB) for name in names] for of, *_ in sides]
    bottom = np.min(drawn) - 0.05 * (top - np.min(drawn)) - 1
    width = 0.8 / len(sides)
    for side, (of, color, label) in enumerate(sides):
        x = np.arange(len(names)) + (side - (len(sides) - 1) / 2) * width
        total = 10 * np.log10(sum(10 ** (noise / 10) for noise in of.values()))
        whole = f"sum{'' if after is None else ' ' + label}: {total:.1f} dB"
        axes.bar(x, np.array(drawn[side]) - bottom, width, bottom=bottom, color=color, label=label)
        axes.axhline(total, color=color, linewidth=1.2, linestyle="--", label=whole)
    axes.set_ylim(bottom, None)
    _name_slots(axes, names)
    axes.set_ylabel("expected noise, dB of the output's power\n(6 dB are one bit)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    chosen = "" if len(names) == len(before) else f"the {len(names)} of {len(before)} tensors with the most noise"
    return _finished(figure, path, title, chosen)


def plot_predicted(rows: Sequence[TensorNoise], path: str | None = None, *, title: str = "") -> Figure:
    """The noise of each tensor alone: expected across, measured upwards, and the line on which both are equal.

    ``rows`` are what :func:`eqfact.report.noise_report` measures. Tensors that make no noise have no place in decibels and are counted
    in the title. Raises :class:`ValueError` if none is left, and as :func:`plot_ranges` does.

    >>> figure = plot_predicted([eq.report.TensorNoise("fc.weight", "weight", -40.0, -41.5)])
    """
    found = [row for row in rows if np.isfinite([row.predicted, row.measured]).all()]
    if not found:
        raise ValueError(f"a figure of predicted noise needs a tensor that makes noise, got {len(rows)} that make none: give fewer bits")
    figure, (axes,) = _figure(5.2, 4.8)
    both = np.array([(row.predicted, row.measured) for row in found])
    low, high = both.min() - 2, both.max() + 2
    axes.plot([low, high], [low, high], color="0.6", linewidth=1.0, zorder=1, label="equal")
    for kind, color, label in (("weight", BEFORE, "weights"), ("value", AFTER, "activations")):
        if points := [(row.predicted, row.measured) for row in found if row.kind == kind]:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=22, color=color, alpha=0.8, linewidths=0, zorder=2, label=label)
    worst = found[int(np.argmax(np.abs(both[:, 1] - both[:, 0])))]
    axes.annotate(f"farthest off: {worst.name}, {worst.measured - worst.predicted:+.1f} dB", (worst.predicted, worst.measured), fontsize=8,
                  color="0.3", xytext=(0.98, 0.03), textcoords="axes fraction", ha="right",
                  arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.8, "shrinkB": 4})
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set_xlabel("expected noise, dB of the output's power")
    axes.set_ylabel("measured noise, dB of the output's power")
    axes.legend(loc="upper left")
    off = float(np.abs(both[:, 1] - both[:, 0]).mean())
    silent = f"; {len(rows) - len(found)} make none" if len(found) < len(rows) else ""
    return _finished(figure, path, title, f"each of {len(found)} tensors alone on its grid: off by {off:.1f} dB on average{silent}")


def plot_weights(quantized: Graph, after: Graph | None = None, path: str | None = None, *, names: Sequence[str] | None = None,
                 noise: Mapping[str, float] | None = None, most: int = 6, title: str = "") -> Figure:
    """How many weights of a layer lie on each level of its grid, of a quantized network, or of two before and ``after`` equalization.

    A bar stands on every number that is used, ``weight / scale``: whole steps from zero. Across is all of the grid; of two networks, one
    stands left and one right. ``names`` are those of nodes; without them the
    ``most`` layers of most expected noise are drawn (``noise``, as :func:`eqfact.predict_noise` gives it, before), or without that those
    that use the smallest part of their grid; the title says which. Layers that share weights count once. Raises :class:`ValueError` for
    unknown names, networks without weights on grids or with different ones, and as :func:`plot_ranges` does.

    >>> net = Graph.chain((1,), fc=eq.Dense(np.array([[1.0], [0.3], [-0.2]])))
    >>> figure = plot_weights(eq.quantize(net, weights=eq.UniformQuantizer(bits=4)))
    """
    layers, others = _on_grids(quantized), {} if after is None else _on_grids(after)
    if not layers or (after is not None and list(others) != list(layers)):
        raise ValueError("a figure of weights on their grid needs networks with the same quantized layers, at least one, got "
                         f"{len(layers)} and {'none' if after is None else len(others)}: give what eqfact.quantize(weights=...) returns")
    tensors = weight_names(quantized)
    if names is not None:
        unknown = [name for name in names if name not in layers]
        if unknown or not names:
            raise ValueError(f"node '{', '.join(unknown)}' has no weights on a grid: give some of {', '.join(layers)}")
        chosen, why = list(names), ""
    elif noise is not None:
        of = {name: noise.get(tensors[id(quantized[name].op)], -np.inf) for name in layers}
        chosen, why = _noisiest(of, most), "of most expected noise"
    else:
        used = {name: -len(np.unique(levels)) / _size(grid) for name, (levels, grid) in layers.items()}
        chosen, why = _noisiest(used, most), "that use the smallest part of their grid"
    sides = [(layers, AFTER, "")] if after is None else [(layers, BEFORE, "before: "), (others, AFTER, "after: ")]
    shown = [(name, *side) for name in chosen for side in sides]
    columns = min(len(shown), 2)
    figure, panels = _figure(5.0 * columns, 1.8 * -(-len(shown) // columns) + 0.8, len(shown), columns)
    for axes, (name, by_layer, color, label) in zip(panels, shown, strict=True):
        levels, grid = by_layer[name]
        at, counts = np.unique(levels, return_counts=True)
        axes.bar(at, counts, 0.9, color=color, linewidth=0)
        axes.set_title(f"{name}, {label}{len(at)} of {_size(grid)} levels", fontsize=9, loc="left")
        axes.set_xlim(float((grid.qmin - grid.zero_point).min()) - 1, float((grid.qmax - grid.zero_point).max()) + 1)
        axes.set_yscale("log")
        top = max(np.unique(of[name][0], return_counts=True)[1].max() for of, *_ in sides)
        axes.set_ylim(0.7, max(2 * top, 20))
    for axes in panels[-columns:]:
        axes.set_xlabel("steps from zero (weight / scale)")
    for axes in panels[::columns]:
        axes.set_ylabel("weights")
    partly = why and len(chosen) < len(layers)
    return _finished(figure, path, title, f"the {len(chosen)} of {len(layers)} layers {why}" if partly else "")


def plot_convergence(result: EqualizeResult, path: str | None = None, *, title: str = "") -> Figure:
    """How a method came to its end: for ``"optimal"`` the objective and the bound that was certified, for sweeps how far factors moved.

    Both curves of the optimum are in dB above the last bound, below which no factors can come, so that the distance at the end is
    ``result.gap_db`` (a diamond: what was returned, which powers of two may move away from the line). Sweeps show the largest
    ``|log f|`` that moved, ``result.residual``; after a jump back up they went on within narrower bounds. Raises :class:`ValueError`
    for a method of one pass, and as :func:`plot_ranges` does.

    >>> net = Graph.chain((1,), fc1=eq.Dense(np.array([[4.0], [1.0]])), act=eq.ReLU(), fc2=eq.Dense(np.array([[1.0, 4.0]])))
    >>> figure = plot_convergence(eq.equalize(net, data=np.array([[1.0]])))
    """
    if len(result.history or result.residual) < 2:
        raise ValueError(f"a figure of convergence needs a method of several steps, not one that ends at once ({result.message}): take "
                         "'optimal' or 'cross_layer'")
    figure, (axes,) = _figure(7.0, 4.0)
    if result.history:
        lowest = result.history[-1].bound or result.history[-1].objective  # where clips move there is no bound
        axes.plot([of.iterations for of in result.history], [decibels_above(lowest, of.objective) for of in result.history], ".-",
                  color=AFTER, markersize=8, label="reached")
        if certified := [(of.iterations, decibels_above(lowest, of.bound)) for of in result.history if of.bound > 0]:
            axes.plot(*zip(*certified, strict=True), ".-", color=BEFORE, markersize=8, label="certified: no factors are below")
            if result.gap_db is not None:
                axes.plot([result.iterations], [result.gap_db], "D", color=AFTER, markersize=6, mfc="none",
                          label=f"returned: at most {result.gap_db:.2g} dB from the best")
        axes.set_xlabel("Newton steps")
        axes.set_ylabel("objective, dB above the last " + ("bound" if certified else "turn"))
    else:
        axes.plot(np.arange(1, len(result.residual) + 1), np.maximum(result.residual, STILL), ".-", color=AFTER, label="sweep")
        axes.set_yscale("log")
        axes.set_xlabel("sweeps")
        axes.set_ylabel("largest change of a factor, |log f|")
    if result.history:
        axes.legend(loc="best", framealpha=0.95)
    return _finished(figure, path, title)


def check_path(path: str) -> None:
    """:class:`ValueError` if no figure could be written there: matplotlib is not installed, or the suffix is none that it knows.

    >>> check_path("figure.svg")
    """
    figure, _ = _figure(1.0, 1.0)
    kinds = figure.canvas.get_supported_filetypes()
    suffix = os.path.splitext(path)[1].lstrip(".").lower()
    if suffix not in kinds:
        raise ValueError(f"'{path}': a figure cannot be written as '{suffix}': give a name that ends in .{', .'.join(sorted(kinds))}")


# ---------------------------------------------------------------------------------------------------------------
# What figures share.

def _figure(width: float, height: float, panels: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure, in inches, and its axes in the style of the house."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a figure needs matplotlib: pip install 'eqfact[plot]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    rows = -(-panels // columns)
    found = [figure.add_subplot(rows, columns, 1 + panel) for panel in range(panels)]
    for axes in found:
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found


def _finished(figure: Figure, path: str | None, *titles: str) -> Figure:
    """The figure under its titles, written if a path is given."""
    if any(titles):
        figure.suptitle("\n".join(filter(None, titles)), fontsize=11)
    if path is not None:
        check_path(path)
        figure.savefig(path, dpi=140)
    return figure


def _width(slots: int) -> float:
    return min(max(7.0, 0.4 * slots + 2), 24.0)


def _name_slots(axes: Axes, names: Sequence[str]) -> None:
    """Names below tensors that stand side by side, and lines between these."""
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    for edge in range(1, len(names)):
        axes.axvline(edge - 0.5, color="0.9", linewidth=0.8, zorder=0)


def _noisiest(of: Mapping[str, float], most: int) -> list[str]:
    """The names with the largest numbers, in the order of the mapping."""
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    chosen = set(sorted(of, key=lambda name: -of[name])[:most])
    return [name for name in of if name in chosen]


def _on_grids(graph: Graph) -> dict[str, tuple[npt.NDArray[np.int64], Grid]]:
    """The weights of every quantized layer in steps from zero, with their grid; shared ones once, by their first node."""
    ops: dict[int, Any] = {}
    for node in graph.nodes:
        if isinstance(node.op, Weighted) and node.op.grid is not None:
            ops.setdefault(id(node.op), node)
    return {node.name: (np.rint(node.op.weight.astype(np.float64) / node.op.grid.scale).astype(np.int64).ravel(), node.op.grid)
            for node in ops.values()}


def _size(grid: Grid) -> int:
    return grid.qmax - grid.qmin + 1
