"""What ``d2scale memory`` was asked for: a prediction, or a measurement on the device."""

from __future__ import annotations

from typing import Any

import torch

from d2scale.engine.memory.measure import measure_profile
from d2scale.engine.memory.predictions import config_faults, predict_profile, predict_variants
from d2scale.errors import ConfigError, Fault
from d2scale.planning.memory_profile import MemoryProfile


def make_profiles(cfg: Any, device: str, *, explore: bool = False) -> tuple[MemoryProfile, ...]:
    """Return what ``d2scale memory`` shows.

    Args:
        cfg: as ``d2scale.config.load_cfg`` reads it.
        device: ``cpu`` predicts; ``cuda`` measures.
        explore: predict the variants of the recipe too; see :func:`predict_variants`.

    Raises:
        ConfigError: with all faults of the config or the request.
    """
    faults = [*config_faults(cfg), *_memory_faults(cfg)]
    if device == "cuda":
        faults += _device_faults(explore)
    if faults:
        raise ConfigError(faults)
    if device == "cpu":
        return predict_variants(cfg) if explore else (predict_profile(cfg),)
    on_cuda = cfg.clone()
    on_cuda.defrost()
    on_cuda.MODEL.DEVICE = "cuda"
    return (measure_profile(on_cuda),)


def _memory_faults(cfg: Any) -> list[Fault]:
    memory, faults = cfg.D2SCALE.MEMORY, []
    if memory.BUDGET_GIB < 0:
        allowed = "0 (what the device has) or more"
        faults.append(Fault("D2SCALE.MEMORY.BUDGET_GIB", memory.BUDGET_GIB, allowed, "correct it"))
    if not 0 < memory.FRACTION <= 1:
        allowed = "above 0, at most 1"
        faults.append(Fault("D2SCALE.MEMORY.FRACTION", memory.FRACTION, allowed, "correct it"))
    return faults


def _device_faults(explore: bool) -> list[Fault]:
    faults = []
    if explore:
        faults.append(Fault("--explore", True, "with --device cpu", "measure one choice at a time"))
    if not torch.cuda.is_available():
        advice = "use --device cpu, which predicts without a GPU"
        faults.append(Fault("--device", "cuda", "cpu, for CUDA is not available here", advice))
    return faults
