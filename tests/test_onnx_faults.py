"""Faults that files have shown, each as its kind: a table of variants, checked by onnxruntime or onnx's own evaluator."""

import tracemalloc

import numpy as np
import onnx
import onnx_models as small
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import eqfact as eq
import eqfact.onnx
from eqfact.onnx import OnnxError, folding

node = helper.make_node
floats = small.normals(11)
ints = small.ints


def read(tmp_path, nodes, x, constants=(), opset=17, outputs=("y",), batch="N", elem_type=TensorProto.FLOAT):
    """The graph of some nodes, and its outputs beside those of onnx's evaluator and of onnxruntime."""
    proto = small.model(nodes, {"x": [batch, *x]}, outputs, dict(constants), opset, elem_type)
    path = tmp_path / "net.onnx"
    onnx.save(proto, path)
    graph = eqfact.onnx.load(path)
    dtype = helper.tensor_dtype_to_np_dtype(elem_type)
    feeds = small.feeds_of(graph, 1 if batch == 1 else 3, dtype=dtype)
    small.close(small.run_eq(graph, feeds), small.run_ort(path, feeds), 2e-2 if dtype == np.float16 else 2e-5)
    return graph


# ------------------------------------------------------------------------------------------------ equal uses become one op, others never


W, V, ZERO, ONE = floats(8, 8), floats(8, 8), np.zeros(8, np.float32), np.float32(1)


SHARED = {
    "one bias behind two products": ([node("MatMul", ["x", "w"], ["a"]), node("Add", ["a", "b"], ["d"]), node("Relu", ["d"], ["r"]),
                                      node("MatMul", ["r", "v"], ["c"]), node("Add", ["c", "b"], ["y"])], {"w": W, "v": V, "b": ZERO}),
    "one scalar on both sides of a difference": ([node("MatMul", ["x", "w"], ["a"]), node("Sub", ["o", "a"], ["u"]),
                                                  node("MatMul", ["u", "v"], ["c"]), node("Sub", ["c", "o"], ["y"])],
                                                 {"w": W, "v": V, "o": ONE}),
    "one scalar at two widths": ([node("Mul", ["x", "s"], ["a"]), node("MatMul", ["a", "w"], ["b"]), node("Mul", ["b", "s"], ["y"])],
                                 {"w": W[:, :3], "s": np.float32(3)}),
    "one vector as slope and as shift": ([node("Mul", ["x", "b"], ["a"]), node("Relu", ["a"], ["r"]), node("Add", ["r", "b"], ["y"])],
                                         {"b": W[0]}),
    "one matrix both ways": ([node("Gemm", ["x", "w"], ["a"]), node("Relu", ["a"], ["r"]), node("Gemm", ["r", "w"], ["y"], transB=1)],
                             {"w": W}),
    "one matrix times two numbers": ([node("Gemm", ["x", "w"], ["a"]), node("Gemm", ["a", "w"], ["y"], alpha=0.5)], {"w": W}),
    "one scalar added and divided by": ([node("Div", ["x", "s"], ["a"]), node("Add", ["a", "s"], ["y"])], {"s": np.float32(3)}),
}


@pytest.mark.parametrize("nodes, constants", SHARED.values(), ids=SHARED)
def test_shared_constants_do_not_make_different_layers_one(nodes, constants, tmp_path):
    graph = read(tmp_path, nodes, (8,), constants)
    ops = [n.op for n in graph.nodes if isinstance(n.op, eq.Weighted)]
    assert len({id(op) for op in ops}) == len(ops) > 1


def test_equal_uses_of_equal_constants_are_one_op(tmp_path):
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Add", ["a", "b"], ["d"]), node("Relu", ["d"], ["r"]),
             node("MatMul", ["r", "w"], ["c"]), node("Add", ["c", "b"], ["y"])]
    graph = read(tmp_path, nodes, (8,), {"w": W, "b": W[0]})
    assert graph["d"].op is graph["y"].op


# ------------------------------------------------------------------------------------------------ what a node says in its own opset


