"""What goes out to ONNX and comes back: outputs, names and sharing survive, in onnxruntime and in eqfact."""

import subprocess
import sys

import numpy as np
import onnx
import onnx_models as small
import pytest
from cases import CASES, WEIGHTED
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import eqfact as eq
import eqfact.onnx
from eqfact.onnx import OnnxError

NETS = {"mobilenet": small.mini_mobilenet, "inception": small.mini_inception, "resnet": small.mini_resnet}
CASES32 = [case for case in CASES if case.dtype == np.float32]


def graph_of(case):
    inputs = {f"x{i}": shape for i, shape in enumerate(case.shapes)}
    return eq.Graph(inputs, [eq.Node("y", case.op, list(inputs))], ["y"])


@pytest.fixture(params=NETS, ids=str)
def net(request, tmp_path):
    """A file, and the network that is read from it."""
    path = tmp_path / f"{request.param}.onnx"
    onnx.save(NETS[request.param](), path)
    return path, eqfact.onnx.load(path)


def rescaled(graph, seed=1):
    """An equivalent network, all free factors drawn at random."""
    resolved = eq.channels(graph)
    factors = np.exp2(np.random.default_rng(seed).integers(-3, 4, resolved.degrees_of_freedom + 1).astype(float))
    factors[0] = 1
    return eq.Factorization(resolved, factors).apply(graph)


# ------------------------------------------------------------------------------------------------ every op


@pytest.mark.parametrize("case", CASES32, ids=str)
def test_every_op_computes_the_same_in_onnxruntime_and_after_reading_it_again(case, tmp_path):
    graph, path = graph_of(case), tmp_path / "op.onnx"
    eqfact.onnx.save(path, graph)
    onnx.checker.check_model(str(path), full_check=True)
    assert [n.name for n in onnx.load(path).graph.node if "y" in n.output] == ["y"]
    feeds = {f"x{i}": x for i, x in enumerate(case.inputs())}
    expected = small.run_eq(graph, feeds)
    small.close(small.run_ort(path, feeds), expected, 1e-5)
    again = eqfact.onnx.load(path)
    small.close(small.run_eq(again, feeds), expected, 1e-6)
    assert dict(again.shapes).items() >= graph.shapes.items()


@pytest.mark.parametrize("slope, shift, kinds", [(2, 3, ["BatchNormalization"]), (2, 0, ["Mul"]), (1, 3, ["Add"]), (1, 0, ["Add"]),
                                                 (2, np.float32([[3], [0], [3]]), ["BatchNormalization"])], ids=str)
@pytest.mark.parametrize("opset", [7, 12, 13, 17])
def test_a_batchnorm_that_only_scales_or_shifts_is_one_node(opset, slope, shift, kinds, tmp_path):
    """In a file of opset 13 at least, whatever the network was read from."""
    relu = small.model([helper.make_node("Relu", ["x"], ["r"])], {"x": ["N", 3, 4]}, ["r"], {}, opset)
    onnx.save(relu, tmp_path / "read.onnx")
    read = eqfact.onnx.load(tmp_path / "read.onnx")
    full, zeros, ones = (np.full(3, v, np.float32) for v in (slope, 0, 1))
    norm = eq.BatchNorm(full, zeros + np.float32(shift).ravel(), zeros, ones, eps=0.0)
    graph = eq.Graph(read.inputs, [*read.nodes, eq.Node("y", norm, ["r"])], ["y"])
    eqfact.onnx.save(tmp_path / "op.onnx", graph)
    model = onnx.load(tmp_path / "op.onnx")
    assert [n.op_type for n in model.graph.node] == ["Relu", *kinds]
    assert next(o.version for o in model.opset_import if not o.domain) == max(opset, 13)
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    assert np.array_equal(small.run_ort(tmp_path / "op.onnx", {"x": x})["y"], slope * np.maximum(x, 0) + shift)


