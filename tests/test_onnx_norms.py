"""Normalizations and GELU in files: as operators and written out, they become one op, which goes back into the nodes it came from.

Every row of the tables is a small network of two layers with the normalization between. Other people's code runs what is read and written.
"""


import numpy as np
import onnx
import onnx_models as small
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

import eqfact as eq
import eqfact.onnx
from eqfact.onnx.fusing import COMMUTATIVE, PATTERNS
from eqfact.onnx.running import run

node = helper.make_node
ints = small.ints
EPS = 0.01


class Net:
    """Nodes and constants on the way, and the tensor that the last one made."""

    def __init__(self, dtype=np.float32, opset=17):
        self.dtype, self.opset, self.rng = np.dtype(dtype), opset, np.random.default_rng(3)
        self.nodes, self.constants, self.last = [], {}, "x"

    def __call__(self, kind, *inputs, **attributes):
        """A node of tensors by name and constants, None for the last tensor; the tensor that it makes."""
        inputs = [self.last if i is None else i if isinstance(i, str) else self.constant(i) for i in inputs]
        self.last = f"t{len(self.nodes)}"
        self.nodes.append(node(kind, inputs, [self.last], name=f"n{len(self.nodes)}", **attributes))
        return self.last

    def constant(self, value):
        value = np.asarray(value)
        name = f"c{len(self.constants)}"
        self.constants[name] = value if value.dtype.kind == "i" else value.astype(self.dtype)
        return name

    def normal(self, *shape):
        return self.rng.normal(size=shape)

    def mean(self, x, axes, **attributes):
        return self("ReduceMean", x, ints(*axes), **attributes) if self.opset >= 18 else self("ReduceMean", x, axes=axes, **attributes)

    def model(self, *x, outputs=(), batch="N"):
        self.nodes[-1].output[0] = "y"
        kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        made = small.model(self.nodes, {"x": [batch, *x]}, ["y", *outputs], self.constants, self.opset, kind)
        made.ir_version = 10
        return made


# ------------------------------------------------------------------------------------------------- how a norm may be written


def written_out(root="Sqrt, Div", square="Pow", centred=True, between=(), twice=False, keep=None):
    """A maker of the nodes of ``(x - mean) / sqrt(var + eps)``, the last of which is the tensor's last."""
    def write(net, x, axes):
        def passed(name):
            for kind in between:
                name = net(kind, name, **({"to": helper.np_dtype_to_tensor_dtype(net.dtype)} if kind == "Cast" else {}))
            return name

        def difference():
            return passed(net("Sub", x, passed(net.mean(x, axes, **({} if keep is None else {"keepdims": keep})))))
        d = difference() if centred else x
        again = difference() if twice else d
        s = net("Pow", d, 2.0) if square == "Pow" else net("Mul", d, d)
        v = net("Add", *((passed(net.mean(passed(s), axes)), EPS)[:: -1 if square == "Mul" else 1]))
        if root == "Pow -0.5":
            return net("Mul", again, net("Pow", v, -0.5))
        r = passed(net("Pow", v, 0.5) if root == "Pow 0.5" else net("Sqrt", v))
        if root == "Reciprocal":
            return net("Mul", net("Reciprocal", r), again)
        return net("Mul", again, net("Div", 1.0, r)) if root == "1 / root" else net("Div", again, r)
    return write


FORMS = {
    "torch": written_out(), "two differences": written_out(twice=True), "product": written_out(square="Mul"),
    "reciprocal": written_out("Reciprocal"), "one by the root": written_out("1 / root", "Mul"), "power of -1/2": written_out("Pow -0.5"),
    "power of 1/2": written_out("Pow 0.5"), "identities": written_out(between=("Identity",)),
    "casts": written_out(between=("Cast", "Identity")), "keepdims said": written_out(keep=1),
    "RMS": written_out(centred=False), "RMS, product": written_out("Reciprocal", "Mul", centred=False),
    "RMS, power": written_out("Pow -0.5", centred=False), "RMS, one by the root": written_out("1 / root", centred=False),
}


