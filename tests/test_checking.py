"""``eqfact.testing.check``: passes that are right pass, each planted mistake is caught by the law that names it, and reports can be run."""

import dataclasses
import re
import subprocess
import sys
import textwrap
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import onnx
import pytest
from cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import _eqfact_hypothesis
import eqfact as eq
import eqfact.onnx
from eqfact.onnx.running import run
from eqfact.testing import KINDS, LAWS, Declined, Violation, check, checking, checks, laws, source, to_onnx
from eqfact.testing.frameworks import Numpy, Onnx, engine_bounds
from eqfact.testing.kinds import KINDS_OF_OPS, STRUCTURES, excluded, shows
from eqfact.testing.shrinking import made_small
from eqfact.testing.strategies import batches, models, networks

ROOT = Path(__file__).parents[1]
#: So that tests do not draw what the kinds show already.
FEW = {"examples": 5}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Reports write to the working directory."""
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------------------ right passes


def unchanged(network):
    return network


def equalized_exactly(graph):
    return eq.equalize(graph, exact=True).graph


def without_identities(model):
    """Identity nodes are left out, unless that would take an output its name."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    outputs = {info.name for info in made.graph.output}
    for node in [n for n in made.graph.node if n.op_type == "Identity" and n.output[0] not in outputs]:
        for other in made.graph.node:
            for i, name in enumerate(other.input):
                if name == node.output[0]:
                    other.input[i] = node.input[0]
        made.graph.node.remove(node)
    return made


@pytest.mark.parametrize("pass_, framework, exact", [
    (unchanged, "numpy", True), (equalized_exactly, "numpy", True), (eq.fold_batchnorm, "numpy", False),
    (without_identities, "onnx", True)])
def test_right_passes_keep_all_laws(pass_, framework, exact):
    found = check(pass_, framework, exact=exact, examples=15)
    assert found.networks >= 110 and not found.declined and found.laws == tuple(LAWS)
    assert re.fullmatch(rf"{pass_.__name__}: 6 laws kept on \d+ networks \({framework}\)", str(found))


# ------------------------------------------------------------------------------------------------ wrong passes


def replaced(graph, kind, change):
    """A graph with other ops of one kind."""
    return graph.with_ops({node.name: change(node.op) for node in graph if isinstance(node.op, kind)})


def bias_dropped(graph):
    return replaced(graph, eq.Conv, lambda op: dataclasses.replace(op, bias=None))


def eps_forgotten(graph):
    return replaced(graph, eq.BatchNorm, lambda op: dataclasses.replace(op, eps=op.eps / 2))


def groups_swapped(graph):
    def turned(op):
        return dataclasses.replace(op, weight=op.weight[::-1]) if op.groups > 1 else op
    return replaced(graph, eq.Conv, turned)


def clip_made_relu(graph):
    return replaced(graph, eq.Clip, lambda op: eq.ReLU() if np.all(op.low == 0) else op)


def layers_scaled(graph):
    """Cross-layer equalization that scales a layer up and the next one down, whoever else reads the value between them."""
    for node in graph:
        (read, *_) = node.inputs
        before = next((n for n in graph if n.name == read), None)
        if before is not None and all(isinstance(n.op, (eq.Conv, eq.Dense)) for n in (node, before)) and before.op is not node.op:
            bias = None if before.op.bias is None else before.op.bias * 2
            return graph.with_ops({before.name: dataclasses.replace(before.op, weight=before.op.weight * 2, bias=bias),
                                   node.name: dataclasses.replace(node.op, weight=node.op.weight / 2)})
    return graph


def output_renamed(graph):
    (*others, last) = graph.nodes
    return eq.Graph(graph.inputs, [*others, dataclasses.replace(last, name="renamed")],
                    ["renamed" if name == last.name else name for name in graph.outputs])


def outputs_reversed(graph):
    return dataclasses.replace(graph, outputs=graph.outputs[::-1])


def inner_output_forgotten(graph):
    return dataclasses.replace(graph, outputs=graph.outputs[:1])


def weights_written_to(graph):
    for node in graph:
        if isinstance(node.op, (eq.Conv, eq.Dense)):
            node.op.weight.flags.writeable = True
            node.op.weight[...] *= 1
            node.op.weight[...] += 1
    return graph


