"""The loop: the paper's rules on whole networks, cross_layer at convergence, and what is said about what was left alone.

Expected values come from loops of our own over the weights; PAPER 4 lists the faults of the authors' script that these tests exclude.
"""

from __future__ import annotations

import dataclasses
import itertools

import handmade
import numpy as np
import pytest
from handmade import Maker
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import NETS as TABLE

import eqfact as eq
from eqfact import demo, equalization, rules
from eqfact.ops import Weighted
from eqfact.testing.strategies import batches, factorizations, networks

METHODS = ("one_step", "two_step", "cross_layer")
BY_NAME = {"one_step": eq.OneStep, "two_step": eq.TwoStep, "cross_layer": eq.CrossLayer}
DTYPES = ("float32", "float64")
#: No factor exceeds what the rules promise: 16, times 1024 for a residual or a concat; cross_layer within [1/1024, 1024].
LARGEST = {"one_step": 16 * 1024, "two_step": 16 * 1024, "cross_layer": 1024}
SMALLEST = {"one_step": 1, "two_step": 1 / 1024, "cross_layer": 1 / 1024}

each_method = pytest.mark.parametrize("method", METHODS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_net = pytest.mark.parametrize("build", handmade.NETS, ids=lambda f: f.__name__)


def equalized(graph, x, method, **options):
    needs = not isinstance(method, eq.CrossLayer) and method != "cross_layer"
    return eq.equalize(graph, method, stats=eq.calibrate(graph, x) if needs else None, **options)


def factors_of(result):
    return np.concatenate(list(result.factorization.values()))


# ------------------------------------------------------------------------------------------------ the function is kept


def keeps_the_function(graph, x, result, method):
    """Equal within rounding; factors finite, positive and within the method's bound; 1 where pinned."""
    verdict = eq.verify(graph, result.graph, x)
    assert verdict.equal, verdict.message
    f = result.factorization.free  # what multiplies q divides k
    assert np.isfinite(factors_of(result)).all()
    assert f.min() >= SMALLEST[method] * (1 - 1e-12)
    assert f.max() <= LARGEST[method]
    for value, labels in result.factorization.channels.labels.items():
        assert (result.factorization[value][labels == 0] == 1).all()


def bit_identical(graph, x, result):
    assert all(np.frexp(f)[0] == 0.5 for f in factors_of(result)), "exact=True must give powers of two"
    before, after = eq.values(graph, x), eq.values(result.graph, x)
    for name in graph.outputs:
        assert before[name].dtype == after[name].dtype
        assert before[name].tobytes() == after[name].tobytes() or np.array_equal(before[name], after[name])


@settings(max_examples=400)
@given(networks().flatmap(lambda g: st.tuples(st.just(g), batches(g))))
def test_every_method_keeps_the_function_of_random_networks(drawn):
    graph, x = drawn
    stats = eq.calibrate(graph, x)
    for method in METHODS:
        result = eq.equalize(graph, method, stats=stats)
        keeps_the_function(graph, x, result, method)
        assert eq.verify(result.graph, graph, x).message.startswith("equal: "), "and so do all inner values"


@settings(max_examples=150)
@given(networks().flatmap(lambda g: st.tuples(st.just(g), batches(g))))
def test_exact_keeps_every_bit_of_random_networks(drawn):
    graph, x = drawn
    stats = eq.calibrate(graph, x)
    for method in METHODS:
        bit_identical(graph, x, eq.equalize(graph, method, stats=stats, exact=True))


@each_net
@each_method
@each_dtype
def test_every_method_keeps_the_function_of_ill_ranged_networks(build, method, dtype):
    for seed in range(4):
        m = Maker(seed, dtype)
        graph = build(m)
        x = m.data(graph)
        keeps_the_function(graph, x, equalized(graph, x, method), method)
        keeps_the_function(graph, m.data(graph), equalized(graph, x, method), method)  # and on data never seen
        bit_identical(graph, x, equalized(graph, x, method, exact=True))


@pytest.mark.parametrize("row", TABLE, ids=str)
@each_method
def test_every_method_keeps_the_function_of_every_topology(row, method):
    x = row.data()
    keeps_the_function(row.graph, x, equalized(row.graph, x, method), method)
    bit_identical(row.graph, x, equalized(row.graph, x, method, exact=True))


@each_method
def test_the_network_given_stays_as_it_is(method):
    m = Maker(1)
    graph = handmade.mobile(m)
    before = {n.name: n.op.weight.copy() for n in graph if isinstance(n.op, eq.Weighted)}
    equalized(graph, m.data(graph), method)
    for name, weight in before.items():
        assert np.array_equal(graph[name].op.weight, weight)


@each_net
@each_method
def test_every_value_is_multiplied_by_its_factors(build, method):
    m = Maker(3)
    graph = build(m)
    x = m.data(graph)
    result = equalized(graph, x, method, exact=True)
    before, after = eq.values(graph, x), eq.values(result.graph, x)
    for name, value in before.items():
        f = result.factorization[name].reshape(-1, *(1,) * (value.ndim - 2))
        np.testing.assert_array_equal(after[name], value * f)


# ------------------------------------------------------------------------------------------------ the paper's steps, one at a time


def steps_of_the_paper(graph, x, with_m):
    """PAPER 2 and 3 on conv - relu - conv - relu - flatten - dense, layer by layer on the current weights, with loops of our own."""
    weights = [graph[n].op.weight.copy() for n in ("conv1", "conv2", "fc")]
    biases = [graph[n].op.bias.copy() for n in ("conv1", "conv2", "fc")]
    values = eq.values(graph, x)
    pixels = [1, values["act2"][0, 0].size]
    factors = []
    for layer, act in enumerate(("act1", "act2")):
        channels = len(weights[layer])
        kernel = [max(abs(v) for v in weights[layer][i].ravel().tolist()) for i in range(channels)]
        activation = [max(values[act][:, i].ravel().tolist()) for i in range(channels)]
        reader = weights[layer + 1]
        m = []
        for i in range(channels):
            column = reader[:, i * pixels[layer]:(i + 1) * pixels[layer]]
            m.append(float(np.abs(column).max() / np.abs(reader).max()) if with_m else 1.0)
        k_top = max(k * w for k, w in zip(kernel, m, strict=True))
        a_top = max(a * w for a, w in zip(activation, m, strict=True))
        f = [min(k_top / k, a_top / a, 16.0) if k and a else 1.0 for k, a in zip(kernel, activation, strict=True)]
        for i in range(channels):
            weights[layer][i] *= f[i]
            biases[layer][i] *= f[i]
            reader[:, i * pixels[layer]:(i + 1) * pixels[layer]] /= f[i]
        factors.append(f)
    return factors, weights, biases


@pytest.mark.parametrize(("method", "with_m"), [("one_step", False), ("two_step", True)])
@pytest.mark.parametrize("seed", range(8))
def test_the_papers_rules_agree_with_a_step_by_step_implementation(method, with_m, seed):
    m = Maker(seed)
    graph = handmade.plain(m)
    x = m.data(graph)
    factors, weights, biases = steps_of_the_paper(graph, x, with_m)
    result = equalized(graph, x, method)
    for act, expected in zip(("act1", "act2"), factors, strict=True):
        np.testing.assert_allclose(result.factorization[act], expected, rtol=1e-13)
    for name, weight, bias in zip(("conv1", "conv2", "fc"), weights, biases, strict=True):
        np.testing.assert_allclose(result.graph[name].op.weight, weight, rtol=1e-12)
        np.testing.assert_allclose(result.graph[name].op.bias, bias, rtol=1e-12)


def test_one_step_amplifies_only_and_within_16():
    for build, seed in itertools.product((handmade.plain, handmade.mobile, handmade.fan_out, handmade.grouped), range(5)):
        m = Maker(seed)
        graph = build(m)
        f = factors_of(equalized(graph, m.data(graph), "one_step"))
        assert f.min() == 1
        assert f.max() <= 16


@pytest.mark.parametrize("method", ["one_step", "two_step"])
@pytest.mark.parametrize("build", [handmade.plain, handmade.mobile, handmade.fan_out, handmade.grouped, handmade.inner_output],
                         ids=lambda f: f.__name__)
def test_no_weight_tensor_and_no_activation_grows(method, build):
    for seed in range(5):
        m = Maker(seed)
        graph = build(m)
        x = m.data(graph)
        result = equalized(graph, x, method)
        before, after = eq.values(graph, x), eq.values(result.graph, x)
        for node in graph:
            if isinstance(node.op, eq.Weighted) and node.name not in ("stem", "project"):
                assert np.abs(result.graph[node.name].op.weight).max() <= np.abs(node.op.weight).max() * (1 + 1e-12)
        # the activations that the rules look at: of every layer, behind its activation; partners of a residual share one vector
        stored = {"act", "act1", "act2", "act3", "act_a", "act_b", "act_c", "act_d"} - ({"act"} if build is handmade.mobile else set())
        for name in stored & set(before):
            assert np.abs(after[name]).max() <= np.abs(before[name]).max() * (1 + 1e-12)


RELATED = [net for net in TABLE if net.graph.traced.relations]


@pytest.mark.parametrize("method", ["one_step", "two_step"])
@pytest.mark.parametrize("net", RELATED, ids=str)
def test_no_weight_tensor_and_no_product_of_values_grows(method, net):
    """What grows with a free number limits it, on whichever side of a product it stands; what shrinks was at most as large before."""
    x = net.data()
    stats = eq.calibrate(net.graph, x)
    result = eq.equalize(net.graph, method, stats=stats)
    after = result.factorization.apply(stats)
    products = {relation.node for relation in net.graph.traced.relations}
    for node in net.graph:
        if isinstance(node.op, eq.Weighted) and node.op.gridded:
            assert np.abs(result.graph[node.name].op.weight).max() <= np.abs(node.op.weight).max() * (1 + 1e-12), node.name
        if node.name in products or (isinstance(node.op, eq.Weighted) and net.name != "shared gate"):  # which joins values in a concat
            assert after[node.name].max_abs.max() <= stats[node.name].max_abs.max() * (1 + 1e-12), node.name
    assert eq.verify(net.graph, result.graph, x)


@pytest.mark.parametrize("method", ["two_step", "cross_layer", "optimal"])
@pytest.mark.parametrize(("options", "free"), [({"include": ["a"]}, {"a": 3, "b": 0, "mul": 3, "fc": 0}),
                                               ({"exclude": ["a"]}, {"a": 0, "b": 3, "mul": 3, "fc": 4}),
                                               ({"exclude": ["mul"]}, {"a": 3, "b": 3, "mul": 0, "fc": 4}),
                                               ({"include": ["mul", "fc"]}, {"a": 3, "b": 3, "mul": 3, "fc": 4})])
def test_factors_chosen_by_name_take_what_follows_along(method, options, free):
    (net,) = (net for net in TABLE if net.name == "product")
    x = net.data()
    result = eq.equalize(net.graph, method, stats=eq.calibrate(net.graph, x), **options)
    labels = result.factorization.channels.labels
    assert {value: int((labels[value] > 0).sum()) for value in free} == free
    f = result.factorization
    assert f["mul"] == pytest.approx(f["a"] * f["b"], rel=1e-12)
    assert all(np.all(f[value] == 1) for value, count in free.items() if not count)
    assert eq.verify(net.graph, result.graph, x)


def test_max_factor_replaces_the_bound_of_16():
    m = Maker(2)
    graph = handmade.plain(m)
    x = m.data(graph)
    for bound in (1.0, 2.5, 50.0):
        f = factors_of(equalized(graph, x, eq.OneStep(bound)))
        assert f.max() <= bound
        f = factors_of(equalized(graph, x, eq.CrossLayer(bound)))
        assert f.max() <= bound
        assert f.min() >= 1 / bound
    assert factors_of(equalized(graph, x, eq.OneStep(1))).max() == 1


def test_exact_respects_a_bound_that_is_no_power_of_two():
    for method in METHODS:
        m = Maker(2)
        graph = handmade.mobile(m)
        f = factors_of(equalized(graph, m.data(graph), BY_NAME[method](max_factor=3.0), exact=True, exclude=["add"]))
        assert f.max() <= 3


def test_the_preactivation_limit_is_an_option():
    weight = np.array([[1.0], [0.125]])
    graph = eq.Graph.chain((1,), fc1=eq.Dense(weight), act=eq.ReLU(), fc2=eq.Dense(np.ones((1, 2))))
    x = np.array([[4.0], [-8.0]])  # A = 4, 0.5; P = 8, 1
    stats = eq.calibrate(graph, x)
    assert eq.equalize(graph, "one_step", stats=stats).factorization["act"].tolist() == [1.0, 8.0]
    assert eq.equalize(graph, eq.OneStep(preactivation=True), stats=stats).factorization["act"].tolist() == [1.0, 4.0]  # A / P = 4 / 1


# ------------------------------------------------------------------------------------------------ faults of the authors' script (PAPER 4)


def test_fault_1_two_step_differs_from_one_step_on_a_plain_chain_with_one_consumer():
    m = Maker(1)
    graph = handmade.plain(m)
    x = m.data(graph)
    one, two = (equalized(graph, x, method).factorization for method in ("one_step", "two_step"))
    for act in ("act1", "act2"):
        assert not np.array_equal(one[act], two[act])
    assert factors_of(equalized(graph, x, "two_step")).min() < 1


@pytest.mark.parametrize("method", METHODS)
def test_fault_2_outputs_of_depthwise_layers_are_amplified(method):
    weight = np.array([1.0, 0.25, 0.5]).reshape(3, 1, 1)
    graph = eq.Graph.chain((2, 4), conv=eq.Conv(np.ones((3, 2, 1))), depth=eq.Conv(weight, groups=3), act=eq.ReLU(),
                           out=eq.Conv(np.ones((1, 3, 1))))
    f = equalized(graph, np.ones((1, 2, 4)), method).factorization["act"]
    if method != "cross_layer":
        assert f.tolist() == [1.0, 4.0, 2.0]
    assert f[1] > f[2] > f[0]
    assert f[1] > 1


@each_method
@pytest.mark.parametrize("output_first", [True, False])
def test_fault_3_a_layer_that_feeds_a_conv_and_an_output_stays_untouched(method, output_first):
    m = Maker(4)
    graph = handmade.plain(m)
    graph = eq.Graph(dict(graph.inputs), graph.nodes, ["act1", "fc"] if output_first else ["fc", "act1"])
    x = m.data(graph)
    result = equalized(graph, x, method)
    assert (result.factorization["act1"] == 1).all()
    assert result.graph["conv1"].op is graph["conv1"].op
    assert (result.factorization["act2"] != 1).any()
    assert result.pinned["act1"] == "network output 'act1'"
    assert eq.verify(graph, result.graph, x)


def test_fault_4_residual_partners_are_computed_with_two_step_in_two_step_mode():
    """With m = 1/8, 1 and x = 1/4, 1:

    layer a: K = 4, 1/2; A = 1, 1/2: one-step 1, 2; two-step 1/8, 1, normalized 1, 8;
    layer b: K = 4, 1; A = 1, 1: one-step 1, 1; two-step 1/4, 1, normalized 1, 4: which one-step would have kept at 1, 1.
    """
    nodes = [eq.Node("a", eq.Dense(np.diag([4.0, 0.5])), ["x"]), eq.Node("b", eq.Dense(np.diag([4.0, 1.0])), ["x"]),
             eq.Node("add", eq.Add(), ["a", "b"]), eq.Node("out", eq.Dense(np.array([[0.125, 1.0]])), ["add"])]
    graph = eq.Graph({"x": (2,)}, nodes, ["out"])
    stats = eq.calibrate(graph, np.array([[0.25, 1.0]]))
    assert eq.equalize(graph, "one_step", stats=stats).factorization["add"].tolist() == [1.0, 1.0]
    assert eq.equalize(graph, "two_step", stats=stats).factorization["add"].tolist() == [1.0, 4.0]


def test_fault_5_batchnorm_readers_count_in_m():
    one = np.ones(2)
    slopes = np.array([0.25, 1.0])
    graph = eq.Graph.chain((1,), fc=eq.Dense(np.array([[2.0], [1.0]])), act=eq.ReLU(), bn=eq.BatchNorm(slopes, one, 0 * one, one, eps=0.0),
                           out=eq.Dense(np.array([[1.0, 1.0]])))
    f = equalized(graph, np.ones((1, 1)), "two_step").factorization["act"]
    assert f.tolist() == [0.5, 1.0]


def test_fault_6_outputs_without_relu_range_over_their_magnitude():
    graph = eq.Graph.chain((1,), fc1=eq.Dense(np.array([[-1.0], [0.25]])), fc2=eq.Dense(np.ones((1, 2))))
    f = equalized(graph, np.array([[8.0], [-0.25]]), "one_step").factorization["fc1"]
    # A = 8 and 2; by their maxima alone, 0.25 and 2, channel 0 would be amplified by 8 and the range would grow
    assert f.tolist() == [1.0, 4.0]


# ------------------------------------------------------------------------------------------------ cross_layer


def ranges_of(graph, resolved):
    """Largest weight that grows and that shrinks with each free number, by loops over the weights of a graph."""
    growing, shrinking, forms = {}, {}, resolved.forms.toarray()

    def note(label, largest, makes):
        for number in np.flatnonzero(forms[label]).tolist():
            side = growing if (forms[label, number] > 0) == makes else shrinking
            side[number] = max(side.get(number, 0.0), float(largest))

    for node in graph:
        if not isinstance(node.op, eq.Weighted):
            continue
        weight, groups = np.abs(node.op.weight.astype(np.float64)), node.op.groups
        per_group = len(weight) // groups
        for o, label in enumerate(resolved.labels[node.name].tolist()):
            note(label, weight[o].max(), True)
        for i, label in enumerate(resolved.labels[node.inputs[0]].tolist() if node.op.divides else ()):
            group, place = divmod(i, weight.shape[1])
            note(label, weight[group * per_group:(group + 1) * per_group, place].max(), False)
    return growing, shrinking


def made_equals_read(result, tolerance):
    """At convergence every free number ranges alike as made and as read, unless it is dead, at the bound, or beside what stands out."""
    made, read = ranges_of(result.graph, result.factorization.channels)
    beside = beside_what_stands_out(result)
    for number, f in enumerate(result.factorization.free.tolist()):
        a, b = made.get(number, 0.0), read.get(number, 0.0)
        if number == 0:
            continue
        if a == 0 or b == 0:
            assert f == 1, f"dead channel with factor {f}"
        elif f >= 1024:
            assert b >= a or number in beside
        elif f <= 1 / 1024:
            assert b <= a or number in beside
        else:
            assert abs(np.log(a / b)) <= tolerance or number in beside, f"free number {number} is made with {a}, read with {b}"


def beside_what_stands_out(result):
    """The numbers of layers around a weight tensor whose largest range is that of a channel which no factor moves."""
    resolved, found = result.factorization.channels, set()
    made, read = ranges_of(result.graph, resolved)
    moves = {n for n in set(made) & set(read) if n > 0 and made[n] > 0 and read[n] > 0}
    numbers = [set(np.flatnonzero(row).tolist()) & moves for row in resolved.forms.toarray()]
    layers = [node for node in result.graph if isinstance(node.op, eq.Weighted)]
    makes = [set().union(*(numbers[label] for label in resolved.labels[node.name])) for node in layers]
    for node in layers:
        sides = [(resolved.labels[node.name], np.abs(node.op.rows()).max(axis=1))]
        if node.op.divides:
            sides.append((resolved.labels[node.inputs[0]], columns_of(node.op)))
        for labels, ranges in sides:
            fixed = [r for label, r in zip(labels, ranges, strict=True) if not numbers[label]]
            others = [r for label, r in zip(labels, ranges, strict=True) if numbers[label]]
            if fixed and others and max(fixed) >= max(others) * 0.9999:
                moved = set().union(*(numbers[label] for label in labels))
                found |= moved.union(*(of for of in makes if of & moved))
    while (wider := found.union(*(of for of in makes if of & found))) != found:
        found = wider
    return found


def columns_of(op):
    """Largest magnitude of the weights that read each input channel."""
    weight = np.abs(op.weight.astype(np.float64))
    groups = weight.reshape(op.groups, -1, *weight.shape[1:])
    return groups.max(axis=(1, *range(3, groups.ndim))).reshape(-1)


@settings(max_examples=150)
@given(networks())
def test_cross_layer_makes_made_and_read_ranges_equal_on_random_networks(graph):
    result = eq.equalize(graph, eq.CrossLayer(tol=1e-9, max_iter=10_000, max_bias=np.inf))
    assert result.success
    made_equals_read(result, 1e-6 if graph.dtype == np.float64 else 1e-5)


@each_net
def test_cross_layer_makes_made_and_read_ranges_equal(build):
    for seed in range(3):
        graph = build(Maker(seed))
        result = eq.equalize(graph, eq.CrossLayer(tol=1e-9, max_bias=np.inf))
        assert result.success
        made_equals_read(result, 1e-7)


def biases_grow_by_no_more_than(result, start, bound):
    """No bias exceeds ``bound`` times the largest of its layer, times the median factor of the layer where balance alone ends."""
    balance = eq.equalize(start, eq.CrossLayer(tol=1e-9, max_iter=10_000, max_bias=np.inf)).factorization
    for node in result.graph:
        op, before = node.op, start[node.name].op
        if isinstance(op, eq.Weighted) and op.bias is not None and before.bias.any():
            labels = result.factorization.channels.labels[node.name]
            free = (labels > 0) & (labels <= result.factorization.channels.degrees_of_freedom)
            if free.any():
                level = np.median(balance[node.name][free])
                limit = np.maximum(bound * level * np.abs(before.bias).max(), np.abs(before.bias) / 1024)
                assert (np.abs(op.bias) <= limit * (1 + 1e-5))[free].all(), f"a bias of '{node.name}' stands out"


@settings(max_examples=100)
@given(networks())
def test_no_bias_stands_out_of_random_networks(graph):
    result = eq.equalize(graph, eq.CrossLayer(tol=1e-9, max_iter=20_000))
    biases_grow_by_no_more_than(result, graph, 2)
    assert eq.equalize(graph, eq.CrossLayer(max_bias=1e9)).iterations == eq.equalize(graph, eq.CrossLayer(max_bias=np.inf)).iterations


@each_net
def test_no_bias_stands_out(build):
    for seed in range(3):
        graph = build(Maker(seed))
        biases_grow_by_no_more_than(eq.equalize(graph, eq.CrossLayer(tol=1e-9)), graph, 2)
        with_all = eq.equalize(graph, eq.CrossLayer(tol=1e-9, max_bias=1e6)).factorization
        assert all(np.array_equal(with_all[v], eq.equalize(graph, eq.CrossLayer(tol=1e-9, max_bias=np.inf)).factorization[v])
                   for v in graph.shapes)


def expanded(seed, *, dead=0.0, kernel=1.0, bias=1.0):
    """An expanding 1x1 convolution, ReLU6, a depthwise one, ReLU6, and a projection; channel 0 of the first has ``dead`` for weights."""
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.normal(size=24))
    first = rng.normal(size=(24, 8, 1, 1)) * spread[:, None, None, None]
    depthwise = rng.normal(size=(24, 1, 3, 3)) / spread[:, None, None, None]
    first[0] *= dead / spread[0]
    depthwise[0] = kernel * rng.normal(size=(1, 3, 3))
    biases = 0.3 * rng.normal(size=24) * spread
    biases[0] = bias
    return eq.Graph.chain((8, 9, 9), expand=eq.Conv(first, biases), act1=eq.ReLU6(), dw=eq.Conv(depthwise, rng.normal(size=24), groups=24),
                          act2=eq.ReLU6(), project=eq.Conv(rng.normal(size=(8, 24, 1, 1)))), rng.normal(size=(40, 8, 9, 9))


