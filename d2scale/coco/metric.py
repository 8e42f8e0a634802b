"""The official COCO box metric in the published columns, equal to pycocotools' to the last bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d2scale.coco.annotation_file import read_annotation_file
from d2scale.coco.matching import (
    AREAS,
    IOU_THRESHOLDS,
    Found,
    Matches,
    Truth,
    match,
    numbers_of,
)
from d2scale.coco.records import CocoDataset
from d2scale.coco.results import CocoResults

RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
# The published columns.
METRICS = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("ARdet1", "ARdet10", "ARdet100", "ARs", "ARm", "ARl"),
)
_ABSENT = -1.0  # there is nothing to find


def coco_metrics(
    dataset: CocoDataset,
    results: CocoResults | Sequence[Mapping[str, Any]],
    *,
    max_dets: int = 100,
) -> dict[str, float]:
    """Compute the official COCO box metric.

    Args:
        dataset: its annotation file is the ground truth; its classes and images count.
        results: detections on its images, in columns or as the entries of a results file;
            those of other classes do not count.
        max_dets: best detections of an image and class that count.

    Returns:
        As :func:`d2scale.engine.evaluation.evaluate`.

    Raises:
        DataError: if the annotation file is no longer readable.
    """
    if not isinstance(results, CocoResults):
        results = CocoResults.from_entries(results)
    matches = match(_truth(dataset), _found(dataset, results), len(dataset.category_ids), max_dets)
    curves = _curves(matches, (1, min(10, max_dets), max_dets))
    # pycocotools has the classes by ascending id.
    places = numbers_of(np.array(dataset.category_ids), np.array(dataset.category_ids))
    return _derive_metrics(curves, dict(zip(dataset.class_names, places.tolist(), strict=True)))


def _truth(dataset: CocoDataset) -> Truth:
    file = read_annotation_file(Path(dataset.json_file))
    classes = numbers_of(file.category_ids, np.array(dataset.category_ids))
    images = numbers_of(file.image_ids[file.image_numbers], dataset.records.image_ids)
    truth = Truth(file.annotation_ids, images, classes, file.boxes, file.areas, file.crowds)
    return truth.take(np.flatnonzero((classes >= 0) & (images >= 0) & (file.image_numbers >= 0)))


def _found(dataset: CocoDataset, results: CocoResults) -> Found:
    images = numbers_of(results.image_ids, dataset.records.image_ids)
    classes = numbers_of(results.category_ids, np.array(dataset.category_ids))
    assert (images >= 0).all(), "detections on images that the dataset does not have"
    found = Found(images, classes, results.boxes, results.scores)
    return found.take(np.flatnonzero(classes >= 0))


class _Curves(NamedTuple):
    """Precision and recall; -1 where there is nothing to find.

    Attributes:
        precision: at (area, IoU threshold, recall threshold, class), of ``max_dets`` detections.
        recall: reached at (limit of detections, area, IoU threshold, class).
    """

    precision: np.ndarray
    recall: np.ndarray


def _curves(matches: Matches, limits: tuple[int, ...]) -> _Curves:
    areas, classes = matches.positives.shape
    precision = np.full((areas, len(IOU_THRESHOLDS), len(RECALL_THRESHOLDS), classes), _ABSENT)
    recall = np.full((len(limits), areas, len(IOU_THRESHOLDS), classes), _ABSENT)
    starts = np.searchsorted(matches.found.classes, np.arange(classes + 1))
    for number in range(classes):
        rows = slice(starts[number], starts[number + 1])
        hits, misses = matches.hits[..., rows], matches.misses[..., rows]
        ranks = matches.ranks[rows]
        for area in np.flatnonzero(matches.positives[:, number]).tolist():
            positives = matches.positives[area, number]
            precision[area, :, :, number] = _precision(hits[area], misses[area], positives)
            for place, limit in enumerate(limits):
                found = np.count_nonzero(hits[area][:, ranks < limit], axis=1)
                recall[place, area, :, number] = found / positives
    return _Curves(precision, recall)


def _precision(hits: np.ndarray, misses: np.ndarray, positives: int) -> np.ndarray:
    """Return the best precision at or beyond every recall threshold: (IoU threshold, recall).

    Args:
        hits, misses: (IoU threshold, n), by descending score.
        positives: boxes to be found, at least one.
    """
    hit_sums = np.cumsum(hits, axis=1).astype(np.float64)
    miss_sums = np.cumsum(misses, axis=1).astype(np.float64)
    # The order of these operations decides the last bit.
    precision = hit_sums / (miss_sums + hit_sums + np.spacing(1))
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    best = np.concatenate([best, np.zeros((len(best), 1))], axis=1)
    places = [row.searchsorted(RECALL_THRESHOLDS, "left") for row in hit_sums / positives]
    return np.take_along_axis(best, np.stack(places), axis=1)


def _derive_metrics(curves: _Curves, classes: Mapping[str, int]) -> dict[str, float]:
    precision, recall = curves
    thresholds = IOU_THRESHOLDS.round(2).tolist()
    sizes = range(1, len(AREAS))
    values = [
        _percent(precision[0]),
        _percent(precision[0, thresholds.index(0.5)]),
        _percent(precision[0, thresholds.index(0.75)]),
        *(_percent(precision[area]) for area in sizes),
        *(_percent(recall[limit, 0]) for limit in range(len(recall))),
        *(_percent(recall[-1, area]) for area in sizes),
    ]
    metrics = dict(zip(METRICS, values, strict=True))
    for name, place in classes.items():
        metrics[f"AP-{name}"] = _percent(precision[0, ..., place])
    return metrics


def _percent(values: np.ndarray) -> float:
    present = values[values > _ABSENT]
    return float(present.mean()) * 100 if present.size else float("nan")
