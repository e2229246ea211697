"""Networks as the exporters of PyTorch write them, a row for each way that was once misread, refused or kept: understood whole, the same
function in onnxruntime, to the bit behind factors that are powers of two, and quantized there as here.
"""

import json
import re

import numpy as np
import onnx
import onnx.parser
import onnx_models as small
import pytest
from onnx import helper, numpy_helper

import eqfact as eq
import eqfact.onnx
from eqfact.__main__ import main
from eqfact.onnx import folding

EIGHT = {"weights": eq.UniformQuantizer(8), "activations": eq.UniformQuantizer(8, symmetric=False)}

#: Text of a graph of ``x`` (and ``ids``), of which N is the batch; shapes of its weights; integers; degrees of freedom.
JOINED = "a = Reshape(x, rows) b = Gemm{}(a, w, c) d = Reshape(b, tokens) e = Relu(d) f = Reshape(e, inner) h = Gemm(f, v) " \
         "y = Reshape(h, out)"
TOKENS = {"rows": [-1, 6], "tokens": [-1, 5, 4], "inner": [-1, 4], "out": [-1, 5, 7]}
TO_BATCH = "n = Shape<start=0,end=1>(x) s = Concat<axis=0>(n, rest) e = Expand(c, s) a = MatMul(x, w) "
X = "float[N,5,6] x"
ROWS = {
    "Conv1D of GPT-2": (X, JOINED.format(""), {"w": (6, 4), "c": (4,), "v": (4, 7)}, TOKENS, 4),
    "the same, transposed": (X, JOINED.format("<transB=1,alpha=0.5>"), {"w": (4, 6), "c": (1, 4), "v": (4, 7)}, TOKENS, 4),
    "features first": ("float[N,6,5] x", "t = Transpose<perm=[1,0,2]>(x) a = Reshape(t, rows) b = Gemm<transA=1>(a, w) r = Relu(b) "
                       "h = Gemm(r, v) y = Reshape(h, out)", {"w": (6, 4), "v": (4, 7)}, {"rows": [6, -1], "out": [-1, 5, 7]}, 4),
    "a sum with what is expanded": (X, TO_BATCH + "b = Add(a, e) r = Relu(b) y = MatMul(r, v)",
                                    {"w": (6, 4), "v": (4, 7), "c": (1, 5, 1)}, {"rest": [5, 1]}, 4),
    "a product with it": (X, TO_BATCH + "b = Mul(e, a) r = Relu(b) y = MatMul(r, v)", {"w": (6, 4), "v": (4, 7), "c": (4,)},
                          {"rest": [1, 4]}, 8),
    "a mask": (X, TO_BATCH + "k = MatMul(x, u) t = Transpose<perm=[0,2,1]>(k) p = MatMul(a, t) b = Add(p, e) z = Softmax<axis=-1>(b) "
               "m = MatMul(x, o) r = MatMul(z, m) y = MatMul(r, v)",
               {"w": (6, 4), "u": (6, 4), "o": (6, 4), "v": (4, 7), "c": (1, 5, 5)}, {"rest": [5, 5]}, 8),
    "one of Where": (X, TO_BATCH + "zero = Constant<value_float=0.0>() g = Greater(e, zero) b = Where(g, a, e) r = Relu(b) "
                     "y = MatMul(r, v)", {"w": (6, 4), "v": (4, 7), "c": (5, 1)}, {"rest": [5, 1]}, 4),
    "the size of whole numbers": ("int64[N,5] ids, float[N,5,6] x", "n = Shape<start=0,end=1>(ids) s = Concat<axis=0>(n, rest) "
                                  "a = MatMul(x, w) u = Unsqueeze(a, one) e = Expand(u, s) t = Transpose<perm=[0,2,1,3]>(e) r = Relu(t) "
                                  "f = Reshape(r, out) y = MatMul(f, v)", {"w": (6, 3), "v": (6, 7)},
                                  {"rest": [2, 5, 3], "one": [1], "out": [0, 5, 6]}, 3),
    "the size of a mask": ("int64[N,5] ids, float[N,5,6] x", "g = Equal(ids, one) k = Cast<to=7>(g) c = CumSum(k, axis) "
                           "n = Shape<start=0,end=1>(c) s = Concat<axis=0>(n, rest) a = MatMul(x, w) u = Unsqueeze(a, one) "
                           "e = Expand(u, s) t = Transpose<perm=[0,2,1,3]>(e) r = Relu(t) f = Reshape(r, out) y = MatMul(f, v)",
                           {"w": (6, 3), "v": (6, 7)}, {"rest": [2, 5, 3], "one": [1], "axis": 1, "out": [0, 5, 6]}, 3),
    "nothing beside": (X, "a = MatMul(x, w) p = Slice(a, zero, four, two) q = Slice(a, four, big, two) b = Concat<axis=-1>(q, p) "
                       "r = Relu(b) y = MatMul(r, v)", {"w": (6, 4), "v": (4, 7)}, {"zero": [0], "four": [4], "big": [99], "two": [2]}, 4),
    "nothing among three": (X, "a = MatMul(x, w) q = Slice(a, four, big, two) b = Concat<axis=-1>(x, q, a) r = Relu(b) y = MatMul(r, v)",
                            {"w": (6, 4), "v": (10, 7)}, {"four": [4], "big": [99], "two": [2]}, 4),
    **{f"{kind} of all": ("float[N,3,4,4] x", f"a = Conv(x, w) r = Relu(a) p = {kind}(r, axes) q = Mul(r, p) y = Conv(q, v)",
                          {"w": (4, 3, 1, 1), "v": (7, 4, 1, 1)}, {"axes": [1, 2, 3]}, 1)
       for kind in ("ReduceMean", "ReduceMax", "ReduceL2")},
    "ReduceSum of all": ("float[N,6] x", "a = MatMul(x, w) r = Abs(a) p = ReduceSum(r, axes) y = MatMul(p, v)", {"w": (6, 4), "v": (1, 7)},
                         {"axes": [1]}, 1),
    "a square": (X, "two = Constant<value_float=2.0>() a = MatMul(x, w) r = Relu(a) q = Pow(r, two) y = MatMul(q, v)",
                 {"w": (6, 4), "v": (4, 7)}, {}, 4),
    "a cube": (X, "three = Constant<value_int=3>() a = MatMul(x, w) r = Pow(a, three) y = MatMul(r, v)", {"w": (6, 4), "v": (4, 7)}, {}, 4),
    "the first power": (X, "one = Constant<value_float=1.0>() a = MatMul(x, w) b = Pow(a, one) r = Relu(b) y = MatMul(r, v)",
                        {"w": (6, 4), "v": (4, 7)}, {}, 4),
    "Einsum, the batch second": (X, 't = Transpose<perm=[1,0,2]>(x) a = Einsum<equation="ibh,hnd->ibnd">(t, w) r = Relu(a) '
                                 'b = Einsum<equation="ibnd,ndh->ibh">(r, v) y = Transpose<perm=[1,0,2]>(b)',
                                 {"w": (6, 2, 4), "v": (2, 4, 7)}, {}, 8),
    "Einsum, the batch last": (X, 't = Transpose<perm=[2,1,0]>(x) a = Einsum<equation="hib,hd->dib">(t, w) r = Relu(a) '
                               'y = Einsum<equation="dib,dh->bih">(r, v)', {"w": (6, 4), "v": (4, 7)}, {}, 4),
    **{f"{kind} in blocks": ("float[N,3,6,6] x", f"a = Conv(x, w) b = Reshape(a, blocks) c = {kind}<keepdims=0>(b, axes) y = Conv(c, v)",
                             {"w": (4, 3, 1, 1), "v": (7, 4, 1, 1)}, {"blocks": [0, 4, 3, 2, 3, 2], "axes": [3, 5]}, 4)
       for kind in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2")},
}
#: What is kept of these: what holds whole numbers and truths.
KEPT = {"the size of a mask": ["Equal", "Cast", "CumSum"]}


def written(path, row, batch):
    """The file of a row with a batch of this size, and data for it."""
    inputs, body, weights, integers, _ = row
    opset = 18 if "Reduce" in body else 17
    text = f'<ir_version: 8, opset_import: ["": {opset}]> g ({inputs}) => (float[N,unknown] y) {{ {body} }}'
    model = onnx.parser.parse_model(text.replace("[N", f"[{batch}"))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in weights.items()}
    arrays |= {name: np.array(values, np.int64) for name, values in integers.items()}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    onnx.save(model, path)
    count = 3 if batch == "N" else batch
    shapes = {name: (kind, [count, *map(int, sizes.split(","))]) for kind, sizes, name in re.findall(r"(\w+)\[N,([\d,]+)\] (\w+)", inputs)}
    return {name: rng.normal(size=shape).astype(np.float32) if kind == "float" else np.ones(shape, np.int64)
            for name, (kind, shape) in shapes.items()}


