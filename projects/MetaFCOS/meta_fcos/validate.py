"""Checks of the config keys that the model reads, all faults at once. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from d2scale.errors import ConfigError, Fault

STAGES = ("res2", "res3", "res4", "res5")
GN_ADVICE = "GroupNorm has 32 groups"


def check_config(cfg: Any) -> None:
    """Check every key that the model reads.

    Raises:
        ConfigError: with all faults.
    """
    faults = [
        Fault(key, value, allowed, advice)
        for key, allowed, advice, test in RULES
        if not _passes(test, value := _get(cfg, key))
    ]
    # Rules over several keys make sense only where each is right by itself.
    faults = faults or list(_joint_faults(cfg))
    if faults:
        raise ConfigError(faults)


def _get(cfg: Any, key: str) -> Any:
    node = cfg
    for name in key.split("."):
        node = node[name]
    return node


def _passes(test: Callable[[Any], bool], value: Any) -> bool:
    try:
        return test(value)
    except (TypeError, ValueError):
        return False


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: _is_int(value, least)


def _one_of(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: any(value == a and type(value) is type(a) for a in allowed)


def _increasing(value: Any) -> bool:
    return all(a < b for a, b in pairwise([0, *value]))


def _neighbours(value: Any) -> bool:
    start = STAGES.index(value[0]) if len(value) else len(STAGES)
    return len(value) > 0 and tuple(value) == STAGES[start : start + len(value)]


# Key, allowed values, advice, test.
Rule = tuple[str, str, str, Callable[[Any], bool]]
PICK = "choose one of these"
PRETRAINING = "this project covers the pretraining stage only"
MODEL_RULES: tuple[Rule, ...] = (
    ("MODEL.RESNETS.DEPTH", "18, 34, 50 or 101", PICK, _one_of(18, 34, 50, 101)),
    ("MODEL.RESNETS.NORM", "FrozenBN, BN or GN", PICK, _one_of("FrozenBN", "BN", "GN")),
    ("MODEL.RESNETS.STEM_OUT_CHANNELS", "1 or more", "64 is usual", _whole(1)),
    ("MODEL.RESNETS.RES2_OUT_CHANNELS", "1 or more", "256 is usual, 64 for 18 and 34", _whole(1)),
    ("MODEL.RESNETS.WIDTH_PER_GROUP", "1 or more", "64 is usual", _whole(1)),
    ("MODEL.RESNETS.STRIDE_IN_1X1", "True or False", PICK, _one_of(True, False)),
    ("MODEL.BACKBONE.FREEZE_AT", "0 to 5", "2 is usual", lambda v: _is_int(v, 0) and v <= 5),
    ("MODEL.BACKBONE.FREEZE", "False", f"use FREEZE_AT; {PRETRAINING}", _one_of(False)),
    ("MODEL.BACKBONE.NAME", "build_fcos_resnet_fpn_backbone", "this model has no other backbone",
     _one_of("build_fcos_resnet_fpn_backbone")),
    ("MODEL.PROPOSAL_GENERATOR.NAME", "MetaFCOS", "this model has no other",
     _one_of("MetaFCOS")),
    ("MODEL.FPN.IN_FEATURES", "neighbouring stages of res2 to res5, from fine to coarse",
     "[res3, res4, res5] is usual", _neighbours),
    ("MODEL.FPN.OUT_CHANNELS", "a multiple of 32", GN_ADVICE,
     lambda v: _is_int(v, 32) and v % 32 == 0),
    ("MODEL.FPN.NORM", "the empty string, FrozenBN, BN or GN", PICK,
     _one_of("", "FrozenBN", "BN", "GN")),
    ("MODEL.FPN.FUSE_TYPE", "sum or avg", PICK, _one_of("sum", "avg")),
    ("MODEL.PIXEL_MEAN", "three numbers", "one for each channel of INPUT.FORMAT",
     lambda v: len([float(x) for x in v]) == 3),
    ("MODEL.PIXEL_STD", "three numbers above 0", "one for each channel of INPUT.FORMAT",
     lambda v: len(v) == 3 and all(x > 0 for x in v)),
    ("MODEL.META_LEARN.EPISODIC_LEARNING", "False", PRETRAINING, _one_of(False)),
)  # fmt: skip
FCOS_RULES: tuple[Rule, ...] = (
    ("NUM_CLASSES", "1 or more", "the number of classes of the dataset", _whole(1)),
    ("NUM_CLS_CONVS", "0 or more", "4 is usual", _whole(0)),
    ("NUM_BOX_CONVS", "0 or more", "4 is usual", _whole(0)),
    ("TOP_LEVELS", "0, 1 or 2", "2 gives p6 and p7", _one_of(0, 1, 2)),
    ("NORM", "GN", "published heads use it", _one_of("GN")),
    ("CLS_LOGITS_KERNEL_SIZE", "an odd number", "1 in Sylph, 3 in AdelaiDet",
     lambda v: _is_int(v, 1) and v % 2 == 1),
    ("USE_SCALE", "True or False", PICK, _one_of(True, False)),
    ("BOX_QUALITY", "[ctrness]", "remove iou: pretraining never trains that branch",
     lambda v: list(v) == ["ctrness"]),
    ("PRIOR_PROB", "above 0 and below 1", "0.01 is usual", lambda v: 0 < v < 1),
    ("CENTER_SAMPLE", "True or False", PICK, _one_of(True, False)),
    ("POS_RADIUS", "above 0", "1.5 is usual", lambda v: v > 0),
    ("SIZES_OF_INTEREST", "increasing numbers above 0", "[64, 128, 256, 512] is usual",
     _increasing),
    ("LOSS_ALPHA", "0 to 1", "0.25 is usual", lambda v: 0 <= v <= 1),
    ("LOSS_GAMMA", "0 or more", "2.0 is usual", lambda v: v >= 0),
    ("LOC_LOSS_TYPE", "giou, linear_iou or iou", PICK, _one_of("giou", "linear_iou", "iou")),
    ("THRESH_WITH_CTR", "True or False", PICK, _one_of(True, False)),
    ("INFERENCE_TH_TEST", "0 or more and below 1", "0.05 is usual", lambda v: 0 <= v < 1),
    ("PRE_NMS_TOPK_TEST", "1 or more", "1000 is usual", _whole(1)),
    ("NMS_TH", "0 to 1", "0.6 is usual", lambda v: 0 <= v <= 1),
    ("POST_NMS_TOPK_TEST", "1 or more", "100 is usual", _whole(1)),
)  # fmt: skip
RULES = MODEL_RULES + tuple((f"MODEL.FCOS.{rule[0]}", *rule[1:]) for rule in FCOS_RULES)


def _joint_faults(cfg: Any) -> Iterator[Fault]:
    model, fcos = cfg.MODEL, cfg.MODEL.FCOS
    lacking = [name for name in model.FPN.IN_FEATURES if name not in model.RESNETS.OUT_FEATURES]
    if lacking:
        yield Fault(
            "MODEL.RESNETS.OUT_FEATURES", model.RESNETS.OUT_FEATURES,
            f"all of MODEL.FPN.IN_FEATURES {model.FPN.IN_FEATURES}", f"add {', '.join(lacking)}",
        )  # fmt: skip
    yield from _level_faults(cfg)
    yield from _width_faults(cfg)
    if len(fcos.SIZES_OF_INTEREST) != len(fcos.IN_FEATURES) - 1:
        yield Fault(
            "MODEL.FCOS.SIZES_OF_INTEREST", fcos.SIZES_OF_INTEREST,
            f"{len(fcos.IN_FEATURES) - 1} numbers, one fewer than MODEL.FCOS.IN_FEATURES",
            "give the borders between neighbouring levels",
        )  # fmt: skip


def _level_faults(cfg: Any) -> Iterator[Fault]:
    fcos, stages = cfg.MODEL.FCOS, cfg.MODEL.FPN.IN_FEATURES
    first, last = (int(stages[i][-1]) for i in (0, -1))
    levels = [f"p{number}" for number in range(first, last + 1 + fcos.TOP_LEVELS)]
    read = list(fcos.IN_FEATURES)
    if not read or [name for name in levels if name in read] != read:
        yield Fault(
            "MODEL.FCOS.IN_FEATURES", fcos.IN_FEATURES, f"levels of {levels}, in this order",
            "name levels that MODEL.FPN.IN_FEATURES and MODEL.FCOS.TOP_LEVELS give",
        )  # fmt: skip
        return
    strides = [2 ** int(name[1:]) for name in read]
    if list(fcos.FPN_STRIDES) != strides:
        yield Fault(
            "MODEL.FCOS.FPN_STRIDES", fcos.FPN_STRIDES, f"{strides}",
            f"it has to fit MODEL.FCOS.IN_FEATURES {read}",
        )  # fmt: skip


def _width_faults(cfg: Any) -> Iterator[Fault]:
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH in (18, 34) and resnets.RES2_OUT_CHANNELS > 64:
        yield Fault(
            "MODEL.RESNETS.RES2_OUT_CHANNELS", resnets.RES2_OUT_CHANNELS,
            f"64 or fewer where DEPTH is {resnets.DEPTH}", "set it to 64",
        )  # fmt: skip
    widths = ["STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS"]
    widths += ["WIDTH_PER_GROUP"] if resnets.DEPTH not in (18, 34) else []
    for key in widths if resnets.NORM == "GN" else ():
        if resnets[key] % 32:
            yield Fault(f"MODEL.RESNETS.{key}", resnets[key], "a multiple of 32", GN_ADVICE)
