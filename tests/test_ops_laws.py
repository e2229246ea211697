"""The laws of ops, on every row of the table in cases.py, in both precisions."""

import dataclasses
import math

import numpy as np
import pytest
from cases import CASES, IN_FLOAT64, WEIGHTED

import eqfact as eq
from eqfact.testing import laws

LINEAR = [case for case in WEIGHTED if not isinstance(case.op, eq.ops.Normalization)]
PASSING = [case for case in CASES if not isinstance(case.op, eq.ops.Weighted)]


def parameters(op):
    return {field.name: getattr(op, field.name) for field in dataclasses.fields(op)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rescaling_commutes_with_forward_bit_for_bit_for_powers_of_two(case):
    f_out, f_in = case.factors(powers_of_two=True)
    assert laws.powers_of_two(f_out, *f_in)
    laws.rescaling_commutes_with_forward(case.op, f_out, f_in, case.inputs())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rescaling_commutes_with_forward_for_any_factors(case):
    f_out, f_in = case.factors(powers_of_two=False)
    laws.rescaling_commutes_with_forward(case.op, f_out, f_in, case.inputs())


@pytest.mark.parametrize("case", [case for case in CASES if not isinstance(case.op, eq.ops.Blocking)], ids=str)
def test_factors_in_the_table_are_not_all_one(case):
    # else the two laws above say nothing; a Pad with a constant and a Softmax are pinned for good
    f_out, f_in = case.factors(powers_of_two=True)
    pinned = isinstance(case.op, eq.Pad) and case.op.value != 0
    assert np.all(np.concatenate([f_out, *f_in]) == 1) == pinned


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bounds_on_errors_follow_the_factors(case):
    f_out, f_in = case.factors(powers_of_two=True)
    x, op = case.inputs(), case.op.rescale(f_out, *f_in)
    y, u = case.op.forward(*x), laws.unit_roundoff(x[0])
    errors = [np.abs(v) for v in x]
    scaled = [[laws.times(v, f) for v, f in zip(of, f_in, strict=True)] for of in (errors, x)]
    expected = laws.times(case.op.errors(errors, x, y, u), f_out)
    np.testing.assert_allclose(op.errors(*scaled, laws.times(y, f_out), u), expected, rtol=1e-6, atol=1e9 * float(np.finfo(y.dtype).tiny))


NORMS = [eq.LayerNorm(np.array([2.0, -1.0, 0.5, 3.0]), np.arange(4.0), 0.0),
         eq.RMSNorm(np.array([2.0, -1.0, 0.5, 3.0]), np.arange(4.0), 0.0),
         eq.GroupNorm(2, np.ones(4), np.arange(4.0), 0.0), eq.InstanceNorm(np.ones(4), np.arange(4.0), 0.0)]


@pytest.mark.parametrize("op", NORMS, ids=lambda op: type(op).__name__)
def test_where_there_is_nothing_to_divide_by_a_normalisation_puts_out_beta(op):
    x = np.full((2, 4, 3), 5.0) if op.centred else np.zeros((2, 4, 3))
    x[1] = np.random.default_rng(0).normal(size=(4, 3))  # beside a sample that is as ever
    one, u = np.ones_like(x), 1e-6
    assert np.array_equal(op.forward(x)[0], np.broadcast_to(op.beta[:, None], (4, 3))) and np.isfinite(op.forward(x)).all()
    assert not op.vjp(one, x)[0][0].any() and not op.weight_vjp(one[:1], x[:1]).any()
    assert not op.passes([0 * one], [x], u).any()
    passed = op.passes([one], [x], u)  # any error may turn zeros into the largest that comes out at all
    count = {"GroupNorm": 6, "InstanceNorm": 3}.get(type(op).__name__, 4)
    assert passed[0] * u == pytest.approx(np.broadcast_to(2 * np.sqrt(count) * np.abs(op.gamma)[:, None], (4, 3)))
    assert np.all(passed[1] < passed[0])


@pytest.mark.parametrize("case", IN_FLOAT64, ids=str)
def test_trace_frees_all_the_factors_that_the_law_allows(case):
    laws.degrees_of_freedom_are_maximal(case.framed(), case.data())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_shape_is_that_of_forward(case):
    assert case.op.output_shape(*case.shapes) == case.op.forward(*case.inputs()).shape[1:]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_labels_have_the_shape_of_the_value_and_are_constant_over_space(case):
    graph = case.framed()
    labels, y = graph.labels["op"], eq.values(graph, case.data())["op"]
    assert labels.shape == graph.shapes["op"] == y.shape[1:]
    by_channel = labels.reshape(len(labels), -1)
    assert np.array_equal(by_channel, np.broadcast_to(by_channel[:, :1], by_channel.shape))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_magnitude_bounds_forward(case):
    inputs = case.inputs()
    laws.magnitude_bounds_forward(case.op, inputs)
    laws.magnitude_bounds_forward(case.op, [0 * x for x in inputs])
    laws.magnitude_bounds_forward(case.op, [-100 * np.abs(x) for x in inputs])


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_magnitude_of_a_positive_weighted_op_is_its_output(case):
    # the bound is attained, so it is not merely large
    keys = ("gamma", "beta") if isinstance(case.op, eq.BatchNorm) else ("weight", "bias")
    positive = {key: np.abs(getattr(case.op, key)) for key in keys if getattr(case.op, key) is not None}
    if isinstance(case.op, eq.BatchNorm):
        positive["mean"] = -np.abs(case.op.mean)
    op = dataclasses.replace(case.op, **positive)
    inputs = [np.abs(x) for x in case.inputs()]
    bound, y = op.magnitude(*inputs), op.forward(*inputs)
    if isinstance(op, eq.BatchNorm):  # which subtracts its mean first: rounded in another order
        assert np.all(np.abs(bound - y) <= 4 * np.finfo(case.dtype).eps * y)
    else:
        assert np.array_equal(bound, y)


@pytest.mark.parametrize("case", [case for case in WEIGHTED if isinstance(case.op, eq.ops.Normalization)], ids=str)
def test_a_normalisation_is_bounded_by_the_root_of_how_many_it_normalises(case):
    """One entry far from all others comes near that bound, one far from zero among all others does not exceed it."""
    (x,) = case.inputs()
    first = (slice(None), 0, *(0,) * (x.ndim - 2))
    x[first] = 1e4
    bound, y = case.op.magnitude(np.abs(x)), case.op.forward(x)
    assert np.all(np.abs(y) <= bound * (1 + 1e-5))
    beta = 0 if case.op.beta is None else case.op.beta[0]
    assert np.all(np.abs(y[first] - beta) >= 0.7 * (bound[first] - np.abs(beta)))


def test_the_gain_of_a_normalisation_is_that_at_the_value():
    """The smaller what it divides by, the more of an error passes."""
    op, e = eq.RMSNorm(np.ones(2), eps=0.0), np.full((1, 2), 1.0)
    small, large = (op.passes([e], [np.array([[size, size]])], 1e-9) for size in (1e-3, 1e3))
    assert small == pytest.approx(2e3, rel=1e-5) and large == pytest.approx(2e-3, rel=1e-5)
    assert np.all(op.passes([e], [np.zeros((1, 2))], 1e-9) <= 2 * math.sqrt(2) / 1e-9)
    assert np.all(op.passes([0 * e], [np.zeros((1, 2))], 1e-9) == 0)


#: From far within a rounding of the entries to intervals that reach over every limit.
REACHES = [1e-9, 1e-4, 0.1, 3.0]


@pytest.mark.parametrize("case", IN_FLOAT64, ids=str)
def test_errors_stay_within_what_passes(case):
    rng = case.rng
    for size in (1e-8, 1.0, 30.0):
        inputs = [size * x for x in case.inputs()]
        for reach in REACHES:
            errors = [rng.exponential(size=x.shape) for x in inputs]
            laws.errors_stay_within_what_passes(case.op, inputs, errors, reach)
            laws.errors_stay_within_what_passes(case.op, inputs, [e * np.abs(x) for e, x in zip(errors, inputs, strict=True)], reach)


CURVES = [case for case in CASES if case.dtype == np.float32 and isinstance(case.op, eq.ops.Blocking)]


@pytest.mark.parametrize("case", CURVES, ids=str)
def test_roundings_stay_within_the_bound_in_the_tails_too(case):
    for size in (1e-20, 1e-3, 1.0, 5.0, 20.0, 30.0, *range(36, 45), 1e4):
        laws.roundings_stay_within_the_bound(case.op, [size * x for x in case.inputs()])


@pytest.mark.parametrize("op", [eq.GELU(), eq.GELU(approximate=True)], ids=repr)
def test_a_rounding_of_its_argument_is_among_those_of_a_gelu(op):
    x, u = np.linspace(-10, 0, 101)[:, None], 1e-9
    y = op.forward(x)
    assert (np.abs(op.forward(x * (1 + u)) - y) <= u * op.rounds([x], y)).all()


TAILS = {"sigmoid": -80, "silu": -80, "gelu": -8, "gelu, approximate": -6, "hardsigmoid": -9, "hardswish": -9, "relu": -9, "relu6": 9,
         "clip": 9, "tanh": 1e-20, "erf": 1e-20, "mul": 1e-9, "leaky relu": 1e-20, "maxpool": -9, "pad with a constant": 1e-9}


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == np.float32 and case.name in TAILS], ids=str)
def test_the_error_of_a_small_output_is_small(case):
    """A bound that does not scale with what it bounds hides mistakes in all that is smaller: this was ReLU6's 6, and Softmax's 1."""
    inputs = [np.full_like(x, TAILS[case.name]) for x in case.inputs()]
    y, u = case.op.forward(*inputs), laws.unit_roundoff(inputs[0])
    bound = u * case.op.errors([np.abs(x) for x in inputs], inputs, y, u)
    assert np.all(bound <= 3e-3 * np.abs(y) + u * 1e-30)


