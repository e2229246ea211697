"""``sqnr`` against its formula in plain numbers, and ``verify``: yes to every equivalent network, no to planted mistakes."""

from __future__ import annotations

import dataclasses
import itertools
import math

import handmade
import numpy as np
import pytest
from handmade import Maker
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS as TABLE

import eqfact as eq
from eqfact.ops import convolution, weighted
from eqfact.testing.strategies import batches, factorizations, networks
from eqfact.verification import _Compared, _slopes

# ------------------------------------------------------------------------------------------------ sqnr


def sqnr_by_loops(reference, test):
    signal = sum(v * v for v in reference)
    noise = sum((v - w) ** 2 for v, w in zip(reference, test, strict=True))
    return math.inf if noise == 0 else -math.inf if signal == 0 else 10 * math.log10(signal / noise)


@given(st.lists(st.tuples(*[st.floats(-100, 100).map(lambda v: round(v, 6))] * 2), min_size=1, max_size=8))
def test_sqnr_is_signal_over_noise_in_decibels(pairs):
    reference, test = zip(*pairs, strict=True)
    assert eq.sqnr(np.array(reference), np.array(test)) == pytest.approx(sqnr_by_loops(reference, test), rel=1e-12, abs=1e-12)


def test_sqnr_by_hand():
    assert eq.sqnr(np.array([[3.0, 4.0]]), np.array([[3.0, 4.5]])) == pytest.approx(20)  # 25 / 0.25
    assert eq.sqnr(np.ones(4), np.zeros(4)) == 0
    assert eq.sqnr(np.ones(2, np.float32), np.array([1.0, 1.1], np.float32)) == pytest.approx(10 * math.log10(2 / 0.01), rel=1e-5)


def test_sqnr_is_infinite_for_equal_arrays_and_minus_infinite_without_signal():
    assert eq.sqnr(np.ones(3), np.ones(3)) == math.inf
    assert eq.sqnr(np.zeros(3), np.zeros(3)) == math.inf
    assert eq.sqnr(np.zeros(3), np.ones(3)) == -math.inf


def test_sqnr_of_several_outputs_takes_all_entries_together():
    reference, test = {"a": np.array([3.0]), "b": np.array([4.0, 0.0])}, {"b": np.array([4.0, 0.5]), "a": np.array([3.0])}
    assert eq.sqnr(reference, test) == pytest.approx(20)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_sqnr_does_not_depend_on_the_unit(scale):
    """Squares of 1e-200 and 1e200 leave the range of floats: both sides are to be measured in one unit."""
    reference, test = np.array([3.0, 4.0]), np.array([3.0, 4.5])
    assert eq.sqnr(scale * reference, scale * test) == pytest.approx(20)


def test_sqnr_refuses_what_cannot_be_compared():
    with pytest.raises(ValueError, match=r"sqnr needs equal shapes, got \(2,\) and \(3,\)"):
        eq.sqnr(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match=r"sqnr needs equal shapes, got \(2, 1\) and \(2,\)"):
        eq.sqnr(np.ones((2, 1)), np.ones(2))
    with pytest.raises(ValueError, match=r"sqnr needs the same names on both sides, got \['a'\] and \['b'\]"):
        eq.sqnr({"a": np.ones(1)}, {"b": np.ones(1)})
    with pytest.raises(TypeError, match="sqnr compares two arrays or two dicts of arrays"):
        eq.sqnr({"a": np.ones(1)}, np.ones(1))
    for bad in (np.nan, np.inf):
        for sides in ((np.ones(2), np.array([1.0, bad])), (np.array([1.0, bad]), np.ones(2))):
            with pytest.raises(ValueError, match="sqnr needs finite arrays"):
                eq.sqnr(*sides)


# ------------------------------------------------------------------------------------------------ equivalent networks are equal

each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])
each_net = pytest.mark.parametrize("build", handmade.NETS, ids=lambda f: f.__name__)


@settings(max_examples=120)
@given(networks().flatmap(lambda g: st.tuples(st.just(g), batches(g), factorizations(g, powers_of_two=False))))
def test_every_rescaled_random_network_is_equal(drawn):
    graph, x, factors = drawn
    for a, b in ((graph, factors.apply(graph)), (factors.apply(graph), graph)):
        verdict = eq.verify(a, b, x)
        assert verdict, verdict.message
        assert verdict.message.startswith("equal: "), "inner values agree, too"
        assert verdict.max_error <= verdict.bound


@each_net
@each_dtype
def test_every_rescaled_network_is_equal_and_itself_without_error(build, dtype):
    m = Maker(1, dtype)
    graph = build(m)
    x = m.data(graph)
    itself = eq.verify(graph, graph, x)
    assert itself.equal is True
    assert (itself.max_error, itself.bound, itself.apart) == (0, 0, 0)
    assert itself.message == "equal: the same operations on the same parameters"
    copied = eq.verify(graph, graph.with_ops({n.name: dataclasses.replace(n.op) for n in graph}), x)
    assert copied.max_error == 0
    assert copied.message.startswith("equal: largest error 0 within ")
    rng = np.random.default_rng(2)
    resolved = eq.channels(graph)
    for spread in (0.1, 1.0, 5.0):  # factors up to a hundred thousand
        factors = eq.Factorization(resolved, np.concatenate([[1.0], np.exp(rng.normal(scale=spread, size=resolved.degrees_of_freedom))]))
        verdict = eq.verify(graph, factors.apply(graph), x)
        assert verdict, verdict.message


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_every_topology_is_equal_to_its_rescaled_self(row):
    rng = np.random.default_rng(3)
    resolved = eq.channels(row.graph)
    factors = eq.Factorization(resolved, np.concatenate([[1.0], np.exp(rng.normal(size=resolved.degrees_of_freedom))]))
    assert eq.verify(row.graph, factors.apply(row.graph), row.data())


@each_dtype
def test_a_network_and_its_folded_one_are_equal(dtype):
    m = Maker(4, dtype)
    graph = eq.Graph.chain((2, 5), a=m.conv(3, 2, 2), bn=m.batchnorm(3), act=eq.ReLU(), b=m.conv(2, 3, 2), bn2=m.batchnorm(2))
    assert eq.verify(graph, eq.fold_batchnorm(graph), m.data(graph))
    assert eq.verify(eq.fold_batchnorm(graph), graph, m.data(graph))


