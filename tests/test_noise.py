"""Expected noise against injected noise, real quantizers and loops; sensitivities against Jacobians and loops."""

from __future__ import annotations

import dataclasses

import handmade
import numpy as np
import pytest
from nets import NETS
from scipy.integrate import quad
from scipy.special import expit
from scipy.stats import norm

import eqfact as eq
from eqfact.noise import (
    NoiseModel,
    Sensitivities,
    forward_sensitivities,
    gradient_sensitivities,
    noise_model,
    predict_noise,
    unit_sensitivities,
)
from eqfact.ops import Weighted
from eqfact.quantization import stored_values

W8, A8 = eq.UniformQuantizer(8), eq.UniformQuantizer(8, symmetric=False)
each_net = pytest.mark.parametrize("net", NETS, ids=str)


def smooth_net(seed=0):
    """Curves without kinks, so that a small step makes small noise; a depthwise and a grouped layer, a residual, two outputs."""
    m = handmade.Maker(seed)
    return eq.Graph({"x": (2, 4, 4)}, [
        eq.Node("conv", m.conv(4, 2, 3, 3, padding=1), ["x"]), eq.Node("curve", eq.Tanh(), ["conv"]),
        eq.Node("depth", m.conv(4, 1, 2, 2, groups=4), ["curve"]), eq.Node("mix", m.conv(4, 2, 1, 1, groups=2), ["depth"]),
        eq.Node("add", eq.Add(), ["mix", "depth"]), eq.Node("gate", eq.Sigmoid(), ["add"]), eq.Node("pool", eq.GlobalAvgPool(), ["gate"]),
        eq.Node("flat", eq.Flatten(), ["pool"]), eq.Node("fc", m.dense(3, 4), ["flat"]), eq.Node("other", m.conv(1, 4, 1, 1), ["add"]),
    ], ["fc", "other"])


def data_of(graph, batch=6, seed=1):
    rng = np.random.default_rng(seed)
    arrays = {name: rng.normal(size=(batch, *shape)) for name, shape in graph.inputs.items()}
    return arrays if len(arrays) > 1 else next(iter(arrays.values()))


def outputs_of(graph, x):
    env = eq.values(graph, x)
    return np.concatenate([env[name].reshape(len(env[name]), -1) for name in graph.outputs], axis=1)


# ---------------------------------------------------------------------------------------------------- injected noise


def with_noise_at(graph, value, noise):
    """The network with an Add of a constant behind a value, for every reader and output: noise is the same at all entries' own place."""

    @dataclasses.dataclass(frozen=True, eq=False)
    class Inject(eq.Identity):
        def forward(self, x):
            return x + noise

    nodes = []
    for node in graph.nodes:
        nodes.append(dataclasses.replace(node, inputs=tuple("noisy" if i == value else i for i in node.inputs)))
        if node.name == value:
            nodes.append(eq.Node("noisy", Inject(), [value]))
    if value in graph.inputs:
        nodes.insert(0, eq.Node("noisy", Inject(), [value]))
    return eq.Graph(dict(graph.inputs), nodes, ["noisy" if name == value else name for name in graph.outputs])


