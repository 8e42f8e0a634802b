"""Checks of the contents of a COCO annotation file.

COCO's own files must pass: they have a handful of boxes of no size, and boxes that reach over
the image's edge by a rounding error. A larger share of either points at a broken conversion, and
a box that lies outside altogether, or has a negative size, is always a mistake.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import numpy as np

from d2scale.coco.annotation_file import AnnotationFile, examples
from d2scale.errors import Fault

logger = logging.getLogger(__name__)

# COCO train2017 has 4 boxes of no size among 860 001.
TOLERATED_SHARE = 1e-3
# Pixels over the image's edge that pass as rounding.
TOLERATED_OVERHANG = 2.0


def link_faults(file: AnnotationFile) -> Iterable[Fault]:
    """Yield a fault for annotations of unknown images, and one for unknown categories."""
    orphans = file.annotation_ids[file.image_numbers < 0]
    if len(orphans):
        yield Fault(
            f"image_id of {len(orphans)} of {len(file.annotation_ids)} annotations in {file.path}",
            f"missing from its images (annotations {examples(orphans)})",
            "the id of an image in the same file",
            "remove these annotations or list their images",
        )
    known = np.isin(file.category_ids, list(file.categories))
    if not known.all():
        unknown = np.unique(file.category_ids[~known])
        yield Fault(
            f"category_id of {(~known).sum()} of {len(known)} annotations in {file.path}",
            examples(unknown),
            f"one of its {len(file.categories)} categories",
            "remove these annotations or list their categories",
        )


def category_faults(file: AnnotationFile, wanted: Mapping[int, str]) -> Iterable[Fault]:
    """Yield a fault for classes that the file lacks, and one for those with another name.

    ``wanted`` gives the name that each category id must have; empty allows any.
    """
    if missing := [i for i in wanted if i not in file.categories]:
        yield Fault(
            f"categories of {file.path}",
            f"without ids {examples(missing)}",
            f"all {len(wanted)} classes of the dataset",
            "use COCO's own annotation file, or register a dataset with its own classes",
        )
    renamed = [
        f"{i} {file.categories[i]} for {name}"
        for i, name in wanted.items()
        if name and i in file.categories and file.categories[i] != name
    ]
    if renamed:
        yield Fault(
            f"categories of {file.path}",
            examples(renamed),
            "COCO's names for COCO's ids",
            "register a dataset with its own classes under a name of its own",
        )


def missing_image_faults(file: AnnotationFile, image_root: Path) -> Iterable[Fault]:
    """Yield one fault if images of the file are not in ``image_root``."""
    names_in = cache(_names_in)
    paths = ((name, image_root / name) for name in file.file_names)
    if missing := [name for name, path in paths if path.name not in names_in(path.parent)]:
        yield Fault(
            f"{len(missing)} of {len(file.file_names)} images of {file.path}",
            f"not there ({examples(missing)})",
            f"files in {image_root}",
            "put the images there, or correct file_name",
        )


def _names_in(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()


def usable_boxes(file: AnnotationFile, faults: list[Fault]) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes, cut to their images, and which of them can be trained on; add ``faults``.

    Returns:
        boxes: x0 y0 x1 y1 in pixels, shape (annotations, 4), float64, within the image.
        usable: shape (annotations,), bool: has a size, is no crowd, and its image is known.
    """
    judged = (file.image_numbers >= 0) & ~file.crowds
    limit = np.stack([file.widths, file.heights], axis=1)[file.image_numbers].astype(np.float64)
    corner, size = file.boxes[:, :2], file.boxes[:, 2:]
    broken = judged & ~(np.isfinite(file.boxes).all(axis=1) & (size >= 0).all(axis=1))
    judged &= ~broken
    empty = judged & (size == 0).any(axis=1)
    with np.errstate(invalid="ignore"):
        far = corner + size
        beyond = judged & ~empty & ((far <= 0) | (corner >= limit)).any(axis=1)
        overhang = np.maximum(-corner, far - limit).max(axis=1)
    usable = judged & ~empty & ~beyond
    clipped = usable & (overhang > 0)
    reaching = usable & (overhang > TOLERATED_OVERHANG)
    faults.extend(_box_faults(file, broken | beyond, empty, reaching))
    if empty.any() or clipped.any():
        logger.info(
            "%s: left out %d boxes of no size and cut %d of %d boxes to their image (by up to "
            "%.1f pixels)",
            *(file.path, empty.sum(), clipped.sum(), len(judged)),
            overhang[clipped].max(initial=0),
        )
    boxes = np.concatenate([np.maximum(corner, 0), np.minimum(far, limit)], axis=1)
    return boxes, usable


def _box_faults(
    file: AnnotationFile, impossible: np.ndarray, empty: np.ndarray, reaching: np.ndarray
) -> Iterable[Fault]:
    total = int((~file.crowds).sum())
    for faulty, what, tolerated in (
        (impossible, "outside the image, negative or not a number", 0.0),
        (empty, "of no size", TOLERATED_SHARE),
        (reaching, f"more than {TOLERATED_OVERHANG:g} pixels over the edge", TOLERATED_SHARE),
    ):
        count = int(faulty.sum())
        if count > tolerated * total:
            yield Fault(
                f"bbox of {count} of {total} annotations in {file.path}",
                f"{what} (annotations {examples(file.annotation_ids[faulty])})",
                "x, y, width, height in pixels, with a size, within the image",
                "correct or remove them; are they x0, y0, x1, y1?",
            )