@pytest.mark.parametrize("dead", [0.0, 1e-9, 1e-6, 1e-3])
@pytest.mark.parametrize("kernel", [1.0, 34.0])
def test_a_channel_of_nearly_no_weights_does_not_wreck_a_network(dead, kernel):
    """W8A8, measured: with the guards better than before, without them far worse than with them where the bias is blown up."""
    grids = {"weights": eq.UniformQuantizer(8), "activations": eq.UniformQuantizer(8, symmetric=False)}
    gains, unguarded = [], []
    for seed in range(4):
        graph, x = expanded(seed, dead=dead, kernel=kernel)
        quality = []
        for method in (eq.CrossLayer(max_factor=1), eq.CrossLayer(), eq.CrossLayer(max_bias=np.inf)):
            equalized = eq.equalize(graph, method).graph
            quantized = eq.quantize(equalized, stats=eq.calibrate(equalized, x[:20]), **grids)
            quality.append(eq.sqnr(eq.forward(graph, x[20:]), eq.forward(quantized, x[20:])))
        gains.append(quality[1] - quality[0])
        unguarded.append(quality[1] - quality[2])
    assert np.mean(gains) > 0, gains
    if dead:
        assert np.mean(unguarded) > 3, unguarded


def test_what_no_factor_moves_does_not_stand_out_because_the_rest_shrinks():
    """A depthwise kernel of 34 whose channel is dead, others of up to 20: balance alone takes these to below 1, and the step stays."""
    graph, _ = expanded(0, dead=0.0, kernel=34.0)
    weight = graph["project"].op.weight.copy()
    weight[:, 0] = 0
    graph = graph.with_ops({"project": eq.Conv(weight)})
    result = eq.equalize(graph)
    kernels = np.abs(result.graph["dw"].op.weight).max(axis=(1, 2, 3))
    assert result.factorization["dw"][0] == result.factorization["expand"][0] == 1
    assert np.sort(kernels)[-2] == pytest.approx(kernels[0], rel=1e-2)


