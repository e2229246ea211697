"""How does a network become a file, and when may a file be trusted to be one?

A file is a zip archive that ``numpy.load`` opens too: ``graph.json`` (inputs, outputs, nodes with their ops; standard
JSON) and ``array0.npy``, ``array1.npy``, ... in the order in which the ops refer to them. Nothing is pickled or
compressed, and the classes in ``KNOWN`` are the only code that a file can name, so that a hostile one can neither run
anything nor grow far beyond its size on disk. The law: ``load`` gives back every bit that ``save`` was given.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import reprlib
import secrets
import struct
import zipfile
from collections.abc import Callable
from dataclasses import fields
from typing import Any, BinaryIO, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt

from eqfact.graph import Graph, Node
from eqfact.ops import ALL
from eqfact.ops.base import Op, Shape
from eqfact.ops.grid import Grid
from eqfact.quantizers import FakeQuantize

FORMAT = "eqfact network"
VERSION = 1
#: The dataclasses that a file may hold: the ops, and what their fields are made of.
KNOWN: dict[str, type] = {**{op.__name__: op for op in ALL}, "FakeQuantize": FakeQuantize, "Grid": Grid}

#: A ``.npy`` member as ``numpy.save`` writes it. numpy's own reader evaluates this header as Python, so it is not used here.
_DTYPES = ("<f2", "<f4", "<f8", "<i8", "|u1")
_HEADER = re.compile(rb"\x93NUMPY\x01\x00(..)\{'descr': '(<f2|<f4|<f8|<i8|\|u1)', 'fortran_order': False, "
                     rb"'shape': \(([\d, ]*)\), \} *\n", re.DOTALL)
#: What zipfile, json and the constructors of ops raise on content that they cannot take. Not OSError: a broken disk is no broken file.
REFUSALS = (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError, struct.error, zipfile.BadZipFile)

AnyArray = npt.NDArray[Any]
Kind = TypeVar("Kind")


def save(path: str | os.PathLike[str], graph: Graph) -> None:
    """Write a network to the file ``path``, under exactly this name; saving it twice gives equal files.

    The file appears whole or not at all: if anything fails, one that was there before stays as it was. ``Node.origin`` is
    not kept. Raises :class:`TypeError` for an op that is not in ``KNOWN``, naming its node, and :class:`OSError` from the disk.

    >>> import eqfact as eq, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/net.npz", eq.Graph.chain((2,), act=eq.Clip(0, 6)))
    ...     load(f"{folder}/net.npz")["act"].op
    Clip(low=0.0, high=6.0)
    """
    if not isinstance(graph, Graph):
        raise TypeError(f"save(path, graph) needs an eqfact.Graph, got {reprlib.repr(graph)}")
    text, arrays = _document(graph)
    target = os.path.realpath(os.fsdecode(path))
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"cannot save '{target}': there is no folder '{folder}'; make it first")
    if os.path.exists(target) and not os.path.isfile(target):
        raise ValueError(f"cannot save '{target}': this is a folder or a device; give the name of a file")
    temporary = os.path.join(folder, f".eqfact-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            _write(file, text, arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):  # it has its final name, or was never made
            os.remove(temporary)


def load(path: str | os.PathLike[str], *, max_channels: int = 2**24) -> Graph:
    """Read a network that :func:`save` wrote: the same names, order, dtypes and bits; an op that served several nodes does so again.

    Raises :class:`ValueError`, with the reason, for a file that is truncated, damaged, inconsistent, hostile or of a
    newer format. ``max_channels`` limits the channels of all values together, because a graph keeps a label for each and
    a few bytes can claim any number of them (Flatten of a huge input); MobileNetV2 has some 50 thousand.

    >>> net = Graph.chain((2,), fc=Dense([[3.0, 1.0]]))
    >>> save("net.npz", net)
    >>> load("net.npz")["fc"].op.weight
    array([[3., 1.]])
    """
    name = os.fsdecode(path)
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = _members(archive, os.fstat(file.fileno()).st_size)
                content = checked(parsed(archive.read(members.pop("graph.json")).decode()))
                if content["version"] <= VERSION:
                    arrays = {member: _array(member, archive.read(member)) for member in members}

                    def take(place: object) -> AnyArray:
                        """Each array once, so that no second reference can multiply one."""
                        if f"{place}.npy" not in arrays:
                            raise ValueError(f"{reprlib.repr(place)} is no array that is not taken yet")
                        return arrays.pop(f"{place}.npy")

                    graph = graph_of(content, take, max_channels)
                    if arrays:
                        raise ValueError(f"no op refers to its members {reprlib.repr(list(arrays))}")
                    return graph
        except REFUSALS as error:
            raise ValueError(f"'{name}' is not an eqfact network: {error!s:.500}; write it again with eqfact.save") from error
    raise ValueError(f"'{name}' has format version {content['version']}, and this eqfact reads versions up to {VERSION}; "
                     "install a newer eqfact")


# ---------------------------------------------------------------------------------------------------------------
# From a graph to a document, and back; a file is one with its arrays beside it

def document(graph: Graph, put: Callable[[AnyArray], object]) -> dict[str, Any]:
    """The graph as a JSON document, with what ``put`` returns (a name, or the numbers themselves) in the place of each array.

    >>> network = Graph({"x": (2,)}, [Node("y", ALL[0](np.ones((1, 2))), ["x"])], ["y"])
    >>> document(network, np.ndarray.tolist)["nodes"][0]["op"]["Dense"]["weight"]
    {'array': [[1.0, 1.0]]}
    """
    first_use: dict[int, str] = {}
    nodes = []
    for node in graph.nodes:
        op: object = first_use.setdefault(id(node.op), node.name)  # shared ops: the name of the node that has it already
        try:
            nodes.append({"name": node.name, "op": _encode(node.op, put) if op == node.name else op, "inputs": node.inputs})
        except TypeError as error:
            raise TypeError(f"node '{node.name}': {error}") from error
    return {"format": FORMAT, "version": VERSION, "inputs": dict(graph.inputs), "outputs": graph.outputs, "nodes": nodes}


def _encode(value: object, put: Callable[[AnyArray], object]) -> object:
    """A value as JSON; what JSON has no word for is an object with one key: ``{"Clip": {"low": 0.0, "high": {"float": "inf"}}}``."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if type(value) is tuple:
        return [_encode(v, put) for v in value]
    if isinstance(value, np.ndarray):
        dtype = value.dtype.newbyteorder("<")
        if dtype.str not in _DTYPES:
            raise TypeError(f"an array of dtype {value.dtype} cannot be saved, only {', '.join(_DTYPES)}; convert it with .astype")
        return {"array": put(value.astype(dtype, order="C", copy=False))}
    name = type(value).__name__
    if KNOWN.get(name) is not type(value):
        raise TypeError(f"{name} is not a class that files may hold ({', '.join(KNOWN)}), so that loading never runs foreign code; "
                        "put one of these in its place with graph.with_ops, and your own back after load")
    return {name: {f.name: _encode(getattr(value, f.name), put) for f in fields(value) if f.init}}  # type: ignore[arg-type]