def test_networks_of_different_architecture_with_equal_outputs_are_equal():
    m = Maker(5)
    w1, w2 = m.weight(4, 3), m.weight(2, 4)
    two = eq.Graph.chain((3,), hidden=eq.Dense(w1), out=eq.Dense(w2))
    one = eq.Graph.chain((3,), out=eq.Dense(w2 @ w1))
    assert eq.verify(two, one, m.data(two))
    assert eq.verify(one, two, m.data(two))
    wrong = eq.Graph.chain((3,), out=eq.Dense(w2 @ w1 * 1.001))
    assert not eq.verify(two, wrong, m.data(two))
    assert not eq.verify(wrong, two, m.data(two))


def test_an_inner_value_of_the_same_name_but_another_meaning_does_not_decide():
    """Two hidden units in another order under the same name: no factors explain it, yet the function is the same."""
    w1, w2 = np.array([[1.0, 2.0], [-1.0, 3.0]]), np.array([[1.0, -2.0]])
    a = eq.Graph.chain((2,), hidden=eq.Dense(w1), act=eq.ReLU(), out=eq.Dense(w2))
    b = eq.Graph.chain((2,), hidden=eq.Dense(w1[::-1].copy()), act=eq.ReLU(), out=eq.Dense(w2[:, ::-1].copy()))
    verdict = eq.verify(a, b, np.random.default_rng(6).normal(size=(9, 2)))
    assert verdict
    assert verdict.message.startswith("equal at the outputs")
    assert "inner values of the same name differ, first 'hidden'" in verdict.message
    assert verdict.worst == "out"


def test_one_label_on_live_and_dead_channels_is_read_off_the_live_ones():
    """A dead channel tells nothing of the factor that it shares with others: here both channels of the stream are one label."""
    nodes = [eq.Node("a", eq.Dense(np.array([[1.0], [0.0]])), ["x"]), eq.Node("turn", eq.Permute((1, 0)), ["a"]),
             eq.Node("add", eq.Add(), ["a", "turn"]), eq.Node("out", eq.Dense(np.array([[1.0, 2.0]])), ["add"])]
    graph = eq.Graph({"x": (1,)}, nodes, ["out"])
    verdict = eq.verify(graph, eq.Factorization.of(graph, {"a": [3.0, 3.0]}).apply(graph), np.array([[1.0], [-2.0]]))
    assert verdict.message.startswith("equal: ")


def test_channels_of_one_label_have_one_factor():
    """Where two channels that are tied are multiplied by two factors, it is there that the networks part, not behind."""
    nodes = [eq.Node("a", eq.Dense(np.array([[1.0], [2.0]])), ["x"]), eq.Node("turn", eq.Permute((1, 0)), ["a"]),
             eq.Node("add", eq.Add(), ["a", "turn"]), eq.Node("out", eq.Dense(np.array([[1.0, 2.0]])), ["add"])]
    graph = eq.Graph({"x": (1,)}, nodes, ["out"])
    parts_at(graph, graph.with_ops({"a": eq.Dense(np.array([[2.0], [12.0]]))}), np.array([[1.0], [-2.0]]), "a")


@pytest.mark.parametrize("factor", [1.23e-42, 1e40])
def test_factors_beyond_what_the_networks_own_numbers_hold_are_read_as_they_are(factor):
    """Weights and values are as large as others; beside such a factor stands a common one."""
    size = min(max(1 / factor, 1e-30), 1e30)
    first, second = np.array([[1.5, 2.3], [0.7, 1.1]]) * [[size], [1]], np.array([[1.3, 0.9]]) / [size, 1]
    graph = eq.Graph.chain((2,), a=eq.Dense(first.astype(np.float32)), act=eq.ReLU(), out=eq.Dense(second.astype(np.float32)))
    verdict = eq.verify(graph, eq.Factorization.of(graph, {"act": [factor, 3.0]}).apply(graph), np.float32([[1, 2], [0.3, 0.7]]))
    assert verdict.message.startswith("equal: ")
    assert verdict.apart < 1e-6


@each_net
def test_a_network_and_its_copy_of_another_precision_are_equal(build):
    """Up to roundings of the coarser one; and what is one product of two of its numbers is rounded there as the product itself is."""
    m = Maker(6, "float32")
    graph = build(m)
    fine, x = in_float64(graph), m.data(graph)
    for a, b in ((graph, fine), (fine, graph)):
        verdict = eq.verify(a, b, x)
        assert verdict.message.startswith("equal: "), verdict.message
    product = eq.Graph.chain((1,), a=eq.Dense(np.float32([[1.1]])))
    assert eq.verify(in_float64(product), product, np.float32([[1.7], [0.3]])).max_error == 0


@each_net
def test_of_inner_values_the_first_bound_that_holds_is_told_and_none_is_larger_than_the_last(build, monkeypatch):
    """First what an op that adds up nothing rounds itself, then the errors of one network, then those of both."""
    graph, right, asked = build(Maker(26)), _Compared.agreement, []

    def checked(compared, near):
        *cheap, last = compared.bounds()
        assert len(cheap) == (1 if isinstance(compared.node.op, eq.Weighted) else 2)
        assert all((bound <= last * (1 + 1e-9)).all() for bound in cheap), compared.node.name
        found = right(compared, near)
        if near is None:
            first = next(bound for bound in (*cheap, last) if (compared.error <= bound).all())
            assert found.bound in first
            asked.append(compared.node.name)
        return found
    monkeypatch.setattr(_Compared, "agreement", checked)
    for start in (rescaled(graph, 1)[0], rescaled(graph, 2)[0]):
        assert eq.verify(graph, start, Maker(27).data(graph))
    assert asked


def test_an_input_that_is_put_out_as_it_came_is_equal():
    m = Maker(7)
    plain = handmade.plain(m)
    graph = eq.Graph(dict(plain.inputs), plain.nodes, ["fc", "x"])
    x = m.data(graph)
    assert eq.verify(graph, rescaled(graph)[0], x)
    op = graph["conv1"].op
    wrong = graph.with_ops({"conv1": dataclasses.replace(op, weight=op.weight[[1, 0, 2, 3]], bias=op.bias[[1, 0, 2, 3]])})
    assert not eq.verify(graph, wrong, x)


def test_outputs_may_not_differ_by_a_factor():
    m = Maker(7)
    graph = handmade.plain(m)
    doubled = graph.with_ops({"fc": dataclasses.replace(graph["fc"].op, weight=2 * graph["fc"].op.weight, bias=2 * graph["fc"].op.bias)})
    verdict = eq.verify(graph, doubled, m.data(graph))
    assert not verdict
    assert verdict.worst == "fc"


