"""Which questions find out whether an implementation is right? Cases for every level of it, from the forward pass to the certificate.

Each level is a file here, useful alone, and its cases are made by functions: ``python -m eqfact.testing.cases -o DIR`` writes them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from eqfact.testing.cases import folding, forward, grids, integers, labels, optimum, pairs, rescaling, rules
from eqfact.testing.cases.case import VERSION, Case


@dataclass(frozen=True)
class Level:
    """What an implementation can be asked about."""

    number: int
    title: str
    cases: Callable[[], Iterator[Case]]


LEVELS = [
    Level(0, "forward of every op", forward.cases),
    Level(1, "BatchNorm folding", folding.cases),
    Level(2, "channels: free, tied, pinned", labels.cases),
    Level(3, "rescaling by given factors", rescaling.cases),
    Level(4, "one-step, two-step, cross-layer", rules.cases),
    Level(5, "grids, roundings, zero points, biases", grids.cases),
    Level(6, "quantized forward, whole number by whole number", integers.cases),
    Level(7, "the optimum: expected noise, the certificate", optimum.cases),
    Level(8, "verify: pairs near the bound", pairs.cases),
]


def all_cases(levels: Iterable[int] | None = None) -> list[Case]:
    """The cases of some levels, or of all, in the order of the levels."""
    wanted = {level.number for level in LEVELS} if levels is None else set(levels)
    return [case for level in LEVELS if level.number in wanted for case in level.cases()]


def levels_of(text: str) -> list[int]:
    """The levels in a text such as ``0-4,6``; :class:`argparse.ArgumentTypeError` if one is unknown.

    >>> levels_of("0-2,6")
    [0, 1, 2, 6]
    """
    known = [level.number for level in LEVELS]
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) in known and int(last) in known and int(first) <= int(last)):
            raise argparse.ArgumentTypeError(f"unknown level '{part}': the levels are {known[0]} to {known[-1]}; give for instance 0-4,6")
        found += range(int(first), int(last) + 1)
    return sorted(set(found))


#: The file that makes a folder one of cases: what it holds.
INDEX = "index.json"


def write(folder: str, cases: Iterable[Case]) -> None:
    """Write cases as ``folder/LEVEL/NAME.json``, with an index; what such a folder held before is replaced, all of it or nothing.

    :class:`ValueError` if the folder holds something else.
    """
    target = Path(folder).resolve()
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / INDEX).is_file())):
        raise ValueError(f"cannot write cases to '{folder}': it holds something else; give a new or an empty folder")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write cases to '{folder}': there is no folder '{target.parent}'; make it first")
    with tempfile.TemporaryDirectory(prefix=".eqfact-", dir=target.parent) as temporary:
        made = Path(temporary, "new")
        made.mkdir()
        ids = []
        for case in cases:
            path = made / f"{case.id}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(case.text(), encoding="utf-8", newline="\n")
            ids.append(case.id)
        index = {"format": "eqfact conformance cases", "version": VERSION, "cases": ids}
        (made / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8", newline="\n")
        if target.exists():
            os.replace(target, Path(temporary, "old"))
        os.replace(made, target)
        shutil.rmtree(Path(temporary, "old"), ignore_errors=True)


def read(folder: str, levels: Iterable[int] | None = None) -> list[Case]:
    """The cases of a folder that :func:`write` wrote, in the order of its index.

    :class:`ValueError`, with the file, for one that is missing, truncated, edited or of another version.
    """
    path = Path(folder, INDEX)
    if not path.is_file():
        raise ValueError(f"'{folder}' holds no cases: write some with python -m eqfact.testing.cases -o {folder}")
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))["cases"]
        if not isinstance(ids, list) or not all(isinstance(i, str) and ".." not in i and not i.startswith("/") for i in ids):
            raise ValueError("it has no list of names")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"'{path}' is no index of cases: {error}; write them anew with python -m eqfact.testing.cases -o DIR") from error
    wanted = None if levels is None else set(levels)
    found = []
    for name in ids:
        file = Path(folder, f"{name}.json")
        try:
            case = Case.read(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"'{file}' is missing, and the index names it") from None
        except ValueError as error:
            raise ValueError(f"'{file}' is no conformance case: {error}") from error
        if wanted is None or case.level in wanted:
            found.append(case)
    return found
