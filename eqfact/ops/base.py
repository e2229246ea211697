"""What is an op? Four questions every layer answers, and the families that answer most of them at once.

``forward`` (what do I compute), ``trace`` (which output channel carries whose factor, and what shape comes out),
``rescale`` (what am I when my inputs and my output are multiplied by factors) and ``passes`` (how far does my output move
when my inputs move, at these values). The law that binds the first three, checked for every op, is

    op.rescale(f_out, f_in).forward(f_in * x) == f_out * op.forward(x)

and it holds bit for bit when the factors are powers of two. Values are ``(N, C, *spatial)``; factors are ``(C,)``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from eqfact.ops.grid import Grid

Array = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.int64]
Shape = tuple[int, ...]
T = TypeVar("T", bound=np.generic)
V = TypeVar("V")


class Op(ABC):
    """A layer: immutable parameters and the four questions.

    Subclass a family (:class:`Weighted`, :class:`Commuting`, :class:`Blocking`) rather than this class; there is no
    registry, a subclass is all that a new layer needs.

    >>> op = Dense([[1.0, 2.0]])
    >>> op.rescale(np.array([4.0]), np.array([2.0, 1.0])).weight
    array([[2., 8.]])
    """

    #: What the op makes are sums of products of values, which engines take on as they are into an ``exponential`` op.
    sums: bool = False
    exponential: bool = False

    @property
    def roundings(self) -> int:
        """How many floating-point roundings lie between input and output, for the bound of :func:`eqfact.verify`."""
        return 4

    @abstractmethod
    def forward(self, *inputs: Array) -> Array:
        """Compute the output ``(N, C, *spatial)`` from the inputs."""

    @abstractmethod
    def output_shape(self, *shapes: Shape) -> Shape:
        """Shape ``(C, *spatial)`` of the output; :class:`ValueError` with the plain reason if the inputs do not fit."""

    @abstractmethod
    def trace(self, trace: Trace, *inputs: Labels) -> Labels:
        """Channel labels of the output, of its full shape; ties and pins go to ``trace``."""

    @abstractmethod
    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        """Return the op that maps ``f_in * x`` to ``f_out * forward(x)``; all factors are ``(C,)``."""

    @abstractmethod
    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        """A bound on ``|forward(x) - forward(inputs)| / u`` for all ``x`` within ``u * errors`` of the inputs.

        It says how errors pass *at these values*: a saturated entry passes none, a curve as much as it is steep there. Errors are in units
        of the unit roundoff ``u``, and may be infinite.
        """

    def rounds(self, inputs: Sequence[Array], output: Array) -> Array:
        """What ``forward`` may be off in units of ``u`` beyond what :meth:`passes` makes of ``roundings`` units of each input."""
        return self.roundings * finite_magnitude(output)

    def errors(self, errors: Sequence[Array], inputs: Sequence[Array], output: Array, u: float) -> Array:
        """The bound on the output's error in units of ``u``, from those of the inputs: what passes, and what the op itself rounds."""
        read = []
        for e, x in zip(errors, inputs, strict=True):
            m = finite_magnitude(x)
            m *= self.roundings
            m += e
            read.append(m)
        # among subnormal numbers a rounding is as large as at the smallest normal one
        bound: Array = self.passes(read, inputs, u) + (self.rounds(inputs, output) + self.roundings * np.finfo(output.dtype).tiny)
        return bound

    def magnitude(self, *inputs: Array) -> Array:
        """A bound on ``|forward(x)|`` for all ``|x| <= inputs``; ``|W| m + |b|`` for weighted ops."""
        zeros = [np.zeros_like(m) for m in inputs]
        with np.errstate(over="ignore"):  # an infinite bound is one, too
            bound: Array = np.abs(self.forward(*zeros)) + self.passes(inputs, zeros, 1.0)
        return bound

    def vjp(self, cotangent: Array, *inputs: Array) -> tuple[Array, ...]:
        """The cotangents of the inputs, ``J.T @ cotangent`` each; only gradient-based sensitivities ask for them."""
        raise TypeError(f"{type(self).__name__} has no vjp, so gradients do not pass; write one, or use sensitivities that need none")


