"""A few test images: the ground truth beside the detections of each run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from d2scale.coco.images import read_rgb
from d2scale.coco.matching import Detections, corners_of
from d2scale.errors import DataError
from d2scale.report.comparison import EvaluatedRun
from d2scale.report.detections import EvaluationSet, RunDetections
from d2scale.report.document import Picture, Section
from d2scale.report.drawing import draw_boxes, to_jpeg
from d2scale.report.formatting import join_names

IMAGES = 4
SCORE_THRESHOLD = 0.3
# Detections to draw on each image for a run whose scores are all lower.
_BEST = 3
_LONGEST_EDGE = 640  # pixels
_JPEG_QUALITY = 82
_FEW_BOXES = range(2, 9)


def examples_section(group: Sequence[EvaluatedRun], notes: list[str]) -> Section | None:
    """Draw examples of runs that were tested on the same images.

    Images that cannot be read are named in ``notes`` and left out.

    Returns:
        None if no run's detections are known or no image can be read.
    """
    detected = {run.run.name: run.detected for run in group if run.detected is not None}
    if not detected:
        return None
    dataset = next(iter(detected.values())).dataset
    images = _read_some(dataset, notes)
    limits = {name: _score_limit(of_run, images) for name, of_run in detected.items()}
    pictures = []
    for number, image in images.items():
        truth = dataset.boxes_of(number)
        image_id = int(dataset.file.image_ids[number])
        columns = [("ground truth", _draw(image, dataset, truth.boxes, truth.classes))]
        for name, of_run in detected.items():
            shown = _shown_on(number, of_run.detections, limits[name])
            drawn = _draw(image, dataset, shown.boxes, shown.classes, shown.scores)
            columns.append((name, drawn))
        pictures += [
            Picture(
                f"example-{image_id}-{place}.jpg",
                f"{name}, image {image_id}",
                to_jpeg(drawn, _JPEG_QUALITY),
                group=str(image_id),
            )
            for place, (name, drawn) in enumerate(columns)
        ]
    texts = (f"{names}: {text}." for text, names in _legends(limits).items())
    title = f"Examples from {dataset.name}"
    return Section(title, tuple(texts), pictures=tuple(pictures)) if pictures else None


def _read_some(dataset: EvaluationSet, notes: list[str]) -> dict[int, np.ndarray]:
    """Return a few images by number; those that cannot be read are named in ``notes``."""
    images: dict[int, np.ndarray] = {}
    unread: list[str] = []
    for number in spread_images(dataset, IMAGES):
        if len(images) == IMAGES or len(unread) > IMAGES:
            break
        path = str(dataset.path_of(number))
        try:
            images[number] = read_rgb(path)
        except DataError:
            unread.append(path)
    if unread:
        notes.append(f"example images of {dataset.name} that cannot be read: {', '.join(unread)}")
    return images


def spread_images(dataset: EvaluationSet, wanted: int) -> list[int]:
    """Return all images by number, the most instructive first.

    They have a few boxes each, and the first ``wanted`` are spread over the whole set.
    """
    truth = dataset.truth
    counts = np.bincount(truth.images[~truth.crowds], minlength=len(dataset))
    good = [number for number, count in enumerate(counts.tolist()) if count in _FEW_BOXES]
    spread = [good[len(good) * part // wanted] for part in range(wanted)] if good else []
    return list(dict.fromkeys([*spread, *good, *range(len(dataset))]))


def _score_limit(of_run: RunDetections, images: Iterable[int]) -> float | None:
    """Return the score from which detections are drawn, None for the best of each image."""
    on_images = np.isin(of_run.detections.images, list(images))
    sure = (of_run.detections.scores[on_images] >= SCORE_THRESHOLD).any()
    return SCORE_THRESHOLD if sure else None


def _shown_on(image: int, detections: Detections, limit: float | None) -> Detections:
    own = detections.take(np.flatnonzero(detections.images == image))
    if limit is None:
        return own.take(np.argsort(-own.scores, kind="stable")[:_BEST])
    return own.take(np.flatnonzero(own.scores >= limit))


def _legends(limits: dict[str, float | None]) -> dict[str, str]:
    """Return the runs' names by what is drawn of their detections."""
    sure = f"detections with a score of {SCORE_THRESHOLD:.2f} and above"
    unsure = (
        f"the {_BEST} best detections of each image, none of which reaches {SCORE_THRESHOLD:.2f}"
    )
    return join_names((unsure if limit is None else sure, name) for name, limit in limits.items())


def _draw(
    image: np.ndarray,
    dataset: EvaluationSet,
    boxes: np.ndarray,
    classes: np.ndarray,
    scores: np.ndarray | None = None,
) -> np.ndarray:
    """Draw boxes, x y width height in pixels of the image, on a copy of at most the usual size."""
    height, width = image.shape[:2]
    scale = min(1.0, _LONGEST_EDGE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(Image.fromarray(image).resize(size))
    return draw_boxes(small, corners_of(boxes) * scale, classes, dataset.class_names, scores)
