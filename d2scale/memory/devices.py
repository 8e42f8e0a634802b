"""Where training steps are tried: a CUDA device, or a CPU that pretends to be small."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch

from d2scale.memory.allocator import MIB
from d2scale.memory.tracker import StorageTracker


class Device(Protocol):
    """What a trial needs to know of a device, and to do with it.

    Attributes:
        caches: whether torch's caching allocator stands before its memory: it rounds requests up
            and loses room between them.
    """

    caches: bool

    @property
    def device(self) -> torch.device:
        """Where tensors lie."""

    @property
    def total_bytes(self) -> int:
        """All its memory."""

    @property
    def context_bytes(self) -> int:
        """What is taken of it and not by this process's tensors."""

    def limited(
        self, tensor_bytes: int, held: Iterable[torch.Tensor]
    ) -> AbstractContextManager[None]:
        """Let tensors take no more than this inside, with those ``held`` before and after."""

    def peaks(self) -> tuple[int, int]:
        """Return the most bytes that lived, and that were reserved, inside ``limited``."""


class CudaDevice:
    """A CUDA device, with torch's caching allocator."""

    caches = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def total_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(self.device).total_memory)

    @property
    def context_bytes(self) -> int:
        torch.cuda.synchronize(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        return int(total - free - torch.cuda.memory_reserved(self.device))

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
    """A CPU whose tensors are counted, and refused beyond a limit, as a device's would be.

    Args:
        total_bytes: what the device would have.
        context_bytes: what its runtime would take.
    """

    caches = False

    def __init__(self, total_bytes: int, context_bytes: int = 0) -> None:
        self.device = torch.device("cpu")
        self.total_bytes = total_bytes
        self.context_bytes = context_bytes
        self._tracker = StorageTracker()

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


def device_at_hand(device: torch.device, simulated_gib: float = 0.0) -> Device:
    """Return the device of a training, a CPU as one of ``simulated_gib``."""
    if device.type == "cuda":
        return CudaDevice(device)
    return SimulatedDevice(int(simulated_gib * 1024 * MIB))


def _memory_fraction(device: torch.device) -> float:
    # Older versions of torch do not tell it; there it is what it was from the start.
    tell = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if tell is None else float(tell(device))
