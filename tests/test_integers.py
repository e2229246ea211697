"""Whole numbers against two integer engines: onnxruntime's kernels, and a page written from docs/integers.md to add up in 32 bits."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import eqfact as eq
import eqfact.onnx
from eqfact.onnx.running import EXACT_SUMS, run
from eqfact.ops import Commuting
from eqfact.quantization import grid_of
from eqfact.testing.strategies import batches, networks

A8 = eq.UniformQuantizer(8, symmetric=False)
WEIGHTS = {f"{granularity}, {'symmetric' if symmetric else 'affine'}": eq.UniformQuantizer(8, granularity=granularity, symmetric=symmetric)
           for granularity in ("per_tensor", "per_channel") for symmetric in (True, False)}
each_quantizer = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)


# ------------------------------------------------------------------------------------------------ an integer engine


def by_channel(numbers, ndim):
    return np.asarray(numbers).reshape(-1, *(1,) * (ndim - 2))


def whole(x, grid, number):
    """``clip(round(x / s) + z, qmin, qmax)``"""
    scale, zero_point = (by_channel(v, np.ndim(x)) if np.size(v) > 1 else np.reshape(v, ()) for v in (grid.scale, grid.zero_point))
    return np.clip(np.rint(x / scale.astype(number)) + zero_point, grid.qmin, grid.qmax).astype(np.int64)


def int32(n):
    """What 32 bits hold of a whole number."""
    return n.astype(np.int64).astype(np.int32).astype(np.int64)


def integer_engine(quantized, feeds):
    """``{value: q}`` of every value that the engine keeps as whole numbers."""
    number = quantized.dtype.type
    floats, kept, grids, sums = dict(feeds), {}, {}, {}
    for node in quantized:
        op, source = node.op, node.inputs[0]
        if isinstance(op, eq.FakeQuantize):
            grid = op.grid
            if op.step is None:
                q = whole(floats[source], grid, number)
            else:
                n, step = sums[source]
                multiplier = by_channel(step.astype(number) / grid.scale.astype(number), n.ndim)
                q = np.clip(np.rint(n.astype(number) * multiplier) + by_channel(grid.zero_point, n.ndim), grid.qmin, grid.qmax)
            kept[node.name], grids[node.name] = q.astype(np.int64), grid
        elif source in kept and isinstance(op, eq.Weighted) and op.grid is not None and grids[source].scale.size == 1 \
                and op.grid.scale.size in (1, len(op.weight)):
            z_w = np.broadcast_to(op.grid.zero_point, op.weight.shape)
            q_w = np.rint(op.weight.astype(np.float64) / op.grid.scale + z_w)
            layer = dataclasses.replace(op, weight=q_w - z_w, bias=None, grid=None)
            n = layer.forward((kept[source] - int(grids[source].zero_point.item())).astype(np.float64))
            step = (number(grids[source].scale.item()) * op.grid.scale.astype(number).reshape(-1)).astype(np.float64)
            if op.bias is not None:
                n = n + int32(by_channel(np.rint(op.bias.astype(np.float64) / step), n.ndim))
            n = int32(n)
            sums[node.name] = n, step
            floats[node.name] = (n * by_channel(step, n.ndim)).astype(number)
            continue
        elif source in kept and isinstance(op, Commuting) and (op.moves or (op.bounds is not None and grid_of(quantized, node.name))):
            grid = grids[source]
            z = grid.zero_point.item() if grid.zero_point.size == 1 else by_channel(grid.zero_point, kept[source].ndim)
            if op.moves:
                q = op.forward((kept[source] - z).astype(np.float64)) + z
            else:
                low, high = (whole(np.asarray(b, number) if np.size(b) == 1 else by_channel(b, kept[source].ndim), grid, number)
                             for b in op.bounds)
                q = np.clip(kept[source], low, high)
            kept[node.name], grids[node.name] = q.astype(np.int64), grid
        else:
            floats[node.name] = op.forward(*(floats[i] for i in node.inputs))
            continue
        scale, zero_point = (by_channel(v, kept[node.name].ndim) for v in (grids[node.name].scale, grids[node.name].zero_point))
        floats[node.name] = (scale * (kept[node.name] - zero_point)).astype(number)
    return kept


def agrees_with_the_engine(quantized, x):
    """How many values were compared."""
    feeds = x if isinstance(x, dict) else {next(iter(quantized.inputs)): x}
    every, compared = eq.values(quantized, feeds), 0
    for name, q in integer_engine(quantized, {k: np.asarray(v, quantized.dtype) for k, v in feeds.items()}).items():
        grid, value = grid_of(quantized, name) or quantized[name].op.grid, every[name]
        ours = np.rint(value / by_channel(grid.scale, value.ndim)) + by_channel(grid.zero_point, value.ndim)
        assert np.array_equal(ours, q), (name, np.abs(ours - q).max())
        compared += 1
    return compared


def largest_sums(quantized):
    """``|q_b| + sum |q_w - z_w| max|q_x - z_x|`` of every layer whose sums are rounded as whole numbers, in Python integers."""
    for node in quantized:
        if isinstance(node.op, eq.FakeQuantize) and node.op.step is not None:
            op, read = quantized[node.inputs[0]].op, grid_of(quantized, quantized[node.inputs[0]].inputs[0])
            z_x, steps = int(read.zero_point.item()), np.broadcast_to(node.op.step, len(op.weight))
            reach = max(read.qmax - z_x, z_x - read.qmin)
            bias = np.zeros(len(op.weight)) if op.bias is None else op.bias.astype(np.float64)
            q_w = np.rint(op.weight.astype(np.float64) / op.grid.scale).reshape(len(op.weight), -1)
            yield from (round(abs(float(b) / float(s))) + sum(abs(int(q)) for q in row) * reach
                        for b, s, row in zip(bias, steps, q_w, strict=True))


# ------------------------------------------------------------------------------------------------ networks with uneven channels


def spoiled(name, weight, bias, rng):
    """A layer's weights and biases, some channels of which are out of all proportion."""
    w, b = weight.copy(), bias.copy()
    match name:
        case "tiny weights":
            w[0] *= 1e-6
            b[0] = 1.0
        case "tinier weights":
            w[:2] *= 1e-25
            b[:2] = [-3.0, 0.5]
        case "no weights":
            w[0], b[0] = 0, -0.3
            w[1], b[1] = 0, 0
        case "no weights at all":
            w[:] = 0
        case "tiny layer":
            w *= 1e-6
        case "huge biases":
            b *= 1e5
        case "tiny biases":
            b *= 1e-9
        case "everything":
            w *= 10 ** rng.uniform(-9, 1, (len(w), *(1,) * (w.ndim - 1)))
            b *= 10 ** rng.uniform(-6, 3, len(b))
    return w.astype(np.float32), b.astype(np.float32)