@pytest.mark.parametrize("axis", [1, 2])
def test_the_error_of_a_softmax_entry_scales_with_it(axis):
    x = np.zeros((1, 3, 3), np.float32)
    x[:, 1, 1] = -60
    op = eq.Softmax(axis)
    y, u = op.forward(x), laws.unit_roundoff(x)
    assert np.all(u * op.errors([np.abs(x)], [x], y, u) <= 1e-3 * y)


def test_a_constant_of_a_pad_rounds_where_it_pads():
    x = np.full((1, 1, 3), 1e-9, np.float32)
    op = eq.Pad(1, 1.5)
    y = op.forward(x)
    bound = op.errors([np.abs(x)], [x], y, laws.unit_roundoff(x))
    assert np.all(bound <= 16 * y)
    assert np.all(np.isfinite(eq.Pad(1, -np.inf).errors([np.abs(x)], [x], eq.Pad(1, -np.inf).forward(x), 1e-7)))


def test_an_entry_that_cannot_win_a_maximum_passes_no_error():
    x = np.array([[[-1e6, 1e-3, 1e-3]]], np.float32)
    op = eq.MaxPool(3)
    assert op.errors([np.abs(x)], [x], op.forward(x), 1e-7).max() <= 0.1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rescaling_leaves_the_op_alone_and_undoes_itself(case):
    before = {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in parameters(case.op).items()}
    f_out, f_in = case.factors(powers_of_two=True)
    rescaled = case.op.rescale(f_out, *f_in)
    back = rescaled.rescale(1 / f_out, *(1 / f for f in f_in))
    for key, value in before.items():
        assert np.all(np.equal(getattr(case.op, key), value)) if isinstance(value, np.ndarray) else getattr(case.op, key) == value
        assert np.all(np.equal(getattr(back, key), value)) if isinstance(value, (np.ndarray, float)) else getattr(back, key) == value


