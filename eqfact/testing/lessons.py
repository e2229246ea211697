"""Is the solution of an exercise right? The checks of docs/lessons, made of laws and of the conformance cases.

A check takes the answer or the function that a student wrote, asks it, and raises :class:`AssertionError` with the first entry
that is wrong and, where a common mistake explains it, with that.
In signatures weights are ``(out, in, *kernel)``, factors multiply what a layer makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from eqfact.testing.cases import all_cases
from eqfact.testing.judging import Wrong, judge
from eqfact.testing.wire import array_of, network_of

#: Between a number and what a solution may make of it: some roundings in float64.
CLOSE = 2.0**-40

Floats = npt.NDArray[Any]

#: What the first exercise of each lesson asks for: the answers, and a hint for whoever has another.
FIRST: Mapping[int, Mapping[str, tuple[object, str]]] = {
    1: {"step": (12.7 / 127, "127 steps lead from 0 to the end"),
        "becomes": ([0.0, 0.1, 12.7], "round to the nearest step, stay on the grid, and give the real number that it stands for")},
    2: {"multiplier": (2.0 / 4.0**0.5, "gamma over the root of var + eps"), "offset": (1.0 - 1.0 * 3.0, "beta less multiplier * mean")},
    3: {"homogeneous": ({"identity", "relu", "leaky relu", "max pooling", "absolute value"},
                        "multiply the input by 2: is the output twice what it was, for every input?")},
    4: {"degrees_of_freedom": (4 + 5, "what meets in the sum shares its numbers; inputs and outputs have none")},
    5: {"factors": ([1.0, 2.0, 16.0], "the smallest of K/K_i, A/A_i and 16 counts")},
    6: {"factors": ([1.0, 4.0], "the root of read over made"), "ranges": ([1.0, 0.25], "made * f, which is read / f")},
    7: {"noise": (4 * 0.12**2 / 12, "a twelfth of the step's square for each input, times its mean square"),
        "factor": (2.0, "where both terms are equal")},
    8: {"largest": (127 * 255, "the largest weight times the largest input"),
        "products": ((2**31 - 1) // (127 * 255), "how often it fits below 2**31")},
}


def check_first(lesson: int, **answers: object) -> None:
    """The first exercise of a lesson, which is done without a computer: numbers, lists of numbers, or a set of names.

    >>> check_first(1, step=0.1, becomes=[0, 0.1, 12.7])
    >>> check_first(1, step=0.05, becomes=[0, 0.1, 12.7])
    Traceback (most recent call last):
    AssertionError: lesson 1: step is not 0.05; 127 steps lead from 0 to the end
    """
    asked = FIRST[lesson]
    assert set(answers) == set(asked), f"lesson {lesson} asks for {', '.join(asked)}, got {', '.join(answers) or 'nothing'}"
    for name, (right, hint) in asked.items():
        given = answers[name]
        same = set(given) == right if isinstance(right, set) and isinstance(given, Iterable) else _close(given, right)
        assert same, f"lesson {lesson}: {name} is not {given}; {hint}"


def check_quantize(quantize: Callable[..., Any]) -> None:
    """Lesson 1: ``quantize(x, scale, zero_point, qmin, qmax)`` rounds halves to even, and saturates.

    >>> check_quantize(lambda x, s, z, low, high: np.clip(np.rint(x / s) + z, low, high))
    >>> check_quantize(lambda x, s, z, low, high: np.clip(np.floor(x / s + 0.5) + z, low, high))
    Traceback (most recent call last):
    AssertionError: quantize(-1.5, scale=1, zero_point=0, qmin=-128, qmax=127) must be -2, got -1.0: a half goes to the even neighbour
    """
    for case in all_cases([5]):
        if case.ask != "quantize":
            continue
        grid = case.request["grid"]
        scale, zero = array_of(grid["scale"]), array_of(grid["zero_point"])
        x, expected = array_of(case.request["x"]), array_of(case.expected["answer"]["q"])
        if grid["rounding"] != "half_even" or len(scale) > 1 or x.dtype != np.float64:
            continue
        got = np.asarray(quantize(x, scale[0], zero[0], grid["qmin"], grid["qmax"]))
        for value, wanted, made in zip(x.ravel(), expected.ravel(), got.ravel(), strict=True):
            assert made == wanted, (f"quantize({value:g}, scale={scale[0]:g}, zero_point={zero[0]}, qmin={grid['qmin']}, "
                                    f"qmax={grid['qmax']}) must be {wanted}, got {made}"
                                    f"{_slip(value / scale[0], int(zero[0]), grid['qmin'], grid['qmax'], made)}")


def check_affine_grid(affine_grid: Callable[..., Any]) -> None:
    """Lesson 1: ``affine_grid(low, high, bits)`` gives a scale and a zero point for numbers from 0 to ``2**bits - 1``; zero is on the grid.

    >>> check_affine_grid(lambda low, high, bits: ((high - low) / 2**bits, 0))
    Traceback (most recent call last):
    AssertionError: affine_grid(-1, 2.5, 8): the scale must be 0.0137255, got 0.0136719: a range that holds 0, cut into 2**8 - 1 steps
    """
    for case in all_cases([5]):
        quantizer = case.request.get("quantizer", {})
        if case.ask != "grid" or case.expected["judge"] == "refusal" or quantizer["symmetric"] or "signed" in quantizer:
            continue
        answer = case.expected["answer"]
        parts = case.request["low"], case.request["high"], answer["scale"], answer["zero_point"]
        low, high, scale, zero = map(array_of, parts)
        for a, b, s, z in zip(low.tolist(), high.tolist(), scale.tolist(), zero.tolist(), strict=True):
            call = f"affine_grid({a:g}, {b:g}, {quantizer['bits']})"
            why = "a range of 0 gets scale 1" if a == b else f"a range that holds 0, cut into 2**{quantizer['bits']} - 1 steps"
            made_scale, made_zero = affine_grid(a, b, quantizer["bits"])
            assert abs(made_scale - s) <= CLOSE * s, f"{call}: the scale must be {s:g}, got {made_scale:g}: {why}"
            assert made_zero == z, f"{call}: the zero point must be {z}, got {made_zero:g}: the whole number nearest to -low / scale"


def check_fold(fold: Callable[..., Any]) -> None:
    """Lesson 2: ``fold(weight, bias, gamma, beta, mean, var, eps)`` gives the weight and bias of layer and BatchNorm as one layer.

    >>> check_fold(lambda w, b, gamma, beta, mean, var, eps: (w * gamma, b))
    Traceback (most recent call last):
    AssertionError: weight (2, 2): the bias of output channel 0 must be 0.8037, got -0.75 (gain * bias + offset)
    """
    for weight, bias, norm, patch in _folding(of_outputs=True):
        w, b = fold(weight, bias, *norm)
        _same_layer(weight, w, _apply(w, b, 0 * patch), _normalized(bias, *norm), "the bias of", "gain * bias + offset")
        _same_layer(weight, w, _apply(w, b, patch), _normalized(_apply(weight, bias, patch), *norm), "what the weight makes of",
                    "a gain is gamma / sqrt(var + eps), and belongs to an output channel: a row, not a column")


def check_fold_before(fold_before: Callable[..., Any]) -> None:
    """Lesson 2: ``fold_before(weight, bias, gamma, beta, mean, var, eps)``: the same for a BatchNorm in front of a layer.

    >>> check_fold_before(lambda w, b, gamma, beta, mean, var, eps: (w * gamma / np.sqrt(var + eps), b))
    Traceback (most recent call last):
    AssertionError: weight (2, 2): the bias of output channel 0 must be 0.9722, got -0.75 (bias + each old weight * its column's offset)
    """
    for weight, bias, norm, patch in _folding(of_outputs=False):
        w, b = fold_before(weight, bias, *norm)
        _same_layer(weight, w, _apply(w, b, 0 * patch), _apply(weight, bias, _normalized(0 * patch, *norm)), "the bias of",
                    "bias + each old weight * its column's offset")
        _same_layer(weight, w, _apply(w, b, patch), _apply(weight, bias, _normalized(patch, *norm)), "what the weight makes of",
                    "a gain is gamma / sqrt(var + eps), and belongs to an input channel: a column, not a row")


def check_rescale(rescale: Callable[..., Any]) -> None:
    """Lesson 3: ``rescale(w1, b1, w2, f)`` gives the three with hidden channel i times ``f[i]``; powers of two change no bit of the output.

    >>> check_rescale(lambda w1, b1, w2, f: (w1 * f[:, None], b1, w2 / f))
    Traceback (most recent call last):
    AssertionError: hidden channel 0 must be 0.5 times what it was, relu(0.5 * 0.591) = 0.296, got 0
    """
    for w1, b1, w2, x, f in _two_layers():
        new = _arrays("w1, b1 and w2", rescale(w1.copy(), b1.copy(), w2.copy(), f.copy()), (w1, b1, w2))
        before, after = _hidden(w1, b1, x), _hidden(new[0], new[1], x)
        for i in np.flatnonzero((after != f * before).any(axis=0))[:1]:
            n = int(np.argmax(after[:, i] != f[i] * before[:, i]))
            raise AssertionError(f"hidden channel {i} must be {f[i]:g} times what it was, relu({f[i]:g} * {before[n, i]:.3g}) = "
                                 f"{f[i] * before[n, i]:.3g}, got {after[n, i]:.3g}")
        assert np.array_equal(after @ new[2].T, before @ w2.T), "the output must be the same to the bit: divide column i of w2 by f[i]"


def check_canonical(canonical: Callable[..., Any]) -> None:
    """Lesson 3: ``canonical(w1, b1, w2)`` gives one and the same network for all networks of an orbit, and it is one of them.

    >>> check_canonical(lambda w1, b1, w2: (w1, b1, w2))
    Traceback (most recent call last):
    AssertionError: two networks of one orbit must give the same w1, entry (0, 0): got 0.1257 and 0.06287
    """
    for w1, b1, w2, x, f in _two_layers():
        one = _arrays("w1, b1 and w2", canonical(w1.copy(), b1.copy(), w2.copy()), (w1, b1, w2))
        two = _arrays("w1, b1 and w2", canonical(w1 * f[:, None], b1 * f, w2 / f), (w1, b1, w2))
        for name, a, b in zip(("w1", "b1", "w2"), one, two, strict=True):
            for at in np.argwhere(np.abs(a - b) > _slack(a))[:1]:
                i = tuple(at.tolist())
                raise AssertionError(f"two networks of one orbit must give the same {name}, entry {i}: got {a[i]:.4g} and {b[i]:.4g}")
        y, made = _hidden(w1, b1, x) @ w2.T, _hidden(one[0], one[1], x) @ one[2].T
        assert (np.abs(y - made) <= _slack(y)).all(), ("the network that is given back must be one of the orbit and compute the same: "
                                                       "factors above 0, and readers divided")
        other = _arrays("w1, b1 and w2", canonical(w1 * 2, b1, w2), (w1, b1, w2))
        assert any((a != b).any() for a, b in zip(one, other,
                                                  strict=True)), "w1 doubled and nothing else is another orbit: it must stay another"


def check_labels(labels: Callable[..., Any]) -> None:
    """Lesson 4: ``labels(graph)`` gives every value's list of numbers, 0 where pinned, equal where tied; Dense, Conv, ReLU, Add, Concat.

    >>> check_labels(lambda graph: {name: [0] for name in graph.inputs})
    Traceback (most recent call last):
    AssertionError: network 'chain': a = Dense(x), r = ReLU(a), b = Dense(r), s = ReLU(b), y = Dense(s); output y: labels of a, b, r, s, y?
    """
    for case in all_cases([2]):
        graph = network_of(case.request["network"])
        kinds = {type(node.op).__name__ for node in graph.nodes}
        if not kinds <= {"Dense", "Conv", "ReLU", "Add", "Concat"} or case.name in ("shared", "recurrent", "add-one-channel",
                                                                                    "concat-space"):
            continue
        drawn = ", ".join(f"{node.name} = {type(node.op).__name__}({', '.join(node.inputs)})" for node in graph.nodes)
        told = f"network '{case.name}': {drawn}; output {', '.join(graph.outputs)}"
        channels = {name: [int(n) for n in of] for name, of in labels(graph).items()}
        missing = {*graph.inputs, *(node.name for node in graph.nodes)} - set(channels)
        assert not missing, f"{told}: labels of {', '.join(sorted(missing))}?"
        found = len({n for of in channels.values() for n in of} - {0})
        try:
            judge(case, {"channels": channels, "degrees_of_freedom": found})
        except Wrong as wrong:
            raise AssertionError(f"{told}: {wrong}") from None


def check_free_numbers(free_numbers: Callable[..., Any]) -> None:
    """Lesson 4: ``free_numbers(relations)`` for relations ``(R, C)`` between C channels: how many numbers can be chosen.

    >>> check_free_numbers(lambda relations: relations.shape[1] - relations.shape[0])
    Traceback (most recent call last):
    AssertionError: 3 relations between 3 channels, [[1, 1, -1], [1, 0, -1], [0, 1, 0]], leave 1 free, got 0
    """
    gate, residual = [1, 1, -1], [1, 0, -1]
    for rows in ([gate], [gate, residual, [0, 1, 0]], [[2, -1, 0, 0], [0, 0, 1, 1]], [[1, -1, 0, 0], [0, 1, -1, 0], [1, 0, -1, 0]],
                 [[0, 0, 0]]):
        right, got = len(rows[0]) - _rank(rows), free_numbers(np.array(rows))
        assert got == right, f"{len(rows)} relations between {len(rows[0])} channels, {rows}, leave {right} free, got {got}"


def check_one_step(one_step: Callable[..., Any]) -> None:
    """Lesson 5: ``one_step(kernel, activation)`` for ``K_i`` and ``A_i``, ``(C,)`` each; dead channels keep 1.

    >>> check_one_step(lambda k, a: np.minimum(k.max() / k, a.max() / a))
    Traceback (most recent call last):
    AssertionError: one_step([1, 0.5, 0.015625], [4, 1, 0.125]): factor 2 must be 16, got 32
    """
    for k, a in (([1, 0.5, 1 / 64], [4, 1, 1 / 8]), ([2, 1, 0.25], [1, 1, 1]), ([0, 1, 0.5], [0, 2, 1]), ([0.5, 1, 0.25], [0, 3, 1]),
                 ([0.75], [0.1])):
        right = _amplified(k, a, [1] * len(k))
        with np.errstate(divide="ignore", invalid="ignore"):
            got = one_step(np.array(k, float), np.array(a, float))
        _factors(f"one_step({_shown(k)}, {_shown(a)})", got, right, (k, a))


def check_two_step(two_step: Callable[..., Any]) -> None:
    """Lesson 5: ``two_step(kernel, activation, readers)``, with the weights ``(out, C)`` of each layer that reads the channels.

    >>> check_two_step(lambda k, a, readers: np.ones(len(k)))
    Traceback (most recent call last):
    AssertionError: two_step([1, 0.5], [2, 1], 1 readers): factor 0 must be 0.5, got 1
    """
    wide = np.array([[1.0, -2.0], [0.5, 0.25]])
    for k, a, readers in (([1, 0.5], [2, 1], [wide]), ([1, 0.5], [2, 1], [wide, np.array([[4.0, 1.0]])]),
                          ([1, 1 / 64], [1, 1 / 64], [wide]),
                          ([1, 0.5, 0.25], [1, 2, 3], [np.array([[0.25, -1.0, 0.0]])])):
        m = [max(Fraction(np.abs(w[:, i]).max()) / Fraction(np.abs(w).max()) for w in readers) for i in range(len(k))]
        with np.errstate(divide="ignore", invalid="ignore"):
            got = two_step(np.array(k, float), np.array(a, float), [w.copy() for w in readers])
        _factors(f"two_step({_shown(k)}, {_shown(a)}, {len(readers)} readers)", got, _amplified(k, a, m), (k, a, m))


def check_cross_layer(cross_layer: Callable[..., Any]) -> None:
    """Lesson 6: ``cross_layer(w1, w2)`` gives the factors after which channel i of both ranges alike; dead channels keep 1.

    >>> check_cross_layer(lambda w1, w2: np.sqrt(np.abs(w2).max(axis=0) / np.abs(w1).max(axis=1)))
    Traceback (most recent call last):
    AssertionError: four factors above 0 are asked for, got [1, 2, inf, 0]
    """
    w1, w2 = np.array([[0.5, -1.0], [0.25, 0.5], [0.0, 0.0], [1.0, 1.0]]), np.array([[1.0, -2.0, 1.0, 0.0], [0.5, 0.25, 1.0, 0.0]])
    with np.errstate(divide="ignore", invalid="ignore"):
        f = np.asarray(cross_layer(w1.copy(), w2.copy()), float)
    assert f.shape == (4,) and np.isfinite(f).all() and (f > 0).all(), f"four factors above 0 are asked for, got {_shown(f)}"
    assert (f[2:] == 1).all(), f"channel 2 is made, and channel 3 is read, with zeros alone: both keep 1, got {_shown(f[2:])}"
    _balanced([w1, w2], [f])


def check_balance(balance: Callable[..., Any]) -> None:
    """Lesson 6: ``balance(weights)`` gives the factors of each layer but the last, after which all channels are balanced at once.

    >>> check_balance(lambda weights: [np.ones(len(w)) for w in weights[:-1]])
    Traceback (most recent call last):
    AssertionError: channel 0 is made with weights up to 2.905896 and read with weights up to 1.863629
    """
    rng = np.random.default_rng(6)
    for widths in ((2, 3, 2), (3, 4, 4, 2), (2, 5, 4, 3, 4, 1)):
        weights = [np.exp(rng.normal(size=(b, 1))) * rng.normal(size=(b, a)) for a, b in pairwise(widths)]
        factors = [np.asarray(f, float) for f in balance([w.copy() for w in weights])]
        assert [f.shape for f in factors] == [(n,) for n in widths[1:-1]], f"widths {widths} have factors {widths[1:-1]}, got {factors}"
        _balanced(weights, factors)


def check_noise(weight_noise: Callable[..., Any], activation_noise: Callable[..., Any]) -> None:
    """Lesson 7: variances that rounding adds to the outputs ``(out,)`` of a dense layer, for a step of its weights and one of its inputs.

    ``weight_noise(step, weight, mean_square)`` with ``E[x_i**2]`` of the inputs, ``(in,)``, and ``activation_noise(step, weight)``.

    >>> check_noise(lambda step, w, square: step**2 * square.sum() + 0 * w[:, 0], lambda step, w: 0 * w[:, 0])
    Traceback (most recent call last):
    AssertionError: weight_noise of output 0 must be 0.0048, got 0.0576: the error of a step is spread evenly: a twelfth of its square
    """
    for weight, square, step in ((np.ones((2, 4)), np.ones(4), 0.12),
                                 (np.array([[1.0, -2.0], [0.5, 0.0], [3.0, 1.0]]), np.array([0.25, 4.0]), 0.5)):
        twelfth = Fraction(step) ** 2 / 12
        ofs = {"weight_noise": (weight_noise(step, weight.copy(), square.copy()), [twelfth * sum(map(Fraction, square)) for _ in weight],
                                "the error of a step is spread evenly: a twelfth of its square"),
               "activation_noise": (activation_noise(step, weight.copy()), [twelfth * sum(Fraction(w) ** 2 for w in row) for row in weight],
                                    "an input's error passes through the weights that read it")}
        for name, (got, right, why) in ofs.items():
            assert np.shape(got) == (len(weight),), f"{name} must have one entry an output, {len(weight)}, got shape {np.shape(got)}"
            for j, (a, b) in enumerate(zip(got, right, strict=True)):
                assert _close(a, float(b)), f"{name} of output {j} must be {float(b):.4g}, got {a:.4g}: {why}"


def check_lower_bound(lower_bound: Callable[..., Any]) -> None:
    """Lesson 7: ``lower_bound(value, gradient, point, low, high)``: what no convex function with these falls below within the box.

    >>> check_lower_bound(lambda value, gradient, point, low, high: value - 1.0)
    Traceback (most recent call last):
    AssertionError: the function value + gradient . (u - point) falls to -15.5 in the box, below the bound -2.75
    """
    rng = np.random.default_rng(7)
    for size in (1, 2, 5):
        rates, offsets = rng.normal(size=(6, size)), rng.normal(size=6)
        point, low, high = np.full(size, 0.5), np.full(size, -2.0), np.arange(1.0, size + 1)
        terms = np.exp(rates @ point + offsets)
        value, gradient = float(terms.sum()), terms @ rates
        if size == 1:
            value, gradient = -1.75, np.array([5.5])
        bound = float(lower_bound(value, gradient.copy(), point.copy(), low.copy(), high.copy()))
        corner = np.where(gradient > 0, low, high)
        least = value + float(gradient @ (corner - point))
        assert bound <= least + CLOSE * abs(least), (f"the function value + gradient . (u - point) falls to {least:.4g} in the box, "
                                                     f"below the bound {bound:.4g}")
        assert _close(bound, least), f"no convex function falls below {least:.4g}: the bound {bound:.4g} is looser than it need be"


def check_dense(dense: Callable[..., Any]) -> None:
    """Lesson 8: ``dense(q_x, z_x, q_w, q_b)``: sums ``(N, out)`` of ``uint8`` inputs less their zero point, with ``int8`` weights.

    >>> check_dense(lambda q_x, z_x, q_w, q_b: (q_x - np.uint8(z_x)) @ q_w.T.astype(np.uint8) + q_b)
    Traceback (most recent call last):
    AssertionError: input [255, 0, 7] less 3, weights [127, -128, 1], bias 5 sum up to 32397, got 141: whole numbers of 8 bits wrap
    """
    q_x, q_w = np.array([[255, 0, 7], [3, 3, 3], [0, 255, 255]], np.uint8), np.array([[127, -128, 1], [-128, -128, -128]], np.int8)
    q_b = np.array([5, -70000], np.int32)
    for z in (3, 128, 0):
        got = np.asarray(dense(q_x.copy(), z, q_w.copy(), q_b.copy()))
        assert got.shape == (3, 2), f"the sums of 3 samples and 2 outputs have shape (3, 2), got {got.shape}"
        for n, x in enumerate(q_x.tolist()):
            for j, w in enumerate(q_w.tolist()):
                right = int(q_b[j]) + sum(a * (b - z) for a, b in zip(w, x, strict=True))
                bare = right + sum(a * z for a in w)
                why = "the zero point is not subtracted" if got[n, j] == bare else "whole numbers of 8 bits wrap"
                assert got[n, j] == right, f"input {x} less {z}, weights {w}, bias {q_b[j]} sum up to {right}, got {got[n, j]}: {why}"


def check_requantize(requantize: Callable[..., Any]) -> None:
    """Lesson 8: ``requantize(n, multiplier, zero_point, qmin, qmax)``: sums as whole numbers on the next layer's grid.

    >>> check_requantize(lambda n, m, z, low, high: np.clip((n * m).astype(int) + z, low, high))
    Traceback (most recent call last):
    AssertionError: requantize(3, 0.5, 10, 0, 255) must be 12, got 11: a half goes to the even neighbour
    """
    for case in all_cases([5]):
        if case.ask != "requantize" or case.request["dtype"] != "float64":
            continue
        grid = case.request["grid"]
        step = case.request["input_scale"] * array_of(case.request["weight_scale"]) / array_of(grid["scale"])
        n, right = array_of(case.request["n"]), array_of(case.expected["answer"]["q"])
        for c, multiplier in enumerate(np.broadcast_to(step, n.shape[1]) if n.ndim > 2 else step):
            sums, wanted = (n[:, c], right[:, c]) if n.ndim > 2 else (n, right)
            z = int(array_of(grid["zero_point"])[0])
            got = np.asarray(requantize(sums.copy(), float(multiplier), z, grid["qmin"], grid["qmax"]))
            for a, b, made in zip(sums.ravel().tolist(), wanted.ravel().tolist(), got.ravel().tolist(), strict=True):
                call = f"requantize({a}, {multiplier:g}, {z}, {grid['qmin']}, {grid['qmax']})"
                slip = _slip(a * float(multiplier), z, grid["qmin"], grid["qmax"], made)
                assert made == b, f"{call} must be {b}, got {made}{slip}"
    odd = np.asarray(requantize(np.array([1, 3]), 0.5, 7, 0, 255)).tolist()
    assert odd == [7, 9], f"requantize([1, 3], 0.5, 7, 0, 255) must be [7, 9], got {odd}: round first, then add the zero point"


# ---------------------------------------------------------------------------------------------------------------
# What the checks share


def _close(given: Any, right: object) -> bool:
    a, b = np.asarray(given, float), np.asarray(right, float)
    return a.shape == b.shape and bool((np.abs(a - b) <= CLOSE * np.abs(b)).all())


def _slack(a: Floats) -> float:
    """What some roundings may make of the largest entry."""
    return 64.0 * float(np.finfo(a.dtype).eps) * float(np.abs(a).max())


def _shown(numbers: Iterable[float]) -> str:
    return f"[{', '.join(f'{number:g}' for number in numbers)}]"


def _arrays(names: str, given: Any, like: Sequence[Floats]) -> list[Floats]:
    made = [np.asarray(a) for a in given]
    assert [(a.shape, a.dtype) for a in made] == [(a.shape, a.dtype) for a in like], (
        f"{names} must keep shapes and types, {[(a.shape, a.dtype.name) for a in like]}, got {[(a.shape, a.dtype.name) for a in made]}")
    assert all(np.isfinite(a).all() for a in made), f"{names} must be finite, got {made}"
    return made


def _folding(of_outputs: bool) -> list[tuple[Floats, Floats, tuple[Floats | float, ...], Floats]]:
    """Weights, biases, the parameters of a BatchNorm on their outputs or inputs, and what lies under the kernel at some place."""
    rows: list[tuple[Floats, Floats, tuple[Floats | float, ...], Floats]] = []
    for rng, shape in ((np.random.default_rng(i), shape) for i, shape in enumerate([(2, 2), (3, 2), (2, 3, 3, 3), (4, 1, 5)])):
        weight, bias, patch = (rng.integers(-8, 9, size) / 4 for size in (shape, shape[0], shape[1:]))
        channels = shape[0 if of_outputs else 1]
        gamma, beta, mean = (rng.integers(1, 9, channels) / 4 for _ in range(3))
        rows.append((weight, bias, (gamma, beta, mean, rng.integers(1, 9, channels) / 4.0, 2.0**-4), patch))
    return rows


def _apply(weight: Any, bias: Any, patch: Floats) -> Floats:
    made: Floats = (np.asarray(weight) * patch).reshape(len(weight), -1).sum(axis=1) + np.asarray(bias)
    return made


def _normalized(x: Floats, gamma: Any, beta: Any, mean: Any, var: Any, eps: Any) -> Floats:
    def by(v: Floats) -> Floats:
        return v.reshape(-1, *(1,) * (x.ndim - 1))
    made: Floats = by(gamma) * (x - by(mean)) / np.sqrt(by(var) + eps) + by(beta)
    return made


def _same_layer(weight: Floats, made: Any, got: Floats, right: Floats, what: str, hint: str) -> None:
    assert np.shape(made) == weight.shape, f"a folded weight keeps its shape, {weight.shape}, got {np.shape(made)}"
    for i, (a, b) in enumerate(zip(got, right, strict=True)):
        call = f"weight {weight.shape}: {what} output channel {i}"
        assert abs(a - b) <= CLOSE * max(abs(b), 1.0), f"{call} must be {b:.4g}, got {a:.4g} ({hint})"


def _two_layers() -> Iterator[tuple[Floats, Floats, Floats, Floats, Floats]]:
    """Weights and biases of two dense layers, whose hidden channels are all of use; samples; and powers of two for the hidden channels."""
    for seed, dtype in enumerate((np.float64, np.float32)):
        rng = np.random.default_rng(seed)
        w1, b1, w2, x = (rng.normal(size=size).astype(dtype) for size in ((5, 3), (5,), (2, 5), (16, 3)))
        yield w1, b1, w2, x, 2.0 ** ((np.arange(len(w1)) % 4) - 1.0)[::-1].astype(dtype)


def _hidden(w1: Floats, b1: Floats, x: Floats) -> Floats:
    made: Floats = np.maximum(x @ w1.T + b1, 0)
    return made


def _rank(rows: Sequence[Sequence[int]]) -> int:
    """By elimination over fractions."""
    left, rank = [[Fraction(n) for n in row] for row in rows], 0
    while left:
        row = left.pop()
        pivot = next((i for i, n in enumerate(row) if n), None)
        if pivot is None:
            continue
        rank += 1
        left = [[a - b * other[pivot] / row[pivot] for a, b in zip(other, row, strict=True)] for other in left]
    return rank


def _amplified(k: Sequence[float], a: Sequence[float], m: Sequence[Any]) -> list[float]:
    """PAPER 2 and 3 in fractions; dead channels keep 1."""
    kernel, activation = ([Fraction(n) for n in of] for of in (k, a))
    largest_k, largest_a = (max(n * f for n, f in zip(of, m, strict=True)) for of in (kernel, activation))
    return [float(min(largest_k / n, largest_a / v, Fraction(16))) if n and v and f else 1.0
            for n, v, f in zip(kernel, activation, m, strict=True)]


def _slip(steps: float, zero: int, qmin: int, qmax: int, made: Any) -> str:
    """The mistake that makes this of ``steps``, a real number of steps, if a common one does."""
    def clip(n: float) -> float:
        return min(max(n, qmin), qmax)
    rounded = float(np.rint(steps))
    for guess, why in ((rounded + zero, "it is beyond the end of the grid"),
                       (clip(rounded) + zero, "clip last, when the zero point has been added"),
                       (clip(float(np.rint(steps + zero))), "round first, then add the zero point"),
                       (clip(rounded), "the zero point is not added"), (clip(rounded - zero), "the zero point is added, not subtracted")):
        if made == guess:
            return f": {why}"
    if clip(rounded + zero) != rounded + zero:
        return ": it is beyond the end of the grid"
    return ": a half goes to the even neighbour" if abs(steps - np.trunc(steps)) == 0.5 else ": round to the nearest"


def _factors(call: str, got: Any, right: Sequence[float], ranges: Iterable[Sequence[Any]]) -> None:
    why = {i: ": a dead channel keeps 1" for i, of in enumerate(zip(*ranges, strict=True)) if not all(of)}
    assert np.shape(got) == np.shape(right), f"{call}: {len(right)} factors are asked for, got {got}"
    for i, (a, b) in enumerate(zip(got, right, strict=True)):
        assert _close(a, b), f"{call}: factor {i} must be {b:g}, got {a:g}{why.get(i, '')}"


def _balanced(weights: Sequence[Floats], factors: Sequence[Floats]) -> None:
    """Weights that make a channel and that read it range alike, wherever both are there."""
    first, last = np.ones(weights[0].shape[1]), np.ones(len(weights[-1]))
    scaled = [w * out[:, None] / into for w, into, out in zip(weights, [first, *factors], [*factors, last], strict=True)]
    for one, two in pairwise(scaled):
        made, read = np.abs(one).max(axis=1), np.abs(two).max(axis=0)
        for i in np.flatnonzero((made > 0) & (read > 0) & (np.abs(made - read) > 1e-6 * made))[:1]:
            raise AssertionError(f"channel {i} is made with weights up to {made[i]:.7g} and read with weights up to {read[i]:.7g}")
