"""eqfact: the reference implementation of network equalization (weight factorization for quantization).

The modules, each with one question: :mod:`~eqfact.ops` and :mod:`~eqfact.graph` (what is a network),
:mod:`~eqfact.channels` (which factors are free), :mod:`~eqfact.factorization` (apply them), and on top of these
folding, calibration, rules, equalization, quantization, metrics and serialization.
"""

from eqfact.calibration import Statistics, ValueStatistics, calibrate
from eqfact.channels import Channels, channels, degrees_of_freedom
from eqfact.factorization import Factorization
from eqfact.graph import Graph, Node, forward, values
from eqfact.ops import *  # noqa: F403
from eqfact.ops import __all__ as _ops

__version__ = "0.1.0"

__all__ = [
    "Channels", "Factorization", "Graph", "Node", "Statistics", "ValueStatistics",
    "calibrate", "channels", "degrees_of_freedom", "forward", "values",
    *_ops,
]
