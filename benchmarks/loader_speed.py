"""Images a second on one core: from COCO's JPEGs, through the training augmentation, to batches.

    DETECTRON2_DATASETS=... python benchmarks/loader_speed.py [--images 200] [--repeats 5]

d2scale's loader and detectron2's mapper take turns on the same images at the same drawn sizes, in
this process, without workers. detectron2's row is there where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from machine import keep
from tabulate import tabulate

from d2scale.coco.dataset import load_training_dataset
from d2scale.coco.records import CocoDataset
from d2scale.coco.sizes import aspect_ratio_groups
from d2scale.config import load_cfg
from d2scale.engine.data.loader import build_train_loader
from d2scale.engine.data.sampling import StepSampler
from d2scale.engine.data.transforms import ResizeAndFlip
from d2scale.errors import DataError

SEED, IMS_PER_BATCH = 0, 4
RECIPE = "d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml"


def d2scale_loader(cfg: Any, dataset: CocoDataset, images: int) -> Iterator[int]:
    """Yield the number of images in each batch."""
    options = {"world_size": 1, "rank": 0, "ims_per_batch": IMS_PER_BATCH, "seed": SEED}
    with build_train_loader(cfg, dataset, **options) as loader:
        for _ in range(images // IMS_PER_BATCH):
            yield len(next(loader))


def detectron2_loader(cfg: Any, dataset: CocoDataset, images: int) -> Iterator[int]:
    """Map the images of the same steps by detectron2's mapper with the same short edges."""
    from detectron2.data import DatasetMapper
    from detectron2.data import transforms as T
    from detectron2.structures import BoxMode

    records = dataset.records
    groups = aspect_ratio_groups(records.widths, records.heights)
    sampler = StepSampler(len(records), IMS_PER_BATCH, SEED, groups=groups)
    augmentation = ResizeAndFlip.for_training(cfg)
    for _ in range(images // IMS_PER_BATCH):
        batch = []
        for draw in next(sampler):
            record = records[draw.image]
            drawn = augmentation.draw(SEED, draw, record.height, record.width)
            edge = min(drawn.height, drawn.width)
            steps = [T.ResizeShortestEdge(edge, cfg.INPUT.MAX_SIZE_TRAIN)]
            steps.append(T.RandomFlip(1.0 if drawn.flip else 0.0))
            mapper = DatasetMapper(True, augmentations=steps, image_format=cfg.INPUT.FORMAT)
            annotations = [
                {"bbox": box.tolist(), "bbox_mode": BoxMode.XYXY_ABS, "category_id": int(number)}
                for box, number in zip(record.boxes, record.classes, strict=True)
            ]
            entry = {"file_name": record.file_name, "annotations": annotations}
            batch.append(mapper({**entry, "height": record.height, "width": record.width}))
        yield len(batch)


LOADERS: dict[str, Callable[[Any, CocoDataset, int], Iterator[int]]] = {
    "d2scale": d2scale_loader,
    "detectron2 DatasetMapper": detectron2_loader,
}


def measure(
    cfg: Any, dataset: CocoDataset, loaders: dict[str, Any], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time the loaders in turn; return a row each."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for turn in range(options.repeats + 1):
        for name, load in loaders.items():
            wall, cpu = time.perf_counter(), time.process_time()
            count = sum(load(cfg, dataset, options.images))
            taken = (count / (time.perf_counter() - wall), count / (time.process_time() - cpu))
            if turn:  # the first turn reads the files into the system's cache
                times[name].append(taken)
    rows = []
    for name, speeds in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*speeds, strict=True))
        rows.append(
            {
                "loader": name,
                "images": options.images,
                "images / s": round(wall, 1),
                "images / CPU s": round(cpu, 1),
                "torch": torch.__version__.partition("+")[0],
            }
        )
    for row in rows if len(rows) > 1 else []:
        row["times detectron2's"] = round(row["images / CPU s"] / rows[1]["images / CPU s"], 2)
    return rows


def main() -> None:
    """Time the loaders in turn, keep and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cfg = load_cfg(RECIPE, ["DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu"])
    try:
        dataset = load_training_dataset(cfg)
    except DataError as error:
        print(f"left out: {error}")
        return
    loaders = dict(LOADERS)
    if importlib.util.find_spec("detectron2") is None:
        print("detectron2 is not installed and left out")
        del loaders["detectron2 DatasetMapper"]
    kept = keep("loader_speed", measure(cfg, dataset, loaders, options), "loader")
    shown = [{k: v for k, v in row.items() if k != "machine"} for row in kept]
    print(tabulate(shown, headers="keys", tablefmt="pipe"))


if __name__ == "__main__":
    main()
