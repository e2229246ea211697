"""Which figures is the command line asked for, and can this run draw them? ``--plot [KIND=]FILE``, drawn by :mod:`eqfact.plotting`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from eqfact import asked, files, plotting, report
from eqfact.asked import Args
from eqfact.calibration import Statistics
from eqfact.equalization import SENSED, EqualizeResult
from eqfact.gradients import Sensitivities
from eqfact.graph import Graph
from eqfact.noise import measured_sensitivities, predict_noise
from eqfact.quantization import quantize


def check(args: Args) -> None:
    """Refuse figures that this run has nothing to draw in, before any work is done for them."""
    weights, activations = asked.quantizers(args)
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
        elif kind == "convergence" and asked.method(args) not in ("cross_layer", "optimal"):
            why = f"has nothing to show, '{asked.method(args)}' is one pass: give --method optimal, or cross_layer"
        if why is not None:
            args.refuse(f"--plot {kind}={path} {why}")


def writers(args: Args, draw: Mapping[str, Callable[..., object]]) -> dict[str | None, Callable[[str], object]]:
    """The figures asked for, by file."""
    return {path: partial(_draw, draw[kind]) for kind, path in args.plot}


def _draw(draw: Callable[..., object], path: str) -> None:
    draw(path=path)


def drawn(args: Args) -> list[dict[str, Any]]:
    """What facts say of them."""
    return [{"kind": kind, "file": path} for kind, path in args.plot]


def of_result(result: EqualizeResult | None, title: str, quantizer: str) -> dict[str, Callable[..., object]]:
    """The figures that a result is enough for."""
    assert result is not None
    before, after = result.noise or ({}, {})
    return {"noise": partial(plotting.plot_noise, before, after, title=f"{title}, {quantizer}"),
            "convergence": partial(plotting.plot_convergence, result, title=title)}


def draw_weights(args: Args, start: Graph, result: EqualizeResult, stats: Statistics | None, images: files.Images, title: str, *,
                  path: str) -> None:
    """Those on their grid before and after; of a quantizer that weighs noise, with its grids."""
    weights, _ = asked.quantizers(args)
    before = asked.sensitivities(args, start, stats, images)
    after = None if before is None else before.rescaled(start, result.factorization)
    first, second = (quantize(graph, weights=weights, sensitivities=of) for graph, of in ((start, before), (result.graph, after)))
    plotting.plot_weights(first, second, path, noise=result.noise and result.noise[0], title=title)


def of_quantized(args: Args, start: Graph, quantized: Graph, stats: Statistics | None, images: files.Images,
                      sensitivities: Sensitivities | None) -> dict[str | None, Callable[[str], object]]:
    """Those of a network that is quantized; gradients are taken only if one is asked for, measures on as many images as these."""
    if not args.plot:
        return {}
    (weights, activations), few = asked.quantizers(args), images.first(SENSED)
    expected: dict[str, float] | None = None
    rows: list[report.TensorNoise] = []
    if stats is not None and (weights is None or weights.granularity != "per_group"):
        sensitivities = sensitivities or measured_sensitivities(start, stats, few.batches())
        expected = predict_noise(start, stats, weights=weights, activations=activations, sensitivities=sensitivities)
        if any(kind == "predicted" for kind, _ in args.plot):
            rows = report.noise_report(start, asked.progress(few.batches(), "measuring tensors"), weights=weights, activations=activations,
                                       sensitivities=sensitivities, stats=stats)
    title = f"{os.path.basename(args.network)}, {asked.quantizer_name(args)}"
    return writers(args, {"weights": partial(plotting.plot_weights, quantized, noise=expected, title=title),
                           "noise": partial(plotting.plot_noise, expected or {}, title=title),
                           "predicted": partial(plotting.plot_predicted, rows, title=f"{title}, on {few.source}")})
