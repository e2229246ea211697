"""Training: the network trained is the quantized one, gradients are those of the formulas, and all of it is the same to the bit."""

from __future__ import annotations

import dataclasses
import io
import itertools

import numpy as np
import pytest

import eqfact as eq
from eqfact import training
from eqfact.ops.grid import Grid
from eqfact.quantization import stored_values
from eqfact.quantizers import FakeQuantize
from eqfact.training import Training, TrainingState, mean_loss, shuffled, train

RNG = np.random.default_rng(5)
W4, A4 = eq.UniformQuantizer(4), eq.UniformQuantizer(4, symmetric=False)
QUANTIZERS = {
    "W4A4": (W4, A4), "weights alone": (W4, None), "activations alone": (None, A4),
    "per channel": (eq.UniformQuantizer(4, granularity="per_channel"), eq.UniformQuantizer(4, symmetric=False, granularity="per_channel")),
    "affine weights, symmetric activations": (eq.UniformQuantizer(4, symmetric=False), eq.UniformQuantizer(4)),
    "per group": (eq.UniformQuantizer(4, granularity="per_group", group_size=2), A4),
}
every_quantizer = pytest.mark.parametrize(("weights", "activations"), QUANTIZERS.values(), ids=QUANTIZERS)


def normal(*shape):
    return RNG.normal(size=shape)


def network(dtype=np.float64, spread=1.0):
    """Convolutions, a residual addition, one op at two nodes, ReLU6 and a layer without a bias; rows that differ by ``spread``."""
    rows = np.exp2(spread * RNG.uniform(-2, 0, size=(4, 1, 1, 1)))
    shared = eq.Conv((normal(4, 4, 1, 1) / 2).astype(dtype), (normal(4) / 4).astype(dtype))
    return eq.Graph({"x": (2, 4, 4)}, [
        eq.Node("stem", eq.Conv((rows * normal(4, 2, 3, 3)).astype(dtype), normal(4).astype(dtype), padding=1), ["x"]),
        eq.Node("act", eq.Clip(0, 3), ["stem"]),
        eq.Node("a", shared, ["act"]), eq.Node("relu", eq.ReLU(), ["a"]),
        eq.Node("b", shared, ["relu"]), eq.Node("add", eq.Add(), ["act", "b"]),
        eq.Node("pool", eq.GlobalAvgPool(), ["add"]), eq.Node("flat", eq.Flatten(), ["pool"]),
        eq.Node("fc", eq.Dense(normal(3, 4).astype(dtype)), ["flat"])], ["fc"])


NET = network()
X = normal(24, 2, 4, 4)
STATS = eq.calibrate(NET, X)
LABELS = RNG.integers(0, 3, 24)
BATCHES = [X[:8], X[8:16], X[16:]]
BITS = {"weights": W4, "activations": A4, "stats": STATS}


def trained(graph=NET, batches=BATCHES, **options) -> Training:
    return train(graph, batches, **(BITS | {"steps": 5} | options))


def weighted(graph):
    return {node.name: node.op for node in graph if isinstance(node.op, eq.Weighted)}


def same(a: Training, b: Training) -> bool:
    arrays = [t.state.arrays() for t in (a, b)]
    return (set(arrays[0]) == set(arrays[1]) and all(np.array_equal(arrays[0][k], arrays[1][k]) for k in arrays[0])
            and np.array_equal(a.losses, b.losses) and np.array_equal(eq.forward(a.graph, X), eq.forward(b.graph, X)))


# ------------------------------------------------------------------------------------------------ gradients of grids

GRIDS = {"signed": eq.UniformQuantizer(3).grid([-1.0], [1.0]), "affine": eq.UniformQuantizer(3, symmetric=False).grid([-0.6], [1.0]),
         "from zero": eq.UniformQuantizer(3, symmetric=False).grid([0.0], [1.4]),
         "up to zero": eq.UniformQuantizer(3, symmetric=False).grid([-1.4], [0.0])}
NUMBERS = np.linspace(-2.1, 2.13, 400)[:, None]


