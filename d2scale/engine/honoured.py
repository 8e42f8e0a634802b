"""Check that the default engine can honour the values of a config.

Keys that it does not know are refused when a config is loaded; here the values are judged, so
that nothing in a recipe is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fvcore.common.config import CfgNode

from d2scale.config.value_rules import Rule, is_number, judge, names, number, one_of, or_none, whole
from d2scale.engine.tiles import TILE_RULES
from d2scale.errors import Fault
from d2scale.launch.workers import LOADER_TIMEOUT
from d2scale.planning.batch import ON_OOM
from d2scale.planning.methods import METHOD_NAMES
from d2scale.planning.sync_bn import SYNC_BN_RULE

# d2go's multi-tensor variants compute what the plain ones do.
SGD_NAMES = ("sgd", "sgd_mt")
ADAMW_NAMES = ("adamw", "adamw_mt")
PRECISIONS = ("float16", "bfloat16")
CLIP_TYPES = ("value", "norm", "full_model")
SCHEDULES = ("WarmupMultiStepLR", "WarmupCosineLR")
_WITH_D2GO = "train with d2go for more"


def _only(key: str, value: Any, advice: str = _WITH_D2GO) -> Rule:
    return replace(one_of(key, (value,), advice), allowed=f"{value!r} in the default engine")


_RULES = (
    _only("VERSION", 2, "bring the config to detectron2's version 2"),
    whole("SEED", -1, 2**31 - 1),
    whole("WRITER_PERIOD", 1),
    Rule("OUTPUT_DIR", "a folder's name", lambda name: len(name) > 0, "name a folder"),
    names("DATASETS.TRAIN", "names of datasets"),
    names("DATASETS.TEST", "names of datasets"),
    METHOD_NAMES,
    Rule(
        "SOLVER.OPTIMIZER",
        ", ".join(SGD_NAMES + ADAMW_NAMES),
        lambda name: name.lower() in SGD_NAMES + ADAMW_NAMES,
        _WITH_D2GO,
    ),
    number("SOLVER.MOMENTUM", least=0),
    Rule(
        "SOLVER.BETAS",
        "two numbers from 0, below 1",
        lambda betas: len(betas) == 2 and all(is_number(b) and 0 <= b < 1 for b in betas),
    ),
    number("SOLVER.EPS", above=0),
    number("SOLVER.WEIGHT_DECAY", least=0),
    or_none(number("SOLVER.WEIGHT_DECAY_NORM", least=0)),
    or_none(number("SOLVER.WEIGHT_DECAY_BIAS", least=0)),
    number("SOLVER.BIAS_LR_FACTOR", least=0),
    one_of("SOLVER.LR_SCHEDULER_NAME", SCHEDULES, _WITH_D2GO),
    number("SOLVER.GAMMA", above=0),
    number("SOLVER.WARMUP_FACTOR", least=0),
    one_of("SOLVER.WARMUP_METHOD", ("linear", "constant")),
    one_of("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", CLIP_TYPES),
    number("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", above=0),
    number("SOLVER.CLIP_GRADIENTS.NORM_TYPE", above=0),
    one_of("SOLVER.AMP.PRECISION", PRECISIONS),
    _only("MODEL_EMA.ENABLED", False),
    _only("QUANTIZATION.QAT.ENABLED", False),
    _only("TEST.PRECISE_BN.ENABLED", False),
    _only("DATALOADER.SAMPLER_TRAIN", "TrainingSampler"),
    whole("DATALOADER.NUM_WORKERS", 0, 1024),
    whole("TEST.DETECTIONS_PER_IMAGE", 1),
    one_of("MODEL.DEVICE", ("cuda", "cpu")),
    ON_OOM,
    LOADER_TIMEOUT,
    *TILE_RULES,
    SYNC_BN_RULE,
)


def value_faults(cfg: CfgNode) -> list[Fault]:
    """Return every value in ``cfg`` that the default engine cannot honour."""
    return judge(cfg, _RULES) or [*_combination_faults(cfg)]


def _combination_faults(cfg: CfgNode) -> Iterator[Fault]:
    solver = cfg.SOLVER
    if solver.NESTEROV and solver.MOMENTUM == 0:
        yield Fault("SOLVER.NESTEROV", True, "with SOLVER.MOMENTUM above 0", "set it to False")
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR" and solver.BASE_LR_END > solver.BASE_LR:
        allowed = f"at most SOLVER.BASE_LR = {solver.BASE_LR}"
        yield Fault("SOLVER.BASE_LR_END", solver.BASE_LR_END, allowed, "lower it")
