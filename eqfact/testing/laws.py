"""Which laws does every equalization keep? Plain functions, each named after its law, that raise AssertionError and say where.

The law of ops, ``op.rescale(f_out, f_in).forward(f_in * x) == f_out * op.forward(x)``, and what follows from it for whole
networks (section 1 of the paper). Where all factors are powers of two the laws demand equality bit for bit; with other
factors they allow the rounding errors of both networks, by the bounds that each op states on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from eqfact.calibration import Statistics, ValueStatistics, calibrate
from eqfact.channels import channels
from eqfact.factorization import Factorization
from eqfact.graph import Data, Graph, Node, values
from eqfact.ops import Affine, Array, Clip, Extend, Normalization, Op, Sloped, Weighted
from eqfact.ops.base import Labels, along_channels

# ---------------------------------------------------------------------------------------------------------------
# One op


def rescaling_commutes_with_forward(op: Op, f_out: Array, f_in: Sequence[Array], inputs: Sequence[Array]) -> None:
    """``op.rescale(f_out, *f_in).forward(f_in * x) == f_out * op.forward(x)``, for factors that the op's trace allows."""
    name = type(op).__name__
    got = op.rescale(f_out, *f_in).forward(*(times(x, f) for x, f in zip(inputs, f_in, strict=True)))
    expected = times(op.forward(*inputs), f_out)
    bound = None
    if not powers_of_two(f_out, *f_in):
        u = unit_roundoff(expected)
        bound = u * times(op.errors([np.zeros_like(x) for x in inputs], inputs, op.forward(*inputs), u), f_out)
    same(f"{name}, rescaled, of scaled inputs against its scaled output", got, expected, bound)


def magnitude_bounds_forward(op: Op, inputs: Sequence[Array]) -> None:
    """``|op.forward(x)| <= op.magnitude(|x|)``, up to the op's own roundings."""
    y, bound = np.abs(op.forward(*inputs)), op.magnitude(*map(np.abs, inputs))
    assert y.shape == bound.shape, f"{type(op).__name__}: magnitude has shape {bound.shape}, forward {y.shape}"
    worst = np.max(y - bound * (1 + op.roundings * unit_roundoff(y)))
    assert worst <= 0, f"{type(op).__name__}: the output exceeds its magnitude bound by {worst:.3g}"


def errors_stay_within_what_passes(op: Op, inputs: Sequence[Array], errors: Sequence[Array], u: float, seed: int = 0) -> None:
    """``|op.forward(x + d) - op.forward(x)| <= u * op.passes(errors, x, u)`` for all ``|d| <= u * errors``, up to the op's own roundings.

    Tried on the ends of the interval, all entries the same way and each its own, and in between.
    """
    rng, y = np.random.default_rng(seed), op.forward(*inputs)
    bound = u * op.passes(errors, inputs, u)
    assert np.shape(bound) == y.shape, f"{type(op).__name__}: errors pass with shape {np.shape(bound)}, forward {y.shape}"
    for kind in ("up", "down", "signs", "signs", "between", "between"):
        moves = ({"up": np.ones(x.shape), "down": -np.ones(x.shape), "signs": rng.choice((-1.0, 1.0), x.shape),
                  "between": rng.uniform(-1, 1, x.shape)}[kind] for x in inputs)
        moved = [(x + u * e * move).astype(x.dtype) for x, e, move in zip(inputs, errors, moves, strict=True)]
        z = op.forward(*moved)
        own = sum(unit_roundoff(y) * op.errors([np.zeros_like(x) for x in at], at, made, unit_roundoff(y))
                  for at, made in ((inputs, y), (moved, z)))
        worst = np.max(np.abs(z - y) - bound - own)
        assert worst <= 0, f"{type(op).__name__}: inputs moved '{kind}' move the output by {worst:.3g} more than passes"


def roundings_stay_within_the_bound(op: Op, inputs: Sequence[Array]) -> None:
    """``op.forward(x)`` in float32 is that in float64 up to ``u * op.errors(0, x, y, u)``; for ops without arrays of parameters.

    The bound counts roundings relative to what is rounded: a small output of a curve is as exact as a large one.
    """
    single = [x.astype(np.float32) for x in inputs]
    y, u = op.forward(*single), unit_roundoff(single[0])
    exact = op.forward(*(x.astype(np.float64) for x in single))
    bound = u * op.errors([np.zeros_like(x) for x in single], single, y, u).astype(np.float64)
    worst = np.max(np.abs(y - exact) - bound)
    assert worst <= 0, f"{type(op).__name__}: rounding moves the output by {worst:.3g} more than the bound"


