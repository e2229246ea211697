"""Attention as exporters write it, one row an arrangement: read whole, the same function, its factors free, and written back."""

import itertools
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_models as small
import pytest
from onnx import helper

import eqfact as eq
import eqfact.onnx
from eqfact.channels import channels

floats = small.normals(3)
ints = small.ints
N, T, H, D = 3, 5, 4, 2
WIDTH = H * D
SCALE = np.float32(D**-0.5)
CAUSAL = np.triu(np.full((T, T), -np.inf, np.float32), 1)
BIAS = floats(H, T, T)
ANGLES = np.arange(T, dtype=np.float32)[:, None] * np.float32([1, 0.1])


class Net:
    """A network, node by node; constants stand among the inputs of a node."""

    def __init__(self):
        self.nodes, self.constants, self.count = [], {}, itertools.count()
        self.inputs, self.feeds, self.opset = {"x": ["N", T, WIDTH]}, {"x": floats(N, T, WIDTH)}, 17

    def node(self, kind, *inputs, to=None, outputs=1, **attributes):
        names = [to or f"t{next(self.count)}" for _ in range(outputs)]
        inputs = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        self.nodes.append(helper.make_node(kind, inputs, names, name=f"node{len(self.nodes)}", **attributes))
        return names if outputs > 1 else names[0]

    def constant(self, value):
        name = f"c{next(self.count)}"
        self.constants[name] = np.asarray(value)
        return name

    def also(self, name, value, *shape):
        """Another input."""
        self.inputs[name], self.feeds[name] = ["N", *shape], value
        return name

    def linear(self, x="x", out=WIDTH, **options):
        y = self.node("MatMul", x, floats(WIDTH, out))
        return self.node("Add", floats(out), y, **options)

    def heads(self, x, order=(0, 2, 1, 3), heads=H):
        return self.node("Transpose", self.node("Reshape", x, ints(0, -1, heads, D)), perm=order)

    def softmax(self, x, **options):
        return self.node("Softmax", x, **{"axis": -1, **options})

    def attend(self, q, kt, v, mask=None):
        scores = self.node("Mul", self.node("MatMul", q, kt), SCALE)
        return self.node("MatMul", self.softmax(scores if mask is None else self.node("Add", scores, mask)), v)

    def qkv(self, kv="x", kv_heads=H):
        """Queries and values by tokens, keys by channels."""
        k, v = (self.linear(kv, kv_heads * D) for _ in range(2))
        return self.heads(self.linear()), self.heads(k, (0, 2, 3, 1), kv_heads), self.heads(v, heads=kv_heads)

    def out(self, mixed, order=(0, 2, 1, 3)):
        joined = self.node("Reshape", self.node("Transpose", mixed, perm=order), ints(0, -1, WIDTH))
        self.linear(joined, 3, to="y")

    def save(self, path):
        model = small.model(self.nodes, self.inputs, ["y"], self.constants, self.opset)
        for info in model.graph.input:
            info.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(self.feeds[info.name].dtype)
        model.ir_version = 10
        onnx.save(model, path)


@dataclass
class Row:
    """How a network is written, how many factors are free, and which of its nodes are kept."""

    write: object
    free: int = 2 * WIDTH
    kept: tuple[str, ...] = ()


ROWS = {}


def row(name, **options):
    def register(write):
        ROWS[name] = Row(write, **options)
        return write
    return register


# ------------------------------------------------------------------------------------------------ projections and heads


@row("separate projections")
def separate(net):
    net.out(net.attend(*net.qkv()))


@row("keys transposed twice")
def twice(net):
    q, k, v = (net.heads(net.linear()) for _ in range(3))
    net.out(net.attend(q, net.node("Transpose", k, perm=[0, 1, 3, 2]), v))


@row("no bias")
def no_bias(net):
    q, k, v = (net.heads(net.node("MatMul", "x", floats(WIDTH, WIDTH))) for _ in range(3))
    net.out(net.attend(q, net.node("Transpose", k, perm=[0, 1, 3, 2]), v))


@row("packed, Split")
def packed_split(net):
    q, k, v = net.node("Split", net.linear(out=3 * WIDTH), ints(WIDTH, WIDTH, WIDTH), outputs=3, axis=-1)
    net.out(net.attend(net.heads(q), net.heads(k, (0, 2, 3, 1)), net.heads(v)))


@row("packed, Slice")
def packed_slice(net):
    y = net.linear(out=3 * WIDTH)
    q, k, v = (net.node("Slice", y, ints(i * WIDTH), ints((i + 1) * WIDTH), ints(-1)) for i in range(3))
    net.out(net.attend(net.heads(q), net.heads(k, (0, 2, 3, 1)), net.heads(v)))


