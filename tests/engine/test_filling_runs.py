"""Whole runs that fill a simulated budget."""

import json
import os
from pathlib import Path

import pytest

from d2scale.cli import main
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.run import train
from d2scale.launch.launch import Topology
from d2scale.memory.tracker import StorageTracker
from d2scale.planning.memory_profile import GIB

RECIPE = """
_BASE_: [d2scale://MetaFCOS/Base-MetaFCOS.yaml, d2scale://max_memory.yaml]
MODEL:
  DEVICE: cpu
  WEIGHTS: ""
  RESNETS: {DEPTH: 18, STEM_OUT_CHANNELS: 32, RES2_OUT_CHANNELS: 32, NORM: GN}
  BACKBONE: {FREEZE_AT: 0}
  FPN: {OUT_CHANNELS: 64}
  FCOS: {NUM_CLS_CONVS: 1, NUM_BOX_CONVS: 1}
INPUT: {MIN_SIZE_TRAIN: [64, 96], MAX_SIZE_TRAIN: 144, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}
DATALOADER: {NUM_WORKERS: 0}
DATASETS: {TEST: []}
SOLVER: {REFERENCE_WORLD_SIZE: 1, IMS_PER_BATCH: 2, MAX_ITER: 20, STEPS: [], WARMUP_ITERS: 0}
D2SCALE: {MEMORY: {BUDGET_GIB: 0.58}}
"""
IMAGES = 12
REAL_ROOT = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_shapes_dataset(tmp_path, IMAGES, 1, image_size=(64, 96))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def load(recipe, *opts):
    return load_cfg(str(recipe), ["OUTPUT_DIR", str(recipe.parent / "run"), *opts])


def run_plan(recipe):
    return json.loads((recipe.parent / "run" / "plan.json").read_text())


def test_a_run_trains_at_the_images_that_its_plan_names_and_stays_within_the_budget(recipe):
    tracker = StorageTracker(budget_bytes=int(0.58 * 0.95 * GIB))
    with tracker:
        train(load(recipe, "D2SCALE.ON_OOM", "raise"))
    plan = run_plan(recipe)
    assert 2 < plan["ims_per_gpu"] == plan["ims_per_batch"] <= IMAGES
    assert any("as predicted" in note for note in plan["notes"])
    assert 0 < tracker.peak_bytes <= plan["predicted_peak_gib"] * GIB
    config = (recipe.parent / "run" / "config.yaml").read_text()
    assert f"IMS_PER_BATCH: {plan['ims_per_batch']}" in config


def test_an_epoch_of_real_images_stays_within_the_budget(recipe, monkeypatch):
    if not (REAL_ROOT / "coco/annotations/instances_train2017.json").is_file():
        pytest.skip("needs COCO: set DETECTRON2_DATASETS to the folder that holds coco/")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(REAL_ROOT))
    budget = 0.7
    opts = ("SOLVER.MAX_ITER", "64", "SOLVER.BASE_LR", "0.0001")
    memory = ("D2SCALE.ON_OOM", "raise", "D2SCALE.MEMORY.BUDGET_GIB", str(budget))
    with StorageTracker(budget_bytes=int(budget * 0.95 * GIB)):
        train(load(recipe, *opts, *memory))
    plan = run_plan(recipe)
    assert plan["ims_per_gpu"] > 8
    _, steps = plan["changes"]["SOLVER.MAX_ITER"]
    assert steps == -(-128 // plan["ims_per_gpu"])
    metrics = (recipe.parent / "run" / "metrics.json").read_text().splitlines()
    assert json.loads(metrics[-1])["iteration"] == steps - 1


def test_two_ranks_fill_theirs(recipe):
    opts = ("D2SCALE.MAX_IMS_PER_BATCH", "8", "D2SCALE.MEMORY.BUDGET_GIB", "0.65")
    train(load(recipe, *opts), Topology(2))
    plan = run_plan(recipe)
    assert (plan["world_size"], plan["ims_per_batch"]) == (2, 8)
    assert any("MAX_IMS_PER_BATCH" in note for note in plan["notes"])


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("D2SCALE.MEMORY.BUDGET_GIB", "0.45"), "are missing"),
        (("D2SCALE.MEMORY.BUDGET_GIB", "-1"), "above 0 GiB"),
        (("D2SCALE.MEMORY.BUDGET_GIB", "8"), "images of the chosen total batch"),
        (("D2SCALE.MEMORY.PROFILE", "nowhere.json"), r"nowhere\.json"),
    ],
)
def test_what_cannot_be_ends_with_one_line_and_writes_nothing(recipe, capsys, opts, message):
    folder = recipe.parent / "run"
    assert main(["train", "--config-file", str(recipe), "OUTPUT_DIR", str(folder), *opts]) == 2
    printed = capsys.readouterr().err
    assert sum(line.startswith("d2scale: error") for line in printed.splitlines()) == 1
    assert "Traceback" not in printed
    assert message.replace("\\", "") in printed
    assert not folder.exists()
