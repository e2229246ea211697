"""The best factors: against cases solved by hand, grids and loops, from every start; and a bound that nothing may beat.

Expected noise is computed here by loops over the entries of each tensor, not by eqfact's noise model.
"""

from __future__ import annotations

import itertools
import math

import handmade
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS

import eqfact as eq
from eqfact import logsums
from eqfact import optimal as module
from eqfact.logsums import safe_log
from eqfact.noise import Sensitivities, gradient_sensitivities, noise_model, unit_sensitivities
from eqfact.optimal import Optimum, optimal
from eqfact.testing.strategies import batches, networks

W8, A8 = eq.UniformQuantizer(8), eq.UniformQuantizer(8, symmetric=False)
#: Quantizers of weights and of activations.
SETTINGS = {
    "W8A8": (W8, A8),
    "weights": (W8, None),
    "activations": (None, A8),
    "affine weights": (A8, A8),
    "per channel": (eq.UniformQuantizer(8, granularity="per_channel"), A8),
    "per-channel weights alone": (eq.UniformQuantizer(4, granularity="per_channel"), None),
}
SETTING = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
#: Relative differences that roundoff may make, and then the library's own margin for it.
TINY = 1e-7


def model_of(graph, x, setting=SETTINGS["W8A8"], seed=0):
    stats = eq.calibrate(graph, x)
    return noise_model(graph, stats, weights=setting[0], activations=setting[1],
                       sensitivities=gradient_sensitivities(graph, [x], projections=1, seed=seed))


def looped_noise(model, f):
    """The expected noise, entry by entry, for factors of the free numbers: those of labels are products of their powers."""
    f = np.exp(model.channels.forms.toarray() @ np.log(f))
    total = 0.0
    for tensor in model.tensors:
        groups, rows, inner = tensor.sensitivity.shape
        ranges = np.zeros((groups, rows))
        sums = np.zeros((groups, rows))
        largest = np.zeros((len(tensor.parts), groups, rows))
        for g in range(groups):
            for o in range(rows):
                for i in range(inner):
                    ratio = f[tensor.made[g * rows + o]] / f[tensor.read[g * inner + i]]
                    for k, part in enumerate(tensor.parts):
                        largest[k, g, o] = max(largest[k, g, o], part[g, o, i] * ratio)
                    sums[g, o] += tensor.sensitivity[g, o, i] / ratio**2
        ranges = largest.sum(axis=0) if tensor.by_row else largest.max(axis=(1, 2)).sum()
        total += float((np.square(ranges / tensor.steps) / 12 * (sums if tensor.by_row else sums.sum())).sum())
    return total


def nothing_beats(model, best, factors):
    for f in factors:
        assert looped_noise(model, f) >= best.bound, "a factorization beats the bound"


def in_box(rng, model, box=1024.0):
    f = np.exp(rng.uniform(-1, 1, model.channels.degrees_of_freedom + 1) * np.log(box) * rng.choice([0.01, 0.1, 1.0]))
    f[0] = 1
    return f


def toy(w1, w2, s1, s2):
    """Two layers with one bias-free activation between them, and sensitivities of our own."""
    net = eq.Graph.chain((np.shape(w1)[1],), fc1=eq.Dense(np.array(w1, float)), act=eq.ReLU(), fc2=eq.Dense(np.array(w2, float)))
    s = Sensitivities({"fc1": np.array(s1, float)[None], "fc2": np.array(s2, float)[None]}, {}, 1.0)
    return noise_model(net, None, weights=W8, activations=None, sensitivities=s)


# ------------------------------------------------------------------------------------------------------------- by hand


def test_a_single_channel_has_nothing_to_gain():
    # (R1 f)**2 S1 / f**2 + (R2 / f)**2 S2 f**2 does not depend on f
    model = toy([[3.0]], [[5.0]], [[2.0]], [[7.0]])
    best = optimal(model, tol=1e-6)
    assert best.noise == pytest.approx((3**2 * 2 + 5**2 * 7) / 127**2 / 12, rel=1e-12)
    assert best.gap_db <= 1e-6
    assert best.iterations == 0


