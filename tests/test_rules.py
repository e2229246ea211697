"""The rules against the formulas of PAPER 2, 3, 4 and 7, written out as loops over plain numbers, and the paper's promises about them."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

import eqfact as eq
from eqfact import rules
from eqfact.rules import Block, Maker

CASES = 2000


def single(kernel, activation, consumed, preactivation=None, read=None):
    """A block of one layer."""
    kernel = np.array(kernel, float)
    before = None if preactivation is None else np.array(preactivation, float)
    maker = Maker(np.arange(len(kernel)), kernel, np.array(activation, float), before)
    return Block((maker,), kernel, np.array(consumed if read is None else read, float), np.array(consumed, float))


# ------------------------------------------------------------------------------------------------ the formulas, as loops


def paper_formula(kernel, activation, m, preactivation=None, bound=16.0):
    """PAPER 3; with all m_i = 1 it is PAPER 2. Channels are plain numbers, none of them dead; m_i is taken as 1 / 1024 at least."""
    m = [max(w, 1 / 1024) for w in m]
    k_top = max(k * w for k, w in zip(kernel, m, strict=True))
    a_top = max(a * w for a, w in zip(activation, m, strict=True))
    factors = []
    for i, (k, a) in enumerate(zip(kernel, activation, strict=True)):
        f = min(k_top / k, min(a_top / a, bound))
        if preactivation is not None:
            f = min(f, max(a_top / preactivation[i], 1.0))
        factors.append(f)
    return factors


def consumed_by(weights):
    """PAPER 3: m_i, the largest over consumers of max|W[:, i]| / max|W|; weights are lists of rows."""
    m = []
    for i in range(len(weights[0][0])):
        m.append(max(max(abs(row[i]) for row in w) / max(abs(v) for row in w for v in row) for w in weights))
    return m


def random_layer(rng):
    """Ranges of one layer over ten decades, and the weights of its one to three consumers."""
    channels = int(rng.integers(1, 9))
    kernel, activation, preactivation = (np.exp(rng.normal(scale=2.0, size=channels)).tolist() for _ in range(3))
    weights = [(rng.normal(size=(int(rng.integers(1, 5)), channels)) * np.exp(rng.normal(scale=2, size=channels))).tolist()
               for _ in range(int(rng.integers(1, 4)))]
    return kernel, activation, preactivation, weights


def random_layers(seed):
    rng = np.random.default_rng(seed)
    return (random_layer(rng) for _ in range(CASES))


def test_one_step_is_the_papers_formula():
    for kernel, activation, _, weights in random_layers(1):
        got = rules.one_step(single(kernel, activation, consumed_by(weights)))
        assert got.tolist() == paper_formula(kernel, activation, [1.0] * len(kernel))


def test_two_step_is_the_papers_formula():
    for kernel, activation, _, weights in random_layers(2):
        m = consumed_by(weights)
        assert rules.two_step(single(kernel, activation, m)).tolist() == paper_formula(kernel, activation, m)


@pytest.mark.parametrize("bound", [1.0, 4.0, 100.0])
def test_the_bound_of_16_is_an_option(bound):
    for kernel, activation, _, weights in random_layers(3):
        m = consumed_by(weights)
        assert rules.one_step(single(kernel, activation, m), max_factor=bound).tolist() == paper_formula(
            kernel, activation, [1.0] * len(m), bound=bound)
        assert rules.two_step(single(kernel, activation, m), max_factor=bound).tolist() == paper_formula(kernel, activation, m, bound=bound)


def test_the_preactivation_limits_both_rules_by_max_of_A_over_P_and_1():
    limited = 0
    for kernel, activation, preactivation, weights in random_layers(4):
        m = consumed_by(weights)
        block = single(kernel, activation, m, preactivation)
        assert rules.one_step(block).tolist() == paper_formula(kernel, activation, [1.0] * len(m), preactivation)
        assert rules.two_step(block).tolist() == paper_formula(kernel, activation, m, preactivation)
        limited += rules.one_step(block).tolist() != rules.one_step(single(kernel, activation, m)).tolist()
    assert limited > CASES / 10


def test_the_preactivation_limit_by_hand():
    free = single([1.0, 0.125], [4.0, 0.25], [1.0, 1.0])
    assert rules.one_step(free).tolist() == [1.0, 8.0]
    assert rules.one_step(single([1.0, 0.125], [4.0, 0.25], [1.0, 1.0], preactivation=[0.0, 2.0])).tolist() == [1.0, 2.0]  # 4 / 2
    assert rules.one_step(single([1.0, 0.125], [4.0, 0.25], [1.0, 1.0], preactivation=[9.0, 8.0])).tolist() == [1.0, 1.0]  # never below 1


def test_cross_layer_is_the_root_of_read_over_made():
    rng = np.random.default_rng(5)
    made, read = np.exp(rng.normal(scale=5, size=(2, CASES)))
    got = rules.cross_layer(Block((Maker(np.arange(CASES), made),), made, read, np.ones(CASES)))
    for f, made_i, read_i in zip(got.tolist(), made.tolist(), read.tolist(), strict=True):
        assert math.isclose(f, math.sqrt(read_i / made_i), rel_tol=4e-16)


def test_cross_layer_makes_both_ranges_of_every_channel_the_same():
    rng = np.random.default_rng(6)
    made, read = np.exp(rng.normal(scale=5, size=(2, CASES)))
    f = rules.cross_layer(Block((Maker(np.arange(CASES), made),), made, read, np.ones(CASES)))
    np.testing.assert_allclose(f * made, read / f, rtol=1e-15)


# ------------------------------------------------------------------------------------------------ what the paper promises


def test_one_step_factors_lie_within_1_and_16():
    for kernel, activation, _, weights in random_layers(7):
        f = rules.one_step(single(kernel, activation, consumed_by(weights)))
        assert f.min() >= 1
        assert f.max() <= 16


def test_two_step_never_goes_below_m():
    below_1 = 0
    for kernel, activation, _, weights in random_layers(8):
        m = consumed_by(weights)
        f = rules.two_step(single(kernel, activation, m))
        assert (f >= np.array(m) * (1 - 1e-15)).all()
        assert f.max() <= 16
        below_1 += f.min() < 1
    assert below_1 > CASES / 4


@pytest.mark.parametrize("rule", [rules.one_step, rules.two_step])
def test_neither_range_of_the_layer_grows_and_no_consumers_does(rule):
    up = 1 + 1e-15
    for kernel, activation, _, weights in random_layers(9):
        f = rule(single(kernel, activation, consumed_by(weights))).tolist()
        assert max(k * f_i for k, f_i in zip(kernel, f, strict=True)) <= max(kernel) * up
        assert max(a * f_i for a, f_i in zip(activation, f, strict=True)) <= max(activation) * up
        for w in weights:
            before = max(abs(v) for row in w for v in row)
            assert max(abs(v) / f_i for row in w for v, f_i in zip(row, f, strict=True)) <= before * up


def test_after_one_step_every_channel_reaches_a_range_of_the_layer_or_the_bound():
    for kernel, activation, _, weights in random_layers(10):
        f = rules.one_step(single(kernel, activation, consumed_by(weights)))
        full = np.maximum(np.array(kernel) * f / max(kernel), np.array(activation) * f / max(activation))
        assert ((full > 1 - 1e-12) | (f == 16)).all()


def test_two_step_attenuates_what_its_readers_hardly_use_where_one_step_does_not():
    block = single([1.0, 1.0], [1.0, 1.0], [1.0, 0.25])
    assert rules.one_step(block).tolist() == [1.0, 1.0]
    assert rules.two_step(block).tolist() == [1.0, 1.0]  # nothing to gain: channel 0 already fills both ranges
    block = single([2.0, 1.0], [2.0, 1.0], [0.25, 1.0])
    assert rules.one_step(block).tolist() == [1.0, 2.0]
    assert rules.two_step(block).tolist() == [0.5, 1.0]


# ------------------------------------------------------------------------------------------------ dead and extreme channels

ALL = [rules.one_step, rules.two_step, rules.cross_layer]


@pytest.mark.parametrize("rule", ALL)
@pytest.mark.parametrize("side", ["made", "read"])
def test_a_dead_channel_gets_factor_1_and_the_others_their_own(rule, side):
    rng = np.random.default_rng(11)
    for _ in range(100):
        kernel, activation, consumed = np.exp(rng.normal(size=(3, 5)))
        consumed /= consumed.max() * 1.01
        consumed[0] = 1.0
        (kernel if side == "made" else consumed)[3] = 0
        activation[3] = activation.min() / 2  # a constant channel still has an activation, which counts for the layer
        f = rule(single(kernel, activation, consumed))
        assert f[3] == 1
        others = [0, 1, 2, 4]
        if side == "made" or rule is not rules.one_step:  # where a channel that nobody reads does not count for its layer's own range
            assert f[others].tolist() == rule(single(kernel[others], activation[others], consumed[others])).tolist()


@pytest.mark.parametrize("rule", [rules.one_step, rules.two_step])
def test_a_channel_without_activation_gets_factor_1(rule):
    f = rule(single([1.0, 0.5, 0.25], [1.0, 0.0, 0.5], [1.0, 1.0, 1.0]))
    assert f.tolist() == [1.0, 1.0, 2.0]


@pytest.mark.parametrize("rule", ALL)
def test_a_layer_of_dead_channels_gets_ones(rule):
    zero = np.zeros(3)
    for block in (single(zero, zero, zero), single(zero, zero, np.ones(3)), single(np.ones(3), zero, zero)):
        assert rule(block).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("rule", ALL)
@pytest.mark.parametrize("makers", [1, 2])
def test_subnormal_and_huge_ranges_give_finite_positive_factors(rule, makers):
    extremes = [0.0, 5e-324, 1e-310, 1e-30, 1.0, 1e30, 1e300]
    rng = np.random.default_rng(12)
    for _ in range(500):
        kernel, activation, preactivation = (rng.choice(extremes, (makers, 4)) for _ in range(3))
        read = rng.choice(extremes[:-1], 4)
        consumed = np.minimum(read, 1.0)
        consumed[0] = 1.0
        block = Block(tuple(Maker(np.arange(4), kernel[i], activation[i], preactivation[i]) for i in range(makers)),
                      kernel.max(axis=0), read, consumed)
        f = rule(block)
        assert np.isfinite(f).all()
        assert (f > 0).all()


# ------------------------------------------------------------------------------------------------ residuals and concats (PAPER 4)


def residual_formula(candidates, m):
    """Each layer's vector is divided by its own minimum; the elementwise minimum is taken and floored by m_i."""
    shared = []
    for i in range(len(m)):
        shared.append(max(min(c[i] / min(c) for c in candidates), m[i]))
    return shared