@pytest.fixture(params=[(name, batch) for name in ROWS for batch in ("N", 1, 2)], ids=str)
def exported(request, tmp_path):
    name, batch = request.param
    path = tmp_path / "net.onnx"
    return path, written(path, ROWS[name], batch), ROWS[name][-1], KEPT.get(name, [])


def test_exported_networks_are_understood_whole(exported):
    path, feeds, free, kept = exported
    opened = eqfact.onnx.open(path, feeds)
    assert [k.op_type for k in opened.kept] == kept and eq.degrees_of_freedom(opened.graph) == free
    verdict = eqfact.onnx.check(path, opened.graph, feeds)
    assert verdict, verdict.message


def test_factors_of_powers_of_two_change_no_bit_of_them(exported):
    path, feeds, free, _ = exported
    opened = eqfact.onnx.open(path, feeds)
    powers = np.append(1, 2.0 ** np.random.default_rng(1).integers(-3, 4, free))
    opened.save(path.with_name("out.onnx"), eq.Factorization(eq.channels(opened.graph), powers).apply(opened.graph))
    truth, made = (small.run_ort(path.with_name(name), feeds)["y"] for name in ("net.onnx", "out.onnx"))
    assert truth.shape == made.shape and np.array_equal(truth, made)


def test_they_are_quantized_in_onnxruntime_as_here(exported):
    path, feeds, *_ = exported
    opened = eqfact.onnx.open(path, feeds)
    data = opened.boundary(feeds)
    quantized = eq.quantize(opened.graph, stats=eq.calibrate(opened.graph, data), **EIGHT)
    opened.save_qdq(path.with_name("q.onnx"), quantized)
    truth, made = (small.run_ort(path.with_name(name), feeds)["y"] for name in ("net.onnx", "q.onnx"))
    here = eq.sqnr(eq.forward(opened.graph, data), eq.forward(quantized, data))
    assert here > 15 and eq.sqnr(truth, made) == pytest.approx(here, abs=0.5)