# ------------------------------------------------------------------------------------------------ planted mistakes are found


def rescaled(graph, seed=8):
    """A rescaled network, as a correct pass would return it, and its factors."""
    rng = np.random.default_rng(seed)
    resolved = eq.channels(graph)
    factors = eq.Factorization(resolved, np.concatenate([[1.0], np.exp(rng.normal(size=resolved.degrees_of_freedom))]))
    return factors.apply(graph), factors


def parts_at(graph, wrong, x, *places):
    verdict = eq.verify(graph, wrong, x)
    assert verdict.equal is False
    assert not verdict
    assert verdict.worst in graph.outputs
    assert any(f"they part at '{place}'" in verdict.message for place in places), verdict.message
    assert verdict.message.startswith("not equal")


@each_net
@each_dtype
def test_a_weight_changed_by_one_percent_is_found(build, dtype):
    """The largest weight that makes a live channel, in every layer, in the network as given and rescaled; unless hardly an output moves."""
    m = Maker(9, dtype)
    graph = build(m)
    x = m.data(graph, 8)
    tried = 0
    for start in (graph, rescaled(graph)[0]):
        for node in start:
            if not isinstance(node.op, eq.Weighted) or isinstance(node.op, eq.BatchNorm):
                continue
            made = eq.values(graph, x)[node.name]
            live = np.abs(made).max(axis=(0, *range(2, made.ndim))) > 0
            weight = node.op.weight.copy()
            where = np.unravel_index(np.argmax(np.abs(weight) * live.reshape(-1, *(1,) * (weight.ndim - 1))), weight.shape)
            weight[where] *= 1.01
            wrong = start.with_ops({node.name: dataclasses.replace(node.op, weight=weight)})
            moved = max(float(np.abs(v - w).max() / np.abs(v).max()) for v, w in zip(outputs(start, x), outputs(wrong, x), strict=True))
            if moved > 1e-5:
                assert not eq.verify(graph, wrong, x), f"a weight of '{node.name}'"
                assert not eq.verify(wrong, graph, x), f"a weight of '{node.name}'"
                tried += 1
    assert tried >= 2


def outputs(graph, x):
    every = eq.values(graph, x)
    return [every[name] for name in graph.outputs]


@each_dtype
def test_a_bias_forgotten_when_rescaling_is_found(dtype):
    m = Maker(10, dtype)
    graph = handmade.plain(m)
    b, _ = rescaled(graph)
    wrong = b.with_ops({"conv2": dataclasses.replace(b["conv2"].op, bias=graph["conv2"].op.bias)})
    parts_at(graph, wrong, m.data(graph), "conv2")


@each_dtype
def test_a_factor_applied_on_the_producers_side_alone_is_found(dtype):
    m = Maker(11, dtype)
    graph = handmade.plain(m)
    b, factors = rescaled(graph)
    wrong = b.with_ops({"fc": graph["fc"].op})
    parts_at(graph, wrong, m.data(graph), "fc")
    wrong = b.with_ops({"conv2": graph["conv2"].op.rescale(factors["conv2"], np.ones(4))})
    parts_at(graph, wrong, m.data(graph), "conv2")


def test_a_factor_applied_on_the_readers_side_alone_is_found():
    m = Maker(12)
    graph = handmade.plain(m)
    b, factors = rescaled(graph)
    wrong = b.with_ops({"conv1": graph["conv1"].op})
    parts_at(graph, wrong, m.data(graph), "conv2")
    assert (factors["conv1"] != 1).any()


@each_dtype
def test_relu6_left_at_6_in_a_rescaled_network_is_found_where_the_data_saturates(dtype):
    m = Maker(13, dtype)
    graph = handmade.mobile(m)
    x = 8 * m.data(graph)
    assert (eq.values(graph, x)["act1"] == 6).any()
    b, _ = rescaled(graph)
    parts_at(graph, b.with_ops({"act1": eq.ReLU6()}), x, "act1", "depth")


def test_relu_instead_of_relu6_is_found_where_the_data_saturates():
    m = Maker(14)
    graph = handmade.mobile(m)
    x = 8 * m.data(graph)
    parts_at(graph, graph.with_ops({"act1": eq.ReLU()}), x, "act1")


def test_a_wrong_concat_offset_is_found():
    """The reader of a concat divided by the factors of another slice."""
    m = Maker(15)
    graph = handmade.concat(m)
    b, factors = rescaled(graph)
    shifted = np.roll(factors["cat"], 1)
    wrong = b.with_ops({"d": graph["d"].op.rescale(factors["d"], shifted)})
    parts_at(graph, wrong, m.data(graph), "d")


def test_flatten_factors_tiled_instead_of_repeated_are_found():
    m = Maker(16)
    graph = handmade.plain(m)
    b, factors = rescaled(graph)
    wrong = b.with_ops({"fc": graph["fc"].op.rescale(np.ones(3), np.tile(factors["act2"], 4))})
    parts_at(graph, wrong, m.data(graph), "fc")


def test_swapped_channels_are_found():
    m = Maker(17)
    graph = handmade.plain(m)
    order = [1, 0, 2, 3]
    op = graph["conv1"].op
    wrong = graph.with_ops({"conv1": dataclasses.replace(op, weight=op.weight[order], bias=op.bias[order])})
    parts_at(graph, wrong, m.data(graph), "conv1")


def test_a_residual_tie_ignored_is_found():
    m = Maker(18)
    graph = handmade.residual(m)
    f = np.array([2.0, 1.0, 0.5, 1.0])
    wrong = graph.with_ops({"b1": graph["b1"].op.rescale(f, np.ones(5))})
    x = m.data(graph)
    verdict = eq.verify(graph, wrong, x)
    assert not verdict


def test_an_attenuated_clip_that_stays_at_6_is_found_only_on_data_that_saturates():
    """PAPER 4: the f >= 0.7 rule of the authors' script keeps the function on some data and breaks it on other data."""
    graph = eq.Graph.chain((1,), a=eq.Dense(np.array([[1.0]])), act=eq.ReLU6(), b=eq.Dense(np.array([[1.0]])))
    wrong = eq.Graph.chain((1,), a=eq.Dense(np.array([[0.7]])), act=eq.ReLU6(), b=eq.Dense(np.array([[1 / 0.7]])))
    assert eq.verify(graph, wrong, np.array([[1.0], [5.0]]))
    assert not eq.verify(graph, wrong, np.array([[1.0], [7.0]]))