@pytest.mark.parametrize(("rule", "uses_m"), [(rules.one_step, False), (rules.two_step, True)])
def test_residual_partners_share_the_elementwise_minimum_of_their_normalized_factors(rule, uses_m):
    rng = np.random.default_rng(13)
    for _ in range(500):
        size, partners = int(rng.integers(1, 6)), int(rng.integers(2, 4))
        kernel, activation = np.exp(rng.normal(size=(2, partners, size)))
        consumed = rng.uniform(0.05, 1, size)
        consumed[int(rng.integers(size))] = 1.0
        m = consumed.tolist() if uses_m else [1.0] * size
        candidates = [paper_formula(kernel[p].tolist(), activation[p].tolist(), m) for p in range(partners)]
        makers = tuple(Maker(np.arange(size), kernel[p], activation[p]) for p in range(partners))
        block = Block(makers, kernel.max(axis=0), np.ones(size), consumed)
        assert rule(block).tolist() == residual_formula(candidates, m)


def test_residual_sharing_by_hand():
    makers = (Maker(np.arange(3), np.array([1.0, 0.25, 0.5]), np.array([1.0, 0.125, 0.25])),  # alone 1, 4, 2
              Maker(np.arange(3), np.array([0.5, 0.25, 1.0]), np.array([0.25, 0.125, 1.0])))  # alone 2, 4, 1
    block = Block(makers, np.array([1.0, 0.25, 1.0]), np.ones(3), np.ones(3))
    assert rules.one_step(block).tolist() == [1.0, 4.0, 1.0]


