from __future__ import annotations

import numpy as np
import pytest
import torch

from d2scale.config.defaults import get_cfg
from meta_fcos.config import add_meta_fcos_config
from meta_fcos.detector import OneStageDetector
from meta_fcos.fpn import FPN
from meta_fcos.head import FCOSHead
from meta_fcos.proposals import MetaFCOS
from meta_fcos.resnet import ResNet
from meta_fcos.targets import TargetRule


@pytest.fixture
def recipe_cfg():
    """A config as the published recipes set it."""
    cfg = get_cfg()
    add_meta_fcos_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "MetaOneStageDetector"
    cfg.MODEL.BACKBONE.NAME = "build_fcos_resnet_fpn_backbone"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "MetaFCOS"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FCOS.NUM_CLASSES = 60
    return cfg


@pytest.fixture
def small_cfg(recipe_cfg):
    """The same for a model of few channels that trains from random weights."""
    recipe_cfg.MODEL.RESNETS.DEPTH = 18
    recipe_cfg.MODEL.RESNETS.NORM = "GN"
    recipe_cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 32
    recipe_cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 32
    recipe_cfg.MODEL.BACKBONE.FREEZE_AT = 0
    recipe_cfg.MODEL.FPN.OUT_CHANNELS = 32
    recipe_cfg.MODEL.FCOS.NUM_CLASSES = 3
    return recipe_cfg


@pytest.fixture
def make_detector():
    def make(norm="GN", freeze_at=0, classes=3, seed=0):
        torch.manual_seed(seed)
        # Small boxes have to reach all levels of small images.
        rule = TargetRule(sizes_of_interest=(16, 32, 64, 96))
        bottom_up = ResNet(18, norm=norm, stem_channels=32, res2_channels=32, freeze_at=freeze_at)
        # With 32 channels GroupNorm has single values to normalize where p7 is one pixel: their
        # sign, and so ReLU's gradient, would be rounding noise.
        head = FCOSHead(64, classes, 5, num_cls_convs=2, num_box_convs=2)
        return OneStageDetector(FPN(bottom_up, channels=64), MetaFCOS(head, rule))

    return make


@pytest.fixture
def make_sample():
    def make(height=96, width=128, count=3, classes=3, seed=0, **more):
        random = np.random.RandomState(seed)
        image = random.randint(0, 256, (3, height, width), dtype=np.uint8)
        corner = random.rand(count, 2) * (0.6 * width, 0.6 * height)
        side = (0.2 + 0.7 * random.rand(count, 2)) * ((width, height) - corner)
        return {
            "image": torch.from_numpy(image),
            "height": 2 * height,
            "width": 2 * width,
            "image_id": seed,
            "file_name": f"{seed}.jpg",
            "boxes": torch.from_numpy(np.concatenate((corner, corner + side), axis=1)).float(),
            "classes": torch.from_numpy(random.randint(0, classes, count)),
            **more,
        }

    return make
