"""Copy COCO's first images with their annotations, to take along: python coco_subset.py DIR 64 64.

Reads COCO under DETECTRON2_DATASETS and writes DIR/coco with so many training and validation
images.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from d2scale.coco.catalog import datasets_root
from meta_fcos.reproduction.data import Data, make, read_subset


def copy_subset(target: Path, images: tuple[int, int]) -> None:
    """Write ``target``/coco; DataError for what is missing."""
    coco = datasets_root().absolute() / "coco"
    data = Data(target, "", "", images, coco)
    subset = read_subset(data)
    make(data, subset)
    for part, content in subset.items():
        folder = target / "coco" / part
        folder.unlink()  # a link to all images
        folder.mkdir()
        for image in content["images"]:
            shutil.copy(coco / part / image["file_name"], folder)


if __name__ == "__main__":
    copy_subset(Path(sys.argv[1]), (int(sys.argv[2]), int(sys.argv[3])))