@pytest.mark.parametrize("hidden", [2, 3, 5, 9])
def test_cross_layer_contracts_a_chain_by_cos_squared_per_sweep(hidden):
    rng = np.random.default_rng(hidden)
    chain = {f"fc{i}": eq.Dense(np.exp(rng.normal(scale=2, size=(1, 1)))) for i in range(hidden + 1)}
    result = eq.equalize(eq.Graph.chain((1,), **chain), eq.CrossLayer(tol=1e-11))
    ratios = np.divide(result.residual[1:], result.residual[:-1])
    steady = ratios[(np.array(result.residual[1:]) > 1e-8) & (np.arange(len(ratios)) >= min(len(ratios) // 3, 40))]
    assert len(steady) > 3
    np.testing.assert_allclose(steady, np.cos(np.pi / (hidden + 1)) ** 2, rtol=2e-3)


@pytest.mark.parametrize("build", handmade.WITHOUT_TIES, ids=lambda f: f.__name__)
@given(data=st.data())
@settings(max_examples=10)
def test_cross_layer_ends_at_the_same_network_from_wherever_in_the_orbit_it_starts(build, data):
    graph = build(Maker(5))
    start = data.draw(factorizations(graph, powers_of_two=False)).apply(graph)
    here, there = (eq.equalize(g, eq.CrossLayer(tol=1e-12, max_iter=5000, max_bias=np.inf)) for g in (graph, start))
    for node in here.graph:
        if isinstance(node.op, eq.Weighted):
            np.testing.assert_allclose(there.graph[node.name].op.weight, node.op.weight, rtol=1e-8, atol=1e-300)


def test_cross_layer_by_hand():
    graph = eq.Graph.chain((1,), fc1=eq.Dense(np.array([[4.0], [1.0]])), act=eq.ReLU(), fc2=eq.Dense(np.array([[1.0, 4.0]])))
    result = eq.equalize(graph, "cross_layer")
    assert result.factorization["act"].tolist() == [0.5, 2.0]
    assert result.graph["fc1"].op.weight.tolist() == [[2.0], [2.0]]
    assert result.graph["fc2"].op.weight.tolist() == [[2.0, 2.0]]


def test_a_conv_that_reads_and_makes_one_stream_does_not_make_the_loop_swing():
    """``x + conv(x)``: the conv's weight ``[0, 1]`` grows by ``f_0 / f_1`` while ``[1, 0]`` shrinks by it."""
    for seed in range(30):
        result = eq.equalize(handmade.itself(Maker(seed)), eq.CrossLayer(tol=1e-9))
        assert result.success, result.message
        made_equals_read(result, 1e-7)


# ------------------------------------------------------------------------------------------------ topologies


@each_method
def test_values_joined_by_an_add_share_their_factors(method):
    m = Maker(6)
    graph = handmade.residual(m)
    f = equalized(graph, m.data(graph), method).factorization
    for value in ("stem", "act0", "b1", "add1", "b2", "add2"):
        assert np.array_equal(f[value], f["act3"])
    if method != "one_step":
        assert (f["act3"] != 1).any()


def test_the_residual_rule_of_the_paper_by_hand():
    """Two makers of one stream, 1, 4, 2 and 2, 4, 1 alone: normalized by their minima, the elementwise minimum is 1, 4, 1."""
    nodes = [eq.Node("a", eq.Dense(np.diag([1.0, 0.25, 0.5])), ["x"]), eq.Node("b", eq.Dense(np.diag([0.5, 0.25, 1.0])), ["x"]),
             eq.Node("add", eq.Add(), ["a", "b"]), eq.Node("out", eq.Dense(np.ones((1, 3))), ["add"])]
    graph = eq.Graph({"x": (3,)}, nodes, ["out"])
    f = equalized(graph, np.ones((1, 3)), "one_step").factorization
    assert f["add"].tolist() == f["a"].tolist() == f["b"].tolist() == [1.0, 4.0, 1.0]


@each_method
def test_concat_channels_follow_their_sources(method):
    m = Maker(7)
    graph = handmade.concat(m)
    f = equalized(graph, m.data(graph), method).factorization
    assert np.array_equal(f["cat"], np.concatenate([f["act_a"], f["act_b"], f["c"]]))


@pytest.mark.parametrize("method", ["one_step", "two_step"])
def test_the_concat_rule_of_the_paper_lifts_the_mates_to_one_range(method):
    """Ranges 8 and 2: the second layer reaches 2 by itself and is lifted by 4."""
    nodes = [eq.Node("a", eq.Dense(np.diag([8.0, 4.0])), ["x"]), eq.Node("b", eq.Dense(np.diag([2.0, 0.5])), ["x"]),
             eq.Node("cat", eq.Concat(), ["a", "b"]), eq.Node("out", eq.Dense(np.ones((1, 4))), ["cat"])]
    graph = eq.Graph({"x": (2,)}, nodes, ["out"])
    f = equalized(graph, np.ones((1, 2)), method).factorization
    assert f["a"].tolist() == [1.0, 2.0]
    assert f["b"].tolist() == [4.0, 16.0]


def test_every_reader_of_a_fan_out_is_divided():
    m = Maker(8)
    graph = handmade.fan_out(m)
    result = equalized(graph, m.data(graph), "one_step")
    f = result.factorization["act"]
    assert f.max() > 1
    for reader in ("b", "c"):
        np.testing.assert_allclose(result.graph[reader].op.weight * result.factorization[reader][:, None, None] ** -1 * f[:, None],
                                   graph[reader].op.weight, rtol=1e-14)


def test_m_is_the_largest_over_all_readers():
    nodes = [eq.Node("a", eq.Dense(np.array([[4.0], [2.0], [1.0]])), ["x"]), eq.Node("b", eq.Dense(np.array([[0.25, 1.0, 0.5]])), ["a"]),
             eq.Node("c", eq.Dense(np.array([[8.0, 0.5, 4.0]])), ["a"])]
    graph = eq.Graph({"x": (1,)}, nodes, ["b", "c"])
    # m = max(1/4, 1), max(1, 1/16), max(1/2, 1/2) = 1, 1, 1/2; K m = 4, 2, 1/2; with the first reader alone it would be 1, 2, 1/2
    assert equalized(graph, np.ones((1, 1)), "two_step").factorization["a"].tolist() == [1.0, 2.0, 4.0]


@each_method
def test_flatten_repeats_each_channels_factor_over_its_pixels(method):
    m = Maker(9)
    graph = handmade.plain(m)
    f = equalized(graph, m.data(graph), method).factorization
    assert f["flat"].tolist() == [v for v in f["act2"].tolist() for _ in range(4)]
    assert np.ptp(f["act2"]) > 0


@each_method
def test_relu6_networks_are_equalized_without_changing_their_function(method):
    m = Maker(10)
    graph = handmade.mobile(m)
    x = 8 * m.data(graph)
    assert any((v == 6).any() for v in eq.values(graph, x).values()), "the data must saturate"
    result = equalized(graph, x, method)
    assert eq.verify(graph, result.graph, x)
    for act in ("act", "act1", "act2", "act3"):
        np.testing.assert_allclose(result.graph[act].op.high * np.ones(graph.shapes[act][0]), 6 * result.factorization[act], rtol=1e-15)
    assert factors_of(result).max() > 1


@each_method
def test_a_conv_used_twice_keeps_one_set_of_weights_and_the_function(method):
    m = Maker(11)
    graph = handmade.shared(m)
    x = m.data(graph)
    result = equalized(graph, x, method)
    assert result.graph["first"].op is result.graph["second"].op
    assert eq.verify(graph, result.graph, x)


@each_method
def test_grouped_and_transposed_weights_are_read_along_the_right_axes(method):
    """Each made and read range of the equalized network follows from factors and original weights, entry by entry."""
    m = Maker(12)
    graph = handmade.grouped(m)
    result = equalized(graph, m.data(graph), method)
    for name in ("a", "b", "up", "out"):
        op, f_out, f_in = graph[name].op, result.factorization[name], result.factorization[graph[name].inputs[0]]
        per_group = len(op.weight) // op.groups
        for o, i in np.ndindex(*op.weight.shape[:2]):
            expected = op.weight[o, i] * f_out[o] / f_in[o // per_group * op.weight.shape[1] + i]
            np.testing.assert_allclose(result.graph[name].op.weight[o, i], expected, rtol=1e-14)


@pytest.mark.parametrize("net", [net for net in TABLE if all(
    node.op.divides for node in net.graph.nodes if isinstance(node.op, Weighted))], ids=str)
def test_cross_layer_looks_at_no_statistics_where_nothing_normalises(net):
    alone, beside = (eq.equalize(net.graph, "cross_layer", stats=of).factorization for of in (None, eq.calibrate(net.graph, net.data())))
    assert all(np.array_equal(alone[value], beside[value]) for value in net.graph.shapes)


# ------------------------------------------------------------------------------------------------ include and exclude


@each_method
def test_excluded_values_keep_factor_1_and_the_rest_moves(method):
    m = Maker(1)
    graph = handmade.plain(m)
    result = equalized(graph, m.data(graph), method, exclude=["act1"])
    assert (result.factorization["conv1"] == 1).all()
    assert (result.factorization["act2"] != 1).any()
    assert result.pinned["conv1"] == result.pinned["act1"] == "excluded by the caller ('act1')"


@each_method
def test_only_included_values_move(method):
    m = Maker(1)
    graph = handmade.plain(m)
    result = equalized(graph, m.data(graph), method, include=["act1"])
    assert (result.factorization["conv1"] != 1).any()
    assert (result.factorization["act2"] == 1).all()
    assert "not among the values that the caller includes" in result.pinned["act2"]


@each_method
def test_included_channels_move_although_they_meet_others_in_a_concat(method):
    m = Maker(3)
    graph = handmade.concat(m)
    x = m.data(graph)
    result = equalized(graph, x, method, include=["act_b"])
    assert (result.factorization["b"] != 1).any()
    assert all((result.factorization[v] == 1).all() for v in ("a", "c", "d"))
    assert eq.verify(graph, result.graph, x)


def test_an_included_slice_leaves_the_channels_beside_it_alone():
    m = Maker(3)
    graph = handmade.grouped(m)
    f = eq.equalize(graph, include=["half"]).factorization
    assert (f["b"][:2] == 1).all()
    assert (f["half"] != 1).any()


def test_including_and_excluding_everything_or_nothing():
    m = Maker(1)
    graph = handmade.plain(m)
    everything = eq.equalize(graph)
    assert np.array_equal(eq.equalize(graph, include=list(graph.shapes)).factorization["act1"], everything.factorization["act1"])
    for nothing in (eq.equalize(graph, include=[]), eq.equalize(graph, exclude=list(graph.shapes))):
        assert (factors_of(nothing) == 1).all()
        assert nothing.success
        assert "no channel is free" in nothing.message
        assert set(nothing.pinned) == set(graph.shapes)


# ------------------------------------------------------------------------------------------------ dead and extreme channels


def with_extreme_channel(kind, dtype, seed=0):
    """dense - relu - dense - relu - dense, whose first layer's channel 1 is made with a weight of this size; and data."""
    m = Maker(seed, dtype)
    first, second, third = m.dense(4, 3), m.dense(4, 4), m.dense(2, 4)
    weight, bias = first.weight.copy(), first.bias.copy()
    size = {"dead": 0.0, "constant": 0.0, "subnormal": 1e-310 if dtype == "float64" else 1e-42, "huge": 1e30}.get(kind)
    size = float(kind) if size is None else size
    weight[1] = size * np.array([1, -0.5, 0.25])
    bias[1] = 1.0 if kind == "constant" else 0.0 if kind == "dead" else size
    second_weight = second.weight.copy()
    if kind == "huge":
        second_weight[:, 1] *= 1e-30
    graph = eq.Graph.chain((3,), fc1=dataclasses.replace(first, weight=weight, bias=bias), act1=eq.ReLU(),
                           fc2=dataclasses.replace(second, weight=second_weight), act2=eq.ReLU(), fc3=third)
    return graph, m.data(graph, 16)


@each_method
@each_dtype
@pytest.mark.parametrize("kind", ["dead", "constant", "subnormal", "huge", "1e-8", "1e-12", "1e-20"])
def test_dead_nearly_dead_constant_subnormal_and_huge_channels(kind, dtype, method):
    graph, x = with_extreme_channel(kind, dtype)
    for exact in (False, True):
        result = equalized(graph, x, method, exact=exact)
        assert result.success
        keeps_the_function(graph, x, result, method)
        f = result.factorization["act1"]
        if kind in ("dead", "constant"):
            assert f[1] == 1
            assert "1 dead channel keeps the factor 1" in result.message
        elif kind != "huge":
            assert 1 <= f[1] <= (1024 if method == "cross_layer" else 16)
            assert "at the bound" in result.message, result.message
        elif method != "one_step":
            assert f[1] == 1 / 1024
            assert "at the bound" in result.message


@each_method
def test_a_channel_that_nobody_reads_keeps_factor_1_and_is_counted_dead(method):
    weight = np.ones((1, 3))
    weight[0, 2] = 0
    graph = eq.Graph.chain((1,), fc1=eq.Dense(np.array([[1.0], [0.5], [0.25]])), act=eq.ReLU(), fc2=eq.Dense(weight))
    result = equalized(graph, np.ones((1, 1)), method)
    assert result.factorization["act"][2] == 1
    assert "1 dead channel" in result.message


@each_method
def test_several_dead_channels_are_counted(method):
    graph = eq.Graph.chain((1,), fc1=eq.Dense(np.array([[1.0], [0.0], [0.0]])), act=eq.ReLU(), fc2=eq.Dense(np.ones((1, 3))))
    assert "2 dead channels keep the factor 1" in equalized(graph, np.ones((1, 1)), method).message


@each_method
def test_a_network_of_zeros_is_returned_as_it_is(method):
    graph = eq.Graph.chain((2,), fc1=eq.Dense(np.zeros((3, 2))), act=eq.ReLU(), fc2=eq.Dense(np.zeros((1, 3))))
    result = equalized(graph, np.zeros((1, 2)), method)
    assert result.success
    assert (factors_of(result) == 1).all()


@pytest.mark.parametrize("method", ["one_step", "two_step"])
def test_a_residual_whose_reader_ignores_a_channel_gets_bounded_factors(method):
    """Two makers, and a reader with next to no weight for channel 0, subnormal even."""
    for tiny in (1e-12, 1e-310):
        nodes = [eq.Node("a", eq.Dense(np.diag([1e12, 1.0])), ["x"]), eq.Node("b", eq.Dense(np.diag([1e12, 2.0])), ["x"]),
                 eq.Node("add", eq.Add(), ["a", "b"]), eq.Node("out", eq.Dense(np.array([[tiny, 1.0]])), ["add"])]
        graph = eq.Graph({"x": (2,)}, nodes, ["out"])
        x = np.array([[1.0, 0.5], [-1.0, 2.0]])
        keeps_the_function(graph, x, equalized(graph, x, method), method)


# ------------------------------------------------------------------------------------------------ the result


def test_the_fields_of_a_result():
    m = Maker(1)
    graph = handmade.plain(m)
    result = eq.equalize(graph, eq.CrossLayer(tol=1e-6))
    assert result.success is True
    assert result.message.startswith(f"cross_layer: 9 factors chosen in {result.iterations} sweeps")
    assert result.iterations == len(result.residual) > 1
    assert result.residual[-1] <= 1e-6 < result.residual[0]
    assert isinstance(result.graph, eq.Graph)
    assert isinstance(result.factorization, eq.Factorization)
    assert set(result.pinned) == {"x", "fc"}


@pytest.mark.parametrize("method", ["one_step", "two_step"])
def test_the_papers_rules_take_one_pass(method):
    m = Maker(1)
    graph = handmade.plain(m)
    result = equalized(graph, m.data(graph), method)
    assert result.iterations == 1
    assert result.success
    assert result.residual == (float(np.abs(np.log(factors_of(result))).max()),)


@pytest.mark.parametrize("sweeps", [1, 2, 3])
def test_too_few_sweeps_end_without_success_but_with_an_equivalent_network(sweeps):
    m = Maker(1)
    graph = handmade.mobile(m)
    x = m.data(graph)
    result = eq.equalize(graph, eq.CrossLayer(tol=1e-12, max_iter=sweeps))
    assert result.success is False
    assert result.iterations == sweeps
    assert "not converged" in result.message
    assert "raise max_iter" in result.message
    assert eq.verify(graph, result.graph, x)


@each_net
@each_method
def test_applying_the_factorization_gives_the_graph_of_the_result(build, method):
    m = Maker(2)
    graph = build(m)
    result = equalized(graph, m.data(graph), method)
    again = result.factorization.apply(graph)
    for node in again:
        if isinstance(node.op, eq.Weighted):
            assert np.array_equal(node.op.weight, result.graph[node.name].op.weight)


@settings(max_examples=60)
@given(networks())
def test_every_pinned_value_has_a_reason_and_every_other_one_is_free(graph):
    result = eq.equalize(graph)
    labels = result.factorization.channels.labels
    assert set(result.pinned) == {value for value, of_value in labels.items() if (of_value == 0).any()}
    assert all(reason for reason in result.pinned.values())
    assert set(graph.inputs) | set(graph.outputs) <= set(result.pinned)


def test_reasons_say_what_pins():
    m = Maker(1)
    graph = handmade.two_inputs(m)
    pinned = eq.equalize(graph).pinned
    assert pinned["x"] == "network input 'x'"
    assert pinned["y"] == "network input 'y'"
    assert pinned["c"] == "read by 'curve': SiLU is not positively homogeneous"
    assert pinned["curve"] == "made by 'curve': SiLU is not positively homogeneous"
    assert pinned["e"] == "network output 'e'"
    assert set(pinned) == {"x", "y", "c", "curve", "e"}


def test_a_network_without_free_channels_is_returned_as_it_is():
    graph = eq.Graph.chain((2,), fc=eq.Dense(np.ones((2, 2))))
    result = eq.equalize(graph)
    assert result.success
    assert result.message == "cross_layer: no channel is free, the network is returned as it is"
    assert result.graph["fc"].op is graph["fc"].op
    graph = eq.Graph.chain((2,), act=eq.ReLU())
    assert eq.equalize(graph).success


# ------------------------------------------------------------------------------------------------ rules of one's own


def test_a_rule_of_ones_own_is_swept_to_convergence():
    def towards_l2(block):  # any function of ranges; here cross_layer at half speed
        return np.where((block.made > 0) & (block.read > 0), (block.read / np.maximum(block.made, 1e-300)) ** 0.25, 1.0)

    m = Maker(1)
    graph = handmade.plain(m)
    mine, theirs = eq.equalize(graph, eq.Swept(towards_l2, tol=1e-10)), eq.equalize(graph, eq.CrossLayer(tol=1e-10))
    assert mine.success
    assert mine.message.startswith("towards_l2: 9 factors chosen")
    for act in ("act1", "act2"):
        np.testing.assert_allclose(mine.factorization[act], theirs.factorization[act], rtol=1e-8)


def test_a_rule_of_ones_own_sees_activations_if_statistics_are_given():
    seen = []

    def rule(block):
        seen.append(block.makers[0].activation)
        return np.ones(len(block.made))

    m = Maker(1)
    graph = handmade.plain(m)
    x = m.data(graph)
    eq.equalize(graph, rule)
    assert seen == [None, None]
    seen.clear()
    eq.equalize(graph, rule, stats=eq.calibrate(graph, x))
    np.testing.assert_array_equal(seen[0], eq.values(graph, x)["act1"].max(axis=(0, 2, 3)))


def test_a_rule_that_never_settles_ends_at_its_bound_or_after_max_iter():
    m = Maker(1)
    graph = handmade.plain(m)
    growing = eq.equalize(graph, lambda block: np.full(len(block.made), 2.0))
    assert growing.success
    assert factors_of(growing).max() == 1024
    turns = itertools.cycle([2.0, 0.5])
    swinging = eq.equalize(graph, eq.Swept(lambda block: np.full(len(block.made), next(turns)), max_iter=50), exclude=["act2"])
    assert not swinging.success
    assert swinging.iterations == 50


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf, -np.inf])
def test_a_rule_that_returns_unusable_factors_is_refused_by_value_and_channel(bad):
    m = Maker(1)
    graph = handmade.plain(m)
    before = {n.name: n.op.weight.copy() for n in graph if isinstance(n.op, eq.Weighted)}

    def rule(block):
        step = np.ones(len(block.made))
        if len(step) == 5:
            step[3] = bad
        return step

    with pytest.raises(ValueError, match=rf"value 'conv2', channel 3: the rule returned {bad}; factors must be positive and finite"):
        eq.equalize(graph, rule)
    assert all(np.array_equal(graph[name].op.weight, weight) for name, weight in before.items())


def test_the_refusal_names_the_layers_own_channel_where_some_are_pinned():
    nodes = [eq.Node("a", eq.Dense(np.ones((4, 1))), ["x"]), eq.Node("out1", eq.Slice(0, 2), ["a"]), eq.Node("rest", eq.Slice(2, 4), ["a"]),
             eq.Node("out2", eq.Dense(np.ones((1, 2))), ["rest"])]
    graph = eq.Graph({"x": (1,)}, nodes, ["out1", "out2"])
    with pytest.raises(ValueError, match="value 'a', channel 3: the rule returned 0"):
        eq.equalize(graph, lambda block: np.array([1.0, 0.0]))
    nodes = [eq.Node("a", eq.Dense(np.ones((1, 1))), ["x"]), eq.Node("b", eq.Dense(np.ones((3, 1))), ["x"]),
             eq.Node("cut", eq.Slice(2, 3), ["b"]), eq.Node("add", eq.Add(), ["a", "cut"]), eq.Node("cat", eq.Concat(), ["b", "add"]),
             eq.Node("out", eq.Dense(np.ones((1, 4))), ["cat"])]
    graph = eq.Graph({"x": (1,)}, nodes, ["out"])
    with pytest.raises(ValueError, match="value 'b', channel 1: the rule returned -1"):
        eq.equalize(graph, lambda block: np.array([1.0, 1.0, -1.0]))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 1)])
