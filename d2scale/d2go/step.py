"""The optimizer step of a d2go training, built in one place for training and for measuring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from d2scale.detectron2 import step
from d2scale.step.optimizer_step import OptimizerStep


class D2GoStep(OptimizerStep):
    """An optimizer step that counts d2go's EMA copy of the weights as held between steps."""

    def held_tensors(self) -> list[Tensor]:
        held = super().held_tensors()
        ema_state = getattr(self.model, "ema_state", None)
        copies = [] if ema_state is None else ema_state.state.values()
        return [*held, *(copy for copy in copies if copy.device == held[0].device)]


def build_step(
    cfg: Any, model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any
) -> OptimizerStep:
    """Return the optimizer step of the Runner's ``cfg``.

    ``options``: see :func:`d2scale.detectron2.step.build_step`.
    """
    compress = torch.float16 if cfg.MODEL.DDP_FP16_GRAD_COMPRESS else None
    return step.build_step(cfg, model, optimizer, compress=compress, kind=D2GoStep, **options)
