"""What does each ONNX op type mean in eqfact? One short function each, in the table :data:`READERS`.

A function gets a :class:`~eqfact.onnx.call.Call` and gives back the tensor (or tensors) that the node makes. It converts
attributes and weights; axes are never guessed, because ONNX says for every op where the channels stand.
"""

from __future__ import annotations

from functools import partial

from eqfact.onnx import arithmetic, attention, layers, moving, normalizing, resizing
from eqfact.onnx.call import Reader
from eqfact.ops import (
    GELU,
    Abs,
    AvgPool,
    Erf,
    HardSigmoid,
    HardSwish,
    LayerNorm,
    LeakyReLU,
    LpPool,
    MaxPool,
    MinPool,
    ReLU,
    RMSNorm,
    Sigmoid,
    SiLU,
    Tanh,
)

READERS: dict[str, Reader] = {
    "Conv": layers.conv, "ConvTranspose": layers.conv_transpose, "Gemm": layers.gemm, "MatMul": layers.matmul,
    "Einsum": layers.einsum, "Attention": attention.attention, "RotaryEmbedding": attention.rotary_embedding,
    "BatchNormalization": layers.batch_normalization,
    "LayerNormalization": normalizing.over_features(LayerNorm), "RMSNormalization": normalizing.over_features(RMSNorm),
    "GroupNormalization": normalizing.group_normalization, "InstanceNormalization": normalizing.instance_normalization,
    "MaxPool": layers.max_pool, "AveragePool": layers.average_pool, "LpPool": layers.lp_pool,
    "GlobalAveragePool": layers.global_average_pool, "GlobalMaxPool": layers.global_max_pool, "GlobalLpPool": layers.global_lp_pool,
    "ReduceMean": layers.reduce_space(AvgPool), "ReduceMax": layers.reduce_space(MaxPool), "ReduceMin": layers.reduce_space(MinPool),
    "ReduceL1": layers.reduce_space(partial(LpPool, p=1)), "ReduceL2": layers.reduce_space(partial(LpPool, p=2)),
    "ReduceSum": layers.reduce_space(None), "CumSum": layers.cumulate,
    "Add": arithmetic.add, "Sum": arithmetic.add, "Sub": arithmetic.subtract, "Mul": arithmetic.multiply,
    "Div": arithmetic.divide, "Pow": arithmetic.power, "Neg": arithmetic.negate, "Abs": arithmetic.plain(lambda _: Abs()),
    "Relu": arithmetic.plain(lambda _: ReLU()),
    "LeakyRelu": arithmetic.plain(lambda call: LeakyReLU(call.number("alpha", 0.01))),
    "PRelu": arithmetic.prelu, "Clip": arithmetic.clip, "Max": arithmetic.bound("low"), "Min": arithmetic.bound("high"),
    "Sigmoid": arithmetic.plain(lambda _: Sigmoid()), "Tanh": arithmetic.plain(lambda _: Tanh()), "Erf": arithmetic.plain(lambda _: Erf()),
    "HardSigmoid": arithmetic.plain(lambda call: HardSigmoid(call.number("alpha", 0.2), call.number("beta", 0.5))),
    "HardSwish": arithmetic.plain(lambda _: HardSwish()), "Gelu": arithmetic.gelu, "Swish": arithmetic.swish, "Softmax": arithmetic.softmax,
    "Where": arithmetic.where,
    "Identity": moving.identity, "Dropout": arithmetic.dropout, "Cast": arithmetic.cast,
    "Pad": moving.pad, "Resize": resizing.resize, "Upsample": resizing.resize, "Concat": moving.concat,
    "Shape": moving.shape_of, "Size": moving.size_of, "Reshape": moving.reshape, "Flatten": moving.flatten,
    "Squeeze": moving.squeeze, "Unsqueeze": moving.unsqueeze,
    "Transpose": moving.transpose, "Slice": moving.slice_, "Split": moving.split, "Gather": moving.gather,
    "Expand": moving.expand, "Tile": moving.tile,
    "DepthToSpace": moving.depth_to_space, "SpaceToDepth": moving.space_to_depth,
}

#: The same for several nodes that are one op together (:mod:`eqfact.onnx.fusing`).
FUSED: dict[str, Reader] = {
    "LayerNorm": normalizing.decomposed(LayerNorm), "RMSNorm": normalizing.decomposed(RMSNorm),
    "GELU": arithmetic.plain(lambda _: GELU()), "tanh GELU": arithmetic.plain(lambda _: GELU(approximate=True)),
    "SiLU": arithmetic.plain(lambda _: SiLU()),
}
