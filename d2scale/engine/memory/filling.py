"""What a training that is about to begin knows of its memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from d2scale.coco.dataset import load_training_dataset
from d2scale.engine.memory.predictions import predict_profile, predict_variants
from d2scale.memory.worst_case import WorstCase, worst_case_of
from d2scale.planning.coverage import DEFAULT_ENGINE
from d2scale.planning.hardware import Hardware
from d2scale.planning.memory_profile import GIB, MemoryProfile

logger = logging.getLogger(__name__)


def hardware_for_training(
    cfg: Any,
    world_size: int,
    *,
    method: str | None,
    measure: Callable[[], MemoryProfile] | None,
) -> Hardware:
    """Return the hardware to plan for, with a memory profile where the plan needs one.

    ``max_memory`` without ``IMS_PER_GPU`` and ``MEMORY.PROFILE`` needs one: on a GPU it is
    measured (``MEMORY.PROBE`` False: not), otherwise the shipped one is taken, or else the
    recipe is predicted on its own dataset.

    Args:
        cfg: of the default engine, for this machine.
        world_size: ranks.
        method: see :func:`d2scale.planning.plan.make_plan`.
        measure: measures ``cfg`` on the ranks; None: it shall not be run, because the config
            has faults that end the run anyhow.

    Raises:
        ConfigError: see :meth:`Hardware.from_cfg`, and what measuring raises.
    """
    on_cuda = cfg.MODEL.DEVICE == "cuda"
    device_gib = torch.cuda.get_device_properties(0).total_memory / GIB if on_cuda else None

    def worst_case() -> WorstCase:
        dataset = load_training_dataset(cfg)
        return worst_case_of(cfg, dataset.records, dataset.name)

    def make() -> MemoryProfile:
        assert measure is not None
        if on_cuda and cfg.D2SCALE.MEMORY.PROBE:
            return measure()
        logger.info("No memory profile of this recipe is at hand: predicting it")
        return predict_profile(cfg, worst_case())

    return Hardware.for_training(
        cfg,
        world_size,
        method=method,
        device_gib=device_gib,
        engine=DEFAULT_ENGINE,
        make_profile=None if measure is None else make,
        make_variants=lambda: predict_variants(cfg, worst_case()),
    )
