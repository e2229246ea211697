"""Where does the network bundled with eqfact come from?

This script trains it, from a fixed seed, on scikit-learn's 1797 handwritten digits (8x8, grey): a small MobileNetV2
with ReLU6, one stride and three residual additions, two of them in a row. The recipe is the usual one of MobileNets
(SGD with momentum, weight decay on every parameter, batch normalization); channel ranges differ because training made
them differ. The network is then rebuilt, unfolded, as an eqfact graph, checked against torch and written to
`digits_mobilenet.npz`, the images to `digits_images.npz`. Needs torch and scikit-learn; the library itself does not.
"""
from __future__ import annotations

import argparse
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import eqfact as eq

SEED = 0
HELD_OUT, CALIBRATION = 360, 128
WHITE = 16.0  # pixels are the integers 0..16, stored as uint8; the network reads pixel / 16
BLOCKS = ((16, 16, 1, 4), (16, 24, 2, 6), (24, 24, 1, 6), (24, 24, 1, 6), (24, 32, 1, 6))  # inputs, outputs, stride, expansion
STEM, LAST, CLASSES = 16, 128, 10
EPOCHS, BATCH, WARM_UP = 300, 64, 5
# torchvision trains MobileNetV2 with weight decay 4e-5, for a sum of learning rates near 1e4 over all its steps. Ours
# is near 7e2, so 5e-4 gives the decay about as much time to act: their product is 0.45 there, 0.35 here. The value
# matters: it takes the weakest channels of the inner layers towards zero. With 4e-5 in this short training, ranges stay within 8 to 1.
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, BN_MOMENTUM = 0.2, 0.9, 5e-4, 0.1


class Block(nn.Module):
    """An inverted residual block; the input is added when the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(OrderedDict(
            expand=nn.Conv2d(inputs, wide, 1, bias=False), expand_bn=normalize(wide), expand_act=nn.ReLU6(),
            depthwise=nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), depthwise_bn=normalize(wide),
            depthwise_act=nn.ReLU6(),
            project=nn.Conv2d(wide, outputs, 1, bias=False), project_bn=normalize(outputs)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


def normalize(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, momentum=BN_MOMENTUM)


def build() -> nn.Sequential:
    """The untrained network, initialized as torchvision initializes MobileNetV2."""
    torch.manual_seed(SEED)
    blocks = {f"block{i}": Block(*row) for i, row in enumerate(BLOCKS, start=1)}
    model = nn.Sequential(OrderedDict(
        conv0=nn.Conv2d(1, STEM, 3, padding=1, bias=False), bn0=normalize(STEM), act0=nn.ReLU6(), **blocks,
        last=nn.Conv2d(BLOCKS[-1][1], LAST, 1, bias=False), last_bn=normalize(LAST), last_act=nn.ReLU6(),
        gap=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(LAST, CLASSES)))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
            nn.init.zeros_(module.bias)
    return model


def split() -> dict[str, np.ndarray]:
    """The digits as uint8 (N, 1, 8, 8): a training part, a held-out part, and calibration images out of the training part."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(SEED).permutation(len(pixels))
    pixels, labels = pixels.astype(np.uint8).reshape(-1, 1, 8, 8)[order], labels.astype(np.int64)[order]
    return {"train": pixels[HELD_OUT:], "train_labels": labels[HELD_OUT:],
            "calibration": pixels[HELD_OUT:HELD_OUT + CALIBRATION],
            "images": pixels[:HELD_OUT], "labels": labels[:HELD_OUT].astype(np.uint8)}


def scale(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / np.float32(WHITE)


def shift(x: Tensor) -> Tensor:
    """Move every image by -1, 0 or 1 pixel along both axes; zeros come in."""
    rows, columns = torch.randint(0, 3, (2, len(x)))
    windows = F.pad(x, (1, 1, 1, 1)).unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)
    return windows[torch.arange(len(x)), :, rows, columns]


