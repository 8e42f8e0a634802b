"""A COCO-format dataset of a few tiny images, to be spoiled by tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from d2scale.coco.classes import COCO_CLASSES


class CocoFolder:
    """``coco/`` under ``root``; edit ``content`` and call ``write``."""

    SIZES = ((60, 40), (40, 60), (50, 50), (64, 48))

    def __init__(self, root: Path, part: str = "train") -> None:
        self.root = root
        self.images = root / "coco" / f"{part}2017"
        self.json_file = root / "coco" / "annotations" / f"instances_{part}2017.json"
        self.images.mkdir(parents=True)
        self.json_file.parent.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for number, (width, height) in enumerate(self.SIZES, start=1):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.images / f"{number}.png")
        self.content = {
            "images": [
                {"id": n, "file_name": f"{n}.png", "width": w, "height": h}
                for n, (w, h) in enumerate(self.SIZES, start=1)
            ],
            # Image 4 has only a person, a novel class.
            "annotations": [
                annotation(1, 2, 8, [5, 5, 10, 20]),
                annotation(2, 1, 10, [0, 0, 30.5, 20]),
                annotation(3, 1, 1, [10, 10, 20, 20]),
                annotation(4, 1, 8, [1, 2, 3, 4]),
                annotation(5, 4, 1, [1, 2, 30, 40]),
                annotation(6, 3, 8, [0, 0, 50, 50], iscrowd=1),
                annotation(7, 3, 90, [20, 20, 30, 30]),
            ],
            "categories": [{"id": i, "name": name} for i, name in COCO_CLASSES.items()],
        }
        self.write()

    def write(self) -> None:
        self.json_file.write_text(json.dumps(self.content))

    def add(self, **changes) -> None:
        entries = self.content["annotations"]
        entries.append({**annotation(len(entries) + 1, 1, 8, [1, 1, 9, 9]), **changes})

    def add_good(self, count: int) -> None:
        for _ in range(count):
            self.add()


def annotation(number, image, category, box, iscrowd=0):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": iscrowd,
        "segmentation": [[0.5, 1.0, 2.5, 3.0, 4e1, 5]],
    }
