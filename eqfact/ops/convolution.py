"""How is a convolution computed fast with numpy alone?

On channel-last memory, so that the channels are the contiguous inner axis: a pointwise convolution is then one matrix
product over all pixels, a depthwise one a shifted multiply-add per tap, and any other one a matrix product with
windows copied in blocks of bounded size (im2col). Arrays go in and out as ``(N, C, *spatial)``; only their strides
are channel-last, so a chain of convolutions copies nothing. Weights are ``(out, in // groups, *kernel)``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from eqfact.ops.base import Array, Shape

#: Entries of one im2col block, and of one block of a depthwise accumulation (which should stay in the cache).
COLUMN_BLOCK = 1 << 22
DEPTHWISE_BLOCK = 1 << 15

Sides = tuple[tuple[int, int], ...]


def channels_last(x: Array, padding: Sides = (), value: float = 0.0) -> Array:
    """``(N, *spatial, C)`` in C order, padded; no copy if the memory is channel-last already."""
    moved = np.moveaxis(x, 1, -1)
    if not any(map(any, padding)):
        return np.ascontiguousarray(moved)
    sizes = [n + before + after for n, (before, after) in zip(x.shape[2:], padding, strict=True)]
    padded = np.full((x.shape[0], *sizes, x.shape[1]), value, x.dtype)
    over_space(padded, (slice(before, before + n) for n, (before, _) in zip(x.shape[2:], padding, strict=True)))[...] = moved
    return padded


def over_space(array: Array, slices: Iterable[slice]) -> Array:
    """A view of ``(N, *spatial, C)``, sliced along its spatial axes."""
    index: tuple[Any, ...] = (slice(None), *slices)
    view: Array = array[index]
    return view


def channels_first(y: Array) -> Array:
    """``(N, C, *spatial)`` as a view of ``(N, *spatial, C)``."""
    return np.moveaxis(y, -1, 1)


def tap_windows(padded: Array, sizes: Shape, kernel: Shape, stride: Shape, dilation: Shape) -> Iterator[Array]:
    """For every tap of the kernel, in C order, the entries of ``(N, *spatial, C)`` that it meets, as a view."""
    for tap in itertools.product(*map(range, kernel)):
        starts = [t * d for t, d in zip(tap, dilation, strict=True)]
        yield over_space(padded, (slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, sizes, stride, strict=True)))


def convolve(x: Array, weight: Array, sizes: Shape, stride: Shape, padding: Sides, dilation: Shape, groups: int) -> Array:
    """Cross-correlation of ``(N, C, *spatial)`` with ``(out, C // groups, *kernel)``; ``sizes`` is the output's spatial shape."""
    out, inner, *kernel = weight.shape
    padded = channels_last(x, padding)
    if groups == x.shape[1] and inner == 1:
        return channels_first(_depthwise(padded, weight, sizes, stride, dilation))
    if math.prod(kernel) == 1 and groups == 1:
        pixels = over_space(padded, (slice(None, (n - 1) * s + 1, s) for n, s in zip(sizes, stride, strict=True)))
        product = pixels.reshape(-1, inner) @ weight.reshape(out, inner).T
        return channels_first(product.reshape(len(x), *sizes, out))
    return channels_first(_im2col(padded, weight, sizes, stride, dilation, groups))


def _depthwise(padded: Array, weight: Array, sizes: Shape, stride: Shape, dilation: Shape) -> Array:
    """Each channel by itself: a shifted multiply-add per tap, in blocks of rows that stay in the cache."""
    channels, multiplier = padded.shape[-1], len(weight) // padded.shape[-1]
    dtype = np.result_type(padded, weight)
    result = np.empty((len(padded), *sizes, channels, multiplier), dtype)
    taps = weight.reshape(channels, multiplier, -1)
    # one weight per entry of a row of pixels: the inner loop of numpy then runs over a whole row (in 1d a row is a pixel)
    row_shape = (*sizes[1:][-1:], channels, multiplier)
    windows = [(np.broadcast_to(taps[..., t], row_shape).copy(), window[..., None])
               for t, window in enumerate(tap_windows(padded, sizes, weight.shape[2:], stride, dilation))]
    step = max(1, DEPTHWISE_BLOCK // math.prod(result.shape[2:]))
    scratch = np.empty((min(step, sizes[0]), *result.shape[2:]), dtype)
    for n in range(len(padded)):
        for start in range(0, sizes[0], step):
            block = result[n, start:start + step]
            product = scratch[:len(block)]
            for i, (row, window) in enumerate(windows):
                np.multiply(window[n, start:start + step], row, out=product if i else block)
                if i:
                    block += product
    return result.reshape(len(padded), *sizes, channels * multiplier)


def _im2col(padded: Array, weight: Array, sizes: Shape, stride: Shape, dilation: Shape, groups: int) -> Array:
    """A matrix product with the windows of every pixel, copied in blocks of at most ``COLUMN_BLOCK`` entries."""
    out, inner, *kernel = weight.shape
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    spatial = tuple(range(1, padded.ndim - 1))
    windows = sliding_window_view(padded, reach, axis=spatial)
    windows = over_space(windows, (*(slice(None, (n - 1) * s + 1, s) for n, s in zip(sizes, stride, strict=True)),
                                   slice(None), *(slice(None, None, d) for d in dilation)))
    matrices = weight.reshape(groups, out // groups, -1).transpose(0, 2, 1)
    result = np.empty((len(padded), *sizes, out), np.result_type(padded, weight))
    step = max(1, COLUMN_BLOCK // (math.prod(sizes[1:]) * matrices.shape[1]))
    for n in range(len(padded)):
        for start in range(0, sizes[0], step):
            block = windows[n, start:start + step]
            for g, matrix in enumerate(matrices):
                columns = np.moveaxis(block, len(sizes), 0)[g * inner:(g + 1) * inner]
                product = np.moveaxis(columns, 0, len(sizes)).reshape(-1, len(matrix)) @ matrix
                made = slice(g * out // groups, (g + 1) * out // groups)
                result[n, start:start + step, ..., made] = product.reshape(*block.shape[:len(sizes)], -1)
    return result


def convolve_transposed(x: Array, weight: Array, sizes: Shape, stride: Shape, padding: Sides, dilation: Shape, groups: int) -> Array:
    """The adjoint walk: every pixel spreads its products over the taps; ``weight`` is ``(out, in // groups, *kernel)``."""
    out, inner, *kernel = weight.shape
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
    made = channels_last(cotangent).reshape(-1, groups, out // groups)
    result = np.empty((math.prod(kernel), groups, out // groups, inner), np.result_type(x, cotangent))
    windows = tap_windows(channels_last(x, padding), cotangent.shape[2:], tuple(kernel), stride, dilation)
    for tap, window in zip(result, windows, strict=True):
        read = window.reshape(-1, groups, inner)
        if out == inner * groups == groups:  # depthwise: one product a pixel
            np.einsum("pg,pg->g", made[..., 0], read[..., 0], out=tap[:, 0, 0])
        else:
            np.matmul(made.transpose(1, 2, 0), read.transpose(1, 0, 2), out=tap)
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
        return pixels @ matrix.T
    if out == groups and inner == 1:
        return pixels * matrix[:, 0]
    grouped = pixels.reshape(-1, groups, inner).transpose(1, 0, 2) @ matrix.reshape(groups, out // groups, inner).transpose(0, 2, 1)
    return grouped.transpose(1, 0, 2).reshape(-1, out)