@pytest.mark.parametrize("case", [c for c in WEIGHTED if c.dtype == np.float64][::3], ids=str)
def test_float64_networks_stay_in_float64(case, tmp_path):
    graph, path = graph_of(case), tmp_path / "op.onnx"
    eqfact.onnx.save(path, graph)
    feeds = {f"x{i}": x for i, x in enumerate(case.inputs())}
    by_onnx = ReferenceEvaluator(str(path)).run(None, feeds)
    small.close(dict(zip(graph.outputs, by_onnx, strict=True)), small.run_eq(graph, feeds), 1e-13)
    assert eqfact.onnx.load(path).dtype == np.float64


def test_a_channel_clip_becomes_max_and_min_and_one_clip_again(tmp_path):
    clip = eq.Clip(np.float32([-1, -2, 0]), np.float32([6, 3, 1]))
    graph = eq.Graph({"x": (3, 2, 2)}, [eq.Node("act", clip, ["x"])], ["act"])
    eqfact.onnx.save(tmp_path / "clip.onnx", graph)
    model = onnx.load(tmp_path / "clip.onnx")
    assert [node.op_type for node in model.graph.node] == ["Max", "Min"]
    assert [tuple(tensor.dims) for tensor in model.graph.initializer] == [(3, 1, 1), (3, 1, 1)]
    (node,) = eqfact.onnx.load(tmp_path / "clip.onnx").nodes
    assert isinstance(node.op, eq.Clip) and np.array_equal(node.op.low, clip.low) and np.array_equal(node.op.high, clip.high)


def test_a_clip_that_is_open_for_some_channels_is_closed_for_the_others(tmp_path):
    clip = eq.Clip(np.float32([-1, -np.inf, 0]), np.float32([np.inf, 3, 1]))
    eqfact.onnx.save(tmp_path / "clip.onnx", eq.Graph({"x": (3,)}, [eq.Node("act", clip, ["x"])], ["act"]))
    x = np.float32([[-9, -9, -9], [9, 9, 9]])
    assert small.run_ort(tmp_path / "clip.onnx", {"x": x})["act"].tolist() == [[-1, -9, 0], [9, 3, 1]]


@pytest.mark.parametrize("slope, shift, kinds", [(2, 3, ["Mul", "Add"]), (2, 0, ["Mul"]), (1, 3, ["Add"]), (1, 0, ["Add"]), (0, 0, ["Mul"]),
                                                 (0, 3, ["Mul", "Add"])])
def test_an_affine_multiplies_and_adds_what_it_must(slope, shift, kinds, tmp_path):
    full = np.ones((1, 4), np.float32)
    eqfact.onnx.save(tmp_path / "op.onnx", eq.Graph({"x": (3, 4)}, [eq.Node("y", eq.Affine(slope * full, shift * full), ["x"])], ["y"]))
    assert [n.op_type for n in onnx.load(tmp_path / "op.onnx").graph.node] == kinds
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    assert np.array_equal(small.run_ort(tmp_path / "op.onnx", {"x": x})["y"], slope * x + shift)


# ------------------------------------------------------------------------------------------------ whole networks


def test_small_networks_agree_with_onnxruntime_before_and_after(net, tmp_path):
    small.imported(tmp_path, onnx.load(net[0]), batch=1 if "inception" in net[0].name else 2)


def test_every_name_survives_without_changes(net, tmp_path):
    path, graph = net
    eqfact.onnx.save(tmp_path / "again.onnx", graph)
    before, after = small.names(onnx.load(path)), small.names(onnx.load(tmp_path / "again.onnx"))
    folded = {"nodes": ("Shape", "Gather", "Unsqueeze", "Concat"), "values": ("shape", "gather", "unsqueeze", "concat"), "initializers": ()}
    for kind, names in before.items():
        # what only computed a shape is gone, all else is there
        lost = {name for name in names - after[kind] if not any(part in name for part in folded.get(kind, ()))}
        if kind == "initializers" and "mobilenet" in path.name:
            lost -= {"first", "axes", "rest"}
        assert not lost, kind
    # the pool of a ReduceMean without keepdims is flattened by a node of its own
    assert len(after["nodes"] - before["nodes"]) <= 1


