"""How is a quantized network written so that an integer engine runs it? With QuantizeLinear and DequantizeLinear (QDQ).

Every grid of the graph becomes a pair of them: activations are rounded where :class:`~eqfact.quantizers.FakeQuantize` stands, weights
are stored as whole numbers, biases as int32 with the scale ``s_x * s_w`` of their accumulator. Engines fuse what stands between
two pairs into integer kernels; what ops make that keep a value on its grid gets a pair of its own, which changes nothing, for them.
Where they would compute something else than :func:`eqfact.forward`, the pair is hidden from them, behind a Sum of one (docs/integers.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from eqfact.accumulators import bias_steps, held_step
from eqfact.graph import Graph, Node
from eqfact.onnx.call import AnyArray
from eqfact.onnx.exporting import Path_, write_model
from eqfact.onnx.origin import OnnxError, Origin
from eqfact.onnx.writers import GraphWriter
from eqfact.ops import Add, AvgPool, BatchNorm, Blend, GlobalAvgPool, Shape, Softmax, Weighted
from eqfact.ops.base import Array
from eqfact.ops.grid import Grid
from eqfact.quantization import grid_of, scale_dtype
from eqfact.quantizers import FakeQuantize

#: ONNX's integer types with their ranges, the smallest first.
TYPES: dict[int, tuple[int, int]] = {
    onnx.TensorProto.UINT4: (0, 15), onnx.TensorProto.INT4: (-8, 7), onnx.TensorProto.UINT8: (0, 255), onnx.TensorProto.INT8: (-128, 127),
    onnx.TensorProto.UINT16: (0, 2**16 - 1), onnx.TensorProto.INT16: (-(2**15), 2**15 - 1),
}
#: From bytes with a sign to bytes without.
UNSIGNED = 128
#: onnxruntime refuses to average whole numbers into steps that are larger or smaller than theirs by so many bits.
AVERAGED_BITS = 8
#: From this opset on there are 4 and 16 bits, and scales for blocks of a tensor.
WIDE_OPSET = 21


def save_qdq(path: Path_, graph: Graph) -> None:
    """Write a network that :func:`eqfact.quantize` has made as ONNX with QuantizeLinear and DequantizeLinear.

    Weights become (u)int8 per tensor or per channel, activations uint8 or int8, biases int32 where they lie on the grid
    ``s_x * s_w``. Weights of up to 4 bits are stored in 4 bits if the opset is 21 or newer (as for networks that came from no
    file), else in 8; 16 bits and per-group weights need opset 21 and raise it. What is rounded to a grid narrower than its
    type is clipped behind. Scales, and all that is not quantized, are written in float32, whatever the network's type.

    What a float32 network's integer layers store is then the same in an engine, value by value, if that adds up in 32 bits and
    rescales by one float32 multiplier, as onnxruntime's do; where it computes in float, a sum next to the middle of two steps may be
    rounded to the other one, and what follows from it differs, too.

    Raises :class:`OnnxError` (a :class:`ValueError`) that names the node, for a rounding other than half to even in
    activations, for layers changed after they were quantized, and for all that :func:`eqfact.onnx.save` refuses; no file is left then.

    >>> net, x = Graph.chain((2,), fc=Dense(np.float32([[3.0, 1.0]]))), np.ones((1, 2), np.float32)
    >>> W8, A8 = UniformQuantizer(), UniformQuantizer(symmetric=False)
    >>> eq.onnx.save_qdq("small.onnx", quantize(net, weights=W8, activations=A8, stats=calibrate(net, x)))
    >>> import onnx
    >>> sorted({node.op_type for node in onnx.load("small.onnx").graph.node})
    ['DequantizeLinear', 'Gemm', 'QuantizeLinear']
    """
    write_model(path, QdqWriter(path, graph).model())


class QdqWriter(GraphWriter):
    """A writer that writes what lies on a grid as whole numbers."""

    def __init__(self, path: Path_, graph: Graph) -> None:
        super().__init__(path, graph)
        self.scale_dtype = scale_dtype(graph)
        #: The whole numbers and scales behind every dequantized weight, by its name.
        self.stored: dict[str, tuple[AnyArray, AnyArray]] = {}
        #: How many nodes use a weight, by the id of its array.
        self.uses = Counter(id(node.op.weight) for node in graph.nodes if isinstance(node.op, Weighted))
        #: Values of the graph by the names under which no engine sees that they lie on a grid.
        self.behind: dict[str, str] = {}
        self.dtype = np.dtype(np.float32)  # QuantizeLinear takes no doubles, and in older opsets no halves
        grids = [node.op.grid for node in graph.nodes if isinstance(node.op, Weighted)]
        narrow = any(grid is not None and grid.qmax - grid.qmin < 16 for grid in grids)
        if narrow and not any(isinstance(node.origin, Origin) for node in graph.nodes):
            self.need_opset(WIDE_OPSET, graph.nodes[0])

    def write(self, node: Node) -> None:
        (first, *_) = node.inputs
        if isinstance(node.op, FakeQuantize):
            if node.op.step is not None:
                self._check_step(node, node.op.step)
            self._activation(node, first, node.op.grid)
        elif (grid := grid_of(self.graph, node.name)) is not None and not self._rounded_next(node.name):
            inner = self.inner(node, "kept")
            super().write(replace(node, name=inner))
            self._activation(node, inner, grid, suffix=".quantize")
        elif isinstance(node.op, Add) and all(grid_of(self.graph, value) for value in node.inputs):
            # an Add would be fused into an integer kernel, whose rounding no standard tells; a Sum is rounded as a float sum
            self.node("Sum", node.inputs, node.name, node)
        else:
            if self._in_float(node):
                node = replace(node, inputs=(self._hide(node, first),))
            super().write(node)

    def _in_float(self, node: Node) -> bool:
        """Would onnxruntime's integer kernel compute something else, or refuse?"""
        op = node.op
        if isinstance(op, Weighted):
            return not isinstance(op, BatchNorm) and not self._in_integers(node, op)
        if isinstance(op, (AvgPool, GlobalAvgPool)) and (grid := self._grid(node.inputs[0])) is not None:
            made = [reader.op.grid.scale for reader in self.graph.readers[node.name] if isinstance(reader.op, FakeQuantize)]
            return any((np.abs(np.log2(grid.scale / scale)) >= AVERAGED_BITS).any() for scale in made)
        return isinstance(op, (Blend, Softmax))  # of a moved grid onnxruntime takes the wrong type; the kernel of Softmax is a step off

    def _in_integers(self, node: Node, op: Weighted) -> bool:
        """Are the layer's sums whole multiples of one step? (Of no others must an engine make whole numbers, least of all the bias.)"""
        return self._step(node, op, self.scale_dtype) is not None and (op.bias is None or self._whole_bias(node, op, op.bias) is not None)

    def _grid(self, value: str) -> Grid | None:
        """The grid of a value, under whatever name."""
        return grid_of(self.graph, self.behind.get(value, value))

    def space(self, node: Node) -> Shape:
        return super().space(replace(node, inputs=tuple(self.behind.get(value, value) for value in node.inputs)))

    def _hide(self, node: Node, value: str) -> str:
        """The value once more, as a sum of one: no engine looks for a grid behind that, and none takes it away."""
        grid = self._grid(value)
        if grid is None or grid.scale.size > 1:  # the latter is hidden where it is made
            return value
        hidden = self.node("Sum", [value], self.inner(node, "in_float"), node, ".in_float")
        self.behind[hidden] = value
        return hidden

    def _rounded_next(self, value: str) -> bool:
        """Is a value read by nothing but roundings? Its pair would stand right before another, and engines merge such pairs into one."""
        readers = self.graph.readers[value]
        return value not in self.graph.outputs and bool(readers) and all(isinstance(node.op, FakeQuantize) for node in readers)

    def _check_step(self, node: Node, step: Array) -> None:
        """Are the sums that a node rounds whole multiples of what it takes for their step?"""
        (value,) = node.inputs
        layer = None if value in self.graph.inputs else self.graph[value]
        made = self._step(layer, layer.op, self.scale_dtype) if layer is not None and isinstance(layer.op, Weighted) else None
        if made is None or not np.array_equal(made, step):
            steps = "no steps, or sums that 32 bits may not hold" if made is None else f"steps of {made.max():g}"
            raise OnnxError(f"{self.path}: node '{node.name}': it rounds sums in steps of {step.max():g}, and '{value}' is made in "
                            f"{steps}; quantize the network again, after all changes")

    def _step(self, node: Node, op: Weighted, dtype: npt.DTypeLike) -> Array | None:
        """The step of a layer's sums, the product of ``dtype``'s numbers, if there is one and 32 bits hold them."""
        return held_step(op, self._grid(node.inputs[0]), dtype)

    def _activation(self, node: Node, value: str, grid: Grid, suffix: str = "") -> None:
        """Round a value to its grid and back."""
        if grid.rounding != "half_even":
            raise OnnxError(f"{self.path}: node '{node.name}': ONNX rounds activations half to even, "
                            f"the grid's rounding is '{grid.rounding}'; quantize with rounding='half_even'")
        kind = self._type(grid, node, least=8)  # no kernel takes activations of less
        axis = {"axis": 1} if grid.scale.size > 1 else {}
        if axis:  # no kernel takes or makes a scale for each channel, yet onnxruntime makes its integer kernels of such pairs
            value = self.node("Sum", [value], self.inner(node, "in_float"), node, f"{suffix}.in_float")
        numbers = self._numbers(node.name, grid.scale, grid.zero_point, kind, scalar=not axis)

        def pair(value: str, name: str, output: str, suffix: str) -> str:
            whole = self.node("QuantizeLinear", [value, *numbers], self.inner(node, name), node, suffix, **axis)
            return self.node("DequantizeLinear", [whole, *numbers], output, node, f"{suffix}.dequantize", **axis)
        if (grid.qmin, grid.qmax) != TYPES[kind]:  # the type saturates later than the grid
            value = pair(value, "wide_int", self.inner(node, "wide"), f"{suffix}.wide")
            shape = (-1, *(1 for _ in self.graph.shapes[node.name][1:])) if axis else ()
            for name, q, end in zip(("low", "high"), (grid.qmin, grid.qmax), TYPES[kind], strict=True):
                if q != end:
                    bound = self.constant(grid.dequantize(q).astype(self.dtype).reshape(shape), f"{node.name}.{name}")
                    value = self.node("Max" if name == "low" else "Min", [value, bound], self.inner(node, f"at_{name}"), node, f".{name}")
        if not axis:
            pair(value, "int", node.name, suffix)
        else:
            inner = pair(value, "int", self.inner(node, "by_channel"), suffix)
            self.node("Sum", [inner], node.name, node, f"{suffix}.out_float")

    def moved(self, node: Node, value: str, i: int, suffix: str) -> str:
        """On the grid of the input once more: onnxruntime moves pairs on to a product by itself, but may take the wrong type for them."""
        grid = self._grid(node.inputs[i])
        if grid is None or grid.scale.size > 1:
            return value
        name = f"{value}.stored"
        numbers = self._numbers(name, grid.scale, grid.zero_point, self._type(grid, node, least=8), scalar=True)
        whole = self.node("QuantizeLinear", [value, *numbers], self.fresh(f"{name}.int"), node, f"{suffix}.quantize")
        return self.node("DequantizeLinear", [whole, *numbers], self.fresh(name), node, f"{suffix}.dequantize")

    def weight(self, node: Node, op: Weighted, arranged: Callable[[AnyArray], AnyArray]) -> str:
        grid = op.grid
        if grid is None:
            return super().weight(node, op, arranged)
        q = replace(grid, rounding="half_even").quantize(op.weight)
        if not np.array_equal(grid.dequantize(q).astype(op.weight.dtype), op.weight):
            raise OnnxError(f"{self.path}: node '{node.name}': its weights do not lie on their grid; "
                            "quantize the network again, after all changes")
        kind, shift = self._type(grid, node, least=4), grid.zero_point
        if kind == onnx.TensorProto.INT8 and self.uses[id(op.weight)] > 1:
            # to add exactly on every processor, onnxruntime makes unsigned ones of signed weights, which fails where two layers share them
            kind, q, shift = int(onnx.TensorProto.UINT8), q + UNSIGNED, shift + UNSIGNED
        whole = np.ascontiguousarray(arranged(q).astype(helper.tensor_dtype_to_np_dtype(kind)))
        _, known = self.made_of.get(id(op.weight), (None, ""))
        if known and _same(self.stored[known], (whole, grid.scale)):
            return known
        scales, zero_points = (arranged(np.broadcast_to(v, q.shape)) for v in (grid.scale, shift))
        scale, zero_point, where = _form(scales, zero_points)
        attributes: dict[str, Any] = where
        if "block_size" in attributes:
            self.need_opset(WIDE_OPSET, node)
        name = self.fresh(self.named(node, "weight"))
        self.stored[name] = whole, grid.scale
        numbers = self._numbers(name, scale, zero_point, kind, scalar=not attributes)
        self._dequantize([self.constant(whole, f"{name}.int"), *numbers], name, attributes)
        self.made_of[id(op.weight)] = op.weight, name
        return name

    def parameter(self, node: Node, name: str, value: AnyArray | float, shape: Sequence[int] | None = None, key: object = None) -> str:
        on_grid = self._whole_bias(node, node.op, np.asarray(value)) if name == "bias" and isinstance(node.op, Weighted) else None
        if on_grid is None:
            return super().parameter(node, name, value, shape, key)
        whole, step = on_grid
        own = self.fresh(self.named(node, "bias"))
        stored = self.constant(whole, f"{own}.int")
        scale = self.constant(step.reshape(() if step.size == 1 else -1), f"{own}.scale")
        self._dequantize([stored, scale], own, {} if step.size == 1 else {"axis": 0})
        return own

    def _dequantize(self, inputs: Sequence[str], output: str, attributes: dict[str, Any]) -> None:
        """A parameter from its whole numbers."""
        name = self.fresh_node(f"{output}.dequantize")
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [output], name=name, **attributes))

    def _whole_bias(self, node: Node, op: Weighted, bias: AnyArray) -> tuple[AnyArray, AnyArray] | None:
        """A bias as int32 and its step in float32, if it lies on the grid of the layer's sums; else it stays in float."""
        step, written = (self._step(node, op, dtype) for dtype in (self.scale_dtype, np.float32))
        if step is None or written is None:
            return None
        whole = bias_steps(op, step)
        if not np.array_equal((whole * step).astype(bias.dtype), bias):
            return None
        return whole.astype(np.int32), written.astype(np.float32)

    def _type(self, grid: Grid, node: Node, least: int) -> int:
        """The smallest type, of these bits at least, that holds a grid and that the opset has."""
        least = least if self.standard.version >= WIDE_OPSET else 8
        for kind, (low, high) in TYPES.items():
            bits = (high - low + 1).bit_length() - 1
            if low <= grid.qmin and grid.qmax <= high and bits >= least:
                if bits > 8:
                    self.need_opset(WIDE_OPSET, node)
                return int(kind)
        raise OnnxError(f"{self.path}: node '{node.name}': no integer type of ONNX holds whole numbers from {grid.qmin} to {grid.qmax}")

    def _numbers(self, name: str, scale: Array, zero_point: Array, kind: int, *, scalar: bool) -> tuple[str, str]:
        """Scale and zero point as initializers."""
        with np.errstate(over="ignore"):
            written = scale.astype(np.float32)
        if not (np.isfinite(written) & (written >= np.finfo(np.float32).tiny)).all():
            raise OnnxError(f"{self.path}: '{name}' lies on a grid of scale {scale.min():g} to {scale.max():g}, which float32 cannot hold; "
                            "quantize the network in float32")
        shape = () if scalar else scale.shape
        return (self.constant(written.reshape(shape), f"{name}.scale"),
                self.constant(zero_point.astype(helper.tensor_dtype_to_np_dtype(kind)).reshape(shape), f"{name}.zero_point"))


