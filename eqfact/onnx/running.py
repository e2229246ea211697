"""What do other people's runtimes make of a model? Values by name, from onnxruntime where it is installed, else from onnx's own evaluator.

Nothing of eqfact computes here: this is the witness that what was read or written is checked with. Needs the extra ``eqfact[onnx]``,
and ``eqfact[onnx-run]`` for onnxruntime.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.reference import ReferenceEvaluator

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


def run(model: onnx.ModelProto | str | os.PathLike[str], feeds: Mapping[str, npt.ArrayLike], outputs: Sequence[str] | None = None, *,
        optimized: bool = False, entries: Mapping[str, str] | None = None) -> Arrays:
    """The values called ``outputs`` (by default the model's own outputs) by name, for inputs by name, on the processor.

    ``outputs`` may name inner values too. ``optimized``: with all that onnxruntime does to a model when a session is opened without
    options, integer kernels among it; else node by node, as it is written. ``entries`` are entries of the session's configuration, for
    instance :data:`EXACT_SUMS`. The reference evaluator always goes node by node, and has no use for either.

    :class:`OnnxError` with what the runtime says if it does not load or run the model.

    >>> from onnx import helper
    >>> values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xz"]
    >>> nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["y"], ["z"])]
    >>> model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:]), ir_version=8)
    >>> run(model, {"x": np.float32([-1, 2])}, ["y", "z"])
    {'y': array([0., 2.], dtype=float32), 'z': array([-0., -2.], dtype=float32)}
    """
    path = None if isinstance(model, onnx.ModelProto) else Path(model)
    given = model if isinstance(model, onnx.ModelProto) else onnx.load(model, load_external_data=False)
    own = [info.name for info in given.graph.output]
    names = own if outputs is None else list(outputs)
    inner = [name for name in dict.fromkeys(names) if name not in own]
    if inner:
        shown = onnx.ModelProto()
        shown.CopyFrom(given)
        shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
        given = shown
    arrays = {name: np.asarray(array) for name, array in feeds.items()}
    try:
        made = _run(given, path, arrays, names, optimized, entries or {})
    except Exception as error:  # runtimes share no class of errors
        where = "" if path is None else f"{path}: "
        raise OnnxError(f"{where}{runtime()} does not run this model: {' '.join(str(error).split())}") from error
    return dict(zip(names, (np.asarray(array) for array in made), strict=True))


def fed(model: onnx.ModelProto | str | os.PathLike[str], feeds: Mapping[str, npt.NDArray[Any]]) -> list[Arrays]:
    """Inputs in batches as large as the model asks for, the last one filled up with the first entries; one batch if it takes any size."""
    given = model if isinstance(model, onnx.ModelProto) else onnx.load(model, load_external_data=False)
    sizes = [info.type.tensor_type.shape.dim[0].dim_value for info in given.graph.input if info.type.tensor_type.shape.dim]
    count = max(map(len, feeds.values()))
    size = max(sizes, default=0) or count
    return [{name: np.take(array, np.arange(start, start + size), axis=0, mode="wrap") for name, array in feeds.items()}
            for start in range(0, count, size)]


def _run(model: onnx.ModelProto, path: Path | None, feeds: Arrays, names: Sequence[str], optimized: bool,
         entries: Mapping[str, str]) -> Sequence[Any]:
    try:
        import onnxruntime
    except ImportError:
        if path is not None:
            onnx.load_external_data_for_model(model, str(path.parent))
        return list(ReferenceEvaluator(model).run(list(names), feeds))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised, not printed
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in entries.items() if path is None else {_FOLDER: str(path.parent.resolve()), **entries}.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    answers: Sequence[Any] = session.run(list(names), feeds)
    return answers
