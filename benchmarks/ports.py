"""Does the port within PyTorch pass the conformance cases that it claims? `python -m benchmarks ports`; torch is in this extra alone."""

from __future__ import annotations

import sys
from pathlib import Path

from eqfact.testing.cases import LEVELS, all_cases
from eqfact.testing.runner import VERDICTS, run

PORT = Path(__file__).parents[1] / "docs" / "ports" / "torch_fx.py"
TIMEOUT = 60.0


def main(argv: list[str] | None = None) -> int:
    """Ask it levels 0 to 4, and print what came of them."""
    done = run([sys.executable, str(PORT)], all_cases(range(5)), timeout=TIMEOUT)
    for level in LEVELS[:5]:
        print(f"{level.number} {level.title}: " + ", ".join(f"{done.count(v, level.number)} {v}" for v in VERDICTS))
    for outcome in done.outcomes:
        if outcome.verdict == "failed":
            print(f"{outcome.case.id}: {outcome.wrong}")
    return 0 if done.ok else 1
