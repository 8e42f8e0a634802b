"""Detect on whole datasets, on all ranks, and compute the COCO metrics of the detections."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fvcore.common.config import CfgNode
from tabulate import tabulate
from torch import nn

from d2scale.coco.dataset import load_dataset
from d2scale.coco.metric import coco_metrics
from d2scale.coco.records import CocoDataset
from d2scale.coco.results import CocoResults
from d2scale.engine.data.chunks import Sample
from d2scale.engine.data.loader import build_test_loader
from d2scale.engine.tiles import with_tiles
from d2scale.errors import DataError, Fault
from d2scale.run_folder.files import INFERENCE_FOLDER, RESULTS_FILE, make_folder, write_atomically
from d2scale.step.ranks import gather_on_first_rank, rank, world_size

logger = logging.getLogger(__name__)

# The first images pay for caches and autotuning.
_WARMUP_IMAGES = 5


class Detections(NamedTuple):
    """Detections on one image."""

    image_id: int  # as in the annotation file
    boxes: np.ndarray  # x0 y0 x1 y1 in pixels of the original image, shape (n, 4), float32
    scores: np.ndarray  # shape (n,), float32
    classes: np.ndarray  # contiguous class numbers, shape (n,), int64


def evaluate_datasets(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    """Evaluate on every dataset of ``DATASETS.TEST``, into ``OUTPUT_DIR/inference``.

    Images larger than a tile of ``D2SCALE.TILES`` are evaluated in tiles. Returns ``bbox/AP`` and
    so on, with several datasets ``NAME/bbox/AP``, on rank 0; elsewhere nothing.
    """
    results: dict[str, float] = {}
    names = tuple(cfg.DATASETS.TEST)
    detector = with_tiles(cfg, model)
    for name in names:
        dataset = load_dataset(name, key="DATASETS.TEST", cfg=cfg)
        loader = build_test_loader(
            cfg, dataset, world_size=world_size(), rank=rank(), keep_above=cfg.D2SCALE.TILES.SIZE
        )
        folder, prefix = Path(cfg.OUTPUT_DIR) / INFERENCE_FOLDER, "bbox/"
        if len(names) > 1:
            folder, prefix = folder / name, f"{name}/bbox/"
        metrics = evaluate(
            detector, dataset, loader, folder, max_dets=cfg.TEST.DETECTIONS_PER_IMAGE
        )
        if metrics is not None:
            logger.info("evaluation on %s:\n%s", name, format_results(metrics))
            results.update({prefix + key: value for key, value in metrics.items()})
    return results


def evaluate(
    model: nn.Module,
    dataset: CocoDataset,
    loader: Iterable[list[Sample]],
    output_dir: str | Path,
    *,
    max_dets: int = 100,
) -> dict[str, float] | None:
    """Run a model over a dataset and compute the COCO metrics. Every rank must call it.

    Args:
        model: ``model(samples)`` in eval mode returns a dict of boxes (original pixels), scores
            and classes for each sample. Its modules' modes are restored afterwards.
        dataset: the metrics are over all of its images and classes.
        loader: this rank's part of it.
        output_dir: gets :data:`RESULTS_FILE`, in COCO's results format.
        max_dets: best detections of an image that count.

    Returns:
        On rank 0 AP AP50 AP75 APs APm APl, ARdet1 ARdet10 ARdet100 (the last by ``max_dets``),
        ARs ARm ARl and AP-<class>, in percent, nan where there is no ground truth. Elsewhere
        None. DataError is raised if the model detects classes that the dataset does not have.
    """
    detections = gather_on_first_rank(run_inference(model, loader))
    if detections is None:
        return None
    results = _to_coco_results([*chain.from_iterable(detections)], dataset)
    folder = Path(output_dir)
    make_folder(folder)
    path = folder / RESULTS_FILE
    write_atomically(path, results.to_json())
    logger.info("%d detections on %s written to %s", len(results), dataset.name, path)
    return coco_metrics(dataset, results, max_dets=max_dets)


@torch.no_grad()
def run_inference(model: nn.Module, loader: Iterable[list[Sample]]) -> list[Detections]:
    """Detect on this rank's images, and log the seconds that an image takes."""
    detections: list[Detections] = []
    seconds: list[float] = []
    with _eval_mode(model):
        for samples in loader:
            start = time.perf_counter()
            outputs = model(samples)
            # Copying to the host waits for the device, so the clock sees the whole work.
            detections += map(_on_host, samples, outputs)
            seconds += [(time.perf_counter() - start) / len(samples)] * len(samples)
    if timed := seconds[_WARMUP_IMAGES:]:
        mean = sum(timed) / len(timed)
        logger.info("inference: %.4f s / img on this rank, %d images", mean, len(seconds))
    return detections


def _on_host(sample: Sample, output: Mapping[str, torch.Tensor]) -> Detections:
    return Detections(
        sample["image_id"],
        output["boxes"].float().cpu().numpy().reshape(-1, 4),
        output["scores"].float().cpu().numpy(),
        output["classes"].long().cpu().numpy(),
    )


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


def _to_coco_results(images: Sequence[Detections], dataset: CocoDataset) -> CocoResults:
    """Return original category ids, and boxes as x, y, width, height."""
    # The empty array is for a dataset on which nothing is detected.
    classes = np.concatenate([np.zeros(0, np.int64), *(image.classes for image in images)])
    highest = int(classes.max(initial=-1))
    if highest >= len(dataset.category_ids):
        allowed = f"a dataset with the model's classes, at least {highest + 1}"
        advice = f"it has {len(dataset.category_ids)}; evaluate on the split that was trained"
        raise DataError([Fault("DATASETS.TEST", dataset.name, allowed, advice)])
    boxes = np.concatenate([np.zeros((0, 4)), *(image.boxes for image in images)])
    boxes[:, 2:] -= boxes[:, :2]
    image_ids = np.array([image.image_id for image in images], dtype=np.int64)
    return CocoResults(
        image_ids.repeat([len(image.scores) for image in images]),
        np.array(dataset.category_ids)[classes],
        boxes,
        np.concatenate([np.zeros(0), *(image.scores for image in images)]),
    )


def format_results(results: Mapping[str, float]) -> str:
    """Return two tables for the log: the metrics, and AP by class in three columns.

    >>> print(format_results({"AP": 32.887, "AP50": 50.833}))
    |   AP   |  AP50  |
    |:------:|:------:|
    | 32.887 | 50.833 |
    """
    metrics = {name: value for name, value in results.items() if not name.startswith("AP-")}
    by_class = {name: value for name, value in results.items() if name not in metrics}
    classes = [(name.removeprefix("AP-"), value) for name, value in by_class.items()]
    table = partial(tabulate, tablefmt="pipe", floatfmt=".3f")
    values = [list(metrics.values())]
    tables = [table(values, list(metrics), stralign="center", numalign="center")]
    if classes:
        columns = min(3, len(classes))
        starts = range(0, len(classes), columns)
        rows = [list(chain.from_iterable(classes[start : start + columns])) for start in starts]
        tables.append(table(rows, ["category", "AP"] * columns, numalign="left"))
    return "\n\n".join(tables)