def _packed(net, pick):
    y = net.node("Reshape", net.linear(out=3 * WIDTH), ints(0, -1, 3, H, D))
    q, k, v = pick(net.node("Transpose", y, perm=[2, 0, 3, 1, 4]))
    net.out(net.attend(net.node("Mul", q, np.float32([0.25])), net.node("Transpose", k, perm=[0, 1, 3, 2]), v))


@row("packed, Reshape, Slice and Squeeze")
def packed_squeeze(net):
    _packed(net, lambda y: [net.node("Squeeze", net.node("Slice", y, ints(i), ints(i + 1), ints(0), ints(1)), ints(0)) for i in range(3)])


@row("packed, Reshape and Gather")
def packed_gather(net):
    _packed(net, lambda y: [net.node("Gather", y, np.int64(i), axis=0) for i in range(3)])


@row("packed, Reshape and Split")
def packed_reshape_split(net):
    _packed(net, lambda y: [net.node("Squeeze", part, ints(0)) for part in net.node("Split", y, ints(1, 1, 1), outputs=3, axis=0)])


@row("packed head by head")
def packed_by_head(net):
    y = net.node("Transpose", net.node("Reshape", net.linear(out=3 * WIDTH), ints(0, -1, H, 3 * D)), perm=[0, 2, 1, 3])
    q, k, v = net.node("Split", y, ints(D, D, D), outputs=3, axis=3)
    net.out(net.attend(q, net.node("Transpose", k, perm=[0, 1, 3, 2]), v))


@row("one head without an axis")
def one_head(net):
    q, k, v = (net.linear() for _ in range(3))
    net.linear(net.attend(q, net.node("Transpose", k, perm=[0, 2, 1]), v), 3, to="y")


@row("heads in the batch")
def folded(net):
    q, k, v = (net.node("Reshape", net.heads(net.linear()), ints(-1, T, D)) for _ in range(3))
    net.out(net.node("Reshape", net.attend(q, net.node("Transpose", k, perm=[0, 2, 1]), v), ints(-1, H, T, D)))


@row("heads in the batch, keys turned there", free=2 * WIDTH)
def folded_keys(net):
    q, k, v = (net.heads(net.linear()) for _ in range(3))
    turned = net.node("Transpose", net.node("Reshape", k, ints(-1, T, D)), perm=[0, 2, 1])
    net.out(net.attend(q, net.node("Reshape", turned, ints(-1, H, D, T)), v))


@row("tokens first, heads in the batch")
def tokens_first(net):
    x = net.node("Transpose", "x", perm=[1, 0, 2])
    split = [net.node("Reshape", net.linear(x), ints(T, -1, D)) for _ in range(3)]
    q, k, v = (net.node("Transpose", y, perm=[1, 0, 2]) for y in split)
    mixed = net.node("Transpose", net.attend(q, net.node("Transpose", k, perm=[0, 2, 1]), v), perm=[1, 0, 2])
    y = net.linear(net.node("Reshape", mixed, ints(T, -1, WIDTH)), 3)
    net.node("Transpose", y, to="y", perm=[1, 0, 2])


@row("heads before the batch")
def heads_first(net):
    q, k, v = (net.heads(net.linear(), (2, 0, 1, 3)) for _ in range(3))
    net.out(net.attend(q, net.node("Transpose", k, perm=[0, 1, 3, 2]), v), (1, 2, 0, 3))


@row("channels first, constants on the left")
def channels_first(net):
    net.inputs["x"], net.feeds["x"] = ["N", WIDTH, T], floats(N, WIDTH, T)
    q, k, v = (net.node("Reshape", net.node("MatMul", floats(WIDTH, WIDTH), "x"), ints(0, H, D, T)) for _ in range(3))
    p = net.softmax(net.node("MatMul", net.node("Transpose", q, perm=[0, 1, 3, 2]), k))
    mixed = net.node("MatMul", v, net.node("Transpose", p, perm=[0, 1, 3, 2]))
    net.node("MatMul", floats(3, WIDTH), net.node("Reshape", mixed, ints(0, WIDTH, T)), to="y")


@row("scores the other way round")
def keys_by_queries(net):
    q, kt, v = net.qkv()
    scores = net.node("MatMul", net.node("Transpose", kt, perm=[0, 1, 3, 2]), net.node("Transpose", q, perm=[0, 1, 3, 2]))
    mixed = net.node("MatMul", net.node("Transpose", v, perm=[0, 1, 3, 2]), net.softmax(scores, axis=-2))
    net.out(mixed, (0, 3, 1, 2))


