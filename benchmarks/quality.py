"""How much of a trained network is left after quantization, method by method, and how much was expected?

Ranges, sensitivities and corrections come from the ten plain images of one half of the twenty, without clipping; SQNR and top-1 agreement
with the float network from random crops of the other half; then the halves change places. One factorization's SQNR is a matter of luck
(moving its factors by 2 % moves it by dB), so rows are measured over jitters of their factors, legal ones: all of them are the same float
network. Weights symmetric, activations affine and per tensor, ReLU6 kept exactly through per-channel clips. `draw` shows all rows, expected
against measured.
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

JITTERS = 2  # for each half of the images; half as many for rows that take longer
JITTER = 0.02  # standard deviation of log f
SMALL = 2  # images on which a peer's network is verified
CROPS = 2  # of each test image
#: Of this network's noise one crop in ten has a hundred times as much as the median: fewer would measure which crops these were.
MORE_CROPS = {"nsfw_inception_v3": 6}
#: Biases alone are trained on these, on crops of the calibration half, one half only.
TRAINED = ("mobilenetv2", "dogs_mobilenetv2", "efficientnet_lite0")
STEPS, BATCH, TRAINING_CROPS, RATE = 40, 4, 8, 0.1
FIGURE = results.DOCS / "predicted.svg"


@dataclass(frozen=True)
class Setting:
    """Bits of weights and of activations; None is float."""

    weights: int
    activations: int | None

    def quantizers(self, granularity: str) -> dict[str, eq.UniformQuantizer | None]:
        activations = None if self.activations is None else eq.UniformQuantizer(self.activations, symmetric=False)
        return {"weights": eq.UniformQuantizer(self.weights, granularity=granularity), "activations": activations}


SETTINGS = {"W8A8": Setting(8, 8), "W6A8": Setting(6, 8)}


@dataclass(frozen=True)
class Row:
    """A method of the library, or none; the granularity of the weights; and what is done to the biases afterwards."""

    name: str
    method: str | None
    granularity: str = "per_tensor"
    #: Measured with weights of 6 bits, too.
    main: bool = False
    corrected: bool = False
    trained: bool = False
    #: "cross_layer": with its bound on biases.
    guarded: bool = True
    #: "optimal": with its ridge; with sensitivities from gradients, or from statistics alone.
    ridge: bool = True
    gradients: bool = True

    @property
    def key(self) -> Row:
        """The row whose factors these are."""
        around_means = self.corrected and self.method == "optimal" and self.gradients
        return replace(self, name="", main=False, trained=False, corrected=around_means,
                       granularity=self.granularity if self.method == "optimal" else "")


PLAIN = (
    Row("none", None, main=True),
    Row("one-step", "one_step"),
    Row("two-step", "two_step"),
    Row("cross-layer", "cross_layer", main=True),
    Row("cross-layer without its guard", "cross_layer", guarded=False),
    Row("optimal", "optimal", main=True),
    Row("optimal without ridge", "optimal", ridge=False),
    Row("optimal from statistics alone", "optimal", ridge=False, gradients=False),  # as `equalize` does without data
    Row("per-channel", None, "per_channel", main=True),
    Row("per-channel optimal", "optimal", "per_channel", main=True),
    Row("per-channel optimal without ridge", "optimal", "per_channel", ridge=False),
)
CORRECTED = tuple(replace(row, name=f"{row.name} + correction", corrected=True) for row in PLAIN)
TRAINING = tuple(replace(row, name=f"{row.name} + trained biases", trained=True)
                 for row in PLAIN if row.name in ("none", "cross-layer", "optimal"))
ROWS = (*PLAIN, *CORRECTED, *TRAINING)


@dataclass(frozen=True, eq=False)
class Case:
    """A folded network, one half of the images to calibrate on, crops of the other to test on, and the float outputs there."""

    graph: eq.Graph
    calibration: Array
    test: Array
    reference: Outputs
    #: Mean and deviation of what its BatchNorms made, by the training set.
    gaussians: dict[str, Any]
    training: Array
    #: Crops of each test image, one behind the other.
    each: int = 1
    _factorizations: dict[Any, eq.Factorization] = field(default_factory=dict)
    _models: dict[Any, eq.NoiseModel] = field(default_factory=dict)

    @cached_property
    def stats(self) -> eq.Statistics:
        return eq.calibrate(self.graph, [image[None] for image in self.calibration], histograms=False)

    @cached_property
    def likely(self) -> eq.Statistics:
        """What `eqfact equalize` equalizes: ranges that other images may reach, by the network's own BatchNorms where it has any."""
        return eq.likely_ranges(self.graph, self.stats, self.gaussians)

    @cached_property
    def sensitivities(self) -> Sensitivities:
        """As the default call takes them: each output relative to its power."""
        return gradient_sensitivities(self.graph, [self.calibration], relative_to=self.stats)

    @cached_property
    def sensitivities_around_means(self) -> Sensitivities:
        """Of what is left when the mean of the noise is corrected."""
        return gradient_sensitivities(self.graph, [self.calibration], means=self.stats, relative_to=self.stats)

    @cached_property
    def of_statistics(self) -> Sensitivities:
        return eq.forward_sensitivities(self.graph, self.stats)

    @cached_property
    def expecting(self) -> dict[bool, Sensitivities]:
        """What predicts the SQNR that is measured, without and with correction: that of all outputs together, scores left out."""
        if len(self.graph.outputs) == 1:
            return {False: self.sensitivities, True: self.sensitivities_around_means}
        graph = replace(self.graph, outputs=tuple(regressions(self.reference)))
        return {corrected: gradient_sensitivities(graph, [self.calibration], means=self.stats if corrected else None)
                for corrected in (False, True)}

    def expected(self, row: Row, setting: Setting, f: eq.Factorization) -> float:
        """SQNR in dB by the noise model, for the ranges seen; as if a correction took away the mean of all errors."""
        key = (row.granularity, row.corrected, setting)
        if key not in self._models:
            self._models[key] = eq.noise_model(self.graph, self.stats, sensitivities=self.expecting[row.corrected],
                                               **setting.quantizers(row.granularity))
        return self._models[key].sqnr(f)

    def factorization(self, row: Row, setting: Setting) -> eq.Factorization:
        """The factors of a row; only "optimal" looks at the setting."""
        key = (row.key, setting if row.method == "optimal" else None)
        if key not in self._factorizations:
            self._factorizations[key] = _factorize(self, row, setting)
        return self._factorizations[key]


