"""Would the tests notice? Small changes to eqfact, one at a time, each of which some test should fail for.

A change turns a comparison, an operator, a condition or a constant, takes the next for an index, drops an end of a slice, a named argument
or a statement, or returns an argument instead of what is called with it: never a docstring, an annotation, an assertion or the text of an
error. All tests are run once to see which functions each of them enters (some ten minutes, remembered until eqfact or the test changes);
then a changed function is asked of the tests that enter it. ``docs/mutants.md`` lists changes that change nothing, and says why. A change
that no test notices within ``--budget`` seconds of tests is printed; an error counts as noticed, as does a test that runs for ever.

    python -m benchmarks mutation --sample 600 --seed 0
    python -m benchmarks mutation --only onnx/moving.py metrics.py
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import CodeType, FunctionType
from typing import TypeVar

import pytest

from benchmarks.packages import cache

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "eqfact"
JUDGED = ROOT / "docs" / "mutants.md"
#: Shares of changes that tests must notice: everywhere, and where wrong factors or wrong files would come from.
GOAL, STRICT_GOAL = 0.95, 1.0
STRICT = ("ops/", "channels", "factorization", "accumulators", "quantization", "quantizers", "verification", "onnx/")
#: Tests may take this many times as long as without the change, and some seconds; then they count as failed.
PATIENCE, SECONDS = 4.0, 5.0
GIBIBYTES = 8
OPTIONS = ["-qq", "--tb=no", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::pytest.PytestAssertRewriteWarning",
           "-o", "markers=xdist_group: it is not used here"]
CASES = "testing/cases/"  #: what they find is measured by ``python -m benchmarks faults``
FUNCTION = 1  # inspect.CO_OPTIMIZED: of a function, neither of a module nor of a class

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


def index(node: object) -> int | None:
    """The number that an index is, if it is one."""
    match node:
        case ast.Constant(value=int() as place) if not isinstance(place, bool):
            return place
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as place)):
            return -place
    return None


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
            if isinstance(node, ast.Subscript) and field == "slice" and index(value) is not None:
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
            case ast.Subscript(slice=end) if (place := index(end)) is not None:  # 0 and -1 are often the same
                yield *self.span(end), repr(place + 1 if place >= 0 else place - 1)
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
    """The source of every module by its path below eqfact/; but for the cases, of which changed ones may do as well."""
    named = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    return {name: path.read_bytes() for name, path in named.items() if not name.startswith(CASES)}


def sample(pools: dict[str, list[Change]], count: int, seed: int) -> list[Change]:
    """About so many changes, of the modules in turn, more of large ones by the square root of their sizes: small ones are seen, too."""
    total, chosen = sum(len(pool)**0.5 for pool in pools.values()), list[tuple[float, Change]]()
    for module, pool in pools.items():
        share = min(len(pool), math.ceil(count * len(pool)**0.5 / total))
        chosen += [((i + 1) / share, change) for i, change in enumerate(random.Random(f"{seed} {module}").sample(pool, share))]
    return [change for _, change in sorted(chosen, key=lambda pair: pair[0])]


def functions(code: CodeType) -> tuple[list[CodeType], list[object]]:
    """The functions of a module or class body, in order, classes' own among them; and what the body itself does when it is run."""
    inside, body = list[CodeType](), list[object]([code.co_code, code.co_names])
    for constant in code.co_consts:
        if not isinstance(constant, CodeType):
            body.append((type(constant), constant))
        elif constant.co_flags & FUNCTION and not re.match("<(list|set|dict|gen)", constant.co_name):
            inside.append(constant)
        else:
            below = functions(constant)
            inside += below[0]
            body += below[1]
    return inside, body


def key(code: CodeType) -> str:
    return f"{Path(code.co_filename).relative_to(PACKAGE).as_posix()}:{code.co_firstlineno}:{code.co_qualname}"