def test_a_rule_that_returns_another_shape_is_refused(shape):
    graph = handmade.plain(Maker(1))
    with pytest.raises(ValueError, match="value 'conv1': the rule must return 4 factors, got shape"):
        eq.equalize(graph, lambda block: np.ones(shape))


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("method", ["", "one-step", "cle"])
def test_unknown_methods_are_refused(method):
    with pytest.raises(ValueError, match=r"unknown method .*: use 'one_step', 'two_step', .*or a rule"):
        eq.equalize(handmade.plain(Maker(1)), method)


@pytest.mark.parametrize("method", ["one_step", "two_step"])
def test_the_papers_rules_need_statistics(method):
    with pytest.raises(ValueError, match="needs the ranges of activations: give data=images, or stats=calibrate"):
        eq.equalize(handmade.plain(Maker(1)), method)


def test_statistics_of_another_network_are_refused():
    m = Maker(1)
    graph = handmade.plain(m)
    stats = eq.calibrate(graph, m.data(graph))
    other = handmade.mobile(m)
    with pytest.raises(ValueError, match="the statistics lack value 'act': calibrate this graph, after folding"):
        eq.equalize(other, "one_step", stats=stats)
    more = {"conv1": m.conv(6, 3, 3, 3, stride=2, padding=1), "conv2": m.conv(5, 6, 2, 2)}
    wider = eq.Graph.chain((3, 6, 6), **{n.name: n.op for n in graph} | more)
    with pytest.raises(ValueError, match="the statistics of value 'conv1' have 4 channels, the network has 6"):
        eq.equalize(wider, "two_step", stats=stats)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_statistics_with_nan_or_infinity_are_refused(bad):
    m = Maker(1)
    graph = handmade.plain(m)
    stats = eq.calibrate(graph, m.data(graph))
    spoiled = eq.Statistics({**stats, "act2": dataclasses.replace(stats["act2"], max=np.full(5, bad))})
    with pytest.raises(ValueError, match="the statistics of value 'act2' hold NaN or infinity"):
        eq.equalize(graph, "one_step", stats=spoiled)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_include_and_exclude_name_values(argument):
    graph = handmade.plain(Maker(1))
    with pytest.raises(ValueError, match=f"{argument} names 'act9', which is not a value of the network"):
        eq.equalize(graph, **{argument: ["act1", "act9"]})
    with pytest.raises(TypeError, match=f"{argument} must be a list of value names, got the string 'act1'"):
        eq.equalize(graph, **{argument: "act1"})


