"""Which networks shall a law be tried on? Whole random ones: Hypothesis draws a seed and the structure, numpy the weights.

Networks are small (up to six channels a layer, up to six pixels an axis) and ill on purpose: fan-out, residuals, concats,
groups, one op at several nodes, dead and nearly dead channels, inner values that are outputs, several inputs, limits,
non-zero padding, products of values, normalisations, attention. Nothing is filtered: every draw is a network. Magnitudes are tracked
while building, so that no value overflows and none gets so small that powers of two would round.

>>> from hypothesis import given
>>> @given(networks().flatmap(lambda g: st.tuples(st.just(g), factorizations(g), batches(g))))
... def test_my_pass(drawn):
...     graph, factors, x = drawn
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from eqfact import ops
from eqfact.channels import channels
from eqfact.factorization import Factorization
from eqfact.graph import Graph, Node
from eqfact.ops import Array, Op, Shape
from eqfact.ops.base import Padding
from eqfact.testing.kinds import excluded

#: Entries of the data lie within these bounds.
LARGEST_INPUT = 2.0
#: Values may not grow beyond this before a product or a saturating curve reads them: keeps exp(-x) and its products normal.
LARGEST_SATURATING = 16.0
#: Nor beyond this before layers that make queries and keys of it, whose products go through an exponential.
LARGEST_QUERY = 3.0
#: Rows of weights are normalised to at most 1 and spread down to this.
SMALLEST_ROW = 2.0**-3
#: The rows of a nearly dead channel are multiplied by this, once in a network.
NEARLY_DEAD = 2.0**-10
LARGEST_EXPONENT = 4
POOLS: tuple[type[Op], ...] = (ops.MaxPool, ops.MinPool, ops.LpPool, ops.AvgPool)
CURVES: tuple[type[Op], ...] = (ops.Sigmoid, ops.HardSigmoid, ops.Tanh, ops.SiLU, ops.HardSwish, ops.Erf, ops.GELU, ops.Softmax)
NORMS: tuple[type[Op], ...] = (ops.LayerNorm, ops.RMSNorm, ops.GroupNorm, ops.InstanceNorm)

#: Ops without which a step of the builder is none.
NEEDS: dict[str, tuple[type[Op], ...]] = {
    "residual": (ops.Add,), "inception": (ops.Concat,), "batchnorm": (ops.BatchNorm,), "add_mate": (ops.Add,),
    "transposed": (ops.ConvTranspose,), "context": (ops.GlobalAvgPool, ops.Add), "concat": (ops.Concat,), "extend": (ops.Extend,),
    "channel_slice": (ops.Slice,), "permute": (ops.Permute,), "take": (ops.Take,), "unflatten": (ops.Unflatten,),
    "global_pool": (ops.GlobalAvgPool,), "pad": (ops.Pad,), "upsample": (ops.Upsample,), "flatten": (ops.Flatten,),
    "transpose": (ops.Transpose,), "rearrange": (ops.Rearrange,), "affine": (ops.Affine,), "concat_space": (ops.Concat,),
    "blend": (ops.Blend,), "sloped": (ops.Sloped,), "mul": (ops.Mul,), "gated": (ops.Mul,),
    "gate": (ops.Mul, ops.Sigmoid, ops.GlobalAvgPool), "attention": (ops.Scores, ops.Mix),
}


@st.composite
def networks(draw: st.DrawFn, *, max_layers: int = 10, without: Collection[str | type[Op]] = (), axes: Sequence[int] = (0, 1, 2, 3),
             dtypes: Sequence[str] = ("float32", "float64")) -> Graph:
    """A random network of up to ``max_layers`` steps (a block such as a residual branch is one step), float32 or float64.

    ``without`` names what it must not have: ops, as classes (all but Dense and Conv); kinds of ops, as in
    :data:`eqfact.testing.kinds.KINDS_OF_OPS`; or structures, as in :data:`eqfact.testing.kinds.STRUCTURES`. Such networks are never made,
    rather than thrown away. ``axes`` are numbers of axes of space, of which inputs have one. :class:`ValueError` for any other name.
    """
    build = _Builder(draw, excluded(without), axes, dtypes)
    for _ in range(draw(st.integers(1, max_layers))):
        build.step()
    return build.graph()


@st.composite
def batches(draw: st.DrawFn, graph: Graph, *, max_size: int = 3) -> Any:
    """Data for a network, in its dtype: an array, or a dict of arrays for several inputs; random, on a grid (ties, zeros), or all zero."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size, kind = draw(st.integers(1, max_size)), draw(st.sampled_from(["random", "grid", "zero"]))

    def data(shape: Shape) -> Array:
        uniform = rng.uniform(-LARGEST_INPUT, LARGEST_INPUT, (size, *shape))
        chosen = {"random": uniform, "grid": np.rint(uniform * 2) / 2, "zero": 0 * uniform}[kind]
        return chosen.astype(graph.dtype or np.float64)

    arrays = {name: data(shape) for name, shape in graph.inputs.items()}
    return arrays if len(arrays) > 1 else next(iter(arrays.values()))