def test_a_size_that_depends_on_the_data_is_no_constant(tmp_path):
    """As many entries as are not zero: what takes its size from there is kept."""
    row = ("int64[N,5] ids, float[N,5,6] x", "z = NonZero(ids) n = Shape(z) c = Cast<to=1>(n) s = ReduceSum<keepdims=0>(c) "
           "a = MatMul(x, w) r = Relu(a) m = MatMul(r, v) y = Add(m, s)", {"w": (6, 3), "v": (3, 7)}, {}, 3)
    feeds = written(tmp_path / "net.onnx", row, "N")
    opened = eqfact.onnx.open(tmp_path / "net.onnx", feeds)
    assert "Shape" in [k.op_type for k in opened.kept]
    feeds["ids"][0] = 0
    powers = np.array([1, 0.5, 4, 2])
    opened.save(tmp_path / "out.onnx", eq.Factorization(eq.channels(opened.graph), powers).apply(opened.graph))
    truth, made = (small.run_ort(tmp_path / name, feeds)["y"] for name in ("net.onnx", "out.onnx"))
    assert np.array_equal(truth, made)


@pytest.mark.parametrize("ir_version", [3, 8])
@pytest.mark.parametrize("last", ["Identity", "CumSum"])
def test_weights_listed_among_the_inputs_are_equalized_and_quantized(ir_version, last, tmp_path, capsys):
    """As exporters did before IR 4, and may still; with a node that is kept the file is written into, else it may be written anew."""
    weights = {"w": normal(8, 3, 1, 1), "b": 3 * normal(8), "v": normal(4, 8, 1, 1), "axis": np.array(2)}
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c"]), helper.make_node("Relu", ["c"], ["r"]),
             helper.make_node("Conv", ["r", "v"], ["o"]), helper.make_node(last, ["o", "axis"] if last == "CumSum" else ["o"], ["y"])]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    infos = [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in initializers]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3, 5, 5])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 4, 5, 5])
    model = helper.make_model(helper.make_graph(nodes, "g", [x, *infos], [y], initializers), opset_imports=[helper.make_opsetid("", 11)],
                              ir_version=ir_version)
    path, data = tmp_path / "net.onnx", normal(2, 3, 5, 5)
    onnx.save(model, path)
    np.savez(tmp_path / "data.npz", x=data)
    for command in ("equalize", "quantize"):
        assert main([command, str(path), "-o", str(tmp_path / "out.onnx"), "--data", str(tmp_path / "data.npz")]) == 0, capsys.readouterr()
        truth, made = (small.run_ort(p, {"x": data})["y"] for p in (path, tmp_path / "out.onnx"))
        assert eq.sqnr(truth, made) > (100 if command == "equalize" else 20)


