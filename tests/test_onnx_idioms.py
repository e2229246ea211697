"""How exporters write things: small files in their idioms become the few ops of eqfact, with the same outputs."""

import math

import numpy as np
import onnx
import onnx_models as small
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import eqfact as eq
import eqfact.onnx

node = helper.make_node
floats = small.normals(7)
ints = small.ints


def chain(tmp_path, *nodes, x, opset=17, constants=None, outputs=("y",), **options):
    """The graph of nodes from input x to output y, checked against onnxruntime both ways."""
    return small.imported(tmp_path, small.model(nodes, {"x": ["N", *x]}, outputs, constants, opset), **options)


def kinds(graph):
    return [type(n.op).__name__ for n in graph.nodes]


# ------------------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (3, 1), (1, 2)])
def test_auto_pad_of_convolutions(mode, stride, dilation, tmp_path):
    conv = node("Conv", ["x", "w"], ["y"], auto_pad=mode, strides=[stride] * 2, dilations=[dilation] * 2)
    if dilation == 1 or mode in ("VALID", "NOTSET"):
        chain(tmp_path, conv, x=(2, 7, 10), constants={"w": floats(3, 2, 3, 4)})
        return
    # onnxruntime refuses this
    onnx.save(small.model([conv], {"x": ["N", 2, 7, 10]}, ["y"], {"w": floats(3, 2, 3, 4)}), tmp_path / "net.onnx")
    graph = eqfact.onnx.load(tmp_path / "net.onnx")
    feeds = small.feeds_of(graph)
    small.close({"y": eq.forward(graph, feeds)}, {"y": ReferenceEvaluator(str(tmp_path / "net.onnx")).run(None, feeds)[0]})


@pytest.mark.parametrize("kind", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("stride", [1, 2])
def test_auto_pad_of_pools(kind, mode, stride, tmp_path):
    chain(tmp_path, node(kind, ["x"], ["y"], auto_pad=mode, kernel_shape=[3, 2], strides=[stride] * 2), x=(2, 8, 7))


@pytest.mark.parametrize("kind, options", [("MaxPool", {}), ("AveragePool", {"count_include_pad": 0}),
                                           ("AveragePool", {"count_include_pad": 1})],
                         ids=str)
@pytest.mark.parametrize("size, kernel, stride, pads", [(8, 3, 2, (0, 0)), (7, 3, 2, (0, 0)), (6, 3, 2, (1, 1)), (7, 2, 3, (0, 0)),
                                                        (9, 3, 4, (1, 0)),
                                                        (5, 1, 2, (0, 0)), (4, 1, 2, (0, 0)), (6, 2, 4, (1, 1))])
def test_ceil_mode(kind, options, size, kernel, stride, pads, tmp_path):
    pool = node(kind, ["x"], ["y"], kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pads[0]] * 2 + [pads[1]] * 2, ceil_mode=1,
                **options)
    chain(tmp_path, pool, x=(2, size, size))


@pytest.mark.parametrize("options", [
    {"output_shape": [10, 9]}, {"output_shape": [9, 9], "auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"}, {"auto_pad": "SAME_UPPER"},
    {"output_padding": [1, 0], "pads": [1, 0, 0, 1]}, {"group": 2}, {"dilations": [2, 1]}], ids=str)
def test_transposed_convolutions(options, tmp_path):
    conv = node("ConvTranspose", ["x", "w", "b"], ["y"], strides=[2, 2], **options)
    chain(tmp_path, conv, x=(4, 5, 4), constants={"w": floats(4, 3, 3, 3), "b": floats(3 * options.get("group", 1))})


def test_a_pad_that_feeds_a_convolution(tmp_path):
    graph = chain(tmp_path, node("Pad", ["x", "pads"], ["p"]), node("Conv", ["p", "w"], ["y"]), x=(2, 5, 5),
                  constants={"pads": ints(0, 0, 0, 1, 0, 0, 2, 1), "w": floats(3, 2, 3, 3)})
    assert kinds(graph) == ["Pad", "Conv"] and graph["p"].op.padding == ((0, 2), (1, 1))


def test_negative_padding_crops(tmp_path):
    assert "Pad" not in kinds(chain(tmp_path, node("Pad", ["x", "pads"], ["y"]), x=(2, 5, 5),
                                    constants={"pads": ints(0, -1, 0, 0, 0, 0, 0, 0)}))
    chain(tmp_path, node("Pad", ["x", "pads", "value"], ["y"]), x=(2, 5, 5),
          constants={"pads": ints(0, 0, -1, 1, 0, 0, 1, -2), "value": np.float32(0.5)})


@pytest.mark.parametrize("axes, keepdims, op", [([2, 3], 1, "GlobalAvgPool"), ([-1, -2], 0, "GlobalAvgPool"), ([3], 1, "AvgPool"),
                                                ([2], 0, "AvgPool")])
def test_reduce_mean_over_space(axes, keepdims, op, tmp_path):
    graph = chain(tmp_path, node("ReduceMean", ["x"], ["y"], axes=axes, keepdims=keepdims), x=(3, 4, 5))
    assert op in kinds(graph)
    chain(tmp_path, node("ReduceMean", ["x", "axes"], ["y"], keepdims=keepdims), x=(3, 4, 5), constants={"axes": ints(*axes)}, opset=18)


