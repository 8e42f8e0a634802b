"""How much fits into a d2go training, told without a GPU and taken by the scaling method."""

import pytest
import torch

from d2scale.synthetic import write_shapes_dataset

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.FPN.OUT_CHANNELS": 64,
    "INPUT.MIN_SIZE_TRAIN": (96,),
    "INPUT.MAX_SIZE_TRAIN": 160,
    "D2SCALE.MEMORY.BUDGET_GIB": 1.0,
    "SOLVER.MAX_ITER": 1000,
    "SOLVER.STEPS": (600,),
}


@pytest.fixture
def cfg(recipes, tmp_path, monkeypatch):
    from detectron2.data import DatasetCatalog
    from detectron2.data.datasets import register_coco_instances

    from d2scale.d2go.runner import Runner
    from meta_fcos.detectron2 import register

    register()
    write_shapes_dataset(tmp_path, train_images=6, val_images=1, seed=0)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = Runner.get_default_cfg()
    cfg.merge_from_file(str(recipes / "experiment-1-baseline.yaml"))
    for key, value in SMALL.items():
        cfg.merge_from_list([key, value])
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    # Under a name of its own: detectron2's catalogue keeps what it was once told.
    name = f"shapes_{tmp_path.name}"
    images = tmp_path / "coco" / "train2017"
    annotations = tmp_path / "coco" / "annotations" / "instances_train2017.json"
    register_coco_instances(name, {}, str(annotations), str(images))
    cfg.DATASETS.TRAIN = (name,)
    yield cfg
    DatasetCatalog.remove(name)


def counted_peak(cfg, images):
    from d2scale.d2go.memory import _worst_case, workload_of
    from d2scale.memory.predict import record_step
    from d2scale.memory.tracker import StorageTracker

    work = workload_of(cfg, _worst_case(cfg)[0])
    step = work.build_step(torch.device("cpu"))
    tracker = StorageTracker()
    with tracker:
        tracker.count(*step.held())
        step.make_optimizer_state()
    record_step(step, work.make_batch(images), tracker)
    return tracker.peak_bytes


def test_detectron2s_backbone_is_predicted_with_fake_tensors(cfg):
    from d2scale.d2go.memory import memory_profile

    profile = memory_profile(cfg)
    assert profile.source == "predicted"
    assert "in d2go" in profile.description
    assert "fake tensors" in profile.description
    assert profile.covers["engine"] == "d2go"
    point = next(point for point in profile.points if point.ims_per_gpu == 8)
    # The CPU leaves memory formats to its own taste; see CudaLike.
    assert point.live_bytes == pytest.approx(counted_peak(cfg, 8), rel=0.02)


def test_the_method_that_fills_the_memory_decides_by_itself(cfg):
    from d2scale.d2go.scaling_methods import scale_in_place

    cfg.SOLVER.AUTO_SCALING_METHODS = ("d2scale_max_memory",)
    plan = scale_in_place(cfg, 2, "max_memory")
    assert plan.ims_per_gpu > 8
    assert 2 * plan.ims_per_gpu == cfg.SOLVER.IMS_PER_BATCH
    assert plan.predicted_peak_gib < 0.95
    assert any("as predicted" in note for note in plan.notes)
