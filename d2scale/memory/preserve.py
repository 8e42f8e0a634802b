"""Trying steps without a trace: everything that training changes is put back."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from d2scale.memory.steps import TrainingStep


@contextmanager
def training_state_kept(step: TrainingStep) -> Iterator[None]:
    """Put weights, statistics, gradients, optimizer, scaler and random numbers back at the end.

    The copies lie in the machine's memory, so that the device has as much room as training will.
    """
    model, optimizer = step.model, step.optimizer
    tensors = [*model.parameters(), *model.buffers()]
    values = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    gradients = [(p, p.grad) for p in model.parameters()]
    free_gradients(model)
    modes = [(module, module.training) for module in model.modules()]
    optimizer_state = _on_cpu(optimizer.state_dict())
    scaler_state = None if step.scaler is None else copy.deepcopy(step.scaler.state_dict())
    try:
        with random_numbers_kept():
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
        # Not with load_state_dict alone: it would keep what the steps have added.
        optimizer.state.clear()
        optimizer.load_state_dict(optimizer_state)
        if step.scaler is not None and scaler_state is not None:
            step.scaler.load_state_dict(scaler_state)


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Put the random states of torch, numpy and Python back at the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def learning_rates_zero(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let steps move nothing, so that they cannot diverge."""
    before = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    try:
        yield
    finally:
        for group, learning_rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = learning_rate


def free_gradients(model: nn.Module) -> None:
    """Drop the gradients that a step which failed has left."""
    for parameter in model.parameters():
        parameter.grad = None


def _on_cpu(state: object) -> dict[str, Any]:
    def moved(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.detach().to("cpu", copy=True)
        if isinstance(value, dict):
            return {key: moved(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(moved(each) for each in value)
        return value

    found = moved(state)
    assert isinstance(found, dict)
    return found