@pytest.mark.parametrize("case", PASSING, ids=str)
def test_factors_that_do_not_pass_are_refused(case):
    f_out, f_in = case.factors(powers_of_two=True)
    labels = eq.channels(case.framed()).labels
    read = np.concatenate([labels[f"in{i}"] for i in range(len(case.shapes))])
    for i in np.flatnonzero((labels["op"] == 0) | np.isin(labels["op"], read)):  # channels of the op's own constant are free
        other = f_out.copy()
        other[i] *= 2
        with pytest.raises(ValueError, match="factor"):
            case.op.rescale(other, *f_in)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parameters_are_read_only(case):
    for value in parameters(case.op).values():
        if isinstance(value, np.ndarray):
            with pytest.raises(ValueError, match="read-only"):
                value[...] = 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        case.op.weight = None


@pytest.mark.parametrize("case", [case for case in CASES if getattr(case.op, "moves", False)], ids=str)
def test_ops_that_move_entries_make_no_new_ones(case):
    inputs = case.inputs()
    assert np.isin(case.op.forward(*inputs), [0, *(v for x in inputs for v in x.ravel())]).all()


@pytest.mark.parametrize("case", [case for case in CASES if getattr(case.op, "activation", False)], ids=str)
def test_activations_work_entry_by_entry(case):
    (x,) = case.inputs()
    y = case.op.forward(x)
    last = (slice(None), slice(None), *[slice(None, None, -1)] * (x.ndim - 2))
    assert np.array_equal(case.op.forward(x[::-1][last]), y[::-1][last])