def train(model: nn.Module, pixels: np.ndarray, labels: np.ndarray) -> None:
    """SGD with momentum, linear warm-up and a cosine to zero; the held-out images are never seen."""
    x, t = torch.from_numpy(scale(pixels)), torch.from_numpy(labels)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [
        torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARM_UP, total_iters=WARM_UP),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS - WARM_UP)], [WARM_UP])
    model.train()
    for epoch in range(EPOCHS):
        total = 0.0
        for batch in torch.randperm(len(x)).split(BATCH):
            loss = F.cross_entropy(model(shift(x[batch])), t[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        schedule.step()
        if epoch % 20 == 0 or epoch == EPOCHS - 1:
            print(f"epoch {epoch:3d}  training loss {total / len(x):.4f}", flush=True)
    model.eval()


def convert(model: nn.Sequential) -> eq.Graph:
    """The trained network as an eqfact graph, nothing folded; nodes keep their torch names."""
    nodes: list[eq.Node] = []

    def follow(layers: nn.Sequential, value: str, prefix: str = "") -> str:
        for name, module in layers.named_children():
            if isinstance(module, Block):
                output = follow(module.layers, value, f"{name}.")
                if module.residual:
                    nodes.append(eq.Node(f"{name}.add", eq.Add(), [value, output]))
            else:
                nodes.append(eq.Node(prefix + name, convert_layer(module), [value]))
            value = nodes[-1].name
        return value

    output = follow(model, "image")
    return eq.Graph(inputs={"image": (1, 8, 8)}, nodes=nodes, outputs=[output])


def convert_layer(module: nn.Module) -> eq.Op:
    def array(tensor: Tensor | None) -> np.ndarray:
        assert tensor is not None
        return tensor.detach().numpy().copy()

    if isinstance(module, nn.Conv2d):
        return eq.Conv(array(module.weight), stride=module.stride, padding=module.padding, groups=module.groups)
    if isinstance(module, nn.BatchNorm2d):
        return eq.BatchNorm(array(module.weight), array(module.bias), array(module.running_mean),
                            array(module.running_var), eps=module.eps)
    if isinstance(module, nn.Linear):
        return eq.Dense(array(module.weight), array(module.bias))
    if isinstance(module, nn.ReLU6):
        return eq.Clip(0, 6)
    return {nn.AdaptiveAvgPool2d: eq.GlobalAvgPool, nn.Flatten: eq.Flatten}[type(module)]()


def report_ranges(graph: eq.Graph) -> None:
    """Print, for every layer after BN folding, how far the ranges max|W| of its output channels lie apart."""
    print(f"{'layer':20s} channels  dead       min    median       max   max/min")
    for node in eq.fold_batchnorm(graph).nodes:
        if isinstance(node.op, (eq.Conv, eq.Dense)):
            ranges = np.abs(node.op.weight).reshape(len(node.op.weight), -1).max(axis=1)
            alive = ranges[ranges > 0]
            print(f"{node.name:20s} {len(ranges):8d} {np.sum(ranges == 0):5d} {alive.min():9.2g} {np.median(alive):9.2g} "
                  f"{alive.max():9.2g} {alive.max() / alive.min():9.3g}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the network bundled with eqfact.")
    parser.add_argument("--output", type=Path, default=Path("eqfact/data"), help="folder for the two .npz files")
    output: Path = parser.parse_args().output
    torch.set_num_threads(1)  # the order of a sum must not depend on the machine's cores
    torch.use_deterministic_algorithms(True)

    start, data, model = time.perf_counter(), split(), build()
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    train(model, data["train"], data["train_labels"])
    print(f"trained in {time.perf_counter() - start:.0f} s")

    graph, x = convert(model), scale(data["images"])
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    error = np.abs(eq.forward(graph, x) - expected).max()
    print(f"held-out accuracy {np.mean(expected.argmax(axis=1) == data['labels']):.2%}")
    print(f"eqfact against torch: largest difference {error:.3g} of logits up to {np.abs(expected).max():.3g}")
    if error > 1e-5 * np.abs(expected).max():
        raise SystemExit("the eqfact graph does not compute what the torch network computes")
    report_ranges(graph)

    output.mkdir(parents=True, exist_ok=True)
    eq.save(output / "digits_mobilenet.npz", graph)
    data["train_labels"] = data["train_labels"].astype(np.uint8)
    np.savez_compressed(output / "digits_images.npz",
                        **{name: data[name] for name in ("calibration", "images", "labels", "train", "train_labels")})
    for file in ("digits_mobilenet.npz", "digits_images.npz"):
        print(f"{output / file}: {(output / file).stat().st_size} bytes")


if __name__ == "__main__":
    main()
