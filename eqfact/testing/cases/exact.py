"""What does an op compute, to the last digit? Its definition in decimal arithmetic of 80 digits, entry by entry.

Sums and products of a few multiples of powers of two are exact in float64; quotients, roots and curves are not, and numpy's differ in the
last bit from machine to machine. Here these are computed by their definitions, independent of :mod:`eqfact.ops`, and rounded once.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from eqfact import ops
from eqfact.graph import Graph
from eqfact.ops import Array, Op

#: Arrays of Decimal.
Exact = npt.NDArray[Any]

CONTEXT = decimal.Context(prec=80)
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899862803")


def values(graph: Graph, inputs: Mapping[str, Array]) -> dict[str, Exact]:
    """Every value of a network, without rounding worth mention; :class:`AssertionError` if an op without a definition here would round."""
    with decimal.localcontext(CONTEXT):
        env = {name: _decimals(x) for name, x in inputs.items()}
        for node in graph.nodes:
            env[node.name] = _forward(node.op, *(env[i] for i in node.inputs))
        return env


def rounded(x: Exact, dtype: npt.DTypeLike) -> Array:
    """The nearest numbers of a floating dtype."""
    result: Array = x.astype(np.float64).astype(dtype)
    return result


def _decimals(x: npt.ArrayLike) -> Exact:
    result: Exact = np.frompyfunc(lambda v: Decimal(float(v)), 1, 1)(np.asarray(x, object))
    return result


def _forward(op: Op, *inputs: Exact) -> Exact:
    if type(op) in DEFINITIONS:
        return DEFINITIONS[type(op)](op, *inputs)
    floats = [x.astype(np.float64) for x in inputs]
    assert all((_decimals(f) == x).all() for f, x in zip(floats, inputs, strict=True)), f"{type(op).__name__} has no definition here"
    return _decimals(op.forward(*floats))


def _entrywise(function: Callable[[Any, Decimal], Decimal]) -> Callable[..., Exact]:
    def apply(op: Any, x: Exact) -> Exact:
        result: Exact = np.frompyfunc(lambda v: function(op, v), 1, 1)(x)
        return result

    return apply


def _logistic(x: Decimal) -> Decimal:
    return 1 / (1 + (-x).exp())


def _erf(x: Decimal) -> Decimal:
    """``2 / sqrt(pi) sum (-1)^n x^(2n+1) / (n! (2n+1))``, whose terms are below ``exp(x^2)``."""
    term, total, n = x, x, 0
    while abs(term) > Decimal(10) ** -70:
        n += 1
        term *= -x * x / n
        total += term / (2 * n + 1)
    return 2 / PI.sqrt() * total


def _gelu(op: Any, x: Decimal) -> Decimal:
    if op.approximate:
        inner = (2 / PI).sqrt() * (x + Decimal("0.044715") * x**3)
        return x / 2 * (1 + (1 - 2 * _logistic(-2 * inner)))
    return x / 2 * (1 + _erf(x / Decimal(2).sqrt()))


def _hard(x: Decimal) -> Decimal:
    return min(max(x, Decimal(0)), Decimal(1))


def _sloped(op: Any, x: Exact) -> Exact:
    slope = _by_channel(op.slope, x)
    return DEFINITIONS[type(op.op)](op.op, x * slope) / slope


def _by_channel(parameter: npt.ArrayLike, x: Exact) -> Exact:
    """Parameters ``(C,)``, or one number, along the channels of ``x``."""
    numbers = _decimals(np.atleast_1d(parameter))
    return numbers.reshape(-1, *(1,) * (x.ndim - 2))


def _root(x: Exact) -> Exact:
    result: Exact = np.frompyfunc(lambda v: v.sqrt(), 1, 1)(x)
    return result


def _batch_norm(op: Any, x: Exact) -> Exact:
    gamma, beta, mean, var = (_by_channel(p, x) for p in (op.gamma, op.beta, op.mean, op.var))
    y: Exact = gamma * (x - mean) / _root(var + Decimal(op.eps)) + beta
    return y


def _normalization(op: Any, x: Exact) -> Exact:
    """Each group of channels by itself; at each place of space, or over all of it."""
    y = np.empty_like(x)
    size = x.shape[1] // op.norm_groups
    eps = _decimals(np.broadcast_to(op.eps, op.norm_groups))
    for n in range(len(x)):
        for group in range(op.norm_groups):
            own = slice(group * size, (group + 1) * size)
            places: list[Any] = [...] if op.over_space else [(slice(None), *at) for at in np.ndindex(x.shape[2:])]
            for at in places:
                block: Exact = x[n, own][at]
                centred: Exact = block - sum(block.flat) / block.size if op.centred else block
                power = sum((v * v for v in centred.flat), Decimal(0)) / block.size
                y[n, own][at] = centred / (power + eps[group]).sqrt()
    y = y * _by_channel(op.gamma, x)
    return y if op.beta is None else y + _by_channel(op.beta, x)


def _softmax(op: Any, x: Exact) -> Exact:
    axis = op.axis if op.axis > 0 else x.ndim + op.axis
    kept = np.ones(x.shape, bool)
    if isinstance(op.mask, str):
        kept = np.broadcast_to(np.tril(np.ones(x.shape[-2:], bool)), x.shape)
    elif op.mask is not None:
        kept = np.broadcast_to(np.isfinite(op.mask), x.shape)
        x = x + _decimals(np.where(np.isfinite(op.mask), op.mask, 0))
    exponentials = np.frompyfunc(lambda v, keep: v.exp() if keep else Decimal(0), 2, 1)(x, kept)
    shares: Exact = exponentials / exponentials.sum(axis=axis, keepdims=True)
    return shares


def _windows(op: Any, x: Exact) -> list[tuple[Any, list[Any]]]:
    """For each place of a pool's output the entries ``(N, C)`` in its window; padding left out."""
    sizes, axes = op.output_shape(x.shape[1:])[1:], x.ndim - 2
    kernel, dilation = (np.broadcast_to(v, axes).tolist() for v in (op.kernel, op.dilation))
    stride = kernel if op.stride is None else np.broadcast_to(op.stride, axes).tolist()
    before = [p if isinstance(p, int) else p[0] for p in ([op.padding] * axes if isinstance(op.padding, int) else op.padding)]
    found = []
    for at in np.ndindex(*sizes):
        taps = (tuple(a * s + t * d - b for a, s, t, d, b in zip(at, stride, tap, dilation, before,
                                                                 strict=True)) for tap in np.ndindex(*kernel))
        found.append((at, [x[(slice(None), slice(None), *place)] for place in taps
                           if all(0 <= p < n for p, n in zip(place, x.shape[2:], strict=True))]))
    return found