@dataclass(frozen=True, eq=False)
class Relation:
    """``sum c_i u_i = 0`` for ``u = log f`` of channels, row by row of ``labels`` ``(n, terms)``, with whole ``coefficients``."""

    coefficients: tuple[int, ...]
    labels: Labels
    #: The node that asks for it.
    node: str
    reason: str


class Trace:
    """What one walk over a graph learns about its channels: labels given out, and relations between them.

    A *label* stands for one unknown factor. An op asks for fresh labels and states what factors must obey: ties, of labels whose factors
    must be equal; pins, of labels whose factor must be 1, each with its reason; relations between logarithms of factors, of which ties and
    pins are the commonest. :mod:`eqfact.channels` solves them afterwards.

    >>> trace = Trace()
    >>> a, b = trace.fresh((2,)), trace.fresh((2,))
    >>> trace.tie(a, b)
    >>> a, b, trace.size
    (array([0, 1]), array([2, 3]), 4)
    """

    def __init__(self) -> None:
        self.size = 0
        self.ties: list[tuple[Labels, Labels]] = []
        self.pins: list[tuple[Labels, str]] = []
        self.relations: list[Relation] = []
        self.node = ""
        self._uses: dict[int, tuple[Labels, Labels]] = {}

    def fresh(self, shape: Shape) -> Labels:
        """New labels for every channel of a value of this shape."""
        labels = np.arange(self.size, self.size + shape[0], dtype=np.int64)
        self.size += shape[0]
        return spread(labels, shape)

    def tie(self, a: Labels, b: Labels) -> None:
        """Channel ``i`` of ``a`` and of ``b`` must carry the same factor."""
        self.ties.append((channel_vector(a), channel_vector(b)))

    def tie_rows(self, mates: Labels) -> None:
        """All labels of each row of ``(rows, mates)`` must carry the same factor."""
        if mates.shape[1] > 1:
            self.tie(np.repeat(mates[:, 0], mates.shape[1] - 1), mates[:, 1:].reshape(-1))

    def pin(self, labels: Labels, reason: str) -> None:
        """These channels must keep the factor 1, for this reason."""
        self.pins.append((channel_vector(labels), reason))

    def relate(self, *terms: tuple[int, Labels], reason: str) -> None:
        """``sum c log f = 0`` over terms ``(c, labels)``, channel by channel; one channel is broadcast against many.

        What is to be expressed by the others stands first: the output before the inputs. ``reason`` says why, should it pin a channel.
        """
        vectors = [channel_vector(labels) for _, labels in terms]
        count = max(map(len, vectors))
        labels = np.stack([np.broadcast_to(v, count) for v in vectors], axis=1)
        self.relations.append(Relation(tuple(c for c, _ in terms), labels, self.node, reason))

    def absorb(self, op: Weighted, read: Labels, shape: Shape) -> Labels:
        """Fresh labels for a weighted op; a second use of the same op is tied to the first, on both sides."""
        made = self.fresh(shape)
        first_read, first_made = self._uses.setdefault(id(op), (read, made))
        if first_made is not made:
            self.tie(first_read, read)
            self.tie(first_made, made)
        return made


