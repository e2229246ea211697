"""Quantized networks as ONNX with QuantizeLinear and DequantizeLinear: the same whole numbers, in an engine's types."""

import numpy as np
import onnx
import onnx_models as small
import pytest
from onnx import TensorProto, numpy_helper

import eqfact as eq
import eqfact.onnx
from eqfact.onnx import OnnxError, Origin
from eqfact.quantization import grid_of
from eqfact.quantizers import FakeQuantize

NETS = {"mobilenet": small.mini_mobilenet, "inception": small.mini_inception, "resnet": small.mini_resnet}
ACTIVATIONS = eq.UniformQuantizer(8, symmetric=False)


def floats(*shape, seed=5):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def quantized(graph, weights=None, activations=ACTIVATIONS, **options):
    """The network with weights and activations on grids, ranges from a few random samples."""
    feeds = small.feeds_of(graph, batch=4, seed=1)
    data = next(iter(feeds.values())) if len(feeds) == 1 else feeds
    stats = eq.calibrate(graph, [data]) if activations is not None else None
    return eq.quantize(graph, weights=weights or eq.UniformQuantizer(8), activations=activations, stats=stats, outputs=True, **options)


def steps_apart(graph, path, batch=3):
    """How many steps of its grid each output of the file in onnxruntime is away from eqfact's."""
    feeds = small.feeds_of(graph, batch, seed=2)
    ours, theirs = small.run_eq(graph, feeds), small.run_ort(path, feeds)
    assert list(ours) == list(theirs)
    return np.concatenate([np.rint(np.abs(theirs[o] - y) / graph[o].op.grid.scale.max()).ravel() for o, y in ours.items()])


def layers(graph):
    """Every piece of a quantized network between stored values, as a network that reads what the piece reads."""
    stored = {node.name for node in graph.nodes if isinstance(node.op, FakeQuantize)}
    for name in stored:
        if graph[name].inputs[0] in graph.inputs:
            continue
        found, read, open_values = [], [], [name]
        while open_values:
            value = open_values.pop()
            if value in read or any(node.name == value for node in found):
                continue
            if value in stored and value != name:
                read.append(value)
            else:
                found.append(graph[value])
                open_values += graph[value].inputs
        again = [eq.Node(value, FakeQuantize(graph[value].op.grid), [f"{value}.read"]) for value in read]
        yield eq.Graph({f"{value}.read": graph.shapes[value] for value in read}, [*again, *found], [name])


@pytest.fixture(params=NETS, ids=str)
def net(request, tmp_path):
    onnx.save(NETS[request.param](), tmp_path / "float.onnx")
    return eq.fold_batchnorm(eqfact.onnx.load(tmp_path / "float.onnx"))


QUANTIZERS = {
    "per tensor": (eq.UniformQuantizer(8), ACTIVATIONS),
    "per channel": (eq.UniformQuantizer(8, granularity="per_channel"), ACTIVATIONS),
    "affine weights, symmetric activations": (eq.UniformQuantizer(8, symmetric=False), eq.UniformQuantizer(8)),
    "narrow range": (eq.UniformQuantizer(8, narrow_range=True), eq.UniformQuantizer(8, narrow_range=True)),
    "4 and 6 bits": (eq.UniformQuantizer(4, granularity="per_channel"), eq.UniformQuantizer(6, symmetric=False)),
    "activations per channel": (eq.UniformQuantizer(8), eq.UniformQuantizer(8, symmetric=False, granularity="per_channel")),
    "16 bits": (eq.UniformQuantizer(8), eq.UniformQuantizer(16)),
    "per group": (eq.UniformQuantizer(4, granularity="per_group", group_size=3), ACTIVATIONS),
}


