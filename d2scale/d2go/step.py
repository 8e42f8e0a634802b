"""The optimizer step of a d2go training, built in one place for training and for measuring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from d2scale.step.optimizer_step import OnSplit, OptimizerStep, StepOptions


class D2GoStep(OptimizerStep):
    """An optimizer step that counts d2go's EMA copy of the weights as held between steps."""

    def held_tensors(self) -> list[Tensor]:
        held = super().held_tensors()
        ema_state = getattr(self.model, "ema_state", None)
        copies = [] if ema_state is None else ema_state.state.values()
        return [*held, *(copy for copy in copies if copy.device == held[0].device)]


def build_step(
    cfg: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    ims_per_gpu: int = 1,
    precision: torch.dtype | None = None,
    scaler: GradScaler | None = None,
    on_split: OnSplit | None = None,
) -> D2GoStep:
    """Return the optimizer step of ``cfg``.

    Args:
        cfg: of the Runner.
        model: bare.
        optimizer: d2go's, which clips gradients by itself.
        ims_per_gpu: most images in one forward.
        precision: dtype of autocast; None: off.
        scaler: of the losses, for float16.
        on_split: see :class:`OptimizerStep`.
    """
    options = StepOptions(
        precision=precision,
        scaler=scaler,
        on_oom=cfg.D2SCALE.ON_OOM,
        compress=torch.float16 if cfg.MODEL.DDP_FP16_GRAD_COMPRESS else None,
    )
    return D2GoStep(model, optimizer, ims_per_gpu=ims_per_gpu, options=options, on_split=on_split)
