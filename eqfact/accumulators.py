"""Do a layer's sums fit into an integer engine's 32 bits, and what becomes of its weights' scale and its bias for that?

``|q_b| + sum |q_w| max|q_x - z_x| < 2**31`` for every output channel, whatever the input (docs/integers.md).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from eqfact.ops.base import Array, Weighted
from eqfact.ops.grid import Grid

#: Integer engines add up products of 8 bits in 32, a sign among them.
ACCUMULATOR = 2**31
#: The most steps of its layer's sums that a bias gets: float32 tells the steps of numbers as large, with a margin of three bits.
TOLD = 2**20
#: That of a bias that no product is added to; float32 holds it exactly.
TOLD_ALONE = 2**23


def on_grids(op: Weighted, grid: Grid | None, input_grid: Grid | None, dtype: np.dtype[Any]) -> tuple[Weighted, Array | None]:
    """The op with its weights on a grid, if one is given, and its bias on that of its sums; and their step, if there is one."""
    given = op
    if grid is not None:
        if input_grid is not None and _one_step(op, grid, input_grid):
            grid = _roomy(grid, op, input_grid, dtype)
        op = replace(op, weight=grid.fake_quantize(op.weight), grid=grid)  # type: ignore[type-var]  # every final op is a dataclass
    if op.grid is not None and input_grid is not None and _one_step(op, op.grid, input_grid):
        op = replace(op, grid=_with_free_scales(op.grid, op, given, input_grid, dtype))  # type: ignore[type-var]
    step = held_step(op, input_grid, dtype)
    return (op, None) if step is None or input_grid is None else (on_accumulator(op, step, input_grid), step)


def _roomy(grid: Grid, op: Weighted, input_grid: Grid, dtype: np.dtype[Any]) -> Grid:
    """The weights' grid, its scale raised where a layer of 8 bits would not fit into 32 bits, or ``TOLD`` not hold the bias of a channel.

    The latter only where a channel has its own scale: others would pay for a large bias, be its channel dead. Products of more bits are
    added up in more than 32, if at all: their scales stay.
    """
    if max(of.qmax - of.qmin for of in (grid, input_grid)) >= 2**8:
        return grid
    rows, reach, s_x = op.rows().astype(np.float64), _reach(input_grid), input_grid.scale.item()
    # rounding moves a weight by a step at most; and the scale itself, rounded to float32, all sums by 2**-24
    room = np.maximum(ACCUMULATOR - reach * np.count_nonzero(rows, axis=1) - 2**9, ACCUMULATOR // 2)
    bias = np.abs(bias_of(op))
    with np.errstate(over="ignore"):
        needed = (bias + s_x * reach * np.abs(rows).sum(axis=1)) / room / s_x
        if grid.scale.size > 1:
            needed = np.maximum(needed, bias / TOLD / s_x)
    needed = _as(grid.scale, needed)
    return replace(grid, scale=np.where((needed > grid.scale) & (needed < np.finfo(dtype).max), needed, grid.scale)).astype(dtype)


def _with_free_scales(grid: Grid, op: Weighted, given: Weighted, input_grid: Grid, dtype: np.dtype[Any]) -> Grid:
    """The weights' grid, the scale of weights that are all 0, which is free, chosen so that a bias has ``TOLD_ALONE`` steps.

    As far as the weights that were ``given`` are 0 on it, too.
    """
    dead = _as(grid.scale, np.logical_not(op.rows().any(axis=1)), np.minimum)
    smallest, s_x = float(np.finfo(dtype).tiny), input_grid.scale.item()
    with np.errstate(over="ignore"):
        needed = _as(grid.scale, np.abs(bias_of(op))) / TOLD_ALONE / s_x
        free = np.maximum(needed, smallest / min(s_x, 1.0))  # so that scale and step are normal numbers
    dead &= (needed > 0) & (free < np.finfo(dtype).max) & (2 * _as(grid.scale, np.abs(given.rows()).max(axis=1)) < free)
    return replace(grid, scale=np.where(dead, free, grid.scale)).astype(dtype)


def _as(scale: Array, by_channel: npt.NDArray[Any], reduce: Any = np.maximum) -> npt.NDArray[Any]:
    """Numbers of the output channels in the shape of the scales: those of one scale are reduced to one."""
    together: npt.NDArray[Any] = np.asarray(reduce.reduce(by_channel)) if scale.size == 1 else by_channel
    return together.reshape(scale.shape)


def bias_of(op: Weighted) -> npt.NDArray[np.float64]:
    """The bias in float64; 0 where there is none."""
    return np.zeros(op.out_channels) if op.bias is None else op.bias.astype(np.float64)


def bias_steps(op: Weighted, step: Array) -> npt.NDArray[np.float64]:
    """How many steps of the layer's sums the bias comes to; infinitely many where that is no number."""
    with np.errstate(over="ignore"):
        steps: npt.NDArray[np.float64] = np.rint(bias_of(op) / step)
    return steps