def test_an_unchanged_network_is_written_as_the_same_bytes_twice(net, tmp_path):
    eqfact.onnx.save(tmp_path / "a.onnx", net[1])
    eqfact.onnx.save(tmp_path / "b.onnx", eqfact.onnx.load(tmp_path / "a.onnx"))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_rescaled_networks_compute_the_same_in_onnxruntime(net, tmp_path):
    path, graph = net
    feeds = small.feeds_of(graph, batch=1)
    changed = rescaled(graph)
    assert np.array_equal(eq.forward(graph, feeds), eq.forward(changed, feeds))
    eqfact.onnx.save(tmp_path / "rescaled.onnx", changed)
    small.close(small.run_ort(tmp_path / "rescaled.onnx", feeds), small.run_ort(path, feeds))
    assert small.names(onnx.load(path))["initializers"] & small.names(onnx.load(tmp_path / "rescaled.onnx"))["initializers"]


def test_folded_and_equalized_networks_keep_outputs(net, tmp_path):
    path, graph = net
    feeds = small.feeds_of(graph, batch=1)
    result = eq.equalize(eq.fold_batchnorm(graph), eq.CrossLayer(max_iter=10))
    eqfact.onnx.save(tmp_path / "equalized.onnx", result.graph)
    small.close(small.run_ort(tmp_path / "equalized.onnx", feeds), small.run_ort(path, feeds), 1e-4)


def test_the_file_keeps_its_header(tmp_path):
    model = small.mini_resnet()
    helper.set_model_props(model, {"labels": "cat,dog"})
    model.doc_string, model.graph.name, model.opset_import[0].version = "a network", "residual", 15
    onnx.save(model, tmp_path / "given.onnx")
    eqfact.onnx.save(tmp_path / "again.onnx", eqfact.onnx.load(tmp_path / "given.onnx"))
    again = onnx.load(tmp_path / "again.onnx")
    assert (again.doc_string, again.graph.name, again.opset_import[0].version, again.ir_version) == ("a network", "residual", 15, 8)
    assert again.metadata_props[0].value == "cat,dog" and again.producer_name == "tests"
    assert again.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize(("given", "batch", "version"), [("batch", "batch", 7), (None, "N", 9), (1, 1, 8)], ids=str)
def test_what_comes_behind_a_file_has_its_batch_and_its_version(given, batch, version, tmp_path):
    """Or 8, if it is older. And where the batch is one sample, a constant beside it needs not be repeated."""
    file = small.model([helper.make_node("Relu", ["x"], ["r"])], {"x": [given, 2]}, ["r"])
    file.ir_version = version
    onnx.save(file, tmp_path / "given.onnx")
    read = eqfact.onnx.load(tmp_path / "given.onnx")
    more = eq.Node("y", eq.Extend(np.float32([5])), ["r"])
    eqfact.onnx.save(tmp_path / "more.onnx", eq.Graph(read.inputs, [*read.nodes, more], ["y"]))
    model = onnx.load(tmp_path / "more.onnx")
    assert model.ir_version == max(version, 8)
    for info in (model.graph.input[0], model.graph.output[0]):
        first = info.type.tensor_type.shape.dim[0]
        assert (first.dim_value if first.HasField("dim_value") else first.dim_param) == batch
    assert model.graph.node[-1].op_type == "Concat" and (len(model.graph.node) == 2) == (given == 1)
    x = np.float32([[-1, 2]])
    assert small.run_ort(tmp_path / "more.onnx", {"x": x})["y"].tolist() == [[0, 2, 5]]


@pytest.mark.parametrize(("heads", "kv_heads", "scale", "behind"), [(2, 2, 1.0, []), (2, 1, 1.0, ["Reshape"]), (2, 2, 0.5, ["Mul"])])
def test_behind_a_product_of_heads_stands_what_it_needs(heads, kv_heads, scale, behind, tmp_path):
    graph = eq.Graph({"q": (4, 3), "k": (2 * kv_heads, 3)}, [eq.Node("y", eq.ops.Scores(heads, kv_heads, scale), ["q", "k"])], ["y"])
    eqfact.onnx.save(tmp_path / "op.onnx", graph)
    kinds = [n.op_type for n in onnx.load(tmp_path / "op.onnx").graph.node]
    assert kinds[kinds.index("MatMul") + 1:] == behind


