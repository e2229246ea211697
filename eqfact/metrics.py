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
from eqfact.ops.base import Array, Shape, T, Weighted, along_channels, channel_vector, finite_magnitude
from eqfact.ops.weighted import BatchNorm

Vector = npt.NDArray[np.float64]

#: Two values are near if no entry differs by more than ``sqrt(u)`` over this, of the largest: by 1.5e-5 in float32, 7e-10 in float64.
NEAR = 16.0


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
    #: The largest difference of an output, both networks run from end to end, in units of that output's largest entry: where rounding
    #: errors grow on the way, this is more than the errors that were compared.
    apart: float = 0.0

    def __bool__(self) -> bool:
        return self.equal


def verify(a: Graph, b: Graph, x: Data) -> Verification:
    """Are two networks the same function on this data, up to rounding?

    Both run on ``x``; the error at a value may be ``c u m``, where ``u`` is the unit roundoff of the coarser network, ``m`` the magnitudes
    ``|W_L| ... |W_1| |x|``, and ``c`` counts the roundings on the way in both networks. An inner value that both have by name
    may differ by factors, one for each channel label of ``b``, read off the weights, or else off the data: a witness factorization.
    Where channels of a value agree within the bound and are near, both walks start afresh from them: so a bound that has grown as large
    as the values hides nothing. Outputs must agree as they are, within the bound and near (by ``sqrt(u) / 16`` of the most that the last
    layer's ``|W| |x|`` comes to in their channel). Inner values of the same name may have another meaning, so that they part; then
    outputs must have a bound that is as near.

    So errors count from the last start. In a network that amplifies roundings even its equivalent networks end apart: how far, without
    starts on the way, is said too. Raises :class:`ValueError` if inputs or outputs have other names or shapes, or if an output overflows.

    >>> net = Graph.chain((1,), fc1=Dense(np.array([[1.0], [3.0]])), act=ReLU(), fc2=Dense(np.array([[2.0, 1.0]])))
    >>> bool(verify(net, Factorization.of(net, {"act": [3.0, 0.1]}).apply(net), np.array([[0.5], [-1.0]])))
    True
    """
    for what, of_a, of_b in (("inputs", dict(a.inputs), dict(b.inputs)), ("outputs", _outputs(a), _outputs(b))):
        if of_a != of_b:
            raise ValueError(f"networks to compare need the same {what}, got {of_a} and {of_b}")
    truth = values(a, x)
    shared = _in_common(a, b)
    ends = _ends(b, x, {name: truth[name] for name in shared})
    for name in b.outputs:
        for which, value in (("first", truth[name]), ("second", ends[name])):
            if not np.isfinite(value).all():
                raise ValueError(f"output '{name}' of the {which} network overflows on this data, so there is nothing to compare: "
                                 "give data as the network expects it")
    made = [name for name in b.outputs if name not in b.inputs]
    if not made:
        return Verification(True, 0.0, 0.0, b.outputs[0], "equal: the inputs are put out as they come")
    made = [name for name in made if name not in shared]
    if not made:
        return Verification(True, 0.0, 0.0, b.outputs[0], "equal: the same operations on the same parameters")
    found = _compare(a, b, truth, shared, x)
    apart = max(float(np.abs(ends[name] - truth[name]).max() / (np.abs(truth[name]).max() or 1.0)) for name in made)
    parted = [name for name, value in found.items() if value.excess > 1]
    equal = all(found[name].excess <= 1 and (found[name].sharp if parted else found[name].near) for name in made)
    worst = max(found if equal and not parted else made, key=lambda name: found[name].excess)
    error, bound = f"{found[worst].error:.3g}", f"{found[worst].bound:.3g}"
    if equal and not parted:
        message = f"equal: largest error {error} within {bound}, at '{worst}'"
    elif equal:
        message = (f"equal at the outputs: largest error {error} within {bound}; inner values of the same name differ, "
                   f"first '{parted[0]}'")
    elif parted:
        first = found[parted[0]]
        message = (f"not equal: they part at '{parted[0]}', by {first.error:.3g} where rounding explains {first.bound:.3g}; "
                   f"output '{worst}' differs by {error}")
    else:
        message = f"not equal: output '{worst}' differs by {error}, and a bound of {bound} on rounding errors is too loose to excuse it"
    if equal and apart > _unit(truth, ends)**0.5 / NEAR:
        message += f"; rounding errors grow on the way, so that outputs end apart by {apart:.2g} of the largest"
    return Verification(equal, found[worst].error, found[worst].bound, worst, message, apart)


