"""Quantizers against scalar formulas in exact fractions, and quantized networks against what an integer engine holds."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from fractions import Fraction

import handmade
import numpy as np
import pytest
from handmade import Maker
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import eqfact as eq
from eqfact.accumulators import accumulator_step
from eqfact.ops.grid import ROUNDINGS, rounded
from eqfact.quantization import grid_of, keeps_grid, rounded_bias, stored_name, stored_values, tensor_ranges
from eqfact.quantizers import effective_bits
from eqfact.report import local_sqnr
from eqfact.testing.strategies import batches, networks

NEAREST = ("half_even", "half_away", "half_up")


def quantizers():
    """Every kind of quantizer."""
    return st.builds(eq.UniformQuantizer, bits=st.integers(2, 16), symmetric=st.booleans(), signed=st.sampled_from([None, True, False]),
                     narrow_range=st.booleans(), rounding=st.sampled_from(NEAREST))


def ranges():
    """``low <= high``, over many decades, of one sign or of both, and empty ones."""
    number = st.one_of(st.floats(-100, 100, allow_subnormal=False), st.sampled_from([0.0, 1.0, -1.0, 1e-30, -1e30, 1e300]))
    return st.tuples(number, number).map(sorted)


# ------------------------------------------------------------------------------------------------ scalar formulas, exact


def exact_rounded(x: Fraction, rounding: str) -> int:
    whole = math.floor(x)
    part = x - whole
    if rounding == "floor" or part < Fraction(1, 2):
        return whole
    if part > Fraction(1, 2):
        return whole + 1
    return {"half_even": whole + whole % 2, "half_up": whole + 1, "half_away": whole + 1 if x > 0 else whole}[rounding]


def exact_fake_quantized(x: float, grid) -> tuple[int, Fraction]:
    """``q`` and ``scale (q - zero_point)`` in fractions, nothing rounded but what the grid rounds."""
    scale, zero_point = Fraction(float(grid.scale)), int(grid.zero_point)
    q = min(max(exact_rounded(Fraction(x) / scale, grid.rounding) + zero_point, grid.qmin), grid.qmax)
    return q, scale * (q - zero_point)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_rounding_is_exact_at_ties_and_around_them(rounding):
    numbers = [k / 4 for k in range(-20, 21)] + [0.49999999999999994, -0.49999999999999994, 2.5 - 2**-51, 2.5 + 2**-51, 4503599627370495.5]
    assert rounded(np.array(numbers), rounding).tolist() == [exact_rounded(Fraction(x), rounding) for x in numbers]


@pytest.mark.parametrize(("rounding", "expected"), [
    ("half_even", [-2, -2, 0, 0, 2, 2]), ("half_away", [-3, -2, -1, 1, 2, 3]),
    ("half_up", [-2, -1, 0, 1, 2, 3]), ("floor", [-3, -2, -1, 0, 1, 2])])
def test_ties_by_hand(rounding, expected):
    assert rounded(np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]), rounding).tolist() == expected


def test_ties_go_to_even_by_default():
    assert eq.UniformQuantizer().rounding == "half_even"
    grid = eq.UniformQuantizer(bits=8).grid(-127.0, 127.0)
    assert grid.quantize([0.5, 1.5, 2.5, -0.5, -1.5]).tolist() == [0, 2, 2, 0, -2]


@given(x=st.lists(st.floats(-40, 40), min_size=1, max_size=8), bits=st.integers(2, 16), exponent=st.integers(-6, 3),
       symmetric=st.booleans(), signed=st.booleans(), narrow=st.booleans(), rounding=st.sampled_from(ROUNDINGS), offset=st.integers(0, 3))
@settings(max_examples=300)
@example(x=[-5e-324], bits=3, exponent=1, symmetric=False, signed=False, narrow=False, rounding="floor", offset=3)  # x / scale underflows
def test_fake_quantization_is_the_formula_in_exact_fractions(x, bits, exponent, symmetric, signed, narrow, rounding, offset):
    quantizer = eq.UniformQuantizer(bits=bits, symmetric=symmetric, signed=signed, narrow_range=narrow, rounding=rounding)
    step = 2.0**exponent  # scales that are powers of two, so that floats compute exactly, too
    steps = quantizer.qmax - quantizer.qmin
    grid = (quantizer.grid(0, step * ((1 << (bits - 1)) - 1)) if symmetric
            else quantizer.grid(-min(offset, steps) * step, (steps - min(offset, steps)) * step))
    assert float(grid.scale) == step
    exact = [exact_fake_quantized(v, grid) for v in x]
    assert grid.quantize(x).tolist() == [q for q, _ in exact]
    assert [Fraction(v) for v in grid.fake_quantize(np.array(x)).tolist()] == [y for _, y in exact]


@given(quantizers(), ranges())
@settings(max_examples=200)
def test_scale_and_zero_point_are_the_papers(quantizer, bounds):
    low, high = bounds
    grid = quantizer.grid(low, high)
    levels = 2**quantizer.bits - (1 if quantizer.narrow_range else 0)
    assert grid.qmax - grid.qmin == levels - 1
    if low == high == 0:
        assert float(grid.scale) == 1
    elif quantizer.symmetric:
        half = 2 ** (quantizer.bits - 1) - 1  # steps on the shorter side
        np.testing.assert_allclose(grid.scale, max(abs(low), abs(high)) / half, rtol=1e-15)
    else:
        np.testing.assert_allclose(grid.scale, float((Fraction(max(high, 0.0)) - Fraction(min(low, 0.0))) / (levels - 1)), rtol=1e-15)


def test_grids_by_hand():
    signed = eq.UniformQuantizer(bits=8)
    assert (signed.qmin, signed.qmax) == (-128, 127)
    assert (float(signed.grid(-254.0, 3.0).scale), float(signed.grid(-254.0, 3.0).zero_point)) == (2.0, 0.0)
    narrow = eq.UniformQuantizer(bits=8, narrow_range=True)
    assert (narrow.qmin, narrow.qmax) == (-127, 127)
    affine = eq.UniformQuantizer(bits=8, symmetric=False)
    assert (affine.qmin, affine.qmax) == (0, 255)
    assert (float(affine.grid(-64.0, 191.0).scale), float(affine.grid(-64.0, 191.0).zero_point)) == (1.0, 64.0)
    assert (float(affine.grid(51.0, 255.0).scale), float(affine.grid(51.0, 255.0).zero_point)) == (1.0, 0.0)  # widened to hold zero
    assert (float(affine.grid(-255.0, -51.0).scale), float(affine.grid(-255.0, -51.0).zero_point)) == (1.0, 255.0)
    unsigned = eq.UniformQuantizer(bits=8, signed=False)
    assert (unsigned.qmin, unsigned.qmax, float(unsigned.grid(-127.0, 0.0).zero_point)) == (0, 255, 128.0)
    signed_affine = eq.UniformQuantizer(bits=8, symmetric=False, signed=True)
    assert (signed_affine.qmin, signed_affine.qmax, float(signed_affine.grid(0.0, 255.0).zero_point)) == (-128, 127, -128.0)


# ------------------------------------------------------------------------------------------------ laws of a grid


@st.composite
def grids_and_numbers(draw):
    """A quantizer, a range, and numbers within it, at its ends and at its middles."""
    quantizer, (low, high) = draw(quantizers()), draw(ranges())
    parts = np.array([0.0, 1.0, 0.5, *draw(st.lists(st.floats(0, 1), max_size=6))])
    x = low * (1 - parts) + high * parts
    return quantizer, low, high, np.clip(x, low, high)


@given(grids_and_numbers())
@settings(max_examples=300)
def test_the_error_is_at_most_half_a_step_within_the_range(drawn):
    quantizer, low, high, x = drawn
    grid = quantizer.grid(low, high)
    error = np.abs(grid.fake_quantize(x) - x)
    assert (error <= grid.scale / 2 * (1 + 1e-9)).all()


@given(grids_and_numbers())
@settings(max_examples=300)
def test_quantizing_twice_is_quantizing_once(drawn):
    quantizer, low, high, x = drawn
    grid = quantizer.grid(low, high)
    once = grid.fake_quantize(x)
    assert np.array_equal(grid.fake_quantize(once), once)
    assert np.array_equal(grid.quantize(once), grid.quantize(x))
    if max(abs(low), abs(high)) < 1e38:
        in_float32 = grid.fake_quantize(x.astype(np.float32))
        assert np.array_equal(grid.fake_quantize(in_float32), in_float32)


@given(grids_and_numbers())
@settings(max_examples=100)
def test_quantization_is_monotone_saturates_and_has_at_most_2_to_the_bits_levels(drawn):
    quantizer, low, high, x = drawn
    grid = quantizer.grid(low, high)
    span = min(max(abs(low), abs(high), 1.0) * 3, 1e307)
    wide = np.sort(np.concatenate([x, np.linspace(-span, span, 400)]))
    q = grid.quantize(wide)
    assert (np.diff(q) >= 0).all()
    assert q.min() >= quantizer.qmin
    assert q.max() <= quantizer.qmax
    assert len(np.unique(q)) <= 2**quantizer.bits
    assert grid.quantize([1e308, -1e308]).tolist() == [quantizer.qmax, quantizer.qmin]


@given(quantizers(), ranges())
@settings(max_examples=100)
def test_zero_is_on_every_grid(quantizer, bounds):
    grid = quantizer.grid(*bounds)
    assert grid.fake_quantize(np.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    assert grid.quantize(np.zeros(1)).tolist() == [int(grid.zero_point)]
    assert grid.dequantize(grid.zero_point) == 0


@given(quantizers(), st.floats(1e-3, 1e3))
def test_the_largest_magnitude_is_on_a_symmetric_grid(quantizer, top):
    if quantizer.symmetric:
        grid = quantizer.grid(-top, top / 2)
        np.testing.assert_allclose(grid.fake_quantize(np.array([top, -top])), [top, -top], rtol=1e-15)


@given(quantizers(), st.floats(1e-3, 1e3))
def test_narrow_symmetric_grids_are_symmetric(quantizer, top):
    narrow = eq.UniformQuantizer(bits=quantizer.bits, narrow_range=True, rounding="half_even")
    grid, x = narrow.grid(-top, top), np.linspace(-2 * top, 2 * top, 41)
    assert grid.qmin == -grid.qmax
    np.testing.assert_array_equal(grid.fake_quantize(-x), -grid.fake_quantize(x))


@given(quantizers(), ranges(), st.integers(-20, 20))
@settings(max_examples=100)
def test_quantization_commutes_with_powers_of_two(quantizer, bounds, exponent):
    low, high = (np.clip(b, -1e290, 1e290) for b in bounds)
    x = np.concatenate([np.linspace(low, high, 33), [2 * low - 1, 2 * high + 1]])
    f = 2.0**exponent
    if low < high or low != 0:
        expected = f * quantizer.grid(low, high).fake_quantize(x)
        np.testing.assert_array_equal(quantizer.grid(f * low, f * high).fake_quantize(f * x), expected)


def test_a_floor_never_goes_up_and_errs_by_less_than_a_step():
    x = np.linspace(-1, 1, 257)
    grid = eq.UniformQuantizer(bits=5, rounding="floor").grid(-1.0, 1.0)
    y = grid.fake_quantize(x)
    assert (y <= x + 1e-15).all()
    assert (x - y < grid.scale * (1 + 1e-12)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("top", [0.0, 5e-324, 1e-310])
def test_a_range_of_zero_or_next_to_it_holds_zero_alone(symmetric, top):
    grid = eq.UniformQuantizer(symmetric=symmetric).grid(-top, top)
    assert float(grid.scale) == 1.0
    assert grid.fake_quantize(np.array([top, -top, 0.0])).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("top", [1e-300, 1e-30, 1e30, 1e300, 1e308])
def test_tiny_and_huge_ranges_keep_their_relative_error(symmetric, top):
    x = np.linspace(-1, 1, 101) * top
    y = eq.UniformQuantizer(bits=16, symmetric=symmetric).grid(-top, top).fake_quantize(x)
    assert np.isfinite(y).all()
    assert np.abs(y / top - x / top).max() < 2**-14


# ------------------------------------------------------------------------------------------------ granularities


def scales_by_loops(w, granularity, group_size, half):
    """The symmetric scale of every weight, entry by entry."""
    scales = np.empty(w.shape)
    for index in np.ndindex(*w.shape):
        o, i = index[:2]
        shares = {"per_tensor": w, "per_channel": w[o]}.get(granularity)
        if shares is None:
            start = i // group_size * group_size
            shares = w[o, start:start + group_size]
        scales[index] = np.abs(shares).max() / half
    return scales


@pytest.mark.parametrize(("granularity", "group_size"), [("per_tensor", None), ("per_channel", None), ("per_group", 1), ("per_group", 2),
                                                         ("per_group", 3), ("per_group", 99)])
@pytest.mark.parametrize("name", ["dense", "conv", "grouped", "depthwise", "transposed"])
def test_weights_that_share_a_scale_are_those_of_the_granularity(granularity, group_size, name):
    m = Maker(1)
    op = {"dense": m.dense(4, 5), "conv": m.conv(3, 5, 2, 2), "grouped": m.conv(4, 3, 2, groups=2), "depthwise": m.conv(4, 1, 3, groups=4),
          "transposed": eq.ConvTranspose(m.weight(3, 4, 2))}[name]
    grid = eq.UniformQuantizer(bits=4, granularity=granularity, group_size=group_size).weight_grid(op)
    expected = scales_by_loops(op.weight, granularity, group_size, 7)
    np.testing.assert_allclose(np.broadcast_to(grid.scale, op.weight.shape), expected, rtol=1e-15)
    error = np.abs(grid.fake_quantize(op.weight) - op.weight)
    assert (error <= expected / 2 * (1 + 1e-12)).all()


@pytest.mark.parametrize("name", ["dense", "grouped", "transposed"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_per_channel_weights_follow_power_of_two_factors_of_their_output_channels(name, symmetric):
    m = Maker(2)
    op = {"dense": m.dense(4, 5), "grouped": m.conv(4, 3, 2, groups=2), "transposed": eq.ConvTranspose(m.weight(4, 4, 2))}[name]
    f, ones = np.array([0.25, 1.0, 8.0, 2.0]), np.ones(op.groups * op.weight.shape[1])
    quantizer = eq.UniformQuantizer(bits=4, symmetric=symmetric, granularity="per_channel")

    def rounded_weight(op):
        return quantizer.weight_grid(op).fake_quantize(op.weight)

    np.testing.assert_array_equal(rounded_weight(op.rescale(f, ones)), rounded_weight(op) * f.reshape(-1, *(1,) * (op.weight.ndim - 1)))


def test_a_depthwise_network_quantized_per_channel_does_not_feel_powers_of_two():
    """Every weight reads one channel and makes one, so both of its factors leave the row's grid as it is."""
    m = Maker(3)
    graph = eq.Graph.chain((4, 6), a=m.conv(4, 1, 3, groups=4), act=eq.ReLU6(), b=m.conv(4, 1, 2, groups=4), act2=eq.ReLU(),
                           c=m.conv(4, 1, 1, groups=4))
    x = m.data(graph)
    factors = eq.Factorization.of(graph, {"act": [0.25, 1.0, 8.0, 2.0], "act2": [64.0, 0.5, 1.0, 4.0]})
    stats = eq.calibrate(graph, x)
    options = {"weights": eq.UniformQuantizer(bits=5, granularity="per_channel"),
               "activations": eq.UniformQuantizer(bits=6, symmetric=False, granularity="per_channel")}
    before = eq.forward(eq.quantize(graph, stats=stats, **options), x)
    after = eq.forward(eq.quantize(factors.apply(graph), stats=factors.apply(stats), **options), x)
    assert np.array_equal(before, after)
    assert not np.array_equal(before, eq.forward(graph, x))


