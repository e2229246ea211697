"""Corrected biases against what runs of both networks show, expectations against integrals and samples, absorption against hand counts."""

from __future__ import annotations

from dataclasses import fields, replace

import handmade
import numpy as np
import pytest
from handmade import Maker
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

import eqfact as eq
from eqfact import correction
from eqfact.correction import clipped_normal_mean
from eqfact.ops import Commuting, Weighted
from eqfact.ops.blocking import Sloped
from eqfact.quantizers import FakeQuantize
from eqfact.testing.strategies import batches, networks

AFFINE = eq.UniformQuantizer(8, symmetric=False)
#: Activations, entry by entry.
ENTRYWISE = (eq.ReLU, eq.Clip, eq.LeakyReLU, eq.PReLU, eq.Sigmoid, eq.Tanh, eq.SiLU, eq.HardSwish, eq.HardSigmoid, eq.GELU, Sloped)
#: Arguments of quantize by name; statistics are those of the data.
SETTINGS = {
    "W8A8": {"weights": eq.UniformQuantizer(8), "activations": AFFINE},
    "W3A8 and outputs": {"weights": eq.UniformQuantizer(3), "activations": AFFINE, "outputs": True},
    "weights only": {"weights": eq.UniformQuantizer(3)},
    "activations only": {"activations": eq.UniformQuantizer(4, symmetric=False)},
    "per-channel weights": {"weights": eq.UniformQuantizer(4, granularity="per_channel"), "activations": AFFINE},
    "per-channel activations": {"weights": eq.UniformQuantizer(4), "activations": replace(AFFINE, granularity="per_channel")},
    "per-group weights": {"weights": eq.UniformQuantizer(4, granularity="per_group", group_size=2), "activations": AFFINE},
    "biases in float": {"weights": eq.UniformQuantizer(4), "activations": AFFINE, "biases": False},
}
SETTING = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
NET = pytest.mark.parametrize("build", handmade.NETS, ids=lambda build: build.__name__)
FLOAT = pytest.mark.parametrize("dtype", ["float32", "float64"])


def prepared(build, setting, dtype="float64", batch=6):
    """A network, itself quantized, and the data that gave the ranges."""
    m = Maker(7, dtype)
    graph = eq.fold_batchnorm(build(m))
    x = m.data(graph, batch)
    return graph, quantized(graph, x, setting), x


def quantized(graph, x, setting):
    return eq.quantize(graph, **setting, stats=eq.calibrate(graph, x) if "activations" in setting else None)


def layers(graph):
    return [node for node in graph if isinstance(node.op, Weighted) and node.op.gridded]


def float_name(name, graph):
    return name if name in graph.shapes else name[:-len(".float")]


def bias_of(op):
    return np.zeros(len(op.weight)) if op.bias is None else op.bias.astype(np.float64)


def accumulator_steps(q, setting):
    """The step ``s_x s_w`` of every layer's bias ``(C,)``, 0 where it is in float: scales carried from the FakeQuantizes on."""
    scales, steps = {}, {}
    for node in q:
        if isinstance(node.op, FakeQuantize):
            scales[node.name] = node.op.grid.scale
        elif isinstance(node.op, Commuting) and (node.op.moves or node.op.bounds) and node.inputs[0] in scales:
            scales[node.name] = scales[node.inputs[0]]
    for node in layers(q):
        s_x, out = scales.get(node.inputs[0], np.zeros(0)), len(node.op.weight)
        s_w = np.zeros(0) if node.op.grid is None else node.op.grid.scale.reshape(-1)
        whole = (setting.get("biases", True) or node.op.bias is None) and s_x.size == 1 and s_w.size in (1, out)
        steps[node.name] = np.broadcast_to(s_x * s_w, (out,)) if whole else np.zeros(out)
    return steps


def channel_means(value):
    return np.moveaxis(value, 1, 0).reshape(value.shape[1], -1).astype(np.float64).mean(axis=1)


def mean_errors(graph, q, x):
    """The mean error of every layer's output ``(C,)``, from full runs of both networks."""
    truth, got = eq.values(graph, x), eq.values(q, x)
    return {node.name: channel_means(got[node.name]) - channel_means(truth[float_name(node.name, graph)]) for node in layers(q)}


def rounding(graph, x, name):
    """What sums and biases of the network's dtype may be off by."""
    value = eq.values(graph, x)[float_name(name, graph)]
    return 64 * np.finfo(value.dtype).eps * float(np.abs(value).max() + 1)


def behind(graph, name):
    """The value of the activation that alone reads a value, or of the last of several; None where there is none."""
    readers = graph.readers[name]
    if name in graph.outputs or len(readers) != 1 or not isinstance(readers[0].op, ENTRYWISE):
        return None
    return behind(graph, readers[0].name) or readers[0].name


def straightened(graph):
    """The network with nothing in the place of all activations: the mean of a layer's output is that of what the next one reads."""
    return graph.with_ops({node.name: eq.Identity() for node in graph if isinstance(node.op, ENTRYWISE)})


def leaves_no_mean_error(graph, q, x, setting):
    """Of layers without an activation behind them, whose entries all are read."""
    corrected = eq.correct_bias(graph, q, x)
    steps = accumulator_steps(q, setting)
    for name, error in mean_errors(graph, corrected.graph, x).items():
        if behind(graph, float_name(name, graph)) is not None:
            continue
        # a bias that int32 cannot hold, in steps far smaller than itself, goes as far as it can
        saturated = (steps[name] > 0) & (np.abs(bias_of(corrected.graph[name].op)) > 0.999 * 2**31 * steps[name])
        assert (saturated | (np.abs(error) <= steps[name] / 2 + rounding(graph, x, name))).all(), name


def noises(value, expected):
    return channel_means((value.astype(np.float64) - expected) ** 2)


def makes_nothing_noisier(graph, q, x):
    """Behind an activation, no bias that was corrected leaves more noise than the one before, all earlier layers corrected."""
    corrected, truth = eq.correct_bias(graph, q, x), eq.values(graph, x)
    for node in layers(q):
        if (end := behind(graph, float_name(node.name, graph))) is not None:
            kept = corrected.graph.with_ops({node.name: node.op})
            after, before = (noises(eq.values(g, x)[end], truth[end]) for g in (corrected.graph, kept))
            assert (after <= before * (1 + 1e-12)).all(), node.name


