"""How is a network given to a pass, run, compared and kept, in each framework that passes are written for?

One class a framework, with the same questions; :mod:`eqfact.testing.checking` asks them. PyTorch and onnx are imported when needed.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eqfact.graph import Data, Graph, Node, checked_inputs, forward
from eqfact.ops import GELU, Array, Erf, Op, Sigmoid, SiLU, Sloped, Softmax, Tanh
from eqfact.serialization import save
from eqfact.testing.laws import rounding_bounds
from eqfact.testing.models import dtype_of, to_onnx
from eqfact.testing.modules import to_torch
from eqfact.testing.sources import parameters

Arrays = dict[str, Array]


class Framework(ABC):
    """What a check does with the networks of one framework."""

    name: str
    #: What is imported and called to make the network of ``graph``, in a report.
    imports: str = ""
    code: str = ""
    suffix: str = ".npz"
    reading: str = "eqfact.load(path)"
    dtypes: tuple[str, ...] = ("float32", "float64")
    #: What networks are drawn without, because nothing that runs them takes it.
    without: tuple[str, ...] = ()

    @abstractmethod
    def network(self, graph: Graph) -> Any:
        """A new network, which shares nothing with others."""

    @abstractmethod
    def why_not(self, made: object) -> str:
        """Why this is no network of the framework; empty if it is one."""

    @abstractmethod
    def run(self, network: Any, feeds: Arrays) -> Arrays:
        """Its outputs by name."""

    @abstractmethod
    def interface(self, network: Any) -> dict[str, object]:
        """What is said of inputs and outputs without running it."""

    @abstractmethod
    def state(self, network: Any) -> dict[str, object]:
        """All that makes it what it is, by name, as values that can be compared."""

    def feeds(self, graph: Graph, x: Data) -> Arrays:
        """The inputs by name."""
        return checked_inputs(graph, x)

    def unsound(self, network: Any) -> str:
        """Which parameter is NaN; empty if none is."""
        return ""

    def copied(self, network: Any) -> Any:
        """A network of its own, for a pass that changes the one it is given."""
        return copy.deepcopy(network)

    def save(self, path: Path, graph: Graph) -> None:
        """Write a network to a file."""
        save(path, graph)


class Numpy(Framework):
    """eqfact's own graphs."""

    name = "numpy"
    code = "network = graph"

    def network(self, graph: Graph) -> Graph:
        ops: dict[int, Op] = {}  # arrays of their own: somebody may unlock and change them
        return graph.with_ops({node.name: ops.setdefault(id(node.op), copy.deepcopy(node.op)) for node in graph.nodes})

    def copied(self, network: Any) -> Any:
        return self.network(network)

    def why_not(self, made: object) -> str:
        return "" if isinstance(made, Graph) else f"it returns {_kind(made)}, and no eqfact.Graph"

    def run(self, network: Any, feeds: Arrays) -> Arrays:
        y = forward(network, feeds)
        return y if isinstance(y, dict) else {network.outputs[0]: y}

    def interface(self, network: Any) -> dict[str, object]:
        return {"inputs": dict(network.inputs), "outputs": {name: network.shapes[name] for name in network.outputs},
                "order of outputs": network.outputs}

    def state(self, network: Any) -> dict[str, object]:
        first: dict[int, str] = {}
        shared = {node.name: first.setdefault(id(node.op), node.name) for node in network.nodes}
        return {"inputs and outputs": (dict(network.inputs), network.outputs), "order of nodes": tuple(shared),
                **{f"node '{node.name}'": (type(node.op).__name__, parameters(node.op), node.inputs, shared[node.name])
                   for node in network.nodes}}


class Torch(Framework):
    """Modules that take tensors and return one, or several in a tuple, a list or a dict."""

    name = "torch"
    imports = "from eqfact.testing import to_torch"
    code = "network = to_torch(graph)"
    reading = "to_torch(eqfact.load(path))"

    def network(self, graph: Graph) -> Any:
        return to_torch(graph)

    def why_not(self, made: object) -> str:
        return "" if callable(made) else f"it returns {_kind(made)}, which cannot be called"

    def run(self, network: Any, feeds: Arrays) -> Arrays:
        import torch

        with torch.no_grad():
            made = network(*(torch.from_numpy(array.copy()) for array in feeds.values()))
        named = made if isinstance(made, Mapping) else dict(enumerate(made)) if isinstance(made, (tuple, list)) else {0: made}
        return {f"output {key}": tensor.detach().numpy() for key, tensor in named.items()}

    def interface(self, network: Any) -> dict[str, object]:
        said: dict[str, object] = {"training mode": bool(getattr(network, "training", False))}
        forward = getattr(network, "forward", None)
        if inspect.ismethod(forward):
            said["inputs"] = tuple(inspect.signature(forward).parameters)
        return said

    def state(self, network: Any) -> dict[str, object]:
        import torch

        if not isinstance(network, torch.nn.Module):
            return {}
        modules = {f"module '{name}'": (type(module).__name__, module.training, str(module.extra_repr()))
                   for name, module in network.named_modules()}
        tensors = {f"tensor '{name}'": _tensor(tensor) for name, tensor in network.state_dict().items()}
        return {"code of forward": getattr(network, "code", ""), **modules, **tensors}

    def unsound(self, network: Any) -> str:
        import torch

        tensors = network.state_dict().items() if isinstance(network, torch.nn.Module) else ()
        return next((name for name, tensor in tensors if torch.is_tensor(tensor) and torch.isnan(tensor).any()), "")