def test_per_tensor_activations_share_one_grid_and_per_channel_ones_have_their_own():
    low, high = np.array([0.0, -1.0]), np.array([3.0, 1.0])
    assert eq.UniformQuantizer(bits=2, symmetric=False).activation_grid(low, high).scale.tolist() == [4 / 3]
    assert eq.UniformQuantizer(bits=2, symmetric=False, granularity="per_channel").activation_grid(low, high).scale.tolist() == [1.0, 2 / 3]


def test_effective_bits_are_bits_minus_the_log_of_the_ratio():
    assert effective_bits(np.array([1.0, 0.25, 0.0]), 8).tolist() == [8.0, 6.0, -math.inf]
    assert effective_bits(np.array([0.5, 0.25]), 8).tolist() == [8.0, 7.0]
    assert effective_bits(np.zeros(2), 8).tolist() == [-math.inf, -math.inf]


def test_a_group_of_all_input_channels_is_a_channel():
    """And has one scale, so that an integer engine can add up its products."""
    op = Maker(1).conv(3, 5, 2)
    by_channel = eq.UniformQuantizer(granularity="per_channel").weight_grid(op)
    for size in (5, 6):
        grid = eq.UniformQuantizer(granularity="per_group", group_size=size).weight_grid(op)
        assert grid.scale.shape == (3, 1, 1) and np.array_equal(grid.scale, by_channel.scale)