def noise_added(graph):
    def noisy(op):
        factor = 1 + np.random.default_rng().integers(4) * np.finfo(op.weight.dtype).eps
        return dataclasses.replace(op, weight=op.weight * op.weight.dtype.type(factor))
    return replaced(graph, (eq.Conv, eq.Dense), noisy)


def overflowing(graph):
    huge = np.float32(1e30)
    return replaced(graph, (eq.Conv, eq.Dense), lambda op: dataclasses.replace(op, weight=op.weight.astype(np.float32) * huge))


def divided_by_range(graph):
    """Dead channels have no range to be divided by."""
    def unit(op):
        with np.errstate(invalid="ignore", divide="ignore"):
            return dataclasses.replace(op, weight=op.weight / np.abs(op.rows()).max(axis=1).reshape(-1, *(1,) * (op.weight.ndim - 1)))
    return replaced(graph, (eq.Conv, eq.Dense), unit)


def nothing_returned(graph):
    replaced(graph, eq.Conv, lambda op: op)


def last_bit_lost(graph):
    return replaced(graph, (eq.Conv, eq.Dense), lambda op: dataclasses.replace(op, weight=np.nextafter(op.weight, op.weight.dtype.type(0))))


def changed(edit):
    """An ONNX pass: an edit of a copy."""
    def pass_(model):
        made = onnx.ModelProto()
        made.CopyFrom(model)
        edit(made)
        return made
    pass_.__name__ = edit.__name__
    return pass_


@changed
def all_identities_removed(model):
    for node in [n for n in model.graph.node if n.op_type == "Identity"]:
        for info in model.graph.output:
            if info.name == node.output[0]:
                info.name = node.input[0]
        for other in model.graph.node:
            for i, name in enumerate(other.input):
                if name == node.output[0]:
                    other.input[i] = node.input[0]
        model.graph.node.remove(node)


@changed
def relu_before_clip_dropped(model):
    relus = {n.output[0]: n for n in model.graph.node if n.op_type == "Relu"}
    for node in model.graph.node:
        if node.op_type == "Clip" and node.input[0] in relus:
            node.input[0] = relus[node.input[0]].input[0]


@changed
def bias_set_to_nan(model):
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".bias"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(np.nan), tensor.name))


@changed
def initializer_lost(model):
    if model.graph.initializer:
        del model.graph.initializer[0]


@changed
def batch_of_another_name(model):
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


@changed
def stamped(model):
    model.producer_version = str(np.random.default_rng().integers(2**60))


def model_edited(model):
    model.graph.doc_string = "seen"
    return model


def written_out(model):
    return model.SerializeToString()


#: Wrong passes, what they are over, and the law that catches each.
PLANTED = [
    (bias_dropped, "numpy", "keeps_the_function"), (eps_forgotten, "numpy", "keeps_the_function"),
    (groups_swapped, "numpy", "keeps_the_function"), (clip_made_relu, "numpy", "keeps_the_function"),
    (layers_scaled, "numpy", "keeps_the_function"), (output_renamed, "numpy", "keeps_inputs_and_outputs"),
    (outputs_reversed, "numpy", "keeps_inputs_and_outputs"), (inner_output_forgotten, "numpy", "keeps_inputs_and_outputs"),
    (weights_written_to, "numpy", "leaves_its_input_alone"), (noise_added, "numpy", "gives_the_same_twice"),
    (overflowing, "numpy", "makes_no_nan_or_infinity"), (divided_by_range, "numpy", "gives_a_network"),
    (nothing_returned, "numpy", "gives_a_network"),
    (all_identities_removed, "onnx", "keeps_inputs_and_outputs"), (relu_before_clip_dropped, "onnx", "keeps_the_function"),
    (bias_set_to_nan, "onnx", "makes_no_nan_or_infinity"), (initializer_lost, "onnx", "gives_a_network"),
    (batch_of_another_name, "onnx", "keeps_inputs_and_outputs"), (stamped, "onnx", "gives_the_same_twice"),
    (model_edited, "onnx", "leaves_its_input_alone"), (written_out, "onnx", "gives_a_network"),
]