def test_two_channels_made_with_unequal_ranges():
    # R1 = max(4 f1, f2), Q1 = 1 / f1**2 + 1 / f2**2; fc2's noise is held at next to nothing: best is f2 = 4 f1, noise 16 (1 + 1/16) = 17
    model = toy([[4.0], [1.0]], [[1.0, 1.0]], [[1.0], [1.0]], [[1e-12, 1e-12]])
    best = optimal(model, tol=1e-5)
    assert best.noise * 127**2 * 12 == pytest.approx(17, rel=1e-5)
    assert best.f[2] / best.f[1] == pytest.approx(4, rel=1e-3)
    assert best.bound * 127**2 * 12 <= 17.000001


def test_two_channels_where_maker_and_reader_disagree():
    # with r = f2 / f1: fc1 has max(1, r)**2 (1 + 1 / r**2), fc2 has max(1, 1 / r)**2 (c + c r**2); for 1 <= r: r**2 + 1 + c (1 + r**2)
    model = toy([[1.0], [1.0]], [[1.0, 1.0]], [[1.0], [1.0]], [[3.0, 3.0]])
    best = optimal(model, tol=1e-5)
    assert best.f[2] / best.f[1] == pytest.approx(1, rel=1e-3)
    assert best.noise * 127**2 * 12 == pytest.approx(2 + 6, rel=1e-5)


@pytest.mark.parametrize("c", [0.1, 1.0, 5.0])
def test_a_smooth_minimum_between_the_kinks(c):
    # fc1: max(4, r)**2 (1 + 1 / r**2); fc2 reads (1, 4): max(1, 4 / r)**2 c (1 + r**2). On 1 <= r <= 4: 16 + 16 / r**2 + 16 c / r**2 + 16 c
    model = toy([[4.0], [1.0]], [[1.0, 4.0]], [[1.0], [1.0]], [[c, c]])
    best = optimal(model, tol=1e-5)
    assert best.f[2] / best.f[1] == pytest.approx(4, rel=1e-3)
    assert best.noise * 127**2 * 12 == pytest.approx(17 * (1 + c), rel=1e-5)


def test_the_box_holds_the_factors_and_the_bound():
    # best is f2 = 4 f1, but each may only go to sqrt(2): f1 = 1 / sqrt(2), f2 = sqrt(2), noise max(4, 2)**2 (1 + 1 / 4) = 20
    model = toy([[4.0], [1.0]], [[1.0, 1.0]], [[1.0], [1.0]], [[1e-12, 1e-12]])
    best = optimal(model, box=2**0.5, tol=1e-5)
    assert best.f[1:] == pytest.approx([2**-0.5, 2**0.5], rel=1e-9)
    assert best.noise * 127**2 * 12 == pytest.approx(20, rel=1e-9)
    assert best.gap_db <= 1e-5
    assert optimal(model, box=1).f.tolist() == [1, 1, 1]
    assert optimal(model, box=1).gap_db <= TINY


def test_the_product_of_ranges_is_least_where_cross_layer_is_balanced():
    # log max(4 f1, f2) + log max(1 / f1, 4 / f2): least for f2 = 4 f1, product 4 * 1
    net = eq.Graph.chain((1,), fc1=eq.Dense(np.array([[4.0], [1.0]])), act=eq.ReLU(), fc2=eq.Dense(np.array([[1.0, 4.0]])))
    model = noise_model(net, None, weights=W8, activations=None, sensitivities=unit_sensitivities(net))
    best = optimal(model, objective="range", tol=1e-4)
    assert best.noise * 127**2 * 12 == pytest.approx(4, rel=1e-4)  # the geometric mean of 4**2 and 1**2
    assert best.f[2] / best.f[1] == pytest.approx(4, rel=1e-3)


def test_weights_trade_one_tensor_against_the_other():
    model = toy([[4.0], [1.0]], [[4.0, 1.0]], [[1.0], [1.0]], [[1.0, 1.0]])  # fc1 wants f2 = 4 f1, fc2 wants f1 = 4 f2
    first = optimal(model, weights={"fc2.weight": 0}, tol=1e-4)
    second = optimal(model, weights={"fc1.weight": 1e-9}, tol=1e-4)
    assert first.f[2] / first.f[1] == pytest.approx(4, rel=1e-2)
    assert second.f[1] / second.f[2] == pytest.approx(4, rel=1e-2)
    doubled = optimal(model, weights={"fc1.weight": 2, "fc2.weight": 2}, tol=1e-4)
    assert doubled.noise == pytest.approx(2 * optimal(model, tol=1e-4).noise, rel=1e-4)


