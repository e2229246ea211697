"""Factorizations: equivalent networks, a group, and refusals."""

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


def drawn(count=1, *, powers_of_two=True):
    """A network, data, and so many factorizations of it."""
    return networks().flatmap(lambda graph: st.tuples(
        st.just(graph), batches(graph), *[factorizations(graph, powers_of_two=powers_of_two)] * count))


def some(graph, seed=0, *, powers_of_two=True):
    exponents = np.random.default_rng(seed).uniform(-4, 4, eq.degrees_of_freedom(graph) + 1)
    exponents[0] = 0
    return eq.Factorization(eq.channels(graph), np.exp2(np.rint(exponents) if powers_of_two else exponents))


# ------------------------------------------------------------------------------------------------ invariance


@any_net
def test_rescaling_keeps_every_value_up_to_its_factor(net):
    laws.rescaling_multiplies_every_value_by_its_factor(net.graph, some(net.graph), net.data())
    laws.rescaling_multiplies_every_value_by_its_factor(net.graph, some(net.graph, powers_of_two=False), net.data())


@given(drawn())
def test_powers_of_two_keep_the_function_of_a_random_network_bit_for_bit(case):
    graph, x, f = case
    assert laws.powers_of_two(f.by_label)
    laws.rescaling_keeps_the_function(graph, f, x)


@given(drawn())
def test_powers_of_two_multiply_every_value_of_a_random_network_bit_for_bit(case):
    graph, x, f = case
    laws.rescaling_multiplies_every_value_by_its_factor(graph, f, x)


@given(drawn(powers_of_two=False))
def test_any_factors_keep_the_function_of_a_random_network(case):
    graph, x, f = case
    laws.rescaling_keeps_the_function(graph, f, x)


@given(drawn(powers_of_two=False))
def test_any_factors_multiply_every_value_of_a_random_network(case):
    graph, x, f = case
    laws.rescaling_multiplies_every_value_by_its_factor(graph, f, x)


@given(drawn())
def test_rescaling_keeps_the_degrees_of_freedom(case):
    graph, _, f = case
    before, after = eq.channels(graph), eq.channels(f.apply(graph))
    assert all(np.array_equal(after.labels[value], labels) for value, labels in before.labels.items())


@given(drawn())
def test_rescaling_leaves_the_network_alone(case):
    graph, x, f = case
    before = eq.values(graph, x)
    f.apply(graph)
    after = eq.values(graph, x)
    assert all(np.array_equal(after[name], value) for name, value in before.items())


def test_what_no_factor_touches_is_shared():
    graph = BY_NAME["slice"].graph
    f = eq.Factorization.of(graph, {"branch": [2.0, 4.0]})
    shared = [node.name for node in f.apply(graph) if node.op is graph[node.name].op]
    assert shared == ["stem", "left", "right", "cat"]


def test_an_op_used_twice_stays_one_op():
    for name in ("conv used twice", "siamese"):
        graph = BY_NAME[name].graph
        rescaled = some(graph).apply(graph)
        uses = {}
        for node in graph:
            uses.setdefault(id(node.op), []).append(node.name)
        (twice,) = (names for names in uses.values() if len(names) > 1)
        assert rescaled[twice[0]].op is rescaled[twice[1]].op
        assert rescaled[twice[0]].op is not graph[twice[0]].op


def test_the_weights_are_multiplied_on_the_output_side_and_divided_on_the_input_side():
    graph = eq.Graph.chain((1,), fc1=eq.Dense(np.array([[1.0], [3.0]]), np.array([5.0, 7.0])), act=eq.ReLU(),
                           fc2=eq.Dense(np.array([[1.0, 3.0]]), np.ones(1)))
    rescaled = eq.Factorization.of(graph, {"act": [2.0, 0.5]}).apply(graph)
    assert np.array_equal(rescaled["fc1"].op.weight, [[2.0], [1.5]])
    assert np.array_equal(rescaled["fc1"].op.bias, [10.0, 3.5])
    assert np.array_equal(rescaled["fc2"].op.weight, [[0.5, 6.0]])
    assert np.array_equal(rescaled["fc2"].op.bias, [1.0])


# ------------------------------------------------------------------------------------------------ the group


