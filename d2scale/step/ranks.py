"""The ranks of a run: how many there are, and every exchange of values between them.

Counts, flags and Python objects travel through a group of their own on the host: they wait for no
device, take none of its memory, and keep apart from all-reduces of gradients that are running.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2scale.errors import ConfigError, Fault
from d2scale.step.waiting import exchange

T = TypeVar("T")

_is_alone = False


def rank() -> int:
    """Return the number of this process, 0 without a process group."""
    return dist.get_rank() if _is_in_group() else 0


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if _is_in_group() else 1


@contextmanager
def alone() -> Iterator[None]:
    """Within the context, be the only rank: for steps on fake tensors, which cannot be sent."""
    global _is_alone
    before, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = before


def _is_in_group() -> bool:
    return not _is_alone and dist.is_available() and dist.is_initialized()


def host_group() -> dist.ProcessGroup:
    """Return the gloo group of all ranks. The first call is collective."""
    return _host_group(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _host_group(world: dist.ProcessGroup | None) -> dist.ProcessGroup:
    # Never destroyed by itself: with torch 2.5 that can hang right after a gather.
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo"))


def sum_over_ranks(values: Tensor) -> Tensor:
    """All-reduce ``values`` in place, on their device, and return them."""
    if world_size() > 1:
        with exchange():
            dist.all_reduce(values)
    return values


def sum_on_host(values: Tensor) -> Tensor:
    """All-reduce a CPU tensor in place, through the host's group, and return it."""
    if world_size() > 1:
        with exchange():
            dist.all_reduce(values, group=host_group())
    return values


def largest_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Return the maximum of each value over all ranks, which give the same names."""
    if world_size() == 1:
        return dict(values)
    tensor = torch.tensor(list(values.values()), dtype=torch.float64)
    with exchange():
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=host_group())
    return dict(zip(values, tensor.tolist(), strict=True))


def gather_objects(value: T) -> list[T]:
    """Return the values of all ranks, by rank, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with exchange():
        dist.all_gather_object(values, value, group=host_group())
    return values


def gather_on_first_rank(value: T) -> list[T] | None:
    """Return the values of all ranks, by rank, on rank 0 and None elsewhere."""
    if world_size() == 1:
        return [value]
    values: list[Any] | None = [None] * world_size() if rank() == 0 else None
    with exchange():
        dist.gather_object(value, values, dst=0, group=host_group())
    return values


def broadcast_object(value: T) -> T:
    """Return rank 0's ``value`` on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    with exchange():
        dist.broadcast_object_list(values, src=0, group=host_group())
    return values[0]


def broadcast_model(model: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0, as DistributedDataParallel does."""
    if world_size() > 1:
        with exchange():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), 0)


def same_on_all_ranks(value: object) -> bool:
    """Return whether every rank has the same ``value``."""
    return all(other == value for other in gather_objects(value))


def refuse_differences(settings: Mapping[str, Any], advice: str) -> None:
    """Raise on every rank if some rank was given other settings, by name, than rank 0.

    Raises:
        ConfigError: a line for each setting that differs, with the first rank where it does.
    """
    first, *others = gather_objects(dict(settings))
    faults: dict[str, Fault] = {}
    for number, other in enumerate(others, start=1):
        for key in {**first, **other}:
            if key not in faults and first.get(key) != other.get(key):
                allowed = f"{first.get(key)!r}, as on rank 0"
                faults[key] = Fault(f"{key} on rank {number}", other.get(key), allowed, advice)
    if faults:
        raise ConfigError(list(faults.values()))
