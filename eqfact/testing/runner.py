"""Does an implementation, in whatever language, answer the conformance cases right?

It is started once and asked line by line over its standard input and output (docs/porting.md has the protocol). One that crashes, hangs,
prints noise, or answers something else fails the case at hand and is started anew: time and memory are bounded whatever it does.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import reprlib
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from eqfact.serialization import parsed
from eqfact.testing.adapter import PROTOCOL
from eqfact.testing.cases.case import Case, Json
from eqfact.testing.judging import Wrong, judge

#: Seconds for an answer; and for the first one, behind which an interpreter and its libraries may have to load.
TIMEOUT, STARTING = 10.0, 60.0
#: Characters of the longest line that is read, and of what is kept of the errors that an implementation prints.
LONGEST, KEPT = 2**22, 2000
#: After so many starts in a row that come to nothing the rest of the cases fails without another.
STARTS = 3


#: What may come of a case.
VERDICTS = ("passed", "failed", "skipped")


class Broken(Exception):
    """The implementation did not answer: it must be started anew."""


@dataclass(frozen=True)
class Outcome:
    """What came of a case, one of ``VERDICTS``: if it failed, with what is wrong; if it was skipped, with the reason."""

    case: Case
    verdict: str
    wrong: Wrong | None = None
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Run:
    """What an implementation said of itself, and the outcome of every case."""

    hello: Json
    outcomes: tuple[Outcome, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed, and something passed."""
        verdicts = {outcome.verdict for outcome in self.outcomes}
        return "failed" not in verdicts and "passed" in verdicts

    def count(self, verdict: str, level: int | None = None) -> int:
        """How many cases came to a verdict."""
        return sum(o.verdict == verdict and level in (None, o.case.level) for o in self.outcomes)


