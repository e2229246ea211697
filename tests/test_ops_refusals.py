"""What ops refuse when they are made: each bad parameter by its name, the rule, what was given, and where there is one, the remedy."""

import contextlib
import itertools
import math
import tracemalloc

import numpy as np
import pytest

import eqfact as eq

one = np.ones(2)
kernel = np.ones((4, 3, 3, 3))


def with_entry(array, value):
    array = array.copy()
    array.flat[-1] = value
    return array


@pytest.mark.parametrize(("make", "error", "message"), [
    # weights: dtype, axes, sizes, finite
    (lambda: eq.Dense(np.ones((2, 3), int)), TypeError,
     r"Dense weight must be a floating array \(float32 or float64\), got int64; convert it with"),
    (lambda: eq.Dense(np.ones((2, 3), object)), TypeError, "Dense weight must be a floating array .*, got object"),
    (lambda: eq.Dense(np.ones((2, 3), complex)), TypeError, "Dense weight must be a floating array .*, got complex128"),
    (lambda: eq.Dense(np.ones((2, 3)), np.ones(2, int)), TypeError, "Dense bias must be a floating array .*, got int64"),
    (lambda: eq.Dense(np.ones(3)), ValueError, r"Dense weight must be \(out, in\), got shape \(3,\)"),
    (lambda: eq.Dense(np.ones((0, 3))), ValueError, r"Dense weight has an axis of size 0: shape \(0, 3\)"),
    (lambda: eq.Dense(np.ones((3, 0))), ValueError, r"Dense weight has an axis of size 0: shape \(3, 0\)"),
    (lambda: eq.Dense(np.ones((2, 3)), np.ones(3)), ValueError, "Dense bias has 3 entries for 2 output channels"),
    (lambda: eq.Dense(np.ones((2, 3)), np.ones((2, 1))), ValueError, r"Dense bias must have 1 axes, got shape \(2, 1\)"),
    (lambda: eq.Dense(with_entry(np.ones((2, 3)), np.nan)), ValueError,
     r"Dense weight holds nan at index \(1, 2\); weights must be finite"),
    (lambda: eq.Dense(np.ones((2, 3)), with_entry(one, -np.inf)), ValueError,
     r"Dense bias holds -inf at index \(1,\); weights must be finite"),
    (lambda: eq.Conv(np.ones((4, 3))), ValueError,
     r"Conv weight must be \(out, in // groups, \*kernel\) with 1 to 3 spatial axes, got shape \(4, 3\)"),
    (lambda: eq.Conv(np.ones((4, 3, 1, 1, 1, 1))), ValueError, "Conv weight must be .* with 1 to 3 spatial axes"),
    (lambda: eq.Conv(np.ones((4, 3, 0))), ValueError, "Conv weight has an axis of size 0"),
    (lambda: eq.Conv(kernel, groups=3), ValueError, "Conv has 4 output channels, which 3 groups do not divide"),
    (lambda: eq.ConvTranspose(kernel, groups=3), ValueError, "ConvTranspose has 4 output channels, which 3 groups do not divide"),
    # numbers per axis
    (lambda: eq.Conv(kernel, groups=0), ValueError, "Conv groups must be at least 1, got 0"),
    (lambda: eq.Conv(kernel, groups=(1, 1)), TypeError, "Conv groups must be one integer"),
    (lambda: eq.Conv(kernel, stride=0), ValueError, "Conv stride must be at least 1, got 0"),
    (lambda: eq.Conv(kernel, stride=1.5), TypeError, "Conv stride must be an integer or one integer per spatial axis, got 1.5"),
    (lambda: eq.Conv(kernel, stride=True), TypeError, "Conv stride must be an integer"),
    (lambda: eq.Conv(kernel, stride=(1, 2, 1)), ValueError, "stride has 3 entries .* for 2 spatial axes"),
    (lambda: eq.Conv(kernel, dilation=(1, 0)), ValueError, "Conv dilation must be at least 1, got 0"),
    (lambda: eq.Conv(kernel, padding=-1), ValueError, "padding must be at least 0, got -1"),
    (lambda: eq.Conv(kernel, padding="same"), TypeError, "padding must be an integer .*, got 'same'"),
    (lambda: eq.Conv(kernel, padding=(1, 1, 1)), ValueError, "padding has 3 entries .* for 2 spatial axes"),
    (lambda: eq.Conv(kernel, padding=((1, 1, 1), (0, 0))), ValueError, r"padding of an axis must be one number or \(before, after\)"),
    (lambda: eq.ConvTranspose(kernel, output_padding=1), ValueError, "ConvTranspose output_padding .1, 1. must be smaller than stride"),
    (lambda: eq.ConvTranspose(kernel, output_padding=-1), ValueError, "ConvTranspose output_padding must be at least 0"),
    (lambda: eq.MaxPool(0), ValueError, "MaxPool kernel must be at least 1, got 0"),
    (lambda: eq.AvgPool(2, stride=0), ValueError, "AvgPool stride must be at least 1, got 0"),
    (lambda: eq.MaxPool("2"), TypeError, "MaxPool kernel must be an integer"),
    (lambda: eq.MaxPool(2, dilation=0), ValueError, "MaxPool dilation must be at least 1, got 0"),
    (lambda: eq.LpPool(2, p=0), ValueError, "LpPool p must be at least 1, got 0"),
    (lambda: eq.LpPool(2, p=(1, 2)), TypeError, "LpPool p must be an integer"),
    (lambda: eq.MaxPool(2, padding=1, dilation=2).output_shape((1, 1)), ValueError, "windows .* that see nothing but padding"),
    (lambda: eq.Blend(np.ones(2)), ValueError, "Blend matrix must have 2 axes"),
    (lambda: eq.Blend(np.ones((2, 2)), axis=0), ValueError, "Blend axis must be at least 1, got 0"),
    (lambda: eq.Blend(np.ones((2, 3))).output_shape((1, 2)), ValueError, r"Blend with a matrix \(2, 3\) along axis 1 does not fit"),
    (lambda: eq.Extend(np.ones((2, 3)), front=1), TypeError, "Extend front must be True or False, got 1"),
    (lambda: eq.Extend(np.ones((2, 3))).output_shape((2, 4)), ValueError, r"Extend by a constant of shape \(2, 3\) along axis 0 does not"),
    (lambda: eq.Extend(np.ones((2, 3)), axis=2).output_shape((2, 3)), ValueError, "Extend by a constant .* along axis 2 does not fit"),
    (lambda: eq.Sub().output_shape((1,), (1,), (1,)), ValueError, "Sub reads two values, got 3"),
    (lambda: eq.Upsample(0), ValueError, "Upsample factor must be at least 1, got 0"),
    (lambda: eq.Upsample(1.5), TypeError, "Upsample factor must be an integer"),
    # batch normalization
    (lambda: eq.BatchNorm(one, one, np.ones(3), one), ValueError, "BatchNorm parameters must have equal lengths, got .*'mean': 3"),
    (lambda: eq.BatchNorm(one, one, one, -one), ValueError, "BatchNorm needs var >= 0 and var [+] eps > 0, got a smallest var of -1"),
    (lambda: eq.BatchNorm(one, one, one, 0 * one, eps=0), ValueError,
     "BatchNorm needs var >= 0 and var [+] eps > 0, got a smallest var of 0, eps 0"),
    (lambda: eq.BatchNorm(one, one, one, one, eps=math.nan), ValueError, "BatchNorm needs .* eps nan"),
    (lambda: eq.BatchNorm(one, one, one, one, eps=-1e-5), ValueError, "BatchNorm needs .* eps -1e-05"),
    (lambda: eq.BatchNorm(one, np.ones(2, int), one, one), TypeError, "BatchNorm beta must be a floating array"),
    (lambda: eq.BatchNorm(one, one, with_entry(one, np.nan), one), ValueError, r"BatchNorm mean holds nan at index \(1,\)"),
    # activations
    (lambda: eq.LeakyReLU(math.inf), ValueError, "LeakyReLU slope must be finite, got inf"),
    (lambda: eq.PReLU(np.ones((2, 1))), ValueError, r"PReLU slope must be one number or \(C,\), got shape \(2, 1\)"),
    (lambda: eq.PReLU(with_entry(one, np.nan)), ValueError, "PReLU slope holds nan"),
    (lambda: eq.PReLU(np.ones(2, int)), TypeError, "PReLU slope must be a floating array"),
    (lambda: eq.Clip(6, 0), ValueError, "Clip needs low <= high, got low 6.0 and high 0.0"),
    (lambda: eq.Clip(np.array([0.0, 2.0]), 1.0), ValueError, "Clip needs low <= high"),
    (lambda: eq.Clip(math.nan, 6), ValueError, "Clip low holds NaN"),
    (lambda: eq.Clip(0.0, with_entry(one, np.nan)), ValueError, "Clip high holds NaN"),
    (lambda: eq.Clip(0.0, np.ones(2, int)), TypeError, "Clip high must be a floating array"),
    (lambda: eq.Clip(np.zeros(2), np.ones(3)), ValueError, "Clip has 2 low bounds and 3 high ones"),
    (lambda: eq.Clip(0.0, np.ones((2, 1, 1))), ValueError, r"Clip high must have 1 axes, got shape \(2, 1, 1\)"),
    (lambda: eq.HardSigmoid(math.inf), ValueError, "HardSigmoid alpha must be finite, got inf"),
    (lambda: eq.Softmax(0), ValueError, r"Softmax axis must be an integer other than 0 \(the batch\), got 0"),
    (lambda: eq.Softmax(1.0), ValueError, "Softmax axis must be an integer"),
    (lambda: eq.Pad(1, math.nan), ValueError, "Pad value must not be NaN"),
    # channels
    (lambda: eq.Slice(0.0, 2), TypeError, "Slice start must be an integer, got 0.0"),
    (lambda: eq.Slice(0, None), TypeError, "Slice stop must be an integer, got None"),
    (lambda: eq.Take((0,), axis=-1), ValueError, "Take axis must be at least 0, got -1"),
    (lambda: eq.Take(()), ValueError, "Take needs at least one index"),
    (lambda: eq.Take((0, -1)), ValueError, "Take indices must be at least 0, got -1"),
    (lambda: eq.Take((0, 3)).output_shape((3, 4)), ValueError, r"Take of index 3 along axis 0 does not fit a value of shape \(3, 4\)"),
    (lambda: eq.Take((0,), axis=2).output_shape((3, 4)), ValueError, "Take of index 0 along axis 2 does not fit"),
    (lambda: eq.Permute((0, 0)), ValueError, r"Permute order must name every channel from 0 to 1 once, got \(0, 0\)"),
    (lambda: eq.Permute((1, 2)), ValueError, "Permute order must name every channel from 0 to 1 once"),
    (lambda: eq.Permute((0, 1.9)), TypeError, r"Permute order must hold integers, got \(0, 1.9\)"),
    (lambda: eq.Transpose((0, 2)), ValueError, "Transpose axes must name every axis of .* from 0 to 1 once"),
    (lambda: eq.Unflatten((4,)), ValueError, r"Unflatten needs a shape \(C, \*spatial\), got \(4,\)"),
    (lambda: eq.Unflatten((2, 0)), ValueError, "Unflatten shape must be at least 1, got 0"),
    # factors that do not pass
    (lambda: eq.ReLU().rescale(2 * one, one), ValueError, "ReLU passes factors on: the factors of its output must be those of its input"),
    (lambda: eq.Add().rescale(one, one, 2 * one), ValueError, "Add passes factors on"),
    (lambda: eq.Max().rescale(np.array([2.0, 1.0]), np.array([2.0, 1.0]), 2 * one[:1]), ValueError, "Max passes factors on"),
    (lambda: eq.Extend(np.ones((1, 2))).rescale(np.array([2.0, 2.0, 3.0]), one), ValueError, "Extend passes factors on"),
    (lambda: eq.Sigmoid().rescale(2 * one, 2 * one), ValueError,
     r"Sigmoid is not positively homogeneous: its factors must be 1, got \[2.0, 2.0\]"),
    (lambda: eq.Mul().rescale(5 * one, 2 * one, 2 * one), ValueError,
     "Mul multiplies values, so their factors multiply: channel 0 of its output must have the factor 4, got 5"),
    (lambda: eq.Mul().rescale(np.array([4.0, 5.0]), 2 * one, 2 * one), ValueError, "channel 1 of its output must have the factor 4, got 5"),
    (lambda: eq.LayerNorm(np.ones(3)).rescale(np.ones(3), np.array([1.0, 2.0, 2.0])), ValueError,
     "LayerNorm divides channels by what they come to together: they must share one factor, got 1 to 2"),
    (lambda: eq.LayerNorm(np.ones(3), np.ones(2)), ValueError, "LayerNorm needs as many betas as gammas, got 2 and 3"),
    (lambda: eq.LayerNorm(np.ones(3), eps=-1.0), ValueError, "LayerNorm eps must be a number of at least 0, or one for each of 1 groups"),
    (lambda: eq.LayerNorm(np.ones(3)).output_shape((4, 2)), ValueError, "LayerNorm has 3 channels, got 4"),
    (lambda: eq.GroupNorm(2, np.ones(3)), ValueError, "GroupNorm has 3 channels, which 2 groups do not divide"),
    (lambda: eq.GroupNorm(2, np.ones(4), eps=np.ones(3)), ValueError, "GroupNorm eps must be .* one for each of 2 groups"),
    (lambda: eq.Scores(0), ValueError, "Scores heads must be at least 1, got 0"),
    (lambda: eq.Scores(4, 3), ValueError, "Scores has 4 heads, which 3 heads of keys and values do not divide"),
    (lambda: eq.Scores(2, scale=np.inf), ValueError, "Scores scale must be finite, got inf"),
    (lambda: eq.Scores(2).output_shape((4, 3)), ValueError, "Scores reads two values, got 1"),
    (lambda: eq.Scores(2).output_shape((4, 3), (4, 2, 3)), ValueError, "Scores reads queries and keys over tokens, with equal sizes"),
    (lambda: eq.Scores(2).output_shape((4,), (4,)), ValueError, "Scores reads queries and keys over tokens"),
    (lambda: eq.Scores(2).output_shape((5, 3), (4, 3)), ValueError, "Scores reads queries of 5 channels, which 2 heads do not divide"),
    (lambda: eq.Scores(2).output_shape((4, 3), (6, 3)), ValueError,
     "Scores needs queries and keys of equally many channels a head, got 2 and 3"),
    (lambda: eq.Scores(1).rescale(4 * one, np.ones(1), np.array([2.0])), ValueError, "Scores multiplies values.* the factor 2, got 4"),
    (lambda: eq.Mix(2).output_shape((2, 3, 4), (6, 3)), ValueError, "Mix reads probabilities .* got .2, 3, 4. and .6, 3."),
    (lambda: eq.Mix(2).output_shape((3, 3, 4), (6, 4)), ValueError, "Mix has 2 heads, got probabilities of 3"),
    (lambda: eq.Rotary(1, np.ones((1, 2)), np.ones((1, 3))), ValueError, "Rotary needs cos and sin of one shape"),
    (lambda: eq.Rotary(1, np.ones((1, 2)), np.ones((1, 2)), 1), TypeError, "Rotary interleaved must be True or False, got 1"),
    (lambda: eq.Rotary(1, np.ones((1, 2)), np.ones((1, 2))).output_shape((2, 3)), ValueError, "Rotary has angles for 2 tokens"),
    (lambda: eq.Rotary(2, np.ones((1, 2)), np.ones((1, 2))).output_shape((2, 2)), ValueError,
     "Rotary turns 1 pairs of channels in each of 2"),
    (lambda: eq.Rotary(1, np.ones((1, 2)), np.ones((1, 2))).rescale(np.array([1.0, 2.0]), np.array([1.0, 2.0])), ValueError,
     "Rotary turns channels 0 and 1 into each other: they must share one factor"),
    (lambda: eq.Softmax(mask="none"), ValueError, "Softmax mask must be an array, 'causal' or None, got 'none'"),
    (lambda: eq.Softmax(mask=np.array([np.inf])), ValueError, "Softmax mask must hold numbers or minus infinity"),
    (lambda: eq.Softmax(mask=np.array([0, np.inf])), ValueError, "Softmax mask must hold numbers or minus infinity"),
    (lambda: eq.Sloped(eq.SiLU(), np.array([1.0, -1.0])), ValueError, "Sloped slope must be positive and finite, got -1"),
    (lambda: eq.Sloped(eq.SiLU(), np.array([1.0, np.inf])), ValueError, "Sloped slope"),
    (lambda: eq.Softmax(mask=np.array([-np.inf])).output_shape((3,)), ValueError, "Softmax mask leaves out all entries of a line"),
    (lambda: eq.Softmax(mask=np.ones(2)).output_shape((3,)), ValueError, "Softmax mask of shape .2,. does not fit a value of shape .3,."),
    (lambda: eq.Softmax(1, "causal").output_shape((3, 3)), ValueError, "Softmax with a causal mask goes along the last of two axes"),
    (lambda: eq.Pad(1, 1.5).rescale(2 * one, 2 * one), ValueError,
     "Pad with the constant 1.5 is not positively homogeneous: its factors must be 1"),
    (lambda: eq.Transpose((1, 0)).rescale(np.array([2.0, 1.0]), one), ValueError,
     "all channels of its input and output must share one factor"),
])
def test_a_bad_parameter_is_refused_by_its_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("op", [eq.Add(), eq.ops.Sub(), eq.ops.Max(), eq.ops.Min(), eq.Concat(axis=1)], ids=repr)
@pytest.mark.parametrize("which", [0, 1])
def test_inputs_that_are_tied_must_have_the_same_factors(op, which):
    same = np.array([2.0, 4.0])
    assert op.rescale(same, same, same) is op
    factors = [same, same]
    factors[which] = np.array([2.0, 8.0])
    with pytest.raises(ValueError):
        op.rescale(same, *factors)


