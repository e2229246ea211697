"""How does a rule become an equivalent network? One loop: labels, ranges, rule, factors, until nothing moves.

The loop owns the order (blocks in the order of their first maker), the sweeps, the bounds and the verdict; the rule is a
value passed in (:mod:`eqfact.rules`), and sees ranges that :mod:`eqfact.blocks` reads off weights and factors. Weights change once, at
the end. Sections 2 to 4 and 7 of PAPER.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from eqfact.blocks import BlockPlan, activation_ranges, block_ranges, blocks, layers, made_and_read, neighbours, product_values
from eqfact.calibration import Statistics, check_statistics
from eqfact.channels import Channels, channels
from eqfact.factorization import Factorization
from eqfact.freeing import freed_by_slopes
from eqfact.graph import Graph
from eqfact.noise import NoiseModel, Sensitivities, forward_sensitivities, noise_model, unit_sensitivities
from eqfact.optimal import decibels_above, objective_at, optimal
from eqfact.quantization import UniformQuantizer
from eqfact.rules import MAX_FACTOR, MAX_RATIO, Rule, Vector, cross_layer, one_step, two_step

#: Cross-layer factors stay within ``[1 / 1024, 1024]``: a nearly dead channel has next to no weight to balance, and unbounded
#: factors of 1e8 blow up its bias (PAPER 9: EfficientNet-Lite0).
CROSS_LAYER_MAX_FACTOR = 1024.0


@dataclass(frozen=True, eq=False)
class EqualizeResult:
    """What :func:`equalize` found. Field names follow ``scipy.optimize.OptimizeResult``."""

    graph: Graph
    factorization: Factorization
    success: bool
    message: str
    iterations: int
    #: Largest change ``|log f|`` of any factor, sweep by sweep.
    residual: tuple[float, ...]
    #: Why channels of a value keep the factor 1, for every value with such a channel.
    pinned: dict[str, str]
    #: Expected SQNR of the quantized output in dB before and after, if the method or the caller asked for a prediction.
    predicted: tuple[float, float] | None = None
    #: "optimal" only: a lower bound on the objective of every factorization within the bounds that keeps dead channels, and by how many
    #: dB the one returned (rounded to powers of two, if asked) can at most be from the best of them.
    bound: float | None = None
    gap_db: float | None = None


def equalize(graph: Graph, method: str | Rule = "cross_layer", *, stats: Statistics | None = None, max_factor: float | None = None,
             preactivation: bool = False, tol: float | None = None, max_iter: int | None = None, include: Collection[str] | None = None,
             exclude: Collection[str] = (), exact: bool = False, weights: UniformQuantizer | None = None,
             activations: UniformQuantizer | None = None, sensitivities: Sensitivities | None = None, objective: str = "noise",
             ranges: Statistics | None = None, harmless: bool = False) -> EqualizeResult:
    """Find factors by a method and return the equivalent network.

    ``method`` is ``"one_step"`` or ``"two_step"`` (Meller et al. 2019, PAPER 2 to 4; one pass; need ``stats`` of this
    graph), ``"cross_layer"`` (Nagel et al. 2019; swept until no ``|log f|`` moves by more than ``tol`` = 1e-3, at most
    ``max_iter`` = 1000 sweeps), a rule of your own, swept likewise, or ``"optimal"`` (:mod:`eqfact.optimal`: the least expected noise,
    certified to ``tol`` = 0.05 dB, in at most ``max_iter`` = 200 Newton steps; with ``objective="range"`` the least product of all
    ranges, which needs no data). ``max_factor`` bounds the factors: the paper's 16 for its two rules (amplification; a concat lift and
    a residual stream's own minimum come on top), ``[1/1024, 1024]`` otherwise. ``preactivation`` adds the paper's optional limit
    ``max(A / P_i, 1)``. ``include`` and ``exclude`` name values whose channels alone may, or may not, get factors. ``exact`` rounds
    the factors to powers of two: outputs are then bit-identical.

    ``weights`` and ``activations`` are the quantizers that one intends to use (8 bits, per tensor, if neither is given), and
    ``sensitivities`` what the noise model weighs them with (:func:`eqfact.forward_sensitivities` of ``stats`` if not given;
    :func:`eqfact.gradient_sensitivities` are better). ``"optimal"`` minimises that noise; if calibration images are few, for the
    ``ranges`` that values may take on others (:func:`eqfact.likely_ranges`). What is predicted, there and for other methods if
    quantizers or sensitivities are given, goes by ``stats``. ``harmless`` returns the network as it is where that would not fall.

    Fold BatchNorm first (:func:`eqfact.fold_batchnorm`) to get the paper's set-up; a BatchNorm that stays is a weighted op.
    Raises :class:`ValueError` for unknown methods and names, options of other methods, bad statistics, and unusable factors from a rule.

    >>> net = Graph.chain((1,), fc1=Dense(np.array([[4.0], [1.0]])), act=ReLU(), fc2=Dense(np.array([[1.0, 4.0]])))
    >>> equalize(net).factorization["act"]
    array([0.5, 2. ])
    """
    tol = (0.05 if method == "optimal" else 1e-3) if tol is None else tol
    max_iter = (200 if method == "optimal" else 1000) if max_iter is None else max_iter
    if not (np.isfinite(tol) and tol >= 0):
        raise ValueError(f"tol must be a finite number of at least 0, got {tol}")
    if exact and max_factor is not None and np.isfinite(max_factor) and max_factor >= 1:
        max_factor = float(np.exp2(np.floor(np.log2(max_factor))))  # so that no power of two is rounded beyond it
    if not isinstance(max_iter, (int, np.integer)) or max_iter < 1:
        raise ValueError(f"max_iter must be a positive integer, got {max_iter!r}")
    if objective not in ("noise", "range"):
        raise ValueError(f"unknown objective {objective!r}: use 'noise' or 'range'")
    for option, given, methods in (("objective='range'", objective == "range", ("optimal",)), ("ranges", ranges is not None, ("optimal",)),
                                   ("preactivation", preactivation, ("one_step", "two_step"))):
        if given and method not in methods:
            raise ValueError(f"{option} is for method {' and '.join(map(repr, methods))}, not for {method!r}")
    resolved = _resolved(graph, include, exclude)
    model = wanted = None
    if method == "optimal" or harmless or sensitivities is not None or weights is not None or activations is not None:
        model = _noise_model(graph, resolved, stats, weights, activations, sensitivities, objective)
    if method == "optimal":
        assert model is not None
        wanted = model if ranges is None else _noise_model(graph, resolved, ranges, weights, activations, sensitivities, objective)
        found = _optimum(graph, resolved, wanted, objective, max_factor, tol, int(max_iter))
    else:
        found = _swept(graph, resolved, method, stats, max_factor, preactivation, tol, max_iter)
    factorization = found.factorization.power_of_two() if exact else found.factorization
    predicted, message, gap_db = None, found.message, found.gap_db
    if model is not None:
        predicted = (model.sqnr(), model.sqnr(factorization)) if objective == "noise" else None
        if harmless and predicted is None:
            raise ValueError("harmless compares the expected noise: it goes with objective='noise'")
        if harmless and predicted is not None and not predicted[1] > predicted[0]:
            factorization, predicted = Factorization(resolved, np.ones(resolved.degrees_of_freedom + 1)), (predicted[0], predicted[0])
            message += "; the expected noise would not fall, so the network is returned as it is"
    if wanted is not None:
        gap_db = _gap_db(found, wanted, factorization, objective)
        what = "expected noise" if objective == "noise" else "mean of all squared ranges"
        message += f"; no factors within these bounds lower the {what} by more than {gap_db:.2g} dB"
    if more := freed_by_slopes(graph):
        message += f"; {more} more factors would be free with a slope a channel in gates (eqfact.slope_gates)"
    return replace(found, graph=factorization.apply(graph), factorization=factorization, predicted=predicted, message=message,
                   gap_db=gap_db)


def _noise_model(graph: Graph, resolved: Channels, stats: Statistics | None, weights: UniformQuantizer | None,
                 activations: UniformQuantizer | None, sensitivities: Sensitivities | None, objective: str) -> NoiseModel:
    """The noise model for the caller's quantizers: 8 bits, per tensor, if there are none."""
    if objective == "range" and stats is None:
        return noise_model(graph, None, weights=weights or UniformQuantizer(8), activations=None,
                           sensitivities=unit_sensitivities(graph), resolved=resolved)
    if stats is None:
        raise ValueError("expected noise needs statistics: give stats=calibrate(graph, batches)")
    check_statistics(graph, stats)
    if weights is None and activations is None:
        weights, activations = UniformQuantizer(8), UniformQuantizer(8, symmetric=False)
    sensitivities = forward_sensitivities(graph, stats) if sensitivities is None else sensitivities
    return noise_model(graph, stats, weights=weights, activations=activations, sensitivities=sensitivities, resolved=resolved)


