"""What do other people's runtimes make of a model? Values by name, from onnxruntime where it is installed, else from onnx's own evaluator.

Nothing of eqfact computes here: this is the witness that what was read or written is checked with. Needs the extra ``eqfact[onnx]``,
and ``eqfact[onnx-run]`` for onnxruntime.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from eqfact.onnx.origin import OnnxError

Arrays = dict[str, npt.NDArray[Any]]

#: onnxruntime's session entry under which it adds products of 8 bits exactly on processors without VNNI, too.
EXACT_SUMS = {"session.x64quantprecision": "1"}
#: Where onnxruntime looks for the weights that a model keeps in other files, if it gets the model itself and no path.
_FOLDER = "session.model_external_initializers_file_folder_path"


def runtime() -> str:
    """What :func:`run` computes with, by name and version: onnxruntime if it can be imported, else onnx's reference evaluator."""
    try:
        import onnxruntime
    except ImportError:
        return f"the reference evaluator of onnx {onnx.__version__}"
    return f"onnxruntime {onnxruntime.__version__}"


def tensors(path: str | os.PathLike[str]) -> set[str]:
    """The names of all that a file reads or makes itself."""
    graph = onnx.load(path, load_external_data=False).graph
    return {*(str(info.name) for info in graph.input), *(str(name) for node in graph.node for name in node.output if name)}


class Running:
    """A model made ready to be run, on the processor; inner values that may be asked for are named beforehand.

    ``optimized``: with all that onnxruntime does to a model when a session is opened without options, integer kernels among it; else node
    by node, as it is written. ``entries`` are entries of the session's configuration, for instance :data:`EXACT_SUMS`. The reference
    evaluator always goes node by node, and has no use for either.
    """

    def __init__(self, model: onnx.ModelProto | str | os.PathLike[str], inner: Sequence[str] = (), *, optimized: bool = False,
                 entries: Mapping[str, str] | None = None) -> None:
        self.path = None if isinstance(model, onnx.ModelProto) else Path(model)
        given = model if isinstance(model, onnx.ModelProto) else onnx.load(model, load_external_data=False)
        self.outputs = [info.name for info in given.graph.output]
        hidden = [name for name in dict.fromkeys(inner) if name not in self.outputs]
        if hidden:
            shown = onnx.ModelProto()
            shown.CopyFrom(given)
            shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in hidden)
            given = shown
        with self._refusals():
            self._ask = _prepared(given, self.path, optimized, entries or {})

    def __call__(self, feeds: Mapping[str, npt.ArrayLike], outputs: Sequence[str] | None = None) -> Arrays:
        """The values called ``outputs`` (by default the model's own outputs) by name, for inputs by name."""
        names = self.outputs if outputs is None else list(outputs)
        with self._refusals():
            given = {name: np.asarray(array) for name, array in feeds.items()}
            made = self._ask(names, given) if names else []  # engines take none for all
        return dict(zip(names, (np.asarray(array) for array in made), strict=True))

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # runtimes share no class of errors
            where = "" if self.path is None else f"{self.path}: "
            raise OnnxError(f"{where}{runtime()} does not run this model: {' '.join(str(error).split())}") from error


def run(model: onnx.ModelProto | str | os.PathLike[str], feeds: Mapping[str, npt.ArrayLike], outputs: Sequence[str] | None = None, *,
        optimized: bool = False, entries: Mapping[str, str] | None = None) -> Arrays:
    """What a model makes of its inputs, once; ``outputs`` may name inner values too. The options are those of :class:`Running`.

    :class:`OnnxError` with what the runtime says if it does not load or run the model.

    >>> from onnx import helper
    >>> values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xz"]
    >>> nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["y"], ["z"])]
    >>> model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:]), ir_version=8)
    >>> run(model, {"x": np.float32([-1, 2])}, ["y", "z"])
    {'y': array([0., 2.], dtype=float32), 'z': array([-0., -2.], dtype=float32)}
    """
    return Running(model, outputs or (), optimized=optimized, entries=entries)(feeds, outputs)


def fed(model: onnx.ModelProto | str | os.PathLike[str], feeds: Mapping[str, npt.NDArray[Any]]) -> list[Arrays]:
    """Inputs in batches as large as the model asks for, the last one filled up with the first entries; one batch if it takes any size."""
    given = model if isinstance(model, onnx.ModelProto) else onnx.load(model, load_external_data=False)
    sizes = [info.type.tensor_type.shape.dim[0].dim_value for info in given.graph.input if info.type.tensor_type.shape.dim]
    count = max(map(len, feeds.values()))
    size = max(sizes, default=0) or count
    return [{name: np.take(array, np.arange(start, start + size), axis=0, mode="wrap") for name, array in feeds.items()}
            for start in range(0, count, size)]


def _prepared(model: onnx.ModelProto, path: Path | None, optimized: bool,
              entries: Mapping[str, str]) -> Callable[[Sequence[str], Arrays], Sequence[Any]]:
    """What computes the named values of inputs."""
    try:
        import onnxruntime
    except ImportError:
        if path is not None:
            onnx.load_external_data_for_model(model, str(path.parent))
        evaluator = ReferenceEvaluator(model, new_ops=[LRN])
        return lambda names, feeds: list(evaluator.run(list(names), feeds))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised, not printed
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in entries.items() if path is None else {_FOLDER: str(path.parent.resolve()), **entries}.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    quiet = onnxruntime.RunOptions()
    quiet.log_severity_level = 4
    return lambda names, feeds: session.run(list(names), feeds, quiet)


class LRN(OpRun):
    """Local response normalization over all channels; onnx's own (1.23) counts samples where it means channels."""

    op_domain = ""

    def _run(self, x: Any, alpha: float, beta: float, bias: float, size: int) -> tuple[Any]:  # type: ignore[override,unused-ignore]
        before, after = (size - 1) // 2, size // 2
        squares = np.pad(x * x, ((0, 0), (before, after), *((0, 0) for _ in x.shape[2:])))
        total = np.lib.stride_tricks.sliding_window_view(squares, size, axis=1).sum(axis=-1)
        return ((x / (bias + alpha / size * total) ** beta).astype(x.dtype),)