def test_reduce_mean_over_the_channels_is_exact_too(tmp_path):
    chain(tmp_path, node("ReduceMean", ["x"], ["y"], axes=[1], keepdims=1), x=(3, 4, 5))


def test_global_max_pool(tmp_path):
    assert kinds(chain(tmp_path, node("GlobalMaxPool", ["x"], ["y"]), x=(3, 4, 5))) == ["MaxPool"]


# ------------------------------------------------------------------------------------------------ products


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("alpha, beta", [(1.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("bias", [(4,), (1, 4), (1,), ()], ids=str)
def test_gemm(transposed, alpha, beta, bias, tmp_path):
    gemm = node("Gemm", ["x", "w", "b"], ["y"], transB=transposed, alpha=alpha, beta=beta)
    graph = chain(tmp_path, gemm, x=(3,), constants={"w": floats(4, 3) if transposed else floats(3, 4), "b": floats(*bias)})
    assert kinds(graph) == ["Dense"]
    changed = graph.with_ops({"y": eq.Dense(2 * graph["y"].op.weight, graph["y"].op.bias)})
    eqfact.onnx.save(tmp_path / "changed.onnx", changed)
    feeds = small.feeds_of(graph)
    small.close(small.run_ort(tmp_path / "changed.onnx", feeds), small.run_eq(changed, feeds))
    written = onnx.load(tmp_path / "changed.onnx").graph
    assert {a.name: helper.get_attribute_value(a) for a in written.node[0].attribute} == {"transB": transposed}
    assert tuple(written.initializer[0].dims) == ((4, 3) if transposed else (3, 4))


def test_gemm_of_a_transposed_value(tmp_path):
    graph = chain(tmp_path, node("Transpose", ["x"], ["t"], perm=[1, 0]), node("Gemm", ["t", "w"], ["y"], transA=1), x=(3,),
                  constants={"w": floats(3, 4)})
    assert kinds(graph) == ["Dense"]


def test_matmul_and_add_are_one_dense(tmp_path):
    graph = chain(tmp_path, node("MatMul", ["x", "w"], ["m"], name="mm"), node("Add", ["b", "m"], ["y"]), x=(3,),
                  constants={"w": floats(3, 4), "b": floats(4)})
    assert kinds(graph) == ["Dense"] and graph["y"].op.bias is not None
    assert {i.name for i in onnx.load(tmp_path / "again.onnx").graph.initializer} == {"w", "b"}


def test_a_product_that_is_read_twice_is_not_merged(tmp_path):
    graph = chain(tmp_path, node("MatMul", ["x", "w"], ["m"]), node("Add", ["m", "b"], ["a"]), node("Mul", ["m", "a"], ["y"]), x=(3,),
                  constants={"w": floats(3, 4), "b": floats(4)})
    assert kinds(graph) == ["Dense", "BatchNorm", "Mul"]


def test_a_product_that_is_read_twice_through_a_reshape_is_not_merged(tmp_path):
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Reshape", ["m", "s"], ["r"]), node("Add", ["r", "b"], ["a"]),
             node("Mul", ["r", "a"], ["y"])]
    graph = chain(tmp_path, *nodes, x=(3,), constants={"w": floats(3, 4), "b": floats(4), "s": ints(-1, 4)})
    assert kinds(graph) == ["Dense", "BatchNorm", "Mul"]


def test_matmul_over_the_last_of_many_axes_is_a_pointwise_convolution(tmp_path):
    nodes = [node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]), node("MatMul", ["t", "w"], ["m"]), node("Add", ["m", "b"], ["a"]),
             node("Relu", ["a"], ["r"]), node("Transpose", ["r"], ["y"], perm=[0, 3, 1, 2])]
    graph = chain(tmp_path, *nodes, x=(3, 4, 5), constants={"w": floats(3, 6), "b": floats(6)})
    assert kinds(graph) == ["Conv", "ReLU", "Identity"]


# ------------------------------------------------------------------------------------------------ constants


@pytest.mark.parametrize("kind", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1), (1, 3, 1, 1), (4, 5)], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_arithmetic_with_constants_is_batchnorm(kind, shape, first, tmp_path):
    if kind == "Div" and not first:
        return  # a quotient by a value is refused: test_onnx_errors
    order = ["x", "c"] if first else ["c", "x"]
    graph = chain(tmp_path, node(kind, order, ["y"]), x=(3, 4, 5), constants={"c": floats(*shape) + np.float32(3)})
    assert kinds(graph) == ["Affine" if shape == (4, 5) else "BatchNorm"]


def test_constants_absorb_factors(tmp_path):
    nodes = [node("Conv", ["x", "w"], ["c"]), node("Mul", ["c", "s"], ["m"]), node("Add", ["m", "t"], ["a"]), node("Relu", ["a"], ["r"]),
             node("Conv", ["r", "v"], ["y"])]
    graph = chain(tmp_path, *nodes, x=(2, 3, 3), constants={"w": floats(4, 2, 1, 1), "s": floats(4, 1, 1), "t": np.float32(1),
                                                            "v": floats(2, 4, 1, 1)})
    assert eq.degrees_of_freedom(graph) == 12  # c, m, and a = r
    kept = [n.op_type for n in onnx.load(tmp_path / "again.onnx").graph.node]
    assert kept == ["Conv", "Mul", "Add", "Relu", "Conv"]


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 3, 1, 1), (1, 1, 1), (1,), (3, 4, 5)], ids=str)
def test_prelu_slopes(shape, tmp_path):
    graph = chain(tmp_path, node("PRelu", ["x", "s"], ["y"]), x=(3, 4, 5), constants={"s": floats(*shape)})
    assert "PReLU" in kinds(graph)
    assert np.prod(shape) > 1 or graph["y"].op.slope.size == 1