def _same(a: tuple[AnyArray, ...], b: tuple[AnyArray, ...]) -> bool:
    return all(map(np.array_equal, a, b))


def _form(scale: AnyArray, zero_point: AnyArray) -> tuple[AnyArray, AnyArray, dict[str, int]]:
    """Scales given for every entry of a weight, as one number, one an index of an axis, or one a block along an axis."""
    both = np.stack([scale, zero_point])
    corner = both[(slice(None), *(slice(0, 1) for _ in scale.shape))]
    if np.array_equal(both, np.broadcast_to(corner, both.shape)):
        return corner[0], corner[1], {}
    for axis in range(scale.ndim):
        line = both[tuple(slice(None) if i in (0, axis + 1) else slice(0, 1) for i in range(both.ndim))]
        if np.array_equal(both, np.broadcast_to(line, both.shape)):
            return line[0].reshape(-1), line[1].reshape(-1), {"axis": axis}
    # blocks: the coarsest along one axis that tell all scales
    best: tuple[int, int, AnyArray] | None = None
    for axis in range(scale.ndim):
        count = scale.shape[axis]
        for size in range(count, 0, -1):
            blocks = np.take(both, np.arange(0, count, size), axis=axis + 1)
            if np.array_equal(np.take(blocks, np.arange(count) // size, axis=axis + 1), both):
                if best is None or blocks.size < best[2].size:
                    best = (axis, size, blocks)
                break
    assert best is not None  # blocks of size 1 tell everything
    axis, size, blocks = best
    return blocks[0], blocks[1], {"axis": axis, "block_size": size}