@pytest.mark.parametrize("max_factor", [0.5, 0, -1, np.inf, np.nan])
def test_a_max_factor_below_1_or_without_end_is_refused(max_factor):
    with pytest.raises(ValueError, match="max_factor must be a finite number of at least 1"):
        eq.CrossLayer(max_factor=max_factor)


@pytest.mark.parametrize("max_iter", [0, -1, 1.5, "many"])
def test_max_iter_must_be_a_positive_integer(max_iter):
    with pytest.raises(ValueError, match="max_iter must be a positive integer"):
        eq.CrossLayer(max_iter=max_iter)


@pytest.mark.parametrize("tol", [-1e-3, np.nan])
def test_tol_must_not_be_negative_or_nan(tol):
    with pytest.raises(ValueError, match="tol must be a finite number of at least 0"):
        eq.CrossLayer(tol=tol)


# ------------------------------------------------------------------------------------------------ one call


@pytest.mark.parametrize("build", [handmade.mobile, handmade.residual], ids=lambda f: f.__name__)
def test_data_alone_is_calibration_gradients_likely_ranges_and_the_optimum(build):
    m = Maker(4)
    graph = build(m)
    x = m.data(graph)
    assert len(x) <= equalization.SENSED
    stats = eq.calibrate(graph, x)
    by_hand = eq.Optimal(eq.gradient_sensitivities(graph, x, relative_to=stats), eq.likely_ranges(graph, stats))
    asked, pieces = eq.equalize(graph, data=x), eq.equalize(graph, by_hand, stats=stats)
    assert asked.message.startswith("optimal: ") and asked.predicted == pieces.predicted and asked.gap_db == pieces.gap_db
    for value in graph.shapes:
        assert np.array_equal(asked.factorization[value], pieces.factorization[value])


