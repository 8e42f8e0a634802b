"""Which detection matches which annotated box, by COCO's rule, for all images at once.

The rule only couples detections of one image and class, so the first detections of all images and
classes are matched together, then the second ones, and so on. The matches are pycocotools'.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
# All, small, medium and large: smallest and largest area in square pixels, both included.
AREAS = np.array([(0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10)])
_NO_BOX = -1


class GroundTruth(NamedTuple):
    """Annotated boxes, in the order of the annotation file."""

    ids: np.ndarray  # of the annotations, shape (m,), int64
    images: np.ndarray  # numbers from 0, shape (m,), int64
    classes: np.ndarray  # likewise
    boxes: np.ndarray  # x, y, width, height in pixels, shape (m, 4), float64
    areas: np.ndarray  # of the objects, square pixels, shape (m,), float64
    crowds: np.ndarray  # shape (m,), bool

    def take(self, rows: np.ndarray | slice) -> GroundTruth:
        """Return the boxes of these row numbers, in this order, or where a mask is true."""
        return GroundTruth(*(column[rows] for column in self))


class Detections(NamedTuple):
    """Detected boxes; columns as in :class:`GroundTruth`."""

    images: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray  # shape (n,), float64

    def take(self, rows: np.ndarray | slice) -> Detections:
        """Return the detections of these rows, likewise."""
        return Detections(*(column[rows] for column in self))


def corners_of(boxes: np.ndarray) -> np.ndarray:
    """Turn x, y, width, height into x0, y0, x1, y1, both shape (n, 4)."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def numbers_of(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return the place of every id among the sorted ``known`` ones, -1 where it is not there."""
    if not len(known):
        return np.full(len(ids), -1, dtype=np.int64)
    known = np.sort(known)
    places = np.searchsorted(known, ids).clip(max=len(known) - 1)
    return np.where(known[places] == ids, places, -1)


class Matches(NamedTuple):
    """What became of the n detections that count, and the m boxes.

    Detections are by class and descending score, in pycocotools' order where scores are equal.
    """

    detections: Detections
    ranks: np.ndarray  # place among the detections of the same image and class, shape (n,), int64
    hits: np.ndarray  # matches a box at (area, IoU threshold), shape (4, 10, n), bool
    misses: np.ndarray  # matches none, likewise; those that are neither do not count there
    truth: GroundTruth  # by class
    positives: np.ndarray  # boxes that should be detected at (area), shape (4, m), bool

    def of_class(self, number: int) -> Matches:
        """Return the matches of one class."""
        rows, boxes = (
            slice(*np.searchsorted(classes, (number, number + 1)))
            for classes in (self.detections.classes, self.truth.classes)
        )
        return Matches(
            self.detections.take(rows),
            self.ranks[rows],
            self.hits[..., rows],
            self.misses[..., rows],
            self.truth.take(boxes),
            self.positives[:, boxes],
        )


def match(truth: GroundTruth, detections: Detections, max_dets: int) -> Matches:
    """Match the ``max_dets`` best detections of each image and class with the boxes."""
    detections, ranks = _best(detections, max_dets)
    truth = truth.take(np.lexsort((truth.images, truth.classes)))
    ignored = _outside(truth.areas) | truth.crowds
    partners = _partners(truth, detections, ignored)
    # A partner of -1 picks the last entry. pycocotools takes a match with the annotation 0 for
    # none; so does this, to be equal.
    matched = np.append(truth.ids, 0)[partners] != 0
    area = np.arange(len(AREAS))[:, None, None]
    out = np.append(ignored, np.zeros((len(AREAS), 1), dtype=bool), axis=1)[area, partners]
    out |= ~matched & _outside(detections.boxes[:, 2] * detections.boxes[:, 3])[:, None]
    order = np.lexsort((-detections.scores, detections.classes))
    return Matches(
        detections.take(order),
        ranks[order],
        (matched & ~out)[..., order],
        (~matched & ~out)[..., order],
        truth,
        ~ignored,
    )


def _best(detections: Detections, max_dets: int) -> tuple[Detections, np.ndarray]:
    """Return the best of each image and class, by class, image and score, and their ranks."""
    keys = (-detections.scores, detections.images, detections.classes)
    detections = detections.take(np.lexsort(keys))
    ranks = _ranks(detections.classes, detections.images)
    kept = np.flatnonzero(ranks < max_dets)
    return detections.take(kept), ranks[kept]


