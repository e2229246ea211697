"""Laws of native files: every bit comes back, nothing half-written survives, and no file can do harm."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import struct
import tracemalloc
import warnings
import zipfile
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eqfact as eq
from eqfact import ops, serialization
from eqfact.files import write_all
from eqfact.serialization import load, save
from eqfact.testing.strategies import networks

DTYPES = (np.float32, np.float64)


def draw(*shape, dtype=np.float64):
    """Numbers whose last bits matter; positive, so that they serve as variances too."""
    return np.random.default_rng(shape).uniform(0.1, 1.0, shape).astype(dtype)


def every_op(dtype=np.float64):
    """At least one op of every class, with every kind of field, for a value of 4 channels over (6, 6) unless it says otherwise."""
    w = lambda *shape: draw(*shape, dtype=dtype)  # noqa: E731
    third = 1 / 3
    return [
        eq.Conv(w(8, 2, 3, 3), w(8), stride=2, padding=((1, 0), (0, 2)), dilation=(1, 2), groups=2), eq.Conv(w(4, 1, 3, 3), groups=4),
        eq.ConvTranspose(w(2, 4, 2, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 0)),
        eq.BatchNorm(w(4), w(4), w(4), w(4), eps=third), eq.Identity(), eq.ReLU(), eq.LeakyReLU(third), eq.LeakyReLU(5e-324),
        eq.PReLU(w(4)), eq.PReLU(w(1)), eq.PReLU(w()), eq.PReLU(third),
        eq.Clip(-0.0, 6), eq.Clip(-np.inf, np.inf), eq.Clip(np.array([-np.inf, -1, -0.0, 0], dtype), np.inf),
        eq.MaxPool(2), eq.MaxPool((3, 2), stride=1, padding=((1, 0), (0, 1))),
        eq.AvgPool(2), eq.AvgPool(3, padding=1, count_include_pad=False), eq.GlobalAvgPool(), eq.MinPool(2, dilation=(1, 2)),
        eq.LpPool(2, p=3), eq.Abs(), eq.Blend(w(2, 6), axis=2), eq.Extend(w(4, 1, 6), axis=1, front=True), eq.Extend(w(2, 6, 6)),
        eq.Pad(1), eq.Pad(((1, 0), (0, 2)), -np.inf), eq.Pad((1, 2), third), eq.Upsample((1, 3)), eq.Upsample(2),
        eq.Flatten(), ops.Transpose((2, 0, 1)), eq.Slice(-3, 4), eq.Permute((2, 0, 3, 1)),
        eq.Rearrange(((2, 2), (6,), (3, 2)), ((), (2, 0), (4, 1, 3))), eq.Take((3, 0, 0), axis=1), eq.Affine(w(4, 1, 1), w(1, 6, 6)),
        eq.Sigmoid(), ops.HardSigmoid(third), eq.Tanh(), eq.SiLU(), eq.HardSwish(), ops.Erf(), eq.GELU(), eq.GELU(approximate=True),
        eq.Softmax(), eq.Softmax(axis=-1), eq.Softmax(-1, "causal"), eq.Softmax(2, np.log(np.abs(w(1, 6, 6)))),
        eq.Sloped(eq.GELU(approximate=True), np.abs(w(4))), eq.Sloped(eq.SiLU(), third), eq.LayerNorm(w(4), w(4)),
        eq.RMSNorm(w(4), eps=third), eq.GroupNorm(2, w(4), eps=np.array([third, 1.0])), eq.InstanceNorm(w(4), w(4)),
        eq.FakeQuantize(eq.UniformQuantizer(bits=4, rounding="floor").grid(-w(4), w(4))),
        eq.FakeQuantize(eq.UniformQuantizer(symmetric=False).grid([0.0], [third]), step=w(4).astype(np.float64)),
    ]


def one_op(op):
    return eq.Graph({"x": (4, 6, 6)}, [eq.Node("y", op, ["x"])], ["y"])


def branching(dtype=np.float64):
    """Two inputs, two outputs of which one is read further, a shared op, a residual, names that no file system would like."""
    conv, dense = eq.Conv(draw(4, 4, 3, 3, dtype=dtype), draw(4, dtype=dtype), padding=1), eq.Dense(draw(3, 12, dtype=dtype))
    return eq.Graph({"zweite": (4, 1, 1), "../x": (4, 6, 6)}, [
        eq.Node("/conv/1", conv, ["../x"]), eq.Node("\ud800 lone", eq.ReLU(), ["/conv/1"]), eq.Node("again\n\0", conv, ["\ud800 lone"]),
        eq.Node("add", eq.Add(), ["again\n\0", "../x", "../x"]), eq.Node("mul", eq.Mul(), ["add", "zweite"]),
        eq.Node("sub", eq.Sub(), ["mul", "zweite"]), eq.Node("max", eq.Max(), ["sub", "add"]), eq.Node("min", eq.Min(), ["sub", "max"]),
        eq.Node("cat", eq.Concat(), ["min", "add", "/conv/1"]), eq.Node("pool", eq.GlobalAvgPool(), ["cat"]),
        eq.Node("flat", eq.Flatten(), ["pool"]), eq.Node("fc", dense, ["flat"]),
    ], ["fc", "add"])


def attention(dtype=np.float64):
    q, k, v = (eq.Conv(draw(4, 3, 1, dtype=dtype)) for _ in "qkv")
    return eq.Graph({"x": (3, 5)}, [
        eq.Node("q", q, ["x"]), eq.Node("k", k, ["x"]), eq.Node("v", v, ["x"]),
        eq.Node("turned", eq.Rotary(2, draw(1, 5, dtype=dtype), draw(1, 5, dtype=dtype), interleaved=True), ["q"]),
        eq.Node("scores", eq.Scores(2, scale=1 / 3), ["turned", "k"]), eq.Node("prob", eq.Softmax(-1), ["scores"]),
        eq.Node("mix", eq.Mix(2), ["prob", "v"])], ["mix"])


def tiny():
    return eq.Graph.chain((2,), fc=eq.Dense(draw(2, 2)), act=eq.Clip(0, np.inf), out=eq.Dense(draw(1, 2), draw(1)))


def quantized(dtype=np.float64):
    net = eq.Graph.chain((2, 3), conv=eq.Conv(draw(4, 1, 2, dtype=dtype), draw(4, dtype=dtype), groups=2), act=eq.ReLU())
    of = eq.UniformQuantizer(granularity="per_channel"), eq.UniformQuantizer(symmetric=False)
    return eq.quantize(net, weights=of[0], activations=of[1], stats=eq.calibrate(net, draw(2, 2, 3, dtype=dtype)), outputs=True)


def nets():
    for dtype in DTYPES:
        for i, op in enumerate(every_op(dtype)):
            yield pytest.param(one_op(op), id=f"{type(op).__name__}-{i}-{dtype.__name__}")
        yield pytest.param(attention(dtype), id=f"attention-{dtype.__name__}")
        yield pytest.param(branching(dtype), id=f"branching-{dtype.__name__}")
        yield pytest.param(quantized(dtype), id=f"quantized-{dtype.__name__}")
    yield pytest.param(eq.Graph.chain((6,), deep=ops.Unflatten((2, 3)), flat=eq.Flatten()), id="unflatten")
    yield pytest.param(eq.Graph({"x": (3,)}, [], ["x"]), id="no nodes")
    yield pytest.param(one_op(eq.Conv(draw(8, 4, 3, 3)[::2, :, ::-1].transpose(0, 1, 3, 2))), id="strided weight")
    yield pytest.param(one_op(eq.Conv(draw(4, 4, 1, 1).astype(np.float16))), id="float16")


NETS = list(nets())


def bits(value):
    """All that a value is, comparable with ==: type, dtype, shape and bits, through dataclasses and tuples."""
    if isinstance(value, np.ndarray):
        return "array", value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, float):
        return "float", struct.pack("<d", value)
    if isinstance(value, tuple):
        return "tuple", *map(bits, value)
    if is_dataclass(value):
        return type(value), *((f.name, bits(getattr(value, f.name))) for f in fields(value))
    return type(value), value


def description(graph):
    """All that a graph is, which ops are one object included."""
    first = {}
    return (list(graph.inputs.items()), graph.outputs,
            [(n.name, n.inputs, first.setdefault(id(n.op), n.name), bits(n.op)) for n in graph.nodes])


def saved(graph, folder):
    path = folder / "net"
    save(path, graph)
    return path


# ------------------------------------------------------------------------------------------------ every bit comes back


def test_the_table_holds_every_op():
    assert {type(n.op) for p in NETS for n in p.values[0]} == {*ops.ALL, eq.FakeQuantize} == {*serialization.KNOWN.values()} - {eq.Grid}


@pytest.mark.parametrize("net", NETS)
def test_load_gives_back_what_was_saved(net, tmp_path):
    again = load(saved(net, tmp_path))
    assert description(again) == description(net)
    dtype = net.dtype or np.float64
    x = {name: (draw(2, *shape) - 0.5).astype(dtype) for name, shape in net.inputs.items()}
    for name, value in eq.values(net, x).items():
        assert bits(value) == bits(eq.values(again, x)[name]), name


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(net=networks())
def test_any_network_comes_back(net, tmp_path):
    assert description(load(saved(net, tmp_path))) == description(net)


@pytest.mark.parametrize("net", [tiny(), branching()], ids=["tiny", "branching"])
def test_saving_is_deterministic_and_load_save_changes_no_byte(net, tmp_path):
    paths = [tmp_path / name for name in "abc"]
    save(paths[0], net)
    save(str(paths[1]), net)
    save(paths[2], load(paths[0]))
    assert len({p.read_bytes() for p in paths}) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]  # exactly these names, nothing beside


@pytest.mark.parametrize("broken", [
    lambda g: eq.Graph(g.inputs, [replace(n, op=replace(n.op)) for n in g.nodes], g.outputs),                   # sharing lost
    lambda g: eq.Graph(g.inputs, g.nodes, g.outputs[::-1]),                                                     # order of outputs
    lambda g: eq.Graph(dict(reversed(g.inputs.items())), g.nodes, g.outputs),                                   # order of inputs
    lambda g: g.with_ops({"fc": eq.Dense(np.nextafter(g["fc"].op.weight, 2))}),                                 # a last bit
    lambda g: g.with_ops({"fc": eq.Dense(g["fc"].op.weight.astype(np.float32).astype(np.float64))}),            # through float32
    lambda g: g.with_ops({"fc": replace(g["fc"].op, bias=np.zeros(3))}),                                        # None made zero
], ids=["sharing", "outputs", "inputs", "bit", "float32", "none"])
def test_planted_the_comparison_sees_every_difference(broken):
    assert description(broken(branching())) != description(branching())


def test_the_sign_of_zero_is_compared():
    assert bits(eq.Clip(0.0, 1)) != bits(eq.Clip(-0.0, 1))


def test_numpy_opens_the_file_and_shows_the_same(tmp_path):
    net = tiny()
    with np.load(saved(net, tmp_path), allow_pickle=False) as members:
        document = json.loads(members["graph.json"])
        assert np.array_equal(members["array0"], net["fc"].op.weight)
    fields_of = document["nodes"][0].pop("op")["Dense"]
    assert (fields_of["weight"], fields_of["bias"]) == ({"array": "array0"}, None)
    assert document["nodes"][0] == {"name": "fc", "inputs": ["x"]}


def test_loaded_arrays_are_locked_and_not_held_twice(tmp_path):
    for array in (load(saved(tiny(), tmp_path))["fc"].op.weight, serialization._array("array0", GOOD)):
        assert array.flags.owndata and not array.flags.writeable


def test_fields_that_are_known_dataclasses_round_trip(tmp_path, monkeypatch):
    @dataclass(frozen=True, eq=False)
    class Grid:
        scale: np.ndarray
        bits: int
        name: str = "signed"

    @dataclass(frozen=True, eq=False)
    class Rounded(eq.ReLU):
        grid: Grid | None = None
        ends: tuple = ()
        derived: int = field(default=7, init=False)

    monkeypatch.setattr(serialization, "KNOWN", {**serialization.KNOWN, "Grid": Grid, "Rounded": Rounded})
    ends = (-np.inf, (np.nan, True, "a\ud800"), Grid(np.arange(3), 4), None, np.asfortranarray(draw(2, 3)))
    net = one_op(Rounded(Grid(np.array([[1, 2]], np.uint8), 8), ends))
    assert description(load(saved(net, tmp_path))) == description(net)
    older = saved(one_op(Rounded()), tmp_path)
    rewrite(older, lambda d: d["nodes"][0]["op"]["Rounded"].pop("grid"))  # written before the field existed
    assert load(older)["y"].op.grid is None
    net = one_op(Rounded(Grid(np.float32(1.5), np.int64(3)), (np.True_,)))
    assert bits(load(saved(net, tmp_path))["y"].op) == bits(Rounded(Grid(1.5, 3), (True,)))  # numpy's scalars become Python's


# ------------------------------------------------------------------------------------------------ save: all or nothing


class Swish(eq.Blocking):
    def forward(self, *inputs):
        return inputs[0]


class Conv(eq.Conv):
    """A user's class under a name of the library."""