def test_batches_may_be_an_iterator_that_can_be_read_once():
    m = Maker(4)
    graph = handmade.mobile(m)
    x = np.concatenate([m.data(graph) for _ in range(6)])
    whole, batched = eq.equalize(graph, data=x), eq.equalize(graph, data=(x[i:i + 5] for i in range(0, len(x), 5)))
    assert len(x) > equalization.SENSED
    for value in graph.shapes:
        assert batched.factorization[value] == pytest.approx(whole.factorization[value], rel=1e-6)


def test_the_images_for_gradients_are_drawn_from_all_of_them():
    graph = eq.Graph.chain((1,), fc=eq.Dense(np.ones((1, 1))))
    data = np.arange(400.0)[:, None]
    for batches_of_it in (data, (data[i:i + 7] for i in range(0, 400, 7))):
        kept = equalization._measured(graph, batches_of_it, None)[1]["x"][:, 0]
        assert len(set(kept.tolist())) == equalization.SENSED
        assert np.histogram(kept, bins=4, range=(0, 400))[0].min() >= 1


@pytest.mark.parametrize("method", ["one_step", "two_step", "cross_layer", "optimal"])
def test_a_result_that_is_expected_to_be_worse_says_so_first(method):
    m = Maker(3)
    graph = handmade.mobile(m)
    x = m.data(graph)
    best = eq.equalize(graph, data=x)
    for start in (graph, best.graph):
        result = eq.equalize(start, method, data=x)
        before, after = result.predicted
        assert result.message.startswith("the expected noise rises, from") == (after < before)
        kept = eq.equalize(start, method, data=x, harmless=True)
        assert kept.predicted[1] >= kept.predicted[0] and not kept.message.startswith("the expected noise rises")