def _optimum(graph: Graph, resolved: Channels, model: NoiseModel, objective: str, max_factor: float | None, tol: float,
             max_iter: int) -> EqualizeResult:
    """The factorization of the least objective, and its certificate."""
    bound = CROSS_LAYER_MAX_FACTOR if max_factor is None else max_factor
    if not (np.isfinite(bound) and bound >= 1):
        raise ValueError(f"max_factor must be a finite number of at least 1, got {bound}")
    plans = blocks(layers(graph, resolved), resolved)
    dead = np.zeros(resolved.degrees_of_freedom + 1, bool)
    for plan in plans:
        dead[plan.labels] = ~_alive(plan, np.ones(resolved.size))
    best = optimal(model, objective=objective, box=bound, held=dead, tol=tol, max_iter=max_iter)
    message = (f"optimal: {resolved.degrees_of_freedom} factors within [1/{bound:g}, {bound:g}] chosen in {best.iterations} Newton steps"
               + _held_back(plans, resolved.by_label(best.f), bound, 1 / bound, ""))
    return EqualizeResult(graph, Factorization(resolved, best.f), best.gap_db <= tol, message, best.iterations, best.residual,
                          resolved.pinned, bound=best.bound, gap_db=best.gap_db)


def _gap_db(found: EqualizeResult, model: NoiseModel, factorization: Factorization, objective: str) -> float:
    """By how many dB a factorization, that of the optimum or what became of it, can at most be from the best one."""
    assert found.gap_db is not None and found.bound is not None
    if factorization is found.factorization:
        return found.gap_db
    reached = objective_at(model, np.asarray(factorization.free, np.float64), objective=objective)
    return decibels_above(found.bound, reached)