@dataclass(frozen=True, eq=False)
class Wide(eq.ReLU):
    more: object = None


@pytest.mark.parametrize("op", [Swish(), Conv(draw(4, 4, 1, 1))])
def test_a_users_op_is_refused_by_name_and_nothing_is_written(op, tmp_path):
    with pytest.raises(TypeError, match=rf"node 'y': {type(op).__name__} is not a class that files may hold .*with_ops"):
        save(tmp_path / "net", one_op(op))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.arange(3, dtype=np.int32), np.array([None]), [1], {"a": 1}, 1j, b"a", print,
                                   np.longdouble(1), np.datetime64(1, "s")], ids=lambda v: type(v).__name__)
def test_a_field_that_a_file_cannot_hold_is_refused(value, tmp_path, monkeypatch):
    monkeypatch.setitem(serialization.KNOWN, "Wide", Wide)
    with pytest.raises(TypeError, match="node 'y': "):
        save(tmp_path / "net", one_op(Wide(value)))
    assert not any(tmp_path.iterdir())


def write_in_place(path, graph):
    """A wrong save, to see that the law below can fail: it opens the file itself."""
    text, arrays = serialization._document(graph)
    with open(path, "wb") as file:
        serialization._write(file, text, arrays)


@pytest.mark.parametrize("step", ["numpy.lib.format.write_array", "os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["full", "interrupt"])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(step, error, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise error

    path = saved(tiny(), tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(step, fails)
    with pytest.raises(type(error)):
        save(path, branching())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    if "write_array" in step:
        with pytest.raises(type(error)):
            write_in_place(path, branching())
        assert path.read_bytes() != before


def test_save_names_what_is_wrong_with_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder '.*nowhere'; make it"):
        save(tmp_path / "nowhere" / "net", tiny())
    with pytest.raises(ValueError, match="folder or a device"):
        save(tmp_path, tiny())
    with pytest.raises(TypeError, match=r"needs an eqfact\.Graph"):
        save(tiny(), tmp_path / "net")


def test_the_file_gets_its_name_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda file: sizes.append(os.fstat(file).st_size))
    path = saved(tiny(), tmp_path)
    assert sizes == [path.stat().st_size]


@pytest.mark.skipif(os.name != "posix", reason="links and modes of POSIX")
def test_a_link_stays_a_link_and_the_mode_is_that_of_any_new_file(tmp_path):
    path, link, plain = saved(branching(), tmp_path), tmp_path / "link", tmp_path / "plain"
    link.symlink_to(path)
    save(link, tiny())
    plain.touch()
    assert link.is_symlink() and description(load(path)) == description(tiny())
    assert path.stat().st_mode == plain.stat().st_mode


# ------------------------------------------------------------------------------------------------ load: no file does harm


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(path, content, compression=zipfile.ZIP_STORED):
    """A zip file of the members given as (name, bytes) pairs, repeated names allowed, checksums right."""
    path.unlink(missing_ok=True)  # a new file: rewriting one in place waits for the disk
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")
        for name, data in content:
            archive.writestr(name, data)
    return path


def rewrite(path, change=lambda document: None, text=None, **arrays):
    """Change the JSON of a file, in place, as text or through ``change``; keyword arrays replace or add members (None removes)."""
    content = members(path)
    document = json.loads(content["graph.json"])
    change(document)
    content["graph.json"] = json.dumps(document).encode() if text is None else text
    for name, data in arrays.items():
        content[f"{name}.npy"] = data
    return pack(path, [(name, data) for name, data in content.items() if data is not None])


def npy(array, **options):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), **options)
    return buffer.getvalue()


