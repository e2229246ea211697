"""How much of a trained network is left after quantization, method by method?

Ranges are the extrema over one half of the twenty images, without clipping; SQNR and top-1 agreement with the float network
are taken on the other half, then the halves change places. One factorization's SQNR is a matter of luck (moving its
factors by 2 % moves it by dB), so every row is measured over jitters of its factors, legal ones: all of them are the
same float network. Weights symmetric, activations affine and per tensor, ReLU6 kept exactly through per-channel clips.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import eqfact as eq
import eqfact.onnx
from benchmarks import networks, peers, results
from eqfact.correction import correct_bias
from eqfact.noise import Sensitivities, gradient_sensitivities

Array = NDArray[np.float32]
Outputs = dict[str, Array]
Samples = dict[str, list[float]]  # by quantity: "sqnr", "agreement", "accuracy"

JITTERS = 8  # for each half of the images
JITTER = 0.02  # standard deviation of log f
SMALL = 2  # images on which a peer's network is verified


@dataclass(frozen=True)
class Setting:
    """Bits of weights and of activations; None is float."""

    weights: int
    activations: int | None

    def quantizers(self, granularity: str) -> dict[str, eq.UniformQuantizer | None]:
        activations = None if self.activations is None else eq.UniformQuantizer(self.activations, symmetric=False)
        return {"weights": eq.UniformQuantizer(self.weights, granularity=granularity), "activations": activations}


SETTINGS = {"W8A8": Setting(8, 8), "W8A32": Setting(8, None), "W6A8": Setting(6, 8)}


@dataclass(frozen=True)
class Row:
    """A method of the library, or none; the granularity of the weights; and whether biases are corrected afterwards."""

    name: str
    method: str | None
    granularity: str = "per_tensor"
    corrected: bool = False
    #: Equalize what channels may reach on other images, or only what was seen; "optimal" alone asks.
    likely: bool = True


PLAIN = (
    Row("none", None),
    Row("one-step", "one_step"),
    Row("two-step", "two_step"),
    Row("cross-layer", "cross_layer"),
    Row("optimal", "optimal"),
    Row("optimal, ranges as seen", "optimal", likely=False),
    Row("per-channel", None, "per_channel"),
)
ROWS = (*PLAIN, *(replace(row, name=f"{row.name} + correction", corrected=True) for row in PLAIN))


@dataclass(frozen=True, eq=False)
class Case:
    """A folded network, one half of the images to calibrate on, the other to test on, and the float outputs there."""

    graph: eq.Graph
    calibration: Array
    test: Array
    labels: NDArray[np.int64] | None
    reference: Outputs
    #: Mean and deviation of what its BatchNorms made, by the training set.
    gaussians: dict[str, Any]
    _factorizations: dict[Any, eq.Factorization] = field(default_factory=dict)

    @cached_property
    def stats(self) -> eq.Statistics:
        return eq.calibrate(self.graph, [image[None] for image in self.calibration])

    @cached_property
    def likely(self) -> eq.Statistics:
        """What "optimal" equalizes: ranges that other images may reach, by the network's own BatchNorms where it has any."""
        return eq.likely_ranges(self.graph, self.stats, self.gaussians)

    @cached_property
    def sensitivities(self) -> Sensitivities:
        return gradient_sensitivities(self.graph, [self.calibration])

    @cached_property
    def sensitivities_around_means(self) -> Sensitivities:
        """Of what is left when the mean of the noise is corrected."""
        return gradient_sensitivities(self.graph, [self.calibration], means=self.stats)

    def factorization(self, row: Row, setting: Setting) -> eq.Factorization:
        """The factors of a row; only "optimal" looks at the setting."""
        key = (row, setting) if row.method == "optimal" else row.method
        if key not in self._factorizations:
            self._factorizations[key] = _factorize(self, row, setting)
        return self._factorizations[key]


def _factorize(case: Case, row: Row, setting: Setting) -> eq.Factorization:
    if row.method is None:
        return eq.Factorization.identity(case.graph)
    if row.method != "optimal":
        return eq.equalize(case.graph, row.method, stats=case.stats).factorization
    sensitivities = case.sensitivities_around_means if row.corrected else case.sensitivities
    method = eq.Optimal(sensitivities, case.likely if row.likely else case.stats)
    return eq.equalize(case.graph, method, stats=case.stats, **setting.quantizers(row.granularity)).factorization