def _in_common(a: Graph, b: Graph) -> set[str]:
    """The values that both networks make by the same op objects out of the same inputs: equal, bit for bit."""
    if a.dtype != b.dtype:
        return set()
    nodes, shared = {node.name: node for node in a.nodes}, set(b.inputs)
    for node in b.nodes:
        other = nodes.get(node.name)
        if other is not None and other.op is node.op and other.inputs == node.inputs and shared.issuperset(node.inputs):
            shared.add(node.name)
    return shared


def _ends(graph: Graph, x: Data, known: Mapping[str, Array]) -> dict[str, Array]:
    """The network's outputs, where some of its values are known already."""
    env = {**checked_inputs(graph, x), **known}
    for node in graph.nodes:
        if node.name not in env:
            env[node.name] = node.op.forward(*(env[i] for i in node.inputs))
    return {name: env[name] for name in graph.outputs}


@dataclass(frozen=True)
class _Agreement:
    """The entry of a value where the error is largest against its bound; ``excess`` is their ratio."""

    error: float
    bound: float
    excess: float
    #: Whether all errors, and whether even all bounds are near; asked of outputs only.
    near: bool = True
    sharp: bool = True


class _Side:
    """One of two networks on its way through the data, with what is known of its values.

    ``errors`` bounds the rounding errors of the values that it holds, in units of ``u`` (never below their magnitudes). ``slopes`` is one
    positive number a channel that any factorization multiplies by the channel's factor: ``|W_L| ... |W_1| s``, without biases and summed
    over taps. Nothing cancels there, so factors read off it stay sharp in any depth. Beside it stands the same times the doubt about the
    factors in it, in units of ``u``.
    """

    #: Roundings of one weight, in both networks, with those of a BatchNorm's slope.
    OF_WEIGHTS = 8.0

    def __init__(self, graph: Graph, held: dict[str, Array], u: float) -> None:
        self.graph, self.held, self.u = graph, held, u
        self.errors: dict[str, Array] = {}
        self.slopes: dict[str, Vector] = {}

    def start(self, name: str, doubt: Array | float = 0.0, unsure: Vector | float = 0.0) -> None:
        """Take the value held as it is, up to its own rounding and a doubt, and its slope with that of its factors, in units of ``u``."""
        value = self.held[name]
        size = finite_magnitude(value)
        self.errors[name] = size + doubt
        slope = _per_channel(size).astype(np.float64)
        self.slopes[name] = np.stack([slope, slope * (unsure + 1)])

    def restart(self, name: str, where: npt.NDArray[np.bool_], value: Array, doubt: Array | float = 0.0,
                unsure: Vector | float = 0.0) -> None:
        """The same with another value in the channels ``where``; the others stay as they are."""
        held, errors, slopes = self.held[name], self.errors[name], self.slopes[name]
        self.held[name] = value
        self.start(name, doubt, unsure)
        if not where.all():
            channels = along_channels(where, value.ndim - 1)
            self.held[name], self.errors[name] = np.where(channels, value, held), np.where(channels, self.errors[name], errors)
            self.slopes[name] = np.where(where, self.slopes[name], slopes)

    def reach(self, name: str) -> None:
        """Step through all nodes that this value depends on and that were not reached yet."""
        needed, todo = {name}, list[Node]()
        for node in reversed(self.graph.nodes):
            if node.name in needed and node.name not in self.errors:
                todo.append(node)
                needed.update(node.inputs)
        for node in reversed(todo):
            self.step(node)

    def step(self, node: Node) -> None:
        """The errors and slopes of a node's output, from those of its inputs."""
        name, inputs = node.name, [self.held[i] for i in node.inputs]
        with np.errstate(over="ignore", invalid="ignore"):
            errors = node.op.errors([self.errors[i] for i in node.inputs], inputs, self.held[name], self.u)
            if np.isnan(errors.max()):  # beyond overflow nothing is bounded, not even 0 * inf
                errors = np.where(np.isnan(errors), np.inf, errors)
            self.errors[name], self.slopes[name] = errors, self._slope(node)

    def _slope(self, node: Node) -> Vector:
        """The slopes of a node's output, ``(2, C)``."""
        op, read = node.op, np.concatenate([self.slopes[i] for i in node.inputs], axis=1)
        if isinstance(op, Weighted):
            weights = np.abs(op.taps()).sum(axis=3, dtype=np.float64)
            groups, out, inner = weights.shape
            s = np.einsum("goi,kgi->kgo", weights, read.reshape(2, groups, inner)).reshape(2, groups * out)
        else:  # what carries a channel of the input on has its label; all else is pinned
            labels = np.concatenate([channel_vector(self.graph.labels[i]) for i in node.inputs])
            made, order = channel_vector(self.graph.labels[node.name]), np.argsort(labels)
            index = order[np.searchsorted(labels[order], made).clip(max=len(labels) - 1)]
            s = np.where(labels[index] == made, read[:, index], [[1.0], [0.0]])
        s = np.where(np.isfinite(s) & (s > 0), s, 0.0)
        s[1] += (self.OF_WEIGHTS * isinstance(op, Weighted) + op.roundings * np.finfo(np.float64).eps / 2 / self.u) * s[0]
        return s

    def nearness(self, name: str) -> Array:
        """Which errors of a value count as near: ``sqrt(u) / 16`` of the most that a channel's last layer adds up, ``|W| |x|``, as what lies
        between passes it on, and the roundings since.

        An entry whose terms happen to cancel out is not more exact than the others for that.
        """
        terms: dict[str, Array] = {}
        since: dict[str, Array] = {}
        needed, todo = {name}, list[Node]()
        for node in reversed(self.graph.nodes):
            if node.name in needed:
                todo.append(node)
                if not _adds_up(node):
                    needed.update(node.inputs)
        with np.errstate(over="ignore", invalid="ignore"):
            for node in reversed(todo):
                op, inputs, y = node.op, [self.held[i] for i in node.inputs], self.held[node.name]
                if _adds_up(node):
                    sizes = [np.abs(v) for v in inputs]
                    terms[node.name] = op.passes(sizes, inputs, self.u) + op.rounds(inputs, y) / op.roundings
                    since[node.name] = np.zeros_like(y)
                    continue
                for i in node.inputs:
                    if i in self.graph.inputs:
                        terms[i], since[i] = np.abs(self.held[i]), np.zeros_like(self.held[i])
                terms[node.name] = op.passes([terms[i] for i in node.inputs], inputs, self.u)
                since[node.name] = op.errors([since[i] for i in node.inputs], inputs, y, self.u)
        near = _near(terms[name], self.u)
        return along_channels(near, since[name].ndim - 1) + self.u * since[name]


