"""Are two networks the same function on data, up to rounding?

:func:`verify` runs both and compares them against the bound on rounding errors of :mod:`eqfact.roundings`. Where the two share a value by
name up to one positive factor a channel, the walk starts afresh from it: so the bound stays as sharp as one layer's, however deep the
network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from eqfact.channels import channels
from eqfact.graph import Data, Graph, Node, checked_inputs, values
from eqfact.ops.base import Array, Op, Shape, Weighted, along_channels, finite_magnitude
from eqfact.roundings import NEAR, Side, Vector, largest, near_by

#: In units of ``u``: where factors read off the weights before a layer are in more doubt than this, its bias tells them, if it has one.
#: Doubts add up from layer to layer, and products of values double them.
DOUBT = 2.0**10


@dataclass(frozen=True)
class Verification:
    """The verdict of :func:`verify`. True in a condition if the networks are equal.

    >>> net = Graph.chain((2,), fc1=Dense(np.eye(2)), act=ReLU(), fc2=Dense(np.eye(2)))
    >>> verdict = verify(net, net, np.ones((1, 2)))
    >>> bool(verdict), verdict.max_error
    (True, 0.0)
    """

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

    Both run on ``x``; the error at a value may be as large as roundings explain, by a bound in units of the unit roundoff ``u`` of the
    coarser network that every op passes on at the values held (:meth:`eqfact.ops.Op.errors`): ``|W| e`` and the roundings of
    ``|W| |x|`` through a layer, nothing through a saturated entry. Values that both make by the same op objects out of the same inputs
    are not compared. An inner value that both have by name may differ by factors, one for each channel label of ``b``, read off the
    weights, or else off the data: a witness factorization. Where channels of a value agree within the bound and are near, both walks
    start afresh from them: so a bound that has grown as large as the values hides nothing. Outputs must agree as they are, within the
    bound and near (by ``sqrt(u) / 16`` of the most that the last layer's ``|W| |x|`` comes to in their channel, as it passes through
    what is behind that layer). Inner values of the same name may have another meaning, so that they part; then outputs must have a
    bound that is as near.

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


def _compare(a: Graph, b: Graph, truth: dict[str, Array], shared: set[str], x: Data) -> dict[str, _Agreement]:
    """Walk both networks from where their ops differ, compare at every value that they share by name, and start afresh where no more than a
    rounding is forgotten by it."""
    env = {**checked_inputs(b, x), **{name: truth[name] for name in shared}}
    u = _unit(truth, env)
    of_a, of_b = Side(a, truth, u), Side(b, env, u)
    readers = (node for graph in (a, b) for node in graph.nodes if node.name not in shared)
    for name in {*b.inputs, *(i for node in readers for i in node.inputs if i in shared)}:
        for side in (of_a, of_b):
            side.start(name, _slopes(largest(finite_magnitude(side.held[name])), True))
    resolved = channels(b)
    factor = np.ones(resolved.size)
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
        if a.shapes.get(name) != b.shapes[name]:
            continue
        known, new = (factor.copy(), uncertainty.copy()), uncertainty[labels] < 0
        compared = _compared(node, of_a, of_b, factor[labels], uncertainty[labels])
        if new.any():
            f, unsure = compared.f, compared.unsure
            # where several channels carry one label, the last to be written counts: the one that is surest of it
            order = np.argsort(np.where(unsure < 0, np.inf, unsure))[::-1]
            order = order[new[order]]
            factor[labels[order]], uncertainty[labels[order]] = f[order], unsure[order]
            if not np.array_equal(factor[labels], f):
                compared = _Compared(node, of_a, of_b, factor[labels], uncertainty[labels])
        found[name] = compared.agreement(of_a.nearness(name) if name in b.outputs else None)
        if found[name].excess > 1:
            factor, uncertainty = known  # nothing is read off values that disagree
            continue
        sizes = largest(compared.size)
        near = compared.largest <= near_by(sizes, env[name].dtype, u)
        slopes = _slopes(sizes / factor[labels], uncertainty[labels] >= 0)
        of_a.restart(name, near, truth[name], slopes)
        of_b.restart(name, near, compared.expected, slopes * factor[labels], np.maximum(uncertainty[labels], 0))
    return found


def _slopes(sizes: Array, known: npt.ArrayLike) -> Vector:
    """Slopes to start from: the largest entries of the channels; where a channel is 0 but its factor known, as little as any other."""
    live = sizes[sizes > 0].astype(np.float64)
    return np.where((sizes == 0) & known, live.min() if live.size else 1.0, sizes)


class _Compared:
    """A value of two networks: what is expected of the second with these factors a channel, and how far it is off."""

    #: Roundings of a factor, and of a value times its factor.
    OF_FACTORS = 2.0

    def __init__(self, node: Node, a: Side, b: Side, f: Vector, unsure: Vector) -> None:
        self.node, self.a, self.b, self.f, self.unsure = node, a, b, f, unsure
        truth, value = a.held[node.name], b.held[node.name]
        self._axes, self._dtype = value.ndim - 1, value.dtype
        with np.errstate(over="ignore", invalid="ignore"):
            same = truth.dtype == value.dtype and (f == 1).all()
            self.expected = truth if same else (truth * self._by_channel(f)).astype(value.dtype, copy=False)
            self.error = value - self.expected
            np.abs(self.error, out=self.error)
            self.size = np.abs(self.expected)
        #: The largest error of each channel.
        self.largest = largest(self.error)
        if not np.isfinite(self.largest).all():
            self.error = np.where(value == self.expected, 0, self.error)
            self.largest = largest(self.error)

    def _by_channel(self, v: Vector) -> Array:
        """A vector against values, in their own type if it holds it."""
        with np.errstate(over="ignore"):
            own = v.astype(self._dtype)
        held = np.isfinite(own).all() and (np.abs(own) >= np.finfo(own.dtype).tiny).all()
        return along_channels(own if held else v, self._axes)

    def bounds(self) -> Iterator[Array]:
        """Bounds on the error; cheap and sharp ones first, which are less than the last: the own roundings of an op that adds up nothing,
        and the errors of the first network alone. The last are the errors of both."""
        if not isinstance(self.node.op, Weighted):
            yield self._of_rounding
        yield self._of_one
        yield self._of_both

    @property
    def _unsure(self) -> Vector:
        return np.maximum(self.unsure, 0) + self.OF_FACTORS

    @cached_property
    def _of_rounding(self) -> Array:
        return self.size * self._by_channel(self.a.u * (self._unsure + self.node.op.roundings))

    @cached_property
    def _of_one(self) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            bound: Array = self.a.errors(self.node.name) * self._by_channel(self.a.u * self.f)
            bound += self.size * self._by_channel(self.a.u * self._unsure)
        return bound

    @cached_property
    def _of_both(self) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            bound = self.a.errors(self.node.name) * along_channels(self.f, self._axes) + self.b.errors(self.node.name)
            bound = self.a.u * (bound + self.size * along_channels(self._unsure, self._axes))
        return bound

    def explained(self) -> npt.NDArray[np.bool_]:
        """For each channel whether no error exceeds its bound."""
        explained = np.zeros(len(self.f), bool)
        for bound in self.bounds():
            explained |= (self.error <= bound).all(axis=(0, *range(2, self.error.ndim)))
            if explained.all():
                break
        return explained

    def agreement(self, near: Array | None) -> _Agreement:
        """The entry where the error is largest, or exceeds its bound most."""
        for bound in self.bounds() if near is None else ():
            if (self.error <= bound).all():
                return self._at(self.error, bound)
        *_, bound = self.bounds()
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            worst = self._at(np.where((self.error > 0) & (bound < np.inf), self.error / bound, 0.0), bound)
        if near is None:
            return worst
        loose = (largest(bound - near) > 0) & (self.largest > 0)
        return replace(worst, near=bool((self.error <= near).all()), sharp=not loose.any())

    def _at(self, ranked: Array, bound: Array) -> _Agreement:
        where = np.unravel_index(int(ranked.argmax()), ranked.shape)
        error, most = float(self.error[where]), float(bound[where])
        return _Agreement(error, most, error / most if 0 < most < np.inf else np.inf if error > most else 0.0)


def _compared(node: Node, a: Side, b: Side, f: Vector, unsure: Vector) -> _Compared:
    """A value with factors as far as they are known; the others are read off the weights, or off the data."""
    new = unsure < 0
    if not new.any():
        return _Compared(node, a, b, f, unsure)
    of_weights = _read_off_weights(a.slopes(node.name), b.slopes(node.name))
    of_biases = _read_off_biases(a.graph[node.name].op, node.op, a.u)
    doubtful = (of_biases[1] >= 0) & (of_weights[1] > DOUBT)
    f, unsure = (np.where(new, np.where(doubtful, bias, weights), known)
                 for bias, weights, known in zip(of_biases, of_weights, (f, unsure), strict=True))
    compared = _Compared(node, a, b, f, unsure)
    unexplained = new & ~((unsure >= 0) & compared.explained())
    if not unexplained.any():
        return compared
    of_data = _read_off_data(a.held[node.name], b.held[node.name], (a.errors(node.name), b.errors(node.name)), a.u)
    f, unsure = (np.where(unexplained, read, known) for read, known in zip(of_data, (f, unsure), strict=True))
    return _Compared(node, a, b, f, unsure)


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


def _read_off_biases(a: Op, b: Op, u: float) -> tuple[Vector, Vector]:
    """The same from biases, which are multiplied by the factor alone; unknown where there is none."""
    if not (isinstance(a, Weighted) and isinstance(b, Weighted)) or a.bias is None or b.bias is None or a.bias.shape != b.bias.shape:
        return np.ones(1), np.full(1, -1.0)
    sizes = [np.abs(op.bias.astype(np.float64)) for op in (a, b) if op.bias is not None]
    normal = np.logical_and(*(size > np.finfo(np.float32).tiny / u for size in sizes))
    return _ratio(np.where(normal, sizes[0], 0.0), np.where(normal, sizes[1], 0.0), np.full(len(normal), Side.OF_WEIGHTS))


def _ratio(a: Vector, b: Vector, unsure: Vector) -> tuple[Vector, Vector]:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = b / a
    known = np.isfinite(ratio) & (ratio > 0) & np.isfinite(unsure)
    return np.where(known, ratio, 1.0), np.where(known, unsure, -1.0)


def _unit(*of: Mapping[str, Array]) -> float:
    """The unit roundoff of the coarsest values."""
    return max(float(np.finfo(value.dtype).eps) for values in of for value in values.values()) / 2


def _outputs(graph: Graph) -> dict[str, Shape]:
    return {name: graph.shapes[name] for name in sorted(graph.outputs)}