SPOILED = ["nothing", "tiny weights", "tinier weights", "no weights", "no weights at all", "tiny layer", "huge biases", "tiny biases",
           "everything"]
each_case = pytest.mark.parametrize("case", SPOILED)


def uneven(case, seed, dtype=np.float32):
    """Convolutions, plain and depthwise, and a Dense, each with spoiled channels, and data."""
    rng = np.random.default_rng(seed)

    def numbers(*shape):
        return spoiled(case, rng.normal(size=shape), rng.normal(size=shape[0]), rng)
    graph = eq.Graph.chain((3, 6), a=eq.Conv(*numbers(4, 3, 2)), r=eq.ReLU(), d=eq.Conv(*numbers(4, 1, 3), groups=4, padding=1),
                           s=eq.Clip(0.0, 6.0), f=eq.Flatten(), c=eq.Dense(*numbers(5, 20)), t=eq.ReLU(), y=eq.Dense(*numbers(3, 5)))
    graph = graph.with_ops({node.name: dataclasses.replace(node.op, weight=node.op.weight.astype(dtype), bias=node.op.bias.astype(dtype))
                            for node in graph if isinstance(node.op, eq.Weighted)})
    return graph, rng.normal(size=(40, 3, 6)).astype(dtype)


@each_case
@each_quantizer
def test_uneven_channels_store_an_engines_whole_numbers(case, weights, tmp_path):
    """In the engine above, and in onnxruntime's kernels: every stored value of 6 networks on data that saturates, too."""
    for seed in range(6):
        graph, x = uneven(case, seed)
        quantized = eq.quantize(graph, weights=weights, activations=A8, stats=eq.calibrate(graph, x), outputs=True)
        assert max(largest_sums(quantized)) < 2**31
        x = np.concatenate([x, 100 * x])
        assert agrees_with_the_engine(quantized, x) >= 6
        eqfact.onnx.save_qdq(tmp_path / "net.onnx", quantized)
        theirs = run(tmp_path / "net.onnx", {"x": x}, optimized=True, entries=EXACT_SUMS)["y"]
        scale = quantized["y"].op.grid.scale.item()
        assert np.array_equal(np.rint(theirs / scale), np.rint(eq.forward(quantized, x) / scale))