@pytest.mark.parametrize("opset, outputs", [(9, 5), (13, 5), (14, 3), (15, 3)])
def test_batch_normalization_that_puts_out_statistics_trains(opset, outputs, tmp_path):
    """Before opset 14 more outputs than one say so, afterwards an attribute does."""
    names = ["y", "mean", "var", "saved_mean", "saved_var"][:outputs]
    norm = node("BatchNormalization", ["x", *"gbmv"], names, **({"training_mode": 1} if opset >= 14 else {}))
    constants = {name: np.abs(floats(4)) for name in "gbmv"}
    onnx.save(small.model([norm], {"x": ["N", 4, 3]}, ["y"], constants, opset), tmp_path / "net.onnx")
    with pytest.raises(OnnxError, match="training mode"):
        eqfact.onnx.load(tmp_path / "net.onnx")


OLD = {
    "Unsqueeze": ([node("Unsqueeze", ["c"], ["d"], axes=[1, 2])], {"c": floats(4)}, 11),
    "Squeeze": ([node("Squeeze", ["c"], ["d"], axes=[0])], {"c": floats(1, 4, 1, 1)}, 11),
    "Clip": ([node("Clip", ["c"], ["d"], min=-0.1, max=0.2)], {"c": floats(4, 1, 1)}, 10),
    "TopK": ([node("TopK", ["c"], ["t", "i"], k=4), node("Unsqueeze", ["t"], ["u"], axes=[1, 2]), node("Mul", ["u", "one"], ["d"])],
             {"c": floats(9), "one": np.float32(1)}, 9),
    "Softmax": ([node("Softmax", ["c"], ["d"], axis=1)], {"c": floats(4, 3, 2)}, 11),
    "Softmax from the second axis on": ([node("Softmax", ["c"], ["d"])], {"c": floats(4, 3, 2)}, 11),
    "ReduceSum": ([node("ReduceSum", ["c"], ["d"], axes=[1], keepdims=1)], {"c": floats(4, 3, 1)}, 11),
    "Pad": ([node("Pad", ["c"], ["d"], pads=[1, 0, 0, 2, 0, 0])], {"c": floats(1, 1, 1)}, 10),
    "Slice": ([node("Slice", ["c"], ["d"], starts=[1], ends=[5], axes=[0])], {"c": floats(6, 1, 1)}, 9),
}


@pytest.mark.parametrize("nodes, constants, opset", OLD.values(), ids=OLD)
def test_constants_are_computed_in_the_opset_of_the_file(nodes, constants, opset, tmp_path):
    read(tmp_path, [*nodes, node("Add", ["x", "d"], ["y"])], (4, 3, 2), constants, opset)


@pytest.mark.parametrize("condition", [True, False])
def test_an_if_whose_condition_is_known_is_its_branch(condition, tmp_path):
    """Also where the branch reads values of the network around it."""
    branches = {}
    for name, kind in (("then_branch", "Relu"), ("else_branch", "Sigmoid")):
        weight = numpy_helper.from_array(floats(4, 5), f"{name}.w")
        branches[name] = helper.make_graph([node("MatMul", ["a", f"{name}.w"], [f"{name}.m"]), node(kind, [f"{name}.m"], [f"{name}.y"])],
                                           name, [], [helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None)], [weight])
    nodes = [node("Relu", ["x"], ["a"]), node("Shape", ["x"], ["s"]), node("Size", ["s"], ["rank"]), node("Equal", ["rank", "two"], ["is"]),
             node("Not", ["is"], ["is_not"]), node("If", ["is" if condition else "is_not"], ["y"], **branches)]
    graph = read(tmp_path, nodes, (4,), {"two": np.int64(2)})
    assert type(graph["then_branch.y" if condition else "else_branch.y"].op) is (eq.ReLU if condition else eq.Sigmoid)
    assert not any("else" in n.name if condition else "then" in n.name for n in graph.nodes)


# ------------------------------------------------------------------------------------------------ where the batch stands


