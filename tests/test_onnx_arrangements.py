"""Every kind of node on every arrangement of a tensor's axes, with any batch, against onnxruntime: each is read right, or refused."""

import itertools

import numpy as np
import onnx
import onnx_models as small
import pytest
from onnx import helper

import eqfact as eq
import eqfact.onnx
from eqfact.onnx import OnnxError
from eqfact.onnx.views import View

node = helper.make_node
floats = small.normals(2)
ints = small.ints


#: A sample of x; and every arrangement t of it: how it is made, its shape with the batch as 0, and the way back.
X = (4, 2, 3)


def turned(*perm):
    back = [perm.index(i) for i in range(len(perm))]
    return [node("Transpose", ["x"], ["t"], perm=perm)], tuple((0, *X)[i] for i in perm), [node("Transpose", ["u"], ["y"], perm=back)], {}


def shaped(*shape):
    return [node("Reshape", ["x", "to"], ["t"])], shape, [node("Reshape", ["u", "back"], ["y"])], {"to": ints(*shape), "back": ints(-1, *X)}


ARRANGEMENTS = {
    "as it is": turned(0, 1, 2, 3),
    "channels last": turned(0, 2, 3, 1),
    "channels between": turned(0, 3, 1, 2),
    "batch second": turned(1, 0, 2, 3),
    "batch last": turned(1, 3, 2, 0),
    "space in one axis": shaped(0, 4, 6),
    "one axis": shaped(0, 24),
    "channels and rows in one axis": shaped(0, 8, 3),
    "channels in groups": shaped(0, 2, 2, 2, 3),
    "an axis of one": shaped(0, 4, 1, 6),
    "an axis of one behind": shaped(0, 4, 6, 1),
    "an axis of one in front": ([node("Unsqueeze", ["x", "at"], ["t"])], (1, 0, *X), [node("Squeeze", ["u", "at"], ["y"])],
                                {"at": ints(0)}),
    "one axis, and one of one in front": ([node("Reshape", ["x", "to"], ["t"])], (1, 0, 24), [node("Reshape", ["u", "back"], ["y"])],
                                          {"to": ints(1, -1, 24), "back": ints(-1, *X)}),
    "channels in groups, turned": ([node("Reshape", ["x", "to"], ["s"]), node("Transpose", ["s"], ["t"], perm=[0, 2, 1, 3])], (0, 2, 2, 6),
                                   [node("Transpose", ["u"], ["v"], perm=[0, 2, 1, 3]), node("Reshape", ["v", "back"], ["y"])],
                                   {"to": ints(0, 2, 2, 6), "back": ints(-1, *X)}),
    "channels and rows exchanged in part": (
        [node("Reshape", ["x", "to"], ["s1"]), node("Transpose", ["s1"], ["s"], perm=[0, 1, 3, 2, 4]), node("Reshape", ["s", "xs"], ["t"])],
        (0, *X),
        [node("Reshape", ["u", "to"], ["v"]), node("Transpose", ["v"], ["v1"], perm=[0, 1, 3, 2, 4]), node("Reshape", ["v1", "xs"], ["y"])],
        {"to": ints(0, 2, 2, 2, 3), "xs": ints(0, *X)}),
    "samples and pixels in one axis": ([node("Transpose", ["x"], ["s"], perm=[0, 2, 3, 1]), node("Reshape", ["s", "to"], ["t"])], (0, 4),
                                       [node("Reshape", ["u", "last"], ["v"]), node("Transpose", ["v"], ["y"], perm=[0, 3, 1, 2])],
                                       {"to": ints(-1, 4), "last": ints(-1, 2, 3, 4)}),
    "pixels and samples in one axis": ([node("Transpose", ["x"], ["s"], perm=[2, 3, 0, 1]), node("Reshape", ["s", "to"], ["t"])], (0, 4),
                                       [node("Reshape", ["u", "last"], ["v"]), node("Transpose", ["v"], ["y"], perm=[2, 3, 0, 1])],
                                       {"to": ints(-1, 4), "last": ints(2, 3, -1, 4)}),
    "rows and samples in one axis, the rest in another": (
        [node("Transpose", ["x"], ["s"], perm=[2, 0, 1, 3]), node("Reshape", ["s", "to"], ["t"])], (0, 12),
        [node("Reshape", ["u", "last"], ["v"]), node("Transpose", ["v"], ["y"], perm=[1, 2, 0, 3])],
        {"to": ints(-1, 12), "last": ints(2, -1, 4, 3)}),
    "columns, rows and samples in one axis": (
        [node("Transpose", ["x"], ["s"], perm=[3, 2, 0, 1]), node("Reshape", ["s", "to"], ["t"])], (0, 4),
        [node("Reshape", ["u", "last"], ["v"]), node("Transpose", ["v"], ["y"], perm=[2, 3, 1, 0])],
        {"to": ints(-1, 4), "last": ints(3, 2, -1, 4)}),
    "samples, columns and rows in one axis": (
        [node("Transpose", ["x"], ["s"], perm=[0, 3, 2, 1]), node("Reshape", ["s", "to"], ["t"])], (0, 4),
        [node("Reshape", ["u", "last"], ["v"]), node("Transpose", ["v"], ["y"], perm=[0, 3, 2, 1])],
        {"to": ints(-1, 4), "last": ints(-1, 3, 2, 4)}),
    "samples between pixels in one axis": ([node("Transpose", ["x"], ["s"], perm=[2, 0, 3, 1]), node("Reshape", ["s", "to"], ["t"])],
                                           (0, 4), [node("Reshape", ["u", "last"], ["v"]),
                                                    node("Transpose", ["v"], ["y"], perm=[1, 3, 0, 2])],
                                           {"to": ints(-1, 4), "last": ints(2, -1, 3, 4)}),
}
#: Nodes that make a tensor u of the shape of t. They are given its shape, in which only what is not the batch has a size.
KEEPING = {
    "Relu": lambda s: ([node("Relu", ["t"], ["u"])], {}),
    "Add of a number": lambda s: ([node("Add", ["t", "c"], ["u"])], {"c": np.float32(0.7)}),
    "Mul by the last axis": lambda s: ([node("Mul", ["c", "t"], ["u"])], {"c": floats(max(s[-1], 1))}),
    "Sub of the last but one": lambda s: ([node("Sub", ["c", "t"], ["u"])], {"c": floats(max(s[-2], 1), 1)}),
    "Add of a whole sample": lambda s: ([node("Add", ["t", "c"], ["u"])], {"c": floats(*(max(n, 1) for n in s))}),
    "Div by every second axis": lambda s: ([node("Div", ["t", "c"], ["u"])], {"c": 2 + np.abs(floats(*(
        n if n and i % 2 else 1 for i, n in enumerate(s))))}),
    "PRelu of the last axis": lambda s: ([node("PRelu", ["t", "c"], ["u"])], {"c": floats(max(s[-1], 1))}),
    "Max with the last axis": lambda s: ([node("Max", ["t", "c"], ["u"])], {"c": floats(max(s[-1], 1))}),
    "Clip": lambda s: ([node("Clip", ["t", "c"], ["u"])], {"c": np.float32(-0.3)}),
    "Softmax of the last axis": lambda s: ([node("Softmax", ["t"], ["u"], axis=-1)], {}),
    "Softmax of the second axis": lambda s: ([node("Softmax", ["t"], ["u"], axis=1)], {}),
    "Add of its own Relu": lambda s: ([node("Relu", ["t"], ["r"]), node("Add", ["t", "r"], ["u"])], {}),
    "Mul by its own mean": lambda s: ([node("ReduceMean", ["t"], ["r"], axes=[-1], keepdims=1), node("Mul", ["t", "r"], ["u"])], {}),
    "Add of its largest on the second axis": lambda s: (
        [node("ReduceMax", ["t"], ["r"], axes=[1], keepdims=1), node("Add", ["r", "t"], ["u"])], {}),
    "Concat and Slice of the last axis": lambda s: (
        [node("Relu", ["t"], ["r"]), node("Concat", ["t", "r"], ["c"], axis=-1), node("Slice", ["c", "a", "b", "axis"], ["u"])],
        {"a": ints(1), "b": ints(s[-1] + 1), "axis": ints(-1)}),
    "Gather of the last axis": lambda s: ([node("Gather", ["t", "i"], ["u"], axis=-1)], {"i": ints(*range(s[-1]))[::-1].copy()}),
    "Gather of the second axis": lambda s: ([node("Gather", ["t", "i"], ["u"], axis=1)], {"i": ints(*range(s[1]))[::-1].copy()}),
    "Pad that reflects, and Slice": lambda s: (
        [node("Pad", ["t", "p"], ["c"], mode="reflect"), node("Slice", ["c", "a", "b", "axis"], ["u"])], {
            "p": ints(*[0] * (len(s) - 1), 1, *[0] * len(s)), "a": ints(0), "b": ints(s[-1]), "axis": ints(-1)}),
    "Pad, and Slice": lambda s: ([node("Pad", ["t", "p"], ["c"]), node("Slice", ["c", "a", "b", "axis"], ["u"])], {
        "p": ints(*[0] * (2 * len(s) - 1), 1), "a": ints(1), "b": ints(s[-1] + 1), "axis": ints(-1)}),
    "Reshape to the shape of a MatMul": lambda s: (
        [node("MatMul", ["t", "c"], ["m"]), node("Shape", ["m"], ["to_m"]), node("Relu", ["t"], ["r"]),
         node("Reshape", ["r", "to_m"], ["q"]), node("Add", ["m", "q"], ["u"])], {"c": floats(max(s[-1], 1), max(s[-1], 1))}),
    "MatMul": lambda s: ([node("MatMul", ["t", "c"], ["u"])], {"c": floats(max(s[-1], 1), max(s[-1], 1))}),
    "Split and Concat of the last axis": lambda s: (
        [node("Split", ["t", "p"], ["a", "b"], axis=-1), node("Concat", ["b", "a"], ["u"], axis=-1)], {"p": ints(1, s[-1] - 1)}),
}
#: What is refused, and why: samples are computed one by one, and an axis of one entry is not divided.
REFUSED = {
    **{("batch last", kind): "axis (3|-1) is the batch" for kind in (
        "Softmax of the last axis", "Mul by its own mean", "Concat and Slice of the last axis", "Gather of the last axis",
        "Pad that reflects, and Slice", "Pad, and Slice", "MatMul", "Reshape to the shape of a MatMul",
        "Split and Concat of the last axis")},
    **{(arrangement, f"{kind} the second axis"): "axis 1 is the batch" for kind in ("Softmax of", "Gather of", "Add of its largest on")
       for arrangement in ("batch second", "an axis of one in front", "one axis, and one of one in front")},
    **{("samples between pixels in one axis", kind): "samples lie between entries of one axis" for kind in (
        "Concat and Slice of the last axis", "MatMul", "Pad, and Slice", "Reshape to the shape of a MatMul",
        "Split and Concat of the last axis", "Mul by its own mean", "Add of its largest on the second axis")},
    ("an axis of one behind", "Pad that reflects, and Slice"): "reflects along axis 3, which has 1 entries",
    ("an axis of one behind", "Split and Concat of the last axis"): "splits 1 entries",
}


