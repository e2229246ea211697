"""What is refused when ONNX files are read or written, with which words, and what is kept with opaque=True."""

import dataclasses
import os
import re

import numpy as np
import onnx
import onnx_models as small
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import eqfact as eq
import eqfact.onnx
from eqfact.onnx import OnnxError, UnsupportedNode

node = helper.make_node


def floats(*shape):
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def written(tmp_path, model, name="net.onnx"):
    path = tmp_path / name
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def simple(*nodes, x=(3,), opset=17, constants=None, **options):
    return small.model(nodes, {"x": ["N", *x]}, ["y"], constants, opset, **options)


def refused(tmp_path, model, *words, **options):
    """The file is refused with one error that starts with its path and holds these words."""
    path = written(tmp_path, model)
    with pytest.raises(OnnxError) as caught:
        eqfact.onnx.load(path, **options)
    assert str(caught.value).startswith(f"{path}: ")
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert len(str(caught.value)) < 1500 and "\n" not in str(caught.value)
    return caught.value


# ------------------------------------------------------------------------------------------------ files


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        eqfact.onnx.load(tmp_path / "nothing.onnx")


@pytest.mark.parametrize("content", [b"", b"hello, world", b"PK\x03\x04" + bytes(100), bytes(64), b"\x08\x08", os.urandom(300)],
                         ids=range(6))
def test_files_that_are_not_onnx(content, tmp_path):
    refused(tmp_path, content, "not an ONNX")


def test_every_truncation_ends_in_one_clear_error(tmp_path):
    whole = small.mini_resnet().SerializeToString()
    for length in [*range(0, 400, 7), *range(400, len(whole) - 1, 997), len(whole) - 1]:
        refused(tmp_path, whole[:length])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), min_size=1, max_size=8), st.sampled_from(sorted(small_nets := {
    "mobilenet": small.mini_mobilenet, "inception": small.mini_inception})))
def test_fuzzed_files_are_read_or_refused_with_one_error(tmp_path_factory, changes, which):
    data = bytearray(FUZZED[which])
    for at, byte in changes:
        data[at % len(data)] = byte
    path = tmp_path_factory.getbasetemp() / "fuzzed.onnx"
    path.write_bytes(bytes(data))
    try:
        graph = eqfact.onnx.load(path)
    except OnnxError as error:
        assert str(error).startswith(f"{path}: ")
    else:
        assert isinstance(graph, eq.Graph)


FUZZED = {name: build().SerializeToString() for name, build in small_nets.items()}


@pytest.mark.parametrize("opset", [1, 5, 99])
def test_unknown_opsets(opset, tmp_path):
    model = simple(node("Relu", ["x"], ["y"]))
    model.opset_import[0].version = opset
    refused(tmp_path, model, f"opset {opset}", "version_converter")


def test_invalid_graphs(tmp_path):
    refused(tmp_path, simple(node("Relu", ["nothing"], ["y"])), "nothing")
    refused(tmp_path, simple(node("Relu", ["x"], ["y"], alpha=1.0)), "alpha")
    refused(tmp_path, simple(node("Relu", ["x"], ["z"])), "output 'y'")


def external(tmp_path, location):
    model = simple(node("Gemm", ["x", "w"], ["y"]), constants={"w": floats(3, 4)})
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="length", value="48")
    return model


def test_missing_external_data(tmp_path):
    refused(tmp_path, external(tmp_path, "weights.bin"), "tensor 'w'", "missing", "weights.bin")


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "sub/../../weights.bin", ""])
def test_external_data_outside_the_folder(location, tmp_path):
    (tmp_path / "weights.bin").write_bytes(bytes(48))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "sub").mkdir()
    refused(tmp_path / "in", external(tmp_path, location), "tensor 'w'", "outside")


def test_external_data_behind_a_link(tmp_path):
    (tmp_path / "weights.bin").write_bytes(bytes(48))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "weights.bin").symlink_to(tmp_path / "weights.bin")
    refused(tmp_path / "in", external(tmp_path, "weights.bin"), "tensor 'w'", "outside")


def test_external_data_that_is_too_short(tmp_path):
    (tmp_path / "weights.bin").write_bytes(bytes(20))
    refused(tmp_path, external(tmp_path, "weights.bin"))


# ------------------------------------------------------------------------------------------------ inputs, weights, outputs


