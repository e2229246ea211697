"""eqfact: the reference implementation of network equalization (weight factorization for quantization).

What is a network (:mod:`~eqfact.ops`, :mod:`~eqfact.graph`), which factors are free (:mod:`~eqfact.channels`), how are they applied
(:mod:`~eqfact.factorization`) and chosen (:mod:`~eqfact.rules`, :mod:`~eqfact.equalization`, :mod:`~eqfact.optimal`); and what one needs
around that: folding, calibration, quantization, correction, metrics, files. ``eqfact.onnx`` is loaded when it is first used.
"""

from typing import Any

from eqfact.calibration import Statistics, ValueStatistics, calibrate, likely_ranges
from eqfact.channels import Channels, channels, degrees_of_freedom
from eqfact.correction import Correction, absorb_high_bias, batchnorm_gaussians, correct_bias, correct_bias_analytically
from eqfact.equalization import EqualizeResult, equalize
from eqfact.factorization import Factorization
from eqfact.folding import fold_batchnorm, folding_obstacles
from eqfact.freeing import add_scales, slope_gates
from eqfact.gradients import Gradients, backward
from eqfact.graph import Graph, Node, forward, values
from eqfact.histograms import Histogram
from eqfact.methods import CrossLayer, OneStep, Optimal, Swept, TwoStep
from eqfact.metrics import sqnr
from eqfact.noise import NoiseModel, Sensitivities, forward_sensitivities, gradient_sensitivities, noise_model, predict_noise
from eqfact.ops import *  # noqa: F403
from eqfact.ops import __all__ as _ops
from eqfact.ops.grid import Grid
from eqfact.quantization import quantize
from eqfact.quantizers import FakeQuantize, UniformQuantizer
from eqfact.serialization import load, save
from eqfact.training import Training, TrainingState, shuffled, train
from eqfact.verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "Channels", "Correction", "CrossLayer", "EqualizeResult", "Factorization", "FakeQuantize", "Gradients", "Graph", "Grid", "Histogram",
    "Node", "NoiseModel", "OneStep", "Optimal", "Sensitivities", "Statistics", "Swept", "Training", "TrainingState", "TwoStep",
    "UniformQuantizer", "ValueStatistics", "Verification",
    "absorb_high_bias", "add_scales", "backward", "batchnorm_gaussians", "calibrate", "channels", "correct_bias",
    "correct_bias_analytically", "degrees_of_freedom", "equalize", "fold_batchnorm", "folding_obstacles", "forward",
    "forward_sensitivities",
    "gradient_sensitivities", "likely_ranges", "load", "noise_model", "predict_noise", "quantize", "save", "shuffled", "slope_gates",
    "sqnr", "train", "values", "verify",
    *_ops,
]


def __getattr__(name: str) -> Any:
    """``eqfact.onnx`` needs the extra of the same name, so it is imported only where it is used."""
    if name == "onnx":
        import importlib

        try:
            return importlib.import_module("eqfact.onnx")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"eqfact.onnx needs the package {error.name}: pip install 'eqfact[onnx]'", name=error.name) from error
    raise AttributeError(f"module 'eqfact' has no attribute {name!r}")
