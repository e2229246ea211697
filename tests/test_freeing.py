"""Slopes in gates and explicit scales: the same function bit for bit, more factors free, and what they are good for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nets import conv, dense, layernorm

import eqfact as eq
from eqfact.freeing import freed_by_slopes
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


def post_norm():
    """A residual stream that runs into a norm and is read by a layer beside: nothing takes up a factor of its channels."""
    rng = np.random.default_rng(3)
    wide = eq.Conv(rng.normal(size=(6, 4, 1)) * np.array([20.0, 1, 1, 1])[None, :, None])
    return eq.Graph({"x": (4, 5)}, [
        eq.Node("stem", conv(4, 4, axes=1), ["x"]), eq.Node("branch", conv(4, 4, axes=1), ["stem"]),
        eq.Node("add", eq.Add(), ["stem", "branch"]), eq.Node("norm", layernorm(4), ["add"]),
        eq.Node("wide", wide, ["add"]), eq.Node("head", conv(2, 10, axes=1), ["cat"]), eq.Node("cat", eq.Concat(), ["norm", "wide"])], ["head"])


def test_a_scale_is_put_where_nothing_else_takes_up_a_factor():
    graph = post_norm()
    opened = eq.add_scales(graph)
    assert [node.name for node in opened.nodes if node.name.endswith(".scale")] == ["add.scale"]  # without ties behind it, the stem is free
    assert eq.degrees_of_freedom(opened) == eq.degrees_of_freedom(graph) + 4
    assert eq.degrees_of_freedom(eq.add_scales(graph, ["add"])) == eq.degrees_of_freedom(graph) + 4
    x = np.random.default_rng(1).normal(size=(6, 4, 5))
    assert eq.verify(graph, eq.equalize(opened).graph, x).equal is not None
    q = eq.UniformQuantizer(4)
    quality = [eq.sqnr(eq.forward(graph, x), eq.forward(eq.quantize(eq.equalize(g).graph, weights=q), x)) for g in (graph, opened)]
    assert quality[1] > quality[0] + 1


@pytest.mark.parametrize(("name", "why"), [("nope", "which is not a value of the network"), ("norm", "which no layer with weights on a grid reads")])
def test_a_scale_that_nobody_needs_is_refused(name, why):
    with pytest.raises(ValueError, match=f"a scale is asked for at '{name}', {why}"):
        eq.add_scales(post_norm(), [name])
