"""The certificate is sound and tight, and the noise that it speaks about is the noise that comes."""

import itertools
from dataclasses import replace

import handmade
import numpy as np
import pytest

import eqfact as eq
from eqfact.optimal import optimal

W8, A8 = eq.UniformQuantizer(8), eq.UniformQuantizer(8, symmetric=False)
PER_CHANNEL = eq.UniformQuantizer(8, granularity="per_channel")
AFFINE = eq.UniformQuantizer(8, symmetric=False)


def setting(build):
    m = handmade.Maker(1)
    net = eq.fold_batchnorm(build(m))
    data = m.data(net, 16)
    return net, data, eq.calibrate(net, data)


def random_factorizations(model, count, rng):
    size = model.channels.degrees_of_freedom + 1
    for _ in range(count):
        f = np.exp(rng.normal(scale=rng.choice([0.1, 1, 3]), size=size).clip(-6.9, 6.9))
        f[0] = 1
        yield f


def noise_of(model, f):
    """The model's formula by loops over every entry."""
    total = 0.0
    for t in model.tensors:
        groups, rows, inner = t.sensitivity.shape
        grids = {}
        for g, o, i in itertools.product(range(groups), range(rows), range(inner)):
            ratio = f[t.made[g * rows + o]] / f[t.read[g * inner + i]]
            tops, spread = grids.setdefault((g, o) if t.by_row else (), ([0.0] * len(t.parts), [0.0]))
            for k, part in enumerate(t.parts):
                tops[k] = max(tops[k], part[g, o, i] * ratio)
            spread[0] += t.sensitivity[g, o, i] / ratio**2
        total += sum((sum(tops) / t.steps) ** 2 / 12 * spread[0] for tops, spread in grids.values())
    return total


@pytest.mark.parametrize("weights", [W8, PER_CHANNEL, AFFINE], ids=["per tensor", "per channel", "affine"])
@pytest.mark.parametrize("build", handmade.NETS, ids=lambda build: build.__name__)
def test_nothing_beats_the_bound_and_the_optimum_beats_every_rule(build, weights):
    net, _, stats = setting(build)
    model = eq.noise_model(net, stats, weights=weights, activations=A8, sensitivities=eq.forward_sensitivities(net, stats))
    best = optimal(model)
    assert best.bound <= best.noise and best.gap_db <= 0.05
    assert best.noise == pytest.approx(noise_of(model, best.f), rel=1e-9)
    rng = np.random.default_rng(0)
    around = (best.f * np.r_[1.0, np.exp(rng.normal(scale=s, size=len(best.f) - 1))] for s in (1e-3, 1e-2, 0.1) for _ in range(10))
    for f in (*random_factorizations(model, 20, rng), *around):
        assert noise_of(model, f) >= best.bound
    for method in ("one_step", "two_step", "cross_layer"):
        found = eq.equalize(net, method, stats=stats).factorization
        assert sum(model.terms(found).values()) >= best.bound
        assert sum(model.terms(found).values()) >= best.noise * 10 ** (-best.gap_db / 10)


def test_a_wrong_bound_would_be_found():
    net, _, stats = setting(handmade.plain)
    model = eq.noise_model(net, stats, weights=W8, activations=A8, sensitivities=eq.forward_sensitivities(net, stats))
    best = optimal(model)
    assert noise_of(model, best.f) < best.bound * 10 ** 0.01  # a bound 0.1 dB higher would lie above this very factorization


def test_two_channels_agree_with_a_grid_of_factors():
    net = eq.Graph.chain((1,), fc1=eq.Dense(np.array([[4.0], [0.5]])), act=eq.ReLU(), fc2=eq.Dense(np.array([[1.0, 3.0], [0.2, 0.1]])))
    stats = eq.calibrate(net, np.array([[1.0], [0.5]]))
    model = eq.noise_model(net, stats, weights=W8, activations=A8, sensitivities=eq.forward_sensitivities(net, stats))
    grid = np.exp(np.linspace(-4, 4, 161))
    smallest = min(noise_of(model, np.array([1.0, a, b])) for a in grid for b in grid)
    best = optimal(model, tol=1e-3)
    assert best.bound <= smallest and best.noise <= smallest <= best.noise * 1.02