# One configuration ----------------------------------------------------------------------------------------------------

def run(graph: eq.Graph, images: Array) -> Outputs:
    """All outputs by name; image by image, which keeps the values in the cache."""
    single = [eq.forward(graph, image[None]) for image in images]
    if len(graph.outputs) == 1:
        return {graph.outputs[0]: np.concatenate(single)}
    return {name: np.concatenate([answer[name] for answer in single]) for name in graph.outputs}


def regressions(outputs: Outputs) -> Outputs:
    """Without MTCNN's scores, which a softmax pushes to 0 or 1: they would hide the noise."""
    return {name: y for name, y in outputs.items() if name != "scores"}


def verdicts(outputs: Outputs) -> NDArray[np.int64]:
    """What the network decides for each image: its class; face or not; or, of features, which other image is most alike."""
    if "features" in outputs:
        unit = outputs["features"] / np.linalg.norm(outputs["features"], axis=1, keepdims=True)
        alike = unit @ unit.T
        np.fill_diagonal(alike, -np.inf)
        return alike.argmax(axis=1)
    return outputs["logits" if "logits" in outputs else "scores"].argmax(axis=1)


def jittered(f: eq.Factorization, seed: int) -> eq.Factorization:
    """The factors moved by 2 %; where the network pins them they stay 1."""
    free = f.free * np.exp(JITTER * np.random.default_rng(seed).normal(size=len(f.free)))
    free[0] = 1
    return replace(f, free=free)


def sample(case: Case, row: Row, setting: Setting, f: eq.Factorization) -> dict[str, float]:
    """SQNR in dB on the test images, and the shares of verdicts that agree with float, and with the labels."""
    graph = f.apply(case.graph)
    quantized = eq.quantize(graph, stats=f.apply(case.stats), **setting.quantizers(row.granularity))
    if row.corrected:
        quantized = correct_bias(graph, quantized, case.calibration).graph
    outputs = run(quantized, case.test)
    found = {"sqnr": eq.sqnr(regressions(case.reference), regressions(outputs)),
             "agreement": float((verdicts(outputs) == verdicts(case.reference)).mean())}
    if case.labels is not None:
        found["accuracy"] = float((verdicts(outputs) == case.labels).mean())
    return found


