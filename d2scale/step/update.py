"""The update of the weights at the end of a step: unscale, clip, optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

GradientClipper = Callable[[Iterable[nn.Parameter]], None]


def update_weights(
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler | None = None,
    clip: GradientClipper | None = None,
) -> None:
    """Take the optimizer's step with the gradients that are there, which ``clip`` limits in place.

    If a ``scaler`` has scaled the losses, a step whose gradients overflow is left out, and the
    scale is lowered.
    """
    if clip is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        clip(p for p in trained_parameters(optimizer) if p.grad is not None)
    _begin_momentum(optimizer)
    if scaler is None:
        optimizer.step()
        return
    scaler.step(optimizer)
    scaler.update()


class MomentumByGain:
    """Lets momentum remember as many of the recipe's steps as it does in the recipe.

    It decays once a step, by m; a step worth r of the recipe's decays it by m ** r. Its gradient
    then counts for as much as r gradients would have, (1 - m ** r) / (1 - m), so that the buffer
    keeps its size whatever r is: torch multiplies a gradient by 1 - dampening. Nesterov's momentum
    is left alone: torch adds its newest gradient once more, without dampening.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # Not its groups: loading a state makes new ones.
        self._optimizer = optimizer
        self._momenta = [group.get("momentum", 0.0) for group in optimizer.param_groups]

    def set(self, gain: float) -> None:
        """Set momentum and dampening for a step that is worth ``gain`` of the recipe's."""
        for group, momentum in zip(self._optimizer.param_groups, self._momenta, strict=True):
            if momentum and not group.get("nesterov"):
                decay = momentum**gain
                group["momentum"], group["dampening"] = decay, 1 - (1 - decay) / (1 - momentum)


def trained_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters that the optimizer updates, in its order."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Let momentum begin at zero where it has not begun.

    torch's fused SGD makes it uninitialised and leaves it so when the first step overflows, which
    is normal at a scale of 65536; the next step then adds garbage. From zero the first step is the
    same. Dampening, by which the gain rule weighs gradients, torch leaves out of the first step.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if not (group["momentum"] and (group.get("fused") or group["dampening"])):
            continue
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if parameter.grad is not None and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
