"""BN folding: every value that survives keeps its meaning. With a named test for each bug that other tools have shipped."""

from __future__ import annotations

import math

import handmade
import numpy as np
import pytest
from handmade import Maker
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS as TABLE

import eqfact as eq
from eqfact.testing.strategies import batches, networks


def batchnorms(graph):
    return [node.name for node in graph if isinstance(node.op, eq.BatchNorm)]


def affine(bn):
    """BatchNorm as slopes and shifts, in plain Python numbers."""
    slopes = [float(g) / math.sqrt(float(v) + bn.eps) for g, v in zip(bn.gamma, bn.var, strict=True)]
    return slopes, [float(b) - float(m) * s for b, m, s in zip(bn.beta, bn.mean, slopes, strict=True)]


def keeps_every_value(graph, x):
    """All values that both networks have are equal: by verify, and entry by entry in float64."""
    folded = eq.fold_batchnorm(graph)
    verdict = eq.verify(graph, folded, x)
    assert verdict.equal, verdict.message
    before, after = eq.values(graph, x), eq.values(folded, x)
    assert set(after) <= set(before)
    for name, value in after.items():
        assert value.dtype == before[name].dtype
        assert value.shape == before[name].shape
        if value.dtype == np.float64:
            # rounding is relative to what is summed, which cancellation hides: compare against the largest value anywhere
            largest = max(float(np.abs(v).max()) for v in before.values())
            assert np.abs(value - before[name]).max() <= 1e-10 * max(largest, 1.0)
    assert folded.outputs == graph.outputs
    return folded


LAYERS = {
    "dense": lambda m, bias: ((3,), eq.Dense(m.weight(4, 3), bias(4))),
    "conv 1d": lambda m, bias: ((3, 5), eq.Conv(m.weight(4, 3, 3), bias(4), padding=1, stride=2)),
    "conv 2d": lambda m, bias: ((3, 5, 4), eq.Conv(m.weight(4, 3, 3, 2), bias(4), padding=((1, 0), (0, 1)), dilation=(1, 2))),
    "conv 3d": lambda m, bias: ((2, 3, 2, 3), eq.Conv(m.weight(4, 2, 2, 1, 2), bias(4), padding=1)),
    "square conv": lambda m, bias: ((4, 3), eq.Conv(m.weight(4, 4, 3), bias(4), padding=1)),
    "grouped": lambda m, bias: ((6, 4), eq.Conv(m.weight(4, 3, 3), bias(4), groups=2, padding=1)),
    "depthwise": lambda m, bias: ((4, 3, 3), eq.Conv(m.weight(4, 1, 3, 3), bias(4), groups=4, padding=1)),
    "depthwise with multiplier": lambda m, bias: ((2, 4), eq.Conv(m.weight(4, 1, 3), bias(4), groups=2)),
    "transposed": lambda m, bias: ((3, 4), eq.ConvTranspose(m.weight(4, 3, 3), bias(4), stride=2, output_padding=1)),
    "square transposed": lambda m, bias: ((4, 2, 2), eq.ConvTranspose(m.weight(4, 4, 2, 2), bias(4), stride=2)),
    "grouped transposed": lambda m, bias: ((6, 3), eq.ConvTranspose(m.weight(4, 3, 2), bias(4), groups=2)),
    "batchnorm": lambda m, bias: ((4, 3), m.batchnorm(4, 1e-3)),
}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
each_bias = pytest.mark.parametrize("bias", [True, False], ids=["with bias", "without bias"])
each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


# ------------------------------------------------------------------------------------------------ behind a weighted op


@each_layer
@each_bias
@each_dtype
def test_a_batchnorm_folds_into_the_layer_before_it(layer, bias, dtype):
    m = Maker(1, dtype)
    shape, op = layer(m, m.vector if bias else lambda _: None)
    graph = eq.Graph.chain(shape, layer=op, bn=m.batchnorm(4, 1e-2), act=eq.ReLU())
    folded = keeps_every_value(graph, m.data(graph))
    assert [node.name for node in folded] == ["bn", "act"]
    assert type(folded["bn"].op) is type(op)
    assert folded["bn"].op.weight.dtype == dtype


