"""Does onnxruntime, with all its optimizations, load every quantized network that is written, and compute what eqfact computes?

One table: every op that reads or makes a stored value, with every granularity, number of bits, kind of grid, with biases and without.
"""

import itertools
import shutil
import subprocess
import sys
import zlib

import numpy as np
import onnx
import onnx_models as small
import pytest
from onnx import helper

import eqfact as eq
import eqfact.onnx
from eqfact.onnx.running import EXACT_SUMS, run
from eqfact.quantization import grid_of


def floats(*shape, seed=5):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_weights(op, *shape, **options):
    return lambda biased: op(floats(*shape), floats(shape[0], seed=6) if biased else None, **options)


#: What reads an input (4, 6), (4,), (4, 6, 6) or (24,), and whether it has a bias to leave out.
LAYERS = {
    "Dense": ((4,), with_weights(eq.Dense, 4, 4)),
    "Conv": ((4, 6), with_weights(eq.Conv, 4, 4, 2)),
    "Conv 2d": ((4, 6, 6), with_weights(eq.Conv, 4, 4, 2, 2, padding=1)),
    "depthwise": ((4, 6), with_weights(eq.Conv, 4, 1, 3, groups=4)),
    "grouped": ((4, 6), with_weights(eq.Conv, 4, 2, 3, groups=2)),
    "ConvTranspose": ((4, 6), with_weights(eq.ConvTranspose, 4, 4, 2, stride=2)),
    "grouped ConvTranspose": ((4, 6), with_weights(eq.ConvTranspose, 4, 2, 2, stride=2, groups=2)),
}
BATCH_NORM = eq.BatchNorm(floats(4), floats(4), floats(4), np.abs(floats(4)) + np.float32(0.1))
OTHERS = [
    eq.Identity(), eq.ReLU(), eq.LeakyReLU(0.1), eq.PReLU(np.float32([0.1, 0.2, 0.3, 0.4])), eq.Clip(0.0, 1.0),
    eq.Clip(-0.5, np.float32([0.5, 1, 2, 3])), eq.MaxPool(2), eq.AvgPool(2), eq.GlobalAvgPool(), eq.Pad(1), eq.Upsample(2), eq.Flatten(),
    eq.Unflatten((2, 2, 6)), eq.Transpose((1, 0)), eq.Slice(1, 3), eq.Permute((3, 1, 0, 2)), eq.Sigmoid(), eq.HardSigmoid(), eq.Tanh(),
    eq.SiLU(), eq.HardSwish(), eq.Erf(), eq.GELU(), eq.Softmax(), BATCH_NORM, eq.Add(), eq.Mul(), eq.Concat(), eq.Sub(), eq.Max(), eq.Min(),
    eq.Abs(), eq.MinPool(2), eq.LpPool(2), eq.Blend(floats(3, 6)), eq.Extend(floats(2, 6)),
    eq.LayerNorm(floats(4), floats(4)), eq.RMSNorm(floats(4)), eq.GroupNorm(2, floats(4), floats(4)), eq.InstanceNorm(floats(4), floats(4)),
    eq.Softmax(-1, np.where(np.arange(6) < 4, floats(4, 6), -np.inf).astype(np.float32)), eq.Rotary(2, floats(1, 6), floats(1, 6, seed=6)),
    eq.Sloped(eq.SiLU(), np.abs(floats(4))), eq.Sloped(eq.GELU(), 0.5), eq.Sloped(eq.HardSwish(), np.abs(floats(4))),
    eq.Scores(2, scale=0.7), eq.Scores(2, 1), eq.Mix(2), eq.Mix(2, 1),
]
OPS = [*LAYERS, *OTHERS]
WEIGHTS = [None, *(eq.UniformQuantizer(bits, symmetric=symmetric, **granularity) for granularity, symmetric, bits in itertools.product(
    ({}, {"granularity": "per_channel"}, {"granularity": "per_group", "group_size": 2}), (True, False), (4, 8, 16)))]
ACTIVATIONS = [None, *(eq.UniformQuantizer(bits, symmetric=symmetric, granularity=granularity) for granularity, symmetric, bits in
                       itertools.product(("per_tensor", "per_channel"), (True, False), (4, 8, 16)))]


def name_of(op):
    if isinstance(op, str):
        return op
    more = np.size(getattr(op, "high", 0)) > 1 or getattr(op, "mask", None) is not None or getattr(op, "kv_heads", 2) == 1
    return type(op).__name__ + "s" * more


