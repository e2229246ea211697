"""Room in 32 bits, and scales that are raised for it or chosen for a bias alone, by hand."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import eqfact as eq
from eqfact.accumulators import ACCUMULATOR, TOLD, TOLD_ALONE, bias_room, on_accumulator, on_grids

module = sys.modules["eqfact.accumulators"]
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)


def weights_on(scale, low=-127, high=127):
    scale = np.reshape(np.asarray(scale, float), (-1, 1))
    return eq.Grid(scale, np.zeros_like(scale), low, high)


def read_on(scale=1.0, zero_point=0, bits=8):
    return eq.Grid(np.array([scale]), np.array([float(zero_point)]), 0, 2**bits - 1)


@pytest.mark.parametrize(("zero_point", "reach"), [(0, 255), (100, 155), (128, 128), (200, 200)])
def test_a_bias_has_the_room_that_the_products_leave(zero_point, reach):
    op = eq.Dense(np.array([[1.0, -2.0], [0.5, 3.0]]), grid=weights_on(0.5))
    assert bias_room(op, read_on(0.25, zero_point)).tolist() == [2**31 - 1 - reach * 6, 2**31 - 1 - reach * 7]


def test_sums_have_a_step_where_every_channel_has_room_for_its_bias():
    room = 2**31 - 1 - 255 * np.array([3, 5])
    for bias, fits in ((room, True), (room * [1, -1], True), (room + [1, 0], False), (room + [0, 1], False)):
        op = eq.Dense(np.array([[3.0], [5.0]]), bias.astype(float), grid=weights_on(1.0))
        made, step = on_grids(op, None, read_on(), F64)
        assert (step is not None) == fits and np.array_equal(made.bias, bias)


def test_a_bias_beside_products_that_do_not_fit_becomes_0():
    op = eq.Dense(np.array([[2.0**23], [1.0]]), np.array([7.0, 7.0]), grid=weights_on(1.0, -(2**24), 2**24))
    assert on_accumulator(op, np.ones(1), read_on(bits=9)).bias.tolist() == [0, 7]


def test_one_scale_is_raised_only_as_far_as_32_bits_need():
    """Not for a bias that float32 does not tell: other channels would pay. And there is no room to spare."""
    for bias in np.exp(np.linspace(5, 17.5, 60)):
        op, step = on_grids(eq.Dense(np.ones((1, 1)), np.array([bias])), weights_on(1 / 127), read_on(0.013, 128), F32)
        whole, scale = np.rint(op.bias / step).item(), op.grid.scale.item()
        assert whole + 128 * np.rint(op.weight / scale).item() < 2**31
        if bias / 0.013 * 127 < 2**31 - 2**15:
            assert scale == np.float32(1 / 127)
        else:  # but for a step of the weight, and roundings of two scales
            assert whole + 128 / scale > 2**31 - 128 - 2**10


def test_a_channels_own_scale_is_raised_until_float32_tells_its_bias():
    grid, read = weights_on([1.0, 1.0]), read_on(0.25)
    op, step = on_grids(eq.Dense(np.array([[127.0], [127.0]]), np.array([2.0**25, 2.0**17])), grid, read, F32)
    assert op.grid.scale.ravel().tolist() == [2.0**25 / 2**20 / 0.25, 1.0]
    assert (op.bias / step).tolist() == [TOLD, 2**19] and TOLD == 2**20


@pytest.mark.parametrize("bits", [9, 16])
def test_products_of_more_than_8_bits_keep_their_scales(bits):
    op = eq.Dense(np.full((1, 3), 127.0), np.array([2.0**33]))
    assert on_grids(op, weights_on(1.0), read_on(bits=bits), F64)[0].grid.scale == 1
    assert on_grids(op, weights_on(1.0), read_on(), F64)[0].grid.scale > 1


def test_layers_whose_roundings_alone_would_fill_half_the_bits_get_that_half(monkeypatch):
    """Counted in 16 bits: a hundred weights may be rounded up by 255 steps of their sum each."""
    monkeypatch.setattr(module, "ACCUMULATOR", 2**16)
    op, step = on_grids(eq.Dense(np.full((1, 100), 100.4)), weights_on(1.0), read_on(), F64)
    sums = 255 * np.abs(np.rint(op.weight / op.grid.scale)).sum()
    assert step is not None and 2**14 < sums < 2**16


@pytest.mark.parametrize("weight", [0.0, 1e-5])
def test_the_scale_of_weights_that_are_0_is_chosen_for_their_bias(weight):
    """As long as they are still 0 on it."""
    op = eq.Dense(np.array([[1.0], [weight]]), np.array([3.0, 0.625]))
    made, step = on_grids(op, weights_on([1 / 127, 1.0]), read_on(2.0**-12), F32)
    free = 0.625 / 2**23 * 2**12
    assert made.grid.scale[1, 0] == free and weight < free / 2
    assert (made.bias / step)[1] == TOLD_ALONE == 2**23
    for part in (0.4, 0.6):
        made, _ = on_grids(eq.Dense(np.array([[part * free]]), np.array([0.625])), weights_on(1.0), read_on(2.0**-12), F32)
        assert made.grid.scale.item() == (free if part < 0.5 else 1)


def test_a_free_scale_and_its_step_are_normal_numbers_however_small_the_bias():
    tiny = np.finfo(np.float32).tiny
    for s_x in np.exp(np.linspace(-8, 8, 200)).astype(np.float32).astype(float):
        made, step = on_grids(eq.Dense(np.zeros((1, 1), np.float32), np.array([1e-40], np.float32)), weights_on(1.0), read_on(s_x), F32)
        assert step is not None and tiny <= step.item() and tiny <= made.grid.scale.item()
        assert min(step.item(), made.grid.scale.item()) == tiny


def test_a_bias_that_no_scale_is_large_enough_for_leaves_it():
    op, _ = on_grids(eq.Dense(np.zeros((1, 1)), np.array([1e300])), weights_on(1.0), read_on(1e-300), F64)
    assert op.grid.scale == 1


def test_32_bits_hold_a_sign():
    assert ACCUMULATOR == 2**31
