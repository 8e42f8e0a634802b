"""Average precision and recall of matched detections, equal to pycocotools' to the last bit.

Every image counts once for the metric, as often as it was drawn for the bootstrap of a report.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from d2scale.coco.matching import AREAS, IOU_THRESHOLDS, Matches

# The published columns.
METRICS = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("ARdet1", "ARdet10", "ARdet100", "ARs", "ARm", "ARl"),
)
RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101)
# Draws are done in several turns where a class has many detections.
_DETECTIONS_AT_ONCE = 4_000_000


class Curves(NamedTuple):
    """Precision and recall of each draw and class; nan where a class has no boxes."""

    # The best at or beyond each recall threshold, shape (draws, areas, IoU thresholds, recall
    # thresholds or 1 if averaged, classes).
    precision: np.ndarray
    recall: np.ndarray  # for each AR column, shape (draws, 6, IoU thresholds, classes)


def accumulate(
    matches: Matches, num_classes: int, max_dets: int, counts: np.ndarray, *, average: bool = False
) -> Curves:
    """Compute precision and recall of every class.

    Args:
        matches: of the ``max_dets`` best detections of each image and class.
        counts: how often each draw counts each image, shape (draws, images), int64.
        average: average the precision over the recall thresholds at once. Saves the memory of many
            draws, and changes the last bits of a mean over classes.
    """
    draws, levels = len(counts), len(IOU_THRESHOLDS)
    points = 1 if average else len(RECALL_THRESHOLDS)
    precision = np.full((draws, len(AREAS), levels, points, num_classes), np.nan)
    recall = np.full((draws, 2 + len(AREAS), levels, num_classes), np.nan)
    for number in range(num_classes):
        of_class = matches.of_class(number)
        step = max(1, _DETECTIONS_AT_ONCE // max(1, len(of_class.ranks)))
        for start in range(0, draws, step):
            rows = slice(start, start + step)
            weights = counts[rows, of_class.detections.images]
            positives = counts[rows, of_class.truth.images] @ of_class.positives.T
            hits = [_hits_of_best(of_class, weights, limit) for limit in (1, min(10, max_dets))]
            for area in range(len(AREAS)):
                best, of_area = _precision(of_class, area, weights, positives[:, area])
                best = best.mean(axis=-1, keepdims=True) if average else best
                precision[rows, area, :, :, number] = best
                hits.append(of_area)
            # The first three columns are about all areas, then each is about one.
            wanted = positives[:, [0, 0, *range(len(AREAS))], None]
            parts = np.stack(hits, axis=1) / np.maximum(wanted, 1)
            recall[rows, ..., number] = np.where(wanted > 0, parts, np.nan)
    return Curves(precision, recall)


def _hits_of_best(matches: Matches, weights: np.ndarray, limit: int) -> np.ndarray:
    """Count the boxes that the ``limit`` best of each image hit, shape (draws, IoU thresholds)."""
    of_best = matches.hits[0] & (matches.ranks < limit)
    return np.stack([weights[:, hits].sum(axis=1) for hits in of_best], axis=1)


def _precision(
    matches: Matches, area: int, weights: np.ndarray, positives: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best precision at or beyond each recall threshold, and how many boxes are hit.

    Shapes (draws, IoU thresholds, recall thresholds), nan without boxes, and (draws, IoU
    thresholds).

    Args:
        weights: how often each detection of the class counts, shape (draws, detections).
        positives: boxes to be detected, shape (draws,).
    """
    hits, counted = matches.hits[area], matches.hits[area] | matches.misses[area]
    kept = np.flatnonzero(counted.any(axis=0))
    weights, hits, counted = weights[:, kept], hits[:, kept], counted[:, kept]
    sums = weights.cumsum(axis=1)
    needed = np.stack([_hits_needed(number) for number in positives.tolist()])
    precision = np.zeros((len(weights), len(hits), needed.shape[1]))
    totals = np.zeros((len(weights), len(hits)), dtype=np.int64)
    for level, (hit, ignored) in enumerate(zip(hits, ~counted, strict=True)):
        # Precision only falls between two hits, so it is needed at the hits alone.
        at, left_out = np.flatnonzero(hit), np.flatnonzero(ignored)
        if not len(at):
            continue
        too_many = np.insert(weights[:, left_out].cumsum(axis=1), 0, 0, axis=1)
        detections = sums[:, at] - too_many[:, np.searchsorted(left_out, at)]
        hit_count = weights[:, at].cumsum(axis=1)
        # The order of these operations decides the last bit.
        at_hits = hit_count / (detections + np.spacing(1))
        best = np.maximum.accumulate(at_hits[:, ::-1], axis=1)[:, ::-1]
        # Repeated as often as the hit counts, so that the n-th hit of a draw is the n-th element.
        by_hit = np.append(np.repeat(best, weights[:, at].ravel()), 0.0)
        total = totals[:, level] = hit_count[:, -1]
        first = total.cumsum() - total
        reached = needed <= total[:, None]
        precision[:, level] = by_hit[np.where(reached, first[:, None] + needed - 1, -1)]
    return np.where(positives[:, None, None] > 0, precision, np.nan), totals


@lru_cache(maxsize=4096)
def _hits_needed(positives: int) -> np.ndarray:
    """Return the hits, at least one, that reach each recall threshold: shape (101,), int64."""
    recall = np.arange(positives + 1) / max(positives, 1)
    return recall.searchsorted(RECALL_THRESHOLDS, "left").clip(min=1)


def summarize(curves: Curves, classes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Return the metrics of each draw in percent, shape (draws,), nan where there are no boxes.

    Each of ``classes``, name to number, gets a column ``AP-name`` after the published ones.
    """
    overall = curves.precision[:, 0]
    thresholds = IOU_THRESHOLDS.round(2).tolist()
    values = [overall, *(overall[:, thresholds.index(iou)] for iou in (0.5, 0.75))]
    values += [curves.precision[:, area] for area in range(1, len(AREAS))]
    values += [curves.recall[:, column] for column in range(len(METRICS) // 2)]
    values += [overall[..., number] for number in classes.values()]
    names = (*METRICS, *(f"AP-{name}" for name in classes))
    return {name: _percent(value) for name, value in zip(names, values, strict=True)}


def _percent(values: np.ndarray) -> np.ndarray:
    """Return 100 times the mean of each draw, the first axis, over what is not nan."""
    known = [draw[~np.isnan(draw)] for draw in values]
    return np.array([draw.mean() * 100 if draw.size else np.nan for draw in known])
