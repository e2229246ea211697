"""The command line: ``python -m eqfact COMMAND``, or ``eqfact COMMAND``. How do its arguments read, and what does it answer?

A table of commands, each with its arguments, the function of :mod:`eqfact.commands` that gathers its facts, and the text that
tells a reader the same. Exit status: 0 fine, 1 a negative verdict, 2 wrong usage, 3 refused, with one line on stderr and
nothing written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from eqfact import __version__, commands
from eqfact.asked import Args
from eqfact.clips import RANGES
from eqfact.commands import Facts
from eqfact.methods import METHODS
from eqfact.quantizers import GRANULARITIES
from eqfact.training import LEARNING_RATES, PARAMETERS, SCHEDULES

#: Lines of a list in a text; --json has all.
LISTED = 10


class Command(NamedTuple):
    """One subcommand: a line of help, the groups of arguments that it takes, its facts and its text."""

    help: str
    arguments: Sequence[Callable[[argparse.ArgumentParser], None]]
    run: Callable[[Args], Facts]
    text: Callable[[Facts], Iterable[str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; wrong usage raises :class:`SystemExit` with 2, as argparse does."""
    args = _parser().parse_args(argv)
    command = COMMANDS[args.command]
    try:
        facts = command.run(args)
    except (ValueError, TypeError, OSError) as error:
        print(f"eqfact: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 3
    said = commands.as_json(facts) if args.json else "\n".join([*filter(None, [facts.get("partly")]), *command.text(facts)])
    try:
        print(said, flush=True)
    except BrokenPipeError:  # whoever reads has seen enough, as `head` has; what Python flushes at its end goes nowhere, then
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if facts["ok"] else 1


# ---------------------------------------------------------------------------------------------------------------
# Arguments, in the groups that commands share.

def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("eqfact", description="Equalize neural networks for quantization, exactly.",
                                     epilog="Networks are .npz (eqfact.save) or .onnx files. Exit status: 0 fine, 1 a negative verdict, "
                                            "2 wrong usage, 3 refused, and nothing is written.")
    parser.add_argument("--version", action="version", version=f"eqfact {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = subparsers.add_parser(name, help=command.help, description=command.help[0].upper() + command.help[1:] + ".")
        for arguments in command.arguments:
            arguments(sub)
        sub.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        sub.set_defaults(refuse=sub.error)
    return parser


def _network(p: argparse.ArgumentParser) -> None:
    p.add_argument("network", metavar="NETWORK", help="a .npz or .onnx file")
    group = p.add_argument_group("reading ONNX files")
    group.add_argument("--input-shape", type=input_shape, action="append", default=[], metavar="NAME=C,H,W",
                       help="sizes of an input, without the batch, where the file leaves them open; once for each such input")
    group.add_argument("--strict", action="store_true",
                       help="refuse files of which only parts are understood; else these parts are worked on, and the rest stays as it is")


def input_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """The name of an input and its sizes, from ``NAME=C,H,W``; a name may hold ``=`` too."""
    name, _, sizes = text.rpartition("=")
    try:
        shape = tuple(int(size) for size in sizes.split(","))
    except ValueError:
        shape = ()
    if not name or not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"must be NAME=C,H,W with positive sizes, got '{text}'")
    return name, shape


def _other(p: argparse.ArgumentParser) -> None:
    p.add_argument("other", metavar="OTHER", help="the network to compare with it")


def _output(p: argparse.ArgumentParser) -> None:
    p.add_argument("-o", "--output", required=True, metavar="FILE", help="the network to write, .npz or .onnx")


def _data(p: argparse.ArgumentParser) -> None:
    p.add_argument("--data", metavar="FILE.npz", help="images: a floating array (N, C, ...) for each input by name, or one array; "
                                                       "without it, ranges are unknown and verification takes random numbers")


def _fold(p: argparse.ArgumentParser) -> None:
    p.add_argument("--fold", action=argparse.BooleanOptionalAction,
                   help="fold BatchNorms first, as engines do, where that is the same function up to rounding; default: unless --exact")


def _method(p: argparse.ArgumentParser) -> None:
    how = p.add_mutually_exclusive_group()
    how.add_argument("--method", choices=tuple(METHODS), help="default: optimal with --data, cross_layer without it, which all others "
                     "need; optimal looks at the ranges that channels may reach on other data too (eqfact.likely_ranges)")
    how.add_argument("--apply", metavar="FACTORS.npz", help="no method: the factors that --factors wrote")
    p.add_argument("--exact", action="store_true", help="powers of two only: the outputs stay bit for bit the same")
    p.add_argument("--max-factor", type=float, metavar="F", help="bound on the factors")
    p.add_argument("--slopes", action="store_true", help="let factors pass SiLU, GELU and HardSwish, with a slope a channel (a "
                   "multiplication or a table a channel more)")
    p.add_argument("--scales", action="store_true", help="let every channel before a normalization have a factor, with a multiplication "
                   "a channel more (behind a residual nothing else can take it up)")
    p.add_argument("--harmless", action="store_true", help="return the network as it is where the expected noise would not fall")
    p.add_argument("--preactivation", action="store_true", default=None,
                   help="the paper's optional limit by the range before the activation")
    p.add_argument("--tol", type=float, metavar="T", help="cross_layer: converged when no |log factor| moves by more (0.001); "
                   "optimal: when the factors are certified to be within so many dB of the best (0.05)")
    p.add_argument("--max-iter", type=int, metavar="N",
                   help="at most so many: sweeps of cross_layer (1000), Newton steps of optimal (200)")
    p.add_argument("--include", nargs="+", action="extend", metavar="VALUE", help="only the channels of these values get factors")
    p.add_argument("--exclude", nargs="+", action="extend", metavar="VALUE", help="the channels of these values get none")
    p.add_argument("--factors", metavar="FILE.npz", help="write the factors of every value")


def _quantizers(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("quantizers")
    for what, granularities in (("weight", GRANULARITIES), ("activation", GRANULARITIES[:2])):
        group.add_argument(f"--{what}-bits", type=bits, default=8, metavar="BITS",
                           help="2 to 16, or float; default: %(default)s" + ("; 7 is exact on processors that add pairs of products in 16 "
                                                                              "bits (x86 without VNNI)" if what == "weight" else ""))
        group.add_argument(f"--{what}-granularity", choices=granularities, default=granularities[0], help="default: %(default)s")
        group.add_argument(f"--{what}-range", choices=RANGES, default=RANGES[0], help="where grids end: at the extrema (the default), at a "
                           "percentile, or by the least error, divergence, or noise at the output (needs --data)")
    group.add_argument("--percentile", type=float, metavar="P", help="for the range of that name, percent; default: 99.99")
    group.add_argument("--group-size", type=int, metavar="N", help="input channels in a group, for per_group")
    group.add_argument("--affine-weights", action="store_true", help="weights on affine grids, not symmetric ones")
    group.add_argument("--symmetric-activations", action="store_true", help="activations on symmetric grids, not affine ones")


def _training(p: argparse.ArgumentParser) -> None:
    p.add_argument("--labels", metavar="FILE.npz", help="train towards these labels, one a sample, from 0 (it may be the file of --data); "
                                                         "without it, towards the outputs of the float network")
    p.add_argument("--parameters", choices=PARAMETERS, default=PARAMETERS[0],
                   help="what is trained: biases alone, or weights and biases; default: %(default)s")
    p.add_argument("--ranges", action="store_true", help="the ranges of weights and activations, too")
    p.add_argument("--steps", type=int, default=200, metavar="N", help="batches to train on; default: %(default)s")
    p.add_argument("--batch-size", type=int, default=64, metavar="N", help="samples in a batch, at most all; default: %(default)s")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of the shuffling of the samples; default: %(default)s")
    rates = ", ".join(f"{rate:g} for {what}" for what, rate in LEARNING_RATES.items())
    p.add_argument("--learning-rate", type=float, metavar="R", help=f"of Adam, in units of about one rounding; default: {rates}")
    p.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="of the learning rate; default: %(default)s")
    p.add_argument("--stop", type=int, metavar="N", help="stop after so many of the steps, to go on later")
    p.add_argument("--state", metavar="FILE.npz", help="write all that it takes to go on")
    p.add_argument("--resume", metavar="FILE.npz", help="go on from what --state wrote, with all other options as they were")


def bits(text: str) -> int | None:
    """A number of bits, or None for float."""
    return None if text == "float" else int(text)


def _conform(p: argparse.ArgumentParser) -> None:
    p.add_argument("--cmd", required=True, metavar="COMMAND", help="starts the implementation, which answers questions line by line on its "
                   "standard input and output, for instance 'node port.js' (docs/porting.md)")
    p.add_argument("--level", type=levels, metavar="LEVELS", help="the levels to ask about, for instance 0-4,6; default: all")
    p.add_argument("--cases", metavar="DIR", help="cases that python -m eqfact.testing.cases wrote; default: those of this eqfact")
    p.add_argument("--timeout", type=float, metavar="SECONDS", help="for one answer; default: 10")
    p.add_argument("--junit", metavar="FILE.xml", help="write a JUnit report")
    p.add_argument("--html", metavar="FILE.html", help="write a page")


def levels(text: str) -> list[int]:
    """The levels of conformance cases in a text such as ``0-4,6``."""
    from eqfact.testing.cases import levels_of  # the kit is loaded where it is asked for, not by every command
    return levels_of(text)


def _report(p: argparse.ArgumentParser) -> None:
    p.add_argument("--report", metavar="FILE.json", help="write all facts, with a row for every tensor")


#: What a figure shows, by kind.
FIGURES = {"ranges": "the ranges of all channels before and after", "noise": "the noise to be expected of every tensor",
           "predicted": "that noise against the measured one, each tensor alone", "weights": "weights on their grid",
           "convergence": "how the factors were found, with the certificate of optimal"}


def _plot(*kinds: str) -> Callable[[argparse.ArgumentParser], None]:
    """``--plot`` of a command with these kinds of figures; the first is what a bare name means."""
    def arguments(p: argparse.ArgumentParser) -> None:
        shows = "; ".join(f"{kind}: {FIGURES[kind]}" for kind in kinds)
        p.add_argument("--plot", type=lambda text: figure(text, kinds), action="append", default=[], metavar="[KIND=]FILE.png",
                       help=f"draw a figure, as often as given (needs matplotlib). {shows}; default: {kinds[0]}")
    return arguments


def figure(text: str, kinds: Sequence[str]) -> tuple[str, str]:
    """The kind of a figure and its file, from ``KIND=FILE`` or ``FILE``, which may hold ``=`` behind a folder."""
    kind, equals, path = text.partition("=")
    if not equals or not kind.isidentifier():
        kind, path = kinds[0], text
    if kind not in kinds or not path:
        raise argparse.ArgumentTypeError(f"must be KIND=FILE or FILE, KIND one of {', '.join(kinds)}, got '{text}' (./{text} is a file)")
    return kind, path


# ---------------------------------------------------------------------------------------------------------------
# Texts: what the facts say to a reader.

def demo_text(facts: Facts) -> Iterator[str]:
    yield f"A small MobileNetV2 for handwritten digits: {facts['parameters']} parameters, {facts['degrees_of_freedom']} degrees of freedom."
    yield (f"Calibrated on {facts['calibration_images']} images, measured on {facts['images']} others, of which the float network has "
           f"{100 * facts['top1']:.1f} % right.")
    yield ""
    columns = [q["bits"] for q in facts["rows"][0]["quality"]]
    yield " " * 24 + "".join(f"{f'W{n}A8':^12}" for n in columns) + "    range ratio same"
    yield f"{'method':24}" + " top-1    dB" * len(columns) + "  weights values func.  time"
    for row in facts["rows"]:
        cells = "".join(f"{100 * q['top1']:6.1f}{q['sqnr']:6.1f}" for q in row["quality"])
        verdict = "" if row["verification"] is None else "yes" if row["verification"]["equal"] else "NO"
        time = "" if row["verification"] is None else f"{row['seconds']:5.2f} s"
        yield f"{row['name']:24}{cells}{row['weight_ratio']:9.0f}{row['value_ratio']:7.0f} {verdict:4}{time:>7}".rstrip()
    yield ""
    yield "W6A8: weights in 6 bits, activations in 8, one step per tensor; top-1 in percent; dB: SQNR of the"
    yield "logits. Range ratio: the largest among the channels of any one tensor. Per-channel: not equalized,"
    yield "but one step per output channel of the weights. Optimal: for W8A8. Bias corr.: iterative, on the"
    yield f"calibration images. Same function: verified on {facts['verified_images']} of the images."
    yield from _plots_text(facts)


def inspect_text(facts: Facts) -> Iterator[str]:
    layers = ", ".join(f"{count} {name}" for name, count in facts["layers"].items())
    yield f"{facts['network']}: {facts['parameters']} parameters in {facts['dtype']}; {layers}"
    yield from _batchnorm_text(facts)
    yield f"{facts['degrees_of_freedom']} degrees of freedom"
    yield ""
    rows = [(v["name"], v["made_by"], "x".join(map(str, v["shape"])), f"{v['free']}/{v['shape'][0]}", v["pinned"] or "")
            for v in facts["values"]]
    yield from table(("value", "made by", "shape", "free", "pinned because"), rows, right=(2, 3))


def fold_text(facts: Facts) -> Iterator[str]:
    if not facts["folded"]:
        yield "0 BatchNorms folded"
    yield from _batchnorm_text(facts)
    yield from _verification_text(facts)


def equalize_text(facts: Facts) -> Iterator[str]:
    before, after = facts["before"], facts["after"]
    if facts["predicted_sqnr"] and facts["predicted_sqnr"][1] < facts["predicted_sqnr"][0]:
        remedy = "give more images" if facts["method"] == "optimal" else "take --method optimal"
        yield f"WARNING: the quantized network is expected to be worse than before: {remedy}, or add --harmless"
    yield facts["message"]
    yield f"{facts['degrees_of_freedom']} degrees of freedom"
    for key, what in (("weight_ratio", "weight channels"), ("value_ratio", "value channels")):
        if key in before:
            yield f"largest range ratio of {what}: {before[key]:.4g} -> {after[key]:.4g}"
    if facts["predicted_sqnr"]:
        yield f"{facts['quantizer']} SQNR expected: {facts['predicted_sqnr'][0]:.1f} -> {facts['predicted_sqnr'][1]:.1f} dB"
    for name in before.get("sqnr", ()):
        yield f"{facts['quantizer']} SQNR of '{name}': {before['sqnr'][name]:.1f} -> {after['sqnr'][name]:.1f} dB, on {facts['data']}"
    yield from _listed("pinned", facts["pinned"])
    yield from _batchnorm_text(facts)
    yield from _verification_text(facts)
    yield from _plots_text(facts)


def quantize_text(facts: Facts) -> Iterator[str]:
    for name, decibels in facts["sqnr"].items():
        yield f"{facts['quantizer']} SQNR of '{name}': {decibels:.1f} dB, on {facts['data']}"
    yield from _batchnorm_text(facts)
    yield f"written to {facts['output']}"
    yield from _plots_text(facts)
    if facts["run"]:
        yield from _run_text(facts["run"])


def train_text(facts: Facts) -> Iterator[str]:
    what = {"biases": "biases", "weights": "weights and biases"}[facts["parameters"]] + (", and ranges," if facts["ranges"] else "")
    towards = "the float network's outputs" if facts["loss"] == "squared_error" else "labels"
    before, after = facts["before"], facts["after"]
    yield f"{what} trained for {_count(facts['steps'], 'step')} towards {towards}, on {facts['data']}"
    yield f"loss: {before['loss']:.4g} -> {after['loss']:.4g}"
    if "top1" in after:
        yield f"top-1: {100 * before['top1']:.1f} -> {100 * after['top1']:.1f} %"
    for name in after["sqnr"]:
        yield f"{facts['quantizer']} SQNR of '{name}': {before['sqnr'][name]:.1f} -> {after['sqnr'][name]:.1f} dB"
    if not facts["ok"]:
        yield "NOT better than before: give more steps, or a lower --learning-rate"
    yield from _batchnorm_text(facts)
    yield f"written to {facts['output']}"
    if facts["run"]:
        yield from _run_text(facts["run"])


def _run_text(run: Facts) -> Iterator[str]:
    for name, decibels in run.get("sqnr", {}).items():
        ours = "" if name not in run["difference"] else (
            f" differs from eqfact's by {100 * run['difference'][name]:.2g} % of its largest, {decibels:.1f} dB (eqfact's: "
            f"{run['expected_sqnr'][name]:.1f})")
        yield f"run by {run['with']}: '{name}'{ours or f' at {decibels:.1f} dB'}, on {run['data']}"
    if run.get("saturated"):
        yield (f"NOT the same on every processor: this one lacks VNNI and adds pairs of products in 16 bits, which saturate and move "
               f"outputs by up to {100 * run['saturated']:.2g} %; give the session the entry session.x64quantprecision = 1, or quantize "
               "with --weight-bits 7, which is exact here")
    if "error" in run:
        yield f"NOT run: {run['error']}"


def verify_text(facts: Facts) -> Iterator[str]:
    yield f"{facts['verification']['message']} (on {facts['verification']['data']})"


def report_text(facts: Facts) -> Iterator[str]:
    yield f"{facts['network']}, {facts['quantizer']}, {'on ' + facts['data'] if facts['data'] else 'weights only: values need --data'}"
    yield from _batchnorm_text(facts)
    yield ""
    rows = [(t["kind"], t["name"], str(t["channels"]), str(t["dead"] or ""), f"{t['range_ratio']:.4g}", f"{t['weakest_bits']:.1f}",
             f"{t['sqnr']:.1f}", t["pinned"] or "") for t in facts["tensors"]]
    yield from table(("kind", "tensor", "channels", "dead", "range ratio", "weakest bits", "SQNR dB", "pinned because"), rows,
                     right=(2, 3, 4, 5, 6))


def conform_text(facts: Facts) -> Iterator[str]:
    told = facts["implementation"]
    yield f"{told['name']} {told['version']} ({told['language']})"
    yield ""
    verdicts = [key for key in facts["levels"][0] if key not in ("level", "title")]
    rows = [(str(of["level"]), of["title"], *(str(of[verdict] or "") for verdict in verdicts)) for of in facts["levels"]]
    yield from table(("level", "what is asked", *verdicts), rows, right=(0, 2, 3, 4))
    for failure in facts["failures"][:LISTED]:
        yield ""
        yield f"FAILED {failure['id']}: {failure['where']}"
        yield f"  expected  {failure['expected']}"
        yield f"  got       {failure['got']}"
        yield f"  law       {failure['law']} ({failure['source']})"
        yield f"  looks for {failure['why']}"
    if len(facts["failures"]) > LISTED:
        yield ""
        yield f"and {len(facts['failures']) - LISTED} more failed, see --json"
    if facts["skips"]:
        yield ""
    for reason, count in list(facts["skips"].items())[:LISTED]:
        yield f"skipped: {_count(count, 'case')}, {reason}"
    if not facts["failures"] and not facts["ok"]:
        yield "NOT conforming: no case was answered"


def _verification_text(facts: Facts) -> Iterator[str]:
    yield from verify_text(facts)
    yield f"written to {facts['output']}" if facts["output"] else "NOT written: this would be another function"


def _batchnorm_text(facts: Facts) -> Iterator[str]:
    if facts["folded"]:
        yield f"{_count(facts['folded'], 'BatchNorm')} folded"
    if facts["foldable"]:
        yield f"{_count(len(facts['foldable']), 'BatchNorm')} can be folded: eqfact fold, or --fold"
    yield from _listed("not folded", facts["unfoldable"])


def _listed(what: str, reasons: dict[str, str]) -> Iterator[str]:
    for name in list(reasons)[:LISTED]:
        yield f"{what}: '{name}', {reasons[name]}"
    if len(reasons) > LISTED:
        yield f"{what}: and {len(reasons) - LISTED} more, see --json"


def _plots_text(facts: Facts) -> Iterator[str]:
    for plot in facts["plots"]:
        yield f"figure of {plot['kind']} written to {plot['file']}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> Iterator[str]:
    """Columns as wide as they must be, some set to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = zip(row, widths, strict=True)
        yield "  ".join(cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(cells)).rstrip()


COMMANDS: dict[str, Command] = {
    "demo": Command("every method against every bit-width, on the bundled network", (_plot("ranges", "noise", "convergence"),),
                    commands.run_demo, demo_text),
    "inspect": Command("layers, shapes and degrees of freedom of a network, and what is pinned and why",
                       (_network, _data), commands.run_inspect, inspect_text),
    "fold": Command("fold BatchNorms into their neighbours, where that is exact",
                    (_network, _output, _data), commands.run_fold, fold_text),
    "equalize": Command("find factors and write the equivalent network",
                        (_network, _output, _data, _fold, _method, _report, _plot("ranges", "noise", "weights", "convergence"),
                         _quantizers), commands.run_equalize, equalize_text),
    "quantize": Command("put weights and activations on grids",
                        (_network, _output, _data, _fold, _report, _plot("weights", "noise", "predicted"), _quantizers),
                        commands.run_quantize, quantize_text),
    "train": Command("train biases, weights or ranges of the quantized network",
                     (_network, _output, _data, _fold, _training, _report, _quantizers), commands.run_train, train_text),
    "verify": Command("are two networks the same function, up to rounding", (_network, _other, _data), commands.run_verify, verify_text),
    "report": Command("range ratio, weakest channel, noise and pins of every tensor",
                      (_network, _data, _quantizers), commands.run_report, report_text),
    "conform": Command("ask an implementation, in any language, the conformance cases", (_conform,), commands.run_conform, conform_text),
}


if __name__ == "__main__":
    sys.exit(main())
