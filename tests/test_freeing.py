"""Slopes in gates and explicit scales: the same function bit for bit, more factors free, and what they are good for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nets import dense

import eqfact as eq
from eqfact.freeing import freed_by_slopes
from eqfact.quantization import stored_values
from eqfact.testing import laws
from eqfact.testing.strategies import batches, networks

drawn_with_data = networks().flatmap(lambda g: st.tuples(st.just(g), batches(g)))


@given(drawn_with_data)
def test_slopes_and_scales_change_no_bit_and_take_no_factor_away(drawn):
    graph, x = drawn
    before = eq.values(graph, x)
    for opened in (eq.slope_gates(graph), eq.add_scales(graph), eq.add_scales(eq.slope_gates(graph))):
        after = eq.values(opened, x)
        assert all(np.array_equal(after[name], value) for name, value in before.items())
        assert eq.degrees_of_freedom(opened) >= eq.degrees_of_freedom(graph)
        laws.every_free_label_is_free(opened, x)
    assert eq.degrees_of_freedom(eq.slope_gates(graph)) == eq.degrees_of_freedom(graph) + freed_by_slopes(graph)


def gated(act):
    return eq.Graph.chain((2,), fc1=dense(5, 2), act=act, fc2=dense(1, 5))


@pytest.mark.parametrize("act", [eq.SiLU(), eq.HardSwish(), eq.GELU(), eq.GELU(approximate=True)], ids=lambda op: type(op).__name__)
def test_a_gate_lets_factors_pass_with_a_slope_a_channel(act):
    graph, x = gated(act), np.random.default_rng(0).normal(size=(20, 2))
    assert eq.degrees_of_freedom(graph) == 0 and freed_by_slopes(graph) == 5
    assert "5 more factors would be free with a slope a channel in gates" in eq.equalize(graph).message
    opened = eq.slope_gates(graph)
    result = eq.equalize(opened, exact=True)
    assert result.graph["act"].op.slope == pytest.approx(1 / result.factorization["act"]) and len(set(result.factorization["act"])) > 1
    assert np.array_equal(eq.forward(result.graph, x), eq.forward(graph, x))
    assert "more factors" not in result.message
    assert eq.verify(graph, eq.equalize(opened).graph, x)


def test_a_gate_used_twice_stays_one_op():
    act = eq.SiLU()
    graph = eq.slope_gates(eq.Graph.chain((2,), a=dense(2, 2), one=act, b=dense(2, 2), two=act, c=dense(1, 2)))
    assert graph["one"].op is graph["two"].op


def post_norm(dtype=np.float64):
    """A residual stream that runs into a norm, as in BERT, with a channel far larger than all others."""
    rng = np.random.default_rng(3)

    def layer(out, channels, large=1.0):
        weight = np.array([large, *[1] * (out - 1)])[:, None, None] * rng.normal(size=(out, channels, 1))
        return eq.Conv(weight.astype(dtype), (rng.normal(size=out) / 5).astype(dtype))

    def norm():
        return eq.LayerNorm(np.exp(rng.normal(size=4) / 5).astype(dtype), (rng.normal(size=4) / 5).astype(dtype))
    return eq.Graph({"x": (4, 5)}, [
        eq.Node("stem", layer(4, 4), ["x"]), eq.Node("first", norm(), ["stem"]),
        eq.Node("wide", layer(8, 4), ["first"]), eq.Node("act", eq.ReLU(), ["wide"]), eq.Node("narrow", layer(4, 8, 40.0), ["act"]),
        eq.Node("add", eq.Add(), ["first", "narrow"]), eq.Node("norm", norm(), ["add"]), eq.Node("head", layer(2, 4), ["norm"])], ["head"])


def test_a_scale_is_put_where_a_normalisation_ties_what_it_reads():
    graph = post_norm()
    opened = eq.add_scales(graph)
    assert [node.name for node in opened.nodes if node.name.endswith(".scale")] == ["stem.scale", "add.scale"]
    assert eq.degrees_of_freedom(opened) == eq.degrees_of_freedom(graph) + 4 + 4  # beside the one of all behind each scale
    assert "add.scale" not in stored_values(opened) and "add" in stored_values(opened)
    x = np.random.default_rng(1).normal(size=(6, 4, 5))
    quality = []
    for g in (graph, opened):
        stats = eq.calibrate(g, x)
        result = eq.equalize(g, eq.Optimal(eq.gradient_sensitivities(g, x), stats), stats=stats)
        assert eq.verify(graph, result.graph, x)
        q = eq.quantize(result.graph, stats=result.factorization.apply(stats), activations=eq.UniformQuantizer(8, symmetric=False))
        quality.append(eq.sqnr(eq.forward(graph, x), eq.forward(q, x)))
    assert quality[1] > quality[0] + 3, quality


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scales_have_the_type_of_the_network(dtype):
    graph, x = post_norm(dtype), np.random.default_rng(1).normal(size=(6, 4, 5)).astype(dtype)
    opened = eq.add_scales(graph)
    assert opened.dtype == opened["add.scale"].op.gamma.dtype == dtype
    assert np.array_equal(eq.forward(opened, x), eq.forward(graph, x))


def test_channels_that_have_each_a_factor_of_their_own_need_no_scale():
    first, last = (eq.Conv(np.random.default_rng(2).normal(size=size)) for size in ((4, 2, 1), (1, 4, 1)))

    def opened(norm):
        graph = eq.Graph.chain((2, 6), fc=first, norm=norm, act=eq.ReLU(), out=last)
        return [node.name for node in eq.add_scales(graph).nodes if node.name.endswith(".scale")]
    assert opened(eq.InstanceNorm(np.ones(4))) == []
    assert opened(eq.GroupNorm(2, np.ones(4))) == opened(eq.LayerNorm(np.ones(4))) == ["fc.scale"]


def test_a_scale_may_be_asked_for_before_layers():
    graph = gated(eq.SiLU())
    opened = eq.add_scales(graph, ["act"])
    assert eq.degrees_of_freedom(opened) == 5
    assert {of: [node.name for node in opened.readers[of]] for of in ("act", "act.scale")} == {"act": ["act.scale"], "act.scale": ["fc2"]}
    assert not any(node.name.endswith(".scale") for node in eq.add_scales(graph).nodes)


@pytest.mark.parametrize(("name", "why"), [("nope", "which is not a value of the network"),
                                           ("head", "which neither a normalisation nor a layer reads")])
def test_a_scale_that_nobody_needs_is_refused(name, why):
    with pytest.raises(ValueError, match=f"a scale is asked for at '{name}', {why}"):
        eq.add_scales(post_norm(), [name])
