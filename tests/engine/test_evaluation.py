from __future__ import annotations

import json
import logging
import math
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from d2scale.coco import catalog
from d2scale.coco.catalog import register_coco_dataset
from d2scale.coco.classes import COCO_CLASSES
from d2scale.coco.dataset import load_dataset
from d2scale.coco.metric import coco_metrics
from d2scale.config.defaults import get_cfg
from d2scale.engine.data.loader import build_test_loader
from d2scale.engine.evaluation import evaluate, format_results
from d2scale.errors import DataError
from warm_processes import Python

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
RECALLS = ("ARdet1", "ARdet10", "ARdet100", "ARs", "ARm", "ARl")
IMAGES = 7


def write_val_set(root, seed=0):
    """Black images of 200 x 150 pixels; trucks, benches, one person and a crowd of trucks."""
    draw = random.Random(seed)
    folder = root / "coco" / "val2017"
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(1, IMAGES + 1):
        Image.new("RGB", (200, 150)).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 200, "height": 150})
        for _ in range(0 if number == 3 else 4):
            side = draw.choice([16, 50, 110])
            box = [draw.randrange(200 - side), draw.randrange(150 - side), side, side]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": draw.choice([8, 15]),
                    "bbox": box,
                    "area": side * side,
                    "iscrowd": 0,
                }
            )
    annotations[-1]["category_id"] = 1
    annotations[-2].update(category_id=8, iscrowd=1)
    path = root / "coco" / "annotations" / "instances_val2017.json"
    path.parent.mkdir()
    categories = [{"id": i, "name": name} for i, name in COCO_CLASSES.items()]
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    write_val_set(tmp_path)
    return load_dataset("coco_pretrain_val_base")


def content_of(dataset):
    return json.loads(Path(dataset.json_file).read_text())


def annotations_of(dataset):
    return content_of(dataset)["annotations"]


def make_loader(dataset, world_size=1, rank=0):
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST = 40
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.MODEL.DEVICE = "cpu"
    return build_test_loader(cfg, dataset, world_size=world_size, rank=rank)


class Oracle(nn.Module):
    """Detects what is annotated, moved and scored as told."""

    def __init__(self, dataset, noise=0.0, found=True):
        super().__init__()
        self.truth = {record.image_id: record for record in dataset.records}
        self.norm = nn.BatchNorm2d(1)
        self.frozen = nn.BatchNorm2d(1).eval()
        self.noise = noise
        self.found = found

    def forward(self, samples):
        assert not self.training
        assert not self.norm.training
        assert not torch.is_grad_enabled()
        return [self.detect(sample["image_id"]) for sample in samples]

    def detect(self, image_id):
        record = self.truth[image_id]
        boxes = torch.from_numpy(record.boxes if self.found else record.boxes[:0]).clone()
        classes = torch.from_numpy(record.classes if self.found else record.classes[:0])
        generator = torch.Generator().manual_seed(image_id)
        boxes += self.noise * torch.randn(boxes.shape, generator=generator)
        scores = torch.rand(len(boxes), generator=generator)
        return {"boxes": boxes, "scores": scores, "classes": classes}


def test_perfect_detections_reach_100(dataset, tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    results = evaluate(Oracle(dataset), dataset, make_loader(dataset), tmp_path / "out")
    assert list(results)[:12] == [*METRICS, *RECALLS]
    assert len(results) == 12 + 60
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "ARdet100"):
        assert results[name] == pytest.approx(100)
    assert results["ARdet1"] < 100
    assert results["AP-truck"] == pytest.approx(100)
    assert math.isnan(results["AP-toothbrush"])
    assert "AP-person" not in results
    assert capsys.readouterr() == ("", "")
    assert "s / img" in caplog.text


