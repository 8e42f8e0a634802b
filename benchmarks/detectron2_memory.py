"""How far predicted memory of detectron2's models lies from that of counted steps.

``python benchmarks/detectron2_memory.py [MODEL ...]``, with detectron2 installed. Each recipe is
predicted on a CPU from steps of one and two images, then a real step of four is counted: with as
many proposals on instances as a step can sample, which is what is predicted, and with those alone
that random weights propose.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from machine import keep
from PIL import Image
from tabulate import tabulate

from d2scale.detectron2.config import load_cfg
from d2scale.detectron2.lazy_config import load_lazy_config, read_lazy_recipe
from d2scale.detectron2.memory import TrainingMemory
from d2scale.detectron2.plain_memory import LazyMemory, PlainMemory
from d2scale.memory.predict import Workload, record_steps
from d2scale.step.optimizer_step import OptimizerStep

DATASET = "d2scale_memory_benchmark"
COUNTED = 4
KEYPOINTS = 17
RECIPES = {
    "RetinaNet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "Faster R-CNN": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "Mask R-CNN": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "Cascade Mask R-CNN": "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "Keypoint R-CNN": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "Panoptic FPN": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "FCOS (LazyConfig)": "COCO-Detection/fcos_R_50_FPN_1x.py",
    "Mask R-CNN (LazyConfig)": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py",
}


def draw_dataset(folder: Path) -> list[dict[str, Any]]:
    """Draw four images of 640x480 with masks, keypoints and maps of classes; return them."""
    rng = np.random.default_rng(0)
    entries = []
    for number in range(4):
        image, classes = folder / f"{number}.png", folder / f"{number}_classes.png"
        Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(image)
        Image.fromarray(rng.integers(0, 54, (480, 640), dtype=np.uint8)).save(classes)
        entries.append(
            {
                "file_name": str(image),
                "sem_seg_file_name": str(classes),
                "image_id": number,
                "height": 480,
                "width": 640,
                "annotations": [_annotation(rng) for _ in range(8 + number)],
            }
        )
    return entries


def register_dataset(name: str, folder: Path) -> None:
    """Register the drawn images with detectron2."""
    entries = draw_dataset(folder)
    DatasetCatalog.register(name, lambda: copy.deepcopy(entries))
    names = [str(index) for index in range(KEYPOINTS)]
    metadata = MetadataCatalog.get(name)
    metadata.set(thing_classes=["thing"], keypoint_names=names, keypoint_flip_map=[])


def _annotation(rng: np.random.Generator) -> dict[str, Any]:
    x, y = rng.uniform(0, 400), rng.uniform(0, 300)
    width, height = rng.uniform(40, 200), rng.uniform(40, 150)
    points = np.stack(
        [x + rng.random(KEYPOINTS) * width, y + rng.random(KEYPOINTS) * height, np.full(17, 2)], 1
    )
    return {
        "bbox": [x, y, width, height],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "segmentation": [[x, y, x + width, y, x + width, y + height, x, y + height]],
        "keypoints": points.flatten().tolist(),
        "iscrowd": 0,
    }


def memory_of(recipe: str, short_edge: int) -> TrainingMemory:
    """Return the memory of a recipe of detectron2's zoo on the drawn images."""
    path = f"detectron2://{recipe}"
    longest = round(short_edge * 1333 / 800)
    if not path.endswith(".py"):
        opts = ["DATASETS.TRAIN", f"('{DATASET}',)", "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
        opts += ["INPUT.MIN_SIZE_TRAIN", f"({short_edge},)", "INPUT.MAX_SIZE_TRAIN", str(longest)]
        return PlainMemory(load_cfg(path, opts))
    lazy = load_lazy_config(path, ["train.device=cpu", f"dataloader.train.dataset.names={DATASET}"])
    resize = lazy.dataloader.train.mapper.augmentations[0]
    resize.short_edge_length, resize.max_size = (short_edge,), longest
    return LazyMemory(lazy, read_lazy_recipe(lazy))


def counted_bytes(step: OptimizerStep, workload: Workload, images: int) -> int:
    """Return the most bytes that tensors hold in a real step, taken as on a GPU."""
    _, tracker = record_steps(step, workload, (images,))
    return tracker.peak_bytes


def compare(name: str, short_edge: int) -> dict[str, Any]:
    """Return one row: counted MB, and how far off the prediction is in per cent."""
    memory = memory_of(RECIPES[name], short_edge)
    with EventStorage(1):
        return _compare(name, memory, memory._cfg)


def _compare(name: str, memory: TrainingMemory, cfg: Any) -> dict[str, Any]:
    workload, device = memory.workload(cfg), torch.device("cpu")
    start = time.perf_counter()
    prediction = memory.predicted(cfg)
    seconds = time.perf_counter() - start
    torch.manual_seed(1)
    most = counted_bytes(workload.build_step(device), workload, COUNTED)
    fewest = counted_bytes(memory.build_step(cfg, device), workload, COUNTED)
    height, width = memory.batches.size
    return {
        "model": f"{name}, {height}x{width}",
        "steps": "fake" if prediction.fake else "real",
        "seconds": round(seconds, 1),
        f"counted MB at {COUNTED}": round(most / 1e6, 1),
        f"error % at {COUNTED}": round(100 * (prediction.live_bytes(COUNTED) / most - 1), 3),
        "with proposals of random weights %": round(100 * (fewest / most - 1), 2),
    }


def main() -> None:
    """Compare the models that were asked for, keep the rows, print all that are kept."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", choices=[[], *RECIPES], help="all by default")
    parser.add_argument("--short-edge", type=int, default=256, metavar="PIXELS")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        register_dataset(DATASET, Path(folder))
        for name in arguments.models or RECIPES:
            rows = keep("detectron2_memory", [compare(name, arguments.short_edge)], "model")
    kept = sorted(rows, key=lambda row: str(row["model"]))
    shown = [{key: value for key, value in row.items() if key != "machine"} for row in kept]
    print(tabulate(shown, headers="keys", tablefmt="pipe"))


if __name__ == "__main__":
    main()