class Onnx(Framework):
    """Models in memory, run by onnxruntime where it is installed, as they are written; else by onnx's reference evaluator."""

    name = "onnx"
    imports = "from eqfact.testing import to_onnx"
    code = "network = to_onnx(graph)"
    suffix = ".onnx"
    reading = "onnx.load(path)"
    #: onnxruntime does not compute every operator in float64, and takes less for ConvTranspose than ONNX allows.
    dtypes = ("float32",)
    without = ("output padding beyond the stride",)

    def network(self, graph: Graph) -> Any:
        return to_onnx(graph)

    def copied(self, network: Any) -> Any:
        made = type(network)()
        made.CopyFrom(network)
        return made

    def feeds(self, graph: Graph, x: Data) -> Arrays:
        dtype = dtype_of(to_onnx(graph))
        return {name: array.astype(dtype) for name, array in checked_inputs(graph, x).items()}

    def why_not(self, made: object) -> str:
        import onnx

        if not isinstance(made, onnx.ModelProto):
            return f"it returns {_kind(made)}, and no onnx.ModelProto"
        try:
            onnx.checker.check_model(made, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            return f"it returns a model that onnx's checker refuses: {' '.join(str(error).split())[:300]}"
        return ""

    def run(self, network: Any, feeds: Arrays) -> Arrays:
        from eqfact.onnx.running import run

        return run(network, feeds)

    def interface(self, network: Any) -> dict[str, object]:
        constants = {tensor.name for tensor in network.graph.initializer}
        return {what: {info.name: _tensor_type(info) for info in infos if info.name not in constants}
                for what, infos in (("inputs", network.graph.input), ("outputs", network.graph.output))}

    def state(self, network: Any) -> dict[str, object]:
        graph, rest = network.graph, self.copied(network)
        for part in ("node", "initializer", "input", "output"):
            rest.graph.ClearField(part)
        named = {"model": rest, **{f"node '{node.name or node.output[0]}'": node for node in graph.node},
                 **{f"initializer '{tensor.name}'": tensor for tensor in graph.initializer},
                 **{f"input '{info.name}'": info for info in graph.input}, **{f"output '{info.name}'": info for info in graph.output}}
        return {"order of nodes": tuple(node.name or node.output[0] for node in graph.node),
                **{name: message.SerializeToString(deterministic=True) for name, message in named.items()}}

    def unsound(self, network: Any) -> str:
        from onnx import numpy_helper

        arrays = ((tensor.name, numpy_helper.to_array(tensor)) for tensor in network.graph.initializer)
        return next((name for name, array in arrays if np.issubdtype(array.dtype, np.floating) and np.isnan(array).any()), "")

    def save(self, path: Path, graph: Graph) -> None:
        path.write_bytes(to_onnx(graph).SerializeToString(deterministic=True))


FRAMEWORKS: dict[str, Callable[[], Framework]] = {kind.name: kind for kind in (Numpy, Torch, Onnx)}


def engine_bounds(graph: Graph, x: Data) -> Arrays:
    """For every value a bound on what rounding may do to it in two equivalent networks that an engine runs.

    As :func:`eqfact.testing.laws.rounding_bounds`, but for the tails of curves: eqfact computes them as exactly as all else, engines round
    a sigmoid as if it were 1, and ``x`` times a curve as if it were ``x``.
    """
    return rounding_bounds(graph, x, _of_tails)


def _of_tails(node: Node, inputs: Sequence[Array]) -> Array | float:
    """What an engine rounds beyond an op's own bound."""
    curve = node.op.op if isinstance(node.op, Sloped) else node.op
    if isinstance(curve, (Sigmoid, Tanh, Erf, Softmax)):
        return node.op.roundings
    if isinstance(curve, (SiLU, GELU)):
        bound: Array = node.op.roundings * np.abs(inputs[0])
        return bound
    return 0.0


def fingerprint(graph: Graph, data: Arrays) -> str:
    """A short name for a network and its data."""
    text = repr((Numpy().state(graph), {name: array.tobytes() for name, array in data.items()}))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _tensor(tensor: Any) -> object:
    import torch

    if not torch.is_tensor(tensor):
        return repr(tensor)
    array = tensor.detach().cpu()
    return str(array.dtype), tuple(array.shape), array.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b""


def _tensor_type(info: Any) -> str:
    """Element type and sizes, as text."""
    from onnx import TensorProto

    tensor = info.type.tensor_type
    sizes = (str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim)
    return f"{TensorProto.DataType.Name(tensor.elem_type).lower()}[{', '.join(sizes)}]"
