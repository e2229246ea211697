"""What is known of a file without running it? Nodes that read nothing but constants, computed by onnx's own evaluator.

How much may come of it is asked before anything is made: a few bytes of a file can ask for terabytes, or for ever.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

AnyArray = npt.NDArray[Any]

#: Not constant, although all their inputs may be.
RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")
#: Before opset 13 these ran over all axes from ``axis`` on.
TO_THE_END = ("Softmax", "LogSoftmax", "Hardmax")
#: Nodes that run graphs of their own, as often as they like.
NESTED = ("If", "Loop", "Scan", "SequenceMap")
#: A node's outputs hold at most this many entries, or twice as many as it reads.
MOST_ENTRIES = 2**24
#: What costs more than a step or so an entry is computed on at most this many.
COSTLY = ("Einsum", "Conv", "ConvTranspose", "ConvInteger", "MatMulInteger", "DeformConv", "LSTM", "GRU", "RNN",
          "Attention", "NonMaxSuppression", "TfIdfVectorizer", "Det", "DFT", "STFT", "RoiAlign", "MaxRoiPool", "GridSample", "Resize",
          "MaxPool", "AveragePool", "LpPool", "MaxUnpool", "LRN", "Col2Im")
MOST_COSTLY = 2**20
#: What makes no more entries than it reads, or a few times as many, though nobody knows beforehand how many.
SHRINKING = ("NonZero", "Unique", "Compress", "NonMaxSuppression")
#: A matrix product adds up at most this many products.
MOST_PRODUCTS = 2**32
#: Inputs up to this many entries may say how large an output is.
MOST_INFERRED = 1024


def computed(node: onnx.NodeProto, opsets: Mapping[str, int], feeds: Mapping[str, AnyArray]) -> list[AnyArray]:
    """The outputs of a node for these inputs; :class:`ValueError` if that would be too much, or onnx cannot compute it."""
    if node.op_type in NESTED:
        raise ValueError("it runs a graph of its own, which is not done while a file is read")
    if node.op_type in TO_THE_END and opsets.get("", 0) < 13:
        return _to_the_end(node, opsets, feeds)
    if node.op_type in OWN and node.domain in ("", "ai.onnx"):
        return [OWN[node.op_type](*(feeds[name] for name in node.input), **{a.name: helper.get_attribute_value(a) for a in node.attribute})]
    model = _alone(node, opsets, feeds)
    read = sum(a.size for a in feeds.values())
    if read > MOST_ENTRIES and any(0 in a.strides for a in feeds.values()):
        raise ValueError(f"it reads {read} entries, for a batch that stands for any; more than {MOST_ENTRIES} are not computed")
    try:
        made = _entries_made(model)
    except onnx.shape_inference.InferenceError as error:
        raise ValueError(f"its constant inputs do not fit: {' '.join(str(error).split())[:300]}") from error
    if node.op_type in ("MatMul", "Gemm") and made is not None:
        steps = made * max(a.shape[-1] for a in feeds.values() if a.ndim)
        if steps > MOST_PRODUCTS:
            raise ValueError(f"it adds up {steps} products of constants, more than are computed while a file is read")
    elif made is None and node.op_type not in SHRINKING:
        raise ValueError("onnx does not tell how much it makes of its constants, so it is not computed while a file is read")
    elif node.op_type in COSTLY and read > MOST_COSTLY:
        raise ValueError(f"it reads {read} constant entries; on more than {MOST_COSTLY} it is not computed while a file is read")
    if made is not None and made > max(MOST_ENTRIES, 2 * read):
        raise ValueError(f"it makes {made} entries of {read} constant ones, more than are computed while a file is read")
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a kernel of onnx finds odd is not the user's doing
            outputs: Any = ReferenceEvaluator(model).run(None, {i.name: feeds[i.name] for i in model.graph.input})
    except Exception as error:  # whatever a kernel of onnx raises
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"onnx cannot compute it from its constants: {type(error).__name__}: {said}") from error
    if not all(isinstance(y, (np.ndarray, np.generic)) for y in outputs):
        raise ValueError("it makes no tensor of its constants")
    return [np.asarray(y) for y in outputs]


def expanded(x: AnyArray, shape: AnyArray) -> AnyArray:
    """What an Expand makes, without a copy for each repetition; of an ``x`` that is no more than may be made in any case."""
    if x.size > MOST_ENTRIES:
        raise ValueError(f"it repeats {x.size} constant entries for every sample, more than are read")
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(shape.reshape(-1).tolist())))


def _gather_elements(data: AnyArray, indices: AnyArray, axis: int = 0) -> AnyArray:
    fits = data.ndim == indices.ndim and -data.ndim <= axis < data.ndim
    if not fits or any(n > m for i, (n, m) in enumerate(zip(indices.shape, data.shape, strict=True)) if i != axis % data.ndim):
        raise ValueError(f"it takes entries of shape {indices.shape} along axis {axis} of a tensor of shape {data.shape}")
    axis %= data.ndim
    beside = tuple(slice(None) if i == axis else slice(n) for i, n in enumerate(indices.shape))
    try:
        taken: AnyArray = np.take_along_axis(data[beside], indices, axis)
    except IndexError as error:
        raise ValueError(f"it takes entries that are not there: {error}") from error
    return taken


def _lp_normalization(x: AnyArray, axis: int = -1, p: int = 2) -> AnyArray:
    if p not in (1, 2) or not -x.ndim <= axis < x.ndim:
        raise ValueError(f"it has p={p} along axis {axis} of a tensor of shape {x.shape}")
    norm = np.linalg.norm(x, p, axis, keepdims=True)
    unit: AnyArray = np.divide(x, norm, out=np.zeros_like(x), where=norm != 0)
    return unit


#: What onnx's evaluator computes otherwise than the standard says (onnx 1.23: along 64 entries and more; without absolute values).
OWN: dict[str, Callable[..., AnyArray]] = {"GatherElements": _gather_elements, "LpNormalization": _lp_normalization}


def _to_the_end(node: onnx.NodeProto, opsets: Mapping[str, int], feeds: Mapping[str, AnyArray]) -> list[AnyArray]:
    """The old form of a node that runs over all axes from one on at once, which onnx's evaluator takes for the new one."""
    ((name, x),) = feeds.items()
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    if not -x.ndim <= axis <= x.ndim:
        raise ValueError(f"axis {axis} is none of a tensor with {x.ndim} axes")
    flat = x.reshape(math.prod(x.shape[:axis]) if axis else 1, -1)
    new = helper.make_node(node.op_type, [name], list(node.output), axis=1)
    return [y.reshape(x.shape) for y in computed(new, {**opsets, "": 13}, {name: flat})]


