"""Look at a dataset before anyone trains on it: what it holds, what is odd, what is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from d2scale.coco.annotation_file import AnnotationFile, read_annotation_file
from d2scale.coco.catalog import DatasetSpec
from d2scale.coco.images import check_size, oddities, read_rgb
from d2scale.errors import DataError, Fault, collecting

# Passes on what it is given, and may show how far it has come.
Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class Inspection:
    """What is known of a dataset after a look at it."""

    name: str
    spec: DatasetSpec
    file: AnnotationFile | None  # None if it cannot be read
    # Of the images that were read, as the loader of a training would tell them.
    faults: list[Fault] = field(default_factory=list)
    images_read: int = 0
    # File names by what is odd about them.
    odd: dict[str, list[str]] = field(default_factory=dict)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The classes that training reads."""
        listed = tuple(self.file.categories) if self.file else ()
        return listed if self.spec.category_ids is None else self.spec.category_ids

    def boxes_of_classes(self) -> np.ndarray:
        """Return which annotations are boxes to learn, shape (annotations,), bool."""
        assert self.file is not None
        known = np.isin(self.file.category_ids, self.category_ids)
        return known & ~self.file.crowds & (self.file.image_numbers >= 0)


def inspect_dataset(
    name: str,
    spec: DatasetSpec,
    *,
    most_images: int | None = None,
    progress: Progress = lambda items, _: items,
) -> Inspection:
    """Read a dataset's annotations and its images, or as many of them, spread over the file.

    Faults of the annotations are those that :func:`d2scale.coco.dataset.check_datasets` tells.
    """
    try:
        file = read_annotation_file(spec.json_file)
    except DataError:
        return Inspection(name, spec, None)
    # That images are missing is a fault of the annotations.
    there = [n for n, name in enumerate(file.file_names) if os.path.isfile(spec.image_root / name)]
    if most_images is not None and most_images < len(there):
        there = [there[len(there) * part // most_images] for part in range(most_images)]
    inspection = Inspection(name, spec, file, images_read=len(there))
    _read_images(inspection, there, progress)
    return inspection


def _read_images(inspection: Inspection, rows: list[int], progress: Progress) -> None:
    """Read these images of the file, on all cores, and note what is odd or wrong."""
    file = inspection.file
    assert file is not None

    def look(row: int) -> tuple[int, list[str], list[Fault]]:
        path = str(inspection.spec.image_root / file.file_names[row])
        faults: list[Fault] = []
        with collecting(faults):
            size = read_rgb(path).shape[:2]
            check_size(path, size, int(file.heights[row]), int(file.widths[row]))
        return row, oddities(path), faults

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # PIL decodes outside of Python's lock
        for row, odd, faults in progress(threads.map(look, rows), len(rows)):
            inspection.faults.extend(faults)
            for text in odd:
                inspection.odd.setdefault(text, []).append(file.file_names[row])