@pytest.mark.parametrize("build", handmade.NETS, ids=lambda build: build.__name__)
def test_forward_sensitivities_do_not_depend_on_the_equivalent_network(build):
    net, _, stats = setting(build)
    moved = eq.Factorization.identity(net)
    moved = eq.Factorization(moved.channels, np.exp2(np.r_[0, np.random.default_rng(1).integers(-3, 4, len(moved.by_label) - 1)]))
    there = moved.apply(net)
    here = eq.noise_model(net, stats, weights=W8, activations=A8, sensitivities=eq.forward_sensitivities(net, stats))
    sensitivities = eq.forward_sensitivities(there, moved.apply(stats))
    other = eq.noise_model(there, moved.apply(stats), weights=W8, activations=A8, sensitivities=sensitivities)
    for name, noise in other.terms().items():
        assert noise == pytest.approx(here.terms(moved)[name])


@pytest.mark.parametrize("build", [handmade.plain, handmade.mobile])
def test_start_and_orbit_do_not_matter(build):
    net, data, stats = setting(build)
    sensitivities = eq.gradient_sensitivities(net, [data])
    model = eq.noise_model(net, stats, weights=W8, activations=A8, sensitivities=sensitivities)
    rng = np.random.default_rng(3)
    expected = optimal(model)
    for start in random_factorizations(model, 3, rng):
        again = optimal(model, start=start)
        assert abs(10 * np.log10(again.noise / expected.noise)) <= 0.1
    moved = eq.Factorization(model.channels, np.exp2(np.r_[0, rng.integers(-2, 3, len(expected.f) - 1)]))
    other, other_stats = moved.apply(net), moved.apply(stats)
    elsewhere = eq.noise_model(other, other_stats, weights=W8, activations=A8, sensitivities=eq.gradient_sensitivities(other, [data]))
    assert abs(10 * np.log10(optimal(elsewhere).noise / expected.noise)) <= 0.1


def test_where_nothing_is_free_the_gap_is_the_margin_for_roundoff():
    net = eq.Graph.chain((2,), fc=eq.Dense(np.eye(2)))
    result = eq.equalize(net, "optimal", stats=eq.calibrate(net, np.eye(2)))
    assert result.success and 0 <= result.gap_db < 1e-7 and np.array_equal(result.graph["fc"].op.weight, np.eye(2))


def test_dead_and_constant_channels_get_finite_factors_and_keep_the_function():
    weight = np.array([[1.0, 2.0], [0.0, 0.0], [1e-9, 0.0], [3.0, 1.0]])
    net = eq.Graph.chain((2,), fc1=eq.Dense(weight, np.array([0.1, 0.5, 0.2, 0.0])), act=eq.ReLU6(),
                         fc2=eq.Dense(np.array([[1.0, 2.0, 1e-8, 0.0], [0.5, 0.0, 1.0, 0.0]])))
    x = np.random.default_rng(0).normal(size=(32, 2))
    result = eq.equalize(net, "optimal", stats=eq.calibrate(net, x))
    f = result.factorization["act"]
    assert np.isfinite(f).all() and (f >= 1 / 1024).all() and (f <= 1024).all() and eq.verify(net, result.graph, x)


def test_harmless_returns_the_network_where_the_expected_noise_would_not_fall():
    net, _, stats = setting(handmade.plain)
    best = eq.equalize(net, "optimal", stats=stats)
    again = eq.equalize(best.graph, "one_step", stats=best.factorization.apply(stats), harmless=True)
    assert again.predicted[0] == again.predicted[1] and "returned as it is" in again.message
    assert all(np.array_equal(a.op.weight, b.op.weight) for a, b in zip(best.graph, again.graph, strict=True) if hasattr(a.op, "weight"))


def test_range_objective_needs_no_data_and_lowers_the_product_of_ranges():
    net, _, _ = setting(handmade.plain)

    def product(graph):
        return sum(np.log(np.abs(n.op.weight).max()) for n in graph if isinstance(n.op, eq.Weighted))

    result = eq.equalize(net, eq.Optimal(objective="range"))
    assert result.success and product(result.graph) < product(net) and product(result.graph) <= product(eq.equalize(net).graph) + 0.05


def smooth_net(rng):
    """Smooth layers only, so that small noise passes linearly."""
    return eq.Graph.chain((3, 4, 4), conv=eq.Conv(rng.normal(size=(4, 3, 3, 3)), padding=1), act=eq.SiLU(),
                          depth=eq.Conv(rng.normal(size=(4, 1, 3, 3)), groups=4), flat=eq.Flatten(), fc=eq.Dense(rng.normal(size=(2, 16))))