@pytest.mark.parametrize("opset", [6, 7, 16])
def test_prelu_slopes_that_fit_the_channels_and_the_last_axis(opset, tmp_path):
    """Before opset 7 they were the channels'."""
    x, slope = floats(2, 3, 4, 3), floats(3)
    onnx.save(small.model([node("PRelu", ["x", "s"], ["y"])], {"x": ["N", 3, 4, 3]}, ["y"], {"s": slope}, opset), tmp_path / "net.onnx")
    spread = slope.reshape(3, 1, 1) if opset < 7 else slope
    np.testing.assert_allclose(eq.forward(eqfact.onnx.load(tmp_path / "net.onnx"), x), np.where(x > 0, x, spread * x), rtol=1e-6)


def test_prelu_slopes_of_old_exporters(tmp_path):
    onnx.save(small.model([node("PRelu", ["x", "s"], ["y"])], {"x": ["N", 3, 4, 5]}, ["y"], {"s": floats(3)}), tmp_path / "net.onnx")
    assert eqfact.onnx.load(tmp_path / "net.onnx")["y"].op.slope.shape == (3,)


@pytest.mark.parametrize("inputs, low, high", [(["x", "low", "high"], -1, 2), (["x", "low"], -1, math.inf),
                                               (["x", "", "high"], -math.inf, 2),
                                               (["x"], -math.inf, math.inf)], ids=str)
def test_clip_with_inputs(inputs, low, high, tmp_path):
    graph = chain(tmp_path, node("Clip", inputs, ["y"]), x=(3,), constants={"low": np.float32(-1), "high": np.float32(2)})
    assert (graph["y"].op.low, graph["y"].op.high) == (low, high)


def test_bounds_keep_their_names_when_they_change(tmp_path):
    graph = chain(tmp_path, node("Clip", ["x", "low", "high"], ["y"]), x=(3,), constants={"low": np.float32(-1), "high": np.float32(2)})
    eqfact.onnx.save(tmp_path / "net.onnx", graph.with_ops({"y": eq.Clip(-2.0, 4.0)}))
    found = onnx.load(tmp_path / "net.onnx").graph.initializer
    assert {i.name: numpy_helper.to_array(i).tolist() for i in found} == {"low": -2, "high": 4}


def test_clip_with_attributes(tmp_path):
    graph = chain(tmp_path, node("Clip", ["x"], ["y"], min=0.0, max=6.0), x=(3,), opset=10)
    assert (graph["y"].op.low, graph["y"].op.high) == (0, 6)


def test_one_side_of_max_and_min(tmp_path):
    assert kinds(chain(tmp_path, node("Max", ["x", "c"], ["y"]), x=(3, 2), constants={"c": floats(3, 1)})) == ["Clip"]
    graph = chain(tmp_path, node("Max", ["x", "c"], ["a"]), node("Min", ["a", "d"], ["y"]), node("Neg", ["a"], ["z"]), x=(3, 2),
                  outputs=("y", "z"),
                  constants={"c": floats(3, 1), "d": np.float32(4)})
    assert kinds(graph) == ["Clip", "Clip", "BatchNorm"]


# ------------------------------------------------------------------------------------------------ activations


@pytest.mark.parametrize("nodes, opset, expected", [
    ([node("HardSigmoid", ["x"], ["h"], alpha=1 / 6, beta=0.5), node("Mul", ["x", "h"], ["y"])], 17, ["HardSigmoid", "Mul"]),
    ([node("Sigmoid", ["x"], ["s"]), node("Mul", ["x", "s"], ["y"])], 17, ["SiLU"]),
    ([node("HardSwish", ["x"], ["y"])], 17, ["HardSwish"]),
    ([node("Gelu", ["x"], ["y"])], 20, ["GELU"]),
    ([node("Gelu", ["x"], ["y"], approximate="tanh")], 20, ["GELU"]),
    ([node("LeakyRelu", ["x"], ["y"], alpha=0.1)], 17, ["LeakyReLU"]),
    ([node("Softmax", ["x"], ["y"], axis=1)], 11, ["Softmax"]),
    ([node("Softmax", ["x"], ["y"])], 17, ["Softmax"]),
    ([node("Dropout", ["x"], ["y"])], 17, ["Identity"]),
    ([node("Identity", ["x"], ["y"])], 17, ["Identity"]),
    ([node("Cast", ["x"], ["y"], to=1)], 17, ["Identity"]),
    ([node("Sum", ["x", "x", "x"], ["y"])], 17, ["Add"]),
], ids=lambda v: str(len(v)) if isinstance(v, list) else str(v))
def test_activations(nodes, opset, expected, tmp_path):
    assert kinds(chain(tmp_path, *nodes, x=(5,), opset=opset)) == expected