@each_layer
def test_folded_weights_are_slope_times_weight_and_slope_times_bias_plus_shift(layer):
    m = Maker(2)
    shape, op = layer(m, m.vector)
    bn = m.batchnorm(4, 1e-2)
    folded = eq.fold_batchnorm(eq.Graph.chain(shape, layer=op, bn=bn))["bn"].op
    slopes, shifts = affine(bn)
    for channel in range(4):
        np.testing.assert_allclose(folded.weight[channel], op.weight[channel] * slopes[channel], rtol=1e-14)
        assert math.isclose(folded.bias[channel], float(op.bias[channel]) * slopes[channel] + shifts[channel], rel_tol=1e-13)


def test_bug_transposed_conv_is_scaled_along_its_output_channels():
    """Other tools store (in, out, *kernel) there and scale the inputs; with as many inputs as outputs nothing complains."""
    m = Maker(3)
    weight, slopes = m.weight(3, 3, 2), np.array([1.0, 10.0, 100.0])
    zero, one = np.zeros(3), np.ones(3)
    graph = eq.Graph.chain((3, 4), up=eq.ConvTranspose(weight, stride=2), bn=eq.BatchNorm(slopes, zero, zero, one, eps=0.0))
    folded = keeps_every_value(graph, m.data(graph))
    np.testing.assert_array_equal(folded["bn"].op.weight, weight * slopes[:, None, None])


def test_bug_grouped_conv_is_scaled_along_all_output_channels_of_all_groups():
    m = Maker(4)
    weight, slopes = m.weight(4, 2, 1), np.array([1.0, 10.0, 100.0, 1000.0])
    zero, one = np.zeros(4), np.ones(4)
    graph = eq.Graph.chain((4, 3), conv=eq.Conv(weight, groups=2), bn=eq.BatchNorm(slopes, zero, zero, one, eps=0.0))
    folded = keeps_every_value(graph, m.data(graph))
    np.testing.assert_array_equal(folded["bn"].op.weight, weight * slopes[:, None, None])


def test_bug_an_existing_bias_is_scaled_and_kept():
    one = np.ones(1)
    graph = eq.Graph.chain((1,), fc=eq.Dense(np.array([[2.0]]), np.array([5.0])), bn=eq.BatchNorm(3 * one, 7 * one, one, 4 * one, eps=0.0))
    folded = eq.fold_batchnorm(graph)["bn"].op
    assert folded.weight.tolist() == [[3.0]]
    assert folded.bias.tolist() == [13.0]  # 3 (5 - 1) / 2 + 7


def test_bug_a_missing_bias_is_made():
    one = np.ones(1)
    graph = eq.Graph.chain((1,), fc=eq.Dense(np.array([[2.0]])), bn=eq.BatchNorm(3 * one, 7 * one, one, 4 * one, eps=0.0))
    assert eq.fold_batchnorm(graph)["bn"].op.bias.tolist() == [5.5]


def test_bug_each_batchnorm_has_its_own_eps():
    one = np.ones(1)
    for eps in (0.0, 1e-5, 1e-3, 0.5, 3.0):
        graph = eq.Graph.chain((1,), fc=eq.Dense(np.array([[1.0]])), bn=eq.BatchNorm(one, 0 * one, 0 * one, one, eps=eps))
        assert math.isclose(eq.fold_batchnorm(graph)["bn"].op.weight[0, 0], 1 / math.sqrt(1 + eps), rel_tol=1e-15)
    tiny = eq.BatchNorm(one, 0 * one, 0 * one, 1e-6 * one, eps=1e-3)  # eps dominates: here a forgotten or default one shows
    assert math.isclose(eq.fold_batchnorm(eq.Graph.chain((1,), fc=eq.Dense(np.array([[1.0]])), bn=tiny))["bn"].op.weight[0, 0],
                        1 / math.sqrt(0.001001), rel_tol=1e-14)


def test_a_chain_of_batchnorms_becomes_one_layer():
    m = Maker(5)
    graph = eq.Graph.chain((3, 4), conv=m.conv(4, 3, 3), bn1=m.batchnorm(4), bn2=m.batchnorm(4, 1e-2), bn3=m.batchnorm(4), act=eq.ReLU())
    assert [node.name for node in keeps_every_value(graph, m.data(graph))] == ["bn3", "act"]


