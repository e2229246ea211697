"""What does each subcommand find out and do? From parsed arguments to *facts*: plain data, printed as they are with ``--json``.

``facts["ok"]`` is the verdict. Networks and images are read first, files are written last, all of them or none; a network that
is not the same function as the one given is never written. :mod:`eqfact.__main__` has the arguments, the texts and the exit status.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

import numpy as np

from eqfact import asked, demo, figures, files, plotting, report
from eqfact.asked import Args
from eqfact.calibration import Statistics, calibrate, likely_ranges
from eqfact.channels import channels
from eqfact.correction import batchnorm_gaussians
from eqfact.equalization import EqualizeResult, equalize
from eqfact.folding import fold_batchnorm, folding_obstacles
from eqfact.freeing import add_scales, slope_gates
from eqfact.gradients import Sensitivities
from eqfact.graph import Graph, forward
from eqfact.methods import METHODS
from eqfact.metrics import sqnr
from eqfact.ops import BatchNorm, Weighted
from eqfact.quantization import quantize
from eqfact.quantizers import clips
from eqfact.training import mean_loss, shuffled, train

Facts = dict[str, Any]

#: The methods that do without ``--data``.
DATA_FREE = ("cross_layer",)
#: A rewritten network is verified on at most this many images; ``eqfact verify`` looks at all.
VERIFIED = 4


def run_demo(args: Args) -> Facts:
    _check_outputs(args)
    bundle = demo.load_bundle()
    rows = list(asked.progress(demo.rows(bundle), "methods", len(demo.ROWS)))
    before, after, best = (next(row for row in rows if row.name == name) for name in ("none", "cross-layer", "optimal"))
    files.write_all(figures.writers(args, {
        "ranges": partial(plotting.plot_ranges, before.graph, after.graph, title="cross-layer equalization of the bundled network"),
        **figures.of_result(best.result, "optimal equalization of the bundled network", "W8A8")}))
    return {
        "ok": all(row.verification for row in rows if row.verification is not None),
        "parameters": _parameters(bundle.network), "images": len(bundle.labels), "calibration_images": len(bundle.calibration),
        "verified_images": demo.VERIFIED, "top1": demo.top1(demo.logits(bundle.network, bundle.images), bundle.labels),
        "degrees_of_freedom": channels(before.graph).degrees_of_freedom, "plots": figures.drawn(args),
        "rows": [{"name": r.name, "quality": [asdict(q) for q in r.quality], "weight_ratio": r.weight_ratio, "value_ratio": r.value_ratio,
                  "verification": r.verification and asdict(r.verification), "seconds": r.seconds} for r in rows],
    }


def run_inspect(args: Args) -> Facts:
    (network,) = _networks(args, args.network)
    graph = network.graph
    resolved = channels(graph)
    pinned = resolved.pinned
    made_by = dict.fromkeys(graph.inputs, "input") | {node.name: type(node.op).__name__ for node in graph.nodes}
    return {
        "ok": True, **_file(network), "dtype": str(graph.dtype), "parameters": _parameters(graph),
        "inputs": dict(graph.inputs), "outputs": {name: graph.shapes[name] for name in graph.outputs},
        "layers": dict(Counter(made_by[node.name] for node in graph.nodes)),
        "degrees_of_freedom": resolved.degrees_of_freedom, **_batchnorms(graph),
        "values": [{"name": name, "made_by": made_by[name], "shape": shape, "free": int((resolved.labels[name] > 0).sum()),
                    "pinned": pinned.get(name)} for name, shape in graph.shapes.items()],
    }


def run_fold(args: Args) -> Facts:
    _check_outputs(args)
    network, images = _given(args)
    graph = network.graph
    _proven(network, images)
    folded = fold_batchnorm(graph)
    facts = {**_file(network), **_batchnorms(folded, graph), **_verification(graph, folded, images)}
    return _written(facts, args, {args.output: partial(_save, network=network, graph=folded, images=images)})


def run_equalize(args: Args) -> Facts:
    _check_outputs(args)
    network, images = _given(args)
    graph = network.graph
    if args.harmless and not (args.data or args.apply):
        args.refuse("--harmless compares the noise to be expected, which takes the ranges of activations: give --data FILE.npz")
    figures.check(args)
    _proven(network, images)
    folded = _folded(args, graph)
    start = slope_gates(folded) if args.slopes else folded
    start = add_scales(start) if args.scales else start
    stats = _calibrated(args, start, images)
    result = _equalized(args, graph, start, stats, images, network.partly is not None)
    facts = {**_file(network), "method": asked.method(args), "success": result.success,
             "message": result.message, "iterations": result.iterations, "residual": result.residual[-1] if result.residual else None,
             "degrees_of_freedom": result.factorization.channels.degrees_of_freedom, "pinned": result.pinned, "gap_db": result.gap_db,
             "predicted_sqnr": result.predicted, **_batchnorms(folded, graph),
             **_before_and_after(args, start, result, stats, images), **_verification(graph, result.graph, images)}
    tensors = facts.pop("tensors")  # for the report file only
    facts["ok"] = facts["ok"] and result.success
    title = f"{os.path.basename(args.network)}: {facts['method']}"
    return _written(facts, args, {
        args.factors: partial(files.save_factors, factorization=result.factorization),
        **figures.writers(args, {"ranges": partial(plotting.plot_ranges, start, result.graph, title=title),
                          **figures.of_result(result, title, facts["quantizer"]),
                          "weights": partial(figures.draw_weights, args, start, result, stats, images, f"{title}, {facts['quantizer']}")}),
        args.report: lambda path: _write_json(path, facts | {"tensors": tensors}),
        args.output: partial(_save, network=network, graph=result.graph, images=images)})


def run_quantize(args: Args) -> Facts:
    _check_outputs(args)
    network, images = _given(args)
    graph = network.graph
    if args.activation_bits is not None and not args.data:
        args.refuse("the ranges of activations come from images: give --data FILE.npz, or --activation-bits float")
    figures.check(args)
    _proven(network, images)
    start = _folded(args, graph)
    stats = _calibrated(args, start, images)
    sensitivities = asked.sensitivities(args, start, stats, images)
    quantized = _quantized(args, start, stats, sensitivities)
    noise = _noise(start, quantized, images)
    facts = {"ok": True, **_file(network), "quantizer": asked.quantizer_name(args), "data": images.source,
             "sqnr": {name: noise[name] for name in graph.outputs}, **_batchnorms(start, graph)}
    written = _written(facts, args, {
        args.report: lambda path: _write_json(path, facts | {"tensors": _tensors(args, start, stats, noise, sensitivities)}),
        **figures.of_quantized(args, start, quantized, stats, images, sensitivities),
        args.output: partial(network.save, graph=quantized, quantized=True)})
    return _with_run(written, _run(args.output, network, start, quantized, images.first(VERIFIED)))


def run_train(args: Args) -> Facts:
    _check_outputs(args)
    network, images = _given(args)
    if not args.data:
        args.refuse("training takes images, and ranges come from them, too: give --data FILE.npz")
    weights, activations = asked.quantizers(args)
    if weights is None and activations is None:
        args.refuse("nothing is quantized: leave out --weight-bits float or --activation-bits float")
    labels = None if args.labels is None else files.load_labels(args.labels, len(images))
    state = None if args.resume is None else files.load_state(args.resume)
    _proven(network, images)
    start = _folded(args, network.graph)
    stats = calibrate(start, asked.progress(images.batches(), "calibrating"))
    loss = "squared_error" if labels is None else "cross_entropy"
    bar = iter(asked.progress(range(args.steps), "training", args.steps))
    training = train(start, shuffled(images.arrays, labels, size=min(args.batch_size, len(images)), seed=args.seed), stats=stats,
                     weights=weights, activations=activations, steps=args.steps, parameters=args.parameters, ranges=args.ranges, loss=loss,
                     learning_rate=args.learning_rate, schedule=args.schedule, state=state, stop=args.stop,
                     progress=lambda *_: next(bar, None))
    facts: Facts = {**_file(network), "quantizer": asked.quantizer_name(args), "data": images.source, "parameters": args.parameters,
                    "ranges": args.ranges, "loss": loss, "steps": training.state.step, **_batchnorms(start, network.graph)}
    for side, graph in (("before", _quantized(args, start, stats, None)), ("after", training.graph)):
        noise = _noise(start, graph, images)
        facts[side] = {"loss": mean_loss(start, graph, _pairs(images, labels), loss=loss),
                       "sqnr": {name: noise[name] for name in start.outputs}}
        if labels is not None:
            facts[side]["top1"] = float((_joined([_outputs(graph, x) for x in images.batches()])[graph.outputs[0]].argmax(axis=1)
                                         == labels).mean())
    facts["ok"] = facts["after"]["loss"] <= facts["before"]["loss"]
    written = _written(facts, args, {
        args.report: lambda path: _write_json(path, facts | {"losses": training.losses.tolist()}),
        args.state: partial(files.save_arrays, arrays=training.state.arrays()),
        args.output: partial(network.save, graph=training.graph, quantized=True)})
    return _with_run(written, _run(args.output, network, start, training.graph, images.first(VERIFIED)))


def run_verify(args: Args) -> Facts:
    network, other = _networks(args, args.network, args.other)
    images = _images(args, network)
    for one in (network, other):
        _proven(one, images)
    return {**_file(network), "other": args.other, **_verification(network.graph, other.graph, images, len(images))}


def run_report(args: Args) -> Facts:
    network, images = _given(args)
    graph = network.graph
    stats = _calibrated(args, graph, images)
    sensitivities = asked.sensitivities(args, graph, stats, images)
    noise = _noise(graph, _quantized(args, graph, stats, sensitivities), images) if stats else {}
    return {"ok": True, **_file(network), "quantizer": asked.quantizer_name(args), "data": images.source if stats else None,
            **_batchnorms(graph), "tensors": _tensors(args, graph, stats, noise, sensitivities)}


def run_conform(args: Args) -> Facts:
    from eqfact.testing import cases, reporting, runner  # as in __main__
    outputs = (args.junit, args.html)
    files.check_outputs(outputs)
    chosen = cases.all_cases(args.level) if args.cases is None else cases.read(args.cases, args.level)
    if not chosen:
        raise ValueError(f"'{args.cases}' holds no cases of these levels")
    timeout = runner.TIMEOUT if args.timeout is None else args.timeout
    run = runner.run(args.cmd, asked.progress(chosen, "cases"), timeout=timeout)
    files.write_all({args.junit: partial(reporting.write_junit, run=run), args.html: partial(reporting.write_html, run=run)})
    return {**reporting.facts(run), "junit": args.junit, "html": args.html}


# ---------------------------------------------------------------------------------------------------------------
# Steps that several commands share.

def _check_outputs(args: Args) -> None:
    if "output" in args:
        files.network_kind(args.output)
    plots = [path for _, path in getattr(args, "plot", ())]
    files.check_outputs([*(getattr(args, name) for name in ("output", "factors", "state", "report") if name in args), *plots])
    for path in plots:
        plotting.check_path(path)


def _networks(args: Args, *paths: str) -> list[files.Network]:
    """The networks in these files; the options for ONNX go to those that are ONNX, of which there must be one then."""
    shapes: dict[str, Sequence[int]] = dict(args.input_shape)
    if len(shapes) < len(args.input_shape):
        args.refuse(f"--input-shape names an input twice: {', '.join(name for name, _ in args.input_shape)}")
    for flag, given in (("--input-shape", shapes), ("--strict", args.strict)):
        if given and all(files.network_kind(path) == ".npz" for path in paths):
            args.refuse(f"{flag} is for ONNX files: leave it out for {' and '.join(map(repr, paths))}")
    return [files.load_network(path, data=getattr(args, "data", None), input_shapes=shapes, strict=args.strict) for path in paths]


def _given(args: Args) -> tuple[files.Network, files.Images]:
    (network,) = _networks(args, args.network)
    return network, _images(args, network)


def _images(args: Args, network: files.Network) -> files.Images:
    return files.load_images(args.data, network) if args.data else files.random_images(network)


def _file(network: files.Network) -> Facts:
    """What of a file is understood."""
    kept = [] if network.file is None else [asdict(kept) for kept in network.file.kept]
    return {"network": network.path, "partly": network.partly, "kept": kept}


def _proven(network: files.Network, images: files.Images, graph: Graph | None = None, path: str | None = None) -> None:
    """:class:`ValueError` if a file does not compute what eqfact takes it for, by another runtime's account."""
    verdict = network.prove(network.graph if graph is None else graph, images.feeds, path)
    if verdict is not None and not verdict.equal:
        what = "the file was misread" if path is None else "what was written is not the network"
        raise ValueError(f"'{network.path}': {what}: {verdict.message}; nothing is written, please report this")


