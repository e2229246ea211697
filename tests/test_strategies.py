"""The generator of networks really makes what the laws are to be tried on."""

import collections
import functools
import inspect

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import eqfact as eq
from eqfact.testing import laws, strategies
from eqfact.testing.strategies import LARGEST_INPUT, NEARLY_DEAD, batches, factorizations, networks

#: One process draws the networks, for all tests here.
pytestmark = pytest.mark.xdist_group("networks")

#: So many examples show every feature.
ENOUGH = 800


@pytest.fixture(scope="module")
def drawn():
    """The first networks of the generator, with data and factors; and how often each producer was called for them."""
    cases, calls = [], collections.Counter()

    @settings(max_examples=ENOUGH, derandomize=True, database=None, phases=[Phase.generate])
    @given(networks().flatmap(lambda graph: st.tuples(st.just(graph), batches(graph), factorizations(graph))))
    def collect(case):
        cases.append(case)

    with pytest.MonkeyPatch.context() as counting:
        for name in PRODUCERS:
            counting.setattr(strategies._Builder, name, counted(getattr(strategies._Builder, name), calls))
        collect()
    return cases, calls


@pytest.fixture
def found(drawn):
    return drawn[0]


def uses(graph, kind):
    return [node for node in graph if isinstance(node.op, kind)]


def weighted(graph):
    return uses(graph, eq.ops.Weighted)


def reads_its_own_branch(graph, node):
    """An Add one of whose inputs is made out of the other."""
    made_of = {name: {name} for name in graph.inputs}
    for n in graph:
        made_of[n.name] = {n.name}.union(*(made_of[i] for i in n.inputs))
    a, b = node.inputs[:2]
    return a != b and (a in made_of[b] or b in made_of[a])


def same_source(graph, node):
    """A Concat of two layers, perhaps activated, of one value."""
    def source(name):
        while name not in graph.inputs and isinstance(graph[name].op, eq.ops.Commuting):
            name = graph[name].inputs[0]
        return None if name in graph.inputs else graph[name]

    made = [source(name) for name in node.inputs]
    return None not in made and made[0].name != made[1].name and made[0].inputs == made[1].inputs


def behind_itself(graph, node):
    """A node that reads, perhaps through others, what another node makes with the same op."""
    above, todo = set(), list(node.inputs)
    while todo:
        name = todo.pop()
        if name not in graph.inputs and name not in above:
            above.add(name)
            todo += graph[name].inputs
    return any(graph[name].op is node.op for name in above)


def convs(graph, test):
    return any(test(node.op, graph.shapes[node.inputs[0]][0]) for node in uses(graph, eq.Conv))


def shared(graph):
    return [node for node in weighted(graph) if sum(other.op is node.op for other in graph) > 1]


def row_sizes(op):
    return np.abs(op.rows()).max(axis=1)