def test_a_batch_of_one_that_is_baked_into_a_node(tmp_path):
    nodes = [node("Conv", ["x", "w"], ["a"]), node("Reshape", ["a", "s"], ["f"]), node("Gemm", ["f", "v"], ["y"])]
    proto = small.model(nodes, {"x": ["N", 2, 4, 4]}, ["y"], {"w": floats(3, 2, 1, 1), "s": ints(1, 48), "v": floats(48, 5)})
    onnx.save(proto, tmp_path / "net.onnx")
    graph, x = eqfact.onnx.load(tmp_path / "net.onnx"), floats(3, 2, 4, 4)
    for i in range(3):
        small.close({"y": eq.forward(graph, x)[i:i + 1]}, small.run_ort(tmp_path / "net.onnx", {"x": x[i:i + 1]}))


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_that_are_written_as_none_are_open(size, tmp_path):
    proto = small.model([node("Conv", ["x", "w"], ["y"])], {"x": ["N", 2, "H", 5]}, ["y"], {"w": floats(3, 2, 3, 3)})
    for axis in (0, 2):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = size
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    graph, x = eqfact.onnx.load(tmp_path / "net.onnx", input_shapes={"x": (2, 7, 5)}), floats(3, 2, 7, 5)
    assert graph.inputs["x"] == (2, 7, 5) and eq.forward(graph, x).shape == (3, 3, 5, 3)
    with pytest.raises(OnnxError, match=r"\(\?, 2, \?, 5\)"):
        eqfact.onnx.load(tmp_path / "net.onnx")


def test_an_equation_that_leaves_its_result_to_the_alphabet(tmp_path):
    graph = read(tmp_path, [node("Einsum", ["x", "w"], ["y"], equation="atc,cd")], (5, 4), {"w": floats(4, 3)})
    assert graph.shapes["y"] == (3, 5)


def test_a_factor_of_a_bias_that_is_not_there(tmp_path):
    read(tmp_path, [node("Gemm", ["x", "w"], ["y"], beta=0.5, alpha=2.0)], (4,), {"w": floats(4, 3)})


def test_files_that_do_not_say_their_outputs_shapes_are_written_again(tmp_path):
    proto = small.model([node("Gemm", ["x", "w"], ["y"])], {"x": ["N", 4]}, ["y"], {"w": floats(4, 3)})
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(proto, tmp_path / "net.onnx")
    eqfact.onnx.save(tmp_path / "again.onnx", eqfact.onnx.load(tmp_path / "net.onnx"))
    feeds = {"x": floats(2, 4)}
    assert np.array_equal(small.run_ort(tmp_path / "again.onnx", feeds)["y"], small.run_ort(tmp_path / "net.onnx", feeds)["y"])


@pytest.mark.parametrize("outputs", [("y", "z", "r"), ("r", "z", "y"), ("z", "y"), ("y", "z")], ids=" ".join)
def test_outputs_that_are_one_value_in_several_layouts(outputs, tmp_path):
    nodes = [node("MatMul", ["x", "w"], ["y"]), node("Transpose", ["y"], ["z"], perm=[0, 2, 1]), node("Relu", ["z"], ["r"])]
    read(tmp_path, nodes, (5, 6), {"w": floats(6, 4)}, outputs=outputs)


BEHIND = {"scalar Add": (node("Add", ["t", "c"], ["u"]), np.float32(2)), "channels": (node("Mul", ["t", "c"], ["u"]), floats(6)),
          "Relu": (node("Relu", ["t"], ["u"]), None), "MatMul": (node("MatMul", ["t", "c"], ["u"]), floats(6, 4)),
          "Softmax": (node("Softmax", ["t"], ["u"], axis=-1), None), "PRelu": (node("PRelu", ["t", "c"], ["u"]), floats(6)),
          "Slice": (node("Slice", ["t", "c", "d", "e"], ["u"]), None), "Clip": (node("Clip", ["t", "c"], ["u"]), np.float32(-0.1))}


