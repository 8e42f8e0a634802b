"""A few test images: the ground truth beside the detections of each run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from d2scale.coco.images import read_rgb
from d2scale.coco.matching import Detections, GroundTruth, corners_of
from d2scale.errors import DataError
from d2scale.report.comparison import EvaluatedRun
from d2scale.report.detections import EvaluationSet
from d2scale.report.document import Picture, Section
from d2scale.report.drawing import draw_boxes, to_jpeg
from d2scale.report.formatting import join_names

Item = TypeVar("Item")
IMAGES = 4
SCORE_THRESHOLD = 0.3
# Detections to draw on each image for a run whose scores are all lower.
_BEST = 3
_LONGEST_EDGE = 640  # pixels
_JPEG_QUALITY = 82
_FEW_BOXES = range(2, 9)


def examples_section(group: Sequence[EvaluatedRun], notes: list[str]) -> Section | None:
    """Draw examples of runs that were tested on the same images.

    Returns None if no run's detections are known or no image can be read; ``notes`` name the
    images that cannot.
    """
    detected = {run.run.name: run.detected for run in group if run.detected is not None}
    if not detected:
        return None
    dataset = next(iter(detected.values())).dataset
    errors: list[tuple[Path, DataError]] = []
    candidates = ((dataset.path_of(n), n) for n in spread_images(dataset, IMAGES))
    images = {number: image for _, number, image in read_images(candidates, IMAGES, errors)}
    if errors:
        unread = ", ".join(str(path) for path, _ in errors)
        notes.append(f"example images of {dataset.name} that cannot be read: {unread}")
    shown = {name: _to_draw(of_run.detections, images) for name, of_run in detected.items()}
    pictures = []
    for number, image in images.items():
        image_id = int(dataset.file.image_ids[number])
        columns: list[tuple[str, GroundTruth | Detections]] = [
            ("ground truth", dataset.boxes_of(number)),
            *((name, drawn.take(drawn.images == number)) for name, (drawn, _) in shown.items()),
        ]
        for place, (name, boxes) in enumerate(columns):
            file, title = f"example-{image_id}-{place}.jpg", f"{name}, image {image_id}"
            scale = min(1.0, _LONGEST_EDGE / max(image.shape[:2]))  # small enough for a page
            content = to_jpeg(_draw(image, dataset, boxes, scale), _JPEG_QUALITY)
            pictures.append(Picture(file, title, content, group=str(image_id)))
    names = join_names((text, name) for name, (_, text) in shown.items())
    texts = tuple(f"{runs}: {text}." for text, runs in names.items())
    title = f"Examples from {dataset.name}"
    return Section(title, texts, pictures=tuple(pictures)) if pictures else None


def read_images(
    candidates: Iterable[tuple[Path, Item]], wanted: int, errors: list[tuple[Path, DataError]]
) -> Iterator[tuple[Path, Item, np.ndarray]]:
    """Yield up to ``wanted`` images that can be read; collect the ``errors`` of the others."""
    read = 0
    for path, item in candidates:
        if read == wanted or len(errors) > wanted:
            break
        try:
            image = read_rgb(str(path))
        except DataError as error:
            errors.append((path, error))
        else:
            read += 1
            yield path, item, image


def spread_images(dataset: EvaluationSet, wanted: int) -> list[int]:
    """Return all images by number, the most instructive first.

    They have a few boxes each, and the first ``wanted`` are spread over the whole set.
    """
    truth = dataset.truth
    counts = np.bincount(truth.images[~truth.crowds], minlength=len(dataset))
    good = [number for number, count in enumerate(counts.tolist()) if count in _FEW_BOXES]
    spread = [good[len(good) * part // wanted] for part in range(wanted)] if good else []
    return list(dict.fromkeys([*spread, *good, *range(len(dataset))]))


def _to_draw(detections: Detections, images: Iterable[int]) -> tuple[Detections, str]:
    """Return the detections to draw on these images, and what they are."""
    chosen = detections.take(np.isin(detections.images, list(images)))
    sure = chosen.scores >= SCORE_THRESHOLD
    if sure.any():
        text = f"detections with a score of {SCORE_THRESHOLD:.2f} and above"
        return chosen.take(sure), text
    chosen = chosen.take(np.lexsort((-chosen.scores, chosen.images)))
    ranks = np.arange(len(chosen.scores)) - np.searchsorted(chosen.images, chosen.images)
    text = f"the {_BEST} best detections of each image, none of which reaches {SCORE_THRESHOLD:.2f}"
    return chosen.take(ranks < _BEST), text


def draw_truth(
    image: np.ndarray, dataset: EvaluationSet, number: int, largest: tuple[int, int]
) -> np.ndarray:
    """Draw the annotated boxes on a copy of an image that fills this height or width."""
    scale = min(largest[0] / image.shape[0], largest[1] / image.shape[1])
    return _draw(image, dataset, dataset.boxes_of(number), scale)


def _draw(
    image: np.ndarray,
    dataset: EvaluationSet,
    boxes: GroundTruth | Detections,
    scale: float,
) -> np.ndarray:
    """Draw boxes on a copy of the image, made so many times as large."""
    height, width = image.shape[:2]
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = np.asarray(Image.fromarray(image).resize(size))
    scores = boxes.scores if isinstance(boxes, Detections) else None
    corners = corners_of(boxes.boxes) * scale
    return draw_boxes(small, corners, boxes.classes, dataset.class_names, scores)