def by_hand(graph, q, x, name):
    """The shift of a layer with a ReLU behind it, image by image, all earlier layers corrected; and the noise without it and with it."""
    truth, got = eq.values(graph, x)[behind(graph, name)], eq.values(q, x)[name]
    shifts = []
    for channel in range(got.shape[1]):
        sums = [(float((t - y)[y > 0].sum()), int((y > 0).sum()))
                for t, y in zip(truth[:, channel], got[:, channel], strict=True)]
        gain = cost = 0.0
        for left_out, (error, count) in enumerate(sums):
            rest = [pair for k, pair in enumerate(sums) if k != left_out]
            if of_rest := sum(n for _, n in rest):
                shift = sum(e for e, _ in rest) / of_rest
                gain, cost = gain + shift * error, cost + shift**2 * count
        total = sum(n for _, n in sums)
        share = min(max(gain / cost, 0.0), 1.0) if cost else 0.0
        shifts.append(share * sum(e for e, _ in sums) / total if total else
                      float((truth[:, channel] - np.maximum(got[:, channel], 0)).mean()))
    along = np.array(shifts).reshape(1, -1, *(1,) * (got.ndim - 2))
    return np.array(shifts), noises(np.maximum(got, 0), truth), noises(np.maximum(got + along, 0), truth)


# ------------------------------------------------------------------------------------------------ iterative


@NET
@SETTING
@FLOAT
@pytest.mark.parametrize("kind", [eq.fold_batchnorm, straightened])
def test_no_corrected_layer_has_a_mean_error_above_half_a_step_of_its_bias(build, setting, dtype, kind):
    graph, q, x = prepared(lambda m: kind(build(m)), setting, dtype)
    leaves_no_mean_error(graph, q, x, setting)


@given(st.data())
def test_no_layer_of_a_random_network_keeps_a_mean_error(data):
    graph = data.draw(st.sampled_from([eq.fold_batchnorm, straightened]))(eq.fold_batchnorm(data.draw(networks())))
    x, setting = data.draw(batches(graph)), data.draw(st.sampled_from(list(SETTINGS.values())))
    leaves_no_mean_error(graph, quantized(graph, x, setting), x, setting)


@NET
@SETTING
@FLOAT
def test_no_correction_makes_what_an_activation_passes_on_noisier(build, setting, dtype):
    makes_nothing_noisier(*prepared(build, setting, dtype))


@given(st.data())
def test_no_correction_makes_a_value_of_a_random_network_noisier(data):
    graph = eq.fold_batchnorm(data.draw(networks()))
    x, setting = data.draw(batches(graph)), data.draw(st.sampled_from(list(SETTINGS.values())))
    makes_nothing_noisier(graph, quantized(graph, x, setting), x)


def test_what_an_activation_cuts_off_corrects_nothing():
    """The first entry passes, and is right; the second is wrong, and is cut off."""
    net = eq.Graph.chain((2,), fc=eq.Dense(np.array([[1.0, -0.25]])), act=eq.ReLU(), head=eq.Dense(np.array([[1.0]])))
    x = np.array([[1.0, 0.0], [0.0, 4.0]])
    q = eq.quantize(net, weights=eq.UniformQuantizer(2))  # -0.25 becomes 0
    corrected = eq.correct_bias(net, q, x)
    assert corrected.shifts["fc"].tolist() == [0]
    assert np.array_equal(eq.forward(corrected.graph, x), eq.forward(net, x))


@pytest.mark.parametrize("both", [True, False])
def test_where_more_than_an_activation_reads_a_layer_all_entries_count(both):
    """In both networks, or in the quantized one alone; or where the layer's value is an output."""
    net = eq.Graph.chain((2,), fc=eq.Dense(np.array([[1.0, -0.25]])), act=eq.ReLU(), head=eq.Dense(np.array([[1.0]])))
    x = np.array([[1.0, 0.0], [0.0, 4.0]])  # the mean of the sums is 0, and 1/2 in the quantized network
    for more in ({"nodes": (*net.nodes, eq.Node("more", eq.Identity(), ["fc"])), "outputs": ("head", "more")}, {"outputs": ("head", "fc")}):
        if "nodes" not in more and not both:
            continue
        read = replace(net, **more)
        corrected = eq.correct_bias(read if both else net, eq.quantize(read, weights=eq.UniformQuantizer(2)), x)
        assert corrected.shifts["fc"].tolist() == [-0.5]


def test_a_shift_behind_an_activation_by_hand():
    """The errors of what passes are 1/2, 3/2 and 1; from two of them follow 5/4, 3/4 and 1 for the third."""
    net = eq.Graph.chain((1,), fc=eq.Dense(np.array([[1.0], [0.25]]), np.array([0.0, 1.0])), act=eq.ReLU(), head=eq.Dense(np.ones((1, 2))))
    q = eq.quantize(net, weights=eq.UniformQuantizer(2))
    share = (5 / 4 * 1 / 2 + 3 / 4 * 3 / 2 + 1) / (25 / 16 + 9 / 16 + 1)
    np.testing.assert_allclose(eq.correct_bias(net, q, np.array([[2.0], [6.0], [4.0]])).shifts["fc"], [0, share], rtol=1e-15)
    # errors of 1/2, 3/2 and -1 say nothing about each other
    assert eq.correct_bias(net, q, np.array([[2.0], [6.0], [-4.0]])).shifts["fc"].tolist() == [0, 0]
    # an only image is believed
    assert eq.correct_bias(net, q, np.array([[2.0]])).shifts["fc"].tolist() == [0, 0.5]


@NET
def test_shifts_before_a_relu_are_what_images_left_out_confirm(build):
    graph, q, x = prepared(build, SETTINGS["weights only"])
    corrected = eq.correct_bias(graph, q, x)
    for node in layers(q):
        value = float_name(node.name, graph)
        if (end := behind(graph, value)) is not None and type(graph[end].op) is eq.ReLU:
            so_far = corrected.graph.with_ops({node.name: node.op})
            shift, before, after = by_hand(graph, so_far, x, node.name)
            np.testing.assert_allclose(corrected.shifts[node.name], np.where(after > before, 0, shift), rtol=1e-9, atol=1e-12)


def test_the_laws_of_shifts_before_a_relu_have_something_to_say():
    """Some are made, and some are not."""
    made = []
    for build in handmade.NETS:
        graph, q, x = prepared(build, SETTINGS["weights only"])
        made += [shift != 0 for name, shift in eq.correct_bias(graph, q, x).shifts.items() if behind(graph, name) is not None]
    assert 0.1 < np.concatenate(made).mean() < 0.9


def test_a_channel_of_which_nothing_passes_is_corrected_by_all_entries():
    net = eq.Graph.chain((1,), fc=eq.Dense(np.array([[1.0], [0.25]])), act=eq.ReLU(), head=eq.Dense(np.ones((1, 2))))
    q = eq.quantize(net, weights=eq.UniformQuantizer(2))  # the second channel is 0
    assert eq.correct_bias(net, q, np.array([[2.0], [6.0]])).shifts["fc"].tolist() == [0, 1]