def header(descr, shape, data=b"", order="False"):
    text = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def harmless(path, most=2_000_000, **options):
    """The law of load: a graph, or one ValueError in the agreed words, in bounded memory. Returns the graph or the message."""
    tracemalloc.start()
    try:
        return load(path, **options)
    except ValueError as error:
        assert str(error).startswith(f"'{path}' "), error
        assert len(str(error)) < 1000
        return str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most + 100 * os.path.getsize(path), peak


def top(**entries):
    """A change of a document: other entries at the top."""
    return lambda document: document.update(entries)


def fc(**entries):
    """A change of a document: other entries in its first node, 'fc'."""
    return lambda document: document["nodes"][0].update(entries)


def shape(*sizes):
    return top(inputs={"x": sizes})


def node(name, op, *inputs):
    return {"name": name, "op": op, "inputs": inputs}


def more(*nodes):
    """A change of a document: further nodes."""
    return lambda document: document["nodes"].extend(nodes)


def chain(sizes, op, length=1, width=1):
    """A change of a document: another network, a chain of one op, each reading the one before ``width`` times."""
    nodes = [node(f"n{i}", op, *[f"n{i - 1}" if i else "x"] * width) for i in range(length)]
    return top(inputs={"x": sizes}, nodes=nodes, outputs=[nodes[-1]["name"]])


