"""The official COCO box metric of detections on a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from d2scale.coco.accumulate import accumulate, summarize
from d2scale.coco.annotation_file import read_annotation_file
from d2scale.coco.matching import match, numbers_of
from d2scale.coco.records import CocoDataset
from d2scale.coco.results import CocoResults


def coco_metrics(
    dataset: CocoDataset,
    results: CocoResults | Sequence[Mapping[str, Any]],
    *,
    max_dets: int = 100,
) -> dict[str, float]:
    """Compute the official COCO box metric.

    Args:
        dataset: its annotation file is the ground truth; its classes and images count.
        results: detections on its images, in columns or as the entries of a results file.
        max_dets: best detections of an image and class that count.

    Returns:
        Percent by published column, then AP of each class as ``AP-name``; nan without boxes.
    """
    if not isinstance(results, CocoResults):
        results = CocoResults.from_entries(results)
    category_ids, image_ids = np.array(dataset.category_ids), dataset.records.image_ids
    truth = read_annotation_file(Path(dataset.json_file)).ground_truth(category_ids, image_ids)
    detections = results.detections(category_ids, image_ids)
    assert (detections.images >= 0).all(), "detections on images that the dataset does not have"
    # pycocotools has the classes by ascending id.
    numbers = numbers_of(category_ids, category_ids).tolist()
    classes = dict(zip(dataset.class_names, numbers, strict=True))
    once = np.ones((1, len(image_ids)), dtype=np.int64)
    curves = accumulate(match(truth, detections, max_dets), len(classes), max_dets, once)
    metrics = summarize(curves, classes)
    return {name: float(values[0]) for name, values in metrics.items()}
