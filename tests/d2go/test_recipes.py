"""d2go's own kinds of recipes under the Runner: FBNet detectors, EMA, QAT, evaluation, export."""

import json

import pytest
import torch

from d2go_commands import D2SCALE_TRAIN, D2Go

pytestmark = pytest.mark.timeout(900)

FASTER_RCNN = """
MODEL:
  DEVICE: cpu
  META_ARCHITECTURE: GeneralizedRCNN
  FBNET_V2: {ARCH: FBNetV3_A, NORM: naiveSyncBN, WIDTH_DIVISOR: 8}
  BACKBONE: {NAME: FBNetV2C4Backbone}
  ANCHOR_GENERATOR: {SIZES: [[16, 32, 64]]}
  RPN: {HEAD_NAME: FBNetV2RpnHead, IN_FEATURES: [trunk3], POST_NMS_TOPK_TRAIN: 200}
  ROI_HEADS: {NAME: StandardROIHeads, IN_FEATURES: [trunk3]}
  ROI_BOX_HEAD: {NAME: FBNetV2RoIBoxHead, POOLER_RESOLUTION: 6, NORM: naiveSyncBN}
MODEL_EMA: {ENABLED: True, DECAY: 0.9}
DATASETS: {TRAIN: [coco_2017_train], TEST: [coco_2017_val]}
DATALOADER: {NUM_WORKERS: 0}
INPUT: {MIN_SIZE_TRAIN: [64], MAX_SIZE_TRAIN: 96, MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}
SOLVER: {REFERENCE_WORLD_SIZE: 2, IMS_PER_BATCH: 4, MAX_ITER: 2, WARMUP_ITERS: 1,
         LR_SCHEDULER_NAME: WarmupCosineLR}
TEST: {FINAL_EVAL: False}
"""
MASK_RCNN = FASTER_RCNN.replace("FBNetV3_A,", "FBNetV3_A_dsmask,").replace(
    "MODEL_EMA",
    "  MASK_ON: True\n"
    "  ROI_MASK_HEAD: {NAME: FBNetV2RoIMaskHead, POOLER_RESOLUTION: 14, NORM: naiveSyncBN}\n"
    "MODEL_EMA",
    1,
)
QAT = (
    FASTER_RCNN.replace("naiveSyncBN", "bn")
    + """
QUANTIZATION:
  BACKEND: qnnpack
  QAT: {ENABLED: True, START_ITER: 0, ENABLE_OBSERVER_ITER: 0, DISABLE_OBSERVER_ITER: 1,
        FREEZE_BN_ITER: 1}
"""
)
METHODS = {"keep_total": 4, "per_gpu": 2, "max_memory": 3}


@pytest.fixture(scope="module")
def d2go(tmp_path_factory, datasets):
    """d2go's commands on a dataset whose objects have masks: their boxes."""
    for path in (datasets / "coco" / "annotations").glob("*.json"):
        content = json.loads(path.read_text())
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        path.write_text(json.dumps(content))
    return D2Go(tmp_path_factory.mktemp("runs"), datasets)


@pytest.fixture(scope="module")
def trained(d2go):
    """The folder of a Faster R-CNN that two processes have trained."""
    d2go(FASTER_RCNN, "--method", "keep_total", name=D2SCALE_TRAIN, processes=2, out="trained")
    return d2go.folder / "trained"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", [FASTER_RCNN, MASK_RCNN, QAT], ids=["faster", "mask", "QAT"])
def test_trains_by_each_method(d2go, request, recipe, method):
    out = request.node.name
    size = ("D2SCALE.IMS_PER_GPU", "3") if method == "max_memory" else ()
    output = d2go(recipe, "--method", method, *size, name=D2SCALE_TRAIN, out=out)
    plan = json.loads((d2go.folder / out / "plan.json").read_text())
    assert (plan["method"], plan["ims_per_batch"]) == (method, METHODS[method])
    state = torch.load(d2go.folder / out / "model_final.pth", weights_only=False)
    assert any(
        not torch.equal(state["model"][key], state["ema_state"][key]) for key in state["ema_state"]
    )
    if recipe is QAT:
        freeze = plan["changes"].get("QUANTIZATION.QAT.FREEZE_BN_ITER", [1, 1])[1]
        assert f"[QAT] freezing BN for subseq iters, iter = {freeze}" in output


def test_evaluates_with_the_averaged_weights(d2go, trained):
    weights = ("MODEL.WEIGHTS", str(trained / "model_final.pth"))
    arguments = ("--eval-only", *weights)
    d2go(FASTER_RCNN, *arguments, name=D2SCALE_TRAIN, processes=2, out="evaluated")
    folders = (d2go.folder / "evaluated" / "inference").iterdir()
    assert {folder.name for folder in folders} == {"default", "ema"}


@pytest.mark.parametrize("runner", ["d2scale.Runner", "d2go.runner.GeneralizedRCNNRunner"])
def test_exports_what_was_trained_also_without_d2scale(d2go, trained, runner):
    config = (trained / "trained_model_configs" / "model_final.yaml").read_text()
    kind, out = ("--predictor-types", "torchscript"), f"exported by {runner}"
    d2go(config, *kind, name="d2go.exporter", out=out, runner=runner)
    assert list((d2go.folder / out).glob("torchscript*/predictor_info.json"))


def test_exports_a_quantized_model(d2go):
    d2go(QAT, name=D2SCALE_TRAIN, out="quantized")
    weights = ("MODEL.WEIGHTS", str(d2go.folder / "quantized" / "model_final.pth"))
    kind = ("--predictor-types", "torchscript_int8", "--device", "cpu")
    d2go(QAT, *kind, *weights, name="d2go.exporter", out="int8")
    assert list((d2go.folder / "int8").glob("torchscript_int8/predictor_info.json"))
