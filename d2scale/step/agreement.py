"""Parts of a step that every rank finishes, or none: nobody waits for a rank that failed.

A rank that runs out of memory between two collective calls would leave the others in the second
one for ever. So every part of a step that needs memory runs here: the ranks tell each other how
it went before any of them goes on. ``DistributedDataParallel`` mixes backward with collective
calls, so gradients are averaged here as well, after the ranks have agreed that all have theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2scale.step.out_of_memory import is_out_of_memory

T = TypeVar("T")

# As DistributedDataParallel: large enough for the network, small beside a model.
_BUCKET_BYTES = 25 * 2**20


class AgreedOutOfMemoryError(Exception):
    """Some rank ran out of memory, and every rank knows.

    Attributes:
        part: what the ranks were doing.
        ranks: those that failed.
        reason: the first line of this rank's error; empty if it did not fail.
    """

    def __init__(self, part: str, ranks: Sequence[int], reason: str) -> None:
        super().__init__(f"{part}: out of memory on rank {', '.join(map(str, ranks))}")
        self.part = part
        self.ranks = tuple(ranks)
        self.reason = reason


class Agreement:
    """Keeps the ranks of a run together. All ranks build one, and make the same calls.

    What it needs on the device is allocated here, once: up to 25 MiB, or the largest gradient.

    Args:
        parameters: those that train, in the same order on every rank.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = tuple(parameters)
        self._world_size, self._rank = 1, 0
        self._group: Any = None  # None: all ranks
        self._buckets: list[list[nn.Parameter]] = []
        self._memory: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        self._world_size, self._rank = dist.get_world_size(), dist.get_rank()
        # The flags stay on the CPU, so that agreeing waits for no device and takes none of its
        # memory.
        if dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")
        self._buckets = _buckets(self._parameters)
        for bucket in self._buckets:
            key = (bucket[0].device, bucket[0].dtype)
            size = sum(parameter.numel() for parameter in bucket)
            if key not in self._memory or self._memory[key].numel() < size:
                self._memory[key] = torch.zeros(size, device=key[0], dtype=key[1])
        # The first call makes the backend allocate what it needs, while there is memory.
        for memory in self._memory.values():
            dist.all_reduce(memory)

    def run(self, part: str, work: Callable[[], T]) -> T:
        """Return what ``work`` does on this rank. It must not make collective calls.

        Raises:
            AgreedOutOfMemoryError: on every rank, if any of them ran out of memory.
            Exception: any other error of ``work``, on this rank alone, as it is.
        """
        done: list[T] = []
        reason = ""
        try:
            done.append(work())
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            lines = str(error).splitlines()
            reason = lines[0] if lines else type(error).__name__
        # Here the error is gone, and with its frames all that they held.
        ranks = self._ranks_where(not done)
        if ranks:
            done.clear()
            raise AgreedOutOfMemoryError(part, ranks, reason)
        return done[0]

    def average_gradients(self) -> None:
        """Replace every gradient by its mean over the ranks.

        A parameter without a gradient counts as zero where another rank has one, and stays
        without if no rank has one.

        Raises:
            AgreedOutOfMemoryError: if there is no room for such a zero.
        """
        if self._world_size == 1:
            return
        counts = torch.tensor([p.grad is not None for p in self._parameters], dtype=torch.int32)
        dist.all_reduce(counts, group=self._group)
        found = counts.tolist()
        used = {p for p, count in zip(self._parameters, found, strict=True) if count}
        if any(0 < count < self._world_size for count in found):
            self.run("averaging gradients", lambda: _fill_gradients(used))
        for bucket in self._buckets:
            gradients = [p.grad for p in bucket if p in used and p.grad is not None]
            if gradients:
                self._average(gradients)

    def _average(self, gradients: Sequence[Tensor]) -> None:
        flat = self._memory[gradients[0].device, gradients[0].dtype]
        flat = flat[: sum(gradient.numel() for gradient in gradients)]
        parts = [
            part.view(gradient.shape)
            for part, gradient in zip(
                flat.split([gradient.numel() for gradient in gradients]), gradients, strict=True
            )
        ]
        for part, gradient in zip(parts, gradients, strict=True):
            part.copy_(gradient)
        # Before the sum, as DistributedDataParallel does it: half floats would overflow.
        flat.div_(self._world_size)
        dist.all_reduce(flat)
        for part, gradient in zip(parts, gradients, strict=True):
            gradient.copy_(part)

    def _ranks_where(self, failed: bool) -> list[int]:
        if self._world_size == 1:
            return [0] if failed else []
        flags = torch.zeros(self._world_size, dtype=torch.int32)
        flags[self._rank] = failed
        dist.all_reduce(flags, group=self._group)
        return [rank for rank, flag in enumerate(flags.tolist()) if flag]


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters of one device and dtype, up to 25 MiB, in an order that ranks share."""
    kinds: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    buckets: list[list[nn.Parameter]] = []
    for kind in kinds.values():
        taken = _BUCKET_BYTES
        for parameter in kind:
            size = parameter.numel() * parameter.element_size()
            if taken + size > _BUCKET_BYTES:
                buckets.append([])
                taken = 0
            buckets[-1].append(parameter)
            taken += size
    return buckets


def _fill_gradients(used: set[nn.Parameter]) -> None:
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
