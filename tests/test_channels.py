"""Labels, ties, pins and degrees of freedom: counted by hand, counted by rank, and tried out."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nets import BY_NAME, NETS, conv, dense

import eqfact as eq
from eqfact.ops.base import Relation, Trace
from eqfact.testing import laws
from eqfact.testing.strategies import batches, networks

module = sys.modules["eqfact.channels"]
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
    seen = np.unique(np.concatenate([*resolved.labels.values(), [0]]))
    assert seen[-1] < resolved.size and resolved.forms.shape == (resolved.size, resolved.degrees_of_freedom + 1)
    if graph.traced.relations:  # a free number may stand in forms of several only: 2 u = 3 v
        assert abs(resolved.forms[seen]).sum(axis=0)[1:].all()
    else:
        assert seen.tolist() == list(range(resolved.degrees_of_freedom + 1)) and resolved.compound is None


@given(networks())
def test_a_channel_is_pinned_if_and_only_if_there_is_a_reason(graph):
    resolved = eq.channels(graph)
    for value, labels in resolved.labels.items():
        assert [reason is None for reason in resolved.reasons[value]] == (labels > 0).tolist()
        assert (value in resolved.pinned) == bool((labels == 0).any())


@given(networks(), st.data())
def test_where_some_numbers_are_left_forms_lose_the_others_and_pins_keep_their_reasons(graph, data):
    resolved = eq.channels(graph)
    count = resolved.degrees_of_freedom
    chosen = np.array([False, *data.draw(st.lists(st.booleans(), min_size=count, max_size=count))])
    left = resolved.restricted(chosen, "not asked for")
    assert left.degrees_of_freedom == chosen.sum()
    for value, labels in resolved.labels.items():
        forms = resolved.forms[labels].toarray()[:, chosen]
        assert np.array_equal(left.forms[left.labels[value]].toarray()[:, 1:], forms)
        assert left.reasons[value] == tuple(old if old is not None or form.any() else "not asked for"
                                            for old, form in zip(resolved.reasons[value], forms, strict=True))


@given(networks())
def test_ends_are_pinned(graph):
    resolved = eq.channels(graph)
    for value in (*graph.inputs, *graph.outputs):
        assert not resolved.labels[value].any()


@given(networks())
def test_tied_channels_are_those_that_merging_joins(graph):
    resolved, classes = eq.channels(graph), laws.tie_classes(graph)
    root_of, label_of = {}, {}
    for value, labels in resolved.labels.items():
        for label, root in zip(labels.tolist(), classes[value].tolist(), strict=True):
            assert label_of.setdefault(root, label) == label
            if label and not graph.traced.relations:  # these tie channels, too
                assert root_of.setdefault(label, root) == root


@given(networks())
def test_forms_solve_every_relation(graph):
    resolved = eq.channels(graph)
    of_raw = np.zeros(graph.traced.size, np.int64)
    for value, full in graph.labels.items():
        of_raw[full.reshape(len(full), -1)[:, 0]] = resolved.labels[value]
    for relation in graph.traced.relations:
        total = sum(c * resolved.forms[of_raw[term]] for c, term in zip(relation.coefficients, relation.labels.T, strict=True))
        assert not total.toarray()[:, 1:].any()


@given(networks(), st.data())
def test_labels_that_follow_are_products_of_powers_of_the_free_numbers(graph, data):
    resolved = eq.channels(graph)
    count = resolved.degrees_of_freedom
    free = np.exp2([0.0, *data.draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count))])
    factors = np.exp2(resolved.forms.toarray() @ np.log2(free))
    assert np.array_equal(resolved.by_label(free), factors)
    for follower in range(count + 1, resolved.size):
        f = np.where(np.arange(resolved.size) == follower, 7.0, factors)
        resolved.follow(f, np.array([follower]))
        assert np.array_equal(f, factors)


# ------------------------------------------------------------------------------------------------ whole-number systems


def solved(system):
    """Pins and ties left aside: the forms of as many variables as there are columns."""
    rows, count = system
    reason_of = np.full(count, -1)
    relations = [Relation(tuple(c for _, c in row), np.array([[v for v, _ in row]]), f"row {i}", "why") for i, row in enumerate(rows)]
    return module._solve(np.arange(count), relations, reason_of, 0), reason_of


systems = st.integers(1, 8).flatmap(lambda count: st.tuples(
    st.lists(st.lists(st.tuples(st.integers(0, count - 1), st.integers(-6, 6)), min_size=1, max_size=4), max_size=8), st.just(count)))


def matrix(rows, count):
    a = np.zeros((len(rows), count), np.int64)
    for i, row in enumerate(rows):
        for variable, c in row:
            a[i, variable] += c
    return a


@given(systems)
def test_every_whole_solution_is_a_whole_combination_and_none_is_left_out(system):
    forms, reason_of = solved(system)
    a, b = matrix(*system), forms.toarray()
    assert not (a @ b).any()
    assert b.shape[1] == a.shape[1] - (np.linalg.matrix_rank(a.astype(float)) if a.size else 0)
    for prime in (2, 3, 5, 7, 11, 13):  # u = B t whole with t not whole would make B t = 0 modulo some prime
        assert rank_modulo(b, prime) == b.shape[1]
    assert ((reason_of >= 0) == ~b.any(axis=1)).all()


def rank_modulo(matrix_, prime):
    rows, rank = [[int(x) % prime for x in row] for row in matrix_], 0
    for column in range(matrix_.shape[1]):
        pivot = next((i for i in range(rank, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        inverse = pow(rows[rank][column], -1, prime)
        for i in range(rank + 1, len(rows)):
            factor = rows[i][column] * inverse % prime
            rows[i] = [(x - factor * y) % prime for x, y in zip(rows[i], rows[rank], strict=True)]
        rank += 1
    return rank


@pytest.mark.parametrize(("row", "expected"), [
    ([(0, 2)], [[]]), ([(0, 2), (1, -2)], [[1], [1]]), ([(0, 2), (1, -3)], [[3], [2]]), ([(0, 1), (1, 1)], [[-1], [1]]),
    ([(0, 1), (0, 1), (1, -1)], [[1], [2]]), ([(0, 6), (1, 10), (1, -1)], [[-3], [2]]),
])
def test_one_relation_by_hand(row, expected):
    forms, _ = solved(([row], 1 + max(v for v, _ in row)))
    got = forms.toarray().tolist()
    assert got == expected or got == [[-x for x in line] for line in expected]


def test_what_follows_is_expressed_by_what_it_follows_from():
    """The first term of a relation gives way: the output of a product, not the inputs."""
    forms, _ = solved(([[(2, 1), (0, -1), (1, -1)]], 3))
    assert forms.toarray().tolist() == [[1, 0], [0, 1], [1, 1]]


def test_a_pin_that_follows_from_several_relations_has_a_reason():
    _, reason_of = solved(([[(0, 1), (1, 1)], [(0, 1), (1, -1)]], 2))  # u + v = 0 = u - v
    assert (reason_of == 1).all()


def test_eliminations_that_forget_a_remainder_are_caught(monkeypatch):
    monkeypatch.setattr(module._Elimination, "_replace", lambda self, variable, form, cause: self.forms.update({variable: {}}))
    with pytest.raises((AssertionError, LookupError)):
        test_every_whole_solution_is_a_whole_combination_and_none_is_left_out.hypothesis.inner_test(([[(0, 2), (1, -3)]], 2))


def test_labels_of_a_network_of_eight_billion_parameters_are_solved_by_structure():
    """Thirty-two blocks of width 4096: grouped queries, rotary pairs, SwiGLU. Their weights are not there, only labels."""
    trace, width, heads, kv_heads, hidden = Trace(), 4096, 32, 8, 14336
    d, stream = width // heads, None
    for block in range(32):
        q, k, v, gate, up = (trace.fresh((n, 1)) for n in (width, kv_heads * d, kv_heads * d, hidden, hidden))
        mix, product, out, down, scores = (trace.fresh((n, 1)) for n in (width, hidden, width, width, heads))
        of_head = [np.repeat(x[:, 0].reshape(kv_heads, d), heads // kv_heads, axis=0).reshape(-1) for x in (k, v)]
        for x, count in ((q, heads), (k, kv_heads)):
            pairs = x[:, 0].reshape(count, 2, d // 2)
            trace.tie(pairs[:, 0].reshape(-1), pairs[:, 1].reshape(-1))
        trace.node = f"block{block}"
        trace.relate((1, q), (1, of_head[0]), (-1, np.repeat(scores[:, 0], d)), reason="scores")
        trace.pin(scores, "softmax")
        trace.pin(gate, "silu")
        trace.relate((1, mix), (-1, of_head[1]), reason="mix")
        trace.relate((1, product), (-1, gate), (-1, up), reason="gate")
        stream = out if stream is None else stream
        trace.tie(stream, out)
        trace.tie(stream, down)
    trace.pin(stream, "norm")
    component = module._components(trace.size, trace.ties)
    reason_of = np.full(int(component.max()) + 1, -1)
    for labels_, _ in trace.pins:
        reason_of[component[labels_]] = 0
    forms = module._solve(component, trace.relations, reason_of, 1)
    assert trace.size > 2**20
    assert forms.shape[1] == 32 * (kv_heads * d // 2 + kv_heads * d + hidden)


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
    ("residual around a product", "gate", "held by 'mul': Mul multiplies values, and the factors of the others leave it none"),
    ("square that is an output", "stem", "held by 'square': Mul multiplies values, and the factors of the others leave it none"),
    ("squeeze and excite", "excite", "read by 'gate': Sigmoid is not positively homogeneous"),
    ("attention", "scores", "read by 'prob': Softmax is not positively homogeneous"),
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