# ------------------------------------------------------------------------------------------------ weights, one view for all


@pytest.mark.parametrize("case", WEIGHTED, ids=str)
def test_rows_are_the_weights_that_make_a_channel(case):
    op = case.op
    rows = op.rows()
    assert len(rows) == op.out_channels == len(op.weight)
    for o in range(len(rows)):
        assert np.array_equal(rows[o], op.weight[o].ravel())


@pytest.mark.parametrize("case", WEIGHTED, ids=str)
def test_columns_are_the_weights_that_read_a_channel(case):
    op = case.op
    out, inner = op.weight.shape[:2]
    columns = op.columns()
    assert len(columns) == inner * op.groups == case.shapes[0][0]
    for channel in range(len(columns)):
        readers = [o for o in range(out) if o // (out // op.groups) == channel // inner]
        assert np.array_equal(columns[channel], np.concatenate([op.weight[o, channel % inner].ravel() for o in readers]))


@pytest.mark.parametrize("case", WEIGHTED, ids=str)
def test_taps_are_the_weights_by_group_output_and_input(case):
    op = case.op
    out, inner, *kernel = op.weight.shape
    assert op.taps().shape == (op.groups, out // op.groups, inner, math.prod(kernel))
    for o, i in np.ndindex(out, inner):
        group, within = divmod(o, out // op.groups)
        assert np.array_equal(op.taps()[group, within, i], op.weight[o, i].ravel())


@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_columns_say_which_input_channel_they_read(case):
    """An input that lives in one channel only sees that channel's column."""
    (x,) = case.inputs()
    bias = case.op.forward(np.zeros_like(x))
    for channel in range(x.shape[1]):
        alone = np.zeros_like(x)
        alone[:, channel] = 1
        seen = np.abs(case.op.forward(alone) - bias).max() > 1e-3
        assert seen == (np.abs(case.op.columns()[channel]).max() > 1e-3)
        without = dataclasses.replace(case.op, **silenced(case.op, channel))
        assert np.array_equal(without.forward(alone), without.forward(np.zeros_like(x)))


def silenced(op, channel):
    """The op's parameters with the weights that read one channel set to zero."""
    if isinstance(op, eq.BatchNorm):
        gamma = op.gamma.copy()
        gamma[channel] = 0
        return {"gamma": gamma}
    out, inner = op.weight.shape[:2]
    weight = op.weight.copy()
    group = channel // inner
    weight[group * out // op.groups:(group + 1) * out // op.groups, channel % inner] = 0
    return {"weight": weight}


def test_batchnorm_is_its_weight_and_bias():
    case = next(case for case in IN_FLOAT64 if case.name == "batchnorm 2d")
    (x,) = case.inputs()
    affine = eq.Conv(case.op.weight.reshape(3, 1, 1, 1), case.op.bias, groups=3)
    error = np.abs(affine.forward(x) - case.op.forward(x))
    y = case.op.forward(x)
    assert np.all(error <= 2 * laws.unit_roundoff(y) * case.op.errors([np.zeros_like(x)], [x], y, laws.unit_roundoff(y)))


# ------------------------------------------------------------------------------------------------ arrays of the caller


def test_the_callers_arrays_are_copied():
    weight, bias = np.ones((2, 3)), np.ones(2)
    slope, high = np.ones(2), np.ones(2)
    norm = [np.ones(2) for _ in range(4)]
    ops = [eq.Dense(weight, bias), eq.PReLU(slope), eq.Clip(-high, high), eq.BatchNorm(*norm)]
    for array in (weight, bias, slope, high, *norm):
        array[...] = 7  # still the caller's own, still writable
    for op in ops:
        for value in parameters(op).values():
            if isinstance(value, np.ndarray):
                assert np.all(np.abs(value) == 1)


def test_a_read_only_view_of_the_callers_array_is_copied():
    weight = np.ones((2, 3))
    view = weight[:]
    view.flags.writeable = False
    op = eq.Dense(view)
    weight[...] = 7
    assert np.all(op.weight == 1)


def test_a_locked_array_of_the_library_is_shared():
    op = eq.Dense(np.ones((2, 3)))
    assert dataclasses.replace(op, bias=np.ones(2)).weight is op.weight


@pytest.mark.parametrize("make", [
    lambda i: eq.MaxPool(i(2), stride=i(1), padding=i(1), dilation=i(1)), lambda i: eq.AvgPool((i(2), i(3)), dilation=(i(1), i(2))),
    lambda i: eq.Blend(np.ones((2, 2)), axis=i(2)), lambda i: eq.Slice(i(0), i(2)), lambda i: eq.Take((i(0), i(1)), axis=i(1)),
    lambda i: eq.Extend(np.ones((1, 2)), axis=i(1)), lambda i: eq.Permute((i(1), i(0))), lambda i: eq.Upsample((i(2), i(1))),
    lambda i: eq.Conv(np.ones((4, 2, 3)), stride=i(2), padding=i(1), dilation=i(1), groups=i(2)), lambda i: eq.Concat(axis=i(1)),
    lambda i: eq.Unflatten((i(2), i(3))), lambda i: eq.Transpose((i(1), i(0))), lambda i: eq.Scores(i(4), i(2))],
    ids=lambda make: type(make(int)).__name__)
@pytest.mark.parametrize("integer", [np.int64, np.uint8])
def test_whole_numbers_of_numpy_are_held_as_plain_ones(make, integer):
    assert repr(make(integer)) == repr(make(int))


@pytest.mark.parametrize("op", [eq.Sigmoid(), eq.Tanh(), eq.SiLU(), eq.HardSwish(), eq.GELU(), eq.GELU(approximate=True)], ids=repr)
def test_the_largest_error_passes_a_curve_as_its_whole_span(op):
    x, largest, u = np.float32([[-90, -1, 0, 1, 90]]).T, np.finfo(np.float32).max, 2.0**-24
    assert (op.passes([np.full_like(x, largest)], [x], u) >= min(np.float32(op.span / u), largest)).all()


def test_weights_in_fortran_order_rescale_bit_for_bit():
    rng = np.random.default_rng(0)
    weight = np.asfortranarray(rng.normal(size=(7, 9)).astype(np.float32))
    weight.flags.writeable = False
    f_out, f_in = np.exp2(rng.integers(-3, 4, 7)), np.exp2(rng.integers(-3, 4, 9))
    laws.rescaling_commutes_with_forward(eq.Dense(weight), f_out, [f_in], [rng.normal(size=(5, 9)).astype(np.float32)])


def test_clip_takes_the_factor_into_its_bounds():
    op = eq.ReLU6()
    assert (op.low, op.high) == (0.0, 6.0)
    halved = op.rescale(np.full(2, 0.5), np.full(2, 0.5))
    assert (halved.low, halved.high) == (0.0, 3.0)
    apart = op.rescale(np.array([1.0, 4.0]), np.array([1.0, 4.0]))
    assert np.array_equal(apart.high, [6.0, 24.0])
    assert np.array_equal(apart.low, [0.0, 0.0])
    open_above = eq.Clip(-1.0, math.inf).rescale(np.array([2.0, 4.0]), np.array([2.0, 4.0]))
    assert np.array_equal(open_above.low, [-2.0, -4.0])
    assert np.all(open_above.high == math.inf)


def test_batchnorm_keeps_var_and_eps():
    one = np.ones(1)
    op = eq.BatchNorm(one, one, one, one, eps=0.5)
    rescaled = op.rescale(8 * one, 2 * one)
    assert (rescaled.var, rescaled.eps) == (op.var, op.eps)
    assert (rescaled.gamma, rescaled.beta, rescaled.mean) == (4, 8, 2)


def test_a_factor_that_overflows_the_weights_is_refused():
    op = eq.Dense(np.array([[1e30]], np.float32))
    with pytest.raises(ValueError, match=r"the rescaled weight overflows float32: its largest entry is 1e\+30, .*; use smaller factors"):
        op.rescale(np.array([1e10]), np.array([1.0]))


# ------------------------------------------------------------------------------------------------ ops of one's own


class Square(eq.ops.Blocking):
    """Steep only as far as its inputs go; says nothing of roundings."""

    lipschitz = 20.0

    def forward(self, *inputs):
        return inputs[0] ** 2 + inputs[0].dtype.type(3.0)


class Mirrored(eq.ops.Commuting):
    """The channels the other way round."""

    def carry(self, *vectors):
        return vectors[0][::-1]

    def forward(self, *inputs):
        return inputs[0][:, ::-1]


class Limit(eq.ops.Commuting):
    """A ReLU of one's own, which says between which bounds it passes."""

    bounds = (0.0, math.inf)

    def forward(self, *inputs):
        return np.maximum(inputs[0], 0)


@pytest.mark.parametrize("op", [Square(), Mirrored(), Limit()], ids=lambda op: type(op).__name__)
@pytest.mark.parametrize("reach", REACHES)
def test_an_op_of_ones_own_bounds_its_errors_by_default(op, reach):
    rng = np.random.default_rng(0)
    x = rng.uniform(-4, 4, (5, 3))
    laws.errors_stay_within_what_passes(op, [x], [rng.exponential(size=x.shape)], reach)
    laws.magnitude_bounds_forward(op, [x])
    laws.roundings_stay_within_the_bound(op, [x])


@pytest.mark.parametrize("op", [eq.LeakyReLU(0.25), eq.PReLU(np.array([0.25]))], ids=lambda op: type(op).__name__)
def test_errors_pass_each_side_of_a_leak_by_its_own_slope(op):
    x, e = np.array([[-3.0], [-1e-9], [1e-9], [2.0]]), np.full((4, 1), 0.5)
    assert op.passes([e], [x], 1e-6).ravel().tolist() == [0.125, 0.5, 0.5, 0.5]


def test_between_its_limits_hardswish_rounds_as_its_two_terms_do():
    x = np.concatenate([np.linspace(-5, 5, 101), [-3.0, 3.0]])[:, None]
    y = eq.HardSwish().forward(x)
    expected = eq.HardSwish().roundings * np.where(np.abs(x) < 3, x**2 / 6 + np.abs(x / 2), np.abs(y))
    assert eq.HardSwish().rounds([x], y) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_errors_pass_a_grid_as_whole_steps_or_not_at_all(bits):
    rng = np.random.default_rng(1)
    op = eq.FakeQuantize(eq.UniformQuantizer(bits, symmetric=False).grid([-1.0], [2.0]))
    x = rng.uniform(-2, 3, (4, 3, 5))
    for reach in REACHES:
        laws.errors_stay_within_what_passes(op, [x], [rng.exponential(size=x.shape)], reach)
    middle = op.forward(x)  # in the middle of its step, or saturated
    assert not op.passes([np.ones_like(x)], [middle], 1e-6).any()
    assert np.all(op.errors([np.ones_like(x)], [middle], middle, 1e-6) <= 5 * np.abs(middle) + 1e-300)