def _save(path: str, network: files.Network, graph: Graph, images: files.Images) -> None:
    """Write a network and look at what was written."""
    network.save(path, graph)
    if files.network_kind(path) == ".onnx":
        _proven(network, images, graph, path)


def _parameters(graph: Graph) -> int:
    """Weights and biases, shared ones once."""
    ops = {id(node.op): node.op for node in graph.nodes if isinstance(node.op, Weighted)}
    return sum(op.weight.size + (0 if op.bias is None else op.bias.size) for op in ops.values())


def _batchnorms(graph: Graph, unfolded: Graph | None = None) -> Facts:
    """How many BatchNorms were folded; those that can still be, and those that cannot, with the reason."""
    stay = folding_obstacles(graph)
    return {"folded": 0 if unfolded is None else len(unfolded) - len(graph),
            "foldable": [node.name for node in graph.nodes if isinstance(node.op, BatchNorm) and node.name not in stay], "unfoldable": stay}


def _calibrated(args: Args, graph: Graph, images: files.Images) -> Statistics | None:
    """Statistics over the images that the user gave; random numbers would say nothing about ranges."""
    if not args.data:
        return None
    return calibrate(graph, asked.progress(images.batches(), "calibrating"), histograms=clips(*asked.quantizers(args)))


def _folded(args: Args, graph: Graph) -> Graph:
    """Without BatchNorms, as engines run it; where outputs must stay bit for bit the same only if asked, because folding rounds."""
    fold = not getattr(args, "exact", False) if args.fold is None else args.fold
    return fold_batchnorm(graph) if fold else graph