def affine(net, gamma, beta, shape, first=False):
    for kind, there in (("Mul", gamma), ("Add", beta)):
        if there is not False:
            value = net.normal(*(shape if there is True else there))
            net(kind, *([value, None] if first else [None, value]))


# ------------------------------------------------------------------------------------------------- what is asked of each


def proven(tmp_path, model, kind, freedom, tolerance=2e-5):
    """The file is read whole, with one op of this kind and that many degrees of freedom, and written back in its own nodes."""
    path, again = tmp_path / "net.onnx", tmp_path / "again.onnx"
    onnx.save(model, path)
    opened = eqfact.onnx.open(path)
    assert opened.kept == (), opened.kept
    graph = eqfact.onnx.load(path)
    kinds = [type(n.op) for n in graph.nodes]
    assert kinds.count(kind) == 1 and eq.BatchNorm not in kinds, kinds
    dtype = graph.dtype
    feeds = small.feeds_of(graph, int(model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 2), dtype=dtype)
    expected = run(path, feeds)
    small.close(small.run_eq(graph, feeds), expected, tolerance)
    assert eqfact.onnx.check(path, graph, feeds).equal
    assert eq.degrees_of_freedom(graph) == freedom
    factors = some(graph)
    scaled = factors.apply(graph)
    eqfact.onnx.save(again, scaled)
    small.close(small.run_eq(scaled, feeds), expected, tolerance)
    small.close(run(again, feeds), expected, tolerance)
    assert eqfact.onnx.check(again, scaled, feeds).equal
    for freed in (eq.add_scales(graph), eq.slope_gates(graph)):  # other nodes beside those of the file, or in their place
        eqfact.onnx.save(tmp_path / "freed.onnx", some(freed).apply(freed))
        small.close(run(tmp_path / "freed.onnx", feeds), expected, tolerance)
    eqfact.onnx.save(tmp_path / "same.onnx", graph)
    assert [n.SerializeToString() for n in onnx.load(tmp_path / "same.onnx").graph.node] == [
        n.SerializeToString() for n in onnx.load(path).graph.node]
    anew(tmp_path / "new.onnx", scaled, feeds, expected, tolerance)
    quantized(tmp_path / "qdq.onnx", graph, feeds)
    return graph, onnx.load(again)


def some(graph):
    exponents = np.random.default_rng(6).integers(-3, 4, eq.degrees_of_freedom(graph) + 1)
    exponents[0] = 0
    return eq.Factorization(eq.channels(graph), np.exp2(exponents.astype(float)))


def without_origin(graph):
    return eq.Graph(graph.inputs, [eq.Node(n.name, n.op, n.inputs) for n in graph.nodes], graph.outputs)


def anew(path, graph, feeds, expected, tolerance):
    """As a network that came from no file."""
    eqfact.onnx.save(path, without_origin(graph))
    if graph.dtype == np.float32:
        theirs = run(path, feeds)
    else:  # onnxruntime has no convolution in double precision
        theirs = dict(zip(expected, ReferenceEvaluator(str(path)).run(None, feeds), strict=True))
    small.close(theirs, expected, tolerance)
    small.close(small.run_eq(eqfact.onnx.load(path), feeds), expected, tolerance)


def quantized(path, graph, feeds):
    if graph.dtype != np.float32:
        return
    eight = eq.UniformQuantizer(8, symmetric=False)
    ours = eq.quantize(graph, weights=eight, activations=eight, stats=eq.calibrate(graph, feeds))
    eqfact.onnx.save_qdq(path, ours)
    small.close(run(path, feeds, optimized=True), small.run_eq(ours, feeds), 2e-2)


#: Where the batch and the features stand: what comes before and behind, the axis, and the shape of a gamma.
def tokens(net):
    net("MatMul", None, net.normal(3, 4))
    return net.last, (5, 3), -1, (4,), lambda: net("MatMul", None, net.normal(4, 2))


def flat(net):
    net("Gemm", None, net.normal(3, 4), net.normal(4))
    return net.last, (3,), 1, (4,), lambda: net("Gemm", None, net.normal(4, 2))


