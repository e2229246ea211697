"""PPQ (esp-ppq) folds BatchNorms as it loads a file, and equalizes by its layerwise pass; more iterations than its default, and
no channel left out for being small, so that what can be balanced is."""

from __future__ import annotations

from importlib.metadata import version

from esp_ppq.api import load_onnx_graph
from esp_ppq.api.setting import EqualizationSetting
from esp_ppq.core import TargetPlatform
from esp_ppq.parser import OnnxExporter
from esp_ppq.quantization.optim import LayerwiseEqualizationPass

from benchmarks.adapters import Json, answered, cross_layer_alone, onnx_file, serve

ITERATIONS = 200


def _written(ppq_graph: object, path: object) -> None:
    for operation in ppq_graph.operations.values():  # type: ignore[attr-defined]  # a float network: nothing is dispatched
        operation.platform = TargetPlatform.FP32
    OnnxExporter().export(str(path), ppq_graph, save_as_external_data=False)


def fold(network: Json) -> Json:
    with onnx_file(network) as (graph, path):
        _written(load_onnx_graph(str(path)), path)
        return answered(graph, path)


def equalize(network: Json, method: str, max_factor: float) -> Json:
    cross_layer_alone(method, max_factor)
    with onnx_file(network) as (graph, path):
        loaded, setting = load_onnx_graph(str(path)), EqualizationSetting()
        step = LayerwiseEqualizationPass(ITERATIONS, value_threshold=0.0, optimize_level=setting.opt_level)
        step.optimize(graph=loaded, dataloader=None, executor=None, collate_fn=None)
        _written(loaded, path)
        return answered(graph, path)


if __name__ == "__main__":
    serve("PPQ", version("esp-ppq"), [1, 4], {"fold_batchnorm": fold, "equalize": equalize})
