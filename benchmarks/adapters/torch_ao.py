"""PyTorch fuses BatchNorms (`torch.fx.experimental.optimization.fuse`), equalizes pairs that one names (`torch.ao.quantization._equalize`),
and quantizes tensors."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch.ao.quantization import _equalize
from torch.fx.experimental.optimization import fuse

from benchmarks.adapters import Json, Skip, cross_layer_alone, serve
from benchmarks.adapters.modules import answered, module_of
from eqfact.testing.wire import array_json, array_of

#: What may stand between the two modules of a pair: `_equalize` knows nothing of it, and leaves that to its caller.
BETWEEN = (torch.nn.ReLU, torch.nn.LeakyReLU, torch.nn.MaxPool2d, torch.nn.AvgPool2d, torch.nn.Identity)


def fold(network: Json) -> Json:
    graph, module = module_of(network)
    return answered(graph, fuse(module))


def equalize(network: Json, method: str, max_factor: float) -> Json:
    cross_layer_alone(method, max_factor)
    graph, module = module_of(network)
    pairs = _pairs(module)
    if not pairs:
        raise Skip("finds no pairs: they are named by hand, and only layers in a row are meant")
    equalized = _equalize.equalize(copy.deepcopy(module), pairs, threshold=1e-6, inplace=True)
    return answered(graph, equalized)


def _pairs(module: Any) -> list[list[str]]:
    """Layers one behind the other, with at most an activation between them."""
    layers = (torch.nn.Conv2d, torch.nn.Linear)
    calls = {node: module.get_submodule(node.target) for node in module.graph.nodes if node.op == "call_module"}
    found = []
    for node, layer in calls.items():
        if not isinstance(layer, layers):
            continue
        users = list(node.users)
        while len(users) == 1 and users[0] in calls and isinstance(calls[users[0]], BETWEEN):
            users = list(users[0].users)
        if len(users) == 1 and users[0] in calls and isinstance(calls[users[0]], layers):
            found.append([node.target, users[0].target])
    return found


def quantize(grid: Json, x: Json) -> Json:
    array = array_of(x)
    dtype = {(0, 255): torch.quint8, (-128, 127): torch.qint8}.get((grid["qmin"], grid["qmax"]))
    if grid["rounding"] != "half_even" or dtype is None or (array != array.astype(np.float32)).any():
        raise Skip("rounds halves to even, in float32, to 8 bits")
    scale, zero = array_of(grid["scale"]), array_of(grid["zero_point"])
    tensor = torch.from_numpy(array.astype(np.float32))
    made = torch.quantize_per_tensor(tensor, float(scale[0]), int(zero[0]), dtype) if len(scale) == 1 else torch.quantize_per_channel(
        tensor, torch.from_numpy(scale.copy()), torch.from_numpy(zero.copy()), 1, dtype)
    return {"q": array_json(made.int_repr().numpy().astype(np.int32))}


def dequantize(grid: Json, q: Json, dtype: str) -> Json:
    if dtype != "float32":
        raise Skip("makes float32")
    scale, zero = array_of(grid["scale"]), array_of(grid["zero_point"])
    made = torch._make_per_tensor_quantized_tensor(torch.from_numpy(array_of(q).astype(np.uint8)), float(scale[0]), int(zero[0]))
    return {"x": array_json(made.dequantize().numpy())}


if __name__ == "__main__":
    serve("PyTorch", torch.__version__, [1, 4, 5], {"fold_batchnorm": fold, "equalize": equalize, "quantize": quantize,
                                                    "dequantize": dequantize})
