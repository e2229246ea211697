"""Which lines of Python make this network? For reports that can be pasted: every number is written exactly, every name as it is.

The law: what the lines make is the network, bit for bit, with ops that serve several nodes shared again.
"""

from __future__ import annotations

import dataclasses
import math
import re
import textwrap
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from eqfact import ops
from eqfact.graph import Graph, Node, fresh_name
from eqfact.ops import Op
from eqfact.ops.grid import Grid
from eqfact.quantizers import FakeQuantize

#: Where a line ends, if it can.
WIDTH = 110
#: What the lines may name, and how.
NAMES: dict[type, str] = {**{kind: f"eq.{kind.__name__}" for kind in ops.ALL}, FakeQuantize: "eq.FakeQuantize", Grid: "eq.Grid"}


def source(graph: Graph, name: str = "graph") -> str:
    """Python code that makes the network, under this name; imports included.

    Numbers are as short as they can be and still exact. :class:`TypeError` for an op of another library, naming its node.

    >>> print(source(Graph.chain((2,), fc=Dense(np.array([[0.5, 1.0]], np.float32)), act=Clip(0, 6))))
    import numpy as np
    import eqfact as eq
    <BLANKLINE>
    graph = eq.Graph({"x": (2,)}, [
        eq.Node("fc", eq.Dense(np.array([[0.5, 1.0]], np.float32)), ["x"]),
        eq.Node("act", eq.Clip(0.0, 6.0), ["fc"]),
    ], ["act"])
    """
    uses = Counter(id(node.op) for node in graph.nodes)
    shared: dict[int, str] = {}
    before, lines = [], []
    for node in graph.nodes:
        plain = uses[id(node.op)] == 1
        if not plain and id(node.op) not in shared:
            shared[id(node.op)] = fresh_name(type(node.op).__name__.lower(), {*shared.values(), name, "np", "eq"})
            before.append(_wrapped(f"{shared[id(node.op)]} = {_op(node)}", 4))
        op = _op(node) if plain else shared[id(node.op)]
        lines.append(_wrapped(f"    eq.Node({_text(node.name)}, {op}, [{', '.join(map(_text, node.inputs))}]),", 8))
    inputs = ", ".join(f"{_text(key)}: {tuple(shape)!r}" for key, shape in graph.inputs.items())
    outputs = ", ".join(map(_text, graph.outputs))
    return "\n".join(["import numpy as np", "import eqfact as eq", "", *before,
                      f"{name} = eq.Graph({{{inputs}}}, [", *lines, f"], [{outputs}])"])


def _wrapped(line: str, indent: int) -> str:
    """A line in brackets, broken at its spaces where it grows too long; not if a name in it might be broken, too."""
    if len(line) <= WIDTH or "\\" in line or "'" in line:
        return line
    body = line.lstrip()
    words = re.findall(r'(?:"[^"]*"|[^\s"])+', body)
    return textwrap.fill("\0".join(words).replace(" ", "\1").replace("\0", " "), WIDTH, initial_indent=line[:len(line) - len(body)],
                         subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False).replace("\1", " ")


def literal(array: npt.NDArray[Any]) -> str:
    """An array as an expression that makes it again, bit for bit.

    >>> literal(np.array([0.1, -np.inf], np.float32))
    'np.array([0.1, -np.inf], np.float32)'
    >>> literal(np.zeros((3, 2)))
    'np.zeros((3, 2))'
    """
    kind = "" if array.dtype == np.float64 else f", np.{array.dtype.name}"
    shape = array.shape if array.ndim != 1 else array.size
    if array.size > 1 and not array.any() and not np.signbit(array).any():
        return f"np.zeros({shape}{kind})"
    if array.size > 1 and np.all(array == 1):
        return f"np.ones({shape}{kind})"
    return f"np.array({_nested(array)}{kind})"


def _nested(array: npt.NDArray[Any]) -> str:
    return f"[{', '.join(map(_nested, array))}]" if array.ndim else _number(array[()])


def _number(value: Any) -> str:
    """The shortest number that is the value again when it is converted to its type."""
    if not np.isfinite(value):
        return "np.nan" if np.isnan(value) else "np.inf" if value > 0 else "-np.inf"
    short = str(value)
    return short if type(value)(float(short)) == value else repr(float(value))


def _op(node: Node) -> str:
    try:
        return _value(node.op)
    except TypeError as error:
        raise TypeError(f"node '{node.name}': {error}") from None


def _value(value: object) -> str:
    """A parameter of an op, or an op, as an expression."""
    if isinstance(value, np.ndarray):
        return literal(value)
    if isinstance(value, (float, np.floating)) and not math.isfinite(value):
        return _number(np.float64(value))
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))}{',' if len(value) == 1 else ''})"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if type(value) not in NAMES:
        raise TypeError(f"{type(value).__name__} is not an op of eqfact, so there are no lines to make it")
    return f"{NAMES[type(value)]}({', '.join(_arguments(value))})"


def _arguments(value: Any) -> list[str]:
    """The arguments of a dataclass: by position as far as none is left out, those that are the default left out."""
    given, by_position = [], True
    for field in dataclasses.fields(value):
        if not field.init:
            continue
        own = getattr(value, field.name)
        if not isinstance(own, np.ndarray) and field.default is not dataclasses.MISSING and repr(own) == repr(field.default):
            by_position = False
            continue
        by_position = by_position and not field.kw_only
        given.append(_value(own) if by_position else f"{field.name}={_value(own)}")
    return given


def _text(text: str) -> str:
    """A string in double quotes, as the rest of the code has them."""
    plain = repr(text)
    return f'"{plain[1:-1]}"' if '"' not in text and "'" not in text else plain


def parameters(op: Op | Grid) -> dict[str, object]:
    """The parameters of an op as values that can be compared: arrays by dtype, shape and bytes."""
    found: dict[str, object] = {}
    for field in dataclasses.fields(op):  # type: ignore[arg-type]  # every final op is a dataclass
        value = getattr(op, field.name)
        if isinstance(value, np.ndarray):
            found[field.name] = value.dtype.str, value.shape, value.tobytes()
        else:
            found[field.name] = (type(value).__name__, parameters(value)) if isinstance(value, (Op, Grid)) else repr(value)
    return found