# ---------------------------------------------------------------------------------------------------------------
# Networks


def rescaling_keeps_the_function(graph: Graph, factors: Factorization, x: Data) -> None:
    """``forward(factors.apply(graph), x) == forward(graph, x)``."""
    before, after = values(graph, x), values(factors.apply(graph), x)
    bounds = {} if powers_of_two(factors.by_label) else rounding_bounds(graph, x)
    for name in graph.outputs:
        same(f"output '{name}' of the rescaled network", after[name], before[name], bounds.get(name))


def rescaling_multiplies_every_value_by_its_factor(graph: Graph, factors: Factorization, x: Data) -> None:
    """``values(factors.apply(graph), x)[v] == factors[v] * values(graph, x)[v]`` for every value ``v``."""
    before, after = values(graph, x), values(factors.apply(graph), x)
    bounds = {} if powers_of_two(factors.by_label) else rounding_bounds(graph, x)
    for name, value in before.items():
        bound = times(bounds[name], factors[name]) if bounds else None
        same(f"value '{name}' of the rescaled network against factor times value", after[name], times(value, factors[name]), bound)


def statistics_follow_the_factors(graph: Graph, factors: Factorization, x: Data) -> None:
    """``factors.apply(calibrate(graph, x)) == calibrate(factors.apply(graph), x)``, for powers of two."""
    assert powers_of_two(factors.by_label), "this law is stated for powers of two: take factors.power_of_two()"
    same_statistics(factors.apply(calibrate(graph, x)), calibrate(factors.apply(graph), x))


def shards_add_up(graph: Graph, shards: Sequence[Data]) -> None:
    """The statistics of shards, in any grouping, are those of all their values together; sums up to rounding, all else exactly."""
    runs = [values(graph, shard) for shard in shards]
    whole = Statistics({name: _direct(np.concatenate([run[name] for run in runs])) for name in runs[0]})
    same_statistics(calibrate(graph, shards), whole, roundings=len(shards))
    total = calibrate(graph, shards[-1])
    for shard in reversed(shards[:-1]):
        total = calibrate(graph, shard) + total
    same_statistics(total, whole, roundings=len(shards))


# ---------------------------------------------------------------------------------------------------------------
# The group of factorizations


def identity_changes_nothing(graph: Graph) -> None:
    """The identity returns the same parameters, and the very same ops."""
    identity = Factorization.identity(graph)
    for before, after in zip(graph.nodes, identity.apply(graph).nodes, strict=True):
        assert after.op is before.op, f"the identity copies the op of node '{before.name}'"
    same_factors(identity, identity.inverse())
    same_factors(identity, identity @ identity)


def identity_is_neutral(graph: Graph, a: Factorization) -> None:
    """``a @ 1 == a == 1 @ a``."""
    identity = Factorization.identity(graph)
    same_factors(a @ identity, a)
    same_factors(identity @ a, a)


def inverse_undoes(graph: Graph, a: Factorization) -> None:
    """``a @ a.inverse() == 1`` and ``a.inverse().apply(a.apply(graph)) == graph``, for powers of two."""
    assert powers_of_two(a.by_label), "this law is stated for powers of two: take a.power_of_two()"
    same_factors(a @ a.inverse(), Factorization.identity(graph))
    same_factors(a.inverse() @ a, Factorization.identity(graph))
    same_network(a.inverse().apply(a.apply(graph)), graph)


def composition_is_associative_and_commutes(a: Factorization, b: Factorization, c: Factorization) -> None:
    """``(a @ b) @ c == a @ (b @ c)`` and ``a @ b == b @ a``, for powers of two."""
    assert powers_of_two(a.by_label, b.by_label, c.by_label), "this law is stated for powers of two: take a.power_of_two()"
    same_factors((a @ b) @ c, a @ (b @ c))
    same_factors(a @ b, b @ a)


def composition_applies_in_turn(graph: Graph, a: Factorization, b: Factorization) -> None:
    """``(a @ b).apply(graph) == a.apply(b.apply(graph))``, for powers of two."""
    assert powers_of_two(a.by_label, b.by_label), "this law is stated for powers of two: take a.power_of_two()"
    same_network((a @ b).apply(graph), a.apply(b.apply(graph)))