@pytest.mark.parametrize("weights, activations", QUANTIZERS.values(), ids=QUANTIZERS)
def test_every_layer_agrees_with_onnxruntime_within_one_step(weights, activations, net, tmp_path):
    """On the same inputs. Over many layers a value that lies between two steps may go either way, and what follows from it grows."""
    graph = quantized(net, weights, activations)
    feeds = small.feeds_of(graph, batch=1, seed=2)
    every, total, unequal, pieces = eq.values(graph, feeds), 0, 0, list(layers(graph))
    assert len(pieces) > 5
    for piece in pieces:
        eqfact.onnx.save_qdq(tmp_path / "layer.onnx", piece)
        (output,) = piece.outputs
        theirs = small.run_ort(tmp_path / "layer.onnx", {name: every[name.removesuffix(".read")] for name in piece.inputs})[output]
        scale = piece[output].op.grid.scale
        apart = np.abs(theirs - every[output]) / scale.reshape(-1, *(1 for _ in theirs.shape[2:]))
        assert apart.max() < 1.01, output
        total, unequal = total + apart.size, unequal + int((apart > 0.5).sum())
    # 16 bits are finer than the rounding of float32 sums
    assert unequal <= (0.02 if activations.bits == 16 else 0.001) * total, (unequal, total)


@pytest.mark.parametrize("weights, activations", QUANTIZERS.values(), ids=QUANTIZERS)
def test_whole_networks_agree_nearly_everywhere(weights, activations, net, tmp_path):
    graph = quantized(net, weights, activations)
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", graph)
    onnx.checker.check_model(str(tmp_path / "net.onnx"), full_check=True)
    if activations.bits < 16:
        assert np.quantile(steps_apart(graph, tmp_path / "net.onnx", batch=1), 0.9) <= 1


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_integer_kernels_store_what_eqfact_stores_value_by_value(granularity, tmp_path):
    """A network with a ReLU6 of its own bound for each channel, all layers of which onnxruntime runs in integers."""
    onnx.save(NETS["mobilenet"](), tmp_path / "float.onnx")
    net = eq.equalize(eq.fold_batchnorm(eqfact.onnx.load(tmp_path / "float.onnx"))).graph
    assert any(isinstance(node.op, eq.Clip) and np.size(node.op.high) > 1 for node in net)
    graph = quantized(net, eq.UniformQuantizer(8, granularity=granularity))
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", graph)
    for seed in range(10):
        feeds = small.feeds_of(graph, batch=1, seed=seed)
        theirs = small.run_ort(tmp_path / "net.onnx", feeds, integers=tmp_path / "run.onnx")
        for name, y in small.run_eq(graph, feeds).items():
            assert np.array_equal(np.rint(theirs[name] / grid_of(graph, name).scale), np.rint(y / grid_of(graph, name).scale))
    kinds = [n.op_type for n in onnx.load(tmp_path / "run.onnx").graph.node]
    assert kinds.count("QLinearConv") == sum(isinstance(node.op, eq.Conv) for node in graph)
    assert "QGemm" in kinds and not {"Conv", "Gemm"} & set(kinds)


def test_sums_of_two_values_are_rounded_as_sums(tmp_path):
    """Every pair of whole numbers, on grids of MobileNetV2 at which -13 and -9 make -16.500008, and onnxruntime's kernel for Add -16."""
    of_x, of_y, of_z = (eq.Grid(np.array([np.float32(scale)]), np.array([zero_point]), 0, 255)
                        for scale, zero_point in ((0.024638107, 112.0), (0.015642298, 131.0), (0.027943991, 110.0)))
    graph = eq.Graph({"x": (1, 256), "y": (1, 256)}, [
        eq.Node("x8", eq.FakeQuantize(of_x), ["x"]), eq.Node("y8", eq.FakeQuantize(of_y), ["y"]), eq.Node("sum", eq.Add(), ["x8", "y8"]),
        eq.Node("z", eq.FakeQuantize(of_z), ["sum"])], ["z"])
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", graph)
    x, y = np.meshgrid(*(grid.dequantize(np.arange(256)).astype(np.float32) for grid in (of_x, of_y)))
    feeds = {"x": x[:, None], "y": y[:, None]}
    theirs = small.run_ort(tmp_path / "net.onnx", feeds, integers=tmp_path / "run.onnx")["z"]
    assert np.array_equal(theirs, eq.forward(graph, feeds))
    assert [n.op_type for n in onnx.load(tmp_path / "net.onnx").graph.node].count("Sum") == 1


