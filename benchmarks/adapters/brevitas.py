"""brevitas folds BatchNorms and equalizes on torch.fx modules; ReLU6 is kept, as the function is asked for, and
weights are balanced without a share of their biases."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from brevitas.graph.equalize import EqualizeGraph
from brevitas.graph.quantize import preprocess_for_quantize

from benchmarks.adapters import Json, cross_layer_alone, serve
from benchmarks.adapters.modules import answered, module_of

ITERATIONS = 200


def fold(network: Json) -> Json:
    graph, module = module_of(network)
    return answered(graph, preprocess_for_quantize(module, equalize_iters=0, relu6_to_relu=False))


def equalize(network: Json, method: str, max_factor: float) -> Json:
    cross_layer_alone(method, max_factor)
    graph, module = module_of(network)
    module = preprocess_for_quantize(module, equalize_iters=0, relu6_to_relu=False, merge_bn=False)
    equalized: Any = EqualizeGraph(iterations=ITERATIONS, threshold=1e-9, merge_bias=False).apply(module)
    return answered(graph, equalized)


if __name__ == "__main__":
    torch.manual_seed(0)
    serve("brevitas", version("brevitas"), [1, 4], {"fold_batchnorm": fold, "equalize": equalize})
