"""What is left to correct once a network is equalized and quantized? The mean of the error, and biases that waste range.

Rounded weights shift the mean of every channel by ``E[(W_q - W) x]``. *Iterative* correction measures that shift, layer by layer, with all
earlier layers already quantized and corrected; the *analytic* one computes it from BatchNorm statistics; *high-bias absorption*
moves what a ReLU never cuts off into the next bias (PAPER 7). The first two change biases only; the third is not exact
and says how often its assumption fails.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

from eqfact.factorization import Factorization
from eqfact.graph import Data, Graph, Node, values, walk
from eqfact.ops.base import Array, Commuting, Op, Weighted, along_channels
from eqfact.ops.elementwise import Clip, Identity, ReLU
from eqfact.ops.joining import Add, Concat, Flatten
from eqfact.ops.space import AvgPool, GlobalAvgPool
from eqfact.ops.weighted import BatchNorm, Conv
from eqfact.quantization import rounded_bias

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Correction:
    """A corrected network, and what was changed: the shift of the bias ``(C,)`` of every node that got one."""

    graph: Graph
    shifts: Mapping[str, Vector]
    message: str


def correct_bias(graph: Graph, quantized: Graph, batch: Data) -> Correction:
    """Iterative bias correction: ``b += mean(y_float - y_quantized)``, in dependency order, on one batch (PAPER 7).

    ``quantized`` is :func:`eqfact.quantize` of ``graph``; both run on the batch side by side, every layer of the second with all before it
    already corrected. Layers that share their weights, and BatchNorms, are left as they are.

    >>> net = Graph.chain((1,), fc=Dense(np.array([[1.0], [0.3]])))
    >>> q = quantize(net, weights=UniformQuantizer(2))
    >>> correct_bias(net, q, np.array([[1.0], [3.0]])).graph["fc"].op.bias
    array([0. , 0.6])
    """
    uses = _uses(quantized)
    truth = _Lagging(walk(graph, batch))
    shifts: dict[str, Vector] = {}
    ops: dict[str, Op] = {}
    left: list[str] = []
    env = dict(_inputs(quantized, batch))
    last = {name: node.name for node in quantized.nodes for name in node.inputs}
    for node in quantized.nodes:
        inputs = [env[i] for i in node.inputs]
        y = node.op.forward(*inputs)
        if _correctable(node, uses):
            reference = truth[_float_name(node.name, graph)]
            axes = (0, *range(2, y.ndim))
            shift = reference.mean(axis=axes, dtype=np.float64) - y.mean(axis=axes, dtype=np.float64)
            ops[node.name], shifts[node.name] = _shifted(quantized, node, shift)
            y = y + along_channels(shifts[node.name], y.ndim - 1).astype(y.dtype)
        elif isinstance(node.op, Weighted) and not isinstance(node.op, BatchNorm):
            left.append(node.name)
        env[node.name] = y
        for name in dict.fromkeys(node.inputs):
            if last[name] == node.name:
                del env[name]
    return Correction(quantized.with_ops(ops), shifts, _message("measured", shifts, left))


def correct_bias_analytically(graph: Graph, quantized: Graph, gaussians: Mapping[str, tuple[Vector, Vector]]) -> Correction:
    """Data-free bias correction: ``b -= (W_q - W) E[x]``, with the means of activations from those before them (PAPER 7).

    ``gaussians`` gives mean and standard deviation ``(C,)`` of values taken to be normal, as :func:`batchnorm_gaussians` reads them
    off the unfolded network. Layers whose input has no known mean stay as they are.
    """
    means = _expectations(graph, gaussians)
    uses = _uses(quantized)
    shifts: dict[str, Vector] = {}
    ops: dict[str, Op] = {}
    left: list[str] = []
    for node in quantized.nodes:
        if not isinstance(node.op, Weighted) or isinstance(node.op, BatchNorm):
            continue
        name = _float_name(node.name, graph)
        before = graph[name]
        mean = means.get(before.inputs[0])
        if mean is None or not _correctable(node, uses):
            left.append(node.name)
            continue
        assert isinstance(before.op, Weighted)
        change = (node.op.taps().astype(np.float64) - before.op.taps()).sum(axis=3)
        groups, _, inner = change.shape
        ops[node.name], shifts[node.name] = _shifted(quantized, node, -(change @ mean.reshape(groups, inner, 1)).reshape(-1))
    return Correction(quantized.with_ops(ops), shifts, _message("computed", shifts, left))


def batchnorm_gaussians(graph: Graph, factorization: Factorization | None = None) -> dict[str, tuple[Vector, Vector]]:
    """Mean ``beta`` and standard deviation ``|gamma|`` of what every BatchNorm of an unfolded network makes, rescaled if asked.

    Folding keeps the names of these values, so the result describes the folded network too.
    """
    found: dict[str, tuple[Vector, Vector]] = {}
    for node in graph.nodes:
        if isinstance(node.op, BatchNorm):
            f = np.ones(len(node.op.gamma)) if factorization is None else factorization[node.name]
            mean, deviation = node.op.beta.astype(np.float64) * f, np.abs(node.op.gamma).astype(np.float64) * f
            found[node.name] = (mean, deviation)
    return found


def absorb_high_bias(graph: Graph, low: Mapping[str, Vector], batches: Iterable[Data]) -> Correction:
    """Move ``c = max(0, low)`` from the bias before a ReLU into the bias of the layer behind it (PAPER 7). **Not exact.**

    ``low`` bounds values before their activation from below, ``(C,)`` by name: ``beta - 3 |gamma|``, or the smallest value seen. Where
    the value lies below ``c`` the network changes; how often that happens on ``batches`` is said. Done where a layer feeds one ReLU
    (or Clip from 0), that one layer without padding; anything else is left.
    """
    readers, uses = graph.readers, _uses(graph)
    ops: dict[str, Op] = {}
    shifts: dict[str, Vector] = {}
    for node in graph.nodes:
        if node.name not in low or not _correctable(node, uses) or node.name in graph.outputs or len(readers[node.name]) != 1:
            continue
        (act,) = readers[node.name]
        if act.name in graph.outputs or len(readers[act.name]) != 1 or not _cuts_at_zero(act.op):
            continue
        (reader,) = readers[act.name]
        if not _correctable(reader, uses) or (isinstance(reader.op, Conv) and np.any(reader.op.padding)):
            continue
        c = np.maximum(low[node.name], 0)
        if isinstance(act.op, Clip):
            c = np.minimum(c, np.broadcast_to(act.op.high, c.shape))
        if not c.any():
            continue
        maker, behind = (ops.get(n.name, n.op) for n in (node, reader))
        assert isinstance(maker, Weighted) and isinstance(behind, Weighted)
        ops[node.name] = _with_bias(maker, -c)
        taps = behind.taps().astype(np.float64).sum(axis=3)
        ops[reader.name] = _with_bias(behind, (taps @ c.reshape(len(taps), -1, 1)).reshape(-1))
        if isinstance(act.op, Clip):
            ops[act.name] = replace(act.op, low=np.zeros_like(c), high=np.broadcast_to(act.op.high, c.shape) - c)
        shifts[node.name] = -c
    failed = seen = 0
    for batch in batches:
        for name, value in walk(graph, batch):
            if name in shifts:
                moved = np.flatnonzero(shifts[name])
                below = value[:, moved] < along_channels(-shifts[name][moved], value.ndim - 1)
                failed, seen = failed + int(below.sum()), seen + below.size
    share = f"{100 * failed / seen:.3g} % of the entries seen lie below what was absorbed" if seen else "nothing was absorbed"
    return Correction(graph.with_ops(ops), shifts, f"absorbed biases of {len(shifts)} layers, not exactly: {share}")


class _Lagging:
    """Values of a walk by name, computed up to the one that is asked for, and handed out once."""

    def __init__(self, of: Iterator[tuple[str, Array]]) -> None:
        self.of, self.known = of, dict[str, Array]()

    def __getitem__(self, name: str) -> Array:
        while name not in self.known:
            found, value = next(self.of)
            self.known[found] = value
        value = self.known[name]
        self.known.clear()
        return value


def _inputs(graph: Graph, batch: Data) -> Iterator[tuple[str, Array]]:
    for name, value in walk(graph, batch):
        if name not in graph.inputs:
            return
        yield name, value


def _uses(graph: Graph) -> Counter[int]:
    return Counter(id(node.op) for node in graph.nodes)


def _correctable(node: Node, uses: Counter[int]) -> bool:
    return isinstance(node.op, Weighted) and not isinstance(node.op, BatchNorm) and uses[id(node.op)] == 1


def _float_name(name: str, graph: Graph) -> str:
    """The float network's name of what a node of the quantized one computes."""
    return name if name in graph.shapes else name.removesuffix(".float")


