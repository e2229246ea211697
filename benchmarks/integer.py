"""Does an integer engine compute what eqfact says that it computes?

Every network is equalized, quantized (W8A8, its outputs on grids too) and written as QDQ ONNX; onnxruntime runs the file on
images that were not calibrated on, and its outputs are compared with eqfact's fake-quantized forward, in steps of the output's grid.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import eqfact as eq
import eqfact.onnx
from benchmarks import networks, results

Array = NDArray[np.float32]

IMAGES = 10


def measure(only: Sequence[str]) -> None:
    """Measure, keep and print the agreement on each network."""
    for name in only:
        x, _ = networks.images(name)
        graph = eq.equalize(eq.fold_batchnorm(eqfact.onnx.load(networks.networks()[name]))).graph
        stats = eq.calibrate(graph, [image[None] for image in x[:IMAGES]])
        quantized = eq.quantize(graph, weights=eq.UniformQuantizer(8), activations=eq.UniformQuantizer(8, symmetric=False), stats=stats,
                                outputs=True)
        steps, between = _compare(quantized, x[IMAGES:])
        noise = eq.sqnr(np.concatenate([_flat(eq.forward(graph, image[None])) for image in x[IMAGES:]]),
                        np.concatenate([_flat(eq.forward(quantized, image[None])) for image in x[IMAGES:]]))
        row = {"entries": len(steps), "equal": float((steps == 0).mean()), "within": float((steps <= 1).mean()),
               "largest": int(steps.max()), "between": between, "noise": noise}
        results.keep("integer", {name: row})
        print(f"integer   {name:20s}{100 * row['equal']:.1f} % equal, {100 * row['within']:.1f} % within one step, "
              f"largest {row['largest']}; {between:.1f} dB between them, {noise:.1f} dB from float", flush=True)


def _flat(y: Array | dict[str, Array]) -> Array:
    return np.concatenate([part.reshape(-1) for part in y.values()]) if isinstance(y, dict) else y.reshape(-1)


def _compare(quantized: eq.Graph, images: Array) -> tuple[Array, float]:
    """By how many steps each entry of the outputs differs between onnxruntime and eqfact, and the SQNR of that difference in dB."""
    import onnxruntime

    grids = {node.name: node.op.grid for node in quantized.nodes if isinstance(node.op, eq.FakeQuantize)}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "quantized.onnx")
        eqfact.onnx.save_qdq(path, quantized)
        session = onnxruntime.InferenceSession(path)
        found, pairs = [], []
        for image in images:
            others = dict(zip([o.name for o in session.get_outputs()], session.run(None, {session.get_inputs()[0].name: image[None]}),
                              strict=True))
            answer = eq.forward(quantized, image[None])
            for name, y in (answer if isinstance(answer, dict) else {quantized.outputs[0]: answer}).items():
                maker = name
                while maker not in grids:  # what an op only moves lies on the grid of its input
                    maker = quantized[maker].inputs[0]
                pairs.append((y.reshape(-1), others[name].reshape(-1)))
                found.append(np.rint(np.abs(others[name] - y) / grids[maker].scale.item()).reshape(-1))
    ours, theirs = (np.concatenate(side) for side in zip(*pairs, strict=True))
    return np.concatenate(found), eq.sqnr(ours, theirs)
