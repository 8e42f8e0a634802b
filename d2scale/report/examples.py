"""A few test images: what there is to find beside what each run found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from d2scale.coco.matching import corners_of
from d2scale.errors import DataError
from d2scale.report.comparison import Judged
from d2scale.report.detections import Detected, GroundTruth
from d2scale.report.document import Picture, Section
from d2scale.report.drawing import draw_boxes, to_jpeg

IMAGES = 4
SCORE_THRESHOLD = 0.3
# Of a run that is never as sure as that.
_BEST = 3
_LONGEST_EDGE = 640  # pixels
_JPEG_QUALITY = 82
_FEW_BOXES = range(2, 9)


@dataclass(frozen=True)
class _Boxes:
    """What is drawn on one image: x0 y0 x1 y1, classes, scores (None for ground truth)."""

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray | None = None


def examples_section(group: Sequence[Judged], notes: list[str]) -> Section | None:
    """Draw examples of runs that were tested on the same images.

    Images that cannot be read are named in ``notes`` and left out.

    Returns:
        None if no run's detections are known or no image can be read.
    """
    known = {each.run.name: each.detected for each in group if each.detected is not None}
    if not known:
        return None
    truth = next(iter(known.values())).truth
    unread: list[str] = []
    images = _readable(truth, unread)
    if unread:
        notes.append(f"example images of {truth.name} that cannot be read: {', '.join(unread)}")
    if not images:
        return None
    limits = {name: _threshold(detected, images) for name, detected in known.items()}
    pictures = []
    for number, image in images.items():
        boxes = {"ground truth": _truth_of(truth, number)}
        boxes.update(
            {name: _detections_of(each, number, limits[name]) for name, each in known.items()}
        )
        for place, (title, own) in enumerate(boxes.items()):
            image_id = int(truth.file.image_ids[number])
            content = _draw(image, truth.class_names, own)
            name = f"example-{image_id}-{place}.jpg"
            text = f"{title}, image {image_id}"
            pictures.append(Picture(name, text, content, group=str(image_id)))
    texts = _legends(limits)
    return Section(f"Examples from {truth.name}", texts, pictures=tuple(pictures))


def _readable(truth: GroundTruth, unread: list[str]) -> dict[int, np.ndarray]:
    """Return a few images by number; what cannot be read goes into ``unread``."""
    images: dict[int, np.ndarray] = {}
    for number in spread_images(truth, IMAGES):
        if len(images) == IMAGES or len(unread) > IMAGES:
            break
        image = _read(truth, number, unread)
        if image is not None:
            images[number] = image
    return images


def spread_images(truth: GroundTruth, wanted: int) -> list[int]:
    """Return all images, those first that show a test set best.

    They have a few boxes each, and the first ``wanted`` are spread over the whole set.
    """
    boxes = truth.boxes
    counts = np.bincount(boxes.images[~boxes.crowds], minlength=truth.images)
    good = [number for number in range(truth.images) if int(counts[number]) in _FEW_BOXES]
    spread = [good[len(good) * part // wanted] for part in range(wanted)] if good else []
    return list(dict.fromkeys([*spread, *good, *range(truth.images)]))


def _read(truth: GroundTruth, number: int, unread: list[str]) -> np.ndarray | None:
    """Return an RGB image, shape (height, width, 3), None if it cannot be read."""
    from d2scale.engine.data.images import read_image

    path = str(truth.image_root / truth.file.file_names[number])
    try:
        image: np.ndarray = read_image(path).permute(1, 2, 0).numpy()
    except DataError:
        unread.append(path)
        return None
    return image


def _truth_of(truth: GroundTruth, number: int) -> _Boxes:
    own = truth.objects_of(number)
    return _Boxes(corners_of(own.boxes), own.classes)


def _threshold(detected: Detected, images: Iterable[int]) -> float | None:
    """Return the score from which detections are drawn, None for the best of each image."""
    shown = np.isin(detected.found.images, list(images))
    sure = (detected.found.scores[shown] >= SCORE_THRESHOLD).any()
    return SCORE_THRESHOLD if sure else None


def _detections_of(detected: Detected, number: int, limit: float | None) -> _Boxes:
    own = detected.found.take(np.flatnonzero(detected.found.images == number))
    if limit is None:
        kept = np.argsort(-own.scores, kind="stable")[:_BEST]
    else:
        kept = np.flatnonzero(own.scores >= limit)
    own = own.take(kept)
    return _Boxes(corners_of(own.boxes), own.classes, own.scores)


def _legends(limits: Mapping[str, float | None]) -> tuple[str, ...]:
    names: dict[float | None, list[str]] = {}
    for name, limit in limits.items():
        names.setdefault(limit, []).append(name)
    texts = {
        SCORE_THRESHOLD: f"detections with a score of {SCORE_THRESHOLD:.2f} and above",
        None: f"the {_BEST} best detections of each image, none of which reaches "
        f"{SCORE_THRESHOLD:.2f}",
    }
    return tuple(f"{', '.join(each)}: {texts[limit]}." for limit, each in names.items())


def _draw(image: np.ndarray, class_names: Sequence[str], boxes: _Boxes) -> bytes:
    from PIL import Image

    height, width = image.shape[:2]
    scale = min(1.0, _LONGEST_EDGE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(Image.fromarray(image).resize(size))
    drawn = draw_boxes(small, boxes.boxes * scale, boxes.classes, class_names, boxes.scores)
    return to_jpeg(drawn, _JPEG_QUALITY)