#: What ends a network of one convolution, and the numbers that its middle channel makes: all behind them are as small, or smaller.
ENDS = {
    "nothing": ([], 1.0), "relu": ([eq.ReLU()], 1.0), "relu6": ([eq.ReLU6()], 1.0), "clip": ([eq.Clip(-1.0, 2.0)], 1.0),
    "clip a channel": ([eq.Clip(np.array([-1.0, -3.0, 0.0]), np.array([2.0, 1.0, 3.0]))], 1.0), "leaky": ([eq.LeakyReLU(0.1)], 1.0),
    "tanh": ([eq.Tanh()], 1e-2), "erf": ([eq.Erf()], 1e-2), "pad": ([eq.Pad(1, 1.5)], 1.0),
    "pad behind a clip": ([eq.ReLU6(), eq.Pad(1, -2.0)], 1.0),
    "maximum": ([eq.MaxPool(2)], 1.0), "mean": ([eq.GlobalAvgPool(), eq.ReLU6()], 1.0), "gelu": ([eq.GELU()], 1e-2),
    "slice of a pad": ([eq.Pad(1, 1.5), eq.Slice(1, 2)], 1.0), "silu": ([eq.SiLU()], 1e-2), "hardswish": ([eq.HardSwish()], 1e-2),
    "sigmoid": ([eq.Sigmoid()], None), "softmax": ([eq.Softmax()], None), "softmax over space": ([eq.Softmax(2)], None),
    "sigmoid and clip": ([eq.Sigmoid(), eq.ReLU6()], None), "gelu far out": ([eq.GELU(True)], -3.0), "silu far out": ([eq.SiLU()], -30.0),
}


@each_dtype
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("smaller", [1.0, 1e-4, 1e-8, 1e-20])
def test_a_change_of_a_small_channel_is_found_whatever_comes_behind(dtype, end, smaller):
    """Neither the bound of a Clip nor the 1 of a Softmax nor a padded constant excuses an error of a number that is smaller than these."""
    ops, size = ENDS[end]
    rng = np.random.default_rng(30)
    weight = rng.uniform(0.5, 1, (3, 2, 1))
    if size is None:  # logits far below the others, in some pixels
        weight[1] *= -40 * (1 - smaller / 2)
    else:
        weight[1] *= size * (smaller if size > 0 else 1)
    x = rng.uniform(0.5, 1, (2, 2, 6)).astype(dtype)
    graph = eq.Graph.chain((2, 6), a=eq.Conv(weight.astype(dtype)), **{f"end{i}": op for i, op in enumerate(ops)})
    copied = {n.name: dataclasses.replace(n.op) for n in graph}
    for change in (1e-3, 1e-2, 1.0):
        wrong = graph.with_ops({**copied, "a": eq.Conv((weight * (1 + change * np.array([0, 1, 0]))[:, None, None]).astype(dtype))})
        for a, b in ((graph, wrong), (wrong, graph)):
            assert not eq.verify(a, b, x)
    assert eq.verify(graph, graph.with_ops(copied), x)


def in_float64(graph):
    """The same network, its parameters converted."""
    def converted(op):
        fields = {f.name: getattr(op, f.name) for f in dataclasses.fields(op)}
        return dataclasses.replace(op, **{k: v.astype(np.float64) for k, v in fields.items() if isinstance(v, np.ndarray)})

    ops = {id(node.op): converted(node.op) for node in graph}
    return graph.with_ops({node.name: ops[id(node.op)] for node in graph})


def with_row_times(graph, name, row, by):
    """One output channel of a layer multiplied, weights and bias, at all its uses."""
    op = graph[name].op
    rows = np.where(np.arange(op.out_channels) == row, by, 1.0)
    wrong = dataclasses.replace(op, weight=(op.weight * rows.reshape(-1, *[1] * (op.weight.ndim - 1))).astype(op.weight.dtype),
                                bias=None if op.bias is None else (op.bias * rows).astype(op.bias.dtype))
    return graph.with_ops({node.name: wrong for node in graph if node.op is op})


@settings(max_examples=200)
@given(networks().flatmap(lambda g: st.tuples(st.just(g), batches(g), factorizations(g, powers_of_two=False))),
       st.sampled_from([1.0, 1e-2, 1e-4, 1e-6, 1e-8]), st.sampled_from([1.001, 1.01, 1.1, 2.0, -1.0]), st.integers(0, 2**32 - 1))
def test_a_change_that_moves_an_output_far_beyond_its_roundings_is_found(drawn, smaller, by, seed):
    """Random networks with a row at any scale, and another row wrong, in float32: how large roundings are tells the network in float64."""
    graph, x, factors = drawn
    layers = [node.name for node in graph if isinstance(node.op, (eq.Dense, eq.Conv, eq.ConvTranspose))]
    if graph.dtype != np.float32 or not layers:
        return
    rng = np.random.default_rng(seed)
    small, wrong = (layers[i] for i in rng.integers(len(layers), size=2))
    graph = with_row_times(graph, small, rng.integers(graph[small].op.out_channels), smaller)
    truth, exact = eq.values(graph, x), eq.values(in_float64(graph), {n: eq.values(graph, x)[n].astype(np.float64) for n in graph.inputs})
    for start in (graph, eq.Factorization(eq.channels(graph), factors.free).apply(graph)):
        assert eq.verify(graph, start, x).message.startswith("equal: ")
        changed = with_row_times(start, wrong, rng.integers(start[wrong].op.out_channels), by)
        off = eq.values(changed, x)
        for name in graph.outputs:
            axes = (0, *range(2, truth[name].ndim))
            moved, rounded, size = (np.abs(v).max(axis=axes) for v in (off[name] - truth[name], exact[name] - truth[name], truth[name]))
            if np.any((moved > 5e-4 * size) & (moved > 1e4 * np.maximum(rounded, 2.0**-24 * size)) & (size > 0)):
                assert not eq.verify(graph, changed, x)
                assert not eq.verify(changed, graph, x)


# ------------------------------------------------------------------------------------------------ depth


def deep(layers, width, dtype):
    """A chain of dense layers that neither grows nor dies."""
    rng = np.random.default_rng(19)
    ops = {}
    for i in range(layers):
        spread = np.exp(rng.normal(size=(width, 1)))
        weight = rng.normal(size=(width, width)) * spread / np.sqrt(width) * 0.9
        ops[f"fc{i}"] = eq.Dense(weight.astype(dtype), rng.normal(size=width).astype(dtype))
        ops[f"act{i}"] = eq.ReLU()
    ops["out"] = eq.Dense(rng.normal(size=(3, width)).astype(dtype))
    return eq.Graph.chain((width,), **ops)