def scalar_slopes(x: float, grid: Grid) -> tuple[float, float, float]:
    """``dy/dx, dy/dscale, dy/dzero_point`` of one number, case by case, as in LSQ and LSQ+."""
    s, z = float(grid.scale[0]), float(grid.zero_point[0])
    r = x / s + z
    if r < grid.qmin - 0.5 * (z > grid.qmin):
        return 0.0, grid.qmin - z, -s
    if r > grid.qmax + 0.5 * (z < grid.qmax):
        return 0.0, grid.qmax - z, -s
    return 1.0, min(max(round(r), grid.qmin), grid.qmax) - r, 0.0


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_gradients_of_fake_quantization_are_those_of_the_scalar_formulas(grid):
    cotangent, op = normal(*NUMBERS.shape), FakeQuantize(grid)
    slopes = np.array([scalar_slopes(float(x), grid) for x in NUMBERS[:, 0]])
    assert np.array_equal(op.vjp(cotangent, NUMBERS)[0], cotangent * slopes[:, :1])
    for got, column in zip(op.grid_vjp(cotangent, NUMBERS), slopes.T[1:], strict=True):
        assert got.shape == grid.scale.shape
        np.testing.assert_allclose(got, cotangent[:, 0] @ column, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ndim", [2, 4])
def test_gradients_of_a_grid_by_channel_are_those_of_each_channel(ndim):
    quantizer = eq.UniformQuantizer(3, symmetric=False)
    low, high = np.array([-1.0, 0.0, -0.3]), np.array([0.5, 2.0, 0.1])
    x, g = (normal(*(20, 3, 2, 2)[:ndim]) for _ in range(2))
    op = FakeQuantize(quantizer.grid(low, high))
    for c in range(3):
        alone = FakeQuantize(quantizer.grid(low[c:c + 1], high[c:c + 1]))
        assert np.array_equal(op.vjp(g, x)[0][:, c:c + 1], alone.vjp(g[:, c:c + 1], x[:, c:c + 1])[0])
        for all_, one in zip(op.grid_vjp(g, x), alone.grid_vjp(g[:, c:c + 1], x[:, c:c + 1]), strict=True):
            assert all_[c] == pytest.approx(one[0])


def test_the_largest_weight_is_inside_and_what_a_relu_cuts_off_is_not():
    for seed in range(20):
        w = np.random.default_rng(seed).normal(size=(5, 7)).astype(np.float32)
        assert W4.weight_grid(eq.Dense(w)).astype(np.float32).inside(w).all()
    assert A4.grid(0.0, 1.0).inside(np.array([-1e-9, 0.0, 0.5, 1.0])).tolist() == [False, True, True, True]


def frozen(x, low, high, quantizer, at):
    """Fake quantization with what rounding added at the range ``at`` held constant: smooth in the range, entry by entry."""
    def parts(low, high):
        if quantizer.symmetric:
            return max(abs(low), abs(high)) / quantizer.qmax, 0.0
        s = (high - low) / (quantizer.qmax - quantizer.qmin)
        return s, quantizer.qmin - low / s
    s0, z0 = parts(*at)
    z_off = round(z0) - z0
    r0 = x / s0 + z0 + z_off
    x_off = np.rint(r0) - r0
    s, z = parts(low, high)
    z += z_off
    return s * (np.clip(x / s + z + x_off, quantizer.qmin, quantizer.qmax) - z)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 6])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.3, 1.7), (-1.9, 0.2)])
def test_gradients_of_ranges_are_differences_of_the_formula_with_its_roundings_held(low, high, bits, symmetric):
    quantizer = eq.UniformQuantizer(bits, symmetric=symmetric)
    if symmetric:
        low = -high
    grid, rng = quantizer.grid([low], [high]), np.random.default_rng(bits)
    s, z, h = float(grid.scale[0]), float(grid.zero_point[0]), 1e-6
    x = rng.uniform(1.4 * low, 1.4 * high, size=50)
    r = x / s + z
    x = x[(np.abs(r - grid.qmin) > 0.501) & (np.abs(r - grid.qmax) > 0.501)]  # not what becomes an end, where the formula has its kink
    g = rng.normal(size=x.shape)
    by_low, by_high = quantizer.range_vjp(np.array([low]), np.array([high]), *grid.vjp(g, x))
    moves = ((by_high - by_low, (-h, h)),) if symmetric else ((by_low, (h, 0)), (by_high, (0, h)))
    for got, (dl, dh) in moves:
        up, down = (frozen(x, low + t * dl, high + t * dh, quantizer, (low, high)) for t in (1, -1))
        assert float(got[0]) == pytest.approx(float(g @ (up - down)) / (2 * h), rel=1e-4, abs=1e-4 * (1 + np.abs(g).sum()))


