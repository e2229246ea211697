"""How does ``hypothesis.strategies.from_type(eqfact.Graph)`` find its networks? By this hook, which Hypothesis calls when it is imported.

It stands beside the package because an entry point inside of it would import eqfact, numpy and scipy with every import of Hypothesis. So it
only waits: the strategy is registered when eqfact is imported, at once if it is already, and made when it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

#: The module that defines Graph.
GRAPH = "eqfact.graph"


def hook() -> None:
    """The entry point: register the strategy for :class:`eqfact.Graph`, now or as soon as there is one."""
    if GRAPH in sys.modules:
        register(sys.modules[GRAPH])
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def register(graph: ModuleType) -> None:
    """Tell Hypothesis what to draw for a Graph; eqfact.testing.strategies is imported when somebody draws one."""
    from hypothesis import strategies as st

    def networks(_: type) -> Any:
        return importlib.import_module("eqfact.testing.strategies").networks()

    st.register_type_strategy(graph.Graph, networks)


class _Waiting(MetaPathFinder):
    """Waits until one module is imported, and leaves the finding to others."""

    asking = False

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != GRAPH or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self)
        return spec


class _Then(Loader):
    """A loader that registers the strategy after it; then nobody waits any more."""

    def __init__(self, loader: Loader, waiting: _Waiting) -> None:
        self.loader, self.waiting = loader, waiting

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.waiting in sys.meta_path:
            sys.meta_path.remove(self.waiting)
        register(module)
