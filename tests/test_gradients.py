"""The reverse walk is the derivative of the forward pass: against central differences, for every row of the op table."""

import numpy as np
import pytest
from cases import CASES

import eqfact as eq
from eqfact.ops import Weighted

STEP = 1e-6
DOUBLE = [case for case in CASES if case.dtype == np.float64]


def directional(function, x, direction):
    """Central difference along a direction."""
    return (function(x + STEP * direction) - function(x - STEP * direction)) / (2 * STEP)


@pytest.mark.parametrize("case", DOUBLE, ids=str)
def test_vjp_is_the_derivative_along_every_direction(case):
    rng, inputs = case.rng, case.inputs()
    v = rng.normal(size=case.op.forward(*inputs).shape)
    cotangents = case.op.vjp(v, *inputs)
    assert len(cotangents) == len(inputs)
    for i, (x, g) in enumerate(zip(inputs, cotangents, strict=True)):
        assert g.shape == x.shape
        direction = rng.normal(size=x.shape)

        def projected(moved, i=i):
            return float((v * case.op.forward(*inputs[:i], moved, *inputs[i + 1:])).sum())

        expected = directional(projected, x, direction)
        assert float((g * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("case", [case for case in DOUBLE if isinstance(case.op, Weighted)], ids=str)
def test_weight_vjp_is_the_derivative_by_the_weights(case):
    rng, (x,) = case.rng, case.inputs()
    v = rng.normal(size=case.op.forward(x).shape)
    gradient = case.op.weight_vjp(v, x)
    assert gradient.shape == case.op.weight.shape
    direction = rng.normal(size=gradient.shape)

    def projected(weight):
        return float((v * replaced(case.op, weight).forward(x)).sum())

    expected = directional(projected, case.op.weight, direction)
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def replaced(op, weight):
    from dataclasses import replace

    if isinstance(op, eq.BatchNorm):  # var = 1, eps = 0 makes gamma the slope
        return eq.BatchNorm(weight[:, 0], op.beta, op.mean, np.ones_like(op.var), eps=0.0)
    if isinstance(op, eq.ops.Normalization):
        return replace(op, gamma=weight[:, 0])
    return replace(op, weight=weight)


def residual_net():
    rng = np.random.default_rng(3)
    shared = eq.Conv(rng.normal(size=(4, 4, 3, 3)), rng.normal(size=4), padding=1)
    return eq.Graph({"x": (2, 5, 5)}, [
        eq.Node("stem", eq.Conv(rng.normal(size=(4, 2, 3, 3)), padding=1), ["x"]),
        eq.Node("act", eq.ReLU6(), ["stem"]),
        eq.Node("a", shared, ["act"]),
        eq.Node("s", eq.SiLU(), ["a"]),
        eq.Node("b", shared, ["s"]),
        eq.Node("add", eq.Add(), ["act", "b"]),
        eq.Node("cat", eq.Concat(), ["add", "a"]),
        eq.Node("pool", eq.MaxPool(2), ["cat"]),
        eq.Node("flat", eq.Flatten(), ["pool"]),
        eq.Node("fc", eq.Dense(rng.normal(size=(3, 32))), ["flat"])], ["fc", "add"])


def test_backward_is_the_derivative_of_the_network_by_its_input():
    net, rng = residual_net(), np.random.default_rng(0)
    x = rng.normal(size=(2, 2, 5, 5))
    v = {name: rng.normal(size=y.shape) for name, y in eq.forward(net, x).items()}
    g = eq.backward(net, x, v)
    direction = rng.normal(size=x.shape)

    def projected(moved):
        return sum(float((v[name] * y).sum()) for name, y in eq.forward(net, moved).items())

    assert float((g.values["x"] * direction).sum()) == pytest.approx(directional(projected, x, direction), rel=1e-6)


def test_backward_is_the_derivative_by_shared_weights():
    net, rng = residual_net(), np.random.default_rng(1)
    x = rng.normal(size=(2, 2, 5, 5))
    v = {name: rng.normal(size=y.shape) for name, y in eq.forward(net, x).items()}
    g = eq.backward(net, x, v)
    shared = net["a"].op
    direction = rng.normal(size=shared.weight.shape)

    def projected(weight):
        op = eq.Conv(weight, shared.bias, padding=1)
        return sum(float((v[name] * y).sum()) for name, y in eq.forward(net.with_ops({"a": op, "b": op}), x).items())

    expected = directional(projected, shared.weight, direction)
    assert float(((g.weights["a"] + g.weights["b"]) * direction).sum()) == pytest.approx(expected, rel=1e-6)


def test_backward_is_the_same_bit_for_bit_on_every_run():
    net, x = residual_net(), np.random.default_rng(2).normal(size=(3, 2, 5, 5))
    v = {name: np.ones_like(y) for name, y in eq.forward(net, x).items()}
    first, second = eq.backward(net, x, v), eq.backward(net, x, v)
    assert all(np.array_equal(first.values[name], second.values[name]) for name in first.values)
    assert all(np.array_equal(first.weights[name], second.weights[name]) for name in first.weights)


def test_a_cotangent_of_another_shape_is_refused():
    net = eq.Graph.chain((2,), fc=eq.Dense(np.eye(2)))
    with pytest.raises(ValueError, match=r"'fc' must have the output's shape \(1, 2\), got \(1, 3\)"):
        eq.backward(net, np.ones((1, 2)), np.ones((1, 3)))


def test_an_op_without_vjp_is_named():
    class Square(eq.ops.Blocking):
        def forward(self, *inputs):
            return inputs[0] ** 2

    net = eq.Graph.chain((2,), square=Square())
    with pytest.raises(TypeError, match="node 'square': Square has no vjp"):
        eq.backward(net, np.ones((1, 2)), np.ones((1, 2)))


@pytest.mark.parametrize("padding", [0, 1, 2, 5, ((0, 6), (4, 1))])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (1, 2), (2, 1), ((1, 2), 1)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_transposed_convolution_is_the_adjoint_whatever_the_padding(padding, stride, dilation, groups):
    rng = np.random.default_rng(0)
    weight, x = (rng.integers(-3, 4, s).astype(float) for s in ((4, 4 // groups, 3, 2), (2, 4, 7, 8)))  # small integers: no rounding
    op = eq.Conv(weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
    y = op.forward(x)
    cotangent = rng.integers(-3, 4, y.shape).astype(float)
    assert (op.vjp(cotangent, x)[0] * x).sum() == (cotangent * y).sum() == (op.weight_vjp(cotangent, x) * weight).sum()


@pytest.mark.parametrize("names", [["fc"], ["fc", "act"], ["fc", "x"], ["fc", "act", "extra"]])
def test_cotangents_must_name_the_outputs_all_of_them_and_nothing_else(names):
    net = eq.Graph({"x": (2,)}, [eq.Node("fc", eq.Dense(np.eye(2)), ["x"]), eq.Node("act", eq.ReLU(), ["fc"])], ["fc", "act"])
    cotangent = {name: np.ones((1, 2)) for name in names}
    if set(names) == {"fc", "act"}:
        assert set(eq.backward(net, np.ones((1, 2)), cotangent).values) == {"x", "fc", "act"}
        return
    with pytest.raises(ValueError, match=r"the cotangent must name the outputs \['fc', 'act'\], got "):
        eq.backward(net, np.ones((1, 2)), cotangent)


def test_one_array_is_no_cotangent_of_two_outputs():
    net = eq.Graph({"x": (2,)}, [eq.Node("fc", eq.Dense(np.eye(2)), ["x"]), eq.Node("act", eq.ReLU(), ["fc"])], ["fc", "act"])
    with pytest.raises(ValueError, match=r"the cotangent must name the outputs \['fc', 'act'\], got \['fc'\]"):
        eq.backward(net, np.ones((1, 2)), np.ones((1, 2)))


def test_a_mask_as_exporters_make_it_warns_of_nothing():
    """``(mask - 1) * 3.4e38`` is added to the scores: what little flows back to it may be too large for a number."""
    lowest = np.float32([np.finfo(np.float32).max])
    graph = eq.Graph({"x": (3, 4), "mask": (1, 4)}, (
        eq.Node("far", eq.BatchNorm(lowest, -lowest, 0 * lowest, 0 * lowest + 1, eps=0.0), ("mask",)),
        eq.Node("masked", eq.Add(), ("x", "far")), eq.Node("p", eq.Softmax(2), ("masked",))), ("p",))
    feeds = {"x": np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32), "mask": np.ones((2, 1, 4), np.float32)}
    with np.errstate(all="raise", under="ignore"):
        found = eq.backward(graph, feeds, 4 * np.ones((2, 3, 4), np.float32) * np.float32([1, 2, 3, 4]))
    assert np.isfinite(found.values["x"]).all() and not np.isfinite(found.values["mask"]).all()
