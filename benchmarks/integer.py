"""Does an integer engine compute what eqfact says that it computes?

Every network is equalized, quantized (W8A8, its outputs on grids too) and written as QDQ ONNX; onnxruntime runs the file on
images that were not calibrated on, and its outputs are compared with eqfact's fake-quantized forward, in steps of the output's grid.
Weights have one scale, or one for each output channel.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import eqfact as eq
import eqfact.onnx
from benchmarks import networks, results
from benchmarks.quality import Array, Outputs, run
from eqfact.quantization import grid_of

IMAGES = 10


def measure(only: Sequence[str]) -> None:
    """Measure, keep and print the agreement on each network."""
    for name in only:
        x, _ = networks.images(name)
        graph = eq.equalize(eq.fold_batchnorm(eqfact.onnx.load(networks.networks()[name]))).graph
        stats, truth = eq.calibrate(graph, [image[None] for image in x[:IMAGES]]), run(graph, x[IMAGES:])
        for granularity in ("per_tensor", "per_channel"):
            quantized = eq.quantize(graph, weights=eq.UniformQuantizer(8, granularity=granularity), stats=stats, outputs=True,
                                    activations=eq.UniformQuantizer(8, symmetric=False))
            ours = run(quantized, x[IMAGES:])
            theirs, kernels = _run_onnxruntime(quantized, x[IMAGES:])
            steps = np.concatenate([np.rint(np.abs(theirs[output] - y) / _step(quantized, output)).ravel() for output, y in ours.items()])
            row = {"network": name, "granularity": granularity, "entries": len(steps), "equal": float((steps == 0).mean()),
                   "within": float((steps <= 1).mean()), "largest": int(steps.max()), "noise": eq.sqnr(truth, ours),
                   "layers": sum(isinstance(node.op, eq.Weighted) for node in quantized), "integer": kernels}
            results.keep("integer", {f"{name}: {granularity}": row})
            print(f"integer   {name:20s}{granularity:12s}{100 * row['equal']:.2f} % equal, {100 * row['within']:.2f} % within one step, "
                  f"largest {row['largest']}; {row['noise']:.1f} dB from float; {kernels} of {row['layers']} layers in integers",
                  flush=True)


def _run_onnxruntime(quantized: eq.Graph, images: Array) -> tuple[Outputs, int]:
    """All outputs of the exported file by name, image by image; and how many layers ran in integers."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path, ran = str(Path(folder) / "quantized.onnx"), str(Path(folder) / "ran.onnx")
        eqfact.onnx.save_qdq(path, quantized)
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", "1")  # no sums in 16 bits on processors without VNNI
        options.optimized_model_filepath, options.log_severity_level = ran, 3
        session = onnxruntime.InferenceSession(path, options)
        names, (given,) = [output.name for output in session.get_outputs()], session.get_inputs()
        answers = [session.run(names, {given.name: image[None]}) for image in images]
        kernels = sum(node.op_type in ("QLinearConv", "QGemm") for node in onnx.load(ran).graph.node)
    return {name: np.concatenate(parts) for name, parts in zip(names, zip(*answers, strict=True), strict=True)}, kernels


def _step(quantized: eq.Graph, value: str) -> float:
    """The step of the grid that an output lies on."""
    grid = grid_of(quantized, value)
    assert grid is not None
    return float(grid.scale.item())