def test_ends_at_zero_stay_there():
    quantizer = eq.UniformQuantizer(4, symmetric=False)
    by_low, by_high = quantizer.range_vjp(np.array([0.0, -2.0]), np.array([1.0, 0.0]), np.ones(2), np.ones(2))
    assert by_low[0] == 0 and by_high[1] == 0 and by_high[0] != 0 and by_low[1] != 0
    # the zero point is an end then, whatever the other end, and the scale a fifteenth of that
    for inner in (0.0, 0.5):
        by_low, by_high = quantizer.range_vjp(np.array([inner, -2.0]), np.array([3.0, -inner]), np.ones(2), np.full(2, 5.0))
        assert by_low == pytest.approx([0, -1 / 15]) and by_high == pytest.approx([1 / 15, 0])


# ------------------------------------------------------------------------------------------------ gradients of the network

def directional(state, direction, loss):
    h = 0.03  # units are small in 16 bits
    moved = [{name: p + t * h * direction[name] for name, p in state.items()} for t in (1, -1)]
    return (loss(moved[0]) - loss(moved[1])) / (2 * h)


@pytest.mark.parametrize("loss", training.LOSSES)
@every_quantizer
def test_without_rounding_gradients_are_those_of_the_float_network(weights, activations, loss, monkeypatch):
    """With 16 bits and ranges that nothing leaves, the straight-through gradient is nearly that of the float network's loss."""
    fine = [q and dataclasses.replace(q, bits=16) for q in (weights, activations)]
    target = NET.with_ops({"fc": eq.Dense(1.3 * NET["fc"].op.weight)})
    model = training._Model(NET, STATS, fine[0], fine[1], "weights", False)
    model.ranges = {name: (1.1 * low, 1.1 * high) for name, (low, high) in model.ranges.items()}
    p = {name: RNG.normal(size=a.shape) for name, a in model.initial().parameters.items()}
    monkeypatch.setattr(training, "forward", lambda graph, x: eq.forward(target, x))
    _, gradients = model.gradients(p, X, LABELS, loss)

    def value(p):
        outputs = {"fc": eq.forward(model.at(p)[0], X)}
        return training._loss(loss, NET, X, outputs, LABELS)[0]
    for name in p:
        direction = {n: RNG.normal(size=a.shape) * (n == name) for n, a in p.items()}
        expected = directional(p, direction, value)
        got = float((gradients[name] * direction[name]).sum())
        assert got == pytest.approx(expected, rel=2e-2, abs=1e-8 + 2e-2 * float(np.sqrt((gradients[name] ** 2).sum())))


def test_a_weight_that_saturates_gets_no_gradient_and_others_do():
    op = eq.Dense(np.array([[0.25, 3.0, -0.5]]))
    net = eq.Graph.chain((3,), fc=op)
    x = np.array([[1.0, 2.0, 3.0]])
    model = training._Model(net, eq.calibrate(net, x), W4, None, "weights", True)
    model.ranges["fc.weight"] = (np.array([[-1.0]]), np.array([[1.0]]))
    _, gradients = model.gradients(model.initial().parameters, x, None, "squared_error")
    assert (gradients["fc.weight"] != 0).tolist() == [[True, False, True]]
    # by hand: y = s (2, 7, -4) . x with s = 1/7, t = 4.75
    y, t = (2 * 1 + 7 * 2 - 4 * 3) / 7, 0.25 + 6 - 1.5
    cotangent = 2 * (y - t) / t**2
    np.testing.assert_allclose(gradients["fc.weight"], [[cotangent * 3 / 7, 0, 3 * cotangent * 3 / 7]])
    residual = np.array([2 - 0.25 * 7, 7, -4 + 0.5 * 7])
    np.testing.assert_allclose(gradients["fc.weight.range"], [[[cotangent * residual @ x[0] / 7 / 7]]])


