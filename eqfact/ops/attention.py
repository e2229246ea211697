"""How does a transformer look from one token at the others? Two products of values, with a Softmax between them.

Tokens are the last axis of space, features are channels, so that layers of tokens are convolutions with a kernel of 1. ``Scores`` and
``Mix`` ask each for one relation between factors (docs/algebra.md): queries and keys carry inverse ones, values and what is made of them
the same ones. ``Rotary`` turns pairs of channels into each other, which must share a factor.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eqfact.ops.base import Array, Commuting, Labels, Op, Shape, T, Trace, channel_vector, integers, one_input, parameter, product
from eqfact.ops.products import check_product, passes_through_product


class _OfHeads(Op):
    """A product of two values head by head. As many ``heads`` of queries in a row as there are for each of ``kv_heads`` share one head of
    keys or values (grouped queries); 0 stands for as many as heads."""

    heads: int
    kv_heads: int

    def __post_init__(self) -> None:
        name = type(self).__name__
        heads = integers(f"{name} heads", self.heads, 1)
        kv = integers(f"{name} kv_heads", self.kv_heads, 0) or heads
        object.__setattr__(self, "heads", heads)
        object.__setattr__(self, "kv_heads", kv)
        if self.heads % self.kv_heads:
            raise ValueError(f"{name} has {heads} heads, which {kv} heads of keys and values do not divide")

    def _two(self, shapes: Sequence[Shape]) -> tuple[Shape, Shape]:
        if len(shapes) != 2:
            raise ValueError(f"{type(self).__name__} reads two values, got {len(shapes)}")
        return shapes[0], shapes[1]

    def _width(self, what: str, channels: int, heads: int) -> int:
        if channels % heads:
            raise ValueError(f"{type(self).__name__} reads {what} of {channels} channels, which {heads} heads do not divide")
        return channels // heads

    def _repeated(self, of_kv: npt.NDArray[T]) -> npt.NDArray[T]:
        """What each head of keys or values has, ``(kv_heads * width,)``, for each head that reads it, ``(heads, width)``."""
        return np.repeat(of_kv.reshape(self.kv_heads, -1), self.heads // self.kv_heads, axis=0)

    def _by_kv_head(self, x: Array, heads: int) -> Array:
        """``(N, heads * width, *spatial)`` as ``(N, kv_heads, heads / kv_heads, *spatial, width)``."""
        shared = x.reshape(len(x), self.kv_heads, heads // self.kv_heads, -1, *x.shape[2:])
        return np.moveaxis(shared, 3, -1)

    @staticmethod
    def _joined(x: Array) -> Array:
        """The inverse of :meth:`_by_kv_head`."""
        back = np.moveaxis(x, -1, 3)
        return back.reshape(len(x), -1, *back.shape[4:])

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        """The error of each input times what the other may come to."""
        absolute = self._absolute
        result: Array = sum(absolute.forward(*summand) for summand in passes_through_product(errors, inputs, u))  # type: ignore[assignment]
        return result

    @property
    def _absolute(self) -> Op:
        return self

    def errors(self, errors: Sequence[Array], inputs: Sequence[Array], output: Array, u: float) -> Array:
        """As many roundings as there are terms in a sum."""
        count = self._terms(inputs) + self.roundings
        sizes = [np.abs(x) for x in inputs]
        bound: Array = self.passes(errors, inputs, u) + count * self._absolute.forward(*sizes) + count * np.finfo(output.dtype).tiny
        return bound

    @abstractmethod
    def _terms(self, inputs: Sequence[Array]) -> int:
        """How many products are added up to an entry."""


@dataclass(frozen=True, eq=False)
class Scores(_OfHeads):
    """``scale * q . k`` for every head, query token and key token: ``(N, heads * d, ..., T)`` and ``(N, kv_heads * d, ..., S)`` to
    ``(N, heads, ..., T, S)``. ``u_q + u_k = u_y``, channel by channel of each head.

    >>> Scores(1, scale=0.5).forward(np.array([[[1.0], [2.0]]]), np.array([[[3.0, 0.0], [0.0, 4.0]]]))
    array([[[[1.5, 4. ]]]])
    """

    heads: int
    kv_heads: int = 0
    scale: float = 1.0
    sums = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "scale", float(self.scale))
        if not math.isfinite(self.scale):
            raise ValueError(f"Scores scale must be finite, got {self.scale}")

    def output_shape(self, *shapes: Shape) -> Shape:
        q, k = self._two(shapes)
        if len(q) < 2 or len(q) != len(k) or q[1:-1] != k[1:-1]:
            raise ValueError(f"Scores reads queries and keys over tokens, with equal sizes of all axes before the tokens, got {q} and {k}")
        widths = self._width("queries", q[0], self.heads), self._width("keys", k[0], self.kv_heads)
        if widths[0] != widths[1]:
            raise ValueError(f"Scores needs queries and keys of equally many channels a head, got {widths[0]} and {widths[1]}")
        return (self.heads, *q[1:], k[-1])

    def trace(self, trace: Trace, *inputs: Labels) -> Labels:
        y = trace.fresh(self.output_shape(*(x.shape for x in inputs)))
        q, k = (channel_vector(x) for x in inputs)
        width = len(q) // self.heads
        trace.relate((1, q), (1, self._repeated(k).reshape(-1)), (-1, np.repeat(channel_vector(y), width)),
                     reason="Scores multiplies queries and keys, and the factors of the others leave it none")
        return y

    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        q, k = f_in
        check_product(self, np.repeat(f_out, len(q) // self.heads), np.asarray(q), self._repeated(np.asarray(k)).reshape(-1))
        return self

    @property
    def _absolute(self) -> Scores:
        return self if self.scale >= 0 else Scores(self.heads, self.kv_heads, -self.scale)

    def _terms(self, inputs: Sequence[Array]) -> int:
        return int(inputs[0].shape[1]) // self.heads

    def forward(self, *inputs: Array) -> Array:
        q, k = inputs
        shape = self.output_shape(q.shape[1:], k.shape[1:])
        y = product(self._by_kv_head(q, self.heads), self._by_kv_head(k, self.kv_heads).swapaxes(-1, -2))
        y *= q.dtype.type(self.scale)
        return y.reshape(len(q), *shape)

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        q, k = (self._by_kv_head(x, heads) for x, heads in zip(inputs, (self.heads, self.kv_heads), strict=True))
        g = cotangent * cotangent.dtype.type(self.scale)
        g = g.reshape(len(g), self.kv_heads, self.heads // self.kv_heads, *g.shape[2:])
        back = product(g.swapaxes(-1, -2), q).sum(axis=2, keepdims=True)
        return self._joined(product(g, k)), self._joined(back)


@dataclass(frozen=True, eq=False)
class Mix(_OfHeads):
    """``sum p v`` over the tokens, for every head: ``(N, heads, ..., T, S)`` and ``(N, kv_heads * d, ..., S)`` to
    ``(N, heads * d, ..., T)``. ``u_y = u_p + u_v``, where ``u_p`` is 0 behind a Softmax.

    >>> Mix(1).forward(np.array([[[[0.5, 0.5]]]]), np.array([[[3.0, 1.0], [0.0, 4.0]]]))
    array([[[2.],
            [2.]]])
    """

    heads: int
    kv_heads: int = 0

    def output_shape(self, *shapes: Shape) -> Shape:
        p, v = self._two(shapes)
        if len(p) < 3 or len(p) != len(v) + 1 or (*p[1:-2], p[-1]) != v[1:]:
            raise ValueError(f"Mix reads probabilities (heads, ..., T, S) and values (channels, ..., S), got {p} and {v}")
        if p[0] != self.heads:
            raise ValueError(f"Mix has {self.heads} heads, got probabilities of {p[0]}")
        return (self.heads * self._width("values", v[0], self.kv_heads), *p[1:-1])

    def trace(self, trace: Trace, *inputs: Labels) -> Labels:
        y = trace.fresh(self.output_shape(*(x.shape for x in inputs)))
        p, v = (channel_vector(x) for x in inputs)
        of_head = self._repeated(v)
        trace.relate((1, y), (-1, np.repeat(p, of_head.shape[1])), (-1, of_head.reshape(-1)),
                     reason="Mix multiplies probabilities and values, and the factors of the others leave it none")
        return y

    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        of_head = self._repeated(np.asarray(f_in[1]))
        check_product(self, f_out, np.repeat(f_in[0], of_head.shape[1]), of_head.reshape(-1))
        return self

    def _terms(self, inputs: Sequence[Array]) -> int:
        return int(inputs[0].shape[-1])

    def forward(self, *inputs: Array) -> Array:
        p, v = inputs
        self.output_shape(p.shape[1:], v.shape[1:])
        p = p.reshape(len(p), self.kv_heads, self.heads // self.kv_heads, *p.shape[2:])
        return self._joined(product(p, self._by_kv_head(v, self.kv_heads)))

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        p, v = inputs
        shared = p.reshape(len(p), self.kv_heads, self.heads // self.kv_heads, *p.shape[2:])
        g = self._by_kv_head(cotangent, self.heads)
        of_p = product(g, self._by_kv_head(v, self.kv_heads).swapaxes(-1, -2)).reshape(p.shape)
        return of_p, self._joined(product(shared.swapaxes(-1, -2), g).sum(axis=2, keepdims=True))


@dataclass(frozen=True, eq=False)
class Rotary(Commuting):
    """Rotary positions: pairs of channels of each head, turned by an angle that depends on the token (Su et al. 2021).

    ``cos`` and ``sin`` are ``(pairs, T)``. Channel ``i`` of a head is paired with ``i + pairs``, or ``2 i`` with ``2 i + 1`` if
    ``interleaved``; channels behind the pairs pass as they are. The channels of a pair must share one factor.

    >>> Rotary(1, np.zeros((1, 1)), np.ones((1, 1))).forward(np.array([[[1.0], [2.0]]]))
    array([[[-2.],
            [ 1.]]])
    """

    heads: int
    cos: Array
    sin: Array
    interleaved: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", integers("Rotary heads", self.heads, 1))
        for name in ("cos", "sin"):
            object.__setattr__(self, name, parameter(f"Rotary {name}", getattr(self, name), 2))
        if self.cos.shape != self.sin.shape:
            raise ValueError(f"Rotary needs cos and sin of one shape (pairs, T), got {self.cos.shape} and {self.sin.shape}")
        if not isinstance(self.interleaved, bool):
            raise TypeError(f"Rotary interleaved must be True or False, got {self.interleaved!r}")

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        pairs, tokens = self.cos.shape
        if len(shape) < 2 or shape[-1] != tokens:
            raise ValueError(f"Rotary has angles for {tokens} tokens, got a value of shape {shape}")
        if shape[0] % self.heads or shape[0] // self.heads < 2 * pairs:
            raise ValueError(f"Rotary turns {pairs} pairs of channels in each of {self.heads} heads, got {shape[0]} channels")
        return tuple(shape)

    def _pairs(self, channels: int) -> tuple[Labels, Labels]:
        """The channels that are first in their pair, ``(heads, pairs)``, and those that are second."""
        pairs = len(self.cos)
        first = np.arange(pairs) * 2 if self.interleaved else np.arange(pairs)
        start = np.arange(self.heads)[:, None] * (channels // self.heads)
        return start + first, start + first + (1 if self.interleaved else pairs)

    def trace(self, trace: Trace, *inputs: Labels) -> Labels:
        labels = super().trace(trace, *inputs)
        vector = channel_vector(labels)
        first, second = self._pairs(len(vector))
        trace.tie(vector[first].reshape(-1), vector[second].reshape(-1))
        return labels

    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        first, second = self._pairs(len(f_out))
        apart = np.asarray(f_out)[first] != np.asarray(f_out)[second]
        if apart.any():
            head, pair = np.argwhere(apart)[0]
            raise ValueError(f"Rotary turns channels {first[head, pair]} and {second[head, pair]} into each other: "
                             "they must share one factor")
        return super().rescale(f_out, *f_in)

    def _turned(self, x: Array, cos: Array, sin: Array) -> Array:
        first, second = self._pairs(x.shape[1])
        shape = (len(cos), *(1,) * (x.ndim - 3), cos.shape[1])
        c, s = (v.reshape(shape).astype(x.dtype, copy=False) for v in (cos, sin))
        y = np.array(x)
        a, b = x[:, first], x[:, second]
        y[:, first], y[:, second] = a * c - b * s, b * c + a * s
        return y

    def forward(self, *inputs: Array) -> Array:
        return self._turned(inputs[0], self.cos, self.sin)

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return (self._turned(cotangent, self.cos, -self.sin),)

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        (e,) = errors
        first, second = self._pairs(e.shape[1])
        shape = (len(self.cos), *(1,) * (e.ndim - 3), self.cos.shape[1])
        c, s = (np.abs(v).reshape(shape).astype(e.dtype, copy=False) for v in (self.cos, self.sin))
        y = np.array(e)
        a, b = e[:, first], e[:, second]
        y[:, first], y[:, second] = a * c + b * s, b * c + a * s
        return y
