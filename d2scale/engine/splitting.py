"""The guard against out-of-memory errors in a run of the default engine."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import nn
from torch.amp.grad_scaler import GradScaler

from d2scale.engine.checkpoint.checkpointer import RunCheckpointer
from d2scale.planning.plan import Plan
from d2scale.run_folder.contents import write_plan
from d2scale.step.guard import OnSplit, OomGuard
from d2scale.step.micro_batches import synchronised_norms
from d2scale.step.ranks import rank, world_size

logger = logging.getLogger(__name__)


def build_guard(
    cfg: CfgNode,
    plan: Plan,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    precision: torch.dtype | None,
    scaler: GradScaler | None,
    on_split: OnSplit,
) -> OomGuard | None:
    """Return the guard that ``D2SCALE.ON_OOM`` asks for; None: an error ends the run."""
    if cfg.D2SCALE.ON_OOM == "raise":
        return None
    if world_size() > 1 and synchronised_norms(model):
        logger.warning(
            "D2SCALE.ON_OOM is split, but synchronised batch norm makes ranks wait for each other "
            "inside a forward: an out-of-memory error ends this run"
        )
        return None
    return OomGuard(
        model,
        optimizer,
        ims_per_batch=plan.ims_per_batch,
        ims_per_gpu=plan.ims_per_gpu,
        precision=precision,
        scaler=scaler,
        on_split=on_split,
    )


class RecordSplit:
    """Writes a plan with fewer images per GPU into the run's folder and its checkpoints."""

    def __init__(self, plan: Plan, checkpointer: RunCheckpointer) -> None:
        self._plan = plan
        self._checkpointer = checkpointer

    def __call__(self, ims_per_gpu: int) -> None:
        self._plan = self._plan.with_smaller_micro_batches(ims_per_gpu)
        self._checkpointer.facts["plan"] = self._plan.to_json()
        if rank() == 0:
            write_plan(Path(self._checkpointer.save_dir), self._plan)
