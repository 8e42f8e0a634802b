"""Trying steps without a trace: everything that training changes is restored."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from d2scale.step.optimizer_step import OptimizerStep
from d2scale.step.private_torch import tree_map_only


@contextmanager
def training_state_kept(step: OptimizerStep) -> Iterator[None]:
    """Restore weights, statistics, gradients, optimizer, scaler and random numbers at the end.

    The copies lie in the machine's memory, so that the device has as much room as training will.
    """
    model, optimizer, scaler = step.model, step.optimizer, step.options.scaler
    tensors = [*model.parameters(), *model.buffers()]
    values = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    gradients = [(p, p.grad) for p in model.parameters()]
    model.zero_grad()
    modes = [(module, module.training) for module in model.modules()]
    optimizer_state = tree_map_only(
        torch.Tensor, lambda value: value.detach().to("cpu", copy=True), optimizer.state_dict()
    )
    ims_per_gpu = step.ims_per_gpu
    scaler_state = None if scaler is None else copy.deepcopy(scaler.state_dict())
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
        step.ims_per_gpu = ims_per_gpu
        # load_state_dict alone would keep what the steps have added.
        optimizer.state.clear()
        optimizer.load_state_dict(optimizer_state)
        if scaler is not None and scaler_state is not None:
            scaler.load_state_dict(scaler_state)


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Restore the random states of torch, numpy and Python at the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