@any_net
def test_the_identity_changes_nothing(net):
    laws.identity_changes_nothing(net.graph)


@given(drawn(powers_of_two=False))
def test_the_identity_is_neutral(case):
    graph, _, f = case
    laws.identity_changes_nothing(graph)
    laws.identity_is_neutral(graph, f)


@given(drawn())
def test_the_inverse_undoes(case):
    graph, _, f = case
    laws.inverse_undoes(graph, f)


@given(drawn(3))
def test_composition_is_associative_and_commutes(case):
    _, _, a, b, c = case
    laws.composition_is_associative_and_commutes(a, b, c)


@given(drawn(2))
def test_composition_applies_in_turn(case):
    graph, _, a, b = case
    laws.composition_applies_in_turn(graph, a, b)


@given(drawn(powers_of_two=False))
def test_powers_of_two_are_the_nearest(case):
    _, _, f = case
    rounded = f.power_of_two()
    assert laws.powers_of_two(rounded.by_label)
    assert np.all(np.abs(np.log2(rounded.free / f.free)) <= 0.5 + 1e-12)
    laws.same_factors(rounded.power_of_two(), rounded)


# ------------------------------------------------------------------------------------------------ a mapping of values to factors


@any_net
def test_there_are_factors_for_every_value(net):
    f = some(net.graph)
    assert list(f) == list(net.graph.shapes)
    assert len(f) == len(net.graph.shapes)
    for value, factors in f.items():
        assert factors.shape == net.graph.shapes[value][:1]
        assert np.all(factors[eq.channels(net.graph).labels[value] == 0] == 1)


@any_net
def test_a_factorization_is_made_again_from_its_factors(net):
    laws.same_factors(eq.Factorization.of(net.graph, some(net.graph)), some(net.graph))
    f = some(net.graph, powers_of_two=False)
    again = eq.Factorization.of(net.graph, f)
    for value, factors in f.items():
        assert again[value] == pytest.approx(factors, rel=1e-12)
        if not net.graph.traced.relations:
            assert np.array_equal(again[value], factors)


def test_what_follows_from_a_named_product_is_as_little_as_it_can_be():
    graph = BY_NAME["product"].graph
    f = eq.Factorization.of(graph, {"a": [2.0, 1.0, 4.0], "b": [1.0, 8.0, 0.25]})
    assert f["mul"].tolist() == [2, 8, 1]
    assert eq.Factorization.of(graph, {"mul": [2.0, 8.0, 1.0], "a": [2.0, 1.0, 4.0]})["b"].tolist() == [1, 8, 0.25]
    alone = eq.Factorization.of(graph, {"mul": [2.0, 8.0, 1.0]})
    assert alone["a"].tolist() == [2, 8, 1] and np.all(alone["b"] == 1)
    assert eq.Factorization.of(BY_NAME["square and cube made equal"].graph, {"add": [64.0, 1.0, 1.0]})["b"].tolist() == [4, 1, 1]
    with pytest.raises(ValueError, match=r"value 'mul', channel 1: this channel's factor follows from others as 8 .*, got 4"):
        eq.Factorization.of(graph, {"mul": [2.0, 4.0, 1.0], "a": [2.0, 1.0, 4.0], "b": [1.0, 8.0, 0.25]})


def products(of):
    """A network whose products multiply values of one channel, each made by a layer of its own."""
    def layer():
        return eq.Dense(np.ones((1, 1)))
    values = sorted({value for inputs in of.values() for value in inputs})
    return eq.Graph({"x": (1,)}, [
        *(eq.Node(value, layer(), ["x"]) for value in values), *(eq.Node(name, eq.Mul(), [*inputs]) for name, inputs in of.items()),
        *(eq.Node(f"read {name}", layer(), [name]) for name in of)], [f"read {name}" for name in of])


