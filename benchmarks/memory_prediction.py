"""Predicted from one and two images against counted at four and eight, on a CPU.

    python benchmarks/memory_prediction.py [--size HEIGHTxWIDTH] [MODEL ...]

Counting is done by a dispatch mode over real steps, storage by storage. detectron2's models are
left out where detectron2 is not installed. Rows of one model replace its old ones in
``results/memory_prediction.json``; the table shows all that are kept there.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from machine import keep
from tabulate import tabulate

from d2scale.memory.predict import Prediction, Workload, predict, record_step
from d2scale.memory.tracker import StorageTracker
from d2scale.memory.worst_case import WorstCase
from d2scale.step.optimizer_step import OptimizerStep

COUNTED = (4, 8)
BOXES = 20


def _step(model: torch.nn.Module) -> OptimizerStep:
    trained = [p for p in model.parameters() if p.requires_grad]
    # Random weights behind frozen statistics would diverge: leave them as they are.
    sgd = torch.optim.SGD(trained, lr=0.0, momentum=0.9, foreach=True)
    return OptimizerStep(model, sgd, ims_per_gpu=1)


def metafcos(worst_case: WorstCase) -> Workload:
    """The default engine's model as published."""
    from d2scale.config import load_cfg
    from d2scale.engine.memory import workload_of

    return workload_of(load_cfg("d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml"), worst_case)


class TorchvisionLosses(torch.nn.Module):
    """A detector of torchvision that takes samples."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, samples: list[dict[str, Any]]) -> Any:
        targets = [{"boxes": s["boxes"], "labels": s["classes"] + 1} for s in samples]
        return self.model([sample["image"] for sample in samples], targets)


class Detectron2Losses(torch.nn.Module):
    """A detector of detectron2 with the storage of events that it asks for."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, samples: list[dict[str, Any]]) -> Any:
        from detectron2.utils.events import EventStorage

        with EventStorage():
            return self.model(samples)


def torchvision_model(name: str, worst_case: WorstCase) -> Workload:
    """A detector of torchvision, with its own resizing made to leave the images alone."""
    import torchvision

    height, width = worst_case.size
    sizes = {"min_size": min(height, width), "max_size": max(height, width)}

    def build_step(device: torch.device) -> OptimizerStep:
        build = getattr(torchvision.models.detection, name)
        model = build(weights=None, weights_backbone=None, num_classes=61, **sizes)
        return _step(TorchvisionLosses(model.train()))

    def make_batch(count: int) -> list[dict[str, Any]]:
        samples = worst_case.samples(count)
        return [{**sample, "image": sample["image"] / 255.0} for sample in samples]

    return Workload(build_step, make_batch)


def detectron2_model(config: str, worst_case: WorstCase) -> Workload:
    """A detector of detectron2's model zoo, with random weights."""
    from detectron2 import model_zoo
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances

    cfg = model_zoo.get_config(config)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""

    def build_step(device: torch.device) -> OptimizerStep:
        return _step(Detectron2Losses(build_model(cfg).train()))

    def make_batch(count: int) -> Any:
        samples = worst_case.samples(count)
        for sample in samples:
            boxes, classes = Boxes(sample["boxes"]), sample["classes"]
            sample["instances"] = Instances(worst_case.size, gt_boxes=boxes, gt_classes=classes)
        return samples

    return Workload(build_step, make_batch)


MODELS: dict[str, Callable[[WorstCase], Workload]] = {
    "MetaFCOS R-50": metafcos,
    "torchvision FCOS R-50": partial(torchvision_model, "fcos_resnet50_fpn"),
    "torchvision RetinaNet R-50": partial(torchvision_model, "retinanet_resnet50_fpn"),
    "detectron2 RetinaNet R-50": partial(
        detectron2_model, "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    ),
    "detectron2 Faster R-CNN R-50": partial(
        detectron2_model, "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    ),
}


def counted_bytes(workload: Workload, images: int) -> int:
    """Return the peak of a real step after a first one has made the optimizer's state."""
    torch.manual_seed(images)
    step = workload.build_step(torch.device("cpu"))
    tracker = StorageTracker()
    tracker.count(*step.held_tensors())
    for count in (1, images):
        record_step(step, workload.make_batch(count), tracker)
    return tracker.peak_bytes


def compare(name: str, size: tuple[int, int]) -> dict[str, Any]:
    """Return one row: counted MB and the error of the prediction in per cent."""
    torch.manual_seed(0)
    workload = MODELS[name](WorstCase((size,), BOXES, "benchmark"))
    start = time.perf_counter()
    prediction: Prediction = predict(workload)
    row: dict[str, Any] = {
        "model": f"{name}, {size[0]}x{size[1]}",
        "steps": "fake" if prediction.fake else "real",
        "seconds": round(time.perf_counter() - start, 2),
    }
    for images in COUNTED:
        counted = counted_bytes(workload, images)
        predicted = prediction.live_bytes(images)
        row[f"counted MB at {images}"] = round(counted / 1e6, 1)
        row[f"error % at {images}"] = round(100 * (predicted / counted - 1), 3)
    return row


def main() -> None:
    """Compare the models that were asked for, keep the rows, print all that are kept."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", choices=[[], *MODELS], help="all by default")
    parser.add_argument("--size", default="320x512", metavar="HEIGHTxWIDTH")
    arguments = parser.parse_args()
    names = arguments.models or list(MODELS)
    height, width = map(int, arguments.size.split("x"))
    logging.disable(logging.INFO)
    if importlib.util.find_spec("detectron2") is None:
        print("detectron2 is not installed: its models are left out")
        names = [name for name in names if not name.startswith("detectron2")]
    made = [compare(name, (height, width)) for name in names]
    rows = sorted(keep("memory_prediction", made, "model"), key=lambda row: str(row["model"]))
    shown = [{k: v for k, v in row.items() if k != "machine"} for row in rows]
    print(tabulate(shown, headers="keys", tablefmt="pipe"))


if __name__ == "__main__":
    main()
