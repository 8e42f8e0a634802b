from __future__ import annotations

import contextlib
import io
import json
import math

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d2scale.coco.metric import coco_metrics
from d2scale.coco.records import CocoDataset, Records
from d2scale.coco.results import CocoResults

CATEGORIES = (2, 3, 7, 20, 21)  # of 21 nothing is annotated, of 20 only crowds
OTHER = 5  # a category of the file that is not in the dataset
IMAGES = 12


def draw_boxes(draw, count):
    """Boxes on a coarse grid: equal overlaps, overlaps of exactly 0.5, areas on the limits."""
    corner = draw.integers(0, 6, (count, 2)) * 8.0
    size = draw.choice([8.0, 16.0, 32.0, 64.0, 96.0, 128.0], (count, 2))
    rough = draw.random((count, 1)) < 0.4
    noise = draw.normal(0, 2, (count, 4)) * rough
    return np.concatenate([corner, size], axis=1) + np.abs(noise)


def write_truth(path, draw, first_id):
    count = 60
    annotations = [
        {
            "id": number + first_id,
            "image_id": int(draw.integers(1, IMAGES)) * 3,  # the last image has none
            "category_id": int(draw.choice([2, 2, 3, 7, OTHER, 20])),
            "bbox": box,
            "area": float(draw.choice([box[2] * box[3], 32**2, 96**2, 96**2 + 1, 12])),
            "iscrowd": int(draw.random() < 0.2),
        }
        for number, box in enumerate(draw_boxes(draw, count).tolist())
    ]
    for annotation in annotations:
        if annotation["category_id"] == 20:
            annotation["iscrowd"] = 1
    images = [{"id": 3 * n, "file_name": f"{n}.jpg", "height": 200, "width": 200} for n in order()]
    categories = [{"id": i, "name": f"c{i}"} for i in sorted((*CATEGORIES, OTHER))]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return annotations


def order():
    return reversed(range(1, IMAGES + 1))


def draw_results(draw, annotations, count):
    """Annotated boxes, some of them moved, and others; the scores repeat."""
    entries = []
    for box in draw_boxes(draw, count).tolist():
        entry = {
            "image_id": int(draw.integers(1, IMAGES + 1)) * 3,
            "category_id": int(draw.choice([2, 3, 7, OTHER, 20, 21])),
            "bbox": box,
            "score": int(draw.integers(1, 9)) / 8,
        }
        if draw.random() < 0.6:
            source = annotations[draw.integers(len(annotations))]
            entry.update({key: source[key] for key in ("image_id", "category_id")})
            moved = np.array(source["bbox"]) * draw.choice([1.0, 0.75, 0.5, 1.25], 4)
            entry["bbox"] = moved.tolist()
        entries.append(entry)
    return entries


def make_dataset(path, categories=CATEGORIES):
    ids = 3 * np.arange(1, IMAGES + 1)
    none = np.zeros(0, dtype=np.int64)
    records = Records(ids.astype("S"), ids, ids, ids, np.zeros(IMAGES + 1, int), none, none)
    return CocoDataset("d", tuple(f"c{i}" for i in categories), categories, records, str(path))


def official(path, entries, max_dets):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluator = COCOeval(truth, truth.loadRes([dict(entry) for entry in entries]), "bbox")
        evaluator.params.catIds = list(CATEGORIES)
        evaluator.params.maxDets = [1, min(10, max_dets), max_dets]
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator.eval


def mean(values):
    present = values[values > -1]
    return float(np.mean(present)) * 100 if present.size else math.nan


@pytest.mark.parametrize("max_dets", [1, 3, 10, 100, 300])
@pytest.mark.parametrize("seed", range(8))
def test_every_number_is_pycocotools_own(tmp_path, seed, max_dets):
    draw = np.random.default_rng(seed)
    path = tmp_path / "truth.json"
    annotations = write_truth(path, draw, first_id=seed % 2)  # 0 is a trap of pycocotools
    entries = draw_results(draw, annotations, 40 if seed < 2 else 900)
    expected = official(path, entries, max_dets)
    metrics = coco_metrics(make_dataset(path), entries, max_dets=max_dets)

    precision, recall = expected["precision"], expected["recall"]
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "ARdet1", "ARdet10", "ARdet100")
    assert list(metrics) == [*names, "ARs", "ARm", "ARl", *(f"AP-c{i}" for i in CATEGORIES)]
    wanted = {
        "AP": precision[..., 0, -1],
        "AP50": precision[0, ..., 0, -1],
        "AP75": precision[5, ..., 0, -1],
        "APs": precision[..., 1, -1],
        "APm": precision[..., 2, -1],
        "APl": precision[..., 3, -1],
        "ARdet1": recall[..., 0, 0],
        "ARdet10": recall[..., 0, 1],
        "ARdet100": recall[..., 0, 2],
        "ARs": recall[..., 1, -1],
        "ARm": recall[..., 2, -1],
        "ARl": recall[..., 3, -1],
        **{f"AP-c{i}": precision[:, :, n, 0, -1] for n, i in enumerate(CATEGORIES)},
    }
    np.testing.assert_array_equal(
        list(metrics.values()), [mean(wanted[name]) for name in metrics], strict=True
    )
    assert math.isnan(metrics["AP-c20"])
    assert math.isnan(metrics["AP-c21"])
    assert max_dets < 100 or 0 < metrics["AP"] < 100


def test_classes_in_any_order_keep_their_names(tmp_path):
    draw = np.random.default_rng(0)
    path = tmp_path / "truth.json"
    entries = draw_results(draw, write_truth(path, draw, 1), 300)
    ascending = coco_metrics(make_dataset(path), entries)
    other = coco_metrics(make_dataset(path, CATEGORIES[::-1]), entries)
    assert list(other)[-1] == "AP-c2"
    np.testing.assert_equal(other, {name: ascending[name] for name in other})


def test_columns_give_the_same_as_entries(tmp_path):
    draw = np.random.default_rng(3)
    path = tmp_path / "truth.json"
    entries = draw_results(draw, write_truth(path, draw, 1), 300)
    columns = CocoResults.from_entries(entries)
    dataset = make_dataset(path)
    np.testing.assert_equal(coco_metrics(dataset, columns), coco_metrics(dataset, entries))


def test_results_are_written_as_json_writes_them():
    draw = np.random.default_rng(0)
    entries = draw_results(draw, odd_annotations(draw), 20)
    assert CocoResults.from_entries(entries).to_json() == json.dumps(entries)
    assert CocoResults.from_entries([]).to_json() == "[]"


def odd_annotations(draw):
    box = [float(np.float32(0.1)), 1e-7, 1e20, 3.0]
    return [{"image_id": 2**40, "category_id": 1, "bbox": box}]
