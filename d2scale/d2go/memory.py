"""The memory of a d2go training: its own model, optimizer, EMA copy and mapper."""

from __future__ import annotations

from typing import Any

import torch
from d2go.runner import GeneralizedRCNNRunner
from d2go.trainer.helper import parse_precision_from_string
from torch import nn

from d2scale.d2go.step import build_step
from d2scale.detectron2.memory import TrainingMemory, autocast_for
from d2scale.detectron2.worst_batches import Mapper
from d2scale.step.norms import without_synchronised_norms
from d2scale.step.optimizer_step import OptimizerStep

ENGINE = "d2go"


class D2GoMemory(TrainingMemory):
    """How many images fit in a training of the Runner.

    Args:
        cfg: of the Runner, not scaled.
        runner: builds model, optimizer and mapper; None: d2go's own.
        model: see :class:`TrainingMemory`.
    """

    engine = ENGINE

    def __init__(self, cfg: Any, runner: Any = None, model: nn.Module | None = None) -> None:
        super().__init__(cfg, model)
        self._runner = runner or GeneralizedRCNNRunner()
        # Where losses are watched, d2go's own step trains.
        self.keeps_buckets = cfg.ABNORMAL_CHECKER.ENABLED

    def make_mapper(self, cfg: Any) -> Mapper:
        mapper: Mapper = self._runner.get_mapper(cfg, True)
        return mapper

    def build_step(self, cfg: Any, device: torch.device) -> OptimizerStep:
        own = cfg.clone()
        own.defrost()
        own.MODEL.DEVICE = str(device)
        model = self._runner.build_model(own).train()
        # A rank that runs out of memory would leave the others waiting in a synchronised norm.
        without_synchronised_norms(model, "memory is being measured")
        if cfg.MODEL_EMA.ENABLED and cfg.MODEL_EMA.DEVICE in ("", cfg.MODEL.DEVICE):
            model.ema_state.save_from(model)
        amp = cfg.SOLVER.AMP
        asked = parse_precision_from_string(amp.PRECISION) if amp.ENABLED else None
        precision, scaler = autocast_for(device, asked)
        optimizer = self._runner.build_optimizer(own, model)
        return build_step(own, model, optimizer, precision=precision, scaler=scaler)
