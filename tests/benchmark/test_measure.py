from __future__ import annotations

from itertools import islice
from types import SimpleNamespace

import pytest
import torch

from d2scale.benchmark import measure as module
from d2scale.benchmark.data import open_batches
from d2scale.benchmark.measure import BenchmarkOptions, measure_inference, measure_training
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.models import build_model
from d2scale.engine.step import build_step

OPTS = ("MODEL.FPN.OUT_CHANNELS", "32", "INPUT.MIN_SIZE_TRAIN", "[32]", "INPUT.MIN_SIZE_TEST", "32")


@pytest.fixture
def cfg():
    return load_cfg("d2scale://MetaFCOS/small-cpu.yaml", list(OPTS))


def test_random_batches_follow_the_config(cfg):
    with open_batches(cfg, "random", training=True, ims_per_batch=3) as batches:
        batch = next(batches.batches)
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
    step = build_step(cfg, model.train(), ims_per_gpu=2)
    with open_batches(cfg, "random", training=True, ims_per_batch=2) as batches:
        figures = measure_training(step, batches, BenchmarkOptions(steps=2, warmup_steps=1))
    assert figures["images a step"] == 2
    assert figures["images a second"] > 0
    assert figures["data seconds a step"] < figures["seconds a step"]
    assert figures["peak GiB"] * 2**30 > sum(v.nbytes for v in before.values())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_first_images_do_not_count(cfg, monkeypatch):
    clock = iter([t for n in range(6) for t in (0.0, 100.0 if n < 2 else 2.0)])

    class Model(torch.nn.Linear):
        def forward(self, samples):
            assert not self.training
            return [{"boxes": torch.zeros(3, 4), "scores": torch.zeros(3)} for _ in samples]

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    with open_batches(cfg, "random", training=False) as batches:
        figures = measure_inference(Model(1, 1), batches, BenchmarkOptions(images=4, warmup=2))
    assert figures["seconds an image"] == 2.0
    assert figures["images a second"] == 0.5
    assert figures["detections an image"] == 3


def test_real_images_come_again_when_there_are_too_few(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with open_batches(cfg, "auto", training=False) as batches:
        assert "random" in batches.source
    write_shapes_dataset(tmp_path, 2, 2)
    with open_batches(cfg, "auto", training=False) as batches:
        assert batches.source == "coco_pretrain_val_base"
        ids = [batch[0]["image_id"] for batch in islice(batches.batches, 5)]
    assert ids == [*ids[:2], *ids[:2], ids[0]]
