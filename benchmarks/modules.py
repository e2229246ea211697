"""Does a network as a PyTorch module compute what the graph computes, and does ``eqfact.testing.check`` find what breaks modules?

Not among the tests, which run without PyTorch. Four parts, each a law; exit status 0 if all hold:

* ``forward`` of the module is eqfact's, within the bound on roundings, for networks drawn at random and cases of every op;
* ``torch.fx.symbolic_trace`` and ``copy.deepcopy`` of it compute the same bits, and one op is one submodule;
* passes that are right pass; each planted mistake is caught by the law that names it, and so is PyTorch's own fusion of convolutions and
  BatchNorms, which fuses a convolution that is called twice (torch 2.13);
* the page docs/testing.md prints what stands there, where it needs PyTorch.

    python -m benchmarks modules --examples 2000
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import fx, nn

import eqfact as eq
from eqfact.testing import LAWS, Violation, check, to_torch
from eqfact.testing.frameworks import Numpy, Torch, engine_bounds
from eqfact.testing.strategies import batches, modules, networks

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from cases import CASES  # the table of ops that the tests have


def drawn(examples: int, number: int) -> Iterator[tuple[eq.Graph, Any]]:
    """Networks and data: each case of the tests' table, and random ones."""
    for case in CASES:
        inputs = {f"x{i}": shape for i, shape in enumerate(case.shapes)}
        if case.dtype != np.float16:
            yield eq.Graph(inputs, (eq.Node("y", case.op, tuple(inputs)),), ("y",)), {f"x{i}": x for i, x in enumerate(case.inputs())}
    found: list[tuple[eq.Graph, Any]] = []

    @seed(number)
    @settings(max_examples=examples, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(networks().flatmap(lambda graph: st.tuples(st.just(graph), batches(graph))))
    def collect(one: tuple[eq.Graph, Any]) -> None:
        found.append(one)

    collect()
    yield from found


def of_modules(examples: int, number: int) -> list[str]:
    """The first two laws; what is wrong."""
    wrong, covered, count, worst, framework = [], Counter[str](), 0, 0.0, Torch()
    for graph, x in drawn(examples, number):
        feeds = framework.feeds(graph, x)
        module = to_torch(graph, next(iter(feeds.values())).dtype.name)
        made, expected, bounds = framework.run(module, feeds), Numpy().run(graph, feeds), engine_bounds(graph, feeds)
        for name, value in zip(graph.outputs, made.values(), strict=True):
            error = np.abs(value.astype(np.float64) - expected[name])
            with np.errstate(divide="ignore", invalid="ignore"):
                worst = max(worst, float(np.where(error > 0, error / bounds[name], 0).max()))
            if value.dtype != expected[name].dtype or not (error <= bounds[name]).all():
                wrong.append(f"output '{name}' of {[type(node.op).__name__ for node in graph]}: off by {error.max():.3g}, "
                             f"where rounding explains {bounds[name].max():.3g}")
        for what, other in (("traced", fx.symbolic_trace(module)), ("copied", copy.deepcopy(module))):
            again = framework.run(other, feeds)
            if any(a.tobytes() != b.tobytes() for a, b in zip(made.values(), again.values(), strict=True)):
                wrong.append(f"{what}, {[type(node.op).__name__ for node in graph]} computes something else")
        layers = {id(node.op) for node in graph if isinstance(node.op, (eq.Conv, eq.ConvTranspose, eq.Dense))}
        if len(layers) != sum(isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) for m in module.modules()):
            wrong.append(f"{[type(node.op).__name__ for node in graph]} has not as many submodules as ops")
        covered.update(type(node.op).__name__ for node in graph)
        count += 1
    @seed(number)
    @settings(max_examples=50, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(modules(without=["attention", "groups"], axes=(2,)))
    def runs(one: tuple[nn.Module, tuple[torch.Tensor, ...]]) -> None:
        module, tensors = one
        module(*tensors)
        assert all(getattr(layer, "groups", 1) == 1 for layer in module.modules())

    runs()
    missing = {op.__name__ for op in eq.ops.ALL} - set(covered)
    wrong += [f"no network has {', '.join(sorted(missing))}"] if missing else []
    print(f"{count} modules compute what their graphs compute, traced and copied too: largest error {worst:.2f} of its bound; "
          f"{len(covered)} of {len(eq.ops.ALL)} ops, the rarest " + ", ".join(f"{name} ({n})" for name, n in covered.most_common()[-3:]))
    return wrong


# ---------------------------------------------------------------------------------------------------------------
# Passes


def unchanged(model: nn.Module) -> nn.Module:
    return model


def pytorch_fused(model: nn.Module) -> nn.Module:
    """PyTorch's own, of convolutions that nobody else reads."""
    from torch.fx.experimental.optimization import fuse

    return fuse(model)


def edited(edit: Callable[[fx.GraphModule], None]) -> Callable[[nn.Module], nn.Module]:
    """A pass: an edit of what a copy is traced to."""
    def pass_(model: nn.Module) -> nn.Module:
        traced = fx.symbolic_trace(copy.deepcopy(model))
        edit(traced)
        traced.recompile()
        return traced.eval()
    pass_.__name__ = edit.__name__
    return pass_


def layers(traced: fx.GraphModule, *kinds: type[nn.Module]) -> list[nn.Module]:
    return [module for module in traced.modules() if isinstance(module, kinds)]


def fused(traced: fx.GraphModule, *, bias: bool = True, readers: bool = True, shared: bool = True, eps: bool = True) -> None:
    """BatchNorms after convolutions, fused; each option left out is a mistake that people make."""
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        before = node.args[0] if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)) else None
        conv = modules.get(str(before.target)) if before is not None and before.op == "call_module" else None
        if norm is None or not isinstance(conv, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or (readers and len(before.users) > 1) or (
                shared and sum(other.target == before.target for other in traced.graph.nodes if other.op == "call_module") > 1):
            continue
        slope = norm.weight / torch.sqrt(norm.running_var + (norm.eps if eps else 0.0))
        old = conv.bias if conv.bias is not None and bias else torch.zeros_like(norm.bias)
        conv.weight = nn.Parameter(conv.weight * slope.reshape(-1, *(1,) * (conv.weight.ndim - 1)))
        conv.bias = nn.Parameter((old - norm.running_mean) * slope + norm.bias)
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)