FEATURES = {
    "fan-out": lambda g: any(len(readers) > 1 for readers in g.readers.values()),
    "residual": lambda g: any(reads_its_own_branch(g, node) for node in uses(g, eq.Add)),
    "residual inside the network": lambda g: any(
        reads_its_own_branch(g, node) and eq.channels(g).labels[node.name].any() for node in uses(g, eq.Add)),
    "add of three": lambda g: any(len(node.inputs) == 3 for node in uses(g, eq.Add)),
    "add over space": lambda g: any(len({g.shapes[i] for i in node.inputs}) > 1 for node in uses(g, eq.Add)),
    "add of a value to itself": lambda g: any(len(set(node.inputs)) == 1 for node in uses(g, eq.Add)),
    "add of three, one of them twice": lambda g: any(len(node.inputs) == 3 and len(set(node.inputs)) == 2 for node in uses(g, eq.Add)),
    "add of mates, none made of the other": lambda g: any(
        len(set(node.inputs)) > 1 and not reads_its_own_branch(g, node) for node in uses(g, eq.Add)),
    "one channel joined to several": lambda g: any(
        len({g.shapes[i][0] for i in node.inputs}) > 1 for node in uses(g, (eq.Add, eq.Sub, eq.Max, eq.Min))),
    "free constant channels": lambda g: any(
        node.op.axis == 0 and eq.channels(g).labels[node.name][0 if node.op.front else -1] > 0 for node in uses(g, eq.Extend)),
    "dilated pool": lambda g: any(node.op.dilation != 1 for node in uses(g, eq.MaxPool)),
    "concat": lambda g: any(len(set(node.inputs)) > 1 for node in uses(g, eq.Concat)),
    "concat of a value with itself": lambda g: any(len(set(node.inputs)) == 1 for node in uses(g, eq.Concat)),
    "concat of layers that both read one value": lambda g: any(same_source(g, node) for node in uses(g, eq.Concat)),
    "free concat": lambda g: any(eq.channels(g).labels[node.name].any() for node in uses(g, eq.Concat)),
    "groups": lambda g: convs(g, lambda op, channels: 1 < op.groups < channels),
    "depthwise": lambda g: convs(g, lambda op, channels: op.groups == channels > 1),
    "depthwise with multiplier": lambda g: convs(g, lambda op, channels: op.groups == channels > 1 and op.out_channels > channels),
    "stride": lambda g: convs(g, lambda op, _: max(op.stride) > 1 if isinstance(op.stride, tuple) else op.stride > 1),
    "dilation": lambda g: convs(g, lambda op, _: isinstance(op.dilation, tuple) and any(
        d > 1 and k > 1 for d, k in zip(op.dilation, op.weight.shape[2:], strict=True))),
    "conv without bias": lambda g: convs(g, lambda op, _: op.bias is None),
    "transposed with groups": lambda g: any(node.op.groups > 1 for node in uses(g, eq.ConvTranspose)),
    "batchnorm after conv": lambda g: any(
        isinstance(g[node.inputs[0]].op, eq.Conv) for node in uses(g, eq.BatchNorm) if node.inputs[0] not in g.inputs),
    "batchnorm before conv": lambda g: any(isinstance(r.op, eq.Conv) for node in uses(g, eq.BatchNorm) for r in g.readers[node.name]),
    "shared op": lambda g: shared(g),
    "shared op behind itself": lambda g: any(behind_itself(g, node) for node in shared(g)),
    "shared op on several values": lambda g: any(
        len({n.inputs for n in g if n.op is node.op}) > 1 and not behind_itself(g, node) for node in shared(g)),
    "shared op, free": lambda g: any(eq.channels(g).labels[node.name].any() for node in shared(g)),
    "dead channel": lambda g: any((row_sizes(node.op) == 0).any() for node in weighted(g)),
    "dead channel without bias": lambda g: any(
        ((row_sizes(node.op) == 0) & (0 if node.op.bias is None else node.op.bias == 0)).any() for node in weighted(g)),
    "batchnorm that switches a channel off": lambda g: any(
        ((node.op.gamma == 0) & (node.op.beta == 0)).any() for node in uses(g, eq.BatchNorm)),
    "nearly dead channel": lambda g: any(
        ((row_sizes(node.op) > 0) & (row_sizes(node.op) <= NEARLY_DEAD)).any() for node in weighted(g)),
    "channel that nobody reads": lambda g: any((np.abs(node.op.columns()).max(axis=1) == 0).any() for node in uses(g, (eq.Conv, eq.Dense))),
    "inner value that is an output": lambda g: any(g.readers[name] for name in g.outputs),
    "input that is an output": lambda g: set(g.inputs) & set(g.outputs),
    "several outputs": lambda g: len(g.outputs) > 1,
    "two inputs": lambda g: len(g.inputs) == 2,
    "three inputs": lambda g: len(g.inputs) == 3,
    "dead end": lambda g: any(not g.readers[node.name] and node.name not in g.outputs for node in g),
    "limit a channel": lambda g: any(np.size(node.op.low) > 1 for node in uses(g, eq.Clip)),
    "open limit": lambda g: any(np.any(np.isinf(node.op.high)) for node in uses(g, eq.Clip)),
    "relu6": lambda g: any(np.all(node.op.high == 6) for node in uses(g, eq.Clip)),
    "prelu a channel": lambda g: any(node.op.slope.size > 1 for node in uses(g, eq.PReLU)),
    "negative slope": lambda g: any((node.op.slope < 0).any() for node in uses(g, eq.PReLU)),
    "pad with zero": lambda g: any(node.op.value == 0 for node in uses(g, eq.Pad)),
    "pad with a constant": lambda g: any(node.op.value != 0 for node in uses(g, eq.Pad)),
    "slice from the end": lambda g: any(node.op.start < 0 for node in uses(g, eq.Slice)),
    "flatten over space": lambda g: any(len(g.shapes[node.inputs[0]]) > 1 for node in uses(g, eq.Flatten)),
    "channels moved into space": lambda g: any(node.op.axes[0] != 0 for node in uses(g, eq.Transpose)),
    "product of different values": lambda g: any(len(set(node.inputs)) > 1 for node in uses(g, eq.Mul)),
    "product over space": lambda g: any(len({g.shapes[i] for i in node.inputs}) > 1 for node in uses(g, eq.Mul)),
    "product of equals": lambda g: any(len(set(node.inputs)) == 1 for node in uses(g, eq.Mul)),
    "forms of several free numbers": lambda g: eq.channels(g).compound is not None,
    "free product": lambda g: any(eq.channels(g).labels[node.name].any() for node in uses(g, eq.Mul)),
    "pinned by a product": lambda g: any("held by" in reason for reason in eq.channels(g).pinned.values()),
    "grouped queries": lambda g: any(node.op.heads > node.op.kv_heads for node in uses(g, eq.Scores)),
    "several heads of keys": lambda g: any(node.op.kv_heads > 1 for node in uses(g, eq.Scores)),
    "attention without softmax": lambda g: any(g[node.inputs[0]].op.__class__ is eq.Scores for node in uses(g, eq.Mix)),
    "causal mask": lambda g: any(isinstance(node.op.mask, str) for node in uses(g, eq.Softmax)),
    "mask of numbers": lambda g: any(isinstance(node.op.mask, np.ndarray) for node in uses(g, eq.Softmax)),
    "interleaved rotary": lambda g: any(node.op.interleaved for node in uses(g, eq.Rotary)),
    "rotary halves": lambda g: any(not node.op.interleaved for node in uses(g, eq.Rotary)),
    "normalisation of a free value": lambda g: any(
        eq.channels(g).labels[node.inputs[0]].any() for node in uses(g, eq.ops.Normalization)),
    "groups of channels normalised": lambda g: any(1 < node.op.norm_groups < len(node.op.gamma) for node in uses(g, eq.GroupNorm)),
    "squeeze and excite": lambda g: any(
        g[node.inputs[1]].op.__class__ is eq.Sigmoid for node in uses(g, eq.Mul) if node.inputs[1] not in g.inputs),
    "no axis of space": lambda g: all(len(shape) == 1 for shape in g.inputs.values()),
    "1d": lambda g: len(g.inputs["x"]) == 2,
    "2d": lambda g: len(g.inputs["x"]) == 3,
    "3d": lambda g: len(g.inputs["x"]) == 4,
    "float32": lambda g: g.dtype == np.float32,
    "float64": lambda g: g.dtype == np.float64,
    "all pinned": lambda g: eq.degrees_of_freedom(g) == 0,
    "a dozen free factors": lambda g: eq.degrees_of_freedom(g) >= 12,
    "a single channel": lambda g: all(shape[0] == 1 for shape in g.shapes.values()),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_networks_show(feature, found):
    assert any(FEATURES[feature](graph) for graph, _, _ in found)


def parameters(kind, name):
    """All numbers that a parameter of a kind of op has in a network."""
    return lambda g: [n for node in uses(g, kind) for n in np.ravel(getattr(node.op, name)).tolist()]


POOLS = (eq.MaxPool, eq.AvgPool, eq.ops.MinPool, eq.ops.LpPool)

#: What is drawn, and all that it may be: wider draws would be slow or overflow, narrower ones miss corners.
RANGES = {
    "channels of inputs": (lambda g: [shape[0] for shape in g.inputs.values()], {1, 2, 3, 4}),
    "pixels of one and two axes": (lambda g: [n for shape in g.inputs.values() for n in shape[1:] if len(shape) < 4], {1, 2, 3, 4, 5, 6}),
    "pixels of three axes": (lambda g: [n for shape in g.inputs.values() for n in shape[1:] if len(shape) == 4], {1, 2, 3}),
    "kernels": (lambda g: [n for node in uses(g, eq.Conv) for n in node.op.weight.shape[2:]], {1, 2, 3}),
    "strides": (parameters(eq.Conv, "stride"), {1, 2}),
    "dilations": (parameters(eq.Conv, "dilation"), {1, 2}),
    "padding": (parameters(eq.Conv, "padding"), {0, 1, 2}),
    "transposed kernels": (lambda g: [n for node in uses(g, eq.ConvTranspose) for n in node.op.weight.shape[2:]], {1, 2}),
    "transposed strides": (parameters(eq.ConvTranspose, "stride"), {1, 2}),
    "transposed dilations": (parameters(eq.ConvTranspose, "dilation"), {1, 2}),
    "transposed padding": (parameters(eq.ConvTranspose, "padding"), {0, 1}),
    "output padding": (parameters(eq.ConvTranspose, "output_padding"), {0, 1}),
    "eps": (parameters(eq.BatchNorm, "eps"), {1e-5, 1e-3}),
    "windows": (parameters(POOLS, "kernel"), {1, 2, 3}),
    "padding of windows": (parameters(POOLS, "padding"), {0, 1, 2}),
    "strides of windows": (parameters(POOLS, "stride"), {None, 1, 2}),
    "means that count padding": (parameters(eq.AvgPool, "count_include_pad"), {False, True}),
    "pads": (parameters(eq.Pad, "padding"), {0, 1}),
    "padded with": (parameters(eq.Pad, "value"), {0.0, 1.5}),
    "repetitions": (parameters(eq.Upsample, "factor"), {1, 2}),
    "entries taken": (lambda g: [len(node.op.indices) for node in uses(g, eq.ops.Take)], {1, 2, 3, 4, 5, 6}),
    "parts of axes": (lambda g: [split[1] for node in uses(g, eq.ops.Rearrange) for split in node.op.split], {1, 2, 3}),
    "axes joined along": (parameters(eq.Concat, "axis"), {0, 1, 2, 3}),
    "axes of softmax": (parameters(eq.Softmax, "axis"), {-1, 1, 2, 3, 4}),
    "small slopes": (parameters(eq.LeakyReLU, "slope"), {0.1}),
    "curves by approximation": (parameters(eq.GELU, "approximate"), {False, True}),
    "values added": (lambda g: [len(node.inputs) for node in uses(g, eq.Add)], {2, 3}),
}


@pytest.mark.parametrize("what", RANGES)
def test_networks_cover_their_ranges_and_no_more(what, found):
    """Rare ops need not show every corner: draws are neither even nor the same in every run of the suite."""
    numbers, expected = RANGES[what]
    drawn = [n for graph, _, _ in found for n in numbers(graph)]
    assert set(drawn) <= expected
    assert len(drawn) < 70 * len(expected) or set(drawn) == expected


#: What builds a network step by step, and what only helps.
PRODUCERS = [name for name, member in vars(strategies._Builder).items()
             if callable(member) and not name.startswith("_") and list(inspect.signature(member).parameters)[1:2] == ["value"]
             and name not in ("accepts", "mates", "menu", "same_sizes", "pointwise")]


def counted(method, calls):
    @functools.wraps(method)
    def calling(*args):
        calls[method.__name__] += 1
        return method(*args)
    return calling


def test_networks_use_every_producer(drawn):
    """Counted where they are called: the menu must offer each, and the draws must take it."""
    _, calls = drawn
    assert len(PRODUCERS) >= 32
    assert {name: calls[name] for name in PRODUCERS if calls[name] < 5} == {}


@pytest.mark.parametrize("op", eq.ops.ALL, ids=lambda op: op.__name__)
def test_networks_use_every_op(op, found):
    assert any(uses(graph, op) for graph, _, _ in found)


def test_networks_are_free_and_deep_enough_on_average(found):
    freedom, nodes = (np.array([f(graph) for graph, _, _ in found]) for f in (eq.degrees_of_freedom, len))
    assert len(found) >= ENOUGH / 2
    assert freedom.mean() > 2
    assert (freedom > 0).mean() > 0.35
    assert nodes.mean() > 5
    assert nodes.max() < 60


def test_factors_differ_from_one_where_they_may(found):
    differ = [bool(np.any(f.by_label != 1)) for graph, _, f in found if eq.degrees_of_freedom(graph)]
    assert np.mean(differ) > 0.8


def test_data_are_sometimes_all_zero_and_sometimes_on_a_grid(found):
    arrays = [next(iter(x.values())) if isinstance(x, dict) else x for _, x, _ in found]
    assert any(not x.any() for x in arrays)
    assert any(x.any() and not (2 * x % 1).any() for x in arrays)
    assert {len(x) for x in arrays} == {1, 2, 3}


@given(networks().flatmap(lambda graph: st.tuples(st.just(graph), batches(graph))))
def test_networks_stay_small_and_tame(case):
    graph, x = case
    every = eq.values(graph, x)
    tiny = float(np.finfo(np.float32).tiny)
    for value in every.values():
        assert value[0].size <= 6000
        assert np.isfinite(value).all()
        assert np.abs(value).max() < 1e6
        assert not ((value != 0) & (np.abs(value) < 2.0**40 * tiny)).any()  # far from subnormal numbers


@given(networks().flatmap(lambda graph: st.tuples(st.just(graph), batches(graph))))
def test_batches_fit_their_network(case):
    graph, x = case
    arrays = x if isinstance(x, dict) else {"x": x}
    assert {name: array.shape[1:] for name, array in arrays.items()} == dict(graph.inputs)
    for array in arrays.values():
        assert array.dtype == (graph.dtype or np.float64)
        assert np.abs(array).max() <= LARGEST_INPUT


@given(networks().flatmap(lambda graph: st.tuples(st.just(graph), factorizations(graph), factorizations(graph, powers_of_two=False))))
def test_factorizations_are_legal_and_within_bounds(case):
    graph, powers, free = case
    assert laws.powers_of_two(powers.by_label)
    laws.same_factors(eq.Factorization.of(graph, powers), powers)
    for f in (powers, free):
        assert eq.Factorization.of(graph, f).by_label == pytest.approx(f.by_label, rel=1e-12)
        assert np.all((f.free >= 1 / 16) & (f.free <= 16))
