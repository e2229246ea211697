"""The layers, by what they do with a factor: *weighted* ops absorb it, *commuting* ops pass it on, *blocking* ops stop it, and products of
values add up its logarithms.

A new layer goes into the module of its family and into ``ALL`` here; a user's own is a subclass anywhere.
"""

from eqfact.ops.attention import Mix, Rotary, Scores
from eqfact.ops.base import Array, Blocking, Commuting, Op, Shape, Trace, Weighted
from eqfact.ops.blocking import GELU, Erf, HardSigmoid, HardSwish, Sigmoid, SiLU, Sloped, Softmax, Tanh
from eqfact.ops.elementwise import Abs, Affine, Clip, Identity, LeakyReLU, PReLU, ReLU
from eqfact.ops.joining import Add, Concat, Extend, Flatten, Max, Min, Permute, Slice, Sub, Transpose, Unflatten
from eqfact.ops.moving import Rearrange, Take
from eqfact.ops.normalizing import GroupNorm, InstanceNorm, LayerNorm, Normalization, RMSNorm
from eqfact.ops.products import Mul
from eqfact.ops.space import AvgPool, Blend, GlobalAvgPool, LpPool, MaxPool, MinPool, Pad, Upsample
from eqfact.ops.weighted import BatchNorm, Conv, ConvTranspose, Dense


def ReLU6() -> Clip:
    """``Clip(0, 6)``: exact under equalization, because its bounds take up the factors.

    >>> ReLU6().high
    6.0
    """
    return Clip(0.0, 6.0)


#: Every layer of the library, in the order of their families.
ALL: tuple[type[Op], ...] = (
    Dense, Conv, ConvTranspose, BatchNorm, LayerNorm, RMSNorm, GroupNorm, InstanceNorm,
    Identity, Abs, ReLU, LeakyReLU, PReLU, Clip, Affine,
    MaxPool, MinPool, AvgPool, LpPool, GlobalAvgPool, Pad, Upsample, Blend,
    Add, Sub, Max, Min, Concat, Extend, Flatten, Unflatten, Transpose, Slice, Permute, Rearrange, Take,
    Sigmoid, HardSigmoid, Tanh, SiLU, HardSwish, Erf, GELU, Sloped, Softmax,
    Mul, Scores, Mix, Rotary,
)

__all__ = [  # noqa: RUF022  # by family; names written out, so that type checkers see them
    "ALL", "Array", "Blocking", "Commuting", "Normalization", "Op", "ReLU6", "Shape", "Trace", "Weighted",
    "Dense", "Conv", "ConvTranspose", "BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm",
    "Identity", "Abs", "ReLU", "LeakyReLU", "PReLU", "Clip", "Affine",
    "MaxPool", "MinPool", "AvgPool", "LpPool", "GlobalAvgPool", "Pad", "Upsample", "Blend",
    "Add", "Sub", "Max", "Min", "Concat", "Extend", "Flatten", "Unflatten", "Transpose", "Slice", "Permute", "Rearrange", "Take",
    "Sigmoid", "HardSigmoid", "Tanh", "SiLU", "HardSwish", "Erf", "GELU", "Sloped", "Softmax",
    "Mul", "Scores", "Mix", "Rotary",
]