def samples(case: Case, row: Row, jitters: int) -> dict[str, Samples]:
    """Every setting of a row, jitter by jitter: the same jitters for all rows."""
    found: dict[str, Samples] = {}
    seeds = range(jitters if not row.corrected else max(1, jitters // 2))  # a correction takes as long as three samples
    for name, setting in SETTINGS.items():
        drawn = [sample(case, row, setting, jittered(case.factorization(row, setting), seed)) for seed in seeds]
        found[name] = {quantity: [round(one[quantity], 4) for one in drawn] for quantity in drawn[0]}
    return found


# Networks, halves and processes ---------------------------------------------------------------------------------------

@cache
def unfolded(network: str) -> eq.Graph:
    """The network as its file has it."""
    return eqfact.onnx.load(networks.networks()[network])


@cache
def original(network: str) -> eq.Graph:
    """The same, BatchNorm folded: what is equalized and quantized."""
    return eq.fold_batchnorm(unfolded(network))


@cache
def case_of(network: str, half: int, path: Path | None = None) -> Case:
    """A half of a network's images; with a path, the network in that file is measured against the original."""
    x, labels = networks.images(network)
    first, second = slice(None, len(x) // 2), slice(len(x) // 2, None)
    calibration, test = (first, second) if half == 0 else (second, first)
    graph = original(network) if path is None else of_peer(network, path)
    return Case(graph, x[calibration], x[test], None if labels is None else labels[test], run(original(network), x[test]),
                eq.batchnorm_gaussians(unfolded(network)))


def of_peer(network: str, path: Path) -> eq.Graph:
    """The network that a peer wrote; where it has renamed all values, those made by weights get the original's names back, in order."""
    truth = original(network)
    graph = eq.fold_batchnorm(eqfact.onnx.load(path, input_shapes=truth.inputs))
    theirs, ours = ([node for node in g.nodes if isinstance(node.op, (eq.Conv, eq.Dense))] for g in (graph, truth))
    inner = {node.name for node in theirs} - set(graph.outputs)
    if inner & set(truth.shapes) or [node.op.weight.shape for node in theirs] != [node.op.weight.shape for node in ours]:
        return graph
    names = {node.name: twin.name for node, twin in zip(theirs, ours, strict=True)}

    def renamed(values: Iterable[str]) -> tuple[str, ...]:
        return tuple(names.get(value, value) for value in values)

    nodes = tuple(replace(node, name=renamed([node.name])[0], inputs=renamed(node.inputs)) for node in graph.nodes)
    return eq.Graph(graph.inputs, nodes, renamed(graph.outputs))


def task(network: str, row: Row, jitters: int, path: Path | None, half: int) -> dict[str, Samples]:
    """One row on one half: what a worker process does."""
    return samples(case_of(network, half, path), row, jitters)


Mapper = Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]]


def measure(only: Sequence[str], methods: Sequence[str], chosen: Sequence[str], jitters: int = JITTERS, serial: bool = False) -> None:
    """Measure rows on networks, and peers if asked; keep and print each as soon as it is known."""
    for name in only:
        original(name)  # downloads happen once, before there are two processes
    if serial:
        measure_all(only, methods, chosen, jitters, map)
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # two processes share the cores; read when they import numpy
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        measure_all(only, methods, chosen, jitters, pool.map)


def measure_all(only: Sequence[str], methods: Sequence[str], chosen: Sequence[str], jitters: int, mapper: Mapper) -> None:
    rows = [row for row in ROWS if row.name in methods]
    for network in only:
        keep_float(network)
        for row in rows:
            measure_row(network, row, jitters, None, mapper)
        for peer in chosen:
            measure_peer(network, peer, jitters, mapper)


def measure_row(network: str, row: Row, jitters: int, path: Path | None, mapper: Mapper) -> None:
    start = time.perf_counter()
    halves = list(mapper(partial(task, network, row, jitters, path), (0, 1)))
    joined = {setting: {quantity: first + halves[1][setting][quantity] for quantity, first in halves[0][setting].items()}
              for setting in SETTINGS}
    results.keep("quality", {f"{network}: {row.name}": {"network": network, "row": row.name, "settings": joined}})
    means = "  ".join(f"{setting} {np.mean(found['sqnr']):6.2f}" for setting, found in joined.items())
    print(f"{network:20s}{row.name:28s}{means}  dB   ({time.perf_counter() - start:.0f} s)", flush=True)


def keep_float(network: str) -> None:
    """What the float network itself scores, where there are labels."""
    x, labels = networks.images(network)
    row: dict[str, Any] = {"network": network, "images": len(x), "degrees_of_freedom": eq.degrees_of_freedom(original(network))}
    if labels is not None:
        row["accuracy"] = float((verdicts(run(original(network), x)) == labels).mean())
    results.keep("float", {network: row})


def measure_peer(network: str, peer: str, jitters: int, mapper: Mapper) -> None:
    """Equalize by another tool, compare the float outputs, and measure what it wrote as our own rows are, with half the jitters."""
    answer = peers.equalize(peer, network, networks.networks()[network])
    rows = [row for row in ROWS if row.method is None and row.granularity == "per_tensor" and peers.PEERS[peer].equalizes]
    row = {"network": network, "peer": peer, **answer.as_row()}
    if answer.path is not None:
        try:
            row |= compare_float(network, answer.path)
            for plain in rows:
                named = replace(plain, name=peer + (" + correction" if plain.corrected else ""))
                measure_row(network, named, jitters if named.corrected else max(1, jitters // 2), answer.path, mapper)
        except (ValueError, TypeError) as error:
            row["failure"] = f"eqfact cannot read what it wrote: {error}"
    results.keep("peers", {f"{network}: {peer}": row})
    seconds = "" if answer.seconds is None else f" in {answer.seconds:.2f} s"
    print(f"{network:20s}{peer}{seconds}: {row.get('failure') or row['verdict']}", flush=True)


def compare_float(network: str, path: Path) -> dict[str, Any]:
    """Is what a peer wrote still the same function? Compared with the network as it was given, so that folding may round."""
    x, _ = networks.images(network)
    graph = of_peer(network, path)
    verdict = eq.verify(unfolded(network), graph, x[:SMALL])
    ratio = eq.sqnr(regressions(run(original(network), x)), regressions(run(graph, x)))
    return {"float_sqnr": ratio, "equal": verdict.equal, "verdict": verdict.message}
