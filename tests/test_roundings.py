"""What is known of a value on its way through a network: bounds on its errors, and slopes that move with its factors. By hand."""

from __future__ import annotations

import numpy as np
import pytest
from nets import NETS

import eqfact as eq
from eqfact.ops.base import Relation
from eqfact.roundings import NEAR, Side, _extended, _places, largest

U = 2.0**-24
HALF_A_STEP = 2.0**-53  # what rounds a slope, which is a double
TINY = np.finfo(np.float64).tiny


def start_of(graph, x, u=U):
    """A side whose inputs are taken as they are, and slopes for them: the largest entry of each channel."""
    held = eq.values(graph, x)
    side = Side(graph, dict(held), u)
    for name in graph.inputs:
        side.start(name, largest(np.abs(held[name])))
    return side


def test_slopes_and_their_doubts_by_hand():
    """A layer multiplies by ``|W|`` and doubts 8 roundings more, a product adds relative doubts; what is pinned has the slope 1."""
    first, second = np.array([[1.0, -2.0], [0.0, 0.0], [3.0, 0.5]]), np.array([[0.5, 1.0, -1.0], [2.0, 0.0, 0.0], [0.0, 1.0, 4.0]])
    graph = eq.Graph({"x": (2,)}, [
        eq.Node("a", eq.Dense(first, np.ones(3)), ["x"]), eq.Node("b", eq.Dense(second), ["a"]), eq.Node("y", eq.Mul(), ["a", "b"]),
        eq.Node("relu", eq.ReLU(), ["y"]), eq.Node("curve", eq.Tanh(), ["x"]), eq.Node("norm", eq.RMSNorm(np.array([2.0, -3.0])), ["x"]),
        eq.Node("out", eq.Dense(np.ones((1, 3))), ["relu"])], ["out", "curve", "norm"])
    side = start_of(graph, np.array([[1.0, -2.0], [0.5, 4.0]]))
    x = np.array([1.0, 4.0])
    assert np.array_equal(side.slopes("x"), [x, x])
    a = np.abs(first) @ x
    assert np.array_equal(side.slopes("a")[0], a) and a[1] == 0
    own = {node.name: node.op.roundings * HALF_A_STEP / U for node in graph}
    doubt_a = 1 + 8 + own["a"]
    assert side.slopes("a")[1] == pytest.approx(a * doubt_a, rel=1e-14)
    b, doubt_b = np.abs(second) @ a, doubt_a + 8 + own["b"]
    assert side.slopes("b") == pytest.approx(np.array([b, b * doubt_b]), rel=1e-14)
    y = np.array([a * b, a * b * (doubt_a + doubt_b + own["y"])])
    assert side.slopes("y") == pytest.approx(y, rel=1e-13)
    assert np.array_equal(side.slopes("relu"), side.slopes("y") + [[0], [own["relu"]]] * y[0])
    assert np.array_equal(side.slopes("curve"), [[1, 1], [own["curve"]] * 2])
    assert np.array_equal(side.slopes("norm")[0], [2, 3])
    assert side.slopes("norm")[1] == pytest.approx(np.array([2, 3]) * (8 + own["norm"]), rel=1e-14)


def test_a_slope_that_overflows_tells_nothing():
    graph = eq.Graph.chain((1,), a=eq.Dense(np.array([[1e200], [1.0]])), b=eq.Dense(np.array([[1e200, 0.0], [0.0, 2.0]])))
    side = Side(graph, {}, U)
    side.start("x", np.ones(1))
    assert np.array_equal(side.slopes("b")[0], [0, 2])


def test_slopes_of_weights_in_half_precision_are_added_up_in_double():
    graph = eq.Graph.chain((1, 300), a=eq.Conv(np.full((1, 1, 200), 999.0, np.float16), padding=100))
    side = Side(graph, {}, U)
    side.start("x", np.ones(1))
    assert side.slopes("a")[0] == 200 * 999


# constants and sums of products have no slope of their own; their factors are read off the data
@pytest.mark.parametrize("net", [net for net in NETS if net.name not in ("constants beside values", "linear attention")], ids=str)
def test_slopes_move_with_the_factors(net):
    rng = np.random.default_rng(3)
    resolved = eq.channels(net.graph)
    factors = eq.Factorization(resolved, np.exp([0.0, *rng.normal(size=resolved.degrees_of_freedom)]))
    before, after = (start_of(graph, net.data()) for graph in (net.graph, factors.apply(net.graph)))
    for value in net.graph.shapes:
        (a, doubt_a), (b, doubt_b) = before.slopes(value), after.slopes(value)
        assert b == pytest.approx(a * factors[value], rel=1e-12)
        assert doubt_b == pytest.approx(doubt_a * factors[value], rel=1e-12)