# --------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["W8A8", "affine weights", "per channel"])
def test_no_point_of_a_grid_is_better(name, seed):
    rng = np.random.default_rng(seed)
    free = 2 + seed % 2
    net = eq.Graph.chain((2,), fc1=eq.Dense(rng.normal(size=(free, 2)) * rng.uniform(0.1, 3, (free, 1)), rng.normal(size=free)),
                         act=eq.ReLU(), fc2=eq.Dense(rng.normal(size=(2, free)) * rng.uniform(0.1, 3, free)))
    model = model_of(net, rng.normal(size=(8, 2)), SETTINGS[name])
    best = optimal(model, box=8, tol=1e-3)
    axis = np.exp(np.linspace(-1, 1, 41 if free == 2 else 15) * np.log(8))
    grid = [np.array([1, *f]) for f in np.stack(np.meshgrid(*[axis] * free), axis=-1).reshape(-1, free)]
    noise = [sum(t.noise(f) for t in model.tensors) for f in grid]
    assert min(noise) >= best.bound
    assert best.noise <= min(noise) * (1 + 1e-3)
    assert best.gap_db <= 1e-3
    near = best.f * np.exp(0.05 * rng.normal(size=(200, free + 1)) * np.array([0] + [1] * free))  # and no point near by
    nothing_beats(model, best, near)


# ------------------------------------------------------------------------------------------------ the whole table of nets


@SETTING
@pytest.mark.parametrize("objective", ["noise", "range"])
def test_every_network_of_the_table_is_solved(setting, objective):
    for net in NETS if objective == "noise" else NETS[::2]:
        model = model_of(net.graph, net.data(4), setting)
        best = optimal(model, objective=objective, tol=0.01)
        assert best.gap_db <= 0.01, net
        assert 0 < best.bound <= best.noise
        assert best.f[0] == 1
        assert (np.abs(np.log(best.f)) <= np.log(1024) * (1 + 1e-12)).all()
        if objective == "noise":
            assert looped_noise(model, best.f) == pytest.approx(best.noise, rel=1e-9)
            nothing_beats(model, best, [in_box(np.random.default_rng(3), model)])


@SETTING
def test_the_same_noise_from_every_start_and_orbit_point(setting):
    for net in NETS[1::7]:
        model = model_of(net.graph, net.data(4), setting)
        found = [optimal(model, start=start, tol=0.005)
                 for start in (None, *(in_box(np.random.default_rng(seed), model) for seed in range(2)))]
        for best in found:
            assert best.gap_db <= 0.005, net
        assert max(b.bound for b in found) <= min(b.noise for b in found)


@pytest.mark.parametrize("build", handmade.NETS, ids=lambda build: build.__name__)
def test_refactorizing_the_network_first_changes_nothing(build):
    graph = build(handmade.Maker(5))
    x = {name: np.random.default_rng(1).normal(size=(6, *shape)) for name, shape in graph.inputs.items()}
    resolved = eq.Factorization.identity(graph).channels
    rng = np.random.default_rng(2)
    moved = eq.Factorization(resolved, np.exp2(np.append(0.0, rng.integers(-2, 3, resolved.degrees_of_freedom))))
    one, other = (optimal(model_of(g, x), box=2.0**20, tol=0.005) for g in (graph, moved.apply(graph)))
    assert one.gap_db <= 0.005
    assert other.gap_db <= 0.005
    assert one.bound <= other.noise * (1 + 1e-6)  # statistics of a float32 network are rounded
    assert other.bound <= one.noise * (1 + 1e-6)


@settings(max_examples=40)
@given(networks().flatmap(lambda g: st.tuples(st.just(g), batches(g))), st.sampled_from(sorted(SETTINGS)), st.integers(0, 9))
def test_neither_rules_nor_chance_beat_the_bound_on_random_networks(drawn, name, seed):
    graph, x = drawn
    model = model_of(graph, x, SETTINGS[name])
    best = optimal(model)
    assert best.bound <= best.noise <= looped_noise(model, np.ones(len(best.f))) * (1 + TINY)
    assert best.gap_db <= 0.5
    rng = np.random.default_rng(seed)
    rivals = [in_box(rng, model) for _ in range(2)]
    stats = eq.calibrate(graph, x)
    for method in ("one_step", "two_step", "cross_layer"):
        f = eq.equalize(graph, method, stats=stats).factorization.free
        if (np.abs(np.log(f)) <= np.log(1024)).all():
            rivals.append(f)
    nothing_beats(model, best, rivals)
    assert best.noise <= min(looped_noise(model, f) for f in rivals) * 10 ** (best.gap_db / 10) * (1 + TINY)