@each_case
def test_float64_networks_do_too(case):
    for seed, weights in itertools.product(range(3), WEIGHTS.values()):
        graph, x = uneven(case, seed, np.float64)
        quantized = eq.quantize(graph, weights=weights, activations=A8, stats=eq.calibrate(graph, x), outputs=True)
        assert max(largest_sums(quantized)) < 2**31
        assert agrees_with_the_engine(quantized, np.concatenate([x, 100 * x])) >= 6


@settings(max_examples=100)
@given(networks().flatmap(lambda g: st.tuples(st.just(g), batches(g))), st.sampled_from(list(WEIGHTS.values())),
       st.sampled_from([4, 8, 16]), st.sampled_from([4, 8, 16]))
def test_no_sum_of_a_random_network_leaves_32_bits(drawn, weights, bits_w, bits_x):
    graph, x = drawn
    graph = eq.fold_batchnorm(graph)
    quantized = eq.quantize(graph, weights=dataclasses.replace(weights, bits=bits_w), stats=eq.calibrate(graph, x), outputs=True,
                            activations=dataclasses.replace(A8, bits=bits_x))
    assert max(largest_sums(quantized), default=0) < 2**31
    eq.forward(quantized, x)


@each_quantizer
@pytest.mark.parametrize("bits", [8, 16])
def test_sums_of_very_many_products_fit(weights, bits):
    """70000 products of 127 * 255 do not: 8 bits take a larger scale for it. Products of 16 bits are for other engines, and keep theirs."""
    graph = eq.Graph.chain((70000,), y=eq.Dense(np.sign(np.random.default_rng(0).normal(size=(2, 70000))), np.array([3.0, -0.2])))
    x = np.random.default_rng(1).uniform(0, 1, (3, 70000))
    quantized = eq.quantize(graph, weights=weights, stats=eq.calibrate(graph, x), outputs=True,
                            activations=dataclasses.replace(A8, bits=bits))
    scale = weights.weight_grid(graph["y"].op).scale
    if bits == 16:
        assert not list(largest_sums(quantized))
        assert np.array_equal(quantized["y.float"].op.grid.scale, scale)
    else:
        assert 0.9 * 2**31 < max(largest_sums(quantized)) < 2**31
    # the input that makes the largest sums
    for sign in (1, -1):
        eq.forward(quantized, 2 * np.maximum(sign * graph["y"].op.weight[:1], 0))


def test_a_sum_that_does_not_fit_is_refused_by_name():
    grid = eq.UniformQuantizer(8).grid(-127.0, 127.0)
    op = eq.Dense(np.array([[1.0], [127.0]]), np.array([0.0, 2.0**31 - 100]), grid=dataclasses.replace(grid, scale=np.ones((1, 1))))
    read = eq.FakeQuantize(eq.Grid(np.ones(1), np.zeros(1), 0, 255))
    out = eq.FakeQuantize(eq.Grid(np.full(1, 2.0**24), np.zeros(1), -128, 127), np.ones(1))
    graph = eq.Graph.chain((1,), q=read, fc=op, y=out)
    assert eq.forward(graph, np.zeros((1, 1))).tolist() == [[0.0, 127 * 2.0**24]]
    with pytest.raises(ValueError, match=r"^node 'y': channel 1: a sum of 2147483675 steps does not fit into an integer engine's 32 bits, "
                                         r"which hold less than 2147483648; raise the scale of the weights, as eqfact\.quantize does$"):
        eq.forward(graph, np.ones((1, 1)))