def traced_only(traced: fx.GraphModule) -> None:
    pass


def fused_rightly(traced: fx.GraphModule) -> None:
    fused(traced)


def bias_forgotten(traced: fx.GraphModule) -> None:
    fused(traced, bias=False)


def other_readers_forgotten(traced: fx.GraphModule) -> None:
    fused(traced, readers=False)


def other_calls_forgotten(traced: fx.GraphModule) -> None:
    fused(traced, shared=False)


def eps_forgotten(traced: fx.GraphModule) -> None:
    fused(traced, eps=False)


def relu6_made_relu(traced: fx.GraphModule) -> None:
    for name, module in list(traced.named_modules()):
        if isinstance(module, nn.ReLU6):
            setattr(traced, name, nn.ReLU())


def groups_forgotten(traced: fx.GraphModule) -> None:
    """Weights of a transposed convolution are taken for those of a convolution: output channels first."""
    for conv in layers(traced, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        scale = torch.arange(1.0, conv.out_channels + 1).to(conv.weight)
        of_group = scale[:conv.weight.shape[1]]  # the first group's for all
        conv.weight = nn.Parameter(conv.weight * of_group.reshape(1, -1, *(1,) * (conv.weight.ndim - 2)))
        if conv.bias is not None:
            conv.bias = nn.Parameter(conv.bias * scale)


def last_output_dropped(traced: fx.GraphModule) -> None:
    for node in traced.graph.nodes:
        if node.op == "output" and isinstance(node.args[0], tuple):
            node.args = (node.args[0][:-1],)


def in_half(traced: fx.GraphModule) -> None:
    for conv in layers(traced, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear):
        conv.weight = nn.Parameter(conv.weight.half().to(conv.weight.dtype))


def jittered(traced: fx.GraphModule) -> None:
    for conv in layers(traced, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear):
        conv.weight = nn.Parameter(conv.weight * (1 + torch.randint(3, ()) * torch.finfo(conv.weight.dtype).eps))


def divided_by_range(traced: fx.GraphModule) -> None:
    for conv in layers(traced, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear):
        size = conv.weight.abs().flatten(1).amax(1).reshape(-1, *(1,) * (conv.weight.ndim - 1))
        conv.weight = nn.Parameter(conv.weight / size * size)


def back_to_training(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).train()


def written_to(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    return model


def not_for_groups(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
            raise KeyError("groups")
    return model


RIGHT: list[Callable[[nn.Module], nn.Module]] = [unchanged, edited(fused_rightly), edited(traced_only)]
PLANTED: list[tuple[Callable[[nn.Module], nn.Module], str]] = [
    *((edited(edit), "keeps_the_function") for edit in (bias_forgotten, other_readers_forgotten, other_calls_forgotten, eps_forgotten,
                                                        relu6_made_relu, groups_forgotten, in_half)),
    (pytorch_fused, "keeps_the_function"), (edited(last_output_dropped), "keeps_inputs_and_outputs"),
    (back_to_training, "keeps_inputs_and_outputs"), (edited(divided_by_range), "makes_no_nan_or_infinity"),
    (edited(jittered), "gives_the_same_twice"), (written_to, "leaves_its_input_alone"), (not_for_groups, "gives_a_network")]


def of_passes(examples: int) -> list[str]:
    """The last two laws; what is wrong."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for pass_ in RIGHT:
            try:
                print(check(pass_, "torch", examples=examples, directory=folder))
            except Violation as found:
                wrong.append(f"the right pass {pass_.__name__}: {found}")
        for pass_, law in PLANTED:
            start = time.perf_counter()
            try:
                check(pass_, "torch", laws=[law], examples=examples, directory=folder)
                wrong.append(f"{pass_.__name__} is not caught")
            except Violation as found:
                wrong += [] if found.law == law else [f"{pass_.__name__} is caught by {found.law}, not by {law}: {found}"]
                print(f"{pass_.__name__:<24} caught by {found.law} in {time.perf_counter() - start:4.1f} s: {len(found.graph)} nodes left, "
                      f"{' '.join(type(node.op).__name__ for node in found.graph)}")
    return wrong + [f"no planted pass for {law}" for law in LAWS if law not in {of for _, of in PLANTED}]


def of_page() -> list[str]:
    """The blocks of the page that need PyTorch, run as tests/test_documents.py runs the others; what is wrong."""
    text = (Path(__file__).parents[1] / "docs" / "testing.md").read_text()
    blocks, wrong = re.findall(r"```python torch\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL), []
    for code, expected in blocks:
        printed = io.StringIO()
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(printed):
            exec(code, {})
        wrong += [] if printed.getvalue() == expected else [f"docs/testing.md prints now:\n{printed.getvalue()}"]
    print(f"{len(blocks)} blocks of docs/testing.md print what stands below them")
    return wrong + ([] if blocks else ["docs/testing.md has no blocks for PyTorch"])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks modules", description="Networks as PyTorch modules, and passes over them.")
    parser.add_argument("--examples", type=int, default=1000, help="networks to be drawn")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    wrong = of_modules(arguments.examples, arguments.seed) + of_passes(min(arguments.examples, 200)) + of_page()
    print("\n".join(wrong) if wrong else "all laws hold")
    return int(bool(wrong))