def test_weights_stored_in_half_are_of_the_type_that_they_are_cast_to(tmp_path):
    """As onnxruntime's optimizer writes networks in float16 for processors without it."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[N,3,5,5] x) => (float[N,4,5,5] y)
              { w = Cast<to=1>(half_w) v = Cast<to=1>(half_v) c = Conv(x, w) r = Relu(c) y = Conv(r, v) }"""
    model = onnx.parser.parse_model(text)
    for name, shape in (("half_w", (8, 3, 1, 1)), ("half_v", (4, 8, 1, 1))):
        model.graph.initializer.append(numpy_helper.from_array(normal(*shape).astype(np.float16), name))
    onnx.save(model, tmp_path / "net.onnx")
    graph = eqfact.onnx.load(tmp_path / "net.onnx")
    assert graph.dtype == np.float32 and eq.degrees_of_freedom(graph) == 8
    eqfact.onnx.save(tmp_path / "out.onnx", eq.equalize(graph).graph)
    truth, made = (small.run_ort(tmp_path / name, {"x": normal(2, 3, 5, 5)})["y"] for name in ("net.onnx", "out.onnx"))
    assert eq.sqnr(truth, made) > 100


CHANNELS_LAST = "c = Conv(t, w) u = Transpose<perm=[0,2,3,1]>(c) {} s = Transpose<perm=[0,3,1,2]>(m) d = Conv(s, v) "
#: Scalings that are folded into the layer before or behind, across moves and what is between.
SCALED = {"behind a ReLU": "r = Relu(u) m = Mul(r, k)", "behind what does nothing": "i = Cast<to=1>(u) r = Relu(i) m = Mul(r, k)",
          "of several": "a = Mul(u, k) r = Relu(a) i = Cast<to=1>(r) b = Sub(i, k) m = Mul(b, k)"}


