"""The official COCO box metric, computed by pycocotools, in the published columns."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2scale.engine.data.records import CocoDataset

_AREAS = ("all", "small", "medium", "large")


def coco_metrics(
    dataset: CocoDataset, results: Sequence[Mapping[str, Any]], *, max_dets: int = 100
) -> dict[str, float]:
    """Compute the official COCO box metric.

    Args:
        dataset: its annotation file is the ground truth; its classes and images count.
        results: detections in COCO's results format.
        max_dets: best detections of an image that count.

    Returns:
        As :func:`evaluate`.
    """
    limits = (1, 10, max_dets)
    # pycocotools reports its progress on standard output.
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _ground_truth(dataset)
        evaluator = COCOeval(truth, _as_coco(truth, results), "bbox")
        evaluator.params.catIds = list(dataset.category_ids)
        evaluator.params.imgIds = dataset.records.image_ids.tolist()
        evaluator.params.maxDets = list(limits)
        evaluator.evaluate()
        evaluator.accumulate()
    return _derive_metrics(evaluator, dataset.class_names)


def _ground_truth(dataset: CocoDataset) -> COCO:
    truth = COCO(dataset.json_file)
    for annotation in truth.dataset["annotations"]:
        # COCO's files always have them, other people's may not.
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    return truth


def _as_coco(truth: COCO, results: Sequence[Mapping[str, Any]]) -> COCO:
    if results:
        return truth.loadRes([dict(result) for result in results])
    nothing = COCO()
    nothing.dataset = {**truth.dataset, "annotations": []}
    nothing.createIndex()
    return nothing


def _derive_metrics(evaluator: COCOeval, class_names: Sequence[str]) -> dict[str, float]:
    # (IoU, recall, class, area, max_dets) and (IoU, class, area, max_dets); -1: no ground truth.
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]
    thresholds = evaluator.params.iouThrs.round(2).tolist()
    at50, at75 = thresholds.index(0.5), thresholds.index(0.75)
    metrics = {
        "AP": _percent(precision[..., 0, -1]),
        "AP50": _percent(precision[at50, ..., 0, -1]),
        "AP75": _percent(precision[at75, ..., 0, -1]),
    }
    for area, name in enumerate(_AREAS[1:], start=1):
        metrics[f"AP{name[0]}"] = _percent(precision[..., area, -1])
    for number, limit in enumerate((1, 10, 100)):
        metrics[f"ARdet{limit}"] = _percent(recall[..., 0, number])
    for area, name in enumerate(_AREAS[1:], start=1):
        metrics[f"AR{name[0]}"] = _percent(recall[..., area, -1])
    for number, class_name in enumerate(class_names):
        metrics[f"AP-{class_name}"] = _percent(precision[:, :, number, 0, -1])
    return metrics


def _percent(values: np.ndarray) -> float:
    present = values[values > -1]
    return float(present.mean()) * 100 if present.size else float("nan")