def test_gelu_out_of_erf(tmp_path):
    nodes = [node("Div", ["x", "r2"], ["d"]), node("Erf", ["d"], ["e"]), node("Add", ["e", "one"], ["p"]), node("Mul", ["x", "p"], ["m"]),
             node("Mul", ["m", "half"], ["y"])]
    chain(tmp_path, *nodes, x=(3, 4), constants={"r2": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)})


def test_squeeze_and_excite(tmp_path):
    nodes = [node("GlobalAveragePool", ["x"], ["g"]), node("Conv", ["g", "w"], ["a"]), node("Relu", ["a"], ["b"]),
             node("Conv", ["b", "v"], ["c"]),
             node("Sigmoid", ["c"], ["s"]), node("Mul", ["x", "s"], ["y"])]
    chain(tmp_path, *nodes, x=(4, 3, 3), constants={"w": floats(2, 4, 1, 1), "v": floats(4, 2, 1, 1)})


def test_squeeze_and_excite_with_dense_layers(tmp_path):
    nodes = [node("ReduceMean", ["x"], ["g"], axes=[2, 3], keepdims=0), node("Gemm", ["g", "w"], ["a"]), node("Sigmoid", ["a"], ["s"]),
             node("Unsqueeze", ["s", "axes"], ["u"]), node("Mul", ["x", "u"], ["y"])]
    chain(tmp_path, *nodes, x=(4, 3, 3), constants={"w": floats(4, 4), "axes": ints(2, 3)})


# ------------------------------------------------------------------------------------------------ moves


FLATTENINGS = {
    "Flatten": ([node("Flatten", ["r"], ["f"])], {}),
    "Reshape to (-1, n)": ([node("Reshape", ["r", "s"], ["f"])], {"s": ints(-1, 24)}),
    "Reshape to (0, -1)": ([node("Reshape", ["r", "s"], ["f"])], {"s": ints(0, -1)}),
    "Shape, Gather, Concat": ([node("Shape", ["r"], ["a"]), node("Gather", ["a", "zero"], ["b"]), node("Unsqueeze", ["b", "axes"], ["c"]),
                               node("Concat", ["c", "rest"], ["s"], axis=0), node("Reshape", ["r", "s"], ["f"])],
                              {"zero": np.int64(0), "axes": ints(0), "rest": ints(-1)}),
    "Shape, Slice, ReduceProd": ([node("Shape", ["r"], ["a"]), node("Slice", ["a", "one", "end"], ["b"]),
                                  node("ReduceProd", ["b"], ["c"], keepdims=1),
                                  node("Concat", ["minus", "c"], ["s"], axis=0), node("Reshape", ["r", "s"], ["f"])],
                                 {"one": ints(1), "end": ints(99), "minus": ints(-1)}),
    "Shape with start": ([node("Shape", ["r"], ["a"], end=1), node("Concat", ["a", "rest"], ["s"], axis=0),
                          node("Reshape", ["r", "s"], ["f"])],
                         {"rest": ints(24)}),
}


@pytest.mark.parametrize("nodes, constants", FLATTENINGS.values(), ids=FLATTENINGS)
def test_flattening(nodes, constants, tmp_path):
    graph = chain(tmp_path, node("Relu", ["x"], ["r"]), *nodes, node("Gemm", ["f", "w"], ["y"]), x=(2, 3, 4),
                  constants={**constants, "w": floats(24, 5)})
    assert kinds(graph) == ["ReLU", "Flatten", "Dense"]
    assert graph.nodes[1].name == "f"


def test_flattening_of_a_network_trained_channels_last(tmp_path):
    nodes = [node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]), node("Reshape", ["t", "s"], ["f"]), node("Gemm", ["f", "w"], ["y"])]
    graph = chain(tmp_path, *nodes, x=(2, 3, 4), constants={"s": ints(-1, 24), "w": floats(24, 5)})
    assert kinds(graph) == ["Flatten", "Permute", "Dense"]


def test_squeeze_of_space(tmp_path):
    graph = chain(tmp_path, node("GlobalAveragePool", ["x"], ["g"]), node("Squeeze", ["g", "axes"], ["s"]), node("Gemm", ["s", "w"], ["y"]),
                  x=(2, 3, 4),
                  constants={"axes": ints(2, 3), "w": floats(2, 5)})
    assert kinds(graph) == ["GlobalAvgPool", "Flatten", "Dense"]


def test_layout_sandwiches_cancel(tmp_path):
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Transpose", ["a"], ["b"], perm=[0, 2, 3, 1]), node("Relu", ["b"], ["c"]),
             node("Add", ["c", "bias"], ["d"]), node("PRelu", ["d", "slope"], ["e"]), node("Concat", ["d", "e"], ["f"], axis=3),
             node("Softmax", ["f"], ["g"], axis=-1), node("Transpose", ["g"], ["h"], perm=[0, 3, 1, 2]), node("Conv", ["h", "v"], ["y"])]
    graph = chain(tmp_path, *nodes, x=(2, 3, 4),
                  constants={"w": floats(3, 2, 1, 1), "bias": floats(3), "slope": floats(3), "v": floats(2, 6, 1, 1)})
    assert not {"Transpose", "Flatten", "Permute"} & set(kinds(graph))


