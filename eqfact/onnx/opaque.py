"""How is a node kept that eqfact does not know?

As one op that holds the ONNX node with its constants, runs it with onnx's reference evaluator, and writes it back unchanged.
Nothing is known about it, so every channel that it reads or makes is pinned: the rest of the network is still equalized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from eqfact.ops.base import Array, Blocking, Shape


class LRN(OpRun):
    """Local response normalization over all channels; onnx's own (1.23) counts samples where it means channels."""

    op_domain = ""

    def _run(self, x: Array, alpha: float, beta: float, bias: float, size: int) -> tuple[Array]:  # type: ignore[override,unused-ignore]
        before, after = (size - 1) // 2, size // 2
        squares = np.pad(x * x, ((0, 0), (before, after), *((0, 0) for _ in x.shape[2:])))
        total = np.lib.stride_tricks.sliding_window_view(squares, size, axis=1).sum(axis=-1)
        return ((x / (bias + alpha / size * total) ** beta).astype(x.dtype),)


def evaluator(node: onnx.NodeProto, opsets: Mapping[str, int]) -> ReferenceEvaluator:
    """Other people's code for one node, where it is right."""
    return ReferenceEvaluator(node, opsets=dict(opsets), new_ops=[LRN])


@dataclass(frozen=True, eq=False)
class Opaque(Blocking):
    """Output ``output`` of an ONNX node (a serialized ``NodeProto``), whose constant inputs are ``constants`` by name.

    ``inputs`` names the ONNX tensors that are the op's inputs, in order; ``shape`` is the output's ``(C, *spatial)``.
    :attr:`lipschitz` is an assumption: the rounding bound of :func:`eqfact.verify` holds behind this op if it is not steeper.
    """

    node: bytes
    opsets: Mapping[str, int]
    inputs: tuple[str, ...]
    constants: Mapping[str, Array]
    output: int
    input_shapes: tuple[Shape, ...]
    shape: Shape
    lipschitz = 16.0
    reason = "is kept as it is: eqfact does not know what it computes"

    @cached_property
    def proto(self) -> onnx.NodeProto:
        """The ONNX node."""
        proto: onnx.NodeProto = onnx.NodeProto.FromString(self.node)
        return proto

    @cached_property
    def _evaluator(self) -> ReferenceEvaluator:
        return evaluator(self.proto, self.opsets)

    def output_shape(self, *shapes: Shape) -> Shape:
        if shapes != self.input_shapes:
            raise ValueError(f"the ONNX node {self.proto.op_type} was read for inputs {self.input_shapes}, got {shapes}")
        return self.shape

    def forward(self, *inputs: Array) -> Array:
        feeds = {**self.constants, **dict(zip(self.inputs, (np.ascontiguousarray(x) for x in inputs), strict=True))}
        outputs: Any = self._evaluator.run(None, feeds)
        y: Array = np.asarray(outputs[self.output])
        if y.shape != (len(inputs[0]), *self.shape):
            raise ValueError(f"the ONNX node {self.proto.op_type} made shape {y.shape}, expected {(len(inputs[0]), *self.shape)}")
        return y

    def passes(self, errors: Sequence[Array], inputs: Sequence[Array], u: float) -> Array:
        """Any entry of a sample may move any other: all that is known is the largest."""
        largest = np.maximum.reduce([e.reshape(len(e), -1).max(axis=1) for e in errors])
        return np.broadcast_to(self.lipschitz * largest.reshape(-1, *(1 for _ in self.shape)), (len(largest), *self.shape))


def opaque_ops(node: onnx.NodeProto, opsets: Mapping[str, int], inputs: Mapping[str, Shape], constants: Mapping[str, Array],
               dtype: np.dtype[np.floating], samples: int | None) -> list[Opaque]:
    """One op for each output of a node; shapes are found by running it on zeros.

    :class:`ValueError` if onnx cannot run the node, or if its outputs are not a floating array with one entry a sample.
    """
    if any(a.HasField("g") or a.graphs for a in node.attribute):
        raise ValueError("it contains graphs of its own")
    shapes: list[Shape] = []
    if not inputs:
        raise ValueError("it reads no value of the network")
    for count in (samples,) if samples else (1, 2):
        feeds = {**constants, **{name: np.zeros((count, *shape), dtype) for name, shape in inputs.items()}}
        try:
            with np.errstate(all="ignore"):
                outputs: Any = evaluator(node, opsets).run(None, feeds)
        except Exception as error:  # whatever a kernel of onnx raises on input that it does not take
            raise ValueError(f"onnx's reference evaluator cannot run it: {type(error).__name__}: {str(error)[:300]}") from error
        for name, y in zip(node.output, outputs, strict=False):
            if name and (not isinstance(y, np.ndarray) or y.ndim < 2 or len(y) != count or not np.issubdtype(y.dtype, np.floating)):
                raise ValueError(f"its output '{name}' is not a floating array (N, C, ...) but {np.shape(y)} for {count} samples")
        shapes = [np.shape(y)[1:] for y in outputs]
    serialized = node.SerializeToString()
    return [Opaque(serialized, dict(opsets), tuple(inputs), dict(constants), i, tuple(inputs.values()), shapes[i])
            for i in range(len(node.output))]