# ---------------------------------------------------------------------------------------------------------------
# Labels: who moves, who does not


def no_channel_moves_alone(graph: Graph) -> None:
    """A factor other than 1 is refused for a pinned channel, and two factors for two channels of one label."""
    labels = channels(graph).labels
    carriers: dict[int, list[tuple[str, int]]] = {}
    for value, of_value in labels.items():
        for channel, label in enumerate(of_value.tolist()):
            carriers.setdefault(label, []).append((value, channel))
    ones = {value: np.ones(len(of_value)) for value, of_value in labels.items()}
    for value, channel in carriers.get(0, ()):
        _refused(graph, {value: _doubled(ones[value], channel)}, f"pinned channel {channel} of '{value}'")
    for label, ((value, channel), *others) in carriers.items():
        for other, mate in others if label else ():
            alone = {other: ones[other], value: _doubled(ones[value], channel)}  # one dict entry if both are the same value
            _refused(graph, alone, f"channel {channel} of '{value}' without channel {mate} of '{other}'")


def every_free_label_is_free(graph: Graph, x: Data) -> None:
    """Each label by itself may take another factor: the function stays, bit for bit."""
    identity = Factorization.identity(graph)
    for number in range(1, identity.channels.degrees_of_freedom + 1):
        rescaling_keeps_the_function(graph, Factorization(identity.channels, _doubled(identity.free, number)), x)


def every_pin_is_needed(graph: Graph, x: Data) -> None:
    """Doubling a pinned channel, with all that is tied to it, changes an output: rescaling alone cannot make up for it.

    For networks all of whose values matter to an output. A channel that no weight makes or reads has nothing to double.
    """
    before, labels, classes = values(graph, x), channels(graph).labels, tie_classes(graph)
    pinned = {int(c) for value in labels for c in classes[value][labels[value] == 0]}
    for root in sorted(pinned):
        factors = {value: np.where(of_value == root, 2.0, 1.0) for value, of_value in classes.items()}
        if not any(isinstance(n.op, Weighted) and any(np.any(factors[v] != 1) for v in (n.name, *n.inputs)) for n in graph.nodes):
            continue
        after = values(naively_rescaled(graph, factors), x)
        where = [f"'{v}'" for v, f in factors.items() if np.any(f != 1)]
        assert any(not np.array_equal(after[name], before[name]) for name in graph.outputs), (
            f"channels of {', '.join(where)} are pinned, but doubling them changes no output")


