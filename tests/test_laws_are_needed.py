"""Is every comparison of every law needed? One planted mistake a comparison, which the law catches and the law without it does not.

The laws are what ports test themselves with: one that has lost a comparison says yes to everything, and no other test would notice.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import types

import numpy as np
import pytest
from nets import BY_NAME

import eqfact as eq
from eqfact import calibration, factorization
from eqfact.testing import laws

X = np.array([[-1.0, 2.0], [0.5, -3.0], [0.25, 1.0]])
NET = BY_NAME["chain"].graph
DATA = BY_NAME["chain"].data()


def factors(*exponents):
    """Powers of two for the three free channels of the chain."""
    return eq.Factorization(eq.channels(NET), np.exp2([0, *exponents]))


A, B, C = factors(1, -2, 3), factors(2, 1, -1), factors(-3, 1, 1)
#: One factor that is no power of two.
UNEVEN = eq.Factorization(eq.channels(NET), np.array([1.0, 3.0, 1.0, 1.0]))


def again(graph):
    """Traced anew, with what is planted."""
    return eq.Graph(graph.inputs, graph.nodes, graph.outputs)


def wrong_where(condition):
    """Products of factorizations that are wrong for some factors alone."""
    right = eq.Factorization.__matmul__
    return lambda self, other: doubled(right(self, other)) if condition(self, other) else right(self, other)


def doubled(f):
    return eq.Factorization(f.channels, f.by_label * np.where(np.arange(len(f.by_label)), 2.0, 1.0))


class Dull(eq.ReLU):
    """An op whose answers can be spoiled."""


# ------------------------------------------------------------------------------------------------ the mistakes

MISTAKES = []


def caught_by(law, number=0):
    """A mistake for comparison ``number`` of a law: it plants what it likes and calls the law of the module that it is given."""
    def add(mistake):
        MISTAKES.append((law, number, mistake))
        return mistake
    return add


@caught_by("rescaling_commutes_with_forward")
def weights_stay(laws, plant):
    plant(eq.Dense, "rescale", lambda self, f_out, *f_in: self)
    laws.rescaling_commutes_with_forward(eq.Dense(np.ones((1, 2))), np.array([2.0]), [np.ones(2)], [X])


@caught_by("magnitude_bounds_forward", 0)
def magnitude_of_one_entry(laws, plant):
    plant(Dull, "magnitude", lambda self, m: np.full((1, 1), 1e9))
    laws.magnitude_bounds_forward(Dull(), [X])


@caught_by("magnitude_bounds_forward", 1)
def magnitude_too_small(laws, plant):
    plant(Dull, "magnitude", lambda self, m: m / 2)
    laws.magnitude_bounds_forward(Dull(), [X])


@caught_by("errors_stay_within_what_passes", 0)
def errors_of_one_entry(laws, plant):
    plant(Dull, "passes", lambda self, errors, inputs, u: np.full((1, 1), 1e9))
    laws.errors_stay_within_what_passes(Dull(), [X], [np.ones_like(X)], 0.1)


@caught_by("errors_stay_within_what_passes", 1)
def errors_halved(laws, plant):
    plant(Dull, "passes", lambda self, errors, inputs, u: errors[0] / 2)
    laws.errors_stay_within_what_passes(Dull(), [X], [np.ones_like(X)], 0.1)


@caught_by("roundings_stay_within_the_bound")
def no_roundings(laws, plant):
    plant(eq.Sigmoid, "errors", lambda self, errors, inputs, output, u: 0 * output)
    laws.roundings_stay_within_the_bound(eq.Sigmoid(), [X])


@caught_by("rescaling_keeps_the_function")
def readers_forgotten(laws, plant):
    plant(eq.Dense, "rescale", lambda self, f_out, f_in: dataclasses.replace(self, weight=self.weight * f_out[:, None]))
    laws.rescaling_keeps_the_function(NET, A, DATA)


@caught_by("rescaling_multiplies_every_value_by_its_factor")
def nothing_applied(laws, plant):
    plant(eq.Factorization, "apply", lambda self, target: target)
    laws.rescaling_multiplies_every_value_by_its_factor(NET, A, DATA)


@caught_by("statistics_follow_the_factors", 0)
def statistics_of_uneven_factors(laws, plant):
    plant(laws, "same_statistics", lambda *args: None)
    laws.statistics_follow_the_factors(NET, UNEVEN, DATA)


@caught_by("statistics_follow_the_factors", 1)
def squares_forgotten(laws, plant):
    right = calibration.ValueStatistics.rescaled
    plant(calibration.ValueStatistics, "rescaled", lambda self, f: dataclasses.replace(right(self, f), sum_square=self.sum_square))
    laws.statistics_follow_the_factors(NET, A, DATA)


@caught_by("shards_add_up", 0)
def the_last_batch_dropped(laws, plant):
    right = calibration.batches_of
    plant(calibration, "batches_of", lambda data: right(data)[:-1] if len(right(data)) > 1 else right(data))
    laws.shards_add_up(NET, [X, -X, 2 * X])


@caught_by("shards_add_up", 1)
def sums_of_statistics_forget_one(laws, plant):
    plant(eq.Statistics, "__add__", lambda self, other: self)
    laws.shards_add_up(NET, [X, -X, 2 * X])


@caught_by("identity_changes_nothing", 0)
def ops_copied(laws, plant):
    plant(eq.Factorization, "apply", lambda self, target: target.with_ops({n.name: dataclasses.replace(n.op) for n in target}))
    laws.identity_changes_nothing(NET)


@caught_by("identity_changes_nothing", 1)
def inverse_of_one(laws, plant):
    plant(eq.Factorization, "inverse", doubled)
    laws.identity_changes_nothing(NET)


@caught_by("identity_changes_nothing", 2)
def one_times_one(laws, plant):
    plant(eq.Factorization, "__matmul__", lambda self, other: doubled(self))
    laws.identity_changes_nothing(NET)


@caught_by("identity_is_neutral", 0)
def the_right_one(laws, plant):
    plant(eq.Factorization, "__matmul__", lambda self, other: other)
    laws.identity_is_neutral(NET, A)


@caught_by("identity_is_neutral", 1)
def the_left_one(laws, plant):
    plant(eq.Factorization, "__matmul__", lambda self, other: self)
    laws.identity_is_neutral(NET, A)


@caught_by("inverse_undoes", 0)
def inverse_of_uneven_factors(laws, plant):
    for comparison in ("same_factors", "same_network"):
        plant(laws, comparison, lambda *args: None)
    laws.inverse_undoes(NET, UNEVEN)


@caught_by("inverse_undoes", 1)
def wrong_from_the_right(laws, plant):
    plant(eq.Factorization, "__matmul__", wrong_where(lambda a, b: a is A))
    laws.inverse_undoes(NET, A)


@caught_by("inverse_undoes", 2)
def wrong_from_the_left(laws, plant):
    plant(eq.Factorization, "__matmul__", wrong_where(lambda a, b: b is A))
    laws.inverse_undoes(NET, A)


@caught_by("inverse_undoes", 3)
def applied_once(laws, plant):
    right = eq.Factorization.apply
    plant(eq.Factorization, "apply", lambda self, target: right(self, target) if target is NET else target)
    laws.inverse_undoes(NET, A)


@caught_by("composition_is_associative_and_commutes", 0)
def products_of_uneven_factors(laws, plant):
    plant(laws, "same_factors", lambda *args: None)
    laws.composition_is_associative_and_commutes(UNEVEN, A, B)


@caught_by("composition_is_associative_and_commutes", 1)
def not_associative(laws, plant):
    plant(eq.Factorization, "__matmul__", wrong_where(lambda a, b: b is C and a is not B))
    laws.composition_is_associative_and_commutes(A, B, C)


@caught_by("composition_is_associative_and_commutes", 2)
def not_commutative(laws, plant):
    plant(eq.Factorization, "__matmul__", wrong_where(lambda a, b: a is B and b is A))
    laws.composition_is_associative_and_commutes(A, B, C)


@caught_by("composition_applies_in_turn", 0)
def uneven_factors_in_turn(laws, plant):
    plant(laws, "same_network", lambda *args: None)
    laws.composition_applies_in_turn(NET, UNEVEN, A)


@caught_by("composition_applies_in_turn", 1)
def only_the_left_one_applies(laws, plant):
    plant(eq.Factorization, "__matmul__", lambda self, other: self)
    laws.composition_applies_in_turn(NET, A, B)


def lenient(kind):
    """``factorization._refuse``, blind for refusals whose rule is a text or a function."""
    right = factorization._refuse
    return lambda wrong, value, f, rule, resolved=None: None if isinstance(rule, kind) else right(wrong, value, f, rule, resolved)


@caught_by("no_channel_moves_alone", 0)
def pins_are_not_refused(laws, plant):
    plant(factorization, "_refuse", lenient(str))
    laws.no_channel_moves_alone(NET)


@caught_by("no_channel_moves_alone", 1)
def ties_are_not_refused(laws, plant):
    plant(factorization, "_refuse", lenient(types.FunctionType))
    laws.no_channel_moves_alone(NET)


@caught_by("every_free_label_is_free")
def a_bias_stays(laws, plant):
    plant(eq.Dense, "rescale", lambda self, f_out, f_in: dataclasses.replace(self, weight=self.weight * (f_out[:, None] / f_in)))
    laws.every_free_label_is_free(NET, DATA)


def a_relu_that_pins(plant):
    right = eq.ReLU.trace
    plant(eq.ReLU, "trace", lambda self, trace, *inputs: trace.pin(inputs[0], "planted") or right(self, trace, *inputs))


@caught_by("every_pin_is_needed")
def a_relu_pins(laws, plant):
    a_relu_that_pins(plant)
    laws.every_pin_is_needed(again(NET), DATA)


@caught_by("degrees_of_freedom_are_maximal", 0)
def in_float32(laws, plant):
    net = eq.Graph.chain((2,), fc=eq.Dense(np.ones((1, 2), np.float32)))
    laws.degrees_of_freedom_are_maximal(net, X)


@caught_by("degrees_of_freedom_are_maximal", 1)
def a_relu_blocks(laws, plant):
    a_relu_that_pins(plant)
    laws.degrees_of_freedom_are_maximal(again(NET), DATA)


@caught_by("same", 0)
def another_dtype(laws, plant):
    plant(laws, "_bits", lambda x: x)
    laws.same("it", X, X.astype(np.float32).astype(np.float64).astype(np.float32))


@caught_by("same", 1)
def another_shape(laws, plant):
    laws.same("it", np.ones((1, 2)), np.ones((2, 2)))


@caught_by("same", 2)
def another_number(laws, plant):
    laws.same("it", X, X + 1e-9)


@caught_by("same_network", 0)
def other_outputs(laws, plant):
    laws.same_network(eq.Graph(NET.inputs, NET.nodes, ["act"]), NET)


@caught_by("same_network", 1)
def another_kind_of_op(laws, plant):
    laws.same_network(NET.with_ops({"act": eq.Identity()}), NET)


@caught_by("same_network", 2)
def other_weights(laws, plant):
    laws.same_network(NET.with_ops({"fc1": eq.Dense(2 * NET["fc1"].op.weight, NET["fc1"].op.bias)}), NET)


@caught_by("same_factors", 0)
def more_values(laws, plant):
    laws.same_factors({**A, "more": np.ones(2)}, A)


@caught_by("same_factors", 1)
def other_factors(laws, plant):
    laws.same_factors(A, B)


@caught_by("same_statistics", 0)
def statistics_of_more_values(laws, plant):
    stats = eq.calibrate(NET, X)
    laws.same_statistics(eq.Statistics({**stats, "more": stats["act"]}), stats)


@caught_by("same_statistics", 1)
def another_count(laws, plant):
    stats = eq.calibrate(NET, X)
    laws.same_statistics(eq.Statistics({n: dataclasses.replace(s, count=s.count + 1) for n, s in stats.items()}), stats)


@caught_by("same_statistics", 2)
def another_minimum(laws, plant):
    stats = eq.calibrate(NET, X)
    laws.same_statistics(eq.Statistics({n: dataclasses.replace(s, min=s.min - 1) for n, s in stats.items()}), stats)


@caught_by("same_statistics", 3)
def another_histogram(laws, plant):
    stats = eq.calibrate(NET, X)
    twice = {n: dataclasses.replace(s, histogram=s.histogram + s.histogram) for n, s in stats.items()}
    laws.same_statistics(eq.Statistics(twice), stats)


# ------------------------------------------------------------------------------------------------ the laws without one comparison


def is_comparison(statement):
    """An assertion, an AssertionError raised, or a call of another law or comparison."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call) and isinstance(statement.value.func, ast.Name):
        name = statement.value.func.id
        return name.startswith(("same", "_refused")) or name in LAWS
    return isinstance(statement, (ast.Assert, ast.Raise))


