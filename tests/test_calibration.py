"""Statistics: of one batch against numpy, of shards against the whole, of rescaled networks against rescaled statistics."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nets import BY_NAME, NETS

import eqfact as eq
from eqfact.testing import laws
from eqfact.testing.strategies import batches, factorizations, networks

any_net = pytest.mark.parametrize("net", NETS, ids=str)
drawn = networks().flatmap(lambda graph: st.tuples(st.just(graph), batches(graph), factorizations(graph)))
sharded = networks().flatmap(lambda graph: st.tuples(st.just(graph), st.lists(batches(graph), min_size=1, max_size=4)))


def direct(value):
    """Statistics by the book, channel by channel."""
    entries = [value[:, c].astype(np.float64).ravel() for c in range(value.shape[1])]
    return {
        "min": [e.min() for e in entries], "max": [e.max() for e in entries], "max_abs": [np.abs(e).max() for e in entries],
        "mean": [e.mean() for e in entries], "mean_square": [(e**2).mean() for e in entries], "variance": [e.var() for e in entries],
    }


@any_net
def test_statistics_of_one_batch_are_those_of_numpy(net):
    x = net.data()
    stats = eq.calibrate(net.graph, x)
    every = eq.values(net.graph, x)
    assert list(stats) == list(every)
    for name, value in every.items():
        expected = direct(value)
        assert stats[name].count == value.size // value.shape[1]
        for key in ("min", "max", "max_abs"):
            assert np.array_equal(getattr(stats[name], key), expected[key])
        for key in ("mean", "mean_square", "variance"):
            got = getattr(stats[name], key)
            assert got.shape == value.shape[1:2]
            assert got.dtype == np.float64
            # sums of n terms of at most max_abs**2, twice
            assert np.all(np.abs(got - expected[key]) <= 4e-16 * value.size * (1 + stats[name].max_abs) ** 2)


def test_statistics_of_whole_numbers_are_exact():
    graph = eq.Graph.chain((2, 2), act=eq.ReLU())
    x = np.array([[[1.0, -2.0], [3.0, 5.0]], [[-4.0, 8.0], [0.0, 0.0]]])
    stats = eq.calibrate(graph, x)["act"]
    assert stats.count == 4
    assert (stats.min.tolist(), stats.max.tolist()) == ([0.0, 0.0], [8.0, 5.0])
    assert (stats.mean.tolist(), stats.mean_square.tolist()) == ([2.25, 2.0], [16.25, 8.5])
    assert (stats.variance.tolist(), stats.max_abs.tolist()) == ([16.25 - 2.25**2, 4.5], [8.0, 5.0])


def test_statistics_are_summed_in_double_precision():
    graph = eq.Graph.chain((1,), id=eq.Identity())
    x = np.full((4, 1), 2.0**-10, np.float32)
    x[0] = 2.0**24
    assert eq.calibrate(graph, x)["id"].sum[0] == 2.0**24 + 3 * 2.0**-10


@given(drawn)
def test_statistics_follow_the_factors(case):
    graph, x, f = case
    laws.statistics_follow_the_factors(graph, f, x)


@given(sharded)
def test_shards_add_up_to_the_whole(case):
    laws.shards_add_up(*case)


@given(sharded)
def test_one_batch_of_all_images_is_the_sum_of_its_shards(case):
    graph, shards = case
    if isinstance(shards[0], dict):
        together = {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}
    else:
        together = np.concatenate(shards)
    merged, whole = eq.calibrate(graph, shards), eq.calibrate(graph, together)
    bounds = laws.rounding_bounds(graph, together)  # a matrix product may round another batch size otherwise
    for name in whole:
        slack = 2 * float(bounds[name].max())
        assert merged[name].count == whole[name].count
        for key in ("min", "max", "mean"):
            tolerance = slack + 1e-15 * whole[name].count * whole[name].max_abs
            assert np.all(np.abs(getattr(merged[name], key) - getattr(whole[name], key)) <= tolerance)


def test_batches_may_come_one_by_one_and_differ_in_size():
    net = BY_NAME["chain"]
    x = net.data()["x"]
    cut = [x[:1], x[1:8], x[8:]]
    laws.same_statistics(eq.calibrate(net.graph, (batch for batch in cut)), eq.calibrate(net.graph, cut))
    laws.same_statistics(eq.calibrate(net.graph, [{"x": x}]), eq.calibrate(net.graph, x))
    laws.same_statistics(eq.calibrate(net.graph, {"x": x}), eq.calibrate(net.graph, x))


def test_sums_are_the_same_to_the_bit_unless_roundings_are_allowed():
    graph = eq.Graph.chain((2,), act=eq.Identity())
    stats = eq.calibrate(graph, np.array([[1.0, 3.0], [2.0, 5.0]]))
    other = eq.Statistics({name: dataclasses.replace(of, sum=np.nextafter(of.sum, np.inf)) for name, of in stats.items()}, graph)
    laws.same_statistics(other, stats, roundings=8)
    with pytest.raises(AssertionError, match="sum of 'x'"):
        laws.same_statistics(other, stats)


def test_variance_is_never_negative():
    graph = eq.Graph.chain((1,), id=eq.Identity())
    stats = eq.calibrate(graph, np.full((3, 1), 1.1))["id"]
    assert stats.variance[0] >= 0
    assert stats.mean_square[0] - stats.mean[0] ** 2 < 1e-15


def test_an_unused_value_has_statistics():
    net = BY_NAME["dead end"]
    assert eq.calibrate(net.graph, net.data())["looser"].max.shape == (2,)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("batches", [[], iter(()), ()])
def test_no_batch_is_refused(batches):
    with pytest.raises(ValueError, match="calibration needs at least one batch, got none"):
        eq.calibrate(BY_NAME["chain"].graph, batches)


def test_a_bad_batch_among_good_ones_is_refused():
    good = np.ones((1, 2))
    with pytest.raises(ValueError, match="input 'x' holds nan"):
        eq.calibrate(BY_NAME["chain"].graph, [good, np.nan * good])


def test_a_value_that_overflows_is_refused_by_name():
    graph = eq.Graph.chain((1,), big=eq.Dense(np.array([[1e200]])), act=eq.ReLU())
    with pytest.raises(ValueError, match=r"value 'big' overflows on the calibration data \(channel 0\)"):
        eq.calibrate(graph, np.ones((1, 1)))


def test_statistics_of_an_unknown_value_are_refused():
    stats = eq.calibrate(BY_NAME["chain"].graph, np.ones((1, 2)))
    with pytest.raises(KeyError, match="no statistics of value 'nope'; calibrate the graph that holds it"):
        stats["nope"]


def test_statistics_of_different_networks_do_not_add_up():
    a = eq.calibrate(BY_NAME["chain"].graph, np.ones((1, 2)))
    b = eq.calibrate(BY_NAME["one layer"].graph, np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"statistics of different networks do not add up: values .* are in one only"):
        _ = a + b


def test_statistics_of_other_channel_counts_do_not_add_up_and_take_no_factors():
    wide, narrow = (eq.Graph.chain((n,), act=eq.ReLU()) for n in (3, 1))
    of_wide, of_narrow = eq.calibrate(wide, np.ones((1, 3))), eq.calibrate(narrow, np.ones((1, 1)))
    with pytest.raises(ValueError, match="value 'x' has 3 channels in one and 1 in the other"):
        _ = of_wide + of_narrow
    with pytest.raises(ValueError, match="value 'x' has 3 channels, the statistics are of 1"):
        eq.Factorization.identity(wide).apply(of_narrow)


def test_statistics_of_another_network_take_no_factors():
    stats = eq.calibrate(BY_NAME["chain"].graph, np.ones((1, 2)))
    with pytest.raises(KeyError, match="is not a value of the network of this factorization"):
        eq.Factorization.identity(BY_NAME["one layer"].graph).apply(stats)


# ------------------------------------------------------------------------------------------------ likely ranges


def ends_of(stats):
    return {name: (stats[name].min, stats[name].max) for name in stats}


@any_net
def test_likely_ranges_hold_those_seen_and_rescale_with_the_network(net):
    graph, x = net.graph, net.data()
    stats = eq.calibrate(graph, x)
    likely = eq.likely_ranges(graph, stats)
    for name in stats:
        assert (likely[name].min <= stats[name].min).all()
        assert (likely[name].max >= stats[name].max).all()
        assert (likely[name].mean == stats[name].mean).all()
    assert set(likely) == set(stats)
    resolved = eq.channels(graph)
    f = eq.Factorization(resolved, np.concatenate([[1.0], np.exp(np.random.default_rng(0).normal(size=resolved.degrees_of_freedom))]))
    other = eq.likely_ranges(f.apply(graph), f.apply(stats))
    for name, ends in ends_of(f.apply(likely)).items():
        np.testing.assert_allclose(np.stack(ends_of(other)[name]), np.stack(ends), rtol=1e-9, atol=1e-12)


def test_likely_ranges_by_hand():
    """Mean -4 and deviation 1 before the activations: eight of them reach from -12 to 4, and on through what is fused."""
    stem = eq.Dense(np.array([[1.0], [1.0]]))
    graph = eq.Graph({"x": (1,)}, [eq.Node("fc", stem, ["x"]), eq.Node("leaky", eq.LeakyReLU(0.5), ["fc"]),
                                   eq.Node("clip", eq.Clip(0.0, 3.0), ["fc"]), eq.Node("out", eq.Dense(np.ones((1, 2))), ["clip"])],
                     ["leaky", "out"])
    likely = eq.likely_ranges(graph, eq.calibrate(graph, np.array([[-5.0], [-3.0]])))
    for name, low, high in (("x", -5, -3), ("fc", -12, 4), ("leaky", -6, 4), ("clip", 0, 3), ("out", 0, 0)):
        np.testing.assert_allclose(likely[name].min, low, err_msg=name)
        np.testing.assert_allclose(likely[name].max, high, err_msg=name)
    narrow = eq.likely_ranges(graph, eq.calibrate(graph, np.array([[-5.0], [-3.0]])), deviations=0)
    assert narrow["fc"].min.tolist() == [-5, -5]
    known = {"fc": (np.array([1.0, 0.0]), np.array([0.25, 0.0])), "gone": (np.zeros(9), np.zeros(9))}
    likely = eq.likely_ranges(graph, eq.calibrate(graph, np.array([[-5.0], [-3.0]])), known)
    assert likely["fc"].max.tolist() == [3, 0]
    assert likely["clip"].max.tolist() == [3, 0]


def test_a_channel_that_first_fires_on_other_data_does_not_saturate():
    """On ten images its largest value is 0.02: amplified by what was seen it saturates on others, by what is likely it does not."""
    w1, w2 = np.eye(2), np.array([[1.0, 1.0], [1.0, -1.0]])
    graph = eq.Graph.chain((2,), fc1=eq.Dense(w1, np.array([0.0, -2.0])), act=eq.ReLU(), fc2=eq.Dense(w2))
    seen = np.stack([np.linspace(-3, 3, 10), np.linspace(-1, 2.02, 10)], axis=1)
    other = np.random.default_rng(0).uniform(-3, 3, size=(500, 2))
    stats = eq.calibrate(graph, seen)
    by_seen, by_likely = (_quality(graph, stats, ranges, other) for ranges in (stats, eq.likely_ranges(graph, stats)))
    assert by_likely > by_seen + 3


def test_means_over_space_have_the_largest_share_of_their_reach():
    """Channels that reach 4, 2 and 1 (of -2) had means of up to 1, 0.1 and 0.5: a half of what they reach, in the last one."""
    x = np.zeros((2, 3, 1, 4))
    x[0, :, 0] = [[4, 0, 0, 0], [0.2, 0.2, 0, 0], [1, 1, 0, 0]]
    x[1, :, 0] = [[0, 0, 0, 0], [2, -2, 0, 0], [-2, 0, 0, 0]]
    for pool in (eq.GlobalAvgPool(), eq.AvgPool((1, 4))):
        graph = eq.Graph.chain((3, 1, 4), pool=pool, flat=eq.Flatten(), fc=eq.Dense(np.eye(3)))
        stats = eq.calibrate(graph, x)
        likely = eq.likely_ranges(graph, stats)
        for name in ("pool", "flat"):
            assert likely[name].max.tolist() == [2, 1, 0.5] and likely[name].min.tolist() == [0, -1, -1], name
        assert likely["x"].max.tolist() == [4, 2, 1]


def test_a_mean_that_was_large_on_no_image_seen_does_not_saturate_on_others():
    """A channel fires in one image of five: on twenty images the means of some channels are far below what they are on others."""
    rng = np.random.default_rng(0)
    conv = eq.Conv(np.eye(40)[:, :, None, None], np.full(40, -2.0))
    graph = eq.Graph.chain((40, 3, 3), conv=conv, act=eq.ReLU(), pool=eq.GlobalAvgPool(), flat=eq.Flatten(),
                           fc=eq.Dense(rng.normal(size=(5, 40))))

    def images(count):
        return rng.normal(size=(count, 40, 3, 3)) + 4 * (rng.random((count, 40, 1, 1)) < 0.2)
    stats, other = eq.calibrate(graph, images(20)), images(300)
    likely = eq.likely_ranges(graph, stats)
    as_seen = eq.Statistics({name: stats[name] if name in ("pool", "flat") else of for name, of in likely.items()}, graph)
    by_seen, by_likely = (_quality(graph, stats, ranges, other) for ranges in (as_seen, likely))
    assert by_likely > by_seen + 3


def _quality(graph, stats, ranges, data):
    """SQNR after equalization for ``ranges``, quantized with the extremes of ``stats``, weights in float."""
    eight = eq.UniformQuantizer(8, symmetric=False)
    f = eq.equalize(graph, eq.Optimal(ranges=ranges), stats=stats, activations=eight).factorization
    quantized = eq.quantize(f.apply(graph), activations=eight, stats=f.apply(stats))
    return eq.sqnr(eq.forward(graph, data), eq.forward(quantized, data))


def test_likely_ranges_refuse_what_does_not_fit():
    graph = BY_NAME["chain"].graph
    stats = eq.calibrate(graph, np.ones((1, 2)))
    name = next(n.name for n in graph if isinstance(n.op, eq.Weighted))
    with pytest.raises(ValueError, match="deviations must be a finite number of at least 0, got -1"):
        eq.likely_ranges(graph, stats, deviations=-1)
    with pytest.raises(ValueError, match=rf"mean and deviation of value '{name}' have shapes \(9,\) and \(9,\), the network has"):
        eq.likely_ranges(graph, stats, {name: (np.zeros(9), np.zeros(9))})
    with pytest.raises(ValueError, match=r"the statistics lack value '.*': calibrate this graph, after folding"):
        eq.likely_ranges(graph, eq.calibrate(BY_NAME["one layer"].graph, np.ones((1, 2))))


@pytest.mark.parametrize("value", ["x", "fc", "act"])
def test_likely_ranges_need_statistics_of_every_value(value):
    graph, stats = scalar_net()
    with pytest.raises(ValueError, match=f"the statistics lack value '{value}': calibrate this graph, after folding"):
        eq.likely_ranges(graph, eq.Statistics({name: of for name, of in stats.items() if name != value}))
    narrow = eq.calibrate(eq.Graph.chain((1,), fc=eq.Dense(np.ones((2, 1))), act=eq.ReLU()), np.ones((1, 1)))
    with pytest.raises(ValueError, match="the statistics of value 'fc' have 2 channels, the network has 1"):
        eq.likely_ranges(graph, narrow)
    spoiled = eq.Statistics({**stats, value: dataclasses.replace(stats[value], min=np.array([np.nan]))})
    with pytest.raises(ValueError, match=f"the statistics of value '{value}' hold NaN or infinity"):
        eq.likely_ranges(graph, spoiled)


@pytest.mark.parametrize(("gaussian", "said"), [
    (np.ones(6), r"value 'fc' needs a mean and a standard deviation for each of its 1 channels, as two arrays \(1,\), got array\(\[1., 1., "
                 r".*batchnorm_gaussians reads them off an unfolded network"),
    (3.0, r"value 'fc' needs a mean and a standard deviation .*, got 3.0"),
    (np.ones(2), r"mean and deviation of value 'fc' have shapes \(\) and \(\), the network has 1 channels: give two arrays \(1,\)"),
    (([np.nan], [1.0]), "value 'fc', channel 0: mean nan and standard deviation 1.0 must be finite"),
    (([0.0], [np.inf]), "value 'fc', channel 0: mean 0.0 and standard deviation inf must be finite"),
    (([0.0], [-1.0]), "standard deviation -1.0 must be finite, and the latter not negative; leave the value out"),
], ids=["one array", "a number", "two numbers", "nan", "infinite", "negative"])
def test_likely_ranges_refuse_gaussians_that_are_none(gaussian, said):
    graph, stats = scalar_net()
    with pytest.raises(ValueError, match=said):
        eq.likely_ranges(graph, stats, {"fc": gaussian})
    eq.likely_ranges(graph, stats, {"elsewhere": gaussian})  # the unfolded network may have more


def scalar_net():
    """A layer and its activation, of one channel, and their statistics."""
    graph = eq.Graph.chain((1,), fc=eq.Dense(np.ones((1, 1))), act=eq.ReLU())
    return graph, eq.calibrate(graph, np.array([[1.0], [3.0]]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["min", "max"])
@pytest.mark.parametrize("channel", [0, 1, 2])
def test_one_channel_that_is_not_finite_spoils_the_statistics(bad, key, channel):
    graph = eq.Graph.chain((3,), fc=eq.Dense(np.eye(3)), act=eq.ReLU(), out=eq.Dense(np.ones((1, 3))))
    stats = eq.calibrate(graph, np.array([[1.0, 2.0, 3.0], [-1.0, 0.5, 0.25]]))
    numbers = getattr(stats["act"], key).copy()
    numbers[channel] = bad
    spoiled = eq.Statistics({**stats, "act": dataclasses.replace(stats["act"], **{key: numbers})})
    with pytest.raises(ValueError, match="the statistics of value 'act' hold NaN or infinity"):
        eq.equalize(graph, "one_step", stats=spoiled)