def _swept(graph: Graph, resolved: Channels, method: str | Rule, stats: Statistics | None, max_factor: float | None, preactivation: bool,
           tol: float, max_iter: int) -> EqualizeResult:
    """The loop: apply the rule block by block, once or until nothing moves."""
    rule, once, bound = _method(method, max_factor)
    if once and stats is None:
        raise ValueError(f"method {method!r} needs the ranges of activations: give stats=calibrate(graph, batches)")
    if stats is not None:
        check_statistics(graph, stats)
    found = layers(graph, resolved, stats)
    looks = stats is not None and method != "cross_layer"  # at activations
    plans = blocks(found, resolved, product_values(graph, resolved, stats) if looks and stats is not None else ())
    activations = activation_ranges(graph, found, stats) if looks and stats is not None else {}
    touched = neighbours(plans)
    f = np.ones(resolved.size)
    residual: list[float] = []
    everything = set(range(len(plans)))
    due = everything  # blocks with a neighbour that moved; the last sweep looks at all again
    while len(residual) < (1 if once else max_iter):
        whole, moved = due == everything, 0.0
        pending = set()
        for index, plan in enumerate(plans):
            if index not in due and index not in pending:
                continue
            pending.discard(index)
            block = made_and_read(plan, f) if method == "cross_layer" else block_ranges(plan, f, activations, preactivation)
            step = _checked(rule(block), plan)
            # where several numbers, or both sides of weights, move a range at once: the step in log that keeps it from swinging
            if (power := plan.of_side if once else plan.of_weights) > 1:
                step = step ** (1 / power)
            old = f[plan.labels]
            f[plan.labels] = new = old * step if once else np.clip(old * step, 1 / bound, bound)
            resolved.follow(f, plan.followers)
            change = float(np.abs(np.log(new / old)).max())
            moved = max(moved, change)
            if change > tol:
                pending |= touched[index]
        residual.append(moved)
        if whole and moved <= tol:
            break
        due = pending or everything
    success = once or residual[-1] <= tol
    message = _message(method, success, residual, tol, bound, f, plans, resolved)
    free = f[:resolved.degrees_of_freedom + 1]
    return EqualizeResult(graph, Factorization(resolved, free), success, message, len(residual), tuple(residual), resolved.pinned)


