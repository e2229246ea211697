"""Networks of questions as torch modules, and modules as answers: written by torch's own exporter, read by eqfact."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import adapters
from benchmarks.adapters import Json
from eqfact.graph import Graph
from eqfact.testing.modules import to_torch
from eqfact.testing.wire import network_of

OPSET = 17


def module_of(network: Json) -> tuple[Graph, Any]:
    """The network, and a module of it."""
    graph = network_of(network)
    return graph, to_torch(graph)


def answered(given: Graph, module: Any) -> Json:
    """The answer that a module is."""
    dtype = getattr(torch, given.dtype.name)  # type: ignore[union-attr]
    inputs = tuple(torch.zeros((1, *shape), dtype=dtype) for shape in given.inputs.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.onnx")
        names = {name: {0: "N"} for name in given.inputs}
        torch.onnx.export(module.eval(), inputs, str(path), input_names=list(given.inputs), output_names=list(given.outputs),
                          dynamic_axes=names, opset_version=OPSET, dynamo=False, do_constant_folding=False,
                          training=torch.onnx.TrainingMode.PRESERVE)
        return adapters.answered(given, path)