def test_a_file_is_made_in_its_own_folder(tmp_path, monkeypatch):
    """From elsewhere it could not be put in its place in one step."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    eqfact.onnx.save(tmp_path / "net.onnx", eq.Graph.chain((3,), act=eq.ReLU()))
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_a_network_that_one_file_does_not_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("eqfact.onnx.exporting.LARGEST", 2**10)
    with pytest.raises(OnnxError, match=r"net.onnx: the network has 0.0 GiB; an ONNX file without external data holds 2 GiB"):
        eqfact.onnx.save(tmp_path / "net.onnx", eq.Graph.chain((30,), fc=eq.Dense(np.ones((30, 30)))))
    assert not any(tmp_path.iterdir())


def test_a_fixed_batch_stays_fixed(tmp_path):
    onnx.save(small.mini_inception(), tmp_path / "given.onnx")
    eqfact.onnx.save(tmp_path / "again.onnx", eqfact.onnx.load(tmp_path / "given.onnx"))
    again = onnx.load(tmp_path / "again.onnx")
    assert again.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    eqfact.onnx.save(tmp_path / "anew.onnx", eq.Graph.chain((3,), act=eq.ReLU()))
    assert onnx.load(tmp_path / "anew.onnx").graph.output[0].type.tensor_type.shape.dim[0].dim_param == "N"


@pytest.mark.parametrize("opset", [13, 15, 17, 18, 21, onnx.defs.onnx_opset_version()])
def test_every_opset_from_13_is_read_and_written(opset, tmp_path):
    model = small.mini_mobilenet()
    model.opset_import[0].version = opset
    small.imported(tmp_path, model)


@pytest.mark.parametrize("op, opset", [(eq.AvgPool(2, dilation=2), 19), (eq.LpPool(2, dilation=2), 18), (eq.GELU(), 17)])
def test_a_newer_opset_is_taken_where_an_op_needs_one(op, opset, tmp_path):
    eqfact.onnx.save(tmp_path / "op.onnx", eq.Graph({"x": (3, 5)}, [eq.Node("y", op, ["x"])], ["y"]))
    assert onnx.load(tmp_path / "op.onnx").opset_import[0].version == opset


@pytest.mark.parametrize(("name", "names"), [("", ["", "", ""]), ("act", ["", "act.gate", "act"])])
def test_hard_swish_before_opset_14_is_written_as_a_product(name, names, tmp_path):
    x = np.linspace(-4, 4, 12, dtype=np.float32).reshape(4, 3)
    relus = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Relu", ["r"], ["y"], name=name)]
    given = small.model(relus, {"x": ["N", 3]}, ["y"], opset=13)
    onnx.save(given, tmp_path / "given.onnx")
    graph = eqfact.onnx.load(tmp_path / "given.onnx").with_ops({"r": eq.Identity(), "y": eq.HardSwish()})
    eqfact.onnx.save(tmp_path / "op.onnx", graph)
    written = onnx.load(tmp_path / "op.onnx")
    assert written.opset_import[0].version == 13 and written.graph.node[-1].op_type == "Mul"
    assert [n.name for n in written.graph.node] == names  # as in the file
    small.close(small.run_ort(tmp_path / "op.onnx", {"x": x}), {"y": eq.HardSwish().forward(x)})


# ------------------------------------------------------------------------------------------------ sharing, inputs, outputs


def shared_model(second_stride=1):
    conv = [helper.make_node("Conv", [x, "w", "b"], [y], name=y, strides=[s, s], pads=[1] * 4) for x, y, s in
            (("left", "a", 1), ("right", "b1", second_stride))]
    nodes = [*conv, *(helper.make_node("GlobalAveragePool", [x], [f"{x}.pool"]) for x in ("a", "b1")),
             helper.make_node("Mul", ["a.pool", "b1.pool"], ["y"])]
    rng = np.random.default_rng(0)
    return small.model(nodes, {"left": ["N", 2, 4, 4], "right": ["N", 2, 4, 4]}, ["y", "a"],
                       {"w": rng.normal(size=(3, 2, 3, 3)).astype(np.float32), "b": rng.normal(size=3).astype(np.float32)})


def test_two_nodes_with_the_same_weights_are_one_op_and_one_initializer(tmp_path):
    graph = small.imported(tmp_path, shared_model())
    assert graph["a"].op is graph["b1"].op
    again = onnx.load(tmp_path / "again.onnx")
    assert sorted(i.name for i in again.graph.initializer) == ["b", "w"]
    assert [o.name for o in again.graph.output] == ["y", "a"] and [i.name for i in again.graph.input] == ["left", "right"]


def test_the_same_weights_with_other_strides_are_two_ops(tmp_path):
    graph = small.imported(tmp_path, shared_model(2))
    assert graph["a"].op is not graph["b1"].op and graph["a"].op.weight is graph["b1"].op.weight


def test_weights_shared_through_identity_nodes_are_shared(tmp_path):
    model = shared_model()
    model.graph.node.insert(0, helper.make_node("Identity", ["w"], ["w.alias"]))
    model.graph.node[2].input[1] = "w.alias"
    graph = small.imported(tmp_path, model)
    assert graph["a"].op is graph["b1"].op


def test_one_op_object_in_two_nodes_is_one_initializer(tmp_path):
    fc = eq.Dense(np.eye(3, dtype=np.float32), np.ones(3, np.float32))
    graph = eq.Graph({"x": (3,)}, [eq.Node("a", fc, ["x"]), eq.Node("r", eq.ReLU(), ["a"]), eq.Node("b", fc, ["r"])], ["b"])
    eqfact.onnx.save(tmp_path / "net.onnx", graph)
    assert len(onnx.load(tmp_path / "net.onnx").graph.initializer) == 2
    again = eqfact.onnx.load(tmp_path / "net.onnx")
    assert again["a"].op is again["b"].op


def test_an_input_may_be_an_output(tmp_path):
    model = small.model([helper.make_node("Relu", ["x"], ["y"])], {"x": ["N", 3]}, ["y", "x"])
    assert small.imported(tmp_path, model).outputs == ("y", "x")


def test_external_data_is_read(tmp_path):
    model = small.mini_resnet()
    (tmp_path / "folder").mkdir()
    expected_path = tmp_path / "inside.onnx"
    onnx.save(model, expected_path)
    onnx.save_model(model, str(tmp_path / "folder" / "net.onnx"), save_as_external_data=True, location="net.weights", size_threshold=0)
    assert (tmp_path / "folder" / "net.weights").exists()
    inside, outside = eqfact.onnx.load(expected_path), eqfact.onnx.load(tmp_path / "folder" / "net.onnx")
    feeds = small.feeds_of(inside)
    assert np.array_equal(eq.forward(inside, feeds), eq.forward(outside, feeds))


def test_initializers_listed_as_inputs_are_no_inputs(tmp_path):
    model = small.mini_resnet()
    model.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer)
    assert list(small.imported(tmp_path, model).inputs) == ["image"]


def test_functions_of_the_model_are_inlined(tmp_path):
    body = [helper.make_node("Relu", ["a"], ["r"]), helper.make_node("Add", ["r", "a"], ["b"])]
    function = helper.make_function("local", "block", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    model = small.model([helper.make_node("block", ["x"], ["y"], domain="local")], {"x": ["N", 3]}, ["y"], functions=[function])
    model.opset_import.append(helper.make_opsetid("local", 1))
    assert {type(n.op) for n in small.imported(tmp_path, model)} == {eq.ReLU, eq.Add}


def test_float16_networks_are_read(tmp_path):
    w = np.eye(3, dtype=np.float16)
    onnx.save(small.model([helper.make_node("Gemm", ["x", "w"], ["y"])], {"x": ["N", 3]}, ["y"], {"w": w}, elem_type=TensorProto.FLOAT16),
              tmp_path / "net.onnx")
    graph = eqfact.onnx.load(tmp_path / "net.onnx")
    assert graph.dtype == np.float16
    eqfact.onnx.save(tmp_path / "again.onnx", graph)
    assert numpy_helper.to_array(onnx.load(tmp_path / "again.onnx").graph.initializer[0]).dtype == np.float16


def test_importing_eqfact_does_not_import_onnx():
    code = "import sys, eqfact; assert not {'onnx', 'google.protobuf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
