"""How fast is eqfact beside other runtimes, and how do time and memory of an equalization grow?

Four parts. `forward`: MobileNetV2 on one image, every runtime in turn, several rounds, medians and ratios. `equalize`: every
method on every network. `costs`: sensitivities and the check of an equalized network in forward passes, the optimum in seconds and memory
by the number of weights, up to Inception-V3. `growth`: equalization of dense and convolutional chains up to 100 million weights, time and,
in a second run under tracemalloc, the peak of memory beyond the network itself, in multiples of its weights.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import eqfact as eq
import eqfact.onnx
from benchmarks import networks, results
from eqfact.noise import gradient_sensitivities

Array = NDArray[np.float32]
Work = Callable[[], object]

NETWORK, THREADS = "mobilenetv2", 2
ROUNDS, RUNS, PAUSE = 5, 5, 0.3  # pause in seconds between runtimes, until the threads of the last one sleep
#: Where the costs are measured, and with how many projections: the largest network last.
COSTLY, PROJECTIONS = ("mobilenetv2", "efficientnet_lite0", "nsfw_inception_v3"), 4
METHODS = ("one_step", "two_step", "cross_layer", "optimal")


# Forward, side by side ------------------------------------------------------------------------------------------------

def measure_forward() -> None:
    """Milliseconds of one image, medians over rounds in which every runtime has its turn."""
    x = networks.images(NETWORK)[0][:1]
    with tempfile.TemporaryDirectory() as folder:
        contestants = _contestants(x, Path(folder) / "folded.onnx")
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(ROUNDS):
            for name, work in contestants.items():
                time.sleep(PAUSE)
                work()  # warm
                times[name] += [_seconds(work) for _ in range(RUNS if statistics.median(times[name] or [0]) < 0.2 else 1)]
    medians = {name: 1e3 * statistics.median(found) for name, found in times.items()}
    results.keep("forward", {name: {"milliseconds": median, "fastest": 1e3 * min(times[name])} for name, median in medians.items()})
    ours = medians["eqfact"]
    for name, median in medians.items():
        print(f"forward   {name:45s}{median:8.1f} ms   eqfact takes {ours / median:.2f} of it", flush=True)


def _contestants(x: Array, folded: Path) -> dict[str, Work]:
    """The same network and image in every runtime; the folded one is what eqfact writes."""
    import onnx
    import onnxruntime
    import torch
    from onnx.reference import ReferenceEvaluator

    source = networks.networks()[NETWORK]
    loaded = eqfact.onnx.load(source)
    graph = eq.fold_batchnorm(loaded)
    eqfact.onnx.save(folded, graph)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    torch.set_num_threads(THREADS)
    module, tensor = networks.torch_module(NETWORK), torch.from_numpy(x)
    slow, slow_folded = ReferenceEvaluator(onnx.load(source)), ReferenceEvaluator(onnx.load(folded))

    def torch_forward() -> Any:
        with torch.inference_mode():
            return module(tensor)

    return {
        "eqfact": lambda: eq.forward(graph, x),
        "eqfact, BatchNorm not folded": lambda: eq.forward(loaded, x),
        f"onnxruntime, {THREADS} threads": lambda: session.run(None, {"image": x}),
        f"torch, {THREADS} threads": torch_forward,
        "onnx ReferenceEvaluator, BatchNorm folded": lambda: slow_folded.run(None, {"image": x}),
        "onnx ReferenceEvaluator": lambda: slow.run(None, {"image": x}),
    }


def _seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# Equalization by method -----------------------------------------------------------------------------------------------

def measure_equalize() -> None:
    """Seconds of every method on every network, the fastest of three; sensitivities are timed by themselves."""
    for name, path in networks.networks().items():
        graph, x = eq.fold_batchnorm(eqfact.onnx.load(path)), networks.images(name)[0][:10]
        stats = eq.calibrate(graph, [image[None] for image in x])
        start = time.perf_counter()
        sensitivities = gradient_sensitivities(graph, [x])
        row: dict[str, Any] = {"sensitivities": time.perf_counter() - start}
        for method in METHODS:
            found = [_equalized(graph, eq.Optimal(sensitivities, stats) if method == "optimal" else method, stats) for _ in range(3)]
            row[method], row[f"{method} iterations"] = min(seconds for seconds, _ in found), found[0][1].iterations
            print(f"equalize  {name:20s}{method:14s}{row[method]:8.3f} s   {found[0][1].message}", flush=True)
        results.keep("equalize", {name: row})


def _equalized(graph: eq.Graph, method: Any, stats: eq.Statistics) -> tuple[float, eq.EqualizeResult]:
    start = time.perf_counter()
    result = eq.equalize(graph, method, stats=stats)
    return time.perf_counter() - start, result


# What else takes long -------------------------------------------------------------------------------------------------

def measure_costs() -> None:
    """What sensitivities and a verification cost in forward passes on as many images, and the optimum by the number of weights.

    In processor time, of which a busy machine takes less away; the fastest of several.
    """
    for name in COSTLY:
        graph, x = eq.fold_batchnorm(eqfact.onnx.load(networks.networks()[name])), networks.images(name)[0][:4]
        one, stats = x[:1], eq.calibrate(graph, [image[None] for image in x])
        weights = sum(node.op.weight.size for node in graph.nodes if isinstance(node.op, (eq.Dense, eq.Conv)))
        best, other = eq.Optimal(gradient_sensitivities(graph, [x]), stats), eq.equalize(graph).graph
        optimal = partial(eq.equalize, graph, best, stats=stats)
        forward = _fastest(partial(eq.forward, graph, one), RUNS)
        row = {"weights": weights, "forward": forward,
               "sensitivities": _fastest(partial(gradient_sensitivities, graph, [one], projections=PROJECTIONS)) / PROJECTIONS / forward,
               "verify": _fastest(partial(eq.verify, graph, other, one)) / forward,
               "verify 4 images": _fastest(partial(eq.verify, graph, other, x)) / _fastest(partial(eq.forward, graph, x)),
               "optimal": _fastest(optimal, 2) / (weights / 1e6),
               "peak": _peak(optimal) / (4 * weights)}
        print(f"costs     {name:20s}{weights / 1e6:6.2f} M weights: sensitivities {row['sensitivities']:.1f} forward passes per image and "
              f"projection, verify {row['verify']:.1f} (4 images {row['verify 4 images']:.1f}), optimal {row['optimal']:.2f} s per million "
              f"weights, peak {row['peak']:.1f} times the weights", flush=True)
        results.keep("costs", {name: row})


def _fastest(work: Work, runs: int = 3) -> float:
    """Seconds of processor time."""
    found = []
    for _ in range(runs):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def _peak(work: Work) -> int:
    """The most bytes taken beyond what was there before."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