def batch_second(net):
    net("MatMul", None, net.normal(3, 4))
    net("Transpose", None, perm=[1, 0, 2])

    def back():
        net("MatMul", None, net.normal(4, 2))
        net("Transpose", None, perm=[1, 0, 2])
    return net.last, (5, 3), 2, (1, 1, 4), back


def channels_first(net):
    net("Conv", None, net.normal(4, 3, 1, 1))
    return net.last, (3, 5, 2), 1, (4, 1, 1), lambda: net("Conv", None, net.normal(2, 4, 1, 1))


def channels_last(net):
    net("Conv", None, net.normal(4, 3, 1, 1))
    net("Transpose", None, perm=[0, 2, 3, 1])

    def back():
        net("Transpose", None, perm=[0, 3, 1, 2])
        net("Conv", None, net.normal(2, 4, 1, 1))
    return net.last, (3, 5, 2), -1, (4,), back


LAYOUTS = {f.__name__: f for f in (tokens, flat, batch_second, channels_first, channels_last)}
AFFINE = {"plain": (False, False), "gamma": (True, False), "beta": (False, True), "both": (True, True), "numbers": ((1,), ())}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("opset", [13, 18])
def test_a_norm_written_out_is_one_op(form, layout, opset, tmp_path):
    i = (list(FORMS).index(form) + list(LAYOUTS).index(layout) + opset) % len(AFFINE)
    net = Net(opset=opset)
    x, shape, axis, gamma, back = LAYOUTS[layout](net)
    FORMS[form](net, x, [axis])
    affine(net, *list(AFFINE.values())[i], gamma, first=bool(i % 2))
    back()
    # one factor for what is normalized together, and four that gamma takes up
    _, again = proven(tmp_path, net.model(*shape), eq.RMSNorm if "RMS" in form else eq.LayerNorm, 1 + 4)
    more = len(again.graph.node) - len(net.nodes)
    assert more == (list(AFFINE.values())[i][0] is False)  # a product where there was none


@pytest.mark.parametrize("affinity", AFFINE)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_factor_and_shift_are_there_or_not(affinity, dtype, tmp_path):
    net = Net(dtype)
    x, shape, axis, gamma, back = tokens(net)
    FORMS["torch"](net, x, [axis])
    affine(net, *AFFINE[affinity], gamma)
    back()
    graph, _ = proven(tmp_path, net.model(*shape), eq.LayerNorm, 1 + 4, {8: 1e-10, 4: 2e-5, 2: 1e-2}[np.dtype(dtype).itemsize])
    (op,) = (n.op for n in graph.nodes if isinstance(n.op, eq.LayerNorm))
    assert (op.gamma != 1).any() == (AFFINE[affinity][0] is not False) and (op.beta is not None) == (AFFINE[affinity][1] is not False)


@pytest.mark.parametrize("kind, opset, beta", [("LayerNormalization", 17, True), ("LayerNormalization", 17, False),
                                               ("LayerNormalization", 22, True), ("RMSNormalization", 23, False)])
@pytest.mark.parametrize("layout", ["tokens", "flat", "batch_second", "channels_last"])
def test_operators_over_features(kind, opset, beta, layout, tmp_path):
    net = Net(opset=opset)
    _, shape, axis, _, back = LAYOUTS[layout](net)
    net(kind, None, net.normal(4), *([net.normal(4)] if beta else []), axis=axis, epsilon=EPS)
    back()
    _, again = proven(tmp_path, net.model(*shape), eq.LayerNorm if kind == "LayerNormalization" else eq.RMSNorm, 1 + 4)
    assert [n.op_type for n in again.graph.node] == [n.op_type for n in net.nodes]


