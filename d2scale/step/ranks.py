"""The ranks of a run, as the training code sees them."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """Return this process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def data_parallel(model: nn.Module, *, find_unused_parameters: bool = False) -> nn.Module:
    """Wrap ``model`` so that backward averages its gradients; on one rank return it as it is.

    Buffers are not broadcast: frozen statistics are the same everywhere.
    """
    if world_size() == 1:
        return model
    # torch 2.15 renamed the option.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    # A 1x1 convolution's gradient has strides that differ in name only.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    options: dict[str, Any] = {name: False, "find_unused_parameters": find_unused_parameters}
    return DistributedDataParallel(model, **options)


def largest_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Return the maximum of each value over all ranks. Every rank must give the same names."""
    if world_size() == 1:
        return values
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return dict(zip(values, tensor.tolist(), strict=True))


def same_on_all_ranks(value: int) -> bool:
    """Return whether every rank gives the same ``value``."""
    if world_size() == 1:
        return True
    values: list[int | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return len(set(values)) == 1
