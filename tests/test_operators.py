"""docs/operators.md sorts every operator of ONNX, and what it says of factors is what the equations leave free."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import eqfact as eq
from eqfact.onnx.folding import RANDOM
from eqfact.onnx.nodes import READERS
from eqfact.testing import laws

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("benchmarks_operators", ROOT / "benchmarks" / "operators.py")
operators = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = operators
SPEC.loader.exec_module(operators)
KEPT = [name for names in operators.KEPT.values() for name in names.split()]


def test_no_operator_is_forgotten_and_none_is_sorted_twice():
    """A newer onnx may have operators that stand in no list yet: sort them."""
    read = {example.op_type for example in operators.EXAMPLES}
    every = [*read, *operators.SHAPES, *KEPT]
    assert sorted(every) == operators.operators()


def test_what_has_a_reader_has_an_example():
    assert {example.op_type for example in operators.EXAMPLES} | set(operators.SHAPES) == set(READERS)


def test_what_is_random_is_called_so():
    assert set(operators.KEPT["random"].split()) == set(RANDOM)


def test_the_page_is_what_the_code_makes():
    assert (ROOT / "docs" / "operators.md").read_text() == operators.page()


def framed(graph):
    """The graph between batch normalizations, which absorb any factor."""
    rng = np.random.default_rng(4)

    def frame(channels):
        gamma, var = rng.uniform(0.5, 2, (2, channels))
        beta, mean = rng.uniform(-0.5, 0.5, (2, channels))
        return eq.BatchNorm(gamma, beta, mean, var)
    nodes = [eq.Node(f"{name}.in", frame(shape[0]), [name]) for name, shape in graph.inputs.items()]
    nodes += [replace(node, inputs=tuple(f"{i}.in" if i in graph.inputs else i for i in node.inputs)) for node in graph.nodes]
    nodes += [eq.Node(f"{name}.out", frame(graph.shapes[name][0]), [name]) for name in graph.outputs]
    return eq.Graph(dict(graph.inputs), nodes, [f"{name}.out" for name in graph.outputs])


@pytest.mark.parametrize("example", operators.EXAMPLES, ids=lambda e: " ".join(filter(None, [e.op_type, e.says])))
def test_the_labels_of_an_example_free_what_the_equations_leave_free(example):
    graph = framed(example.graph())
    rng = np.random.default_rng(5)
    x = {name: 3 * rng.normal(size=(3, *shape)) for name, shape in graph.inputs.items()}
    laws.degrees_of_freedom_are_maximal(graph, x)
    laws.rescaling_multiplies_every_value_by_its_factor(graph, some(graph), x)


def some(graph):
    exponents = np.random.default_rng(6).integers(-3, 4, eq.degrees_of_freedom(graph) + 1)
    exponents[0] = 0
    return eq.Factorization(eq.channels(graph), np.exp2(exponents.astype(float)))
