"""How does a method become an equivalent network? One call: labels, what is known of the data, the method's factors, the verdict.

What a method is, and how it finds factors, is in :mod:`eqfact.methods`. Weights change once, at the end. Sections 2 to 4 and 7 of PAPER.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from eqfact.calibration import Statistics, calibrate, check_statistics
from eqfact.channels import Channels, channels
from eqfact.factorization import Factorization
from eqfact.freeing import freed_by_slopes
from eqfact.graph import Data, Graph, batches_of, checked_inputs
from eqfact.methods import Method, Optimal, Task, method_of
from eqfact.ops.base import Array
from eqfact.optimal import Stage, decibels_above
from eqfact.quantizers import UniformQuantizer, check_quantizers, clips
from eqfact.rules import Rule

#: Gradients are taken on at most so many of the images: with four projections each that is the mean of 64 squares, within a dB or so.
SENSED = 16


@dataclass(frozen=True, eq=False)
class EqualizeResult:
    """What :func:`equalize` found. Field names follow ``scipy.optimize.OptimizeResult``.

    >>> net = Graph.chain((1,), fc1=Dense([[4.0], [1.0]]), act=ReLU(), fc2=Dense([[1.0, 4.0]]))
    >>> result = equalize(net, "cross_layer")
    >>> result.success, result.factorization["act"], sorted(result.pinned)
    (True, array([0.5, 2. ]), ['fc2', 'x'])
    """

    graph: Graph
    factorization: Factorization
    success: bool
    message: str
    iterations: int
    #: Largest change ``|log f|`` of any factor, sweep by sweep; of "optimal" the certified gap in dB, stage by stage (with quantizers that
    #: clip, the noise of every turn in dB above the last).
    residual: tuple[float, ...]
    #: Why channels of a value keep the factor 1, for every value with such a channel.
    pinned: dict[str, str]
    #: Expected SQNR of the quantized output in dB before and after, for the ranges seen; None without data or statistics, for rules that
    #: are given statistics but neither data nor quantizers, and for weights on grids per group, which the noise model does not know.
    predicted: tuple[float, float] | None = None
    #: Likewise, the expected noise of each tensor before and after, in dB of the output's power (:func:`eqfact.predict_noise`).
    noise: tuple[dict[str, float], dict[str, float]] | None = None
    #: "optimal" only: a lower bound on the objective (expected noise and ridge) of every factorization within the bounds that keeps dead
    #: channels, and by how many dB the one returned (rounded to powers of two, if asked) can at most be from the best of them.
    bound: float | None = None
    gap_db: float | None = None
    #: "optimal" only: the start and every stage, each ``(iterations, objective, bound)`` so far, the last two in the unit of ``bound``.
    #: With quantizers that clip, every turn, without a bound (0), as a certificate holds for the clips of one turn.
    history: tuple[Stage, ...] = ()


def equalize(graph: Graph, method: str | Rule | Method | None = None, *, data: Data | Iterable[Data] | None = None,
             stats: Statistics | None = None, weights: UniformQuantizer | None = None, activations: UniformQuantizer | None = None,
             include: Collection[str] | None = None, exclude: Collection[str] = (), exact: bool = False,
             harmless: bool = False) -> EqualizeResult:
    """Find factors by a method and return the equivalent network.

    ``data`` are calibration images, ``(N, C, *spatial)`` or an iterable of such batches, ``stats`` what :func:`eqfact.calibrate` made of
    this graph; either may be left out. With one of them the least expected noise is looked for (``"optimal"``), without them balance
    between the weights of neighbouring layers (``"cross_layer"``). Any other ``method`` is a name, ``"one_step"`` or ``"two_step"``, a
    value with options, such as ``eqfact.CrossLayer(tol=1e-4)`` (:mod:`eqfact.methods`), or a rule function (:mod:`eqfact.rules`), swept.

    ``weights`` and ``activations`` are the quantizers that one intends to use: 8 bits, per tensor, if neither is given; for those that clip
    (``range``) the optimum is one of factors and clips together (:class:`eqfact.Optimal`). ``include`` and
    ``exclude`` name values whose channels alone may, or may not, get factors. ``exact`` rounds the factors to powers of two: outputs are
    then bit-identical. A result whose expected noise is higher than before says so first in its message; with ``harmless`` the network is
    returned as it is there.

    Fold BatchNorm first (:func:`eqfact.fold_batchnorm`) to get the paper's set-up; a BatchNorm that stays is a weighted op.
    Raises :class:`ValueError` for unknown methods and names, bad data and statistics, and unusable factors from a rule.

    >>> net = Graph.chain((1,), fc1=Dense(np.array([[4.0], [1.0]])), act=ReLU(), fc2=Dense(np.array([[1.0, 4.0]])))
    >>> equalize(net).factorization["act"]
    array([0.5, 2. ])
    """
    if method is None:
        method = "cross_layer" if data is None and stats is None else "optimal"
    chosen = method_of(method)
    if exact:  # so that no power of two is rounded beyond the bound
        chosen = replace(chosen, max_factor=float(np.exp2(np.floor(np.log2(chosen.max_factor)))))  # type: ignore[type-var]
    check_quantizers(weights, activations)
    resolved = _resolved(graph, include, exclude)
    images = None
    if data is not None:
        stats, images = _measured(graph, data, stats, histograms=clips(weights, activations))
    if stats is not None:
        check_statistics(graph, stats)
    task = Task(graph, resolved, stats, images, weights, activations, chosen.sensitivities if isinstance(chosen, Optimal) else None)
    model = None
    asked = isinstance(chosen, Optimal) or data is not None or weights is not None or activations is not None
    if harmless or (asked and stats is not None and (weights is None or weights.granularity != "per_group")):
        model = task.model()
    found = chosen.find(task)
    factorization = found.factorization.power_of_two() if exact else found.factorization
    message, goal = found.message, found.goal
    predicted = noise = None
    if model is not None:
        after = task.model(at=factorization) if task.clips else model
        predicted, noise = (model.sqnr(), after.sqnr(factorization)), (model.decibels(), after.decibels(factorization))
    if predicted is not None and noise is not None and harmless and not predicted[1] > predicted[0]:
        factorization = Factorization(resolved, np.ones(resolved.degrees_of_freedom + 1))
        predicted, noise = (predicted[0], predicted[0]), (noise[0], noise[0])
        message += "; the expected noise would not fall, so the network is returned as it is"
    if predicted is not None and predicted[1] < predicted[0]:
        remedy = "for the ranges seen, though not for those that other data may reach: give more data" if isinstance(chosen, Optimal) else \
            "use method 'optimal'"
        message = (f"the expected noise rises, from an SQNR of {predicted[0]:.1f} to {predicted[1]:.1f} dB: {remedy}, or harmless=True; "
                   f"{message}")
    gap_db = None
    if goal is not None:
        gap_db = decibels_above(goal.bound, goal.reached(factorization))
        what = "expected noise" if goal.objective == "noise" else "mean of all squared ranges"
        what += " with these clips" if goal.model.saturation else ""
        price = f", where a factor of e costs {goal.ridge:g} dB," if goal.ridge else ""
        message += f"; no factors within these bounds lower the {what}{price} by more than {gap_db:.2g} dB"
        if goal.objective == "noise" and task.rough:
            message += f"; noise is weighed by statistics alone, which gradients do better: {task.rough}"
    if more := freed_by_slopes(graph):
        message += f"; {more} more factors would be free with a slope a channel in gates (eqfact.slope_gates)"
    return EqualizeResult(factorization.apply(graph), factorization, found.success, message, found.iterations, found.residual,
                          resolved.pinned, predicted, noise, None if goal is None else goal.bound, gap_db, found.history)


def _measured(graph: Graph, data: Data | Iterable[Data], stats: Statistics | None,
              histograms: bool = True) -> tuple[Statistics, dict[str, Array]]:
    """Statistics over all batches, unless they are there, and some of the images, drawn evenly from all; batches are seen once."""
    rng, seen = np.random.default_rng(0), 0
    kept: dict[str, list[Array]] = {name: [] for name in graph.inputs}

    def passing() -> Iterator[Data]:
        nonlocal seen
        for batch in batches_of(data):
            arrays = checked_inputs(graph, batch)
            for image in range(len(next(iter(arrays.values())))):
                # each image so far is among those kept with the same probability (reservoir sampling)
                place = seen if seen < SENSED else int(rng.integers(seen + 1))
                seen += 1
                if place < SENSED:
                    for name, of in kept.items():
                        of[place:place + 1] = [arrays[name][image].copy()]
            yield batch
    if stats is None:
        stats = calibrate(graph, passing(), histograms=histograms)
    else:
        for _ in passing():
            pass
    if not seen:
        raise ValueError("equalization on data needs at least one image, got none")
    return stats, {name: np.stack(of) for name, of in kept.items()}


def _resolved(graph: Graph, include: Collection[str] | None, exclude: Collection[str]) -> Channels:
    """The channel labels, with those pinned that the caller wants pinned."""
    for argument, names in (("include", include or ()), ("exclude", exclude)):
        if isinstance(names, str):
            raise TypeError(f"{argument} must be a list of value names, got the string {names!r}")
        for name in names:
            if name not in graph.shapes:
                raise ValueError(f"{argument} names '{name}', which is not a value of the network")
    resolved = channels(graph, hold={name: f"excluded by the caller ('{name}')" for name in exclude})
    if include is None:
        return resolved
    # by free number, not by value: in a concat, included channels stand beside others
    chosen = np.zeros(resolved.degrees_of_freedom + 1, bool)
    for name in include:
        chosen[resolved.forms[resolved.labels[name]].indices] = True
    chosen[0] = False
    return resolved.restricted(chosen, "not among the values that the caller includes")
