from __future__ import annotations

import pytest

from d2scale.config import get_cfg
from d2scale.engine.honoured import value_faults


def test_defaults_are_honoured():
    assert value_faults(get_cfg()) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("VERSION", 1),
        ("SEED", -2),
        ("WRITER_PERIOD", 0),
        ("OUTPUT_DIR", ""),
        ("SOLVER.OPTIMIZER", "lamb"),
        ("SOLVER.MOMENTUM", -0.1),
        ("SOLVER.BETAS", (0.9, 1.0)),
        ("SOLVER.BETAS", (0.9,)),
        ("SOLVER.EPS", 0.0),
        ("SOLVER.WEIGHT_DECAY", float("nan")),
        ("SOLVER.WEIGHT_DECAY", float("inf")),
        ("SOLVER.WEIGHT_DECAY_BIAS", -1.0),
        ("SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR"),
        ("SOLVER.GAMMA", 0.0),
        ("SOLVER.WARMUP_METHOD", "square"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "both"),
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.0),
        ("SOLVER.AMP.PRECISION", "float8"),
        ("MODEL_EMA.ENABLED", True),
        ("QUANTIZATION.QAT.ENABLED", True),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
        ("DATALOADER.NUM_WORKERS", -1),
        ("TEST.DETECTIONS_PER_IMAGE", 0),
        ("MODEL.DEVICE", "tpu"),
        ("D2SCALE.ON_OOM", "retry"),
    ],
)
def test_value_that_is_not_honoured_is_named(key, value):
    cfg = get_cfg()
    cfg.merge_from_list([key, value])
    (fault,) = value_faults(cfg)
    assert fault.key == key
    assert repr(value) in str(fault)


def test_all_faults_are_told_at_once():
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL_EMA.ENABLED", True, "QUANTIZATION.QAT.ENABLED", True])
    assert len(value_faults(cfg)) == 2


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["SOLVER.NESTEROV", True, "SOLVER.MOMENTUM", 0.0], "SOLVER.NESTEROV"),
        (
            ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR_END", 1.0],
            "SOLVER.BASE_LR_END",
        ),
    ],
)
def test_values_that_contradict_each_other(settings, key):
    cfg = get_cfg()
    cfg.merge_from_list(settings)
    assert [fault.key for fault in value_faults(cfg)] == [key]


@pytest.mark.parametrize("name", ["sgd", "SGD", "sgd_mt", "adamw", "AdamW"])
def test_optimizers(name):
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER = name
    assert value_faults(cfg) == []