@each_quantizer
@pytest.mark.parametrize("bias", [-1e2, -1e4, -1e6])
def test_a_large_bias_of_a_dead_channel_costs_the_others_nothing(bias, weights):
    rng = np.random.default_rng(0)
    w, b, x = rng.normal(size=(32, 64)), rng.normal(size=32), rng.normal(size=(200, 64))
    noise = []
    for size in (-30.0, bias):  # dead, both
        b[3] = size
        graph = eq.Graph.chain((64,), a=eq.Dense(w, b), r=eq.ReLU(), y=eq.Dense(np.ones((5, 32)) * (1 + np.arange(5))[:, None]))
        quantized = eq.quantize(graph, weights=weights, activations=A8, stats=eq.calibrate(graph, x))
        assert not eq.values(quantized, x)["r"][:, 3].any()
        noise.append(eq.sqnr(eq.forward(graph, x), eq.forward(quantized, x)))
    assert noise[1] > noise[0] - 0.5


# ------------------------------------------------------------------------------------------------ channels without weights


def folded(weight, bias):
    """A Dense whose channels a BatchNorm's gamma of 0 has put out."""
    gamma = np.float32([1, 0, 1, 0])
    chain = eq.Graph.chain((5,), fc=eq.Dense(weight), bn=eq.BatchNorm(gamma, bias, 0 * bias, 1 + 0 * bias), act=eq.ReLU(),
                           y=eq.Dense(np.ones((1, 4), weight.dtype)))
    return eq.fold_batchnorm(chain)