def _with_bias(op: Weighted, shift: Vector) -> Weighted:
    bias = shift if op.bias is None else op.bias + shift
    return replace(op, bias=bias.astype(op.weight.dtype))  # type: ignore[type-var]  # every final op is a dataclass


def _shifted(quantized: Graph, node: Node, shift: Vector) -> tuple[Op, Vector]:
    """The op with its bias shifted, on the bias' grid if it has one, and the shift that came out."""
    assert isinstance(node.op, Weighted)
    op = rounded_bias(quantized, node, _with_bias(node.op, shift))
    assert op.bias is not None
    return op, op.bias.astype(np.float64) - (0 if node.op.bias is None else node.op.bias)


def _message(how: str, shifts: Mapping[str, Vector], left: list[str]) -> str:
    largest = max(shifts, key=lambda name: float(np.abs(shifts[name]).max()), default=None)
    said = f"{how} shifts corrected in {len(shifts)} layers"
    if largest is not None:
        said += f", the largest by {float(np.abs(shifts[largest]).max()):.3g} at '{largest}'"
    return said + (f"; left as they are: {', '.join(left)}" if left else "")


def _cuts_at_zero(op: Op) -> bool:
    return isinstance(op, ReLU) or (isinstance(op, Clip) and not np.any(op.low))


