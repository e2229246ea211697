"""How do other tools answer the conformance cases? An adapter for each, through its own public API.

Each module here runs in the tool's own environment, and claims the levels that the tool claims: what it does not do, or leaves as it is,
is a skip, not a failure. :func:`serve` is what they share. Nothing here is imported by the library.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from eqfact import onnx as files
from eqfact.graph import Graph
from eqfact.ops import Weighted
from eqfact.testing.wire import network_json, network_of

Json = dict[str, Any]


#: Where answers go. The rest of what a tool prints, from its import on, goes to standard error.
OUT = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


class Skip(Exception):
    """What the tool does not claim, or does not take."""


class Spoilt(Exception):
    """What the tool wrote is no network any more."""


def serve(name: str, version: str, levels: list[int], asks: dict[str, Callable[..., Json]]) -> None:
    """Answer the runner. Whatever the tool raises is a skip: it says that it does not take the network."""
    warnings.simplefilter("ignore")
    hello = {"name": name, "version": version, "language": "Python", "levels": levels}
    for line in sys.stdin:
        question = json.loads(line)
        ask, number = question.pop("ask"), question.pop("id")
        if ask == "hello":
            reply: Json = {"answer": hello}
        elif ask not in asks:
            reply = {"skip": f"does not do {ask}"}
        else:
            try:
                reply = {"answer": asks[ask](**question)}
            except Skip as skip:
                reply = {"skip": str(skip)}
            except Spoilt as error:
                reply = {"error": _first_line(error)}
            except Exception as error:
                reply = {"skip": f"does not take it: {type(error).__name__}: {_first_line(error)}"}
        print(json.dumps({"id": number, **reply}), file=OUT, flush=True)


def _first_line(error: Exception) -> str:
    """Of its message, without folders of this machine."""
    return next(iter(re.sub(r"/\S+/", "", str(error)).splitlines()), "")[:120]


@contextlib.contextmanager
def onnx_file(network: Json) -> Iterator[tuple[Graph, Path]]:
    """The network of a question, and an ONNX file of it."""
    graph = network_of(network)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.onnx")
        files.save(path, graph)
        yield graph, path


def answered(given: Graph, path: str | Path) -> Json:
    """The answer that an ONNX file is, with the inputs as they were; :class:`Skip` if its layers are as they were."""
    model = onnx.load(path)
    for tensor in model.graph.input:  # some tools lose their shapes
        if tensor.name in given.inputs:
            tensor.CopyFrom(onnx.helper.make_tensor_value_info(
                tensor.name, onnx.helper.np_dtype_to_tensor_dtype(given.dtype), ["N", *given.inputs[tensor.name]]))
    for tensor in model.graph.initializer:
        if np.isnan(onnx.numpy_helper.to_array(tensor).astype(np.float64)).any():
            raise Spoilt(f"writes NaN into '{tensor.name}'")
    made = {name for node in model.graph.node for name in node.output} | {tensor.name for tensor in model.graph.input}
    for tensor in model.graph.output:
        if tensor.name not in made:
            raise Spoilt(f"writes a file whose output '{tensor.name}' nothing makes")
    onnx.save(model, path)
    return changed(given, files.load(path))


def changed(given: Graph, got: Graph) -> Json:
    """The answer that a network is; :class:`Skip` if its layers are as they were."""
    layers = [[node.op for node in graph.nodes if isinstance(node.op, Weighted)] for graph in (given, got)]
    if len(layers[0]) == len(layers[1]) and all(
            a.weight.shape == b.weight.shape and np.allclose(a.weight, b.weight, rtol=1e-6, atol=0) for a, b in zip(*layers, strict=True)):
        raise Skip("leaves the network as it is")
    return {"network": network_json(got)}


def float32_alone(network: Json) -> None:
    """Most tools take single precision only."""
    if network_of(network).dtype != np.float32:
        raise Skip("takes float32 alone")


def cross_layer_alone(method: str, max_factor: float) -> None:
    """What of level 4 tools claim: balance, without a bound."""
    if method != "cross_layer":
        raise Skip(f"has no {method}")
    if max_factor < 1024:
        raise Skip("has no bound on factors")
