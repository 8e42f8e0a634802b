"""A dataset as a user has it: a folder of images and a JSON file, in no layout of COCO's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from d2scale.coco.shapes import write_shapes_dataset

# One step of a narrow model on the dataset "mine", which :func:`injection` adds.
RECIPE = """
_BASE_: d2scale://MetaFCOS/small-cpu.yaml
MODEL:
  RESNETS: {STEM_OUT_CHANNELS: 32, RES2_OUT_CHANNELS: 32}
  FPN: {OUT_CHANNELS: 32}
DATASETS: {TRAIN: [mine], TEST: [mine]}
INPUT: {MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 64, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 64}
SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 1, STEPS: [], WARMUP_ITERS: 0, CHECKPOINT_PERIOD: 1}
"""


class OwnData:
    """Drawn shapes in ``root/images`` and ``root/labels.json``; edit ``content``, then ``write``.

    Its classes are the first ones of the shapes.
    """

    def __init__(self, root: Path, images: int = 6, classes: int = 6, seed: int = 0) -> None:
        self.root, self.images, self.json_file = root, root / "images", root / "labels.json"
        drawn = write_shapes_dataset(
            root / "drawn", images, 1, seed, image_size=(64, 96), only_drawn=True
        )
        (drawn / "coco/train2017").rename(self.images)
        self.content = json.loads(
            (drawn / "coco/annotations/instances_train2017.json").read_text(encoding="utf-8")
        )
        used = [entry["id"] for entry in self.content["categories"]][:classes]
        for part, key in (("categories", "id"), ("annotations", "category_id")):
            self.content[part] = [e for e in self.content[part] if e[key] in used]
        self.write()

    @property
    def classes(self) -> int:
        return len(self.content["categories"])

    def write(self) -> None:
        self.json_file.write_text(json.dumps(self.content), encoding="utf-8")

    def make_odd(self) -> list[str]:
        """Bring the first images into the kinds of :func:`odd_images`; return those kinds.

        The annotations stay: they are of the image as it is shown.
        """
        kinds = []
        for entry in self.content["images"]:
            image = Image.open(self.images / entry["file_name"]).convert("RGB")
            others = odd_images(image)
            if len(kinds) < len(others):
                kinds.append([*others][len(kinds)])
                other, options = others[kinds[-1]]
                entry["file_name"] = f"{kinds[-1]}"
                other.save(self.images / kinds[-1], **options)
        self.write()
        return kinds


def injection(*data: OwnData, names: Sequence[str] = ("mine", "other")) -> str:
    """Return the lines of a config that bring these datasets along."""
    columns = {
        "NAMES": list(names[: len(data)]),
        "IM_DIRS": [str(one.images) for one in data],
        "JSON_FILES": [str(one.json_file) for one in data],
    }
    return f"D2GO_DATA: {{DATASETS: {{COCO_INJECTION: {json.dumps(columns)}}}}}\n"


def odd_images(image: Image.Image) -> dict[str, tuple[Image.Image, dict[str, object]]]:
    """Return an RGB image as people have theirs, by kind, with the options to save it with."""
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees to the right
    sixteen_bit = np.asarray(image.convert("L")).astype(np.uint16)
    return {
        "EXIF": (image.transpose(Image.Transpose.ROTATE_90), {"format": "PNG", "exif": turned}),
        "CMYK": (image.convert("CMYK"), {"format": "JPEG", "quality": 95}),
        "16 bit": (Image.fromarray(sixteen_bit), {"format": "PNG"}),
        "palette": (image.quantize(), {"format": "PNG"}),
        "palette with transparency": (
            image.quantize(),
            {"format": "PNG", "transparency": b"\x00\x40"},
        ),
        "one transparent colour": (image.quantize(), {"format": "PNG", "transparency": 3}),
        "alpha": (image.convert("RGBA"), {"format": "PNG"}),
        "grayscale": (image.convert("L"), {"format": "JPEG", "quality": 95}),
        "grayscale with alpha": (image.convert("LA"), {"format": "PNG"}),
        "black and white": (image.convert("1"), {"format": "PNG"}),
    }
