"""Which values of the config keys the default engine can honour.

Keys that it does not know are refused when a config is loaded; here the values are judged, so
that nothing in a recipe is passed over in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fvcore.common.config import CfgNode

from d2scale.config.keys import get_key
from d2scale.errors import Fault

# d2go's multi-tensor variants compute what the plain ones do.
SGD_NAMES = ("sgd", "sgd_mt")
ADAMW_NAMES = ("adamw", "adamw_mt")
PRECISIONS = ("float16", "bfloat16")
CLIP_TYPES = ("value", "norm", "full_model")
SCHEDULES = ("WarmupMultiStepLR", "WarmupCosineLR")
_WITH_D2GO = "train with d2go for more"


@dataclass(frozen=True)
class _Rule:
    """What one key may hold."""

    key: str
    allowed: str
    holds: Callable[[Any], bool]
    advice: str = "correct it"

    def faults(self, cfg: CfgNode) -> Iterator[Fault]:
        value = get_key(cfg, self.key)
        if not self.holds(value):
            yield Fault(self.key, value, self.allowed, self.advice)


def _only(key: str, value: Any, advice: str = _WITH_D2GO) -> _Rule:
    return _Rule(key, f"{value!r} in the default engine", lambda found: found == value, advice)


def _one_of(key: str, choices: tuple[str, ...], advice: str = _WITH_D2GO) -> _Rule:
    return _Rule(key, ", ".join(choices), lambda found: found in choices, advice)


def _between(key: str, low: float, high: float = math.inf) -> _Rule:
    allowed = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
    return _Rule(key, allowed, lambda found: low <= found <= high and math.isfinite(found))


def _above(key: str, low: float) -> _Rule:
    return _Rule(key, f"above {low:g}", lambda found: low < found < math.inf)


_RULES = (
    _only("VERSION", 2, "bring the config to detectron2's version 2"),
    _between("SEED", -1, 2**31 - 1),
    _between("WRITER_PERIOD", 1),
    _Rule("OUTPUT_DIR", "a folder's name", bool, "name a folder"),
    _Rule(
        "SOLVER.OPTIMIZER",
        ", ".join(SGD_NAMES + ADAMW_NAMES),
        lambda name: name.lower() in SGD_NAMES + ADAMW_NAMES,
        _WITH_D2GO,
    ),
    _between("SOLVER.MOMENTUM", 0),
    _Rule(
        "SOLVER.BETAS",
        "two numbers from 0, below 1",
        lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
    ),
    _above("SOLVER.EPS", 0),
    _between("SOLVER.WEIGHT_DECAY", 0),
    _between("SOLVER.WEIGHT_DECAY_NORM", 0),
    _Rule(
        "SOLVER.WEIGHT_DECAY_BIAS",
        "0 or more, or None",
        lambda decay: decay is None or 0 <= decay < math.inf,
    ),
    _between("SOLVER.BIAS_LR_FACTOR", 0),
    _one_of("SOLVER.LR_SCHEDULER_NAME", SCHEDULES),
    _above("SOLVER.GAMMA", 0),
    _between("SOLVER.WARMUP_FACTOR", 0),
    _one_of("SOLVER.WARMUP_METHOD", ("linear", "constant"), "choose one"),
    _one_of("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", CLIP_TYPES, "choose one"),
    _above("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0),
    _above("SOLVER.CLIP_GRADIENTS.NORM_TYPE", 0),
    _one_of("SOLVER.AMP.PRECISION", PRECISIONS, "choose one"),
    _only("MODEL_EMA.ENABLED", False),
    _only("QUANTIZATION.QAT.ENABLED", False),
    _only("DATALOADER.SAMPLER_TRAIN", "TrainingSampler"),
    _between("DATALOADER.NUM_WORKERS", 0),
    _between("TEST.DETECTIONS_PER_IMAGE", 1),
    _one_of("MODEL.DEVICE", ("cuda", "cpu"), "choose one"),
    _one_of("D2SCALE.ON_OOM", ("split", "raise"), "choose one"),
)


def value_faults(cfg: CfgNode) -> list[Fault]:
    """Return every value in ``cfg`` that the default engine cannot honour."""
    faults = [fault for rule in _RULES for fault in rule.faults(cfg)]
    return faults or [*_combination_faults(cfg)]


def _combination_faults(cfg: CfgNode) -> Iterator[Fault]:
    solver = cfg.SOLVER
    if solver.NESTEROV and solver.MOMENTUM == 0:
        yield Fault("SOLVER.NESTEROV", True, "with SOLVER.MOMENTUM above 0", "set it to False")
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR" and solver.BASE_LR_END > solver.BASE_LR:
        yield Fault(
            "SOLVER.BASE_LR_END",
            solver.BASE_LR_END,
            f"at most SOLVER.BASE_LR = {solver.BASE_LR}",
            "lower it",
        )