def test_partners_that_share_only_some_channels_limit_each_other_there_alone():
    makers = (Maker(np.array([0, 1]), np.array([1.0, 0.25]), np.array([1.0, 0.125])),  # alone 1, 4
              Maker(np.array([1, 2]), np.array([0.5, 1.0]), np.array([0.25, 1.0])))  # alone 2, 1
    block = Block(makers, np.array([1.0, 0.5, 1.0]), np.ones(3), np.ones(3))
    assert rules.one_step(block).tolist() == [1.0, 2.0, 1.0]


def test_a_channel_dead_in_one_partner_follows_the_other():
    makers = (Maker(np.arange(2), np.array([1.0, 0.0]), np.array([1.0, 0.0])),
              Maker(np.arange(2), np.array([1.0, 0.25]), np.array([1.0, 0.125])))
    block = Block(makers, np.array([1.0, 0.25]), np.ones(2), np.ones(2))
    assert rules.one_step(block).tolist() == [1.0, 4.0]


def test_concat_mates_are_lifted_to_a_common_range_after_the_bound():
    # alone 1 and 16 (bound); activations then reach 2, a mate has 10: lifted by 5, beyond the bound
    maker = Maker(np.arange(2), np.array([1.0, 0.01]), np.array([2.0, 0.0625]), mates_activation=10.0)
    block = Block((maker,), maker.kernel, np.ones(2), np.ones(2))
    assert rules.one_step(block).tolist() == [5.0, 80.0]
    assert rules.two_step(block).tolist() == [5.0, 80.0]


