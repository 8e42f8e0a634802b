"""Which detection finds which box, by COCO's rule, for all images at once.

pycocotools matches image after image, class after class, threshold after threshold in Python.
The rule only couples detections of one image and class, so here the first detections of all
images and classes are matched together, then the second ones, and so on. What is decided is the
same, to the last bit; ``tests/engine/test_coco_metric.py`` compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
# Smallest and largest area in square pixels, both included.
AREAS = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
_NOBODY = -1


class Truth(NamedTuple):
    """The boxes to be found, in the order of the annotation file.

    Attributes:
        ids: of the annotations, shape (m,), int64.
        images: number of the image, shape (m,), int64.
        classes: number of the class, shape (m,), int64.
        boxes: x, y, width, height in pixels, shape (m, 4), float64.
        areas: of the objects, square pixels, shape (m,), float64.
        crowds: shape (m,), bool.
    """

    ids: np.ndarray
    images: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowds: np.ndarray

    def take(self, order: np.ndarray) -> Truth:
        """Return the boxes of these numbers, in this order."""
        return Truth(*(column[order] for column in self))


class Found(NamedTuple):
    """Detections.

    Attributes:
        images, classes, boxes: as in :class:`Truth`, of n detections.
        scores: shape (n,), float64.
    """

    images: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    def take(self, order: np.ndarray) -> Found:
        """Return the detections of these numbers, in this order."""
        return Found(*(column[order] for column in self))


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


@dataclass(frozen=True)
class Matches:
    """What became of the detections that count.

    Attributes:
        found: the n detections, by class, within a class by descending score; the order of
            equal scores is pycocotools'.
        ranks: place among the detections of the same image and class, shape (n,), int64.
        hits: finds a box at (area, IoU threshold), shape (4, 10, n), bool.
        misses: finds nothing, likewise. Those that are neither do not count there.
        positives: boxes to be found by (area, class), shape (4, classes), int64.
    """

    found: Found
    ranks: np.ndarray
    hits: np.ndarray
    misses: np.ndarray
    positives: np.ndarray


def match(truth: Truth, found: Found, num_classes: int, max_dets: int) -> Matches:
    """Match the ``max_dets`` best detections of each image and class with the boxes."""
    found, ranks = _best(found, max_dets)
    truth = truth.take(np.lexsort((truth.images, truth.classes)))
    limits = np.array(list(AREAS.values()))[:, :, None]
    ignored = _outside(truth.areas, limits) | truth.crowds
    partners = _partners(truth, found, ignored)
    # A partner of -1 picks the last entry. pycocotools takes a match with the annotation 0 for
    # none; so does this, to be equal.
    matched = np.append(truth.ids, 0)[partners] != 0
    area = np.arange(len(AREAS))[:, None, None]
    out = np.append(ignored, np.zeros((len(AREAS), 1), dtype=bool), axis=1)[area, partners]
    own_areas = found.boxes[:, 2] * found.boxes[:, 3]
    out |= ~matched & _outside(own_areas, limits)[:, None]
    order = np.lexsort((-found.scores, found.classes))
    return Matches(
        found.take(order),
        ranks[order],
        (matched & ~out)[..., order],
        (~matched & ~out)[..., order],
        np.stack([np.bincount(truth.classes[~i], minlength=num_classes) for i in ignored]),
    )


def _best(found: Found, max_dets: int) -> tuple[Found, np.ndarray]:
    """Return the best of each image and class, by class, image and score, and their ranks."""
    found = found.take(np.lexsort((-found.scores, found.images, found.classes)))
    ranks = _places(found.classes, found.images)
    kept = np.flatnonzero(ranks < max_dets)
    return found.take(kept), ranks[kept]


def _places(*keys: np.ndarray) -> np.ndarray:
    """Number the members of each run of equal keys from 0."""
    count = len(keys[0])
    first = np.ones(count, dtype=bool)
    if count:
        first[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    starts = np.flatnonzero(first)
    return np.arange(count) - np.repeat(starts, np.diff(np.append(starts, count)))


def _outside(areas: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """(area, n), bool."""
    return (areas < limits[:, 0]) | (areas > limits[:, 1])


class _Pairs(NamedTuple):
    """Detections and boxes of the same image and class that overlap enough for a threshold."""

    found: np.ndarray
    truth: np.ndarray
    iou: np.ndarray


def _partners(truth: Truth, found: Found, ignored: np.ndarray) -> np.ndarray:
    """Return the box that each detection takes at (area, threshold), shape (4, 10, n)."""
    thresholds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)
    pairs = _overlapping(truth, found, thresholds[0])
    areas, m, n = len(ignored), len(truth.ids), len(found.scores)
    partners = np.full((areas * n, len(thresholds)), _NOBODY, dtype=np.int64)
    taken = np.zeros((areas * m, len(thresholds)), dtype=bool)
    crowds = np.tile(truth.crowds, areas)[:, None]
    for block in _blocks(pairs, ignored, found):
        of, to, iou = block
        free = ~taken[to] | crowds[to]
        hit = free & (iou[:, None] >= thresholds) & (partners[of] == _NOBODY)
        taken[to] |= hit
        partners[of] = np.where(hit, (to % m)[:, None], partners[of])
    return partners.reshape(areas, n, len(thresholds)).transpose(0, 2, 1)


def _overlapping(truth: Truth, found: Found, threshold: float) -> _Pairs:
    """Pair detections (by class and image) with boxes (likewise sorted)."""
    stride = 1 + max(truth.images.max(initial=0), found.images.max(initial=0))
    keys = truth.classes * stride + truth.images
    wanted = found.classes * stride + found.images
    first = np.searchsorted(keys, wanted, "left")
    counts = np.searchsorted(keys, wanted, "right") - first
    of = np.repeat(np.arange(len(wanted)), counts)
    to = (
        np.arange(len(of))
        - np.repeat(np.cumsum(counts) - counts, counts)
        + np.repeat(first, counts)
    )
    iou = _iou(found.boxes[of], truth.boxes[to], truth.crowds[to])
    kept = np.flatnonzero(iou >= threshold)
    return _Pairs(of[kept], to[kept], iou[kept])


def _iou(found: np.ndarray, truth: np.ndarray, crowds: np.ndarray) -> np.ndarray:
    """IoU of pairs of boxes; with a crowd, the part of the detection that lies in it."""
    far = np.minimum(found[:, :2] + found[:, 2:], truth[:, :2] + truth[:, 2:])
    width, height = (far - np.maximum(found[:, :2], truth[:, :2])).T
    own = found[:, 2] * found[:, 3]
    both = width * height
    union = np.where(crowds, own, own + truth[:, 2] * truth[:, 3] - both)
    overlap = (width > 0) & (height > 0)
    return np.divide(both, union, out=np.zeros(len(both)), where=overlap)


def _blocks(pairs: _Pairs, ignored: np.ndarray, found: Found) -> Iterator[_Pairs]:
    """Yield pairs that can be judged at once, in the order in which they must be judged.

    The areas are told apart by numbers of their own for detections and boxes. A detection
    prefers boxes that count to ignored ones, then larger overlap, then the later box.
    """
    areas, m = ignored.shape
    n, count = len(found.scores), len(pairs.found)
    area = np.repeat(np.arange(areas), count)
    of, to, iou = (np.tile(column, areas) for column in pairs)
    order = np.lexsort((-to, -iou, ignored[area, to], of, area))
    area, of, to, iou = (column[order] for column in (area, of, to, iou))
    choice = _places(area, of)
    # The how manieth detection of its image and class, among those that overlap anything.
    leading = np.flatnonzero(choice == 0)
    group = area[leading], found.classes[of[leading]], found.images[of[leading]]
    turn = np.repeat(_places(*group), np.diff(np.append(leading, len(of))))
    order = np.lexsort((choice, turn))
    starts = np.flatnonzero(_places(turn[order], choice[order]) == 0)
    for rows in np.split(order, starts[1:]):
        yield _Pairs(area[rows] * n + of[rows], area[rows] * m + to[rows], iou[rows])
