"""Micro-batches and the guard inside d2go's own training loop."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2scale.coco.shapes import write_shapes_dataset

pytestmark = pytest.mark.timeout(900)

SUPPORT = Path(__file__).resolve().parents[1] / "support"
COMMON = """
DATALOADER: {NUM_WORKERS: 0}
INPUT: {MIN_SIZE_TRAIN: [96], MAX_SIZE_TRAIN: 128, MIN_SIZE_TEST: 96, MAX_SIZE_TEST: 128}
D2GO_DATA: {AUG_OPS: {TRAIN: ["ResizeShortestEdgeOp"]}}
SOLVER: {REFERENCE_WORLD_SIZE: 2, IMS_PER_BATCH: 4, MAX_ITER: 3, STEPS: [2], WARMUP_ITERS: 1,
         CHECKPOINT_PERIOD: 100, BASE_LR: 0.001}
TEST: {FINAL_EVAL: false}
PROFILERS: []
WRITER_PERIOD: 1
SEED: 1
"""
META_FCOS = """
_BASE_: [d2scale://MetaFCOS/Base-MetaFCOS.yaml, d2scale://keep_total.yaml]
MODEL:
  DEVICE: cpu
  WEIGHTS: ""
  BACKBONE: {FREEZE_AT: 0}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, NORM: GN}
  FPN: {OUT_CHANNELS: 64}
  FCOS: {NUM_CLS_CONVS: 1, NUM_BOX_CONVS: 1}
"""
RETINANET = """
_BASE_: [d2scale://keep_total.yaml]
MODEL:
  DEVICE: cpu
  META_ARCHITECTURE: RetinaNet
  WEIGHTS: ""
  BACKBONE: {NAME: build_retinanet_resnet_fpn_backbone, FREEZE_AT: 0}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, NORM: BN, OUT_FEATURES: [res3, res4, res5]}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]]}
  FPN: {IN_FEATURES: [res3, res4, res5], OUT_CHANNELS: 64}
  RETINANET: {NUM_CONVS: 1}
DATASETS: {TRAIN: [coco_2017_train], TEST: [coco_2017_val]}
"""


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    write_shapes_dataset(root, train_images=8, val_images=2, seed=0)
    return root


@pytest.fixture
def train(tmp_path, datasets):
    """Run ``d2go.train_net`` as a user does; return the folder and all that it said."""

    def run(name, config, processes, *arguments, fail=None, status=0):
        path = tmp_path / "recipe.yaml"
        path.write_text(config + COMMON)
        runner = "d2scale.Runner" if fail is None else "failing_runner.FailingRunner"
        command = [
            os.path.join(os.path.dirname(sys.executable), "d2go.train_net"),
            *("--runner", runner, "--config-file", str(path)),
            *("--output-dir", str(tmp_path / name), "--num-processes", str(processes)),
            *("--disable-post-mortem", *arguments),
        ]
        environment = {**os.environ, "DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = f"{SUPPORT}:{os.environ.get('PYTHONPATH', '')}"
        environment.update({f"FAIL_{key}": str(value) for key, value in (fail or {}).items()})
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        output = done.stdout + done.stderr
        assert done.returncode == status, output[-6000:]
        return tmp_path / name, output

    return run


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [line["total_loss"] for line in lines]


def assert_same_training(found, expected):
    assert losses(found) == pytest.approx(losses(expected), rel=1e-4)
    ours, theirs = (
        torch.load(f / "model_final.pth", weights_only=True)["model"] for f in (found, expected)
    )
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_micro_batches_train_as_d2go_alone_does(train, processes):
    plain, _ = train("plain", META_FCOS, processes, "D2SCALE.ON_OOM", "raise")
    split, output = train("split", META_FCOS, processes, "D2SCALE.IMS_PER_GPU", "1")
    assert "images per GPU, in one forward      | 1" in output or "images per GPU" in output
    assert "is approximate" not in output
    assert_same_training(split, plain)


def test_error_on_one_of_two_ranks_changes_nothing(train):
    whole, _ = train("whole", META_FCOS, 2)
    # Rank 1 has no room for 2 images from its second step on.
    split, output = train("split", META_FCOS, 2, fail={"FROM": 1, "IMAGES": 2, "RANK": 1})
    assert "Out of memory in forward or backward on rank 1" in output
    assert json.loads((split / "plan.json").read_text())["ims_per_gpu"] == 1
    assert_same_training(split, whole)


def test_image_that_does_not_fit_leaves_the_last_good_step(train):
    folder, output = train("run", META_FCOS, 1, fail={"FROM": 2, "IMAGES": 1, "RANK": 0}, status=2)
    assert "d2scale: error: out of memory in forward or backward" in output
    assert "Traceback" not in output
    assert (folder / "last_checkpoint").read_text() == "model_0000001.pth"


def test_other_models_are_split_approximately(train):
    folder, output = train("run", RETINANET, 1, "D2SCALE.IMS_PER_GPU", "2")
    assert "approximate for this model: RetinaNet does not tell its loss normalizers" in output
    assert len(losses(folder)) == 3


def test_model_that_is_watched_keeps_its_own_step(train):
    arguments = ("ABNORMAL_CHECKER.ENABLED", "True")
    _, output = train("warned", META_FCOS, 1, *arguments)
    assert "ends this run: d2go trains it with the wrapper AbnormalLossCheckerWrapper" in output
    _, output = train("refused", META_FCOS, 1, *arguments, "D2SCALE.IMS_PER_GPU", "2", status=2)
    assert "D2SCALE.IMS_PER_GPU is 2; allowed: 4, the images of a GPU, with the wrapper" in output