def test_concat_lift_is_the_ratio_of_the_mates_range_to_the_range_reached():
    rng = np.random.default_rng(14)
    for kernel, activation, _, weights in random_layers(15):
        m = consumed_by(weights)
        mates = max(activation) * float(rng.uniform(1, 20))
        alone = paper_formula(kernel, activation, m)
        lift = mates / max(f * a for f, a in zip(alone, activation, strict=True))
        maker = Maker(np.arange(len(m)), np.array(kernel), np.array(activation), mates_activation=mates)
        got = rules.two_step(Block((maker,), maker.kernel, np.array(m), np.array(m)))
        assert got.tolist() == [f * min(max(lift, 1.0), 1024.0) for f in alone]


def test_the_mate_with_the_largest_range_is_not_lifted():
    maker = Maker(np.arange(2), np.array([1.0, 0.5]), np.array([4.0, 1.0]), mates_activation=4.0)
    assert rules.one_step(Block((maker,), maker.kernel, np.ones(2), np.ones(2))).tolist() == [1.0, 2.0]


def test_a_layer_with_pinned_channels_is_amplified_up_to_their_range_but_never_lifted():
    maker = Maker(np.arange(1), np.array([0.25]), np.array([0.5]), held_kernel=1.0, held_activation=4.0, mates_activation=40.0)
    assert rules.one_step(Block((maker,), maker.kernel, np.ones(1), np.ones(1))).tolist() == [4.0]


def test_channels_that_are_hardly_read_are_attenuated_by_1024_at_most():
    assert rules.two_step(single([1e12, 1.0], [1.0, 1.0], [1e-12, 1.0])).tolist() == [1 / 1024, 1.0]


def test_a_layer_of_next_to_no_activation_is_lifted_by_1024_at_most():
    maker = Maker(np.arange(1), np.array([1.0]), np.array([1e-310]), mates_activation=1e300)
    assert rules.one_step(Block((maker,), maker.kernel, np.ones(1), np.ones(1))).tolist() == [1024.0]


# ------------------------------------------------------------------------------------------------ normalisations


def normed(seed=0):
    rng = np.random.default_rng(seed)
    return eq.Graph({"x": (6, 5)}, [
        eq.Node("norm", eq.LayerNorm(np.exp(rng.normal(size=6)), rng.normal(size=6)), ["x"]),
        eq.Node("a", eq.Conv(rng.normal(size=(4, 6, 1))), ["norm"]), eq.Node("b", eq.Conv(rng.normal(size=(3, 6, 1))), ["norm"]),
        eq.Node("y", eq.Concat(), ["a", "b"])], ["y"]), rng.normal(size=(8, 6, 5))


def test_cross_layer_with_statistics_is_smoothquant_with_alpha_one_half_on_a_normalisation():
    """s_j = max|X_j|**(1/2) / max|W_j|**(1/2) by Xiao et al., written out; what divides the activation is the inverse of our factor."""
    graph, x = normed()
    stats = eq.calibrate(graph, x)
    activation = np.abs(eq.values(graph, x)["norm"]).max(axis=(0, 2))
    weight = np.maximum(*(np.abs(graph[name].op.weight).max(axis=(0, 2)) for name in ("a", "b")))
    s = activation**0.5 / weight**0.5
    for method in (eq.CrossLayer(tol=1e-12), eq.Swept(rules.smooth_quant, tol=1e-12)):
        assert eq.equalize(graph, method, stats=stats).factorization["norm"] == pytest.approx(1 / s)
    assert not np.allclose(eq.equalize(graph, "cross_layer").factorization["norm"], 1 / s)  # by gamma alone


@pytest.mark.parametrize("alpha", [0.25, 0.75])
def test_smoothquant_with_another_alpha(alpha):
    graph, x = normed(1)
    stats = eq.calibrate(graph, x)
    block = Block((Maker(np.arange(2), np.ones(2), np.array([4.0, 0.0])),), np.ones(2), np.array([16.0, 1.0]))
    assert rules.smooth_quant(block, alpha=alpha) == pytest.approx([16 ** (1 - alpha) / 4**alpha, 1])
    once = eq.Swept(functools.partial(rules.smooth_quant, alpha=alpha), max_iter=1)
    assert eq.verify(graph, eq.equalize(graph, once, stats=stats).graph, x)