def _equalized(args: Args, unfolded: Graph, graph: Graph, stats: Statistics | None, images: files.Images, partly: bool) -> EqualizeResult:
    of_method = {name: value for name in ("max_factor", "tol", "max_iter", "preactivation") if (value := getattr(args, name)) is not None}
    options = {name: value for name in ("include", "exclude", "harmless") if (value := getattr(args, name))}
    if args.apply:
        if of_method or options:
            args.refuse(f"--apply takes the factors as they are: leave out --{next(iter(of_method | options)).replace('_', '-')}")
        factorization = files.load_factors(args.apply, graph)
        factorization = factorization.power_of_two() if args.exact else factorization
        return EqualizeResult(factorization.apply(graph), factorization, True, f"factors of '{args.apply}' applied", 0, (),
                              factorization.channels.pinned)
    name = asked.method(args)
    if stats is None and name not in DATA_FREE:
        args.refuse(f"--method {name} needs the ranges of activations: give --data FILE.npz")
    kind = METHODS[name]
    for option in of_method:
        if option not in {of.name for of in fields(kind)}:
            args.refuse(f"--{option.replace('_', '-')} is not for method {name}")
    weights, activations = asked.quantizers(args)
    if stats is not None:
        options["data"] = asked.progress(images.batches(), "looking at images")
        if name == "optimal":
            of_method["ranges"] = likely_ranges(graph, stats, batchnorm_gaussians(unfolded))
    result = equalize(graph, kind(**of_method), stats=stats, weights=weights, activations=activations, exact=args.exact, **options)
    if partly and result.predicted:
        ends = "output" if len(graph.outputs) == 1 else f"{len(graph.outputs)} outputs"
        result = replace(result, message=f"{result.message}; noise is weighed at the {ends} of what is understood, relative to the power "
                                         "of each")
    return result


