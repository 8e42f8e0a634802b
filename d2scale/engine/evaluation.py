"""Detect on a whole dataset, on all ranks, and judge the detections."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch import nn

from d2scale.coco.metric import coco_metrics
from d2scale.coco.records import CocoDataset
from d2scale.coco.results import CocoResults
from d2scale.engine.data.chunks import Sample
from d2scale.errors import DataError, Fault
from d2scale.run_folder.files import RESULTS_FILE, make_folder, write_atomically
from d2scale.step.ranks import gather_on_first_rank

logger = logging.getLogger(__name__)

# The first images pay for caches and autotuning.
_WARMUP_IMAGES = 5


@dataclass(frozen=True)
class Detections:
    """Detections on many images, in columns.

    Attributes:
        image_ids: shape (n,), int64.
        boxes: x0 y0 x1 y1 in pixels of the original images, shape (n, 4), float32.
        scores: shape (n,), float32.
        classes: contiguous class numbers, shape (n,), int64.
    """

    image_ids: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[Detections]) -> Detections:
        """Return the detections of all parts, in order."""
        empty = cls(
            np.zeros(0, np.int64),
            np.zeros((0, 4), np.float32),
            np.zeros(0, np.float32),
            np.zeros(0, np.int64),
        )
        parts = [empty, *parts]
        return cls(
            np.concatenate([part.image_ids for part in parts]),
            np.concatenate([part.boxes for part in parts]),
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.classes for part in parts]),
        )


def evaluate(
    model: nn.Module,
    dataset: CocoDataset,
    loader: Iterable[list[Sample]],
    output_dir: str | Path,
    *,
    max_dets: int = 100,
) -> dict[str, float] | None:
    """Run a model over a dataset and compute the COCO metric. Every rank must call it.

    Args:
        model: ``model(samples)`` in eval mode returns a dict of boxes (original pixels), scores
            and classes for each sample. Its modules' modes are restored afterwards.
        dataset: what the loader loads; the metric is over all of its images and classes.
        loader: this rank's part.
        output_dir: gets :data:`RESULTS_FILE`, in COCO's results format.
        max_dets: best detections of an image that count.

    Returns:
        On rank 0 AP AP50 AP75 APs APm APl, ARdet1 ARdet10 ARdet100 (the last by ``max_dets``),
        ARs ARm ARl and AP-<class>, in percent, nan where there is no ground truth. Elsewhere
        None.

    Raises:
        DataError: if the model detects classes that the dataset does not have.
    """
    detections = _gather(run_inference(model, loader))
    if detections is None:
        return None
    results = _to_coco_results(detections, dataset)
    folder = Path(output_dir)
    make_folder(folder)
    path = folder / RESULTS_FILE
    write_atomically(path, results.to_json())
    logger.info("%d detections on %s written to %s", len(results), dataset.name, path)
    return coco_metrics(dataset, results, max_dets=max_dets)


@torch.no_grad()
def run_inference(model: nn.Module, loader: Iterable[list[Sample]]) -> Detections:
    """Detect on this rank's images, and log the seconds that an image takes."""
    parts = []
    clock = _InferenceClock()
    with _eval_mode(model):
        for samples in loader:
            with clock.time(len(samples)):
                outputs = [_to_arrays(output) for output in model(samples)]
            for sample, (boxes, scores, classes) in zip(samples, outputs, strict=True):
                image_ids = np.full(len(scores), sample["image_id"], dtype=np.int64)
                parts.append(Detections(image_ids, boxes, scores, classes))
    clock.log()
    return Detections.join(parts)


def _to_arrays(output: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # Copying to the host waits for the device, so the clock sees the whole work.
    boxes = output["boxes"].float().cpu().numpy().reshape(-1, 4)
    return boxes, output["scores"].float().cpu().numpy(), output["classes"].long().cpu().numpy()


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, and each of its modules back into its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _InferenceClock:
    """Seconds of forward and post-processing, without loading and without the first images."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.images = 0
        self._seen = 0

    @contextlib.contextmanager
    def time(self, images: int) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._seen >= _WARMUP_IMAGES:
            self.seconds += time.perf_counter() - start
            self.images += images
        self._seen += images

    def log(self) -> None:
        if self.images:
            speed = self.seconds / self.images
            logger.info("inference: %.4f s / img on this rank, %d images", speed, self._seen)


def _gather(detections: Detections) -> Detections | None:
    """Return the detections of all ranks on rank 0, None elsewhere."""
    parts = gather_on_first_rank(detections)
    return None if parts is None else Detections.join(parts)


def _to_coco_results(detections: Detections, dataset: CocoDataset) -> CocoResults:
    """Return original category ids, and boxes as x, y, width, height."""
    highest = int(detections.classes.max(initial=-1))
    if highest >= len(dataset.category_ids):
        raise DataError(
            [
                Fault(
                    "DATASETS.TEST",
                    dataset.name,
                    f"a dataset with the model's classes, at least {highest + 1}",
                    f"it has {len(dataset.category_ids)}; evaluate on the split that was trained",
                )
            ]
        )
    boxes = detections.boxes.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    return CocoResults(
        detections.image_ids,
        np.array(dataset.category_ids)[detections.classes],
        boxes,
        detections.scores.astype(np.float64),
    )


def format_results(results: Mapping[str, float]) -> str:
    """Return two tables for the log: the metrics, and AP by class in three columns.

    >>> print(format_results({"AP": 32.887, "AP50": 50.833}))
    |   AP   |  AP50  |
    |:------:|:------:|
    | 32.887 | 50.833 |
    """
    metrics = {name: value for name, value in results.items() if not name.startswith("AP-")}
    classes = [
        (name.removeprefix("AP-"), value)
        for name, value in results.items()
        if name.startswith("AP-")
    ]
    tables = [
        tabulate(
            [list(metrics.values())],
            headers=list(metrics),
            tablefmt="pipe",
            floatfmt=".3f",
            stralign="center",
            numalign="center",
        )
    ]
    if classes:
        columns = min(3, len(classes))
        rows = zip_longest(
            *[classes[start::columns] for start in range(columns)], fillvalue=("", "")
        )
        tables.append(
            tabulate(
                [list(chain.from_iterable(row)) for row in rows],
                headers=["category", "AP"] * columns,
                tablefmt="pipe",
                floatfmt=".3f",
                numalign="left",
            )
        )
    return "\n\n".join(tables)
