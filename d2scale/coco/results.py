"""Detections in COCO's results format, in columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d2scale.coco.matching import Detections, numbers_of

_ENTRY = '{"image_id": %s, "category_id": %s, "bbox": [%s, %s, %s, %s], "score": %s}'


@dataclass(frozen=True)
class CocoResults:
    """Detections on many images."""

    image_ids: np.ndarray  # as in the annotation file, shape (n,), int64
    category_ids: np.ndarray  # likewise
    boxes: np.ndarray  # x, y, width, height in pixels of the original images, (n, 4), float64
    scores: np.ndarray  # shape (n,), float64

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def from_entries(cls, entries: Sequence[Mapping[str, Any]]) -> CocoResults:
        """Read the entries of a results file, each with image_id, category_id, bbox and score."""
        columns = {"image_id": np.int64, "category_id": np.int64, "bbox": float, "score": float}
        image_ids, category_ids, boxes, scores = (
            np.array([entry[name] for entry in entries], dtype) for name, dtype in columns.items()
        )
        return cls(image_ids, category_ids, boxes.reshape(-1, 4), scores)

    def detections(self, category_ids: np.ndarray, image_ids: np.ndarray) -> Detections:
        """Return the detections of these classes, numbered like the images by ascending id.

        The number of an image that is none of ``image_ids`` is -1.
        """
        classes = numbers_of(self.category_ids, category_ids)
        images = numbers_of(self.image_ids, image_ids)
        return Detections(images, classes, self.boxes, self.scores).take(classes >= 0)

    def to_json(self) -> str:
        """Return the contents of a results file: what ``json.dumps`` gives, in half the time."""
        columns = [self.image_ids.tolist(), self.category_ids.tolist()]
        columns += [*self.boxes.T.tolist(), self.scores.tolist()]
        return "[" + ", ".join(map(_ENTRY.__mod__, zip(*columns, strict=True))) + "]"
