"""The same data on any number of processes, from the loader that d2go builds."""

import pickle
from dataclasses import replace
from itertools import chain, islice

import pytest
import torch

from virtual_rank_loaders import numbers, process

RECIPE = """
VERSION: 2
MODEL: {DEVICE: cpu}
DATASETS: {TRAIN: [shapes_for_virtual_ranks]}
DATALOADER: {NUM_WORKERS: 0}
INPUT: {MIN_SIZE_TRAIN: [48, 64, 80], MAX_SIZE_TRAIN: 96}
D2GO_DATA: {AUG_OPS: {TRAIN: ["ResizeShortestEdgeOp", "RandomFlipOp"]}}
SOLVER: {IMS_PER_BATCH: 4}
SEED: 4
"""


@pytest.fixture
def build(datasets, tmp_path, write_config):
    """Build d2go's loader in one process of some number, over the images of ``datasets``."""
    from detectron2.data import DatasetCatalog
    from detectron2.data.datasets import register_coco_instances

    from d2scale.d2go.runner import Runner

    name = "shapes_for_virtual_ranks"
    annotations = datasets / "coco/annotations/instances_train2017.json"
    register_coco_instances(name, {}, str(annotations), str(datasets / "coco/train2017"))
    cfg = Runner.get_default_cfg()
    cfg.merge_from_file(write_config(RECIPE))
    cfg.OUTPUT_DIR = str(tmp_path)

    def run(rank, world_size):
        with process(rank, world_size):
            return Runner.build_detection_train_loader(cfg)

    yield run
    DatasetCatalog.remove(name)


def test_virtual_ranks_get_what_d2go_gives_its_processes(build, caplog):
    from d2scale.detectron2.data.loader import train_loader

    cluster = [list(islice(build(rank, 2), 5)) for rank in range(2)]
    expected = [numbers(chain(*step)) for step in zip(*cluster, strict=True)]
    alone = train_loader(build(0, 1), range(2), 2, 2)
    halves = [train_loader(build(rank, 2), range(rank, rank + 1), 2, 2) for rank in range(2)]
    for images in expected:
        step = next(alone)
        assert numbers(step) == images
        for sample, other in zip(step, chain(*map(next, halves)), strict=True):
            assert torch.equal(sample["image"], other["image"])
            boxes, others = (s["instances"].gt_boxes.tensor for s in (sample, other))
            assert torch.equal(boxes, others)
    assert "read as it comes" not in caplog.text


def test_workers_that_are_spawned_get_what_they_need(build):
    """d2go's launcher spawns its processes, and they in turn their workers."""
    from d2scale.detectron2.data.batches import one_group
    from d2scale.detectron2.data.from_upstream import take_apart
    from d2scale.detectron2.data.mapping import Request, SeededMapping

    parts = take_apart(build(0, 1))
    mapping = SeededMapping(replace(parts, entries=[parts.entries[0]]), 4, one_group)
    request = Request(0, 0, [0])
    (sample,), (other,) = mapping[request], pickle.loads(pickle.dumps(mapping))[request]
    assert torch.equal(sample["image"], other["image"])


def test_an_image_that_d2go_leaves_out_is_named(build, datasets, caplog):
    image = datasets / "coco/train2017/000000000003.jpg"
    content = image.read_bytes()
    image.write_bytes(content[:300])
    try:
        batches = list(islice(build(0, 1), 4))
    finally:
        image.write_bytes(content)
    assert {"000000000003.jpg"}.isdisjoint(s["file_name"][-16:] for b in batches for s in b)
    (line,) = {r.message for r in caplog.records if "left out" in r.message}
    assert str(image) in line


def test_what_d2go_draws_are_the_samples_of_a_step(build, monkeypatch):
    from d2go.utils.visualization import DataLoaderVisWrapper

    from d2scale.detectron2.data.loader import train_loader

    drawn = []
    monkeypatch.setattr(
        DataLoaderVisWrapper, "_maybe_write_vis", lambda _, data: drawn.append(data)
    )
    loader = build(0, 1)
    assert isinstance(loader, DataLoaderVisWrapper)
    alone = train_loader(loader, range(2), 2, 2)
    steps = [next(alone), next(alone)]
    assert [len(step) for step in steps] == [4, 4]
    assert drawn == steps
