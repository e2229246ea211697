"""How do arrays and networks travel between implementations? As JSON that any language reads, never as pickles.

An array is ``{"dtype": "float32", "shape": [2, 3], "base64": ...}``, its numbers little-endian and in C order. A network is the document
that :func:`eqfact.save` writes (``graph.json``), with the arrays in their places. What is read may be hostile: sizes are those of the text.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from eqfact.graph import Graph
from eqfact.serialization import REFUSALS, VERSION, checked, document, graph_of

AnyArray = npt.NDArray[Any]

DTYPES = ("float32", "float64", "int32", "int64")


def array_json(array: npt.ArrayLike) -> dict[str, Any]:
    """An array as JSON; :class:`TypeError` for a dtype that is not in ``DTYPES``.

    >>> array_json(np.array([1.0, 2.0], np.float32))
    {'dtype': 'float32', 'shape': [2], 'base64': 'AACAPwAAAEA='}
    """
    array = np.asarray(array)
    if array.dtype.name not in DTYPES:
        raise TypeError(f"an array of dtype {array.dtype} does not travel, only {', '.join(DTYPES)}; convert it with .astype")
    content = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False).tobytes()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "base64": base64.b64encode(content).decode()}


def array_of(code: object) -> AnyArray:
    """The array of its JSON; :class:`ValueError` where it is none.

    >>> array_of({"dtype": "float32", "shape": [2], "base64": "AACAPwAAAEA="})
    array([1., 2.], dtype=float32)
    """
    if not isinstance(code, dict) or set(code) != {"dtype", "shape", "base64"}:
        raise ValueError(f"an array needs dtype, shape and base64, got {reprlib.repr(code)}")
    dtype, shape, text = code["dtype"], code["shape"], code["base64"]
    if dtype not in DTYPES:
        raise ValueError(f"the dtype of an array must be one of {', '.join(DTYPES)}, got {reprlib.repr(dtype)}")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"the shape of an array must be a list of whole numbers, got {reprlib.repr(shape)}")
    try:
        content = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise ValueError(f"the base64 of an array cannot be read: {error}") from error
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    if size != len(content):
        raise ValueError(f"an array of {dtype} and shape {reprlib.repr(shape)} has {size} bytes, got {len(content)}")
    array = np.frombuffer(content, kind.newbyteorder("<")).astype(kind).reshape(shape)
    array.flags.writeable = False
    return array


def arrays_json(arrays: Mapping[str, npt.ArrayLike]) -> dict[str, Any]:
    """Arrays by name as JSON."""
    return {name: array_json(array) for name, array in arrays.items()}


def arrays_of(code: object) -> dict[str, AnyArray]:
    """Arrays by name of their JSON; :class:`ValueError`, with the name, where one is none."""
    if not isinstance(code, dict):
        raise ValueError(f"arrays by name were expected, got {reprlib.repr(code)}")
    found = {}
    for name, array in code.items():
        try:
            found[name] = array_of(array)
        except ValueError as error:
            raise ValueError(f"'{name}': {error}") from error
    return found


def network_json(graph: Graph) -> dict[str, Any]:
    """A network as JSON."""
    code: dict[str, Any] = json.loads(json.dumps(document(graph, array_json)))
    return code


def network_of(code: object) -> Graph:
    """The network of its JSON; :class:`ValueError`, with the reason, where it is none, or of a newer version.

    >>> from eqfact.ops import ReLU
    >>> network_of(network_json(Graph.chain((2,), act=ReLU())))["act"].op
    ReLU()
    """
    try:
        content = checked(code)
        if content["version"] <= VERSION:
            return graph_of(content, array_of)
    except REFUSALS as error:
        raise ValueError(f"this is no network: {error!s:.500}") from error
    raise ValueError(f"a network of version {content['version']}, and this eqfact reads versions up to {VERSION}; install a newer eqfact")