@pytest.mark.parametrize("pass_, framework, law", PLANTED, ids=lambda value: getattr(value, "__name__", value))
def test_each_planted_mistake_is_caught_by_the_law_that_names_it(pass_, framework, law):
    """By that law alone, so that no other hides it."""
    with pytest.raises(Violation) as caught:
        check(pass_, framework, laws=[law], examples=0)
    assert caught.value.law == law
    assert str(caught.value).startswith(f"{law}: ") and pass_.__name__ in str(caught.value)


def test_every_law_catches_something():
    assert {law for *_, law in PLANTED} == set(LAWS)


@pytest.mark.parametrize("pass_", [bias_dropped, layers_scaled])
def test_drawn_networks_alone_find_mistakes_too(pass_, monkeypatch):
    monkeypatch.setattr(checking, "SECONDS", 0.5)
    with pytest.raises(Violation, match="a network drawn with seed 0"):
        check(pass_, kinds=(), examples=400)


def test_a_rounding_is_allowed_unless_bits_are_to_stay():
    assert check(last_bit_lost, laws=["keeps_the_function"], **FEW)
    with pytest.raises(Violation, match="every bit was to stay"):
        check(last_bit_lost, exact=True, laws=["keeps_the_function"], **FEW)


def test_a_pass_that_fails_by_chance_is_reported_too(monkeypatch):
    """Hypothesis calls that flaky."""
    monkeypatch.setattr(checking, "SECONDS", 0.5)
    rng = np.random.default_rng(0)

    def sometimes(graph):
        return bias_dropped(graph) if rng.integers(4) == 0 else graph

    with pytest.raises(Violation):
        check(sometimes, kinds=(), examples=400)


# ------------------------------------------------------------------------------------------------ what a report says


@pytest.mark.parametrize("pass_, framework", [(bias_dropped, "numpy"), (relu_before_clip_dropped, "onnx")])
def test_the_code_of_a_report_makes_a_network_that_breaks_the_law(pass_, framework, tmp_path):
    with pytest.raises(Violation) as caught:
        check(pass_, framework, directory=tmp_path / "kept", **FEW)
    report, names = str(caught.value), {}
    exec(report[report.index("import numpy"):report.index("The network is kept")], names)
    assert Numpy().state(names["graph"]) == Numpy().state(caught.value.graph)
    with pytest.raises(Violation) as again:
        check(pass_, framework, networks=[names["graph"]], kinds=(), examples=0)
    assert again.value.law == caught.value.law
    kept = caught.value.path
    assert kept.parent == tmp_path / "kept" and str(kept) in report
    if framework == "numpy":
        assert Numpy().state(eq.load(kept)) == Numpy().state(caught.value.graph)
    else:
        assert onnx.load(kept) == to_onnx(caught.value.graph)
    with np.load(kept.with_name(f"{kept.stem}-data.npz")) as data:
        assert all(np.array_equal(data[name], names["x"][name]) for name in caught.value.graph.inputs)
    # what is said of the worst entry is so
    where = eval(re.search(r"worst at (\(.*?\)):", report)[1])
    got, expected = (float(re.search(rf"{word} (-?[\d.e-]+)", report)[1]) for word in ("got", "expected"))
    before = run(to_onnx(names["graph"]), names["x"]) if framework == "onnx" else {"": eq.forward(names["graph"], names["x"])}
    made = pass_(names["network"])
    after = run(made, names["x"]) if framework == "onnx" else {"": eq.forward(made, names["x"])}
    assert float(next(iter(before.values()))[where]) == pytest.approx(expected, rel=1e-5) != got
    assert float(next(iter(after.values()))[where]) == pytest.approx(got, rel=1e-5)


def test_networks_are_kept_in_a_folder_of_their_own_that_git_ignores(tmp_path):
    with pytest.raises(Violation) as caught:
        check(bias_dropped, **FEW)
    assert caught.value.path.resolve().parent == tmp_path / ".eqfact" and (tmp_path / ".eqfact" / ".gitignore").read_text() == "*\n"


