"""Nodes that move entries, in all that their attributes may say, against onnxruntime; and what they refuse, in words."""

import numpy as np
import onnx
import onnx_models as small
import pytest
from onnx import helper

import eqfact as eq
import eqfact.onnx
from eqfact.onnx import OnnxError

node = helper.make_node
ints = small.ints


def floats(*shape):
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def scales(*values):
    return np.array(values, np.float32)


def kinds(graph):
    return [type(n.op).__name__ for n in graph.nodes]


def pad(*pads, axes=None, **options):
    """A Pad of these pads, over some axes."""
    names, constants = ["x", "p"], {"p": ints(*pads)}
    if axes is not None:
        names, constants = ["x", "p", "", "axes"], {**constants, "axes": ints(*axes)}
    return [node("Pad", names, ["y"], **options)], constants


def resize(*by, sizes=(), **options):
    names, constants = (["x", "", "by"], {"by": scales(*by)}) if by else (["x", "", "", "sizes"], {"sizes": ints(*sizes)})
    return [node("Resize", names, ["y"], **{"mode": "nearest", **options})], constants


def slices(starts, ends, axes=None, steps=None):
    given = {"a": starts, "b": ends, "c": axes, "d": steps}
    names = [name if value is not None else "" for name, value in given.items()]
    return [node("Slice", ["x", *names], ["y"])], {name: ints(*value) for name, value in given.items() if value is not None}


FLOOR = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
CEIL = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "ceil"}

