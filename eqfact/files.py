"""Which files does the command line read and write? Networks by suffix (``.npz``, ``.onnx``), images and factors as ``.npz``.

Nothing is unpickled, nothing larger than ``MAX_BYTES`` is read, and several outputs appear together or not at all. Whatever
a file has wrong is a :class:`ValueError` that starts with its name; what the disk has wrong stays an :class:`OSError`.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import prod
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from eqfact import serialization
from eqfact.factorization import Factorization
from eqfact.graph import Graph, checked_inputs
from eqfact.ops.base import Array
from eqfact.training import TrainingState
from eqfact.verification import Verification

NETWORKS = (".npz", ".onnx")
#: The most that the arrays of a file of images or factors may hold together.
MAX_BYTES = 2**32
#: Batches are cut so that the values of a network on one of them have about this many entries (128 MiB in float32).
BATCH_ENTRIES = 2**25
#: What stands in for images if there are none: this many, standard normal, from a generator with seed 0.
RANDOM_IMAGES = 4


@dataclass(frozen=True, eq=False)
class Network:
    """A network from a file: what eqfact understands of it, and for ONNX the file around it."""

    path: str
    graph: Graph
    #: An :class:`eqfact.onnx.Opened`; None for native files.
    file: Any = None

    @property
    def partly(self) -> str | None:
        """What is understood and what is kept, in a line; None if all of it is understood."""
        return str(self.file) if self.file is not None and self.file.kept else None

    def prove(self, graph: Graph, feeds: Mapping[str, npt.ArrayLike], path: str | None = None) -> Verification | None:
        """Does the file (or that at ``path``, written with its names) compute what ``graph`` does, by another runtime's account?"""
        if self.file is None:
            return None
        verdict: Verification = _onnx().checking.checked(self.file, graph, feeds, path)
        return verdict

    def save(self, path: str, graph: Graph, *, quantized: bool = False) -> None:
        """Write the network as ``graph`` is now, in its file if it came from one; a ``quantized`` one to ONNX with QuantizeLinear."""
        if network_kind(path) == ".npz":
            if self.file is not None and not self.file.whole:
                raise ValueError(f"only parts of '{self.path}' are understood, or its outputs are moved at the end; the rest stands in its "
                                 "file: give the output a name that ends in .onnx")
            serialization.save(path, graph)
        elif self.file is not None:
            self.file.save_qdq(path, graph) if quantized else self.file.save(path, graph)
        else:
            (_onnx().save_qdq if quantized else _onnx().save)(path, graph)


def load_network(path: str, *, data: str | None = None, input_shapes: Mapping[str, Sequence[int]] | None = None,
                 strict: bool = False) -> Network:
    """Read a network, native or ONNX; of the latter, sizes that are open are those of the file ``data``, or ``input_shapes``.

    ``strict``: a file of which only parts are understood is refused.
    """
    if network_kind(path) == ".npz":
        return Network(path, serialization.load(path))
    feeds = None if data is None else load_data(data, _onnx().reading.input_names(path))
    file = _onnx().open(path, feeds, input_shapes=input_shapes)
    network = Network(path, file.graph, file)
    if strict and network.partly:
        raise ValueError(f"{network.partly}: leave out --strict to work on what is understood")
    return network


def network_kind(path: str) -> str:
    """The suffix of a network's file name, with all that it takes at hand, or :class:`ValueError`."""
    kind = os.path.splitext(path)[1].lower()
    if kind not in NETWORKS:
        raise ValueError(f"'{path}': the name of a network must end in {' or '.join(NETWORKS)}")
    if kind == ".onnx":
        _onnx()
    return kind


def _onnx() -> ModuleType:
    try:
        import onnx  # noqa: F401  # to tell a missing extra from a fault of ours
    except ImportError:
        raise ValueError("ONNX files need the package onnx: pip install 'eqfact[onnx]'") from None
    import eqfact.onnx
    return eqfact.onnx


@dataclass(frozen=True, eq=False)
class Images:
    """Inputs of a network by name, each ``(N, C, *spatial)``, and in words where they come from."""

    arrays: Mapping[str, Array]
    #: The data that they come from: the same, or the inputs of the file that a network is part of.
    feeds: Mapping[str, npt.NDArray[Any]]
    source: str
    #: Images in a batch.
    size: int

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def batches(self) -> list[dict[str, Array]]:
        """The images in batches (views)."""
        return [{name: a[i:i + self.size] for name, a in self.arrays.items()} for i in range(0, len(self), self.size)]

    def first(self, count: int) -> Images:
        """At most the first ``count`` images."""
        if count >= len(self):
            return self
        return replace(self, arrays={name: a[:count] for name, a in self.arrays.items()}, source=f"the first {count} of {self.source}")