def _before_and_after(args: Args, start: Graph, result: EqualizeResult, stats: Statistics | None, images: files.Images) -> Facts:
    """What equalization changed: range ratios and, on images, the noise of the quantized network."""
    facts: Facts = {"quantizer": asked.quantizer_name(args), "data": images.source if stats else None, "tensors": {}}
    sensitivities = asked.sensitivities(args, start, stats, images)
    for side, graph in (("before", start), ("after", result.graph)):
        if sensitivities is not None and side == "after":
            sensitivities = sensitivities.rescaled(start, result.factorization)
        of = result.factorization.apply(stats) if stats and side == "after" else stats
        measured: Facts = {"weight_ratio": report.largest_ratio(report.weight_ranges(graph))}
        noise: dict[str, float] = {}
        if of is not None:
            noise = _noise(graph, _quantized(args, graph, of, sensitivities), images)
            measured["value_ratio"] = report.largest_ratio(report.value_ranges(graph, of))
            measured["sqnr"] = {name: noise[name] for name in graph.outputs}
        facts[side] = measured
        facts["tensors"][side] = _tensors(args, graph, of, noise, sensitivities) if args.report else []
    return facts


def _verification(graph: Graph, other: Graph, images: files.Images, count: int = VERIFIED) -> Facts:
    images = images.first(count)
    verdict = report.verify_batches(graph, other, asked.progress(images.batches(), "verifying"))
    return {"ok": verdict.equal, "verification": {**asdict(verdict), "data": images.source}}


def _pairs(images: files.Images, labels: Any) -> list[Any]:
    """The batches, with their labels if there are any."""
    parts = images.batches()
    return parts if labels is None else [(x, labels[i * images.size:(i + 1) * images.size]) for i, x in enumerate(parts)]


