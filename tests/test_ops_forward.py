"""What every op computes, against formulas and implementations from elsewhere (see cases.py)."""

import numpy as np
import pytest
from cases import CASES, WEIGHTED

import eqfact as eq
from eqfact.ops import convolution
from eqfact.ops.base import product


def allowed(case, inputs):
    """Rounding errors of one forward pass, and of an expected value in double precision."""
    u = (np.finfo(case.dtype).eps + np.finfo(np.float64).eps) / 2
    return u * case.op.errors([np.zeros_like(x) for x in inputs], inputs, case.op.forward(*inputs), u).astype(np.float64)


@pytest.mark.parametrize("op", eq.ops.ALL, ids=lambda op: op.__name__)
def test_every_op_has_rows_in_both_precisions(op):
    assert {case.dtype.name for case in CASES if type(case.op) is op} == {"float32", "float64"}


def test_every_op_is_a_public_name():
    assert {op.__name__ for op in eq.ops.ALL} <= set(eq.ops.__all__) <= set(eq.__all__)


def test_names_in_the_table_are_unique():
    assert len({str(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_agrees_with_the_independent_formula(case):
    inputs = case.inputs()
    got, expected = case.op.forward(*inputs), case.expected(*inputs)
    assert got.dtype == case.dtype
    assert got.shape == expected.shape
    assert np.all(np.abs(got.astype(np.float64) - expected) <= allowed(case, inputs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_does_not_depend_on_memory_layout(case):
    inputs = case.inputs()
    got, expected = case.op.forward(*map(np.asfortranarray, inputs)), case.op.forward(*inputs)
    assert np.all(np.abs(got - expected) <= 2 * allowed(case, inputs))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_leaves_its_inputs_alone(case):
    inputs = case.inputs()
    before = [x.copy() for x in inputs]
    for x in inputs:
        x.flags.writeable = False
    case.op.forward(*inputs)
    assert all(np.array_equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_images_of_a_batch_do_not_touch_each_other(case):
    inputs = case.inputs()
    together = case.op.forward(*inputs)
    for n in range(len(together)):
        alone = case.op.forward(*(x[n:n + 1] for x in inputs))
        assert np.all(np.abs(alone[0] - together[n]) <= 2 * allowed(case, inputs)[n])


@pytest.mark.parametrize("case", [case for case in WEIGHTED if isinstance(case.op, eq.Conv)], ids=str)
def test_blocks_of_a_convolution_change_nothing(case, monkeypatch):
    inputs = case.inputs()
    whole = case.op.forward(*inputs)
    monkeypatch.setattr(convolution, "COLUMN_BLOCK", 1)
    monkeypatch.setattr(convolution, "DEPTHWISE_BLOCK", 1)
    assert np.all(np.abs(case.op.forward(*inputs) - whole) <= 2 * allowed(case, inputs))


def test_a_long_depthwise_convolution_in_1d_runs_in_blocks():
    weight = np.array([[[1.0, 2.0, 4.0]], [[1.0, 0.0, 0.0]]])
    x = np.arange(2.0 * 40000).reshape(1, 2, 40000)
    assert convolution.DEPTHWISE_BLOCK < 40000
    y = eq.Conv(weight, groups=2).forward(x)
    assert np.array_equal(y[0, 0], x[0, 0, :-2] + 2 * x[0, 0, 1:-1] + 4 * x[0, 0, 2:])
    assert np.array_equal(y[0, 1], x[0, 1, :-2])


def test_a_wide_convolution_runs_in_several_blocks():
    weight = np.arange(1.0, 10.0).reshape(1, 1, 3, 3) * np.ones((2, 3, 1, 1))  # three channels with the same kernel, small integers
    x = np.arange(3.0 * 400 * 520).reshape(1, 3, 400, 520) % 7
    assert convolution.COLUMN_BLOCK < 27 * 398 * 518
    y = eq.Conv(weight).forward(x)
    expected = sum(weight[0, 0, i, j] * x.sum(axis=1)[0, i:i + 398, j:j + 518] for i in range(3) for j in range(3))
    assert np.array_equal(y[0, 0], expected)
    assert np.array_equal(y[0, 1], expected)


def test_bounds_beyond_single_precision_leave_a_side_open():
    x = np.array([[-3e38, 0.0, 3e38]], np.float32)
    assert np.array_equal(eq.Clip(-1e300, 1e300).forward(x), x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (0.0, np.inf), (-np.inf, 1.0), (-1.0, -1.0)])
def test_one_bound_for_all_is_the_same_bound_for_every_channel(low, high, dtype):
    x = np.random.default_rng(0).normal(0, 4, (2, 3, 5, 7)).astype(dtype)
    assert np.array_equal(eq.Clip(low, high).forward(x), eq.Clip(np.full(3, low), np.full(3, high)).forward(x))


@pytest.mark.parametrize("out", [2, 60])
def test_few_pixels_or_many_a_convolution_is_its_sum(out):
    rng = np.random.default_rng(0)
    weight, x = (rng.integers(-3, 4, s).astype(float) for s in ((out, 3, 3, 2), (2, 6, 7, 9)))  # small integers: no rounding
    y = eq.Conv(weight, stride=(2, 1), groups=2).forward(x)
    assert out == 2 or y[0, 0].size < out  # here the weights, and not the windows, keep their order
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 2), axis=(2, 3))[:, :, ::2]
    halves = [np.einsum("nchwij,ocij->nohw", windows[:, c:c + 3], part) for c, part in zip((0, 3), np.split(weight, 2), strict=True)]
    assert np.array_equal(y, np.concatenate(halves, axis=1))


def test_products_tell_of_overflow_and_nothing_else():
    """BLAS reports invalid values that it made of unused vector lanes, in one of a million small products; no finite factors make one."""
    huge = np.full((2, 2), 1e300)
    with pytest.warns(RuntimeWarning, match="overflow"):
        assert np.isinf(product(huge, huge)).all()
    out = np.empty((2, 2))
    assert product(np.array([[np.inf, 0.0], [1.0, 1.0]]), np.eye(2), out=out) is out
    np.testing.assert_array_equal(out, [[np.inf, np.nan], [1.0, 1.0]])
