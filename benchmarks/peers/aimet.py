"""How does AIMET equalize? The usual way is its one high-level call; the other way takes the steps that keep the function.

`equalize_model` folds BatchNorm, puts ReLU in the place of ReLU6, scales across layers and absorbs high biases, which is
not exact. The other way folds and scales only.
"""

from __future__ import annotations

import onnx
from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight
from aimet_onnx.cross_layer_equalization import CrossLayerScaling, equalize_model

from benchmarks.peers import arguments, report, timed


def bounds_as_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write the bounds of every Clip as Constant nodes, as torch exports them: AIMET sees a ReLU6 in no other form."""
    bounds = {name for node in model.graph.node if node.op_type == "Clip" for name in node.input[1:]}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name in bounds]:
        model.graph.initializer.remove(tensor)
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [tensor.name], name=tensor.name, value=tensor))
    return model


def main() -> None:
    _, source, target, way = arguments()
    model = bounds_as_nodes(onnx.load(source))
    if way == "usual":
        _, seconds = timed(lambda: equalize_model(model))
        remark = "one call: folds, puts ReLU for ReLU6, scales, absorbs high biases"
    else:
        fold_all_batch_norms_to_weight(model)
        sets, seconds = timed(lambda: CrossLayerScaling(model).scale_model())
        remark = f"{len(sets)} sets of layers"
    onnx.save(model, target)
    report(seconds, remark)


if __name__ == "__main__":
    main()
