"""Small ONNX networks, built node by node with onnx.helper, and ways to run a file with other people's code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

import eqfact as eq
import eqfact.onnx

Arrays = Mapping[str, Any]


def ints(*values: int) -> Any:
    """A constant of int64."""
    return np.array(values, np.int64)


def normals(seed: int) -> Callable[..., Any]:
    """A maker of float32 arrays: each call draws on."""
    rng = np.random.default_rng(seed)
    return lambda *shape: rng.normal(size=shape).astype(np.float32)


def model(nodes: Sequence[onnx.NodeProto], inputs: Mapping[str, Sequence[int | str]], outputs: Sequence[str],
          constants: Arrays | None = None, opset: int = 17, elem_type: int = TensorProto.FLOAT, **options: Any) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "small", [helper.make_tensor_value_info(name, elem_type, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, elem_type, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in (constants or {}).items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, **options)


def run_ort(path: Any, feeds: Arrays, *, integers: Any = None) -> dict[str, np.ndarray]:
    """The outputs of a file in onnxruntime, as it is written; or in integer kernels, and what these are is written to ``integers``."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if integers is None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    else:
        options.optimized_model_filepath = str(integers)
        options.add_session_config_entry("session.x64quantprecision", "1")  # no sums in 16 bits on processors without VNNI
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


def run_eq(graph: eq.Graph, feeds: Arrays) -> dict[str, np.ndarray]:
    y = eq.forward(graph, feeds)
    return y if isinstance(y, dict) else {graph.outputs[0]: y}


def feeds_of(graph: eq.Graph, batch: int = 2, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: (2 * rng.normal(size=(batch, *shape))).astype(dtype) for name, shape in graph.inputs.items()}


def close(actual: Arrays, expected: Arrays, tolerance: float = 2e-5) -> None:
    """Equal names and shapes, and entries within a tolerance of the largest."""
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=tolerance * max(1.0, float(np.abs(value).max())), err_msg=name)


def imported(tmp_path: Path, proto: onnx.ModelProto, batch: int = 2, **options: Any) -> eq.Graph:
    """The network of a model, after checking that eqfact and onnxruntime agree on it, and on what is exported again."""
    path, again = tmp_path / "given.onnx", tmp_path / "again.onnx"
    onnx.save(proto, path)
    graph = eqfact.onnx.load(path, **options)
    feeds = feeds_of(graph, batch)
    expected = run_ort(path, feeds)
    close(run_eq(graph, feeds), expected)
    eqfact.onnx.save(again, graph)
    close(run_ort(again, feeds), expected)
    close(run_eq(eqfact.onnx.load(again, **options), feeds), expected)
    return graph


def names(proto: onnx.ModelProto) -> dict[str, set[str]]:
    """All that people see when they compare files."""
    graph = proto.graph
    return {"nodes": {n.name for n in graph.node}, "values": {o for n in graph.node for o in n.output},
            "initializers": {i.name for i in graph.initializer}, "inputs": {i.name for i in graph.input},
            "outputs": {o.name for o in graph.output}}


