"""The config keys of MetaFCOS, under the names that published recipes use.

Importing this module needs no torch: planning reads the same recipes.
"""

from __future__ import annotations

from copy import copy
from typing import Any

# The key that counts a model's classes, by the name in MODEL.META_ARCHITECTURE.
CLASS_COUNT_KEYS = {"MetaOneStageDetector": "MODEL.FCOS.NUM_CLASSES"}
# Keys and sections that decide what the losses and the detections are, not how much memory
# training takes.
_WITHOUT_MEMORY = (
    "MODEL.META_LEARN",
    "MODEL.TFA",
    "MODEL.BACKBONE.FREEZE",
    "MODEL.FCOS.CENTER_SAMPLE",
    "MODEL.FCOS.POS_RADIUS",
    "MODEL.FCOS.SIZES_OF_INTEREST",
)
_FCOS_KEYS: dict[str, Any] = {
    # Foreground classes. 0: as many as the training dataset has.
    "NUM_CLASSES": 0,
    # Pyramid levels that the head reads, from fine to coarse.
    "IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
    # Pixels between two locations of each of these levels.
    "FPN_STRIDES": [8, 16, 32, 64, 128],
    # Levels of the pyramid beyond the last one of the FPN (p6 and p7).
    "TOP_LEVELS": 2,
    # Normalization in the towers of the head.
    "NORM": "GN",
    # 3x3 convolutions in the class tower and in the box tower.
    "NUM_CLS_CONVS": 4,
    "NUM_BOX_CONVS": 4,
    # Kernel of the last convolution of the class tower: 1 in Sylph, 3 in AdelaiDet.
    "CLS_LOGITS_KERNEL_SIZE": 1,
    # Multiply the predicted distances of each level by a learned number.
    "USE_SCALE": True,
    # What the head scores besides the class.
    "BOX_QUALITY": ["ctrness"],
    # Score of every class and location before training.
    "PRIOR_PROB": 0.01,
    # Largest distance to a box's side, in pixels, where one level hands over to the next.
    "SIZES_OF_INTEREST": [64, 128, 256, 512],
    # Only locations near the centre of a box are positive; False: all that lie inside it.
    "CENTER_SAMPLE": True,
    # How near, in strides of the level, along each axis.
    "POS_RADIUS": 1.5,
    # Weight of the positives, and focusing exponent, of the focal loss.
    "LOSS_ALPHA": 0.25,
    "LOSS_GAMMA": 2.0,
    # Box loss: giou, linear_iou or iou.
    "LOC_LOSS_TYPE": "giou",
    # Score times centre-ness, not the score alone, has to pass INFERENCE_TH_TEST.
    "THRESH_WITH_CTR": False,
    # Detections at or below this score are dropped.
    "INFERENCE_TH_TEST": 0.05,
    # Detections kept on each level before suppression.
    "PRE_NMS_TOPK_TEST": 1000,
    # Overlap (IoU) above which the weaker detection of a class is dropped.
    "NMS_TH": 0.6,
    # Detections kept in an image.
    "POST_NMS_TOPK_TEST": 100,
}


def add_meta_fcos_config(cfg: Any) -> tuple[str, ...]:
    """Add the keys of MetaFCOS to ``cfg``, in place; return those without influence on memory.

    A key that is there already keeps its value, so it also works on a detectron2 or d2go config,
    whose own ``MODEL.FCOS`` keys stay.
    """
    _add_absent(cfg, "MODEL.FCOS", _FCOS_KEYS)
    # True is the few-shot stage, which this project does not cover.
    _add_absent(cfg, "MODEL.META_LEARN", {"EPISODIC_LEARNING": False})
    # Images a class in few-shot fine-tuning. Recipes set it; pretraining does not read it.
    _add_absent(cfg, "MODEL.TFA", {"TRAIN_SHOT": 10})
    # True would train the head alone, which belongs to the few-shot stage.
    _add_absent(cfg, "MODEL.BACKBONE", {"FREEZE": False})
    # Channels of the 3x3 convolution of a bottleneck in res2; they double with every stage.
    _add_absent(cfg, "MODEL.RESNETS", {"WIDTH_PER_GROUP": 64})
    return _WITHOUT_MEMORY


def _add_absent(cfg: Any, path: str, keys: dict[str, Any]) -> None:
    node = cfg
    for name in path.split("."):
        if name not in node:
            setattr(node, name, type(cfg)())
        node = node[name]
    for key, value in keys.items():
        if key not in node:
            setattr(node, key, copy(value))  # two configs must not share a list