@every_quantizer
def test_every_rounding_is_of_a_stored_value(weights, activations):
    """Whether an activation behind a layer is gone, or a Clip between rounded bounds."""
    if activations is not None:
        for high in (1.0, 9.0):  # below Clip's bound, and above it
            ranges = {"act": (0.0, high)}
            q = eq.quantize(NET, stats=STATS, weights=weights, activations=activations, ranges=ranges)
            assert sorted(training._values_rounded(NET, q).values()) == sorted(stored_values(NET))


def test_gradients_of_a_shared_op_are_the_sum_over_its_nodes():
    twin = NET.with_ops({"b": dataclasses.replace(NET["b"].op)})
    x = X[:4]
    shared, apart = (training._Model(g, STATS, W4, A4, "weights", False) for g in (NET, twin))
    both, one = (m.gradients(m.initial().parameters, x, None, "squared_error")[1] for m in (shared, apart))
    assert set(one) - set(both) == {"b.weight", "b.bias"}
    np.testing.assert_allclose(both["a.weight"], one["a.weight"] + one["b.weight"], rtol=1e-12)
    for name in ("a", "b"):  # each twin's own unit
        one[f"{name}.bias"] = one[f"{name}.bias"] / apart.unit[f"{name}.bias"]
    np.testing.assert_allclose(both["a.bias"] / shared.unit["a.bias"], one["a.bias"] + one["b.bias"], rtol=1e-12)


# ------------------------------------------------------------------------------------------------ the optimizer

def test_adam_is_kingma_and_bas_algorithm_by_hand():
    gradients = [np.array([0.5, -2.0, 0.0]), np.array([-1.0, 0.25, 0.0])]
    state = TrainingState(0, {"p": np.ones(3)}, {"p": np.zeros(3)}, {"p": np.zeros(3)}, np.zeros(0))
    p, m, v = [1.0] * 3, [0.0] * 3, [0.0] * 3
    for t, g in enumerate(gradients, start=1):
        state = training._adam(state, {"p": g}, 0.1, 0.0)
        for i in range(3):
            m[i] = 0.9 * m[i] + 0.1 * float(g[i])
            v[i] = 0.999 * v[i] + 0.001 * float(g[i]) ** 2
            p[i] -= 0.1 * (m[i] / (1 - 0.9**t)) / ((v[i] / (1 - 0.999**t)) ** 0.5 + 1e-8)
        np.testing.assert_allclose(state.parameters["p"], p, rtol=1e-13)
    assert state.step == 2


def test_a_first_step_moves_everything_by_the_learning_rate_in_its_unit():
    result = trained(steps=1, learning_rate=0.01, parameters="weights", ranges=True, schedule="constant")
    for p in result.state.parameters.values():
        moved = np.abs(p[p != 0])
        assert (moved <= 0.01 * (1 + 1e-9)).all() and np.median(moved) == pytest.approx(0.01, rel=1e-3)
    weight, before = result.masters["stem"].op.weight, NET["stem"].op.weight
    unit = np.abs(before).reshape(4, -1).max(axis=1) / 7
    np.testing.assert_allclose(np.abs(weight - before).reshape(4, -1).max(axis=1), 0.01 * unit, rtol=1e-3)
    bias = np.sqrt(np.maximum(*(STATS[name].mean_square for name in ("a", "b")))) / 7
    np.testing.assert_allclose(np.abs(result.masters["a"].op.bias - NET["a"].op.bias), 0.01 * bias, rtol=1e-3)


def test_schedules_scale_the_steps():
    seen = []
    trained(steps=4, schedule=lambda done: seen.append(done) or 1.0)
    assert seen == [0, 0.25, 0.5, 0.75]
    assert [training.SCHEDULES["cosine"](t) for t in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.5, 0])
    assert same(trained(schedule=lambda done: 1.0), trained(schedule="constant"))
    assert not same(trained(schedule="cosine"), trained(schedule="constant"))