@pytest.mark.parametrize("arrangement, kind", list(itertools.product(ARRANGEMENTS, KEEPING)))
def test_nodes_do_the_same_in_every_arrangement(arrangement, kind, tmp_path):
    before, shape, behind, constants = ARRANGEMENTS[arrangement]
    nodes, more = KEEPING[kind](shape)
    proto = small.model([*before, *nodes, *behind], {"x": ["N", *X]}, ["y"], {**constants, **more})
    if (arrangement, kind) in REFUSED:
        onnx.save(proto, tmp_path / "net.onnx")
        with pytest.raises(OnnxError, match=REFUSED[arrangement, kind]):
            eqfact.onnx.load(tmp_path / "net.onnx")
        return
    graph = small.imported(tmp_path, proto, batch=3)
    # and so is every tensor within
    feeds = small.feeds_of(graph, 3)
    held, (source,) = eq.values(graph, feeds), {n.origin.source for n in graph.nodes}
    views = {name: view for name, view in source.tensors.items() if isinstance(view, View) and view.value in held and name not in feeds}
    del proto.graph.output[:]
    proto.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in views)
    onnx.save(proto, tmp_path / "net.onnx")
    small.close({name: view.tensor_of(held[view.value]) for name, view in views.items()}, small.run_ort(tmp_path / "net.onnx", feeds))