def _run(path: str, network: files.Network, graph: Graph, quantized: Graph, images: files.Images) -> Facts | None:
    """How far onnxruntime's outputs of a written file are from eqfact's, as a share of the largest; None for other files, or without it.

    And how far its sums of 16 bits, of which processors without VNNI have one of two products, are from whole ones. Outputs that kept nodes
    make are compared with those of the file that was read alone.
    """
    if files.network_kind(path) != ".onnx":
        return None
    from eqfact.onnx import OnnxError, running
    if not running.runtime().startswith("onnxruntime"):
        return None
    facts: Facts = {"with": running.runtime(), "data": images.source}
    if network.file is not None and not network.file.alone_quantized:
        feeds = network.file.parts(images.feeds, VERIFIED)
        ours = {} if network.partly else _joined([network.file.shown(_outputs(quantized, network.file.boundary(feed))) for feed in feeds])
        truth = _joined([running.run(network.path, feed) for feed in feeds])
    else:
        feeds = running.fed(path, {name: array.astype(np.float32) for name, array in images.arrays.items()})
        ours = _joined([_outputs(quantized, feed) for feed in feeds])
        truth = _joined([_outputs(graph, feed) for feed in feeds])
    truth = {name: array for name, array in truth.items() if array.dtype.kind == "f"}

    def theirs(entries: Mapping[str, str]) -> dict[str, Any]:
        answers = _joined([running.run(path, feed, optimized=True, entries=entries) for feed in feeds])
        return {name: answers[name] for name in truth}

    def apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, float]:
        return {name: float(np.abs(a[name] - b[name]).max() / (np.abs(b[name]).max() or 1)) for name in b}
    try:
        default = theirs({})
        facts |= {"difference": apart(default, ours), "expected_sqnr": {name: sqnr(truth[name], ours[name]) for name in ours},
                  "sqnr": {name: sqnr(truth[name], default[name]) for name in truth}}
        return facts | {"saturated": max(apart(default, theirs(running.EXACT_SUMS)).values(), default=0.0)}
    except OnnxError as error:
        return facts | {"error": str(error)}


def _with_run(facts: Facts, run: Facts | None) -> Facts:
    """A file that does not run is there, to be looked at, and no success."""
    return facts | {"run": run, "ok": facts["ok"] and "error" not in (run or {})}


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Arrays by name, joined along their first axis."""
    return {name: np.concatenate([part[name] for part in parts]) if len(parts) > 1 else parts[0][name] for name in parts[0]}


def _outputs(graph: Graph, feed: Mapping[str, Any]) -> Mapping[str, Any]:
    y = forward(graph, feed)
    return y if isinstance(y, Mapping) else {graph.outputs[0]: y}


def _written(facts: Facts, args: Args, writers: Mapping[str | None, Callable[[str], object]]) -> Facts:
    """The facts, after the files are written, unless a verdict forbids it."""
    forbidden = "verification" in facts and not facts["verification"]["equal"]
    facts["output"] = None if forbidden else args.output
    if "plot" in args:
        facts["plots"] = [] if forbidden else figures.drawn(args)
    if forbidden:
        return facts
    files.write_all(writers)
    return facts


def _quantized(args: Args, graph: Graph, stats: Statistics | None, sensitivities: Sensitivities | None) -> Graph:
    weights, activations = asked.quantizers(args)
    return quantize(graph, weights=weights, activations=activations, stats=stats, sensitivities=sensitivities)


def _noise(graph: Graph, quantized: Graph, images: files.Images) -> dict[str, float]:
    return report.local_sqnr(graph, quantized, asked.progress(images.batches(), "measuring"))


def _tensors(args: Args, graph: Graph, stats: Statistics | None, noise: Mapping[str, float],
             sensitivities: Sensitivities | None) -> list[Facts]:
    """The rows of the report on what is quantized: weights and, with images, values."""
    weights, activations = asked.quantizers(args)
    rows = report.weight_report(graph, weights, sensitivities) if weights else []
    if activations and stats:
        rows += report.value_report(graph, stats, noise, activations.bits)
    return [asdict(row) for row in rows]


def _write_json(path: str, facts: Facts) -> None:
    with open(path, "x", encoding="utf-8") as file:
        file.write(as_json(facts, indent=1) + "\n")


def as_json(facts: Facts, indent: int | None = None) -> str:
    """Standard JSON: numbers that are not finite become the strings ``"inf"`` and ``"-inf"``.

    >>> as_json({"sqnr": math.inf, "shape": (3, 8)})
    '{"sqnr": "inf", "shape": [3, 8]}'
    """
    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(v) for key, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(facts), allow_nan=False, indent=indent)