def test_expected_noise_is_the_mean_of_injected_noise_tensor_by_tensor():
    graph = smooth_net()
    x = data_of(graph, 4)
    stats = eq.calibrate(graph, x)
    weights, activations = eq.UniformQuantizer(14), eq.UniformQuantizer(14, symmetric=False)
    model = noise_model(graph, stats, weights=weights, activations=activations,
                        sensitivities=gradient_sensitivities(graph, [x], projections=250))
    clean, rng = outputs_of(graph, x), np.random.default_rng(3)
    assert set(model.terms()) == {f"{n.name}.weight" for n in graph.nodes if isinstance(n.op, Weighted)} | set(stored_values(graph))
    for name, expected in model.terms().items():
        measured = []
        for _ in range(250):
            if name.endswith(".weight"):
                node = graph[name.removesuffix(".weight")]
                step = 2 * np.abs(node.op.weight).max() / (2 * (2**13 - 1))
                noisy = dataclasses.replace(node.op, weight=node.op.weight + rng.uniform(-step / 2, step / 2, node.op.weight.shape))
                moved = with_op(graph, node, noisy)
            else:
                low, high = min(stats[name].min.min(), 0), max(stats[name].max.max(), 0)
                step = (high - low) / (2**14 - 1)
                moved = with_noise_at(graph, name, rng.uniform(-step / 2, step / 2, (len(clean), *graph.shapes[name])))
            measured.append(np.square(outputs_of(moved, x) - clean).sum(axis=1).mean())
        assert np.mean(measured) == pytest.approx(expected, rel=0.2), name


@pytest.mark.parametrize("bits", [10, 16])
@pytest.mark.parametrize("setting", ["weights", "activations", "both", "per channel"])
def test_expected_noise_is_that_of_real_quantization(bits, setting):
    """Within the scatter: rounding errors of the last weights show in eight outputs only, whatever the number of images."""
    found = []
    for seed in range(8):
        normal = np.random.default_rng(seed).normal
        graph = eq.Graph.chain((8, 2), conv=eq.Conv(normal(size=(24, 8, 1)) / 3), act=eq.Tanh(), flat=eq.Flatten(),
                               fc=eq.Dense(normal(size=(32, 48)) / 7), curve=eq.Sigmoid(), out=eq.Dense(normal(size=(8, 32)) / 6))
        x = data_of(graph, 30)
        stats = eq.calibrate(graph, x)
        weights = eq.UniformQuantizer(bits, granularity="per_channel" if setting == "per channel" else "per_tensor")
        options = {"weights": None if setting == "activations" else weights,
                   "activations": None if setting in ("weights", "per channel") else eq.UniformQuantizer(bits, symmetric=False)}
        model = noise_model(graph, stats, sensitivities=gradient_sensitivities(graph, [x]), **options)
        noise = outputs_of(eq.quantize(graph, stats=stats, biases=False, **options), x) - outputs_of(graph, x)
        found.append(np.square(noise).sum(axis=1).mean() / sum(model.terms().values()))
    assert min(found) > 1 / 6
    assert max(found) < 6
    assert np.mean(found) == pytest.approx(1, abs=0.5)


def test_a_bit_less_is_six_decibels():
    graph = smooth_net()
    x = data_of(graph)
    s, stats = gradient_sensitivities(graph, [x]), eq.calibrate(graph, x)
    found = [noise_model(graph, stats, weights=None, activations=eq.UniformQuantizer(bits, symmetric=False), sensitivities=s).sqnr()
             for bits in (8, 9)]
    assert found[1] - found[0] == pytest.approx(20 * np.log10(511 / 255), rel=1e-12)


# ----------------------------------------------------------------------------------------------------- sensitivities


def with_op(graph, node, op):
    return eq.Graph(dict(graph.inputs), [dataclasses.replace(n, op=op) if n is node else n for n in graph.nodes], graph.outputs)


def squared_jacobian(graph, x):
    """Per image, summed over outputs: squared derivatives by every weight and every entry of every value, by central differences."""
    step = 1e-5
    of_weights, of_values = {}, {}
    for node in graph.nodes:
        if isinstance(node.op, Weighted):
            squared = np.zeros(node.op.weight.shape)
            for index in np.argwhere(node.op.weight).tolist():
                moved = (step * unit(squared.shape, tuple(index)) * sign + node.op.weight for sign in (1, -1))
                up, down = (outputs_of(with_op(graph, node, dataclasses.replace(node.op, weight=weight)), x) for weight in moved)
                squared[tuple(index)] = np.square((up - down) / (2 * step)).sum(axis=1).mean()
            of_weights[node.name] = squared
    env = eq.values(graph, x)
    for value, shape in graph.shapes.items():
        squared = np.zeros(shape)
        for index in np.ndindex(*shape):
            up, down = (outputs_of(with_noise_at(graph, value, sign * step * unit(shape, index)), x) for sign in (1, -1))
            live = env[value][(slice(None), *index)] != 0
            squared[index] = (np.square((up - down) / (2 * step)).sum(axis=1) * live).mean()
        of_values[value] = squared
    return of_weights, of_values


