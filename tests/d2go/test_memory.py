"""How much fits into a d2go training, told without a GPU and taken by the scaling method."""

import json

import pytest
import torch

from d2go_commands import META_FCOS, D2Go, errors
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.errors import DataError

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.FCOS.NUM_CLASSES": 60,
    "INPUT.MIN_SIZE_TRAIN": (96,),
    "INPUT.MAX_SIZE_TRAIN": 160,
    "D2SCALE.MEMORY.BUDGET_GIB": 0.8,
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
    write_shapes_dataset(tmp_path, train_images=60, val_images=1, seed=0)
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
    from d2scale.d2go.memory import D2GoMemory
    from d2scale.memory.predict import make_optimizer_state, record_step
    from d2scale.memory.tracker import StorageTracker

    work = D2GoMemory(cfg).workload(cfg)
    step = work.build_step(torch.device("cpu"))
    tracker = StorageTracker()
    with tracker:
        tracker.count(*step.held_tensors())
        make_optimizer_state(step.optimizer)
    record_step(step, work.make_batch(images), tracker)
    return tracker.peak_bytes


def test_detectron2s_backbone_is_predicted_with_fake_tensors(cfg):
    from d2scale.d2go.memory import D2GoMemory

    profile = D2GoMemory(cfg).profile()
    assert profile.source == "predicted"
    assert "in d2go" in profile.description
    assert "fake tensors" in profile.description
    assert profile.covers["engine"] == "d2go"
    point = next(point for point in profile.points if point.ims_per_gpu == 8)
    # The CPU leaves memory formats to its own taste; see CudaLike.
    assert point.live_bytes == pytest.approx(counted_peak(cfg, 8), rel=0.02)


def test_the_method_that_fills_the_memory_decides_by_itself(cfg):
    from d2scale.d2go.memory import D2GoMemory
    from d2scale.detectron2.scaling import scale_in_place

    cfg.SOLVER.AUTO_SCALING_METHODS = ("d2scale_max_memory",)
    plan = scale_in_place(cfg, 2, "max_memory", D2GoMemory(cfg))
    assert plan.ims_per_gpu > 8
    assert 2 * plan.ims_per_gpu == cfg.SOLVER.IMS_PER_BATCH
    assert plan.predicted_peak_gib < 0.95 * 0.8
    assert any("as predicted" in note for note in plan.notes)


def test_fewer_images_than_the_chosen_batch_are_refused(cfg):
    from d2scale.d2go.memory import D2GoMemory
    from d2scale.detectron2.scaling import scale_in_place

    cfg.SOLVER.AUTO_SCALING_METHODS = ("d2scale_max_memory",)
    cfg.D2SCALE.MEMORY.BUDGET_GIB = 4.0
    with pytest.raises(DataError, match=r"images in DATASETS\.TRAIN is .* chosen total batch"):
        scale_in_place(cfg, 2, "max_memory", D2GoMemory(cfg))


RECIPE = (
    META_FCOS.replace("keep_total", "max_memory")
    + """
DATALOADER: {NUM_WORKERS: 0}
INPUT: {MIN_SIZE_TRAIN: [64, 96], MAX_SIZE_TRAIN: 144}
SOLVER: {REFERENCE_WORLD_SIZE: 1, IMS_PER_BATCH: 2, MAX_ITER: 16, STEPS: [], WARMUP_ITERS: 0}
TEST: {FINAL_EVAL: False}
D2SCALE: {ON_OOM: raise}
"""
)


@pytest.fixture
def train(tmp_path):
    """Run ``d2go.train_net`` on a simulated device and return what it prints."""
    write_shapes_dataset(tmp_path, train_images=48, val_images=1, seed=0)
    d2go = D2Go(tmp_path, tmp_path)

    def run(processes, budget_gib, **options):
        options = {"runner": "limited_runner.LimitedRunner", "processes": processes, **options}
        return d2go(RECIPE, "D2SCALE.MEMORY.BUDGET_GIB", str(budget_gib), **options)

    return run


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("processes", "budget_gib"), [(1, 0.76), (2, 0.82)])
def test_a_run_fills_a_simulated_budget_and_stays_within_it(train, tmp_path, processes, budget_gib):
    output = train(processes, budget_gib)
    assert (tmp_path / "out" / "model_final.pth").exists()
    chosen = int(output.split("images per GPU: ")[1].split()[0])
    assert 1 < chosen <= 48 // processes
    used = [
        float(line.split(":")[-1].split()[0])
        for line in output.splitlines()
        if "Most bytes on the simulated device" in line
    ]
    assert len(used) >= 1
    assert 0.1 < max(used) < budget_gib


@pytest.mark.timeout(900)
def test_ranks_measure_together_before_they_train(train, tmp_path):
    output = train(2, 0.0, runner="measuring_runner.MeasuringRunner", DEVICE_BYTES=8 * 10**8)
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert f"at most {plan['ims_per_gpu']} images per GPU fit in 0.75 GiB, as measured" in output
    assert 1 < plan["ims_per_gpu"] <= 24
    assert (tmp_path / "out" / "model_final.pth").exists()


@pytest.mark.parametrize(
    ("budget_gib", "message"),
    [
        (0.45, "GiB are missing"),
        (-1.0, "above 0 GiB"),
        (8.0, "at least the"),
    ],
)
def test_a_budget_that_cannot_be_filled_is_one_line(train, tmp_path, budget_gib, message):
    output = train(1, budget_gib, status=2)
    (line,) = errors(output)
    assert message in line
    assert "Traceback" not in output
    assert not (tmp_path / "out" / "model_final.pth").exists()