def network(op, biased):
    """A network in which the op reads a stored value and makes one, which a layer reads."""
    if isinstance(op, (eq.Add, eq.Sub, eq.Max, eq.Min, eq.Mul, eq.Concat)):
        first = [eq.Node("p", eq.Conv(floats(4, 4, 1)), ["x"]), eq.Node("r", eq.ReLU(), ["p"]), eq.Node("op", op, ["r", "x"])]
        shape = (4, 6)
    elif isinstance(op, (eq.Scores, eq.Mix)):
        first = [eq.Node("p", eq.Conv(floats(2 * op.kv_heads, 4, 1)), ["x"]), eq.Node("op", op, ["x", "p"])]
        if isinstance(op, eq.Mix):
            first[1:] = [eq.Node("t", eq.Scores(2, op.kv_heads), ["x", "p"]), eq.Node("r", eq.Softmax(-1), ["t"]),
                         eq.Node("op", op, ["r", "p"])]
        shape = (4, 6)
    else:
        shape, made = ((24,) if isinstance(op, eq.Unflatten) else (4, 6), op) if not isinstance(op, str) else (
            LAYERS[op][0], LAYERS[op][1](biased))
        first = [eq.Node("op", made, ["x"])]
    channels, *space = eq.Graph({"x": shape}, first, ["op"]).shapes["op"]
    layer = eq.Conv if space else eq.Dense
    return eq.Graph({"x": shape}, [*first, eq.Node("y", layer(floats(3, channels, *(1 for _ in space), seed=7),
                                                              floats(3, seed=8) if biased else None), ["op"])], ["y"])


def steps_apart(quantized, path, x):
    """By how many steps of its grid the output is apart, per entry; outputs in float by 255ths of the largest."""
    ours, theirs = eq.forward(quantized, x), run(path, {"x": x}, optimized=True, entries=EXACT_SUMS)["y"]
    grid = grid_of(quantized, "y")
    step = np.abs(ours).max() / 255 if grid is None else grid.scale.reshape(-1, *(1,) * (ours.ndim - 2))
    return np.abs(ours - theirs) / step