def test_a_chain_of_batchnorms_alone_becomes_one_batchnorm():
    m = Maker(6)
    for slopes in (m.vector(3), np.zeros(3)):
        one = np.ones(3)
        graph = eq.Graph.chain((3, 4), bn1=eq.BatchNorm(slopes, one, 2 * one, one), bn2=m.batchnorm(3), bn3=m.batchnorm(3))
        folded = keeps_every_value(graph, m.data(graph))
        assert batchnorms(folded) == ["bn3"]
        assert len(folded) == 1


def test_a_weight_on_a_grid_is_on_none_after_folding():
    m = Maker(7)
    graph = eq.Graph.chain((3, 4), conv=m.conv(4, 3, 3), bn=m.batchnorm(4))
    quantized = eq.quantize(graph, weights=eq.UniformQuantizer(bits=4))
    assert quantized["conv"].op.grid is not None
    folded = keeps_every_value(quantized, m.data(graph))
    assert folded["bn"].op.grid is None


# ------------------------------------------------------------------------------------------------ in front of a weighted op


@pytest.mark.parametrize("name", ["dense", "conv 1d", "conv 2d", "conv 3d", "grouped", "depthwise", "depthwise with multiplier"])
@each_bias
@each_dtype
def test_a_batchnorm_folds_into_the_layer_behind_it_where_there_is_no_padding(name, bias, dtype):
    m = Maker(8, dtype)
    shape, op = LAYERS[name](m, m.vector if bias else lambda _: None)
    if isinstance(op, eq.Conv):
        op = eq.Conv(op.weight, op.bias, stride=op.stride, dilation=op.dilation, groups=op.groups)
    graph = eq.Graph.chain(shape, bn=m.batchnorm(shape[0], 1e-2), layer=op, act=eq.ReLU())
    folded = keeps_every_value(graph, m.data(graph))
    assert [node.name for node in folded] == ["layer", "act"]


@pytest.mark.parametrize("name", ["conv 1d", "conv 2d", "conv 3d", "grouped", "depthwise", "transposed", "grouped transposed"])
def test_a_batchnorm_before_padding_stays_if_it_shifts(name):
    m = Maker(9)
    shape, op = LAYERS[name](m, m.vector)
    graph = eq.Graph.chain(shape, bn=m.batchnorm(shape[0]), layer=op)
    folded = keeps_every_value(graph, m.data(graph))
    assert batchnorms(folded) == ["bn"]
    assert folded["bn"].op is graph["bn"].op
    assert eq.folding_obstacles(graph)["bn"].endswith(
        f"'layer' behind it ({type(op).__name__}) meets the shift with only part of its taps at the border")


@pytest.mark.parametrize("name", ["conv 1d", "conv 2d", "conv 3d", "grouped", "depthwise", "transposed", "grouped transposed"])
@each_bias
def test_a_batchnorm_that_only_scales_folds_through_padding(name, bias):
    m = Maker(10)
    shape, op = LAYERS[name](m, m.vector if bias else lambda _: None)
    zero = np.zeros(shape[0])
    graph = eq.Graph.chain(shape, bn=eq.BatchNorm(m.vector(shape[0]), zero, zero, m.positive(shape[0])), layer=op)
    folded = keeps_every_value(graph, m.data(graph))
    assert [node.name for node in folded] == ["layer"]
    assert (folded["layer"].op.bias is None) == (not bias)


def test_a_batchnorm_with_layers_on_both_sides_folds_into_the_one_before_it():
    m = Maker(11)
    graph = eq.Graph.chain((2, 5), conv1=m.conv(3, 2, 2), bn=m.batchnorm(3), conv2=m.conv(2, 3, 2))
    folded = keeps_every_value(graph, m.data(graph))
    assert [node.name for node in folded] == ["bn", "conv2"]
    assert folded["conv2"].op is graph["conv2"].op


def test_a_batchnorm_with_an_obstacle_before_it_folds_into_the_layer_behind_it():
    m = Maker(12)
    graph = eq.Graph.chain((2, 5), conv1=m.conv(3, 2, 2), act=eq.ReLU(), bn=m.batchnorm(3), conv2=m.conv(2, 3, 2))
    assert [node.name for node in keeps_every_value(graph, m.data(graph))] == ["conv1", "act", "conv2"]