def digest(paths: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for path in sorted(paths):
        whole.update(path.read_bytes())
    return whole.hexdigest()


class Tests:
    """A plugin of pytest, that runs tests in processes forked from one that has collected all of them.

    A change within a function is made by giving that function other code: then what runs are the tests that enter it. One in the body of
    a module or class is made in a copy of the repository, that a new process imports.
    """

    def __init__(self, jobs: int, budget: float, work: Callable[[Tests], None]) -> None:
        self.jobs, self.budget, self.work = jobs, budget, work
        self.items = list[pytest.Item]()
        #: By test: how long it took, and the functions of eqfact that it entered.
        self.took, self.entered = dict[str, float](), dict[str, set[str]]()
        self.live = defaultdict[str, list[FunctionType]](list)
        #: How often a test function noticed a change of a module: it is asked first.
        self.noticed = Counter[tuple[str, str]]()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise SystemExit("the tests could not be collected")
        self.session, self.items = session, session.items
        for thing in gc.get_objects():
            if isinstance(thing, FunctionType) and thing.__code__.co_filename.startswith(str(PACKAGE)):
                self.live[key(thing.__code__)].append(thing)
        self.observe()
        gc.collect()
        gc.freeze()  # what the processes share is not copied by looking at it
        self.work(self)
        return True

    def observe(self) -> None:
        """Run all tests without a change; files of tests that were seen before with the same eqfact are remembered."""
        store, same = cache() / "mutation.json", digest([*PACKAGE.rglob("*.py"), ROOT / "tests" / "conftest.py"])
        known = json.loads(store.read_text()) if store.exists() else {}
        files = defaultdict[Path, list[pytest.Item]](list)
        for item in self.items:
            files[item.path].append(item)
        seen = {path.name: f"{same} {digest([path])}" for path in files}
        parts = [part for path, part in files.items() if known.get(path.name, {}).get("of") != seen[path.name]]
        try:
            for part, found in each(parts, self.jobs, self._observed):
                if not isinstance(found, dict):
                    raise SystemExit(f"without any change there fails {found}, of {part[0].path.name}")
                known[part[0].path.name] = {"of": seen[part[0].path.name], "tests": found}
        finally:
            store.write_text(json.dumps(known))
        for name in seen:
            for test, (seconds, entered) in known[name]["tests"].items():
                self.took[test], self.entered[test] = seconds, set(entered)

    def _observed(self, items: list[pytest.Item]) -> object:
        found = dict[str, tuple[float, list[str]]]()
        for item, after in zip(items, [*items[1:], None], strict=True):
            codes, start = set[CodeType](), time.perf_counter()
            sys.setprofile(lambda frame, event, _, add=codes.add: add(frame.f_code) if event == "call" else None)  # type: ignore[misc]
            try:
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            finally:
                sys.setprofile(None)
            if self.session.testsfailed:
                return item.nodeid
            entered = {key(code) for code in codes if code.co_filename.startswith(str(PACKAGE))} & set(self.live)
            found[item.nodeid] = (time.perf_counter() - start, sorted(entered))
        return found

    def near(self, module: str, changed: set[str]) -> list[pytest.Item]:
        """Tests that enter one of these functions: the quickest of each test function first, those that noticed most before the others."""
        items = [item for item in self.items if self.entered[item.nodeid] & changed]
        ranks = Counter[str]()
        order = list[tuple[float, float, pytest.Item]]()
        for item in sorted(items, key=lambda item: self.took[item.nodeid]):
            function = item.nodeid.partition("[")[0]
            rank = ranks[function] / (1 + self.noticed[module, function])
            ranks[function] += 1
            order.append((rank, self.took[item.nodeid], item))
        left, chosen = self.budget, list[pytest.Item]()
        for *_, item in sorted(order, key=lambda entry: entry[:2]):
            if left < 0:
                break
            left -= self.took[item.nodeid]
            chosen.append(item)
        return chosen

    def survives(self, change: Change) -> object:
        """None, or the test that fails."""
        path = PACKAGE / change.module
        source = path.read_bytes()
        (old, body), (new, other) = (functions(compile(text, str(path), "exec")) for text in (source, mutated(source, change)))
        pairs = {key(before): after for before, after in zip(old, new, strict=True) if before != after} if len(old) == len(new) else {}
        if not pairs or body != other or not all(self.live[name] for name in pairs):
            return self._afresh(change)
        for name, code in pairs.items():
            for function in self.live[name]:
                if len(function.__code__.co_freevars) != len(code.co_freevars):
                    return self._afresh(change)
                function.__code__ = code
        return self._run(self.near(change.module, set(pairs)))

    def _run(self, items: list[pytest.Item]) -> object:
        bound(SECONDS + PATIENCE * sum(self.took[item.nodeid] for item in items))
        for item, after in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            if self.session.testsfailed:
                return item.nodeid
        return None

    def _afresh(self, change: Change) -> object:
        """In a new process, on a copy of the repository."""
        items = self.near(change.module, {name for name in self.live if name.startswith(f"{change.module}:")}) or self.items
        names = [item.nodeid for item in items[:2000]]
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(ROOT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".git", "_build", "__pycache__", ".*"))
            path = Path(folder) / "eqfact" / change.module
            path.write_bytes(mutated(path.read_bytes(), change))
            seconds = 60 + PATIENCE * sum(self.took[name] for name in names)
            bound(2 * seconds)
            try:
                done = subprocess.run([sys.executable, "-B", "-m", "pytest", *OPTIONS, "-x", *names], cwd=folder, timeout=seconds,
                                      env={**os.environ, "PYTHONPATH": folder}, capture_output=True)
            except subprocess.TimeoutExpired:
                return "too long"
        return "a test" if done.returncode else None


