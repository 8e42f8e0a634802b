"""A dataset as a user has it: a folder of images and a JSON file, in no layout of COCO's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from d2scale.coco.shapes import write_shapes_dataset


class OwnData:
    """Drawn shapes in ``root/images`` and ``root/labels.json``; edit ``content``, then ``write``.

    The classes are those of the shapes, or as many of them as ``classes``.
    """

    def __init__(self, root: Path, images: int = 6, classes: int = 6, seed: int = 0) -> None:
        self.root, self.images, self.json_file = root, root / "images", root / "labels.json"
        drawn = write_shapes_dataset(root / "drawn", images, 1, seed=seed, image_size=(64, 96))
        (drawn / "coco/train2017").rename(self.images)
        self.content = json.loads(
            (drawn / "coco/annotations/instances_train2017.json").read_text(encoding="utf-8")
        )
        used = sorted({entry["category_id"] for entry in self.content["annotations"]})[:classes]
        for part, key in (("categories", "id"), ("annotations", "category_id")):
            self.content[part] = [e for e in self.content[part] if e[key] in used]
        self.write()

    @property
    def classes(self) -> int:
        return len(self.content["categories"])

    def write(self) -> None:
        self.json_file.write_text(json.dumps(self.content), encoding="utf-8")

    def replace_image(self, number: int, image: Image.Image, suffix: str = ".png") -> Path:
        """Put another image, of whatever kind and size, in the place of one."""
        entry = self.content["images"][number]
        path = self.images / f"replaced-{number}{suffix}"
        image.save(path)
        entry.update(file_name=path.name, width=image.width, height=image.height)
        self.write()
        return path


def injection(*data: OwnData, names: Sequence[str] = ("mine", "other")) -> str:
    """Return the lines of a config that bring these datasets along."""
    columns = {
        "NAMES": list(names[: len(data)]),
        "IM_DIRS": [str(one.images) for one in data],
        "JSON_FILES": [str(one.json_file) for one in data],
    }
    return f"D2GO_DATA: {{DATASETS: {{COCO_INJECTION: {json.dumps(columns)}}}}}\n"