@row("other tokens")
def cross(net):
    net.out(net.attend(*net.qkv(net.also("z", floats(N, 7, WIDTH), 7, WIDTH))))


@row("tokens in windows")
def windows(net):
    net.inputs["x"], net.feeds["x"] = ["N", 2 * T, WIDTH], floats(N, 2 * T, WIDTH)
    x = net.node("Reshape", net.node("Reshape", "x", ints(0, 2, T, WIDTH)), ints(-1, T, WIDTH))
    q, k, v = (net.heads(net.linear(x)) for _ in range(3))
    mixed = net.attend(q, net.node("Transpose", k, perm=[0, 1, 3, 2]), v, BIAS)
    joined = net.node("Reshape", net.node("Transpose", mixed, perm=[0, 2, 1, 3]), ints(-1, 2, T, WIDTH))
    net.linear(net.node("Reshape", joined, ints(-1, 2 * T, WIDTH)), 3, to="y")


@row("windows that stand otherwise among the keys")
def windows_turned(net):
    net.inputs["x"], net.feeds["x"] = ["N", 2, T, WIDTH], floats(N, 2, T, WIDTH)
    k = net.node("Transpose", net.linear(net.node("Relu", net.node("Transpose", "x", perm=[0, 2, 1, 3]))), perm=[0, 2, 3, 1])
    net.linear(net.attend(net.linear(), k, net.linear()), 3, to="y")


@row("one sample, whose keys and values have no axis of it")
def one_sample(net):
    net.inputs["x"], net.feeds["x"] = [1, T, WIDTH], floats(1, T, WIDTH)
    k, v = (net.node("Reshape", net.linear(), ints(T, H, D)) for _ in range(2))
    k, v = (net.node("Transpose", x, perm=order) for x, order in ((k, (1, 2, 0)), (v, (1, 0, 2))))
    net.out(net.attend(net.heads(net.linear()), k, v))


@row("keys and values of some tokens", free=3 * WIDTH)
def some_tokens(net):
    net.out(net.attend(*net.qkv(net.node("Gather", net.linear(), ints(0, 2, 4), axis=1))))


@row("sizes computed from shapes")
def dynamic(net):
    net.inputs["x"] = ["N", "T", WIDTH]

    def sized(x, *rest):
        shape = net.node("Shape", x)
        sizes = [net.node("Unsqueeze", net.node("Gather", shape, np.int64(i)), ints(0)) for i in range(2)]
        return net.node("Reshape", x, net.node("Concat", *sizes, *(ints(n) for n in rest), axis=0))
    q, k, v = (net.node("Transpose", sized(net.linear(), H, D), perm=order) for order in ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3)))
    net.linear(sized(net.node("Transpose", net.attend(q, k, v), perm=[0, 2, 1, 3]), WIDTH), 3, to="y")


@row("nodes that do nothing between")
def nothing(net):
    q, kt, v = net.qkv()
    q = net.node("Identity", net.node("Mul", q, SCALE))
    p = net.node("Dropout", net.node("Identity", net.softmax(net.node("MatMul", q, kt))), np.float32(0.1))
    net.out(net.node("MatMul", p, v))


# ------------------------------------------------------------------------------------------------ scales


@row("Div of the scores")
def divided(net):
    q, kt, v = net.qkv()
    net.out(net.node("MatMul", net.softmax(net.node("Div", net.node("MatMul", q, kt), np.float32(1.4))), v))


@row("Mul of both")
def both(net):
    q, kt, v = net.qkv()
    net.out(net.node("MatMul", net.softmax(net.node("MatMul", net.node("Mul", q, SCALE), net.node("Mul", np.float32([0.7]), kt))), v))


@row("Mul of the projection")
def projection(net):
    q, k, v = (net.linear() for _ in range(3))
    q = net.heads(net.node("Div", q, np.float32(2)))
    net.out(net.node("MatMul", net.softmax(net.node("MatMul", q, net.heads(k, (0, 2, 3, 1)))), net.heads(v)))


@row("a scale that something else reads", free=2 * WIDTH)
def scale_read_twice(net):
    q, kt, v = net.qkv()
    q = net.node("Mul", q, SCALE)
    net.out(net.node("Add", net.node("MatMul", net.softmax(net.node("MatMul", q, kt)), v), q))


# ------------------------------------------------------------------------------------------------ masks


@row("causal")
def causal(net):
    net.out(net.attend(*net.qkv(), CAUSAL))


@row("a bias for each head")
def bias(net):
    net.out(net.attend(*net.qkv(), BIAS))