def test_expected_noise_is_that_of_injected_noise():
    rng = np.random.default_rng(5)
    net, x = smooth_net(rng), rng.normal(size=(4, 3, 4, 4))
    stats = eq.calibrate(net, x)
    sensitivities = eq.gradient_sensitivities(net, [x], projections=200)
    w12, a12 = eq.UniformQuantizer(12), eq.UniformQuantizer(12, symmetric=False)
    terms = eq.noise_model(net, stats, weights=w12, activations=a12, sensitivities=sensitivities).terms()
    truth = eq.forward(net, x)
    for name in ("conv", "depth", "fc"):
        step, powers = w12.weight_grid(net[name].op).scale, []
        for _ in range(300):
            error = rng.uniform(-0.5, 0.5, net[name].op.weight.shape) * step
            op = replace(net[name].op, weight=net[name].op.weight + error)
            powers.append(((eq.forward(net.with_ops({name: op}), x) - truth) ** 2).sum() / len(x))
        assert terms[f"{name}.weight"] == pytest.approx(np.mean(powers), rel=0.15)


@pytest.mark.parametrize("bits", [10, 12])
def test_expected_noise_is_that_of_quantization_within_two_decibels(bits):
    rng = np.random.default_rng(6)
    net = smooth_net(rng)
    x = rng.normal(size=(32, 3, 4, 4))
    stats = eq.calibrate(net, x)
    quantizers = {"weights": eq.UniformQuantizer(bits), "activations": eq.UniformQuantizer(bits, symmetric=False)}
    model = eq.noise_model(net, stats, sensitivities=eq.gradient_sensitivities(net, [x], projections=8), **quantizers)
    measured = eq.sqnr(eq.forward(net, x), eq.forward(eq.quantize(net, stats=stats, **quantizers), x))
    assert abs(model.sqnr() - measured) < 2


def test_gradient_sensitivities_are_the_squares_of_the_jacobian():
    rng = np.random.default_rng(7)
    w1, w2, x = rng.normal(size=(3, 2)), rng.normal(size=(2, 3)), rng.normal(size=(5, 2))
    net = eq.Graph.chain((2,), fc1=eq.Dense(w1), tanh=eq.Tanh(), fc2=eq.Dense(w2))
    found = eq.gradient_sensitivities(net, [x], projections=4000)
    slope = 1 - np.tanh(x @ w1.T) ** 2
    expected = np.einsum("no,ni->oi", (w2**2).sum(axis=0) * slope**2, x**2) / len(x)
    np.testing.assert_allclose(found.weights["fc1"][0], expected, rtol=0.1)
    np.testing.assert_allclose(found.activations["tanh"], (w2**2).sum(axis=0), rtol=0.1)
    assert found.signal == pytest.approx((eq.forward(net, x) ** 2).sum() / len(x))


def test_predicted_terms_add_up_to_the_predicted_sqnr():
    net, data, stats = setting(handmade.mobile)
    sensitivities = eq.gradient_sensitivities(net, [data])
    grids = {"weights": W8, "activations": A8}
    terms = eq.predict_noise(net, stats, sensitivities=sensitivities, **grids)
    total = eq.noise_model(net, stats, sensitivities=sensitivities, **grids).sqnr()
    assert -10 * np.log10(sum(10 ** (t / 10) for t in terms.values())) == pytest.approx(total)


@pytest.mark.parametrize("objective", ["noise", "range"])
@pytest.mark.parametrize("build", [handmade.mobile, handmade.residual], ids=lambda f: f.__name__)
def test_the_gap_of_powers_of_two_is_that_of_the_factors_returned(build, objective):
    net, _, stats = setting(build)
    method = eq.Optimal(ranges=stats, objective=objective, ridge=0)
    free, exact = (eq.equalize(net, method, stats=stats, exact=exact) for exact in (False, True))
    assert exact.bound == pytest.approx(free.bound)
    assert exact.gap_db > free.gap_db
    assert exact.success == free.success
    assert f"by more than {exact.gap_db:.2g} dB" in exact.message
    if objective == "noise":
        model = eq.noise_model(net, stats, weights=W8, activations=A8, sensitivities=eq.forward_sensitivities(net, stats))
        for result in (free, exact):
            noise = sum(model.terms(result.factorization).values())
            assert result.gap_db == pytest.approx(10 * np.log10(noise / result.bound), abs=1e-6)