def unit(shape, index):
    array = np.zeros(shape)
    array[index] = 1
    return array


def one_output():
    """Some weights and some activations are 0; a single output, so that a projection is exact: v is +1 or -1."""
    m = handmade.Maker(4)
    graph = eq.Graph.chain((2, 3), conv=m.conv(3, 2, 2), act=eq.ReLU(), depth=m.conv(3, 1, 2, groups=3), curve=eq.Tanh(), flat=eq.Flatten(),
                           fc=m.dense(1, 3))
    weight = graph["conv"].op.weight.copy()
    weight[0, 1] = 0
    nodes = [dataclasses.replace(n, op=dataclasses.replace(n.op, weight=weight)) if n.name == "conv" else n for n in graph.nodes]
    return eq.Graph(dict(graph.inputs), nodes, graph.outputs)


def test_gradient_sensitivities_are_the_squared_jacobian():
    graph = one_output()
    x = data_of(graph, 5)
    assert (eq.values(graph, x)["act"] == 0).any()
    s = gradient_sensitivities(graph, [x[:2], x[2:]], projections=1)
    of_weights, of_values = squared_jacobian(graph, x)
    for name, squared in of_weights.items():
        op = graph[name].op
        groups, out, inner, _ = op.taps().shape
        assert s.weights[name] == pytest.approx(squared.reshape(groups, out, inner, -1).sum(axis=3), rel=1e-5, abs=1e-9)
    for value, squared in of_values.items():
        assert s.activations[value] == pytest.approx(squared.reshape(len(squared), -1).sum(axis=1), rel=1e-5, abs=1e-9)
    assert s.signal == pytest.approx(np.square(eq.forward(graph, x)).sum() / 5)
    assert s.weights["conv"][0, 0, 1] == 0


def test_random_projections_add_up_the_outputs_on_average():
    graph = smooth_net()
    x = data_of(graph, 2)
    s = gradient_sensitivities(graph, [x], projections=800)
    of_weights, of_values = squared_jacobian(graph, x)
    for name, squared in of_weights.items():
        assert s.weights[name].sum() == pytest.approx(squared.sum(), rel=0.15), name
    for value, squared in of_values.items():
        assert s.activations[value].sum() == pytest.approx(squared.sum(), rel=0.15), value


def test_with_means_only_what_varies_counts():
    w = np.array([[2.0, 3.0]])
    graph = eq.Graph.chain((2,), fc=eq.Dense(w))
    x = np.array([[1.0, 5.0], [3.0, 5.0]])
    s = gradient_sensitivities(graph, [x], projections=1, means=eq.calibrate(graph, x))
    assert s.weights["fc"] == pytest.approx(np.array([[[1.0, 0.0]]]))  # the variance of what is read
    assert gradient_sensitivities(graph, [x], projections=1).weights["fc"] == pytest.approx(np.array([[[5.0, 25.0]]]))  # mean squares


def test_gradient_sensitivities_repeat_bit_for_bit_and_say_what_they_lack():
    graph = smooth_net()
    x = data_of(graph)
    one, other = (gradient_sensitivities(graph, [x], seed=7) for _ in range(2))
    assert all(one.weights[n].tobytes() == other.weights[n].tobytes() for n in one.weights)
    split = gradient_sensitivities(graph, [x[:1], x[1:]], seed=7)
    assert all(np.array_equal(one.activations[n], split.activations[n]) for n in one.activations)
    with pytest.raises(ValueError, match="projections must be at least 1, got 0"):
        gradient_sensitivities(graph, [x], projections=0)
    with pytest.raises(ValueError, match="at least one image, got none"):
        gradient_sensitivities(graph, [])