@each_dtype
def test_fifty_layers_are_still_equal_after_cross_layer_and_one_percent_in_the_middle_is_still_found(dtype):
    graph = deep(50, 12, dtype)
    x = np.random.default_rng(20).normal(size=(8, 12)).astype(dtype)
    result = eq.equalize(graph)
    verdict = eq.verify(graph, result.graph, x)
    assert verdict, verdict.message
    op = result.graph["fc25"].op
    weight = op.weight.copy()
    row = int(np.argmax(eq.values(graph, x)["act25"].max(axis=0) > 0))
    weight[row, int(np.argmax(np.abs(weight[row] * eq.values(result.graph, x)["act24"].max(axis=0))))] *= 1.01
    parts_at(graph, result.graph.with_ops({"fc25": dataclasses.replace(op, weight=weight)}), x, "fc25")


def deep_normalized(layers, width, dtype):
    """A residual network of convolutions, each with a BatchNorm behind it that gives its channels unit ranges."""
    rng = np.random.default_rng(21)
    nodes, stream = [], "x"
    for i in range(layers):
        weight = (rng.normal(size=(width, width, 3)) * np.exp(rng.normal(size=(width, 1, 1)))).astype(dtype)
        gamma, beta, mean = (rng.normal(size=width).astype(dtype) for _ in range(3))
        var = ((weight.astype(np.float64) ** 2).sum(axis=(1, 2)) * 2).astype(dtype)
        nodes += [eq.Node(f"conv{i}", eq.Conv(weight, padding=1), [stream]),
                  eq.Node(f"bn{i}", eq.BatchNorm(gamma, beta, mean, var), [f"conv{i}"]),
                  eq.Node(f"act{i}", eq.LeakyReLU(0.3), [f"bn{i}"])]
        stream = f"act{i}"
        if i % 5 == 4:
            nodes.append(eq.Node(f"add{i}", eq.Add(), [f"act{i}", f"act{i - 3}"]))
            stream = f"add{i}"
    nodes.append(eq.Node("out", eq.Conv(rng.normal(size=(2, width, 1)).astype(dtype)), [stream]))
    return eq.Graph({"x": (width, 6)}, nodes, ["out"])


@each_dtype
def test_fifty_layers_are_still_equal_after_folding_and_equalization_and_one_percent_in_the_middle_is_still_found(dtype):
    graph = deep_normalized(50, 8, dtype)
    x = np.random.default_rng(22).normal(size=(4, 8, 6)).astype(dtype)
    folded = eq.fold_batchnorm(graph)
    assert len(folded) == len(graph) - 50
    for method in ("one_step", "two_step", "cross_layer"):
        result = eq.equalize(folded, method, stats=eq.calibrate(folded, x))
        for a, b in ((graph, folded), (graph, result.graph), (folded, result.graph), (result.graph, graph)):
            verdict = eq.verify(a, b, x)
            assert verdict, verdict.message
        op = result.graph["bn25"].op
        read = np.abs(eq.values(result.graph, x)[result.graph["bn25"].inputs[0]]).max(axis=(0, 2))
        weight = op.weight.copy()
        weight[np.unravel_index(np.argmax(np.abs(weight) * read[:, None]), weight.shape)] *= 1.01
        parts_at(graph, result.graph.with_ops({"bn25": dataclasses.replace(op, weight=weight)}), x, "bn25")


# ------------------------------------------------------------------------------------------------ what it costs


def convolutions(monkeypatch, verdict):
    """How many convolutions a verdict takes."""
    calls = []
    right = convolution.convolve
    with monkeypatch.context() as counting:
        counting.setattr(weighted, "convolve", lambda *args: calls.append(1) or right(*args))
        assert verdict()
    return len(calls)


