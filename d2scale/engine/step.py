"""The optimizer step of a config: what trains, what is timed and what is measured."""

from __future__ import annotations

import torch
from fvcore.common.config import CfgNode
from torch import nn
from torch.amp.grad_scaler import GradScaler

from d2scale.engine.models import precision_of
from d2scale.engine.solver import build_gradient_clipper, build_optimizer
from d2scale.step.optimizer_step import OptimizerStep, StepOptions
from d2scale.step.virtual_ranks import VirtualRanks


def build_step(
    cfg: CfgNode,
    model: nn.Module,
    *,
    ims_per_gpu: int,
    virtual_ranks: VirtualRanks | None = None,
) -> OptimizerStep:
    """Return the optimizer step that the default engine takes with ``cfg``.

    Every rank must call it at the same time, with ``model`` on its device. A forward takes at
    most ``ims_per_gpu`` images; ``virtual_ranks`` run in turn, if there are any.
    """
    precision = precision_of(cfg)
    on_cuda = next(model.parameters()).is_cuda
    options = StepOptions(
        precision=precision,
        scaler=GradScaler("cuda") if on_cuda and precision is torch.float16 else None,
        clip=build_gradient_clipper(cfg),
        on_oom=cfg.D2SCALE.ON_OOM,
        virtual_ranks=virtual_ranks,
    )
    optimizer = build_optimizer(cfg, model)
    return OptimizerStep(model, optimizer, ims_per_gpu=ims_per_gpu, options=options)
