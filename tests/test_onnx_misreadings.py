"""No misreading stays silent: one is planted in every function that reads nodes, and the command line writes nothing.

The planted reader does its work and then makes every number a hundredth larger; the one of a shape makes it twice as large and one more.
What notices is another runtime, value by value: it needs no second reader of ours.
"""

import numpy as np
import onnx
import onnx_models as small
import pytest
from onnx import helper

import eqfact as eq
from eqfact.__main__ import main
from eqfact.onnx.fusing import PATTERNS
from eqfact.onnx.nodes import FUSED, READERS
from eqfact.onnx.origin import Constant
from eqfact.onnx.views import View

floats = small.normals(5)
ints = small.ints


#: What follows on h, the (N, 4, 6, 6) that a convolution makes: the inputs behind h with their constants, attributes, and the opset.
FOUR = np.abs(floats(4)) + np.float32(0.5)
FOLLOWS = {
    "Conv": ([floats(3, 4, 1, 1)], {}, 17), "ConvTranspose": ([floats(4, 3, 2, 2)], {}, 17), "MatMul": ([floats(6, 5)], {}, 17),
    "BatchNormalization": ([FOUR, floats(4), floats(4), FOUR], {}, 17),
    "MaxPool": ([], {"kernel_shape": [2, 2]}, 17), "AveragePool": ([], {"kernel_shape": [2, 2]}, 17),
    "GlobalAveragePool": ([], {}, 17), "GlobalMaxPool": ([], {}, 17),
    "ReduceMean": ([], {"axes": [2, 3]}, 17), "ReduceMax": ([], {"axes": [2, 3]}, 17),
    "Add": ([floats(4, 1, 1)], {}, 17), "Sum": (["h"], {}, 17), "Sub": ([floats(4, 1, 1)], {}, 17), "Mul": ([floats(4, 1, 1)], {}, 17),
    "Div": ([FOUR.reshape(4, 1, 1)], {}, 17), "Neg": ([], {}, 17), "Pow": ([np.float32(2)], {}, 17), "Relu": ([], {}, 17),
    "LeakyRelu": ([], {"alpha": 0.2}, 17),
    "PRelu": ([FOUR.reshape(4, 1, 1)], {}, 17), "Clip": ([np.float32(-0.5), np.float32(0.5)], {}, 17),
    "Max": ([np.float32(0.1)], {}, 17), "Min": ([np.float32(0.1)], {}, 17),
    "Sigmoid": ([], {}, 17), "Tanh": ([], {}, 17), "Erf": ([], {}, 17),
    "HardSigmoid": ([], {}, 17), "HardSwish": ([], {}, 17), "Gelu": ([], {}, 20), "Swish": ([], {}, 24), "Softmax": ([], {"axis": 1}, 17),
    "Identity": ([], {}, 17), "Dropout": ([], {}, 17), "Cast": ([], {"to": 1}, 17),
    "Pad": ([ints(0, 0, 1, 1, 0, 0, 1, 1)], {}, 17), "Resize": (["", np.float32([1, 1, 2, 2])], {}, 17),
    "Upsample": ([np.float32([1, 1, 2, 2])], {}, 9), "Concat": (["h"], {"axis": 1}, 17), "Reshape": ([ints(0, 2, 2, 6, 6)], {}, 17),
    "Flatten": ([], {}, 17), "Squeeze": ([], {}, 17), "Unsqueeze": ([ints(1)], {}, 17), "Transpose": ([], {"perm": [0, 2, 3, 1]}, 17),
    "Slice": ([ints(1), ints(3), ints(1)], {}, 17), "Split": ([ints(4)], {"axis": 1}, 17), "Gather": ([ints(2, 0)], {"axis": 1}, 17),
    "Expand": ([ints(1, 4, 1, 1)], {}, 17), "DepthToSpace": ([], {"blocksize": 2}, 17), "SpaceToDepth": ([], {"blocksize": 2}, 17),
    "Einsum": ([floats(4, 3)], {"equation": "nchw,cd->ndhw"}, 17), "LpPool": ([], {"kernel_shape": [2, 2]}, 17),
    "GlobalLpPool": ([], {}, 17), "ReduceMin": ([], {"axes": [2, 3]}, 17), "ReduceL1": ([], {"axes": [2, 3]}, 17),
    "ReduceL2": ([], {"axes": [2, 3]}, 17), "ReduceSum": ([ints(2, 3)], {}, 17), "CumSum": ([np.int64(2)], {}, 17), "Abs": ([], {}, 17),
    "Tile": ([ints(1, 1, 2, 1)], {}, 17), "Attention": (["h", "h"], {}, 23),
    "RotaryEmbedding": ([floats(6, 3), floats(6, 3), np.tile(np.arange(6), (4, 1))], {}, 23),
    "LayerNormalization": ([floats(6)], {}, 17), "RMSNormalization": ([floats(6)], {}, 23),
    "GroupNormalization": ([FOUR, floats(4)], {"num_groups": 2}, 21), "InstanceNormalization": ([FOUR, floats(4)], {}, 17),
}