def _reach(grid: Grid) -> int:
    """How far from its zero point a grid of one scale reaches, in steps."""
    zero_point = int(grid.zero_point.item())
    return max(grid.qmax - zero_point, zero_point - grid.qmin)


def bias_room(op: Weighted, input_grid: Grid) -> Array:
    """What the products ``(q_x - z_x)(q_w - z_w)`` leave for a bias ``(out,)`` in an integer engine's 32 bits, whatever the input holds.

    ``op`` and input have the grids of one step; negative where the products alone do not fit.
    """
    assert op.grid is not None
    steps = np.abs(np.rint(op.weight.astype(np.float64) / op.grid.scale))
    room: Array = ACCUMULATOR - 1 - _reach(input_grid) * steps.reshape(op.out_channels, -1).sum(axis=1)
    return room


def _one_step(op: Weighted, grid: Grid, input_grid: Grid) -> bool:
    """Is there one step ``s_x * s_w`` for all products that add up to an output channel?"""
    return input_grid.scale.size == 1 and grid.scale.size in (1, len(op.weight))


def accumulator_step(op: Weighted, input_grid: Grid | None, dtype: npt.DTypeLike = np.float64) -> Array | None:
    """``s_x * s_w``, ``(1,)`` or ``(out,)``, of which a layer's sums are whole multiples; the product of ``dtype``'s numbers.

    None where an output channel has no such number: input or weights in float, scales by input channel, a product that underflows.

    >>> x, w = UniformQuantizer(symmetric=False).grid(0, 51.0), UniformQuantizer().grid(-127.0, 127.0)
    >>> accumulator_step(Dense(np.ones((1, 1)), grid=w), x)
    array([0.2])
    """
    if input_grid is None or op.grid is None or not _one_step(op, op.grid, input_grid):
        return None
    step = input_grid.scale.astype(dtype).reshape(()) * op.grid.scale.astype(dtype).reshape(-1)
    return step.astype(np.float64) if (step >= np.finfo(dtype).tiny).all() else None


def held_step(op: Weighted, input_grid: Grid | None, dtype: npt.DTypeLike) -> Array | None:
    """The same, where 32 bits hold all that a layer may add up."""
    step = accumulator_step(op, input_grid, dtype)
    if step is None or input_grid is None or (bias_room(op, input_grid) < np.abs(bias_steps(op, step))).any():
        return None
    return step


def on_accumulator(op: Weighted, step: Array, input_grid: Grid) -> Weighted:
    """The op with its bias on the grid of its integer accumulator, as far as the 32 bits have room for it beside the products."""
    if op.bias is None:
        return op
    room = np.maximum(bias_room(op, input_grid), 0)
    whole = np.clip(bias_steps(op, step), -room, room)
    return replace(op, bias=(whole * step).astype(op.bias.dtype))  # type: ignore[type-var]