@pytest.mark.parametrize(("of", "named"), [
    ({"p": "ab", "q": "cd", "r": "bc"}, {"p": 2.0, "q": 8.0, "r": 0.25}),
    ({"p": "abc", "q": "bd"}, {"p": 8.0, "q": 4.0}),
    ({"p": "ab", "q": "bc", "r": "acd"}, {"p": 2.0, "q": 8.0, "r": 1.0}),
    ({"p": "ab", "q": "abb"}, {"p": 4.0, "q": 2.0}), ({"p": "aab", "q": "abbb"}, {"p": 4.0, "q": 64.0}),  # only both together tell
    ({"p": "abb", "q": "aaab"}, {"p": 32.0, "q": 32.0}),
    ({"p": "ab", "q": "abc"}, {"p": 4.0, "q": 2.0, "b": 0.5}),
    ({"p": "aab"}, {"p": 4.0}), ({"p": "abb"}, {"p": 4.0}),
    ({"p": "ab"}, {"p": 2.0**-1070}),
    ({"p": "ab"}, {"a": 1024.3, "b": 1.7, "p": 1024.3 * 1.7 * (1 + 3e-13)}),  # as far apart as roundings
])
def test_named_products_get_their_factors_whatever_tells_them(of, named):
    f = eq.Factorization.of(products(of), {value: [factor] for value, factor in named.items()})
    assert {name: f[name].item() for name in of} == pytest.approx({name: named[name] for name in of}, rel=1e-12, abs=0)
    for name, inputs in of.items():
        assert f[name].item() == pytest.approx(np.prod([f[value].item() for value in inputs]), rel=1e-12, abs=0)


def test_a_product_that_is_not_named_follows():
    f = eq.Factorization.of(products({"p": "ab"}), {"a": [4.0]})
    assert [f[value].item() for value in "abp"] == [4, 1, 4]


def test_what_is_tied_to_a_named_value_follows():
    graph = BY_NAME["residual"].graph
    f = eq.Factorization.of(graph, {"add": [2.0, 1.0, 4.0, 0.5]})
    for value in ("stem", "narrow", "add"):
        assert np.array_equal(f[value], [2.0, 1.0, 4.0, 0.5])
    for value in ("x", "wide", "act", "head"):
        assert np.all(f[value] == 1)


def test_factors_are_copied_and_read_only():
    graph = BY_NAME["chain"].graph
    given_ = np.array([2.0, 3.0, 4.0])
    f = eq.Factorization.of(graph, {"act": given_})
    given_[...] = 7
    f["act"][...] = 7
    assert np.array_equal(f["act"], [2.0, 3.0, 4.0])
    with pytest.raises(ValueError, match="read-only"):
        f.by_label[1] = 7
    with pytest.raises(dataclasses.FrozenInstanceError):
        f.by_label = given_


# ------------------------------------------------------------------------------------------------ refusals

CHAIN, RESIDUAL, FLAT, JOINED = (BY_NAME[name].graph for name in ("chain", "residual", "flatten", "a value joined with itself"))


@pytest.mark.parametrize(("graph", "factors", "message"), [
    (CHAIN, {"nope": [1.0]}, "factors are given for 'nope', which is not a value of the network"),
    (CHAIN, {"act": [1.0, 2.0]}, r"value 'act' has 3 channels, its factors have shape \(2,\)"),
    (CHAIN, {"act": 2.0}, r"value 'act' has 3 channels, its factors have shape \(\)"),
    (CHAIN, {"act": [[1.0, 2.0, 3.0]]}, r"value 'act' has 3 channels, its factors have shape \(1, 3\)"),
    (CHAIN, {"act": [1.0, 0.0, 3.0]}, "value 'act', channel 1: factors must be positive and finite, got 0"),
    (CHAIN, {"act": [1.0, 2.0, -3.0]}, "value 'act', channel 2: factors must be positive and finite, got -3"),
    (CHAIN, {"act": [np.nan, 1.0, 1.0]}, "value 'act', channel 0: factors must be positive and finite, got nan"),
    (CHAIN, {"act": [np.inf, 1.0, 1.0]}, "value 'act', channel 0: factors must be positive and finite, got inf"),
    (CHAIN, {"x": [1.0, 2.0]}, r"value 'x', channel 1: this channel keeps the factor 1 \(network input 'x'\), got 2"),
    (CHAIN, {"fc2": [0.5, 1.0]}, r"value 'fc2', channel 0: this channel keeps the factor 1 \(network output 'fc2'\), got 0.5"),
    (CHAIN, {"fc1": [1.0, 2.0, 3.0], "act": [1.0, 2.0, 4.0]},
     "value 'act', channel 2: this channel is tied to one of 'fc1' with factor 3, got 4"),
    (CHAIN, {"fc1": [1.0, 2.0, 3.0], "act": [1.0, 1.0, 1.0]},
     "value 'act', channel 1: this channel is tied to one of 'fc1' with factor 2, got 1"),
    (RESIDUAL, {"stem": [2.0] * 4, "narrow": [1.0] * 4},
     "value 'narrow', channel 0: this channel is tied to one of 'stem' with factor 2, got 1"),
    (FLAT, {"flat": [2.0] * 5 + [3.0] * 7}, "value 'flat', channel 5: this channel is tied to one of 'flat' with factor 2, got 3"),
    (JOINED, {"cat": [1.0, 2.0, 3.0, 1.0, 2.0, 4.0]}, "value 'cat', channel 5: this channel is tied to one of 'cat' with factor 3, got 4"),
])
def test_illegal_factors_are_refused_with_value_and_channel(graph, factors, message):
    with pytest.raises(ValueError, match=message):
        eq.Factorization.of(graph, factors)


