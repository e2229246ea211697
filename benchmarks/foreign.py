"""Is a random ONNX file the same function after eqfact has read, folded, rescaled, quantized and written it? onnxruntime says.

The files are valid, and written as exporters write: layers, scalings, norms and gates one ONNX node after the other, on tensors whose
axes were turned, split and merged on the way, with constants shared and outputs taken anywhere. Each file is opened and loaded, checked
value by value, and written as read, with BatchNorms folded, with random factors (powers of two) and quantized to eight bits; each of these
must take and make the tensors of the file read. Seeded: a network's number makes it again.

    python -m benchmarks foreign --count 1000 --seed 0
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

#: Samples that a file is run on.
SAMPLES = 3
#: Entries of a tensor, from which on a network ends.
LARGEST = 4000
#: How far outputs of a written file may be off, as a share of the largest; and quantized ones from eqfact's, in dB.
FLOAT, QUANTIZED = 1e-4, 15.0
OPSETS = (13, 14, 17, 18, 21)

Arrays = Mapping[str, np.ndarray[Any, Any]]


class Network:
    """A file under construction. Every method adds what it is called after, where that fits the tensor that the file ends with."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = int(self.rng.choice(OPSETS))
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray[Any, Any]] = {}
        sample = [(4, 2, 3), (6,), (5, 4), (3, 4, 4), (4, 6, 6), (8, 5, 5)][self.rng.integers(6)]
        self.feeds = {"x": self.normal(SAMPLES, *sample)}
        #: The last tensor: its name, its shape, and the axis of its batch; and all of them.
        self.name, self.shape, self.batch = "x", (SAMPLES, *sample), 0
        self.made = [(self.name, self.shape, self.batch)]
        self.product()
        for _ in range(self.rng.integers(2, 10)):
            STEPS[self.rng.integers(len(STEPS))](self)
            self.made.append((self.name, self.shape, self.batch))
            if np.prod(self.shape) > LARGEST:
                break

    def model(self) -> onnx.ModelProto:
        read = {name for node in self.nodes for name in node.input}
        inner = [name for name, *_ in self.made[1:]]
        loose = [name for name in inner if name not in read][:2]
        anywhere = [str(self.rng.choice(inner))] if self.rng.random() < 0.2 else []
        ends = dict.fromkeys([self.name, *loose, *anywhere])
        outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ends]
        inputs = [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", *self.feeds["x"].shape[1:]])]
        weights = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "foreign", inputs, outputs, weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8 if self.opset < 21 else 10)

    # ------------------------------------------------------------------------------------------- nodes and constants

    def normal(self, *shape: int) -> np.ndarray[Any, Any]:
        return self.rng.standard_normal(shape).astype(np.float32)

    def constant(self, value: Any, *, shared: bool = True) -> str:
        """Its name: now and then that of another one of its shape, as exporters merge what is equal."""
        array = np.asarray(value)
        alike = [name for name, other in self.constants.items() if other.shape == array.shape and other.dtype == array.dtype == np.float32]
        if shared and alike and self.rng.random() < 0.2:
            return str(self.rng.choice(alike))
        name = f"k{len(self.constants)}"
        self.constants[name] = array
        return name

    def whole(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64), shared=False)

    def number(self, value: float) -> str:
        return self.constant(np.float32(value), shared=False)

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def then(self, kind: str, *more: str, **attributes: Any) -> None:
        """A node that reads the last tensor first, and makes the next."""
        self.name = self.node(kind, self.name, *more, **attributes)

    def axes(self, least: int = 1) -> list[int]:
        """The axes that are not the batch, with so many entries at least."""
        return [i for i, n in enumerate(self.shape) if i != self.batch and n >= least]

    def resized(self, axis: int, size: int) -> None:
        self.shape = (*self.shape[:axis], size, *self.shape[axis + 1:])

    def images(self, least: int = 1) -> bool:
        return self.batch == 0 and len(self.shape) == 4 and min(self.shape[2:]) >= least

    def alike(self, axis: int | None = None) -> str | None:
        """Another tensor of this shape, or of any size along one axis, which becomes that of both."""
        size = [n for i, n in enumerate(self.shape) if i != axis]
        found = [(name, shape) for name, shape, batch in self.made if batch == self.batch and len(shape) == len(self.shape)
                 and [n for i, n in enumerate(shape) if i != axis] == size]
        if not found:
            return None
        name, shape = found[self.rng.integers(len(found))]
        if axis is not None:
            self.resized(axis, self.shape[axis] + shape[axis])
        return name

    # ------------------------------------------------------------------------------------------- layers

    def product(self) -> None:
        if self.batch < len(self.shape) - 1:
            n = self.shape[-1]
            m = n if self.rng.random() < 0.3 else int(self.rng.integers(2, 7))
            self.then("MatMul", self.constant(self.normal(n, m)))
            self.resized(len(self.shape) - 1, m)
            if self.rng.random() < 0.5:
                self.name = self.node("Add", *self.rng.permutation([self.name, self.constant(self.normal(m))]).tolist())

    def dense(self) -> None:
        if len(self.shape) == 2 and self.batch == 0:
            m, turned = int(self.rng.integers(2, 7)), bool(self.rng.integers(2))
            weight = self.normal(m, self.shape[1]) if turned else self.normal(self.shape[1], m)
            self.then("Gemm", self.constant(weight), self.constant(self.normal(m)), transB=int(turned), alpha=0.5, beta=2.0)
            self.shape = self.shape[0], m

    def dense_on_tokens(self) -> None:
        """A Gemm on the rows of all samples together, as PyTorch's addmm is exported."""
        if self.batch == 0 and len(self.shape) > 2:
            m, n = int(self.rng.integers(2, 7)), self.shape[-1]
            self.then("Reshape", self.whole(-1, n))
            self.then("Gemm", self.constant(self.normal(n, m)), self.constant(self.normal(m)))
            self.shape = (*self.shape[:-1], m)
            self.then("Reshape", self.whole(-1, *self.shape[1:]))

    def einsum(self) -> None:
        """Over one axis, which comes to stand elsewhere."""
        letters, axis, m = "abcde"[:len(self.shape)], int(self.rng.choice(self.axes())), int(self.rng.integers(2, 7))
        made = [*(a for i, a in enumerate(letters) if i != axis), "z"]
        made = [made[i] for i in self.rng.permutation(len(made))] if self.rng.random() < 0.5 else made
        self.then("Einsum", self.constant(self.normal(self.shape[axis], m)), equation=f"{letters},{letters[axis]}z->{''.join(made)}")
        sizes = dict(zip(letters, self.shape, strict=True)) | {"z": m}
        self.shape, self.batch = tuple(sizes[a] for a in made), made.index(letters[self.batch])

    def convolution(self) -> None:
        if self.images():
            n, kernel = self.shape[1], int(self.rng.choice([1, 1, 3]))
            groups = int(self.rng.choice([1, 1, n, 2 - n % 2]))
            m = groups * int(self.rng.integers(1, 1 + 6 // min(groups, 6)))
            stride = int(self.rng.choice([1, 2]))
            bias = [self.constant(self.normal(m))] if self.rng.random() < 0.5 else []
            self.then("Conv", self.constant(self.normal(m, n // groups, kernel, kernel)), *bias, pads=[kernel // 2] * 4, group=groups,
                      strides=[stride] * 2)
            self.shape = (self.shape[0], m, *((size - 1) // stride + 1 for size in self.shape[2:]))

    def widened(self) -> None:
        if self.images() and max(self.shape[2:]) < 9:
            m = int(self.rng.integers(2, 5))
            self.then("ConvTranspose", self.constant(self.normal(self.shape[1], m, 2, 2)), strides=[2, 2])
            self.shape = self.shape[0], m, 2 * self.shape[2], 2 * self.shape[3]

    def norm(self) -> None:
        if self.batch == 0:
            c = self.shape[1]
            self.then("BatchNormalization", *(self.constant(self.normal(c)) for _ in range(3)),
                      self.constant(np.abs(self.normal(c)) + np.float32(0.1), shared=False))

    def scaling(self) -> None:
        axes, kind = self.axes(), str(self.rng.choice(["Mul", "Add", "Sub", "Div"]))
        along = [self.rng.choice(axes)] if self.rng.random() < 0.6 else [i for i in axes if self.rng.random() < 0.5]
        dims = [n if i in along else 1 for i, n in enumerate(self.shape)]
        while dims and dims[0] == 1 and self.rng.random() < 0.7:
            del dims[0]
        factor = self.constant((self.rng.uniform(0.5, 2.0, dims) * self.rng.choice([-1, 1])).astype(np.float32))
        self.name = self.node(kind, *(self.rng.permutation([self.name, factor]).tolist() if kind != "Div" else (self.name, factor)))

    def expanded(self) -> None:
        """A constant, repeated for every sample before it is added or multiplied."""
        if self.batch == 0:
            first = self.node("Slice", self.node("Shape", self.name), self.whole(0), self.whole(1))
            rest = [n if self.rng.random() < 0.5 else 1 for n in self.shape[1:]]
            sizes = self.node("Concat", first, self.whole(*rest), axis=0)
            own = self.node("Expand", self.constant(self.rng.uniform(0.5, 2.0, (1, *rest)).astype(np.float32)), sizes)
            self.name = self.node(str(self.rng.choice(["Add", "Mul"])), *self.rng.permutation([self.name, own]).tolist())

    def layer_norm(self) -> None:
        if self.batch < len(self.shape) - 1:
            apart = self.node("Sub", self.name, self.reduced("ReduceMean", self.name, -1))
            square = self.node("Pow", apart, self.number(2.0)) if self.rng.random() < 0.5 else self.node("Mul", apart, apart)
            root = self.node("Sqrt", self.node("Add", self.reduced("ReduceMean", square, -1), self.number(1e-5)))
            scaled = self.node("Mul", self.node("Div", apart, root), self.constant(self.normal(self.shape[-1])))
            self.name = self.node("Add", scaled, self.constant(self.normal(self.shape[-1])))

    # ------------------------------------------------------------------------------------------- activations

    def rectified(self) -> None:
        self.then("Relu")

    def activation(self) -> None:
        kinds = ["LeakyRelu", "Identity", "Abs", "Neg", "Sigmoid", "Tanh", "HardSigmoid", "Softplus", "Elu"]
        self.then(str(self.rng.choice(kinds + ["HardSwish"] * (self.opset > 13))))

    def sloped(self) -> None:
        if self.batch < len(self.shape) - 1:
            self.then("PRelu", self.constant(self.rng.uniform(0.1, 0.9, self.shape[-1:]).astype(np.float32)))

    def clipped(self) -> None:
        self.then("Clip", self.number(self.rng.choice([0.0, -0.5])), self.number(self.rng.choice([0.7, 6.0])))

    def squared(self) -> None:
        self.then("Pow", self.number(2.0))

    def gelu(self) -> None:
        error = self.node("Add", self.node("Erf", self.node("Div", self.name, self.number(2**0.5))), self.number(1.0))
        self.name = self.node("Mul", self.node("Mul", self.name, error), self.number(0.5))

    def gate(self) -> None:
        self.then("Mul", self.node("Sigmoid", self.name))

    def squeezed_gate(self) -> None:
        if self.images():
            n = self.shape[1]
            mean = self.node("GlobalAveragePool", self.name)
            self.then("Mul", self.node("Sigmoid", self.node("Conv", mean, self.constant(self.normal(n, n, 1, 1)))))

    def softmax(self) -> None:
        if self.batch < len(self.shape) - 1:
            self.then("Softmax", axis=-1)

    # ------------------------------------------------------------------------------------------- several values

    def joined(self) -> None:
        if other := self.alike():
            self.then(str(self.rng.choice(["Add", "Add", "Add", "Sub", "Mul", "Max", "Min"])), other)

    def beside(self) -> None:
        axis = int(self.rng.choice(self.axes()))
        if other := self.alike(axis):
            self.name = self.node("Concat", *self.rng.permutation([self.name, other]).tolist(), axis=axis)

    def nothing_beside(self) -> None:
        axis = int(self.rng.choice(self.axes()))
        nothing = self.node("Slice", self.name, self.whole(self.shape[axis]), self.whole(2**31), self.whole(axis))
        self.name = self.node("Concat", *self.rng.permutation([self.name, nothing]).tolist(), axis=axis)

    def halves(self) -> None:
        even = [i for i in self.axes(2) if self.shape[i] % 2 == 0]
        if even:
            axis = int(self.rng.choice(even))
            size = self.shape[axis] // 2
            first, second = f"v{len(self.nodes)}a", f"v{len(self.nodes)}b"
            inputs, count = ([self.name], {"num_outputs": 2}) if self.opset >= 18 else ([self.name, self.whole(size, size)], {})
            self.nodes.append(helper.make_node("Split", inputs, [first, second], axis=axis, **count))
            self.resized(axis, size)
            self.made.append((second, self.shape, self.batch))
            self.name = first

    # ------------------------------------------------------------------------------------------- moves

    def turned(self) -> None:
        order = [int(i) for i in self.rng.permutation(len(self.shape))]
        if self.rng.random() < 0.7:
            order = [self.batch, *(i for i in order if i != self.batch)]
        self.then("Transpose", perm=order)
        self.shape, self.batch = tuple(self.shape[i] for i in order), order.index(self.batch)

    def merged(self) -> None:
        if self.batch == 0 and len(self.shape) > 2:
            i = int(self.rng.integers(1, len(self.shape) - 1))
            shape = (*self.shape[:i], self.shape[i] * self.shape[i + 1], *self.shape[i + 2:])
            self.then("Reshape", self.whole(*(0 if k == 0 or (k < i and self.rng.random() < 0.5) else n for k, n in enumerate(shape))))
            self.shape = shape

    def divided(self) -> None:
        even = [i for i in self.axes(4) if self.shape[i] % 2 == 0]
        if self.batch == 0 and len(self.shape) < 5 and even:
            i, half = even[0], self.shape[even[0]] // 2
            self.shape = (*self.shape[:i], *((half, 2) if self.rng.random() < 0.5 else (2, half)), *self.shape[i + 1:])
            self.then("Reshape", self.whole(-1, *self.shape[1:]))

    def longer(self) -> None:
        if len(self.shape) < 5:
            axis = int(self.rng.integers(0, len(self.shape) + 1))
            self.then("Unsqueeze", self.whole(axis))
            self.shape, self.batch = (*self.shape[:axis], 1, *self.shape[axis:]), self.batch + (axis <= self.batch)

    def shorter(self) -> None:
        single = [i for i in self.axes() if self.shape[i] == 1]
        if single and len(self.shape) > 2:
            self.then("Squeeze", self.whole(single[0]))
            self.without(single[0])

    def without(self, axis: int) -> None:
        self.shape, self.batch = (*self.shape[:axis], *self.shape[axis + 1:]), self.batch - (axis < self.batch)

    def sliced(self) -> None:
        if axes := self.axes(2):
            axis = int(self.rng.choice(axes))
            start, end = sorted(int(i) for i in self.rng.choice(self.shape[axis] + 1, 2, replace=False))
            self.then("Slice", self.whole(start), self.whole(end), self.whole(axis))
            self.resized(axis, end - start)

    def gathered(self) -> None:
        axis = int(self.rng.choice(self.axes()))
        if self.rng.random() < 0.3 and len(self.shape) > 2:
            self.then("Gather", self.constant(np.int64(self.rng.integers(self.shape[axis])), shared=False), axis=axis)
            self.without(axis)
        else:
            chosen = self.rng.integers(-self.shape[axis], self.shape[axis], int(self.rng.integers(1, 5)))
            self.then("Gather", self.whole(*chosen.tolist()), axis=axis)
            self.resized(axis, len(chosen))

    def padded(self) -> None:
        axis, pads = int(self.rng.choice(self.axes())), [0] * (2 * len(self.shape))
        pads[axis], pads[len(self.shape) + axis] = 1, int(self.rng.integers(2))
        self.then("Pad", self.whole(*pads), mode=str(self.rng.choice(["constant", "edge"])))
        self.resized(axis, self.shape[axis] + sum(pads))

    def resampled(self) -> None:
        if self.images() and max(self.shape[2:]) < 9:
            mode = str(self.rng.choice(["nearest", "linear"]))
            old = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"} if self.rng.random() < 0.5 else {}
            self.then("Resize", "", self.constant(np.float32([1, 1, 2, 2]), shared=False), mode=mode, **old)
            self.shape = (*self.shape[:2], 2 * self.shape[2], 2 * self.shape[3])

    # ------------------------------------------------------------------------------------------- over space

    def reduced(self, kind: str, tensor: str, axis: int, keep: int = 1) -> str:
        if kind == "ReduceSum" or self.opset >= 18:
            return self.node(kind, tensor, self.whole(axis), keepdims=keep)
        return self.node(kind, tensor, axes=[axis], keepdims=keep)

    def summed(self) -> None:
        if len(self.shape) > 2:
            axis, keep = int(self.rng.choice(self.axes())), int(self.rng.integers(2))
            self.name = self.reduced(str(self.rng.choice(["ReduceMean", "ReduceSum", "ReduceMax"])), self.name, axis, keep)
            self.resized(axis, 1)
            if not keep:
                self.without(axis)

    def pooled(self) -> None:
        if self.images(2):
            stride = int(self.rng.integers(1, 3))
            self.then(str(self.rng.choice(["MaxPool", "AveragePool"])), kernel_shape=[2, 2], strides=[stride] * 2)
            self.shape = (*self.shape[:2], *((n - 2) // stride + 1 for n in self.shape[2:]))

    def pooled_whole(self) -> None:
        if self.images():
            self.then(str(self.rng.choice(["GlobalAveragePool", "GlobalMaxPool"])))
            self.shape = (*self.shape[:2], 1, 1)


#: What a network is made of; what makes most of a real one stands here several times.
STEPS: list[Callable[[Network], None]] = [
    Network.product, Network.product, Network.dense, Network.convolution, Network.convolution, Network.convolution, Network.widened,
    Network.norm, Network.norm, Network.scaling, Network.scaling, Network.layer_norm, Network.rectified, Network.rectified,
    Network.activation, Network.sloped, Network.clipped, Network.gelu, Network.gate, Network.squeezed_gate, Network.softmax, Network.joined,
    Network.joined, Network.beside, Network.halves, Network.turned, Network.turned, Network.merged, Network.divided, Network.longer,
    Network.shorter, Network.sliced, Network.gathered, Network.padded, Network.resampled, Network.summed, Network.pooled,
    Network.pooled_whole, Network.dense_on_tokens, Network.einsum, Network.expanded, Network.squared, Network.nothing_beside,
]


def faults(net: Network, folder: Path, said: Counter[str]) -> Iterator[str]:
    """What is wrong with what eqfact makes of a network; what it refuses is counted in ``said``."""
    import eqfact as eq
    import eqfact.onnx
    from eqfact.onnx import OnnxError
    from eqfact.onnx.checking import checked
    from eqfact.onnx.running import run

    path, feeds = folder / "net.onnx", net.feeds
    onnx.save(net.model(), path)
    truth = run(path, feeds)
    if max(float(np.abs(value).max()) for value in truth.values()) > 1e6:
        said["too large to compare"] += 1
        return
    try:
        opened = eqfact.onnx.open(path, feeds)
    except OnnxError as error:
        said[f"not opened: {_reason(error)}"] += 1
        return
    ways: list[tuple[str, eq.Graph, Any]] = [("opened", opened.graph, opened)]
    try:
        ways.append(("loaded", eqfact.onnx.load(path), eqfact.onnx))
    except OnnxError as error:
        said[f"not loaded: {_reason(error)}"] += 1
    for way, graph, file in ways:
        if not (verdict := checked(opened, graph, feeds)):
            yield f"{way}, misread: {verdict.message}"
            continue
        inputs: Any = opened.boundary(feeds) if file is opened else feeds
        folded = eq.fold_batchnorm(graph)
        resolved = eq.channels(folded)
        free = np.exp2(net.rng.integers(-3, 4, resolved.degrees_of_freedom).astype(float))
        moved = eq.Factorization(resolved, np.concatenate([[1.0], free])).apply(folded)
        for what, network in (("as read", graph), ("folded", folded), ("rescaled", moved)):
            file.save(folder / "out.onnx", network)
            yield from _apart(f"{way}, {what}", truth, run(folder / "out.onnx", feeds))
        small = eq.quantize(moved, weights=eq.UniformQuantizer(), activations=eq.UniformQuantizer(symmetric=False),
                            stats=eq.calibrate(moved, inputs))
        file.save_qdq(folder / "out.onnx", small)
        made = eq.forward(small, inputs)
        ours = made if isinstance(made, Mapping) else {small.outputs[0]: made}
        theirs = run(folder / "out.onnx", feeds)
        ours = dict(opened.shown(ours) if file is opened else ours)
        if {name: value.shape for name, value in theirs.items()} != {name: value.shape for name, value in truth.items()}:
            yield f"{way}, quantized: other outputs"
        elif opened.kept:
            continue  # what is kept between two parts makes of rounded values what eqfact does not see
        elif (near := min((eq.sqnr(value, theirs[name]) for name, value in ours.items() if value.any()), default=np.inf)) < QUANTIZED:
            yield f"{way}, quantized: {near:.1f} dB from eqfact's"


def _reason(error: Exception) -> str:
    """What an error says, without the names in it."""
    return re.sub(r"'[^']*'|\([^)]*\)|\d+", "…", str(error).partition(": ")[2])[:90]


def _apart(what: str, truth: Arrays, made: Arrays) -> Iterator[str]:
    for name, value in truth.items():
        if name not in made or made[name].shape != value.shape:
            yield f"{what}: '{name}' has another shape, or is gone"
        elif (error := float(np.abs(made[name] - value).max() / (np.abs(value).max() or 1.0))) > FLOAT:
            yield f"{what}: '{name}' is off by {error:.3g} of its largest"


def main(argv: list[str]) -> int:
    """Print what is wrong with which network, and what was refused; 1 if anything is wrong."""
    parser = argparse.ArgumentParser("python -m benchmarks foreign", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the number of the first network")
    args = parser.parse_args(argv)
    said, wrong = Counter[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seed, args.seed + args.count):
            try:
                found = list(faults(Network(seed), Path(folder), said))
            except Exception as error:  # whatever it is, it belongs to a network
                found = [f"{type(error).__name__}: {str(error)[:300]}"]
            wrong += bool(found)
            for fault in found:
                print(f"{seed}: {fault}", flush=True)
    print(f"{args.count} networks, {wrong} with faults")
    for reason, count in said.most_common(12):
        print(f"{count:6d} {reason}")
    return int(wrong > 0)
