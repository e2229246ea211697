"""What does onnxsim do? It does not equalize; it folds BatchNorm and constants, which must keep the function too."""

from __future__ import annotations

import onnx
import onnxsim

from benchmarks.peers import arguments, report, timed


def main() -> None:
    _, source, target, _ = arguments()
    (model, valid), seconds = timed(lambda: onnxsim.simplify(onnx.load(source)))
    onnx.save(model, target)
    report(seconds, "folds only, does not equalize" + ("" if valid else "; its own check failed"))


if __name__ == "__main__":
    main()
