"""Graphs: what they compute, in which order, and what they refuse."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nets import BY_NAME, NETS, dense

import eqfact as eq
from eqfact import Graph, Node
from eqfact.testing import laws
from eqfact.testing.strategies import batches, networks

any_net = pytest.mark.parametrize("net", NETS, ids=str)
network_and_data = networks().flatmap(lambda graph: st.tuples(st.just(graph), batches(graph)))


def outputs_by_name(graph, y):
    return y if len(graph.outputs) > 1 else {graph.outputs[0]: y}


# ------------------------------------------------------------------------------------------------ what a graph computes


@any_net
def test_a_network_is_its_ops_one_after_the_other(net):
    x = net.data()
    env = dict(x)
    for node in net.graph.nodes:
        env[node.name] = node.op.forward(*(env[name] for name in node.inputs))
    every = eq.values(net.graph, x)
    assert list(every) == list(env)
    assert all(np.array_equal(every[name], env[name]) for name in env)


@given(network_and_data)
def test_forward_gives_the_outputs_among_the_values(drawn):
    graph, x = drawn
    every, y = eq.values(graph, x), outputs_by_name(graph, eq.forward(graph, x))
    assert list(y) == list(graph.outputs)
    for name in graph.outputs:
        laws.same(name, y[name], every[name])


@given(network_and_data)
def test_every_value_has_the_shape_and_dtype_that_the_graph_says(drawn):
    graph, x = drawn
    for name, value in eq.values(graph, x).items():
        assert value.shape[1:] == graph.shapes[name] == graph.labels[name].shape
        assert value.dtype == graph.dtype or graph.dtype is None
        assert np.isfinite(value).all()


@given(network_and_data, st.randoms(use_true_random=False))
def test_the_order_of_nodes_does_not_matter(drawn, random):
    graph, x = drawn
    nodes = list(graph.nodes)
    random.shuffle(nodes)
    shuffled = Graph(graph.inputs, nodes, graph.outputs)
    seen = set(graph.inputs)
    for node in shuffled.nodes:
        assert seen.issuperset(node.inputs)
        seen.add(node.name)
    expected = eq.values(graph, x)
    for name, value in eq.values(shuffled, x).items():
        laws.same(name, value, expected[name])
    assert eq.degrees_of_freedom(shuffled) == eq.degrees_of_freedom(graph)


def test_every_order_of_a_small_network_is_the_same_network():
    nodes = [Node("a", eq.ReLU(), ["x"]), Node("b", eq.LeakyReLU(0.5), ["x"]), Node("c", eq.Add(), ["a", "b"]),
             Node("d", eq.Concat(), ["c", "a"])]
    x = np.array([[-2.0, 3.0]])
    for order in itertools.permutations(nodes):
        assert np.array_equal(eq.forward(Graph({"x": (2,)}, order, ["d"]), x), [[-1.0, 6.0, 0.0, 3.0]])


def test_nodes_already_in_order_keep_it():
    nodes = (Node("b", eq.ReLU(), ["x"]), Node("a", eq.ReLU(), ["x"]), Node("c", eq.Add(), ["a", "b"]))
    assert Graph({"x": (2,)}, nodes, ["c"]).nodes == nodes


def test_a_chain_reads_like_its_ops():
    graph = Graph.chain((2, 4), act=eq.ReLU(), pool=eq.MaxPool(2))
    assert graph.inputs == {"x": (2, 4)}
    assert [(node.name, node.inputs) for node in graph] == [("act", ("x",)), ("pool", ("act",))]
    assert graph.outputs == ("pool",)
    assert graph.shapes == {"x": (2, 4), "act": (2, 4), "pool": (2, 2)}
    assert len(graph) == 2
    assert graph["pool"].op.kernel == 2


def test_a_network_without_nodes_is_the_identity():
    graph = Graph.chain((3,))
    x = np.ones((2, 3))
    assert np.array_equal(eq.forward(graph, x), x)
    assert eq.degrees_of_freedom(graph) == 0


def test_readers_are_the_nodes_that_read_a_value():
    graph = BY_NAME["a value joined with itself"].graph
    assert {value: [node.name for node in nodes] for value, nodes in graph.readers.items()} == {
        "x": ["stem"], "stem": ["add", "cat"], "add": ["cat"], "cat": ["head"], "head": []}


def test_several_inputs_and_outputs_go_by_name():
    graph = Graph({"x": (2,), "y": (2,)}, [Node("sum", eq.Add(), ["x", "y"]), Node("max", eq.ReLU(), ["sum"])], ["max", "sum", "y"])
    y = eq.forward(graph, {"y": np.array([[1.0, -5.0]]), "x": np.array([[2.0, 3.0]])})
    assert list(y) == ["max", "sum", "y"]
    assert (y["max"].tolist(), y["sum"].tolist(), y["y"].tolist()) == ([[3.0, 0.0]], [[3.0, -2.0]], [[1.0, -5.0]])


def test_one_output_of_several_inputs_is_an_array():
    graph = Graph({"x": (1,), "y": (1,)}, [Node("sum", eq.Add(), ["x", "y"])], ["sum"])
    assert np.array_equal(eq.forward(graph, {"x": np.ones((3, 1)), "y": np.ones((3, 1))}), np.full((3, 1), 2.0))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("given_as", [np.float16, np.float32, np.float64])
def test_data_is_converted_to_the_dtype_of_the_weights(dtype, given_as):
    graph = Graph.chain((2,), fc=eq.Dense(np.ones((1, 2), dtype)), act=eq.ReLU())
    assert graph.dtype == dtype
    assert eq.forward(graph, np.ones((1, 2), given_as)).dtype == dtype


def test_a_network_without_weights_keeps_the_dtype_of_its_data():
    graph = Graph.chain((2,), act=eq.Clip(0, 1), curve=eq.GELU())
    assert graph.dtype is None
    assert eq.forward(graph, np.ones((1, 2), np.float32)).dtype == np.float32


def test_with_ops_changes_the_named_nodes_and_shares_the_rest():
    graph = BY_NAME["chain"].graph
    other = graph.with_ops({"act": eq.LeakyReLU(0.5)})
    assert type(graph["act"].op) is eq.ReLU
    assert other["act"].op.slope == 0.5
    assert other["fc1"] is graph["fc1"]
    assert other["fc2"].op is graph["fc2"].op


def test_graphs_and_nodes_are_immutable():
    graph = BY_NAME["chain"].graph
    with pytest.raises(dataclasses.FrozenInstanceError):
        graph.outputs = ("act",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        graph["act"].name = "other"
    for mapping in (graph.inputs, graph.shapes, graph.labels):
        with pytest.raises(TypeError):
            mapping["x"] = (1,)
    assert isinstance(graph.nodes, tuple)


def test_forward_leaves_the_data_alone():
    graph = Graph.chain((2,), id=eq.Identity(), act=eq.ReLU(), fc=dense(2, 2))
    x = np.array([[-1.0, 2.0]])
    x.flags.writeable = False
    eq.forward(graph, x)
    assert np.array_equal(x, [[-1.0, 2.0]])


class Square(eq.ops.Blocking):
    """An op of a user."""

    def forward(self, *inputs):
        return inputs[0] ** 2


def test_an_op_of_a_user_needs_no_registry():
    graph = Graph.chain((2,), fc=dense(3, 2), square=Square(), out=dense(1, 3))
    x = np.array([[1.0, -1.0]])
    hidden = graph["fc"].op.forward(x)
    assert np.array_equal(eq.forward(graph, x), graph["out"].op.forward(hidden**2))
    assert "Square is not positively homogeneous" in eq.channels(graph).pinned["fc"]


# ------------------------------------------------------------------------------------------------ what a graph refuses

x2 = {"x": (2,)}
image = {"x": (3, 8, 8)}
relu = Node("a", eq.ReLU(), ["x"])
weight = np.ones((4, 3, 3, 3))


@pytest.mark.parametrize(("make", "error", "message"), [
    # names
    (lambda: Graph(x2, [Node("a", eq.ReLU(), ["nope"])], ["a"]), ValueError,
     "node 'a' reads 'nope', which is neither an input nor a node; known are a, x"),
    (lambda: Graph(x2, [relu, Node("a", eq.ReLU(), ["x"])], ["a"]), ValueError,
     "node 'a': this name is taken already; every value needs its own"),
    (lambda: Graph(x2, [Node("x", eq.ReLU(), ["x"])], ["x"]), ValueError, "node 'x': this name is taken already"),
    (lambda: Graph.chain((2,), x=eq.ReLU()), ValueError, "node 'x': this name is taken already"),
    (lambda: Graph(x2, [relu], ["nope"]), ValueError, "output 'nope' is not a value of the network; its values are a, x"),
    (lambda: Graph(x2, [relu], ["a", "a"]), ValueError, "outputs must be different values"),
    (lambda: Graph(x2, [relu], "a"), TypeError, "outputs must be a list of value names, got the string 'a'"),
    (lambda: Graph(x2, [relu], []), ValueError, "a network needs at least one input and one output"),
    (lambda: Graph({}, [], ["a"]), ValueError, "a network needs at least one input and one output"),
    (lambda: Node("", eq.ReLU(), ["x"]), TypeError, "a node needs a name"),
    (lambda: Node("a", eq.ReLU(), "x"), TypeError, "node 'a': inputs must be a list of value names, got the string 'x'"),
    (lambda: Node("a", eq.ReLU, ["x"]), TypeError, "node 'a': .* is not an op; make one, for instance eqfact.ReLU()"),
    (lambda: Graph(x2, [("a", eq.ReLU(), ["x"])], ["a"]), TypeError, "nodes must be eqfact.Node"),
    (lambda: BY_NAME["chain"].graph["nope"], KeyError, "no node makes 'nope'; nodes are act, fc1, fc2"),
    (lambda: BY_NAME["chain"].graph.with_ops({"nope": eq.ReLU()}), ValueError, "no node is called 'nope'; nodes are act, fc1, fc2"),
    # cycles
    (lambda: Graph(x2, [Node("a", eq.Add(), ["x", "b"]), Node("b", eq.ReLU(), ["a"])], ["b"]), ValueError,
     "the nodes form a cycle: (a -> b -> a|b -> a -> b)"),
    (lambda: Graph(x2, [Node("a", eq.Add(), ["x", "a"])], ["a"]), ValueError, "the nodes form a cycle: a -> a"),
    # input shapes
    (lambda: Graph({"x": ()}, [], ["x"]), ValueError, "input 'x' needs a shape .C, .spatial. of positive integers, without the batch, got"),
    (lambda: Graph({"x": (0, 4)}, [], ["x"]), ValueError, "input 'x' needs a shape"),
    (lambda: Graph({"x": (2, -1)}, [], ["x"]), ValueError, "input 'x' needs a shape"),
    (lambda: Graph({"x": (2.0,)}, [], ["x"]), ValueError, "input 'x' needs a shape"),
    (lambda: Graph({"x": 2}, [], ["x"]), ValueError, "input 'x' needs a shape"),
    (lambda: Graph({"": (2,)}, [], [""]), TypeError, "an input needs a name"),
    # what ops do not take: the op gives the reason, the graph the node
    (lambda: Graph(x2, [Node("a", eq.ReLU(), [])], ["a"]), ValueError, "node 'a': ReLU reads one value, got 0"),
    (lambda: Graph(x2, [Node("a", eq.ReLU(), ["x", "x"])], ["a"]), ValueError, "node 'a': ReLU reads one value, got 2"),
    (lambda: Graph(x2, [Node("a", eq.Add(), ["x"])], ["a"]), ValueError, "node 'a': Add reads two values or more, got 1"),
    (lambda: Graph(x2, [Node("a", eq.Mul(), ["x"])], ["a"]), ValueError, "node 'a': Mul reads two values or more, got 1"),
    (lambda: Graph(x2, [Node("a", eq.Concat(), [])], ["a"]), ValueError, "node 'a': Concat reads at least one value"),
    (lambda: Graph({"x": (16, 4), "y": (24, 4)}, [Node("add1", eq.Add(), ["x", "y"])], ["add1"]), ValueError,
     "node 'add1': Add needs equal channel counts, got 16 and 24"),
    (lambda: Graph({"x": (2, 4), "y": (2, 3)}, [Node("a", eq.Add(), ["x", "y"])], ["a"]), ValueError,
     "node 'a': Add needs equal spatial shapes, got .4,. and .3,."),
    (lambda: Graph({"x": (2, 4), "y": (2,)}, [Node("a", eq.Mul(), ["x", "y"])], ["a"]), ValueError,
     "node 'a': Mul needs values with equally many axes"),
    (lambda: Graph({"x": (2, 4), "y": (2, 3)}, [Node("a", eq.Concat(), ["x", "y"])], ["a"]), ValueError,
     "node 'a': Concat needs equal spatial shapes, got .4,. and .3,."),
    (lambda: Graph.chain((5,), fc=eq.Dense(np.ones((2, 3)))), ValueError,
     r"node 'fc': Dense weight \(2, 3\) needs 3 input channels, got 5"),
    (lambda: Graph.chain((3, 4), fc=eq.Dense(np.ones((2, 3)))), ValueError, r"node 'fc': Dense reads \(N, 3\), .*; put Flatten before it"),
    (lambda: Graph.chain((4, 8, 8), conv=eq.Conv(weight)), ValueError,
     r"node 'conv': Conv weight \(4, 3, 3, 3\) with 1 groups needs 3 input channels, got 4"),
    (lambda: Graph.chain((4, 8, 8), conv=eq.Conv(weight, groups=2)), ValueError,
     "node 'conv': Conv weight .* with 2 groups needs 6 input channels, got 4"),
    (lambda: Graph.chain((3, 8), conv=eq.Conv(weight)), ValueError, "node 'conv': Conv has a kernel over 2 spatial axes, its input has 1"),
    (lambda: Graph.chain((3, 2, 2), conv=eq.Conv(weight)), ValueError,
     "node 'conv': Conv with kernel .3, 3. .* does not fit into spatial shape .2, 2."),
    (lambda: Graph.chain((3, 1, 1), up=eq.ConvTranspose(weight, padding=2)), ValueError,
     "node 'up': ConvTranspose with padding 2 leaves spatial shape"),
    (lambda: Graph.chain((3,), bn=eq.BatchNorm(*np.ones((4, 2)))), ValueError, "node 'bn': BatchNorm has 2 channels, got 3"),
    (lambda: Graph.chain((3,), act=eq.PReLU(np.ones(2))), ValueError, "node 'act': PReLU has 2 slopes for 3 channels"),
    (lambda: Graph.chain((3,), act=eq.Clip(np.zeros(2), 1.0)), ValueError, "node 'act': Clip low has 2 bounds for 3 channels"),
    (lambda: Graph.chain((3,), pool=eq.MaxPool(2)), ValueError, r"node 'pool': MaxPool needs spatial axes, got a value of shape \(3,\)"),
    (lambda: Graph.chain((3,), pool=eq.GlobalAvgPool()), ValueError, "node 'pool': GlobalAvgPool needs spatial axes"),
    (lambda: Graph.chain((3,), pad=eq.Pad(1)), ValueError, "node 'pad': Pad needs spatial axes"),
    (lambda: Graph.chain((3,), up=eq.Upsample(2)), ValueError, "node 'up': Upsample needs spatial axes"),
    (lambda: Graph.chain((3, 2, 2), pool=eq.MaxPool(3)), ValueError, "node 'pool': MaxPool with kernel .3, 3. .* does not fit"),
    (lambda: Graph.chain((3, 8, 8), pool=eq.AvgPool(2, padding=2)), ValueError,
     "node 'pool': AvgPool padding .* must be smaller than the kernel"),
    (lambda: Graph.chain((3, 8, 8), pool=eq.MaxPool((2, 2, 2))), ValueError, "node 'pool': kernel has 3 entries .* for 2 spatial axes"),
    (lambda: Graph.chain((3, 8, 8), pad=eq.Pad((1, 1, 1))), ValueError, "node 'pad': padding has 3 entries .* for 2 spatial axes"),
    (lambda: Graph({"": (3,)}, [Node("a", eq.ReLU(), [""])], ["a"]), TypeError, "an input needs a name .*, got ''"),
    (lambda: Graph({3: (3,)}, [Node("a", eq.ReLU(), ["x"])], ["a"]), TypeError, "an input needs a name .*, got 3"),
    (lambda: Graph.chain((3,), some=eq.Slice(1, 5)), ValueError, r"node 'some': Slice\(1, 5\) does not fit 3 channels"),
    (lambda: Graph.chain((3,), some=eq.Slice(2, 1)), ValueError, r"node 'some': Slice\(2, 1\) does not fit 3 channels"),
    (lambda: Graph.chain((3,), some=eq.Slice(-4, 2)), ValueError, r"node 'some': Slice\(-4, 2\) does not fit 3 channels"),
    (lambda: Graph.chain((3,), mix=eq.Permute((1, 0))), ValueError, "node 'mix': Permute orders 2 channels, got 3"),
    (lambda: Graph.chain((3, 2), turn=eq.Transpose((0, 1, 2))), ValueError, "node 'turn': Transpose orders 3 axes, got a value of shape"),
    (lambda: Graph.chain((5,), space=eq.Unflatten((2, 3))), ValueError,
     r"node 'space': Unflatten to \(2, 3\) reads \(N, 6\), got a value of shape \(5,\)"),
    (lambda: Graph.chain((3,), prob=eq.Softmax(2)), ValueError, r"node 'prob': Softmax axis 2 is none of a value \(N, 3\)"),
    (lambda: Graph.chain((3,), prob=eq.Softmax(-2)), ValueError, "node 'prob': Softmax axis -2 is none of a value"),
])
def test_a_bad_graph_is_refused_with_the_name_of_the_node(make, error, message):
    with pytest.raises(error, match=message):
        make()


NET = Graph.chain((2, 3), conv=eq.Conv(np.ones((1, 2, 1), np.float32)))
PAIR = Graph({"x": (1,), "y": (1,)}, [Node("sum", eq.Add(), ["x", "y"])], ["sum"])


@pytest.mark.parametrize("run", [eq.forward, eq.values, eq.calibrate], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("graph", "x", "error", "message"), [
    (NET, np.ones((1, 2, 3), int), TypeError, r"input 'x' must be a floating array, got int64; convert it with .astype\(np.float32\)"),
    (NET, np.ones((1, 2, 3), object), TypeError, "input 'x' must be a floating array, got object"),
    (NET, np.ones((1, 2, 3), complex), TypeError, "input 'x' must be a floating array, got complex128"),
    (NET, np.ones((1, 2, 3), bool), TypeError, "input 'x' must be a floating array, got bool"),
    (NET, np.ones((2, 3)), ValueError, r"input 'x' must be \(N, 2, 3\), got \(2, 3\)"),
    (NET, np.ones((1, 3, 2)), ValueError, r"input 'x' must be \(N, 2, 3\), got \(1, 3, 2\)"),
    (NET, np.array(1.0), ValueError, r"input 'x' must be \(N, 2, 3\), got \(\)"),
    (NET, np.ones((0, 2, 3)), ValueError, "input 'x' is an empty batch: shape .0, 2, 3."),
    (NET, np.full((1, 2, 3), np.nan), ValueError, r"input 'x' holds nan at index \(0, 0, 0\); data must be finite"),
    (NET, np.array([[[0, 1, 2], [3, np.inf, 5.0]]]), ValueError, r"input 'x' holds inf at index \(0, 1, 1\); data must be finite"),
    (NET, np.full((1, 2, 3), 1e39), ValueError, r"input 'x' holds 1e\+39 at index \(0, 0, 0\); data must be finite \(in float32\)"),
    (NET, {"y": np.ones((1, 2, 3))}, ValueError, r"the network needs inputs \['x'\], got \['y'\]"),
    (PAIR, {"x": np.ones((1, 1))}, ValueError, r"the network needs inputs \['x', 'y'\], got \['x'\]"),
    (PAIR, {"x": np.ones((1, 1)), "y": np.ones((2, 1))}, ValueError, "inputs must have equal batch sizes, got {'x': 1, 'y': 2}"),
    (PAIR, np.ones((1, 1)), TypeError, r"the network has inputs \['x', 'y'\]: give a dict of arrays by name"),
])
def test_bad_data_is_refused_with_the_name_of_the_input(run, graph, x, error, message):
    with pytest.raises(error, match=message):
        run(graph, x)


def test_an_order_that_is_one_stays():
    """Branch by branch, not level by level."""
    nodes = [eq.Node(name, eq.ReLU(), [read]) for name, read in (("a1", "x"), ("a2", "a1"), ("b1", "x"), ("b2", "b1"))]
    graph = eq.Graph({"x": (2,)}, [*nodes, eq.Node("y", eq.Add(), ["a2", "b2"])], ["y"])
    assert [node.name for node in graph.nodes] == ["a1", "a2", "b1", "b2", "y"]
