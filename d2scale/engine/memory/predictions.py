"""Predicted memory profiles of a config of the default engine, and of its variants."""

from __future__ import annotations

from itertools import product
from typing import Any

from d2scale.engine.data.transforms import input_faults
from d2scale.engine.honoured import value_faults
from d2scale.engine.memory.workload import workload_of
from d2scale.errors import ConfigError, Fault
from d2scale.memory.predict import predict
from d2scale.memory.worst_case import WorstCase, assumed_worst_case
from d2scale.planning.memory_profile import MemoryProfile


def predict_profile(
    cfg: Any, worst_case: WorstCase | None = None, *, caching: bool = True
) -> MemoryProfile:
    """Predict the memory of training ``cfg`` on a CUDA device, without one.

    Args:
        cfg: as ``d2scale.config.load_cfg`` reads it.
        worst_case: the largest batches; None: what bounds every dataset.
        caching: see :meth:`d2scale.memory.predict.Prediction.profile`.

    Raises:
        ConfigError: with all faults of the config.
    """
    if faults := config_faults(cfg):
        raise ConfigError(faults)
    workload = workload_of(cfg, worst_case or assumed_worst_case(cfg))
    return predict(workload).profile(workload, caching=caching)


def predict_variants(
    cfg: Any, worst_case: WorstCase | None = None, *, caching: bool = True
) -> tuple[MemoryProfile, ...]:
    """Predict the recipe in float32 and with AMP, without and with activation checkpointing."""
    return tuple(
        predict_profile(_variant(cfg, amp, checkpointing), worst_case, caching=caching)
        for amp, checkpointing in product((False, True), repeat=2)
    )


def config_faults(cfg: Any) -> list[Fault]:
    """Return what is wrong with the config for telling its memory."""
    return [*value_faults(cfg), *input_faults(cfg)]


def _variant(cfg: Any, amp: bool, checkpointing: bool) -> Any:
    changed = cfg.clone()
    changed.defrost()
    changed.SOLVER.AMP.ENABLED = amp
    changed.D2SCALE.ACTIVATION_CHECKPOINTING = checkpointing
    return changed