def load_data(path: str, inputs: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
    """The arrays in an ``.npz``: one for each input by name, or (one input) a single array, or one called ``images``."""
    found = _arrays(path)
    (first, *others) = inputs
    if not set(inputs) <= set(found):
        name = "images" if "images" in found else next(iter(found), "")
        if others or (len(found) != 1 and name != "images"):
            raise ValueError(f"'{path}' must hold one array for each input ({', '.join(inputs)})"
                             f"{'' if others else ', a single array, or an array called images'}, got {', '.join(sorted(found)) or 'none'}")
        found = {first: found[name]}
    return {name: found[name] for name in inputs}


def load_images(path: str, network: Network) -> Images:
    """The data in an ``.npz`` at the inputs of what is understood of a network."""
    feeds = load_data(path, list(network.graph.inputs) if network.file is None else network.file.inputs)
    try:
        arrays = checked_inputs(network.graph, feeds) if network.file is None else network.file.boundary(feeds)
        return _images(arrays, feeds, "{} images of " + os.path.basename(path), network.graph)
    except (ValueError, TypeError) as error:
        raise ValueError(f"'{path}': {error}") from error


def random_images(network: Network) -> Images:
    """Standard normal numbers, the same every time; for an ONNX file what stood in for data when it was opened."""
    graph, source = network.graph, "{} inputs of random numbers (seed 0)"
    if network.file is not None:
        return _images(network.file.boundary(network.file.feeds), network.file.feeds, source, graph)
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((RANDOM_IMAGES, *shape)).astype(graph.dtype or np.float64) for name, shape in graph.inputs.items()}
    return _images(arrays, arrays, source, graph)


def _images(arrays: Mapping[str, Array], feeds: Mapping[str, npt.NDArray[Any]], source: str, graph: Graph) -> Images:
    entries = sum(prod(shape) for shape in graph.shapes.values())
    count = len(next(iter(arrays.values())))
    return Images(arrays, feeds, source.format(count), max(1, BATCH_ENTRIES // entries))


def load_labels(path: str, count: int) -> npt.NDArray[np.int64]:
    """The labels of so many images in an ``.npz``: an array called ``labels``, or its only one, of whole numbers."""
    found = _arrays(path)
    if "labels" not in found and len(found) != 1:
        raise ValueError(f"'{path}' must hold a single array, or an array called labels, got {', '.join(sorted(found)) or 'none'}")
    labels = found["labels"] if "labels" in found else next(iter(found.values()))
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise ValueError(f"'{path}': labels must be whole numbers, one for each of {count} images, got {labels.dtype} of shape "
                         f"{labels.shape}")
    return labels.astype(np.int64)


def load_state(path: str) -> TrainingState:
    """The state of a training that :func:`save_arrays` wrote."""
    try:
        return TrainingState.of(_arrays(path))
    except (ValueError, TypeError) as error:
        raise ValueError(f"'{path}': {error}") from error


def load_factors(path: str, graph: Graph) -> Factorization:
    """The factorization of a network whose factors :func:`save_factors` wrote."""
    factors = _arrays(path)
    try:
        return Factorization.of(graph, factors)
    except (ValueError, TypeError) as error:
        raise ValueError(f"'{path}' does not fit the network: {error}") from error


def save_factors(path: str, factorization: Factorization) -> None:
    """Write the factors of every value, ``(C,)`` each, under its name."""
    save_arrays(path, dict(factorization.items()))


def save_arrays(path: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write arrays by name."""
    with zipfile.ZipFile(path, "w") as archive:  # not numpy.savez, to which an array called "file" would be an argument
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _arrays(path: str) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an ``.npz`` file."""
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                claimed = sum(info.file_size for info in archive.infolist())
                if claimed > MAX_BYTES:
                    raise ValueError(f"its arrays have {claimed} bytes, more than {MAX_BYTES}")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: _array(name, arrays[name]) for name in arrays.files}
        except (ValueError, LookupError, ArithmeticError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"'{path}' is not a readable .npz file: {error}") from error


def _array(name: str, value: object) -> npt.NDArray[Any]:
    if not isinstance(value, np.ndarray):  # numpy hands members that are no arrays over as bytes
        raise ValueError(f"its member {name} is no array")
    return value


def check_outputs(paths: Iterable[str | None]) -> None:
    """Refuse outputs that cannot be written, before any work is done for them."""
    given = [os.path.realpath(path) for path in paths if path is not None]
    for path in given:
        if not os.path.isdir(os.path.dirname(path)):
            raise FileNotFoundError(f"cannot write '{path}': there is no folder '{os.path.dirname(path)}'")
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"cannot write '{path}': this is a folder or a device; give the name of a file")
        if given.count(path) > 1:
            raise ValueError(f"cannot write '{path}' twice: two outputs have this name")


def write_all(writers: Mapping[str | None, Callable[[str], object]]) -> None:
    """Write several files, all of them or none; an output called None is not wanted."""
    with ExitStack() as stack:
        written = {}
        for path, write in writers.items():
            if path is not None:
                target = os.path.realpath(path)
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix=".eqfact-", dir=os.path.dirname(target)))
                written[target] = os.path.join(folder, os.path.basename(target))
                write(written[target])
        for target, temporary in written.items():
            os.replace(temporary, target)