@pytest.mark.parametrize("end", ["y = Transpose<perm=[0,2,3,1]>(d)", "z = Transpose<perm=[0,2,3,1]>(d) y = CumSum(z, axis)"])
@pytest.mark.parametrize("scaled", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("command", ["fold", "equalize", "equalize --no-fold", "quantize"])
def test_channels_last_networks_are_written_whatever_is_folded(command, scaled, end, tmp_path, capsys):
    """As Keras writes them. What has no place in the file is written anew, and compared in what is left of its tensors."""
    body = "t = Transpose<perm=[0,3,1,2]>(x) " + CHANNELS_LAST.format(scaled) + end
    row = ("float[N,5,5,3] x", body, {"w": (4, 3, 1, 1), "v": (5, 4, 1, 1), "k": (4,)}, {"axis": 1}, 0)
    feeds = written(tmp_path / "net.onnx", row, "N")
    np.savez(tmp_path / "data.npz", **feeds)
    data = [] if command == "fold" else ["--data", str(tmp_path / "data.npz")]
    line = [*command.split(), str(tmp_path / "net.onnx"), "-o", str(tmp_path / "out.onnx"), *data, "--json"]
    assert main(line) == 0, capsys.readouterr()
    facts = json.loads(capsys.readouterr().out)
    truth, made = (small.run_ort(tmp_path / name, feeds)["y"] for name in ("net.onnx", "out.onnx"))
    assert eq.sqnr(truth, made) > (15 if command == "quantize" else 100)
    if command == "quantize" and facts["run"]["expected_sqnr"]:
        assert facts["run"]["sqnr"] == pytest.approx(facts["run"]["expected_sqnr"], abs=0.3)


# ------------------------------------------------------------------------------------------------ constants


def normal(*shape):
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


def whole(*values):
    return np.array(values, np.int64)


#: Nodes whose inputs are all known, as exporters compute sizes, positions and masks: type, inputs, attributes.
CONSTANTS = [
    ("GatherElements", (normal(1, 64), np.arange(8)[None]), {"axis": 1}), ("GatherElements", (normal(70, 70), np.zeros((70, 70), int)), {}),
    ("GatherElements", (normal(3, 4, 2), whole(0, 2, 1, -1, 0, -3, 2, 1).reshape(2, 4, 1)), {"axis": 0}),
    ("GatherElements", (normal(3, 4), whole(0, -1, 3).reshape(3, 1)), {"axis": -1}),
    *((("LpNormalization"), (normal(2, 3), ), {"axis": axis, "p": p}) for axis in (0, -1) for p in (1, 2)),
    *(("Div", (np.array([-7, -3, 5, 8], kind), np.array([2, -2, 3, -3], kind)), {}) for kind in (np.int32, np.int64)),
    *(("Mod", (whole(-7, -3, 5, 8), whole(2, -2, 3, -3)), {"fmod": fmod}) for fmod in (0, 1)),
    ("Range", (np.int64(5), np.int64(-3), np.int64(-2)), {}), ("Range", (np.float32(0), np.float32(1), np.float32(0.1)), {}),
    *(("CumSum", (normal(3, 4), np.int64(-2)), {"exclusive": e, "reverse": r}) for e in (0, 1) for r in (0, 1)),
    *(("Trilu", (normal(2, 4, 5), np.int64(k)), {"upper": upper}) for k in (-2, 0, 3) for upper in (0, 1)),
    ("OneHot", (whole(1, -1, 3), np.int64(4), np.float32([0, 1])), {"axis": 0}),
    ("GatherND", (normal(2, 3, 4), whole(0, 2).reshape(2, 1)), {"batch_dims": 1}),
    ("GatherND", (normal(2, 3, 4), whole(0, 1, -1, 2).reshape(2, 1, 2)), {}), ("Gather", (normal(3, 4), whole(-1, 0)), {"axis": 1}),
    ("ScatterND", (normal(4, 3), whole(1, -1).reshape(2, 1), normal(2, 3)), {}),
    ("ScatterElements", (normal(3, 4), whole(1, 0, 2, 2).reshape(2, 2), normal(2, 2)), {"axis": 1}),
    ("Slice", (normal(5, 6), whole(-1, 4), whole(-99, 0), whole(0, 1), whole(-2, -3)), {}),
    ("Slice", (normal(5, 6), whole(4), whole(2), whole(0)), {}), ("Pad", (normal(3, 4), whole(1, 2, 0, 1), np.float32(3)), {}),
    *(("Pad", (normal(3, 4), whole(1, 2, 0, 1)), {"mode": mode}) for mode in ("edge", "reflect")),
    *(("ArgMax", (np.float32([[1, 3, 3], [2, 2, 1]]),), {"axis": 1, "select_last_index": last, "keepdims": last}) for last in (0, 1)),
    *((f"Reduce{kind}", (np.abs(normal(2, 3, 4)) + 1, whole(1, -1)), {"keepdims": 0})
      for kind in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSumExp", "SumSquare")),
    ("ReduceSum", (normal(2, 3), whole()), {"noop_with_empty_axes": 1}), ("ReduceMean", (whole(-7, 3, 5),), {}),
    *(("Cast", (np.array([-2.7, -1, 0, 0.5, 2.5]),), {"to": to}) for to in (1, 6, 7, 9, 10)),
    ("Round", (np.float32([-2.5, -1.5, 0.5, 1.5]),), {}),
    ("Tile", (normal(2, 3), whole(2, 1)), {}), ("Expand", (normal(3, 1), whole(2, 1, 4)), {}),
    ("Where", (np.array([[True], [False]]), normal(1, 3), normal(2, 1)), {}), ("NonZero", (np.float32([[0, 1], [2, 0]]),), {}),
    ("Reshape", (normal(2, 3, 4), whole(0, -1)), {}), ("Unsqueeze", (normal(3, 2), whole(-1, 0, 2)), {}),
    ("Shape", (normal(2, 3, 4),), {"start": 1, "end": -1}), ("ConstantOfShape", (whole(2, 0),), {}), ("EyeLike", (normal(3, 4),), {"k": 1}),
    ("TopK", (np.float32([[1, 1, 2, 2]]), whole(3)), {}), ("Softmax", (normal(2, 3, 4),), {"axis": 1}),
    ("MatMul", (normal(2, 1, 3, 4), normal(5, 4, 2)), {}), ("Einsum", (normal(2, 3, 4), normal(4, 5)), {"equation": "...k,kl->...l"}),
    ("Gemm", (normal(3, 2), normal(4, 3), normal(1, 1)), {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
]


@pytest.mark.parametrize("kind, inputs, attributes", CONSTANTS, ids=lambda value: value if isinstance(value, str) else "")
def test_constants_are_what_onnxruntime_makes_of_them(kind, inputs, attributes, tmp_path):
    feeds = {f"i{k}": np.asarray(value) for k, value in enumerate(inputs)}
    outputs = ["y", "z"] if kind == "TopK" else ["y"]
    node = helper.make_node(kind, list(feeds), outputs, **attributes)
    infos = [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for name, a in feeds.items()]
    graph = helper.make_graph([node], "constant", infos, [onnx.ValueInfoProto(name=name) for name in outputs])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "net.onnx")
    truth = small.run_ort(tmp_path / "net.onnx", feeds)
    for name, made in zip(outputs, folding.computed(node, {"": 18}, feeds), strict=True):
        assert made.dtype == truth[name].dtype and made.shape == truth[name].shape
        assert np.allclose(made.astype(float), truth[name].astype(float), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("data, indices, axis", [((3, 4), (3, 1), 2), ((3, 4), (3,), 0), ((3, 1), (3, 4), 0), ((3, 4), (3, 5), 0)])
def test_entries_that_are_not_there_are_not_gathered(data, indices, axis):
    node = helper.make_node("GatherElements", ["a", "b"], ["y"], axis=axis)
    with pytest.raises(ValueError, match="it takes entries"):
        folding.computed(node, {"": 18}, {"a": normal(*data), "b": np.full(indices, 2)})
    with pytest.raises(ValueError, match="that are not there"):
        folding.computed(helper.make_node("GatherElements", ["a", "b"], ["y"]), {"": 18}, {"a": normal(3, 4), "b": np.full((3, 4), 3)})


def test_what_is_repeated_for_a_batch_that_stands_for_any_takes_no_memory(tmp_path):
    """A mask of a quarter of a million entries, for each of thousands of samples, is one mask; and nothing is computed of all of them."""
    row = (X.replace("5", "512"), TO_BATCH + "k = MatMul(x, u) t = Transpose<perm=[0,2,1]>(k) p = MatMul(a, t) {} z = Softmax<axis=-1>(b) "
           "m = MatMul(x, o) r = MatMul(z, m) y = MatMul(r, v)",
           {"w": (6, 4), "u": (6, 4), "o": (6, 4), "v": (4, 7), "c": (1, 512, 512)}, {"rest": [512, 512]}, 8)
    for added, kept in (("b = Add(p, e)", []), ("q = Neg(e) b = Add(p, q)", ["Neg"])):
        feeds = written(tmp_path / "net.onnx", (row[0], row[1].format(added), *row[2:]), "N")
        opened = eqfact.onnx.open(tmp_path / "net.onnx", feeds)
        assert [k.op_type for k in opened.kept] == kept


@pytest.mark.parametrize("window, kind", [
    ({"kernel": (1, 2, 1, 4)}, "ReduceMean"), ({"kernel": (1, 2, 1, 4), "stride": 1}, "ReduceMean"),
    ({"kernel": (1, 2, 1, 3)}, "AveragePool"), ({"kernel": (1, 1, 1, 4), "stride": (2, 1, 1, 1)}, "AveragePool"),
    ({"kernel": (1, 1, 1, 4), "padding": ((0, 0), (0, 0), (0, 0), (1, 1))}, "AveragePool")], ids=str)
def test_a_pool_over_four_axes_is_a_reduction_only_where_it_takes_in_all_of_some(window, kind, tmp_path):
    graph = eq.Graph({"x": (2, 3, 2, 3, 4)}, (eq.Node("y", eq.AvgPool(window.pop("kernel"), **window), ("x",)),), ("y",))
    eqfact.onnx.save(tmp_path / "net.onnx", graph)
    (written_node,) = onnx.load(tmp_path / "net.onnx").graph.node
    assert written_node.op_type == kind
    if kind == "ReduceMean":
        x = normal(2, 2, 3, 2, 3, 4)
        assert np.allclose(small.run_ort(tmp_path / "net.onnx", {"x": x})["y"], eq.forward(graph, x), atol=1e-6)