def _adds_up(node: Node) -> bool:
    """Whether a node is a layer whose terms its outputs are measured by; a BatchNorm belongs to the layer before it."""
    return isinstance(node.op, Weighted) and not isinstance(node.op, BatchNorm)


def _compare(a: Graph, b: Graph, truth: dict[str, Array], shared: set[str], x: Data) -> dict[str, _Agreement]:
    """Walk both networks from where their ops differ, compare at every value that they share by name, and start afresh where no more than a
    rounding is forgotten by it."""
    env = {**checked_inputs(b, x), **{name: truth[name] for name in shared}}
    u = _unit(truth, env)
    of_a, of_b = _Side(a, truth, u), _Side(b, env, u)
    for name in {*b.inputs, *(i for graph in (a, b) for node in graph.nodes if node.name not in shared for i in node.inputs if i in shared)}:
        of_a.start(name)
        of_b.start(name)
    resolved = channels(b)
    factor = np.ones(resolved.degrees_of_freedom + 1)
    uncertainty = np.full(len(factor), -1.0)  # of each factor, in units of u; negative while it is unknown
    uncertainty[0] = 0
    for name in {*shared, *b.inputs, *b.outputs}:  # inputs and outputs keep the factor 1, whatever the labels say
        uncertainty[resolved.labels[name]] = 0
    found = {}
    for node in b.nodes:
        name, labels = node.name, resolved.labels[node.name]
        if name in shared:
            continue
        env[name] = node.op.forward(*(env[i] for i in node.inputs))
        of_b.step(node)
        if a.shapes.get(name) != b.shapes[name]:
            continue
        of_a.reach(name)
        f, unsure = _factors(name, of_a, of_b, factor[labels], uncertainty[labels])
        known, new = (factor.copy(), uncertainty.copy()), uncertainty[labels] < 0
        # where several channels carry one label, the last to be written counts: the one that is surest of it
        order = np.argsort(np.where(unsure < 0, np.inf, unsure))[::-1]
        order = order[new[order]]
        factor[labels[order]], uncertainty[labels[order]] = f[order], unsure[order]
        of_value = _Against(name, of_a, of_b, factor[labels], uncertainty[labels])
        found[name] = of_value.agreement(of_a.nearness(name) if name in b.outputs else None)
        if found[name].excess > 1:
            factor, uncertainty = known  # nothing is read off values that disagree
            continue
        near = _per_channel(of_value.error) <= _near(of_value.expected, u)
        of_a.restart(name, near, truth[name])
        with np.errstate(over="ignore"):  # where it overflows it is not near
            of_b.restart(name, near, of_value.expected.astype(env[name].dtype), np.minimum(of_value.doubt, of_value.bound) / u,
                         np.maximum(uncertainty[labels], 0))
    return found


