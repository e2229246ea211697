"""Every example in a docstring is executed, with the public names of eqfact and numpy at hand."""

import doctest
import importlib
import inspect
import pkgutil

import numpy as np
import pytest

import eqfact

MODULES = sorted(m.name for m in pkgutil.walk_packages(eqfact.__path__, "eqfact.") if not m.name.endswith("__main__"))


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {key: getattr(eqfact, key) for key in eqfact.__all__}
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"np": np, "eq": eqfact, **names, **vars(module)})
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    count = sum(len(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name)))
    assert count > 50


@pytest.mark.parametrize("name", ["eqfact", "eqfact.onnx", "eqfact.plotting", "eqfact.testing"])
def test_every_public_function_and_class_has_an_example(name):
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [key for key, value in vars(module).items() if getattr(value, "__module__", "") == name])
    described = {key: value for key in public if not key.startswith("_") and getattr(value := getattr(module, key), "__doc__", None)
                 and getattr(value, "__module__", "").startswith("eqfact") and callable(value)}
    without = [key for key, value in described.items() if ">>>" not in value.__doc__ and "::\n" not in value.__doc__
               and not (inspect.isclass(value) and issubclass(value, Exception))]
    assert len(described) > 4 and without == []