def test_dynamic_space_needs_input_shapes(tmp_path):
    model = small.model([node("Relu", ["x"], ["y"])], {"x": ["N", 3, "H", "W"]}, ["y"])
    refused(tmp_path, model, "input 'x'", "(?, 3, ?, ?)", "input_shapes={'x': (C, *spatial)}")
    refused(tmp_path, model, "(4, 5, 5)", input_shapes={"x": (4, 5, 5)})
    refused(tmp_path, model, "['z']", "['x']", input_shapes={"z": (3, 5, 5)})
    assert eqfact.onnx.load(tmp_path / "net.onnx", input_shapes={"x": (3, 5, 4)}).shapes["y"] == (3, 5, 4)


def test_inputs_without_shape_or_floats(tmp_path):
    model = simple(node("Relu", ["x"], ["y"]))
    model.graph.input[0].type.tensor_type.ClearField("shape")
    refused(tmp_path, model, "input 'x'", "input_shapes")
    refused(tmp_path, simple(node("Relu", ["x"], ["y"]), elem_type=TensorProto.INT32), "input 'x' holds INT32")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value, tmp_path):
    w = floats(3, 4)
    w[1, 2] = value
    refused(tmp_path, simple(node("Gemm", ["x", "w"], ["y"], name="fc"), constants={"w": w}), "node 'fc' (Gemm)", "initializer 'w'",
            "(1, 2)", "finite")


def test_integer_weights(tmp_path):
    refused(tmp_path, simple(node("MatMul", ["x", "w"], ["y"], name="fc"), constants={"w": np.ones((3, 4), np.int32)}),
            "node 'fc' (MatMul)", "initializer 'w' holds int32", opaque=True)


@pytest.mark.parametrize("kind", ["QuantizeLinear", "DequantizeLinear"])
def test_quantized_networks(kind, tmp_path):
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"], name="first"), node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    model = simple(*nodes, constants={"s": np.float32(0.1), "z": np.uint8(3)})
    refused(tmp_path, model, "node 'first' (QuantizeLinear)", "quantized already", "float network", opaque=True)


def test_an_output_that_is_constant(tmp_path):
    model = small.model([node("Relu", ["x"], ["y"]), node("Identity", ["c"], ["z"])], {"x": ["N", 3]}, ["y", "z"], {"c": floats(3)})
    refused(tmp_path, model, "output 'z'", "constant")


# ------------------------------------------------------------------------------------------------ nodes


@pytest.mark.parametrize("unsupported, words", [
    (node("Cos", ["x"], ["y"], name="n"), "no such layer"),
    (node("Sub", ["x", "x"], ["y"], name="n"), "two values"),
    (node("Div", ["c", "x"], ["y"], name="n"), "divides by a value"),
    (node("LRN", ["x"], ["y"], name="n", size=3), "no such layer"),
    (node("MaxPool", ["x"], ["y"], name="n", kernel_shape=[2], dilations=[2]), "dilations"),
    (node("Pad", ["x", "pads"], ["y"], name="n", mode="reflect"), "mode is 'reflect'"),
    (node("Add", ["x", "wide"], ["y"], name="n"), "does not broadcast"),
    (node("BatchNormalization", ["x", "c", "c", "c", "c"], ["y"], name="n", training_mode=1), "training mode"),
    (node("Mul", ["x", "samples"], ["y"], name="n"), "differs between samples"),
    (node("ReduceMean", ["x"], ["y"], name="n", axes=[1, 2]), "no channel"),
    (node("Resize", ["x", "", "scales"], ["y"], name="n", mode="linear"), "linear"),
    (node("Softmax", ["x"], ["y"], name="n", axis=0), "batch"),
], ids=lambda v: v.op_type if isinstance(v, onnx.NodeProto) else "")
def test_unsupported_nodes_are_named_with_a_remedy(unsupported, words, tmp_path):
    constants = {"c": np.abs(floats(4)), "pads": np.int64([0, 0, 1, 0, 0, 1]), "wide": floats(1, 7, 1), "samples": floats(2, 4, 6),
                 "scales": np.float32([1, 1, 2])}
    model = simple(unsupported, x=(4, 6), constants=constants)
    error = refused(tmp_path, model, f"node 'n' ({unsupported.op_type}): ", words, "opaque=True")
    assert isinstance(error, UnsupportedNode)


def test_what_depends_on_the_batch_is_not_guessed(tmp_path):
    nodes = [node("Shape", ["x"], ["s"]), node("Gather", ["s", "zero"], ["n"]), node("Cast", ["n"], ["f"], to=1),
             node("Mul", ["x", "f"], ["y"], name="m")]
    refused(tmp_path, simple(*nodes, constants={"zero": np.int64(0)}), "node 'm' (Mul)", "depends on the size of the batch")


