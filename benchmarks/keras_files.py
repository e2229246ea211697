"""Which network does a Keras file describe? Its layers node by node, its arrays, and three forwards of them: ONNX, torch, numpy.

Two kinds of file: Keras' own HDF5 (needs h5py), and TensorFlow.js' layers-model, as npm packages wrap it in JavaScript. Both name every
layer, what it reads, and its arrays, channels last. ONNX and torch get arrays in their own layout; `forward` computes in Keras' layout,
from the arrays as they are in the file, so that a wrong transposition shows. The last softmax is left off: logits.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from benchmarks.converting import Nodes

Array = NDArray[np.float32]
Weights = dict[str, Array]


@dataclass(frozen=True)
class Layer:
    """What computes ``name`` from ``inputs``; "image" is what the network is given."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    config: Mapping[str, Any]

    @property
    def activation(self) -> str:
        if self.kind == "ReLU":
            if self.config["max_value"] != 6 or self.config.get("negative_slope") or self.config.get("threshold"):
                raise ValueError(f"layer {self.name!r}: expected ReLU6, found {self.config}")
            return "relu6"
        return self.config.get("activation", "linear")

    @property
    def window(self) -> tuple[tuple[int, int], tuple[int, int], bool]:
        """Size, strides, and whether borders are padded so that only strides make the image smaller."""
        if self.config.get("dilation_rate", [1, 1]) != [1, 1]:
            raise ValueError(f"layer {self.name!r}: dilated")
        size = tuple(self.config.get("kernel_size") or self.config["pool_size"])
        return size, tuple(self.config["strides"]), self.config["padding"] == "same" and max(size) > 1


# Reading --------------------------------------------------------------------------------------------------------------

