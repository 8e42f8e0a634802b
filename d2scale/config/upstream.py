"""What is known of detectron2 and d2go without them: their keys, recipes and installation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from d2scale.config import own_datasets
from d2scale.config.projects import entry_points

INSTALL_DETECTRON2 = "build detectron2 as its install page says (https://detectron2.readthedocs.io)"

_DETECTRON2_SECTIONS = {
    *("VERSION", "MODEL", "INPUT", "DATASETS", "DATALOADER", "SOLVER", "TEST", "OUTPUT_DIR"),
    *("SEED", "CUDNN_BENCHMARK", "FLOAT32_PRECISION", "VIS_PERIOD", "GLOBAL"),
}
_DETECTRON2_MODEL_SECTIONS = {
    *("LOAD_PROPOSALS", "MASK_ON", "KEYPOINT_ON", "DEVICE", "META_ARCHITECTURE", "WEIGHTS"),
    *("PIXEL_MEAN", "PIXEL_STD", "BACKBONE", "FPN", "PROPOSAL_GENERATOR", "ANCHOR_GENERATOR"),
    *("RPN", "ROI_HEADS", "ROI_BOX_HEAD", "ROI_BOX_CASCADE_HEAD", "ROI_MASK_HEAD"),
    *("ROI_KEYPOINT_HEAD", "SEM_SEG_HEAD", "PANOPTIC_FPN", "RETINANET", "RESNETS"),
}
_D2GO_SOLVER_KEYS = {
    *("OPTIMIZER", "LR_MULTIPLIER_OVERWRITE", "WEIGHT_DECAY_EMBED", "WEIGHT_DECAY_OVERWRITE"),
    *("BETAS", "EPS", "FUSED", "DETERMINISTIC", "AUTO_SCALING_METHODS"),
}

# Real keys that resemble one of d2scale's, and are not misspelt.
LOOK_ALIKES = {
    *(f"SOLVER.{key}" for key in _D2GO_SOLVER_KEYS),
    *("SOLVER.NUM_DECAYS", "SOLVER.AMP.LOG_GRAD_SCALER", "TEST.KEYPOINT_OKS_SIGMAS"),
    *("TEST.EXPECTED_RESULTS", "TEST.FINAL_EVAL"),
}
# Schedules that do not read SOLVER.STEPS; the second is that of detectron2's DeepLab.
SCHEDULES_WITHOUT_STEPS = ("WarmupCosineLR", "WarmupPolyLR", "WarmupStepWithFixedGammaLR")
# Sections that planning has no keys in, or only look-alikes.
UNPLANNED_SECTIONS = (*("MODEL.", "INPUT.", "DATASETS.", "DATALOADER.", "TEST.AUG."),)

# The number of classes of detectron2's and d2go's own models; projects name their key themselves.
CLASS_COUNT_KEYS = {
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
}
USUAL_CLASSES = 80  # where a recipe gives no number
MODEL = "MODEL.META_ARCHITECTURE"
# Those that any engine reads with d2scale.
_D2SCALE_KEYS = ("D2SCALE.", "SOLVER.AUTO_SCALING_METHODS", *own_datasets.KEYS)


def is_lazy_config(path: str) -> bool:
    """Return whether a recipe is a LazyConfig of detectron2, which is code."""
    return path.endswith(".py")


def engine_of(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Return the engine for a recipe's ``settings`` by dotted key, and why.

    The engine is ``default``, ``detectron2`` or ``d2go``.
    """
    model = settings.get(MODEL, "GeneralizedRCNN")
    if any(entry.name == model for entry in entry_points(group="d2scale.models")):
        return "default", f"{MODEL} {model} is a model of an installed project"
    others = [
        key
        for key in settings
        if not key.startswith(_D2SCALE_KEYS) and not is_plain_detectron2([key])
    ]
    if others:
        return "d2go", f"{others[0]} is no key of detectron2"
    return "detectron2", f"{MODEL} is {model}, and all keys are detectron2's"


def is_plain_detectron2(keys: Iterable[str]) -> bool:
    """Return whether detectron2 can read these keys without d2go or a project's own config."""
    return all(map(_is_detectron2_key, keys))


def _is_detectron2_key(key: str) -> bool:
    section, name, *_ = [*key.split("."), ""]
    if section == "MODEL":
        return name in _DETECTRON2_MODEL_SECTIONS
    if section == "SOLVER":
        return name not in _D2GO_SOLVER_KEYS
    return section in _DETECTRON2_SECTIONS
