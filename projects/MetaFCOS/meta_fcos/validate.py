"""Check the config keys that the model reads, all faults at once. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from d2scale.config import value_rules
from d2scale.config.value_rules import Rule, is_number, is_whole, names, number, one_of, whole
from d2scale.errors import ConfigError, Fault

STAGES = ("res2", "res3", "res4", "res5")
GN_ADVICE = "GroupNorm has 32 groups"


def check_config(cfg: Any) -> None:
    """Raise a ConfigError with the faults of all keys that the model reads, if there are any."""
    # Rules over several keys make sense only where each is right by itself.
    if faults := value_rules.judge(cfg, RULES) or list(_joint_faults(cfg)):
        raise ConfigError(faults)


def _are_neighbours(stages: Sequence[str]) -> bool:
    start = STAGES.index(stages[0])
    return tuple(stages) == STAGES[start : start + len(stages)]


def _are_three(numbers: Sequence[float]) -> bool:
    return len(numbers) == 3 and all(map(is_number, numbers))


def _are_three_above_0(numbers: Sequence[float]) -> bool:
    return _are_three(numbers) and min(numbers) > 0


def _is_multiple_of_32(channels: int) -> bool:
    return is_whole(channels) and 0 < channels <= MOST_CHANNELS and channels % 32 == 0


def _is_odd(size: int) -> bool:
    return is_whole(size) and 0 < size < 64 and size % 2 == 1


MOST_CHANNELS = 2**14  # far above any model, and few enough to be built
PRETRAINING = "this project covers the pretraining stage only"
PER_CHANNEL = "one for each channel of INPUT.FORMAT"
FLAG = (True, False)
MODEL_RULES = (
    one_of("MODEL.RESNETS.DEPTH", (18, 34, 50, 101)),
    one_of("MODEL.RESNETS.NORM", ("FrozenBN", "BN", "GN")),
    whole("MODEL.RESNETS.STEM_OUT_CHANNELS", 1, MOST_CHANNELS, advice="64 is usual"),
    whole(
        "MODEL.RESNETS.RES2_OUT_CHANNELS", 1, MOST_CHANNELS, advice="256 is usual, 64 for 18 and 34"
    ),
    whole("MODEL.RESNETS.WIDTH_PER_GROUP", 1, MOST_CHANNELS, advice="64 is usual"),
    one_of("MODEL.RESNETS.STRIDE_IN_1X1", FLAG),
    names("MODEL.RESNETS.OUT_FEATURES", "names of stages"),
    whole("MODEL.BACKBONE.FREEZE_AT", 0, 5, "2 is usual"),
    one_of("MODEL.BACKBONE.FREEZE", (False,), f"use FREEZE_AT; {PRETRAINING}"),
    one_of(
        "MODEL.BACKBONE.NAME",
        ("build_fcos_resnet_fpn_backbone",),
        "this model has no other backbone",
    ),
    one_of("MODEL.PROPOSAL_GENERATOR.NAME", ("MetaFCOS",), "this model has no other"),
    Rule(
        "MODEL.FPN.IN_FEATURES",
        "neighbouring stages of res2 to res5, from fine to coarse",
        _are_neighbours,
        "[res3, res4, res5] is usual",
    ),
    Rule(
        "MODEL.FPN.OUT_CHANNELS",
        f"a multiple of 32, up to {MOST_CHANNELS}",
        _is_multiple_of_32,
        GN_ADVICE,
    ),
    one_of("MODEL.FPN.NORM", ("", "FrozenBN", "BN", "GN")),
    one_of("MODEL.FPN.FUSE_TYPE", ("sum", "avg")),
    Rule("MODEL.PIXEL_MEAN", "three numbers", _are_three, PER_CHANNEL),
    Rule("MODEL.PIXEL_STD", "three numbers above 0", _are_three_above_0, PER_CHANNEL),
    one_of("MODEL.META_LEARN.EPISODIC_LEARNING", (False,), PRETRAINING),
)
FCOS_RULES = (
    whole("NUM_CLASSES", 1, 2**16, advice="the dataset is not here to tell it: give it"),
    whole("NUM_CLS_CONVS", 0, 64, advice="4 is usual"),
    whole("NUM_BOX_CONVS", 0, 64, advice="4 is usual"),
    one_of("TOP_LEVELS", (0, 1, 2), "2 gives p6 and p7"),
    names("IN_FEATURES", "names of levels"),
    one_of("NORM", ("GN",), "published heads use it"),
    Rule("CLS_LOGITS_KERNEL_SIZE", "an odd number below 64", _is_odd, "1 in Sylph, 3 in AdelaiDet"),
    one_of("USE_SCALE", FLAG),
    Rule(
        "BOX_QUALITY",
        "[ctrness]",
        lambda names: list(names) == ["ctrness"],
        "remove iou: pretraining never trains that branch",
    ),
    number("PRIOR_PROB", above=0, below=1, advice="0.01 is usual"),
    one_of("CENTER_SAMPLE", FLAG),
    number("POS_RADIUS", above=0, advice="1.5 is usual"),
    Rule(
        "SIZES_OF_INTEREST",
        "increasing numbers above 0",
        lambda sizes: all(map(is_number, sizes)) and all(a < b for a, b in pairwise([0, *sizes])),
        "[64, 128, 256, 512] is usual",
    ),
    number("LOSS_ALPHA", least=0, most=1, advice="0.25 is usual"),
    number("LOSS_GAMMA", least=0, advice="2.0 is usual"),
    one_of("LOC_LOSS_TYPE", ("giou", "linear_iou", "iou")),
    one_of("THRESH_WITH_CTR", FLAG),
    number("INFERENCE_TH_TEST", least=0, below=1, advice="0.05 is usual"),
    whole("PRE_NMS_TOPK_TEST", 1, advice="1000 is usual"),
    number("NMS_TH", least=0, most=1, advice="0.6 is usual"),
    whole("POST_NMS_TOPK_TEST", 1, advice="100 is usual"),
)
RULES = MODEL_RULES + tuple(replace(rule, key=f"MODEL.FCOS.{rule.key}") for rule in FCOS_RULES)


def _joint_faults(cfg: Any) -> Iterator[Fault]:
    model, fcos = cfg.MODEL, cfg.MODEL.FCOS
    lacking = [name for name in model.FPN.IN_FEATURES if name not in model.RESNETS.OUT_FEATURES]
    if lacking:
        allowed = f"all of MODEL.FPN.IN_FEATURES {model.FPN.IN_FEATURES}"
        held = model.RESNETS.OUT_FEATURES
        yield Fault("MODEL.RESNETS.OUT_FEATURES", held, allowed, f"add {', '.join(lacking)}")
    yield from _level_faults(cfg)
    yield from _width_faults(cfg)
    borders = len(fcos.IN_FEATURES) - 1
    if len(fcos.SIZES_OF_INTEREST) != borders:
        allowed = f"{borders} numbers, one fewer than MODEL.FCOS.IN_FEATURES"
        advice = "give the borders between neighbouring levels"
        yield Fault("MODEL.FCOS.SIZES_OF_INTEREST", fcos.SIZES_OF_INTEREST, allowed, advice)


def _level_faults(cfg: Any) -> Iterator[Fault]:
    fcos, stages = cfg.MODEL.FCOS, cfg.MODEL.FPN.IN_FEATURES
    first, last = (int(stages[i][-1]) for i in (0, -1))
    levels = [f"p{number}" for number in range(first, last + 1 + fcos.TOP_LEVELS)]
    read = list(fcos.IN_FEATURES)
    if not read or [name for name in levels if name in read] != read:
        allowed = f"levels of {levels}, in this order"
        advice = "name levels that MODEL.FPN.IN_FEATURES and MODEL.FCOS.TOP_LEVELS give"
        yield Fault("MODEL.FCOS.IN_FEATURES", fcos.IN_FEATURES, allowed, advice)
        return
    strides = [2 ** int(name[1:]) for name in read]
    if list(fcos.FPN_STRIDES) != strides:
        advice = f"it has to fit MODEL.FCOS.IN_FEATURES {read}"
        yield Fault("MODEL.FCOS.FPN_STRIDES", fcos.FPN_STRIDES, f"{strides}", advice)


def _width_faults(cfg: Any) -> Iterator[Fault]:
    resnets = cfg.MODEL.RESNETS
    widths = ["STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS"]
    if resnets.DEPTH not in (18, 34):
        widths.append("WIDTH_PER_GROUP")
    elif (channels := resnets.RES2_OUT_CHANNELS) > 64:
        allowed = f"64 or fewer where DEPTH is {resnets.DEPTH}"
        yield Fault("MODEL.RESNETS.RES2_OUT_CHANNELS", channels, allowed, "set it to 64")
    for key in widths:
        if resnets.NORM == "GN" and resnets[key] % 32:
            yield Fault(
                f"MODEL.RESNETS.{key}",
                resnets[key],
                f"a multiple of 32, up to {MOST_CHANNELS}",
                GN_ADVICE,
            )