@row("a mask in the heads of the batch")
def folded_mask(net):
    q, k, v = (net.node("Reshape", net.heads(net.linear()), ints(-1, T, D)) for _ in range(3))
    mixed = net.attend(q, net.node("Transpose", k, perm=[0, 2, 1]), v, CAUSAL[None])
    net.out(net.node("Reshape", mixed, ints(-1, H, T, D)))


@row("Where, minus infinity")
def where_infinite(net):
    q, kt, v = net.qkv()
    scores = net.node("Where", CAUSAL < 0, np.float32(-np.inf), net.node("Mul", net.node("MatMul", q, kt), SCALE))
    net.out(net.node("MatMul", net.softmax(scores), v))


@row("Where, a low number")
def where_low(net):
    q, kt, v = net.qkv()
    scores = net.node("Where", (CAUSAL == 0)[None, None], net.node("Mul", net.node("MatMul", q, kt), SCALE), np.float32(-10))
    net.out(net.node("MatMul", net.softmax(scores), v))


KEPT = ("Unsqueeze", "Cast", "Sub", "Mul", "Where", "Equal")


@row("a mask from an input", free=2 * WIDTH + 1, kept=KEPT)  # and one between the sum and the product that make the mask
def padding(net):
    net.also("there", (np.arange(T) < np.array([[5], [3], [2]])).astype(np.int64), T)
    there = net.node("Unsqueeze", "there", ints(1, 2))
    net.nodes.append(helper.make_node("Cast", [there], ["there.float"], to=onnx.TensorProto.FLOAT))
    net.out(net.attend(*net.qkv(), net.node("Mul", net.node("Sub", np.float32(1), "there.float"), np.finfo(np.float32).min)))


@row("a mask of minus infinity from an input", kept=KEPT)
def padding_infinite(net):
    net.also("there", np.tile(np.arange(T) < np.array([[5], [3], [2]]), (1, 1)).astype(np.int64), T)
    gone = net.node("Equal", net.node("Unsqueeze", "there", ints(1, 2)), np.int64(0))
    net.out(net.attend(*net.qkv(), net.node("Where", gone, np.float32(-np.inf), np.float32(0))))


@row("a mask as an input")
def mask_input(net):
    mask = np.where(np.arange(T) < np.array([5, 3, 2]).reshape(N, 1, 1, 1), 0, -np.inf).astype(np.float32) + CAUSAL
    net.out(net.attend(*net.qkv(), net.also("mask", mask, 1, T, T)))


# ------------------------------------------------------------------------------------------------ grouped queries


def _grouped(net, repeated, kv_heads=2):
    q, kt, v = net.qkv(kv_heads=kv_heads)
    k = net.node("Transpose", kt, perm=[0, 1, 3, 2])
    net.out(net.attend(q, net.node("Transpose", repeated(k), perm=[0, 1, 3, 2]), repeated(v)))


@row("grouped queries, Expand", free=2 * 2 * D)
def grouped_expand(net):
    _grouped(net, lambda x: net.node("Reshape", net.node("Expand", net.node("Unsqueeze", x, ints(2)), ints(1, 2, 2, T, D)),
                                     ints(-1, H, T, D)))


@row("grouped queries, Gather", free=2 * 2 * D)
def grouped_gather(net):
    _grouped(net, lambda x: net.node("Gather", x, ints(0, 0, 1, 1), axis=1))


@row("grouped queries, Concat", free=2 * 2 * D)
def grouped_concat(net):
    def repeated(x):
        x = net.node("Unsqueeze", x, ints(2))
        return net.node("Reshape", net.node("Concat", x, x, axis=2), ints(0, H, T, D))
    _grouped(net, repeated)


@row("grouped queries, Tile in another order", free=2 * 2 * D)
def grouped_tile(net):
    _grouped(net, lambda x: net.node("Tile", x, ints(1, 2, 1, 1)))


@row("grouped queries, an axis more", free=2 * 2 * D)
def grouped_axis(net):
    q, kt, v = net.qkv(kv_heads=2)
    kt, v = (net.node("Unsqueeze", x, ints(2)) for x in (kt, v))
    mixed = net.attend(net.node("Reshape", q, ints(0, 2, 2, T, D)), kt, v)
    net.out(net.node("Reshape", mixed, ints(0, H, T, D)))


@row("one head of keys for all", free=2 * D)
def multi_query(net):
    net.out(net.attend(*net.qkv(kv_heads=1)))


@row("one head of keys for all, Expand", free=2 * D)
def multi_query_expand(net):
    _grouped(net, lambda x: net.node("Expand", x, ints(1, H, T, D)), 1)


# ------------------------------------------------------------------------------------------------ rotary positions

WIDE = 2 * D


