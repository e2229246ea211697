"""The largest weights that the loop tracks while factors settle: always those of all weights, however few it looks at."""

from __future__ import annotations

import numpy as np
import pytest

import eqfact as eq
from eqfact import blocks

SHAPES = [(1, 30, 40), (1, 40, 30), (3, 7, 20), (12, 1, 1), (4, 3, 1), (1, 1, 50), (5, 1, 9)]


def entries_of(rng, shape):
    """Magnitudes over some decades; rows and columns of zeros, rows of equal entries, subnormal numbers."""
    entries = np.abs(rng.standard_normal(shape)) * np.exp(rng.normal(size=(shape[0], shape[1], 1)))
    entries[rng.random(shape) < 0.2] = 0
    entries[0, -1] = rng.choice([0.0, 1.0, 1e-310])
    return entries


def walk(rng, columns, moves):
    """Factors that move fast at first, slowly later, now and then by a leap, some of them alone; and once not at all."""
    u = rng.normal(size=columns)
    for i in range(moves):
        yield np.exp(u)
        u = u + rng.normal(size=columns) * 2.0 ** -(i % 25) * (rng.random(columns) < rng.choice([1.0, 0.1, 0.0]))


def agrees_with_all_entries(largest, entries, factors):
    for by in factors:
        expected = (entries * by.reshape(len(entries), 1, -1)).max(axis=2).reshape(-1)
        np.testing.assert_array_equal(largest(by), expected)


def law(shape, seed, swapped=False):
    rng = np.random.default_rng(seed)
    entries, scratch = entries_of(rng, shape), np.empty(shape)
    if swapped:
        entries, scratch = entries.swapaxes(1, 2), scratch.swapaxes(1, 2)
    largest = blocks.Largest(entries, scratch)
    agrees_with_all_entries(largest, entries, walk(rng, entries.shape[0] * entries.shape[2], 100))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("swapped", [False, True])
def test_the_largest_of_the_candidates_is_the_largest_of_all_entries(shape, swapped):
    for seed in range(8):
        law(shape, seed, swapped)


def test_candidates_are_few_and_last():
    rng = np.random.default_rng(1)
    entries = np.abs(rng.standard_normal((1, 100, 200)))
    largest = blocks.Largest(entries, np.empty(entries.shape))
    looks, before, u = 0, None, rng.normal(size=200)
    for i in range(100):
        agrees_with_all_entries(largest, entries, [np.exp(u)])
        looks, before = looks + (largest.seen is not before), largest.seen
        u = u + rng.normal(size=200) * 0.7 ** i
    assert looks < 30
    assert largest.candidates is not None
    assert len(largest.candidates.values) < 0.1 * entries.size


def test_candidates_that_others_may_have_overtaken_are_not_trusted(monkeypatch):
    """Planted: candidates that stay candidates for ever."""
    right = blocks.Candidates.largest
    monkeypatch.setattr(blocks.Candidates, "largest", lambda candidates, by, rise: right(candidates, by, 0.0))
    with pytest.raises(AssertionError):
        law((1, 30, 40), 0)


def test_the_mates_of_a_layer_in_two_concats_are_those_of_both():
    """One layer at two nodes, each in a concat with another layer: the larger of the two mates counts, whichever comes first (PAPER 4)."""
    shared = eq.Dense(np.array([[1.0]]))
    for sizes in ((4.0, 9.0), (9.0, 4.0)):
        nodes = [eq.Node("one", shared, ["x"]), eq.Node("other", shared, ["y"])]
        for name, of, size in (("first", "one", sizes[0]), ("second", "other", sizes[1])):
            nodes += [eq.Node(f"mate of {name}", eq.Dense(np.array([[size]])), ["x"]), eq.Node(name, eq.Concat(), [of, f"mate of {name}"]),
                      eq.Node(f"out {name}", eq.Dense(np.ones((1, 2))), [name])]
        graph = eq.Graph({"x": (1,), "y": (1,)}, nodes, ["out first", "out second"])
        stats = eq.calibrate(graph, {"x": np.ones((1, 1)), "y": np.ones((1, 1))})
        ranges = blocks.activation_ranges(graph, blocks.layers(graph, eq.channels(graph)), stats)
        assert ranges[id(shared)].mates == 9.0
        assert [ranges[id(graph[f"mate of {name}"].op)].mates for name in ("first", "second")] == list(sizes)