# ------------------------------------------------------------------------------------------------ what stays, and why


def stays(graph, reason, name="bn"):
    """The BatchNorm stays, as it is, for this reason."""
    folded = keeps_every_value(graph, Maker(13).data(graph))
    assert name in batchnorms(folded)
    assert eq.folding_obstacles(graph)[name].startswith(reason), eq.folding_obstacles(graph)
    assert folded[name].op is graph[name].op


def test_a_batchnorm_between_input_and_output_stays():
    m = Maker(13)
    stays(eq.Graph.chain((2, 3), bn=m.batchnorm(2)), "'x' before it is a network input; 'bn' behind it is a network output")


def test_a_batchnorm_behind_a_value_with_another_reader_stays():
    m = Maker(13)
    stays(eq.Graph({"x": (2, 3)}, [
        eq.Node("conv", m.conv(2, 2, 1), ["x"]), eq.Node("bn", m.batchnorm(2), ["conv"]), eq.Node("add", eq.Add(), ["conv", "bn"]),
    ], ["add"]), "'conv' between has 2 readers; 'bn' behind it is read by 'add' (Add), which has no weights")


def test_a_batchnorm_behind_an_inner_output_stays():
    m = Maker(13)
    graph = eq.Graph.chain((2, 3), conv=m.conv(2, 2, 1), bn=m.batchnorm(2), act=eq.ReLU())
    stays(eq.Graph(dict(graph.inputs), graph.nodes, ["act", "conv"]), "'conv' between is a network output")


def test_a_batchnorm_behind_a_shared_conv_stays():
    m = Maker(13)
    conv = m.conv(2, 2, 1)
    stays(eq.Graph({"x": (2, 3)}, [
        eq.Node("a", conv, ["x"]), eq.Node("bn", m.batchnorm(2), ["a"]), eq.Node("b", conv, ["bn"]),
    ], ["b"]), "the weights of 'a' are used by 2 nodes; the weights of 'b' are used by 2 nodes")


def test_a_batchnorm_behind_an_op_without_weights_stays():
    m = Maker(13)
    stays(eq.Graph.chain((2, 3), conv=m.conv(2, 2, 1), act=eq.ReLU(), bn=m.batchnorm(2)),
          "'act' before it is made by ReLU, which has no weights")


def test_a_batchnorm_that_is_an_output_and_read_by_a_layer_folds_only_backwards():
    m = Maker(13)
    graph = eq.Graph.chain((2, 3), bn=m.batchnorm(2), conv=m.conv(2, 2, 1))
    stays(eq.Graph(dict(graph.inputs), graph.nodes, ["conv", "bn"]), "'x' before it is a network input; 'bn' behind it is a network output")
    graph = eq.Graph.chain((2, 3), first=m.conv(2, 2, 1), bn=m.batchnorm(2), conv=m.conv(2, 2, 1))
    graph = eq.Graph(dict(graph.inputs), graph.nodes, ["conv", "bn"])
    assert batchnorms(keeps_every_value(graph, m.data(graph))) == []


def test_a_batchnorm_before_two_readers_stays():
    m = Maker(13)
    stays(eq.Graph({"x": (2, 3)}, [
        eq.Node("bn", m.batchnorm(2), ["x"]), eq.Node("a", m.conv(2, 2, 1), ["bn"]), eq.Node("b", m.conv(2, 2, 1), ["bn"]),
    ], ["a", "b"]), "'x' before it is a network input; 'bn' between has 2 readers")


def test_a_batchnorm_that_nobody_reads_stays_if_nothing_takes_it():
    m = Maker(13)
    stays(eq.Graph({"x": (2, 3)}, [eq.Node("bn", m.batchnorm(2), ["x"]), eq.Node("a", m.conv(2, 2, 1), ["x"])], ["a"]),
          "'x' before it is a network input; 'bn' behind it is read by nobody")


