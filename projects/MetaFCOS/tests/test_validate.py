from __future__ import annotations

import pytest

from d2scale.errors import ConfigError
from meta_fcos.validate import check_config


def test_the_recipe_and_the_small_model_are_right(recipe_cfg):
    check_config(recipe_cfg)
    recipe_cfg.MODEL.RESNETS.DEPTH = 101
    recipe_cfg.MODEL.FPN.NORM = "GN"
    check_config(recipe_cfg)


def test_the_small_model_is_right(small_cfg):
    check_config(small_cfg)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.RESNETS.DEPTH", 42),
        ("MODEL.RESNETS.NORM", "SyncBN"),
        ("MODEL.RESNETS.STEM_OUT_CHANNELS", 0),
        ("MODEL.BACKBONE.FREEZE_AT", 6),
        ("MODEL.BACKBONE.FREEZE", True),
        ("MODEL.BACKBONE.NAME", "build_resnet_backbone"),
        ("MODEL.PROPOSAL_GENERATOR.NAME", "RPN"),
        ("MODEL.FPN.IN_FEATURES", ["res3", "res5"]),
        ("MODEL.FPN.IN_FEATURES", []),
        ("MODEL.FPN.IN_FEATURES", ["c3"]),
        ("MODEL.FPN.OUT_CHANNELS", 100),
        ("MODEL.FPN.NORM", "LN"),
        ("MODEL.FPN.FUSE_TYPE", "max"),
        ("MODEL.PIXEL_MEAN", [1.0, 2.0]),
        ("MODEL.PIXEL_STD", [1.0, 0.0, 1.0]),
        ("MODEL.META_LEARN.EPISODIC_LEARNING", True),
        ("MODEL.FCOS.NUM_CLASSES", 0),
        ("MODEL.FCOS.NUM_CLS_CONVS", -1),
        ("MODEL.FCOS.TOP_LEVELS", 3),
        ("MODEL.FCOS.NORM", "BN"),
        ("MODEL.FCOS.CLS_LOGITS_KERNEL_SIZE", 2),
        ("MODEL.FCOS.BOX_QUALITY", ["ctrness", "iou"]),
        ("MODEL.FCOS.BOX_QUALITY", []),
        ("MODEL.FCOS.PRIOR_PROB", 1.0),
        ("MODEL.FCOS.POS_RADIUS", 0.0),
        ("MODEL.FCOS.SIZES_OF_INTEREST", [64, 64, 256, 512]),
        ("MODEL.FCOS.LOSS_ALPHA", 1.5),
        ("MODEL.FCOS.LOSS_GAMMA", -1.0),
        ("MODEL.FCOS.LOC_LOSS_TYPE", "l1"),
        ("MODEL.FCOS.INFERENCE_TH_TEST", 1.0),
        ("MODEL.FCOS.PRE_NMS_TOPK_TEST", 0),
        ("MODEL.FCOS.NMS_TH", 1.2),
        ("MODEL.FCOS.POST_NMS_TOPK_TEST", 0),
        # Rules over several keys.
        ("MODEL.RESNETS.OUT_FEATURES", ["res4"]),
        ("MODEL.FCOS.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
        ("MODEL.FCOS.FPN_STRIDES", [4, 8, 16, 32, 64]),
        ("MODEL.FCOS.SIZES_OF_INTEREST", [64, 128]),
    ],
)
def test_each_wrong_value_is_named(recipe_cfg, key, value):
    recipe_cfg.merge_from_list([key, value])
    with pytest.raises(ConfigError) as error:
        check_config(recipe_cfg)
    assert [fault.key for fault in error.value.faults] == [key]
    assert repr(value) in str(error.value)


def test_all_faults_are_told_at_once(recipe_cfg):
    recipe_cfg.MODEL.FCOS.NUM_CLASSES = 0
    recipe_cfg.MODEL.FCOS.LOC_LOSS_TYPE = "l1"
    recipe_cfg.MODEL.RESNETS.DEPTH = 20
    with pytest.raises(ConfigError) as error:
        check_config(recipe_cfg)
    assert len(str(error.value).splitlines()) == 3


def test_basic_blocks_are_narrow(recipe_cfg):
    recipe_cfg.MODEL.RESNETS.DEPTH = 18
    with pytest.raises(ConfigError, match="set it to 64"):
        check_config(recipe_cfg)


@pytest.mark.parametrize("key", ["STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "WIDTH_PER_GROUP"])
def test_group_norm_needs_multiples_of_32(recipe_cfg, key):
    recipe_cfg.MODEL.RESNETS.NORM = "GN"
    check_config(recipe_cfg)
    recipe_cfg.MODEL.RESNETS[key] = 48
    with pytest.raises(ConfigError, match=f"{key} is 48; allowed: a multiple of 32"):
        check_config(recipe_cfg)