def test_reshapes_that_mix_samples(tmp_path):
    model = simple(node("Reshape", ["x", "s"], ["y"], name="r"), x=(4, 6), constants={"s": np.int64([-1, 6])})
    refused(tmp_path, model, "node 'r' (Reshape)", "Nx4x6", "mixes samples")
    model = simple(node("Reshape", ["x", "s"], ["y"], name="r"), x=(4, 6), constants={"s": np.int64([4, -1, 6])})
    refused(tmp_path, model, "node 'r' (Reshape)", "Nx4x6", "mixes samples")


# ------------------------------------------------------------------------------------------------ opaque


def with_unknown(kind="LRN", **attributes):
    """A network with a node in the middle that eqfact does not know."""
    b = small.Builder(["N", 3, 8, 8])
    x = b.node("Relu", b.conv("image", 6, 3, 3, bn=False))
    x = b.node("Relu", b.conv(x, 8, 6, 3, bn=False))
    x = b.node(kind, x, **attributes)
    x = b.node("Relu", b.conv(x, 6, 8, 3, bn=False))
    return b.model(b.gemm(b.node("Flatten", b.node("GlobalAveragePool", x)), 4, 6, "logits"))


def test_opaque_keeps_a_node_and_pins_what_it_touches(tmp_path):
    model = with_unknown("LRN", size=3, alpha=0.01)
    refused(tmp_path, model, "(LRN)")
    graph = small.imported(tmp_path, model, opaque=True)
    (opaque,) = (n for n in graph.nodes if isinstance(n.op, eqfact.onnx.Opaque))
    resolved = eq.channels(graph)
    assert not resolved.labels[opaque.name].any() and not resolved.labels[opaque.inputs[0]].any()
    assert resolved.degrees_of_freedom == 6 + 6
    assert opaque.name in resolved.pinned[opaque.name] and "kept as it is" in resolved.pinned[opaque.name]
    kept = [n for n in onnx.load(tmp_path / "again.onnx").graph.node if n.op_type == "LRN"]
    assert kept == [n for n in model.graph.node if n.op_type == "LRN"]


def test_the_rest_of_a_network_with_an_opaque_node_is_equalized(tmp_path):
    path = written(tmp_path, with_unknown("LRN", size=3))
    graph = eqfact.onnx.load(path, opaque=True)
    result = eq.equalize(graph, method="cross_layer", max_iter=10)
    assert any(np.any(result.factorization[value] != 1) for value in result.factorization)
    eqfact.onnx.save(tmp_path / "equalized.onnx", result.graph)
    feeds = small.feeds_of(graph)
    small.close(small.run_ort(tmp_path / "equalized.onnx", feeds), small.run_ort(path, feeds), 1e-4)