def weight_of(i, code):
    """A change of a document: another weight for the Dense at node ``i``."""
    return lambda document: document["nodes"][i]["op"]["Dense"].update(weight=code)


HOSTILE_JSON = {
    "version 2": (top(version=2, nodes="new"), "' has format version 2, and this eqfact reads versions up to 1; install a newer eqfact"),
    "version 0": (top(version=0), "version 1 or later"),
    "version true": (top(version=True), 'a int under "version", got True'),
    "version text": (top(version="1"), "version"),
    "no version": (lambda d: d.pop("version"), "version"),
    "format": (top(format="onnx"), "format"),
    "no nodes": (lambda d: d.pop("nodes"), "nodes"),
    "outputs unknown": (top(outputs=["nowhere"]), "output 'nowhere' is not a value"),
    "outputs text": (top(outputs="fc"), "outputs"),
    "outputs lists": (top(outputs=[["fc"]]), "list of names"),
    "outputs none": (top(outputs=[]), "at least one"),
    "inputs list": (top(inputs=["x"]), "inputs"),
    "shape text": (top(inputs={"x": "22"}), "input 'x' needs a shape"),
    "shape empty": (shape(), "input 'x' needs a shape"),
    "shape negative": (shape(-2), "input 'x' needs a shape"),
    "shape partly negative": (shape(2, -2), "input 'x' needs a shape"),
    "shape float": (shape(2.0), "input 'x' needs a shape"),
    "shape huge": (shape(10**12), "max_channels=16777216"),
    "shape absurd": (shape(10**40), "value 'x' of shape .* is more than an array can be"),
    "shape too large": (shape(2, 10**10, 10**10), "value 'x' of shape .* is more than an array can be"),
    "shape of many axes": (shape(*[1] * 1000), "value 'x' of shape .* is more than an array can be"),
    "many inputs": (top(inputs={str(i): [10**6] for i in range(20)}), "max_channels"),
    "node is text": (top(nodes=["fc"]), "name"),
    "node name": (fc(name=7), "name"),
    "node name empty": (fc(name=""), "needs a name"),
    "node twice": (more(node("fc", {"ReLU": {}}, "x")), "node 'fc': this name is taken already"),
    "node is an input": (more(node("x", {"ReLU": {}}, "x")), "node 'x': this name is taken already"),
    "node reads unknown": (fc(inputs=["nowhere"]), "node 'fc': reads 'nowhere'"),
    "cycle": (fc(inputs=["out"]), "node 'fc': reads 'out', which is no input and no node before it"),
    "reads nothing": (fc(inputs=[]), "node 'fc': Dense reads one value, got 0"),
    "op of later node": (fc(op="out"), "node 'fc': needs an op, or the name of an earlier node"),
    "op missing": (lambda d: d["nodes"][0].pop("op"), "node 'fc': needs an op"),
    "op number": (fc(op=3), "node 'fc': needs an op"),
    "op is array": (fc(op={"array": "array0"}), "node 'fc': needs an op"),
    "op is grid": (fc(op={"Grid": {"scale": 1.0, "zero_point": 0.0, "qmin": 0, "qmax": 1}}), "node 'fc': needs an op"),
    "op unknown": (fc(op={"os.system": {"command": "false"}}), "node 'fc': .*none of"),
    "op abstract": (fc(op={"Op": {}}), "node 'fc': .*none of"),
    "op twice": (fc(op={"ReLU": {}, "Tanh": {}}), "node 'fc': .*none of"),
    "op empty": (fc(op={}), "node 'fc': .*none of"),
    "fields list": (fc(op={"ReLU": []}), "node 'fc': .*none of"),
    "field unknown": (fc(op={"ReLU": {"slope": 1}}), "node 'fc': .*slope"),
    "field missing": (fc(op={"Clip": {"low": 0}}), "node 'fc': .*high"),
    "field not its own": (fc(op={"ReLU": {"__class__": 1}}), "node 'fc': "),
    "field kind": (fc(op={"LeakyReLU": {"slope": None}}), "node 'fc': "),
    "field huge": (fc(op={"LeakyReLU": {"slope": 10**400}}), "node 'fc': .*too large"),
    "float word": (fc(op={"LeakyReLU": {"slope": {"float": "1_0"}}}), "node 'fc': .*none of"),
    "grid is no grid": (fc(op={"FakeQuantize": {"grid": 1}}), "node 'fc': "),
    "array twice": (weight_of(2, {"array": "array0"}), "node 'out': .*not taken yet"),
    "array unknown": (weight_of(0, {"array": "../array0"}), "node 'fc': .*not taken yet"),
    "array list": (weight_of(0, {"array": ["array0"]}), "node 'fc': .*not taken yet"),
    "array not used": (fc(op={"ReLU": {}}), "no op refers to its members"),
    "arrays swapped": (weight_of(0, {"array": "array2"}), "node "),
    "flatten": (chain([2, 10**6, 10**6], {"Flatten": {}}), "up to value 'n0' of shape .* more than max_channels=16777216 channels"),
    "doubling": (chain([2], {"Concat": {}}, 100, 2), "up to value 'n22' of shape .* max_channels"),
    "upsample": (chain([2, 3], {"Upsample": {"factor": 10**400}}, 2000), "value 'n0' of shape .* is more than"),
    "pad": (chain([2, 3], {"Pad": {"padding": 2**62}}), "value 'n0' of shape .* is more than"),
}


