"""How far a result would move on other images of the same kind: a bootstrap over images.

Each resample draws as many images as the test set has, with replacement. The detections are
matched with the boxes once; a resample only counts each image as often as it was drawn. Runs on
the same images share their draws, so the noise of a difference is much smaller than that of its
parts: what an easy image adds, it adds to both.

Of the resamples only the spread is used, around the result itself. Their centre lies above it: the
metric takes the best precision at or beyond each recall, and the best of fewer different images
is more often good by luck.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from d2scale.coco.matching import AREAS, IOU_THRESHOLDS, Matches, Truth, match
from d2scale.coco.metric import METRICS, RECALL_THRESHOLDS
from d2scale.report.detections import Detected

RESAMPLES = 200
# The share of resamples that lies inside a band.
COVERAGE = 0.95
_SEED = 0
# Numbers in one array, so that large test sets are done in several turns.
_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Noise:
    """A result and what it becomes on resampled images.

    Attributes:
        exact: metrics on all images as they are, percent: the published columns and ``AP-name``
            of every class; nan where there is nothing to find.
        draws: the same for each resample, shape (resamples,).
    """

    exact: Mapping[str, float]
    draws: Mapping[str, np.ndarray]

    def band(self, name: str) -> tuple[float, float] | None:
        """Return the range that holds :data:`COVERAGE` of the resamples, None without spread."""
        if name not in self.draws:
            return None
        return _around(self.exact[name], self.draws[name])

    def half_width(self, name: str) -> float | None:
        """Return half of the band's width."""
        band = self.band(name)
        return None if band is None else (band[1] - band[0]) / 2

    def difference(self, other: Noise, name: str) -> tuple[float, float] | None:
        """Return the band of this minus ``other``, which must be on the same images."""
        if name not in self.draws or name not in other.draws:
            return None
        exact = self.exact[name] - other.exact[name]
        return _around(exact, self.draws[name] - other.draws[name])


def _around(exact: float, draws: np.ndarray) -> tuple[float, float] | None:
    known = draws[np.isfinite(draws)]
    if len(known) < 2 or not np.isfinite(exact):
        return None
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(known - known.mean(), (tail, 1 - tail))
    return exact + float(low), exact + float(high)


def bootstrap(detected: Detected, resamples: int = RESAMPLES) -> Noise:
    """Resample the images of a test set.

    Args:
        detected: detections and ground truth.
        resamples: how many; the same images give the same draws to every run.
    """
    images = detected.truth.images
    draws = np.random.default_rng(_SEED).multinomial(
        images, np.full(images, 1 / images), size=resamples
    )
    # The first row counts every image once: the result itself.
    counts = np.concatenate([np.ones((1, images)), draws]).astype(np.float64)
    metrics = weighted_metrics(detected, counts)
    return Noise(
        {name: float(values[0]) for name, values in metrics.items()},
        {name: values[1:] for name, values in metrics.items()},
    )