def test_the_mean_errors_that_correction_removes_were_there():
    graph, q, x = prepared(handmade.mobile, SETTINGS["W3A8 and outputs"])
    steps = accumulator_steps(q, {})
    assert all((np.abs(error) > 2 * steps[name]).any() for name, error in mean_errors(graph, q, x).items())


@NET
@SETTING
def test_only_biases_change(build, setting):
    graph, q, x = prepared(build, setting)
    corrected = eq.correct_bias(graph, q, x).graph
    assert (dict(corrected.inputs), corrected.outputs, len(corrected)) == (dict(q.inputs), q.outputs, len(q))
    for before, after in zip(q, corrected, strict=True):
        assert (after.name, after.inputs, after.origin, type(after.op)) == (before.name, before.inputs, before.origin, type(before.op))
        if after.op is not before.op:
            assert after.op.bias.dtype == after.op.weight.dtype
            for parameter in (f.name for f in fields(before.op) if f.name != "bias"):
                ours, theirs = getattr(after.op, parameter), getattr(before.op, parameter)
                assert ours is theirs or ours == theirs


@NET
@SETTING
@FLOAT
def test_reported_shifts_are_the_differences_of_the_biases(build, setting, dtype):
    graph, q, x = prepared(build, setting, dtype)
    corrected = eq.correct_bias(graph, q, x)
    assert list(corrected.shifts) == [node.name for node in layers(q)]
    for before, after in zip(q, corrected.graph, strict=True):
        if before.name in corrected.shifts:
            assert np.array_equal(corrected.shifts[before.name], bias_of(after.op) - bias_of(before.op))
        else:
            assert after.op is before.op


@NET
@FLOAT
def test_without_quantization_nothing_is_shifted(build, dtype):
    graph, _, x = prepared(build, {}, dtype)
    corrected = eq.correct_bias(graph, eq.quantize(graph), x)
    assert all(not shift.any() for shift in corrected.shifts.values())
    assert all(after.op is before.op for before, after in zip(graph, corrected.graph, strict=True))


@NET
@SETTING
def test_correcting_again_moves_no_bias_by_more_than_a_step(build, setting):
    graph, q, x = prepared(lambda m: straightened(build(m)), setting)
    once = eq.correct_bias(graph, q, x)
    again = eq.correct_bias(graph, once.graph, x)
    steps = accumulator_steps(q, setting)
    for name, shift in again.shifts.items():
        assert (np.abs(shift) <= steps[name] * (1 + 1e-9) + rounding(graph, x, name)).all()


@NET
def test_the_order_in_which_nodes_are_listed_does_not_matter(build):
    graph, q, x = prepared(build, SETTINGS["W3A8 and outputs"])
    expected = eq.correct_bias(graph, q, x).shifts
    turned_graph, turned = (eq.Graph(g.inputs, g.nodes[::-1], g.outputs) for g in (graph, q))
    for shifts in (eq.correct_bias(graph, turned, x).shifts, eq.correct_bias(turned_graph, q, x).shifts):
        assert set(shifts) == set(expected)
        assert all(np.array_equal(shifts[name], expected[name]) for name in expected)


def test_biases_stay_on_the_grid_of_their_accumulator_only_if_they_were():
    for name, whole in (("W8A8", True), ("biases in float", False)):
        graph, q, x = prepared(handmade.plain, SETTINGS[name])
        steps = accumulator_steps(q, {})
        for node in layers(eq.correct_bias(graph, q, x).graph):
            parts = np.abs(node.op.bias / steps[node.name] - np.rint(node.op.bias / steps[node.name]))
            assert (parts.max() < 1e-6) == whole


@FLOAT
def test_a_layer_without_bias_gets_one_on_the_grid(dtype):
    graph = eq.Graph.chain((3,), fc=eq.Dense(np.random.default_rng(0).normal(size=(4, 3)).astype(dtype)))
    x = np.random.default_rng(1).normal(size=(9, 3)) + 1
    q = quantized(graph, x, SETTINGS["W3A8 and outputs"])
    corrected = eq.correct_bias(graph, q, x)
    (name,) = corrected.shifts
    step = accumulator_steps(q, {})[name]
    assert np.array_equal(corrected.shifts[name], corrected.graph[name].op.bias)
    assert corrected.graph[name].op.bias.dtype == dtype
    assert np.abs(corrected.shifts[name]).min() > 0
    np.testing.assert_allclose(corrected.shifts[name] / step, np.rint(corrected.shifts[name] / step), atol=1e-4)


def test_shared_weights_stay_shared_and_each_use_gets_its_own_bias():
    graph, q, x = prepared(handmade.shared, SETTINGS["weights only"])
    assert q["first"].op is q["second"].op
    corrected = eq.correct_bias(graph, q, x).graph
    assert corrected["first"].op.weight is corrected["second"].op.weight
    assert not np.array_equal(corrected["first"].op.bias, corrected["second"].op.bias)


def test_the_network_before_folding_is_the_same_truth():
    m = Maker(3)
    graph = eq.Graph.chain((2, 4), conv=m.conv(3, 2, 2), bn=m.batchnorm(3), act=eq.ReLU(), head=m.conv(2, 3, 1))
    folded, x = eq.fold_batchnorm(graph), m.data(graph)
    q = quantized(folded, x, SETTINGS["W3A8 and outputs"])
    ours, theirs = (eq.correct_bias(g, q, x).shifts for g in (graph, folded))
    assert list(ours) == ["bn", "head.float"]
    assert all(np.allclose(ours[name], theirs[name], rtol=1e-9, atol=1e-12) for name in ours)


def test_a_bias_corrected_by_hand():
    net = eq.Graph.chain((1,), fc=eq.Dense(np.array([[1.0], [0.25]])), head=eq.Dense(np.array([[1.0, 1.0]]), np.array([3.0])))
    q = eq.quantize(net, weights=eq.UniformQuantizer(2))  # 0.25 becomes 0
    corrected = eq.correct_bias(net, q, np.array([[2.0], [6.0]]))
    assert [corrected.graph["fc"].op.bias.tolist(), corrected.graph["head"].op.bias.tolist()] == [[0, 1], [3]]  # head: nothing is left
    assert corrected.message == "measured shifts corrected in 2 layers, the largest by 1 at 'fc'"


def test_batchnorms_that_stay_are_left_and_said():
    graph, q, x = prepared(handmade.volume, SETTINGS["W8A8"])
    corrected = eq.correct_bias(graph, q, x)
    assert dict(corrected.left) == {"bn0": "BatchNorm is computed in float", "bn": "BatchNorm is computed in float"}
    assert corrected.message.endswith("; left as they are: 'bn0' (BatchNorm is computed in float), 'bn' (BatchNorm is computed in float)")