@pytest.mark.parametrize("change, words", HOSTILE_JSON.values(), ids=HOSTILE_JSON)
def test_a_hostile_graph_is_refused_with_the_place_and_the_reason(change, words, tmp_path):
    path = rewrite(saved(tiny(), tmp_path), change)
    message = harmless(path)
    assert isinstance(message, str)
    assert ("is not an eqfact network: " in message) != ("has format version 2" in message)
    with pytest.raises(ValueError, match=words):
        load(path)


HEAD = b'{"format": "eqfact network", "version": 1, "inputs": {"x": [1]}, "outputs": ["x"], '


@pytest.mark.parametrize("text, words", [
    (b"", "line 1 column 1"), (b"{", "line 1 column 2"), (b"[]", "format"), (b"null", "format"), (b"7", "format"), (b'"x"', "format"),
    (b"\xff\xfe", "decode"), (b"[" * 10**6, "recursion"), (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, "recursion"),
    (b"9" * 10**5, "digits|format"),
    (HEAD + b'"nodes": [], "more": NaN}', "holds NaN, which is not JSON"), (HEAD + b'"nodes": [], "more": [-Infinity]}', "holds -Infinity"),
    (HEAD + b'"nodes": [], "nodes": []}', "repeats a key"), (HEAD + b'"nodes": [], "more": {"x": 1, "x": 1}}', "repeats a key"),
    (HEAD + b'"nodes": [{"name": "y", "inputs": ["x"], "op": {"Clip": {"high": ' + b"[" * 400 + b"]" * 400 + b'}}}]}', "node 'y': "),
])
def test_bad_json_is_refused(text, words, tmp_path):
    path = rewrite(saved(tiny(), tmp_path), text=text)
    message = harmless(path)
    assert message.startswith(f"'{path}' is not an eqfact network: ")
    assert re.search(words, message)