def _method(method: str | Rule, max_factor: float | None) -> tuple[Rule, bool, float]:
    """The rule, whether it is applied once or swept, and the bound on factors: of the rule itself, or of the loop if swept."""
    if max_factor is not None and not (np.isfinite(max_factor) and max_factor >= 1):
        raise ValueError(f"max_factor must be a finite number of at least 1, got {max_factor}")
    paper = {"one_step": one_step, "two_step": two_step}
    if isinstance(method, str) and method in paper:
        bound = MAX_FACTOR if max_factor is None else max_factor
        return partial(paper[method], max_factor=bound), True, bound
    bound = CROSS_LAYER_MAX_FACTOR if max_factor is None else max_factor
    if method == "cross_layer":
        return cross_layer, False, bound
    if callable(method):
        return method, False, bound
    raise ValueError(f"unknown method {method!r}: use 'one_step', 'two_step', 'cross_layer', 'optimal', or a rule (see eqfact.rules)")


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


def _checked(step: Vector, plan: BlockPlan) -> Vector:
    """The rule's factors, if they are usable."""
    step = np.asarray(step, np.float64)
    if step.shape != plan.labels.shape:
        value = plan.growing[0].layer.values[0]
        raise ValueError(f"value '{value}': the rule must return {len(plan.labels)} factors, got shape {step.shape}")
    wrong = ~(np.isfinite(step) & (step > 0))
    if wrong.any():
        number = int(np.argmax(wrong))
        value, channel = next((side.layer.values[0], int(side.channels[np.argmax(side.numbers == number)]))
                              for side in (*plan.growing, *plan.shrinking) if number in side.numbers)
        raise ValueError(f"value '{value}', channel {channel}: the rule returned {step[wrong][0]}; "
                         "factors must be positive and finite, return 1 for channels that it cannot judge")
    return step


def _message(method: str | Rule, success: bool, residual: list[float], tol: float, bound: float, f: Vector,
             plans: Sequence[BlockPlan], resolved: Channels) -> str:
    """What happened, in a sentence or two."""
    name = method if isinstance(method, str) else getattr(method, "__name__", "the rule")
    if not plans:
        return f"{name}: no channel is free, the network is returned as it is"
    sweeps = f"{len(residual)} sweep{'s' if len(residual) != 1 else ''}"
    verdict = f"{name}: {resolved.degrees_of_freedom} factors chosen in {sweeps}"
    if not success:
        verdict = f"{name}: not converged after {sweeps}, factors still move by {residual[-1]:.2g} (tol {tol:g}); raise max_iter"
    paper = method in ("one_step", "two_step")
    return verdict + _held_back(plans, f, bound, 1 / MAX_RATIO if paper else 1 / bound, "" if paper else "nearly dead ")


def _held_back(plans: Sequence[BlockPlan], f: Vector, bound: float, lowest: float, kind: str) -> str:
    """How many channels are dead, and how many of the others stand at a bound."""
    text, dead, at_bound = "", 0, 0
    for plan in plans:
        alive = _alive(plan, f)
        dead += int((~alive).sum())
        at_bound += int((alive & ((f[plan.labels] >= bound * (1 - 1e-9)) | (f[plan.labels] <= lowest * (1 + 1e-9)))).sum())
    if dead:
        text += f"; {dead} dead channel{'s keep' if dead > 1 else ' keeps'} the factor 1"
    if at_bound:
        text += f"; {at_bound} {kind}channel{'s' if at_bound > 1 else ''} held at the bound {bound:g}"
    return text


def _alive(plan: BlockPlan, f: Vector) -> npt.NDArray[np.bool_]:
    """Which channels of a block have weights that make them and weights that read them."""
    block = made_and_read(plan, f)
    alive: npt.NDArray[np.bool_] = (block.made > 0) & (block.read > 0)
    return alive
