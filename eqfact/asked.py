"""What is the command line asked for? The method, the quantizers and the sensitivities that parsed arguments mean."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import TypeVar

from eqfact import files
from eqfact.calibration import Statistics
from eqfact.equalization import SENSED
from eqfact.gradients import Sensitivities
from eqfact.graph import Graph
from eqfact.noise import measured_sensitivities
from eqfact.quantizers import UniformQuantizer

Args = argparse.Namespace
Item = TypeVar("Item")


def method(args: Args) -> str:
    """What factors come from: the method named, or else the best for what is given."""
    return "apply" if args.apply else args.method or ("optimal" if args.data else "cross_layer")


def quantizers(args: Args) -> tuple[UniformQuantizer | None, UniformQuantizer | None]:
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


def sensitivities(args: Args, graph: Graph, stats: Statistics | None, images: files.Images) -> Sensitivities | None:
    """For quantizers that end their grids by them: of at most ``SENSED`` of the images, or else of the statistics; None for others."""
    if all(q is None or q.range != "noise" for q in quantizers(args)):
        return None
    if stats is None:
        args.refuse("the range 'noise' is weighed by sensitivities, which come from images: give --data FILE.npz")
        return None
    return measured_sensitivities(graph, stats, images.first(SENSED).batches())


def quantizer_name(args: Args) -> str:
    """For instance ``W8A8``, or ``W4A32, weights per_channel, activations mse``."""
    ways = [f"{what} {way}" for what, *ways in (("weights", args.weight_granularity, args.weight_range),
                                                 ("activations", args.activation_granularity, args.activation_range))
            for way in ways if way not in ("per_tensor", "minmax")]
    return ", ".join([f"W{args.weight_bits or 32}A{args.activation_bits or 32}", *ways])


def progress(items: Iterable[Item], what: str, total: int | None = None) -> Iterable[Item]:
    """A bar on stderr, if that is a terminal, tqdm is installed, and it takes longer than a second."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    bar: Iterable[Item] = tqdm(items, what, total, leave=False, delay=1, disable=not sys.stderr.isatty(), file=sys.stderr)
    return bar
