"""The data of a reproduction: COCO, a few images of it, or drawn shapes; nothing is downloaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2scale.coco.annotation_file import AnnotationFile, read_annotation_file
from d2scale.coco.catalog import ROOT_VARIABLE, datasets_root
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.errors import DataError, Fault, collecting
from d2scale.run_folder.files import write_atomically

PARTS = ("train2017", "val2017")
SMALL_IMAGES = (512, 64)  # of training and validation in the small form
SHAPES = "drawn shapes"
_ZIPS = "http://images.cocodataset.org/"
_ANNOTATIONS_ZIP = f"{_ZIPS}annotations/annotations_trainval2017.zip (241 MB)"
_SOURCES = {
    "annotations/instances_train2017.json": _ANNOTATIONS_ZIP,
    "annotations/instances_val2017.json": _ANNOTATIONS_ZIP,
    "train2017": f"{_ZIPS}zips/train2017.zip (18 GB)",
    "val2017": f"{_ZIPS}zips/val2017.zip (1 GB)",
}


@dataclass(frozen=True)
class Data:
    """What the experiments train on."""

    root: Path  # the value of DETECTRON2_DATASETS for them
    name: str  # kept in the folder of the reproduction, which must not change its data
    text: str  # what to print about it
    images: tuple[int, int] | None = None  # of training and validation; None: the whole of COCO
    coco: Path | None = None  # where a subset is cut from; None for drawn shapes


def whole_coco() -> Data:
    """Return COCO in ``DETECTRON2_DATASETS``; DataError names missing parts and their sources."""
    coco = _coco_folder()
    _refuse_missing(coco)
    return Data(coco.parent, f"COCO in {coco}", f"COCO 2017 in {coco}")


def small_data(folder: Path, images: tuple[int, int]) -> Data:
    """Return images of COCO, or drawn shapes if none of it is here; DataError if a part is."""
    coco = _coco_folder()
    most = "{} training and {} validation images".format(*images)
    if not any((coco / part).exists() for part in _SOURCES):
        text = (
            f"No COCO in {coco}: shapes are drawn in its format, {most}.\n"
            f"Set {ROOT_VARIABLE} to the folder that holds coco/ to use the real one."
        )
        return Data(folder / "shapes", SHAPES, text, images)
    _refuse_missing(coco)
    text = (
        f"COCO in {coco}, of which at most the first {most} are used.\n"
        "Minutes do not teach photographs: compare the losses, not the AP."
    )
    return Data(folder / "coco-subset", f"the first images of COCO in {coco}", text, images, coco)


def _coco_folder() -> Path:
    return datasets_root().absolute() / "coco"


def _refuse_missing(coco: Path) -> None:
    faults = []
    for part, source in _SOURCES.items():
        if not (coco / part).exists():
            allowed = f"a folder that holds coco/{part}"
            advice = f"set it to that folder, or unpack {source} in {coco}"
            faults.append(Fault(ROOT_VARIABLE, str(coco.parent), allowed, advice))
    if faults:
        raise DataError(faults)


@contextmanager
def datasets_under(root: Path) -> Iterator[None]:
    """Within the context, dataset names resolve under ``root``."""
    before = dict(os.environ)
    os.environ[ROOT_VARIABLE] = str(root.absolute())
    try:
        yield
    finally:
        os.environ.pop(ROOT_VARIABLE)
        os.environ.update(before)


def read_subset(data: Data) -> dict[str, dict[str, Any]]:
    """Return the annotations of COCO's first images by ``PARTS``; empty for other data.

    DataError with every fault of the annotation files, and images that are missing.
    """
    if data.coco is None or data.images is None:
        return {}
    contents: dict[str, dict[str, Any]] = {}
    faults: list[Fault] = []
    for part, count in zip(PARTS, data.images, strict=True):
        with collecting(faults):
            file = read_annotation_file(data.coco / "annotations" / f"instances_{part}.json")
            contents[part] = _first_images(file, count)
            faults += _missing_images(data.coco / part, contents[part])
    if faults:
        raise DataError(faults)
    return contents


def _first_images(file: AnnotationFile, count: int) -> dict[str, Any]:
    """Return COCO's format again, with the first images only, and without polygons."""
    fields = zip(file.image_ids, file.file_names, file.heights, file.widths, strict=True)
    images = [
        {"id": int(id_), "file_name": name, "height": int(height), "width": int(width)}
        for id_, name, height, width in list(fields)[:count]
    ]
    kept = np.flatnonzero((file.image_numbers >= 0) & (file.image_numbers < count))
    annotations = [
        {
            "id": int(file.annotation_ids[row]),
            "image_id": int(file.image_ids[file.image_numbers[row]]),
            "category_id": int(file.category_ids[row]),
            "bbox": file.boxes[row].tolist(),
            "area": float(file.areas[row]),
            "iscrowd": int(file.crowds[row]),
        }
        for row in kept
    ]
    categories = [{"id": id_, "name": name} for id_, name in file.categories.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _missing_images(folder: Path, content: dict[str, Any]) -> list[Fault]:
    names = [image["file_name"] for image in content["images"]]
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return []
    value = f"without {len(missing)} of its first {len(names)} images ({missing[0]})"
    advice = f"unpack {_SOURCES[folder.name]} again"
    return [Fault(str(folder), value, "all images of the annotation file", advice)]


def make(data: Data, contents: Mapping[str, Mapping[str, Any]]) -> None:
    """Write drawn shapes, or what ``read_subset`` returned beside links to COCO's images."""
    if data.images is not None and data.coco is None:
        write_shapes_dataset(data.root, *data.images)
    target = data.root / "coco"
    try:
        for part, content in contents.items():
            assert data.coco is not None
            (target / "annotations").mkdir(parents=True, exist_ok=True)
            (target / part).unlink(missing_ok=True)
            (target / part).symlink_to(data.coco / part)
            path = target / "annotations" / f"instances_{part}.json"
            write_atomically(path, json.dumps(content))
    except OSError as error:
        advice = f"choose another --output-dir ({error.strerror})"
        raise DataError([Fault("folder", str(target), "a writable folder", advice)]) from error