def _document(graph: Graph) -> tuple[bytes, list[AnyArray]]:
    """The document of a file, and the arrays beside it."""
    arrays: list[AnyArray] = []

    def put(array: AnyArray) -> str:
        arrays.append(array)
        return f"array{len(arrays) - 1}"

    return json.dumps(document(graph, put), allow_nan=False).encode(), arrays


def _write(file: BinaryIO, text: bytes, arrays: list[AnyArray]) -> None:
    # ZipInfo dates every member 1980-01-01: nothing in the file but the network
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("graph.json"), text)
        for i, array in enumerate(arrays):
            with archive.open(zipfile.ZipInfo(f"array{i}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)


# ---------------------------------------------------------------------------------------------------------------
# From a file, perhaps a hostile one, to a graph. Reasons are worded to follow "'PATH' is not an eqfact network: ".

def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The members by name: exactly those there must be, and together no larger than the file."""
    infos = archive.infolist()
    names = [info.filename for info in infos]
    if sorted(names) != sorted(["graph.json", *(f"array{i}.npy" for i in range(len(infos) - 1))]):
        raise ValueError(f"its members must be graph.json, array0.npy, array1.npy, ..., each once, got {reprlib.repr(names)}")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"its member {info.filename} is compressed, and could expand without limit")
        if info.compress_size != info.file_size or not 0 <= info.header_offset < size:
            raise ValueError(f"its member {info.filename} is damaged: it is said to begin at byte {info.header_offset} of {size}, and "
                             f"to have {info.file_size} bytes stored as {info.compress_size}")
    if sum(info.file_size for info in infos) > size:
        raise ValueError(f"its members claim {sum(info.file_size for info in infos)} bytes, and the file has {size}")
    return dict(zip(names, infos, strict=True))


def _array(member: str, data: bytes) -> AnyArray:
    """The array of a ``.npy`` member: our own and locked, so that an op keeps it and does not copy it."""
    header = _HEADER.match(data)
    if not header or int.from_bytes(header[1], "little") != header.end() - 10:
        raise ValueError(f"its member {member} is no array in C order of a dtype among {', '.join(_DTYPES)}")
    dtype, shape = np.dtype(header[2].decode()), tuple(int(n) for n in re.findall(rb"\d+", header[3]))
    if math.prod(shape) * dtype.itemsize != len(data) - header.end():
        raise ValueError(f"its member {member} declares {dtype.name} of shape {shape}, and holds {len(data) - header.end()} bytes")
    array = np.frombuffer(data, dtype, offset=header.end()).reshape(shape).astype(dtype.newbyteorder("="))
    array.flags.writeable = False
    return array


def _constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"it repeats a key among {reprlib.repr([key for key, _ in pairs])}")
    return dict(pairs)


def parsed(text: str) -> Any:
    """Strict JSON: :class:`ValueError` where a key repeats, or a number is none."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)


def checked(document: Any) -> dict[str, Any]:
    """The document, if it says that it is an eqfact network, and of which version; else :class:`ValueError`."""
    if _entry(document, "format", str) != FORMAT or _entry(document, "version", int) < 1:
        raise ValueError(f"a network must be of format \"{FORMAT}\", version 1 or later, got {reprlib.repr(document)}")
    return dict(document)


def graph_of(document: dict[str, Any], take: Callable[[object], AnyArray], max_channels: int = 2**24) -> Graph:
    """The network of a document; ``take`` gives the array for what ``put`` has left there.

    Shapes are walked in plain integers first, before :class:`Graph` makes labels of these sizes. Raises one of ``REFUSALS``.

    >>> net = Graph.chain((2,), fc=ALL[0](np.ones((1, 2))))
    >>> text = json.dumps(document(net, np.ndarray.tolist))
    >>> graph_of(json.loads(text), np.array)["fc"].op.weight
    array([[1., 1.]])
    """
    shapes: dict[str, Shape] = {}
    ops: dict[str, Op] = {}
    nodes: list[Node] = []
    room = max_channels

    def enter(value: str, shape: Shape) -> None:
        nonlocal room
        try:
            shapes[value] = np.broadcast_to(np.int64(0), shape).shape  # one entry, seen so often
        except (ValueError, OverflowError) as error:
            raise ValueError(f"value '{value}' of shape {reprlib.repr(shape)} is more than an array can be: {error}") from None
        room -= shape[0]
        if room < 0:
            raise ValueError(f"up to value '{value}' of shape {shape}, there are more than max_channels={max_channels} channels; "
                             "give load a larger limit if you trust the file")

    for name, shape in _entry(document, "inputs", dict).items():
        if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"input '{name}' needs a shape [C, ...] of positive integers, got {reprlib.repr(shape)}")
        enter(name, tuple(shape))
    inputs = dict(shapes)
    for code in _entry(document, "nodes", list):
        name, reads = _entry(code, "name", str), _names(code, "inputs")
        try:
            op = code.get("op")
            op = ops.get(op) if isinstance(op, str) else _decode(op, take)
            if not isinstance(op, Op):
                raise ValueError(f"needs an op, or the name of an earlier node to share its op, got {reprlib.repr(code.get('op'))}")
            for read in reads:
                if read not in shapes:
                    raise ValueError(f"reads '{read}', which is no input and no node before it")
            shape = op.output_shape(*(shapes[read] for read in reads))
        except REFUSALS as error:
            raise ValueError(f"node '{name}': {error}") from error
        enter(name, shape)
        ops[name] = op
        nodes.append(Node(name, op, reads))
    return Graph(inputs, tuple(nodes), _names(document, "outputs"))


def _decode(code: object, take: Callable[[object], AnyArray]) -> Any:
    """The value that :func:`_encode` wrote."""
    if isinstance(code, list):
        return tuple(_decode(c, take) for c in code)
    if not isinstance(code, dict):
        return code
    tag, content = next(iter(code.items())) if len(code) == 1 else ("", None)
    if tag == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if tag == "array":
        return take(content)
    if tag in KNOWN and isinstance(content, dict):
        return KNOWN[tag](**{name: _decode(c, take) for name, c in content.items()})
    raise ValueError(f"{reprlib.repr(code)} is none of: an array, a non-finite float, one of {', '.join(KNOWN)}")


def _entry(code: object, key: str, kind: type[Kind]) -> Kind:
    """The entry ``key`` of a JSON object, if it has one of this kind."""
    value = code.get(key) if isinstance(code, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"a network needs a {kind.__name__} under \"{key}\", got {reprlib.repr(value)} in {reprlib.repr(code)}")
    return value


def _names(code: object, key: str) -> tuple[str, ...]:
    """The entry ``key`` of a JSON object, if it is a list of names."""
    names = _entry(code, key, list)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"a network needs a list of names under \"{key}\", got {reprlib.repr(names)}")
    return tuple(names)