def test_max_channels_is_the_limit_itself(tmp_path):
    path = saved(tiny(), tmp_path)
    assert description(load(path, max_channels=2 + 2 + 2 + 1)) == description(tiny())
    with pytest.raises(ValueError, match="max_channels=6"):
        load(path, max_channels=6)


class Executed:
    def __reduce__(self):
        return os.mkdir, (str(EVIL),)


EVIL = Path("eqfact-was-executed")
GOOD = npy(draw(2, 2))
HOSTILE_ARRAYS = {
    "pickled": npy(np.array([Executed()]), allow_pickle=True),
    "pickle alone": pickle.dumps(Executed()),
    "object header": header("|O", "(4,)", bytes(32)),
    "int32": npy(np.zeros(4, np.int32)),
    "complex": npy(np.zeros((2, 2), complex)),
    "big endian": npy(draw(2, 2).astype(">f8")),
    "structured": npy(np.zeros(2, [("a", "<f8"), ("b", "<f8")])),
    "text": b"not an array", "empty": b"", "magic": GOOD[:8], "short": GOOD[:-1], "long": GOOD + b"0",
    "version 2.0": npy(draw(2, 2), version=(2, 0)),
    "fortran": header("<f8", "(2, 2)", bytes(32), "True"),
    "huge": header("<f8", "(1000000, 1000000, 1000000)", bytes(32)),
    "absurd": header("<f8", f"({10**4000},)", bytes(32)),
    "cancelled": header("<f8", f"({10**30}, 0)"),
    "negative": header("<f8", "(-2, -2)", bytes(32)),
    "expression": header("<f8", "(2, __import__('os').mkdir('eqfact-was-executed'))", bytes(32)),
    "nested": header("<f8", "(" * 5000 + "2" + ")" * 5000, bytes(32)),
    "length": GOOD[:8] + b"\x00\x00" + GOOD[10:],
    "not finite": npy(np.full((2, 2), np.nan)),
    "other shape": npy(draw(4)),
    "no size": npy(np.zeros((2, 0))),
    "uint8": npy(np.zeros((2, 2), np.uint8)),
}