@pytest.mark.parametrize("size", [1e-6, 0.3, 1e5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@each_quantizer
@pytest.mark.parametrize("first", [False, True], ids=["at once", "weights first"])
@pytest.mark.parametrize("kind", ["a channel", "a layer", "folded", "below what its scale can be"])
def test_a_channel_without_weights_keeps_its_bias(kind, first, weights, dtype, size, tmp_path):
    rng = np.random.default_rng(4)
    w, b = rng.normal(size=(4, 5)).astype(dtype), (size * rng.uniform(0.5, 2, 4)).astype(dtype)
    dead = np.array([False, True, False, True]) | (kind == "a layer")
    w[dead] = 1e-320 if kind == "below what its scale can be" and dtype == np.float64 else 0
    graph = folded(w, b) if kind == "folded" else eq.Graph.chain((5,), fc=eq.Dense(w, b), act=eq.ReLU(), y=eq.Dense(np.ones((1, 4), dtype)))
    x = rng.normal(size=(20, 5)).astype(dtype)
    stats = eq.calibrate(graph, x)
    quantized = eq.quantize(eq.quantize(graph, weights=weights) if first else graph, weights=None if first else weights, activations=A8,
                            stats=stats)
    made = next(node.op for node in quantized if isinstance(node.op, eq.Dense))
    if weights.granularity == "per_tensor" and kind != "a layer":
        assert quantized["act"].op.step is not None  # one scale for channels with weights and without
        return
    relative = np.abs(made.bias.astype(np.float64) / b - 1)
    assert relative[dead].max() < 2**-16
    assert quantized["act"].op.step is not None
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", quantized)
    theirs = run(tmp_path / "net.onnx", {"x": x.astype(np.float32)}, ["act"], optimized=True, entries=EXACT_SUMS)["act"]
    assert np.abs(theirs - eq.values(quantized, x)["act"]).max() <= (1e-6 * theirs.max() if dtype == np.float32 else
                                                                    1.01 * quantized["act"].op.grid.scale.item())


@each_quantizer
def test_a_channel_without_weights_and_bias_keeps_the_scale_1(weights):
    rng = np.random.default_rng(5)
    w, b = rng.normal(size=(3, 5)), rng.normal(size=3)
    w[1], b[1] = 0, 0
    zero = weights.granularity == "per_tensor"
    graph = eq.Graph.chain((5,), fc=eq.Dense(*((0 * w, 0 * b) if zero else (w, b))), y=eq.Dense(np.ones((1, 3))))
    quantized = eq.quantize(graph, weights=weights, activations=A8, stats=eq.calibrate(graph, rng.normal(size=(9, 5))))
    assert quantized["fc.float"].op.grid.scale.reshape(-1)[0 if zero else 1] == 1


# ------------------------------------------------------------------------------------------------ corrected biases


def test_a_corrected_bias_leaves_the_products_their_room():
    """A bias that wants to rise to the end of its 32 bits goes as far as there is room, and the message says so."""
    weight = np.full((1, 3), 127.0)
    grid = eq.Grid(np.ones((1, 1)), np.zeros((1, 1)), -127, 127)
    read, out = eq.Grid(np.ones(1), np.zeros(1), 0, 255), eq.Grid(np.full(1, 2.0**23), np.zeros(1), 0, 255)
    net = eq.Graph.chain((3,), fc=eq.Dense(weight, np.array([2.0**33])), y=eq.Identity())
    quantized = eq.Graph({"x": (3,)}, [
        eq.Node("q", eq.FakeQuantize(read), ["x"]), eq.Node("fc.float", eq.Dense(weight, np.array([2.0**30]), grid=grid), ["q"]),
        eq.Node("fc", eq.FakeQuantize(out, np.ones(1)), ["fc.float"]), eq.Node("y", eq.Identity(), ["fc"])], ["y"])
    done = eq.correct_bias(net, quantized, np.ones((2, 3)))
    assert done.graph["fc.float"].op.bias.tolist() == [2**31 - 1 - 3 * 127 * 255]
    assert done.bounded == {"fc.float": 1}
    assert "only as far as the 32 bits of the sums have room: 'fc.float' (1 channel)" in done.message
    eq.forward(done.graph, np.full((1, 3), 999.0))


@each_case
def test_corrected_networks_store_an_engines_whole_numbers(case):
    for seed, weights in itertools.product(range(3), WEIGHTS.values()):
        graph, x = uneven(case, seed)
        quantized = eq.quantize(graph, weights=weights, activations=A8, stats=eq.calibrate(graph, x), outputs=True)
        done = eq.correct_bias(graph, quantized, x)
        assert max(largest_sums(done.graph)) < 2**31
        assert agrees_with_the_engine(done.graph, np.concatenate([x, 100 * x])) >= 6


# ------------------------------------------------------------------------------------------------ processors that add pairs in 16 bits


def added_in_pairs(q_x, q_w):
    """``sum q_x q_w`` as vpmaddubsw adds: unsigned times signed bytes, neighbouring products in 16 bits that saturate."""
    products = q_x[:, None, :] * q_w[None]
    pairs = np.clip(products[..., 0::2] + products[..., 1::2], -(2**15), 2**15 - 1)
    return pairs.sum(axis=-1)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("rounding", ["half_even", "floor"])
def test_weights_of_7_bits_are_exact_where_pairs_of_products_saturate(granularity, rounding, tmp_path):
    """Stored in 8 bits, as x86 processors without VNNI read them; weights of 8 bits are not."""
    w = np.random.default_rng(6).normal(size=(6, 16)).astype(np.float32)
    q_x = np.concatenate([np.full((1, 16), 255), np.random.default_rng(7).integers(0, 256, (200, 16))])
    for bits, exact in ((7, True), (8, False)):
        graph = eq.Graph.chain((16,), y=eq.Dense(np.concatenate([w, -np.abs(w), np.abs(w)])))
        quantized = eq.quantize(graph, weights=eq.UniformQuantizer(bits, granularity=granularity, rounding=rounding))
        eqfact.onnx.save_qdq(tmp_path / "net.onnx", quantized)
        (stored,) = (numpy_helper.to_array(t) for t in onnx.load(tmp_path / "net.onnx").graph.initializer if t.name == "y.weight.int")
        assert stored.dtype == np.int8
        assert np.array_equal(added_in_pairs(q_x, stored.astype(np.int64)), q_x @ stored.astype(np.int64).T) == exact
