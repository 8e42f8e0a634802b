from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from d2scale.benchmark import measure as module
from d2scale.benchmark.data import find_source
from d2scale.benchmark.measure import BenchmarkOptions, measure_inference, measure_training
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.models import build_model

OPTS = ("MODEL.FPN.OUT_CHANNELS", "32", "INPUT.MIN_SIZE_TRAIN", "[32]", "INPUT.MIN_SIZE_TEST", "32")


@pytest.fixture
def cfg():
    return load_cfg("d2scale://MetaFCOS/small-cpu.yaml", list(OPTS))


def test_random_batches_follow_the_config(cfg):
    source = find_source(cfg, "random", training=True, ims_per_batch=3)
    with source.open() as batches:
        batch = next(batches)
    assert len(batch) == 3
    for sample in batch:
        assert min(sample["image"].shape[1:]) == 32
        height, width = sample["image"].shape[1:]
        limit = torch.tensor([width, height] * 2)
        assert (sample["boxes"] >= 0).all()
        assert (sample["boxes"] <= limit).all()
        assert (sample["boxes"][:, 2:] > sample["boxes"][:, :2]).all()


def test_a_training_benchmark_leaves_the_weights_alone(cfg):
    model = build_model(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    source = find_source(cfg, "random", training=True, ims_per_batch=2)
    figures = measure_training(cfg, model, source, BenchmarkOptions(steps=2, warmup_steps=1))
    assert figures["images a second"] > 0
    assert figures["data seconds a step"] < figures["seconds a step"]
    assert figures["peak GiB"] * 2**30 > sum(v.nbytes for v in before.values())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_first_images_do_not_count(cfg, monkeypatch):
    clock = iter([t for n in range(6) for t in (0.0, 100.0 if n < 2 else 2.0)])

    class Model(torch.nn.Module):
        def forward(self, samples):
            assert not self.training
            return [{"boxes": torch.zeros(3, 4), "scores": torch.zeros(3)} for _ in samples]

    source = find_source(cfg, "random", training=False)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    figures = measure_inference(cfg, Model(), source, BenchmarkOptions(images=4, warmup=2))
    assert figures["seconds an image"] == 2.0
    assert figures["images a second"] == 0.5
    assert figures["detections an image"] == 3


def test_real_images_come_again_when_there_are_too_few(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert "random" in find_source(cfg, "auto", training=False).description
    write_shapes_dataset(tmp_path, 2, 2)
    source = find_source(cfg, "auto", training=False)
    assert source.description == "coco_pretrain_val_base"
    with source.open() as batches:
        ids = [batch[0]["image_id"] for batch in islice(batches, 5)]
    assert ids == [*ids[:2], *ids[:2], ids[0]]