@pytest.mark.parametrize("data", HOSTILE_ARRAYS.values(), ids=HOSTILE_ARRAYS)
def test_a_hostile_array_is_refused_and_not_executed(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = rewrite(saved(tiny(), tmp_path), array0=data)
    words = r"its member array0\.npy (is no array|declares float64 of shape)|node 'fc': Dense weight|Maximum allowed dimension"
    assert re.search(f"is not an eqfact network: ({words})", harmless(path))
    assert not EVIL.exists()


def test_planted_the_pickled_array_would_have_been_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = rewrite(saved(tiny(), tmp_path), array0=HOSTILE_ARRAYS["pickled"])
    with np.load(path, allow_pickle=True) as content:
        assert content["array0"].shape == (1,)
    assert EVIL.exists()


def test_planted_without_the_limit_on_channels_the_memory_law_fails(tmp_path):
    path = pack(tmp_path / "net", [("graph.json", members(saved(eq.Graph.chain((2,), act=eq.ReLU()), tmp_path))["graph.json"])])
    rewrite(path, chain([2, 1000, 1000], {"Flatten": {}}))
    assert "max_channels" in harmless(path, max_channels=10**6)
    with pytest.raises(AssertionError):
        harmless(path, max_channels=10**7)


@pytest.mark.parametrize("op", [{"Transpose": {"axes": [1, 0, 2]}}, {"Transpose": {"axes": [0, 2, 1]}}, {"Pad": {"padding": 9**6}},
                                {"Upsample": {"factor": 9**3}}, {"Softmax": {"axis": 3}}, {"MaxPool": {"kernel": 9**5}}], ids=str)
def test_many_pixels_cost_nothing(op, tmp_path):
    """A label is kept for each channel, however large the value is over space."""
    path = pack(tmp_path / "net", [("graph.json", members(saved(eq.Graph.chain((2,), act=eq.ReLU()), tmp_path))["graph.json"])])
    assert isinstance(harmless(rewrite(path, chain([2, 10**5, 10**5], op))), eq.Graph)


def test_members_must_be_the_right_ones_each_once(tmp_path):
    path = saved(tiny(), tmp_path)
    good = list(members(path).items())
    for wrong in ([], good[1:], [*good, good[0]], [*good, good[1]], [*good, ("../../evil", b"")], [*good, ("/array3.npy", GOOD)],
                  [*good, ("array4.npy", GOOD)], [*good, ("array03.npy", GOOD)], [*good, ("folder/", b"")]):
        assert "its members must be" in harmless(pack(path, wrong))
    assert "node 'out': 'array2' is no array that is not taken yet" in harmless(pack(path, good[:-1]))
    assert "no op refers to its members ['array3.npy']" in harmless(pack(path, [*good, ("array3.npy", GOOD)]))
    assert description(load(pack(path, reversed(good)))) == description(tiny())  # packed again by another tool


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_bomb_is_refused_unopened(method, tmp_path):
    path = saved(tiny(), tmp_path)
    content = {**members(path), "array0.npy": header("<f8", "(2000000,)", bytes(16_000_000))}
    pack(path, content.items(), method)
    assert path.stat().st_size < 100_000
    assert "is compressed" in harmless(path)


def test_members_that_overlap_or_claim_more_than_the_file_are_refused(tmp_path):
    """One stretch of zeros named by many directory entries, and one entry with sizes of gigabytes."""
    path = saved(tiny(), tmp_path)
    rewrite(path, array0=bytes(30_000))
    raw = path.read_bytes()
    entry = raw.rindex(b"PK\1\2", 0, raw.rindex(b"array0.npy"))
    for size in (b"\xff\xff\xff\x7f", b"\xf0\xff\xff\xff"):
        path.write_bytes(raw[:entry + 20] + size + size + raw[entry + 28:])
        assert "claim" in harmless(path)
        path.write_bytes(raw[:entry + 20] + size + raw[entry + 24:])
        assert "damaged" in harmless(path)
    first = raw.index(b"array0.npy") - 30
    start, end = raw.rindex(b"PK\1\2", 0, raw.rindex(b"graph.json")), raw.rindex(b"PK\5\6")
    entries = raw[start:raw.index(b"PK\1\2", start + 4)]
    for i in range(50):
        one = bytearray(raw[entry:entry + 46] + f"array{i}.npy".encode())
        one[28:30], one[42:46] = struct.pack("<H", len(one) - 46), struct.pack("<I", first)
        entries += bytes(one)
    path.write_bytes(raw[:start] + entries + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 51, 51, len(entries), start, 0))
    assert "claim" in harmless(path) and len(raw) > end