class Weighted(Op):
    """Ops with weights: they absorb any factor on either side (Dense, Conv, ConvTranspose, BatchNorm).

    ``weight`` is ``(out, in // groups, *kernel)``. :meth:`taps` shows every weighted op in one form, so that rules and
    solvers never see axes or groups.

    >>> [(type(op).__name__, op.taps().shape) for op in (Dense(np.ones((4, 3))), Conv(np.ones((4, 1, 3, 3)), groups=2))]
    [('Dense', (1, 4, 3, 1)), ('Conv', (2, 2, 1, 9))]
    """

    weight: Array
    bias: Array | None
    groups: int = 1
    #: The grid that the weights lie on, once they are quantized.
    grid: Grid | None = None
    #: Whether engines keep the weights as whole numbers; else they lie on no grid.
    gridded: bool = True
    #: Whether the weights are divided by the factors of the input; else something else in the op takes them up.
    divides: bool = True

    def taps(self) -> Array:
        """The weights as ``(groups, out // groups, in // groups, taps)``, a view where possible."""
        out, inner, *kernel = self.weight.shape
        return self.weight.reshape(self.groups, out // self.groups, inner, math.prod(kernel))

    @abstractmethod
    def weight_vjp(self, cotangent: Array, x: Array) -> Array:
        """The cotangent of ``weight``, summed over the batch."""

    def rows(self) -> Array:
        """The weights that make each output channel, ``(out, -1)``."""
        groups, out, inner, taps = self.taps().shape
        return self.taps().reshape(groups * out, inner * taps)

    def columns(self) -> Array:
        """The weights that read each input channel, ``(in, -1)``."""
        groups, out, inner, taps = self.taps().shape
        return self.taps().transpose(0, 2, 1, 3).reshape(groups * inner, out * taps)

    @property
    def out_channels(self) -> int:
        """How many output channels the op makes."""
        return len(self.weight)

    @property
    def roundings(self) -> int:
        """One product and one sum a weight, in each of two networks, and a few for weights and bias themselves."""
        return 2 * int(self.rows().shape[1]) + 8

    def trace(self, trace: Trace, *inputs: Labels) -> Labels:
        (x,) = one_input(self, inputs)
        return trace.absorb(self, x, self.output_shape(x.shape))

    def rescale(self, f_out: Array, *f_in: Array) -> Weighted:
        out, inner, *kernel = self.weight.shape
        made = np.asarray(f_out, np.float64).reshape(self.groups, -1, 1)
        read = np.asarray(f_in[0], np.float64).reshape(self.groups, 1, -1)
        ratio = (made / read).reshape(out, inner, *(1 for _ in kernel))
        return replace(self, **{  # type: ignore[type-var]  # every final op is a dataclass
            "weight": scaled(self.weight, ratio, "weight"),
            "bias": None if self.bias is None else scaled(self.bias, f_out, "bias"),
            "grid": None,
        })

    @cached_property
    def absolute(self) -> Weighted:
        """``|W|`` alone: how errors pass."""
        op: Weighted = replace(self, weight=read_only(np.abs(self.weight)), bias=None)  # type: ignore[type-var]
        return op

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        return self.absolute.forward(*errors)

    def rounds(self, inputs: Sequence[Array], output: Array) -> Array:
        bias = np.zeros(1, output.dtype) if self.bias is None else np.abs(self.bias)
        return self.roundings * along_channels(bias, output.ndim - 1)


class Commuting(Op):
    """Ops through which a positive factor passes unchanged: ``op(f * x) == f * op(x)``.

    A new one writes ``forward`` and, if channels or sizes change, ``carry`` and ``output_shape``.

    >>> class Halve(Commuting):
    ...     def forward(self, x): return x / 2
    >>> net = Graph.chain((2,), fc=Dense(np.eye(2)), half=Halve(), out=Dense(np.eye(2)))
    >>> degrees_of_freedom(net)
    2
    """

    @property
    def moves(self) -> bool:
        """The op only selects or moves entries (or adds zeros), so a quantized input stays on its grid."""
        return False

    #: The op works entry by entry and is fused with the op before it by every integer engine.
    activation: bool = False

    @property
    def bounds(self) -> tuple[float | Array, float | Array] | None:
        """Numbers or ``(C,)``, if the op passes what lies between them and makes all else the nearer one; else None."""
        return None

    def output_shape(self, *shapes: Shape) -> Shape:
        return one_input(self, shapes)[0]

    def carry(self, *vectors: npt.NDArray[T]) -> npt.NDArray[T]:
        """How a vector with one entry per channel passes from the inputs to the output."""
        return vectors[0]

    def trace(self, trace: Trace, *inputs: Labels) -> Labels:
        shape = self.output_shape(*(x.shape for x in inputs))
        return spread(self.carry(*map(channel_vector, inputs)), shape)

    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        if not np.array_equal(f_out, self.carry(*f_in)):
            raise ValueError(f"{type(self).__name__} passes factors on: the factors of its output must be those of its input")
        return self

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        """Errors pass as magnitudes do, which is right for means, maxima and sums; within ``bounds`` alone, if there are any."""
        if self.bounds is None:
            return np.abs(self.forward(*errors))
        (e,), (x,) = errors, inputs
        low, high = bounds_on(x, self.bounds)
        with np.errstate(over="ignore"):
            passed = np.where((x + u * e > low) & (x - u * e < high), e, 0)
            return np.minimum(passed, (high - low) / x.dtype.type(u))  # nothing is farther off than the bounds are apart


class Blocking(Op):
    """Ops that no factor passes: every channel they read or make is pinned. Entry by entry unless overridden.

    ``lipschitz`` bounds the slope everywhere, so that the rounding bound of :func:`eqfact.verify` passes through. Where an op is less steep
    or its output much smaller than ``|forward(0)|``, that bound is loose, and differences below it are not seen: override :meth:`passes`
    and :meth:`rounds` to see them.

    >>> class Sine(Blocking):
    ...     def forward(self, x): return np.sin(x)
    >>> net = Graph.chain((2,), fc=Dense(np.eye(2)), sine=Sine(), out=Dense(np.eye(2)))
    >>> degrees_of_freedom(net)
    0
    """

    lipschitz: float = 1.0
    reason: str = "is not positively homogeneous"

    def output_shape(self, *shapes: Shape) -> Shape:
        return one_input(self, shapes)[0]

    def trace(self, trace: Trace, *inputs: Labels) -> Labels:
        out = trace.fresh(self.output_shape(*(x.shape for x in inputs)))
        read, made = (f"{side} by '{trace.node}': {type(self).__name__} {self.reason}" for side in ("read", "made"))
        for labels in inputs:
            trace.pin(labels, read)
        trace.pin(out, made)
        return out

    def rescale(self, f_out: Array, *f_in: Array) -> Op:
        for f in (f_out, *f_in):
            if not np.all(np.asarray(f) == 1):
                raise ValueError(f"{type(self).__name__} {self.reason}: its factors must be 1, got {np.asarray(f).tolist()[:4]}")
        return self

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        result: Array = self.lipschitz * np.maximum.reduce(errors)
        return result

    def rounds(self, inputs: Sequence[Array], output: Array) -> Array:
        return super().rounds(inputs, output) + super().rounds(inputs, self.forward(*(np.zeros_like(x) for x in inputs)))


# ---------------------------------------------------------------------------------------------------------------
# Labels: an int array of the value's full shape (C, *spatial), constant over space, so that it tells shapes too.

def spread(vector: npt.NDArray[T], shape: Shape) -> npt.NDArray[T]:
    """A vector with one entry per channel, seen with the full shape ``(C, *spatial)`` (a view)."""
    return np.broadcast_to(along_channels(vector, len(shape)), shape)


def channel_vector(labels: npt.NDArray[T]) -> npt.NDArray[T]:
    """One entry per channel of an array ``(C, *spatial)`` that is constant over space."""
    first: tuple[Any, ...] = (slice(None), *(0,) * (labels.ndim - 1))
    vector: npt.NDArray[T] = labels[first]
    return vector


def along_channels(vector: npt.NDArray[T], ndim: int) -> npt.NDArray[T]:
    """Reshape ``(C,)`` to ``(C, 1, ...)`` with ``ndim`` axes, to broadcast against ``(N, C, *spatial)``."""
    return vector.reshape(-1, *(1,) * (ndim - 1))


def bounds_on(x: Array, bounds: tuple[float | Array, float | Array]) -> tuple[Array, Array]:
    """Bounds, numbers or ``(C,)``, in the dtype of ``x`` and broadcast against it; what that does not hold leaves its side open."""
    with np.errstate(over="ignore"):
        low, high = (along_channels(np.asarray(bound).astype(x.dtype), x.ndim - 1) for bound in bounds)
    return low, high


# ---------------------------------------------------------------------------------------------------------------
# Parameters: checked once, when an op is made.

def read_only(array: npt.NDArray[T]) -> npt.NDArray[T]:
    """The array, locked against writing; copied first unless it is our own, in C order, and locked already."""
    if array.flags.owndata and array.flags.c_contiguous and not array.flags.writeable:
        return array
    array = array.copy()
    array.flags.writeable = False
    return array


def parameter(name: str, value: npt.ArrayLike, ndim: int | None = None, *, finite: bool = True) -> Array:
    """A read-only floating array, or an error that names the parameter, the rule and what was given.

    >>> parameter("weight", np.ones((2, 3), int))
    Traceback (most recent call last):
        ...
    TypeError: weight must be a floating array (float32 or float64), got int64; convert it with .astype(np.float32)
    """
    array = np.asarray(value)
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise TypeError(f"{name} must be a floating array (float32 or float64), got {array.dtype}; convert it with .astype(np.float32)")
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} axes, got shape {array.shape}")
    if 0 in array.shape:
        raise ValueError(f"{name} has an axis of size 0: shape {array.shape}")
    if finite and not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{name} holds {array[where]} at index {where}; weights must be finite")
    return read_only(array)


