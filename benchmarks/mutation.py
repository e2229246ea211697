"""Would the tests notice? Small changes to eqfact, one at a time, each of which some test should fail for.

A change turns a comparison, an operator, a condition or a constant, drops an end of a slice, a named argument or a statement, or returns
an argument instead of what is called with it: never a docstring, an annotation, an assertion or the text of an error. It is made in a
copy of the repository; the tests that are nearest to its module run first. ``docs/mutants.md`` lists changes that change nothing, and
says why.

    python -m benchmarks mutation --sample 600 --seed 0
    python -m benchmarks mutation --only onnx/moving.py metrics.py --all
"""

from __future__ import annotations

import argparse
import ast
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
JUDGED = ROOT / "docs" / "mutants.md"
#: Shares of changes that tests must notice: everywhere, and where wrong factors or wrong files would come from.
GOAL, STRICT_GOAL = 0.95, 1.0
STRICT = ("ops/", "channels", "factorization", "accumulators", "quantization", "quantizers", "verification", "onnx/")
#: A run may take this many times as long as without the change, and some seconds; then it counts as a failure.
PATIENCE, SECONDS = 4.0, 5.0
GIBIBYTES = 8

#: Which tests are nearest to a module: the first entry that its name begins with.
NEAR = {
    "onnx/qdq": "onnx_qdq onnx_errors integers onnx_engines",
    "onnx/exporting": "onnx_roundtrip onnx_errors onnx_qdq onnx_opened onnx_engines main",
    "onnx/writers": "onnx_roundtrip onnx_errors onnx_qdq onnx_opened onnx_engines",
    "onnx/running": "onnx_running onnx_opened main",
    "onnx/checking": "onnx_running onnx_opened onnx_errors main",
    "onnx/origin": "onnx_opened onnx_faults onnx_roundtrip onnx_errors",
    "onnx/opened": "onnx_opened onnx_faults onnx_running onnx_errors",
    "onnx/patching": "onnx_opened onnx_faults onnx_running onnx_errors",
    "onnx/splicing": "onnx_opened onnx_faults onnx_running onnx_errors",
    "onnx/attention": "onnx_attention onnx_errors onnx_opened",
    "onnx/normalizing": "onnx_norms onnx_idioms onnx_errors",
    "onnx/fusing": "onnx_norms onnx_attention onnx_idioms onnx_faults",
    "onnx/": "onnx_idioms onnx_moves onnx_arrangements onnx_errors onnx_faults onnx_opened onnx_roundtrip onnx_backend",
    "ops/grid": "quantization training ops_refusals integers serialization",
    "ops/elementwise": "quantization ops_refusals ops_forward ops_laws gradients graph channels planted onnx_idioms",
    "ops/normalizing": "ops_refusals ops_forward ops_laws gradients channels folding metrics noise serialization onnx_norms integers",
    "ops/attention": "ops_refusals ops_forward ops_laws gradients channels metrics noise serialization onnx_attention certificate",
    "ops/products": "ops_refusals ops_forward ops_laws gradients channels metrics noise serialization onnx_attention integers",
    "ops/": "ops_refusals ops_forward ops_laws gradients graph channels folding planted onnx_idioms integers serialization metrics",
    "graph": "graph channels ops_refusals serialization onnx_errors folding planted main",
    "channels": "channels graph factorization planted equalization",
    "factorization": "factorization channels planted laws_are_needed rules",
    "folding": "folding onnx_faults onnx_idioms planted_rules main",
    "calibration": "calibration laws_are_needed graph planted quantization main",
    "gradients": "gradients noise optimal",
    "rules": "rules equalization planted_rules",
    "blocks": "blocks rules equalization planted_rules",
    "equalization": "equalization rules optimal planted_rules main",
    "methods": "equalization rules clips optimal certificate planted_rules doctests main",
    "clips": "clips doctests quantization",
    "histograms": "clips doctests calibration",
    "freeing": "freeing doctests main",
    "noise": "noise optimal certificate equalization main",
    "optimal": "optimal certificate equalization",
    "logsums": "optimal certificate equalization",
    "accumulators": "quantization training integers onnx_qdq planted_rules noise ops_laws",
    "quantization": "quantization training integers onnx_qdq planted_rules noise ops_laws",
    "quantizers": "quantization training integers onnx_qdq planted_rules noise ops_laws",
    "correction": "correction main",
    "training": "training main",
    "metrics": "metrics planted_rules certificate",
    "verification": "metrics planted_rules certificate main",
    "roundings": "metrics ops_laws planted_rules",
    "serialization": "serialization main",
    "files": "serialization onnx_errors onnx_opened main",
    "testing/laws": "laws_are_needed planted planted_rules strategies architecture",
    "testing/strategies": "strategies planted channels folding",
    "": "main documents architecture",
}