@pytest.mark.parametrize(("options", "steps"), [
    ({}, 127), ({"signed": False}, 127), ({"bits": 4, "signed": False}, 7), ({"narrow_range": True}, 127), ({"symmetric": False}, 255),
    ({"symmetric": False, "signed": True}, 255), ({"symmetric": False, "narrow_range": True}, 254), ({"bits": 2, "signed": False}, 1)])
def test_steps_are_those_of_the_range_that_a_scale_divides(options, steps):
    quantizer = eq.UniformQuantizer(**options)
    assert quantizer.steps == steps
    assert quantizer.grid(0.0 if not quantizer.symmetric else -3.0, 3.0).scale == pytest.approx(3 / steps)


def test_taps_share_the_sensitivity_of_their_weight_with_those_that_are_not_0():
    w = np.array([[[1.0, 0.0, -2.0], [0.0, 0.0, 0.0]]])
    shares = eq.UniformQuantizer(range="noise")._weighing(w, np.array([[[6.0, 4.0]]]))
    assert shares.tolist() == [[[3, 3, 3], [4, 4, 4]]]


def test_an_error_beyond_all_numbers_passes_as_the_range_of_the_grid():
    op, x = eq.FakeQuantize(eq.Grid(np.ones(1), np.zeros(1), -2, 5)), np.float32([[1.0], [0.0]])
    assert op.passes([np.float32([[3e38], [1e30]])], [x], 4.0).tolist() == [[1.0], [1.25]]


# ------------------------------------------------------------------------------------------------ networks

W8, A8 = eq.UniformQuantizer(bits=8), eq.UniformQuantizer(bits=8, symmetric=False)
each_net = pytest.mark.parametrize("build", handmade.NETS, ids=lambda f: f.__name__)


def on_grid(x, scale, zero_point, qmin, qmax):
    """All entries are ``scale (q - zero_point)`` up to one rounding to their dtype."""
    q = np.rint(x / scale) + zero_point
    assert (q >= qmin).all()
    assert (q <= qmax).all()
    np.testing.assert_allclose(x, scale * (q - zero_point), rtol=4 * np.finfo(x.dtype).eps, atol=0)