def stack(layers, dtype="float32"):
    """Depthwise and pointwise convolutions in turn, behind one another."""
    m = Maker(31, dtype)
    ops = {}
    for i in range(layers // 2):
        ops |= {f"a{i}": m.conv(6, 6, 1, 1), f"act{i}": eq.ReLU6(), f"b{i}": m.conv(6, 1, 3, 3, groups=6, padding=1), f"out{i}": eq.ReLU6()}
    return eq.Graph.chain((6, 8, 8), **ops, head=m.conv(2, 6, 1, 1))


def test_a_verdict_takes_no_more_than_four_convolutions_a_layer(monkeypatch):
    """Both networks from end to end, the second once more from where it starts afresh, and |W| for the errors; outputs twice that."""
    graph = stack(20)
    x = Maker(32, "float32").data(graph)
    other, _ = rescaled(graph)
    assert convolutions(monkeypatch, lambda: eq.verify(graph, other, x)) <= 4 * 21 + 2


def test_what_two_networks_share_is_computed_once(monkeypatch):
    """The same ops on the same values give the same values: nothing is compared before the networks differ."""
    graph = stack(20)
    x = Maker(32, "float32").data(graph)
    assert convolutions(monkeypatch, lambda: eq.verify(graph, graph, x)) == 21
    same = eq.Graph(dict(graph.inputs), graph.nodes, graph.outputs)
    assert eq.verify(graph, same, x).message == "equal: the same operations on the same parameters"
    end = graph.with_ops({"head": dataclasses.replace(graph["head"].op)})
    assert convolutions(monkeypatch, lambda: eq.verify(graph, end, x)) <= 21 + 5
    head = graph["head"].op
    alone = eq.Graph.chain((6, 8, 8), head=head)
    of_alone = eq.verify(alone, alone.with_ops({"head": dataclasses.replace(head)}), eq.values(graph, x)["out9"])
    assert eq.verify(graph, end, x).bound == of_alone.bound, "errors count from what is shared"
    wrong = graph.with_ops({"head": dataclasses.replace(head, bias=head.bias + np.float32(0.1))})
    parts_at(graph, wrong, x, "head")
    elsewhere = graph.with_ops({"b3": dataclasses.replace(graph["b3"].op, weight=graph["b3"].op.weight * np.float32(1.01))})
    parts_at(graph, elsewhere, x, "b3")


def test_the_same_op_on_other_values_is_not_the_same_value():
    op = eq.Dense(np.array([[2.0]]))
    a = eq.Graph({"x": (1,), "y": (1,)}, [eq.Node("out", op, ["x"])], ["out"])
    b = eq.Graph({"x": (1,), "y": (1,)}, [eq.Node("out", op, ["y"])], ["out"])
    assert not eq.verify(a, b, {"x": np.array([[1.0]]), "y": np.array([[3.0]])})


# ------------------------------------------------------------------------------------------------ the verdict


def test_the_fields_of_a_verification():
    m = Maker(21)
    graph = handmade.plain(m)
    x = m.data(graph)
    b, _ = rescaled(graph)
    verdict = eq.verify(graph, b, x)
    assert (verdict.equal, bool(verdict)) == (True, True)
    assert 0 < verdict.max_error <= verdict.bound < 1e-10
    assert verdict.worst in graph.shapes
    assert f"at '{verdict.worst}'" in verdict.message
    worst = {eq.verify(graph, rescaled(graph, seed)[0], x).worst for seed in range(8)}
    assert worst - {*graph.outputs}, "inner values count as well"


def test_the_first_value_where_two_networks_part_is_named():
    m = Maker(22)
    graph = handmade.mobile(m)
    x = m.data(graph)
    for name in ("stem", "expand", "depth", "project", "head", "fc"):
        op = graph[name].op
        wrong = graph.with_ops({name: dataclasses.replace(op, bias=op.bias + np.linspace(1, 2, len(op.bias)))})
        parts_at(graph, wrong, x, name)


@pytest.mark.parametrize("swapped", [False, True])
def test_where_one_network_lacks_a_channel_they_part_by_what_the_other_one_makes_there(swapped):
    rng = np.random.default_rng(3)
    (w, b, end), x = (rng.normal(size=size) for size in ((3, 4), 3, (2, 3))), rng.normal(size=(1, 4))
    whole, lacking = (eq.Graph.chain((4,), fc=eq.Dense(m * w, m[:, 0] * b), act=eq.LeakyReLU(0.5), out=eq.Dense(end)) for m in np.array(
        [[[1], [1], [1]], [[1], [0], [1]]]))
    made = abs(float(eq.values(whole, x)["fc"][0, 1]))
    verdict = eq.verify(*((lacking, whole) if swapped else (whole, lacking)), x)
    assert f"they part at 'fc', by {made:.3g} where" in verdict.message


def test_networks_with_other_inputs_or_outputs_are_not_compared():
    m = Maker(23)
    graph = handmade.plain(m)
    x = m.data(graph)
    other = eq.Graph(dict(graph.inputs), graph.nodes, ["act2"])
    with pytest.raises(ValueError, match=r"networks to compare need the same outputs, got .*'fc'.* and .*'act2'"):
        eq.verify(graph, other, x)
    taller = eq.Graph.chain((3, 6, 8), **{n.name: n.op for n in graph if n.name != "fc"} | {"fc": m.dense(3, 30)})
    with pytest.raises(ValueError, match=r"networks to compare need the same inputs, got \{'x': \(3, 6, 6\)\} and \{'x': \(3, 6, 8\)\}"):
        eq.verify(graph, taller, x)
    narrow = eq.Graph.chain((3, 6, 6), **{n.name: n.op for n in graph if n.name != "fc"} | {"fc": m.dense(2, 20)})
    with pytest.raises(ValueError, match="networks to compare need the same outputs"):
        eq.verify(graph, narrow, x)


def test_bad_data_is_refused_by_the_inputs_name():
    graph = handmade.plain(Maker(24))
    with pytest.raises(ValueError, match="input 'x' is an empty batch"):
        eq.verify(graph, graph, np.zeros((0, 3, 6, 6)))
    with pytest.raises(ValueError, match="input 'x' holds nan"):
        eq.verify(graph, graph, np.full((1, 3, 6, 6), np.nan))
    with pytest.raises(TypeError, match="input 'x' must be a floating array"):
        eq.verify(graph, graph, np.zeros((1, 3, 6, 6), int))


def test_the_outputs_may_come_in_another_order():
    m = Maker(25)
    graph = handmade.fan_out(m)
    other = eq.Graph(dict(graph.inputs), graph.nodes, graph.outputs[::-1])
    assert eq.verify(graph, other, m.data(graph))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_bound_that_is_loose_anywhere_proves_nothing(dtype):
    """Where magnitudes overflow on the way, the one output entry that is 0 in both networks must not stand for the others."""
    rng = np.random.default_rng(0)

    def deep(act):
        ops = {"fc0": eq.Dense((4 * rng.normal(size=(128, 8))).astype(dtype)), "act0": act}
        for i in range(1, 60):
            ops |= {f"fc{i}": eq.Dense((rng.normal(size=(128, 128)) * 1.4 / np.sqrt(128)).astype(dtype)), f"act{i}": eq.ReLU()}
        return eq.Graph.chain((8,), **ops)

    rng = np.random.default_rng(0)
    a = deep(eq.ReLU6())
    rng = np.random.default_rng(0)
    b = deep(eq.ReLU())
    x = np.random.default_rng(1).normal(size=(4, 8)).astype(dtype)
    assert eq.sqnr(eq.forward(a, x), eq.forward(b, x)) < 40
    assert not eq.verify(a, b, x)


def renamed(graph, names):
    """The same network under other names, where no name is shared."""
    other = {name: f"{name}'" for name in names}
    return eq.Graph(dict(graph.inputs), [eq.Node(other.get(n.name, n.name), n.op, [other.get(i, i) for i in n.inputs]) for n in graph],
                    graph.outputs)


@each_dtype
@pytest.mark.parametrize("shared", [0.0, 0.2, 1.0])
def test_yes_means_that_the_outputs_are_near_whatever_was_changed_and_however_few_names_are_shared(dtype, shared):
    rng = np.random.default_rng(28)
    graph = deep(30, 12, dtype)
    x = rng.normal(size=(4, 12)).astype(dtype)
    truth, verdicts = eq.forward(graph, x), []
    for step in range(36):
        name = f"fc{rng.integers(30)}"
        op = graph[name].op
        change = rng.normal(size=op.weight.shape) * 10.0 ** -(step % 9)
        wrong = graph.with_ops({name: dataclasses.replace(op, weight=op.weight * (1 + change).astype(dtype))})
        wrong = renamed(wrong, [n.name for n in graph if n.name != "out" and rng.random() >= shared])
        moved = float(np.abs(eq.forward(wrong, x) - truth).max() / np.abs(truth).max())
        verdict = eq.verify(graph, wrong, x)
        verdicts.append(bool(verdict))
        assert verdict or verdict.worst == "out"
        if verdict:
            assert moved < {"float32": 1e-4, "float64": 1e-8}[dtype]
    assert not all(verdicts)
    same = renamed(eq.equalize(graph).graph, [n.name for n in graph if n.name != "out" and rng.random() >= shared])
    assert eq.verify(graph, same, x)


def tent(layers, wrong):
    """``min(1.9 x, 1.9 - 1.9 x)`` again and again: it nearly doubles every error, so roundings end as large as the values."""
    ops = {}
    for i in range(layers):
        ops |= {f"both{i}": eq.Dense(np.array([[1 + wrong], [1]], np.float32), np.array([0, -0.5], np.float32)), f"act{i}": eq.ReLU(),
                f"tent{i}": eq.Dense(np.array([[1.9, -3.8]], np.float32))}
    return eq.Graph.chain((1,), **ops)


def test_a_yes_says_how_far_outputs_end_apart_where_roundings_grow():
    """Changes of the size of a rounding are equal up to rounding; that they end in another output is no secret."""
    x = np.random.default_rng(0).random((8, 1)).astype(np.float32)
    a, b = tent(26, 0.0), tent(26, 5e-7)
    verdict, truth = eq.verify(a, b, x), eq.forward(a, x)
    apart = np.abs(eq.forward(b, x) - truth).max() / np.abs(truth).max()
    assert apart > 0.01
    assert verdict.apart == pytest.approx(apart)
    assert not verdict or f"outputs end apart by {apart:.2g} of the largest" in verdict.message
    calm = eq.verify(tent(2, 0.0), tent(2, 1e-7), x)
    assert calm.apart < 1e-6
    assert "apart" not in calm.message
    assert not eq.verify(a, tent(26, 1e-4), x)


@each_dtype
def test_a_small_output_channel_beside_a_large_one_is_compared_by_itself(dtype):
    """With no inner name in common bounds are loose in depth, and the largest entry of the tensor must not excuse the others."""
    rng = np.random.default_rng(0)
    ops = {}
    for i in range(12):
        ops |= {f"p{i}": eq.Dense((1.4 * rng.normal(size=(64, 64)) / 8).astype(dtype)), f"q{i}": eq.ReLU()}
    last = (rng.normal(size=(2, 64)) * [[1e3], [1e-3]]).astype(dtype)
    a = eq.Graph.chain((64,), **ops, out=eq.Dense(last))
    x = rng.normal(size=(4, 64)).astype(dtype)
    inner = [n.name for n in a if n.name != "out"]
    assert eq.verify(a, renamed(a, inner), x)
    wrong = renamed(a.with_ops({"out": eq.Dense(last * np.array([[1], [-1]], dtype))}), inner)
    assert not eq.verify(a, wrong, x)


@each_dtype
@pytest.mark.parametrize("ends", [{}, {"relu": eq.ReLU()}, {"bn": "bn"}, {"curve": eq.Tanh()}, {"add": "add"}], ids="".join)
def test_outputs_that_happen_to_be_small_on_one_image_are_equal(dtype, ends):
    """One of a thousand outputs nearly cancels out on a single image; its rounding errors are those of the others."""
    rng = np.random.default_rng(4)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    for _ in range(5):
        nodes = [eq.Node("a", eq.Dense(normal(64, 32), normal(64)), ["x"]), eq.Node("act", eq.ReLU(), ["a"]),
                 eq.Node("b", eq.Dense(normal(1000, 64), normal(1000)), ["act"])]
        for name, op in ends.items():
            made = {"bn": eq.BatchNorm(*(normal(1000) for _ in range(3)), np.ones(1000, dtype)), "add": eq.Add()}.get(op, op)
            nodes.append(eq.Node(name, made, ["b", "b"] if op == "add" else ["b"]))
        graph = eq.Graph({"x": (32,)}, nodes, [nodes[-1].name])
        moved = eq.Factorization.of(graph, {"act": np.exp(rng.normal(size=64))}).apply(graph)
        x = normal(1, 32)
        assert eq.verify(graph, moved, x)
        bias = graph["b"].op.bias.copy()
        bias[np.abs(eq.values(graph, x)["b"][0]).argmin()] += 0.1
        wrong = moved.with_ops({"b": dataclasses.replace(moved["b"].op, bias=bias)})
        assert not eq.verify(graph, wrong, x)


@pytest.mark.parametrize(("dtype", "small"), [("float32", 1e-12), ("float32", 10**-12.5), ("float64", 1e-102), ("float64", 10**-102.5)])
def test_networks_whose_values_run_into_subnormal_numbers_are_equal(dtype, small):
    """There a rounding is no longer as small as the number."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        ops = {}
        for i in range(4):
            ops |= {f"a{i}": eq.Dense((rng.normal(size=(4, 4)) * (small if i < 3 else 1)).astype(dtype)), f"act{i}": eq.LeakyReLU(0.1)}
        graph = eq.Graph.chain((4,), **ops, out=eq.Dense(rng.normal(size=(2, 4)).astype(dtype)))
        factors = np.concatenate([[1.0], np.exp(2 * rng.normal(size=eq.degrees_of_freedom(graph)))])
        other = eq.Factorization(eq.channels(graph), factors).apply(graph)
        x = rng.normal(size=(3, 4)).astype(dtype)
        for a, b in ((graph, other), (other, graph)):
            verdict = eq.verify(a, b, x)
            assert verdict.message.startswith("equal: "), verdict.message


#: How far apart the sizes of channels are, as powers of ten, and what bounds them.
SPREADS = [(dtype, spread, end) for dtype, spreads in (("float32", (5, 15, 25, 30)), ("float64", (30, 100, 140, 200)))
           for spread in spreads for end in (eq.ReLU(), eq.ReLU6(), eq.Clip(-1e30, 1e35), eq.LeakyReLU(0.1))]


def spread_out(dtype, spread, end, seed):
    """A convolution whose channels differ by up to ``10**(2 spread)``, read so that all matter alike; and a rescaled one."""
    rng = np.random.default_rng(seed)
    sizes = 10.0 ** rng.uniform(-spread, spread, 6)
    graph = eq.Graph.chain(
        (2, 6), a=eq.Conv((rng.normal(size=(6, 2, 3)) * sizes[:, None, None]).astype(dtype), (rng.normal(size=6) * sizes).astype(dtype)),
        act=end, b=eq.Conv((rng.normal(size=(5, 6, 1)) / sizes[:, None]).astype(dtype)), act2=eq.ReLU(), pool=eq.GlobalAvgPool(),
        flat=eq.Flatten(), out=eq.Dense(rng.normal(size=(3, 5)).astype(dtype)))
    factors = np.concatenate([[1.0], 10.0 ** rng.uniform(-spread / 2, spread / 2, eq.degrees_of_freedom(graph))])
    return graph, eq.Factorization(eq.channels(graph), factors), rng.normal(size=(3, 2, 6)).astype(dtype)


@pytest.mark.parametrize(("dtype", "spread", "end"), SPREADS, ids=str)
def test_channels_spread_over_all_magnitudes_are_compared_without_a_warning(dtype, spread, end):
    """Whatever the verdict on what subnormal weights have lost; and yes where no weight is subnormal."""
    for seed in range(6):
        graph, factors, x = spread_out(dtype, spread, end, seed)
        with np.errstate(over="ignore"):
            finite = all(np.isfinite(v).all() for v in eq.values(graph, x).values())
        try:
            other = factors.apply(graph)
        except ValueError:
            continue  # a weight or bias overflows
        smallest = min(np.abs(n.op.weight[n.op.weight != 0]).min() for g in (graph, other) for n in g if isinstance(n.op, eq.Weighted))
        if finite:
            for a, b in ((graph, other), (other, graph), (graph, eq.equalize(graph).graph)):
                verdict = eq.verify(a, b, x)
                assert verdict or smallest < np.finfo(dtype).tiny, verdict.message
            for name, order in (("a", [5, 4, 3, 2, 1, 0]), ("b", [4, 3, 2, 1, 0])):  # rows in another order, and sizes with them
                op = graph[name].op
                mixed = dataclasses.replace(op, weight=op.weight[order], bias=None if op.bias is None else op.bias[order])
                for start in (graph, other):
                    wrong = start.with_ops({name: mixed})
                    with np.errstate(over="ignore"):
                        finite = all(np.isfinite(v).all() for v in eq.values(wrong, x).values())
                    if finite:
                        assert not eq.verify(graph, wrong, x)
                        assert not eq.verify(wrong, graph, x)


def test_outputs_that_overflow_are_refused_and_inputs_put_out_are_equal():
    huge = eq.Graph.chain((1,), a=eq.Dense(np.array([[1e30]], np.float32)), b=eq.Dense(np.array([[1e30]], np.float32)))
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="output 'b' of the first network overflows on this data"):
        eq.verify(huge, huge, np.ones((1, 1), np.float32))
    saturated = eq.Graph.chain((1,), **{n.name: n.op for n in huge}, act=eq.ReLU6(), out=eq.Dense(np.ones((1, 1), np.float32)))
    calm = saturated.with_ops({"b": eq.Dense(np.array([[1.0]], np.float32))})
    for a, b in ((saturated, calm), (calm, saturated)):
        with np.errstate(over="ignore"):
            verdict = eq.verify(a, b, np.ones((1, 1), np.float32))
        assert verdict and verdict.message.startswith("equal at the outputs"), verdict.message
    both = eq.Graph.chain((1,), a=eq.Dense(np.float32([[1e30], [1]])), b=eq.Dense(np.float32([[1e30, 0], [0, 1]])), act=eq.ReLU6(),
                          out=eq.Dense(np.ones((1, 2), np.float32)))
    with np.errstate(over="ignore"):
        parts_at(both, both.with_ops({"b": eq.Dense(np.float32([[1, 0], [0, -1]]))}), np.ones((1, 1), np.float32), "b")
    nothing = eq.Graph({"x": (2,)}, [], ["x"])
    verdict = eq.verify(nothing, nothing, np.ones((1, 2)))
    assert verdict.message == "equal: the inputs are put out as they come"
    assert (verdict.equal, verdict.max_error, verdict.bound, verdict.worst, verdict.apart) == (True, 0, 0, "x", 0)


# ------------------------------------------------------------------------------------------------ products


def hard_swishes(blocks, dtype):
    """``x clip(x + 3, 0, 6)`` behind every layer: both factors of each product move with the one before."""
    rng = np.random.default_rng(blocks)
    nodes, value = [], "x"
    for i in range(blocks):
        weight, bias = rng.normal(size=(4, 4)) / 2, rng.normal(size=4)
        one = np.ones(4)
        norm = eq.BatchNorm(*(p.astype(dtype) for p in (one / 3, one / 2, 0 * one, one)), eps=0.0)
        nodes += [eq.Node(f"fc{i}", eq.Dense(weight.astype(dtype), bias.astype(dtype)), [value]), eq.Node(f"bn{i}", norm, [f"fc{i}"]),
                  eq.Node(f"clip{i}", eq.Clip(0, 1), [f"bn{i}"]), eq.Node(f"mul{i}", eq.Mul(), [f"fc{i}", f"clip{i}"])]
        value = f"mul{i}"
    nodes.append(eq.Node("out", eq.Dense(rng.normal(size=(2, 4)).astype(dtype)), [value]))
    return eq.Graph({"x": (4,)}, nodes, ["out"]), rng.normal(size=(6, 4)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("blocks", [3, 12, 40])
def test_products_do_not_double_the_doubt_about_factors_for_ever(blocks, dtype):
    graph, x = hard_swishes(blocks, dtype)
    resolved = eq.channels(graph)
    assert resolved.degrees_of_freedom == 8 * blocks
    rng = np.random.default_rng(1)
    factors = eq.Factorization(resolved, np.concatenate([[1.0], np.exp(rng.normal(size=resolved.degrees_of_freedom))]))
    scaled = factors.apply(graph)
    verdict = eq.verify(graph, scaled, x)
    assert verdict.message.startswith("equal: "), verdict.message
    found, truth = 0, eq.forward(graph, x)
    for row, side in itertools.product(range(4), (graph, scaled)):
        wrong = with_row_times(side, f"fc{blocks - 1}", row, 1.01)
        if np.abs(eq.forward(wrong, x) - truth).max() > 1e-4 * np.abs(truth).max():  # else no output says so
            found += 1
            assert not eq.verify(graph if side is scaled else scaled, wrong, x)
    assert found >= 2


@pytest.mark.parametrize("unit", [1e-20, 1.0, 64.0])
def test_a_channel_of_zeros_starts_from_as_little_as_any_other(unit):
    sizes = np.array([0.0, 0.25, 3.0, 0.0])
    assert _slopes(unit * sizes, True).tolist() == [unit * of for of in (0.25, 0.25, 3.0, 0.25)]
    assert _slopes(unit * sizes, np.array([True, False, True, False])).tolist() == [unit * of for of in (0.25, 0.25, 3.0, 0.0)]
    assert _slopes(np.zeros(2), np.array([True, False])).tolist() == [1.0, 0.0]