def degrees_of_freedom_are_maximal(graph: Graph, x: Data) -> None:
    """As many factors are free as the equations of the law leave free: counted as the nullity of their Jacobian.

    One unknown ``log f`` for every channel of every value; the equations say that every op, rescaled, maps multiplied
    inputs to the multiplied output, that an op keeps one set of weights wherever it is used, and that inputs and outputs
    stay. For float64 networks on data that moves every channel.
    """
    every = values(graph, x)
    assert all(v.dtype == np.float64 for v in every.values()), "this law is checked in float64"
    sizes = [v.shape[1] for v in every.values()]
    start = dict(zip(every, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
    unknowns = np.eye(sum(sizes))
    held = {*graph.inputs, *graph.outputs}
    rows, first_use = [], dict[int, Node]()
    for node in graph.nodes:
        first = first_use.setdefault(id(node.op), node) if isinstance(node.op, Weighted) else node
        rows.append(_jacobian(node, first, every, start, sum(sizes)))
    rows += [unknowns[start[name]:start[name] + every[name].shape[1]] for name in sorted(held)]
    singular = np.linalg.svd(np.concatenate(rows), compute_uv=False)
    nullity = sum(sizes) - int(np.sum(singular > 1e-7 * singular[0]))
    counted = channels(graph).degrees_of_freedom
    assert counted == nullity, f"{counted} factors are called free, the equations leave {nullity} free"


# ---------------------------------------------------------------------------------------------------------------
# Helpers: comparison


def powers_of_two(*factors: Array) -> bool:
    """Whether all factors are powers of two, so that nothing is rounded."""
    return all(np.all(np.frexp(f)[0] == 0.5) for f in factors)


def times(x: Array, f: Array) -> Array:
    """``f * x`` along the channels of ``(N, C, *spatial)``, in the dtype of ``x``."""
    result: Array = (x * along_channels(np.asarray(f), x.ndim - 1)).astype(x.dtype)
    return result


def unit_roundoff(x: Array) -> float:
    """Largest relative error of one rounding in the dtype of ``x``."""
    return float(np.finfo(x.dtype).eps) / 2


def same(what: str, got: Array, expected: Array, bound: Array | None = None) -> None:
    """Equal dtype, shape and bits; or, with a bound, entries that differ by no more than it."""
    assert got.dtype == expected.dtype, f"{what}: dtype {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    apart = _bits(got) != _bits(expected) if bound is None else ~(np.abs(got.astype(np.float64) - expected) <= bound)
    if apart.any():
        where = tuple(int(i) for i in np.argwhere(apart)[0])
        allowed = "" if bound is None else f" within {bound[where]:.3g}"
        raise AssertionError(f"{what}: {int(apart.sum())} of {apart.size} entries differ, "
                             f"first at {where}: {float(got[where])!r}, expected {float(expected[where])!r}{allowed}")


def same_network(got: Graph, expected: Graph) -> None:
    """The same nodes with equal parameters (one bound for all channels equals the same bound for each)."""
    assert got.outputs == expected.outputs and dict(got.inputs) == dict(expected.inputs), "inputs or outputs differ"
    for a, b in zip(got.nodes, expected.nodes, strict=True):
        assert (a.name, a.inputs, type(a.op)) == (b.name, b.inputs, type(b.op)), f"node '{a.name}' differs from node '{b.name}'"
        for key, value in _parameters(b.op).items():
            assert np.all(np.equal(_parameters(a.op)[key], value)), (
                f"node '{a.name}': {key} is {_parameters(a.op)[key]}, expected {value}")


def same_factors(got: Factorization, expected: Factorization) -> None:
    """Equal factors for the same values."""
    assert list(got) == list(expected), f"values differ: {sorted(set(got) ^ set(expected))}"
    for value, f in expected.items():
        assert np.array_equal(got[value], f), f"factors of '{value}' are {got[value]}, expected {f}"


def same_statistics(got: Statistics, expected: Statistics, roundings: int = 0) -> None:
    """Equal statistics for the same values; the sums may differ by so many roundings of ``count`` terms."""
    assert list(got) == list(expected), f"values differ: {sorted(set(got) ^ set(expected))}"
    for value, of in expected.items():
        assert got[value].count == of.count, f"count of '{value}' is {got[value].count}, expected {of.count}"
        for key in ("min", "max", "sum", "sum_square"):
            a, b = getattr(got[value], key) + 0.0, getattr(of, key) + 0.0  # the sign of a zero does not matter here
            bound = None
            if roundings and key.startswith("sum"):
                largest = np.square(of.max_abs) if key == "sum_square" else of.max_abs
                bound = (roundings + of.count) * unit_roundoff(b) * of.count * largest
            same(f"{key} of '{value}'", a, b, bound)
        counted, wanted = got[value].histogram, of.histogram
        for key in ("top", "unit", "counts") if counted is not None and wanted is not None else ():
            same(f"{key} of the histogram of '{value}'", getattr(counted, key), getattr(wanted, key))


def rounding_bounds(graph: Graph, x: Data, more: Callable[[Node, Sequence[Array]], Array | float] = lambda node, inputs: 0.0) -> dict[str,
    Array]:
    """For every value a bound on what rounding may do to it in two equivalent networks: no errors at the inputs, passed on by every op.

    ``more`` are roundings of a node beyond those of its op, in units of the unit roundoff.
    """
    every = values(graph, x)
    u = max(map(unit_roundoff, every.values()))
    errors = {name: np.zeros_like(every[name]) for name in graph.inputs}
    for node in graph.nodes:
        inputs = [every[i] for i in node.inputs]
        errors[node.name] = node.op.errors([errors[i] for i in node.inputs], inputs, every[node.name], u) + more(node, inputs)
    return {name: u * e.astype(np.float64) for name, e in errors.items()}


# ---------------------------------------------------------------------------------------------------------------
# Helpers: what happens without labels


def naively_rescaled(graph: Graph, factors: Mapping[str, Array]) -> Graph:
    """Rescale weights and limits only, whatever the labels say: what an equalization without pins and ties would do."""
    return graph.with_ops({node.name: _naive(node.op, factors[node.name], [factors[i] for i in node.inputs]) for node in graph.nodes})


def tie_classes(graph: Graph) -> dict[str, Labels]:
    """For every value a number per channel, equal for channels that ties join, pins left aside; by merging until nothing moves."""
    root = np.arange(graph.traced.size, dtype=np.int64)
    while True:
        before = root.copy()
        for a, b in graph.traced.ties:
            for i, j in zip(root[a].tolist(), root[b].tolist(), strict=True):
                root[root == max(i, j)] = min(i, j)
        if np.array_equal(before, root):
            break
    return {name: root[full.reshape(len(full), -1)[:, 0]] for name, full in graph.labels.items()}


def _naive(op: Op, f_out: Array, f_in: Sequence[Array]) -> Op:
    if isinstance(op, Normalization):  # eps takes up the mean factor of the channels normalised together
        s = np.exp(np.log(f_in[0]).reshape(op.norm_groups, -1).mean(axis=1))
        beta = None if op.beta is None else op.beta * f_out
        return dataclasses.replace(op, gamma=op.gamma * f_out, beta=beta, eps=op.eps * s**2)  # type: ignore[type-var]
    if isinstance(op, Weighted):
        return op.rescale(f_out, *f_in)
    if isinstance(op, Clip):
        return dataclasses.replace(op, low=op.low * f_out, high=op.high * f_out)
    if isinstance(op, Sloped):
        return dataclasses.replace(op, slope=op.slope / f_out)
    if isinstance(op, Affine):
        return dataclasses.replace(op, shift=op.shift * along_channels(np.asarray(f_out), op.shift.ndim))
    if isinstance(op, Extend):
        count = len(op.constant)
        own = f_out if op.axis else f_out[:count] if op.front else f_out[-count:]
        return dataclasses.replace(op, constant=op.constant * along_channels(np.asarray(own), op.constant.ndim))
    return op


def _jacobian(node: Node, first: Node, every: Mapping[str, Array], start: Mapping[str, int], width: int) -> Array:
    """Derivatives of one node's equation ``op'(f_in x) = f_out op(x)``; ``op'`` is what the op's first use makes of it."""
    read = [every[name] for name in node.inputs]
    made = node.op.forward(*read)

    def residual(factor: Mapping[str, Array]) -> Array:
        op = _naive(node.op, factor[first.name], [factor[name] for name in first.inputs])
        scaled_inputs = (times(v, factor[name]) for name, v in zip(node.inputs, read, strict=True))
        difference: Array = (op.forward(*scaled_inputs) - times(made, factor[node.name])).ravel()
        return difference

    names = list(dict.fromkeys((node.name, *node.inputs, first.name, *first.inputs)))
    ones = {name: np.ones(every[name].shape[1]) for name in names}
    step, jacobian = 1e-5, np.zeros((made.size, width))
    for name in names:
        for channel in range(len(ones[name])):
            up, down = ones[name].copy(), ones[name].copy()
            up[channel], down[channel] = np.exp(step), np.exp(-step)
            slope = residual({**ones, name: up}) - residual({**ones, name: down})
            jacobian[:, start[name] + channel] = slope / (2 * step)
    normalised: Array = jacobian / max(float(np.abs(made).max()), np.finfo(np.float64).tiny)
    return normalised


def _direct(value: Array) -> ValueStatistics:
    of = np.moveaxis(value, 1, 0).reshape(value.shape[1], -1).astype(np.float64)
    return ValueStatistics(of.shape[1], of.min(axis=1), of.max(axis=1), of.sum(axis=1), (of**2).sum(axis=1))


def _doubled(factors: Array, index: int) -> Array:
    result = factors.copy()
    result[index] = 2
    return result


def _refused(graph: Graph, factors: Mapping[str, Array], what: str) -> None:
    try:
        Factorization.of(graph, factors)
    except ValueError as error:
        assert any(f"'{value}'" in str(error) for value in factors), f"the refusal of {what} names no value: {error}"
    else:
        raise AssertionError(f"a factor is accepted for {what}")


def _bits(x: Array) -> Any:
    return np.ascontiguousarray(x).view({2: np.uint16, 4: np.uint32, 8: np.uint64}[x.dtype.itemsize])


def _parameters(op: Op) -> dict[str, Any]:
    return {f.name: getattr(op, f.name) for f in dataclasses.fields(op)}  # type: ignore[arg-type]  # ops are dataclasses
