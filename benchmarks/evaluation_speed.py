"""The whole evaluation of detections, by d2scale and by pycocotools.

    pip install pycocotools
    python benchmarks/evaluation_speed.py [--images 5000] [--repeats 3]

Ground truth and detections are drawn: COCO's number of classes, boxes and sizes, 100 detections an
image. From arrays to the results file and the metrics; both read the same annotation file. All
numbers must be equal to the last bit, or the script fails.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import keep
from tabulate import tabulate

from d2scale.coco.metric import coco_metrics
from d2scale.coco.records import CocoDataset, Records
from d2scale.coco.results import CocoResults

CLASSES, BOXES, DETECTIONS = 80, 7, 100
AVERAGES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
RECALLS = ("ARdet1", "ARdet10", "ARdet100", "ARs", "ARm", "ARl")


def draw(images: int, folder: Path) -> tuple[CocoDataset, CocoResults]:
    """Write an annotation file and return the dataset with detections on it."""
    chance = np.random.default_rng(0)
    frequency = 1 / np.arange(1, CLASSES + 1) ** 0.8
    frequency /= frequency.sum()
    counts = chance.poisson(BOXES, images)
    image = np.repeat(np.arange(images), counts)
    sizes = np.array([(640, 480), (480, 640), (640, 427), (500, 375)])
    limit = sizes[chance.integers(0, 4, images)]
    classes = chance.choice(CLASSES, len(image), p=frequency)
    side = np.exp(chance.normal(np.log(60), 0.9, (len(image), 2))).clip(2, limit[image] - 1)
    corner = chance.random((len(image), 2)) * (limit[image] - side)
    boxes = np.concatenate([corner, side], axis=1)
    content = {
        "images": [
            {"id": n + 1, "file_name": f"{n}.jpg", "width": int(w), "height": int(h)}
            for n, (w, h) in enumerate(limit)
        ],
        "annotations": [
            {
                "id": n + 1,
                "image_id": int(image[n]) + 1,
                "category_id": int(classes[n]) + 1,
                "bbox": [round(value, 2) for value in boxes[n].tolist()],
                "area": round(float(side[n].prod()) * 0.6, 4),
                "iscrowd": int(chance.random() < 0.012),
            }
            for n in range(len(image))
        ],
        "categories": [{"id": n + 1, "name": f"class {n + 1}"} for n in range(CLASSES)],
    }
    path = folder / "truth.json"
    path.write_text(json.dumps(content))
    ids = np.arange(1, images + 1)
    starts = np.zeros(images + 1, dtype=np.int64)
    records = Records(ids.astype("S"), ids, ids, ids, starts, np.zeros((0, 4)), ids[:0])
    names = tuple(f"class {n + 1}" for n in range(CLASSES))
    dataset = CocoDataset("drawn", names, tuple(range(1, CLASSES + 1)), records, str(path))
    return dataset, _detections(chance, images, counts, boxes, classes)


def _detections(
    chance: np.random.Generator,
    images: int,
    counts: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
) -> CocoResults:
    """Around the image's boxes, from near to far; one in three of another class."""
    image = np.repeat(np.arange(images), DETECTIONS)
    start = np.cumsum(counts) - counts
    source = start[image] + chance.integers(0, np.maximum(counts, 1)[image])
    source = source.clip(max=len(boxes) - 1)
    spread = chance.choice([0.02, 0.1, 0.3, 1.0], (len(image), 1))
    shift = chance.normal(0, 1, (len(image), 4)) * np.tile(boxes[source, 2:], 2) * spread
    moved = boxes[source] + shift
    moved[:, 2:] = np.abs(moved[:, 2:]) + 1
    other = chance.choice(CLASSES, len(image))
    found = np.where(chance.random(len(image)) < 0.7, classes[source], other)
    scores = chance.beta(0.6, 4, len(image)).astype(np.float32)
    moved = moved.astype(np.float32).astype(np.float64)  # as a network gives them
    return CocoResults(image + 1, found + 1, moved, scores.astype(np.float64))


def ours(dataset: CocoDataset, results: CocoResults, target: Path) -> list[float]:
    """Write the results file and compute the metrics."""
    target.write_text(results.to_json())
    metrics = coco_metrics(dataset, results)
    return [metrics[name] for name in (*AVERAGES, *RECALLS)]


def theirs(dataset: CocoDataset, results: CocoResults, target: Path) -> list[float]:
    """The same by pycocotools, as its users do it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    columns = (results.image_ids, results.category_ids, results.boxes, results.scores)
    entries = [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in zip(*(c.tolist() for c in columns), strict=True)
    ]
    target.write_text(json.dumps(entries))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(dataset.json_file)
        evaluator = COCOeval(truth, truth.loadRes(entries), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [value * 100 for value in evaluator.stats.tolist()]


def main() -> None:
    """Time both in turn, compare their numbers, keep and print the row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    seconds: dict[str, list[tuple[float, float]]] = {"d2scale": [], "pycocotools": []}
    with tempfile.TemporaryDirectory() as folder:
        dataset, results = draw(options.images, Path(folder))
        for _ in range(options.repeats):
            numbers = {}
            for name, evaluate in (("d2scale", ours), ("pycocotools", theirs)):
                wall, cpu = time.perf_counter(), time.process_time()
                numbers[name] = evaluate(dataset, results, Path(folder) / "results.json")
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            if numbers["d2scale"] != numbers["pycocotools"]:
                raise SystemExit(f"the numbers differ: {numbers}")
    rows: list[dict[str, Any]] = []
    for name, taken in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*taken, strict=True))
        rows.append(
            {
                "evaluator": name,
                "images": options.images,
                "detections": len(results),
                "seconds": round(wall, 2),
                "CPU seconds": round(cpu, 2),
            }
        )
    for row in rows:
        row["times as fast"] = round(rows[1]["CPU seconds"] / row["CPU seconds"], 1)
        row["AP"] = round(numbers[row["evaluator"]][0], 4)
    kept = keep("evaluation_speed", rows, "evaluator")
    shown = [{k: v for k, v in row.items() if k != "machine"} for row in kept]
    print(tabulate(shown, headers="keys", tablefmt="pipe"))


if __name__ == "__main__":
    main()
