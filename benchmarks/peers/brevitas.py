"""How does brevitas equalize? On the torch module, through the passes of its own post-training flow.

`preprocess_for_quantize` folds BatchNorm and, the usual way, puts ReLU in the place of ReLU6; `EqualizeGraph` does the
rest, 20 iterations as in its ImageNet example. The other way keeps ReLU6, which it does not cross.
"""

from __future__ import annotations

import torch
from brevitas.graph.equalize import EqualizeGraph
from brevitas.graph.quantize import preprocess_for_quantize

from benchmarks import networks
from benchmarks.peers import arguments, report, timed

ITERATIONS = 20


def main() -> None:
    network, _, target, way = arguments()
    torch.manual_seed(0)
    module = preprocess_for_quantize(networks.torch_module(network), equalize_iters=0, relu6_to_relu=way == "usual")
    (equalized, regions), seconds = timed(lambda: EqualizeGraph(iterations=ITERATIONS, return_regions=True).apply(module))
    source = networks.SOURCES[network]
    torch.onnx.export(equalized, (torch.zeros(1, 3, source.size, source.size),), target, input_names=["image"],
                      output_names=list(source.outputs), dynamic_axes={"image": {0: "N"}}, opset_version=networks.OPSET, dynamo=False)
    report(seconds, f"{len(regions)} regions, {ITERATIONS} iterations" + ("; puts ReLU for ReLU6" if way == "usual" else ""))


if __name__ == "__main__":
    main()
