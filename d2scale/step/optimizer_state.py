"""Loading an optimizer's state from a checkpoint of any device, engine or kind of update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Of torch's SGD and Adam-like optimizers, which use them as they come.
_AVERAGES = {"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load the state of each parameter; learning rate, decay and so on stay the optimizer's own.

    Raises:
        ValueError, KeyError: if the state is of other parameters; nothing is loaded then.
    """
    settings = [dict(group) for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [index for group in state["param_groups"] for index in group["params"]]
    if len(set(saved)) < len(saved):
        raise ValueError("a parameter is named twice")
    for index, parameter in zip(saved, parameters, strict=False):  # torch compares the numbers
        _check(index, parameter, state["state"].get(index, {}))
    optimizer.load_state_dict(dict(state))
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)
    adapt_state(optimizer)


def _check(index: int, parameter: nn.Parameter, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if name in _AVERAGES and value is None:
            continue
        if not isinstance(value, Tensor):
            fits = name not in _AVERAGES
        elif value.is_meta or value.layout != torch.strided:
            fits = False
        else:  # a count of steps is one number
            fits = value.shape == parameter.shape or (name not in _AVERAGES and not value.dim())
        if not fits:
            raise ValueError(f"{name} of parameter {index} is no tensor of its shape")


def adapt_state(optimizer: torch.optim.Optimizer) -> None:
    """Give a loaded state the memory layout and the devices that the optimizer works with.

    torch keeps the strides that a state was saved with, and its fused updates read memory as it
    lies: momentum of a GPU, where weights are contiguous, would be applied to the wrong weights of
    a CPU, where they have channels last. And it moves ``step`` by the saved settings, not by those
    of now.
    """
    for group in optimizer.param_groups:
        on_device = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            values = optimizer.state.get(parameter, {})
            for name, value in values.items():
                if not isinstance(value, Tensor):
                    continue
                if name == "step":
                    values[name] = value.to(parameter.device if on_device else "cpu")
                elif value.shape == parameter.shape:
                    values[name] = _laid_out_as(parameter, value)


def _laid_out_as(parameter: nn.Parameter, value: Tensor) -> Tensor:
    if value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