@pytest.mark.parametrize("back", [False, True], ids=["as it stands", "turned back"])
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_what_is_folded_across_moves_is_written_in_the_order_of_the_file(arrangement, back, tmp_path):
    """A layer, a move and two scalings become one layer. Files take and make what they took and made, float and quantized."""
    before, shape, behind, constants = ARRANGEMENTS[arrangement]
    rng = np.random.default_rng(3)
    moving = small.model(before, {"x": ["N", *X]}, ["t"], constants)
    onnx.save(moving, tmp_path / "moving.onnx")
    gain, shift = (small.run_ort(tmp_path / "moving.onnx", {"x": np.broadcast_to(
        rng.uniform(0.5, 2.0, 4).astype(np.float32)[:, None, None], (1, *X)).copy()})["t"].take([0], axis=shape.index(0)) for _ in range(2))
    turned = [helper.make_node(n.op_type, ["c" if i == "x" else i for i in n.input], n.output, **{a.name: a.ints for a in n.attribute})
              for n in before]
    nodes = [node("Conv", ["x", "w"], ["c"]), *turned, node("Mul", ["t", "gain"], ["m"]), node("Add", ["m", "shift"], ["u"])]
    proto = small.model([*nodes, *behind] if back else nodes, {"x": ["N", *X]}, ["y" if back else "u"],
                        {**constants, "w": floats(4, 4, 1, 1), "gain": gain, "shift": shift})
    onnx.save(proto, tmp_path / "net.onnx")
    feeds = {"x": floats(5, *X)}
    truth = small.run_ort(tmp_path / "net.onnx", feeds)
    opened = eqfact.onnx.open(tmp_path / "net.onnx", feeds)
    writers = [(opened.graph, opened.save, opened.save_qdq)]
    if back or (shape[0] == 0 and "samples" not in arrangement):  # outputs of a Graph have their batch in front
        writers.append((eqfact.onnx.load(tmp_path / "net.onnx"), eqfact.onnx.save, eqfact.onnx.save_qdq))
    for graph, save, save_qdq in writers:
        folded = eq.fold_batchnorm(graph)
        assert not any(isinstance(n.op, eq.BatchNorm) for n in folded.nodes)
        save(tmp_path / "float.onnx", folded)
        small.close(small.run_ort(tmp_path / "float.onnx", feeds), truth)
        save_qdq(tmp_path / "small.onnx", eq.quantize(
            folded, weights=eq.UniformQuantizer(), activations=eq.UniformQuantizer(symmetric=False), stats=eq.calibrate(folded, feeds)))
        small_ones = small.run_ort(tmp_path / "small.onnx", feeds)
        assert {name: value.shape for name, value in small_ones.items()} == {name: value.shape for name, value in truth.items()}
        assert eq.sqnr(truth, small_ones) > 25