def comparisons(function):
    """The comparisons of a law, in order."""
    return [statement for statement in ast.walk(function) if is_comparison(statement)]


SOURCE = ast.parse(inspect.getsource(laws))
FUNCTIONS = {node.name: node for node in SOURCE.body if isinstance(node, ast.FunctionDef)}
#: Whoever returns nothing and is public can only fail: these are the laws, and the comparisons that they are made of.
LAWS = [name for name, node in FUNCTIONS.items() if not name.startswith("_") and isinstance(node.returns, ast.Constant)]


def without(law, number):
    """The module of the laws, where one comparison of one law is gone."""
    source = ast.parse(inspect.getsource(laws))
    function = next(node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == law)
    gone = sorted(comparisons(function), key=lambda s: s.lineno)[number]
    gone.__class__, gone._fields, gone._attributes = ast.Pass, ast.Pass._fields, ast.Pass._attributes
    module = types.ModuleType("laws_without")
    exec(compile(ast.fix_missing_locations(source), f"{law} without comparison {number}", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("case", MISTAKES, ids=lambda case: f"{case[0]} {case[2].__name__}")
def test_every_comparison_of_a_law_catches_a_mistake_that_the_others_miss(case, monkeypatch):
    law, number, mistake = case
    with monkeypatch.context() as planting, pytest.raises(AssertionError):
        mistake(laws, planting.setattr)
    with monkeypatch.context() as planting:
        spoiled = without(law, number)
        try:
            mistake(spoiled, planting.setattr)
        except (AssertionError, ValueError, IndexError) as error:
            pytest.fail(f"another comparison catches it, too: {error}")


def test_every_comparison_of_every_law_has_its_mistake():
    assert len(LAWS) > 15
    expected = {(law, number) for law in LAWS for number in range(len(comparisons(FUNCTIONS[law])))}
    assert {law for law, _ in expected} == set(LAWS), "a law that compares nothing"
    assert {(law, number) for law, number, _ in MISTAKES} == expected
