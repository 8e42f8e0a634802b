"""Devices to try training steps on: CUDA, or a CPU with a limit on the bytes of its tensors."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

from d2scale.memory.allocator import MIB
from d2scale.memory.tracker import StorageTracker
from d2scale.planning.gpu_assumptions import context_bytes
from d2scale.planning.memory_profile import GIB


class Device(Protocol):
    """A device whose memory can be limited and measured."""

    # Whether torch's caching allocator manages its memory: it rounds requests up and loses room
    # between them.
    caches: bool

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""

    @property
    def name(self) -> str:
        """Its name and memory."""

    @property
    def total_bytes(self) -> int:
        """The memory of the device."""

    def room(self, budget_bytes: int) -> int:
        """Return the bytes that tensors can have, if this process may take ``budget_bytes``."""

    def limited(
        self, tensor_bytes: int, held: Iterable[torch.Tensor]
    ) -> AbstractContextManager[None]:
        """Limit the bytes of tensors inside; those ``held`` exist before and count."""

    def peaks(self) -> tuple[int, int]:
        """Return the most bytes that were allocated, and reserved, inside ``limited``."""


# Kernels that are loaded late, libraries that meet new shapes and the first large all-reduce take
# memory outside of torch's allocator: beside what tensors may have, this much or this part of the
# device, the larger, stays free.
_RESERVE_BYTES = 256 * MIB
_RESERVE_PART = 0.02


class CudaDevice:
    """A CUDA device, with torch's caching allocator."""

    caches = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def name(self) -> str:
        return f"{torch.cuda.get_device_name(self.device)}, {self.total_bytes / GIB:.2f} GiB"

    @property
    def total_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(self.device).total_memory)

    def room(self, budget_bytes: int) -> int:
        torch.cuda.synchronize(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        # Not what this process's context, and other processes, have taken already.
        free += torch.cuda.memory_reserved(self.device)
        reserve = max(_RESERVE_BYTES, round(_RESERVE_PART * total))
        return min(free - reserve, _without_context(budget_bytes, self.device))

    @property
    def context_bytes(self) -> int:
        """The part of the whole device that this process's tensors cannot have."""
        return self.total_bytes - self.room(self.total_bytes)

    @contextmanager
    def limited(self, tensor_bytes: int, held: Iterable[torch.Tensor]) -> Iterator[None]:
        before = _memory_fraction(self.device)
        self._clean()
        torch.cuda.reset_peak_memory_stats(self.device)
        fraction = min(tensor_bytes / self.total_bytes, 1.0)
        torch.cuda.set_per_process_memory_fraction(fraction, self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(before, self.device)
            self._clean()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peaks(self) -> tuple[int, int]:
        torch.cuda.synchronize(self.device)
        live = torch.cuda.max_memory_allocated(self.device)
        return int(live), int(torch.cuda.max_memory_reserved(self.device))

    def _clean(self) -> None:
        # Cycles in the traceback of a failed step hold its tensors.
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()


class SimulatedDevice:
    """A CPU that counts the bytes of its tensors and runs out of memory at a limit.

    Args:
        total_bytes: memory of the device.
        context_bytes: the part of it that tensors cannot have.
    """

    caches = False

    def __init__(self, total_bytes: int, context_bytes: int = 0) -> None:
        self.device = torch.device("cpu")
        self.name = f"a CPU as a device of {total_bytes / GIB:.2f} GiB"
        self.total_bytes = total_bytes
        self.context_bytes = context_bytes
        self._tracker = StorageTracker()

    def room(self, budget_bytes: int) -> int:
        return budget_bytes - self.context_bytes

    @contextmanager
    def limited(self, tensor_bytes: int, held: Iterable[torch.Tensor]) -> Iterator[None]:
        gc.collect()
        self._tracker = StorageTracker(tensor_bytes)
        with self._tracker:
            self._tracker.count(*held)
            yield
        gc.collect()

    def peaks(self) -> tuple[int, int]:
        return self._tracker.peak_bytes, self._tracker.peak_bytes


def hold_to_budget(device: torch.device, budget_gib: float) -> None:
    """Let torch's allocator refuse what would go beyond a budget; 0: there is none.

    It counts tensors, and so the context's share, which is assumed, is taken off.
    """
    if device.type != "cuda" or not budget_gib:
        return
    tensor_bytes = _without_context(round(budget_gib * GIB), device)
    fraction = tensor_bytes / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(max(fraction, 0.0), 1.0), device)


def _without_context(budget_bytes: int, device: torch.device) -> int:
    return budget_bytes - context_bytes(torch.cuda.get_device_properties(device).major)


def _memory_fraction(device: torch.device) -> float:
    # Older versions of torch cannot return it; there it is assumed to be the default.
    get_fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if get_fraction is None else float(get_fraction(device))