@pytest.mark.parametrize("inner, constant", BEHIND.values(), ids=BEHIND)
def test_layers_where_the_batch_is_the_second_axis(inner, constant, tmp_path):
    constants = {"c": ints(1), "d": ints(3), "e": ints(0)} if inner.op_type == "Slice" else {} if constant is None else {"c": constant}
    turns = [node("Transpose", [a], [b], perm=[1, 0, 2]) for a, b in ("xt", "uy")]
    read(tmp_path, [turns[0], inner, turns[1]], (5, 6), constants)


@pytest.mark.parametrize("between", ["Identity", "Dropout"])
@pytest.mark.parametrize("behind", [True, False])
def test_batch_normalization_folds_through_what_changes_nothing(between, behind, tmp_path):
    norm, layer = node("BatchNormalization", ["i" if behind else "x", *"gbmv"], ["n"]), node("Conv", ["x" if behind else "i", "w"], ["c"])
    identity = node(between, ["c" if behind else "n"], ["i"])
    nodes = [*([layer, identity, norm] if behind else [norm, identity, layer]), node("Relu", ["n" if behind else "c"], ["y"])]
    graph = read(tmp_path, nodes, (4, 3, 3), {"w": floats(4, 4, 1, 1), **{name: np.abs(floats(4)) for name in "gbmv"}})
    folded = eq.fold_batchnorm(graph)
    assert [type(n.op) for n in folded.nodes] == [eq.Conv, eq.ReLU]
    x = floats(3, 4, 3, 3)
    assert eq.verify(graph, folded, x)
    eqfact.onnx.save(tmp_path / "folded.onnx", folded)
    small.close(small.run_ort(tmp_path / "folded.onnx", {"x": x}), small.run_ort(tmp_path / "net.onnx", {"x": x}))


# ------------------------------------------------------------------------------------------------ types


def test_halves_with_single_parameters_and_eps(tmp_path):
    """Legal from opset 15; and an eps that no half holds is added in another precision."""
    norm = node("BatchNormalization", ["c", *"gbmv"], ["y"], epsilon=1e-6)
    var = np.full(4, 1e-6, np.float32)
    constants = {"w": np.eye(4, dtype=np.float16).reshape(4, 4, 1), "g": 1e-3 * np.abs(floats(4)).astype(np.float16),
                 "b": floats(4).astype(np.float16), "m": 1e-3 * floats(4), "v": var}
    graph = read(tmp_path, [node("Conv", ["x", "w"], ["c"]), norm], (4, 3), {**constants, "m": np.zeros(4, np.float32)},
                 elem_type=TensorProto.FLOAT16)
    assert graph.dtype == np.float16
    np.testing.assert_allclose(graph["y"].op.weight[:, 0], constants["g"].astype(float) / np.sqrt(2e-6), rtol=5e-2)


def test_parameters_that_do_not_fit_into_halves_are_refused(tmp_path):
    half = np.ones(4, np.float16)
    proto = small.model([node("BatchNormalization", ["x", *"gbmv"], ["y"])], {"x": ["N", 4, 3]}, ["y"],
                        {"g": half, "b": half, "m": np.full(4, 1e6, np.float32), "v": half.astype(np.float32)},
                        elem_type=TensorProto.FLOAT16)
    onnx.save(proto, tmp_path / "net.onnx")
    with pytest.raises(OnnxError, match="initializer 'm' does not fit into float16"):
        eqfact.onnx.load(tmp_path / "net.onnx")


def test_eps_that_halves_do_not_hold():
    one = np.ones(1, np.float16)
    assert float(eq.BatchNorm(one, one, one, 0 * one, eps=1e-5).weight[0, 0]) == np.float16(1 / np.sqrt(1e-5))


# ------------------------------------------------------------------------------------------------ what is not valid, and what is too large


