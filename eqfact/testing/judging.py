"""When is an answer right? Equal to the bit, within a derived bound, or by a property, where many answers are right.

A judge is a function of the case and the answer that returns None, or says the first entry that is wrong. It computes with eqfact, never
with the implementation that is asked. The reasons read after "CASE: ".
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from eqfact.accumulators import ACCUMULATOR
from eqfact.channels import channels
from eqfact.factorization import Factorization
from eqfact.graph import Graph, values
from eqfact.ops import BatchNorm, Weighted
from eqfact.ops.base import along_channels
from eqfact.testing.adapter import expected_noise
from eqfact.testing.cases.case import Case, Json
from eqfact.testing.laws import rounding_bounds
from eqfact.testing.wire import array_of, arrays_json, arrays_of, network_of


@dataclass
class Wrong(Exception):
    """An answer that is not right: where, what was expected there, what came, and why that is wrong."""

    where: str
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}, got {self.got}"


def judge(case: Case, answer: object) -> None:
    """:class:`Wrong` if the answer is not right; :class:`ValueError` if the case names no judge of this version."""
    rule = case.expected.get("judge")
    if rule not in JUDGES:
        raise ValueError(f"case {case.id}: unknown judge {rule!r}; this eqfact has {', '.join(JUDGES)}")
    if not isinstance(answer, dict):
        raise Wrong("answer", "an object", reprlib.repr(answer))
    if "refused" in answer and rule != "refusal":
        raise Wrong("answer", "no refusal: the question is a legal one", f"refused: {answer['refused']}")
    try:
        JUDGES[rule](case, answer)
    except Wrong:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # the answer's form
        raise Wrong("answer", "the form that docs/porting.md states", f"{type(error).__name__}: {error!s:.300}") from error


def _refusal(case: Case, answer: Json) -> None:
    if not answer.get("refused"):
        raise Wrong("answer", f"a refusal, because {case.law}", reprlib.repr(answer))


def _equal(case: Case, answer: Json) -> None:
    """All that the expected answer holds, arrays to the bit or within their bound."""
    _match("", case.expected["answer"], answer, case.expected.get("within", {}))


def _match(where: str, expected: object, got: object, within: Mapping[str, float]) -> None:
    if isinstance(expected, dict) and set(expected) == {"dtype", "shape", "base64"}:
        _same(where, array_of(got), array_of(expected), within.get(where.rpartition(".")[2]))
    elif isinstance(expected, dict):
        if not isinstance(got, dict):
            raise Wrong(where or "answer", f"an object with {', '.join(expected)}", reprlib.repr(got))
        for key, value in expected.items():
            if key not in got:
                raise Wrong(f"{where}.{key}".strip("."), "to be there", f"only {', '.join(got) or 'nothing'}")
            _match(f"{where}.{key}".strip("."), value, got[key], within)
    elif type(got) is not type(expected) or got != expected:
        raise Wrong(where, repr(expected), reprlib.repr(got))


def _same(where: str, got: npt.NDArray[Any], expected: npt.NDArray[Any], within: float | npt.NDArray[np.float64] | None) -> None:
    """Equal dtype, shape and numbers (0 and -0 are one number), or numbers within a bound."""
    for what, of_got, of_expected in (("dtype", got.dtype, expected.dtype), ("shape", got.shape, expected.shape)):
        if of_got != of_expected:
            raise Wrong(where, f"{what} {of_expected}", f"{what} {of_got}")
    with np.errstate(invalid="ignore"):  # infinities that should not be there
        apart = got != expected if within is None else ~((np.abs(got.astype(np.float64) - expected) <= within) | (got == expected))
    if apart.any():
        at = tuple(int(i) for i in np.argwhere(apart)[0])
        bound = "" if within is None else f" within {float(np.broadcast_to(within, got.shape)[at]):.3g}"
        place = f"{where}{list(at)}" if at else where
        raise Wrong(place, f"{expected[at].item()!r}{bound}", f"{got[at].item()!r} ({int(apart.sum())} of {apart.size} entries are wrong)")


def _labels(case: Case, answer: Json) -> None:
    """The same channels are pinned, and the same tied, whatever their numbers."""
    if answer["degrees_of_freedom"] != case.expected["degrees_of_freedom"]:
        raise Wrong("degrees_of_freedom", repr(case.expected["degrees_of_freedom"]), reprlib.repr(answer["degrees_of_freedom"]))
    there: dict[int, int] = {0: 0}
    back: dict[int, int] = {0: 0}
    first: dict[int, str] = {}
    for value, expected in case.expected["channels"].items():
        got = answer["channels"][value]
        if not isinstance(got, list) or len(got) != len(expected) or not all(type(n) is int for n in got):
            raise Wrong(f"channels.{value}", f"{len(expected)} whole numbers", reprlib.repr(got))
        for i, (e, g) in enumerate(zip(expected, got, strict=True)):
            where = f"channels.{value}[{i}]"
            if (e == 0) != (g == 0):
                raise Wrong(where, "pinned (0)" if e == 0 else "not pinned", repr(g))
            if there.setdefault(e, g) != g:
                raise Wrong(where, f"the number of {first[e]}, {there[e]}: they share one factor", repr(g))
            if back.setdefault(g, e) != e:
                raise Wrong(where, "a number of its own: its factor is another", f"{g}, which another channel has")
            first.setdefault(e, where)


def _network(case: Case, answer: Json) -> None:
    """The network of the answer is the same function as that of the question; and its values are as the factors say."""
    given, got = network_of(case.request["network"]), network_of(answer["network"])
    _interface(given, got)
    inputs = arrays_of(case.expected["inputs"])
    before, after = values(given, inputs), values(got, inputs)
    bounds = {} if case.expected["exact"] else rounding_bounds(given, inputs)
    factors = arrays_of(case.expected.get("factors", {}))
    for name in (*given.outputs, *factors):
        if name not in after:
            raise Wrong(f"value '{name}' of the network", "to be there, as rescaling keeps all names", f"values {', '.join(after)}")
        factor = along_channels(factors[name], before[name].ndim - 1) if name in factors else 1.0
        bound = 2 * bounds[name] * factor if bounds else None
        what = "factor times the value" if name in factors else "output"
        _same(f"{what} '{name}'", after[name], (before[name] * factor).astype(before[name].dtype), bound)
    if "batchnorms" in case.expected:
        left = sorted(node.name for node in got.nodes if isinstance(node.op, BatchNorm))
        if len(left) > len(case.expected["batchnorms"]):  # fewer, if weights are copied for it
            raise Wrong("BatchNorms left", f"at most {case.expected['batchnorms']}", repr(left))


def _interface(given: Graph, got: Graph) -> None:
    for what, of_given, of_got in (("inputs", dict(given.inputs), dict(got.inputs)),
                                   ("outputs", {o: given.shapes[o] for o in given.outputs}, {o: got.shapes[o] for o in got.outputs})):
        if of_given != of_got:
            raise Wrong(f"{what} of the network", repr(of_given), repr(of_got))


def _equalized(case: Case, answer: Json) -> tuple[Graph, Factorization | None, Graph]:
    """The network given, the factors of the answer, which must be legal, and the network with them, which must be the same function."""
    given = network_of(case.request["network"])
    factors = None
    if "factors" in answer:
        try:
            factors = Factorization.of(given, arrays_of(answer["factors"]))
        except ValueError as error:
            raise Wrong("factors", "legal ones", str(error)) from error
    if "network" not in answer:
        assert factors is not None, "needs factors, or a network"
        return given, factors, factors.apply(given)
    got = network_of(answer["network"])
    _interface(given, got)
    inputs = arrays_of(case.expected["inputs"])
    before, after = values(given, inputs), values(got, inputs)
    first, second = rounding_bounds(given, inputs), rounding_bounds(got, inputs)
    for name in given.outputs:
        _same(f"output '{name}' of the network", after[name], before[name], first[name] + second[name])
    return given, factors, got


def _weights(given: Graph, got: Graph) -> dict[str, Weighted]:
    """The layers of a network by the names that they have in another; in their order, where names were changed."""
    layers = [node.name for node in given.nodes if isinstance(node.op, Weighted)]
    found = {node.name: node.op for node in got.nodes if isinstance(node.op, Weighted)}
    if set(layers) <= set(found):
        return {name: found[name] for name in layers}
    if [given[name].op.weight.shape for name in layers] != [op.weight.shape for op in found.values()]:  # type: ignore[attr-defined]
        raise Wrong("layers of the network", f"{', '.join(layers)}, by name or in this order", ", ".join(found) or "none")
    return dict(zip(layers, found.values(), strict=True))


def _factors(case: Case, answer: Json) -> None:
    """The factors are those of the formula; where only a network is given, its weights are those that they make."""
    given, factors, got = _equalized(case, answer)
    expected, relative = arrays_of(case.expected["factors"]), case.expected["relative"]
    if factors is not None:
        for name, of in expected.items():
            _same(f"factors.{name}", factors[name], of, relative * of)
        return
    made = _weights(given, Factorization.of(given, expected).apply(given))
    for name, op in _weights(given, got).items():
        bound = (relative + 8 * np.finfo(op.weight.dtype).eps) * np.abs(made[name].weight)
        _same(f"weight of '{name}'", op.weight, made[name].weight, bound)


def _balanced(case: Case, answer: Json) -> None:
    """Every free channel is made and read with weights of one range, within the bounds."""
    given, factors, got = _equalized(case, answer)
    bound, tol = case.request["max_factor"], case.expected["relative"]
    if factors is None and case.expected["bounded"]:
        raise Wrong("answer", f"factors, as some are at the bound {bound:g}, which weights do not tell", "a network alone")
    resolved = channels(given)
    made, read = (np.zeros(resolved.size) for _ in range(2))
    layers = _weights(given, got)
    for node in given.nodes:
        if not isinstance(node.op, Weighted):
            continue
        taps = np.abs(layers[node.name].taps()).max(axis=3)
        np.maximum.at(made, resolved.labels[node.name], taps.max(axis=2).reshape(-1))
        if node.op.divides:
            np.maximum.at(read, resolved.labels[node.inputs[0]], taps.max(axis=1).reshape(-1))
    f = np.ones(resolved.size) if factors is None else factors.by_label
    for value, of in resolved.labels.items():
        for i, label in enumerate(of.tolist()):
            where = f"channel {i} of '{value}'"
            if factors is not None and not 1 / bound * (1 - tol) <= f[label] <= bound * (1 + tol):
                raise Wrong(where, f"a factor within [1/{bound:g}, {bound:g}]", f"{f[label]:g}")
            if label == 0 or min(made[label], read[label]) == 0:
                if factors is not None and f[label] != 1:
                    raise Wrong(where, "the factor 1: it is pinned or dead", f"{f[label]:g}")
            elif factors is not None and not 1 / bound * (1 + tol) < f[label] < bound * (1 - tol):
                continue
            elif case.expected["balanced"] and not abs(made[label] - read[label]) <= tol * max(made[label], read[label]):
                raise Wrong(where, f"weights that range alike, as made and as read, within {tol:g} of each other",
                            f"{made[label]:g} and {read[label]:g}")


def _layer(case: Case, answer: Json) -> None:
    """Weights, bias and their steps fit each other, their numbers are near, and no sum wraps."""
    w, b = (array_of(case.request[name]).astype(np.float64) for name in ("weight", "bias"))
    grid, weights = case.request["input"], case.request["weights"]
    scale, q_w, q_b = (array_of(answer[name]) for name in ("scale", "q_w", "q_b"))
    for name, array, shape in (("scale", scale, (len(w),)), ("q_w", q_w, w.shape), ("q_b", q_b, b.shape)):
        if array.shape != shape:
            raise Wrong(name, f"shape {shape}", f"shape {array.shape}")
    s_x, z_x = float(array_of(grid["scale"])[0]), int(array_of(grid["zero_point"])[0])
    reach = max(grid["qmax"] - z_x, z_x - grid["qmin"])
    q_w, q_b = q_w.astype(np.int64), q_b.astype(np.int64)
    sums = np.abs(q_b) + reach * np.abs(q_w).sum(axis=1)
    if (sums >= ACCUMULATOR).any():
        row = int(np.argmax(sums))
        raise Wrong(f"output channel {row}", f"|q_b| + sum |q_w| max|q_x - z| below 2**31 = {ACCUMULATOR}", f"{sums[row]}")
    limit = 2 ** (weights["bits"] - 1)
    if (np.abs(q_w) > limit).any():
        raise Wrong("q_w", f"whole numbers within [-{limit}, {limit - 1}]", f"{np.abs(q_w).max()}")
    if weights.get("granularity", "per_tensor") == "per_tensor" and (scale != scale[0]).any():
        raise Wrong("scale", "one for the tensor", f"{len(set(scale.tolist()))} of them")
    off = np.abs(scale[:, None] * q_w - w) / scale[:, None]
    u = float(np.finfo(array_of(case.request["weight"]).dtype).eps)
    if (off > 0.5 + limit * u).any():
        at = tuple(int(i) for i in np.argwhere(off > 0.5 + limit * u)[0])
        raise Wrong(f"q_w{list(at)}", f"scale * q within half a step of {w[at]:g}", f"off by {off[at]:.3g} steps")
    off = np.abs(scale * s_x * q_b - b) / (scale * s_x)
    if (off > 0.5 + np.abs(q_b) * 4 * u).any():
        row = int(np.argmax(off))
        raise Wrong(f"q_b[{row}]", f"s_x * s_w * q_b within half a step of {b[row]:g}", f"off by {off[row]:.3g} steps")
    smallest = np.abs(w).max(axis=1) if weights.get("granularity") == "per_channel" else np.full(len(w), np.abs(w).max())
    minmax = smallest / (limit - 1)
    if case.expected["raised"] is False and not (np.abs(scale - minmax) <= 4 * u * minmax).all():
        row = int(np.argmax(np.abs(scale - minmax)))
        raise Wrong(f"scale[{row}]", f"{minmax[row]!r}: all sums fit, nothing is to be raised", f"{scale[row]!r}")
    if case.expected["raised"] and (scale > case.expected["most"] * minmax).any():
        row = int(np.argmax(scale / minmax))
        raise Wrong(f"scale[{row}]", f"at most {case.expected['most']:g} times that of the extrema, which is as far as the sums need it",
                    f"{scale[row] / minmax[row]:g} times")


def _noise(case: Case, answer: Json) -> None:
    """One number within a relative bound."""
    got, expected = answer["noise"], case.expected["noise"]
    if not isinstance(got, (int, float)) or not abs(got - expected) <= case.expected["relative"] * expected:
        raise Wrong("noise", f"{expected!r} within {case.expected['relative']:g} of it", reprlib.repr(got))


def _optimum(case: Case, answer: Json) -> None:
    """Legal factors within the bound, whose noise is no further from the certified bound than the gap."""
    given = network_of(case.request["network"])
    factors, bound = Factorization.of(given, arrays_of(answer["factors"])), case.request["max_factor"]
    for name in factors:
        outside = (factors[name] > bound * (1 + 1e-9)) | (factors[name] < (1 - 1e-9) / bound)
        if outside.any():
            raise Wrong(f"factors.{name}", f"within [1/{bound:g}, {bound:g}]", f"{factors[name][outside][0]:g}")
    asked = {key: value for key, value in case.request.items() if key != "max_factor"}
    noise = expected_noise(factors=arrays_json(factors), **asked)["noise"]
    least, gap = case.expected["least"], case.expected["gap"]
    if not noise <= least * (1 + gap):
        raise Wrong("noise of the factors", f"at most {1 + gap:g} times the certified bound of {least:.6g}", f"{noise:.6g}")


#: How answers are judged, by name. A new judge is a function here.
JUDGES: dict[str, Callable[[Case, Json], None]] = {
    "arrays": _equal, "refusal": _refusal, "labels": _labels, "network": _network, "factors": _factors, "balanced": _balanced,
    "layer": _layer, "noise": _noise, "optimum": _optimum,
}
