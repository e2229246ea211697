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


@pytest.mark.parametrize("make", [eq.MaxPool, eq.MinPool, lambda k, **window: eq.AvgPool(k, count_include_pad=False, **window),
                                  eq.LpPool], ids=["MaxPool", "MinPool", "AvgPool", "LpPool"])
@pytest.mark.parametrize("stride, before", [(1, 0), (1, 3), (2, 3), (700, 0)])
def test_a_kernel_that_is_larger_than_the_map_sees_all_of_it(make, stride, before):
    """Exporters write a mean over whatever size may come as a kernel of thousands: no time is spent on what is padding to every window."""
    x = np.random.default_rng(4).normal(size=(2, 3, 5, 7)).astype(np.float32)
    padding = tuple((before, 1500 - n - before + (2 * stride if stride < 3 else 0)) for n in x.shape[2:])
    large = make(1500, stride=stride, padding=padding)
    rows, columns = large.output_shape(x.shape[1:])[1:]

    def seen(i, n):  # by the window i of an axis of n entries
        return slice(max(0, i * stride - before), n)
    expected = np.stack([np.stack([make((seen(i, 5).stop - seen(i, 5).start, seen(j, 7).stop - seen(j, 7).start), stride=1).forward(
        x[:, :, seen(i, 5), seen(j, 7)])[:, :, 0, 0] for j in range(columns)], axis=-1) for i in range(rows)], axis=-2)
    assert np.allclose(large.forward(x), expected, rtol=1e-5)
    g = np.random.default_rng(5).normal(size=expected.shape)
    shift = 1e-6 * np.random.default_rng(6).normal(size=x.shape)
    x = x.astype(np.float64)
    moved = ((large.forward(x + shift) - large.forward(x - shift)) / 2 * g).sum()
    assert (large.vjp(g, x)[0] * shift).sum() == pytest.approx(moved, rel=1e-4)


@pytest.mark.parametrize("pool", [eq.AvgPool(96), eq.LpPool(96, p=2), eq.LpPool(96, p=1), eq.AvgPool((96, 96))], ids=str)
def test_a_change_behind_a_large_window_is_found(pool):
    """A window is added up two by two, so that a bound on its roundings leaves room for nothing else."""
    rng = np.random.default_rng(7)
    graph = eq.Graph({"x": (2, 96, 96)}, (
        eq.Node("a", eq.Conv(rng.normal(size=(4, 2, 1, 1)).astype(np.float32)), ("x",)), eq.Node("r", eq.ReLU(), ("a",)),
        eq.Node("p", pool, ("r",)), eq.Node("f", eq.Flatten(), ("p",)),
        eq.Node("y", eq.Dense(rng.normal(size=(3, 4)).astype(np.float32)), ("f",))), ("y",))
    x = rng.normal(size=(1, 2, 96, 96)).astype(np.float32)
    rescaled = eq.Factorization(eq.channels(graph), np.array([1, 1.1, 0.7, 3.0, 0.3])).apply(graph)
    assert eq.verify(graph, rescaled, x)
    changed = rescaled["y"].op.weight.copy()
    changed[1] *= np.float32(1.001)
    assert not eq.verify(graph, rescaled.with_ops({"y": eq.Dense(changed)}), x)
