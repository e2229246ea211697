"""How does the network in a package become an ONNX file, and a torch module to check it against?

A family of networks each: MobileNets, whose checkpoints are arrays alone, in order of execution; MTCNN's, Keras' arrays in a list; and
what Keras wrote with its layers (`keras_files.py`). Every family has `weights`, by the package's own names and in the layout of ONNX and
PyTorch, `to_onnx` and `to_torch`. Batch normalization stays unfolded, ReLU6 is Clip(0, 6), the batch dimension is free.
"""

from __future__ import annotations

import io
import math
import pickle
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks import keras_files, packages

Array = NDArray[np.float32]
Weights = dict[str, Array]

OPSET, IR_VERSION = 17, 8  # a pair that all runtimes of recent years read


@dataclass(frozen=True)
class Source:
    """One network: its package, the file in it, the normalisation of pixels 0..255, and its layers."""

    requirement: str
    member: str
    size: int
    outputs: tuple[str, ...]
    imagenet: bool = False  # its logits are of ImageNet's classes
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)  # mtcnn/utils/images.py
    std: tuple[float, float, float] = (128.0, 128.0, 128.0)
    # MobileNets: (expansion, channels, repeats, stride, depthwise kernel), as in Sandler et al. 2018, table 2
    stages: tuple[tuple[int, int, int, int, int], ...] = ()
    eps: float = 1e-5
    same: bool = False  # TensorFlow's SAME padding: an odd pixel goes after
    # MTCNN: (padding, kernel) of the pooling after each convolution
    pools: tuple[tuple[str, int] | None, ...] = ()

    @property
    def keras(self) -> bool:
        """Whether the package holds a description of the layers, beside the weights."""
        return not self.pools and not self.stages



def weights(source: Source) -> Weights:
    """The trained arrays by the package's own names, in order of execution, in the layout of ONNX and PyTorch."""
    return _of_family(source, _checkpoint, _mtcnn_weights, _keras_weights)(source)


def to_onnx(source: Source, name: str) -> onnx.ModelProto:
    net, arrays = Nodes(), weights(source)
    widths = _of_family(source, _mobilenet_onnx, _mtcnn_onnx, _keras_onnx)(source, net, arrays)
    return _onnx_model(name, source.size, net, arrays, dict(zip(source.outputs, widths, strict=True)))


def to_torch(source: Source) -> Any:
    """A torch.nn.Module in evaluation mode; its weights come from the package, not the ONNX file."""
    import torch

    module, arrays = _of_family(source, _mobilenet_torch, _mtcnn_torch, _keras_torch)(source), weights(source)
    slots = [slot for key, slot in module.state_dict().items() if not key.endswith("num_batches_tracked")]
    for slot, value in zip(slots, arrays.values(), strict=True):  # both in order of execution
        slot.copy_(torch.from_numpy(value).reshape(slot.shape))
    return module.eval()


def reference(source: Source, x: Array) -> list[Array]:
    """The outputs in numpy, by the source's own order of axes; none where that is ONNX's."""
    if source.keras:
        return [keras_files.forward(*_keras_file(source), x)]
    return _mtcnn_reference(source, x) if source.pools else []


def _of_family(source: Source, mobilenet: Any, mtcnn: Any, keras: Any) -> Any:
    return keras if source.keras else mtcnn if source.pools else mobilenet


def _read(source: Source) -> bytes:
    return packages.read(source.requirement, [source.member])[0]


def _checkpoint(source: Source) -> Weights:
    """A torch checkpoint's arrays, by torch's restricted reader."""
    import torch

    state = torch.load(io.BytesIO(_read(source)), map_location="cpu", weights_only=True)
    return {key: value.numpy() for key, value in state.items() if not key.endswith("num_batches_tracked")}


def _keras_arrays(source: Source) -> list[Array]:
    """A Keras weight list, layer by layer: kernel (height, width, in, out) or (in, out), bias, PReLU slope."""
    import lz4.frame

    return _joblib_arrays(lz4.frame.decompress(_read(source)))


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


# Writing ONNX: every node gives one value, named like the node --------------------------------------------------------

