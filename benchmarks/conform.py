"""Which conformance cases do other tools pass? `python -m benchmarks conform` asks them, each in its own environment; docs/peers.md.

Fair: a tool is asked the levels that it claims, in single precision; what it does not take, or leaves as it is, is skipped.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import peers
from benchmarks.packages import cache
from eqfact.testing.cases import all_cases
from eqfact.testing.cases.case import Case
from eqfact.testing.cases.networks import cast
from eqfact.testing.runner import VERDICTS, Outcome, Run, run
from eqfact.testing.wire import arrays_json, arrays_of, network_json, network_of

PAGE = Path(__file__).parents[1] / "docs" / "peers.md"
NEEDED = ("numpy", "scipy", "onnx", "onnxruntime")
TOOLS = {"brevitas": peers.BREVITAS, "aimet": peers.AIMET, "ppq": peers.PEERS["PPQ"].requirements, "quark": peers.QUARK,
         "onnxsim": peers.PEERS["onnxsim"].requirements, "torch_ao": (peers.TORCH,)}
TIMEOUT = 60.0
SHOWN = 12
#: Tools stop balancing by thresholds of their own: so near is balanced.
BALANCED = 0.05
#: Tools that balance something else than the largest magnitude, and what; of these no balance is asked, but the function.
OTHERWISE = {"torch_ao": "balances max - min of a channel's weights, so no balance of magnitudes is asked of it"}


def asked(balance: bool = True) -> list[Case]:
    """The cases that tools are asked: folding and balance, of networks in single precision; and grids.

    No balance of a BatchNorm that is there: all of them fold first.
    """
    single = (_single(case, balance) for case in all_cases([1, 4, 5]) if case.expected["judge"] == "network"
              or (case.expected["judge"] == "balanced" and "batchnorm" not in case.id)
              or case.ask in ("quantize", "dequantize"))
    return [*{case.id: case for case in single}.values()]


def _single(case: Case, balance: bool) -> Case:
    """The case in single precision."""
    if case.expected["judge"] == "balanced":
        case = replace(case, expected={**case.expected, "relative": BALANCED,
                                            "balanced": case.expected["balanced"] and balance})
    if "network" not in case.request or case.id.endswith("-float32"):
        return case
    graph = network_of(case.request["network"])
    done = {id(node.op): cast(node.op, "float32") for node in graph.nodes}
    graph = graph.with_ops({node.name: done[id(node.op)] for node in graph.nodes})
    inputs = {name: x.astype(np.float32) for name, x in arrays_of(case.expected["inputs"]).items()}
    return replace(case, id=case.id.replace("float64", "float32"), request={**case.request, "network": network_json(graph)},
                   expected={**case.expected, "inputs": arrays_json(inputs), "exact": False})


def row(tool: str) -> Run | str:
    """What came of a tool, or why it could not be asked."""
    try:
        python = peers.environment(cache() / "conform" / tool, (*TOOLS[tool], *NEEDED))
        return run([str(python), "-m", f"benchmarks.adapters.{tool}"], asked(tool not in OTHERWISE), timeout=TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        return str(error)


def _kind(outcome: Outcome) -> str:
    """What is wrong with an answer, in a word."""
    assert outcome.wrong is not None
    where = outcome.wrong.where
    if where.startswith("output"):
        return "another function"
    if where.startswith("channel"):
        return "not balanced"
    if where.startswith("answer"):
        return outcome.wrong.got.partition(":")[0]
    return "other " + where.partition(" ")[0].partition("[")[0].strip("'")


def page(found: dict[str, Run | str]) -> str:
    """The table, and what failed."""
    lines = ["# Other tools on the conformance cases", "",
             "What six tools answer to the cases of [porting.md](porting.md) that they claim to: folding of BatchNorms (level 1),",
             "cross-layer equalization (level 4) and rounding to grids (level 5), in single precision. Passed / failed / skipped; what a",
             "tool does not claim, does not take, or leaves as it is, is skipped. Tools are set to balance weights alone, as far as they",
             "can; as they stop by thresholds of their own, ranges within 5 % of each other count as balanced. Made by",
             "`python -m benchmarks conform`; the adapters are in `benchmarks/adapters/`.", "",
             "| tool | folding | equalization | grids | another function | not balanced |", "|---|---|---|---|---|---|"]
    details: list[str] = []
    for tool, result in found.items():
        if isinstance(result, str):
            lines.append(f"| {tool} | could not be asked: {result} | | | | |")
            continue
        name = f"{result.hello['name']} {result.hello['version']}"
        cells = []
        for level in (1, 4, 5):
            counts = " / ".join(str(result.count(verdict, level)) for verdict in VERDICTS)
            cells.append(counts if level in result.hello["levels"] else "not claimed")
        kinds = Counter(_kind(o) for o in result.outcomes if o.verdict == "failed")
        lines.append(f"| {name} | {' | '.join(cells)} | {kinds['another function'] or ''} | {kinds['not balanced'] or ''} |")
        failed = [o for o in result.outcomes if o.verdict == "failed"]
        details += [f"## {name}", ""]
        details += [f"* {OTHERWISE[tool]}"] if tool in OTHERWISE else []
        for outcome in failed[:SHOWN]:
            wrong = outcome.wrong
            assert wrong is not None
            details.append(f"* {outcome.case.id}: {_kind(outcome)}; {wrong.where}: expected {wrong.expected}, got {wrong.got}")
        if len(failed) > SHOWN:
            details.append(f"* and {len(failed) - SHOWN} more")
        reasons = Counter(o.reason for o in result.outcomes if o.verdict == "skipped" and "does not claim" not in o.reason).most_common(5)
        details += [f"* skipped: {count}, {reason}" for reason, count in reasons]
        details.append("")
    return "\n".join([*lines, "", *details]).rstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    """Ask the tools, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks conform", description="Other tools on the conformance cases.")
    parser.add_argument("--only", nargs="+", choices=list(TOOLS), metavar="TOOL", help=f"of {', '.join(TOOLS)}; writes nothing")
    args = parser.parse_args(argv)
    found: dict[str, Run | str] = {}
    for tool in args.only or TOOLS:
        found[tool] = result = row(tool)
        told = result if isinstance(result, str) else ", ".join(f"{result.count(v)} {v}" for v in VERDICTS)
        print(f"{tool}: {told}")
        if args.only and not isinstance(result, str):
            for outcome in result.outcomes:
                print(f"  {outcome.case.id}: {outcome.verdict} {outcome.reason} {outcome.wrong or ''}")
    if args.only is None:
        PAGE.write_text(page(found), encoding="utf-8")
    return 0