def _factorize(case: Case, row: Row, setting: Setting) -> eq.Factorization:
    if row.method is None:
        return eq.Factorization.identity(case.graph)
    if row.method == "cross_layer":
        method = eq.CrossLayer() if row.guarded else eq.CrossLayer(max_bias=np.inf)
        return eq.equalize(case.graph, method, stats=case.stats).factorization
    if row.method != "optimal":
        return eq.equalize(case.graph, row.method, stats=case.stats).factorization
    sensitivities = case.sensitivities_around_means if row.corrected else case.sensitivities
    method = eq.Optimal(sensitivities if row.gradients else case.of_statistics, case.likely, **({} if row.ridge else {"ridge": 0.0}))
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


def verdicts(outputs: Outputs, each: int) -> NDArray[np.int64]:
    """What the network decides for each crop: its class; face or not; or, of features, the most alike crop of another image."""
    if "features" in outputs:
        unit = outputs["features"] / np.linalg.norm(outputs["features"], axis=1, keepdims=True)
        alike = unit @ unit.T
        image = np.arange(len(alike)) // each
        alike[image[:, None] == image] = -np.inf
        return alike.argmax(axis=1)
    return outputs["logits" if "logits" in outputs else "scores"].argmax(axis=1)


def jittered(f: eq.Factorization, seed: int) -> eq.Factorization:
    """The factors moved by 2 %; where the network pins them they stay 1."""
    free = f.free * np.exp(JITTER * np.random.default_rng(seed).normal(size=len(f.free)))
    free[0] = 1
    return replace(f, free=free)


def sample(case: Case, row: Row, setting: Setting, f: eq.Factorization) -> dict[str, float]:
    """SQNR in dB on the test images, that which was expected, and the share of verdicts that agree with float."""
    graph, stats, quantizers = f.apply(case.graph), f.apply(case.stats), setting.quantizers(row.granularity)
    found = {}
    if row.trained:
        batches = eq.shuffled(case.training, size=BATCH)
        quantized = eq.train(graph, batches, stats=stats, steps=STEPS, learning_rate=RATE, **quantizers).graph
    else:
        quantized = eq.quantize(graph, stats=stats, **quantizers)
        found["expected"] = case.expected(row, setting, f)
        if row.corrected:
            quantized = correct_bias(graph, quantized, case.calibration).graph
    outputs = run(quantized, case.test)
    return found | {"sqnr": eq.sqnr(regressions(case.reference), regressions(outputs)),
                    "agreement": float((verdicts(outputs, case.each) == verdicts(case.reference, case.each)).mean())}


