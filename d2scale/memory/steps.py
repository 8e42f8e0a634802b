"""One training step as it is traced and measured: the parts of a real one that take memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from d2scale.step.micro_batches import ExactModel

PHASES = ("forward", "backward", "optimizer")

Losses = Callable[[nn.Module, Any], Mapping[str, Tensor]]
PhaseMarker = Callable[[str], AbstractContextManager[None]]


def detector_losses(model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
    """Call a model as :class:`d2scale.step.micro_batches.MicroBatchStep` does; reads no values."""
    if isinstance(model, ExactModel):
        with torch.no_grad():
            totals = model.loss_normalizers(batch)
        return model(batch, normalizers=model.finish_normalizers(totals, 1))
    return model(batch)


def _no_marker(phase: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass
class TrainingStep:
    """Forward, backward and update on one rank, with one micro-batch.

    Attributes:
        model: in training mode.
        optimizer: over its parameters.
        losses: gives scalars by name for a model and a batch.
        precision: dtype of autocast; None: off.
        clip: applied to the gradients.
        scaler: for float16; None where values are not to be read.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: Losses = detector_losses
    precision: torch.dtype | None = None
    clip: Callable[[Iterable[nn.Parameter]], None] | None = None
    scaler: GradScaler | None = None

    def __call__(self, batch: Any, phase: PhaseMarker = _no_marker) -> None:
        """Take a step; the gradients are freed after it."""
        with phase("forward"):
            objective = self._objective(batch)
        with phase("backward"):
            objective.backward()
        del objective
        with phase("optimizer"):
            self._update()
            self.optimizer.zero_grad()

    def make_optimizer_state(self) -> None:
        """Let the optimizer make what it keeps between steps, with gradients of zero."""
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that train."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def held(self) -> list[Tensor]:
        """Return what lives between steps: weights, statistics, the optimizer's state."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        kept = [value for value in states if isinstance(value, Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *kept]

    def _objective(self, batch: Any) -> Tensor:
        device = next(self.model.parameters()).device.type
        enabled = self.precision is not None
        with torch.autocast(device, dtype=self.precision, enabled=enabled):
            losses = self.losses(self.model, batch)
            objective = torch.stack(list(losses.values())).sum()
        return objective if self.scaler is None else self.scaler.scale(objective)

    def _update(self) -> None:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.clip is not None:
            self.clip(p for p in self.parameters() if p.grad is not None)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
