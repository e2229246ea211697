"""Does an integer engine compute what eqfact says that it computes?

Every network is equalized, quantized (W8A8, its outputs on grids too) and written as QDQ ONNX; onnxruntime runs the file on
images that were not calibrated on, and its outputs are compared with eqfact's fake-quantized forward, in steps of the output's grid.
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
        stats = eq.calibrate(graph, [image[None] for image in x[:IMAGES]])
        quantized = eq.quantize(graph, weights=eq.UniformQuantizer(8), activations=eq.UniformQuantizer(8, symmetric=False), stats=stats,
                                outputs=True)
        ours, theirs = run(quantized, x[IMAGES:]), _run_onnxruntime(quantized, x[IMAGES:])
        steps = np.concatenate([np.rint(np.abs(theirs[output] - y) / _step(quantized, output)).reshape(-1) for output, y in ours.items()])
        between, noise = eq.sqnr(ours, theirs), eq.sqnr(run(graph, x[IMAGES:]), ours)
        row = {"entries": len(steps), "equal": float((steps == 0).mean()), "within": float((steps <= 1).mean()),
               "largest": int(steps.max()), "between": between, "noise": noise}
        results.keep("integer", {name: row})
        print(f"integer   {name:20s}{100 * row['equal']:.1f} % equal, {100 * row['within']:.1f} % within one step, "
              f"largest {row['largest']}; {between:.1f} dB between them, {noise:.1f} dB from float", flush=True)


def _run_onnxruntime(quantized: eq.Graph, images: Array) -> Outputs:
    """All outputs of the exported file by name, image by image."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "quantized.onnx")
        eqfact.onnx.save_qdq(path, quantized)
        session = onnxruntime.InferenceSession(path)
        names, (given,) = [output.name for output in session.get_outputs()], session.get_inputs()
        answers = [session.run(names, {given.name: image[None]}) for image in images]
    return {name: np.concatenate(parts) for name, parts in zip(names, zip(*answers, strict=True), strict=True)}


def _step(quantized: eq.Graph, value: str) -> float:
    """The step of the grid that an output lies on."""
    grid = grid_of(quantized, value)
    assert grid is not None
    return float(grid.scale.item())