def test_the_optimum_does_not_advise_to_use_the_optimum():
    """From what is best for the ranges seen, to what is best for those that other data may reach."""
    m = Maker(3)
    graph = handmade.mobile(m)
    x = m.data(graph)
    best = eq.equalize(graph, eq.Optimal(ranges=eq.calibrate(graph, x), ridge=0.0), data=x).graph
    result = eq.equalize(best, data=x)
    assert result.predicted[1] < result.predicted[0]
    assert "give more data, or harmless=True" in result.message and "use method" not in result.message


def test_no_data_is_cross_layer_and_an_own_rule_is_swept():
    graph = handmade.plain(Maker(1))
    assert eq.equalize(graph).message.startswith("cross_layer: ")
    assert eq.equalize(graph, rules.cross_layer).message.startswith("cross_layer: ")
    with pytest.raises(ValueError, match="calibration needs at least one batch, got none"):
        eq.equalize(graph, data=[])
    with pytest.raises(ValueError, match="equalization on data needs at least one image, got none"):
        eq.equalize(graph, data=[], stats=eq.calibrate(graph, Maker(1).data(graph)))
    with pytest.raises(ValueError, match="expected noise needs the ranges of activations: give data=images"):
        eq.equalize(graph, harmless=True)


@pytest.mark.parametrize("named", [["weights"], ["activations"], []], ids=str)
def test_noise_is_predicted_for_whoever_names_a_quantizer(named):
    graph, quantizers = handmade.plain(Maker(1)), dict.fromkeys(named, eq.UniformQuantizer(8))
    result = eq.equalize(graph, "two_step", stats=eq.calibrate(graph, Maker(1).data(graph)), **quantizers)
    assert (result.predicted is not None) == bool(named)


