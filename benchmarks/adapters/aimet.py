"""AIMET (onnx) folds BatchNorms and scales across layers; `equalize_model`, its one call, also puts ReLU for ReLU6 and absorbs high
biases, which is not exact, so the steps that claim to keep the function are asked."""

from __future__ import annotations

from importlib.metadata import version

import onnx
from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight
from aimet_onnx.cross_layer_equalization import CrossLayerScaling

from benchmarks.adapters import Json, answered, cross_layer_alone, onnx_file, serve


def _nodes(path: str) -> onnx.ModelProto:
    """The bounds of every Clip as Constant nodes, as torch exports them: AIMET sees a ReLU6 in no other form."""
    model = onnx.load(path)
    bounds = {name for node in model.graph.node if node.op_type == "Clip" for name in node.input[1:]}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name in bounds]:
        model.graph.initializer.remove(tensor)
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [tensor.name], name=tensor.name, value=tensor))
    return model


def fold(network: Json) -> Json:
    with onnx_file(network) as (graph, path):
        model = _nodes(path)
        fold_all_batch_norms_to_weight(model)
        onnx.save(getattr(model, "model", model), path)
        return answered(graph, path)


def equalize(network: Json, method: str, max_factor: float) -> Json:
    cross_layer_alone(method, max_factor)
    with onnx_file(network) as (graph, path):
        model = _nodes(path)
        CrossLayerScaling(model).scale_model()
        onnx.save(getattr(model, "model", model), path)
        return answered(graph, path)


if __name__ == "__main__":
    serve("AIMET", version("aimet-onnx"), [1, 4], {"fold_batchnorm": fold, "equalize": equalize})
