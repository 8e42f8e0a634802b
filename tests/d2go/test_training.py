"""d2go's own command trains, evaluates and resumes under the Runner, with 1 and 2 processes."""

import json
import os
import subprocess
import sys

import pytest

from d2scale.coco.shapes import write_shapes_dataset

pytestmark = pytest.mark.timeout(900)

COMMON = """
DATALOADER: {NUM_WORKERS: 0}
INPUT: {MIN_SIZE_TRAIN: [96], MAX_SIZE_TRAIN: 128, MIN_SIZE_TEST: 96, MAX_SIZE_TEST: 128}
SOLVER: {REFERENCE_WORLD_SIZE: 2, IMS_PER_BATCH: 4, MAX_ITER: 4, STEPS: [3], WARMUP_ITERS: 1,
         CHECKPOINT_PERIOD: 2}
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


ALLOWED = ("D2SCALE.ALLOW_CHANGED_RECIPE", "True")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    write_shapes_dataset(root, train_images=8, val_images=2, seed=0)
    return root


@pytest.fixture
def train(tmp_path, datasets):
    """Run ``d2go.train_net`` as a user does and return the finished process."""

    def run(config, processes, *arguments, status=0):
        path = tmp_path / "recipe.yaml"
        path.write_text(config + COMMON)
        command = [
            os.path.join(os.path.dirname(sys.executable), "d2go.train_net"),
            *("--runner", "d2scale.Runner", "--config-file", str(path)),
            *("--output-dir", str(tmp_path / "out"), "--num-processes", str(processes)),
            # Without it d2go asks for a debugger, and exits with 0 after a failure.
            *("--disable-post-mortem", *arguments),
        ]
        environment = {**os.environ, "DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == status, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    return run


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("config", [META_FCOS, RETINANET], ids=["MetaFCOS", "RetinaNet"])
def test_trains_and_evaluates(train, tmp_path, config, processes):
    train(config, processes)
    out = tmp_path / "out"
    assert (out / "model_final.pth").exists()
    assert list(out.glob("inference/default/final/*/coco_instances_results.json"))
    assert metrics(out)[-1]["iteration"] == 3


def test_resumes_where_it_stopped(train, tmp_path):
    train(META_FCOS, 1)
    done = train(META_FCOS, 1, "--resume", "SOLVER.MAX_ITER", "6", *ALLOWED)
    assert "Starting training from iteration 4" in done.stdout + done.stderr
    assert metrics(tmp_path / "out")[-1]["iteration"] == 5


@pytest.mark.parametrize(
    ("processes", "lines"), [(1, 1), (2, 0)], ids=["another world size", "the recipe's own"]
)
def test_the_method_takes_effect_once_on_any_world_size(train, processes, lines):
    done = train(
        META_FCOS, processes, "D2SCALE.IMS_PER_GPU", "1", "SOLVER.AUTO_SCALING_METHODS",
        "('d2scale_max_memory',)", "SOLVER.STEPS", "()", "TEST.FINAL_EVAL", "False",
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert output.count("Applying auto scaling method: d2scale_max_memory") == lines * processes
    assert output.count("Scaled the config:") == processes
    assert (
        f"| SOLVER.IMS_PER_BATCH                            | 4           | {processes}" in output
    )


def test_a_mistake_ends_with_one_line_and_status_2(train, tmp_path):
    done = train(META_FCOS, 2, "SOLVER.STEPS", "(5,)", status=2)
    errors = [line for line in done.stderr.splitlines() if "d2scale: error" in line]
    assert len(errors) == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_that_detectron2_cannot_build_is_one_line_too(train):
    done = train(META_FCOS, 1, "MODEL.RESNETS.RES2_OUT_CHANNELS", "32", status=2)
    assert "RES2_OUT_CHANNELS is 32; allowed: 64 in detectron2" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
