"""A dataset in memory, in one numpy array per column.

With one object per image, each loader worker would copy the dataset page by page, because reading
an object changes its reference count; arrays stay shared.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np


class Record(NamedTuple):
    """One image and its annotated boxes."""

    file_name: str
    image_id: int
    height: int  # pixels
    width: int
    boxes: np.ndarray  # x0 y0 x1 y1 in pixels, shape (n, 4), float32
    classes: np.ndarray  # contiguous class numbers, shape (n,), int64


@dataclass(frozen=True)
class Records:
    """All images of a dataset, in columns: a sequence of :class:`Record`."""

    file_names: np.ndarray  # encoded paths, shape (images,)
    image_ids: np.ndarray  # shape (images,), int64
    heights: np.ndarray  # pixels, likewise
    widths: np.ndarray
    box_starts: np.ndarray  # row of each image's first box, then the number of boxes, int64
    boxes: np.ndarray  # of all images, shape (boxes, 4), float32
    classes: np.ndarray  # shape (boxes,), int64

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Record:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        index %= len(self)
        part = slice(int(self.box_starts[index]), int(self.box_starts[index + 1]))
        return Record(
            file_name=os.fsdecode(self.file_names[index]),
            image_id=int(self.image_ids[index]),
            height=int(self.heights[index]),
            width=int(self.widths[index]),
            boxes=self.boxes[part],
            classes=self.classes[part],
        )

    @property
    def box_counts(self) -> np.ndarray:
        """Boxes of each image, shape (images,)."""
        return np.diff(self.box_starts)

    def with_boxes_only(self) -> Records:
        """Return the images that have at least one box."""
        kept = self.box_counts > 0
        columns = ("file_names", "image_ids", "heights", "widths")
        of_images = {column: getattr(self, column)[kept] for column in columns}
        return replace(self, box_starts=starts_from_counts(self.box_counts[kept]), **of_images)


def starts_from_counts(counts: np.ndarray) -> np.ndarray:
    """Return the cumulative sum that starts at 0, shape (len(counts) + 1,), int64."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts, dtype=np.int64)])


def concatenate(parts: Sequence[Records]) -> Records:
    """Return the images of all parts, in order."""
    columns = ("file_names", "image_ids", "heights", "widths", "box_counts", "boxes", "classes")
    file_names, image_ids, heights, widths, box_counts, boxes, classes = (
        np.concatenate([getattr(part, column) for part in parts]) for column in columns
    )
    starts = starts_from_counts(box_counts)
    return Records(file_names, image_ids, heights, widths, starts, boxes, classes)


@dataclass(frozen=True)
class CocoDataset:
    """A dataset, or several that are trained on as one."""

    name: str  # as in ``DATASETS``; of several datasets, their names joined by commas
    class_names: tuple[str, ...]  # by contiguous class number
    category_ids: tuple[int, ...]  # the annotation file's, by contiguous class number
    records: Records
    json_file: str  # the annotation file; empty for several datasets

    def __len__(self) -> int:
        return len(self.records)