@pytest.mark.parametrize("n, kernel", [(1, 2), (2, 3), (4, 2), (5, 4)])
def test_windows_that_see_nothing_but_padding_are_refused(n, kernel):
    """Against every tap of every window."""
    found = []
    for dilation, stride in itertools.product(range(1, 8), range(1, 5)):
        reach = dilation * (kernel - 1)
        for before, after in itertools.product(range(min(reach, 9) + 1), repeat=2):
            taps = np.arange(0, n + before + after - reach, stride)[:, None] - before + np.arange(kernel) * dilation
            if len(taps):
                seen = ((taps >= 0) & (taps < n)).any(axis=1).all()
                pool = eq.MaxPool((kernel,), stride=stride, padding=((before, after),), dilation=dilation)
                found.append(seen)
                if seen:
                    assert pool.output_shape((1, n)) == (1, len(taps))
                else:
                    with pytest.raises(ValueError, match="see nothing but padding"):
                        pool.output_shape((1, n))
    assert {*found} == {True, False}


@pytest.mark.parametrize("geometry", [{"dilation": 2**31, "padding": 2**31}, {"dilation": 2**31, "padding": 2**31, "stride": 2**16 - 1},
                                      {"padding": 1, "stride": 2**40}, {"dilation": 2**40, "padding": ((0, 2**40),)}])
def test_geometries_of_any_size_are_judged_at_once(geometry):
    tracemalloc.start()
    with contextlib.suppress(ValueError):
        eq.MaxPool((2,), **geometry).output_shape((1, 3))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_bad_entries_are_refused_beside_good_ones():
    with pytest.raises(ValueError, match="must be 1"):
        eq.Pad(1, 1.5).rescale(np.array([2.0, 1.0]), np.array([2.0, 1.0]))
    for low, high in (([np.nan, 0.0], [1.0, 1.0]), ([0.0, 0.0], [1.0, np.inf])):
        with pytest.raises(ValueError):
            eq.UniformQuantizer(8, symmetric=False).grid(low, high)
    for zero_point in ([0.0, 300.0], [0.0, -1.0], [0.0, 0.5]):
        with pytest.raises(ValueError):
            eq.Grid(np.ones(2), np.array(zero_point), 0, 255)