@pytest.mark.parametrize("exponent", [-3, 2])
def test_factors_that_are_powers_of_two_change_no_bit_of_the_training_per_channel(exponent):
    """Units scale as the factors do. Per-channel weights alone: there, what is quantized is equivalent, too."""
    rng = np.random.default_rng(0)
    net = eq.Graph.chain((3,), fc1=eq.Dense(rng.normal(size=(4, 3)), rng.normal(size=4)), act=eq.ReLU(),
                         fc2=eq.Dense(rng.normal(size=(2, 4))))
    x = rng.normal(size=(16, 3))
    stats = eq.calibrate(net, x)
    f = np.full(4, 2.0**exponent)
    factorization = eq.Factorization.of(net, {"act": f, "fc1": f})
    options = {"weights": eq.UniformQuantizer(4, granularity="per_channel"), "activations": None, "steps": 6, "parameters": "weights"}
    one = train(net, [x], stats=stats, **options)
    other = train(factorization.apply(net), [x], stats=factorization.apply(stats), **options)
    for name, p in one.state.parameters.items():
        np.testing.assert_allclose(other.state.parameters[name], p, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(other.losses, one.losses, rtol=1e-9)


# ------------------------------------------------------------------------------------------------ laws of training

@pytest.mark.parametrize("options", [{}, {"parameters": "weights", "ranges": True}], ids=["biases", "all"])
@every_quantizer
def test_what_is_returned_is_quantize_of_masters_and_ranges(weights, activations, options):
    result = trained(weights=weights, activations=activations, **options)
    expected = eq.quantize(result.masters, weights=weights, activations=activations, ranges=result.ranges)
    assert [n.name for n in result.graph] == [n.name for n in expected]
    assert np.array_equal(eq.forward(result.graph, X), eq.forward(expected, X))
    assert len(result.losses) == result.state.step == 5


@every_quantizer
def test_training_starts_at_what_quantize_returns(weights, activations):
    before = eq.quantize(NET, stats=STATS if activations else None, weights=weights, activations=activations)
    result = trained(weights=weights, activations=activations, steps=1, stop=0, parameters="weights", ranges=True)
    assert np.array_equal(eq.forward(result.graph, X), eq.forward(before, X))
    first = trained(weights=weights, activations=activations, steps=1).losses[0]
    error, truth = eq.forward(before, X[:8]) - eq.forward(NET, X[:8]), eq.forward(NET, X[:8])
    assert first == pytest.approx((error**2).sum() / (truth**2).sum())


@pytest.mark.parametrize("options", [{}, {"parameters": "weights", "ranges": True},
                                     {"loss": "cross_entropy", "parameters": "weights"}], ids=["biases", "all", "labels"])
def test_resumed_is_uninterrupted_to_the_bit(options):
    def fresh():
        return shuffled(X, LABELS, size=8, seed=3) if "loss" in options else shuffled(X, size=8, seed=3)
    whole = trained(batches=fresh(), steps=7, **options)
    part = trained(batches=fresh(), steps=7, stop=3, **options)
    stream = io.BytesIO()
    np.savez(stream, **part.state.arrays())
    stream.seek(0)
    with np.load(stream, allow_pickle=False) as arrays:
        state = TrainingState.of(arrays)
    assert part.state.step == 3 and np.array_equal(part.losses, whole.losses[:3])
    assert same(trained(batches=fresh(), steps=7, state=state, **options), whole)


def test_the_same_seed_gives_the_same_bits_and_another_gives_others():
    one, again, other = (trained(batches=shuffled(X, size=8, seed=seed)) for seed in (1, 1, 2))
    assert same(one, again) and not same(one, other)


def test_training_biases_leaves_weights_to_the_bit():
    result = trained()
    before = eq.quantize(NET, stats=STATS, weights=W4, activations=A4)
    for name, op in weighted(result.graph).items():
        assert np.array_equal(op.weight, before[name].op.weight)
        assert np.array_equal(result.masters[name.removesuffix(".float")].op.weight, NET[name.removesuffix(".float")].op.weight)
    assert not np.array_equal(result.masters["stem"].op.bias, NET["stem"].op.bias)
    assert result.masters["fc"].op.bias is not None  # it had none


def test_shared_ops_stay_one():
    result = trained(parameters="weights", ranges=True)
    assert result.masters["a"].op is result.masters["b"].op


def test_biases_of_the_result_lie_on_the_grid_of_their_sums():
    result = trained(parameters="weights", ranges=True)
    for node in result.graph:
        if isinstance(node.op, eq.Weighted) and node.op.grid is not None:
            s_x = next(n for n in result.graph if n.name == node.inputs[0]) if node.inputs[0] in {n.name for n in result.graph} else None
            if s_x is not None and isinstance(s_x.op, FakeQuantize):
                steps = node.op.bias / (s_x.op.grid.scale * node.op.grid.scale.reshape(-1))
                np.testing.assert_allclose(steps, np.rint(steps), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"parameters": "weights"}, {"parameters": "weights", "ranges": True}, {"ranges": True}],
                         ids=["biases", "weights", "weights and ranges", "biases and ranges"])
