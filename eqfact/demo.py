"""What does equalization give back? Every method against every bit-width, on the bundled network and its images.

The network is a small MobileNetV2, trained on scikit-learn's handwritten digits (``benchmarks/train_digits.py``). It is folded,
calibrated on images it was trained with, quantized per tensor, and measured on images that it has never seen.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from time import perf_counter

import numpy as np
import numpy.typing as npt

from eqfact import serialization
from eqfact.calibration import Statistics, calibrate
from eqfact.correction import correct_bias
from eqfact.equalization import EqualizeResult, equalize
from eqfact.folding import fold_batchnorm
from eqfact.graph import Graph, forward
from eqfact.metrics import sqnr
from eqfact.ops.base import Array
from eqfact.quantization import quantize
from eqfact.quantizers import UniformQuantizer
from eqfact.report import largest_ratio, value_ranges, weight_ranges
from eqfact.verification import Verification, verify

#: What the white of a pixel is; the network reads pixel / 16.
WHITE = np.float32(16)
#: Bits of the weights, one column each; activations have 8.
BITS = (8, 6, 5, 4)
#: Images in a batch, and how many of the held-out ones each network is verified on.
BATCH, VERIFIED = 120, 40
#: Row, method, granularity of the weights, whether biases are corrected.
ROWS: tuple[tuple[str, str | None, str, bool], ...] = (
    ("none", None, "per_tensor", False),
    ("one-step", "one_step", "per_tensor", False),
    ("two-step", "two_step", "per_tensor", False),
    ("cross-layer", "cross_layer", "per_tensor", False),
    ("optimal", "optimal", "per_tensor", False),
    ("per-channel", None, "per_channel", False),
    ("cross-layer + bias corr.", "cross_layer", "per_tensor", True),
    ("optimal + bias corr.", "optimal", "per_tensor", True),
    ("per-channel + bias corr.", None, "per_channel", True),
)


@dataclass(frozen=True, eq=False)
class Bundle:
    """The bundled network, its calibration images, held-out images ``(N, 1, 8, 8)`` with their labels ``(N,)``, and the
    images that the network was trained on.
    """

    network: Graph
    calibration: Array
    images: Array
    labels: npt.NDArray[np.uint8]
    train: Array
    train_labels: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Quality:
    """Share of the held-out images whose label comes first, and SQNR of the logits against the float network in dB."""

    bits: int
    top1: float
    sqnr: float


@dataclass(frozen=True, eq=False)
class Row:
    """What one method does; rows without equalization have nothing to verify."""

    name: str
    quality: tuple[Quality, ...]
    #: Largest channel-range ratio of any weight tensor and of any stored value, after equalization.
    weight_ratio: float
    value_ratio: float
    verification: Verification | None
    #: Time of equalization in seconds.
    seconds: float
    #: The float network, folded and equalized, and what equalization found; None where there was none.
    graph: Graph
    result: EqualizeResult | None


def load_bundle() -> Bundle:
    """Read the bundled network and images.

    >>> load_bundle().images.shape
    (360, 1, 8, 8)
    """
    folder = resources.files("eqfact") / "data"
    with resources.as_file(folder / "digits_mobilenet.npz") as path:
        network = serialization.load(path)
    with np.load(io.BytesIO((folder / "digits_images.npz").read_bytes())) as data:
        return Bundle(network, data["calibration"] / WHITE, data["images"] / WHITE, data["labels"], data["train"] / WHITE,
                      data["train_labels"])


def rows(bundle: Bundle) -> Iterator[Row]:
    """The rows of the table, one after the other (each takes about a second)."""
    folded = fold_batchnorm(bundle.network)
    stats = calibrate(folded, bundle.calibration)
    truth = logits(bundle.network, bundle.images)
    for name, method, granularity, corrected in ROWS:
        graph, of, verification, seconds, result = folded, stats, None, 0.0, None
        if method is not None:
            start = perf_counter()
            result = equalize(folded, method, stats=stats, data=bundle.calibration if method == "optimal" else None)
            seconds = perf_counter() - start
            graph, of = result.graph, result.factorization.apply(stats)
            verification = verify(bundle.network, graph, bundle.images[:VERIFIED])
        quality = tuple(_quality(graph, of, UniformQuantizer(bits=n, granularity=granularity), bundle, truth, corrected) for n in BITS)
        yield Row(name, quality, largest_ratio(weight_ranges(graph)), largest_ratio(value_ranges(graph, of)), verification, seconds, graph,
                  result)


def logits(graph: Graph, images: Array) -> Array:
    """The output of the network, in batches."""
    return np.concatenate([forward(graph, images[i:i + BATCH]) for i in range(0, len(images), BATCH)])


def top1(outputs: Array, labels: npt.NDArray[np.uint8]) -> float:
    """Share of the images whose label has the largest logit."""
    return float((outputs.argmax(axis=1) == labels).mean())


def _quality(graph: Graph, stats: Statistics, weights: UniformQuantizer, bundle: Bundle, truth: Array, corrected: bool) -> Quality:
    quantized = quantize(graph, stats=stats, weights=weights, activations=UniformQuantizer(bits=8, symmetric=False))
    if corrected:
        quantized = correct_bias(graph, quantized, bundle.calibration).graph
    outputs = logits(quantized, bundle.images)
    return Quality(weights.bits, top1(outputs, bundle.labels), sqnr(truth, outputs))