def as_tensorflow(net, x, axis, gamma, scale, center, inverse, *, keras=False, pooled=False):
    """``x s + (beta - mean s)``, with ``s = gamma / sqrt(var + eps)``; Keras adds ``(-mean) s + beta``."""
    def mean_of(y):
        return net("GlobalAveragePool", y) if pooled else net.mean(y, [axis])
    mean = mean_of(x)
    d = net("Sub", x, mean)
    v = net("Add", mean_of(net("Mul", d, d)), EPS)
    s = net("Pow", v, -0.5) if inverse == "Pow" else net(inverse, *([1.0] if inverse == "Div" else []), net("Sqrt", v))
    if scale:
        s = net("Mul", s, net.normal(*gamma))
    scaled, moved = net("Mul", x, s), net("Mul", net("Neg", mean) if keras else mean, s)
    if keras:
        net("Add", scaled, net("Add", moved, net.normal(*gamma)) if center else moved)
    elif center:
        net("Add", scaled, net("Sub", net.normal(*gamma), moved))
    elif inverse == "Div":
        net("Sub", scaled, moved)
    else:
        net("Add", net("Neg", moved), scaled)


@pytest.mark.parametrize("scale, center, inverse, opset", [
    (True, True, "Reciprocal", 13), (True, True, "Pow", 18), (True, False, "Div", 18), (False, False, "Reciprocal", 13)])
@pytest.mark.parametrize("keras", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_norm_as_tensorflow_has_it_is_one_op(layout, keras, scale, center, inverse, opset, tmp_path):
    """Its factor stands within, before the shift by the mean."""
    net = Net(opset=opset)
    x, shape, axis, gamma, back = LAYOUTS[layout](net)
    as_tensorflow(net, x, axis, gamma, scale, center, inverse, keras=keras)
    back()
    graph, again = proven(tmp_path, net.model(*shape), eq.LayerNorm, 1 + 4)
    (op,) = (n.op for n in graph.nodes if isinstance(n.op, eq.LayerNorm))
    assert (op.gamma != 1).any() == scale and (op.beta is not None) == center
    assert len(again.graph.node) - len(net.nodes) == (not scale)


@pytest.mark.parametrize("keras", [False, True])
def test_a_mean_over_the_last_of_three_axes_may_be_a_pool(keras, tmp_path):
    net = Net()
    as_tensorflow(net, net("MatMul", None, net.normal(3, 4)), -1, (4,), True, True, "Reciprocal", keras=keras, pooled=True)
    net("MatMul", None, net.normal(4, 2))
    proven(tmp_path, net.model(5, 3), eq.LayerNorm, 1 + 4)


@pytest.mark.parametrize("gamma", [(5, 1), (5, 4), (1, 1, 1, 4)])
def test_a_factor_of_other_axes_within_is_no_gamma(gamma, tmp_path):
    net = Net()
    as_tensorflow(net, net("MatMul", None, net.normal(3, 4)), -1, gamma, True, False, "Reciprocal")
    onnx.save(net.model(5, 3), tmp_path / "net.onnx")
    x = {"x": 2 * small.normals(2)(2, 5, 3)}
    opened = eqfact.onnx.open(tmp_path / "net.onnx", x)
    assert not any(isinstance(n.op, NORMS) for n in opened.graph.nodes)
    assert eqfact.onnx.check(tmp_path / "net.onnx", opened.graph, x)


def group_operator(net):
    net("GroupNormalization", None, net.normal(6), net.normal(6), num_groups=2, epsilon=EPS)


def instances(net):
    net("InstanceNormalization", None, net.normal(6), net.normal(6), epsilon=EPS)


def instances_written_out(net):
    written_out()(net, net.last, [2, 3])
    affine(net, True, True, (6, 1, 1))


def all_written_out(net):
    written_out()(net, net.last, [1, 2, 3])
    affine(net, True, True, (6, 1, 1))


def reshaped(net, gamma=(True, True), scale=None):
    net("Reshape", None, ints(0, 2, -1))
    net("InstanceNormalization", None, *((np.ones(2), np.zeros(2)) if scale is None else (net.normal(2), net.normal(2))), epsilon=EPS)
    net("Reshape", None, ints(0, 6, 4, 3))
    affine(net, *gamma, (6, 1, 1))


def reshaped_written_out(net):
    net("Reshape", None, ints(0, 2, -1))
    written_out()(net, net.last, [-1])
    net("Reshape", None, ints(0, 6, 4, 3))
    affine(net, True, True, (6, 1, 1))


OVER_SPACE = {
    "GroupNormalization": (group_operator, 21, eq.GroupNorm, 2),
    "InstanceNormalization": (instances, 17, eq.InstanceNorm, 6), "InstanceNormalization 6": (instances, 13, eq.InstanceNorm, 6),
    "instances written out": (instances_written_out, 17, eq.InstanceNorm, 6), "all written out": (all_written_out, 18, eq.GroupNorm, 1),
    "instances of groups": (reshaped, 17, eq.GroupNorm, 2),
    "groups written out": (reshaped_written_out, 17, eq.GroupNorm, 2),
    "instances of groups, plain": (lambda net: reshaped(net, (False, False)), 17, eq.GroupNorm, 2),
    "instances of groups, factors": (lambda net: reshaped(net, (False, False), True), 17, eq.GroupNorm, 2),
    "instances of groups, gamma": (lambda net: reshaped(net, (True, False)), 17, eq.GroupNorm, 2),
}


@pytest.mark.parametrize("form", OVER_SPACE)
def test_norms_over_space(form, tmp_path):
    write, opset, kind, groups = OVER_SPACE[form]
    net = Net(opset=opset)
    net("Conv", None, net.normal(6, 3, 1, 1))
    write(net)
    net("Conv", None, net.normal(2, 6, 1, 1))
    proven(tmp_path, net.model(3, 4, 3), kind, groups + 6)


@pytest.mark.parametrize("opset", [14, 17, 20, 23])
@pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 4, 3)], ids=str)
@pytest.mark.parametrize("op", [
    lambda g, b: eq.LayerNorm(g), lambda g, b: eq.LayerNorm(g, b), lambda g, b: eq.RMSNorm(g), lambda g, b: eq.RMSNorm(g, b),
    lambda g, b: eq.GroupNorm(3, g), lambda g, b: eq.GroupNorm(3, g, b, np.array([0.5, 0.125, 2.0])),
    lambda g, b: eq.InstanceNorm(g, b), lambda g, b: eq.InstanceNorm(g, None, np.array([0.5, 0.125, 2.0, 1.0, 4.0, 0.25]))])