def samples(case: Case, row: Row, jitters: int) -> dict[str, Samples]:
    """Every setting of a row, jitter by jitter: the same jitters for all rows."""
    found: dict[str, Samples] = {}
    for name, setting in SETTINGS.items():
        if name != "W8A8" and (not row.main or row.corrected or row.trained):
            continue
        # a correction takes as long as three samples, training as ten
        few = 1 if row.trained else max(1, jitters // 2)
        seeds = range(jitters if name == "W8A8" and not (row.corrected or row.trained) else few)
        drawn = [sample(case, row, setting, jittered(case.factorization(row, setting), seed)) for seed in seeds]
        found[name] = {quantity: [round(float(one[quantity]), 4) for one in drawn] for quantity in drawn[0]}
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
    """A half of a network's images to calibrate on; with a path, the network in that file is measured against the original."""
    x, _ = networks.images(network)
    calibration = x[:len(x) // 2] if half == 0 else x[len(x) // 2:]
    each = MORE_CROPS.get(network, CROPS)
    test = networks.crops(network, 1 - half, each=each)
    graph = original(network) if path is None else of_peer(network, path)
    return Case(graph, calibration, test, run(original(network), test), eq.batchnorm_gaussians(unfolded(network)),
                networks.crops(network, half, each=TRAINING_CROPS), each)


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


def halves_of(network: str, row: Row) -> tuple[int, ...]:
    """The halves that a row is calibrated on."""
    return (0,) if row.trained else (0, 1)


def measure_row(network: str, row: Row, jitters: int, path: Path | None, mapper: Mapper) -> None:
    if row.trained and network not in TRAINED:
        return
    start = time.perf_counter()
    halves = list(mapper(partial(task, network, row, jitters, path), halves_of(network, row)))
    joined = {setting: {quantity: [one for half in halves for one in half[setting][quantity]] for quantity in of}
              for setting, of in halves[0].items()}
    kept: dict[str, Any] = {"network": network, "row": row.name, "settings": joined}
    if row.trained:
        kept |= {"steps": STEPS, "batch": BATCH, "learning_rate": RATE}
    results.keep("quality", {f"{network}: {row.name}": kept})
    means = "  ".join(f"{setting} {np.mean(found['sqnr']):6.2f} (expected {np.mean(found.get('expected', np.nan)):6.2f})"
                      for setting, found in joined.items())
    print(f"{network:20s}{row.name:48s}{means}  dB   ({time.perf_counter() - start:.0f} s)", flush=True)


def keep_float(network: str) -> None:
    """What the float network itself scores, where there are labels."""
    x, labels = networks.images(network)
    row: dict[str, Any] = {"network": network, "images": len(x), "degrees_of_freedom": eq.degrees_of_freedom(original(network))}
    if labels is not None:
        row["accuracy"] = float((verdicts(run(original(network), x), 1) == labels).mean())
    results.keep("float", {network: row})


def measure_peer(network: str, peer: str, jitters: int, mapper: Mapper) -> None:
    """Equalize by another tool, compare the float outputs, and measure what it wrote as our own rows are, with half the jitters."""
    answer = peers.equalize(peer, network, networks.networks()[network])
    rows = [row for row in (*PLAIN, *CORRECTED) if row.method is None and row.granularity == "per_tensor" and peers.PEERS[peer].equalizes]
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


# The figure -----------------------------------------------------------------------------------------------------------

def draw() -> None:
    """Expected and measured SQNR of every row and network that is kept, as docs/predicted.svg."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    from benchmarks.page import TITLES, pairs

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    found = pairs(results.load())
    axes.axline((0, 0), slope=1, color="0.6", linewidth=1)
    colors = ("#c44e52", "#2b6ca3", "#3a8f4d", "#8c6bb1", "#d98c2b", "#4a4a4a", "#17a2a8")
    for color, (network, title) in zip(colors, TITLES.items(), strict=True):
        for corrected, marker in ((False, "o"), (True, "^")):
            points = [(x, y) for of, is_corrected, x, y in found if of == network and is_corrected == corrected]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=color, markersize=4.5, markerfacecolor="none" if corrected else color,
                          label=None if corrected else title)
    axes.set_xlabel("expected SQNR, dB")
    axes.set_ylabel("measured SQNR, dB (triangles: bias correction)")
    axes.grid(color="0.9", linewidth=0.7)
    axes.legend(fontsize=8, framealpha=0.9)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "eqfact"}):
        figure.savefig(FIGURE, metadata={"Date": None})
