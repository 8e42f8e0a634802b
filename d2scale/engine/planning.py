"""Decide the plan of a run: once, inside its ranks, the same for all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from d2scale.coco.dataset import load_training_dataset
from d2scale.engine.memory import measure_on_ranks, predict_profile, predict_variants, worst_case_of
from d2scale.engine.models import device_of, model_facts
from d2scale.errors import ConfigError
from d2scale.memory.worst_case import WorstCase
from d2scale.planning.coverage import DEFAULT_ENGINE
from d2scale.planning.hardware import Hardware
from d2scale.planning.memory_profile import GIB, MemoryProfile
from d2scale.planning.plan import Plan, make_plan, refuse_more_than_all
from d2scale.step.ranks import broadcast_object, largest_over_ranks, rank, world_size

logger = logging.getLogger(__name__)


def check_plan(cfg: Any, ranks: int, method: str | None) -> None:
    """Raise the faults that a plan for so many ranks would have; measure and predict no memory.

    ``method``: see :func:`d2scale.planning.plan.make_plan`. Raises ConfigError with all faults.
    """
    device_gib = _device_gib(0) if cfg.MODEL.DEVICE == "cuda" else None
    _plan(cfg, ranks, method, device_gib, make_profile=None)


def plan_on_ranks(cfg: Any, method: str | None, images: int) -> Plan:
    """Return rank 0's plan on every rank. All ranks must call it, with the same arguments.

    ``max_memory`` measures on CUDA (``D2SCALE.MEMORY.PROBE``): then all ranks take part.
    Otherwise rank 0 decides alone, and predicts where it needs to. ``images`` are those in the
    training dataset. Raises ConfigError, the same on every rank.
    """
    device_gib = None
    if cfg.MODEL.DEVICE == "cuda":
        # The smallest device decides. The largest of the negative is the smallest.
        own_gib = _device_gib(device_of(cfg))
        device_gib = -largest_over_ranks({"device_gib": -own_gib})["device_gib"]
    outcome: Plan | ConfigError | None = None
    if rank() == 0 or measures(cfg):
        try:
            outcome = _plan(cfg, world_size(), method, device_gib, partial(_make_profile, cfg))
            refuse_more_than_all(outcome, images)
        except ConfigError as error:
            outcome = error
    outcome = broadcast_object(outcome)
    if isinstance(outcome, ConfigError):
        raise outcome
    assert outcome is not None
    return outcome


def measures(cfg: Any) -> bool:
    """Return whether a missing memory profile is measured on the devices, not predicted."""
    return bool(cfg.MODEL.DEVICE == "cuda" and cfg.D2SCALE.MEMORY.PROBE)


def planned_cfg(cfg: Any, plan: Plan) -> Any:
    """Return the config that runs: ``cfg`` with the plan's values, not to be scaled again."""
    planned = plan.apply(cfg)
    planned.SOLVER.AUTO_SCALING_METHODS = ()
    planned.D2SCALE.IMS_PER_GPU = plan.ims_per_gpu
    planned.D2SCALE.ACCUMULATION_STEPS = 0
    return planned


def largest_ims_per_gpu(cfg: Any) -> int | None:
    """Return the images per GPU that ``max_memory`` would choose on this one device.

    None on a CPU without ``D2SCALE.MEMORY.BUDGET_GIB``. ConfigError if one image does not fit.
    """
    device_gib = _device_gib(device_of(cfg)) if cfg.MODEL.DEVICE == "cuda" else None
    hardware = _hardware(cfg, 1, "max_memory", device_gib, partial(_make_profile, cfg))
    return hardware.largest_fit()


def _plan(
    cfg: Any,
    ranks: int,
    method: str | None,
    device_gib: float | None,
    make_profile: Callable[[], MemoryProfile] | None,
) -> Plan:
    hardware = _hardware(cfg, ranks, method, device_gib, make_profile)
    return make_plan(cfg, hardware, method=method, model=model_facts(cfg))


def _hardware(
    cfg: Any,
    ranks: int,
    method: str | None,
    device_gib: float | None,
    make_profile: Callable[[], MemoryProfile] | None,
) -> Hardware:
    return Hardware.for_training(
        cfg,
        ranks,
        method=method,
        device_gib=device_gib,
        engine=DEFAULT_ENGINE,
        make_profile=make_profile,
        make_variants=lambda: predict_variants(cfg, _worst_case(cfg)),
        generation=_generation(cfg),
    )


def _make_profile(cfg: Any) -> MemoryProfile:
    if measures(cfg):
        return measure_on_ranks(cfg)
    logger.info("No memory profile of this recipe is at hand: predicting it")
    return predict_profile(cfg, _worst_case(cfg))


def _worst_case(cfg: Any) -> WorstCase:
    return worst_case_of(cfg, load_training_dataset(cfg))


def _generation(cfg: Any) -> int:
    on_cuda = cfg.MODEL.DEVICE == "cuda"
    return int(torch.cuda.get_device_properties(device_of(cfg)).major) if on_cuda else 0


def _device_gib(device: torch.device | int) -> float:
    return float(torch.cuda.get_device_properties(device).total_memory) / GIB
