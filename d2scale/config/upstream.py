"""Which config keys belong to detectron2 and which to d2go."""

from __future__ import annotations

from collections.abc import Iterable

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
