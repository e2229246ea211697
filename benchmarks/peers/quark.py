"""How does AMD Quark equalize? By its ONNX pass for cross-layer equalization, after onnxslim, which it uses too, has folded BatchNorm.

Options are its defaults, one step; replacing ReLU6 by ReLU is one of them, off by default.
"""

from __future__ import annotations

import onnx
from quark.onnx.algorithm import apply_CLE
from quark.onnx.optimizations import optimize_model_using_onnxslim

from benchmarks.peers import arguments, report, timed

TYPES = ["Conv", "Gemm", "Clip", "Relu", "PRelu", "Add", "MaxPool", "GlobalAveragePool"]


def main() -> None:
    _, source, target, way = arguments()
    folded = optimize_model_using_onnxslim(onnx.load(source))
    options = {"ReplaceClip6Relu": way == "replace"}
    model, seconds = timed(lambda: apply_CLE(folded, TYPES, extra_options=options))
    onnx.save(model, target)
    report(seconds, "one step" + (", puts ReLU for ReLU6" if way == "replace" else ""))


if __name__ == "__main__":
    main()
