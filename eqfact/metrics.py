"""How good is a quantized network, and is a rewritten one the same function?

:func:`sqnr` is the signal-to-noise ratio in decibels. :func:`verify` compares two networks on data against the bound
``c u (|W_L| ... |W_1| |x|)`` on rounding errors, propagated through the graph (PAPER 8). Where the two share a value by name up to
one positive factor a channel, the walk starts afresh from it: so the bound stays as sharp as one layer's, however deep the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from eqfact.channels import channels
from eqfact.graph import Data, Graph, Node, checked_inputs, values
from eqfact.ops.base import Array, Shape, Weighted, along_channels
from eqfact.ops.elementwise import Clip
from eqfact.ops.weighted import BatchNorm

Vector = npt.NDArray[np.float64]

#: Where inner values speak against equality, a bound beyond this part of the output's largest entry is no proof for it.
SHARP = 1e-5


def sqnr(reference: Data, test: Data) -> float:
    """``10 log10(sum(reference**2) / sum((reference - test)**2))`` in dB, over all entries (of all outputs, for dicts).

    Infinite where the two are equal; minus infinity where the reference is 0 and the test is not.

    >>> sqnr(np.array([10.0, 0.0]), np.array([10.0, 1.0]))
    20.0
    """
    if isinstance(reference, Mapping) != isinstance(test, Mapping):
        raise TypeError("sqnr compares two arrays or two dicts of arrays")
    if isinstance(reference, Mapping) and isinstance(test, Mapping):
        if set(reference) != set(test):
            raise ValueError(f"sqnr needs the same names on both sides, got {sorted(reference)} and {sorted(test)}")
        pairs = [(np.asarray(reference[name], np.float64), np.asarray(test[name], np.float64)) for name in reference]
    else:
        pairs = [(np.asarray(reference, np.float64), np.asarray(test, np.float64))]
    for a, b in pairs:
        if a.shape != b.shape:
            raise ValueError(f"sqnr needs equal shapes, got {a.shape} and {b.shape}")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ValueError("sqnr needs finite arrays, got NaN or infinity")
    # in units of the largest entry, so that no square overflows or underflows
    unit = max(float(np.abs(v).max(initial=0.0)) for pair in pairs for v in pair) or 1.0
    noise = sum(float(((a / unit - b / unit) ** 2).sum()) for a, b in pairs)
    signal = sum(float(((a / unit) ** 2).sum()) for a, _ in pairs)
    return decibels(signal, noise)


def decibels(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)``, of sums of squares; infinite without noise, else minus infinity without signal.

    >>> decibels(100.0, 1.0)
    20.0
    """
    if noise == 0:
        return np.inf
    return float(10 * np.log10(signal / noise)) if signal > 0 else -np.inf


@dataclass(frozen=True)
class Verification:
    """The verdict of :func:`verify`. True in a condition if the networks are equal."""

    equal: bool
    #: Largest error at the worst value, and the bound on it; the worst value is the one whose error is largest against its bound.
    max_error: float
    bound: float
    worst: str
    message: str

    def __bool__(self) -> bool:
        return self.equal


def verify(a: Graph, b: Graph, x: Data) -> Verification:
    """Are two networks the same function on this data, up to rounding?

    Both run on ``x``; the error at a value may be ``c u m``, where ``u`` is the unit roundoff of the coarser network, ``m`` the magnitudes
    ``|W_L| ... |W_1| |x|``, and ``c`` counts the roundings on the way in both networks. An inner value that both have by name
    may differ by factors, one for each channel label of ``b``, read off the weights, or else off the data: a witness factorization.
    Outputs may not differ. Where a value agrees, both walks start afresh from it.

    Inner values of the same name that do not agree are no longer compared; then the outputs decide, as long as the bound there is
    below a hundred-thousandth of the output; otherwise the answer is no. Known limit: in a deep network whose values part early, later
    inner values can agree within a bound that has grown as large as they are; starting afresh there can hide the difference.
    Compare the outputs with :func:`sqnr` too where the message says "equal at the outputs".
    Raises :class:`ValueError` if inputs or outputs have other names or shapes.

    >>> net = Graph.chain((1,), fc1=Dense(np.array([[1.0], [3.0]])), act=ReLU(), fc2=Dense(np.array([[2.0, 1.0]])))
    >>> bool(verify(net, Factorization.of(net, {"act": [3.0, 0.1]}).apply(net), np.array([[0.5], [-1.0]])))
    True
    """
    for what, of_a, of_b in (("inputs", dict(a.inputs), dict(b.inputs)), ("outputs", _outputs(a), _outputs(b))):
        if of_a != of_b:
            raise ValueError(f"networks to compare need the same {what}, got {of_a} and {of_b}")
    truth = values(a, x)
    shared = {name for name, shape in b.shapes.items() if a.shapes.get(name) == shape}
    found = _compare(a, b, truth, x, shared)
    parted = [name for name, value in found.items() if value.excess > 1]
    if not parted:
        worst = max(found, key=lambda name: found[name].excess)
        return _verdict(True, found, worst, f"equal: largest error {found[worst].error:.3g} within {found[worst].bound:.3g}, at '{worst}'")
    last = found
    while inner := {name for name, value in last.items() if value.excess > 1} - set(b.outputs):
        shared -= inner
        last = _compare(a, b, truth, x, shared)
    made = [name for name in b.outputs if name in last]  # not an input that is put out as it came
    worst = max(made, key=lambda name: last[name].excess)
    sharp = all(last[name].bound <= SHARP * float(np.abs(truth[name]).max()) for name in made)
    if last[worst].excess <= 1 and sharp:
        return _verdict(True, last, worst, f"equal at the outputs: largest error {last[worst].error:.3g} within {last[worst].bound:.3g}; "
                        f"inner values of the same name differ, first '{parted[0]}'")
    return _verdict(False, last, worst, f"not equal: they part at '{parted[0]}', by {found[parted[0]].error:.3g} where rounding explains "
                    f"{found[parted[0]].bound:.3g}; output '{worst}' differs by {last[worst].error:.3g}")


