"""Models of detectron2's and d2go's own recipes, as deep as they are and a quarter as wide."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import nn

MODELS = {
    "RetinaNet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "Faster R-CNN": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "Mask R-CNN": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "Cascade Mask R-CNN": "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "Keypoint R-CNN": "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "FCOS": "COCO-Detection/fcos_R_50_FPN_1x.py",
    "Panoptic FPN": "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "d2go's FBNet Faster R-CNN, trained BN": "faster_rcnn_fbnetv3a_C4.yaml",
}
# The model's keys of that recipe, but for the norm: its naiveSyncBN is no batch norm of a rank.
FBNET = {
    "MODEL.FBNET_V2.ARCH": "FBNetV3_A",
    "MODEL.FBNET_V2.NORM": "bn",
    "MODEL.FBNET_V2.WIDTH_DIVISOR": 8,
    "MODEL.BACKBONE.NAME": "FBNetV2C4Backbone",
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32, 64, 96, 128, 160]],
    "MODEL.RPN.HEAD_NAME": "FBNetV2RpnHead",
    "MODEL.RPN.IN_FEATURES": ["trunk3"],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 2000,
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["trunk3"],
    "MODEL.ROI_BOX_HEAD.NAME": "FBNetV2RoIBoxHead",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 6,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 64,
}
BODY = "ResNet-50, FPN and heads a quarter as wide"
NARROW = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 16,
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 256,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 64,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 64,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (128,) * 8,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 128,
}
# Random weights with batch norm that does nothing grow with the depth, up to losses of thousands.
_LAST_SCALE = 0.2


def body_of(name: str) -> str:
    """Say how the model differs from the recipe's."""
    if name.startswith("d2go"):
        return "64 regions an image"
    return BODY if name in ("RetinaNet", "FCOS") else f"{BODY}, 128 regions an image"


def build(name: str, seed: int) -> nn.Module:
    """Return the model, in training mode, on the CPU, in torch's default dtype."""
    torch.manual_seed(seed)
    if name.startswith("d2go"):
        model = _fbnet()
    elif name == "FCOS":
        model = _fcos()
    else:
        from detectron2.modeling import build_model

        model = build_model(narrow_cfg(name))
    for module in model.modules():
        if type(module).__name__ == "BottleneckBlock":
            module.conv3.norm.weight.fill_(_LAST_SCALE)
    # Buffers such as pixel means are made in float32.
    return model.to(torch.get_default_dtype()).train()


def narrow_cfg(name: str) -> Any:
    """Return the config of a recipe of detectron2's, with a narrow model on the CPU."""
    from detectron2 import model_zoo

    cfg = model_zoo.get_config(MODELS[name])
    cfg.merge_from_list([word for pair in NARROW.items() for word in pair])
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    return cfg


def _fcos() -> nn.Module:
    """Return the model of detectron2's LazyConfig, on the narrow body of RetinaNet."""
    from detectron2 import model_zoo
    from detectron2.config import instantiate
    from detectron2.modeling import build_model

    lazy = model_zoo.get_config(MODELS["FCOS"]).model
    body = build_model(narrow_cfg("RetinaNet")).backbone
    channels = NARROW["MODEL.FPN.OUT_CHANNELS"]
    lazy.backbone = body
    lazy.head.input_shape = list(body.output_shape().values())
    lazy.head.conv_dims = [channels] * len(lazy.head.conv_dims)
    model: nn.Module = instantiate(lazy)
    return model


def _fbnet() -> nn.Module:
    # mobile-vision asks for the file number of the standard input.
    before = sys.stdin
    with open(os.devnull, encoding="utf-8") as sys.stdin:
        from d2go.runner import GeneralizedRCNNRunner
    sys.stdin = before

    cfg = GeneralizedRCNNRunner.get_default_cfg()
    # Its package brings no recipes with it.
    cfg.merge_from_list([word for pair in FBNET.items() for word in pair])
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    return GeneralizedRCNNRunner().build_model(cfg)