SWAPS = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
         ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"),
         ast.NotIn: ("not in", "in"), ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
         ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "*"), ast.Pow: ("**", "*"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
         ast.And: ("and", "or"), ast.Or: ("or", "and")}
CALLED = {"min": "max", "minimum": "maximum", "any": "all", "floor": "ceil", "argmin": "argmax", "append": "extend"}
CALLED |= {other: one for one, other in CALLED.items() if one != "append"}


@dataclass(frozen=True)
class Change:
    """Bytes ``start`` to ``end`` of a module become ``after``."""
    module: str
    function: str
    line: int
    start: int
    end: int
    after: str
    #: The first line that changes, with ``[before -> after]`` in it.
    text: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.module, self.function, self.text


class Changes:
    """All changes of one module."""

    def __init__(self, module: str, source: bytes) -> None:
        self.module, self.source = module, source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found = [c for change in self.of(ast.parse(source), "") for c in [self.change(*change)] if self.compiles(c)]

    def compiles(self, change: Change) -> bool:
        try:
            compile(mutated(self.source, change), self.module, "exec")
            return True
        except SyntaxError:
            return False

    def change(self, function: str, start: int, end: int, after: str) -> Change:
        line = next(i for i, at in enumerate(self.starts) if at > start)
        begin, stop = self.starts[line - 1], self.source.find(b"\n", end)
        before = self.source[start:end].decode()
        text = f"{self.source[begin:start].decode()}[{before} -> {after}]{self.source[end:stop].decode()}"
        return Change(self.module, function, line, start, end, after, " ".join(text.split()))

    def span(self, node: ast.AST) -> tuple[int, int]:
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore

    def text(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.source[start:end].decode()

    def between(self, left: ast.AST, right: ast.AST, operator: ast.AST) -> Iterator[tuple[int, int, str]]:
        """The operator between two operands is another one."""
        if type(operator) in SWAPS:
            symbol, other = SWAPS[type(operator)]
            at = self.source.index(symbol.encode(), self.span(left)[1], self.span(right)[0])
            yield at, at + len(symbol), other

    def of(self, node: ast.AST, function: str) -> Iterator[tuple[str, int, int, str]]:
        """Changes of a node, and of what stands below it."""
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            function = f"{function}.{node.name}".lstrip(".")
        yield from ((function, *change) for change in self.here(node))
        skipped = (ast.JoinedStr, ast.Raise, ast.Assert)
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list") or isinstance(node, skipped):
                continue
            if isinstance(node, ast.Assign) and "__all__" in self.text(node.targets[0]):
                continue
            if isinstance(node, ast.keyword) and node.arg == "strict":  # of zip: an assertion
                continue
            if isinstance(node, ast.Call) and self.text(node.func).endswith("reshape"):  # any negative size is numpy's -1
                value = [node.func, *(a for a in node.args if self.text(a) != "-1")] if field == "args" else []
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self.of(child, function)

    def here(self, node: ast.AST) -> Iterator[tuple[int, int, str]]:
        """Changes of one node."""
        match node:
            case ast.Compare():
                for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                    yield from self.between(left, right, operator)
            case ast.BinOp(left=ast.Constant(value=str()) | ast.JoinedStr()) | ast.BinOp(right=ast.Constant(value=str()) | ast.JoinedStr()):
                pass
            case ast.BinOp():
                yield from self.between(node.left, node.right, node.op)
            case ast.BoolOp():
                yield from self.between(*node.values[:2], node.op)
                yield from ((*self.span(node), f"({self.text(value)})") for value in node.values if len(node.values) == 2)
                if len(node.values) > 2:
                    yield from ((self.span(a)[1], self.span(b)[1], "") for a, b in zip(node.values, node.values[1:], strict=False))
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                start, symbol = self.span(node)[0], "not" if isinstance(node.op, ast.Not) else "-"
                yield start, start + len(symbol), ""
            case ast.Constant(value=bool()):
                yield *self.span(node), str(not node.value)
            case ast.Constant(value=int() | float()):
                yield *self.span(node), repr(node.value + 1)
                yield *self.span(node), f"({node.value - 1!r})"
            case ast.IfExp():
                yield from ((*self.span(node), f"({self.text(value)})") for value in (node.body, node.orelse))
            case ast.If(test=test):
                yield *self.span(test), f"not ({self.text(test)})"
            case ast.comprehension():
                yield from ((*self.span(test), f"not ({self.text(test)})") for test in node.ifs)
            case ast.Slice():
                yield from ((*self.span(end), "") for end in (node.lower, node.upper) if end is not None)
            case ast.Call(func=ast.Name() | ast.Attribute()):
                name = re.findall(r"\w+", self.text(node.func))[-1]
                if name in CALLED:
                    yield self.span(node.func)[1] - len(name), self.span(node.func)[1], CALLED[name]
                arguments = sorted([*node.args, *node.keywords], key=lambda a: self.span(a))
                for last, argument in zip([None, *arguments], arguments, strict=False):
                    if isinstance(argument, ast.keyword) and argument.arg not in (None, "strict"):
                        yield self.span(last)[1] if last else self.span(argument)[0], self.span(argument)[1], ""
            case ast.Return(value=ast.Call(args=[first, *_])) if not isinstance(first, ast.Starred):
                yield *self.span(node.value), self.text(first)  # type: ignore[arg-type]
            case ast.AugAssign():
                yield from self.between(node.target, node.value, node.op)
                yield *self.span(node), "pass"
            case ast.Raise() | ast.Expr(value=ast.Call()) | ast.Continue() | ast.Break():
                yield *self.span(node), "pass"
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                yield *self.span(node), "pass"


def mutated(source: bytes, change: Change) -> bytes:
    return source[:change.start] + change.after.encode() + source[change.end:]


def judged() -> dict[tuple[str, str, str], str]:
    """The table of changes that change nothing, with the reason for each."""
    rows = [re.split(r" (?<!\\)\| ", line.strip("| \n")) for line in JUDGED.read_text().splitlines() if line.startswith("| `")]
    return {tuple(cell.strip("`").replace(r"\|", "|") for cell in row[:3]): row[3] for row in rows}  # type: ignore[misc]


def modules() -> dict[str, bytes]:
    """The source of every module by its path below eqfact/."""
    package = ROOT / "eqfact"
    return {path.relative_to(package).as_posix(): path.read_bytes() for path in sorted(package.rglob("*.py"))}


def sample(pools: dict[str, list[Change]], count: int, seed: int) -> list[Change]:
    """About so many changes, of the modules in turn, more of large ones by the square root of their sizes: small ones are seen, too."""
    total, chosen = sum(len(pool)**0.5 for pool in pools.values()), list[tuple[float, Change]]()
    for module, pool in pools.items():
        share = min(len(pool), math.ceil(count * len(pool)**0.5 / total))
        chosen += [((i + 1) / share, change) for i, change in enumerate(random.Random(f"{seed} {module}").sample(pool, share))]
    return [change for _, change in sorted(chosen, key=lambda pair: pair[0])]


def _child(copy: Path, test: str) -> None:
    """Run one file of tests in the copy, and end this process with what pytest says."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (GIBIBYTES << 30, GIBIBYTES << 30))
    os.chdir(copy)
    os.environ.update(PYTHONPATH=str(copy), HYPOTHESIS_PROFILE="first")
    sys.path[:] = [str(copy), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    import pytest
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    os._exit(int(pytest.main([*options, f"tests/test_{test}.py"])))


class Runner:
    """A copy of the repository, in which one module at a time is changed."""

    def __init__(self, copy: Path) -> None:
        self.copy, self.took, self.writes = copy, dict[str, float](), 0
        shutil.copytree(ROOT, copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".hypothesis"))
        import numpy  # noqa: F401  what every run needs is imported once, and copied by fork
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import pytest  # noqa: F401
        import scipy.sparse.csgraph  # noqa: F401
        from hypothesis import strategies  # noqa: F401

    def write(self, module: str, source: bytes) -> None:
        path = self.copy / "eqfact" / module
        path.write_bytes(source)
        self.writes += 1  # a time that no compiled file was made at
        os.utime(path, (10**9 + self.writes, 10**9 + self.writes))

    def passes(self, test: str, seconds: float = 3600.0) -> bool:
        process = multiprocessing.get_context("fork").Process(target=_child, args=(self.copy, test))
        process.start()
        process.join(seconds)
        if process.is_alive() and process.pid:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        return process.exitcode == 0

    def survives(self, source: bytes, change: Change, tests: list[str]) -> bool:
        """Do all of these pass, in time? Without the change each must; how long that takes is measured once."""
        for test in tests:
            start = time.perf_counter()
            if test not in self.took and not self.passes(test):
                raise SystemExit(f"tests/test_{test}.py fails without any change")
            self.took.setdefault(test, time.perf_counter() - start)
            self.write(change.module, mutated(source, change))
            passed = self.passes(test, SECONDS + PATIENCE * self.took[test])
            self.write(change.module, source)
            if not passed:
                return False
        return True


def score(killed: int, survived: int) -> str:
    return f"{killed:5d} {survived:8d} {killed / max(killed + survived, 1):7.1%}"


def main(argv: list[str]) -> int:
    """Print what survives, and a table of modules; 1 where too much does."""
    parser = argparse.ArgumentParser("python -m benchmarks mutation", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", metavar="MODULE", help="modules, as paths below eqfact/")
    parser.add_argument("--sample", type=int, default=600, metavar="N", help="about how many changes of all modules together, at the most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="the rest of the sample is left out then")
    parser.add_argument("--all", action="store_true", help="all other tests, too, for what survives the nearest ones")
    args, start = parser.parse_args(argv), time.monotonic()
    sources = modules()
    if set(args.only or ()) - set(sources):
        parser.error(f"no modules: {', '.join(sorted(set(args.only) - set(sources)))}")
    sources = {name: sources[name] for name in args.only or sources}
    every = sorted(path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py"))
    equivalent, counts = judged(), {name: [0, 0, 0] for name in sources}
    pools = {name: Changes(name, source).found for name, source in sources.items()}
    known = {change.key for pool in pools.values() for change in pool}
    for key in [key for key in equivalent if key[0] in sources and key not in known]:
        print(f"{JUDGED.name} judges a change that is not there any more: {': '.join(key)}")
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder))
        for change in sample(pools, args.sample, args.seed):
            if time.monotonic() > start + 60 * args.minutes:
                break
            if change.key in equivalent:
                counts[change.module][2] += 1
                continue
            tests = next(near for start, near in NEAR.items() if change.module.startswith(start)).split()
            tests += [test for test in every if args.all and test not in tests]
            survived = runner.survives(sources[change.module], change, tests)
            counts[change.module][survived] += 1
            if survived:
                print(f"{change.module}:{change.line}: {change.function}: {change.text}", flush=True)
    below = False
    print(f"\n{'module':24s} killed survived   score  judged")
    for name, (killed, survived, same) in counts.items():
        if killed + survived + same:
            print(f"{name:24s} {score(killed, survived)} {same:7d}")
            below |= name.startswith(STRICT) and killed < STRICT_GOAL * (killed + survived)
    killed, survived, same = (sum(column) for column in zip(*counts.values(), strict=True))
    print(f"{'all':24s} {score(killed, survived)} {same:7d}")
    return int(below or killed < GOAL * (killed + survived))