def test_held_labels_keep_the_factor_one_and_no_other_factors_with_them_beat_the_bound():
    net, data, stats = setting(handmade.mobile)
    model = eq.noise_model(net, stats, weights=W8, activations=A8, sensitivities=eq.gradient_sensitivities(net, [data]))
    rng = np.random.default_rng(11)
    held = rng.random(model.channels.degrees_of_freedom + 1) < 0.4
    best, free = optimal(model, held=held, tol=0.02), optimal(model, tol=0.02)
    assert (best.f[held] == 1).all()
    assert best.gap_db <= 0.02
    assert best.noise > free.noise
    for f in random_factorizations(model, 200, rng):
        f[held] = 1
        assert sum(t.noise(f) for t in model.tensors) >= best.bound
    for wrong in (np.zeros(3, bool), np.zeros((2, 2), bool)):
        with pytest.raises(ValueError, match="held must be a mask of"):
            optimal(model, held=wrong)


def test_optimal_holds_dead_channels_and_says_what_it_holds():
    rng = np.random.default_rng(3)
    w1, w2, x = rng.normal(size=(6, 4)), rng.normal(size=(3, 6)), rng.normal(size=(50, 4))
    w1[2], w1[4], w2[:, 4] = 0, w1[4] * 1e-9, w2[:, 4] * 1e9
    net = eq.Graph.chain((4,), fc1=eq.Dense(w1, rng.normal(size=6) * [1, 1, 1, 1, 0, 1]), act=eq.ReLU(), fc2=eq.Dense(w2))
    result = eq.equalize(net, "optimal", stats=eq.calibrate(net, x))
    assert result.factorization["act"][2] == 1
    assert result.factorization["act"][4] == pytest.approx(1024)
    assert "1 dead channel keeps the factor 1" in result.message
    assert "channels held at the bound 1024" in result.message


def test_likely_ranges_are_optimised_for_and_seen_ones_predicted_with():
    net, _, stats = setting(handmade.mobile)
    likely = eq.likely_ranges(net, stats)
    plain, other = eq.equalize(net, eq.Optimal(ranges=stats), stats=stats), eq.equalize(net, "optimal", stats=stats)
    assert other.predicted[0] == plain.predicted[0]
    assert other.predicted[1] < plain.predicted[1] + plain.gap_db
    assert other.bound != plain.bound
    same = eq.equalize(net, eq.Optimal(ranges=likely), stats=stats)
    assert same.predicted == other.predicted


@pytest.mark.parametrize(("method", "error", "message"), [
    (lambda: eq.Optimal(objective="foo"), ValueError, "unknown objective 'foo': use 'noise' or 'range'"),
    (lambda: eq.Optimal(max_factor=0.5), ValueError, "max_factor must be a finite number of at least 1, got 0.5"),
    (lambda: eq.OneStep(max_factor=np.inf), ValueError, "max_factor must be a finite number of at least 1, got inf"),
    (lambda: eq.Swept("one_step"), TypeError, "a rule is a function from a Block to factors"),
    (lambda: eq.equalize(setting(handmade.mobile)[0], "three_step"), ValueError, "unknown method 'three_step': use 'one_step', "),
    (lambda: eq.equalize(setting(handmade.mobile)[0], eq.CrossLayer), TypeError, r"a method is a value: give CrossLayer\(...\)"),
    (lambda: eq.equalize(setting(handmade.mobile)[0], 3), TypeError, "a method is a name, a rule or a value such as eqfact.CrossLayer"),
    (lambda: eq.equalize(setting(handmade.mobile)[0], "two_step"), ValueError, "'two_step' needs the ranges of activations: give data="),
    (lambda: eq.equalize(setting(handmade.mobile)[0], "optimal"), ValueError, "expected noise needs the ranges of activations: give data="),
    (lambda: eq.CrossLayer(preactivation=True), TypeError, "preactivation")])
def test_bad_methods_and_options_are_refused(method, error, message):
    with pytest.raises(error, match=message):
        method()


def test_the_gap_of_a_network_returned_as_it_is_is_its_own():
    """At the optimum nothing can fall any more, up to powers of two: the input comes back, with its own distance from the bound."""
    net, _, stats = setting(handmade.mobile)
    best = eq.equalize(net, eq.Optimal(ranges=stats, tol=1e-3, ridge=0), stats=stats)
    again_stats = best.factorization.apply(stats)
    again = eq.equalize(best.graph, eq.Optimal(ranges=again_stats, ridge=0), stats=again_stats, exact=True, harmless=True)
    assert "returned as it is" in again.message
    model = eq.noise_model(best.graph, again_stats, weights=W8, activations=A8,
                           sensitivities=eq.forward_sensitivities(best.graph, again_stats))
    assert again.gap_db == pytest.approx(10 * np.log10(sum(model.terms().values()) / again.bound), abs=1e-6)
    assert again.gap_db < 0.1
