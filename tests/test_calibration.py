"""Statistics: of one batch against numpy, of shards against the whole, of rescaled networks against rescaled statistics."""

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