def test_labels_are_found_where_they_stand():
    at, found = _places(np.array([7, 3, 5]), np.array([5, 7, 4, 9, 3]))
    assert found.tolist() == [True, True, False, False, True]
    assert at[found].tolist() == [2, 0, 1]


def test_what_a_relation_gives_is_a_product_of_powers():
    """``2 made = 3 first - second``: doubts add up with the powers; what is 0 or not there gives nothing."""
    relation = Relation((-2, 3, -1), np.array([[10, 1, 2], [11, 2, 3], [12, 1, 9]]), "node", "why")
    labels, slopes = _extended(np.array([1, 2, 3]), np.array([[4.0, 9.0, 0.0], [8.0, 27.0, 0.0]]), relation)
    assert labels.tolist() == [1, 2, 3, 10, 11, 12]
    product = 4**1.5 / 9**0.5
    assert slopes == pytest.approx(np.array([[4, 9, 0, product, 0, 0], [8, 27, 0, product * (1.5 * 2 + 0.5 * 3), 0, 0]]))


def test_a_value_that_is_taken_as_it_is_has_its_own_roundings_and_the_doubt():
    graph = eq.Graph.chain((2,), a=eq.Dense(np.eye(2)))
    side = Side(graph, {"x": np.array([[1.0, -2.0], [0.0, np.inf]])}, U)
    side.start("x", np.array([5.0, 6.0]), np.array([0.0, 3.0]))
    assert np.array_equal(side.errors("x"), np.array([[1.0, 8.0], [0.0, 0.0]]) + TINY)
    assert np.array_equal(side.slopes("x"), [[5, 6], [5, 24]])


def test_a_walk_starts_afresh_in_the_channels_that_are_told():
    graph = eq.Graph.chain((2,), a=eq.Dense(np.array([[1.0, 2.0], [3.0, 4.0]])), b=eq.Dense(np.ones((1, 2))))
    x, value = np.array([[1.0, -1.0]]), np.array([[10.0, 20.0]])
    untouched, some, all_ = (start_of(graph, x) for _ in range(3))
    errors, slopes = untouched.errors("a"), untouched.slopes("a")
    some.restart("a", np.array([True, False]), value, np.array([7.0, 8.0]), np.array([2.0, 2.0]))
    assert np.array_equal(some.held["a"], [[10.0, -1.0]])
    assert np.array_equal(some.errors("a"), [[30.0 + TINY, errors[0, 1]]])
    assert np.array_equal(some.slopes("a"), [[7.0, slopes[0, 1]], [21.0, slopes[1, 1]]])
    all_.restart("a", np.array([True, True]), value, np.array([7.0, 8.0]))
    assert all_.held["a"] is value
    assert np.array_equal(all_.errors("a"), value + TINY)
    assert np.array_equal(all_.slopes("a"), [[7, 8], [7, 8]])


def test_what_has_no_number_is_not_bounded():
    """Where a weight of 0 reads what has overflowed there is no saying how far it is off."""
    weights = {"a": [[1e300]], "b": [[1e300], [0.0]], "c": [[0.0, 1.0]]}
    graph, x = eq.Graph.chain((1,), **{name: eq.Dense(np.array(weight)) for name, weight in weights.items()}), np.array([[1.0]])
    with np.errstate(over="ignore", invalid="ignore"):
        side = Side(graph, {"x": x, "a": x * 1e300, "b": np.array([[np.inf, 0.0]]), "c": np.array([[np.nan]])}, U)
    side.start("x", np.ones(1))
    assert np.array_equal(np.isinf(side.errors("b")), [[True, False]])
    assert np.isinf(side.errors("c")).all()


def test_near_is_measured_by_what_the_last_layer_adds_up():
    """``sqrt(u) / 16`` of the largest ``|W| |x|`` of the channel, though its terms cancel out, and the roundings behind it."""
    layer = eq.Dense(np.array([[1.0, -1.0], [2.0, 0.0]]), np.array([0.5, 0.0]))
    graph = eq.Graph.chain((2,), a=layer, act=eq.LeakyReLU(0.25))
    side = start_of(graph, np.array([[3.0, 3.0], [1.0, -1.0]]))
    near = side.nearness("act")
    sums = np.array([[6.0 + 0.5, 6.0], [2.0 + 0.5, 2.0]])
    assert NEAR == 16
    made = eq.forward(graph, np.array([[3.0, 3.0], [1.0, -1.0]]))
    since = eq.LeakyReLU(0.25).errors([np.zeros((2, 2))], [side.held["a"]], made, U)
    assert near == pytest.approx(U**0.5 / 16 * sums.max(axis=0) + U * since, rel=1e-12)
    assert since.any()