def test_an_op_without_gradients_is_weighed_by_statistics():
    class Doubling(eq.ReLU):
        def vjp(self, g, *inputs):
            raise TypeError("no vjp")

    m = Maker(1)
    graph = handmade.plain(m)
    graph = graph.with_ops({node.name: Doubling() for node in graph if isinstance(node.op, eq.ReLU)})
    x = m.data(graph)
    stats = eq.calibrate(graph, x)
    rough, result = eq.forward_sensitivities(graph, stats), eq.equalize(graph, data=x)
    alone = eq.equalize(graph, stats=stats)
    assert result.predicted == alone.predicted
    assert all(np.array_equal(result.factorization[name], alone.factorization[name]) for name in graph.shapes)
    weighed = "; noise is weighed by statistics alone, which gradients do better: "
    first = [node.name for node in graph if isinstance(node.op, eq.ReLU)][-1]  # which gradients reach first
    assert f"{weighed}node '{first}': no vjp" in result.message
    assert "a factor of e costs" not in result.message
    given = eq.equalize(graph, eq.Optimal(rough), stats=stats, data=x)
    assert given.predicted == result.predicted
    assert f"{weighed}take gradient_sensitivities(graph, images)" in given.message and "a factor of e costs" not in given.message
    assert "a factor of e costs 0.2 dB" in eq.equalize(graph, eq.Optimal(ridge=0.2), data=x).message


def test_rough_sensitivities_stay_rough_when_they_are_rescaled():
    m = Maker(1)
    graph = handmade.plain(m)
    x = m.data(graph)
    factors = eq.equalize(graph).factorization
    rough, fine = eq.forward_sensitivities(graph, eq.calibrate(graph, x)), eq.gradient_sensitivities(graph, x)
    assert rough.rough and rough.rescaled(graph, factors).rough == rough.rough
    assert fine.rough == fine.rescaled(graph, factors).rough == ""


def test_statistics_alone_are_rough_and_set_no_price_on_factors():
    m = Maker(4)
    graph = handmade.mobile(m)
    x = m.data(graph)
    stats = eq.calibrate(graph, x)
    rough, data = eq.equalize(graph, stats=stats), eq.equalize(graph, stats=stats, data=x)
    assert "give data=images" in rough.message and "a factor of e costs" not in rough.message
    assert "give data=images" not in data.message and "where a factor of e costs 0.01 dB" in data.message
    assert "costs 0.2 dB" in eq.equalize(graph, eq.Optimal(ridge=0.2), stats=stats).message


def test_statistics_alone_come_within_a_decibel_of_gradients_on_the_bundled_network():
    bundle = demo.load_bundle()
    graph = eq.fold_batchnorm(bundle.network)
    stats = eq.calibrate(graph, bundle.calibration)
    gradients = eq.equalize(graph, data=bundle.calibration).predicted[1]
    factorization = eq.equalize(graph, stats=stats).factorization
    model = eq.noise_model(graph, stats, weights=eq.UniformQuantizer(8), activations=eq.UniformQuantizer(8, symmetric=False),
                           sensitivities=eq.gradient_sensitivities(graph, bundle.calibration[:equalization.SENSED]))
    assert gradients - model.sqnr(factorization) < 1
