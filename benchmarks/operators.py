"""What does a factor meet in each operator of ONNX? The page `docs/operators.md`, made by reading an example of each.

What an operator does with factors is not written here: its examples are imported, and the labels of what they read and make tell it.
Only of operators that eqfact keeps as they are the reason is stated.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, defs, helper, numpy_helper

import eqfact as eq
import eqfact.onnx
from eqfact.ops.base import channel_vector

PAGE = Path(__file__).parents[1] / "docs" / "operators.md"
#: What a value is, unless an example says otherwise: (C, *spatial).
SHAPE = (4, 6, 6)
#: The opset of the examples, unless they say otherwise.
OPSET = 20


@dataclass(frozen=True, eq=False)
class Example:
    """One node; inputs named ``x...`` are values of the network, all others constants. ``says`` tells several of one operator apart."""

    op_type: str
    inputs: str = "x"
    says: str = ""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = OPSET
    batch: int | str = "N"

    def graph(self) -> eq.Graph:
        """The example as eqfact reads it, in double precision."""
        names = [name.strip("-") for name in self.inputs.split()]
        values = [name for name in dict.fromkeys(names) if name.startswith("x")]
        made = [f"y{i}" for i in range(self.outputs)]
        constants = {name: np.asarray(value, np.float64 if np.asarray(value).dtype.kind == "f" else np.int64)
                     if np.asarray(value).dtype != bool else np.asarray(value) for name, value in self.constants.items()}
        if "scales" in constants:  # single by definition; another constant says in what the network is computed
            constants |= {"scales": constants["scales"].astype(np.float32), "unread": np.zeros(9)}
        infos = [[helper.make_tensor_value_info(name, TensorProto.DOUBLE, shape) for name, shape in some] for some in (
            [(name, [self.batch, *self.shapes.get(name, SHAPE)]) for name in values], [(name, None) for name in made])]
        graph = helper.make_graph([helper.make_node(self.op_type, names, made, **self.attributes)], "example", *infos,
                                  [numpy_helper.from_array(array, name) for name, array in constants.items()])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "example.onnx"
            onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=9), path)
            return eqfact.onnx.load(path)


def ones(*shape: int) -> np.ndarray:
    """A constant that no op takes for nothing."""
    return 2 + np.arange(float(np.prod(shape))).reshape(shape) / 10


def _entrywise(kind: str, **attributes: Any) -> Example:
    return Example(kind, attributes=attributes)


SPACE = {"axes": [2, 3]}
A_CHANNEL, OVER_SPACE = ones(4, 1, 1), ones(6, 6)

EXAMPLES = [
    # layers
    Example("Conv", "x w", constants={"w": ones(3, 4, 3, 3)}), Example("ConvTranspose", "x w", constants={"w": ones(4, 3, 2, 2)}),
    Example("Gemm", "x w", shapes={"x": (4,)}, constants={"w": ones(4, 3)}),
    Example("MatMul", "x w", "with a constant behind", constants={"w": ones(6, 3)}, shapes={"x": (6,)}),
    Example("MatMul", "w x", "with a constant in front, over the channels", {"x": (4, 5)}, {"w": ones(3, 4)}),
    Example("MatMul", "w x", "with a constant in front, over space", constants={"w": ones(3, 6)}),
    Example("MatMul", "x x2", "of values", {"x": (4, 5, 6), "x2": (4, 6, 3)}),
    Example("Attention", "x x2 x3", says="of values", shapes={"x": (4, 5, 6), "x2": (2, 3, 6), "x3": (2, 3, 6)}, opset=23),
    Example("RotaryEmbedding", "x c s i", constants={"c": ones(9, 3), "s": ones(9, 3), "i": [range(5)]}, shapes={"x": (4, 5, 6)}, opset=23,
            batch=1),
    Example("Einsum", "x w", "with a constant", constants={"w": ones(4, 3)}, attributes={"equation": "nchw,cd->ndhw"}),
    Example("BatchNormalization", "x g b m v", constants={name: ones(4) for name in "gbmv"}),
    Example("LayerNormalization", "x g b", constants={"g": ones(6), "b": ones(6)}),
    Example("RMSNormalization", "x g", constants={"g": ones(6)}, opset=23),
    Example("GroupNormalization", "x g b", constants={"g": ones(4), "b": ones(4)}, attributes={"num_groups": 2}, opset=21),
    Example("InstanceNormalization", "x g b", constants={"g": ones(4), "b": ones(4)}),
    # pools and reductions
    *(Example(kind, attributes={"kernel_shape": [2, 2]}) for kind in ("MaxPool", "AveragePool", "LpPool")),
    *(Example(kind) for kind in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")),
    *(Example(kind, "x axes", constants=SPACE) for kind in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSum")),
    *(Example(kind, "x axes", "over the channels", constants={"axes": [1]}) for kind in (
        "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSum")),
    Example("CumSum", "x axis", constants={"axis": np.int64(2)}),
    # arithmetic
    *(Example(kind, "x x2", "of values") for kind in ("Add", "Sub", "Mul", "Max", "Min")),
    *(Example(kind, "x x2", "of values, one of a single channel", {"x2": (1, 6, 6)}) for kind in ("Add", "Sub", "Max", "Min")),
    Example("Sum", "x x2 x3"),
    *(Example(kind, "x c", "with a constant a channel", constants={"c": A_CHANNEL}) for kind in ("Add", "Sub", "Mul", "Div")),
    *(Example(kind, "x c", "with a constant over space", constants={"c": OVER_SPACE}) for kind in ("Add", "Sub", "Mul", "Div")),
    *(Example(kind, "x c", "with a constant", constants={"c": A_CHANNEL}) for kind in ("Max", "Min")),
    _entrywise("Neg"), _entrywise("Abs"), Example("Pow", "x c", "of 2 or 3", constants={"c": np.float32(2)}),
    # activations
    *map(_entrywise, ("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Erf", "HardSigmoid", "HardSwish", "Gelu", "Identity", "Dropout")),
    Example("Swish", opset=24), Example("Softmax", attributes={"axis": 1}), Example("Cast", attributes={"to": int(TensorProto.DOUBLE)}),
    Example("Where", "b x c", constants={"b": np.eye(6) > 0, "c": OVER_SPACE}),
    Example("PRelu", "x c", constants={"c": A_CHANNEL}), Example("Clip", "x low high", constants={"low": 0.0, "high": 6.0}),
    # space
    Example("Pad", "x pads", "with zeros", constants={"pads": [0, 0, 1, 1, 0, 0, 1, 1]}),
    Example("Pad", "x pads value", "with another constant", constants={"pads": [0, 0, 1, 1, 0, 0, 1, 1], "value": 1.5}),
    Example("Pad", "x pads", "by reflection", constants={"pads": [0, 0, 1, 1, 0, 0, 1, 1]}, attributes={"mode": "reflect"}),
    *(Example("Resize", "x - scales", mode, constants={"scales": [1.0, 1.0, 2.0, 2.0]}, attributes={"mode": mode})
      for mode in ("nearest", "linear", "cubic")),
    Example("Upsample", "x scales", constants={"scales": [1.0, 1.0, 2.0, 2.0]}, opset=9),
    # moves
    Example("Concat", "x x2", "of channels", attributes={"axis": 1}), Example("Concat", "x x2", "over space", attributes={"axis": 2}),
    Example("Concat", "x c", "with a constant, of channels", constants={"c": ones(1, 2, 6, 6)}, attributes={"axis": 1}, batch=1),
    Example("Concat", "c x", "with a constant, over space", constants={"c": ones(1, 4, 1, 6)}, attributes={"axis": 2}, batch=1),
    Example("Reshape", "x shape", "space", constants={"shape": [0, 4, 36]}), Example("Reshape", "x shape", "channels", constants={
        "shape": [0, 2, 12, 6]}),
    Example("Flatten"), Example("Squeeze", "x axes", shapes={"x": (4, 1, 6)}, constants={"axes": [2]}),
    Example("Unsqueeze", "x axes", constants={"axes": [2]}),
    Example("Transpose", says="of space", attributes={"perm": [0, 1, 3, 2]}),
    Example("Transpose", says="of channels and space", attributes={"perm": [0, 2, 3, 1]}),
    Example("Slice", "x start end axes", constants={"start": [1], "end": [3], "axes": [1]}),
    Example("Split", "x sizes", constants={"sizes": [1, 3]}, attributes={"axis": 1}, outputs=2),
    Example("Gather", "x i", constants={"i": [1, 1, 3]}, attributes={"axis": 1}),
    Example("Expand", "x shape", shapes={"x": (4, 1, 6)}, constants={"shape": [4, 5, 6]}), Example("Tile", "x times", constants={
        "times": [1, 2, 1, 3]}),
    Example("DepthToSpace", attributes={"blocksize": 2}), Example("SpaceToDepth", attributes={"blocksize": 2}),
]

#: Operators that make numbers which eqfact computes while it reads a file.
SHAPES = ("Shape", "Size")
#: Why the others are kept as they are. Each one stands here, in an example or in ``SHAPES``.
KEPT = {
    "its branch is read, if the condition is known": "If",
    "computed while the file is read": """
        Constant ConstantOfShape EyeLike Range BlackmanWindow HammingWindow HannWindow MelWeightMatrix""",
    "not homogeneous": """
        Acos Acosh Asin Asinh Atan Atanh Ceil Celu Cos Cosh CumProd Det Elu Exp Floor Hardmax LRN Log LogSoftmax Mish Mod Reciprocal
        ReduceLogSum ReduceLogSumExp ReduceProd ReduceSumSquare Round Selu Shrink Sign Sin Sinh Softplus Softsign Sqrt Tan
        ThresholdedRelu""",
    "normalizes: no factor of what it reads is left in what it makes": """
        LpNormalization MeanVarianceNormalization""",
    "multiplies values, or runs gates": "GRU LSTM LinearAttention RNN SwiGLU",
    "homogeneous or linear, and not read (yet)": """
        AffineGrid CausalConvWithState CenterCropPad Col2Im Compress DFT DeformConv GatherElements GatherND GridSample MaxRoiPool MaxUnpool
        Mean ReverseSequence RoiAlign STFT Scatter ScatterElements ScatterND TensorScatter TopK Trilu Unique""",
    "makes or reads truth values, indices or other integers": """
        And ArgMax ArgMin BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CastLike Equal Greater GreaterOrEqual IsInf IsNaN Less
        LessOrEqual NonMaxSuppression NonZero Not OneHot Or Xor""",
    "quantized already": """
        ConvInteger DequantizeLinear DynamicQuantizeLinear MatMulInteger QLinearConv QLinearMatMul QuantizeLinear""",
    "random": "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike",
    "runs graphs of its own": "Loop Scan SequenceMap",
    "sequences, strings, images": """
        ConcatFromSequence ImageDecoder Optional OptionalGetElement OptionalHasElement RegexFullMatch SequenceAt SequenceConstruct
        SequenceEmpty SequenceErase SequenceInsert SequenceLength SplitToSequence StringConcat StringNormalizer StringSplit
        TfIdfVectorizer""",
    "a loss, for training": "NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
}


def operators() -> list[str]:
    """Every operator of the standard that the installed onnx knows."""
    return sorted({schema.name for schema in defs.get_all_schemas_with_history() if schema.domain == ""})


def kind(graph: eq.Graph) -> str:
    """What becomes of factors between the inputs and outputs of a graph: absorbs, passes, ties, multiplies, blocks; told by its labels."""
    if graph.traced.relations:
        return "multiplies"
    if any("network" not in reason for _, reason in graph.traced.pins):
        return "blocks"
    read = np.concatenate([channel_vector(graph.labels[name]) for name in graph.inputs])
    made = np.concatenate([channel_vector(graph.labels[name]) for name in graph.outputs])
    if not np.isin(made, read).all():
        return "absorbs"
    root = np.arange(graph.traced.size)
    for a, b in graph.traced.ties:
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            root[root == root[j]] = root[i]
    how = "passes" if len(set(root[read])) == len(read) else "ties"
    return how + ", moves only" * all(isinstance(node.op, eq.ops.Commuting) and node.op.moves for node in graph.nodes)


def becomes(graph: eq.Graph) -> str:
    """The ops of a graph."""
    return ", ".join(dict.fromkeys(type(node.op).__name__ for node in graph.nodes)) or "nothing"


def rows() -> Iterator[tuple[str, str, str]]:
    """Of every operator its name, what it does with factors, and what it becomes."""
    reasons = {name: reason for reason, names in KEPT.items() for name in names.split()}
    for name in operators():
        examples = [(example.says, graph) for example in EXAMPLES if example.op_type == name for graph in [example.graph()]]
        if name in SHAPES:
            yield name, "makes a shape", "computed while the file is read"
        elif examples:
            yield (name, "; ".join(f"{says}: {kind(graph)}" if says else kind(graph) for says, graph in examples),
                   "; ".join(dict.fromkeys(becomes(graph) for _, graph in examples)))
        else:
            yield name, "unknown", f"kept as it is: {reasons[name]}"


def page() -> str:
    """The whole page."""
    lines = ["# The operators of ONNX", "",
             "What a factor meets in each operator of the standard (domain `ai.onnx`). This page is made by",
             "`python -m benchmarks operators`, which reads an example of every operator and looks at the labels of the channels that it",
             "reads and makes:", "",
             "* **absorbs**: the channels that it makes have factors of their own;",
             "* **passes**: each channel that it makes has the factor of one that it reads, and these are free of each other;",
             "* **ties**: the same, but several channels that it reads must share one factor;",
             "* **moves only**: what it makes are entries that it reads, or zeros;",
             "* **multiplies**: the factors that it reads, to those of what it makes (docs/algebra.md), as far as nothing ties or blocks;",
             "* **blocks**: all factors around it are 1;",
             "* **unknown**: it is kept as it is, so all factors around it are 1.", "",
             "Whatever reads constants only is computed while a file is read, if it is not random and not too large.", "",
             "| Operator | Factors | Becomes |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows())]) + "\n"


def main(argv: Sequence[str]) -> int:
    """Write the page."""
    argparse.ArgumentParser(prog="python -m benchmarks operators", description="Write docs/operators.md.").parse_args(argv)
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
    return 0
