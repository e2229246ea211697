"""What does a port or a pass of your own have to keep? Laws to check, random networks to check them on, and questions in any language.

The conformance kit: :mod:`eqfact.testing.cases` are the questions, :mod:`~eqfact.testing.runner` asks an implementation,
:mod:`~eqfact.testing.judging` says when an answer is right, :mod:`~eqfact.testing.adapter` answers for eqfact (docs/porting.md).
:func:`check` tries a pass over PyTorch modules, ONNX models or graphs on networks that Hypothesis draws, and
:func:`parametrize_with_checks` makes tests of it (docs/testing.md). :mod:`eqfact.testing.laws` needs numpy only;
:mod:`eqfact.testing.strategies` needs Hypothesis (the extra ``test``). Neither is imported by the library itself, and nothing but numpy and
scipy is imported before it is needed.
"""

from eqfact.testing.checking import LAWS, Check, Checked, Declined, check, checks, parametrize_with_checks
from eqfact.testing.kinds import KINDS
from eqfact.testing.models import to_onnx
from eqfact.testing.modules import to_torch
from eqfact.testing.shrinking import Violation
from eqfact.testing.sources import source

__all__ = ["KINDS", "LAWS", "Check", "Checked", "Declined", "Violation", "check", "checks", "parametrize_with_checks", "source", "to_onnx",
           "to_torch"]