def test_a_batchnorm_folds_into_the_normalisation_before_it_but_not_into_one_behind_it():
    rng = np.random.default_rng(0)
    one, c = np.ones(3), rng.normal(size=3)
    graph = eq.Graph.chain((3, 4), norm=eq.LayerNorm(c, rng.normal(size=3)), bn=eq.BatchNorm(c, one, c, one + c**2),
                           conv=eq.Conv(rng.normal(size=(3, 3, 1)), padding=0), act=eq.ReLU(), last=eq.BatchNorm(c, one, c, one),
                           rms=eq.RMSNorm(c))
    folded = keeps_every_value(graph, rng.normal(size=(5, 3, 4)))
    assert [type(node.op) for node in folded] == [eq.LayerNorm, eq.Conv, eq.ReLU, eq.BatchNorm, eq.RMSNorm]
    assert eq.folding_obstacles(folded)["last"].endswith("'rms' behind it (RMSNorm) divides by what it reads")


def test_one_batchnorm_used_twice_folds_at_each_of_its_nodes():
    m = Maker(14)
    bn = m.batchnorm(3)
    graph = eq.Graph.chain((2, 4), a=m.conv(3, 2, 1), bn1=bn, act=eq.ReLU(), b=m.conv(3, 3, 1), bn2=bn)
    assert batchnorms(keeps_every_value(graph, m.data(graph))) == []


def test_no_obstacle_is_listed_for_what_can_be_folded():
    m = Maker(14)
    graph = eq.Graph.chain((2, 4), a=m.conv(3, 2, 1), bn=m.batchnorm(3), act=eq.ReLU())
    assert eq.folding_obstacles(graph) == {}


# ------------------------------------------------------------------------------------------------ on all networks


@settings(max_examples=120)
@given(networks().flatmap(lambda g: st.tuples(st.just(g), batches(g))))
def test_folding_keeps_every_value_of_random_networks(drawn):
    graph, x = drawn
    folded = keeps_every_value(graph, x)
    assert set(batchnorms(folded)) == set(eq.folding_obstacles(folded)), "what stays has a reason, what has none is folded"
    assert eq.fold_batchnorm(folded) is folded, "nothing is left to fold"


@pytest.mark.parametrize("build", handmade.NETS, ids=lambda f: f.__name__)
@each_dtype
def test_folding_keeps_every_value_of_networks_with_a_batchnorm_behind_every_layer(build, dtype):
    m = Maker(15, dtype)
    graph = normalized(build(m), m)
    assert len(batchnorms(graph)) > 1
    folded = keeps_every_value(graph, m.data(graph))
    if build is not handmade.volume and build is not handmade.shared:
        assert batchnorms(folded) == []


def normalized(graph, m):
    """The network with a BatchNorm behind every weighted op, which takes over the name of the value."""
    nodes = []
    for node in graph:
        if isinstance(node.op, eq.Weighted):
            nodes.append(eq.Node(f"{node.name}.raw", node.op, node.inputs))
            nodes.append(eq.Node(node.name, m.batchnorm(graph.shapes[node.name][0]), [f"{node.name}.raw"]))
        else:
            nodes.append(node)
    return eq.Graph(dict(graph.inputs), nodes, graph.outputs)


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_folding_keeps_every_value_of_every_topology(row):
    keeps_every_value(row.graph, row.data())


def test_folding_leaves_the_network_given_as_it_was():
    m = Maker(16)
    graph = eq.Graph.chain((3, 4), conv=m.conv(4, 3, 3), bn=m.batchnorm(4), act=eq.ReLU())
    before = [(n.name, n.inputs, n.op, n.op.weight.copy() if isinstance(n.op, eq.Weighted) else None) for n in graph]
    eq.fold_batchnorm(graph)
    for node, (name, inputs, op, weight) in zip(graph, before, strict=True):
        assert (node.name, node.inputs, node.op) == (name, inputs, op)
        if weight is not None:
            assert np.array_equal(node.op.weight, weight)


def test_a_network_without_batchnorm_comes_back_itself():
    graph = handmade.plain(Maker(17))
    assert eq.fold_batchnorm(graph) is graph


def test_folding_sets_free_no_more_than_it_takes():
    """A folded BatchNorm takes its own factors with it: conv and bn have a factor each, the folded conv has one."""
    m = Maker(18)
    graph = eq.Graph.chain((2, 4), a=m.conv(3, 2, 1), bn=m.batchnorm(3), act=eq.ReLU(), b=m.conv(2, 3, 1))
    assert eq.degrees_of_freedom(graph) == 6
    assert eq.degrees_of_freedom(eq.fold_batchnorm(graph)) == 3