def _avg_pool(op: Any, x: Exact) -> Exact:
    y = np.empty((len(x), *op.output_shape(x.shape[1:])), object)
    taps = math.prod(np.broadcast_to(op.kernel, x.ndim - 2).tolist())
    for at, entries in _windows(op, x):
        y[(slice(None), slice(None), *at)] = sum(entries) / (taps if op.count_include_pad else len(entries))
    return y


def _lp_pool(op: Any, x: Exact) -> Exact:
    y = np.empty((len(x), *op.output_shape(x.shape[1:])), object)
    root = np.frompyfunc(lambda v: v if v == 0 else (v.ln() / op.p).exp() if op.p > 2 else v.sqrt() if op.p == 2 else v, 1, 1)
    for at, entries in _windows(op, x):
        y[(slice(None), slice(None), *at)] = root(sum(abs(e) ** op.p for e in entries))
    return y


def _global_avg_pool(op: Any, x: Exact) -> Exact:
    axes = tuple(range(2, x.ndim))
    return x.sum(axis=axes, keepdims=True) / math.prod(x.shape[2:])  # type: ignore[no-any-return]


def _joined(function: Callable[[Any, Any], Any]) -> Callable[..., Exact]:
    def apply(op: Any, *inputs: Exact) -> Exact:
        result = inputs[0]
        for x in inputs[1:]:
            result = np.frompyfunc(function, 2, 1)(result, x)
        return result

    return apply


def _dense(op: Any, x: Exact) -> Exact:
    y: Exact = x @ _decimals(op.weight).T
    return y if op.bias is None else y + _decimals(op.bias)


def _clip(op: Any, x: Exact) -> Exact:
    low, high = (_by_channel(b, x) for b in (op.low, op.high))
    return np.frompyfunc(lambda v, a, b: min(max(v, a), b), 3, 1)(x, low, high)  # type: ignore[no-any-return]


def _rotary(op: Any, x: Exact) -> Exact:
    y = x.copy()
    cos, sin = _decimals(op.cos), _decimals(op.sin)
    pairs, width = len(cos), x.shape[1] // op.heads
    for head in range(op.heads):
        for pair in range(pairs):
            first = head * width + (2 * pair if op.interleaved else pair)
            second = first + (1 if op.interleaved else pairs)
            a, b = x[:, first], x[:, second]
            y[:, first], y[:, second] = a * cos[pair] - b * sin[pair], b * cos[pair] + a * sin[pair]
    return y


#: The definitions of the ops that round; and of those that may stand around them in a case.
DEFINITIONS: dict[type, Callable[..., Exact]] = {
    ops.Sigmoid: _entrywise(lambda op, x: _logistic(x)),
    ops.Tanh: _entrywise(lambda op, x: 1 - 2 * _logistic(-2 * x)),
    ops.SiLU: _entrywise(lambda op, x: x * _logistic(x)),
    ops.HardSwish: _entrywise(lambda op, x: x * _hard(x / 6 + Decimal("0.5"))),
    ops.HardSigmoid: _entrywise(lambda op, x: _hard(Decimal(op.alpha) * x + Decimal(op.beta))),
    ops.Erf: _entrywise(lambda op, x: _erf(x)),
    ops.GELU: _entrywise(_gelu),
    ops.Sloped: _sloped,
    ops.Softmax: _softmax,
    ops.BatchNorm: _batch_norm,
    ops.LayerNorm: _normalization, ops.RMSNorm: _normalization, ops.GroupNorm: _normalization, ops.InstanceNorm: _normalization,
    ops.AvgPool: _avg_pool, ops.LpPool: _lp_pool, ops.GlobalAvgPool: _global_avg_pool,
    ops.Rotary: _rotary,
    ops.Dense: _dense,
    ops.ReLU: _entrywise(lambda op, x: max(x, Decimal(0))),
    ops.LeakyReLU: _entrywise(lambda op, x: x if x > 0 else Decimal(op.slope) * x),
    ops.Clip: _clip,
    ops.Add: _joined(lambda a, b: a + b),
    ops.Mul: _joined(lambda a, b: a * b),
    ops.Identity: lambda op, x: x,
}