class Builder:
    """A network like an exporter writes it: every node has a name, weights have their layer's."""

    def __init__(self, shape: Sequence[int | str], seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.inputs = {"image": list(shape)}

    def node(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        output = output or f"/{kind.lower()}_{len(self.nodes)}/out"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=f"/{kind}_{len(self.nodes)}", **attributes))
        return output

    def constant(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        self.constants[name] = np.asarray(value, dtype)
        return name

    def conv(self, x: str, out: int, inner: int, kernel: int = 1, groups: int = 1, bn: bool = True, **attributes: Any) -> str:
        name = f"layer{len(self.nodes)}"
        weight = self.rng.normal(size=(out, inner // groups, kernel, kernel)) * (2 * groups / (kernel * kernel * inner)) ** 0.5
        w = self.constant(f"{name}.weight", weight)
        bias = [] if bn else [self.constant(f"{name}.bias", self.rng.normal(size=out) / 5)]
        y = self.node("Conv", x, w, *bias, **{"kernel_shape": [kernel] * 2, "group": groups, "pads": [kernel // 2] * 4, **attributes})
        if bn:
            parameters = [self.constant(f"{name}.bn.{p}", v) for p, v in (
                ("weight", self.rng.uniform(0.1, 3, out)), ("bias", self.rng.normal(size=out) / 2),
                ("running_mean", self.rng.normal(size=out) / 2), ("running_var", self.rng.uniform(0.2, 3, out)))]
            y = self.node("BatchNormalization", y, *parameters, epsilon=1e-3)
        return y

    def relu6(self, x: str) -> str:
        return self.node("Clip", x, self.constant("zero", 0.0), self.constant("six", 6.0))

    def gemm(self, x: str, out: int, inner: int, output: str | None = None) -> str:
        w = self.constant("fc.weight", self.rng.normal(size=(out, inner)) / inner**0.5)
        b = self.constant("fc.bias", self.rng.normal(size=out))
        return self.node("Gemm", x, w, b, output=output, transB=1)

    def model(self, *outputs: str, opset: int = 17) -> onnx.ModelProto:
        return model(self.nodes, self.inputs, outputs, self.constants, opset, producer_name="tests")


def mini_mobilenet() -> onnx.ModelProto:
    """Inverted residuals with depthwise convolutions, BatchNorm and ReLU6; global pooling flattened by Shape, Gather and Concat."""
    b = Builder(["N", 3, 16, 16])
    x = b.relu6(b.conv("image", 8, 3, 3, strides=[2, 2]))
    for _ in range(2):
        y = b.relu6(b.conv(x, 24, 8))
        y = b.relu6(b.conv(y, 24, 24, 3, groups=24))
        x = b.node("Add", x, b.conv(y, 8, 24))
    x = b.node("GlobalAveragePool", b.relu6(b.conv(x, 32, 8)))
    size = b.node("Gather", b.node("Shape", x), b.constant("first", 0, np.int64), axis=0)
    size = b.node("Unsqueeze", size, b.constant("axes", [0], np.int64))
    x = b.node("Reshape", x, b.node("Concat", size, b.constant("rest", [-1], np.int64), axis=0))
    return b.model(b.gemm(x, 10, 32, "logits"))


def mini_inception() -> onnx.ModelProto:
    """Branches of several kernels and an average pool, joined by Concat; a dropout and a softmax behind."""
    b = Builder([1, 3, 15, 15])
    x = b.node("Relu", b.conv("image", 8, 3, 3, bn=False, strides=[2, 2]))
    x = b.node("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    channels = 8
    for _ in range(2):
        one = b.node("Relu", b.conv(x, 4, channels))
        three = b.node("Relu", b.conv(b.node("Relu", b.conv(x, 3, channels)), 6, 3, 3))
        five = b.node("Relu", b.conv(b.node("Relu", b.conv(x, 2, channels)), 4, 2, 5))
        pooled = b.node("AveragePool", x, kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4, count_include_pad=0)
        x, channels = b.node("Concat", one, three, five, b.node("Relu", b.conv(pooled, 2, channels)), axis=1), 16
    x = b.node("Dropout", b.node("ReduceMean", x, axes=[2, 3], keepdims=0))
    return b.model(b.node("Softmax", b.gemm(x, 10, 16), output="probabilities", axis=1))


def mini_resnet() -> onnx.ModelProto:
    """Residual blocks with identity and projected shortcuts; flattened by Flatten."""
    b = Builder(["batch", 3, 16, 16])
    x = b.node("MaxPool", b.node("Relu", b.conv("image", 8, 3, 7, strides=[2, 2])), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for inner, out, stride in ((8, 8, 1), (8, 16, 2), (16, 16, 1)):
        y = b.node("Relu", b.conv(x, out, inner, 3, strides=[stride] * 2))
        y = b.conv(y, out, out, 3)
        x = b.node("Relu", b.node("Add", y, x if inner == out else b.conv(x, out, inner, strides=[stride] * 2)))
    return b.model(b.gemm(b.node("Flatten", b.node("GlobalAveragePool", x)), 10, 16, "logits"))