def test_gradient_sensitivities_take_one_batch_as_calibration_does():
    graph = smooth_net()
    x = data_of(graph)
    listed = gradient_sensitivities(graph, [x])
    for one in (x, dict.fromkeys(graph.inputs, x)):
        s = gradient_sensitivities(graph, one)
        assert s.signal == listed.signal
        assert all(np.array_equal(s.weights[n], of) for n, of in listed.weights.items())
        assert all(np.array_equal(s.activations[n], of) for n, of in listed.activations.items())
    a, b = np.ones((2, 1)), np.ones((3, 1))
    two = eq.Graph({"a": (1,), "b": (1,)}, [eq.Node("y", eq.Add(), ["a", "b"])], ["y"])
    with pytest.raises(ValueError, match=r"inputs must have equal batch sizes, got \{'a': 2, 'b': 3\}"):
        gradient_sensitivities(two, {"a": a, "b": b})
    with pytest.raises(TypeError, match=r"the network has inputs \['a', 'b'\]: give a dict of arrays by name"):
        gradient_sensitivities(two, a)


def test_forward_sensitivities_pass_attention_as_gradients_do():
    """Tokens that have nothing to do with each other: noise adds up as if independent, in values and keys over all that look at them."""
    rng = np.random.default_rng(3)
    layers = {name: eq.Conv(rng.normal(size=(8, 8, 1)) / 8**0.5) for name in ("q", "k", "v")}
    graph = eq.Graph({"x": (8, 24)}, [
        *(eq.Node(name, op, ["x"]) for name, op in layers.items()), eq.Node("scores", eq.Scores(2), ["q", "k"]),
        eq.Node("p", eq.Softmax(-1), ["scores"]), eq.Node("y", eq.Mix(2), ["p", "v"])], ["y"])
    x = rng.normal(size=(24, 8, 24))
    followed, exact = forward_sensitivities(graph, eq.calibrate(graph, x)), gradient_sensitivities(graph, x)
    for value in ("q", "k", "v", "scores", "p"):
        ratio = followed.activations[value].sum() / followed.signal / (exact.activations[value].sum() / exact.signal)
        assert 0.4 < ratio < 2.5, (value, ratio)


def test_forward_sensitivities_need_statistics_of_this_graph():
    m = handmade.Maker(2)
    graph, other = handmade.plain(m), handmade.mobile(m)
    with pytest.raises(ValueError, match="the statistics lack value 'act': calibrate this graph"):
        forward_sensitivities(other, eq.calibrate(graph, m.data(graph)))


def paths(graph, value, channel, ends):
    """What one unit of noise power in one channel is at the outputs: summed over all ways there, each the product of its squared slopes."""
    total = ends[value] if value in graph.outputs else 0.0
    for node in graph.nodes:
        if value not in node.inputs:
            continue
        made = graph.shapes[node.name]
        if isinstance(node.op, Weighted):
            groups, out, inner, _ = (taps := node.op.taps()).shape
            squares = {g * out + o: np.square(taps[g, o, channel - g * inner]).sum() for g, o in np.ndindex(groups, out)
                       if 0 <= channel - g * inner < inner}
        else:  # linear: what a single entry makes, entry by entry
            squares = dict.fromkeys(range(made[0]), 0.0)
            for pixel in np.ndindex(*graph.shapes[value][1:]):
                marked = [np.zeros((1, *graph.shapes[i])) for i in node.inputs]
                for x in (x for x, i in zip(marked, node.inputs, strict=True) if i == value):
                    x[(0, channel, *pixel)] = 1
                for o, entries in enumerate(node.op.forward(*marked)[0]):
                    squares[o] += np.square(entries).sum() / np.prod(made[1:])
        total += sum(square * paths(graph, node.name, o, ends) for o, square in squares.items())
    return total


