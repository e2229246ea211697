"""What can be asked of equalize? A method is a value that holds its own options, and finds the factors of a :class:`Task`.

``OneStep`` and ``TwoStep`` apply a rule of :mod:`eqfact.rules` once (PAPER 2 to 4), ``CrossLayer`` (PAPER 7) and ``Swept``, a rule of your
own, until nothing moves: one loop, that owns the order (blocks in the order of their first maker), the sweeps, the bounds and the verdict;
the rule sees ranges that :mod:`eqfact.blocks` reads off weights and factors. ``Optimal`` minimises the expected noise
(:mod:`eqfact.optimal`). Another method is another class with a ``find``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from eqfact.blocks import (
    Activation,
    BlockPlan,
    activation_ranges,
    bias_bounds,
    block_ranges,
    blocks,
    layers,
    made_and_read,
    neighbours,
    product_values,
)
from eqfact.calibration import Statistics, check_statistics, likely_ranges
from eqfact.channels import Channels
from eqfact.factorization import Factorization
from eqfact.graph import Data, Graph
from eqfact.noise import NoiseModel, Sensitivities, forward_sensitivities, measured_sensitivities, noise_model, unit_sensitivities
from eqfact.optimal import Stage, decibels_above, objective_at, optimal
from eqfact.quantizers import UniformQuantizer, clips
from eqfact.rules import MAX_FACTOR, MAX_RATIO, Rule, Vector, cross_layer, one_step, two_step

#: Cross-layer factors stay within ``[1 / 1024, 1024]``: a nearly dead channel has next to no weight to balance, and unbounded
#: factors of 1e8 blow up its bias (PAPER 9: EfficientNet-Lite0).
CROSS_LAYER_MAX_FACTOR = 1024.0

#: By how much a bias may stand out of its layer after cross-layer equalization: one bit of the grid of the activations.
MAX_BIAS = 2.0

#: What a factor of e must earn, in dB of expected noise (docs/optimal.md): some thousand channels together then cost a fraction of a dB.
RIDGE = 0.01


@dataclass(frozen=True, eq=False)
class Task:
    """What a method is given: a network, its free numbers, and what is known of its data and its quantizers."""

    graph: Graph
    channels: Channels
    #: Of the data, or as the caller gave them; None if there are none.
    stats: Statistics | None
    #: Some images that the caller gave, one batch, for gradients.
    images: Data | None
    weights: UniformQuantizer | None
    activations: UniformQuantizer | None
    given: Sensitivities | None = None

    @property
    def rough(self) -> str:
        """If noise is weighed by statistics alone, what would do better: also where an op has no gradient, or such weights were given."""
        return self.sensitivities.rough

    @cached_property
    def sensitivities(self) -> Sensitivities:
        """Those given, else gradients on the images, each output relative to its power; without images (or gradients) from statistics."""
        if self.given is not None:
            return self.given
        assert self.stats is not None
        if self.images is None:
            return replace(forward_sensitivities(self.graph, self.stats), rough="give data=images")
        return measured_sensitivities(self.graph, self.stats, self.images)

    def model(self, ranges: Statistics | None = None, at: Factorization | None = None, clips: bool = True) -> NoiseModel:
        """The expected noise of the quantizers, 8 bits per tensor if none is named, for the ranges of the statistics or others.

        Grids end as after the factorization ``at``, or, without ``clips``, at the extrema.
        """
        if self.stats is None:
            raise ValueError("expected noise needs the ranges of activations: give data=images, or stats=calibrate(graph, batches)")
        weights, activations = self.weights, self.activations
        if weights is None and activations is None:
            weights, activations = UniformQuantizer(8), UniformQuantizer(8, symmetric=False)
        if not clips:
            weights, activations = (q and replace(q, range="minmax") for q in (weights, activations))
        return noise_model(self.graph, ranges or self.stats, weights=weights, activations=activations,
                           sensitivities=self.sensitivities, resolved=self.channels, at=at)

    @property
    def clips(self) -> bool:
        """Does one of the quantizers end its grids by another rule than the extrema?"""
        return clips(self.weights, self.activations)


@dataclass(frozen=True, eq=False)
class Goal:
    """What a factorization was the best for: the noise model, what of it was minimised, and a lower bound on that."""

    model: NoiseModel
    objective: str
    ridge: float
    bound: float
    #: The best factorization for it, and the objective there.
    best: Factorization
    value: float

    def reached(self, factorization: Factorization) -> float:
        """The objective there."""
        if factorization is self.best:  # all logarithms again would take a part of a second a million weights
            return self.value
        fixed = self.model.saturation if self.objective == "noise" else 0.0
        return objective_at(self.model, np.asarray(factorization.free, np.float64), objective=self.objective,
                            ridge=self.ridge) + fixed


@dataclass(frozen=True, eq=False)
class Found:
    """What a method found."""

    factorization: Factorization
    success: bool
    message: str
    iterations: int
    #: Sweep by sweep or step by step, how far it was from the end.
    residual: tuple[float, ...]
    goal: Goal | None = None
    #: Of a search for the least noise, the start and what each stage reached.
    history: tuple[Stage, ...] = ()


class Method(Protocol):
    """What :func:`eqfact.equalize` asks of a method. All have a bound on their factors."""

    @property
    def max_factor(self) -> float:
        """No factor exceeds it."""

    def find(self, task: Task) -> Found:
        """The factors."""


def _check(max_factor: float, tol: float = 0.0, max_iter: int = 1) -> None:
    if not (np.isfinite(max_factor) and max_factor >= 1):
        raise ValueError(f"max_factor must be a finite number of at least 1, got {max_factor}")
    if not (np.isfinite(tol) and tol >= 0):
        raise ValueError(f"tol must be a finite number of at least 0, got {tol}")
    if not isinstance(max_iter, (int, np.integer)) or max_iter < 1:
        raise ValueError(f"max_iter must be a positive integer, got {max_iter!r}")


@dataclass(frozen=True)
class OneStep:
    """Amplify until kernel or activation reach the layer's range, by at most ``max_factor`` (PAPER 2); one pass. Needs data or statistics.

    A concat lift and a residual stream's own minimum come on top of the bound. ``preactivation`` adds the paper's optional limit,
    ``max(A / P_i, 1)``. :class:`ValueError` for a bound below 1.

    >>> net = Graph.chain((1,), fc1=Dense([[4.0], [1.0]]), act=ReLU(), fc2=Dense([[1.0, 4.0]]))
    >>> equalize(net, OneStep(max_factor=2), data=np.array([[1.0]])).factorization["act"]
    array([1., 2.])
    """

    max_factor: float = MAX_FACTOR
    preactivation: bool = False

    def __post_init__(self) -> None:
        _check(self.max_factor)

    def find(self, task: Task) -> Found:
        """The factors of one pass."""
        if task.stats is None:
            raise ValueError(f"method '{self._rule()[0]}' needs the ranges of activations: give data=images, "
                             "or stats=calibrate(graph, batches)")
        name, rule = self._rule()
        return _loop(task, _Loop(name, partial(rule, max_factor=self.max_factor), self.max_factor, 1 / MAX_RATIO, once=True,
                                 preactivation=self.preactivation))

    def _rule(self) -> tuple[str, Callable[..., Vector]]:
        return "one_step", one_step


@dataclass(frozen=True)
class TwoStep(OneStep):
    """As :class:`OneStep`, after every channel is attenuated until its readers just reach their own range (PAPER 3).

    >>> net = Graph.chain((1,), fc1=Dense([[4.0], [1.0]]), act=ReLU(), fc2=Dense([[1.0, 4.0]]))
    >>> equalize(net, TwoStep(), data=np.array([[1.0]])).factorization["act"]
    array([0.25, 1.  ])
    """

    def _rule(self) -> tuple[str, Callable[..., Vector]]:
        return "two_step", two_step


@dataclass(frozen=True)
class Swept:
    """A rule of your own, :data:`eqfact.rules.Rule`, applied block by block until no ``|log f|`` moves by more than ``tol``.

    At most ``max_iter`` sweeps; factors stay within ``[1 / max_factor, max_factor]``. Statistics are used if there are any, for the ranges
    of activations. :class:`ValueError` for unusable options, and where the rule's factors are.

    >>> Swept(lambda block: np.sqrt(block.read / block.made), tol=1e-6).max_factor
    1024.0
    """

    rule: Rule
    max_factor: float = field(default=CROSS_LAYER_MAX_FACTOR, kw_only=True)
    tol: float = field(default=1e-3, kw_only=True)
    max_iter: int = field(default=1000, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.rule):
            raise TypeError(f"a rule is a function from a Block to factors (see eqfact.rules), got {self.rule!r}")
        _check(self.max_factor, self.tol, self.max_iter)

    def find(self, task: Task) -> Found:
        """The factors at which the rule stops."""
        name = getattr(self.rule, "__name__", "the rule")
        return _loop(task, _Loop(name, self.rule, self.max_factor, 1 / self.max_factor, tol=self.tol, max_iter=int(self.max_iter)))


@dataclass(frozen=True)
class CrossLayer:
    """Makes the weights that make and that read every channel range alike (Nagel et al. 2019, PAPER 7); needs no data. If there are
    statistics, it uses those of what normalisations put out, whose weights lie on no grid (docs/algebra.md), and no others.

    Swept as :class:`Swept`, until no ``|log f|`` moves by more than ``tol``, at most ``max_iter`` times. A channel of nearly no weights and
    an ordinary bias is nearly constant; balance would amplify it beyond all others, and with it the range of the activations, of which
    biases are all that is known without data. So where balance takes a bias beyond ``max_bias`` times the largest of its layer, as the
    layer's median factor moves that, its factor ends there, and the sweeps go on: the paper's promise that no range grows (PAPER 2), but
    for one bit. Infinity takes the guard away. What no factor moves does not stand out, either (:func:`eqfact.rules.cross_layer`).

    >>> net = Graph.chain((1,), fc1=Dense([[4.0], [1.0]]), act=ReLU(), fc2=Dense([[1.0, 4.0]]))
    >>> equalize(net, CrossLayer(max_factor=16)).factorization["act"]
    array([0.5, 2. ])
    """

    max_factor: float = CROSS_LAYER_MAX_FACTOR
    tol: float = 1e-3
    max_iter: int = 1000
    max_bias: float = MAX_BIAS

    def __post_init__(self) -> None:
        _check(self.max_factor, self.tol, self.max_iter)
        if not self.max_bias >= 1:
            raise ValueError(f"max_bias must be a number of at least 1, got {self.max_bias}")

    def find(self, task: Task) -> Found:
        """The factors of balance."""
        return _loop(task, _Loop("cross_layer", cross_layer, self.max_factor, 1 / self.max_factor, tol=self.tol,
                                 max_iter=int(self.max_iter), weights_alone=True, max_bias=self.max_bias))


@dataclass(frozen=True, eq=False)
class Optimal:
    """The least expected noise over all factors within ``[1 / max_factor, max_factor]``, certified to ``tol`` dB (docs/optimal.md).

    Quantizers that clip (``range`` other than ``"minmax"``) get factors and clips together: in turn the best factors, while every channel
    keeps its clip, and new clips by the quantizers' rule for these factors, as long as that gains more than ``tol`` dB. A clip ``c`` of the
    grid is ``c / f`` in a channel of factor ``f``. While it stays there saturation does, and rounding is convex in ``log f``: so the best
    factors lower the sum of both; the grid that holds all clips then saturates less still; and by the rule ``"noise"`` the new clips are
    the best for these factors. Every step lowers what is expected at the output, then, rounding and saturation by sensitivity. Other rules
    lower something else: of all that was passed, the best is returned. The certificate is for clips that stay.

    ``sensitivities`` are what noise is weighed with: gradients on the data if not given, or, where there are only statistics,
    :func:`eqfact.forward_sensitivities` of these. ``ranges`` are those that values may take, also on other data: those of
    :func:`eqfact.likely_ranges` if not given; give the statistics themselves to go by what was seen alone. ``ridge``: a factor of e must
    earn so many dB, or the channel stays nearer to 1: what hardly lowers the noise expected from a few images may cost more on others. It
    is 0.01 if not given, and none where noise is weighed by statistics alone (:attr:`Sensitivities.rough`), too rough for a price in dB.
    ``objective="range"`` minimises the product of all ranges instead, without a ridge, and needs no data. At most ``max_iter`` Newton
    steps. :class:`ValueError` for unusable options.

    >>> net = Graph.chain((1,), fc1=Dense([[4.0], [1.0]]), act=ReLU(), fc2=Dense([[1.0, 4.0]]))
    >>> result = equalize(net, Optimal(tol=0.1), data=np.array([[1.0], [2.0]]))
    >>> result.gap_db <= 0.1
    True
    """

    sensitivities: Sensitivities | None = None
    ranges: Statistics | None = None
    objective: str = "noise"
    ridge: float | None = None
    max_factor: float = CROSS_LAYER_MAX_FACTOR
    tol: float = 0.05
    max_iter: int = 200

    def __post_init__(self) -> None:
        if self.objective not in ("noise", "range"):
            raise ValueError(f"unknown objective {self.objective!r}: use 'noise' or 'range'")
        if self.ridge is not None and not (np.isfinite(self.ridge) and self.ridge >= 0):
            raise ValueError(f"ridge must be a finite number of dB, at least 0, got {self.ridge}")
        _check(self.max_factor, self.tol, self.max_iter)

    def find(self, task: Task) -> Found:
        """The factors of the least objective, and its certificate."""
        fates = _fates(blocks(layers(task.graph, task.channels), task.channels), task.channels)
        if task.clips and self.objective == "noise" and task.stats is not None:
            return self._with_clips(task, fates)
        return self._best(task, self._model(task), fates)[1]

    def _best(self, task: Task, model: NoiseModel, fates: Fates, start: Factorization | None = None) -> tuple[float, Found]:
        """The best factors for a model, and the objective there."""
        resolved, bound = task.channels, self.max_factor
        ridge = 0.0
        if self.objective == "noise":  # the other one weighs nothing
            ridge = self.ridge if self.ridge is not None else 0.0 if task.rough else RIDGE
        best = optimal(model, objective=self.objective, box=bound, held=fates[1], ridge=ridge, tol=self.tol, max_iter=int(self.max_iter),
                       start=None if start is None else np.asarray(start.free, np.float64))
        message = (f"optimal: {resolved.degrees_of_freedom} factors within [1/{bound:g}, {bound:g}] chosen in {best.iterations} "
                   f"Newton steps" + _held_back(fates, best.f, bound, 1 / bound, ""))
        fixed = model.saturation if self.objective == "noise" else 0.0
        found, value = Factorization(resolved, best.f), best.noise + fixed
        history = tuple(Stage(of.iterations, of.objective + fixed, of.bound + fixed) for of in best.history)
        return value, Found(found, best.gap_db <= self.tol, message, best.iterations, best.residual,
                            Goal(model, self.objective, ridge, best.bound + fixed, found, value), history)

    def _with_clips(self, task: Task, fates: Fates) -> Found:
        """Factors and clips in turn, from the better of clips alone and factors alone."""
        ranges = self._ranges(task)

        def clipped(at: Factorization) -> tuple[NoiseModel, float]:
            model = task.model(ranges, at)
            return model, sum(model.terms(at).values())
        identity = Factorization(task.channels, np.ones(task.channels.degrees_of_freedom + 1))
        unclipped, alone = self._best(task, task.model(ranges, clips=False), fates)
        of_clips, of_both = clipped(identity), clipped(alone.factorization)
        f, (model, noise) = (identity, of_clips) if of_clips[1] <= of_both[1] else (alone.factorization, of_both)
        steps = alone.iterations
        history = [Stage(steps, noise, 0.0)]  # a certificate holds for the clips of one turn
        while True:
            _, found = self._best(task, model, fates, f)
            steps += found.iterations
            then, noise = clipped(found.factorization)
            gain = decibels_above(noise, history[-1].objective)
            if gain > 0:
                f, model = found.factorization, then
                history.append(Stage(steps, noise, 0.0))
            if gain <= self.tol or steps >= self.max_iter:
                break
        none = task.model(ranges, clips=False).sqnr()
        noise = history[-1].objective
        together, factors, of_clips_alone = (_sqnr(model, reached) for reached in (noise, unclipped, of_clips[1]))
        message = (f"{found.message}; with clips ({len(history) - 1} further turns gained), an SQNR of {together:.1f} dB is expected, of "
                   f"factors alone {factors:.1f}, of clips alone {of_clips_alone:.1f}, of neither {none:.1f}")
        # the last turn's goal has the clips of the factors that are returned, or the ones before them
        return replace(found, factorization=f, message=message, iterations=steps, history=tuple(history),
                       residual=tuple(decibels_above(noise, turn.objective) for turn in history))

    def _model(self, task: Task) -> NoiseModel:
        if self.objective == "range" and task.stats is None:
            return noise_model(task.graph, None, weights=replace(task.weights or UniformQuantizer(8), range="minmax"), activations=None,
                               sensitivities=unit_sensitivities(task.graph), resolved=task.channels)
        if task.stats is None:
            raise ValueError("expected noise needs the ranges of activations: give data=images, or stats=calibrate(graph, batches)")
        return task.model(self._ranges(task), clips=False)  # the product of ranges knows no clips

    def _ranges(self, task: Task) -> Statistics:
        assert task.stats is not None
        if self.ranges is not None:
            check_statistics(task.graph, self.ranges)
        return likely_ranges(task.graph, task.stats) if self.ranges is None else self.ranges


def _sqnr(model: NoiseModel, noise: float) -> float:
    return decibels_above(noise, model.signal) if noise > 0 else np.inf


#: The methods that a name stands for, with their defaults.
METHODS: dict[str, type[OneStep | CrossLayer | Optimal]] = {
    "one_step": OneStep, "two_step": TwoStep, "cross_layer": CrossLayer, "optimal": Optimal}


def method_of(given: str | Rule | Method) -> Method:
    """The method that is meant: a value, the name of one, or a rule to sweep."""
    if isinstance(given, str):
        if given not in METHODS:
            raise ValueError(f"unknown method {given!r}: use {', '.join(map(repr, METHODS))}, one of these with options "
                             "(eqfact.CrossLayer(tol=1e-4)), or a rule (see eqfact.rules)")
        return METHODS[given]()
    if isinstance(given, type):
        raise TypeError(f"a method is a value: give {given.__name__}(...) with its options, not the class")
    if isinstance(given, (OneStep, CrossLayer, Swept, Optimal)) or not callable(given):
        if not callable(getattr(given, "find", None)):
            images = "; images are given as data=" if isinstance(given, np.ndarray) else ""
            raise TypeError(f"a method is a name, a rule or a value such as eqfact.CrossLayer(), got {type(given).__name__}{images}")
        return given
    return Swept(given)


# ---------------------------------------------------------------------------------------------------------------
# The loop

@dataclass(frozen=True, eq=False)
class _Loop:
    """A rule, and how it is applied."""

    name: str
    rule: Rule
    bound: float
    lowest: float
    tol: float = 1e-3
    max_iter: int = 1
    once: bool = False
    preactivation: bool = False
    #: The rule looks at no activations.
    weights_alone: bool = False
    max_bias: float = np.inf


def _loop(task: Task, how: _Loop) -> Found:
    """Apply the rule block by block, once or until nothing moves."""
    graph, resolved, stats = task.graph, task.channels, task.stats
    found = layers(graph, resolved, stats)
    seen = None if how.weights_alone else stats
    plans = blocks(found, resolved, () if seen is None else product_values(graph, resolved, seen))
    activations = {} if seen is None else activation_ranges(graph, found, seen)
    touched = neighbours(plans)
    most = np.full(resolved.degrees_of_freedom + 1, how.bound)
    f, residual, success = _sweep(plans, touched, resolved, how, most, np.ones(resolved.size), how.max_iter, activations)
    if success and how.max_bias < np.inf:
        most = np.clip(bias_bounds(found, resolved, f, how.max_bias), 1 / how.bound, how.bound)
        for plan in plans:
            most[plan.labels[~plan.live]] = how.bound  # a dead channel keeps the factor 1
        if (f[:len(most)] > most * (1 + how.tol)).any() and len(residual) < how.max_iter:
            f, more, success = _sweep(plans, touched, resolved, how, most, f, how.max_iter - len(residual), activations)
            residual += more
    free = f[:resolved.degrees_of_freedom + 1]
    return Found(Factorization(resolved, free), success, _message(how, success, residual, f, most, plans, resolved), len(residual),
                 tuple(residual))


def _sweep(plans: Sequence[BlockPlan], touched: Sequence[set[int]], resolved: Channels, how: _Loop, most: Vector, f: Vector, max_iter: int,
           activations: dict[int, Activation]) -> tuple[Vector, list[float], bool]:
    """From the factors ``f``, by label, until no ``|log f|`` moves by more than the tolerance, none beyond ``most``, by free number."""
    f = f.copy()
    residual: list[float] = []
    everything = set(range(len(plans)))
    due = everything  # blocks with a neighbour that moved; the last sweep looks at all again
    while len(residual) < max_iter:
        whole, moved = due == everything, 0.0
        pending = set()
        for index, plan in enumerate(plans):
            if index not in due and index not in pending:
                continue
            pending.discard(index)
            block = made_and_read(plan, f) if how.weights_alone else block_ranges(plan, f, activations, how.preactivation)
            step = _checked(how.rule(block), plan)
            # where several numbers, or both sides of weights, move a range at once: the step in log that keeps it from swinging
            if (power := plan.of_side if how.once else plan.of_weights) > 1:
                step = step ** (1 / power)
            old = f[plan.labels]
            f[plan.labels] = new = old * step if how.once else np.clip(old * step, 1 / how.bound, most[plan.labels])
            resolved.follow(f, plan.followers)
            change = float(np.abs(np.log(new / old)).max())
            moved = max(moved, change)
            if change > how.tol:
                pending |= touched[index]
        residual.append(moved)
        if whole and moved <= how.tol:
            break
        due = pending or everything
    return f, residual, how.once or residual[-1] <= how.tol


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


def _message(how: _Loop, success: bool, residual: Sequence[float], f: Vector, most: Vector, plans: Sequence[BlockPlan],
             resolved: Channels) -> str:
    """What happened, in a sentence or two."""
    if not plans:
        return f"{how.name}: no channel is free, the network is returned as it is"
    sweeps = f"{len(residual)} sweep{'s' if len(residual) != 1 else ''}"
    verdict = f"{how.name}: {resolved.degrees_of_freedom} factors chosen in {sweeps}"
    if not success:
        verdict = f"{how.name}: not converged after {sweeps}, factors still move by {residual[-1]:.2g} (tol {how.tol:g}); raise max_iter"
    text = verdict + _held_back(_fates(plans, resolved), f[:len(most)], how.bound, how.lowest, "" if how.once else "nearly dead ")
    if held := int(((most < how.bound) & (f[:len(most)] >= most * (1 - 1e-9)))[1:].sum()):
        text += f"; {held} channel{'s' if held > 1 else ''} held at {how.max_bias:g} times the largest bias of the layer"
    return text


#: The free numbers of all blocks, as masks: those with weights on both sides, and the dead ones. (Plans hold all weights, so that they had
#: better not be kept for this.)
Fates = tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]


def _fates(plans: Sequence[BlockPlan], resolved: Channels) -> Fates:
    """Which free numbers are alive and which dead, by label."""
    live, dead = np.zeros((2, resolved.degrees_of_freedom + 1), bool)
    for plan in plans:
        live[plan.labels], dead[plan.labels] = plan.live, ~plan.live
    return live, dead


def _held_back(fates: Fates, f: Vector, bound: float, lowest: float, kind: str) -> str:
    """How many channels are dead, and how many of the others stand at a bound."""
    text, (live, dead_ones) = "", fates
    dead, at_bound = int(dead_ones.sum()), int((live & ((f >= bound * (1 - 1e-9)) | (f <= lowest * (1 + 1e-9)))).sum())
    if dead:
        text += f"; {dead} dead channel{'s keep' if dead > 1 else ' keeps'} the factor 1"
    if at_bound:
        text += f"; {at_bound} {kind}channel{'s' if at_bound > 1 else ''} held at the bound {bound:g}"
    return text
