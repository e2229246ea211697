"""onnxsim folds BatchNorms, and must keep the function."""

from __future__ import annotations

from importlib.metadata import version

import onnx
import onnxsim

from benchmarks.adapters import Json, answered, onnx_file, serve


def fold(network: Json) -> Json:
    with onnx_file(network) as (graph, path):
        model, _ = onnxsim.simplify(onnx.load(path))
        onnx.save(model, path)
        return answered(graph, path)


if __name__ == "__main__":
    serve("onnxsim", version("onnxsim"), [1], {"fold_batchnorm": fold})
