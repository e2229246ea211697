"""Which photographs does eqfact measure networks on, and how are they cut?

Twenty ImageNet images; they ship inside a published package. All give bytes, (H, W, 3).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.packages import wheel

Pixels = NDArray[np.uint8]

IMAGES = "foolbox==3.3.4"  # foolbox/data/imagenet_NN_LABEL.jpg


def imagenet() -> tuple[list[Image.Image], NDArray[np.int64]]:
    """Twenty ImageNet images and their labels, 0..999."""
    with wheel(IMAGES) as archive:
        files = sorted(file for file in archive.namelist() if file.startswith("foolbox/data/imagenet_"))
        images = [_opened(archive.open(file)) for file in files]
    return images, np.array([int(Path(file).stem.split("_")[-1]) for file in files])


def _opened(stream: Any) -> Image.Image:
    with Image.open(stream) as image:
        return image.convert("RGB")


def centre(image: Image.Image, size: int) -> Pixels:
    """The centre 224 of an image whose short side is resized to 256, at the size asked; larger sizes keep the proportion, not the 224."""
    crop = max(224, size)
    short = round(crop * 256 / 224)
    width, height = (round(side * short / min(image.size)) for side in image.size)
    left, top = (width - crop) // 2, (height - crop) // 2
    square = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + crop, top + crop))
    return np.asarray(square if size == crop else square.resize((size, size), Image.Resampling.BICUBIC))