def test_another_network_is_refused():
    graph, q, x = prepared(handmade.plain, SETTINGS["W8A8"])
    other = eq.Graph.chain((3, 6, 6), conv1=graph["conv1"].op)
    with pytest.raises(ValueError, match=r"layer 'conv2' of the quantized network makes no value of the float one: give the network"):
        eq.correct_bias(other, q, x)
    narrow = eq.Graph.chain((2,), fc=eq.Dense(np.ones((1, 2))))
    with pytest.raises(ValueError, match="layer 'fc' of the quantized"):
        eq.correct_bias(narrow, eq.Graph.chain((2,), fc=eq.Dense(np.ones((2, 2)))), np.ones((1, 2)))
    with pytest.raises(ValueError, match="layer 'x' of the quantized"):  # an input there
        eq.correct_bias(narrow, eq.Graph({"y": (2,)}, [eq.Node("x", eq.Dense(np.eye(2)), ["y"])], ["x"]), np.ones((1, 2)))


@pytest.mark.parametrize(("setting", "named"), [("W8A8", "x.quantized"), ("weights only", "conv1")])
def test_swapped_arguments_are_refused(setting, named):
    graph, q, x = prepared(handmade.plain, SETTINGS[setting])
    said = (f"the float network comes first, then the quantized one, but node '{named}' of the first is quantized: "
            "give the network that was quantized, and what quantize made of it")
    for first, second in ((q, graph), (q, q)):
        with pytest.raises(ValueError, match=said):
            eq.correct_bias(first, second, x)
        with pytest.raises(ValueError, match=said):
            eq.correct_bias_analytically(first, second, {"x": (np.zeros(3), np.ones(3))})


EQUALIZED = pytest.mark.parametrize("method", ["one_step", "two_step", "cross_layer", "optimal"])


@EQUALIZED
@SETTING
def test_the_network_before_equalization_is_refused(method, setting):
    """For both corrections, and in every setting; the network after it is not."""
    graph, _, x = prepared(handmade.uneven, setting)
    stats = eq.calibrate(graph, x)
    result = eq.equalize(graph, method, stats=stats)
    after = result.factorization.apply(stats)
    q = eq.quantize(result.graph, **setting, stats=after if "activations" in setting else None)
    gaussians = {"x": (np.zeros(3), np.ones(3))}
    with pytest.raises(ValueError, match=r"layer '\w+(\.float)?': its weights must (equal|lie within a step of their grid, \S+, of) those "
                                         r"of the float network, got \S+ at \(.*\) where that has \S+: give the network that was"):
        eq.correct_bias(graph, q, x)
    with pytest.raises(ValueError, match="its weights must"):
        eq.correct_bias_analytically(graph, q, gaussians)
    eq.correct_bias(result.graph, q, x)
    eq.correct_bias_analytically(result.graph, q, gaussians)


@pytest.mark.parametrize("rounding", ["half_even", "half_away", "half_up", "floor"])
def test_weights_rounded_by_any_rule_are_those_of_the_network(rounding):
    """And those rounded to either neighbour, as an optimized rounding may choose."""
    graph, _, x = prepared(handmade.plain, {})
    for bits in (2, 4, 8):
        q = quantized(graph, x, {"weights": eq.UniformQuantizer(bits, rounding=rounding, symmetric=bits != 4), "activations": AFFINE})
        eq.correct_bias(graph, q, x)
        up = {}
        for node in layers(q):
            grid, exact = node.op.grid, graph[float_name(node.name, graph)].op.weight
            other = np.where(node.op.weight > exact, node.op.weight - grid.scale, node.op.weight + grid.scale)
            up[node.name] = replace(node.op, weight=grid.fake_quantize(other))
        eq.correct_bias(graph, q.with_ops(up), x)


def test_data_that_forward_refuses_is_refused():
    graph, q, x = prepared(handmade.two_inputs, SETTINGS["W8A8"])
    with pytest.raises(ValueError, match=r"needs inputs \['x', 'y'\], got \['x'\]"):
        eq.correct_bias(graph, q, {"x": x["x"]})
    with pytest.raises(ValueError, match="empty batch"):
        eq.correct_bias(graph, q, {name: value[:0] for name, value in x.items()})


# ------------------------------------------------------------------------------------------------ expectations


def clipped_mean_by_integral(mean, deviation, low, high):
    """``E[y] = low + integral of P(y > t)`` from low on, or ``high - integral of P(y < t)``: no densities."""
    normal = stats.norm(mean, deviation)
    if np.isfinite(low):
        pieces = np.clip([mean - 9 * deviation, mean, mean + 9 * deviation], low, min(high, max(mean + 9 * deviation, low)))
        return low + sum(integrate.quad(normal.sf, a, b, epsabs=1e-13)[0] for a, b in zip([low, *pieces], pieces, strict=False))
    if np.isfinite(high):
        return -clipped_mean_by_integral(-mean, deviation, -high, np.inf)
    return mean


finite = st.floats(-5, 5)


@given(st.lists(st.tuples(finite, st.floats(1e-3, 4), st.one_of(finite, st.just(-np.inf)), st.one_of(st.floats(0, 6), st.just(np.inf))),
                min_size=1, max_size=4))
def test_the_mean_of_a_clipped_normal_value_is_its_integral(channels):
    mean, deviation, low, width = (np.array(v) for v in zip(*channels, strict=True))
    high = np.where(np.isfinite(low), low, -1.0) + width
    expected = [clipped_mean_by_integral(*numbers) for numbers in zip(mean, deviation, low, high, strict=True)]
    np.testing.assert_allclose(clipped_normal_mean(mean, deviation, low, high), expected, rtol=1e-8, atol=1e-9)


def test_known_means_of_clipped_normal_values():
    root = np.sqrt(2 / np.pi)
    assert clipped_normal_mean(0.0, 2.0, 0.0, np.inf) == pytest.approx(root)
    assert clipped_normal_mean(0.0, 2.0, -np.inf, 0.0) == pytest.approx(-root)
    assert clipped_normal_mean(1.5, 2.0, -np.inf, np.inf) == 1.5
    assert clipped_normal_mean(3.0, 7.0, 0.0, 6.0) == pytest.approx(3.0)  # symmetric about its mean
    assert clipped_normal_mean(3.0, 7.0, 1.0, 1.0) == pytest.approx(1.0)
    assert np.array_equal(clipped_normal_mean(np.array([-1.0, 2.0, 9.0]), 0.0, 0.0, np.array([6.0, 6.0, 7.0])), [0, 2, 7])
    assert np.array_equal(clipped_normal_mean(np.array([1.0, -1.0]), 1e-300, 0.0, np.inf), [1, 0])