@each_net
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_of_a_quantized_network_are_on_their_grid(build, dtype, bits):
    m = Maker(4, dtype)
    graph = build(m)
    quantized = eq.quantize(graph, weights=eq.UniformQuantizer(bits=bits))
    for node in graph:
        op = quantized[node.name].op
        if not isinstance(op, eq.Weighted) or isinstance(op, eq.BatchNorm):
            assert op is node.op
            continue
        scale = float(np.abs(node.op.weight).max()) / (2 ** (bits - 1) - 1)
        on_grid(op.weight, scale, 0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        assert len(np.unique(op.weight)) <= 2**bits
        assert op.weight.dtype == dtype
        assert np.abs(op.weight - node.op.weight).max() <= scale / 2 * (1 + 1e-5)
        assert op.bias is node.op.bias or np.array_equal(op.bias, node.op.bias)  # no activation grid: biases stay in float
        assert float(op.grid.scale.ravel()[0]) == pytest.approx(scale)


@each_net
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_biases_are_multiples_of_input_scale_times_weight_scale(build, granularity):
    m = Maker(5)
    graph = build(m)
    stats = eq.calibrate(graph, m.data(graph))
    quantized = eq.quantize(graph, weights=eq.UniformQuantizer(bits=8, granularity=granularity), activations=A8, stats=stats)
    seen = 0
    for node in graph:
        if not isinstance(node.op, eq.Weighted) or isinstance(node.op, eq.BatchNorm) or node.op.bias is None:
            continue
        op = quantized[node.name if node.name not in stored_values(graph) else f"{node.name}.float"].op
        source = stored_source(graph, node.inputs[0])
        low, high = min(float(stats[source].min.min()), 0), max(float(stats[source].max.max()), 0)
        axes = None if granularity == "per_tensor" else tuple(range(1, op.weight.ndim))
        step = (high - low) / 255 * np.abs(node.op.weight).max(axis=axes) / 127
        multiples = op.bias / step
        np.testing.assert_allclose(multiples, np.rint(multiples), atol=1e-6 * np.abs(multiples).max())
        assert (np.abs(op.bias - node.op.bias) <= step / 2 * (1 + 1e-9)).all()
        seen += 1
    assert seen


def stored_source(graph, value):
    """The stored value on whose grid this one is: through ops that only move entries."""
    while value not in stored_values(graph):
        value = graph[value].inputs[0]
    return value


def test_biases_stay_in_float_on_request_and_where_a_scale_is_missing():
    m = Maker(6)
    graph = handmade.plain(m)
    stats = eq.calibrate(graph, m.data(graph))
    for options in ({"biases": False, "weights": W8, "activations": A8}, {"activations": A8}, {"weights": W8},
                    {"weights": W8, "activations": eq.UniformQuantizer(symmetric=False, granularity="per_channel")}):
        quantized = eq.quantize(graph, stats=stats, **options)
        for name in ("conv1", "conv2", "fc"):
            assert np.array_equal(quantized[name].op.bias, graph[name].op.bias)


def test_a_huge_bias_keeps_its_value_and_fits_into_32_bits():
    graph = eq.Graph.chain((1,), fc=eq.Dense(np.array([[1.0]]), np.array([1e9])))
    quantized = eq.quantize(graph, weights=W8, activations=A8, stats=eq.calibrate(graph, np.array([[1.0]])))
    assert quantized["fc"].op.bias[0] == pytest.approx(1e9)
    assert quantized["fc"].op.bias[0] / (quantized["fc"].op.grid.scale.item() / 255) < 2**31


@each_net
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_stored_values_are_on_their_grid_and_named_as_before(build, granularity, dtype):
    m = Maker(7, dtype)
    graph = build(m)
    x = m.data(graph)
    stats = eq.calibrate(graph, x)
    quantizer = eq.UniformQuantizer(bits=5, symmetric=False, granularity=granularity)
    quantized = eq.quantize(graph, activations=quantizer, stats=stats, outputs=True)
    every = eq.values(quantized, x)
    assert set(graph.shapes) <= set(every)
    assert quantized.outputs == graph.outputs
    for name in stored_values(graph, outputs=True):
        value = every[f"{name}.quantized" if name in graph.inputs else name]
        low, high = np.minimum(stats[name].min, 0), np.maximum(stats[name].max, 0)
        if granularity == "per_tensor":
            low, high = low.min(keepdims=True), high.max(keepdims=True)
        scale = np.where(high > low, (high - low) / 31, 1)
        shape = (-1, *(1,) * (value.ndim - 2))
        on_grid(value, scale.reshape(shape), np.rint(-low / scale).reshape(shape), 0, 31)


@each_net
def test_moved_values_stay_on_the_grid_of_what_they_move(build):
    m = Maker(8)
    graph = build(m)
    x = m.data(graph)
    quantized = eq.quantize(graph, activations=eq.UniformQuantizer(bits=4, symmetric=False), stats=eq.calibrate(graph, x))
    every = eq.values(quantized, x)
    for node in graph:
        if isinstance(node.op, (eq.Flatten, eq.MaxPool, eq.Permute, eq.Slice, eq.Pad, eq.Upsample)):
            assert node.name not in stored_values(graph)
            source = f"{node.inputs[0]}.quantized" if node.inputs[0] in graph.inputs else node.inputs[0]
            assert set(np.unique(every[node.name])) <= set(np.unique(every[source])) | {0.0}


def test_values_that_an_engine_stores_are_inputs_and_what_layers_make_behind_their_activation():
    m = Maker(9)
    assert stored_values(handmade.plain(m)) == ["x", "act1", "act2"]
    assert stored_values(handmade.plain(m), outputs=True) == ["x", "act1", "act2", "fc"]
    assert stored_values(handmade.inner_output(m)) == ["x", "act1", "act2"]
    assert stored_values(handmade.mobile(m)) == ["x", "act", "act1", "act2", "project", "add", "act3", "pool"]
    assert stored_values(handmade.concat(m)) == ["x", "act_a", "act_b", "c", "cat", "act_d"]
    assert stored_values(handmade.two_inputs(m)) == ["x", "y", "a", "b", "act", "c", "curve", "act_d"]


def test_a_mask_made_of_an_input_is_computed_in_float():
    """As BERT's exports make it of zeros and ones: no grid would hold -3e38 and what else is added to scores."""
    m = Maker(10)
    conv = {name: eq.Node(name, eq.Conv(m.rng.normal(size=(4, 4, 1))), ["x"]) for name in "qkv"}
    made = eq.BatchNorm(*(np.array([v]) for v in (3e38, -3e38, 0.0, 1.0)), eps=0.0)
    graph = eq.Graph({"x": (4, 3), "mask": (1, 1, 3), "near": (3, 1, 3)}, [
        *conv.values(), eq.Node("made", made, ["mask"]), eq.Node("moved", eq.Transpose((1, 0, 2)), ["near"]),
        eq.Node("scores", eq.Scores(1), ["q", "k"]), eq.Node("masked", eq.Add(), ["scores", "made"]),
        eq.Node("sums", eq.Add(), ["masked", "moved"]),
        eq.Node("p", eq.Softmax(-1), ["sums"]), eq.Node("y", eq.Mix(1), ["p", "v"])], ["y"])
    assert stored_values(graph) == ["x", "q", "k", "v", "p"]
    layer = eq.Graph(dict(graph.inputs), [eq.Node(n.name, eq.Conv(np.ones((1, 1, 1, 1))), n.inputs) if n.name == "made" else n
                                          for n in graph], graph.outputs)
    assert stored_values(layer) == ["x", "mask", "q", "k", "v", "p"]  # a layer reads whole numbers, also of a mask


def test_an_inner_output_is_rounded_where_it_is_read():
    m = Maker(10)
    graph = handmade.inner_output(m)
    x = m.data(graph)
    quantized = eq.quantize(graph, activations=eq.UniformQuantizer(bits=3, symmetric=False), stats=eq.calibrate(graph, x))
    outputs = eq.forward(quantized, x)
    assert set(outputs) == {"act1", "fc"}
    assert len(np.unique(outputs["act1"])) <= 8
    assert len(np.unique(outputs["fc"])) > 8


def test_a_quantized_layer_computes_what_integers_compute():
    """``y = s_x s_w (sum (q_x - z_x) q_w + q_b)``, accumulated in Python integers."""
    m = Maker(11)
    graph = eq.Graph.chain((5,), fc=m.dense(3, 5))
    x = m.data(graph, 6)
    stats = eq.calibrate(graph, x)
    quantized = eq.quantize(graph, weights=W8, activations=A8, stats=stats)
    low, high = float(stats["x"].min.min()), float(stats["x"].max.max())
    s_x, s_w = (high - low) / 255, float(np.abs(graph["fc"].op.weight).max()) / 127
    z = round(-low / s_x)
    expected = np.empty((6, 3))
    for n, o in itertools.product(range(6), range(3)):
        total = round(float(graph["fc"].op.bias[o]) / (s_x * s_w))
        for i in range(5):
            q_x = min(max(round(float(x[n, i]) / s_x) + z, 0), 255)
            total += (q_x - z) * round(float(graph["fc"].op.weight[o, i]) / s_w)
        expected[n, o] = s_x * s_w * total
    np.testing.assert_allclose(eq.forward(quantized, x), expected, rtol=1e-12, atol=1e-12)


def whole_numbers(quantized, every, name):
    """What an integer engine stores where a FakeQuantize of a layer's sums stands: exact sums, one multiplier in the network's type."""
    rounding = quantized[name].op
    node = quantized[quantized[name].inputs[0]]
    read, s_w = grid_of(quantized, node.inputs[0]), node.op.grid
    number = every[node.name].dtype.type  # scales and the multiplier, as engines hold them
    q_x = np.rint(every[node.inputs[0]] / read.scale).astype(np.int64)  # less its zero point
    q_w = np.rint(node.op.weight / s_w.scale).astype(np.int64)
    layer = dataclasses.replace(node.op, weight=q_w.astype(np.float64), bias=None, grid=None)
    sums = layer.forward(q_x.astype(np.float64))  # whole numbers below 2**53: exact
    by_channel = (-1, *(1,) * (sums.ndim - 2))
    step = (number(read.scale.item()) * s_w.scale.reshape(-1).astype(number)).reshape(by_channel)
    if node.op.bias is not None:
        sums = sums + np.rint(node.op.bias.astype(np.float64).reshape(by_channel) / step)
    multiplier = step / rounding.grid.scale.astype(number).reshape(by_channel)
    zero_point = rounding.grid.zero_point.reshape(by_channel)
    return np.clip(np.rint(sums.astype(number) * multiplier) + zero_point, rounding.grid.qmin, rounding.grid.qmax)


@each_net
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_layers_store_the_whole_numbers_that_an_integer_engine_stores(build, dtype, granularity, symmetric):
    m = Maker(21, dtype)
    graph = build(m)
    x = m.data(graph, 20)
    quantized = eq.quantize(graph, weights=eq.UniformQuantizer(8, granularity=granularity), stats=eq.calibrate(graph, x), outputs=True,
                            activations=eq.UniformQuantizer(8, symmetric=symmetric))
    every, seen = eq.values(quantized, x), 0
    for node in quantized:
        if isinstance(node.op, eq.FakeQuantize) and node.op.step is not None:
            grid = node.op.grid
            assert np.array_equal(np.rint(every[node.name] / grid.scale) + grid.zero_point, whole_numbers(quantized, every, node.name))
            seen += 1
    assert seen >= (1 if build is handmade.volume else 2)


def test_sums_in_the_middle_of_two_steps_go_to_even_whatever_float_made_of_them():
    """At a multiplier of 1/2, every odd sum is a tie, and float32 sums lie a little to either side of it."""
    rng = np.random.default_rng(0)
    step, sums = np.float32(0.1) * np.float32(0.3), rng.integers(-200, 200, 4000)
    x = (sums * step * (1 + rng.uniform(-3e-7, 3e-7, sums.shape))).astype(np.float32)[:, None]
    grid = eq.Grid(np.array([2.0 * step]), np.zeros(1), -128, 127)
    expected = np.array([exact_rounded(Fraction(int(n), 2), "half_even") for n in sums])[:, None]
    assert np.array_equal(eq.FakeQuantize(grid, np.array([step])).forward(x), (expected * 2 * step).astype(np.float32))
    apart = grid.quantize(x) != expected  # rounded as floats they would go anywhere
    assert 0.1 < apart.mean() < 0.4


@settings(max_examples=60)
@given(data=st.data(), symmetric=st.booleans(), granularity=st.sampled_from(["per_tensor", "per_channel"]), bits=st.sampled_from([3, 8]),
       weights=st.sampled_from([None, W8]))
def test_clips_on_rounded_values_are_rounded_clips(data, symmetric, granularity, bits, weights):
    number = st.one_of(st.floats(-4, 4), st.sampled_from([-math.inf, math.inf, 0.0, 6.0]))
    pairs = [sorted(data.draw(st.tuples(number, number))) for _ in range(3)]
    low, high = (pairs[0] if data.draw(st.booleans()) else np.array(pairs).T)
    assume(not (np.isinf(low) & (low == high)).any())  # that would be infinity for every input
    m = Maker(data.draw(st.integers(0, 99)))
    graph = eq.Graph.chain((2, 5), a=m.conv(3, 2, 2), act=eq.Clip(low, high), b=m.conv(2, 3, 1))
    x = m.data(graph, 5)
    stats = eq.calibrate(graph, x)
    quantizer = eq.UniformQuantizer(bits, symmetric=symmetric, granularity=granularity)
    quantized = eq.quantize(graph, weights=weights, activations=quantizer, stats=stats)
    every = eq.values(quantized, 2 * x)
    grid = quantizer.activation_grid(stats["act"].min, stats["act"].max)
    shape = (-1, 1)
    clipped = np.clip(every["a"], np.reshape(low, shape), np.reshape(high, shape))
    q = np.clip(np.rint(clipped / grid.scale.reshape(shape)) + grid.zero_point.reshape(shape), grid.qmin, grid.qmax)
    expected = grid.scale.reshape(shape) * (q - grid.zero_point.reshape(shape))
    np.testing.assert_allclose(every["act"], expected, rtol=1e-12)


def test_a_relu_is_gone_where_the_grid_ends_at_zero_and_a_clip_where_it_ends_within_the_bounds():
    m = Maker(22)
    graph = eq.Graph.chain((2, 5), a=m.conv(3, 2, 2), act=eq.ReLU(), b=m.conv(3, 3, 1), cut=eq.Clip(0.0, np.array([0.1, 0.2, 50.0])),
                           c=m.conv(2, 3, 1))
    stats = eq.calibrate(graph, m.data(graph))
    unsigned = eq.quantize(graph, weights=W8, activations=A8, stats=stats)
    assert isinstance(unsigned["act"].op, eq.FakeQuantize)
    assert unsigned["act"].inputs == ("a",)
    cut = unsigned["cut"].op  # 0 is the end of the grid, and of the bounds above only two are within it
    assert cut.low == -math.inf
    np.testing.assert_allclose(cut.high[:2], [0.1, 0.2], atol=unsigned["b.quantized"].op.grid.scale.item() / 2)
    signed = eq.quantize(graph, weights=W8, activations=eq.UniformQuantizer(8), stats=stats)
    assert (signed["act"].op.low, signed["act"].op.high, signed["act"].inputs) == (0.0, math.inf, ("a.quantized",))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bounds_and_biases_stay_on_their_grid_under_every_rounding(rounding):
    """A clip keeps the grid of what it clips, so the layer behind it has a step, and its corrected bias is a multiple of that."""
    m = Maker(24)
    graph = eq.Graph.chain((4,), a=m.dense(8, 4), c=eq.Clip(0.3, 1.1), b=m.dense(2, 8))
    x = m.data(graph, 50)
    quantizer = eq.UniformQuantizer(8, symmetric=False, rounding=rounding)
    quantized = eq.quantize(graph, weights=eq.UniformQuantizer(8, rounding=rounding), activations=quantizer, stats=eq.calibrate(graph, x),
                            outputs=True)
    assert grid_of(quantized, "c") is quantized["a.quantized"].op.grid
    for q in (quantized, eq.correct_bias(graph, quantized, x).graph):
        multiples = q["b.float"].op.bias / q["b"].op.step
        np.testing.assert_allclose(multiples, np.rint(multiples), rtol=1e-12)


@each_net
def test_weights_first_and_activations_then_is_both_at_once(build):
    m = Maker(25, "float32")
    graph = build(m)
    x = m.data(graph)
    stats = eq.calibrate(graph, x)
    at_once = eq.quantize(graph, weights=W8, activations=A8, stats=stats)
    then = eq.quantize(eq.quantize(graph, weights=W8), activations=A8, stats=stats)
    assert [node.name for node in then] == [node.name for node in at_once]
    for name, value in eq.values(at_once, x).items():
        assert np.array_equal(eq.values(then, x)[name], value)


def test_a_bias_that_does_not_fit_weights_quantized_before_stays_in_float():
    graph = eq.Graph.chain((1,), fc=eq.Dense(np.array([[1.0]]), np.array([1e9])))
    stats = eq.calibrate(graph, np.array([[1.0]]))
    quantized = eq.quantize(eq.quantize(graph, weights=W8), activations=A8, stats=stats, outputs=True)
    assert quantized["fc.float"].op.bias[0] == 1e9
    assert quantized["fc"].op.step is None


def test_a_layer_used_twice_stays_one_layer_where_it_reads_one_grid():
    m = Maker(26)
    conv = m.conv(2, 2, 1)
    graph = eq.Graph({"x": (2, 3)}, [eq.Node("a", conv, ["x"]), eq.Node("b", conv, ["x"]), eq.Node("c", conv, ["a"])], ["b", "c"])
    quantized = eq.quantize(graph, weights=W8, activations=A8, stats=eq.calibrate(graph, m.data(graph)))
    assert quantized["a.float"].op is quantized["b"].op is not quantized["c"].op


def test_scales_are_numbers_of_the_networks_type():
    for dtype, as_kept in (("float32", np.float32), ("float64", np.float64)):
        m = Maker(23, dtype)
        graph = handmade.mobile(m)
        quantized = eq.quantize(graph, weights=W8, activations=A8, stats=eq.calibrate(graph, m.data(graph)))
        scales = [node.op.grid.scale for node in quantized if getattr(node.op, "grid", None) is not None]
        assert len(scales) > 10
        assert all(np.array_equal(scale, scale.astype(as_kept)) for scale in scales)
        rounded_off = [scale for scale in scales if not np.array_equal(scale, scale.astype(np.float32))]
        assert bool(rounded_off) == (dtype == "float64")
    tiny = eq.UniformQuantizer().grid([-1.0, -1e-40], [1.0, 1e-40]).astype(np.float32)
    assert tiny.scale.tolist() == [float(np.float32(1 / 127)), 1.0]


def test_float32_is_rounded_in_its_own_precision_as_engines_do_unless_a_scale_underflows_there():
    x, scale = np.float32([0.3, 7.7, 2.5e-3]), np.float32(0.1) / np.float32(3)
    grid = eq.Grid(np.array([scale]), np.zeros(1), -(2**15), 2**15 - 1)
    assert grid.quantize(x).tolist() == np.rint(x / scale).tolist()
    tiny = eq.Grid(np.array([1e-42]), np.zeros(1), -128, 127)
    assert tiny.quantize(np.float32([5e-41, -1e-30, 0.0])).tolist() == [50, -128, 0]
    wide = eq.Grid(np.array([1.0]), np.zeros(1), -(2**31), 2**31 - 1)
    assert wide.quantize(np.float32([3e9, -3e9, 16777216])).tolist() == [2**31 - 1, -(2**31), 2**24]


@each_net
def test_none_leaves_everything_in_float(build):
    m = Maker(12)
    graph = build(m)
    quantized = eq.quantize(graph)
    assert [(n.name, n.op, n.inputs) for n in quantized] == [(n.name, n.op, n.inputs) for n in graph]


@each_net
@settings(max_examples=3)
@given(seed=st.integers(0, 99))
def test_sixteen_bits_are_close_to_float(build, seed):
    m = Maker(seed)
    graph = build(m)
    x = m.data(graph)
    quantized = eq.quantize(graph, weights=eq.UniformQuantizer(bits=16), activations=eq.UniformQuantizer(bits=16, symmetric=False),
                            stats=eq.calibrate(graph, x), biases=False)  # 32 bits do not hold a bias in steps of 16 + 16 bits
    assert eq.sqnr(eq.forward(graph, x), eq.forward(quantized, x)) > 45


@settings(max_examples=100)
@given(networks().flatmap(lambda g: st.tuples(st.just(g), batches(g))), quantizers())
def test_random_networks_can_be_quantized_and_keep_names_shapes_and_dtype(drawn, quantizer):
    graph, x = drawn
    stats = eq.calibrate(graph, x)
    quantized = eq.quantize(graph, weights=quantizer, activations=quantizer, stats=stats, outputs=True)
    before, after = eq.values(graph, x), eq.values(quantized, x)
    for name, value in before.items():
        assert after[name].shape == value.shape
        assert after[name].dtype == value.dtype
        assert np.isfinite(after[name]).all()
    assert quantized.outputs == graph.outputs
    for node in graph:
        if isinstance(node.op, eq.Weighted) and not isinstance(node.op, eq.BatchNorm):
            made = quantized[f"{node.name}.float" if f"{node.name}.float" in after else node.name].op
            assert len(np.unique(made.weight)) <= 2**quantizer.bits


@settings(max_examples=40)
@given(networks().flatmap(lambda g: st.tuples(st.just(g), batches(g))))
def test_quantizing_weights_twice_is_quantizing_once(drawn):
    graph, x = drawn
    once = eq.quantize(graph, weights=W8)
    twice = eq.quantize(once, weights=W8)
    for name, value in eq.values(once, x).items():
        assert np.array_equal(eq.values(twice, x)[name], value)


def test_a_shared_conv_is_quantized_alike_at_both_nodes():
    m = Maker(13)
    quantized = eq.quantize(handmade.shared(m), weights=W8)
    assert np.array_equal(quantized["first"].op.weight, quantized["second"].op.weight)


def test_fake_quantize_pins_what_it_touches():
    m = Maker(14)
    graph = handmade.plain(m)
    quantized = eq.quantize(graph, activations=A8, stats=eq.calibrate(graph, m.data(graph)))
    assert eq.degrees_of_freedom(quantized) == 0
    assert "FakeQuantize has a fixed grid" in eq.channels(quantized).pinned["act1"]


def test_the_network_given_stays_as_it_is():
    m = Maker(15)
    graph = handmade.plain(m)
    weight = graph["conv1"].op.weight.copy()
    eq.quantize(graph, weights=W8, activations=A8, stats=eq.calibrate(graph, m.data(graph)))
    assert np.array_equal(graph["conv1"].op.weight, weight)
    assert graph["conv1"].op.grid is None


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("bits", [1, 0, -8, 17, 8.0, "8", True, None])
def test_bits_outside_2_to_16_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be an integer from 2 to 16, got"):
        eq.UniformQuantizer(bits=bits)


@pytest.mark.parametrize(("options", "message"), [
    ({"granularity": "per_row"}, "granularity must be one of .*, got 'per_row'"),
    ({"rounding": "up"}, "rounding must be one of .*, got 'up'"),
    ({"granularity": "per_group"}, "group_size goes with granularity 'per_group', got None"),
    ({"group_size": 4}, "group_size goes with granularity 'per_group', got 4 with 'per_tensor'"),
    ({"granularity": "per_group", "group_size": 0}, "group_size must be a positive integer, got 0"),
    ({"granularity": "per_group", "group_size": 1.5}, "group_size must be a positive integer, got 1.5"),
])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        eq.UniformQuantizer(**options)


@pytest.mark.parametrize(("low", "high", "message"), [
    (np.nan, 1.0, "a range to quantize must be finite"), (0.0, np.inf, "a range to quantize must be finite"),
    (1.0, -1.0, "a range to quantize must not be empty, got low 1 above high -1")])
def test_bad_ranges_are_refused(low, high, message):
    with pytest.raises(ValueError, match=message):
        eq.UniformQuantizer().grid(low, high)


@pytest.mark.parametrize(("scale", "zero_point", "qmin", "qmax", "message"), [
    (0.0, 0.0, 0, 1, "Grid scale must be positive"), (-1.0, 0.0, 0, 1, "Grid scale must be positive"),
    (np.nan, 0.0, 0, 1, "Grid scale holds nan"), (1.0, 0.0, 1, 1, "Grid needs qmin < qmax"),
    (1.0, 0.5, 0, 3, "Grid zero_point must be whole"), (1.0, 9.0, 0, 3, "Grid zero_point must be whole and within")])
def test_bad_grids_are_refused(scale, zero_point, qmin, qmax, message):
    with pytest.raises(ValueError, match=message):
        eq.Grid(np.array([scale]), np.array([zero_point]), qmin, qmax)


def test_activations_need_statistics_of_this_graph():
    m = Maker(16)
    graph, other = handmade.plain(m), handmade.mobile(m)
    with pytest.raises(ValueError, match="quantizing activations needs their ranges: give stats=calibrate"):
        eq.quantize(graph, activations=A8)
    with pytest.raises(ValueError, match="the statistics lack value 'act': calibrate this graph"):
        eq.quantize(other, activations=A8, stats=eq.calibrate(graph, m.data(graph)))
    more = {"conv1": m.conv(6, 3, 3, 3, stride=2, padding=1), "conv2": m.conv(5, 6, 2, 2)}
    wider = eq.Graph.chain((3, 6, 6), **{n.name: n.op for n in graph} | more)
    with pytest.raises(ValueError, match="the statistics of value 'act1' have 4 channels, the network has 6"):
        eq.quantize(wider, activations=A8, stats=eq.calibrate(graph, m.data(graph)))


@pytest.mark.parametrize("wrong", [8, "int8", {"bits": 8}, eq.UniformQuantizer], ids=str)
@pytest.mark.parametrize("argument", ["weights", "activations"])
def test_what_is_no_quantizer_is_refused(argument, wrong):
    m = Maker(19)
    graph = handmade.plain(m)
    with pytest.raises(TypeError, match=re.escape(f"{argument} must be a quantizer or None (float), got {wrong!r}: "
                                                  "give for instance UniformQuantizer(bits=8)")):
        eq.quantize(graph, stats=eq.calibrate(graph, m.data(graph)), **{argument: wrong})


@pytest.mark.parametrize("again", [{"weights": W8}, {"activations": A8}, {}], ids=str)
def test_a_quantized_network_is_not_quantized_again(again):
    m = Maker(20)
    graph = handmade.plain(m)
    stats = eq.calibrate(graph, m.data(graph))
    quantized = eq.quantize(graph, weights=W8, activations=A8, stats=stats)
    with pytest.raises(ValueError, match=r"node 'x\.quantized': the network is quantized already: quantize the float network"):
        eq.quantize(quantized, stats=eq.calibrate(quantized, m.data(graph)), **again)


@pytest.mark.parametrize("method", ["one_step", "two_step", "cross_layer", "optimal"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_statistics_of_a_network_with_channels_of_other_sizes_are_refused(method, dtype):
    """Those of before an equalization for the network after it, and the other way round, whole or in shards; not those that fit."""
    m = Maker(30, dtype)
    graph = handmade.uneven(m)
    x = m.data(graph, 40)
    stats = eq.calibrate(graph, x[:20]) + eq.calibrate(graph, x[20:])
    result = eq.equalize(graph, method, stats=stats)
    after = result.factorization.apply(stats)
    refused = r"these are the statistics of another network: the weights of layer '\w+', channel \d+, are \S+ times as large in this " \
              r"one, as after an equalization; give factorization\.apply\(stats\), or calibrate this network"
    for network, wrong in ((result.graph, stats), (graph, after), (result.graph, eq.likely_ranges(graph, stats)),
                           (graph, result.factorization.apply(after))):
        with pytest.raises(ValueError, match=refused):
            eq.quantize(network, weights=W8, activations=A8, stats=wrong)
        with pytest.raises(ValueError, match=refused):
            eq.equalize(network, "two_step", stats=wrong)
    with pytest.raises(ValueError, match="statistics of different networks do not add up: the weights of layer"):
        stats + after
    with pytest.raises(ValueError, match="statistics of different networks do not add up: the weights of layer"):
        stats + eq.calibrate(result.graph, x)
    for network, right in ((graph, stats), (result.graph, after), (result.graph, eq.calibrate(result.graph, x)),
                           (result.graph, after + eq.calibrate(result.graph, x)), (graph, result.factorization.inverse().apply(after)),
                           (result.graph, eq.likely_ranges(result.graph, after)),
                           (eq.quantize(result.graph, weights=eq.UniformQuantizer(2)), after),  # weights first
                           (eq.quantize(result.graph, weights=eq.UniformQuantizer(4, granularity="per_channel")), after),
                           (result.graph, eq.Statistics(dict(after))), (result.graph, eq.Statistics(dict(stats)))):  # by hand: no telling
        eq.quantize(network, activations=A8, stats=right)


@each_net
def test_statistics_of_the_network_before_folding_fit_the_one_after(build):
    m = Maker(31)
    graph = build(m)
    stats, folded = eq.calibrate(graph, m.data(graph)), eq.fold_batchnorm(graph)
    again = eq.Graph(folded.inputs, [dataclasses.replace(node) for node in folded], folded.outputs)
    for network in (folded, again):
        eq.quantize(network, weights=W8, activations=A8, stats=stats)


def test_groups_are_for_weights():
    m = Maker(17)
    graph = handmade.plain(m)
    with pytest.raises(ValueError, match="granularity 'per_group' is for weights"):
        eq.quantize(graph, activations=eq.UniformQuantizer(granularity="per_group", group_size=2), stats=eq.calibrate(graph, m.data(graph)))


def test_a_grid_that_does_not_fit_its_value_is_refused():
    grid = eq.UniformQuantizer().grid(np.full(3, -1.0), np.ones(3))
    with pytest.raises(ValueError, match=r"node 'fq': FakeQuantize has scales of shape \(3,\) for 2 channels"):
        eq.Graph.chain((2,), fq=eq.FakeQuantize(grid))


def test_what_is_no_grid_and_no_statistics_is_refused():
    with pytest.raises(TypeError, match=r"FakeQuantize needs a Grid, got 3: UniformQuantizer\(\.\.\.\)\.grid"):
        eq.FakeQuantize(3)
    m = Maker(27)
    graph = handmade.plain(m)
    with pytest.raises(TypeError, match=r"stats must be what calibrate\(graph, batches\) returns, got list"):
        eq.quantize(graph, activations=A8, stats=[m.data(graph)])


def test_steps_that_do_not_fit_are_refused():
    grid = eq.UniformQuantizer().grid([-1.0], [1.0])
    with pytest.raises(ValueError, match=r"node 'fq': FakeQuantize has steps of shape \(3,\) for 2 channels"):
        eq.Graph.chain((2,), fq=eq.FakeQuantize(grid, np.ones(3)))
    with pytest.raises(ValueError, match="FakeQuantize step must be positive, got 0"):
        eq.FakeQuantize(grid, np.array([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"FakeQuantize step must have 1 axes, got shape \(1, 1\)"):
        eq.FakeQuantize(grid, np.ones((1, 1)))


def renamed(graph, name, other):
    """The network with a value under another name."""
    new = {value: other if value == name else value for value in graph.shapes}
    nodes = [dataclasses.replace(node, name=new[node.name], inputs=tuple(new[i] for i in node.inputs)) for node in graph]
    return eq.Graph({new[value]: shape for value, shape in graph.inputs.items()}, nodes, [new[value] for value in graph.outputs])


def test_no_name_that_is_made_takes_one_that_is_there():
    """Whatever the network calls its values: under each name that quantize makes for it, quantized, corrected and measured as before."""
    m = Maker(18)
    graph = eq.Graph.chain((2, 5), a=m.conv(3, 2, 2), act=eq.Clip(-0.2, np.array([0.1, 0.3, 1.0])), b=m.conv(3, 3, 1),
                           leaky=eq.LeakyReLU(), y=m.conv(2, 3, 1))
    x = m.data(graph)
    options = {"weights": W8, "activations": A8, "outputs": True}

    def found(graph):
        quantized = eq.quantize(graph, stats=eq.calibrate(graph, x), **options)
        noise = local_sqnr(graph, quantized, [x])
        corrected = eq.correct_bias(graph, quantized, x)
        return quantized, np.array(list(noise.values())), np.concatenate(list(corrected.shifts.values())), eq.forward(corrected.graph, x)
    quantized, *expected = found(graph)
    made = [name for name in quantized.shapes if name not in graph.shapes]
    assert len(made) >= 4
    for name, other in itertools.product(graph.shapes, made):
        _, *other_found = found(renamed(graph, name, other))
        for ours, theirs in zip(other_found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{name} called {other}")


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_a_bias_too_large_for_its_accumulator_raises_the_scale_of_the_weights(granularity):
    weight = np.array([[1.0, -0.5], [1e-12, 2e-12]])
    bias = np.array([0.25, 3.0])
    net = eq.Graph.chain((2,), fc=eq.Dense(weight, bias), act=eq.ReLU(), out=eq.Dense(np.ones((1, 2))))
    stats = eq.calibrate(net, np.array([[1.0, 1.0], [-1.0, 0.5]]))
    quantized = eq.quantize(net, weights=eq.UniformQuantizer(8, granularity=granularity),
                            activations=eq.UniformQuantizer(8, symmetric=False), stats=stats)
    op = quantized["fc"].op
    (input_scale,) = quantized["x.quantized"].op.grid.scale
    accumulator = bias / (input_scale * op.grid.scale.reshape(-1))
    assert np.abs(accumulator).max() < 2**31
    np.testing.assert_allclose(op.bias, bias, rtol=1e-2)


@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_every_group_of_weights_has_its_own_zero_point(group_size):
    """Affine: ranges of all signs, group by group, so that no two have the same; by the formula in plain numbers."""
    rng = np.random.default_rng(31)
    op = eq.Conv(rng.normal(size=(3, 5, 2)) + rng.normal(size=(3, 5, 1)))
    grid = eq.UniformQuantizer(bits=5, symmetric=False, granularity="per_group", group_size=group_size).weight_grid(op)
    scale, zero_point = (np.broadcast_to(v, op.weight.shape) for v in (grid.scale, grid.zero_point))
    for o, i, tap in np.ndindex(*op.weight.shape):
        start = i // group_size * group_size
        group = [float(w) for w in op.weight[o, start:start + group_size].ravel()]
        low, high = min(0.0, *group), max(0.0, *group)
        step = (high - low) / 31
        assert scale[o, i, tap] == pytest.approx(step, rel=1e-12)
        assert zero_point[o, i, tap] == min(max(round(grid.qmin - low / step), grid.qmin), grid.qmax)
    assert len(np.unique(grid.zero_point)) >= 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_smallest_step_of_sums_is_the_smallest_normal_number(dtype):
    tiny = float(np.finfo(dtype).tiny)
    grid = eq.ops.grid.Grid(np.float64(1.0), np.float64(0.0), -127, 127)
    op = eq.Dense(np.ones((1, 1)), grid=grid)
    assert accumulator_step(op, dataclasses.replace(grid, scale=np.float64(tiny)), dtype).tolist() == [tiny]
    assert accumulator_step(op, dataclasses.replace(grid, scale=np.float64(tiny / 2)), dtype) is None


def test_ops_keep_values_on_a_grid_where_they_move_entries_or_clip_them_between_its_numbers():
    grid = eq.Grid(np.array([0.5]), np.array([2.0]), 0, 7)  # -1, -0.5, ... 2.5
    by_channel = eq.Grid(np.array([0.5, 0.25]), np.zeros(2), 0, 7)
    for op, kept in ((eq.MaxPool(2), True), (eq.Flatten(), True), (eq.AvgPool(2), False), (eq.LeakyReLU(0.5), False), (eq.Tanh(), False),
                     (eq.ReLU(), True), (eq.Clip(-0.5, 1.5), True), (eq.Clip(-0.5, 1.6), False), (eq.Clip(-0.6, 1.5), False),
                     (eq.Clip(0.0, np.array([1.5, 2.0])), True), (eq.Clip(0.0, np.array([1.5, 2.1])), False),
                     (eq.Clip(-np.inf, np.array([np.inf, 2.0])), True), (eq.Clip(0.0, 3.0), False)):
        assert keeps_grid(op, grid) == kept, op
        assert not keeps_grid(op, by_channel)
        net = eq.Graph({"x": (2, 4)}, [eq.Node("x8", eq.FakeQuantize(grid), ["x"]), eq.Node("y", op, ["x8"]),
                                       eq.Node("z", eq.Identity(), ["y"])], ["z"])
        assert [grid_of(net, value) for value in ("x", "x8", "y", "z")] == [None, grid, *[grid if kept else None] * 2]


def test_stored_values_keep_their_names_but_for_inputs():
    net = eq.Graph.chain((1,), a=eq.Dense([[2.0]]), act=eq.Clip(-1.0, 1.5), b=eq.Dense([[1.0]]))
    q = eq.quantize(net, activations=eq.UniformQuantizer(), stats=eq.calibrate(net, np.array([[1.0], [-2.0]])), outputs=True)
    assert {"x.quantized", "a.quantized", "act", "b"} <= set(q.shapes)
    assert [stored_name(q, value) for value in net.shapes] == ["x.quantized", "a", "act", "b"]


def test_a_rounded_bias_tells_how_many_channels_have_no_room_for_theirs():
    """Where products leave no room at all, a bias of 0 needs none."""
    read = eq.FakeQuantize(eq.Grid(np.ones(1), np.zeros(1), 0, 511))
    wide = eq.Grid(np.ones((1, 1)), np.zeros((1, 1)), -(2**24), 2**24)
    for weight, bias, lost, left in ((2.0**23, [0.0, 7.2, -3.0], 2, [0, 0, 0]), (1.0, [0.0, 7.2, -3.0], 0, [0, 7, -3])):
        op = eq.Dense(np.full((3, 1), weight), np.array(bias), grid=wide)
        net = eq.Graph.chain((1,), q=read, fc=op)
        rounded_op, count = rounded_bias(net, net["fc"], op)
        assert (rounded_op.bias.tolist(), count) == (left, lost)


def test_inputs_are_stored_even_where_an_activation_alone_reads_them():
    """No op comes before them that an activation could be fused with."""
    net = eq.Graph.chain((2,), act=eq.ReLU(), fc=eq.Dense(np.ones((1, 2))))
    assert stored_values(net) == ["x", "act"]


@pytest.mark.parametrize("op", [eq.ReLU(), eq.LeakyReLU(0.1), eq.PReLU(np.ones(2)), eq.Clip(0, 1)], ids=lambda op: type(op).__name__)
def test_what_a_fused_activation_reads_is_not_stored(op):
    net = eq.Graph.chain((2,), fc=eq.Dense(np.ones((2, 2))), act=op, out=eq.Dense(np.ones((1, 2))))
    assert stored_values(net) == ["x", "act"]


@pytest.mark.parametrize("qmax", [2**24 - 1, 2**24, 2**25 - 1])
def test_whole_numbers_that_single_precision_does_not_hold_are_rounded_in_double(qmax):
    grid = eq.ops.grid.Grid(np.float64(np.float32(1 / 3)), np.float64(0.0), -qmax, qmax)
    x = np.random.default_rng(4).uniform(qmax / 6, qmax / 3, 100).astype(np.float32)
    expected = [round(Fraction(float(v)) / Fraction(float(grid.scale))) for v in x]
    assert np.abs(grid.quantize(x) - np.array(expected)).max() <= (qmax < 2**24)  # in single precision a quotient may lie on a half


# ------------------------------------------------------------------------------------------------ attention


def attention(*, softmax=True):
    """Queries, keys and values; a mask from outside, times a large number as exporters write it; perhaps no Softmax."""
    rng = np.random.default_rng(0)
    one = np.ones(1)
    nodes = [eq.Node(name, eq.Conv(rng.normal(size=(4, 3, 1))), ["x"]) for name in "qkv"]
    nodes += [eq.Node("mask", eq.BatchNorm(-1e30 * one, 0 * one, one, one, eps=0.0), ["m"]),
              eq.Node("scores", eq.Scores(2, scale=0.5), ["q", "k"]), eq.Node("masked", eq.Add(), ["scores", "mask"])]
    if softmax:
        nodes.append(eq.Node("prob", eq.Softmax(-1), ["masked"]))
    nodes += [eq.Node("mix", eq.Mix(2), ["prob" if softmax else "masked", "v"]),
              eq.Node("out", eq.Conv(rng.normal(size=(3, 4, 1))), ["mix"])]
    x = {"x": rng.normal(size=(8, 3, 5)), "m": (rng.random((8, 1, 1, 5)) < 0.6).astype(float)}
    x["m"][..., 0] = 1
    return eq.Graph({"x": (3, 5), "m": (1, 1, 5)}, nodes, ["out"]), x


def test_scores_and_masks_stay_in_float_until_their_softmax():
    graph, x = attention()
    assert stored_values(graph) == ["x", "q", "k", "v", "prob", "mix"]
    stats = eq.calibrate(graph, x)
    quantized = eq.quantize(graph, stats=stats, weights=eq.UniformQuantizer(8), activations=eq.UniformQuantizer(8, symmetric=False))
    assert eq.sqnr(eq.forward(graph, x), eq.forward(quantized, x)) > 25


def test_scores_that_no_softmax_reads_are_stored_as_any_value():
    graph, _ = attention(softmax=False)
    assert stored_values(graph) == ["x", "m", "q", "k", "v", "mask", "scores", "masked", "mix"]


def test_what_a_classifier_puts_through_softmax_is_stored_as_before():
    net = eq.Graph.chain((2,), fc=eq.Dense(np.eye(2)), prob=eq.Softmax())
    assert stored_values(net) == ["x", "fc"]


# ------------------------------------------------------------------------------------------------ ranges that are given

RANGED = {
    "per tensor": (eq.UniformQuantizer(4), eq.UniformQuantizer(4, symmetric=False)),
    "per channel": (eq.UniformQuantizer(4, granularity="per_channel"), eq.UniformQuantizer(4, symmetric=False, granularity="per_channel")),
    "per group": (eq.UniformQuantizer(4, granularity="per_group", group_size=2), eq.UniformQuantizer(4)),
}


def ranged_net():
    rng = np.random.default_rng(3)
    shared = eq.Conv(rng.normal(size=(4, 4, 1, 1)))
    net = eq.Graph({"x": (3, 4, 4)}, [
        eq.Node("stem", eq.Conv(rng.normal(size=(4, 3, 3, 3))), ["x"]), eq.Node("act", eq.ReLU(), ["stem"]),
        eq.Node("a", shared, ["act"]), eq.Node("b", shared, ["a"])], ["b"])
    return net, rng.normal(size=(8, 3, 4, 4))


@pytest.mark.parametrize(("weights", "activations"), RANGED.values(), ids=RANGED)
def test_ranges_that_are_those_of_the_extrema_change_nothing(weights, activations):
    net, x = ranged_net()
    stats = eq.calibrate(net, x)
    ranges = tensor_ranges(net, weights=weights, activations=activations, stats=stats)
    assert list(ranges) == ["x", "act", "a", "stem.weight", "a.weight"]
    expected = eq.forward(eq.quantize(net, weights=weights, activations=activations, stats=stats), x)
    for seen in (stats, None):  # with all ranges given, statistics are not asked for
        made = eq.quantize(net, weights=weights, activations=activations, ranges=ranges, stats=seen)
        assert np.array_equal(eq.forward(made, x), expected)


def test_a_range_given_is_the_range_of_the_grid_and_others_stay():
    net, x = ranged_net()
    stats, (weights, activations) = eq.calibrate(net, x), RANGED["per tensor"]
    before = eq.quantize(net, weights=weights, activations=activations, stats=stats)
    after = eq.quantize(net, weights=weights, activations=activations, stats=stats, ranges={"act": (0, 1.5), "a.weight": (-0.7, 0.1)})
    grids = [{node.name: node.op.grid for node in q if getattr(node.op, "grid", None) is not None} for q in (before, after)]
    assert float(grids[1]["act"].scale[0]) == pytest.approx(1.5 / 15) and grids[1]["act"].zero_point == 0
    for name in ("a.float", "b"):  # one op at two nodes
        assert float(grids[1][name].scale.item()) == pytest.approx(0.7 / 7) and np.abs(after[name].op.weight).max() <= 0.8 + 1e-12
    assert {n: float(g.scale.item()) for n, g in grids[0].items() if n not in ("act", "a.float", "b")} == \
        {n: float(g.scale.item()) for n, g in grids[1].items() if n not in ("act", "a.float", "b")}


def test_ranges_by_channel_are_those_of_the_channels():
    net, x = ranged_net()
    stats, (weights, activations) = eq.calibrate(net, x), RANGED["per channel"]
    high = np.array([1.0, 2.0, 3.0, 4.0])
    for ends in ((-high, high), (-high.reshape(4, 1, 1, 1), 0.5)):
        q = eq.quantize(net, weights=weights, activations=activations, stats=stats, ranges={"act": (0.0, high), "stem.weight": ends})
        np.testing.assert_allclose(q["stem"].op.grid.scale.reshape(-1), high / 7)
        np.testing.assert_allclose(q["act"].op.grid.scale, high / 15)
    groups = np.arange(1.0, 17).reshape(4, 4, 1, 1)
    q = eq.quantize(net, weights=RANGED["per group"][0], ranges={"a.weight": (-groups, 0)})
    np.testing.assert_allclose(q["a"].op.grid.scale, groups / 7)


@pytest.mark.parametrize(("ranges", "said"), [
    ({"ghost": (0, 1)}, "a range is given for 'ghost', which is not quantized here; quantized are a, a.weight, act, stem.weight, x"),
    ({"b.weight": (0, 1)}, "given for 'b.weight'"), ({"stem": (0, 1)}, "given for 'stem'"),
    ({"act": 3.0}, r"the range of 'act' must be \(low, high\), got 3.0"),
    ({"act": "01"}, r"the range of 'act' must be \(low, high\), got '01'"),
    ({"act": (0, 1, 2)}, r"the range of 'act' must be \(low, high\)"),
    ({"act": (0, math.nan)}, "the range of 'act' must be finite, got NaN or infinity"),
    ({"act": (-math.inf, 1)}, "the range of 'act' must be finite"),
    ({"act": (1, 0.5)}, "the range of 'act' must not be empty, got low 1 above high 0.5"),
    ({"act": (0, np.ones(4))}, r"'act' must be numbers or arrays that broadcast to \(1,\), the scales of its grid, got shapes"),
    ({"a.weight": (0, np.ones((1, 1, 1, 1, 1)))}, r"broadcast to \(1, 1, 1, 1\)"),
    ({"a.weight": (0, np.ones(3))}, r"broadcast to \(1, 1, 1, 1\)"),
])
def test_bad_ranges_of_tensors_are_refused(ranges, said):
    net, x = ranged_net()
    with pytest.raises(ValueError, match=said):
        eq.quantize(net, weights=RANGED["per tensor"][0], activations=RANGED["per tensor"][1], stats=eq.calibrate(net, x), ranges=ranges)


def test_ranges_of_what_stays_in_float_are_refused():
    net, _ = ranged_net()
    with pytest.raises(ValueError, match=r"given for 'act', which is not quantized here; quantized are a\.weight, stem\.weight"):
        eq.quantize(net, weights=RANGED["per tensor"][0], ranges={"act": (0, 1)})
    with pytest.raises(ValueError, match="needs their ranges: give stats"):
        eq.quantize(net, activations=RANGED["per tensor"][1], ranges={"act": (0, 1)})