def _alone(node: onnx.NodeProto, opsets: Mapping[str, int], feeds: Mapping[str, AnyArray]) -> onnx.ModelProto:
    """A model of one node: onnx's evaluator of a bare node takes the newest operators, whatever the file's opset."""
    # what says how large outputs are stands in the model, for onnx to look at; weights would only be copied
    small = {name: a for name, a in feeds.items() if a.size <= MOST_INFERRED}
    inputs = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
              for name, a in feeds.items() if name not in small]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    graph = helper.make_graph([node], "constant", inputs, outputs, [numpy_helper.from_array(a, name) for name, a in small.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(domain, version) for domain, version in opsets.items()])


def _entries_made(model: onnx.ModelProto) -> int | None:
    """How many entries the outputs have together, as far as onnx can tell without computing them."""
    total = 0
    for info in onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output:
        kind = info.type.tensor_type
        if not kind.HasField("shape") or any(not d.HasField("dim_value") for d in kind.shape.dim):
            return None
        total += math.prod(d.dim_value for d in kind.shape.dim)
    return total


def constant_arrays(tensors: Sequence[onnx.TensorProto]) -> dict[str, AnyArray]:
    """Initializers by name, locked against writing."""
    arrays = {}
    for tensor in tensors:
        try:
            value = np.array(numpy_helper.to_array(tensor))
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"initializer '{tensor.name}' cannot be read: {error}") from error
        value.flags.writeable = False
        arrays[tensor.name] = value
    return arrays