#: Nodes and constants, the shape of a sample of x, the opset, and the ops that they become.
MOVES = {
    "reflect two entries": (*pad(1, 1, mode="reflect", axes=[2]), (3, 2), 18, ["Take"]),
    "reflect as far as it goes": (*pad(0, 0, 2, 0, 0, 2, mode="reflect"), (2, 3), 17, ["Take"]),
    "reflect in front": (*pad(0, 0, 1, 0, 0, 0, mode="reflect"), (2, 3), 17, ["Take"]),
    "reflect behind two axes": (*pad(0, 0, 0, 0, 0, 0, 2, 1, mode="reflect"), (2, 3, 4), 17, ["Take", "Take", "Identity"]),
    "reflect channels": (*pad(0, 1, 0, 0, 2, 0, mode="reflect"), (3, 2), 17, ["Take"]),
    "repeat the edge": (*pad(0, 0, 2, 0, 0, 3, mode="edge"), (2, 3), 17, ["Take"]),
    "cut off, then reflect": (*pad(0, 0, -1, 0, 0, 2, mode="reflect"), (2, 5), 17, ["Take", "Take", "Identity"]),
    "reflect, cut off behind": (*pad(0, 0, 1, 0, 0, -2, mode="reflect"), (2, 5), 17, ["Take", "Take", "Identity"]),
    "wrap around": (*pad(1, 2, mode="wrap", axes=[-1]), (2, 4), 19, ["Take"]),
    "pad some axes": (*pad(1, 2, 0, 3, axes=[-1, 2]), (2, 3, 4), 18, ["Pad"]),
    "pad as old opsets say": ([node("Pad", ["x"], ["y"], pads=[0, 0, 1, 0, 0, 2], value=0.5)], {}, (2, 3), 10, ["Pad"]),
    "pad channels": (*pad(0, 1, 0, 0, 0, 2, 0, 0), (2, 3, 4), 17, None),
    "pad nothing": (*pad(0, 0, 0, 0, 0, 0), (2, 3), 17, ["Identity"]),
    "pad nothing, reflecting": (*pad(0, 0, 0, 0, 0, 0, mode="reflect"), (2, 1), 17, ["Identity"]),
    "crop only": (*pad(0, 0, -1, 0, 0, -1), (2, 5), 17, ["Take"]),
    "crop and pad one axis": (*pad(0, 0, -1, 0, 0, 2), (2, 5), 17, ["Take", "Pad", "Identity"]),
    "Resize by one": (*resize(1, 1, 1), (2, 3), 17, ["Identity"]),
    "Resize of opset 10": ([node("Resize", ["x", "by"], ["y"], mode="nearest")], {"by": scales(1, 1, 2)}, (2, 3), 10, ["Upsample"]),
    "Resize of opset 11": ([node("Resize", ["x", "roi", "by"], ["y"], mode="nearest")], {"by": scales(1, 1, 0.4), "roi": scales()}, (2, 5),
                           11, ["Take"]),
    "Resize of opset 11 up": ([node("Resize", ["x", "roi", "by"], ["y"], mode="nearest")], {"by": scales(1, 1, 1.5), "roi": scales()},
                              (2, 4), 11, ["Take"]),
    "Resize to half": (*resize(1, 1, 0.5, **FLOOR), (2, 6), 17, ["Take"]),
    "Resize to half, from the ceiling": (*resize(1, 1, 0.5, **CEIL), (2, 6), 17, ["Take"]),
    "Resize up from the ceiling": (*resize(1, 1, 2, **CEIL), (2, 4), 17, ["Take"]),
    "Resize by broken scales": (*resize(1, 1, 1.5, 0.6), (2, 5, 5), 17, ["Take", "Take", "Identity"]),
    "Resize up and down": (*resize(1, 1, 2, 0.5, **FLOOR), (2, 3, 6), 17, ["Take", "Upsample", "Identity"]),
    "Resize by rounding down at a half": (*resize(1, 1, 0.4), (2, 5), 17, ["Take"]),
    "Resize to one pixel of PyTorch": (*resize(1, 1, 0.25, coordinate_transformation_mode="pytorch_half_pixel"), (2, 4), 17, ["Take"]),
    "Resize with corners": (*resize(1, 1, 3, coordinate_transformation_mode="align_corners"), (2, 3), 17, ["Take"]),
    "Resize with corners down": (*resize(1, 1, 0.5, coordinate_transformation_mode="align_corners", nearest_mode="floor"), (2, 8), 17,
                                 ["Take"]),
    "Resize by lines between": (*resize(1, 1, 2, mode="linear"), (2, 3), 17, ["Blend"]),
    "Resize by lines between, in both axes": (*resize(1, 1, 2, 0.5, mode="linear"), (2, 3, 4), 17, ["Blend", "Blend"]),
    "Resize that keeps the aspect": (*resize(sizes=(6,), axes=[2], keep_aspect_ratio_policy="not_larger"), (2, 3), 18, ["Upsample"]),
    "Resize to one corner": (*resize(1, 1, 0.25, coordinate_transformation_mode="align_corners"), (2, 4), 17, ["Take"]),
    "Resize of the channels": (*resize(1, 2, 1, **FLOOR), (2, 3), 17, None),
    "Resize of some axes": (*resize(2, 3, axes=[3, 2], **FLOOR), (2, 3, 4), 18, ["Upsample"]),
    "Resize of negative axes": (*resize(2, axes=[-1], **FLOOR), (2, 3, 4), 18, ["Upsample"]),
    "Upsample by an attribute": ([node("Upsample", ["x"], ["y"], mode="nearest", scales=[1.0, 1.0, 2.0, 3.0])], {}, (2, 3, 4), 8,
                                 ["Upsample"]),
    "Concat of negative axis": ([node("Concat", ["x", "x"], ["y"], axis=-2)], {}, (2, 3), 17, ["Concat"]),
    "Concat over space": ([node("Concat", ["x", "x"], ["y"], axis=3)], {}, (2, 3, 4), 17, ["Concat"]),
    "Concat of two arrangements": ([node("Transpose", ["x"], ["t"], perm=[0, 2, 1]), node("Concat", ["x", "t"], ["y"], axis=2)], {},
                                   (3, 3), 17, None),
    "Concat of channels last": ([node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]), node("Concat", ["t", "t"], ["c"], axis=2),
                                 node("Transpose", ["c"], ["y"], perm=[0, 3, 1, 2])], {}, (2, 3, 4), 17, ["Concat", "Identity"]),
    "Concat of channels that are last": ([node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]), node("Concat", ["t", "t"], ["c"], axis=-1),
                                          node("Transpose", ["c"], ["y"], perm=[0, 3, 1, 2])], {}, (2, 3, 4), 17, ["Concat", "Identity"]),
    "Upsample of channels last": ([node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]),
                                   node("Resize", ["t", "", "by"], ["u"], mode="nearest", **FLOOR),
                                   node("Transpose", ["u"], ["y"], perm=[0, 3, 1, 2])], {"by": scales(1, 2, 3, 1)}, (2, 3, 4), 17,
                                  ["Upsample", "Identity"]),
    "Pad of channels last": ([node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]), node("Pad", ["t", "p"], ["u"]),
                              node("Transpose", ["u"], ["y"], perm=[0, 3, 1, 2])], {"p": ints(0, 1, 2, 0, 0, 3, 0, 0)}, (2, 3, 4), 17,
                             ["Pad", "Identity"]),
    "Pad of a joined axis": ([node("Reshape", ["x", "s"], ["t"]), node("Pad", ["t", "p"], ["y"])],
                             {"s": ints(0, 2, 12), "p": ints(0, 0, 1, 0, 0, 2)}, (2, 3, 4), 17, None),
    "Reshape that copies": ([node("Reshape", ["x", "s"], ["y"])], {"s": ints(0, 0, -1)}, (2, 3, 4), 17, None),
    "Reshape with allowzero": ([node("Reshape", ["x", "s"], ["y"], allowzero=1)], {"s": ints(-1, 6, 4)}, (2, 3, 4), 17, None),
    "Reshape of what has no factor in common": ([node("Reshape", ["x", "s"], ["y"])], {"s": ints(0, 4, 3)}, (3, 4), 17, None),
    "Flatten from a negative axis": ([node("Flatten", ["x"], ["y"], axis=-3)], {}, (2, 3, 4), 17, ["Flatten"]),
    "one sample: Flatten from the start": ([node("Flatten", ["x"], ["y"], axis=0)], {}, (2, 3), 17, ["Flatten"]),
    "one sample: Resize to sizes": (*resize(sizes=(1, 2, 6)), (2, 3), 17, ["Upsample"]),
    "Squeeze of all that are one": ([node("Squeeze", ["x"], ["y"])], {}, (2, 1, 3, 1), 17, None),
    "Squeeze of a negative axis": ([node("Squeeze", ["x", "a"], ["y"])], {"a": ints(-2)}, (2, 1, 3), 17, None),
    "Squeeze as old opsets say": ([node("Squeeze", ["x"], ["y"], axes=[2])], {}, (2, 1, 3), 11, None),
    "Unsqueeze of negative axes": ([node("Unsqueeze", ["x", "a"], ["y"])], {"a": ints(-1, -3)}, (2, 3), 17, None),
    "Slice from the end": (*slices([-2], [2**40], [-1]), (2, 5), 17, ["Take"]),
    "Slice of first axes": (*slices([0, 1], [2**40, 2]), (3, 2), 17, ["Slice"]),
    "Slice backwards": (*slices([-1], [-(2**40)], [2], [-1]), (2, 5), 17, ["Take"]),
    "Slice backwards to the second": (*slices([4], [0], [2], [-2]), (2, 5), 17, ["Take"]),
    "Slice backwards to the first": (*slices([3], [-6], [2], [-1]), (2, 5), 17, ["Take"]),
    "Slice that takes all": (*slices([0], [2**40], [1]), (2, 5), 17, None),
    "Slice as old opsets say": ([node("Slice", ["x"], ["y"], starts=[1], ends=[3], axes=[1])], {}, (4, 2), 9, ["Slice"]),
    "Split in unequal parts": ([node("Split", ["x"], ["a", "b", "c"], axis=1, num_outputs=3),
                                node("Concat", ["c", "a", "b"], ["y"], axis=1)], {}, (7, 2), 18, ["Slice", "Slice", "Slice", "Concat"]),
    "Split as old opsets say": ([node("Split", ["x"], ["a", "b"], axis=-1, split=[1, 3]), node("Concat", ["b", "a"], ["y"], axis=-1)], {},
                                (2, 4), 11, ["Take", "Take", "Concat"]),
    "Gather of a table": ([node("Gather", ["x", "i"], ["y"], axis=-1)], {"i": np.int64([[0, 2], [-1, 1], [1, 1]])}, (2, 3), 17, None),
    "Gather of the last": ([node("Gather", ["x", "i"], ["y"], axis=1)], {"i": ints(2, -3)}, (3, 2), 17, None),
    "Gather of one": ([node("Gather", ["x", "i"], ["y"], axis=-1)], {"i": np.int64(-1)}, (3, 2), 17, None),
    "DepthToSpace by three": ([node("DepthToSpace", ["x"], ["y"], blocksize=3)], {}, (18, 2, 1), 17, ["Rearrange"]),
    "DepthToSpace by columns": ([node("DepthToSpace", ["x"], ["y"], blocksize=2, mode="CRD")], {}, (12, 2, 3), 17, ["Rearrange"]),
    "SpaceToDepth by three": ([node("SpaceToDepth", ["x"], ["y"], blocksize=3)], {}, (2, 6, 3), 17, ["Rearrange"]),
    "Expand to itself": ([node("Expand", ["x", "s"], ["y"])], {"s": ints(3, 1)}, (3, 2), 17, ["Identity"]),
}


