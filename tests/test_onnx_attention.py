"""Attention as exporters write it, in every arrangement: read whole, the same function, its factors free, and written back."""

import itertools
import math

import numpy as np
import onnx
import onnx_models as small
import pytest
from onnx import helper

import eqfact as eq
import eqfact.onnx

floats = small.normals(3)
ints = small.ints
N, T, H, D = 3, 5, 2, 4
WIDTH = H * D


class Net:
    """An attention block, node by node; tensors are named after what they hold."""

    def __init__(self, **sizes):
        self.nodes, self.constants, self.count = [], {}, itertools.count()
        self.inputs = {"x": [sizes.get("batch", "N"), sizes.get("tokens", T), WIDTH]}

    def node(self, kind, *inputs, to=None, outputs=1, **attributes):
        names = [to or f"{kind.lower()}{next(self.count)}"] if outputs == 1 else [f"{kind.lower()}{next(self.count)}" for _ in range(outputs)]
        inputs = [i if isinstance(i, str) else self.constant(i) for i in inputs]
        self.nodes.append(helper.make_node(kind, inputs, names, name=f"node{len(self.nodes)}", **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value):
        name = f"c{next(self.count)}"
        self.constants[name] = np.asarray(value)
        return name

    def linear(self, x, out, width=WIDTH, bias=True, **options):
        y = self.node("MatMul", x, floats(width, out) / np.float32(math.sqrt(width)), **({} if bias else options))
        return self.node("Add", y, floats(out), **options) if bias else y

    def heads(self, x, order=(0, 2, 1, 3), heads=H):
        return self.node("Transpose", self.node("Reshape", x, ints(0, T, heads, -1)), perm=order)

    def attend(self, q, kt, v, scale=1 / math.sqrt(D), mask=None):
        s = self.node("MatMul", q, kt)
        if scale is not None:
            s = self.node("Mul", s, np.float32(scale))
        if mask is not None:
            s = self.node("Add", s, mask)
        return self.node("MatMul", self.node("Softmax", s, axis=-1), v)

    def out(self, mixed, order=(0, 2, 1, 3)):
        joined = self.node("Reshape", self.node("Transpose", mixed, perm=order), ints(0, T, WIDTH))
        return self.linear(joined, 3, to="y")

    def save(self, path, opset=17):
        model = small.model(self.nodes, self.inputs, ["y"], self.constants, opset)
        model.ir_version = 10
        onnx.save(model, path)


def separate(net, **options):
    q, k, v = (net.linear("x", WIDTH) for _ in range(3))
    net.out(net.attend(net.heads(q), net.heads(k, (0, 2, 3, 1)), net.heads(v), **options))


VARIANTS = {"separate": separate}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, tmp_path):
    net = Net()
    VARIANTS[name](net)
    net.save(tmp_path / "net.onnx")
    x = floats(N, T, WIDTH)
    o = eqfact.onnx.open(tmp_path / "net.onnx", {"x": x})
    print(o)
    for n in o.graph.nodes: print(n.name, n.op.__class__.__name__, n.inputs, o.graph.shapes[n.name])
    print(eqfact.onnx.check(tmp_path / "net.onnx", o.graph, {"x": x}))
    print(eq.degrees_of_freedom(o.graph))
    assert 0
