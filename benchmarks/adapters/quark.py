"""AMD Quark (onnx) folds BatchNorms with onnxslim, and equalizes with its pass for cross-layer equalization, repeated until it is done, no
channel left out for being small."""

from __future__ import annotations

from importlib.metadata import version

import onnx
from quark.onnx.algorithm import apply_CLE
from quark.onnx.optimizations import optimize_model_using_onnxslim

from benchmarks.adapters import Json, answered, cross_layer_alone, onnx_file, serve

TYPES = ["Conv", "ConvTranspose", "Gemm", "Clip", "Relu", "LeakyRelu", "PRelu", "Add", "MaxPool", "AveragePool", "GlobalAveragePool"]
STEPS = 200


def fold(network: Json) -> Json:
    with onnx_file(network) as (graph, path):
        onnx.save(optimize_model_using_onnxslim(onnx.load(path)), path)
        return answered(graph, path)


def equalize(network: Json, method: str, max_factor: float) -> Json:
    cross_layer_alone(method, max_factor)
    with onnx_file(network) as (graph, path):
        onnx.save(apply_CLE(onnx.load(path), TYPES, extra_options={"CLESteps": STEPS, "CLEScaleUseThreshold": False}), path)
        return answered(graph, path)


if __name__ == "__main__":
    serve("Quark", version("amd-quark"), [1, 4], {"fold_batchnorm": fold, "equalize": equalize})
