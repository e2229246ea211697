"""Labels, ties, pins and degrees of freedom: counted by hand, counted by rank, and tried out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nets import BY_NAME, NETS, conv, dense

import eqfact as eq
from eqfact.testing import laws
from eqfact.testing.strategies import batches, networks

any_net = pytest.mark.parametrize("net", NETS, ids=str)


@any_net
def test_degrees_of_freedom_are_those_counted_by_hand(net):
    assert eq.degrees_of_freedom(net.graph) == net.degrees_of_freedom
    assert eq.channels(net.graph).degrees_of_freedom == net.degrees_of_freedom


@any_net
def test_degrees_of_freedom_are_those_that_the_equations_leave(net):
    laws.degrees_of_freedom_are_maximal(net.graph, net.data())


@any_net
def test_the_pinned_values_are_those_named_by_hand(net):
    assert set(eq.channels(net.graph).pinned) == net.pinned


@any_net
def test_every_free_label_is_free(net):
    laws.every_free_label_is_free(net.graph, net.data())


@any_net
def test_every_pin_is_needed(net):
    laws.every_pin_is_needed(net.graph, net.data())


@any_net
def test_no_channel_moves_alone(net):
    laws.no_channel_moves_alone(net.graph)


@given(networks())
def test_no_channel_of_a_random_network_moves_alone(graph):
    laws.no_channel_moves_alone(graph)


@given(networks().flatmap(lambda graph: st.tuples(st.just(graph), batches(graph))))
def test_every_free_label_of_a_random_network_is_free(drawn):
    laws.every_free_label_is_free(*drawn)


@given(networks())
def test_labels_number_the_free_factors_in_order(graph):
    resolved = eq.channels(graph)
    assert list(resolved.labels) == list(graph.shapes)
    assert all(labels.shape == graph.shapes[value][:1] for value, labels in resolved.labels.items())
    seen = list(dict.fromkeys(np.concatenate([*resolved.labels.values(), [0]]).tolist()))
    assert sorted(seen) == list(range(resolved.degrees_of_freedom + 1))


@given(networks())
def test_a_channel_is_pinned_if_and_only_if_there_is_a_reason(graph):
    resolved = eq.channels(graph)
    for value, labels in resolved.labels.items():
        assert [reason is None for reason in resolved.reasons[value]] == (labels > 0).tolist()
        assert (value in resolved.pinned) == bool((labels == 0).any())


@given(networks())
def test_ends_are_pinned(graph):
    resolved = eq.channels(graph)
    for value in (*graph.inputs, *graph.outputs):
        assert not resolved.labels[value].any()


@given(networks())
def test_tied_channels_are_those_that_merging_joins(graph):
    resolved, classes = eq.channels(graph), laws.tie_classes(graph)
    root_of = {}
    for value, labels in resolved.labels.items():
        for label, root in zip(labels.tolist(), classes[value].tolist(), strict=True):
            if label:
                assert root_of.setdefault(label, root) == root
    assert len(set(root_of.values())) == len(root_of)


# ------------------------------------------------------------------------------------------------ labels by hand


def labels(name):
    return {value: of.tolist() for value, of in eq.channels(BY_NAME[name].graph).labels.items()}


def test_flatten_repeats_each_channels_label_over_its_pixels():
    assert labels("flatten")["flat"] == [1] * 6 + [2] * 6


def test_concat_puts_labels_side_by_side():
    found = labels("concat")
    assert (found["a"], found["b"]) == ([5, 6, 7], [8, 9])
    assert found["cat"] == [5, 6, 7, 8, 9]


def test_permute_moves_labels():
    found = labels("shuffle")
    assert (found["stem"], found["shuffle"]) == ([1, 2, 3, 4], [1, 3, 2, 4])
    assert (found["groups"], found["back"]) == ([5, 6, 7, 8], [8, 6, 5, 7])


def test_slice_selects_labels():
    found = labels("slice")
    assert (found["left"], found["right"], found["cat"]) == ([1, 2], [3, 4], [5, 6, 3, 4])


def test_add_ties_labels():
    found = labels("residual")
    assert found["stem"] == found["narrow"] == found["add"] == [1, 2, 3, 4]


def test_a_conv_used_twice_carries_one_factor_on_both_sides():
    found = labels("conv used twice")
    assert found["stem"] == found["first"] == found["act"] == found["second"] == [1, 2, 3]


def test_a_pin_holds_one_channel_only():
    assert labels("one channel of three into a curve")["fc"] == [0, 1, 2]


# ------------------------------------------------------------------------------------------------ reasons


@pytest.mark.parametrize(("name", "value", "reason"), [
    ("chain", "x", "network input 'x'"),
    ("chain", "fc2", "network output 'fc2'"),
    ("inner value that is an output", "fc1", "network output 'act'"),
    ("sigmoid", "fc1", "read by 'curve': Sigmoid is not positively homogeneous"),
    ("sigmoid", "curve", "made by 'curve': Sigmoid is not positively homogeneous"),
    ("squeeze and excite", "stem", "read by 'mul': Mul multiplies two values, whose factors would multiply too"),
    ("pad with a constant", "stem", "read by 'pad': Pad with the constant 1.5 would have to pad 1.5 * f"),
    ("residual onto the input", "narrow", "network input 'x'"),
    ("one channel of three into a curve", "fc", "1 of 3 channels: read by 'curve': Tanh is not positively homogeneous"),
    ("dense block", "cat1", "2 of 4 channels: network input 'x'"),
])
def test_the_reason_of_a_pin_names_its_origin(name, value, reason):
    assert eq.channels(BY_NAME[name].graph).pinned[value] == reason


def test_held_values_are_pinned_with_their_reason():
    graph = BY_NAME["residual"].graph
    resolved = eq.channels(graph, hold={"narrow": "asked for"})
    assert resolved.degrees_of_freedom == 6
    assert all(resolved.pinned[value] == "asked for" for value in ("stem", "narrow", "add"))
    assert eq.degrees_of_freedom(graph) == 10  # nothing stays held


def test_holding_an_unknown_value_is_refused():
    with pytest.raises(ValueError, match="'nope' is to be held, but is not a value of the network"):
        eq.channels(BY_NAME["chain"].graph, hold={"nope": "why"})


def test_labels_are_read_only():
    resolved = eq.channels(BY_NAME["chain"].graph)
    with pytest.raises(ValueError, match="read-only"):
        resolved.labels["act"][0] = 0


# ------------------------------------------------------------------------------------------------ what equal arrays do not mean


def test_two_ops_with_equal_weights_are_not_tied():
    once = conv(3, 3)
    again = eq.Conv(once.weight, once.bias)
    graph = eq.Graph({"x": (2, 2, 2)}, [eq.Node("stem", conv(3, 2), ["x"]), eq.Node("a", once, ["stem"]), eq.Node("b", again, ["a"]),
                                        eq.Node("head", conv(1, 3), ["b"])], ["head"])
    assert eq.degrees_of_freedom(graph) == 9


def test_an_activation_used_twice_ties_nothing():
    act = eq.ReLU6()
    graph = eq.Graph.chain((2,), a=dense(3, 2), act1=act, b=dense(4, 3), act2=act, c=dense(1, 4))
    assert eq.degrees_of_freedom(graph) == 7
    x = np.random.default_rng(0).normal(size=(6, 2)) * 5
    factors = eq.Factorization.of(graph, {"act1": [1.0, 2.0, 4.0], "act2": [0.5, 8.0, 1.0, 2.0]})
    laws.rescaling_multiplies_every_value_by_its_factor(graph, factors, x)


def test_a_conv_without_bias_used_twice_is_tied_a_little_more_than_it_must():
    """One common factor could move from one use to the other; a label cannot say "twice as much as that one", so it is refused."""
    rng = np.random.default_rng(0)
    twice = eq.Conv(rng.normal(size=(3, 2, 1)))
    nodes = [eq.Node("a", conv(2, 2, axes=1), ["x"]), eq.Node("b", conv(2, 2, axes=1), ["x"]), eq.Node("of_a", twice, ["a"]),
             eq.Node("of_b", twice, ["b"]), eq.Node("cat", eq.Concat(), ["of_a", "of_b"]), eq.Node("head", conv(1, 6, axes=1), ["cat"])]
    graph = eq.Graph({"x": (2, 4)}, nodes, ["head"])
    with pytest.raises(AssertionError, match="5 factors are called free, the equations leave 6 free"):
        laws.degrees_of_freedom_are_maximal(graph, rng.normal(size=(20, 2, 4)))