@pytest.mark.parametrize("loss", training.LOSSES)
def test_training_lowers_its_loss(options, loss):
    batches = [(X, LABELS)]
    result = trained(batches=batches, steps=40, loss=loss, learning_rate=0.05, **options)
    before = mean_loss(NET, eq.quantize(NET, stats=STATS, weights=W4, activations=A4), batches, loss=loss)
    assert mean_loss(NET, result.graph, batches, loss=loss) < 0.95 * before


def test_batches_that_can_be_iterated_again_are_repeated():
    again = [BATCHES[i % 3] for i in range(5)]
    assert same(trained(), trained(batches=again)) and same(trained(), trained(batches=iter(again)))


def test_shuffled_takes_every_sample_equally_often():
    batches = list(itertools.islice(shuffled(np.arange(6.0), np.arange(6), size=4, seed=1), 6))
    assert all(np.array_equal(x, labels) and len(x) == 4 for x, labels in batches)
    assert np.bincount(np.concatenate([labels for _, labels in batches])).tolist() == [4] * 6
    by_name = next(shuffled({"a": np.arange(6.0), "b": np.arange(6.0)}, size=3))
    assert np.array_equal(by_name["a"], by_name["b"])


def test_progress_is_told_of_every_step():
    seen = []
    result = trained(progress=lambda step, loss: seen.append((step, loss)))
    assert seen == [(i + 1, loss) for i, loss in enumerate(result.losses)]


def test_batchnorms_that_are_left_are_computed_in_float_and_not_trained():
    one = np.ones(3)
    net = eq.Graph.chain((3,), bn=eq.BatchNorm(2 * one, one, one, one), fc=eq.Dense(normal(2, 3)))
    x = normal(8, 3)
    result = train(net, x, stats=eq.calibrate(net, x), weights=W4, activations=A4, steps=2, parameters="weights")
    assert result.masters["bn"].op is net["bn"].op and set(result.state.parameters) == {"fc.weight", "fc.bias"}


def test_dead_channels_stay_dead_and_nothing_is_divided_by_zero():
    weight = np.array([[0.0, 0.0], [1.0, -0.3]])
    net = eq.Graph.chain((2,), fc=eq.Dense(weight), act=eq.ReLU(), out=eq.Dense(normal(2, 2)))
    x = normal(8, 2)
    with np.errstate(all="raise"):
        result = train(net, x, stats=eq.calibrate(net, x), weights=W4, activations=A4, steps=4, parameters="weights", ranges=True)
    assert not result.masters["fc"].op.weight[0].any() and result.masters["fc"].op.bias[0] == 0


def test_a_value_may_be_called_as_weights_are():
    nodes = [eq.Node("a", eq.Dense(normal(4, 2)), ["x"]), eq.Node("a.weight", eq.ReLU(), ["a"]),
             eq.Node("b", eq.Dense(normal(2, 4)), ["a.weight"])]
    plain = [nodes[0], eq.Node("act", eq.ReLU(), ["a"]), eq.Node("b", nodes[2].op, ["act"])]
    x, results = normal(8, 2), []
    for of in (nodes, plain):
        net = eq.Graph({"x": (2,)}, of, ["b"])
        results.append(train(net, x, stats=eq.calibrate(net, x), weights=W4, activations=A4, steps=3, parameters="weights", ranges=True))
    assert set(results[0].ranges) == {"x", "a.weight", "a.weight_1", "b.weight"}
    assert np.array_equal(*(eq.forward(r.graph, x) for r in results))