def _expectations(graph: Graph, gaussians: Mapping[str, tuple[Vector, Vector]]) -> dict[str, Vector]:
    """The means of all values that follow from normal ones through activations, sums, means and moves."""
    means = {name: np.asarray(mean, np.float64) for name, (mean, _) in gaussians.items()}
    for node in graph.nodes:
        known = [means.get(i) for i in node.inputs]
        if node.name in means or any(mean is None for mean in known):
            continue
        given = [mean for mean in known if mean is not None]
        if isinstance(node.op, (ReLU, Clip)) and node.inputs[0] in gaussians:
            low, high = (0.0, np.inf) if isinstance(node.op, ReLU) else (node.op.low, node.op.high)
            means[node.name] = clipped_normal_mean(*gaussians[node.inputs[0]], low, high)
        elif isinstance(node.op, Add):
            means[node.name] = np.sum(given, axis=0)
        elif isinstance(node.op, Flatten):
            means[node.name] = np.repeat(given[0], graph.shapes[node.name][0] // len(given[0]))
        elif isinstance(node.op, (AvgPool, GlobalAvgPool, Identity, Concat)):
            assert isinstance(node.op, Commuting)
            means[node.name] = node.op.carry(*given)
    return means


def clipped_normal_mean(mean: Vector, deviation: Vector, low: float | Array, high: float | Array) -> Vector:
    """``E[min(max(x, low), high)]`` for normal ``x``; all arguments ``(C,)`` or numbers.

    >>> clipped_normal_mean(np.zeros(1), np.ones(1), 0.0, np.inf).round(4)  # 1 / sqrt(2 pi)
    array([0.3989])
    """
    mean, deviation, low, high = np.broadcast_arrays(*(np.asarray(v, np.float64) for v in (mean, deviation, low, high)))
    safe = np.where(deviation > 0, deviation, 1.0)
    a, b = (low - mean) / safe, (high - mean) / safe
    density_a, density_b = (np.exp(-(t**2) / 2) / np.sqrt(2 * np.pi) for t in (a, b))
    below = np.where(np.isfinite(low), low, 0.0) * ndtr(a)
    above = np.where(np.isfinite(high), high, 0.0) * ndtr(-b)
    inside = mean * (ndtr(b) - ndtr(a)) + safe * (density_a - density_b)
    return np.where(deviation > 0, below + inside + above, np.clip(mean, low, high))