@pytest.mark.parametrize("nodes", [
    {"r": ("ReLU", "a"), "u": ("Dense", "r")},
    {"r": ("ReLU", "a"), "s": ("Add", "a r"), "u": ("Dense", "s")},
    {"r": ("Clip", "a"), "u": ("Dense", "r"), "v": ("Dense", "a")},
    {"r": ("ReLU", "x"), "s": ("Add", "a r")},
], ids=str)
def test_activations_of_stored_values_are_rounded_to_two_grids(nodes, tmp_path):
    """onnxruntime makes one of two neighbouring pairs, so none must stand before the ReLU's own."""
    make = {"ReLU": eq.ReLU, "Clip": lambda: eq.Clip(-0.5, 1.5), "Add": eq.Add, "Dense": lambda: eq.Dense(floats(8, 8, seed=7), floats(8))}
    for seed in range(8):
        graph = eq.Graph({"x": (8,)}, [eq.Node("a", eq.Dense(floats(8, 8, seed=seed), floats(8)), ["x"])] + [
            eq.Node(name, make[op](), read.split()) for name, (op, read) in nodes.items()], ["a", list(nodes)[-1]])
        q = quantized(graph)
        eqfact.onnx.save_qdq(tmp_path / "net.onnx", q)
        feeds = {"x": 2 * floats(300, 8, seed=8)}
        theirs = small.run_ort(tmp_path / "net.onnx", feeds, integers=tmp_path / "run.onnx")
        for name, y in eq.forward(q, feeds).items():
            assert np.array_equal(theirs[name], y), (seed, name)


@pytest.mark.parametrize("weights, activations", [(8, 4), (8, 3), (4, 8), (4, 4), (3, 6), (2, 2)])
@pytest.mark.parametrize("kind", ["Conv", "Dense"])
def test_few_bits_run_with_all_optimizations(weights, activations, kind, tmp_path):
    make = {"Conv": lambda seed: eq.Conv(floats(4, 4, 1, seed=seed)), "Dense": lambda seed: eq.Dense(floats(4, 4, seed=seed))}[kind]
    graph = eq.Graph.chain((4, 3) if kind == "Conv" else (4,), a=make(1), r=eq.ReLU(), b=make(2), c=eq.Clip(-0.25, 0.75), y=make(3))
    eqfact.onnx.save(tmp_path / "float.onnx", graph)
    model = onnx.load(tmp_path / "float.onnx")
    model.opset_import[0].version, model.ir_version = 21, 10  # with types of 4 bits
    onnx.save(model, tmp_path / "float.onnx")
    graph = eqfact.onnx.load(tmp_path / "float.onnx")
    q = quantized(graph, eq.UniformQuantizer(weights), eq.UniformQuantizer(activations, symmetric=False))
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", q)
    feeds = small.feeds_of(graph, batch=100)
    theirs = small.run_ort(tmp_path / "net.onnx", feeds, integers=tmp_path / "run.onnx")["y"]
    assert (theirs != small.run_eq(q, feeds)["y"]).mean() < 0.01  # where it computes in float, sums between two steps may part


def test_rounded_values_are_clipped_between_numbers_on_the_grid(tmp_path):
    graph = eq.Graph.chain((2, 5), a=eq.Conv(floats(3, 2, 2), floats(3)), act=eq.Clip(0.0, np.float32([0.5, 1.0, 2.0])),
                           y=eq.Conv(floats(2, 3, 1), floats(2)))
    q = quantized(graph)
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", q)
    model = onnx.load(tmp_path / "net.onnx")
    made = {n.output[0]: n for n in model.graph.node}
    chain, value = [], "act"
    while value != "a":
        chain.append(made[value].op_type)
        value = made[value].input[0]
    assert chain == ["DequantizeLinear", "QuantizeLinear", "Min", "DequantizeLinear", "QuantizeLinear"]
    tensors = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    (bound,) = (tensors[n.input[1]] for n in model.graph.node if n.op_type == "Min")
    scale = tensors["a.quantized.scale"]
    assert np.array_equal(bound.ravel(), np.rint(np.float32([0.5, 1.0, 2.0]) / scale) * scale)
    assert steps_apart(q, tmp_path / "net.onnx").max() <= 1


