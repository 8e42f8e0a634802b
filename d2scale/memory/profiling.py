"""From a config of the default engine to its memory profiles."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from d2scale.engine.data.transforms import input_faults
from d2scale.engine.honoured import value_faults
from d2scale.errors import ConfigError, Fault
from d2scale.memory.measure import measure_profile
from d2scale.memory.predict import predict
from d2scale.memory.profile import MemoryProfile
from d2scale.memory.workload import workload_of
from d2scale.memory.worst_case import WorstCase, assumed_worst_case


def make_profiles(cfg: Any, device: str, *, explore: bool = False) -> tuple[MemoryProfile, ...]:
    """Return what ``d2scale memory`` shows.

    Args:
        cfg: as ``d2scale.config.load_cfg`` reads it.
        device: ``cpu`` predicts; ``cuda`` measures.
        explore: predict the variants of the recipe too; see :func:`predict_variants`.

    Raises:
        ConfigError: with all faults of the config or the request.
    """
    if device == "cpu":
        return predict_variants(cfg) if explore else (predict_profile(cfg),)
    faults = _faults(cfg)
    if explore:
        faults.append(Fault("--explore", True, "with --device cpu", "measure one choice at a time"))
    if not torch.cuda.is_available():
        advice = "use --device cpu, which predicts without a GPU"
        faults.append(Fault("--device", device, "cpu, for CUDA is not available here", advice))
    if faults:
        raise ConfigError(faults)
    on_cuda = cfg.clone()
    on_cuda.defrost()
    on_cuda.MODEL.DEVICE = "cuda"
    return (measure_profile(on_cuda),)


def predict_profile(cfg: Any, worst_case: WorstCase | None = None) -> MemoryProfile:
    """Predict the memory of training ``cfg`` on a CUDA device, without one.

    Args:
        cfg: as ``d2scale.config.load_cfg`` reads it.
        worst_case: the largest batches; None: what bounds every dataset.

    Raises:
        ConfigError: with all faults of the config.
    """
    if faults := _faults(cfg):
        raise ConfigError(faults)
    workload = workload_of(cfg, worst_case or assumed_worst_case(cfg))
    return predict(workload).profile(workload)


def predict_variants(cfg: Any, worst_case: WorstCase | None = None) -> tuple[MemoryProfile, ...]:
    """Predict the recipe in float32 and with AMP, without and with activation checkpointing."""
    return tuple(
        predict_profile(_variant(cfg, amp, checkpointing), worst_case)
        for amp, checkpointing in product((False, True), repeat=2)
    )


def _faults(cfg: Any) -> list[Fault]:
    return [*value_faults(cfg), *input_faults(cfg)]


def _variant(cfg: Any, amp: bool, checkpointing: bool) -> Any:
    changed = cfg.clone()
    changed.defrost()
    changed.SOLVER.AMP.ENABLED = amp
    changed.D2SCALE.ACTIVATION_CHECKPOINTING = checkpointing
    return changed