INVALID = {
    "Split of -1": ([node("Split", ["x", "s"], ["y", "z"], axis=1)], {"s": ints(5, -1)}, "splits 4 entries"),
    "Split of 0": ([node("Split", ["x", "s"], ["y", "z"], axis=1)], {"s": ints(4, 0)}, "splits 4 entries"),
    "Gather below -n": ([node("Gather", ["x", "i"], ["y"], axis=1)], {"i": ints(-5)}, "takes entries -5"),
    "Gather beyond n": ([node("Gather", ["x", "i"], ["y"], axis=1)], {"i": ints(0, 4)}, "to 4 of 4"),
    "Pad of an axis twice": ([node("Pad", ["x", "p", "", "a"], ["y"])], {"p": ints(1, 1, 0, 0), "a": ints(2, -1)}, "each axis once"),
    "Unsqueeze of an axis twice": ([node("Unsqueeze", ["x", "a"], ["y"])], {"a": ints(1, 1)}, "adds axes [1, 1]"),
    "Slice by steps of 0": ([node("Slice", ["x", "a", "a", "a", "b"], ["y"])], {"a": ints(1), "b": ints(0)}, "steps by 0"),
    "Flatten beyond the axes": ([node("Flatten", ["x"], ["y"], axis=9)], {}, "flattens from axis 9"),
    "Reshape by a 0 that copies nothing": ([node("Reshape", ["x", "s"], ["y"])], {"s": ints(0, 4, 6, 0)}, "copies sizes"),
}


@pytest.mark.parametrize("nodes, constants, words", INVALID.values(), ids=INVALID)
def test_invalid_nodes_are_refused(nodes, constants, words, tmp_path):
    proto = small.model(nodes, {"x": ["N", 4, 6]}, [nodes[0].output[0]], constants, opset=18 if "Pad" in nodes[0].op_type else 17)
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(OnnxError, match=words.replace("[", r"\[").replace("]", r"\]")):
        eqfact.onnx.load(tmp_path / "net.onnx")


LARGE = {
    "DepthToSpace": ([node("DepthToSpace", ["x"], ["d"], blocksize=2), node("Conv", ["d", "w"], ["y"])], (64, 160, 160),
                     {"w": floats(2, 16, 1, 1)}, "Rearrange"),
    "SpaceToDepth": ([node("SpaceToDepth", ["x"], ["d"], blocksize=2), node("Conv", ["d", "w"], ["y"])], (16, 320, 320),
                     {"w": floats(2, 64, 1, 1)}, "Rearrange"),
    "strided Slices": ([node("Slice", ["x", "a", "b", "c", "d"], ["y"])], (3, 640, 640),
                       {"a": ints(0, 1), "b": ints(640, 640), "c": ints(2, 3), "d": ints(2, 2)}, "Take"),
    "Transpose of ten axes": ([node("Transpose", ["x"], ["y"], perm=[0, *range(9, 0, -1)])], (4,) * 9, {}, "Transpose"),
    "Flatten": ([node("Reshape", ["x", "s"], ["y"])], (3, 640, 640), {"s": ints(0, 3, -1)}, "Rearrange"),
}


@pytest.mark.parametrize("nodes, x, constants, op", LARGE.values(), ids=LARGE)
def test_moves_cost_by_the_node_not_by_the_pixel(nodes, x, constants, op, tmp_path):
    onnx.save(small.model(nodes, {"x": ["N", *x]}, ["y"], constants), tmp_path / "net.onnx")
    eqfact.onnx.load(tmp_path / "net.onnx")  # what is imported late
    tracemalloc.start()
    try:
        graph = eqfact.onnx.load(tmp_path / "net.onnx")
        eqfact.onnx.save(tmp_path / "again.onnx", graph)
        eq.degrees_of_freedom(graph)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert op in [type(n.op).__name__ for n in graph.nodes]
    assert peak < 2**21  # an index for every entry would be eight times the entries
    assert (tmp_path / "again.onnx").stat().st_size < 2 * (tmp_path / "net.onnx").stat().st_size + 2**16


