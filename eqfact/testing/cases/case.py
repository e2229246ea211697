"""What is a conformance case? A question with all that it needs, how its answer is judged, and why it is asked.

A case is a JSON file, the same to the byte on every machine: its numbers are exact (whole multiples of powers of two, whose sums and
products no order of adding up rounds), or follow from these by single operations of IEEE arithmetic, or by 60-digit ones (:mod:`.exact`).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from eqfact.ops import Array
from eqfact.serialization import parsed

FORMAT = "eqfact conformance case"
VERSION = 1
#: No case is larger, in bytes of its file.
LARGEST = 20_000

Json = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One question to an implementation. All of it is JSON."""

    #: ``"LEVEL/NAME"``, which is also the path of its file.
    id: str
    #: What is asked, and with what (docs/porting.md).
    ask: str
    request: Json
    #: ``{"judge": NAME, ...}``: how the answer is judged (:mod:`eqfact.testing.judging`).
    expected: Json
    #: The law that the answer must obey, in a sentence; the section of the paper or the page that states it; the bug that is looked for.
    law: str
    source: str
    why: str

    @property
    def level(self) -> int:
        """The level that the case belongs to."""
        return int(self.id.partition("/")[0])

    @property
    def name(self) -> str:
        """Its name within the level."""
        return self.id.partition("/")[2]

    def text(self) -> str:
        """The case as a file; it ends with a digest of the rest, by which a file that was edited is told.

        >>> case = Case("0/relu", "forward", {}, {"judge": "equal"}, "max(x, 0)", "docs/paper.md", "sign lost")
        >>> Case.read(case.text()) == case
        True
        """
        content = {"format": FORMAT, "version": VERSION, **{f.name: getattr(self, f.name) for f in fields(self)}}
        return json.dumps({**content, "sha256": _digest(content)}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def read(cls, text: str) -> Case:
        """The case in a file's text; :class:`ValueError`, with the reason, if it is none, of another version, truncated or edited."""
        try:
            content = parsed(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"it is no JSON, or truncated: {error!s:.200}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f'it must say "format": "{FORMAT}", got {reprlib.repr(content)}')
        if content.get("version") != VERSION:
            raise ValueError(f"it is of version {reprlib.repr(content.get('version'))}, and this eqfact reads version {VERSION}; "
                             "write the cases anew with python -m eqfact.testing.cases -o DIR")
        kinds = {f.name: dict if f.name in ("request", "expected") else str for f in fields(cls)}
        for name, kind in kinds.items():
            if not isinstance(content.get(name), kind):
                raise ValueError(f'it needs a {kind.__name__} under "{name}", got {reprlib.repr(content.get(name))}')
        if content.pop("sha256", None) != _digest(content):
            raise ValueError("its content is not what its digest says: it was edited; write the cases anew with "
                             "python -m eqfact.testing.cases -o DIR")
        if content["id"].partition("/")[0] not in map(str, range(10)):
            raise ValueError(f'its "id" must be LEVEL/NAME, got {reprlib.repr(content["id"])}')
        return cls(**{name: content[name] for name in kinds})


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class Draw:
    """Numbers for a case, drawn by its name: whole multiples of a power of two, the same on every machine.

    >>> Draw("a case").dyadic((2,), 1.0, 2)
    array([ 0.25, -0.75])
    """

    def __init__(self, name: str) -> None:
        self.random = random.Random(name)  # its random() is the same in every version of Python

    def below(self, n: int) -> int:
        """A whole number from 0 to ``n - 1``."""
        return math.floor(self.random.random() * n)

    def dyadic(self, shape: Sequence[int], largest: float = 2.0, bits: int = 3) -> Array:
        """Multiples of ``2**-bits`` within ``[-largest, largest]``, none of them 0."""
        count = round(largest * 2**bits)
        numbers = [(1 + self.below(count)) * (1 if self.below(2) else -1) / 2**bits for _ in range(math.prod(shape))]
        return np.array(numbers).reshape(shape)

    def positive(self, shape: Sequence[int], largest: float = 2.0, bits: int = 3) -> Array:
        """The same, above 0."""
        result: Array = np.abs(self.dyadic(shape, largest, bits))
        return result

    def uniform(self, shape: Sequence[int], low: float = -2.0, high: float = 2.0) -> Array:
        """Numbers with all their digits, as those of real networks."""
        return np.array([low + (high - low) * self.random.random() for _ in range(math.prod(shape))]).reshape(shape)

    def powers(self, count: int, most: int = 4) -> npt.NDArray[np.float64]:
        """Powers of two from ``2**-most`` to ``2**most``, ``(count,)``."""
        return np.array([2.0 ** (self.below(2 * most + 1) - most) for _ in range(count)])