@given(networks(without=["dead ends"]))
@settings(max_examples=6)
def test_the_smallest_network_that_has_an_op_is_that_op(graph):
    """And its numbers are ones, but for options that it needs."""
    x = {name: np.ones((2, *shape)) for name, shape in graph.inputs.items()}
    kind = type(graph.nodes[len(graph) // 2].op)

    def fails_too(graph, data, law):
        eq.forward(graph, data)
        return Violation(law, "", graph, data) if any(type(node.op) is kind for node in graph) else None

    small = made_small(fails_too, Violation("law", "", graph, x))
    assert [type(node.op) for node in small.graph] == [kind] and len(small.graph.outputs) == 1
    assert {len(array) for array in small.data.values()} == {1}
    assert all((array == 1).all() for array in small.data.values())


@given(networks())
def test_source_makes_the_network_again_bit_for_bit(graph):
    names = {}
    exec(source(graph, "again"), names)
    assert Numpy().state(names["again"]) == Numpy().state(graph)
    assert max(map(len, source(graph).splitlines())) <= 200


def test_source_keeps_what_short_numbers_would_lose():
    numbers = np.array([-0.0, 1e-45, 3.4e38, 0.1, 1 / 3, np.pi], np.float32)
    graph = eq.Graph.chain((6,), a=eq.PReLU(numbers), b=eq.Clip(-np.inf, np.array([np.inf, 1, 2, 3, 4, 5])), c=eq.LeakyReLU(1 / 3))
    names = {}
    exec(source(graph), names)
    assert Numpy().state(names["graph"]) == Numpy().state(graph)
    odd = eq.Graph({"it's": (1,)}, [eq.Node('a "quoted" name', eq.ReLU(), ["it's"])], ['a "quoted" name'])
    exec(source(odd), names)
    assert Numpy().state(names["graph"]) == Numpy().state(odd)


def test_source_refuses_an_op_that_it_cannot_name():
    class Own(eq.ReLU):
        pass
    with pytest.raises(TypeError, match="node 'act': Own is not an op of eqfact"):
        source(eq.Graph.chain((1,), act=Own()))


# ------------------------------------------------------------------------------------------------ what is asked


def test_a_pass_may_decline_networks_and_is_told_how_many():
    def careful(graph):
        if any(isinstance(node.op, eq.Add) for node in graph):
            raise NotImplementedError("additions")
        return graph
    found = check(careful, **FEW)
    assert found.declined > 3 and f"it declined {found.declined}: NotImplementedError: additions ({found.declined} times)" in str(found)
    with pytest.raises(Violation, match="it raises NotImplementedError: additions"):
        check(careful, refuses=KeyError, **FEW)


def test_a_pass_that_declines_a_network_the_second_time_is_not_deterministic():
    calls = []

    def tired(graph):
        calls.append(graph)
        if len(calls) % 2 == 0:
            raise NotImplementedError("enough")
        return graph
    with pytest.raises(Violation, match="gives_the_same_twice: the second time it declines: NotImplementedError: enough"):
        check(tired, **FEW)


def test_a_pass_that_declines_everything_fails():
    def shy(graph):
        raise ValueError("not this one")
    with pytest.raises(Declined, match=r"shy declined all \d+ networks, so nothing is known of it: ValueError: not this one"):
        check(shy, refuses=(ValueError,), **FEW)
    with pytest.raises(Declined, match="there was no network to try unchanged on"):
        check(unchanged, kinds=(), examples=0)


def test_a_pass_that_works_in_place_may_return_nothing():
    def in_place(model):
        model.producer_name = "mine"
    assert check(in_place, "onnx", in_place=True, **FEW)
    with pytest.raises(Violation, match=r"it returns None, and no onnx\.ModelProto"):
        check(in_place, "onnx", **FEW)
    with pytest.raises(Violation):  # what is returned is judged, not what was given
        check(lambda model: onnx.ModelProto(), "onnx", in_place=True, **FEW)


def seen(**options):
    graphs = []
    check(lambda graph: graphs.append(graph) or graph, laws=["gives_a_network"], **options)
    return graphs


def test_a_slow_pass_is_not_waited_for():
    graph = KINDS["classifier"](np.random.default_rng(0), np.dtype(np.float32))
    found = Violation("law", "", graph, {"x": np.ones((2, 2, 4, 4), np.float32)})
    assert made_small(lambda graph, data, law: Violation(law, "", graph, data), found, seconds=0) is found


def test_the_same_seed_tries_the_same_networks():
    first, again, other = ([Numpy().state(graph) for graph in seen(examples=15, seed=seed, kinds=["plain_chain"])] for seed in (1, 1, 2))
    assert first == again != other


def test_networks_of_ones_own_come_first():
    own = eq.Graph.chain((3,), own=eq.ReLU())
    assert [node.name for node in seen(networks=[own], examples=0, kinds=["residual"])[0]] == ["own"]


@pytest.mark.parametrize("options, message", [
    ({"framework": "tensorflow"}, "no framework 'tensorflow'; there are numpy, torch, onnx"), ({"laws": ["speed"]}, "no law 'speed'"),
    ({"kinds": ["resnet"]}, "no kind 'resnet'"), ({"without": ["convs"]}, "cannot be drawn without 'convs'"),
    ({"without": [eq.Conv]}, "cannot be drawn without .*Conv")])
def test_unknown_names_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check(unchanged, **options)


# ------------------------------------------------------------------------------------------------ which networks


NAMES = [*KINDS_OF_OPS, *STRUCTURES]


@pytest.mark.parametrize("name", NAMES)
def test_networks_are_drawn_without_what_is_excluded(name):
    found = set()

    @settings(max_examples=25)
    @given(networks(without=[name], axes=(1, 2)))
    def collect(graph):
        found.update(shows(graph))

    collect()
    assert not found & excluded([name])
    assert len(found) > 15


@pytest.mark.parametrize("op", [op for op in eq.ops.ALL if op not in (eq.Conv, eq.Dense)], ids=lambda op: op.__name__)
def test_networks_are_drawn_without_any_op(op):
    @settings(max_examples=5)
    @given(networks(without=[op]))
    def has_none(graph):
        assert not any(type(node.op) is op for node in graph)

    has_none()


def test_checks_leave_out_kinds_with_what_is_excluded():
    graphs = seen(without=["groups", "attention", eq.Add], axes=(2,), examples=20)
    assert len(graphs) > 60
    for graph in graphs:
        assert not {"groups", eq.Scores, eq.Add} & shows(graph) and all(len(shape) == 3 for shape in graph.inputs.values())


def independent(graph):
    """Structures, told in another way than :func:`shows` does."""
    convs = [node for node in graph if isinstance(node.op, (eq.Conv, eq.ConvTranspose))]
    weighted = [id(node.op) for node in graph if isinstance(node.op, eq.ops.Weighted)]
    alive = {name for output in graph.outputs for name in ancestors(graph, output)}
    return {"groups": any(n.op.groups > 1 for n in convs),
            "several inputs": len(graph.inputs) > 1, "several outputs": len(graph.outputs) > 1,
            "depthwise": any(1 < n.op.groups == graph.shapes[n.inputs[0]][0] for n in convs),
            "shared ops": len(set(weighted)) < len(weighted), "dead ends": any(node.name not in alive for node in graph),
            "constant padding": any(isinstance(n.op, eq.Pad) and n.op.value for n in graph)}


def ancestors(graph, name):
    return {name} if name in graph.inputs else {name}.union(*(ancestors(graph, i) for i in graph[name].inputs))


@given(networks(max_layers=6))
def test_what_a_network_shows_is_told_rightly(graph):
    shown = shows(graph)
    assert {name: name in shown for name in independent(graph)} == independent(graph)
    assert {type(node.op) for node in graph} == {name for name in shown if not isinstance(name, str)}


#: Of the kinds whose name is not that of an op, what makes them what they are.
SIGNS = {
    "fan_out": lambda g: max(map(len, g.readers.values())) == 3, "residual": lambda g: "relu1" in g["add"].inputs,
    "groups": lambda g: "groups" in shows(g) and "depthwise" not in shows(g), "depthwise": lambda g: "depthwise" in shows(g),
    "transposed_groups": lambda g: g["up"].op.groups == 2, "shared_op": lambda g: "shared ops" in shows(g),
    "shared_op_on_two_values": lambda g: "shared ops" in shows(g), "dead_channel": lambda g: not g["conv1"].op.weight[1].any(),
    "nearly_dead_channel": lambda g: 0 < np.abs(g["conv1"].op.weight[1]).max() < 0.01, "relu6": lambda g: g["relu6"].op.high == 6,
    "unread_channel": lambda g: not g["conv2"].op.weight[:, 1].any(), "constant_padding": lambda g: "constant padding" in shows(g),
    "several_inputs": lambda g: "several inputs" in shows(g), "inner_output": lambda g: g.readers["relu"] and "relu" in g.outputs,
    "input_output": lambda g: "x" in g.outputs, "dead_end": lambda g: "dead ends" in shows(g),
    "batchnorm_zero_variance": lambda g: 0 in g["norm"].op.var, "batchnorm_with_bias": lambda g: g["conv"].op.bias is not None,
    "batchnorm_beside_another_reader": lambda g: len(g.readers["conv"]) == 2, "strided": lambda g: "asymmetric padding" in shows(g),
    "batchnorm": lambda g: g["norm"].op.var.max() <= 0.1,
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_small_networks_of_what_their_names_say(kind, dtype):
    for seed in range(3):
        graph = KINDS[kind](np.random.default_rng(seed), np.dtype(dtype))
        assert SIGNS.get(kind, bool)(graph)
        assert graph.dtype == dtype and len(graph) <= 8
        x = {name: np.random.default_rng(seed).uniform(-2, 2, (2, *shape)).astype(dtype) for name, shape in graph.inputs.items()}
        moved = [value for name, value in eq.values(graph, x).items() if name not in graph.inputs]
        assert all(np.isfinite(value).all() for value in moved) and max(np.ptp(value) for value in moved) > 0


def test_kinds_reach_both_limits():
    graph = KINDS["relu6"](np.random.default_rng(0), np.dtype(np.float32))
    made = eq.values(graph, np.random.default_rng(0).uniform(-2, 2, (2, 2, 4, 4)))["relu6"]
    assert {0.0, 6.0} <= set(made.ravel().tolist())


def test_kinds_show_every_structure_that_networks_may_be_drawn_without():
    shown = set().union(*(shows(KINDS[kind](np.random.default_rng(0), np.dtype(np.float32))) for kind in KINDS))
    assert {*STRUCTURES} - shown <= {"output padding beyond the stride"}
    assert all(shown & set(of) for of in KINDS_OF_OPS.values() if of != KINDS_OF_OPS["constants"])


# ------------------------------------------------------------------------------------------------ ONNX models


def test_models_compute_what_graphs_compute_and_show_every_op():
    """In onnxruntime, within the bound on roundings."""
    covered, framework = set(), Onnx()

    @settings(max_examples=200)
    @given(networks(dtypes=framework.dtypes, without=framework.without).flatmap(lambda g: st.tuples(st.just(g), batches(g))))
    def same(drawn):
        graph, x = drawn
        feeds = framework.feeds(graph, x)
        made, expected, bounds = run(to_onnx(graph), feeds), Numpy().run(graph, feeds), engine_bounds(graph, feeds)
        assert list(made) == list(expected)
        for name, value in made.items():
            assert value.dtype == expected[name].dtype
            assert (np.abs(value - expected[name].astype(float)) <= bounds[name]).all()
        covered.update(type(node.op) for node in graph)

    for op in eq.ops.ALL:  # rare ones need not be drawn in every run
        for case in (case for case in CASES if type(case.op) is op and case.dtype == np.float32):
            inputs = {f"x{i}": shape for i, shape in enumerate(case.shapes)}
            graph = eq.Graph(inputs, [eq.Node("y", case.op, list(inputs))], ["y"])
            if not set(framework.without) & shows(graph):
                same.hypothesis.inner_test((graph, {f"x{i}": x for i, x in enumerate(case.inputs())}))
    drawn = set(covered)
    same()
    assert covered == set(eq.ops.ALL) == drawn


@given(models(without=["attention"], max_layers=3))
@settings(max_examples=20)
def test_models_are_drawn_with_data_that_they_run_on(drawn):
    model, feeds = drawn
    onnx.checker.check_model(model, full_check=True)
    assert all(len(value) == len(next(iter(feeds.values()))) for value in run(model, feeds).values())


def test_engine_bounds_differ_in_the_tails_of_curves_alone():
    x = np.array([[-5.0, -1.0, 2.0]])
    for kind, size in ((eq.ReLU, 0), (eq.HardSwish, 0), (eq.Sigmoid, 1), (eq.GELU, np.abs(x))):
        graph = eq.Graph.chain((3,), act=kind())
        more = engine_bounds(graph, x)["act"] - laws.rounding_bounds(graph, x)["act"]
        assert more == pytest.approx(4 * size * np.finfo(float).eps / 2 + np.zeros_like(x), rel=1e-6, abs=1e-30)


# ------------------------------------------------------------------------------------------------ one test each


def test_checks_are_named_by_law_and_kind():
    listed = checks("onnx")
    assert len(listed) == len(LAWS) * (len(KINDS) + 1) == len(set(map(str, listed)))
    assert "keeps_the_function-residual" in map(str, listed)
    one = next(c for c in checks("onnx") if str(c) == "keeps_the_function-relu_and_clip")
    with pytest.raises(Violation, match="a network of the kind 'relu_and_clip'"):
        one(relu_before_clip_dropped)
    assert one(unchanged).networks == 2


def test_checks_are_of_kinds_that_fit():
    kinds = {one.kind for one in checks("numpy", without=["groups"], axes=(2,))}
    assert not {"groups", "depthwise", "transposed_groups", "one_axis", "dense_layers"} & kinds
    assert {"residual", "transposed", "random"} <= kinds


def test_one_decorator_makes_a_test_of_each_check(tmp_path):
    (tmp_path / "test_mine.py").write_text(textwrap.dedent('''
        import dataclasses
        import eqfact as eq
        from eqfact.testing import parametrize_with_checks

        @parametrize_with_checks("numpy", kinds=["plain_chain", "residual", "groups", "random"], examples=20,
                                 laws=["gives_a_network", "keeps_the_function"], without=["dead ends"])
        def test_my_pass(check):
            check(my_pass)

        def my_pass(graph):
            if any(isinstance(node.op, eq.Conv) and node.op.groups > 1 for node in graph):
                raise NotImplementedError("groups")
            return graph.with_ops({node.name: eq.Sub() for node in graph if isinstance(node.op, eq.Add) and len(node.inputs) == 2})
    '''))
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-rs", "-v"]
    ran = subprocess.run([sys.executable, "-m", "pytest", *options, "test_mine.py"], cwd=tmp_path, capture_output=True, text=True)
    outcomes = dict(re.findall(r"test_my_pass\[([\w-]+)\] (PASSED|FAILED|SKIPPED)", ran.stdout))
    assert outcomes == {"gives_a_network-plain_chain": "PASSED", "keeps_the_function-plain_chain": "PASSED",
                        "gives_a_network-residual": "PASSED", "keeps_the_function-residual": "FAILED",
                        "gives_a_network-groups": "SKIPPED", "keeps_the_function-groups": "SKIPPED",
                        "gives_a_network-random": "PASSED", "keeps_the_function-random": "FAILED"}
    assert "my_pass declined all 2 networks, so nothing is known of it: NotImplementedError: groups (2 times)" in ran.stdout


# ------------------------------------------------------------------------------------------------ Hypothesis' own way


@pytest.mark.parametrize("order", ["hypothesis, eqfact", "eqfact, hypothesis"])
def test_hypothesis_knows_networks_by_their_type(order):
    """By the entry point, whichever comes first; called here as Hypothesis calls it, installed or not."""
    first, second = order.split(", ")
    hook = "import hypothesis, _eqfact_hypothesis; _eqfact_hypothesis.hook()"
    code = textwrap.dedent(f"""
        import sys
        {hook if first == "hypothesis" else "import eqfact"}
        assert ("eqfact" in sys.modules) == ({first!r} == "eqfact")
        {hook if second == "hypothesis" else "import eqfact"}
        assert "eqfact.testing" not in sys.modules
        from hypothesis import find, strategies as st
        graph = find(st.from_type(eqfact.Graph), lambda graph: any(type(node.op) is eqfact.Add for node in graph))
        assert type(graph) is eqfact.Graph
        assert type(eqfact.graph.__spec__.loader) is type(eqfact.graph.__loader__) is type(eqfact.ops.__spec__.loader)
        assert not any(type(finder).__module__ == "_eqfact_hypothesis" for finder in sys.meta_path)
    """)
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_the_entry_point_is_the_hook():
    installed = [point for point in entry_points(group="hypothesis") if point.name == "eqfact"]
    assert all(point.load() is _eqfact_hypothesis.hook for point in installed)
    assert f"eqfact = {_eqfact_hypothesis.__name__}:{_eqfact_hypothesis.hook.__name__}" in (ROOT / "setup.cfg").read_text()