#: Layers and what only adds and moves: where slopes are the same everywhere.
BENT = (eq.ops.Blocking, eq.Max, eq.MaxPool, eq.Pad, eq.Mul, eq.Scores, eq.Mix, eq.ops.Normalization, eq.Sloped)
LINEAR = [net for net in NETS if not any(getattr(n.op, "activation", False) or isinstance(n.op, BENT) for n in net.graph)]


@pytest.mark.parametrize("net", LINEAR, ids=str)
def test_forward_sensitivities_follow_noise_on_all_ways_to_the_outputs(net):
    graph, x = net.graph, net.data(3)
    power = {value: np.square(array).mean(axis=(0, *range(2, array.ndim))) for value, array in eq.values(graph, x).items()}
    signal = sum(np.square(eq.values(graph, x)[name]).mean(axis=0).sum() for name in graph.outputs)
    ends = {name: np.prod(graph.shapes[name][1:]) / signal for name in graph.outputs}
    s = forward_sensitivities(graph, eq.calibrate(graph, x))
    for value, shape in graph.shapes.items():
        expected = [paths(graph, value, c, ends) for c in range(shape[0])]
        assert s.activations[value] == pytest.approx(expected), value
    for node in graph.nodes:
        if isinstance(node.op, Weighted):
            groups, out, inner, _ = (taps := node.op.taps()).shape
            for g, o, i in np.ndindex(groups, out, inner):
                weight = np.count_nonzero(taps[g, o, i]) * power[node.inputs[0]][g * inner + i] * paths(graph, node.name, g * out + o, ends)
                assert s.weights[node.name][g, o, i] == pytest.approx(weight)
    assert s.signal == 1


@pytest.mark.parametrize("net", NETS, ids=str)
def test_forward_sensitivities_are_of_the_size_of_gradients(net):
    """A measure more than a prediction: every tensor's share of the noise within three orders of magnitude."""
    graph, x = net.graph, net.data(8)
    stats = eq.calibrate(graph, x)
    quantizers = {"weights": eq.UniformQuantizer(8), "activations": eq.UniformQuantizer(8, symmetric=False)}
    expected = noise_model(graph, stats, sensitivities=gradient_sensitivities(graph, [x]), **quantizers)
    found = noise_model(graph, stats, sensitivities=forward_sensitivities(graph, stats), **quantizers)
    for name, noise in expected.terms().items():
        assert 1e-3 < found.terms()[name] / found.signal / (noise / expected.signal) < 1e3, name


def test_enough_networks_are_linear():
    assert len(LINEAR) >= 15


@pytest.mark.parametrize(("op", "gain"), [
    (eq.ReLU(), [0.0, 0.5, 1.0]), (eq.Clip(-0.5, 30.0), [0.0, norm.sf(-0.5), 1.0]), (eq.LeakyReLU(0.5), [0.25, 0.625, 1.0]),
    (eq.Identity(), [1.0, 1.0, 1.0]), (eq.Tanh(), [quad(lambda x, m=m: norm.pdf(x - m) / np.cosh(x) ** 4, -30, 30)[0] for m in (-9, 0, 9)]),
    (eq.Sigmoid(), [quad(lambda x, m=m: norm.pdf(x - m) * (expit(x) * expit(-x)) ** 2, -30, 30)[0] for m in (-9, 0, 9)]),
], ids=str)
def test_activations_pass_noise_as_they_are_steep_where_their_channel_lies(op, gain):
    """Channels of unit deviation around -9, 0 and 9; against integrals over the normal distribution."""
    graph = eq.Graph.chain((3,), act=op, out=eq.Dense(np.eye(3)))
    x = np.random.default_rng(0).normal(size=(4000, 3))
    x = (x - x.mean(axis=0)) / x.std(axis=0) + [-9, 0, 9]
    s = forward_sensitivities(graph, eq.calibrate(graph, x))
    assert s.activations["x"] / s.activations["act"] == pytest.approx(gain, rel=0.12, abs=1e-6)


