"""Evaluation and export by d2go's own commands scale nothing and need no plan."""

import pytest

from d2go_commands import META_FCOS, errors

pytestmark = pytest.mark.timeout(900)

COMMON = """
DATALOADER: {NUM_WORKERS: 0}
INPUT: {MIN_SIZE_TRAIN: [96], MAX_SIZE_TRAIN: 128, MIN_SIZE_TEST: 96, MAX_SIZE_TEST: 128}
SOLVER: {REFERENCE_WORLD_SIZE: 2, IMS_PER_BATCH: 4, MAX_ITER: 4, STEPS: [2]}
"""
FASTER_RCNN = """
_BASE_: [d2scale://max_memory.yaml]
MODEL:
  DEVICE: cpu
  META_ARCHITECTURE: GeneralizedRCNN
  WEIGHTS: ""
  BACKBONE: {NAME: build_resnet_fpn_backbone, FREEZE_AT: 0}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, OUT_FEATURES: [res2, res3, res4, res5]}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]]}
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 32}
  RPN:
    IN_FEATURES: [p2, p3, p4, p5, p6]
    PRE_NMS_TOPK_TEST: 50
    POST_NMS_TOPK_TEST: 20
  ROI_HEADS: {NAME: StandardROIHeads, IN_FEATURES: [p2, p3, p4, p5]}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 32, POOLER_RESOLUTION: 7}
DATASETS: {TRAIN: [coco_2017_train], TEST: [coco_2017_val]}
"""


def assert_nothing_scaled(output, out):
    assert "Scaled the config" not in output
    assert errors(output) == []
    assert not (out / "plan.json").exists()


@pytest.mark.parametrize(
    ("processes", "method"), [(1, "max_memory"), (3, "keep_total")], ids=["memory", "uneven"]
)
def test_evaluation_scales_nothing(d2go, tmp_path, processes, method):
    name = ("SOLVER.AUTO_SCALING_METHODS", f"('d2scale_{method}',)")
    output = d2go(META_FCOS + COMMON, "--eval-only", *name, processes=processes)
    assert_nothing_scaled(output, tmp_path / "out")
    assert list((tmp_path / "out").glob("inference/default/*/*/coco_instances_results.json"))


def test_evaluation_does_not_judge_the_schedule_of_a_training(d2go, tmp_path):
    faults = ("SOLVER.BASE_LR", "-1.0", "D2SCALE.MEMORY.BUDGET_GIB", "-1.0")
    assert_nothing_scaled(d2go(META_FCOS + COMMON, "--eval-only", *faults), tmp_path / "out")


def test_export_and_its_evaluation_scale_nothing(d2go, tmp_path):
    kind = ("--predictor-types", "torchscript")
    output = d2go(FASTER_RCNN + COMMON, *kind, name="d2go.exporter")
    assert_nothing_scaled(output, tmp_path / "out")
    (predictor,) = tmp_path.glob("out/torchscript*/predictor_info.json")
    # d2go's evaluator starts Caffe2, which torch no longer has.
    caffe2 = tmp_path / "stubs" / "caffe2" / "python"
    caffe2.mkdir(parents=True)
    (caffe2 / "workspace.py").write_text("def GlobalInit(arguments):\n    pass\n")
    output = d2go(
        FASTER_RCNN + COMMON,
        *("--predictor-path", str(predictor.parent)),
        name="d2go.tools.evaluator",
        PYTHONPATH=tmp_path / "stubs",
    )
    assert_nothing_scaled(output, tmp_path / "out")
    assert list((tmp_path / "out").glob("inference/default/*/*/coco_instances_results.json"))
