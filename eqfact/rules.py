"""What factor should a channel get? The rules of the paper and of its best-known follower, from ranges alone.

A rule sees one :class:`Block`, the channels that one weighted op makes together with all that are tied to them, as
arrays with one entry per channel; it never sees a graph, an axis, a group or a product of values. ``one_step`` is section 2 of PAPER,
``two_step`` section 3, the residual and concat rules section 4, ``cross_layer`` the rule of Nagel et al. (ICCV 2019). A dead channel
(some range of it is 0) gets the factor 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

#: The paper's bound on amplification (section 2).
MAX_FACTOR = 16.0
#: ``m_i`` is taken as at least 1 over this, and a concat lifts by at most this: a channel or layer of next to no range would get factors
#: beyond what its weights can hold. Both promises of PAPER 3 stay: f_i >= m_i, and no range grows.
MAX_RATIO = 1024.0


@dataclass(frozen=True, eq=False)
class Maker:
    """One weighted op that makes channels of a block, and the ranges of what it makes.

    What else grows with them, in products of values, is one, too: weights alone, or a value alone, whose range stands for both.
    """

    #: Which channels of the block it makes; one may be named several times.
    channels: npt.NDArray[np.int64]
    #: ``K_i``: largest weight magnitude of each, with the factors chosen so far.
    kernel: Vector
    #: ``A_i``: largest magnitude of each after the activation, on the calibration data.
    activation: Vector | None = None
    #: ``P_i``: magnitude of the smallest value of each before the activation; the paper's optional limit.
    preactivation: Vector | None = None
    #: The same maxima over the op's pinned channels, which keep the factor 1; 0 if none is pinned.
    held_kernel: float = 0.0
    held_activation: float = 0.0
    #: Largest activation of all ops whose outputs meet this one's in a concat; 0 if there is no concat.
    mates_activation: float = 0.0


@dataclass(frozen=True, eq=False)
class Anchor:
    """A weight tensor that a block makes or reads, and the largest of its ranges that no factor moves: of pinned and of dead channels."""

    #: Which channels of the block stand in it, and their ranges with the factors chosen so far.
    channels: npt.NDArray[np.int64]
    ranges: Vector
    fixed: float
    #: The largest range of channels that other blocks move.
    others: float = 0.0


@dataclass(frozen=True, eq=False)
class Block:
    """Channels that are made together: their makers, and how the weights that read them range, with the factors chosen so far.

    In products of values a channel stands for a free number (docs/algebra.md): made is what grows with it, read what shrinks.

    ``cross_layer`` gets what is known without data; every other rule gets all.
    """

    makers: tuple[Maker, ...]
    #: Largest weight magnitude that makes each channel, over all makers, ``(C,)``.
    made: Vector
    #: Largest weight magnitude that reads each channel, over all readers, ``(C,)``.
    read: Vector
    #: ``m_i``: the same relative to the largest weight of each reader, in [0, 1], ``(C,)``.
    consumed: Vector | None = None
    #: What else grows with the channels, in products of values: it limits them, and shares nothing.
    limits: tuple[Maker, ...] = ()
    #: The tensors that make and that read the block and hold ranges that no factor moves.
    made_anchors: tuple[Anchor, ...] = ()
    read_anchors: tuple[Anchor, ...] = ()


#: From a block to the factors ``(C,)`` by which its channels shall be multiplied.
Rule = Callable[[Block], Vector]


def one_step(block: Block, *, max_factor: float = MAX_FACTOR) -> Vector:
    """``f_i = min(K / K_i, min(A / A_i, 16), max(A / P_i, 1))``: amplify until kernel or activation reach the layer's range (PAPER 2).

    >>> maker = Maker(np.arange(2), np.array([1.0, 0.25]), np.array([2.0, 1.0]))
    >>> one_step(Block((maker,), maker.kernel, np.ones(2), np.array([1.0, 0.5])))
    array([1., 2.])
    """
    return _equalize(block, np.ones(len(block.made)), max_factor)


def two_step(block: Block, *, max_factor: float = MAX_FACTOR) -> Vector:
    """As one_step, after channel i is attenuated by ``m_i``, so that its readers just reach their own range (PAPER 3).

    >>> maker = Maker(np.arange(2), np.array([1.0, 0.25]), np.array([2.0, 1.0]))
    >>> two_step(Block((maker,), maker.kernel, np.ones(2), np.array([0.5, 1.0])))
    array([0.5, 1. ])
    """
    assert block.consumed is not None, "the loop gives m_i to rules that need it"
    return _equalize(block, np.maximum(block.consumed, 1 / MAX_RATIO), max_factor)


def cross_layer(block: Block) -> Vector:
    """``f_i = sqrt(read_i / made_i)``: makes the weights that make and that read channel i range alike (Nagel et al. 2019).

    What no factor moves, dead and pinned channels, must not stand out of a tensor because all others shrink: there the factors of the block
    have another level in common, and made and read range alike up to that.

    >>> maker = Maker(np.arange(1), np.array([0.5]))
    >>> cross_layer(Block((maker,), maker.kernel, np.array([2.0]), np.ones(1)))
    array([2.])
    """
    live = (block.made > 0) & (block.read > 0)
    # two roots, because the quotient of a huge and a subnormal range would overflow
    f = np.divide(np.sqrt(block.read), np.sqrt(block.made), out=np.ones_like(block.made), where=live)
    return np.where(live, f * _level(block, f, live), f)


def _level(block: Block, f: Vector, live: npt.NDArray[np.bool_]) -> float:
    """What the factors of a block have in common, so that what no factor moves does not stand out of the tensors around it.

    Balance says nothing about it: the ranges of all weights that make a block may grow, if those of all that read it shrink. What a step
    of its tensor is wide is set by its largest range; where that is a dead or a pinned channel's, the rest may as well grow up to it. 1
    where nothing stands out, and the geometric mean of what both sides ask for, if they disagree.
    """
    low = max((_over(a, (f[a.channels] * a.ranges)[live[a.channels]]) for a in block.made_anchors), default=0.0)
    high = max((_over(a, (a.ranges / f[a.channels])[live[a.channels]]) for a in block.read_anchors), default=0.0)
    if low * high > 1:
        return float(np.sqrt(low / high))
    return max(low, 1.0) / max(high, 1.0)


def _over(anchor: Anchor, ranges: Vector) -> float:
    """By how much what is fixed stands out of all other ranges of its tensor, those of the block among them."""
    largest = float(ranges.max(initial=0.0))
    return anchor.fixed / max(largest, anchor.others) if largest > 0 else 0.0


def smooth_quant(block: Block, *, alpha: float = 0.5) -> Vector:
    """``f_i = max|W_i|**(1 - alpha) / max|X_i|**alpha``: divides activations by SmoothQuant's factor (Xiao et al. 2023).

    At ``alpha`` 1/2 that is :func:`cross_layer` with the range of an activation in the place of the weights that make it: what
    cross_layer does on a normalisation and its readers, if it is given statistics. Published for these; name them with ``include``.

    >>> smooth_quant(Block((Maker(np.arange(1), np.ones(1), np.array([8.0])),), np.ones(1), np.array([2.0])))
    array([0.5])
    """
    activation = np.zeros(len(block.made))
    for maker in block.makers:
        assert maker.activation is not None, "the loop gives activations to rules that need them"
        np.maximum.at(activation, maker.channels, maker.activation)
    live = (activation > 0) & (block.read > 0)
    f: Vector = np.power(np.where(live, block.read, 1), 1 - alpha) / np.power(np.where(live, activation, 1), alpha)
    return f


def _equalize(block: Block, m: Vector, max_factor: float) -> Vector:
    candidates, limits = (np.full((len(of), len(m)), np.inf) for of in (block.makers, block.limits))
    for row, maker in zip((*candidates, *limits), (*block.makers, *block.limits), strict=True):
        np.minimum.at(row, maker.channels, _amplify(maker, m[maker.channels], max_factor))
    if len(block.makers) > 1:
        candidates = _share(candidates)
    f = np.concatenate([candidates, limits]).min(axis=0)
    dead = ~np.isfinite(f) | (block.made == 0) | (block.read == 0)
    f = np.where(dead, 1.0, f)
    return f * _lift(block, f)


def _amplify(maker: Maker, m: Vector, max_factor: float) -> Vector:
    """The formula of PAPER 2 and 3 for one layer; infinite for dead channels, which limit nobody."""
    assert maker.activation is not None, "the loop gives activations to rules that need them"
    k, a = maker.kernel, maker.activation
    largest_k = max((k * m).max(), maker.held_kernel)
    largest_a = max((a * m).max(), maker.held_activation)
    live = (k > 0) & (a > 0)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        f = np.minimum(largest_k / k, np.minimum(largest_a / a, max_factor))
        if maker.preactivation is not None:
            f = np.minimum(f, np.maximum(largest_a / maker.preactivation, 1.0))
    return np.where(live & (f > 0), f, np.inf)  # f = 0 where K m underflows: ranges of the last subnormal numbers are dead


def _share(candidates: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Residual rule (PAPER 4): every candidate is divided by its own minimum; the elementwise minimum follows.

    The paper floors that by ``m``, which holds by itself: no quotient is below 1, and no ``m`` above it.
    """
    smallest = candidates.min(axis=1, keepdims=True)
    return candidates / np.where(np.isfinite(smallest), smallest, 1.0)


def _lift(block: Block, f: Vector) -> float:
    """Concat rule (PAPER 4): lift the whole layer until its activations range as those of its concat mates, after the bound."""
    lifts = [maker.mates_activation / reached for maker in block.makers if maker.mates_activation
             and maker.activation is not None and (reached := float((f[maker.channels] * maker.activation).max())) > 0]
    if not lifts or any(maker.held_kernel for maker in block.makers):
        return 1.0  # no concat, or pinned channels, which a lift would leave behind
    return min(max(min(lifts), 1.0), MAX_RATIO)
