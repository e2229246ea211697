"""What does each subcommand find out and do? From parsed arguments to *facts*: plain data, printed as they are with ``--json``.

``facts["ok"]`` is the verdict. Networks and images are read first, files are written last, all of them or none; a network that
is not the same function as the one given is never written. :mod:`eqfact.__main__` has the arguments, the texts and the exit status.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from eqfact import demo, files, plotting, report
from eqfact.calibration import Statistics, calibrate, likely_ranges
from eqfact.channels import channels
from eqfact.correction import batchnorm_gaussians
from eqfact.equalization import SENSED, EqualizeResult, equalize
from eqfact.folding import fold_batchnorm, folding_obstacles
from eqfact.freeing import add_scales, slope_gates
from eqfact.gradients import Sensitivities
from eqfact.graph import Graph, forward
from eqfact.methods import METHODS
from eqfact.metrics import sqnr
from eqfact.noise import measured_sensitivities, predict_noise
from eqfact.ops import BatchNorm, Weighted
from eqfact.quantization import UniformQuantizer, clips, quantize
from eqfact.training import mean_loss, shuffled, train

Args = argparse.Namespace
Facts = dict[str, Any]
Item = TypeVar("Item")

#: The methods that do without ``--data``.
DATA_FREE = ("cross_layer",)
#: A rewritten network is verified on at most this many images; ``eqfact verify`` looks at all.
VERIFIED = 4


def run_demo(args: Args) -> Facts:
    _check_outputs(args)
    bundle = demo.load_bundle()
    rows = list(_progress(demo.rows(bundle), "methods", len(demo.ROWS)))
    before, after, best = (next(row for row in rows if row.name == name) for name in ("none", "cross-layer", "optimal"))
    files.write_all(_figures(args, {
        "ranges": partial(plotting.plot_ranges, before.graph, after.graph, title="cross-layer equalization of the bundled network"),
        **_of_result(best.result, "optimal equalization of the bundled network", "W8A8")}))
    return {
        "ok": all(row.verification for row in rows if row.verification is not None),
        "parameters": _parameters(bundle.network), "images": len(bundle.labels), "calibration_images": len(bundle.calibration),
        "verified_images": demo.VERIFIED, "top1": demo.top1(demo.logits(bundle.network, bundle.images), bundle.labels),
        "degrees_of_freedom": channels(before.graph).degrees_of_freedom, "plots": _drawn(args),
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
    _check_plots(args)
    _proven(network, images)
    folded = _folded(args, graph)
    start = slope_gates(folded) if args.slopes else folded
    start = add_scales(start) if args.scales else start
    stats = _calibrated(args, start, images)
    result = _equalized(args, graph, start, stats, images, network.partly is not None)
    facts = {**_file(network), "method": _method(args), "success": result.success,
             "message": result.message, "iterations": result.iterations, "residual": result.residual[-1] if result.residual else None,
             "degrees_of_freedom": result.factorization.channels.degrees_of_freedom, "pinned": result.pinned, "gap_db": result.gap_db,
             "predicted_sqnr": result.predicted, **_batchnorms(folded, graph),
             **_before_and_after(args, start, result, stats, images), **_verification(graph, result.graph, images)}
    tensors = facts.pop("tensors")  # for the report file only
    facts["ok"] = facts["ok"] and result.success
    title = f"{os.path.basename(args.network)}: {facts['method']}"
    return _written(facts, args, {
        args.factors: partial(files.save_factors, factorization=result.factorization),
        **_figures(args, {"ranges": partial(plotting.plot_ranges, start, result.graph, title=title),
                          **_of_result(result, title, facts["quantizer"]),
                          "weights": partial(_plot_weights, args, start, result, stats, images, f"{title}, {facts['quantizer']}")}),
        args.report: lambda path: _write_json(path, facts | {"tensors": tensors}),
        args.output: partial(_save, network=network, graph=result.graph, images=images)})


def run_quantize(args: Args) -> Facts:
    _check_outputs(args)
    network, images = _given(args)
    graph = network.graph
    if args.activation_bits is not None and not args.data:
        args.refuse("the ranges of activations come from images: give --data FILE.npz, or --activation-bits float")
    _check_plots(args)
    _proven(network, images)
    start = _folded(args, graph)
    stats = _calibrated(args, start, images)
    sensitivities = _sensitivities(args, start, stats, images)
    quantized = _quantized(args, start, stats, sensitivities)
    noise = _noise(start, quantized, images)
    facts = {"ok": True, **_file(network), "quantizer": _quantizer_name(args), "data": images.source,
             "sqnr": {name: noise[name] for name in graph.outputs}, **_batchnorms(start, graph)}
    written = _written(facts, args, {
        args.report: lambda path: _write_json(path, facts | {"tensors": _tensors(args, start, stats, noise, sensitivities)}),
        **_figures_of_noise(args, start, quantized, stats, images, sensitivities),
        args.output: partial(network.save, graph=quantized, quantized=True)})
    return written | {"run": _run(args.output, network, start, quantized, images.first(VERIFIED))}


def run_train(args: Args) -> Facts:
    _check_outputs(args)
    network, images = _given(args)
    if not args.data:
        args.refuse("training takes images, and ranges come from them, too: give --data FILE.npz")
    weights, activations = _quantizers(args)
    if weights is None and activations is None:
        args.refuse("nothing is quantized: leave out --weight-bits float or --activation-bits float")
    labels = None if args.labels is None else files.load_labels(args.labels, len(images))
    state = None if args.resume is None else files.load_state(args.resume)
    _proven(network, images)
    start = _folded(args, network.graph)
    stats = calibrate(start, _progress(images.batches(), "calibrating"))
    loss = "squared_error" if labels is None else "cross_entropy"
    bar = iter(_progress(range(args.steps), "training", args.steps))
    training = train(start, shuffled(images.arrays, labels, size=min(args.batch_size, len(images)), seed=args.seed), stats=stats,
                     weights=weights, activations=activations, steps=args.steps, parameters=args.parameters, ranges=args.ranges, loss=loss,
                     learning_rate=args.learning_rate, schedule=args.schedule, state=state, stop=args.stop,
                     progress=lambda *_: next(bar, None))
    facts: Facts = {**_file(network), "quantizer": _quantizer_name(args), "data": images.source, "parameters": args.parameters,
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
    return written | {"run": _run(args.output, network, start, training.graph, images.first(VERIFIED))}


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
    sensitivities = _sensitivities(args, graph, stats, images)
    noise = _noise(graph, _quantized(args, graph, stats, sensitivities), images) if stats else {}
    return {"ok": True, **_file(network), "quantizer": _quantizer_name(args), "data": images.source if stats else None,
            **_batchnorms(graph), "tensors": _tensors(args, graph, stats, noise, sensitivities)}


def run_conform(args: Args) -> Facts:
    from eqfact.testing import cases, reporting, runner  # as in __main__
    outputs = (args.junit, args.html)
    files.check_outputs(outputs)
    chosen = cases.all_cases(args.level) if args.cases is None else cases.read(args.cases, args.level)
    if not chosen:
        raise ValueError(f"'{args.cases}' holds no cases of these levels")
    timeout = runner.TIMEOUT if args.timeout is None else args.timeout
    run = runner.run(args.cmd, _progress(chosen, "cases"), timeout=timeout)
    files.write_all({args.junit: partial(reporting.write_junit, run=run), args.html: partial(reporting.write_html, run=run)})
    return {**reporting.facts(run), "junit": args.junit, "html": args.html}


# ---------------------------------------------------------------------------------------------------------------
# Steps that several commands share.

def _check_outputs(args: Args) -> None:
    if "output" in args:
        files.network_kind(args.output)
    figures = [path for _, path in getattr(args, "plot", ())]
    files.check_outputs([*(getattr(args, name) for name in ("output", "factors", "state", "report") if name in args), *figures])
    for path in figures:
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
    return calibrate(graph, _progress(images.batches(), "calibrating"), histograms=clips(*_quantizers(args))) if args.data else None


def _folded(args: Args, graph: Graph) -> Graph:
    """Without BatchNorms, as engines run it; where outputs must stay bit for bit the same only if asked, because folding rounds."""
    fold = not getattr(args, "exact", False) if args.fold is None else args.fold
    return fold_batchnorm(graph) if fold else graph


def _method(args: Args) -> str:
    """What factors come from: the method named, or else the best for what is given."""
    return "apply" if args.apply else args.method or ("optimal" if args.data else "cross_layer")


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
    name = _method(args)
    if stats is None and name not in DATA_FREE:
        args.refuse(f"--method {name} needs the ranges of activations: give --data FILE.npz")
    kind = METHODS[name]
    for option in of_method:
        if option not in {of.name for of in fields(kind)}:
            args.refuse(f"--{option.replace('_', '-')} is not for method {name}")
    weights, activations = _quantizers(args)
    if stats is not None:
        options["data"] = _progress(images.batches(), "looking at images")
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
    facts: Facts = {"quantizer": _quantizer_name(args), "data": images.source if stats else None, "tensors": {}}
    sensitivities = _sensitivities(args, start, stats, images)
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
    verdict = report.verify_batches(graph, other, _progress(images.batches(), "verifying"))
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
    if network.partly:
        feeds = network.file.parts(images.feeds, VERIFIED)
        ours = {}
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
        facts["plots"] = [] if forbidden else _drawn(args)
    if forbidden:
        return facts
    files.write_all(writers)
    return facts


def _quantizers(args: Args) -> tuple[UniformQuantizer | None, UniformQuantizer | None]:
    """For weights and for activations; None leaves them in float."""
    weights = activations = None
    rules = (args.weight_range, args.activation_range)
    if args.percentile is not None and "percentile" not in rules:
        args.refuse("--percentile goes with --weight-range percentile or --activation-range percentile")
    percentile = {} if args.percentile is None else {"percentile": args.percentile}
    if args.weight_bits is not None:
        weights = UniformQuantizer(bits=args.weight_bits, symmetric=not args.affine_weights, granularity=args.weight_granularity,
                                   group_size=args.group_size, range=args.weight_range, **percentile)
    if args.activation_bits is not None:
        activations = UniformQuantizer(bits=args.activation_bits, symmetric=args.symmetric_activations,
                                       granularity=args.activation_granularity, range=args.activation_range, **percentile)
    return weights, activations


def _sensitivities(args: Args, graph: Graph, stats: Statistics | None, images: files.Images) -> Sensitivities | None:
    """For quantizers that end their grids by them: of at most ``SENSED`` of the images, or else of the statistics; None for others."""
    if all(q is None or q.range != "noise" for q in _quantizers(args)):
        return None
    if stats is None:
        args.refuse("the range 'noise' is weighed by sensitivities, which come from images: give --data FILE.npz")
        return None
    return measured_sensitivities(graph, stats, images.first(SENSED).batches())


def _quantized(args: Args, graph: Graph, stats: Statistics | None, sensitivities: Sensitivities | None) -> Graph:
    weights, activations = _quantizers(args)
    return quantize(graph, weights=weights, activations=activations, stats=stats, sensitivities=sensitivities)


def _quantizer_name(args: Args) -> str:
    """For instance ``W8A8``, or ``W4A32, weights per_channel, activations mse``."""
    ways = [f"{what} {way}" for what, *ways in (("weights", args.weight_granularity, args.weight_range),
                                                 ("activations", args.activation_granularity, args.activation_range))
            for way in ways if way not in ("per_tensor", "minmax")]
    return ", ".join([f"W{args.weight_bits or 32}A{args.activation_bits or 32}", *ways])


def _noise(graph: Graph, quantized: Graph, images: files.Images) -> dict[str, float]:
    return report.local_sqnr(graph, quantized, _progress(images.batches(), "measuring"))


def _tensors(args: Args, graph: Graph, stats: Statistics | None, noise: Mapping[str, float],
             sensitivities: Sensitivities | None) -> list[Facts]:
    """The rows of the report on what is quantized: weights and, with images, values."""
    weights, activations = _quantizers(args)
    rows = report.weight_report(graph, weights, sensitivities) if weights else []
    if activations and stats:
        rows += report.value_report(graph, stats, noise, activations.bits)
    return [asdict(row) for row in rows]


def _check_plots(args: Args) -> None:
    """Refuse figures that this run has nothing to draw in, before any work is done for them."""
    weights, activations = _quantizers(args)
    for kind, path in args.plot:
        why = None
        if kind in ("noise", "predicted"):
            if not args.data:
                why = "shows the noise at the output, which takes images: give --data FILE.npz"
            elif getattr(args, "apply", None):
                why = "shows the noise that a method expects: give --method in the place of --apply"
            elif weights is None and activations is None:
                why = "has nothing to show, nothing is quantized: leave out --weight-bits float or --activation-bits float"
            elif weights is not None and weights.granularity == "per_group":
                why = "takes the noise model, which has no grids per group: give --weight-granularity per_channel, which is nearest"
        elif kind == "weights" and weights is None:
            why = "has nothing to show, weights stay in float: leave out --weight-bits float"
        elif kind == "convergence" and _method(args) not in ("cross_layer", "optimal"):
            why = f"has nothing to show, '{_method(args)}' is one pass: give --method optimal, or cross_layer"
        if why is not None:
            args.refuse(f"--plot {kind}={path} {why}")


def _figures(args: Args, draw: Mapping[str, Callable[..., object]]) -> dict[str | None, Callable[[str], object]]:
    """The figures asked for, by file."""
    return {path: partial(_draw, draw[kind]) for kind, path in args.plot}


def _draw(draw: Callable[..., object], path: str) -> None:
    draw(path=path)


def _drawn(args: Args) -> list[Facts]:
    return [{"kind": kind, "file": path} for kind, path in args.plot]


def _of_result(result: EqualizeResult | None, title: str, quantizer: str) -> dict[str, Callable[..., object]]:
    """The figures that a result is enough for."""
    assert result is not None
    before, after = result.noise or ({}, {})
    return {"noise": partial(plotting.plot_noise, before, after, title=f"{title}, {quantizer}"),
            "convergence": partial(plotting.plot_convergence, result, title=title)}


def _plot_weights(args: Args, start: Graph, result: EqualizeResult, stats: Statistics | None, images: files.Images, title: str, *,
                  path: str) -> None:
    """Those on their grid before and after; of a quantizer that weighs noise, with its grids."""
    weights, _ = _quantizers(args)
    before = _sensitivities(args, start, stats, images)
    after = None if before is None else before.rescaled(start, result.factorization)
    first, second = (quantize(graph, weights=weights, sensitivities=of) for graph, of in ((start, before), (result.graph, after)))
    plotting.plot_weights(first, second, path, noise=result.noise and result.noise[0], title=title)


def _figures_of_noise(args: Args, start: Graph, quantized: Graph, stats: Statistics | None, images: files.Images,
                      sensitivities: Sensitivities | None) -> dict[str | None, Callable[[str], object]]:
    """Those of a network that is quantized; gradients are taken only if one is asked for, measures on as many images as these."""
    if not args.plot:
        return {}
    (weights, activations), few = _quantizers(args), images.first(SENSED)
    expected: dict[str, float] | None = None
    rows: list[report.TensorNoise] = []
    if stats is not None and (weights is None or weights.granularity != "per_group"):
        sensitivities = sensitivities or measured_sensitivities(start, stats, few.batches())
        expected = predict_noise(start, stats, weights=weights, activations=activations, sensitivities=sensitivities)
        if any(kind == "predicted" for kind, _ in args.plot):
            rows = report.noise_report(start, _progress(few.batches(), "measuring tensors"), weights=weights, activations=activations,
                                       sensitivities=sensitivities, stats=stats)
    title = f"{os.path.basename(args.network)}, {_quantizer_name(args)}"
    return _figures(args, {"weights": partial(plotting.plot_weights, quantized, noise=expected, title=title),
                           "noise": partial(plotting.plot_noise, expected or {}, title=title),
                           "predicted": partial(plotting.plot_predicted, rows, title=f"{title}, on {few.source}")})


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


def _progress(items: Iterable[Item], what: str, total: int | None = None) -> Iterable[Item]:
    """A bar on stderr, if that is a terminal, tqdm is installed, and it takes longer than a second."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[Item] = tqdm(items, what, total, leave=False, delay=1, disable=not sys.stderr.isatty(), file=sys.stderr)
    return bar