def finite_magnitude(x: Array) -> Array:
    """``|x|``, with 0 for infinite entries: they carry no rounding."""
    m = np.abs(x)
    if not np.isfinite(m.max(initial=0)):
        m[~np.isfinite(m)] = 0
    return m


def product(a: Array, b: Array, out: Array | None = None) -> Array:
    """``a @ b`` without false alarms: BLAS also multiplies what happens to lie in the unused lanes of its vectors, and numpy may report
    that as an invalid value (numpy issue 24067). Of finite factors only an overflow makes one, and that is still reported.
    """
    with np.errstate(invalid="ignore"):
        result: Array = np.matmul(a, b, out=out)
    return result


def scaled(array: Array, factor: Array, name: str) -> Array:
    """``array * factor`` in float64, rounded once to the array's own dtype; refuses to overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        result: Array = (array * np.asarray(factor, np.float64)).astype(array.dtype)
    if not np.isfinite(result).all():
        raise ValueError(f"the rescaled {name} overflows {array.dtype}: its largest entry is {np.abs(array).max():.3g}, "
                         f"the largest factor {np.max(factor):.3g}; use smaller factors")
    result.flags.writeable = False
    return result


def integers(name: str, value: object, minimum: int) -> int | tuple[int, ...]:
    """An integer or a sequence of integers (one per spatial axis), each at least ``minimum``."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(int(_integer(name, v, minimum)) for v in value)
    return _integer(name, value, minimum)