def test_a_network_that_reads_and_puts_out_channels_last(tmp_path):
    nodes = [node("Transpose", ["x"], ["t"], perm=[0, 3, 1, 2]), node("Conv", ["t", "w"], ["c"]),
             node("Transpose", ["c"], ["u"], perm=[0, 2, 3, 1]),
             node("Relu", ["u"], ["y"])]
    graph = chain(tmp_path, *nodes, x=(4, 5, 2), constants={"w": floats(3, 2, 1, 1)})
    assert kinds(graph) == ["Transpose", "Conv", "ReLU", "Transpose"]
    assert graph.outputs == ("y",) and graph.shapes["y"] == (4, 5, 3)


def test_channel_shuffle(tmp_path):
    nodes = [node("Relu", ["x"], ["r"]), node("Reshape", ["r", "s"], ["a"]), node("Transpose", ["a"], ["b"], perm=[0, 2, 1, 3, 4]),
             node("Reshape", ["b", "t"], ["y"])]
    graph = chain(tmp_path, *nodes, x=(6, 2, 2), constants={"s": ints(0, 2, 3, 2, 2), "t": ints(-1, 6, 2, 2)})
    assert kinds(graph) == ["ReLU", "Permute"] and graph["y"].op.order == (0, 3, 1, 4, 2, 5)


def test_channel_split_and_shuffle_of_shufflenet(tmp_path):
    nodes = [node("Split", ["x", "sizes"], ["a", "b"], axis=1), node("Conv", ["b", "w"], ["c"]), node("Concat", ["a", "c"], ["d"], axis=1),
             node("Reshape", ["d", "s"], ["e"]), node("Transpose", ["e"], ["f"], perm=[0, 2, 1, 3, 4]), node("Reshape", ["f", "t"], ["y"])]
    graph = chain(tmp_path, *nodes, x=(4, 2, 2), constants={
        "sizes": ints(2, 2), "w": floats(2, 2, 1, 1), "s": ints(-1, 2, 2, 2, 2), "t": ints(-1, 4, 2, 2)})
    assert sorted(kinds(graph)) == ["Concat", "Conv", "Permute", "Slice", "Slice"]


@pytest.mark.parametrize("nodes, constants", [
    ([node("Slice", ["x", "a", "b", "c"], ["y"])], {"a": ints(1), "b": ints(3), "c": ints(1)}),
    ([node("Slice", ["x", "a", "b", "c", "d"], ["y"])], {"a": ints(-1), "b": ints(-99), "c": ints(1), "d": ints(-2)}),
    ([node("Slice", ["x", "a", "b", "c"], ["y"])], {"a": ints(0, 1), "b": ints(2**31, -1), "c": ints(0, 3)}),
    ([node("Gather", ["x", "i"], ["y"], axis=1)], {"i": ints(3, -4, 1)}),
    ([node("Gather", ["x", "i"], ["y"], axis=2)], {"i": np.int64(1)}),
    ([node("DepthToSpace", ["x"], ["y"], blocksize=2)], {}),
    ([node("DepthToSpace", ["x"], ["y"], blocksize=2, mode="CRD")], {}),
    ([node("SpaceToDepth", ["x"], ["y"], blocksize=2)], {}),
    ([node("Concat", ["x", "x"], ["y"], axis=2)], {}),
    ([node("Expand", ["x", "s"], ["y"])], {"s": ints(1, 4, 1, 1)}),
    ([node("Reshape", ["x", "s"], ["y"])], {"s": ints(0, 2, -1)}),
    ([node("Unsqueeze", ["x", "a"], ["b"]), node("Squeeze", ["b", "a"], ["y"])], {"a": ints(0)}),
    ([node("Transpose", ["x"], ["a"], perm=[1, 2, 3, 0]), node("Transpose", ["a"], ["y"], perm=[3, 0, 1, 2])], {}),
], ids=str)
def test_moves_of_entries(nodes, constants, tmp_path):
    chain(tmp_path, *nodes, x=(4, 2, 6), constants=constants)