# Growth ---------------------------------------------------------------------------------------------------------------

def dense_chain(width: int, depth: int) -> eq.Graph:
    """`depth` dense layers with ReLU between them; channel ranges spread over two decades."""
    return _chain(width, depth, (width,), lambda weight: eq.Dense(weight), ())


def conv_chain(width: int, depth: int) -> eq.Graph:
    """The same with 3x3 convolutions."""
    return _chain(width, depth, (width, 8, 8), lambda weight: eq.Conv(weight, padding=1), (3, 3))


def _chain(width: int, depth: int, shape: tuple[int, ...], op: Callable[[Array], eq.Op], kernel: tuple[int, ...]) -> eq.Graph:
    rng = np.random.default_rng(0)
    ops: dict[str, eq.Op] = {}
    for i in range(depth):
        weight = rng.standard_normal((width, width, *kernel), np.float32)
        weight *= np.exp(rng.normal(size=(width, *(1,) * (weight.ndim - 1)))).astype(np.float32)
        ops[f"layer{i}"] = op(weight)
        ops[f"act{i}"] = eq.ReLU()
    return eq.Graph.chain(shape, **ops)


@dataclass(frozen=True)
class Family:
    """Networks of one kind, by width and depth, and the method that equalizes them."""

    about: str
    make: Callable[[int, int], eq.Graph]
    sizes: list[tuple[int, int]]
    method: str = "cross_layer"


FAMILIES = {
    "width": Family("8 dense layers, wider and wider", dense_chain, [(w, 8) for w in (110, 350, 1118, 3536)]),
    "depth": Family("dense layers of 256, more and more", dense_chain, [(256, d) for d in (4, 8, 16, 32, 64)]),
    "weights": Family("12 convolutions 3x3, wider and wider", conv_chain, [(w, 12) for w in (96, 304, 962)]),
    "optimal": Family("6 dense layers, wider and wider", dense_chain, [(w, 6) for w in (128, 256, 512, 1024, 2048)], "optimal"),
}


def measure_growth() -> None:
    """Time and peak memory over each family, and the exponents fitted to time against weights."""
    for name, family in FAMILIES.items():
        points = [_grown(family.make(width, depth), width, depth, family.method) for width, depth in family.sizes]
        for point in points:
            print(f"growth    {name:9s}{point['weights'] / 1e6:8.2f} M weights: {point['seconds']:7.2f} s in {point['sweeps']} sweeps, "
                  f"{1e3 * point['seconds_per_sweep']:.1f} ms each; peak {point['peak']:.2f} times the weights", flush=True)
        results.keep("growth", {name: {"about": family.about, "points": points, "exponent": _exponent(points, "seconds"),
                                       "exponent_sweep": _exponent(points, "seconds_per_sweep")}})


def _grown(graph: eq.Graph, width: int, depth: int, method: str) -> dict[str, Any]:
    kind = partial(eq.Optimal, objective="range") if method == "optimal" else eq.CrossLayer  # which need no data
    weights = [op.weight for op in (node.op for node in graph.nodes) if isinstance(op, (eq.Dense, eq.Conv))]
    start = time.perf_counter()
    result = eq.equalize(graph, kind())
    seconds, sweeps = time.perf_counter() - start, result.iterations
    del result
    start = time.perf_counter()
    eq.equalize(graph, kind(max_iter=1))
    once = time.perf_counter() - start
    # "optimal" holds more from its second stage on, cross-layer does not with its sweeps
    peak = _peak(partial(eq.equalize, graph, kind() if method == "optimal" else kind(max_iter=1)))
    return {"width": width, "depth": depth, "weights": sum(w.size for w in weights), "seconds": seconds, "sweeps": sweeps,
            "seconds_per_sweep": max(seconds - once, 0.0) / max(sweeps - 1, 1), "peak": peak / sum(w.nbytes for w in weights)}


def _exponent(points: Sequence[dict[str, Any]], quantity: str, largest: int = 3) -> float:
    """The slope of log time over log weights, over the largest points, where overhead no longer counts."""
    x, y = (np.log([max(point[key], 1e-9) for point in points[-largest:]]) for key in ("weights", quantity))
    return float(np.polyfit(x, y, 1)[0])


PARTS: dict[str, Callable[[], None]] = {"forward": measure_forward, "equalize": measure_equalize, "costs": measure_costs,
                                     "growth": measure_growth}


def measure(only: Sequence[str]) -> None:
    """Measure the named parts; keep and print each as soon as it is known."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 0.5:
        print(f"the machine is busy (load {load:.1f}): times are too long and ratios uncertain", flush=True)
    for part in only:
        PARTS[part]()