@pytest.mark.parametrize("op", [eq.ReLU(), eq.Softmax(), eq.Sigmoid(), eq.Clip(-np.inf, 1.0)], ids=str)
@pytest.mark.parametrize("smaller", [1e-8, 1e-20, 1e-100, 1e-155, 1e-170, 1e-300])
def test_a_nearly_dead_channel_changes_no_prediction_and_no_optimum(op, smaller):
    """Nobody reads more of it than of the others: it must not count for more, and its square may be too small for a float."""
    rng = np.random.default_rng(3)
    weight, out = rng.normal(size=(5, 4)), rng.normal(size=(3, 5))
    weight[2] *= smaller
    bias = np.array([0.0, 0.0, max(np.log(smaller), -700.0), 0.0, 0.0]) * isinstance(op, eq.Softmax)  # as small behind a softmax
    x = np.abs(rng.normal(size=(50, 4)))
    sizes = []
    for alive in (slice(None), [0, 1, 3, 4]):  # with it, and without
        net = eq.Graph.chain((4,), fc=eq.Dense(weight[alive], bias[alive]), act=op, mid=eq.Dense(np.eye(len(weight[alive]))),
                             act2=eq.ReLU(), out=eq.Dense(out[:, alive]))
        found = eq.calibrate(net, x)
        s = forward_sensitivities(net, found)
        assert all(np.isfinite(v).all() for v in (*s.weights.values(), *s.activations.values()))
        result = eq.equalize(net, "optimal", stats=found, weights=W8, activations=A8)
        assert result.success
        model = noise_model(net, found, weights=W8, activations=A8, sensitivities=s)
        sizes.append((model.sqnr(), model.sqnr(result.factorization)))
        quantized = eq.quantize(result.graph, weights=W8, activations=A8, stats=result.factorization.apply(found))
        measured = eq.sqnr(eq.forward(net, x), eq.forward(quantized, x))
        assert model.sqnr(result.factorization) == pytest.approx(measured, abs=10)
    if not isinstance(op, eq.Softmax):  # whose logits range the wider for it, and are rounded to larger steps
        assert sizes[0] == pytest.approx(sizes[1], abs=3)  # the noise of a channel more


def test_channels_spread_over_all_magnitudes_make_no_warnings_and_finite_sensitivities():
    for dtype, spread in (("float32", 15), ("float32", 30), ("float64", 30), ("float64", 140)):
        rng = np.random.default_rng(5)
        sizes = 10.0 ** rng.uniform(-spread, spread, 6)
        first, second = rng.normal(size=(6, 3)) * sizes[:, None], rng.normal(size=(2, 6)) / sizes
        net = eq.Graph.chain((3,), a=eq.Dense(first.astype(dtype)), act=eq.ReLU(), b=eq.Dense(second.astype(dtype)))
        x = rng.normal(size=(9, 3)).astype(dtype)
        s = forward_sensitivities(net, eq.calibrate(net, x))
        even = eq.Graph.chain((3,), a=eq.Dense(first / sizes[:, None]), act=eq.ReLU(), b=eq.Dense(second * sizes))
        expected = forward_sensitivities(even, eq.calibrate(even, x.astype(np.float64)))
        relative = s.activations["act"] * sizes**2 / expected.activations["act"]
        assert relative == pytest.approx(1, rel=1e-3)


def test_unit_sensitivities_count_every_entry_once():
    graph = smooth_net()
    s = unit_sensitivities(graph)
    assert s.weights["depth"].shape == (4, 1, 1)
    assert all((array == 1).all() for array in (*s.weights.values(), *s.activations.values()))


# --------------------------------------------------------------------------------------------------------- the model