def test_norms_of_no_file(op, shape, opset, tmp_path, monkeypatch):
    monkeypatch.setattr("eqfact.onnx.exporting.OPSET", opset)
    monkeypatch.setattr("eqfact.onnx.exporting.IR_VERSION", 10)
    floats = small.normals(1)
    made = op(floats(6), floats(6))
    graph = eq.Graph.chain(shape, norm=made)
    feeds = small.feeds_of(graph)
    eqfact.onnx.save(tmp_path / "net.onnx", graph)
    small.close(run(tmp_path / "net.onnx", feeds), small.run_eq(graph, feeds))
    again = eqfact.onnx.load(tmp_path / "net.onnx")
    small.close(small.run_eq(again, feeds), small.run_eq(graph, feeds))
    assert type(made) in [type(n.op) for n in again.nodes] or (len(shape) == 1 and isinstance(made, eq.InstanceNorm))


def test_an_eps_of_zero_beside_others_has_no_counterpart(tmp_path):
    graph = eq.Graph.chain((4, 3), norm=eq.GroupNorm(2, np.ones(4), eps=np.array([0.0, 1.0])))
    with pytest.raises(eqfact.onnx.OnnxError, match=r"'norm'.*eps of 0"):
        eqfact.onnx.save(tmp_path / "net.onnx", graph)


# ------------------------------------------------------------------------------------------------- what is none


def wrong_power(net, x):
    d = net("Sub", x, net.mean(x, [-1]))
    net("Div", d, net("Sqrt", net("Add", net.mean(net("Pow", net("Abs", d), 3.0), [-1]), EPS)))


def eps_of_the_network(net, x):
    d = net("Sub", x, net.mean(x, [-1]))
    v = net.mean(net("Pow", d, 2.0), [-1])
    eps = net.mean(net("Abs", x), [-1])
    net("Div", d, net("Sqrt", net("Add", v, eps)))


def eps_of_several(net, x):
    d = net("Sub", x, net.mean(x, [-1]))
    net("Div", d, net("Sqrt", net("Add", net.mean(net("Pow", d, 2.0), [-1]), np.float32([[0.1], [0.2], [0.3], [0.4], [0.5]]))))