def test_layers_changed_after_quantization_are_refused(tmp_path):
    graph = quantized(eq.Graph.chain((3,), a=eq.Dense(floats(3, 3)), act=eq.ReLU(), y=eq.Dense(floats(2, 3))))
    step, weights = graph["act"].op.step[0], floats(3, 3, seed=6)
    grid = eq.UniformQuantizer(8).weight_grid(eq.Dense(weights))
    for other, found in ((eq.Dense(weights), "no steps"), (eq.ReLU(), "no steps"),
                         (eq.Dense(grid.fake_quantize(weights), grid=grid), "steps of ")):
        with pytest.raises(OnnxError, match=rf"node 'act': it rounds sums in steps of {step:g}, and 'a' is made in {found}.*; quantize"):
            eqfact.onnx.save_qdq(tmp_path / "net.onnx", graph.with_ops({"a": other}))
        assert not (tmp_path / "net.onnx").exists()


def test_weights_alone_may_be_quantized(net, tmp_path):
    graph = eq.quantize(net, weights=eq.UniformQuantizer(8))
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", graph)
    feeds = small.feeds_of(graph, batch=1)
    small.close(small.run_ort(tmp_path / "net.onnx", feeds), small.run_eq(graph, feeds))
    assert not [n for n in onnx.load(tmp_path / "net.onnx").graph.node if n.op_type == "QuantizeLinear"]


# ------------------------------------------------------------------------------------------------ what is written


def one_layer(op, shape, weights=None, tmp_path=None, **options):
    graph = quantized(eq.Graph({"x": shape}, [eq.Node("y", op, ["x"])], ["y"]), weights, **options)
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", graph)
    model = onnx.load(tmp_path / "net.onnx")
    assert steps_apart(graph, tmp_path / "net.onnx").max() <= 1
    return graph, model, {t.name: t for t in model.graph.initializer}


def attribute(model, name, key):
    (node,) = (n for n in model.graph.node if name in n.output)
    return next((onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == key), None)


