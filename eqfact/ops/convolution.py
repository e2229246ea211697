"""How is a convolution computed fast with numpy alone?

On channel-last memory, so that the channels are the contiguous inner axis: a pointwise convolution is then one matrix
product over all pixels, a depthwise one an einsum along whole rows of pixels, and any other one a matrix product with
windows copied in blocks of bounded size (im2col). Arrays go in and out as ``(N, C, *spatial)``; only their strides
are channel-last, so a chain of convolutions copies nothing. Weights are ``(out, in // groups, *kernel)``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from eqfact.ops.base import Array, Shape, product

#: Entries of one im2col block, and of the row of weights that a depthwise convolution repeats along a row of pixels.
COLUMN_BLOCK = 1 << 19
DEPTHWISE_BLOCK = 1 << 15

Sides = tuple[tuple[int, int], ...]


def channels_last(x: Array, padding: Sides = (), value: float = 0.0) -> Array:
    """``(N, *spatial, C)`` in C order, padded; no copy if the memory is channel-last already."""
    moved = x.transpose(0, *range(2, x.ndim), 1)  # quicker than moveaxis
    if not any(map(any, padding)):
        return np.ascontiguousarray(moved)
    inside = [slice(before, before + n) for n, (before, _) in zip(x.shape[2:], padding, strict=True)]
    padded = np.empty((len(x), *(n + sum(sides) for n, sides in zip(x.shape[2:], padding, strict=True)), x.shape[1]), x.dtype)
    over_space(padded, inside)[...] = moved
    for axis, middle in enumerate(inside):  # only the margins: filling everything first costs one more pass
        for margin in (slice(None, middle.start), slice(middle.stop, None)):
            over_space(padded, [*inside[:axis], margin])[...] = value
    return padded


def over_space(array: Array, slices: Iterable[slice]) -> Array:
    """A view of ``(N, *spatial, C)``, sliced along its spatial axes."""
    index: tuple[Any, ...] = (slice(None), *slices)
    view: Array = array[index]
    return view


def channels_first(y: Array) -> Array:
    """``(N, C, *spatial)`` as a view of ``(N, *spatial, C)``."""
    return y.transpose(0, y.ndim - 1, *range(1, y.ndim - 1))


def tap_windows(padded: Array, sizes: Shape, kernel: Shape, stride: Shape, dilation: Shape) -> Iterator[Array]:
    """For every tap of the kernel, in C order, the entries of ``(N, *spatial, C)`` that it meets, as a view."""
    for tap in itertools.product(*map(range, kernel)):
        starts = [t * d for t, d in zip(tap, dilation, strict=True)]
        yield over_space(padded, (slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, sizes, stride, strict=True)))


def convolve(x: Array, weight: Array, sizes: Shape, stride: Shape, padding: Sides, dilation: Shape, groups: int,
             bias: Array | None = None) -> Array:
    """Cross-correlation of ``(N, C, *spatial)`` with ``(out, C // groups, *kernel)``; ``sizes`` is the output's spatial shape."""
    out, inner, *kernel = weight.shape
    padded = channels_last(x, padding)
    if groups == x.shape[1] and inner == 1:
        result = _depthwise(padded, weight, sizes, stride, dilation)
    elif math.prod(kernel) == 1 and groups == 1:
        pixels = over_space(padded, (slice(None, (n - 1) * s + 1, s) for n, s in zip(sizes, stride, strict=True)))
        result = product(pixels.reshape(-1, inner), weight.reshape(out, inner).T).reshape(len(x), *sizes, out)
    else:
        result = _im2col(padded, weight, sizes, stride, dilation, groups)
    if bias is not None:  # repeated along a row of pixels, so that the inner loop of numpy runs over a whole row
        rows = result.reshape(-1, sizes[-1] * out)
        rows += np.tile(bias, sizes[-1])
    return channels_first(result)


def _windows(padded: Array, sizes: Shape, kernel: Sequence[int], stride: Shape, dilation: Shape) -> Array:
    """A view ``(*kernel, N, *sizes, C)`` of ``(N, *spatial, C)``: for every tap, what it meets."""
    # as_strided would read beyond the array without a word
    assert all((n - 1) * s + d * (k - 1) < m for n, s, d, k, m in zip(sizes, stride, dilation, kernel, padded.shape[1:-1], strict=True))
    image, *axes, channel = padded.strides
    taps = (a * d for a, d in zip(axes, dilation, strict=True))
    pixels = (a * s for a, s in zip(axes, stride, strict=True))
    return as_strided(padded, (*kernel, len(padded), *sizes, padded.shape[-1]), (*taps, image, *pixels, channel), writeable=False)


def _depthwise(padded: Array, weight: Array, sizes: Shape, stride: Shape, dilation: Shape) -> Array:
    """Each channel by itself: einsum multiplies and adds in one pass, a tap at a time, without an array of products."""
    out, _, *kernel = weight.shape
    if out > padded.shape[-1]:
        padded = np.repeat(padded, out // padded.shape[-1], axis=-1)
    # with stride 1 the pixels of a row follow each other in memory: with their channels they make one axis, long enough for the inner loop
    run = sizes[-1] if stride[-1] == 1 else 1
    shape = (len(padded), *sizes[:-1], sizes[-1] // run, run * out)
    windows = _windows(padded, sizes, kernel, stride, dilation).reshape(*kernel, *shape)
    result = np.empty(shape, np.result_type(padded, weight))
    step = min(run, max(1, DEPTHWISE_BLOCK // out)) * out
    taps = np.tile(np.ascontiguousarray(weight.reshape(out, -1).T), step // out).reshape(*kernel, step)
    axes = "abc"[:len(kernel)]
    for start in range(0, run * out, step):
        block = result[..., start:start + step]
        np.einsum(f"{axes}...x,{axes}x->...x", windows[..., start:start + step], taps[..., :block.shape[-1]], out=block)
    return result.reshape(len(padded), *sizes, out)


def _im2col(padded: Array, weight: Array, sizes: Shape, stride: Shape, dilation: Shape, groups: int) -> Array:
    """A matrix product with the windows of every pixel, copied in blocks of at most ``COLUMN_BLOCK`` entries."""
    out, inner, *kernel = weight.shape
    axes = range(2 * len(kernel) + 3)
    taps, pixels, group, channel = axes[:len(kernel)], axes[len(kernel):-2], axes[-2], axes[-1]
    windows = _windows(padded, sizes, kernel, stride, dilation).reshape(*kernel, len(padded), *sizes, groups, inner)
    if math.prod(sizes) < out:  # the weights are more than the windows: they stay as they are
        windows = windows.transpose(group, *pixels, channel, *taps)
    else:  # channels last, as in memory: neighbouring taps are copied in one run
        windows, weight = windows.transpose(group, *pixels, *taps, channel), np.moveaxis(weight, 1, -1)
    matrices = weight.reshape(groups, out // groups, -1).transpose(0, 2, 1)
    result = np.empty((len(padded), *sizes, out), np.result_type(padded, weight))
    step = max(1, COLUMN_BLOCK // (math.prod(sizes[1:]) * matrices.shape[1]))
    for n in range(len(padded)):
        for start in range(0, sizes[0], step):
            block = result[n, start:start + step].reshape(-1, groups, out // groups)
            for g, matrix in enumerate(matrices):
                product(windows[g, n, start:start + step].reshape(-1, len(matrix)), matrix, out=block[:, g])
    return result


def convolve_transposed(x: Array, weight: Array, sizes: Shape, stride: Shape, padding: Sides, dilation: Shape, groups: int) -> Array:
    """The adjoint walk: every pixel spreads its products over the taps; ``weight`` is ``(out, in // groups, *kernel)``."""
    out, inner, *kernel = weight.shape
    if max(stride) == 1:  # then it is a convolution too, with the kernel turned round
        sides = tuple((d * (k - 1) - before, n + before - m) for m, n, k, d, (before, _) in zip(
            x.shape[2:], sizes, kernel, dilation, padding, strict=True))
        if min(itertools.chain.from_iterable(sides)) >= 0:
            return convolve(x, np.flip(weight, tuple(range(2, weight.ndim))), sizes, stride, sides, dilation, groups)
    pixels = channels_last(x).reshape(-1, x.shape[1])
    reach = ((n - 1) * s + d * (k - 1) + 1 for n, s, k, d in zip(x.shape[2:], stride, kernel, dilation, strict=True))
    full = tuple(max(r, n + sum(p)) for r, n, p in zip(reach, sizes, padding, strict=True))
    result = np.zeros((len(x), *full, out), np.result_type(x, weight))
    taps = np.moveaxis(weight.reshape(out, inner, -1), -1, 0)
    for tap, window in zip(taps, tap_windows(result, x.shape[2:], tuple(kernel), stride, dilation), strict=True):
        window += _mix(pixels, tap, groups).reshape(window.shape)
    return channels_first(over_space(result, (slice(before, before + n) for n, (before, _) in zip(sizes, padding, strict=True))))


def correlate_taps(x: Array, cotangent: Array, shape: Shape, stride: Shape, padding: Sides, dilation: Shape, groups: int) -> Array:
    """The cotangent ``(out, in // groups, *kernel)`` of a convolution's weights: output and input pixels, correlated tap by tap."""
    out, inner, *kernel = shape
    made, padded, sizes = channels_last(cotangent), channels_last(x, padding), cotangent.shape[2:]
    if out == inner * groups == groups:  # depthwise: one product a pixel, along rows as in _depthwise, unless all is one row
        run = sizes[-1] if stride[-1] == 1 and len(sizes) > 1 else 1
        rows = (len(x), *sizes[:-1], sizes[-1] // run, run * out)
        windows = _windows(padded, sizes, kernel, stride, dilation).reshape(*kernel, *rows)
        taps, axes = "abc"[:len(kernel)], "nhwd"[:len(kernel) + 1]
        sums: Array = np.einsum(f"{taps}{axes}x,{axes}x->{taps}x", windows, made.reshape(rows)).reshape(-1, run, out).sum(axis=1)
        return sums.T.reshape(shape)
    result = np.empty((math.prod(kernel), groups, out // groups, inner), np.result_type(x, cotangent))
    pixels = made.reshape(-1, groups, out // groups).transpose(1, 2, 0)
    for tap, window in zip(result, tap_windows(padded, sizes, tuple(kernel), stride, dilation), strict=True):
        product(pixels, window.reshape(-1, groups, inner).transpose(1, 0, 2), out=tap)
    return np.moveaxis(result.reshape(-1, out, inner), 0, -1).reshape(shape)


def swap_channels(weight: Array, groups: int) -> Array:
    """``(out, in // groups, *kernel)`` as ``(in, out // groups, *kernel)``: the weights of the adjoint, group by group."""
    out, inner, *kernel = weight.shape
    grouped = weight.reshape(groups, out // groups, inner, *kernel).swapaxes(1, 2)
    return np.ascontiguousarray(grouped).reshape(groups * inner, out // groups, *kernel)


def _mix(pixels: Array, matrix: Array, groups: int) -> Array:
    """Pixels ``(P, in)`` times a matrix ``(out, in // groups)``, group by group."""
    out, inner = matrix.shape
    if groups == 1:
        return product(pixels, matrix.T)
    if out == groups and inner == 1:
        return pixels * matrix[:, 0]
    grouped = product(pixels.reshape(-1, groups, inner).transpose(1, 0, 2), matrix.reshape(groups, out // groups, inner).transpose(0, 2, 1))
    return grouped.transpose(1, 0, 2).reshape(-1, out)