@st.composite
def factorizations(draw: st.DrawFn, graph: Graph, *, powers_of_two: bool = True) -> Factorization:
    """A random legal factorization: every free label takes its own factor within [1/16, 16]."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    resolved = channels(graph)
    exponents = rng.uniform(-LARGEST_EXPONENT, LARGEST_EXPONENT, resolved.degrees_of_freedom)
    return Factorization(resolved, np.exp2(np.concatenate([[0.0], np.rint(exponents) if powers_of_two else exponents])))


@st.composite
def modules(draw: st.DrawFn, /, **options: Any) -> tuple[Any, tuple[Any, ...]]:
    """A ``torch.nn.Module`` and the tensors to call it with, ``module(*tensors)``: a network of :func:`networks`, as
    :func:`eqfact.testing.to_torch` writes it. The options are those of :func:`networks`."""
    import torch

    from eqfact.testing.modules import to_torch

    graph = draw(networks(**options))
    x = draw(batches(graph))
    arrays = x if isinstance(x, dict) else {next(iter(graph.inputs)): x}
    return to_torch(graph), tuple(torch.from_numpy(arrays[name]) for name in graph.inputs)


@st.composite
def models(draw: st.DrawFn, /, **options: Any) -> tuple[Any, dict[str, Array]]:
    """An ``onnx.ModelProto`` and arrays by name to run it on: a network of :func:`networks`, as :func:`eqfact.testing.to_onnx` writes it.

    The options are those of :func:`networks`. Drawn is what onnxruntime runs: float32 unless ``dtypes`` says otherwise, because it does
    not compute every operator in float64, and no output padding beyond the stride.
    """
    from eqfact.testing.models import dtype_of, to_onnx

    without = (*options.pop("without", ()), "output padding beyond the stride")
    graph = draw(networks(**{"dtypes": ("float32",), **options, "without": without}))
    model, x = to_onnx(graph), draw(batches(graph))
    arrays = x if isinstance(x, dict) else {next(iter(graph.inputs)): x}
    return model, {name: array.astype(dtype_of(model)) for name, array in arrays.items()}


class _Builder:
    """A network under construction; every ``add`` keeps the names, shapes and largest possible entries of all values.

    ``without`` are ops and structures that it must not have; where nothing is excluded, it draws as if there were no such question.
    """

    def __init__(self, draw: st.DrawFn, without: frozenset[str | type[Op]] = frozenset(), axes: Sequence[int] = (0, 1, 2, 3),
                 dtypes: Sequence[str] = ("float32", "float64")) -> None:
        self.draw, self.without, self.axes = draw, without, tuple(axes)
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        self.dtype = np.dtype(draw(st.sampled_from(list(dtypes))))
        self.nodes: list[Node] = []
        self.shapes: dict[str, Shape] = {}
        self.magnitude: dict[str, Array] = {}
        self.nearly_dead = self.products = 0
        space = self.axes[draw(st.integers(0, len(self.axes) - 1))]
        sizes = tuple(draw(st.integers(1, 3 if space == 3 else 6)) for _ in range(space))
        self.inputs = ["x", "y", "z"][:draw(st.sampled_from([1, 1, 2, 3])) if self.may("several inputs") else 1]
        for name in self.inputs:
            self.shapes[name] = (draw(st.integers(1, 4)), *sizes)
            self.magnitude[name] = np.full((1, *self.shapes[name]), LARGEST_INPUT)

    def graph(self) -> Graph:
        read = {name for node in self.nodes for name in node.inputs}
        loose = [name for name in self.shapes if name not in read and name not in self.inputs]
        one = not self.may("several outputs") or (self.may("dead ends") and self.draw(st.booleans()))
        outputs = [loose[-1]] if one else loose  # the other loose ends stay dead ends
        inner = self.draw(st.sampled_from([[], [], *([name] for name in self.shapes)])) if self.may("several outputs") else []
        nodes, outputs = self.nodes, list(dict.fromkeys([*outputs, *inner]))
        if not self.may("dead ends"):
            needed, nodes = set(outputs), []
            for node in reversed(self.nodes):
                if node.name in needed:
                    needed.update(node.inputs)
                    nodes.insert(0, node)
        return Graph({name: self.shapes[name] for name in self.inputs}, tuple(nodes), tuple(outputs))

    def may(self, *what: str | type[Op]) -> bool:
        """Whether the network may have all this."""
        return self.without.isdisjoint(what)

    def some(self, choice: Sequence[Op]) -> Op:
        """One of these ops, or Identity, if the network may have none of them."""
        return self.draw(st.sampled_from([op for op in choice if self.may(type(op))] or [ops.Identity()]))

    def side(self, most: int) -> tuple[int, int]:
        """The padding before and behind an axis."""
        before = self.draw(st.integers(0, most))
        return before, self.draw(st.integers(0, most)) if self.may("asymmetric padding") else before

    def add(self, op: Op, *inputs: str) -> str:
        name = f"{type(op).__name__.lower()}{len(self.nodes)}"
        self.nodes.append(Node(name, op, inputs))
        self.shapes[name] = op.output_shape(*(self.shapes[i] for i in inputs))
        self.magnitude[name] = op.magnitude(*(self.magnitude[i] for i in inputs))
        return name

    def largest(self, name: str) -> float:
        return float(self.magnitude[name].max())

    # ------------------------------------------------------------------------------------------ one step

    def step(self) -> None:
        """Choose a value, every other time the newest, and one of the things that may be done to it."""
        *older, newest = self.shapes
        value = self.draw(st.sampled_from([newest] * (len(older) + 1) + older))
        self.draw(st.sampled_from(self.menu(value)))(value)

    def menu(self, value: str) -> list[Callable[[str], object]]:
        channels, *sizes = self.shapes[value]
        pixels, small = math.prod(sizes), math.prod(sizes) <= 64
        menu: list[Callable[[str], object]] = [self.layer, self.layer, self.layer, self.bottleneck, self.residual, self.twice,
                                               self.inception, self.activation, self.batchnorm, self.add_mate, self.join_mate]
        menu += [self.depthwise, self.grouped, self.transposed, self.context, self.pool] * bool(sizes)
        if channels <= 6:
            menu += [self.concat, self.extend]
        if channels > 1:
            menu += [self.channel_slice, self.permute, self.take]
        if not sizes:
            menu += [self.unflatten] * (1 in self.axes)
        else:
            menu += [self.global_pool] + [self.pad, self.upsample] * small + [self.flatten] * (channels * pixels <= 48)
            menu += [self.transpose, self.rearrange] * (max(channels, *sizes) <= 6) + [self.affine, self.concat_space, self.blend] * small
        if self.largest(value) <= LARGEST_SATURATING:
            menu += [self.curve, self.curve, self.sloped]
            if self.products < 2:
                menu += [self.mul, self.gated] + [self.gate] * bool(sizes)
        if pixels > 1 or channels > 1:
            menu += [self.norm]
        if self.products < 2 and 1 <= len(sizes) <= 2 and pixels <= 36 and self.largest(value) <= LARGEST_QUERY:
            menu += [self.attention] * 6
        if any(self.accepts(node.op, value) for node in self.nodes):
            menu += [self.again]
        return [step for step in menu if self.offers(step.__name__)] if self.without else menu

    def offers(self, step: str) -> bool:
        """Whether a step makes nothing that the network must not have."""
        structures = {"grouped": "groups", "depthwise": "depthwise", "twice": "shared ops", "again": "shared ops"}
        choices = {"pool": POOLS, "join_mate": (ops.Sub, ops.Max, ops.Min), "curve": CURVES, "norm": NORMS,
                   "sloped": (ops.SiLU, ops.HardSwish, ops.GELU)}
        return (self.may(*NEEDS.get(step, ())) and self.may(structures.get(step, ""))
                and not (step == "depthwise" and not self.may("groups")) and (step not in choices or any(map(self.may, choices[step]))))

    def accepts(self, op: Op, value: str) -> bool:
        """Whether a weighted op already in the network can be used on this value, too."""
        if not isinstance(op, ops.Weighted):
            return False
        try:
            return math.prod(op.output_shape(self.shapes[value])) <= 400
        except ValueError:
            return False

    def mates(self, value: str) -> list[str]:
        """Values that can be joined to this one entry by entry, the value itself first."""
        channels, *sizes = self.shapes[value]
        fitting = [name for name, (c, *s) in self.shapes.items() if name != value and len(s) == len(sizes)
                   and all(a == b or 1 in (a, b) for a, b in zip((c, *s), (channels, *sizes), strict=True))]
        return [value, *fitting]

    # ------------------------------------------------------------------------------------------ weighted

    def weights(self, *shape: int) -> tuple[Array, Array | None]:
        """Weights with rows of different sizes and perhaps a bias; perhaps dead or nearly dead rows, or a column that reads nothing."""
        rows = self.rng.normal(size=(shape[0], math.prod(shape[1:])))
        rows *= np.exp2(self.rng.uniform(np.log2(SMALLEST_ROW), 0, shape[0]))[:, None] / np.abs(rows).sum(axis=1, keepdims=True)
        bias = self.rng.uniform(-0.5, 0.5, shape[0]) if self.draw(st.booleans()) else np.zeros(shape[0])
        has_bias = bool(bias.any())
        weight = rows.reshape(shape)
        channel = int(self.rng.integers(shape[0]))
        states = ["healthy", "healthy", "dead", "nearly dead", "reads nothing"]
        match self.draw(st.sampled_from(states if self.may("dead channels") else ["healthy"])):
            case "dead":
                weight[channel] = bias[channel] = 0
            case "nearly dead" if not self.nearly_dead:
                weight[channel] *= NEARLY_DEAD
                bias[channel] *= NEARLY_DEAD
                self.nearly_dead += 1
            case "reads nothing":
                weight[:, int(self.rng.integers(shape[1]))] = 0
        return weight.astype(self.dtype), bias.astype(self.dtype) if has_bias else None

    def layer(self, value: str) -> str:
        """A dense or convolutional layer, often with batch normalization or an activation."""
        out = self.draw(st.integers(1, 6))
        made = self.convolution(value, 1, out) if len(self.shapes[value]) > 1 else self.dense(value, out)
        norm, act = self.draw(st.sampled_from([(False, False), (False, True), (True, False), (True, True)]))
        made = self.batchnorm(made) if norm and self.may(ops.BatchNorm) else made
        return self.activation(made) if act else made

    def bottleneck(self, value: str) -> str:
        """Wide, channel by channel, narrow: MobileNet's block, perhaps residual."""
        wide = self.layer(value)
        if len(self.shapes[value]) > 1:
            wide = self.depthwise(wide) if self.may("depthwise", "groups") else self.convolution(wide, 1, self.shapes[wide][0])
        elif self.may(ops.BatchNorm):
            wide = self.batchnorm(wide)
        deep = self.activation(wide)
        narrow = self.add(self.same_sizes(deep, self.shapes[value][0]), deep)
        added = self.draw(st.booleans()) and value in self.mates(narrow) and self.may(ops.Add)
        return self.add(ops.Add(), narrow, value) if added else narrow

    def dense(self, value: str, out: int) -> str:
        return self.add(ops.Dense(*self.weights(out, self.shapes[value][0])), value)

    def grouped(self, value: str) -> str:
        """A convolution in groups that are neither one nor depthwise, behind one that makes its channels."""
        channels, groups = self.draw(st.sampled_from([(4, 2), (6, 2), (6, 3)]))
        made = self.activation(self.convolution(value, 1, channels))
        return self.convolution(made, groups, groups * self.draw(st.integers(1, 6 // groups)))

    def depthwise(self, value: str) -> str:
        channels = self.shapes[value][0]
        return self.convolution(value, channels, channels * self.draw(st.integers(1, max(1, 6 // channels))))

    def convolution(self, value: str, groups: int, out: int) -> str:
        channels, *sizes = self.shapes[value]
        kernel, stride, dilation = (tuple(self.draw(st.integers(1, most)) for _ in sizes) for most in (3, 2, 2))
        most = 2 if math.prod(sizes) <= 64 else 0
        padding = tuple(self.side(most) for _ in sizes)
        # an axis too short for the kernel gets a kernel of 1
        fits = (d * (k - 1) < n + sum(p) for n, k, d, p in zip(sizes, kernel, dilation, padding, strict=True))
        kernel = tuple(k if fit else 1 for k, fit in zip(kernel, fits, strict=True))
        weight, bias = self.weights(out, channels // groups, *kernel)
        return self.add(ops.Conv(weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups), value)

    def transposed(self, value: str) -> str:
        if self.draw(st.booleans()):  # several channels, so that there are groups
            value = self.add(self.same_sizes(value, 4), value)
        channels, *sizes = self.shapes[value]
        most = channels if self.may("depthwise") else max(1, channels - 1)
        groups = self.draw(st.sampled_from([g for g in range(1, most + 1) if channels % g == 0])) if self.may("groups") else 1
        kernel, dilation = (tuple(self.draw(st.integers(1, 2)) for _ in sizes) for _ in "kd")
        stride = tuple(self.draw(st.integers(1, 2 if n <= 3 else 1)) for n in sizes)
        far = self.may("output padding beyond the stride")
        extra = tuple(self.draw(st.integers(0, (max(s, d) if far else s) - 1)) for s, d in zip(stride, dilation, strict=True))
        padding = tuple((self.draw(st.integers(0, int(n > 1))), 0) if self.may("asymmetric padding") else (0, 0) for n in sizes)
        weight, bias = self.weights(groups * self.draw(st.integers(1, max(1, 4 // groups))), channels // groups, *kernel)
        return self.add(ops.ConvTranspose(weight, bias, stride=stride, padding=padding, output_padding=extra, dilation=dilation,
                                          groups=groups), value)

    def batchnorm(self, value: str) -> str:
        channels = self.shapes[value][0]
        gamma, beta, mean = (self.rng.normal(size=channels) / 2 for _ in range(3))
        if self.may("dead channels") and self.draw(st.booleans()):  # a channel that batch normalization switches off
            dead = int(self.rng.integers(channels))
            gamma[dead] = beta[dead] = 0
        var = self.rng.uniform(0.5, 2, channels)
        gamma, beta, mean, var = (p.astype(self.dtype) for p in (gamma, beta, mean, var))
        return self.add(ops.BatchNorm(gamma, beta, mean, var, eps=self.draw(st.sampled_from([1e-5, 1e-3]))), value)

    def same_sizes(self, value: str, out: int) -> Op:
        """A weighted op that keeps the spatial sizes of its input."""
        channels, *sizes = self.shapes[value]
        if not sizes:
            return ops.Dense(*self.weights(out, channels))
        kernel = self.draw(st.sampled_from([1, 3]))
        weight, bias = self.weights(out, channels, *(kernel for _ in sizes))
        return ops.Conv(weight, bias, padding=kernel // 2)

    def twice(self, value: str) -> str:
        """One op at two nodes, one after the other."""
        stem = self.add(self.same_sizes(value, self.draw(st.integers(1, 4))), value)
        op = self.same_sizes(stem, self.shapes[stem][0])
        return self.add(op, self.activation(self.add(op, stem)))

    def again(self, value: str) -> str:
        """An op already in the network, used on this value, too."""
        op = self.draw(st.sampled_from([node.op for node in self.nodes if self.accepts(node.op, value)]))
        return self.add(op, value)

    # ------------------------------------------------------------------------------------------ commuting

    def activation(self, value: str) -> str:
        channels = self.shapes[value][0]
        slopes = self.rng.uniform(-0.5, 1.5, channels).astype(self.dtype)
        lows, highs = (self.rng.uniform(*bounds, channels).astype(self.dtype) for bounds in ((-1.0, 0.25), (0.25, 1.0)))
        return self.add(self.some([
            ops.ReLU(), ops.LeakyReLU(0.1), ops.PReLU(slopes), ops.PReLU(slopes[:1]), ops.ReLU6(), ops.Clip(lows, highs),
            ops.Clip(-0.5, math.inf), ops.Clip(-math.inf, highs), ops.Identity(), ops.Abs(),
        ]), value)

    def pool(self, value: str) -> str:
        sizes = self.shapes[value][1:]
        kernel = tuple(self.draw(st.integers(1, min(3, n))) for n in sizes)
        stride = self.draw(st.sampled_from([None, 1, 2]))
        padding: Padding = tuple(self.side(k - 1) for k in kernel)
        apart = tuple(2 if n > 2 * (k - 1) else 1 for n, k in zip(sizes, kernel, strict=True))
        return self.add(self.some([
            ops.MaxPool(kernel, stride=stride, padding=padding),
            ops.MaxPool(kernel, stride=stride, dilation=apart),
            ops.MinPool(kernel, stride=stride, padding=padding),
            ops.LpPool(kernel, stride=stride, padding=padding, p=self.draw(st.integers(1, 3))),
            ops.AvgPool(kernel, stride=stride, padding=padding),
            ops.AvgPool(kernel, stride=stride, padding=padding, count_include_pad=False),
        ]), value)

    def global_pool(self, value: str) -> str:
        return self.add(ops.GlobalAvgPool(), value)

    def pad(self, value: str) -> str:
        padding = tuple(self.side(1) for _ in self.shapes[value][1:])
        return self.add(ops.Pad(padding, self.draw(st.sampled_from([0.0, 1.5])) if self.may("constant padding") else 0.0), value)

    def upsample(self, value: str) -> str:
        return self.add(ops.Upsample(tuple(self.draw(st.integers(1, 2)) for _ in self.shapes[value][1:])), value)

    def flatten(self, value: str) -> str:
        return self.layer(self.add(ops.Flatten(), value))

    def unflatten(self, value: str) -> str:
        """Give a flat value an axis of space again."""
        channels = self.shapes[value][0]
        pixels = self.draw(st.sampled_from([n for n in range(1, channels + 1) if channels % n == 0]))
        return self.add(ops.Unflatten((channels // pixels, pixels)), value)

    def transpose(self, value: str) -> str:
        """Exchange axes, sometimes the channels with space."""
        return self.add(ops.Transpose(tuple(self.draw(st.permutations(range(len(self.shapes[value])))))), value)

    def rearrange(self, value: str) -> str:
        """Axes split into two factors each where they can be, and put together in another order."""
        split = [(n // k, k) for n in self.shapes[value] for k in [self.draw(st.sampled_from([k for k in (1, 2, 3) if n % k == 0]))]]
        order = self.draw(st.permutations(range(2 * len(split))))
        groups = [tuple(order[i:i + 2]) for i in range(0, len(order), 2)]
        return self.add(ops.Rearrange(tuple(split), tuple(groups)), value)

    def take(self, value: str) -> str:
        """Entries along any axis, in any order, some of them twice."""
        shape = self.shapes[value]
        axis = self.draw(st.integers(0, len(shape) - 1))
        return self.add(ops.Take(tuple(self.draw(st.lists(st.integers(0, shape[axis] - 1), min_size=1, max_size=6))), axis), value)

    def affine(self, value: str) -> str:
        """A slope and a shift that differ over space."""
        shape = self.shapes[value]
        slope, shift = (self.rng.normal(size=tuple(n if self.draw(st.booleans()) else 1 for n in shape)) / 2 for _ in range(2))
        return self.add(ops.Affine(slope.astype(self.dtype), shift.astype(self.dtype)), value)

    def concat_space(self, value: str) -> str:
        """A value and a branch of it, one behind the other in space."""
        branch = self.add(self.same_sizes(value, self.shapes[value][0]), value)
        axis = self.draw(st.integers(1, len(self.shapes[value]) - 1))
        return self.add(ops.Concat(axis), *self.draw(st.permutations([value, branch])))

    def blend(self, value: str) -> str:
        """A matrix along an axis of space."""
        axis = self.draw(st.integers(1, len(self.shapes[value]) - 1))
        matrix, _ = self.weights(self.draw(st.integers(1, 4)), self.shapes[value][axis])
        return self.add(ops.Blend(matrix, axis), value)

    def extend(self, value: str) -> str:
        """A constant beside the value, along any axis."""
        shape = list(self.shapes[value])
        axis = self.draw(st.integers(0, len(shape) - 1))
        shape[axis] = self.draw(st.integers(1, 2))
        constant = self.rng.uniform(-1, 1, shape).astype(self.dtype)
        return self.add(ops.Extend(constant, axis, front=self.draw(st.booleans())), value)

    def channel_slice(self, value: str) -> str:
        """Channels ``start`` to ``stop``, counted from either end."""
        channels = self.shapes[value][0]
        start = self.draw(st.integers(0, channels - 1))
        stop = self.draw(st.integers(start + 1, channels))
        return self.add(ops.Slice(start - channels * self.draw(st.integers(0, 1)), stop), value)

    def permute(self, value: str) -> str:
        return self.add(ops.Permute(tuple(self.rng.permutation(self.shapes[value][0]).tolist())), value)

    def residual(self, value: str) -> str:
        """A value and a branch of it, added."""
        branch = self.add(self.same_sizes(value, self.shapes[value][0]), value)
        if self.draw(st.booleans()):
            branch = self.activation(branch)
        return self.add(ops.Add(), *self.draw(st.permutations([value, branch])))

    def context(self, value: str) -> str:
        """A value and something made of its mean, added at every pixel."""
        mean = self.add(ops.GlobalAvgPool(), value)
        return self.add(ops.Add(), value, self.add(self.same_sizes(mean, self.shapes[value][0]), mean))

    def inception(self, value: str) -> str:
        """Two branches of a value, side by side."""
        branches = [self.add(self.same_sizes(value, self.draw(st.integers(1, 3))), value) for _ in range(2)]
        return self.add(ops.Concat(), branches[0], self.activation(branches[1]))

    def add_mate(self, value: str) -> str:
        mate = self.draw(st.sampled_from(self.mates(value)))
        return self.add(ops.Add(), value, mate, *[value] * self.draw(st.integers(0, 1)))

    def join_mate(self, value: str) -> str:
        """A difference, or the largest or smallest of two values."""
        mate = self.draw(st.sampled_from(self.mates(value)[::-1]))
        return self.add(self.some([ops.Sub(), ops.Max(), ops.Min()]), value, mate)

    def concat(self, value: str) -> str:
        fitting = [name for name, shape in self.shapes.items() if shape[1:] == self.shapes[value][1:] and shape[0] <= 6]
        mate = self.draw(st.sampled_from(list(reversed(fitting))))
        return self.add(ops.Concat(), value, mate)

    # ------------------------------------------------------------------------------------------ blocking

    def curve(self, value: str) -> str:
        axes = len(self.shapes[value])
        return self.add(self.some([
            ops.Sigmoid(), ops.HardSigmoid(), ops.Tanh(), ops.SiLU(), ops.HardSwish(), ops.Erf(), ops.GELU(), ops.GELU(approximate=True),
            ops.Softmax(), ops.Softmax(axes),
        ]), value)

    def sloped(self, value: str) -> str:
        """A gate that lets factors pass, with one slope or one a channel."""
        gate = self.some([ops.SiLU(), ops.HardSwish(), ops.GELU()])
        slopes = self.rng.uniform(0.5, 2, self.shapes[value][0]).astype(self.dtype)
        return self.add(ops.Sloped(gate, slopes if self.draw(st.booleans()) else 2.0), value)

    def mul(self, value: str) -> str:
        self.products += 1
        mates = [name for name in self.mates(value) if self.largest(name) <= LARGEST_SATURATING]
        return self.add(ops.Mul(), value, self.draw(st.sampled_from(mates)))

    def gated(self, value: str) -> str:
        """Two layers of one value multiplied, one of them perhaps through a curve (GLU, SwiGLU)."""
        self.products += 1
        out = self.draw(st.integers(1, 4))
        a, b = (self.add(self.pointwise(value, out), value) for _ in range(2))
        return self.add(ops.Mul(), self.add(ops.SiLU(), a) if self.draw(st.booleans()) and self.may(ops.SiLU) else a, b)

    def attention(self, value: str) -> str:
        """Queries, keys and values of one value; grouped, rotary, masked, without Softmax, with a residual: each perhaps."""
        self.products += 2
        channels, *_, tokens = self.shapes[value]
        kv_heads, width = self.draw(st.integers(1, 2)), self.draw(st.integers(1, 3))
        heads = kv_heads * self.draw(st.integers(1, 2))
        q, k, v = (self.add(self.pointwise(value, n * width), value) for n in (heads, kv_heads, kv_heads))
        if width > 1 and self.draw(st.booleans()) and self.may(ops.Rotary):
            angle = self.rng.uniform(-3, 3, (1, tokens))
            cos, sin, interleaved = np.cos(angle).astype(self.dtype), np.sin(angle).astype(self.dtype), self.draw(st.booleans())
            q, k = (self.add(ops.Rotary(n, cos, sin, interleaved), x) for n, x in ((heads, q), (kv_heads, k)))
        scores = self.add(ops.Scores(heads, kv_heads, self.draw(st.sampled_from([1.0, 0.5]))), q, k)
        if self.draw(st.sampled_from([True, True, False])) and self.may(ops.Softmax):
            shape = (1, *self.shapes[scores][1:])
            numbers = np.where(self.rng.random(shape) < 0.3, -np.inf, self.rng.normal(size=shape)).astype(self.dtype)
            numbers[..., 0] = 0
            scores = self.add(ops.Softmax(-1, self.draw(st.sampled_from(["causal", numbers, None]))), scores)
        out = self.add(ops.Mix(heads, kv_heads), scores, v)
        if self.draw(st.booleans()) and self.may(ops.Add):
            return self.add(ops.Add(), self.add(self.pointwise(out, channels), out), value)
        return out

    def pointwise(self, value: str, out: int) -> Op:
        """A layer of each pixel by itself."""
        channels, *sizes = self.shapes[value]
        weight, bias = self.weights(out, channels, *(1 for _ in sizes))
        return ops.Conv(weight, bias) if sizes else ops.Dense(weight, bias)

    def norm(self, value: str) -> str:
        if self.shapes[value][0] < 4 and self.draw(st.booleans()):  # several channels, so that there are groups of them
            value = self.add(self.pointwise(value, 4), value)
        channels, *sizes = self.shapes[value]
        gamma, beta = ((self.rng.normal(size=channels) / 2).astype(self.dtype) for _ in range(2))
        eps = self.draw(st.sampled_from([1e-5, 1e-2]))
        groups = self.draw(st.sampled_from([g for g in (2, 3, 1, channels) if channels % g == 0]))
        norms: list[Op] = [ops.LayerNorm(gamma, beta, eps), ops.RMSNorm(gamma, eps=eps)] * (channels > 1)
        norms += [ops.GroupNorm(groups, gamma, beta, eps)] * 2
        norms += [ops.InstanceNorm(gamma, beta, eps)] * (math.prod(sizes) > 1)
        return self.add(self.some(norms), value)

    def gate(self, value: str) -> str:
        """Squeeze and excite: a value times a curve of its own mean."""
        self.products += 1
        channels, *sizes = self.shapes[value]
        weight, bias = self.weights(channels, channels, *(1 for _ in sizes))
        excited = self.add(ops.Conv(weight, bias), self.add(ops.GlobalAvgPool(), value))
        return self.add(ops.Mul(), value, self.add(ops.Sigmoid(), excited))