def written(kind, path):
    """A network in which this node reads what a convolution makes."""
    node = helper.make_node
    constants = {"w": floats(4, 2, 1, 1)}
    batch = 4 if kind == "RotaryEmbedding" else "N"
    if kind in ("Shape", "Size"):  # read to flatten
        samples = [node("Slice", ["s", "zero", "one"], ["n"])] if kind == "Shape" else [
            node("Div", ["s", "rest"], ["q"]), node("Reshape", ["q", "one"], ["n"])]
        nodes = [node(kind, ["h"], ["s"]), *samples, node("Concat", ["n", "rest"], ["t"], axis=0), node("Reshape", ["h", "t"], ["y"])]
        constants |= {"zero": ints(0), "one": ints(1), "rest": ints(144)}
        rest, opset = nodes, 17
    elif kind == "Gemm":
        rest, opset = [node("Flatten", ["h"], ["f"]), node("Gemm", ["f", "v"], ["y"])], 17
        constants["v"] = floats(144, 3)
    elif kind in FUSED:
        (pattern,) = (pattern for name, pattern in PATTERNS if name == kind)
        rest, opset = [], 17
        spell(pattern, rest, constants)
        rest[-1].output[0] = "y"
    elif kind == "Where":
        rest, opset = [node("Where", ["c", "h", "low"], ["y"])], 17
        constants |= {"c": floats(6, 6) > -1, "low": np.float32(-3)}
    else:
        others, attributes, opset = FOLLOWS[kind]
        names = []
        for i, other in enumerate(others):
            names.append(other if isinstance(other, str) else f"c{i}")
            constants |= {} if isinstance(other, str) else {f"c{i}": other}
        rest = [node(kind, ["h", *names], ["y"], **attributes)]
    onnx.save(small.model([node("Conv", ["x", "w"], ["h"]), *rest], {"x": [batch, 2, 6, 6]}, ["y"], constants, opset), path)


def spell(pattern, nodes, constants):
    """The nodes of the first tree that a pattern stands for; the tensor that they make."""
    pattern = pattern[0] if isinstance(pattern, list) else pattern
    if pattern == "x":
        return "h"
    if not isinstance(pattern, tuple):
        name = f"c{len(constants)}"
        constants[name] = np.float32(1e-3 if pattern == "eps" else pattern)
        return name
    inputs = [spell(each, nodes, constants) for each in pattern[1:]]
    nodes.append(helper.make_node(pattern[0], inputs, [f"t{len(nodes)}"], **({"axes": [-1]} if pattern[0] == "ReduceMean" else {})))
    return nodes[-1].output[0]


def misread(reader):
    """The reader, and a mistake."""
    def wrong(call):
        made = reader(call)
        several = [made] if isinstance(made, View | Constant) else list(made)
        found = []
        for tensor in several:
            if isinstance(tensor, Constant):
                found.append(Constant(tensor.name, tuple(2 * value + 1 for value in tensor.values)))
            else:
                one = np.ones((1,) * len(tensor.shape), call.building.dtype)
                found.append(tensor.of(call.emit(eq.Affine(one * np.float32(1.01), 0 * one), tensor.value).value))
        return found[0] if isinstance(made, View | Constant) else found
    return wrong


def test_every_reader_is_in_the_table():
    assert {*FOLLOWS, "Shape", "Size", "Gemm", "Where"} == set(READERS)


@pytest.mark.parametrize("kind", [*READERS, *FUSED])
def test_the_command_line_notices_a_misreading(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    written(kind, "net.onnx")
    line = ["equalize", "net.onnx", "-o", "out.onnx"]
    assert main(line) == 0, capsys.readouterr().err
    (tmp_path / "out.onnx").unlink()
    capsys.readouterr()
    table = FUSED if kind in FUSED else READERS
    monkeypatch.setitem(table, kind, misread(table[kind]))
    if kind in ("Shape", "Size"):  # the shape that is computed from it fits nothing, so that the Reshape is kept: nothing is misread
        assert main(line) in (0, 3)
        assert not (tmp_path / "out.onnx").exists() or "1 kept (Reshape" in capsys.readouterr().out
        return
    assert main(line) == 3
    error = capsys.readouterr().err
    assert "the file was misread" in error and ("'h'" if kind == "Conv" else "'y") in error
    assert not (tmp_path / "out.onnx").exists()
