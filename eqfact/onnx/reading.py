"""When may a file be trusted to be an ONNX network that this library can read?

Everything is asked before anything is converted: is it a protobuf of a model, of an opset known here, with all its
external data beside it, in float. Each answer is one :class:`OnnxError` with the path, the rule, what was seen and a remedy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import external_data_helper

from eqfact.onnx.origin import OnnxError, errors_of

#: Opset 6 is what the oldest files in use have; files are written for 13 at least, where what was an attribute is an input.
OLDEST_OPSET, OLDEST_WRITTEN = 6, 13
#: A protobuf holds at most 2 GiB (the checker makes one).
LARGEST = 2**31 - 1
#: Op types of networks that somebody has quantized already.
QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")


def read_model(path: Path) -> onnx.ModelProto:
    """The model of a file, complete and checked; :class:`OnnxError` if it is not one, :class:`OSError` if it cannot be opened."""
    data = path.read_bytes()
    with errors_of(path):
        return _model(path, data)


def _model(path: Path, data: bytes) -> onnx.ModelProto:
    size = len(data)
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise OnnxError(f"{path}: not an ONNX file, or a truncated one ({size} bytes): {error}") from error
    del data
    if not model.HasField("graph") or not model.graph.output or not model.opset_import:
        raise OnnxError(f"{path}: not an ONNX network, or a truncated one ({size} bytes): "
                        f"it has {len(model.graph.node)} nodes, {len(model.graph.output)} outputs and {len(model.opset_import)} opsets")
    version, newest = opset(model), onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= version <= newest:
        raise OnnxError(f"{path}: opset {version} is none of those that are read here, {OLDEST_OPSET} to {newest} (the newest that "
                        f"onnx {onnx.__version__} knows); convert the file with onnx.version_converter, or install a newer onnx")
    if model.graph.sparse_initializer:
        raise OnnxError(f"{path}: it has sparse initializers ('{model.graph.sparse_initializer[0].values.name}'); store them as dense ones")
    for node in _all_nodes(model.graph):
        if node.op_type in QUANTIZED:
            name = node.name or next(iter(node.output), "")
            raise OnnxError(f"{path}: node '{name}' ({node.op_type}): the network is quantized already; "
                            "start from the float network that it was made of")
    for tensor in external_data_helper._get_all_tensors(model):
        if external_data_helper.uses_external_data(tensor):
            _check_external(path, tensor)
    try:
        onnx.load_external_data_for_model(model, os.fspath(path.parent))
        if model.ByteSize() < LARGEST:
            check_model(model)
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError, OSError) as error:
        raise OnnxError(f"{path}: not a valid ONNX network: {' '.join(str(error).split())[:500]}") from error
    read: onnx.ModelProto = model
    return read


def check_model(model: onnx.ModelProto, *, full: bool = False) -> None:
    """onnx's own check, with its shapes if ``full``; what files leave open in ways that it does not like is looked over."""
    infos = [info for info in (*model.graph.input, *model.graph.output, *model.graph.value_info) if info.type.HasField("tensor_type")]
    shapeless = [info for info in infos[:len(model.graph.input) + len(model.graph.output)] if not info.type.tensor_type.HasField("shape")]
    negative = [(dim, dim.dim_value) for info in infos for dim in info.type.tensor_type.shape.dim if dim.dim_value < 0]
    for dim, _ in negative:
        dim.ClearField("dim_value")
    for info in shapeless:
        info.type.tensor_type.shape.SetInParent()
    try:
        onnx.checker.check_model(model)
        if full:
            onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    finally:
        for info in shapeless:
            info.type.tensor_type.ClearField("shape")
        for dim, value in negative:
            dim.dim_value = value


def input_names(path: Path | str) -> list[str]:
    """The inputs of a file that are no weights, before anything else is asked of it; none if it is not ONNX."""
    try:
        graph = onnx.ModelProto.FromString(Path(path).read_bytes()).graph
    except DecodeError:
        return []
    return [str(info.name) for info in graph.input if info.name not in {tensor.name for tensor in graph.initializer}]


def opset(model: onnx.ModelProto) -> int:
    """Version of the standard operators, 0 if the file does not import them."""
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def _check_external(path: Path, tensor: onnx.TensorProto) -> None:
    """Data beside the network, in a file of the same folder or below."""
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    folder = path.parent.resolve()
    target = (folder / location).resolve()
    if not location or not target.is_relative_to(folder):
        raise OnnxError(f"{path}: the data of tensor '{tensor.name}' is said to be in '{location}', outside the network's folder; "
                        "this is not followed: move the data beside the network")
    if not target.is_file():
        raise OnnxError(f"{path}: the data of tensor '{tensor.name}' is missing: there is no file '{location}' beside the network")


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from _all_nodes(inner)
