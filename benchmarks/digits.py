"""Handwritten digits in COCO's format: the scans that scikit-learn ships, laid on soft noise.

Each of the digits 0 to 3 stands in for one of COCO's base classes, so that the project's recipes
train on them unchanged. Needs scikit-learn.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d2scale.coco.classes import BASE_CATEGORY_IDS, COCO_CLASSES

_CLASSES = 4  # the digits 0 to 3
_EDGE = 96  # of an image, pixels
_DIGITS = (1, 3)  # in an image
_SCALE = (3.0, 6.0)  # pixels of an image for one of a scan, which has eight
_HELD_OUT = 200  # scans that only validation images show


def write_digits_dataset(root: Path, train_images: int, val_images: int) -> None:
    """Write ``root/coco``, unless it is there; the files depend on the arguments alone."""
    folder = root / "coco"
    if (folder / "annotations/instances_val2017.json").exists():
        return
    from sklearn.datasets import load_digits

    scans = load_digits(n_class=_CLASSES)
    parts = {
        "train": (train_images, slice(_HELD_OUT, None)),
        "val": (val_images, slice(_HELD_OUT)),
    }
    for stream, (part, (count, kept)) in enumerate(parts.items()):
        images = folder / f"{part}2017"
        images.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(stream)
        content = _write_images(images, rng, count, scans.images[kept], scans.target[kept])
        annotations = folder / f"annotations/instances_{part}2017.json"
        annotations.parent.mkdir(exist_ok=True)
        annotations.write_text(json.dumps(content))


def _write_images(
    folder: Path, rng: np.random.Generator, count: int, scans: np.ndarray, digits: np.ndarray
) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        picture, boxes = _draw(rng, scans, digits)
        name = f"{number:012d}.png"
        Image.fromarray(picture).save(folder / name)
        images.append({"id": number, "file_name": name, "width": _EDGE, "height": _EDGE})
        for digit, (x, y, size) in boxes:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": BASE_CATEGORY_IDS[digit],
                    "bbox": [x, y, size, size],
                    "area": size * size,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": name} for i, name in COCO_CLASSES.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _draw(
    rng: np.random.Generator, scans: np.ndarray, digits: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, tuple[int, int, int]]]]:
    """Return a picture, and each of its digits with left, top and edge of its box, pixels."""
    noise = rng.integers(60, 140, size=(8, 8, 3)).astype(np.uint8)
    soft = Image.fromarray(noise).resize((_EDGE, _EDGE), Image.Resampling.BICUBIC)
    picture = np.asarray(soft).astype(np.float32)
    boxes: list[tuple[int, tuple[int, int, int]]] = []
    for _ in range(int(rng.integers(_DIGITS[0], _DIGITS[1] + 1))):
        scan = int(rng.integers(len(scans)))
        size = round(8 * rng.uniform(*_SCALE))
        x, y = (int(value) for value in rng.integers(0, _EDGE - size, size=2))
        others = (box for _, box in boxes)
        if any(max(abs(x - a), abs(y - b)) < (size + other) / 2 for a, b, other in others):
            continue
        ink = Image.fromarray((scans[scan] * 15.9).astype(np.uint8)).resize((size, size))
        cover = np.asarray(ink)[:, :, None].astype(np.float32) / 255
        colour = rng.integers(160, 256, size=3)
        place = picture[y : y + size, x : x + size]
        place[:] = place * (1 - cover) + colour * cover
        boxes.append((int(digits[scan]), (x, y, size)))
    return picture.clip(0, 255).astype(np.uint8), boxes