@pytest.mark.parametrize("op", OPS, ids=name_of)
def test_every_op_runs_on_every_grid_and_with_every_weight(op, tmp_path):
    """A sixth of all pairs of quantizers for each op, another sixth for every next; all pairs were run once."""
    start = zlib.crc32(name_of(op).encode())
    pairs = [pair for i, pair in enumerate(itertools.product(WEIGHTS, ACTIVATIONS)) if (i + start) % 6 == 0]
    for i, (weights, activations) in enumerate(pairs):
        graph = network(op, biased=bool(i % 2))
        x = floats(9, *graph.inputs["x"], seed=9)
        quantized = eq.quantize(graph, weights=weights, activations=activations, stats=eq.calibrate(graph, x), outputs=bool(i // 2 % 2),
                                biases=i % 5 != 4)
        eqfact.onnx.save_qdq(tmp_path / "net.onnx", quantized)
        apart = steps_apart(quantized, tmp_path / "net.onnx", x)
        # float sums between two steps may part, and 16 bits are finer than the rounding of float sums
        fine = activations is not None and activations.bits == 16
        assert np.quantile(apart, 0.95) < (2.01 if fine else 0.01), (weights, activations, i, apart.max())


@pytest.mark.parametrize("activations", [eq.UniformQuantizer(8, symmetric=False), eq.UniformQuantizer(16, symmetric=False), None], ids=str)
@pytest.mark.parametrize("weights", [eq.UniformQuantizer(8), eq.UniformQuantizer(8, symmetric=False), eq.UniformQuantizer(4),
                                     eq.UniformQuantizer(4, granularity="per_group", group_size=16),
                                     eq.UniformQuantizer(8, granularity="per_channel")], ids=str)
@pytest.mark.parametrize("kind", ["MatMul", "MatMul, Add", "Gemm"])
def test_products_with_weights_in_by_out_are_not_rounded_once_more(kind, weights, activations, tmp_path):
    """onnxruntime makes MatMulNBits of them, which quantizes what it reads by itself, blockwise, in 8 bits: networks that came with such
    weights were off by hundreds of steps of 16 bits."""
    nodes = []
    for source, w, b, made in (("x", "w", "b", "h"), ("r", "v", "c", "y")):
        if kind == "Gemm":
            nodes.append(helper.make_node("Gemm", [source, w, b], [made]))
        else:
            last = made if kind == "MatMul" else f"{made}.product"
            nodes += [helper.make_node("MatMul", [source, w], [last]), *([helper.make_node("Add", [last, b], [made])] * (last != made))]
        nodes += [helper.make_node("Relu", ["h"], ["r"])] * (made == "h")
    constants = {"w": floats(64, 64), "b": floats(64), "v": floats(64, 7), "c": floats(7)}
    model = small.model(nodes, {"x": ["N", 64]}, ["y"], constants, opset=21)
    model.ir_version = 10
    onnx.save(model, tmp_path / "float.onnx")
    graph = eqfact.onnx.load(tmp_path / "float.onnx")
    x = floats(20, 64, seed=9)
    quantized = eq.quantize(graph, weights=weights, activations=activations, stats=eq.calibrate(graph, x), outputs=activations is not None)
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", quantized)
    apart = steps_apart(quantized, tmp_path / "net.onnx", x)
    fine = activations is not None and activations.bits == 16
    assert np.quantile(apart, 0.95) < (2.01 if fine else 0.01)
    assert apart.max() < 2.01


@pytest.mark.parametrize("pool", [eq.GlobalAvgPool(), eq.AvgPool(16)], ids=name_of)
def test_averages_run_however_small_they_are_beside_what_they_are_of(pool, tmp_path):
    x = np.tile(np.float32([1, -1]), 8)[None, None] * np.float32([[[1.0]], [[0.5]]])
    for size in 2.0 ** np.arange(-30, 0, 3):
        graph = eq.Graph.chain((1, 16), pool=pool, y=eq.Conv(floats(3, 1, 1)))
        x[:, :, 0] += np.float32(size)
        quantized = eq.quantize(graph, weights=eq.UniformQuantizer(8), activations=eq.UniformQuantizer(8), stats=eq.calibrate(graph, x),
                                outputs=True)
        eqfact.onnx.save_qdq(tmp_path / "net.onnx", quantized)
        assert steps_apart(quantized, tmp_path / "net.onnx", x).max() < 1.01


@pytest.mark.parametrize("activations", [a for a in ACTIVATIONS if a is not None and a.granularity == "per_channel"], ids=str)
@pytest.mark.parametrize("op", ["Conv", *(op for op in OTHERS if not isinstance(
    op, (eq.Flatten, eq.Unflatten, eq.Transpose, eq.Slice, eq.Scores)))], ids=name_of)
def test_a_value_of_one_channel_between_values_of_many(op, activations, tmp_path):
    """Its grid has one scale, whatever the granularity, and what is made of it has many, and the other way round."""
    graph = network(op, biased=False)
    one = eq.Graph({"x": (1, 6)}, [eq.Node("wide", eq.Conv(floats(4, 1, 1)), ["x"]), *(
        eq.Node(node.name, node.op, ["wide" if i == "x" else i for i in node.inputs]) for node in graph),
        eq.Node("s", eq.Sigmoid(), ["y"]), eq.Node("last", eq.Conv(floats(1, 3, 1)), ["s"]), eq.Node("c", eq.Sigmoid(), ["last"]),
        eq.Node("z", eq.Conv(floats(2, 1, 1)), ["c"])], ["z"])
    x = floats(9, 1, 6, seed=9)
    quantized = eq.quantize(one, weights=eq.UniformQuantizer(8), activations=activations, stats=eq.calibrate(one, x), outputs=True)
    eqfact.onnx.save_qdq(tmp_path / "net.onnx", quantized)
    theirs = run(tmp_path / "net.onnx", {"x": x}, optimized=True, entries=EXACT_SUMS)["z"]
    ours, scale = eq.forward(quantized, x), quantized["z"].op.grid.scale.reshape(-1, 1)
    assert np.quantile(np.abs(ours - theirs) / scale, 0.9) < 2.01


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("op", ["Dense", "Conv", "Conv 2d", "depthwise", "grouped"])
def test_layers_of_8_bits_still_run_in_integers(op, biased, tmp_path):
    """What is hidden from engines is what they would get wrong, and no more; a group that holds all inputs of a channel is a channel."""
    for weights in (w for w in WEIGHTS if w is not None and w.bits == 8 and (w.symmetric or w.granularity == "per_tensor")):
        graph = network(op, biased)
        x = floats(9, *graph.inputs["x"], seed=9)
        quantized = eq.quantize(graph, weights=weights, activations=eq.UniformQuantizer(8, symmetric=False), stats=eq.calibrate(graph, x),
                                outputs=True)
        eqfact.onnx.save_qdq(tmp_path / "net.onnx", quantized)
        small.run_ort(tmp_path / "net.onnx", {"x": x}, integers=tmp_path / "run.onnx")
        kinds = [n.op_type for n in onnx.load(tmp_path / "run.onnx").graph.node]
        grouped = weights.granularity == "per_group"
        expected = 0 if grouped and op in ("Dense", "Conv", "Conv 2d") else 1 if grouped else 2
        assert kinds.count("QLinearConv") + kinds.count("QGemm") == expected, (weights, kinds)


def test_a_layer_whose_sums_do_not_fit_is_refused(tmp_path):
    """One made by hand: its weights fit, its bias fits, and an engine would wrap their sum."""
    grid = eq.Grid(np.full((1, 1), 1e-5), np.zeros((1, 1)), -128, 127)
    op = eq.Dense(np.float32([[127e-5]]), np.float32([21474.6]), grid=grid)
    read, out = (eq.FakeQuantize(eq.Grid(np.full(1, scale), np.zeros(1), 0, 255)) for scale in (1.0, 85.0))
    step = float(np.float32(1e-5))
    graph = eq.Graph.chain((1,), q=read, fc=op, y=eq.FakeQuantize(out.grid, np.array([step])))
    with pytest.raises(eqfact.onnx.OnnxError, match=r"node 'y': it rounds sums in steps of 1e-05, and 'fc' is made in no steps, or sums "
                                                    r"that 32 bits may not hold; quantize the network again, after all changes"):
        eqfact.onnx.save_qdq(tmp_path / "net.onnx", graph)
    assert not (tmp_path / "net.onnx").exists()


# ------------------------------------------------------------------------------------------------ processors without VNNI

#: Runs files in onnxruntime, in default sessions and with exact sums, and keeps the outputs.
SCRIPT = """
import sys
import numpy as np
import onnxruntime
x, made = np.load("x.npy"), {}
for name in sys.argv[1:]:
    for exact in "01":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.x64quantprecision", exact)
        session = onnxruntime.InferenceSession(f"{name}.onnx", options, providers=["CPUExecutionProvider"])
        made[f"{name} {exact}"] = session.run(["y"], {"x": x})[0]
np.savez("made.npz", **made)
"""


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind, whose processor has no VNNI")
def test_remedies_are_exact_on_a_processor_that_adds_pairs_in_16_bits(tmp_path):
    """With weights and activations near their largest, 8 bits saturate there; 7 bits do not, nor does the session with exact sums.

    Layers that share signed weights load there, too.
    """
    rng = np.random.default_rng(0)

    def large(*shape):
        signs = np.where(np.arange(shape[0]) % 2, 1, -1).reshape(-1, *(1,) * (len(shape) - 1))
        return (rng.uniform(0.8, 1, shape) * signs).astype(np.float32)
    x = rng.uniform(0.5, 1, (20, 8, 6)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    shared = eq.Conv(large(8, 8, 3), large(8), padding=1)
    graph = eq.Graph({"x": (8, 6)}, [
        eq.Node("a", shared, ["x"]), eq.Node("b", shared, ["x"]), eq.Node("s", eq.Add(), ["a", "b"]), eq.Node("f", eq.Flatten(), ["s"]),
        eq.Node("y", eq.Dense(large(5, 48), large(5)), ["f"])], ["y"])
    ours = {}
    for bits, granularity in itertools.product((7, 8), ("per_tensor", "per_channel")):
        name = f"{bits}_{granularity}"
        quantized = eq.quantize(graph, weights=eq.UniformQuantizer(bits, granularity=granularity), stats=eq.calibrate(graph, x),
                                activations=eq.UniformQuantizer(8, symmetric=False), outputs=True)
        eqfact.onnx.save_qdq(tmp_path / f"{name}.onnx", quantized)
        ours[name] = eq.forward(quantized, x)
    subprocess.run(["valgrind", "--tool=none", "-q", sys.executable, "-c", SCRIPT, *ours], cwd=tmp_path, check=True, capture_output=True)
    with np.load(tmp_path / "made.npz") as made:
        equal = {name: np.array_equal(made[name], ours[name[:-2]]) for name in made}
    if equal["8_per_tensor 0"]:
        pytest.skip("this valgrind's processor adds exactly")
    assert equal == {f"{name} {exact}": exact == "1" or name.startswith("7") for name in ours for exact in "01"}