# --------------------------------------------------------------------------------------------------------- certificate


def table_model(name="residual", setting=SETTINGS["W8A8"]):
    (net,) = [net for net in NETS if net.name == name]
    return model_of(net.graph, net.data(8), setting)


@pytest.mark.parametrize("max_iter", [0, 1, 3, 10])
def test_the_bound_holds_however_early_the_search_ends(max_iter):
    model = table_model()
    best, early = optimal(model, tol=1e-3), optimal(model, tol=0, max_iter=max_iter)
    assert early.iterations <= max_iter
    assert early.bound <= best.noise
    assert early.noise >= best.bound


def test_descent_on_the_exact_noise_does_not_get_below_the_bound():
    model = table_model()
    best = optimal(model, tol=1e-3)
    rng, f = np.random.default_rng(0), best.f.copy()
    noise = looped_noise(model, f)
    for scale in np.geomspace(0.1, 1e-5, 300):
        tried = np.clip(f * np.exp(scale * rng.normal(size=len(f))), 1 / 1024, 1024)
        tried[0] = 1
        if (value := looped_noise(model, tried)) < noise:
            f, noise = tried, value
    assert best.bound <= noise <= best.noise


def forget_the_slope(goal, now, t, limit):
    return sum(term.geometric(share, goal.spread(t)) for term, share in zip(goal.terms, now.shares, strict=True))


def maxima_for_geometric_means(self, share, u):
    return float((share * self.exact(u)).sum() - (share * np.log(share)).sum())


def entropy_twice(self, share, u, right=module.Term.geometric):
    return right(self, share, u) - float((share * np.log(share)).sum())