def weighted_metrics(detected: Detected, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the official COCO metric with each image counted several times.

    Args:
        detected: detections and ground truth.
        counts: how often each image counts, whole numbers, shape (rows, images), float64.

    Returns:
        As :attr:`Noise.exact`, each shape (rows,).
    """
    classes = len(detected.truth.category_ids)
    truth = detected.truth.boxes
    matches = match(truth, detected.found, classes, detected.max_dets)
    limits = (1, min(10, detected.max_dets), detected.max_dets)
    by_class = [_of_class(matches, truth, number, limits, counts) for number in range(classes)]
    precision = np.stack([each.precision for each in by_class])
    recall = np.stack([each.recall for each in by_class])
    at50, at75 = (IOU_THRESHOLDS.round(2).tolist().index(level) for level in (0.5, 0.75))
    values = [
        _percent(precision[:, 0]),
        _percent(precision[:, 0, at50 : at50 + 1]),
        _percent(precision[:, 0, at75 : at75 + 1]),
        *(_percent(precision[:, area]) for area in range(1, len(AREAS))),
        *(_percent(recall[:, limit, 0]) for limit in range(len(limits))),
        *(_percent(recall[:, -1, area]) for area in range(1, len(AREAS))),
    ]
    metrics = dict(zip(METRICS, values, strict=True))
    for name, own in zip(detected.truth.class_names, precision, strict=True):
        metrics[f"AP-{name}"] = _percent(own[None, 0])
    return metrics


@dataclass(frozen=True)
class _OfClass:
    """Average precision and recall of one class; nan where there is nothing to find.

    Attributes:
        precision: shape (areas, IoU thresholds, rows).
        recall: shape (limits, areas, IoU thresholds, rows).
    """

    precision: np.ndarray
    recall: np.ndarray


def _of_class(
    matches: Matches, truth: Truth, number: int, limits: tuple[int, ...], counts: np.ndarray
) -> _OfClass:
    first, last = np.searchsorted(matches.found.classes, (number, number + 1))
    images, ranks = matches.found.images[first:last], matches.ranks[first:last]
    shape = (len(AREAS), len(IOU_THRESHOLDS), len(counts))
    precision = np.full(shape, np.nan)
    recall = np.full((len(limits), *shape), np.nan)
    positives = _positives(truth, number, counts)
    step = max(1, _AT_ONCE // max(1, last - first))
    for start in range(0, len(counts), step):
        rows = slice(start, start + step)
        weights = counts[rows, images]
        for area in range(len(AREAS)):
            hits = matches.hits[area, :, first:last]
            misses = matches.misses[area, :, first:last]
            wanted = positives[area, rows]
            precision[area, :, rows] = _average_precision(hits, misses, weights, wanted)
            for place, limit in enumerate(limits):
                found = (hits & (ranks < limit)) @ weights.T
                recall[place, area, :, rows] = np.divide(
                    found, wanted, out=np.full(found.shape, np.nan), where=wanted > 0
                ).reshape(found.shape)
    return _OfClass(precision, recall)


def _positives(truth: Truth, number: int, counts: np.ndarray) -> np.ndarray:
    """Return how many boxes of a class there are to be found, shape (areas, rows)."""
    own = truth.take(np.flatnonzero((truth.classes == number) & ~truth.crowds))
    return np.stack(
        [
            counts[:, own.images[(own.areas >= low) & (own.areas <= high)]].sum(axis=1)
            for low, high in AREAS.values()
        ]
    )


def _average_precision(
    hits: np.ndarray, misses: np.ndarray, weights: np.ndarray, positives: np.ndarray
) -> np.ndarray:
    """Return the mean of the best precision at or beyond each recall threshold.

    Precision only falls between two hits, so it is looked at where hits are.

    Args:
        hits, misses: (IoU thresholds, n), by descending score.
        weights: how often each detection counts, (rows, n).
        positives: boxes to be found, (rows,).

    Returns:
        (IoU thresholds, rows), nan without boxes.
    """
    result = np.zeros((len(hits), len(weights)))
    counted = hits | misses
    kept = np.flatnonzero(counted.any(axis=0))
    weights, hits, counted = weights[:, kept], hits[:, kept], counted[:, kept]
    sums = weights.cumsum(axis=1)
    for level in range(len(hits)):
        at, left_out = np.flatnonzero(hits[level]), np.flatnonzero(~counted[level])
        if len(at):
            found = weights[:, at].cumsum(axis=1)
            too_many = np.zeros((len(weights), len(left_out) + 1))
            weights[:, left_out].cumsum(axis=1, out=too_many[:, 1:])
            total = sums[:, at] - too_many[:, np.searchsorted(left_out, at)]
            result[level] = _mean_over_recall(found, total, positives)
    return np.where(positives > 0, result, np.nan)


def _mean_over_recall(found: np.ndarray, total: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Return the mean over recall thresholds of the best precision from there on: (rows,).

    Args:
        found, total: hits, and all detections that count, up to each hit: (rows, hits).
        positives: boxes to be found, (rows,).
    """
    precision = found / (total + np.spacing(1))
    best = np.zeros((len(found), found.shape[1] + 1))
    best[:, :-1] = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    means = np.zeros(len(found))
    for row, wanted in enumerate(positives):
        if wanted > 0:
            places = (found[row] / wanted).searchsorted(RECALL_THRESHOLDS, "left")
            means[row] = best[row, places].mean()
    return means


def _percent(values: np.ndarray) -> np.ndarray:
    """Return 100 times the mean over classes and thresholds, shape (rows,).

    Args:
        values: (classes, thresholds, rows), nan for classes that do not count.
    """
    known = np.isfinite(values[:, 0])
    number = known.sum(axis=0)
    sums = np.where(known, values.mean(axis=1), 0).sum(axis=0)
    return np.divide(100 * sums, number, out=np.full(len(number), np.nan), where=number > 0)