@pytest.mark.parametrize("nodes, constants, x, opset, expected", MOVES.values(), ids=MOVES)
def test_moves_are_those_of_another_runtime(nodes, constants, x, opset, expected, tmp_path, request):
    single = request.node.callspec.id.startswith("one sample")
    proto = small.model(nodes, {"x": [1 if single else "N", *x]}, ["y"], constants, opset)
    graph = small.imported(tmp_path, proto, batch=1 if single else 3)
    assert expected is None or kinds(graph) == expected


@pytest.mark.parametrize("name", ["pad nothing", "Resize by one", "Expand to itself"])
def test_nodes_that_move_nothing_keep_their_names(name, tmp_path):
    nodes, constants, x, opset, _ = MOVES[name]
    graph = small.imported(tmp_path, small.model([*nodes, node("Relu", ["y"], ["z"])], {"x": ["N", *x]}, ["z"], constants, opset))
    assert [n.name for n in graph.nodes] == ["y", "z"]


REFUSED = {
    "Pad of a batch": (*pad(1, 0, 0, 0, 0, 0), (2, 3), 17, "axis 0 is the batch"),
    "Pad with too few numbers": (*pad(0, 0, 1, 0, 0), (2, 3), 17, "two numbers for each axis"),
    "Pad that reflects one entry": (*pad(0, 0, 1, 0, 0, 1, mode="reflect"), (2, 1), 17, "reflects along axis 2, which has 1 entries"),
    "Pad in a mode of its own": (*pad(0, 0, 1, 0, 0, 1, mode="mirror"), (2, 3), 17, "its mode is 'mirror'"),
    "Pad in a mode of its own by nothing": (*pad(0, 0, 0, 0, 0, 0, mode="mirror"), (2, 3), 17, "its mode is 'mirror'"),
    "Resize in a mode of its own": (*resize(1, 1, 2, mode="quintic"), (2, 3), 17, "mode is 'quintic'"),
    "Resize of a batch": (*resize(2, 1, 1), (2, 3), 17, "axis 0 is the batch"),
    "Resize in other coordinates": (*resize(1, 1, 2, coordinate_transformation_mode="polar"), (2, 3), 17,
                                    "coordinate_transformation_mode is 'polar'"),
    "Resize with corners of a broken size": (*resize(1, 1, 0.5, coordinate_transformation_mode="align_corners"), (2, 7), 17,
                                             "makes 3 entries of 7 by the scale 0.5"),
    "Resize to what is not said": ([node("Resize", ["x"], ["y"], mode="nearest")], {}, (2, 3), 17, "not constant"),
    "Resize to fixed sizes of a free batch": (*resize(sizes=(2, 2, 6)), (2, 3), 17, "depend on the size of the batch"),
    "Concat of other axes": ([node("Unsqueeze", ["x", "a"], ["u"]), node("Concat", ["x", "u"], ["y"], axis=1)], {"a": ints(3)}, (2, 3), 17,
                             "joins tensors of shapes Nx2x3 and Nx2x3x1"),
    "Concat of batches": ([node("Concat", ["x", "x"], ["y"], axis=0)], {}, (2, 3), 17, "axis 0 is the batch"),
    "Flatten beyond": ([node("Flatten", ["x"], ["y"], axis=4)], {}, (2, 3), 17, "flattens from axis 4 on a tensor with 3 axes"),
    "Flatten before": ([node("Flatten", ["x"], ["y"], axis=-4)], {}, (2, 3), 17, "flattens from axis -4 on a tensor with 3 axes"),
    "Squeeze of more": ([node("Squeeze", ["x", "a"], ["y"])], {"a": ints(1, 2)}, (1, 3), 17, r"removes axes \[1, 2\] of the shape Nx1x3"),
    "Unsqueeze beyond": ([node("Unsqueeze", ["x", "a"], ["y"])], {"a": ints(4)}, (2, 3), 17, "adds axes"),
    "Unsqueeze before": ([node("Unsqueeze", ["x", "a"], ["y"])], {"a": ints(-5)}, (2, 3), 17, "adds axes"),
    "Transpose of too few": ([node("Transpose", ["x"], ["y"], perm=[0, 1])], {}, (2, 3), 17, r"transposes a tensor with 3 axes by"),
    "Slice of a batch": (*slices([1], [2**40], [0]), (2, 3), 17, "axis 0 is the batch"),
    "Slice of every second sample": (*slices([0], [2**40], [0], [2]), (2, 3), 17, "axis 0 is the batch"),
    "Slice of first samples": (*slices([0], [5], [0]), (2, 3), 17, "axis 0 is the batch"),
    "Slice of nothing": (*slices([2], [2], [2]), (2, 3), 17, "output 'y' is a constant"),
    "Slice along an axis twice": (*slices([0, 1], [2, 3], [2, 2]), (2, 3), 17, "slices axis 2 twice"),
    "Split of other sums": ([node("Split", ["x", "s"], ["y", "z"], axis=1)], {"s": ints(1, 2)}, (4, 2), 17, "splits 4 entries into"),
    "Split of other counts": ([node("Split", ["x", "s"], ["y", "z"], axis=1)], {"s": ints(1, 1, 2)}, (4, 2), 17, "splits 4 entries into"),
    "Gather below": ([node("Gather", ["x", "i"], ["y"], axis=1)], {"i": ints(-3)}, (2, 3), 17, "takes entries -3 to -3 of 2"),
    "Gather beyond": ([node("Gather", ["x", "i"], ["y"], axis=1)], {"i": ints(0, 2)}, (2, 3), 17, "takes entries 0 to 2 of 2"),
    "DepthToSpace of three axes": ([node("DepthToSpace", ["x"], ["y"], blocksize=2)], {}, (4, 2), 17, "a tensor of 4 axes, got Nx4x2"),
    "Expand of a batch": ([node("Expand", ["x", "s"], ["y"])], {"s": ints(4, 1, 1)}, (1, 3), 17, "cannot be broadcast"),
    "an axis beyond": ([node("Gather", ["x", "i"], ["y"], axis=3)], {"i": ints(0)}, (2, 3), 17, "axis 3 is none of a tensor with 3 axes"),
    "an axis before": ([node("Gather", ["x", "i"], ["y"], axis=-4)], {"i": ints(0)}, (2, 3), 17, "axis -4 is none of a tensor with 3 axes"),
}


