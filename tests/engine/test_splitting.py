"""Whole runs that run out of memory: the folder that they leave, and their weights."""

from __future__ import annotations

import json

import pytest
import torch

from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.run import train
from d2scale.planning.hardware import Hardware
from d2scale.planning.plan import make_plan
from d2scale.step.guard import StepDoesNotFitError
from meta_fcos.detector import OneStageDetector

RECIPE = """
_BASE_: d2scale://MetaFCOS/Base-MetaFCOS.yaml
MODEL:
  DEVICE: cpu
  WEIGHTS: ""
  RESNETS: {DEPTH: 18, STEM_OUT_CHANNELS: 32, RES2_OUT_CHANNELS: 32, NORM: GN}
  BACKBONE: {FREEZE_AT: 0}
  FPN: {OUT_CHANNELS: 32}
  FCOS: {NUM_CLS_CONVS: 1, NUM_BOX_CONVS: 1}
INPUT: {MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 96, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}
DATALOADER: {NUM_WORKERS: 0}
DATASETS: {TEST: []}
D2SCALE: {EXACT: true}
SOLVER: {REFERENCE_WORLD_SIZE: 1, IMS_PER_BATCH: 4, BASE_LR: 0.001, MAX_ITER: 3, STEPS: [],
         WARMUP_ITERS: 0, CHECKPOINT_PERIOD: 100}
WRITER_PERIOD: 1
SEED: 7
"""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes_dataset(tmp_path_factory.mktemp("shapes"), 8, 2, image_size=(64, 96))


@pytest.fixture
def recipe(tmp_path, shapes, monkeypatch, write_config):
    """Return a function that loads the recipe into a folder of the test."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    path = write_config(RECIPE)

    def load(folder, *opts):
        return load_cfg(path, ["OUTPUT_DIR", str(tmp_path / folder), *map(str, opts)])

    return load


@pytest.fixture
def out_of_memory(monkeypatch):
    """Make the model fail in training where a function of (its forwards so far, images) says."""
    forward = OneStageDetector.forward
    calls = []

    def install(fails):
        def failing(self, samples, normalizers=None):
            calls.append(len(samples))
            if fails(len(calls), len(samples)):
                raise torch.OutOfMemoryError("out of memory")
            return forward(self, samples, normalizers)

        monkeypatch.setattr(OneStageDetector, "forward", failing)

    return install


def weights(folder, name="model_final.pth"):
    return torch.load(folder / name, weights_only=True)["model"]


def assert_same_weights(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_run_goes_on_with_fewer_images_per_gpu(recipe, tmp_path, out_of_memory):
    train(recipe("undisturbed"))
    out_of_memory(lambda calls, images: calls > 1 and images > 1)
    train(recipe("split"))
    folder = tmp_path / "split"
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["ims_per_gpu"], plan["accumulation_steps"], plan["ims_per_batch"]) == (1, 4, 4)
    assert "from 4 to 1 during the run" in plan["notes"][-1]
    assert "taken again with 2 images per GPU" in (folder / "log.txt").read_text()
    assert_same_weights(weights(folder), weights(tmp_path / "undisturbed"))


def test_a_resumed_run_has_the_size_that_fits_and_an_unchanged_plan(
    recipe, tmp_path, out_of_memory
):
    out_of_memory(lambda calls, images: images > 2)
    folder, cfg = tmp_path / "run", recipe("run", "SOLVER.CHECKPOINT_PERIOD", 2)
    train(cfg)
    (folder / "model_final.pth").unlink()
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    train(cfg, resume=True)
    assert json.loads((folder / "plan.json").read_text())["ims_per_gpu"] == 2
    log = (folder / "log.txt").read_text()
    assert "2 images per GPU at a time, as before: 4 ran out of memory" in log
    assert "the plan has changed" not in log


def test_run_that_does_not_fit_leaves_the_last_good_step(recipe, tmp_path, out_of_memory):
    train(recipe("undisturbed"))
    out_of_memory(lambda calls, images: calls > 2)
    with pytest.raises(StepDoesNotFitError, match="with one image per GPU at a time"):
        train(recipe("stopped"))
    folder = tmp_path / "stopped"
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"
    out_of_memory(lambda calls, images: False)
    train(recipe("stopped"), resume=True)
    assert json.loads((folder / "plan.json").read_text())["ims_per_gpu"] == 1
    assert_same_weights(weights(folder), weights(tmp_path / "undisturbed"))


def test_raise_ends_the_run_with_the_plain_error(recipe, tmp_path, out_of_memory):
    out_of_memory(lambda calls, images: calls > 1)
    with pytest.raises(torch.OutOfMemoryError):
        train(recipe("run", "D2SCALE.ON_OOM", "raise"))
    assert not (tmp_path / "run" / "last_checkpoint").exists()


def test_split_plan_is_that_of_the_real_micro_batches(recipe):
    plan = make_plan(recipe("plan", "SOLVER.IMS_PER_BATCH", 10), Hardware(world_size=2))
    split = plan.with_micro_batches_of(4)
    assert (plan.ims_per_gpu, split.ims_per_gpu, split.accumulation_steps) == (5, 3, 2)
    assert split.notes[:-1] == plan.notes
