"""Which networks does a pass of your own break? Networks are drawn, the pass is applied, and its laws are checked.

A pass is any function from a network to a network: of ``torch.nn.Module``, of ``onnx.ModelProto``, or of :class:`eqfact.Graph`. What breaks
it is made small by Hypothesis, and reported with the lines of Python that make it. Hypothesis, PyTorch, onnx and pytest are imported when
they are needed.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from eqfact.graph import Data, Graph, checked_inputs
from eqfact.ops import Array, Op
from eqfact.testing.frameworks import FRAMEWORKS, Arrays, Framework, engine_bounds, fingerprint
from eqfact.testing.kinds import KINDS, excluded, shows
from eqfact.testing.shrinking import Violation, entries, made_small
from eqfact.testing.sources import literal, source
from eqfact.verification import verify

Pass = Callable[[Any], Any]
#: Where networks that break a pass are kept, in the working directory, as Hypothesis and pytest keep theirs.
DIRECTORY = ".eqfact"
#: How many networks of each kind are tried.
VARIANTS = 2
#: After so many seconds Hypothesis is to come to an end with what it has made smaller.
SECONDS = 10.0
#: So many lines of code are worth reading in a report.
MOST_LINES = 150


class Declined(AssertionError):
    """A pass refused all networks that it was given, so nothing is known of it."""


@dataclass(frozen=True)
class Checked:
    """What :func:`check` looked at, when nothing was wrong.

    >>> found = eq.testing.check(fold_batchnorm, kinds=["residual"], examples=0)
    >>> found.laws[0], found.networks > 0, found.declined
    ('gives_a_network', True, 0)
    """

    name: str
    framework: str
    laws: tuple[str, ...]
    #: How many networks the pass took, and how many it declined.
    networks: int
    declined: int
    #: Why, each reason with how often it was given.
    reasons: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        laws = self.laws[0] if len(self.laws) == 1 else f"{len(self.laws)} laws"
        text = f"{self.name}: {laws} kept on {self.networks} networks ({self.framework})"
        return text + (f"; it declined {self.declined}: {_listed(self.reasons)}" if self.declined else "")


# ---------------------------------------------------------------------------------------------------------------
# Laws


class _Refused(Exception):
    """The pass declined the network."""


class _Trial:
    """One network, what the pass makes of it, and what both compute."""

    def __init__(self, pass_: Pass, framework: Framework, graph: Graph, x: Data, options: _Options) -> None:
        self.pass_, self.framework, self.graph, self.options = pass_, framework, graph, options
        self.data = checked_inputs(graph, x)
        self.feeds = framework.feeds(graph, x)
        self.given = framework.network(graph)
        self.state = framework.state(self.given)
        self.interface = framework.interface(self.given)
        self.before = framework.run(self.given, self.feeds)
        self.made, self.problem = self.apply(self.given)
        self.after: Arrays = {}
        if not self.problem:
            try:
                with np.errstate(all="ignore"):
                    self.after = framework.run(self.made, self.feeds)
            except Exception as error:  # the network is the pass's
                self.problem = f"what it returns does not run: {_told(error)}"

    def apply(self, given: Any) -> tuple[Any, str]:
        """The network that the pass makes of one, and what is wrong with it."""
        given = self.framework.copied(given) if self.options.in_place else given
        try:
            made = self.pass_(given)
        except self.options.refuses as error:
            raise _Refused(_told(error)) from error
        except Exception as error:
            return None, f"it raises {_told(error)}"
        made = given if made is None and self.options.in_place else made
        return made, self.framework.why_not(made)

    @cached_property
    def bounds(self) -> list[Array]:
        """What rounding may do to each output, in the order of the network."""
        bounds = engine_bounds(self.graph, self.data)
        return [bounds[name] for name in self.graph.outputs]


def gives_a_network(trial: _Trial) -> str:
    """The pass returns a network of the framework that runs, or declines by one of the exceptions it may raise."""
    return trial.problem


def keeps_inputs_and_outputs(trial: _Trial) -> str:
    """Inputs and outputs have the same names, shapes and types; a module stays in the mode that it was in."""
    now = trial.framework.interface(trial.made)
    for what, before in trial.interface.items():
        if what in now and now[what] != before:
            return f"{what}: {_shown(now[what])}, before {_shown(before)}"
    if list(trial.after) != list(trial.before):
        return f"outputs: {_shown(list(trial.after))}, before {_shown(list(trial.before))}"
    for name, before in trial.before.items():
        got = trial.after[name]
        if (got.dtype, got.shape) != (before.dtype, before.shape):
            return f"{_quoted(name)}: {got.dtype} {got.shape}, before {before.dtype} {before.shape}"
    return ""


def makes_no_nan_or_infinity(trial: _Trial) -> str:
    """Outputs are finite, as those of the network given are; no parameter is NaN."""
    for name, got in trial.after.items():
        if not np.isfinite(got).all():
            where = tuple(int(i) for i in np.argwhere(~np.isfinite(got))[0])
            return f"{_quoted(name)} holds {got[where]} at {where}"
    name = trial.framework.unsound(trial.made)
    return f"parameter '{name}' holds NaN" if name else ""


def keeps_the_function(trial: _Trial) -> str:
    """Outputs differ by no more than roundings explain; with ``exact=True`` not by a bit."""
    worst, found = 0.0, ""
    for i, (name, before) in enumerate(trial.before.items()):
        got = trial.after.get(name)
        if got is None or got.shape != before.shape or got.dtype != before.dtype:
            return f"{_quoted(name)} cannot be compared: it is {'missing' if got is None else f'{got.dtype} {got.shape}'}"
        excess, allowed = _excess(got, before, None if trial.options.exact else trial.bounds[i])
        where = tuple(int(j) for j in np.unravel_index(int(excess.argmax()), excess.shape))
        if excess[where] > max(worst, 1.0):
            worst = float(excess[where])
            found = (f"{_quoted(name)} differs in {int((excess > 1).sum())} of {excess.size} entries, worst at {where}:\n"
                     f"got {_digits(got[where], trial)}, expected {_digits(before[where], trial)}{allowed(where)}")
    if trial.options.exact or not isinstance(trial.made, Graph):
        return found
    try:
        verified = verify(trial.graph, trial.made, trial.data)
    except ValueError as error:
        return str(error)
    # a graph shows its inner values: verify compares them too, and knows the roundings of both networks
    parted = re.search(r"they part at '(.*?)',", verified.message)
    inside = f"\nthe networks part at '{parted[1]}'" if parted and parted[1] not in trial.graph.outputs else ""
    return "" if verified else found + inside if found else verified.message


def leaves_its_input_alone(trial: _Trial) -> str:
    """The network that the pass was given is afterwards what it was before; not asked of a pass that works ``in_place``."""
    if trial.options.in_place:
        return ""
    name = _difference(trial.framework.state(trial.given), trial.state)
    return f"the pass changes {name} of the network that it is given (if it is meant to: in_place=True)" if name else ""


def gives_the_same_twice(trial: _Trial) -> str:
    """Two equal networks become two equal networks, with outputs equal bit for bit."""
    try:
        second, problem = trial.apply(trial.framework.network(trial.graph))
    except _Refused as refusal:
        return f"the second time it declines: {refusal}"
    if problem:
        return f"the second time {problem}"
    name = _difference(trial.framework.state(second), trial.framework.state(trial.made))
    if name:
        return f"the second time {name} is another"
    for name, got in trial.framework.run(second, trial.feeds).items():
        if got.tobytes() != trial.after[name].tobytes():
            return f"the second time {_quoted(name)} is another"
    return ""


#: The laws, in the order in which they are checked.
LAWS: Mapping[str, Callable[[_Trial], str]] = MappingProxyType({law.__name__: law for law in (
    gives_a_network, keeps_inputs_and_outputs, makes_no_nan_or_infinity, keeps_the_function, leaves_its_input_alone, gives_the_same_twice)})


def _excess(got: Array, expected: Array, bound: Array | None) -> tuple[Array, Callable[[tuple[int, ...]], str]]:
    """How often an error holds its bound, entry by entry, infinite where they differ in bits only; and what to say of the bound."""
    if bound is None:
        apart = np.frombuffer(got.tobytes(), f"V{got.itemsize}") != np.frombuffer(expected.tobytes(), f"V{got.itemsize}")
        return np.where(apart, np.inf, 0.0).reshape(got.shape), lambda where: ", and every bit was to stay"
    with np.errstate(all="ignore"):
        error = np.abs(got.astype(np.float64) - expected)
        excess = np.where(error > 0, error / bound, 0.0)
    excess[~np.isfinite(got)] = np.inf
    return excess, lambda where: f", off by {error[where]:.3g} where rounding explains {bound[where]:.2g}"


def _digits(value: Any, trial: _Trial) -> str:
    """As many as are the same wherever a network runs, or all."""
    return str(value) if trial.options.exact else f"{value:.6g}"


def _difference(a: dict[str, object], b: dict[str, object]) -> str:
    """The first part in which two states differ."""
    return next((name for name in {**b, **a} if name not in a or name not in b or a[name] != b[name]), "")


# ---------------------------------------------------------------------------------------------------------------
# Checks


@dataclass(frozen=True)
class _Options:
    exact: bool
    in_place: bool
    refuses: tuple[type[Exception], ...]


def check(pass_: Pass, framework: str = "numpy", *, laws: Iterable[str] | None = None, kinds: Iterable[str] | None = None,
          examples: int = 200, seed: int = 0, networks: Iterable[Graph] = (), without: Iterable[str | type[Op]] = (),
          axes: Sequence[int] = (0, 1, 2, 3), max_layers: int = 10, exact: bool = False, in_place: bool = False,
          refuses: type[Exception] | tuple[type[Exception], ...] = NotImplementedError, directory: str | Path | None = None) -> Checked:
    """Apply a pass to small networks of every kind, and to ``examples`` that Hypothesis draws; check its laws on each.

    ``framework`` says what the pass takes and returns: ``"torch"`` (a module, in eval mode), ``"onnx"`` (a model in memory) or ``"numpy"``
    (an :class:`eqfact.Graph`). ``kinds`` are some of :data:`eqfact.testing.KINDS`, all by default; ``networks`` are graphs of your own,
    which are tried first. ``without``, ``axes`` and ``max_layers`` say which networks are drawn, as in
    :func:`eqfact.testing.strategies.networks`, and kinds that do not fit are left out. The same ``seed`` gives the same networks.

    ``exact`` asks for equal bits where else the rounding errors of both networks are allowed. A pass that works ``in_place`` gets a copy,
    and may return None. By an exception of ``refuses`` it declines a network. ``laws`` are some of :data:`LAWS`, all by default.

    Raises :class:`Violation` (an AssertionError) with the smallest network found, which is kept in ``directory`` (by default ``.eqfact`` in
    the working directory); :class:`Declined` if the pass declines all networks; :class:`ValueError` for an unknown name.

    >>> print(check(fold_batchnorm, kinds=["batchnorm", "residual"], examples=0))
    fold_batchnorm: 6 laws kept on 4 networks (numpy)
    """
    _known("framework", framework, FRAMEWORKS)
    asked = _Asked(pass_, FRAMEWORKS[framework](), tuple(LAWS) if laws is None else tuple(laws),
                   _Options(exact, in_place, refuses if isinstance(refuses, tuple) else (refuses,)))
    for law in asked.laws:
        _known("law", law, LAWS)
    without = (*without, *asked.framework.without)
    which, folder = "", Path(DIRECTORY if directory is None else directory)
    try:
        for i, graph in enumerate(networks):
            which = f"network {i} of those given"
            asked.of(graph, _data(graph, np.random.default_rng([seed, i])))
        for kind in KINDS if kinds is None else kinds:
            for i, graph in enumerate(_of_kind(kind, asked.framework, seed, without, axes)):
                which = f"a network of the kind '{kind}'"
                asked.of(graph, _data(graph, np.random.default_rng([seed, i])))
        if examples:
            which = f"a network drawn with seed {seed}"
            _search(asked, examples, seed, {"without": without, "axes": tuple(axes), "max_layers": max_layers})
    except Violation as found:
        raise _reported(asked, made_small(asked.fails_too, found), which, folder) from found.__cause__
    if asked.declined == asked.count:
        raise Declined(f"{asked.name} declined all {asked.count} networks, so nothing is known of it: {_listed(asked.reasons)}"
                       if asked.count else f"there was no network to try {asked.name} on")
    return Checked(asked.name, framework, asked.laws, asked.count - asked.declined, asked.declined, dict(asked.reasons))


def _of_kind(kind: str, framework: Framework, seed: int, without: Iterable[str | type[Op]], axes: Sequence[int]) -> list[Graph]:
    """The networks of a kind, in each floating type of the framework by turns; none if they have what is excluded."""
    _known("kind", kind, KINDS)
    types, not_drawn = itertools.cycle(framework.dtypes), excluded(tuple(without))
    graphs = (KINDS[kind](np.random.default_rng([seed, i]), np.dtype(next(types))) for i in range(VARIANTS))
    return [graph for graph in graphs
            if not_drawn.isdisjoint(shows(graph)) and all(len(shape) - 1 in axes for shape in graph.inputs.values())]


class _Asked:
    """What is asked of a pass, and how many networks it was asked of."""

    def __init__(self, pass_: Pass, framework: Framework, laws: tuple[str, ...], options: _Options) -> None:
        self.pass_, self.framework, self.laws, self.options = pass_, framework, laws, options
        self.name = getattr(pass_, "__name__", type(pass_).__name__)
        self.count = self.declined = 0
        self.reasons: Counter[str] = Counter()

    def of(self, graph: Graph, x: Data) -> None:
        """Check one network, and count it."""
        self.count += 1
        try:
            self.broken(graph, x)
        except _Refused as refusal:
            self.declined += 1
            self.reasons[str(refusal)] += 1

    def broken(self, graph: Graph, x: Data) -> None:
        """Raise the first law that the pass breaks here; without a network no other law can be asked about."""
        trial = _Trial(self.pass_, self.framework, graph, x, self.options)
        for law in dict.fromkeys(("gives_a_network", *self.laws)):
            finding = LAWS[law](trial)
            if finding:
                raise _violation(law)(law, finding, graph, trial.data)

    def fails_too(self, graph: Graph, data: Arrays, law: str) -> Violation | None:
        """The violation of the same law by another network, if there is one."""
        try:
            with np.errstate(all="ignore"):
                self.broken(graph, data)
        except Violation as other:
            return other if other.law == law else None
        except Exception:  # no network that could be compared, or one that the pass declines
            pass
        return None


@cache
def _violation(law: str) -> type[Violation]:
    """A class for each law: Hypothesis makes a failure smaller as long as it raises the same."""
    return type("Violation", (Violation,), {"__doc__": LAWS[law].__doc__, "__module__": "eqfact.testing"})


def _search(asked: _Asked, examples: int, seed: int, options: dict[str, Any]) -> None:
    """Ask of networks that are drawn; raise the smallest one that breaks a law."""
    try:
        import hypothesis
        from hypothesis import HealthCheck, Phase, Verbosity
        from hypothesis import strategies as st
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("networks are drawn by Hypothesis: pip install 'eqfact[test]', or ask for the kinds alone by examples=0",
                                  name=error.name) from error

    from eqfact.testing import strategies

    seen: list[Violation] = []
    known: set[str] = set()
    first: list[tuple[int, float]] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=examples, database=None, deadline=None, derandomize=False, report_multiple_bugs=False,
                         phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck), verbosity=Verbosity.quiet)
    @hypothesis.given(strategies.networks(dtypes=asked.framework.dtypes, **options).flatmap(
        lambda graph: st.tuples(st.just(graph), strategies.batches(graph))))
    def attempt(drawn: tuple[Graph, Data]) -> None:
        late = bool(first) and time.monotonic() - first[0][1] > SECONDS
        mark = fingerprint(drawn[0], checked_inputs(*drawn))
        if late and mark not in known:
            return
        try:
            asked.of(*drawn)
        except Violation as found:
            seen.append(found)
            first.append((asked.count, time.monotonic()))
            known.add(mark)
            raise

    try:
        attempt()
    except Violation:
        raise _plain(seen[-1]) from None
    except Exception:
        if not seen:
            raise
        # Hypothesis found that the pass does not do the same every time
        raise _plain(min(seen, key=lambda found: (len(found.graph), entries(found.graph)))) from None


def _plain(found: Violation) -> Violation:
    """The same without what Hypothesis notes on it, which says it in another way."""
    return _violation(found.law)(found.law, found.finding, found.graph, found.data)


def _data(graph: Graph, rng: np.random.Generator, size: int = 2) -> Arrays:
    """Data of two digits, for a network that was not drawn."""
    dtype = graph.dtype or np.dtype(np.float64)
    return {name: np.round(rng.uniform(-2, 2, (size, *shape)), 2).astype(dtype) for name, shape in graph.inputs.items()}


# ---------------------------------------------------------------------------------------------------------------
# Reports


def _reported(asked: _Asked, found: Violation, which: str, directory: Path) -> Violation:
    """The violation with its report, its network kept in a file."""
    kept = _kept(asked, found, directory)
    lines = [f"{found.law}: {found.finding}", "", f"{asked.name} breaks this law on {which}, made small:", ""]
    code = _code(asked.framework, found)
    lines += [code, ""] if code.count("\n") < MOST_LINES else []
    lines += [f"The network is kept in {kept} ({asked.framework.reading}),",
              f"what it was run on in {kept.with_name(kept.stem + '-data.npz')} (numpy.load(path))."]
    report = _violation(found.law)(found.law, found.finding, found.graph, found.data)
    report.args, report.path = ("\n".join(lines),), kept
    return report


def _code(framework: Framework, found: Violation) -> str:
    """The lines that make the network and its data."""
    try:
        first, *rest = source(found.graph).split("\n\n", 1)
    except TypeError as error:
        return f"(no lines of code: {error})"
    data = ", ".join(f"{name!r}: {literal(array)}".replace("'", '"') for name, array in found.data.items())
    return "\n".join(filter(None, [first, framework.imports])) + "\n\n" + "\n".join([*rest, framework.code, f"x = {{{data}}}"])


def _kept(asked: _Asked, found: Violation, directory: Path) -> Path:
    """Write network and data to files; to a folder of the system if this one cannot be written."""
    name = f"{asked.name.strip('<>')}-{found.law}-{fingerprint(found.graph, found.data)}"
    for folder in (directory, Path(tempfile.gettempdir()) / DIRECTORY.lstrip(".")):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if folder == Path(DIRECTORY):
                (folder / ".gitignore").write_text("*\n")
            path = folder / f"{name}{asked.framework.suffix}"
            asked.framework.save(path, found.graph)
            np.savez(path.with_name(f"{name}-data.npz"), **found.data)  # type: ignore[arg-type]  # numpy's stubs take the first for a flag
            return path
    raise OSError(f"neither {directory} nor the system's folder for temporary files can be written; give another directory")


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _listed(reasons: Mapping[str, int]) -> str:
    """Reasons and how often, the commonest first."""
    common = sorted(reasons.items(), key=lambda item: -item[1])
    return ", ".join(f"{reason} ({count} times)" for reason, count in common[:3]) + ("" if len(common) <= 3 else ", and others")


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {of}" for name, of in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _quoted(name: str) -> str:
    return name if name.startswith("output ") else f"output '{name}'"


def _known(what: str, name: str, among: Iterable[str]) -> None:
    if name not in among:
        raise ValueError(f"there is no {what} {name!r}; there are {', '.join(among)}")


# ---------------------------------------------------------------------------------------------------------------
# One test each


@dataclass(frozen=True)
class Check:
    """One law on one kind of networks, called with a pass; ``str`` is the name of the test, such as ``keeps_the_function-residual``.

    >>> chosen = eq.testing.checks(kinds=["residual"], laws=["keeps_the_function"])
    >>> str(chosen[0])
    'keeps_the_function-residual'
    >>> chosen[0](fold_batchnorm)
    Checked(name='fold_batchnorm', framework='numpy', laws=('keeps_the_function',), networks=2, declined=0, reasons={})
    """

    law: str
    #: One of :data:`eqfact.testing.kinds.KINDS`, or ``"random"``: networks that Hypothesis draws.
    kind: str
    framework: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return f"{self.law}-{self.kind}"

    def __call__(self, pass_: Pass) -> Checked:
        drawn = self.kind == "random"
        options = {**self.options, "laws": [self.law], "kinds": () if drawn else [self.kind]}
        return check(pass_, self.framework, **{**options, **({} if drawn else {"examples": 0})})


def checks(framework: str = "numpy", *, kinds: Iterable[str] | None = None, laws: Iterable[str] | None = None,
           **options: Any) -> list[Check]:
    """All laws on all kinds of networks that fit, and on random ones, each as a :class:`Check`; the options are those of :func:`check`.

    >>> [str(one) for one in checks("torch", kinds=["residual", "random"], laws=["keeps_the_function"])]
    ['keeps_the_function-residual', 'keeps_the_function-random']
    """
    _known("framework", framework, FRAMEWORKS)
    asked = list(LAWS if laws is None else laws)
    for law in asked:
        _known("law", law, LAWS)
    limits = options.get("seed", 0), options.get("without", ()), options.get("axes", (0, 1, 2, 3))
    fitting = [kind for kind in ([*KINDS, "random"] if kinds is None else kinds)
               if kind == "random" or _of_kind(kind, FRAMEWORKS[framework](), *limits)]
    return [Check(law, kind, framework, options) for law in asked for kind in fitting]


def parametrize_with_checks(framework: str = "numpy", **options: Any) -> Any:
    """A decorator for pytest: a test that takes ``check`` becomes one test for each law on each kind of networks.

    The options are those of :func:`checks`. A test is skipped, with the reason, where the pass declines all networks of a kind; not where
    it declines all random ones, which fails.

    ::

        @parametrize_with_checks("torch")
        def test_my_pass(check):
            check(my_pass)
    """
    import pytest

    def asking(one: Check) -> Callable[[Pass], Checked]:
        def ask(pass_: Pass) -> Checked:
            try:
                return one(pass_)
            except Declined as declined:
                if one.kind == "random":
                    raise
                pytest.skip(str(declined))
        return ask

    listed = checks(framework, **options)
    return pytest.mark.parametrize("check", [asking(one) for one in listed], ids=list(map(str, listed)))