def _rotary(net, turn):
    """Two heads of four channels, so that each has two pairs."""
    q, k, v = (net.node("Transpose", net.node("Reshape", net.linear(), ints(0, -1, 2, WIDE)), perm=[0, 2, 1, 3]) for _ in range(3))
    k = net.node("Transpose", turn(k), perm=[0, 1, 3, 2])
    net.out(net.attend(turn(q), k, v))


@row("rotary positions by halves", free=WIDTH // 2 + WIDTH)
def rotary_halves(net):
    def turn(x):
        first, second = (net.node("Slice", x, ints(a), ints(b), ints(3)) for a, b in ((0, D), (D, 2**62)))
        mates = net.node("Concat", net.node("Neg", second), first, axis=-1)
        cos, sin = (np.tile(f(ANGLES), 2)[None, None] for f in (np.cos, np.sin))
        return net.node("Add", net.node("Mul", x, cos), net.node("Mul", mates, sin))
    _rotary(net, turn)


@row("rotary positions by neighbours", free=WIDTH // 2 + WIDTH)
def rotary_neighbours(net):
    def turn(x):
        first, second = (net.node("Slice", x, ints(a), ints(2**62), ints(3), ints(2)) for a in (0, 1))
        parts = [net.node("Unsqueeze", part, ints(4)) for part in (net.node("Neg", second), first)]
        mates = net.node("Reshape", net.node("Concat", *parts, axis=-1), ints(0, 0, 0, WIDE))
        cos, sin = (np.repeat(f(ANGLES), 2, axis=1) for f in (np.cos, np.sin))
        return net.node("Add", net.node("Mul", x, cos), net.node("Mul", mates, sin))
    _rotary(net, turn)


@row("rotary positions of some channels", free=2 * (1 + 2) + WIDTH)
def rotary_some(net):
    def turn(x):
        turned, rest = net.node("Split", x, ints(2, 2), outputs=2, axis=-1)
        first, second = net.node("Split", turned, ints(1, 1), outputs=2, axis=-1)
        mates = net.node("Concat", net.node("Neg", second), first, axis=-1)
        cos, sin = (np.repeat(f(ANGLES[:, :1]), 2, axis=1) for f in (np.cos, np.sin))
        return net.node("Concat", net.node("Add", net.node("Mul", turned, cos), net.node("Mul", mates, sin)), rest, axis=-1)
    _rotary(net, turn)


@row("RotaryEmbedding", free=WIDTH // 2 + WIDTH)
def rotary_embedding(net):
    net.opset = 23
    positions = np.tile(np.arange(T), (N, 1))
    net.inputs["x"][0] = N
    _rotary(net, lambda x: net.node("RotaryEmbedding", x, np.cos(ANGLES), np.sin(ANGLES), positions))


@row("RotaryEmbedding of three axes and some channels", free=2 * (1 + 2) + WIDTH)
def rotary_embedding_flat(net):
    net.opset = 23
    cos, sin = (np.tile(f(ANGLES[None, :, :1]), (N, 1, 1)) for f in (np.cos, np.sin))
    net.inputs["x"][0] = N
    q, k, v = (net.linear() for _ in range(3))
    q, k = (net.node("RotaryEmbedding", x, cos, sin, num_heads=2, rotary_embedding_dim=2, interleaved=1) for x in (q, k))
    q, k, v = (net.node("Reshape", x, ints(0, -1, 2, WIDE)) for x in (q, k, v))
    net.out(net.attend(*(net.node("Transpose", x, perm=order) for x, order in ((q, (0, 2, 1, 3)), (k, (0, 2, 3, 1)), (v, (0, 2, 1, 3))))))


# ------------------------------------------------------------------------------------------------ Attention, Einsum


def _fused(net, *mask, opset=23, kv_heads=H, **attributes):
    net.opset = opset
    k, v = (net.linear(out=kv_heads * D) for _ in range(2))
    net.linear(net.node("Attention", net.linear(), k, v, *mask, q_num_heads=H, kv_num_heads=kv_heads, **attributes), 3, to="y")


@row("Attention")
def fused(net):
    _fused(net)


@row("Attention, grouped, causal", free=2 * 2 * D)
def fused_causal(net):
    _fused(net, kv_heads=2, is_causal=1, scale=0.3, opset=24)


@row("Attention with a mask of numbers")
def fused_mask(net):
    _fused(net, BIAS, is_causal=1)


@row("Attention with a mask of truths")
def fused_truths(net):
    _fused(net, CAUSAL == 0)


@row("Attention with a mask as an input")
def fused_input(net):
    _fused(net, net.also("mask", floats(N, 1, T, T), 1, T, T))


@row("Attention of four axes")
def fused_heads(net):
    net.opset = 23
    q, k, v = (net.heads(net.linear()) for _ in range(3))
    net.out(net.node("Attention", q, k, v))


@row("Einsum")
def einsum(net):
    q, k, v = (net.node("Reshape", net.linear(), ints(0, -1, H, D)) for _ in range(3))
    p = net.softmax(net.node("Einsum", q, k, equation="bqhd,bkhd->bhqk"))
    net.linear(net.node("Reshape", net.node("Einsum", p, v, equation="bhqk, bkhd -> bqhd"), ints(0, -1, WIDTH)), 3, to="y")


# ------------------------------------------------------------------------------------------------ the laws


def changed(graph, seed=0):
    """The graph with random powers of two as factors."""
    resolved = channels(graph)
    exponents = np.random.default_rng(seed).integers(-3, 4, resolved.degrees_of_freedom)
    return eq.Factorization(resolved, np.exp2(np.r_[0, exponents])).apply(graph)


def opened(net, path):
    net.save(path)
    return eqfact.onnx.open(path, net.feeds)


def lawful(net, folder):
    """The file, opened, once it is the same function in eqfact and onnxruntime, whatever factors are written into it."""
    file = opened(net, folder / "net.onnx")
    expected = small.run_ort(folder / "net.onnx", net.feeds)["y"]
    verdict = eqfact.onnx.check(folder / "net.onnx", file.graph, net.feeds)
    assert verdict.equal and verdict.apart < 1e-5, verdict.message
    moved = changed(file.graph)
    file.save(folder / "moved.onnx", moved)
    np.testing.assert_array_equal(small.run_ort(folder / "moved.onnx", net.feeds)["y"], expected)
    verdict = eqfact.onnx.check(folder / "moved.onnx", moved, net.feeds)
    assert verdict.equal, verdict.message
    return file


@pytest.mark.parametrize("name", ROWS)
def test_every_arrangement_is_read_whole_and_written_back(name, tmp_path):
    net, case = Net(), ROWS[name]
    case.write(net)
    file = lawful(net, tmp_path)
    graph = file.graph
    assert {k.op_type for k in file.kept} <= set(case.kept), file.kept
    ops = [type(n.op) for n in graph.nodes]
    assert ops.count(eq.ops.Scores) == ops.count(eq.ops.Mix) == 1
    assert eq.degrees_of_freedom(graph) == case.free
    if not file.kept:
        before, after = (onnx.load(tmp_path / f"{stem}.onnx").graph.node for stem in ("net", "moved"))
        assert [n.op_type for n in before] == [n.op_type for n in after]
        products = [(a, b) for a, b in zip(before, after, strict=True) if a.op_type == "Attention" or not set(a.input) & set(net.constants)]
        assert len(products) > (net.opset < 23) and all(a.SerializeToString() == b.SerializeToString() for a, b in products)
        # and as a network of no file
        eqfact.onnx.save(tmp_path / "new.onnx", bare(graph))
        feeds = file.boundary(net.feeds)
        small.close(small.run_ort(tmp_path / "new.onnx", feeds), small.run_eq(graph, feeds))
        again = eqfact.onnx.load(tmp_path / "new.onnx")
        assert eq.degrees_of_freedom(again) == case.free


@pytest.mark.parametrize("name", ["separate projections", "no bias", "keys transposed twice", "a bias for each head",
                                  "grouped queries, Gather"])
def test_heads_are_read_as_they_stand_without_a_move(name, tmp_path):
    net = Net()
    ROWS[name].write(net)
    kinds = [type(n.op).__name__ for n in opened(net, tmp_path / "net.onnx").graph.nodes]
    assert kinds == ["Transpose", "Conv", "Conv", "Conv", "Scores", "Softmax", "Mix", "Conv"]


def bare(graph):
    """The graph without memory of its file."""
    return eq.Graph(graph.inputs, [eq.Node(n.name, n.op, n.inputs) for n in graph.nodes], graph.outputs)


@pytest.mark.parametrize("opset", [11, 13, 23])
@pytest.mark.parametrize("name", ["separate projections", "packed, Split", "heads in the batch", "causal", "Mul of both",
                                  "grouped queries, Gather", "rotary positions by halves"])
def test_old_and_new_opsets(name, opset, tmp_path):
    net = Net()
    ROWS[name].write(net)
    net.opset = opset
    for node in net.nodes if opset < 13 else ():
        if node.op_type == "Split":
            net.constants.pop(node.input.pop())
            node.attribute.append(helper.make_attribute("split", [WIDTH] * 3))
    file = lawful(net, tmp_path)
    assert not file.kept and eq.degrees_of_freedom(file.graph) == ROWS[name].free


@pytest.mark.parametrize("opset, kept", [(12, True), (13, False), (17, False)])
def test_without_an_axis_a_softmax_of_masked_scores_is_over_keys_from_opset_13_on(opset, kept, tmp_path):
    net = Net()
    net.opset = opset
    q, kt, v = net.qkv()
    masked = net.node("Add", net.node("MatMul", q, kt), CAUSAL)
    net.out(net.node("MatMul", net.node("Softmax", masked), v))
    assert bool(lawful(net, tmp_path).kept) == kept


@pytest.mark.parametrize("mask", [CAUSAL, BIAS], ids=["infinite", "finite"])
def test_what_is_added_to_scores_is_the_mask_of_their_softmax(mask, tmp_path):
    net = Net()
    net.out(net.attend(*net.qkv(), mask))
    (softmax,) = (n for n in lawful(net, tmp_path).graph.nodes if isinstance(n.op, eq.Softmax))
    assert np.array_equal(np.broadcast_to(softmax.op.mask, (H, T, T)), np.broadcast_to(mask, (H, T, T)))


@pytest.mark.parametrize("name", ["rotary positions by halves", "RotaryEmbedding"])
def test_channels_that_are_turned_into_each_other_share_a_factor(name, tmp_path):
    net = Net()
    ROWS[name].write(net)
    graph = opened(net, tmp_path / "net.onnx").graph
    projections = [n.name for n in graph.nodes if isinstance(n.op, eq.Conv) and n.name != "y"]
    q, k, v = (channels(graph).labels[name].reshape(2, 2, D) for name in projections)
    for labels in (q, k):
        assert (labels[:, 0] == labels[:, 1]).all() and len(set(labels.reshape(-1))) == WIDTH // 2
    assert len(set(v.reshape(-1))) == WIDTH


@pytest.mark.parametrize("name", [name for name in ROWS if not ROWS[name].kept and "input" not in name])
def test_products_of_stored_values_are_made_in_integers(name, tmp_path):
    net = Net()
    ROWS[name].write(net)
    file = opened(net, tmp_path / "net.onnx")
    feeds = file.boundary(net.feeds)
    graph = bare(file.graph)
    quantizers = {"weights": eq.UniformQuantizer(8, granularity="per_channel"), "activations": eq.UniformQuantizer(8, symmetric=False)}
    quantized = eq.quantize(graph, **quantizers, stats=eq.calibrate(graph, feeds), outputs=True)
    eqfact.onnx.save_qdq(tmp_path / "quantized.onnx", quantized)
    made = small.run_ort(tmp_path / "quantized.onnx", feeds, integers=tmp_path / "integers.onnx")
    kinds = [n.op_type for n in onnx.load(tmp_path / "integers.onnx").graph.node]
    assert "MatMul" not in kinds and sum(kind in ("MatMulIntegerToFloat", "QLinearMatMul") for kind in kinds) == 2
    for value, y in small.run_eq(quantized, feeds).items():
        assert np.abs(y - made[value]).max() <= 1.01 * eq.quantization.grid_of(quantized, value).scale.max()


# ------------------------------------------------------------------------------------------------ near misses

MISSES = {}


def miss(name, tokens=T):
    def register(write):
        MISSES[name] = write, tokens
        return write
    return register


@miss("Softmax over the queries")
def over_queries(net):
    q, kt, v = net.qkv()
    net.out(net.node("MatMul", net.softmax(net.node("MatMul", q, kt), axis=2), v))


@miss("Softmax over the heads")
def over_heads(net):
    q, kt, v = net.qkv()
    net.out(net.node("MatMul", net.softmax(net.node("MatMul", q, kt), axis=1), v))


@miss("keys not transposed", tokens=D)
def not_transposed(net):
    q, k, v = (net.heads(net.linear()) for _ in range(3))
    net.out(net.attend(q, k, v))


@miss("values transposed", tokens=D)
def values_transposed(net):
    q, kt, v = net.qkv()
    net.out(net.attend(q, kt, net.node("Transpose", v, perm=[0, 1, 3, 2])))


@miss("other heads of keys")
def other_heads(net):
    q, kt, v = net.qkv()
    net.out(net.attend(q, net.node("Gather", kt, ints(1, 0, 3, 2), axis=1), v))


@miss("channels of keys by heads")
def channels_by_heads(net):
    q, _, v = net.qkv()
    net.out(net.attend(q, net.node("Transpose", net.node("Reshape", net.linear(), ints(0, -1, D, H)), perm=[0, 3, 2, 1]), v))


@miss("repeated heads that are not in a row")
def not_in_a_row(net):
    _grouped(net, lambda x: net.node("Gather", x, ints(0, 1, 1, 0), axis=1))


@miss("channels repeated across heads")
def repeated_across_heads(net):
    k, v = (net.node("Gather", net.linear(out=3), ints(0, 1, 2, 0, 1, 2, 0, 1), axis=2) for _ in range(2))
    net.out(net.attend(net.heads(net.linear()), net.heads(k, (0, 2, 3, 1)), net.heads(v)))


@miss("values repeated by token")
def repeated_tokens(net):
    q, kt, v = net.qkv()
    net.out(net.attend(q, net.node("Gather", kt, ints(0, 0, 1), axis=3), net.node("Gather", v, ints(0, 0, 1), axis=2)))


@miss("products of samples are kept")
def products_of_samples(net):
    q, kt, v = (net.node("Transpose", net.linear(), perm=perm) for perm in ((1, 0, 2), (1, 2, 0), (1, 0, 2)))
    net.linear(net.node("Transpose", net.attend(q, kt, v), perm=[1, 0, 2]), 3, to="y")


@miss("angles of each sample are kept")
def angles_of_each_sample(net):
    net.opset, net.inputs["x"][0] = 23, N
    positions = np.arange(N * T).reshape(N, T) % 7
    angles = np.arange(7, dtype=np.float32)[:, None] * np.float32([1, 0.1])
    _rotary(net, lambda x: net.node("RotaryEmbedding", x, np.cos(angles), np.sin(angles), positions))


@miss("heads cut out of tokens", tokens=H)
def cut_out_of_tokens(net):
    q, k, v = (net.node("Reshape", net.linear(), ints(0, H, -1, D)) for _ in range(3))
    net.out(net.attend(q, net.node("Transpose", k, perm=[0, 1, 3, 2]), v))


@miss("heads and tokens exchanged", tokens=H)
def exchanged(net):
    q, k, v = (net.node("Reshape", net.linear(), ints(0, -1, H, D)) for _ in range(3))
    net.out(net.attend(q, net.node("Transpose", k, perm=[0, 1, 3, 2]), v))


@miss("products of channels")
def of_channels(net):
    q, k, v = (net.heads(net.linear()) for _ in range(3))
    p = net.softmax(net.node("MatMul", net.node("Transpose", q, perm=[0, 1, 3, 2]), k))
    net.out(net.node("MatMul", v, p))


@miss("a mask that another node reads, too")
def mask_read_twice(net):
    q, kt, v = net.qkv()
    masked = net.node("Add", net.node("MatMul", q, kt), BIAS)
    net.out(net.node("MatMul", net.node("Mul", net.softmax(masked), net.node("Sigmoid", masked)), v))


@miss("an Einsum that adds up over two axes is kept")
def einsum_of_two_axes(net):
    q, kt, v = net.qkv()
    scores = net.node("Einsum", q, kt, equation="bhqd,bgdk->bqk")
    net.out(net.node("MatMul", net.softmax(net.node("Unsqueeze", scores, ints(1))), v))


@miss("a mask of another axis")
def mask_of_another_axis(net):
    q, kt, v = net.qkv()
    net.out(net.node("MatMul", net.softmax(net.node("Add", net.node("MatMul", q, kt), BIAS), axis=2), v))


@miss("scores that are read twice")
def scores_read_twice(net):
    q, kt, v = net.qkv()
    scores = net.node("MatMul", q, kt)
    net.out(net.node("MatMul", net.softmax(net.node("Add", net.node("Mul", scores, SCALE), scores)), v))


@miss("a scale for each head")
def scale_for_each_head(net):
    q, kt, v = net.qkv()
    net.out(net.attend(net.node("Mul", q, floats(H, 1, 1)), net.node("Mul", kt, floats(D, 1)), v))


@miss("a mask of minus infinity that two Softmaxes read is kept")
def mask_of_two(net):
    q, kt, v = net.qkv()
    masked = net.node("Add", net.node("MatMul", q, kt), CAUSAL)
    net.out(net.node("MatMul", net.node("Add", net.softmax(masked), net.softmax(masked)), v))


@pytest.mark.parametrize("name", MISSES)
def test_near_misses_are_read_as_they_are_or_kept(name, tmp_path):
    write, tokens = MISSES[name]
    net = Net()
    net.inputs["x"], net.feeds["x"] = ["N", tokens, WIDTH], floats(N, tokens, WIDTH)
    write(net)
    file = lawful(net, tmp_path)
    assert ("kept" in name) == bool(file.kept), file.kept