def test_factors_that_are_no_numbers_are_refused():
    with pytest.raises((ValueError, TypeError)):
        eq.Factorization.of(CHAIN, {"act": ["a", "b", "c"]})


def test_an_unknown_value_has_no_factor():
    with pytest.raises(KeyError, match="'nope' is not a value of the network of this factorization"):
        eq.Factorization.identity(CHAIN)["nope"]


def test_a_factorization_of_another_network_is_refused():
    f = some(RESIDUAL)
    with pytest.raises(ValueError, match=r"this factorization belongs to another network: values .* are in one only"):
        f.apply(CHAIN)
    with pytest.raises(ValueError, match="factorizations of different networks do not compose"):
        _ = f @ eq.Factorization.identity(CHAIN)


def test_a_network_with_more_ties_refuses_factors_that_break_them():
    free = eq.Graph({"x": (2,)}, [eq.Node("a", CHAIN["fc1"].op, ["x"]), eq.Node("b", CHAIN["fc1"].op, ["x"])], ["b"])
    other = eq.Dense(CHAIN["fc1"].op.weight, CHAIN["fc1"].op.bias)
    apart = free.with_ops({"a": other})  # two ops: a is loose now, b an output
    f = eq.Factorization.of(apart, {"a": [2.0, 1.0, 1.0]})
    with pytest.raises(ValueError, match=r"value 'a', channel 0: this channel keeps the factor 1 \(network output 'b'\), got 2"):
        f.apply(free)


def test_factors_that_leave_the_range_of_numbers_are_refused():
    tiny = eq.Factorization.of(CHAIN, {"act": [5e-324, 1.0, 1.0]})
    with pytest.raises(ValueError, match="value 'fc1', channel 0: factors must be positive and finite, got inf"):
        tiny.inverse()
    huge = eq.Factorization.of(CHAIN, {"act": [1.0, 1.7e308, 1.0]})
    with pytest.raises(ValueError, match="value 'fc1', channel 1: factors must be positive and finite, got inf"):
        huge.power_of_two()
    with pytest.raises(ValueError, match="value 'fc1', channel 1: factors must be positive and finite, got inf"):
        _ = huge @ huge


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_a_factorization_cannot_be_made_of_bad_factors(value):
    with pytest.raises(ValueError, match="value 'fc1', channel 2: factors must be positive and finite"):
        eq.Factorization(eq.channels(CHAIN), np.array([1.0, 1.0, 1.0, value]))
    with pytest.raises(ValueError, match="value 'a', channel 2: factors must be positive and finite"):  # of which b has the inverse
        eq.Factorization(eq.channels(BY_NAME["product that is an output"].graph), np.array([1.0, 1.0, 1.0, value]))


def test_overflowing_weights_are_refused_with_the_name_of_the_node():
    graph = eq.Graph.chain((1,), fc1=eq.Dense(np.full((1, 1), 1e38, np.float32)), fc2=eq.Dense(np.ones((1, 1), np.float32)))
    f = eq.Factorization.of(graph, {"fc1": [16.0]})
    with pytest.raises(ValueError, match=r"node 'fc1': the rescaled weight overflows float32: .*; use smaller factors"):
        f.apply(graph)
    assert graph["fc1"].op.weight == np.float32(1e38)  # nothing changed