@dataclass(frozen=True)
class _Agreement:
    """The entry of a value where the error is largest against its bound; ``excess`` is their ratio."""

    error: float
    bound: float
    excess: float


class _Roundings:
    """Bounds on rounding errors along a walk: magnitudes ``m``, and errors ``e`` in units of ``u`` (never below ``m``)."""

    def __init__(self) -> None:
        self.m: dict[str, Array] = {}
        self.e: dict[str, Array] = {}

    def start(self, name: str, value: Array, doubt: Array | float = 0.0) -> None:
        """A value taken as it is, up to its own rounding and a doubt, both in units of ``u``."""
        self.m[name] = np.abs(value)
        self.e[name] = (self.m[name] + doubt).astype(value.dtype)

    def step(self, node: Node) -> Array:
        """The bound at the output of a node, from those at its inputs."""
        with np.errstate(over="ignore", invalid="ignore"):
            m = node.op.magnitude(*(self.m[i] for i in node.inputs))
            e = node.op.magnitude(*(self.e[i] for i in node.inputs)) + node.op.roundings * m
        # beyond overflow nothing is bounded, not even 0 * inf
        self.m[node.name], self.e[node.name] = (np.where(np.isnan(v), np.inf, v) if np.isnan(v.max()) else v for v in (m, e))
        return self.e[node.name]


class _Slopes:
    """``|W_L| ... |W_1| s`` without biases, on one image in float64: nothing cancels there, so factors read off it stay sharp in any depth.

    Beside ``s`` walks ``s`` times the doubt about the factors in it, in units of ``u``; both are stacked as a batch of two.
    """

    #: Roundings of one weight, in both networks, with those of a BatchNorm's slope.
    ROUNDINGS = 8.0

    def __init__(self, u: float) -> None:
        self.s: dict[str, Array] = {}
        self.u = u

    def start(self, name: str, value: Array, factor: Array | float = 1.0, doubt: Array | float = 0.0) -> None:
        """A value taken as it is, times a factor of some doubt."""
        s = np.abs(value).mean(axis=0, dtype=np.float64) * factor
        self.s[name] = np.stack([s, s * doubt])

    def step(self, node: Node) -> Array:
        """The slopes of a node's output, ``(2, C, *spatial)``."""
        op, inputs = node.op, [self.s[i] for i in node.inputs]
        with np.errstate(over="ignore", invalid="ignore"):
            if isinstance(op, Weighted):
                s = _without_bias(op).forward(*inputs)
            elif isinstance(op, Clip):
                s = inputs[0]
            else:
                s = op.magnitude(*inputs) - op.magnitude(*(np.zeros_like(v) for v in inputs))
        s = np.where(np.isfinite(s) & (s > 0), s, 0.0)
        s[1] += ((self.ROUNDINGS if isinstance(op, Weighted) else 0.0) + op.roundings * np.finfo(np.float64).eps / 2 / self.u) * s[0]
        self.s[node.name] = s
        return s


def _without_bias(op: Weighted) -> Weighted:
    """``|W|`` alone."""
    if isinstance(op, BatchNorm):
        none = np.zeros_like(op.beta)
        return replace(op, gamma=np.abs(op.gamma), beta=none, mean=none)
    return replace(op, weight=np.abs(op.weight), bias=None)  # type: ignore[type-var]  # every final op is a dataclass


