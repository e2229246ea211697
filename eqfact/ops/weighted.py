"""Which layers have weights? They absorb any factor on either side: ``W'[o, i] = f_out[o] W[o, i] / f_in[i]``.

That one line (section 1 of the paper) is :meth:`Weighted.rescale`; here stand the forward passes and shape rules of
Dense, Conv and ConvTranspose in one to three dimensions, with groups, and of BatchNorm, which absorbs factors channel by channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property

import numpy as np

from eqfact.ops.base import (
    Array,
    Op,
    Padding,
    Shape,
    Weighted,
    along_channels,
    integers,
    one_input,
    paddings,
    parameter,
    per_axis,
    per_side,
    product,
    read_only,
    scaled,
    window_sizes,
)
from eqfact.ops.convolution import Sides, convolve, convolve_transposed, correlate_taps, swap_channels
from eqfact.ops.grid import Grid


def _store(op: Op, **values: object) -> None:
    for name, value in values.items():
        object.__setattr__(op, name, value)


def _weight_and_bias(op: str, weight: Array, bias: Array | None, groups: int) -> tuple[Array, Array | None]:
    weight = parameter(f"{op} weight", weight)
    if op == "Dense" and weight.ndim != 2:
        raise ValueError(f"Dense weight must be (out, in), got shape {weight.shape}")
    if op != "Dense" and weight.ndim not in (3, 4, 5):
        raise ValueError(f"{op} weight must be (out, in // groups, *kernel) with 1 to 3 spatial axes, got shape {weight.shape}")
    if len(weight) % groups:
        raise ValueError(f"{op} has {len(weight)} output channels, which {groups} groups do not divide")
    if bias is not None:
        bias = parameter(f"{op} bias", bias, 1)
        if len(bias) != len(weight):
            raise ValueError(f"{op} bias has {len(bias)} entries for {len(weight)} output channels")
    return weight, bias


def _add_bias(y: Array, bias: Array | None) -> Array:
    if bias is not None:
        y += along_channels(bias, y.ndim - 1)
    return y


@dataclass(frozen=True, eq=False)
class Dense(Weighted):
    """Matrix product ``y = W x + b`` on values ``(N, in)``; weight ``(out, in)``, bias ``(out,)``.

    >>> Dense(np.eye(2), np.array([1.0, 0.0])).forward(np.array([[3.0, 4.0]]))
    array([[4., 4.]])
    """

    weight: Array
    bias: Array | None = None
    _: KW_ONLY
    grid: Grid | None = None

    def __post_init__(self) -> None:
        weight, bias = _weight_and_bias("Dense", self.weight, self.bias, 1)
        _store(self, weight=weight, bias=bias)

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        if len(shape) != 1:
            raise ValueError(f"Dense reads (N, {self.weight.shape[1]}), got a value with spatial shape {shape[1:]}; put Flatten before it")
        if shape[0] != self.weight.shape[1]:
            raise ValueError(f"Dense weight {self.weight.shape} needs {self.weight.shape[1]} input channels, got {shape[0]}")
        return (len(self.weight),)

    def forward(self, *inputs: Array) -> Array:
        return _add_bias(product(inputs[0], self.weight.T), self.bias)

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return (product(cotangent, self.weight),)

    def weight_vjp(self, cotangent: Array, x: Array) -> Array:
        return product(cotangent.T, x)


@dataclass(frozen=True, eq=False)
class _Convolution(Weighted):
    """What Conv and ConvTranspose share: parameters and their checks."""

    weight: Array
    bias: Array | None = None
    _: KW_ONLY
    stride: int | tuple[int, ...] = 1
    padding: Padding = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    grid: Grid | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        groups = integers(f"{name} groups", self.groups, 1)
        if not isinstance(groups, int):
            raise TypeError(f"{name} groups must be one integer, got {groups}")
        weight, bias = _weight_and_bias(name, self.weight, self.bias, groups)
        stride, dilation = (integers(f"{name} {key}", getattr(self, key), 1) for key in ("stride", "dilation"))
        _store(self, weight=weight, bias=bias, stride=stride, padding=paddings(self.padding), dilation=dilation, groups=groups)
        self._geometry()

    def _geometry(self) -> tuple[Shape, Sides, Shape]:
        """Stride, padding and dilation, one entry for each spatial axis."""
        axes = self.weight.ndim - 2
        return per_axis("stride", self.stride, axes), per_side(self.padding, axes), per_axis("dilation", self.dilation, axes)

    def _adjoint(self) -> Array:
        """The weights with the roles of input and output swapped, ``(in, out // groups, *kernel)``."""
        return swap_channels(self.weight, self.groups)

    def _input(self, shapes: Sequence[Shape]) -> Shape:
        """Spatial shape of the input, after a look at its channels."""
        (shape,) = one_input(self, shapes)
        expected = self.weight.shape[1] * self.groups
        if shape[0] != expected:
            raise ValueError(f"{type(self).__name__} weight {self.weight.shape} with {self.groups} groups "
                             f"needs {expected} input channels, got {shape[0]}")
        if len(shape) != self.weight.ndim - 1:
            raise ValueError(f"{type(self).__name__} has a kernel over {self.weight.ndim - 2} spatial axes, "
                             f"its input has {len(shape) - 1} (spatial shape {shape[1:]})")
        return tuple(shape[1:])


@dataclass(frozen=True, eq=False)
class Conv(_Convolution):
    """Cross-correlation in one to three dimensions, as ONNX ``Conv``; weight ``(out, in // groups, *kernel)``.

    ``groups == in`` is depthwise (``out`` a multiple of ``in``). ``padding`` is a number, one per spatial axis, or
    ``((before, after), ...)``.

    >>> Conv(np.ones((1, 1, 3)), padding=1).forward(np.array([[[1.0, 2.0, 3.0]]]))
    array([[[3., 6., 5.]]])
    """

    def output_shape(self, *shapes: Shape) -> Shape:
        return (len(self.weight), *window_sizes("Conv", self._input(shapes), self.weight.shape[2:], *self._geometry()))

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        sizes = self.output_shape(x.shape[1:])[1:]
        return convolve(x, self.weight, sizes, *self._geometry(), self.groups, self.bias)

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return (convolve_transposed(cotangent, self._adjoint(), inputs[0].shape[2:], *self._geometry(), self.groups),)

    def weight_vjp(self, cotangent: Array, x: Array) -> Array:
        return correlate_taps(x, cotangent, self.weight.shape, *self._geometry(), self.groups)


@dataclass(frozen=True, eq=False)
class ConvTranspose(_Convolution):
    """Transposed convolution in one to three dimensions, as ONNX ``ConvTranspose`` but with weight ``(out, in // groups, *kernel)``.

    Output size ``(n - 1) * stride + dilation * (k - 1) + 1 - padding + output_padding`` along each spatial axis.

    >>> ConvTranspose(np.ones((1, 1, 2)), stride=2).forward(np.array([[[1.0, 2.0]]]))
    array([[[1., 1., 2., 2.]]])
    """

    _: KW_ONLY
    output_padding: int | tuple[int, ...] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _store(self, output_padding=integers("ConvTranspose output_padding", self.output_padding, 0))
        stride, _, dilation = self._geometry()
        extra = per_axis("output_padding", self.output_padding, len(stride))
        if any(e >= max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
            raise ValueError(f"ConvTranspose output_padding {extra} must be smaller than stride {stride} or dilation {dilation}")

    def output_shape(self, *shapes: Shape) -> Shape:
        spatial = self._input(shapes)
        extra = per_axis("output_padding", self.output_padding, len(spatial))
        sizes = tuple((n - 1) * s + d * (k - 1) + 1 - sum(p) + e for n, k, s, p, d, e in zip(
            spatial, self.weight.shape[2:], *self._geometry(), extra, strict=True))
        if min(sizes) < 1:
            raise ValueError(f"ConvTranspose with padding {self.padding} leaves spatial shape {sizes} of the input's {spatial}")
        return (len(self.weight), *sizes)

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        sizes = self.output_shape(x.shape[1:])[1:]
        return _add_bias(convolve_transposed(x, self.weight, sizes, *self._geometry(), self.groups), self.bias)

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return (convolve(cotangent, self._adjoint(), inputs[0].shape[2:], *self._whole(inputs[0].shape[1:]), self.groups),)

    def weight_vjp(self, cotangent: Array, x: Array) -> Array:
        shape = self._adjoint().shape
        swapped = correlate_taps(cotangent, x, shape, *self._whole(x.shape[1:]), self.groups)
        return swap_channels(swapped, self.groups)

    def _whole(self, shape: Shape) -> tuple[Shape, Sides, Shape]:
        """The geometry of the adjoint convolution: its padding restores what this one crops, and no more than it reaches."""
        stride, padding, dilation = self._geometry()
        sizes = self.output_shape(shape)[1:]
        sides = tuple((before, max((n - 1) * s + d * (k - 1) + 1 - size - before, 0)) for n, s, d, k, size, (before, _) in zip(
            shape[1:], stride, dilation, self.weight.shape[2:], sizes, padding, strict=True))
        return stride, sides, dilation


@dataclass(frozen=True, eq=False)
class BatchNorm(Weighted):
    """``y = gamma (x - mean) / sqrt(var + eps) + beta``, channel by channel; all parameters ``(C,)``.

    As a weighted op it is a depthwise 1x1 convolution: :attr:`weight` is ``gamma / sqrt(var + eps)``, ``(C, 1)``.

    >>> one = np.ones(1)
    >>> BatchNorm(2 * one, 3 * one, one, 4 * one, eps=0.0).forward(np.array([[5.0]]))
    array([[7.]])
    """

    gamma: Array
    beta: Array
    mean: Array
    var: Array
    eps: float = 1e-5
    gridded = False

    def __post_init__(self) -> None:
        for name in ("gamma", "beta", "mean", "var"):
            _store(self, **{name: parameter(f"BatchNorm {name}", getattr(self, name), 1)})
        sizes = {name: len(getattr(self, name)) for name in ("gamma", "beta", "mean", "var")}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"BatchNorm parameters must have equal lengths, got {sizes}")
        _store(self, eps=float(self.eps))
        if self.var.min() < 0 or not np.isfinite(self.eps) or self.eps < 0 or self.var.min() + self.eps <= 0:
            raise ValueError(f"BatchNorm needs var >= 0 and var + eps > 0, got a smallest var of {self.var.min():.3g}, eps {self.eps:.3g}")

    @property
    def weight(self) -> Array:  # type: ignore[override]
        """``gamma / sqrt(var + eps)``, the slope of every channel, ``(C, 1)``."""
        # halves do not hold most eps; singles and doubles compute in their own precision
        exact = np.result_type(self.gamma, self.var, np.float32)
        slope: Array = (self.gamma / np.sqrt(self.var.astype(exact) + exact.type(self.eps))).astype(self.gamma.dtype)
        return slope[:, None]

    @property
    def bias(self) -> Array:  # type: ignore[override]
        """``beta - mean * weight``, the output at ``x = 0``."""
        return self.beta - self.mean * self.weight[:, 0]

    @property
    def groups(self) -> int:  # type: ignore[override]
        """Every channel is a group of its own."""
        return len(self.gamma)

    def output_shape(self, *shapes: Shape) -> Shape:
        (shape,) = one_input(self, shapes)
        if shape[0] != len(self.gamma):
            raise ValueError(f"BatchNorm has {len(self.gamma)} channels, got {shape[0]}")
        return tuple(shape)

    def forward(self, *inputs: Array) -> Array:
        (x,) = inputs
        y = x - along_channels(self.mean.astype(x.dtype, copy=False), x.ndim - 1)
        y *= along_channels(self.weight, x.ndim - 1)
        return _add_bias(y, self.beta)

    def magnitude(self, *inputs: Array) -> Array:
        """``|weight| (m + |mean|) + |beta|``: what is rounded, even where mean and beta cancel out."""
        (m,) = inputs
        moved = m + along_channels(np.abs(self.mean).astype(m.dtype, copy=False), m.ndim - 1)
        return _add_bias(self.absolute.forward(moved), np.abs(self.beta))

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        return (cotangent * along_channels(self.weight, cotangent.ndim - 1),)

    def weight_vjp(self, cotangent: Array, x: Array) -> Array:
        """The cotangent of the slope ``gamma / sqrt(var + eps)`` at fixed beta and mean."""
        product = cotangent * (x - along_channels(self.mean, x.ndim - 1))
        slope: Array = product.sum(axis=(0, *range(2, x.ndim)))
        return slope[:, None]

    def rescale(self, f_out: Array, *f_in: Array) -> BatchNorm:
        # eps and var stay: scaling var by f_in**2 would have to scale eps too
        return replace(self, gamma=scaled(self.gamma, f_out / f_in[0], "gamma"), beta=scaled(self.beta, f_out, "beta"),
                       mean=scaled(self.mean, f_in[0], "mean"))

    @cached_property
    def absolute(self) -> BatchNorm:
        none = np.zeros_like(self.beta)
        return replace(self, gamma=read_only(np.abs(self.gamma)), beta=none, mean=none)

    def rounds(self, inputs: Sequence[Array], output: Array) -> Array:
        shifts = np.abs(self.mean * self.weight[:, 0]) + np.abs(self.beta)
        return self.roundings * along_channels(shifts, output.ndim - 1)
