"""A COCO annotation file, read into arrays."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from d2scale.coco.matching import GroundTruth, numbers_of
from d2scale.config.value_rules import is_whole
from d2scale.errors import DataError, Fault

# What the entries of each section must have.
_FIELDS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
# What they may leave out.
_OPTIONAL = {"annotations": ("iscrowd", "area")}
_LARGEST = 2**53  # up to it floating-point numbers are exact

# Polygons are two thirds of COCO's files and nothing here reads them. Without them train2017
# takes 5 s and 0.9 GB to parse, with them 22 s and 3.2 GB.
_POLYGONS = re.compile(rb'"segmentation"\s*:\s*\[[^"{}]*\]')


@dataclass(frozen=True)
class AnnotationFile:
    """The parts of a COCO annotation file that detection needs."""

    path: Path
    categories: Mapping[int, str]  # id to name, by ascending id
    file_names: Sequence[str]  # of the images, by ascending image id
    image_ids: np.ndarray  # shape (images,), int64
    heights: np.ndarray  # pixels, likewise
    widths: np.ndarray
    annotation_ids: np.ndarray  # shape (annotations,), int64
    category_ids: np.ndarray
    image_numbers: np.ndarray  # row of each annotation's image, -1 where no image has its id
    boxes: np.ndarray  # x, y, width, height as written, shape (annotations, 4), float64
    areas: np.ndarray  # of the objects or, without them, the boxes; square pixels, float64
    crowds: np.ndarray  # shape (annotations,), bool

    def ground_truth(self, category_ids: np.ndarray, image_ids: np.ndarray) -> GroundTruth:
        """Return the boxes of these classes and images, numbered by ascending id."""
        classes = numbers_of(self.category_ids, category_ids)
        images = numbers_of(self.image_ids[self.image_numbers], image_ids)
        kept = (classes >= 0) & (images >= 0) & (self.image_numbers >= 0)
        columns = (self.annotation_ids, images, classes, self.boxes, self.areas, self.crowds)
        return GroundTruth(*columns).take(kept)


def read_annotation_file(path: Path) -> AnnotationFile:
    """Read a file; a :class:`DataError` says what in it is not in COCO's format."""
    content = _load_json(path)
    faults = [fault for section in _FIELDS for fault in _section_faults(path, content, section)]
    if faults:
        raise DataError(faults)
    images = sorted(content["images"], key=itemgetter("id"))
    categories = sorted(content["categories"], key=itemgetter("id"))
    annotations = content["annotations"]
    rows = {image["id"]: row for row, image in enumerate(images)}
    return AnnotationFile(
        path=path,
        categories={category["id"]: category["name"] for category in categories},
        file_names=[image["file_name"] for image in images],
        image_ids=_integers(images, "id"),
        heights=_integers(images, "height"),
        widths=_integers(images, "width"),
        annotation_ids=_integers(annotations, "id"),
        category_ids=_integers(annotations, "category_id"),
        image_numbers=np.array([rows.get(a["image_id"], -1) for a in annotations], dtype=np.int64),
        boxes=np.array([a["bbox"] for a in annotations], dtype=np.float64).reshape(-1, 4),
        areas=np.array([_area(a) for a in annotations], dtype=np.float64),
        crowds=np.array([bool(a.get("iscrowd", 0)) for a in annotations], dtype=bool),
    )


def _area(annotation: Mapping[str, Any]) -> float:
    # COCO's files always have it, other people's may not.
    area = annotation.get("area")
    _, _, width, height = annotation["bbox"]
    return area if isinstance(area, int | float) else width * height


def _integers(entries: Sequence[Any], field: str) -> np.ndarray:
    return np.array([entry[field] for entry in entries], dtype=np.int64)


def _load_json(path: Path) -> dict[str, Any]:
    advice = "check the file, or fetch it again"
    try:
        content = _parse(path.read_bytes())
    except OSError as error:
        raise _fault(path, "a readable file", f"{error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _fault(path, "JSON in COCO's format", f"{error}; {advice}") from error
    if not isinstance(content, dict):
        raise _fault(path, "a JSON object", f"it holds a {type(content).__name__}; {advice}")
    return content


def _fault(path: Path, allowed: str, advice: str) -> DataError:
    return DataError([Fault("annotation file", str(path), allowed, advice)])


def _parse(text: bytes) -> Any:
    try:
        return json.loads(_POLYGONS.sub(b'"segmentation":0', text))
    except ValueError:
        # For an error that names the right place in the file.
        return json.loads(text)


def _section_faults(path: Path, content: dict[str, Any], section: str) -> Iterable[Fault]:
    entries, fields = content.get(section), _FIELDS[section]
    if not isinstance(entries, list):
        yield Fault(
            f"{section!r} of {path}",
            type(entries).__name__,
            "a list, as in COCO's instance annotations",
            "use an annotation file for detection",
        )
        return
    optional = _OPTIONAL.get(section, ())
    if bad := [n for n, entry in enumerate(entries) if not _has_fields(entry, fields, optional)]:
        yield Fault(
            f"{len(bad)} of {len(entries)} entries in {section!r} of {path}",
            f"no. {examples(bad)}",
            f"objects with valid {', '.join((*fields, *optional))}",
            "write the file in COCO's format",
        )
        return
    counts = Counter(entry["id"] for entry in entries)
    if repeated := [i for i, count in counts.items() if count > 1]:
        yield Fault(
            f"id of entries in {section!r} of {path}",
            f"{examples(sorted(repeated))} more than once",
            "a different id for each entry",
            "number the entries anew",
        )


def _has_fields(entry: Any, fields: Sequence[str], optional: Sequence[str]) -> bool:
    if not isinstance(entry, dict) or not all(_is_valid(name, entry.get(name)) for name in fields):
        return False
    return all(_is_valid(name, entry[name]) for name in optional if name in entry)


def _is_valid(field: str, value: Any) -> bool:
    if field in ("file_name", "name"):
        return isinstance(value, str) and value != "" and "\0" not in value and _is_text(value)
    if field == "bbox":
        return isinstance(value, list) and len(value) == 4 and all(map(_is_coordinate, value))
    if field == "area":
        return value is None or _is_coordinate(value)
    if field == "iscrowd":
        return isinstance(value, int) and value in (0, 1)
    least = 1 if field in ("height", "width") else -_LARGEST
    return is_whole(value) and least <= value <= _LARGEST


def _is_text(value: str) -> bool:
    # Half of a pair, "\ud800", is no character, and no name of a file holds it.
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        return False
    return True


def _is_coordinate(value: Any) -> bool:
    # Boxes that are not finite are told with those that lie outside their image.
    return isinstance(value, float) or (is_whole(value) and abs(value) <= _LARGEST)


def examples(items: Collection[Any] | np.ndarray, limit: int = 3) -> str:
    """Return the first few items as text, and how many more there are."""
    first = ", ".join(str(item) for item in list(items)[:limit])
    return first if len(items) <= limit else f"{first} and {len(items) - limit} more"