ACTIVATIONS = {
    "ReLU": (eq.ReLU(), 0.0, 0.0, np.inf),
    "ReLU6": (eq.ReLU6(), 0.0, 0.0, 6.0),
    "Clip": (eq.Clip(-0.5, np.array([0.5, 1, 2])), 0.0, -0.5, np.array([0.5, 1, 2])),
    "open Clip": (eq.Clip(-np.inf, 1.0), 0.0, -np.inf, 1.0),
    "LeakyReLU": (eq.LeakyReLU(0.25), 0.25, 0.0, np.inf),
    "PReLU": (eq.PReLU(np.array([0.5, -1.0, 2.0])), np.array([0.5, -1.0, 2.0]), 0.0, np.inf),
}


@pytest.mark.parametrize(("op", "slope", "low", "high"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_analytic_shifts_behind_an_activation_are_the_integral(op, slope, low, high):
    mean, deviation = np.array([-1.0, 0.5, 2.0]), np.array([2.0, 0.0, 0.75])
    w = np.random.default_rng(0).normal(size=(4, 3))
    graph = eq.Graph.chain((3,), act=op, fc=eq.Dense(w))
    q = eq.quantize(graph, weights=eq.UniformQuantizer(3))
    channels = zip(mean, deviation, np.broadcast_to(high, 3), strict=True)
    clipped = np.array([clipped_mean_by_integral(m, d, low, h) if d else np.clip(m, low, h) for m, d, h in channels])
    expected = -(q["fc"].op.weight - w) @ (clipped + slope * (mean - clipped))
    corrected = eq.correct_bias_analytically(graph, q, {"x": (mean, deviation)})
    assert np.abs(expected).min() > 1e-3
    np.testing.assert_allclose(corrected.shifts["fc"], expected, rtol=1e-8)


def normal_network(m):
    """Layers between normal inputs, over space, with all activations that have a formula."""
    return eq.Graph({"x": (3, 6)}, [
        eq.Node("act", eq.ReLU6(), ["x"]),
        eq.Node("pool", eq.AvgPool(2, stride=1, padding=1), ["act"]),
        eq.Node("a", m.conv(4, 3, 3, stride=2, padding=1), ["pool"]),
        eq.Node("up", eq.ConvTranspose(m.weight(4, 1, 3), m.vector(4), stride=2, padding=1, groups=4), ["a"]),
        eq.Node("leaky", eq.LeakyReLU(0.1), ["x"]), eq.Node("b", m.conv(4, 3, 2), ["leaky"]),
        eq.Node("turned", eq.Permute((3, 1, 0, 2)), ["b"]), eq.Node("cut", eq.Slice(1, 3), ["turned"]),
        eq.Node("cat", eq.Concat(), ["b", "turned"]), eq.Node("c", m.conv(2, 8, 1), ["cat"]), eq.Node("add", eq.Add(), ["c", "cut"]),
        eq.Node("pad", eq.Pad(1, 0.5), ["add"]), eq.Node("flat", eq.Flatten(), ["pad"]), eq.Node("fc", m.dense(3, 14), ["flat"]),
    ], ["up", "fc"])


def errors_of_the_same_input(graph, q, x):
    """The mean error ``(C,)`` of every layer that alone is quantized, behind float ones."""
    found = {}
    for node in layers(q):
        alone = graph.with_ops({node.name: node.op})
        found[node.name] = channel_means(eq.values(alone, x)[node.name]) - channel_means(eq.values(graph, x)[node.name])
    return found


def test_analytic_correction_leaves_no_error_on_a_large_normal_sample():
    m = Maker(5)
    graph, n = normal_network(m), 2000
    mean, deviation = np.array([0.5, -1.0, 3.0]), np.array([1.0, 2.0, 4.0])
    # every entry takes each of n equally likely numbers once, in an order of its own: what follows is linear, so its means are nearly exact
    numbers = m.rng.permuted(np.tile(stats.norm.ppf((np.arange(n) + 0.5) / n), (18, 1)), axis=1).T
    sample = mean[:, None] + deviation[:, None] * numbers.reshape(n, 3, 6)
    q = eq.quantize(graph, weights=eq.UniformQuantizer(3))
    corrected = eq.correct_bias_analytically(graph, q, {"x": (mean, deviation)})
    assert list(corrected.shifts) == ["a", "up", "b", "c", "fc"] and not corrected.left
    before, after = (errors_of_the_same_input(graph, g, sample) for g in (q, corrected.graph))
    for name in before:
        assert np.abs(before[name]).max() > 0.05
        np.testing.assert_allclose(after[name], 0, atol=2e-3)


def exact_on_linear_chains():
    """Expectation and linear maps change places: the mean of the output is the output of the mean, computed by numpy alone."""
    rng = np.random.default_rng(2)
    weights, biases = [rng.normal(size=(4, 4)) for _ in range(4)], [rng.normal(size=4) for _ in range(4)]
    graph = eq.Graph.chain((4,), **{f"fc{i}": eq.Dense(w, b) for i, (w, b) in enumerate(zip(weights, biases, strict=True))})
    mean = rng.normal(size=4)
    corrected = eq.correct_bias_analytically(graph, eq.quantize(graph, weights=eq.UniformQuantizer(3)), {"x": (mean, np.ones(4))}).graph
    truth = got = mean
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        op = corrected[f"fc{i}"].op
        truth, got = w @ truth + b, op.weight @ got + op.bias
        np.testing.assert_allclose(got, truth, rtol=1e-12)


def test_analytic_correction_is_exact_on_linear_chains():
    exact_on_linear_chains()


def exact_on(op, shape):
    """One layer over space, at its borders, too: its mean over a constant input, pixel by pixel in numpy's own order of sums."""
    graph = eq.Graph.chain(shape, layer=op)
    mean = np.array([1.0, -2.0])
    q = eq.quantize(graph, weights=eq.UniformQuantizer(2))
    corrected = eq.correct_bias_analytically(graph, q, {"x": (mean, np.ones(2))}).graph
    image = np.broadcast_to(mean.reshape(-1, *(1,) * (len(shape) - 1)), shape)[None].copy()
    np.testing.assert_allclose(channel_means(eq.forward(corrected, image)), channel_means(eq.forward(graph, image)), rtol=1e-12)


OVER_SPACE = {
    "padded": (eq.Conv(Maker(1).weight(3, 2, 3, 3), padding=1), (2, 4, 3)),
    "strided": (eq.Conv(Maker(2).weight(4, 1, 2), np.ones(4), stride=2, groups=2, padding=((1, 0),)), (2, 5)),
    "transposed": (eq.ConvTranspose(Maker(3).weight(3, 2, 2, 2), stride=2), (2, 2, 3)),
    "overlapping": (eq.ConvTranspose(Maker(4).weight(2, 1, 3), stride=2, padding=1, output_padding=1, groups=2), (2, 4)),
}


@pytest.mark.parametrize(("op", "shape"), OVER_SPACE.values(), ids=OVER_SPACE)
def test_analytic_correction_is_exact_over_space(op, shape):
    exact_on(op, shape)


def test_analytic_correction_again_moves_no_bias_by_more_than_a_step():
    for name in ("W8A8", "W3A8 and outputs", "weights only"):
        graph, q, _ = prepared(handmade.plain, SETTINGS[name])
        gaussians = {"x": (np.ones(3), np.ones(3)), "act1": (np.ones(4), np.ones(4)), "act2": (np.ones(5), np.ones(5))}
        once = eq.correct_bias_analytically(graph, q, gaussians)
        steps = accumulator_steps(q, {})
        for layer, shift in eq.correct_bias_analytically(graph, once.graph, gaussians).shifts.items():
            assert (np.abs(shift) <= steps[layer] * (1 + 1e-9) + 1e-13).all()
            assert np.array_equal(once.shifts[layer], bias_of(once.graph[layer].op) - bias_of(q[layer].op))


def test_analytic_correction_says_which_means_it_does_not_know():
    m = Maker(1)
    graph = eq.Graph.chain((2, 4), a=m.conv(3, 2, 1), curve=eq.SiLU(), b=m.conv(3, 3, 1), bn=m.batchnorm(3), act=eq.ReLU(),
                           c=m.conv(1, 3, 1))
    q = eq.quantize(graph, weights=eq.UniformQuantizer(4))
    corrected = eq.correct_bias_analytically(graph, q, {**eq.batchnorm_gaussians(graph), "no such value": (np.ones(1), np.ones(1))})
    assert list(corrected.shifts) == ["c"]
    assert dict(corrected.left) == {"bn": "BatchNorm is computed in float", "a": "the mean of 'x' does not follow from the normal values",
                                    "b": "the mean of 'curve' does not follow from the normal values"}
    assert "'b' (the mean of 'curve' does not follow" in corrected.message
    nothing = eq.correct_bias_analytically(graph, q, {})
    assert nothing.message.startswith("computed shifts corrected in 0 layers; left as they are: ")
    assert all(after.op is before.op for before, after in zip(q, nothing.graph, strict=True))


def test_moments_of_another_size_and_other_weights_are_refused():
    graph, q, _ = prepared(handmade.plain, SETTINGS["weights only"])
    with pytest.raises(ValueError, match=r"a moment of value 'x' must be 3 numbers, one a channel, got .* of shape \(2,\)"):
        eq.correct_bias_analytically(graph, q, {"x": (np.ones(2), np.ones(3))})
    with pytest.raises(ValueError, match=r"a moment of value 'x' must be 3 numbers, one a channel, got .*nan"):
        eq.correct_bias_analytically(graph, q, {"x": (np.ones(3), np.array([1, np.nan, 1]))})
    other = graph.with_ops({"conv2": Maker(0).conv(5, 4, 2, 2, dilation=1), "conv1": eq.Conv(np.ones((4, 3, 1, 1)), stride=2)})
    with pytest.raises(ValueError, match="layer 'conv1' is not 'conv1' with rounded weights"):
        eq.correct_bias_analytically(other, q, {})


def calibrated_batchnorm_network(x):
    """conv - bn - act - conv - bn - act - dense, its BatchNorms' statistics those of the data."""
    m = Maker(11)
    graph = eq.Graph.chain((3, 8, 8), conv1=eq.Conv(m.weight(12, 3, 3, 3)), bn1=m.batchnorm(12), act1=eq.ReLU(),
                           conv2=eq.Conv(m.weight(16, 12, 3, 3)), bn2=m.batchnorm(16), act2=eq.ReLU6(),
                           pool=eq.GlobalAvgPool(), flat=eq.Flatten(), fc=m.dense(4, 16))
    for conv, bn in (("conv1", "bn1"), ("conv2", "bn2")):
        of = eq.calibrate(graph, x)[conv]
        graph = graph.with_ops({bn: replace(graph[bn].op, mean=of.mean, var=of.mean_square - of.mean**2)})
    return graph


def test_batchnorm_statistics_are_those_of_what_batchnorms_make():
    x = Maker(0).rng.normal(size=(40, 3, 8, 8)) + 0.3
    graph = calibrated_batchnorm_network(x)
    folded = eq.fold_batchnorm(graph)
    f = eq.equalize(folded, "cross_layer").factorization
    for gaussians, network in ((eq.batchnorm_gaussians(graph), folded), (eq.batchnorm_gaussians(graph, f), f.apply(folded))):
        of = eq.calibrate(network, x)
        assert list(gaussians) == ["bn1", "bn2"]
        for name, (mean, deviation) in gaussians.items():
            np.testing.assert_allclose(mean, of[name].mean, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(deviation**2, of[name].mean_square - of[name].mean**2, rtol=1e-9)


def test_batchnorms_whose_values_are_folded_away_are_skipped():
    m = Maker(4)
    graph = eq.Graph.chain((2,), bn=m.batchnorm(2), fc=m.dense(3, 2), act=eq.ReLU(), head=m.dense(1, 3))
    f = eq.equalize(eq.fold_batchnorm(graph), "cross_layer").factorization
    assert (list(eq.batchnorm_gaussians(graph)), list(eq.batchnorm_gaussians(graph, f))) == (["bn"], [])


def test_analytic_correction_of_a_batchnorm_network_is_nearly_that_by_means_measured():
    x = Maker(0).rng.normal(size=(120, 3, 8, 8)) + 0.3
    graph = calibrated_batchnorm_network(x)
    folded = eq.fold_batchnorm(graph)
    q = eq.quantize(folded, weights=eq.UniformQuantizer(4))
    gaussians = {"x": (np.full(3, 0.3), np.ones(3)), **eq.batchnorm_gaussians(graph)}
    analytic, measured = eq.correct_bias_analytically(folded, q, gaussians), q
    for name in ("bn1", "bn2", "fc"):
        ours, theirs = analytic.shifts[name], -mean_errors(folded, measured, x)[name]
        measured = measured.with_ops({name: replace(q[name].op, bias=bias_of(q[name].op) + theirs)})
        assert np.linalg.norm(ours - theirs) < 0.35 * np.linalg.norm(theirs), name
    before, after = (np.abs(mean_errors(folded, g, x)["fc"]).max() for g in (q, analytic.graph))
    assert after < before / 3


# ------------------------------------------------------------------------------------------------ high-bias absorption


def whole(seed, *shape):
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float64)


def two_layers(act):
    """Small whole numbers, so that moving a constant rounds nothing."""
    return eq.Graph.chain((2, 3), a=eq.Conv(whole(8, 4, 2, 1), np.array([20.0, 0.0, 15.0, 30.0])), act=act,
                          b=eq.Conv(whole(9, 6, 2, 2), groups=2))


LOW = np.array([5.0, -2.0, 3.0, 0.0])
LIMITS = [eq.ReLU(), eq.ReLU6(), eq.Clip(0, 17), eq.Clip(0, np.array([25.0, 4.0, 2.0, 40.0]))]


@pytest.mark.parametrize("act", LIMITS, ids=["ReLU", "ReLU6", "Clip", "limits by channel"])
def test_absorption_is_exact_where_all_values_exceed_what_is_absorbed(act):
    graph, x = two_layers(act), whole(0, 30, 2, 3)
    assert (eq.values(graph, x)["a"].min(axis=(0, 2)) >= LOW)[[0, 2]].all()
    done = eq.absorb_high_bias(graph, {"a": LOW}, x)
    assert np.array_equal(eq.forward(done.graph, x), eq.forward(graph, x))
    assert (dict(done.failed), dict(done.left)) == ({"a": 0.0}, {})
    absorbed = np.minimum(np.maximum(LOW, 0), np.broadcast_to(getattr(act, "high", np.inf), 4))
    assert np.array_equal(done.shifts["a"], -absorbed)
    if isinstance(act, eq.Clip):
        assert np.array_equal(done.graph["act"].op.high, act.high - absorbed)
        assert not np.any(done.graph["act"].op.low)


def changed_where_it_fails():
    graph, x = two_layers(eq.ReLU()), whole(1, 30, 2, 3)
    low = np.array([21.0, -1.0, 15.0, 31.0])
    done = eq.absorb_high_bias(graph, {"a": low}, [x[:7], x[7:]])
    value = eq.values(graph, x)["a"]
    c = np.maximum(low, 0)[:, None]
    below = (value < c) & (c > 0)
    share = below.sum() / (3 * value[:, 0].size)  # of the three channels with something to absorb
    assert 0.1 < share < 0.9
    assert done.failed["a"] == share
    assert f"up to {100 * share:.3g} % of the entries seen ('a') lie below" in done.message
    # there, the layer behind sees what was absorbed instead of the value
    assert np.array_equal(eq.forward(done.graph, x), graph["b"].op.forward(np.where(below, c, np.maximum(value, 0))))
    assert not np.array_equal(eq.forward(done.graph, x), eq.forward(graph, x))


def test_absorption_changes_the_rest_as_often_as_said():
    changed_where_it_fails()


def test_absorption_goes_through_a_chain_and_reports_every_bias():
    m = Maker(6)
    graph = eq.Graph.chain((2,), a=eq.Dense(m.weight(3, 2), np.full(3, 30.0)), r1=eq.ReLU(),
                           b=eq.Dense(np.abs(m.weight(3, 3)), np.full(3, 9.0)), r2=eq.ReLU(), c=m.dense(2, 3))
    x = m.data(graph, 20)
    low = {name: of.min for name, of in eq.calibrate(graph, x).items() if name in ("a", "b")}
    done = eq.absorb_high_bias(graph, low, x)
    assert list(done.shifts) == ["a", "b", "c"]
    for node in layers(graph):
        assert np.array_equal(done.shifts[node.name], bias_of(done.graph[node.name].op) - bias_of(node.op))
    assert dict(done.failed) == {"a": 0.0, "b": 0.0}
    assert min(low["a"].min(), low["b"].min()) > 1
    np.testing.assert_allclose(done.shifts["b"], graph["b"].op.weight @ low["a"] - low["b"])
    np.testing.assert_allclose(eq.forward(done.graph, x), eq.forward(graph, x), rtol=1e-12)
    # what is left of the ranges begins at 0
    np.testing.assert_allclose(eq.calibrate(done.graph, x)["b"].min, 0, atol=1e-12)


CONSTANT = np.array([2.0, 2.0])
DENSE, BARE = eq.Dense(np.eye(2), 3 * np.ones(2)), eq.Dense(np.eye(2))
CONV, WIDE = eq.Conv(np.ones((2, 2, 1)), 3 * np.ones(2)), np.ones((1, 2, 3))
PLAIN = eq.Graph.chain((2,), a=DENSE, act=eq.ReLU(), b=BARE)


def over_space(**behind):
    return eq.Graph.chain((2, 3), a=CONV, act=eq.ReLU(), **behind)


def flat(**nodes):
    return eq.Graph.chain((2,), **nodes)


def plain_and(*nodes, outputs=("b",)):
    return eq.Graph({"x": (2,)}, (*PLAIN.nodes, *nodes), outputs)


LEFT = {
    "padded reader": (over_space(b=eq.Conv(WIDE, padding=1)), "'b' behind the activation is no Dense and no Conv without padding"),
    "one-sided padding": (over_space(b=eq.Conv(WIDE, padding=((0, 1),))), "'b' behind the activation is no Dense and no Conv without"),
    "transposed reader": (over_space(b=eq.ConvTranspose(WIDE)), "'b' behind the activation is no Dense"),
    "pool between": (over_space(pool=eq.MaxPool(2), b=eq.Conv(np.ones((1, 2, 1)))), "'pool' behind the activation is no Dense"),
    "output": (plain_and(outputs=["b", "a"]), "'a' is a network output"),
    "activation is an output": (plain_and(outputs=["b", "act"]), "'act' is a network output"),
    "two readers": (plain_and(eq.Node("c", BARE, ["a"])), "'a' has 2 readers"),
    "two readers of the activation": (plain_and(eq.Node("c", eq.ReLU(), ["act"])), "'act' has 2 readers"),
    "dead end": (eq.Graph({"x": (2,)}, [eq.Node("a", DENSE, ["x"]), eq.Node("b", BARE, ["x"])], ["b"]), "'a' has 0 readers"),
    "leaky": (flat(a=DENSE, act=eq.LeakyReLU(0.1), b=BARE), "'act' behind it is no ReLU and no Clip from 0"),
    "clip from below 0": (flat(a=DENSE, act=eq.Clip(-1, 6), b=BARE), "'act' behind it is no ReLU and no Clip from 0"),
    "no activation": (flat(a=DENSE, b=BARE, c=eq.ReLU()), "'b' behind it is no ReLU"),
    "shared": (flat(a=DENSE, act=eq.ReLU(), b=DENSE), "the weights of 'a' are used by 2 nodes"),
    "shared reader": (flat(a=DENSE, act=eq.ReLU(), b=BARE, c=BARE), "the weights of 'b' are used by 2 nodes"),
    "BatchNorm": (flat(a=Maker(0).batchnorm(2), act=eq.ReLU(), b=BARE), "it is not made by a layer with a bias"),
}


@pytest.mark.parametrize(("graph", "reason"), LEFT.values(), ids=LEFT)
def test_what_cannot_be_absorbed_is_left_and_the_reason_is_said(graph, reason):
    done = eq.absorb_high_bias(graph, {"a": CONSTANT}, np.ones((1, *graph.inputs["x"])))
    assert all(after.op is before.op for before, after in zip(graph, done.graph, strict=True))
    assert list(done.left) == ["a"]
    assert reason in done.left["a"]
    assert done.message == f"absorbed biases of 0 layers; left as they are: 'a' ({done.left['a']})"
    assert not done.shifts and not done.failed


def test_names_without_a_high_bias_are_not_worth_a_word_but_unknown_ones_are():
    done = eq.absorb_high_bias(PLAIN, {"a": -CONSTANT, "act": 0 * CONSTANT, "nobody": CONSTANT})
    assert dict(done.left) == {"nobody": "it is no value of the network"}
    assert done.graph["a"].op is PLAIN["a"].op


def test_without_data_absorption_says_that_it_does_not_know():
    done = eq.absorb_high_bias(PLAIN, {"a": CONSTANT})
    assert done.message == "absorbed biases of 1 layers, not exactly: no data was given to say how often values lie below what was absorbed"
    assert not done.failed


def test_lower_bounds_of_another_size_or_not_numbers_are_refused():
    for wrong in (np.ones(3), np.array([1.0, np.nan]), np.array([1.0, np.inf])):
        with pytest.raises(ValueError, match="the lower bound of value 'a' must be 2 numbers, one a channel, got"):
            eq.absorb_high_bias(PLAIN, {"a": wrong})


# ------------------------------------------------------------------------------------------------ planted mistakes


def mean_law():
    setting = SETTINGS["W3A8 and outputs"]
    leaves_no_mean_error(*prepared(lambda m: straightened(handmade.mobile(m)), setting), setting)


def test_the_wrong_sign_is_caught(caught):
    right = correction._shifted
    for law in (mean_law, exact_on_linear_chains):
        caught(law, correction, "_shifted", lambda q, node, shift, bounded: right(q, node, -shift, bounded))


def test_means_that_count_what_is_cut_off_are_caught(caught):
    def of_all(values, behind, expected):
        return channel_means(expected) - channel_means(values[0])

    caught(lambda: test_shifts_before_a_relu_are_what_images_left_out_confirm(handmade.plain), correction, "_shift", of_all)


def test_images_that_speak_for_themselves_are_caught(caught):
    caught(test_a_shift_behind_an_activation_by_hand, correction, "_of_others", lambda a: a.sum(axis=0) + 0 * a)


def test_shifts_that_are_made_though_they_add_noise_are_caught(caught):
    def law():
        for build in handmade.NETS:
            makes_nothing_noisier(*prepared(build, SETTINGS["W3A8 and outputs"]))

    caught(law, correction, "_noise", lambda value, expected: np.zeros(value.shape[1]))


def test_the_quantized_mean_as_the_truth_is_caught(caught):
    right = eq.correct_bias

    def of_the_quantized(graph, q, x):
        with pytest.MonkeyPatch.context() as planting:  # it is refused otherwise
            planting.setattr(correction, "quantized_node", lambda graph: None)
            return right(q, q, x)

    caught(mean_law, eq, "correct_bias", of_the_quantized)


def test_forgetting_that_earlier_layers_are_corrected_is_caught(caught):
    def at_once(graph, q, x):
        errors = mean_errors(graph, q, x)
        ops = {node.name: replace(node.op, bias=node.op.bias - errors[node.name]) for node in layers(q)}
        return eq.Correction(q.with_ops(ops), {}, "")

    caught(mean_law, eq, "correct_bias", at_once)


def test_forgetting_the_bias_grid_is_caught(caught):
    law = test_biases_stay_on_the_grid_of_their_accumulator_only_if_they_were
    caught(law, correction, "rounded_bias", lambda q, node, op: (op, 0))


def test_rounded_weights_instead_of_their_change_are_caught(caught):
    right = eq.correct_bias_analytically

    def of_the_weights(graph, q, gaussians):
        blank = graph.with_ops({node.name: replace(node.op, weight=0 * node.op.weight) for node in layers(graph)})
        with pytest.MonkeyPatch.context() as planting:  # it is refused otherwise
            planting.setattr(correction, "_check_rounded", lambda before, node: None)
            means = {name: (mean[0], mean[0]) for name, mean in correction._means(graph, gaussians).items()}
            return right(blank, q, {**gaussians, **means})

    caught(exact_on_linear_chains, eq, "correct_bias_analytically", of_the_weights)


def test_means_that_ignore_the_activation_are_caught(caught):
    caught(lambda: test_analytic_shifts_behind_an_activation_are_the_integral(*ACTIVATIONS["ReLU6"]),
           correction, "_activated_mean", lambda op, mean, deviation: mean)


@pytest.mark.parametrize("name", ["padded", "transposed"])
def test_counting_every_tap_at_every_pixel_is_caught(caught, name):
    def all_taps(graph, q, gaussians):
        before, after = graph["layer"].op, q["layer"].op
        change = (after.taps() - before.taps()).sum(axis=3)
        shift = -(change @ gaussians["x"][0].reshape(len(change), -1, 1)).reshape(-1)
        return eq.Correction(q.with_ops({"layer": replace(after, bias=bias_of(after) + shift)}), {}, "")

    caught(lambda: exact_on(*OVER_SPACE[name]), eq, "correct_bias_analytically", all_taps)


def test_a_constant_that_is_lost_instead_of_moved_is_caught(caught):
    right = correction._with_bias
    caught(changed_where_it_fails, correction, "_with_bias", lambda op, shift: right(op, np.minimum(shift, 0)))


def test_bounds_that_stay_are_caught(caught):
    def clip():
        test_absorption_is_exact_where_all_values_exceed_what_is_absorbed(eq.ReLU6())

    caught(clip, correction, "replace", lambda op, **changes: op if isinstance(op, eq.Clip) else replace(op, **changes))


def test_absorbing_into_padded_layers_changes_the_function():
    """Why they are left: the constant would be missing where the padding is."""
    graph, _ = LEFT["padded reader"]
    c, x = CONSTANT, np.zeros((1, 2, 3))
    moved = graph.with_ops({"a": replace(graph["a"].op, bias=graph["a"].op.bias - c),
                            "b": replace(graph["b"].op, bias=graph["b"].op.weight.sum(axis=2) @ c)})
    assert not np.allclose(eq.forward(moved, x), eq.forward(graph, x))
    assert np.allclose(eq.forward(moved, x)[..., 1], eq.forward(graph, x)[..., 1])


def test_a_mean_that_is_given_is_taken_as_it_is():
    """Also where the mean of what the op reads is given, too, and would make another one."""
    graph = eq.Graph.chain((2,), fc=eq.Dense(np.eye(2), np.ones(2)), act=eq.ReLU(), out=eq.Dense(np.ones((1, 2))))
    given = {"x": (np.zeros(2), np.ones(2)), "fc": (np.array([5.0, -3.0]), np.ones(2))}
    assert np.array_equal(correction._means(graph, given)["fc"], [[5.0, -3.0]])
