"""eqfact: the reference implementation of network equalization (weight factorization for quantization).

The modules, each with one question: :mod:`~eqfact.ops` and :mod:`~eqfact.graph` (what is a network),
:mod:`~eqfact.channels` (which factors are free), :mod:`~eqfact.factorization` (apply them), and on top of these
folding, calibration, rules, equalization, quantization, metrics and serialization.
"""

from eqfact.calibration import Statistics, ValueStatistics, calibrate
from eqfact.channels import Channels, channels, degrees_of_freedom
from eqfact.equalization import EqualizeResult, equalize
from eqfact.factorization import Factorization
from eqfact.folding import fold_batchnorm, folding_obstacles
from eqfact.gradients import Gradients, backward
from eqfact.graph import Graph, Node, forward, values
from eqfact.metrics import Verification, sqnr, verify
from eqfact.ops import *  # noqa: F403
from eqfact.ops import __all__ as _ops
from eqfact.ops.grid import Grid
from eqfact.quantization import FakeQuantize, UniformQuantizer, quantize

__version__ = "0.1.0"

__all__ = [
    "Channels", "EqualizeResult", "Factorization", "FakeQuantize", "Gradients", "Graph", "Grid", "Node", "Statistics", "UniformQuantizer",
    "ValueStatistics", "Verification",
    "backward", "calibrate", "channels", "degrees_of_freedom", "equalize", "fold_batchnorm", "folding_obstacles", "forward", "quantize", "sqnr",
    "values", "verify",
    *_ops,
]