def test_what_is_no_zip_or_no_file(tmp_path):
    path = tmp_path / "net"
    for content in (b"", b"PK", b"PK\3\4", b"PK\5\6" + bytes(18), b"PK\5\6" + b"\xff" * 18, GOOD, random.Random(1).randbytes(1000)):
        path.write_bytes(content)
        assert "is not an eqfact network" in harmless(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere")
    with pytest.raises(IsADirectoryError):
        load(tmp_path)
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    with pytest.raises(ValueError, match=r"members must be graph\.json"):
        load(tmp_path / "other.npz")


# ------------------------------------------------------------------------------------------------ fuzz


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    path = saved(tiny(), tmp_path)
    for length in reversed(range(path.stat().st_size)):
        os.truncate(path, length)
        with pytest.raises(ValueError, match="is not an eqfact network"):
            load(path)


def test_any_byte_changed_gives_the_same_network_or_a_refusal(tmp_path):
    path = saved(tiny(), tmp_path)
    raw, same, rng = path.read_bytes(), description(tiny()), random.Random(7)
    kept = 0
    with open(path, "r+b", buffering=0) as file:
        for i, old in enumerate(raw):
            for new in {old ^ 1 << rng.randrange(8), 0, 255} - {old}:
                file.seek(i)
                file.write(bytes([new]))
                try:
                    assert description(load(path)) == same
                    kept += 1
                except ValueError as error:
                    assert str(error).startswith(f"'{path}' is not an eqfact network: ")
            file.seek(i)
            file.write(bytes([old]))
    assert 0 < kept < len(raw)  # dates and the like may change


def test_planted_without_the_checksum_a_changed_weight_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile.ZipExtFile, "_update_crc", lambda self, data: None)
    with pytest.raises(AssertionError):
        test_any_byte_changed_gives_the_same_network_or_a_refusal(tmp_path)


ATOMS = st.sampled_from([None, True, -1, 0, 2, 3, 10**18, 10**30, 0.5, 1e300, "x", "fc", "act", "", [], {}, [2], [[1, 0]],
                         ["x"], ["x", "fc"], {"array": "array0"}, {"array": "array1"}, {"float": "inf"}, {"float": "nan"},
                         *({known: {}} for known in serialization.KNOWN), {"Clip": {"low": -1, "high": {"float": "inf"}}},
                         {"Pad": {"padding": 10**9}}, {"Upsample": {"factor": 10**5}}, {"Slice": {"start": 0, "stop": 1}}])


@cache
def whole(make, folder):
    """The members of a good file, saved once."""
    return tuple(members(saved(make(), folder)).items())


def spots(code):
    """Every (container, key) of a JSON document."""
    for key, value in list(code.items() if isinstance(code, dict) else enumerate(code)):
        yield code, key
        if isinstance(value, (dict, list)):
            yield from spots(value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mutation_of_the_json_gives_a_network_or_a_refusal(tmp_path, data):
    make = data.draw(st.sampled_from([tiny, branching, quantized]))
    content = dict(whole(make, tmp_path))
    document = json.loads(content["graph.json"])
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(list(spots(document))))
        action = data.draw(st.sampled_from(["replace", "delete", "repeat", "swap"]))
        if action == "delete":
            del container[key]
        elif action == "repeat" and isinstance(container, list):
            container.append(container[key])
        elif action == "swap":
            other, place = data.draw(st.sampled_from(list(spots(document))))
            if not isinstance(other[place], (dict, list)) and not isinstance(container[key], (dict, list)):
                container[key], other[place] = other[place], container[key]
        else:
            container[key] = json.loads(json.dumps(data.draw(ATOMS)))
    content["graph.json"] = json.dumps(document).encode()
    result = harmless(pack(tmp_path / "net", content.items()))
    if isinstance(result, eq.Graph):
        save(tmp_path / "again", result)
        assert description(load(tmp_path / "again")) == description(result)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_overwritten_moved_or_cut_out_do_no_harm(tmp_path, data):
    path = pack(tmp_path / "net", whole(tiny, tmp_path))
    raw = bytearray(path.read_bytes())
    # what is most fragile, the directory of the zip file, lies at the end
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.one_of(st.integers(0, len(raw)), st.integers(max(0, len(raw) - 300), len(raw))))
        length = data.draw(st.sampled_from([0, 1, 2, 4, 8, 100]))
        raw[start:start + length] = data.draw(st.one_of(st.binary(max_size=9), st.just(b"\xff" * length), st.just(b"\0" * length)))
    path.unlink()
    path.write_bytes(bytes(raw))
    result = harmless(path)
    assert isinstance(result, str) or description(result) == description(tiny())


def test_several_files_are_made_beside_where_they_go(tmp_path, monkeypatch):
    """A folder of the system's own may be on another disk, from which nothing moves in one step."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    write_all({str(tmp_path / name): lambda path, name=name: Path(path).write_text(name) for name in "ab"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "a", "b": "b"}