@pytest.mark.parametrize("kind, options", [("LRN", {"size": 3}), ("LpPool", {"kernel_shape": [2, 2]}), ("Cos", {})])
def test_errors_pass_a_node_that_is_kept_whatever_its_shape(kind, options, tmp_path):
    """Whatever it mixes: the largest error of a sample stands for all. Behind it a rescaled network is the same, a changed one is not."""
    graph = eqfact.onnx.load(written(tmp_path, with_unknown(kind, **options)), opaque=True)
    x = small.feeds_of(graph)
    x = next(iter(x.values())) if len(x) == 1 else x
    result = eq.equalize(graph, method="cross_layer", max_iter=10)
    verdict = eq.verify(graph, result.graph, x)
    assert verdict, verdict.message
    last = next(n for n in reversed(graph.nodes) if isinstance(n.op, eq.Conv))
    wrong = result.graph.with_ops({last.name: dataclasses.replace(last.op, weight=last.op.weight * np.float32(1.1))})
    assert not eq.verify(graph, wrong, x)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_local_response_normalization_follows_the_specification(size, tmp_path):
    """onnx's own evaluator (1.23) does not; onnxruntime takes odd sizes only."""
    path = written(tmp_path, simple(node("LRN", ["x"], ["y"], size=size, alpha=0.5, beta=0.6, bias=2.0), x=(5, 2, 2)))
    x, expected = floats(2, 5, 2, 2), np.empty((2, 5, 2, 2))
    for c in range(5):
        near = x[:, max(0, c - (size - 1) // 2):c + -((1 - size) // 2) + 1].astype(float)
        expected[:, c] = x[:, c] / (2 + 0.5 / size * (near**2).sum(axis=1)) ** 0.6
    np.testing.assert_allclose(eq.forward(eqfact.onnx.load(path, opaque=True), x), expected, rtol=1e-5)


def test_opaque_nodes_with_constants_and_several_outputs(tmp_path):
    nodes = [node("Relu", ["x"], ["r"]), node("InstanceNormalization", ["r", "s", "b"], ["i"]),
             node("TopK", ["i", "k"], ["t", "indices"], axis=2),
             node("Relu", ["t"], ["y"])]
    model = simple(*nodes, x=(3, 8), constants={"s": floats(3), "b": floats(3), "k": np.int64([4])})
    path = written(tmp_path, model)
    # the indices are integers: not even opaque=True can hold them
    refused(tmp_path, model, "(TopK)", "not even opaque=True", opaque=True)
    del nodes[2]
    nodes[-1] = node("Relu", ["i"], ["y"])
    graph = small.imported(tmp_path, simple(*nodes, x=(3, 8), constants={"s": floats(3), "b": floats(3)}), opaque=True)
    assert {i.name for i in onnx.load(tmp_path / "again.onnx").graph.initializer} == {"s", "b"}
    assert path.exists() and len(graph.nodes) == 3


def test_several_floating_outputs_of_an_opaque_node(tmp_path):
    nodes = [node("Relu", ["x"], ["r"]), node("LayerNormalization", ["r", "s"], ["l", "mean"], axis=1), node("Relu", ["l"], ["y"]),
             node("Relu", ["mean"], ["z"])]
    model = small.model(nodes, {"x": ["N", 3, 8]}, ["y", "z"], {"s": np.ones((3, 8), np.float32)})
    graph = small.imported(tmp_path, model, opaque=True)
    assert [n.op.output for n in graph.nodes if isinstance(n.op, eqfact.onnx.Opaque)] == [0, 1]
    assert [n.op_type for n in onnx.load(tmp_path / "again.onnx").graph.node].count("LayerNormalization") == 1


def test_nodes_that_not_even_opaque_can_keep(tmp_path):
    model = simple(node("Unknown", ["x"], ["y"], domain="somewhere", name="u"))
    model.opset_import.append(helper.make_opsetid("somewhere", 1))
    refused(tmp_path, model, "node 'u' (somewhere.Unknown)", "not even opaque=True", opaque=True)
    refused(tmp_path, simple(node("Cos", ["x"], ["y"], name="c"), opset=9), "node 'c' (Cos)", "opset 13", "version_converter", opaque=True)


# ------------------------------------------------------------------------------------------------ writing


class Own(eq.ops.Commuting):
    """Somebody's layer."""

    def forward(self, *inputs):
        return inputs[0]


def test_ops_without_a_counterpart_are_named_and_no_file_is_left(tmp_path):
    graph = eq.Graph({"x": (3,)}, [eq.Node("mine", Own(), ["x"])], ["mine"])
    with pytest.raises(OnnxError, match=re.escape(f"{tmp_path / 'net.onnx'}: node 'mine': Own has no ONNX counterpart")):
        eqfact.onnx.save(tmp_path / "net.onnx", graph)
    assert not list(tmp_path.iterdir())


def test_a_failing_write_keeps_the_old_file(tmp_path, monkeypatch):
    graph = eq.Graph({"x": (3,)}, [eq.Node("y", eq.ReLU(), ["x"])], ["y"])
    (tmp_path / "net.onnx").write_bytes(b"old")

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        eqfact.onnx.save(tmp_path / "net.onnx", graph)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"] and (tmp_path / "net.onnx").read_bytes() == b"old"


def test_quantized_graphs_are_sent_to_save_qdq(tmp_path):
    graph = eq.Graph({"x": (3,)}, [eq.Node("y", eq.Dense(floats(2, 3)), ["x"])], ["y"])
    stats = eq.calibrate(graph, [floats(5, 3)])
    quantizer = eq.UniformQuantizer(8, symmetric=False)
    with pytest.raises(OnnxError, match="save_qdq"):
        eqfact.onnx.save(tmp_path / "net.onnx", eq.quantize(graph, stats=stats, activations=quantizer))


def test_numpy_helper_is_not_asked_for_bad_dimensions(tmp_path):
    model = simple(node("Gemm", ["x", "w"], ["y"]), constants={"w": floats(3, 4)})
    model.graph.initializer[0].dims[0] = 7
    refused(tmp_path, model)
    tensor = numpy_helper.from_array(floats(3, 4), "w")
    tensor.data_type = 77
    model.graph.initializer[0].CopyFrom(tensor)
    refused(tmp_path, model)