@pytest.mark.parametrize("nodes, constants, x, opset, words", REFUSED.values(), ids=REFUSED)
def test_moves_that_are_none_are_refused(nodes, constants, x, opset, words, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(small.model(nodes, {"x": ["N", *x]}, ["y"], constants, opset).SerializeToString())
    with pytest.raises(OnnxError, match=words):
        eqfact.onnx.load(path)


def test_a_matrix_along_space_leaves_the_channels_of_heads_free(tmp_path):
    """Positions are mixed within every head, entry by entry: each of its channels may have a factor of its own."""
    nodes = [node("MatMul", ["x", "w1"], ["a"]), node("Reshape", ["a", "heads"], ["h"]), node("Transpose", ["h"], ["t"], perm=[0, 2, 1, 3]),
             node("MatMul", ["m", "t"], ["p"]), node("Transpose", ["p"], ["u"], perm=[0, 2, 1, 3]), node("Reshape", ["u", "rows"], ["r"]),
             node("MatMul", ["r", "w2"], ["y"])]
    constants = {"w1": floats(4, 6), "heads": ints(0, 5, 2, 3), "m": floats(7, 5), "rows": ints(0, 7, 6), "w2": floats(6, 3)}
    graph = small.imported(tmp_path, small.model(nodes, {"x": ["N", 5, 4]}, ["y"], constants, 17))
    assert eq.degrees_of_freedom(graph) == 6
    assert [type(n.op).__name__ for n in graph.nodes if type(n.op).__name__ not in ("Transpose", "Permute")] == ["Conv", "Blend", "Conv"]


def test_matrices_along_parts_of_an_axis_have_names_of_their_own(tmp_path):
    nodes = [node("Reshape", ["x", "s"], ["h"]), node("Resize", ["h", "", "by"], ["y"], mode="linear")]
    graph = small.imported(tmp_path, small.model(nodes, {"x": ["N", 2, 12]}, ["y"], {"s": ints(0, 2, 3, 4), "by": scales(1, 1, 2, 2)}, 17))
    assert [n.name for n in graph.nodes if isinstance(n.op, eq.ops.Blend)] == ["y.axis2", "y"]


def test_shapes_are_known_in_part(tmp_path):
    """The end of a Shape, counted from the front or the back, and the count of all entries, within a batch that is free."""
    for start, end in ((1, 3), (-2, None), (1, -1), (0, -2)):
        ends = {} if end is None else {"end": end}
        nodes = [node("Shape", ["x"], ["s"], start=start, **ends), node("Reshape", ["s", "flat"], ["f"]), node("Size", ["f"], ["n"]),
                 node("Cast", ["n"], ["c"], to=1), node("Mul", ["x", "c"], ["y"])]
        onnx.save(small.model(nodes, {"x": ["N", 3, 4, 5]}, ["y"], {"flat": ints(-1)}), tmp_path / "net.onnx")
        assert eqfact.onnx.load(tmp_path / "net.onnx")["y"].op.weight.ravel()[0] == len([5, 3, 4, 5][start:end])
    x = np.ones((2, 3, 4, 5), np.float32)
    assert np.array_equal(eq.forward(eqfact.onnx.load(tmp_path / "net.onnx"), x), 2 * x)