class Implementation:
    """A process that answers questions; a context manager."""

    def __init__(self, command: str | Sequence[str], timeout: float = TIMEOUT) -> None:
        self.command = shlex.split(command) if isinstance(command, str) else list(command)
        if not self.command:
            raise ValueError("the command that starts the implementation is empty: give for instance 'node port.js'")
        if not timeout > 0:
            raise ValueError(f"the time for an answer must be positive, got {timeout}")
        self.timeout = timeout
        self.process: subprocess.Popen[str] | None = None
        self.hello: Json = {}
        self._fruitless = 0

    def __enter__(self) -> Implementation:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process, and ask it who it is; :class:`ValueError` if it cannot be started, :class:`Broken` if it does not say."""
        if self._fruitless >= STARTS:
            raise Broken(f"it could not be started again, {STARTS} times in a row")
        self._fruitless += 1
        try:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                            encoding="utf-8", errors="replace", start_new_session=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"the implementation cannot be started: {shlex.join(self.command)}: {error}") from error
        assert self.process.stdout is not None and self.process.stderr is not None
        self._lines: queue.Queue[str | None] = queue.Queue(maxsize=100)
        self._errors: list[str] = []
        self._listening = [threading.Thread(target=_read, args=(self.process.stdout, self._lines), daemon=True),
                           threading.Thread(target=_keep, args=(self.process.stderr, self._errors), daemon=True)]
        for thread in self._listening:
            thread.start()
        reply = self._exchange({"id": 0, "ask": "hello", "protocol": PROTOCOL}, max(self.timeout, STARTING))
        self.hello = _hello(reply)
        self._fruitless = 0

    def stop(self) -> None:
        """End the process, and all that it started."""
        if self.process is None:
            return
        process, self.process = self.process, None
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()
        for thread in self._listening:  # they end with their pipes, unless something else has these open
            thread.join(1)
        for stream, thread in zip((process.stdout, process.stderr), self._listening, strict=True):
            if stream is not None and not thread.is_alive():
                stream.close()

    def ask(self, number: int, case: Case) -> Json:
        """The reply to a case; :class:`Broken` if there is none, and then the process is gone."""
        try:
            if self.process is None:
                self.start()
            return self._exchange({"id": number, "ask": case.ask, **case.request}, self.timeout)
        except Broken:
            self.stop()
            raise

    def _exchange(self, question: Json, timeout: float) -> Json:
        if not self._lines.empty():
            unasked = self._lines.get()
            raise self._ended() if unasked is None else Broken(f"it said more than it was asked: {reprlib.repr(unasked)}")
        assert self.process is not None and self.process.stdin is not None
        # in a thread, because one that does not read would hold up whoever writes
        threading.Thread(target=_write, args=(self.process.stdin, json.dumps(question) + "\n"), daemon=True).start()
        try:
            line = self._lines.get(timeout=timeout)
        except queue.Empty:
            raise Broken(f"it did not answer within {timeout:g} s") from None
        if line is None:
            raise self._ended()
        if len(line) >= LONGEST:
            raise Broken(f"it said a line of more than {LONGEST} characters")
        try:
            reply = parsed(line)
        except (ValueError, RecursionError) as error:
            raise Broken(f"it said what is no JSON: {reprlib.repr(line)}: {error!s:.200}") from error
        if not isinstance(reply, dict) or reply.get("id") != question["id"]:
            raise Broken(f"it answered another question: asked with id {question['id']}, got {reprlib.repr(reply)}")
        if not {"answer", "skip", "error"} & set(reply):
            raise Broken(f'its line has none of "answer", "skip", "error": {reprlib.repr(reply)}')
        return reply

    def _ended(self) -> Broken:
        """What is to be said of a process that is gone."""
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        said = "".join(self._errors).strip().splitlines()
        return Broken(f"it ended, with exit status {self.process.poll()}" + (f": {said[-1]:.300}" if said else ""))


def run(command: str | Sequence[str], cases: Iterable[Case], *, timeout: float = TIMEOUT) -> Run:
    """Ask an implementation all cases, each with its own time limit.

    :class:`ValueError` if it cannot be started, or does not say who it is.

    >>> import sys
    >>> from eqfact.testing.cases import all_cases
    >>> run([sys.executable, "-m", "eqfact.testing.adapter"], all_cases([0])[:3]).ok
    True
    """
    with Implementation(command, timeout) as implementation:
        try:
            implementation.start()
        except Broken as error:
            raise ValueError(f"the implementation does not say hello: {shlex.join(implementation.command)}: {error}") from error
        return Run(implementation.hello, tuple(_outcomes(implementation, cases)))


def _outcomes(implementation: Implementation, cases: Iterable[Case]) -> Iterator[Outcome]:
    claimed = implementation.hello["levels"]
    for number, case in enumerate(cases, 1):
        if case.level not in claimed:
            yield Outcome(case, "skipped", reason=f"does not claim level {case.level}")
            continue
        start = time.perf_counter()
        try:
            reply = implementation.ask(number, case)
        except Broken as error:
            yield Outcome(case, "failed", Wrong("answer", "a line of JSON", str(error)), seconds=time.perf_counter() - start)
            continue
        seconds = time.perf_counter() - start
        if "skip" in reply:
            yield Outcome(case, "skipped", reason=str(reply["skip"]), seconds=seconds)
        elif "error" in reply:
            yield Outcome(case, "failed", Wrong("answer", "an answer", f"error: {reply['error']!s:.500}"), seconds=seconds)
        else:
            yield judged(case, reply["answer"], seconds)


def judged(case: Case, answer: Any, seconds: float = 0.0) -> Outcome:
    """The outcome of a case that was answered."""
    try:
        judge(case, answer)
    except Wrong as wrong:
        return Outcome(case, "failed", wrong, seconds=seconds)
    return Outcome(case, "passed", seconds=seconds)


def _hello(reply: Json) -> Json:
    """What an implementation says of itself, if it has the right form."""
    said = reply.get("answer")
    if not isinstance(said, dict) or not all(isinstance(said.get(key), str) for key in ("name", "version", "language")):
        raise Broken(f"hello needs an answer with name, version and language, got {reprlib.repr(reply)}")
    levels = said.get("levels")
    if not isinstance(levels, list) or not all(type(level) is int for level in levels):
        raise Broken(f"hello needs levels, a list of whole numbers, got {reprlib.repr(levels)}")
    if said.get("protocol", PROTOCOL) != PROTOCOL:
        raise Broken(f"it speaks version {said['protocol']!r} of the protocol, and this eqfact version {PROTOCOL}")
    return said


def _read(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    """Pass lines on, as long as they are, until there are no more, or more than anybody asked for."""
    with contextlib.suppress(OSError, ValueError):  # the process is gone
        while line := stream.readline(LONGEST):
            if line.strip():
                try:
                    lines.put_nowait(line)
                except queue.Full:
                    break
    with contextlib.suppress(queue.Full):
        lines.put_nowait(None)


def _keep(stream: IO[str], kept: list[str]) -> None:
    """The last of what is printed to standard error."""
    with contextlib.suppress(OSError, ValueError):
        while text := stream.readline(KEPT):
            kept.append(text)
            del kept[:-20]


def _write(stream: IO[str], text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # the process is gone, which the reader finds out
        stream.write(text)
        stream.flush()