@each_net
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_a_factorization_moves_the_model_as_it_moves_the_network(net, granularity):
    """Predicted for a factorization, or for the network it makes: the sensitivities are rescaled with it."""
    graph, x = net.graph, net.data(3)
    options = {"weights": eq.UniformQuantizer(8, granularity=granularity), "activations": A8}
    model = noise_model(graph, eq.calibrate(graph, x), sensitivities=gradient_sensitivities(graph, [x], projections=1), **options)
    rng = np.random.default_rng(5)
    channels = model.channels
    moved = eq.Factorization(channels, np.exp2(np.append(0.0, rng.integers(-3, 4, channels.degrees_of_freedom))))
    after = moved.apply(graph)
    other = noise_model(after, eq.calibrate(after, x), sensitivities=gradient_sensitivities(after, [x], projections=1), **options)
    assert model.terms(moved) == pytest.approx(other.terms(), rel=1e-6)
    assert model.sqnr(moved) == pytest.approx(other.sqnr())
    assert model.by_label(moved)[0] == 1


def test_terms_are_in_decibels_and_add_up():
    graph = smooth_net()
    x = data_of(graph)
    stats, s = eq.calibrate(graph, x), gradient_sensitivities(graph, [x])
    noise = predict_noise(graph, stats, weights=W8, activations=A8, sensitivities=s)
    model = noise_model(graph, stats, weights=W8, activations=A8, sensitivities=s)
    assert set(noise) == set(model.terms())
    assert -10 * np.log10(sum(10 ** (db / 10) for db in noise.values())) == pytest.approx(model.sqnr())


def test_ranges_and_steps_are_those_of_the_quantizers():
    graph = eq.Graph.chain((1,), fc=eq.Dense(np.array([[3.0], [-1.0]])))
    s, stats = unit_sensitivities(graph), eq.calibrate(graph, np.array([[2.0], [5.0]]))

    def noise(name, **options):
        return noise_model(graph, stats, **{"weights": None, "activations": None, "sensitivities": s} | options).terms()[name]

    assert noise("fc.weight", weights=W8) == pytest.approx((3 / 127) ** 2 / 12 * 2)
    assert noise("fc.weight", weights=eq.UniformQuantizer(4)) == pytest.approx((3 / 7) ** 2 / 12 * 2)
    assert noise("fc.weight", weights=A8) == pytest.approx((4 / 255) ** 2 / 12 * 2)  # from -1 to 3
    assert noise("fc.weight", weights=eq.UniformQuantizer(8, granularity="per_channel")) == pytest.approx((9 + 1) / 127**2 / 12)
    assert noise("x", activations=A8) == pytest.approx((5 / 255) ** 2 / 12)  # 0 is on every grid


def test_a_shared_layer_is_one_tensor():
    (net,) = [net for net in NETS if net.name == "conv used twice"]
    x = net.data(3)
    s = gradient_sensitivities(net.graph, [x], projections=1)
    model = noise_model(net.graph, None, weights=W8, activations=None, sensitivities=s)
    assert list(model.terms()) == ["stem.weight", "first.weight", "head.weight"]
    (shared,) = [t for t in model.tensors if t.name == "first.weight"]
    assert shared.sensitivity == pytest.approx(s.weights["first"] + s.weights["second"])


def test_what_makes_no_noise_is_left_out():
    graph = smooth_net()
    x = data_of(graph)
    nothing = noise_model(graph, eq.calibrate(graph, x), weights=W8, activations=A8, sensitivities=Sensitivities({}, {}, 1.0))
    assert isinstance(nothing, NoiseModel)
    assert nothing.terms() == {}
    assert nothing.sqnr() == np.inf
    zero = eq.Graph.chain((1,), fc=eq.Dense(np.zeros((2, 1))))
    assert noise_model(zero, None, weights=W8, activations=None, sensitivities=unit_sensitivities(zero)).terms() == {}