def test_a_flatten_of_too_many_entries_is_refused(tmp_path):
    onnx.save(small.model([node("Flatten", ["x"], ["y"])], {"x": ["N", 2, 2**13, 2**13]}, ["y"]), tmp_path / "net.onnx")
    with pytest.raises(OnnxError, match="134217728 channels"):
        eqfact.onnx.load(tmp_path / "net.onnx")


def test_what_makes_no_one_knows_how_much_is_not_computed():
    with pytest.raises(ValueError, match="onnx does not tell how much it makes"):
        folding.computed(node("ImageDecoder", ["data"], ["y"]), {"": 20}, {"data": np.zeros(9, np.uint8)})


HUGE = {
    "ConstantOfShape": [node("ConstantOfShape", ["n"], ["c"])],
    "Tile": [node("Tile", ["one", "n"], ["c"])],
    "Expand": [node("Expand", ["one", "n"], ["c"])],
    "Range": [node("Range", ["zero", "many", "step"], ["c"])],
    "OneHot": [node("OneHot", ["zero", "many", "pair"], ["c"])],
    "Pad": [node("Pad", ["one", "n"], ["c"])],
}


@pytest.mark.parametrize("nodes", HUGE.values(), ids=HUGE)
def test_constants_are_not_computed_beyond_a_limit(nodes, tmp_path):
    constants = {"n": ints(2**30, 2**30), "one": np.ones((1, 1) if nodes[0].op_type != "Pad" else 1, np.float32), "zero": np.int64(0),
                 "many": np.int64(2**40), "step": np.int64(1), "pair": np.float32([0, 1])}
    proto = small.model([*nodes, node("Cast", ["c"], ["f"], to=1), node("Mul", ["x", "f"], ["y"])], {"x": ["N", 4]}, ["y"], constants)
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    tracemalloc.start()
    try:
        with pytest.raises(OnnxError, match="while a file is read"):
            eqfact.onnx.load(tmp_path / "net.onnx")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_loops_on_constants_are_not_run_while_a_file_is_read(tmp_path):
    body = helper.make_graph([node("Identity", ["go"], ["on"]), node("Add", ["a", "a"], ["s"])], "body", [
        helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        helper.make_tensor_value_info("a", TensorProto.FLOAT, [1])], [
        helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("s", TensorProto.FLOAT, [1])])
    nodes = [node("Loop", ["turns", "", "start"], ["c"], body=body), node("Mul", ["x", "c"], ["y"])]
    constants = {"turns": np.int64(10**9), "start": np.ones(1, np.float32)}
    onnx.save(small.model(nodes, {"x": ["N", 4]}, ["y"], constants), tmp_path / "net.onnx")
    with pytest.raises(OnnxError, match=r"\(Loop\): it runs a graph of its own"):
        eqfact.onnx.load(tmp_path / "net.onnx")


@pytest.mark.parametrize("location", ["a\0b", "x" * 5000, "/", "."])
def test_external_data_at_impossible_places(location, tmp_path):
    proto = small.model([node("Gemm", ["x", "w"], ["y"])], {"x": ["N", 3]}, ["y"], {"w": floats(3, 4)})
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (tmp_path / "net.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(OnnxError) as caught:
        eqfact.onnx.load(tmp_path / "net.onnx")
    assert str(caught.value).startswith(f"{tmp_path / 'net.onnx'}: ")


def test_reference_evaluator_agrees(tmp_path):
    """The evaluator is a witness of its own: a network of moves and constants in an old opset."""
    nodes = [node("Unsqueeze", ["c"], ["d"], axes=[1]), node("Mul", ["x", "d"], ["m"]), node("Transpose", ["m"], ["y"], perm=[0, 2, 1])]
    proto = small.model(nodes, {"x": ["N", 4, 3]}, ["y"], {"c": floats(4)}, opset=11)
    onnx.save(proto, tmp_path / "net.onnx")
    graph = eqfact.onnx.load(tmp_path / "net.onnx")
    feeds = small.feeds_of(graph)
    small.close(small.run_eq(graph, feeds), {"y": ReferenceEvaluator(proto).run(None, feeds)[0]})