@pytest.mark.parametrize("inputs, constants, options", [
    (["x", "", "scales"], {"scales": np.float32([1, 1, 2, 3])}, {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    (["x", "", "scales"], {"scales": np.float32([1, 1, 2, 3])}, {}),
    (["x", "", "", "sizes"], {"sizes": ints(2, 3, 8, 10)}, {"coordinate_transformation_mode": "half_pixel"}),
], ids=str)
def test_resize(inputs, constants, options, tmp_path):
    model = small.model([node("Resize", inputs, ["y"], mode="nearest", **options)], {"x": [2, 3, 4, 5]}, ["y"], constants)
    assert kinds(small.imported(tmp_path, model)) == ["Upsample"]


def test_resize_with_sizes_out_of_shapes(tmp_path):
    nodes = [node("Shape", ["x"], ["a"]), node("Slice", ["a", "zero", "two"], ["b"]), node("Shape", ["z"], ["c"]),
             node("Slice", ["c", "two", "four"], ["d"]),
             node("Concat", ["b", "d"], ["s"], axis=0), node("Resize", ["x", "", "", "s"], ["r"], mode="nearest"), node("Add", ["r", "z"],
                                                                                                                        ["y"])]
    model = small.model(nodes, {"x": ["N", 3, 2, 4], "z": ["N", 3, 4, 8]}, ["y"], {"zero": ints(0), "two": ints(2), "four": ints(4)})
    assert kinds(small.imported(tmp_path, model)) == ["Upsample", "Add"]


def test_upsample_of_old_opsets(tmp_path):
    chain(tmp_path, node("Upsample", ["x", "s"], ["y"], mode="nearest"), x=(3, 4, 5), opset=9, constants={"s": np.float32([1, 1, 2, 2])})


def test_unread_outputs_may_be_anything(tmp_path):
    nodes = node("Dropout", ["x"], ["a", "mask"]), node("MaxPool", ["a"], ["y", "indices"], kernel_shape=[2, 2])
    assert [n.name for n in chain(tmp_path, *nodes, x=(3, 4, 4)).nodes] == ["a", "y"]


def test_constants_in_nodes(tmp_path):
    weight = node("Constant", [], ["w"], value=numpy_helper.from_array(floats(3, 4)))
    graph = chain(tmp_path, weight, node("Transpose", ["w"], ["wt"], perm=[1, 0]), node("Gemm", ["x", "wt"], ["y"]), x=(4,), constants={})
    assert kinds(graph) == ["Dense"]


def test_dead_branches_are_dropped(tmp_path):
    model = small.model([node("Relu", ["x"], ["y"]), node("Sigmoid", ["x"], ["z"]), node("Tanh", ["z"], ["u"])], {"x": ["N", 3]}, ["y"])
    assert kinds(small.imported(tmp_path, model)) == ["ReLU"]


def test_dynamic_space_needs_input_shapes(tmp_path):
    model = small.model([node("Conv", ["x", "w"], ["y"])], {"x": ["N", 3, "H", "W"]}, ["y"], {"w": floats(2, 3, 3, 3)})
    onnx.save(model, tmp_path / "net.onnx")
    graph = eqfact.onnx.load(tmp_path / "net.onnx", input_shapes={"x": (3, 6, 5)})
    assert graph.shapes["y"] == (2, 4, 3)
    changed = graph.with_ops({"y": eq.Conv(2 * graph["y"].op.weight)})
    eqfact.onnx.save(tmp_path / "again.onnx", changed)
    again = onnx.load(tmp_path / "again.onnx")
    assert [d.dim_param for d in again.graph.input[0].type.tensor_type.shape.dim[2:]] == ["H", "W"]  # sizes that are open stay open
    wide = {"x": floats(2, 3, 9, 8)}
    small.close(small.run_ort(tmp_path / "again.onnx", wide), {"y": 2 * small.run_ort(tmp_path / "net.onnx", wide)["y"]})


@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("transformation", ["asymmetric", "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel"])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_resize_is_an_upsampling_where_it_repeats_entries_and_takes_them_elsewhere(rounding, transformation, scale, tmp_path):
    """What onnx's own evaluator makes of a ramp decides; halves between two entries tell the four roundings apart."""
    resize = node("Resize", ["x", "", "scales"], ["y"], mode="nearest", coordinate_transformation_mode=transformation,
                  nearest_mode=rounding)
    model = small.model([resize], {"x": ["N", 1, 5]}, ["y"], {"scales": np.float32([1, 1, scale])})
    ramp = np.arange(5, dtype=np.float32).reshape(1, 1, 5)
    onnx.save(model, tmp_path / "net.onnx")
    graph, expected = eqfact.onnx.load(tmp_path / "net.onnx"), ReferenceEvaluator(model).run(None, {"x": ramp})[0]
    assert np.array_equal(eq.forward(graph, ramp), expected)
    assert kinds(graph) == ["Upsample" if np.array_equal(expected, np.repeat(ramp, scale, axis=2)) else "Take"]


# ------------------------------------------------------------------------------------------------ whatever is homogeneous


@pytest.mark.parametrize("op, constants, expected, free", [
    (node("Abs", ["a"], ["b"]), {}, "Abs", 4),
    (node("Sub", ["a", "c"], ["b"]), {}, "Sub", 4),
    (node("Max", ["a", "c"], ["b"]), {}, "Max", 4),
    (node("Min", ["a", "c", "a"], ["b"]), {}, "Min", 4),
    (node("Sub", ["a", "one"], ["b"]), {}, "Sub", 1),
    (node("Max", ["one", "a"], ["b"]), {}, "Max", 1),
    (node("ReduceSum", ["a", "axes"], ["b"]), {"axes": ints(3)}, "Blend", 4),
    (node("ReduceSum", ["a", "axes"], ["b"]), {"axes": ints(2, 3)}, "Blend", 4),
    (node("ReduceMin", ["a", "axes"], ["b"]), {"axes": ints(2)}, "MinPool", 4),
    (node("ReduceL1", ["a", "axes"], ["b"]), {"axes": ints(2, 3)}, "LpPool", 4),
    (node("ReduceL2", ["a", "axes"], ["b"]), {"axes": ints(-1)}, "LpPool", 4),
    (node("GlobalLpPool", ["a"], ["b"], p=3), {}, "LpPool", 4),
    (node("LpPool", ["a"], ["b"], kernel_shape=[2, 2], strides=[2, 1], pads=[1, 0, 0, 1]), {}, "LpPool", 4),
    (node("LpPool", ["a"], ["b"], kernel_shape=[2, 2], dilations=[2, 1], auto_pad="SAME_UPPER", p=1), {}, "LpPool", 4),
    (node("MaxPool", ["a"], ["b"], kernel_shape=[2, 2], dilations=[3, 2], pads=[1, 0, 1, 0]), {}, "MaxPool", 4),
    (node("MaxPool", ["a"], ["b"], kernel_shape=[2, 3], strides=[2, 2], dilations=[1, 2], ceil_mode=1), {}, "MaxPool", 4),
    (node("AveragePool", ["a"], ["b"], kernel_shape=[2, 3], dilations=[2, 1], pads=[1, 0, 1, 1]), {}, "AvgPool", 4),
    (node("CumSum", ["a", "axis"], ["b"]), {"axis": np.int64(3)}, "Blend", 4),
    (node("CumSum", ["a", "axis"], ["b"], exclusive=1, reverse=1), {"axis": np.int64(2)}, "Blend", 4),
    (node("MatMul", ["m", "a"], ["b"]), {"m": floats(3, 5)}, "Blend", 4),
    (node("Tile", ["a", "r"], ["b"]), {"r": ints(1, 1, 2, 3)}, "Take", 4),
    (node("Tile", ["a", "r"], ["b"]), {"r": ints(1, 1, 1, 2)}, "Take", 4),
    (node("Concat", ["k", "a"], ["b"], axis=2), {"k": floats(2, 4, 2, 6)[:1].repeat(2, 0)}, "Extend", 4),
    (node("Pad", ["a", "p"], ["b"], mode="edge"), {"p": ints(0, 0, 1, 0, 0, 0, 2, 1)}, "Take", 4),
    (node("Einsum", ["a", "q"], ["b"], equation="nchw,cd->ndhw"), {"q": floats(4, 4)}, "Conv", 8),
    (node("Einsum", ["q", "a"], ["b"], equation="dc,nchw->ndhw"), {"q": floats(4, 4)}, "Conv", 8),
    (node("Einsum", ["a", "q"], ["b"], equation="n...w,wv->n...v"), {"q": floats(6, 3)}, "Conv", None),
], ids=lambda v: v.op_type if isinstance(v, onnx.NodeProto) else "")
def test_what_is_homogeneous_passes_factors(op, constants, expected, free, tmp_path):
    nodes = [node("Conv", ["x", "v"], ["a"]), op, node("ReduceMax", ["b", "space"], ["d"], keepdims=0), node("Gemm", ["d", "w"], ["y"])]
    if "c" in op.input or "one" in op.input:
        name = "c" if "c" in op.input else "one"
        nodes.insert(1, node("Conv", ["a" if name == "c" else "x", f"v{name}"], [name]))
    constants = {"v": floats(4, 2, 1, 1), "vc": floats(4, 4, 1, 1), "vone": floats(1, 2, 1, 1), "w": floats(4, 3), "space": ints(2, 3),
                 **constants}
    used = {name for n in nodes for name in n.input}
    model = small.model(nodes, {"x": [2 if op.op_type == "Concat" else "N", 2, 5, 6]}, ["y"],
                        {k: v for k, v in constants.items() if k in used}, opset=20)
    graph = small.imported(tmp_path, model)
    assert expected in kinds(graph)
    assert free is None or eq.degrees_of_freedom(graph) == free


@pytest.mark.parametrize("mode, options", [
    ("linear", {}), ("linear", {"coordinate_transformation_mode": "asymmetric"}),
    ("linear", {"coordinate_transformation_mode": "pytorch_half_pixel"}), ("cubic", {}), ("cubic", {"cubic_coeff_a": -0.5}),
    ("cubic", {"exclude_outside": 1}),
], ids=str)
@pytest.mark.parametrize("scales", [(2, 2), (1, 3), (0.6, 1.5), (0.5, 1)], ids=str)
def test_resizing_by_interpolation(mode, options, scales, tmp_path):
    resize = node("Resize", ["x", "", "scales"], ["y"], mode=mode, **options)
    graph = chain(tmp_path, resize, x=(3, 6, 4), constants={"scales": np.float32([1, 1, *scales])})
    assert set(kinds(graph)) == {"Blend"} and len(graph.nodes) == sum(s != 1 for s in scales)
    chain(tmp_path, node("Resize", ["x", "", "", "sizes"], ["y"], mode=mode, axes=[3, 2], **options), x=(3, 6, 4),
          constants={"sizes": ints(5, 9)}, opset=19)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("scales", [(2, 2), (1, 3), (0.5, 1.5)], ids=str)
def test_resizing_with_aligned_corners(mode, scales, tmp_path):
    """Where the scale makes a whole number of entries; elsewhere onnxruntime rounds it, and the standard's own cases do not."""
    resize = node("Resize", ["x", "", "scales"], ["y"], mode=mode, coordinate_transformation_mode="align_corners")
    chain(tmp_path, resize, x=(3, 6, 4), constants={"scales": np.float32([1, 1, *scales])})


def test_a_matrix_from_the_left_is_a_layer_where_it_reads_the_channels(tmp_path):
    graph = chain(tmp_path, node("MatMul", ["m", "x"], ["a"]), node("Relu", ["a"], ["r"]), node("MatMul", ["k", "r"], ["y"]), x=(3, 5),
                  constants={"m": floats(4, 3), "k": floats(2, 4)})
    assert kinds(graph) == ["Conv", "ReLU", "Conv"] and eq.degrees_of_freedom(graph) == 4


def test_tokens_are_mixed_by_a_matrix_along_space(tmp_path):
    """A mixer: layers over features, which stand last, and a matrix over tokens."""
    nodes = [node("MatMul", ["x", "v"], ["a"]), node("MatMul", ["m", "a"], ["b"]), node("Add", ["a", "b"], ["c"]),
             node("MatMul", ["c", "w"], ["y"])]
    graph = chain(tmp_path, *nodes, x=(5, 3), constants={"v": floats(3, 4), "m": floats(5, 5), "w": floats(4, 2)})
    assert "Blend" in kinds(graph) and eq.degrees_of_freedom(graph) == 4


TOKENS = [node("Conv", ["x", "v"], ["a"]), node("Reshape", ["a", "flat"], ["b"]), node("Transpose", ["b"], ["c"], perm=[0, 2, 1]),
          node("Shape", ["c"], ["s"]), node("Slice", ["s", "zero", "first"], ["n"]), node("Concat", ["n", "rest"], ["e"], axis=0),
          node("Expand", ["token", "e"], ["t"]), node("Concat", ["t", "c"], ["d"], axis=1), node("Add", ["d", "position"], ["f"])]
WEIGHTS = {"v": floats(4, 3, 2, 2), "flat": ints(0, 4, -1), "zero": ints(0), "first": ints(1), "rest": ints(1, 4), "token": floats(1, 1, 4),
           "position": floats(1, 7, 4), "w": floats(4, 5)}


def test_a_class_token_takes_the_factors_of_the_features(tmp_path):
    graph = chain(tmp_path, *TOKENS, node("Einsum", ["f", "w"], ["y"], equation="btd,de->bte"), x=(3, 3, 4), constants=WEIGHTS)
    assert kinds(graph) == ["Conv", "Rearrange", "Extend", "Affine", "Conv", "Transpose"]
    assert eq.degrees_of_freedom(graph) == 4


def test_einsum_with_heads(tmp_path):
    nodes = [node("Einsum", ["x", "q"], ["h"], equation="btd,dhk->bhtk"), node("Relu", ["h"], ["r"]),
             node("Einsum", ["r", "o"], ["y"], equation="bhtk,hkd->btd")]
    graph = chain(tmp_path, *nodes, x=(5, 6), constants={"q": floats(6, 2, 3), "o": floats(2, 3, 4)})
    assert eq.degrees_of_freedom(graph) == 6


def test_constants_on_both_sides_and_between_values(tmp_path):
    model = small.model([node("Concat", ["k", "x", "l", "x", "k"], ["y"], axis=1)], {"x": [2, 3, 4]}, ["y"],
                        {"k": floats(1, 2, 4).repeat(2, 0), "l": floats(1, 1, 4).repeat(2, 0)})
    assert kinds(small.imported(tmp_path, model)) == ["Extend"] * 3 + ["Concat"]


def test_constant_channels_are_free(tmp_path):
    nodes = [node("Concat", ["x", "k"], ["a"], axis=1), node("Conv", ["a", "w"], ["y"])]
    model = small.model(nodes, {"x": [1, 3, 4]}, ["y"], {"k": floats(1, 2, 4), "w": floats(2, 5, 1)})
    assert eq.degrees_of_freedom(small.imported(tmp_path, model, batch=1)) == 2


@pytest.mark.parametrize("nodes, constants, shape", [
    ([node("Expand", ["x", "s"], ["y"])], {"s": ints(1, 4, 2, 6)}, (4, 1, 6)),
    ([node("Expand", ["x", "s"], ["y"])], {"s": ints(4, 3, 6)}, (1, 1, 6)),
    ([node("Expand", ["x", "s"], ["a"]), node("ReduceSum", ["a", "i"], ["y"], keepdims=0)], {"s": ints(3, 1, 1, 1), "i": ints(0)}, (2, 4)),
    ([node("Tile", ["x", "s"], ["y"])], {"s": ints(1, 3)}, (2,)),
    ([node("Tile", ["x", "s"], ["y"])], {"s": ints(1, 3)}, (1,)),
    ([node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]), node("Expand", ["t", "s"], ["y"])], {"s": ints(1, 5, 2, 4)}, (4, 1, 2)),
    ([node("Pad", ["x", "s"], ["y"], mode="edge")], {"s": ints(0, 0, 1, 0, 0, 1)}, (2, 1)),
    ([node("Pad", ["x", "s"], ["y"])], {"s": ints(0, 1, 1, 0, 0, 1)}, (2, 3)),
    ([node("CumSum", ["x", "s"], ["y"])], {"s": np.int64(1)}, (5,)),
], ids=str)
def test_entries_that_are_repeated(nodes, constants, shape, tmp_path):
    chain(tmp_path, *nodes, x=shape, constants=constants)
