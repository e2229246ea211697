"""Does a network train better in few bits, once it is equalized?

The bundled network, from three starts: as it is, after cross-layer equalization, after `optimal` for the quantizers at hand. Each is
quantized per tensor and trained on the digits that the network itself was trained on (`eqfact.train` with its defaults), towards the float
network's outputs or towards labels; measured on the 360 digits that neither has seen.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import eqfact as eq
from benchmarks import results
from eqfact import demo
from eqfact.training import mean_loss

STARTS = {"none": None, "cross-layer": "cross_layer", "optimal": "optimal"}
BITS = ((8, 8), (4, 8), (4, 4))
STEPS, BATCH, SEEDS = 200, 64, (0, 1)
#: Points of a loss curve; each is the mean of the losses of as many steps.
POINTS = 40
FIGURE = results.DOCS / "training.svg"


class Setting(NamedTuple):
    """What is trained, and towards what."""

    parameters: str
    ranges: bool
    loss: str


SETTINGS = {
    "biases": Setting("biases", False, "squared_error"),
    "weights, biases and ranges": Setting("weights", True, "squared_error"),
    "biases; labels": Setting("biases", False, "cross_entropy"),
    "weights, biases and ranges; labels": Setting("weights", True, "cross_entropy"),
}


def measure(start: str, bits: tuple[int, int], settings: Sequence[str]) -> None:
    """Train from one start in all settings, and keep what came out."""
    bundle = demo.load_bundle()
    graph = eq.fold_batchnorm(bundle.network)
    stats = eq.calibrate(graph, bundle.calibration)
    truth = demo.logits(graph, bundle.images)
    quantizers = {"weights": eq.UniformQuantizer(bits[0]), "activations": eq.UniformQuantizer(bits[1], symmetric=False)}
    if STARTS[start] is not None:
        equalized = eq.equalize(graph, STARTS[start], data=bundle.calibration, **quantizers)
        graph, stats = equalized.graph, equalized.factorization.apply(stats)
    held_out = [(bundle.images, bundle.labels.astype(np.int64))]

    def quality(quantized: eq.Graph, loss: str) -> dict[str, float]:
        outputs = demo.logits(quantized, bundle.images)
        return {"top1": round(demo.top1(outputs, bundle.labels), 5), "sqnr": round(eq.sqnr(truth, outputs), 3),
                "loss": float(f"{mean_loss(graph, quantized, held_out, loss=loss):.4g}")}

    for name in settings:
        setting = SETTINGS[name]
        labels = bundle.train_labels.astype(np.int64) if setting.loss == "cross_entropy" else None
        kept: dict[str, Any] = {"start": start, "bits": bits, "setting": name, "steps": STEPS, "after": [], "curves": [], "seconds": []}
        kept["before"] = quality(eq.quantize(graph, stats=stats, **quantizers), setting.loss)
        for seed in SEEDS:
            began = time.perf_counter()
            made = eq.train(graph, eq.shuffled(bundle.train, labels, size=BATCH, seed=seed), stats=stats, steps=STEPS, **quantizers,
                            **setting._asdict())
            kept["seconds"].append(round(time.perf_counter() - began, 1))
            kept["after"].append(quality(made.graph, setting.loss))
            kept["curves"].append([float(f"{part.mean():.3g}") for part in np.array_split(made.losses, POINTS)])
        results.keep("training", {f"W{bits[0]}A{bits[1]}: {name}: {start}": kept})
        last = kept["after"][-1]
        print(f"W{bits[0]}A{bits[1]}  {name:36s}{start:12s}{kept['before']['sqnr']:6.1f} -> {last['sqnr']:5.1f} dB, top-1 "
              f"{100 * kept['before']['top1']:.1f} -> {100 * last['top1']:.1f} %, loss {kept['before']['loss']:.4g} -> {last['loss']:.4g} "
              f"({kept['seconds'][-1]:.0f} s)", flush=True)


# The page -------------------------------------------------------------------------------------------------------------

def page() -> str:
    """docs/training.md: what stands above the mark stays, the rest is from what is kept in docs/benchmarks.json."""
    path = results.DOCS / "training.md"
    above = path.read_text().partition(MARK)[0] if path.exists() else "# Training\n\n"
    return above + MARK + _tables(results.load().get("training", {}))


MARK = "<!-- From here on by `python -m benchmarks training`. -->\n"


def _tables(rows: dict[str, Any]) -> str:
    text = ""
    for name in SETTINGS:
        found = {start: [rows.get(f"W{w}A{a}: {name}: {start}") for w, a in BITS] for start in STARTS}
        if not any(any(of) for of in found.values()):
            continue
        head = " | ".join(f"W{w}A{a} {what}" for w, a in BITS for what in ("top-1", _measure(name)))
        text += f"\n**{name[0].upper()}{name[1:]}**\n\n| start | {head} |\n|---|{'--:|' * (2 * len(BITS))}\n"
        for start, of in found.items():
            text += f"| {start} | {' | '.join(_cells(row, name) for row in of)} |\n"
    dates = sorted({row["date"] for row in rows.values()})
    if dates:
        text += f"\nMeasured {' to '.join(dict.fromkeys([dates[0], dates[-1]]))}.\n"
    return text


def _measure(setting: str) -> str:
    return "SQNR" if SETTINGS[setting].loss == "squared_error" else "cross-entropy"


def _cells(row: dict[str, Any] | None, setting: str) -> str:
    if row is None:
        return " | "
    key, form = ("sqnr", ".1f") if SETTINGS[setting].loss == "squared_error" else ("loss", ".3f")
    top1, value = (float(np.mean([after[of] for after in row["after"]])) for of in ("top1", key))
    return f"{100 * row['before']['top1']:.1f} → {100 * top1:.1f} | {row['before'][key]:{form}} → {value:{form}}"


def draw() -> None:
    """The loss curves, towards the float network's outputs, as docs/training.svg."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = results.load().get("training", {})
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    FigureCanvasSVG(figure)
    colors = dict(zip(STARTS, ("#c44e52", "#2b6ca3", "#3a8f4d"), strict=True))
    axes = figure.subplots(1, len(BITS), sharey=True)
    for place, (w, a) in zip(axes, BITS, strict=True):
        for name, line in (("biases", ":"), ("weights, biases and ranges", "-")):
            for start, color in colors.items():
                if (row := rows.get(f"W{w}A{a}: {name}: {start}")) is not None:
                    curve = np.mean(row["curves"], axis=0)
                    place.plot((np.arange(len(curve)) + 0.5) * row["steps"] / len(curve), curve, line, color=color, linewidth=1.4,
                               label=f"{start}{', biases alone' if name == 'biases' else ''}")
        place.set_yscale("log")
        place.minorticks_off()
        place.set_title(f"W{w}A{a}", fontsize=11)
        place.set_xlabel("step")
        place.grid(color="0.9", linewidth=0.7)
    axes[0].set_ylabel("squared error / power of the outputs")
    axes[-1].legend(fontsize=7, framealpha=0.9)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "eqfact"}):
        figure.savefig(FIGURE, metadata={"Date": None})


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks training", description="Train the bundled network from several starts.")
    parser.add_argument("--only", nargs="*", choices=list(SETTINGS), default=list(SETTINGS), metavar="SETTING",
                        help=f"settings, of {'; '.join(SETTINGS)}; none: the page and the figure alone")
    chosen = parser.parse_args(argv).only
    for bits in BITS:
        for start in STARTS:
            measure(start, bits, chosen)
    draw()
    (results.DOCS / "training.md").write_text(page())
    return 0