def test_results_file_is_in_cocos_format(dataset, tmp_path):
    evaluate(Oracle(dataset), dataset, make_loader(dataset), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {entry["category_id"] for entry in written} == {8, 15}
    truth = {
        (a["image_id"], a["category_id"], *a["bbox"])
        for a in annotations_of(dataset)
        if a["category_id"] in (8, 15) and not a["iscrowd"]
    }
    assert {(e["image_id"], e["category_id"], *e["bbox"]) for e in written} == truth


def test_metrics_are_pycocotools_own(dataset, tmp_path, capsys):
    model = Oracle(dataset, noise=4.0)
    results = evaluate(model, dataset, make_loader(dataset), tmp_path)
    truth = COCO(dataset.json_file)
    detected = truth.loadRes(str(tmp_path / "coco_instances_results.json"))
    official = COCOeval(truth, detected, "bbox")
    official.params.catIds = list(dataset.category_ids)
    official.evaluate()
    official.accumulate()
    official.summarize()
    capsys.readouterr()
    assert [results[name] / 100 for name in (*METRICS, *RECALLS)] == pytest.approx(
        official.stats.tolist()
    )
    assert 0 < results["AP"] < 100
    both = [results["AP-truck"], results["AP-bench"]]
    assert results["AP"] == pytest.approx(np.mean(both))


def test_nothing_detected_gives_zeros(dataset, tmp_path):
    results = evaluate(Oracle(dataset, found=False), dataset, make_loader(dataset), tmp_path)
    assert [results[name] for name in (*METRICS, *RECALLS)] == [0.0] * 12
    assert results["AP-bench"] == 0
    assert math.isnan(results["AP-toothbrush"])
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []


def test_nothing_to_detect_gives_nan(dataset, tmp_path, monkeypatch):
    content = {**content_of(dataset), "annotations": []}
    Path(dataset.json_file).write_text(json.dumps(content))
    results = evaluate(Oracle(dataset), dataset, make_loader(dataset), tmp_path)
    assert math.isnan(results["AP"])
    assert "nan" in format_results(results)


def test_annotations_without_area_and_crowd_flag_count(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "_DATASETS", dict(catalog._DATASETS))
    content = content_of(dataset)
    content["annotations"] = [
        {key: a[key] for key in ("id", "image_id", "category_id", "bbox")}
        for a in content["annotations"]
        if not a["iscrowd"]
    ]
    (tmp_path / "mine.json").write_text(json.dumps(content))
    register_coco_dataset("mine", tmp_path / "mine.json", "coco/val2017")
    mine = load_dataset("mine")
    assert evaluate(Oracle(mine), mine, make_loader(mine), tmp_path)["AP"] == pytest.approx(100)


def test_only_the_best_detections_count(dataset):
    results = [
        {
            "image_id": a["image_id"],
            "category_id": a["category_id"],
            "bbox": a["bbox"],
            "score": 0.5,
        }
        for a in annotations_of(dataset)
        if a["category_id"] in (8, 15) and not a["iscrowd"]
    ]
    wrong = [{**r, "bbox": [190, 140, 5, 5], "score": 0.9} for r in results for _ in range(20)]
    assert coco_metrics(dataset, results + wrong, max_dets=10)["ARdet100"] == 0
    assert coco_metrics(dataset, results + wrong, max_dets=200)["ARdet100"] == pytest.approx(100)


def test_modes_are_restored_even_after_an_error(dataset, tmp_path):
    model = Oracle(dataset).train()
    model.frozen.eval()
    evaluate(model, dataset, make_loader(dataset), tmp_path)
    assert (model.training, model.norm.training, model.frozen.training) == (True, True, False)
    model.truth = {}
    with pytest.raises(KeyError):
        evaluate(model, dataset, make_loader(dataset), tmp_path)
    assert (model.training, model.norm.training, model.frozen.training) == (True, True, False)


def test_classes_that_the_dataset_lacks_are_told(dataset, tmp_path):
    novel = load_dataset("coco_pretrain_val_novel")
    model = Oracle(dataset)
    for record in model.truth.values():
        record.classes[:] = 59
    with pytest.raises(DataError, match=r"coco_pretrain_val_novel.*at least 60.*it has 20"):
        evaluate(model, novel, make_loader(novel), tmp_path)


def evaluate_on_rank(folder, rank, world_size=2):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size
    )
    dataset = load_dataset("coco_pretrain_val_base")
    loader = make_loader(dataset, world_size, rank)
    results = evaluate(Oracle(dataset, noise=4.0), dataset, loader, f"{folder}/ranks")
    assert (results is None) == (rank != 0)
    if rank == 0:
        with open(f"{folder}/results.json", "w") as file:
            json.dump(results, file)
    # A rank that leaves while another still talks to it can be aborted by gloo.
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_together_give_the_results_of_one(dataset, tmp_path):
    alone = evaluate(Oracle(dataset, noise=4.0), dataset, make_loader(dataset), tmp_path / "one")
    ranks = [Python([__file__, str(tmp_path), str(rank)]) for rank in (0, 1)]
    ends = [process.end() for process in ranks]
    assert [end.returncode for end in ends] == [0, 0], ends
    together = json.loads((tmp_path / "results.json").read_text())
    np.testing.assert_equal(together, alone)
    name = "coco_instances_results.json"
    assert (tmp_path / "ranks" / name).read_text() == (tmp_path / "one" / name).read_text()


def test_results_are_formatted_as_detectron2_does():
    results = {"AP": 32.887, "AP50": 50.833, "AP-truck": 31.4159, "AP-bench": float("nan")}
    assert format_results(results).splitlines() == [
        "|   AP   |  AP50  |",
        "|:------:|:------:|",
        "| 32.887 | 50.833 |",
        "",
        "| category   | AP     | category   | AP   |",
        "|:-----------|:-------|:-----------|:-----|",
        "| truck      | 31.416 | bench      | nan  |",
    ]
    many = {"AP": 1.0, **{f"AP-{name}": 1.0 for name in "abcd"}}
    assert format_results(many).splitlines()[-1].count("|") == 7
    assert "category" not in format_results({"AP": 1.0})


if __name__ == "__main__":
    warnings.simplefilter("error")
    evaluate_on_rank(sys.argv[1], int(sys.argv[2]))