@pytest.mark.parametrize(("owner", "name", "plant", "exponent", "steps"), [
    (module.Goal, "lower_bound", forget_the_slope, 64.0, 1),
    (module.Term, "geometric", maxima_for_geometric_means, 2.0, 12),
    (module.Term, "geometric", entropy_twice, 2.0, 12),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_bound_is_caught(monkeypatch, owner, name, plant, exponent, steps):
    model = table_model()
    monkeypatch.setattr(module, "FIRST_EXPONENT", exponent)
    right = optimal(model, max_iter=steps, tol=0)
    monkeypatch.setattr(owner, name, plant)
    wrong = optimal(model, max_iter=steps, tol=0)
    monkeypatch.undo()
    f = optimal(model, tol=1e-4).f
    nothing_beats(model, right, [f])
    with pytest.raises(AssertionError, match="beats the bound"):
        nothing_beats(model, wrong, [f])


@pytest.mark.parametrize("name", ["residual", "product", "grouped queries, rotary"])
def test_the_line_lies_below_the_exact_objective_everywhere(name):
    """The certificate before it is minimised over the box: ``c + g.t`` against the exact noise at random points."""
    for setting in SETTINGS.values():
        model = table_model(name, setting)
        goal = module._goal(model, "noise", {})
        rng = np.random.default_rng(3)
        for p in (2.0, 8.0, 32.0):
            t = np.log(in_box(rng, model, 8))
            for term in goal.terms:
                term.begin(goal.spread(t), p)
            now = goal.at(t)
            constant = sum(term.geometric(s, goal.spread(t)) for term, s in zip(goal.terms, now.shares, strict=True))
            assert constant <= np.log(looped_noise(model, np.exp(t))) + TINY
            for _ in range(5):
                v = np.log(in_box(rng, model))
                assert constant + now.slope @ (v - t) <= np.log(looped_noise(model, np.exp(v))) + TINY


# --------------------------------------------------------------------------------------------------------------- ridge


@pytest.mark.parametrize("ridge", [0.001, 0.1, 3.0])
@pytest.mark.parametrize("name", ["residual", "product", "grouped queries, rotary"])
def test_no_factors_beat_the_bound_of_a_ridge(name, ridge):
    """The objective by its formula, ``10 log10 N + ridge sum (log f)**2`` in dB, at the optimum, near it and far away."""
    rng = np.random.default_rng(8)
    for setting in SETTINGS.values():
        model = table_model(name, setting)
        best = optimal(model, ridge=ridge, tol=0.02)

        def decibels(f, model=model):
            return 10 * np.log10(looped_noise(model, f)) + ridge * (np.log(f) ** 2).sum()
        assert 10 * np.log10(best.noise) == pytest.approx(decibels(best.f), abs=1e-6)
        assert best.gap_db <= 0.02 and best.bound < best.noise
        for scale in (0.01, 0.3, 3):
            for _ in range(5):
                t = np.clip(np.log(best.f) + scale * rng.normal(size=len(best.f)), -np.log(1024), np.log(1024))
                t[0] = 0
                assert 10 * np.log10(best.bound) <= decibels(np.exp(t))


def test_the_higher_the_ridge_the_less_changes():
    model = table_model("residual", SETTINGS["W8A8"])
    found = [optimal(model, ridge=ridge, tol=1e-3) for ridge in (0, 0.01, 0.1, 1, 10, 1e4)]
    changes = [(np.log(best.f) ** 2).sum() for best in found]
    noises = [looped_noise(model, best.f) for best in found]
    assert changes == sorted(changes, reverse=True) and changes[-1] < 1e-4 * changes[0]
    assert all(a <= b * 1.001 for a, b in itertools.pairwise(noises))


@pytest.mark.parametrize("ridge", [-1, np.nan, np.inf])
def test_a_ridge_is_a_number_of_decibels(ridge):
    for make in (lambda: optimal(table_model("residual", SETTINGS["W8A8"]), ridge=ridge), lambda: eq.Optimal(ridge=ridge)):
        with pytest.raises(ValueError, match="ridge must be a finite number of dB, at least 0, got"):
            make()


# --------------------------------------------------------------------------------------------------------- derivatives


@SETTING
@pytest.mark.parametrize("objective", ["noise", "range"])
@pytest.mark.parametrize("net", ["conv used twice", "square and cube made equal"])
def test_slopes_are_the_derivatives(setting, objective, net):
    model = table_model(net, setting)
    goal = module._goal(model, objective, {}, ridge=0.5)
    rng = np.random.default_rng(4)
    t = np.log(in_box(rng, model, 3))
    for p in (4.0, 16.0):
        for term in goal.terms:
            term.begin(goal.spread(t), p)
        t = t + 0.1 * rng.normal(size=len(t))
        t[0] = 0
        slope = goal.at(t).slope
        for number in range(1, len(t)):
            step = 1e-5 * np.eye(len(t))[number]
            expected = (goal.at(t + step).value - goal.at(t - step).value) / 2e-5
            assert slope[number] == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("net", ["residual", "square", "attention"])
@pytest.mark.parametrize("name", ["W8A8", "weights", "affine weights"])
def test_the_quadratic_model_is_the_second_derivative(monkeypatch, name, net):
    """With every coupling taken one by one, the Newton step solves the equation with the differenced slope."""
    monkeypatch.setattr(logsums, "COUPLING", 0.0)
    monkeypatch.setattr(logsums, "CG_STEPS", 300)
    model = table_model(net, SETTINGS[name])
    goal = module._goal(model, "noise", {}, ridge=0.5)
    t = np.log(in_box(np.random.default_rng(5), model, 1.5))
    for term in goal.terms:
        term.begin(goal.spread(t), 4.0)
    now = goal.at(t)
    free = np.ones(len(t), bool)
    free[0] = False
    step = goal.newton_step(now, free)
    h = 1e-5
    second = (goal.at(t + h * step).slope - goal.at(t - h * step).slope) / (2 * h)
    now = goal.at(t)
    # the logarithm of the sum has one term more, which the steps leave out: - slope slope'
    of_noise = now.slope - 2 * goal.ridge * t
    second += of_noise * float(of_noise @ step)
    assert second[1:] == pytest.approx(-now.slope[1:], rel=1e-4, abs=1e-5 * np.abs(now.slope).max())


# ---------------------------------------------------------------------------------------------------------- degenerate


def test_no_tensors_no_noise():
    net = NETS[0]
    model = noise_model(net.graph, None, weights=None, activations=None, sensitivities=unit_sensitivities(net.graph))
    best = optimal(model)
    assert (best.noise, best.bound, best.gap_db, best.iterations) == (0, 0, 0, 0)
    assert (best.f == 1).all()
    assert optimal(model, objective="range").gap_db == 0


def test_no_free_channel():
    (net,) = [net for net in NETS if net.name == "one layer"]
    model = model_of(net.graph, net.data(4))
    best = optimal(model)
    assert best.f.tolist() == [1]
    assert best.noise == pytest.approx(looped_noise(model, np.ones(1)))
    assert best.gap_db <= TINY


@pytest.mark.parametrize("objective", ["noise", "range"])
def test_dead_channels_keep_the_factor_one(objective):
    w1, w2 = np.array([[4.0], [0.0], [1.0]]), np.array([[1.0, 0.0, 2.0]])
    best = optimal(toy(w1, w2, (w1 != 0) * 1.0, (w2 != 0) * 1.0), objective=objective, tol=1e-3)
    assert best.f[2] == 1
    assert best.gap_db <= 1e-3


@SETTING
def test_half_dead_and_nearly_dead_channels(setting):
    rng = np.random.default_rng(6)
    w1, w2 = rng.normal(size=(6, 3)), rng.normal(size=(2, 6))
    w1[0] = 0  # made dead, still read
    w2[:, 1] = 0  # alive, but read by nobody
    w1[2] *= 1e-12
    w2[:, 3] *= 1e-9
    net = eq.Graph.chain((3,), fc1=eq.Dense(w1), act=eq.ReLU(), fc2=eq.Dense(w2))
    for objective in ("noise", "range"):
        best = optimal(model_of(net, rng.normal(size=(8, 3)), setting), objective=objective, tol=0.01)
        assert best.gap_db <= 0.01
        assert np.isfinite(best.f).all()


@SETTING
def test_constant_activations_and_zero_sensitivities(setting):
    net = eq.Graph.chain((2,), fc1=eq.Dense(np.eye(2), np.array([1.0, 2.0])), act=eq.ReLU(), fc2=eq.Dense(np.array([[1.0, 3.0]])))
    best = optimal(model_of(net, np.ones((4, 2)), setting))
    assert best.gap_db <= 0.05
    stats = eq.calibrate(net, np.ones((4, 2)))
    none = Sensitivities({}, {}, 1.0)
    best = optimal(noise_model(net, stats, weights=setting[0], activations=setting[1], sensitivities=none))
    assert best.noise == best.gap_db == 0


def test_logarithms_are_taken_in_double_precision():
    assert safe_log(np.float32([0, 2, 3])).tolist() == [-math.inf, math.log(2), math.log(3)]


def test_equal_runs_are_equal_bit_for_bit():
    one, other = optimal(table_model()), optimal(table_model())
    assert one.f.tobytes() == other.f.tobytes()
    assert (one.noise, one.bound, one.residual) == (other.noise, other.bound, other.residual)


@pytest.mark.parametrize("box", [1.5, 1e6, 1e60])
def test_small_and_huge_boxes(box):
    model = table_model()
    best = optimal(model, box=box)
    assert best.gap_db <= 0.05
    assert best.bound <= optimal(model, tol=1e-3).noise or box < 1024


def test_a_larger_box_is_never_worse():
    model = table_model()
    found = [optimal(model, box=box, tol=1e-3) for box in (1, 1.1, 1.5, 3, 1024)]
    for small, large in itertools.pairwise(found):
        assert large.bound <= small.noise * (1 + TINY)


def test_what_is_said_about_it():
    best = optimal(table_model(), tol=0.05)
    assert isinstance(best, Optimum)
    assert best.residual[-1] == pytest.approx(best.gap_db, abs=1e-6)
    assert list(best.residual) == sorted(best.residual, reverse=True)
    assert best.gap_db <= 0.05 < best.residual[-2]


@pytest.mark.parametrize(("options", "message"), [
    ({"objective": "bits"}, "unknown objective 'bits': use 'noise' or 'range'"),
    ({"box": 0.5}, "box must be a number from 1 to 1e60, got 0.5"),
    ({"box": np.nan}, "box must be a number"),
    ({"box": np.inf}, "box must be a number"),
    ({"start": np.ones(3)}, "start must hold 11 positive factors, by label"),
    ({"start": np.zeros(11)}, "start must hold 11 positive factors"),
    ({"weights": {"fc": 1.0}}, "weights names 'fc', which is not among the model's tensors"),
    ({"weights": {"stem.weight": -1.0}}, "the weight of 'stem.weight' must be a finite number of at least 0, got -1.0"),
])
def test_unusable_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        optimal(table_model(), **options)