def other_axis(net, x):
    d = net("Sub", x, net.mean(x, [-1]))
    net("Div", d, net("Sqrt", net("Add", net.mean(net("Pow", d, 2.0), [1]), EPS)))


def other_mean(net, x):
    d = net("Sub", x, net.mean(net("Abs", x), [-1]))
    net("Div", d, net("Sqrt", net("Add", net.mean(net("Pow", d, 2.0), [-1]), EPS)))


def other_difference(net, x):
    d = net("Sub", x, net.mean(x, [-1]))
    net("Div", x, net("Sqrt", net("Add", net.mean(net("Pow", d, 2.0), [-1]), EPS)))


def no_mean(net, x):
    net("Div", x, net("Sqrt", net("Add", net("Mul", net("ReduceSum", net("Mul", x, x), ints(-1)), 0.2), EPS)))


def over_tokens(net, x):
    written_out()(net, x, [1])


def over_tokens_and_features(net, x):
    written_out()(net, x, [1, 2])


def several_axes(net, x):
    net("LayerNormalization", x, net.normal(5, 4), axis=1)


def with_the_batch(net, x):
    written_out()(net, x, [0])


def mean_read_twice(net, x):
    written_out()(net, x, [-1])
    mean = next(n.output[0] for n in net.nodes if n.op_type == "ReduceMean")
    net("Add", net.last, mean)


def difference_read_twice(net, x):
    written_out()(net, x, [-1])
    net("Add", net.last, next(n.output[0] for n in net.nodes if n.op_type == "Sub"))


def statistics(net, x):
    scale = net.constant(net.normal(4))
    net.nodes.append(node("LayerNormalization", [x, scale], ["n", "m"]))
    net("Add", "n", "m")


def gelu_without_half(net, x):
    net("Mul", x, net("Add", net("Erf", net("Div", x, 2**0.5)), 1.0))


def gelu_of_another_root(net, x):
    net("Mul", net("Mul", x, net("Add", net("Erf", net("Div", x, 1.5)), 1.0)), 0.5)


def gelu_of_two(net, x):
    other = net("Abs", x)
    net("Mul", net("Mul", other, net("Add", net("Erf", net("Div", x, 2**0.5)), 1.0)), 0.5)


NORMS = (eq.LayerNorm, eq.RMSNorm, eq.GroupNorm, eq.InstanceNorm, eq.GELU)
#: What they may be all the same: tokens that are all of space are instances, all together one group; a difference is a value like others.
BUT = {over_tokens: eq.InstanceNorm, over_tokens_and_features: eq.GroupNorm,
       **dict.fromkeys((other_mean, mean_read_twice, difference_read_twice), eq.RMSNorm)}
NEAR = [wrong_power, no_mean, eps_of_the_network, eps_of_several, other_axis, other_mean, other_difference, over_tokens,
        over_tokens_and_features, several_axes, with_the_batch, mean_read_twice, difference_read_twice, statistics, gelu_without_half,
        gelu_of_another_root, gelu_of_two]


@pytest.mark.parametrize("near", NEAR, ids=lambda f: f.__name__)
def test_what_is_no_norm_is_not_taken_for_one(near, tmp_path):
    net = Net()
    near(net, net("MatMul", None, net.normal(3, 4)))
    net("MatMul", None, net.normal(4, 2))
    computes(tmp_path, net.model(5, 3), BUT.get(near))


@pytest.mark.parametrize("inner", ["ReduceMean", "Sub", "Pow", "Add", "Sqrt"])
def test_what_stands_between_may_be_an_output(inner, tmp_path):
    net = Net()
    written_out()(net, net("MatMul", None, net.normal(3, 4)), [-1])
    net("MatMul", None, net.normal(4, 2))
    computes(tmp_path, net.model(5, 3, outputs=[next(n.output[0] for n in net.nodes if n.op_type == inner)]),
             eq.RMSNorm if inner in ("ReduceMean", "Sub") else None)