def test_several_outputs_count_alike():
    nodes = [eq.Node("a", eq.Dense(normal(2, 2)), ["x"]), eq.Node("b", eq.Dense(1000 * normal(2, 2)), ["a"])]
    net = eq.Graph({"x": (2,)}, nodes, ["a", "b"])
    x = normal(8, 2)
    result = train(net, x, stats=eq.calibrate(net, x), weights=W4, activations=None, steps=1)
    truth, made = eq.forward(net, x), eq.forward(eq.quantize(net, weights=W4), x)
    assert result.losses[0] == pytest.approx(np.mean([((made[n] - truth[n]) ** 2).sum() / (truth[n] ** 2).sum() for n in "ab"]))


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_the_result_runs_in_integer_kernels_entry_by_entry(granularity, tmp_path):
    pytest.importorskip("onnxruntime")
    import onnx_models as small

    import eqfact.onnx
    rng = np.random.default_rng(1)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((6, 2, 3, 3), (6,), (6, 1, 3, 3), (6,), (3, 6), (3,))]
    net = eq.Graph.chain((2, 6, 6), conv=eq.Conv(*arrays[:2]), act=eq.Clip(0, 3), dw=eq.Conv(*arrays[2:4], groups=6, padding=1),
                         relu=eq.ReLU(), pool=eq.GlobalAvgPool(), flat=eq.Flatten(), fc=eq.Dense(*arrays[4:]))
    x = rng.normal(size=(32, 2, 6, 6)).astype(np.float32)
    weights = eq.UniformQuantizer(7, granularity=granularity)  # exact on every processor
    result = train(net, x, stats=eq.calibrate(net, x[:16]), weights=weights, activations=eq.UniformQuantizer(8, symmetric=False), steps=10,
                   learning_rate=0.3, parameters="weights", ranges=True, outputs=True)
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", result.graph)
    np.testing.assert_array_equal(small.run_ort(tmp_path / "net.onnx", {"x": x})["fc"], eq.forward(result.graph, x))


# ------------------------------------------------------------------------------------------------ refusals

@pytest.mark.parametrize(("options", "said"), [
    ({"parameters": "gamma"}, r"parameters must be one of \('biases', 'weights'\), got 'gamma'"),
    ({"loss": "hinge"}, r"loss must be one of \('squared_error', 'cross_entropy'\), got 'hinge'"),
    ({"schedule": "linear"}, "schedule must be one of .* got 'linear'"),
    ({"learning_rate": 0.0}, "learning_rate must be positive and finite, got 0.0"),
    ({"learning_rate": float("nan")}, "learning_rate must be positive"),
    ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
    ({"steps": 2.0}, "steps must be an integer"),
    ({"batches": iter(BATCHES)}, "the batches end after 3 of 5 steps: give more, or a list"),
    ({"batches": []}, "the batches end after 0 of 5 steps"),
    ({"loss": "cross_entropy"}, "cross_entropy needs labels: give batches"),
    ({"loss": "cross_entropy", "batches": [(X, LABELS[:3])]}, "labels must be whole numbers from 0 to 2, one for each of 24 samples, got"),
    ({"loss": "cross_entropy", "batches": [(X, LABELS + 1)]}, "from 1 to 3"),
    ({"loss": "cross_entropy", "batches": [(X, LABELS * 1.0)]}, "got float64"),
    ({"weights": 4}, "weights must be a quantizer"),
    ({"stats": eq.calibrate(eq.Graph.chain((2,), act=eq.ReLU()), np.ones((1, 2)))}, "statistics"),
    ({"graph": eq.quantize(NET, weights=W4)}, "node 'stem': the network is quantized already: train from the float network"),
])
def test_what_does_not_fit_is_refused(options, said):
    with pytest.raises((ValueError, TypeError), match=said):
        trained(**options)


