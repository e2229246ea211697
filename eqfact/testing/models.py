"""What is a network as people keep it in ONNX? A model that is held in memory, as :func:`eqfact.onnx.save` would write it.

onnx is imported when it is needed, not before (the extra ``onnx``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from eqfact.graph import Graph


def to_onnx(graph: Graph) -> Any:
    """The network as an ``onnx.ModelProto``, with a free batch, in its own floating type (float32 if it has no weights).

    Inputs, outputs and nodes have the network's names. Raises :class:`eqfact.onnx.OnnxError` (a :class:`ValueError`) that names the node
    whose op has no counterpart, :class:`ModuleNotFoundError` without the extra ``onnx``.

    >>> [node.op_type for node in to_onnx(Graph.chain((2,), act=ReLU())).graph.node]
    ['Relu']
    """
    from eqfact.onnx.writers import GraphWriter

    return GraphWriter("model", graph).model()


def dtype_of(model: Any) -> np.dtype[Any]:
    """The floating type of a model's first input."""
    from onnx import helper

    return np.dtype(helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type))
