"""Files of which parts are understood: what is kept, what is equalized, and that the file written is the function of the file read.

onnxruntime says what a file computes; a node is kept if it stands byte for byte in the file that is written.
"""

import numpy as np
import onnx
import onnx_models as small
import pytest
from onnx import TensorProto, helper, numpy_helper

import eqfact as eq
import eqfact.onnx
from eqfact.onnx import OnnxError
from eqfact.onnx.patching import patch

node = helper.make_node
ints = small.ints
EIGHT = {"weights": eq.UniformQuantizer(8), "activations": eq.UniformQuantizer(8, symmetric=False)}
INT64, FLOAT, FLOAT16 = TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT16


def floats(*shape, seed=3):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def model(nodes, inputs, outputs, constants=(), opset=17):
    """A model whose inputs and outputs are given as name: (type, shape)."""
    infos = [[helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in some.items()] for some in (inputs, outputs)]
    graph = helper.make_graph(nodes, "some", *infos, [numpy_helper.from_array(np.asarray(a), n) for n, a in dict(constants).items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def layer(x, y, w):
    return node("MatMul", [x, w], [f"{y}.product"], name=f"{y}.mm"), node("Relu", [f"{y}.product"], [y], name=y)


def conv_net():
    """A kept node in the middle of a convolutional network with open sizes."""
    nodes = [node("Conv", ["x", "w1"], ["a"]), node("Relu", ["a"], ["b"]), node("Conv", ["b", "w2"], ["c"]),
             node("LRN", ["c"], ["d"], size=3, alpha=0.01), node("Conv", ["d", "w3"], ["e"]), node("Relu", ["e"], ["f"]),
             node("Conv", ["f", "w4"], ["y"])]
    weights = {"w1": floats(6, 3, 3, 3), "w2": floats(5, 6, 1, 1), "w3": floats(4, 5, 3, 3), "w4": floats(2, 4, 1, 1)}
    return (model(nodes, {"x": (FLOAT, ["N", 3, "H", "W"])}, {"y": (FLOAT, ["N", 2, "h", "w"])}, weights),
            {"x": floats(2, 3, 8, 9, seed=1)}, ["LRN"])


def token_net():
    """Token ids, an embedding, a feed-forward block on tokens, LayerNormalization, integer side computations."""
    nodes = [node("Gather", ["table", "ids"], ["emb"]), *layer("emb", "h", "w1"), node("MatMul", ["h", "w2"], ["o"]),
             node("Add", ["emb", "o"], ["r"]), node("LayerNormalization", ["r", "gamma"], ["n"]), *layer("n", "g", "w3"),
             node("MatMul", ["g", "w4"], ["logits"]), node("ArgMax", ["logits"], ["best"], axis=-1, keepdims=0)]
    constants = {"table": floats(20, 8), "w1": floats(8, 12), "w2": floats(12, 8), "gamma": floats(8), "w3": floats(8, 10),
                 "w4": floats(10, 5)}
    outputs = {"logits": (FLOAT, ["N", "T", 5]), "best": (INT64, ["N", "T"])}
    ids = np.random.default_rng(2).integers(0, 20, (3, 7))
    return model(nodes, {"ids": (INT64, ["N", "T"])}, outputs, constants), {"ids": ids}, ["Gather", "ArgMax"]


def recurrent_net():
    """An LSTM between two layers, time before batch."""
    nodes = [*layer("x", "h", "w1"), node("MatMul", ["h", "w2"], ["i"]), node("Transpose", ["i"], ["t"], perm=[1, 0, 2]),
             node("LSTM", ["t", "W", "R"], ["s", "", ""], hidden_size=4), node("Squeeze", ["s", "one"], ["q"]),
             node("Transpose", ["q"], ["u"], perm=[1, 0, 2]), *layer("u", "v", "w3"), node("MatMul", ["v", "w4"], ["y"])]
    constants = {"w1": floats(6, 9), "w2": floats(9, 5), "W": floats(1, 16, 5), "R": floats(1, 16, 4), "one": ints(1),
                 "w3": floats(4, 7), "w4": floats(7, 3)}
    return (model(nodes, {"x": (FLOAT, ["N", "T", 6])}, {"y": (FLOAT, ["N", "T", 3])}, constants), {"x": floats(2, 5, 6, seed=1)},
            ["LSTM"])


def branching_net():
    """An If that reads a value of the network from within, and a flag among the inputs."""
    yes = helper.make_graph([node("Sin", ["b"], ["one"])], "yes", [], [helper.make_tensor_value_info("one", FLOAT, None)])
    no = helper.make_graph([node("Neg", ["b"], ["two"])], "no", [], [helper.make_tensor_value_info("two", FLOAT, None)])
    nodes = [node("Gemm", ["x", "w1"], ["a"]), node("Relu", ["a"], ["b0"]), node("Gemm", ["b0", "w2"], ["b"]),
             node("If", ["flag"], ["c"], then_branch=yes, else_branch=no), node("Gemm", ["c", "w3"], ["d"]), node("Relu", ["d"], ["e"]),
             node("Gemm", ["e", "w4"], ["y"])]
    constants = {"w1": floats(4, 6), "w2": floats(6, 5), "w3": floats(5, 7), "w4": floats(7, 2)}
    return (model(nodes, {"x": (FLOAT, ["N", 4]), "flag": (TensorProto.BOOL, [])}, {"y": (FLOAT, ["N", 2])}, constants),
            {"x": floats(3, 4, seed=1), "flag": np.array(True)}, ["If"])


def half_net():
    """A float16 network whose inputs and outputs are float32."""
    nodes = [node("Cast", ["x"], ["h"], to=FLOAT16), node("Gemm", ["h", "w1"], ["a"]), node("Relu", ["a"], ["b"]),
             node("Gemm", ["b", "w2"], ["c"]), node("Cast", ["c"], ["y"], to=FLOAT)]
    constants = {"w1": floats(4, 6).astype(np.float16), "w2": floats(6, 3).astype(np.float16)}
    return (model(nodes, {"x": (FLOAT, ["N", 4])}, {"y": (FLOAT, ["N", 3])}, constants), {"x": floats(3, 4, seed=1)}, ["Cast", "Cast"])


def half_output_net():
    """A float16 network, and a float16 cosine that is kept."""
    nodes = [node("Gemm", ["x", "w1"], ["a"]), node("Relu", ["a"], ["b"]), node("Gemm", ["b", "w2"], ["c"]), node("Cos", ["c"], ["y"])]
    constants = {"w1": floats(4, 6).astype(np.float16), "w2": floats(6, 3).astype(np.float16)}
    return (model(nodes, {"x": (FLOAT16, ["N", 4])}, {"y": (FLOAT16, ["N", 3])}, constants),
            {"x": floats(3, 4, seed=1).astype(np.float16)}, ["Cos"])


def batch_net():
    """A fixed batch of several samples around a kept node."""
    nodes = [node("Gemm", ["x", "w1"], ["a"]), node("Relu", ["a"], ["b"]), node("Gemm", ["b", "w2"], ["c"]), node("Cos", ["c"], ["d"]),
             node("Gemm", ["d", "w3"], ["e"]), node("Relu", ["e"], ["f"]), node("Gemm", ["f", "w4"], ["y"])]
    constants = {"w1": floats(4, 6), "w2": floats(6, 5), "w3": floats(5, 7), "w4": floats(7, 2)}
    return model(nodes, {"x": (FLOAT, [3, 4])}, {"y": (FLOAT, [3, 2])}, constants), {"x": floats(3, 4, seed=1)}, ["Cos"]


def fixed_net():
    """A batch of one sample that the file leaves out on the way, and a state with the batch at its second axis."""
    nodes = [node("Squeeze", ["x", "zero"], ["s"]), node("MatMul", ["s", "w1"], ["a"]), node("Relu", ["a"], ["b"]),
             node("MatMul", ["b", "w2"], ["c"]), node("Squeeze", ["state", "one"], ["t"]), node("Sqrt", ["t"], ["u"]),
             node("Concat", ["c", "u"], ["v"], axis=1), node("MatMul", ["v", "w3"], ["d"]), node("Relu", ["d"], ["e"]),
             node("MatMul", ["e", "w4"], ["y"])]
    constants = {"zero": ints(0), "one": ints(1), "w1": floats(4, 6), "w2": floats(6, 3), "w3": floats(5, 7), "w4": floats(7, 2)}
    return (model(nodes, {"x": (FLOAT, [1, 5, 4]), "state": (FLOAT, [5, 1, 2])}, {"y": (FLOAT, [5, 2])}, constants),
            {"x": floats(1, 5, 4, seed=1), "state": np.abs(floats(5, 1, 2, seed=2))}, ["Sqrt"])


def homogeneous_net():
    """Layers by Einsum and by products from the left, and between them what passes factors; a sine is kept."""
    nodes = [node("Einsum", ["x", "w1"], ["a"], equation="btd,dhk->bhtk"), node("Abs", ["a"], ["b"]), node("MatMul", ["m", "b"], ["c"]),
             node("Sub", ["b", "c"], ["d"]), node("Einsum", ["d", "w2"], ["e"], equation="bhtk,hkd->btd"), node("Sin", ["e"], ["f"]),
             node("Einsum", ["w3", "f"], ["g"], equation="de,btd->bte"), node("Relu", ["g"], ["h"]), node("MatMul", ["h", "w4"], ["i"]),
             node("Transpose", ["i"], ["j"], perm=[0, 2, 1]), node("MatMul", ["w5", "j"], ["k"]), node("Relu", ["k"], ["l"]),
             node("MatMul", ["w6", "l"], ["y"])]
    constants = {"w1": floats(4, 2, 3), "m": floats(5, 5), "w2": floats(2, 3, 4) / 20, "w3": floats(4, 6), "w4": floats(6, 3),
                 "w5": floats(7, 3), "w6": floats(2, 7)}
    return (model(nodes, {"x": (FLOAT, ["N", 5, 4])}, {"y": (FLOAT, ["N", 2, 5])}, constants), {"x": floats(3, 5, 4, seed=1)}, ["Sin"])


def image_net():
    """A decoder: resizing by interpolation, differences, maxima, norms over space and coordinates beside the channels; a sine is kept."""
    nodes = [node("Conv", ["x", "w1"], ["a"]), node("Resize", ["a", "", "scales"], ["b"], mode="linear"), node("Conv", ["b", "w2"], ["c"]),
             node("Sub", ["b", "c"], ["d"]), node("Max", ["c", "d"], ["e"]), node("Concat", ["e", "where"], ["f"], axis=1),
             node("Conv", ["f", "w3"], ["g"]), node("Sin", ["g"], ["h"]), node("Conv", ["h", "w4"], ["i"]),
             node("ReduceL2", ["i"], ["k"], axes=[2, 3], keepdims=0), node("Gemm", ["k", "w5"], ["y"])]
    constants = {"w1": floats(6, 3, 3, 3), "scales": np.float32([1, 1, 2, 2]), "w2": floats(6, 6, 1, 1), "where": floats(1, 2, 8, 12),
                 "w3": floats(5, 8, 1, 1), "w4": floats(4, 5, 3, 3), "w5": floats(4, 2)}
    return (model(nodes, {"x": (FLOAT, [1, 3, 6, 8])}, {"y": (FLOAT, [1, 2])}, constants), {"x": floats(1, 3, 6, 8, seed=1)}, ["Sin"])


def number_net():
    """One sample, of which a mean and the value that an If reads are single numbers."""
    yes = helper.make_graph([node("Cos", ["o"], ["one"])], "yes", [], [helper.make_tensor_value_info("one", FLOAT, None)])
    no = helper.make_graph([node("Neg", ["o"], ["two"])], "no", [], [helper.make_tensor_value_info("two", FLOAT, None)])
    nodes = [node("Gemm", ["x", "w1"], ["a"]), node("ReduceMean", ["a"], ["m"], axes=[1]), node("Sub", ["a", "m"], ["d"]),
             node("Relu", ["d"], ["r"]), node("Gemm", ["r", "w2"], ["b"]), node("Relu", ["b"], ["c"]), node("Gemm", ["c", "w3"], ["o"]),
             node("If", ["flag"], ["y"], then_branch=yes, else_branch=no)]
    constants = {"w1": floats(4, 6), "w2": floats(6, 5), "w3": floats(5, 1)}
    return (model(nodes, {"x": (FLOAT, [1, 4]), "flag": (TensorProto.BOOL, [])}, {"y": (FLOAT, [1, 1])}, constants),
            {"x": floats(1, 4, seed=4), "flag": np.array(True)}, ["If"])


NETS = {"single numbers": number_net, "float16": half_output_net, "a fixed batch": batch_net,
        "what is homogeneous": homogeneous_net, "images": image_net, "convolutions, open sizes": conv_net,
        "tokens": token_net, "LSTM": recurrent_net, "If": branching_net, "float16 inside": half_net,
        "one sample": fixed_net}


@pytest.fixture(params=NETS.values(), ids=NETS)
def net(request, tmp_path):
    proto, feeds, kept = request.param()
    path = tmp_path / "net.onnx"
    onnx.save(proto, path)
    return path, feeds, kept


def close(actual, expected, path, tolerance=2e-5):
    """Within so much of the largest, or a hundred times that in float16."""
    half = any(t.data_type == FLOAT16 for t in onnx.load(path).graph.initializer)
    for name, value in expected.items():
        if value.dtype.kind != "f":
            assert np.array_equal(actual[name], value)
        else:
            np.testing.assert_allclose(actual[name], value, rtol=0, atol=(100 if half else 1) * tolerance * max(1, np.abs(value).max()))


def rescaled(graph, seed=0):
    resolved = eq.channels(graph)
    exponents = np.random.default_rng(seed).integers(-2, 3, resolved.degrees_of_freedom + 1)
    exponents[0] = 0
    return eq.Factorization(resolved, np.exp2(exponents.astype(float))).apply(graph)


def test_what_is_not_understood_is_kept_with_its_reason(net):
    path, feeds, kept = net
    opened = eqfact.onnx.open(path, feeds)
    assert [k.op_type for k in opened.kept if "among kept nodes" not in k.reason] == kept
    assert all(k.reason for k in opened.kept) and str(path) in str(opened)
    assert eq.degrees_of_freedom(opened.graph) > 0


def test_the_file_runs_as_it_is_and_hands_over_the_inputs_of_the_graph(net):
    path, feeds, _ = net
    opened = eqfact.onnx.open(path, feeds)
    close(opened.run(feeds), small.run_ort(path, feeds), path)
    boundary = opened.boundary(feeds)
    assert {name: a.shape[1:] for name, a in boundary.items()} == dict(opened.graph.inputs)
    every = eq.values(opened.graph, boundary)
    inner = {}
    for name, view in opened.source.tensors.items():
        if isinstance(view, eqfact.onnx.views.View) and view.value in every and name not in feeds:
            inner[name] = view.tensor_of(every[view.value])
    close(inner, eqfact.onnx.running.run(path, feeds, list(inner)), path)
    assert inner


def test_powers_of_two_change_no_bit_of_a_file(net, tmp_path):
    path, feeds, _ = net
    opened = eqfact.onnx.open(path, feeds)
    changed = rescaled(opened.graph)
    opened.save(tmp_path / "out.onnx", changed)
    before, after = (small.run_ort(p, feeds) for p in (path, tmp_path / "out.onnx"))
    for name, value in before.items():
        assert np.array_equal(after[name], value), name
    nodes = [{n.SerializeToString() for n in onnx.load(p).graph.node} for p in (path, tmp_path / "out.onnx")]
    assert nodes[0] == nodes[1]  # parameters alone have changed
    weights = [{t.name: numpy_helper.to_array(t) for t in onnx.load(p).graph.initializer} for p in (path, tmp_path / "out.onnx")]
    assert weights[0].keys() == weights[1].keys()
    assert any(not np.array_equal(weights[1][n], w) for n, w in weights[0].items())


def test_an_unchanged_graph_is_written_as_the_file_was(net, tmp_path):
    path, feeds, _ = net
    opened = eqfact.onnx.open(path, feeds)
    opened.save(tmp_path / "out.onnx", opened.graph)
    before, after = (onnx.load(p) for p in (path, tmp_path / "out.onnx"))
    order = sorted(range(len(after.graph.initializer)), key=lambda i: after.graph.initializer[i].name)
    names = sorted(t.name for t in before.graph.initializer)
    assert [after.graph.initializer[i].name for i in order] == names
    for m in (before, after):
        del m.graph.initializer[:]
    assert before == after


def test_equalized_files_are_proven_by_the_runtime(net, tmp_path):
    path, feeds, _ = net
    opened = eqfact.onnx.open(path, feeds)
    assert eqfact.onnx.check(path, opened.graph, feeds)
    result = eq.equalize(opened.graph, "cross_layer")
    opened.save(tmp_path / "out.onnx", result.graph)
    verdict = eqfact.onnx.check(tmp_path / "out.onnx", result.graph, feeds)
    assert verdict and verdict.apart < 1e-2
    close(small.run_ort(tmp_path / "out.onnx", feeds), small.run_ort(path, feeds), path, 1e-4)
    assert not eqfact.onnx.check(path, result.graph, feeds)  # of the file that was read it is another network


def test_quantized_graphs_go_into_the_file(net, tmp_path):
    path, feeds, kept = net
    opened = eqfact.onnx.open(path, feeds)
    boundary = opened.boundary(feeds)
    quantized = eq.quantize(opened.graph, stats=eq.calibrate(opened.graph, boundary), **EIGHT)
    opened.save_qdq(tmp_path / "q.onnx", quantized)
    types = [n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node]
    assert "QuantizeLinear" in types and all(types.count(kind) >= kept.count(kind) for kind in kept)
    before, after = small.run_ort(path, feeds), eqfact.onnx.running.run(tmp_path / "q.onnx", feeds, optimized=True)
    for name, value in before.items():
        if value.dtype.kind == "f":
            assert eq.sqnr(value, after[name]) > 12, name


def test_open_sizes_stay_open(tmp_path):
    proto, feeds, _ = conv_net()
    path = tmp_path / "net.onnx"
    onnx.save(proto, path)
    opened = eqfact.onnx.open(path, feeds)
    opened.save(tmp_path / "out.onnx", rescaled(opened.graph))
    other = {"x": floats(5, 3, 11, 6)}
    assert np.array_equal(small.run_ort(tmp_path / "out.onnx", other)["y"], small.run_ort(path, other)["y"])
    with pytest.raises(OnnxError, match=r"'x' has the shape \(5, 3, 11, 6\).*open the file with data of this size"):
        opened.boundary(other)


def test_several_batches_of_a_fixed_size_are_run_one_by_one(tmp_path):
    proto, *_ = fixed_net()
    path = tmp_path / "net.onnx"
    onnx.save(proto, path)
    several = {"x": floats(3, 5, 4, seed=5), "state": np.abs(floats(15, 1, 2, seed=6))}
    opened = eqfact.onnx.open(path, several)
    boundary, made = opened.boundary(several), opened.run(several)
    assert {len(a) for a in boundary.values()} == {3} and made["y"].shape == (15, 2)
    for i in range(3):
        one = {"x": several["x"][i:i + 1], "state": several["state"][5 * i:5 * i + 5]}
        assert np.array_equal(small.run_ort(path, one)["y"], made["y"][5 * i:5 * i + 5])
        for name, a in opened.boundary(one).items():
            assert np.array_equal(a[0], boundary[name][i])


def test_an_open_axis_of_space_is_no_batch(tmp_path):
    """A batch of one, and an axis without a size or a name, longer than the data that are run at a time."""
    proto = model([node("Conv", ["x", "w"], ["y"])], {"x": (FLOAT, [1, 3, None])}, {"y": (FLOAT, None)}, {"w": floats(2, 3, 3)})
    onnx.save(proto, tmp_path / "net.onnx")
    feeds = {"x": floats(1, 3, 20)}
    opened = eqfact.onnx.open(tmp_path / "net.onnx", feeds)
    assert np.array_equal(opened.run(feeds)["y"], small.run_ort(tmp_path / "net.onnx", feeds)["y"])


def test_a_free_batch_that_takes_one_sample_only(tmp_path):
    """A state of one sample beside it: the file runs on single samples, and is read for them."""
    nodes = [*layer("x", "h", "w1"), node("MatMul", ["h", "w2"], ["i"]), node("Transpose", ["i"], ["t"], perm=[1, 0, 2]),
             node("GRU", ["t", "W", "R", "", "", "h0"], ["s", ""], hidden_size=4), node("Squeeze", ["s", "one"], ["q"]),
             node("Transpose", ["q"], ["u"], perm=[1, 0, 2]), *layer("u", "v", "w3"), node("MatMul", ["v", "w4"], ["y"])]
    constants = {"w1": floats(6, 9), "w2": floats(9, 5), "W": floats(1, 12, 5), "R": floats(1, 12, 4), "one": ints(1), "w3": floats(4, 7),
                 "w4": floats(7, 3)}
    path = tmp_path / "net.onnx"
    onnx.save(model(nodes, {"x": (FLOAT, ["N", "T", 6]), "h0": (FLOAT, [1, 1, 4])}, {"y": (FLOAT, ["N", "T", 3])}, constants), path)
    feeds = {"x": floats(3, 5, 6, seed=1), "h0": floats(1, 1, 4, seed=2)}
    opened = eqfact.onnx.open(path, feeds)
    assert [k.op_type for k in opened.kept] == ["GRU"] and len(opened.boundary(feeds)["x"]) == 3
    opened.save(tmp_path / "out.onnx", rescaled(opened.graph))
    for i in range(3):
        one = {"x": feeds["x"][i:i + 1], "h0": feeds["h0"]}
        assert np.array_equal(small.run_ort(tmp_path / "out.onnx", one)["y"], small.run_ort(path, one)["y"])
    assert eqfact.onnx.check(path, opened.graph, feeds)
    without_data = eqfact.onnx.open(path, input_shapes={"x": (5, 6)})
    assert without_data.graph.inputs == opened.graph.inputs and [k.op_type for k in without_data.kept] == ["GRU"]


def test_batchnorms_in_front_of_layers_are_folded_in_the_file(tmp_path):
    """What the layer reads is what they read; one that a kept node reads, too, stays."""
    norms = [[name + i for name in "gbmv"] for i in "12"]
    nodes = [node("Conv", ["x", "w1"], ["a"]), node("Relu", ["a"], ["r"]), node("BatchNormalization", ["r", *norms[0]], ["n"]),
             node("Conv", ["n", "w2"], ["c"]), node("BatchNormalization", ["c", *norms[1]], ["k"]), node("Conv", ["k", "w3"], ["d"]),
             node("Cos", ["d"], ["y"]), node("Cos", ["k"], ["z"])]
    constants = {"w1": floats(5, 2, 3, 3), "w2": floats(4, 5, 3, 3), "w3": floats(3, 4, 1, 1)}
    for norm, n in zip(norms, (5, 4), strict=True):
        constants |= {name: np.abs(floats(n, seed=i)) for i, name in enumerate(norm)}
    path, ends = tmp_path / "net.onnx", {"y": (FLOAT, ["N", 3, 2, 2]), "z": (FLOAT, ["N", 4, 2, 2])}
    onnx.save(model(nodes, {"x": (FLOAT, ["N", 2, 6, 6])}, ends, constants), path)
    feeds = {"x": floats(2, 2, 6, 6, seed=1)}
    opened = eqfact.onnx.open(path, feeds)
    opened.save(tmp_path / "out.onnx", eq.fold_batchnorm(opened.graph))
    assert "BatchNormalization" not in [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node]
    close(small.run_ort(tmp_path / "out.onnx", feeds), small.run_ort(path, feeds), path, 1e-4)


def test_an_input_without_a_batch_is_said_to_have_none(tmp_path):
    nodes = [*layer("x", "h", "w1"), node("Add", ["h", "q"], ["a"]), *layer("a", "v", "w2"), node("MatMul", ["v", "w3"], ["y"])]
    constants = {"w1": floats(6, 9), "w2": floats(9, 7), "w3": floats(7, 3)}
    onnx.save(model(nodes, {"x": (FLOAT, ["N", 6]), "q": (FLOAT, [9])}, {"y": (FLOAT, ["N", 3])}, constants), tmp_path / "net.onnx")
    opened = eqfact.onnx.open(tmp_path / "net.onnx", {"x": floats(2, 6), "q": floats(9)})
    assert [(k.op_type, k.reason) for k in opened.kept] == [("Add", "it reads 'q', which has no batch (it is an input of the file)")]


@pytest.mark.parametrize("fixed", [False, True])
def test_quantized_files_state_the_sizes_that_they_are_for_if_these_matter(fixed, tmp_path):
    """Pools are written for the sizes that they were read for; layers alone run at any."""
    middle = node("AveragePool", ["a"], ["b"], kernel_shape=[2, 2]) if fixed else node("Relu", ["a"], ["b"])
    nodes = [node("Conv", ["x", "w1"], ["a"]), middle, node("Conv", ["b", "w2"], ["c"]), node("Cos", ["c"], ["y"])]
    constants = {"w1": floats(4, 2, 3, 3), "w2": floats(3, 4, 1, 1)}
    onnx.save(model(nodes, {"x": (FLOAT, ["N", 2, "H", "W"])}, {"y": (FLOAT, ["N", 3, "h", "w"])}, constants), tmp_path / "net.onnx")
    feeds = {"x": floats(2, 2, 7, 6)}
    opened = eqfact.onnx.open(tmp_path / "net.onnx", feeds)
    eight = {"weights": eq.UniformQuantizer(8), "activations": eq.UniformQuantizer(8)}
    quantized = eq.quantize(opened.graph, stats=eq.calibrate(opened.graph, opened.boundary(feeds)), **eight)
    opened.save_qdq(tmp_path / "q.onnx", quantized)
    dims = onnx.load(tmp_path / "q.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in dims] == ([0, 2, 7, 6] if fixed else [0, 2, 0, 0])


def test_outputs_without_a_shape_stay_so(tmp_path):
    proto, feeds, _ = token_net()
    for info in proto.graph.output:
        info.type.tensor_type.ClearField("shape")
    onnx.save(proto, tmp_path / "net.onnx")
    opened = eqfact.onnx.open(tmp_path / "net.onnx", feeds)
    opened.save(tmp_path / "out.onnx", rescaled(opened.graph))
    assert list(onnx.load(tmp_path / "out.onnx").graph.output) == list(proto.graph.output)


@pytest.mark.parametrize("opset", [13, 17, 20])
def test_what_is_kept_keeps_its_opset(opset, tmp_path):
    nodes = [*layer("x", "h", "w1"), node("MatMul", ["h", "w2"], ["i"]), node("Cos", ["i"], ["c"]), *layer("c", "v", "w3"),
             node("MatMul", ["v", "w4"], ["y"])]
    constants = {"w1": floats(6, 9), "w2": floats(9, 5), "w3": floats(5, 7), "w4": floats(7, 3)}
    onnx.save(model(nodes, {"x": (FLOAT, ["N", 6])}, {"y": (FLOAT, ["N", 3])}, constants, opset), tmp_path / "net.onnx")
    feeds = {"x": floats(3, 6, seed=1)}
    opened = eqfact.onnx.open(tmp_path / "net.onnx", feeds)
    stats = eq.calibrate(opened.graph, opened.boundary(feeds))
    opened.save(tmp_path / "out.onnx", rescaled(opened.graph))
    opened.save_qdq(tmp_path / "q.onnx", eq.quantize(opened.graph, stats=stats, weights=eq.UniformQuantizer(8)))
    same, quantized = (onnx.load(tmp_path / name) for name in ("out.onnx", "q.onnx"))
    assert same.opset_import[0].version == opset and quantized.opset_import[0].version >= opset
    assert "Cast" not in {n.op_type for n in quantized.graph.node}  # all is of one type


@pytest.mark.parametrize("shape", [[], [1]], ids=["a number", "a number of one axis"])
def test_inputs_of_one_number_are_no_free_batch(shape, tmp_path):
    """Beside a fixed batch of one sample they change nothing: what a kept node makes of both is one sample."""
    nodes = [*layer("x", "h", "w1"), node("MatMul", ["h", "w2"], ["i"]), node("Mul", ["i", "k"], ["m"]), node("Sum", ["m", "m"], ["t"]),
             node("Cos", ["t"], ["c"]), *layer("c", "v", "w3"), node("MatMul", ["v", "w4"], ["y"])]
    constants = {"w1": floats(6, 9), "w2": floats(9, 5), "w3": floats(5, 7), "w4": floats(7, 3)}
    path = tmp_path / "net.onnx"
    onnx.save(model(nodes, {"x": (FLOAT, [1, 6]), "k": (FLOAT, shape)}, {"y": (FLOAT, [1, 3])}, constants), path)
    feeds = {"x": floats(1, 6, seed=1), "k": np.full(shape, 0.5, np.float32)}
    opened = eqfact.onnx.open(path, feeds)
    assert "Cos" in [k.op_type for k in opened.kept] and {"h", "v"} <= {n.name for n in opened.graph.nodes}
    opened.save(tmp_path / "out.onnx", rescaled(opened.graph))
    small.close(small.run_ort(tmp_path / "out.onnx", feeds), small.run_ort(path, feeds))


SUMS = {"MatMul": (lambda x, y, w: node("MatMul", [x, w], [y]), (5, 6), (6, 6), (6,)),
        "MatMul from the left": (lambda x, y, w: node("MatMul", [w, x], [y]), (6, 5), (6, 6), (6, 1)),
        "MatMul of rows": (lambda x, y, w: node("MatMul", [x, w], [y]), (6,), (6, 6), (1, 6)),
        "Gemm": (lambda x, y, w: node("Gemm", [x, w], [y], transB=1, alpha=0.5), (6,), (6, 6), (6,)),
        "Einsum": (lambda x, y, w: node("Einsum", [x, w], [y], equation="ntc,cd->ntd"), (5, 6), (6, 6), (1, 1, 6)),
        "Conv": (lambda x, y, w: node("Conv", [x, w], [y], pads=[1, 1]), (6, 5), (6, 6, 3), (6, 1)),
        "ConvTranspose": (lambda x, y, w: node("ConvTranspose", [x, w], [y]), (6, 5), (6, 6, 1), (1, 6, 1))}


@pytest.mark.parametrize("bias_first", [False, True])
@pytest.mark.parametrize("product, x, w, b", SUMS.values(), ids=SUMS)
def test_a_layer_and_the_sum_that_is_its_bias_stay_two_nodes(product, x, w, b, bias_first, tmp_path):
    """They are one layer of the graph; with other factors nothing in the file changes but numbers."""
    def summed(made, y):
        return node("Add", ["b", made] if bias_first else [made, "b"], [y], name=f"sum_{y}")
    nodes = [product("x", "p", "w1"), summed("p", "s"), node("Relu", ["s"], ["r"]), product("r", "q", "w2"), summed("q", "t"),
             node("Cos", ["t"], ["y"])]
    path = tmp_path / "net.onnx"
    constants = {"w1": floats(*w), "w2": floats(*w, seed=5), "b": floats(*b)}
    onnx.save(model(nodes, {"x": (FLOAT, ["N", *x])}, {"y": (FLOAT, ["N", *x])}, constants), path)
    feeds = {"x": floats(3, *x, seed=1)}
    opened = eqfact.onnx.open(path, feeds)
    assert not {"BatchNorm", "Affine"} & {type(n.op).__name__ for n in opened.graph.nodes}
    opened.save(tmp_path / "out.onnx", rescaled(opened.graph))
    small.close(small.run_ort(tmp_path / "out.onnx", feeds), small.run_ort(path, feeds))
    before, after = (onnx.load(p).graph.node for p in (path, tmp_path / "out.onnx"))
    assert [(n.op_type, n.name, n.output) for n in before] == [(n.op_type, n.name, n.output) for n in after]
    assert [len(n.input) for n in before] == [len(n.input) for n in after]


def test_folded_batchnorms_go_into_the_file(tmp_path):
    nodes = [node("Conv", ["x", "w1"], ["a"]), node("BatchNormalization", ["a", "g", "b", "m", "v"], ["n"]), node("Relu", ["n"], ["r"]),
             node("Transpose", ["r"], ["t"], perm=[0, 2, 3, 1]), node("MatMul", ["t", "w2"], ["p"]), node("Add", ["p", "c"], ["q"]),
             node("Cos", ["q"], ["y"])]
    constants = {"w1": floats(5, 2, 3, 3), "g": floats(5), "b": floats(5), "m": floats(5), "v": np.abs(floats(5)), "w2": floats(5, 4),
                 "c": floats(4)}
    path = tmp_path / "net.onnx"
    onnx.save(model(nodes, {"x": (FLOAT, ["N", 2, 6, 6])}, {"y": (FLOAT, ["N", 4, 4, 4])}, constants), path)
    feeds = {"x": floats(2, 2, 6, 6, seed=1)}
    opened = eqfact.onnx.open(path, feeds)
    folded = eq.fold_batchnorm(opened.graph)
    assert len(opened.graph) - len(folded) == 1
    opened.save(tmp_path / "out.onnx", folded)
    assert [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node] == ["Conv", "Relu", "Transpose", "MatMul", "Add", "Cos"]
    close(small.run_ort(tmp_path / "out.onnx", feeds), small.run_ort(path, feeds), path)


def test_values_without_a_tensor_are_computed_in_whatever_groups_a_file_is_checked(tmp_path, monkeypatch):
    """Two ops of eqfact for one node: what stands between them is no tensor of the file."""
    pads = ints(0, 0, -1, 1, 0, 0, 2, 1)
    onnx.save(model([node("Relu", ["x"], ["r"]), node("Pad", ["r", "p"], ["q"]), node("Conv", ["q", "w"], ["y"])],
                    {"x": (FLOAT, ["N", 2, 5, 4])}, {"y": (FLOAT, None)}, {"p": pads, "w": floats(3, 2, 2, 2)}), tmp_path / "net.onnx")
    feeds, graph = {"x": floats(2, 2, 5, 4)}, eqfact.onnx.load(tmp_path / "net.onnx")
    assert {type(n.op) for n in graph.nodes} >= {eq.ops.Take, eq.Pad}
    whole = eqfact.onnx.check(tmp_path / "net.onnx", graph, feeds)
    monkeypatch.setattr("eqfact.onnx.checking.AT_ONCE", 1)
    assert whole and eqfact.onnx.check(tmp_path / "net.onnx", graph, feeds) == whole


def test_a_misreading_is_noticed_at_its_node(tmp_path, monkeypatch):
    proto, feeds, _ = token_net()
    path = tmp_path / "net.onnx"
    onnx.save(proto, path)
    opened = eqfact.onnx.open(path, feeds)
    wrong = opened.graph.with_ops({"g.product": eq.Conv(opened.graph["g.product"].op.weight * np.float32(1.001))})
    verdict = eqfact.onnx.check(path, wrong, feeds)
    assert not verdict and verdict.worst == "g.product" and "'g.product' (Conv)" in verdict.message and "onnxruntime" in verdict.message


def test_without_onnxruntime_the_reference_evaluator_runs_the_rest(net, monkeypatch):
    path, feeds, _ = net
    truth = small.run_ort(path, feeds)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert "reference evaluator" in eqfact.onnx.running.runtime()
    opened = eqfact.onnx.open(path, feeds)
    close(opened.run(feeds), truth, path, 1e-4)
    assert eqfact.onnx.check(path, opened.graph, feeds)


# ------------------------------------------------------------------------------------------------ refusals


def refused(call, *words):
    with pytest.raises(OnnxError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_data_that_a_file_does_not_take(tmp_path):
    proto, feeds, _ = token_net()
    path = tmp_path / "net.onnx"
    onnx.save(proto, path)
    refused(lambda: eqfact.onnx.open(path, {"x": feeds["ids"]}), str(path), "inputs ['ids']", "got ['x']")
    refused(lambda: eqfact.onnx.open(path, {"ids": floats(2, 7)}), "'ids' holds int64, got float32", ".astype")
    refused(lambda: eqfact.onnx.open(path, {"ids": feeds["ids"][0]}), "'ids' has the shape (?, ?), got (7,)")
    refused(lambda: eqfact.onnx.open(path, {"ids": feeds["ids"][:0]}), "'ids' has the shape (?, ?), got (0, 7)")
    refused(lambda: eqfact.onnx.open(path), "'ids' has the shape (?, ?)", "--data", "--input-shape ids=C,H,W")
    refused(lambda: eqfact.onnx.open(path, {"ids": feeds["ids"] + 99}), "onnxruntime", "does not run this model")
    refused(lambda: eqfact.onnx.open(path, input_shapes={"z": (3,)}), "names ['z']", "['ids']")
    assert eqfact.onnx.open(path, input_shapes={"ids": (7,)}).graph.inputs


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_data_are_numbers(wrong, tmp_path):
    proto, feeds, _ = conv_net()
    onnx.save(proto, tmp_path / "net.onnx")
    feeds["x"][1, 2, 3, 4] = wrong
    refused(lambda: eqfact.onnx.open(tmp_path / "net.onnx", feeds), "'x' holds NaN or infinity")


def test_inputs_hold_equally_many_samples(tmp_path):
    nodes = [node("Gemm", ["x", "w"], ["a"]), node("Add", ["a", "z"], ["y"])]
    for dims, x, z in ((["N"], 3, 4), ([2], 4, 6)):  # free; two and three times the batch that is fixed
        onnx.save(model(nodes, {"x": (FLOAT, [*dims, 4]), "z": (FLOAT, [*dims, 5])}, {"y": (FLOAT, None)}, {"w": floats(4, 5)}),
                  tmp_path / "net.onnx")
        refused(lambda x=x, z=z: eqfact.onnx.open(tmp_path / "net.onnx", {"x": floats(x, 4), "z": floats(z, 5)}), "equal batch sizes",
                f"({x}, 4)", f"({z}, 5)")
    refused(lambda: eqfact.onnx.open(tmp_path / "net.onnx", {"x": floats(3, 4), "z": floats(2, 5)}), "'x' has the shape (2, 4), got (3, 4)",
            "a multiple of 2 along the first axis")


def test_an_output_of_one_number(tmp_path):
    nodes = [node("Gemm", ["x", "w"], ["a"]), node("ReduceSum", ["a"], ["y"], keepdims=0)]
    onnx.save(model(nodes, {"x": (FLOAT, [1, 4])}, {"y": (FLOAT, [])}, {"w": floats(4, 5)}), tmp_path / "net.onnx")
    feeds = {"x": floats(1, 4)}
    assert eqfact.onnx.open(tmp_path / "net.onnx", feeds).run(feeds)["y"] == small.run_ort(tmp_path / "net.onnx", feeds)["y"]


def test_kept_nodes_without_a_name_are_called_as_what_they_make(tmp_path):
    proto, feeds, _ = conv_net()
    onnx.save(proto, tmp_path / "net.onnx")
    assert [k.name for k in eqfact.onnx.open(tmp_path / "net.onnx", feeds).kept] == ["d"]
    next(n for n in proto.graph.node if n.op_type == "LRN").name = "a norm"
    onnx.save(proto, tmp_path / "net.onnx")
    assert [k.name for k in eqfact.onnx.open(tmp_path / "net.onnx", feeds).kept] == ["a norm"]


def test_of_two_outputs_one_may_lead_to_a_layer(tmp_path):
    """The other one's readers have none, and are kept; the node itself is understood, for the one that has."""
    nodes = [node("Split", ["x", "s"], ["a", "b"], axis=-1), node("Gemm", ["a", "w"], ["h"]), node("Relu", ["h"], ["r"]),
             node("Gemm", ["r", "v"], ["y"]), node("Neg", ["b"], ["z"])]
    onnx.save(model(nodes, {"x": (FLOAT, ["N", 6])}, {"y": (FLOAT, None), "z": (FLOAT, None)},
                    {"s": ints(4, 2), "w": floats(4, 5), "v": floats(5, 2)}), tmp_path / "net.onnx")
    feeds = {"x": floats(3, 6)}
    opened = eqfact.onnx.open(tmp_path / "net.onnx", feeds)
    assert [k.op_type for k in opened.kept] == ["Neg"] and list(opened.graph.inputs) == ["x"]
    opened.save(tmp_path / "out.onnx", rescaled(opened.graph))
    truth, made = (small.run_ort(tmp_path / name, feeds) for name in ("net.onnx", "out.onnx"))
    assert all(np.array_equal(truth[name], made[name]) for name in ("y", "z"))


def test_nothing_to_understand(tmp_path):
    path = tmp_path / "net.onnx"
    onnx.save(model([node("Cos", ["x"], ["y"])], {"x": (FLOAT, ["N", 3])}, {"y": (FLOAT, ["N", 3])}), path)
    refused(lambda: eqfact.onnx.open(path), str(path), "no layer with weights", "1 kept (Cos: eqfact has no such layer)")


def test_a_class_token_takes_factors_in_its_file(tmp_path):
    """Its constant is repeated for every sample on the way, so it is written before what repeats it."""
    nodes = [node("Sin", ["x"], ["z"]), node("MatMul", ["z", "w"], ["g"]), node("Shape", ["g"], ["s"]),
             node("Slice", ["s", "zero", "one"], ["n"]), node("Concat", ["n", "rest"], ["r"], axis=0),
             node("Expand", ["token", "r"], ["t"]), node("Concat", ["t", "g"], ["h"], axis=1), node("MatMul", ["h", "v"], ["y"])]
    constants = {"w": floats(4, 6), "zero": ints(0), "one": ints(1), "rest": ints(1, 6), "token": floats(1, 1, 6), "v": floats(6, 3)}
    onnx.save(model(nodes, {"x": (FLOAT, ["N", 5, 4])}, {"y": (FLOAT, ["N", 6, 3])}, constants), tmp_path / "net.onnx")
    feeds = {"x": floats(3, 5, 4, seed=1)}
    opened = eqfact.onnx.open(tmp_path / "net.onnx", feeds)
    assert eq.degrees_of_freedom(opened.graph) == 6
    opened.save(tmp_path / "out.onnx", rescaled(opened.graph))
    for batch in (1, 3):
        feeds = {"x": floats(batch, 5, 4, seed=batch)}
        before, after = (small.run_ort(tmp_path / name, feeds)["y"] for name in ("net.onnx", "out.onnx"))
        assert np.array_equal(before, after)


def test_constants_at_both_ends_have_no_place_of_their_own(tmp_path):
    """One node of the file became two; to write the last of them in its place would lose the first, so the whole graph is written anew."""
    nodes = [node("Sin", ["x"], ["z"]), node("Conv", ["z", "w"], ["a"]), node("Concat", ["k", "a", "k"], ["b"], axis=2),
             node("Conv", ["b", "w"], ["y"])]
    onnx.save(model(nodes, {"x": (FLOAT, [1, 4, 5])}, {"y": (FLOAT, [1, 4, 7])}, {"w": floats(4, 4, 1), "k": floats(1, 4, 1)}),
              tmp_path / "net.onnx")
    x = floats(1, 4, 5)
    opened = eqfact.onnx.open(tmp_path / "net.onnx", {"x": x})
    assert [type(n.op) for n in opened.graph] == [eq.Conv, eq.Extend, eq.Extend, eq.Conv]
    graph = opened.graph
    for name, n in [(n.name, n) for n in graph if isinstance(n.op, eq.Extend)]:
        graph = graph.with_ops({name: n.op.rescale(2 * np.ones(4), 2 * np.ones(4))})
        refused(lambda changed=graph: patch(tmp_path / "out.onnx", changed, opened.graph, opened.source), "has no place of its own")
        opened.save(tmp_path / "out.onnx", graph)
        small.close(small.run_ort(tmp_path / "out.onnx", {"x": x}), {"y": eq.forward(graph, np.sin(x))})


def test_a_batchnorm_folded_into_a_product_from_the_left_is_its_sum_with_a_constant(tmp_path):
    nodes = [node("Sin", ["x"], ["z"]), node("MatMul", ["w", "z"], ["a"]), node("BatchNormalization", ["a", *"gbmv"], ["c"]),
             node("Einsum", ["c", "u"], ["d"], equation="btd,te->bde"), node("Add", ["d", "t"], ["y"])]
    constants = {"w": floats(6, 5), **dict(zip("gbmv", np.abs(floats(4, 6)), strict=True)), "u": floats(6, 3), "t": floats(3)}
    onnx.save(model(nodes, {"x": (FLOAT, ["N", 5, 4])}, {"y": (FLOAT, ["N", 4, 3])}, constants), tmp_path / "net.onnx")
    feeds = {"x": floats(3, 5, 4, seed=1)}
    opened = eqfact.onnx.open(tmp_path / "net.onnx", feeds)
    folded = eq.fold_batchnorm(opened.graph)
    opened.save(tmp_path / "out.onnx", folded)
    close(small.run_ort(tmp_path / "out.onnx", feeds), small.run_ort(tmp_path / "net.onnx", feeds), tmp_path / "net.onnx")
    assert len(folded.nodes) < len(opened.graph.nodes)


def test_graphs_of_another_structure_find_no_place(tmp_path):
    proto, feeds, *_ = conv_net()
    path = tmp_path / "net.onnx"
    onnx.save(proto, path)
    opened = eqfact.onnx.open(path, feeds)
    other = eq.Graph.chain((3, 8, 9), conv=eq.Conv(floats(2, 3, 1, 1)))
    refused(lambda: opened.save(tmp_path / "out.onnx", other), "node 'conv'", "another structure")
    assert not (tmp_path / "out.onnx").exists()


def test_factors_of_channels_that_share_an_axis_with_the_batch_go_into_the_file(tmp_path):
    """A scaling of such a tensor has no place for a number a channel: the part that is understood is written anew."""
    nodes = [node("Conv", ["x", "w1"], ["c"]), node("Reshape", ["c", "rows"], ["t"]), node("Mul", ["t", "two"], ["m"]),
             node("Add", ["m", "half"], ["a"]), node("Reshape", ["a", "back"], ["u"]), node("Relu", ["u"], ["r"]),
             node("Conv", ["r", "w2"], ["y"])]
    constants = {"w1": floats(4, 3, 1, 1), "rows": ints(-1, 6), "two": np.float32(2), "half": np.float32(0.5), "back": ints(-1, 4, 2, 3),
                 "w2": floats(2, 4, 1, 1)}
    path, feeds = tmp_path / "net.onnx", {"x": floats(3, 3, 2, 3, seed=1)}
    onnx.save(model(nodes, {"x": (FLOAT, ["N", 3, 2, 3])}, {"y": (FLOAT, ["N", 2, 2, 3])}, constants), path)
    opened = eqfact.onnx.open(path, feeds)
    for graph, save in ((opened.graph, opened.save), (eqfact.onnx.load(path), eqfact.onnx.save)):
        changed = rescaled(graph)
        assert any(len(set(n.op.gamma.tolist())) > 1 for n in changed.nodes if isinstance(n.op, eq.BatchNorm))
        save(tmp_path / "out.onnx", changed)
        assert np.array_equal(small.run_ort(tmp_path / "out.onnx", feeds)["y"], small.run_ort(path, feeds)["y"])


def test_what_needs_a_newer_opset_than_kept_nodes_have_is_refused(tmp_path):
    nodes = [*layer("x", "h", "w1"), node("Cos", ["h"], ["c"]), *layer("c", "y", "w2")]
    weights = {"w1": floats(6, 9), "w2": floats(9, 7)}
    onnx.save(model(nodes, {"x": (FLOAT, ["N", 6])}, {"y": (FLOAT, ["N", 7])}, weights, 13), tmp_path / "net.onnx")
    feeds = {"x": floats(3, 6, seed=1)}
    opened = eqfact.onnx.open(tmp_path / "net.onnx", feeds)
    wide = eq.quantize(opened.graph, stats=eq.calibrate(opened.graph, opened.boundary(feeds)), weights=eq.UniformQuantizer(16))
    refused(lambda: opened.save_qdq(tmp_path / "out.onnx", wide), "needs opset 21", "have 13", "onnx.version_converter")
    assert not (tmp_path / "out.onnx").exists()


def test_an_error_in_a_small_channel_is_seen_beside_large_ones(tmp_path):
    weight = floats(3, 5) * np.float32([[1e6], [1], [1e3]])
    eqfact.onnx.save(tmp_path / "net.onnx", eq.Graph.chain((5,), fc=eq.Dense(weight)))
    wrong = eq.Graph.chain((5,), fc=eq.Dense(weight * np.float32([[1], [1.1], [1]])))
    feeds = {"x": floats(4, 5, seed=1)}
    assert eqfact.onnx.check(tmp_path / "net.onnx", eqfact.onnx.load(tmp_path / "net.onnx"), feeds)
    assert not eqfact.onnx.check(tmp_path / "net.onnx", wrong, feeds)


@pytest.mark.parametrize("read", [eqfact.onnx.load, lambda path: eqfact.onnx.open(path).graph], ids=["load", "open"])
def test_a_graph_is_checked_in_its_own_order_of_axes(read, tmp_path):
    """Tokens by features, as many of either, so that no shape tells them apart; what is loaded has its outputs as the file has them."""
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Relu", ["a"], ["b"]), node("MatMul", ["b", "v"], ["y"])]
    onnx.save(model(nodes, {"x": (FLOAT, ["N", 3, 3])}, {"y": (FLOAT, ["N", 3, 3])}, {"w": floats(3, 3), "v": floats(3, 3)}),
              tmp_path / "net.onnx")
    graph, feeds = read(tmp_path / "net.onnx"), {"x": floats(4, 3, 3)}
    assert eqfact.onnx.check(tmp_path / "net.onnx", graph, feeds)
    moved = eq.equalize(graph, "cross_layer").graph
    eqfact.onnx.save(tmp_path / "out.onnx", moved)
    assert eqfact.onnx.check(tmp_path / "out.onnx", moved, feeds) and not eqfact.onnx.check(tmp_path / "net.onnx", moved, feeds)


def test_a_mean_that_cancels_the_shift_of_a_dead_channel_is_no_misreading(tmp_path):
    """Of 1 - 1.0001 any runtime may make what it likes from the eighth digit on."""
    gamma, mean, var = floats(64), floats(64), np.abs(floats(64)) + np.float32(0.1)
    constants = {"w": floats(64, 3, 1, 1), "b": np.full(64, -100, np.float32), "gamma": gamma, "mean": mean, "var": var,
                 "beta": (mean * gamma / np.sqrt(var + 1e-5) * (1 + 1e-6 * floats(64))).astype(np.float32)}
    nodes = [node("Conv", ["x", "w", "b"], ["a"]), node("Relu", ["a"], ["r"]),
             node("BatchNormalization", ["r", "gamma", "beta", "mean", "var"], ["y"])]
    onnx.save(model(nodes, {"x": (FLOAT, ["N", 3, 2, 2])}, {"y": (FLOAT, None)}, constants), tmp_path / "net.onnx")
    feeds = {"x": floats(2, 3, 2, 2)}
    assert not eqfact.onnx.running.run(tmp_path / "net.onnx", feeds, ["r"])["r"].any()
    assert eqfact.onnx.check(tmp_path / "net.onnx", eqfact.onnx.load(tmp_path / "net.onnx"), feeds)


def test_every_output_of_a_split_is_written_in_its_order_of_axes(tmp_path):
    nodes = [node("MatMul", ["x", "w"], ["c"]), node("Split", ["c", "s"], ["a", "b"], axis=-1), node("Relu", ["a"], ["y"])]
    onnx.save(model(nodes, {"x": (FLOAT, ["N", 5, 3])}, {"y": (FLOAT, None), "b": (FLOAT, None), "a": (FLOAT, None)},
                    {"w": floats(3, 6), "s": ints(2, 4)}), tmp_path / "net.onnx")
    feeds = {"x": floats(4, 5, 3)}
    opened = eqfact.onnx.open(tmp_path / "net.onnx", feeds)
    opened.save_qdq(tmp_path / "q.onnx", eq.quantize(opened.graph, stats=eq.calibrate(opened.graph, feeds), **EIGHT))
    truth, made = (small.run_ort(tmp_path / name, feeds) for name in ("net.onnx", "q.onnx"))
    assert {name: value.shape for name, value in made.items()} == {"y": (4, 5, 2), "b": (4, 5, 4), "a": (4, 5, 2)}
    assert eq.sqnr(truth, made) > 30


def test_a_split_of_which_a_part_is_kept_makes_that_part_still(tmp_path):
    """What is made of the other part has no layer, and stays in the file."""
    nodes = [node("Split", ["x", "s"], ["a", "b"], axis=-1), node("Relu", ["b"], ["r"]), node("MatMul", ["r", "v"], ["y"]),
             node("Tanh", ["a"], ["t"]), node("Cos", ["t"], ["z"])]
    onnx.save(model(nodes, {"x": (FLOAT, ["N", 6])}, {"y": (FLOAT, None), "z": (FLOAT, None)}, {"v": floats(4, 3), "s": ints(2, 4)}),
              tmp_path / "net.onnx")
    feeds = {"x": floats(4, 6)}
    opened = eqfact.onnx.open(tmp_path / "net.onnx", feeds)
    assert [k.op_type for k in opened.kept] == ["Tanh", "Cos"]
    opened.save_qdq(tmp_path / "q.onnx", eq.quantize(opened.graph, stats=eq.calibrate(opened.graph, opened.boundary(feeds)), **EIGHT))
    truth, made = (small.run_ort(tmp_path / name, feeds) for name in ("net.onnx", "q.onnx"))
    assert np.array_equal(made["z"], truth["z"]) and eq.sqnr(truth["y"], made["y"]) > 30


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_quantized_files_take_and_make_the_type_of_the_file_read(dtype, tmp_path):
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [node("Gemm", ["x", "w"], ["h"]), node("Relu", ["h"], ["r"]), node("Gemm", ["r", "v"], ["y"])]
    weights = {"w": floats(6, 5).astype(dtype), "v": floats(5, 3).astype(dtype)}
    onnx.save(model(nodes, {"x": (kind, ["N", 6])}, {"y": (kind, ["N", 3])}, weights), tmp_path / "net.onnx")
    feeds = {"x": floats(4, 6).astype(dtype)}
    opened = eqfact.onnx.open(tmp_path / "net.onnx", feeds)
    opened.save_qdq(tmp_path / "q.onnx", eq.quantize(opened.graph, stats=eq.calibrate(opened.graph, opened.boundary(feeds)), **EIGHT))
    truth, made = (small.run_ort(tmp_path / name, feeds)["y"] for name in ("net.onnx", "q.onnx"))
    assert made.dtype == dtype and eq.sqnr(truth, made) > 30