def _integer(name: str, value: object, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer or one integer per spatial axis, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def per_axis(name: str, value: int | tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """One integer for each of ``ndim`` spatial axes."""
    if isinstance(value, int):
        return (value,) * ndim
    if len(value) != ndim:
        raise ValueError(f"{name} has {len(value)} entries {value} for {ndim} spatial axes")
    return value


Padding = int | tuple[int | tuple[int, int], ...]


def paddings(value: object) -> Padding:
    """Padding as given, checked: one integer, one per axis, or ``((before, after), ...)``."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        sides: list[int | tuple[int, int]] = []
        for v in value:
            side = integers("padding", v, 0)
            if isinstance(side, tuple) and len(side) != 2:
                raise ValueError(f"padding of an axis must be one number or (before, after), got {v!r}")
            sides.append(side if isinstance(side, int) else (side[0], side[1]))
        return tuple(sides)
    return _integer("padding", value, 0)


def per_side(value: Padding, ndim: int) -> tuple[tuple[int, int], ...]:
    """``(before, after)`` for each of ``ndim`` spatial axes."""
    sides = (value,) * ndim if isinstance(value, int) else value
    if len(sides) != ndim:
        raise ValueError(f"padding has {len(sides)} entries {value} for {ndim} spatial axes")
    return tuple((s, s) if isinstance(s, int) else s for s in sides)


def one_input(op: Op, inputs: Sequence[V]) -> Sequence[V]:
    """The inputs, if there is exactly one."""
    if len(inputs) != 1:
        raise ValueError(f"{type(op).__name__} reads one value, got {len(inputs)}")
    return inputs


def window_sizes(op: str, sizes: Shape, kernel: Shape, stride: Shape, padding: tuple[tuple[int, int], ...], dilation: Shape) -> Shape:
    """Output size along each spatial axis of a sliding window: ``(size + padding - dilation * (k - 1) - 1) // stride + 1``."""
    if len(sizes) != len(kernel):
        raise ValueError(f"{op} has a kernel over {len(kernel)} spatial axes, its input has {len(sizes)} (spatial shape {sizes})")
    result = tuple((n + sum(p) - d * (k - 1) - 1) // s + 1
                   for n, k, s, p, d in zip(sizes, kernel, stride, padding, dilation, strict=True))
    if min(result, default=1) < 1:
        raise ValueError(f"{op} with kernel {kernel} and dilation {dilation} does not fit into spatial shape {sizes} padded by {padding}")
    return result
