"""Does every broken ONNX file end in one clear error, or in a network, within two seconds and a gigabyte?

Seeded, so that it can be run again. The files are
those of onnx's own tests of single operators, and small networks, changed at random: bytes of the file, or what they say
(sizes, attributes, types, names, op types, constants, external data). Each is read by :func:`eqfact.onnx.load` in another process, which is
watched from outside.

    python -m benchmarks fuzz --count 20000 --seed 0
"""

from __future__ import annotations

import argparse
import glob
import multiprocessing
import os
import resource
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

#: What one file may take.
SECONDS, GIBIBYTES = 2.0, 1.0
#: Whole numbers that break things.
EXTREME = (0, -1, 1, 2, 3, 7, 2**16, 2**31 - 1, -(2**31), 2**33, 2**62, -(2**63))
NUMBERS = (0.0, -1.0, 1e-45, 1e38, float("inf"), float("nan"))


def corpus() -> list[bytes]:
    """Files of operators from onnx's own tests, by name, and networks of several nodes."""
    root = os.path.join(os.path.dirname(onnx.__file__), "backend", "test", "data")
    found = [Path(path).read_bytes() for path in sorted(glob.glob(os.path.join(root, "*", "*", "model.onnx")))]
    return [data for data in found if len(data) < 20000] + [networks().SerializeToString()] * (len(found) // 4)


def networks() -> onnx.ModelProto:
    """Convolutions, BatchNormalization, moves, shapes out of shapes, a residual, a dense head."""
    rng = np.random.default_rng(0)
    node = helper.make_node
    nodes = [node("Conv", ["x", "w", "b"], ["c"], pads=[1] * 4, name="conv"), node("BatchNormalization", ["c", *["one"] * 4], ["n"]),
             node("Clip", ["n", "low", "high"], ["r"]), node("Conv", ["r", "v"], ["d"], group=2), node("Add", ["r", "d"], ["a"]),
             node("MaxPool", ["a"], ["p"], kernel_shape=[2, 2], strides=[2, 2]), node("Shape", ["p"], ["s"]),
             node("Gather", ["s", "zero"], ["batch"]), node("Concat", ["batch", "rest"], ["shape"], axis=0),
             node("Reshape", ["p", "shape"], ["f"]), node("Transpose", ["f"], ["t"], perm=[0, 1]), node("Gemm", ["t", "u", "k"], ["g"]),
             node("Softmax", ["g"], ["y"]), node("ConstantOfShape", ["size"], ["ones"]), node("Expand", ["ones", "size"], ["wide"]),
             node("Mul", ["y", "wide"], ["z"])]
    arrays = {"w": rng.normal(size=(4, 3, 3, 3)), "b": rng.normal(size=4), "one": np.ones(4), "low": np.array(0.0), "high": np.array(6.0),
              "v": rng.normal(size=(4, 2, 1, 1)), "u": rng.normal(size=(16, 5)), "k": rng.normal(size=5)}
    integers = {"zero": [0], "rest": [-1], "size": [5]}
    tensors = [onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()]
    tensors += [onnx.numpy_helper.from_array(np.array(a, np.int64), n) for n, a in integers.items()]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", ["N", 3, 4, 4]), ("z", ["N", 5]))]
    graph = helper.make_graph(nodes, "net", infos[:1], infos[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def broken(data: bytes, rng: np.random.Generator) -> bytes:
    """The file with one to four changes."""
    if rng.random() < 0.35:
        return _bytes(bytearray(data), rng)
    model = onnx.ModelProto.FromString(data)
    for _ in range(rng.integers(1, 5)):
        changes = (_attribute, _dimension, _constant, _name, _kind, _type, _opset, _external, _huge, _loop)
        changes[rng.integers(len(changes))](model, rng)
    try:
        return bytes(model.SerializeToString())
    except ValueError:
        return data[:len(data) // 2]


def _bytes(data: bytearray, rng: np.random.Generator) -> bytes:
    for _ in range(rng.integers(1, 9)):
        at = int(rng.integers(len(data)))
        what = rng.integers(4)
        if what == 0:
            data[at] = int(rng.integers(256))
        elif what == 1:
            del data[at:at + int(rng.integers(1, 9))]
        elif what == 2:
            data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        else:
            data = data[:max(1, at)] if rng.random() < 0.2 else data
        if not data:
            return b""
    return bytes(data)


def _pick(items: object, rng: np.random.Generator) -> object:
    found = list(items)  # type: ignore[call-overload]
    return found[rng.integers(len(found))] if found else None


def _attribute(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    node = _pick(model.graph.node, rng)
    attribute = _pick(node.attribute, rng) if node is not None else None  # type: ignore[attr-defined]
    if attribute is None:
        return
    extreme = int(EXTREME[rng.integers(len(EXTREME))])
    if attribute.ints:
        attribute.ints[rng.integers(len(attribute.ints))] = extreme
        if rng.random() < 0.3:
            attribute.ints.append(extreme)
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = extreme
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = NUMBERS[rng.integers(len(NUMBERS))]
    elif attribute.type == onnx.AttributeProto.STRING:
        attribute.s = [b"", b"\xff\xfe", b"SAME_UPPER", b"reflect"][rng.integers(4)]


def _dimension(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    info = _pick([*model.graph.input, *model.graph.output], rng)
    dim = _pick(info.type.tensor_type.shape.dim, rng) if info is not None else None  # type: ignore[attr-defined]
    if dim is not None:
        dim.dim_value = int(EXTREME[rng.integers(len(EXTREME))])


def _constant(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    tensor = _pick(model.graph.initializer, rng)
    if tensor is None:
        return
    what = rng.integers(3)
    if what == 0 and tensor.dims:
        tensor.dims[rng.integers(len(tensor.dims))] = int(EXTREME[rng.integers(len(EXTREME))])
    elif what == 1 and tensor.data_type == TensorProto.INT64 and tensor.raw_data:
        values = np.frombuffer(tensor.raw_data, np.int64).copy()
        if values.size:
            values[rng.integers(len(values))] = EXTREME[rng.integers(len(EXTREME))]
            tensor.raw_data = values.tobytes()
    elif what == 2:
        tensor.data_type = int(rng.integers(0, 24))


def _name(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    node, other = _pick(model.graph.node, rng), _pick(model.graph.node, rng)
    if node is None or not node.input or not other.output:  # type: ignore[attr-defined]
        return
    node.input[rng.integers(len(node.input))] = ["", "nothing", other.output[0], node.output[0]][rng.integers(4)]  # type: ignore[attr-defined]


def _kind(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    node = _pick(model.graph.node, rng)
    if node is not None:
        node.op_type = _pick([s.name for s in onnx.defs.get_all_schemas() if s.domain == ""], rng)  # type: ignore[attr-defined]


def _type(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    info = _pick(model.graph.input, rng)
    if info is not None:
        info.type.tensor_type.elem_type = int(rng.integers(0, 24))  # type: ignore[attr-defined]


def _opset(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    for standard in model.opset_import:
        standard.version = int(rng.choice([6, 7, 9, 11, 12, 13, 17, 21]))


def _external(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    tensor = _pick(model.graph.initializer, rng)
    if tensor is not None:
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", ["a\0b", "../x", "", "x" * 5000, "net.onnx"][rng.integers(5)]),
                           ("offset", str(EXTREME[rng.integers(len(EXTREME))])), ("length", "many")):
            tensor.external_data.add(key=key, value=value)


def _huge(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Constants that ask for more than there is."""
    size = helper.make_tensor("huge", TensorProto.INT64, [2], [int(rng.choice([2**14, 2**20, 2**40]))] * 2)
    node = [helper.make_node("ConstantOfShape", ["huge"], ["much"]), helper.make_node("Tile", ["huge", "huge"], ["much"]),
            helper.make_node("Range", ["huge", "huge", "huge"], ["much"]),
            helper.make_node("RandomNormal", [], ["much"], shape=[2**20, 2**20]),
            helper.make_node("EyeLike", ["huge"], ["much"])][rng.integers(5)]
    if not any("much" in n.output for n in model.graph.node):
        model.graph.initializer.append(size)
        model.graph.node.insert(0, node)
        victim = _pick(model.graph.node, rng)
        if victim.input:  # type: ignore[attr-defined]
            victim.input[len(victim.input) - 1] = "much"  # type: ignore[attr-defined]


def _loop(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """A loop of a thousand million turns on constants."""
    if any("looped" in n.output for n in model.graph.node):
        return
    body = helper.make_graph([helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["a", "a"], ["s"])], "body", [
        helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        helper.make_tensor_value_info("a", TensorProto.FLOAT, [])], [
        helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("s", TensorProto.FLOAT, [])])
    model.graph.initializer.extend([helper.make_tensor("turns", TensorProto.INT64, [], [10**9]),
                                    helper.make_tensor("start", TensorProto.FLOAT, [], [0.0])])
    model.graph.node.insert(0, helper.make_node("Loop", ["turns", "", "start"], ["looped"], body=body))
    victim = _pick(model.graph.node, rng)
    if victim.input and victim.op_type != "Loop":  # type: ignore[attr-defined]
        victim.input[0] = "looped"  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------------------------------
# Reading them

def _reader(pipe: Connection, folder: str) -> None:
    """In a process of its own: read each file that comes, and say how that ended."""
    import eqfact.onnx
    warnings.simplefilter("error")
    path = os.path.join(folder, f"{os.getpid()}.onnx")
    while True:
        try:
            data = pipe.recv_bytes()
        except EOFError:
            return
        Path(path).write_bytes(data)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        try:
            eqfact.onnx.load(path)
            verdict = "network"
        except eqfact.onnx.OnnxError as error:
            text = str(error)
            verdict = "error" if text.startswith(f"{path}: ") and "\n" not in text and len(text) < 3000 else f"unclear: {text[:300]}"
        except BaseException as error:
            verdict = f"raw {type(error).__name__}: {str(error)[:300]}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
        pipe.send((verdict, time.perf_counter() - start, grown))


def outcomes(count: int, seed: int) -> Iterator[tuple[int, str, float, float]]:
    """Number, verdict, seconds and GiB of each file."""
    files = corpus()
    with tempfile.TemporaryDirectory() as folder:
        process = pipe = None
        for number in range(count):
            rng = np.random.default_rng([seed, number])
            data = broken(files[rng.integers(len(files))], rng)
            if process is None:
                pipe, end = multiprocessing.Pipe()
                process = multiprocessing.get_context("spawn").Process(target=_reader, args=(end, folder), daemon=True)
                process.start()
                pipe.send_bytes(files[0])
                pipe.recv()  # it has imported everything
            assert pipe is not None
            pipe.send_bytes(data)
            if pipe.poll(5 * SECONDS):
                try:
                    verdict, seconds, grown = pipe.recv()
                    yield number, verdict, seconds, grown
                    if grown < GIBIBYTES:
                        continue
                except EOFError:
                    yield number, "crash", 0.0, 0.0
            else:
                yield number, "hangs", 5 * SECONDS, 0.0
            process.kill()
            process = None


def main(argv: list[str]) -> int:
    """Print what is wrong, and a count of all verdicts; 1 if anything is wrong."""
    parser = argparse.ArgumentParser("python -m benchmarks fuzz", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    found: Counter[str] = Counter()
    slowest = largest = 0.0
    for number, verdict, seconds, grown in outcomes(args.count, args.seed):
        slowest, largest = max(slowest, seconds), max(largest, grown)
        wrong = verdict not in ("network", "error") or seconds > SECONDS or grown > GIBIBYTES
        found["wrong" if wrong else verdict] += 1
        if wrong:
            print(f"file {number}: {verdict[:160]} ({seconds:.1f} s, {grown:.2f} GiB)", flush=True)
    print(f"{args.count} files, seed {args.seed}: {dict(found)}; slowest {slowest:.2f} s, largest {largest:.2f} GiB")
    return int(found["wrong"] > 0)
