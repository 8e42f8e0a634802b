"""Counts the bytes that training holds, operation by operation, on any machine.

A dispatch mode sees every tensor that an operation makes, fake or real. It counts each storage
once, from the operation that made it until it dies, so views cost nothing and what autograd
saves counts for as long as autograd keeps it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d2scale.memory.stream import Allocation, Trace
from d2scale.step.out_of_memory import OutOfMemoryError

_OTHER = "other"
_CONVOLUTIONS = ("aten::convolution", "aten::convolution_backward", "aten::_convolution")


@dataclass(eq=False)
class _Live:
    """A storage that is counted now."""

    allocation: Allocation
    # Keeps the callback that notices the storage's death.
    watch: weakref.ref[Any] | None = field(default=None, repr=False)


class StorageTracker(TorchDispatchMode):
    """Counts live storages while it is active, and what dies later.

    Used inside ``FakeTensorMode``, it costs no memory and hardly any time; without, it counts a
    real step. Storages on the ``meta`` device are not counted.

    Args:
        budget_bytes: most bytes that may live; an operation that goes beyond it raises torch's
            own out-of-memory error, as a full device does. None: no limit.

    Attributes:
        live_bytes: bytes alive now.
        peak_bytes: the most so far; :meth:`reset_peak` starts anew.
    """

    def __init__(self, budget_bytes: int | None = None) -> None:
        super().__init__()
        self.budget_bytes = budget_bytes
        self.live_bytes = 0
        self.peak_bytes = 0
        self._phase = _OTHER
        self._live: dict[int, _Live] = {}
        self._trace: Trace | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the part of a step that the operations inside belong to."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    @contextmanager
    def recording(self) -> Iterator[Trace]:
        """Record what is allocated and freed inside; what lives already is its beginning."""
        trace = Trace([live.allocation for live in self._live.values()])
        before, self._trace = self._trace, trace
        try:
            yield trace
        finally:
            self._trace = before

    def count(self, *tensors: Tensor) -> None:
        """Count tensors that were made while the tracker was not active; no budget stops them."""
        budget, self.budget_bytes = self.budget_bytes, None
        for tensor in tensors:
            self._see(tensor, "given")
        self.budget_bytes = budget

    def reset_peak(self) -> None:
        """Let the peak start from what lives now."""
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        name = func._schema.name
        if self._trace is not None and name in _CONVOLUTIONS:
            self._trace.workspace(_bytes_of((args, outputs)), self._phase)
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                self._see(leaf, name)
        return outputs

    def _see(self, tensor: Tensor, operation: str) -> None:
        if tensor.device.type == "meta" or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        nbytes = storage.nbytes()
        known = self._live.get(key)
        if known is not None:
            if known.allocation.nbytes == nbytes:
                return
            self._forget(key)  # resized in place: a new request
        self._check_budget(nbytes)
        allocation = Allocation(operation, tuple(tensor.shape[1:]), self._phase, nbytes)
        live = self._live[key] = _Live(allocation)
        live.watch = weakref.ref(storage, lambda _: self._forget(key, live))
        self.live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if self._trace is not None:
            self._trace.allocate(allocation)

    def _check_budget(self, nbytes: int) -> None:
        if self.budget_bytes is not None and self.live_bytes + nbytes > self.budget_bytes:
            # In torch's own words, by which other tools recognise it.
            raise OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {nbytes} bytes on a simulated device: "
                f"{self.live_bytes} of {self.budget_bytes} are in use"
            )

    def _forget(self, key: int, expected: _Live | None = None) -> None:
        live = self._live.get(key)
        if live is None or (expected is not None and live is not expected):
            return
        del self._live[key]
        self.live_bytes -= live.allocation.nbytes
        if self._trace is not None:
            self._trace.free(live.allocation)


def _bytes_of(values: Any) -> int:
    """Bytes of all tensors in a nest."""
    return sum(t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, Tensor))
