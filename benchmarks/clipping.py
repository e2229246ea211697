"""What does clipping add to equalization, and equalization to clipping?

Ranges and sensitivities come from random crops of one half of the twenty images, SQNR from the centres of the other half; then the halves
change places. Methods, jitters and quantizers are those of `quality.py`. Keeps rows in `docs/benchmarks.json` (section "clipping") and
prints the tables of `docs/clipping.md`: `python -m benchmarks clipping`, with `--only NETWORK ...` `--jitters N` and `--apart`, or
`--table` alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial

import numpy as np

import eqfact as eq
from benchmarks import networks, quality, results

CROPS = 4  # of each image
SENSED = 10  # images that gradients are taken on
BITS = (8, 6, 4)  # of weights; activations have 8
METHODS = ("none", "cross_layer", "optimal")
ALONE = ("none", "optimal")
#: Of weights and of activations.
CLIPS = (("minmax", "minmax"), ("minmax", "mse"), ("mse", "minmax"), ("mse", "mse"), ("noise", "noise"))
#: Weights alone and activations alone on grids: bits, and the rules for each.
APART, RULES = ((8, None), (6, None), (4, None), (None, 8), (None, 6)), ("minmax", "mse", "noise")


@dataclass(frozen=True)
class Setting:
    """Bits and rules of weights and activations; None stays in float."""

    weight_bits: int | None
    activation_bits: int | None
    clips: tuple[str, str]

    @property
    def quantizers(self) -> dict[str, eq.UniformQuantizer | None]:
        w, a = self.weight_bits, self.activation_bits
        return {"weights": None if w is None else eq.UniformQuantizer(w, range=self.clips[0]),
                "activations": None if a is None else eq.UniformQuantizer(a, symmetric=False, range=self.clips[1])}

    @property
    def bits(self) -> str:
        return f"W{self.weight_bits or 32}A{self.activation_bits or 32}"


TOGETHER = [Setting(bits, 8, clips) for bits in BITS for clips in CLIPS]
EACH_ALONE = [Setting(w, a, (rule, rule)) for w, a in APART for rule in RULES]


class _Clipped(quality.Case):
    """A case whose statistics keep histograms."""

    @cached_property
    def stats(self) -> eq.Statistics:
        return eq.calibrate(self.graph, [image[None] for image in self.calibration])


@cache
def case_of(network: str, half: int) -> quality.Case:
    """The case of `quality.py`, calibrated on crops and tested on centres."""
    x, _ = networks.images(network)
    case, test = quality.case_of(network, half), x[len(x) // 2:] if half == 0 else x[:len(x) // 2]
    calibration = networks.crops(network, half, each=CROPS)
    return _Clipped(case.graph, calibration, test, quality.run(case.graph, test), case.gaussians, case.training)


@cache
def sensitivities(network: str, half: int) -> eq.Sensitivities:
    """Of the float network, on crops of every image."""
    case = case_of(network, half)
    return eq.gradient_sensitivities(case.graph, [case.calibration[::len(case.calibration) // SENSED]])


def samples(network: str, jitters: int, settings: Sequence[Setting], half: int) -> dict[str, list[float]]:
    """SQNR in dB, and what was expected of it first, by method, bits and clips."""
    case, known = case_of(network, half), sensitivities(network, half)
    found: dict[str, list[float]] = {}
    for method in (ALONE if settings == EACH_ALONE else METHODS):
        for setting in settings:
            grids = setting.quantizers
            f = eq.Factorization.identity(case.graph)
            if method != "none":
                how = eq.Optimal(known, case.likely) if method == "optimal" else method
                f = eq.equalize(case.graph, how, stats=case.stats, **grids).factorization
            model = eq.noise_model(case.graph, case.stats, **grids, sensitivities=known, at=f)
            row = [model.sqnr(f)]
            for g in (quality.jittered(f, seed) for seed in range(jitters)):
                quantized = eq.quantize(g.apply(case.graph), stats=g.apply(case.stats), **grids,
                                        sensitivities=known.rescaled(case.graph, g))
                outputs = quality.run(quantized, case.test)
                row.append(eq.sqnr(quality.regressions(case.reference), quality.regressions(outputs)))
            found[f"{method} {setting.bits} {'/'.join(setting.clips)}"] = [round(float(number), 3) for number in row]
    return found


def measure(only: Sequence[str], jitters: int, section: str, settings: Sequence[Setting]) -> None:
    """Both halves at once; a network's rows are kept as soon as they are known."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for network in only:
            start = time.perf_counter()
            halves = list(pool.map(partial(samples, network, jitters, settings), (0, 1)))
            rows = {key: {"expected": [half[key][0] for half in halves], "sqnr": [x for half in halves for x in half[key][1:]]}
                    for key in halves[0]}
            results.keep(section, {network: {"network": network, "rows": rows}})
            print(f"{network} in {time.perf_counter() - start:.0f} s", flush=True)


def table(network: str) -> Iterator[str]:
    """Mean SQNR in dB, a row for each method and weights' bits, a column for each pair of rules."""
    rows = results.load()["clipping"][network]["rows"]
    yield f"| {network} | " + " | ".join(f"{w} / {a}" for w, a in CLIPS) + " |"
    yield "|---|" + "---:|" * len(CLIPS)
    for bits in BITS:
        for method in METHODS:
            cells = [rows[f"{method} W{bits}A8 {w}/{a}"]["sqnr"] for w, a in CLIPS]
            yield f"| W{bits}A8 {method.replace('_', '-')} | " + " | ".join(f"{np.mean(cell):.1f}" for cell in cells) + " |"


def apart(network: str) -> Iterator[str]:
    """The same, weights alone and activations alone."""
    rows = results.load()["clipping apart"][network]["rows"]
    yield f"| {network} | " + " | ".join(f"{method.replace('_', '-')}, {rule}" for method in ALONE for rule in RULES) + " |"
    yield "|---|" + "---:|" * (len(ALONE) * len(RULES))
    for bits in dict.fromkeys(setting.bits for setting in EACH_ALONE):
        cells = [rows[f"{method} {bits} {rule}/{rule}"]["sqnr"] for method in ALONE for rule in RULES]
        yield f"| {bits} | " + " | ".join(f"{np.mean(cell):.1f}" for cell in cells) + " |"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks clipping", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(networks.SOURCES), default=list(networks.SOURCES), metavar="NETWORK")
    parser.add_argument("--jitters", type=int, default=2, help="jitters of the factors for each half of the images")
    parser.add_argument("--apart", action="store_true", help="weights alone and activations alone on grids")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the tables of what is kept")
    arguments = parser.parse_args(argv)
    section, settings, rows = ("clipping apart", EACH_ALONE, apart) if arguments.apart else ("clipping", TOGETHER, table)
    if not arguments.table:
        measure(arguments.only, arguments.jitters, section, settings)
    for network in arguments.only:
        if network in results.load().get(section, {}):
            print("\n".join(rows(network)), end="\n\n")
    return 0