def hdf5(data: bytes) -> tuple[list[Layer], Weights]:
    """The layers of Keras' HDF5, and its arrays as ``layer/array``."""
    import h5py

    arrays: Weights = {}

    def visit(path: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays["/".join(path.split("/")[-2:])] = item[()]

    with h5py.File(io.BytesIO(data)) as file:
        file["model_weights"].visititems(visit)
        return _layers(json.loads(file.attrs["model_config"])), arrays


def tensorflow_js(model: bytes, shards: list[bytes]) -> tuple[list[Layer], Weights]:
    """The same of a layers-model. Arrays stored in fewer bits are what TensorFlow.js makes of them: whole numbers * scale + min."""
    content = b"".join(base64.b64decode(max(re.findall(rb'"([\w+/=]+)"', shard), key=len)) for shard in shards)
    description, arrays, at = _object(model), {}, 0
    for entry in description["weightsManifest"][0]["weights"]:
        how, count = entry.get("quantization", {}), math.prod(entry["shape"])
        values = np.frombuffer(content, how.get("dtype", entry["dtype"]), count, at)
        at += values.nbytes
        values = values * float(how["scale"]) + how["min"] if how else values
        layer, kind = entry["name"].split("/")
        arrays[f"{layer}/{kind.removeprefix('depthwise_')}"] = values.astype(np.float32).reshape(entry["shape"])
    return _layers(description["modelTopology"]["model_config"]), arrays


def shards(model: bytes) -> list[str]:
    """The files that hold a layers-model's arrays."""
    return list(_object(model)["weightsManifest"][0]["paths"])


def _object(script: bytes) -> Any:
    """The object that a minified script exports: names in quotes, !0 and !1 in words, and a zero before bare points make it JSON."""
    def token(match: re.Match[str]) -> str:
        text, name, flag, sign = match.groups()
        return text or (f'"{name}":' if name else {"!0": "true", "!1": "false"}.get(flag) or f"{sign}0.")

    literal = script.decode()[script.index(b"{modelTopology:"):]
    literal = re.sub(r'("(?:[^"\\]|\\.)*")|\b([A-Za-z_]\w*):|(![01])|(?<![\d.])(-?)\.(?=\d)', token, literal)
    return json.JSONDecoder().raw_decode(literal)[0]


def _layers(model: Mapping[str, Any], image: str = "image") -> list[Layer]:
    """Layers in order of execution; models among them are opened, and what does nothing after training is left out."""
    found: list[Layer] = []
    instead: dict[str, str] = {}
    for entry in model["config"]["layers"]:
        kind, config = entry["class_name"], entry["config"]
        inputs = tuple(instead.get(name, name) for name in _producers(entry["inbound_nodes"]))
        if kind == "InputLayer":
            instead[config["name"]] = image
        elif kind == "Dropout":
            instead[config["name"]], = inputs
        elif "layers" in config:
            found += _layers(entry, *inputs)
            instead[config["name"]] = found[-1].name
        else:
            found.append(Layer(kind, config["name"], inputs, config))
    return found


def _producers(inbound: Any) -> Iterator[str]:
    """Names of the layers read: every list [name, 0, 0, ...] within, be it Keras 2's or Keras 3's."""
    if isinstance(inbound, list) and len(inbound) > 2 and isinstance(inbound[0], str):
        yield inbound[0]
    elif isinstance(inbound, list | dict):
        for part in inbound.values() if isinstance(inbound, dict) else inbound:
            yield from _producers(part)


# Forwards -------------------------------------------------------------------------------------------------------------

def weights(layers: list[Layer], arrays: Weights) -> Weights:
    """The arrays in order of execution, in the layout and by the names of ONNX and PyTorch."""
    axes = {"Conv2D": (3, 2, 0, 1), "DepthwiseConv2D": (2, 3, 0, 1), "Dense": (1, 0)}
    found: Weights = {}
    for layer in layers:
        own = {key: arrays.get(f"{layer.name}/{key}") for key in ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance")}
        if layer.kind == "BatchNormalization":
            gamma = np.ones_like(own["beta"]) if own["gamma"] is None else own["gamma"]  # trained without a scale
            parts = {"weight": gamma, "bias": own["beta"], "running_mean": own["moving_mean"], "running_var": own["moving_variance"]}
        else:
            kernel = own["kernel"]
            parts = {"weight": None if kernel is None else np.ascontiguousarray(kernel.transpose(axes[layer.kind])), "bias": own["bias"]}
        found |= {f"{layer.name}.{part}": value for part, value in parts.items() if value is not None}
    return found


def write(net: Nodes, layers: list[Layer], arrays: Weights, output: str) -> None:
    """ONNX nodes of all layers; padding by itself goes into the convolution that reads it, as exporters have it."""
    padded: dict[str, tuple[str, list[int]]] = {}
    for layer in layers:
        (x, *_), name = layer.inputs, output if layer is layers[-1] else layer.name
        x, pads = padded.get(x, (x, [0] * 4))
        own = [f"{layer.name}.{part}" for part in ("weight", "bias", "running_mean", "running_var") if f"{layer.name}.{part}" in arrays]
        attributes: dict[str, Any] = {}
        if "strides" in layer.config:
            size, strides, same = layer.window
            attributes = {"kernel_shape": size, "strides": strides, **({"auto_pad": "SAME_UPPER"} if same else {"pads": pads})}
        acts = layer.kind not in ("ReLU", "Activation") and layer.activation not in ("linear", "softmax")
        y = f"{name}.sum" if acts else name
        match layer.kind:
            case "Conv2D" | "DepthwiseConv2D":
                group = len(arrays[own[0]]) if layer.kind == "DepthwiseConv2D" else 1
                net.add("Conv", y, x, *own, group=group, **attributes)
            case "BatchNormalization":
                net.add("BatchNormalization", y, x, *own, epsilon=layer.config["epsilon"])
            case "MaxPooling2D":
                net.add("MaxPool", y, x, **attributes)
            case "AveragePooling2D":
                net.add("AveragePool", y, x, count_include_pad=0, **attributes)
            case "GlobalAveragePooling2D":
                net.add("Flatten", y, net.add("GlobalAveragePool", f"{name}.mean", x))
            case "Flatten":  # of one pixel, so that no axes have to change places; the check would show it
                net.add("Flatten", y, x)
            case "Dense":
                net.add("Gemm", y, x, *own, transB=1)
            case "Add":
                net.add("Add", y, *layer.inputs)
            case "Concatenate":
                net.add("Concat", y, *layer.inputs, axis=1)
            case "ZeroPadding2D":
                (top, bottom), (left, right) = layer.config["padding"]
                padded[layer.name] = x, [top, left, bottom, right]
            case "ReLU" | "Activation":
                y = x
            case _:
                raise ValueError(f"layer {layer.name!r}: no rule for {layer.kind}")
        if acts or layer.kind in ("ReLU", "Activation"):
            bounds = ["relu6.low", "relu6.high"] if layer.activation == "relu6" else []
            net.add("Clip" if bounds else "Relu", name, y, *bounds)
    arrays |= {"relu6.low": np.array(0, np.float32), "relu6.high": np.array(6, np.float32)} if "Clip" in {n.op_type for n in net} else {}


def torch_module(layers: list[Layer], arrays: Weights) -> Any:
    """The same as a torch.nn.Module, with slots for `arrays` in order; they are not filled."""
    import torch
    from torch import nn

    def module(layer: Layer) -> nn.Module:
        c, shape = layer.config, arrays.get(f"{layer.name}.weight", np.zeros(0)).shape
        size, strides, same = layer.window if "strides" in c else ((1, 1), (1, 1), False)
        around = tuple(k // 2 for k in size) if same else (0, 0)
        parts: list[nn.Module] = []
        match layer.kind:
            case "Conv2D" | "DepthwiseConv2D":
                if same and strides == (2, 2):  # of even sizes all: k - 2 pixels are missing
                    parts, around = [nn.ZeroPad2d(((size[0] - 2) // 2, (size[0] - 1) // 2) * 2)], (0, 0)
                depthwise = layer.kind == "DepthwiseConv2D"
                parts.append(nn.Conv2d(shape[0] if depthwise else shape[1], shape[0], size, strides, around,
                                       groups=shape[0] if depthwise else 1, bias=c["use_bias"]))
            case "BatchNormalization":
                parts = [nn.BatchNorm2d(shape[0], c["epsilon"])]
            case "MaxPooling2D":
                parts = [nn.MaxPool2d(size, strides, around)]
            case "AveragePooling2D":
                parts = [nn.AvgPool2d(size, strides, around, count_include_pad=False)]
            case "GlobalAveragePooling2D":
                parts = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
            case "Flatten":
                parts = [nn.Flatten()]
            case "Dense":
                parts = [nn.Linear(shape[1], shape[0])]
            case "ZeroPadding2D":
                (top, bottom), (left, right) = c["padding"]
                parts = [nn.ZeroPad2d((left, right, top, bottom))]
        parts += {"relu": [nn.ReLU()], "relu6": [nn.ReLU6()]}.get(layer.activation, [])
        return parts[0] if len(parts) == 1 else nn.Sequential(*parts)

    class Keras(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plan = layers
            self.steps = nn.ModuleDict({layer.name: module(layer) for layer in layers})

        def forward(self, x: Any) -> Any:
            values = {"image": x}
            for layer in self.plan:
                x, *others = [values[name] for name in layer.inputs]
                if layer.kind == "Concatenate":
                    x = torch.cat([x, *others], dim=1)
                else:
                    x = self.steps[layer.name](x + others[0] if others else x)
                values[layer.name] = x
            return x

    return Keras()


def forward(layers: list[Layer], arrays: Weights, image: Array) -> Array:
    """The logits in numpy, channels last, from the arrays as they are in the file."""
    values = {"image": image.transpose(0, 2, 3, 1)}
    for layer in layers:
        c, (x, *others) = layer.config, [values[name] for name in layer.inputs]
        own = {key.split("/")[1]: value for key, value in arrays.items() if key.startswith(f"{layer.name}/")}
        match layer.kind:
            case "Conv2D":
                x = np.tensordot(_windows(x, layer, 0), own["kernel"], axes=([4, 5, 3], [0, 1, 2]))
            case "DepthwiseConv2D":
                x = np.einsum("nhwcij,ijcm->nhwc", _windows(x, layer, 0), own["kernel"])
            case "BatchNormalization":
                x = (x - own["moving_mean"]) * (own.get("gamma", 1) / np.sqrt(own["moving_variance"] + c["epsilon"])) + own["beta"]
            case "MaxPooling2D":
                x = _windows(x, layer, -np.inf).max(axis=(4, 5))
            case "AveragePooling2D":  # of the pixels that are there
                x = np.nanmean(_windows(x, layer, np.nan), axis=(4, 5))
            case "GlobalAveragePooling2D":
                x = x.mean(axis=(1, 2))
            case "Flatten":
                x = x.reshape(len(x), -1)
            case "Dense":
                x = x @ own["kernel"]
            case "Add":
                x = x + others[0]
            case "Concatenate":
                x = np.concatenate([x, *others], axis=-1)
            case "ZeroPadding2D":
                x = np.pad(x, ((0, 0), *c["padding"], (0, 0)))
        x = x + own["bias"] if "bias" in own else x
        top = {"relu": np.inf, "relu6": 6}.get(layer.activation)
        values[layer.name] = x = x if top is None else np.clip(x, 0, top)
    return x


def _windows(x: Array, layer: Layer, fill: float) -> Array:
    """All windows (N, H, W, C, height, width) of an image, padded as TensorFlow does: an odd pixel goes after."""
    size, strides, same = layer.window
    if same:
        missing = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(x.shape[1:3], size, strides, strict=True)]
        x = np.pad(x, ((0, 0), *((m // 2, m - m // 2) for m in missing), (0, 0)), constant_values=fill)
    return np.lib.stride_tricks.sliding_window_view(x, size, axis=(1, 2))[:, ::strides[0], ::strides[1]]
