"""The optimizer step of a detectron2 training, built in one place for training and measuring."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from d2scale.detectron2.dense_detectors import split_model
from d2scale.step.optimizer_step import OnNewSize, OptimizerStep, StepOptions
from d2scale.step.virtual_ranks import VirtualRanks


def build_step(
    cfg: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    ims_per_gpu: int = 1,
    precision: torch.dtype | None = None,
    scaler: GradScaler | None = None,
    compress: torch.dtype | None = None,
    virtual_ranks: VirtualRanks | None = None,
    on_new_size: OnNewSize | None = None,
    kind: type[OptimizerStep] = OptimizerStep,
) -> OptimizerStep:
    """Return the optimizer step of ``cfg``.

    Args:
        cfg: of the training, with d2scale's keys.
        model: bare.
        optimizer: detectron2's, which clips gradients by itself.
        ims_per_gpu: most images in one forward.
        precision: dtype of autocast; None: off.
        scaler: of the losses, for float16.
        compress: dtype in which gradients cross the network; None: their own.
        virtual_ranks: of ``model``; None: there are none.
        on_new_size: see :class:`OptimizerStep`.
        kind: what an engine makes of OptimizerStep.
    """
    options = StepOptions(
        precision=precision,
        scaler=scaler,
        on_oom=cfg.D2SCALE.ON_OOM,
        compress=compress,
        virtual_ranks=virtual_ranks,
        split_model=split_model(model),
    )
    return kind(model, optimizer, ims_per_gpu=ims_per_gpu, options=options, on_new_size=on_new_size)
