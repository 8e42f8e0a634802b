"""The default engine's training of a config, as a workload to predict or measure."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from d2scale.engine.models import new_model, precision_of
from d2scale.engine.solver import build_gradient_clipper, build_optimizer
from d2scale.memory.predict import Workload
from d2scale.memory.steps import TrainingStep
from d2scale.memory.worst_case import WorstCase
from d2scale.planning.coverage import coverage


def workload_of(cfg: Any, worst_case: WorstCase) -> Workload:
    """Return what the default engine does with ``cfg``, on batches of the worst case.

    The weights are random: their values take no memory.
    """
    precision = precision_of(cfg)

    def build_step(device: torch.device) -> TrainingStep:
        model = new_model(cfg).train()
        if device.type != "cpu":  # fake parameters cannot be moved
            model.to(device)
        needs_scaler = device.type == "cuda" and precision is torch.float16
        return TrainingStep(
            model,
            build_optimizer(cfg, model),
            precision=precision,
            clip=build_gradient_clipper(cfg),
            scaler=GradScaler(device.type) if needs_scaler else None,
        )

    return Workload(
        build_step,
        worst_case.samples,
        worst_case.trial_batches,
        _description(cfg, worst_case, precision),
        coverage(cfg),
    )


def _description(cfg: Any, worst_case: WorstCase, precision: torch.dtype | None) -> str:
    height, width = worst_case.size
    numbers = "float32" if precision is None else f"AMP {str(precision).removeprefix('torch.')}"
    checkpointing = ", activation checkpointing" if cfg.D2SCALE.ACTIVATION_CHECKPOINTING else ""
    return (
        f"{cfg.MODEL.META_ARCHITECTURE}, images of {height}x{width} pixels with "
        f"{worst_case.boxes} boxes ({worst_case.origin}), {numbers}{checkpointing}, "
        f"{cfg.SOLVER.OPTIMIZER}"
    )