def _ranks(*keys: np.ndarray) -> np.ndarray:
    """Number the members of each run of equal keys from 0."""
    count = len(keys[0])
    first = np.ones(count, dtype=bool)
    if count:
        first[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    starts = np.flatnonzero(first)
    return np.arange(count) - np.repeat(starts, np.diff(np.append(starts, count)))


def _outside(areas: np.ndarray) -> np.ndarray:
    """Return which areas lie outside each of :data:`AREAS`, shape (4, n), bool."""
    return (areas < AREAS[:, :1]) | (areas > AREAS[:, 1:])


class _Pairs(NamedTuple):
    """Detections and boxes, by row, that overlap enough for a threshold."""

    detections: np.ndarray
    boxes: np.ndarray
    iou: np.ndarray


def _partners(truth: GroundTruth, detections: Detections, ignored: np.ndarray) -> np.ndarray:
    """Return the box that each detection takes at (area, threshold), shape (4, 10, n)."""
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)
    pairs = _overlapping(truth, detections, thresholds[0])
    areas, m, n = len(ignored), len(truth.ids), len(detections.scores)
    partners = np.full((areas * n, len(thresholds)), _NO_BOX, dtype=np.int64)
    taken = np.zeros((areas * m, len(thresholds)), dtype=bool)
    crowds = np.tile(truth.crowds, areas)[:, None]
    for rows, boxes, iou in _blocks(pairs, ignored, detections):
        free = ~taken[boxes] | crowds[boxes]
        hit = free & (iou[:, None] >= thresholds) & (partners[rows] == _NO_BOX)
        taken[boxes] |= hit
        partners[rows] = np.where(hit, (boxes % m)[:, None], partners[rows])
    return partners.reshape(areas, n, len(thresholds)).transpose(0, 2, 1)


def _overlapping(truth: GroundTruth, detections: Detections, threshold: float) -> _Pairs:
    """Pair the detections with boxes of their image and class; both are sorted by them."""
    stride = 1 + max(truth.images.max(initial=0), detections.images.max(initial=0))
    keys = truth.classes * stride + truth.images
    wanted = detections.classes * stride + detections.images
    first = np.searchsorted(keys, wanted, "left")
    counts = np.searchsorted(keys, wanted, "right") - first
    rows = np.repeat(np.arange(len(wanted)), counts)
    # A detection's boxes are neighbours: from its first one on, as many as it has.
    boxes = np.arange(len(rows)) + np.repeat(first - np.cumsum(counts) + counts, counts)
    iou = _iou(detections.boxes[rows], truth.boxes[boxes], truth.crowds[boxes])
    kept = np.flatnonzero(iou >= threshold)
    return _Pairs(rows[kept], boxes[kept], iou[kept])


def _iou(detected: np.ndarray, truth: np.ndarray, crowds: np.ndarray) -> np.ndarray:
    """Return the IoU of pairs; with a crowd, the part of the detection that lies in it."""
    far = np.minimum(detected[:, :2] + detected[:, 2:], truth[:, :2] + truth[:, 2:])
    width, height = (far - np.maximum(detected[:, :2], truth[:, :2])).T
    area = detected[:, 2] * detected[:, 3]
    both = width * height
    union = np.where(crowds, area, area + truth[:, 2] * truth[:, 3] - both)
    overlap = (width > 0) & (height > 0)
    return np.divide(both, union, out=np.zeros(len(both)), where=overlap)


def _blocks(pairs: _Pairs, ignored: np.ndarray, detections: Detections) -> Iterator[_Pairs]:
    """Yield pairs that can be judged at once, in the order in which they must be judged.

    The areas have rows of their own, for detections and boxes. A detection prefers boxes that
    count to ignored ones, then larger overlap, then the later box.
    """
    areas, m = ignored.shape
    n = len(detections.scores)
    area = np.repeat(np.arange(areas), len(pairs.iou))
    rows, boxes, iou = (np.tile(column, areas) for column in pairs)
    order = np.lexsort((-boxes, -iou, ignored[area, boxes], rows, area))
    area, rows, boxes, iou = (column[order] for column in (area, rows, boxes, iou))
    choice = _ranks(area, rows)
    # The rank of a detection among those of its image and class that overlap anything.
    leading = np.flatnonzero(choice == 0)
    group = area[leading], detections.classes[rows[leading]], detections.images[rows[leading]]
    turn = np.repeat(_ranks(*group), np.diff(np.append(leading, len(rows))))
    order = np.lexsort((choice, turn))
    starts = np.flatnonzero(_ranks(turn[order], choice[order]) == 0)
    for part in np.split(order, starts[1:]):
        yield _Pairs(area[part] * n + rows[part], area[part] * m + boxes[part], iou[part])
