"""What is refused when ONNX files are read or written, and with which words."""

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
from eqfact.onnx.exporting import write_model

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
    refused(tmp_path, simple(node("Relu", ["x"], ["y"]), elem_type=TensorProto.INT32), "input 'x' holds INT32", "eqfact.onnx.open")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(value, tmp_path):
    w = floats(3, 4)
    w[1, 2] = value
    refused(tmp_path, simple(node("Gemm", ["x", "w"], ["y"], name="fc"), constants={"w": w}), "node 'fc' (Gemm)", "initializer 'w'",
            "(1, 2)", "finite")


def test_integer_weights(tmp_path):
    refused(tmp_path, simple(node("MatMul", ["x", "w"], ["y"], name="fc"), constants={"w": np.ones((3, 4), np.int32)}),
            "node 'fc' (MatMul)", "initializer 'w' holds int32")


@pytest.mark.parametrize("kind", ["QuantizeLinear", "DequantizeLinear"])
def test_quantized_networks(kind, tmp_path):
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"], name="first"), node("DequantizeLinear", ["q", "s", "z"], ["y"])]
    model = simple(*nodes, constants={"s": np.float32(0.1), "z": np.uint8(3)})
    refused(tmp_path, model, "node 'first' (QuantizeLinear)", "quantized already", "float network")


def test_an_output_that_is_constant(tmp_path):
    model = small.model([node("Relu", ["x"], ["y"]), node("Identity", ["c"], ["z"])], {"x": ["N", 3]}, ["y", "z"], {"c": floats(3)})
    refused(tmp_path, model, "output 'z'", "constant")


# ------------------------------------------------------------------------------------------------ nodes


@pytest.mark.parametrize("unsupported, words", [
    (node("Cos", ["x"], ["y"], name="n"), "no such layer"),
    (node("Max", ["x", "x", "c"], ["y"], name="n"), "2 values and 1 constants"),
    (node("Div", ["c", "x"], ["y"], name="n"), "divides by a value"),
    (node("LRN", ["x"], ["y"], name="n", size=3), "no such layer"),
    (node("Einsum", ["x", "x"], ["y"], name="n", equation="ncl,ncl->nc"), "is no product of matrices"),
    (node("Einsum", ["x", "mean"], ["y"], name="n", equation="ncl,cd->ncd"), "is no layer"),
    (node("Tile", ["x", "twice"], ["y"], name="n"), "batch"),
    (node("Tile", ["x", "huge"], ["y"], name="n"), "more than a network is read with"),
    (node("Resize", ["x", "", "much"], ["y"], name="n", mode="cubic"), "more than a network is read with"),
    (node("Resize", ["x", "", "many"], ["y"], name="n", mode="linear"), "larger than what is computed"),
    (node("Concat", ["x", "samples"], ["y"], name="n", axis=1), "constant"),
    (node("Add", ["x", "wide"], ["y"], name="n"), "does not broadcast"),
    (node("BatchNormalization", ["x", "c", "c", "c", "c"], ["y"], name="n", training_mode=1), "training mode"),
    (node("Mul", ["x", "samples"], ["y"], name="n"), "differs between samples"),
    (node("ReduceMean", ["x"], ["y"], name="n", axes=[0, 1]), "axis 0 is the batch"),
    (node("Resize", ["x", "roi", "scales"], ["y"], name="n", mode="linear", coordinate_transformation_mode="tf_crop_and_resize",
          extrapolation_value=7.0), "outside is 7"),
    (node("Softmax", ["x"], ["y"], name="n", axis=0), "batch"),
], ids=lambda v: v.op_type if isinstance(v, onnx.NodeProto) else "")
def test_unsupported_nodes_are_named_with_a_remedy(unsupported, words, tmp_path):
    constants = {"c": np.abs(floats(4)), "pads": np.int64([0, 0, 1, 0, 0, 1]), "wide": floats(1, 7, 1), "samples": floats(2, 4, 6),
                 "scales": np.float32([1, 1, 2]), "roi": np.float32([0, 0, 0, 1, 1, 1.5]), "twice": np.int64([2, 1, 1]),
                 "huge": np.int64([1, 1, 2**40]), "much": np.float32([1, 1, 2**40]), "many": np.float32([1, 1, 2**20]),
                 "mean": floats(4, 5)}
    model = simple(unsupported, x=(4, 6), constants=constants)
    error = refused(tmp_path, model, f"node 'n' ({unsupported.op_type}): ", words, "eqfact.onnx.open", "--strict")
    assert isinstance(error, UnsupportedNode)


def test_what_depends_on_the_batch_is_not_guessed(tmp_path):
    nodes = [node("Shape", ["x"], ["s"]), node("Gather", ["s", "zero"], ["n"]), node("Cast", ["n"], ["f"], to=1),
             node("Mul", ["x", "f"], ["y"], name="m")]
    refused(tmp_path, simple(*nodes, constants={"zero": np.int64(0)}), "node 'm' (Mul)", "depends on the size of the batch")


def test_outputs_that_mix_samples(tmp_path):
    """Within a network samples may lie behind each other in one axis; an output is batch first."""
    model = simple(node("Reshape", ["x", "s"], ["y"], name="r"), x=(4, 6), constants={"s": np.int64([-1, 6])})
    refused(tmp_path, model, "output 'y'", "N4x6", "first axis")
    model = simple(node("Reshape", ["x", "s"], ["y"], name="r"), x=(4, 6), constants={"s": np.int64([4, -1, 6])})
    refused(tmp_path, model, "node 'r' (Reshape)", "Nx4x6", "mixes samples")


def test_a_shape_that_holds_fewer_entries_than_there_are(tmp_path):
    model = simple(node("Reshape", ["x", "s"], ["y"], name="r"), x=(4, 6), constants={"s": np.int64([0, 4])})
    refused(tmp_path, model, "node 'r' (Reshape)", "Nx4x6", "loses its axis")


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


def test_a_model_that_is_none_is_not_written(tmp_path):
    for whole in (True, False):
        with pytest.raises(OnnxError):
            write_model(tmp_path / "net.onnx", simple(node("Relu", ["nothing"], ["y"])), full=whole)
        with pytest.raises(OnnxError):
            write_model(tmp_path / "net.onnx", simple(node("Flat", ["x"], ["y"])), full=whole)
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
