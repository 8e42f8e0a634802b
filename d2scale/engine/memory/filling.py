"""What a training that is about to begin knows of its memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from d2scale.coco.dataset import load_training_dataset
from d2scale.engine.memory.predictions import predict_profile, predict_variants
from d2scale.errors import DataError, Fault
from d2scale.memory.worst_case import worst_case_of
from d2scale.planning.hardware import Hardware
from d2scale.planning.memory_profile import GIB, MemoryProfile
from d2scale.planning.plan import Plan, method_of

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
    hardware = Hardware.from_cfg(cfg, world_size, device_gib=device_gib)
    fills = (method or method_of(cfg.SOLVER.AUTO_SCALING_METHODS)) == "max_memory"
    if not fills or hardware.ims_per_gpu or cfg.D2SCALE.MEMORY.PROFILE:
        return hardware
    if measure is None:
        return replace(hardware, ims_per_gpu=1)
    if on_cuda and cfg.D2SCALE.MEMORY.PROBE:
        return replace(hardware, profile=measure(), alternatives=())
    if hardware.profile is None and hardware.budget_gib is not None:
        dataset = load_training_dataset(cfg)
        worst = worst_case_of(cfg, dataset.records, dataset.name)
        logger.info("No memory profile of this recipe is at hand: predicting it")
        predicted = replace(hardware, profile=predict_profile(cfg, worst))
        if predicted.holds_one_image():
            return predicted
        return replace(predicted, alternatives=predict_variants(cfg, worst))
    return hardware


def refuse_more_than_all(plan: Plan, images: int) -> None:
    """Refuse a total batch that was chosen to fill the memory and exceeds the dataset.

    Raises:
        DataError: if there are fewer images.
    """
    if plan.method == "max_memory" and 0 < images < plan.ims_per_batch:
        advice = f"set D2SCALE.MAX_IMS_PER_BATCH to at most {images}, or train on more images"
        allowed = f"at least the {plan.ims_per_batch} images of the chosen total batch"
        raise DataError([Fault("images in DATASETS.TRAIN", images, allowed, advice)])