def computes(tmp_path, model, kind):
    """The file is read as it is, with a norm of this kind or none, and what is rescaled computes the same."""
    path, again = tmp_path / "net.onnx", tmp_path / "again.onnx"
    onnx.save(model, path)
    x = {"x": 2 * small.normals(2)(2, 5, 3)}
    opened = eqfact.onnx.open(path, x)
    assert [type(n.op) for n in opened.graph.nodes if isinstance(n.op, NORMS)] == ([] if kind is None else [kind])
    assert eqfact.onnx.check(path, opened.graph, x).equal
    scaled = some(opened.graph).apply(opened.graph)
    opened.save(again, scaled)
    small.close(run(again, x), run(path, x))
    assert eqfact.onnx.check(again, scaled, x).equal


def test_what_others_read_keeps_its_numbers(tmp_path):
    """One initializer is eps of two norms and a factor, another gamma of two norms, of which each has factors of its own."""
    net = Net()
    eps, gamma = net.constant(EPS), net.constant(net.normal(4))
    for _ in range(2):
        x = net("MatMul", None, net.normal(4, 4))
        d = net("Sub", x, net.mean(x, [-1]))
        net("Div", d, net("Sqrt", net("Add", net.mean(net("Pow", d, 2.0), [-1]), eps)))
        net("Mul", None, gamma)
    net("Mul", net("MatMul", None, net.normal(4, 2)), eps)
    model = net.model(5, 4)
    onnx.save(model, tmp_path / "net.onnx")
    graph = eqfact.onnx.load(tmp_path / "net.onnx")
    feeds = small.feeds_of(graph)
    eqfact.onnx.save(tmp_path / "again.onnx", some(graph).apply(graph))
    small.close(run(tmp_path / "again.onnx", feeds), run(tmp_path / "net.onnx", feeds))
    assert len(onnx.load(tmp_path / "again.onnx").graph.node) == len(model.graph.node)


# ------------------------------------------------------------------------------------------------- all that the patterns say


def drawn(pattern, rng):
    """One of the trees that a pattern stands for, with operands in either order."""
    if isinstance(pattern, list):
        return drawn(pattern[rng.integers(len(pattern))], rng)
    if not isinstance(pattern, tuple):
        return pattern
    kind, *inputs = pattern
    trees = [drawn(each, rng) for each in inputs]
    return kind, *(trees[::-1] if kind in COMMUTATIVE and rng.integers(2) else trees)


def build(net, tree):
    if isinstance(tree, tuple):
        inputs = [build(net, each) for each in tree[1:]]
        if tree[0] == "ReduceSum":
            return net("ReduceSum", *inputs, ints(-1))
        return net(tree[0], *inputs, **({"axes": [-1]} if tree[0] == "ReduceMean" else {}))
    return net.shared.get(tree, "h") if isinstance(tree, str) else net.constant(tree)


SEEN = {"LayerNorm": eq.LayerNorm, "RMSNorm": eq.RMSNorm, "GELU": eq.GELU, "tanh GELU": eq.GELU, "SiLU": eq.SiLU}


@pytest.mark.parametrize("name, pattern", PATTERNS, ids=[name for name, _ in PATTERNS])
def test_every_spelling_of_a_pattern_is_the_op(name, pattern, tmp_path):
    rng = np.random.default_rng(1)
    for tree in dict.fromkeys(drawn(pattern, rng) for _ in range(40)):
        net = Net()
        net.shared = {"eps": net.constant(EPS), "share": net.constant(0.25), "gamma": net.constant(net.normal(4)),
                      "beta": net.constant(net.normal(4))}
        net.nodes.append(node("MatMul", ["x", net.constant(net.normal(3, 4))], ["h"]))
        build(net, tree)
        net("MatMul", None, net.normal(4, 2))
        onnx.save(net.model(5, 3), tmp_path / "net.onnx")
        opened = eqfact.onnx.open(tmp_path / "net.onnx")
        kinds = [type(n.op) for n in opened.graph.nodes]
        assert kinds.count(SEEN[name]) == 1 and len(kinds) == 4 and not opened.kept, tree
        assert eqfact.onnx.check(tmp_path / "net.onnx", opened.graph, {"x": small.normals(2)(2, 5, 3)}).equal, tree
