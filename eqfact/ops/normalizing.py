"""Which layers divide a value by what it comes to itself, so that a common factor of their input vanishes?

LayerNorm, RMSNorm, GroupNorm and InstanceNorm: ``y = gamma (x - mean) / sqrt(var + eps) + beta``. The output absorbs any factor in gamma
and beta. The channels that are normalised together share one factor ``s``, which ``eps' = s**2 eps`` takes up (docs/algebra.md): so these
are weighted ops whose weights are not divided by the factors of their input, and engines compute them in float.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from eqfact.ops.base import (
    Array,
    Labels,
    Shape,
    Trace,
    Weighted,
    along_channels,
    channel_vector,
    finite_magnitude,
    integers,
    one_input,
    parameter,
    read_only,
    scaled,
)

#: Roundings of a normalisation besides those of its sums.
ROUNDINGS = 8


class Normalization(Weighted):
    """What normalisations share. ``gamma`` and ``beta`` ``(C,)``; ``eps`` one number, or one for each group of channels.

    >>> x = np.array([[3.0, -1.0]])
    >>> LayerNorm(np.ones(2), np.zeros(2), eps=0.0).forward(x), RMSNorm(np.ones(2), eps=0.0).forward(x).round(3)
    (array([[ 1., -1.]]), array([[ 1.342, -0.447]]))
    """

    gamma: Array
    beta: Array | None
    eps: float | Array
    #: How many groups of channels are normalised, each by itself.
    norm_groups: int
    gridded = False
    divides = False
    #: Whether the mean is taken off, and whether mean and power are taken over space, too.
    centred: bool = True
    over_space: bool = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "gamma", parameter(f"{name} gamma", self.gamma, 1))
        if self.beta is not None:
            object.__setattr__(self, "beta", parameter(f"{name} beta", self.beta, 1))
            if len(self.beta) != len(self.gamma):
                raise ValueError(f"{name} needs as many betas as gammas, got {len(self.beta)} and {len(self.gamma)}")
        if len(self.gamma) % self.norm_groups:
            raise ValueError(f"{name} has {len(self.gamma)} channels, which {self.norm_groups} groups do not divide")
        eps = np.asarray(self.eps, np.float64)
        if eps.shape not in ((), (self.norm_groups,)) or not np.isfinite(eps).all() or (eps < 0).any():
            raise ValueError(f"{name} eps must be a number of at least 0, or one for each of {self.norm_groups} groups, got {self.eps!r}")
        object.__setattr__(self, "eps", float(eps) if eps.ndim == 0 else read_only(eps))

    @property
    def weight(self) -> Array:  # type: ignore[override]
        """gamma as ``(C, 1)``."""
        return self.gamma[:, None]

    @property
    def bias(self) -> Array | None:  # type: ignore[override]
        """beta."""
        return self.beta

    @property
    def groups(self) -> int:  # type: ignore[override]
        """As weights, every channel is a group of its own."""
        return len(self.gamma)

    @property
    def roundings(self) -> int:
        return ROUNDINGS

    @cached_property
    def absolute(self) -> Normalization:
        return replace(self, gamma=read_only(np.abs(self.gamma)), beta=None)  # type: ignore[type-var]  # final ops are dataclasses

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        if shape[0] != len(self.gamma):
            raise ValueError(f"{type(self).__name__} has {len(self.gamma)} channels, got {shape[0]}")
        return tuple(shape)

    def trace(self, trace: Trace, *inputs: Labels) -> Labels:
        shape = self.output_shape(*(x.shape for x in inputs))
        trace.tie_rows(channel_vector(inputs[0]).reshape(self.norm_groups, -1))
        return trace.absorb(self, inputs[0], shape)

    def rescale(self, f_out: Array, *f_in: Array) -> Normalization:
        mates = np.asarray(f_in[0], np.float64).reshape(self.norm_groups, -1)
        if (mates != mates[:, :1]).any():
            raise ValueError(f"{type(self).__name__} divides channels by what they come to together: they must share one factor, "
                             f"got {f_in[0].min():g} to {f_in[0].max():g}")
        s = mates[:, 0]
        eps = self.eps * s**2
        one = isinstance(self.eps, float) and bool(np.all(eps == eps[0]))  # one eps for all groups stays one
        beta = None if self.beta is None else scaled(self.beta, f_out, "beta")
        return replace(self, gamma=scaled(self.gamma, f_out, "gamma"), beta=beta, eps=float(eps[0]) if one else eps)  # type: ignore[type-var]

    def _grouped(self, x: Array) -> tuple[Array, tuple[int, ...]]:
        """``(N, groups, channels of each, *spatial)``, and the axes that are normalised over."""
        return x.reshape(len(x), self.norm_groups, -1, *x.shape[2:]), tuple(range(2, x.ndim + 1)) if self.over_space else (2,)

    def _parts(self, x: Array) -> tuple[Array, Array, tuple[int, ...]]:
        """The input with its mean taken off, what it is divided by, and the axes that are normalised over."""
        grouped, axes = self._grouped(x)
        if self.centred:
            grouped = grouped - grouped.mean(axis=axes, keepdims=True)
        eps = along_channels(np.atleast_1d(np.asarray(self.eps)), grouped.ndim - 1).astype(x.dtype)
        root: Array = np.sqrt((grouped * grouped).mean(axis=axes, keepdims=True) + eps)
        return grouped, root, axes

    def _normalized(self, x: Array) -> Array:
        grouped, root, _ = self._parts(x)
        return np.divide(grouped, root, out=np.zeros_like(grouped), where=root > 0).reshape(x.shape)

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        y = self._normalized(x)
        y *= along_channels(self.gamma, x.ndim - 1).astype(x.dtype, copy=False)
        if self.beta is not None:
            y += along_channels(self.beta, x.ndim - 1)
        return y

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        (x,) = inputs
        grouped, root, axes = self._parts(x)
        inverse = np.divide(1, root, out=np.zeros_like(root), where=root > 0)
        unit = grouped * inverse
        g, _ = self._grouped(cotangent * along_channels(self.gamma, x.ndim - 1).astype(x.dtype, copy=False))
        back = g - unit * (g * unit).mean(axis=axes, keepdims=True)
        if self.centred:
            back = back - g.mean(axis=axes, keepdims=True)
        return ((back * inverse).reshape(x.shape),)

    def weight_vjp(self, cotangent: Array, x: Array) -> Array:
        slope: Array = (cotangent * self._normalized(x)).sum(axis=(0, *range(2, x.ndim)))
        return slope[:, None]

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        """With ``r = sqrt(var + eps)``, the norm of a vector, and ``d`` the root mean square of errors: ``|dr| <= d``, so that
        ``|d(x / r)| <= (|dx| + |x / r| d) / (r - u d)`` for the centred ``x``; no entry of ``x / r`` exceeds the root of their number.
        """
        (e,), (x,) = errors, inputs
        grouped, root, axes = self._parts(x)
        of_group, _ = self._grouped(e)
        size = math.prod(grouped.shape[a] for a in axes)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            top = of_group.max(axis=axes, keepdims=True)
            largest = np.where(top > 0, top, 1)
            d = largest * np.sqrt(((of_group / largest) ** 2).mean(axis=axes, keepdims=True))
            moved = of_group + of_group.mean(axis=axes, keepdims=True) if self.centred else of_group
            bound = (moved + np.abs(grouped) / root * d) / np.maximum(root - u * d, 0)
            most = x.dtype.type(2 * math.sqrt(size) / u)
            bound = np.where(top > 0, np.fmin(bound, most), 0)  # also where there is nothing to divide by, and no number comes out
        passed: Array = bound.reshape(x.shape) * along_channels(np.abs(self.gamma), x.ndim - 1)
        return passed

    def errors(self, errors: Sequence[Array], inputs: Sequence[Array], output: Array, u: float) -> Array:
        """The sums round once an entry: as if every entry were off by so much."""
        (e,), (x,) = errors, inputs
        grouped, axes = self._grouped(x)
        count = math.prod(grouped.shape[a] for a in axes) + ROUNDINGS
        own = count * finite_magnitude(x) if self.centred else ROUNDINGS * finite_magnitude(x)
        beta = np.zeros(1, output.dtype) if self.beta is None else np.abs(self.beta)
        size = np.abs(self._normalized(x)) * along_channels(np.abs(self.gamma), x.ndim - 1)
        bound: Array = (self.passes([e + own], inputs, u) + count * size + ROUNDINGS * along_channels(beta, x.ndim - 1)
                        + count * np.finfo(output.dtype).tiny)
        return bound

    def magnitude(self, *inputs: Array) -> Array:
        """No entry of ``x / r`` exceeds the root of how many are normalised together."""
        (m,) = inputs
        grouped, axes = self._grouped(m)
        most = math.sqrt(math.prod(grouped.shape[a] for a in axes)) * np.abs(self.gamma)
        beta = 0 if self.beta is None else np.abs(self.beta)
        return np.broadcast_to(along_channels(most + beta, m.ndim - 1), m.shape).astype(m.dtype)


@dataclass(frozen=True, eq=False)
class LayerNorm(Normalization):
    """``gamma (x - mean) / sqrt(var + eps) + beta``, mean and variance over the channels, position by position (ONNX's over features).

    >>> LayerNorm(np.ones(2), eps=0.0).forward(np.array([[1.0, 5.0]]))
    array([[-1.,  1.]])
    """

    gamma: Array
    beta: Array | None = None
    eps: float | Array = 1e-5
    norm_groups = 1


@dataclass(frozen=True, eq=False)
class RMSNorm(Normalization):
    """``gamma x / sqrt(mean(x**2) + eps)``, over the channels, position by position.

    >>> RMSNorm(np.ones(2), eps=0.0).forward(np.array([[3.0, 3.0]]))
    array([[1., 1.]])
    """

    gamma: Array
    beta: Array | None = None
    eps: float | Array = 1e-5
    norm_groups = 1
    centred = False


@dataclass(frozen=True, eq=False)
class GroupNorm(Normalization):
    """As LayerNorm, over the channels of each of ``norm_groups`` groups and over space together.

    >>> GroupNorm(2, np.ones(2), eps=0.0).forward(np.array([[[1.0, 5.0], [0.0, 2.0]]]))
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """

    norm_groups: int
    gamma: Array
    beta: Array | None = None
    eps: float | Array = 1e-5
    over_space = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm_groups", integers("GroupNorm norm_groups", self.norm_groups, 1))
        super().__post_init__()


@dataclass(frozen=True, eq=False)
class InstanceNorm(Normalization):
    """As LayerNorm, over space, channel by channel: every channel keeps a factor of its own.

    >>> InstanceNorm(np.ones(1), eps=0.0).forward(np.array([[[1.0, 5.0]]]))
    array([[[-1.,  1.]]])
    """

    gamma: Array
    beta: Array | None = None
    eps: float | Array = 1e-5
    over_space = True

    @property
    def norm_groups(self) -> int:  # type: ignore[override]
        """Every channel is a group of its own."""
        return len(self.gamma)
