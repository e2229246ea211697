"""Which layers only move entries: regroup axes, choose entries along one, and pass each channel's factor on with it?

A factor belongs to a channel; where entries of several channels end up in one, these channels must share it. All is said about axes and
their factors, never about entries, so that a network with a million pixels costs no more than one with ten.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from eqfact.ops.base import Array, Commuting, Labels, Op, Shape, T, Trace, channel_vector, integers, one_input, spread


@dataclass(frozen=True, eq=False)
class Rearrange(Commuting):
    """Split every axis of ``(C, *spatial)`` into factors, and make new axes of these.

    ``split[i]`` are the sizes of the factors of input axis ``i``, the outermost first; ``groups[j]`` are the factors that output axis ``j``
    is made of, numbered through all input axes. Channels of which entries come together in one output channel must share one factor.

    >>> depth_to_space = Rearrange(((2, 2), (1,), (1,)), ((), (2, 0), (3, 1)))
    >>> depth_to_space.forward(np.arange(4.0).reshape(1, 4, 1, 1))
    array([[[[0., 1.],
             [2., 3.]]]])
    """

    split: tuple[Shape, ...]
    groups: tuple[tuple[int, ...], ...]
    moves = True

    def __post_init__(self) -> None:
        for name, minimum in (("split", 1), ("groups", 0)):
            parts = tuple(integers(f"Rearrange {name}", tuple(part), minimum) for part in getattr(self, name))
            object.__setattr__(self, name, parts)
        if sorted(itertools.chain(*self.groups)) != list(range(len(self._factors))) or not self.split or not self.groups:
            raise ValueError(f"Rearrange groups must name each of the {len(self._factors)} factors of {self.split} once, got {self.groups}")

    @cached_property
    def _factors(self) -> Shape:
        return tuple(itertools.chain(*self.split))

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        if shape != (whole := tuple(map(math.prod, self.split))):
            raise ValueError(f"Rearrange splits a value of shape {whole}, got {shape}")
        return tuple(math.prod(self._factors[i] for i in group) for group in self.groups)

    def trace(self, trace: Trace, *inputs: Labels) -> Labels:
        shape = self.output_shape(*(x.shape for x in inputs))
        vector = channel_vector(inputs[0])
        trace.tie_rows(self._mates(vector))
        return spread(self.carry(vector), shape)

    def _mates(self, vector: npt.NDArray[T]) -> npt.NDArray[T]:
        """A vector with one entry a channel, as ``(stays, leaves)``: entries of one row come together in one channel."""
        own = range(len(self.split[0]))
        stays = [i for i in self.groups[0] if i in own]
        leaves = [i for i in own if i not in stays]
        rows = math.prod(self._factors[i] for i in stays)
        return vector.reshape(self.split[0]).transpose(*stays, *leaves).reshape(rows, -1)

    def carry(self, *vectors: npt.NDArray[T]) -> npt.NDArray[T]:
        stays = self._mates(vectors[0])[:, 0]
        own = range(len(self.split[0]))
        inner = stays.reshape([self._factors[i] if i in own else 1 for i in self.groups[0]])
        return np.broadcast_to(inner, [self._factors[i] for i in self.groups[0]]).reshape(-1)

    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        mates = self._mates(np.asarray(f_in[0]))
        if (mates != mates[:, :1]).any():
            raise ValueError(f"Rearrange {self.split} to {self.groups} puts several channels into one: they must share one factor")
        return super().rescale(f_out, *f_in)

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        return self._moved(x, self._factors, tuple(itertools.chain(*self.groups)), self.output_shape(x.shape[1:]))

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        order = tuple(itertools.chain(*self.groups))
        back = tuple(int(i) for i in np.argsort(order))
        return (self._moved(cotangent, tuple(self._factors[i] for i in order), back, inputs[0].shape[1:]),)

    @staticmethod
    def _moved(x: Array, sizes: Shape, order: tuple[int, ...], shape: Shape) -> Array:
        return x.reshape(len(x), *sizes).transpose(0, *(i + 1 for i in order)).reshape(len(x), *shape)


@dataclass(frozen=True, eq=False)
class Take(Commuting):
    """Entries ``indices`` along one axis of ``(C, *spatial)`` (0 is the channels), in this order; an entry may be taken several times.

    >>> Take((1, 1, 0), axis=1).forward(np.array([[[5.0, 6.0]]]))
    array([[[6., 6., 5.]]])
    """

    indices: tuple[int, ...]
    axis: int = 0
    moves = True

    def __post_init__(self) -> None:
        axis = integers("Take axis", self.axis, 0)
        object.__setattr__(self, "axis", axis)
        object.__setattr__(self, "indices", integers("Take indices", tuple(self.indices), 0))
        if not self.indices:
            raise ValueError("Take needs at least one index")

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        if self.axis >= len(shape) or max(self.indices) >= shape[self.axis]:
            raise ValueError(f"Take of index {max(self.indices)} along axis {self.axis} does not fit a value of shape {shape}")
        return (*shape[:self.axis], len(self.indices), *shape[self.axis + 1:])

    def carry(self, *vectors: npt.NDArray[T]) -> npt.NDArray[T]:
        return vectors[0][list(self.indices)] if self.axis == 0 else vectors[0]

    def forward(self, *inputs: Array) -> Array:
        return np.take(inputs[0], self.indices, axis=self.axis + 1)

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        whole = np.zeros_like(inputs[0])
        np.add.at(np.moveaxis(whole, self.axis + 1, 0), list(self.indices), np.moveaxis(cotangent, self.axis + 1, 0))
        return (whole,)