def bound(seconds: float) -> None:
    """End this process then, or when it takes too much memory: one that was changed may run for ever."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (GIBIBYTES << 30, GIBIBYTES << 30))


def each(values: Iterable[T], jobs: int, do: Callable[[T], object]) -> Iterator[tuple[T, object]]:
    """Each with what is made of it, in processes of their own, so many at a time; where one died, that it died."""
    running, context = dict[Connection, tuple[T, ForkProcess]](), multiprocessing.get_context("fork")

    def child(value: T, end: Connection) -> None:
        os.setsid()
        sink = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(sink, stream)
        end.send(do(value))
        end.close()
        os._exit(0)  # without what pytest does at the end of its own process

    def finished() -> Iterator[tuple[T, object]]:
        ready = wait(list(running))
        for end in [end for end in running if end in ready]:
            value, process = running.pop(end)
            try:
                yield value, end.recv()
            except EOFError:
                yield value, "a process that died"
            process.join()
            with contextlib.suppress(ProcessLookupError):  # children of its own
                os.killpg(process.pid or 0, signal.SIGKILL)

    for value in values:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(value, sender))
        process.start()
        sender.close()
        running[receiver] = value, process
        while len(running) >= jobs:
            yield from finished()
    while running:
        yield from finished()


def score(killed: int, survived: int) -> str:
    return f"{killed:5d} {survived:8d} {killed / max(killed + survived, 1):7.1%}"


def main(argv: list[str]) -> int:
    """Print what survives, and a table of modules; 1 where too much does."""
    parser = argparse.ArgumentParser("python -m benchmarks mutation", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", metavar="MODULE", help="modules, as paths below eqfact/")
    parser.add_argument("--sample", type=int, default=600, metavar="N", help="about how many changes of all modules together, at the most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="the rest of the sample is left out then")
    parser.add_argument("--budget", type=float, default=20.0, metavar="SECONDS", help="of tests, for one change")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--again", action="store_true", help="what survived the last run, and nothing else")
    args = parser.parse_args(argv)
    sources, last = modules(), cache() / "survivors.json"
    if set(args.only or ()) - set(sources):
        parser.error(f"no modules: {', '.join(sorted(set(args.only) - set(sources)))}")
    sources = {name: sources[name] for name in args.only or sources}
    equivalent, counts = judged(), {name: [0, 0, 0] for name in sources}
    pools = {name: Changes(name, source).found for name, source in sources.items()}
    known = {change.key for pool in pools.values() for change in pool}
    for judgement in [judgement for judgement in equivalent if judgement[0] in sources and judgement not in known]:
        print(f"{JUDGED.name} judges a change that is not there any more: {': '.join(judgement)}")
    chosen = sample(pools, args.sample, args.seed)
    if args.again:
        survivors = {tuple(judgement) for judgement in json.loads(last.read_text())}
        chosen = [change for pool in pools.values() for change in pool if change.key in survivors]
    for change in chosen:
        counts[change.module][2] += change.key in equivalent
    survived = list[Change]()

    def work(tests: Tests) -> None:
        stop = time.monotonic() + 60 * args.minutes
        asked = itertools.takewhile(lambda change: time.monotonic() < stop, (c for c in chosen if c.key not in equivalent))
        for change, notices in each(asked, args.jobs, tests.survives):
            counts[change.module][notices is None] += 1
            tests.noticed[change.module, str(notices).partition("[")[0]] += 1
            if notices is None:
                survived.append(change)
                print(f"{change.module}:{change.line}: {change.function}: {change.text}", flush=True)

    os.environ["HYPOTHESIS_PROFILE"] = "first"
    os.chdir(ROOT)
    failed = pytest.main([*OPTIONS, "-s", "tests"], plugins=[Tests(args.jobs, args.budget, work)])
    last.write_text(json.dumps([change.key for change in survived]))
    below = bool(failed)
    print(f"\n{'module':24s} killed survived   score  judged")
    for name, (killed, alive, same) in counts.items():
        if killed + alive + same:
            print(f"{name:24s} {score(killed, alive)} {same:7d}")
            below |= name.startswith(STRICT) and killed < STRICT_GOAL * (killed + alive)
    killed, alive, same = (sum(column) for column in zip(*counts.values(), strict=True))
    print(f"{'all':24s} {score(killed, alive)} {same:7d}")
    return int(below or killed < GOAL * (killed + alive))