class Nodes(list[onnx.NodeProto]):
    def add(self, op: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name


def _onnx_model(name: str, size: int, nodes: Nodes, arrays: Weights, outputs: dict[str, int]) -> onnx.ModelProto:
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


def _units(source: Source) -> list[Unit]:
    width = 32
    units = [Unit(3, width, kernel=3, stride=2)]
    for expansion, channels, repeats, first, kernel in source.stages:
        for stride in [first] + [1] * (repeats - 1):
            hidden = width * expansion
            block = [Unit(width, hidden)] if expansion > 1 else []
            block += [Unit(hidden, hidden, kernel, stride, groups=hidden), Unit(hidden, channels, clip=False)]
            if stride == 1 and width == channels:
                block[0], block[-1] = block[0]._replace(opens=True), block[-1]._replace(closes=True)
            units += block
            width = channels
    return units + [Unit(width, 1280)]


def _mobilenet_onnx(source: Source, net: Nodes, arrays: Weights) -> list[int]:
    layers = iter(dict.fromkeys(key.rpartition(".")[0] for key in arrays))  # conv, bn, conv, bn, ..., perhaps fc
    x = shortcut = "image"
    for unit in _units(source):
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
        return [1280]
    fc = next(layers)
    net.add("Gemm", "logits", x, f"{fc}.weight", f"{fc}.bias", transB=1)
    return [len(arrays[f"{fc}.bias"])]


def _mobilenet_torch(source: Source) -> Any:
    from torch import nn


    def layers(unit: Unit) -> nn.Sequential:
        k, odd = unit.kernel, source.same and unit.stride == 2  # SAME pads k - 2 pixels there, as all sizes are even
        before = [nn.ZeroPad2d(((k - 2) // 2, (k - 1) // 2) * 2)] if odd else []
        around = 0 if odd else k // 2
        conv = nn.Conv2d(unit.fan_in, unit.fan_out, k, unit.stride, around, groups=unit.groups, bias=False)
        return nn.Sequential(*before, conv, nn.BatchNorm2d(unit.fan_out, source.eps), *[nn.ReLU6()] * unit.clip)

    class MobileNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plan = _units(source)
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

def _mtcnn_weights(source: Source) -> Weights:
    """Keras' arrays with ONNX's axes.

    The source flattens (width, height, channel). The columns of the first dense layer are permuted here, once, to
    (channel, height, width), so that a plain Flatten stands before it.
    """
    arrays, named, dense = iter(_keras_arrays(source)), {}, len(source.pools) + 1
    for i in range(1, dense):
        named[f"conv{i}.weight"] = next(arrays).transpose(3, 2, 0, 1)
        named[f"conv{i}.bias"] = next(arrays)
        named[f"prelu{i}.weight"] = next(arrays).reshape(-1, 1, 1)
    channels, kernel = named[f"conv{dense - 1}.bias"].size, next(arrays)
    side = math.isqrt(len(kernel) // channels)
    kernel = kernel.reshape(side, side, channels, -1).transpose(3, 2, 1, 0)
    named[f"fc{dense}.weight"] = kernel.reshape(len(kernel), -1)
    named[f"fc{dense}.bias"], named[f"prelu{dense}.weight"] = next(arrays), next(arrays)
    for output in source.outputs:
        named[f"{output}.weight"], named[f"{output}.bias"] = next(arrays).T, next(arrays)
    return {key: np.array(value, order="C") for key, value in named.items()}


def _mtcnn_onnx(source: Source, net: Nodes, arrays: Weights) -> list[int]:
    x = "image"
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
    return [arrays[f"{output}.bias"].size for output in source.outputs]


def _mtcnn_torch(source: Source) -> Any:
    from torch import nn

    arrays, trunk = weights(source), nn.Sequential()

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


def _mtcnn_reference(source: Source, x: Array) -> list[Array]:
    """The source's own forward in numpy, without torch or ONNX: channels last, height and width swapped to flatten."""
    windows, arrays = np.lib.stride_tricks.sliding_window_view, iter(_keras_arrays(source))
    x = x.transpose(0, 2, 3, 1)
    for pool in source.pools:
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


# What Keras wrote -----------------------------------------------------------------------------------------------------

@cache
def _keras_file(source: Source) -> tuple[list[keras_files.Layer], Weights]:
    if source.member.endswith(".h5"):
        return keras_files.hdf5(_read(source))
    model, = packages.read(source.requirement, [f"{source.member}/model.min.js"])
    shards = [f"{source.member}/{path}.min.js" for path in keras_files.shards(model)]
    return keras_files.tensorflow_js(model, packages.read(source.requirement, shards))


def _keras_weights(source: Source) -> Weights:
    return keras_files.weights(*_keras_file(source))


def _keras_onnx(source: Source, net: Nodes, arrays: Weights) -> list[int]:
    layers, _ = _keras_file(source)
    keras_files.write(net, layers, arrays, *source.outputs)
    return [len(arrays[f"{layers[-1].name}.bias"])]


def _keras_torch(source: Source) -> Any:
    return keras_files.torch_module(_keras_file(source)[0], weights(source))