class _Against:
    """What is expected of a value with these factors; the error, the bound on it, and the part of it that is doubt about the factors."""

    def __init__(self, name: str, a: _Side, b: _Side, f: Vector, unsure: Vector) -> None:
        truth, value, u = a.held[name], b.held[name], a.u
        f, unsure = (along_channels(v, value.ndim - 1) for v in (f, np.maximum(unsure, 0)))
        with np.errstate(over="ignore", invalid="ignore"):
            self.expected = truth * f
            self.doubt = u * np.abs(self.expected) * unsure
            self.error = np.where(value == self.expected, 0, np.abs(value - self.expected))
            self.bound = u * (a.errors[name] * f + b.errors[name]) + self.doubt

    def explains(self) -> npt.NDArray[np.bool_]:
        """For each channel whether no error exceeds its bound."""
        explained: npt.NDArray[np.bool_] = (self.error <= self.bound).all(axis=(0, *range(2, self.error.ndim)))
        return explained

    def agreement(self, near: Array | None) -> _Agreement:
        """The entry where the error is largest against its bound."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            excess = np.where(self.error > 0, self.error / self.bound, 0.0)
        where = np.unravel_index(int(excess.argmax()), excess.shape)
        worst = _Agreement(float(self.error[where]), float(self.bound[where]), float(excess[where]))
        if near is None:
            return worst
        loose = _per_channel(self.bound > near) & (_per_channel(self.error) > 0)
        return replace(worst, near=bool((self.error <= near).all()), sharp=not loose.any())


def _factors(name: str, a: _Side, b: _Side, f: Vector, unsure: Vector) -> tuple[Vector, Vector]:
    """Factors a channel and their uncertainty in units of ``u``, negative where nothing is known: as known, off the weights, or off the data."""
    new = unsure < 0
    if not new.any():
        return f, unsure
    of_weights = _read_off_weights(a.slopes[name], b.slopes[name])
    f, unsure = (np.where(new, read, known) for read, known in zip(of_weights, (f, unsure), strict=True))
    unexplained = new & ~((unsure >= 0) & _Against(name, a, b, f, unsure).explains())
    if unexplained.any():
        of_data = _read_off_data(a.held[name], b.held[name], (a.errors[name], b.errors[name]), a.u)
        f, unsure = (np.where(unexplained, read, known) for read, known in zip(of_data, (f, unsure), strict=True))
    return f, unsure


def _read_off_data(a: Array, b: Array, errors: tuple[Array, Array], u: float) -> tuple[Vector, Vector]:
    """Factors ``|b| / |a|`` a channel and their uncertainty in units of ``u``, negative where a channel is 0."""
    axes = (0, *range(2, a.ndim))
    size_a, size_b, error_a, error_b = (np.abs(v).sum(axis=axes, dtype=np.float64) for v in (a, b, *errors))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        unsure = (error_a / size_a + error_b / size_b).clip(max=1 / u)  # beyond, nothing is known
    return _ratio(size_a, size_b, unsure)


def _read_off_weights(a: Vector, b: Vector) -> tuple[Vector, Vector]:
    """The same from the slopes of both walks, ``(2, C)``."""
    (size_a, doubt_a), (size_b, doubt_b) = a, b
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        unsure = doubt_a / size_a + doubt_b / size_b
    return _ratio(size_a, size_b, unsure)


def _ratio(a: Vector, b: Vector, unsure: Vector) -> tuple[Vector, Vector]:
    known = (a > 0) & (b > 0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.where(known, b / a, 1.0)
    known &= np.isfinite(ratio) & (ratio > 0) & np.isfinite(unsure)
    return np.where(known, ratio, 1.0), np.where(known, unsure, -1.0)


def _unit(*of: Mapping[str, Array]) -> float:
    """The unit roundoff of the coarsest values."""
    return max(float(np.finfo(value.dtype).eps) for values in of for value in values.values()) / 2


def _per_channel(value: npt.NDArray[T]) -> npt.NDArray[T]:
    """The largest entry of each channel, ``(C,)``."""
    largest: npt.NDArray[T] = value.max(axis=(0, *range(2, value.ndim)))
    return largest


def _near(value: Array, u: float) -> Vector:
    """What errors count as near, channel by channel; never less than of the smallest normal number."""
    near: Vector = u**0.5 / NEAR * np.maximum(_per_channel(np.abs(value)), np.finfo(value.dtype).tiny)
    return near


def _outputs(graph: Graph) -> dict[str, Shape]:
    return {name: graph.shapes[name] for name in sorted(graph.outputs)}