def test_types_and_scales_of_one_layer(tmp_path):
    w, b = floats(4, 3, 2, 2), floats(4)
    graph, model, tensors = one_layer(eq.Conv(w, b), (3, 5, 5), eq.UniformQuantizer(8, granularity="per_channel"), tmp_path)
    assert [n.op_type for n in model.graph.node] == [
        "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "DequantizeLinear", "Conv", "QuantizeLinear", "DequantizeLinear"]
    node = graph["y.float"]
    whole = numpy_helper.to_array(tensors["y.float.weight.int"])
    assert whole.dtype == np.int8 and np.array_equal(whole, node.op.grid.quantize(node.op.weight))
    assert np.allclose(whole * numpy_helper.to_array(tensors["y.float.weight.scale"])[:, None, None, None], node.op.weight, rtol=1e-6)
    assert attribute(model, "y.float.weight", "axis") == 0
    bias = numpy_helper.to_array(tensors["y.float.bias.int"])
    assert bias.dtype == np.int32
    s_x, s_w = (numpy_helper.to_array(tensors[name]) for name in ("x.quantized.scale", "y.float.weight.scale"))
    assert np.array_equal(numpy_helper.to_array(tensors["y.float.bias.scale"]), s_x * s_w)
    assert numpy_helper.to_array(tensors["y.zero_point"]).dtype == np.uint8 and tensors["y.scale"].data_type == TensorProto.FLOAT


@pytest.mark.parametrize("op, shape, axis", [
    (eq.Dense(floats(4, 3), floats(4)), (3,), 0),
    (eq.Conv(floats(4, 1, 3), floats(4), groups=2), (2, 6), 0),
    (eq.ConvTranspose(floats(4, 3, 2, 2), floats(4), stride=2), (3, 4, 4), 1),
], ids=lambda v: type(v).__name__)
def test_scales_a_channel_stand_along_the_axis_of_the_outputs(op, shape, axis, tmp_path):
    _, model, _ = one_layer(op, shape, eq.UniformQuantizer(8, granularity="per_channel"), tmp_path)
    assert attribute(model, "y.float.weight", "axis") == axis


def test_scales_of_a_grouped_transposed_convolution_stand_in_blocks(tmp_path):
    op = eq.ConvTranspose(floats(6, 2, 2), floats(6), groups=2)
    _, model, _ = one_layer(op, (4, 4), eq.UniformQuantizer(8, granularity="per_channel"), tmp_path)
    assert attribute(model, "y.float.weight", "block_size") == 2 and model.opset_import[0].version == 21


def test_groups_of_input_channels_are_blocks(tmp_path):
    quantizer = eq.UniformQuantizer(4, granularity="per_group", group_size=2)
    _, model, tensors = one_layer(eq.Dense(floats(4, 6), floats(4)), (6,), quantizer, tmp_path)
    assert (attribute(model, "y.float.weight", "axis"), attribute(model, "y.float.weight", "block_size")) == (1, 2)
    assert tensors["y.float.weight.int"].data_type == TensorProto.INT4


def test_one_scale_has_no_axis_and_bytes_need_no_new_opset(tmp_path):
    _, model, tensors = one_layer(eq.Dense(floats(4, 3), floats(4)), (3,), eq.UniformQuantizer(8), tmp_path)
    for name in ("x.quantized", "y.float.weight", "y.float.bias", "y"):
        assert attribute(model, name, "axis") is None
    assert all(tensor.dims == [] for name, tensor in tensors.items() if name.endswith(("scale", "zero_point")))
    assert model.opset_import[0].version < 21


@pytest.mark.parametrize(("qmin", "qmax", "kind"), [
    (0, 15, "UINT8"), (0, 255, "UINT8"), (1, 255, "UINT8"), (0, 254, "UINT8"), (-1, 14, "INT8"), (-128, 127, "INT8"), (-127, 127, "INT8"),
    (0, 256, "UINT16"), (0, 2**16 - 1, "UINT16"), (-1, 128, "INT16"), (-(2**15), 2**15 - 1, "INT16"), (-(2**15), 2**15 - 2, "INT16")])
def test_activations_take_the_smallest_type_and_are_clipped_where_it_goes_on(qmin, qmax, kind, tmp_path):
    grid = eq.Grid(np.array([0.25]), np.array([3.0]), qmin, qmax)
    graph = eq.Graph({"x": (2,)}, [eq.Node("y", FakeQuantize(grid), ["x"])], ["y"])
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", graph)
    model = onnx.load(tmp_path / "net.onnx")
    (zero_point,) = (t for t in model.graph.initializer if t.name.endswith("zero_point"))
    ends = np.iinfo(kind.lower())
    clips = [kind for kind, end in (("Max", qmin != ends.min), ("Min", qmax != ends.max)) if end]
    assert zero_point.data_type == getattr(TensorProto, kind)
    assert [n.op_type for n in model.graph.node if n.op_type not in ("QuantizeLinear", "DequantizeLinear")] == clips
    assert (model.opset_import[0].version >= 21) == (ends.bits > 8)
    x = np.float32([[-1e9, 1e9], [0.3, -0.3], [(qmin - 3) / 4, (qmax - 3) / 4]])
    expected = 0.25 * (np.clip(np.rint(x / 0.25) + 3, qmin, qmax) - 3)
    assert np.array_equal(small.run_ort(tmp_path / "net.onnx", {"x": x})["y"], expected)


@pytest.mark.parametrize(("qmin", "qmax", "kind"), [(0, 15, "UINT4"), (-8, 7, "INT4"), (-1, 14, "INT8"), (0, 16, "UINT8"), (-9, 7, "INT8")])
def test_weights_take_the_smallest_type(qmin, qmax, kind, tmp_path):
    whole = np.array([[qmin, qmax, 3], [0, 1, 2]])
    layer = eq.Dense((0.5 * (whole - 2)).astype(np.float32), grid=eq.Grid(np.array([0.5]), np.array([2.0]), qmin, qmax))
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", eq.Graph({"x": (3,)}, [eq.Node("y", layer, ["x"])], ["y"]))
    model = onnx.load(tmp_path / "net.onnx")
    (stored,) = (t for t in model.graph.initializer if t.name.endswith("weight.int"))
    assert stored.data_type == getattr(TensorProto, kind) and np.array_equal(numpy_helper.to_array(stored).astype(int), whole)
    assert (model.opset_import[0].version >= 21) == (qmax - qmin < 16)


def test_only_what_an_integer_kernel_would_refuse_is_hidden(tmp_path):
    """A LeakyReLU whose steps are much finer than those of its input; and of what has a grid for each channel, both ends of every pair."""
    coarse, fine = (eq.Grid(np.array([scale]), np.array([0.0]), -128, 127) for scale in (1.0, 2.0**-10))
    graph = eq.Graph({"x": (2,)}, [eq.Node("x8", FakeQuantize(coarse), ["x"]), eq.Node("act", eq.LeakyReLU(0.001), ["x8"]),
                                   eq.Node("y", FakeQuantize(fine), ["act"])], ["y"])
    for net, hidden in ((graph, 0), (quantized(eq.Graph.chain((2,), act=eq.Softmax()), activations=eq.UniformQuantizer(
            8, symmetric=False, granularity="per_channel")), 4)):
        eqfact.onnx.save_qdq(tmp_path / "net.onnx", net)
        assert [n.op_type for n in onnx.load(tmp_path / "net.onnx").graph.node].count("Sum") == hidden
        assert steps_apart(net, tmp_path / "net.onnx").max() <= 1


def test_a_bias_beyond_what_32_bits_hold_beside_the_products_stays_in_float(tmp_path):
    """Of a double network, whose steps float32 rounds up: counted in those, the bias would just fit."""
    step = 1 - 2.0**-26
    grid = eq.Grid(np.array([1.0]), np.array([0.0]), -128, 127)
    room = 2**31 - 1 - 128 * 2
    for whole, stored in ((room - 8, True), (room + 8, False)):
        layer = eq.Dense(np.array([[2 * step]]), np.array([whole * step]), grid=eq.Grid(np.array([step]), np.array([0.0]), -128, 127))
        graph = eq.Graph({"x": (1,)}, [eq.Node("x8", FakeQuantize(grid), ["x"]), eq.Node("y", layer, ["x8"])], ["y"])
        eqfact.onnx.save_qdq(tmp_path / "net.onnx", graph)
        kinds = [t.data_type for t in onnx.load(tmp_path / "net.onnx").graph.initializer if "bias" in t.name]
        assert (TensorProto.INT32 in kinds) == stored


def test_four_bits_where_the_opset_has_them(net, tmp_path):
    graph = quantized(net, eq.UniformQuantizer(4))
    eqfact.onnx.save_qdq(tmp_path / "imported.onnx", graph)  # from a file of opset 17: kept
    kinds = {t.data_type for t in onnx.load(tmp_path / "imported.onnx").graph.initializer if t.name.endswith(".int")}
    assert TensorProto.INT8 in kinds and TensorProto.INT4 not in kinds
    assert onnx.load(tmp_path / "imported.onnx").opset_import[0].version == 17
    _, model, tensors = one_layer(eq.Dense(floats(4, 6)), (6,), eq.UniformQuantizer(4), tmp_path)
    assert tensors["y.float.weight.int"].data_type == TensorProto.INT4 and model.opset_import[0].version == 21


def test_grids_that_are_narrower_than_their_type_saturate_where_they_end(tmp_path):
    x = np.float32([[-10.0, 0.3, 10.0]])
    graph = eq.Graph({"x": (3,)}, [eq.Node("y", eq.ReLU(), ["x"])], ["y"])
    stats = eq.calibrate(graph, [np.float32([[-1.0, 0.5, 1.0]])])
    q = eq.quantize(graph, stats=stats, activations=eq.UniformQuantizer(5, symmetric=False), outputs=True)
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", q)
    small.close(small.run_ort(tmp_path / "net.onnx", {"x": x}), {"y": eq.forward(q, x)}, 1e-6)


def test_ops_that_only_move_entries_have_a_pair_of_their_own(tmp_path):
    graph = eq.Graph({"x": (2, 4, 4)}, [eq.Node("p", eq.MaxPool(2), ["x"]), eq.Node("f", eq.Flatten(), ["p"]),
                                       eq.Node("y", eq.Dense(floats(3, 8), floats(3)), ["f"])], ["y"])
    q = quantized(graph)
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", q)
    kinds = [n.op_type for n in onnx.load(tmp_path / "net.onnx").graph.node]
    assert kinds[:8] == ["QuantizeLinear", "DequantizeLinear", "MaxPool", "QuantizeLinear", "DequantizeLinear", "Flatten", "QuantizeLinear",
                         "DequantizeLinear"]
    assert steps_apart(q, tmp_path / "net.onnx").max() == 0


@pytest.mark.parametrize("weights", [eq.UniformQuantizer(8), eq.UniformQuantizer(8, symmetric=False), eq.UniformQuantizer(4)],
                         ids=["signed", "unsigned", "4 bits"])
def test_shared_weights_are_stored_once(weights, tmp_path):
    fc = eq.Dense(floats(3, 3), floats(3))
    graph = eq.Graph({"x": (3,)}, [eq.Node("a", fc, ["x"]), eq.Node("turned", eq.Permute((2, 0, 1)), ["x"]), eq.Node("b", fc, ["turned"]),
                                   eq.Node("y", eq.ReLU(), ["a"]), eq.Node("c", fc, ["y"])], ["b", "c"])
    q = quantized(graph, weights)
    assert len({id(n.op.weight) for n in q.nodes if isinstance(n.op, eq.Dense)}) == 2  # the values that a and b read lie on one grid
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", q)
    stored = [t for t in onnx.load(tmp_path / "net.onnx").graph.initializer if t.name.endswith("weight.int")]
    assert len(stored) == 2
    assert steps_apart(q, tmp_path / "net.onnx").max() <= 1


def test_weights_that_two_layers_arrange_otherwise_are_stored_twice(tmp_path):
    one = eq.quantize(eq.Graph.chain((3, 5), a=eq.Conv(floats(3, 3, 2))), weights=eq.UniformQuantizer(8))["a"].op
    other = eq.ConvTranspose(one.weight, grid=one.grid)
    assert other.weight is one.weight
    graph = eq.Graph({"x": (3, 5)}, [eq.Node("a", one, ["x"]), eq.Node("b", other, ["a"])], ["b"])
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", graph)
    feeds = small.feeds_of(graph)
    small.close(small.run_ort(tmp_path / "net.onnx", feeds), small.run_eq(graph, feeds))


def test_names_of_layers_and_weights_survive(tmp_path):
    onnx.save(small.mini_inception(), tmp_path / "float.onnx")
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", quantized(eqfact.onnx.load(tmp_path / "float.onnx")))
    before, after = onnx.load(tmp_path / "float.onnx").graph, onnx.load(tmp_path / "net.onnx").graph
    assert {o for n in before.node for o in n.output} <= {o for n in after.node for o in n.output}
    made = {n.name: list(n.input) for n in after.node}
    for conv in (n for n in before.node if n.op_type == "Conv"):
        assert made[conv.name][1:] == list(conv.input)[1:]  # the dequantized weight and bias have the names of the float ones


def test_no_name_that_is_made_takes_one_that_is_there(tmp_path):
    """Under each name that the writer makes, given to a value or to a parameter of the network, the file computes the same."""
    def net(value="b", parameter=""):
        origin = Origin("", {"bias": parameter} if parameter else {})
        return quantized(eq.Graph({"x": (4,)}, [
            eq.Node("a", eq.Dense(floats(4, 4), floats(4)), ["x"]), eq.Node("r", eq.Clip(-0.5, 1.5), ["a"]),
            eq.Node(value, eq.Dense(floats(4, 4, seed=3), floats(4, seed=4)), ["r"], origin), eq.Node("s", eq.Softmax(), [value]),
            eq.Node("y", eq.Dense(floats(2, 4), floats(2)), ["s"])], ["y"]), activations=eq.UniformQuantizer(7, symmetric=False))

    def run(graph):
        eqfact.onnx.save_qdq(tmp_path / "net.onnx", graph)
        return onnx.load(tmp_path / "net.onnx").graph, small.run_ort(tmp_path / "net.onnx", {"x": floats(30, 4)})["y"]
    file, expected = run(net())
    made = {*(t.name for t in file.initializer), *(name for node in file.node for name in node.output)} - {"x", "a", "r", "b", "s", "y"}
    assert len(made) > 30
    for name in sorted(made):
        for graph in (net(value=name), net(parameter=name)):
            assert np.array_equal(run(graph)[1], expected), name


def test_double_networks_are_written_in_single(tmp_path):
    graph = eq.Graph({"x": (3,)}, [eq.Node("y", eq.Dense(floats(2, 3).astype(float)), ["x"])], ["y"])
    stats = eq.calibrate(graph, [floats(9, 3).astype(float)])
    q = eq.quantize(graph, weights=eq.UniformQuantizer(8), activations=ACTIVATIONS, stats=stats, outputs=True)
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", q)
    x = floats(4, 3)
    small.close(small.run_ort(tmp_path / "net.onnx", {"x": x}), {"y": eq.forward(q, x)}, float(q["y"].op.grid.scale[0]))


def test_half_networks_are_written_in_single(tmp_path):
    graph = eq.Graph({"x": (3,)}, [eq.Node("y", eq.Dense(floats(2, 3).astype(np.float16)), ["x"])], ["y"])
    stats = eq.calibrate(graph, floats(9, 3).astype(np.float16))
    q = eq.quantize(graph, weights=eq.UniformQuantizer(8), activations=ACTIVATIONS, stats=stats, outputs=True)
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", q)
    x = floats(4, 3).astype(np.float16)
    theirs = small.run_ort(tmp_path / "net.onnx", {"x": x.astype(np.float32)})
    small.close(theirs, {"y": eq.forward(q, x).astype(np.float32)}, float(q["y"].op.grid.scale[0]))


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("size", [1e-50, 1e42])
def test_scales_that_float32_cannot_hold_are_refused(size, tmp_path):
    graph = eq.Graph({"x": (3,)}, [eq.Node("y", eq.Dense(floats(2, 3).astype(float)), ["x"])], ["y"])
    stats = eq.calibrate(graph, size * floats(9, 3).astype(float))
    q = eq.quantize(graph, weights=eq.UniformQuantizer(8), activations=ACTIVATIONS, stats=stats)
    with pytest.raises(OnnxError, match=r"net.onnx: 'x.quantized' lies on a grid of scale \S+ to \S+, which float32 cannot hold; quantize"):
        eqfact.onnx.save_qdq(tmp_path / "net.onnx", q)
    assert not (tmp_path / "net.onnx").exists()


def test_another_rounding_of_activations_is_refused(net, tmp_path):
    graph = quantized(net, activations=eq.UniformQuantizer(8, symmetric=False, rounding="half_up"))
    with pytest.raises(OnnxError, match=r"net.onnx: node .*half to even, the grid's rounding is 'half_up'"):
        eqfact.onnx.save_qdq(tmp_path / "net.onnx", graph)
    assert not (tmp_path / "net.onnx").exists()


def test_weights_that_left_their_grid_are_refused(tmp_path):
    graph = quantized(eq.Graph({"x": (3,)}, [eq.Node("y", eq.Dense(floats(2, 3)), ["x"])], ["y"]))
    op = graph["y.float"].op
    moved = graph.with_ops({"y.float": eq.Dense(op.weight * np.float32(1.3), grid=op.grid)})
    with pytest.raises(OnnxError, match=r"node 'y\.float': its weights do not lie on their grid"):
        eqfact.onnx.save_qdq(tmp_path / "net.onnx", moved)


def test_a_quantized_file_is_not_read_again(net, tmp_path):
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", quantized(net))
    with pytest.raises(OnnxError, match="quantized already"):
        eqfact.onnx.load(tmp_path / "net.onnx")