def test_cross_entropy_is_of_one_output_of_logits():
    net = eq.Graph({"x": (2,)}, [eq.Node("a", eq.Dense(np.eye(2)), ["x"]), eq.Node("b", eq.Dense(np.eye(2)), ["a"])], ["a", "b"])
    with pytest.raises(ValueError, match=r"cross_entropy needs one output \(N, classes\), got a \(1, 2\), b \(1, 2\)"):
        train(net, [(np.ones((1, 2)), [0])], stats=eq.calibrate(net, np.ones((1, 2))), weights=W4, activations=None, steps=1,
              loss="cross_entropy")


def test_states_of_other_trainings_are_refused():
    state = trained().state
    with pytest.raises(ValueError, match=r"the state is of another training: 'a.weight' has shape None there and"):
        trained(state=state, parameters="weights")
    with pytest.raises(ValueError, match="the state has 5 steps behind it, more than the 3 to do"):
        trained(state=state, steps=3)
    with pytest.raises(ValueError, match=r"the same names in parameters/, mean/ and mean_square/, got losses"):
        TrainingState.of({"losses": np.zeros(0)})
    arrays = state.arrays()
    for name, wrong in (("losses", arrays["losses"][:4]), ("mean/fc.bias", np.zeros(4))):
        with pytest.raises(ValueError, match="arrays of the same shapes in parameters/, mean/ and mean_square/, and one loss a step"):
            TrainingState.of(arrays | {name: wrong})


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"step 1: the loss is nan; give a learning_rate below 0\.1"):
        original = training._loss
        with pytest.MonkeyPatch.context() as patch:
            calls = itertools.count()
            patch.setattr(training, "_loss", lambda *a: (np.nan, original(*a)[1]) if next(calls) else original(*a))
            trained()


def test_bad_batches_and_labels_of_shuffled_are_refused():
    with pytest.raises(ValueError, match=r"labels must be one a sample, \(24,\), got shape \(3,\)"):
        next(shuffled(X, np.arange(3)))
    with pytest.raises(ValueError, match="got size 0 and 24 samples"):
        next(shuffled(X, size=0))
    with pytest.raises(ValueError, match="at least one batch"):
        mean_loss(NET, NET, [])


# ------------------------------------------------------------------------------------------------ planted mistakes

def no_gradient_inside(self, cotangent, x):
    """PACT: the ends alone, without what rounding does inside."""
    outside = ~self.inside(x)
    by_scale = (cotangent * outside * self.fake_quantize(x) / self.scale).sum().reshape(self.scale.shape)
    return by_scale, (-self.scale * (cotangent * outside).sum()).reshape(self.scale.shape)


PLANTED = {
    "everything passes": ((Grid, "inside", lambda self, x: np.ones(x.shape, bool)),
                          lambda: test_gradients_of_fake_quantization_are_those_of_the_scalar_formulas(GRIDS["signed"])),
    "no gradient of the range inside": ((Grid, "vjp", no_gradient_inside),
                                        lambda: test_gradients_of_fake_quantization_are_those_of_the_scalar_formulas(GRIDS["signed"])),
    "ends change places": ((eq.UniformQuantizer, "range_vjp", lambda self, *a, right=eq.UniformQuantizer.range_vjp: right(self, *a)[::-1]),
                           lambda: test_gradients_of_ranges_are_differences_of_the_formula_with_its_roundings_held(-0.3, 1.7, 4, False)),
    "no bias correction in Adam": ((training, "BETAS", (0.0, 0.999)), test_adam_is_kingma_and_bas_algorithm_by_hand),
    "batches start anew": ((itertools, "islice", lambda it, start, stop=None, right=itertools.islice:
                            right(it, start) if stop is None else right(it, 0, stop - start)),
                           lambda: test_resumed_is_uninterrupted_to_the_bit({})),
    "all weights in one unit": ((training, "_steps", lambda q: 1), test_a_first_step_moves_everything_by_the_learning_rate_in_its_unit),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_mistakes_are_found(name, monkeypatch):
    (owner, attribute, wrong), law = PLANTED[name]
    monkeypatch.setattr(owner, attribute, wrong)
    with pytest.raises(AssertionError):
        law()
