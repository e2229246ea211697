"""How does PPQ equalize? By its layerwise pass, with the values its quantization setting has by default.

Loading folds BatchNorm. The pass crosses ReLU, PReLU and poolings, but not Clip, which is how ONNX writes ReLU6.
"""

from __future__ import annotations

from esp_ppq.api import load_onnx_graph
from esp_ppq.api.setting import EqualizationSetting
from esp_ppq.core import TargetPlatform
from esp_ppq.parser import OnnxExporter
from esp_ppq.quantization.optim import LayerwiseEqualizationPass

from benchmarks.peers import arguments, report, timed


def main() -> None:
    _, source, target, _ = arguments()
    graph, setting = load_onnx_graph(source), EqualizationSetting()
    step = LayerwiseEqualizationPass(setting.iterations, setting.value_threshold, optimize_level=setting.opt_level)
    operations = [operation for operation in graph.operations.values() if operation.is_computing_op]
    pairs = step.find_equalization_pair(graph, operations)
    _, seconds = timed(lambda: step.optimize(graph=graph, dataloader=None, executor=None, collate_fn=None))
    for operation in graph.operations.values():  # a float network: nothing is dispatched, nothing quantized
        operation.platform = TargetPlatform.FP32
    OnnxExporter().export(target, graph, save_as_external_data=False)
    report(seconds, f"{len(pairs)} pairs, {setting.iterations} iterations")


if __name__ == "__main__":
    main()