def test_a_layer_that_no_output_depends_on_makes_no_noise():
    rng = np.random.default_rng(3)
    a, y, dead = (eq.Conv(rng.normal(size=(6, 3, 3)), groups=2, padding=1) for _ in range(3))
    layers = [eq.Node(name, op, [read]) for name, op, read in (("a", a, "x"), ("y", y, "a"), ("dead", dead, "a"), ("y again", y, "dead"))]
    x, models = rng.normal(size=(4, 6, 5)), []
    for nodes in (layers, layers[:2]):
        graph = eq.Graph({"x": (6, 5)}, nodes, ["y"])
        models.append(noise_model(graph, None, weights=W8, activations=None, sensitivities=eq.gradient_sensitivities(graph, x)))
    assert models[0].terms() == models[1].terms() and set(models[0].terms()) == {"a.weight", "y.weight"}


def test_what_the_model_cannot_say_is_refused():
    graph = smooth_net()
    s = unit_sensitivities(graph)
    with pytest.raises(ValueError, match="not 'per_group'"):
        noise_model(graph, None, weights=eq.UniformQuantizer(8, granularity="per_group", group_size=2), activations=None, sensitivities=s)
    with pytest.raises(ValueError, match="needs their ranges: give stats=calibrate"):
        noise_model(graph, None, weights=None, activations=A8, sensitivities=s)


@pytest.mark.parametrize("call", [
    eq.noise_model, eq.predict_noise, lambda net, stats, weights, **_: eq.equalize(net, stats=stats, weights=weights)])
def test_what_is_no_quantizer_is_refused(call):
    m = handmade.Maker(31)
    net = handmade.plain(m)
    stats = eq.calibrate(net, m.data(net))
    given = {"weights": 8, "activations": None, "sensitivities": eq.forward_sensitivities(net, stats)}
    with pytest.raises(TypeError, match=r"weights must be a quantizer or None \(float\), got 8: give for instance UniformQuantizer"):
        call(net, stats, **given)


def test_outputs_make_noise_only_where_they_are_to_be_rounded():
    """As :func:`eqfact.quantize`, which leaves them in float unless told otherwise."""
    net, x = smooth_net(), data_of(smooth_net())
    stats = eq.calibrate(net, x)
    given = {"weights": None, "activations": A8, "sensitivities": unit_sensitivities(net)}
    silent, loud = (set(noise_model(net, stats, **given, **options).terms()) for options in ({}, {"outputs": True}))
    assert loud - silent == {"fc", "other"}
    assert silent == set(stored_values(net)) == loud - set(net.outputs)
    assert "fc.float" not in eq.quantize(net, activations=A8, stats=stats).shapes


def test_relative_sensitivities_do_not_depend_on_how_large_an_output_is():
    """Each output counts relative to its own power: one that is a thousand times larger weighs no more; the signal is their number."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(6, 4))

    def net(scale):
        return eq.Graph({"x": (4,)}, [
            eq.Node("a", eq.Dense(np.random.default_rng(1).normal(size=(5, 4))), ["x"]), eq.Node("r", eq.ReLU(), ["a"]),
            eq.Node("y", eq.Dense(np.random.default_rng(2).normal(size=(3, 5))), ["r"]),
            eq.Node("z", eq.Dense(scale * np.random.default_rng(4).normal(size=(2, 5))), ["r"])], ["y", "z"])
    found = [eq.gradient_sensitivities(g, x, relative_to=eq.calibrate(g, x)) for g in (net(1.0), net(1000.0))]
    np.testing.assert_allclose(found[0].weights["a"], found[1].weights["a"])
    np.testing.assert_allclose(found[0].activations["r"], found[1].activations["r"])
    np.testing.assert_allclose([f.signal for f in found], 2)
    plain = [eq.gradient_sensitivities(g, x).weights["a"] for g in (net(1.0), net(1000.0))]
    assert (plain[1] > 1000 * plain[0]).any()