def _compare(a: Graph, b: Graph, truth: dict[str, Array], x: Data, shared: set[str]) -> dict[str, _Agreement]:
    """Walk both networks, compare at every shared value, and start afresh where they agree."""
    rounding_a, rounding_b, errors_a = _Roundings(), _Roundings(), {}
    env = dict(checked_inputs(b, x))
    u = max(float(np.finfo(value.dtype).eps) for value in (*truth.values(), *env.values())) / 2
    slopes_a, slopes_b, made_a = _Slopes(u), _Slopes(u), {}
    for name in env:
        rounding_a.start(name, truth[name])
        rounding_b.start(name, env[name])
        slopes_a.start(name, truth[name])
        slopes_b.start(name, env[name])
    for node in a.nodes:
        errors_a[node.name], made_a[node.name] = rounding_a.step(node), slopes_a.step(node)
        if node.name in shared:
            rounding_a.start(node.name, truth[node.name])
            slopes_a.start(node.name, truth[node.name])
    resolved = channels(b)
    factor = np.ones(resolved.degrees_of_freedom + 1)
    uncertainty = np.full(len(factor), -1.0)  # of each factor, in units of u; negative while it is unknown
    for name in ("", *b.inputs, *b.outputs):  # inputs and outputs keep the factor 1, whatever the labels say
        uncertainty[resolved.labels[name] if name else 0] = 0
    found = {}
    for node in b.nodes:
        name = node.name
        value = env[name] = node.op.forward(*(env[i] for i in node.inputs))
        error_b, made_b = rounding_b.step(node), slopes_b.step(node)
        if name not in shared:
            continue
        labels, errors = resolved.labels[name], (errors_a[name], error_b)
        if (new := uncertainty[labels] < 0).any():
            f, unsure = _read_off_data(truth[name], value, errors, u)
            sharp_f, sharp_unsure = _read_off_weights(made_a[name], made_b)
            _, error, bound, _ = _against(truth[name], value, errors, sharp_f, sharp_unsure, u)
            explains = (sharp_unsure >= 0) & (error <= bound).all(axis=(0, *range(2, value.ndim)))
            f, unsure = np.where(explains, (sharp_f, sharp_unsure), (f, unsure))
            # where several channels carry one label, the last to be written counts: the one that is surest of it
            order = np.argsort(np.where(unsure < 0, np.inf, unsure))[::-1]
            order = order[new[order]]
            factor[labels[order]], uncertainty[labels[order]] = f[order], unsure[order]
        expected, error, bound, doubt = _against(truth[name], value, errors, factor[labels], uncertainty[labels], u)
        found[name] = _worst(error, bound)
        if found[name].excess <= 1:
            env[name] = expected.astype(value.dtype)
            rounding_b.start(name, env[name], np.minimum(doubt, bound) / u)
            f, unsure = (along_channels(v, value.ndim - 1) for v in (factor[labels], np.maximum(uncertainty[labels], 0)))
            slopes_b.start(name, truth[name], f, unsure)
    return found


def _against(truth: Array, value: Array, errors: tuple[Array, Array], f: Vector, unsure: Vector,
             u: float) -> tuple[Array, Array, Array, Array]:
    """What is expected of a value with these factors; the error, the bound on it, and the part of it that is doubt about the factors."""
    f, unsure = (along_channels(v, value.ndim - 1) for v in (f, np.maximum(unsure, 0)))
    expected = truth * f
    doubt = u * np.abs(expected) * unsure
    return expected, np.abs(value - expected), u * (errors[0] * f + errors[1]) + doubt, doubt


def _read_off_data(a: Array, b: Array, errors: tuple[Array, Array], u: float) -> tuple[Vector, Vector]:
    """Factors ``|b| / |a|`` a channel and their uncertainty in units of ``u``, negative where a channel is 0."""
    axes = (0, *range(2, a.ndim))
    size_a, size_b, error_a, error_b = (np.abs(v).sum(axis=axes, dtype=np.float64) for v in (a, b, *errors))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        unsure = (error_a / size_a + error_b / size_b).clip(max=1 / u)  # beyond, nothing is known
    return _ratio(size_a, size_b, unsure)


def _read_off_weights(a: Array, b: Array) -> tuple[Vector, Vector]:
    """The same from the slopes of both walks, ``(2, C, *spatial)``."""
    (size_a, doubt_a), (size_b, doubt_b) = (v.sum(axis=tuple(range(2, v.ndim))) for v in (a, b))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        unsure = doubt_a / size_a + doubt_b / size_b
    return _ratio(size_a, size_b, unsure)


def _ratio(a: Vector, b: Vector, unsure: Vector) -> tuple[Vector, Vector]:
    known = (a > 0) & (b > 0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.where(known, b / a, 1.0)
    known &= np.isfinite(ratio) & (ratio > 0) & np.isfinite(unsure)
    return np.where(known, ratio, 1.0), np.where(known, unsure, -1.0)


def _worst(error: Array, bound: Array) -> _Agreement:
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.where(error > 0, error / bound, 0.0)
    where = np.unravel_index(int(excess.argmax()), excess.shape)
    return _Agreement(float(error[where]), float(bound[where]), float(excess[where]))


def _outputs(graph: Graph) -> dict[str, Shape]:
    return {name: graph.shapes[name] for name in sorted(graph.outputs)}


def _verdict(equal: bool, found: dict[str, _Agreement], worst: str, message: str) -> Verification:
    return Verification(equal, found[worst].error, found[worst].bound, worst, message)
